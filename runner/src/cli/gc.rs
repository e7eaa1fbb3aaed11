//! `retort gc`: removes what no run needs. Says so first, and does it only when asked to.

use std::path::{Path, PathBuf};

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
struct Leftover {
    what: &'static str,
    name: String,
    path: PathBuf,
    size: u64,
}

/// Lists, or removes, what no run needs.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let dir = &context.store;
    let found = context.runtime()?.block_on(async {
        // Reading first: a missing store must not be created.
        let store = Store::open(dir, Access::ReadOnly).await?;
        if !args.remove {
            let found = leftovers(&store, &store.garbage().await?);
            store.close().await;
            return Ok::<_, Error>(found);
        }
        store.close().await;
        let store = Store::open(dir, Access::ReadWrite).await?;
        let mut removed = Vec::new();
        let collect = |garbage: &Garbage| {
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

/// What lies in the store's directory and is not needed.
fn leftovers(store: &Store, garbage: &Garbage) -> Vec<Leftover> {
    let dir = store.dir();
    let mut found = Vec::new();
    for path in store.abandoned() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        found.push(("draft", name.into_owned(), path));
    }
    for (what, name, path) in entries(&dir.join("artifacts"), "artifact") {
        if !garbage.needed.contains(&name) {
            found.push((what, name, path));
        }
    }
    for (what, name, path) in entries(&dir.join("work"), "checkpoint") {
        // Locks belong to their holders; the next run tidies them up.
        if path.is_dir() && !garbage.resumable.contains(&name) {
            found.push((what, name, path));
        }
    }
    let mut leftovers: Vec<Leftover> = found
        .into_iter()
        .map(|(what, name, path)| Leftover {
            what,
            size: size(&path),
            name,
            path,
        })
        .collect();
    leftovers.sort_by(|a, b| (a.what, &a.name).cmp(&(b.what, &b.name)));
    leftovers
}

fn entries(dir: &Path, what: &'static str) -> Vec<(&'static str, String, PathBuf)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    // What has another name was not made here.
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

/// Whether it is now gone. Leftovers are reported.
fn remove(one: &Leftover) -> bool {
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
