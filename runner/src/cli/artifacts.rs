//! `retort artifacts`.

use clap::Subcommand;

use crate::cli::{Context, Error, Exit, FormatArgs, runs, talk};
use crate::store::{Access, ArtifactRow, Store};
use crate::table::{Cell, Rows, Style};

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
}

/// Arguments of `artifacts list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Only those of this run: an id or the beginning of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN")]
    pub run: Option<String>,
    /// The same as RUN.
    #[arg(long = "run", value_name = "RUN", conflicts_with = "run", hide = true)]
    pub only_run: Option<String>,
    /// Only those of this kind (`teacher`, `samples`).
    #[arg(long, value_name = "KIND")]
    pub kind: Option<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `artifacts verify`.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// Beginnings of hashes; without any, all artifacts.
    #[arg(value_name = "HASH")]
    pub hash: Vec<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Lists or verifies artifacts.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    match &args.command {
        Command::List(args) => list(args, context),
        Command::Verify(args) => verify(args, context),
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
    let mut rows = Rows::new(&[
        "hash", "kind", "stage", "run", "made", "size", "files", "picture",
    ]);
    for row in artifacts {
        let artifact = &row.artifact;
        let preview = artifact.meta.preview.as_ref();
        let stage = if row.is_output {
            row.stage.clone()
        } else {
            format!("{}/{}", row.stage, artifact.name)
        };
        rows.push([
            runs::hash(&artifact.hash),
            artifact.kind.as_str().into(),
            stage.into(),
            row.run.0.as_str().into(),
            row.created.into(),
            Cell::bytes(artifact.size),
            (artifact.files.len() as u64).into(),
            preview
                .map(|preview| format!("{}/{preview}", path(row, context)))
                .into(),
        ]);
    }
    rows
}

fn list(args: &ListArgs, context: &Context) -> Result<(), Error> {
    let style = args.format.style(context);
    let mut artifacts = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = match args.run.as_ref().or(args.only_run.as_ref()) {
            Some(reference) => Some(store.resolve_run(reference).await?),
            None => None,
        };
        let artifacts = store.list_artifacts(run.as_ref()).await?;
        store.close().await;
        Ok::<_, Error>(artifacts)
    })?;
    artifacts.retain(|row| {
        args.kind
            .as_ref()
            .is_none_or(|kind| row.artifact.kind == *kind)
    });
    artifacts.reverse();
    let text = match style {
        Style::Json => {
            let with_path = |row: &ArtifactRow| {
                let mut shown = serde_json::json!(row);
                shown["path"] = path(row, context).into();
                shown
            };
            format!(
                "{:#}\n",
                artifacts
                    .iter()
                    .map(with_path)
                    .collect::<serde_json::Value>()
            )
        }
        style => rows(&artifacts, context).render(style),
    };
    Ok(talk::print(&text)?)
}

fn verify(_args: &VerifyArgs, _context: &Context) -> Result<(), Error> {
    Err(Error::new(
        Exit::Internal,
        "`artifacts verify` is not built yet",
    ))
}
