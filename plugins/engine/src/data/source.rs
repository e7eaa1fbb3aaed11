//! A source of images: examined when opened, then read once from its first image to its last.
//!
//! In: options. Out: sizes and classes, from the headers before anything is decoded; then each image with its size, channels
//! and class, decoded on all threads, a part of the source at a time. All damaged files are reported at once.

use std::ops::Range;
use std::path::{Path, PathBuf};

use retort_abi::{LogLevel, Part};
use retort_checkpoint::images::{
    LONGEST_FILE, TABLES, promises_image, promises_parquet, promises_tar,
};

use super::archived_images;
use super::arrays::Arrays;
use super::class::{self, Classes};
use super::content::{Bytes, ContentSource, Damaged};
use super::decoded::{self, ChunkWriter, DecodedChunk};
use super::error::{DataError, shown};
use super::folder::Folder;
use super::inspection::{FoundFiles, Inspection, told};
use super::item::{Item, ItemLocation, Progress};
use super::options::{DataOptions, Sizing};
use super::parquet;
use super::raster::{self, Raster, luma};
use super::resample::{Filter, Fit, fit};
use super::table::{self, MemoryBudget};
use super::values;
use crate::size::Size;

/// An image as it comes out of a source.
pub struct Image<'a> {
    /// Values (height, width, channels).
    pub pixels: &'a [u8],
    /// Its class.
    pub label: u32,
    /// The file, or its number in an array or a table.
    pub name: &'a str,
    /// What it shows.
    pub caption: Option<&'a str>,
}

/// An examined source.
pub struct Source {
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Height of all images.
    pub height: usize,
    /// Width of all images.
    pub width: usize,
    /// The value of white: 255, or less where a CSV file says so.
    pub white: f32,
    /// Name of each class.
    pub names: Vec<String>,
    /// How images are brought to their size, if they are.
    pub sizing: Option<Sizing>,
    /// What a user should hear.
    pub notices: Vec<(LogLevel, String)>,
    path: PathBuf,
    shape: Shape,
    pub(super) damaged: Vec<Damaged>,
    skip_damaged: bool,
    body: Body,
}

enum Body {
    Files {
        content: ContentSource,
        items: Vec<Item>,
    },
    Arrays(Box<Arrays>),
    Values(values::Values),
}

/// The size of the resized images.
#[derive(Clone, Copy)]
struct Shape {
    size: (usize, usize),
    channels: usize,
    fit: Fit,
    filter: Filter,
    background: [u8; 3],
}

impl Shape {
    fn apply(&self, image: Raster) -> Result<Raster, String> {
        let image = image.with_channels(self.channels);
        let grey = [luma(self.background)];
        let background = if self.channels == 1 {
            &grey[..]
        } else {
            &self.background
        };
        fit(image, self.size, self.fit, self.filter, background)
    }
}

/// Bytes of decoded images in memory at a time.
const HELD: usize = 64 << 20;

impl Source {
    /// Opens and examines the source in the checked options; relative paths start from `base_dir`. `progress` gets how many
    /// files or rows of how many have been examined, and returns whether to continue.
    pub fn open(
        o: &DataOptions,
        base_dir: &Path,
        progress: &mut Progress<'_>,
    ) -> Result<Self, DataError> {
        o.check()?;
        let at = |path: &String| base_dir.join(path);
        match (&o.folder, &o.tar, &o.parquet, &o.arrays, &o.csv) {
            (Some(folder), ..) => {
                Self::open_folder(o, &at(folder), o.table.as_ref().map(at), progress)
            }
            (_, Some(tar), ..) => Self::open_tar(o, &at(tar), vec![at(tar)], progress),
            (_, _, Some(parquet), ..) => {
                Self::open_parquet(o, &at(parquet), vec![at(parquet)], progress)
            }
            (.., Some(arrays), _) => Self::open_arrays(o, &at(arrays), o.labels.as_ref().map(at)),
            (.., Some(csv)) => Self::open_values(o, &at(csv)),
            _ => Err(DataError::Options(
                "data: an `images` stage cannot be a source of files".into(),
            )),
        }
    }

    fn open_values(o: &DataOptions, path: &Path) -> Result<Self, DataError> {
        let mut values = values::read(o, path)?;
        let mut found: Vec<u64> = values.labels.iter().copied().map(u64::from).collect();
        found.sort_unstable();
        found.dedup();
        let classes = found.len();
        class::contiguous(path, found)?;
        let channels = o.channels.unwrap_or(1);
        let size = o.size.map_or((values.height, values.width), Size::sides);
        if values.white == 0.0 {
            values.white = 1.0;
        }
        // Interpolated values need the full range of a byte.
        if (size != (values.height, values.width) || channels != 1) && values.white != 255.0 {
            let scale = 255.0 / values.white;
            let pixels = values.pixels.iter_mut();
            pixels.for_each(|value| *value = (f32::from(*value) * scale).round() as u8);
            values.white = 255.0;
        }
        let white = values.white;
        let names = (0..classes).map(|class| class.to_string()).collect();
        Ok(Self::new(o, path, size, channels, names, Body::Values(values)).with_white(white))
    }

    fn open_arrays(
        o: &DataOptions,
        path: &Path,
        labels: Option<PathBuf>,
    ) -> Result<Self, DataError> {
        let arrays = Arrays::open(o, path, labels.as_deref())?;
        let classes = arrays.labels.iter().max().map_or(1, |last| last + 1);
        let names = (0..classes).map(|class| class.to_string()).collect();
        let size = o.size.map_or((arrays.height, arrays.width), Size::sides);
        let channels = o.channels.unwrap_or(arrays.channels);
        Ok(Self::new(
            o,
            path,
            size,
            channels,
            names,
            Body::Arrays(Box::new(arrays)),
        ))
    }

    fn new(
        o: &DataOptions,
        path: &Path,
        size: (usize, usize),
        channels: usize,
        names: Vec<String>,
        body: Body,
    ) -> Self {
        Self {
            channels,
            height: size.0,
            width: size.1,
            white: 255.0,
            names,
            sizing: o.sizing(),
            notices: Vec::new(),
            path: path.to_owned(),
            shape: Shape {
                size,
                channels,
                fit: o.fit,
                filter: o.filter,
                background: o.background.colour(),
            },
            damaged: Vec::new(),
            skip_damaged: o.skip_damaged,
            body,
        }
    }

    /// One of image files.
    fn of_files(
        o: &DataOptions,
        path: &Path,
        content: ContentSource,
        names: Vec<String>,
        found: FoundFiles,
    ) -> Self {
        let body = Body::Files {
            content,
            items: found.items,
        };
        Self {
            notices: found.notices,
            damaged: found.damaged,
            ..Self::new(o, path, found.size, found.channels, names, body)
        }
    }

    fn with_white(mut self, white: f32) -> Self {
        self.white = white;
        self
    }

    fn open_folder(
        o: &DataOptions,
        path: &Path,
        table: Option<PathBuf>,
        progress: &mut Progress<'_>,
    ) -> Result<Self, DataError> {
        let mut folder = Folder::list(path)?;
        let inside = TABLES
            .iter()
            .find(|name| folder.files.iter().any(|file| file == *name));
        if let Some(table) = table.or_else(|| inside.map(|name| path.join(name))) {
            if o.label.is_some() {
                let message = format!(
                    "`label` names a column of Parquet files, but {} says what belongs to these images: its column is named \
                     `label`",
                    table.display()
                );
                return Err(DataError::content(path, message));
            }
            return Self::open_table(o, path, &table, progress);
        }
        if let Some(source) = Self::open_packed(o, &folder, progress)? {
            return Ok(source);
        }
        if o.label.is_some() {
            let message = "no Parquet files alone in it, whose column `label` could name";
            return Err(DataError::content(path, message));
        }
        // Without subfolders there is one class with the folder's name.
        let classes = match folder.folders.is_empty() {
            true => None,
            false => Some(Classes::new(path, folder.folders.iter().cloned(), true)?),
        };
        let items = items_by_class(path, std::mem::take(&mut folder.files), classes.as_ref())?;
        let content = ContentSource::Files(Vec::new());
        let inspection = Inspection::over(path, &content, items, false, progress)?;
        match classes {
            None => Self::of_one_class(o, path, content, inspection),
            Some(classes) => Self::of_class_folders(o, &folder, classes, content, inspection),
        }
    }

    /// The archives or Parquet files in a folder without images and subfolders; None if it has none.
    fn open_packed(
        o: &DataOptions,
        folder: &Folder,
        progress: &mut Progress<'_>,
    ) -> Result<Option<Self>, DataError> {
        if !folder.folders.is_empty() || folder.files.iter().any(|f| promises_image(f)) {
            return Ok(None);
        }
        let path = &folder.path;
        let of = |promises: fn(&str) -> bool| {
            let files = folder.files.iter().filter(|file| promises(file));
            files.map(|file| path.join(file)).collect::<Vec<_>>()
        };
        match (of(promises_tar), of(promises_parquet)) {
            (archives, tables) if !archives.is_empty() && !tables.is_empty() => {
                let message = format!(
                    "{} archives and {} Parquet files; keep one kind, or name a file (`tar:`, `parquet:`)",
                    archives.len(),
                    tables.len()
                );
                Err(DataError::content(path, message))
            }
            (_, tables) if !tables.is_empty() => {
                Self::open_parquet(o, path, tables, progress).map(Some)
            }
            // Only Parquet files have the column that `label` names.
            _ if o.label.is_some() => Ok(None),
            (archives, _) if !archives.is_empty() => {
                Self::open_tar(o, path, archives, progress).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Image files of one class, which has the folder's name.
    fn of_one_class(
        o: &DataOptions,
        path: &Path,
        content: ContentSource,
        inspection: Inspection,
    ) -> Result<Self, DataError> {
        let name = path
            .file_name()
            .map_or("images".into(), |name| name.to_string_lossy().into_owned());
        inspection.each_class_has_images(1, |_| path.to_owned())?;
        Ok(Self::of_files(
            o,
            path,
            content,
            vec![name],
            inspection.finish(o)?,
        ))
    }

    /// Image files in a folder for each class.
    fn of_class_folders(
        o: &DataOptions,
        folder: &Folder,
        classes: Classes,
        content: ContentSource,
        inspection: Inspection,
    ) -> Result<Self, DataError> {
        let path = &folder.path;
        let beside: Vec<&str> = inspection
            .images()
            .filter(|name| !name.contains('/'))
            .collect();
        if let Some(first) = beside.first() {
            let message = format!(
                "{} images ({}, ...) lie beside the folders of classes ({}, ...); move them into folders, or the folders \
                 elsewhere",
                beside.len(),
                shown(first),
                shown(&folder.folders[0])
            );
            return Err(DataError::content(path, message));
        }
        inspection.each_class_has_images(classes.names.len(), |label| {
            let bears = |name: &&String| classes.of(name) == label as u32;
            path.join(folder.folders.iter().find(bears).map_or("", |name| name))
        })?;
        let mut source = Self::of_files(o, path, content, classes.names, inspection.finish(o)?);
        if classes.mixed {
            let message =
                "some folders are named by numbers, others not: classes are in alphabetical order";
            source.notices.push((LogLevel::Warn, message.into()));
        }
        Ok(source)
    }

    fn open_table(
        o: &DataOptions,
        path: &Path,
        table: &Path,
        progress: &mut Progress<'_>,
    ) -> Result<Self, DataError> {
        let rows = table::read(table, path)?;
        let (classes, labelled) = classes_of(table, rows.iter().map(|row| row.label.as_deref()))?;
        let items = rows.into_iter().map(|row| Item {
            label: row.label.map_or(0, |label| classes.of(&label)),
            name: row.file,
            caption: row.caption,
            location: ItemLocation::File,
        });
        let content = ContentSource::Files(Vec::new());
        let inspection = Inspection::over(path, &content, items.collect(), true, progress)?;
        inspection.each_class_has_images(classes.names.len(), |_| table.to_owned())?;
        let mut source = Self::of_files(o, path, content, classes.names, inspection.finish(o)?);
        if !labelled {
            let message = format!(
                "{} names no classes: all images are of one",
                table.display()
            );
            source.notices.push((LogLevel::Info, message));
        }
        Ok(source)
    }

    fn open_tar(
        o: &DataOptions,
        path: &Path,
        archives: Vec<PathBuf>,
        progress: &mut Progress<'_>,
    ) -> Result<Self, DataError> {
        let mut found = archived_images::ArchivedImages::default();
        for (archive, number) in archives.iter().zip(0u32..) {
            if !progress(u64::from(number), archives.len() as u64) {
                return Err(DataError::Cancelled);
            }
            found.read(archive, number)?;
        }
        let archived_images::ArchivedImages {
            mut items,
            classes: mut numbers,
            ..
        } = found;
        let is_labelled = |item: &&Item| item.label != Item::UNLABELLED;
        let labelled = items.iter().filter(is_labelled).count();
        if labelled == 0
            && let Some(depth) = archived_images::folders(items.iter().map(|item| &*item.name))
        {
            for item in &mut items {
                let folder = archived_images::folder(&item.name, depth);
                let next = numbers.len() as u32;
                class::limit(path, numbers.len())?;
                item.label = match numbers.get(folder) {
                    Some(known) => *known,
                    None => *numbers.entry(folder.into()).or_insert(next),
                };
            }
        }
        let content = ContentSource::Files(archives);
        let mut inspection = Inspection::over(path, &content, items, false, progress)?;
        let mut labels: Vec<&str> = vec![""; numbers.len()];
        for (label, number) in &numbers {
            labels[*number as usize] = label;
        }
        let of = |item: &Item| labels.get(item.label as usize).copied();
        let all = || {
            let damaged = inspection.damaged.iter().map(|(item, _)| item);
            inspection.items.iter().chain(damaged)
        };
        if let (Some(bare), true) = (all().find(|item| of(item).is_none()), labelled > 0) {
            let message = format!(
                "{} has no class, though {labelled} files have one",
                shown(&bare.name)
            );
            return Err(DataError::content(path, message));
        }
        let (classes, _) = classes_of(path, all().map(of))?;
        for item in inspection.items_mut() {
            item.label = labels
                .get(item.label as usize)
                .map_or(0, |label| classes.of(label));
        }
        inspection.each_class_has_images(classes.names.len(), |_| path.to_owned())?;
        Ok(Self::of_files(
            o,
            path,
            content,
            classes.names,
            inspection.finish(o)?,
        ))
    }

    fn open_parquet(
        o: &DataOptions,
        path: &Path,
        files: Vec<PathBuf>,
        progress: &mut Progress<'_>,
    ) -> Result<Self, DataError> {
        let parquet::ItemRows {
            tables,
            items,
            labels,
            notices,
        } = parquet::read(path, files, o.label.as_deref(), progress)?;
        let content = ContentSource::Tables(tables);
        let mut inspection = Inspection::over(path, &content, items, true, progress)?;
        let names = match labels {
            parquet::ClassLabels::Known(names) => names,
            parquet::ClassLabels::Written(labels) => {
                let (classes, _) = classes_of(path, labels.iter().map(|label| Some(&**label)))?;
                for item in inspection.items_mut() {
                    let label = labels.get(item.label as usize);
                    item.label = label.map_or(0, |label| classes.of(label));
                }
                classes.names
            }
        };
        inspection.each_class_has_images(names.len(), |_| path.to_owned())?;
        let mut source = Self::of_files(o, path, content, names, inspection.finish(o)?);
        source.notices.extend(notices);
        Ok(source)
    }

    /// What there is, in a line.
    pub fn summary(&self) -> String {
        format!(
            "{}: {} images of {} x {}, {}, classes: {}",
            self.path.display(),
            self.count(),
            self.height,
            self.width,
            if self.channels == 1 { "grey" } else { "RGB" },
            self.names.len()
        )
    }

    /// Number of images, damaged ones left out as far as they are known.
    pub fn count(&self) -> usize {
        match &self.body {
            Body::Files { items, .. } => items.len(),
            Body::Arrays(arrays) => arrays.count,
            Body::Values(values) => values.labels.len(),
        }
    }

    /// Bytes of all images, a byte per value.
    pub fn bytes(&self) -> u64 {
        (self.count() * self.height * self.width * self.channels) as u64
    }

    /// Reads all images in order. `progress` gets how many are done and returns whether to continue. Returns the damaged
    /// files, if they may be left out.
    pub fn read(
        self,
        progress: &mut dyn FnMut(u64) -> bool,
        keep: &mut dyn FnMut(Image<'_>) -> crate::Result<()>,
    ) -> crate::Result<Vec<Damaged>> {
        self.read_with(None, progress, keep)
    }

    /// The same; images from [`Source::decode_share`] in a directory are not decoded again.
    pub fn read_with(
        mut self,
        parts: Option<&Path>,
        progress: &mut dyn FnMut(u64) -> bool,
        keep: &mut dyn FnMut(Image<'_>) -> crate::Result<()>,
    ) -> crate::Result<Vec<Damaged>> {
        let shape = self.shape;
        let fault = |index: usize, message: String| {
            DataError::content(&self.path, format!("image {index}: {message}"))
        };
        match &mut self.body {
            Body::Values(values) => {
                let area = values.height * values.width;
                for (index, (pixels, label)) in values
                    .pixels
                    .chunks_exact(area)
                    .zip(&values.labels)
                    .enumerate()
                {
                    if index.is_multiple_of(1024) && !progress(index as u64) {
                        return Err(DataError::Cancelled.into());
                    }
                    let image = Raster {
                        height: values.height,
                        width: values.width,
                        channels: 1,
                        pixels: pixels.to_vec(),
                    };
                    let image = shape.apply(image).map_err(|e| fault(index, e))?;
                    keep(Image {
                        pixels: &image.pixels,
                        label: *label,
                        name: &format!("row {index}"),
                        caption: None,
                    })?;
                }
                Ok(Vec::new())
            }
            Body::Arrays(arrays) => {
                let step = at_once([arrays.height, arrays.width, arrays.channels]);
                for index in 0..arrays.count {
                    if index.is_multiple_of(step) && !progress(index as u64) {
                        return Err(DataError::Cancelled.into());
                    }
                    let image = shape.apply(arrays.read()?);
                    let image = image.map_err(|e| fault(index, e))?;
                    keep(Image {
                        pixels: &image.pixels,
                        label: arrays.labels.get(index).copied().unwrap_or(0),
                        name: &format!("image {index}"),
                        caption: None,
                    })?;
                }
                Ok(Vec::new())
            }
            Body::Files { .. } => self.read_files(parts, progress, keep),
        }
    }

    /// Decodes a part's share of the images into files of a directory, except those already there, for [`Source::read_with`].
    /// Sources whose images are not in files have no shares. Returns the size of the share. `progress` gets how many of how
    /// many are done, and returns whether to continue.
    pub fn decode_share(
        &self,
        part: Part,
        dir: &Path,
        progress: &mut Progress<'_>,
    ) -> crate::Result<u64> {
        let Body::Files { content, items } = &self.body else {
            return Ok(0);
        };
        let shape = [self.height, self.width, self.channels];
        let own: Vec<_> = decoded::chunks(items.len())
            .filter(|(chunk, _)| part.takes(*chunk))
            .collect();
        let share = |chunks: &[(usize, Range<usize>)]| -> u64 {
            chunks.iter().map(|(_, range)| range.len() as u64).sum()
        };
        let total = share(&own);
        let is_missing = |(chunk, range): &(usize, Range<usize>)| {
            DecodedChunk::open(dir, *chunk, &items[range.clone()], shape).is_none()
        };
        let missing: Vec<_> = own.into_iter().filter(is_missing).collect();
        let there = total - share(&missing);
        let mut goes_on = |done: u64| match progress(there + done, total) {
            true => Ok(()),
            false => Err(crate::Error::from(DataError::Cancelled)),
        };
        goes_on(0)?;
        // Archives and tables are read once.
        let ranges = missing.iter().map(|(_, range)| range.clone());
        let wanted: Vec<Item> = ranges
            .flat_map(|range| items[range].iter().cloned())
            .collect();
        let mut writer = ChunkWriter::new(dir, part, shape);
        // The chunk of each of them.
        let mut chunks = missing
            .iter()
            .flat_map(|chunk| std::iter::repeat_n(chunk, chunk.1.len()));
        content.each(
            &self.path,
            &wanted,
            at_once(self.image()),
            self.decoder(),
            |first, made| {
                let done = (first + made.len()) as u64;
                for (image, (chunk, range)) in made.into_iter().zip(&mut chunks) {
                    writer.push(*chunk, &items[range.clone()], image)?;
                }
                goes_on(done)
            },
        )?;
        Ok(total)
    }

    /// Height, width and channels of its images.
    fn image(&self) -> [usize; 3] {
        [self.height, self.width, self.channels]
    }

    /// Decodes an image file and brings the image to the source's size.
    fn decoder(&self) -> impl Fn(&Item, &Bytes<'_>) -> Result<Raster, String> + Sync + use<> {
        let shape = self.shape;
        move |_, bytes| {
            let content = bytes.read(LONGEST_FILE)?;
            let apply = |image| shape.apply(image);
            let image = raster::decode_then(&content, shape.background, apply)?;
            // If images are not resized, their headers agree; a decoder may still return another size.
            match (image.height, image.width) == shape.size {
                true => Ok(image),
                false => Err(format!(
                    "{} x {} pixels, its header says otherwise",
                    image.height, image.width
                )),
            }
        }
    }

    fn read_files(
        self,
        parts: Option<&Path>,
        progress: &mut dyn FnMut(u64) -> bool,
        keep: &mut dyn FnMut(Image<'_>) -> crate::Result<()>,
    ) -> crate::Result<Vec<Damaged>> {
        let (shape, decode) = (self.image(), self.decoder());
        let at_once = at_once(shape);
        let Body::Files { content, items } = self.body else {
            return Ok(Vec::new());
        };
        let known = items.len() + self.damaged.len();
        let (mut damaged, mut kept) = (self.damaged, vec![0u64; self.names.len()]);
        if !progress(0) {
            return Err(DataError::Cancelled.into());
        }
        let mut take = |first: usize, decoded: Vec<Result<Raster, String>>| -> crate::Result<()> {
            let done = first + decoded.len();
            for (item, image) in items[first..].iter().zip(decoded) {
                match image {
                    Ok(image) => {
                        kept[item.label as usize] += 1;
                        keep(Image {
                            pixels: &image.pixels,
                            label: item.label,
                            name: &item.name,
                            caption: item.caption.as_deref(),
                        })?;
                    }
                    Err(why) => damaged.push(Damaged {
                        name: item.name.to_string(),
                        why,
                    }),
                }
            }
            match progress(done as u64) {
                true => Ok(()),
                false => Err(DataError::Cancelled.into()),
            }
        };
        // Merges the images decoded by parts with those decoded here.
        let mut next = 0;
        let here = |range: Range<usize>, take: &mut decoded::ImageSink<'_>| {
            if range.is_empty() {
                return Ok(());
            }
            let first = range.start;
            content.each(
                &self.path,
                &items[range],
                at_once,
                &decode,
                |within, made| take(first + within, made),
            )
        };
        if let Some(dir) = parts {
            for (chunk, range) in decoded::chunks(items.len()) {
                let its_own = &items[range.clone()];
                if let Some(found) = DecodedChunk::open(dir, chunk, its_own, shape) {
                    here(next..range.start, &mut take)?;
                    found.read(at_once, &mut |within, made| {
                        take(range.start + within, made)
                    })?;
                    next = range.end;
                }
            }
        }
        here(next..items.len(), &mut take)?;
        damaged.sort_by(|a, b| a.name.cmp(&b.name));
        if !damaged.is_empty() && !self.skip_damaged {
            return Err(DataError::content(&self.path, told(&damaged, known)).into());
        }
        if let Some(class) = kept.iter().position(|count| *count == 0) {
            let message = format!(
                "all images of class {} are damaged",
                shown(&self.names[class])
            );
            return Err(DataError::content(&self.path, message).into());
        }
        Ok(damaged)
    }
}

/// The number of classes in the labels (one without labels), and whether there are labels.
fn classes_of<'a>(
    path: &Path,
    labels: impl Iterator<Item = Option<&'a str>> + Clone,
) -> Result<(Classes, bool), DataError> {
    match labels.clone().any(|label| label.is_some()) {
        true => Ok((
            Classes::new(path, labels.flatten().map(str::to_owned), false)?,
            true,
        )),
        false => Ok((Classes::new(path, ["images".to_owned()], false)?, false)),
    }
}

/// The files of a folder, ordered by class, then by name. A file's class is that of the subfolder in which it lies.
fn items_by_class(
    path: &Path,
    files: Vec<String>,
    classes: Option<&Classes>,
) -> Result<Vec<Item>, DataError> {
    let label = |file: &str| match (classes, file.split_once('/')) {
        (Some(classes), Some((class, _))) => classes.of(class),
        _ => 0,
    };
    let mut held = MemoryBudget::default();
    let items = files.into_iter().map(|file| {
        held.file(&file)
            .map_err(|message| DataError::content(path, message))?;
        Ok(Item {
            label: label(&file),
            name: file.into(),
            caption: None,
            location: ItemLocation::File,
        })
    });
    let mut items = items.collect::<Result<Vec<Item>, DataError>>()?;
    items.sort_by_key(|item| item.label);
    Ok(items)
}

/// Images of this height, width and number of channels that are in memory at a time.
fn at_once([height, width, channels]: [usize; 3]) -> usize {
    (HELD / (height * width * channels)).clamp(1, 256)
}
