//! Character references of HTML: `&eacute;`, `&#233;`, `&#xe9;`.
//!
//! `entities.txt` has a line for each name of the HTML standard: the name and its code points, hexadecimal. Names end in `;`,
//! and those that the standard also takes without it stand there twice. tests/peers/cleaning.py writes that file.

use std::collections::HashMap;
use std::sync::LazyLock;

static NAMES: LazyLock<HashMap<&'static str, String>> = LazyLock::new(|| {
    let character = |code| char::from_u32(u32::from_str_radix(code, 16).ok()?);
    let entry = |line: &'static str| {
        let (name, codes) = line.split_once(' ')?;
        let characters: Option<String> = codes.split(' ').map(character).collect();
        Some((name, characters?))
    };
    include_str!("entities.txt")
        .lines()
        .filter_map(entry)
        .collect()
});

/// Most characters of a name that [`unescape`] looks at.
const LONGEST: usize = 32;

/// What the bytes 128 to 159 are in Windows-1252; its five gaps stay as they are.
const WINDOWS_1252: [char; 32] = [
    '\u{20ac}', '\u{81}', '\u{201a}', '\u{192}', '\u{201e}', '\u{2026}', '\u{2020}', '\u{2021}',
    '\u{2c6}', '\u{2030}', '\u{160}', '\u{2039}', '\u{152}', '\u{8d}', '\u{17d}', '\u{8f}',
    '\u{90}', '\u{2018}', '\u{2019}', '\u{201c}', '\u{201d}', '\u{2022}', '\u{2013}', '\u{2014}',
    '\u{2dc}', '\u{2122}', '\u{161}', '\u{203a}', '\u{153}', '\u{9d}', '\u{17e}', '\u{178}',
];

/// The characters of a name as the standard writes it: `eacute;`.
pub fn named(name: &str) -> Option<&'static str> {
    NAMES.get(name).map(String::as_str)
}

/// The number at the start of a text, which follows `&#`, and its bytes. Numbers of more than 32 bits are the largest.
pub fn number(text: &str) -> Option<(u32, usize)> {
    let (digits, radix) = match text.strip_prefix(['x', 'X']) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let end = digits
        .find(|c: char| !c.is_digit(radix))
        .unwrap_or(digits.len());
    let value = u32::from_str_radix(&digits[..end], radix).unwrap_or(u32::MAX);
    (end > 0).then_some((value, text.len() - digits.len() + end))
}

/// The character of a number, U+FFFD if it has none.
pub fn character(number: u32) -> char {
    match number {
        0 => char::REPLACEMENT_CHARACTER,
        0x80..=0x9f => windows_1252(number as u8),
        _ => char::from_u32(number).unwrap_or(char::REPLACEMENT_CHARACTER),
    }
}

/// The same as a text, empty for control characters and noncharacters, as Python decodes numbers.
pub fn visible_character(number: u32) -> String {
    match number {
        0x1..=0x8 | 0xb | 0xe..=0x1f | 0x7f | 0xfdd0..=0xfdef => String::new(),
        _ if number <= 0x10_ffff && number & 0xfffe == 0xfffe => String::new(),
        _ => character(number).into(),
    }
}

/// The character of a byte in Windows-1252, which HTML also means by the control characters of these numbers.
pub fn windows_1252(byte: u8) -> char {
    match byte {
        0x80..=0x9f => WINDOWS_1252[usize::from(byte - 0x80)],
        _ => char::from(byte),
    }
}

/// Decodes all references as Python's `html.unescape`, those without `;` too.
pub fn unescape(text: &str) -> String {
    decoded_by(text, reference)
}

/// Decodes the references that `reference` finds: it gets what follows `&` and returns the characters and their bytes.
pub fn decoded_by(text: &str, reference: fn(&str) -> Option<(String, usize)>) -> String {
    let (mut out, mut left) = (String::with_capacity(text.len()), text);
    while let Some(at) = left.find('&') {
        out.push_str(&left[..at]);
        left = &left[at + 1..];
        match reference(left) {
            Some((characters, bytes)) => {
                out.push_str(&characters);
                left = &left[bytes..];
            }
            None => out.push('&'),
        }
    }
    out.push_str(left);
    out
}

/// The characters of the reference after `&`, and its bytes.
fn reference(rest: &str) -> Option<(String, usize)> {
    if let Some(digits) = rest.strip_prefix('#') {
        let (number, bytes) = number(digits)?;
        let semicolon = usize::from(digits[bytes..].starts_with(';'));
        return Some((visible_character(number), 1 + bytes + semicolon));
    }
    let within = |c: &char| !"\t\n\u{c} <&#;".contains(*c);
    let run = rest.chars().take(LONGEST).take_while(within);
    let run: usize = run.map(char::len_utf8).sum();
    let whole = run + usize::from(rest[run..].starts_with(';'));
    // The whole name, or else the longest beginning of it.
    std::iter::once(whole)
        .chain((2..=run).rev())
        .find_map(|end| Some((named(rest.get(..end)?)?.to_owned(), end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_decoded_as_by_python() {
        assert_eq!(NAMES.len(), include_str!("entities.txt").lines().count());
        for (text, expected) in [
            ("&eacute;&Eacute;&eacutex", "\u{e9}\u{c9}\u{e9}x"),
            ("R&D &notin; &notit; &amp", "R&D \u{2209} \u{ac}it; &"),
            ("&#65;&#x41&#X41;&#", "AAA&#"),
            ("&#150;&#x92;&#0;&#11;a", "\u{2013}\u{2019}\u{fffd}a"),
            ("&#xd800;&#99999999999;&#x1fffe;", "\u{fffd}\u{fffd}"),
            ("&fjlig;&nGt;&\u{e9};", "fj\u{226b}\u{20d2}&\u{e9};"),
        ] {
            assert_eq!(unescape(text), expected, "{text}");
        }
    }
}
