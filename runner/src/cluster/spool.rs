//! The spool: a remote worker's events, as files in a directory that both machines see.
//!
//! A job has a directory, an element of it one inside. Every time that the element is started is a *life*: its records
//! are appended to `<life>.<piece>.open`, synced, and a piece that is full or the last gets the name `.sealed`, which no
//! file had before. A record is a length, a checksum and JSON; a reader takes whole ones only, so a torn end is
//! ignored. Records are numbered: a reader that starts again knows what it has read.
//!
//! A spool may lie in a store that others can write to, and on a disk that loses what it was given: only regular files are
//! opened, no link in a spool is followed, and what is read has bounds.
//!
//! Nothing relies on locks, on times of files, or on a name being moved over another: shared file systems keep few
//! promises. Errors about stale handles are retried.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use retort_checkpoint::regular::{self, patiently};
use serde::{Deserialize, Serialize};

use crate::frame::{self, FromWorker};
use crate::store::{LogSource, Time, Usage};
use crate::worker::death::ExitStatus;

mod order;

pub use order::{JobSpec, read_order, write_order};

/// The layout of these files; a worker and a runner of other layouts do not understand each other.
pub const FORMAT: u32 = 2;
/// Bytes after which a piece is sealed.
const PIECE: u64 = 8 << 20;
/// Bytes read at a time, unless a record is longer.
const CHUNK: usize = 1 << 20;
/// How often a sealed piece is looked at whose last record is cut off: on a shared file system the rest may be on its way.
const TORN_LOOKS: u32 = 20;
/// What a look at a piece costs, at least.
const A_PIECE: u64 = 4096;
/// Pieces that are looked at without a pause.
const PIECES_AT_ONCE: u32 = 256;

/// The directory of spools in a work directory.
pub const FOLDER: &str = ".spool";
/// The file in a job's spool that stops its elements.
const STOP: &str = "stop";

/// An element's event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpoolEvent {
    /// A life begins.
    Began {
        /// Slurm's id of it, as `squeue` shows it: `17`, of an array `17_3`.
        job: String,
        /// Where.
        node: String,
        /// The process that writes this.
        pid: u32,
    },
    /// The worker sent a frame.
    Frame(FromWorker),
    /// The worker, or something in it, wrote a line.
    Line {
        /// Where to.
        source: LogSource,
        /// The line.
        text: String,
    },
    /// The worker's process has ended.
    Exited {
        /// How.
        status: ExitStatus,
        /// What it took.
        usage: Usage,
        /// Whether memory ran out at that time.
        out_of_memory: bool,
    },
    /// The life is over: the last record of it.
    Over(LifeEnd),
}

/// Why a life is over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LifeEnd {
    /// The worker succeeded or failed: nothing is retried.
    Done,
    /// The user wanted it to stop.
    Stopped,
    /// The time that Slurm gives was over.
    TimeLimit {
        /// Whether the worker had saved what it did.
        at_checkpoint: bool,
    },
    /// Slurm ended it, for a reason that Slurm knows: preemption, `scancel`, a node that is needed.
    Terminated {
        /// Whether the worker had saved what it did.
        at_checkpoint: bool,
    },
    /// It failed in a way that another try may not.
    Again {
        /// How.
        reason: String,
    },
    /// The same, after all the tries that there are.
    OutOfTries {
        /// How.
        reason: String,
    },
    /// It has been started too often, and does nothing more.
    GaveUp,
}

impl LifeEnd {
    /// Why it is followed by another life, in words; none where it is not, or where Slurm knows why.
    pub fn why_again(&self) -> Option<&str> {
        match self {
            Self::TimeLimit {
                at_checkpoint: true,
            } => Some("time limit, at a checkpoint"),
            Self::TimeLimit { .. } => Some("time limit"),
            Self::Again { reason } => Some(reason),
            _ => None,
        }
    }
}

/// What the log says of a life that begins.
pub fn begins(job: &str, node: &str, pid: u32) -> String {
    format!("job {job} began on {node} (process {pid})")
}

/// What the log says of a life that is followed by another.
pub fn goes_on(reason: &str) -> String {
    format!("{reason}; it is started again")
}

/// A record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number: grows with every record of an element, through all its lives.
    pub number: u64,
    /// When: milliseconds since 1970, by the clock of the machine that wrote it.
    pub at: i64,
    /// What.
    pub word: SpoolEvent,
}

/// Why a spool cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file system refuses.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A sealed piece, or an order, makes no sense.
    #[error("{} is damaged: {message}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| match source.kind() {
        // What is not a file now will not become one.
        io::ErrorKind::InvalidInput => SpoolError::Damaged {
            path,
            message: source.to_string(),
        },
        _ => SpoolError::Io {
            action,
            path,
            source,
        },
    }
}

/// Makes a directory of a spool, which nobody else may write to.
///
/// # Errors
/// What the file system says.
pub fn make_dir(dir: &Path) -> io::Result<()> {
    let make = |dir: &Path| match fs::DirBuilder::new().mode(0o755).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    };
    if let Some(parent) = dir.parent() {
        if let Some(work) = parent.parent() {
            fs::create_dir_all(work)?;
        }
        make(parent)?;
    }
    make(dir)?;
    check_folders(&dir.join(STOP))
}

/// Refuses a file to which a link leads within its spool, or where others could put another in its place.
fn check_folders(path: &Path) -> io::Result<()> {
    let is_top = |folder: &Path| folder.file_name().is_some_and(|name| name == FOLDER);
    let folders = || path.ancestors().skip(1).take(3);
    let is_inside = folders().any(is_top);
    for folder in folders() {
        let found = fs::symlink_metadata(folder)?;
        if !found.is_dir() {
            let kind = regular::kind(found.file_type());
            let message = format!("{} is {kind}, not a directory", folder.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        // SAFETY: a plain system call that cannot fail.
        let user = unsafe { libc::geteuid() };
        if is_inside && (found.uid() != user || found.mode() & 0o022 != 0) {
            let message = format!(
                "{} belongs to somebody else, or others may write to it: jobs run what it says",
                folder.display()
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        if is_top(folder) {
            break;
        }
    }
    Ok(())
}

/// Opens a file of a spool.
fn open_own(path: &Path) -> io::Result<File> {
    check_folders(path)?;
    regular::open_itself(path)
}

/// The end of what a job printed.
///
/// # Errors
/// It cannot be read.
pub fn printed(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    regular::end_of(open_own(path)?, limit)
}

/// Writes a new file and makes sure that it is there for others.
///
/// # Errors
/// What the file system says.
pub fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    patiently(|| {
        check_folders(path)?;
        let mut file = regular::create_itself(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    })?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}

/// Asks the elements of a job to stop at their next checkpoint, or makes the file in which that will be asked: what is
/// in a file is asked of the server whenever it is opened, that a file is not there is remembered for a while.
///
/// # Errors
/// [`SpoolError::Io`].
pub fn ask_to_stop(dir: &Path, stop: bool) -> Result<(), SpoolError> {
    let path = dir.join(STOP);
    let word: &[u8] = if stop { b"stop" } else { b"" };
    put(&path, word).map_err(failed("write", &path))
}

/// Tells the elements of a job to end at once.
///
/// # Errors
/// [`SpoolError::Io`].
pub fn ask_to_end(dir: &Path) -> Result<(), SpoolError> {
    let path = dir.join(STOP);
    put(&path, b"end").map_err(failed("write", &path))
}

/// Whether somebody has asked the elements of a job to stop, or told them to end.
pub fn is_to_stop(dir: &Path) -> bool {
    !word(&dir.join(STOP)).is_empty()
}

/// Whether somebody has told the elements of a job to end at once.
pub fn is_to_end(dir: &Path) -> bool {
    word(&dir.join(STOP)) == "end"
}

/// What stands in a small file; nothing where it cannot be read.
fn word(path: &Path) -> String {
    let read = patiently(|| regular::whole(open_own(path)?, 64)).unwrap_or_default();
    String::from_utf8_lossy(&read).into_owned()
}

/// The directory of an element.
pub fn element_dir(spool: &Path, element: usize) -> PathBuf {
    spool.join(element.to_string())
}

fn piece_path(dir: &Path, life: u32, piece: u32, sealed: bool) -> PathBuf {
    let end = if sealed { "sealed" } else { "open" };
    dir.join(format!("{life}.{piece}.{end}"))
}

/// A number that grows with lives and with records in them.
fn number(life: u32, record: u32) -> u64 {
    u64::from(life) << 32 | u64::from(record)
}

/// Writes the records of one life.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    life: u32,
    piece: u32,
    file: File,
    /// Bytes of the file that are known to be whole records.
    written: u64,
    records: u32,
    pending: Vec<u8>,
}

impl Writer {
    /// Begins the next life of an element.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(dir: &Path) -> io::Result<Self> {
        patiently(|| make_dir(dir))?;
        let life = (0..u32::MAX)
            .find_map(|life| match File::create_new(mark(dir, life)) {
                Ok(_) => Some(Ok(life)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
                Err(error) => Some(Err(error)),
            })
            .unwrap_or(Err(io::ErrorKind::AlreadyExists.into()))?;
        Ok(Self {
            file: File::create_new(piece_path(dir, life, 0, false))?,
            dir: dir.to_owned(),
            life,
            piece: 0,
            written: 0,
            records: 0,
            pending: Vec::new(),
        })
    }

    /// Which life this is, from 0.
    pub fn life(&self) -> u32 {
        self.life
    }

    /// Adds a record to what is to be written.
    pub fn push(&mut self, word: SpoolEvent) {
        let record = Record {
            number: number(self.life, self.records),
            at: Time::now().0,
            word,
        };
        // What a worker sent was shorter than a frame may be; the little around it is not counted.
        let Ok(text) = serde_json::to_vec(&record) else {
            return;
        };
        self.records += 1;
        self.pending.extend((text.len() as u32).to_le_bytes());
        self.pending.extend(checksum(&text).to_le_bytes());
        self.pending.extend(text);
    }

    /// Bytes that are not yet written.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Writes and syncs what is pending. After an error it can be tried again: nothing is written twice.
    ///
    /// # Errors
    /// What the file system says.
    pub fn flush(&mut self) -> io::Result<()> {
        self.begin_piece_if_full()?;
        if self.pending.is_empty() {
            return Ok(());
        }
        let put = |file: &File| {
            file.write_all_at(&self.pending, self.written)?;
            file.sync_data()
        };
        if put(&self.file).is_err() {
            // A handle that the file's server has forgotten stays stale: the name leads to the file again.
            let path = piece_path(&self.dir, self.life, self.piece, false);
            let anew = patiently(|| File::options().write(true).open(&path))?;
            put(&anew)?;
            self.file = anew;
        }
        self.written += self.pending.len() as u64;
        self.pending.clear();
        self.begin_piece_if_full()
    }

    /// Seals a full piece. Until the next is there nothing more is written: readers leave a sealed piece for good.
    fn begin_piece_if_full(&mut self) -> io::Result<()> {
        if self.written < PIECE {
            return Ok(());
        }
        let next = new_piece(&piece_path(&self.dir, self.life, self.piece + 1, false))?;
        self.seal_piece()?;
        self.piece += 1;
        self.file = next;
        self.written = 0;
        Ok(())
    }

    /// Writes the last records, seals the piece, and notes how the life ended for those that follow. After an error it
    /// can be tried again.
    ///
    /// # Errors
    /// What the file system says.
    pub fn close(&mut self, good: bool) -> io::Result<()> {
        self.flush()?;
        let word = if good { GOOD } else { BAD };
        put(&mark(&self.dir, self.life), word.as_bytes())?;
        self.seal_piece()
    }

    /// Whether another life has begun: Slurm took this one for dead, and it must not go on.
    pub fn is_superseded(&self) -> bool {
        word(&mark(&self.dir, self.life)) == SUPERSEDED
    }

    /// Tells the life before this one, should it still be at work, that its time is over. Returns whether it may be.
    pub fn supersede(&self) -> bool {
        let Some(before) = self.life.checked_sub(1).map(|life| mark(&self.dir, life)) else {
            return false;
        };
        word(&before).is_empty() && put(&before, SUPERSEDED.as_bytes()).is_ok()
    }

    /// Whether the life before this one may still be at work.
    pub fn is_followed_too_soon(&self) -> bool {
        let before = self.life.checked_sub(1).map(|life| mark(&self.dir, life));
        before.is_some_and(|before| word(&before) == SUPERSEDED)
    }

    fn seal_piece(&self) -> io::Result<()> {
        let [from, to] =
            [false, true].map(|sealed| piece_path(&self.dir, self.life, self.piece, sealed));
        match fs::rename(&from, &to) {
            // Done by an earlier try.
            Err(error) if error.kind() == io::ErrorKind::NotFound && to.exists() => {}
            moved => moved?,
        }
        File::open(&self.dir)?.sync_all()
    }
}

/// A new file, or the empty one that an earlier try has made: a file server may answer a repeated request with `exists`.
fn new_piece(path: &Path) -> io::Result<File> {
    match File::create_new(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut options = File::options();
            options
                .write(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
            let file = options.open(path)?;
            let found = file.metadata()?;
            match found.is_file() && found.len() == 0 {
                true => Ok(file),
                false => Err(error),
            }
        }
        made => made,
    }
}

/// What stands in the file of a life that has come to a good end, or to a checkpoint.
const GOOD: &str = "good";
/// It ended in another way.
const BAD: &str = "bad";
/// That the next has begun although it had not ended.
const SUPERSEDED: &str = "superseded";

/// The file that a life takes for itself, empty while it lasts.
fn mark(dir: &Path, life: u32) -> PathBuf {
    dir.join(format!("life-{life}"))
}

/// Whether this life of an element has begun, and it and all later ones are over.
pub fn is_over(dir: &Path, life: u32) -> bool {
    let lives = (life..u32::MAX).map(|life| mark(dir, life));
    let last = lives.take_while(|mark| mark.exists()).last();
    last.is_some_and(|mark| !word(&mark).is_empty())
}

/// How many lives before this one came to no good end.
pub fn wasted_lives(dir: &Path, before: u32) -> u32 {
    let wasted = |life: &u32| word(&mark(dir, *life)) != GOOD;
    u32::try_from((0..before).filter(wasted).count()).unwrap_or(u32::MAX)
}

/// How many of all lives that have begun came to no good end.
pub fn all_wasted_lives(dir: &Path) -> u32 {
    let begun = (0..u32::MAX).find(|life| !mark(dir, *life).exists());
    wasted_lives(dir, begun.unwrap_or(u32::MAX))
}

fn checksum(bytes: &[u8]) -> u32 {
    const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);
    CRC.checksum(bytes)
}

/// Reads the records of an element, from its first life on.
#[derive(Debug, Clone)]
pub struct Reader {
    dir: PathBuf,
    life: u32,
    piece: u32,
    offset: u64,
    /// Whether the next life has begun: what the present one has left is all that it will.
    is_final: bool,
    /// Bytes that were read.
    read: u64,
    /// How often the present piece was found cut off although it is sealed.
    torn: u32,
}

/// What a look at a spool gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpoolReading {
    /// Nothing new.
    Nothing,
    /// Records.
    Records,
    /// Records, and there are more.
    More,
}

impl Reader {
    /// Of an element that may not have begun.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            life: 0,
            piece: 0,
            offset: 0,
            is_final: false,
            read: 0,
            torn: 0,
        }
    }

    /// Bytes that have been read so far: what a look costs.
    pub fn cost(&self) -> u64 {
        self.read
    }

    /// The life that is being read.
    pub fn life(&self) -> u32 {
        self.life
    }

    /// Whether the next life has begun. If so, the next look takes what the present one has left, of a piece that was never
    /// sealed its whole records, and goes on with the next.
    pub fn turn(&mut self) -> bool {
        let next = self.life + 1;
        self.is_final |= [false, true]
            .into_iter()
            .any(|sealed| piece_path(&self.dir, next, 0, sealed).exists());
        self.is_final
    }

    /// As [`Reader::look`], through all lives. Returns whether there may be more now.
    ///
    /// # Errors
    /// [`SpoolError`].
    pub fn look_on(&mut self, records: &mut Vec<Record>) -> Result<bool, SpoolError> {
        Ok(self.look(records)? == SpoolReading::More || self.turn())
    }

    /// Adds the records that have come since the last look.
    ///
    /// # Errors
    /// [`SpoolError`].
    pub fn look(&mut self, records: &mut Vec<Record>) -> Result<SpoolReading, SpoolError> {
        let mut any = false;
        for _ in 0..PIECES_AT_ONCE {
            let (taken, seen, sealed) = match self.open()? {
                Some((path, file, sealed)) => {
                    let taken = self.take(&path, file, sealed, records)?;
                    self.read += A_PIECE + taken.looked_at as u64;
                    (taken.bytes, taken, sealed)
                }
                None => (0, Taken::default(), false),
            };
            any |= taken > 0;
            match (taken, sealed) {
                (0, true) if seen.looked_at > 0 => {
                    self.torn += 1;
                    if self.torn >= TORN_LOOKS {
                        return Err(SpoolError::Damaged {
                            path: piece_path(&self.dir, self.life, self.piece, true),
                            message: "its last record is cut off".into(),
                        });
                    }
                    return Ok(self.seen(any));
                }
                // A sealed piece without more has been read to its end.
                (0, true) => (self.piece, self.offset, self.torn) = (self.piece + 1, 0, 0),
                (0, false) if std::mem::take(&mut self.is_final) => {
                    (self.life, self.piece, self.offset) = (self.life + 1, 0, 0);
                }
                (0, false) => return Ok(self.seen(any)),
                (taken, _) => {
                    self.offset += taken as u64;
                    if seen.looked_at >= CHUNK {
                        return Ok(SpoolReading::More);
                    }
                }
            }
        }
        Ok(SpoolReading::More)
    }

    fn seen(&self, any: bool) -> SpoolReading {
        match any {
            true => SpoolReading::Records,
            false => SpoolReading::Nothing,
        }
    }

    /// The present piece. It may get its other name at any time.
    fn open(&self) -> Result<Option<(PathBuf, File, bool)>, SpoolError> {
        for sealed in [true, false, true] {
            let path = piece_path(&self.dir, self.life, self.piece, sealed);
            // The first is a look: most pieces that are read are open.
            if sealed && fs::symlink_metadata(&path).is_err() {
                continue;
            }
            match patiently(|| open_own(&path)) {
                Ok(file) => return Ok(Some((path, file, sealed))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("open", &path)(error)),
            }
        }
        Ok(None)
    }

    /// Takes whole records.
    fn take(
        &self,
        path: &Path,
        mut file: File,
        sealed: bool,
        records: &mut Vec<Record>,
    ) -> Result<Taken, SpoolError> {
        let damaged = |message: &str| SpoolError::Damaged {
            path: path.to_owned(),
            message: message.to_owned(),
        };
        let mut bytes = Vec::new();
        let mut read = |bytes: &mut Vec<u8>, size: usize| {
            patiently(|| {
                bytes.clear();
                file.seek(SeekFrom::Start(self.offset))?;
                (&mut file).take(size as u64).read_to_end(bytes)
            })
            .map_err(failed("read", path))
        };
        read(&mut bytes, CHUNK)?;
        if let Some(length) = length(&bytes)
            && length > bytes.len() - 8
            && bytes.len() == CHUNK
        {
            if length > 2 * frame::LIMIT {
                return Err(damaged("a record is longer than any may be"));
            }
            read(&mut bytes, length + 8)?;
        }
        let mut taken = 0;
        while let Some(length) = length(&bytes[taken..]) {
            let Some(text) = bytes.get(taken + 8..taken + 8 + length) else {
                break;
            };
            let sum = &bytes[taken + 4..taken + 8];
            if length == 0 || checksum(text).to_le_bytes() != *sum {
                if sealed {
                    return Err(damaged("a record is not what its checksum says"));
                }
                // Not all of it has come over the network.
                break;
            }
            let mut record: Record = frame::decode(text)
                .map_err(|error| damaged(&format!("unknown type of record: {error}")))?;
            if record.number >> 32 != u64::from(self.life) {
                return Err(damaged("a record belongs to another life"));
            }
            record.at = Time(record.at).or_now().0;
            records.push(record);
            taken += 8 + length;
        }
        Ok(Taken {
            bytes: taken,
            looked_at: bytes.len(),
        })
    }
}

/// What was taken of a piece.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    /// Bytes of whole records.
    bytes: usize,
    /// Bytes that were read.
    looked_at: usize,
}

/// The length at the beginning of a record.
fn length(bytes: &[u8]) -> Option<usize> {
    let head: [u8; 4] = bytes.get(..8)?.get(..4)?.try_into().ok()?;
    Some(u32::from_le_bytes(head) as usize)
}

#[cfg(test)]
mod tests;
