//! Prepared images: the artifact of the `images` stage, which other stages also write into their work directories
//! (`cache.rs`).
//!
//! `images.json` describes them; `images-00000.npy`, ... hold the bytes, (n, height, width, channels), `labels.npy` the
//! classes; `manifest.jsonl` has a row for each source file: its image's number, class and caption, or why it was left out.
//! Images are read from their files one by one, so memory holds only labels.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use retort_checkpoint::{json, regular};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::content::Damaged;
use super::options::Sizing;
use super::source::{Image, Source};
use crate::error::{Error, Result};
use crate::numpy::{self, Rows};

/// What `images.json` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Version of this layout: 1.
    pub format: u32,
    /// Number of images.
    pub count: usize,
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// The value of white.
    pub white: f32,
    /// Name of each class.
    pub classes: Vec<String>,
    /// Images in each file but the last.
    pub shard: usize,
    /// Damaged files that were left out.
    pub damaged: usize,
    /// How the images were brought to their size, if they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sizing: Option<Sizing>,
}

impl Description {
    /// The description of a source's images before any has been written.
    pub(super) fn of(source: &Source) -> Self {
        Self {
            format: 1,
            count: 0,
            channels: source.channels,
            height: source.height,
            width: source.width,
            white: source.white,
            classes: source.names.clone(),
            shard: 0,
            damaged: 0,
            sizing: source.sizing,
        }
    }

    /// Header of a file of so many images.
    fn header(&self, count: usize) -> Vec<u8> {
        numpy::header("|u1", &[count, self.height, self.width, self.channels])
    }
}

/// The most bytes of a file: a million images need so few files that all can be open.
const SHARD_BYTES: usize = 1 << 30;

const DESCRIPTION: &str = "images.json";
/// Bytes of the longest description that is read: enough for many classes with long names.
const LONGEST_DESCRIPTION: u64 = 64 << 20;
const LABELS: &str = "labels.npy";

fn shard_name(index: usize) -> String {
    format!("images-{index:05}.npy")
}

/// Writes all images of a source into an empty directory; also returns the damaged files that were left out. `parts` contains
/// the images of [`Source::decode_share`]. `progress` returns whether to continue.
pub fn write(
    source: Source,
    dir: &Path,
    parts: Option<&Path>,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<(Description, Vec<Damaged>)> {
    let mut writer = Writer::new(dir, Description::of(&source))?;
    let damaged = source.read_with(parts, progress, &mut |image| writer.push(&image))?;
    Ok((writer.finish(&damaged)?, damaged))
}

/// Writes images one after the other.
pub(super) struct Writer<'a> {
    dir: &'a Path,
    description: Description,
    /// The file at hand.
    shard: Option<BufWriter<File>>,
    labels: Vec<u32>,
    manifest: BufWriter<File>,
    manifest_path: PathBuf,
}

impl<'a> Writer<'a> {
    /// Begins in an empty directory. `description` needs neither numbers of images nor of files.
    pub(super) fn new(dir: &'a Path, description: Description) -> Result<Self> {
        let stride = description.channels * description.height * description.width;
        let manifest_path = dir.join(MANIFEST);
        let manifest = File::create(&manifest_path).map_err(Error::io(&manifest_path))?;
        Ok(Self {
            dir,
            description: Description {
                shard: (SHARD_BYTES / stride).max(1),
                ..description
            },
            shard: None,
            labels: Vec::new(),
            manifest: BufWriter::new(manifest),
            manifest_path,
        })
    }

    /// Appends an image.
    pub(super) fn push(&mut self, image: &Image<'_>) -> Result<()> {
        let mut row =
            json!({ "image": self.labels.len(), "file": image.name, "label": image.label });
        if let Some(caption) = image.caption {
            row["caption"] = caption.into();
        }
        self.row(&row)?;
        let path = self.shard_path();
        let shard = match &mut self.shard {
            Some(shard) => shard,
            None => {
                let mut file = BufWriter::new(File::create(&path).map_err(Error::io(&path))?);
                // A placeholder until the number of images is known; all these headers have the same length.
                file.write_all(&self.description.header(1))
                    .map_err(Error::io(&path))?;
                self.shard.insert(file)
            }
        };
        shard.write_all(image.pixels).map_err(Error::io(&path))?;
        self.labels.push(image.label);
        match self.labels.len().is_multiple_of(self.description.shard) {
            true => self.close(path),
            false => Ok(()),
        }
    }

    fn row(&mut self, row: &serde_json::Value) -> Result<()> {
        writeln!(self.manifest, "{row}").map_err(Error::io(&self.manifest_path))
    }

    /// The file of the next image.
    fn shard_path(&self) -> PathBuf {
        self.dir
            .join(shard_name(self.labels.len() / self.description.shard))
    }

    /// Ends the file at hand.
    fn close(&mut self, path: PathBuf) -> Result<()> {
        let Some(mut shard) = self.shard.take() else {
            return Ok(());
        };
        let count = (self.labels.len() - 1) % self.description.shard + 1;
        let header = self.description.header(count);
        shard
            .seek(SeekFrom::Start(0))
            .and_then(|_| shard.write_all(&header))
            .and_then(|()| shard.flush())
            .map_err(Error::io(&path))
    }

    /// Writes what is left, and the description, which it returns.
    pub(super) fn finish(mut self, damaged: &[Damaged]) -> Result<Description> {
        let path = self.shard_path();
        self.close(path)?;
        for Damaged { name, why } in damaged {
            self.row(&json!({ "file": name, "damaged": why }))?;
        }
        self.manifest
            .flush()
            .map_err(Error::io(&self.manifest_path))?;
        let path = self.dir.join(LABELS);
        let mut bytes = numpy::header("<u4", &[self.labels.len()]);
        bytes.extend(self.labels.iter().flat_map(|label| label.to_le_bytes()));
        std::fs::write(&path, bytes).map_err(Error::io(&path))?;
        let description = Description {
            count: self.labels.len(),
            damaged: damaged.len(),
            ..self.description
        };
        crate::files::write_json(&self.dir.join(DESCRIPTION), &description)?;
        Ok(description)
    }
}

/// The longest line of a manifest that is read: captions end far below it.
const LONGEST_ROW: u64 = 8 << 20;

const MANIFEST: &str = "manifest.jsonl";

/// Prepared images, open to be read.
pub struct Prepared {
    dir: PathBuf,
    /// What they are.
    pub description: Description,
    /// Class of each image.
    pub labels: Vec<u32>,
    files: Vec<Rows>,
}

impl Prepared {
    /// Opens a directory of them.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(DESCRIPTION);
        let text = regular::read(&path, LONGEST_DESCRIPTION).map_err(Error::io(&path))?;
        let d: Description = json::parse(&text).map_err(|e| Error::data(&path, e))?;
        let wrong = |message: &str| Err(Error::data(&path, message));
        if d.format != 1 {
            return wrong("a layout that this version does not know; prepare the images again");
        }
        let sound = matches!(d.channels, 1 | 3)
            && (1..=8192).contains(&d.height)
            && (1..=8192).contains(&d.width);
        if !sound
            || d.count == 0
            || d.shard == 0
            || d.classes.is_empty()
            || d.white.is_nan()
            || d.white <= 0.0
        {
            return wrong("expected images of 1 or 3 channels with classes");
        }
        let labels = dir.join(LABELS);
        let rows = Rows::open(&labels)?;
        if rows.shape() != [d.count] || rows.kind() != "u4" {
            return Err(Error::data(&labels, format!("expected {} labels", d.count)));
        }
        let mut bytes = vec![0; d.count * 4];
        rows.read_bytes(0, &mut bytes)?;
        let (quads, _) = bytes.as_chunks();
        let found: Vec<u32> = quads.iter().map(|quad| u32::from_le_bytes(*quad)).collect();
        if found.iter().any(|label| *label as usize >= d.classes.len()) {
            return Err(Error::data(
                &labels,
                format!("a label beyond {} classes", d.classes.len()),
            ));
        }
        let mut files = Vec::new();
        for index in 0..d.count.div_ceil(d.shard) {
            let path = dir.join(shard_name(index));
            let rows = Rows::open(&path)?;
            let count = d.shard.min(d.count - index * d.shard);
            if rows.shape() != [count, d.height, d.width, d.channels] || rows.kind() != "u1" {
                let message = format!(
                    "expected bytes of {count} images, found shape {:?}",
                    rows.shape()
                );
                return Err(Error::data(&path, message));
            }
            files.push(rows);
        }
        Ok(Self {
            dir: dir.to_owned(),
            description: d,
            labels: found,
            files,
        })
    }

    /// The caption of each image, if the manifest has it.
    pub fn captions(&self) -> Result<Vec<Option<Box<str>>>> {
        let path = self.dir.join(MANIFEST);
        let mut reader = BufReader::new(regular::open(&path).map_err(Error::io(&path))?);
        let (mut captions, mut line) = (vec![None; self.labels.len()], Vec::new());
        loop {
            line.clear();
            let read = (&mut reader).take(LONGEST_ROW).read_until(b'\n', &mut line);
            if read.map_err(Error::io(&path))? == 0 {
                return Ok(captions);
            }
            let row: serde_json::Value = json::parse(&line).map_err(|e| Error::data(&path, e))?;
            let place = row["image"]
                .as_u64()
                .and_then(|at| usize::try_from(at).ok());
            // Files that were left out have none.
            let caption = place.and_then(|at| captions.get_mut(at));
            if let (Some(caption), Some(text)) = (caption, row["caption"].as_str()) {
                *caption = Some(text.into());
            }
        }
    }

    /// Reads one image, (height, width, channels).
    pub fn read(&self, index: usize, bytes: &mut [u8]) -> Result<()> {
        let (file, within) = (
            index / self.description.shard,
            index % self.description.shard,
        );
        self.files[file].read_bytes((within * bytes.len()) as u64, bytes)
    }
}
