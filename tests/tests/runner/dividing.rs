//! Stages shared by several workers: the same bytes, and the remains when something ends early.

use retort::executor::progress_file;
use retort::store::{AttemptState, RunState};
use retort_tests::port::HeldPort;
use retort_tests::process::ProcessStat;

use crate::lab::{Lab, Running, compile, signal_process, try_signal, wait_for, wait_until_gone};
use crate::training::{caught, lab, makes_shards, output, output_with, shards};

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

/// 2,400 prepared pictures, and samples that a classifier trained on them evaluates.
const PICTURES: &str = "
version: 1
seed: 3
backend: candle
stages:
  pictures: {kind: images, data: {folder: mix, size: 8}}
  codes:
    kind: tokenizer
    data: pictures
    codebook_size: 8
    codebook_dim: 4
    channels: 8
    z_channels: 8
    train: {steps: 4, batch: 8}
  teacher:
    kind: pretrain
    tokenizer: codes
    data: pictures
    width: 16
    depth: 1
    heads: 2
    train: {steps: 4, batch: 8}
  drawn: {kind: sample, count: 1300, sampler: {kind: teacher, teacher: teacher}}
  judged: {kind: evaluate, data: pictures, samples: {teacher: drawn}, tokenizers: {codes: codes}}
";

/// A recipe of them, beside the pictures.
pub fn pictures() -> Lab {
    let lab = Lab::new(&[]);
    let path = |name: &str| lab.dir.path().join(name);
    std::fs::write(path("r.yaml"), PICTURES).unwrap();
    crate::images::every_format(&path("mix"));
    for (class, file) in [("cats", "rgb.png"), ("dogs", "rgb.bmp")] {
        let class = path("mix").join(class);
        for copy in 0..1194 {
            let name = format!("{copy:04}-{file}");
            std::fs::hard_link(class.join(file), class.join(name)).unwrap();
        }
    }
    lab
}

#[test]
fn pictures_are_decoded_and_measured_by_several_workers() {
    let lab = pictures();
    lab.run(&[]).expect(0);
    let alone = ["pictures", "judged"].map(|stage| output(&lab, stage).0);

    let divided = ["--set", "pictures.workers=3", "--set", "judged.workers=3"];
    let outcomes = lab.outcomes(&divided);
    assert!(
        outcomes.contains(&"judged reused".to_owned()),
        "workers decide no result"
    );
    let force = ["--force=pictures", "--force=judged", "-v"];
    lab.run(&[&divided[..], &force].concat())
        .expect(0)
        .saying(&[
            "pictures: part 1 of 3: decoded 1000 image files",
            "pictures: part 2 of 3: decoded 1000 image files",
            "pictures: part 3 of 3: decoded 400 image files",
            // Thirteen files of features, of 512 images or fewer: five of pictures, three of samples, five of reconstructions.
            "judged: part 1 of 3: measured 2400 images",
            "judged: part 2 of 3: measured 1652 images",
            "judged: part 3 of 3: measured 2048 images",
        ]);
    let divided = ["pictures", "judged"].map(|stage| output(&lab, stage).0);
    assert_eq!(divided, alone);
    // One part has trained the classifier for all.
    let said = lab
        .retort(&["metrics", "latest", "--stage", "judged", "--json"])
        .expect(0)
        .json();
    let series = said.as_array().unwrap().iter();
    let names = series.map(|series| series["series"].as_str().unwrap());
    let losses: Vec<&str> = names.filter(|name| name.contains("/loss")).collect();
    assert_eq!(losses.len(), 1, "{losses:?}");
    assert!(losses[0].contains("/part-"), "{losses:?}");
    assert_eq!(lab.entries("work"), [""; 0], "nothing is left");
}

/// Ten steps of training together.
const TOGETHER: &str = "a: {kind: train, plugin: ranks, steps: 10}";

#[test]
fn processes_that_somebody_else_has_started_train_together() {
    let plugins = tempfile::tempdir().unwrap();
    compile("ranks.c", &[], &plugins.path().join("libretort_ranks.so"));
    let lab = Lab::new(&[TOGETHER]);
    let held = HeldPort::take();
    let port = held.number().to_string();
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
    let others = ["1", "2"].map(|rank| Running::new(process(rank, &[]).spawn().unwrap()));
    let first = process("0", &["-v"]).output().unwrap();
    let said = String::from_utf8_lossy(&first.stderr);
    assert!(first.status.success(), "{said}");
    assert!(said.contains("a: started (cpu, 3 workers of"), "{said}");
    for mut other in others {
        assert!(other.child.wait().unwrap().success());
    }
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Succeeded);
    // Only one process may open the history, which records how the run was made, so the others do not guess.
    for (rank, code) in [("0", 2), ("1", 2)] {
        let mut again = lab.command(&["resume", "--plugin-dir", plugins.path().to_str().unwrap()]);
        let place = [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "3")];
        let again = again
            .envs(place)
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", &port);
        let again = again.output().unwrap();
        let said = String::from_utf8_lossy(&again.stderr);
        assert_eq!(again.status.code(), Some(code), "{said}");
        assert!(said.contains("--executor torchrun"), "{said}");
        assert!(said.contains(&format!("process {rank} of 3")), "{said}");
    }
    // Invalid values are refused.
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

/// A lab with the plugin `ranks` and one training, which does not end before it is released.
struct Training {
    lab: Lab,
    workers: usize,
    plugins: tempfile::TempDir,
}

impl Training {
    /// With this many workers and these options.
    fn new(workers: usize, options: &str) -> Self {
        let plugins = tempfile::tempdir().unwrap();
        compile("ranks.c", &[], &plugins.path().join("libretort_ranks.so"));
        let stage = format!(
            "a: {{kind: train, plugin: ranks, workers: {workers}, flag: released, {options}}}"
        );
        Self {
            lab: Lab::new(&[&stage]),
            workers,
            plugins,
        }
    }

    fn own(&self) -> [&str; 2] {
        ["--plugin-dir", self.plugins.path().to_str().unwrap()]
    }

    /// Starts it, and lets it take its first steps.
    fn start(&self, more: &[&str]) -> Running {
        let running = self.lab.start(&[&self.own()[..], more].concat());
        wait_for("ranks that have met", || {
            let work = self.lab.entries("work").into_iter();
            let files = work.flat_map(|work| self.lab.entries(&format!("work/{work}")));
            let met = files.filter(|file| file.starts_with("met-"));
            (met.count() == self.workers).then_some(())
        });
        // From their first step. The first rank saves this checkpoint when another is lost.
        wait_for("a step", || {
            let run = self.lab.latest()?.summary.id;
            let staging = self.lab.store_dir().join("staging").join(run.0);
            progress_file::read(&staging)
                .contains_key("a")
                .then_some(())
        });
        running
    }

    /// How each attempt ended, and the seconds that it took.
    fn attempts(&self) -> Vec<(String, f64)> {
        let sql = "select reason, seconds from v_attempts order by attempt";
        let rows = self.lab.retort(&["query", "--json", sql]).expect(0).json();
        let rows = rows.as_array().unwrap().iter();
        let row = |row: &serde_json::Value| {
            let reason = row["reason"].as_str().unwrap().to_owned();
            (reason, row["seconds"].as_f64().unwrap())
        };
        rows.map(row).collect()
    }

    fn reasons(&self) -> Vec<String> {
        let attempts = self.attempts().into_iter();
        attempts.map(|(reason, _)| reason).collect()
    }

    fn resume(&self) {
        self.lab.release();
        let resume = self.lab.retort(&[&["resume"], &self.own()[..]].concat());
        resume.expect(0);
    }
}

/// The processes of this many ranks, once they have started.
fn ranks(running: &Running, of: usize) -> Vec<u32> {
    wait_for("so many ranks", || {
        let found = rank_processes(running.child.id(), of);
        (found.len() == of).then_some(found)
    })
}

#[test]
fn a_training_goes_on_with_fewer_workers_while_there_are_enough() {
    let training = Training::new(3, "steps: 10, min_workers: 2");
    let running = training.start(&[]);
    signal_process(ranks(&running, 3)[1], KILL);
    signal_process(ranks(&running, 2)[1], KILL);
    running
        .end()
        .expect(100)
        .saying(&["it goes on from its last checkpoint with 2 of 3 workers"]);
    assert_eq!(
        training.reasons(),
        ["lost a worker: killed by SIGKILL", "killed by SIGKILL"]
    );
    training.resume();
}

#[test]
fn a_training_that_loses_a_worker_restarts_as_often_as_allowed() {
    let training = Training::new(2, "steps: 10, retries: 1");
    let running = training.start(&[]);
    let first = ranks(&running, 2);
    signal_process(first[1], KILL);
    let second = wait_for("the next ranks", || {
        let found = ranks(&running, 2);
        (!found.contains(&first[0]) && !found.contains(&first[1])).then_some(found)
    });
    signal_process(second[0], KILL);
    running
        .end()
        .expect(100)
        .saying(&["it goes on from its last checkpoint with all 2 workers"]);
    assert_eq!(
        training.reasons(),
        ["lost a worker: killed by SIGKILL", "killed by SIGKILL"]
    );
    training.resume();
    // Without the option the first loss ends it.
    let training = Training::new(2, "steps: 10");
    let running = training.start(&[]);
    signal_process(ranks(&running, 2)[1], KILL);
    running.end().expect(100);
    assert_eq!(training.reasons(), ["killed by SIGKILL"]);
}

/// At the common limit. Ranks that wait for the hanging one send nothing but heartbeats, and survive.
#[test]
fn a_rank_that_is_stopped_ends_the_attempt_under_its_own_reason() {
    let training = Training::new(3, "steps: 10, retries: 1");
    let mut running = training.start(&[]);
    signal_process(ranks(&running, 3)[1], libc::SIGSTOP);
    running.wait_for_words("it goes on from its last checkpoint");
    training.lab.release();
    running.end().expect(0).saying(&[
        "worker 2 of 3 gave no sign of life for 30 seconds, and was ended; it goes on from its last checkpoint with all 3 \
         workers",
    ]);
    let attempts = training.attempts();
    assert_eq!(
        training.reasons(),
        ["lost a worker: rank 1 hangs", "succeeded"]
    );
    let seconds = attempts[0].1;
    assert!(seconds > 25.0, "{seconds} s");
}

/// A live rank that does not join is detected when the others have waited for the time limit.
#[test]
fn a_rank_that_does_not_come_is_named() {
    let training = Training::new(3, "steps: 10, deaf: 2, patience: 10");
    training.start(&["--grace", "10s"]).end().expect(100).saying(&[
        "worker 3 of 3 neither took part in an exchange that the others waited for, nor stopped when asked, and was ended",
    ]);
    assert_eq!(training.reasons(), ["rank 2 hangs"]);
}

/// The processes of a runner's workers among this many ranks, by rank.
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

/// The worker processes of a runner, except this one.
fn workers_beside(whole: u32, runner: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter(|pid| {
            *pid != whole && ProcessStat::of(*pid).is_some_and(|stat| stat.parent == runner)
        })
        .collect()
}

/// Starts the stage, disturbs its parts or the runner when some shards exist, and waits for the end of all processes.
fn disturb(whom: fn(&[u32], u32) -> u32, signal: i32, code: Option<i32>) -> Lab {
    caught(|| {
        let lab = lab(MANY);
        let running = lab.start(&[]);
        let whole = lab.wait_for_worker("pairs");
        let parts = workers_beside(whole, running.child.id());
        let there = parts.len() == 2
            && makes_shards(&lab, 4)
            && try_signal(whom(&parts, running.child.id()), signal);
        let ended = running.end().code;
        for pid in parts.into_iter().chain([whole]) {
            wait_until_gone(pid);
        }
        if !there || ended == Some(0) || !(1..80).contains(&shards(&lab).len()) {
            return None;
        }
        assert_eq!(ended, code);
        Some(lab)
    })
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
            "kinds that can be: `images`, `trajectories`",
        ]);
}
