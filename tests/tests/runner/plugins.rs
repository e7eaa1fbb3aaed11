//! Missing or broken plugins, and files that are not plugins.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::lab::{Lab, compile, plugins};

/// Compiles a fixture under the name of a plugin, in a separate directory.
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
fn the_working_directory_only_gives_a_hint() {
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
    // A copy of the same file is the same plugin.
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

/// A lab with a copy of the fixture plugin in a directory below another one.
fn with_own_plugin() -> (Lab, PathBuf) {
    let lab = Lab::new(&["a: {kind: do}"]);
    let dir = lab.dir.path().join("above/own");
    std::fs::create_dir_all(&dir).unwrap();
    for dir in [&dir, dir.parent().unwrap()] {
        set_mode(dir, 0o755);
    }
    let plugin = dir.join("libretort_faulty.so");
    std::fs::copy(plugins().join("libretort_faulty.so"), plugin).unwrap();
    (lab, dir)
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[track_caller]
fn check_refused(lab: &Lab, dir: &Path, words: &[&str]) {
    let dir = dir.to_str().unwrap();
    lab.run(&["--plugin-dir", dir]).expect(5).saying(words);
    lab.retort(&["validate", "r.yaml", "--plugin-dir", dir])
        .expect(5);
    assert!(lab.latest().is_none(), "nothing was begun");
}

#[test]
fn a_lock_that_cannot_be_read_allows_nothing() {
    let spoilers: [fn(&Path); 5] = [
        |lock| std::os::unix::fs::symlink("nowhere", lock).unwrap(),
        |lock| std::os::unix::fs::symlink("/dev/zero", lock).unwrap(),
        |lock| std::fs::create_dir(lock).unwrap(),
        |lock| assert!(Command::new("mkfifo").arg(lock).status().unwrap().success()),
        |lock| std::fs::write(lock, b"\xff\n").unwrap(),
    ];
    for spoil in spoilers {
        let (lab, dir) = with_own_plugin();
        spoil(&dir.join("plugins.lock"));
        check_refused(&lab, &dir, &["plugins.lock"]);
    }
}

#[test]
fn a_parent_directory_counts_through_every_link() {
    let (lab, dir) = with_own_plugin();
    let above = dir.parent().unwrap();
    set_mode(above, 0o777);
    let words = ["above is writable by everybody", "chmod o-w"];
    check_refused(&lab, &dir, &words);
    let links = lab.dir.path().join("links");
    std::fs::create_dir(&links).unwrap();
    set_mode(&links, 0o755);
    let link = links.join("libretort_faulty.so");
    std::os::unix::fs::symlink("../above/own/libretort_faulty.so", &link).unwrap();
    check_refused(&lab, &links, &words);
    set_mode(above, 0o1777);
    lab.run(&["--plugin-dir", links.to_str().unwrap()])
        .expect(0);
}

#[test]
fn the_lock_of_the_file_counts_when_it_is_reached_by_a_link() {
    let (lab, dir) = with_own_plugin();
    let locked = dir.to_str().unwrap();
    lab.retort(&["plugin", "lock", locked]).expect(0);
    let other = dir.join("libretort_other.so");
    compile("faulty.c", &["-DFAULTY_NAME=\"other\""], &other);
    let links = lab.dir.path().join("links");
    std::fs::create_dir(&links).unwrap();
    set_mode(&links, 0o755);
    std::os::unix::fs::symlink(&other, links.join("libretort_other.so")).unwrap();
    lab.recipe(&["a: {kind: do, plugin: other}"]);
    check_refused(&lab, &links, &["plugins.lock does not list it"]);
    lab.retort(&["plugin", "lock", locked]).expect(0);
    lab.run(&["--plugin-dir", links.to_str().unwrap()])
        .expect(0);
}

#[test]
fn a_pipe_or_a_device_is_no_plugin() {
    let (lab, dir) = with_own_plugin();
    let plugin = dir.join("libretort_faulty.so");
    std::fs::remove_file(&plugin).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(&plugin)
            .status()
            .unwrap()
            .success()
    );
    check_refused(&lab, &dir, &["libretort_faulty.so", "a named pipe"]);
    lab.retort(&["plugin", "install", plugin.to_str().unwrap()])
        .expect(5);
    std::fs::remove_file(&plugin).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &plugin).unwrap();
    check_refused(&lab, &dir, &["libretort_faulty.so", "a device"]);
}

#[test]
fn a_plugin_finds_libraries_beside_itself() {
    let (lab, dir) = with_own_plugin();
    std::fs::write(
        lab.dir.path().join("beside.c"),
        "int beside(void) { return 1; }",
    )
    .unwrap();
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(dir.join("libbeside.so"))
        .arg(lab.dir.path().join("beside.c"))
        .status();
    assert!(built.unwrap().success());
    let beside = format!("-L{}", dir.display());
    let flags = [
        &beside,
        "-Wl,--no-as-needed",
        "-lbeside",
        "-Wl,-rpath,$ORIGIN",
    ];
    compile("faulty.c", &flags, &dir.join("libretort_faulty.so"));
    lab.run(&["--plugin-dir", dir.to_str().unwrap()]).expect(0);
    std::fs::remove_file(dir.join("libbeside.so")).unwrap();
    lab.run(&["--force", "--plugin-dir", dir.to_str().unwrap()])
        .expect(5)
        .saying(&["libbeside.so"]);
}

#[test]
fn a_plugin_replaced_between_planning_and_running_is_not_run() {
    let (lab, dir) = with_own_plugin();
    lab.recipe(&[
        "a: {kind: do, act: wait, flag: released}",
        "b: {kind: do, input: a}",
    ]);
    let running = lab.start(&["--plugin-dir", dir.to_str().unwrap()]);
    lab.wait_for_worker("a");
    let fresh = dir.join("fresh");
    compile("faulty.c", &["-DFAULTY_DEFAULT=\"\\\"fail\\\"\""], &fresh);
    std::fs::rename(fresh, dir.join("libretort_faulty.so")).unwrap();
    lab.release();
    running
        .end()
        .expect(100)
        .saying(&["is not the file it was when the run was planned"]);
    assert_eq!(
        lab.attempt("b").reason.as_deref(),
        Some("plugin not loaded")
    );
}
