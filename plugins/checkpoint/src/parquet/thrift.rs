//! Thrift's compact protocol, as far as Parquet's headers need it: read sequentially without copying; unknown fields are
//! skipped.
//!
//! In: bytes that may be cut short. Out: fields by number, or an error. A list cannot claim more elements than there are
//! bytes, because each takes at least one.

/// Why bytes cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThriftError {
    /// They end too early.
    Truncated,
    /// The bytes are not what was expected.
    Malformed(&'static str),
}

type Result<T> = std::result::Result<T, ThriftError>;

/// The deepest nesting of skipped structures.
const DEEPEST: usize = 32;

/// The kind of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A boolean, stored in the field's header.
    Bool(bool),
    /// One byte.
    Byte,
    /// A whole number of any width.
    Int,
    /// Eight bytes.
    Double,
    /// Bytes, or a text.
    Binary,
    /// A list or a set.
    List,
    /// A map.
    Map,
    /// A structure.
    Struct,
    /// Sixteen bytes.
    Uuid,
}

impl Kind {
    fn of(code: u8) -> Result<Self> {
        Ok(match code {
            1 => Self::Bool(true),
            2 => Self::Bool(false),
            3 => Self::Byte,
            4..=6 => Self::Int,
            7 => Self::Double,
            8 => Self::Binary,
            9 | 10 => Self::List,
            11 => Self::Map,
            12 => Self::Struct,
            13 => Self::Uuid,
            _ => return Err(ThriftError::Malformed("a field of unknown kind")),
        })
    }
}

/// The remaining bytes.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader at the start of these bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    /// The number of remaining bytes.
    pub fn left(&self) -> usize {
        self.left.len()
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, left) = self
            .left
            .split_at_checked(count)
            .ok_or(ThriftError::Truncated)?;
        self.left = left;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.bytes(1)?[0])
    }

    /// A varint: groups of seven bits, the lowest first.
    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(ThriftError::Malformed("a number without end"))
    }

    /// The value of a field that is a whole number.
    pub fn int(&mut self, kind: Kind) -> Result<i64> {
        match kind {
            Kind::Int => {
                let value = self.varint()?;
                Ok((value >> 1) as i64 ^ -((value & 1) as i64))
            }
            _ => Err(ThriftError::Malformed("no number where one should be")),
        }
    }

    /// The value of a boolean field.
    pub fn bool(&mut self, kind: Kind) -> Result<bool> {
        match kind {
            Kind::Bool(value) => Ok(value),
            _ => Err(ThriftError::Malformed("no truth value where one should be")),
        }
    }

    /// The value of a field that is bytes.
    pub fn binary(&mut self, kind: Kind) -> Result<&'a [u8]> {
        if kind != Kind::Binary {
            return Err(ThriftError::Malformed("no bytes where some should be"));
        }
        let count = self.varint()?;
        self.bytes(usize::try_from(count).map_err(|_| ThriftError::Truncated)?)
    }

    /// The value of a field that is a text.
    pub fn text(&mut self, kind: Kind) -> Result<&'a str> {
        let bytes = self.binary(kind)?;
        std::str::from_utf8(bytes).map_err(|_| ThriftError::Malformed("a text that is not UTF-8"))
    }

    /// The fields of a structure. `each` returns whether it has read the value; otherwise the value is skipped.
    pub fn fields(
        &mut self,
        kind: Kind,
        mut each: impl FnMut(&mut Self, i64, Kind) -> Result<bool>,
    ) -> Result<()> {
        if kind != Kind::Struct {
            return Err(ThriftError::Malformed("no structure where one should be"));
        }
        let mut number = 0i64;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(());
            }
            number = match head >> 4 {
                0 => self.int(Kind::Int)?,
                step => number.wrapping_add(i64::from(step)),
            };
            let kind = Kind::of(head & 0x0f)?;
            if !each(self, number, kind)? {
                self.skip(kind, 0)?;
            }
        }
    }

    /// The elements of a list, one after the other.
    pub fn list(
        &mut self,
        kind: Kind,
        mut each: impl FnMut(&mut Self, Kind) -> Result<()>,
    ) -> Result<()> {
        if kind != Kind::List {
            return Err(ThriftError::Malformed("no list where one should be"));
        }
        let (count, kind) = self.list_head()?;
        for _ in 0..count {
            let kind = match kind {
                // In lists these take a byte each.
                Kind::Bool(_) => Kind::Bool(self.byte()? == 1),
                kind => kind,
            };
            each(self, kind)?;
        }
        Ok(())
    }

    fn list_head(&mut self) -> Result<(usize, Kind)> {
        let head = self.byte()?;
        let count = match head >> 4 {
            15 => self.varint()?,
            count => u64::from(count),
        };
        match usize::try_from(count) {
            Ok(count) if count <= self.left.len() => Ok((count, Kind::of(head & 0x0f)?)),
            _ => Err(ThriftError::Truncated),
        }
    }

    fn skip(&mut self, kind: Kind, depth: usize) -> Result<()> {
        if depth > DEEPEST {
            return Err(ThriftError::Malformed("structures nested too deeply"));
        }
        match kind {
            Kind::Bool(_) => {}
            Kind::Byte => drop(self.byte()?),
            Kind::Int => drop(self.varint()?),
            Kind::Double => drop(self.bytes(8)?),
            Kind::Uuid => drop(self.bytes(16)?),
            Kind::Binary => drop(self.binary(kind)?),
            Kind::List => {
                let (count, kind) = self.list_head()?;
                for _ in 0..count {
                    self.skip_element(kind, depth)?;
                }
            }
            Kind::Map => {
                let count = self.varint()?;
                if count > self.left.len() as u64 {
                    return Err(ThriftError::Truncated);
                }
                if count > 0 {
                    let kinds = self.byte()?;
                    let (key, value) = (Kind::of(kinds >> 4)?, Kind::of(kinds & 0x0f)?);
                    for _ in 0..count {
                        self.skip_element(key, depth)?;
                        self.skip_element(value, depth)?;
                    }
                }
            }
            Kind::Struct => loop {
                let head = self.byte()?;
                if head == 0 {
                    break;
                }
                if head >> 4 == 0 {
                    self.varint()?;
                }
                self.skip(Kind::of(head & 0x0f)?, depth + 1)?;
            },
        }
        Ok(())
    }

    fn skip_element(&mut self, kind: Kind, depth: usize) -> Result<()> {
        match kind {
            Kind::Bool(_) => self.byte().map(drop),
            kind => self.skip(kind, depth + 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_fields_are_read_and_others_passed_over() {
        // 1: i32 -3; 3: "ab"; 4: true; 5: [i32 1, 2]; 7: {1: double}; 20: i64 300, its number written out.
        let bytes = [
            0x15, 5, 0x28, 2, b'a', b'b', 0x11, 0x19, 0x25, 2, 4, 0x2c, 0x17, 1, 2, 3, 4, 5, 6, 7,
            8, 0, 0x06, 40, 0xd8, 0x04, 0,
        ];
        let mut reader = Reader::new(&bytes);
        let (mut ints, mut text, mut truth, mut list) = (Vec::new(), "", false, Vec::new());
        let read = reader.fields(Kind::Struct, |r, number, kind| {
            match number {
                1 | 20 => ints.push(r.int(kind)?),
                3 => text = r.text(kind)?,
                4 => truth = r.bool(kind)?,
                5 => r.list(kind, |r, kind| {
                    list.push(r.int(kind)?);
                    Ok(())
                })?,
                _ => return Ok(false),
            }
            Ok(true)
        });
        assert_eq!((read, reader.left()), (Ok(()), 0));
        assert_eq!(
            (ints, text, truth, list),
            (vec![-3, 300], "ab", true, vec![1, 2])
        );
        // All of it skipped, and truncated at every length.
        let skipped = |bytes| Reader::new(bytes).fields(Kind::Struct, |_, _, _| Ok(false));
        assert_eq!(skipped(&bytes), Ok(()));
        for end in 0..bytes.len() {
            assert_eq!(skipped(&bytes[..end]), Err(ThriftError::Truncated), "{end}");
        }
    }

    #[test]
    fn what_bytes_claim_costs_nothing() {
        let skipped = |bytes: &[u8]| Reader::new(bytes).fields(Kind::Struct, |_, _, _| Ok(false));
        // A list of 2^60 structures, and a map.
        let many = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10];
        assert_eq!(
            skipped(&[&[0x19, 0xfc], &many[..], &[0]].concat()),
            Err(ThriftError::Truncated)
        );
        assert_eq!(
            skipped(&[&[0x1b], &many[..], &[0x55]].concat()),
            Err(ThriftError::Truncated)
        );
        let deep = [0x1c].repeat(100_000);
        let expected = ThriftError::Malformed("structures nested too deeply");
        assert_eq!(skipped(&deep), Err(expected));
        let endless = ThriftError::Malformed("a number without end");
        assert_eq!(skipped(&[&[0x15][..], &[0xff; 20]].concat()), Err(endless));
    }
}
