//! The plugin's side of the C tables: [`export_plugin!`](crate::export_plugin) turns an `impl Plugin` into the entry
//! symbol.
//!
//! Errors between the two languages end here: panics become a [`Failure`] with code `panic`,
//! message and place; invalid UTF-8 or JSON becomes a failure; members missing in an older host are
//! skipped. Deliberately absent: what a plugin does.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, Once, PoisonError};

use serde::Serialize;

use crate::ffi::{self, HostTable, PluginTable, Sink, Str};
use crate::host::{Cancel, Host, LogLevel};
use crate::message::{ArtifactMeta, Failure, FailureCode, StageJob};
use crate::{Plugin, table_member};

/// Exports a plugin: defines `retort_plugin_v1`, the only exported symbol of the shared object.
///
/// Takes an expression of a type that implements [`Plugin`]; it is evaluated once, at the first call.
///
/// ```
/// use retort_abi::*;
///
/// struct Nothing;
///
/// impl Plugin for Nothing {
///     fn describe(&self) -> Description {
///         Description {
///             name: "nothing".into(),
///             version: env!("CARGO_PKG_VERSION").into(),
///             summary: String::new(),
///             license: "MIT".into(),
///             devices: vec!["cpu".into()],
///             dtypes: vec!["f32".into()],
///             families: Vec::new(),
///             libraries: Vec::new(),
///             stages: Vec::new(),
///         }
///     }
///     fn probe(&self, _host: &dyn Host) -> Result<Vec<Device>, Failure> {
///         Ok(Vec::new())
///     }
///     fn validate(&self, _host: &dyn Host, _job: &StageJob) -> Result<Vec<Diagnostic>, Failure> {
///         Ok(Vec::new())
///     }
///     fn run(&self, _host: &dyn Host, _job: &StageJob) -> Result<StageResult, Failure> {
///         Err(Failure::new(FailureCode::Unsupported, "nothing to run"))
///     }
/// }
///
/// export_plugin!(Nothing);
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! export_plugin {
    ($plugin:expr) => {
        const _: () = {
            use $crate::ffi::{HostTable, PluginTable, Sink, Str};

            fn plugin() -> &'static dyn $crate::Plugin {
                static PLUGIN: ::std::sync::OnceLock<::std::boxed::Box<dyn $crate::Plugin>> =
                    ::std::sync::OnceLock::new();
                &**PLUGIN.get_or_init(|| ::std::boxed::Box::new($plugin))
            }

            // SAFETY of all four: the host passes what `retort_plugin.h` promises, and `export` needs nothing else.
            unsafe extern "C" fn describe(out: Sink, err: Sink) -> i32 {
                // SAFETY: see above.
                unsafe { $crate::export::describe(plugin, out, err) }
            }
            unsafe extern "C" fn probe(host: *const HostTable, out: Sink, err: Sink) -> i32 {
                // SAFETY: see above.
                unsafe { $crate::export::probe(plugin, host, out, err) }
            }
            unsafe extern "C" fn validate(
                host: *const HostTable,
                job: Str,
                out: Sink,
                err: Sink,
            ) -> i32 {
                // SAFETY: see above.
                unsafe { $crate::export::validate(plugin, host, job, out, err) }
            }
            unsafe extern "C" fn run(
                host: *const HostTable,
                job: Str,
                out: Sink,
                err: Sink,
            ) -> i32 {
                // SAFETY: see above.
                unsafe { $crate::export::run(plugin, host, job, out, err) }
            }

            static TABLE: PluginTable = $crate::export::table(describe, probe, validate, run);

            /// The entry symbol of `retort_plugin.h`.
            // SAFETY: no other crate of a plugin defines this name; the header reserves it.
            #[unsafe(no_mangle)]
            extern "C" fn retort_plugin_v1() -> *const PluginTable {
                &TABLE
            }
        };
    };
}

/// Returns the plugin. The first call runs its constructor, which may panic.
pub type PluginSource = fn() -> &'static dyn Plugin;

/// The table of a Rust plugin.
pub const fn table(
    describe: unsafe extern "C" fn(Sink, Sink) -> i32,
    probe: unsafe extern "C" fn(*const HostTable, Sink, Sink) -> i32,
    validate: ffi::StageCall,
    run: ffi::StageCall,
) -> PluginTable {
    PluginTable {
        struct_size: size_of::<PluginTable>() as u32,
        abi_minor: ffi::ABI_MINOR,
        min_host_minor: 0,
        reserved: 0,
        ext: std::ptr::null(),
        describe: Some(describe),
        probe: Some(probe),
        validate: Some(validate),
        run: Some(run),
    }
}

/// `describe` of the C table.
///
/// # Safety
/// The sinks are valid until this returns.
pub unsafe fn describe(plugin: PluginSource, out: Sink, err: Sink) -> i32 {
    // SAFETY: our caller vouches for the sinks.
    unsafe { answer(out, err, || Ok(plugin().describe())) }
}

/// `probe` of the C table.
///
/// # Safety
/// The host's table and the sinks are valid until this returns, as `retort_plugin.h` says.
pub unsafe fn probe(plugin: PluginSource, host: *const HostTable, out: Sink, err: Sink) -> i32 {
    // SAFETY: our caller vouches for the table and the sinks.
    unsafe { answer(out, err, || plugin().probe(&CHost::new(host)?)) }
}

/// `validate` of the C table.
///
/// # Safety
/// As [`probe`]; the job's text too.
pub unsafe fn validate(
    plugin: PluginSource,
    host: *const HostTable,
    job: Str,
    out: Sink,
    err: Sink,
) -> i32 {
    // SAFETY: our caller vouches for the table, the text and the sinks.
    unsafe {
        answer(out, err, || {
            plugin().validate(&CHost::new(host)?, &read_job(job)?)
        })
    }
}

/// `run` of the C table.
///
/// # Safety
/// As [`validate`].
pub unsafe fn run(
    plugin: PluginSource,
    host: *const HostTable,
    job: Str,
    out: Sink,
    err: Sink,
) -> i32 {
    // SAFETY: our caller vouches for the table, the text and the sinks.
    unsafe {
        answer(out, err, || {
            plugin().run(&CHost::new(host)?, &read_job(job)?)
        })
    }
}

/// Calls the plugin, and writes its answer or its failure as JSON.
///
/// # Safety
/// The sinks are valid.
unsafe fn answer<T: Serialize>(
    out: Sink,
    err: Sink,
    call: impl FnOnce() -> Result<T, Failure>,
) -> i32 {
    remember_panics();
    let outcome = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => outcome,
        Err(payload) => Err(panic_failure(payload)),
    };
    let written = outcome.and_then(|value| {
        serde_json::to_string(&value).map_err(|error| {
            Failure::new(
                FailureCode::Internal,
                format!("the answer is not valid JSON: {error}"),
            )
        })
    });
    match written {
        Ok(text) => {
            // SAFETY: the caller vouches for the sink.
            unsafe { out.write(&text) };
            ffi::OK
        }
        Err(failure) => {
            let text = serde_json::to_string(&failure).unwrap_or_default();
            // SAFETY: the caller vouches for the sink.
            unsafe { err.write(&text) };
            match failure.code {
                FailureCode::Cancelled => ffi::CANCELLED,
                FailureCode::Unsupported => ffi::UNSUPPORTED,
                _ => ffi::FAILED,
            }
        }
    }
}

/// # Safety
/// The text is readable.
unsafe fn read_job(job: Str) -> Result<StageJob, Failure> {
    // SAFETY: the caller vouches for the text.
    let bytes = unsafe { job.bytes() };
    serde_json::from_slice(bytes).map_err(|error| {
        Failure::new(
            FailureCode::Internal,
            format!("the host's job cannot be read: {error}"),
        )
    })
}

/// The most recent panic of any thread of the plugin: message and place.
///
/// A payload that crosses threads (as with rayon) arrives without its location; the hook saw it where it happened.
static LAST_PANIC: Mutex<Option<(String, String)>> = Mutex::new(None);

fn remember_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if let Some(location) = info.location() {
                let note = (payload_text(info.payload()), location.to_string());
                *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(note);
            }
            previous(info);
        }));
    });
}

fn panic_failure(payload: Box<dyn Any + Send>) -> Failure {
    let text = payload_text(&*payload);
    // A payload's destructor may panic too; there is nobody left to catch that.
    std::mem::forget(payload);
    let place = match LAST_PANIC
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take()
    {
        Some((said, place)) if said == text => format!(" at {place}"),
        _ => String::new(),
    };
    Failure::new(
        FailureCode::Panic,
        format!("the plugin panicked{place}: {text}"),
    )
    .hint("this is a bug of the plugin; its log has the panic's own lines")
}

fn payload_text(payload: &(dyn Any + Send)) -> String {
    match (
        payload.downcast_ref::<&str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "(a payload that is no text)".to_owned(),
    }
}

/// [`Host`] over the C table of a host that may be older or newer than this crate.
struct CHost(*const HostTable);

// SAFETY: `retort_plugin.h` makes every member callable from any thread until the call returns that received the table.
unsafe impl Send for CHost {}
// SAFETY: as above.
unsafe impl Sync for CHost {}

/// A member of the host's table, or None in a host that does not have it.
macro_rules! host_member {
    ($host:expr, $member:ident) => {
        // SAFETY: CHost::new saw a table that is not NULL, and the header makes its struct_size true.
        unsafe { table_member!($host.0, HostTable, $member) }
    };
}

impl CHost {
    /// # Safety
    /// `table` is NULL or a host's table that is valid as long as the value is used.
    unsafe fn new(table: *const HostTable) -> Result<Self, Failure> {
        if table.is_null() {
            return Err(Failure::new(
                FailureCode::Internal,
                "the host passed no table",
            ));
        }
        // SAFETY: a table begins with a true struct_size, says the header.
        let size = unsafe { (*table).struct_size } as usize;
        if size < ffi::SMALLEST_HOST {
            let message = format!(
                "the host passed a truncated table: struct_size is {size}, at least {} is required",
                ffi::SMALLEST_HOST
            );
            return Err(Failure::new(FailureCode::Internal, message));
        }
        Ok(Self(table))
    }

    fn ctx(&self) -> *mut std::ffi::c_void {
        // SAFETY: the fixed head of the table (through ctx) is there in every version.
        unsafe { (*self.0).ctx }
    }

    fn missing(member: &str) -> Failure {
        Failure::new(
            FailureCode::Unsupported,
            format!("this host has no `{member}`"),
        )
    }
}

// SAFETY of all of these: `retort_plugin.h` obliges the host to accept the call, and to copy its arguments before it returns.
impl Host for CHost {
    fn log(&self, level: LogLevel, message: &str) {
        if let Some(log) = host_member!(self, log) {
            // SAFETY: see above the impl.
            unsafe { log(self.ctx(), level as u32, Str::borrowed(message)) }
        }
    }

    fn metric(&self, name: &str, step: u64, value: f64) {
        if let Some(metric) = host_member!(self, metric) {
            // SAFETY: see above the impl.
            unsafe { metric(self.ctx(), Str::borrowed(name), step, value) }
        }
    }

    fn progress(&self, done: u64, total: u64, unit: &str) {
        if let Some(progress) = host_member!(self, progress) {
            // SAFETY: see above the impl.
            unsafe { progress(self.ctx(), done, total, Str::borrowed(unit)) }
        }
    }

    fn cancelled(&self) -> Cancel {
        let Some(cancelled) = host_member!(self, cancelled) else {
            return Cancel::Run;
        };
        // SAFETY: see above the impl.
        match unsafe { cancelled(self.ctx()) } {
            0 => Cancel::Run,
            1 => Cancel::AtCheckpoint,
            _ => Cancel::Now,
        }
    }

    fn artifact_begin(&self, kind: &str, name: &str) -> Result<(u64, PathBuf), Failure> {
        let begin =
            host_member!(self, artifact_begin).ok_or_else(|| Self::missing("artifact_begin"))?;
        let (mut id, mut path, mut err) = (0, Vec::new(), Vec::new());
        let (path_out, err_out) = (Sink::into_buffer(&mut path), Sink::into_buffer(&mut err));
        // SAFETY: see above the impl; id and both buffers outlive the call.
        let status = unsafe {
            begin(
                self.ctx(),
                Str::borrowed(kind),
                Str::borrowed(name),
                &mut id,
                path_out,
                err_out,
            )
        };
        check_status(status, &err)?;
        let path = String::from_utf8(path).map_err(|_| {
            Failure::new(FailureCode::Internal, "the host's staging path is no UTF-8")
        })?;
        Ok((id, path.into()))
    }

    fn artifact_commit(&self, id: u64, meta: &ArtifactMeta) -> Result<(), Failure> {
        let commit =
            host_member!(self, artifact_commit).ok_or_else(|| Self::missing("artifact_commit"))?;
        let meta = serde_json::to_string(meta).map_err(|error| {
            Failure::new(
                FailureCode::Internal,
                format!("the artifact's metadata is not valid JSON: {error}"),
            )
        })?;
        let mut err = Vec::new();
        // SAFETY: see above the impl; the buffer outlives the call.
        let status = unsafe {
            commit(
                self.ctx(),
                id,
                Str::borrowed(&meta),
                Sink::into_buffer(&mut err),
            )
        };
        check_status(status, &err)
    }

    fn artifact_abort(&self, id: u64) {
        if let Some(abort) = host_member!(self, artifact_abort) {
            // SAFETY: see above the impl.
            unsafe { abort(self.ctx(), id) }
        }
    }
}

/// Turns a status code and the error sink's content into a result, for either side of the boundary.
pub fn check_status(status: i32, error: &[u8]) -> Result<(), Failure> {
    if status == ffi::OK {
        return Ok(());
    }
    Err(serde_json::from_slice(error).unwrap_or_else(|_| {
        let code = match status {
            ffi::CANCELLED => FailureCode::Cancelled,
            ffi::UNSUPPORTED => FailureCode::Unsupported,
            _ => FailureCode::Internal,
        };
        let said = match String::from_utf8_lossy(error) {
            text if text.trim().is_empty() => "without saying why".to_owned(),
            text => format!("saying (no valid failure message): {}", text.trim()),
        };
        Failure::new(code, format!("the call ended with status {status}, {said}"))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Description, Device, Diagnostic, StageResult};
    use serde_json::{Value, json};
    use std::ffi::c_void;
    use std::mem::offset_of;

    /// Behaves as the stage's kind says.
    struct Fixture;

    impl Plugin for Fixture {
        fn describe(&self) -> Description {
            serde_json::from_value(json!({
                "name": "fixture", "version": "1.0.0", "devices": ["cpu"], "dtypes": ["f32"], "stages": []
            }))
            .unwrap()
        }
        fn probe(&self, host: &dyn Host) -> Result<Vec<Device>, Failure> {
            host.artifact_begin("k", "n").map(|_| Vec::new())
        }
        fn validate(&self, _host: &dyn Host, _job: &StageJob) -> Result<Vec<Diagnostic>, Failure> {
            Ok(Vec::new())
        }
        fn run(&self, host: &dyn Host, job: &StageJob) -> Result<StageResult, Failure> {
            match job.kind.as_str() {
                "panic" => panic!("on purpose, {}", job.seed),
                "panic_elsewhere" => {
                    let thread = std::thread::spawn(|| panic!("in a thread"));
                    std::panic::resume_unwind(thread.join().unwrap_err())
                }
                "cancelled" => Err(Failure::new(FailureCode::Cancelled, "as asked")),
                _ => {
                    host.log(LogLevel::Warn, "careful");
                    host.metric("loss", 3, f64::NAN);
                    host.progress(1, 2, "steps");
                    assert_eq!(host.cancelled(), Cancel::AtCheckpoint);
                    let (id, path) = host.artifact_begin("student", "x")?;
                    host.artifact_commit(id, &ArtifactMeta::default())?;
                    Ok(StageResult {
                        output: id,
                        summary: json!({"path": path}),
                    })
                }
            }
        }
    }

    fn fixture() -> &'static dyn Plugin {
        &Fixture
    }

    fn host_table(heard: &mut Vec<String>) -> HostTable {
        unsafe fn hear(ctx: *mut c_void, line: String) {
            // SAFETY: ctx is the `heard` of the test, which has one thread.
            unsafe { (*ctx.cast::<Vec<String>>()).push(line) }
        }
        unsafe fn text(text: Str) -> String {
            // SAFETY: the caller of a host member passes readable text.
            String::from_utf8(unsafe { text.bytes() }.to_vec()).unwrap()
        }
        unsafe extern "C" fn log(ctx: *mut c_void, level: u32, message: Str) {
            // SAFETY: as for `hear` and `text`; the same holds below.
            unsafe { hear(ctx, format!("log {level} {}", text(message))) }
        }
        unsafe extern "C" fn metric(ctx: *mut c_void, name: Str, step: u64, value: f64) {
            // SAFETY: see `log`.
            unsafe { hear(ctx, format!("metric {} {step} {value}", text(name))) }
        }
        unsafe extern "C" fn progress(ctx: *mut c_void, done: u64, total: u64, unit: Str) {
            // SAFETY: see `log`.
            unsafe { hear(ctx, format!("progress {done}/{total} {}", text(unit))) }
        }
        unsafe extern "C" fn cancelled(_ctx: *mut c_void) -> u32 {
            1
        }
        unsafe extern "C" fn begin(
            ctx: *mut c_void,
            kind: Str,
            name: Str,
            id: *mut u64,
            path: Sink,
            _e: Sink,
        ) -> i32 {
            // SAFETY: see `log`; id and path are valid during the call.
            unsafe {
                hear(ctx, format!("begin {} {}", text(kind), text(name)));
                *id = 7;
                path.write("/sta");
                path.write("ging");
            }
            ffi::OK
        }
        unsafe extern "C" fn commit(ctx: *mut c_void, id: u64, meta: Str, _err: Sink) -> i32 {
            // SAFETY: see `log`.
            unsafe { hear(ctx, format!("commit {id} {}", text(meta))) }
            ffi::OK
        }
        HostTable {
            struct_size: size_of::<HostTable>() as u32,
            abi_minor: 0,
            ext: std::ptr::null(),
            ctx: std::ptr::from_mut(heard).cast(),
            log: Some(log),
            metric: Some(metric),
            progress: Some(progress),
            cancelled: Some(cancelled),
            artifact_begin: Some(begin),
            artifact_commit: Some(commit),
            artifact_abort: None,
        }
    }

    fn run_kind(kind: &str, table: &HostTable) -> (i32, Value) {
        let job = json!({"stage": "s", "kind": kind, "options": {}, "seed": 5, "device": "cpu", "dtype": "f32",
            "threads": 1, "base_dir": "/"})
        .to_string();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        // SAFETY: table, text and buffers outlive the call.
        let status = unsafe {
            run(
                fixture,
                table,
                Str::borrowed(&job),
                Sink::into_buffer(&mut out),
                Sink::into_buffer(&mut err),
            )
        };
        let text = if status == ffi::OK { out } else { err };
        (status, serde_json::from_slice(&text).unwrap())
    }

    #[test]
    fn services_reach_the_host() {
        let mut heard = Vec::new();
        let (status, result) = run_kind("all", &host_table(&mut heard));
        assert_eq!(
            (status, &result["output"], &result["summary"]["path"]),
            (ffi::OK, &json!(7), &json!("/staging"))
        );
        assert_eq!(
            heard,
            [
                "log 2 careful",
                "metric loss 3 NaN",
                "progress 1/2 steps",
                "begin student x",
                "commit 7 {}"
            ]
        );
    }

    #[test]
    fn panics_become_failures_with_their_place() {
        for (kind, said) in [
            ("panic", "on purpose, 5"),
            ("panic_elsewhere", "in a thread"),
        ] {
            let (status, failure) = run_kind(kind, &host_table(&mut Vec::new()));
            let message = failure["message"].as_str().unwrap();
            assert_eq!((status, &failure["code"]), (ffi::FAILED, &json!("panic")));
            assert!(
                message.contains(said) && message.contains("export.rs:"),
                "{message}"
            );
        }
    }

    #[test]
    fn cancellation_has_its_own_status() {
        assert_eq!(
            run_kind("cancelled", &host_table(&mut Vec::new())).0,
            ffi::CANCELLED
        );
    }

    /// The outcome of `probe`, which begins an artifact, with a host's table.
    fn probed(table: *const HostTable) -> (i32, Failure) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        // SAFETY: table and buffers outlive the call.
        let status = unsafe {
            probe(
                fixture,
                table,
                Sink::into_buffer(&mut out),
                Sink::into_buffer(&mut err),
            )
        };
        (status, serde_json::from_slice(&err).unwrap())
    }

    #[test]
    fn a_member_that_a_host_lacks_is_done_without() {
        let mut heard = Vec::new();
        let table = HostTable {
            artifact_begin: None,
            ..host_table(&mut heard)
        };
        let (status, failure) = probed(&table);
        assert_eq!(status, ffi::UNSUPPORTED);
        assert!(
            failure
                .message
                .contains("this host has no `artifact_begin`")
        );
    }

    #[test]
    fn a_truncated_host_table_is_refused() {
        let mut heard = Vec::new();
        let mut table = host_table(&mut heard);
        for size in [
            0,
            4,
            offset_of!(HostTable, artifact_begin),
            ffi::SMALLEST_HOST - 1,
        ] {
            table.struct_size = size as u32;
            let (status, failure) = probed(&table);
            let said = format!("a truncated table: struct_size is {size}, at least ");
            assert!(failure.message.contains(&said), "{failure}");
            assert_eq!(status, ffi::FAILED);
        }
        assert_eq!(
            probed(std::ptr::null()).1.message,
            "the host passed no table"
        );
        assert!(heard.is_empty());
    }

    #[test]
    fn a_newer_host_is_used_as_far_as_it_is_known() {
        /// A table with members that this version does not know.
        #[repr(C)]
        struct Newer {
            known: HostTable,
            unknown: [usize; 4],
        }
        let mut heard = Vec::new();
        let known = HostTable {
            struct_size: size_of::<Newer>() as u32,
            abi_minor: 9,
            ..host_table(&mut heard)
        };
        let newer = Newer {
            known,
            unknown: [usize::MAX; 4],
        };
        let (status, result) = run_kind("all", &newer.known);
        assert_eq!(
            (status, &result["output"]),
            (ffi::OK, &json!(7)),
            "{result}"
        );
        assert_eq!(newer.unknown, [usize::MAX; 4]);
        assert!(heard.contains(&"begin student x".to_owned()), "{heard:?}");
    }

    #[test]
    fn an_unreadable_failure_still_says_something() {
        let said = check_status(9, b"boom").unwrap_err();
        assert!(
            said.message.contains("status 9") && said.message.contains("boom"),
            "{said}"
        );
        assert!(check_status(ffi::CANCELLED, b"").unwrap_err().code == FailureCode::Cancelled);
    }
}
