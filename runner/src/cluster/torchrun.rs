//! Ranks that somebody else has started: `torchrun`, or a script that gives processes the same variables.
//!
//! In: a process's [`Place`], by the variables of torchrun's contract, and the directory of a store that all of them see. The
//! process of rank 0 runs the recipe and posts trainings on a [`Board`]; the others [`follow`] it: they watch over a worker
//! each, and never open the history. Their events come back through [spools](super::spool), as from a cluster. Postings are
//! new files with growing numbers, so that nothing relies on clocks, on locks or on moving a file over an open one.

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

pub use rank::{PostedJob, RemoteRank};

/// How often the first rank shows that it lives, and how often the others look.
const BEAT: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(200);
/// How long the first rank may be silent, before it has shown itself and afterwards.
const UNSEEN: Duration = Duration::from_secs(1800);
const SILENT: Duration = Duration::from_secs(60);
/// How long the first rank waits at its end for others that have not seen it yet.
const FAREWELL: Duration = Duration::from_secs(20);
/// Postings that are kept: the last, for those who are about to read them.
const KEPT: u64 = 8;
/// Bytes of the longest posting.
const LONGEST: u64 = 1 << 20;

/// A process's place among those that were started with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Which of all it is, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Which of those on its machine it is.
    pub local_rank: usize,
    /// How many are on its machine.
    pub local_size: usize,
    /// Where ranks meet: host and port.
    pub address: String,
    /// See `address`.
    pub port: u16,
}

/// Why a process has no place.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{variable} {problem}: `torchrun` sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process"
)]
pub struct PlaceError {
    variable: &'static str,
    problem: String,
}

impl Place {
    /// By the variables of torchrun's contract.
    ///
    /// # Errors
    /// One is missing, or makes no sense.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, PlaceError> {
        let given = |name: &'static str| {
            let value = variable(name).filter(|value| !value.is_empty());
            value.ok_or_else(|| PlaceError {
                variable: name,
                problem: "is not set".into(),
            })
        };
        let number = |name: &'static str, least: usize, most: usize| {
            let value = given(name)?;
            let found = value.parse().ok();
            found
                .filter(|number| (least..=most).contains(number))
                .ok_or_else(|| PlaceError {
                    variable: name,
                    problem: format!("is `{value}`, which is no number from {least} to {most}"),
                })
        };
        const MOST: usize = 1 << 16;
        let size = number("WORLD_SIZE", 1, MOST)?;
        let local_size = match variable("LOCAL_WORLD_SIZE") {
            Some(_) => number("LOCAL_WORLD_SIZE", 1, size)?,
            None => size,
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

    /// Where those that were started together post, in a store.
    fn board(&self, store: &Path) -> PathBuf {
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

/// What the first rank tells the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Posting {
    /// Tells this start of the processes from earlier ones at the same address.
    launch: String,
    /// Grows while the first rank lives.
    beat: u64,
    /// Spools of the trainings so far.
    jobs: Vec<PathBuf>,
    /// Whether it ended well, once it has ended.
    over: Option<bool>,
}

/// Where the first rank posts what the others do.
#[derive(Debug)]
pub struct Board {
    dir: PathBuf,
    place: Place,
    posting: Arc<Mutex<Posting>>,
    beats: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Board {
    /// Opens the board in a store, in place of an older one at the same address.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(store: &Path, place: Place) -> io::Result<Self> {
        let dir = std::path::absolute(place.board(store))?;
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        spool::make_dir(&dir)?;
        let begun = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let begun = begun.unwrap_or_default().as_nanos();
        let posting = Posting {
            launch: format!("{}-{begun}", std::process::id()),
            beat: 0,
            jobs: Vec::new(),
            over: None,
        };
        post(&dir, &posting)?;
        let posting = Arc::new(Mutex::new(posting));
        let (stop, stopped) = channel();
        let (shared, at) = (Arc::clone(&posting), dir.clone());
        let beat = move || {
            while stopped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                // One beat that cannot be written is made up for by the next.
                let _ = amend(&at, &shared, |_| {});
            }
        };
        let beats = Some((stop, std::thread::spawn(beat)));
        Ok(Self {
            dir,
            place,
            posting,
            beats,
        })
    }

    /// Where this process stands.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// A name that no other training of this board or of another has.
    fn name_of_next(&self) -> String {
        let posting = lock(&self.posting);
        format!("torchrun-{}-{}", posting.launch, posting.jobs.len())
    }

    /// Has the others do their parts of the job in a spool.
    fn assign(&self, spool: &Path) -> io::Result<()> {
        amend(&self.dir, &self.posting, |posting| {
            posting.jobs.push(spool.to_owned())
        })
    }

    /// Lets the others end, once each has seen that this board is alive.
    pub fn close(mut self, good: bool) {
        let launch = lock(&self.posting).launch.clone();
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
            let _ = amend(&self.dir, &self.posting, |posting| {
                posting.over = Some(good)
            });
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.end(false);
    }
}

fn lock(posting: &Mutex<Posting>) -> MutexGuard<'_, Posting> {
    posting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Posts what has changed.
fn amend(
    dir: &Path,
    posting: &Mutex<Posting>,
    change: impl FnOnce(&mut Posting),
) -> io::Result<()> {
    let mut posting = lock(posting);
    change(&mut posting);
    posting.beat += 1;
    post(dir, &posting)
}

fn post(dir: &Path, posting: &Posting) -> io::Result<()> {
    let text = serde_json::to_vec(posting).map_err(io::Error::other)?;
    let unfinished = dir.join(format!("{}.new", posting.beat));
    spool::put(&unfinished, &text)?;
    // A new name: whoever finds it finds all of it.
    fs::rename(&unfinished, dir.join(posting.beat.to_string()))?;
    if let Some(old) = posting.beat.checked_sub(KEPT) {
        let _ = fs::remove_file(dir.join(old.to_string()));
    }
    Ok(())
}

/// The newest posting, if there is one that can be read.
fn newest(dir: &Path) -> Option<Posting> {
    let entries = fs::read_dir(dir).ok()?.flatten();
    let mut numbers: Vec<u64> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers.iter().rev().find_map(|number| {
        let text = spool::patiently(|| regular::read(&dir.join(number.to_string()), LONGEST));
        serde_json::from_slice(&text.ok()?).ok()
    })
}

/// The file by which a rank says that it has seen a board.
fn greeting(launch: &str, rank: usize) -> String {
    format!("{launch}.rank-{rank}")
}

/// Why a rank gives up.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The first rank is not there, or not any more.
    #[error("rank {rank} of {size} hears nothing from rank 0: it posts in {}", board.display())]
    Alone {
        /// The rank.
        rank: usize,
        /// How many there are.
        size: usize,
        /// Where it looked.
        board: PathBuf,
    },
    /// It could not do its part.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The working directory is gone.
    #[error("the store's directory has no path: {0}")]
    NoPath(#[from] io::Error),
}

/// Does what the first rank posts, until it ends; returns whether it ended well.
///
/// # Errors
/// [`FollowError`].
pub async fn follow(store: &Path, place: &Place, node: &str) -> Result<bool, FollowError> {
    let board = std::path::absolute(place.board(store))?;
    let mut first: Option<Posting> = None;
    let (mut alive, mut beat, mut done, mut heard) = (false, 0, 0, Instant::now());
    loop {
        if let Some(posting) = newest(&board) {
            // What lies there may be of another time, until it has changed before our eyes.
            match &first {
                Some(known) if known.launch == posting.launch => {
                    if posting.beat > beat {
                        (beat, heard) = (posting.beat, Instant::now());
                        if !std::mem::replace(&mut alive, true) {
                            let _ =
                                spool::put(&board.join(greeting(&posting.launch, place.rank)), b"");
                        }
                    }
                }
                _ => {
                    (beat, alive, done) = (posting.beat, false, 0);
                    first = Some(posting.clone());
                }
            }
            if alive && let Some(job) = posting.jobs.get(done) {
                done += 1;
                let identity = ElementIdentity {
                    spool: job.clone(),
                    element: place.rank,
                    job: format!("of rank {}", place.rank),
                    node: node.to_owned(),
                    local_rank: place.local_rank,
                    sees_all_devices: true,
                };
                node::serve(&identity).await?;
                heard = Instant::now();
                continue;
            }
            if alive && let Some(good) = posting.over {
                return Ok(good);
            }
        }
        if heard.elapsed() > if alive { SILENT } else { UNSEEN } {
            return Err(FollowError::Alone {
                rank: place.rank,
                size: place.size,
                board,
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(changes: &[(&str, &str)]) -> Result<Place, String> {
        let given = [
            ("RANK", "3"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "node-1"),
            ("MASTER_PORT", "29500"),
        ];
        let all = || changes.iter().chain(&given);
        let read = Place::read(|name| {
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
        let first = Place {
            rank: 0,
            size: 2,
            ..place(&[]).unwrap()
        };
        let second = Place {
            rank: 1,
            ..first.clone()
        };
        // One that ended badly lies there.
        drop(Board::open(store.path(), first.clone()).unwrap());
        let dir = second.board(store.path());
        assert_eq!(newest(&dir).unwrap().over, Some(false));
        let following = follow(store.path(), &second, "here");
        let running = async {
            tokio::time::sleep(3 * LOOK).await;
            let board = Board::open(store.path(), first).unwrap();
            tokio::task::spawn_blocking(move || board.close(true))
                .await
                .unwrap();
        };
        let (good, ()) = tokio::join!(following, running);
        assert!(good.unwrap(), "the end of the second one");
    }
}
