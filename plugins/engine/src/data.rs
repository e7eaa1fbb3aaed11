//! Labelled images that a stage learns from or is measured against.
//!
//! In: a CSV file of grey values with the class in the last column, or a folder with one directory of PNG files per
//! class. Out: [`Images`], all pixels in memory in [-1, 1]. Every malformed input is a [`DataError`] that names the
//! file and, in a CSV, line and column. Deliberately absent: resizing, augmentation, streaming from disk.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use image::{DynamicImage, ImageError, ImageFormat, ImageReader};
use rayon::prelude::*;
use retort_abi::{Failure, FailureCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where labelled images come from: a CSV file or a folder of PNG files, exactly one of the two.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataOptions {
    /// CSV file, one image a line: grey values row by row, then the class (0, 1, 2, ...).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-file" = "file"))]
    pub csv: Option<String>,
    /// Folder with one directory per class, each holding PNG files of one common size, all grey or all RGB. Directories
    /// named 0, 1, 2, ... give those classes; other names give classes in alphabetical order.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-file" = "dir"))]
    pub folder: Option<String>,
    /// Height of the images of a CSV file, in pixels; taken from the number of columns when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub height: Option<usize>,
    /// Width of the images of a CSV file, in pixels; taken from the number of columns when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub width: Option<usize>,
    /// Grey value of white in a CSV file (16 for the UCI digits); the largest value of the file when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub max: Option<f32>,
    /// Whether the first line of a CSV file holds column names.
    pub header: bool,
}

/// Labelled images of one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Images {
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// Pixels in [-1, 1], laid out (n, channels, height, width).
    pub pixels: Vec<f32>,
    /// Class of each image, below `classes`.
    pub labels: Vec<u32>,
    /// Number of classes; each has at least one image.
    pub classes: usize,
    /// Name of each class: its number in a CSV file, its directory in a folder.
    pub names: Vec<String>,
}

/// Why images could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Options that name no source, or two, or do not fit their source.
    #[error("{0}")]
    Options(String),
    /// No such file or folder.
    #[error("{}: no such {what}", path.display())]
    Missing {
        /// The path as resolved.
        path: PathBuf,
        /// "file" or "folder".
        what: &'static str,
    },
    /// The system refused to read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The path as resolved.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No image in it.
    #[error("{}: expected {expected}, found none", path.display())]
    Empty {
        /// The file or folder.
        path: PathBuf,
        /// What should have been there.
        expected: &'static str,
    },
    /// A value of a CSV file is wrong.
    #[error("{}:{line}: column {column}: expected {expected}, found {found}", path.display())]
    Cell {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// Column, from 1.
        column: usize,
        /// What was expected.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A line of a CSV file has another number of columns than the images need.
    #[error("{}:{line}: expected {expected} columns, found {found}", path.display())]
    Columns {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// What was expected, and why.
        expected: String,
        /// Columns found.
        found: usize,
    },
    /// The columns of a CSV file make no image of the wanted size.
    #[error("{}: {message}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        message: String,
    },
    /// A class between the others has no image.
    #[error("{}: class {missing} has no image, though classes go up to {last}; number them 0, 1, 2, ...", path.display())]
    ClassGap {
        /// The file or folder.
        path: PathBuf,
        /// First class without an image.
        missing: u64,
        /// Highest class.
        last: u64,
    },
    /// A PNG file is malformed or unlike the others.
    #[error("{}: {message}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        let code = match &error {
            DataError::Options(_) => FailureCode::InvalidOptions,
            DataError::Missing { .. } => FailureCode::MissingInput,
            DataError::Read { .. } => FailureCode::Io,
            _ => FailureCode::BadData,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<DataError> for crate::Error {
    fn from(error: DataError) -> Self {
        crate::Error::Host(error.into())
    }
}

impl DataOptions {
    /// Checks what can be checked without touching a file.
    pub fn check(&self) -> Result<(), DataError> {
        let fault = |message: &str| Err(DataError::Options(message.to_owned()));
        match (&self.csv, &self.folder) {
            (None, None) => fault("data: say where the images are, `csv: FILE` or `folder: DIR`"),
            (Some(_), Some(_)) => fault("data: `csv` and `folder` exclude each other; keep one"),
            (None, Some(_))
                if self.height.is_some()
                    || self.width.is_some()
                    || self.max.is_some()
                    || self.header =>
            {
                fault(
                    "data: `height`, `width`, `max` and `header` describe a CSV file; PNG files carry their own size",
                )
            }
            _ if self.max.is_some_and(|max| !(max.is_finite() && max > 0.0)) => {
                fault("data: `max` must be a number above 0")
            }
            _ if self.height == Some(0) || self.width == Some(0) => {
                fault("data: `height` and `width` must be at least 1")
            }
            _ => Ok(()),
        }
    }
}

/// Reads all images; relative paths start from `base_dir`.
pub fn load(options: &DataOptions, base_dir: &Path) -> Result<Images, DataError> {
    options.check()?;
    match (&options.csv, &options.folder) {
        (Some(csv), _) => load_csv(options, &base_dir.join(csv)),
        (None, Some(folder)) => load_folder(&base_dir.join(folder)),
        (None, None) => unreachable!("check() wants one of the two"),
    }
}

impl Images {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no image; never so after [`load`].
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Values of one image: channels x height x width.
    pub fn stride(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Pixels of one image, (channels, height, width). `index` must be below [`Images::len`].
    pub fn image(&self, index: usize) -> &[f32] {
        &self.pixels[index * self.stride()..][..self.stride()]
    }

    /// Pixels (b, channels, height, width) and labels (b) of the images at `indices`, in that order.
    pub fn gather(&self, indices: &[usize]) -> (Vec<f32>, Vec<u32>) {
        let mut pixels = Vec::with_capacity(indices.len() * self.stride());
        for &index in indices {
            pixels.extend_from_slice(self.image(index));
        }
        let labels = indices.iter().map(|&index| self.labels[index]).collect();
        (pixels, labels)
    }

    /// Splits the indices into (training, held out), each ascending. The share `held_out`, taken as 0 to 1, holds for
    /// every class (rounded; a class keeps at least one image for training). A pure function of labels and arguments.
    pub fn split(&self, held_out: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
        let mut by_class = vec![Vec::new(); self.classes];
        for (index, &label) in self.labels.iter().enumerate() {
            by_class[label as usize].push(index);
        }
        let (mut train, mut held) = (Vec::new(), Vec::new());
        for mut members in by_class {
            let share = (members.len() as f64 * held_out.clamp(0.0, 1.0)).round() as usize;
            let share = share.min(members.len().saturating_sub(1));
            members.sort_by_key(|&index| (scramble(seed, index as u64), index));
            held.extend_from_slice(&members[..share]);
            train.extend_from_slice(&members[share..]);
        }
        train.sort_unstable();
        held.sort_unstable();
        (train, held)
    }
}

/// SplitMix64's output function over both numbers: an order of the indices that looks random and is fixed for ever.
fn scramble(seed: u64, index: u64) -> u64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(index))
}

fn load_csv(options: &DataOptions, path: &Path) -> Result<Images, DataError> {
    if path.is_dir() {
        let message = "is a folder; expected a CSV file (for PNG files, use `folder:`)".to_owned();
        return Err(DataError::Size {
            path: path.to_owned(),
            message,
        });
    }
    let content = std::fs::read(path).map_err(|source| read_error(path, "file", source))?;
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(options.header)
        .flexible(true) // so that a line of another length is reported in our words
        .trim(csv::Trim::All)
        .from_reader(content.as_slice());

    let mut size = None;
    let mut pixels = Vec::new();
    let mut labels = Vec::new();
    let mut record = csv::ByteRecord::new();
    loop {
        let more = reader
            .read_byte_record(&mut record)
            .map_err(|error| DataError::Read {
                path: path.to_owned(),
                source: error.into(),
            })?;
        if !more {
            break;
        }
        let line = || line_of(&content, record.position().map_or(0, csv::Position::byte));
        let (height, width) = match size {
            Some(size) => size,
            None => *size.insert(csv_size(options, path, record.len())?),
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
        for column in 0..count {
            let value = number(&record[column])
                .ok_or_else(|| cell(column, expected_number(line(), options.header)))?;
            if !(0.0..=limit).contains(&value) {
                let expected = match options.max {
                    Some(max) => format!("a grey value from 0 to {max} (`max`)"),
                    None => "a grey value of at least 0".to_owned(),
                };
                return Err(cell(column, &expected));
            }
            pixels.push(value);
        }
        let class = std::str::from_utf8(&record[count])
            .ok()
            .and_then(|text| text.parse().ok());
        labels.push(class.ok_or_else(|| cell(count, "a class (an integer from 0)"))?);
    }

    let Some((height, width)) = size else {
        let expected = "lines of grey values and a class";
        return Err(DataError::Empty {
            path: path.to_owned(),
            expected,
        });
    };
    let found: Vec<u64> = labels.iter().map(|&label: &u32| label.into()).collect();
    let classes = count_classes(path, &found)?;
    let max = options
        .max
        .unwrap_or_else(|| pixels.iter().copied().fold(0.0, f32::max));
    let scale = if max > 0.0 { 2.0 / max } else { 0.0 };
    pixels
        .iter_mut()
        .for_each(|value| *value = *value * scale - 1.0);
    let names = (0..classes).map(|class| class.to_string()).collect();
    Ok(Images {
        channels: 1,
        height,
        width,
        pixels,
        labels,
        classes,
        names,
    })
}

/// Height and width of images whose lines have `columns` columns.
fn csv_size(
    options: &DataOptions,
    path: &Path,
    columns: usize,
) -> Result<(usize, usize), DataError> {
    let count = columns.saturating_sub(1);
    let fault = |message: String| {
        Err(DataError::Size {
            path: path.to_owned(),
            message,
        })
    };
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

/// Line, from 1, of the record found from `byte` on. The reader's own count is the line where it began to look, before
/// any blank lines.
fn line_of(content: &[u8], byte: u64) -> u64 {
    let (before, after) = content.split_at((byte as usize).min(content.len()));
    let blank = after.iter().take_while(|byte| byte.is_ascii_whitespace());
    let newlines = before.iter().chain(blank).filter(|byte| **byte == b'\n');
    newlines.count() as u64 + 1
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

/// Number of classes when all from 0 to the highest occur.
fn count_classes(path: &Path, classes: &[u64]) -> Result<usize, DataError> {
    let mut sorted = classes.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let gap = sorted
        .iter()
        .zip(0u64..)
        .find(|(class, position)| *class != position);
    match (gap, sorted.last()) {
        (Some((_, missing)), Some(&last)) => Err(DataError::ClassGap {
            path: path.to_owned(),
            missing,
            last,
        }),
        _ => Ok(sorted.len()),
    }
}

fn load_folder(path: &Path) -> Result<Images, DataError> {
    let classes = class_folders(path)?;
    let mut files = Vec::new();
    let mut labels: Vec<u32> = Vec::new();
    for (label, (_, folder)) in classes.iter().enumerate() {
        let pictures: Vec<PathBuf> = entries(folder)?
            .into_iter()
            .filter(|file| {
                file.extension()
                    .is_some_and(|ext| ext.eq_ignore_ascii_case("png"))
            })
            .collect();
        if pictures.is_empty() {
            return Err(DataError::Empty {
                path: folder.clone(),
                expected: "PNG files",
            });
        }
        labels.resize(labels.len() + pictures.len(), label as u32);
        files.extend(pictures);
    }

    // Serial on purpose for the first: its shape is what the others are compared with.
    let first = read_picture(&files[0])?;
    let (channels, height, width) = first.shape;
    let rest: Vec<Vec<f32>> = files
        .par_iter()
        .map(|file| {
            let picture = read_picture(file)?;
            if picture.shape == first.shape {
                return Ok(picture.pixels);
            }
            let message = format!(
                "expected {} like {}, found {}",
                describe(first.shape),
                files[0].display(),
                describe(picture.shape)
            );
            Err(DataError::Picture {
                path: file.clone(),
                message,
            })
        })
        .collect::<Result<_, _>>()?;
    let names: Vec<String> = classes.into_iter().map(|(name, _)| name).collect();
    Ok(Images {
        channels,
        height,
        width,
        pixels: rest.concat(),
        labels,
        classes: names.len(),
        names,
    })
}

/// Directories of the classes in the order of their numbers.
fn class_folders(path: &Path) -> Result<Vec<(String, PathBuf)>, DataError> {
    let mut folders = BTreeMap::new();
    for entry in entries(path)?.into_iter().filter(|entry| entry.is_dir()) {
        let name = entry
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        folders.insert(name, entry);
    }
    if folders.is_empty() {
        let expected = "one directory of PNG files per class";
        return Err(DataError::Empty {
            path: path.to_owned(),
            expected,
        });
    }
    let numbers: Option<Vec<u64>> = folders.keys().map(|name| name.parse().ok()).collect();
    let mut folders: Vec<_> = folders.into_iter().collect();
    if let Some(numbers) = numbers
        && count_classes(path, &numbers)? == folders.len()
    {
        folders.sort_by_key(|(name, _)| name.parse().unwrap_or(u64::MAX));
    }
    Ok(folders)
}

/// Entries of a folder, hidden ones left out, sorted: the order never depends on the file system.
fn entries(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let listing = std::fs::read_dir(path).map_err(|source| read_error(path, "folder", source))?;
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry.map_err(|source| read_error(path, "folder", source))?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

struct Picture {
    /// Channels, height, width.
    shape: (usize, usize, usize),
    pixels: Vec<f32>,
}

fn read_picture(path: &Path) -> Result<Picture, DataError> {
    let mut reader = ImageReader::open(path).map_err(|source| read_error(path, "file", source))?;
    reader.set_format(ImageFormat::Png);
    let fault = |message: String| DataError::Picture {
        path: path.to_owned(),
        message,
    };
    let image = reader.decode().map_err(|error| match error {
        ImageError::IoError(source) => read_error(path, "file", source),
        other => fault(format!("expected a PNG file: {other}")),
    })?;
    let (channels, values): (usize, Vec<f32>) = match &image {
        DynamicImage::ImageLuma8(image) => (1, unit_values(image.as_raw(), u8::MAX)),
        DynamicImage::ImageRgb8(image) => (3, unit_values(image.as_raw(), u8::MAX)),
        DynamicImage::ImageLuma16(image) => (1, unit_values(image.as_raw(), u16::MAX)),
        DynamicImage::ImageRgb16(image) => (3, unit_values(image.as_raw(), u16::MAX)),
        other => {
            return Err(fault(format!(
                "expected a grey or RGB image without transparency, found {:?}",
                other.color()
            )));
        }
    };
    let (height, width) = (image.height() as usize, image.width() as usize);
    let mut pixels = Vec::with_capacity(values.len()); // (c, h, w) from (h, w, c)
    for channel in 0..channels {
        pixels.extend(values.iter().skip(channel).step_by(channels));
    }
    Ok(Picture {
        shape: (channels, height, width),
        pixels,
    })
}

/// Samples in [-1, 1].
fn unit_values<T: Copy + Into<f32>>(samples: &[T], max: T) -> Vec<f32> {
    samples
        .iter()
        .map(|&sample| sample.into() / max.into() * 2.0 - 1.0)
        .collect()
}

fn describe((channels, height, width): (usize, usize, usize)) -> String {
    let kind = if channels == 1 { "a grey" } else { "an RGB" };
    format!("{kind} image of {height} x {width}")
}

fn read_error(path: &Path, what: &'static str, source: io::Error) -> DataError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => DataError::Missing { path, what },
        _ => DataError::Read { path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn csv(text: &[u8], options: DataOptions) -> Result<Images, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.csv"), text).unwrap();
        let options = DataOptions {
            csv: Some("a.csv".into()),
            ..options
        };
        load(&options, dir.path()).map_err(|error| {
            error
                .to_string()
                .replace(&format!("{}/", dir.path().display()), "")
        })
    }

    fn max16() -> DataOptions {
        DataOptions {
            max: Some(16.0),
            ..DataOptions::default()
        }
    }

    fn check(text: &str, options: DataOptions, expected: &str) {
        assert_eq!(
            csv(text.as_bytes(), options).unwrap_err(),
            expected,
            "{text:?}"
        );
    }

    #[test]
    fn a_csv_is_read() {
        let images = csv(b"0,16,8,4,1\n16,16,0,0,0\n\n", max16()).unwrap();
        assert_eq!(
            (images.channels, images.height, images.width, images.classes),
            (1, 2, 2, 2)
        );
        assert_eq!(images.pixels, [-1.0, 1.0, 0.0, -0.5, 1.0, 1.0, -1.0, -1.0]);
        assert_eq!(images.labels, [1, 0]);
        assert_eq!(images.gather(&[1, 0, 1]).1, [0, 1, 0]);
        assert_eq!(images.gather(&[1]).0, [1.0, 1.0, -1.0, -1.0]);
        let wide = DataOptions {
            height: Some(1),
            header: true,
            ..DataOptions::default()
        };
        let images = csv(b"a,b,class\n 2, 4 ,0\n1,0,0", wide).unwrap();
        assert_eq!((images.height, images.width), (1, 2));
        assert_eq!(images.pixels, [0.0, 1.0, -0.5, -1.0]);
    }

    #[test]
    fn csv_faults_are_named() {
        check(
            "",
            max16(),
            "a.csv: expected lines of grey values and a class, found none",
        );
        check(
            "0,0,0,0,0\n0,0,x,0,0",
            max16(),
            "a.csv:2: column 3: expected a number, found `x`",
        );
        check(
            "a,b,c,d,e\n",
            max16(),
            "a.csv:1: column 1: expected a number (if the first line holds column names, say `header: true`), found `a`",
        );
        check(
            "0,0,0,0,0\n0,nan,0,0,0",
            max16(),
            "a.csv:2: column 2: expected a number, found `nan`",
        );
        check(
            "0,0,0,0,0\n0,,0,0,0",
            max16(),
            "a.csv:2: column 2: expected a number, found nothing",
        );
        check(
            "0,0,0,0,0\r\n\r\n0,17,0,0,0",
            max16(),
            "a.csv:3: column 2: expected a grey value from 0 to 16 (`max`), found `17`",
        );
        check(
            "0,-1,0,0,0",
            DataOptions::default(),
            "a.csv:1: column 2: expected a grey value of at least 0, found `-1`",
        );
        for (row, found) in [("0,0,0,0", 4), ("0,0,0,0,0,0", 6)] {
            let expected = format!(
                "a.csv:2: expected 5 (2 x 2 grey values and the class) columns, found {found}"
            );
            check(&format!("0,0,0,0,0\n{row}\n"), max16(), &expected);
        }
        for class in ["1.5", "-1", "four", ""] {
            let error = csv(format!("0,0,0,0,{class}").as_bytes(), max16()).unwrap_err();
            assert!(
                error.starts_with("a.csv:1: column 5: expected a class"),
                "{error}"
            );
        }
        check(
            "0,0,0,0,0\n0,0,0,0,2",
            max16(),
            "a.csv: class 1 has no image, though classes go up to 2; number them 0, 1, 2, ...",
        );
        check(
            "0,0,0,0,4000000000",
            max16(),
            "a.csv: class 0 has no image, though classes go up to 4000000000; number them 0, 1, 2, ...",
        );
        check(
            "0,0,0,0\n",
            max16(),
            "a.csv: the first line has 4 columns, that is 3 grey values and the class; \
             3 is no square, so give `height` and `width`",
        );
        let tall = DataOptions {
            height: Some(3),
            ..max16()
        };
        check(
            "0,0,0,0,0\n",
            tall,
            "a.csv: the first line has 5 columns, that is 4 grey values and the class; \
             4 is no multiple of 3, the given side",
        );
        let error = csv(b"0,0,0,0,0\n0,\xff\xfe,0,0,0", max16()).unwrap_err();
        assert!(
            error.starts_with("a.csv:2: column 2: expected a number"),
            "{error}"
        );
    }

    #[test]
    fn sources_are_checked() {
        let none = DataOptions::default();
        assert!(
            load(&none, Path::new("."))
                .unwrap_err()
                .to_string()
                .contains("`csv: FILE`")
        );
        let both = DataOptions {
            csv: Some("a".into()),
            folder: Some("b".into()),
            ..none.clone()
        };
        assert!(
            load(&both, Path::new("."))
                .unwrap_err()
                .to_string()
                .contains("exclude")
        );
        let missing = DataOptions {
            csv: Some("no/such.csv".into()),
            ..none
        };
        let error = load(&missing, Path::new("/base")).unwrap_err();
        assert_eq!(error.to_string(), "/base/no/such.csv: no such file");
        assert_eq!(Failure::from(error).code, FailureCode::MissingInput);
    }

    #[test]
    fn a_split_is_stratified_and_repeatable() {
        let labels: Vec<u32> = (0..103).map(|i| i % 10).chain([10]).collect();
        let images = Images {
            channels: 1,
            height: 1,
            width: 1,
            pixels: vec![0.0; labels.len()],
            labels,
            classes: 11,
            names: Vec::new(),
        };
        let (train, held) = images.split(0.2, 7);
        assert_eq!((train.len(), held.len()), (84, 20));
        for class in 0..10 {
            assert_eq!(
                held.iter().filter(|&&i| images.labels[i] == class).count(),
                2
            );
        }
        assert!(
            train.contains(&103),
            "a class of one image stays in training"
        );
        let mut all = [train, held.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..104).collect::<Vec<_>>());
        assert_eq!(images.split(0.2, 7).1, held);
        assert_ne!(images.split(0.2, 8).1, held);
        assert!(images.split(0.0, 7).1.is_empty());
    }

    #[test]
    fn a_folder_is_read_by_class() {
        let dir = tempfile::tempdir().unwrap();
        let save = |name: &str, image: DynamicImage| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            image.save(path).unwrap();
        };
        let grey = |value| image::GrayImage::from_pixel(3, 2, image::Luma([value])).into();
        for class in 0..11u8 {
            save(&format!("grey/{class}/a.png"), grey(class));
        }
        let options = |folder: &str| DataOptions {
            folder: Some(folder.into()),
            ..DataOptions::default()
        };
        let images = load(&options("grey"), dir.path()).unwrap();
        assert_eq!((images.height, images.width, images.classes), (2, 3, 11));
        assert_eq!(
            images.image(10)[0],
            10.0 / 255.0 * 2.0 - 1.0,
            "10 comes after 9"
        );

        let mut rgb = image::RgbImage::from_pixel(1, 2, image::Rgb([255, 0, 0]));
        rgb.put_pixel(0, 1, image::Rgb([0, 255, 0]));
        save("rgb/dog/a.png", rgb.into());
        let images = load(&options("rgb"), dir.path()).unwrap();
        assert_eq!(images.pixels, [1.0, -1.0, -1.0, 1.0, -1.0, -1.0]); // (c, h, w)
        assert_eq!(images.names, ["dog"]);

        save("rgb/elk/b.png", grey(1));
        let error = load(&options("rgb"), dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("elk/b.png: expected an RGB image of 2 x 1 like"),
            "{error}"
        );
        assert!(error.ends_with("found a grey image of 2 x 3"), "{error}");
        std::fs::write(dir.path().join("rgb/elk/b.png"), "no picture").unwrap();
        let error = load(&options("rgb"), dir.path()).unwrap_err().to_string();
        assert!(error.contains("elk/b.png: expected a PNG file"), "{error}");
        std::fs::remove_file(dir.path().join("rgb/elk/b.png")).unwrap();
        let error = load(&options("rgb"), dir.path()).unwrap_err().to_string();
        assert!(
            error.ends_with("elk: expected PNG files, found none"),
            "{error}"
        );
        std::fs::rename(dir.path().join("grey/4"), dir.path().join("grey/12")).unwrap();
        let error = load(&options("grey"), dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("class 4 has no image, though classes go up to 12"),
            "{error}"
        );
    }

    #[test]
    fn the_schema_marks_paths_and_closes_the_object() {
        let schema = schemars::schema_for!(DataOptions).to_value();
        assert_eq!(schema["properties"]["csv"]["x-retort-file"], "file");
        assert_eq!(schema["properties"]["folder"]["x-retort-file"], "dir");
        assert_eq!(schema["additionalProperties"], false);
        assert_eq!(schema["properties"]["header"]["default"], false);
        assert!(schema["properties"]["csv"].get("default").is_none());
    }
}
