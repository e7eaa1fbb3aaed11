//! A plugin author's steps: from an empty directory to a run, and the examination's report.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use retort_tests::digits::Digits;

use crate::lab::{Lab, compile};

/// The directory of the workspace plugins that these tests depend on.
fn built() -> PathBuf {
    std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Builds a project, or shows the errors.
#[track_caller]
fn build(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

/// The checks that failed, and the whole report.
fn failures(lab: &Lab, arguments: &[&str]) -> (BTreeSet<String>, String) {
    let said = lab.retort(&[&["plugin", "test", "--json"], arguments].concat());
    let report = said.json();
    let failed = report
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["verdict"] == "failed")
        .map(|row| row["check"].as_str().unwrap().to_owned())
        .collect::<BTreeSet<_>>();
    said.expect(if failed.is_empty() { 0 } else { 5 });
    (failed, format!("{report:#}"))
}

/// The guide's commands under this heading.
fn guide(words: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/README.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, part) = text.split_once(words).expect("the guide has these words");
    let lines = part
        .lines()
        .skip(1)
        .skip_while(|line| !line.starts_with("    "));
    let block: Vec<String> = lines
        .take_while(|line| line.starts_with("    "))
        .map(|line| line.trim().to_owned())
        .collect();
    assert!(block.len() > 4, "{block:?}");
    block
}

/// Follows the guide in a shell in the lab's directory. Returns the final directory.
#[track_caller]
fn follow(lab: &Lab, commands: &[String]) -> PathBuf {
    let mut dir = lab.dir.path().to_owned();
    for command in commands {
        let words: Vec<&str> = command.split_whitespace().collect();
        match words.as_slice() {
            ["cd", to] => dir.push(to),
            ["retort", arguments @ ..] => build(lab.command(arguments).current_dir(&dir)),
            ["cargo", arguments @ ..] => {
                let (built, own) = (cargo(&dir, arguments), dir.join("target/release"));
                let project = dir.file_name().unwrap().to_str().unwrap();
                let file = format!("libretort_{project}.so");
                // As if built in the project.
                if arguments.contains(&"build") {
                    std::fs::create_dir_all(&own).unwrap();
                    std::fs::copy(built.join(&file), own.join(&file)).unwrap();
                }
            }
            [program, arguments @ ..] => {
                build(Command::new(program).args(arguments).current_dir(&dir));
            }
            [] => {}
        }
    }
    dir
}

/// Checks the results of a project's recipe, and that no part of its plugin is unexamined.
#[track_caller]
fn check_project(lab: &Lab) {
    let stage = &lab.latest().expect("a run").stages[0];
    assert_eq!(stage.plugin.name, "hello");
    let metric = lab
        .retort(&["metrics", "latest", "--json"])
        .expect(0)
        .json();
    let last = metric[0]["last"].as_f64().unwrap();
    assert!((last - std::f64::consts::PI).abs() < 0.01, "{metric:#}");
    let installed = lab
        .dir
        .path()
        .join(".local/share/retort/plugins/libretort_hello.so");
    assert!(installed.is_file());
    let rows = lab.retort(&[
        "plugin",
        "test",
        "--json",
        "hello",
        "--recipe",
        "hello/recipe.yaml",
        "--set",
        "estimate.rounds=400",
    ]);
    let rows = rows.expect(0).json();
    for row in rows.as_array().unwrap() {
        assert_eq!(row["verdict"], "passed", "{row:#}");
    }
}

#[test]
fn the_guide_leads_from_nothing_to_a_run_in_c_and_cpp() {
    for language in ["c", "cpp"] {
        let lab = Lab::new(&[]);
        let commands = guide("In C or C++").into_iter();
        let commands: Vec<String> = commands
            .map(|line| line.replace("--lang c", &format!("--lang {language}")))
            .collect();
        follow(&lab, &commands);
        check_project(&lab);
    }
}

/// Cargo in a new project, with this workspace's crates: nothing is downloaded. Built crates are reused the next time.
fn cargo(project: &Path, arguments: &[&str]) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::copy(root.join("Cargo.lock"), project.join("Cargo.lock")).unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("project");
    build(
        Command::new(std::env::var("CARGO").unwrap_or("cargo".into()))
            .args(arguments)
            .arg("--offline")
            .env("CARGO_TARGET_DIR", &target)
            .env_remove("CARGO_BUILD_TARGET_DIR")
            .current_dir(project),
    );
    target.join("release")
}

#[test]
fn the_guide_leads_from_nothing_to_a_run_in_rust() {
    let lab = Lab::new(&[]);
    let project = follow(&lab, &guide("In Rust"));
    check_project(&lab);

    // The same plugin with a mistake: its panic has a specific reason, and its location.
    let source = project.join("src/lib.rs");
    let text = std::fs::read_to_string(&source).unwrap();
    let worse = text.replace("host.check_cancelled()?;", "panic!(\"on purpose\");");
    assert_ne!(text, worse);
    std::fs::write(source, worse).unwrap();
    let dir = cargo(&project, &["build", "--release"]);
    let said = lab.retort(&[
        "run",
        "hello/recipe.yaml",
        "--force",
        "--plugin-dir",
        path(&dir),
    ]);
    assert_eq!(said.code, Some(100));
    said.saying(&[": panic", "src/lib.rs:", "on purpose"]);
    let plugin = dir.join("libretort_hello.so");
    let (failed, report) = failures(&lab, &[path(&plugin), "--recipe", "hello/recipe.yaml"]);
    assert_eq!(failed, ["runs".to_owned()].into(), "{report}");
    assert!(
        report.contains("src/lib.rs:") && report.contains("on purpose"),
        "{report}"
    );
}

#[test]
#[ignore = "compiles the engine anew, for minutes: make test-long"]
fn the_guide_leads_from_nothing_to_a_run_with_a_backend() {
    let lab = Lab::new(&[]);
    follow(&lab, &guide("## A backend of your own"));
    assert_eq!(lab.latest().expect("a run").stages[0].plugin.name, "mine");
}

#[test]
fn a_backend_of_plain_loops_passes() {
    let lab = Lab::new(&[]);
    let recipe =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/templates/backend/recipe.yaml");
    let plugin = lab.dir.path().join("libretort_abacus.so");
    std::fs::copy(built().join("libtemplate_backend.so"), &plugin).unwrap();
    let (failed, report) = failures(&lab, &[path(&plugin), "--recipe", path(&recipe)]);
    assert!(failed.is_empty(), "{report}");
    assert!(
        report.contains("comparisons with reference values"),
        "{report}"
    );
}

#[test]
fn candle_is_as_a_plugin_has_to_be() {
    retort_tests::examination::check("candle");
}

#[test]
fn a_backend_is_not_begun_in_c() {
    let lab = Lab::new(&[]);
    lab.retort(&["plugin", "new", "x", "--lang", "c", "--kind", "backend"])
        .expect(2)
        .saying(&["is written in Rust", "--kind stage"]);
    lab.retort(&["plugin", "new", "X"])
        .expect(2)
        .saying(&["not a valid plugin name"]);
}

/// Samples of a small teacher on candle, with the example's metric of them; and samples from a plugin in C, which candle
/// measures.
const MIXED: &str = "
  drawn:
    kind: sample
    sampler: {kind: teacher, teacher: teacher}
    count: 24
  spread:
    kind: diversity
    plugin: diversity
    samples: {teacher: drawn}
  copied: {kind: do, plugin: copier, act: copy, input: drawn}
  judged: {kind: evaluate, data: \"${params.data}\", samples: {teacher: copied}}
";

#[test]
fn a_stage_of_a_third_party_measures_what_another_plugin_made() {
    let lab = Lab::new(&[]);
    let small = Digits {
        backend: "candle",
        top: "seed: 3",
        codes: "train: {steps: 4, batch: 8}",
        teacher: "width: 16, depth: 1, heads: 2, train: {steps: 4, batch: 8}",
    };
    let text = small.recipe(MIXED);
    let recipe = lab.dir.path().join("r.yaml");
    let (dir, own) = (built(), lab.dir.path());
    let flags = ["-DFAULTY_NAME=\"copier\"", "-DFAULTY_KIND=\"samples\""];
    compile("faulty.c", &flags, &own.join("libretort_copier.so"));
    let dir = ["--plugin-dir", path(&dir), "--plugin-dir", path(own)];

    // Its options are checked, with their line, before anything runs.
    let wrong = text.replace("teacher: drawn}", "teacher: drawn}\n    twin: 3");
    std::fs::write(&recipe, wrong).unwrap();
    lab.run(&dir)
        .expect(3)
        .saying(&["r.yaml:17", "twin: 3", "at most 1"]);
    std::fs::write(&recipe, text.replace("teacher: drawn}", "teacher: codes}")).unwrap();
    lab.run(&dir).expect(3).saying(&["r.yaml:16", "samples"]);
    // Errors that no schema can express come from the plugin, with their location.
    let twice = "teacher: drawn, again: drawn}";
    std::fs::write(&recipe, text.replace("teacher: drawn}", twice)).unwrap();
    lab.retort(&[&["validate", "r.yaml"], &dir[..]].concat())
        .expect(0)
        .saying(&["are the same set", "r.yaml:16"]);

    std::fs::write(&recipe, text).unwrap();
    let said = lab.run(&dir).expect(0);
    assert!(
        said.stdout.contains("Diversity within classes"),
        "{}",
        said.stdout
    );
    let detail = lab.latest().unwrap();
    let (drawn, spread) = (&detail.stages[2], &detail.stages[3]);
    assert_eq!(
        (drawn.plugin.name.as_str(), spread.plugin.name.as_str()),
        ("candle", "diversity")
    );
    let made = |stage: &str| lab.attempt(stage).output.unwrap();
    assert_eq!(
        made("copied"),
        made("drawn"),
        "the same files are the same artifact"
    );
    assert_eq!(lab.attempt("judged").reason.as_deref(), Some("succeeded"));
    let distance = lab.attempt("spread").summary.unwrap_or_default()["teacher"]["mean_distance"]
        .as_f64()
        .unwrap();
    assert!(distance > 0.0 && distance < 1.0, "{distance}");

    // The history knows the file that ran.
    let hash = |name: &str| {
        let file = built().join(format!("libretort_{name}.so"));
        retort::artifact::file_hash(&file).unwrap()
    };
    assert_eq!(spread.plugin.hash, hash("diversity"));
    assert_eq!(drawn.plugin.hash, hash("candle"));

    let schema = [&["schema", "--kind", "diversity", "--table"], &dir[..]].concat();
    let said = lab.retort(&schema).expect(0);
    assert!(
        said.stdout.contains("twin") && said.stdout.contains("0.02"),
        "{}",
        said.stdout
    );

    // Its examination, on the same recipe.
    let plugin = built().join("libretort_diversity.so");
    let (failed, report) = failures(
        &lab,
        &[&[path(&plugin), "--recipe", "r.yaml"], &dir[..]].concat(),
    );
    assert!(failed.is_empty(), "{report}");
}

/// A lab with the fixture plugin in a separate directory.
fn with_plugin(flags: &[&str]) -> (Lab, PathBuf) {
    let lab = Lab::new(&["a: {kind: do}"]);
    let dir = lab.dir.path().join("own");
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    compile("faulty.c", flags, &dir.join("libretort_faulty.so"));
    (lab, dir)
}

#[test]
fn a_plugin_that_others_can_change_is_refused() {
    let (lab, dir) = with_plugin(&[]);
    let plugin = dir.join("libretort_faulty.so");
    let set = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let run = || lab.run(&["--plugin-dir", path(&dir)]);
    set(&plugin, 0o666);
    run()
        .expect(5)
        .saying(&["is writable by everybody", "chmod o-w"]);
    set(&plugin, 0o644);
    set(&dir, 0o777);
    run()
        .expect(5)
        .saying(&["its directory", "is writable by everybody"]);
    let check = lab.retort(&["plugin", "check", path(&plugin)]);
    check.expect(5).saying(&["is writable by everybody"]);
    assert!(lab.latest().is_none(), "nothing was begun");
    set(&dir, 0o755);
    run().expect(0);
}

#[test]
fn a_lock_gives_what_it_lists_and_nothing_else() {
    let (lab, dir) = with_plugin(&[]);
    let run = || lab.run(&["--plugin-dir", path(&dir)]);
    lab.retort(&["plugin", "lock", path(&dir)])
        .expect(0)
        .saying(&["allows 1 plugin"]);
    run().expect(0);
    // The same source with another symbol makes a different file.
    compile(
        "faulty.c",
        &["-DFAULTY_LEAKY"],
        &dir.join("libretort_faulty.so"),
    );
    run().expect(5).saying(&[
        "plugins.lock",
        "allows it with the hash",
        "retort plugin lock",
    ]);
    // Installing a plugin allows it.
    let other = lab.dir.path().join("libretort_faulty.so");
    compile("faulty.c", &[], &other);
    lab.retort(&["plugin", "install", path(&other), "--into", path(&dir)])
        .expect(0);
    run().expect(0);
    lab.retort(&["plugin", "lock", "--remove", path(&dir)])
        .expect(0);
    assert!(!dir.join("plugins.lock").exists());
}

/// Examines a plugin built with these flags whose stage does this. The report has exactly these failures.
#[track_caller]
fn check_broken(flags: &[&str], act: &str, expected: &[&str]) {
    let (fixture, stage) = match act {
        "throw" => ("throwing.cpp", "kind: throw".to_owned()),
        act => (
            "faulty.c",
            format!("kind: do, act: {act}, text: x, amount: 5"),
        ),
    };
    let name = fixture.split_once('.').expect("a file of source").0;
    let lab = Lab::new(&[&format!("a: {{plugin: {name}, {stage}}}")]);
    let dir = lab.dir.path().join("own");
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let plugin = dir.join(format!("libretort_{name}.so"));
    compile(fixture, flags, &plugin);
    let junit = lab.dir.path().join("report.xml");
    // Only stages that never end or never stop are killed, and soon. Before a stage hangs, its plugin answers within the limit.
    let limit = match act {
        "hang" => "20s",
        _ if flags.contains(&"-DFAULTY_SLOW") => "3s",
        _ => "2min",
    };
    let grace = if act == "deaf" { "1500ms" } else { "2min" };
    let (plugin, junit_path) = (path(&plugin), path(&junit));
    let terms = [
        "--recipe", "r.yaml", "--grace", grace, "--limit", limit, "--junit", junit_path,
    ];
    let said = lab.retort(&[&["plugin", "test", "--json", plugin], &terms[..]].concat());
    let report = said.json();
    said.expect(if expected.is_empty() { 0 } else { 5 });
    let rows = report.as_array().unwrap();
    let failed = rows.iter().filter(|row| row["verdict"] == "failed");
    let failed: Vec<String> = failed
        .map(|row| {
            let said = |key: &str| row[key].as_str().unwrap().to_owned();
            let detail = said("detail").replace(path(lab.dir.path()), "LAB");
            format!("{}: {}", said("check"), without_numbers(&detail))
        })
        .collect();
    assert_eq!(failed, expected, "{report:#}");
    let xml = std::fs::read_to_string(junit).unwrap();
    let counts = format!("tests=\"{}\" failures=\"{}\"", rows.len(), failed.len());
    assert!(xml.contains(&counts), "{xml}");
}

/// Numbers of four digits and more, which differ from run to run, become `N`.
fn without_numbers(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let digits = rest[start..].bytes().take_while(u8::is_ascii_digit).count();
        out.push_str(&rest[..start]);
        out.push_str(if digits > 3 {
            "N"
        } else {
            &rest[start..start + digits]
        });
        rest = &rest[start + digits..];
    }
    out + rest
}

#[test]
fn text_that_is_no_utf8_is_repaired_and_no_fault() {
    check_broken(&[], "mangled", &[]);
}

/// Faults, each in a separate plugin: how it is compiled, what its stage does, and all failures in its report.
macro_rules! faults {
    ($($name:ident: [$($flag:literal)*], $act:literal => [$($failed:literal),* $(,)?];)*) => {
        $(
            #[test]
            fn $name() {
                check_broken(&[$($flag),*], $act, &[$($failed),*]);
            }
        )*

        #[test]
        fn no_two_faults_are_reported_alike() {
            let mut seen: BTreeSet<Vec<&str>> = BTreeSet::new();
            $(assert!(seen.insert(vec![$($failed),*]), "{}", stringify!($name));)*
        }
    };
}

faults! {
    a_good_plugin_fails_nothing: [], "work" => [];
    a_second_symbol: ["-DFAULTY_LEAKY"], "work" => [
        "exports: it exports `some_library_function` too, which can clash with a symbol of others",
    ];
    a_description_that_changes: ["-DFAULTY_IMPURE"], "work" => [
        "describes itself: it describes itself differently when it is asked twice",
    ];
    a_description_that_is_no_text: ["-DFAULTY_MANGLED"], "work" => [
        "describes itself: the plugin's answer to `describe` is invalid: expected value at line 1 column \
         1",
    ];
    a_description_that_does_not_come: ["-DFAULTY_SLOW"], "work" => [
        "describes itself: the plugin did not answer within 3 s",
    ];
    a_default_that_does_not_fit: ["-DFAULTY_DEFAULT=\"7\""], "work" => [
        "description: the default of `/act` does not fit the schema of `do`: `act`: expected a text, got 7",
    ];
    crashing_over_options: ["-DFAULTY_FRAGILE"], "work" => [
        "bad options: the options null: the plugin ended its process: killed by SIGABRT: the plugin, or a library it \
         uses, gave up (abort)",
    ];
    pointing_nowhere: ["-DFAULTY_POINTLESS"], "work" => [
        "bad options: the options null: a finding points to `/no/such/place`, which is no place in them",
    ];
    an_exception: [], "throw" => [
        "runs: killed by SIGABRT (exception): an exception left a function or a thread of the plugin, which must \
         catch all of its own; the last line it wrote: fatal runtime error: Rust cannot catch foreign exceptions, \
         aborting",
    ];
    failing: [], "fail" => [
        "runs: it failed: the data are bad",
    ];
    aborting: [], "abort" => [
        "runs: killed by SIGABRT: the plugin, or a library it uses, gave up (abort)",
    ];
    segfaulting: [], "segfault" => [
        "runs: killed by SIGSEGV: the plugin accessed memory that is not its own; the last line it wrote: about to \
         do something stupid",
    ];
    leaving: [], "exit" => [
        "runs: exited with code 3: the plugin, or a library it uses, left (exit) without a result",
    ];
    hanging: [], "hang" => [
        "runs: it exceeded 20 s",
    ];
    ending_the_thread_of_the_host: [], "thread_ends" => [
        "runs: killed by SIGABRT (exception): an exception left a function or a thread of the plugin, which must \
         catch all of its own; the last line it wrote: FATAL: exception not rethrown",
    ];
    being_killed: [], "kill" => [
        "runs: killed by SIGKILL: somebody killed the worker; the kernel does when memory runs out",
    ];
    running_out_of_memory: [], "out_of_memory" => [
        "runs: killed by SIGABRT (out of memory): the plugin could not get the memory it asked for; the last line it \
         wrote: out of memory",
    ];
    an_absurd_length: [], "absurd" => [
        "runs: killed by SIGABRT (absurd length): the plugin passed text of an absurd length; the last line it \
         wrote: a text of N bytes crossed the plugin boundary, N are allowed",
    ];
    an_answer_that_is_none: [], "babble" => [
        "runs: it failed: the plugin's answer to `run` is invalid: expected ident at line 1 column 2",
    ];
    an_error_that_is_none: [], "babble_error" => [
        "runs: it failed: the call ended with status 77, saying (no valid failure message): \u{fffd}\u{fffd} no JSON \
         either",
    ];
    an_output_that_was_not_made: [], "promise" => [
        "runs: its output was not committed",
    ];
    an_output_of_another_kind: [], "other_kind" => [
        "runs: its output is a `other`, its description promises a `thing`",
    ];
    calling_after_the_end: [], "late" => [
        "ends: it goes on calling the host after `run` has returned",
    ];
    writing_after_the_end: [], "still_writing" => [
        "ends: what it made was changed after it had been committed",
    ];
    progress_that_falls: [], "backwards" => [
        "progress: it fell from 12 to 11 ticks",
    ];
    steps_that_go_back: [], "steps_back" => [
        "steps: `tick` went from step 12 back to 11",
    ];
    not_stopping: [], "deaf" => [
        "stops: it did not stop within 1.5 s",
    ];
    failing_instead_of_stopping: [], "sulk" => [
        "stops: it failed instead, without the code `cancelled`: do not disturb",
    ];
    writing_elsewhere: [], "outside" => [
        "stays inside: it changed LAB/litter-N",
    ];
    leaving_temporary_files: [], "temporary" => [
        "stays inside: it left litter-N in the directory for temporary files",
    ];
    ignoring_the_seed: [], "unseeded" => [
        "same seed: thing.txt has other bytes",
        "resumes: thing.txt has other bytes",
    ];
    making_the_whole_for_a_part: ["-DFAULTY_DIVISIBLE=\"true\""], "work" => [
        "divides: it failed: artifacts are only made while a stage runs, and not by its parts",
    ];
    forgetting_at_an_interruption: [], "forgetful" => [
        "resumes: thing.txt has other bytes",
    ];
}
