//! Tar archives in place: which bytes belong to which file.
//!
//! It reads the headers that GNU tar, BSD tar and Python write (ustar, long names, pax paths and sizes), and unpacks nothing.
//! Deliberately absent: compressed archives, which can only be read sequentially, sparse files, and the meaning of files.

use std::fs::File;
use std::io::{BufReader, Read};
use std::time::Instant;

use crate::{Error, Result};

/// Bytes of a block.
pub const BLOCK: usize = 512;

/// The longest path that is read: the limit of common systems.
pub const LONGEST_PATH: usize = 4096;

/// What is said of an archive without entries.
pub(crate) const EMPTY: &str = "a tar archive without files";

/// The longest name or text that is read.
const LONGEST_TEXT: u64 = 1 << 16;

/// A file's place in an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRange {
    /// Where its bytes begin.
    pub start: u64,
    /// How many there are.
    pub size: u64,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A file, whole.
    Whole,
    /// A link.
    Link,
    /// A sparse file, whose holes are not stored.
    Sparse,
}

/// An entry that stands for a file.
#[derive(Debug)]
pub struct Entry {
    /// Its path.
    pub name: String,
    /// Where its bytes are.
    pub range: FileRange,
    /// What it is: only the range of a whole file is its complete content.
    pub kind: EntryKind,
}

/// An archive, read from header to header.
pub struct Archive {
    file: BufReader<File>,
    size: u64,
    /// Where the next header begins.
    at: u64,
    /// Where the reader is.
    here: u64,
    /// The number of headers read, and the deadline for reading more.
    headers: u64,
    until: Option<Instant>,
}

/// Information from headers about the entry that follows.
#[derive(Default)]
struct PendingHeader {
    name: Option<String>,
    size: Option<u64>,
    sparse: bool,
}

impl Archive {
    /// The archive in an open file.
    ///
    /// # Errors
    /// The file's metadata cannot be read.
    pub fn new(file: File) -> Result<Self> {
        Ok(Self {
            size: file.metadata()?.len(),
            file: BufReader::new(file),
            at: 0,
            here: 0,
            headers: 0,
            until: None,
        })
    }

    fn fault(&self, message: impl std::fmt::Display) -> Error {
        Error::format(format!(
            "not a whole tar archive: at byte {} {message}",
            self.at
        ))
    }

    /// Fills `bytes` from position `start`, from the read-ahead buffer if possible.
    fn read(&mut self, start: u64, bytes: &mut [u8]) -> Result<()> {
        let way = i128::from(start) - i128::from(self.here);
        let way = i64::try_from(way).map_err(|_| self.fault("it is too long"))?;
        self.file.seek_relative(way)?;
        self.here = start;
        self.file.read_exact(bytes)?;
        self.here += bytes.len() as u64;
        Ok(())
    }

    /// The bytes of a short range.
    fn bytes(&mut self, range: FileRange) -> Result<Vec<u8>> {
        if range.size > LONGEST_TEXT {
            return Err(self.fault(format!("{} bytes where a short text should be", range.size)));
        }
        let mut bytes = vec![0; range.size as usize];
        self.read(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// A range as a short text, trimmed.
    ///
    /// # Errors
    /// It is too long, or not text.
    pub fn text(&mut self, range: FileRange) -> Result<String> {
        let bytes = self.bytes(range)?;
        let text = String::from_utf8(bytes).map_err(|_| self.fault("a text that is not UTF-8"))?;
        Ok(text.trim().to_owned())
    }

    /// The next entry that stands for a file.
    ///
    /// # Errors
    /// The archive is damaged, or cannot be read.
    #[expect(clippy::should_implement_trait, reason = "it can fail")]
    pub fn next(&mut self) -> Result<Option<Entry>> {
        let mut ahead = PendingHeader::default();
        loop {
            self.headers += 1;
            if self.headers.is_multiple_of(64)
                && self.until.is_some_and(|until| Instant::now() > until)
            {
                return Ok(None);
            }
            let mut head = [0; BLOCK];
            let from = self.at;
            let start = match from.checked_add(BLOCK as u64) {
                Some(start) if start <= self.size => start,
                _ if from == 0 => return Err(self.fault("it ends")),
                // GNU tar ends archives with empty blocks, others simply end.
                _ if from == self.size => return Ok(None),
                // The last file may be whole, but none that followed it.
                _ => {
                    return Err(
                        self.fault("it ends in the middle of a block; was all of it copied?")
                    );
                }
            };
            self.read(from, &mut head)?;
            if head == [0; BLOCK] {
                return match from {
                    0 => Err(Error::format(EMPTY)),
                    _ => Ok(None),
                };
            }
            if head.starts_with(&[0x1f, 0x8b]) {
                return Err(Error::format(
                    "a compressed archive; unpack it first (`gunzip`): files are read from their place in it",
                ));
            }
            if !is_header(&head) {
                return Err(self.fault("a header whose sum is wrong"));
            }
            let size =
                number(&head[124..136]).ok_or_else(|| self.fault("a size that is no number"))?;
            let size = ahead.size.take().unwrap_or(size);
            let range = FileRange { start, size };
            let Some(end) = start.checked_add(size).filter(|end| *end <= self.size) else {
                return Err(self.fault(format!(
                    "a file of {size} bytes begins, but the archive ends first"
                )));
            };
            self.at = end
                .checked_next_multiple_of(BLOCK as u64)
                .unwrap_or(self.size);
            if let Some(entry) = self.entry(&head, range, &mut ahead)? {
                return Ok(Some(entry));
            }
        }
    }

    /// The entry that a header begins, if it is a file. Otherwise its information about the next entry goes to `ahead`.
    fn entry(
        &mut self,
        head: &[u8; BLOCK],
        range: FileRange,
        ahead: &mut PendingHeader,
    ) -> Result<Option<Entry>> {
        match head[156] {
            kind @ (b'0' | 0 | b'7' | b'1' | b'2' | b'S') => {
                let name = match ahead.name.take() {
                    Some(name) => name,
                    None => name(head).ok_or_else(|| self.fault("a name that is not UTF-8"))?,
                };
                if name.len() > LONGEST_PATH {
                    return Err(self.fault(format!("a name of {} bytes", name.len())));
                }
                let sparse = std::mem::take(&mut ahead.sparse);
                let kind = match kind {
                    b'1' | b'2' => EntryKind::Link,
                    b'S' => EntryKind::Sparse,
                    _ if sparse => EntryKind::Sparse,
                    // Old archives mark folders only by their names.
                    _ if name.ends_with('/') => return Ok(None),
                    _ => EntryKind::Whole,
                };
                return Ok(Some(Entry { name, range, kind }));
            }
            b'L' => {
                let bytes = self.bytes(range)?;
                let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
                let name = std::str::from_utf8(name)
                    .map_err(|_| self.fault("a name that is not UTF-8"))?;
                ahead.name = Some(name.to_owned());
            }
            b'x' => {
                let bytes = self.bytes(range)?;
                for (key, value) in records(&bytes) {
                    match key {
                        "path" => ahead.name = Some(value.to_owned()),
                        "size" => ahead.size = value.parse().ok(),
                        key => ahead.sparse |= key.starts_with("GNU.sparse."),
                    }
                }
            }
            // Folders, devices, and global headers.
            _ => *ahead = PendingHeader::default(),
        }
        Ok(None)
    }
}

/// The first error in the headers of an archive that is found before the deadline. It finds damage in the middle without
/// reading all the data.
pub fn broken(file: File, until: Instant) -> Option<String> {
    let walk = || {
        let mut archive = Archive::new(file)?;
        archive.until = Some(until);
        while archive.next()?.is_some() {}
        Ok(())
    };
    match walk() {
        // Its reader will report it.
        Ok(()) | Err(Error::Io(_)) => None,
        Err(error) => Some(error.to_string()),
    }
}

/// Whether a block is a header, by its sum.
pub fn is_header(head: &[u8; BLOCK]) -> bool {
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    // For the checksum, its own field counts as spaces.
    let sum = sum(&head[..148]) + 8 * 32 + sum(&head[156..]);
    number(&head[148..156]) == Some(sum)
}

/// A number of a header: in octal, or in binary as GNU tar writes large ones.
fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        return rest.iter().try_fold(u64::from(first & 0x7f), |sum, byte| {
            sum.checked_mul(256)?.checked_add(u64::from(*byte))
        });
    }
    let text = std::str::from_utf8(field).ok()?;
    match text.trim_matches(['\0', ' ']) {
        "" => Some(0),
        text => u64::from_str_radix(text, 8).ok(),
    }
}

/// The name of a header, with its prefix where it has one.
fn name(head: &[u8; BLOCK]) -> Option<String> {
    let field = |from: usize, to: usize| {
        let bytes = head[from..to]
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        std::str::from_utf8(bytes).ok()
    };
    let name = field(0, 100)?;
    match field(345, 500)? {
        prefix if &head[257..263] == b"ustar\0" && !prefix.is_empty() => {
            Some(format!("{prefix}/{name}"))
        }
        _ => Some(name.to_owned()),
    }
}

/// The records of a pax header: `LENGTH KEY=VALUE\n`.
fn records(bytes: &[u8]) -> Vec<(&str, &str)> {
    let (mut found, mut rest) = (Vec::new(), std::str::from_utf8(bytes).unwrap_or_default());
    while let Some((length, _)) = rest.split_once(' ') {
        let Some((record, after)) = length.parse().ok().and_then(|n| rest.split_at_checked(n))
        else {
            break;
        };
        if record.len() <= length.len() {
            break;
        }
        if let Some((key, value)) = record[length.len() + 1..].split_once('=') {
            found.push((key, value.trim_end_matches('\n')));
        }
        rest = after;
    }
    found
}
