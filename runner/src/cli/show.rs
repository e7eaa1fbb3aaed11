//! `retort show`: the pictures of an artifact or a run, in the terminal or into a file.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use clap::ValueHint;
use image::{DynamicImage, ImageFormat, ImageReader, Limits};
use retort_checkpoint::images;

use crate::artifact::{self, Layout};
use crate::cli::{Context, Error, Exit, output};
use crate::draft::{self, OutputKind};
use crate::store::{Access, ArtifactRow, Store, StoreError};

use self::screen::{MOST_PIXELS, Protocol, Screen};

mod encode;
mod screen;

/// Maximum bytes of a picture.
pub(super) const MOST_BYTES: u64 = 64 << 20;

/// A saved picture. A stage made it, and it has no mark of retort.
const PICTURE: OutputKind = OutputKind {
    name: "an empty file",
    head: "",
};

/// Arguments of `show`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to show: `latest/sample-1-step` (a run and a stage), a prefix of an artifact's hash, or a run: all its pictures.
    #[arg(value_name = "WHAT", default_value = "latest")]
    pub what: String,
    /// Write the picture into a new PNG file instead.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub save: Option<PathBuf>,
    /// How to draw in a terminal.
    #[arg(long = "as", value_name = "HOW", default_value = "auto")]
    pub manner: Protocol,
    /// Width of the drawing, in columns.
    #[arg(long, value_name = "COLUMNS", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub width: Option<u32>,
}

/// Shows pictures.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let pictures = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let pictures = find(&store, &args.what).await?;
        store.close().await;
        Ok::<_, Error>(pictures)
    })?;
    let layout = Layout::new(&context.store)?;
    if pictures.is_empty() {
        return Err(Error::new(
            Exit::NothingMatches,
            format!("`{}` has no picture", args.what),
        )
        .hint("`retort artifacts list` shows which artifacts have one"));
    }
    if let Some(file) = &args.save {
        let [only] = pictures.as_slice() else {
            let stages: Vec<&str> = pictures.iter().map(|row| row.stage.as_str()).collect();
            return Err(Error::new(
                Exit::Usage,
                format!("`{}` has {} pictures", args.what, pictures.len()),
            )
            .hint(format!("name a stage of it: {}", stages.join(", "))));
        };
        let bytes = read(&layout, only)?;
        return draft::write(file, PICTURE, &bytes).map_err(|error| Error::unwritten(file, &error));
    }
    let is_terminal = std::io::stdout().is_terminal();
    let manner = match args.manner {
        Protocol::Auto if is_terminal => screen::best(variable, screen::ask),
        Protocol::Auto => Protocol::Paths,
        // An explicit --as applies to any output: a pager, or a file that is shown later.
        manner => manner,
    };
    let draws = manner != Protocol::Paths;
    for row in &pictures {
        let meta = &row.artifact.meta;
        let caption = meta.caption.as_deref().unwrap_or_default();
        if draws {
            let caption = match caption {
                "" => String::new(),
                caption => format!(" ({caption})"),
            };
            output::print(&format!("{} of run {}{caption}\n", row.stage, row.run))?;
            draw(&decoded(&read(&layout, row)?, row)?, args, manner)?;
            continue;
        }
        let path = layout
            .artifact(&row.artifact.hash)
            .join(meta.preview.as_deref().unwrap_or_default());
        output::print(&format!("{}\n", path.display()))?;
    }
    if !draws && args.manner != Protocol::Paths && !context.quiet {
        let why = match is_terminal {
            true => "this terminal cannot draw",
            false => "not a terminal",
        };
        output::say(&format!(
            "{why}: these are the files; --save FILE copies one, --as FORM draws anyway"
        ));
    }
    Ok(())
}

/// The pictures to show: of an artifact, or of all artifacts of a run.
async fn find(store: &Store, what: &str) -> Result<Vec<ArtifactRow>, Error> {
    let mut rows = match store.resolve_artifact(what).await {
        Ok(_) if what.contains('/') => {
            // Several stages may have made the same picture: use this stage's caption.
            let (run, stage) = what.split_once('/').unwrap_or_default();
            let run = store.resolve_run(run).await?;
            let mut rows = store.list_artifacts(Some(&run)).await?;
            rows.retain(|row| row.is_output && row.stage == stage);
            rows
        }
        // A picture made several times is shown once.
        Ok(hash) => Vec::from_iter(store.newest_with_hash(&hash).await?),
        Err(no_artifact @ StoreError::NoArtifact { .. }) if !what.contains('/') => {
            let run = store.resolve_run(what).await;
            let run = run.map_err(|error| match error {
                StoreError::NoRun { runs: 1.., .. } => no_artifact,
                error => error,
            })?;
            store.list_artifacts(Some(&run)).await?
        }
        Err(error) => return Err(error.into()),
    };
    // A preview need not be an image.
    rows.retain(|row| {
        let preview = row.artifact.meta.preview.as_deref();
        preview.is_some_and(|preview| preview.to_ascii_lowercase().ends_with(".png"))
    });
    Ok(rows)
}

/// The bytes of an artifact's picture.
pub(super) fn read(layout: &Layout, row: &ArtifactRow) -> Result<Vec<u8>, Error> {
    let preview = row.artifact.meta.preview.as_deref().unwrap_or_default();
    let dir = layout.artifact(&row.artifact.hash);
    let refused = |error: std::io::Error| {
        let message = format!(
            "the picture of stage `{}`, {}, cannot be read",
            row.stage,
            dir.join(preview).display()
        );
        Error::new(Exit::Internal, message)
            .cause(&error)
            .hint("`retort artifacts verify` says what is damaged")
    };
    let file = artifact::open_inner(&dir, preview).map_err(refused)?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(refused)?;
    match bytes.len() as u64 {
        ..=MOST_BYTES => Ok(bytes),
        _ => Err(refused(std::io::Error::other("it is larger than 64 MiB"))),
    }
}

fn decoded(bytes: &[u8], row: &ArtifactRow) -> Result<DynamicImage, Error> {
    let unreadable = |error: &dyn std::error::Error| {
        let message = format!("the picture of stage `{}` is not a readable PNG", row.stage);
        Error::new(Exit::NothingMatches, message)
            .cause(error)
            .hint("`retort artifacts verify` says what is damaged")
    };
    images::check_palettes(bytes).map_err(|message| unreadable(&std::io::Error::other(message)))?;
    let mut reader = ImageReader::with_format(std::io::Cursor::new(bytes), ImageFormat::Png);
    let mut limits = Limits::default();
    limits.max_image_width = Some(MOST_PIXELS);
    limits.max_image_height = Some(MOST_PIXELS);
    // It is copied once, with four bytes per pixel.
    limits.max_alloc = Some(176 << 20);
    reader.limits(limits);
    reader.decode().map_err(|error| unreadable(&error))
}

/// Draws at the cursor. Only pixels reach the terminal.
fn draw(picture: &DynamicImage, args: &Args, manner: Protocol) -> Result<(), Error> {
    let screen = Screen::of_stdout();
    let picture = screen.fitted(&picture.to_rgba8(), args.width, manner);
    let drawn = screen.drawn(picture, manner, screen::truecolor(variable));
    let drawn = drawn.map_err(|error| {
        Error::new(Exit::Internal, "the picture cannot be drawn")
            .cause(&error)
            .hint("--save FILE copies it; --as blocks is drawn by any terminal")
    })?;
    Ok(output::draw(&drawn)?)
}

/// An environment variable that describes the terminal.
fn variable(name: &str) -> String {
    let value = std::env::var_os(name).unwrap_or_default();
    value.to_string_lossy().into_owned()
}
