//! Restarts of jobs on a real Slurm: how often, and what the history records.

use std::path::Path;

use super::site::Site;
use super::stages::{ends, held, release, wait_for_starts, wait_for_watch};
use crate::lab::{Lab, wait_for};

/// The same work on this machine, where it ends quickly, has the same bytes.
#[track_caller]
fn check_bytes(lab: &Lab, name: &str) {
    let local = held(name);
    release(&local);
    local.run(&[]).expect(0);
    let hash = |lab: &Lab| {
        let rows = lab.retort(&["artifacts", "list", "latest", "--json"]);
        rows.expect(0).json()[0]["hash"].clone()
    };
    assert_eq!(hash(lab), hash(&local));
}

pub fn killed_each_time(site: &Site) {
    let lab = Lab::new(&["a: {kind: do, act: kill}"]);
    site.run(&lab, &["--slurm", "requeue=1"])
        .expect(100)
        .saying(&["its worker was killed by SIGKILL, after all restarts that `requeue` allows"]);
    let reason = lab.attempt("a").reason;
    assert_eq!(reason.as_deref(), Some("started too often"));
    assert_eq!(ends(site, &lab), ["its worker was killed by SIGKILL"; 2]);
}

/// A job in a partition with priority takes both nodes for a moment.
pub fn preempted(site: &Site) {
    let lab = held("preempted");
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    let high = [
        "--partition=high",
        "--nodes=2",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ];
    let said = site.slurm("sbatch", &high);
    assert!(said.contains("Submitted"), "{said}");
    wait_for_starts(site, &lab, 2);
    release(&lab);
    running.end().expect(0);
    assert_eq!(ends(site, &lab), ["preempted", "succeeded"]);
    assert_eq!(lab.latest().unwrap().stages[0].attempts.len(), 1);
    check_bytes(&lab, "preempted");
}

/// A node's daemon dies, and its job is restarted. The worker that Slurm presumed dead may be alive: it gives way.
#[test]
fn a_node_that_dies() {
    let Some(site) = Site::start(5) else { return };
    let site = &site;
    let lab = held("dead");
    let running = site.start_run(&lab, &[]);
    let watch = wait_for_watch(site, &lab);
    let node = site.slurm("squeue", &["--noheader", "--states=RUNNING", "--format=%N"]);
    let node = node.trim();
    site.kill_node(node);
    wait_for("the end of the node", || {
        let nodes = site.slurm("sinfo", &["--noheader", "--Node", "--format=%N %T"]);
        let down = |line: &str| line.starts_with(node) && line.contains(" down");
        nodes.lines().any(down).then_some(())
    });
    wait_for_starts(site, &lab, 2);
    // The start that Slurm presumed dead was alive, and sees that another has begun.
    wait_for("the end of the first start", || {
        (!Path::new(&format!("/proc/{watch}/task/{watch}/children")).exists()).then_some(())
    });
    release(&lab);
    running.end().expect(0);
    let ends = ends(site, &lab);
    assert_eq!(ends, ["node failed", "succeeded"]);
    assert_eq!(lab.latest().unwrap().stages[0].attempts.len(), 1);
    site.start_node(node);
    check_bytes(&lab, "dead");
}
