//! Stores of any size, for the benches `history` and `scale`.

use std::ops::RangeInclusive;
use std::path::Path;

use retort::store::{
    Access, AttemptId, Batch, MetricPoint, NewRun, NewStage, RecordedPlugin, RunId, Store, Time,
};
use retort_tests::clock::{Clock, Timing};
use serde_json::json;

/// A new store with a run, and an attempt of its only stage.
pub async fn open(dir: &Path) -> (Store, RunId, AttemptId) {
    let store = Store::open(dir, Access::ReadWrite).await.expect("a store");
    let new = NewRun {
        recipe_name: "bench".into(),
        environment: json!({}),
        ..NewRun::default()
    };
    let run = store.begin_run(&new).await.expect("a run");
    let stage = NewStage {
        name: "distill".into(),
        kind: "distill".into(),
        position: 0,
        plugin: RecordedPlugin::default(),
        device: "cpu".into(),
        dtype: "f32".into(),
        seed: 0,
        options: json!({}),
        inputs: Vec::new(),
    };
    let stage = store.add_stage(&run, &stage).await.expect("a stage");
    let attempt = store
        .begin_attempt(stage, "d", &json!({}), 1)
        .await
        .expect("an attempt");
    (store, run, attempt)
}

/// Points of eight series.
pub fn points(start: u64, count: u64, narrow: bool) -> Vec<Batch> {
    let names = [
        "loss", "accuracy", "rate", "norm", "time", "a/b", "c/d", "e/f",
    ];
    names
        .iter()
        .map(|name| series(name, start / 8..(start + count) / 8, narrow))
        .collect()
}

/// Values that our encoding cannot compress, one per millisecond.
pub fn series(name: &str, steps: std::ops::Range<u64>, narrow: bool) -> Batch {
    let value = |step: u64| {
        let mixed = (step ^ name.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let value = (mixed >> 11) as f64 / (1_u64 << 53) as f64;
        if narrow {
            f64::from(value as f32)
        } else {
            value
        }
    };
    let point = |step: u64| MetricPoint {
        step,
        value: value(step),
        at: Time(1_700_000_000_000 + step.cast_signed()),
    };
    Batch {
        series: name.into(),
        points: steps.map(point).collect(),
    }
}

/// Inserts runs number `runs` in bulk, as they would have been recorded: with recipes of 4 kB, 21 parameters and 6 results.
/// The numbers begin at 1; a store may grow by further calls.
pub async fn fill(store: &Store, runs: RangeInclusive<u64>) {
    let (first, last) = runs.into_inner();
    let sql = format!(
        "create temp table fresh (key integer primary key);
         with recursive n(i) as (select {first} union all select i + 1 from n where i < {last})
         insert into runs (id, recipe, recipe_path, seed, command, state, created, finished)
         select printf('z%09d', i), iif(i % 3, 'digits', 'faces'), '/r.yaml', i, '[]',
             iif(i % 7, 'succeeded', 'failed'), 1700000000000 + i * 60000, 1700000000000 + i * 60000 + 5000 from n;
         insert into fresh select key from runs where id between printf('z%09d', {first}) and printf('z%09d', {last});
         insert into documents select key, printf('%.4000c', 'x'), '{{}}', '{{}}' from fresh;
         insert into tags select key, 'baseline' from fresh where key % 10 = 0;
         with recursive n(i) as (select 1 union all select i + 1 from n where i < 20)
         insert or ignore into names (name) select printf('stages.distill.option%d', i) from n;
         insert or ignore into names (name) values ('stages.distill.steps');
         insert into params (key, value, type, origin)
         select n.key << 32 | r.key, abs(random()) % 4000, 'integer', 'default' from names n, fresh r
         where n.name like 'stages.%' order by n.key, r.key;
         insert or ignore into names (name)
         values ('fd'), ('distill/fd'), ('loss'), ('distill/loss'), ('recall'), ('distill/recall');
         insert into results (key, position, points, last, min, max)
         select key, 0, 100, x, x / 2, x * 2 from (
             select n.key << 32 | r.key as key, abs(random()) % 100000 / 10000.0 as x from names n, fresh r
             where n.name in ('fd', 'distill/fd', 'loss', 'distill/loss', 'recall', 'distill/recall')) order by key;
         drop table fresh;"
    );
    let mut write = store
        .pool()
        .begin_with("begin immediate")
        .await
        .expect("a turn");
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(&mut *write)
        .await
        .expect("rows");
    write.commit().await.expect("room");
}

/// The least of several times, without the first.
pub async fn best(mut act: impl AsyncFnMut()) -> Timing {
    act().await;
    let mut least: Option<Timing> = None;
    for _ in 0..9 {
        let clock = Clock::start();
        act().await;
        let took = clock.stop();
        if least.is_none_or(|least| took.wall < least.wall) {
            least = Some(took);
        }
    }
    least.expect("several")
}
