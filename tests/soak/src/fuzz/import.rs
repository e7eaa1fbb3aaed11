//! Files for `runs import`: a valid export, changed by SQL or by bytes, or cut; or arbitrary bytes.
//!
//! Invariants afterwards, for any file: the previous artifacts exist, each artifact's directory has the content that its name
//! says, nothing was written beside the store, no run is running, the history is sound, and an export of it contains no file of
//! this machine.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use retort::artifact;
use retort::store::{
    Access, ArtifactRecord, AttemptEnd, AttemptState, Batch, MetricPoint, NewRun, NewStage,
    RecordedPlugin, RunFilter, RunState, Store, Time, Usage, export,
};
use serde_json::json;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{Target, statement};

pub const IMPORT: Target = Target {
    name: "import",
    exercise,
    tokens: &[
        b"sql update runs set ",
        b"sql update artifacts set ",
        b"sql update exported_files set ",
        b"sql update attempts set ",
        b"sql update stages set ",
        b"sql update blocks set ",
        b"sql update packs set data = zeroblob(100000)\n",
        b"sql update leases set ",
        b"sql insert into leases select * from leases\n",
        b"sql delete from ",
        b"sql drop table ",
        b"sql create view ",
        b"sql create trigger ",
        b"sql alter table ",
        b"byte ",
        b"cut ",
        b"'../../../escape'",
        b"'/etc/hostname'",
        b"x'ff00'",
        b"char(0)",
        b"char(27)",
        b"9e999",
        b"-9223372036854775808",
        b"null",
        b" artifact = ",
        b" path = ",
        b" hash = ",
        b" files = ",
        b" id = ",
        b" state = 'running'",
        b" state = 'queued'",
        b" output = ",
        b" digest = ",
        b" as with recursive n(k) as (select 1 union all select k + 1 from n) select ",
    ],
    mend: Some(statement::add),
    examples: None,
};

/// What no export may contain: the content of a file beside the store.
const SECRET: &str = "what lies beside the store is nobody's business";

/// Stores and a valid export, made once per thread.
struct TestStore {
    runtime: Runtime,
    home: TempDir,
}

impl TestStore {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let home = super::folder();
        let at = |name: &str| home.path().join(name);
        runtime.block_on(async {
            make_store(&at("sound"), "own").await;
            make_store(&at("other"), "foreign").await;
            export(&at("other"), None, &at("good.db"), true)
                .await
                .expect("an export");
        });
        fs::remove_dir_all(at("other")).expect("a folder");
        Self { runtime, home }
    }
}

fn exercise(bytes: &[u8]) -> String {
    thread_local! {
        static BED: TestStore = TestStore::new();
    }
    BED.with(|bed| bed.runtime.block_on(exercise_in(bed.home.path(), bytes)))
}

async fn exercise_in(home: &Path, bytes: &[u8]) -> String {
    let at = |name: &str| home.join(name);
    let lab = at("lab");
    let _ = fs::remove_dir_all(&lab);
    fs::create_dir(&lab).expect("a folder");
    fs::write(lab.join("secret"), SECRET).expect("a file");
    let (file, store_dir) = (lab.join("hostile.db"), lab.join("store"));
    if bytes.starts_with(b"SQLite format 3\0") {
        fs::write(&file, bytes).expect("a file");
    } else {
        fs::copy(at("good.db"), &file).expect("a copy");
        change(&file, &String::from_utf8_lossy(bytes)).await;
    }
    copy(&at("sound"), &store_dir);
    let before = names(&store_dir.join("artifacts"));

    let store = Store::open(&store_dir, Access::ReadWrite)
        .await
        .expect("a store");
    let outcome = match store.import(&file).await {
        Ok(done) => format!(
            "{} {} {} {}",
            done.runs.len(),
            done.known.len(),
            done.artifacts.len(),
            done.lost.join("\n")
        ),
        Err(error) => error.to_string(),
    };
    check(&store, &before).await;
    store.close().await;
    let mut beside = names(&lab);
    beside.retain(|name| !name.starts_with("hostile.db"));
    assert_eq!(
        beside,
        ["secret", "store"],
        "nothing is written beside the store"
    );
    // Only imported content can be exported again.
    if !outcome.starts_with("0 ") {
        let given = lab.join("given.db");
        if export(&store_dir, None, &given, true).await.is_ok() {
            let given = fs::read(&given).expect("an export");
            let secret = SECRET.as_bytes();
            let leaked = given.windows(secret.len()).any(|window| window == secret);
            assert!(!leaked, "an export holds a file from outside the store");
        }
    }
    outcome
}

/// Checks the invariants after an import.
async fn check(store: &Store, before: &[String]) {
    let artifacts = store.dir().join("artifacts");
    let after = names(&artifacts);
    for name in before {
        assert!(after.contains(name), "an artifact that was there is gone");
    }
    for name in &after {
        let contents = artifact::contents(&artifacts.join(name)).expect("an artifact can be read");
        assert_eq!(
            contents.hash, *name,
            "an artifact is not what its name says"
        );
    }
    let entries = names(store.dir());
    let leaving = |name: &&String| name.starts_with('.') && *name != ".gitignore";
    let left: Vec<&String> = entries.iter().filter(leaving).collect();
    assert!(left.is_empty(), "leavings: {left:?}");
    assert_eq!(
        store.problems().await.expect("the history can be read"),
        [""; 0]
    );
    let runs = store.list_runs(&RunFilter::default()).await.expect("runs");
    assert!(
        runs.iter().any(|run| run.recipe == "own"),
        "the store's own run is there"
    );
    for run in runs {
        assert!(
            !matches!(run.state, RunState::Queued | RunState::Running),
            "a run is {} and nobody is behind it",
            run.state
        );
        assert!(
            !run.id.0.contains(['/', '\0']),
            "an id that names a path: {}",
            run.id
        );
    }
}

/// Applies the lines to a copy of a valid export. Impossible changes are skipped.
async fn change(file: &Path, lines: &str) {
    let mut statements = Vec::new();
    let mut bytes = Vec::new();
    for line in lines.lines().take(64) {
        match line.split_once(' ') {
            Some(("sql", statement)) => statements.push(statement),
            Some(("byte" | "cut", _)) => bytes.push(line),
            _ => {}
        }
    }
    if !statements.is_empty()
        && let Ok(mut connection) = connect(file).await
    {
        for statement in statements {
            // SQLite takes a NUL for the end, and the library would ask forever for the rest.
            let statement = statement.split('\0').next().unwrap_or_default();
            // Not under test here, and endless.
            let harmless = !statement.contains("recursive") || statement.starts_with("create ");
            if harmless {
                let _ = sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_owned()))
                    .execute(&mut connection)
                    .await;
            }
        }
        let _ = connection.close().await;
    }
    let Ok(open) = fs::OpenOptions::new().write(true).open(file) else {
        return;
    };
    for line in bytes {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["byte", at, value] => {
                let (at, value) = (at.parse::<u64>(), u64::from_str_radix(value, 16));
                if let (Ok(at @ ..1_048_576), Ok(value)) = (at, value) {
                    open.write_all_at(&value.to_be_bytes(), at).expect("a file");
                }
            }
            ["cut", length] => {
                if let Ok(length @ ..1_048_576) = length.parse() {
                    open.set_len(length).expect("a file");
                }
            }
            _ => {}
        }
    }
}

async fn connect(file: &Path) -> sqlx::Result<SqliteConnection> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .foreign_keys(false)
        .pragma("writable_schema", "on")
        // Files up to eight megabytes suffice, and larger ones take long to write.
        .pragma("max_page_count", "2000")
        .pragma("journal_mode", "off")
        .pragma("synchronous", "off");
    let mut connection = options.connect().await?;
    // A statement is ended after a hundred steps of a thousand instructions.
    let mut left = 100;
    let mut handle = connection.lock_handle().await?;
    handle.set_progress_handler(1000, move || {
        left -= 1;
        left > 0
    });
    drop(handle);
    Ok(connection)
}

/// A store with a run of two stages, an artifact with two files, and some points.
async fn make_store(dir: &Path, recipe: &str) {
    let store = Store::open(dir, Access::ReadWrite).await.expect("a store");
    let staging = dir.join("staging").join(recipe);
    fs::create_dir_all(staging.join("deep")).expect("a folder");
    fs::write(staging.join("a.txt"), recipe).expect("a file");
    fs::write(staging.join("deep/b.bin"), [7; 3000]).expect("a file");
    fs::create_dir_all(dir.join("artifacts")).expect("a folder");
    let contents = artifact::commit(&staging, &dir.join("artifacts")).expect("an artifact");
    let _ = fs::remove_dir_all(dir.join("staging"));
    let run = NewRun {
        recipe_name: recipe.into(),
        recipe_text: "version: 1\n".into(),
        resolved: json!({"stages": {"a": {"steps": 3}}}),
        environment: json!({"host": "here"}),
        ..NewRun::default()
    };
    let run = store.begin_run(&run).await.expect("a run");
    for (position, name) in ["a", "b"].into_iter().enumerate() {
        let stage = NewStage {
            name: name.into(),
            kind: "distill".into(),
            position,
            plugin: RecordedPlugin::default(),
            device: "cpu".into(),
            dtype: "f32".into(),
            seed: 3,
            options: json!({"steps": 10}),
            inputs: Vec::new(),
        };
        let stage = store.add_stage(&run, &stage).await.expect("a stage");
        let digest = format!("{recipe}-{name}");
        let attempt = store
            .begin_attempt(stage, &digest, &json!({}), 1)
            .await
            .expect("an attempt");
        let points = (0..20).map(|step| MetricPoint {
            step,
            value: 1.0 / step as f64,
            at: Time(1_800_000_000_000),
        });
        let batch = Batch {
            series: "loss".into(),
            points: points.collect(),
        };
        store
            .append_metrics(attempt, &[batch])
            .await
            .expect("points");
        let record = ArtifactRecord {
            hash: contents.hash.clone(),
            kind: "student".into(),
            name: name.into(),
            size: contents.size,
            files: contents.files.clone(),
            meta: Default::default(),
        };
        store
            .record_artifact(attempt, &record)
            .await
            .expect("a record");
        let end = AttemptEnd {
            state: AttemptState::Succeeded,
            reason: "succeeded".into(),
            message: None,
            failure: None,
            summary: json!({"steps": 10}),
            output_artifact: Some(contents.hash.clone()),
            usage: Usage::default(),
            paused: std::time::Duration::ZERO,
        };
        store.finish_attempt(attempt, &end).await.expect("an end");
    }
    store
        .finish_run(&run, RunState::Succeeded, None)
        .await
        .expect("an end");
    store.close().await;
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a folder");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

/// Copies a folder.
fn copy(from: &Path, to: &PathBuf) {
    fs::create_dir(to).expect("a folder");
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        match from.is_dir() {
            true => copy(&from, &to),
            false => drop(fs::copy(&from, &to).expect("a copy")),
        }
    }
}
