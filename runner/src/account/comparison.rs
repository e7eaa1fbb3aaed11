//! The differences between runs, and which run has the best value of a metric.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::Value;

use crate::store::{RunDetail, RunId, SeriesSummary};

/// What a row of a comparison is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ComparedValue {
    /// `run`, `parameter`, `environment`, `metric`, `picture`.
    pub about: &'static str,
    /// Its name: a path, a series, a stage.
    pub name: String,
}

/// All facts about a run; pictures as paths in the store at `dir`.
pub fn facts(
    detail: &RunDetail,
    metrics: &[SeriesSummary],
    dir: &Path,
) -> Vec<(ComparedValue, Value)> {
    let mut facts = Vec::new();
    let mut add = |about, name: String, value| facts.push((ComparedValue { about, name }, value));
    add(
        "run",
        "recipe".into(),
        detail.summary.recipe.as_str().into(),
    );
    add("run", "state".into(), detail.summary.state.name().into());
    for param in &detail.params {
        add("parameter", param.path.clone(), param.value.clone());
    }
    for stage in &detail.stages {
        let plugin = &stage.plugin;
        let hash = plugin.hash.get(..12).unwrap_or(&plugin.hash);
        let plugin = format!("{} {} ({hash})", plugin.name, plugin.version);
        add(
            "environment",
            format!("{}: plugin", stage.name),
            plugin.into(),
        );
        add(
            "environment",
            format!("{}: device", stage.name),
            stage.device.as_str().into(),
        );
    }
    for (name, value) in detail.environment.as_object().into_iter().flatten() {
        add("environment", name.clone(), value.clone());
    }
    for series in metrics {
        let value = serde_json::json!(series)["last"].take();
        add(
            "metric",
            format!("{}/{}", series.stage, series.series),
            value,
        );
    }
    for artifact in &detail.artifacts {
        if let Some(preview) = &artifact.artifact.meta.preview {
            let path = dir.join("artifacts").join(&artifact.artifact.hash);
            let path = format!("{}/{preview}", path.display());
            add("picture", artifact.stage.clone(), path.into());
        }
    }
    facts
}

/// The indices of the best values of a metric; none if it is not known which is better, or if all are equal.
pub fn best(fact: &ComparedValue, values: &[Option<&Value>]) -> Vec<usize> {
    const LOWER: [&str; 10] = [
        "loss",
        "fd",
        "fid",
        "distance",
        "error",
        "seconds",
        "entropy",
        "divergence",
        "lpips",
        "reconstruction",
    ];
    const HIGHER: [&str; 8] = [
        "accuracy",
        "agreement",
        "precision",
        "recall",
        "score",
        "is",
        "psnr",
        "ssim",
    ];
    if fact.about != "metric" {
        return Vec::new();
    }
    let last = fact.name.rsplit('/').next().unwrap_or_default();
    let has = |words: &[&str]| {
        last.split(['_', '.', '-'])
            .any(|word| words.contains(&word))
    };
    let lower = has(&LOWER) || last == "frechet_ratio";
    let sign = match (has(&HIGHER) || last.ends_with("per_second"), lower) {
        (true, _) => -1.0,
        (false, true) => 1.0,
        (false, false) => return Vec::new(),
    };
    let number = |value: &Option<&Value>| value.and_then(Value::as_f64).map(|value| value * sign);
    let known: Vec<f64> = values.iter().filter_map(number).collect();
    let least = known.iter().copied().fold(f64::INFINITY, f64::min);
    if known.len() < 2 || known.iter().all(|value| *value == least) {
        return Vec::new();
    }
    let places = (0..).zip(values);
    places
        .filter(|(_, value)| number(value) == Some(least))
        .map(|(place, _)| place)
        .collect()
}

/// The facts about any of the runs, in order of first occurrence; without `all` only those that differ.
pub fn side_by_side(
    runs: &[(RunId, Vec<(ComparedValue, Value)>)],
    all: bool,
) -> Vec<(&ComparedValue, Vec<Option<&Value>>)> {
    let by_fact: Vec<HashMap<&ComparedValue, &Value>> = runs
        .iter()
        .map(|(_, facts)| facts.iter().map(|(fact, value)| (fact, value)).collect())
        .collect();
    let mut seen = HashSet::new();
    let mut rows: Vec<_> = runs
        .iter()
        .flat_map(|(_, facts)| facts.iter().map(|(fact, _)| fact))
        .filter(|fact| seen.insert(*fact))
        .map(|fact| {
            (
                fact,
                by_fact
                    .iter()
                    .map(|facts| facts.get(fact).copied())
                    .collect::<Vec<_>>(),
            )
        })
        .filter(|(_, values)| all || values.iter().any(|value| *value != values[0]))
        .collect();
    let place = |fact: &ComparedValue| {
        ["run", "parameter", "environment", "metric", "picture"]
            .iter()
            .position(|about| *about == fact.about)
    };
    rows.sort_by_key(|(fact, _)| place(fact));
    rows
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn run(
        id: &str,
        facts: &[(&'static str, &str, Value)],
    ) -> (RunId, Vec<(ComparedValue, Value)>) {
        let fact = |(about, name, value): &(&'static str, &str, Value)| {
            (
                ComparedValue {
                    about,
                    name: (*name).to_owned(),
                },
                value.clone(),
            )
        };
        (RunId(id.into()), facts.iter().map(fact).collect())
    }

    #[test]
    fn the_best_is_marked_where_it_is_known_which_is_better() {
        let check = |name: &str, values: &[Value], expected: &[usize]| {
            let fact = ComparedValue {
                about: "metric",
                name: name.into(),
            };
            let values: Vec<Option<&Value>> = values.iter().map(Some).collect();
            assert_eq!(best(&fact, &values), expected, "{name}");
        };
        let values = [json!(2.0), json!(1.0), json!("NaN"), json!(1.0)];
        check("distill/held_out_loss_t0", &values, &[1, 3]);
        check("evaluate/one_step/precision", &values, &[0]);
        check("sample/images_per_second", &values, &[0]);
        check("distill/learning_rate", &values, &[]);
        check("tokenizer/held_out_ssim", &values, &[0]);
        check("tokenizer/held_out_lpips", &values, &[1, 3]);
        check("1-step/frechet_ratio", &values, &[1, 3]);
        check("distill/loss", &[json!(1.0), json!(1.0)], &[]);
    }

    #[test]
    fn only_what_differs_is_shown_and_gaps_differ() {
        let runs = [
            run(
                "a",
                &[
                    ("metric", "loss", json!(0.5)),
                    ("parameter", "seed", json!(1)),
                    ("parameter", "k", json!(2)),
                ],
            ),
            run(
                "b",
                &[
                    ("parameter", "seed", json!(1)),
                    ("parameter", "k", json!(3)),
                    ("parameter", "z", json!(null)),
                ],
            ),
        ];
        let shown = |all: bool| {
            side_by_side(&runs, all)
                .into_iter()
                .map(|(fact, values)| format!("{} {} {}", fact.about, fact.name, json!(values)))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            shown(false),
            [
                "parameter k [2,3]",
                "parameter z [null,null]",
                "metric loss [0.5,null]"
            ]
        );
        assert_eq!(shown(true).len(), 4);
    }
}
