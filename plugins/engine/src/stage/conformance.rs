//! `conformance`: does this backend compute correctly on this device and in this dtype?
//!
//! Out: `cases.json`, every comparison of [`crate::conformance`] (or of [`crate::conformance::golden`]), and a table of those
//! that failed or came closest to failing. The stage succeeds even if checks fail: they are its result. Its summary counts
//! cases and failures, and names the first of these.

use std::path::Path;

use retort_abi::{ArtifactMeta, LogLevel, StageResult, Table};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::Backend;
use crate::conformance::{self, Case, golden};
use crate::context::Context;
use crate::error::Result;
use crate::files::{resolve, write_json};
use crate::stage::Stage;

/// Rows of the table.
const SHOWN: usize = 12;

/// Failed comparisons that the summary names.
const NAMED: usize = 3;

/// Options of `conformance`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Compare whole networks with results of the published code, instead of operations and gradients: a
    /// directory as `tests/golden` of the repository. Products are computed in f32, whatever the dtype.
    #[serde(default)]
    #[schemars(extend("x-retort-file" = "dir"))]
    pub golden: Option<String>,
}

/// The stage.
pub struct Conformance;

impl<B: Backend> Stage<B> for Conformance {
    type Options = Options;
    const KIND: &'static str = "conformance";
    const OUTPUT: &'static str = "conformance";
    const REVISION: u32 = 0;
    const SUMMARY: &'static str =
        "checks the backend's operations and gradients, or networks, against reference values";

    fn check(_options: &Options, _base_dir: &Path) -> Result<()> {
        Ok(())
    }

    fn run(context: &Context<'_, B>, options: &Options) -> Result<StageResult> {
        context.host.check_cancelled()?;
        let mut cases = match &options.golden {
            // The published code computed in f32.
            Some(dir) => {
                let dir = resolve(&context.job.base_dir, dir);
                golden::check(&context.backend.exact(), &dir)?
            }
            None => operations(context.backend, rounding(&context.job.dtype)),
        };
        let failed = cases.iter().filter(|case| !case.passed).count();
        let (name, count) = (&context.job.dtype, cases.len());
        let level = match failed {
            0 => LogLevel::Info,
            _ => LogLevel::Error,
        };
        let device = &context.job.device;
        let text = format!("{failed} of {count} comparisons failed on {device} in {name}");
        context.host.log(level, &text);
        // The worst first, by the used share of their tolerance.
        cases.sort_by(|a, b| share(b).total_cmp(&share(a)));
        let mut table = Table::new(text, &["operation", "error", "allowed"]);
        for case in cases.iter().take(SHOWN.max(failed)) {
            let numbers = [finite(case.error), finite(case.tolerance)];
            table
                .rows
                .push([[case.name.clone().into()].as_slice(), &numbers].concat());
        }
        let records: Vec<_> = cases
            .iter()
            .map(|case| {
                json!({"name": case.name, "error": finite(case.error), "tolerance": case.tolerance,
                    "passed": case.passed})
            })
            .collect();
        let wrong = cases.iter().filter(|case| !case.passed).take(NAMED);
        let failures: Vec<&str> = wrong.map(|case| case.name.as_str()).collect();
        let summary = json!({"cases": count, "failed": failed, "failures": failures});
        context.finish("conformance", ArtifactMeta::from(table), summary, |dir| {
            write_json(&dir.join("cases.json"), &records)
        })
    }
}

/// Every operation and gradient; if products round, also with the backend that does not round.
fn operations<B: Backend>(backend: &B, rounding: f64) -> Vec<Case> {
    let mut cases = conformance::check_rounded(backend, rounding);
    if rounding > 0.0 {
        let exact = conformance::check(&backend.exact());
        let named = |case: Case| Case {
            name: format!("exact: {}", case.name),
            ..case
        };
        cases.extend(exact.into_iter().map(named));
    }
    cases
}

/// The relative rounding error of products' operands in a dtype.
fn rounding(dtype: &str) -> f64 {
    match dtype {
        "bf16" => 2f64.powi(-8),
        "f16" => 2f64.powi(-11),
        _ => 0.0,
    }
}

/// The share of its tolerance that a case uses.
fn share(case: &Case) -> f64 {
    match case.passed {
        // A zero tolerance allows no error at all.
        true if case.tolerance == 0.0 => 0.0,
        true => case.error / case.tolerance,
        false => f64::INFINITY,
    }
}

/// JSON has no infinity: an error that is not a number (another shape, a refusal) is null.
fn finite(number: f64) -> serde_json::Value {
    serde_json::Number::from_f64(number).map_or(serde_json::Value::Null, Into::into)
}
