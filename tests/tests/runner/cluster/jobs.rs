//! Complete runs on a real Slurm, with disturbances: a single test, because one Slurm serves all.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use retort::store::{AttemptState, RunState};
use serde_json::Value;

use retort_tests::digits::Digits;

use super::site::{self, Site};
use super::stages::{
    began, ends, flag, held, made, release, wait_for_starts, wait_for_watch, working,
};
use super::{profiles, restarts};
use crate::lab::{Lab, Running, binary, compile, signal_process, wait_for, wait_until_gone};
use crate::terminal::{Screen, on_a_terminal};
use crate::training::output;

const KILL: i32 = 9;

/// Trajectories that three workers share.
const PAIRS: &str = "  pairs: {kind: trajectories, teacher: teacher, count: 601, shard_size: 100, batch: 33, workers: 3}\n";

#[test]
fn a_store_that_another_machine_writes_to_is_left_alone() {
    let lab = Lab::new(&["a: {kind: do}"]);
    lab.run(&[]).expect(0);
    let claim = lab.claim_elsewhere();
    for command in [&["run", "r.yaml"][..], &["runs", "list"], &["resume"]] {
        lab.retort(command)
            .expect(75)
            .saying(&["process 4711 on login2"]);
    }
    fs::remove_file(claim).unwrap();
    lab.retort(&["runs", "list"]).expect(0);
}

#[test]
fn a_run_whose_store_another_machine_has_taken_ends() {
    let lab = working("taken", 600);
    let running = lab.start(&[]);
    let worker = lab.wait_for_worker("a");
    let mut tail = lab.command(&["tail", "latest"]);
    tail.stdout(Stdio::piped()).stderr(Stdio::piped());
    let tail = Running::new(tail.spawn().unwrap());
    // As after Ctrl-Z and two minutes.
    lab.claim_elsewhere();
    for ended in [running.end(), tail.end()] {
        ended.expect(75).saying(&["process 4711 on login2"]);
    }
    wait_until_gone(worker);
}

#[test]
fn stages_are_done_by_jobs() {
    // No node is down, however busy this machine is.
    let Some(site) = Site::start(300) else { return };
    for (name, check) in [
        // This comes first, because ended jobs count for a while.
        ("a full queue", full_queue as fn(&Site)),
        ("an array makes the bytes of one process", array),
        ("pictures are decoded and measured by arrays", pictures),
        ("a refusal says what to do", refusals),
        ("a job that is cancelled", cancelled),
        ("a prologue", profiles::prologue),
        ("a worker that is killed", killed_worker),
        (
            "a worker that is killed each time",
            restarts::killed_each_time,
        ),
        ("a job that makes room", restarts::preempted),
        ("a runner that is killed", killed_runner),
        ("a runner that leaves", detached),
        ("Ctrl-C", interrupted),
        ("Ctrl-C on a terminal", asked),
        ("tail beside a runner", followed),
        ("ranks of a training", ranks),
        ("pieces of a time limit", time_limit),
        ("the documentation, followed", documented),
    ] {
        let began = Instant::now();
        // A node that Slurm has drained after an earlier check would make the next one wait forever.
        site.wait_for_nodes();
        eprintln!("{name} ...");
        check(&site);
        eprintln!("{name}: {:.1} s", began.elapsed().as_secs_f64());
    }
}

/// Runs the commands of docs/cluster.md unchanged, with a smaller recipe.
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
            // The test's machine may lack some plugins.
            "doctor" => assert!(said.stdout.contains("retort.toml)"), "{}", said.stdout),
            _ => drop(said.expect(0)),
        }
    }
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Succeeded);
    assert_eq!(ends(site, &lab), ["succeeded"]);
    placed_by_srun(site, &page);
}

/// The page's script in which `srun` starts the processes. This cluster's node names are not host names, so the address is
/// checked and then replaced.
fn placed_by_srun(site: &Site, page: &str) {
    let block = page.split("```sh\n").nth(1).unwrap();
    let (address, start) = block.split("```").next().unwrap().split_once('\n').unwrap();
    assert!(start.starts_with("srun ") && start.contains("recipe.yaml"));
    let plugins = tempfile::tempdir().unwrap();
    compile("ranks.c", &[], &plugins.path().join("libretort_ranks.so"));
    let lab = Lab::new(&["a: {kind: train, plugin: ranks, steps: 10}"]);
    let dir = lab.dir.path();
    fs::rename(dir.join("r.yaml"), dir.join("recipe.yaml")).unwrap();
    fs::create_dir(dir.join("bin")).unwrap();
    std::os::unix::fs::symlink(binary(), dir.join("bin/retort")).unwrap();
    let script = format!(
        "#!/bin/bash\nset -eu\n{address}\necho $MASTER_ADDR > address\nexport MASTER_ADDR=127.0.0.1\n{start}"
    );
    fs::write(dir.join("job"), script).unwrap();
    let path = std::env::var("PATH").unwrap();
    let job = ["--wait", "--nodes=2", "--ntasks=2", "--output=said", "job"];
    let ended = Command::new("sbatch")
        .args(job)
        .current_dir(dir)
        .env("SLURM_CONF", site.conf())
        .env("HOME", dir)
        .env("PATH", format!("{}:{path}", dir.join("bin").display()))
        .env("RETORT_PLUGIN_PATH", plugins.path())
        .output()
        .unwrap();
    let said = fs::read_to_string(dir.join("said")).unwrap_or_default();
    assert!(ended.status.success(), "{ended:?}: {said}");
    assert_eq!(fs::read_to_string(dir.join("address")).unwrap(), "n1\n");
    fs::rename(dir.join(".retort"), lab.store_dir()).unwrap();
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Succeeded);
    assert_eq!(fs::read_to_string(made(&lab)).unwrap(), "10\n");
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

/// The only child of a process.
fn child_of(parent: u32) -> u32 {
    wait_for("a child process", || {
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    })
}

/// Decoding and evaluating pictures, as arrays.
fn pictures(site: &Site) {
    let lab = crate::dividing::pictures();
    lab.run(&[]).expect(0);
    let hashes = || ["pictures", "judged"].map(|stage| output(&lab, stage).0);
    let alone = hashes();
    let sets = ["--set=pictures.workers=2", "--set=judged.workers=2"];
    let force = ["--force=pictures", "--force=judged", "-v"];
    site.run(&lab, &[&sets[..], &force].concat())
        .expect(0)
        .saying(&[
            "of 2 elements",
            "pictures: part 2 of 2: decoded 1000 image files",
            "judged: part 2 of 2: measured ",
        ]);
    assert_eq!(hashes(), alone);
    assert_eq!(ends(site, &lab), ["succeeded"; 6], "two stages in parts");
}

fn array(site: &Site) {
    let lab = Lab::new(&[]);
    let small = Digits {
        backend: "candle",
        top: "seed: 3",
        codes: "train: {steps: 10, batch: 32}",
        teacher: "width: 32, depth: 2, heads: 2, train: {steps: 10, batch: 32}",
    };
    fs::write(lab.dir.path().join("r.yaml"), small.recipe(PAIRS)).unwrap();
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
    let shown = site.retort(&lab, &["runs", "show", "--json"]).expect(0);
    let shown = shown.json();
    let jobs = shown["jobs"].as_array().unwrap();
    assert!(jobs.len() == 2 && jobs.iter().all(|job| job["cluster"] == "test"));
    let shown = site.retort(&lab, &["runs", "show"]).expect(0).stdout;
    let mut lines = shown.lines().map(str::split_whitespace);
    let is_shown = lines.any(|words| words.take(2).eq(["pairs", "test"]));
    assert!(is_shown, "{shown}");
    profiles::array_limit(site, &lab);
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
    let lab = held("cancelled");
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    site.administer("scancel", &["--user=root"]);
    running.end().expect(100).saying(&["cancelled in Slurm"]);
    assert_eq!(
        lab.attempt("a").reason.as_deref(),
        Some("cancelled in Slurm")
    );
    assert_eq!(ends(site, &lab), ["cancelled in Slurm"]);
}

fn killed_worker(site: &Site) {
    let lab = held("killed");
    let running = site.start_run(&lab, &[]);
    let watch = wait_for_watch(site, &lab);
    signal_process(child_of(watch), KILL);
    release(&lab);
    running.end().expect(0);
    assert_eq!(
        ends(site, &lab),
        ["its worker was killed by SIGKILL", "succeeded"]
    );
}

fn killed_runner(site: &Site) {
    let lab = held("left");
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    running.signal(KILL);
    running.end();
    assert_eq!(
        states(site, &lab),
        ("running".into(), "running".into()),
        "Slurm has it"
    );
    release(&lab);
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
    // It ends while no runner is there.
    let lab = held("alone");
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    running.signal(KILL);
    running.end();
    release(&lab);
    wait_for("the end of the job", || {
        (states(site, &lab).0 == "lost").then_some(())
    });
    let began = Instant::now();
    site.retort(&lab, &["resume"]).expect(0);
    assert!(began.elapsed() < Duration::from_secs(100));
    assert_eq!(ends(site, &lab), ["succeeded"]);
}

fn detached(site: &Site) {
    let lab = held("detached");
    let said = site.run(&lab, &["--detach"]).expect(0);
    assert!(said.stderr.contains("is left to Slurm"), "{}", said.stderr);
    let state = states(site, &lab).0;
    assert!(["queued", "running"].contains(&&*state), "{state}");
    wait_for_watch(site, &lab);
    // No runner reads the job's output, but it is shown, and ends with the job.
    let path = lab.dir.path().join("tail");
    let shown = || fs::read_to_string(&path).unwrap();
    let mut tail = site.command(&lab, &["tail", "latest"]);
    tail.stdout(fs::File::create(&path).unwrap());
    tail.stderr(Stdio::null());
    let mut tail = Running::new(tail.spawn().unwrap());
    wait_for("a line of the job", || {
        shown().contains(" began on ").then_some(())
    });
    release(&lab);
    assert!(tail.child.wait().unwrap().success());
    let log = site.retort(&lab, &["log", "latest"]).expect(0).stdout;
    for shown in [&shown(), &log] {
        assert_eq!(shown.matches(" began on ").count(), 1, "{shown}");
    }
    site.retort(&lab, &["resume"]).expect(0);
    // A runner that leaves may have recorded the line already. It is in the log of one of both runs.
    let earlier = lab.latest().unwrap().summary.resumed_from.unwrap();
    let logs = ["latest", &earlier.0].map(|run| site.retort(&lab, &["log", run]).expect(0).stdout);
    assert_eq!(logs.concat().matches(" began on ").count(), 1, "{logs:?}");
    assert_eq!(ends(site, &lab), ["succeeded"]);
    // Closing the terminal ends nothing.
    let lab = held("closed");
    let running = site.start_run(&lab, &[]);
    wait_for_watch(site, &lab);
    running.signal(1);
    running.end().expect(129);
    assert_eq!(states(site, &lab).0, "running");
    release(&lab);
    site.retort(&lab, &["resume"]).expect(0);
    assert_eq!(ends(site, &lab), ["succeeded"]);
}

fn interrupted(site: &Site) {
    let lab = held("interrupted");
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
    release(&lab);
    site.retort(&lab, &["resume", "--executor", "local", "-v"]);
    let log = lab.retort(&["log", "latest"]).stdout;
    assert!(log.contains("continuing from a checkpoint"), "{log}");
}

/// On a terminal Ctrl-C asks a question. The typed answer decides, or a second Ctrl-C.
fn asked(site: &Site) {
    const QUESTION: &str = "[d]etach and leave them to Slurm, [c]ancel them, or [g]o on?";
    const INTERRUPT: &str = "\x03";
    let lab = held("asked");
    let begin = |arguments: &[&str]| {
        let earlier = lab.latest().map(|run| run.summary.id);
        let (running, screen) = on_a_terminal(site.command(&lab, arguments));
        let screen = Screen::new(screen);
        earlier.map(|earlier| lab.wait_for_run_after(&earlier));
        // What a job wrote for an earlier run is in that run's log.
        wait_for("a stage at work", || {
            let shown = site.retort(&lab, &["runs", "show", "--json"]);
            let shown: Value = serde_json::from_str(&shown.stdout).ok()?;
            (shown["stages"][0]["state"] == "running").then_some(())
        });
        (running, screen)
    };
    let (mut running, mut screen) = begin(&site::ON_SLURM);
    for answer in ["g", "", "what?"] {
        screen.type_keys(INTERRUPT);
        screen.wait_for(QUESTION);
        screen.type_keys(&format!("{answer}\n"));
        screen.wait_for("going on");
    }
    screen.type_keys(INTERRUPT);
    screen.wait_for(QUESTION);
    screen.type_keys("d\n");
    assert_eq!(running.child.wait().unwrap().code(), Some(0));
    let at_work = || ("running".to_owned(), "running".to_owned());
    assert_eq!(states(site, &lab), at_work(), "Slurm has it");
    let resume = ["resume", "--executor", "slurm", "--slurm", "poll=1s"];
    for (arguments, answer) in [(&resume[..], "C\n"), (&site::ON_SLURM, INTERRUPT)] {
        let (mut running, mut screen) = begin(arguments);
        assert_eq!(states(site, &lab), at_work());
        screen.type_keys(INTERRUPT);
        screen.wait_for(QUESTION);
        screen.type_keys(answer);
        assert_eq!(running.child.wait().unwrap().code(), Some(130));
        assert_eq!(lab.attempt("a").reason.as_deref(), Some("interrupted"));
    }
    assert_eq!(ends(site, &lab), ["stopped"; 2]);
}

/// `tail` shows a job's output while a runner reads it too, each line once, and ends with the run. A job that waits in Slurm is
/// queued, with Slurm's reason.
fn followed(site: &Site) {
    let lab = held("followed");
    for node in ["n1", "n2"] {
        site.set_node(node, "drain");
    }
    let running = site.start_run(&lab, &[]);
    let waiting = wait_for("Slurm's reason", || {
        let shown = site.retort(&lab, &["runs", "show", "--json"]);
        let shown: Value = serde_json::from_str(&shown.stdout).ok()?;
        let waiting = shown["stages"][0]["attempts"][0]["waiting"].as_str()?;
        (!waiting.contains("submitted")).then(|| waiting.to_owned())
    });
    // Slurm's name for it: squeue's manual has a list.
    let queue = site.slurm("squeue", &["--noheader", "--format=%r"]);
    assert!(
        !waiting.is_empty() && queue.contains(&waiting),
        "{waiting}: {queue}"
    );
    assert_eq!(states(site, &lab), ("queued".into(), "queued".into()));
    let tail = site.start_tail(&lab);
    for node in ["n1", "n2"] {
        site.set_node(node, "resume");
    }
    wait_for_watch(site, &lab);
    release(&lab);
    running.end().expect(0);
    let shown = tail.end().expect(0).stdout;
    assert_eq!(shown.matches(" began on ").count(), 1, "{shown}");
}

fn time_limit(site: &Site) {
    // A minute is Slurm's shortest time. It checks every thirty seconds for jobs whose signal is due; this one's is due from
    // the start.
    let lab = held("pieces");
    let running = site.start_run(&lab, &["--slurm", "time=1", "--slurm", "signal=55s"]);
    wait_for_starts(site, &lab, 2);
    release(&lab);
    running.end().expect(0);
    let ends = ends(site, &lab);
    assert!(
        // The signal may come before its first step.
        ends.len() > 1 && ends[0].starts_with("time limit, "),
        "{ends:?}"
    );
    assert_eq!(ends.last().unwrap(), "succeeded");
    assert_eq!(
        lab.latest().unwrap().stages[0].attempts.len(),
        1,
        "by itself"
    );
}

/// Ranks run at the same time on two nodes, and end and continue together.
fn ranks(site: &Site) {
    let plugins = tempfile::tempdir().unwrap();
    compile("ranks.c", &[], &plugins.path().join("libretort_ranks.so"));
    let own = ["--plugin-dir", plugins.path().to_str().unwrap()];
    ranks_on_two_nodes(site, &own);
    ranks_that_end(site, &own);
    ranks_that_are_stopped(site, &own);
    ranks_that_lose_a_node(site, &own);
}

/// A training by two ranks that waits for a flag.
fn held_ranks(options: &str) -> Lab {
    let lab = Lab::new(&[]);
    let flag = flag(&lab);
    lab.recipe(&[&format!(
        "a: {{kind: train, plugin: ranks, workers: 2, flag: {}, {options}}}",
        flag.display()
    )]);
    lab
}

/// Waits until both ranks are running: signals before that are a different case. Returns the processes that watch them.
fn watches(site: &Site, lab: &Lab) -> [u32; 2] {
    wait_for("both ranks at work", || {
        let said = site.retort(lab, &["log", "latest", "--level", "trace"]);
        let pids = said.stdout.lines().filter_map(began);
        pids.collect::<Vec<u32>>().try_into().ok()
    })
}

/// How many starts ended in this way.
fn count_ends(site: &Site, lab: &Lab, wanted: &str) -> usize {
    let all = ends(site, lab);
    all.iter().filter(|end| *end == wanted).count()
}

fn ranks_on_two_nodes(site: &Site, own: &[&str]) {
    let training = |steps: u32| {
        Lab::new(&[&format!(
            "a: {{kind: train, plugin: ranks, steps: {steps}, workers: 2}}"
        )])
    };
    let lab = training(10);
    site.run(&lab, own).expect(0);
    let starts = "select node from v_job_lives where element is not null";
    let starts = site.retort(&lab, &["query", "--json", starts]).expect(0);
    let starts = starts.json();
    let starts = starts.as_array().unwrap().iter();
    let nodes: BTreeSet<&str> = starts
        .map(|start| start["node"].as_str().unwrap())
        .collect();
    assert_eq!(nodes, BTreeSet::from(["n1", "n2"]));
    // The undivided stage has a separate job.
    assert_eq!(ends(site, &lab), ["succeeded"; 3]);
    // On this machine they make the same result.
    let here = training(10);
    here.run(own).expect(0);
    assert_eq!(here.attempt("a").output, lab.attempt("a").output);
}

/// One ends by itself: both restart from the checkpoint.
fn ranks_that_end(site: &Site, own: &[&str]) {
    // One is killed: all restart from the checkpoint by themselves.
    let lab = held_ranks("steps: 10");
    let running = site.start_run(&lab, own);
    let [watch, _] = watches(site, &lab);
    signal_process(child_of(watch), KILL);
    wait_for_starts(site, &lab, 4);
    release(&lab);
    running.end().expect(0);
    let killed = count_ends(site, &lab, "its worker was killed by SIGKILL");
    assert_eq!(killed, 1, "{:?}", ends(site, &lab));
    assert_eq!(
        count_ends(site, &lab, "succeeded"),
        3,
        "{:?}",
        ends(site, &lab)
    );

    // One hangs: its supervisor kills it, and all restart.
    let lab = held_ranks("steps: 10");
    let running = site.start_run(&lab, own);
    let [_, watch] = watches(site, &lab);
    signal_process(child_of(watch), libc::SIGSTOP);
    wait_for_starts(site, &lab, 4);
    release(&lab);
    running.end().expect(0);
    let told = ends(site, &lab);
    assert_eq!(count_ends(site, &lab, "its worker hangs"), 1, "{told:?}");
    assert_eq!(count_ends(site, &lab, "succeeded"), 3, "{told:?}");
}

/// Slurm and the user stop them at a checkpoint.
fn ranks_that_are_stopped(site: &Site, own: &[&str]) {
    // Slurm's signal ahead of a time limit.
    let lab = held_ranks("steps: 10");
    let running = site.start_run(&lab, own);
    watches(site, &lab);
    site.administer("scancel", &["--signal=USR1", "--user=root"]);
    wait_for_starts(site, &lab, 4);
    release(&lab);
    running.end().expect(0);
    // The first rank asks for the restart, which may end the other before it has reported why it stopped.
    let told = ends(site, &lab);
    let of_signal = [
        "time limit, at a checkpoint",
        "time limit, without progress",
        "ended with another worker",
    ];
    let [first, at_once, second] = of_signal.map(|end| count_ends(site, &lab, end));
    let first = first + at_once;
    assert!(first >= 1 && first + second == 2, "{told:?}");
    assert_eq!(count_ends(site, &lab, "succeeded"), 3, "{told:?}");

    let lab = held_ranks("steps: 10");
    let running = site.start_run(&lab, own);
    watches(site, &lab);
    running.signal(2);
    running
        .end()
        .expect(130)
        .saying(&["stopped at a checkpoint"]);
    release(&lab);
    site.retort(&lab, &[&["resume"][..], own].concat())
        .expect(0);
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Succeeded);
}

/// A node is lost permanently: the training goes on with the other one.
fn ranks_that_lose_a_node(site: &Site, own: &[&str]) {
    let lab = held_ranks("steps: 80, min_workers: 1");
    let running = site.start_run(&lab, &[own, &["--slurm", "shrink-after=1s"]].concat());
    watches(site, &lab);
    site.set_node("n2", "down");
    wait_for_starts(site, &lab, 3);
    release(&lab);
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
    site.set_node("n2", "resume");
    site.wait_for_nodes();
}

fn full_queue(site: &Site) {
    let script = site.path("idle");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    let script = script.display().to_string();
    // The controller's limit: four hundred, and it counts one more than exist.
    for elements in ["--array=0-199", "--array=0-198"] {
        let said = site.slurm(
            "sbatch",
            &["--hold", elements, "--output=/dev/null", &script],
        );
        assert!(said.contains("Submitted"), "{said}");
    }
    // Ended jobs count until they are forgotten.
    site.keep_jobs(2);
    let lab = Lab::new(&["a: {kind: do}"]);
    let running = site.start_run(&lab, &[]);
    // Only after it has tried to submit: before that it is queued as well.
    wait_for("a job that Slurm has no room for", || {
        let shown = site.retort(&lab, &["runs", "show", "--json"]);
        let shown: Value = serde_json::from_str(&shown.stdout).ok()?;
        let waiting = shown["stages"][0]["attempts"][0]["waiting"].as_str()?;
        waiting.starts_with("the queue is full").then_some(())
    });
    let (run, stage) = states(site, &lab);
    assert_eq!((&*run, &*stage), ("queued", "queued"), "nothing of it runs");
    site.administer("scancel", &["--user=root", "--state=PENDING"]);
    running.end().expect(0);
    site.keep_jobs(600);
}
