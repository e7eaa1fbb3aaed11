//! Statements that change a history, so that most mutated import files contain a meaningful one.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::random::Random;

/// Tables, with some of their columns.
const TABLES: [(&str, &[&str]); 15] = [
    (
        "runs",
        &[
            "key",
            "id",
            "recipe",
            "recipe_path",
            "seed",
            "command",
            "resumed_from",
            "state",
            "error",
            "created",
            "finished",
            "note",
        ],
    ),
    (
        "documents",
        &["run", "recipe_text", "resolved", "environment"],
    ),
    ("tags", &["run", "tag"]),
    ("names", &["key", "name"]),
    ("params", &["key", "value", "type", "origin"]),
    ("results", &["key", "position", "points", "last", "min"]),
    (
        "stages",
        &[
            "key",
            "run",
            "position",
            "name",
            "kind",
            "plugin",
            "device",
            "dtype",
            "options",
            "inputs",
            "state",
            "digest",
            "components",
            "reused_from",
        ],
    ),
    (
        "attempts",
        &[
            "key",
            "stage",
            "number",
            "digest",
            "worker_pid",
            "state",
            "reason",
            "message",
            "failure",
            "summary",
            "output",
            "cpu_seconds",
            "max_rss",
            "started",
            "finished",
            "paused",
        ],
    ),
    ("artifacts", &["hash", "size", "files", "created"]),
    (
        "outputs",
        &[
            "key", "attempt", "artifact", "kind", "name", "meta", "created",
        ],
    ),
    ("inputs", &["attempt", "artifact"]),
    (
        "series",
        &[
            "key",
            "attempt",
            "name",
            "base",
            "last_step",
            "last",
            "min",
            "max",
            "points",
        ],
    ),
    (
        "blocks",
        &[
            "series",
            "first_step",
            "last_step",
            "points",
            "numbers",
            "sum",
            "min",
            "first_at",
            "pack",
        ],
    ),
    ("packs", &["key", "data"]),
    ("exported_files", &["artifact", "path", "part", "data"]),
];

/// Possible new values of a column; `COLUMN` stands for its name.
const VALUES: [&str; 38] = [
    "null",
    "0",
    "1",
    "-1",
    "2",
    "9223372036854775807",
    "-9223372036854775808",
    "4294967296",
    "1e308",
    "9e999",
    "0.5",
    "''",
    "'x'",
    "'running'",
    "'queued'",
    "'succeeded'",
    "'../../../escape'",
    "'/etc/hostname'",
    "'.'",
    "'a/../b'",
    "'{}'",
    "'[]'",
    "'null'",
    "'[[[[[[[['",
    "'{\"preview\":\"../secret\"}'",
    "'[{\"path\":\"../secret\",\"size\":1,\"hash\":\"0\"}]'",
    "x''",
    "x'ff00'",
    "cast(x'ff' as text)",
    "char(0)",
    "char(27)",
    "zeroblob(70000)",
    "COLUMN + 1",
    "-COLUMN",
    "COLUMN || COLUMN",
    "substr(COLUMN, 2)",
    "'f' || substr(COLUMN, 2)",
    "replace(COLUMN, '\"', '\\u0000')",
];

/// Adds some statements to most inputs; the input determines which.
pub fn add(bytes: &mut Vec<u8>) {
    if bytes.starts_with(b"SQLite") {
        return;
    }
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    let mut random = Random::new(hasher.finish(), "statements");
    if random.once_in(4) {
        return;
    }
    if !bytes.ends_with(b"\n") {
        bytes.push(b'\n');
    }
    for _ in 0..random.between(1, 3) {
        let (table, columns) = random.one_of(&TABLES);
        let column = random.one_of(columns);
        let statement = match random.below(12) {
            0 => format!("sql delete from {table} where unicode({column}) % 2"),
            1 => format!("sql insert or ignore into {table} select * from {table}"),
            2 => format!(
                "sql update or ignore {table} set {column} = {}",
                random.one_of(columns)
            ),
            _ => {
                let value = random.one_of(&VALUES).replace("COLUMN", column);
                let some = match random.once_in(2) {
                    true => format!(" where unicode({column}) % 2"),
                    false => String::new(),
                };
                format!("sql update or ignore {table} set {column} = {value}{some}")
            }
        };
        bytes.extend_from_slice(statement.as_bytes());
        bytes.push(b'\n');
    }
}
