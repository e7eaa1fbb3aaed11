//! Ctrl-C, SIGTERM and kill -9 at the runner: what is recorded, what remains, and how it continues.

use retort::store::{AttemptState, RunId, RunState, StageState};

use crate::lab::{Lab, Running, signal_process, wait_for, wait_until_gone};

const INTERRUPT: i32 = 2;
const KILL: i32 = 9;
const STOP: i32 = 19;
const CONTINUE: i32 = 18;
const TERMINATE: i32 = 15;

/// The first stage works until the lab releases it.
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

/// Resumes the run, and expects the same bytes as from an undisturbed run.
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
    // Signals of one kind that arrive together count as one.
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
    // There was no time to save anything: it starts from the beginning, and succeeds.
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

/// A second run of a recipe, started while the first runs their common first stage; and the first one's id.
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
    // The first run begins the next stage too, and hangs in it: the second does not check until then.
    second.signal(STOP);
    lab.release();
    wait_for("the next stage of the first run", || {
        let shown = lab.retort(&["runs", "show", &first_id.0, "--json"]).json();
        (shown["stages"][1]["state"] == "running").then_some(())
    });
    second.signal(CONTINUE);
    // The awaited result exists, and is reused.
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

/// How much of a stage's output the history had at the time of a kill.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Heard {
    Nothing,
    Some,
    All,
}

/// The points of stage `b` in the recipe below, which takes a second or two.
const POINTS: u64 = 20_000;

/// A run of two stages whose runner, or one of its workers, is killed when the history has this much of a stage. Stages wait
/// for a file before their first point and for another before they end, so that every kill hits them, even on a busy machine.
fn kill_in(stage: &str, when: Heard, whom: fn(&Running, u32) -> u32) -> Lab {
    let lab = Lab::new(&[
        "a: {kind: do, act: wait, flag: first, text: short}",
        &format!(
            "b: {{kind: do, act: flood, amount: {POINTS}, rate: 10000, flag: second, input: a}}"
        ),
    ]);
    let release = |name: &str| std::fs::write(lab.dir.path().join(name), "").unwrap();
    if stage == "b" {
        release("first");
    }
    let mut running = lab.start(&[]);
    let worker = lab.wait_for_worker(stage);
    if when != Heard::Nothing {
        release("second.begin");
        wait_for("points", || {
            let heard = points(&lab);
            (heard == POINTS || heard > 0 && when == Heard::Some).then_some(())
        });
    }
    signal_process(whom(&running, worker), KILL);
    let _ = running.child.wait();
    wait_until_gone(worker);
    for name in ["first", "second.begin", "second"] {
        release(name);
    }
    lab
}

/// Points of stage `b` in the newest run.
fn points(lab: &Lab) -> u64 {
    let sql = "select count(*) as n from v_metrics where run = (select id from v_runs order by started desc limit 1) and stage = 'b'";
    let said = lab.retort(&["query", sql, "--json"]).expect(0);
    said.json()[0]["n"].as_u64().unwrap()
}

/// A run that was killed in its second stage when the history had exactly this much of it. On a busy machine all points may be
/// recorded before a kill that should come between them; then it is tried again.
fn kill_among_points(when: Heard, whom: fn(&Running, u32) -> u32) -> Lab {
    let hit = (0..20).find_map(|_| {
        let lab = kill_in("b", when, whom);
        let heard = match points(&lab) {
            0 => Heard::Nothing,
            POINTS => Heard::All,
            _ => Heard::Some,
        };
        (heard == when).then_some(lab)
    });
    hit.unwrap_or_else(|| panic!("nothing was killed when the history had {when:?} of it"))
}

/// All targets of a kill: the first stage, and the second before, between and after its points.
fn kills(whom: fn(&Running, u32) -> u32) -> impl Iterator<Item = (&'static str, Lab)> {
    let first = std::iter::once_with(move || ("a", kill_in("a", Heard::Nothing, whom)));
    let second = [Heard::Nothing, Heard::Some, Heard::All].into_iter();
    first.chain(second.map(move |when| ("b", kill_among_points(when, whom))))
}

/// At any moment: nothing is running afterwards, no record is wrong, and the run can be finished.
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
    assert_eq!(points(lab), POINTS);
}

#[test]
fn a_runner_killed_at_any_moment_leaves_the_truth() {
    for (stage, lab) in kills(|running, _| running.child.id()) {
        assert_eq!(lab.attempt(stage).state, AttemptState::Lost);
        check_truth(&lab, RunState::Lost);
    }
}

#[test]
fn a_worker_killed_at_any_moment_ends_one_attempt() {
    for (stage, lab) in kills(|_, worker| worker) {
        let attempt = lab.attempt(stage);
        assert_eq!(attempt.reason.as_deref(), Some("killed by SIGKILL"));
        check_truth(&lab, RunState::Failed);
    }
}
