//! `retort doctor`: checks this machine and installation, and suggests repairs.

use std::path::{Path, PathBuf};

use clap::ValueHint;
use serde_json::json;
use tokio::runtime::Runtime;

use crate::cli::{Context, Error, Exit, Format, FormatArgs, gc, output};
use crate::cluster::slurm::{Slurm, SlurmError};
use crate::draft;
use crate::plugin::{self, Plugins, search_dirs};
use crate::settings::{Executor, Settings};
use crate::store::{self, Access, RunFilter, RunState, Store, StoreError};
use crate::table::{Cell, CellStyle, Rows, bytes};

/// Less free space than this is worth a warning, in bytes.
const LITTLE_SPACE: u64 = 1 << 30;
/// Less free memory than this is worth a warning, in bytes.
const LITTLE_MEMORY: u64 = 2 << 30;

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A recipe, whose directory's settings are shown; without it those of the working directory.
    #[arg(value_name = "RECIPE", value_hint = ValueHint::FilePath)]
    pub recipe: Option<PathBuf>,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// One check.
struct Check {
    what: String,
    verdict: Verdict,
    detail: String,
    repair: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warning,
    Error,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "good",
            Self::Warning => "odd",
            Self::Error => "bad",
        }
    }
}

impl Check {
    fn new(what: impl Into<String>, verdict: Verdict, detail: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            verdict,
            detail: detail.into(),
            repair: None,
        }
    }

    fn repair(mut self, repair: impl Into<String>) -> Self {
        self.repair = Some(repair.into());
        self
    }
}

/// Checks the machine and the installation.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let runtime = context.runtime()?;
    let mut checks = vec![installation(), processors(), memory()];
    let store = check_store(&runtime, &context.store, &mut checks);
    checks.push(space(&context.store));
    plugins(&runtime, context, store.as_ref(), &mut checks);
    cluster(&runtime, context, recipe_dir(args)?, &mut checks);
    drafts(&mut checks);
    output::print(&text(&checks, args, context))?;
    match checks
        .iter()
        .filter(|check| check.verdict == Verdict::Error)
        .count()
    {
        0 => Ok(()),
        bad => Err(Error::new(
            Exit::Internal,
            format!("{bad} of {} checks failed", checks.len()),
        )),
    }
}

/// The directory whose settings count.
fn recipe_dir(args: &Args) -> Result<&Path, Error> {
    let Some(recipe) = &args.recipe else {
        return Ok(Path::new("."));
    };
    if !recipe.is_file() {
        let message = format!("there is no recipe {}", recipe.display());
        return Err(Error::new(Exit::Usage, message));
    }
    Ok(recipe.parent().unwrap_or(Path::new(".")))
}

fn text(checks: &[Check], args: &Args, context: &Context) -> String {
    if args.format.get() == Format::Json {
        let list: Vec<_> = checks
            .iter()
            .map(|check| {
                json!({"check": check.what, "verdict": check.verdict.name(), "detail": check.detail,
                    "repair": check.repair})
            })
            .collect();
        return format!("{:#}\n", json!(list));
    }
    let mut rows = Rows::new(&["check", "verdict", "detail", "repair"]);
    for check in checks {
        let cell_style = match check.verdict {
            Verdict::Ok => CellStyle::Ok,
            Verdict::Warning => CellStyle::Warning,
            Verdict::Error => CellStyle::Error,
        };
        let repair = check.repair.clone().map_or_else(Cell::none, Cell::from);
        let verdict = Cell::from(check.verdict.name()).style(cell_style);
        rows.push([
            check.what.as_str().into(),
            verdict,
            check.detail.as_str().into(),
            repair,
        ]);
    }
    rows.render(args.format.style(context))
}

fn installation() -> Check {
    let version = env!("CARGO_PKG_VERSION");
    match std::env::current_exe() {
        Ok(path) => Check::new(
            "retort",
            Verdict::Ok,
            format!("{version}, {}", path.display()),
        ),
        Err(error) => Check::new(
            "retort",
            Verdict::Warning,
            format!("{version}, its file is unknown: {error}"),
        )
        .repair("plugins beside the executable are not found; use --plugin-dir"),
    }
}

fn processors() -> Check {
    match std::thread::available_parallelism() {
        Ok(cores) => Check::new("processors", Verdict::Ok, format!("{cores} usable")),
        Err(error) => Check::new(
            "processors",
            Verdict::Warning,
            format!("not known: {error}"),
        )
        .repair("set `threads` in recipes"),
    }
}

fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
    };
    match (value("MemAvailable:"), value("MemTotal:")) {
        (Some(free), Some(total)) => {
            let detail = format!("{} of {} available", bytes(free), bytes(total));
            if free < LITTLE_MEMORY {
                return Check::new("memory", Verdict::Warning, detail)
                    .repair("end other programs before training");
            }
            Check::new("memory", Verdict::Ok, detail)
        }
        _ => Check::new("memory", Verdict::Warning, "not known on this system"),
    }
}

fn check_store(runtime: &Runtime, dir: &Path, checks: &mut Vec<Check>) -> Option<Store> {
    let shown = dir.display();
    let opened = runtime.block_on(Store::open(dir, Access::ReadOnly));
    let store = match opened {
        Ok(store) => store,
        Err(StoreError::Missing { .. }) => {
            checks.push(Check::new(
                "store",
                Verdict::Ok,
                format!("{shown} is not there yet; the first run makes it"),
            ));
            return None;
        }
        Err(error @ StoreError::Damaged { .. }) => {
            checks.push(Check::new("store", Verdict::Error, error.to_string()).repair(SALVAGE));
            checks.push(salvage(runtime, dir));
            return None;
        }
        Err(error @ StoreError::HistoryGone { .. }) => {
            checks.push(
                Check::new("store", Verdict::Error, error.to_string()).repair(after_loss(dir)),
            );
            return None;
        }
        Err(error) => {
            let repair = "move it away, or choose another with --store";
            checks.push(Check::new("store", Verdict::Error, error.to_string()).repair(repair));
            return None;
        }
    };
    let problems = runtime
        .block_on(store.problems())
        .unwrap_or_else(|error| vec![error.to_string()]);
    if let Some(first) = problems.first() {
        let detail = format!(
            "{shown} is damaged in {}: {first}",
            output::count(problems.len(), "place")
        );
        checks.push(Check::new("store", Verdict::Error, detail).repair(SALVAGE));
        checks.push(salvage(runtime, dir));
        return Some(store);
    }
    match runtime.block_on(store.list_runs(&RunFilter::default())) {
        Ok(runs) => {
            let lost = runs
                .iter()
                .filter(|run| run.state == RunState::Lost)
                .count();
            checks.push(Check::new(
                "store",
                Verdict::Ok,
                format!("{shown}: {} runs, {lost} of them lost", runs.len()),
            ));
        }
        Err(error) => checks.push(Check::new("store", Verdict::Error, error.to_string())),
    }
    if let Ok(garbage) = runtime.block_on(store.garbage()) {
        let unknown = gc::strangers(dir, &garbage);
        if unknown > 0 {
            let detail = format!(
                "{} older than all runs of the history, which knows nothing of them: it was emptied or replaced",
                output::count(unknown, "artifact")
            );
            checks.push(Check::new("artifacts", Verdict::Warning, detail).repair(after_loss(dir)));
        }
    }
    checks.push(privacy(dir));
    match tempfile::Builder::new().prefix(".doctor").tempfile_in(dir) {
        Ok(_) => checks.push(Check::new("store is writable", Verdict::Ok, "yes")),
        Err(error) => checks.push(
            Check::new("store is writable", Verdict::Error, error.to_string())
                .repair("correct its permissions, or choose another with --store"),
        ),
    }
    Some(store)
}

/// Advice when the history is missing: first, restore an existing copy.
fn after_loss(dir: &Path) -> String {
    let backups = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut backups: Vec<_> = backups
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("history.schema") && name.ends_with(".backup.db"))
        .collect();
    backups.sort();
    let shown = dir.display();
    let copy = match backups.last() {
        Some(backup) => format!(
            "copy {shown}/{backup}, made before a migration, to {shown}/history.db, or a newer copy if there is one"
        ),
        None => format!("put a copy of it back in its place, {shown}/history.db"),
    };
    format!(
        "{copy}; without any, move {shown} away, begin a new store, and `retort runs import` earlier exports: \
         artifacts without a history are not reused"
    )
}

/// Whether other users may read the history, which contains command arguments.
fn privacy(dir: &Path) -> Check {
    use std::os::unix::fs::PermissionsExt;
    let open: Vec<String> = ["history.db", "history.db-wal"]
        .into_iter()
        .filter(|name| {
            std::fs::metadata(dir.join(name))
                .is_ok_and(|file| file.permissions().mode() & 0o007 != 0)
        })
        .map(|name| dir.join(name).display().to_string())
        .collect();
    let what = "store is private";
    // A closed directory protects its contents.
    let closed = std::fs::metadata(dir).is_ok_and(|dir| dir.permissions().mode() & 0o001 == 0);
    match open.is_empty() || closed {
        true => Check::new(what, Verdict::Ok, "yes"),
        false => Check::new(
            what,
            Verdict::Warning,
            "everybody on this machine can read its history, including --set values",
        )
        .repair(format!("chmod o-rwx {}", open.join(" "))),
    }
}

const SALVAGE: &str = "save what can be read (`retort runs export -o saved.db`), move the store away, and \
    `retort runs import saved.db` into a new one";

/// What can be saved of a damaged store, tried out in a temporary directory.
fn salvage(runtime: &Runtime, dir: &Path) -> Check {
    let what = "what can be saved";
    let tried = tempfile::tempdir()
        .map_err(|error| error.to_string())
        .and_then(|draft| {
            let to = draft.path().join("saved.db");
            let saved = runtime.block_on(store::export(dir, None, &to, false));
            saved.map_err(|error| error.to_string())
        });
    match tried {
        Err(error) => Check::new(what, Verdict::Error, format!("nothing: {error}")),
        Ok(saved) => {
            let (runs, lost) = (output::count(saved.runs.len(), "run"), saved.lost.len());
            let detail = match saved.lost.first() {
                None => format!("{runs}, whole"),
                Some(first) => format!("{runs}, without {}: {first}", output::count(lost, "piece")),
            };
            Check::new(what, Verdict::Warning, detail)
        }
    }
}

/// Free space on the store's disk.
fn space(dir: &Path) -> Check {
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    let there = dir.ancestors().find(|dir| dir.exists()).unwrap_or(&dir);
    match free_space(there) {
        Some(free) if free < LITTLE_SPACE => {
            Check::new("disk", Verdict::Warning, format!("{} free", bytes(free)))
                .repair("free some space, or choose another disk with --store")
        }
        Some(free) => Check::new("disk", Verdict::Ok, format!("{} free", bytes(free))),
        None => Check::new("disk", Verdict::Warning, "the free space is unknown"),
    }
}

fn free_space(dir: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes()).ok()?;
    // SAFETY: the path is a C string, and the structure is filled by the call when it succeeds.
    unsafe {
        let mut status: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &mut status) == 0)
            .then(|| status.f_bavail.saturating_mul(status.f_frsize))
    }
}

/// Leftovers of killed commands in the working directory.
fn drafts(checks: &mut Vec<Check>) {
    for path in draft::abandoned(Path::new(".")) {
        let what = format!("{} was left by a command that was killed", path.display());
        let repair =
            "remove it; the next `artifacts export` or `dataset merge` into this directory does";
        checks.push(Check::new("draft", Verdict::Warning, what).repair(repair));
    }
}

/// The executor for recipes here, the origin of that setting, and whether the cluster responds.
fn cluster(runtime: &Runtime, context: &Context, dir: &Path, checks: &mut Vec<Check>) {
    let settings = match Settings::read(dir, &context.given()) {
        Ok(settings) => settings,
        Err(error) => {
            let check = Check::new("settings", Verdict::Error, error.message);
            checks.push(match error.hint {
                Some(hint) => check.repair(hint),
                None => check,
            });
            return;
        }
    };
    for (name, value, origin) in settings.list() {
        checks.push(Check::new(name, Verdict::Ok, format!("{value} ({origin})")));
    }
    for path in settings.untrusted() {
        let what = format!("{path} has lines that run in jobs, and is not trusted as it is now");
        let check = Check::new("settings", Verdict::Warning, what);
        checks.push(check.repair("read it, then run `retort trust` in its directory".to_owned()));
    }
    let wanted = settings.executor().0 == Executor::Slurm;
    let slurm = Slurm::default();
    match runtime.block_on(slurm.greet()) {
        Ok(version) => {
            let accounts = match runtime.block_on(slurm.keeps_accounts()) {
                true => "keeps accounts",
                false => "no accounting: why a job ended is known only while Slurm remembers it",
            };
            checks.push(Check::new(
                "slurm",
                Verdict::Ok,
                format!("{version}, {accounts}"),
            ));
        }
        Err(SlurmError::NotInstalled { .. }) if !wanted => {}
        Err(error) => {
            let verdict = if wanted {
                Verdict::Error
            } else {
                Verdict::Warning
            };
            checks.push(
                Check::new("slurm", verdict, error.to_string()).repair(
                    "run on a machine that submits to the cluster, or with --executor local",
                ),
            );
        }
    }
}

fn plugins(runtime: &Runtime, context: &Context, store: Option<&Store>, checks: &mut Vec<Check>) {
    let dirs = search_dirs(&context.plugin_dirs);
    let plugins = Plugins::new(dirs.clone(), runtime, store);
    let all = plugin::find_all(&dirs);
    if all.is_empty() {
        checks.push(
            Check::new("plugins", Verdict::Error, "none found")
                .repair("build one (`make`), or name its directory with --plugin-dir"),
        );
    }
    for (name, build) in plugin::OWN {
        if !all.is_empty() && !all.iter().any(|found| found.name == name) {
            checks.push(
                Check::new(format!("plugin {name}"), Verdict::Ok, "not built")
                    .repair(format!("`{build}`, if recipes should use it")),
            );
        }
    }
    for (name, variant, build) in plugin::OWN_VARIANTS {
        let own = |found: &plugin::PluginFile| found.variant.as_deref() == Some(variant);
        let built = |found: &plugin::PluginFile| found.name == name && own(found);
        if all.iter().any(|found| found.name == name) && !all.iter().any(built) {
            checks.push(
                Check::new(
                    format!("plugin {name}, {variant}"),
                    Verdict::Ok,
                    "not built",
                )
                .repair(format!("`{build}`, for NVIDIA GPUs")),
            );
        }
    }
    for found in all {
        let what = match &found.variant {
            Some(variant) => format!("plugin {}, {variant}", found.name),
            None => format!("plugin {}", found.name),
        };
        let checked = plugins
            .describe_file(&found.path)
            .and_then(|(identity, description)| {
                let devices = plugins.probe_file(&identity)?;
                Ok((identity, description, devices))
            });
        match checked {
            Ok((identity, description, devices)) => {
                let list: Vec<String> = devices
                    .iter()
                    .map(|device| match &device.unusable {
                        None => device.name.clone(),
                        Some(reason) => format!("{} (unusable: {reason})", device.name),
                    })
                    .collect();
                let mut detail = format!("{}: {}", identity.version, list.join(", "));
                for library in &description.libraries {
                    detail.push_str(&format!("; {library}"));
                }
                let usable = devices.iter().any(|device| device.unusable.is_none());
                let verdict = match usable {
                    true => Verdict::Ok,
                    // The plugin itself serves other devices.
                    false if found.variant.is_some() => Verdict::Warning,
                    false => Verdict::Error,
                };
                checks.push(Check::new(what.clone(), verdict, detail));
            }
            Err(error) => checks.push(Check {
                repair: error.hint,
                ..Check::new(what.clone(), Verdict::Error, error.message)
            }),
        }
        for shadowed in found.shadowed {
            let detail = format!(
                "{} is not used: {} comes first",
                shadowed.display(),
                found.path.display()
            );
            checks.push(
                Check::new(what.clone(), Verdict::Warning, detail).repair("remove one of them"),
            );
        }
    }
}
