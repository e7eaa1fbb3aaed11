//! Whether work fits into the free memory, checked before any is allocated: a failed allocation ends the process.
//!
//! The needs are lower bounds, so work that passes may still not fit. The host's free memory is limited by the machine, the
//! process's control groups and its address space. A GPU's backend knows its own free memory ([`Tensors::free_memory`]). If
//! nothing is known, everything fits.

use std::path::{Path, PathBuf};

use crate::backend::Tensors;
use crate::error::{Error, Result};

/// Refuses a batch whose samples take at least `each` bytes if it does not fit into the free bytes, as an error at an option.
pub fn check_batch(
    pointer: &str,
    batch: usize,
    each: Option<u64>,
    free: Option<u64>,
) -> Result<()> {
    match free {
        Some(free) => fits(pointer, batch, each, free),
        None => Ok(()),
    }
}

/// Refuses `what` if it needs more bytes than the host has, as an error at an option; `advice` says what to do instead.
pub fn check(pointer: &str, what: &str, needed: Option<u64>, advice: &str) -> Result<()> {
    match free() {
        Some(free) => has_room(pointer, what, needed, (advice, free)),
        None => Ok(()),
    }
}

fn has_room(
    pointer: &str,
    what: &str,
    needed: Option<u64>,
    (advice, free): (&str, u64),
) -> Result<()> {
    if needed.is_some_and(|needed| needed <= free) {
        return Ok(());
    }
    let (needs, free) = (needs(needed), gigabytes(free));
    let message = format!("{what} need {needs} of memory, {free} are free: {advice}");
    Err(Error::option(pointer, message))
}

/// A lower bound in words.
fn needs(needed: Option<u64>) -> String {
    match needed {
        Some(needed) => format!("at least {}", gigabytes(needed)),
        None => "more than any machine has".into(),
    }
}

fn fits(pointer: &str, batch: usize, each: Option<u64>, free: u64) -> Result<()> {
    let needed = each.and_then(|each| each.checked_mul(batch as u64));
    if needed.is_some_and(|needed| needed <= free) {
        return Ok(());
    }
    let needs = needs(needed);
    let advice = match each.map(|each| free / each.max(1)) {
        None | Some(0) => "not even a batch of 1 fits".to_owned(),
        Some(most) => format!("at most {most} fit; try {}", (most / 2).max(1)),
    };
    let free = gigabytes(free);
    let message = format!("a batch of {batch} needs {needs} of memory, {free} are free: {advice}");
    Err(Error::option(pointer, message))
}

/// The bytes of this many floats, unless they overflow.
pub fn floats(shape: &[usize]) -> Option<u64> {
    shape
        .iter()
        .try_fold(4u64, |bytes, &n| bytes.checked_mul(n as u64))
}

/// Refuses a tensor for which there is no memory.
pub fn check_tensor(name: &str, shape: &[usize]) -> Result<()> {
    let needed = floats(shape);
    // Small tensors are not checked.
    if needed.is_some_and(|needed| needed < 64 << 20) {
        return Ok(());
    }
    match (needed, free()) {
        (Some(needed), Some(free)) if needed > free => {
            let message = format!(
                "weight {name} of shape {shape:?} needs {}, {} are free: make the network smaller",
                gigabytes(needed),
                gigabytes(free)
            );
            Err(Error::option("", message))
        }
        (None, _) => {
            let message = format!("weight {name} of shape {shape:?}: make the network smaller");
            Err(Error::option("", message))
        }
        _ => Ok(()),
    }
}

/// Bytes, for people.
pub fn gigabytes(bytes: u64) -> String {
    match bytes {
        0..100_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// Bytes free for tensors of a backend: of its device, or of the host.
pub fn free_for<B: Tensors>(backend: &B) -> Option<u64> {
    backend.free_memory().or_else(free)
}

/// Bytes that this process may still allocate; None if no limit is known.
pub fn free() -> Option<u64> {
    let machine = field("/proc/meminfo", "MemAvailable:").map(|kib| kib * 1024);
    [machine, address_space(), groups()]
        .into_iter()
        .flatten()
        .min()
}

/// The number after a word at the beginning of a line.
fn field(file: impl AsRef<Path>, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn address_space() -> Option<u64> {
    let limit = field("/proc/self/limits", "Max address space")?;
    let taken = field("/proc/self/status", "VmSize:")? * 1024;
    Some(limit.saturating_sub(taken))
}

/// The tightest limit of the process's control groups.
fn groups() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let room = |dir: &Path, limit: &str, usage: &str| {
        let limit = field(dir.join(limit), "")?;
        // The kernel frees its cache of files on demand.
        let kept = field(dir.join("memory.stat"), "inactive_file ").unwrap_or(0);
        let taken = field(dir.join(usage), "")?.saturating_sub(kept);
        Some(limit.saturating_sub(taken))
    };
    let rooms = text.lines().flat_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next().unwrap_or(""), parts.next().unwrap_or("/"));
        let (root, limit, usage) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
            _ if controllers.split(',').any(|c| c == "memory") => (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            ),
            _ => return Vec::new(),
        };
        let dir = PathBuf::from(root).join(path.trim_start_matches('/'));
        let dirs = dir.ancestors().take_while(|dir| dir.starts_with(root));
        dirs.filter_map(|dir| room(dir, limit, usage)).collect()
    });
    rooms.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_does_not_fit_names_one_that_does() {
        let said = |batch, each| match fits("/train/batch", batch, each, 8_000_000_000) {
            Ok(()) => String::new(),
            Err(Error::Options { pointer, message }) => format!("{pointer}: {message}"),
            Err(other) => other.to_string(),
        };
        assert_eq!(said(8000, Some(1_000_000)), "");
        assert_eq!(
            said(8001, Some(1_000_000)),
            "/train/batch: a batch of 8001 needs at least 8.0 GB of memory, 8.0 GB are free: at most 8000 fit; try 4000"
        );
        assert!(said(1, Some(9_000_000_000)).ends_with("not even a batch of 1 fits"));
        assert!(said(usize::MAX, Some(1_000_000)).contains("more than any machine has"));
        assert!(said(1, None).contains("more than any machine has"));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_to_do() {
        let said = |needed| match has_room("/n", "features", needed, ("less", 8_000_000_000)) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(said(Some(8_000_000_000)), "");
        assert_eq!(
            said(Some(10_495_320_064)),
            "features need at least 10.5 GB of memory, 8.0 GB are free: less"
        );
        assert!(said(None).contains("more than any machine has of memory"));
    }

    #[test]
    fn a_weight_larger_than_memory_is_refused() {
        assert!(check_tensor("w", &[1000, 1000]).is_ok());
        assert!(check_tensor("w", &[usize::MAX, 2]).is_err());
        if free().is_some() {
            let said = check_tensor("w", &[1 << 40, 4]).unwrap_err().to_string();
            assert!(
                said.contains("weight w of shape [1099511627776, 4] needs"),
                "{said}"
            );
        }
    }
}
