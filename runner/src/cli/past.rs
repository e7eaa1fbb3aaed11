//! The store as what planning knows of the past, or nothing where there is no store yet.

use std::collections::BTreeMap;
use std::error::Error as StdError;

use serde_json::Value;
use tokio::runtime::Runtime;

use crate::artifact::{self, Layout};
use crate::plan::PlannedStage;
use crate::plan::decision::Past;
use crate::store::Store;

/// [`Past`] over a store.
pub struct History<'a> {
    runtime: &'a Runtime,
    store: &'a Store,
    layout: Layout,
}

impl<'a> History<'a> {
    /// What this store knows.
    pub fn new(runtime: &'a Runtime, store: &'a Store, layout: Layout) -> Self {
        Self {
            runtime,
            store,
            layout,
        }
    }
}

impl Past for History<'_> {
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
        file_hashes(stage)
    }
}

/// [`Past`] where there is no store yet.
pub struct NoHistory;

impl Past for NoHistory {
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
        file_hashes(stage)
    }
}

fn file_hashes(stage: &PlannedStage) -> Result<BTreeMap<String, String>, Box<dyn StdError>> {
    let mut hashes = BTreeMap::new();
    for file in stage.files.iter().filter(|file| file.path.exists()) {
        hashes.insert(
            file.pointer.clone(),
            artifact::input_hash(&file.path, file.kind)?,
        );
    }
    Ok(hashes)
}
