//! Parquet files of images in Hugging Face's format: the roles of columns, and the images row by row.
//!
//! In: files of one split, each with a column of images (a structure with `bytes`, or bytes alone) and perhaps one of classes
//! and one of captions. Out: an item for each row, and the bytes of items in order: pages are compressed, so single items
//! cannot be accessed. The file format is in `retort_checkpoint::parquet`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use retort_abi::LogLevel;
use retort_checkpoint::json;
use retort_checkpoint::parquet::{Cell, Column, Parquet, Values};
use serde_json::Value;

use super::class;
use super::error::{DataError, shown};
use super::item::{Item, ItemLocation, Progress};
use super::table::{CAPTION, LABEL, MemoryBudget, cost};

/// Names of columns of images, in the order of preference.
const IMAGE: [&str; 7] = ["image", "img", "jpg", "jpeg", "png", "webp", "picture"];

/// The most bytes of the metadata written by Hugging Face's library.
const LONGEST_NOTE: usize = 8 << 20;

/// Files that are read in sequence.
#[derive(Debug)]
pub(super) struct TableFiles {
    files: Vec<PathBuf>,
    /// The path of the column of images.
    image: Vec<Arc<str>>,
    /// Bytes that a page may take in addition to the items.
    held: u64,
}

/// What the files hold.
pub(super) struct ItemRows {
    pub(super) tables: TableFiles,
    pub(super) items: Vec<Item>,
    pub(super) labels: ClassLabels,
    pub(super) notices: Vec<(LogLevel, String)>,
}

/// The meaning of the items' labels.
pub(super) enum ClassLabels {
    /// Numbers of classes with these names.
    Known(Vec<String>),
    /// Numbers of these texts, as written.
    Written(Vec<Arc<str>>),
}

/// Columns of a file, by number.
struct ColumnIndices {
    image: usize,
    label: Option<usize>,
    caption: Option<usize>,
}

/// Examines files; `label` names the column of classes. Reports the rows of each column read to `progress`.
pub(super) fn read(
    path: &Path,
    files: Vec<PathBuf>,
    label: Option<&str>,
    progress: &mut Progress<'_>,
) -> Result<ItemRows, DataError> {
    let notices = splits(path, &files)?;
    let mut found = ScannedRows::default();
    for (file, number) in files.iter().zip(0u32..) {
        found.add(file, number, label, progress)?;
    }
    let ScannedRows {
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
            ClassLabels::Known(names)
        }
        None => {
            let mut written = vec![Arc::from(""); numbers.len()];
            numbers
                .into_iter()
                .for_each(|(text, number)| written[number as usize] = text);
            ClassLabels::Written(written)
        }
    };
    Ok(ItemRows {
        tables: TableFiles {
            files,
            image: layout.image,
            held: held.beside(),
        },
        items,
        labels,
        notices,
    })
}

/// The layout shared by all files of a set.
#[derive(PartialEq)]
struct Layout {
    /// The path of the column of images.
    image: Vec<Arc<str>>,
    /// Names of the classes, where the files have them.
    names: Option<Vec<String>>,
}

/// The rows of the examined files.
#[derive(Default)]
struct ScannedRows {
    items: Vec<Item>,
    /// Classes as written, by the numbers that items have.
    numbers: BTreeMap<Arc<str>, u32>,
    /// The first file, and its layout.
    first: Option<(PathBuf, Layout)>,
    held: MemoryBudget,
}

impl ScannedRows {
    /// Adds the rows of the file with this number.
    fn add(
        &mut self,
        file: &Path,
        number: u32,
        label: Option<&str>,
        progress: &mut Progress<'_>,
    ) -> Result<(), DataError> {
        let mut parquet = open(file)?;
        let found = columns(file, &parquet, label)?;
        let names = match found.label {
            Some(label) => names(file, &parquet, &parquet.columns[label])?,
            None => None,
        };
        let classes = names.as_ref().map(Vec::len);
        self.check_alike(
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
            each_cell(file, &parquet, column, progress, |row, cell| {
                self.items[begin + row as usize].label = self.label(file, row, cell, classes)?;
                Ok(())
            })?;
        }
        if let Some(column) = found.caption {
            each_cell(file, &parquet, column, progress, |row, cell| {
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
    fn check_alike(&mut self, file: &Path, layout: Layout) -> Result<(), DataError> {
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

    /// The class of a row; below their number if classes have names.
    fn label(
        &mut self,
        file: &Path,
        row: u64,
        cell: Option<Cell<'_>>,
        classes: Option<usize>,
    ) -> Result<u32, DataError> {
        let fault = |message: String| DataError::content(file, message);
        match (cell, classes) {
            // The hub's value for a row without a class.
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

/// Refuses files of several splits; warns about files that are missing according to names such as
/// `train-00000-of-00002.parquet`.
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
fn columns(
    file: &Path,
    parquet: &Parquet,
    label: Option<&str>,
) -> Result<ColumnIndices, DataError> {
    let named = |names: &[&str]| {
        let plain = names.iter().find_map(|name| parquet.column(&[name]));
        // A column of lists is refused when it is read, instead of classes or captions that are lost.
        let lists = |name: &&str| {
            let bears = |column: &Column| column.path.first().is_some_and(|own| **own == **name);
            let is = |column: &Column| column.repeated && bears(column);
            parquet.columns.iter().position(is)
        };
        plain.or_else(|| names.iter().find_map(lists))
    };
    let is_bytes = |at: &usize| parquet.columns[*at].values == Values::Bytes;
    let image = |name: &&str| {
        let inner = parquet.column(&[name, "bytes"]);
        inner.or_else(|| parquet.column(&[name])).filter(is_bytes)
    };
    let image = match IMAGE.iter().find_map(image) {
        Some(image) => image,
        // The only column with the structure of an image column.
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
    Ok(ColumnIndices {
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

/// Names of a column's classes, if the file's metadata has them: `ClassLabel`.
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
            "the names of the classes of `{}` are not texts",
            shown(&column.path[0])
        ));
    };
    class::limit(file, names.len())?;
    class::named(file, &names)?;
    Ok(Some(names))
}

/// Refuses classes without a row.
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
            location: ItemLocation::Row(number, row),
        });
    }
    Ok(())
}

/// Calls `each` with every row's cell of a column, and its row; `progress` after each page.
fn each_cell(
    file: &Path,
    parquet: &Parquet,
    column: usize,
    progress: &mut Progress<'_>,
    mut each: impl FnMut(u64, Option<Cell<'_>>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let wrong = |error| wrong(file, error);
    let (mut pages, mut row) = (parquet.pages(column), 0);
    while let Some(page) = pages.next().map_err(wrong)? {
        for cell in page.cells().map_err(wrong)? {
            each(row, cell.map_err(wrong)?)?;
            row += 1;
        }
        if !progress(row, parquet.rows) {
            return Err(DataError::Cancelled);
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

impl TableFiles {
    /// Passes the bytes of items, in the order of their rows, to `make` on all threads, this many at a time. `take` gets the
    /// results, with the number of the first: at least once for each page, and none if none of its rows is wanted.
    pub(super) fn each<T: Clone + Send, E: From<DataError>>(
        &self,
        items: &[Item],
        at_once: usize,
        make: &(impl Fn(&Item, Option<&[u8]>) -> T + Sync),
        take: &mut impl FnMut(usize, Vec<T>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut next = 0;
        for (file, number) in self.files.iter().zip(0u32..) {
            let of_it =
                |item: &&Item| matches!(item.location, ItemLocation::Row(own, _) if own == number);
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
    fn each_of<T: Clone + Send, E: From<DataError>>(
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
        while done < items.len()
            && let Some(page) = pages.next().map_err(wrong)?
        {
            let mut cells = page.cells().map_err(wrong)?;
            loop {
                let mut part = Vec::new();
                for cell in cells.by_ref() {
                    let cell = cell.map_err(wrong)?;
                    let wanted = items.get(done + part.len());
                    if let Some(item) = wanted.filter(
                        |item| matches!(item.location, ItemLocation::Row(_, own) if own == row),
                    ) {
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
                let (first, is_last) = (done, part.len() < at_once);
                done += part.len();
                take(first, made_of(&part, make))?;
                if is_last {
                    break;
                }
            }
        }
        match done == items.len() {
            true => Ok(()),
            false => Err(changed().into()),
        }
    }
}

/// What `make` returns for the bytes of each item. It is called once for cells that repeat an entry of a dictionary,
/// so what it returns must follow from the bytes alone.
pub(super) fn made_of<T: Clone + Send>(
    part: &[(&Item, Option<&[u8]>)],
    make: &(impl Fn(&Item, Option<&[u8]>) -> T + Sync),
) -> Vec<T> {
    let mut known = HashMap::new();
    let (mut distinct, mut places) = (Vec::new(), Vec::with_capacity(part.len()));
    for (item, bytes) in part {
        let place = bytes.map(|bytes| (bytes.as_ptr().addr(), bytes.len()));
        places.push(*known.entry(place).or_insert_with(|| {
            distinct.push((*item, *bytes));
            distinct.len() - 1
        }));
    }
    let made: Vec<T> = distinct
        .par_iter()
        .map(|(item, bytes)| make(item, *bytes))
        .collect();
    match made.len() == part.len() {
        true => made,
        false => places.into_iter().map(|at| made[at].clone()).collect(),
    }
}
