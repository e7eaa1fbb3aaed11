//! Asking about what ran: every command, for people and for programs.

use serde_json::{Value, json};

use crate::lab::Lab;

/// A store with three runs of one recipe: it ran; half of it was reused; it failed.
fn lab() -> Lab {
    let lab = Lab::new(&[
        "a: {kind: do, text: hello}",
        "b: {kind: do, text: second, input: a}",
    ]);
    lab.run(&[]).expect(0);
    lab.run(&["--set", "b.text=third"]).expect(0);
    lab.run(&["--set", "b.act=abort"]).expect(100);
    lab
}

/// What a command prints as JSON.
#[track_caller]
fn asked(lab: &Lab, arguments: &[&str]) -> Value {
    lab.retort(&[arguments, &["--json"]].concat())
        .expect(0)
        .json()
}

#[test]
fn runs_are_listed_and_shown() {
    let lab = lab();
    let runs = asked(&lab, &["runs", "list"]);
    let states: Vec<_> = runs
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run["state"].as_str().unwrap())
        .collect();
    assert_eq!(states, ["failed", "succeeded", "succeeded"]);
    assert_eq!(
        runs[1]["stage_counts"],
        json!({"total": 2, "ran": 1, "reused": 1, "failed": 0})
    );
    assert_eq!(
        asked(&lab, &["runs", "list", "--state", "failed,lost"])
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        asked(&lab, &["runs", "list", "--recipe", "other"]),
        json!([])
    );
    lab.retort(&["runs", "list", "--state", "tired"])
        .expect(2)
        .saying(&["`tired`", "succeeded"]);
    let said = lab
        .retort(&["runs", "list", "-n", "1", "--format", "csv"])
        .expect(0);
    assert_eq!(said.stdout.lines().count(), 2, "{}", said.stdout);
    assert!(said.stderr.contains("--limit 0"), "{}", said.stderr);

    let run = asked(&lab, &["runs", "show", "latest~1"]);
    assert_eq!(run["id"], runs[1]["id"]);
    assert_eq!(run["stages"][0]["reused_from"]["run"], runs[2]["id"]);
    let of = |path: &str| {
        run["params"]
            .as_array()
            .unwrap()
            .iter()
            .find(|param| param["path"] == path)
            .unwrap()
            .clone()
    };
    assert_eq!(
        of("stages.b.text"),
        json!({"path": "stages.b.text", "value": "third", "origin": "--set"})
    );
    assert_eq!(of("stages.a.text")["origin"], "recipe:4");
    assert!(run["environment"]["retort"].is_string());
    let shown = lab.retort(&["runs", "show"]).expect(0).stdout;
    for text in [
        "Stages",
        "killed by SIGABRT",
        "Parameters",
        "Environment",
        "Artifacts",
        "Things",
    ] {
        assert!(shown.contains(text), "`{text}` is missing in:\n{shown}");
    }
    assert!(!shown.contains('\x1b'), "colours in a pipe");
}

#[test]
fn what_does_not_exist_is_exit_4() {
    let lab = lab();
    for arguments in [
        &["runs", "show", "latest~9"] as &[_],
        &["metrics", "zzz"],
        &["metrics", "latest~1", "no_such_series"],
        &["artifacts", "verify", "ffffffffff"],
        &["compare", "latest", "zzz"],
    ] {
        lab.retort(arguments).expect(4);
    }
    let unused = Lab::new(&[]);
    unused
        .retort(&["runs", "show"])
        .expect(4)
        .saying(&["no store"]);
    assert_eq!(asked(&unused, &["runs", "list"]), json!([]));
    assert!(!unused.store_dir().exists(), "asking makes nothing");
}

#[test]
fn metrics_are_those_of_the_stages_even_when_reused() {
    let lab = lab();
    let series = asked(&lab, &["metrics", "latest~1"]);
    let names: Vec<_> = series
        .as_array()
        .unwrap()
        .iter()
        .map(|series| (&series["stage"], &series["reused"]))
        .collect();
    assert!(names.contains(&(&json!("a"), &json!(true))), "{series}");
    let name = series[0]["series"].as_str().unwrap();
    let points = asked(&lab, &["metrics", "latest~1", &format!("a/{name}")]);
    assert_eq!(points[0]["stage"], "a");
    assert_eq!(
        points.as_array().unwrap().last().unwrap()["value"],
        series[0]["last"]
    );
}

#[test]
fn only_what_differs_is_compared() {
    let lab = lab();
    let compared = asked(&lab, &["compare", "latest~1", "latest~2"]);
    let rows = compared["rows"].as_array().unwrap();
    let names: Vec<_> = rows
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["stages.b.text"]);
    assert_eq!(rows[0]["values"], json!(["third", "second"]));
}

#[test]
fn artifacts_are_listed_and_damage_is_found() {
    let lab = lab();
    let artifacts = asked(&lab, &["artifacts", "list"]);
    assert_eq!(artifacts.as_array().unwrap().len(), 3);
    assert_eq!(
        asked(&lab, &["artifacts", "list", "latest"])
            .as_array()
            .unwrap()
            .len(),
        1
    );
    lab.retort(&["artifacts", "verify"])
        .expect(0)
        .saying(&["3 artifacts verified, 0 damaged"]);

    let artifact = &artifacts[0];
    let file = lab
        .store_dir()
        .join("artifacts")
        .join(artifact["hash"].as_str().unwrap());
    let file = file.join(artifact["files"][0]["path"].as_str().unwrap());
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[0] ^= 1;
    // Artifacts are read-only; what damages them does not ask.
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, bytes).unwrap();
    let said = lab.retort(&["artifacts", "verify", "--json"]).expect(1);
    assert_eq!(said.json().as_array().unwrap().len(), 1);
    assert_eq!(
        (&said.json()[0]["hash"], &said.json()[0]["problem"]),
        (&artifact["hash"], &json!("changed"))
    );
}

#[test]
fn questions_in_sql_are_answered_and_change_nothing() {
    let lab = lab();
    let sql = "select state, count(*) as runs from v_runs group by state order by state";
    assert_eq!(
        asked(&lab, &["query", "--sql", sql]),
        json!([{"state": "failed", "runs": 1}, {"state": "succeeded", "runs": 2}])
    );
    lab.retort(&["query", "delete from runs"])
        .expect(2)
        .saying(&["readonly"]);
    assert!(
        lab.retort(&["query"])
            .expect(0)
            .stdout
            .contains("v_metrics")
    );
}
