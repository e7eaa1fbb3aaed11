//! `retort compare`.

use crate::account::comparison::{best, facts, side_by_side};
use crate::cli::{Context, Error, FormatArgs, output};
use crate::store::{Access, Store};
use crate::table::{Cell, CellStyle, Rows, Style};

/// Arguments of `compare`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Two or more runs: ids or prefixes of them, `latest`, `latest~1`, or tags.
    #[arg(value_name = "RUN", num_args = 2.., required = true)]
    pub runs: Vec<String>,
    /// Show equal values too.
    #[arg(long)]
    pub all: bool,
    /// Output format.
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
                    &context.store,
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
            .map(|(fact, values)| {
                serde_json::json!({"about": fact.about, "name": fact.name, "values": values,
                    "best": best(fact, values)})
            })
            .collect();
        return Ok(output::print(&format!(
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
        let best = best(fact, values);
        let cells = (0..).zip(values).map(|(place, value)| {
            let cell = value.map_or_else(|| Cell::from("-").style(CellStyle::Dim), Cell::json);
            match best.contains(&place) {
                true => cell.marked(" *").style(CellStyle::Ok),
                false => cell,
            }
        });
        rows.push(
            [
                Cell::from(fact.about).style(CellStyle::Dim),
                fact.name.as_str().into(),
            ]
            .into_iter()
            .chain(cells),
        );
    }
    if facts
        .iter()
        .any(|(fact, values)| !best(fact, values).is_empty())
        && !context.quiet
    {
        output::say("* best of the row");
    }
    if rows.is_empty() && !context.quiet {
        output::say("these runs are equal; `--all` shows all values");
    }
    Ok(output::print(&rows.render(style))?)
}
