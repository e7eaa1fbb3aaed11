//! The store as planning's view of earlier results; empty if there is no store yet.

use std::collections::{BTreeMap, HashMap};
use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tokio::runtime::Runtime;

use crate::artifact::Layout;
use crate::cli::output;
use crate::input::FileKind;
use crate::input::{Folder, InputError, Listing};
use crate::plan::decision::KnownResults;
use crate::plan::{FileOption, PlannedStage};
use crate::store::{HashTrust, Store};
use crate::table;

/// How long files are read before a message appears.
const PATIENCE: Duration = Duration::from_secs(2);

/// [`KnownResults`] over a store.
pub struct History<'a> {
    runtime: &'a Runtime,
    store: &'a Store,
    layout: Layout,
    trust: HashTrust,
    hashes: HashMap<(PathBuf, FileKind), String>,
}

impl<'a> History<'a> {
    /// Results from this store, and its cached file hashes if they are trusted.
    pub fn new(runtime: &'a Runtime, store: &'a Store, layout: Layout, trust: HashTrust) -> Self {
        Self {
            runtime,
            store,
            layout,
            trust,
            hashes: HashMap::new(),
        }
    }
}

impl KnownResults for History<'_> {
    fn find_success(&mut self, digest: &str) -> Result<Option<String>, Box<dyn StdError>> {
        let found = self.runtime.block_on(self.store.find_success(digest))?;
        Ok(found
            .filter(|success| self.layout.holds(&success.output))
            .map(|success| success.output.hash))
    }

    fn last_components(
        &mut self,
        recipe: &str,
        stage: &str,
    ) -> Result<Option<Value>, Box<dyn StdError>> {
        let last = self
            .runtime
            .block_on(self.store.last_execution(recipe, stage))?;
        Ok(last.map(|last| last.components))
    }

    fn file_hashes(
        &mut self,
        stage: &PlannedStage,
    ) -> Result<BTreeMap<String, String>, Box<dyn StdError>> {
        let (runtime, store, trust) = (self.runtime, self.store, self.trust);
        file_hashes(stage, &mut self.hashes, |file| {
            let snapshot = store.snapshot(&file.path, file.kind, trust);
            Ok(runtime.block_on(snapshot)?.hash)
        })
    }
}

/// [`KnownResults`] where there is no store yet.
#[derive(Default)]
pub struct EmptyHistory {
    hashes: HashMap<(PathBuf, FileKind), String>,
    /// File hashes of this command, which a store would have cached.
    pub hashed: BTreeMap<String, Folder>,
    /// Total hashed bytes.
    pub bytes: u64,
}

impl KnownResults for EmptyHistory {
    fn find_success(&mut self, _: &str) -> Result<Option<String>, Box<dyn StdError>> {
        Ok(None)
    }

    fn last_components(&mut self, _: &str, _: &str) -> Result<Option<Value>, Box<dyn StdError>> {
        Ok(None)
    }

    fn file_hashes(
        &mut self,
        stage: &PlannedStage,
    ) -> Result<BTreeMap<String, String>, Box<dyn StdError>> {
        let Self {
            hashes,
            hashed,
            bytes,
        } = self;
        file_hashes(stage, hashes, |file| {
            let listing = Listing::of(&file.path, file.kind)?;
            let (snapshot, anew) = listing.hashed(&BTreeMap::new())?;
            *bytes += listing.size();
            hashed.extend(anew);
            Ok(snapshot.hash)
        })
    }
}

/// Hashes of a stage's existing files, each path hashed once.
fn file_hashes(
    stage: &PlannedStage,
    known: &mut HashMap<(PathBuf, FileKind), String>,
    mut hash: impl FnMut(&FileOption) -> Result<String, InputError>,
) -> Result<BTreeMap<String, String>, Box<dyn StdError>> {
    let mut hashes = BTreeMap::new();
    for file in stage.files.iter().filter(|file| file.problem().is_none()) {
        let key = (file.path.clone(), file.kind);
        let found = match known.get(&key) {
            Some(found) => found.clone(),
            None => patiently(file, || hash(file))?,
        };
        known.insert(key, found.clone());
        hashes.insert(file.pointer.clone(), found);
    }
    Ok(hashes)
}

/// Runs a function that may read a large file, and prints a message if it takes long.
fn patiently<T>(file: &FileOption, hash: impl FnOnce() -> T) -> T {
    let (done, waiting) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let waited = waiting.recv_timeout(PATIENCE);
            if waited == Err(RecvTimeoutError::Timeout) && tracing::enabled!(tracing::Level::WARN) {
                let size = match (file.kind, std::fs::metadata(&file.path)) {
                    (FileKind::File, Ok(found)) => format!(" ({})", table::bytes(found.len())),
                    _ => String::new(),
                };
                output::say(&format!(
                    "hashing {}{size} once; Ctrl-C stops",
                    file.path.display()
                ));
            }
        });
        let found = hash();
        drop(done);
        found
    })
}
