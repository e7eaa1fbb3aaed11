//! `retort artifacts`.

use std::collections::HashSet;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};
use retort_checkpoint::published::{self, ArtifactNetwork, Kind};

use crate::artifact::file_name;
use crate::artifact::{self, Layout};
use crate::cli::{Context, Error, Exit, FormatArgs, output};
use crate::draft::{self, Draft};
use crate::store::{Access, ArtifactRow, Store};
use crate::table::{self, Cell, CellStyle, Rows, Style};

/// Arguments of `artifacts`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List artifacts, the newest first.
    List(ListArgs),
    /// Hash the files of artifacts again and compare.
    Verify(VerifyArgs),
    /// Write a tokenizer, teacher or student as a file that other programs load.
    Export(ExportArgs),
}

/// Arguments of `artifacts export`.
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// The artifact: a prefix of its hash, or RUN/STAGE for the output of a stage (`latest/student`).
    #[arg(value_name = "ARTIFACT")]
    pub artifact: String,
    /// Output format.
    #[arg(long = "as", value_name = "FORM")]
    pub form: Form,
    /// Which network of the artifact.
    #[arg(long, value_name = "NETWORK", default_value = "own")]
    pub network: ExportedNetwork,
    /// Where to write it. By default STAGE.pth in the working directory, or tokenizer.pth.
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Overwrite an existing file.
    #[arg(long)]
    pub force: bool,
}

/// Forms of exported networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// A torch file with the weights where the published VAR, LlamaGen and Distilled Decoding scripts expect them.
    Published,
}

/// Networks of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportedNetwork {
    /// The artifact's main network, such as the student.
    Own,
    /// The tokenizer that belongs to that network.
    Tokenizer,
}

/// Arguments of `artifacts list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Only those of this run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN")]
    pub run: Option<String>,
    /// The same as RUN.
    #[arg(long = "run", value_name = "RUN", conflicts_with = "run", hide = true)]
    pub only_run: Option<String>,
    /// Only those of this kind (`teacher`, `samples`).
    #[arg(long, value_name = "KIND")]
    pub kind: Option<String>,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `artifacts verify`.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// Prefixes of hashes; without any, all artifacts.
    #[arg(value_name = "HASH")]
    pub hash: Vec<String>,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Lists, verifies or exports artifacts.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    match &args.command {
        Command::List(args) => list(args, context),
        Command::Verify(args) => verify(args, context),
        Command::Export(args) => export(args, context),
    }
}

/// Where an artifact lies.
pub(super) fn path(artifact: &ArtifactRow, context: &Context) -> String {
    context
        .store
        .join("artifacts")
        .join(&artifact.artifact.hash)
        .display()
        .to_string()
}

/// Artifacts, a row each.
pub(super) fn rows(artifacts: &[ArtifactRow], context: &Context) -> Rows {
    let mut rows = Rows::new(&HEADS);
    for row in artifacts {
        rows.push(cells(row, context));
    }
    rows
}

const HEADS: [&str; 8] = [
    "hash", "kind", "stage", "run", "made", "size", "files", "picture",
];

fn cells(row: &ArtifactRow, context: &Context) -> [Cell; HEADS.len()] {
    let artifact = &row.artifact;
    let preview = artifact.meta.preview.as_ref();
    let stage = if row.is_output {
        row.stage.clone()
    } else {
        format!("{}/{}", row.stage, artifact.name)
    };
    [
        Cell::hash(&artifact.hash),
        artifact.kind.as_str().into(),
        stage.into(),
        row.run.0.as_str().into(),
        row.created.into(),
        Cell::bytes(artifact.size),
        (artifact.files.len() as u64).into(),
        preview
            .map(|preview| format!("{}/{preview}", path(row, context)))
            .into(),
    ]
}

fn list(args: &ListArgs, context: &Context) -> Result<(), Error> {
    let style = args.format.style(context);
    if style == Style::Json {
        return list_as_json(args, context);
    }
    let mut rows = Rows::new(&HEADS);
    each(args, context, |row| {
        rows.push(cells(&row, context));
        ControlFlow::Continue(())
    })?;
    Ok(output::print(&rows.render(style))?)
}

/// Writes each artifact as soon as it is read: its list of files may be long.
fn list_as_json(args: &ListArgs, context: &Context) -> Result<(), Error> {
    let mut out = output::stdout();
    let (mut written, mut is_empty) = (Ok(()), true);
    each(args, context, |row| {
        let mut shown = serde_json::json!(row);
        shown["path"] = path(&row, context).into();
        written = table::list_value(&mut out, is_empty, &shown);
        is_empty = false;
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })?;
    written?;
    table::end_list(&mut out, is_empty)?;
    Ok(out.flush()?)
}

/// Passes the artifacts that are to be listed to `take`, the newest first.
fn each(
    args: &ListArgs,
    context: &Context,
    mut take: impl FnMut(ArtifactRow) -> ControlFlow<()>,
) -> Result<(), Error> {
    context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = match args.run.as_ref().or(args.only_run.as_ref()) {
            Some(reference) => Some(store.resolve_run(reference).await?),
            None => None,
        };
        let wanted = |row: ArtifactRow| match &args.kind {
            Some(kind) if row.artifact.kind != *kind => ControlFlow::Continue(()),
            _ => take(row),
        };
        store.each_artifact(run.as_ref(), wanted).await?;
        store.close().await;
        Ok::<_, Error>(())
    })
}

fn verify(args: &VerifyArgs, context: &Context) -> Result<(), Error> {
    let mut artifacts = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let artifacts = store.list_artifacts(None).await?;
        store.close().await;
        Ok::<_, Error>(artifacts)
    })?;
    for prefix in &args.hash {
        if prefix.is_empty()
            || !artifacts
                .iter()
                .any(|row| row.artifact.hash.starts_with(prefix.as_str()))
        {
            return Err(Error::new(
                Exit::NothingMatches,
                format!("no artifact's hash begins with `{prefix}`"),
            )
            .hint("`retort artifacts list` shows them all"));
        }
    }
    let wanted = |hash: &str| {
        args.hash.is_empty()
            || args
                .hash
                .iter()
                .any(|prefix| hash.starts_with(prefix.as_str()))
    };
    // Several stages may have made the same content; it is stored once.
    let mut seen = HashSet::new();
    artifacts.retain(|row| wanted(&row.artifact.hash) && seen.insert(row.artifact.hash.clone()));

    let layout = Layout::new(&context.store)?;
    let mut damaged = HashSet::new();
    let mut of_disk = false;
    let mut rows = Rows::new(&["hash", "kind", "stage", "run", "file", "problem"]);
    for row in &artifacts {
        for damage in artifact::verify(&layout.artifact(&row.artifact.hash), &row.artifact) {
            damaged.insert(&row.artifact.hash);
            of_disk |= artifact::is_of_disk(&damage.problem);
            rows.push([
                Cell::hash(&row.artifact.hash),
                row.artifact.kind.as_str().into(),
                row.stage.as_str().into(),
                row.run.0.as_str().into(),
                damage.path.into(),
                Cell::from(damage.problem).style(CellStyle::Error),
            ]);
        }
    }
    let style = args.format.style(context);
    let for_people = matches!(style, Style::Table { .. });
    if !(rows.is_empty() && for_people) {
        output::print(&rows.render(style))?;
    }
    let verified = format!(
        "{} artifacts verified, {} damaged",
        artifacts.len(),
        damaged.len()
    );
    if damaged.is_empty() {
        if !context.quiet {
            output::say(&verified);
        }
        return Ok(());
    }
    // Nothing is removed from a failing disk: it may still be readable elsewhere.
    Err(Error::new(Exit::Internal, verified).hint(match of_disk {
        true => artifact::DISK,
        false => "remove the damaged directories from the store; a run then makes them again",
    }))
}

fn export(args: &ExportArgs, context: &Context) -> Result<(), Error> {
    let artifact = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let hash = store.resolve_artifact(&args.artifact).await?;
        let artifact = store.newest_with_hash(&hash).await?;
        store.close().await;
        artifact.ok_or_else(|| {
            let message = format!("no artifact `{}` in this store", args.artifact);
            Error::new(Exit::NothingMatches, message)
        })
    })?;
    let Form::Published = args.form;
    let kind = Kind::of(&artifact.artifact.kind).ok_or_else(|| {
        let message = format!(
            "{} is of kind {}: only tokenizers, teachers and students have a published form",
            args.artifact, artifact.artifact.kind
        );
        Error::new(Exit::NothingMatches, message)
            .hint("`retort artifacts list --kind student` shows the students")
    })?;
    let part = match (args.network, kind) {
        (ExportedNetwork::Tokenizer, _) | (_, Kind::Tokenizer) => ArtifactNetwork::Tokenizer,
        (ExportedNetwork::Own, _) => ArtifactNetwork::Network,
    };
    let name = match part {
        ArtifactNetwork::Tokenizer => "tokenizer",
        ArtifactNetwork::Network => &artifact.stage,
    };
    let output = match &args.output {
        Some(output) => output.clone(),
        // A stage of an imported run may have any name.
        None => PathBuf::from(format!("{}.pth", file_name(name))),
    };
    if !args.force && output.symlink_metadata().is_ok() {
        let message = format!("{} is there already", output.display());
        return Err(Error::new(Exit::Usage, message).hint("give another --output, or --force"));
    }
    let refused = |error: std::io::Error| {
        Error::new(Exit::Internal, format!("{}: {error}", output.display()))
    };
    let place = draft::place(&output).map_err(refused)?;
    draft::tidy(place.parent().unwrap_or(Path::new("")));
    let (draft, file) = Draft::file(&place).map_err(refused)?;
    let synced = file.try_clone().map_err(refused)?;
    let dir = Layout::new(&context.store)?.artifact(&artifact.artifact.hash);
    published::export(&dir, kind, part, (file, &output))
        .map_err(|error| Error::new(Exit::Internal, error.to_string()))?;
    synced
        .sync_all()
        .and_then(|()| draft.finish())
        .map_err(refused)?;
    Ok(output::print(&format!("{}\n", output.display()))?)
}
