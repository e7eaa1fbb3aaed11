//! Tables that list the image files of a data set with their classes or captions: `metadata.jsonl`, `metadata.csv`, CSV and
//! TSV of paths.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Component, Path};
use std::sync::Arc;

use retort_checkpoint::images::promises_image;
use retort_checkpoint::json;
use serde_json::Value;

use super::error::{DataError, shown};
use super::{class, file};

/// A row: a file within a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Path from the folder on.
    pub file: Box<str>,
    /// Its class as written, shared by all rows of the class.
    pub label: Option<Arc<str>>,
    /// What it shows.
    pub caption: Option<Box<str>>,
    /// Line in the table.
    pub line: u64,
}

const FILE: [&str; 6] = [
    "file_name",
    "filename",
    "file",
    "path",
    "image",
    "image_path",
];
pub(super) const LABEL: [&str; 5] = ["label", "class", "category", "labels", "class_name"];
pub(super) const CAPTION: [&str; 4] = ["caption", "text", "prompt", "description"];

/// The longest line that is read.
const LONGEST_LINE: u64 = 1 << 20;

/// The longest path that is read: the limit of common systems.
pub(super) const LONGEST_PATH: usize = 4096;

/// Memory for the names and captions of a source: with temporary data the source stays below half a gigabyte.
const ROOM: usize = 352 << 20;

/// Additional memory for temporary data while rows are read, on top of what the rows leave of their budget.
const BESIDE: usize = 96 << 20;

/// Bytes per file in addition to its texts: the row, and the item made from it.
const EACH: usize = 144;

/// The memory used for a source's files, and its limit.
#[derive(Debug)]
pub struct MemoryBudget {
    room: usize,
    rows: usize,
    labels: HashSet<Arc<str>>,
}

impl Default for MemoryBudget {
    fn default() -> Self {
        Self {
            room: ROOM,
            rows: 0,
            labels: HashSet::new(),
        }
    }
}

impl MemoryBudget {
    /// Accounts for a row.
    ///
    /// # Errors
    /// The budget is exhausted, in words.
    pub fn add(&mut self, row: &Row) -> Result<(), String> {
        self.take(row.caption.as_deref().map_or(0, cost))?;
        self.file(&row.file)
    }

    /// Accounts for a file with this name.
    ///
    /// # Errors
    /// As of [`MemoryBudget::add`].
    pub fn file(&mut self, name: &str) -> Result<(), String> {
        self.take(EACH + cost(name))?;
        self.rows += 1;
        Ok(())
    }

    /// Bytes available for temporary data while rows are read.
    pub fn beside(&self) -> u64 {
        (self.room + BESIDE) as u64
    }

    /// Accounts for some bytes.
    ///
    /// # Errors
    /// As of [`MemoryBudget::add`].
    pub fn take(&mut self, bytes: usize) -> Result<(), String> {
        self.room = self.room.checked_sub(bytes).ok_or_else(|| {
            format!(
                "the names and captions of its files take more than {} MiB of memory ({} files until then): make less of \
                 it, or shorten paths and captions",
                ROOM >> 20,
                self.rows
            )
        })?;
        Ok(())
    }

    /// A class as written, stored once.
    ///
    /// # Errors
    /// As of [`MemoryBudget::add`].
    pub fn label(&mut self, text: &str) -> Result<Arc<str>, String> {
        if let Some(known) = self.labels.get(text) {
            return Ok(Arc::clone(known));
        }
        class::within(self.labels.len() + 1)?;
        self.take(2 * cost(text))?;
        let label: Arc<str> = text.into();
        self.labels.insert(Arc::clone(&label));
        Ok(label)
    }
}

/// Bytes of a text, including the allocator's overhead.
pub fn cost(text: &str) -> usize {
    (text.len() + 8).next_multiple_of(16).max(32)
}

/// Reads a table whose paths start from `folder`.
pub fn read(path: &Path, folder: &Path) -> Result<Vec<Row>, DataError> {
    let ending = path
        .extension()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    let mut rows = match ending.as_str() {
        "jsonl" | "ndjson" => read_json_lines(path)?,
        "json" => {
            let message = "a table in JSON; expected one object a line (`.jsonl`), CSV or TSV";
            return Err(DataError::content(path, message));
        }
        _ => read_columns(path, ending == "tsv" || ending == "tab")?,
    };
    if rows.is_empty() {
        return Err(DataError::Empty {
            path: path.to_owned(),
            expected: "rows that name image files",
            found: "none".into(),
        });
    }
    let labelled = rows.iter().filter(|row| row.label.is_some()).count();
    if labelled > 0 && labelled < rows.len() {
        let bare = rows
            .iter()
            .find(|row| row.label.is_none())
            .map_or(0, |row| row.line);
        let message = format!(
            "line {bare} has no class, though {labelled} of {} rows have one",
            rows.len()
        );
        return Err(DataError::content(path, message));
    }
    for row in &mut rows {
        if row.file.len() > LONGEST_PATH {
            let message = format!(
                "line {}: a path of {} bytes, `{}` (a quotation mark that is never closed?)",
                row.line,
                row.file.len(),
                shown(&row.file)
            );
            return Err(DataError::content(path, message));
        }
        let file = within(&row.file, folder).ok_or_else(|| {
            let message = format!(
                "line {}: {:?} does not lie in {}; paths start there, and what lies elsewhere is not part of the data",
                row.line,
                row.file,
                folder.display()
            );
            DataError::content(path, message)
        })?;
        row.file = file.into();
    }
    let mut names: Vec<(&str, u64)> = rows.iter().map(|row| (&*row.file, row.line)).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let message = format!(
            "lines {} and {} both name {:?}",
            twice[0].1, twice[1].1, twice[0].0
        );
        return Err(DataError::content(path, message));
    }
    Ok(rows)
}

/// The path relative to a folder, if it stays inside.
fn within(file: &str, folder: &Path) -> Option<String> {
    let path = Path::new(file);
    let path = match path.is_absolute() {
        true => path.strip_prefix(folder).ok()?,
        false => path,
    };
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

fn open(path: &Path) -> Result<BufReader<File>, DataError> {
    let mut reader = BufReader::new(file::open(path, "a table")?);
    let start = reader
        .fill_buf()
        .map_err(|e| DataError::read(path, "file", e))?;
    if !start.contains(&b'\n') && start.windows(2).any(|two| two[0] == b'\r') {
        let message = "lines that end in CR alone, as on old Macs; expected LF or CR LF: `tr '\\r' '\\n' < OLD > NEW` \
                       converts them";
        return Err(DataError::content(path, message));
    }
    if start.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    Ok(reader)
}

fn read_json_lines(path: &Path) -> Result<Vec<Row>, DataError> {
    let mut reader = open(path)?;
    let (mut rows, mut bytes, mut line) = (Vec::new(), Vec::new(), 0);
    let mut held = MemoryBudget::default();
    loop {
        bytes.clear();
        let read = (&mut reader)
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut bytes);
        if read.map_err(|e| DataError::read(path, "file", e))? == 0 {
            return Ok(rows);
        }
        line += 1;
        let fault =
            |message: String| Err(DataError::content(path, format!("line {line}: {message}")));
        if bytes.len() as u64 == LONGEST_LINE && bytes.last() != Some(&b'\n') {
            return fault(format!("longer than {LONGEST_LINE} bytes"));
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let value: Value = match json::parse(&bytes) {
            Ok(value) => value,
            Err(error) => return fault(format!("expected a JSON object: {error}")),
        };
        let read = |names: &[&str]| {
            text(&value, names)
                .map_err(|message| DataError::content(path, format!("line {line}: {message}")))
        };
        let Some(file) = read(&FILE)? else {
            return fault("no `file_name`".into());
        };
        let full = |message| DataError::content(path, message);
        let label = read(&LABEL)?.map(|label| held.label(&label));
        let row = Row {
            file: file.into(),
            label: label.transpose().map_err(full)?,
            caption: read(&CAPTION)?.map(Into::into),
            line,
        };
        held.add(&row).map_err(full)?;
        rows.push(row);
    }
}

/// The text, or the number as text, of the first of these names that an object has.
///
/// # Errors
/// The value is something else.
pub(super) fn text(object: &Value, names: &[&str]) -> Result<Option<String>, String> {
    let Some((name, value)) = names
        .iter()
        .find_map(|name| Some((name, object.get(name)?)))
    else {
        return Ok(None);
    };
    let found = match value {
        Value::String(text) => return Ok(Some(text.clone())),
        Value::Number(number) => return Ok(Some(number.to_string())),
        Value::Null => return Ok(None),
        Value::Bool(value) => {
            return Err(format!("`{name}` is {value}: expected a text or a number"));
        }
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Err(format!("`{name}` is {found}: expected a text or a number"))
}

/// Ends every table: a CSV reader takes the end of a file for the end of a quotation.
const END: &str = "\u{3}end of table\u{3}";

fn read_columns(path: &Path, tabs: bool) -> Result<Vec<Row>, DataError> {
    let mut reader = open(path)?;
    let start = reader
        .fill_buf()
        .map_err(|e| DataError::read(path, "file", e))?;
    let first = start
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let tabs = tabs || (first.contains(&b'\t') && !first.contains(&b','));
    let (records, next) = file::records(reader, LONGEST_LINE);
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        // The CR of CR LF is trimmed, so lines are counted correctly.
        .terminator(csv::Terminator::Any(b'\n'))
        .delimiter(if tabs { b'\t' } else { b',' })
        .from_reader(records.chain(b"\n".as_slice()).chain(END.as_bytes()));
    let (mut rows, mut columns, mut held) = (Vec::new(), None, MemoryBudget::default());
    let mut record = csv::StringRecord::new();
    loop {
        next.begin();
        let begins = reader.position().line();
        let more = reader.read_record(&mut record);
        let line = record.position().map_or(0, csv::Position::line);
        let fault = |error: csv::Error| match next.is_over() {
            true => format!("line {begins}: {}", next.too_long()),
            false => error.to_string(),
        };
        if !more.map_err(|error| DataError::content(path, fault(error)))? {
            return Ok(rows);
        }
        if record.iter().all(str::is_empty) {
            continue;
        }
        match (record.len(), record.iter().next_back()) {
            (1, Some(END)) => return Ok(rows),
            (_, Some(last)) if last.ends_with(END) => {
                let message = format!(
                    "line {line}: a quotation mark that is never closed: all rows after it belong to one cell"
                );
                return Err(DataError::content(path, message));
            }
            _ => {}
        }
        if columns.is_none()
            && record.len() == 1
            && let Some(found) = other_separator(&record[0], tabs)
        {
            let expected = if tabs { "tabs" } else { "commas or tabs" };
            let message = format!(
                "line {line}: expected cells separated by {expected}, found {found}: `{}`",
                shown(&record[0])
            );
            return Err(DataError::content(path, message));
        }
        let place = |names: &[&str]| {
            column(&record, names, line).map_err(|message| DataError::content(path, message))
        };
        let (file, label, caption) = match columns {
            Some(columns) => columns,
            None => match place(&FILE)? {
                Some(file) => {
                    columns = Some((file, place(&LABEL)?, place(&CAPTION)?));
                    continue;
                }
                // No names: path and class.
                None if record.len() <= 2 => {
                    *columns.insert((0, (record.len() == 2).then_some(1), None))
                }
                None => {
                    let found: Vec<&str> = record.iter().take(8).collect();
                    let message = format!(
                        "line {line}: expected a column named `file_name` (and `label` or `caption`), found {found:?}"
                    );
                    return Err(DataError::content(path, message));
                }
            },
        };
        let cell = |column: usize| record.get(column).filter(|cell| !cell.is_empty());
        let Some(file) = cell(file) else {
            return Err(DataError::Cell {
                path: path.to_owned(),
                line,
                column: file + 1,
                expected: "the path of an image".into(),
                found: "nothing".into(),
            });
        };
        let full = |message| DataError::content(path, message);
        let label = label.and_then(cell).map(|label| held.label(label));
        let row = Row {
            file: file.into(),
            label: label.transpose().map_err(full)?,
            caption: caption.and_then(cell).map(Into::into),
            line,
        };
        held.add(&row).map_err(full)?;
        rows.push(row);
    }
}

/// The separator of a line's cells, if it is another than the expected one: then the line is a single cell, which begins with a
/// path or holds the name of a column. A line that ends with a path is a path as a whole.
fn other_separator(line: &str, tabs: bool) -> Option<&'static str> {
    let own = if tabs { b'\t' } else { b',' };
    let is_table = |separator: u8| {
        let cells: Vec<&str> = line
            .split(char::from(separator))
            .map(|cell| cell.trim().trim_matches('"'))
            .collect();
        let is_name = |cell: &&str| FILE.iter().any(|name| cell.eq_ignore_ascii_case(name));
        let is_path = cells[1..].iter().any(|cell| promises_image(cell));
        cells.len() > 1 && !is_path && (promises_image(cells[0]) || cells.iter().any(is_name))
    };
    file::other_separator(own, is_table)
}

/// The column with the first of these names that there is.
fn column(record: &csv::StringRecord, names: &[&str], line: u64) -> Result<Option<usize>, String> {
    for name in names {
        let bears = |cell: &str| cell.eq_ignore_ascii_case(name);
        let mut bearing = record.iter().enumerate().filter(|(_, cell)| bears(cell));
        match (bearing.next(), bearing.next()) {
            (Some((one, _)), Some((other, _))) => {
                return Err(format!(
                    "line {line}: columns {} and {} are both called `{name}`; remove or rename one",
                    one + 1,
                    other + 1
                ));
            }
            (Some((column, _)), None) => return Ok(Some(column)),
            (None, _) => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(name: &str, text: &str) -> Result<Vec<Row>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let shown = format!("{}/", dir.path().display());
        read(&path, dir.path()).map_err(|error| error.to_string().replace(&shown, ""))
    }

    fn row(file: &str, label: Option<&str>, caption: Option<&str>, line: u64) -> Row {
        Row {
            file: file.into(),
            label: label.map(Into::into),
            caption: caption.map(Into::into),
            line,
        }
    }

    #[test]
    fn tables_are_read_in_all_their_forms() {
        let wanted = [
            row("a.png", Some("cat"), None, 2),
            row("b/c.png", Some("dog"), None, 3),
        ];
        let forms = [
            ("m.csv", "file_name,label\na.png,cat\n./b/c.png,dog\n"),
            (
                "m.tsv",
                "\u{feff}Label\tpath\r\ncat\ta.png\r\ndog\tb/c.png\r\n",
            ),
            ("m.csv", "id,class,image\n0,cat,a.png\n1,dog,b/c.png\n"),
        ];
        for (name, text) in forms {
            assert_eq!(rows(name, text).unwrap(), wanted, "{text}");
        }
        assert_eq!(
            rows("l.txt", "a.png\t3\n").unwrap(),
            [row("a.png", Some("3"), None, 1)]
        );
        assert_eq!(
            rows("l.csv", "a.png\n").unwrap(),
            [row("a.png", None, None, 1)]
        );
        // A path may hold what separates cells elsewhere.
        for path in ["a;b|c.png", "file;1.png"] {
            assert_eq!(
                rows("l.csv", &format!("{path}\n")).unwrap(),
                [row(path, None, None, 1)]
            );
        }
        // Line breaks in quotation marks, and a last line that none ends.
        assert_eq!(
            rows("q.csv", "file,text\na.png,\"a \"\"b\"\"\nc\"\nb.png,\"x\"").unwrap(),
            [
                row("a.png", None, Some("a \"b\"\nc"), 2),
                row("b.png", None, Some("x"), 4)
            ]
        );
        let lines = "{\"file_name\": \"a.png\", \"label\": 3}\n\n{\"file_name\": \"b.png\", \"label\": 1, \"text\": \"x, y\"}\n";
        let wanted = [
            row("a.png", Some("3"), None, 1),
            row("b.png", Some("1"), Some("x, y"), 3),
        ];
        assert_eq!(rows("m.jsonl", lines).unwrap(), wanted);
    }

    #[test]
    fn the_first_of_several_names_counts() {
        let wanted = [row("a.png", Some("cat"), Some("a cat"), 2)];
        let text = "text,path,class,caption,label,file_name\nno,no,no,a cat,cat,a.png\n";
        assert_eq!(rows("m.csv", text).unwrap(), wanted);
        let line = r#"{"text": "no", "path": "no", "class": 1, "caption": "a cat", "label": "cat", "file_name": "a.png"}"#;
        assert_eq!(rows("m.jsonl", &format!("\n{line}")).unwrap(), wanted);
    }

    #[test]
    fn what_is_held_of_files_has_a_bound() {
        let mut held = MemoryBudget {
            room: 1000,
            ..MemoryBudget::default()
        };
        let file = row(
            "a/long/path/of/an/image.png",
            Some("cat"),
            Some("a caption"),
            1,
        );
        let mut count = 0;
        let said = loop {
            // A class is stored once, however many files it has.
            held.label("cat").unwrap();
            if let Err(said) = held.add(&file) {
                break said;
            }
            count += 1;
        };
        assert_eq!(count, 4);
        assert!(
            said.contains("more than 352 MiB of memory (4 files until then)"),
            "{said}"
        );
        assert!(held.label(&"x".repeat(1000)).is_err());
        let mut held = MemoryBudget::default();
        let said = (0..).find_map(|class| held.label(&class.to_string()).err());
        assert!(said.unwrap().contains("more than 262144 classes"));
        assert!(size_of::<Row>() <= 56);
    }

    #[test]
    fn faults_of_tables_are_named() {
        for (name, text, expected) in [
            (
                "m.csv",
                "",
                "m.csv: expected rows that name image files, found none",
            ),
            (
                "m.csv",
                "a,b,c\n",
                "m.csv: line 1: expected a column named `file_name`",
            ),
            (
                "m.csv",
                "file,label\na.png,1\n,2\n",
                "m.csv:3: column 1: expected the path of an image",
            ),
            (
                "m.csv",
                "file,label\na.png,1\nb.png,\n",
                "m.csv: line 3 has no class, though 1 of 2 rows have one",
            ),
            (
                "m.csv",
                "a.png,1\n../b.png,2\n",
                "m.csv: line 2: \"../b.png\" does not lie in",
            ),
            (
                "m.csv",
                "/etc/passwd,1\n",
                "m.csv: line 1: \"/etc/passwd\" does not lie in",
            ),
            (
                "m.csv",
                "a.png,1\n./a.png,2\n",
                "m.csv: lines 1 and 2 both name \"a.png\"",
            ),
            (
                "m.jsonl",
                "{\"label\": 1}\n",
                "m.jsonl: line 1: no `file_name`",
            ),
            (
                "m.jsonl",
                "{\"file_name\": \"a.png\", \"label\": {\"id\": 3}}\n",
                "m.jsonl: line 1: `label` is an object: expected a text or a number",
            ),
            (
                "m.jsonl",
                "{\"file_name\": \"a.png\", \"caption\": [\"one\", \"two\"]}\n",
                "m.jsonl: line 1: `caption` is a list: expected a text or a number",
            ),
            (
                "m.csv",
                &format!("file,label\n\"a.png,1\n{}\",3\n", "b.png,2\n".repeat(1000)),
                "m.csv: line 2: a path of ",
            ),
            (
                "m.csv",
                "file,text\na.png,\"a cat\nb.png,a dog\nc.png,a cow\n",
                "m.csv: line 2: a quotation mark that is never closed",
            ),
            (
                "m.tsv",
                "file\ttext\na.png\tx\nb.png\t\"",
                "m.tsv: line 3: a quotation mark that is never closed",
            ),
            (
                "m.jsonl",
                "nonsense\n",
                "m.jsonl: line 1: expected a JSON object",
            ),
            (
                "m.csv",
                "file_name,label,FILE_NAME\na.png,1,b.png\n",
                "m.csv: line 1: columns 1 and 3 are both called `file_name`; remove or rename one",
            ),
            (
                "m.tsv",
                "path\tclass\tclass\na.png\t1\t2\n",
                "m.tsv: line 1: columns 2 and 3 are both called `class`",
            ),
            (
                "m.csv",
                "text,path,text\nx,a.png,y\n",
                "m.csv: line 1: columns 1 and 3 are both called `text`",
            ),
            (
                "m.jsonl",
                "{\"file_name\": \"a.png\"}\n{\"file_name\": \"a.png\", \"file_name\": \"b.png\"}\n",
                "m.jsonl: line 2: expected a JSON object: \"file_name\" comes twice in an object; keep one",
            ),
            ("m.json", "[]", "m.json: a table in JSON"),
            (
                "m.csv",
                "\"file_name\";\"label\"\na.png;cat\n",
                "m.csv: line 1: expected cells separated by commas or tabs, found semicolons: `file_name;",
            ),
            (
                "m.csv",
                "a.png|cat\nb.png|dog\n",
                "m.csv: line 1: expected cells separated by commas or tabs, found vertical bars: `a.png|cat`",
            ),
            (
                "m.tsv",
                "file_name,label\na.png,cat\n",
                "m.tsv: line 1: expected cells separated by tabs, found commas: `file_name,label`",
            ),
            (
                "m.csv",
                "file_name,label\ra.png,cat\r",
                "m.csv: lines that end in CR alone, as on old Macs; expected LF or CR LF",
            ),
            (
                "m.jsonl",
                "{\"file_name\": \"a.png\"}\r{\"file_name\": \"b.png\"}\r",
                "m.jsonl: lines that end in CR alone",
            ),
        ] {
            let error = rows(name, text).unwrap_err();
            assert!(error.starts_with(expected), "{text:?}: {error}");
            assert!(error.len() < 500 && !error.contains('\n'), "{error}");
        }
    }
}
