//! Jobs that Slurm's controller has forgotten: their end is in its accounts or their spools. Its programs are scripts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::SystemTime;

use retort::cluster::spool::{self, SpoolEvent, StartEnd, Writer};
use retort::frame::{FromWorker, Points};
use retort::store::LogSource;

use super::imagined::programs;
use retort_tests::program::script;

use crate::lab::{CommandOutput, Lab, Running, wait_for};

/// A cluster whose programs print files: `queue` and `accounts`.
struct Forgetful {
    lab: Lab,
}

impl Forgetful {
    fn new() -> Self {
        Self::of("a: {kind: do}")
    }

    fn of(stage: &str) -> Self {
        let lab = Lab::new(&[stage]);
        programs(lab.dir.path());
        Self { lab }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.lab.dir.path().join(name)
    }

    fn program(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        script(&path, &format!("#!/bin/sh\n{text}\n"));
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.lab.command(arguments);
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("SIM", self.lab.dir.path());
        command
    }

    fn start(&self, arguments: &[&str]) -> Running {
        let mut command = self.command(arguments);
        let started = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::new(started.spawn().unwrap())
    }

    fn retort(&self, arguments: &[&str]) -> CommandOutput {
        self.start(arguments).end()
    }

    fn start_run(&self) -> Running {
        let slurm = ["--slurm", "poll=1s", "--slurm", "requeue=2"];
        let settings = [&["--executor", "slurm", "-v"], &slurm[..]].concat();
        self.start(&[&["run", "r.yaml"], &settings[..]].concat())
    }

    /// The spool of the job with this number, once it is submitted.
    fn spool(&self, job: usize) -> PathBuf {
        let arguments = self.path(&format!("jobs/{job}/args"));
        let arguments = wait_for("a job", || fs::read_to_string(&arguments).ok());
        let spool = arguments
            .lines()
            .find_map(|line| line.strip_prefix("--chdir="));
        PathBuf::from(spool.unwrap())
    }
}

/// Begins the next start of the only element of a job.
fn begin(spool: &Path) -> Writer {
    let mut writer = Writer::open(&spool::element_dir(spool, 0)).unwrap();
    writer.push(SpoolEvent::Began {
        job: "1".into(),
        node: "n1".into(),
        pid: 1,
    });
    writer.flush().unwrap();
    writer
}

/// Plays the node of a job that succeeds.
fn work(spool: &Path) {
    let done = start_job(spool);
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
}

/// Plays the node of a job.
fn start_job(spool: &Path) -> Output {
    Command::new("bash")
        .arg(spool.join("batch.sh"))
        .envs([
            ("SLURM_JOB_ID", "1"),
            ("SLURM_PROCID", "0"),
            ("SLURMD_NODENAME", "n1"),
        ])
        .output()
        .unwrap()
}

#[test]
fn a_result_of_a_job_that_slurm_has_forgotten_is_taken_up() {
    let cluster = Forgetful::new();
    // Slurm has accepted the job, and the runner never learns its id.
    cluster.program(
        "sbatch",
        "mkdir \"$SIM/jobs/1\" || exit 1
         printf '%s\\n' \"$@\" > \"$SIM/jobs/1/draft\"; mv \"$SIM/jobs/1/draft\" \"$SIM/jobs/1/args\"
         while [ -e \"$SIM/jobs\" ] && ! [ -e \"$SIM/go-on\" ]; do sleep 0.1; done",
    );
    let running = cluster.start_run();
    let spool = cluster.spool(1);
    running.signal(9);
    running.end();
    fs::write(cluster.path("go-on"), "").unwrap();
    work(&spool);
    cluster.retort(&["resume"]).expect(0).saying(&["taken up"]);
    let jobs = "select count(*) as n, max(job) as job from v_jobs";
    let jobs = cluster.retort(&["query", "--json", jobs]).expect(0).json();
    assert_eq!((&jobs[0]["n"], &jobs[0]["job"]), (&1.into(), &1.into()));
}

#[test]
fn why_a_job_ended_is_asked_of_the_accounts_as_well() {
    let cluster = Forgetful::new();
    cluster.program("sacct", "cat \"$SIM/accounts\"");
    fs::write(cluster.path("accounts"), "1|OUT_OF_MEMORY|n1\n").unwrap();
    fs::write(cluster.path("queue"), "1|N/A|RUNNING|None|n1\n").unwrap();
    let mut running = cluster.start_run();
    let spool = cluster.spool(1);
    running.wait_for_words("submitted as job");
    let _writer = begin(&spool);
    let starts = "select reason, node from v_job_lives where job = 1";
    let starts = || {
        cluster
            .retort(&["query", "--json", starts])
            .expect(0)
            .json()
    };
    wait_for("a start in the history", || {
        (starts()[0]["node"] == "n1").then_some(())
    });
    running.signal(9);
    running.end();
    let state = || {
        let shown = cluster.retort(&["runs", "show", "--json"]).expect(0).json();
        (shown["state"].clone(), shown["error"].clone())
    };
    assert_eq!(state().0, "running");
    // The controller forgets it.
    fs::write(cluster.path("queue"), "").unwrap();
    let (state, error) = state();
    assert_eq!(state, "lost");
    let error = error.as_str().unwrap();
    assert!(
        error.contains("have ended (out of memory in Slurm)"),
        "{error}"
    );
    let running = cluster.start(&["resume"]);
    wait_for("the end of the job's start", || {
        let reason = starts()[0]["reason"].as_str()?.to_owned();
        assert_eq!(reason, "out of memory in Slurm");
        Some(())
    });
    running.signal(9);
    running.end();
}

/// How jobs' starts have ended so far, in order.
fn reasons(cluster: &Forgetful) -> Vec<String> {
    let starts = "select reason from v_job_lives order by job, life";
    let rows = cluster
        .retort(&["query", "--json", starts])
        .expect(0)
        .json();
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| row["reason"].as_str().unwrap_or("none").to_owned())
        .collect()
}

#[test]
fn why_a_job_was_started_again_the_accounts_know() {
    let cluster = Forgetful::new();
    cluster.program(
        "sacct",
        "[ \"$SLURM_TIME_FORMAT\" = %s ] || exit 1
         case \"$*\" in *--duplicates*) cat \"$SIM/accounts\";; esac",
    );
    fs::write(cluster.path("queue"), "1|N/A|RUNNING|None|n1\n").unwrap();
    let mut running = cluster.start_run();
    let spool = cluster.spool(1);
    running.wait_for_words("submitted as job");
    let _writer = begin(&spool);
    wait_for("a start in the history", || {
        (reasons(&cluster) == ["none"]).then_some(())
    });
    // Three starts: the first was before this start, and the last has not ended.
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.unwrap().as_secs();
    let accounts = format!(
        "1|PREEMPTED|n1|{}\n1|NODE_FAIL|n1|{}\n1|PENDING|None assigned|Unknown\n",
        now - 600,
        now + 2
    );
    fs::write(cluster.path("accounts"), accounts).unwrap();
    fs::write(cluster.path("queue"), "1|N/A|PENDING|BeginTime|\n").unwrap();
    wait_for("the end of the job's start", || {
        let known = reasons(&cluster);
        (known != ["none"]).then(|| assert_eq!(known, ["node failed"]))
    });
    running.signal(9);
    running.end();
}

#[test]
fn what_an_element_wrote_before_it_was_lost_is_kept() {
    let cluster = Forgetful::new();
    fs::write(cluster.path("queue"), "1|N/A|RUNNING|None|n1\n").unwrap();
    let mut running = cluster.start_run();
    let spool = cluster.spool(1);
    running.wait_for_words("submitted as job");
    running.signal(9);
    running.end();
    // All of it while no runner is there.
    let mut writer = begin(&spool);
    writer.push(SpoolEvent::Frame(FromWorker::Metrics(vec![Points {
        series: "made".into(),
        steps: vec![1],
        values: vec![0.5],
        at: vec![1_795_000_000_000],
    }])));
    writer.push(SpoolEvent::Line {
        source: LogSource::Stderr,
        text: "its last words".into(),
    });
    writer.flush().unwrap();
    fs::write(cluster.path("queue"), "1|N/A|NODE_FAIL|None|n1\n").unwrap();
    let running = cluster.start(&["resume"]);
    cluster.spool(2);
    wait_for("what it wrote", || {
        let points = "select value from v_metrics where series = 'made'";
        let points = cluster.retort(&["query", "--json", points]).json();
        let log = cluster.retort(&["log", "latest"]).stdout;
        (points.as_array()?.len() == 1 && log.matches("its last words").count() == 1).then_some(())
    });
    assert_eq!(reasons(&cluster), ["node failed"]);
    running.signal(9);
    running.end();
}

#[test]
fn starts_in_all_jobs_of_a_stage_are_counted() {
    let cluster = Forgetful::of("a: {kind: do, act: kill}");
    fs::write(cluster.path("queue"), "1|N/A|RUNNING|None|n1\n").unwrap();
    let running = cluster.start_run();
    let first = cluster.spool(1);
    let mut writer = begin(&first);
    writer.push(SpoolEvent::Over(StartEnd::Again {
        reason: "its worker was killed by SIGKILL".into(),
    }));
    writer.close(false).unwrap();
    let _writer = begin(&first);
    wait_for("two starts in the history", || {
        let known = reasons(&cluster);
        (known == ["its worker was killed by SIGKILL", "none"]).then_some(())
    });
    // The job disappears with its second start: the next job has the last start.
    fs::write(cluster.path("queue"), "").unwrap();
    let second = cluster.spool(2);
    assert_eq!(spool::read_job_spec(&second).unwrap().wasted, [2]);
    fs::write(cluster.path("queue"), "2|N/A|RUNNING|None|n1\n").unwrap();
    let done = start_job(&second);
    assert!(!done.status.success());
    running
        .end()
        .expect(100)
        .saying(&["after all restarts that `requeue` allows"]);
    let reason = cluster.lab.attempt("a").reason;
    assert_eq!(reason.as_deref(), Some("started too often"));
    let expected = [
        "its worker was killed by SIGKILL",
        "gone from Slurm",
        "its worker was killed by SIGKILL",
    ];
    assert_eq!(reasons(&cluster), expected);
}
