//! Profiles: their effect on jobs, `doctor`'s report, and the devices for which stages are planned.

use std::fs;
use std::time::Duration;

use super::site::Site;
use super::stages::made;
use crate::lab::{Lab, compile};

pub fn prologue(site: &Site) {
    let lab = Lab::new(&["a: {kind: do, act: variable, text: FROM_PROLOGUE}"]);
    site.run(&lab, &["--slurm", "prologue=export FROM_PROLOGUE=seen"])
        .expect(0);
    assert_eq!(fs::read_to_string(made(&lab)).unwrap(), "seen 1\n");
}

/// One at a time, although there are two nodes. The recipe's `pairs` are an array of three.
pub fn array_limit(site: &Site, lab: &Lab) {
    let limit = ["--force=pairs", "--slurm", "trajectories.array-limit=1"];
    let mut running = site.start_run(lab, &limit);
    let (mut most, mut is_limited) = (0, false);
    while running.child.try_wait().unwrap().is_none() {
        let queue = [
            "--noheader",
            "--array",
            "--states=PENDING,RUNNING",
            "--format=%K|%T|%r",
        ];
        let queue = site.slurm("squeue", &queue);
        let elements: Vec<&str> = queue
            .lines()
            .filter(|line| !line.starts_with("N/A"))
            .collect();
        let at_work = elements.iter().filter(|line| line.contains("|RUNNING|"));
        most = most.max(at_work.count());
        is_limited |= elements
            .iter()
            .any(|line| line.ends_with("|JobArrayTaskLimit"));
        std::thread::sleep(Duration::from_millis(100));
    }
    running.end().expect(0);
    assert_eq!((most, is_limited), (1, true));
}

#[test]
fn doctor_shows_the_settings_of_a_recipe() {
    let lab = Lab::new(&["a: {kind: do}"]);
    let dir = lab.dir.path().join("far");
    fs::create_dir(&dir).unwrap();
    fs::copy(lab.dir.path().join("r.yaml"), dir.join("r.yaml")).unwrap();
    let text = "executor = 'slurm'\n[slurm]\npartition = 'there'\n[slurm.kinds.do]\ncpus = 8\n";
    fs::write(dir.join("retort.toml"), text).unwrap();
    let value = |arguments: &[&str], name: &str| {
        let said = lab
            .retort(&[&["doctor", "--json"], arguments].concat())
            .json();
        let checks = said.as_array().unwrap().clone();
        let found = checks.into_iter().find(|check| check["check"] == name);
        found.map(|check| check["detail"].as_str().unwrap().to_owned())
    };
    assert_eq!(value(&[], "executor").as_deref(), Some("local (default)"));
    assert_eq!(value(&[], "slurm.partition"), None);
    let origin = format!("({})", dir.join("retort.toml").display());
    let there = |name: &str| value(&["far/r.yaml"], name).unwrap();
    assert_eq!(there("slurm.partition"), format!("there {origin}"));
    assert_eq!(there("slurm.kinds.do.cpus"), format!("8 {origin}"));
    assert_eq!(there("slurm.requeue"), "3 (default)");
    assert_eq!(there("slurm.account"), "the cluster's (default)");
    lab.retort(&["doctor", "none.yaml"])
        .expect(2)
        .saying(&["there is no recipe none.yaml"]);
}

/// Every planning command uses the devices of each kind's jobs.
#[test]
fn a_kind_is_planned_for_what_its_jobs_ask_for() {
    let plugins = tempfile::tempdir().unwrap();
    let flags = [
        "-DFAULTY_NAME=\"gpus\"",
        "-DFAULTY_DEVICES=\"\\\"cpu\\\",\\\"cuda\\\"\"",
    ];
    compile(
        "faulty.c",
        &flags,
        &plugins.path().join("libretort_gpus.so"),
    );
    let lab = Lab::new(&["a: {kind: do, plugin: gpus, device: cuda}"]);
    let commands = [
        &["plan", "r.yaml"][..],
        &["plan", "r.yaml", "--sweep", "a.amount=1,2"],
        &["validate", "r.yaml"],
        &["graph", "r.yaml"],
        // Never started: its profile has no existing partition.
        &["run", "r.yaml", "--from", "nothing"],
    ];
    let settings = |kind: &str| {
        let text = format!("executor = 'slurm'\n[slurm.kinds.{kind}]\ngres = 'gpu:1'\n");
        fs::write(lab.dir.path().join("retort.toml"), text).unwrap();
    };
    let own = ["--plugin-dir", plugins.path().to_str().unwrap()];
    let said = |command: &[&str]| lab.retort(&[command, &own[..]].concat());
    settings("other");
    for command in commands {
        said(command)
            .expect(3)
            .saying(&["its jobs ask Slurm for no GPU"]);
    }
    settings("do");
    for command in &commands[..4] {
        said(command).expect(0);
    }
    let planned = said(&["plan", "r.yaml", "--json"]).json();
    assert_eq!(planned["plan"]["stages"][0]["device"], "cuda:0");
}

#[test]
fn jobs_are_not_sent_to_another_cluster() {
    let lab = Lab::new(&["a: {kind: do}"]);
    for option in ["sbatch=--clusters=far", "sbatch=-Mfar"] {
        lab.run(&["--executor", "slurm", "--slurm", option])
            .expect(2)
            .saying(&[
                "this machine's cluster only",
                "submits to the other cluster",
            ]);
    }
}
