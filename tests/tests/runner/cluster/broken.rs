//! Faults between a runner and Slurm: unanswered queries, damaged spools. Slurm's programs are scripts here, and the test
//! writes the jobs' spools.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use retort::cluster::spool::{self, SpoolEvent, Writer};

use retort_tests::program::script;

use crate::lab::{CommandOutput, Lab, Running, wait_for};

const INTERRUPT: i32 = 2;
const KILL: i32 = 9;

/// A lab with scripts as Slurm's programs.
struct Fake {
    lab: Lab,
}

impl Fake {
    fn new() -> Self {
        let lab = Lab::new(&["a: {kind: do}"]);
        fs::create_dir(lab.dir.path().join("bin")).unwrap();
        let fake = Self { lab };
        let scripts = [
            (
                "sbatch",
                "printf '%s\\n' \"$@\" > args; mv args submitted; while [ -e slow ]; do sleep 0.1; done; echo 1",
            ),
            (
                "squeue",
                "[ -e silent ] && { echo 'Unable to contact slurm controller' >&2; exit 1; }
                 case \"$*\" in *--name=*) echo 1;; *) cat queue;; esac",
            ),
            (
                "sacct",
                "echo 'Slurm accounting storage is disabled' >&2; exit 1",
            ),
            ("scancel", "echo \"$@\" >> cancelled"),
            ("scontrol", "echo 'MaxArraySize = 1001'"),
        ];
        for (name, text) in scripts {
            fake.program(name, text);
        }
        fake.queue("1|N/A|RUNNING|None|node1\n");
        fake
    }

    fn program(&self, name: &str, text: &str) {
        let cd = self.lab.dir.path().display();
        let text = format!("#!/bin/sh\ncd '{cd}'\n{text}\n");
        script(&self.path("bin").join(name), &text);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.lab.dir.path().join(name)
    }

    fn queue(&self, text: &str) {
        fs::write(self.path("queue"), text).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.command(arguments);
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", self.path("bin").display()));
        command
    }

    fn start(&self, arguments: &[&str]) -> Running {
        let settings = ["--executor", "slurm", "--slurm", "poll=200ms"];
        let mut command = self.command(&[arguments, &settings].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::new(command.spawn().unwrap())
    }

    /// The spool of the job, once it is submitted.
    fn spool(&self) -> PathBuf {
        let arguments = wait_for("a job", || fs::read_to_string(self.path("submitted")).ok());
        let value = arguments
            .lines()
            .find_map(|line| line.strip_prefix("--chdir="));
        PathBuf::from(value.unwrap())
    }
}

/// The first start of the job's only element, already begun.
fn begin(spool: &std::path::Path) -> (PathBuf, Writer) {
    let dir = spool::element_dir(spool, 0);
    let mut writer = Writer::open(&dir).unwrap();
    writer.push(SpoolEvent::Began {
        job: "1".into(),
        node: "node1".into(),
        pid: 1,
    });
    writer.flush().unwrap();
    (dir, writer)
}

fn check_is_cancelled(fake: &Fake, said: CommandOutput, words: &[&str]) {
    said.expect(100).saying(&["spool damaged"]).saying(words);
    let cancelled = fs::read_to_string(fake.path("cancelled")).unwrap();
    assert!(
        cancelled.split_whitespace().any(|word| word == "1"),
        "{cancelled}"
    );
}

#[test]
fn the_job_of_a_damaged_spool_is_cancelled() {
    // A changed byte in a sealed piece.
    let fake = Fake::new();
    let running = fake.start(&["run", "r.yaml"]);
    let (dir, _writer) = begin(&fake.spool());
    let whole = fs::read(dir.join("0.0.open")).unwrap();
    let mut second = whole.clone();
    second[12] ^= 1;
    fs::write(dir.join("spoilt"), [whole, second].concat()).unwrap();
    fs::rename(dir.join("spoilt"), dir.join("0.0.sealed")).unwrap();
    check_is_cancelled(&fake, running.end(), &["0.0.sealed is damaged"]);

    // Its end is missing permanently.
    let fake = Fake::new();
    let running = fake.start(&["run", "r.yaml"]);
    let (dir, _writer) = begin(&fake.spool());
    let bytes = fs::read(dir.join("0.0.open")).unwrap();
    fs::write(dir.join("torn"), [&bytes[..], &bytes[..20]].concat()).unwrap();
    fs::rename(dir.join("torn"), dir.join("0.0.sealed")).unwrap();
    check_is_cancelled(&fake, running.end(), &["its last record is cut off"]);

    // Somebody has put a link in its place.
    let fake = Fake::new();
    let running = fake.start(&["run", "r.yaml"]);
    let (dir, _writer) = begin(&fake.spool());
    fs::write(fake.path("mine"), "mine").unwrap();
    fs::remove_file(dir.join("0.0.open")).unwrap();
    std::os::unix::fs::symlink(fake.path("mine"), dir.join("0.0.open")).unwrap();
    check_is_cancelled(
        &fake,
        running.end(),
        &["a symbolic link, not a regular file"],
    );
}

#[test]
fn a_spool_outlasts_a_slurm_that_does_not_answer() {
    let fake = Fake::new();
    // Slurm has accepted the job, and the runner dies before it knows the id.
    fs::write(fake.path("slow"), "").unwrap();
    let running = fake.start(&["run", "r.yaml"]);
    let spool = fake.spool();
    running.signal(KILL);
    running.end();
    fs::remove_file(fake.path("slow")).unwrap();
    // Slurm knows the job by its name.
    let state = || {
        let mut show = fake.command(&["runs", "show", "--json"]);
        let said = show.output().unwrap();
        let shown: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        shown["state"].clone()
    };
    assert_eq!(state(), "running");
    let (dir, _writer) = begin(&spool);
    fs::write(fake.path("silent"), "").unwrap();
    assert_eq!(state(), "running");
    let mut resumed = fake.start(&["resume"]);
    // It retries for half a minute; an answer within that time would suffice.
    resumed.wait_for_words("the state of this spool's job cannot be determined at the moment");
    let said = resumed.end();
    assert_ne!(said.code, Some(0), "{}", said.stderr);
    assert!(dir.join("0.0.open").exists(), "nothing of it is removed");
    assert!(!fake.path("cancelled").exists());
    // Slurm answers again: the job is taken over unchanged.
    fs::remove_file(fake.path("silent")).unwrap();
    fs::remove_file(fake.path("submitted")).unwrap();
    let mut resumed = fake.start(&["resume", "-v"]);
    resumed.wait_for_words("taken up");
    resumed.signal(KILL);
    resumed.end();
    assert!(
        !fake.path("submitted").exists(),
        "nothing is submitted again"
    );
}

#[test]
fn what_slurm_did_not_hear_is_cancelled_again() {
    let deaf = "echo >> tries; [ $(wc -l < tries) -gt 2 ] || {
             echo 'scancel: error: Unable to contact slurm controller' >&2; exit 1
         }
         echo \"$@\" >> cancelled
         case \"$*\" in *PENDING*) ;; *) echo '1|N/A|CANCELLED|None|node1' > queue;; esac";
    // The user ends the run.
    let fake = Fake::new();
    fake.program("scancel", deaf);
    let mut running = fake.start(&["run", "r.yaml", "-v"]);
    running.wait_for_words("submitted as job");
    running.signal(INTERRUPT);
    wait_for("a cancellation", || {
        fake.path("tries").exists().then_some(())
    });
    running.signal(INTERRUPT);
    running
        .end()
        .expect(130)
        .saying(&["Unable to contact", "trying again"]);
    let cancelled = fs::read_to_string(fake.path("cancelled")).unwrap();
    assert!(
        cancelled.lines().any(|line| line == "--quiet 1"),
        "{cancelled}"
    );

    // The job must not run beside its successor.
    let fake = Fake::new();
    fake.program("scancel", deaf);
    let running = fake.start(&["run", "r.yaml"]);
    let (dir, _writer) = begin(&fake.spool());
    let bytes = fs::read(dir.join("0.0.open")).unwrap();
    fs::write(dir.join("torn"), [&bytes[..], &bytes[..20]].concat()).unwrap();
    fs::rename(dir.join("torn"), dir.join("0.0.sealed")).unwrap();
    check_is_cancelled(&fake, running.end(), &["its last record is cut off"]);
}

#[test]
fn a_job_that_slurm_holds_after_a_failed_launch_is_released() {
    let fake = Fake::new();
    fake.program(
        "scontrol",
        "echo \"$@\" >> requests; echo 'MaxArraySize = 1001'",
    );
    fake.queue("1|N/A|PENDING|launch failed requeued held|\n");
    let said = fake.start(&["run", "r.yaml", "--slurm", "requeue=2"]).end();
    said.expect(100)
        .saying(&["launch failed", "Slurm could not launch job 1"]);
    let requests = fs::read_to_string(fake.path("requests")).unwrap();
    let released = requests.lines().filter(|line| *line == "release 1");
    assert_eq!(released.count(), 2, "{requests}");
    let cancelled = fs::read_to_string(fake.path("cancelled")).unwrap();
    assert!(
        cancelled.lines().any(|line| line == "--quiet 1"),
        "{cancelled}"
    );
}
