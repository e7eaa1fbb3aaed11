//! `retort artifacts`.

use std::collections::HashSet;

use clap::Subcommand;

use crate::artifact::{self, Layout};
use crate::cli::{Context, Error, Exit, FormatArgs, runs, talk};
use crate::store::{Access, ArtifactRow, Store};
use crate::table::{Cell, Rows, Style, Tone};

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
    // One content may have been made more than once; it lies on the disk once.
    let mut seen = HashSet::new();
    artifacts.retain(|row| wanted(&row.artifact.hash) && seen.insert(row.artifact.hash.clone()));

    let layout = Layout::new(&context.store)?;
    let mut damaged = HashSet::new();
    let mut rows = Rows::new(&["hash", "kind", "stage", "run", "file", "problem"]);
    for row in &artifacts {
        for damage in artifact::verify(&layout.artifact(&row.artifact.hash), &row.artifact) {
            damaged.insert(&row.artifact.hash);
            rows.push([
                runs::hash(&row.artifact.hash),
                row.artifact.kind.as_str().into(),
                row.stage.as_str().into(),
                row.run.0.as_str().into(),
                damage.path.into(),
                Cell::from(damage.problem).tone(Tone::Bad),
            ]);
        }
    }
    let style = args.format.style(context);
    let for_people = matches!(style, Style::Table { .. });
    if !(rows.is_empty() && for_people) {
        talk::print(&rows.render(style))?;
    }
    let verified = format!(
        "{} artifacts verified, {} damaged",
        artifacts.len(),
        damaged.len()
    );
    if damaged.is_empty() {
        if !context.quiet {
            talk::say(&verified);
        }
        return Ok(());
    }
    Err(Error::new(Exit::Internal, verified)
        .hint("remove the damaged directories from the store; a run then makes them again"))
}
