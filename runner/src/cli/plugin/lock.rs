//! `retort plugin lock`: which plugins of a directory may load, by hash.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::ValueHint;

use crate::artifact;
use crate::cli::{Context, Error, Exit, output};
use crate::plan::DescribeError;
use crate::plugin::{self, SearchDir};
use crate::trust;

/// Arguments of `plugin lock`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The directories; by default that of the user's own plugins.
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub dirs: Vec<PathBuf>,
    /// Remove the lock instead.
    #[arg(long)]
    pub remove: bool,
}

/// Writes `plugins.lock` with the hashes of the plugins in a directory, or removes it.
pub fn execute(args: &Args, _context: &Context) -> Result<(), Error> {
    let dirs = match args.dirs.is_empty() {
        false => args.dirs.clone(),
        true => plugin::user_plugin_dir().into_iter().collect(),
    };
    for dir in dirs {
        let dir = std::path::absolute(dir)?;
        if !dir.is_dir() {
            let message = format!("there is no directory {}", dir.display());
            return Err(Error::new(Exit::NothingMatches, message));
        }
        let lock = dir.join(trust::LOCK);
        if args.remove {
            match std::fs::remove_file(&lock) {
                Ok(()) => output::say(&format!("{} is removed", lock.display())),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    let message = format!("{} cannot be removed", lock.display());
                    return Err(Error::new(Exit::Internal, message).cause(&error));
                }
            }
            continue;
        }
        let mut hashes = BTreeMap::new();
        let search = [SearchDir {
            path: dir.clone(),
            origin: "",
        }];
        for found in plugin::find_all(&search) {
            trust::check_owner(&found.path).map_err(DescribeError::from)?;
            let hash = artifact::file_hash(&found.path)
                .map_err(|error| Error::new(Exit::Internal, error.to_string()))?;
            let name = found.path.file_name().unwrap_or_default();
            hashes.insert(name.to_string_lossy().into_owned(), hash);
        }
        trust::write_lock(&dir, &hashes).map_err(DescribeError::from)?;
        output::say(&format!(
            "{} allows {}",
            lock.display(),
            output::count(hashes.len(), "plugin")
        ));
    }
    Ok(())
}
