//! Invariants that must hold after any kill.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::process::{self, Ended};
use super::{Broken, Lab, Life};
use crate::report::Report;

/// How long a point may take to reach the history, in milliseconds.
const ON_ITS_WAY: i64 = 1000;

/// The name of the count of killed workers with a part.
pub const PARTS: &str = "parts of a stage killed";

/// Milliseconds since 1970.
pub fn milliseconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Ids and states of all runs.
pub fn runs(lab: &Lab, store: &Path) -> Result<BTreeMap<String, String>, Broken> {
    let rows = query(lab, store, "select id, state from v_runs")?;
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    Ok(rows
        .iter()
        .map(|row| (text(row, "id"), text(row, "state")))
        .collect())
}

fn query(lab: &Lab, store: &Path, sql: &str) -> Result<Vec<Value>, Broken> {
    let said = lab.retort(store, &["query", sql, "--json"]);
    let rows = serde_json::from_str(&said.stdout).ok();
    match (said.code, rows) {
        (Some(0), Some(rows)) => Ok(rows),
        _ => Err(format!("a query in peace ended with {}", said.told())),
    }
}

/// Outputs of the stages of a run with `--json`.
pub fn results(said: &Ended) -> Result<BTreeMap<String, String>, Broken> {
    let document: Value =
        serde_json::from_str(&said.stdout).map_err(|e| format!("no JSON: {e}"))?;
    let stages = document["stages"].as_array().ok_or("no stages")?;
    let result = |stage: &Value| {
        let hash = stage["output"]["hash"].as_str()?;
        Some((stage["name"].as_str()?.to_owned(), hash.to_owned()))
    };
    let results: BTreeMap<_, _> = stages.iter().filter_map(result).collect();
    match results.len() == stages.len() && !results.is_empty() {
        true => Ok(results),
        false => Err(format!("stages without a result: {}", said.stdout)),
    }
}

/// Whether the results have the bytes of an undisturbed run.
pub fn results_are(said: &Ended, right: &BTreeMap<String, String>) -> Result<(), Broken> {
    let found = results(said)?;
    match found == *right {
        true => Ok(()),
        false => Err(format!(
            "results differ from those of an undisturbed run: {found:?}, expected {right:?}"
        )),
    }
}

/// Runners end with a documented code, or by the signal that was sent.
pub fn end_is_known(ended: &Ended, life: &Life) -> Result<(), Broken> {
    let killed = life
        .runner
        .iter()
        .any(|(signal, _)| *signal == libc::SIGKILL);
    let known = match (ended.code, ended.signal) {
        (Some(0 | 75 | 100), _) => true,
        // Nothing to resume: the run was killed before it was recorded.
        (Some(2 | 4), _) => true,
        // The worker that was killed was asked what the plugin is.
        (Some(5), _) => !life.worker.is_empty(),
        (Some(1), _) => life.filled,
        (Some(129 | 130 | 143), _) => life
            .runner
            .iter()
            .any(|(signal, _)| *signal != libc::SIGKILL),
        // The signal came before the runner listened.
        (_, Some(signal)) => {
            killed && signal == libc::SIGKILL || life.runner.iter().any(|(sent, _)| *sent == signal)
        }
        _ => false,
    };
    match known && !ended.panicked() {
        true => Ok(()),
        false => Err(format!(
            "a runner ended with {}, after {life:?}",
            ended.told()
        )),
    }
}

/// No worker outlives its runner.
pub fn workers_are_gone(workers: &BTreeSet<u32>) -> Result<(), Broken> {
    let until = Instant::now() + Duration::from_secs(20);
    for &pid in workers {
        while let Some((parent, state)) = process::state(pid) {
            // Another process may have the id by now; what a runner leaves behind has init above it.
            if state == 'Z' || (parent != 1 && !is_worker(pid)) {
                break;
            }
            if Instant::now() > until {
                return Err(format!("worker {pid} outlived its runner"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

fn is_worker(pid: u32) -> bool {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    command.starts_with(b"retort\0worker")
}

/// Without a runner no run is running, and the states are consistent with the disturbances.
pub fn states_are_true(
    lab: &Lab,
    store: &Path,
    known: &BTreeMap<String, String>,
    ended: &Ended,
    life: &Life,
    report: &mut Report,
) -> Result<(), Broken> {
    if !store.join("history.db").exists() {
        return Ok(());
    }
    let runs = runs(lab, store)?;
    for (id, before) in known {
        match runs.get(id) {
            None => return Err(format!("run {id} is gone")),
            Some(now) if now != before => {
                return Err(format!("run {id} was {before} and is {now}"));
            }
            Some(_) => {}
        }
    }
    let killed = ended.signal == Some(libc::SIGKILL);
    for (id, state) in runs.iter().filter(|(id, _)| !known.contains_key(*id)) {
        let fits = match state.as_str() {
            "succeeded" => true,
            "lost" => !life.runner.is_empty() || life.filled || killed,
            "interrupted" => life
                .runner
                .iter()
                .any(|(signal, _)| *signal != libc::SIGKILL),
            "failed" => !life.worker.is_empty() || life.filled,
            _ => false,
        };
        report.count(&format!("runs {state}"));
        if !fits {
            return Err(format!(
                "run {id} is {state}, after {life:?} and {}",
                ended.told()
            ));
        }
    }
    for state in query(lab, store, "select distinct state from v_attempts")? {
        if state["state"] == "running" {
            return Err("an attempt is running, and nobody is behind it".into());
        }
    }
    Ok(())
}

/// Points that a stage gave to the host before it, or its runner, was killed are in the history, but for the last second.
pub fn points_are_there(
    lab: &Lab,
    store: &Path,
    life: &Life,
    report: &mut Report,
) -> Result<(), Broken> {
    let ledgers = lab.at("ledger");
    let entries: Vec<_> = std::fs::read_dir(&ledgers)
        .expect("a folder")
        .flatten()
        .collect();
    let attempts = match store.join("history.db").exists() {
        true => query(
            lab,
            store,
            "select attempt, worker_pid, state from v_attempts order by attempt desc limit 40",
        )?,
        false => Vec::new(),
    };
    for entry in entries {
        let ledger = std::fs::read_to_string(entry.path()).unwrap_or_default();
        std::fs::remove_file(entry.path()).expect("a ledger");
        let pid: i64 = entry.file_name().to_string_lossy().parse().unwrap_or(-1);
        let was_hit = life
            .worker
            .iter()
            .any(|(worker, _)| i64::from(*worker) == pid);
        if was_hit && ledger.starts_with("part\n") {
            report.count(PARTS);
        }
        // Parts have no separate attempts. A stopped process sends nothing, and a full disk stores nothing.
        let attempt = attempts.iter().find(|attempt| attempt["worker_pid"] == pid);
        let Some(attempt) = attempt.filter(|_| !life.stopped && !life.filled) else {
            continue;
        };
        let given: Vec<(&str, i64, i64)> = ledger.lines().filter_map(given).collect();
        let killed = life
            .runner
            .iter()
            .find(|(signal, _)| *signal == libc::SIGKILL)
            .map(|(_, at)| *at);
        let killed = killed.or(life
            .worker
            .iter()
            .find(|(worker, _)| i64::from(*worker) == pid)
            .map(|(_, at)| *at));
        // A machine too busy for the stage may be too busy for the runner as well.
        let stall = given
            .windows(2)
            .map(|pair| pair[1].2 - pair[0].2)
            .max()
            .unwrap_or(0);
        let until = killed.map_or(i64::MAX, |at| at - ON_ITS_WAY - stall);
        let sql = format!(
            "select series, step from v_metrics where attempt = {}",
            attempt["attempt"]
        );
        let rows = query(lab, store, &sql)?;
        let there: BTreeSet<(&str, i64)> = rows
            .iter()
            .filter_map(|row| Some((row["series"].as_str()?, row["step"].as_i64()?)))
            .collect();
        for (series, step, at) in &given {
            if *at < until && !there.contains(&(series, *step)) {
                return Err(format!(
                    "attempt {attempt}: step {step} of {series}, given at {at}, is not in the history; killed: {killed:?}, {life:?}"
                ));
            }
        }
        *report.counts.entry("points looked for".into()).or_default() += given.len() as u64;
    }
    Ok(())
}

/// A line of a ledger: series, step, milliseconds. The last line may be cut.
fn given(line: &str) -> Option<(&str, i64, i64)> {
    let mut words = line.split(' ');
    let (series, step, at) = (
        words.next()?,
        words.next()?.parse().ok()?,
        words.next()?.parse().ok()?,
    );
    (at > 1_000_000_000_000).then_some((series, step, at))
}

/// Every artifact's content matches its name, and the history is sound.
pub fn is_whole(lab: &Lab, store: &Path) -> Result<(), Broken> {
    for arguments in [["artifacts", "verify"].as_slice(), &["doctor"]] {
        let said = lab.retort(store, arguments);
        let good = said.code == Some(0)
            || (arguments == ["doctor"] && !said.panicked() && said.code.is_some());
        if !good {
            return Err(format!(
                "{arguments:?} ended with {} {}",
                said.told(),
                said.stdout
            ));
        }
    }
    Ok(())
}

/// After `gc --remove` the store contains nothing unneeded.
pub fn nothing_is_left_over(store: &Path) -> Result<(), Broken> {
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    };
    let mut left: Vec<String> = ["staging", "work"]
        .iter()
        .flat_map(|dir| names(&store.join(dir)))
        .collect();
    left.extend(
        names(store)
            .into_iter()
            .filter(|name| name.starts_with('.') && name != ".gitignore" || name.contains(".tmp")),
    );
    match left.is_empty() {
        true => Ok(()),
        false => Err(format!("left over after gc: {left:?}")),
    }
}
