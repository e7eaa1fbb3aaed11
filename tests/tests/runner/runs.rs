//! Successful runs, and what is reused afterwards.

use retort::store::{Access, RunState, Store};

use crate::lab::{Lab, block_on};

const CHAIN: [&str; 3] = [
    "a: {kind: do, text: one}",
    "b: {kind: do, text: two, input: a}",
    "c: {kind: do, text: three, input: b}",
];

#[test]
fn a_run_ends_with_its_tables_and_a_second_one_reuses_them() {
    let lab = Lab::new(&CHAIN);
    let first = lab
        .run(&[])
        .expect(0)
        .saying(&["a: started (cpu", "c: done in", "succeeded in"]);
    for text in ["Things", "three", "thing.txt", "ran"] {
        assert!(first.stdout.contains(text), "{}", first.stdout);
    }
    assert_eq!(lab.entries("artifacts").len(), 3);
    assert_eq!(
        (lab.entries("staging"), lab.entries("work")),
        (vec![], vec![])
    );
    let second = lab.run(&[]).expect(0);
    assert!(
        second
            .stdout
            .starts_with("nothing to do: 3 of 3 stages reused\n"),
        "{}",
        second.stdout
    );
    assert!(second.stdout.contains("Things"), "{}", second.stdout);
    let detail = lab.latest().unwrap();
    assert_eq!(
        (detail.summary.state, detail.summary.stages.reused),
        (RunState::Succeeded, 3)
    );
}

#[test]
fn the_report_is_one_json_document() {
    let lab = Lab::new(&CHAIN);
    let document = lab.run(&["--json"]).expect(0).json();
    assert_eq!(document["state"], "succeeded");
    assert_eq!(document["stages"][1]["name"], "b");
    assert_eq!(document["tables"][2]["rows"][0][0], "three");
    let picture = document["previews"][0]["path"].as_str().unwrap();
    assert!(
        std::fs::read_to_string(picture)
            .unwrap()
            .starts_with("one ")
    );
}

#[test]
fn what_has_changed_runs_again_and_nothing_else() {
    let lab = Lab::new(&CHAIN);
    lab.run(&[]).expect(0);
    let check =
        |arguments: &[&str], expected: [&str; 3]| assert_eq!(lab.outcomes(arguments), expected);
    check(&["--set", "b.text=new"], ["a reused", "b ran", "c ran"]);
    check(
        &["--set", "b.flag=other"],
        ["a reused", "b ran", "c reused"],
    );
    check(&["--force=b"], ["a reused", "b ran", "c reused"]);
    check(&["--force"], ["a ran", "b ran", "c ran"]);
    check(&["--set", "seed=7"], ["a ran", "b ran", "c ran"]);
}

#[test]
fn files_are_part_of_what_a_stage_is() {
    let lab = Lab::new(&["a: {kind: do, file: data.txt}"]);
    lab.run(&[])
        .expect(3)
        .saying(&["data.txt", "does not exist", "r.yaml:4"]);
    assert!(lab.latest().is_none(), "nothing was begun");
    let data = lab.dir.path().join("data.txt");
    std::fs::write(&data, "1").unwrap();
    assert_eq!(lab.outcomes(&[]), ["a ran"]);
    assert_eq!(lab.outcomes(&[]), ["a reused"]);
    std::fs::write(&data, "2").unwrap();
    assert_eq!(lab.outcomes(&[]), ["a ran"]);
}

#[test]
fn damaged_results_are_not_reused() {
    let lab = Lab::new(&CHAIN[..1]);
    lab.run(&[]).expect(0);
    let hash = lab.entries("artifacts").pop().unwrap();
    std::fs::remove_file(
        lab.store_dir()
            .join("artifacts")
            .join(hash)
            .join("thing.txt"),
    )
    .unwrap();
    assert_eq!(lab.outcomes(&[]), ["a ran"]);
    assert_eq!(lab.outcomes(&[]), ["a reused"]);
}

#[test]
fn parts_of_a_recipe() {
    let lab = Lab::new(&CHAIN);
    lab.run(&["--from", "b"])
        .expect(4)
        .saying(&["`a` is left out by --from"]);
    assert_eq!(lab.outcomes(&["--until", "b"]), ["a ran", "b ran"]);
    assert_eq!(
        lab.outcomes(&["--from", "c"]),
        ["a reused", "b reused", "c ran"]
    );
    lab.run(&["--from", "x"])
        .expect(4)
        .saying(&["there is no such stage"]);
}

#[test]
fn independent_stages_run_side_by_side() {
    let lab = Lab::new(&[
        "a: {kind: do, act: wait, flag: released, text: a}",
        "b: {kind: do, act: wait, flag: released, text: b}",
        "c: {kind: do, input: a, other: b}",
    ]);
    let running = lab.start(&["--jobs", "2"]);
    // Neither ends before both have started.
    lab.wait_for_worker("a");
    lab.wait_for_worker("b");
    lab.release();
    running.end().expect(0);
    let (a, b, c) = (lab.attempt("a"), lab.attempt("b"), lab.attempt("c"));
    assert!(a.started < b.finished.unwrap() && b.started < a.finished.unwrap());
    assert!(c.started >= a.finished.unwrap() && c.started >= b.finished.unwrap());
}

#[test]
fn after_a_failure_the_rest_runs_only_if_asked() {
    let lab = Lab::new(&[
        "a: {kind: do, act: fail}",
        "b: {kind: do, text: b, input: a}",
        "c: {kind: do, text: c}",
        "d: {kind: do, text: d, input: b}",
    ]);
    lab.run(&[]).expect(100).saying(&[
        "failed: bad_data",
        "the data are bad",
        "this was asked for",
        "1 of 4 stages failed",
    ]);
    assert_eq!(
        lab.outcomes(&[]),
        ["a failed", "b skipped", "c not reached", "d skipped"]
    );
    assert_eq!(
        lab.outcomes(&["--keep-going"]),
        ["a failed", "b skipped", "c ran", "d skipped"]
    );
    let detail = lab.latest().unwrap();
    assert_eq!(detail.summary.state, RunState::Failed);
    assert!(
        detail
            .summary
            .error
            .unwrap()
            .contains("a: failed: bad_data")
    );
}

#[test]
fn a_failed_run_is_taken_up_again() {
    let lab = Lab::new(&[
        "a: {kind: do, text: a}",
        "b: {kind: do, input: a, act: fail_unless_flag, flag: FLAG}",
    ]);
    let flag = lab.dir.path().join("flag");
    let set = format!("b.flag={}", flag.display());
    lab.run(&["--set", &set]).expect(100);
    std::fs::write(&flag, "").unwrap();
    let document = lab.retort(&["resume", "--json"]).expect(0).json();
    assert_eq!(
        (
            &document["stages"][0]["outcome"],
            &document["stages"][1]["outcome"]
        ),
        (&"reused".into(), &"ran".into())
    );
}

#[test]
fn metrics_are_kept_whatever_their_values() {
    let lab = Lab::new(&[
        "a: {kind: do, act: nan}",
        "b: {kind: do, act: threads, text: b}",
    ]);
    lab.run(&[]).expect(0);
    let run = lab.latest().unwrap().summary.id;
    let (losses, points) = block_on(async {
        let store = Store::open(&lab.store_dir(), Access::ReadOnly)
            .await
            .unwrap();
        let losses = store.metric_series(&run, "loss").await.unwrap();
        let points = store.metric_series(&run, "threads").await.unwrap();
        (
            losses
                .into_iter()
                .map(|point| point.value)
                .collect::<Vec<f64>>(),
            points.len(),
        )
    });
    assert!(
        losses[0].is_nan() && losses[1..] == [f64::INFINITY, f64::NEG_INFINITY],
        "{losses:?}"
    );
    assert_eq!(points, 1000);
}

#[test]
fn talkative_stages_neither_hang_nor_flood() {
    let lab = Lab::new(&["a: {kind: do, act: talk, amount: 60000}"]);
    let said = lab.run(&[]).expect(0);
    assert!(
        said.stderr.len() < 4096,
        "what stages print is shown on request only"
    );
}
