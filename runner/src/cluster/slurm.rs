//! Slurm, through its own programs: requests, and the meaning of answers.
//!
//! In: jobs to submit, ids to ask about. Out: ids, states, or an error with what Slurm said and what to do. The programs
//! are those on PATH; their answers are read by formats that are named in the call, within limits, and trusted for
//! ids, states, reasons and node names only. Deliberately absent: what a state means for a stage.

use std::collections::HashMap;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::settings::Profile;

/// How long a program may take. `sbatch` itself retries while the queue is full.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of an answer: a line for each of 100,000 elements.
const MOST_BYTES: u64 = 16 << 20;
/// Bytes of what a program says on its standard error.
const MOST_WORDS: u64 = 64 << 10;

/// A job to submit.
#[derive(Debug)]
pub struct NewJob<'a> {
    /// By which it is found again.
    pub name: &'a str,
    /// Its script, in its spool.
    pub script: &'a Path,
    /// The directory of the spool: where it runs, and where what it prints goes.
    pub spool: &'a Path,
    /// What it is made of.
    pub layout: Layout,
    /// Processors that it needs.
    pub cpus: usize,
    /// What it asks for beside them.
    pub profile: &'a Profile,
}

/// What a job is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One process.
    Single,
    /// So many elements of an array, each with an allocation of its own.
    Array(usize),
    /// So many tasks of one allocation, on one node or on several.
    Ranks(usize),
}

impl Layout {
    /// The number of elements; a single process is none.
    pub fn elements(self) -> Option<usize> {
        match self {
            Self::Single => None,
            Self::Array(elements) | Self::Ranks(elements) => Some(elements),
        }
    }

    /// The name by which Slurm knows element `index`, within the job.
    pub fn element(self, index: usize) -> Option<usize> {
        matches!(self, Self::Array(_)).then_some(index)
    }
}

/// An element of a job, or a job that has none.
pub type Key = (u64, Option<usize>);

/// Slurm's status of an element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElementStatus {
    /// Its state.
    pub state: State,
    /// Why it waits, or what else there is to say.
    pub reason: String,
    /// Where it is or was.
    pub node: String,
}

/// The state of an element, as a runner sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It waits, or will be started again.
    Pending,
    /// It runs, or is about to end.
    Running,
    /// Its script has left.
    Completed,
    /// Its script has left with an error.
    Failed,
    /// Somebody has cancelled it.
    Cancelled,
    /// Its time was over.
    Timeout,
    /// Its node has failed, or never came up.
    NodeFailed,
    /// It was preempted.
    Preempted,
    /// It took more memory than it may.
    OutOfMemory,
    /// Its deadline has passed.
    Deadline,
}

impl State {
    /// From the name that Slurm has for it; a name that is not known is that of something that goes on.
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

    /// Whether Slurm does nothing more about it.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Pending | Self::Running)
    }
}

/// Why a request to Slurm failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SlurmError {
    /// A program is not there.
    #[error(
        "`{program}` was not found on PATH: Slurm's programs are needed on the machine that submits"
    )]
    NotInstalled {
        /// Which.
        program: String,
    },
    /// A job is refused for good.
    #[error("Slurm refuses the job: {said}")]
    Refused {
        /// What it said.
        said: String,
        /// What to do.
        hint: String,
    },
    /// There is no room for the job now.
    #[error("Slurm's queue takes no more jobs now: {said}")]
    Full {
        /// What it said.
        said: String,
    },
    /// It does not answer.
    #[error("Slurm does not answer: {said}")]
    Silent {
        /// What was said instead.
        said: String,
    },
    /// Its answer is invalid.
    #[error("`{program}` gave an invalid answer: {answer}")]
    Odd {
        /// Which program.
        program: String,
        /// The answer, or its beginning.
        answer: String,
    },
}

/// Slurm.
#[derive(Debug, Default)]
pub struct Slurm {
    /// Whether it has said that it keeps no accounts.
    unaccounted: AtomicBool,
}

/// What a program answered.
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
    /// Submits a job, and returns its id and the name of the cluster, if Slurm gives it.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn submit(&self, job: &NewJob<'_>) -> Result<(u64, String), SlurmError> {
        let output = call("sbatch", &arguments(job)).await?;
        if !output.succeeded() {
            let busy = output.stderr.contains("policy") && self.own_jobs().await.unwrap_or(0) > 0;
            return Err(refusal(&output, busy));
        }
        // `id`, or `id;cluster`.
        let line = output.stdout.trim();
        let (id, cluster) = line.split_once(';').unwrap_or((line, ""));
        match id.parse() {
            Ok(id) => Ok((id, cluster.to_owned())),
            Err(_) => Err(odd("sbatch", &output.stdout)),
        }
    }

    /// What Slurm's controller says of jobs; those that it does not know, or no more, are left out.
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

    /// What Slurm's accounts say of jobs; nothing where it keeps none.
    ///
    /// # Errors
    /// [`SlurmError`].
    pub async fn accounts(&self, jobs: &[u64]) -> Result<HashMap<Key, ElementStatus>, SlurmError> {
        if jobs.is_empty() || self.unaccounted.load(Ordering::Relaxed) {
            return Ok(HashMap::new());
        }
        let ids = format!("--jobs={}", list(jobs));
        let fields = "--format=JobID,State,NodeList";
        let words = ["--noheader", "--parsable2", "--allocations", fields, &ids];
        let output = match call("sacct", &words.map(str::to_owned)).await {
            Err(SlurmError::NotInstalled { .. }) => {
                self.unaccounted.store(true, Ordering::Relaxed);
                return Ok(HashMap::new());
            }
            output => output?,
        };
        if !output.succeeded() {
            if output.stderr.contains("accounting storage is disabled") {
                self.unaccounted.store(true, Ordering::Relaxed);
                return Ok(HashMap::new());
            }
            return Err(silent(&output));
        }
        let account = |line: &str| {
            let mut fields = line.split('|');
            let (id, state) = (fields.next()?, fields.next()?);
            let (job, element) = match id.split_once('_') {
                // Elements that have not begun stand in brackets, together.
                Some((job, element)) => (job, Some(element.parse().ok()?)),
                None => (id, None),
            };
            let said = ElementStatus {
                state: State::parse(state),
                reason: bounded(state),
                node: bounded(fields.next().unwrap_or_default()),
            };
            Some(((job.parse().ok()?, element), said))
        };
        Ok(output.stdout.lines().filter_map(account).collect())
    }

    /// The id of the job of this name, if Slurm knows one.
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

    /// How many elements an array may have.
    pub async fn array_size(&self) -> usize {
        const USUAL: usize = 1001;
        let words = ["show", "config"].map(str::to_owned);
        let Ok(output) = call("scontrol", &words).await else {
            return USUAL;
        };
        let value = output.stdout.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name.trim() == "MaxArraySize").then(|| value.trim().parse::<usize>().ok())?
        });
        value.unwrap_or(USUAL).max(1)
    }

    /// Ends elements of a job, or all of it. `waiting`: only what has not begun.
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
        // Arguments have limits: a thousand elements at a time.
        for some in elements.chunks(1000) {
            let mut words = words.clone();
            words.extend(some.iter().map(|element| id(job, *element)));
            let output = call("scancel", &words).await?;
            if !output.succeeded() && output.stderr.contains("nable to contact") {
                return Err(silent(&output));
            }
        }
        Ok(())
    }

    /// Takes off the time that Slurm lets a job wait before it starts it again. Best effort.
    pub async fn start_now(&self, job: u64, element: Option<usize>) {
        let words = [
            "update".to_owned(),
            format!("JobId={}", id(job, element)),
            "StartTime=now".to_owned(),
        ];
        let _ = call("scontrol", &words).await;
    }

    /// Which version of Slurm is there, and whether its controller answers: for people.
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
    // The signal goes to the script, which becomes the watch over the worker; of ranks to the watches that it starts.
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

/// Words of `sbatch` that say what is wrong, and what to do about it.
const REFUSALS: [(&str, &str); 14] = [
    (
        "invalid partition",
        "`sinfo --summarize` lists the partitions; set `partition`",
    ),
    (
        "Invalid account",
        "`sacctmgr show associations user=$USER` lists your accounts; set `account`, and `partition` to one that it may use",
    ),
    (
        "Invalid qos",
        "`sacctmgr show associations user=$USER format=account,qos` lists what you may use; set `qos`",
    ),
    (
        "generic resource",
        "`sinfo --Format=nodelist,gres` lists what nodes have; set `gres`",
    ),
    (
        "Memory specification",
        "no node has so much memory; `sinfo --Format=nodelist,memory` lists what they have; set `memory`",
    ),
    (
        "CPU count",
        "no node has so many processors; `sinfo --Format=nodelist,cpus` lists what they have; set `cpus`",
    ),
    (
        "policy",
        "`sacctmgr show associations user=$USER` and `sacctmgr show qos` list the limits; ask for less with `time`, `cpus`, `gres` or `memory`",
    ),
    (
        "time limit",
        "`sinfo --Format=partition,time` lists the longest times; set `time`",
    ),
    (
        "--time specification",
        "set `time` as Slurm writes it: `90` (minutes), `4:00:00`, `2-12:00:00`",
    ),
    (
        "feature specification",
        "`sinfo --Format=nodelist,features` lists what nodes have; correct `sbatch`",
    ),
    (
        "node configuration is not available",
        "no node of the partition has what the job asks for; compare `cpus`, `memory` and `gres` with `sinfo --long --Node`",
    ),
    (
        "array specification",
        "the cluster takes no array of this size: `scontrol show config` names MaxArraySize",
    ),
    (
        "Access/permission denied",
        "this user may not use the partition, or submit from this machine; ask who runs the cluster",
    ),
    (
        "unrecognized option",
        "a line of `sbatch` is no option of this cluster's sbatch",
    ),
];

/// What an `sbatch` that failed meant. `busy`: whether jobs of this user are in the queue, which may be too many.
fn refusal(output: &ProgramOutput, busy: bool) -> SlurmError {
    let said = words(output);
    let has = |word: &str| said.to_lowercase().contains(&word.to_lowercase());
    if has("temporarily unable") || has("MaxJobCount") || has("SubmitJob") {
        return SlurmError::Full { said };
    }
    if has("nable to contact") || has("timed out") || has("Zero Bytes") || output.status.is_none() {
        return SlurmError::Silent { said };
    }
    // One text for limits of a job and limits of the queue: with nothing in the queue it is the job.
    if has("policy") && busy {
        return SlurmError::Full { said };
    }
    let hint = REFUSALS.iter().find(|(word, _)| has(word)).map_or(
        "correct the profile that `retort doctor` shows",
        |(_, hint)| hint,
    );
    SlurmError::Refused {
        said,
        hint: hint.to_owned(),
    }
}

/// A program's output, in a line.
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

/// At most so much of what somebody else says.
fn bounded(text: &str) -> String {
    text.trim().chars().take(400).collect()
}

/// Runs a program to its end, within limits.
async fn call(program: &str, arguments: &[String]) -> Result<ProgramOutput, SlurmError> {
    let child = tokio::process::Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C in the terminal is the runner's.
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
                // It is ended with what holds it.
                Err(WillRetry) => None,
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

/// `sbatch` found no room, and would try again by itself for two minutes.
struct WillRetry;

/// Reads a pipe to its end, keeping so much.
async fn read(
    pipe: Option<impl AsyncRead + Unpin>,
    most: u64,
    kept: &mut Vec<u8>,
) -> Result<(), WillRetry> {
    const WORDS: &[u8] = b"sleeping and retrying";
    let Some(mut pipe) = pipe else { return Ok(()) };
    let mut bytes = [0; 16 << 10];
    while let Ok(count @ 1..) = pipe.read(&mut bytes).await {
        let room = usize::try_from(most).unwrap_or(usize::MAX) - kept.len();
        kept.extend_from_slice(&bytes[..count.min(room)]);
        if kept.len() < 4096 && kept.windows(WORDS.len()).any(|some| some == WORDS) {
            return Err(WillRetry);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_queue() {
        let said = |state, reason: &str, node: &str| ElementStatus {
            state,
            reason: reason.into(),
            node: node.into(),
        };
        for (text, expected) in [
            (
                "3|0|RUNNING|None|n1",
                Some(((3, Some(0)), said(State::Running, "None", "n1"))),
            ),
            (
                "7|N/A|PENDING|Resources|",
                Some(((7, None), said(State::Pending, "Resources", ""))),
            ),
            (
                "7|12|COMPLETING|None|n1",
                Some(((7, Some(12)), said(State::Running, "None", "n1"))),
            ),
            (
                "7|12|NODE_FAIL|x|",
                Some(((7, Some(12)), said(State::NodeFailed, "x", ""))),
            ),
            ("", None),
            ("slurm_load_jobs error", None),
            ("x|1|RUNNING|None|", None),
            ("3|1-5|PENDING|None|", None),
        ] {
            assert_eq!(line(text), expected, "{text}");
        }
        assert_eq!(State::parse("CANCELLED by 1000"), State::Cancelled);
        assert_eq!(State::parse("SUSPENDED"), State::Running);
    }

    #[test]
    fn refusals_say_what_to_do() {
        use std::os::unix::process::ExitStatusExt;
        let failed = |stderr: &str| ProgramOutput {
            status: Some(ExitStatus::from_raw(256)),
            stdout: String::new(),
            stderr: stderr.into(),
        };
        // As sbatch 22.05 says it.
        for (stderr, hint) in [
            (
                "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid partition name specified",
                "set `partition`",
            ),
            (
                "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
                "set `account`",
            ),
            (
                "sbatch: error: Invalid generic resource (gres) specification",
                "set `gres`",
            ),
            (
                "sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: Requested node configuration is not available",
                "set `memory`",
            ),
            (
                "sbatch: error: Invalid --time specification",
                "as Slurm writes it",
            ),
            (
                "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
                "the longest times",
            ),
            (
                "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
                "list the limits",
            ),
            ("sbatch: error: something new", "retort doctor"),
        ] {
            let error = refusal(&failed(stderr), false);
            let SlurmError::Refused { said, hint: found } = &error else {
                panic!("{error:?}");
            };
            assert!(found.contains(hint), "{stderr}: {found}");
            assert!(!said.contains("sbatch: error"), "{said}");
        }
        let full = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying";
        let policy = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)";
        for stderr in [full, policy] {
            let error = refusal(&failed(stderr), true);
            assert!(matches!(error, SlurmError::Full { .. }), "{error:?}");
        }
        let gone = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)";
        let error = refusal(&failed(gone), true);
        assert!(matches!(error, SlurmError::Silent { .. }), "{error:?}");
    }
}
