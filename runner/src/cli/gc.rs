//! `retort gc`: lists files that no run needs, and removes them if asked to.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::artifact::{Layout, is_hash};
use crate::cli::{Context, Error, FormatArgs, output};
use crate::store::{Access, Garbage, Store};
use crate::table::{Cell, Rows, bytes};

/// Arguments of `gc`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Remove it; without this, only list it.
    #[arg(long)]
    pub remove: bool,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// An unneeded file or folder.
struct UnneededPath {
    what: &'static str,
    name: String,
    path: PathBuf,
    size: u64,
}

/// Lists, or removes, what no run needs.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let dir = &context.store;
    let mut unknown = 0;
    let found = context.runtime()?.block_on(async {
        // Reading first: a missing store must not be created.
        let store = Store::open(dir, Access::ReadOnly).await?;
        if !args.remove {
            let garbage = store.garbage().await?;
            unknown = strangers(dir, &garbage);
            let found = leftovers(&store, &garbage);
            store.close().await;
            return Ok::<_, Error>(found);
        }
        store.close().await;
        let store = Store::open(dir, Access::ReadWrite).await?;
        let mut removed = Vec::new();
        let collect = |garbage: &Garbage| {
            unknown = strangers(dir, garbage);
            removed = leftovers(&store, garbage);
            removed.retain(remove);
            let gone = garbage.artifacts.iter();
            gone.filter(|hash| !dir.join("artifacts").join(hash).exists())
                .cloned()
                .collect()
        };
        store.collect_garbage(collect).await?;
        Layout::new(dir)?.tidy();
        store.close().await;
        Ok(removed)
    })?;
    let mut rows = Rows::new(&["what", "name", "size", "path"]);
    for one in &found {
        rows.push([
            one.what.into(),
            Cell::hash(&one.name),
            Cell::bytes(one.size),
            one.path.display().to_string().into(),
        ]);
    }
    output::print(&rows.render(args.format.style(context)))?;
    if unknown > 0 {
        output::say(&format!(
            "{} older than all runs of this history, which knows nothing of them, stay; `retort doctor` says more",
            output::count(unknown, "artifact")
        ));
    }
    if !context.quiet {
        let size = bytes(found.iter().map(|one| one.size).sum());
        let count = output::count(found.len(), "thing");
        output::say(&match (found.is_empty(), args.remove) {
            (true, _) => "every file in the store is needed by a run".to_owned(),
            (_, true) => format!("{count} removed, {size}"),
            (_, false) => format!("{count} could be removed, {size}; `retort gc --remove` does it"),
        });
    }
    Ok(())
}

/// Unneeded entries in the store's directory.
fn leftovers(store: &Store, garbage: &Garbage) -> Vec<UnneededPath> {
    let dir = store.dir();
    let mut found = Vec::new();
    for path in store.abandoned() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        found.push(("draft", name.into_owned(), path));
    }
    for (what, name, path) in entries(&dir.join("artifacts"), "artifact") {
        if !garbage.needed.contains(&name) && !is_stranger(&name, &path, garbage) {
            found.push((what, name, path));
        }
    }
    for (what, name, path) in entries(&dir.join("work"), "checkpoint") {
        // Locks belong to their holders; the next run removes stale ones.
        if path.is_dir() && !garbage.resumable.contains(&name) {
            found.push((what, name, path));
        }
    }
    let mut leftovers: Vec<UnneededPath> = found
        .into_iter()
        .map(|(what, name, path)| UnneededPath {
            what,
            size: size(&path),
            name,
            path,
        })
        .collect();
    leftovers.sort_by(|a, b| (a.what, &a.name).cmp(&(b.what, &b.name)));
    leftovers
}

/// Artifacts older than the whole history: it was emptied, or they belong to another one.
pub(super) fn strangers(dir: &Path, garbage: &Garbage) -> usize {
    let all = entries(&dir.join("artifacts"), "artifact").into_iter();
    all.filter(|(_, name, path)| is_stranger(name, path, garbage))
        .count()
}

fn is_stranger(name: &str, path: &Path, garbage: &Garbage) -> bool {
    let mut garbage_of_history = garbage.artifacts.iter();
    let is_known = garbage.needed.contains(name) || garbage_of_history.any(|known| known == name);
    !is_known && is_older(path, garbage)
}

/// Whether a file is older than the history's oldest run.
fn is_older(path: &Path, garbage: &Garbage) -> bool {
    let modified = std::fs::symlink_metadata(path).and_then(|found| found.modified());
    let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
    match (garbage.since, modified.ok().and_then(since_1970)) {
        (Some(since), Some(modified)) => (modified.as_millis() as i64) < since.0,
        _ => false,
    }
}

fn entries(dir: &Path, what: &'static str) -> Vec<(&'static str, String, PathBuf)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    // Entries with other names were not made by retort.
    entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            is_hash(&name).then(|| (what, name, entry.path()))
        })
        .collect()
}

fn size(path: &Path) -> u64 {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return 0;
    };
    if !metadata.is_dir() {
        return metadata.len();
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| size(&entry.path())).sum()
}

/// Removes it; returns whether it is gone. Failures are reported.
fn remove(one: &UnneededPath) -> bool {
    let removed = if one.path.is_dir() {
        std::fs::remove_dir_all(&one.path)
    } else {
        std::fs::remove_file(&one.path)
    };
    if let Err(error) = &removed {
        output::say(&format!("{} stays: {error}", one.path.display()));
    }
    removed.is_ok()
}
