//! `retort plan`.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::artifact::Layout;
use crate::cli::known_results::{EmptyHistory, History};
use crate::cli::sweep::{self, SweepArgs};
use crate::cli::{Context, Error, Exit, RecipeArgs, SelectionArgs, output};
use crate::cluster::devices;
use crate::diagnostic::Report;
use crate::plan::decision::{self, Action, Decision};
use crate::plan::{Origin, Plan, PlannedStage, Threads};
use crate::plugin::{Plugins, search_dirs};
use crate::recipe;
use crate::settings::Settings;
use crate::store::{Access, Store, StoreError};
use crate::table::{Cell, CellStyle, Rows, Style};

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Which stages.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// Print the whole plan as JSON: every resolved value and its origin.
    #[arg(long)]
    pub json: bool,
    /// Which values to vary.
    #[command(flatten)]
    pub sweep: SweepArgs,
}

/// Planning creates no store, except after hashing this many bytes, to cache the hashes.
const WORTH_A_STORE: u64 = 1 << 30;

/// Prints what would run and why.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let recipe = recipe::read(&args.recipe.recipe, &args.recipe.set, context.home())?;
    if args.sweep.is_given() {
        return sweep::points::plan(&args.sweep, &args.selection, args.json, recipe, context);
    }
    let settings = Settings::read(&recipe.source.base_dir, &context.given())?;
    let runtime = context.runtime()?;
    let store = context.known_store(&runtime)?;
    let mut plugins = Plugins::new(search_dirs(&context.plugin_dirs), &runtime, store.as_ref());
    let plan = devices::plan(&recipe, &mut plugins, &settings)?;
    let roles = args.selection.roles(&plan)?;
    let mut nothing = EmptyHistory::default();
    let decisions = match &store {
        Some(store) => {
            let layout = Layout::new(&context.store)?;
            let mut past = History::new(&runtime, store, layout, args.selection.rehash.trust());
            decision::decide(&plan, &roles, &mut past)
        }
        None => decision::decide(&plan, &roles, &mut nothing),
    };
    let decisions = decisions.map_err(Error::of_history)?;
    if nothing.bytes >= WORTH_A_STORE {
        // Best effort: otherwise the next command reads the files again.
        let remembered = runtime.block_on(async {
            let store = Store::open(&context.store, Access::ReadWrite).await?;
            store.remember_files(&nothing.hashed).await?;
            store.close().await;
            Ok::<_, StoreError>(())
        });
        if let Err(error) = remembered {
            tracing::debug!("hashes of files cannot be remembered: {error}");
        }
    }
    if args.json {
        let document = json!({"plan": plan, "decisions": decisions});
        output::print(&format!("{document:#}\n"))?;
    } else {
        let details = context.verbose > 0;
        output::print(&text(&plan, &decisions, context.table_style(), details))?;
    }
    if !context.quiet {
        plan.notes.iter().for_each(|note| output::say(note));
    }
    if !plan.warnings.is_empty() && !context.quiet {
        let report = Report {
            path: recipe.source.path,
            text: recipe.source.text,
            findings: plan.warnings,
        };
        output::say(&report.render(context.color_stderr()));
    }
    match decisions
        .iter()
        .find(|decision| decision.action == Action::Missing)
    {
        Some(missing) => Err(Error::new(
            Exit::NothingMatches,
            format!(
                "stage `{}` is needed, and its result is not in the store",
                missing.stage
            ),
        )
        .hint(format!("omit --from, or use --from {}", missing.stage))),
        None => Ok(()),
    }
}

/// The plan for people.
fn text(plan: &Plan, decisions: &[Decision], style: Style, details: bool) -> String {
    let mut rows = Rows::new(&["", "stage", "kind", "where", "why"]);
    for (stage, decision) in plan.stages.iter().zip(decisions) {
        let (action, cell_style) = match decision.action {
            Action::Run => ("run", CellStyle::Warning),
            Action::RunInputChanges => ("run (input changes)", CellStyle::Warning),
            Action::Reuse => ("reuse", CellStyle::Ok),
            Action::Skip => ("skip", CellStyle::Dim),
            Action::Missing => ("missing", CellStyle::Error),
        };
        let place = format!("{} {}", stage.device, stage.dtype);
        rows.push([
            Cell::from(action).style(cell_style),
            Cell::from(stage.name.as_str()),
            Cell::from(stage.kind.as_str()),
            Cell::from(place.as_str()),
            Cell::from(decision.why.join("\n").as_str()),
        ]);
    }
    let mut text = format!("{}: {}\n\n{}", plan.name, plugins(plan), rows.render(style));
    if details {
        for stage in &plan.stages {
            text.push_str(&format!("\n{}", values(stage).render(style)));
        }
    }
    let count = |wanted: &[Action]| {
        decisions
            .iter()
            .filter(|decision| wanted.contains(&decision.action))
            .count()
    };
    let (run, changed, reuse) = (
        count(&[Action::Run]),
        count(&[Action::RunInputChanges]),
        count(&[Action::Reuse]),
    );
    let mut sums = Vec::new();
    if run > 0 {
        sums.push(format!("{run} to run"));
    }
    if changed > 0 {
        sums.push(format!("{changed} to run unless the inputs are unchanged"));
    }
    if reuse > 0 {
        sums.push(format!("{reuse} to reuse"));
    }
    text.push_str(&format!("\n{}\n", sums.join(", ")));
    text
}

/// The plugins of a plan, each once: `candle 0.1.0`.
fn plugins(plan: &Plan) -> String {
    let mut names: Vec<String> = Vec::new();
    for stage in &plan.stages {
        let name = format!("{} {}", stage.plugin.name, stage.plugin.version);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    format!(
        "{}, plugin {}",
        output::count(plan.stages.len(), "stage"),
        names.join(", ")
    )
}

/// Every resolved value of a stage with its origin.
fn values(stage: &PlannedStage) -> Rows {
    let mut rows =
        Rows::new(&["value of", "is", "from"]).titled(format!("{} ({})", stage.name, stage.kind));
    let threads = match stage.threads {
        Threads::Fixed(count) => count.to_string(),
        Threads::Share => "a share of the cores".to_owned(),
    };
    let timeout = stage.timeout.map_or("never".to_owned(), |timeout| {
        humantime::format_duration(timeout).to_string()
    });
    let settled: BTreeMap<&str, String> = BTreeMap::from([
        ("/device", stage.device.clone()),
        ("/dtype", stage.dtype.clone()),
        ("/kind", stage.kind.clone()),
        ("/seed", stage.seed.to_string()),
        ("/threads", threads),
        ("/timeout", timeout),
        ("/workers", stage.workers.len().max(1).to_string()),
    ]);
    for (pointer, origin) in &stage.origins {
        let value = match (
            settled.get(pointer.as_str()),
            pointer.strip_prefix("/options"),
        ) {
            (Some(value), _) => value.clone(),
            (None, Some(option)) => match stage.options.pointer(option) {
                Some(Value::String(text)) => text.clone(),
                Some(value) => value.to_string(),
                None => continue,
            },
            (None, None) => continue,
        };
        let name = pointer
            .strip_prefix("/options/")
            .unwrap_or(&pointer[1..])
            .replace('/', ".");
        let cell_style = if *origin == Origin::Default {
            CellStyle::Dim
        } else {
            CellStyle::Plain
        };
        rows.push([
            Cell::from(name.as_str()),
            Cell::from(value.as_str()).style(cell_style),
            Cell::from(origin.to_string().as_str()).style(cell_style),
        ]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::fake;

    #[test]
    fn a_plan_is_shown_with_its_reasons() {
        let recipe = "version: 1\nname: small\nbackend: fake\nstages:\n  codes: {kind: tokenizer, data: d.csv, seed: 3}\n";
        let plan = fake::plan(recipe, &[]).unwrap();
        let decision = Decision {
            stage: "codes".into(),
            action: Action::Run,
            why: vec!["seed: 1 -> 3".into(), "--force".into()],
            digest: None,
            output: None,
        };
        let style = Style::Table {
            width: None,
            color: false,
        };
        assert_eq!(
            text(&plan, &[decision], style, true),
            "\
small: 1 stage, plugin fake 0.1.0

     stage  kind       where    why
run  codes  tokenizer  cpu f32  seed: 1 -> 3
                                --force

codes (tokenizer)
value of  is                    from
device    cpu                   derived
dtype     f32                   default
kind      tokenizer             recipe:5
data      d.csv                 recipe:5
seed      3                     recipe:5
threads   a share of the cores  default
timeout   never                 default

1 to run
"
        );
    }
}
