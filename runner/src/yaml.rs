//! YAML text to JSON values with their positions. The only module that uses the YAML parsers.
//!
//! In: text. Out: a [`Document`]: the value (order of keys kept, anchors and merge keys resolved), the line and column
//! of every key and value, and how numbers were written. A mapping or sequence begins where its first child does.
//! Deliberately absent: what the values mean.
//!
//! A recipe is written by hand but may still be hostile: bytes, values (those that anchors repeat included),
//! levels and key lengths are limited, and parsing stops at the first excess.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use retort_checkpoint::regular;
use serde::{Deserialize, Serialize};
use serde_json::Value;

mod reader;
mod scalar;
mod syntax;

pub use syntax::odd_space;

/// Bytes of the largest file that is read: a recipe is written by hand, so anything larger is a mistake.
pub const MAX_BYTES: u64 = 1 << 20;

/// Levels of values inside values.
pub const MAX_DEPTH: usize = 128;

/// Keys and values in a document, repetitions by anchors included; each 64 bytes of a text count as one more.
const MAX_VALUES: usize = 100_000;

/// Bytes of the keys on the way to a value.
const MAX_NAMES: usize = 1000;

/// Mistakes of one document that are kept.
const MAX_PROBLEMS: usize = 100;

/// A place in a text; both count from 1, columns in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

/// Why a file could not be read as text.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// There is no such file.
    #[error("{} does not exist", .0.display())]
    Missing(PathBuf),
    /// A directory, a device.
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    /// Larger than [`MAX_BYTES`].
    #[error("{} is too large for a recipe: more than {} MiB", .0.display(), MAX_BYTES >> 20)]
    TooLarge(PathBuf),
    /// Not UTF-8, from this place on.
    #[error("{} is not UTF-8 text: byte 0x{byte:02x} at line {}, column {}", .path.display(), .position.line, .position.column)]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The first byte that is wrong.
        byte: u8,
        /// Where it is.
        position: Position,
    },
    /// The system refused.
    #[error("{} cannot be read", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// An error in a text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct YamlError {
    /// Where, if known.
    pub position: Option<Position>,
    /// JSON pointer of the value at fault, empty where the text as a whole is.
    pub pointer: String,
    /// What is wrong and what was expected.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// A parsed text.
#[derive(Debug, Clone, Default)]
pub struct Document {
    /// The value.
    pub value: Value,
    /// Errors that leave the rest readable: duplicate keys, values that JSON does not have.
    pub problems: Vec<YamlError>,
    places: BTreeMap<String, Location>,
}

/// Which part of an entry is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPart {
    /// The key; for an item of a sequence the same as the value.
    Key,
    /// The value.
    Value,
}

/// A value's position, and its written form.
#[derive(Debug, Clone, Default)]
struct Location {
    key: Option<Position>,
    value: Option<Position>,
    written: Option<Box<str>>,
}

impl Document {
    /// Where the value at a JSON pointer, or its key, stands in the text. A value that is not in the text is where
    /// its nearest ancestor is.
    pub fn locate(&self, pointer: &str, part: EntryPart) -> Option<Position> {
        if let Some(place) = self.places.get(pointer) {
            return match part {
                EntryPart::Key => place.key.or(place.value),
                EntryPart::Value => place.value.or(place.key),
            };
        }
        let (parent, _) = pointer.rsplit_once('/')?;
        self.locate(parent, EntryPart::Key)
    }

    /// How what is no text was written at a JSON pointer, where that differs from its value: `1.50`, `0x10`, `~`.
    pub fn written(&self, pointer: &str) -> Option<&str> {
        self.places.get(pointer)?.written.as_deref()
    }

    /// Whether the value at a JSON pointer stands in the text.
    pub fn contains(&self, pointer: &str) -> bool {
        self.places.contains_key(pointer)
    }
}

/// Reads a file as text, at most [`MAX_BYTES`].
pub fn read(path: &Path) -> Result<String, ReadError> {
    let io = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => ReadError::Missing(path.to_owned()),
        std::io::ErrorKind::FileTooLarge => ReadError::TooLarge(path.to_owned()),
        _ => ReadError::Io {
            path: path.to_owned(),
            source,
        },
    };
    let metadata = std::fs::metadata(path).map_err(io)?;
    if metadata.is_dir() {
        return Err(ReadError::NotAFile(path.to_owned()));
    }
    let mut bytes = regular::read(path, MAX_BYTES).map_err(io)?;
    // A byte order mark says how the file is encoded; it is no part of the text.
    if bytes.starts_with("\u{feff}".as_bytes()) {
        bytes.drain(..3);
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let bytes = error.into_bytes();
        let before = String::from_utf8_lossy(&bytes[..valid]);
        ReadError::NotUtf8 {
            path: path.to_owned(),
            byte: bytes[valid],
            position: end_of(&before),
        }
    })
}

/// Parses a text that holds one document. Problems that leave the rest readable are in the document.
pub fn parse(text: &str) -> Result<Document, YamlError> {
    if let Some(error) = syntax::forbidden(text) {
        return Err(error);
    }
    let document = reader::read(text)?;
    // Nothing but comments is null to YAML, but not to people.
    if document.value.is_null() && lines(text).all(is_blank) {
        return Err(YamlError {
            position: None,
            pointer: String::new(),
            message: "the file is empty".to_owned(),
            hint: Some("a recipe has at least `version: 1` and `stages:`".to_owned()),
        });
    }
    Ok(document)
}

/// The lines of a text as YAML counts them: LF, CR LF or CR ends one.
pub fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let Some(end) = text.find(['\n', '\r']) else {
            rest = None;
            return (!text.is_empty()).then_some(text);
        };
        let ending = if text[end..].starts_with("\r\n") {
            2
        } else {
            1
        };
        rest = Some(&text[end + ending..]);
        Some(&text[..end])
    })
}

fn is_blank(line: &str) -> bool {
    matches!(line.trim(), "" | "---" | "...") || line.trim().starts_with('#')
}

/// Position behind the last character of a text.
pub fn end_of(text: &str) -> Position {
    let ends_line = text.ends_with(['\n', '\r']);
    let last = lines(text).last().unwrap_or_default();
    Position {
        line: lines(text).count() + usize::from(ends_line || text.is_empty()),
        column: if ends_line {
            1
        } else {
            last.chars().count() + 1
        },
    }
}

/// A step of a JSON pointer.
pub fn escape(step: &str) -> String {
    step.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(text: &str, expected: Value) -> Document {
        let document = parse(text).unwrap();
        assert_eq!(document.value, expected, "{text}");
        assert_eq!(
            document.value.to_string(),
            expected.to_string(),
            "order of keys"
        );
        document
    }

    #[test]
    fn values_keep_their_order_and_types() {
        check(
            "b: 1\na: [x, 2.5, true, null, ~, '3', 1e-3]\nempty:\n2: two\n",
            json!({"b": 1, "a": ["x", 2.5, true, null, null, "3", 1e-3], "empty": null, "2": "two"}),
        );
    }

    #[test]
    fn anchors_and_merge_keys_are_resolved() {
        let document = check(
            "base: &b {x: 1, y: {z: 2}}\nuse:\n  <<: *b\n  x: 3\nboth:\n  <<: [{p: 1}, *b]\n",
            json!({"base": {"x": 1, "y": {"z": 2}}, "use": {"x": 3, "y": {"z": 2}}, "both": {"p": 1, "x": 1, "y": {"z": 2}}}),
        );
        // What is merged stands where the anchor does.
        assert_eq!(
            document.locate("/use/y/z", EntryPart::Value),
            Some(Position {
                line: 1,
                column: 24
            })
        );
    }

    #[test]
    fn places_are_those_of_the_text() {
        let document = parse(
            "version: 1\nstages:\n  a:\n    kind: x\n    list: [1, {k: 2}]\n  é: {w: ü, v: 3}\n",
        )
        .unwrap();
        let check = |pointer: &str, part, line, column| {
            assert_eq!(
                document.locate(pointer, part),
                Some(Position { line, column }),
                "{pointer}"
            );
        };
        check("/version", EntryPart::Key, 1, 1);
        check("/version", EntryPart::Value, 1, 10);
        check("/stages/a", EntryPart::Key, 3, 3);
        check("/stages/a", EntryPart::Value, 4, 5);
        check("/stages/a/list/1/k", EntryPart::Key, 5, 16);
        check("/stages/a/list/1/k", EntryPart::Value, 5, 19);
        check("/stages/é/v", EntryPart::Value, 6, 16);
        check("/stages/a/absent", EntryPart::Value, 3, 3);
    }

    #[test]
    fn problems_that_leave_the_rest_readable() {
        let check = |text: &str, line: usize, column: usize, part: &str| {
            let document = parse(text).unwrap();
            let [problem] = document.problems.as_slice() else {
                panic!("{text}: {:?}", document.problems)
            };
            assert_eq!(problem.position, Some(Position { line, column }), "{text}");
            assert!(
                problem.message.contains(part),
                "{text}: {}",
                problem.message
            );
        };
        check(
            "a: 1\nb: 2\na: 3\n",
            3,
            1,
            "`a` is here twice (first on line 1)",
        );
        check(
            "stages:\n  s: {x: 1}\n  s: {y: 1}\n",
            3,
            3,
            "a second stage `s`",
        );
        check("a: .inf\n", 1, 4, "inf");
        check("a: 1\n<<: 3\n", 2, 5, "merges a mapping");
    }

    #[test]
    fn syntax_errors_are_explained() {
        let check = |text: &str, position: Option<(usize, usize)>, part: &str| {
            let error = parse(text).unwrap_err();
            let position = position.map(|(line, column)| Position { line, column });
            assert_eq!(error.position, position, "{text:?}: {}", error.message);
            let said = format!("{} / {}", error.message, error.hint.unwrap_or_default());
            assert!(said.contains(part), "{text:?}: {said}");
        };
        check("", None, "empty");
        check("# only a comment\n", None, "empty");
        check("a:\n\tb: 1\n", Some((2, 1)), "spaces");
        check("a:\n  b: 1\n\tc: 1\n", Some((3, 1)), "spaces");
        check("a: b: c\n", Some((1, 5)), "quotes");
        check("a: [1, 2\n", Some((2, 1)), "");
        check("a: {b: ${x.y}}\n", Some((1, 8)), "needs quotes");
        check("a: [c/${x.y}]\n", Some((1, 7)), "needs quotes");
        check("a: {b: $ {x}}\n", Some((1, 10)), "closing bracket");
        check("a: 1\n---\nb: 2\n", Some((2, 1)), "one document");
        check("a: !x 1\n", Some((1, 4)), "tag");
        check("a: \u{0}\n", Some((1, 4)), "control");
        check("a: *nowhere\n", Some((1, 4)), "anchor");
    }

    #[test]
    fn files_that_are_no_recipes_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let check = |name: &str, bytes: Option<&[u8]>, part: &str| {
            let path = directory.path().join(name);
            if let Some(bytes) = bytes {
                std::fs::write(&path, bytes).unwrap();
            }
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        check("absent", None, "does not exist");
        check("", None, "not a file");
        check("latin", Some(b"a: 1\nb: \xfc"), "0xfc at line 2, column 4");
        let large = std::fs::File::create(directory.path().join("large")).unwrap();
        large.set_len(100 << 20).unwrap();
        check("large", None, "too large");
    }
}
