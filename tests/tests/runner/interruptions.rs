//! Ctrl-C, SIGTERM and kill -9, at the runner: what is recorded, what is left, and how it goes on.

use retort::store::{AttemptState, RunState};

use crate::lab::{Lab, signal_process, wait_for, wait_until_gone};

const INTERRUPT: i32 = 2;
const KILL: i32 = 9;
const TERMINATE: i32 = 15;

const LONG: [&str; 2] = [
    "a: {kind: do, act: work, amount: 30, text: long}",
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
    lab.retort(&["resume"])
        .expect(0)
        .saying(&["continuing from a checkpoint"]);
    let undisturbed = Lab::new(&LONG);
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
    let running = lab.start(&["--grace", "1h"]);
    let worker = lab.wait_for_worker("a");
    running.signal(INTERRUPT);
    // Signals of one kind that come together are one.
    std::thread::sleep(std::time::Duration::from_millis(300));
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
    let second = lab
        .run(&[])
        .expect(0)
        .saying(&["another retort process works on the same stage"]);
    first.end().expect(0);
    assert!(
        second.stdout.contains("reused") || second.stdout.contains("nothing to do"),
        "{}",
        second.stdout
    );
    assert_eq!(lab.entries("artifacts").len(), 2);
}

#[test]
fn a_stopped_worker_is_ended_with_its_runner() {
    let lab = Lab::new(&["a: {kind: do, act: hang}"]);
    let running = lab.start(&[]);
    let worker = lab.wait_for_worker("a");
    signal_process(worker, 19);
    running.signal(INTERRUPT);
    std::thread::sleep(std::time::Duration::from_millis(300));
    running.signal(INTERRUPT);
    running.end().expect(130);
    wait_until_gone(worker);
}
