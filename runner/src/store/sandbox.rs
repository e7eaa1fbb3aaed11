//! Limits for connections that read untrusted databases or run users' queries.
//!
//! A store may lie on a shared disk, where somebody else writes to it: every connection has the limits of [`protect`].
//!
//! A database can be crafted so that SQLite reads it correctly but never finishes: pages in two trees, values that share
//! pages. A query can be anything. Both get size limits; a database gets a number of steps proportional to its size, a query
//! only read actions ([`only_reading`]) and a time limit for each row.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libsqlite3_sys as ffi;
use sqlx::sqlite::SqliteConnection;

/// Longest value, and longest row, of any database. The longest that retort writes are the hashes of the files of one folder:
/// with this limit of more than a million files.
pub(super) const LONGEST: i32 = 192 << 20;
/// Longest value, and longest row, in a file that is imported.
pub(super) const LONGEST_FOREIGN: i32 = 16 << 20;
/// Longest value that a query may produce.
pub(super) const LONGEST_ANSWER: i32 = 32 << 20;
/// Steps in which SQLite reads the schema of a database that is imported: ours takes a few hundred. Each object costs few
/// steps and much more work than they say.
pub(super) const ATTACHING: u64 = 20_000;
/// SQLite's own unit of work, between two looks at the budget.
pub(super) const STEPS: i32 = 10_000;

/// SQLite's remaining steps on a connection.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    left: Arc<AtomicU64>,
    spent: Arc<AtomicBool>,
}

impl Budget {
    /// Whether it was exhausted, which interrupts the statement.
    pub(super) fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Relaxed)
    }
}

/// Lets a connection do `steps` steps of SQLite's virtual machine, and no more.
pub(super) async fn limit_steps(
    connection: &mut SqliteConnection,
    steps: u64,
) -> Result<Budget, sqlx::Error> {
    let budget = Budget {
        left: Arc::new(AtomicU64::new(steps)),
        spent: Arc::default(),
    };
    let Budget { left, spent } = budget.clone();
    let mut handle = connection.lock_handle().await?;
    handle.set_progress_handler(STEPS, move || {
        let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(STEPS.unsigned_abs().into())
        });
        spent.fetch_or(taken.is_err(), Ordering::Relaxed);
        taken.is_ok()
    });
    Ok(budget)
}

/// The time limit for the next row of an answer.
#[derive(Debug, Clone)]
pub(super) struct RowTimeLimit {
    began: Instant,
    /// Milliseconds from the beginning to the last row.
    last: Arc<AtomicU64>,
    spent: Arc<AtomicBool>,
}

impl RowTimeLimit {
    fn elapsed(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Restarts the clock for the next row. Called before the previous row is consumed, because SQLite continues at once.
    pub(super) fn renew(&self) {
        self.last.store(self.elapsed(), Ordering::Relaxed);
    }

    /// Whether a row took too long: SQLite was then interrupted.
    pub(super) fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Relaxed)
    }
}

/// Interrupts a connection that finds no row for this long.
pub(super) async fn limit_time(
    connection: &mut SqliteConnection,
    longest: Duration,
) -> Result<RowTimeLimit, sqlx::Error> {
    let patience = RowTimeLimit {
        began: Instant::now(),
        last: Arc::default(),
        spent: Arc::default(),
    };
    let longest = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX);
    let asked = patience.clone();
    let mut handle = connection.lock_handle().await?;
    handle.set_progress_handler(STEPS, move || {
        let waited = asked
            .elapsed()
            .saturating_sub(asked.last.load(Ordering::Relaxed));
        let late = waited > longest;
        asked.spent.fetch_or(late, Ordering::Relaxed);
        !late
    });
    Ok(patience)
}

/// The limits of every connection to a store: on the length of rows, and on what statements may do to the file's structure.
pub(super) async fn protect(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let mut handle = connection.lock_handle().await?;
    let handle = handle.as_raw_handle().as_ptr();
    // SAFETY: the handle is locked, so nobody else uses the connection meanwhile. This option takes a number, and a pointer
    // that may be null.
    unsafe {
        ffi::sqlite3_limit(handle, ffi::SQLITE_LIMIT_LENGTH, LONGEST);
        ffi::sqlite3_db_config(
            handle,
            ffi::SQLITE_DBCONFIG_DEFENSIVE,
            c_int::from(true),
            std::ptr::null_mut::<c_int>(),
        );
    }
    Ok(())
}

/// Limits the sizes of values and statements on a connection.
pub(super) async fn limit_sizes(
    connection: &mut SqliteConnection,
    longest: i32,
) -> Result<(), sqlx::Error> {
    let mut handle = connection.lock_handle().await?;
    let handle = handle.as_raw_handle().as_ptr();
    for (limit, value) in [
        (ffi::SQLITE_LIMIT_LENGTH, longest),
        (ffi::SQLITE_LIMIT_SQL_LENGTH, 1 << 20),
        (ffi::SQLITE_LIMIT_EXPR_DEPTH, 200),
        (ffi::SQLITE_LIMIT_WORKER_THREADS, 0),
    ] {
        // SAFETY: the handle is locked, so nobody else uses the connection meanwhile.
        unsafe { ffi::sqlite3_limit(handle, limit, value) };
    }
    Ok(())
}

/// Limits the memory that SQLite takes, in this whole process, to half a gigabyte: caches and all, which are far smaller.
pub(super) async fn limit_memory(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let limit = sqlx::query("pragma hard_heap_limit = 536870912");
    limit.execute(connection).await.map(drop)
}

/// From now on a connection refuses statements that do anything but read tables and views and call functions.
pub(super) async fn only_reading(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let mut handle = connection.lock_handle().await?;
    // SAFETY: the handle is locked, so nobody else uses the connection meanwhile; the function lives as long as the
    // program and needs no data.
    unsafe {
        ffi::sqlite3_set_authorizer(
            handle.as_raw_handle().as_ptr(),
            Some(authorize),
            std::ptr::null_mut(),
        )
    };
    Ok(())
}

/// # Safety
/// Called by SQLite, with C strings or null.
unsafe extern "C" fn authorize(
    _: *mut c_void,
    action: c_int,
    first: *const c_char,
    second: *const c_char,
    _: *const c_char,
    _: *const c_char,
) -> c_int {
    let text = |text: *const c_char| match text.is_null() {
        true => "",
        // SAFETY: SQLite passes C strings or null, which stay until the call returns.
        false => unsafe { CStr::from_ptr(text) }.to_str().unwrap_or("?"),
    };
    match is_reading(action, text(first), text(second)) {
        true => ffi::SQLITE_OK,
        false => ffi::SQLITE_DENY,
    }
}

fn is_reading(action: c_int, first: &str, second: &str) -> bool {
    match action {
        ffi::SQLITE_SELECT | ffi::SQLITE_READ | ffi::SQLITE_RECURSIVE => true,
        // The second name is the function's. These reach outside the database, or into the program's memory.
        ffi::SQLITE_FUNCTION => !matches!(
            second.to_ascii_lowercase().as_str(),
            "load_extension" | "fts3_tokenizer" | "readfile" | "writefile" | "edit"
        ),
        // What the table-valued functions of the same names ask.
        ffi::SQLITE_PRAGMA => matches!(
            first.to_ascii_lowercase().as_str(),
            "table_info"
                | "table_xinfo"
                | "table_list"
                | "index_list"
                | "index_info"
                | "foreign_key_list"
        ),
        _ => false,
    }
}
