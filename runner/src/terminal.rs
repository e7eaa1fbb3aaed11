//! Escaping text for terminals, so that it cannot deceive its reader.
//!
//! In: untrusted text (names, messages of plugins, files). Out: the same text, with every character made visible that would
//! move the cursor, change colours, reorder other text or be invisible. The command line passes all its output through
//! [`show`]. Our own colours are kept: [`paint`] marks them in a way that untrusted text cannot imitate.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

/// A text without control characters, escape sequences, marks of direction, separators of lines and characters without
/// width: each is written as JSON escapes it (`\u001b`), so that JSON stays the same document. Line feeds and tabs stay.
pub fn clean(text: &str) -> Cow<'_, str> {
    cleaned(text, None)
}

/// Like [`clean`], on one line.
pub fn clean_line(text: &str) -> String {
    clean(&text.replace(['\n', '\t'], " ")).into_owned()
}

/// A name from a file or a message, on one line: line feeds and tabs are shown as they are escaped.
pub fn name(text: &str) -> String {
    clean(&text.replace('\n', "\\n").replace('\t', "\\t")).into_owned()
}

/// What is written to a terminal or a pipe: clean, with the colours that [`paint`] and [`painted`] marked.
pub fn show(text: &str) -> Cow<'_, str> {
    cleaned(text, Some(mark()))
}

/// A text in a colour (parameters of SGR, as in `1;31`), made clean; without colours where there are to be none.
pub fn paint(text: &str, code: &str, color: bool) -> String {
    let text = clean(text);
    match color && !code.is_empty() {
        true => format!("{0}{code}m{text}{0}0m", mark()),
        false => text.into_owned(),
    }
}

/// Marks the colours of a text that somebody else has painted, from parts that are clean.
pub fn painted(text: &str) -> String {
    text.replace("\x1b[", mark())
}

/// A placeholder for the start of a colour until it is written; untrusted text cannot know it.
fn mark() -> &'static str {
    static MARK: OnceLock<String> = OnceLock::new();
    MARK.get_or_init(|| {
        // A hasher's keys are random; U+FDD0 is no character, and is unsafe where it does not begin the mark.
        let secret = RandomState::new().build_hasher().finish();
        format!("\u{fdd0}{secret:016x}")
    })
}

/// Whether a character looks like a space or like nothing and separates nothing in YAML: a mistake in a key or an
/// indentation.
pub fn is_odd_space(character: char) -> bool {
    (character.is_whitespace() && !character.is_ascii())
        || matches!(character, '\u{200b}' | '\u{2060}' | '\u{feff}')
        || is_bidi(character)
}

/// Marks that change the direction of what follows.
fn is_bidi(character: char) -> bool {
    matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Whether a character can mislead a terminal or reader.
fn is_unsafe(character: char) -> bool {
    (character.is_control() && !matches!(character, '\n' | '\t'))
        || is_bidi(character)
        || matches!(
            character,
            // Soft hyphen, characters without width, separators, deprecated and interlinear marks, tags.
            '\u{ad}' | '\u{180e}' | '\u{200b}'..='\u{200d}' | '\u{2028}' | '\u{2029}' | '\u{2060}'..='\u{2065}'
            | '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{fdd0}'..='\u{fdef}'
            | '\u{e0000}'..='\u{e007f}'
        )
}

/// Clean; `mark` becomes the beginning of a colour.
fn cleaned<'t>(text: &'t str, mark: Option<&str>) -> Cow<'t, str> {
    if !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let marked = mark.filter(|mark| rest.starts_with(*mark));
        let mut length = character.len_utf8();
        if !is_unsafe(character) {
            safe.push(character);
        } else if let Some(mark) = marked {
            safe.push_str("\x1b[");
            length = mark.len();
        } else if !rest.starts_with("\r\n") {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(safe, "\\u{unit:04x}");
            }
        }
        rest = &rest[length..];
    }
    Cow::Owned(safe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_misleads_is_shown() {
        let check = |text: &str, expected: &str| {
            assert_eq!(clean(text), expected);
            assert_eq!(show(text), expected);
        };
        check("plain é 漢 🙂\n\tx", "plain é 漢 🙂\n\tx");
        check("\x1b[2J\x07\u{9b}2J\x7f", r"\u001b[2J\u0007\u009b2J\u007f");
        check("a\u{202e}b\u{2066}c", r"a\u202eb\u2066c");
        check(
            "a\u{200b}\u{2028}\u{feff}\u{ad}",
            r"a\u200b\u2028\ufeff\u00ad",
        );
        check("a\r\nb\rc", "a\nb\\u000dc");
        check("\x1b[31mred\u{fdd0}0m", r"\u001b[31mred\ufdd00m");
        assert_eq!(clean_line("a\nb\tc\r"), r"a b c\u000d");
    }

    #[test]
    fn our_own_colours_alone_are_shown() {
        let text = paint("\x1b[8mx\u{9b}", "1;31", true);
        assert_eq!(show(&text), "\x1b[1;31m\\u001b[8mx\\u009b\x1b[0m");
        assert_eq!(paint("x\r", "1;31", false), r"x\u000d");
        assert_eq!(
            show(&painted("\x1b[38;5;9mx\x1b[0m")),
            "\x1b[38;5;9mx\x1b[0m"
        );
        // What was painted is no data any more: clean shows the mark.
        assert!(!clean(&text).contains('\x1b'));
    }

    #[test]
    fn json_stays_the_same_document() {
        let value = serde_json::json!({"a\u{9b}": "\x1b\u{202e}\u{e0001}\u{2028}é🙂\u{7f}\r\n"});
        for json in [value.to_string(), format!("{value:#}\n")] {
            let safe = show(&json);
            assert!(!safe.chars().any(is_unsafe), "{safe:?}");
            assert_eq!(
                serde_json::from_str::<serde_json::Value>(&safe).unwrap(),
                value
            );
        }
    }
}
