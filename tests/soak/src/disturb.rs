//! Runs of the real binary that are killed, stopped and starved of disk at random, while other commands use the store.
//!
//! It works in rounds. Each round makes a recipe and runs it undisturbed in a separate store, which gives the right results.
//! Then it runs the recipe in a store that has seen other rounds, in *lives*: a runner is started and disturbed until it has
//! ended, its remains are checked, and the next one resumes the run; the last one is undisturbed and must succeed. All
//! choices follow from the seed, but not what they hit, so only hits are counted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use crate::random::Random;
use crate::report::Report;

mod disk;
mod process;
mod truth;

use disk::Disk;
use process::{Ended, Runner, kill};

/// Rounds per store, which grows.
const ROUNDS: usize = 12;
/// Rounds after which everything has happened. In the longest soak so far (SECURITY.md), 839 rounds, the rarest events were
/// workers of parts killed (61) and commands killed (67): one in about thirteen rounds; in a short one, two commands in 93.
const ENOUGH: u64 = 400;
/// Rounds after which the frequent disturbances have hit.
const ENOUGH_FREQUENT: u64 = 40;
/// Disturbances that hit at least once in three rounds of that soak.
const FREQUENT: [&str; 6] = [
    "runner killed",
    "runner terminated",
    "runner interrupted",
    "runner hung up",
    "runner stopped",
    "worker killed",
];
/// The count of commands beside a run that were killed.
const COMMANDS: &str = "commands killed";
/// The most disturbed lives of a round.
const LIVES: usize = 4;
/// How long anything may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// The kinds of disturbance.
const DISTURBANCES: [Disturbance; 12] = [
    Disturbance::Signal("runner killed", Victim::Runner, libc::SIGKILL),
    Disturbance::Signal("runner killed", Victim::Runner, libc::SIGKILL),
    Disturbance::Signal("runner terminated", Victim::Runner, libc::SIGTERM),
    Disturbance::Signal("runner interrupted", Victim::Runner, libc::SIGINT),
    Disturbance::Signal("runner hung up", Victim::Runner, libc::SIGHUP),
    Disturbance::Signal("worker killed", Victim::Worker, libc::SIGKILL),
    Disturbance::Signal("worker killed", Victim::Worker, libc::SIGKILL),
    Disturbance::Signal("worker aborted", Victim::Worker, libc::SIGABRT),
    Disturbance::Stop("runner stopped", Victim::Runner),
    Disturbance::Stop("worker stopped", Victim::Worker),
    Disturbance::KillCommand,
    Disturbance::Fill,
];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Disturbance {
    Signal(&'static str, Victim, i32),
    /// SIGSTOP, and SIGCONT after a while.
    Stop(&'static str, Victim),
    /// Kills a command beside the run: gc, export, import, a query.
    KillCommand,
    /// Leaves no room on the store's disk for a while.
    Fill,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Victim {
    Runner,
    Worker,
}

/// A soak's environment.
pub struct Lab {
    /// The binary.
    pub retort: PathBuf,
    /// Directory with the soak's plugin.
    pub plugins: PathBuf,
    home: tempfile::TempDir,
    disk: Option<Disk>,
}

impl Lab {
    /// Compiles the plugin, and mounts a small disk where that is possible.
    ///
    /// # Panics
    /// There is no C compiler.
    pub fn new(retort: PathBuf, report: &mut Report) -> Self {
        let home = tempfile::tempdir().expect("a temporary folder");
        let plugins = home.path().join("plugins");
        for folder in ["plugins", "ledger", "disk"] {
            std::fs::create_dir(home.path().join(folder)).expect("a folder");
        }
        process::compile(&plugins.join("libretort_soak.so"));
        let disk = Disk::mount(&home.path().join("disk"));
        if let Err(why) = &disk {
            report.left_out.push(format!(
                "a disk that is full: no small file system could be mounted ({why})"
            ));
        }
        Self {
            retort,
            plugins,
            home,
            disk: disk.ok(),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The binary with these arguments, on a store.
    fn command(&self, store: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.retort);
        command
            .args(arguments)
            .arg("--store")
            .arg(store)
            .arg("--plugin-dir")
            .arg(&self.plugins)
            .current_dir(self.home.path())
            .env("HOME", self.home.path())
            .env("RETORT_SOAK_LEDGER", self.at("ledger"))
            .env_remove("RETORT_PLUGIN_PATH")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        process::default_signals(&mut command);
        command
    }

    /// Runs a command to its end.
    fn retort(&self, store: &Path, arguments: &[&str]) -> Ended {
        Runner::start(self.command(store, arguments)).end(PATIENCE)
    }
}

/// Disturbs runs until the time is over; at least one round.
pub fn disturb(lab: &Lab, seed: u64, time: Duration, report: &mut Report) {
    let began = Instant::now();
    let mut number = 0;
    while number == 0 || began.elapsed() < time {
        if number % ROUNDS == 0 {
            let _ = std::fs::remove_dir_all(lab.at("store"));
            if let Some(disk) = &lab.disk {
                let _ = std::fs::remove_dir_all(disk.path().join("store"));
            }
        }
        let mut round = Round::new(lab, seed, number, report);
        if let Err(broken) = round.go() {
            let place = format!(
                "round {number} of seed {seed}, {}",
                round.recipe.replace('\n', " | ")
            );
            report.violations.push(format!("{broken} ({place})"));
            // A broken store stays broken, so the next round starts with another one.
            number = (number / ROUNDS + 1) * ROUNDS - 1;
        }
        number += 1;
        report.count("rounds");
    }
    report.seconds += began.elapsed().as_secs_f64();
}

/// A soak without hits proves nothing: after enough rounds every kind of disturbance must have hit, and every kind of end must
/// have occurred. After fewer rounds the report says what was not checked.
pub fn check_variety(report: &mut Report) {
    let rounds = report.counts.get("rounds").copied().unwrap_or_default();
    // So far only a disk can be left out.
    let has_disk = report.left_out.is_empty();
    let mut expected: Vec<&str> = DISTURBANCES
        .iter()
        .filter_map(|disturbance| match disturbance {
            Disturbance::Signal(name, ..) | Disturbance::Stop(name, _) => Some(*name),
            Disturbance::KillCommand => Some(COMMANDS),
            Disturbance::Fill => has_disk.then_some("disk filled"),
        })
        .collect();
    expected.extend([
        "runs succeeded",
        "runs failed",
        "runs interrupted",
        "runs lost",
        truth::PARTS,
    ]);
    expected.dedup();
    let mut unchecked = Vec::new();
    for kind in expected {
        let enough = match FREQUENT.contains(&kind) {
            true => ENOUGH_FREQUENT,
            false => ENOUGH,
        };
        if rounds < enough {
            unchecked.push(kind);
        } else if !report.disturbances.contains_key(kind) && !report.counts.contains_key(kind) {
            report.violations.push(format!(
                "nothing was shown about `{kind}`: it never happened"
            ));
        }
    }
    if !unchecked.is_empty() {
        report.left_out.push(format!(
            "whether everything happened: {rounds} rounds are too few to expect {}",
            unchecked.join(", ")
        ));
    }
}

/// A broken promise.
type Broken = String;

struct Round<'a> {
    lab: &'a Lab,
    report: &'a mut Report,
    random: Random,
    recipe: String,
    store: PathBuf,
    /// Whether the store's disk can be filled.
    small: bool,
    /// Commands during the runs.
    beside: Vec<(&'static str, Runner)>,
    /// Right results: the hash of each stage's output.
    right: BTreeMap<String, String>,
}

impl<'a> Round<'a> {
    fn new(lab: &'a Lab, seed: u64, number: usize, report: &'a mut Report) -> Self {
        let mut random = Random::new(seed, &format!("round {number}"));
        let small = lab.disk.is_some() && random.once_in(4);
        let store = match (&lab.disk, small) {
            (Some(disk), true) => disk.path().join("store"),
            _ => lab.at("store"),
        };
        let recipe = recipe(&mut random, seed, number);
        Self {
            lab,
            report,
            random,
            recipe,
            store,
            small,
            beside: Vec::new(),
            right: BTreeMap::new(),
        }
    }

    fn go(&mut self) -> Result<(), Broken> {
        let result = self.live();
        if let Some(disk) = &self.lab.disk {
            disk.free();
        }
        for (_, command) in self.beside.drain(..) {
            command.end(PATIENCE);
        }
        result
    }

    fn live(&mut self) -> Result<(), Broken> {
        let path = self.lab.at("r.yaml");
        std::fs::write(&path, &self.recipe).expect("a recipe");
        self.in_peace()?;
        for life in 0..LIVES {
            let again = life > 0 && self.random.once_in(2);
            if self.disturbed(again)? {
                break;
            }
        }
        self.settle_commands()?;
        let last = self.lab.retort(&self.store, &["run", "r.yaml", "--json"]);
        if last.code != Some(0) {
            return Err(format!("a run in peace ended with {}", last.told()));
        }
        truth::results_are(&last, &self.right)?;
        self.report.count("results compared");
        truth::is_whole(self.lab, &self.store)?;
        let gc = self.lab.retort(&self.store, &["gc", "--remove"]);
        if gc.code != Some(0) {
            return Err(format!("gc in peace ended with {}", gc.told()));
        }
        truth::nothing_is_left_over(&self.store)
    }

    /// The results of an undisturbed run.
    fn in_peace(&mut self) -> Result<(), Broken> {
        let store = self.lab.at("peace");
        let _ = std::fs::remove_dir_all(&store);
        let mut command = self.lab.command(&store, &["run", "r.yaml", "--json"]);
        command.env("RETORT_SOAK_HURRY", "1");
        let said = Runner::start(command).end(PATIENCE);
        if said.code != Some(0) {
            return Err(format!("the undisturbed run ended with {}", said.told()));
        }
        self.right = truth::results(&said)?;
        let given = self.lab.at("given.db");
        let arguments = [
            "runs",
            "export",
            "--files",
            "--force",
            "-o",
            given.to_str().expect("UTF-8"),
        ];
        let said = self.lab.retort(&store, &arguments);
        match said.code {
            Some(0) => Ok(()),
            _ => Err(format!("an export in peace ended with {}", said.told())),
        }
    }

    /// One life: a runner and its disturbances. Returns whether everything is done.
    fn disturbed(&mut self, again: bool) -> Result<bool, Broken> {
        let arguments: &[&str] = match again {
            true => &["resume"],
            false => &["run", "r.yaml"],
        };
        let known = truth::runs(self.lab, &self.store).unwrap_or_default();
        let began = SystemTime::now();
        let mut runner = Runner::start(self.lab.command(&self.store, arguments));
        let mut twin = self.random.once_in(4).then(|| {
            self.report.count("runs beside another");
            Runner::start(self.lab.command(&self.store, &["run", "r.yaml"]))
        });
        let mut life = Life::default();
        let pace = self.random.between(20, 400) as u64;
        while runner.lives() {
            std::thread::sleep(Duration::from_millis(
                self.random.below(pace as usize) as u64
            ));
            life.workers.extend(process::children(runner.pid()));
            let disturbance = *self.random.one_of(&DISTURBANCES);
            if life.hits < 3 {
                self.hit(disturbance, &mut runner, &mut life);
            }
            if self.random.once_in(3) {
                self.start_command();
            }
            if began.elapsed().unwrap_or_default() > PATIENCE {
                return Err("a runner does not end".into());
            }
        }
        if let Some(disk) = &self.lab.disk {
            disk.free();
        }
        let ended = runner.end(PATIENCE);
        truth::end_is_known(&ended, &life)?;
        if let Some(twin) = twin.take() {
            life.workers.extend(process::children(twin.pid()));
            truth::end_is_known(&twin.end(PATIENCE), &life)?;
        }
        truth::workers_are_gone(&life.workers)?;
        self.settle_commands()?;
        truth::states_are_true(self.lab, &self.store, &known, &ended, &life, self.report)?;
        truth::points_are_there(self.lab, &self.store, &life, self.report)?;
        self.report.count("lives");
        Ok(ended.code == Some(0))
    }

    /// Disturbs, and counts hits.
    fn hit(&mut self, disturbance: Disturbance, runner: &mut Runner, life: &mut Life) {
        match disturbance {
            Disturbance::Signal(name, whom, signal) => {
                let Some(pid) = self.pid_of(whom, runner) else {
                    return;
                };
                let now = truth::milliseconds(SystemTime::now());
                if runner.lives() && kill(pid, signal) {
                    life.hits += 1;
                    self.report.disturbed(name);
                    match whom {
                        Victim::Runner => life.runner.push((signal, now)),
                        Victim::Worker => life.worker.push((pid, now)),
                    }
                }
            }
            Disturbance::Stop(name, whom) => {
                let Some(pid) = self.pid_of(whom, runner) else {
                    return;
                };
                if kill(pid, libc::SIGSTOP) {
                    let pause = self.random.between(20, 700) as u64;
                    std::thread::sleep(Duration::from_millis(pause));
                    kill(pid, libc::SIGCONT);
                    life.stopped = true;
                    self.report.disturbed(name);
                }
            }
            Disturbance::KillCommand => {
                let still = self
                    .beside
                    .iter_mut()
                    .position(|(_, command)| command.lives());
                if let Some(at) = still {
                    let (name, command) = &self.beside[at];
                    if kill(command.pid(), libc::SIGKILL) {
                        self.report.disturbed(&format!("{name} killed"));
                        self.report.count(COMMANDS);
                    }
                }
            }
            Disturbance::Fill => {
                let Some(disk) = self.lab.disk.as_ref().filter(|_| self.small) else {
                    return;
                };
                disk.fill();
                let pause = self.random.between(50, 1500) as u64;
                std::thread::sleep(Duration::from_millis(pause));
                disk.free();
                life.filled = true;
                life.hits += 1;
                self.report.disturbed("disk filled");
            }
        }
    }

    fn pid_of(&mut self, whom: Victim, runner: &Runner) -> Option<u32> {
        match whom {
            Victim::Runner => Some(runner.pid()),
            Victim::Worker => {
                let workers: Vec<u32> = process::children(runner.pid()).into_iter().collect();
                (!workers.is_empty()).then(|| *self.random.one_of(&workers))
            }
        }
    }

    /// Starts another command on the store.
    fn start_command(&mut self) {
        if self.beside.len() >= 3 {
            return;
        }
        let given = self.lab.at("given.db");
        let taken = self.lab.at("taken.db");
        let (given, taken) = (
            given.to_str().expect("UTF-8"),
            taken.to_str().expect("UTF-8"),
        );
        let commands: [(&str, &[&str]); 6] = [
            ("gc", &["gc", "--remove"]),
            ("import", &["runs", "import", given]),
            (
                "export",
                &["runs", "export", "--files", "--force", "-o", taken],
            ),
            ("query", &["query", "select count(*) from v_metrics"]),
            ("verify", &["artifacts", "verify"]),
            ("list", &["runs", "list", "--json"]),
        ];
        let (name, arguments) = *self.random.one_of(&commands);
        let command = Runner::start(self.lab.command(&self.store, arguments));
        self.report.count(&format!("{name} beside a run"));
        self.beside.push((name, command));
    }

    /// Waits for the commands beside the run; the only errors allowed are a busy store and nothing found.
    fn settle_commands(&mut self) -> Result<(), Broken> {
        for (name, command) in self.beside.drain(..) {
            let ended = command.end(PATIENCE);
            // A new store has no runs yet; a disk may be full.
            let known = match ended.code {
                Some(0 | 4 | 75) => true,
                Some(1) => {
                    self.small || !self.store.join("history.db").exists() || name != "verify"
                }
                Some(_) => false,
                None => ended.signal == Some(libc::SIGKILL),
            };
            if ended.panicked() || !known {
                return Err(format!("{name} beside a run ended with {}", ended.told()));
            }
        }
        Ok(())
    }
}

/// The disturbances of a runner.
#[derive(Debug, Default)]
struct Life {
    /// Disturbances that may end it.
    hits: usize,
    /// Signals that hit the runner, and when, in milliseconds since 1970.
    runner: Vec<(i32, i64)>,
    /// Workers that were killed, and when.
    worker: Vec<(u32, i64)>,
    /// Whether a process was stopped for a while.
    stopped: bool,
    /// Whether the disk was full.
    filled: bool,
    /// All workers so far.
    workers: BTreeSet<u32>,
}

/// A recipe of a few stages that is unique to this round.
fn recipe(random: &mut Random, seed: u64, round: usize) -> String {
    let mut text = String::from("version: 1\nbackend: soak\nstages:\n");
    for stage in 0..random.between(1, 4) {
        let steps = random.between(3, 25);
        let pause = random.between(1, 30);
        let bytes = random.between(1, 20_000);
        text += &format!(
            "  s{stage}: {{kind: tick, text: {seed}-{round}, steps: {steps}, pause: {pause}, bytes: {bytes}"
        );
        if stage > 0 && !random.once_in(3) {
            text += &format!(", input: s{}", random.below(stage));
        }
        if random.once_in(3) {
            text += &format!(", workers: {}", random.between(2, 3));
        }
        text += "}\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(rounds: u64, happened: &[&str], unchecked: bool, violations: usize) {
        let mut report = Report::new(1);
        report.counts.insert("rounds".to_owned(), rounds);
        for kind in happened {
            report.disturbed(kind);
        }
        check_variety(&mut report);
        assert_eq!(!report.left_out.is_empty(), unchecked, "{report}");
        assert_eq!(report.violations.len(), violations, "{report}");
    }

    #[test]
    fn what_never_happened_is_reported_and_so_are_too_few_rounds() {
        check(ENOUGH_FREQUENT - 1, &[], true, 0);
        check(ENOUGH_FREQUENT, &[], true, FREQUENT.len());
        check(ENOUGH - 1, &FREQUENT, true, 0);
        check(ENOUGH, &[], false, 15);
        check(ENOUGH, &FREQUENT, false, 9);
        check(ENOUGH, &[COMMANDS], false, 14);
    }
}
