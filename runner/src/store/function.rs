//! The one function that retort adds to SQL: `retort_points(data)`, the points of a block as JSON.

use std::ffi::c_int;

use libsqlite3_sys as ffi;
use sqlx::sqlite::SqliteConnection;

use super::block;

/// Makes the function known to a connection.
pub(super) async fn register(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let mut handle = connection.lock_handle().await?;
    // SAFETY: the handle is locked, so nobody else uses the connection meanwhile; the name is a C string, and the
    // function lives as long as the program.
    let code = unsafe {
        ffi::sqlite3_create_function_v2(
            handle.as_raw_handle().as_ptr(),
            c"retort_points".as_ptr(),
            1,
            ffi::SQLITE_UTF8 | ffi::SQLITE_DETERMINISTIC | ffi::SQLITE_INNOCUOUS,
            std::ptr::null_mut(),
            Some(points),
            None,
            None,
            None,
        )
    };
    match code {
        ffi::SQLITE_OK => Ok(()),
        code => Err(sqlx::Error::Protocol(format!(
            "SQLite refused the function retort_points (code {code})"
        ))),
    }
}

/// # Safety
/// Called by SQLite, with as many values as arguments.
unsafe extern "C" fn points(
    context: *mut ffi::sqlite3_context,
    count: c_int,
    values: *mut *mut ffi::sqlite3_value,
) {
    debug_assert_eq!(count, 1);
    // SAFETY: SQLite passes one valid value, as registered, whose bytes stay where they are until the call returns. It
    // copies the texts given to it (SQLITE_TRANSIENT). Lengths fit: a block is far smaller than SQLite's limit.
    unsafe {
        let value = *values;
        let data = ffi::sqlite3_value_blob(value).cast::<u8>();
        let length = usize::try_from(ffi::sqlite3_value_bytes(value)).unwrap_or(0);
        let bytes = if data.is_null() {
            &[]
        } else {
            std::slice::from_raw_parts(data, length)
        };
        match block::json(bytes) {
            Ok(text) => ffi::sqlite3_result_text(
                context,
                text.as_ptr().cast(),
                text.len() as c_int,
                ffi::SQLITE_TRANSIENT(),
            ),
            Err(damaged) => {
                let text = damaged.to_string();
                ffi::sqlite3_result_error(context, text.as_ptr().cast(), text.len() as c_int);
            }
        }
    }
}
