//! Where a stage keeps the images of a source: small sets in memory, larger ones in files of its work directory.
//!
//! The files are written once, in the format of the `images` stage, so memory does not grow with the number of images. All
//! parts of the stage and later attempts read them; they are removed with the work directory.

use std::fs::File;
use std::path::{Path, PathBuf};

use retort_abi::{Cancel, Host, LogLevel};

use super::Images;
use super::content::Damaged;
use super::options::DataOptions;
use super::prepared::{self, Prepared};
use super::source::Source;
use crate::error::Result;
use crate::files::replace_dir;
use crate::memory::gigabytes;

/// The most bytes of images that are held in memory.
const HELD: u64 = 16 << 20;
/// More bytes than this in a stage's own files give a warning.
const MUCH: u64 = 2 << 30;

/// Name of the folder in a work directory.
pub const FOLDER: &str = "images";

/// Where a stage reads its images from, and where it keeps them.
pub struct Place<'a> {
    /// Services of the host.
    pub host: &'a dyn Host,
    /// Relative paths start from here.
    pub base_dir: &'a Path,
    /// The folder for large sets: complete, or absent.
    pub folder: Option<PathBuf>,
    /// Waits until no other part of the stage writes that folder; the file is a lock.
    pub turn: &'a dyn Fn() -> Result<Option<File>>,
}

impl Place<'_> {
    /// Reads a source. `accept` gets the number of images before any is decoded, which may take hours.
    pub fn read(
        &self,
        options: &DataOptions,
        accept: impl FnOnce(usize) -> Result<()>,
    ) -> Result<Images> {
        if let Some(images) = self.kept() {
            accept(images.len())?;
            return Ok(images);
        }
        let source = Source::open(options, self.base_dir)?;
        for (level, message) in &source.notices {
            self.host.log(*level, message);
        }
        self.host.log(LogLevel::Info, &source.summary());
        accept(source.count())?;
        match &self.folder {
            Some(folder) if source.bytes() > HELD => self.write(source, folder),
            _ => {
                let total = source.count() as u64;
                let (images, damaged) =
                    Images::read(source, &mut |done| self.goes_on(done, total))?;
                self.tell(&damaged);
                Ok(images)
            }
        }
    }

    /// The images in the folder, if they have been written.
    fn kept(&self) -> Option<Images> {
        let folder = self.folder.as_ref().filter(|folder| folder.exists())?;
        Prepared::open(folder).ok().map(Images::of)
    }

    fn write(&self, source: Source, folder: &Path) -> Result<Images> {
        let _turn = (self.turn)()?;
        if let Some(images) = self.kept() {
            return Ok(images);
        }
        let (total, bytes) = (source.count() as u64, source.bytes());
        let level = match bytes > MUCH {
            true => LogLevel::Warn,
            false => LogLevel::Info,
        };
        let message = format!(
            "{total} images take {} of the work directory until this stage has ended; an `images` stage writes them once \
             for all stages",
            gigabytes(bytes)
        );
        self.host.log(level, &message);
        let (_, damaged) = replace_dir(folder, |partial| {
            prepared::write(source, partial, &mut |done| self.goes_on(done, total))
        })?;
        self.tell(&damaged);
        Ok(Images::of(Prepared::open(folder)?))
    }

    /// Reports progress; returns whether to go on.
    fn goes_on(&self, done: u64, total: u64) -> bool {
        self.host.progress(done, total, "images read");
        self.host.cancelled() == Cancel::Run
    }

    fn tell(&self, damaged: &[Damaged]) {
        if let [first, ..] = damaged {
            let message = format!(
                "{} damaged images were left out ({}: {}, ...)",
                damaged.len(),
                first.name,
                first.why
            );
            self.host.log(LogLevel::Warn, &message);
        }
    }
}
