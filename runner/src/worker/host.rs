//! The host's side of a plugin: loading a shared object, calling its table. Used only in a worker process.
//!
//! In: a path. Out: the four calls of `retort_plugin.h` as functions over messages, or a precise reason why the file
//! is no plugin for this host. Deliberately absent: searching for plugins; the services given to the plugin (the
//! worker's), processes.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use retort_abi::ffi::{self, HostTable, PluginTable, Sink, StageCall, Str};
use retort_abi::{
    Description, Device, Diagnostic, Failure, FailureCode, StageJob, StageResult, export,
    table_member,
};
use retort_checkpoint::regular;
use serde::de::DeserializeOwned;

use crate::input::{self, FileStamp};
use crate::trust::{self, TrustError};

/// A loaded plugin. It stays loaded until the process ends.
#[derive(Debug, Clone, Copy)]
pub struct LoadedPlugin {
    describe: unsafe extern "C" fn(Sink, Sink) -> i32,
    probe: unsafe extern "C" fn(*const HostTable, Sink, Sink) -> i32,
    validate: StageCall,
    run: StageCall,
}

/// Why a file could not be loaded as a plugin.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Other users could change it.
    #[error(transparent)]
    Untrusted(#[from] TrustError),
    /// It cannot be read.
    #[error("cannot read the plugin {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It is not the planned file, or is just being written.
    #[error("{} is not the file it was when the run was planned", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{} is not a shared object", path.display())]
    NotASharedObject {
        /// The file.
        path: PathBuf,
    },
    /// The dynamic linker refuses it.
    #[error("{} cannot be loaded: {reason}", path.display())]
    NotLoadable {
        /// The file.
        path: PathBuf,
        /// The linker's message.
        reason: String,
    },
    /// A shared object, but no plugin.
    #[error("{} is a shared object but not a retort plugin: it does not export `{}`", path.display(), ffi::ENTRY)]
    NoEntry {
        /// The file.
        path: PathBuf,
    },
    /// A plugin of another generation.
    #[error(
        "{} speaks plugin ABI {found}, this retort speaks ABI {}.{}", path.display(), ffi::ABI_MAJOR, ffi::ABI_MINOR
    )]
    OtherMajor {
        /// The file.
        path: PathBuf,
        /// Its major version.
        found: u32,
    },
    /// A plugin that needs a newer host.
    #[error(
        "{} needs a host with plugin ABI {}.{needs} or later, this retort speaks ABI {}.{}",
        path.display(), ffi::ABI_MAJOR, ffi::ABI_MAJOR, ffi::ABI_MINOR
    )]
    NeedsNewerHost {
        /// The file.
        path: PathBuf,
        /// The minor version it needs.
        needs: u32,
    },
    /// Its table is invalid.
    #[error("{}: `{}` returned {problem}", path.display(), ffi::ENTRY)]
    BadTable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl LoadError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Untrusted(error) => return error.hint(),
            Self::Unreadable { .. } => return None,
            Self::Changed { .. } => "run again: the plan will know the new one",
            Self::NotASharedObject { .. } => {
                "a plugin is a file like libretort_candle.so, made by a build"
            }
            Self::NotLoadable { .. } => {
                "a library it needs may be missing or have moved (`ldd` on the file tells): build the plugin again"
            }
            Self::NoEntry { .. } => {
                "plugins are built against retort_plugin.h, in Rust with `export_plugin!`"
            }
            Self::OtherMajor { found, .. } if *found < ffi::ABI_MAJOR => {
                "use a newer build of the plugin"
            }
            Self::OtherMajor { .. } | Self::NeedsNewerHost { .. } => {
                "update retort, or use an older plugin"
            }
            Self::BadTable { .. } => {
                "this is a bug of the plugin; retort_plugin.h says what the table must hold"
            }
        };
        Some(text.to_owned())
    }
}

impl LoadedPlugin {
    /// Loads a plugin. Runs its initialisers: they may do anything to this process, a worker.
    ///
    /// # Errors
    /// [`LoadError`].
    /// `planned`: the hash that it must have. The loaded bytes are those that were hashed.
    pub fn load(path: &Path, planned: Option<&str>) -> Result<Self, LoadError> {
        let unreadable = |source| LoadError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let changed = || LoadError::Changed {
            path: path.to_owned(),
        };
        let file = regular::open(path).map_err(unreadable)?;
        check_magic(path, &file)?;
        trust::check_owner(path)?;
        let stamp = FileStamp::of(&file.metadata().map_err(unreadable)?);
        if let Some(planned) = planned {
            let copy = file.try_clone().map_err(unreadable)?;
            let hash = input::content_hash(copy).map_err(unreadable)?;
            if hash.to_hex().as_str() != planned {
                return Err(changed());
            }
        }
        let place = match needs_its_place(&file).map_err(unreadable)? {
            // It is loaded by its own path then, through directories that no other user can write to.
            true if fs::metadata(path).is_ok_and(|found| FileStamp::of(&found) == stamp) => {
                path.to_owned()
            }
            true => return Err(changed()),
            false => opened(path, &file),
        };
        // SAFETY: loading runs the plugin's initialisers. Plugins are trusted code; the worker process contains faults.
        let library =
            unsafe { Library::open(Some(&place), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
                LoadError::NotLoadable {
                    path: path.to_owned(),
                    reason: linker_says(&error),
                }
            })?;
        // Never closed: the linker knows the plugin by its descriptor's number, which must not be reused.
        let file: &'static File = Box::leak(Box::new(file));
        if FileStamp::of(&file.metadata().map_err(unreadable)?) != stamp {
            return Err(changed());
        }
        // Never unloaded: its threads and thread-locals may outlive any moment we could choose.
        let library: &'static Library = Box::leak(Box::new(library));
        // SAFETY: `retort_plugin.h` gives the symbol of this name this type.
        let entry = unsafe {
            library.get::<unsafe extern "C" fn() -> *const PluginTable>(ffi::ENTRY.as_bytes())
        };
        let Ok(entry) = entry else {
            return Err(no_entry(library, path));
        };
        // SAFETY: the header promises that the entry only returns a pointer to a table, or NULL.
        let table = unsafe { entry() };
        // SAFETY: a table that is not NULL begins with a true struct_size, says the header.
        unsafe { Self::from_table(table) }.map_err(|problem| match problem {
            TableError::NeedsNewerHost(needs) => LoadError::NeedsNewerHost {
                path: path.to_owned(),
                needs,
            },
            TableError::Bad(problem) => LoadError::BadTable {
                path: path.to_owned(),
                problem,
            },
        })
    }

    /// # Safety
    /// `table` is NULL or points to a table whose first member is its size.
    unsafe fn from_table(table: *const PluginTable) -> Result<Self, TableError> {
        if table.is_null() {
            return Err(TableError::Bad("no table (NULL)".into()));
        }
        if !table.is_aligned() {
            return Err(TableError::Bad("a misaligned pointer".into()));
        }
        // SAFETY: the caller vouches for the first member.
        let size = unsafe { (*table).struct_size } as usize;
        if size < ffi::SMALLEST_PLUGIN {
            return Err(TableError::Bad(format!(
                "a truncated table: struct_size is {size}, at least {} is required",
                ffi::SMALLEST_PLUGIN
            )));
        }
        // SAFETY: the table is at least as large as ours, going by the size that the caller vouches for.
        let needs = unsafe { (*table).min_host_minor };
        if needs > ffi::ABI_MINOR {
            return Err(TableError::NeedsNewerHost(needs));
        }
        macro_rules! required {
            ($member:ident) => {
                // SAFETY: as above.
                unsafe { table_member!(table, PluginTable, $member) }.ok_or_else(|| {
                    TableError::Bad(concat!("a table without `", stringify!($member), "`").into())
                })?
            };
        }
        Ok(Self {
            describe: required!(describe),
            probe: required!(probe),
            validate: required!(validate),
            run: required!(run),
        })
    }

    /// The plugin's description of itself.
    ///
    /// # Errors
    /// The plugin's failure, or an invalid answer.
    pub fn describe(&self) -> Result<Description, Failure> {
        // SAFETY: the plugin's table is valid for good; `call` gives sinks that outlive the call.
        call("describe", |out, err| unsafe { (self.describe)(out, err) })
    }

    /// The devices that are present.
    ///
    /// # Errors
    /// As [`LoadedPlugin::describe`].
    pub fn probe(&self, host: &HostTable) -> Result<Vec<Device>, Failure> {
        // SAFETY: as above; the host's table is borrowed for the call.
        call("probe", |out, err| unsafe { (self.probe)(host, out, err) })
    }

    /// The plugin's own checks of a stage's options.
    ///
    /// # Errors
    /// As [`LoadedPlugin::describe`].
    pub fn validate(&self, host: &HostTable, job: &StageJob) -> Result<Vec<Diagnostic>, Failure> {
        let job = job_text(job)?;
        // SAFETY: as above; the job's text is borrowed for the call.
        call("validate", |out, err| unsafe {
            (self.validate)(host, Str::borrowed(&job), out, err)
        })
    }

    /// Runs a stage.
    ///
    /// # Errors
    /// As [`LoadedPlugin::describe`].
    pub fn run(&self, host: &HostTable, job: &StageJob) -> Result<StageResult, Failure> {
        let job = job_text(job)?;
        // SAFETY: as above; the job's text is borrowed for the call.
        call("run", |out, err| unsafe {
            (self.run)(host, Str::borrowed(&job), out, err)
        })
    }
}

enum TableError {
    NeedsNewerHost(u32),
    Bad(String),
}

/// Makes a call whose answer is JSON.
fn call<T: DeserializeOwned>(
    name: &str,
    function: impl FnOnce(Sink, Sink) -> i32,
) -> Result<T, Failure> {
    // Never dropped: a thread of the plugin may still write to them after the call has returned.
    let (out, err): (&mut Vec<u8>, &mut Vec<u8>) =
        (Box::leak(Box::default()), Box::leak(Box::default()));
    let status = function(Sink::into_buffer(out), Sink::into_buffer(err));
    let (out, err) = (std::mem::take(out), std::mem::take(err));
    export::check_status(status, &err)?;
    serde_json::from_slice(&out).map_err(|error| {
        let start: String = String::from_utf8_lossy(&out).chars().take(200).collect();
        Failure::new(
            FailureCode::Internal,
            format!("the plugin's answer to `{name}` is invalid: {error}"),
        )
        .hint(format!(
            "this is a bug of the plugin; its answer begins with: {start}"
        ))
    })
}

fn job_text(job: &StageJob) -> Result<String, Failure> {
    serde_json::to_string(job).map_err(|error| {
        Failure::new(
            FailureCode::Internal,
            format!("the job cannot be written as JSON: {error}"),
        )
    })
}

/// Recognises files that are not shared objects by their first bytes, because linkers' messages differ.
fn check_magic(path: &Path, file: &File) -> Result<(), LoadError> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(LoadError::NotASharedObject {
                path: path.to_owned(),
            })
        }
        Err(source) => Err(LoadError::Unreadable {
            path: path.to_owned(),
            source,
        }),
        Ok(()) if cfg!(target_os = "linux") && magic != *b"\x7fELF" => {
            Err(LoadError::NotASharedObject {
                path: path.to_owned(),
            })
        }
        Ok(()) => Ok(()),
    }
}

/// A path by which the linker gets exactly this open file, even if its own path has been replaced since.
fn opened(path: &Path, file: &File) -> PathBuf {
    match cfg!(target_os = "linux") {
        true => format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        false => path.to_owned(),
    }
}

/// Whether the file looks for libraries in its own directory (`$ORIGIN`): the linker then needs its real path.
fn needs_its_place(file: &File) -> io::Result<bool> {
    let mut bytes = vec![0; 1 << 20];
    let mut position = 0;
    loop {
        let read = file.read_at(&mut bytes, position)?;
        let found = |words: &[u8]| bytes[..read].windows(words.len()).any(|part| part == words);
        if found(b"$ORIGIN") || found(b"${ORIGIN}") {
            return Ok(true);
        }
        // The pieces overlap, so that a word at the end of one is whole in the next.
        let step = read.saturating_sub(16);
        if step == 0 {
            return Ok(false);
        }
        position += step as u64;
    }
}

/// The linker's message, which libloading keeps as the source of its error.
fn linker_says(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}

/// Whether the shared object is a plugin of another generation, or none at all.
fn no_entry(library: &Library, path: &Path) -> LoadError {
    let other = (0..100).find(|major| {
        let name = format!("retort_plugin_v{major}");
        // SAFETY: the symbol is only looked up, never called.
        *major != ffi::ABI_MAJOR && unsafe { library.get::<*const ()>(name.as_bytes()) }.is_ok()
    });
    match other {
        Some(found) => LoadError::OtherMajor {
            path: path.to_owned(),
            found,
        },
        None => LoadError::NoEntry {
            path: path.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    unsafe extern "C" fn describe(out: Sink, _err: Sink) -> i32 {
        // SAFETY: `call` passes valid sinks.
        unsafe { out.write("{}") };
        ffi::OK
    }
    unsafe extern "C" fn probe(_host: *const HostTable, _out: Sink, err: Sink) -> i32 {
        // SAFETY: `call` passes valid sinks.
        unsafe { err.write("{\"code\": \"out_of_memory\", \"message\": \"full\"}") };
        ffi::FAILED
    }
    unsafe extern "C" fn stage(_host: *const HostTable, _job: Str, _out: Sink, _err: Sink) -> i32 {
        ffi::UNSUPPORTED
    }

    const TABLE: PluginTable = export::table(describe, probe, stage, stage);

    #[track_caller]
    fn check(table: PluginTable, expected: &str) {
        // SAFETY: the table is ours; a smaller struct_size than the truth is still readable.
        match unsafe { LoadedPlugin::from_table(&table) } {
            Ok(_) => assert_eq!("loaded", expected),
            Err(TableError::NeedsNewerHost(minor)) => {
                assert_eq!(format!("needs {minor}"), expected)
            }
            Err(TableError::Bad(problem)) => assert_eq!(problem, expected),
        }
    }

    #[test]
    fn tables_are_checked() {
        let size = size_of::<PluginTable>() as u32;
        check(TABLE, "loaded");
        check(
            PluginTable {
                struct_size: size + 800,
                abi_minor: 9,
                ..TABLE
            },
            "loaded",
        );
        check(
            PluginTable {
                min_host_minor: 3,
                ..TABLE
            },
            "needs 3",
        );
        check(PluginTable { run: None, ..TABLE }, "a table without `run`");
        let truncated = offset_of!(PluginTable, run) as u32;
        check(
            PluginTable {
                struct_size: truncated,
                ..TABLE
            },
            &format!("a truncated table: struct_size is {truncated}, at least {size} is required"),
        );
    }

    #[test]
    fn failures_and_bad_answers_are_told_apart() {
        // SAFETY: the table is ours and whole.
        let Ok(plugin) = (unsafe { LoadedPlugin::from_table(&TABLE) }) else {
            panic!("not loaded")
        };
        let said = plugin.describe().unwrap_err();
        assert!(
            said.message.contains("`describe`") && said.message.contains("missing field"),
            "{said}"
        );
        assert_eq!(
            call::<u8>("probe", |out, err| {
                // SAFETY: this test's `probe` reads no host and writes to the sinks only.
                unsafe { probe(std::ptr::null(), out, err) }
            })
            .unwrap_err()
            .message,
            "full"
        );
    }

    #[test]
    fn files_that_are_no_plugins_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text.so");
        std::fs::write(&text, "not a shared object").unwrap();
        assert!(matches!(
            LoadedPlugin::load(&text, None),
            Err(LoadError::NotASharedObject { .. })
        ));
        assert!(matches!(
            LoadedPlugin::load(&dir.path().join("nothing.so"), None),
            Err(LoadError::Unreadable { .. })
        ));
        let elf = dir.path().join("elf.so");
        std::fs::write(&elf, b"\x7fELF and then nonsense").unwrap();
        assert!(matches!(
            LoadedPlugin::load(&elf, None),
            Err(LoadError::NotLoadable { .. })
        ));
    }
}
