//! The C table of the host, which a plugin may call while its function runs, on top of the outbox and the artifact writer.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use retort_abi::ffi::{self, HostTable, Sink, Str};
use retort_abi::{ArtifactMeta, Cancel, Failure, FailureCode, LogLevel};

use super::outbox::Outbox;
use super::writer::ArtifactWriter;
use crate::frame::{FromWorker, Progress};

/// The state of the C table's functions.
pub(super) struct Services {
    pub(super) outbox: Arc<Outbox>,
    pub(super) stop: Arc<AtomicU32>,
    /// Only in `run` of a whole stage.
    pub(super) writer: Option<ArtifactWriter>,
    /// Whether the plugin's function has returned.
    pub(super) over: AtomicBool,
    /// The number of calls after that.
    pub(super) late: AtomicU64,
}

impl Services {
    pub(super) fn table(&self) -> HostTable {
        HostTable {
            struct_size: size_of::<HostTable>() as u32,
            abi_minor: ffi::ABI_MINOR,
            ext: std::ptr::null(),
            ctx: std::ptr::from_ref(self).cast_mut().cast(),
            log: Some(log),
            metric: Some(metric),
            progress: Some(progress),
            cancelled: Some(cancelled),
            artifact_begin: Some(artifact_begin),
            artifact_commit: Some(artifact_commit),
            artifact_abort: Some(artifact_abort),
        }
    }
}

// The functions of the table. A panic in one of them aborts the worker, which is contained like any other fault.
//
// SAFETY of them all: `retort_plugin.h` obliges the plugin to pass our ctx, readable text and valid sinks, and to call
// only before the call returns that received the table, which is as long as `Services` lives. `Services` is Sync.

/// The services, until the plugin's function has returned. Later calls are counted and ignored.
///
/// # Safety
/// `ctx` is that of a table made by [`Services::table`], which still exists.
unsafe fn services<'a>(ctx: *mut c_void) -> Option<&'a Services> {
    // SAFETY: the caller vouches for it.
    let services = unsafe { &*ctx.cast::<Services>() };
    if services.over.load(Ordering::Relaxed) {
        services.late.fetch_add(1, Ordering::Relaxed);
        return None;
    }
    Some(services)
}

/// # Safety
/// The text is readable.
unsafe fn text(text: Str) -> String {
    // SAFETY: the caller vouches for it.
    String::from_utf8_lossy(unsafe { text.bytes() }).into_owned()
}

unsafe extern "C" fn log(ctx: *mut c_void, level: u32, message: Str) {
    // SAFETY: see above.
    let (Some(services), message) = (unsafe { (services(ctx), text(message)) }) else {
        return;
    };
    let level = match level {
        1 => LogLevel::Error,
        2 => LogLevel::Warn,
        4 => LogLevel::Debug,
        5 => LogLevel::Trace,
        _ => LogLevel::Info,
    };
    services.outbox.log(level, &message);
}

unsafe extern "C" fn metric(ctx: *mut c_void, name: Str, step: u64, value: f64) {
    // SAFETY: see above.
    let (Some(services), name) = (unsafe { (services(ctx), name.bytes()) }) else {
        return;
    };
    let series = String::from_utf8_lossy(name);
    services.outbox.metric(&series, step, value);
}

unsafe extern "C" fn progress(ctx: *mut c_void, done: u64, total: u64, unit: Str) {
    // SAFETY: see above.
    let (Some(services), unit) = (unsafe { (services(ctx), text(unit)) }) else {
        return;
    };
    services.outbox.progress(Progress { done, total, unit });
}

unsafe extern "C" fn cancelled(ctx: *mut c_void) -> u32 {
    // SAFETY: see above.
    let services = unsafe { services(ctx) };
    services.map_or(Cancel::Now as u32, |services| {
        services.stop.load(Ordering::Relaxed)
    })
}

unsafe extern "C" fn artifact_begin(
    ctx: *mut c_void,
    kind: Str,
    name: Str,
    id: *mut u64,
    path_out: Sink,
    err: Sink,
) -> i32 {
    // SAFETY: see above.
    let (services, kind, name) = unsafe { (services(ctx), text(kind), text(name)) };
    let begun = services
        .and_then(|services| services.writer.as_ref())
        .ok_or_else(no_writer)
        .and_then(|writer| writer.begin(kind, name));
    match begun {
        Ok((number, path)) => {
            // SAFETY: see above; the staging path was made from JSON text and is UTF-8.
            unsafe {
                if !id.is_null() {
                    *id = number;
                }
                path_out.write(&path.to_string_lossy());
            }
            ffi::OK
        }
        // SAFETY: see above.
        Err(failure) => unsafe { refuse(&failure, err) },
    }
}

unsafe extern "C" fn artifact_commit(ctx: *mut c_void, id: u64, meta_json: Str, err: Sink) -> i32 {
    // SAFETY: see above.
    let (services, meta) = unsafe { (services(ctx), text(meta_json)) };
    let open = services.and_then(|services| Some((services, services.writer.as_ref()?)));
    let committed = open.ok_or_else(no_writer).and_then(|(services, writer)| {
        let meta = if meta.trim().is_empty() {
            Ok(ArtifactMeta::default())
        } else {
            serde_json::from_str(&meta)
        };
        let meta = meta.map_err(|error| {
            Failure::new(
                FailureCode::Internal,
                format!("artifact_commit({id}): invalid artifact metadata: {error}"),
            )
        })?;
        let record = Box::new(writer.commit(id, meta)?);
        services.outbox.send(&FromWorker::Artifact { id, record });
        Ok(())
    });
    match committed {
        Ok(()) => ffi::OK,
        // SAFETY: see above.
        Err(failure) => unsafe { refuse(&failure, err) },
    }
}

unsafe extern "C" fn artifact_abort(ctx: *mut c_void, id: u64) {
    // SAFETY: see above.
    let services = unsafe { services(ctx) };
    if let Some(writer) = services.and_then(|services| services.writer.as_ref()) {
        writer.abort(id);
    }
}

fn no_writer() -> Failure {
    Failure::new(
        FailureCode::Unsupported,
        "artifacts are only made while a stage runs, and not by its parts",
    )
}

/// # Safety
/// The sink is valid.
unsafe fn refuse(failure: &Failure, err: Sink) -> i32 {
    // SAFETY: the caller vouches for the sink.
    unsafe { err.write(&serde_json::to_string(failure).unwrap_or_default()) };
    if failure.code == FailureCode::Unsupported {
        ffi::UNSUPPORTED
    } else {
        ffi::FAILED
    }
}
