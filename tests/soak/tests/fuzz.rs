//! Every input in the repository, including those that once broke something, and some mutations of each.

use std::process::Command;

use retort_soak::fuzz::TARGETS;
use retort_soak::report::Report;

/// Feeds targets, and returns the report and whether the program found anything.
fn fuzz(arguments: &[&str]) -> (Report, bool) {
    let keep = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_retort-soak"))
        .args(["fuzz", "--json", "--keep"])
        .arg(keep.path())
        .args(arguments)
        .output()
        .unwrap();
    let report = serde_json::from_slice(&output.stdout);
    let report =
        report.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    (report, output.status.success())
}

#[test]
fn no_reader_breaks() {
    let (report, good) = fuzz(&["--inputs", "400"]);
    assert!(good && report.violations.is_empty(), "{report}");
    assert_eq!(report.inputs.len(), TARGETS.len());
    for (target, inputs) in &report.inputs {
        assert!(
            inputs.count >= 400 && inputs.outcomes >= 5,
            "{target}: {inputs:?}"
        );
    }
}

#[test]
fn the_harness_notices_what_breaks() {
    let (report, good) = fuzz(&["--target", "harness", "--inputs", "20"]);
    assert!(!good);
    for (expected, what) in [
        ("as told", "a panic"),
        ("too slow", "a loop without end"),
        ("memory allocation of 1073741824 bytes failed", "greed"),
        ("overflowed its stack", "endless recursion"),
    ] {
        let found = report
            .violations
            .iter()
            .any(|violation| violation.contains(expected));
        assert!(found, "{what} was not noticed: {report}");
    }
    assert_eq!(report.violations.len(), 4, "{report}");
}
