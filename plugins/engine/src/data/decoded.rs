//! Images decoded by the parts of a divided stage, in a work directory: a folder for every 1,000 items of a source.
//!
//! `images.npy` holds a row of bytes for each item, (n, height, width, channels); `chunk.json` says which items these are,
//! and which could not be decoded and why; the rows of those are zero. The worker of the whole joins the chunks, and decodes
//! what is missing.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use retort_abi::Part;
use retort_checkpoint::{json, regular};
use serde::{Deserialize, Serialize};

use super::item::Item;
use super::pieces;
use super::raster::Raster;
use crate::error::{Error, Result};
use crate::files::{MakeLock, machine, make_once, remove, write_json};
use crate::numpy::{self, Rows};

/// Items of a chunk.
#[cfg(not(test))]
const ITEMS: usize = 1000;
#[cfg(test)]
const ITEMS: usize = 2;

const IMAGES: &str = "images.npy";
const CONTENTS: &str = "chunk.json";
/// Bytes of the longest such description: all items of a chunk damaged, with a reason for each.
const LONGEST_CONTENTS: u64 = 16 << 20;

/// Takes decoded images, and the number of the first.
pub(super) type ImageSink<'a> = dyn FnMut(usize, Vec<Result<Raster, String>>) -> Result<()> + 'a;

/// The number of each chunk, and its items.
pub(super) fn chunks(count: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    pieces(0..count, ITEMS).enumerate()
}

fn folder(dir: &Path, chunk: usize) -> PathBuf {
    dir.join(format!("decoded-{chunk:06}"))
}

/// Identifies the items of a chunk: a process that cannot read some file would have different items.
fn identity(items: &[Item]) -> String {
    let mut hasher = blake3::Hasher::new();
    for Item { name, location, .. } in items {
        hasher.update(format!("{name:?} {location:?}\n").as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// The description written with the images of a chunk.
#[derive(Serialize, Deserialize)]
struct Contents {
    /// [`identity`] of its items.
    items: String,
    /// The numbers within it of those that could not be decoded, in order, and why.
    damaged: Vec<(usize, String)>,
}

/// Writes chunks, one after the other.
pub(super) struct ChunkWriter<'a> {
    dir: &'a Path,
    /// The directory of the current chunk.
    partial: PathBuf,
    shape: [usize; 3],
    file: Option<BufWriter<File>>,
    written: usize,
    damaged: Vec<(usize, String)>,
}

impl<'a> ChunkWriter<'a> {
    /// The writer of a part, into a work directory, for images of a shape (height, width, channels).
    pub(super) fn new(dir: &'a Path, part: Part, shape: [usize; 3]) -> Self {
        Self {
            dir,
            partial: dir.join(format!("decoding-{}.{}", part.index, machine())),
            shape,
            file: None,
            written: 0,
            damaged: Vec::new(),
        }
    }

    /// Appends the next image of a chunk of these items; the last one completes it.
    pub(super) fn push(
        &mut self,
        chunk: usize,
        items: &[Item],
        image: Result<Raster, String>,
    ) -> Result<()> {
        let [height, width, channels] = self.shape;
        let path = self.partial.join(IMAGES);
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                // Remains of an earlier process of this part.
                remove(&self.partial)?;
                fs::create_dir(&self.partial).map_err(Error::io(&self.partial))?;
                let mut file = BufWriter::new(File::create(&path).map_err(Error::io(&path))?);
                let header = numpy::header("|u1", &[items.len(), height, width, channels]);
                file.write_all(&header).map_err(Error::io(&path))?;
                none.insert(file)
            }
        };
        let pixels = match image {
            Ok(image) => image.pixels,
            Err(why) => {
                self.damaged.push((self.written, why));
                vec![0; height * width * channels]
            }
        };
        file.write_all(&pixels).map_err(Error::io(&path))?;
        self.written += 1;
        if self.written < items.len() {
            return Ok(());
        }
        file.flush().map_err(Error::io(&path))?;
        (self.file, self.written) = (None, 0);
        let contents = Contents {
            items: identity(items),
            damaged: std::mem::take(&mut self.damaged),
        };
        write_json(&self.partial.join(CONTENTS), &contents)?;
        // An existing one is incomplete, or was made from other items.
        let folder = folder(self.dir, chunk);
        remove(&folder)?;
        make_once(&folder, &MakeLock::shared(), |partial| {
            fs::rename(&self.partial, partial).map_err(Error::io(partial))
        })
    }
}

/// An existing chunk.
pub(super) struct DecodedChunk {
    rows: Rows,
    shape: [usize; 3],
    damaged: Vec<(usize, String)>,
}

impl DecodedChunk {
    /// Opens the chunk of these items, each of a shape, if it exists and is complete.
    pub(super) fn open(
        dir: &Path,
        chunk: usize,
        items: &[Item],
        shape: [usize; 3],
    ) -> Option<Self> {
        let folder = folder(dir, chunk);
        let text = regular::read(&folder.join(CONTENTS), LONGEST_CONTENTS).ok()?;
        let contents: Contents = json::parse(&text).ok()?;
        let rows = Rows::open(&folder.join(IMAGES)).ok()?;
        let [height, width, channels] = shape;
        let fits = rows.shape() == [items.len(), height, width, channels] && rows.kind() == "u1";
        let damaged = contents.damaged;
        let ascends = damaged.windows(2).all(|two| two[0].0 < two[1].0);
        (fits && ascends && contents.items == identity(items)).then_some(Self {
            rows,
            shape,
            damaged,
        })
    }

    /// Gives its images in order, so many at a time.
    pub(super) fn read(self, at_once: usize, take: &mut ImageSink<'_>) -> Result<()> {
        let [height, width, channels] = self.shape;
        let stride = height * width * channels;
        let count = self.rows.shape()[0];
        let mut damaged = self.damaged.into_iter().peekable();
        for items in pieces(0..count, at_once) {
            let (first, mut images) = (items.start, Vec::new());
            for item in items {
                if let Some((_, why)) = damaged.next_if(|(number, _)| *number == item) {
                    images.push(Err(why));
                    continue;
                }
                let mut pixels = vec![0; stride];
                self.rows.read_bytes((item * stride) as u64, &mut pixels)?;
                images.push(Ok(Raster {
                    height,
                    width,
                    channels,
                    pixels,
                }));
            }
            take(first, images)?;
        }
        Ok(())
    }
}
