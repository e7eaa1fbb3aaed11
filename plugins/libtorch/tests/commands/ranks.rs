//! Trainings with several workers, through the real binary: two and four workers train like one, and the failure of one ends
//! the attempt of all.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use retort_tests::digits::Digits;
use retort_tests::port::HeldPort;
use serde_json::Value;

use crate::lab::wait_for;

/// Batches of 30: four workers have shares of 7 and 8.
const TEACHER: Digits<'_> = Digits {
    backend: "libtorch",
    top: "seed: 4\ndevice: cpu\nthreads: 1",
    codes: "codebook_ema: 0.95, accumulate: 2, train: {steps: 60, batch: 30, ema: 0.95}",
    teacher: "width: 32, depth: 2, heads: 2, token_noise: 0.1, train: {steps: 80, batch: 30, warmup: 10, ema: 0.95}",
};

/// Their pairs, and a student.
const STUDENT: &str = "
  pairs: {kind: trajectories, teacher: teacher, count: 400}
  student:
    kind: distill
    teacher: teacher
    trajectories: pairs
    timesteps: [0, 6]
    held_out: 0.2
    accumulate: 2
    train: {steps: 80, batch: 30, warmup: 10, ema: 0.95, muon: {learning_rate: 0.02}}
";

/// A training that is disturbed.
const LONG: [&str; 3] = [
    "stages.student.train.steps=400",
    "stages.student.train.checkpoint_seconds=1",
    "stages.student.workers=2",
];

struct Lab(tempfile::TempDir);

impl Lab {
    /// A directory with the recipe and its store, in which one process has trained everything. Each test has a copy.
    fn new() -> Self {
        static TRAINED: OnceLock<PathBuf> = OnceLock::new();
        let trained = TRAINED.get_or_init(|| {
            let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
            let kept = place.join("trained");
            let _ = std::fs::remove_dir_all(&kept);
            let lab = Self(tempfile::tempdir_in(place).expect("a directory"));
            std::fs::write(lab.0.path().join("r.yaml"), TEACHER.recipe(STUDENT)).expect("a recipe");
            lab.retort(&["run", "r.yaml"]);
            std::fs::rename(lab.0.path(), &kept).expect("it is kept");
            kept
        });
        let dir = tempfile::tempdir().expect("a directory");
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(trained.join(".")).arg(dir.path());
        assert!(copy.status().expect("cp").success());
        Self(dir)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.completed(Command::new(crate::binary()), arguments)
    }

    /// A command that begins with the binary, with its other arguments.
    fn completed(&self, mut command: Command, arguments: &[&str]) -> Command {
        command
            .args(arguments)
            .arg("--store")
            .arg(self.0.path().join("store"))
            .current_dir(self.0.path())
            .env_remove("RETORT_PLUGIN_PATH")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// What a command prints as JSON.
    fn retort(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments).arg("--json").output();
        let output = output.expect("the binary runs");
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn points(&self, stage: &str, series: &str) -> Vec<f64> {
        let found = self.retort(&["metrics", "latest", series, "--stage", stage]);
        let found = found.as_array().expect("points").iter();
        found
            .map(|p| p["value"].as_f64().expect("a number"))
            .collect()
    }

    /// The content hash of a stage's output.
    fn hash(&self, stage: &str) -> String {
        let shown = self.retort(&["artifacts", "list", "latest"]);
        let rows = shown.as_array().expect("artifacts");
        let row = rows.iter().find(|row| row["stage"] == stage);
        row.expect("an artifact")["hash"]
            .as_str()
            .expect("a hash")
            .to_owned()
    }

    /// The reason of the last attempt at the student.
    fn reason(&self) -> String {
        let sql = "select reason from v_attempts order by attempt desc limit 1";
        let rows = self.retort(&["query", sql]);
        rows[0]["reason"].as_str().unwrap_or_default().to_owned()
    }

    /// A training of two workers that is long enough to be disturbed.
    fn long(&self) -> Command {
        let mut command = self.command(&["run", "r.yaml", "--grace", "2s"]);
        for setting in LONG {
            command.args(["--set", setting]);
        }
        command
    }

    /// Starts it, and waits for its first checkpoint; returns the process of a rank too.
    fn start(&self, rank: usize) -> (Child, i32) {
        let child = self.long().spawn().expect("the binary runs");
        self.wait_for_checkpoint();
        let pid = self.rank(&child, rank, 2);
        (child, pid)
    }

    fn wait_for_checkpoint(&self) {
        let work = self.0.path().join("store/work");
        wait_for("a checkpoint", || {
            let dirs = std::fs::read_dir(&work).ok()?.flatten();
            let mut files = dirs.map(|dir| dir.path().join("distill.checkpoint.safetensors"));
            files.any(|file| file.exists()).then_some(())
        });
    }

    /// The process of a rank among so many.
    fn rank(&self, child: &Child, rank: usize, of: usize) -> i32 {
        let wanted = [format!("RANK={rank}"), format!("WORLD_SIZE={of}")];
        wait_for("the rank", || {
            let of = format!("/proc/{0}/task/{0}/children", child.id());
            let children = std::fs::read_to_string(of).ok()?;
            children.split_whitespace().find_map(|pid| {
                let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
                let variables: Vec<&[u8]> = environment.split(|&byte| byte == 0).collect();
                let found = wanted
                    .iter()
                    .all(|wanted| variables.contains(&wanted.as_bytes()));
                found.then(|| pid.parse().ok())?
            })
        })
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn signal(pid: i32, name: &str) {
    let done = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(done.expect("kill").success());
}

/// A sharded optimiser gives the same bits.
#[test]
fn shards_of_the_optimiser_change_nothing() {
    let lab = Lab::new();
    for (stage, workers) in [("codes", 2), ("student", 4)] {
        let force = format!("--force={stage}");
        let workers = format!("stages.{stage}.workers={workers}");
        let zero = format!("stages.{stage}.train.zero_stage=1");
        let plain = ["run", "r.yaml", "--until", stage, &force, "--set", &workers];
        let sharded = [&plain[..], &["--set", &zero]].concat();
        let [plain, sharded] = [&plain[..], &sharded].map(|words| {
            lab.retort(words);
            lab.hash(stage)
        });
        assert_eq!(plain, sharded, "{stage}, {workers}");
    }
}

/// Processes started by somebody else find their ranks in the variables of `torchrun`.
#[test]
fn processes_of_torchrun_are_ranks() {
    let lab = Lab::new();
    let student = ["run", "r.yaml", "--until", "student", "--force=student"];
    lab.retort(&[&student[..], &["--set", "stages.student.workers=2"]].concat());
    let hash = lab.hash("student");
    let held = HeldPort::take();
    let port = held.number().to_string();
    let by_hand = |rank: &str, more: &[&str]| {
        let mut command = lab.command(&student);
        command.args(["--executor", "torchrun"]).args(more);
        let place = [("WORLD_SIZE", "2"), ("RANK", rank), ("LOCAL_RANK", rank)];
        command
            .envs(place)
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", &port);
        command
    };
    match python_with_torch() {
        Some(python) => {
            // Its agent listens at the ranks' address, and the ranks meet in its store.
            let mut agent = Command::new(python);
            agent.args(["-m", "torch.distributed.run", "--standalone"]);
            agent.args(["--local-addr", "127.0.0.1", "--nproc-per-node", "2"]);
            agent.arg("--no-python").arg(crate::binary());
            let mut agent = lab.completed(agent, &student);
            agent.args(["--executor", "torchrun"]);
            let ended = agent.output().expect("Python runs");
            assert!(ended.status.success(), "{}", said(&ended));
        }
        None => {
            println!("no Python here imports torch: two ranks are started without torchrun");
            let second = by_hand("1", &[]).spawn().expect("the binary runs");
            let first = by_hand("0", &[]).output().expect("the binary runs");
            assert!(first.status.success(), "{}", said(&first));
            let second = second.wait_with_output().expect("it ends");
            assert!(second.status.success(), "{}", said(&second));
        }
    }
    assert_eq!(lab.hash("student"), hash, "as two workers of one runner");
    // Both refuse impossible settings.
    let other = by_hand("0", &["--set", "stages.student.workers=3"])
        .output()
        .expect("it runs");
    assert_eq!(other.status.code(), Some(2), "{}", said(&other));
    assert!(
        said(&other).contains("has 3 workers, and 2 processes were started"),
        "{}",
        said(&other)
    );
    let alone = by_hand("1", &[])
        .env_remove("MASTER_PORT")
        .output()
        .expect("it runs");
    assert!(
        said(&alone).contains("MASTER_PORT is not set"),
        "{}",
        said(&alone)
    );
}

/// A Python with PyTorch and so with `torchrun`: that of libtorch's own environment, or the one in use. Without `CUDA=1`,
/// `make libtorch` installs only what the plugin needs of it, which Python does not import.
fn python_with_torch() -> Option<PathBuf> {
    let libtorch = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.libtorch");
    // It links to lib/python3.*/site-packages/torch.
    let found = libtorch.canonicalize().ok();
    let own = found.and_then(|torch| Some(torch.ancestors().nth(4)?.join("bin/python")));
    own.into_iter()
        .chain([PathBuf::from("python3")])
        .find(|python| {
            let mut import = Command::new(python);
            import.args(["-c", "import torch.distributed.run"]);
            import.stdout(Stdio::null()).stderr(Stdio::null());
            import.status().is_ok_and(|status| status.success())
        })
}

/// Workers die each time: the training continues with fewer while there are enough; the history says why.
#[test]
fn training_continues_with_fewer_workers() {
    let lab = Lab::new();
    let mut command = lab.command(&["run", "r.yaml", "--grace", "2s"]);
    for setting in [
        "train.steps=400",
        "train.checkpoint_seconds=1",
        "workers=3",
        "min_workers=2",
        "seed=99",
    ] {
        command.args(["--set", &format!("stages.student.{setting}")]);
    }
    let child = command.spawn().expect("the binary runs");
    lab.wait_for_checkpoint();
    signal(lab.rank(&child, 2, 3), "-KILL");
    // The next attempt has two.
    signal(lab.rank(&child, 1, 2), "-KILL");
    let output = child.wait_with_output().expect("it ends");
    assert!(!output.status.success(), "{}", said(&output));
    let sql = "select reason, message from v_attempts where stage = 'student' order by attempt desc limit 2";
    let rows = lab.retort(&["query", sql]);
    let text = |row: usize, key: &str| rows[row][key].as_str().unwrap_or_default().to_owned();
    assert_eq!(
        text(1, "reason"),
        "lost a worker: killed by SIGKILL",
        "{rows}"
    );
    assert!(text(1, "message").contains("with 2 of 3 workers"), "{rows}");
    assert_eq!(
        text(0, "reason"),
        "killed by SIGKILL",
        "fewer may not be: {rows}"
    );
    assert!(
        said(&output).contains("with 2 of 3 workers"),
        "{}",
        said(&output)
    );
    let resumed = lab.command(&["resume", "-v"]).output().expect("it runs");
    assert!(resumed.status.success(), "{}", said(&resumed));
    assert!(
        said(&resumed).contains("part 1 of 3: distill: continuing from step"),
        "{}",
        said(&resumed)
    );
}

#[test]
fn n_workers_train_a_tokenizer_as_one_does() {
    train_alike("codes", "tokenizer", "held_out_error");
}

#[test]
fn n_workers_train_a_teacher_as_one_does() {
    train_alike("teacher", "pretrain", "held_out_loss");
}

#[test]
fn n_workers_train_a_student_as_one_does() {
    train_alike("student", "distill", "held_out_loss");
}

/// Two and four workers have the curves of one: the training loss and the held-out figure.
fn train_alike(stage: &str, name: &str, held: &str) {
    let lab = Lab::new();
    let [loss, held] = ["loss", held].map(|figure| format!("{name}/{figure}"));
    let (one, held_of_one) = (lab.points(stage, &loss), lab.points(stage, &held));
    assert!(one.last().unwrap() < &(0.9 * one[0]), "it learns: {one:?}");
    let hash_alone = lab.hash(stage);
    for workers in [2, 4] {
        let force = format!("--force={stage}");
        let setting = format!("stages.{stage}.workers={workers}");
        let run = ["run", "r.yaml", "--until", stage, &force, "--set", &setting];
        lab.retort(&run);
        let (many, held_of_many) = (lab.points(stage, &loss), lab.points(stage, &held));
        let (first, all) = (apart(&one[..1], &many[..1]), apart(&one, &many));
        let held = apart(&held_of_one, &held_of_many);
        println!(
            "{stage}, {workers} workers: loss {:.6} .. {:.6}, of one {:.6} .. {:.6}; apart {first:.1e} at first, {all:.1e} at \
             most; held out {:.6}, of one {:.6}, apart {held:.1e} at most",
            many[0],
            many.last().unwrap(),
            one[0],
            one.last().unwrap(),
            held_of_many.last().unwrap(),
            held_of_one.last().unwrap(),
        );
        assert!(first < 1e-5 && all < 5e-3 && held < 5e-3);
        let hash = lab.hash(stage);
        assert_ne!(
            hash, hash_alone,
            "sums are rounded in another order: it was no single process"
        );
        lab.retort(&run);
        assert_eq!(lab.hash(stage), hash, "the same workers give the same bits");
    }
}

/// The largest relative distance between two curves.
fn apart(one: &[f64], many: &[f64]) -> f64 {
    assert_eq!(one.len(), many.len());
    let apart = one.iter().zip(many).map(|(a, b)| (b / a - 1.0).abs());
    apart.fold(0.0, f64::max)
}

#[test]
fn a_worker_that_dies_ends_the_attempt() {
    disturb("-KILL", 1);
}

#[test]
fn a_first_worker_that_dies_ends_the_attempt() {
    disturb("-KILL", 0);
}

#[test]
fn a_worker_that_hangs_ends_the_attempt() {
    disturb("-STOP", 1);
}

#[test]
fn a_runner_that_is_ended_ends_its_workers() {
    disturb("-TERM", 0);
}

/// A signal to a rank, or to the runner, ends a training. It continues, and its result is as if nothing had happened.
fn disturb(what: &str, rank: usize) {
    let lab = Lab::new();
    let (child, pid) = lab.start(rank);
    let runner = i32::try_from(child.id()).expect("a process id");
    signal(if what == "-TERM" { runner } else { pid }, what);
    let began = Instant::now();
    let output = child.wait_with_output().expect("it ends");
    let (took, reason) = (began.elapsed(), lab.reason());
    println!(
        "{what} of rank {rank}: {reason}, after {:.1} s",
        took.as_secs_f64()
    );
    assert!(!output.status.success(), "{}", said(&output));
    // One that is stopped is known by its silence, for 30 seconds; by themselves the others would wait a little longer.
    assert!(took < Duration::from_secs(240), "{took:?}");
    match what {
        "-KILL" => assert!(reason.contains("SIGKILL"), "{reason}: {}", said(&output)),
        "-TERM" => assert_eq!(reason, "interrupted", "{}", said(&output)),
        _ => assert_eq!(reason, "rank 1 hangs", "{}", said(&output)),
    }
    let resumed = lab.command(&["resume", "-v"]).output().expect("it runs");
    assert!(resumed.status.success(), "{}", said(&resumed));
    let text = said(&resumed);
    assert!(
        text.contains("part 1 of 2: distill: continuing from step"),
        "{text}"
    );
    assert_eq!(
        lab.hash("student"),
        undisturbed(),
        "{what}: as if nothing had happened"
    );
}

/// The content hash of the student whose training nothing disturbs.
fn undisturbed() -> &'static str {
    static HASH: OnceLock<String> = OnceLock::new();
    HASH.get_or_init(|| {
        let lab = Lab::new();
        let output = lab.long().output().expect("it runs");
        assert!(output.status.success(), "{}", said(&output));
        lab.hash("student")
    })
}
