//! Repairs of text as ftfy 6 makes them by default (`ftfy.fix_text`), in its order: entities, control characters that are meant
//! as Windows-1252, ligatures, widths, quotes, line breaks, escapes of terminals, other control characters, NFC.
//!
//! In: a text. Out: a text. Absent: text that was decoded in a wrong encoding is not decoded again, and names of characters in
//! capitals (`&OUML;`) stay, because captions are in lower case.

use icu_normalizer::ComposingNormalizerBorrowed;

use super::entities;

/// Most letters of a name that are looked at.
const LONGEST: usize = 24;

/// Most passes over a line: each may decode a digit of a reference that only then is complete, so a line can be made to need
/// thousands.
const PASSES: usize = 100;

/// The repaired text.
pub fn repaired(text: &str) -> String {
    let (mut out, mut decodes) = (String::with_capacity(text.len()), true);
    for line in text.split_inclusive('\n') {
        // In markup, and after it, entities are meant.
        decodes &= !line.contains('<');
        let mut line = line.to_owned();
        for _ in 0..PASSES {
            let next = repaired_once(&line, decodes);
            if next == line {
                break;
            }
            line = next;
        }
        out.push_str(&line);
    }
    out
}

/// A line after each repair, once. One repair can make another one necessary.
fn repaired_once(line: &str, decodes: bool) -> String {
    let mut plain = String::with_capacity(line.len());
    match decodes {
        true => push_all(&entities::decoded_by(line, references), &mut plain),
        false => push_all(line, &mut plain),
    }
    let lines = plain.replace("\r\n", "\n");
    let lines = lines.replace(['\r', '\u{2028}', '\u{2029}'], "\n");
    let mut visible = without_escapes(&lines);
    visible.retain(|c| !is_control(c));
    let composed = ComposingNormalizerBorrowed::new_nfc();
    composed.normalize(&visible).into_owned()
}

/// The characters of the reference after `&`, which ends in `;`, and its bytes. `&amp;amp;` counts as one, or else each level
/// would take a pass.
fn references(rest: &str) -> Option<(String, usize)> {
    let (characters, mut bytes) = reference(rest)?;
    while characters == "&"
        && let Some((next, more)) = reference(&rest[bytes..])
        && next == "&"
    {
        bytes += more;
    }
    Some((characters, bytes))
}

/// The same of one level.
fn reference(rest: &str) -> Option<(String, usize)> {
    if let Some(digits) = rest.strip_prefix('#') {
        let (number, bytes) = entities::number(digits)?;
        let is_reference = bytes <= LONGEST && digits[bytes..].starts_with(';');
        return is_reference.then(|| (entities::visible_character(number), 2 + bytes));
    }
    let letters = rest.bytes().take(LONGEST);
    let end = letters.take_while(u8::is_ascii_alphanumeric).count();
    let name = rest.get(..=end).filter(|name| name.ends_with(';'))?;
    Some((entities::named(name)?.to_owned(), name.len()))
}

/// Adds each character in its plain form.
fn push_all(text: &str, out: &mut String) {
    for c in text.chars() {
        let c = match c {
            '\u{80}'..='\u{9f}' => entities::windows_1252(c as u8),
            c => c,
        };
        match c {
            '\u{2018}'..='\u{201b}' | '\u{2bc}' => out.push('\''),
            '\u{201c}'..='\u{201f}' => out.push('"'),
            '\u{3000}' => out.push(' '),
            '\u{ff01}'..='\u{ffef}' => {
                let normal = ComposingNormalizerBorrowed::new_nfkc();
                out.push_str(&normal.normalize(c.encode_utf8(&mut [0; 4])));
            }
            c => match LIGATURES.iter().find(|(known, _)| *known == c) {
                Some((_, letters)) => out.push_str(letters),
                None => out.push(c),
            },
        }
    }
}

/// Latin letters in one character.
const LIGATURES: [(char, &str); 22] = [
    ('\u{132}', "IJ"),
    ('\u{133}', "ij"),
    ('\u{149}', "\u{2bc}n"),
    ('\u{1f1}', "DZ"),
    ('\u{1f2}', "Dz"),
    ('\u{1f3}', "dz"),
    ('\u{1c4}', "D\u{17d}"),
    ('\u{1c5}', "D\u{17e}"),
    ('\u{1c6}', "d\u{17e}"),
    ('\u{1c7}', "LJ"),
    ('\u{1c8}', "Lj"),
    ('\u{1c9}', "lj"),
    ('\u{1ca}', "NJ"),
    ('\u{1cb}', "Nj"),
    ('\u{1cc}', "nj"),
    ('\u{fb00}', "ff"),
    ('\u{fb01}', "fi"),
    ('\u{fb02}', "fl"),
    ('\u{fb03}', "ffi"),
    ('\u{fb04}', "ffl"),
    ('\u{fb05}', "\u{17f}t"),
    ('\u{fb06}', "st"),
];

/// Removes the escapes with which terminals set colours.
fn without_escapes(text: &str) -> String {
    let (mut out, mut left) = (String::with_capacity(text.len()), text);
    while let Some(at) = left.find("\u{1b}[") {
        let (before, escape) = left.split_at(at);
        out.push_str(before);
        let arguments = escape[2..].bytes();
        let end = 2 + arguments
            .take_while(|b| b.is_ascii_digit() || *b == b';')
            .count();
        left = match escape[end..].starts_with(|c: char| c.is_ascii_alphabetic()) {
            true => &escape[end + 1..],
            false => {
                out.push_str(&escape[..2]);
                &escape[2..]
            }
        };
    }
    out.push_str(left);
    out
}

/// Characters that are removed. Those that join letters, and those for the direction of text, stay.
fn is_control(c: char) -> bool {
    matches!(
        c,
        '\0'..='\u{8}'
            | '\u{b}'
            | '\u{e}'..='\u{1f}'
            | '\u{7f}'
            | '\u{206a}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffc}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Results of ftfy for what no caption still contains when it is repaired; tests/golden/captions has the others.
    #[test]
    fn escapes_and_references_are_repaired() {
        for (text, expected) in [
            ("\u{1b}[36;44mblue\u{1b}[0m", "blue"),
            ("\u{1b}[ and \u{1b}[3", "[ and [3"),
            (
                "&lt;3 &eacute; &amp x &#150; &#65",
                "<3 \u{e9} &amp x \u{2013} &#65",
            ),
            ("&amp;lt;", "<"),
            ("<b> &eacute;\n&eacute;", "<b> &eacute;\n&eacute;"),
            ("&eacute;\n<b>\n&eacute;", "\u{e9}\n<b>\n&eacute;"),
            (
                "&CounterClockwiseContourIntegral; &#0;",
                "&CounterClockwiseContourIntegral; \u{fffd}",
            ),
        ] {
            assert_eq!(repaired(text), expected, "{text:?}");
        }
        let nested = format!("&{}lt;", "amp;".repeat(5000));
        assert_eq!(repaired(&nested), "<");
        // The last digit of each reference is itself one, so each takes a pass: 7 is &#55; and 5 is &#53; and so on.
        let chain = |levels: usize| {
            let heads = ["&#5", "&#5", "&#5", "&#4", "&#5"].into_iter().cycle();
            let heads: String = heads.take(levels).collect();
            let last = ["7", "5", "3", "1", "9"][levels % 5];
            format!("{heads}{last}{}", ";".repeat(levels))
        };
        assert_eq!(repaired(&chain(1)), "7");
        assert_eq!(repaired(&chain(50)), "7");
        assert_eq!(repaired(&chain(5000)), chain(5000 - PASSES));
    }
}
