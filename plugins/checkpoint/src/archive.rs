//! The directory of a zip archive, read by position and within limits.
//!
//! In: any archive, also of more than 4 GiB. Out: its entries, the positions of their bytes, and their checksums
//! (`checksum.rs`); nothing is unpacked. Only the directory at the end of the file counts, as in Python; its size and number
//! of entries are checked before any of it is read. Deliberately absent: encrypted entries, archives in several files.

use std::io::{self, Read};
use std::path::Path;

use crate::error::{Error, Result};
use crate::source::Source;

/// The most entries of an archive.
const ENTRIES: u64 = 100_000;
/// The most bytes of its directory.
const DIRECTORY: u64 = 32 << 20;
/// Bytes of the end record of an archive, without the trailing comment.
const END: usize = 22;
/// The longest comment.
const REMARK: u64 = 0xffff;

/// How the bytes of an entry are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// As they are.
    Stored,
    /// By deflate.
    Deflate,
    /// In a way that is not supported here, or encrypted.
    Other,
}

/// A file in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// How it is packed.
    pub packing: Packing,
    /// Unpacked size, according to the directory.
    pub size: u64,
    /// Bytes in the archive.
    pub packed: u64,
    /// CRC-32 of the unpacked bytes, according to the directory.
    pub(crate) sum: u32,
    /// Position of its header.
    header: u64,
}

/// An archive whose directory has been read.
pub struct Archive {
    source: Source,
    entries: Vec<Entry>,
}

impl Archive {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be read, is not an archive, is damaged, or exceeds the limits.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(Source::open(path)?)
    }

    pub(crate) fn read(source: Source) -> Result<Self> {
        let directory = Directory::find(&source)?;
        let limit = |what, limit| Err(Error::Limit { what, limit });
        if directory.count > ENTRIES {
            return limit("entries in the archive", ENTRIES);
        }
        if directory.len > DIRECTORY {
            return limit("bytes of the archive's directory", DIRECTORY);
        }
        let bytes = source.bytes(directory.start, directory.len)?;
        let mut fields = Fields(&bytes);
        let mut entries = Vec::new();
        while !fields.0.is_empty() {
            // The count in the end record need not be true.
            if entries.len() as u64 == ENTRIES {
                return limit("entries in the archive", ENTRIES);
            }
            let entry = fields.entry(&directory);
            entries.push(entry.ok_or_else(|| damaged("an entry of its directory is cut off"))?);
        }
        if entries.len() as u64 != directory.count {
            return Err(damaged(format!(
                "its end record counts {} entries, but its directory has {}",
                directory.count,
                entries.len()
            )));
        }
        Ok(Self { source, entries })
    }

    /// All entries, in the order of the directory.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry with a name: the last one if there are several, as in Python.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().rev().find(|entry| entry.name == name)
    }

    /// Where the packed bytes of an entry begin.
    ///
    /// # Errors
    /// The file ends before they do, or the entry has no header.
    pub fn start(&self, entry: &Entry) -> Result<u64> {
        let cut = || damaged(format!("the entry {} is cut off", entry.name));
        let mut header = [0; 30];
        if entry.header.saturating_add(30) > self.source.len() {
            return Err(cut());
        }
        self.source.read_at(entry.header, &mut header)?;
        if !header.starts_with(b"PK\x03\x04") {
            return Err(damaged(format!("no header of the entry {}", entry.name)));
        }
        let length = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let start = entry.header + 30 + length(26) + length(28);
        match start.checked_add(entry.packed) {
            Some(end) if end <= self.source.len() => Ok(start),
            _ => Err(cut()),
        }
    }

    /// The packed bytes of an entry, one after the other.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn packed(&self, entry: &Entry) -> Result<Packed<'_>> {
        let start = self.start(entry)?;
        Ok(Packed {
            source: &self.source,
            position: start,
            end: start + entry.packed,
        })
    }
}

/// The packed bytes of an entry.
pub struct Packed<'a> {
    source: &'a Source,
    position: u64,
    end: u64,
}

impl Read for Packed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = (self.end - self.position).min(buffer.len() as u64) as usize;
        self.source.read_at(self.position, &mut buffer[..n])?;
        self.position += n as u64;
        Ok(n)
    }
}

fn damaged(what: impl std::fmt::Display) -> Error {
    Error::format(format!("the zip archive: {what}"))
}

/// Where the directory lies.
struct Directory {
    count: u64,
    start: u64,
    len: u64,
    /// Bytes in front of the archive, as in a self-extracting program: the origin of all positions.
    shift: u64,
}

impl Directory {
    fn find(source: &Source) -> Result<Self> {
        let len = source.len();
        let tail = len.min(END as u64 + REMARK);
        let bytes = source.bytes(len - tail, tail)?;
        // The last position at which an end record and its comment reach exactly to the end of the file.
        let at = (0..(bytes.len() + 1).saturating_sub(END))
            .rev()
            .find(|&at| {
                bytes[at..].starts_with(b"PK\x05\x06")
                    && u16::from_le_bytes([bytes[at + 20], bytes[at + 21]]) as usize
                        == bytes.len() - at - END
            });
        let at = at
            .ok_or_else(|| damaged("it has no end record: it is cut off, or other bytes follow"))?;
        let mut end = len - tail + at as u64;
        let mut fields = Fields(&bytes[at + 4..]);
        let mut small = || -> Option<_> {
            let (disk, first, here) = (fields.take(2)?, fields.take(2)?, fields.take(2)?);
            let (all, len, offset) = (fields.take(2)?, fields.take(4)?, fields.take(4)?);
            Some((disk, first, here, all, len, offset))
        };
        let missing = || damaged("its end record is cut off");
        let (mut disk, mut first, mut here, mut count, mut size, mut offset) =
            small().ok_or_else(missing)?;
        if let Some((place, wide)) = Self::wide(source, end)? {
            end = place;
            (disk, first, here, count, size, offset) = wide;
        }
        if disk != 0 || first != 0 || here != count {
            return Err(damaged("one of several files"));
        }
        let start = end.checked_sub(size);
        let shift = start.and_then(|start| start.checked_sub(offset));
        match (start, shift) {
            (Some(start), Some(shift)) => Ok(Self {
                count,
                start,
                len: size,
                shift,
            }),
            _ => Err(damaged("its directory reaches beyond the file")),
        }
    }

    /// The ZIP64 end record in front of the normal one: its position and its numbers.
    fn wide(source: &Source, end: u64) -> Result<Option<(u64, (u64, u64, u64, u64, u64, u64))>> {
        let Some(locator) = end.checked_sub(20) else {
            return Ok(None);
        };
        let bytes = source.bytes(locator, 20)?;
        if !bytes.starts_with(b"PK\x06\x07") {
            return Ok(None);
        }
        let told = Fields(&bytes[8..]).take(8).unwrap_or_default();
        // If something precedes the archive, the record is found by its position without extensions.
        for place in [Some(told), locator.checked_sub(56)].into_iter().flatten() {
            if place.checked_add(56).is_none_or(|end| end > locator) {
                continue;
            }
            let bytes = source.bytes(place, 56)?;
            if !bytes.starts_with(b"PK\x06\x06") {
                continue;
            }
            let mut fields = Fields(&bytes[16..]);
            let mut numbers = || -> Option<_> {
                let (disk, first, here) = (fields.take(4)?, fields.take(4)?, fields.take(8)?);
                let (all, len, offset) = (fields.take(8)?, fields.take(8)?, fields.take(8)?);
                Some((disk, first, here, all, len, offset))
            };
            if let Some(numbers) = numbers() {
                return Ok(Some((place, numbers)));
            }
        }
        Err(damaged("the ZIP64 end record is missing"))
    }
}

/// Fields of a directory that are still to be read.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (own, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(own)
    }

    /// A little-endian number of up to 8 bytes.
    fn take(&mut self, n: usize) -> Option<u64> {
        let bytes = self.bytes(n)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |sum, &byte| sum << 8 | u64::from(byte)),
        )
    }

    fn entry(&mut self, directory: &Directory) -> Option<Entry> {
        if self.bytes(4)? != b"PK\x01\x02" {
            return None;
        }
        self.bytes(4)?; // versions
        let (flags, method) = (self.take(2)?, self.take(2)?);
        self.bytes(4)?; // time, date
        let sum = self.take(4)? as u32;
        let (mut packed, mut size) = (self.take(4)?, self.take(4)?);
        let (name, extra, remark) = (self.take(2)?, self.take(2)?, self.take(2)?);
        self.bytes(8)?; // disk, attributes
        let mut header = self.take(4)?;
        let name = String::from_utf8_lossy(self.bytes(name as usize)?).into_owned();
        let mut extra = Fields(self.bytes(extra as usize)?);
        self.bytes(remark as usize)?;
        // Numbers too large for their fields are stored here, in this order.
        while let (Some(kind), Some(len)) = (extra.take(2), extra.take(2)) {
            let mut own = Fields(extra.bytes(len as usize)?);
            if kind == 1 {
                for number in [&mut size, &mut packed, &mut header] {
                    if *number == 0xffff_ffff {
                        *number = own.take(8)?;
                    }
                }
            }
        }
        Some(Entry {
            name,
            packing: match (flags & 1, method) {
                (0, 0) if size == packed => Packing::Stored,
                (0, 8) => Packing::Deflate,
                _ => Packing::Other,
            },
            size,
            packed,
            sum,
            header: header.checked_add(directory.shift)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn written(entries: &[(&str, &[u8])], large: bool) -> Vec<u8> {
        let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        for (name, bytes) in entries {
            let options = zip::write::SimpleFileOptions::default()
                .compression_method(zip::CompressionMethod::Stored)
                .large_file(large);
            zip.start_file(*name, options).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn read(bytes: Vec<u8>) -> Result<Archive> {
        Archive::read(Source::Memory(bytes.into()))
    }

    /// An archive with arbitrary values in its end record; `wide` makes it ZIP64.
    fn end(count: u64, len: u64, offset: u64, wide: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        if wide {
            bytes.extend(b"PK\x06\x06");
            bytes.extend(44u64.to_le_bytes());
            bytes.extend([0; 12]);
            for number in [count, count, len, offset] {
                bytes.extend(number.to_le_bytes());
            }
            bytes.extend(b"PK\x06\x07\0\0\0\0");
            bytes.extend(0u64.to_le_bytes());
            bytes.extend(1u32.to_le_bytes());
        }
        bytes.extend(b"PK\x05\x06\0\0\0\0");
        let short = |x: u64, most: u64| if wide { most } else { x };
        bytes.extend((short(count, 0xffff) as u16).to_le_bytes());
        bytes.extend((short(count, 0xffff) as u16).to_le_bytes());
        bytes.extend((short(len, 0xffff_ffff) as u32).to_le_bytes());
        bytes.extend((short(offset, 0xffff_ffff) as u32).to_le_bytes());
        bytes.extend([0; 2]);
        bytes
    }

    #[test]
    fn entries_and_their_bytes_are_found() {
        for large in [false, true] {
            let mut bytes = written(&[("aa", b"one"), ("b/c", b""), ("QQ", b"other")], large);
            // A duplicate name, which no writer produces.
            for at in 0..bytes.len() - 1 {
                if bytes[at..].starts_with(b"QQ") {
                    bytes[at..at + 2].copy_from_slice(b"aa");
                }
            }
            // A program in front, a comment behind.
            let mut shifted = [b"#!/bin/sh\n".as_slice(), &bytes].concat();
            let len = shifted.len();
            shifted[len - 2..].copy_from_slice(&3u16.to_le_bytes());
            shifted.extend(b"PK!");
            for bytes in [bytes, shifted] {
                let archive = read(bytes).unwrap();
                let names: Vec<&str> = archive.entries().iter().map(|e| &e.name[..]).collect();
                assert_eq!(names, ["aa", "b/c", "aa"]);
                let entry = archive.entry("aa").unwrap();
                assert_eq!((entry.packing, entry.size), (Packing::Stored, 5));
                let mut found = String::new();
                let mut packed = archive.packed(entry).unwrap();
                packed.read_to_string(&mut found).unwrap();
                assert_eq!(found, "other");
            }
        }
    }

    #[test]
    fn lies_and_excess_are_refused_before_anything_is_read() {
        let check = |bytes: Vec<u8>, expected: &str| {
            let error = read(bytes).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(end(3_000_000, 0, 0, true), "more than 100000");
        check(end(1, u64::MAX, 0, true), "beyond the file");
        check(end(1, 0, u64::MAX, true), "beyond the file");
        check(end(1, 100, 0, false), "beyond the file");
        check(
            end(2, 0, 0, false),
            "end record counts 2 entries, but its directory has",
        );
        check(b"PK\x05\x06".to_vec(), "it has no end record");
        check(b"PK".to_vec(), "it has no end record");
        check(Vec::new(), "it has no end record");
        // More entries than the end record says.
        let mut many = b"PK\x01\x02".to_vec();
        many.resize(46, 0);
        let directory = many.repeat(200_000);
        let bytes = [
            directory.as_slice(),
            &end(5, directory.len() as u64, 0, true),
        ]
        .concat();
        check(bytes, "more than 100000");
        let long = vec![0; (DIRECTORY + 1) as usize];
        let bytes = [long.as_slice(), &end(5, long.len() as u64, 0, true)].concat();
        check(bytes, "bytes of the archive's directory");
        // An invalid directory and invalid headers.
        let whole = written(&[("a", b"one")], false);
        let place = |what: &[u8]| whole.windows(4).position(|four| four == what).unwrap();
        let mut broken = whole.clone();
        broken[place(b"PK\x01\x02")] = 0;
        check(broken, "cut off");
        let mut broken = whole.clone();
        broken[place(b"PK\x03\x04")] = 0;
        let archive = read(broken).unwrap();
        let error = archive.start(&archive.entries()[0]).unwrap_err();
        assert!(error.to_string().contains("no header"), "{error}");
    }
}
