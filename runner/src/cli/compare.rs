//! `retort compare`.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use crate::cli::{Context, Error, FormatArgs, talk};
use crate::store::{Access, RunDetail, RunId, SeriesSummary, Store};
use crate::table::{Cell, Rows, Style, Tone};

/// Arguments of `compare`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Two or more runs: ids or beginnings of them, `latest`, `latest~1`, or tags.
    #[arg(value_name = "RUN", num_args = 2.., required = true)]
    pub runs: Vec<String>,
    /// Also what they share.
    #[arg(long)]
    pub all: bool,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Compares runs.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let runs = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let mut runs = Vec::new();
        for reference in &args.runs {
            let id = store.resolve_run(reference).await?;
            runs.push((
                id.clone(),
                facts(
                    &store.run_detail(&id).await?,
                    &store.last_metrics(&id).await?,
                ),
            ));
        }
        store.close().await;
        Ok::<_, Error>(runs)
    })?;
    let facts = side_by_side(&runs, args.all);
    let style = args.format.style(context);
    if style == Style::Json {
        let ids: Vec<_> = runs.iter().map(|(id, _)| id).collect();
        let rows: Vec<_> = facts
            .iter()
            .map(|(fact, values)| serde_json::json!({"about": fact.about, "name": fact.name, "values": values}))
            .collect();
        return Ok(talk::print(&format!(
            "{:#}\n",
            serde_json::json!({"runs": ids, "rows": rows})
        ))?);
    }
    let heads: Vec<&str> = ["about", "name"]
        .into_iter()
        .chain(runs.iter().map(|(id, _)| id.0.as_str()))
        .collect();
    let mut rows = Rows::new(&heads);
    for (fact, values) in &facts {
        let cells = values
            .iter()
            .map(|value| value.map_or_else(|| Cell::from("-").tone(Tone::Dim), Cell::json));
        rows.push(
            [
                Cell::from(fact.about).tone(Tone::Dim),
                fact.name.as_str().into(),
            ]
            .into_iter()
            .chain(cells),
        );
    }
    if rows.is_empty() && !context.quiet {
        talk::say("these runs do not differ; `--all` shows what they share");
    }
    Ok(talk::print(&rows.render(style))?)
}

/// Something that can be said of a run.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Fact {
    /// `run`, `parameter`, `environment`, `metric`.
    about: &'static str,
    name: String,
}

fn facts(detail: &RunDetail, metrics: &[SeriesSummary]) -> Vec<(Fact, Value)> {
    let mut facts = Vec::new();
    let mut add = |about, name: String, value| facts.push((Fact { about, name }, value));
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
    facts
}

/// What is said of any of the runs, in the order of the first that says it; without `all` only what differs.
fn side_by_side(
    runs: &[(RunId, Vec<(Fact, Value)>)],
    all: bool,
) -> Vec<(&Fact, Vec<Option<&Value>>)> {
    let by_fact: Vec<HashMap<&Fact, &Value>> = runs
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
    let place = |fact: &Fact| {
        ["run", "parameter", "environment", "metric"]
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

    fn run(id: &str, facts: &[(&'static str, &str, Value)]) -> (RunId, Vec<(Fact, Value)>) {
        let fact = |(about, name, value): &(&'static str, &str, Value)| {
            (
                Fact {
                    about,
                    name: (*name).to_owned(),
                },
                value.clone(),
            )
        };
        (RunId(id.into()), facts.iter().map(fact).collect())
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
