//! States of runs that readers detect: recorded in passing, or only shown if they cannot be recorded.
//!
//! A reader finds out that a run is lost, or what Slurm says of it. It records this in the store if no other machine owns it,
//! by claiming the store for a moment. Otherwise the fact is kept here, and shown as if it were in the store.

use std::collections::HashMap;
use std::sync::{MutexGuard, PoisonError};

use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;

use super::host::{self, ClaimKind, HostLock};
use super::{Access, RunDetail, RunId, RunState, Store, StoreError, connection};
use super::{AttemptState, StageState};

/// A run's state that is not recorded yet.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PendingRunState {
    pub(super) state: RunState,
    /// Why it has ended.
    pub(super) error: Option<String>,
    /// Why its attempts wait, or `Some(None)` if they do not; None if unknown.
    pub(super) waiting: Option<Option<String>>,
}

impl PendingRunState {
    /// A state, and nothing more.
    pub(super) fn of(state: RunState) -> Self {
        Self {
            state,
            error: None,
            waiting: None,
        }
    }
}

/// A connection that may write, and the right to do so for a moment.
pub(super) struct WriteLease {
    connection: SqliteConnection,
    /// None for a store opened for writing, which has its own.
    _host_lock: Option<HostLock>,
}

impl WriteLease {
    pub(super) fn connection(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }

    /// Closes the connection before the right to write is given up: closing may fold the log into the database.
    pub(super) async fn close(self) {
        if let Err(error) = self.connection.close().await {
            tracing::debug!(%error, "a connection was not closed");
        }
    }
}

impl Store {
    /// Takes the right to write for a moment, even for a store opened for reading.
    pub(super) async fn take_write_lease(&self) -> Result<WriteLease, StoreError> {
        let host_lock = match self.access {
            Access::ReadWrite => {
                self.confirm().await?;
                None
            }
            Access::ReadOnly => host::claim(self.dir(), ClaimKind::Moment).await?,
        };
        Ok(WriteLease {
            connection: connection::connect_for_writing(self.dir()).await?,
            _host_lock: host_lock,
        })
    }

    pub(super) fn lock_unrecorded(&self) -> MutexGuard<'_, HashMap<String, PendingRunState>> {
        self.unrecorded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps facts about a run in memory if they could not be recorded.
    pub(super) fn keep_unrecorded(
        &self,
        run: &RunId,
        said: PendingRunState,
        recorded: &Result<(), StoreError>,
    ) {
        let mut unrecorded = self.lock_unrecorded();
        match recorded {
            Ok(()) => unrecorded.remove(&run.0),
            Err(_) => unrecorded.insert(run.0.clone(), said),
        };
    }

    /// The states of runs that are not recorded, by their ids: an object in JSON, for SQL's `json_each`. They are those of
    /// runs that are recorded as queued or running.
    pub(super) fn unrecorded_states(&self) -> String {
        let unrecorded = self.lock_unrecorded();
        let states = unrecorded
            .iter()
            .map(|(id, said)| (id.as_str(), serde_json::json!(said.state)));
        serde_json::Value::from_iter(states).to_string()
    }

    /// Applies unrecorded facts to a run.
    pub(super) fn show_unrecorded(&self, detail: &mut RunDetail) {
        let unrecorded = self.lock_unrecorded();
        let Some(said) = unrecorded.get(&detail.summary.id.0) else {
            return;
        };
        if detail.summary.state != said.state {
            return;
        }
        if detail.summary.error.is_none() {
            detail.summary.error.clone_from(&said.error);
        }
        let Some(waiting) = &said.waiting else { return };
        for stage in &mut detail.stages {
            let attempts = stage.attempts.iter_mut();
            for attempt in attempts.filter(|attempt| attempt.state == AttemptState::Running) {
                attempt.waiting.clone_from(waiting);
                stage.state = match waiting {
                    Some(_) => StageState::Queued,
                    None => StageState::Running,
                };
            }
        }
    }
}
