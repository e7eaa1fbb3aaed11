//! Hostile inputs, one [`Target`] for each format that retort reads from others.
//!
//! A target does with the bytes what retort does with such a file or message, through the functions that retort calls,
//! and says what came of it. It panics where a promise is broken; to be slow or greedy is for [`driver`] to notice.
//! Mutations are led by outcomes: an input that ends with a message not seen before is changed further. `make
//! libfuzzer` runs the same targets led by coverage.

use std::path::{Path, PathBuf};

pub mod driver;
mod files;
mod frames;
pub mod harness;
mod import;
mod mutation;
mod recipe;
mod spool;
mod statement;

/// What is fed with hostile bytes.
#[derive(Debug)]
pub struct Target {
    /// Its name, and that of its folder in the corpus.
    pub name: &'static str,
    /// Reads the bytes; returns what an attentive fuzzer wants to see vary.
    pub exercise: fn(&[u8]) -> String,
    /// Pieces that the format is made of.
    pub tokens: &'static [&'static [u8]],
    /// Makes check sums fit again, or adds what means something, so that what lies behind is reached.
    pub mend: Option<fn(&mut Vec<u8>)>,
    /// A folder of further examples, from the repository's root.
    pub examples: Option<&'static str>,
}

/// All targets.
pub const TARGETS: [Target; 16] = [
    recipe::RECIPE,
    recipe::SWEEP,
    recipe::PROJECT,
    recipe::FILTER,
    spool::SPOOL,
    frames::FRAMES,
    import::IMPORT,
    files::CHECKPOINT,
    files::NPY,
    files::NPZ,
    files::CSV,
    files::TAR,
    files::PARQUET,
    files::IMAGE,
    files::TIFF,
    files::TRAJECTORIES,
];

impl Target {
    /// The target of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        let mut all = TARGETS.iter().chain([&harness::HARNESS]);
        all.find(|target| target.name == name)
    }

    /// Its inputs that are kept in the repository, in the order of their names. Those that once broke something are
    /// among them.
    pub fn corpus(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let own = root.join("tests/soak/corpus").join(self.name);
        let mut paths: Vec<PathBuf> = [Some(own), self.examples.map(|folder| root.join(folder))]
            .into_iter()
            .flatten()
            .flat_map(|folder| {
                let entries = std::fs::read_dir(&folder);
                let entries = entries.unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
                entries.map(|entry| entry.expect("an entry").path())
            })
            .filter(|path| path.is_file())
            .collect();
        paths.sort();
        paths
            .into_iter()
            .map(|path| {
                let bytes = std::fs::read(&path).expect("a file of the corpus");
                (path, bytes)
            })
            .collect()
    }
}

/// A folder for what a target writes, in memory where the system has such a place.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = tempfile::Builder::new()
        .prefix("retort-soak")
        .tempdir_in(memory);
    made.or_else(|_| tempfile::tempdir())
        .expect("a temporary folder")
}
