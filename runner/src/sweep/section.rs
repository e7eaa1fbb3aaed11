//! What a recipe's `sweep:` says.

use serde_json::{Value, json};
use std::collections::HashSet;

use super::{Asha, Goal, Objective, Parameter, RandomSearch, Sweep, Values};
use crate::diagnostic::Finding;
use crate::yaml::escape;

/// One of so many goes on, unless the recipe says otherwise.
const REDUCTION: u32 = 2;

/// Reads the value of `sweep:`, whose shape has been checked by [`schema`]. `typed` says how the value at a pointer would
/// be given to `--set`.
///
/// # Errors
/// What is wrong with it; pointers begin at the recipe's root.
pub fn section(
    value: &Value,
    typed: &dyn Fn(&str, &Value) -> String,
) -> Result<Sweep, Vec<Finding>> {
    let mut findings = Vec::new();
    let mut parameters = Vec::new();
    for (path, values) in value["parameters"].as_object().into_iter().flatten() {
        let pointer = format!("/sweep/parameters/{}", escape(path));
        match values_of(values, &pointer, typed) {
            Ok(values) => parameters.push(Parameter {
                path: path.clone(),
                values,
            }),
            Err(message) => findings.push(Finding::error(pointer, format!("`{path}`: {message}"))),
        }
    }
    let goal = |value: &Value| match value["goal"].as_str() {
        Some("max") => Goal::Max,
        _ => Goal::Min,
    };
    let metric = |value: &Value| value["metric"].as_str().unwrap_or_default().to_owned();
    let small = |value: &Value| value.as_u64().and_then(|value| u32::try_from(value).ok());
    let asha = value.get("asha").map(|asha| Asha {
        metric: metric(asha),
        goal: goal(asha),
        rungs: asha["rungs"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_u64)
            .collect(),
        reduction_factor: small(&asha["reduction_factor"]).unwrap_or(REDUCTION),
    });
    if let Some(asha) = &asha
        && !asha.rungs.is_sorted_by(|a, b| a < b)
    {
        let message = "the steps of `rungs` do not rise";
        findings.push(Finding::error("/sweep/asha/rungs", message));
    }
    if !findings.is_empty() {
        return Err(findings);
    }
    Ok(Sweep {
        parameters,
        objective: value.get("objective").map(|objective| Objective {
            metric: metric(objective),
            goal: goal(objective),
        }),
        sample: small(&value["sample"]).map(|count| RandomSearch {
            count,
            seed: value["seed"].as_u64().unwrap_or(0),
        }),
        asha,
    })
}

fn values_of(
    value: &Value,
    pointer: &str,
    typed: &dyn Fn(&str, &Value) -> String,
) -> Result<Values, String> {
    let choice = |items: &[Value], pointer: &str| {
        let (mut texts, mut seen) = (Vec::new(), HashSet::new());
        for (index, item) in items.iter().enumerate() {
            let text = typed(&format!("{pointer}/{index}"), item);
            if !seen.insert(text.clone()) {
                return Err(format!("the value `{text}` is there twice"));
            }
            texts.push(text);
        }
        match texts.is_empty() {
            true => Err("there are no values".to_owned()),
            false => Ok(Values::Choice(texts)),
        }
    };
    if let Some(items) = value.as_array() {
        return choice(items, pointer);
    }
    let others = ["min", "max", "log", "int", "count"];
    let has_others = others.iter().any(|key| value.get(key).is_some());
    if let Some(items) = value["choice"].as_array() {
        return match has_others {
            true => Err("`choice` stands alone: it is a list of values".to_owned()),
            false => choice(items, &format!("{pointer}/choice")),
        };
    }
    let (Some(min), Some(max)) = (value["min"].as_f64(), value["max"].as_f64()) else {
        return Err(
            "expected a list of values, `choice`, or `min` and `max` of a range".to_owned(),
        );
    };
    let is = |key: &str| value[key].as_bool().unwrap_or(false);
    if !is("int") {
        let count = value["count"].as_u64();
        let count = count.map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        return Values::real(min, max, is("log"), count);
    }
    // The schema has them as numbers, which `1` becomes too.
    let whole = |number: f64| {
        (number.fract() == 0.0 && number.abs() <= 2_f64.powi(53)).then_some(number as i64)
    };
    match (whole(min), whole(max)) {
        _ if value.get("count").is_some() => {
            Err("`count` divides a range of numbers, not one of whole numbers".to_owned())
        }
        (Some(min), Some(max)) => Values::whole(min, max, is("log")),
        _ => Err("with `int` both ends are whole numbers".to_owned()),
    }
}

/// The schema of `sweep:`.
pub fn schema() -> Value {
    let goal = json!({"type": "string", "enum": ["min", "max"], "default": "min", "description": "Whether the smallest or the largest value is best."});
    json!({
        "type": "object", "additionalProperties": false, "required": ["parameters"],
        "description": "Values that `retort run --sweep` varies: one run for each point.",
        "properties": {
            "parameters": {
                "type": "object", "minProperties": 1,
                "description": "The varied parameters, by path as in `--set`: a list of values, or a range of each.",
                "additionalProperties": {
                    "type": ["array", "object"], "minItems": 1, "additionalProperties": false,
                    "properties": {
                        "choice": {"type": "array", "minItems": 1, "description": "The values."},
                        "min": {"type": "number", "description": "The smallest value of a range."},
                        "max": {"type": "number", "description": "The largest value of a range."},
                        "log": {"type": "boolean", "default": false, "description": "Whether the logarithm is divided evenly."},
                        "int": {"type": "boolean", "default": false, "description": "Whether the range is of whole numbers."},
                        "count": {"type": "integer", "minimum": 2, "maximum": super::MAX_POINTS, "description": "Number of values that a grid takes from the range."}
                    }
                }
            },
            "objective": {
                "type": "object", "additionalProperties": false, "required": ["metric"],
                "description": "What `retort sweep best` looks for.",
                "properties": {
                    "metric": {"type": "string", "minLength": 1, "description": "A metric: `evaluation/1-step/frechet_distance`."},
                    "goal": goal
                }
            },
            "sample": {
                "type": "integer", "minimum": 1, "maximum": super::MAX_POINTS,
                "description": "How many points are drawn at random. Without it every combination is run."
            },
            "seed": {
                "type": "integer", "minimum": 0, "maximum": 9_007_199_254_740_991_u64, "default": 0,
                "description": "Seed for drawing points."
            },
            "asha": {
                "type": "object", "additionalProperties": false, "required": ["metric", "rungs"],
                "description": "Successive halving: points are stopped at rungs, and the best continue.",
                "properties": {
                    "metric": {"type": "string", "minLength": 1, "description": "Series that points are judged by: `distill/loss`, or `student/distill/loss` with its stage."},
                    "goal": goal,
                    "rungs": {
                        "type": "array", "minItems": 1, "maxItems": 20,
                        "items": {"type": "integer", "minimum": 1},
                        "description": "Steps of the series at which points are judged, ascending."
                    },
                    "reduction_factor": {
                        "type": "integer", "minimum": 2, "maximum": 1000, "default": REDUCTION,
                        "description": "One in this many points continues."
                    }
                }
            }
        }
    })
}
