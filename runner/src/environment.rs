//! Where a run runs: what one wants to know when the same recipe gives another result, or another speed.
//!
//! Everything here is optional: what cannot be found out is left out. Devices are not here; stages name theirs.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Map, Value};

/// The environment of a run whose recipe lies in `recipe_dir`: retort's version, host, operating system, processor and,
/// where the recipe lies in a git repository, its commit and whether tracked files differ from it.
pub fn collect(recipe_dir: &Path) -> Value {
    let mut facts = Map::new();
    let mut add = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            facts.insert(name.to_owned(), value);
        }
    };
    add("retort", Some(env!("CARGO_PKG_VERSION").into()));
    add(
        "host",
        line_of("/proc/sys/kernel/hostname").map(Value::from),
    );
    add("os", os_name().map(Value::from));
    add(
        "kernel",
        line_of("/proc/sys/kernel/osrelease").map(Value::from),
    );
    add("arch", Some(std::env::consts::ARCH.into()));
    add("cpu", cpu_model().map(Value::from));
    add(
        "cores",
        std::thread::available_parallelism()
            .ok()
            .map(|cores| cores.get().into()),
    );
    add("memory", memory().map(Value::from));
    let (commit, dirty) = git_commit(recipe_dir).unzip();
    add("git_commit", commit.map(Value::from));
    add("git_dirty", dirty.map(Value::from));
    Value::Object(facts)
}

fn line_of(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn os_name() -> Option<String> {
    let release = std::fs::read_to_string("/etc/os-release").ok()?;
    let name = release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(name.trim_matches('"').to_owned())
}

fn cpu_model() -> Option<String> {
    field(
        &std::fs::read_to_string("/proc/cpuinfo").ok()?,
        "model name",
    )
}

/// Bytes of the machine's memory.
fn memory() -> Option<u64> {
    let total = field(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")?;
    Some(total.strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// The value behind `name:` on the first line that has it.
fn field(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// The commit checked out around `dir`, and whether tracked files differ from it.
fn git_commit(dir: &Path) -> Option<(String, bool)> {
    let output = Command::new("git")
        // A repository's own settings may name programs to run; looking at a recipe must run none.
        .args(["-c", "core.fsmonitor=false", "-C"])
        .arg(dir)
        .args([
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ])
        // Only look: no lock, no refreshed index.
        .env("GIT_OPTIONAL_LOCKS", "0")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let commit = text.trim();
    let (commit, dirty) = match commit.strip_suffix("-dirty") {
        Some(commit) => (commit, true),
        None => (commit, false),
    };
    (output.status.success() && !commit.is_empty()).then(|| (commit.to_owned(), dirty))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn git(dir: &Path, arguments: &[&str]) {
        let status = Command::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-C"])
            .arg(dir)
            .args(arguments)
            .stdout(Stdio::null())
            .status()
            .expect("git");
        assert!(status.success(), "git {arguments:?}");
    }

    #[test]
    fn the_commit_is_named_with_whether_files_differ() {
        let dir = tempfile::tempdir().unwrap();
        assert!(collect(dir.path()).get("git_commit").is_none());
        git(dir.path(), &["init", "-q"]);
        std::fs::write(dir.path().join("recipe.yaml"), "version: 1").unwrap();
        git(dir.path(), &["add", "."]);
        git(dir.path(), &["commit", "-q", "-m", "first"]);
        let clean = collect(dir.path());
        assert_eq!(clean["git_commit"].as_str().map(str::len), Some(40));
        assert_eq!(clean["git_dirty"], false);
        std::fs::write(dir.path().join("recipe.yaml"), "version: 2").unwrap();
        assert_eq!(collect(dir.path())["git_dirty"], true);
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        assert_eq!(
            field("model\t: 1\nmodel name\t: X: Y\n", "model name"),
            Some("X: Y".to_owned())
        );
        assert_eq!(field("model\n", "model"), None);
    }
}
