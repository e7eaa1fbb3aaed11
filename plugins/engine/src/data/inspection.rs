//! A first pass over files: their headers, by all threads, before any decoding.
//!
//! In: files that are or may be images. Out: which of them are, their sizes and formats, and all damaged ones at once.
//! Deliberately absent: anything after the headers (`source.rs`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use retort_abi::LogLevel;
use retort_checkpoint::images::{LONGEST_FILE, promises_image};

use super::content::{Archives, Bytes, ContentSource, Damaged};
use super::error::{DataError, shown};
use super::folder::SkippedFiles;
use super::item::{Item, Progress};
use super::options::DataOptions;
use super::raster::{self, Header};

/// How many bytes of a file are read for its header at first.
const BEGINNING: u64 = 1 << 16;

/// Damaged files that a message explains, each in a line.
const EXPLAINED: usize = 20;

/// The most bytes for the names of the others.
const NAMES: usize = 8 << 10;

/// The most damaged files that are left out or listed: they are kept with their errors.
const MOST_DAMAGED: usize = 1 << 17;

/// Files whose headers are in memory at a time.
const INSPECTED_AT_ONCE: usize = 4096;

/// With more than this multiple of files, a sample is checked first, to see whether any is an image.
const MANY: usize = 16;

/// The message about damaged files.
pub(super) fn told(damaged: &[Damaged], of: usize) -> String {
    let (state, cure) = Damaged::state(damaged);
    format!(
        "{} of {of} images are {state}:{}\n{cure} or remove them, or leave them out with `skip_damaged: true`",
        damaged.len(),
        listed(damaged, NAMES)
    )
}

/// The first of damaged files, a line each, and the names of the others as far as they fit into so many bytes.
fn listed(damaged: &[Damaged], mut bytes: usize) -> String {
    let (explained, others) = damaged.split_at(damaged.len().min(EXPLAINED));
    let mut text = String::new();
    for Damaged { name, why } in explained {
        text.push_str(&format!("\n  {}: {why}", shown(name)));
    }
    let names = others.iter().map(|Damaged { name, .. }| shown(name));
    let fitting = names.map_while(|name| {
        bytes = bytes.checked_sub(name.len() + 2)?;
        Some(name)
    });
    let names: Vec<String> = fitting.collect();
    if !names.is_empty() {
        text.push_str(&format!("\n  also {}", names.join(", ")));
    }
    if others.len() > names.len() {
        text.push_str(&format!("\n  and {} more", others.len() - names.len()));
    }
    text
}

/// The result of examining a file's beginning.
#[derive(Clone)]
enum HeaderCheck {
    Image(Header),
    Damaged(String),
    Other,
}

/// Items whose headers have been read.
#[derive(Default)]
pub(super) struct Inspection {
    path: PathBuf,
    pub(super) items: Vec<Item>,
    pub(super) damaged: Vec<(Item, String)>,
    skipped: SkippedFiles,
    /// How many images there are of each height and width, of each format, and in colour.
    sizes: BTreeMap<(u32, u32), usize>,
    formats: BTreeMap<String, usize>,
    coloured: usize,
}

/// The files of a source, after all have been examined.
pub(super) struct FoundFiles {
    pub(super) items: Vec<Item>,
    /// Height and width of the resized images.
    pub(super) size: (usize, usize),
    pub(super) channels: usize,
    pub(super) notices: Vec<(LogLevel, String)>,
    pub(super) damaged: Vec<Damaged>,
}

impl Inspection {
    /// Reads the headers of items; if they are `named`, all must be images. Reports to `progress`.
    pub(super) fn over(
        path: &Path,
        content: &ContentSource,
        items: Vec<Item>,
        named: bool,
        progress: &mut Progress<'_>,
    ) -> Result<Self, DataError> {
        let look = |item: &Item, bytes: &Bytes<'_>| -> HeaderCheck {
            let start = match bytes.read(BEGINNING) {
                Ok(start) => start,
                Err(why) => return HeaderCheck::Damaged(why),
            };
            if raster::format(&start).is_none() && !named && !promises_image(&item.name) {
                return HeaderCheck::Other;
            }
            let whole = start.len() as u64 != BEGINNING;
            let header = raster::header(&start);
            drop(start);
            let header = header.or_else(|why| match whole {
                true => Err(why),
                false => raster::header(&bytes.read(LONGEST_FILE)?),
            });
            header.map_or_else(HeaderCheck::Damaged, HeaderCheck::Image)
        };
        let mut inspection = Self {
            path: path.to_owned(),
            ..Self::default()
        };
        if let ContentSource::Files(archives) = content
            && items.len() > MANY * INSPECTED_AT_ONCE
        {
            let archives = Archives::open(path, archives)?;
            let look = |item: &Item| look(item, &Bytes::File(&archives, item));
            inspection.expect_images(&items, look)?;
        }
        // Items that are not images are removed in place: there are never two lists of millions.
        let mut rejected: Vec<(usize, Option<String>)> = Vec::new();
        let mut damaged = 0;
        let take = |first: usize, checks: Vec<HeaderCheck>| -> Result<(), DataError> {
            if !progress((first + checks.len()) as u64, items.len() as u64) {
                return Err(DataError::Cancelled);
            }
            for (place, check) in (first..).zip(checks) {
                match check {
                    HeaderCheck::Image(header) => inspection.count(&header),
                    HeaderCheck::Damaged(why) if damaged == MOST_DAMAGED => {
                        let name = shown(&items[place].name);
                        let message = format!(
                            "more than {MOST_DAMAGED} damaged images, the last of them {name}: {why}"
                        );
                        return Err(DataError::content(path, message));
                    }
                    HeaderCheck::Damaged(why) => {
                        damaged += 1;
                        rejected.push((place, Some(why)));
                    }
                    HeaderCheck::Other => {
                        inspection.skipped.add(&items[place].name);
                        rejected.push((place, None));
                    }
                }
            }
            Ok(())
        };
        content.each(path, &items, INSPECTED_AT_ONCE, look, take)?;
        let mut rejected = rejected.into_iter().peekable();
        let kept = items.into_iter().enumerate().filter_map(|(place, item)| {
            let Some((_, why)) = rejected.next_if(|(rejected, _)| *rejected == place) else {
                return Some(item);
            };
            inspection.damaged.extend(why.map(|why| (item, why)));
            None
        });
        inspection.items = kept.collect();
        Ok(inspection)
    }

    fn count(&mut self, header: &Header) {
        *self.sizes.entry((header.height, header.width)).or_default() += 1;
        let format = format!("{:?}", header.format).to_uppercase();
        *self.formats.entry(format).or_default() += 1;
        self.coloured += usize::from(header.colour);
    }

    /// Examines a sample of many items, evenly spaced: if none of it can be read, the others are not examined.
    fn expect_images(
        &self,
        items: &[Item],
        look: impl Fn(&Item) -> HeaderCheck + Sync,
    ) -> Result<(), DataError> {
        let step = items.len() / INSPECTED_AT_ONCE;
        let some: Vec<&Item> = items.iter().step_by(step).take(INSPECTED_AT_ONCE).collect();
        let checks: Vec<HeaderCheck> = some.par_iter().map(|item| look(item)).collect();
        let damaged = some.iter().zip(checks).map(|(item, look)| match look {
            HeaderCheck::Damaged(why) => Some(Damaged {
                name: item.name.to_string(),
                why,
            }),
            HeaderCheck::Image(_) | HeaderCheck::Other => None,
        });
        let Some(damaged) = damaged.collect::<Option<Vec<Damaged>>>() else {
            return Ok(());
        };
        let message = format!(
            "none of the {} images examined can be read, one in {step} of {}; the others were not examined:{}\n{} or remove \
             them; paths of a table start from this folder",
            damaged.len(),
            items.len(),
            listed(&damaged, 0),
            Damaged::state(&damaged).1
        );
        Err(DataError::content(&self.path, message))
    }

    /// Names of all that are or should be images.
    pub(super) fn images(&self) -> impl Iterator<Item = &str> {
        let damaged = self.damaged.iter().map(|(item, _)| &*item.name);
        self.items.iter().map(|item| &*item.name).chain(damaged)
    }

    pub(super) fn items_mut(&mut self) -> impl Iterator<Item = &mut Item> {
        let damaged = self.damaged.iter_mut().map(|(item, _)| item);
        self.items.iter_mut().chain(damaged)
    }

    /// Refuses a class without a file that is or should be an image; `place` is where such a file belongs.
    pub(super) fn each_class_has_images(
        &self,
        classes: usize,
        place: impl Fn(usize) -> PathBuf,
    ) -> Result<(), DataError> {
        let mut has = vec![false; classes];
        let damaged = self.damaged.iter().map(|(item, _)| item.label);
        for label in self.items.iter().map(|item| item.label).chain(damaged) {
            has[label as usize] = true;
        }
        match has.iter().position(|has| !has) {
            None => Ok(()),
            Some(class) => Err(DataError::Empty {
                path: place(class),
                expected: "image files (PNG, JPEG, WebP, GIF, BMP or TIFF)",
                found: match self.skipped.count() {
                    0 => "none".into(),
                    _ => format!("none; files of other kinds: {}", self.skipped.kinds()),
                },
            }),
        }
    }

    pub(super) fn finish(self, o: &DataOptions) -> Result<FoundFiles, DataError> {
        let damaged: Vec<Damaged> = self.damaged.into_iter().map(Damaged::of).collect();
        let Self {
            sizes,
            formats,
            coloured,
            ..
        } = self;
        if self.items.is_empty() {
            return Err(DataError::content(
                &self.path,
                told(&damaged, damaged.len()),
            ));
        }
        let size = match (o.size, sizes.keys().next()) {
            (Some(size), _) => size.sides(),
            (None, Some(&(h, w))) if sizes.len() == 1 => (h as usize, w as usize),
            _ => return Err(DataError::content(&self.path, sizes_told(&sizes, &damaged))),
        };
        if size.0.max(size.1) > 8192 {
            let message = format!(
                "images of {} x {}; sides go up to 8192: give `size`",
                size.0, size.1
            );
            return Err(DataError::content(&self.path, message));
        }
        let grey = self.items.len() - coloured;
        let channels = o.channels.unwrap_or(if coloured > 0 { 3 } else { 1 });
        let mut notices = Vec::new();
        if grey > 0 && coloured > 0 && o.channels.is_none() {
            let message = format!(
                "{grey} of {} images are grey, the others are not: all are read as RGB",
                grey + coloured
            );
            notices.push((LogLevel::Info, message));
        }
        if formats.len() > 1 {
            let kinds: Vec<String> = formats
                .iter()
                .map(|(format, count)| format!("{format} {count}"))
                .collect();
            let message = format!(
                "{}: {} images of several formats, {}: the artefacts of lossy compression in some of them will \
                 affect training and metrics",
                self.path.display(),
                self.items.len(),
                kinds.join(", ")
            );
            notices.push((LogLevel::Warn, message));
        }
        if self.skipped.count() > 0 {
            let message = format!(
                "{}: {} files are not images and were left out: {}",
                self.path.display(),
                self.skipped.count(),
                self.skipped.kinds()
            );
            notices.push((LogLevel::Warn, message));
        }
        Ok(FoundFiles {
            items: self.items,
            size,
            channels,
            notices,
            damaged,
        })
    }
}

/// The message about images of several sizes.
fn sizes_told(sizes: &BTreeMap<(u32, u32), usize>, damaged: &[Damaged]) -> String {
    let mut by_count: Vec<_> = sizes.iter().collect();
    by_count.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let shown: Vec<String> = by_count
        .iter()
        .take(8)
        .map(|((h, w), count)| format!("{h} x {w} ({count})"))
        .collect();
    let more = match by_count.len().saturating_sub(8) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let wish = match *by_count[0].0 {
        (h, w) if h == w => format!("`size: {h}`"),
        (h, w) => format!("`size: [{h}, {w}]`"),
    };
    let mut text = format!(
        "images of {} sizes (height x width): {}{more}; give the size to bring them to, as in {wish}",
        sizes.len(),
        shown.join(", ")
    );
    if !damaged.is_empty() {
        text.push_str(&format!(
            "\nmoreover, {}",
            told(damaged, sizes.values().sum::<usize>() + damaged.len())
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_files_are_named_as_far_as_a_message_goes() {
        let damaged = |count: usize, length: usize| -> Vec<Damaged> {
            let name = |i| format!("{i:0length$}.png");
            let why = "cut".to_owned();
            let all = (0..count).map(|i| Damaged {
                name: name(i),
                why: why.clone(),
            });
            all.collect()
        };
        let text = told(&damaged(300, 8), 400);
        assert!(text.starts_with("300 of 400 images are damaged:"), "{text}");
        assert!(text.contains("\n  00000019.png: cut\n  also 00000020.png, 00000021.png, "));
        assert!(text.contains(", 00000299.png\n"), "{text}");
        assert!(!text.contains(" more"), "{text}");
        // 40 of 202 bytes each fit.
        let text = told(&damaged(100_000, 196), 100_000);
        assert!(text.contains("\n  and 99940 more\n"), "{text}");
        assert!(text.len() < 16 << 10, "{} bytes", text.len());
        assert!(!told(&damaged(20, 8), 20).contains("also"));
    }
}
