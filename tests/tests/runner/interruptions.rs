//! Ctrl-C, SIGTERM and kill -9, at the runner: what is recorded, what is left, and how it goes on.

use retort::store::{AttemptState, RunId, RunState, StageState};

use crate::lab::{Lab, Running, signal_process, wait_for, wait_until_gone};

const INTERRUPT: i32 = 2;
const KILL: i32 = 9;
const STOP: i32 = 19;
const CONTINUE: i32 = 18;
const TERMINATE: i32 = 15;

/// The first stage works until the lab is told to release it.
const LONG: [&str; 2] = [
    "a: {kind: do, act: wait, flag: released, text: long}",
    "b: {kind: do, text: after, input: a}",
];

#[track_caller]
fn check_interrupted(lab: &Lab) {
    let detail = lab.latest().unwrap();
    assert_eq!(detail.summary.state, RunState::Interrupted);
    let attempt = lab.attempt("a");
    assert_eq!(
        (attempt.state, attempt.reason.as_deref()),
        (AttemptState::Interrupted, Some("interrupted"))
    );
    assert_eq!(lab.entries("staging"), [""; 0]);
}

/// Takes the run up again, and expects the very bytes of a run that nothing happened to.
#[track_caller]
fn check_resumed(lab: &Lab) {
    lab.release();
    lab.retort(&["resume"])
        .expect(0)
        .saying(&["continuing from a checkpoint"]);
    let undisturbed = Lab::new(&LONG);
    undisturbed.release();
    undisturbed.run(&[]).expect(0);
    let sorted = |lab: &Lab| {
        let mut hashes = lab.entries("artifacts");
        hashes.sort();
        hashes
    };
    assert_eq!(sorted(lab), sorted(&undisturbed));
    assert_eq!(
        (lab.entries("staging"), lab.entries("work")),
        (vec![], vec![])
    );
}

#[test]
fn once_interrupted_it_stops_at_a_checkpoint_and_resumes() {
    let lab = Lab::new(&LONG);
    let running = lab.start(&[]);
    lab.wait_for_worker("a");
    running.signal(INTERRUPT);
    running.end().expect(130).saying(&[
        "press Ctrl-C again",
        "stopped at a checkpoint",
        "retort resume",
    ]);
    check_interrupted(&lab);
    check_resumed(&lab);
}

#[test]
fn terminated_it_does_the_same() {
    let lab = Lab::new(&LONG);
    let running = lab.start(&[]);
    lab.wait_for_worker("a");
    running.signal(TERMINATE);
    running.end().expect(143);
    check_interrupted(&lab);
}

#[test]
fn twice_interrupted_it_ends_at_once() {
    let lab = Lab::new(&["a: {kind: do, act: hang_hard}"]);
    let mut running = lab.start(&["--grace", "1h"]);
    let worker = lab.wait_for_worker("a");
    running.signal(INTERRUPT);
    // Signals of one kind that come together are one.
    running.wait_for_words("press Ctrl-C again");
    running.signal(INTERRUPT);
    running
        .end()
        .expect(130)
        .saying(&["was ended with SIGKILL"]);
    check_interrupted(&lab);
    wait_until_gone(worker);
}

#[test]
fn a_killed_runner_takes_its_workers_along_and_its_run_is_lost() {
    let lab = Lab::new(&[]);
    let flag = lab.dir.path().join("child");
    lab.recipe(&[&format!(
        "a: {{kind: do, act: hang_with_child, flag: {}}}",
        flag.display()
    )]);
    let running = lab.start(&[]);
    let worker = lab.wait_for_worker("a");
    let child: u32 = wait_for("the child", || {
        std::fs::read_to_string(&flag).ok()?.parse().ok()
    });
    running.signal(KILL);
    wait_until_gone(worker);
    wait_until_gone(child);
    drop(running);
    let detail = lab.latest().unwrap();
    assert_eq!(detail.summary.state, RunState::Lost);
    assert_eq!(lab.attempt("a").state, AttemptState::Lost);
}

#[test]
fn a_lost_run_is_taken_up_again() {
    let lab = Lab::new(&LONG);
    let running = lab.start(&[]);
    let worker = lab.wait_for_worker("a");
    running.signal(KILL);
    wait_until_gone(worker);
    drop(running);
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Lost);
    // No time to save anything was left: it begins again, and ends well.
    lab.release();
    let document = lab.retort(&["resume", "--json"]).expect(0).json();
    assert_eq!(document["state"], "succeeded");
    assert_eq!(
        (lab.entries("staging"), lab.entries("work")),
        (vec![], vec![]),
        "the dead run's leavings are gone"
    );
}

#[test]
fn a_run_under_way_is_not_taken_up_again() {
    let lab = Lab::new(&["a: {kind: do, act: hang}"]);
    let running = lab.start(&["--grace", "100ms"]);
    lab.wait_for_worker("a");
    lab.retort(&["resume"])
        .expect(2)
        .saying(&["is still running"]);
    running.signal(INTERRUPT);
    running.end().expect(130);
}

#[test]
fn two_runs_of_one_recipe_work_on_a_stage_once() {
    let lab = Lab::new(&LONG);
    let first = lab.start(&[]);
    lab.wait_for_worker("a");
    let mut second = lab.start(&[]);
    second.wait_for_words("another run works on the same stage");
    lab.release();
    let second = second.end().expect(0);
    first.end().expect(0);
    assert!(
        second.stdout.contains("reused") || second.stdout.contains("nothing to do"),
        "{}",
        second.stdout
    );
    assert_eq!(lab.entries("artifacts").len(), 2);
}

/// A second run of a recipe, started while the first works on the stage that both begin with; and the first one's id.
fn two_runs(lab: &Lab) -> (Running, Running, RunId) {
    let first = lab.start(&[]);
    lab.wait_for_worker("a");
    let before = lab.latest().unwrap().summary.id;
    let second = lab.start(&["--grace", "1s"]);
    lab.wait_for_run_after(&before);
    (first, second, before)
}

#[test]
fn a_run_that_waits_is_queued_until_a_stage_begins() {
    let lab = Lab::new(&[
        "a: {kind: do, act: wait, flag: released, text: long}",
        "b: {kind: do, act: hang, input: a}",
    ]);
    let (first, second, first_id) = two_runs(&lab);
    let waiting = lab.latest().unwrap();
    assert_eq!(waiting.summary.state, RunState::Queued);
    for stage in &waiting.stages {
        assert_eq!((stage.state, stage.attempts.len()), (StageState::Queued, 0));
    }
    let queued = ["runs", "list", "--where", "state = queued", "--json"];
    let listed = lab.retort(&queued).expect(0).json();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    lab.retort(&["resume"])
        .expect(2)
        .saying(&["is still queued"]);
    lab.retort(&["runs", "rm", "latest"]).expect(75);
    // The first run begins the next stage too, and hangs in it: the second does not look until then.
    second.signal(STOP);
    lab.release();
    wait_for("the next stage of the first run", || {
        let shown = lab.retort(&["runs", "show", &first_id.0, "--json"]).json();
        (shown["stages"][1]["state"] == "running").then_some(())
    });
    second.signal(CONTINUE);
    // What it waited for is there, and reused.
    wait_for("the first stage", || {
        let run = lab.latest()?;
        (run.stages[0].state == StageState::Reused).then_some(())
    });
    let run = lab.latest().unwrap();
    assert_eq!(run.summary.state, RunState::Queued, "nothing has begun yet");
    assert_eq!(run.stages[1].state, StageState::Queued);
    drop(first);
    let worker = lab.wait_for_worker("b");
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Running);
    second.signal(INTERRUPT);
    second.end().expect(130);
    wait_until_gone(worker);
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Interrupted);
}

#[test]
fn a_queued_run_is_interrupted_or_lost_like_any_other() {
    for (signal, expected) in [(INTERRUPT, RunState::Interrupted), (KILL, RunState::Lost)] {
        let lab = Lab::new(&["a: {kind: do, act: hang}"]);
        let (first, second, _) = two_runs(&lab);
        assert_eq!(lab.latest().unwrap().summary.state, RunState::Queued);
        second.signal(signal);
        second.end();
        let detail = lab.latest().unwrap();
        assert_eq!(detail.summary.state, expected);
        assert_eq!(detail.stages[0].state, StageState::Skipped);
        drop(first);
    }
}

#[test]
fn a_stage_is_queued_until_there_is_room_for_it() {
    let lab = Lab::new(&[
        "a: {kind: do, act: hang}",
        "b: {kind: do, act: hang, text: b}",
    ]);
    let running = lab.start(&["--jobs", "1", "--grace", "1s"]);
    lab.wait_for_worker("a");
    let states = |lab: &Lab| -> Vec<StageState> {
        let detail = lab.latest().unwrap();
        assert_eq!(detail.summary.state, RunState::Running);
        detail.stages.iter().map(|stage| stage.state).collect()
    };
    assert_eq!(states(&lab), [StageState::Running, StageState::Queued]);
    let alone = lab.latest().unwrap().summary.id;
    running.signal(INTERRUPT);
    running.end().expect(130);
    let running = lab.start(&["--jobs", "2", "--grace", "1s"]);
    lab.wait_for_run_after(&alone);
    lab.wait_for_worker("a");
    lab.wait_for_worker("b");
    assert_eq!(states(&lab), [StageState::Running, StageState::Running]);
    running.signal(INTERRUPT);
    running.end().expect(130);
}

#[test]
fn a_stopped_worker_is_ended_with_its_runner() {
    let lab = Lab::new(&["a: {kind: do, act: hang}"]);
    let mut running = lab.start(&[]);
    let worker = lab.wait_for_worker("a");
    signal_process(worker, 19);
    running.signal(INTERRUPT);
    running.wait_for_words("press Ctrl-C again");
    running.signal(INTERRUPT);
    running.end().expect(130);
    wait_until_gone(worker);
}

/// A run of two stages, killed so many milliseconds after a worker began with one of them: the runner, or that worker.
/// The stage that is hit waits for a file, so that every kill hits it, however busy the machine is.
fn kill_in(stage: &str, delay: u64, whom: fn(&Running, u32) -> u32) -> Lab {
    let lab = Lab::new(&[
        "a: {kind: do, act: wait, flag: first, text: short}",
        "b: {kind: do, act: flood, amount: 20000, rate: 20000, flag: second, input: a}",
    ]);
    let release = |name: &str| std::fs::write(lab.dir.path().join(name), "").unwrap();
    if stage == "b" {
        release("first");
    }
    let mut running = lab.start(&[]);
    let worker = lab.wait_for_worker(stage);
    std::thread::sleep(std::time::Duration::from_millis(delay));
    signal_process(whom(&running, worker), KILL);
    let _ = running.child.wait();
    wait_until_gone(worker);
    release("first");
    release("second");
    lab
}

/// The delays after which something is killed in each stage.
const DELAYS: [u64; 4] = [0, 3, 40, 110];

/// Whatever moment it was: nothing is under way, nothing is claimed that is not so, and it can be finished.
#[track_caller]
fn check_truth(lab: &Lab, expected: RunState) {
    let detail = lab.latest().unwrap();
    assert_eq!(detail.summary.state, expected);
    for stage in &detail.stages {
        for attempt in &stage.attempts {
            assert_ne!(attempt.state, AttemptState::Running);
            if attempt.state == AttemptState::Succeeded {
                let output = attempt.output.as_ref().expect("an output");
                assert!(lab.store_dir().join("artifacts").join(output).is_dir());
            }
        }
    }
    assert_eq!(lab.run(&["--json"]).expect(0).json()["state"], "succeeded");
    lab.retort(&["artifacts", "verify"]).expect(0);
    assert_eq!(
        (lab.entries("staging"), lab.entries("work")),
        (vec![], vec![])
    );
    let sql = "select count(*) as n from v_metrics where run = (select id from v_runs order by started desc limit 1) and stage = 'b'";
    assert_eq!(
        lab.retort(&["query", sql, "--json"]).expect(0).json()[0]["n"],
        20_000
    );
}

#[test]
fn a_runner_killed_at_any_moment_leaves_the_truth() {
    for stage in ["a", "b"] {
        for delay in DELAYS {
            let lab = kill_in(stage, delay, |running, _| running.child.id());
            assert_eq!(lab.attempt(stage).state, AttemptState::Lost);
            check_truth(&lab, RunState::Lost);
        }
    }
}

#[test]
fn a_worker_killed_at_any_moment_ends_one_attempt() {
    for stage in ["a", "b"] {
        for delay in DELAYS {
            let lab = kill_in(stage, delay, |_, worker| worker);
            let attempt = lab.attempt(stage);
            assert_eq!(attempt.reason.as_deref(), Some("killed by SIGKILL"));
            check_truth(&lab, RunState::Failed);
        }
    }
}
