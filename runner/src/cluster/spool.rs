//! The spool: a remote worker's events, as files in a directory that both machines see.
//!
//! Each job has a directory, and each of its elements has a directory inside. An element may be started several times; the
//! *starts* are numbered from 0. A start appends its records to `<start>.<piece>.open` and syncs them. A piece that is full,
//! and the last one, is renamed to `<start>.<piece>.sealed`, a name that no file had before. A record is a length, a checksum
//! and JSON. Readers take only whole records, so they ignore a torn end. Records are numbered, so that a restarted reader
//! knows what it has read.
//!
//! A spool may be in a store that others can write to, or on a disk that loses data. So only regular files are opened, no
//! link in a spool is followed, and everything that is read has a size limit.
//!
//! Nothing relies on locks, on files' times, or on renaming over an existing file, because shared file systems guarantee
//! little. Errors about stale handles are retried.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use retort_checkpoint::regular::{self, patiently};
use serde::{Deserialize, Serialize};

use crate::frame::{self, FromWorker};
use crate::store::{LogSource, Time, Usage};
use crate::worker::death::ExitStatus;

mod job_spec;
mod releases;
mod saved_progress;

pub use job_spec::{JobSpec, read_job_spec, write_job_spec};
pub use releases::{note_releases, releases};
pub use saved_progress::{SavedProgress, has_advanced};

/// The version of these files' layout; a worker and a runner with different versions cannot work together.
pub const FORMAT: u32 = 2;
/// The size at which a piece is sealed, in bytes.
const PIECE: u64 = 8 << 20;
/// How many bytes are read at a time, unless a record is longer.
const CHUNK: usize = 1 << 20;
/// How often a sealed piece is read again if its last record is cut off: a shared file system may show the rest later.
const TORN_LOOKS: u32 = 20;
/// The least cost of a look at a piece.
const A_PIECE: u64 = 4096;
/// How many pieces one look reads.
const PIECES_AT_ONCE: u32 = 256;

/// The directory of spools in a work directory.
pub const FOLDER: &str = ".spool";
/// The file in a job's spool that stops its elements.
const STOP: &str = "stop";

/// An element's event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpoolEvent {
    /// The element was started.
    Began {
        /// Slurm's id of the job, as `squeue` shows it: `17`, or `17_3` in an array.
        job: String,
        /// The node.
        node: String,
        /// The process that writes this.
        pid: u32,
    },
    /// The worker sent a frame.
    Frame(FromWorker),
    /// The worker, or something in it, wrote a line.
    Line {
        /// The stream.
        source: LogSource,
        /// The line.
        text: String,
    },
    /// The worker's process has ended.
    Exited {
        /// How.
        status: ExitStatus,
        /// The resources it used.
        usage: Usage,
        /// Whether memory ran out at that time.
        out_of_memory: bool,
    },
    /// The start is over; always its last record.
    Over(StartEnd),
}

/// Why a start is over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartEnd {
    /// The worker succeeded or failed: nothing is retried.
    Done,
    /// The user stopped it.
    Stopped,
    /// The job reached its time limit in Slurm.
    TimeLimit {
        /// Whether the worker had saved what it did.
        at_checkpoint: bool,
    },
    /// Slurm ended it, for a reason that only Slurm knows: preemption, `scancel`, a node that is drained.
    Terminated {
        /// Whether the worker had saved what it did.
        at_checkpoint: bool,
    },
    /// It failed, but another try may succeed.
    Again {
        /// How.
        reason: String,
    },
    /// The same, after the last allowed try.
    OutOfTries {
        /// How.
        reason: String,
    },
    /// It was started too often and did nothing.
    GaveUp,
}

/// The reason for the end of a start at a checkpoint that holds nothing new.
pub const NO_PROGRESS: &str = "time limit, without progress";

impl StartEnd {
    /// Whether Slurm ended it once the worker had saved what it did.
    pub fn is_at_checkpoint(&self) -> bool {
        matches!(
            self,
            Self::TimeLimit {
                at_checkpoint: true
            } | Self::Terminated {
                at_checkpoint: true
            }
        )
    }

    /// Why another start follows, in words; None if none follows, or if only Slurm knows why.
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

/// The log line for the beginning of a start.
pub fn begins(job: &str, node: &str, pid: u32) -> String {
    format!("job {job} began on {node} (process {pid})")
}

/// The log line for the end of a start that is followed by another.
pub fn goes_on(reason: &str) -> String {
    format!("{reason}; it is started again")
}

/// A record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number, which grows from record to record of an element, across all its starts.
    pub number: u64,
    /// The time, in milliseconds since 1970, by the clock of the machine that wrote it.
    pub at: i64,
    /// What.
    pub word: SpoolEvent,
}

/// Why a spool cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// An error of the file system.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A sealed piece, or a job's specification, is invalid.
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
        // Not a regular file: trying again would not help.
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

/// Makes a directory of a spool, which no other user may write to.
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

/// Refuses a file that is reached through a link in its spool, or that other users could replace.
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
                "{} belongs to another user or is writable by others, and jobs execute its contents",
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

/// The end of a job's output.
///
/// # Errors
/// It cannot be read.
pub fn printed(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    regular::end_of(open_own(path)?, limit)
}

/// Writes a new file and syncs it and its directory, so that other machines see it.
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

/// Asks the elements of a job to stop at their next checkpoint (`stop`), or only creates the empty file in which they will
/// be asked. It has to exist early: clients of a network file system may cache for a while that a file does not exist, but
/// they check a file's content with the server whenever it is opened.
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

/// Whether the elements of a job have been asked to stop, or told to end.
pub fn is_to_stop(dir: &Path) -> bool {
    !word(&dir.join(STOP)).is_empty()
}

/// Whether the elements of a job have been told to end at once.
pub fn is_to_end(dir: &Path) -> bool {
    word(&dir.join(STOP)) == "end"
}

/// The content of a small file; empty if it cannot be read.
fn word(path: &Path) -> String {
    let read = patiently(|| regular::whole(open_own(path)?, 64)).unwrap_or_default();
    String::from_utf8_lossy(&read).into_owned()
}

/// The directory of an element.
pub fn element_dir(spool: &Path, element: usize) -> PathBuf {
    spool.join(element.to_string())
}

fn piece_path(dir: &Path, start: u32, piece: u32, sealed: bool) -> PathBuf {
    let end = if sealed { "sealed" } else { "open" };
    dir.join(format!("{start}.{piece}.{end}"))
}

/// A record's number, which grows with the start and with the record's position in it.
fn number(start: u32, record: u32) -> u64 {
    u64::from(start) << 32 | u64::from(record)
}

/// Writes the records of one start.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    start: u32,
    piece: u32,
    file: File,
    /// The size of the file's whole records, in bytes.
    written: u64,
    records: u32,
    pending: Vec<u8>,
}

impl Writer {
    /// Begins the next start of an element.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(dir: &Path) -> io::Result<Self> {
        patiently(|| make_dir(dir))?;
        let start = (0..u32::MAX)
            .find_map(|start| match File::create_new(mark(dir, start)) {
                Ok(_) => Some(Ok(start)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
                Err(error) => Some(Err(error)),
            })
            .unwrap_or(Err(io::ErrorKind::AlreadyExists.into()))?;
        Ok(Self {
            file: File::create_new(piece_path(dir, start, 0, false))?,
            dir: dir.to_owned(),
            start,
            piece: 0,
            written: 0,
            records: 0,
            pending: Vec::new(),
        })
    }

    /// Which start this is, from 0.
    pub fn start(&self) -> u32 {
        self.start
    }

    /// Adds a record, to be written by the next flush.
    pub fn push(&mut self, word: SpoolEvent) {
        let record = Record {
            number: number(self.start, self.records),
            at: Time::now().0,
            word,
        };
        // Frames have a size limit, so the record is short enough; the few bytes around the frame do not matter.
        let Ok(text) = serde_json::to_vec(&record) else {
            return;
        };
        self.records += 1;
        self.pending.extend((text.len() as u32).to_le_bytes());
        self.pending.extend(checksum(&text).to_le_bytes());
        self.pending.extend(text);
    }

    /// The number of bytes not yet written.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Writes and syncs all pending records. After an error it can be tried again: nothing is written twice.
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
            // A stale handle stays stale; opening the file by name gives a new one.
            let path = piece_path(&self.dir, self.start, self.piece, false);
            let anew = patiently(|| File::options().write(true).open(&path))?;
            put(&anew)?;
            self.file = anew;
        }
        self.written += self.pending.len() as u64;
        self.pending.clear();
        self.begin_piece_if_full()
    }

    /// Seals a full piece, once the next one exists: readers that have read a sealed piece never return to it.
    fn begin_piece_if_full(&mut self) -> io::Result<()> {
        if self.written < PIECE {
            return Ok(());
        }
        let next = new_piece(&piece_path(&self.dir, self.start, self.piece + 1, false))?;
        self.seal_piece()?;
        self.piece += 1;
        self.file = next;
        self.written = 0;
        Ok(())
    }

    /// Writes the last records, seals the piece, and notes for later starts how this one ended. After an error it can be
    /// tried again.
    ///
    /// # Errors
    /// What the file system says.
    pub fn close(&mut self, good: bool) -> io::Result<()> {
        self.flush()?;
        let word = if good { GOOD } else { BAD };
        put(&mark(&self.dir, self.start), word.as_bytes())?;
        self.seal_piece()
    }

    /// Whether another start has begun: Slurm presumed this one dead, and it must not go on.
    pub fn is_superseded(&self) -> bool {
        word(&mark(&self.dir, self.start)) == SUPERSEDED
    }

    /// Marks the previous start as superseded unless it has recorded its end: it may still be running and has to stop then.
    /// Returns whether that was necessary.
    pub fn supersede(&self) -> bool {
        let Some(before) = self
            .start
            .checked_sub(1)
            .map(|start| mark(&self.dir, start))
        else {
            return false;
        };
        word(&before).is_empty() && put(&before, SUPERSEDED.as_bytes()).is_ok()
    }

    /// Whether the previous start may still be running.
    pub fn is_followed_too_soon(&self) -> bool {
        let before = self
            .start
            .checked_sub(1)
            .map(|start| mark(&self.dir, start));
        before.is_some_and(|before| word(&before) == SUPERSEDED)
    }

    fn seal_piece(&self) -> io::Result<()> {
        let [from, to] =
            [false, true].map(|sealed| piece_path(&self.dir, self.start, self.piece, sealed));
        match fs::rename(&from, &to) {
            // An earlier try has done it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && to.exists() => {}
            moved => moved?,
        }
        File::open(&self.dir)?.sync_all()
    }
}

/// A new file, or an empty one from an earlier try: a file server may answer a repeated request with `exists`.
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

/// The mark of a start that succeeded or stopped at a checkpoint.
const GOOD: &str = "good";
/// The mark of a start that ended in any other way.
const BAD: &str = "bad";
/// The mark of a start that had not recorded its end when the next one began.
const SUPERSEDED: &str = "superseded";

/// A start's mark: the file that it creates when it begins. The file is empty until the start ends.
fn mark(dir: &Path, start: u32) -> PathBuf {
    dir.join(format!("life-{start}"))
}

/// Whether this start of an element has begun, and the latest one is over.
pub fn is_over(dir: &Path, start: u32) -> bool {
    let starts = (start..u32::MAX).map(|start| mark(dir, start));
    let last = starts.take_while(|mark| mark.exists()).last();
    last.is_some_and(|mark| !word(&mark).is_empty())
}

/// How many starts in a row did not end well before this one. A start that got further than all before it begins a new row.
/// `reporter`: the directory of the element that reports progress. `earlier`: the row's length when the job began.
pub fn wasted_starts(dir: &Path, reporter: &Path, before: u32, earlier: u32) -> u32 {
    (0..before).fold(earlier, |row, start| {
        let row = match has_advanced(reporter, start) {
            true => 0,
            false => row,
        };
        row.saturating_add(u32::from(word(&mark(dir, start)) != GOOD))
    })
}

/// The same, of all starts so far. A job in which none began counts as one.
pub fn all_wasted_starts(dir: &Path, reporter: &Path, earlier: u32) -> u32 {
    match starts(dir) {
        0 => earlier.saturating_add(1),
        begun => wasted_starts(dir, reporter, begun, earlier),
    }
}

/// How many starts of an element have begun.
fn starts(dir: &Path) -> u32 {
    let next = (0..u32::MAX).find(|start| !mark(dir, *start).exists());
    next.unwrap_or(u32::MAX)
}

fn checksum(bytes: &[u8]) -> u32 {
    const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);
    CRC.checksum(bytes)
}

/// Reads the records of an element, from its first start on.
#[derive(Debug, Clone)]
pub struct Reader {
    dir: PathBuf,
    start: u32,
    piece: u32,
    offset: u64,
    /// Whether the next start has begun, so that the present one writes nothing more.
    is_final: bool,
    /// The number of bytes read so far.
    read: u64,
    /// How often the present piece, although sealed, was found cut off.
    torn: u32,
}

/// The result of a look at a spool.
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
    /// The reader of an element, which may not have begun.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            start: 0,
            piece: 0,
            offset: 0,
            is_final: false,
            read: 0,
            torn: 0,
        }
    }

    /// The number of bytes read so far, a measure of the cost of looks.
    pub fn cost(&self) -> u64 {
        self.read
    }

    /// The directory of its element.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The start that is being read.
    pub fn start(&self) -> u32 {
        self.start
    }

    /// Advances to the next start, if that has begun; returns whether it has. The next look first reads the rest of the
    /// present start: whole records only, in case its last piece was never sealed.
    pub fn advance(&mut self) -> bool {
        let next = self.start + 1;
        self.is_final |= [false, true]
            .into_iter()
            .any(|sealed| piece_path(&self.dir, next, 0, sealed).exists())
            // The next was killed before it made a piece, if another follows it.
            || mark(&self.dir, next + 1).exists();
        self.is_final
    }

    /// Like [`Reader::look`], but goes on to the next start. Returns whether there may be more to read now.
    ///
    /// # Errors
    /// [`SpoolError`].
    pub fn look_on(&mut self, records: &mut Vec<Record>) -> Result<bool, SpoolError> {
        Ok(self.look(records)? == SpoolReading::More || self.advance())
    }

    /// Adds the records written since the last look.
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
                None => (0, PieceRead::default(), false),
            };
            any |= taken > 0;
            match (taken, sealed) {
                (0, true) if seen.looked_at > 0 => {
                    self.torn += 1;
                    if self.torn >= TORN_LOOKS {
                        return Err(SpoolError::Damaged {
                            path: piece_path(&self.dir, self.start, self.piece, true),
                            message: "its last record is cut off".into(),
                        });
                    }
                    return Ok(self.seen(any));
                }
                // A sealed piece has been read to its end.
                (0, true) => (self.piece, self.offset, self.torn) = (self.piece + 1, 0, 0),
                (0, false) if std::mem::take(&mut self.is_final) => {
                    (self.start, self.piece, self.offset) = (self.start + 1, 0, 0);
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

    /// Opens the present piece. It may be renamed at any time.
    fn open(&self) -> Result<Option<(PathBuf, File, bool)>, SpoolError> {
        for sealed in [true, false, true] {
            let path = piece_path(&self.dir, self.start, self.piece, sealed);
            // Most pieces are still open. Looking is cheaper than a failed attempt to open.
            let is_absent = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
            if sealed && fs::symlink_metadata(&path).is_err_and(is_absent) {
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

    /// Reads whole records of a piece.
    fn take(
        &self,
        path: &Path,
        mut file: File,
        sealed: bool,
        records: &mut Vec<Record>,
    ) -> Result<PieceRead, SpoolError> {
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
                // Part of it is not visible yet: the file system is shared.
                break;
            }
            let mut record: Record = frame::decode(text)
                .map_err(|error| damaged(&format!("unknown type of record: {error}")))?;
            if record.number >> 32 != u64::from(self.start) {
                return Err(damaged("a record belongs to another start"));
            }
            record.at = Time(record.at).or_now().0;
            records.push(record);
            taken += 8 + length;
        }
        Ok(PieceRead {
            bytes: taken,
            looked_at: bytes.len(),
        })
    }
}

/// How much of a piece was read.
#[derive(Debug, Clone, Copy, Default)]
struct PieceRead {
    /// The size of the whole records, in bytes.
    bytes: usize,
    /// The number of bytes read.
    looked_at: usize,
}

/// The length at the beginning of a record.
fn length(bytes: &[u8]) -> Option<usize> {
    let head: [u8; 4] = bytes.get(..8)?.get(..4)?.try_into().ok()?;
    Some(u32::from_le_bytes(head) as usize)
}

#[cfg(test)]
mod tests;
