//! Where and how stages are run: `retort.toml` beside the recipe or above it, the user's own, the environment, flags.
//!
//! In: files, and what the command line has read. Out: an executor, and a [`Profile`] for a kind of stage, with the origin
//! of each value. Stronger first: flag, environment, project file, user's file, default; within each, a setting
//! for a kind of stage is stronger than one for all. None affects a result, so none is part of a digest.
//!
//! A file names programs that run (`prologue`, `sbatch`), so one that somebody else could change is refused, as a plugin is. A
//! project's file may have come with the project: its lines run once the user has trusted it as it is ([`trust_file`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use retort_checkpoint::regular;
use serde::{Deserialize, Serialize};

use crate::duration;
use crate::trust::{self, TrustError};

mod trusted;

pub use trusted::trust_file;

/// The name of the project's file, and of the user's.
pub const FILE: &str = "retort.toml";
/// Bytes of the longest file that is read.
const LONGEST_FILE: u64 = 64 << 10;

/// What runs stages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Executor {
    /// Processes of this machine.
    #[default]
    Local,
    /// Jobs of a Slurm cluster.
    Slurm,
    /// The processes that `torchrun` has started, of which this is one.
    Torchrun,
}

impl Executor {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Slurm => "slurm",
            Self::Torchrun => "torchrun",
        }
    }
}

/// Slurm settings for a kind of stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Partition.
    pub partition: Option<String>,
    /// Account.
    pub account: Option<String>,
    /// Quality of service.
    pub qos: Option<String>,
    /// Time limit, as Slurm writes it.
    pub time: Option<String>,
    /// Generic resources: `gpu:1`.
    pub gres: Option<String>,
    /// Processors of a worker.
    pub cpus: Option<usize>,
    /// Memory of a worker, as Slurm writes it.
    pub memory: Option<String>,
    /// Elements of an array that run at the same time.
    pub array_limit: Option<usize>,
    /// Further options of `sbatch`.
    pub sbatch: Vec<String>,
    /// Lines of bash that run before the worker.
    pub prologue: String,
    /// How often an element is started again that has come to no good end.
    pub requeue: u32,
    /// How long before the time limit a worker is told.
    pub signal: Duration,
    /// How often Slurm is asked.
    pub poll: Duration,
    /// How long a training that can go on with fewer workers waits for all of them to be started again.
    pub shrink_after: Duration,
}

/// Parts of a profile, as one origin gives them.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Partial {
    partition: Option<String>,
    account: Option<String>,
    qos: Option<String>,
    time: Option<Text>,
    gres: Option<String>,
    cpus: Option<usize>,
    memory: Option<Text>,
    #[serde(alias = "array_limit")]
    array_limit: Option<usize>,
    sbatch: Option<Vec<String>>,
    prologue: Option<String>,
    requeue: Option<u32>,
    signal: Option<String>,
    poll: Option<String>,
    #[serde(alias = "shrink_after")]
    shrink_after: Option<String>,
    /// By kind of stage; only at the top.
    #[serde(default)]
    kinds: BTreeMap<String, Partial>,
}

/// A text, or a number that stands for its digits.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum Text {
    Text(String),
    Number(u64),
}

impl Text {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(number) => number.to_string(),
        }
    }
}

/// A file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    executor: Option<Executor>,
    #[serde(default)]
    slurm: Partial,
}

/// What one origin says.
#[derive(Debug)]
struct Layer {
    origin: String,
    /// Whether its lines may run.
    is_trusted: bool,
    executor: Option<Executor>,
    slurm: Partial,
}

/// The settings of all origins.
#[derive(Debug, Default)]
pub struct Settings {
    /// Strongest first.
    layers: Vec<Layer>,
}

/// Input from the command line.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--executor`.
    pub executor: Option<Executor>,
    /// `--slurm`, each `KEY=VALUE` or `KIND.KEY=VALUE`.
    pub slurm: Vec<String>,
    /// `RETORT_EXECUTOR`.
    pub executor_variable: Option<String>,
    /// `RETORT_SLURM`: the same as `--slurm`, separated by white space.
    pub slurm_variable: Option<String>,
    /// The directory of the user's file.
    pub user_dir: Option<PathBuf>,
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SettingsError {
    /// What is wrong, and where.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

fn wrong(message: impl Into<String>) -> SettingsError {
    SettingsError {
        message: message.into(),
        hint: None,
    }
}

const DEFAULT_REQUEUE: u32 = 3;
const DEFAULT_SIGNAL: Duration = Duration::from_secs(120);
const DEFAULT_POLL: Duration = Duration::from_secs(10);
const DEFAULT_SHRINK_AFTER: Duration = Duration::from_secs(600);
/// Options of `sbatch` that are retort's own.
const OWN: [&str; 14] = [
    "--array",
    "-a",
    "--output",
    "-o",
    "--error",
    "-e",
    "--job-name",
    "-J",
    "--chdir",
    "-D",
    "--wrap",
    "--signal",
    "--parsable",
    "--wait",
];

impl Settings {
    /// Of everything that holds for a recipe in `dir`.
    ///
    /// # Errors
    /// A file cannot be read, makes no sense, or could be changed by others.
    pub fn read(dir: &Path, given: &Overrides) -> Result<Self, SettingsError> {
        let mut layers = vec![Layer {
            origin: "flag".into(),
            is_trusted: true,
            executor: given.executor,
            slurm: partial(given.slurm.iter().map(String::as_str), "--slurm")?,
        }];
        let executor = given
            .executor_variable
            .as_deref()
            .filter(|name| !name.is_empty());
        let executor = executor.map(|name| match name {
            "local" => Ok(Executor::Local),
            "slurm" => Ok(Executor::Slurm),
            "torchrun" => Ok(Executor::Torchrun),
            other => Err(wrong(format!(
                "RETORT_EXECUTOR is `{other}`; it can be `local`, `slurm` or `torchrun`"
            ))),
        });
        let words = given.slurm_variable.as_deref().unwrap_or_default();
        layers.push(Layer {
            origin: "environment".into(),
            is_trusted: true,
            executor: executor.transpose()?,
            slurm: partial(words.split_whitespace(), "RETORT_SLURM")?,
        });
        let project = project_file(dir);
        let user = given
            .user_dir
            .iter()
            .map(|dir| dir.join(FILE))
            .find(is_there);
        if user != project
            && let Some(path) = project
        {
            let (mut layer, hash) = file(&path)?;
            if layer.slurm.runs_something() {
                layer.is_trusted = trusted::is_trusted(&path, &hash, given.user_dir.as_deref())?;
            }
            layers.push(layer);
        }
        if let Some(path) = user {
            layers.push(file(&path)?.0);
        }
        Ok(Self { layers })
    }

    /// What runs stages, and who says so.
    pub fn executor(&self) -> (Executor, &str) {
        let set = self
            .layers
            .iter()
            .find_map(|layer| Some((layer.executor?, layer.origin.as_str())));
        set.unwrap_or((Executor::default(), "default"))
    }

    /// Slurm settings for a kind of stage.
    ///
    /// # Errors
    /// A value makes no sense.
    pub fn profile(&self, kind: &str) -> Result<Profile, SettingsError> {
        let time = |name, default, pick: fn(&Partial) -> Option<&String>| {
            let Some((text, origin)) = self.pick(kind, pick) else {
                return Ok(default);
            };
            match duration::parse(text) {
                Ok(time) if time >= Duration::from_millis(100) => Ok(time),
                _ => Err(wrong(format!(
                    "{origin}: slurm.{name} is `{text}`; expected a time such as `60s`"
                ))),
            }
        };
        let text = |pick: fn(&Partial) -> Option<&String>| {
            self.pick(kind, pick).map(|(text, _)| text.clone())
        };
        let written = |pick: fn(&Partial) -> Option<&Text>| {
            self.pick(kind, pick).map(|(text, _)| text.text())
        };
        let sbatch = self.pick(kind, |partial| partial.sbatch.as_ref());
        for option in sbatch.iter().flat_map(|(options, _)| options.iter()) {
            let origin = sbatch.map_or("", |(_, origin)| origin);
            let name = option.split(['=', ' ']).next().unwrap_or_default();
            if !option.starts_with('-') || option.contains(['\n', '\0']) {
                return Err(wrong(format!(
                    "{origin}: slurm.sbatch has `{option}`; expected an option such as `--constraint=a100`"
                )));
            }
            if OWN.contains(&name) {
                return Err(wrong(format!(
                    "{origin}: slurm.sbatch has `{name}`, which retort sets itself"
                )));
            }
        }
        self.check_trusted(kind, "sbatch", |partial| partial.sbatch.is_some())?;
        self.check_trusted(kind, "prologue", |partial| partial.prologue.is_some())?;
        Ok(Profile {
            partition: text(|partial| partial.partition.as_ref()),
            account: text(|partial| partial.account.as_ref()),
            qos: text(|partial| partial.qos.as_ref()),
            time: written(|partial| partial.time.as_ref()),
            gres: text(|partial| partial.gres.as_ref()),
            cpus: self.number(kind, "cpus", |partial| partial.cpus)?,
            memory: written(|partial| partial.memory.as_ref()),
            array_limit: self.number(kind, "array-limit", |partial| partial.array_limit)?,
            sbatch: sbatch
                .map(|(options, _)| options.clone())
                .unwrap_or_default(),
            prologue: text(|partial| partial.prologue.as_ref()).unwrap_or_default(),
            requeue: self
                .pick(kind, |partial| partial.requeue.as_ref())
                .map_or(DEFAULT_REQUEUE, |(count, _)| *count),
            signal: time("signal", DEFAULT_SIGNAL, |partial| partial.signal.as_ref())?,
            poll: time("poll", DEFAULT_POLL, |partial| partial.poll.as_ref())?,
            shrink_after: time("shrink-after", DEFAULT_SHRINK_AFTER, |partial| {
                partial.shrink_after.as_ref()
            })?,
        })
    }

    /// Refuses lines that would run, and that came with a project.
    fn check_trusted(
        &self,
        kind: &str,
        name: &str,
        says: impl Fn(&Partial) -> bool,
    ) -> Result<(), SettingsError> {
        let says =
            |layer: &&Layer| layer.slurm.kinds.get(kind).is_some_and(&says) || says(&layer.slurm);
        match self.layers.iter().find(says) {
            Some(layer) if !layer.is_trusted => Err(SettingsError {
                message: format!(
                    "{}: slurm.{name} runs in your jobs, and you have not trusted this file as it is now",
                    layer.origin
                ),
                hint: Some(format!(
                    "read {}, then run `retort trust` in its directory; or set slurm.{name} yourself, in your own {FILE} or with --slurm",
                    layer.origin
                )),
            }),
            _ => Ok(()),
        }
    }

    /// Project files whose lines do not run because the user has not trusted them.
    pub fn untrusted(&self) -> impl Iterator<Item = &str> {
        let layers = self.layers.iter().filter(|layer| !layer.is_trusted);
        layers.map(|layer| layer.origin.as_str())
    }

    /// Whether any kind of stage asks for GPUs.
    pub fn asks_for_gpus(&self) -> bool {
        let asks = |partial: &Partial| {
            let lines = partial.sbatch.iter().flatten();
            partial
                .gres
                .as_ref()
                .is_some_and(|gres| gres.contains("gpu"))
                || lines
                    .into_iter()
                    .any(|line| line.starts_with("--gpus") || line.starts_with("--gres=gpu"))
        };
        let partials = self.layers.iter().map(|layer| &layer.slurm);
        partials
            .flat_map(|partial| partial.kinds.values().chain([partial]))
            .any(asks)
    }

    /// The strongest that says something, and who that is.
    fn pick<T>(&self, kind: &str, pick: impl Fn(&Partial) -> Option<&T>) -> Option<(&T, &str)> {
        self.layers.iter().find_map(|layer| {
            let of_kind = layer.slurm.kinds.get(kind).and_then(&pick);
            let value = of_kind.or_else(|| pick(&layer.slurm))?;
            Some((value, layer.origin.as_str()))
        })
    }

    /// A number above zero.
    fn number(
        &self,
        kind: &str,
        name: &str,
        pick: fn(&Partial) -> Option<usize>,
    ) -> Result<Option<usize>, SettingsError> {
        let found = self.layers.iter().find_map(|layer| {
            let of_kind = layer.slurm.kinds.get(kind).and_then(pick);
            Some((of_kind.or_else(|| pick(&layer.slurm))?, &layer.origin))
        });
        match found {
            Some((0, origin)) => Err(wrong(format!("{origin}: slurm.{name} is 0"))),
            found => Ok(found.map(|(number, _)| number)),
        }
    }

    /// Everything that is set, for people: name, value, origin.
    pub fn list(&self) -> Vec<(String, String, String)> {
        let (executor, origin) = self.executor();
        let mut list = vec![(
            "executor".to_owned(),
            executor.name().to_owned(),
            origin.to_owned(),
        )];
        for layer in &self.layers {
            let kinds = layer.slurm.kinds.iter();
            let kinds = kinds.map(|(kind, partial)| (format!("slurm.kinds.{kind}"), partial));
            let all = std::iter::once(("slurm".to_owned(), &layer.slurm));
            for (name, partial) in kinds.chain(all) {
                for (key, value) in partial.list() {
                    let name = format!("{name}.{key}");
                    if !list.iter().any(|(known, _, _)| *known == name) {
                        list.push((name, value, layer.origin.clone()));
                    }
                }
            }
        }
        list
    }
}

impl Partial {
    /// Whether it has lines that run.
    fn runs_something(&self) -> bool {
        let own = self.prologue.is_some() || self.sbatch.is_some();
        own || self.kinds.values().any(Self::runs_something)
    }

    fn list(&self) -> Vec<(&'static str, String)> {
        let text = |value: &Option<String>| value.clone();
        let number = |value: Option<usize>| value.map(|value| value.to_string());
        let all = [
            ("partition", text(&self.partition)),
            ("account", text(&self.account)),
            ("qos", text(&self.qos)),
            ("time", self.time.as_ref().map(Text::text)),
            ("gres", text(&self.gres)),
            ("cpus", number(self.cpus)),
            ("memory", self.memory.as_ref().map(Text::text)),
            ("array-limit", number(self.array_limit)),
            ("sbatch", self.sbatch.as_ref().map(|lines| lines.join(" "))),
            (
                "prologue",
                self.prologue
                    .as_ref()
                    .map(|text| text.trim().replace('\n', "; ")),
            ),
            ("requeue", self.requeue.map(|count| count.to_string())),
            ("signal", text(&self.signal)),
            ("poll", text(&self.poll)),
            ("shrink-after", text(&self.shrink_after)),
        ];
        all.into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
            .collect()
    }
}

/// Of `KEY=VALUE` and `KIND.KEY=VALUE`.
fn partial<'a>(
    words: impl Iterator<Item = &'a str>,
    origin: &str,
) -> Result<Partial, SettingsError> {
    let mut all = toml::Table::new();
    for word in words {
        let Some((path, value)) = word.split_once('=') else {
            return Err(wrong(format!(
                "{origin}: `{word}` is no setting; expected KEY=VALUE, as in partition=gpu"
            )));
        };
        let (table, key) = match path.split_once('.') {
            None => (&mut all, path),
            Some((kind, key)) => {
                let kinds = all
                    .entry("kinds")
                    .or_insert_with(|| toml::Table::new().into());
                let of_kind = kinds.as_table_mut().map(|kinds| {
                    kinds
                        .entry(kind)
                        .or_insert_with(|| toml::Table::new().into())
                });
                let Some(table) = of_kind.and_then(toml::Value::as_table_mut) else {
                    return Err(wrong(format!("{origin}: `{word}` is no setting")));
                };
                (table, key)
            }
        };
        match key {
            "sbatch" => {
                let lines = table
                    .entry(key)
                    .or_insert_with(|| Vec::<toml::Value>::new().into());
                if let Some(lines) = lines.as_array_mut() {
                    lines.push(value.into());
                }
            }
            "cpus" | "array-limit" | "array_limit" | "requeue" => {
                let number: i64 = value.parse().map_err(|_| {
                    wrong(format!("{origin}: {path} is `{value}`; expected a number"))
                })?;
                table.insert(key.to_owned(), number.into());
            }
            _ => drop(table.insert(key.to_owned(), value.into())),
        }
    }
    let read: Result<Partial, _> = all.try_into();
    let read = read.map_err(|error| wrong(format!("{origin}: {}", error.to_string().trim())))?;
    checked(read, origin)
}

/// Kinds have no kinds, and nothing would read the second line of a value.
fn checked(partial: Partial, origin: &str) -> Result<Partial, SettingsError> {
    for (kind, of_kind) in &partial.kinds {
        if !of_kind.kinds.is_empty() {
            return Err(wrong(format!(
                "{origin}: slurm.kinds.{kind} has kinds of its own"
            )));
        }
    }
    for partial in partial.kinds.values().chain([&partial]) {
        for (key, value) in partial.list() {
            if value.contains('\0') || (key != "prologue" && value.contains('\n')) {
                return Err(wrong(format!("{origin}: slurm.{key} is more than a line")));
            }
        }
    }
    Ok(partial)
}

/// A broken link does not count as a missing file.
fn is_there(path: &PathBuf) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

/// The project's file for a recipe in `dir`: there, or in a directory above.
pub fn project_file(dir: &Path) -> Option<PathBuf> {
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    dir.ancestors().map(|dir| dir.join(FILE)).find(is_there)
}

/// What a file says, and its hash.
fn file(path: &Path) -> Result<(Layer, String), SettingsError> {
    let shown = path.display();
    trust::check_owner(path).map_err(|error| distrusted(path, error))?;
    let unread = |error| wrong(format!("cannot read {shown}: {error}"));
    let bytes = regular::read(path, LONGEST_FILE).map_err(unread)?;
    let hash = blake3::hash(&bytes).to_hex().to_string();
    let text = String::from_utf8(bytes).map_err(|error| unread(std::io::Error::other(error)))?;
    let document: Document = toml::from_str(&text)
        .map_err(|error| wrong(format!("{shown}: {}", error.to_string().trim_end())))?;
    let layer = Layer {
        executor: document.executor,
        slurm: checked(document.slurm, &shown.to_string())?,
        origin: shown.to_string(),
        is_trusted: true,
    };
    Ok((layer, hash))
}

fn distrusted(file: &Path, error: TrustError) -> SettingsError {
    let shown = file.display();
    match error {
        TrustError::Writable {
            path,
            problem,
            repair,
            ..
        } => SettingsError {
            message: format!(
                "{shown} is not used: {} {problem}, who could change what it runs",
                path.display()
            ),
            hint: Some(match problem.starts_with("belongs") {
                true => "move the recipe to where nobody else can put files above it".to_owned(),
                false => repair,
            }),
        },
        error => wrong(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    pub(super) fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    }

    #[test]
    fn the_stronger_origin_wins_and_is_named() {
        let root = tempfile::tempdir().unwrap();
        let (project, user) = (root.path().join("p"), root.path().join("u"));
        write(
            &project.join(FILE),
            "executor = 'slurm'\n[slurm]\npartition = 'project'\ntime = 90\ncpus = 2\n[slurm.kinds.distill]\ncpus = 8\n",
        );
        write(
            &user.join(FILE),
            "executor = 'local'\n[slurm]\npartition = 'user'\naccount = 'me'\n[slurm.kinds.distill]\naccount = 'us'\n",
        );
        let mut given = Overrides {
            user_dir: Some(user.clone()),
            ..Overrides::default()
        };
        let of = |given: &Overrides| Settings::read(&project.join("a/b"), given).unwrap();
        let settings = of(&given);
        let project_file = project.join(FILE).display().to_string();
        assert_eq!(settings.executor(), (Executor::Slurm, &*project_file));
        let profile = settings.profile("distill").unwrap();
        assert_eq!(
            (
                profile.partition.as_deref(),
                profile.account.as_deref(),
                profile.time.as_deref()
            ),
            (Some("project"), Some("us"), Some("90"))
        );
        assert_eq!((profile.cpus, profile.requeue), (Some(8), DEFAULT_REQUEUE));
        assert_eq!(settings.profile("sample").unwrap().cpus, Some(2));
        given.executor_variable = Some("local".into());
        given.slurm_variable = Some("partition=variable cpus=4".into());
        let settings = of(&given);
        assert_eq!(settings.executor(), (Executor::Local, "environment"));
        assert_eq!(settings.profile("distill").unwrap().cpus, Some(4));
        given.executor = Some(Executor::Slurm);
        given.slurm = vec![
            "distill.cpus=16".into(),
            "sbatch=--exclusive".into(),
            "sbatch=--nice".into(),
        ];
        let settings = of(&given);
        assert_eq!(settings.executor(), (Executor::Slurm, "flag"));
        let profile = settings.profile("distill").unwrap();
        assert_eq!(
            (profile.cpus, profile.sbatch.join(" ").as_str()),
            (Some(16), "--exclusive --nice")
        );
        let listed = settings.list();
        let origin = |name: &str| {
            let found = listed.iter().find(|(known, _, _)| known == name);
            found.map(|(_, value, origin)| (value.as_str(), origin.as_str()))
        };
        assert_eq!(origin("slurm.partition"), Some(("variable", "environment")));
        assert_eq!(origin("slurm.time"), Some(("90", &*project_file)));
        assert_eq!(Settings::default().executor(), (Executor::Local, "default"));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let root = tempfile::tempdir().unwrap();
        for (text, expected) in [
            ("executor = 'cloud'", "unknown variant `cloud`"),
            ("[slurm]\npartitoin = 'x'", "unknown field `partitoin`"),
            ("[slurm]\ncpus = 'x'", "line 2"),
            ("[slurm", "retort.toml"),
            ("[slurm]\npartition = \"a\\nb\"", "more than a line"),
            ("[slurm.kinds.a.kinds.b]\ncpus = 1", "kinds of its own"),
            ("[slurm]\ncpus = 0", "slurm.cpus is 0"),
            ("[slurm]\nsbatch = ['x']", "expected an option"),
            ("[slurm]\nsbatch = ['--array=1-2']", "retort sets itself"),
            ("[slurm]\nsignal = '60'", "expected a time"),
        ] {
            write(&root.path().join(FILE), text);
            let error = Settings::read(root.path(), &Overrides::default())
                .and_then(|settings| settings.profile("sample").map(drop))
                .expect_err(text);
            assert!(error.message.contains(expected), "{text}: {error}");
            assert!(error.message.contains("retort.toml"), "{text}: {error}");
        }
        std::fs::remove_file(root.path().join(FILE)).unwrap();
        for word in ["x", "=", "cpus=many", "a.b.c=1", "nothing=1"] {
            let given = Overrides {
                slurm: vec![word.to_owned()],
                ..Overrides::default()
            };
            let error = Settings::read(root.path(), &given).expect_err(word);
            assert!(error.message.starts_with("--slurm"), "{error}");
        }
    }

    #[test]
    fn a_file_that_others_could_change_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(FILE);
        write(&path, "executor = 'slurm'");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let error = Settings::read(&root.path().join("x"), &Overrides::default()).unwrap_err();
        assert!(
            error.message.contains("is writable by everybody"),
            "{error}"
        );
        assert!(error.hint.unwrap().contains("chmod o-w"));
    }
}
