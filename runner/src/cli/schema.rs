//! `retort schema`: the JSON schema of recipes, for editors and for reading up on options.

use retort_abi::Description;
use serde_json::Value;

use crate::cli::{Context, Error, Exit, output};
use crate::plan::Descriptions;
use crate::plugin::{Plugins, search_dirs};
use crate::schema;
use crate::table::{Cell, Rows};

/// Arguments of `schema`.
#[derive(Debug, clap::Args)]
#[command(after_help = "With the YAML plugin of an editor:\n  \
    retort schema > .retort.schema.json\n\
    and as the first line of a recipe:\n  \
    # yaml-language-server: $schema=.retort.schema.json\n\n\
    The options of one kind of stage, as a table:\n  \
    retort schema --kind distill --table")]
pub struct Args {
    /// Plugins whose stages the schema includes (may be repeated); default: every plugin found.
    #[arg(long, value_name = "PLUGIN")]
    pub plugin: Vec<String>,
    /// Print only the schema of the options of this kind of stage.
    #[arg(long, value_name = "KIND")]
    pub kind: Option<String>,
    /// Print the options as a table for reading.
    #[arg(long, requires = "kind")]
    pub table: bool,
}

/// Prints the schema.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let runtime = context.runtime()?;
    let store = context.known_store(&runtime)?;
    let mut plugins = Plugins::new(search_dirs(&context.plugin_dirs), &runtime, store.as_ref());
    let descriptions = descriptions(&args.plugin, &mut plugins)?;
    let Some(kind) = &args.kind else {
        output::print(&format!("{:#}\n", schema::recipe_schema(&descriptions)))?;
        return Ok(());
    };
    let mut stages = descriptions.iter().flat_map(|plugin| &plugin.stages);
    let Some(stage) = stages.find(|stage| stage.kind == *kind) else {
        let known = descriptions
            .iter()
            .flat_map(|plugin| &plugin.stages)
            .map(|stage| stage.kind.as_str());
        let error = Error::new(
            Exit::NothingMatches,
            format!("no plugin has the stage kind `{kind}`"),
        );
        return Err(Error {
            hint: schema::suggest(kind, known),
            ..error
        });
    };
    if args.table {
        let rows = options(&stage.schema).titled(format!("{}: {}", stage.kind, stage.summary));
        output::print(&rows.render(context.table_style()))?;
    } else {
        output::print(&format!("{:#}\n", stage.schema))?;
    }
    Ok(())
}

/// The descriptions of the named plugins, or of all working ones.
fn descriptions(
    names: &[String],
    plugins: &mut dyn Descriptions,
) -> Result<Vec<Description>, Error> {
    if !names.is_empty() {
        return names
            .iter()
            .map(|name| Ok(plugins.describe(name)?.description.clone()))
            .collect();
    }
    let mut descriptions = Vec::new();
    for name in plugins.names() {
        match plugins.describe(&name) {
            Ok(build) => descriptions.push(build.description.clone()),
            Err(error) => tracing::warn!("plugin `{name}` is left out: {error}"),
        }
    }
    if descriptions.is_empty() {
        tracing::warn!(
            "no plugin was found: the schema has no stage kinds; `retort plugin list` says more"
        );
    }
    Ok(descriptions)
}

/// A row per option: name, type, default, description; options inside options are indented by their path.
fn options(schema: &Value) -> Rows {
    let mut rows = Rows::new(&["option", "type", "default", "description"]);
    for option in schema::options(schema) {
        rows.push([
            Cell::from(option.name.as_str()),
            Cell::from(option.kind.as_str()),
            Cell::from(option.default.as_str()),
            Cell::from(option.description.as_str()),
        ]);
    }
    rows
}
