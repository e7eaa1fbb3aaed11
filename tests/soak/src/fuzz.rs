//! Hostile inputs, one [`Target`] for each format that retort reads from others.
//!
//! A target processes the bytes like such a file or message, with the functions that retort uses, and returns the outcome. It
//! panics if a promise is broken; [`driver`] detects excessive time and memory. Mutations are guided by outcomes: an input
//! with a new message is mutated further. `make libfuzzer` runs the same targets guided by coverage.

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

/// A reader that is fed hostile bytes.
#[derive(Debug)]
pub struct Target {
    /// Its name, and that of its folder in the corpus.
    pub name: &'static str,
    /// Reads the bytes. Returns an outcome, whose variety guides the fuzzer.
    pub exercise: fn(&[u8]) -> String,
    /// Tokens of the format.
    pub tokens: &'static [&'static [u8]],
    /// Repairs checksums, or adds meaningful content, so that mutations reach deeper code.
    pub mend: Option<fn(&mut Vec<u8>)>,
    /// A folder of further examples, from the repository's root.
    pub examples: Option<&'static str>,
}

/// All targets.
pub const TARGETS: [Target; 18] = [
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
    files::TABLE,
    files::INDEX,
];

impl Target {
    /// The target of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        let mut all = TARGETS.iter().chain([&harness::HARNESS]);
        all.find(|target| target.name == name)
    }

    /// Its inputs in the repository, in the order of their names, including those that once broke something.
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

/// A folder for a target's files, in memory if the system has such a file system.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = tempfile::Builder::new()
        .prefix("retort-soak")
        .tempdir_in(memory);
    made.or_else(|_| tempfile::tempdir())
        .expect("a temporary folder")
}
