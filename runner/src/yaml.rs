//! YAML text to JSON values, every one with its place. The only module that knows serde_yaml.
//!
//! In: text. Out: a [`Document`]: the value (order of keys kept, anchors and merge keys resolved) and the line and
//! column of every key and value. Deliberately absent: what the values mean.
//!
//! serde_yaml tells places only in errors. So every scalar is read by a visitor that keeps the scalar and then fails
//! on purpose: the error has the place, the parser has moved on behind the scalar, and reading continues. One pass
//! gives all places. A mapping or sequence begins where its first child does.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::path::{Path, PathBuf};

use retort_checkpoint::regular;
use serde::de::{self, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::diagnostic::Position;

/// Bytes of the largest file that is read: a recipe is written by hand, so anything larger is a mistake.
pub const MAX_BYTES: u64 = 16 << 20;

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

/// What is wrong with a text.
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
    /// What is wrong without making the rest unreadable: duplicate keys, values that JSON does not have.
    pub problems: Vec<YamlError>,
    places: BTreeMap<String, Place>,
}

/// Which part of an entry is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The key; for an item of a sequence the same as the value.
    Key,
    /// The value.
    Value,
}

#[derive(Debug, Clone, Copy, Default)]
struct Place {
    key: Option<Position>,
    value: Option<Position>,
}

impl Document {
    /// Where the value at a JSON pointer, or its key, stands in the text. A value that is not in the text is where
    /// its nearest ancestor is.
    pub fn locate(&self, pointer: &str, part: Part) -> Option<Position> {
        if let Some(place) = self.places.get(pointer) {
            return match part {
                Part::Key => place.key.or(place.value),
                Part::Value => place.value.or(place.key),
            };
        }
        let (parent, _) = pointer.rsplit_once('/')?;
        self.locate(parent, Part::Key)
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
    let bytes = regular::read(path, MAX_BYTES).map_err(io)?;
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
    let mut reader = Reader::default();
    let seed = Node {
        reader: &mut reader,
    };
    match seed.deserialize(serde_yaml::Deserializer::from_str(text)) {
        // Nothing but comments is null to serde_yaml, but not to people.
        Ok(Value::Null) if text.lines().all(is_blank) => Err(YamlError {
            position: None,
            pointer: String::new(),
            message: "the file is empty".to_owned(),
            hint: Some("a recipe has at least `version: 1` and `stages:`".to_owned()),
        }),
        Ok(value) => Ok(Document {
            value,
            problems: reader.problems,
            places: reader.places,
        }),
        Err(error) => Err(explain(text, &error)),
    }
}

fn is_blank(line: &str) -> bool {
    matches!(line.trim(), "" | "---" | "...") || line.trim().starts_with('#')
}

/// Position behind the last character of a text.
fn end_of(text: &str) -> Position {
    let line = text.matches('\n').count() + 1;
    let column = text.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    Position { line, column }
}

/// Says in words of people what libyaml says in its own.
fn explain(text: &str, error: &serde_yaml::Error) -> YamlError {
    let full = error.to_string();
    let mut position = error.location().map(|location| Position {
        line: location.line(),
        column: location.column(),
    });
    // "problem at line 3 column 1, context at line 2 column 5": the first place is the error's own.
    let mut message = match full.split_once(" at line ") {
        Some((problem, rest)) => match rest.split_once(", ") {
            Some((_, context)) => format!("{problem}, {context}"),
            None => problem.to_owned(),
        },
        None => full.clone(),
    };
    let mut hint = None;
    let line_of = |position: Option<Position>| {
        position
            .and_then(|position| text.lines().nth(position.line - 1))
            .unwrap_or_default()
    };
    let indentation_has_tab = |line: &str| {
        line.chars()
            .take_while(|c| c.is_whitespace())
            .any(|c| c == '\t')
    };
    if let Some(at) =
        text.find(|c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{85}'))
    {
        message = "a control character cannot be in YAML".to_owned();
        hint = Some("remove it; is this a text file?".to_owned());
        position = Some(end_of(&text[..at]));
    } else if let Some(number) = tab_indented_line(text, position, indentation_has_tab) {
        message = "a tab cannot indent YAML".to_owned();
        hint = Some("indent with spaces".to_owned());
        let column = text
            .lines()
            .nth(number)
            .and_then(|line| line.chars().position(|c| c == '\t'))
            .unwrap_or(0);
        position = Some(Position {
            line: number + 1,
            column: column + 1,
        });
    } else if full.contains("more than one document") {
        message = "more than one YAML document in the file".to_owned();
        hint = Some("remove the `---` lines; a recipe is one document".to_owned());
        position = text
            .lines()
            .enumerate()
            .skip(1)
            .find(|(_, line)| line.trim_end() == "---")
            .map(|(number, _)| Position {
                line: number + 1,
                column: 1,
            });
    } else if full.contains("mapping values are not allowed") {
        message = "`:` is not expected here".to_owned();
        hint = Some(
            "a text with `: ` in it needs quotes; or the line before lacks its `:`; or the indentation is off"
                .to_owned(),
        );
    } else if full.contains("flow mapping") || full.contains("flow sequence") {
        hint = Some("a `,` or a closing bracket is missing, here or on a line before".to_owned());
    } else if full.contains("did not find expected key")
        || full.contains("did not find expected '-'")
    {
        hint = Some("the indentation does not match the lines above".to_owned());
    } else if full.contains("could not find expected ':'") {
        message = "a `key: value` is expected here".to_owned();
        hint = Some("is there a `:` missing on this line or the one before?".to_owned());
    } else if full.contains("recursion limit") {
        message = "nested too deeply".to_owned();
    } else if full.contains("repetition limit") {
        message = "the anchors expand to too much".to_owned();
    } else if line_of(position).trim_start().starts_with(['@', '`', '%']) {
        hint = Some("a text that begins with this character needs quotes".to_owned());
    }
    YamlError {
        position,
        pointer: String::new(),
        message,
        hint,
    }
}

/// Index of the line whose indentation has a tab, if that is what the error at `position` is about: that line, or the
/// nearest before it, since libyaml sometimes notices late.
fn tab_indented_line(
    text: &str,
    position: Option<Position>,
    has_tab: impl Fn(&str) -> bool,
) -> Option<usize> {
    let at = position?.line;
    let lines: Vec<&str> = text.lines().take(at).collect();
    let first = lines.len().saturating_sub(2);
    (first..lines.len())
        .rev()
        .find(|&number| has_tab(lines[number]))
}

/// What is gathered while reading.
#[derive(Default)]
struct Reader {
    pointer: String,
    places: BTreeMap<String, Place>,
    problems: Vec<YamlError>,
}

impl Reader {
    fn problem(&mut self, position: Option<Position>, message: String, hint: &str) {
        let pointer = self.pointer.clone();
        self.problems.push(YamlError {
            position,
            pointer,
            message,
            hint: Some(hint.to_owned()),
        });
    }

    /// Runs `read` with the pointer extended by one step.
    fn inside<T>(&mut self, step: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        let length = self.pointer.len();
        self.pointer.push('/');
        self.pointer.push_str(&escape(step));
        let result = read(self);
        self.pointer.truncate(length);
        result
    }

    /// Notes where the current value begins, unless that is known.
    fn begins(&mut self, position: Option<Position>) {
        let place = self.places.entry(self.pointer.clone()).or_default();
        place.value = place.value.or(position);
    }

    /// Takes over what merge keys bring: entries that are not written out.
    fn merge(&mut self, target: &mut Map<String, Value>, merged: Value, source: &str) {
        match merged {
            Value::Object(entries) => {
                for (key, value) in entries {
                    if target.contains_key(&key) {
                        continue;
                    }
                    let from = format!("{source}/{}", escape(&key));
                    let to = format!("{}/{}", self.pointer, escape(&key));
                    let below = format!("{from}/");
                    let copies: Vec<(String, Place)> = self
                        .places
                        .range(from.clone()..)
                        .take_while(|(pointer, _)| pointer.starts_with(&from))
                        .filter(|(pointer, _)| **pointer == from || pointer.starts_with(&below))
                        .map(|(pointer, place)| (format!("{to}{}", &pointer[from.len()..]), *place))
                        .collect();
                    self.places.extend(copies);
                    target.insert(key, value);
                }
            }
            Value::Array(items) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.merge(target, item, &format!("{source}/{index}"));
                }
            }
            _ => {
                let position = self.places.get(source).and_then(|place| place.value);
                self.problem(
                    position,
                    "`<<` merges a mapping".to_owned(),
                    "write `<<: *anchor` of a mapping",
                );
            }
        }
    }
}

/// A step of a JSON pointer.
pub fn escape(step: &str) -> String {
    step.replace('~', "~0").replace('/', "~1")
}

/// Reads one value.
struct Node<'a> {
    reader: &'a mut Reader,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let mut scalar = None;
        let result = deserializer.deserialize_any(NodeVisitor {
            reader: self.reader,
            scalar: &mut scalar,
        });
        match (result, scalar) {
            (Err(error), Some(scalar)) => {
                let position = place_in(&error);
                self.reader.begins(position);
                Ok(scalar.unwrap_or_else(|unusable: Unusable| {
                    self.reader
                        .problem(position, unusable.message, unusable.hint);
                    Value::Null
                }))
            }
            (result, _) => result,
        }
    }
}

/// A scalar that JSON does not have.
struct Unusable {
    message: String,
    hint: &'static str,
}

/// The place in the text of a serde_yaml error behind the generic error type. Without a place it is the beginning.
fn place_in(error: &impl fmt::Display) -> Option<Position> {
    let text = error.to_string();
    let Some((_, place)) = text.rsplit_once(" at line ") else {
        return Some(Position { line: 1, column: 1 });
    };
    let (line, column) = place.split_once(" column ")?;
    Some(Position {
        line: line.parse().ok()?,
        column: column.parse().ok()?,
    })
}

struct NodeVisitor<'a> {
    reader: &'a mut Reader,
    scalar: &'a mut Option<Result<Value, Unusable>>,
}

impl NodeVisitor<'_> {
    /// Keeps a scalar and fails, for the place in the error.
    fn keep<E: de::Error>(self, value: impl Into<Value>) -> Result<Value, E> {
        *self.scalar = Some(Ok(value.into()));
        Err(E::custom("here"))
    }

    fn refuse<E: de::Error>(self, message: String, hint: &'static str) -> Result<Value, E> {
        *self.scalar = Some(Err(Unusable { message, hint }));
        Err(E::custom("here"))
    }
}

impl<'de> Visitor<'de> for NodeVisitor<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        self.keep(value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        self.keep(value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        self.keep(value)
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Value, E> {
        self.refuse(
            format!("{value} is too large"),
            "whole numbers fit into 64 bits",
        )
    }

    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Value, E> {
        self.refuse(
            format!("{value} is too large"),
            "whole numbers fit into 64 bits",
        )
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        match Number::from_f64(value) {
            Some(number) => self.keep(number),
            None => self.refuse(
                format!("{value} cannot be a value here"),
                "write a finite number",
            ),
        }
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        self.keep(value)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        self.keep(Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        self.keep(Value::Null)
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<Value, A::Error> {
        Err(de::Error::custom(
            "a YAML tag (`!...`) has no meaning here; remove it, or quote the text",
        ))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let reader = self.reader;
        let mut items = Vec::new();
        loop {
            let step = items.len().to_string();
            let item = reader.inside(&step, |reader| {
                let item = sequence.next_element_seed(Node { reader })?;
                Ok((
                    item,
                    reader
                        .places
                        .get(&reader.pointer)
                        .and_then(|place| place.value),
                ))
            })?;
            match item {
                (Some(item), position) => {
                    if items.is_empty() {
                        reader.begins(position);
                    }
                    items.push(item);
                }
                (None, _) => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let reader = self.reader;
        let mut entries = Map::new();
        let mut merges = Vec::new();
        let mut keys: BTreeMap<String, Option<Position>> = BTreeMap::new();
        while let Some((key, position)) = map.next_key_seed(Key { reader })? {
            reader.begins(position);
            if key == "<<" {
                let merged = reader.inside(&key, |reader| map.next_value_seed(Node { reader }))?;
                merges.push(merged);
                continue;
            }
            match keys.entry(key.clone()) {
                Entry::Vacant(entry) => {
                    entry.insert(position);
                    let value = reader.inside(&key, |reader| {
                        reader.places.entry(reader.pointer.clone()).or_default().key = position;
                        map.next_value_seed(Node { reader })
                    })?;
                    entries.insert(key, value);
                }
                Entry::Occupied(first) => {
                    let first = first
                        .get()
                        .map_or(String::new(), |at| format!(" (first on line {})", at.line));
                    // Read in a place of its own, so that its places do not hide the first one's.
                    let mut aside = Reader {
                        pointer: format!("{}/{}", reader.pointer, escape(&key)),
                        ..Reader::default()
                    };
                    map.next_value_seed(Node { reader: &mut aside })?;
                    let pointer = aside.pointer;
                    let message = match reader.pointer.as_str() {
                        "/stages" => format!("a second stage `{key}`{first}"),
                        _ => format!("the key `{key}` is here twice{first}"),
                    };
                    let hint = Some("rename or remove one of them".to_owned());
                    reader.problems.push(YamlError {
                        position,
                        pointer,
                        message,
                        hint,
                    });
                }
            }
        }
        for merged in merges {
            let source = format!("{}/<<", reader.pointer);
            reader.merge(&mut entries, merged, &source);
        }
        Ok(Value::Object(entries))
    }
}

/// Reads a key: scalars become texts.
struct Key<'a> {
    reader: &'a mut Reader,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = (String, Option<Position>);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let mut scalar = None;
        // A reader of its own: the key is no value of the document.
        let mut aside = Reader::default();
        let result = deserializer.deserialize_any(NodeVisitor {
            reader: &mut aside,
            scalar: &mut scalar,
        });
        match (result, scalar) {
            (Err(error), Some(scalar)) => {
                let key = match scalar {
                    Ok(Value::String(key)) => key,
                    Ok(other) => other.to_string(),
                    Err(unusable) => unusable.message,
                };
                Ok((key, place_in(&error)))
            }
            (Err(error), None) => Err(error),
            (Ok(_), _) => {
                let position = aside.places.get("").and_then(|place| place.value);
                self.reader
                    .problem(position, "a key is a plain text".to_owned(), "quote it");
                Ok((String::new(), position))
            }
        }
    }
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
            document.locate("/use/y/z", Part::Value),
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
        check("/version", Part::Key, 1, 1);
        check("/version", Part::Value, 1, 10);
        check("/stages/a", Part::Key, 3, 3);
        check("/stages/a", Part::Value, 4, 5);
        check("/stages/a/list/1/k", Part::Key, 5, 16);
        check("/stages/a/list/1/k", Part::Value, 5, 19);
        check("/stages/é/v", Part::Value, 6, 16);
        check("/stages/a/absent", Part::Value, 3, 3);
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
