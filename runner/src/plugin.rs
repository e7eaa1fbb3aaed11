//! Plugins: finding them by name, and describing them without loading them into this process.
//!
//! In: names. Out: files, identities, descriptions. A recipe names a plugin, never a path; the directories are searched in a
//! fixed order (never the working directory), the first match wins, and what it hides is reported. A plugin's identity is the
//! BLAKE3 of its file. A file that others could change, or that a lock does not allow, is refused ([`trust`]). Descriptions
//! come from the store, by that hash, or from a worker. Deliberately absent: `dlopen`, which only [`host`] calls, in a
//! worker.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use retort_abi::{Description, Device, Diagnostic, Failure, StageJob, StageKind};
use tokio::runtime::Runtime;

use crate::artifact;
use crate::frame::{Answer, Call, Task};
use crate::plan::{Build, DescribeError, Descriptions, PluginIdentity};
use crate::store::Store;
use crate::trust::{self, TrustError};
use crate::worker::process::{self, AskError};

pub mod conformance;
pub mod project;

/// How long a plugin may take to describe itself, to find its devices or to check options.
const PATIENCE: Duration = Duration::from_secs(60);
/// The plugins of this project, and the commands that build them.
pub const OWN: [(&str, &str); 2] = [("candle", "make build"), ("libtorch", "make libtorch")];
/// The variants of this project's plugins, and the commands that build them.
pub const OWN_VARIANTS: [(&str, &str, &str); 1] = [("candle", "cuda", "make cuda")];
/// Environment variable with additional directories.
pub const PATH_VARIABLE: &str = "RETORT_PLUGIN_PATH";

/// A directory that is searched for plugins.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct SearchDir {
    /// The directory, absolute; it need not exist.
    pub path: PathBuf,
    /// Why it is searched: `--plugin-dir`, `beside the executable`.
    pub origin: &'static str,
}

/// A plugin's file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PluginFile {
    /// Name in recipes.
    pub name: String,
    /// The variant, if there are several builds for different devices: `cuda`.
    pub variant: Option<String>,
    /// The file.
    pub path: PathBuf,
    /// Why its directory is searched.
    pub origin: &'static str,
    /// Files of the same name in directories searched later, which are not used.
    pub shadowed: Vec<PathBuf>,
}

/// The plugins of this machine, as [`Descriptions`] for planning.
pub struct Plugins<'a> {
    dirs: Vec<SearchDir>,
    runtime: &'a Runtime,
    store: Option<&'a Store>,
    described: HashMap<String, Rc<Build>>,
    variants: HashMap<String, Vec<Result<Rc<Build>, DescribeError>>>,
    devices: HashMap<PathBuf, Vec<Device>>,
}

/// The directories searched for plugins, in order.
pub fn search_dirs(plugin_dirs: &[PathBuf]) -> Vec<SearchDir> {
    let mut dirs: Vec<SearchDir> = Vec::new();
    let mut add = |path: PathBuf, origin| {
        // An empty entry would mean the working directory, which is never searched implicitly.
        if path.as_os_str().is_empty() {
            return;
        }
        let path = std::path::absolute(&path).unwrap_or(path);
        if !dirs.iter().any(|dir| dir.path == path) {
            dirs.push(SearchDir { path, origin });
        }
    };
    plugin_dirs
        .iter()
        .for_each(|dir| add(dir.clone(), "--plugin-dir"));
    if let Some(list) = std::env::var_os(PATH_VARIABLE) {
        std::env::split_paths(&list).for_each(|dir| add(dir, PATH_VARIABLE));
    }
    if let Some(beside) = std::env::current_exe()
        .ok()
        .as_deref()
        .and_then(Path::parent)
    {
        add(beside.to_owned(), "beside the executable");
        if let Some(prefix) = beside.parent() {
            add(
                prefix.join("lib").join("retort"),
                "lib/retort of the installation",
            );
        }
    }
    if let Some(dir) = user_plugin_dir() {
        add(dir, "the user's data directory");
    }
    dirs
}

/// All plugins in these directories, by name; a plugin's variants follow it.
pub fn find_all(dirs: &[SearchDir]) -> Vec<PluginFile> {
    let mut found: BTreeMap<(String, Option<String>), PluginFile> = BTreeMap::new();
    for dir in dirs {
        let Ok(entries) = std::fs::read_dir(&dir.path) else {
            continue;
        };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let Some(key) = path.file_name().and_then(|file| name_of(file.to_str()?)) else {
                continue;
            };
            match found.get_mut(&key) {
                Some(first) => first.shadowed.push(path),
                None => {
                    let (name, variant) = key.clone();
                    found.insert(
                        key,
                        PluginFile {
                            name,
                            variant,
                            path,
                            origin: dir.origin,
                            shadowed: Vec::new(),
                        },
                    );
                }
            }
        }
    }
    found.into_values().collect()
}

/// The plugin with a name; one of its variants if there is nothing else.
///
/// # Errors
/// There is none; the error lists the directories searched.
pub fn find(name: &str, dirs: &[SearchDir]) -> Result<PluginFile, DescribeError> {
    let well_formed = !name.is_empty()
        && name.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte)
        });
    if !well_formed {
        return Err(DescribeError {
            message: format!(
                "`{name}` is not a plugin name: lower-case letters, digits, `-` and `_` are"
            ),
            hint: Some(
                "a recipe names a plugin, never a path; directories are given with --plugin-dir"
                    .into(),
            ),
        });
    }
    let (all, key) = (find_all(dirs), name.replace('-', "_"));
    if let Some(found) = all.iter().find(|found| found.name.replace('-', "_") == key) {
        return Ok(PluginFile {
            name: name.to_owned(),
            ..found.clone()
        });
    }
    let mut message = format!("there is no plugin `{name}`: no {} in", file_name(name));
    for dir in dirs {
        let absent = if dir.path.is_dir() {
            ""
        } else {
            ", which does not exist"
        };
        message.push_str(&format!(
            "\n    {} ({}{absent})",
            dir.path.display(),
            dir.origin
        ));
    }
    let nearest = all
        .iter()
        .map(|found| (strsim::damerau_levenshtein(name, &found.name), &found.name))
        .filter(|(distance, _)| *distance <= 2)
        .min();
    let own = OWN.iter().find(|(own, _)| *own == name);
    // Built here but not installed: the author's likely next step.
    let here = ["", "target/release/"].map(|dir| format!("{dir}{}", file_name(name)));
    let here = here.iter().find(|file| Path::new(file).is_file());
    let hint = match (nearest, all.as_slice()) {
        _ if let Some(file) = here => format!(
            "{file} is in the working directory, which is not searched: `retort plugin install {file}`, or \
             --plugin-dir"
        ),
        _ if let Some((_, build)) = own => format!("`{build}` builds it"),
        (Some((_, nearest)), _) => format!("did you mean `{nearest}`?"),
        (None, []) => format!("name the directory with --plugin-dir DIR or {PATH_VARIABLE}"),
        (None, all) => {
            let names: Vec<&str> = all.iter().map(|found| found.name.as_str()).collect();
            format!(
                "plugins found: {}; other directories are named with --plugin-dir DIR",
                names.join(", ")
            )
        }
    };
    Err(DescribeError {
        message,
        hint: Some(hint),
    })
}

/// The file name of a plugin: `libretort_candle.so`.
pub fn file_name(name: &str) -> String {
    format!(
        "libretort_{}{}",
        name.replace('-', "_"),
        std::env::consts::DLL_SUFFIX
    )
}

/// The name of the plugin in a file of this name, and which variant it is: `libretort_candle.cuda.so`.
pub fn name_of(file: &str) -> Option<(String, Option<String>)> {
    let name = file
        .strip_prefix("libretort_")?
        .strip_suffix(std::env::consts::DLL_SUFFIX)?;
    let (name, variant) = match name.split_once('.') {
        Some((name, variant)) => (name, Some(variant)),
        None => (name, None),
    };
    let odd = variant.is_some_and(|variant| variant.is_empty() || variant.contains('.'));
    (!name.is_empty() && !odd).then(|| (name.to_owned(), variant.map(str::to_owned)))
}

/// Whether builds of a plugin are equivalent. Support for training together may depend on the device.
fn alike(some: &[StageKind], others: &[StageKind]) -> bool {
    let same = |(one, other): (&StageKind, &StageKind)| {
        let divisible = match one.together {
            true => one.divisible,
            false => other.divisible,
        };
        *one == StageKind {
            divisible,
            ..other.clone()
        }
    };
    some.len() == others.len() && some.iter().zip(others).all(same)
}

/// The variants of a plugin that also has a main file.
fn variants(name: &str, dirs: &[SearchDir]) -> Vec<PluginFile> {
    let key = name.replace('-', "_");
    let mut all = find_all(dirs);
    all.retain(|found| found.name.replace('-', "_") == key);
    if all.iter().all(|found| found.variant.is_some()) {
        all.drain(..all.len().min(1));
    }
    all.retain(|found| found.variant.is_some());
    all
}

/// The directory of the user's own plugins.
pub fn user_plugin_dir() -> Option<PathBuf> {
    Some(user_data_dir()?.join("retort").join("plugins"))
}

fn user_data_dir() -> Option<PathBuf> {
    let home = || {
        std::env::var_os("HOME")
            .filter(|home| !home.is_empty())
            .map(PathBuf::from)
    };
    if cfg!(target_os = "macos") {
        return Some(home()?.join("Library/Application Support"));
    }
    let xdg = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    xdg.or_else(|| Some(home()?.join(".local/share")))
}

impl From<TrustError> for DescribeError {
    fn from(error: TrustError) -> Self {
        Self {
            message: error.to_string(),
            hint: error.hint(),
        }
    }
}

impl<'a> Plugins<'a> {
    /// Plugins in `dirs`, described by the store if it knows them, else by workers.
    pub fn new(dirs: Vec<SearchDir>, runtime: &'a Runtime, store: Option<&'a Store>) -> Self {
        Self {
            dirs,
            runtime,
            store,
            described: HashMap::new(),
            variants: HashMap::new(),
            devices: HashMap::new(),
        }
    }

    /// Caches new descriptions of plugins in a store.
    pub fn remember(&self, store: &Store) {
        if self.store.is_some() {
            return;
        }
        for build in self.described.values() {
            let identity = &build.identity;
            if let Err(error) = self
                .runtime
                .block_on(store.cache_description(&identity.hash, &build.description))
            {
                tracing::debug!(
                    "the description of {} is not cached: {error}",
                    identity.path.display()
                );
            }
        }
    }

    /// The directories searched.
    pub fn dirs(&self) -> &[SearchDir] {
        &self.dirs
    }

    /// The identity and description of a plugin file. The file's name does not matter here.
    ///
    /// # Errors
    /// It cannot be read, loaded or asked.
    pub fn describe_file(
        &self,
        path: &Path,
    ) -> Result<(PluginIdentity, Description), DescribeError> {
        let hash = artifact::file_hash(path).map_err(|error| DescribeError {
            message: format!("the plugin's file: {error}"),
            hint: None,
        })?;
        trust::check_owner(path)?;
        trust::check_lock(path, &hash)?;
        let identity = |description: &Description| PluginIdentity {
            name: description.name.clone(),
            path: path.to_owned(),
            version: description.version.clone(),
            hash: hash.clone(),
        };
        let cached = self.store.and_then(|store| {
            // An unreadable cache is ignored.
            self.runtime
                .block_on(store.cached_description(&hash))
                .ok()
                .flatten()
        });
        if let Some(description) = cached {
            return Ok((identity(&description), description));
        }
        let Answer::Description(description) = self.ask(path, &hash, Call::Describe)? else {
            return Err(confused(path));
        };
        if let Some(store) = self.store
            && let Err(error) = self
                .runtime
                .block_on(store.cache_description(&hash, &description))
        {
            tracing::debug!(
                "the description of {} is not cached: {error}",
                path.display()
            );
        }
        Ok((identity(&description), *description))
    }

    /// The devices that a plugin file finds.
    ///
    /// # Errors
    /// As [`Plugins::describe_file`].
    pub fn probe_file(&self, plugin: &PluginIdentity) -> Result<Vec<Device>, DescribeError> {
        let path = &plugin.path;
        match self.ask(path, &plugin.hash, Call::Probe)? {
            Answer::Devices(devices) => Ok(devices),
            _ => Err(confused(path)),
        }
    }

    /// Asks the plugin with this hash: only that file is loaded.
    fn ask(&self, path: &Path, hash: &str, call: Call) -> Result<Answer, DescribeError> {
        let task = Task {
            plugin: path.to_owned(),
            hash: Some(hash.to_owned()),
            call,
        };
        self.runtime
            .block_on(process::ask(task, PATIENCE))
            .map_err(|error| refused(path, error))
    }
}

impl Descriptions for Plugins<'_> {
    fn describe(&mut self, plugin: &str) -> Result<Rc<Build>, DescribeError> {
        if let Some(known) = self.described.get(plugin) {
            return Ok(Rc::clone(known));
        }
        let found = find(plugin, &self.dirs)?;
        let (identity, description) = self.describe_file(&found.path)?;
        for shadowed in &found.shadowed {
            // A copy of the same file hides nothing.
            if artifact::file_hash(shadowed).is_ok_and(|hash| hash == identity.hash) {
                continue;
            }
            tracing::warn!(
                "plugin {plugin}: {} is used ({}), {} is not",
                found.path.display(),
                found.origin,
                shadowed.display()
            );
        }
        if identity.name != plugin {
            return Err(DescribeError {
                message: format!(
                    "{} calls itself `{}`, not `{plugin}`",
                    found.path.display(),
                    identity.name
                ),
                hint: Some(format!("rename the file to {}", file_name(&identity.name))),
            });
        }
        let build = Build::new(identity, description);
        self.described.insert(plugin.to_owned(), Rc::clone(&build));
        Ok(build)
    }

    fn variants(&mut self, plugin: &str) -> Vec<Result<Rc<Build>, DescribeError>> {
        if let Some(known) = self.variants.get(plugin) {
            return known.clone();
        }
        let Ok(base) = self.describe(plugin) else {
            return Vec::new();
        };
        let base = &base.description;
        let build = |found: &PluginFile| {
            let (identity, description) = self.describe_file(&found.path)?;
            let path = found.path.display();
            let odd = if identity.name != plugin {
                format!("{path} calls itself `{}`", identity.name)
            } else if identity.version != base.version || !alike(&description.stages, &base.stages)
            {
                format!("{path} is of another version than the plugin itself")
            } else {
                return Ok(Build::new(identity, description));
            };
            Err(DescribeError {
                message: odd,
                hint: Some("build both anew, or remove the variant".into()),
            })
        };
        let found: Vec<_> = variants(plugin, &self.dirs).iter().map(build).collect();
        self.variants.insert(plugin.to_owned(), found.clone());
        found
    }

    fn devices(&mut self, plugin: &PluginIdentity) -> Result<Vec<Device>, DescribeError> {
        if let Some(known) = self.devices.get(&plugin.path) {
            return Ok(known.clone());
        }
        let devices = self.probe_file(plugin)?;
        self.devices.insert(plugin.path.clone(), devices.clone());
        Ok(devices)
    }

    fn validate(
        &mut self,
        plugin: &str,
        jobs: &[StageJob],
    ) -> Result<Vec<Vec<Diagnostic>>, DescribeError> {
        let build = self.describe(plugin)?;
        let PluginIdentity { path, hash, .. } = &build.identity;
        match self.ask(path, hash, Call::Validate(jobs.to_vec()))? {
            Answer::Findings(findings) if findings.len() == jobs.len() => Ok(findings),
            _ => Err(confused(path)),
        }
    }

    fn names(&mut self) -> Vec<String> {
        let mut names: Vec<String> = find_all(&self.dirs)
            .into_iter()
            .map(|found| found.name)
            .collect();
        names.dedup();
        names
    }
}

fn refused(path: &Path, error: AskError) -> DescribeError {
    match error {
        AskError::NotLoaded { message, hint } => DescribeError { message, hint },
        AskError::Failed(Failure { message, hint, .. }) => DescribeError {
            message: format!("{}: {message}", path.display()),
            hint,
        },
        error => DescribeError {
            message: format!("{}: {error}", path.display()),
            hint: Some(format!(
                "`retort plugin check {}` tries the plugin on its own",
                path.display()
            )),
        },
    }
}

fn confused(path: &Path) -> DescribeError {
    DescribeError {
        message: format!("{}: the worker's answer does not match", path.display()),
        hint: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs(root: &Path, files: &[(&str, &str)]) -> Vec<SearchDir> {
        let mut dirs: Vec<SearchDir> = Vec::new();
        for (dir, name) in files {
            let path = root.join(dir);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join(name), "").unwrap();
            if !dirs.iter().any(|known| known.path == path) {
                dirs.push(SearchDir {
                    path,
                    origin: "test",
                });
            }
        }
        dirs
    }

    #[test]
    fn the_first_directory_wins_and_shadowing_is_told() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (file_name("a"), file_name("b-c"));
        let dirs = dirs(
            root.path(),
            &[
                ("1", &a),
                ("2", &a),
                ("2", &b),
                ("2", "libother.so"),
                ("3", &a),
            ],
        );
        let found = find("a", &dirs).unwrap();
        assert_eq!(found.path, root.path().join("1").join(&a));
        assert_eq!(
            found.shadowed,
            [
                root.path().join("2").join(&a),
                root.path().join("3").join(&a)
            ]
        );
        assert_eq!(
            find("b-c", &dirs).unwrap().path,
            root.path().join("2").join(&b)
        );
        assert_eq!(find_all(&dirs).len(), 2);
    }

    #[test]
    fn variants_stand_beside_their_plugin() {
        let root = tempfile::tempdir().unwrap();
        let variant = |name: &str| format!("libretort_{name}.cuda{}", std::env::consts::DLL_SUFFIX);
        let (a, of_a, of_b) = (file_name("a"), variant("a"), variant("b"));
        let dirs = dirs(
            root.path(),
            &[
                ("1", &of_a),
                ("2", &a),
                ("2", &of_a),
                ("2", &of_b),
                ("2", "libretort_a..so"),
            ],
        );
        let found = find("a", &dirs).unwrap();
        assert_eq!(
            (found.path, found.variant),
            (root.path().join("2").join(&a), None)
        );
        let own = variants("a", &dirs);
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].path, root.path().join("1").join(&of_a));
        assert_eq!(own[0].shadowed, [root.path().join("2").join(&of_a)]);
        // A variant alone is the plugin.
        assert_eq!(find("b", &dirs).unwrap().variant.as_deref(), Some("cuda"));
        assert!(variants("b", &dirs).is_empty());
        assert_eq!(find_all(&dirs).len(), 3);
    }

    #[track_caller]
    fn check_missing(name: &str, said: &str, hinted: &str) {
        let root = tempfile::tempdir().unwrap();
        let mut dirs = dirs(root.path(), &[("1", &file_name("candle"))]);
        dirs.push(SearchDir {
            path: "/nowhere/at/all".into(),
            origin: "test",
        });
        let error = find(name, &dirs).unwrap_err();
        let hint = error.hint.unwrap();
        assert!(error.message.contains(said), "{}", error.message);
        assert!(hint.contains(hinted), "{hint}");
    }

    #[test]
    fn what_is_not_found_is_explained() {
        check_missing(
            "candel",
            "/nowhere/at/all (test, which does not exist)",
            "did you mean `candle`?",
        );
        check_missing("torch", "no libretort_torch", "plugins found: candle");
        check_missing("../evil", "not a plugin name", "never a path");
    }

    #[test]
    fn the_working_directory_is_never_searched_unasked() {
        assert!(
            search_dirs(&[PathBuf::new()])
                .iter()
                .all(|dir| dir.origin != "--plugin-dir")
        );
    }
}
