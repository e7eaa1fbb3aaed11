//! The history as pages for a browser: runs, one run, curves, pictures, comparisons.
//!
//! In: open stores, and requests from browsers. Out: HTML that says everything without scripts, JSON for curves, pictures,
//! and a stream of events while something changes. Every value from a store is escaped where a page is made ([`page`]); SQL
//! is used only through the store's functions; files are read only below a store's artifacts, by a hash and a name that the
//! store lists ([`files`]). Access is checked before anything else ([`guard`]).
//!
//! Deliberately absent: choosing ports, starting browsers, printing; those are the command line's.

use std::path::{Path, PathBuf};

use crate::artifact::Layout;
use crate::store::{Access, RunId, Store, StoreError};

mod assets;
mod changes;
mod compare;
mod connections;
mod curves;
mod events;
mod files;
mod gantt;
mod graph;
pub mod guard;
mod lineage;
mod live;
mod page;
mod pictures;
mod reply;
mod request;
mod route;
mod run;
mod run_log;
mod runs;
mod samples;
mod server;
mod sweeps;

pub use guard::Guard;
pub use server::serve;

/// What to serve.
pub struct ServerState {
    /// The stores, in the order in which they were named; there is at least one.
    stores: Vec<ServedStore>,
    /// Whether tags, notes and runs may be changed.
    write: bool,
    guard: Guard,
    samples: samples::Cache,
}

/// An open store.
struct ServedStore {
    /// As it was named.
    label: String,
    dir: PathBuf,
    store: Store,
    layout: Layout,
}

impl ServerState {
    /// Opens stores to be looked at; with `write`, also to be changed.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub async fn open(stores: &[PathBuf], write: bool, guard: Guard) -> Result<Self, StoreError> {
        let mut opened = Vec::with_capacity(stores.len());
        for dir in stores {
            opened.push(ServedStore {
                label: dir.display().to_string(),
                store: Store::open(dir, Access::ReadOnly).await?,
                layout: Layout::new(dir).map_err(|source| StoreError::Io {
                    path: dir.clone(),
                    source,
                })?,
                dir: dir.clone(),
            });
        }
        Ok(Self {
            stores: opened,
            write,
            guard,
            samples: samples::Cache::default(),
        })
    }

    /// The store that has the run meant by a reference, and its id there. Ids differ between stores, unless a run was
    /// imported: then either store tells the same of it.
    async fn find_run(&self, reference: &str) -> Result<(&ServedStore, RunId), StoreError> {
        let mut first = None;
        for served in &self.stores {
            match served.store.resolve_run(reference).await {
                Ok(run) => return Ok((served, run)),
                Err(error @ (StoreError::NoRun { .. } | StoreError::AmbiguousRun { .. })) => {
                    first = first.or(Some(error));
                }
                Err(error) => return Err(error),
            }
        }
        Err(first.unwrap_or(StoreError::NoRun {
            reference: reference.to_owned(),
            runs: 0,
        }))
    }
}

/// Runs that a query names, each once, the pinned one first.
struct NamedRuns<'s> {
    runs: Vec<(&'s ServedStore, RunId)>,
    /// The query with ids in place of what else runs may be called by, where it has such names: `latest` is another run
    /// tomorrow, and a link that is kept shows the same.
    settled: Option<request::Fields>,
}

impl ServerState {
    /// The runs that a query names, at most so many. A baseline that is gone, or another server's, is none.
    async fn named_runs(
        &self,
        query: &request::Fields,
        most: usize,
    ) -> Result<NamedRuns<'_>, StoreError> {
        let mut runs: Vec<(&ServedStore, RunId)> = Vec::new();
        let mut settled = request::Fields::default();
        for (name, value) in query.pairs().filter(|(_, value)| !value.is_empty()) {
            let place = match name {
                "baseline" => 0,
                "run" => runs.len(),
                _ => {
                    settled.push(name, value);
                    continue;
                }
            };
            if runs.len() >= most {
                settled.push(name, value);
                continue;
            }
            match self.find_run(value).await {
                Ok((served, id)) => {
                    settled.push(name, &id.0);
                    match runs.iter().position(|(_, known)| *known == id) {
                        Some(known) if place == 0 => runs[..=known].rotate_right(1),
                        Some(_) => {}
                        None => runs.insert(place, (served, id)),
                    }
                }
                Err(StoreError::NoRun { .. }) if name == "baseline" => {}
                Err(error) => return Err(error),
            }
        }
        let changed = settled
            .pairs()
            .ne(query.pairs().filter(|(_, value)| !value.is_empty()));
        Ok(NamedRuns {
            runs,
            settled: changed.then_some(settled),
        })
    }
}

impl ServedStore {
    /// The number of the store among those that are served, as URLs have it.
    fn number(&self, site: &ServerState) -> usize {
        let place = site
            .stores
            .iter()
            .position(|served| std::ptr::eq(served, self));
        place.unwrap_or(0) + 1
    }

    fn dir(&self) -> &Path {
        &self.dir
    }
}
