//! YAML syntax errors in plain words.

use saphyr_parser::ScanError;

use super::{YamlError, end_of, lines};
use crate::terminal;
use crate::yaml::Position;

/// Characters that no recipe may contain: refused before parsing.
pub(super) fn forbidden(text: &str) -> Option<YamlError> {
    let unwanted = |c: char| {
        c.is_control() && !matches!(c, '\t' | '\n' | '\r') || matches!(c, '\u{fffe}' | '\u{ffff}')
    };
    let at = text.find(unwanted)?;
    let found = text[at..].chars().next().unwrap_or_default();
    Some(YamlError {
        position: Some(end_of(&text[..at])),
        pointer: String::new(),
        message: format!(
            "a control character cannot be in YAML: U+{:04X}",
            u32::from(found)
        ),
        hint: Some(format!(
            "remove it, or write it as \"\\u{:04x}\" in double quotes; is this a text file?",
            u32::from(found)
        )),
    })
}

/// A syntax error: what, where, and what to do.
pub(super) fn explain(text: &str, error: &ScanError) -> YamlError {
    let marker = error.marker();
    let mut position = Position {
        line: marker.line().max(1),
        column: marker.col() + 1,
    };
    let said = error.info();
    let has = |part: &str| said.contains(part);
    let (message, hint) = if let Some((at, _)) = in_indentation(text, position, |c| c == '\t') {
        position = at;
        (
            "a tab cannot indent YAML".to_owned(),
            Some("indent with spaces".to_owned()),
        )
    } else if let Some((at, odd)) = in_indentation(text, position, terminal::is_odd_space) {
        position = at;
        (odd_space(odd), Some("indent with plain spaces".to_owned()))
    } else if has("simple key expect")
        && let Some((at, odd)) = behind_colon(text, position)
    {
        position = at;
        (
            odd_space(odd),
            Some("write a plain space behind the `:`".to_owned()),
        )
    } else if has("mapping values are not allowed") || has("illegal placement of ':'") {
        (
            "`:` is not expected here".to_owned(),
            Some(
                "a text with `: ` in it needs quotes; or the line before lacks its `:`; or the indentation is off"
                    .to_owned(),
            ),
        )
    } else if has("flow")
        && let Some(at) = bare_reference(text, position)
    {
        position = at;
        (
            "a value with `${...}` needs quotes inside brackets".to_owned(),
            Some("put the whole value in quotes, as in `size: \"${params.size}\"`".to_owned()),
        )
    } else if has("flow mapping") || has("flow sequence") || has("flow construct") {
        (
            said.to_owned(),
            Some("a `,` or a closing bracket is missing, here or on a line before".to_owned()),
        )
    } else if has("misplaced bracket") {
        (
            "a closing bracket without its opening one".to_owned(),
            Some("remove it, or put a text with brackets in quotes".to_owned()),
        )
    } else if has("did not find expected key")
        || has("did not find expected '-'")
        || has("invalid indentation")
        || has("wrongly indented")
        || has("block sequence entries are not allowed")
    {
        (
            said.to_owned(),
            Some("the indentation does not match the lines above".to_owned()),
        )
    } else if has("simple key expect") {
        (
            "a `key: value` is expected here".to_owned(),
            Some("is there a `:` missing on this line or the one before?".to_owned()),
        )
    } else if has("recursion limit") {
        (TOO_DEEP.to_owned(), None)
    } else if has("unknown anchor") {
        (
            "`*` names an anchor that is not there".to_owned(),
            Some("put a text that begins with `*` in quotes".to_owned()),
        )
    } else if has("document start") {
        (
            "a line that begins with `%` is a directive of YAML".to_owned(),
            Some("put a text that begins with `%` in quotes".to_owned()),
        )
    } else if has("unexpected character") || has("directive") {
        (
            said.to_owned(),
            Some("a text that begins with this character needs quotes".to_owned()),
        )
    } else {
        (said.to_owned(), None)
    };
    YamlError {
        position: Some(position),
        pointer: String::new(),
        message,
        hint,
    }
}

/// The message for values that are nested too deeply.
pub(super) const TOO_DEEP: &str = "nested too deeply";

/// Names a character that looks like a space.
pub fn odd_space(odd: char) -> String {
    format!(
        "U+{:04X} is an invisible character that is not a space",
        u32::from(odd)
    )
}

/// The first such character in the indentation of the line at `position` or of a nearby line: the parser reports indentation
/// errors late, or where the previous text should have continued.
fn in_indentation(
    text: &str,
    position: Position,
    is: impl Fn(char) -> bool,
) -> Option<(Position, char)> {
    let near = [Some(0), Some(1), Some(2), None];
    near.into_iter().find_map(|before| {
        let line = match before {
            Some(before) => position.line.checked_sub(before)?,
            None => position.line + 1,
        };
        let indentation = lines(text)
            .nth(line.checked_sub(1)?)?
            .chars()
            .take_while(|&c| c.is_whitespace() || terminal::is_odd_space(c));
        let (column, odd) = indentation.enumerate().find(|(_, c)| is(*c))?;
        let column = column + 1;
        Some((Position { line, column }, odd))
    })
}

/// The `$` of a reference whose bracket is at `position`: there YAML begins a mapping.
fn bare_reference(text: &str, position: Position) -> Option<Position> {
    let column = position.column.checked_sub(1)?;
    let line = lines(text).nth(position.line.checked_sub(1)?)?;
    let mut at = line.chars().skip(column.checked_sub(1)?);
    let found = (at.next(), at.next()) == (Some('$'), Some('{'));
    found.then_some(Position {
        line: position.line,
        column,
    })
}

/// A `:` followed by something that looks like a space, on the line at `position` or the one before: it looks like
/// `key: value` to people, but not to YAML.
fn behind_colon(text: &str, position: Position) -> Option<(Position, char)> {
    [0, 1].into_iter().find_map(|before| {
        let line = position.line.checked_sub(before)?;
        let said = lines(text).nth(line.checked_sub(1)?)?;
        let pairs = said.chars().zip(said.chars().skip(1));
        let (column, (_, odd)) = pairs
            .enumerate()
            .find(|(_, (c, next))| *c == ':' && terminal::is_odd_space(*next))?;
        let column = column + 2;
        Some((Position { line, column }, odd))
    })
}
