//! The history as pages for a browser: runs, one run, curves, pictures, comparisons.
//!
//! In: open stores, and requests from browsers. Out: HTML that says everything without scripts, JSON for curves, pictures,
//! and a stream of events while something changes. Every value from a store is escaped where a page is made ([`page`]); SQL
//! is only asked through the store's functions; files are only read below a store's artifacts, by a hash and a name that
//! the store has listed ([`files`]). Who may ask at all is decided before anything else ([`guard`]).
//!
//! Deliberately absent: choosing ports, starting browsers, printing; those are the command line's.

use std::path::{Path, PathBuf};

use crate::artifact::Layout;
use crate::store::{Access, RunId, Store, StoreError};

mod assets;
mod changes;
mod compare;
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

/// What is served.
pub struct Site {
    /// The stores, in the order in which they were named; there is at least one.
    shelves: Vec<Shelf>,
    /// Whether tags, notes and runs may be changed.
    write: bool,
    guard: Guard,
    samples: samples::Cache,
}

/// An open store.
struct Shelf {
    /// As it was named.
    label: String,
    dir: PathBuf,
    store: Store,
    layout: Layout,
}

impl Site {
    /// Opens stores to be looked at; with `write`, also to be changed.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub async fn open(stores: &[PathBuf], write: bool, guard: Guard) -> Result<Self, StoreError> {
        let mut shelves = Vec::with_capacity(stores.len());
        for dir in stores {
            shelves.push(Shelf {
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
            shelves,
            write,
            guard,
            samples: samples::Cache::default(),
        })
    }

    /// The store that has the run meant by a reference, and its id there. Ids differ between stores, unless a run was
    /// imported: then either store tells the same of it.
    async fn find_run(&self, reference: &str) -> Result<(&Shelf, RunId), StoreError> {
        let mut first = None;
        for shelf in &self.shelves {
            match shelf.store.resolve_run(reference).await {
                Ok(run) => return Ok((shelf, run)),
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

impl Shelf {
    /// The number of the store among those that are served, as URLs have it.
    fn number(&self, site: &Site) -> usize {
        let place = site
            .shelves
            .iter()
            .position(|shelf| std::ptr::eq(shelf, self));
        place.unwrap_or(0) + 1
    }

    fn dir(&self) -> &Path {
        &self.dir
    }
}
