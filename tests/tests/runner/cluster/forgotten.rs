//! Jobs that Slurm's controller has forgotten: their end is in its accounts or their spools. Its programs are scripts.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use retort::cluster::spool::{self, SavedProgress, SpoolEvent, StartEnd, Writer};
use retort::frame::{Answer, FromWorker, Points, Progress};
use retort::store::{LogSource, Usage};
use retort::worker::death::ExitStatus;
use retort_abi::{Part, StageResult};

use super::fake::FakeSlurm;
use crate::lab::{Running, compile, wait_for};

/// Starts a run whose elements may be restarted twice.
fn start_run(cluster: &FakeSlurm) -> Running {
    let slurm = ["--slurm", "poll=1s", "--slurm", "requeue=2"];
    let settings = [&["--executor", "slurm", "-v"], &slurm[..]].concat();
    cluster.start(&[&["run", "r.yaml"], &settings[..]].concat())
}

/// Begins the next start of the only element of a job.
fn begin(spool: &Path) -> Writer {
    begin_element(spool, 0)
}

/// Plays the node of an element that succeeds with its part.
fn finish_part(spool: &Path, element: usize) {
    let mut writer = begin_element(spool, element);
    let result = Answer::Result(StageResult::of_part());
    writer.push(SpoolEvent::Frame(FromWorker::Answer(result)));
    writer.push(SpoolEvent::Exited {
        status: ExitStatus::Code(0),
        usage: Usage::default(),
        out_of_memory: false,
    });
    writer.push(SpoolEvent::Over(StartEnd::Done));
    writer.close(true).unwrap();
}

fn begin_element(spool: &Path, element: usize) -> Writer {
    let mut writer = Writer::open(&spool::element_dir(spool, element)).unwrap();
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
    let cluster = FakeSlurm::new();
    // Slurm has accepted the job, and the runner never learns its id.
    cluster.program(
        "sbatch",
        "mkdir \"$SIM/jobs/1\" || exit 1
         printf '%s\\n' \"$@\" > \"$SIM/jobs/1/draft\"; mv \"$SIM/jobs/1/draft\" \"$SIM/jobs/1/args\"
         while [ -e \"$SIM/jobs\" ] && ! [ -e \"$SIM/go-on\" ]; do sleep 0.1; done",
    );
    let running = start_run(&cluster);
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
    let cluster = FakeSlurm::new();
    cluster.program("sacct", "cat \"$SIM/accounts\"");
    fs::write(cluster.path("accounts"), "1|OUT_OF_MEMORY|n1\n").unwrap();
    cluster.queue("1|N/A|RUNNING|None|n1\n");
    let mut running = start_run(&cluster);
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
    cluster.queue("");
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
fn reasons(cluster: &FakeSlurm) -> Vec<String> {
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
    let cluster = FakeSlurm::new();
    cluster.program(
        "sacct",
        "[ \"$SLURM_TIME_FORMAT\" = %s ] || exit 1
         case \"$*\" in *--duplicates*) cat \"$SIM/accounts\";; esac",
    );
    cluster.queue("1|N/A|RUNNING|None|n1\n");
    let mut running = start_run(&cluster);
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
    cluster.queue("1|N/A|PENDING|BeginTime|\n");
    wait_for("the end of the job's start", || {
        let known = reasons(&cluster);
        (known != ["none"]).then(|| assert_eq!(known, ["node failed"]))
    });
    running.signal(9);
    running.end();
}

#[test]
fn what_an_element_wrote_before_it_was_lost_is_kept() {
    let cluster = FakeSlurm::new();
    cluster.queue("1|N/A|RUNNING|None|n1\n");
    let mut running = start_run(&cluster);
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
    cluster.queue("1|N/A|NODE_FAIL|None|n1\n");
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
    let cluster = FakeSlurm::of("a: {kind: do, act: kill}");
    cluster.queue("1|N/A|RUNNING|None|n1\n");
    let running = start_run(&cluster);
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
    cluster.queue("");
    let second = cluster.spool(2);
    assert_eq!(spool::read_job_spec(&second).unwrap().wasted, [2]);
    cluster.queue("2|N/A|RUNNING|None|n1\n");
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

/// Three starts are lost, which is more than `requeue`; each begins at a later checkpoint than the one before.
#[test]
fn starts_that_get_further_are_not_limited() {
    let cluster = FakeSlurm::new();
    cluster.queue("1|N/A|RUNNING|None|n1\n");
    let running = start_run(&cluster);
    let first = cluster.spool(1);
    let progress = |done| {
        let (total, unit) = (9, "steps".to_owned());
        FromWorker::Progress(Progress { done, total, unit })
    };
    for done in 1..=3 {
        let mut writer = begin(&first);
        let element = spool::element_dir(&first, 0);
        let mut saved = SavedProgress::before(&element, writer.start());
        assert!(saved.note(&progress(done)));
        saved.write(&element, writer.start()).unwrap();
        writer.push(SpoolEvent::Over(StartEnd::Again {
            reason: "its worker was killed by SIGKILL".into(),
        }));
        writer.close(false).unwrap();
    }
    wait_for("three starts in the history", || {
        (reasons(&cluster).len() == 3).then_some(())
    });
    cluster.queue("");
    let second = cluster.spool(2);
    assert_eq!(spool::read_job_spec(&second).unwrap().wasted, [1]);
    let mut saved = SavedProgress::before(&spool::element_dir(&second, 0), 0);
    assert!(!saved.note(&progress(3)), "the next job knows of it");
    cluster.queue("2|N/A|RUNNING|None|n1\n");
    work(&second);
    running.end().expect(0);
}

const THREE: &str = "1|0|RUNNING|None|n1\n1|1|RUNNING|None|n1\n1|2|RUNNING|None|n1\n";

#[test]
fn only_what_has_no_result_is_submitted_again() {
    let cluster = FakeSlurm::divided();
    cluster.queue(THREE);
    let running = start_run(&cluster);
    let spool = cluster.spool(1);
    finish_part(&spool, 0);
    finish_part(&spool, 2);
    let mut writer = begin_element(&spool, 1);
    writer.push(SpoolEvent::Over(StartEnd::OutOfTries {
        reason: "its worker was killed by SIGKILL".into(),
    }));
    writer.close(false).unwrap();
    running
        .end()
        .expect(100)
        .saying(&["after all restarts that `requeue` allows"]);
    let state = || {
        let shown = cluster.retort(&["runs", "show", "--json"]).expect(0).json();
        shown["state"].clone()
    };
    assert_eq!(state(), "failed");
    let open = "select count(*) as n from v_jobs where over is null";
    let open = || cluster.retort(&["query", "--json", open]).expect(0).json()[0]["n"].clone();
    assert_eq!(open(), 0);

    let queue = "2|0|RUNNING|None|n1\n3|N/A|RUNNING|None|n1\n";
    cluster.queue(queue);
    let running = cluster.start(&["resume"]);
    let spool = cluster.spool(2);
    let arguments = fs::read_to_string(cluster.path("jobs/2/args")).unwrap();
    assert!(
        arguments.lines().any(|line| line == "--array=0-0"),
        "{arguments}"
    );
    let missing = Part { index: 1, of: 3 };
    assert_eq!(
        spool::read_job_spec(&spool).unwrap().elements,
        [Some(missing)]
    );
    finish_part(&spool, 0);
    work(&cluster.spool(3));
    running.end().expect(0).saying(&["2 of 3 elements"]);
    assert!(!cluster.path("jobs/4").exists());
    assert_eq!((state(), open()), ("succeeded".into(), 0.into()));
    // Each start once, although those of the first job were read twice.
    let mut reasons = reasons(&cluster);
    reasons.sort_unstable();
    assert_eq!(
        reasons,
        [
            "its worker was killed by SIGKILL",
            "succeeded",
            "succeeded",
            "succeeded",
            "succeeded"
        ]
    );
}

#[test]
fn a_training_starts_again_with_all_its_workers() {
    let cluster = FakeSlurm::of("a: {kind: train, plugin: ranks, workers: 2}");
    fs::create_dir(cluster.path("plugins")).unwrap();
    compile("ranks.c", &[], &cluster.path("plugins/libretort_ranks.so"));
    let queue = "1|N/A|RUNNING|None|n1\n2|N/A|RUNNING|None|n1\n";
    cluster.queue(queue);
    let running = start_run(&cluster);
    let spool = cluster.spool(1);
    finish_part(&spool, 0);
    let mut writer = begin_element(&spool, 1);
    writer.push(SpoolEvent::Over(StartEnd::GaveUp));
    writer.close(false).unwrap();
    running.end().expect(100);
    let running = cluster.start(&["resume"]);
    let both = [0, 1].map(|index| Some(Part { index, of: 2 }));
    let order = spool::read_job_spec(&cluster.spool(2)).unwrap();
    assert_eq!((order.elements.as_slice(), order.ranks), (&both[..], true));
    running.signal(9);
    running.end();
}

#[test]
fn finished_parts_are_not_submitted_again() {
    let cluster = FakeSlurm::divided();
    let queue = format!("{THREE}2|N/A|PENDING|Resources|\n");
    cluster.queue(&queue);
    let mut running = start_run(&cluster);
    let spool = cluster.spool(1);
    for part in 0..3 {
        finish_part(&spool, part);
    }
    let whole = cluster.spool(2);
    running.wait_for_words("submitted as job 2");
    running.signal(9);
    running.end();
    cluster.queue("2|N/A|PENDING|Resources|\n");
    let mut running = cluster.start(&["resume"]);
    running.wait_for_words("3 of 3 elements");
    cluster.queue("2|N/A|RUNNING|None|n1\n");
    work(&whole);
    running.end().expect(0);
    assert!(!cluster.path("jobs/3").exists());
}

#[test]
fn what_a_job_said_while_the_runner_left_is_in_the_log() {
    let cluster = FakeSlurm::new();
    cluster
        .lab
        .recipe(&["a: {kind: do}", "b: {kind: do, text: b}"]);
    // The first job is over before its id is known; the second one waits.
    cluster.program(
        "sbatch",
        "n=1; while ! mkdir \"$SIM/jobs/$n\" 2>/dev/null; do n=$((n+1)); done
         printf '%s\\n' \"$@\" > \"$SIM/jobs/$n/draft\"; mv \"$SIM/jobs/$n/draft\" \"$SIM/jobs/$n/args\"
         for script; do :; done
         [ $n = 1 ] && SLURM_JOB_ID=1 SLURM_PROCID=0 SLURMD_NODENAME=n1 bash \"$script\" > /dev/null 2>&1
         echo $n",
    );
    cluster.queue("2|N/A|PENDING|Resources|\n");
    let slurm = ["--executor", "slurm", "--slurm", "poll=1s"];
    let run = [&["run", "r.yaml", "--detach", "--jobs", "2"], &slurm[..]].concat();
    cluster.retort(&run).expect(0).saying(&["is left to Slurm"]);
    let log = cluster.retort(&["log", "latest"]).expect(0).stdout;
    assert_eq!(log.matches("job 1 began on n1").count(), 1, "{log}");
    cluster.queue("2|N/A|RUNNING|None|n1\n");
    let resumed = cluster.start(&["resume"]);
    work(&cluster.spool(2));
    resumed.end().expect(0);
    assert!(!cluster.path("jobs/3").exists());
}

#[test]
fn tail_ends_where_slurm_cannot_be_asked() {
    let cluster = FakeSlurm::new();
    cluster.queue("1|N/A|RUNNING|None|n1\n");
    let mut running = start_run(&cluster);
    let spool = cluster.spool(1);
    running.wait_for_words("submitted as job");
    let _writer = begin(&spool);
    running.signal(9);
    running.end();
    let mut tail = cluster.command(&["tail"]);
    let tail = tail.env("PATH", cluster.path("nothing"));
    let tail = tail.stdout(Stdio::piped()).stderr(Stdio::piped());
    let tail = Running::new(tail.spawn().unwrap());
    tail.end().expect(1).saying(&[
        "cannot be followed here",
        "was not found on PATH",
        "`retort resume`",
    ]);
}

#[test]
fn a_runner_leaves_once_every_element_has_a_job() {
    let cluster = FakeSlurm::divided();
    cluster.program("scontrol", "echo 'MaxArraySize = 2'");
    cluster.program(
        "sbatch",
        "[ -e \"$SIM/jobs/1\" ] && ! [ -e \"$SIM/room\" ] && {
             touch \"$SIM/refused\"; echo 'Slurm temporarily unable to accept job' >&2; exit 1
         }
         n=1; while ! mkdir \"$SIM/jobs/$n\" 2>/dev/null; do n=$((n+1)); done
         printf '%s\\n' \"$@\" > \"$SIM/jobs/$n/draft\"; mv \"$SIM/jobs/$n/draft\" \"$SIM/jobs/$n/args\"; echo $n",
    );
    cluster.queue(THREE);
    let slurm = ["--executor", "slurm", "--slurm", "poll=1s"];
    let mut running = cluster.start(&[&["run", "r.yaml", "--detach"], &slurm[..]].concat());
    let _writer = begin_element(&cluster.spool(1), 0);
    wait_for("a refusal", || {
        cluster.path("refused").exists().then_some(())
    });
    // One part runs, one waits, and one has no job.
    wait_for("a start in the history", || {
        (reasons(&cluster) == ["none"]).then_some(())
    });
    std::thread::sleep(Duration::from_secs(3));
    assert!(running.child.try_wait().unwrap().is_none());
    fs::write(cluster.path("room"), "").unwrap();
    running.end().expect(0).saying(&["is left to Slurm"]);
    assert!(cluster.path("jobs/2").exists());
}

#[test]
fn a_silent_controller_is_asked_for_a_restart_again() {
    let cluster = FakeSlurm::of("a: {kind: do, act: kill}");
    cluster.program(
        "scontrol",
        "[ \"$1\" = requeue ] || { echo 'MaxArraySize = 1001'; exit; }
         echo \"$2\" >> \"$SIM/asked\"
         [ $(wc -l < \"$SIM/asked\") -gt 2 ] && exit
         echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1",
    );
    cluster.queue("1|N/A|RUNNING|None|n1\n");
    let running = start_run(&cluster);
    let spool = cluster.spool(1);
    let path = std::env::var("PATH").unwrap_or_default();
    let mut node = Command::new("bash")
        .arg(spool.join("batch.sh"))
        .env("PATH", format!("{}:{path}", cluster.path("bin").display()))
        .env("SIM", cluster.lab.dir.path())
        .envs([
            ("SLURM_JOB_ID", "1"),
            ("SLURM_PROCID", "0"),
            ("SLURMD_NODENAME", "n1"),
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the third request", || {
        let asked = fs::read_to_string(cluster.path("asked")).ok()?;
        (asked == "1\n1\n1\n").then_some(())
    });
    node.kill().unwrap();
    node.wait().unwrap();
    running.signal(9);
    running.end();
}

#[test]
fn the_shell_steers_no_job() {
    let cluster = FakeSlurm::new();
    cluster.program(
        "scontrol",
        "echo 'ClusterName = here'; echo 'MaxArraySize = 1001'",
    );
    cluster.program("scancel", "echo \"$@\" >> \"$SIM/cancelled\"");
    cluster.program(
        "sbatch",
        "env | grep -e ^SLURM_ -e ^SBATCH_ > \"$SIM/variables\"; echo \"1;$WHERE\"",
    );
    cluster.queue("1|N/A|PENDING|Resources|\n");
    let run = |place: &str| {
        let slurm = ["--executor", "slurm", "--slurm", "poll=1s"];
        let mut command = cluster.command(&[&["run", "r.yaml", "--detach"], &slurm[..]].concat());
        command
            .envs([
                ("SLURM_JOB_ID", "9"),
                ("SLURM_ARRAY_TASK_ID", "5"),
                ("SLURM_CLUSTERS", "there"),
                ("SBATCH_ARRAY_INX", "0-3"),
                ("SLURM_CONF", "/conf"),
                ("SBATCH_ACCOUNT", "vision"),
                ("WHERE", place),
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Running::new(command.spawn().unwrap()).end()
    };
    run("there")
        .expect(100)
        .saying(&["to the cluster there, not to here"]);
    let cancelled = fs::read_to_string(cluster.path("cancelled")).unwrap();
    assert_eq!(cancelled, "--clusters=there 1\n");
    run("here").expect(0).saying(&["is left to Slurm"]);
    let variables = fs::read_to_string(cluster.path("variables")).unwrap();
    let mut variables: Vec<&str> = variables.lines().collect();
    variables.sort_unstable();
    assert_eq!(variables, ["SBATCH_ACCOUNT=vision", "SLURM_CONF=/conf"]);
}
