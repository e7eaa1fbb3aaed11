//! The pages of a column, unpacked one at a time, and the cells in them.
//!
//! ```text
//! page    header  levels (which cells are missing)  values
//! values  plain: one after the other   by dictionary: numbers of entries of the column's first page
//! ```
//!
//! Numbers of few bits are stored in runs: one number repeated, or many packed in groups of eight.

use std::io::Read;
use std::sync::Arc;

use super::dictionary::Dictionary;
use super::plain::{Cell, Cursor};
use super::thrift::{Kind, Reader, ThriftError};
use super::{Chunk, Codec, Column, Parquet, Values};
use crate::{Error, Result};

/// The most bytes in memory: a page, compressed and unpacked, and its dictionary.
pub(super) const HELD: u64 = 320 << 20;
/// A column's unpacked bytes are at most this multiple of the file's size plus this constant.
const GROWTH: u64 = 64;
const MORE: u64 = 256 << 20;
/// The largest decompression window of a page.
const LEAST_WINDOW: u64 = 8 << 20;
/// The longest page header, which may contain its minimum and maximum.
const HEADER: u64 = 1 << 20;
/// How many bytes of a header are read at first.
const BEGINNING: u64 = 256;
/// The most pages without cells in a column.
const MOST_IDLE: u32 = 1 << 16;

/// The remaining pages of a column.
pub struct Pages<'a> {
    file: &'a Parquet,
    column: usize,
    /// The current row group, and the position of its next page.
    group: usize,
    chunk: Option<Chunk>,
    at: u64,
    /// Its remaining cells.
    left: u64,
    dictionary: Option<Arc<Dictionary>>,
    /// Bytes unpacked and repeated by dictionaries so far.
    unpacked: u64,
    /// Pages without cells so far.
    idle: u32,
}

/// A page of cells.
pub struct Page {
    bytes: Vec<u8>,
    /// The range of the levels in `bytes`, and the start of the values.
    levels: std::ops::Range<usize>,
    values: usize,
    /// Number of cells, including missing ones.
    count: u64,
    optional: u32,
    encoding: Encoding,
}

enum Encoding {
    Plain(Values),
    Dictionary(Arc<Dictionary>),
    /// Truth values in runs.
    Runs,
}

/// The contents of a page's header.
#[derive(Default)]
struct Header {
    kind: i64,
    unpacked: Option<u64>,
    packed: Option<u64>,
    sum: Option<u32>,
    /// Cells, or entries of a dictionary.
    count: u64,
    encoding: i64,
    /// The encoding of levels; pages of version 2 have none.
    levels: i64,
    /// For pages of version 2: bytes of the levels, and whether the values are compressed.
    lengths: [u64; 2],
    is_packed: bool,
}

const DATA: i64 = 0;
const INDEX: i64 = 1;
const DICTIONARY_PAGE: i64 = 2;
const DATA_2: i64 = 3;

impl Header {
    fn read(reader: &mut Reader<'_>) -> Result<Self, ThriftError> {
        let mut header = Self {
            is_packed: true,
            ..Self::default()
        };
        let count = |reader: &mut Reader<'_>, kind| {
            u64::try_from(reader.int(kind)?).map_err(|_| ThriftError::Malformed("a number below 0"))
        };
        reader.fields(Kind::Struct, |reader, field, kind| {
            match field {
                1 => header.kind = reader.int(kind)?,
                2 => header.unpacked = Some(count(reader, kind)?),
                3 => header.packed = Some(count(reader, kind)?),
                4 => header.sum = Some(reader.int(kind)? as u32),
                5 => reader.fields(kind, |reader, field, kind| {
                    match field {
                        1 => header.count = count(reader, kind)?,
                        2 => header.encoding = reader.int(kind)?,
                        3 => header.levels = reader.int(kind)?,
                        _ => return Ok(false),
                    }
                    Ok(true)
                })?,
                7 => reader.fields(kind, |reader, field, kind| {
                    match field {
                        1 => header.count = count(reader, kind)?,
                        2 => header.encoding = reader.int(kind)?,
                        _ => return Ok(false),
                    }
                    Ok(true)
                })?,
                8 => reader.fields(kind, |reader, field, kind| {
                    match field {
                        1 => header.count = count(reader, kind)?,
                        4 => header.encoding = reader.int(kind)?,
                        5 => header.lengths[1] = count(reader, kind)?,
                        6 => header.lengths[0] = count(reader, kind)?,
                        7 => header.is_packed = reader.bool(kind)?,
                        _ => return Ok(false),
                    }
                    Ok(true)
                })?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(header)
    }
}

impl<'a> Pages<'a> {
    pub(super) fn new(file: &'a Parquet, column: usize) -> Self {
        Self {
            file,
            column,
            group: 0,
            chunk: None,
            at: 0,
            left: 0,
            dictionary: None,
            unpacked: 0,
            idle: 0,
        }
    }

    /// The most bytes that may be unpacked, or repeated by dictionaries.
    fn growth(&self) -> u64 {
        let size = self.file.source.len();
        size.saturating_mul(GROWTH).saturating_add(MORE)
    }

    fn column(&self) -> &'a Column {
        &self.file.columns[self.column]
    }

    /// The next page with cells.
    ///
    /// # Errors
    /// The file is damaged, or uses something that is not supported.
    #[expect(clippy::should_implement_trait, reason = "it can fail")]
    pub fn next(&mut self) -> Result<Option<Page>> {
        let page = self.find();
        page.map_err(|error| match error {
            Error::Io(_) => error,
            error => {
                let (column, group) = (self.column().name(), self.group);
                let place = format!("column {}, row group {group}", column.escape_debug());
                Error::format(format!("{place}: {error}"))
            }
        })
    }

    fn find(&mut self) -> Result<Option<Page>> {
        loop {
            let Some(chunk) = self.chunk else {
                let Some((chunk, rows)) = self.file.chunk(self.group, self.column) else {
                    return Ok(None);
                };
                match rows {
                    0 => self.group += 1,
                    _ => self.begin(chunk, rows)?,
                }
                continue;
            };
            if self.left == 0 {
                self.chunk = None;
                if let Some(dictionary) = self.dictionary.take() {
                    self.unpacked = self.unpacked.saturating_add(dictionary.repeated());
                }
                self.group += 1;
                continue;
            }
            let (header, start) = self.header()?;
            match header.kind {
                DICTIONARY_PAGE if self.dictionary.is_some() => {
                    return Err(Error::format("two dictionaries; expected one"));
                }
                DICTIONARY_PAGE => {
                    let bytes = self.unpacked(chunk.codec, &header, start)?;
                    if !matches!(header.encoding, PLAIN | PLAIN_DICTIONARY) {
                        return Err(Error::format(not_read(header.encoding)));
                    }
                    let most = self.growth().saturating_sub(self.unpacked);
                    let values = self.column().values;
                    let read = Dictionary::read(bytes, header.count, values, most)?;
                    self.dictionary = Some(Arc::new(read));
                }
                DATA | DATA_2 if header.count > 0 => {
                    let bytes = self.unpacked(chunk.codec, &header, start)?;
                    let page = self.page(bytes, &header)?;
                    self.left = self
                        .left
                        .checked_sub(page.count)
                        .ok_or_else(|| Error::format("its pages have more cells than stated"))?;
                    return Ok(Some(page));
                }
                INDEX | DATA | DATA_2 => self.pass(&header, start)?,
                _ => return Err(Error::format("a page of unknown kind")),
            }
        }
    }

    /// Passes over a page without cells.
    fn pass(&mut self, header: &Header, start: u64) -> Result<()> {
        self.idle += 1;
        if self.idle > MOST_IDLE {
            return Err(Error::format(format!(
                "more than {MOST_IDLE} pages without cells; write the file again"
            )));
        }
        let (packed, _) = self.lengths(header, start)?;
        self.at = start + packed;
        Ok(())
    }

    /// Begins a row group.
    fn begin(&mut self, chunk: Chunk, rows: u64) -> Result<()> {
        let column = self.column();
        if column.repeated {
            return Err(Error::format("it holds lists; expected one value in a row"));
        }
        if let Values::Other(kind) = column.values {
            return Err(Error::format(format!(
                "it holds {kind}, which are not read"
            )));
        }
        // Row groups of a file must not overlap; otherwise all could share one page.
        if chunk.start < self.at {
            return Err(Error::format("it overlaps the previous row group"));
        }
        if chunk.values != rows {
            return Err(Error::format(format!(
                "{} cells for {rows} rows",
                chunk.values
            )));
        }
        if let Codec::Other(name) = chunk.codec {
            return Err(Error::format(format!(
                "packed by {name}, which is not read; write the file again with `compression=\"snappy\"` or \"zstd\""
            )));
        }
        (self.chunk, self.at, self.left) = (Some(chunk), chunk.start, rows);
        Ok(())
    }

    /// The header of the next page, and the position after it.
    fn header(&self) -> Result<(Header, u64)> {
        let Some(there) = self.file.end.checked_sub(self.at) else {
            return Err(Error::format("its pages lie beyond the end of the file"));
        };
        let mut most = BEGINNING;
        loop {
            let bytes = self.file.source.bytes(self.at, there.min(most))?;
            let mut reader = Reader::new(&bytes);
            match Header::read(&mut reader) {
                Ok(header) => {
                    let length = bytes.len() - reader.left();
                    return Ok((header, self.at + length as u64));
                }
                Err(ThriftError::Truncated) if most < there.min(HEADER) => most *= 4,
                Err(ThriftError::Truncated) => {
                    return Err(Error::format("a page whose header does not end"));
                }
                Err(ThriftError::Malformed(what)) => {
                    return Err(Error::format(format!("a page whose header has {what}")));
                }
            }
        }
    }

    /// The bytes of a page in the file, and unpacked.
    fn lengths(&self, header: &Header, start: u64) -> Result<(u64, u64)> {
        let (Some(packed), Some(unpacked)) = (header.packed, header.unpacked) else {
            return Err(Error::format("a page without its length"));
        };
        match packed <= self.file.end.saturating_sub(start) {
            true => Ok((packed, unpacked)),
            false => Err(Error::format(format!(
                "a page of {packed} bytes begins, but the file ends first"
            ))),
        }
    }

    /// The bytes of a page, unpacked. The next one begins after them.
    fn unpacked(&mut self, codec: Codec, header: &Header, start: u64) -> Result<Vec<u8>> {
        let (packed, unpacked) = self.lengths(header, start)?;
        let beside = self
            .dictionary
            .as_ref()
            .map_or(0, |dictionary| dictionary.size());
        let held = match codec {
            Codec::Plain => packed,
            Codec::Zstd => packed.saturating_add(unpacked).saturating_add(unpacked),
            _ => packed.saturating_add(unpacked),
        };
        if held.saturating_add(beside) > self.file.held {
            return Err(Error::format(format!(
                "a page that takes {} MiB, packed and unpacked, besides {} MiB for its dictionary; the limit is {} MiB: \
                 write the file again with fewer rows in a group, as in `row_group_size=100`",
                held >> 20,
                beside >> 20,
                self.file.held >> 20
            )));
        }
        self.unpacked = self.unpacked.saturating_add(unpacked);
        if self.unpacked > self.growth() {
            return Err(Error::format(format!(
                "pages of {} MiB, unpacked, in a file of {} bytes: more than any data set unpacks to",
                self.unpacked >> 20,
                self.file.source.len()
            )));
        }
        self.at = start + packed;
        let bytes = self.file.source.bytes(start, packed)?;
        if header.sum.is_some_and(|sum| sum != crc32fast::hash(&bytes)) {
            return Err(Error::format("a damaged page: its checksum does not match"));
        }
        // In version 2 the leading levels are never compressed.
        let plain = match header.kind {
            DATA_2 => header.lengths[0].saturating_add(header.lengths[1]),
            _ => 0,
        };
        if plain > packed.min(unpacked) {
            return Err(Error::format("a page whose levels are longer than it"));
        }
        if codec == Codec::Plain || !header.is_packed {
            return match packed == unpacked {
                true => Ok(bytes),
                false => Err(Error::format(
                    "a page whose length differs from the stated one",
                )),
            };
        }
        let (plain, unpacked) = (plain as usize, unpacked as usize);
        let mut all = vec![0; unpacked];
        all[..plain].copy_from_slice(&bytes[..plain]);
        unpack(codec, &bytes[plain..], &mut all[plain..])?;
        Ok(all)
    }

    fn page(&self, bytes: Vec<u8>, header: &Header) -> Result<Page> {
        let column = self.column();
        let damaged = || Error::format("a page that ends within its levels");
        let levels = match (header.kind, column.optional) {
            (DATA_2, _) => {
                let [repetition, definition] = header.lengths;
                let start = usize::try_from(repetition).map_err(|_| damaged())?;
                let length = usize::try_from(definition).map_err(|_| damaged())?;
                start..start.checked_add(length).ok_or_else(damaged)?
            }
            (_, 0) => 0..0,
            _ if header.levels != RLE => {
                return Err(Error::format(
                    "levels in an old encoding, which is not read",
                ));
            }
            _ => {
                let length: [u8; 4] = *bytes.first_chunk().ok_or_else(damaged)?;
                let length = u32::from_le_bytes(length) as usize;
                4..length.checked_add(4).ok_or_else(damaged)?
            }
        };
        if levels.end > bytes.len() {
            return Err(damaged());
        }
        let encoding = match (header.encoding, &self.dictionary) {
            (PLAIN, _) => Encoding::Plain(column.values),
            (PLAIN_DICTIONARY | RLE_DICTIONARY, Some(dictionary)) => {
                Encoding::Dictionary(Arc::clone(dictionary))
            }
            (PLAIN_DICTIONARY | RLE_DICTIONARY, None) => {
                return Err(Error::format("a page of numbers without their dictionary"));
            }
            (RLE, _) if column.values == Values::Boolean => Encoding::Runs,
            (other, _) => return Err(Error::format(not_read(other))),
        };
        Ok(Page {
            values: levels.end,
            levels,
            bytes,
            count: header.count,
            optional: column.optional,
            encoding,
        })
    }
}

const PLAIN: i64 = 0;
const PLAIN_DICTIONARY: i64 = 2;
const RLE: i64 = 3;
const RLE_DICTIONARY: i64 = 8;

/// The message about an encoding that is not read.
fn not_read(encoding: i64) -> String {
    let name = match encoding {
        3 => "RLE",
        4 => "BIT_PACKED",
        5 => "DELTA_BINARY_PACKED",
        6 => "DELTA_LENGTH_BYTE_ARRAY",
        7 => "DELTA_BYTE_ARRAY",
        9 => "BYTE_STREAM_SPLIT",
        _ => "of no known name",
    };
    format!(
        "values in an encoding that is not read ({name}); write the file again, with pyarrow's \
         `pq.write_table(pq.read_table(old), new)`"
    )
}

/// Unpacks `bytes`, which must fill `out` exactly.
fn unpack(codec: Codec, bytes: &[u8], out: &mut [u8]) -> Result<()> {
    let damaged = |why: &dyn std::fmt::Display| {
        Error::format(format!("a damaged page, which cannot be unpacked: {why}"))
    };
    // If all cells are missing, some writers write no bytes at all.
    if bytes.is_empty() && out.is_empty() {
        return Ok(());
    }
    // The Zstandard decoder buffers as much as it outputs, up to its window.
    let window = (out.len() as u64).max(LEAST_WINDOW);
    let mut fill = |reader: &mut dyn Read| {
        reader.read_exact(out).map_err(|e| damaged(&e))?;
        match reader.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(damaged(&"it is longer than stated")),
            Err(e) => Err(damaged(&e)),
        }
    };
    match codec {
        Codec::Snappy => {
            let length = snap::raw::decompress_len(bytes).map_err(|e| damaged(&e))?;
            if length != out.len() {
                return Err(damaged(&"its length differs from the stated one"));
            }
            let done = snap::raw::Decoder::new().decompress(bytes, out);
            done.map(drop).map_err(|e| damaged(&e))
        }
        Codec::Gzip => fill(&mut flate2::read::MultiGzDecoder::new(bytes)),
        Codec::Zstd => {
            let reader =
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(bytes, window);
            fill(&mut reader.map_err(|e| damaged(&e))?)
        }
        Codec::Plain | Codec::Other(_) => Err(damaged(&"it is not packed")),
    }
}

/// Numbers of some bits, in runs.
struct Runs<'p> {
    left: &'p [u8],
    width: u32,
    run: Run<'p>,
}

enum Run<'p> {
    /// A number, so many times.
    Same(u32, u64),
    /// This many consecutive numbers from a bit on.
    Packed(&'p [u8], u64, u64),
}

impl<'p> Runs<'p> {
    fn new(left: &'p [u8], width: u32) -> Self {
        Self {
            left,
            width,
            run: Run::Same(0, 0),
        }
    }

    /// The next number; None at the end of the bytes or if they are invalid.
    fn next(&mut self) -> Option<u32> {
        // Numbers of zero bits need no bytes.
        if self.width == 0 {
            return Some(0);
        }
        loop {
            match &mut self.run {
                Run::Same(_, 0) | Run::Packed(_, 0, _) => self.begin()?,
                Run::Same(value, left) => {
                    *left -= 1;
                    return Some(*value);
                }
                Run::Packed(bytes, left, bit) => {
                    let value = bits(bytes, *bit, self.width)?;
                    *left -= 1;
                    *bit += u64::from(self.width);
                    return Some(value);
                }
            }
        }
    }

    fn begin(&mut self) -> Option<()> {
        let mut head = 0u64;
        for shift in (0..35).step_by(7) {
            let (byte, left) = self.left.split_first()?;
            self.left = left;
            head |= u64::from(byte & 0x7f) << shift;
            if *byte < 0x80 {
                break;
            }
        }
        let count = head >> 1;
        self.run = match head & 1 {
            0 => {
                let bytes = self.width.div_ceil(8) as usize;
                let (value, left) = self.left.split_at_checked(bytes)?;
                self.left = left;
                let value = value
                    .iter()
                    .rev()
                    .fold(0, |v, byte| v << 8 | u32::from(*byte));
                Run::Same(value, count)
            }
            _ => {
                // The last group may be shorter.
                let bytes = (count * u64::from(self.width)).min(self.left.len() as u64);
                let (packed, left) = self.left.split_at(bytes as usize);
                self.left = left;
                Run::Packed(packed, count * 8, 0)
            }
        };
        Some(())
    }
}

/// A number of up to 32 bits, from a bit on.
fn bits(bytes: &[u8], at: u64, width: u32) -> Option<u32> {
    let first = (at / 8) as usize;
    let (shift, mut value) = ((at % 8) as u32, 0u64);
    let needed = (shift + width).div_ceil(8) as usize;
    let bytes = bytes.get(first..first.checked_add(needed)?)?;
    for byte in bytes.iter().rev() {
        value = value << 8 | u64::from(*byte);
    }
    Some((value >> shift & ((1 << width) - 1)) as u32)
}

impl Page {
    /// Its cells, in their order.
    ///
    /// # Errors
    /// It is damaged.
    pub fn cells(&self) -> Result<Cells<'_>> {
        let (levels, values) = (&self.bytes[self.levels.clone()], &self.bytes[self.values..]);
        let values = match &self.encoding {
            Encoding::Plain(kind) => CellSource::Plain(
                Cursor {
                    left: values,
                    bits: 0,
                },
                *kind,
            ),
            Encoding::Dictionary(dictionary) => {
                let (width, numbers) = match values.split_first() {
                    Some((width, numbers)) if *width <= 32 => (u32::from(*width), numbers),
                    // If all cells are missing there are no values.
                    None => (1, values),
                    Some(_) => return Err(Error::format("numbers of more than 32 bits in a page")),
                };
                CellSource::Entries(Runs::new(numbers, width), dictionary)
            }
            // After their length.
            Encoding::Runs => {
                CellSource::Booleans(Runs::new(values.get(4..).unwrap_or_default(), 1))
            }
        };
        Ok(Cells {
            left: self.count,
            optional: self.optional,
            levels: Runs::new(levels, u32::BITS - self.optional.leading_zeros()),
            values,
        })
    }
}

/// The remaining cells of a page.
pub struct Cells<'p> {
    left: u64,
    optional: u32,
    levels: Runs<'p>,
    values: CellSource<'p>,
}

enum CellSource<'p> {
    Plain(Cursor<'p>, Values),
    Entries(Runs<'p>, &'p Dictionary),
    Booleans(Runs<'p>),
}

impl<'p> Iterator for Cells<'p> {
    /// The next cell; None if it is missing.
    type Item = Result<Option<Cell<'p>>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let cell = self.cell();
        if cell.is_err() {
            self.left = 0;
        }
        Some(cell)
    }
}

impl<'p> Cells<'p> {
    fn cell(&mut self) -> Result<Option<Cell<'p>>> {
        let damaged = |what: &str| Error::format(format!("a damaged page: {what}"));
        if self.optional > 0 {
            let level = self
                .levels
                .next()
                .ok_or_else(|| damaged("it has fewer definition levels than cells"))?;
            if level > self.optional {
                return Err(damaged("a level beyond those of its column"));
            }
            if level < self.optional {
                return Ok(None);
            }
        }
        let found = match &mut self.values {
            CellSource::Plain(cursor, kind) => cursor.next(*kind),
            CellSource::Entries(runs, dictionary) => match runs.next() {
                Some(index) => return dictionary.get(index).map(Some),
                None => None,
            },
            CellSource::Booleans(runs) => runs.next().map(|value| Cell::Int(i64::from(value))),
        };
        found
            .map(Some)
            .ok_or_else(|| damaged("it ends within its values"))
    }
}
