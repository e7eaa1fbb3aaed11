//! `retort validate`: everything that is wrong with recipes, without running anything.

use std::path::{Path, PathBuf};

use clap::ValueHint;
use serde_json::{Value, json};

use crate::cli::{Context, Error, Exit, output};
use crate::cluster::devices;
use crate::diagnostic::{Report, Severity};
use crate::plan;
use crate::plugin::{Plugins, search_dirs};
use crate::recipe;
use crate::settings::Settings;

/// Arguments of `validate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipes, YAML files.
    #[arg(value_name = "RECIPE", required = true, value_hint = ValueHint::FilePath)]
    pub recipes: Vec<PathBuf>,
    /// Set a value of the recipe, as `run --set` does (may be repeated).
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub set: Vec<String>,
    /// Print the findings as JSON on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Checks recipes and reports everything that is wrong with them.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let runtime = context.runtime()?;
    let store = context.known_store(&runtime)?;
    let mut plugins = Plugins::new(search_dirs(&context.plugin_dirs), &runtime, store.as_ref());
    let mut documents = Vec::new();
    // The worst error: an invalid recipe takes precedence over a missing plugin.
    let mut worst: Option<Exit> = None;
    for path in &args.recipes {
        let root = path.parent().unwrap_or(Path::new(""));
        let (report, stages) = match Settings::read(root, &context.given()) {
            Ok(settings) => findings(path, &args.set, context, &mut plugins, &settings),
            Err(error) => (error.into_report(path), 0),
        };
        if args.json {
            documents.push(document(&report));
        } else {
            if !report.findings.is_empty() {
                output::say(&format!("{}\n", report.render(context.color_stderr())));
            }
            if !context.quiet {
                output::say(&verdict(&report, stages));
            }
        }
        if report.errors() > 0 {
            let exit = if report.only_plugins() {
                Exit::Plugin
            } else {
                Exit::InvalidRecipe
            };
            worst = Some(if worst == Some(Exit::InvalidRecipe) {
                Exit::InvalidRecipe
            } else {
                exit
            });
        }
    }
    if args.json {
        output::print(&format!("{:#}\n", Value::Array(documents)))?;
    }
    worst.map_or(Ok(()), |exit| Err(Error::said(exit)))
}

/// The findings about a recipe, and its number of stages.
fn findings(
    path: &Path,
    set: &[String],
    context: &Context,
    plugins: &mut dyn plan::Descriptions,
    settings: &Settings,
) -> (Report, usize) {
    let recipe = match recipe::read(path, set, context.home()) {
        Ok(recipe) => recipe,
        Err(report) => return (report, 0),
    };
    match devices::plan(&recipe, plugins, settings) {
        Ok(mut plan) => {
            let mut findings = std::mem::take(&mut plan.warnings);
            findings.extend(plan.validate(plugins));
            (
                Report {
                    path: path.to_owned(),
                    text: plan.text,
                    findings,
                },
                plan.stages.len(),
            )
        }
        Err(report) => (report, recipe.stages.len()),
    }
}

/// One line per recipe.
fn verdict(report: &Report, stages: usize) -> String {
    let path = report.path.display();
    use output::count;
    let errors = report.errors();
    let warnings = report.findings.len() - errors;
    match (errors, warnings) {
        (0, 0) => format!("{path}: valid, {}", count(stages, "stage")),
        (0, _) => format!(
            "{path}: valid, {}, {}",
            count(stages, "stage"),
            count(warnings, "warning")
        ),
        (_, 0) => format!("{path}: {}", count(errors, "error")),
        _ => format!(
            "{path}: {}, {}",
            count(errors, "error"),
            count(warnings, "warning")
        ),
    }
}

/// The findings for programs.
fn document(report: &Report) -> Value {
    let findings: Vec<Value> = report
        .findings
        .iter()
        .map(|finding| {
            json!({
                "severity": finding.severity,
                "line": finding.position.map(|position| position.line),
                "column": finding.position.map(|position| position.column),
                "argument": finding.argument,
                "pointer": finding.pointer,
                "message": finding.message,
                "hint": finding.hint,
            })
        })
        .collect();
    let valid = !report
        .findings
        .iter()
        .any(|finding| finding.severity == Severity::Error);
    json!({"path": report.path, "valid": valid, "findings": findings})
}
