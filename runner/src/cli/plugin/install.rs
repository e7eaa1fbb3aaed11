//! `retort plugin install`: copies a plugin into the search path.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clap::ValueHint;
use retort_checkpoint::regular;
use tokio::runtime::Runtime;

use crate::artifact;
use crate::cli::plugin::built;
use crate::cli::{Context, Error, Exit, output};
use crate::draft::Draft;
use crate::plugin::{self, Plugins, search_dirs};
use crate::trust;

/// Arguments of `plugin install`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shared object, or the directory of a project that has been built.
    #[arg(value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub path: PathBuf,
    /// Install for this user, into the data directory (the default).
    #[arg(long, conflicts_with = "into")]
    pub user: bool,
    /// Install into this directory.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub into: Option<PathBuf>,
}

/// Copies the plugin, after asking for its identity.
pub fn execute(args: &Args, runtime: &Runtime, context: &Context) -> Result<(), Error> {
    let source = built(&std::path::absolute(&args.path)?)?;
    let dirs = search_dirs(&context.plugin_dirs);
    let (identity, _) = Plugins::new(dirs.clone(), runtime, None).describe_file(&source)?;
    let dir = match &args.into {
        Some(dir) => std::path::absolute(dir)?,
        None => plugin::user_plugin_dir().ok_or_else(|| {
            Error::new(
                Exit::Usage,
                "this user has no data directory: HOME is not set",
            )
            .hint("name a directory with --into")
        })?,
    };
    let variant = source
        .file_name()
        .and_then(|file| plugin::name_of(file.to_str()?)?.1);
    let own = variant
        .as_deref()
        .map(|variant| format!("{}.{variant}", identity.name));
    let file = plugin::file_name(own.as_ref().unwrap_or(&identity.name));
    let target = dir.join(&file);
    copy(&source, &target).map_err(|error| {
        Error::new(
            Exit::Internal,
            format!("{} cannot be written", target.display()),
        )
        .cause(&error)
    })?;
    trust::check_owner(&target).map_err(plan_error)?;
    // Installing into a locked directory adds the plugin to the lock.
    if let Some(mut lock) = trust::read_lock(&dir).map_err(plan_error)? {
        let hash = artifact::file_hash(&target)
            .map_err(|error| Error::new(Exit::Internal, error.to_string()))?;
        lock.insert(file, hash);
        trust::write_lock(&dir, &lock).map_err(plan_error)?;
    }
    output::say(&format!(
        "{} {} is installed: {}",
        identity.name,
        identity.version,
        target.display()
    ));
    if !dirs.iter().any(|known| known.path == dir) {
        output::say(&format!(
            "note: {} is not searched for plugins; name it with --plugin-dir or {}",
            dir.display(),
            plugin::PATH_VARIABLE
        ));
    } else if variant.is_none()
        && let Ok(found) = plugin::find(&identity.name, &dirs)
        && found.path != target
    {
        output::say(&format!(
            "note: {} comes first and is used instead",
            found.path.display()
        ));
    }
    Ok(())
}

fn plan_error(error: trust::TrustError) -> Error {
    crate::plan::DescribeError::from(error).into()
}

/// Copies a file atomically: whoever loads the target gets the old or the new one.
fn copy(source: &Path, target: &Path) -> io::Result<()> {
    let dir = target.parent().unwrap_or(target);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)?;
    let (fresh, mut file) = Draft::file(target)?;
    io::copy(&mut regular::open(source)?, &mut file)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    fresh.finish()
}
