//! Stages for Slurm's jobs: that work for a while or until they are released, the starts of their jobs, and their outputs.

use std::fs;
use std::path::PathBuf;

use super::site::Site;
use crate::lab::{Lab, wait_for};

/// A lab with a stage that works for this many tenths of a second.
pub fn working(name: &str, ticks: u32) -> Lab {
    Lab::new(&[&format!(
        "a: {{kind: do, act: work, amount: {ticks}, text: {name}}}"
    )])
}

/// A lab with a stage that works until [`release`], so that every disturbance hits it while it is running.
pub fn held(name: &str) -> Lab {
    let lab = Lab::new(&[]);
    let flag = flag(&lab);
    lab.recipe(&[&format!(
        "a: {{kind: do, act: wait, flag: {}, text: {name}}}",
        flag.display()
    )]);
    lab
}

/// The file for which the stage of [`held`] waits.
pub fn flag(lab: &Lab) -> PathBuf {
    lab.dir.path().join("enough")
}

/// Lets the stage of [`held`] end.
pub fn release(lab: &Lab) {
    fs::write(flag(lab), "").unwrap();
}

/// The file in the first stage's output.
pub fn made(lab: &Lab) -> PathBuf {
    let stages = lab.latest().unwrap().stages;
    let output = stages[0].attempts.last().unwrap().output.clone().unwrap();
    lab.store_dir()
        .join("artifacts")
        .join(output)
        .join("thing.txt")
}

/// How the jobs' starts of all runs ended, in order.
pub fn ends(site: &Site, lab: &Lab) -> Vec<String> {
    let said = site.retort(
        lab,
        &[
            "query",
            "--json",
            "select reason from v_job_lives order by job, element, life",
        ],
    );
    let rows = said.expect(0).json();
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| row["reason"].as_str().unwrap_or("none").to_owned())
        .collect()
}

/// Waits until this many starts of a run's jobs have begun.
pub fn wait_for_starts(site: &Site, lab: &Lab, starts: usize) {
    wait_for("another start", || {
        let said = site.retort(lab, &["log", "latest", "--level", "trace"]);
        (said.stdout.lines().filter_map(began).count() >= starts).then_some(())
    });
}

/// Waits until a worker is running. Returns its supervising process.
pub fn wait_for_watch(site: &Site, lab: &Lab) -> u32 {
    wait_for("a job at work", || {
        let said = site.retort(lab, &["log", "latest", "--level", "trace"]);
        said.stdout.lines().filter_map(began).next_back()
    })
}

/// The process in a line of the log about a start on a node.
pub fn began(line: &str) -> Option<u32> {
    let (_, process) = line.split_once(" began on ")?.1.split_once("(process ")?;
    process.trim_end().trim_end_matches(')').parse().ok()
}
