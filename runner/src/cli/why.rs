//! `retort why`: why a stage of a run ran, or was reused.

use serde_json::{Value, json};

use crate::account::reasons;
use crate::cli::{Context, Error, Exit, FormatArgs, output};
use crate::store::{Access, RunDetail, Store};
use crate::table::{Rows, Style};

/// Arguments of `why`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The stage.
    #[arg(value_name = "STAGE")]
    pub stage: String,
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Says why a stage ran or was reused.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let (run, reasons) = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = store.resolve_run(&args.run).await?;
        if store.stage_record(&run, &args.stage).await?.is_none() {
            return Err(no_such_stage(&store.run_detail(&run).await?, &args.stage));
        }
        let reasons = reasons::of_stage(&store, &run, &args.stage).await?;
        store.close().await;
        Ok::<_, Error>((run, reasons))
    })?;
    let style = args.format.style(context);
    if style == Style::Json {
        let list: Vec<Value> = reasons
            .iter()
            .map(|reason| {
                json!({"run": run, "stage": reason.stage, "depth": reason.depth, "state": reason.state,
                    "compared_with": reason.compared_with, "why": reason.why})
            })
            .collect();
        return Ok(output::print(&format!("{:#}\n", json!(list)))?);
    }
    let mut rows = Rows::new(&["stage", "state", "why", "compared with"]);
    for reason in &reasons {
        let indent = "  ".repeat(reason.depth);
        rows.push([
            format!("{indent}{}", reason.stage).into(),
            reason.state.into(),
            reason.why.join("\n").into(),
            reason
                .compared_with
                .as_ref()
                .map(|run| run.0.as_str())
                .into(),
        ]);
    }
    Ok(output::print(&rows.render(style))?)
}

/// The error for the name of a stage that a run does not have.
pub(super) fn no_such_stage(run: &RunDetail, stage: &str) -> Error {
    let names: Vec<&str> = run.stages.iter().map(|stage| stage.name.as_str()).collect();
    Error::new(
        Exit::NothingMatches,
        format!("run {} has no stage `{stage}`", run.summary.id),
    )
    .hint(format!("it has {}", names.join(", ")))
}
