//! Parquet files as used for image data sets: columns are read page by page, in order.
//!
//! ```text
//! PAR1  pages of column 1, 2, .. of row group 1  pages of row group 2  ..  footer  its length  PAR1
//! ```
//!
//! In: a file that somebody published. Out: its columns and their cells, one page in memory at a time. All sizes are checked
//! before anything is allocated. Supported are booleans, integers and bytes, plain or dictionary-encoded, compressed by
//! Snappy, gzip, Zstandard or not at all. Deliberately absent: lists and maps, encryption, the rarer encodings, the
//! statistics and indexes that help to skip rows, and writing.

mod dictionary;
mod page;
mod plain;
mod thrift;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::source::Source;
use crate::{Error, Result};
pub use page::{Cells, Page, Pages};
pub use plain::Cell;
use thrift::{Kind, Reader, ThriftError};

/// The first and last bytes of a file.
const MAGIC: [u8; 4] = *b"PAR1";
/// The last bytes of a file with an encrypted footer.
const ENCRYPTED: [u8; 4] = *b"PARE";

/// The longest footer that is read.
const FOOTER: u64 = 64 << 20;
/// The most columns, and their deepest nesting.
const MOST_COLUMNS: usize = 1 << 14;
const DEEPEST: usize = 32;
/// The most row groups, column chunks in all of them, metadata entries and rows: an entry may take one byte in the footer,
/// and some fifty in memory.
const MOST_GROUPS: usize = 1 << 20;
const MOST_CHUNKS: usize = 1 << 22;
const MOST_NOTES: usize = 1 << 10;
const MOST_ROWS: u64 = 1 << 32;

/// What the cells of a column are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Values {
    /// Truth values.
    Boolean,
    /// Whole numbers of four bytes.
    Int32,
    /// Whole numbers of eight bytes.
    Int64,
    /// Bytes, or a text.
    Bytes,
    /// A type that is not supported here, by name.
    Other(&'static str),
}

/// A column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name, preceded by the names of the structures around it.
    pub path: Vec<Arc<str>>,
    /// What its cells are.
    pub values: Values,
    /// Whether it is repeated: a row may have any number of cells.
    pub repeated: bool,
    /// How many of the cell and the structures around it are optional.
    optional: u32,
}

impl Column {
    /// Its name in messages: `image.bytes`.
    pub fn name(&self) -> String {
        let parts: Vec<&str> = self.path.iter().map(|part| &**part).collect();
        parts.join(".")
    }
}

/// The pages of a column in a row group.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    /// Where the first page begins.
    start: u64,
    codec: Codec,
    values: u64,
}

/// How pages are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codec {
    Plain,
    Snappy,
    Gzip,
    Zstd,
    Other(&'static str),
}

/// An open file.
#[derive(Debug)]
pub struct Parquet {
    source: Source,
    /// Its columns.
    pub columns: Vec<Column>,
    /// The writer's metadata, by key.
    pub notes: Vec<(String, String)>,
    /// Number of rows.
    pub rows: u64,
    /// Rows of each group.
    groups: Vec<u64>,
    /// The chunks of all columns, group after group.
    chunks: Vec<Chunk>,
    /// Where the footer begins.
    end: u64,
    /// The most bytes that a page may take.
    held: u64,
}

impl Parquet {
    /// Opens a file and reads its footer.
    ///
    /// # Errors
    /// It cannot be read, or is not a Parquet file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(Source::open(path)?)
    }

    /// The same of bytes in memory.
    ///
    /// # Errors
    /// As of [`Parquet::open`].
    pub fn in_memory(bytes: impl Into<Arc<[u8]>>) -> Result<Self> {
        Self::of(Source::Memory(bytes.into()))
    }

    fn of(source: Source) -> Result<Self> {
        let (start, length) = footer(&source)?;
        let bytes = source.bytes(start, length)?;
        let told = Footer::read(&bytes).map_err(|fault| match fault {
            ThriftError::Truncated => {
                Error::format("a damaged Parquet file: its footer is cut short")
            }
            ThriftError::Malformed(what) => {
                Error::format(format!("a damaged Parquet file: its footer has {what}"))
            }
        })?;
        let columns = told.columns()?;
        let mut parquet = Self {
            source,
            notes: told.notes,
            rows: 0,
            groups: Vec::with_capacity(told.groups.len()),
            chunks: told.chunks,
            end: start,
            held: page::HELD,
            columns,
        };
        for (number, (rows, chunks)) in told.groups.iter().enumerate() {
            if *chunks != parquet.columns.len() {
                let message = format!(
                    "a damaged Parquet file: row group {number} has {chunks} columns, the file {}",
                    parquet.columns.len()
                );
                return Err(Error::format(message));
            }
            parquet.groups.push(*rows);
            parquet.rows = parquet.rows.saturating_add(*rows);
        }
        if parquet.rows > MOST_ROWS {
            return Err(Error::format(format!(
                "a Parquet file of more than {MOST_ROWS} rows, the most that are read"
            )));
        }
        if let Some(why) = told.refused {
            return Err(Error::format(why));
        }
        Ok(parquet)
    }

    /// Lowers the limit of bytes for pages by the memory that the caller uses.
    pub fn hold_at_most(&mut self, bytes: u64) {
        self.held = self.held.min(bytes);
    }

    /// The column of this path.
    pub fn column(&self, path: &[&str]) -> Option<usize> {
        let bears = |column: &Column| {
            column.path.len() == path.len()
                && column
                    .path
                    .iter()
                    .zip(path)
                    .all(|(own, name)| **own == **name)
        };
        self.columns.iter().position(bears)
    }

    /// The pages of a column, from the first row group on.
    ///
    /// # Panics
    /// There is no such column.
    pub fn pages(&self, column: usize) -> Pages<'_> {
        assert!(column < self.columns.len(), "no column {column}");
        Pages::new(self, column)
    }

    /// The chunk of a column in a row group, with the group's number of rows.
    fn chunk(&self, group: usize, column: usize) -> Option<(Chunk, u64)> {
        let rows = *self.groups.get(group)?;
        let chunk = *self.chunks.get(group * self.columns.len() + column)?;
        Some((chunk, rows))
    }
}

/// The footer's position and length.
fn footer(source: &Source) -> Result<(u64, u64)> {
    let (head, tail) = (MAGIC.len() as u64, 4 + MAGIC.len() as u64);
    let all = source.len();
    if all < head + tail {
        return Err(Error::format("not a Parquet file: it is too short for one"));
    }
    let begin = source.bytes(0, head)?;
    let end = source.bytes(all - tail, tail)?;
    if begin == ENCRYPTED || end[4..] == ENCRYPTED {
        return Err(Error::format(
            "an encrypted Parquet file; expected one that is not",
        ));
    }
    if begin != MAGIC {
        return Err(Error::format(
            "not a Parquet file: its first bytes are wrong",
        ));
    }
    if end[4..] != MAGIC {
        return Err(Error::format(
            "a damaged Parquet file: it does not end as one; was all of it copied?",
        ));
    }
    let length = u64::from(u32::from_le_bytes([end[0], end[1], end[2], end[3]]));
    if length > FOOTER {
        return Err(Error::format(format!(
            "a Parquet file with a footer of {length} bytes, more than {FOOTER}, the most that is read"
        )));
    }
    match (all - head - tail).checked_sub(length) {
        Some(before) => Ok((head + before, length)),
        None => Err(Error::format(format!(
            "a damaged Parquet file: a footer of {length} bytes in a file of {all}"
        ))),
    }
}

/// Why a file with these last bytes cannot be a complete Parquet file; None if it may be one.
pub(crate) fn broken(file: File) -> Option<String> {
    let size = file.metadata().ok()?.len();
    let told = footer(&Source::File(Arc::new(file), size));
    told.err().map(|error| error.to_string())
}

/// What the footer says.
#[derive(Default)]
struct Footer {
    elements: Vec<Element>,
    notes: Vec<(String, String)>,
    /// Rows and number of columns of each group.
    groups: Vec<(u64, usize)>,
    chunks: Vec<Chunk>,
    /// Why the file is not supported although it is complete.
    refused: Option<&'static str>,
}

/// An element of the schema, a tree flattened depth-first.
struct Element {
    name: Arc<str>,
    /// The type of its cells, if it is a column.
    values: Option<Values>,
    optional: bool,
    repeated: bool,
    children: usize,
}

impl Footer {
    fn read(bytes: &[u8]) -> Result<Self, ThriftError> {
        let mut told = Self::default();
        Reader::new(bytes).fields(Kind::Struct, |reader, field, kind| {
            match field {
                2 => reader.list(kind, |reader, kind| {
                    if told.elements.len() > 2 * MOST_COLUMNS {
                        return Err(ThriftError::Malformed("more columns than any table"));
                    }
                    told.elements.push(element(reader, kind)?);
                    Ok(())
                })?,
                4 => reader.list(kind, |reader, kind| told.group(reader, kind))?,
                5 => reader.list(kind, |reader, kind| {
                    if told.notes.len() == MOST_NOTES {
                        return Err(ThriftError::Malformed("more notes than any table"));
                    }
                    told.notes.push(note(reader, kind)?);
                    Ok(())
                })?,
                8 => {
                    told.refused = Some("an encrypted Parquet file; expected one that is not");
                    return Ok(false);
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(told)
    }

    fn group(&mut self, reader: &mut Reader<'_>, kind: Kind) -> Result<(), ThriftError> {
        let (mut rows, before) = (None, self.chunks.len());
        reader.fields(kind, |reader, field, kind| {
            match field {
                1 => reader.list(kind, |reader, kind| self.chunk(reader, kind))?,
                3 => rows = u64::try_from(reader.int(kind)?).ok(),
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        let rows = rows.ok_or(ThriftError::Malformed(
            "a row group without a number of rows",
        ))?;
        if self.groups.len() == MOST_GROUPS {
            return Err(ThriftError::Malformed("more row groups than any table"));
        }
        self.groups.push((rows, self.chunks.len() - before));
        Ok(())
    }

    fn chunk(&mut self, reader: &mut Reader<'_>, kind: Kind) -> Result<(), ThriftError> {
        if self.chunks.len() == MOST_CHUNKS {
            return Err(ThriftError::Malformed(
                "more columns in row groups than any table",
            ));
        }
        let mut found = None;
        let mut refused = None;
        reader.fields(kind, |reader, field, kind| {
            match field {
                1 => {
                    refused = Some("a Parquet file whose columns lie in other files; expected one that holds its data");
                    Ok(false)
                }
                3 => {
                    found = Some(chunk(reader, kind)?);
                    Ok(true)
                }
                8 | 9 => {
                    refused = Some("a Parquet file with encrypted columns; expected one without");
                    Ok(false)
                }
                _ => Ok(false),
            }
        })?;
        self.refused = self.refused.or(refused);
        let nowhere = Chunk {
            start: 0,
            codec: Codec::Plain,
            values: 0,
        };
        match (found, refused) {
            (Some(chunk), _) => self.chunks.push(chunk),
            // An encrypted chunk has no further fields.
            (None, Some(_)) => self.chunks.push(nowhere),
            (None, None) => {
                return Err(ThriftError::Malformed(
                    "a column without information about its pages",
                ));
            }
        }
        Ok(())
    }

    /// The columns, which are the leaves of the tree.
    fn columns(&self) -> Result<Vec<Column>> {
        let wrong = |what: &str| Err(Error::format(format!("a damaged Parquet file: {what}")));
        let Some((root, elements)) = self.elements.split_first() else {
            return wrong("it has no schema");
        };
        // For each structure around the current element: its remaining elements, how many levels are optional, and whether it
        // is repeated.
        let mut around = vec![(root.children, 0u32, false)];
        let (mut path, mut columns): (Vec<Arc<str>>, Vec<Column>) = (Vec::new(), Vec::new());
        for element in elements {
            while around.last().is_some_and(|(left, ..)| *left == 0) {
                around.pop();
                path.pop();
            }
            let Some((left, optional, repeated)) = around.last_mut() else {
                return wrong("its schema has more elements than its structures");
            };
            *left -= 1;
            let optional = *optional + u32::from(element.optional || element.repeated);
            let repeated = *repeated || element.repeated;
            path.push(Arc::clone(&element.name));
            match element.values {
                None => {
                    if around.len() >= DEEPEST {
                        return wrong("structures nested too deeply");
                    }
                    around.push((element.children, optional, repeated));
                }
                Some(values) => {
                    columns.push(Column {
                        path: path.clone(),
                        values,
                        repeated,
                        optional,
                    });
                    path.pop();
                }
            }
        }
        if around.iter().any(|(left, ..)| *left > 0) {
            return wrong("its schema ends within a structure");
        }
        match columns.len() {
            0 => wrong("it has no column"),
            many if many > MOST_COLUMNS => Err(Error::format(format!(
                "a Parquet file of {many} columns; at most {MOST_COLUMNS} are read"
            ))),
            _ => Ok(columns),
        }
    }
}

fn element(reader: &mut Reader<'_>, kind: Kind) -> Result<Element, ThriftError> {
    let (mut name, mut values, mut repetition, mut children) = (None, None, 0, None);
    reader.fields(kind, |reader, field, kind| {
        match field {
            1 => {
                values = Some(match reader.int(kind)? {
                    0 => Values::Boolean,
                    1 => Values::Int32,
                    2 => Values::Int64,
                    3 => Values::Other("timestamps"),
                    4 | 5 => Values::Other("fractions"),
                    6 => Values::Bytes,
                    7 => Values::Other("bytes of fixed length"),
                    _ => return Err(ThriftError::Malformed("a column of unknown type")),
                })
            }
            3 => repetition = reader.int(kind)?,
            4 => name = Some(reader.text(kind)?.into()),
            5 => children = usize::try_from(reader.int(kind)?).ok(),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    if !(0..=2).contains(&repetition) {
        return Err(ThriftError::Malformed("a column of unknown repetition"));
    }
    // A structure without fields is not a column either.
    let children = children.unwrap_or(0);
    Ok(Element {
        name: name.ok_or(ThriftError::Malformed("a column without a name"))?,
        values: values.filter(|_| children == 0),
        optional: repetition == 1,
        repeated: repetition == 2,
        children,
    })
}

fn note(reader: &mut Reader<'_>, kind: Kind) -> Result<(String, String), ThriftError> {
    let (mut key, mut value) = ("", "");
    reader.fields(kind, |reader, field, kind| {
        match field {
            1 => key = reader.text(kind)?,
            2 => value = reader.text(kind)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok((key.to_owned(), value.to_owned()))
}

fn chunk(reader: &mut Reader<'_>, kind: Kind) -> Result<Chunk, ThriftError> {
    let (mut codec, mut values, mut data, mut dictionary) = (None, None, None, None);
    let place = |reader: &mut Reader<'_>, kind| Ok(u64::try_from(reader.int(kind)?).ok());
    reader.fields(kind, |reader, field, kind| {
        match field {
            4 => {
                codec = Some(match reader.int(kind)? {
                    0 => Codec::Plain,
                    1 => Codec::Snappy,
                    2 => Codec::Gzip,
                    3 => Codec::Other("LZO"),
                    4 => Codec::Other("Brotli"),
                    5 | 7 => Codec::Other("LZ4"),
                    6 => Codec::Zstd,
                    _ => Codec::Other("a codec that is not known"),
                })
            }
            5 => values = place(reader, kind)?,
            9 => data = place(reader, kind)?,
            11 => dictionary = place(reader, kind)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    // Some writers say 0 where there is no dictionary.
    let first = match (data, dictionary.filter(|at| *at > 0)) {
        (Some(data), Some(dictionary)) => Some(data.min(dictionary)),
        (data, _) => data,
    };
    match (codec, values, first) {
        // A row group without rows has no pages.
        (Some(codec), Some(0), _) => Ok(Chunk {
            start: 0,
            codec,
            values: 0,
        }),
        (Some(codec), Some(values), Some(start)) => Ok(Chunk {
            start,
            codec,
            values,
        }),
        _ => Err(ThriftError::Malformed(
            "a column that does not say where its pages are",
        )),
    }
}

#[cfg(test)]
mod tests;
