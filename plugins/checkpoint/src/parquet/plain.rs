//! Plain values: one after the other, without a dictionary.

use super::Values;

/// The value of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell<'p> {
    /// A whole number, or 0 or 1 for a truth value.
    Int(i64),
    /// Bytes, or a text.
    Bytes(&'p [u8]),
}

/// The remaining plain values.
pub(super) struct Cursor<'p> {
    pub(super) left: &'p [u8],
    /// How many booleans of the first byte have been read.
    pub(super) bits: u32,
}

impl<'p> Cursor<'p> {
    pub(super) fn next(&mut self, values: Values) -> Option<Cell<'p>> {
        match values {
            Values::Boolean => {
                let value = *self.left.first()? >> self.bits & 1;
                self.bits += 1;
                if self.bits == 8 {
                    self.bits = 0;
                    self.left = &self.left[1..];
                }
                Some(Cell::Int(i64::from(value)))
            }
            Values::Int32 => {
                let (bytes, left) = self.left.split_first_chunk()?;
                self.left = left;
                Some(Cell::Int(i64::from(i32::from_le_bytes(*bytes))))
            }
            Values::Int64 => {
                let (bytes, left) = self.left.split_first_chunk()?;
                self.left = left;
                Some(Cell::Int(i64::from_le_bytes(*bytes)))
            }
            Values::Bytes => {
                let (length, left) = self.left.split_first_chunk()?;
                let length = u32::from_le_bytes(*length) as usize;
                let (value, left) = left.split_at_checked(length)?;
                self.left = left;
                Some(Cell::Bytes(value))
            }
            Values::Other(_) => None,
        }
    }
}
