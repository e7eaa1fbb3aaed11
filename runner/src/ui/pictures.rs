//! Pictures: grids, single samples of the same noise and class side by side, snapshots over training.
//!
//! A sample's noise is a function of the set's seed and the sample's number. Sets that share a seed are matched by number;
//! others are matched by class and marked as having other noise.

use std::collections::HashSet;
use std::io::Read;
use std::sync::Arc;

use maud::{Markup, html};
use retort_checkpoint::json;
use serde_json::Value;

use super::files;
use super::page::{self, Page, Section};
use super::reply::{HttpError, Reply};
use super::request::{PageRequest, link};
use super::samples::Set;
use super::{ServedStore, ServerState};
use crate::store::{ArtifactRow, RunDetail, RunId, StageDetail};

/// The most sets side by side, rows of samples, and runs on a page.
const SETS: usize = 12;
const ROWS: usize = 16;
const MOST_ROWS: usize = 100;
const RUNS: usize = 12;
/// The most other pictures of an artifact that are shown.
const FURTHER: usize = 24;
/// The name of a tokenizer's picture of real images and their reconstructions.
const RECONSTRUCTIONS: &str = "reconstructions.png";
/// A description of its rows.
pub const ROWS_OF_PAIRS: &str = "real above, reconstructed below";
/// The file with the class names of a network, and its size limit.
const CONFIG: &str = "config.json";
const LONGEST_CONFIG: u64 = 4 << 20;
/// The most classes to choose from.
const CLASSES: usize = 1000;
/// Approximate width of a shown sample, in pixels.
const WIDE: usize = 72;

/// A picture in an artifact.
pub struct Preview {
    run: RunId,
    stage: String,
    hash: String,
    path: String,
    caption: Option<String>,
}

/// A run's set of samples.
struct Column {
    run: RunId,
    stage: String,
    hash: String,
    set: Arc<Set>,
}

/// A snapshot of a student at a step, and a picture of its samples.
struct SnapshotPicture {
    step: u64,
    preview: Preview,
}

/// The page.
pub async fn answer(site: &ServerState, request: &PageRequest) -> Result<Reply, HttpError> {
    let mut details: Vec<(&ServedStore, RunDetail)> = Vec::new();
    let named = site.named_runs(&request.query, RUNS).await?;
    if let Some(settled) = named.settled {
        return Ok(Reply::see(&settled.link("/pictures")));
    }
    for (served, id) in named.runs {
        details.push((served, served.store.run_detail(&id).await?));
    }
    let runs: Vec<String> = details
        .iter()
        .map(|(_, detail)| detail.summary.id.0.clone())
        .collect();
    let body = match details.is_empty() {
        true => html! {
            section.empty {
                h1 { "Pictures" }
                p { "Choose runs first: tick them in the " a href="/" { "list of runs" } " and press Pictures." }
                p { a.button href="/pictures?run=latest" { "Pictures of the latest run" } }
            }
        },
        false => content(site, request, &details).await?,
    };
    Ok(Page {
        title: "Pictures",
        place: Section::Pictures,
        runs: &runs,
        pinned: request.query.get("baseline").is_some(),
        live: None,
        body,
    }
    .reply(site))
}

async fn content(
    site: &ServerState,
    request: &PageRequest,
    details: &[(&ServedStore, RunDetail)],
) -> Result<Markup, HttpError> {
    let wished: Vec<&str> = request.query.all("set").collect();
    let mut offered: Vec<(&RunDetail, &ArtifactRow)> = Vec::new();
    let mut known = HashSet::new();
    for (_, detail) in details {
        let sets = detail
            .artifacts
            .iter()
            .filter(|row| row.artifact.kind == "samples");
        for row in sets {
            if known.insert(row.artifact.hash.as_str()) {
                offered.push((detail, row));
            }
        }
    }
    let (mut columns, mut unread) = (Vec::new(), Vec::new());
    let chosen = offered
        .iter()
        .filter(|(_, row)| wished.is_empty() || wished.contains(&row.artifact.hash.as_str()));
    for (detail, row) in chosen.take(SETS) {
        match open(site, &row.artifact.hash).await {
            Ok(set) => columns.push(Column {
                run: detail.summary.id.clone(),
                stage: row.stage.clone(),
                hash: row.artifact.hash.clone(),
                set,
            }),
            Err(problem) => unread.push((row.stage.clone(), problem)),
        }
    }
    let first = offered.iter().find(|(_, row)| {
        columns
            .first()
            .is_some_and(|column| column.hash == row.artifact.hash)
    });
    let names = match first {
        Some((_, row)) => class_names(site, &columns[0].set, row).await,
        None => Vec::new(),
    };
    let previews: Vec<Preview> = details
        .iter()
        .flat_map(|(_, detail)| previews(detail))
        .collect();
    let strips: Vec<(String, Vec<SnapshotPicture>)> = details
        .iter()
        .flat_map(|(_, detail)| strips(detail))
        .collect();
    Ok(html! {
        h1.visually-hidden { "Pictures" }
        @for (stage, problem) in &unread { div.alert role="alert" { p { (page::name(stage)) ": " (page::name(&problem.to_string())) } } }
        @if columns.is_empty() && previews.is_empty() {
            section.empty { h2 { "No pictures" } p { "These runs have made no samples and no grids." } }
        }
        @if !columns.is_empty() {
            section {
                h2 { (heading(&columns)) }
                (SideBySide::of(request, &columns, &offered, &names, details.len() > 1).page())
            }
        }
        @for (student, pictures) in &strips { (strip(student, pictures)) }
        (grids(&previews))
    })
}

/// The data that sets side by side share.
fn heading(columns: &[Column]) -> &'static str {
    let shared = |column: &Column| column.set.shares_noise(&columns[0].set);
    match columns.len() < 2 || columns.iter().skip(1).any(shared) {
        true => "The same noise, side by side",
        false => "The same class, side by side",
    }
}

/// The names of a set's labels: its captions, or the class names of the network that drew it.
async fn class_names(site: &ServerState, set: &Set, row: &ArtifactRow) -> Vec<String> {
    if !set.captions.is_empty() {
        return set.captions.clone();
    }
    for hash in &row.made_from {
        let Ok((served, files)) = files::find(site, hash).await else {
            continue;
        };
        let config = files
            .iter()
            .find(|file| file.path == CONFIG && file.size <= LONGEST_CONFIG);
        let Some(Ok(file)) = config.map(|listed| files::open(served, hash, listed)) else {
            continue;
        };
        let mut text = Vec::new();
        let config: Value = match file.take(LONGEST_CONFIG).read_to_end(&mut text) {
            Ok(_) => json::parse(&text).unwrap_or_default(),
            Err(_) => continue,
        };
        let classes = config["classes"].as_array().into_iter().flatten();
        let names: Vec<String> = classes
            .map(|name| name.as_str().unwrap_or_default().to_owned())
            .collect();
        if !names.is_empty() {
            return names;
        }
    }
    Vec::new()
}

async fn open(site: &ServerState, hash: &str) -> Result<Arc<Set>, HttpError> {
    if let Some(set) = site.samples.get(hash) {
        return Ok(set);
    }
    let (served, files) = files::find(site, hash).await?;
    let dir = served.layout.artifact(hash);
    let opened = tokio::task::spawn_blocking(move || Set::open(dir, &files));
    let set = Arc::new(
        opened
            .await
            .map_err(|error| HttpError::File(error.to_string()))??,
    );
    site.samples.put(hash, &set);
    Ok(set)
}

/// A sample as a picture: `/sample/HASH/NUMBER`.
pub async fn sample(site: &ServerState, hash: &str, number: &str) -> Result<Reply, HttpError> {
    let number: usize = number
        .trim_end_matches(".png")
        .parse()
        .map_err(|_| HttpError::NotFound("samples have numbers".into()))?;
    let set = open(site, hash).await?;
    let png = tokio::task::spawn_blocking(move || set.png(number)).await;
    let png = png.map_err(|error| HttpError::File(error.to_string()))??;
    Ok(Reply::new("image/png", png).forever())
}

/// The numbers of each column's samples in a row, by the first column's sample.
fn aligned(
    columns: &[Column],
    class: Option<u32>,
    skip: usize,
    rows: usize,
) -> Vec<Vec<Option<usize>>> {
    let Some(first) = columns.first() else {
        return Vec::new();
    };
    let of_class = |set: &Set| -> Vec<usize> {
        let numbers = set.labels.iter().enumerate();
        numbers
            .filter(|(_, label)| class.is_none_or(|class| **label == class))
            .map(|(number, _)| number)
            .collect()
    };
    let numbers = of_class(&first.set);
    let others: Vec<Vec<usize>> = columns.iter().map(|column| of_class(&column.set)).collect();
    let row = |place: usize| {
        let number = numbers[place];
        let label = first.set.labels[number];
        let fits = |set: &Set, number: usize| set.labels.get(number) == Some(&label);
        let cell = |(column, own): (&Column, &Vec<usize>)| match column.set.shares_noise(&first.set)
        {
            true => fits(&column.set, number).then_some(number),
            // The same position among its samples of this class, or the nearest one of the class.
            false => match own
                .get(place)
                .copied()
                .filter(|&number| fits(&column.set, number))
            {
                Some(number) => Some(number),
                None => own
                    .iter()
                    .copied()
                    .filter(|&number| fits(&column.set, number))
                    .nth(place / 10),
            },
        };
        columns.iter().zip(&others).map(cell).collect()
    };
    (skip.min(numbers.len())..numbers.len().min(skip.saturating_add(rows)))
        .map(row)
        .collect()
}

/// Sets of samples side by side.
struct SideBySide<'a> {
    request: &'a PageRequest,
    columns: &'a [Column],
    /// The available sets.
    offered: &'a [(&'a RunDetail, &'a ArtifactRow)],
    /// The names of classes.
    names: &'a [String],
    /// Whether they belong to several runs.
    several: bool,
    /// The class that is shown; None for all.
    class: Option<u32>,
    /// The first row, and the most rows.
    skip: usize,
    rows: usize,
    zoom: usize,
}

impl<'a> SideBySide<'a> {
    fn of(
        request: &'a PageRequest,
        columns: &'a [Column],
        offered: &'a [(&'a RunDetail, &'a ArtifactRow)],
        names: &'a [String],
        several: bool,
    ) -> Self {
        let query = &request.query;
        let rows: usize = query.number("rows").unwrap_or(ROWS);
        let zoom: usize = query.number("zoom").unwrap_or(1);
        Self {
            request,
            columns,
            offered,
            names,
            several,
            class: query.number("class"),
            skip: query.number("at").unwrap_or(0),
            rows: rows.clamp(1, MOST_ROWS),
            zoom: zoom.clamp(1, 8),
        }
    }

    fn page(&self) -> Markup {
        let first = &self.columns[0].set;
        let lines = aligned(self.columns, self.class, self.skip, self.rows);
        let query = &self.request.query;
        html! {
            (self.form())
            @if lines.is_empty() {
                section.empty { h3 { "No samples here" } p { a href=(query.without("class").without("at").link("/pictures")) { "From the beginning" } } }
            } @else {
                div.scroll { table.samples {
                    (self.heads())
                    tbody { @for line in &lines { (self.row(line)) } }
                } }
                (self.links(lines.len()))
                @if self.columns.iter().any(|column| !column.set.shares_noise(first)) {
                    p.hint { "Sets marked “other noise” have another seed than the first: their samples have the same class, and not the same noise. Give sample stages one " code { "seed" } " to compare them sample by sample." }
                }
            }
        }
    }

    /// The name of a label.
    fn title(&self, label: u32) -> String {
        match self.names.get(label as usize) {
            Some(name) => name.clone(),
            None => format!("class {label}"),
        }
    }

    /// The form to choose class, zoom and sets.
    fn form(&self) -> Markup {
        let (columns, offered) = (self.columns, self.offered);
        let known = {
            let mut labels = columns[0].set.labels.clone();
            labels.sort_unstable();
            labels.dedup();
            labels.truncate(CLASSES);
            labels
        };
        html! {
            form.filter method="get" action="/pictures" {
                @for (name, value) in self.request.query.pairs().filter(|(name, _)| !matches!(*name, "class" | "at" | "set" | "zoom")) { input type="hidden" name=(name) value=(value); }
                label for="class" { "Class" }
                select #class name="class" {
                    option value="" { "all" }
                    @for label in &known { option value=(label) selected[self.class == Some(*label)] { (page::name(&self.title(*label))) } }
                }
                label for="zoom" { "Zoom" }
                select #zoom name="zoom" { @for factor in [1, 2, 4] { option value=(factor) selected[self.zoom == factor] { (factor) "×" } } }
                @if offered.len() > 1 {
                    details.sets {
                        summary { "Sets (" (columns.len()) " of " (offered.len()) ")" }
                        ul.choices { @for (detail, row) in offered {
                            li { label {
                                input type="checkbox" name="set" value=(row.artifact.hash) checked[columns.iter().any(|column| column.hash == row.artifact.hash)];
                                " " (page::name(&row.stage)) @if self.several { " " span.mono.dim { (page::name(&detail.summary.id.0)) } }
                            } }
                        } }
                    }
                }
                button.primary type="submit" { "Show" }
            }
        }
    }

    /// The heads of the columns.
    fn heads(&self) -> Markup {
        let first = &self.columns[0].set;
        html! {
            thead { tr {
                th scope="col" { "Sample" }
                @for column in self.columns {
                    th scope="col" {
                        (page::name(&column.stage))
                        @if self.several { br; span.mono.dim { (page::name(&column.run.0)) } }
                        br; span.dim { (page::name(&column.set.sampler())) }
                        @if !column.set.shares_noise(first) { br; span.odd { "other noise" } }
                    }
                }
            } }
        }
    }

    /// A row: the number of a sample for each column.
    fn row(&self, line: &[Option<usize>]) -> Markup {
        let number = line[0].unwrap_or_default();
        let labels = &self.columns[0].set.labels;
        let title = self.title(labels.get(number).copied().unwrap_or_default());
        let shown = |set: &Set| {
            let (height, width) = set.size();
            let factor = (WIDE / width.max(1)).max(1) * self.zoom;
            (width * factor, height * factor)
        };
        html! {
            tr {
                th.num scope="row" { "#" (number) br; span.dim { (page::name(&title)) } }
                @for (column, sample) in self.columns.iter().zip(line) {
                    td {
                        @match sample {
                            Some(sample) => {
                                @let (width, height) = shown(&column.set);
                                a.zoom href=(format!("/sample/{}/{sample}.png", column.hash)) {
                                    img.pixels src=(format!("/sample/{}/{sample}.png", column.hash)) width=(width) height=(height) loading="lazy"
                                        alt=(format!("sample {sample} of {}, {title}", column.stage));
                                }
                                @if *sample != number { br; span.dim.num { "#" (sample) } }
                            }
                            None => span.dim { "–" },
                        }
                    }
                }
            }
        }
    }

    /// Which rows are shown, and links to the previous and next ones.
    fn links(&self, count: usize) -> Markup {
        let at = |skip: usize| {
            let query = self.request.query.with("at", &skip.to_string());
            query.link("/pictures")
        };
        let (skip, rows) = (self.skip, self.rows);
        html! {
            nav.pages aria-label="Parts of the set" {
                span.num { "rows " (skip + 1) "–" (skip + count) @if self.class.is_none() { " of " (self.columns[0].set.count()) } }
                @if skip > 0 { a.button href=(at(skip.saturating_sub(rows))) rel="prev" { "← Before" } }
                @if count == rows { a.button href=(at(skip + rows)) rel="next" { "Next →" } }
            }
        }
    }
}

/// The interesting pictures of a run, each once.
pub fn previews(detail: &RunDetail) -> Vec<Preview> {
    let mut previews: Vec<Preview> = Vec::new();
    for row in &detail.artifacts {
        let meta = &row.artifact.meta;
        let listed = |path: &String| row.artifact.files.iter().any(|file| file.path == *path);
        let own = meta
            .preview
            .iter()
            .filter(|path| listed(path) && path.ends_with(".png"));
        let further = row.artifact.files.iter().map(|file| &file.path);
        let further = further.filter(|path| {
            path.ends_with(".png") && !path.contains('/') && meta.preview.as_ref() != Some(path)
        });
        for path in own.chain(further.take(FURTHER)) {
            previews.push(Preview {
                run: detail.summary.id.clone(),
                stage: row.stage.clone(),
                hash: row.artifact.hash.clone(),
                path: path.clone(),
                caption: meta
                    .caption
                    .clone()
                    .filter(|_| meta.preview.as_ref() == Some(path)),
            });
        }
    }
    previews
}

impl Preview {
    /// The address of the picture.
    pub fn address(&self) -> String {
        link(&format!("/file/{}", self.hash), &[("path", &self.path)])
    }

    /// Its alternative text.
    pub fn said(&self) -> String {
        match (&self.caption, self.is_of_pairs()) {
            (_, true) => format!(
                "images and what stage {} makes of them: {ROWS_OF_PAIRS}",
                self.stage
            ),
            (Some(caption), _) => caption.clone(),
            (None, _) => format!("{} of stage {}", self.path, self.stage),
        }
    }

    /// Whether it shows a tokenizer's reconstructions: rows of real images, each with their reconstructions below.
    pub fn is_of_pairs(&self) -> bool {
        self.path == RECONSTRUCTIONS
    }

    /// The stage that made it.
    pub fn stage(&self) -> &str {
        &self.stage
    }
}

/// Pictures with their captions: samples, and tokenizers' reconstructions.
pub fn grids(previews: &[Preview]) -> Markup {
    let (pairs, grids): (Vec<&Preview>, Vec<&Preview>) =
        previews.iter().partition(|preview| preview.is_of_pairs());
    let section = |title: &str, some: &[&Preview]| {
        html! {
            @if !some.is_empty() {
                section { h2 { (title) } div.grids { @for preview in some { (grid(preview)) } } }
            }
        }
    };
    html! {
        (section("Grids", &grids))
        (section("Reconstructions", &pairs))
    }
}

/// A picture with its caption.
pub fn grid(preview: &Preview) -> Markup {
    html! {
        figure.grid {
            a.zoom href=(preview.address()) {
                img.pixels src=(preview.address()) loading="lazy" alt=(preview.said());
            }
            figcaption {
                strong { (page::name(&preview.stage)) } " " (page::run_link(&preview.run))
                @if preview.is_of_pairs() { br; span { "in each pair of rows: " strong { (ROWS_OF_PAIRS) } } }
                @if let Some(caption) = &preview.caption { br; span.dim { (page::name(caption)) } }
            }
        }
    }
}

/// Samples from students' snapshots, grouped by the trained student, in the order of steps.
fn strips(detail: &RunDetail) -> Vec<(String, Vec<SnapshotPicture>)> {
    let stage = |name: &str| detail.stages.iter().find(|stage| stage.name == name);
    let mut strips: Vec<(String, Vec<SnapshotPicture>)> = Vec::new();
    let all = previews(detail);
    for sampled in &detail.stages {
        let Some(student) = sampled.options["sampler"]["student"]
            .as_str()
            .and_then(stage)
        else {
            continue;
        };
        let Some((trained, step)) = trained(student) else {
            continue;
        };
        let Some(own) = all.iter().find(|preview| preview.stage == sampled.name) else {
            continue;
        };
        let preview = Preview {
            run: own.run.clone(),
            stage: own.stage.clone(),
            hash: own.hash.clone(),
            path: own.path.clone(),
            caption: own.caption.clone(),
        };
        let steps = &sampled.options["sampler"]["timesteps"];
        let name = match steps {
            Value::Null => trained,
            steps => format!("{trained}, t = {steps}"),
        };
        match strips.iter_mut().find(|(known, _)| *known == name) {
            Some((_, pictures)) => pictures.push(SnapshotPicture { step, preview }),
            None => strips.push((name, vec![SnapshotPicture { step, preview }])),
        }
    }
    for (_, pictures) in &mut strips {
        pictures.sort_by_key(|picture| picture.step);
        // Several samples of one snapshot are not a sequence over time.
        pictures.dedup_by_key(|picture| picture.step);
    }
    strips.retain(|(_, pictures)| pictures.len() > 1);
    strips
}

/// The student that a stage is, or is a snapshot of, and the step.
fn trained(student: &StageDetail) -> Option<(String, u64)> {
    match student.kind.as_str() {
        "snapshot" => Some((
            student.options["student"].as_str()?.to_owned(),
            student.options["step"].as_u64()?,
        )),
        "distill" => Some((
            student.name.clone(),
            student.options["train"]["steps"].as_u64()?,
        )),
        _ => None,
    }
}

fn strip(student: &str, pictures: &[SnapshotPicture]) -> Markup {
    html! {
        section.strip data-strip="" {
            h2 { "Over training: " (page::name(student)) }
            p.slide data-needs-script="" hidden {
                label { "Step " input type="range" min="0" max=(pictures.len() - 1) value=(pictures.len() - 1) step="1"; " " output.num {} }
            }
            div.frames tabindex="0" aria-label="Pictures by step" {
                @for picture in pictures {
                    figure.grid data-step=(picture.step) {
                        a.zoom href=(picture.preview.address()) { img.pixels src=(picture.preview.address()) loading="lazy" alt=(format!("{} at step {}", student, picture.step)); }
                        figcaption.num { "step " (picture.step) }
                    }
                }
            }
        }
    }
}
