//! How a stage keeps the images of a source: small sets in memory, larger ones in files of its work directory.
//!
//! The files are written once, in the format of the `images` stage, so memory does not grow with the number of images. All
//! parts of the stage and later attempts read them; they are removed with the work directory.

use std::path::{Path, PathBuf};

use retort_abi::{Cancel, Host, LogLevel};

use super::Images;
use super::content::Damaged;
use super::options::DataOptions;
use super::prepared::{self, Prepared};
use super::source::Source;
use crate::error::{Error, Result};
use crate::files::{MakeLock, make_once, read_or_remove};
use crate::memory::gigabytes;

/// The most bytes of images in memory.
const HELD: u64 = 16 << 20;
/// A stage whose own files exceed this many bytes logs a warning.
const MUCH: u64 = 2 << 30;

/// The units of progress while headers are read, and then images.
pub const LOOKED_AT: &str = "headers read";
const READ: &str = "images read";

/// Name of the folder in a work directory.
pub const FOLDER: &str = "images";

/// Where a stage reads its images from, and where it keeps them.
pub struct ImageCache<'a> {
    /// Services of the host.
    pub host: &'a dyn Host,
    /// Relative paths start from here.
    pub base_dir: &'a Path,
    /// The folder for large sets: complete, or absent.
    pub folder: Option<PathBuf>,
    /// Keeps other parts of the stage on this machine from writing that folder.
    pub lock: &'a dyn Fn() -> Result<MakeLock>,
}

impl ImageCache<'_> {
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
        let source = Source::open(options, self.base_dir, &mut |done, total| {
            self.goes_on(done, total, LOOKED_AT)
        })?;
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
                    Images::read(source, &mut |done| self.goes_on(done, total, READ))?;
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
        let lock = (self.lock)()?;
        if let Some(images) = read_or_remove(folder, || self.kept())? {
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
        let (_, damaged) = make_once(folder, &lock, |partial| {
            std::fs::create_dir(partial).map_err(Error::io(partial))?;
            prepared::write(source, partial, None, &mut |done| {
                self.goes_on(done, total, READ)
            })
        })?;
        self.tell(&damaged);
        Ok(Images::of(Prepared::open(folder)?))
    }

    /// Reports progress; returns whether to go on.
    fn goes_on(&self, done: u64, total: u64, what: &str) -> bool {
        self.host.progress(done, total, what);
        self.host.cancelled() == Cancel::Run
    }

    fn tell(&self, damaged: &[Damaged]) {
        if let [first, ..] = damaged {
            let message = format!(
                "{} {} images were left out ({}: {}, ...)",
                damaged.len(),
                Damaged::state(damaged).0,
                first.name,
                first.why
            );
            self.host.log(LogLevel::Warn, &message);
        }
    }
}
