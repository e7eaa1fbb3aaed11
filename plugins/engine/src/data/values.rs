//! Images as lines of a CSV file: grey values row by row, and the class.

use std::io::{BufReader, Read};
use std::path::Path;

use super::class;
use super::error::DataError;
use super::file;
use super::options::DataOptions;

/// Grey images of one size, in memory.
pub struct Values {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// Values (n, height, width): as written where they are whole numbers up to 255, else in 255ths of white.
    pub pixels: Vec<u8>,
    /// The value of white.
    pub white: f32,
    /// Class of each image.
    pub labels: Vec<u32>,
}

/// The longest line that is read: more than three channels of 1024 x 1024.
const LONGEST_LINE: u64 = 1 << 24;

/// Memory that the values of a file may take while it is read.
const ROOM: usize = 352 << 20;

/// Values so far: stored as bytes while all are whole numbers that fit.
enum Numbers {
    Bytes(Vec<u8>),
    Floats(Vec<f32>),
}

impl Numbers {
    /// The most bytes they may take at the end: one fraction among them temporarily makes all of them larger.
    fn memory(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Floats(floats) => floats.len().saturating_mul(5),
        }
    }

    fn is_byte(value: f32) -> bool {
        value.fract() == 0.0 && value <= 255.0
    }

    fn push(&mut self, value: f32) {
        match self {
            Self::Bytes(bytes) if Self::is_byte(value) => bytes.push(value as u8),
            Self::Bytes(bytes) => {
                let mut floats: Vec<f32> = bytes.iter().copied().map(f32::from).collect();
                floats.push(value);
                *self = Self::Floats(floats);
            }
            Self::Floats(floats) => floats.push(value),
        }
    }

    /// Bytes, and the value of white among them.
    fn finish(self, max: Option<f32>) -> (Vec<u8>, f32) {
        match self {
            Self::Bytes(bytes) => {
                let found = || f32::from(bytes.iter().copied().max().unwrap_or(0));
                let white = max.unwrap_or_else(found);
                (bytes, white)
            }
            Self::Floats(floats) => {
                let white = max.unwrap_or_else(|| floats.iter().copied().fold(0.0, f32::max));
                let byte = |value: &f32| (value / white * 255.0).round() as u8;
                (floats.iter().map(byte).collect(), 255.0)
            }
        }
    }
}

/// Reads a file.
pub fn read(options: &DataOptions, path: &Path) -> Result<Values, DataError> {
    read_within(ROOM, options, path)
}

fn too_many(path: &Path, room: usize, images: usize) -> DataError {
    DataError::content(
        path,
        format!(
            "its values take more than {} MiB of memory ({images} images until then): give them as an `.npy` file, which is \
             read image by image",
            room >> 20
        ),
    )
}

fn read_within(room: usize, options: &DataOptions, path: &Path) -> Result<Values, DataError> {
    let expected = "a CSV file (for a folder of image files, use `folder:`)";
    let (lines, next) = file::records(file::open(path, expected)?, LONGEST_LINE);
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true) // so that a line of another length is reported in our words
        .trim(csv::Trim::All)
        .from_reader(lines);

    let named = options
        .label
        .as_deref()
        .filter(|label| !matches!(*label, "first" | "last"));
    let has_header = options.header || named.is_some();
    let mut class_at = match options.label.as_deref() {
        Some("first") => Some(0),
        _ => None,
    };
    let mut header_is_next = has_header;
    let mut size = None;
    let mut numbers = Numbers::Bytes(Vec::new());
    let mut labels: Vec<u32> = Vec::new();
    let mut record = csv::ByteRecord::new();
    loop {
        next.begin();
        let begins = reader.position().byte();
        let more = reader
            .read_byte_record(&mut record)
            .map_err(|error| match next.is_over() {
                true => DataError::content(
                    path,
                    format!("line {}: {}", line_of(path, begins), next.too_long()),
                ),
                false => DataError::Read {
                    path: path.to_owned(),
                    source: error.into(),
                },
            })?;
        if !more {
            break;
        }
        if record.len() == 1
            && size.is_none()
            && let Some(found) = file::other_separator(b',', |byte| record[0].contains(&byte))
        {
            let message = format!(
                "expected grey values and a class separated by commas, found {found}: {}",
                quoted(&record[0])
            );
            return Err(DataError::content(path, message));
        }
        if header_is_next {
            header_is_next = false;
            if let Some(name) = named {
                class_at = Some(column_named(name, &record, path)?);
            }
            continue;
        }
        let line = Line {
            options,
            path,
            record: &record,
            has_header,
        };
        let (height, width) = match size {
            Some(size) => size,
            None => *size.insert(size_of(options, path, record.len())?),
        };
        line.check_columns(height, width)?;
        let class_at = class_at.unwrap_or(height * width);
        for column in (0..record.len()).filter(|column| *column != class_at) {
            let value = line.value(column)?;
            let is_first_fraction =
                matches!(&numbers, Numbers::Bytes(_)) && !Numbers::is_byte(value);
            if is_first_fraction && numbers.memory().saturating_mul(5) > room {
                return Err(too_many(path, room, labels.len()));
            }
            numbers.push(value);
        }
        labels.push(line.class(class_at)?);
        if numbers.memory() + size_of_val(labels.as_slice()) > room {
            return Err(too_many(path, room, labels.len()));
        }
    }

    let Some((height, width)) = size else {
        return Err(DataError::Empty {
            path: path.to_owned(),
            expected: "lines of grey values and a class",
            found: "none".into(),
        });
    };
    let (pixels, white) = numbers.finish(options.max);
    Ok(Values {
        height,
        width,
        pixels,
        white,
        labels,
    })
}

/// The column named `name` in the first line.
fn column_named(name: &str, header: &csv::ByteRecord, path: &Path) -> Result<usize, DataError> {
    let mut bearing = (0..header.len()).filter(|&at| &header[at] == name.as_bytes());
    match (bearing.next(), bearing.next()) {
        (Some(at), None) => Ok(at),
        (Some(one), Some(other)) => {
            let message = format!(
                "columns {} and {} are both called {name:?}; remove or rename one",
                one + 1,
                other + 1
            );
            Err(DataError::content(path, message))
        }
        (None, _) => {
            let names: Vec<String> = header.iter().take(4).map(quoted).collect();
            let message = format!(
                "no column named {name:?} in the first line, which begins {}",
                names.join(", ")
            );
            Err(DataError::content(path, message))
        }
    }
}

/// The line of one image.
struct Line<'a> {
    options: &'a DataOptions,
    path: &'a Path,
    record: &'a csv::ByteRecord,
    has_header: bool,
}

impl Line<'_> {
    /// Its number in the file, from 1.
    fn number(&self) -> u64 {
        let begins = self.record.position().map_or(0, csv::Position::byte);
        line_of(self.path, begins)
    }

    fn check_columns(&self, height: usize, width: usize) -> Result<(), DataError> {
        let expected = height * width + 1;
        if self.record.len() == expected {
            return Ok(());
        }
        Err(DataError::Columns {
            path: self.path.to_owned(),
            line: self.number(),
            expected: format!("{expected} ({height} x {width} grey values and the class)"),
            found: self.record.len(),
        })
    }

    /// The grey value in a column.
    fn value(&self, column: usize) -> Result<f32, DataError> {
        let value = number(&self.record[column]).ok_or_else(|| {
            let expected = expected_number(self.number(), self.has_header);
            self.fault(column, expected)
        })?;
        let limit = self.options.max.unwrap_or(f32::MAX);
        if (0.0..=limit).contains(&value) {
            return Ok(value);
        }
        let expected = match self.options.max {
            Some(max) => format!("a grey value from 0 to {max} (`max`)"),
            None => "a grey value of at least 0".to_owned(),
        };
        Err(self.fault(column, &expected))
    }

    /// The class in a column.
    fn class(&self, column: usize) -> Result<u32, DataError> {
        let text = std::str::from_utf8(&self.record[column]).ok();
        let class = text
            .and_then(class::number)
            .and_then(|class| u32::try_from(class).ok());
        class.ok_or_else(|| {
            let expected = match self.options.label {
                None => "a class (an integer from 0; if it is in another column, say `label: first` or its name)",
                Some(_) => "a class (an integer from 0)",
            };
            self.fault(column, expected)
        })
    }

    fn fault(&self, column: usize, expected: &str) -> DataError {
        DataError::Cell {
            path: self.path.to_owned(),
            line: self.number(),
            column: column + 1,
            expected: expected.to_owned(),
            found: quoted(&self.record[column]),
        }
    }
}

/// Height and width of images whose lines have `columns` columns.
fn size_of(
    options: &DataOptions,
    path: &Path,
    columns: usize,
) -> Result<(usize, usize), DataError> {
    let count = columns.saturating_sub(1);
    let fault = |message: String| Err(DataError::content(path, message));
    if count == 0 {
        return fault(format!(
            "expected grey values and a class separated by commas, found {columns} column in the first line"
        ));
    }
    match (options.height, options.width) {
        (Some(height), Some(width)) if height.checked_mul(width) == Some(count) => {
            Ok((height, width))
        }
        (Some(height), Some(width)) => fault(format!(
            "the first line has {columns} columns, that is {count} grey values and the class; \
             height {height} x width {width} needs another number of grey values"
        )),
        (Some(side), None) if count.is_multiple_of(side) => Ok((side, count / side)),
        (None, Some(side)) if count.is_multiple_of(side) => Ok((count / side, side)),
        (Some(side), None) | (None, Some(side)) => fault(format!(
            "the first line has {columns} columns, that is {count} grey values and the class; \
             {count} is no multiple of {side}, the given side"
        )),
        (None, None) if count.isqrt().pow(2) == count => Ok((count.isqrt(), count.isqrt())),
        (None, None) => fault(format!(
            "the first line has {columns} columns, that is {count} grey values and the class; \
             {count} is no square, so give `height` and `width`"
        )),
    }
}

fn number(text: &[u8]) -> Option<f32> {
    let value: f32 = std::str::from_utf8(text).ok()?.parse().ok()?;
    value.is_finite().then_some(value)
}

fn expected_number(line: u64, header: bool) -> &'static str {
    match (line, header) {
        (1, false) => "a number (if the first line holds column names, say `header: true`)",
        _ => "a number",
    }
}

/// Line, from 1, of the record at `byte`, for a message; the file is read again. The reader's own count is the line at which
/// it started to look, before any blank lines.
fn line_of(path: &Path, byte: u64) -> u64 {
    let Ok(file) = file::open(path, "a CSV file") else {
        return 0;
    };
    let mut line = 1;
    for (at, found) in (0u64..).zip(BufReader::new(file).bytes()) {
        match found {
            Ok(b'\n') => line += 1,
            Ok(found) if at < byte || found.is_ascii_whitespace() => {}
            _ => break,
        }
    }
    line
}

/// A cell for a message: quoted, and cut if long.
fn quoted(text: &[u8]) -> String {
    if text.is_empty() {
        return "nothing".to_owned();
    }
    let text = String::from_utf8_lossy(text);
    let short: String = text.chars().take(40).collect();
    let dots = if short.len() < text.len() { "..." } else { "" };
    format!("`{}{dots}`", short.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_take_so_much_memory_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.csv");
        let check = |text: &str, room: usize, expected: &str| {
            std::fs::write(&path, text).unwrap();
            match read_within(room, &DataOptions::default(), &path) {
                Ok(values) => assert_eq!(
                    (values.pixels.len(), expected),
                    (4 * values.labels.len(), "")
                ),
                Err(error) => {
                    let said = error.to_string();
                    assert!(!expected.is_empty() && said.contains(expected), "{said}");
                }
            }
        };
        let whole = "0,1,2,3,7\n".repeat(100);
        check(&whole, 800, "");
        check(&whole, 700, "(88 images until then)");
        // With one fraction all are stored as floats, in addition to the bytes so far.
        let last = format!("{whole}0,1,0.5,3,7\n");
        check(&last, 5000, "");
        check(&last, 1999, "(100 images until then)");
        let first = format!("0,0.5,2,3,7\n{whole}");
        check(&first, 5000, "");
        check(&first, 1000, "images until then");
        let separated = "expected grey values and a class separated by commas, found";
        for (text, found) in [
            ("0;1;2;3;7\n", "semicolons: `0;1;2;3;7`"),
            ("0\t1\t2\t3\t7\n", "tabs: `0"),
        ] {
            check(text, 800, &format!("{separated} {found}"));
        }
    }
}
