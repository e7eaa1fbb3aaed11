//! Sweeps: grids, random points, shared stages, failures, interruptions, successive halving, other stores.

use serde_json::Value;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use crate::lab::{CommandOutput, Lab, block_on, wait_for};

const INTERRUPT: i32 = 2;

/// Two stages that all points share, and one that differs.
const SHARED: [&str; 3] = [
    "base: {kind: do, text: base}",
    "work: {kind: do, act: work, amount: 2, input: base}",
    "end: {kind: do, input: work}",
];

fn sweep(lab: &Lab) -> Value {
    lab.retort(&["sweep", "show", "--json"]).expect(0).json()
}

/// A sweep's records of its points.
fn of_points(sweep: &Value, key: &str) -> Vec<Value> {
    let points = sweep["points"].as_array().unwrap();
    points.iter().map(|point| point[key].clone()).collect()
}

/// The number of attempts of a stage in the store.
fn attempts(lab: &Lab, stage: &str) -> u64 {
    let sql = format!("select count(*) as n from v_attempts where stage = '{stage}'");
    lab.retort(&["query", &sql, "--json"]).expect(0).json()[0]["n"]
        .as_u64()
        .unwrap()
}

#[track_caller]
fn check_refused(lab: &Lab, arguments: &[&str], code: i32, said: &[&str]) -> CommandOutput {
    let refused = lab.run(arguments).expect(code).saying(said);
    assert_eq!(lab.entries("work"), [""; 0]);
    assert!(!lab.store_dir().exists(), "a store was made for it");
    refused
}

#[test]
fn a_grid_runs_every_combination_and_shared_stages_once() {
    let lab = Lab::new(&SHARED);
    let axes = ["--sweep", "end.rate=1,2,3", "--sweep", "end.text=a,b"];
    let plan = lab
        .retort(&[&["plan", "r.yaml"], axes.as_slice()].concat())
        .expect(0);
    assert!(
        plan.stdout.contains("6 runs, 8 stages to run, 10 shared"),
        "{}",
        plan.stdout
    );
    let said = lab.run(&axes).expect(0);
    assert!(
        said.stderr.contains("6 runs, 8 stages to run, 10 shared"),
        "{}",
        said.stderr
    );
    assert_eq!((attempts(&lab, "base"), attempts(&lab, "work")), (1, 1));
    assert_eq!(attempts(&lab, "end"), 6);
    let sweep = sweep(&lab);
    let settings = of_points(&sweep, "settings");
    assert_eq!(settings[1], serde_json::json!(["end.rate=1", "end.text=b"]));
    assert_eq!(settings[5], serde_json::json!(["end.rate=3", "end.text=b"]));
    assert!(
        of_points(&sweep, "state")
            .iter()
            .all(|state| state == "succeeded")
    );

    // A point is an ordinary run, found as one.
    let id = sweep["id"].as_str().unwrap();
    let filter = format!("sweep = {id} and point > 4 and params.end.rate = 3");
    let listed = lab.retort(&["runs", "list", "--where", &filter, "--json"]);
    let listed = listed.expect(0).json();
    assert_eq!(listed.as_array().unwrap().len(), 2);
    assert_eq!(listed[0]["sweep"]["id"], id);
    let shown = lab.retort(&["runs", "show", "latest"]).expect(0).stdout;
    assert!(shown.contains(&format!("{id}, point 6")), "{shown}");
    lab.retort(&["runs", "list", "--where", "swep = x"])
        .expect(2)
        .saying(&["did you mean `sweep`?"]);
    let views = "select w.points, w.succeeded, count(*) as n from v_sweeps w join v_points p on p.sweep = w.id
                 join v_runs r on r.id = p.run and r.sweep = w.id and r.point = p.point group by w.id";
    let row = &lab.retort(&["query", views, "--json"]).expect(0).json()[0];
    for column in ["points", "succeeded", "n"] {
        assert_eq!(row[column], 6, "{column}");
    }

    // The second time there is nothing to do, and no new sweep.
    lab.run(&axes)
        .expect(0)
        .saying(&["nothing to do: 6 of 6 points done"]);
    assert_eq!(
        lab.retort(&["sweep", "list", "--json"])
            .json()
            .as_array()
            .unwrap()
            .len(),
        1
    );
    // Without its runs it is gone.
    let runs: Vec<String> = of_points(&sweep, "run")
        .iter()
        .map(|run| run.as_str().unwrap().to_owned())
        .collect();
    let mut remove: Vec<&str> = vec!["runs", "rm"];
    remove.extend(runs.iter().map(String::as_str));
    lab.retort(&remove).expect(0);
    lab.retort(&["sweep", "show"])
        .expect(4)
        .saying(&["no sweep matches"]);
}

#[test]
fn concurrent_points_do_not_make_a_stage_twice() {
    let lab = Lab::new(&[
        "base: {kind: do, text: base}",
        "work: {kind: do, act: wait, flag: released, input: base}",
        "end: {kind: do, input: work}",
    ]);
    let mut running = lab.start(&["--sweep", "end.rate=1..4", "--jobs", "3"]);
    running.wait_for_words("another run works on the same stage");
    lab.release();
    running.end().expect(0);
    assert_eq!((attempts(&lab, "base"), attempts(&lab, "work")), (1, 1));
    assert_eq!(attempts(&lab, "end"), 4);
}

#[test]
fn drawn_points_are_those_of_their_seed() {
    let lab = Lab::new(&SHARED);
    let drawn = |seed: &str| {
        let plan = lab.retort(&[
            "plan",
            "r.yaml",
            "--json",
            "--sweep",
            "end.rate=log:0.001..10",
            "--sweep",
            "end.text=a,b,c",
            "--sample",
            "5",
            "--sample-seed",
            seed,
        ]);
        of_points(&plan.expect(0).json(), "settings")
    };
    let first = drawn("1");
    assert_eq!(first.len(), 5);
    assert_eq!(first, drawn("1"));
    assert_ne!(first, drawn("2"));
}

#[test]
fn a_failed_point_does_not_end_the_others_and_is_made_up_for() {
    let lab = Lab::new(&[
        "base: {kind: do, text: base}",
        "end: {kind: do, act: fail_unless_flag, flag: /nonexistent, input: base}",
    ]);
    let flag = lab.dir.path().join("flag");
    let axis = format!("end.flag=/,{},/tmp", flag.display());
    let arguments = ["--sweep", axis.as_str()];
    let said = lab.run(&arguments).expect(100);
    said.saying(&[
        "1 of 3 points failed",
        "retort resume s",
        "the flag is not there",
    ]);
    let states = |lab: &Lab| of_points(&sweep(lab), "state");
    assert_eq!(states(&lab), ["succeeded", "failed", "succeeded"]);
    std::fs::write(&flag, "").unwrap();
    // By its id, by the command that started it, or as the latest.
    let id = sweep(&lab)["id"].as_str().unwrap().to_owned();
    lab.retort(&["resume", &id[..8]]).expect(0).saying(&[
        "2 of 3 points done",
        "1 run, 1 stage to run, 1 shared",
        "3 of 3 points succeeded (1 of them now)",
    ]);
    assert_eq!(states(&lab), ["succeeded"; 3]);
    assert_eq!(attempts(&lab, "end"), 4);
    lab.run(&arguments).expect(0).saying(&["nothing to do"]);
    lab.retort(&["resume"]).expect(0).saying(&["nothing to do"]);
    lab.retort(&["resume", "szzz"])
        .expect(4)
        .saying(&["no run matches `szzz`"]);
}

#[test]
fn an_interrupted_sweep_goes_on_where_it_was() {
    let lab = Lab::new(&[
        "base: {kind: do, act: wait, flag: released, text: long}",
        "end: {kind: do, input: base}",
    ]);
    let arguments = ["--sweep", "end.rate=1,2,3", "--jobs", "2"];
    let mut running = lab.start(&arguments);
    running.wait_for_words("waiting for it");
    lab.run(&arguments)
        .expect(2)
        .saying(&["is under way", "once nothing else runs it"]);
    running.signal(INTERRUPT);
    let said = running.end().expect(130);
    assert_eq!(said.stderr.matches("press Ctrl-C again").count(), 1);
    said.saying(&["0 of 3 points done", "stopped at a checkpoint"]);
    let states = of_points(&sweep(&lab), "state");
    assert_eq!(
        states,
        [
            Value::from("interrupted"),
            "interrupted".into(),
            Value::Null
        ]
    );
    lab.release();
    lab.retort(&["resume"])
        .expect(0)
        .saying(&["continuing sweep s", "continuing from a checkpoint"]);
    assert_eq!(of_points(&sweep(&lab), "state"), ["succeeded"; 3]);
    assert_eq!(
        (lab.entries("staging"), lab.entries("work")),
        (vec![], vec![])
    );
}

/// A recipe with a complete sweep section and 1.2 s of work.
fn lab_with_section(section: &str) -> Lab {
    lab_that_works(section, "act: work, amount: 12")
}

/// Its work goes on until it is released: it is stopped at a rung, however long the runner takes for that.
fn lab_with_rungs() -> Lab {
    lab_that_works(ASHA, HELD)
}

const HELD: &str = "act: wait, flag: released";

fn lab_that_works(section: &str, act: &str) -> Lab {
    let lab = Lab::new(&[]);
    let text = format!(
        "version: 1\nbackend: faulty\nsweep:\n{section}stages:\n  base: {{kind: do, text: base}}\n  \
         work: {{kind: do, {act}, input: base}}\n  end: {{kind: do, input: work}}\n"
    );
    std::fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
    lab
}

/// Runs the sweep of a lab with rungs. Only its best point finally runs without a rung: its work may end once it has a value.
#[track_caller]
fn halve(lab: &Lab) -> CommandOutput {
    let mut running = lab.start(&["--sweep"]);
    running.wait_for_words("point 2 of 4: run ");
    let sql = "select count(*) as n from v_metrics where stage = 'work' and run = (select id from v_runs order by started desc limit 1)";
    wait_for("a value", || {
        let said = lab.retort(&["query", sql, "--json"]).expect(0);
        (said.json()[0]["n"].as_u64()? > 0).then_some(())
    });
    lab.release();
    running.end().expect(0)
}

/// So far apart that the lead of a point that was stopped later does not matter.
const ASHA: &str = "  parameters:\n    work.rate: [4000, 1000, 3000, 2000]\n  objective: {metric: tick, goal: min}\n  \
     asha: {metric: work/tick, rungs: [1, 3]}\n";

#[test]
fn halving_stops_the_worse_half_and_resumes_the_better() {
    let lab = lab_with_rungs();
    halve(&lab).saying(&[
        "up to step 1",
        "continuing from a checkpoint",
        "3 stopped early",
    ]);
    let shown = sweep(&lab);
    let rungs: Vec<usize> = of_points(&shown, "rungs")
        .iter()
        .map(|rungs| rungs.as_array().unwrap().len())
        .collect();
    // Rate 1000 is the best, rate 2000 the next; the others never see the second rung.
    assert_eq!(rungs, [1, 2, 1, 2]);
    assert_eq!(shown["best"], 2);
    let states = of_points(&shown, "state");
    assert_eq!(
        states,
        ["interrupted", "succeeded", "interrupted", "interrupted"]
    );
    // They were judged by the series at the rung: rate + step / 2.
    let first = |point: usize| of_points(&shown, "rungs")[point][0].as_f64().unwrap();
    assert_eq!(
        [first(0), first(1), first(2), first(3)],
        [4000.5, 1000.5, 3000.5, 2000.5]
    );
    let best = lab.retort(&["sweep", "best", "--command"]).expect(0);
    assert_eq!(best.stdout, "retort run r.yaml --set work.rate=1000\n");
    // Nothing is left to decide.
    lab.run(&["--sweep"]).expect(0).saying(&["nothing to do"]);
    // Points that are judged at rungs need no separate objective.
    let section = ASHA.replace("  objective: {metric: tick, goal: min}\n", "");
    let judged = lab_that_works(&section, HELD);
    halve(&judged);
    let best = judged.retort(&["sweep", "best", "--command"]).expect(0);
    assert_eq!(best.stdout, "retort run r.yaml --set work.rate=1000\n");

    // Without an interruption the best point's run has the same bytes.
    let other = lab_with_rungs();
    other.release();
    other.run(&["--set", "work.rate=1000"]).expect(0);
    for hash in other.entries("artifacts") {
        assert!(lab.entries("artifacts").contains(&hash), "{hash}");
    }
}

#[test]
fn the_best_point_is_found_shown_and_drawn() {
    let lab = lab_with_section(
        "  parameters: {work.rate: {min: 1, max: 3, int: true}, end.text: [\"a<b\", b]}\n",
    );
    lab.run(&["--sweep", "--objective", "max:work/tick", "--jobs", "2"])
        .expect(0);
    let best = lab.retort(&["sweep", "best", "--json"]).expect(0).json();
    assert_eq!(best[0]["settings"][0], "work.rate=3");
    assert_eq!(best[0]["objective"], 8.5);
    let least = lab.retort(&[
        "sweep",
        "best",
        "--objective",
        "work/tick",
        "-n",
        "2",
        "--format",
        "csv",
    ]);
    let least = least.expect(0).stdout;
    assert_eq!(least.lines().count(), 3, "{least}");
    assert!(
        least.lines().nth(1).unwrap().ends_with("6.5,1,a<b"),
        "{least}"
    );
    lab.retort(&["sweep", "best", "--objective", "tock"])
        .expect(4)
        .saying(&["no run has a metric `tock`", "did you mean"]);
    let drawn = lab.retort(&["sweep", "plot"]).expect(0).stdout;
    let braille = |c: char| ('\u{2801}'..='\u{28ff}').contains(&c);
    assert!(drawn.contains(braille), "{drawn}");
    assert!(drawn.contains("work/tick over work.rate"), "{drawn}");
    let svg = lab
        .retort(&["sweep", "plot", "--svg", "-"])
        .expect(0)
        .stdout;
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    assert_eq!(svg.matches("<circle").count(), 12);
    assert!(!svg.contains("a<b"));
    // The command runs the point again, and reuses everything.
    let command = lab.retort(&["sweep", "best", "--command"]).expect(0).stdout;
    assert_eq!(
        command,
        "retort run r.yaml --set work.rate=3 --set 'end.text=a<b'\n"
    );
    lab.run(&["--set", "work.rate=3", "--set", "end.text=a<b"])
        .expect(0)
        .saying(&["succeeded"]);
    assert_eq!(attempts(&lab, "work"), 3);
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_runs() {
    let lab = Lab::new(&SHARED);
    for (arguments, code, said) in [
        (
            vec!["--sweep", "wrok.rate=1,2"],
            3,
            vec!["did you mean `work`?", "point 1 of 2"],
        ),
        (
            vec!["--sweep", "work.rte=1,2"],
            3,
            vec!["unknown option `rte`", "did you mean `rate`?"],
        ),
        (
            vec!["--sweep", "work.rate=1,x"],
            3,
            vec!["expected a number", "point 2 of 2 (work.rate=x)"],
        ),
        (
            vec!["--sweep", "work.act=succeed,nothing"],
            3,
            vec!["doing nothing is not an act", "point 2 of 2"],
        ),
        (
            vec!["--sweep", "seed=1..1000000000"],
            2,
            vec!["the grid has 1000000000 points", "--sample"],
        ),
        (
            vec!["--sweep", "seed=1..1000", "--sweep", "work.rate=1..1000"],
            2,
            vec!["1000000 points (1000 x 1000)"],
        ),
        (vec!["--sweep", "seed=1,1"], 2, vec!["`1` is there twice"]),
        (vec!["--sweep", "seed"], 2, vec!["a `=` is missing"]),
        (
            vec!["--sweep", "seed=0.1..1"],
            2,
            vec!["a grid cannot have all numbers"],
        ),
        (vec!["--sweep"], 2, vec!["has no `sweep:` section"]),
        (vec!["--sample", "3"], 2, vec!["--sweep"]),
        (
            vec!["--sweep", "seed=1,2", "--force"],
            2,
            vec!["exclude each other"],
        ),
        (
            vec!["--sweep", "seed=1,2", "--asha", "tick", "--rungs", "3,2"],
            2,
            vec!["rise"],
        ),
        (
            vec!["--sweep", "seed=1,2", "--from", "nowhere"],
            4,
            vec!["no such stage"],
        ),
    ] {
        check_refused(&lab, &arguments, code, &said);
    }
    let lab =
        lab_with_section("  parameters:\n    work.rate: {min: 3, max: 1}\n    seed: {mni: 1}\n");
    check_refused(
        &lab,
        &["--sweep"],
        3,
        &["r.yaml:6:12", "did you mean `min`?"],
    );
    let lab = lab_with_section("  parameters:\n    work.rate: {min: 3, max: 1}\n");
    check_refused(
        &lab,
        &["--sweep"],
        3,
        &["r.yaml:5:5", "3 is not less than 1"],
    );
    check_refused(&lab, &[], 3, &["3 is not less than 1"]);
}

#[test]
fn a_sweep_cannot_be_left_to_a_cluster() {
    let lab = Lab::new(&SHARED);
    let said = ["--detach and a sweep exclude each other", "tmux"];
    check_refused(&lab, &["--sweep", "end.rate=1,2", "--detach"], 2, &said);
    lab.run(&["--sweep", "end.rate=1,2"]).expect(0);
    let id = sweep(&lab)["id"].as_str().unwrap().to_owned();
    lab.retort(&["resume", &id, "--detach"])
        .expect(2)
        .saying(&said);
}

/// A store with a sweep of two points, exported.
fn exported() -> (Lab, String) {
    let lab = lab_with_rungs();
    halve(&lab);
    let file = lab.dir.path().join("runs.db").to_str().unwrap().to_owned();
    lab.retort(&["runs", "export", "-o", &file]).expect(0);
    (lab, file)
}

#[test]
fn another_store_takes_a_sweep_over() {
    let (lab, file) = exported();
    let there = Lab::new(&[]);
    for _ in 0..2 {
        there.retort(&["runs", "import", &file]).expect(0);
        let (ours, theirs) = (sweep(&lab), sweep(&there));
        for key in ["id", "definition", "recipe_text", "best"] {
            assert_eq!(ours[key], theirs[key], "{key}");
        }
        for key in ["settings", "run", "state", "rungs", "objective"] {
            assert_eq!(of_points(&ours, key), of_points(&theirs, key), "{key}");
        }
    }
    // A single run brings its sweep, whose other points have no runs yet.
    let one = Lab::new(&[]);
    let file = lab.dir.path().join("one.db").to_str().unwrap().to_owned();
    lab.retort(&["runs", "export", "latest", "-o", &file])
        .expect(0);
    one.retort(&["runs", "import", &file]).expect(0);
    let states = of_points(&sweep(&one), "state");
    assert_eq!(states.len(), 4);
    assert!(
        states.contains(&Value::Null) && states.contains(&"succeeded".into()),
        "{states:?}"
    );
}

#[test]
fn a_file_cannot_change_a_sweep_or_bring_a_wrong_one() {
    let (lab, file) = exported();
    let changed = |statements: &str| {
        let copy = lab.dir.path().join("changed.db");
        std::fs::copy(&file, &copy).unwrap();
        block_on(async {
            let options = SqliteConnectOptions::new()
                .filename(&copy)
                .foreign_keys(false);
            let mut connection = options.connect().await.unwrap();
            sqlx::raw_sql(AssertSqlSafe(statements.to_owned()))
                .execute(&mut connection)
                .await
                .unwrap_or_else(|error| panic!("{statements}: {error}"));
            connection.close().await.unwrap();
        });
        copy.to_str().unwrap().to_owned()
    };
    for (statements, said) in [
        ("update sweeps set id = 'x'", "`id` of its table `sweeps`"),
        (
            "update sweeps set definition = '{}'",
            "`definition` of its table `sweeps`",
        ),
        (
            "update sweeps set settings = '{}'",
            "`settings` of its table `sweeps`",
        ),
        ("update sweeps set points = 9", "the points of its sweep"),
        (
            "delete from sweep_points where point = 2",
            "the points of its sweep",
        ),
        (
            "update sweep_points set settings = '3'",
            "`settings` of its table `sweep_points`",
        ),
        ("update runs set point = 7", "the points of its sweep"),
        ("update runs set point = -1", "`point` of its table `runs`"),
        ("update runs set point = null", "the points of its sweep"),
        (
            "update runs set sweep = 99",
            "refers to one of `sweeps` that is not there",
        ),
        (
            "insert into sweep_rungs values (1, 9, 0, 1.0)",
            "the points of its sweep",
        ),
        (
            "update sweeps set recipe = char(27) || '[2J'",
            "`recipe` of its table `sweeps`",
        ),
    ] {
        let there = Lab::new(&[]);
        there
            .retort(&["runs", "import", &changed(statements)])
            .expect(2)
            .saying(&[said, "nothing was imported"]);
    }
    // An existing sweep with the same name and other content does not change.
    let other = changed(
        "update sweeps set recipe_text = 'other'; update runs set id = substr(id, 1, 9) || 'z'",
    );
    let before = sweep(&lab);
    lab.retort(&["runs", "import", &other]).expect(0);
    let after = sweep(&lab);
    assert_eq!(of_points(&after, "run"), of_points(&before, "run"));
    assert_eq!(after["recipe_text"], before["recipe_text"]);
    let strangers = lab.retort(&["runs", "list", "-n", "0", "--where", "not sweep", "--json"]);
    assert!(!strangers.expect(0).json().as_array().unwrap().is_empty());
}

#[test]
fn a_run_of_a_sweep_that_is_taken_up_alone_stays_its_point() {
    let lab = lab_with_rungs();
    halve(&lab);
    let stopped = of_points(&sweep(&lab), "run")[3]
        .as_str()
        .unwrap()
        .to_owned();
    lab.retort(&["resume", &stopped]).expect(0);
    let states = of_points(&sweep(&lab), "state");
    assert_eq!(states[3], "succeeded", "{states:?}");
    wait_for("the end", || {
        lab.latest().filter(|run| run.summary.sweep.is_some())
    });
}
