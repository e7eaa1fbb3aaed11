//! `retort runs export` and `retort runs import`: runs into other stores, TensorBoard and MLflow.

use std::io::{self, BufWriter, Read};
use std::path::{Path, PathBuf};

use clap::{ValueEnum, ValueHint};

use crate::artifact::{self, file_name};
use crate::cli::{Context, Error, Exit, FormatArgs, artifacts, output};
use crate::draft::CreatedPaths;
use crate::store::{self, Access, RunDetail, RunFilter, RunId, Store, StoreError, Transfer};
use crate::table::{Cell, CellStyle, Rows};
use crate::tensorboard::{EventFile, png_size};

/// Arguments of `runs export`.
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// The runs: ids or prefixes of them, `latest`, `latest~1`, or tags. Without any, all runs.
    #[arg(value_name = "RUN")]
    pub runs: Vec<String>,
    /// Output path: a file; for TensorBoard a directory; for MLflow its database (`mlflow.db`).
    #[arg(short, long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub output: PathBuf,
    /// Output format.
    #[arg(long = "as", value_name = "WHAT", default_value = "retort")]
    pub target: ExportFormat,
    /// Include the files of artifacts, not only their records (for retort).
    #[arg(long)]
    pub files: bool,
    /// Overwrite an existing file (for retort).
    #[arg(long)]
    pub force: bool,
    /// How to print the summary.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// What runs can be exported as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// One file, for `runs import`. Also salvages a damaged store.
    Retort,
    /// Event files of scalars and pictures: `tensorboard --logdir PATH`.
    Tensorboard,
    /// Runs in a database that MLflow has made: `mlflow db upgrade sqlite:///mlflow.db`.
    Mlflow,
}

/// Arguments of `runs import`.
#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// An exported file, or the `history.db` of another store.
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// How to print the summary.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Writes runs elsewhere.
pub fn export(args: &ExportArgs, context: &Context) -> Result<(), Error> {
    match args.target {
        ExportFormat::Retort => export_file(args, context),
        ExportFormat::Tensorboard | ExportFormat::Mlflow => export_to_peer(args, context),
    }
}

fn export_file(args: &ExportArgs, context: &Context) -> Result<(), Error> {
    if args.output.exists() && !args.force {
        return Err(Error::new(
            Exit::Usage,
            format!("{} is there already", args.output.display()),
        )
        .hint("name another file, or use --force"));
    }
    let transfer = context.runtime()?.block_on(async {
        let runs = match args.runs.is_empty() {
            true => None,
            false => Some(resolve(&args.runs, context).await?),
        };
        if runs.is_none() {
            // Opening an older store migrates it; one that cannot be opened may still be readable.
            match Store::open(&context.store, Access::ReadOnly).await {
                Ok(store) => store.close().await,
                Err(StoreError::Damaged { message }) => output::say(&format!(
                    "the store is damaged ({message}): readable parts are saved"
                )),
                Err(error) => return Err(error.into()),
            }
        }
        let runs = runs.as_deref();
        Ok::<_, Error>(store::export(&context.store, runs, &args.output, args.files).await?)
    })?;
    report(&transfer, &args.format, context)
}

async fn resolve(references: &[String], context: &Context) -> Result<Vec<RunId>, Error> {
    let store = Store::open(&context.store, Access::ReadOnly).await?;
    let mut runs = Vec::new();
    for reference in references {
        runs.push(store.resolve_run(reference).await?);
    }
    store.close().await;
    Ok(runs)
}

fn export_to_peer(args: &ExportArgs, context: &Context) -> Result<(), Error> {
    let runs = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let mut ids = Vec::new();
        for reference in &args.runs {
            ids.push(store.resolve_run(reference).await?);
        }
        if args.runs.is_empty() {
            let all = store.list_runs(&RunFilter::default()).await?;
            ids.extend(all.into_iter().map(|run| run.id));
        }
        match args.target {
            ExportFormat::Mlflow => store.export_to_mlflow(&ids, &args.output).await?,
            _ => {
                let mut made = CreatedPaths::default();
                for id in &ids {
                    let run = store.run_detail(id).await?;
                    write_events(&store, &run, &args.output, &mut made, context).await?;
                }
                made.keep();
            }
        }
        store.close().await;
        Ok::<_, Error>(ids)
    })?;
    let transfer = Transfer {
        runs,
        ..Transfer::default()
    };
    report(&transfer, &args.format, context)
}

/// One directory per stage of a run: TensorBoard treats each as a run.
async fn write_events(
    store: &Store,
    run: &RunDetail,
    root: &Path,
    made: &mut CreatedPaths,
    context: &Context,
) -> Result<(), Error> {
    let summary = &run.summary;
    let dir = root.join(file_name(&summary.id.0));
    let series = store.last_metrics(&summary.id).await?;
    for stage in &run.stages {
        let of_stage = |name: &str| name == stage.name;
        let pictures = run.artifacts.iter().filter(|row| of_stage(&row.stage));
        let mut pictures = pictures
            .filter_map(|row| {
                let preview = row.artifact.meta.preview.as_ref()?;
                Some((row, PathBuf::from(artifacts::path(row, context)), preview))
            })
            .filter(|(_, dir, preview)| artifact::open_inner(dir, preview).is_ok())
            .peekable();
        let mut series = series
            .iter()
            .filter(|series| of_stage(&series.stage) && series.points > 0)
            .peekable();
        if series.peek().is_none() && pictures.peek().is_none() {
            continue;
        }
        let dir = dir.join(file_name(&stage.name));
        let path = dir.join(format!(
            "events.out.tfevents.{}.retort",
            summary.started.0 / 1000
        ));
        let failed = |error: io::Error| {
            let message = format!("{} cannot be written", path.display());
            Error::new(Exit::Internal, message).cause(&error)
        };
        let (draft, file) = made.begin(&path).map_err(failed)?;
        let to = BufWriter::new(&file);
        let mut events = EventFile::new(to, seconds(summary.started)).map_err(failed)?;
        for series in series {
            let mut after = None;
            while let Some(points) = store.points_after(series, after).await? {
                for point in &points {
                    let (step, at) = (point.step.cast_signed(), seconds(point.at));
                    let written = events.scalar(&series.series, step, at, point.value);
                    written.map_err(failed)?;
                }
                after = points.last().map(|point| point.step);
            }
        }
        for (row, dir, preview) in pictures {
            let bytes = picture(&dir, preview).unwrap_or_default();
            if let Some(size) = png_size(&bytes) {
                let written =
                    events.image(&row.artifact.kind, 0, seconds(row.created), size, &bytes);
                written.map_err(failed)?;
            }
        }
        drop(events.finish().map_err(failed)?);
        made.finish(draft, &file).map_err(failed)?;
    }
    Ok(())
}

fn seconds(time: store::Time) -> f64 {
    time.0 as f64 / 1000.0
}

/// A file of an artifact, unless it is too large for a picture.
fn picture(dir: &Path, path: &str) -> std::io::Result<Vec<u8>> {
    const MOST: u64 = 64 << 20;
    let mut bytes = Vec::new();
    artifact::open_inner(dir, path)?
        .take(MOST)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Imports runs.
pub fn import(args: &ImportArgs, context: &Context) -> Result<(), Error> {
    let transfer = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadWrite).await?;
        let transfer = store.import(&args.file).await?;
        store.close().await;
        Ok::<_, Error>(transfer)
    })?;
    report(&transfer, &args.format, context)
}

fn report(transfer: &Transfer, format: &FormatArgs, context: &Context) -> Result<(), Error> {
    let mut rows = Rows::new(&["what", "name", "done"]);
    let mut add = |what: &str, name: &str, done: Cell| rows.push([what.into(), name.into(), done]);
    for run in &transfer.runs {
        add("run", &run.0, Cell::from("copied").style(CellStyle::Ok));
    }
    for run in &transfer.known {
        add(
            "run",
            &run.0,
            Cell::from("known already").style(CellStyle::Dim),
        );
    }
    for hash in &transfer.artifacts {
        add("artifact", hash, Cell::from("copied").style(CellStyle::Ok));
    }
    for lost in &transfer.lost {
        add(
            "lost",
            lost,
            Cell::from("not readable").style(CellStyle::Error),
        );
    }
    output::print(&rows.render(format.style(context)))?;
    if transfer.lost.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        Exit::Internal,
        format!(
            "{} copied; {} could not be read",
            output::count(transfer.runs.len(), "run"),
            output::count(transfer.lost.len(), "piece")
        ),
    ))
}
