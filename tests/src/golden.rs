//! The results of the published code in `golden/`, for every backend's tests.

use std::path::{Path, PathBuf};

use retort_engine::Result;
use retort_engine::backend::Backend;
use retort_engine::conformance::{Case, golden};
use retort_engine::weights::Weights;

pub use retort_engine::conformance::golden::{TOLERANCE, procedural_weights};

/// The directory of the results: `RETORT_GOLDEN`, on a machine without these sources, or the repository's.
pub fn folder() -> PathBuf {
    match std::env::var_os("RETORT_GOLDEN") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"),
    }
}

/// Compares all networks.
pub fn check<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    golden::check(backend, &folder())
}

/// The networks with results of the published code; tensors must be within `tolerance`.
pub fn published<B: Backend>(backend: &B, tolerance: f64) -> Result<Vec<Case>> {
    let mut cases = golden::models(backend, &folder())?;
    for case in &mut cases {
        if case.tolerance == TOLERANCE {
            (case.tolerance, case.passed) = (tolerance, case.error <= tolerance);
        }
    }
    Ok(cases)
}

/// The same for a backend whose products round to bf16, where tokens that are chosen by small differences may be others.
pub fn published_rounded<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut cases = published(backend, 2e-2)?;
    cases.retain(|case| !case.chosen);
    Ok(cases)
}

/// Prints the table. Returns whether everything is within its tolerance.
pub fn report(backend: &str, cases: &[Case]) -> bool {
    for case in cases {
        let verdict = if case.passed { "ok" } else { "FAILED" };
        println!(
            "{backend:<10} {:<44} {:>10.2e} {verdict}",
            case.name, case.error
        );
    }
    !cases.is_empty() && cases.iter().all(|case| case.passed)
}

/// Procedural weights of a measuring network: `inception`, `vgg` or `linear`.
pub fn measuring_weights(part: &str) -> Result<Weights> {
    let mut parts = procedural_weights(&folder().join("measures/weights.json"))?;
    Ok(parts.remove(part).expect("a part of weights.json"))
}
