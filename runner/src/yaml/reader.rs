//! The parser's events -> a value and its places, within limits.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, StrInput, Tag};
use serde_json::{Map, Value};

use super::scalar;
use super::syntax::{self, TOO_DEEP};
use super::{
    Document, Location, MAX_DEPTH, MAX_NAMES, MAX_PROBLEMS, MAX_VALUES, YamlError, escape,
};
use crate::terminal;
use crate::yaml::Position;

/// Reads the only document of a text.
pub(super) fn read(text: &str) -> Result<Document, YamlError> {
    let mut reader = Reader {
        text,
        parser: Parser::new_from_str(text),
        pointer: String::new(),
        depth: 0,
        values: 0,
        places: BTreeMap::new(),
        problems: Vec::new(),
        anchors: BTreeMap::new(),
    };
    let mut value = Value::Null;
    let mut documents = 0;
    loop {
        let (event, span) = reader.next()?;
        match event {
            Event::StreamEnd => break,
            Event::DocumentStart(_) => {
                documents += 1;
                if documents > 1 {
                    return Err(YamlError {
                        hint: Some("remove the `---` lines; a recipe is one document".to_owned()),
                        ..fault(span, "more than one YAML document in the file")
                    });
                }
            }
            Event::StreamStart | Event::DocumentEnd | Event::Nothing => {}
            event => value = reader.node(event, span)?,
        }
    }
    Ok(Document {
        value,
        problems: reader.problems,
        places: reader.places,
    })
}

/// A value with an anchor: what `*name` stands for.
struct Anchor {
    value: Value,
    pointer: String,
    /// Its count towards [`MAX_VALUES`].
    values: usize,
}

struct Reader<'t> {
    text: &'t str,
    parser: Parser<'t, StrInput<'t>>,
    pointer: String,
    depth: usize,
    values: usize,
    places: BTreeMap<String, Location>,
    problems: Vec<YamlError>,
    anchors: BTreeMap<usize, Anchor>,
}

impl<'t> Reader<'t> {
    fn next(&mut self) -> Result<(Event<'t>, Span), YamlError> {
        match self.parser.next_event() {
            Some(Ok(next)) => Ok(next),
            Some(Err(error)) => Err(self.explain(&error)),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn explain(&self, error: &ScanError) -> YamlError {
        syntax::explain(self.text, error)
    }

    /// Records a mistake after which reading can go on, up to a limit.
    fn problem(&mut self, pointer: String, span: Span, message: String, hint: &str) {
        let position = Some(position(span));
        match self.problems.len() {
            ..MAX_PROBLEMS => self.problems.push(YamlError {
                position,
                pointer,
                message,
                hint: Some(hint.to_owned()),
            }),
            MAX_PROBLEMS => self.problems.push(YamlError {
                position,
                pointer: String::new(),
                message: "and there are more such mistakes below".to_owned(),
                hint: None,
            }),
            _ => {}
        }
    }

    /// Counts values towards the limit. A long text counts as several.
    fn count(&mut self, values: usize, span: Span) -> Result<(), YamlError> {
        self.values = self.values.saturating_add(values);
        if self.values > MAX_VALUES {
            return Err(YamlError {
                hint: Some("put data into files that the recipe names".to_owned()),
                ..fault(
                    span,
                    format!(
                        "too large for a recipe: over {MAX_VALUES} keys and values, anchors included"
                    ),
                )
            });
        }
        Ok(())
    }

    /// Runs `read` with the pointer extended by one step.
    fn inside<T>(
        &mut self,
        step: &str,
        span: Span,
        read: impl FnOnce(&mut Self) -> Result<T, YamlError>,
    ) -> Result<T, YamlError> {
        let length = self.pointer.len();
        if self.depth >= MAX_DEPTH {
            return Err(YamlError {
                hint: Some(format!("there are at most {MAX_DEPTH} levels")),
                ..fault(span, TOO_DEEP)
            });
        }
        if length + step.len() > MAX_NAMES {
            return Err(YamlError {
                hint: Some("use shorter keys".to_owned()),
                ..fault(
                    span,
                    format!("the keys on the way to this value have more than {MAX_NAMES} bytes"),
                )
            });
        }
        self.pointer.push('/');
        self.pointer.push_str(&escape(step));
        self.depth += 1;
        let result = read(self);
        self.depth -= 1;
        self.pointer.truncate(length);
        result
    }

    /// Records the start of the current value, unless it is known.
    fn begins(&mut self, at: Position) {
        let place = self.places.entry(self.pointer.clone()).or_default();
        place.value = place.value.or(Some(at));
    }

    /// Reads the value that starts with an event.
    fn node(&mut self, event: Event<'t>, span: Span) -> Result<Value, YamlError> {
        let before = self.values;
        let (value, anchor) = match event {
            Event::Alias(name) => return self.alias(name, span),
            Event::Scalar(text, style, anchor, tag) => {
                self.count(1 + text.len() / 64, span)?;
                self.begins(position(span));
                (self.scalar(&text, style, tag.as_deref(), span)?, anchor)
            }
            Event::SequenceStart(anchor, tag) => {
                self.count(1, span)?;
                known_tag(tag, &["seq"], span)?;
                (self.sequence(span)?, anchor)
            }
            Event::MappingStart(anchor, tag) => {
                self.count(1, span)?;
                known_tag(tag, &["map"], span)?;
                (self.mapping(span)?, anchor)
            }
            _ => return Err(fault(span, "a value is expected here")),
        };
        if anchor > 0 {
            // Stored again, for its aliases.
            let values = self.values - before;
            self.count(values, span)?;
            let anchored = Anchor {
                value: value.clone(),
                pointer: self.pointer.clone(),
                values,
            };
            self.anchors.insert(anchor, anchored);
        }
        Ok(value)
    }

    fn alias(&mut self, name: usize, span: Span) -> Result<Value, YamlError> {
        let Some(values) = self.anchors.get(&name).map(|anchor| anchor.values) else {
            return Err(fault(span, "an anchor cannot contain itself"));
        };
        self.count(values, span)?;
        self.begins(position(span));
        let anchor = &self.anchors[&name];
        let (value, source) = (anchor.value.clone(), anchor.pointer.clone());
        if self.depth + depth_of(&value) > MAX_DEPTH {
            return Err(fault(span, TOO_DEEP));
        }
        let own = self.pointer.clone();
        self.copy_places(&source, &own, span)?;
        Ok(value)
    }

    fn scalar(
        &mut self,
        text: &str,
        style: ScalarStyle,
        tag: Option<&Tag>,
        span: Span,
    ) -> Result<Value, YamlError> {
        let resolved = match tag {
            None if style != ScalarStyle::Plain => Some(Value::String(text.to_owned())),
            None => scalar::plain(text),
            Some(tag) => {
                let value = scalar::plain(text);
                let fits = |value: &Value| match tag.suffix.as_str() {
                    "int" => value.is_u64() || value.is_i64(),
                    "float" => value.is_number(),
                    "bool" => value.is_boolean(),
                    "null" => value.is_null(),
                    _ => false,
                };
                match value {
                    _ if tag.is_yaml_core_schema() && tag.suffix == "str" => {
                        Some(Value::String(text.to_owned()))
                    }
                    Some(value) if tag.is_yaml_core_schema() && fits(&value) => Some(value),
                    _ => return Err(strange_tag(span)),
                }
            }
        };
        let Some(value) = resolved else {
            let message = format!("{text} cannot be a value here");
            let pointer = self.pointer.clone();
            self.problem(pointer, span, message, "write a finite number");
            return Ok(Value::Null);
        };
        let as_json = value.to_string();
        if !value.is_string() && !text.is_empty() && as_json != text {
            let place = self.places.entry(self.pointer.clone()).or_default();
            place.written = Some(text.into());
        }
        Ok(value)
    }

    fn sequence(&mut self, span: Span) -> Result<Value, YamlError> {
        let mut items = Vec::new();
        loop {
            let (event, at) = self.next()?;
            if matches!(event, Event::SequenceEnd) {
                self.begins(position(span));
                return Ok(Value::Array(items));
            }
            let step = items.len().to_string();
            let item = self.inside(&step, at, |reader| reader.node(event, at))?;
            if items.is_empty() {
                self.begins_with_first(&format!("{}/0", self.pointer));
            }
            items.push(item);
        }
    }

    /// A collection begins at its first child.
    fn begins_with_first(&mut self, child: &str) {
        if let Some(at) = self.places.get(child).and_then(|place| place.value) {
            self.begins(at);
        }
    }

    fn mapping(&mut self, span: Span) -> Result<Value, YamlError> {
        let mut entries = Map::new();
        let mut merges = Vec::new();
        let mut keys: BTreeMap<String, Position> = BTreeMap::new();
        loop {
            let (event, at) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                break;
            }
            self.begins(position(at));
            let plain = matches!(&event, Event::Scalar(_, ScalarStyle::Plain, _, _));
            let key = self.key(event, at)?;
            if key == "<<" && plain {
                let (event, at) = self.next()?;
                let step = format!("<<{}", merges.len());
                let merged = self.inside(&step, at, |reader| reader.node(event, at))?;
                merges.push((step, merged, at));
                continue;
            }
            let (event, value_at) = self.next()?;
            match keys.entry(key.clone()) {
                Entry::Vacant(entry) => {
                    entry.insert(position(at));
                    let value = self.inside(&key, at, |reader| {
                        let pointer = reader.pointer.clone();
                        reader.places.entry(pointer).or_default().key = Some(position(at));
                        reader.node(event, value_at)
                    })?;
                    entries.insert(key, value);
                }
                Entry::Occupied(first) => {
                    let first = first.get().line;
                    // Read under a key that no recipe contains, so that its positions do not hide the first one's.
                    self.inside("\0", at, |reader| reader.node(event, value_at))?;
                    let message = match self.pointer.as_str() {
                        "/stages" => format!("a second stage `{key}` (first on line {first})"),
                        _ => format!("the key `{key}` is here twice (first on line {first})"),
                    };
                    let pointer = format!("{}/{}", self.pointer, escape(&key));
                    self.problem(pointer, at, message, "rename or remove one of them");
                }
            }
        }
        self.begins(position(span));
        for (step, merged, at) in merges {
            let source = format!("{}/{step}", self.pointer);
            self.merge(&mut entries, merged, &source, at)?;
        }
        Ok(Value::Object(entries))
    }

    /// A key as written: `0x10` and `1.50` are valid names.
    fn key(&mut self, event: Event<'t>, span: Span) -> Result<String, YamlError> {
        match event {
            Event::Scalar(text, style, ..) => {
                self.count(1 + text.len() / 64, span)?;
                let key = text.into_owned();
                let pointer = format!("{}/{}", self.pointer, escape(&key));
                if let Some(odd) = key.chars().find(|&c| terminal::is_odd_space(c)) {
                    let message = format!("in the key `{key}`: {}", syntax::odd_space(odd));
                    self.problem(pointer, span, message, "write a plain space, or remove it");
                } else if key.is_empty() && style == ScalarStyle::Plain {
                    let message = "a key is missing before the `:`".to_owned();
                    self.problem(pointer, span, message, "write `key: value`");
                }
                Ok(key)
            }
            event => {
                // Read separately: the key is not a value of the document.
                self.inside("\0", span, |reader| reader.node(event, span))?;
                let pointer = format!("{}/", self.pointer);
                self.problem(
                    pointer,
                    span,
                    "a key is a plain text".to_owned(),
                    "quote it",
                );
                Ok(String::new())
            }
        }
    }

    /// Adds the entries of merge keys, unless they are written out.
    fn merge(
        &mut self,
        target: &mut Map<String, Value>,
        merged: Value,
        source: &str,
        span: Span,
    ) -> Result<(), YamlError> {
        match merged {
            Value::Object(entries) => {
                for (key, value) in entries {
                    if target.contains_key(&key) {
                        continue;
                    }
                    let step = escape(&key);
                    let to = format!("{}/{step}", self.pointer);
                    self.copy_places(&format!("{source}/{step}"), &to, span)?;
                    target.insert(key, value);
                }
            }
            Value::Array(items) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.merge(target, item, &format!("{source}/{index}"), span)?;
                }
            }
            _ => self.problem(
                self.pointer.clone(),
                span,
                "`<<` merges a mapping".to_owned(),
                "write `<<: *anchor` of a mapping",
            ),
        }
        Ok(())
    }

    /// Copies positions from one pointer to another, for aliases and merged entries.
    fn copy_places(&mut self, from: &str, to: &str, span: Span) -> Result<(), YamlError> {
        let below = format!("{from}/");
        let whole = self.places.get(from).cloned();
        let inner = self
            .places
            .range(below.clone()..)
            .take_while(|(pointer, _)| pointer.starts_with(&below))
            .map(|(pointer, place)| (&pointer[from.len()..], place.clone()));
        let copies: Vec<(String, Location)> = whole
            .map(|place| ("", place))
            .into_iter()
            .chain(inner)
            .map(|(rest, place)| (format!("{to}{rest}"), place))
            .collect();
        self.count(copies.len(), span)?;
        let longest = copies.iter().map(|(pointer, _)| pointer.len()).max();
        if longest > Some(2 * MAX_NAMES) {
            return Err(fault(span, TOO_DEEP));
        }
        for (pointer, copy) in copies {
            let place = self.places.entry(pointer).or_default();
            place.key = place.key.or(copy.key);
            place.value = place.value.or(copy.value);
            place.written = copy.written.or(place.written.take());
        }
        Ok(())
    }
}

/// The depth of a value; at most [`MAX_DEPTH`], like everything that was read.
fn depth_of(value: &Value) -> usize {
    match value {
        Value::Array(items) => items
            .iter()
            .map(depth_of)
            .max()
            .map_or(0, |depth| 1 + depth),
        Value::Object(entries) => entries
            .values()
            .map(depth_of)
            .max()
            .map_or(0, |depth| 1 + depth),
        _ => 0,
    }
}

fn known_tag(tag: Option<Cow<'_, Tag>>, known: &[&str], span: Span) -> Result<(), YamlError> {
    match tag {
        Some(tag) if !tag.is_yaml_core_schema() || !known.contains(&tag.suffix.as_str()) => {
            Err(strange_tag(span))
        }
        _ => Ok(()),
    }
}

fn strange_tag(span: Span) -> YamlError {
    YamlError {
        hint: Some("remove it, or quote the text".to_owned()),
        ..fault(span, "a YAML tag (`!...`) has no meaning here")
    }
}

fn fault(span: Span, message: impl Into<String>) -> YamlError {
    YamlError {
        position: Some(position(span)),
        pointer: String::new(),
        message: message.into(),
        hint: None,
    }
}

fn position(span: Span) -> Position {
    Position {
        line: span.start.line().max(1),
        column: span.start.col() + 1,
    }
}
