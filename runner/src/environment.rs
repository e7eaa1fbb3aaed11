//! A run's environment: useful when the same recipe gives a different result or speed.
//!
//! Everything here is optional: unknown values are left out. Devices are recorded with stages. No other program is run,
//! because the recipe's directory may belong to somebody else.

use std::path::Path;

use serde_json::{Map, Value};

mod git;

/// The environment of a run whose recipe lies in `recipe_dir`: retort's version, host, operating system, processor and,
/// where the recipe lies in a git repository, its commit.
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
    add("git_commit", git::commit(recipe_dir).map(Value::from));
    Value::Object(facts)
}

/// The name of this machine; empty if unknown.
pub fn host_name() -> String {
    line_of("/proc/sys/kernel/hostname").unwrap_or_default()
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

/// The value after `name:` on the first line that has it.
fn field(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        assert_eq!(
            field("model\t: 1\nmodel name\t: X: Y\n", "model name"),
            Some("X: Y".to_owned())
        );
        assert_eq!(field("model\n", "model"), None);
    }
}
