//! Images in NumPy's files: an archive of images and labels, or an array of each.

use std::collections::BTreeSet;
use std::path::Path;

use super::class;
use super::error::DataError;
use super::file;
use super::options::DataOptions;
use super::raster::Raster;
use crate::numpy::{Archive, Form, Stream};

/// Names under which archives hold images, and labels.
const IMAGES: [&str; 8] = [
    "images",
    "image",
    "x_train",
    "train_images",
    "X",
    "x",
    "data",
    "arr_0",
];
const LABELS: [&str; 9] = [
    "labels",
    "label",
    "y_train",
    "train_labels",
    "Y",
    "y",
    "targets",
    "target",
    "arr_1",
];

/// The most images with labels: all labels are in memory.
const MOST_LABELS: usize = 1 << 26;

/// Values unpacked at a time, before they are converted to bytes.
const PIECE: usize = 1 << 16;

/// Images in a file, read from the first to the last.
pub struct Arrays {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// 1 or 3.
    pub channels: usize,
    /// Class of each image; empty if none are given.
    pub labels: Vec<u32>,
    /// Number of images.
    pub count: usize,
    /// Whether channels come first: (n, c, h, w).
    planes: bool,
    /// The value of white, if values are not bytes.
    white: Option<f64>,
    stream: Stream,
    path: std::path::PathBuf,
    done: usize,
}

impl Arrays {
    /// Opens a file; `labels` is the path of another one with the classes.
    pub fn open(
        options: &DataOptions,
        path: &Path,
        labels: Option<&Path>,
    ) -> Result<Self, DataError> {
        for path in [Some(path), labels].into_iter().flatten() {
            file::open(path, "a `.npz` or `.npy` file")?;
        }
        let (stream, mut given) = streams(path, labels)?;
        let shape = stream.shape();
        let (height, width, channels, planes) = geometry(path, shape)?;
        let count = shape[0];
        let white = white_value(options, path, stream.kind())?;
        let labels = match &mut given {
            Some(stream) => read_labels(stream, labels.unwrap_or(path), count)?,
            None => Vec::new(),
        };
        Ok(Self {
            height,
            width,
            channels,
            labels,
            count,
            planes,
            white,
            stream,
            path: path.to_owned(),
            done: 0,
        })
    }

    /// The next image.
    pub fn read(&mut self) -> Result<Raster, DataError> {
        let fault = |message: String| DataError::content(&self.path, message);
        let (area, channels) = (self.height * self.width, self.channels);
        let number = self.done;
        let byte = |value: f64, white: f64| match value {
            x if (0.0..=white).contains(&x) => Ok((x / white * 255.0).round() as u8),
            x => Err(format!(
                "image {number}: expected values from 0 to {white}, found {x}"
            )),
        };
        let mut pixels = vec![0; area * channels];
        let mut done = 0;
        while done < pixels.len() {
            // Not beyond a plane: its values are put where their pixels are.
            let count = PIECE.min(area - done % area);
            let bytes = match self.white {
                None => self.stream.read_bytes(count),
                Some(white) => pieces(&mut self.stream, count, |value| byte(value, white)),
            };
            let bytes = bytes.map_err(fault)?;
            if self.planes {
                let first = done % area * channels + done / area;
                let places = pixels[first..].iter_mut().step_by(channels);
                places.zip(bytes).for_each(|(place, byte)| *place = byte);
            } else {
                pixels[done..done + count].copy_from_slice(&bytes);
            }
            done += count;
        }
        self.done += 1;
        Ok(Raster {
            height: self.height,
            width: self.width,
            channels: self.channels,
            pixels,
        })
    }
}

/// The arrays of images and, where there is one, of labels.
fn streams(path: &Path, labels: Option<&Path>) -> Result<(Stream, Option<Stream>), DataError> {
    // The file is at fault, not an option.
    let engine = |error: crate::Error| match error {
        crate::Error::Data { path, message } => DataError::Content { path, message },
        crate::Error::Io { path, source } => DataError::read(&path, "file", source),
        error => DataError::Options(error.to_string()),
    };
    let is_archive = Form::of(path).map_err(engine)? == Form::Archive;
    let separate = labels.map(Stream::open).transpose().map_err(engine);
    if !is_archive {
        return Ok((Stream::open(path).map_err(engine)?, separate?));
    }
    let file = Archive::open(path).map_err(engine)?;
    let names = file.names();
    let find = |known: &[&str]| {
        let name = known.iter().find(|name| names.iter().any(|n| n == *name));
        name.map(|name| (*name).to_owned())
    };
    let Some(images) = find(&IMAGES) else {
        let shown: Vec<_> = names.iter().take(8).collect();
        let message = format!(
            "expected an array named `images` (or {}), found {shown:?}",
            IMAGES[1..].join(", ")
        );
        return Err(DataError::content(path, message));
    };
    let inside = match find(&LABELS) {
        Some(name) if labels.is_none() => Some(file.stream(&name).map_err(engine)?),
        _ => None,
    };
    Ok((file.stream(&images).map_err(engine)?, separate?.or(inside)))
}

/// Height, width and channels of images, and whether channels come first.
fn geometry(path: &Path, shape: &[usize]) -> Result<(usize, usize, usize, bool), DataError> {
    let (height, width, channels, planes) = match *shape {
        [_, h, w] => (h, w, 1, false),
        [_, h, w, c] if matches!(c, 1 | 3) => (h, w, c, false),
        [_, c, h, w] if matches!(c, 1 | 3) => (h, w, c, true),
        _ => {
            let message = format!(
                "images of shape {shape:?}; expected (n, height, width), or 1 or 3 channels last or first"
            );
            return Err(DataError::content(path, message));
        }
    };
    if shape.contains(&0) {
        return Err(DataError::Empty {
            path: path.to_owned(),
            expected: "images",
            found: format!("an array of shape {shape:?}"),
        });
    }
    if height > 8192 || width > 8192 {
        let message = format!("images of {height} x {width}; sides go up to 8192");
        return Err(DataError::content(path, message));
    }
    Ok((height, width, channels, planes))
}

/// The value of white, if values are not bytes.
fn white_value(options: &DataOptions, path: &Path, kind: &str) -> Result<Option<f64>, DataError> {
    match (kind, options.max) {
        ("u1", None) => Ok(None),
        ("b1", _) => Ok(Some(1.0)),
        (_, Some(max)) => Ok(Some(f64::from(max))),
        (kind, None) => {
            let message =
                format!("images of type {kind}; say which value is white: `max: 1`, `max: 255`");
            Err(DataError::content(path, message))
        }
    }
}

/// The converted next `count` elements. They are read in pieces, because each takes eight bytes or more before conversion.
fn pieces<T>(
    stream: &mut Stream,
    count: usize,
    mut each: impl FnMut(f64) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    let mut out = Vec::new();
    while out.len() < count {
        for value in stream.read(PIECE.min(count - out.len()))? {
            out.push(each(value)?);
        }
    }
    Ok(out)
}

/// The class of each of `count` images.
fn read_labels(stream: &mut Stream, path: &Path, count: usize) -> Result<Vec<u32>, DataError> {
    let fault = |message: String| DataError::content(path, message);
    let shape = stream.shape();
    if shape.iter().product::<usize>() != count {
        return Err(fault(format!(
            "labels of shape {shape:?} for {count} images"
        )));
    }
    if count > MOST_LABELS {
        return Err(fault(format!(
            "labels of {count} images, expected at most {MOST_LABELS}"
        )));
    }
    let (mut index, mut found) = (0, BTreeSet::new());
    let whole = |value: f64| match value {
        x if x >= 0.0 && x.fract() == 0.0 && x <= f64::from(u32::MAX) => {
            index += 1;
            if found.insert(x as u32) {
                class::within(found.len())?;
            }
            Ok(x as u32)
        }
        x => Err(format!(
            "label {x} of image {index}: expected a class (an integer from 0)"
        )),
    };
    let labels = pieces(stream, count, whole).map_err(fault)?;
    class::contiguous(path, found.into_iter().map(u64::from))?;
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use retort_abi::{Failure, FailureCode};

    use super::*;

    /// Of the file, once, and not also of an option: the runner would mark that in the recipe.
    #[test]
    fn an_array_of_another_kind_is_a_fault_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npy");
        let check = |file: Vec<u8>, expected: &str| {
            std::fs::write(&path, file).unwrap();
            let opened = Arrays::open(&DataOptions::default(), &path, None);
            let failure = Failure::from(opened.err().expect("an error"));
            assert_eq!(failure.code, FailureCode::BadData);
            let whole = format!("{}: {expected}", path.display());
            assert!(failure.message.starts_with(&whole), "{}", failure.message);
        };
        let mut fortran = crate::numpy::header("|u1", &[2, 2, 2]);
        let place = fortran.windows(5).position(|five| five == b"False");
        let place = place.expect("the order");
        fortran[place..place + 5].copy_from_slice(b"True ");
        check(fortran, "an array in Fortran order, expected C order");
        let texts = crate::numpy::header("<U3", &[2]);
        check(texts, "type <U3, expected floats or integers");
        check(b"PAR1".to_vec(), "");
    }
}
