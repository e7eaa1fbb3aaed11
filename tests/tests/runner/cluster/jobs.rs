//! Whole runs on a real Slurm, and what happens to them: one test, because one Slurm serves all.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use retort::store::{AttemptState, RunState};
use serde_json::Value;

use super::site::Site;
use crate::lab::{Lab, compile, signal_process, wait_for};

const KILL: i32 = 9;

/// A tokenizer and a teacher of a few seconds, and trajectories that three workers share.
const PAIRS: &str = "
version: 1
seed: 3
backend: candle
params:
  data: {csv: DIGITS, height: 8, width: 8, max: 16}
stages:
  codes:
    kind: tokenizer
    data: ${params.data}
    codebook_size: 16
    codebook_dim: 4
    channels: 8
    z_channels: 8
    train: {steps: 10, batch: 32}
  teacher:
    kind: pretrain
    tokenizer: codes
    data: ${params.data}
    width: 32
    depth: 2
    heads: 2
    train: {steps: 10, batch: 32}
  pairs: {kind: trajectories, teacher: teacher, count: 601, shard_size: 100, batch: 33, workers: 3}
";

/// Works for so many tenths of a second.
fn working(name: &str, ticks: u32) -> Lab {
    Lab::new(&[&format!(
        "a: {{kind: do, act: work, amount: {ticks}, text: {name}}}"
    )])
}

#[test]
fn a_store_that_another_machine_writes_to_is_left_alone() {
    let lab = Lab::new(&["a: {kind: do}"]);
    lab.run(&[]).expect(0);
    let hosts = lab.store_dir().join("hosts");
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let other = format!(
        "{{\"host\":\"login2\",\"boot\":\"another\",\"pid\":4711,\"at\":{},\"free\":false}}",
        now.as_millis()
    );
    fs::write(hosts.join("100"), other).unwrap();
    for command in [&["run", "r.yaml"][..], &["runs", "list"], &["resume"]] {
        lab.retort(command)
            .expect(75)
            .saying(&["process 4711 on login2"]);
    }
    fs::remove_file(hosts.join("100")).unwrap();
    lab.retort(&["runs", "list"]).expect(0);
}

#[test]
fn stages_are_done_by_jobs() {
    let Some(site) = Site::start() else { return };
    for (name, check) in [
        // First: jobs that have ended count for a while.
        ("a full queue", full_queue as fn(&Site)),
        ("an array makes the bytes of one process", array),
        ("a refusal says what to do", refusals),
        ("a job that is cancelled", cancelled),
        ("a worker that is killed", killed_worker),
        ("a runner that is killed", killed_runner),
        ("a runner that leaves", detached),
        ("Ctrl-C", interrupted),
        ("ranks of a training", ranks),
        ("pieces of a time limit", time_limit),
        ("the documentation, followed", documented),
    ] {
        let began = Instant::now();
        eprintln!("{name} ...");
        check(&site);
        eprintln!("{name}: {:.1} s", began.elapsed().as_secs_f64());
    }
}

/// Does what docs/cluster.md says, as it stands there; only the recipe is a smaller one.
fn documented(site: &Site) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cluster.md");
    let page = fs::read_to_string(page).unwrap();
    let steps = page.split("## Step by step").nth(1).unwrap();
    let steps = steps.split("\n## ").next().unwrap();
    let settings = steps.split("```toml\n").nth(1).unwrap();
    let settings = settings.split("```").next().unwrap();
    let lab = working("documented", 10);
    fs::write(lab.dir.path().join("retort.toml"), settings).unwrap();
    let commands: Vec<&str> = steps
        .lines()
        .filter_map(|line| line.strip_prefix("    retort "))
        .collect();
    assert!(commands.len() >= 5, "{commands:?}");
    for command in commands {
        let command = command.split('#').next().unwrap();
        let words: Vec<&str> = command.split_whitespace().collect();
        let words: Vec<&str> = words
            .into_iter()
            .map(|word| {
                if word.starts_with("recipes/") {
                    "r.yaml"
                } else {
                    word
                }
            })
            .collect();
        let said = site.retort(&lab, &words);
        match words[0] {
            // The machine of the test may lack plugins that others have.
            "doctor" => assert!(said.stdout.contains("retort.toml)"), "{}", said.stdout),
            _ => drop(said.expect(0)),
        }
    }
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Succeeded);
    assert_eq!(ends(site, &lab), ["succeeded"]);
}

/// How the lives of jobs of all runs ended, in order.
fn ends(site: &Site, lab: &Lab) -> Vec<String> {
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

/// The state of the newest run, and of its first stage.
fn states(site: &Site, lab: &Lab) -> (String, String) {
    let shown = site
        .retort(lab, &["runs", "show", "--json"])
        .expect(0)
        .json();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (text(&shown["state"]), text(&shown["stages"][0]["state"]))
}

/// Waits until a worker is at work; returns the process that watches over it.
fn wait_for_watch(site: &Site, lab: &Lab) -> u32 {
    wait_for("a job at work", || {
        let said = site.retort(lab, &["log", "latest", "--level", "trace"]);
        said.stdout.lines().filter_map(began).next_back()
    })
}

/// The process that a line of the log says has begun on a node.
fn began(line: &str) -> Option<u32> {
    let (_, process) = line.split_once(" began on ")?.1.split_once("(process ")?;
    process.trim_end().trim_end_matches(')').parse().ok()
}

/// The only child of a process.
fn child_of(parent: u32) -> u32 {
    wait_for("a child process", || {
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    })
}

fn array(site: &Site) {
    let lab = Lab::new(&[]);
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/data/digits.csv");
    let digits = digits.canonicalize().unwrap();
    let text = PAIRS.replace("DIGITS", digits.to_str().unwrap());
    fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
    lab.retort(&["run", "r.yaml"]).expect(0);
    site.run(&lab, &["--force=pairs", "-v"]).expect(0).saying(&[
        "pairs: submitted as job",
        "of 3 elements",
        "pairs: part 3 of 3: 200 trajectories",
    ]);
    let all = lab
        .retort(&["artifacts", "list", "--json"])
        .expect(0)
        .json();
    let pairs: Vec<&str> = all
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["stage"] == "pairs")
        .map(|row| row["hash"].as_str().unwrap())
        .collect();
    assert_eq!(pairs.len(), 2);
    assert_eq!(pairs[0], pairs[1]);
    assert_eq!(
        ends(site, &lab),
        ["succeeded"; 4],
        "three parts and the whole"
    );
    let series = lab
        .retort(&["metrics", "latest", "--stage", "pairs", "--json"])
        .expect(0);
    assert_eq!(series.json().as_array().unwrap().len(), 3);
    assert_eq!(lab.entries("work"), [""; 0], "nothing is left");
    lab.run(&[]).expect(0);
    assert!(
        lab.outcomes(&[])
            .iter()
            .all(|outcome| outcome.ends_with(" reused")),
        "no digest knows of jobs"
    );
}

fn refusals(site: &Site) {
    let lab = Lab::new(&["a: {kind: do}"]);
    for (setting, expected) in [
        ("partition=nope", "invalid partition specified: nope"),
        ("gres=gpu:1", "Invalid generic resource"),
        ("memory=100G", "set `memory`"),
        ("time=soon", "as Slurm writes it"),
        ("prologue=exit 3", "ended before its worker began"),
    ] {
        site.run(&lab, &["--slurm", setting])
            .expect(100)
            .saying(&[expected]);
    }
    site.run(&lab, &["--slurm", "partitoin=p"])
        .expect(2)
        .saying(&["partitoin"]);
    let doctor = site.retort(&lab, &["doctor"]);
    assert!(doctor.stdout.contains("no accounting"), "{}", doctor.stdout);
}

fn cancelled(site: &Site) {
    let lab = working("cancelled", 600);
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    site.slurm("scancel", &["--user=root"]);
    running.end().expect(100).saying(&["cancelled in Slurm"]);
    assert_eq!(
        lab.attempt("a").reason.as_deref(),
        Some("cancelled in Slurm")
    );
    assert_eq!(ends(site, &lab), ["cancelled in Slurm"]);
}

fn killed_worker(site: &Site) {
    let lab = working("killed", 60);
    let running = site.start_run(&lab, &[]);
    let watch = wait_for_watch(site, &lab);
    signal_process(child_of(watch), KILL);
    running.end().expect(0);
    assert_eq!(
        ends(site, &lab),
        ["its worker was killed by SIGKILL", "succeeded"]
    );
}

fn killed_runner(site: &Site) {
    let lab = working("left", 60);
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    running.signal(KILL);
    running.end();
    assert_eq!(
        states(site, &lab),
        ("running".into(), "running".into()),
        "Slurm has it"
    );
    site.retort(&lab, &["resume", "-v"])
        .expect(0)
        .saying(&["taken up"]);
    assert_eq!(
        ends(site, &lab),
        ["succeeded"],
        "nothing was submitted again"
    );
    let detail = lab.latest().unwrap();
    assert_eq!(detail.summary.state, RunState::Succeeded);
    let earlier = detail.summary.resumed_from.unwrap();
    let earlier = lab
        .retort(&["runs", "show", &earlier.0, "--json"])
        .expect(0)
        .json();
    assert_eq!(earlier["state"], "lost");
    // Its end comes while nobody is there.
    let lab = working("alone", 60);
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    running.signal(KILL);
    running.end();
    wait_for("the end of the job", || {
        (states(site, &lab).0 == "lost").then_some(())
    });
    let began = Instant::now();
    site.retort(&lab, &["resume"]).expect(0);
    assert!(began.elapsed() < Duration::from_secs(60));
    assert_eq!(ends(site, &lab), ["succeeded"]);
}

fn detached(site: &Site) {
    let lab = working("detached", 100);
    let said = site.run(&lab, &["--detach"]).expect(0);
    assert!(said.stderr.contains("is left to Slurm"), "{}", said.stderr);
    let state = states(site, &lab).0;
    assert!(["queued", "running"].contains(&&*state), "{state}");
    site.retort(&lab, &["resume"]).expect(0);
    assert_eq!(ends(site, &lab), ["succeeded"]);
    // A terminal that is closed takes nothing along.
    let lab = working("closed", 100);
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    running.signal(1);
    running.end().expect(129);
    assert_eq!(states(site, &lab).0, "running");
    site.retort(&lab, &["resume"]).expect(0);
    assert_eq!(ends(site, &lab), ["succeeded"]);
}

fn interrupted(site: &Site) {
    let lab = working("interrupted", 80);
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    running.signal(2);
    running
        .end()
        .expect(130)
        .saying(&["stopped at a checkpoint"]);
    let attempt = lab.attempt("a");
    assert_eq!(
        (attempt.state, attempt.reason.as_deref()),
        (AttemptState::Interrupted, Some("interrupted"))
    );
    assert_eq!(ends(site, &lab), ["stopped"]);
    site.retort(&lab, &["resume", "--executor", "local", "-v"]);
    let log = lab.retort(&["log", "latest"]).stdout;
    assert!(log.contains("continuing from a checkpoint"), "{log}");
}

fn time_limit(site: &Site) {
    // A minute is Slurm's shortest time. It looks every thirty seconds for jobs whose signal is due, which this one's is from
    // its beginning: work for longer than that.
    let lab = working("pieces", 400);
    site.run(&lab, &["--slurm", "time=1", "--slurm", "signal=55s"])
        .expect(0);
    let ends = ends(site, &lab);
    assert!(
        ends.len() > 1 && ends[0] == "time limit, at a checkpoint",
        "{ends:?}"
    );
    assert_eq!(ends.last().unwrap(), "succeeded");
    assert_eq!(
        lab.latest().unwrap().stages[0].attempts.len(),
        1,
        "by itself"
    );
}

/// Ranks run at the same time on two nodes, end together and go on together.
fn ranks(site: &Site) {
    let plugins = tempfile::tempdir().unwrap();
    compile("ranks.c", &[], &plugins.path().join("libretort_ranks.so"));
    let own = ["--plugin-dir", plugins.path().to_str().unwrap()];
    let training = |steps: u32| {
        Lab::new(&[&format!(
            "a: {{kind: train, plugin: ranks, steps: {steps}, workers: 2}}"
        )])
    };
    // Both at work: what a signal finds before that is another story.
    let watches = |lab: &Lab| -> [u32; 2] {
        wait_for("both ranks at work", || {
            let said = site.retort(lab, &["log", "latest", "--level", "trace"]);
            let pids = said.stdout.lines().filter_map(began);
            pids.collect::<Vec<u32>>().try_into().ok()
        })
    };
    let lab = training(10);
    site.run(&lab, &own).expect(0);
    let lives = "select node from v_job_lives where element is not null";
    let lives = site.retort(&lab, &["query", "--json", lives]).expect(0);
    let lives = lives.json();
    let lives = lives.as_array().unwrap().iter();
    let nodes: BTreeSet<&str> = lives.map(|life| life["node"].as_str().unwrap()).collect();
    assert_eq!(nodes, BTreeSet::from(["n1", "n2"]));
    // The whole has a job of its own.
    assert_eq!(ends(site, &lab), ["succeeded"; 3]);
    // On this machine they make the same.
    let here = training(10);
    here.run(&own).expect(0);
    assert_eq!(here.attempt("a").output, lab.attempt("a").output);

    // One is killed: all begin again, from the checkpoint, by themselves.
    let lab = training(60);
    let running = site.start_run(&lab, &own);
    let [watch, _] = watches(&lab);
    signal_process(child_of(watch), KILL);
    running.end().expect(0);
    let count = |lab: &Lab, wanted: &str| {
        let all = ends(site, lab);
        all.iter().filter(|end| *end == wanted).count()
    };
    let killed = count(&lab, "its worker was killed by SIGKILL");
    assert_eq!(killed, 1, "{:?}", ends(site, &lab));
    assert_eq!(count(&lab, "succeeded"), 3, "{:?}", ends(site, &lab));

    // What Slurm sends ahead of a time limit.
    let lab = training(60);
    let running = site.start_run(&lab, &own);
    watches(&lab);
    site.slurm("scancel", &["--signal=USR1", "--user=root"]);
    running.end().expect(0);
    // The first asks for the next start, which may end the other before it has said why it stopped.
    let told = ends(site, &lab);
    let of_signal = [
        "time limit, at a checkpoint",
        "preempted, or ended to be started again",
    ];
    let [first, second] = of_signal.map(|end| count(&lab, end));
    assert!(first >= 1 && first + second == 2, "{told:?}");
    assert_eq!(count(&lab, "succeeded"), 3, "{told:?}");

    let lab = training(60);
    let running = site.start_run(&lab, &own);
    watches(&lab);
    running.signal(2);
    running
        .end()
        .expect(130)
        .saying(&["stopped at a checkpoint"]);
    site.retort(&lab, &[&["resume"][..], &own].concat())
        .expect(0);
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Succeeded);

    // A node is gone for good: what is left goes on with the other one.
    let lab = Lab::new(&["a: {kind: train, plugin: ranks, steps: 80, workers: 2, min_workers: 1}"]);
    let running = site.start_run(&lab, &[&own[..], &["--slurm", "shrink-after=1s"]].concat());
    watches(&lab);
    let state = |state: &str| {
        let words = ["update", "nodename=n2", state, "reason=test"];
        site.slurm("scontrol", &words);
    };
    state("state=down");
    running.end().expect(0);
    let attempts = "select reason from v_attempts order by attempt";
    let attempts = site.retort(&lab, &["query", "--json", attempts]).expect(0);
    let attempts = attempts.json();
    let reasons: Vec<_> = attempts
        .as_array()
        .unwrap()
        .iter()
        .map(|row| &row["reason"])
        .collect();
    assert_eq!(reasons, ["lost a worker: no nodes", "succeeded"]);
    assert_eq!(fs::read_to_string(made(&lab)).unwrap(), "80\n");
    state("state=resume");
    site.wait_for_nodes();
}

/// What the plugin `ranks` has made.
fn made(lab: &Lab) -> std::path::PathBuf {
    let stages = lab.latest().unwrap().stages;
    let output = stages[0].attempts.last().unwrap().output.clone().unwrap();
    lab.store_dir()
        .join("artifacts")
        .join(output)
        .join("thing.txt")
}

fn full_queue(site: &Site) {
    let script = site.path("idle");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    let script = script.display().to_string();
    // As many as the controller keeps: forty, and it counts one more than there are.
    for elements in ["--array=0-19", "--array=0-18"] {
        let said = site.slurm(
            "sbatch",
            &["--hold", elements, "--output=/dev/null", &script],
        );
        assert!(said.contains("Submitted"), "{said}");
    }
    let lab = Lab::new(&["a: {kind: do}"]);
    let running = site.start_run(&lab, &[]);
    // Not before it has tried to submit: until then it is queued as well.
    wait_for("a job that Slurm has no room for", || {
        let shown = site.retort(&lab, &["runs", "show", "--json"]);
        let shown: Value = serde_json::from_str(&shown.stdout).ok()?;
        let waiting = shown["stages"][0]["attempts"][0]["waiting"].as_str()?;
        waiting.starts_with("the queue is full").then_some(())
    });
    let (run, stage) = states(site, &lab);
    assert_eq!((&*run, &*stage), ("queued", "queued"), "nothing of it runs");
    site.slurm("scancel", &["--user=root", "--state=PENDING"]);
    running.end().expect(0);
}

/// A node's daemon dies, and its job is started again. The worker that Slurm took for dead may live: it gives way.
#[test]
fn a_node_that_dies() {
    let Some(site) = Site::start() else { return };
    let site = &site;
    // Longer than the controller takes to give a node up: 27 seconds were seen.
    let lab = working("dead", 600);
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
    running.end().expect(0);
    let ends = ends(site, &lab);
    assert_eq!(ends, ["node failed, or preempted", "succeeded"]);
    assert_eq!(lab.latest().unwrap().stages[0].attempts.len(), 1);
    // The life that Slurm took for dead was not, and has seen that another had begun.
    wait_for("the end of the first life", || {
        (!Path::new(&format!("/proc/{watch}/task/{watch}/children")).exists()).then_some(())
    });
    site.start_node(node);
    // The same work on this machine, where it is over at once, has the same bytes.
    let local = working("dead", 0);
    local.run(&[]).expect(0);
    let hash = |lab: &Lab| {
        let rows = lab.retort(&["artifacts", "list", "latest", "--json"]);
        rows.expect(0).json()[0]["hash"].clone()
    };
    assert_eq!(hash(&lab), hash(&local));
}
