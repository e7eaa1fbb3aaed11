//! Samples as files for people and other tools: PNG grids, single PNGs, and the `.npz` of the ADM evaluation suite
//! (openai/guided-diffusion).
//!
//! In: pixels (n, channels, height, width) in [0, 1], grey or RGB. Values outside are clipped, NaN becomes black.
//! Deliberately absent: reading pictures (data.rs), text in pictures.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use image::{ImageError, Rgb, RgbImage};
use rayon::prelude::*;
use retort_abi::{Failure, FailureCode};

use crate::numpy;

/// Images of one size, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Pixels<'a> {
    values: &'a [f32],
    channels: usize,
    height: usize,
    width: usize,
}

/// Why pictures cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// Sizes that do not match.
    #[error("{0}")]
    Shape(String),
    /// The system refused to write.
    #[error("{}: cannot be written: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl From<PictureError> for Failure {
    fn from(error: PictureError) -> Self {
        let code = match &error {
            PictureError::Shape(_) => FailureCode::Internal,
            PictureError::Write { .. } => FailureCode::Io,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<PictureError> for crate::Error {
    fn from(error: PictureError) -> Self {
        crate::Error::Host(error.into())
    }
}

impl<'a> Pixels<'a> {
    /// Views `values` (n, channels, height, width) as images; channels are 1 or 3.
    pub fn new(
        values: &'a [f32],
        channels: usize,
        height: usize,
        width: usize,
    ) -> Result<Self, PictureError> {
        let stride = channels * height * width;
        if !matches!(channels, 1 | 3) || stride == 0 || !values.len().is_multiple_of(stride) {
            return Err(PictureError::Shape(format!(
                "cannot form images from {} values of {channels} x {height} x {width} with 1 or 3 channels",
                values.len()
            )));
        }
        Ok(Self {
            values,
            channels,
            height,
            width,
        })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.values.len() / (self.channels * self.height * self.width)
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Colour of a pixel; grey is repeated.
    fn rgb(&self, index: usize, y: usize, x: usize) -> [u8; 3] {
        let plane = self.height * self.width;
        let first = index * self.channels * plane + y * self.width + x;
        let byte = |channel: usize| (self.values[first + channel * plane] * 255.0).round() as u8;
        match self.channels {
            1 => [byte(0); 3],
            _ => [byte(0), byte(1), byte(2)],
        }
    }
}

/// Writes a PNG with `sets` side by side. Each set fills `rows` rows of equal length from left to right, top to bottom:
/// row r holds images r n / rows to (r + 1) n / rows. Small images are enlarged without smoothing; thin lines separate
/// images, thicker ones sets. Sets may differ in length, not in the size of their images.
pub fn write_grid(path: &Path, sets: &[Pixels<'_>], rows: usize) -> Result<(), PictureError> {
    save(path, &grid(sets, rows)?)
}

/// Writes each image as a PNG of its own size into `folder`, which must exist, and returns the file names:
/// `000000-7.png` is the image with number 0, of class 7. `first` is the number of the first one.
pub fn write_pngs(
    folder: &Path,
    images: Pixels<'_>,
    labels: &[u32],
    first: u64,
) -> Result<Vec<String>, PictureError> {
    if labels.len() != images.len() {
        let message = format!("{} labels for {} images", labels.len(), images.len());
        return Err(PictureError::Shape(message));
    }
    let write = |(index, label): (usize, &u32)| {
        let name = format!("{:06}-{label}.png", first + index as u64);
        let mut picture = RgbImage::new(images.width as u32, images.height as u32);
        for (x, y, pixel) in picture.enumerate_pixels_mut() {
            *pixel = Rgb(images.rgb(index, y as usize, x as usize));
        }
        save(&folder.join(&name), &picture)?;
        Ok(name)
    };
    labels.par_iter().enumerate().map(write).collect()
}

/// A writer of the ADM evaluation suite's sample file: a NumPy archive whose `arr_0` is uint8 (n, height, width, 3).
pub struct Npz {
    path: PathBuf,
    archive: zip::ZipWriter<BufWriter<File>>,
    /// Height and width.
    size: [usize; 2],
    /// Remaining images.
    left: usize,
}

impl Npz {
    /// Starts a file for this many images.
    pub fn create(path: &Path, count: usize, size: [usize; 2]) -> Result<Self, PictureError> {
        let [height, width] = size;
        let begin = || -> io::Result<_> {
            let mut archive = zip::ZipWriter::new(BufWriter::new(File::create(path)?));
            archive.start_file("arr_0.npy", numpy::stored(count * height * width * 3))?;
            archive.write_all(&numpy::header("|u1", &[count, height, width, 3]))?;
            Ok(archive)
        };
        let archive = begin().map_err(|source| PictureError::Write {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            archive,
            size,
            left: count,
        })
    }

    /// Writes the next images.
    pub fn add(&mut self, images: Pixels<'_>) -> Result<(), PictureError> {
        let fits = [images.height, images.width] == self.size && images.len() <= self.left;
        if !fits {
            let message = "other images than were announced".to_owned();
            return Err(PictureError::Shape(message));
        }
        let mut buffer = Vec::with_capacity(images.height * images.width * 3); // (h, w, 3)
        for index in 0..images.len() {
            buffer.clear();
            for y in 0..images.height {
                for x in 0..images.width {
                    buffer.extend_from_slice(&images.rgb(index, y, x));
                }
            }
            let written = self.archive.write_all(&buffer);
            written.map_err(|source| self.refused(source))?;
        }
        self.left -= images.len();
        Ok(())
    }

    /// Ends the file.
    pub fn finish(self) -> Result<(), PictureError> {
        if self.left > 0 {
            let message = format!("{} images are missing", self.left);
            return Err(PictureError::Shape(message));
        }
        let Self { path, archive, .. } = self;
        let ended = archive.finish().map_err(io::Error::from);
        ended
            .and_then(|mut file| file.flush())
            .map_err(|source| PictureError::Write { path, source })
    }

    fn refused(&self, source: io::Error) -> PictureError {
        PictureError::Write {
            path: self.path.clone(),
            source,
        }
    }
}

/// Sides below this are enlarged by the next whole factor that reaches it.
const VISIBLE: usize = 32;
const LINE: usize = 1;
const SET_LINE: usize = 8;
const LINE_COLOUR: Rgb<u8> = Rgb([64, 64, 72]);

fn grid(sets: &[Pixels<'_>], rows: usize) -> Result<RgbImage, PictureError> {
    let shape = |message: String| Err(PictureError::Shape(message));
    let Some(first) = sets.first() else {
        return shape("a grid needs at least one set".to_owned());
    };
    let (height, width) = (first.height, first.width);
    for set in sets {
        if (set.height, set.width) != (height, width) {
            return shape(format!(
                "a grid needs images of one size, found {height} x {width} and {} x {}",
                set.height, set.width
            ));
        }
        if rows == 0 || set.is_empty() || !set.len().is_multiple_of(rows) {
            return shape(format!(
                "{} images do not fill {rows} rows evenly",
                set.len()
            ));
        }
    }

    let scale = VISIBLE.div_ceil(height.min(width)).max(1);
    let (cell_height, cell_width) = (height * scale + LINE, width * scale + LINE);
    let columns: usize = sets.iter().map(|set| set.len() / rows).sum();
    let total_height = rows * cell_height - LINE;
    let total_width = columns * cell_width - LINE + (sets.len() - 1) * (SET_LINE - LINE);
    let (Ok(image_width), Ok(image_height)) =
        (u32::try_from(total_width), u32::try_from(total_height))
    else {
        return shape(format!(
            "a grid of {total_height} x {total_width} pixels is too large"
        ));
    };

    let mut picture = RgbImage::from_pixel(image_width, image_height, LINE_COLOUR);
    let mut left = 0;
    for set in sets {
        let columns = set.len() / rows;
        for index in 0..set.len() {
            let top = index / columns * cell_height;
            let left = left + index % columns * cell_width;
            for y in 0..height * scale {
                for x in 0..width * scale {
                    let colour = Rgb(set.rgb(index, y / scale, x / scale));
                    picture.put_pixel((left + x) as u32, (top + y) as u32, colour);
                }
            }
        }
        left += columns * cell_width - LINE + SET_LINE;
    }
    Ok(picture)
}

fn save(path: &Path, picture: &RgbImage) -> Result<(), PictureError> {
    picture
        .save_with_format(path, image::ImageFormat::Png)
        .map_err(|error| {
            let source = match error {
                ImageError::IoError(source) => source,
                other => io::Error::other(other),
            };
            PictureError::Write {
                path: path.to_owned(),
                source,
            }
        })
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn read(path: &Path) -> RgbImage {
        image::open(path).unwrap().to_rgb8()
    }

    fn write_npz(path: &Path, images: Pixels<'_>) -> Result<(), PictureError> {
        let mut file = Npz::create(path, images.len(), [images.height, images.width])?;
        file.add(images)?;
        file.finish()
    }

    #[test]
    fn a_grid_shows_sets_side_by_side() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("grid.png");
        let grey = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
            .map(|value| [value; 16 * 16])
            .concat();
        let mut red = vec![0.0; 2 * 3 * 16 * 16];
        red[..16 * 16].fill(2.0); // clipped
        red[4 * 16 * 16] = f32::NAN;
        let sets = [
            Pixels::new(&grey, 1, 16, 16).unwrap(),
            Pixels::new(&red, 3, 16, 16).unwrap(),
        ];
        write_grid(&path, &sets, 2).unwrap();
        let picture = read(&path);
        // 3 + 1 columns of 32, two lines of 1 within the first set, one of 8 between the sets.
        assert_eq!(picture.dimensions(), (4 * 32 + 2 + 8, 2 * 32 + 1));
        let at = |x, y| picture.get_pixel(x, y).0;
        assert_eq!(
            [at(0, 0), at(33, 31), at(66, 0)],
            [[0; 3], [51; 3], [102; 3]]
        );
        assert_eq!([at(0, 33), at(97, 64)], [[153; 3], [255; 3]]);
        assert_eq!(
            [at(32, 0), at(0, 32), at(98, 0), at(105, 0)],
            [LINE_COLOUR.0; 4]
        );
        assert_eq!(
            [at(106, 0), at(137, 31), at(106, 33)],
            [[255, 0, 0], [255, 0, 0], [0; 3]]
        );
    }

    #[test]
    fn single_pictures_keep_size_and_class() {
        let dir = tempfile::tempdir().unwrap();
        let values: Vec<f32> = (0..12).map(|value| value as f32 / 51.0).collect();
        let images = Pixels::new(&values, 1, 2, 3).unwrap();
        let names = write_pngs(dir.path(), images, &[7, 10], 40).unwrap();
        assert_eq!(names, ["000040-7.png", "000041-10.png"]);
        let picture = read(&dir.path().join("000041-10.png"));
        assert_eq!(picture.dimensions(), (3, 2));
        assert_eq!(picture.get_pixel(2, 1).0, [55; 3]);
        assert!(write_pngs(dir.path(), images, &[7], 0).is_err());
    }

    #[test]
    fn an_npz_holds_bytes_in_numpy_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.npz");
        let values: Vec<f32> = (0..12).map(|value| value as f32 / 255.0).collect();
        write_npz(&path, Pixels::new(&values, 3, 2, 2).unwrap()).unwrap();
        let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
        let mut bytes = Vec::new();
        archive
            .by_name("arr_0.npy")
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        assert_eq!(bytes.len(), 128 + 12);
        assert_eq!(&bytes[..10], b"\x93NUMPY\x01\x00\x76\x00");
        assert!(
            bytes[10..]
                .starts_with(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 2, 3), } ")
        );
        assert_eq!(bytes[127], b'\n');
        assert_eq!(bytes[128..], [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]);

        write_npz(&path, Pixels::new(&values, 1, 2, 2).unwrap()).unwrap();
        let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
        let mut bytes = Vec::new();
        archive
            .by_index(0)
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        assert!(
            bytes.ends_with(&[10, 10, 10, 11, 11, 11]),
            "grey is repeated"
        );
        assert_eq!(bytes.len(), 128 + 36);
    }

    #[test]
    fn misfits_are_refused() {
        assert!(Pixels::new(&[0.0; 5], 1, 2, 2).is_err());
        assert!(Pixels::new(&[0.0; 8], 2, 2, 2).is_err());
        let images = Pixels::new(&[0.0; 12], 1, 2, 2).unwrap();
        for (sets, rows, expected) in [
            (&[][..], 1, "a grid needs at least one set"),
            (&[images], 2, "3 images do not fill 2 rows evenly"),
            (&[images], 0, "3 images do not fill 0 rows evenly"),
        ] {
            assert_eq!(grid(sets, rows).unwrap_err().to_string(), expected);
        }
        let missing = write_npz(Path::new("/no/such/folder/a.npz"), images).unwrap_err();
        assert!(
            missing
                .to_string()
                .starts_with("/no/such/folder/a.npz: cannot be written")
        );
    }
}
