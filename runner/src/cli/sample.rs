//! `retort sample`: draws images with a student or a teacher, without a recipe.
//!
//! It creates a recipe in memory from `sample.yaml` and runs it like any other. The network is an artifact of the store,
//! which the recipe takes by its hash, or a published file, which a stage loads.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::ValueHint;
use serde_json::{Value, json};

use crate::artifact::{self, Layout};
use crate::cli::execution::{ExecutionArgs, PlannedRun, store_if_there};
use crate::cli::{Context, Error, Exit, SelectionArgs, output, show};
use crate::cluster::devices;
use crate::plan::Descriptions;
use crate::plugin::{Plugins, search_dirs};
use crate::recipe;
use crate::store::{Access, ArtifactRow, HashTrust, Store, StoreError};

/// The recipe, without its network.
const TEMPLATE: &str = include_str!("sample.yaml");
/// The name of the network in the recipe.
const NETWORK: &str = "network";
/// Kinds of networks that can be sampled, in order of preference within a run.
const KINDS: [&str; 2] = ["student", "teacher"];

/// Arguments of `sample`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The network: `latest/student` (a run and a stage), a prefix of an artifact's hash, a run, or a published file.
    #[arg(value_name = "NETWORK", value_hint = ValueHint::FilePath)]
    pub network: String,
    /// How many images.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub number: Option<u32>,
    /// Their classes: `balanced` (equally many of each), `drawn` (at random), or numbers (3,1,4) or names, repeated if there
    /// are fewer than images.
    #[arg(long, value_name = "CLASSES", allow_hyphen_values = true)]
    pub labels: Option<String>,
    /// Passes of a student: their number, or the AR steps from which they start (0,6).
    #[arg(long, value_name = "STEPS", default_value = "1")]
    pub steps: String,
    /// Strength of a teacher's guidance.
    #[arg(long, value_name = "STRENGTH", allow_hyphen_values = true)]
    pub guidance: Option<f64>,
    /// Seed of the images.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Where to compute: `auto`, `cpu`, `cuda`, `cuda:1`.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// The plugin; by default the one that made the artifact.
    #[arg(long, value_name = "PLUGIN")]
    pub backend: Option<String>,
    /// Copy the images and the grid into this new directory.
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub output: Option<PathBuf>,
    /// Family of a published file: `llamagen` or `var`.
    #[arg(long, value_name = "FAMILY")]
    pub family: Option<String>,
    /// Published file: the tokenizer's file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tokenizer: Option<PathBuf>,
    /// Published file: it is a teacher, not a student.
    #[arg(long)]
    pub teacher: bool,
    /// Set another option of the stage `images`, or of `network`, the stage that loads a published file: `--set
    /// images.npz=true`, `--set network.heads=16`.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub set: Vec<String>,
    /// How to run.
    #[command(flatten)]
    pub execution: ExecutionArgs,
}

/// What is sampled.
enum Network {
    /// An artifact of the store, with the options of the stage that made it.
    Artifact {
        hash: String,
        kind: String,
        backend: Option<String>,
        timesteps: Option<Value>,
    },
    /// A file, or a folder.
    Published { path: PathBuf, kind: &'static str },
}

/// Draws images.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    if let Some(dir) = &args.output {
        check_is_free(dir)?;
    }
    let runtime = context.runtime()?;
    let path = Path::new(&args.network);
    let network = if path.exists() && !args.network.is_empty() {
        published(args, path)?
    } else {
        let found = runtime.block_on(in_store(args, context));
        found.map_err(|error| match error.exit {
            Exit::NothingMatches if is_path(&args.network) => Error::new(
                Exit::NothingMatches,
                format!("there is no file or folder {}", args.network),
            ),
            _ => error,
        })?
    };
    let known = store_if_there(&runtime, &context.store)?;
    let mut plugins = Plugins::new(
        search_dirs(&context.plugin_dirs),
        &runtime,
        known.as_deref(),
    );
    let backend = backend(args, &network, &mut plugins)?;
    let (text, set) = written(args, &network, &backend)?;
    let here = std::env::current_dir()?;
    let shown_path = PathBuf::from("retort-sample.yaml");
    let mut recipe = recipe::parse(&shown_path, here, text, &set)?;
    recipe.source.home = context.home();
    let settings = args.execution.settings(&recipe.source.base_dir, context)?;
    let plan = devices::plan(&recipe, &mut plugins, &settings)?;
    let roles = SelectionArgs::default().roles(&plan)?;
    let planned = PlannedRun {
        plan,
        roles,
        shown_path,
        resumed_from: None,
        sweep: None,
    };
    let trust = HashTrust::Trusted;
    let store = planned.prepare(&runtime, known.as_ref(), trust, &mut plugins, context)?;
    let run = planned.carry_out(&runtime, &store, &args.execution, context)?;
    let Some(dir) = &args.output else {
        return Ok(());
    };
    let made = runtime.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let mut rows = store.list_artifacts(Some(&run)).await?;
        rows.retain(|row| row.is_output && row.stage == "images");
        store.close().await;
        Ok::<_, Error>(rows.pop())
    })?;
    match made {
        Some(row) => copy(&row, dir, context),
        None => Ok(()),
    }
}

/// Whether a text can only be a path, not a reference to a run or an artifact.
fn is_path(text: &str) -> bool {
    let endings = [".pt", ".pth", ".ckpt", ".bin", ".safetensors"];
    ["/", "./", "../"]
        .iter()
        .any(|start| text.starts_with(start))
        || endings.iter().any(|end| text.ends_with(end))
}

/// Existing pictures are not mixed in or overwritten.
fn check_is_free(dir: &Path) -> Result<(), Error> {
    let is_empty = || std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    match !dir.exists() || is_empty() {
        true => Ok(()),
        false => Err(Error::new(
            Exit::Usage,
            format!("{} is not an empty directory", dir.display()),
        )
        .hint("name another directory with -o")),
    }
}

fn published(args: &Args, path: &Path) -> Result<Network, Error> {
    let missing = |what: &str, example: &str| {
        Error::new(
            Exit::Usage,
            format!("{} is a file: also name {what}", path.display()),
        )
        .hint(example.to_owned())
    };
    if args.family.is_none() {
        return Err(missing(
            "its family",
            "say --family llamagen or --family var",
        ));
    }
    if args.tokenizer.is_none() {
        return Err(missing("its tokenizer", "say --tokenizer vq_ds16_c2i.pt"));
    }
    Ok(Network::Published {
        path: std::path::absolute(path)?,
        kind: if args.teacher { "teacher" } else { "student" },
    })
}

/// The referenced artifact: itself, or the last of its kind in a run.
async fn in_store(args: &Args, context: &Context) -> Result<Network, Error> {
    let store = Store::open(&context.store, Access::ReadOnly)
        .await
        .map_err(|error| match error {
            missing @ StoreError::Missing { .. } => Error::from(missing).hint(format!(
                "`{}` is not a file, and there is no store; name one with --store",
                args.network
            )),
            error => error.into(),
        })?;
    let of_network = |row: &&ArtifactRow| KINDS.contains(&row.artifact.kind.as_str());
    let row = match store.resolve_artifact(&args.network).await {
        Ok(hash) => store.newest_with_hash(&hash).await?,
        Err(no_artifact @ StoreError::NoArtifact { .. }) if !args.network.contains('/') => {
            let run = store.resolve_run(&args.network).await;
            let run = run.map_err(|error| match error {
                StoreError::NoRun { runs: 1.., .. } => no_artifact,
                error => error,
            })?;
            let rows = store.list_artifacts(Some(&run)).await?;
            let of = |kind: &&str| {
                let kind = *kind;
                let outputs = rows.iter().filter(|row| row.is_output);
                outputs.rev().find(|row| row.artifact.kind == kind).cloned()
            };
            let found = KINDS.iter().find_map(of);
            if found.is_none() {
                return Err(Error::new(
                    Exit::NothingMatches,
                    format!("run {run} has no student or teacher"),
                ));
            }
            found
        }
        Err(error) => return Err(error.into()),
    };
    let Some(row) = row.filter(|row| of_network(&row)) else {
        return Err(Error::new(
            Exit::NothingMatches,
            format!("`{}` is not a student or teacher", args.network),
        )
        .hint("`retort artifacts list --kind student` shows those that are"));
    };
    let detail = store.run_detail(&row.run).await?;
    store.close().await;
    let maker = detail.stages.iter().find(|stage| stage.name == row.stage);
    Ok(Network::Artifact {
        timesteps: maker.and_then(|stage| stage.options.get("timesteps").cloned()),
        backend: maker.map(|stage| stage.plugin.name.clone()),
        hash: row.artifact.hash,
        kind: row.artifact.kind,
    })
}

fn backend(args: &Args, network: &Network, plugins: &mut Plugins<'_>) -> Result<String, Error> {
    let made_by = match network {
        Network::Artifact { backend, .. } => backend.clone(),
        Network::Published { .. } => None,
    };
    if let Some(name) = args.backend.clone().or(made_by) {
        return Ok(name);
    }
    let names = plugins.names();
    match names.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Error::new(Exit::Plugin, "no plugin was found")
            .hint("`retort plugin list` says where they are looked for")),
        names => Err(Error::new(Exit::Usage, "which plugin samples?")
            .hint(format!("say --backend, one of {}", names.join(", ")))),
    }
}

/// The recipe's text, and the changes that arguments make.
fn written(args: &Args, network: &Network, backend: &str) -> Result<(String, Vec<String>), Error> {
    let mut text = TEMPLATE.to_owned();
    let (kind, timesteps) = match network {
        Network::Artifact {
            hash,
            kind,
            timesteps,
            ..
        } => {
            let given = json!({NETWORK: {"hash": hash, "kind": kind}});
            text.push_str(&format!("artifacts: {given}\n"));
            (kind.as_str(), timesteps.as_ref())
        }
        Network::Published { path, kind } => {
            let tokenizer = args.tokenizer.as_deref().unwrap_or(Path::new(""));
            let stage = json!({
                "kind": kind, "family": args.family, "model": path, "tokenizer": std::path::absolute(tokenizer)?,
            });
            // The template ends with the stages.
            text.push_str(&format!("  {NETWORK}: {stage}\n"));
            (*kind, None)
        }
    };
    let mut sampler = json!({"kind": kind, kind: NETWORK});
    if kind == "student" {
        sampler["timesteps"] = passes(&args.steps, timesteps)?;
    } else if args.steps != "1" {
        return Err(Error::new(
            Exit::Usage,
            "--steps is for students; this is a teacher",
        ));
    }
    if let Some(guidance) = args.guidance {
        if kind == "student" {
            return Err(Error::new(
                Exit::Usage,
                "--guidance is for teachers: a student has that of its teacher",
            ));
        }
        sampler["distribution"] = json!({"guidance": guidance});
    }
    let mut set = vec![
        format!("backend={backend}"),
        format!("device={}", args.device),
        format!("seed={}", args.seed),
        format!("images.sampler={sampler}"),
    ];
    if let (Network::Published { .. }, Some(timesteps)) = (network, sampler.get("timesteps")) {
        // A file does not name its student's timesteps.
        set.push(format!("{NETWORK}.timesteps={timesteps}"));
    }
    let (labels, number) = labels(args)?;
    set.extend(number.map(|number| format!("images.count={number}")));
    set.extend(labels.map(|labels| format!("images.labels={labels}")));
    set.extend(args.set.iter().cloned());
    Ok((text, set))
}

/// The AR steps from which a student's passes start.
fn passes(steps: &str, trained: Option<&Value>) -> Result<Value, Error> {
    let numbers: Option<Vec<u64>> = steps
        .split(',')
        .map(|one| one.trim().parse().ok())
        .collect();
    match numbers.as_deref() {
        Some([1]) => Ok(json!([0])),
        Some([number]) if *number > 1 => match trained.and_then(Value::as_array) {
            Some(trained) if trained.len() as u64 == *number => Ok(json!(trained)),
            trained => {
                let said = match trained {
                    Some(trained) => format!("it was trained from the AR steps {}", json!(trained)),
                    None => "its AR steps are not known".to_owned(),
                };
                Err(Error::new(Exit::Usage, format!("{number} passes: {said}"))
                    .hint("name the steps: --steps 0,6"))
            }
        },
        Some(numbers) if numbers.len() > 1 => Ok(json!(numbers)),
        _ => Err(Error::new(
            Exit::Usage,
            format!("`--steps {steps}`: expected 1, or steps such as 0,6"),
        )),
    }
}

/// The value of the class option, and the number of images.
fn labels(args: &Args) -> Result<(Option<String>, Option<u32>), Error> {
    let Some(text) = args.labels.as_deref().map(str::trim) else {
        return Ok((None, args.number));
    };
    // A rule, or a form that only the option supports: a list, a tensor of a file.
    if ["balanced", "drawn"].contains(&text) || text.starts_with(['{', '[']) {
        return Ok((Some(text.to_owned()), args.number));
    }
    let wrong = |what: String| {
        Error::new(Exit::Usage, format!("`--labels {text}`: {what}"))
            .hint("write `balanced`, `drawn`, numbers such as 3,1,4, or names of classes")
    };
    let mut classes: Vec<Value> = Vec::new();
    for one in text.split(',').map(str::trim) {
        let is_number = one.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
        match one.parse::<u32>() {
            _ if one.is_empty() => return Err(wrong("a class is empty".into())),
            Ok(number) => classes.push(json!(number)),
            Err(_) if is_number && one.parse::<f64>().is_ok() => {
                return Err(wrong(format!("{one} is not a class number")));
            }
            Err(_) => classes.push(json!(one)),
        }
    }
    let number = args
        .number
        .unwrap_or(u32::try_from(classes.len()).unwrap_or(u32::MAX));
    if number > 100_000 {
        return Err(
            Error::new(Exit::Usage, "classes are listed for at most 100000 images")
                .hint("`balanced` and `drawn` are for any number"),
        );
    }
    let all: Vec<&Value> = classes.iter().cycle().take(number as usize).collect();
    Ok((Some(json!(all).to_string()), Some(number)))
}

/// Copies the pictures of an artifact into a directory.
fn copy(row: &ArtifactRow, dir: &Path, context: &Context) -> Result<(), Error> {
    let from = Layout::new(&context.store)?.artifact(&row.artifact.hash);
    let refused = |path: &Path| {
        let message = format!("{} cannot be copied", path.display());
        move |error: std::io::Error| Error::new(Exit::Internal, message).cause(&error)
    };
    std::fs::create_dir_all(dir).map_err(refused(dir))?;
    let mut count = 0;
    for file in &row.artifact.files {
        let Some(name) = file
            .path
            .rsplit('/')
            .next()
            .filter(|name| name.ends_with(".png"))
        else {
            continue;
        };
        let to = dir.join(name);
        let reader = artifact::open_inner(&from, &file.path).map_err(refused(&to))?;
        let mut writer = std::fs::File::create_new(&to).map_err(refused(&to))?;
        std::io::copy(&mut reader.take(show::MOST_BYTES), &mut writer).map_err(refused(&to))?;
        count += 1;
    }
    if !context.quiet {
        let files = output::count(count, "picture");
        output::say(&format!("{files} in {}", dir.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_a_number_or_steps() {
        let trained = json!([0, 6]);
        let check = |steps: &str, expected: Value| {
            assert_eq!(passes(steps, Some(&trained)).unwrap(), expected, "{steps}");
        };
        check("1", json!([0]));
        check("2", json!([0, 6]));
        check("0,4", json!([0, 4]));
        for wrong in ["3", "0", "", "a", "0,b", "-1"] {
            assert!(passes(wrong, Some(&trained)).is_err(), "{wrong}");
        }
        assert!(passes("2", None).is_err());
    }
}
