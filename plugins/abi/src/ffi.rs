//! The C tables of `retort_plugin.h`, mirrored. The header is the source of truth; a test compiles it and compares.
//!
//! Nothing here interprets anything: [`crate::export`] is the plugin's side of these tables, the runner's plugin host
//! the other. Function pointers are `Option`s because a foreign table may hold NULL.

use std::ffi::{c_char, c_void};
use std::mem::offset_of;

/// Major version, part of the entry symbol's name.
pub const ABI_MAJOR: u32 = 1;
/// Minor version of the tables below.
pub const ABI_MINOR: u32 = 0;
/// Name of the entry symbol.
pub const ENTRY: &str = "retort_plugin_v1";

/// The call worked.
pub const OK: i32 = 0;
/// The error sink holds a `Failure`.
pub const FAILED: i32 = 1;
/// Stopped because the host asked for it.
pub const CANCELLED: i32 = 2;
/// The callee cannot do this.
pub const UNSUPPORTED: i32 = 3;

/// Size of a host's table of minor version 0: a smaller one is truncated.
pub const SMALLEST_HOST: usize = offset_of!(HostTable, artifact_abort) + size_of::<usize>();
/// The same of a plugin's table.
pub const SMALLEST_PLUGIN: usize = offset_of!(PluginTable, run) + size_of::<usize>();

/// Longest text accepted from the other side, in bytes: far above any real one.
pub const LONGEST: u64 = 1 << 32;

/// Borrowed UTF-8 text, not NUL-terminated (`retort_str`).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Str {
    /// First byte; may be NULL when `len` is 0.
    pub data: *const c_char,
    /// Length in bytes.
    pub len: u64,
}

impl Str {
    /// Borrows a string; valid as long as the string is.
    pub fn borrowed(text: &str) -> Self {
        Self {
            data: text.as_ptr().cast(),
            len: text.len() as u64,
        }
    }

    /// The bytes.
    ///
    /// Aborts the process if the length is absurd: the caller's memory can no longer be trusted.
    ///
    /// # Safety
    /// `data` points to `len` readable bytes (or is NULL) that nobody changes during `'a`.
    pub unsafe fn bytes<'a>(self) -> &'a [u8] {
        if self.data.is_null() || self.len == 0 {
            return &[];
        }
        if self.len > LONGEST {
            eprintln!(
                "a text of {} bytes crossed the plugin boundary, {LONGEST} are allowed",
                self.len
            );
            std::process::abort();
        }
        // SAFETY: the caller vouches for data and len.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.len as usize) }
    }
}

/// Takes text out of a callee (`retort_sink`).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Sink {
    /// Passed back to `write`.
    pub ctx: *mut c_void,
    /// Copies `len` bytes before it returns; several writes are joined.
    pub write: Option<unsafe extern "C" fn(ctx: *mut c_void, data: *const c_char, len: u64)>,
}

impl Sink {
    /// A sink that appends to a buffer.
    ///
    /// The buffer must outlive every use of the sink, and be used through nothing else meanwhile.
    pub fn into_buffer(buffer: &mut Vec<u8>) -> Self {
        unsafe extern "C" fn append(ctx: *mut c_void, data: *const c_char, len: u64) {
            // SAFETY: ctx is the buffer of `into_buffer`, which its caller keeps alive and to itself; the header
            // obliges the writer to pass readable bytes.
            let (buffer, bytes) =
                unsafe { (&mut *ctx.cast::<Vec<u8>>(), Str { data, len }.bytes()) };
            buffer.extend_from_slice(bytes);
        }
        Self {
            ctx: std::ptr::from_mut(buffer).cast(),
            write: Some(append),
        }
    }

    /// Writes text into the sink; a sink without a function swallows it.
    ///
    /// # Safety
    /// The sink is valid: its owner still waits for the call that it was passed to.
    pub unsafe fn write(self, text: &str) {
        if let Some(write) = self.write {
            // SAFETY: the caller vouches for the sink; the text is readable during the call.
            unsafe { write(self.ctx, text.as_ptr().cast(), text.len() as u64) }
        }
    }
}

/// The services of the host (`retort_host`).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct HostTable {
    /// Size of the table as the host was compiled.
    pub struct_size: u32,
    /// Minor version of the host.
    pub abi_minor: u32,
    /// NULL.
    pub ext: *const c_void,
    /// First argument of every function.
    pub ctx: *mut c_void,
    /// Writes a line to the run's log.
    pub log: Option<unsafe extern "C" fn(ctx: *mut c_void, level: u32, message: Str)>,
    /// Appends a point to a series.
    pub metric: Option<unsafe extern "C" fn(ctx: *mut c_void, name: Str, step: u64, value: f64)>,
    /// Says how far the stage is.
    pub progress: Option<unsafe extern "C" fn(ctx: *mut c_void, done: u64, total: u64, unit: Str)>,
    /// Whether to go on.
    pub cancelled: Option<unsafe extern "C" fn(ctx: *mut c_void) -> u32>,
    /// Opens a staging directory.
    pub artifact_begin: Option<ArtifactBegin>,
    /// Publishes the staged files.
    pub artifact_commit:
        Option<unsafe extern "C" fn(ctx: *mut c_void, id: u64, meta_json: Str, err: Sink) -> i32>,
    /// Drops the staged files.
    pub artifact_abort: Option<unsafe extern "C" fn(ctx: *mut c_void, id: u64)>,
}

/// Type of [`HostTable::artifact_begin`].
pub type ArtifactBegin = unsafe extern "C" fn(
    ctx: *mut c_void,
    kind: Str,
    name: Str,
    id: *mut u64,
    path_out: Sink,
    err: Sink,
) -> i32;

/// What a plugin offers (`retort_plugin`).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PluginTable {
    /// Size of the table as the plugin was compiled.
    pub struct_size: u32,
    /// Minor version of the plugin.
    pub abi_minor: u32,
    /// Lowest minor version of a host that the plugin works with.
    pub min_host_minor: u32,
    /// 0.
    pub reserved: u32,
    /// NULL.
    pub ext: *const c_void,
    /// What the plugin is.
    pub describe: Option<unsafe extern "C" fn(out: Sink, err: Sink) -> i32>,
    /// Devices really present.
    pub probe: Option<unsafe extern "C" fn(host: *const HostTable, out: Sink, err: Sink) -> i32>,
    /// Checks a stage's options.
    pub validate: Option<StageCall>,
    /// Runs a stage.
    pub run: Option<StageCall>,
}

/// Type of [`PluginTable::validate`] and [`PluginTable::run`].
pub type StageCall =
    unsafe extern "C" fn(host: *const HostTable, stage_json: Str, out: Sink, err: Sink) -> i32;

// SAFETY: the tables are plain data. The plugin's is immutable for the life of the process; the header obliges the host's
// functions to be callable with ctx from several threads.
unsafe impl Sync for PluginTable {}
// SAFETY: as above.
unsafe impl Send for HostTable {}
// SAFETY: as above.
unsafe impl Sync for HostTable {}

/// Whether a table of `struct_size` bytes holds the whole of a member, and the member is set: `Option<fn>`.
///
/// The table is read through a raw pointer because a foreign table may be shorter than our struct.
///
/// # Safety
/// `$table` points to at least `struct_size` readable bytes, of which the first four are `struct_size`.
#[macro_export]
macro_rules! table_member {
    ($table:expr, $type:ty, $member:ident) => {{
        let table: *const $type = $table;
        let end = ::std::mem::offset_of!($type, $member) + ::std::mem::size_of::<usize>();
        if (*table).struct_size as usize >= end {
            (*table).$member
        } else {
            None
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::Command;

    fn header_dir() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR"))
    }

    /// Compiles a source against the header with every warning an error; returns the executable.
    fn compile(
        dir: &Path,
        compiler: &str,
        flags: &[&str],
        file: &str,
        source: &str,
    ) -> std::path::PathBuf {
        let (input, output) = (dir.join(file), dir.join(format!("{file}.bin")));
        std::fs::write(&input, source).unwrap();
        let result =
            Command::new(std::env::var(compiler.to_uppercase()).unwrap_or(compiler.into()))
                .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
                .arg(header_dir())
                .args(flags)
                .arg(&input)
                .arg("-o")
                .arg(&output)
                .output()
                .unwrap_or_else(|error| {
                    panic!("this test needs a C and a C++ compiler (`cc`, `c++`): {error}")
                });
        assert!(
            result.status.success(),
            "{}",
            String::from_utf8_lossy(&result.stderr)
        );
        output
    }

    /// Values of C expressions, as the header's compiler sees them.
    fn from_c(expressions: &[&str]) -> Vec<u64> {
        let dir = tempfile::tempdir().unwrap();
        let mut source =
            String::from("#include \"retort_plugin.h\"\n#include <stdio.h>\nint main(void) {\n");
        for expression in expressions {
            source.push_str(&format!(
                "    printf(\"%llu\\n\", (unsigned long long)({expression}));\n"
            ));
        }
        source.push_str("    return 0;\n}\n");
        let program = compile(dir.path(), "cc", &["-std=c11"], "layout.c", &source);
        let output = Command::new(program).output().unwrap();
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| line.parse().unwrap())
            .collect()
    }

    #[track_caller]
    fn check(expected: &[(&str, u64)]) {
        let expressions: Vec<&str> = expected.iter().map(|(expression, _)| *expression).collect();
        for (&(expression, ours), theirs) in expected.iter().zip(from_c(&expressions)) {
            assert_eq!(ours, theirs, "{expression}");
        }
    }

    #[test]
    fn mirror_equals_the_header() {
        macro_rules! offsets {
            ($c:literal, $rust:ty: $($member:ident),*) => {
                [
                    (concat!("sizeof(", $c, ")"), size_of::<$rust>() as u64),
                    $((concat!("offsetof(", $c, ", ", stringify!($member), ")"), offset_of!($rust, $member) as u64)),*
                ]
            };
        }
        check(&offsets!("retort_str", Str: data, len));
        check(&offsets!("retort_sink", Sink: ctx, write));
        check(
            &offsets!("retort_host", HostTable: struct_size, abi_minor, ext, ctx, log, metric, progress, cancelled,
            artifact_begin, artifact_commit, artifact_abort),
        );
        check(
            &offsets!("retort_plugin", PluginTable: struct_size, abi_minor, min_host_minor, reserved, ext, describe,
            probe, validate, run),
        );
    }

    #[test]
    fn constants_equal_the_header() {
        use crate::host::{Cancel, LogLevel};
        check(&[
            ("RETORT_ABI_MAJOR", ABI_MAJOR.into()),
            ("RETORT_ABI_MINOR", ABI_MINOR.into()),
            ("RETORT_OK", OK as u64),
            ("RETORT_FAILED", FAILED as u64),
            ("RETORT_CANCELLED", CANCELLED as u64),
            ("RETORT_UNSUPPORTED", UNSUPPORTED as u64),
            ("RETORT_LOG_ERROR", LogLevel::Error as u64),
            ("RETORT_LOG_WARN", LogLevel::Warn as u64),
            ("RETORT_LOG_INFO", LogLevel::Info as u64),
            ("RETORT_LOG_DEBUG", LogLevel::Debug as u64),
            ("RETORT_LOG_TRACE", LogLevel::Trace as u64),
            ("RETORT_CANCEL_RUN", Cancel::Run as u64),
            ("RETORT_CANCEL_CHECKPOINT", Cancel::AtCheckpoint as u64),
            ("RETORT_CANCEL_NOW", Cancel::Now as u64),
            ("sizeof(RETORT_ENTRY) - 1", ENTRY.len() as u64),
        ]);
    }

    #[test]
    fn header_is_clean_c_and_cpp() {
        // A complete table, one of a newer version, one that ends before a member, and one that lacks the member.
        let source = "#include \"retort_plugin.h\"\n\
            static int32_t run(const retort_host *host, retort_str job, retort_sink out, retort_sink err) {\n\
            (void)host, (void)job, (void)out, (void)err; return RETORT_OK; }\n\
            static int has_run(uint32_t size, int set) {\n\
            retort_plugin p = {size, 0, 0, 0, NULL, NULL, NULL, NULL, NULL}; if (set) p.run = run;\n\
            return RETORT_HAS(&p, run); }\n\
            int main(void) { uint32_t size = sizeof(retort_plugin);\n\
            return !(has_run(size, 1) && has_run(size + 64, 1) && !has_run(size - 1, 1) && !has_run(size, 0)); }\n";
        let dir = tempfile::tempdir().unwrap();
        for (compiler, standard, file) in [
            ("cc", "-std=c11", "plugin.c"),
            ("cc", "-std=c17", "plugin.c"),
            ("c++", "-std=c++17", "plugin.cpp"),
        ] {
            let program = compile(dir.path(), compiler, &[standard], file, source);
            assert!(
                Command::new(program).status().unwrap().success(),
                "{compiler} {standard}"
            );
        }
    }

    /// Finds values of a job, writes them as JSON, and reads every prefix of the job from memory that ends with it.
    const READER: &str = r#"
        #include "retort_text.h"
        #include <stdio.h>
        static void all(retort_str job) {
            char text[64];
            static retort_buffer kept;
            kept.len = 0;
            printf("%llu\n", (unsigned long long)retort_json_u64(job, "/seed", 7));
            printf("%.3f\n", retort_json_double(job, "/options/rate", -1));
            printf("%llu\n", (unsigned long long)retort_json_u64(job, "/options/rate", 7));
            printf("%llu\n", (unsigned long long)retort_json_u64(job, "/options/list/1/x", 7));
            printf("%llu\n", (unsigned long long)retort_json_u64(job, "/options/none", 7));
            if (retort_json_copy(job, "/options/text", text, sizeof text)) {
                retort_put_json(retort_into(&kept), text);
                puts(kept.text);
            }
            printf("%d\n", retort_json_copy(job, "/options/text", text, 8));
            printf("%d\n", retort_json_at(job, "/options/list").data != NULL);
        }
        int main(int argc, char **argv) {
            size_t length = strlen(argv[argc - 1]);
            if (argc == 2) {
                all(retort_string(argv[1]));
                return 0;
            }
            for (size_t n = 0; n <= length; n++) {
                char *cut = (char *)malloc(n + 1);
                memcpy(cut, argv[2], n);
                retort_str job = {n ? cut : NULL, n};
                all(job);
                free(cut);
            }
            return 0;
        }"#;

    #[test]
    fn text_of_c_plugins_reads_jobs() {
        let text = "a\"b\\\n\u{1}\u{e9}\u{20ac}\u{1F600}/";
        let job = serde_json::json!({"seed": u64::MAX, "text": "not this", "options": {
            "list": [{"x": 1, "y": "]}"}, {"x": 42}], "rate": 2.5e-1, "text": text}});
        // As the host writes it, with spaces, and with every character escaped that can be.
        let escaped = job
            .to_string()
            .replace('\u{1F600}', "\\ud83d\\ude00")
            .replace('/', "\\/");
        let dir = tempfile::tempdir().unwrap();
        for (compiler, standard, file) in [
            ("cc", "-std=c11", "text.c"),
            ("c++", "-std=c++17", "text.cpp"),
        ] {
            let program = compile(dir.path(), compiler, &[standard], file, READER);
            let say = |arguments: &[&str]| {
                let output = Command::new(&program).args(arguments).output().unwrap();
                assert!(output.status.success(), "{output:?}");
                String::from_utf8_lossy(&output.stdout).into_owned()
            };
            for job in [job.to_string(), format!("{job:#}"), escaped.clone()] {
                let said = say(&[&job]);
                let lines: Vec<&str> = said.lines().collect();
                assert_eq!(
                    lines[..5],
                    ["18446744073709551615", "0.250", "7", "42", "7"]
                );
                assert_eq!(
                    serde_json::from_str::<String>(lines[5]).unwrap(),
                    text,
                    "{said}"
                );
                assert_eq!(lines[6..], ["0", "1"]);
                say(&["each beginning", &job]);
            }
        }
    }

    #[test]
    fn members_beyond_struct_size_are_absent() {
        unsafe extern "C" fn describe(_out: Sink, _err: Sink) -> i32 {
            OK
        }
        let mut table = PluginTable {
            struct_size: size_of::<PluginTable>() as u32,
            abi_minor: 0,
            min_host_minor: 0,
            reserved: 0,
            ext: std::ptr::null(),
            describe: Some(describe),
            probe: None,
            validate: None,
            run: None,
        };
        // SAFETY: the table is ours and whole.
        unsafe {
            assert!(table_member!(&table, PluginTable, describe).is_some());
            assert!(table_member!(&table, PluginTable, run).is_none(), "NULL");
            table.struct_size = offset_of!(PluginTable, describe) as u32 + 7;
            assert!(
                table_member!(&table, PluginTable, describe).is_none(),
                "cut through the member"
            );
        }
    }
}
