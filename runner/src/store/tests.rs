//! The store as its users see it.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

use super::*;
use crate::table::Rows;

/// Runs a test's async body against a fresh store directory.
fn check<F: Future<Output = ()>>(body: impl FnOnce(PathBuf) -> F) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(body(dir.path().join("store")));
}

pub(crate) async fn open(dir: &Path) -> Store {
    Store::open(dir, Access::ReadWrite).await.expect("a store")
}

/// The answer to a statement, all of it.
async fn ask(store: &Store, sql: &str) -> Result<Rows, StoreError> {
    let mut rows = Rows::default();
    let taken = store.query(sql, Duration::from_secs(60), |answer| {
        match answer {
            Answer::Heads(heads) => rows = Rows::new(heads),
            Answer::Row(row) => rows.push(row),
        }
        std::ops::ControlFlow::Continue(())
    });
    taken.await.map(|()| rows)
}

/// A hash, told from others by a word.
fn hash(word: &str) -> String {
    blake3::hash(word.as_bytes()).to_hex().to_string()
}

fn a_run(recipe: &str) -> NewRun {
    NewRun {
        recipe_name: recipe.into(),
        seed: u64::MAX,
        environment: json!({"host": "here"}),
        ..NewRun::default()
    }
}

fn a_stage(name: &str) -> NewStage {
    NewStage {
        name: name.into(),
        kind: "distill".into(),
        position: 0,
        plugin: PluginIdentity {
            name: "candle".into(),
            version: "1.0.0".into(),
            hash: hash("a plugin"),
        },
        device: "cpu".into(),
        dtype: "f32".into(),
        seed: 3,
        options: json!({"steps": 10}),
        inputs: vec![("/teacher".into(), "teacher".into())],
    }
}

fn an_artifact(hash: &str) -> ArtifactRecord {
    ArtifactRecord {
        hash: hash.into(),
        kind: "student".into(),
        name: "student".into(),
        size: 3,
        files: vec![ArtifactFile {
            path: "a".into(),
            size: 3,
            hash: "cd".into(),
        }],
        meta: retort_abi::ArtifactMeta {
            preview: Some("grid.png".into()),
            ..Default::default()
        },
    }
}

fn an_end(state: AttemptState, output: Option<&str>) -> AttemptEnd {
    AttemptEnd {
        state,
        reason: state.to_string(),
        message: None,
        failure: None,
        summary: json!({"steps": 10}),
        output_artifact: output.map(Into::into),
        usage: Usage {
            cpu_seconds: Some(1.5),
            max_rss: Some(1 << 20),
        },
        paused: Duration::ZERO,
    }
}

/// Points of the series `loss`.
fn losses(points: &[MetricPoint]) -> [Batch; 1] {
    [Batch {
        series: "loss".into(),
        points: points.to_vec(),
    }]
}

fn a_point(step: u64, value: f64) -> MetricPoint {
    MetricPoint {
        step,
        value,
        at: Time(1_800_000_000_000 + step.cast_signed()),
    }
}

/// A run with one stage and one attempt under way.
pub(crate) async fn begin(
    store: &Store,
    recipe: &str,
    digest: &str,
) -> (RunId, StageId, AttemptId) {
    let run = store.begin_run(&a_run(recipe)).await.expect("a run");
    let stage = store
        .add_stage(&run, &a_stage("distill"))
        .await
        .expect("a stage");
    let attempt = store
        .begin_attempt(stage, &hash(digest), &json!({"seed": "3"}), 1)
        .await
        .expect("an attempt");
    (run, stage, attempt)
}

#[test]
fn what_was_recorded_is_read_back() {
    check(|dir| async move {
        let store = open(&dir).await;
        let mut new = a_run("digits");
        new.params = vec![
            Param {
                path: "a.flag".into(),
                value: json!(true),
                origin: "default".into(),
            },
            Param {
                path: "a.list".into(),
                value: json!([1, "x"]),
                origin: "recipe:3".into(),
            },
            Param {
                path: "a.none".into(),
                value: json!(null),
                origin: "default".into(),
            },
            Param {
                path: "a.rate".into(),
                value: json!(1e-3),
                origin: "--set".into(),
            },
            Param {
                path: "a.steps".into(),
                value: json!(10),
                origin: "params".into(),
            },
            Param {
                path: "a.text".into(),
                value: json!("10"),
                origin: "derived".into(),
            },
        ];
        let run = store.begin_run(&new).await.unwrap();
        let stage = store.add_stage(&run, &a_stage("distill")).await.unwrap();
        store.add_stage(&run, &a_stage("never")).await.unwrap();
        let attempt = store
            .begin_attempt(stage, "d1", &json!({"seed": "3"}), 77)
            .await
            .unwrap();
        store
            .record_artifact(attempt, &an_artifact("h0"))
            .await
            .unwrap();
        store.record_lineage(attempt, &["h0".into()]).await.unwrap();
        let line = LogLine {
            at: Time(5),
            level: 2,
            source: LogSource::Stderr,
            text: "odd".into(),
        };
        store
            .append_log(attempt, std::slice::from_ref(&line))
            .await
            .unwrap();
        store
            .finish_attempt(attempt, &an_end(AttemptState::Succeeded, Some("h0")))
            .await
            .unwrap();
        store
            .finish_run(&run, RunState::Succeeded, None)
            .await
            .unwrap();
        store.tag_run(&run, "größte").await.unwrap();

        let detail = store.run_detail(&run).await.unwrap();
        assert_eq!(detail.summary.state, RunState::Succeeded);
        assert_eq!(detail.summary.seed, u64::MAX);
        assert_eq!(detail.summary.tags, ["größte"]);
        assert_eq!(
            detail.summary.stages,
            StageCounts {
                total: 2,
                ran: 1,
                reused: 0,
                failed: 0
            }
        );
        assert_eq!(detail.params, new.params);
        assert_eq!(detail.stages[0].state, StageState::Succeeded);
        assert_eq!(detail.stages[0].inputs, a_stage("distill").inputs);
        assert_eq!(detail.stages[0].attempts[0].usage.max_rss, Some(1 << 20));
        assert_eq!(detail.stages[1].state, StageState::Skipped);
        assert_eq!(detail.artifacts[0].artifact, an_artifact("h0"));
        assert_eq!(detail.artifacts[0].made_from, ["h0"]);
        assert!(detail.artifacts[0].is_output);
        assert_eq!(store.log(attempt).await.unwrap(), [line]);
    });
}

#[test]
fn a_success_is_found_by_its_digest_and_reused() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (_, _, failed) = begin(&store, "digits", "d1").await;
        store
            .finish_attempt(failed, &an_end(AttemptState::Failed, None))
            .await
            .unwrap();
        assert_eq!(store.find_success(&hash("d1")).await.unwrap(), None);

        let (first, _, attempt) = begin(&store, "digits", "d1").await;
        store
            .record_artifact(attempt, &an_artifact("h1"))
            .await
            .unwrap();
        store
            .append_metrics(attempt, &losses(&[a_point(1, 0.5)]))
            .await
            .unwrap();
        store
            .finish_attempt(attempt, &an_end(AttemptState::Succeeded, Some("h1")))
            .await
            .unwrap();
        let success = store
            .find_success(&hash("d1"))
            .await
            .unwrap()
            .expect("a success");
        assert_eq!((success.attempt, &success.run), (attempt, &first));
        assert_eq!(success.output, an_artifact("h1"));

        let second = store.begin_run(&a_run("digits")).await.unwrap();
        let stage = store.add_stage(&second, &a_stage("distill")).await.unwrap();
        store
            .stage_reused(stage, &hash("d1"), &json!({"seed": "4"}), attempt)
            .await
            .unwrap();
        let detail = store.run_detail(&second).await.unwrap();
        assert_eq!(detail.stages[0].state, StageState::Reused);
        assert_eq!(
            detail.stages[0]
                .reused_from
                .as_ref()
                .map(|source| &source.run),
            Some(&success.run)
        );
        assert_eq!(detail.artifacts.len(), 1);
        assert!(detail.artifacts[0].reused);
        assert_eq!(store.last_metrics(&second).await.unwrap()[0].last, 0.5);
        assert_eq!(store.list_artifacts(None).await.unwrap().len(), 1);

        let last = store
            .last_execution("digits", "distill")
            .await
            .unwrap()
            .expect("an execution");
        assert_eq!((last.run, last.components), (second, json!({"seed": "4"})));
        assert_eq!(
            store.last_execution("other", "distill").await.unwrap(),
            None
        );
    });
}

#[test]
fn nan_and_infinities_are_values() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        let values = [
            0.5,
            f64::NAN,
            f64::NEG_INFINITY,
            3.0,
            f64::INFINITY,
            f64::NAN,
        ];
        let points: Vec<_> = (0..)
            .zip(values)
            .map(|(step, value)| a_point(step, value))
            .collect();
        store
            .append_metrics(attempt, &losses(&points))
            .await
            .unwrap();
        let read = store.metric_series(&run, "distill/loss").await.unwrap();
        assert_eq!(
            format!(
                "{:?}",
                read.iter().map(|point| point.value).collect::<Vec<_>>()
            ),
            format!("{values:?}")
        );
        assert_eq!(read[3].at, points[3].at);
        let summary = &store.last_metrics(&run).await.unwrap()[0];
        assert!(summary.last.is_nan());
        assert_eq!(
            (summary.min, summary.max),
            (Some(f64::NEG_INFINITY), Some(f64::INFINITY))
        );
        let shown = serde_json::to_value(summary).unwrap();
        assert_eq!(
            (&shown["last"], &shown["min"]),
            (&json!("NaN"), &json!("-Infinity"))
        );
    });
}

#[test]
fn a_later_point_at_a_step_replaces_the_earlier() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        store
            .append_metrics(attempt, &losses(&[a_point(0, f64::NAN)]))
            .await
            .unwrap();
        // More than one statement's worth, twice.
        for round in [0.0, 1000.0] {
            let points: Vec<_> = (0..600_u32)
                .map(|step| a_point(step.into(), round + f64::from(step)))
                .collect();
            store
                .append_metrics(attempt, &losses(&points))
                .await
                .unwrap();
        }
        store
            .append_metrics(attempt, &losses(&[a_point(7, -1.0)]))
            .await
            .unwrap();
        let read = store.metric_series(&run, "loss").await.unwrap();
        assert_eq!(read.len(), 600);
        assert_eq!((read[7].value, read[599].value), (-1.0, 1599.0));
        let summary = &store.last_metrics(&run).await.unwrap()[0];
        assert_eq!((summary.last_step, summary.last), (599, 1599.0));
        assert_eq!((summary.min, summary.max), (Some(-1.0), Some(1599.0)));
    });
}

/// Numbers that look random, and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn points_in_any_order_are_kept_as_a_map_would_keep_them() {
    check(|dir| async move {
        let mut store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        let mut dice = Dice(7);
        let mut model = std::collections::BTreeMap::new();
        let mut end = 0;
        for round in 0..40_u32 {
            // Mostly onwards, sometimes back into what is there; few or many at a time.
            let count = [1, 3, 700, 1500, 9000][dice.below(5) as usize];
            let back = if round % 3 == 2 {
                dice.below(end + 1)
            } else {
                0
            };
            let start = end - back;
            let stride = 1 + dice.below(3);
            let mut points = Vec::new();
            for number in 0..count {
                let step = match round % 5 {
                    4 => start + dice.below(count * 2),
                    _ => start + number * stride,
                };
                let value = match dice.below(50) {
                    0 => f64::NAN,
                    1 => f64::INFINITY,
                    number => number as f64 / 7.0,
                };
                points.push(a_point(step, value));
                model.insert(step, value);
            }
            end = end.max(*model.keys().next_back().unwrap() + 1);
            store
                .append_metrics(attempt, &losses(&points))
                .await
                .unwrap();
            if round % 7 == 6 {
                store.close().await;
                store = open(&dir).await;
            }
        }
        let read = store.metric_series(&run, "distill/loss").await.unwrap();
        let bits = |value: f64| if value.is_nan() { 1 } else { value.to_bits() };
        let found: Vec<_> = read
            .iter()
            .map(|point| (point.step, bits(point.value)))
            .collect();
        let expected: Vec<_> = model
            .iter()
            .map(|(&step, &value)| (step, bits(value)))
            .collect();
        assert_eq!(found, expected);
        assert!(
            read.iter()
                .all(|point| point.at.0 == 1_800_000_000_000 + point.step.cast_signed())
        );
        let summary = &store.last_metrics(&run).await.unwrap()[0];
        assert_eq!(summary.points, model.len() as u64);
        assert_eq!(bits(summary.last), expected.last().unwrap().1);
        // Nothing is left behind of blocks that were packed again.
        let orphans: i64 = sqlx::query_scalar(
            "select count(*) from packs where key not in (select pack from blocks)",
        )
        .fetch_one(store.pool())
        .await
        .unwrap();
        assert_eq!(orphans, 0);
        // SQL sees the same.
        let (count, total): (i64, f64) = sqlx::query_as(
            "select count(*), sum(value) from v_metrics where value < 1000 and series = 'loss'",
        )
        .fetch_one(store.pool())
        .await
        .unwrap();
        let finite: Vec<f64> = model
            .values()
            .copied()
            .filter(|value| value.is_finite())
            .collect();
        assert_eq!(count, finite.len() as i64);
        assert!((total - finite.iter().sum::<f64>()).abs() < 1e-6 * total.abs());
    });
}

#[test]
fn a_curve_sums_up_what_is_there() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        let values: Vec<f64> = (0..200_000_u32)
            .map(|step| f64::from(step * 7919 % 1013))
            .collect();
        let points: Vec<_> = (0..)
            .zip(&values)
            .map(|(step, &value)| a_point(step, value))
            .collect();
        for points in points.chunks(30_000) {
            store
                .append_metrics(attempt, &losses(points))
                .await
                .unwrap();
        }
        for (buckets, axis) in [(10, Axis::Step), (1000, Axis::Step), (7, Axis::Time)] {
            for (from, to) in [(0, u64::MAX), (5_000, 150_001), (199_999, 199_999)] {
                let lens = Lens {
                    buckets,
                    axis,
                    from,
                    to,
                };
                let curve = store.curve(&run, "loss", lens).await.unwrap();
                assert!(!curve.is_empty() && curve.len() <= buckets as usize);
                let (first, last) = (from as usize, (to as usize).min(values.len() - 1));
                let mut next = first as u64;
                for bucket in &curve {
                    assert_eq!(bucket.first_step, next, "no gap, no overlap");
                    next = bucket.last_step + 1;
                    let inside = &values[bucket.first_step as usize..=bucket.last_step as usize];
                    assert_eq!(bucket.points, inside.len() as u64);
                    assert_eq!(bucket.min, inside.iter().copied().reduce(f64::min));
                    assert_eq!(bucket.max, inside.iter().copied().reduce(f64::max));
                    let mean = inside.iter().sum::<f64>() / inside.len() as f64;
                    assert!((bucket.mean.unwrap() - mean).abs() < 1e-9);
                }
                assert_eq!(next, last as u64 + 1);
            }
        }
        assert_eq!(
            store
                .curve(
                    &run,
                    "no",
                    Lens {
                        buckets: 5,
                        axis: Axis::Step,
                        from: 0,
                        to: 9
                    }
                )
                .await
                .unwrap(),
            []
        );
    });
}

#[test]
fn runs_are_found_by_what_they_were_and_became() {
    check(|dir| async move {
        let store = open(&dir).await;
        for (number, (recipe, steps, loss)) in [
            ("a", json!(1000), 0.5),
            ("b", json!(2000), f64::NAN),
            ("c", json!("many"), 0.25),
        ]
        .into_iter()
        .enumerate()
        {
            let mut new = a_run(recipe);
            for (path, value) in [
                ("stages.distill.steps", steps),
                ("stages.distill.fast", json!(number == 1)),
            ] {
                new.params.push(Param {
                    path: path.into(),
                    value,
                    origin: "default".into(),
                });
            }
            let run = store.begin_run(&new).await.unwrap();
            let stage = store.add_stage(&run, &a_stage("distill")).await.unwrap();
            let attempt = store
                .begin_attempt(stage, "d", &json!({}), 1)
                .await
                .unwrap();
            let points = [a_point(1, 9.0), a_point(2, loss)];
            store
                .append_metrics(attempt, &losses(&points))
                .await
                .unwrap();
            let end = if number == 0 {
                AttemptState::Failed
            } else {
                AttemptState::Succeeded
            };
            store
                .finish_attempt(attempt, &an_end(end, None))
                .await
                .unwrap();
            let state = if number == 0 {
                RunState::Failed
            } else {
                RunState::Succeeded
            };
            store
                .finish_run(&run, state, (number == 0).then_some("it fell over"))
                .await
                .unwrap();
            if number == 2 {
                store.tag_run(&run, "größte Idee").await.unwrap();
                store.note_run(&run, "100 % sure").await.unwrap();
            }
        }
        // One without anything.
        store.begin_run(&a_run("d")).await.unwrap();

        let ask = async |filter: &str, sort: &str| {
            let sort = (!sort.is_empty()).then(|| Sort {
                name: crate::filter::parse_name(sort.trim_start_matches('-')).unwrap(),
                descending: sort.starts_with('-'),
            });
            let filter = RunFilter {
                expr: Some(crate::filter::parse(filter).unwrap()),
                sort: sort.into_iter().collect(),
                ..RunFilter::default()
            };
            let found = store.list_runs(&filter).await?;
            Ok::<String, StoreError>(found.iter().rev().map(|run| run.recipe.as_str()).collect())
        };
        for (filter, expected) in [
            ("metrics.loss.last < 3", "ac"),
            ("metrics.distill/loss < 0.3 and state = succeeded", "c"),
            ("metrics.distill.loss = nan", "b"),
            ("metrics.loss.last != nan", "ac"),
            ("metrics.loss.max >= 9", "abc"),
            ("metrics.loss.points = 2", "abc"),
            ("not metrics.loss.last < 0.3", "abd"),
            ("metrics.loss", "abc"),
            ("not metrics.loss", "d"),
            ("params.distill.steps >= 1000", "ab"),
            ("params.distill.steps = many", "c"),
            ("params.distill.steps > 5", "ab"),
            ("params.distill.steps < zzz", "c"),
            ("params.distill.steps > 'a'", "c"),
            ("metrics.loss < abc", ""),
            ("metrics.loss > 'a'", ""),
            ("params.steps > 1500 or metrics.loss < 0.3", "bc"),
            ("params.stages.distill.steps != 1000", "bc"),
            ("params.fast = true", "b"),
            ("recipe in (a, c) and not recipe = a", "c"),
            ("recipe not in (a, c)", "bd"),
            ("status = failed or state = queued", "ad"),
            ("tag = 'größte Idee'", "c"),
            ("tag != 'größte Idee'", "abd"),
            ("tag ~ IDEE", "c"),
            ("tag", "c"),
            ("note ~ '100 %'", "c"),
            ("note ~ '1*sure'", "c"),
            ("error ~ fell", "a"),
            ("not error", "bcd"),
            (
                "stage = distill and kind = distill and plugin = candle and device = cpu",
                "abc",
            ),
            ("stage.distill.state = failed", "a"),
            ("env.host = here", "abcd"),
            ("age < 1h and started > 2020-01-01 and took < 10m", "abcd"),
            ("finished", "abc"),
            ("stages = 1 and reused = 0", "abc"),
        ] {
            let found = ask(filter, "")
                .await
                .unwrap_or_else(|error| panic!("{filter}: {error}"));
            assert_eq!(found, expected, "{filter}");
        }
        // What has no value comes last; here everything is turned round.
        assert_eq!(
            ask("recipe", "metrics.loss.last").await.unwrap(),
            "bdac".chars().collect::<String>()
        );
        assert_eq!(ask("recipe", "-recipe").await.unwrap(), "abcd");
        assert_eq!(ask("metrics.loss", "started").await.unwrap(), "cba");
        assert_eq!(ask("metrics.loss", "-started").await.unwrap(), "abc");
        // Rows of a name are gone through, rows of another looked up.
        assert_eq!(
            ask("metrics.loss and params.steps >= 0", "-params.steps")
                .await
                .unwrap(),
            "ab"
        );
        assert_eq!(
            ask(
                "params.steps and (metrics.loss < 0.3 or not tag)",
                "metrics.loss.max"
            )
            .await
            .unwrap(),
            "abc"
        );

        for (filter, message, hint, place) in [
            (
                "stats = failed",
                "there is no field `stats`",
                "`state`",
                0..5,
            ),
            (
                "state = faild",
                "`faild` is no state of a run",
                "`failed`",
                8..13,
            ),
            (
                "recipe = a and metrics.los < 3",
                "no run has a metric `los`",
                "`loss`",
                15..26,
            ),
            (
                "params.distill.step = 3",
                "no run has a parameter `distill.step`",
                "`distill.steps`",
                0..19,
            ),
            ("started > soon", "expected a date", "age", 10..14),
            ("took < long", "expected seconds", "", 7..11),
            ("tag < a", "expected =", "no order", 6..7),
            (
                "stage.distill.colour = red",
                "there is no column of a stage `colour`",
                "state",
                0..20,
            ),
        ] {
            let Err(StoreError::Filter(error)) = ask(filter, "").await else {
                panic!("{filter} is understood")
            };
            assert!(
                error.message.starts_with(message),
                "{filter}: {}",
                error.message
            );
            let hinted = error.hint.clone().unwrap_or_default();
            assert!(hinted.contains(hint), "{filter}: {hinted}");
            assert_eq!((&error.at, error.text.as_str()), (&place, filter));
        }
        let columns = ["metrics.loss.min", "params.distill.steps", "tag"];
        let filter = RunFilter {
            columns: columns
                .iter()
                .map(|name| crate::filter::parse_name(name).unwrap())
                .collect(),
            limit: Some(2),
            ..RunFilter::default()
        };
        let found = store.list_runs(&filter).await.unwrap();
        assert_eq!(
            json!(found[0].values),
            json!({columns[0]: null, columns[1]: null, columns[2]: null})
        );
        assert_eq!(
            json!(found[1].values),
            json!({columns[0]: 0.25, columns[1]: "many", columns[2]: "größte Idee"})
        );
    });
}

#[test]
fn names_are_any_text() {
    check(|dir| async move {
        let store = open(&dir).await;
        for name in [
            "größte 損失",
            "it's \"so\", (a) = b | c",
            "two\nlines\tand \\ more",
            "🦀\u{202e}\u{0301}",
            "a.b/c d",
            " ",
            "and",
            "%_*?",
        ] {
            let mut new = a_run(name);
            new.params.push(Param {
                path: format!("stages.{name}.steps"),
                value: json!(name),
                origin: "default".into(),
            });
            let run = store.begin_run(&new).await.unwrap();
            let stage = store.add_stage(&run, &a_stage(name)).await.unwrap();
            let attempt = store
                .begin_attempt(stage, name, &json!({}), 1)
                .await
                .unwrap();
            let batch = Batch {
                series: name.into(),
                points: vec![a_point(7, 0.5)],
            };
            store.append_metrics(attempt, &[batch]).await.unwrap();
            store.tag_run(&run, name).await.unwrap();
            store.note_run(&run, name).await.unwrap();

            // Each piece between double quotes in quotes, and the double quotes in single ones.
            let quoted = format!("\"{}\"", name.replace('"', "\"'\"'\""));
            let filter = format!(
                "recipe = {quoted} and tag = {quoted} and note = {quoted} and metrics.{quoted}.last = 0.5 \
                 and params.stages.{quoted}.steps = {quoted} and stage = {quoted} and stage.{quoted}.state = running"
            );
            let filter = RunFilter {
                expr: Some(crate::filter::parse(&filter).unwrap()),
                ..RunFilter::default()
            };
            let found = store
                .list_runs(&filter)
                .await
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(found.len(), 1, "{name}");
            assert_eq!(
                (&found[0].recipe, &found[0].tags, &found[0].note),
                (&name.to_owned(), &vec![name.to_owned()], &name.to_owned())
            );
            let points = store.metric_series(&run, name).await.unwrap();
            assert_eq!((points.len(), points[0].series.as_str()), (1, name));
            if !name.trim().is_empty() {
                assert_eq!(store.resolve_run(name).await.unwrap(), run, "{name}");
            }
        }
    });
}

/// A store with two runs, of which the second reuses a stage of the first.
async fn a_pair(store: &Store) -> (RunId, RunId) {
    let (first, _, attempt) = begin(store, "digits", "d1").await;
    let file = artifact_file(store, "some bytes");
    store.record_artifact(attempt, &file).await.unwrap();
    store
        .append_metrics(attempt, &losses(&[a_point(1, f64::NAN), a_point(2, 0.5)]))
        .await
        .unwrap();
    let line = LogLine {
        at: Time(5),
        level: 2,
        source: LogSource::Stderr,
        text: "odd".into(),
    };
    store.append_log(attempt, &[line]).await.unwrap();
    store
        .finish_attempt(attempt, &an_end(AttemptState::Succeeded, Some(&file.hash)))
        .await
        .unwrap();
    store
        .finish_run(&first, RunState::Succeeded, None)
        .await
        .unwrap();
    store.tag_run(&first, "best").await.unwrap();
    let mut new = a_run("digits");
    new.params.push(Param {
        path: "seed".into(),
        value: json!(3),
        origin: "default".into(),
    });
    let second = store.begin_run(&new).await.unwrap();
    let stage = store.add_stage(&second, &a_stage("again")).await.unwrap();
    store
        .stage_reused(stage, &hash("d1"), &json!({}), attempt)
        .await
        .unwrap();
    store
        .finish_run(&second, RunState::Succeeded, None)
        .await
        .unwrap();
    (first, second)
}

/// An artifact that lies in its place.
fn artifact_file(store: &Store, text: &str) -> ArtifactRecord {
    let staging = store.dir().join("draft");
    std::fs::create_dir_all(&staging).unwrap();
    std::fs::write(staging.join("a"), text).unwrap();
    let contents = crate::artifact::commit(&staging, &store.dir().join("artifacts")).unwrap();
    ArtifactRecord {
        hash: contents.hash,
        size: contents.size,
        files: contents.files,
        ..an_artifact("")
    }
}

#[test]
fn two_stores_are_merged_by_way_of_a_file() {
    check(|dir| async move {
        let (here, there) = (
            open(&dir.join("here")).await,
            open(&dir.join("there")).await,
        );
        let (first, second) = a_pair(&here).await;
        let own = a_pair(&there).await;
        let file = dir.join("odd name % #1?.db");
        // The one that was asked for, and the one that it takes a stage from.
        let runs = std::slice::from_ref(&second);
        let done = export(here.dir(), Some(runs), &file, true).await.unwrap();
        assert_eq!(done.runs, [first.clone(), second.clone()]);
        assert_eq!((done.artifacts.len(), done.lost.len()), (1, 0));

        std::fs::remove_dir_all(there.dir().join("artifacts")).unwrap();
        let done = there.import(&file).await.unwrap();
        assert_eq!(
            (done.runs.len(), done.known.len(), done.artifacts.len()),
            (2, 0, 1)
        );
        let again = there.import(&file).await.unwrap();
        assert_eq!(
            (again.runs.len(), again.known.len(), again.lost.len()),
            (0, 2, 0)
        );
        assert_eq!(
            there.list_runs(&RunFilter::default()).await.unwrap().len(),
            4
        );

        for run in [&first, &second] {
            // Keys are others, and what people see is the same.
            let shown = async |store: &Store| {
                let mut detail =
                    serde_json::to_value(store.run_detail(run).await.unwrap()).unwrap();
                for stage in detail["stages"].as_array_mut().unwrap() {
                    stage["id"] = 0.into();
                    if stage["reused_from"].is_object() {
                        stage["reused_from"]["attempt"] = 0.into();
                    }
                    for attempt in stage["attempts"].as_array_mut().unwrap() {
                        attempt["id"] = 0.into();
                    }
                }
                for artifact in detail["artifacts"].as_array_mut().unwrap() {
                    artifact["attempt"] = 0.into();
                }
                detail
            };
            assert_eq!(shown(&here).await, shown(&there).await);
            let points = async |store: &Store| {
                format!("{:?}", store.metric_series(run, "loss").await.unwrap())
            };
            assert_eq!(points(&here).await, points(&there).await);
            assert!(points(&there).await.contains("NaN"));
        }
        assert_eq!(there.run_log(&first, 0, 9).await.unwrap().len(), 1);
        let hash = &here.list_artifacts(None).await.unwrap()[0].artifact;
        assert_eq!(
            crate::artifact::verify(&there.dir().join("artifacts").join(&hash.hash), hash),
            []
        );
        let filter = RunFilter {
            expr: Some(crate::filter::parse("metrics.again/loss.last = 0.5").unwrap()),
            ..RunFilter::default()
        };
        assert_eq!(there.list_runs(&filter).await.unwrap().len(), 2);
        // A whole store can be taken over as well.
        let third = open(&dir.join("third")).await;
        there.close().await;
        let done = third.import(&schema::path_of(there.dir())).await.unwrap();
        assert_eq!(done.runs.len(), 4);
        assert!(done.runs.contains(&own.0));
    });
}

#[test]
fn runs_are_removed_with_everything_that_only_they_have() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (first, second) = a_pair(&store).await;
        assert_eq!(
            store
                .dependents(std::slice::from_ref(&first))
                .await
                .unwrap(),
            std::slice::from_ref(&second)
        );
        assert_eq!(
            store
                .dependents(&[first.clone(), second.clone()])
                .await
                .unwrap(),
            []
        );
        assert_eq!(store.garbage().await.unwrap().artifacts, [""; 0]);
        store.remove_runs(&[first.clone(), second]).await.unwrap();
        for table in [
            "runs",
            "documents",
            "stages",
            "attempts",
            "series",
            "blocks",
            "packs",
            "logs",
            "results",
            "params",
        ] {
            let sql = format!("select count(*) from {table}");
            let left: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
                .fetch_one(store.pool())
                .await
                .unwrap();
            assert_eq!(left, 0, "{table}");
        }
        let garbage = store.garbage().await.unwrap();
        assert_eq!(garbage.artifacts.len(), 1);
        store
            .collect_garbage(|garbage| {
                std::fs::remove_dir_all(dir.join("artifacts")).unwrap();
                garbage.artifacts.clone()
            })
            .await
            .unwrap();
        assert_eq!(store.garbage().await.unwrap().artifacts.len(), 0);

        let (alive, _, _) = begin(&store, "digits", "d2").await;
        assert!(matches!(
            store.remove_runs(&[alive]).await,
            Err(StoreError::InUse)
        ));
        let collected = store
            .collect_garbage(|_| panic!("not while a run is under way"))
            .await;
        assert!(matches!(collected, Err(StoreError::InUse)));
    });
}

#[test]
fn what_is_left_of_a_damaged_store_is_saved() {
    check(|dir| async move {
        let store = open(&dir).await;
        for number in 0..60 {
            let (run, _, attempt) = begin(&store, &format!("recipe {number}"), "d").await;
            let points: Vec<_> = (0..500)
                .map(|step| a_point(step, f64::from(number) + 0.1))
                .collect();
            store
                .append_metrics(attempt, &losses(&points))
                .await
                .unwrap();
            store
                .finish_run(&run, RunState::Succeeded, None)
                .await
                .unwrap();
        }
        store.close().await;
        let path = schema::path_of(&dir);
        let mut bytes = std::fs::read(&path).unwrap();
        // Every fifth page of the later half: in the earlier one is the schema, without which nothing can be read.
        let pages = bytes.len() / 4096;
        for page in (pages / 2..pages).step_by(5) {
            bytes[page * 4096..][..4096].fill(0xa5);
        }
        std::fs::write(&path, bytes).unwrap();

        let store = Store::open(&dir, Access::ReadOnly).await.unwrap();
        assert!(
            !store
                .problems()
                .await
                .unwrap_or(vec!["unreadable".into()])
                .is_empty()
        );
        store.close().await;
        let saved = dir.with_extension("saved");
        let done = export(&dir, None, &saved, false).await.unwrap();
        assert!(!done.lost.is_empty() && done.runs.len() > 10, "{done:?}");
        let fresh = open(&dir.with_extension("fresh")).await;
        let taken = fresh.import(&saved).await.unwrap();
        assert_eq!((taken.runs.len(), taken.lost.len()), (done.runs.len(), 0));
        assert_eq!(fresh.problems().await.unwrap(), [""; 0]);
        let runs = fresh.list_runs(&RunFilter::default()).await.unwrap();
        let mut points = 0;
        for run in &runs {
            fresh.run_detail(&run.id).await.unwrap();
            points += fresh.metric_series(&run.id, "loss").await.unwrap().len();
        }
        assert!(points > 500 * 10, "{points}");
    });
}

#[test]
fn a_store_of_the_first_schema_is_taken_along() {
    check(|dir| async move {
        schema::migrate(&dir, &schema::MIGRATIONS[..1])
            .await
            .unwrap();
        let path = schema::path_of(&dir);
        let mut old = SqliteConnectOptions::new()
            .filename(&path)
            .connect()
            .await
            .unwrap();
        let holder = lease::Holder::this_process();
        sqlx::raw_sql(
            "insert into runs (key, id, recipe, recipe_path, recipe_text, resolved, seed, command, environment, state, created)
                 values (1, 'r1', 'digits', '/r.yaml', 'text', '{\"a\": 1}', 3, '[]', '{\"host\": \"h\"}', 'running', 5);
             insert into params values (1, 'stages.distill.steps', 7, 'integer', 'default');
             insert into stages (key, run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed,
                 options, inputs, state) values (1, 1, 0, 'distill', 'k', 'p', '1', 'h', 'cpu', 'f32', 0, '{}', '[]', 'running');
             insert into attempts (key, stage, number, digest, worker_pid, state, started) values (1, 1, 1, 'd', 1, 'running', 5);
             insert into series (key, attempt, name, base, last_step, last, min, max) values (1, 1, 'loss', 100, 9999, 0.5, 0.5, 1);
             with recursive n(i) as (select 0 union all select i + 1 from n where i < 9999)
             insert into points select 1, i, case when i = 7 then null else i / 8.0 end, i * 3 from n;",
        )
        .execute(&mut old)
        .await
        .unwrap();
        sqlx::query("insert into leases values (1, ?1, ?2, ?3, ?4, ?5, 5)")
            .bind(&holder.host)
            .bind(&holder.boot)
            .bind(&holder.pid_namespace)
            .bind(holder.pid)
            .bind(holder.process_started.cast_signed())
            .execute(&mut old)
            .await
            .unwrap();
        old.close().await.unwrap();

        // An older program is at work in it.
        let refused = Store::open(&dir, Access::ReadWrite).await.unwrap_err();
        assert!(matches!(refused, StoreError::InUse), "{refused}");
        let mut old = SqliteConnectOptions::new()
            .filename(&path)
            .connect()
            .await
            .unwrap();
        sqlx::query("update leases set process_started = process_started + 1")
            .execute(&mut old)
            .await
            .unwrap();
        old.close().await.unwrap();

        let store = Store::open(&dir, Access::ReadOnly).await.unwrap();
        let run = RunId("r1".into());
        let points = store.metric_series(&run, "distill/loss").await.unwrap();
        assert_eq!(points.len(), 10_000);
        assert!(points[7].value.is_nan());
        assert_eq!(
            (points[9].step, points[9].value, points[9].at),
            (9, 9.0 / 8.0, Time(127))
        );
        assert_eq!(store.last_metrics(&run).await.unwrap()[0].points, 10_000);
        let detail = store.run_detail(&run).await.unwrap();
        assert_eq!(
            (detail.recipe_text.as_str(), detail.resolved),
            ("text", json!({"a": 1}))
        );
        assert_eq!(detail.params[0].value, json!(7));
        assert_eq!(detail.summary.state, RunState::Lost);
        let filter = RunFilter {
            expr: Some(
                crate::filter::parse("metrics.loss.last = 0.5 and params.distill.steps = 7")
                    .unwrap(),
            ),
            ..RunFilter::default()
        };
        assert_eq!(store.list_runs(&filter).await.unwrap().len(), 1);
        // Rows go with their run.
        store.close().await;
        let store = open(&dir).await;
        store.remove_runs(&[run]).await.unwrap();
        let left: i64 = sqlx::query_scalar(
            "select (select count(*) from params) + (select count(*) from results) + (select count(*) from packs)",
        )
        .fetch_one(store.pool())
        .await
        .unwrap();
        assert_eq!(left, 0);

        let backup = dir.join("history.schema1.backup.db");
        let mut backup = SqliteConnectOptions::new()
            .filename(backup)
            .connect()
            .await
            .unwrap();
        let kept: i64 = sqlx::query_scalar("select count(*) from points")
            .fetch_one(&mut backup)
            .await
            .unwrap();
        assert_eq!(kept, 10_000);
    });
}

#[test]
fn references_resolve() {
    check(|dir| async move {
        let store = open(&dir).await;
        assert!(matches!(
            store.resolve_run("latest").await,
            Err(StoreError::NoRun { runs: 0, .. })
        ));
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(store.begin_run(&a_run("digits")).await.unwrap());
        }
        store.tag_run(&ids[0], "best").await.unwrap();
        store.tag_run(&ids[1], "best").await.unwrap();
        let whole = ids[0].0.to_uppercase();
        for (reference, expected) in [
            ("latest", 2),
            ("latest~", 1),
            ("latest~1", 1),
            ("latest~2", 0),
            ("best", 1),
            (&whole, 0),
        ] {
            assert_eq!(
                store.resolve_run(reference).await.unwrap(),
                ids[expected],
                "{reference}"
            );
        }
        for reference in ["latest~3", "latest~x", "", "%", "zzzz", "né"] {
            assert!(
                matches!(
                    store.resolve_run(reference).await,
                    Err(StoreError::NoRun { .. })
                ),
                "{reference}"
            );
        }
        // The ids of one moment begin alike.
        let shared = &ids[0].0[..3];
        let Err(StoreError::AmbiguousRun { candidates, .. }) = store.resolve_run(shared).await
        else {
            panic!("{shared} is ambiguous")
        };
        assert_eq!(candidates.len(), 3);
    });
}

#[test]
fn lists_are_filtered() {
    check(|dir| async move {
        let store = open(&dir).await;
        for (recipe, state) in [
            ("a", RunState::Succeeded),
            ("b", RunState::Failed),
            ("a", RunState::Failed),
        ] {
            let run = store.begin_run(&a_run(recipe)).await.unwrap();
            store.finish_run(&run, state, None).await.unwrap();
        }
        let count = async |filter: RunFilter| store.list_runs(&filter).await.unwrap().len();
        assert_eq!(count(RunFilter::default()).await, 3);
        assert_eq!(
            count(RunFilter {
                limit: Some(2),
                ..RunFilter::default()
            })
            .await,
            2
        );
        assert_eq!(
            count(RunFilter {
                states: vec![RunState::Failed],
                ..RunFilter::default()
            })
            .await,
            2
        );
        let both = RunFilter {
            states: vec![RunState::Failed],
            recipe: Some("a".into()),
            ..RunFilter::default()
        };
        assert_eq!(count(both).await, 1);
    });
}

/// Not a test of its own: the runner of a run, in a process that the test below can kill.
#[test]
fn child_that_begins_a_run() {
    let Some(dir) = std::env::var_os("RETORT_TEST_CHILD_STORE") else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let store = open(Path::new(&dir)).await;
        begin(&store, "digits", "d1").await;
    });
    writeln!(std::io::stdout(), "begun").expect("a parent that listens");
    // Until killed, or until the test that started it is gone.
    let _ = std::io::Read::read(&mut std::io::stdin(), &mut [0]);
}

fn start_child(dir: &Path) -> std::process::Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "store::tests::child_that_begins_a_run",
            "--nocapture",
        ])
        .env("RETORT_TEST_CHILD_STORE", dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this very program");
    let mut said = std::io::BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("begun") {
        line.clear();
        assert_ne!(
            std::io::BufRead::read_line(&mut said, &mut line).unwrap(),
            0,
            "the child ended early"
        );
    }
    child
}

#[test]
fn the_run_of_a_killed_runner_is_lost() {
    check(|dir| async move {
        let mut child = start_child(&dir);
        let reader = Store::open(&dir, Access::ReadOnly).await.unwrap();
        assert_eq!(
            reader.list_runs(&RunFilter::default()).await.unwrap()[0].state,
            RunState::Running
        );
        child.kill().unwrap();
        child.wait().unwrap();

        let lost = &reader.list_runs(&RunFilter::default()).await.unwrap()[0];
        assert_eq!(lost.state, RunState::Lost);
        assert!(lost.finished.is_some());
        let detail = reader.run_detail(&lost.id).await.unwrap();
        assert_eq!(detail.stages[0].state, StageState::Lost);
        assert_eq!(detail.stages[0].attempts[0].state, AttemptState::Lost);
        // And it is written down, not only shown.
        let stored: String = sqlx::query_scalar("select state from v_runs")
            .fetch_one(reader.pool())
            .await
            .unwrap();
        assert_eq!(stored, "lost");

        // Somebody was mistaken: the holder was only slow.
        let store = open(&dir).await;
        store.heartbeat(&lost.id).await.unwrap();
        let stored = async || -> String {
            let state = sqlx::query_scalar("select state from v_runs");
            state.fetch_one(store.pool()).await.unwrap()
        };
        assert_eq!(stored().await, "running");
        // So it is with a run of which nothing has begun.
        sqlx::raw_sql("delete from attempts; update runs set state = 'lost'")
            .execute(store.pool())
            .await
            .unwrap();
        store.heartbeat(&lost.id).await.unwrap();
        assert_eq!(stored().await, "queued");
    });
}

#[test]
fn a_lost_run_is_shown_where_it_cannot_be_written_down() {
    check(|dir| async move {
        let mut child = start_child(&dir);
        child.kill().unwrap();
        child.wait().unwrap();
        // Another writer keeps the store locked.
        let writer = open(&dir).await;
        let locked = writer.write().await.unwrap();
        let reader = Store::open(&dir, Access::ReadOnly).await.unwrap();
        let lost = RunFilter {
            states: vec![RunState::Lost],
            ..RunFilter::default()
        };
        let running = RunFilter {
            states: vec![RunState::Running],
            ..RunFilter::default()
        };
        let found = reader.list_runs(&lost).await.unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].finished.is_some());
        assert_eq!(reader.list_runs(&running).await.unwrap(), []);
        drop(locked);
    });
}

#[test]
fn a_reader_reads_beside_a_writer_and_cannot_write() {
    check(|dir| async move {
        let writer = open(&dir).await;
        writer.begin_run(&a_run("digits")).await.unwrap();
        let mut open_transaction = writer.write().await.unwrap();
        sqlx::query("delete from runs")
            .execute(&mut *open_transaction)
            .await
            .unwrap();
        let reader = Store::open(&dir, Access::ReadOnly).await.unwrap();
        assert_eq!(
            reader.list_runs(&RunFilter::default()).await.unwrap().len(),
            1
        );
        assert!(matches!(
            reader.begin_run(&a_run("x")).await,
            Err(StoreError::ReadOnly { .. })
        ));
        assert!(
            sqlx::query("delete from runs")
                .execute(reader.pool())
                .await
                .is_err()
        );
    });
}

#[test]
fn a_statement_is_answered_and_cannot_write() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        store
            .append_metrics(
                attempt,
                &losses(&[a_point(1, f64::INFINITY), a_point(2, f64::NAN)]),
            )
            .await
            .unwrap();
        let answer = ask(&store, "select run, stage, step, value, x'00ff' as bytes, null as gap from v_metrics order by step")
            .await
            .unwrap();
        assert_eq!(
            answer.objects(),
            json!([
                {"run": run.0, "stage": "distill", "step": 1, "value": "Infinity", "bytes": "00ff", "gap": null},
                {"run": run.0, "stage": "distill", "step": 2, "value": null, "bytes": "00ff", "gap": null},
            ])
        );
        // No rows still have heads.
        let none = ask(&store, "select id, state from v_runs where false")
            .await
            .unwrap();
        assert_eq!(none.render(crate::table::Style::Csv), "id,state\n");

        let elsewhere = dir.join("elsewhere.db").display().to_string();
        for statement in [
            "delete from runs".to_owned(),
            "pragma query_only = off; delete from runs".to_owned(),
            format!("attach database '{elsewhere}' as elsewhere; create table elsewhere.t (a)"),
            "no sql".to_owned(),
            "select * from no_table".to_owned(),
        ] {
            let answer = ask(&store, &statement).await;
            assert!(
                matches!(answer, Err(StoreError::Sql(_))),
                "{statement}: {answer:?}"
            );
        }
        assert!(!Path::new(&elsewhere).exists());
        assert_eq!(
            store.list_runs(&RunFilter::default()).await.unwrap().len(),
            1
        );
    });
}

#[test]
fn every_view_can_be_asked() {
    check(|dir| async move {
        let store = open(&dir).await;
        begin(&store, "digits", "d1").await;
        let views = ask(&store, "select name from sqlite_schema where type = 'view'")
            .await
            .unwrap();
        assert!(views.len() >= 10);
        for view in views.objects().as_array().unwrap() {
            let view = view["name"].as_str().unwrap();
            ask(&store, &format!("select * from {view}")).await.unwrap();
        }
    });
}

/// 64 processes and 16 tasks of this one open a store at once, and begin a run each.
async fn crowd(dir: &Path) -> HashSet<RunId> {
    let mut children: Vec<_> = (0..64)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "store::tests::child_that_begins_a_run"])
                .env("RETORT_TEST_CHILD_STORE", dir)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .expect("this very program")
        })
        .collect();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let dir = dir.to_owned();
        tasks.spawn(async move { open(&dir).await.begin_run(&a_run("task")).await.unwrap() });
    }
    let mut ids: HashSet<_> = tasks.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), 16);
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    let runs = open(dir).await.list_runs(&RunFilter::default()).await;
    ids.extend(runs.unwrap().into_iter().map(|run| run.id));
    ids
}

#[test]
fn many_processes_open_one_new_store_at_once() {
    check(|dir| async move { assert_eq!(crowd(&dir).await.len(), 80) });
}

#[test]
fn many_processes_migrate_one_old_store_at_once() {
    check(|dir| async move {
        schema::migrate(&dir, &schema::MIGRATIONS[..1])
            .await
            .unwrap();
        let path = schema::path_of(&dir);
        let mut old = SqliteConnectOptions::new()
            .filename(&path)
            .connect()
            .await
            .unwrap();
        sqlx::raw_sql(
            "insert into runs (key, id, recipe, recipe_path, recipe_text, resolved, seed, command, environment, state, created)
                 values (1, 'r1', 'digits', '/r.yaml', 'text', '{}', 3, '[]', '{}', 'succeeded', 5);
             insert into stages (key, run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed,
                 options, inputs, state) values (1, 1, 0, 'distill', 'k', 'p', '1', 'h', 'cpu', 'f32', 0, '{}', '[]', 'succeeded');
             insert into attempts (key, stage, number, digest, worker_pid, state, started) values (1, 1, 1, 'd', 1, 'succeeded', 5);
             insert into series (key, attempt, name, base, last_step, last, min, max) values (1, 1, 'loss', 100, 99999, 0.5, 0.5, 1);
             with recursive n(i) as (select 0 union all select i + 1 from n where i < 99999)
             insert into points select 1, i, i / 8.0, i * 3 from n;",
        )
        .execute(&mut old)
        .await
        .unwrap();
        old.close().await.unwrap();

        assert_eq!(crowd(&dir).await.len(), 81);
        let store = open(&dir).await;
        let points = store.metric_series(&RunId("r1".into()), "loss").await;
        assert_eq!(points.unwrap().len(), 100_000);
        // Copied once, as it was: whoever came second found the work done.
        let copies = std::fs::read_dir(&dir).unwrap().filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().contains("backup")
        });
        assert_eq!(copies.count(), 1);
        let mut backup = SqliteConnectOptions::new()
            .filename(dir.join("history.schema1.backup.db"))
            .connect()
            .await
            .unwrap();
        let kept: (i64, i64) =
            sqlx::query_as("select (select count(*) from runs), (select count(*) from points)")
                .fetch_one(&mut backup)
                .await
                .unwrap();
        assert_eq!(kept, (1, 100_000));
    });
}

#[test]
fn an_older_schema_is_migrated_and_a_newer_one_refused() {
    check(|dir| async move {
        let mood = "alter table runs add column mood text not null default 'fine'";
        let later = &[schema::MIGRATIONS, &[mood]].concat();
        let store = open(&dir).await;
        let run = store.begin_run(&a_run("digits")).await.unwrap();
        store
            .finish_run(&run, RunState::Succeeded, None)
            .await
            .unwrap();
        store.close().await;
        schema::migrate(&dir, later).await.unwrap();
        schema::migrate(&dir, later).await.unwrap();

        let path = schema::path_of(&dir);
        let mut connection = SqliteConnectOptions::new()
            .filename(&path)
            .connect()
            .await
            .unwrap();
        let (id, mood): (String, String) = sqlx::query_as("select id, mood from runs")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        assert_eq!((id, mood), (run.0, "fine".to_owned()));
        let newest = schema::newest(schema::MIGRATIONS);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = Store::open(&dir, access).await.unwrap_err();
            let StoreError::NewerSchema { found, known, .. } = error else {
                panic!("{error}")
            };
            assert_eq!((found, known), (newest + 1, newest));
        }
    });
}

#[test]
fn a_migration_that_fails_leaves_the_store_as_it_was() {
    check(|dir| async move {
        open(&dir).await.close().await;
        let broken = &[
            schema::MIGRATIONS,
            &["drop table logs; drop table no_such_table"],
        ];
        assert!(schema::migrate(&dir, &broken.concat()).await.is_err());
        let store = open(&dir).await;
        assert_eq!(store.log(AttemptId(1)).await.unwrap(), []);
    });
}

#[test]
fn what_is_no_store_is_told_apart() {
    check(|dir| async move {
        let missing = Store::open(&dir, Access::ReadOnly).await.unwrap_err();
        assert!(matches!(missing, StoreError::Missing { .. }), "{missing}");
        assert!(!dir.exists(), "reading makes nothing");

        std::fs::create_dir(&dir).unwrap();
        let path = schema::path_of(&dir);
        std::fs::write(
            &path,
            "no database, but long enough to be taken for one by its size. ".repeat(40),
        )
        .unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = Store::open(&dir, access).await.unwrap_err();
            assert!(matches!(error, StoreError::NotAStore { .. }), "{error}");
        }

        std::fs::remove_file(&path).unwrap();
        let foreign = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true);
        let mut connection = foreign.connect().await.unwrap();
        sqlx::query("create table cooking_recipes (name text)")
            .execute(&mut connection)
            .await
            .unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = Store::open(&dir, access).await.unwrap_err();
            assert!(matches!(error, StoreError::NotAStore { .. }), "{error}");
        }
    });
}

#[test]
fn a_file_in_the_place_of_the_directory_is_named() {
    check(|dir| async move {
        std::fs::write(&dir, "a file").unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = Store::open(&dir, access).await.unwrap_err();
            assert!(
                matches!(error, StoreError::Io { .. } | StoreError::Missing { .. }),
                "{error}"
            );
            assert!(error.to_string().contains("store"), "{error}");
        }
    });
}

#[test]
fn descriptions_are_kept_by_the_hash_of_the_plugin() {
    check(|dir| async move {
        let store = open(&dir).await;
        let description = retort_abi::Description {
            name: "candle".into(),
            version: "1.0.0".into(),
            summary: String::new(),
            license: String::new(),
            devices: vec!["cpu".into()],
            dtypes: vec!["f32".into()],
            families: Vec::new(),
            libraries: Vec::new(),
            stages: Vec::new(),
        };
        store.cache_description("ab", &description).await.unwrap();
        assert_eq!(
            store.cached_description("ab").await.unwrap(),
            Some(description)
        );
        assert_eq!(store.cached_description("cd").await.unwrap(), None);
    });
}

#[test]
fn a_full_disk_ends_neither_a_connection_nor_what_comes_after() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, stage, attempt) = begin(&store, "digits", "d1").await;
        let limit = async |pages: i64| {
            // A limit is of a connection: each of the pool gets it.
            let mut all = Vec::new();
            for _ in 0..4 {
                all.push(store.pool().acquire().await.unwrap());
            }
            for connection in &mut all {
                let limit = format!("pragma max_page_count = {pages}");
                let limit = sqlx::query(sqlx::AssertSqlSafe(limit));
                limit.execute(&mut **connection).await.unwrap();
            }
            // They go back by themselves, a little later: until then a fresh one without a limit would be opened.
            let limited = all.len();
            drop(all);
            while store.pool().num_idle() < limited {
                tokio::task::yield_now().await;
            }
        };
        limit(1).await;
        let line = |text: String| LogLine {
            at: Time(5),
            level: 3,
            source: LogSource::Plugin,
            text,
        };
        for _ in 0..4 {
            let long = [line("x".repeat(200_000))];
            let full = store.append_log(attempt, &long).await;
            assert!(matches!(full, Err(StoreError::Full)), "{full:?}");
        }
        // The connections are others by now, and none of them believes to be in a transaction.
        for _ in 0..8 {
            store
                .append_log(attempt, &[line("short".into())])
                .await
                .unwrap();
            store.heartbeat(&run).await.unwrap();
        }
        store
            .finish_attempt(attempt, &an_end(AttemptState::Failed, None))
            .await
            .unwrap();
        store
            .begin_attempt(stage, "d2", &json!({}), 1)
            .await
            .unwrap();
        assert_eq!(store.run_log(&run, 0, 99).await.unwrap().len(), 8);
        assert_eq!(store.problems().await.unwrap(), [""; 0]);
    });
}

#[test]
fn a_transaction_that_ends_early_leaves_nothing_and_a_good_connection() {
    check(|dir| async move {
        let store = open(&dir).await;
        for _ in 0..10 {
            let mut write = store.write().await.unwrap();
            let broken = sqlx::query("insert into runs (key) values (1)").execute(&mut *write);
            assert!(broken.await.is_err());
            drop(write);
            let mut write = store.write().await.unwrap();
            // As SQLite does by itself when the disk fails.
            sqlx::query("rollback").execute(&mut *write).await.unwrap();
            assert!(write.commit().await.is_err());
        }
        begin(&store, "digits", "d1").await;
        assert_eq!(
            store.list_runs(&RunFilter::default()).await.unwrap().len(),
            1
        );
    });
}

#[test]
fn the_latest_run_is_the_last_one_recorded() {
    check(|dir| async move {
        let store = open(&dir).await;
        let mut runs = Vec::new();
        for _ in 0..3 {
            runs.push(begin(&store, "digits", "d1").await.0);
        }
        // The clock was set back by a day before the last one, and was a day ahead in the second.
        for (run, days) in [(&runs[1], 1_i64), (&runs[2], -1)] {
            let moved = sqlx::query("update runs set created = created + ?2 where id = ?1");
            let moved = moved.bind(&run.0).bind(days * 86_400_000);
            moved.execute(store.pool()).await.unwrap();
        }
        for (reference, run) in [("latest", 2), ("latest~1", 1), ("latest~2", 0)] {
            assert_eq!(store.resolve_run(reference).await.unwrap(), runs[run]);
        }
        for run in &runs {
            store.tag_run(run, "mine").await.unwrap();
        }
        assert_eq!(store.resolve_run("mine").await.unwrap(), runs[2]);
        let listed = store.list_runs(&RunFilter::default()).await.unwrap();
        let listed: Vec<_> = listed.into_iter().map(|run| run.id).rev().collect();
        assert_eq!(listed, runs);
        let last = store.last_execution("digits", "distill").await.unwrap();
        assert_eq!(last.unwrap().run, runs[2]);
        let before = store.turn_before(&runs[2], "distill").await.unwrap();
        assert_eq!(before.unwrap().run, runs[1]);
    });
}
