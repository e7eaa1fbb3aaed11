//! Ranks that `torchrun` has started, or a script that sets the same environment variables.
//!
//! In: a process's [`LaunchedRank`], from torchrun's environment variables, and the directory of a store that all processes
//! see. Rank 0 runs the recipe and posts trainings on its [`TrainingBoard`]. The other ranks [`follow`] it: each supervises a
//! worker and never opens the history. Their events come back through [spools](super::spool), as on a cluster. Each message is
//! a new file with a greater number, so nothing relies on clocks, on locks or on replacing an open file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use retort_checkpoint::regular;
use serde::{Deserialize, Serialize};

use crate::cluster::node::{self, ElementIdentity, NodeError};
use crate::cluster::spool;

mod rank;

pub use rank::{PostedTraining, RemoteRank};

/// The first rank's heartbeat interval, and how often the others look.
const BEAT: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(200);
/// How long the first rank may be silent, before its first heartbeat and afterwards.
const UNSEEN: Duration = Duration::from_secs(1800);
const SILENT: Duration = Duration::from_secs(60);
/// How long the first rank waits, before it exits, for others that have not seen it yet.
const FAREWELL: Duration = Duration::from_secs(20);
/// How many of the last messages are kept, for ranks that are about to read them.
const KEPT: u64 = 8;
/// The most bytes of a message.
const LONGEST: u64 = 1 << 20;

/// A rank's place among the processes that were started together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchedRank {
    /// Its rank, from 0.
    pub rank: usize,
    /// The number of ranks.
    pub size: usize,
    /// Its number among the ranks on its machine.
    pub local_rank: usize,
    /// The number of ranks on its machine.
    pub local_size: usize,
    /// The rendezvous address: host and port.
    pub address: String,
    /// See `address`.
    pub port: u16,
}

/// Why a process has no valid rank.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{variable} {problem}: `torchrun` sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process"
)]
pub struct LaunchedRankError {
    variable: &'static str,
    problem: String,
}

impl LaunchedRank {
    /// Reads torchrun's environment variables.
    ///
    /// # Errors
    /// One is missing or invalid.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, LaunchedRankError> {
        let given = |name: &'static str| {
            let value = variable(name).filter(|value| !value.is_empty());
            value.ok_or_else(|| LaunchedRankError {
                variable: name,
                problem: "is not set".into(),
            })
        };
        let number = |name: &'static str, least: usize, most: usize| {
            let value = given(name)?;
            let found = value.parse().ok();
            found
                .filter(|number| (least..=most).contains(number))
                .ok_or_else(|| LaunchedRankError {
                    variable: name,
                    problem: format!("is `{value}`, which is no number from {least} to {most}"),
                })
        };
        const MOST: usize = 1 << 16;
        let size = number("WORLD_SIZE", 1, MOST)?;
        let local_size = match variable("LOCAL_WORLD_SIZE") {
            Some(_) => number("LOCAL_WORLD_SIZE", 1, size)?,
            None => tasks_of_node(&variable, size).unwrap_or(size),
        };
        Ok(Self {
            rank: number("RANK", 0, size - 1)?,
            size,
            local_rank: number("LOCAL_RANK", 0, size - 1)?,
            local_size,
            address: given("MASTER_ADDR")?,
            port: number("MASTER_PORT", 1, usize::from(u16::MAX))? as u16,
        })
    }

    /// The directory in a store for the messages of processes that were started together.
    fn messages_dir(&self, store: &Path) -> PathBuf {
        let plain = |letter: char| match letter.is_ascii_alphanumeric() || letter == '.' {
            true => letter,
            false => '_',
        };
        let address: String = self.address.chars().map(plain).collect();
        store
            .join("torchrun")
            .join(spool::FOLDER)
            .join(format!("at-{address}-{}", self.port))
    }
}

/// How many of a Slurm step's `size` tasks run on this node (`srun` by hand). `SLURM_STEP_TASKS_PER_NODE` is `2(x3),1` if three
/// nodes have two tasks each and the last has one.
fn tasks_of_node(variable: impl Fn(&str) -> Option<String>, size: usize) -> Option<usize> {
    let node: usize = variable("SLURM_NODEID")?.parse().ok()?;
    let (mut nodes, mut tasks, mut found) = (0_usize, 0, None);
    for run in variable("SLURM_STEP_TASKS_PER_NODE")?.split(',') {
        let (each, count) = match run.split_once("(x") {
            Some((each, count)) => (each, count.strip_suffix(')')?.parse().ok()?),
            None => (run, 1_usize),
        };
        let each: usize = each.parse().ok()?;
        if (nodes..nodes.checked_add(count)?).contains(&node) {
            found = Some(each);
        }
        (nodes, tasks) = (nodes + count, each.checked_mul(count)?.checked_add(tasks)?);
    }
    // The ranks may be different processes than the tasks.
    found.filter(|own| tasks == size && *own > 0)
}

/// A message from the first rank to the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct LaunchMessage {
    /// Distinguishes this start of the processes from earlier ones at the same address.
    launch: String,
    /// Grows while the first rank is alive.
    beat: u64,
    /// Spools of the trainings so far.
    jobs: Vec<PathBuf>,
    /// Whether the run succeeded, once it has ended.
    over: Option<bool>,
}

/// Where the first rank posts trainings for the others.
#[derive(Debug)]
pub struct TrainingBoard {
    dir: PathBuf,
    place: LaunchedRank,
    message: Arc<Mutex<LaunchMessage>>,
    beats: Option<(Sender<()>, JoinHandle<()>)>,
}

impl TrainingBoard {
    /// Opens the board in a store, and replaces an older one at the same address.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn open(store: &Path, place: LaunchedRank) -> io::Result<Self> {
        let dir = std::path::absolute(place.messages_dir(store))?;
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        spool::make_dir(&dir)?;
        let begun = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let begun = begun.unwrap_or_default().as_nanos();
        let message = LaunchMessage {
            launch: format!("{}-{begun}", std::process::id()),
            beat: 0,
            jobs: Vec::new(),
            over: None,
        };
        post(&dir, &message)?;
        let message = Arc::new(Mutex::new(message));
        let (stop, stopped) = channel();
        let (shared, at) = (Arc::clone(&message), dir.clone());
        let beat = move || {
            while stopped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                // A heartbeat that cannot be written is made up for by the next.
                let _ = amend(&at, &shared, |_| {});
            }
        };
        let beats = Some((stop, std::thread::spawn(beat)));
        Ok(Self {
            dir,
            place,
            message,
            beats,
        })
    }

    /// This process's rank.
    pub fn place(&self) -> &LaunchedRank {
        &self.place
    }

    /// A name that no other training has, here or in another launch.
    fn name_of_next(&self) -> String {
        let message = lock(&self.message);
        format!("torchrun-{}-{}", message.launch, message.jobs.len())
    }

    /// Posts the training with this spool for the others.
    fn assign(&self, spool: &Path) -> io::Result<()> {
        amend(&self.dir, &self.message, |message| {
            message.jobs.push(spool.to_owned())
        })
    }

    /// Lets the others exit, once each has seen a heartbeat.
    pub fn close(mut self, good: bool) {
        let launch = lock(&self.message).launch.clone();
        let seen = |rank: usize| self.dir.join(greeting(&launch, rank)).exists();
        let began = Instant::now();
        while !(1..self.place.size).all(seen) && began.elapsed() < FAREWELL {
            std::thread::sleep(LOOK);
        }
        self.end(good);
    }

    fn end(&mut self, good: bool) {
        if let Some((stop, thread)) = self.beats.take() {
            drop(stop);
            let _ = thread.join();
            let _ = amend(&self.dir, &self.message, |message| {
                message.over = Some(good)
            });
        }
    }
}

impl Drop for TrainingBoard {
    fn drop(&mut self) {
        self.end(false);
    }
}

fn lock(message: &Mutex<LaunchMessage>) -> MutexGuard<'_, LaunchMessage> {
    message.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Posts a change.
fn amend(
    dir: &Path,
    message: &Mutex<LaunchMessage>,
    change: impl FnOnce(&mut LaunchMessage),
) -> io::Result<()> {
    let mut message = lock(message);
    change(&mut message);
    message.beat += 1;
    post(dir, &message)
}

fn post(dir: &Path, message: &LaunchMessage) -> io::Result<()> {
    let text = serde_json::to_vec(message).map_err(io::Error::other)?;
    let unfinished = dir.join(format!("{}.new", message.beat));
    spool::put(&unfinished, &text)?;
    // Under a new name, so that nobody reads an incomplete message.
    fs::rename(&unfinished, dir.join(message.beat.to_string()))?;
    if let Some(old) = message.beat.checked_sub(KEPT) {
        let _ = fs::remove_file(dir.join(old.to_string()));
    }
    Ok(())
}

/// The newest readable message, if any.
fn newest(dir: &Path) -> Option<LaunchMessage> {
    let entries = fs::read_dir(dir).ok()?.flatten();
    let mut numbers: Vec<u64> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers.iter().rev().find_map(|number| {
        let text = regular::patiently(|| regular::read(&dir.join(number.to_string()), LONGEST));
        serde_json::from_slice(&text.ok()?).ok()
    })
}

/// The file with which a rank confirms that it has seen a launch.
fn greeting(launch: &str, rank: usize) -> String {
    format!("{launch}.rank-{rank}")
}

/// Why a rank gives up.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The first rank is missing or gone.
    #[error("rank {rank} of {size} hears nothing from rank 0: it posts in {}", dir.display())]
    Alone {
        /// The rank.
        rank: usize,
        /// The number of ranks.
        size: usize,
        /// The directory it looked in.
        dir: PathBuf,
    },
    /// It could not run its part.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The working directory is gone.
    #[error("the store's directory has no path: {0}")]
    NoPath(#[from] io::Error),
}

/// Runs what the first rank posts until that ends. Returns whether the run succeeded.
///
/// # Errors
/// [`FollowError`].
pub async fn follow(store: &Path, place: &LaunchedRank, node: &str) -> Result<bool, FollowError> {
    let dir = std::path::absolute(place.messages_dir(store))?;
    let mut first: Option<LaunchMessage> = None;
    let (mut alive, mut beat, mut done, mut heard) = (false, 0, 0, Instant::now());
    loop {
        if let Some(message) = newest(&dir) {
            // Until its heartbeat changes, a message may be left over from an earlier launch.
            match &first {
                Some(known) if known.launch == message.launch => {
                    if message.beat > beat {
                        (beat, heard) = (message.beat, Instant::now());
                        if !std::mem::replace(&mut alive, true) {
                            let _ =
                                spool::put(&dir.join(greeting(&message.launch, place.rank)), b"");
                        }
                    }
                }
                _ => {
                    (beat, alive, done) = (message.beat, false, 0);
                    first = Some(message.clone());
                }
            }
            if alive && let Some(job) = message.jobs.get(done) {
                done += 1;
                let identity = ElementIdentity {
                    spool: job.clone(),
                    element: place.rank,
                    job: String::new(),
                    shown_job: format!("of rank {}", place.rank),
                    node: node.to_owned(),
                    local_rank: place.local_rank,
                    sees_all_devices: true,
                };
                node::serve(&identity).await?;
                heard = Instant::now();
                continue;
            }
            if alive && let Some(good) = message.over {
                return Ok(good);
            }
        }
        if heard.elapsed() > if alive { SILENT } else { UNSEEN } {
            return Err(FollowError::Alone {
                rank: place.rank,
                size: place.size,
                dir,
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(changes: &[(&str, &str)]) -> Result<LaunchedRank, String> {
        let given = [
            ("RANK", "3"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "node-1"),
            ("MASTER_PORT", "29500"),
        ];
        let all = || changes.iter().chain(&given);
        let read = LaunchedRank::read(|name| {
            let (_, value) = all().find(|(known, _)| *known == name)?;
            Some((*value).to_owned())
        });
        read.map_err(|error| error.to_string())
    }

    #[test]
    fn a_place_is_read_from_the_contract() {
        let found = place(&[("LOCAL_WORLD_SIZE", "2")]).unwrap();
        assert_eq!((found.rank, found.size, found.local_rank), (3, 8, 1));
        assert_eq!((found.local_size, found.port), (2, 29500));
        assert_eq!(place(&[]).unwrap().local_size, 8);
        let slurm = |node, tasks| {
            let step = [("SLURM_NODEID", node), ("SLURM_STEP_TASKS_PER_NODE", tasks)];
            place(&step).unwrap().local_size
        };
        assert_eq!([slurm("0", "4(x2)"), slurm("1", "4(x2)")], [4, 4]);
        assert_eq!([slurm("0", "3(x2),2"), slurm("2", "3(x2),2")], [3, 2]);
        assert_eq!(slurm("0", "8"), 8);
        // One task per node, each of which has started others; and invalid values.
        for other in ["1(x2)", "4(x2", "", "x", "18446744073709551615(x2)"] {
            assert_eq!(slurm("1", other), 8, "{other}");
        }
        let both = [
            ("LOCAL_WORLD_SIZE", "2"),
            ("SLURM_NODEID", "0"),
            ("SLURM_STEP_TASKS_PER_NODE", "4(x2)"),
        ];
        assert_eq!(place(&both).unwrap().local_size, 2);
        for (name, value, said) in [
            ("RANK", "8", "RANK is `8`, which is no number from 0 to 7"),
            ("RANK", "", "RANK is not set"),
            ("WORLD_SIZE", "0", "WORLD_SIZE is `0`"),
            ("LOCAL_RANK", "x", "LOCAL_RANK is `x`"),
            ("MASTER_PORT", "65536", "MASTER_PORT is `65536`"),
            ("MASTER_ADDR", "", "MASTER_ADDR is not set"),
        ] {
            let error = place(&[(name, value)]).unwrap_err();
            assert!(error.starts_with(said), "{error}");
        }
    }

    #[tokio::test]
    async fn what_an_earlier_start_has_left_is_not_believed() {
        let store = tempfile::tempdir().unwrap();
        let first = LaunchedRank {
            rank: 0,
            size: 2,
            ..place(&[]).unwrap()
        };
        let second = LaunchedRank {
            rank: 1,
            ..first.clone()
        };
        // Left over from a failed launch.
        drop(TrainingBoard::open(store.path(), first.clone()).unwrap());
        let dir = second.messages_dir(store.path());
        assert_eq!(newest(&dir).unwrap().over, Some(false));
        let following = follow(store.path(), &second, "here");
        let running = async {
            tokio::time::sleep(3 * LOOK).await;
            let board = TrainingBoard::open(store.path(), first).unwrap();
            tokio::task::spawn_blocking(move || board.close(true))
                .await
                .unwrap();
        };
        let (good, ()) = tokio::join!(following, running);
        assert!(good.unwrap(), "the end of the second one");
    }
}
