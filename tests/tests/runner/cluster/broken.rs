//! Faults between a runner and Slurm: unanswered queries, damaged spools. Slurm's programs are scripts here, and the test
//! writes the jobs' spools.

use std::fs;
use std::path::PathBuf;

use retort::cluster::spool::{self, SpoolEvent, Writer};

use super::fake::FakeSlurm;
use crate::lab::{CommandOutput, Running, wait_for};

const INTERRUPT: i32 = 2;
const KILL: i32 = 9;

fn start(fake: &FakeSlurm, arguments: &[&str]) -> Running {
    let settings = ["--executor", "slurm", "--slurm", "poll=200ms"];
    fake.start(&[arguments, &settings].concat())
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

fn check_is_cancelled(fake: &FakeSlurm, said: CommandOutput, words: &[&str]) {
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
    let fake = FakeSlurm::of_one_job();
    let running = start(&fake, &["run", "r.yaml"]);
    let (dir, _writer) = begin(&fake.spool(1));
    let whole = fs::read(dir.join("0.0.open")).unwrap();
    let mut second = whole.clone();
    second[12] ^= 1;
    fs::write(dir.join("spoilt"), [whole, second].concat()).unwrap();
    fs::rename(dir.join("spoilt"), dir.join("0.0.sealed")).unwrap();
    check_is_cancelled(&fake, running.end(), &["0.0.sealed is damaged"]);

    // Its end is missing permanently.
    let fake = FakeSlurm::of_one_job();
    let running = start(&fake, &["run", "r.yaml"]);
    let (dir, _writer) = begin(&fake.spool(1));
    let bytes = fs::read(dir.join("0.0.open")).unwrap();
    fs::write(dir.join("torn"), [&bytes[..], &bytes[..20]].concat()).unwrap();
    fs::rename(dir.join("torn"), dir.join("0.0.sealed")).unwrap();
    check_is_cancelled(&fake, running.end(), &["its last record is cut off"]);

    // Somebody has put a link in its place.
    let fake = FakeSlurm::of_one_job();
    let running = start(&fake, &["run", "r.yaml"]);
    let (dir, _writer) = begin(&fake.spool(1));
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
    let fake = FakeSlurm::of_one_job();
    // Slurm has accepted the job, and the runner dies before it knows the id.
    fs::write(fake.path("slow"), "").unwrap();
    let running = start(&fake, &["run", "r.yaml"]);
    let spool = fake.spool(1);
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
    let mut resumed = start(&fake, &["resume"]);
    // It retries for half a minute; an answer within that time would suffice.
    resumed.wait_for_words("the state of this spool's job cannot be determined at the moment");
    let said = resumed.end();
    assert_ne!(said.code, Some(0), "{}", said.stderr);
    assert!(dir.join("0.0.open").exists(), "nothing of it is removed");
    assert!(!fake.path("cancelled").exists());
    // Slurm answers again: the job is taken over unchanged.
    fs::remove_file(fake.path("silent")).unwrap();
    fs::remove_file(fake.path("jobs/1/args")).unwrap();
    let mut resumed = start(&fake, &["resume", "-v"]);
    resumed.wait_for_words("taken up");
    resumed.signal(KILL);
    resumed.end();
    assert!(
        !fake.path("jobs/1/args").exists(),
        "nothing is submitted again"
    );
}

#[test]
fn what_slurm_did_not_hear_is_cancelled_again() {
    let deaf = "echo >> \"$SIM/tries\"; [ $(wc -l < \"$SIM/tries\") -gt 2 ] || {
             echo 'scancel: error: Unable to contact slurm controller' >&2; exit 1
         }
         echo \"$@\" >> \"$SIM/cancelled\"
         case \"$*\" in *PENDING*) ;; *) echo '1|N/A|CANCELLED|None|node1' > \"$SIM/queue\";; esac";
    // The user ends the run.
    let fake = FakeSlurm::of_one_job();
    fake.program("scancel", deaf);
    let mut running = start(&fake, &["run", "r.yaml", "-v"]);
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
    let fake = FakeSlurm::of_one_job();
    fake.program("scancel", deaf);
    let running = start(&fake, &["run", "r.yaml"]);
    let (dir, _writer) = begin(&fake.spool(1));
    let bytes = fs::read(dir.join("0.0.open")).unwrap();
    fs::write(dir.join("torn"), [&bytes[..], &bytes[..20]].concat()).unwrap();
    fs::rename(dir.join("torn"), dir.join("0.0.sealed")).unwrap();
    check_is_cancelled(&fake, running.end(), &["its last record is cut off"]);
}

const HELD: &str = "1|N/A|PENDING|launch failed requeued held|\n";

/// How often a run has released its job.
fn releases(fake: &FakeSlurm) -> usize {
    let requests = fs::read_to_string(fake.path("requests")).unwrap_or_default();
    requests.lines().filter(|line| *line == "release 1").count()
}

/// A job that Slurm could not launch once: it is held, and released.
fn held_once(fake: &FakeSlurm) -> (Running, PathBuf) {
    fake.program(
        "scontrol",
        "[ \"$1\" = release ] && echo '1|N/A|PENDING|Priority|' > \"$SIM/queue\"
         echo \"$@\" >> \"$SIM/requests\"; echo 'MaxArraySize = 1001'",
    );
    fake.queue("1|N/A|PENDING|Priority|\n");
    let mut running = start(fake, &["run", "r.yaml", "-v", "--slurm", "requeue=1"]);
    running.wait_for_words("submitted as job");
    let spool = fake.spool(1);
    fake.queue(HELD);
    wait_for("its release, and a note of it", || {
        let noted = spool::releases(&spool::element_dir(&spool, 0));
        (noted == 1 && releases(fake) == 1).then_some(())
    });
    (running, spool)
}

/// A runner that takes the job over goes on counting.
#[test]
fn a_held_job_is_released_as_often_as_it_may_be_by_all_runners_together() {
    let fake = FakeSlurm::of_one_job();
    let (running, _) = held_once(&fake);
    running.signal(KILL);
    running.end();
    fake.queue(HELD);
    let said = start(&fake, &["resume", "--slurm", "requeue=1"]).end();
    said.expect(100).saying(&["Slurm could not launch job 1"]);
    assert_eq!(releases(&fake), 1);
}

#[test]
fn releases_are_counted_anew_once_the_job_was_launched() {
    let fake = FakeSlurm::of_one_job();
    let (running, spool) = held_once(&fake);
    let (_, _writer) = begin(&spool);
    fake.queue("1|N/A|RUNNING|None|node1\n");
    wait_for("its start in the history", || {
        let starts = "select count(*) as n from v_job_lives";
        let rows = fake.retort(&["query", "--json", starts]).expect(0).json();
        (rows[0]["n"] == 1).then_some(())
    });
    fake.queue(HELD);
    wait_for("its second release", || {
        (releases(&fake) == 2).then_some(())
    });
    running.signal(KILL);
    running.end();
}

#[test]
fn a_job_that_slurm_holds_after_a_failed_launch_is_released() {
    let fake = FakeSlurm::of_one_job();
    fake.program(
        "scontrol",
        "echo \"$@\" >> \"$SIM/requests\"; echo 'MaxArraySize = 1001'",
    );
    fake.queue("1|N/A|PENDING|launch failed requeued held|\n");
    let said = start(&fake, &["run", "r.yaml", "--slurm", "requeue=2"]).end();
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
