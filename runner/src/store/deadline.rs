//! Statements that end when nobody waits for their answer any more.
//!
//! SQLite runs a statement in a thread of its connection, and knows nothing of the task that waits for the answer. Where such a
//! task may go away, as when a browser closes a page, the connection checks while it works whether the task still exists.
//! Otherwise a few abandoned statements would hold all connections of a pool.

use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sqlx::sqlite::SqliteConnection;

use super::sandbox::STEPS;

tokio::task_local! {
    static CALLER: Caller;
}

/// Whoever waits for the answers to statements.
#[derive(Debug, Clone)]
struct Caller {
    alive: Weak<()>,
    until: Instant,
}

impl Caller {
    fn is_waiting(&self) -> bool {
        self.alive.strong_count() > 0 && Instant::now() < self.until
    }
}

/// Runs `work`. Its statements on stores that are open for reading are interrupted when it is dropped, or after `longest`.
pub async fn within<F: Future>(longest: Duration, work: F) -> F::Output {
    let alive = Arc::new(());
    let caller = Caller {
        alive: Arc::downgrade(&alive),
        until: Instant::now() + longest,
    };
    let answer = CALLER.scope(caller, work).await;
    drop(alive);
    answer
}

/// Lets a connection work for the current task only, if that is within [`within`]; otherwise without a limit.
pub(super) async fn watch(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let caller = CALLER.try_with(Caller::clone).ok();
    let mut handle = connection.lock_handle().await?;
    match caller {
        Some(caller) => handle.set_progress_handler(STEPS, move || caller.is_waiting()),
        None => handle.remove_progress_handler(),
    }
    Ok(())
}
