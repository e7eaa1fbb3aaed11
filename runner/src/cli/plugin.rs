//! `retort plugin`: lists and checks plugins; creates, installs and tests new ones.

use clap::Subcommand;
use retort_abi::{Description, Device};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tokio::runtime::Runtime;

use crate::cli::{Context, Error, Exit, Format, FormatArgs, output};
use crate::plan::{DescribeError, PluginIdentity};
use crate::plugin::{self, PluginFile, Plugins, conformance, search_dirs};
use crate::store::{Access, Store};
use crate::table::{Cell, CellStyle, Rows, Style, bytes};

pub mod install;
pub mod lock;
pub mod new;
pub mod test;

/// Arguments of `plugin`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the plugins found, where they are and what they can do.
    List(ListArgs),
    /// Load a plugin in a worker process and check its answers and devices.
    Check(CheckArgs),
    /// Create a plugin project that builds, installs and runs at once.
    New(new::Args),
    /// Copy a plugin into the search path.
    Install(install::Args),
    /// Check that a plugin meets the requirements.
    Test(test::Args),
    /// Allow only the plugins that are in a directory now.
    Lock(lock::Args),
}

/// Arguments of `plugin list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `plugin check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Name of the plugin, the path of its shared object, or the directory of its project.
    #[arg(value_name = "PLUGIN")]
    pub plugin: String,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Lists or checks plugins.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let runtime = context.runtime()?;
    match &args.command {
        Command::List(args) => list(args, &runtime, context),
        Command::Check(args) => check(args, &runtime, context),
        Command::New(args) => new::execute(args, context),
        Command::Install(args) => install::execute(args, &runtime, context),
        Command::Test(args) => test::execute(args, &runtime, context),
        Command::Lock(args) => lock::execute(args, context),
    }
}

fn list(args: &ListArgs, runtime: &Runtime, context: &Context) -> Result<(), Error> {
    // The store is only a cache; without a readable one, plugins are asked.
    let store = runtime
        .block_on(Store::open(&context.store, Access::ReadOnly))
        .ok();
    let dirs = search_dirs(&context.plugin_dirs);
    let plugins = Plugins::new(dirs.clone(), runtime, store.as_ref());
    let mut rows = Rows::new(&[
        "plugin", "variant", "version", "devices", "dtypes", "stages", "file", "problem",
    ]);
    let all = plugin::find_all(&dirs);
    for found in &all {
        let described = plugins.describe_file(&found.path);
        let devices = match &described {
            Ok((identity, _)) => plugins.probe_file(identity),
            Err(_) => Ok(Vec::new()),
        };
        rows.push(row(found, described, devices));
        for shadowed in &found.shadowed {
            output::say(&format!(
                "note: {} is not used: {} comes first",
                shadowed.display(),
                found.path.display()
            ));
        }
    }
    if all.is_empty() {
        let mut text = String::from("no plugins in these directories:");
        for dir in &dirs {
            text.push_str(&format!("\n    {} ({})", dir.path.display(), dir.origin));
        }
        output::say(&text);
    }
    output::print(&rows.render(args.format.style(context)))?;
    Ok(())
}

fn row(
    found: &PluginFile,
    described: Result<(PluginIdentity, Description), DescribeError>,
    devices: Result<Vec<Device>, DescribeError>,
) -> Vec<Cell> {
    let name = Cell::from(found.name.as_str());
    let variant = found.variant.as_deref().map_or_else(Cell::none, Cell::from);
    let file = Cell::from(found.path.display().to_string());
    let list = |items: &[String]| Cell::new(items.join(" "), items.to_vec());
    let none = Cell::none;
    let bad = |problem: String| Cell::from(problem).style(CellStyle::Error);
    let (description, devices) = match (described, devices) {
        (Ok((_, description)), Ok(devices)) => (description, devices),
        (Err(error), _) | (_, Err(error)) => {
            let problem = bad(error.message);
            return vec![name, variant, none(), none(), none(), none(), file, problem];
        }
    };
    let stages: Vec<String> = description
        .stages
        .iter()
        .map(|stage| stage.kind.clone())
        .collect();
    let misnamed = description.name.replace('-', "_") != found.name.replace('-', "_");
    let unusable = devices.iter().filter_map(|device| {
        let why = device.unusable.as_deref()?;
        Some(format!("{} cannot be used: {why}", device.name))
    });
    let problem = match misnamed {
        true => bad(format!("calls itself `{}`", description.name)),
        false => match unusable.collect::<Vec<_>>().join("; ") {
            none if none.is_empty() => Cell::none(),
            why => Cell::from(why).style(CellStyle::Warning),
        },
    };
    vec![
        name,
        variant,
        description.version.into(),
        present(&devices),
        list(&description.dtypes),
        list(&stages),
        file,
        problem,
    ]
}

/// The usable devices with their memory; in machine-readable formats all devices.
fn present(devices: &[Device]) -> Cell {
    let usable = devices.iter().filter(|device| device.unusable.is_none());
    let shown = usable.map(|device| match device.memory {
        Some(memory) => format!("{} ({})", device.name, bytes(memory)),
        None => device.name.clone(),
    });
    Cell::new(shown.collect::<Vec<_>>().join(", "), json!(devices))
}

fn check(args: &CheckArgs, runtime: &Runtime, context: &Context) -> Result<(), Error> {
    let dirs = search_dirs(&context.plugin_dirs);
    let path = named(&args.plugin, &dirs)?;
    // Without a store, so that the plugin itself is asked.
    let plugins = Plugins::new(dirs, runtime, None);
    let (identity, description) = plugins.describe_file(&path)?;
    let again = plugins.describe_file(&path)?.1;
    let mut problems = conformance::inconsistencies(&description);
    if again != description {
        problems.push("it describes itself differently when asked twice".to_owned());
    }
    let devices = plugins.probe_file(&identity)?;
    if devices.iter().all(|device| device.unusable.is_some()) {
        problems.push("none of its devices can be used".to_owned());
    }
    output::print(&match args.format.get() {
        Format::Json => format!(
            "{:#}\n",
            document(&identity, &description, &devices, &problems)
        ),
        _ => text(
            &identity,
            &description,
            &devices,
            args.format.style(context),
        ),
    })?;
    if problems.is_empty() {
        return Ok(());
    }
    let list: String = problems
        .iter()
        .map(|problem| format!("\n  - {problem}"))
        .collect();
    Err(Error::new(
        Exit::Plugin,
        format!("{} is not a valid plugin:{list}", path.display()),
    ))
}

/// The file of a plugin given by name, by path, or by the directory of its project.
fn named(plugin: &str, dirs: &[plugin::SearchDir]) -> Result<PathBuf, Error> {
    let is_path = plugin.contains('/')
        || plugin.starts_with('.')
        || plugin.ends_with(std::env::consts::DLL_SUFFIX);
    match is_path {
        true => built(&std::path::absolute(plugin)?),
        false => Ok(plugin::find(plugin, dirs)?.path),
    }
}

/// The shared object at a path: the file itself, or the one built by a project in this directory.
fn built(path: &Path) -> Result<PathBuf, Error> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let places = [path.to_owned(), path.join("target/release")];
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in places
        .iter()
        .flat_map(std::fs::read_dir)
        .flatten()
        .flatten()
    {
        let file = entry.file_name();
        if file.to_str().and_then(plugin::name_of).is_some() {
            found.push(entry.path());
        }
    }
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Error::new(
            Exit::NothingMatches,
            format!(
                "there is no {} in {} or its target/release",
                plugin::file_name("NAME"),
                path.display()
            ),
        )
        .hint("build the plugin first: `make`, or `cargo build --release`")),
        many => {
            let list: String = many
                .iter()
                .map(|file| format!("\n    {}", file.display()))
                .collect();
            Err(Error::new(
                Exit::NothingMatches,
                format!("there are several plugins in {}:{list}", path.display()),
            )
            .hint("name one of the files"))
        }
    }
}

fn document(
    identity: &PluginIdentity,
    description: &Description,
    devices: &[Device],
    problems: &[String],
) -> Value {
    let stages: Vec<Value> = description
        .stages
        .iter()
        .map(|stage| json!({"kind": stage.kind, "output": stage.output, "summary": stage.summary}))
        .collect();
    json!({
        "name": identity.name, "version": identity.version, "path": identity.path, "hash": identity.hash,
        "summary": description.summary, "license": description.license, "dtypes": description.dtypes,
        "families": description.families, "stages": stages, "devices": devices, "problems": problems,
    })
}

fn text(
    identity: &PluginIdentity,
    description: &Description,
    devices: &[Device],
    style: Style,
) -> String {
    let mut text = format!(
        "{} {}  {}\nfile   {}\nblake3 {}\ndtypes {}\n\n",
        identity.name,
        identity.version,
        description.summary,
        identity.path.display(),
        identity.hash,
        description.dtypes.join(" ")
    );
    let mut rows = Rows::new(&["device", "model", "memory", "state"]);
    for device in devices {
        let state = match &device.unusable {
            None => Cell::from("usable").style(CellStyle::Ok),
            Some(reason) => Cell::from(format!("unusable: {reason}")).style(CellStyle::Error),
        };
        let memory = device.memory.map_or_else(Cell::none, Cell::bytes);
        rows.push([
            device.name.as_str().into(),
            device.model.as_str().into(),
            memory,
            state,
        ]);
    }
    text.push_str(&rows.render(style));
    text.push('\n');
    let mut rows = Rows::new(&["stage kind", "makes", "summary"]);
    for stage in &description.stages {
        rows.push([
            stage.kind.as_str().into(),
            stage.output.as_str().into(),
            stage.summary.as_str().into(),
        ]);
    }
    text.push_str(&rows.render(style));
    text
}
