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

/// Values so far: whole numbers that fit bytes for as long as there are no others.
enum Numbers {
    Bytes(Vec<u8>),
    Floats(Vec<f32>),
}

impl Numbers {
    fn push(&mut self, value: f32) {
        match self {
            Self::Bytes(bytes) if value.fract() == 0.0 && value <= 255.0 => bytes.push(value as u8),
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
    let mut header = options.header || named.is_some();
    let mut class_at = match options.label.as_deref() {
        Some("first") => Some(0),
        _ => None,
    };
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
        if header {
            header = false;
            if let Some(name) = named {
                let mut bearing = (0..record.len()).filter(|&at| &record[at] == name.as_bytes());
                let at = bearing.next();
                if let (Some(one), Some(other)) = (at, bearing.next()) {
                    let message = format!(
                        "columns {} and {} are both called {name:?}; remove or rename one",
                        one + 1,
                        other + 1
                    );
                    return Err(DataError::content(path, message));
                }
                let missing = || {
                    let message = format!(
                        "no column named {name:?} in the first line, which begins {}",
                        record
                            .iter()
                            .take(4)
                            .map(quoted)
                            .collect::<Vec<_>>()
                            .join(", ")
                    );
                    DataError::content(path, message)
                };
                class_at = Some(at.ok_or_else(missing)?);
            }
            continue;
        }
        let line = || line_of(path, record.position().map_or(0, csv::Position::byte));
        let (height, width) = match size {
            Some(size) => size,
            None => *size.insert(size_of(options, path, record.len())?),
        };
        let count = height * width;
        if record.len() != count + 1 {
            return Err(DataError::Columns {
                path: path.to_owned(),
                line: line(),
                expected: format!(
                    "{} ({height} x {width} grey values and the class)",
                    count + 1
                ),
                found: record.len(),
            });
        }
        let cell = |column: usize, expected: &str| DataError::Cell {
            path: path.to_owned(),
            line: line(),
            column: column + 1,
            expected: expected.to_owned(),
            found: quoted(&record[column]),
        };
        let limit = options.max.unwrap_or(f32::MAX);
        let class_at = class_at.unwrap_or(count);
        for column in (0..=count).filter(|column| *column != class_at) {
            let value = number(&record[column]).ok_or_else(|| {
                cell(
                    column,
                    expected_number(line(), options.header || named.is_some()),
                )
            })?;
            if !(0.0..=limit).contains(&value) {
                let expected = match options.max {
                    Some(max) => format!("a grey value from 0 to {max} (`max`)"),
                    None => "a grey value of at least 0".to_owned(),
                };
                return Err(cell(column, &expected));
            }
            numbers.push(value);
        }
        let class = std::str::from_utf8(&record[class_at])
            .ok()
            .and_then(class::number);
        let class = class.and_then(|class| u32::try_from(class).ok());
        labels.push(class.ok_or_else(|| {
            let expected = match options.label {
                None => "a class (an integer from 0; if it stands in another column, say `label: first` or its name)",
                Some(_) => "a class (an integer from 0)",
            };
            cell(class_at, expected)
        })?);
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

/// Line, from 1, of the record found from `byte` on, for a message: the file is read again. The reader's own count is the
/// line where it began to look, before any blank lines.
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

/// A cell as shown in a message: quoted, cut when long.
fn quoted(text: &[u8]) -> String {
    if text.is_empty() {
        return "nothing".to_owned();
    }
    let text = String::from_utf8_lossy(text);
    let short: String = text.chars().take(40).collect();
    let dots = if short.len() < text.len() { "..." } else { "" };
    format!("`{}{dots}`", short.escape_debug())
}
