//! The version rule: a plugin keeps loading, whichever side is older.
//!
//! `fixtures/abi-1.0/retort_plugin.h` is the header of the released version 1.0. It is never changed: a plugin built against it
//! represents all existing plugins.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::lab::{Lab, compile};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Runs a stage of a plugin built with these flags.
#[track_caller]
fn check_runs(flags: &[&str]) {
    let lab = Lab::new(&["a: {kind: do}"]);
    compile(
        "faulty.c",
        flags,
        &lab.dir.path().join("libretort_faulty.so"),
    );
    let dir = lab.dir.path().to_str().unwrap();
    lab.run(&["--plugin-dir", dir]).expect(0);
    assert_eq!(lab.attempt("a").reason.as_deref(), Some("succeeded"));
}

#[test]
fn a_plugin_of_version_1_0_keeps_running() {
    let include = format!("-I{}", fixtures().join("abi-1.0").display());
    check_runs(&[&include]);
}

#[test]
fn a_newer_plugin_runs_as_long_as_it_does_not_need_more() {
    // Its table is longer, as its size field says.
    check_runs(&["-DFAULTY_STRUCT_SIZE=(sizeof(retort_plugin)+64)"]);
}

#[test]
fn the_tables_of_version_1_0_lie_where_they_lay() {
    let dir = tempfile::tempdir().unwrap();
    let layout = |include: PathBuf| {
        let program = dir.path().join("layout");
        let compiler = std::env::var("CC").unwrap_or("cc".into());
        let built = Command::new(compiler)
            .args(["-std=c11", "-Wall", "-Werror", "-I"])
            .arg(include)
            .arg(fixtures().join("layout.c"))
            .arg("-o")
            .arg(&program)
            .status()
            .unwrap();
        assert!(built.success());
        String::from_utf8(Command::new(program).output().unwrap().stdout).unwrap()
    };
    let frozen = layout(fixtures().join("abi-1.0"));
    assert!(frozen.contains("retort_plugin.run 48"), "{frozen}");
    let abi = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/abi");
    assert_eq!(frozen, layout(abi));
}
