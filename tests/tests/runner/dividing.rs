//! Stages whose work several worker processes share: the same bytes, and what is left of them when something ends early.

use std::time::Duration;

use retort::store::{AttemptState, RunState};

use crate::lab::{Lab, compile, signal_process, wait_for, wait_until_gone};
use crate::training::{lab, output, output_with, shards};

const INTERRUPT: i32 = 2;
const KILL: i32 = 9;

/// Long enough to be disturbed: eighty shards.
const MANY: &str = "
  pairs: {kind: trajectories, teacher: teacher, count: 20000, shard_size: 250, batch: 125, workers: 2}
";

#[test]
fn workers_do_not_change_a_byte() {
    let lab = lab("
  pairs: {kind: trajectories, teacher: teacher, count: 601, shard_size: 100, batch: 33, threads: 2}
");
    lab.retort(&["run", "r.yaml"]).expect(0);
    let alone = output(&lab, "pairs").0;

    let divided = ["--set", "pairs.workers=3"];
    assert!(
        lab.outcomes(&divided).contains(&"pairs reused".to_owned()),
        "workers decide no result"
    );
    lab.run(&[&divided, ["-v", "--force=pairs"].as_slice()].concat())
        .expect(0)
        .saying(&[
            "pairs: started (cpu, 3 workers of 1 thread)",
            "pairs: part 1 of 3: 201 trajectories",
            "pairs: part 2 of 3: 200 trajectories",
            "pairs: part 3 of 3: 200 trajectories",
        ]);
    assert_eq!(output(&lab, "pairs").0, alone);
    let said = lab
        .retort(&["metrics", "latest", "--stage", "pairs", "--json"])
        .expect(0)
        .json();
    let series = said.as_array().unwrap().iter();
    let names: Vec<&str> = series
        .map(|series| series["series"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["1", "2", "3"].map(|part| format!("trajectories/samples_per_second/part-{part}"))
    );
}

/// Two steps a second of training together.
const TOGETHER: &str = "a: {kind: train, plugin: ranks, steps: 10}";

#[test]
fn processes_that_somebody_else_has_started_train_together() {
    let plugins = tempfile::tempdir().unwrap();
    compile("ranks.c", &[], &plugins.path().join("libretort_ranks.so"));
    let lab = Lab::new(&[TOGETHER]);
    // Free again at once.
    let free_port = || {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        listener.local_addr().unwrap().port()
    };
    let port = free_port().to_string();
    let process = |rank: &str, more: &[&str]| {
        let own = ["run", "r.yaml", "--executor", "torchrun", "--plugin-dir"];
        let mut command =
            lab.command(&[&own[..], &[plugins.path().to_str().unwrap()], more].concat());
        let place = [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "3")];
        command
            .envs(place)
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", &port);
        command
    };
    let others = ["1", "2"].map(|rank| process(rank, &[]).spawn().unwrap());
    let first = process("0", &["-v"]).output().unwrap();
    let said = String::from_utf8_lossy(&first.stderr);
    assert!(first.status.success(), "{said}");
    assert!(said.contains("a: started (cpu, 3 workers of"), "{said}");
    for mut other in others {
        assert!(other.wait().unwrap().success());
    }
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Succeeded);
    // What makes no sense is refused.
    let mut lost = process("1", &[]);
    lost.env_remove("MASTER_ADDR");
    for (mut command, words) in [
        (
            process("0", &["--set", "a.workers=2"]),
            "has 2 workers, and 3 processes were started",
        ),
        (lost, "MASTER_ADDR is not set"),
    ] {
        let refused = command.output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(
            refused.status.code() == Some(2) && said.contains(words),
            "{said}"
        );
    }
}

#[test]
fn a_training_goes_on_with_fewer_workers_while_there_are_enough() {
    let plugins = tempfile::tempdir().unwrap();
    compile("ranks.c", &[], &plugins.path().join("libretort_ranks.so"));
    let own = ["--plugin-dir", plugins.path().to_str().unwrap()];
    let lab = Lab::new(&["a: {kind: train, plugin: ranks, steps: 60, workers: 3, min_workers: 2}"]);
    let running = lab.start(&own);
    let runner = running.child.id();
    let ranks = |of: usize| -> Vec<u32> {
        wait_for("so many ranks", || {
            let found = rank_processes(runner, of);
            (found.len() == of).then_some(found)
        })
    };
    // Its checkpoint is what the first saves when another is lost.
    std::thread::sleep(Duration::from_millis(500));
    signal_process(ranks(3)[1], KILL);
    signal_process(ranks(2)[1], KILL);
    running
        .end()
        .expect(100)
        .saying(&["it goes on from its last checkpoint with 2 of 3 workers"]);
    let reasons = "select reason from v_attempts order by attempt";
    let reasons = lab.retort(&["query", "--json", reasons]).expect(0).json();
    let reasons: Vec<_> = reasons
        .as_array()
        .unwrap()
        .iter()
        .map(|row| &row["reason"])
        .collect();
    assert_eq!(
        reasons,
        ["lost a worker: killed by SIGKILL", "killed by SIGKILL"]
    );
    lab.retort(&[&["resume"][..], &own].concat()).expect(0);
}

/// The processes of a runner's workers that are one of so many ranks, in order of their ranks.
fn rank_processes(runner: u32, of: usize) -> Vec<u32> {
    let children = format!("/proc/{runner}/task/{runner}/children");
    let children = std::fs::read_to_string(children).unwrap_or_default();
    let mut found: Vec<(usize, u32)> = children
        .split_whitespace()
        .filter_map(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            let environment = String::from_utf8_lossy(&environment).into_owned();
            let variable = |name: &str| -> Option<usize> {
                let mut all = environment.split('\0');
                all.find_map(|text| text.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
            };
            (variable("WORLD_SIZE")? == of).then_some((variable("RANK")?, pid.parse().ok()?))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, pid)| pid).collect()
}

/// The worker processes of a runner, but for this one.
fn workers_beside(whole: u32, runner: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let parent = stat
                .rsplit_once(')')
                .and_then(|(_, rest)| rest.split_whitespace().nth(1));
            *pid != whole && parent == Some(&runner.to_string())
        })
        .collect()
}

/// Begins with the stage, does something to its parts or the runner when some shards are there, and waits for the end of
/// all its processes.
fn disturb(whom: fn(&[u32], u32) -> u32, signal: i32, code: Option<i32>) -> Lab {
    let lab = lab(MANY);
    let running = lab.start(&[]);
    let whole = lab.wait_for_worker("pairs");
    let parts = workers_beside(whole, running.child.id());
    assert_eq!(parts.len(), 2);
    wait_for("some shards", || (shards(&lab).len() >= 4).then_some(()));
    signal_process(whom(&parts, running.child.id()), signal);
    assert_eq!(running.end().code, code);
    for pid in parts.into_iter().chain([whole]) {
        wait_until_gone(pid);
    }
    lab
}

#[test]
fn parts_lose_at_most_their_open_shards() {
    let undisturbed = lab(MANY);
    undisturbed.retort(&["run", "r.yaml"]).expect(0);
    let expected = output(&undisturbed, "pairs").0;
    let check = |lab: Lab, state, reason: Option<&str>| {
        assert_eq!(lab.latest().unwrap().summary.state, state);
        assert_eq!(lab.attempt("pairs").reason.as_deref(), reason);
        let before = shards(&lab);
        assert!(before.len() < 80, "it came too late to show anything");
        lab.retort(&["resume"]).expect(0);
        assert_eq!(output_with(&lab, &before), expected);
        assert_eq!(lab.entries("work"), [""; 0]);
    };

    let one_killed = disturb(|parts, _| parts[0], KILL, Some(100));
    let said = one_killed.retort(&["log", "latest", "--stage", "pairs"]);
    assert!(
        said.stdout.contains(" of 2: killed by SIGKILL"),
        "{}",
        said.stdout
    );
    check(one_killed, RunState::Failed, Some("killed by SIGKILL"));
    let lost = disturb(|_, runner| runner, KILL, None);
    check(lost, RunState::Lost, None);
    let stopped = disturb(|_, runner| runner, INTERRUPT, Some(130));
    check(stopped, RunState::Interrupted, Some("interrupted"));
}

#[test]
fn parts_end_at_the_deadline() {
    let lab = lab(MANY);
    lab.run(&["--set", "pairs.count=10000000", "--set", "pairs.timeout=2s"])
        .expect(100)
        .saying(&["it exceeded its timeout of 2s, and stopped at a checkpoint"]);
    let attempt = lab.attempt("pairs");
    assert_eq!(
        (attempt.state, attempt.reason.as_deref()),
        (AttemptState::Failed, Some("timeout"))
    );
}

#[test]
fn what_cannot_be_divided_is_said() {
    let lab = lab("
  pairs: {kind: trajectories, teacher: teacher, count: 601, workers: 2}
  student: {kind: distill, teacher: teacher, trajectories: pairs, timesteps: [0], workers: 2}
");
    lab.retort(&["validate", "r.yaml"]).expect(3).saying(&[
        "stage `student`: plugin `candle` cannot sum gradients over the workers of a `distill`",
        "workers: 2}",
        "`backend: libtorch`",
    ]);
    lab.retort(&["validate", "r.yaml", "--set", "student.workers=1"])
        .expect(0);
    let tokenizer = ["--set", "student.workers=1", "--set", "codes.workers=2"];
    lab.retort(&[&["validate", "r.yaml"], &tokenizer[..]].concat())
        .expect(3)
        .saying(&["plugin `candle` cannot sum gradients over the workers of a `tokenizer`"]);
    let classifier = "  eye: {kind: classifier, data: '${params.data}', workers: 2}\n";
    let recipe = lab.dir.path().join("r.yaml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    std::fs::write(&recipe, text + classifier).unwrap();
    lab.retort(&["validate", "r.yaml", "--set", "student.workers=1"])
        .expect(3)
        .saying(&[
            "stage `eye`: the work of a `classifier` cannot be divided among workers",
            "kinds that can be: `trajectories`",
        ]);
}
