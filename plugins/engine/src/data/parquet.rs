//! Parquet files of images, as Hugging Face has data sets: which columns hold what, and the images row by row.
//!
//! In: files of one split, each with a column of images (a structure with `bytes`, or bytes alone) and perhaps one of classes
//! and one of captions. Out: an item for each row, and the bytes of items in their order: pages are packed, so that there is
//! no way to a single one. What lies where in a file is the matter of `retort_checkpoint::parquet`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use retort_abi::LogLevel;
use retort_checkpoint::json;
use retort_checkpoint::parquet::{Cell, Column, Parquet, Values};
use serde_json::Value;

use super::class;
use super::error::{DataError, shown};
use super::item::{Item, Place};
use super::table::{CAPTION, LABEL, MemoryBudget, cost};

/// Names of columns of images, in the order of preference.
const IMAGE: [&str; 7] = ["image", "img", "jpg", "jpeg", "png", "webp", "picture"];

/// The most bytes of what Hugging Face's library writes beside the data.
const LONGEST_NOTE: usize = 8 << 20;

/// Files that are read one after the other.
#[derive(Debug)]
pub(super) struct Tables {
    files: Vec<PathBuf>,
    /// The path of the column of images.
    image: Vec<Arc<str>>,
    /// Bytes that a page may take, beside the items.
    held: u64,
}

/// What the files hold.
pub(super) struct Rows {
    pub(super) tables: Tables,
    pub(super) items: Vec<Item>,
    pub(super) labels: Labels,
    pub(super) notices: Vec<(LogLevel, String)>,
}

/// What the labels of items mean.
pub(super) enum Labels {
    /// Numbers of classes with these names.
    Known(Vec<String>),
    /// Numbers of these, as they are written.
    Written(Vec<Arc<str>>),
}

/// Columns of a file, by number.
struct Found {
    image: usize,
    label: Option<usize>,
    caption: Option<usize>,
}

/// Looks through files; `label` names the column of classes.
pub(super) fn read(
    path: &Path,
    files: Vec<PathBuf>,
    label: Option<&str>,
) -> Result<Rows, DataError> {
    let notices = splits(path, &files)?;
    let mut found = FoundRows::default();
    for (file, number) in files.iter().zip(0u32..) {
        found.add(file, number, label)?;
    }
    let FoundRows {
        items,
        numbers,
        first,
        held,
    } = found;
    let Some((_, layout)) = first.filter(|_| !items.is_empty()) else {
        return Err(DataError::Empty {
            path: path.to_owned(),
            expected: "rows with images",
            found: "none".into(),
        });
    };
    let is_bare = |item: &&Item| item.label == Item::UNLABELLED;
    let bare = items.iter().filter(is_bare).count();
    if let (Some(first), true) = (items.iter().find(is_bare), bare < items.len()) {
        let labelled = items.len() - bare;
        let message = format!(
            "{} has no class, though {labelled} rows have one",
            first.name
        );
        return Err(DataError::content(path, message));
    }
    let labels = match layout.names.filter(|_| bare == 0) {
        Some(names) => {
            all_are_there(path, &names, &items)?;
            Labels::Known(names)
        }
        None => {
            let mut written = vec![Arc::from(""); numbers.len()];
            numbers
                .into_iter()
                .for_each(|(text, number)| written[number as usize] = text);
            Labels::Written(written)
        }
    };
    Ok(Rows {
        tables: Tables {
            files,
            image: layout.image,
            held: held.beside(),
        },
        items,
        labels,
        notices,
    })
}

/// What is alike in all files of a set.
#[derive(PartialEq)]
struct Layout {
    /// The path of the column of images.
    image: Vec<Arc<str>>,
    /// Names of the classes, where the files have them.
    names: Option<Vec<String>>,
}

/// The rows of the files that have been looked through.
#[derive(Default)]
struct FoundRows {
    items: Vec<Item>,
    /// Classes as written, by the numbers that items have.
    numbers: BTreeMap<Arc<str>, u32>,
    /// The first file, and its layout.
    first: Option<(PathBuf, Layout)>,
    held: MemoryBudget,
}

impl FoundRows {
    /// Adds the rows of a file, which is the one of this number.
    fn add(&mut self, file: &Path, number: u32, label: Option<&str>) -> Result<(), DataError> {
        let mut parquet = open(file)?;
        let found = columns(file, &parquet, label)?;
        let names = match found.label {
            Some(label) => names(file, &parquet, &parquet.columns[label])?,
            None => None,
        };
        let classes = names.as_ref().map(Vec::len);
        self.is_alike(
            file,
            Layout {
                image: parquet.columns[found.image].path.clone(),
                names,
            },
        )?;
        let begin = self.items.len();
        rows(file, number, parquet.rows, &mut self.items, &mut self.held)?;
        parquet.hold_at_most(self.held.beside());
        if let Some(column) = found.label {
            each_cell(file, &parquet, column, |row, cell| {
                self.items[begin + row as usize].label = self.label(file, row, cell, classes)?;
                Ok(())
            })?;
        }
        if let Some(column) = found.caption {
            each_cell(file, &parquet, column, |row, cell| {
                if let Some(cell) = cell {
                    let text = text(file, row, cell)?;
                    let room = self.held.take(cost(&text));
                    room.map_err(|message| DataError::content(file, message))?;
                    self.items[begin + row as usize].caption = Some(text.into());
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Refuses a file with other columns or classes than the first.
    fn is_alike(&mut self, file: &Path, layout: Layout) -> Result<(), DataError> {
        let Some((path, first)) = &self.first else {
            self.first = Some((file.to_owned(), layout));
            return Ok(());
        };
        if layout.image != first.image {
            let message = format!(
                "its images are in column {}, those of {} in {}",
                shown(&layout.image.join(".")),
                path.display(),
                shown(&first.image.join("."))
            );
            return Err(DataError::content(file, message));
        }
        match layout.names == first.names {
            true => Ok(()),
            false => {
                let message = format!(
                    "its classes have other names than those of {}",
                    path.display()
                );
                Err(DataError::content(file, message))
            }
        }
    }

    /// The class of a row, of so many where these have names.
    fn label(
        &mut self,
        file: &Path,
        row: u64,
        cell: Option<Cell<'_>>,
        classes: Option<usize>,
    ) -> Result<u32, DataError> {
        let fault = |message: String| DataError::content(file, message);
        match (cell, classes) {
            // As the hub writes that a row has none.
            (None | Some(Cell::Int(-1)), _) => Ok(Item::UNLABELLED),
            (Some(Cell::Int(class)), Some(classes)) => match u32::try_from(class) {
                Ok(class) if (class as usize) < classes => Ok(class),
                _ => Err(fault(format!("row {row}: class {class} of {classes}"))),
            },
            (Some(cell), _) => {
                if let Cell::Bytes(bytes) = cell
                    && bytes.len() > class::LONGEST
                {
                    let message = format!(
                        "row {row}: a class of {} bytes; names have at most {}: is this the column of classes?",
                        bytes.len(),
                        class::LONGEST
                    );
                    return Err(fault(message));
                }
                let text = self.held.label(&text(file, row, cell)?).map_err(fault)?;
                let next = self.numbers.len() as u32;
                Ok(*self.numbers.entry(text).or_insert(next))
            }
        }
    }
}

/// Refuses files of several splits; tells of files that are missing by their names, as in `train-00000-of-00002.parquet`.
fn splits(path: &Path, files: &[PathBuf]) -> Result<Vec<(LogLevel, String)>, DataError> {
    let mut counts: BTreeMap<(String, usize), usize> = BTreeMap::new();
    for file in files {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let mut parts = stem.rsplitn(4, '-');
        let [Some(all), Some("of"), Some(number), Some(split)] =
            std::array::from_fn(|_| parts.next())
        else {
            continue;
        };
        if let (Ok(all), Ok(_)) = (all.parse(), number.parse::<usize>()) {
            *counts.entry((split.to_owned(), all)).or_default() += 1;
        }
    }
    let names: BTreeSet<&str> = counts.keys().map(|(split, _)| split.as_str()).collect();
    if names.len() > 1 {
        let names: Vec<String> = names.into_iter().map(shown).collect();
        let message = format!(
            "files of several splits ({}): keep those to read in a folder of their own (links will do)",
            names.join(", ")
        );
        return Err(DataError::content(path, message));
    }
    let absent = counts.iter().filter(|((_, all), there)| *there < all);
    let told = absent.map(|((split, all), there)| {
        let message = format!(
            "{}: {there} of {all} files of {} are there",
            path.display(),
            shown(split)
        );
        (LogLevel::Warn, message)
    });
    Ok(told.collect())
}

fn open(file: &Path) -> Result<Parquet, DataError> {
    super::file::open(file, "a Parquet file")?;
    Parquet::open(file).map_err(|error| wrong(file, error))
}

fn wrong(file: &Path, error: retort_checkpoint::Error) -> DataError {
    match error {
        retort_checkpoint::Error::Io(error) => DataError::read(file, "file", error),
        error => DataError::content(file, error.to_string()),
    }
}

/// Which columns hold what.
fn columns(file: &Path, parquet: &Parquet, label: Option<&str>) -> Result<Found, DataError> {
    let named = |names: &[&str]| names.iter().find_map(|name| parquet.column(&[name]));
    let is_bytes = |at: &usize| parquet.columns[*at].values == Values::Bytes;
    let image = |name: &&str| {
        let inner = parquet.column(&[name, "bytes"]);
        inner.or_else(|| parquet.column(&[name])).filter(is_bytes)
    };
    let image = match IMAGE.iter().find_map(image) {
        Some(image) => image,
        // The only one that is one by its structure.
        None => {
            let is_image = |column: &Column| {
                matches!(&column.path[..], [_, bytes] if **bytes == *"bytes") && !column.repeated
            };
            let mut images =
                (0..parquet.columns.len()).filter(|at| is_image(&parquet.columns[*at]));
            match (images.next(), images.next()) {
                (Some(image), None) => image,
                _ => {
                    let message = format!(
                        "no column of images: expected one named `image`, with bytes or a structure of `bytes` and `path`; \
                         it has {}",
                        listed(parquet)
                    );
                    return Err(DataError::content(file, message));
                }
            }
        }
    };
    let label = match label {
        None => named(&LABEL),
        Some(name) => match parquet.column(&[name]) {
            Some(column) => Some(column),
            None => {
                let message = format!(
                    "no column named {name:?} (`label`); it has {}",
                    listed(parquet)
                );
                return Err(DataError::content(file, message));
            }
        },
    };
    Ok(Found {
        image,
        label,
        caption: named(&CAPTION),
    })
}

/// The first columns of a file, for people.
fn listed(parquet: &Parquet) -> String {
    let names = parquet
        .columns
        .iter()
        .take(12)
        .map(|column| shown(&column.name()));
    let names: Vec<String> = names.collect();
    match parquet.columns.len() - names.len() {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// Names of the classes of a column, where the file's notes have them: `ClassLabel`.
fn names(
    file: &Path,
    parquet: &Parquet,
    column: &Column,
) -> Result<Option<Vec<String>>, DataError> {
    let note = parquet.notes.iter().find(|(key, _)| key == "huggingface");
    let Some((_, note)) = note.filter(|_| column.values != Values::Bytes) else {
        return Ok(None);
    };
    let fault = |message: String| {
        Err(DataError::content(
            file,
            format!("its note `huggingface`: {message}"),
        ))
    };
    if note.len() > LONGEST_NOTE {
        return fault(format!("more than {LONGEST_NOTE} bytes"));
    }
    let note: Value = match json::parse(note.as_bytes()) {
        Ok(note) => note,
        Err(error) => return fault(format!("expected JSON: {error}")),
    };
    let feature = &note["info"]["features"][&*column.path[0]];
    let Some(names) = feature["names"].as_array() else {
        return Ok(None);
    };
    let names: Option<Vec<String>> = names
        .iter()
        .map(|name| name.as_str().map(str::to_owned))
        .collect();
    let Some(names) = names.filter(|names| !names.is_empty()) else {
        return fault(format!(
            "the names of the classes of `{}` are no texts",
            shown(&column.path[0])
        ));
    };
    class::limit(file, names.len())?;
    class::named(file, &names)?;
    Ok(Some(names))
}

/// Refuses classes of which there is no row.
fn all_are_there(path: &Path, names: &[String], items: &[Item]) -> Result<(), DataError> {
    let mut has = vec![false; names.len()];
    items
        .iter()
        .for_each(|item| has[item.label as usize] = true);
    let absent: Vec<String> = has
        .iter()
        .zip(names)
        .filter(|(has, _)| !**has)
        .map(|(_, name)| shown(name))
        .collect();
    match absent.first() {
        None => Ok(()),
        Some(first) => Err(DataError::content(
            path,
            format!(
                "{} of {} classes have no image ({first}, ...); read all of the split, or save it without these classes",
                absent.len(),
                names.len()
            ),
        )),
    }
}

/// Adds an item for each row of a file.
fn rows(
    file: &Path,
    number: u32,
    rows: u64,
    items: &mut Vec<Item>,
    held: &mut MemoryBudget,
) -> Result<(), DataError> {
    let file_name = file.file_name().unwrap_or_default().to_string_lossy();
    for row in 0..rows {
        let name = format!("{file_name} row {row}");
        held.file(&name)
            .map_err(|message| DataError::content(file, message))?;
        items.push(Item {
            name: name.into(),
            label: Item::UNLABELLED,
            caption: None,
            place: Place::Row(number, row),
        });
    }
    Ok(())
}

/// Calls `each` with every row's cell of a column, and its row.
fn each_cell(
    file: &Path,
    parquet: &Parquet,
    column: usize,
    mut each: impl FnMut(u64, Option<Cell<'_>>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let wrong = |error| wrong(file, error);
    let (mut pages, mut row) = (parquet.pages(column), 0);
    while let Some(page) = pages.next().map_err(wrong)? {
        for cell in page.cells().map_err(wrong)? {
            each(row, cell.map_err(wrong)?)?;
            row += 1;
        }
    }
    Ok(())
}

/// A cell as text.
fn text(file: &Path, row: u64, cell: Cell<'_>) -> Result<String, DataError> {
    match cell {
        Cell::Int(number) => Ok(number.to_string()),
        Cell::Bytes(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(DataError::content(
                file,
                format!("row {row}: a text that is not UTF-8"),
            )),
        },
    }
}

impl Tables {
    /// Gives the bytes of items, which are in the order of their rows, to `make`, by all threads, so many at a time. `take`
    /// gets what that makes, and the number of the first.
    pub(super) fn each<T: Send, E: From<DataError>>(
        &self,
        items: &[Item],
        at_once: usize,
        make: &(impl Fn(&Item, Option<&[u8]>) -> T + Sync),
        take: &mut impl FnMut(usize, Vec<T>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut next = 0;
        for (file, number) in self.files.iter().zip(0u32..) {
            let of_it = |item: &&Item| matches!(item.place, Place::Row(own, _) if own == number);
            let count = items[next..].iter().take_while(of_it).count();
            let own = &items[next..next + count];
            if !own.is_empty() {
                self.each_of(file, own, at_once, make, &mut |at, made| {
                    take(next + at, made)
                })?;
            }
            next += count;
        }
        Ok(())
    }

    /// The same of one file.
    fn each_of<T: Send, E: From<DataError>>(
        &self,
        file: &Path,
        items: &[Item],
        at_once: usize,
        make: &(impl Fn(&Item, Option<&[u8]>) -> T + Sync),
        take: &mut impl FnMut(usize, Vec<T>) -> Result<(), E>,
    ) -> Result<(), E> {
        let changed = || DataError::content(file, "fewer rows with images than a moment ago");
        let mut parquet = open(file)?;
        parquet.hold_at_most(self.held);
        let path: Vec<&str> = self.image.iter().map(|part| &**part).collect();
        let column = parquet.column(&path).ok_or_else(changed)?;
        let wrong = |error| wrong(file, error);
        let (mut pages, mut row, mut done) = (parquet.pages(column), 0, 0);
        while let Some(page) = pages.next().map_err(wrong)? {
            let mut cells = page.cells().map_err(wrong)?;
            loop {
                let mut part = Vec::new();
                for cell in cells.by_ref() {
                    let cell = cell.map_err(wrong)?;
                    let wanted = items.get(done + part.len());
                    if let Some(item) =
                        wanted.filter(|item| matches!(item.place, Place::Row(_, own) if own == row))
                    {
                        let bytes = match cell {
                            Some(Cell::Bytes(bytes)) => Some(bytes),
                            _ => None,
                        };
                        part.push((item, bytes));
                    }
                    row += 1;
                    if part.len() == at_once {
                        break;
                    }
                }
                if part.is_empty() {
                    break;
                }
                let made = part
                    .par_iter()
                    .map(|(item, bytes)| make(item, *bytes))
                    .collect();
                let first = done;
                done += part.len();
                take(first, made)?;
            }
        }
        match done == items.len() {
            true => Ok(()),
            false => Err(changed().into()),
        }
    }
}
