//! The metrics of sets of samples as a table and as values in a file. A missing metric is shown as `n/a` with the reason; the
//! others are not affected.

use retort_abi::Table;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::measure::Measurement;

/// A metric of a set.
pub struct Metric {
    /// Name in metrics and files.
    pub key: &'static str,
    /// Head of its column.
    title: &'static str,
    /// Decimals shown.
    digits: i32,
    /// Its value, or why it is missing.
    pub value: Measurement<f64>,
}

impl Metric {
    /// A metric.
    pub fn new(
        key: &'static str,
        title: &'static str,
        digits: i32,
        value: Measurement<f64>,
    ) -> Self {
        Self {
            key,
            title,
            digits,
            value,
        }
    }

    fn cell(&self) -> Value {
        match &self.value {
            Ok(x) => {
                let power = 10f64.powi(self.digits);
                json!((x * power).round() / power)
            }
            Err(reason) => json!(format!("n/a: {reason}")),
        }
    }
}

/// The metrics of a set, the Frechet distance first.
pub struct SetMetrics {
    /// The set's name in the table and in series.
    pub name: String,
    /// Number of samples.
    pub count: usize,
    /// Network passes per sample, if known.
    pub passes: Option<usize>,
    /// Its metrics, the same ones in every row.
    pub metrics: Vec<Metric>,
    /// The subsets of its kernel distance, if it has one.
    pub kernel: Option<KernelSubsets>,
}

/// The subsets of a kernel distance, limited by the number of samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct KernelSubsets {
    /// Pairs of subsets.
    pub subsets: usize,
    /// Samples of a subset.
    pub size: usize,
}

impl SetMetrics {
    /// Values by key; reasons under `not_available`.
    pub fn summary(&self) -> Value {
        let mut values = Map::from_iter([("samples".to_owned(), json!(self.count))]);
        if let Some(passes) = self.passes {
            values.insert("passes".to_owned(), json!(passes));
        }
        if let Some(kernel) = &self.kernel {
            values.insert("kernel".to_owned(), json!(kernel));
        }
        let mut reasons = Map::new();
        for metric in &self.metrics {
            let value = match &metric.value {
                Ok(value) => json!(value),
                Err(reason) => {
                    reasons.insert(metric.key.to_owned(), json!(reason));
                    Value::Null
                }
            };
            values.insert(metric.key.to_owned(), value);
        }
        if !reasons.is_empty() {
            values.insert("not_available".to_owned(), reasons.into());
        }
        values.into()
    }
}

/// Adds the ratio of each Frechet distance to that of the set `reference`, if there is such a set among these.
pub fn relate(rows: &mut [SetMetrics], reference: &str) {
    let base = rows.iter().find(|row| row.name == reference);
    let Some(base) = base.map(|row| row.metrics[0].value.clone()) else {
        return;
    };
    for row in rows {
        let ratio = match (&row.metrics[0].value, &base) {
            (Ok(own), Ok(base)) => Ok(own / base),
            (Err(reason), _) => Err(reason.clone()),
            (_, Err(reason)) => Err(format!("{reference}: {reason}")),
        };
        row.metrics
            .insert(1, Metric::new("frechet_ratio", RATIO, 2, ratio));
    }
}

/// Head of the column of ratios; the table names the set.
const RATIO: &str = "x";

/// The metrics of all sets.
pub fn table(title: String, rows: &[SetMetrics], reference: &str) -> Table {
    let head = |metric: &Metric| match metric.title {
        RATIO => format!("x {reference}"),
        title => title.to_owned(),
    };
    let metrics = rows.first().map_or(&[][..], |row| &row.metrics);
    Table {
        title,
        columns: ["set", "samples", "passes"]
            .map(str::to_owned)
            .into_iter()
            .chain(metrics.iter().map(head))
            .collect(),
        rows: rows
            .iter()
            .map(|row| {
                let passes = row.passes.map_or(json!("n/a"), |passes| json!(passes));
                [json!(row.name), json!(row.count), passes]
                    .into_iter()
                    .chain(row.metrics.iter().map(Metric::cell))
                    .collect()
            })
            .collect(),
    }
}
