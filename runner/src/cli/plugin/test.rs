//! `retort plugin test`: checks a plugin. The report is a table, JSON, CSV, Markdown or JUnit.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueHint;
use tokio::runtime::Runtime;

use crate::cli::plugin::named;
use crate::cli::{Context, Error, Exit, FormatArgs, output};
use crate::draft::{OutputKind, Target};
use crate::plan::{self, Plan};
use crate::plugin::conformance::{CheckOutcome, ConformanceRun, ConformanceRunOptions, Verdict};
use crate::plugin::{Plugins, search_dirs};
use crate::recipe;
use crate::table::{Cell, CellStyle, Rows};

/// Arguments of `plugin test`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without a recipe, the plugin's file, its answers and its handling of bad options are tested. \
    Its stages are tested as a recipe uses them, in a temporary directory: each is run to its end, \
    again with the same seed, until a request to stop, and then resumed. A project's own recipe.yaml is used if \
    the project directory is given."
)]
pub struct Args {
    /// Name of the plugin, the path of its shared object, or the directory of its project.
    #[arg(value_name = "PLUGIN")]
    pub plugin: String,
    /// A recipe whose stages use the plugin and take seconds.
    #[arg(long, value_name = "RECIPE", value_hint = ValueHint::FilePath)]
    pub recipe: Option<PathBuf>,
    /// Set a value of the recipe, as `run --set` does (may be repeated).
    #[arg(long = "set", value_name = "PATH=VALUE", requires = "recipe")]
    pub set: Vec<String>,
    /// How long a stage may take to stop when it is asked to.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = crate::duration::parse)]
    pub grace: Duration,
    /// How long a stage may run.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = crate::duration::parse)]
    pub limit: Duration,
    /// Also compare whole networks with results of the published code: `tests/golden` of the repository.
    /// Takes seconds on a fast backend.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub golden: Option<PathBuf>,
    /// Write the report to this file as JUnit XML, too. Of existing files only such a report is replaced.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub junit: Option<PathBuf>,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Examines the plugin and reports.
pub fn execute(args: &Args, runtime: &Runtime, context: &Context) -> Result<(), Error> {
    let unwritten = |error: std::io::Error| {
        Error::unwritten(args.junit.as_deref().unwrap_or(Path::new("")), &error)
    };
    // Fail now rather than after minutes of tests.
    let report = args.junit.as_deref().map(|path| Target::open(path, JUNIT));
    let report = report.transpose().map_err(unwritten)?;
    let path = named(&args.plugin, &search_dirs(&context.plugin_dirs))?;
    let own = Path::new(&args.plugin).join("recipe.yaml");
    let recipe = args.recipe.clone().or_else(|| own.is_file().then_some(own));
    let quiet = context.quiet;
    let tell = move |outcome: &CheckOutcome| {
        if !quiet {
            let (verdict, check) = (outcome.verdict.name(), outcome.check);
            let line = format!("{verdict:7} {check} {}", outcome.subject);
            output::say(line.trim_end());
        }
    };
    let options = ConformanceRunOptions {
        grace: args.grace,
        limit: args.limit,
        golden: args.golden.as_deref().map(golden).transpose()?,
    };
    let mut conformance_run = ConformanceRun::new(runtime, &path, options, &tell);
    match (conformance_run.check_plugin(), recipe) {
        (Some(description), Some(recipe)) => {
            let plan = planned(&recipe, &args.set, &path, runtime, context)?;
            conformance_run.check_stages(&description, &plan);
        }
        (Some(description), None) => conformance_run.skip_stages(&description),
        (None, _) => {}
    }
    let outcomes = conformance_run.outcomes();
    if let Some(report) = report {
        let text = junit(&path, &outcomes);
        report.write(text.as_bytes()).map_err(unwritten)?;
    }
    output::print(&rows(&outcomes).render(args.format.style(context)))?;
    let count = |verdict| outcomes.iter().filter(|o| o.verdict == verdict).count();
    match count(Verdict::Failed) {
        0 => Ok(()),
        failed => Err(Error::new(
            Exit::Plugin,
            format!(
                "{}: {failed} of {} failed",
                path.display(),
                output::count(outcomes.len(), "check")
            ),
        )),
    }
}

/// The directory with the published code's results.
fn golden(dir: &Path) -> Result<PathBuf, Error> {
    match dir.is_dir() {
        true => Ok(std::path::absolute(dir)?),
        false => Err(Error::new(
            Exit::NothingMatches,
            format!("there is no directory {}", dir.display()),
        )
        .hint("--golden names tests/golden of the repository")),
    }
}

/// The plan of a recipe that finds exactly this file by its name.
fn planned(
    recipe: &Path,
    set: &[String],
    plugin: &Path,
    runtime: &Runtime,
    context: &Context,
) -> Result<Plan, Error> {
    let mut dirs: Vec<PathBuf> = plugin.parent().map(Path::to_owned).into_iter().collect();
    dirs.extend(context.plugin_dirs.iter().cloned());
    let mut plugins = Plugins::new(search_dirs(&dirs), runtime, None);
    let read = recipe::read(recipe, set, context.home())?;
    let plan = plan::plan(&read, &mut plugins)?;
    if plan.stages.iter().all(|stage| stage.plugin.path != plugin) {
        return Err(Error::new(
            Exit::NothingMatches,
            format!("no stage of {} uses {}", recipe.display(), plugin.display()),
        ));
    }
    Ok(plan)
}

fn rows(outcomes: &[CheckOutcome]) -> Rows {
    let mut rows = Rows::new(&["check", "of", "verdict", "detail", "seconds"]);
    for outcome in outcomes {
        let cell_style = match outcome.verdict {
            Verdict::Passed => CellStyle::Ok,
            Verdict::Failed => CellStyle::Error,
            Verdict::Skipped => CellStyle::Dim,
        };
        let subject = match outcome.subject.is_empty() {
            true => Cell::none(),
            false => outcome.subject.as_str().into(),
        };
        let seconds = outcome.time.as_secs_f64();
        rows.push([
            outcome.check.into(),
            subject,
            Cell::from(outcome.verdict.name()).style(cell_style),
            outcome.detail.as_str().into(),
            Cell::new(format!("{seconds:.1}"), seconds),
        ]);
    }
    rows
}

/// A report as a file.
const JUNIT: OutputKind = OutputKind {
    name: "a report of `plugin test`",
    head: "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!-- retort plugin test -->\n",
};

/// The report as JUnit XML, for continuous integration.
fn junit(plugin: &Path, outcomes: &[CheckOutcome]) -> String {
    let count = |verdict| outcomes.iter().filter(|o| o.verdict == verdict).count();
    let seconds: f64 = outcomes.iter().map(|o| o.time.as_secs_f64()).sum();
    let mut text = format!(
        "{}<testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" \
         skipped=\"{}\" time=\"{seconds:.3}\">\n",
        JUNIT.head,
        xml(&plugin.display().to_string()),
        outcomes.len(),
        count(Verdict::Failed),
        count(Verdict::Skipped)
    );
    for outcome in outcomes {
        let class = match outcome.subject.as_str() {
            "" => "plugin",
            subject => subject,
        };
        let detail = xml(&outcome.detail);
        let inner = match outcome.verdict {
            Verdict::Passed => format!("<system-out>{detail}</system-out>"),
            Verdict::Failed => format!("<failure message=\"{detail}\"/>"),
            Verdict::Skipped => format!("<skipped message=\"{detail}\"/>"),
        };
        text.push_str(&format!(
            "  <testcase classname=\"{}\" name=\"{}\" time=\"{:.3}\">{inner}</testcase>\n",
            xml(class),
            xml(outcome.check),
            outcome.time.as_secs_f64()
        ));
    }
    text.push_str("</testsuite>\n");
    text
}

/// Escapes text for XML: invalid characters, such as most control characters, become U+FFFD.
fn xml(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\n' => safe.push_str("&#10;"),
            '\t' => safe.push('\t'),
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => safe.push('\u{fffd}'),
            other => safe.push(other),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn junit_counts_and_escapes() {
        let outcome = |verdict, detail: &str| CheckOutcome {
            check: "exports",
            subject: String::new(),
            verdict,
            detail: detail.into(),
            time: Duration::from_millis(1500),
        };
        let text = junit(
            Path::new("a&b.so"),
            &[
                outcome(Verdict::Passed, "fine"),
                outcome(Verdict::Failed, "<\"\u{0}\n>"),
                outcome(Verdict::Skipped, "no"),
            ],
        );
        for part in [
            "<testsuite name=\"a&amp;b.so\" tests=\"3\" failures=\"1\" skipped=\"1\" time=\"4.500\">",
            "<testcase classname=\"plugin\" name=\"exports\" time=\"1.500\"><system-out>fine</system-out></testcase>",
            "<failure message=\"&lt;&quot;\u{fffd}&#10;&gt;\"/>",
            "<skipped message=\"no\"/>",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
