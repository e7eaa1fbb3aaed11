//! The interface to Slurm's programs: requests, and how to read their answers.
//!
//! In: jobs to submit, ids to query. Out: ids, states, or an error with Slurm's message and what to do. The programs are those
//! on PATH. Each call names the output format, limits its size, and trusts only ids, states, reasons and node names.
//! Deliberately absent: what a state means for a stage.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::OnceCell;

use crate::settings::Profile;

mod refusal;
mod variables;

pub(in crate::cluster) use refusal::is_unanswered;
use refusal::refusal;
use variables::is_stray;

/// How long a program may take. `sbatch` itself retries while the queue is full.
const LIMIT: Duration = Duration::from_secs(60);
/// The most bytes of an answer: one line for each of 100,000 elements.
const MOST_BYTES: u64 = 16 << 20;
/// The most bytes of a program's standard error.
const MOST_WORDS: u64 = 64 << 10;

/// A job to submit.
#[derive(Debug)]
pub struct NewJob<'a> {
    /// The name by which it can be found again.
    pub name: &'a str,
    /// Its script, in its spool.
    pub script: &'a Path,
    /// The spool's directory, in which the job runs and where its output goes.
    pub spool: &'a Path,
    /// Its layout.
    pub layout: Layout,
    /// Processors per task.
    pub cpus: usize,
    /// Its other requests.
    pub profile: &'a Profile,
}

/// The layout of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One process.
    Single,
    /// An array of this many elements, each with a separate allocation.
    Array(usize),
    /// This many tasks in one allocation, on one node or several.
    Ranks(usize),
}

impl Layout {
    /// The number of elements; None for a single process.
    pub fn elements(self) -> Option<usize> {
        match self {
            Self::Single => None,
            Self::Array(elements) | Self::Ranks(elements) => Some(elements),
        }
    }

    /// The element that reports the progress of element `index`: of ranks, only the first does.
    pub fn reporter(self, index: usize) -> usize {
        match self {
            Self::Ranks(_) => 0,
            Self::Single | Self::Array(_) => index,
        }
    }

    /// Slurm's number of element `index` within the job.
    pub fn element(self, index: usize) -> Option<usize> {
        matches!(self, Self::Array(_)).then_some(index)
    }
}

/// A job, and the element if it has several.
pub type Key = (u64, Option<usize>);

/// Slurm's status of an element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElementStatus {
    /// Its state.
    pub state: State,
    /// Why it waits, or another remark.
    pub reason: String,
    /// The node that runs or ran it.
    pub node: String,
}

/// The state of an element, as far as the runner distinguishes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It waits for its first start or another.
    Pending,
    /// It runs, or is about to end.
    Running,
    /// Its script has exited.
    Completed,
    /// Its script has exited with an error.
    Failed,
    /// It was cancelled.
    Cancelled,
    /// It reached its time limit.
    Timeout,
    /// Its node failed, or never came up.
    NodeFailed,
    /// It was preempted.
    Preempted,
    /// It exceeded its memory limit.
    OutOfMemory,
    /// Its deadline has passed.
    Deadline,
}

impl State {
    /// From Slurm's name; an unknown name is taken for a state in which the element is still active.
    fn parse(name: &str) -> Self {
        // `CANCELLED by 1000`, `CANCELLED+`.
        let word = name.split([' ', '+']).next().unwrap_or_default();
        match word {
            "PENDING" | "REQUEUED" | "REQUEUE_HOLD" | "REQUEUE_FED" | "SPECIAL_EXIT"
            | "RESV_DEL_HOLD" => Self::Pending,
            "COMPLETED" => Self::Completed,
            "FAILED" => Self::Failed,
            "CANCELLED" | "REVOKED" => Self::Cancelled,
            "TIMEOUT" => Self::Timeout,
            "NODE_FAIL" | "BOOT_FAIL" => Self::NodeFailed,
            "PREEMPTED" => Self::Preempted,
            "OUT_OF_MEMORY" => Self::OutOfMemory,
            "DEADLINE" => Self::Deadline,
            _ => Self::Running,
        }
    }

    /// What went wrong, in the history's words, if Slurm knows.
    pub fn fault(self) -> Option<&'static str> {
        Some(match self {
            Self::Cancelled => "cancelled in Slurm",
            Self::Timeout => "time limit",
            Self::NodeFailed => "node failed",
            Self::Preempted => "preempted",
            Self::OutOfMemory => "out of memory in Slurm",
            Self::Deadline => "deadline",
            Self::Pending | Self::Running | Self::Completed | Self::Failed => return None,
        })
    }

    /// Whether Slurm has finished with it.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Pending | Self::Running)
    }
}

/// Why a request to Slurm failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SlurmError {
    /// A program is missing.
    #[error(
        "`{program}` was not found on PATH: Slurm's programs are needed on the machine that submits"
    )]
    NotInstalled {
        /// Which.
        program: String,
    },
    /// A job is refused permanently.
    #[error("Slurm refuses the job: {said}")]
    Refused {
        /// Slurm's message.
        said: String,
        /// What to do.
        hint: String,
    },
    /// There is no room for the job at the moment.
    #[error("Slurm's queue takes no more jobs now: {said}")]
    Full {
        /// Slurm's message.
        said: String,
    },
    /// Slurm does not answer.
    #[error("Slurm does not answer: {said}")]
    Silent {
        /// What it reported instead.
        said: String,
    },
    /// An answer is invalid.
    #[error("`{program}` gave an invalid answer: {answer}")]
    Odd {
        /// Which program.
        program: String,
        /// The answer, perhaps cut.
        answer: String,
    },
}

/// Slurm.
#[derive(Debug, Default)]
pub struct Slurm {
    /// Whether accounting turned out to be off.
    unaccounted: AtomicBool,
    /// The cluster's configuration, once known.
    cluster: OnceCell<ClusterConfig>,
}

/// A cluster's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterConfig {
    /// Its name; empty if unknown.
    pub name: String,
    /// How many elements an array may have.
    pub array_size: usize,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            array_size: 1001,
        }
    }
}

/// A finished start of an element, from the accounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PastStart {
    /// The element.
    pub place: Key,
    /// How it ended.
    pub state: State,
    /// When: seconds since 1970, by the controller's clock.
    pub ended: i64,
}

/// A program's answer.
struct ProgramOutput {
    status: Option<ExitStatus>,
    stdout: String,
    stderr: String,
}

impl ProgramOutput {
    fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }
}

impl Slurm {
    /// Submits a job, and returns its id.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn submit(&self, job: &NewJob<'_>) -> Result<u64, SlurmError> {
        let output = call("sbatch", &arguments(job)).await?;
        if !output.succeeded() {
            let busy = output.stderr.contains("policy") && self.own_jobs().await.unwrap_or(0) > 0;
            return Err(refusal(&output, busy));
        }
        // `id`, or in a federation `id;cluster`.
        let answer = output.stdout.trim();
        let (id, elsewhere) = answer.split_once(';').unwrap_or((answer, ""));
        let id = id.parse().map_err(|_| odd("sbatch", &output.stdout))?;
        let here = self.cluster().await.name;
        if !elsewhere.is_empty() && !here.is_empty() && !elsewhere.eq_ignore_ascii_case(&here) {
            // Nobody would watch it there.
            let there = [format!("--clusters={elsewhere}"), format!("{id}")];
            let _ = call("scancel", &there).await;
            return Err(SlurmError::Refused {
                said: format!(
                    "`sbatch` has sent it to the cluster {}, not to {here}",
                    bounded(elsewhere)
                ),
                hint: "retort submits to this machine's cluster only; run it on a machine that submits to the other cluster"
                    .into(),
            });
        }
        Ok(id)
    }

    /// The status of jobs from Slurm's controller; jobs that it does not know, or has forgotten, are left out.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn look(&self, jobs: &[u64]) -> Result<HashMap<Key, ElementStatus>, SlurmError> {
        if jobs.is_empty() {
            return Ok(HashMap::new());
        }
        let ids = format!("--jobs={}", list(jobs));
        let format = "--format=%F|%K|%T|%r|%N";
        let output = call(
            "squeue",
            &["--noheader", "--array", "--states=all", format, &ids].map(str::to_owned),
        )
        .await?;
        if !output.succeeded() && !output.stderr.contains("Invalid job id") {
            return Err(silent(&output));
        }
        Ok(output.stdout.lines().filter_map(line).collect())
    }

    /// The status of jobs from Slurm's accounts; empty without accounting.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn accounts(&self, jobs: &[u64]) -> Result<HashMap<Key, ElementStatus>, SlurmError> {
        if jobs.is_empty() {
            return Ok(HashMap::new());
        }
        let of = format!("--jobs={}", list(jobs));
        let said = self.sacct(&of, &["--format=JobID,State,NodeList"]).await?;
        Ok(said.lines().filter_map(account).collect())
    }

    /// How the starts of jobs ended according to Slurm's accounts, including those that were followed by a restart; empty
    /// without accounting.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn past_starts(&self, jobs: &[u64]) -> Result<Vec<PastStart>, SlurmError> {
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        let of = format!("--jobs={}", list(jobs));
        let words = ["--duplicates", "--format=JobID,State,NodeList,End"];
        let said = self.sacct(&of, &words).await?;
        Ok(said.lines().filter_map(past_start).collect())
    }

    /// `sacct`'s lines about the jobs `of` an option; empty without accounting.
    async fn sacct(&self, of: &str, words: &[&str]) -> Result<String, SlurmError> {
        if self.unaccounted.load(Ordering::Relaxed) {
            return Ok(String::new());
        }
        let all = ["--noheader", "--parsable2", "--allocations", of];
        let all: Vec<String> = all.iter().chain(words).map(|&word| word.into()).collect();
        let output = match call("sacct", &all).await {
            Err(SlurmError::NotInstalled { .. }) => {
                self.unaccounted.store(true, Ordering::Relaxed);
                return Ok(String::new());
            }
            output => output?,
        };
        if !output.succeeded() {
            if output.stderr.contains("accounting storage is disabled") {
                self.unaccounted.store(true, Ordering::Relaxed);
                return Ok(String::new());
            }
            return Err(silent(&output));
        }
        Ok(output.stdout)
    }

    /// Which of these nodes have failed, or do not answer the controller.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn failed_nodes(
        &self,
        nodes: &BTreeSet<&str>,
    ) -> Result<BTreeSet<String>, SlurmError> {
        let is_name = |name: &&str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            name.starts_with(|first: char| first.is_ascii_alphanumeric()) && name.bytes().all(plain)
        };
        let names: Vec<&str> = nodes.iter().copied().filter(is_name).collect();
        if names.is_empty() {
            return Ok(BTreeSet::new());
        }
        let names = names.join(",");
        let words = ["--oneliner", "show", "node", &names].map(str::to_owned);
        let said = call("scontrol", &words).await?.stdout;
        Ok(said.lines().filter_map(failed_node).collect())
    }

    /// The status of jobs from Slurm's controller and, for those that it has forgotten, from the accounts. The accounts are
    /// only asked if `lacks` reports that something is missing.
    ///
    /// # Errors
    /// [`SlurmError`]: the controller does not answer.
    pub async fn look_back(
        &self,
        jobs: &[u64],
        lacks: impl FnOnce(&HashMap<Key, ElementStatus>) -> bool,
    ) -> Result<HashMap<Key, ElementStatus>, SlurmError> {
        let mut known = self.look(jobs).await?;
        if lacks(&known) {
            let accounts = self.accounts(jobs).await.unwrap_or_default();
            // What the controller does not know is not running, even if the accounts have not recorded its end yet.
            for (key, said) in accounts
                .into_iter()
                .filter(|(_, said)| said.state.is_final())
            {
                known.entry(key).or_insert(said);
            }
        }
        Ok(known)
    }

    /// The id of the job with this name in Slurm's accounts, which remember jobs that the controller has forgotten.
    pub async fn find_ended(&self, name: &str) -> Option<u64> {
        // Without a start time `sacct` shows only today's jobs.
        let words = ["--starttime=now-90days", "--format=JobID,State,NodeList"];
        let said = self.sacct(&format!("--name={name}"), &words).await.ok()?;
        let found = said.lines().find_map(account);
        found.map(|((job, _), _)| job)
    }

    /// The id of the job with this name, if Slurm knows one.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn find(&self, name: &str) -> Result<Option<u64>, SlurmError> {
        let name = format!("--name={name}");
        let words = ["--noheader", "--states=all", "--format=%F", &name].map(str::to_owned);
        let output = call("squeue", &words).await?;
        if !output.succeeded() {
            return Err(silent(&output));
        }
        let first = output.stdout.lines().next().unwrap_or_default();
        Ok(first.trim().parse().ok())
    }

    /// How many jobs of this user are in the queue.
    async fn own_jobs(&self) -> Result<usize, SlurmError> {
        let words = ["--noheader", "--me", "--format=%F"].map(str::to_owned);
        Ok(call("squeue", &words).await?.stdout.lines().count())
    }

    /// The cluster's configuration. Slurm is asked until it has answered once.
    pub async fn cluster(&self) -> ClusterConfig {
        let asked = self.cluster.get_or_try_init(|| async {
            let words = ["show", "config"].map(str::to_owned);
            match call("scontrol", &words).await {
                Ok(output) if output.succeeded() => Ok(cluster_config(&output.stdout)),
                _ => Err(()),
            }
        });
        asked.await.cloned().unwrap_or_default()
    }

    /// Cancels elements of a job, or the whole job. `waiting`: only elements that have not started.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn cancel(
        &self,
        job: u64,
        elements: &[Option<usize>],
        waiting: bool,
    ) -> Result<(), SlurmError> {
        let mut words: Vec<String> = vec!["--quiet".into()];
        if waiting {
            words.push("--state=PENDING".into());
        }
        // The command line has a limit: a thousand elements at a time.
        for some in elements.chunks(1000) {
            let mut words = words.clone();
            words.extend(some.iter().map(|element| id(job, *element)));
            let output = call("scancel", &words).await?;
            if output.status.is_none() || (!output.succeeded() && is_unanswered(&output.stderr)) {
                return Err(silent(&output));
            }
        }
        Ok(())
    }

    /// Removes the delay before Slurm restarts a job. Best effort.
    pub async fn start_now(&self, job: u64, element: Option<usize>) {
        let words = [
            "update".to_owned(),
            format!("JobId={}", id(job, element)),
            "StartTime=now".to_owned(),
        ];
        let _ = call("scontrol", &words).await;
    }

    /// Releases a job that Slurm holds. Best effort.
    pub async fn release(&self, job: u64, element: Option<usize>) {
        let _ = call("scontrol", &["release".to_owned(), id(job, element)]).await;
    }

    /// Slurm's version, and whether its controller answers, for people.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn greet(&self) -> Result<String, SlurmError> {
        let version = call("sbatch", &["--version".to_owned()]).await?;
        let ping = call("scontrol", &["ping".to_owned()]).await?;
        match ping.succeeded() && ping.stdout.contains("UP") {
            true => Ok(bounded(version.stdout.trim())),
            false => Err(silent(&ping)),
        }
    }

    /// Whether Slurm keeps accounts.
    pub async fn keeps_accounts(&self) -> bool {
        let _ = self.accounts(&[1]).await;
        !self.unaccounted.load(Ordering::Relaxed)
    }
}

/// `17`, `17_3`.
pub fn id(job: u64, element: Option<usize>) -> String {
    match element {
        Some(element) => format!("{job}_{element}"),
        None => job.to_string(),
    }
}

fn list(jobs: &[u64]) -> String {
    let jobs: Vec<String> = jobs.iter().map(u64::to_string).collect();
    jobs.join(",")
}

/// A line of `sacct`.
fn account(line: &str) -> Option<(Key, ElementStatus)> {
    let mut fields = line.split('|');
    let (id, state) = (fields.next()?, fields.next()?);
    let (job, element) = match id.split_once('_') {
        // Elements that have not started are grouped in brackets.
        Some((job, element)) => (job, Some(element.parse().ok()?)),
        None => (id, None),
    };
    let said = ElementStatus {
        state: State::parse(state),
        reason: bounded(state),
        node: bounded(fields.next().unwrap_or_default()),
    };
    Some(((job.parse().ok()?, element), said))
}

/// A line of `sacct` about a finished start.
fn past_start(line: &str) -> Option<PastStart> {
    let (place, said) = account(line)?;
    let ended = line.split('|').nth(3)?.trim().parse().ok()?;
    let state = said.state;
    Some(PastStart {
        place,
        state,
        ended,
    })
}

/// The name of a node, if this line of `scontrol show node` reports it as failed.
fn failed_node(line: &str) -> Option<String> {
    let value = |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name));
    let state = value("State=")?;
    // `DOWN*+DRAIN`: a star or a word marks a node that does not answer.
    let failed =
        |word: &str| word.ends_with('*') || matches!(word, "DOWN" | "FAIL" | "NOT_RESPONDING");
    let name = value("NodeName=")?;
    state.split('+').any(failed).then(|| bounded(name))
}

/// The answer of `scontrol show config`.
fn cluster_config(said: &str) -> ClusterConfig {
    let value = |wanted: &str| {
        said.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name.trim() == wanted).then(|| value.trim())
        })
    };
    let usual = ClusterConfig::default();
    let size = value("MaxArraySize").and_then(|size| size.parse::<usize>().ok());
    ClusterConfig {
        name: bounded(value("ClusterName").unwrap_or_default()),
        array_size: size.unwrap_or(usual.array_size).max(1),
    }
}

/// A line of `squeue`.
fn line(line: &str) -> Option<(Key, ElementStatus)> {
    let mut fields = line.split('|');
    let (job, element) = (fields.next()?, fields.next()?);
    let said = ElementStatus {
        state: State::parse(fields.next()?),
        reason: bounded(fields.next()?),
        node: bounded(fields.next().unwrap_or_default()),
    };
    let element = match element.trim() {
        "N/A" => None,
        element => Some(element.parse().ok()?),
    };
    Some(((job.trim().parse().ok()?, element), said))
}

/// The arguments of `sbatch`.
fn arguments(job: &NewJob<'_>) -> Vec<String> {
    let profile = job.profile;
    let mut words: Vec<String> = vec![
        "--parsable".into(),
        format!("--job-name={}", job.name),
        format!("--chdir={}", job.spool.display()),
        "--open-mode=append".into(),
        "--requeue".into(),
        format!("--cpus-per-task={}", job.cpus),
    ];
    let ahead = profile.signal.as_secs();
    // The signal goes to the script, which becomes the worker's supervisor; with ranks, to the supervisors that it starts.
    match job.layout {
        Layout::Single | Layout::Array(_) => words.extend([
            "--nodes=1".into(),
            "--ntasks=1".into(),
            format!("--signal=B:USR1@{ahead}"),
        ]),
        Layout::Ranks(ranks) => words.extend([
            format!("--ntasks={ranks}"),
            format!("--signal=USR1@{ahead}"),
        ]),
    }
    match job.layout {
        Layout::Single | Layout::Ranks(_) => words.push("--output=0.out".into()),
        Layout::Array(elements) => {
            let limit = profile
                .array_limit
                .map_or_else(String::new, |limit| format!("%{limit}"));
            words.push(format!("--array=0-{}{limit}", elements.max(1) - 1));
            words.push("--output=%a.out".into());
        }
    }
    for (name, value) in [
        ("partition", &profile.partition),
        ("account", &profile.account),
        ("qos", &profile.qos),
        ("time", &profile.time),
        ("gres", &profile.gres),
        ("mem", &profile.memory),
    ] {
        if let Some(value) = value {
            words.push(format!("--{name}={value}"));
        }
    }
    words.extend(profile.sbatch.iter().cloned());
    words.push(job.script.display().to_string());
    words
}

/// A program's output, on one line.
fn words(output: &ProgramOutput) -> String {
    let lines: Vec<&str> = output
        .stderr
        .lines()
        .map(|line| {
            line.trim_start_matches("sbatch: ")
                .trim_start_matches("error: ")
                .trim()
        })
        .filter(|line| !line.is_empty())
        .collect();
    match (lines.as_slice(), output.status) {
        ([], None) => format!("no answer within {} s", LIMIT.as_secs()),
        ([], Some(status)) => format!("nothing ({status})"),
        (lines, _) => bounded(&lines.join("; ")),
    }
}

fn silent(output: &ProgramOutput) -> SlurmError {
    SlurmError::Silent {
        said: words(output),
    }
}

fn odd(program: &str, answer: &str) -> SlurmError {
    SlurmError::Odd {
        program: program.to_owned(),
        answer: bounded(answer),
    }
}

/// Text from elsewhere, cut to a limit.
fn bounded(text: &str) -> String {
    text.trim().chars().take(400).collect()
}

/// Runs a program to its end, within limits.
async fn call(program: &str, arguments: &[String]) -> Result<ProgramOutput, SlurmError> {
    let mut command = tokio::process::Command::new(program);
    let in_job = std::env::var_os("SLURM_JOB_ID").is_some();
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| is_stray(name, in_job)) {
            command.env_remove(name);
        }
    }
    if program == "sacct" {
        // Times as seconds since 1970. Not for `sbatch`, whose environment its jobs inherit.
        command.env("SLURM_TIME_FORMAT", "%s");
    }
    let child = command
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C in the terminal is for the runner.
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = child.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => SlurmError::NotInstalled {
            program: program.to_owned(),
        },
        _ => SlurmError::Silent {
            said: format!("`{program}` could not be started: {error}"),
        },
    })?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = {
        let exchange = async {
            let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
            let heard = tokio::try_join!(
                read(stdout, MOST_BYTES, &mut out),
                read(stderr, MOST_WORDS, &mut err)
            );
            match heard {
                Ok(_) => child.wait().await.ok(),
                // It is killed when its handle is dropped.
                Err(QueueFull) => None,
            }
        };
        tokio::time::timeout(LIMIT, exchange).await.ok().flatten()
    };
    if out.len() as u64 == MOST_BYTES {
        return Err(odd(program, "it is too long"));
    }
    Ok(ProgramOutput {
        status,
        stdout: String::from_utf8_lossy(&out).into_owned(),
        stderr: String::from_utf8_lossy(&err).into_owned(),
    })
}

/// The queue is full: `sbatch` found no room, and would itself retry for two minutes.
struct QueueFull;

/// Reads a pipe to its end, and keeps a limited part.
async fn read(
    pipe: Option<impl AsyncRead + Unpin>,
    most: u64,
    kept: &mut Vec<u8>,
) -> Result<(), QueueFull> {
    const WORDS: &[u8] = b"sleeping and retrying";
    let Some(mut pipe) = pipe else { return Ok(()) };
    let mut bytes = [0; 16 << 10];
    while let Ok(count @ 1..) = pipe.read(&mut bytes).await {
        let room = usize::try_from(most).unwrap_or(usize::MAX) - kept.len();
        kept.extend_from_slice(&bytes[..count.min(room)]);
        if kept.len() < 4096 && kept.windows(WORDS.len()).any(|some| some == WORDS) {
            return Err(QueueFull);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
