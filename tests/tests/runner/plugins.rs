//! Plugins that are missing or broken, and files that are none.

use std::path::PathBuf;

use crate::lab::{Lab, compile, plugins};

/// Compiles a fixture under the name of a plugin, in a directory of its own.
fn build(lab: &Lab, name: &str, fixture: &str, flags: &[&str]) -> PathBuf {
    let path = lab.dir.path().join(format!("libretort_{name}.so"));
    compile(fixture, flags, &path);
    path
}

#[track_caller]
fn check(fixture: &str, flags: &[&str], words: &[&str]) {
    let lab = Lab::new(&["a: {kind: do, plugin: broken}"]);
    let path = build(&lab, "broken", fixture, flags);
    lab.retort(&["plugin", "check", path.to_str().unwrap()])
        .expect(5)
        .saying(words);
    let dir = lab.dir.path().to_str().unwrap();
    lab.run(&["--plugin-dir", dir]).expect(5).saying(words);
    assert!(lab.latest().is_none(), "nothing was begun");
}

#[test]
fn a_good_one_is_described() {
    let lab = Lab::new(&[]);
    let said = lab.retort(&["plugin", "check", "faulty"]).expect(0);
    for text in ["faulty 1.0.0", "imaginary", "usable", "thing"] {
        assert!(said.stdout.contains(text), "{}", said.stdout);
    }
    let list = lab.retort(&["plugin", "list", "--json"]).expect(0).json();
    let faulty = list
        .as_array()
        .unwrap()
        .iter()
        .find(|plugin| plugin["plugin"] == "faulty")
        .unwrap();
    assert_eq!(
        faulty["file"],
        plugins().join("libretort_faulty.so").to_str().unwrap()
    );
}

#[test]
fn a_missing_one() {
    let lab = Lab::new(&["a: {kind: do, plugin: faulti}"]);
    let dir = plugins().display().to_string();
    lab.run(&[]).expect(5).saying(&[
        "no plugin `faulti`",
        &dir,
        "beside the executable",
        "did you mean `faulty`?",
    ]);
}

#[test]
fn the_working_directory_is_not_searched_but_looked_at_for_a_hint() {
    let lab = Lab::new(&["a: {kind: do, plugin: mine}"]);
    build(&lab, "mine", "faulty.c", &["-DFAULTY_NAME=\"mine\""]);
    lab.run(&[]).expect(5).saying(&[
        "no plugin `mine`",
        "libretort_mine.so is in the working directory, which is not searched",
        "retort plugin install libretort_mine.so",
    ]);
}

#[test]
fn a_shared_object_that_is_no_plugin() {
    check(
        "stranger.c",
        &[],
        &[
            "is a shared object but not a retort plugin",
            "retort_plugin_v1",
        ],
    );
}

#[test]
fn another_generation() {
    check(
        "stranger.c",
        &["-DSTRANGER_V7"],
        &["speaks plugin ABI 7, this retort speaks ABI 1.0"],
    );
}

#[test]
fn one_that_needs_a_newer_host() {
    check(
        "faulty.c",
        &["-DFAULTY_MIN_HOST_MINOR=9"],
        &["needs a host with plugin ABI 1.9 or later"],
    );
}

#[test]
fn a_truncated_table() {
    check(
        "faulty.c",
        &["-DFAULTY_STRUCT_SIZE=24"],
        &["a truncated table: struct_size is 24"],
    );
}

#[test]
fn one_under_another_name() {
    let lab = Lab::new(&["a: {kind: do, plugin: broken}"]);
    build(&lab, "broken", "faulty.c", &[]);
    let dir = lab.dir.path().to_str().unwrap();
    lab.run(&["--plugin-dir", dir]).expect(5).saying(&[
        "calls itself `faulty`",
        "rename the file to libretort_faulty.so",
    ]);
}

#[test]
fn a_text_file() {
    let lab = Lab::new(&["a: {kind: do, plugin: broken}"]);
    std::fs::write(lab.dir.path().join("libretort_broken.so"), "hello").unwrap();
    let dir = lab.dir.path().to_str().unwrap();
    lab.run(&["--plugin-dir", dir])
        .expect(5)
        .saying(&["is not a shared object"]);
}

#[test]
fn shadowing_is_told() {
    let lab = Lab::new(&["a: {kind: do}"]);
    build(&lab, "faulty", "faulty.c", &["-DFAULTY_LEAKY"]);
    let dir = lab.dir.path().to_str().unwrap();
    lab.run(&["--plugin-dir", dir])
        .expect(0)
        .saying(&["libretort_faulty.so is not"]);
    // A copy of the same file is no other plugin.
    let file = "libretort_faulty.so";
    std::fs::copy(plugins().join(file), lab.dir.path().join(file)).unwrap();
    let said = lab.run(&["--plugin-dir", dir, "--force"]).expect(0);
    assert!(!said.stderr.contains("is not"), "{}", said.stderr);
}

#[test]
fn the_worker_is_not_for_people() {
    let lab = Lab::new(&[]);
    lab.retort(&["worker", "--parent", "1"])
        .expect(2)
        .saying(&["started by retort itself"]);
}
