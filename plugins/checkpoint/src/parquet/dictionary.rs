//! The dictionary of a column in a row group: values that cells refer to by number.
//!
//! In: an unpacked page. Out: its entries as cells. A few bytes of a file can refer to an entry millions of times, so the
//! bytes of all these cells are counted.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Values;
use super::plain::{Cell, Cursor};
use crate::{Error, Result};

/// The most entries of a dictionary.
const ENTRIES: usize = 1 << 22;
/// What a cell from a dictionary counts in addition to its bytes: it takes next to nothing in the file.
const CELL: u64 = 1 << 10;

/// Values that pages refer to by number.
#[derive(Debug)]
pub(super) struct Dictionary {
    entries: Entries,
    /// Bytes of the cells that referred to it so far, and the most allowed.
    repeated: AtomicU64,
    most: u64,
}

#[derive(Debug)]
enum Entries {
    Ints(Vec<i64>),
    /// Bytes, and the bounds of each value.
    Bytes(Vec<u8>, Vec<(u32, u32)>),
}

impl Dictionary {
    /// Reads the entries in a page; cells may repeat at most this many bytes of them.
    pub(super) fn read(bytes: Vec<u8>, count: u64, values: Values, most: u64) -> Result<Self> {
        Ok(Self {
            entries: entries(bytes, count, values)?,
            repeated: AtomicU64::new(0),
            most,
        })
    }

    /// Bytes of the cells that referred to it so far.
    pub(super) fn repeated(&self) -> u64 {
        self.repeated.load(Ordering::Relaxed)
    }

    /// How many bytes it takes.
    pub(super) fn size(&self) -> u64 {
        let (bytes, places) = match &self.entries {
            Entries::Ints(values) => (8 * values.len(), 0),
            Entries::Bytes(bytes, places) => (bytes.len(), places.len()),
        };
        (bytes + 8 * places) as u64
    }

    pub(super) fn get(&self, index: u32) -> Result<Cell<'_>> {
        let cell = match &self.entries {
            Entries::Ints(values) => values.get(index as usize).map(|value| Cell::Int(*value)),
            Entries::Bytes(bytes, places) => places
                .get(index as usize)
                .and_then(|(start, end)| bytes.get(*start as usize..*end as usize))
                .map(Cell::Bytes),
        };
        if let Some(Cell::Bytes(bytes)) = cell {
            let cost = bytes.len() as u64 + CELL;
            let repeated = self.repeated.fetch_add(cost, Ordering::Relaxed) + cost;
            if repeated > self.most {
                return Err(Error::format(format!(
                    "cells that repeat entries of a dictionary, {} MiB of them with {CELL} bytes for each cell: more than any \
                     data set grows; write the file again with `use_dictionary=False`",
                    repeated >> 20
                )));
            }
        }
        cell.ok_or_else(|| Error::format("a damaged page: a number beyond its dictionary"))
    }
}

fn entries(bytes: Vec<u8>, count: u64, values: Values) -> Result<Entries> {
    let damaged = || Error::format("a damaged dictionary: it ends within an entry");
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > ENTRIES {
        return Err(Error::format(format!(
            "a dictionary of {count} entries, of which no more than {ENTRIES} are read; write the file again with \
             `use_dictionary=False`"
        )));
    }
    // The minimum size of an entry: its length field, or a number.
    let least = if values == Values::Int64 { 8 } else { 4 };
    if count > bytes.len() / least {
        return Err(damaged());
    }
    let mut cursor = Cursor {
        left: &bytes,
        bits: 0,
    };
    if values != Values::Bytes {
        let ints = (0..count).map(|_| match cursor.next(values) {
            Some(Cell::Int(value)) => Ok(value),
            _ => Err(damaged()),
        });
        return Ok(Entries::Ints(ints.collect::<Result<_>>()?));
    }
    let mut places = Vec::with_capacity(count);
    for _ in 0..count {
        let before = cursor.left.len();
        let Some(Cell::Bytes(value)) = cursor.next(values) else {
            return Err(damaged());
        };
        let start = bytes.len() - before + 4;
        places.push((start as u32, (start + value.len()) as u32));
    }
    Ok(Entries::Bytes(bytes, places))
}
