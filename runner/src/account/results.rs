//! A sweep's results: the value of each point, and which are the best.
//!
//! In: a sweep of the store, and an objective. Out: one order of its points, for tables, pictures and pages.

use std::collections::HashMap;

use serde_json::Value;

use crate::account::plot::{self, Axis, PlottedPoint};
use crate::filter;
use crate::store::{RunFilter, RunSummary, Store, StoreError, SweepDetail, SweepPoint};
use crate::sweep::{Goal, Objective};

/// A sweep, with the values of its objective.
pub struct Results {
    /// The sweep and its points.
    pub detail: SweepDetail,
    /// The objective.
    pub objective: Option<Objective>,
    /// The runs that represent points, by id, with the objective among their values.
    runs: HashMap<String, RunSummary>,
    /// Why there are no values.
    pub unknown: Option<String>,
}

impl Results {
    /// Reads the values of the objective, or of another one if given.
    ///
    /// # Errors
    /// As [`Store::list_runs`]; a metric that no run has is no error.
    pub async fn of(
        store: &Store,
        detail: SweepDetail,
        other: Option<Objective>,
    ) -> Result<Self, StoreError> {
        let definition = &detail.plan.definition;
        // By default points judged at rungs are judged by the same series at the end.
        let judged = definition.asha.as_ref().map(|asha| Objective {
            metric: asha.metric.clone(),
            goal: asha.goal,
        });
        let objective = other.or_else(|| definition.objective.clone()).or(judged);
        let name = objective
            .as_ref()
            .map(|objective| format!("metrics.{}", objective.metric));
        let mut unknown = None;
        let column = match name.as_deref().map(filter::parse_name) {
            Some(Ok(name)) => Some(name),
            Some(Err(error)) => {
                unknown = Some(error.to_string());
                None
            }
            None => None,
        };
        let mut filter = RunFilter {
            expr: filter::parse(&format!("sweep = {}", detail.id)).ok(),
            columns: column.into_iter().collect(),
            ..RunFilter::default()
        };
        let runs = match store.list_runs(&filter).await {
            // No run of the store has such a metric.
            Err(StoreError::Filter(error)) => {
                unknown = Some(match &error.hint {
                    Some(hint) => format!("{error}; {hint}"),
                    None => error.to_string(),
                });
                filter.columns = Vec::new();
                store.list_runs(&filter).await?
            }
            runs => runs?,
        };
        Ok(Self {
            detail,
            objective,
            runs: runs
                .into_iter()
                .map(|run| (run.id.0.clone(), run))
                .collect(),
            unknown,
        })
    }

    /// Points that have succeeded.
    pub fn succeeded(&self) -> usize {
        let points = self.detail.points.iter();
        points.filter(|point| point.is_done()).count()
    }

    /// The run that represents a point.
    pub fn run(&self, point: &SweepPoint) -> Option<&RunSummary> {
        self.runs.get(&point.run.as_ref()?.0.0)
    }

    /// A point's value; NaN is a value.
    pub fn value(&self, point: &SweepPoint) -> Option<f64> {
        match self.run(point)?.values.values().next()? {
            Value::Number(number) => number.as_f64(),
            // The table's form of a missing number.
            Value::String(_) => Some(f64::NAN),
            _ => None,
        }
    }

    /// The complete points with a value, the best first.
    pub fn ranked(&self) -> Vec<(&SweepPoint, f64)> {
        let goal = self
            .objective
            .as_ref()
            .map_or(Goal::Min, |objective| objective.goal);
        let mut ranked: Vec<(&SweepPoint, f64)> = self
            .detail
            .points
            .iter()
            .filter(|point| point.is_done())
            .filter_map(|point| Some((point, self.value(point)?)))
            .collect();
        ranked.sort_by(|one, other| goal.order(one.1, other.1));
        ranked
    }

    /// The best point.
    pub fn best(&self) -> Option<(&SweepPoint, f64)> {
        self.ranked().into_iter().find(|(_, value)| !value.is_nan())
    }

    /// The points in a picture: complete ones with a finite value, the best first.
    pub fn drawn(&self) -> (Vec<Axis>, Vec<PlottedPoint>) {
        let ranked = self.ranked();
        let drawn = ranked
            .iter()
            .filter(|(_, value)| value.is_finite())
            .map(|(point, value)| (point.number, point.settings.as_slice(), *value));
        plot::of_points(&self.detail.plan.definition.parameters, drawn)
    }
}
