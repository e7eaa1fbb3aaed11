//! Files and folders that stages read, also while somebody writes to them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use retort::input::Folder;
use retort::store::{Access, AttemptState, RunState, Store};
use retort_tests::skip::skip;

use crate::lab::{CommandOutput, Lab, block_on, fifo, wait_for};

const INTERRUPT: i32 = 2;
/// Longer than the time resolution of file systems.
const SETTLED: Duration = Duration::from_millis(2_200);

/// A lab with a file of data.
fn with_data(stages: &[&str]) -> Lab {
    let lab = Lab::new(stages);
    fs::write(lab.dir.path().join("data.txt"), "all of it").unwrap();
    lab
}

#[track_caller]
fn says_to_run(lab: &Lab, stage: &str) {
    let plan = lab.retort(&["plan", "r.yaml", "--json"]).expect(0).json();
    let decisions = plan["decisions"].as_array().unwrap();
    let found = decisions.iter().find(|one| one["stage"] == stage).unwrap();
    assert_eq!(found["action"], "run", "{found}");
}

#[track_caller]
fn check_changed(lab: &Lab, said: CommandOutput, words: &str) {
    said.expect(100)
        .saying(&["data.txt", words, "(option /file)"]);
    let attempt = lab.attempt("b");
    assert_eq!(attempt.state, AttemptState::Failed);
    assert_eq!(attempt.reason.as_deref(), Some("input changed"));
    assert_eq!(attempt.output, None);
    assert_eq!(
        lab.entries("work"),
        [""; 0],
        "no checkpoint of other data is left"
    );
}

#[test]
fn a_file_that_changed_before_its_stage_began_stops_it() {
    let lab = with_data(&[
        "a: {kind: do, act: wait, flag: released}",
        "b: {kind: do, file: data.txt, input: a}",
    ]);
    let data = lab.dir.path().join("data.txt");
    let running = lab.start(&[]);
    lab.wait_for_worker("a");
    fs::write(&data, "half").unwrap();
    lab.release();
    check_changed(&lab, running.end(), "has changed since the run began");
    fs::write(&data, "all of it").unwrap();
    says_to_run(&lab, "b");
    lab.run(&[]).expect(0);
}

#[test]
fn a_file_written_during_its_stage_spoils_the_result() {
    for back in [false, true] {
        let lab = with_data(&["b: {kind: do, act: wait, flag: released, file: data.txt}"]);
        let data = lab.dir.path().join("data.txt");
        let modified = fs::metadata(&data).unwrap().modified().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let running = lab.start(&[]);
        lab.wait_for_worker("b");
        fs::write(&data, "half").unwrap();
        if back {
            // The old content with the old time: only the change time differs.
            fs::write(&data, "all of it").unwrap();
            let file = fs::File::options().append(true).open(&data).unwrap();
            file.set_modified(modified).unwrap();
        }
        lab.release();
        check_changed(&lab, running.end(), "was written while the stage ran");
        fs::write(&data, "all of it").unwrap();
        says_to_run(&lab, "b");
        let again = lab.run(&[]).expect(0);
        assert!(!again.stderr.contains("continuing from a checkpoint"));
    }
}

#[test]
fn a_checkpoint_of_a_file_that_was_written_is_not_taken_up() {
    let lab = with_data(&["b: {kind: do, act: wait, flag: released, file: data.txt}"]);
    let running = lab.start(&[]);
    lab.wait_for_worker("b");
    fs::write(lab.dir.path().join("data.txt"), "half").unwrap();
    running.signal(INTERRUPT);
    running.end().expect(130);
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Interrupted);
    assert_eq!(lab.entries("work"), [""; 0]);
}

#[test]
fn rights_and_further_names_are_no_change() {
    let lab = with_data(&["b: {kind: do, act: wait, flag: released, file: data.txt}"]);
    let data = lab.dir.path().join("data.txt");
    std::thread::sleep(SETTLED);
    let running = lab.start(&[]);
    lab.wait_for_worker("b");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o400)).unwrap();
    fs::hard_link(&data, lab.dir.path().join("other name")).unwrap();
    lab.release();
    running.end().expect(0);
}

#[test]
fn a_file_replaced_in_a_folder_is_named() {
    let lab = Lab::new(&[
        "a: {kind: do, act: wait, flag: released}",
        "b: {kind: do, folder: data, input: a}",
    ]);
    fs::create_dir_all(lab.dir.path().join("data/0")).unwrap();
    for name in ["x", "y", "z"] {
        fs::write(lab.dir.path().join("data/0").join(name), name).unwrap();
    }
    let running = lab.start(&[]);
    lab.wait_for_worker("a");
    fs::write(lab.dir.path().join("data/0/y"), "new").unwrap();
    lab.release();
    running
        .end()
        .expect(100)
        .saying(&["data/0/y", "has changed since the run began"]);
    assert_eq!(lab.attempt("b").reason.as_deref(), Some("input changed"));
}

/// A lab whose one stage reads a folder of two classes.
fn with_folder() -> Lab {
    let lab = Lab::new(&["a: {kind: do, folder: data}"]);
    for class in ["0", "1"] {
        let dir = lab.dir.path().join("data").join(class);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("a.png"), class).unwrap();
    }
    lab
}

#[test]
fn folders_of_links_are_what_they_lead_to() {
    let lab = with_folder();
    lab.run(&[]).expect(0);
    let (data, real) = (lab.dir.path().join("data"), lab.dir.path().join("blobs"));
    fs::rename(&data, &real).unwrap();
    fs::create_dir_all(data.join("0")).unwrap();
    symlink("../../blobs/0/a.png", data.join("0/a.png")).unwrap();
    symlink("../blobs/1", data.join("1")).unwrap();
    assert_eq!(lab.outcomes(&[]), ["a reused"]);
    fs::write(real.join("1/a.png"), "other").unwrap();
    assert_eq!(lab.outcomes(&[]), ["a ran"]);
}

#[test]
fn circles_broken_links_and_pipes_in_folders_are_named() {
    type Spoil = fn(&Path);
    let cases: [(Spoil, &[&str]); 4] = [
        (
            |data| symlink("..", data.join("0/up")).unwrap(),
            &["data/0/up", "cycle"],
        ),
        (
            |data| symlink("me", data.join("me")).unwrap(),
            &["data/me", "cycle"],
        ),
        (
            |data| symlink("gone", data.join("1/b")).unwrap(),
            &["data/1/b is a link to gone"],
        ),
        (
            |data| fifo(&data.join("1/p.png")),
            &["data/1/p.png is a named pipe"],
        ),
    ];
    for (spoil, words) in cases {
        let lab = with_folder();
        spoil(&lab.dir.path().join("data"));
        lab.run(&[]).expect(3).saying(words);
        lab.retort(&["plan", "r.yaml"]).expect(3).saying(words);
    }
}

#[test]
fn leavings_of_file_managers_make_nothing_run_again() {
    let lab = with_folder();
    lab.run(&[]).expect(0);
    for name in [".DS_Store", "0/Thumbs.db", "1/desktop.ini", "0/._a.png"] {
        fs::write(lab.dir.path().join("data").join(name), "x").unwrap();
    }
    assert_eq!(lab.outcomes(&[]), ["a reused"]);
    fs::write(lab.dir.path().join("data/0/b.png"), "x").unwrap();
    assert_eq!(lab.outcomes(&[]), ["a ran"]);
}

#[test]
fn what_no_loader_of_images_reads_makes_nothing_run_again() {
    let lab = with_folder();
    lab.recipe(&["a: {kind: do, pictures: data}"]);
    lab.run(&[]).expect(0);
    let at = |name: &str| lab.dir.path().join("data").join(name);
    for name in [
        "README.txt",
        "LICENSE",
        "0/notes.json",
        "1/a.txt",
        "labels.csv",
    ] {
        fs::write(at(name), "about these images").unwrap();
    }
    assert_eq!(lab.outcomes(&[]), ["a reused"]);
    // A running stage is not disturbed either.
    lab.recipe(&["a: {kind: do, act: wait, flag: released, pictures: data}"]);
    let running = lab.start(&[]);
    lab.wait_for_worker("a");
    fs::write(at("README.txt"), "more about them").unwrap();
    lab.release();
    running.end().expect(0);
    for (name, content) in [
        ("0/without-ending", &b"\xff\xd8\xff\xe0"[..]),
        ("1/damaged.webp", b""),
        ("metadata.csv", b"file_name,label"),
    ] {
        fs::write(at(name), content).unwrap();
        assert_eq!(lab.outcomes(&[]), ["a ran"], "{name}");
    }
    let tar = Command::new("tar")
        .args(["cf", "data/shard.tar", "r.yaml"])
        .current_dir(lab.dir.path())
        .status();
    assert!(tar.unwrap().success());
    assert_eq!(lab.outcomes(&[]), ["a ran"]);
    fifo(&at("0/pipe.txt"));
    lab.run(&[])
        .expect(3)
        .saying(&["0/pipe.txt is a named pipe"]);
}

#[test]
fn what_is_no_regular_file_is_named_and_never_opened() {
    let lab = Lab::new(&["a: {kind: do, file: data.txt}"]);
    let data = lab.dir.path().join("data.txt");
    let said = |words: &[&str]| {
        lab.run(&[]).expect(3).saying(words);
        lab.retort(&["plan", "r.yaml"]).expect(0).saying(words);
        lab.retort(&["validate", "r.yaml"]).expect(0).saying(words);
    };
    fifo(&data);
    said(&["data.txt is a named pipe, not a file"]);
    fs::remove_file(&data).unwrap();
    symlink("/dev/zero", &data).unwrap();
    said(&["data.txt is a device, not a file"]);
    fs::remove_file(&data).unwrap();
    fs::create_dir(&data).unwrap();
    said(&["data.txt is a directory, not a file"]);
    assert!(lab.latest().is_none(), "nothing was begun");
    let recipe = lab.dir.path().join("r.yaml");
    fs::remove_file(&recipe).unwrap();
    fifo(&recipe);
    for command in ["run", "plan", "validate", "graph"] {
        lab.retort(&[command, "r.yaml"])
            .expect(3)
            .saying(&["r.yaml", "a named pipe"]);
    }
}

#[test]
fn a_file_of_holes_is_a_warning_of_the_plan_and_stops_a_run() {
    let lab = with_data(&["b: {kind: do, file: data.txt}"]);
    let data = fs::File::options()
        .write(true)
        .open(lab.dir.path().join("data.txt"));
    data.unwrap().set_len(6 << 30).unwrap();
    let said = ["data.txt is 6442450944 bytes long and mostly holes"];
    lab.retort(&["plan", "r.yaml"]).expect(0).saying(&said);
    lab.run(&[]).expect(3).saying(&said);
}

/// It looks like an empty file, and reading it never ends.
#[test]
fn what_the_kernel_makes_up_is_no_file() {
    let lab = Lab::new(&["a: {kind: do, file: x.txt}"]);
    symlink("/proc/self/pagemap", lab.dir.path().join("x.txt")).unwrap();
    lab.run(&[])
        .expect(3)
        .saying(&["x.txt", "made by the kernel when it is read"]);
    lab.retort(&["runs", "import", "/proc/self/pagemap"])
        .expect(2)
        .saying(&["made by the kernel"]);
}

#[test]
fn what_a_command_writes_to_is_not_waited_for() {
    let lab = Lab::new(&["a: {kind: do, text: x}"]);
    lab.run(&[]).expect(0);
    let pipe = lab.dir.path().join("pipe");
    fifo(&pipe);
    lab.retort(&["report", "-o", "pipe"])
        .expect(1)
        .saying(&["pipe cannot be written", "a named pipe that nobody reads"]);
    // Before the plugin test, which takes long.
    let said = lab.retort(&["plugin", "test", "faulty", "--junit", "pipe"]);
    let said = said.expect(1).saying(&["a named pipe that nobody reads"]);
    assert!(said.stdout.is_empty(), "{}", said.stdout);
    let page = lab.dir.path().join("old.html");
    for title in ["old", "new"] {
        lab.retort(&["report", "-o", "old.html", "--title", title])
            .expect(0);
        let page = fs::read_to_string(&page).unwrap();
        assert!(page.contains(&format!("<title>{title}</title>")));
    }
}

#[test]
fn a_plugin_that_is_no_file_is_not_examined() {
    let lab = Lab::new(&["a: {kind: do}"]);
    fifo(&lab.dir.path().join("pipe"));
    symlink("/dev/zero", lab.dir.path().join("libretort_zero.so")).unwrap();
    for (name, kind) in [
        ("./pipe", "a named pipe, not a regular file"),
        ("libretort_zero.so", "a device, not a regular file"),
    ] {
        let said = lab.retort(&["plugin", "test", "--json", name]).expect(5);
        assert!(said.stdout.contains(kind), "{}", said.stdout);
    }
}

#[test]
fn a_full_store_is_known_before_a_stage_begins() {
    let lab = Lab::new(&["a: {kind: do}"]);
    lab.run(&[]).expect(0);
    let artifacts = lab.store_dir().join("artifacts");
    fs::remove_dir_all(&artifacts).unwrap();
    fifo(&artifacts);
    let said = lab.run(&["--force"]).expect(1);
    let said = said.saying(&["artifacts: it is a named pipe, not a directory"]);
    assert!(!said.stderr.contains("a: started"), "{}", said.stderr);
    fs::remove_file(&artifacts).unwrap();
    symlink("elsewhere", &artifacts).unwrap();
    lab.run(&["--force"])
        .expect(1)
        .saying(&["artifacts: it is a link that leads nowhere, not a directory"]);
}

#[test]
fn a_lock_that_is_something_else_is_named() {
    let lab = Lab::new(&["a: {kind: do}"]);
    lab.run(&[]).expect(0);
    let plan = lab.retort(&["plan", "r.yaml", "--json"]).expect(0).json();
    let digest = plan["decisions"][0]["digest"].as_str().unwrap().to_owned();
    let lock = lab.store_dir().join("work").join(format!("{digest}.lock"));
    fifo(&lock);
    lab.run(&["--force"])
        .expect(1)
        .saying(&[".lock", "a named pipe"]);
    fs::remove_file(&lock).unwrap();
    let precious = lab.dir.path().join("precious");
    fs::write(&precious, "mine").unwrap();
    symlink(&precious, &lock).unwrap();
    lab.run(&["--force"])
        .expect(1)
        .saying(&[".lock", "a symbolic link"]);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "mine");
}

/// A wrong cache entry shows who trusts it.
fn spoil_memory(lab: &Lab, key: &str) {
    block_on(async {
        let store = Store::open(&lab.store_dir(), Access::ReadWrite)
            .await
            .unwrap();
        let keys = [key.to_owned()];
        let mut known = store.remembered_files(&keys).await.unwrap();
        let mut bytes = known[key].pack();
        *bytes.last_mut().unwrap() ^= 1;
        known.insert(key.to_owned(), Folder::unpack(&bytes));
        store.remember_files(&known).await.unwrap();
        store.close().await;
    });
}

#[test]
fn hashes_are_remembered_between_commands() {
    for (stage, key) in [
        ("a: {kind: do, file: data.txt}", "data.txt"),
        ("a: {kind: do, folder: data}", "data/0"),
    ] {
        let lab = with_folder();
        lab.recipe(&[stage]);
        fs::write(lab.dir.path().join("data.txt"), "data").unwrap();
        std::thread::sleep(SETTLED);
        lab.run(&[]).expect(0);
        assert_eq!(lab.outcomes(&[]), ["a reused"]);
        let key = lab.dir.path().join(key).to_str().unwrap().to_owned();
        spoil_memory(&lab, &key);
        says_to_run(&lab, "a");
        let plan = |flags: &[&str]| {
            let said = lab.retort(&[&["plan", "r.yaml", "--json"], flags].concat());
            said.expect(0).json()["decisions"][0]["action"].clone()
        };
        assert_eq!(plan(&["--rehash"]), "reuse");
        assert_eq!(plan(&[]), "reuse", "what was read is remembered");
    }
}

#[test]
fn a_run_taken_up_again_reads_files_anew_when_told() {
    let lab = with_data(&[
        "a: {kind: do, file: data.txt}",
        "b: {kind: do, act: fail_unless_flag, input: a}",
    ]);
    std::thread::sleep(SETTLED);
    lab.run(&[]).expect(100);
    let key = lab.dir.path().join("data.txt");
    spoil_memory(&lab, key.to_str().unwrap());
    let outcome = |arguments: &[&str]| {
        let said = lab.retort(&[&["resume", "--json"], arguments].concat());
        said.json()["stages"][0]["outcome"].clone()
    };
    assert_eq!(outcome(&["--rehash"]), "reused");
    spoil_memory(&lab, key.to_str().unwrap());
    assert_eq!(outcome(&[]), "ran", "a wrong memory is believed");
}

#[test]
fn a_file_dated_in_the_future_is_remembered() {
    let lab = with_data(&["a: {kind: do, file: data.txt}"]);
    let file = fs::File::options()
        .append(true)
        .open(lab.dir.path().join("data.txt"))
        .unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(3600))
        .unwrap();
    std::thread::sleep(SETTLED);
    lab.run(&[]).expect(0);
    let data = lab.dir.path().join("data.txt");
    let known = block_on(async {
        let store = Store::open(&lab.store_dir(), Access::ReadOnly)
            .await
            .unwrap();
        store
            .remembered_files(&[data.to_str().unwrap().to_owned()])
            .await
            .unwrap()
    });
    assert_eq!(known.len(), 1, "{known:?}");
}

#[test]
fn an_artifact_reaches_another_disk() {
    use std::os::unix::fs::MetadataExt;
    let shared = Path::new("/dev/shm");
    let lab = Lab::new(&[
        "a: {kind: do, text: far}",
        "b: {kind: do, act: copy, input: a}",
    ]);
    let here = fs::metadata(lab.dir.path()).unwrap().dev();
    if fs::metadata(shared).map_or(here, |found| found.dev()) == here {
        skip("there is no second disk at /dev/shm");
        return;
    }
    let other = tempfile::tempdir_in(shared).unwrap();
    for dir in ["artifacts", "work"] {
        fs::create_dir_all(other.path().join(dir)).unwrap();
        fs::create_dir_all(lab.store_dir()).unwrap();
        symlink(other.path().join(dir), lab.store_dir().join(dir)).unwrap();
    }
    lab.run(&[]).expect(0);
    lab.retort(&["artifacts", "verify"]).expect(0);
    assert_eq!(lab.entries("staging"), [""; 0]);
    let near = Lab::new(&[
        "a: {kind: do, text: far}",
        "b: {kind: do, act: copy, input: a}",
    ]);
    near.run(&[]).expect(0);
    let sorted = |lab: &Lab| {
        let mut names = lab.entries("artifacts");
        names.sort();
        names
    };
    assert_eq!(
        sorted(&lab),
        sorted(&near),
        "the same artifacts, and nothing beside them"
    );
    // A damaged copy there is repaired.
    let hash = lab.attempt("a").output.unwrap();
    let file = other.path().join("artifacts").join(&hash).join("thing.txt");
    fs::remove_file(&file).unwrap();
    lab.run(&["--force"]).expect(0);
    lab.retort(&["artifacts", "verify"]).expect(0);
    assert_eq!(sorted(&lab), sorted(&near));
}

#[test]
fn a_repository_around_a_recipe_runs_nothing() {
    let lab = Lab::new(&["a: {kind: do}"]);
    let dir = lab.dir.path();
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-C"])
            .arg(dir)
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "git {arguments:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    git(&["init", "-q"]);
    fs::write(dir.join(".gitattributes"), "* filter=evil\n").unwrap();
    git(&["add", "r.yaml", ".gitattributes"]);
    git(&["commit", "-q", "-m", "first"]);
    let trap = dir.join("trap");
    let spring = format!("touch '{}'; cat", trap.display());
    for name in [
        "filter.evil.clean",
        "filter.evil.smudge",
        "filter.evil.process",
        "core.fsmonitor",
        "core.sshCommand",
        "remote.origin.uploadpack",
        "diff.external",
        "core.pager",
        "alias.describe",
    ] {
        git(&["config", name, &spring]);
    }
    git(&["config", "remote.origin.url", "."]);
    git(&["config", "remote.origin.promisor", "true"]);
    let commit = fs::read_to_string(dir.join(".git/HEAD")).unwrap();
    let commit = fs::read_to_string(
        dir.join(".git")
            .join(commit.trim().trim_start_matches("ref: ")),
    );
    let commit = commit.unwrap().trim().to_owned();
    std::thread::sleep(Duration::from_millis(1_100));
    let recipe = fs::read_to_string(dir.join("r.yaml")).unwrap();
    fs::write(dir.join("r.yaml"), recipe + "# changed\n").unwrap();
    // Whoever needs the tree fetches it.
    fs::remove_dir_all(dir.join(".git/objects")).unwrap();
    fs::create_dir(dir.join(".git/objects")).unwrap();
    for command in [
        &["validate", "r.yaml"],
        &["plan", "r.yaml"],
        &["run", "r.yaml"],
        &["resume", "latest"],
    ] {
        lab.retort(command).expect(0);
        assert!(
            !trap.exists(),
            "{command:?} ran a program of the repository"
        );
    }
    let shown = lab.retort(&["runs", "show", "latest", "--json"]).expect(0);
    assert!(shown.stdout.contains(&commit), "{}", shown.stdout);
    wait_for("the end", || (!trap.exists()).then_some(()));
}
