//! `retort inspect`: lists the contents of a checkpoint file, without loading it or running its code.

use std::path::PathBuf;

use clap::ValueHint;
use retort_checkpoint::sharded_weights::SingleShard;
use retort_checkpoint::{Checkpoint, Dictionary, shown};
use serde_json::{Value, json};

use crate::cli::{Context, Error, Exit, Format, FormatArgs, output};
use crate::table::{self, Cell, Rows};
use crate::terminal;

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file: .pth, .pt or .safetensors; or the folder or index (*.index.json) of several.
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// List the tensors of this dictionary, as in `trainer.ema_parameters`; '' is the top level.
    #[arg(long, value_name = "PATH")]
    pub select: Option<String>,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Prints the dictionaries of a file, and the tensors of one.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let place = args.file.display();
    let checkpoint = Checkpoint::open(&args.file)
        .map_err(|error| Error::new(Exit::NothingMatches, format!("{place}: {error}")))?;
    let selected = match checkpoint.select(args.select.as_deref()) {
        Ok(dictionary) => Some(dictionary),
        Err(error) if args.select.is_some() => {
            return Err(Error::new(
                Exit::NothingMatches,
                format!("{place}: {error}"),
            ));
        }
        Err(_) => None,
    };
    let dictionaries = dictionaries(&checkpoint);
    let tensors = selected.map(tensors);
    let text = match args.format.get() {
        Format::Json => {
            let document = json!({
                "file": args.file,
                "container": checkpoint.container().name(),
                "files": checkpoint.files(),
                "bytes": checkpoint.size(),
                "dictionaries": dictionaries.objects(),
                "selected": selected.map(|dictionary| &dictionary.path),
                "prefix": selected.map(Dictionary::prefix),
                "tensors": tensors.as_ref().map_or(Value::Null, Rows::objects),
                "not_interpreted": checkpoint.strangers(),
            });
            format!("{document:#}\n")
        }
        // The rows alone: the tensors where there is one dictionary to list.
        Format::Csv => tensors
            .as_ref()
            .unwrap_or(&dictionaries)
            .render(args.format.style(context)),
        Format::Table | Format::Md => {
            let style = args.format.style(context);
            let mut text = dictionaries.render(style);
            if let Some(tensors) = &tensors {
                text.push('\n');
                text.push_str(&tensors.render(style));
            }
            text
        }
    };
    if args.format.get() != Format::Json && !context.quiet {
        let files = match checkpoint.files() {
            1 => String::new(),
            files => format!(" in {files} files"),
        };
        output::say(&format!(
            "{place}: {}{files}, {}",
            checkpoint.container().name(),
            table::bytes(checkpoint.size())
        ));
        if let Some(lone) = SingleShard::of(&args.file)
            && checkpoint.files() == 1
        {
            output::say(&format!(
                "note: by its name this is file {} of {}; name the folder, or {} in it, for all",
                lone.number, lone.of, lone.index
            ));
        }
        if let Some(prefix) = selected.map(Dictionary::prefix)
            && !prefix.is_empty()
        {
            output::say(&format!(
                "note: all names begin with `{}`; `teacher` and `student` remove this prefix",
                terminal::name(prefix)
            ));
        }
        if !checkpoint.strangers().is_empty() {
            let names = terminal::name(&checkpoint.strangers().join(", "));
            output::say(&format!("note: not run, not interpreted: {names}"));
        }
    }
    output::print(&text)?;
    if selected.is_none() && !context.quiet {
        output::say("note: --select PATH lists the tensors of one dictionary");
    }
    Ok(())
}

/// One row per dictionary; an optimiser's state, a dictionary per parameter, is one row.
fn dictionaries(checkpoint: &Checkpoint) -> Rows {
    let mut rows = Rows::new(&["dictionary", "tensors", "elements", "bytes"]);
    let sums = |of: &[&Dictionary]| -> [Cell; 3] {
        let tensors = || of.iter().flat_map(|dictionary| dictionary.tensors());
        let sum = |size: fn(&retort_checkpoint::Tensor) -> u64| {
            tensors().fold(0, |sum: u64, (_, tensor)| sum.saturating_add(size(tensor)))
        };
        [
            Cell::from(tensors().count() as u64),
            Cell::from(sum(retort_checkpoint::Tensor::elements)),
            Cell::bytes(sum(retort_checkpoint::Tensor::bytes)),
        ]
    };
    let all: Vec<&Dictionary> = checkpoint.dictionaries().iter().collect();
    let (state, weights): (Vec<&Dictionary>, Vec<&Dictionary>) = all
        .into_iter()
        .partition(|dictionary| dictionary.is_optimiser());
    for dictionary in weights {
        let shown = terminal::name(&shown(&dictionary.path));
        let path = Cell::new(shown, dictionary.path.as_str());
        rows.push([path].into_iter().chain(sums(&[dictionary])));
    }
    if !state.is_empty() {
        let name = Cell::new("(optimiser state)", Value::Null);
        rows.push([name].into_iter().chain(sums(&state)));
    }
    rows
}

/// One row per tensor.
fn tensors(dictionary: &Dictionary) -> Rows {
    let title = format!("Tensors of {}", terminal::name(&shown(&dictionary.path)));
    let mut rows = Rows::new(&["name", "shape", "dtype", "bytes"]).titled(title);
    for (name, tensor) in dictionary.tensors() {
        let sizes: Vec<String> = tensor.shape.iter().map(usize::to_string).collect();
        let shape = format!("({})", sizes.join(", "));
        rows.push([
            Cell::name(name),
            Cell::new(shape, tensor.shape.clone()),
            tensor.dtype.to_string().to_lowercase().into(),
            Cell::bytes(tensor.bytes()),
        ]);
    }
    rows
}
