//! `retort dataset`: shows a trajectory dataset, checks it, and merges parts into one; also shows prepared images.

mod images;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueHint};
use retort_checkpoint::Checkpoint;
use retort_checkpoint::sample_shards::{MANIFEST, Shard, ShardError, hash, joined};
use retort_checkpoint::trajectories::{CAPTIONS, ConditioningShape, Manifest};
use serde_json::{Map, Value, json};

use crate::artifact::{self, Layout};
use crate::cli::{Context, Error, Exit, Format, FormatArgs, output};
use crate::draft::{self, Draft};
use crate::store::{Access, ArtifactRecord, Store};
use crate::table::{self, Cell, CellStyle, Rows, Style};

/// Arguments of `dataset`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Describe a dataset: pairs, shape, teacher, distribution, size, classes; or prepared images and their classes.
    Info(InfoArgs),
    /// Read a whole dataset and list damaged files.
    Verify(InfoArgs),
    /// Merge parts made with `range` into one dataset, which a stage takes as `parts`.
    Merge(MergeArgs),
}

/// Arguments of `dataset info` and `dataset verify`.
#[derive(Debug, clap::Args)]
pub struct InfoArgs {
    /// A folder with a manifest.json; or a prefix of an artifact's hash, or RUN/STAGE (`latest/trajectories`).
    #[arg(value_name = "DATASET", value_hint = ValueHint::DirPath)]
    pub dataset: String,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `dataset merge`.
#[derive(Debug, clap::Args)]
pub struct MergeArgs {
    /// The parts, each as `info` takes it.
    #[arg(value_name = "PART", required = true, value_hint = ValueHint::DirPath)]
    pub parts: Vec<String>,
    /// The folder to make.
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub output: PathBuf,
}

/// Shows, checks or joins datasets.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    match &args.command {
        Command::Info(args) => info(args, context),
        Command::Verify(args) => verify(args, context),
        Command::Merge(args) => merge(args, context),
    }
}

impl From<ShardError> for Error {
    fn from(fault: ShardError) -> Self {
        Self::new(Exit::Internal, fault.to_string())
    }
}

/// The dataset asked for.
struct OpenedDataset {
    dir: PathBuf,
    manifest: Manifest,
    /// Where it is an artifact.
    record: Option<ArtifactRecord>,
}

impl OpenedDataset {
    fn of(reference: &str, context: &Context) -> Result<Self, Error> {
        let folder = Path::new(reference);
        if folder.join(MANIFEST).exists() {
            return Ok(Self {
                dir: folder.to_owned(),
                manifest: Manifest::read(folder)?,
                record: None,
            });
        }
        if folder.is_dir() {
            return Err(Error::new(
                Exit::NothingMatches,
                format!("{reference} has no {MANIFEST}: it is not a trajectory dataset"),
            ));
        }
        Self::recorded(reference, find(reference, context)?, context)
    }

    /// The dataset of the artifact that was found for a reference.
    fn recorded(
        reference: &str,
        record: Option<ArtifactRecord>,
        context: &Context,
    ) -> Result<Self, Error> {
        let Some(record) = record.filter(|record| record.kind == "trajectories") else {
            let message = format!("{reference} is not a trajectory dataset");
            return Err(Error::new(Exit::NothingMatches, message)
                .hint("`retort artifacts list --kind trajectories` shows them all"));
        };
        let dir = Layout::new(&context.store)?.artifact(&record.hash);
        Ok(Self {
            manifest: Manifest::read(&dir)?,
            dir,
            record: Some(record),
        })
    }

    fn path(&self, shard: &Shard) -> PathBuf {
        self.dir.join(&shard.file)
    }
}

/// The artifact that a hash or RUN/STAGE names.
fn find(reference: &str, context: &Context) -> Result<Option<ArtifactRecord>, Error> {
    context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let hash = store.resolve_artifact(reference).await?;
        let all = store.list_artifacts(None).await?;
        store.close().await;
        let found = all.into_iter().find(|row| row.artifact.hash == hash);
        Ok::<_, Error>(found.map(|row| row.artifact))
    })
}

fn shown(ranges: &[Range<u64>]) -> String {
    let shown = ranges.iter().map(|r| format!("{}..{}", r.start, r.end));
    shown.collect::<Vec<_>>().join(", ")
}

fn info(args: &InfoArgs, context: &Context) -> Result<(), Error> {
    let (reference, folder) = (args.dataset.as_str(), Path::new(&args.dataset));
    let rows = if images::are_in(folder) {
        images::facts(folder)?
    } else if folder.is_dir() {
        facts(&OpenedDataset::of(reference, context)?)?
    } else {
        let record = find(reference, context)?;
        match record.as_ref().filter(|record| record.kind == "images") {
            Some(record) => images::facts(&Layout::new(&context.store)?.artifact(&record.hash))?,
            None => facts(&OpenedDataset::recorded(reference, record, context)?)?,
        }
    };
    let text = match args.format.get() {
        Format::Json => {
            let facts = rows.objects();
            let facts = facts.as_array().into_iter().flatten();
            let object: Map<String, Value> = facts
                .filter_map(|row| Some((row["fact"].as_str()?.to_owned(), row["value"].clone())))
                .collect();
            format!("{:#}\n", Value::Object(object))
        }
        _ => rows.render(args.format.style(context)),
    };
    Ok(output::print(&text)?)
}

/// The most classes that a table names.
const NAMED: usize = 12;

/// Names of classes: for people the first of them.
fn class_names(names: &[String]) -> Cell {
    let mut text = names[..names.len().min(NAMED)].join(", ");
    if names.len() > NAMED {
        text.push_str(&format!(" and {} more", names.len() - NAMED));
    }
    Cell::new(Cell::name(&text).text(), names.to_vec())
}

/// How many there are of each class: for people by name where a few classes have names, else the least and the most.
fn of_each(counts: &BTreeMap<u32, u64>, names: &[String]) -> Cell {
    let text = match names.len() {
        1..=NAMED => {
            let count = |class: u32| counts.get(&class).copied().unwrap_or(0);
            let named = (0..).zip(names);
            let named = named.map(|(class, name)| format!("{name} {}", count(class)));
            named.collect::<Vec<_>>().join(", ")
        }
        _ => {
            let spread = counts.values().min().zip(counts.values().max());
            spread.map_or_else(String::new, |(least, most)| format!("{least} to {most}"))
        }
    };
    let counts: Map<String, Value> = counts
        .iter()
        .map(|(class, &count)| (class.to_string(), count.into()))
        .collect();
    Cell::new(Cell::name(&text).text(), counts)
}

/// What there is to say about a dataset: a row for each fact.
fn facts(found: &OpenedDataset) -> Result<Rows, Error> {
    let (dir, m) = (&found.dir, &found.manifest);
    let (mut classes, mut types, mut noise) = (BTreeMap::<u32, u64>::new(), Vec::new(), false);
    let mut bytes = 0;
    for shard in &m.shards {
        let path = found.path(shard);
        let opened = m.glance(&path, shard)?;
        opened
            .labels
            .iter()
            .for_each(|&label| *classes.entry(label).or_default() += 1);
        let name = opened.tokens.to_string().to_lowercase();
        if !types.contains(&name) {
            types.push(name);
        }
        noise |= opened.noise;
        bytes += opened.checkpoint.size();
    }
    let pairs: u64 = m.shards.iter().map(|shard| shard.end - shard.start).sum();
    let each = bytes as f64 / pairs.max(1) as f64;
    let (ranges, gaps) = (m.ranges(), m.gaps());
    let as_pairs = |ranges: &[Range<u64>]| -> Value {
        ranges.iter().map(|r| json!([r.start, r.end])).collect()
    };
    let (kind, number) = match m.condition {
        ConditioningShape::Classes(classes) => ("classes", classes),
        ConditioningShape::Captions(_) => ("captions", classes.len()),
    };
    let mut facts: Vec<(&str, Cell)> = vec![
        ("folder", dir.display().to_string().into()),
        ("pairs", pairs.into()),
        ("of", m.count.into()),
        ("samples", Cell::new(shown(&ranges), as_pairs(&ranges))),
        ("missing", Cell::new(shown(&gaps), as_pairs(&gaps))),
        ("ar_steps", (m.steps.len() as u64).into()),
        ("tokens_a_pair", (m.tokens() as u64).into()),
        ("codes", (m.vocabulary as u64).into()),
        ("code_dimension", (m.dim as u64).into()),
        (kind, (number as u64).into()),
    ];
    if !m.class_names.is_empty() {
        facts.push(("class_names", class_names(&m.class_names)));
    }
    facts.extend([
        ("pairs_of_each", of_each(&classes, &m.class_names)),
        ("teacher", m.teacher.as_str().into()),
        ("seed", m.seed.into()),
    ]);
    let distribution = m.distribution.as_object().into_iter().flatten();
    facts.extend(distribution.map(|(name, value)| (name.as_str(), Cell::json(value))));
    facts.extend([
        ("solver_steps", (m.solver_steps as u64).into()),
        ("token_type", types.join(", ").into()),
        ("noise", if noise { "stored" } else { "of the seed" }.into()),
        ("shards", (m.shards.len() as u64).into()),
        ("bytes", Cell::bytes(bytes)),
        ("bytes_a_pair", Cell::number((each * 10.0).round() / 10.0)),
    ]);
    let mut rows = Rows::new(&["fact", "value"]);
    for (name, value) in facts {
        rows.push([name.into(), value]);
    }
    Ok(rows)
}

fn verify(args: &InfoArgs, context: &Context) -> Result<(), Error> {
    let found = OpenedDataset::of(&args.dataset, context)?;
    let m = &found.manifest;
    let mut rows = Rows::new(&["file", "samples", "problem"]);
    let mut problem = |file: &str, samples: String, what: String| {
        rows.push([
            file.into(),
            samples.into(),
            Cell::from(what).style(CellStyle::Error),
        ]);
    };
    let mut labels = 0;
    for shard in &m.shards {
        match m.open_shard(&found.path(shard), shard) {
            Ok(opened) => {
                labels = labels.max(
                    opened
                        .labels
                        .iter()
                        .map(|x| x.saturating_add(1))
                        .max()
                        .unwrap_or(0),
                )
            }
            Err(fault) => {
                let samples = shown(std::slice::from_ref(&(shard.start..shard.end)));
                problem(&shard.file, samples, fault.message);
            }
        }
    }
    if let Err(fault) = joined(vec![(found.dir.clone(), m.shards.clone())]) {
        problem(MANIFEST, String::new(), fault.to_string());
    }
    if matches!(m.condition, ConditioningShape::Captions(_))
        && let Err(what) = captions(&found.dir.join(CAPTIONS), labels)
    {
        problem(CAPTIONS, String::new(), what);
    }
    // The record of an artifact lists all files, including the manifest.
    if let Some(record) = &found.record {
        for damage in artifact::verify(&found.dir, record) {
            let known = m.shards.iter().any(|shard| shard.file == damage.path);
            if !known {
                problem(&damage.path, String::new(), damage.problem);
            }
        }
    }
    let style = args.format.style(context);
    if !(rows.is_empty() && matches!(style, Style::Table { .. })) {
        output::print(&rows.render(style))?;
    }
    let pairs: u64 = m.shards.iter().map(|shard| shard.end - shard.start).sum();
    if rows.is_empty() {
        if !context.quiet {
            output::say(&format!(
                "{pairs} pairs in {} shards verified",
                m.shards.len()
            ));
            let gaps = m.gaps();
            if !gaps.is_empty() {
                output::say(&format!(
                    "note: a part: {} of {} are missing here",
                    shown(&gaps),
                    m.count
                ));
            }
        }
        return Ok(());
    }
    let hint = match found.record {
        Some(_) => "remove the artifact's directory from the store; a run then makes it again",
        None => {
            "copy the file again from its source; or delete its entry in manifest.json, and a trajectories stage \
             whose `parts` name the folder makes these samples anew"
        }
    };
    let message = format!("{} problems in {}", rows.len(), found.dir.display());
    Err(Error::new(Exit::Internal, message).hint(hint))
}

/// Whether a file of captions has one for each label.
fn captions(path: &Path, labels: u32) -> Result<(), String> {
    let open = || -> retort_checkpoint::Result<(usize, u64, Option<usize>)> {
        let file = Checkpoint::open(path)?;
        let all = file.select(None)?;
        let lengths = all.get("lengths").map(|lengths| file.indices(lengths));
        let lengths = lengths.transpose()?.unwrap_or_default();
        let total = lengths.iter().map(|&x| u64::from(x)).sum();
        let rows = all
            .get("features")
            .and_then(|features| features.shape.first().copied());
        Ok((lengths.len(), total, rows))
    };
    let (known, tokens, rows) = open().map_err(|e| e.to_string())?;
    if known < labels as usize {
        return Err(format!(
            "{known} captions, but labels go up to {}",
            labels - 1
        ));
    }
    match rows {
        Some(rows) if rows as u64 == tokens => Ok(()),
        _ => Err(format!(
            "features of {} tokens, expected {tokens}",
            rows.unwrap_or(0)
        )),
    }
}

fn merge(args: &MergeArgs, context: &Context) -> Result<(), Error> {
    let out = &args.output;
    let refused = |message: String| Error::new(Exit::Usage, message);
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) || out.is_file() {
        return Err(refused(format!("{} is there already", out.display())));
    }
    let parts = args
        .parts
        .iter()
        .map(|part| OpenedDataset::of(part, context));
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    let mut whole = parts[0].manifest.clone();
    let shards = parts
        .iter()
        .map(|part| Ok((part.dir.clone(), whole.of_part(&part.dir)?)))
        .collect::<Result<Vec<_>, ShardError>>()
        .and_then(joined)
        .map_err(|fault| refused(fault.to_string()))?;
    whole.shards = shards.iter().map(|(_, shard)| shard.clone()).collect();
    if let Some(gap) = whole.gaps().first() {
        return Err(refused(format!(
            "samples {} are missing of {}",
            shown(&whole.gaps()),
            whole.count
        ))
        .hint(format!(
            "`range: [{}, {}]` makes the first of them",
            gap.start, gap.end
        )));
    }
    let mut extra = None;
    if matches!(whole.condition, ConditioningShape::Captions(_)) {
        let hashes = parts.iter().map(|part| hash(&part.dir.join(CAPTIONS)));
        let hashes = hashes.collect::<Result<Vec<_>, _>>()?;
        if hashes.iter().any(|one| *one != hashes[0]) {
            return Err(refused("the parts have different captions".into()));
        }
        extra = Some(parts[0].dir.join(CAPTIONS));
    }

    // Complete or absent.
    let failed = |action: &str, path: &Path| {
        let message = format!("cannot {action} {}", path.display());
        move |e: std::io::Error| Error::new(Exit::Internal, message).cause(&e)
    };
    draft::tidy(out.parent().unwrap_or(Path::new("")));
    let draft = Draft::folder(out).map_err(failed("make", out))?;
    let take = |from: &Path, name: &str| {
        let to = draft.path().join(name);
        // An artifact's files must not become writable under another name.
        fs::copy(from, &to).map(drop).map_err(failed("copy", from))
    };
    let mut bytes = 0;
    for ((dir, shard), merged) in shards.iter().zip(&mut whole.shards) {
        let from = dir.join(&shard.file);
        bytes += whole_size(&from);
        parts[0].manifest.open_shard(&from, shard)?;
        let hash = match &shard.hash {
            Some(hash) => hash.clone(),
            None => hash(&from)?,
        };
        *merged = Shard {
            hash: Some(hash),
            ..Shard::of(shard.start..shard.end)
        };
        take(&from, &merged.file)?;
    }
    if let Some(from) = &extra {
        take(from, CAPTIONS)?;
    }
    let text = serde_json::to_string_pretty(&whole).unwrap_or_default();
    let manifest = draft.path().join(MANIFEST);
    fs::write(&manifest, text + "\n").map_err(failed("write", &manifest))?;
    draft.finish().map_err(failed("make", out))?;
    if !context.quiet {
        output::say(&format!(
            "{}: {} pairs in {} shards of {} parts, {}",
            out.display(),
            whole.count,
            whole.shards.len(),
            parts.len(),
            table::bytes(bytes)
        ));
    }
    Ok(())
}

fn whole_size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}
