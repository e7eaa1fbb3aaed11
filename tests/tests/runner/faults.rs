//! A fault in a stage ends only that stage, with a specific reason.

use retort::store::{AttemptState, RunState};

use crate::lab::{Lab, signal_process, wait_for, wait_until_gone};

/// Runs a failing stage, and expects this reason and these words in the history and on stderr.
#[track_caller]
fn check(act: &str, options: &str, reason: &str, words: &[&str]) {
    let lab = Lab::new(&[
        &format!("a: {{kind: do, act: {act}{options}}}"),
        "b: {kind: do, input: a}",
    ]);
    let said = lab
        .run(&["--grace", "300ms"])
        .expect(100)
        .saying(&["stage `a` ended after"]);
    let said = said.saying(&[reason]).saying(words);
    assert!(
        said.stdout.contains("failed") && said.stdout.contains("skipped"),
        "{}",
        said.stdout
    );
    let attempt = lab.attempt("a");
    assert_eq!(
        (attempt.state, attempt.reason.as_deref()),
        (AttemptState::Failed, Some(reason))
    );
    assert!(attempt.output.is_none() && attempt.finished.is_some());
    let message = attempt.message.unwrap();
    assert!(words.iter().any(|word| message.contains(word)), "{message}");
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Failed);
    assert_eq!(
        (lab.entries("artifacts"), lab.entries("staging")),
        (vec![], vec![]),
        "half-made things"
    );
    // The store is undamaged.
    lab.run(&["--set", "a.act=succeed"]).expect(0);
}

#[test]
fn failing() {
    check("fail", "", "failed: bad_data", &["the data are bad"]);
}

#[test]
fn aborting() {
    check("abort", "", "killed by SIGABRT", &["gave up (abort)"]);
}

#[test]
fn segfaulting() {
    check(
        "segfault",
        "",
        "killed by SIGSEGV",
        &["memory that is not its own", "about to do something stupid"],
    );
}

#[test]
fn lying_about_an_artifact() {
    check(
        "lie",
        "",
        "protocol error",
        &["an invalid message: `../../x` is not a hash"],
    );
}

#[test]
fn exiting() {
    check("exit", "", "exited with code 3", &["without a result"]);
}

#[test]
fn being_killed() {
    check(
        "kill",
        "",
        "killed by SIGKILL",
        &["the kernel does when memory runs out"],
    );
}

#[test]
fn running_out_of_memory() {
    check(
        "out_of_memory",
        "",
        "killed by SIGABRT (out of memory)",
        &["could not get the memory", "make batches or models smaller"],
    );
}

#[test]
fn passing_an_absurd_length() {
    check(
        "absurd",
        "",
        "killed by SIGABRT (absurd length)",
        &["absurd length", "a text of 9223372036854775807 bytes"],
    );
}

#[test]
fn throwing_across_the_boundary() {
    let lab = Lab::new(&["a: {kind: throw, plugin: throwing}"]);
    let plugin = lab.dir.path().join("libretort_throwing.so");
    crate::lab::compile("throwing.cpp", &[], &plugin);
    let dir = lab.dir.path().to_str().unwrap();
    lab.run(&["--plugin-dir", dir])
        .expect(100)
        .saying(&["killed by SIGABRT (exception)", "must catch all of its own"]);
}

#[test]
fn failing_in_a_thread() {
    check(
        "thread_fails",
        "",
        "killed by SIGABRT",
        &["gave up (abort)"],
    );
}

#[test]
fn text_that_is_no_utf8_is_repaired() {
    let lab = Lab::new(&["a: {kind: do, act: mangled}"]);
    lab.run(&[])
        .expect(0)
        .saying(&["\u{fffd}\u{fffd} is no UTF-8"]);
}

#[test]
fn calling_after_the_end_changes_nothing() {
    let lab = Lab::new(&["a: {kind: do, act: late}", "b: {kind: do, input: a}"]);
    lab.run(&[]).expect(0);
    assert_eq!(lab.attempt("a").reason.as_deref(), Some("succeeded"));
}

#[test]
fn answering_nonsense() {
    check(
        "babble",
        "",
        "failed: internal",
        &["the plugin's answer to `run` is invalid"],
    );
}

#[test]
fn failing_with_nonsense() {
    check("babble_error", "", "failed: internal", &["status 77"]);
}

#[test]
fn promising_too_much() {
    check(
        "promise",
        "",
        "protocol error",
        &["artifact 5, which was not committed"],
    );
}

#[test]
fn leaving_an_artifact_half_made() {
    check("litter", "", "failed: internal", &["stopped half-way"]);
}

#[test]
fn hanging_past_the_deadline() {
    check(
        "hang",
        ", timeout: 1s",
        "timeout",
        &["exceeded its timeout of 1s", "was ended with SIGTERM"],
    );
}

#[test]
fn hanging_whatever_is_sent() {
    check(
        "hang_hard",
        // It has to ignore SIGTERM before the signal comes, on a busy machine too.
        ", timeout: 10s",
        "timeout",
        &["was ended with SIGKILL"],
    );
}

#[test]
fn stopping_at_the_deadline_keeps_the_checkpoint() {
    let lab = Lab::new(&["a: {kind: do, act: wait, flag: released, timeout: 1s}"]);
    lab.run(&[])
        .expect(100)
        .saying(&["timeout", "stopped at a checkpoint"]);
    assert_eq!(lab.attempt("a").reason.as_deref(), Some("timeout"));
    lab.release();
    lab.run(&["--set", "a.timeout=1h"])
        .expect(0)
        .saying(&["continuing from a checkpoint"]);
}

#[test]
fn a_worker_killed_from_outside() {
    let lab = Lab::new(&["a: {kind: do, act: hang}"]);
    let running = lab.start(&[]);
    let worker = lab.wait_for_worker("a");
    signal_process(worker, 9);
    running.end().expect(100);
    assert_eq!(
        lab.attempt("a").reason.as_deref(),
        Some("killed by SIGKILL")
    );
}

#[test]
fn what_a_stage_has_started_ends_with_it() {
    let lab = Lab::new(&[]);
    let flag = lab.dir.path().join("child");
    lab.recipe(&[&format!(
        "a: {{kind: do, act: hang_with_child, flag: {}}}",
        flag.display()
    )]);
    let running = lab.start(&["--grace", "100ms"]);
    let child: u32 = wait_for("the child", || {
        std::fs::read_to_string(&flag).ok()?.parse().ok()
    });
    running.signal(2);
    running.end().expect(130);
    wait_until_gone(child);
}

#[test]
fn a_plugin_s_own_objections_come_before_any_work() {
    let lab = Lab::new(&["a: {kind: do}", "b: {kind: do, act: nothing, input: a}"]);
    lab.run(&[])
        .expect(3)
        .saying(&["doing nothing is not an act"]);
    assert!(
        lab.latest()
            .is_none_or(|run| run.stages.iter().all(|stage| stage.attempts.is_empty()))
    );
}

#[test]
fn usage_is_recorded() {
    let lab = Lab::new(&["a: {kind: do}"]);
    lab.run(&[]).expect(0);
    let usage = lab.attempt("a").usage;
    assert!(
        usage.max_rss.unwrap() > 1 << 20 && usage.cpu_seconds.unwrap() >= 0.0,
        "{usage:?}"
    );
}
