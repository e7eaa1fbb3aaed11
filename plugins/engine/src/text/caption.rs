//! Cleaning captions as LlamaGen does before its text encoder, in training and in sampling: lower case, without URLs, markup,
//! file names, article numbers and phrases of shops, applied twice.
//!
//! In: a text. Out: a text. White space, letters and the boundaries of words are Python's. Absent: ftfy's decoding of
//! mis-encoded text (see `repair.rs`).

use std::borrow::Cow;
use std::sync::LazyLock;

use fancy_regex::Regex;

use super::entities::unescape;
use super::{markup, repair};

/// The patterns, in this order, and their replacements.
type Rules = Vec<(Regex, &'static str)>;

/// URLs, before markup is removed.
const ADDRESSES: [(&str, &str); 3] = [
    ("<person>", "person"),
    (
        r"\b((?:https?:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\p{L}\p{N}_/-]*\b/?(?!@)))",
        "",
    ),
    (
        r"\b((?:www:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\p{L}\p{N}_/-]*\b/?(?!@)))",
        "",
    ),
];

/// Names, signs and numbers.
const SIGNS: [(&str, &str); 18] = [
    (r"@[\p{L}\p{N}_]+", ""),
    (
        r"[\u{31c0}-\u{31ef}\u{31f0}-\u{31ff}\u{3200}-\u{4dbf}\u{4dc0}-\u{4dff}\u{4e00}-\u{9fff}]+",
        "",
    ),
    (
        r"[\u{2d}\u{58a}\u{5be}\u{1400}\u{1806}\u{2010}-\u{2015}\u{2e17}\u{2e1a}\u{2e3a}\u{2e3b}\u{2e40}\u{301c}\u{3030}\u{30a0}\u{fe31}\u{fe32}\u{fe58}\u{fe63}\u{ff0d}]+",
        "-",
    ),
    ("[`\u{b4}\u{ab}\u{bb}\u{201c}\u{201d}\u{a8}]", "\""),
    ("[\u{2018}\u{2019}]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d[\s\x1c-\x1f]+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (
        r"[^\s\x1c-\x1f]+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)",
        "",
    ),
    (r#"["']{2,}"#, "\""),
    (r"\.{2,}", " "),
    (
        r"[#\u{ae}\u{2022}\u{a9}\u{2122}&@\u{b7}\u{ba}\u{bd}\u{be}\u{bf}\u{a1}\u{a7}~()\[\]{}|\\/*]+",
        " ",
    ),
    (r"[\s\x1c-\x1f]+\.[\s\x1c-\x1f]+", " "),
];

/// Codes and phrases, after the text is repaired.
const PHRASES: [(&str, &str); 17] = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s[\p{L}\p{N}_]+", ""),
    (
        r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simages?)?",
        "",
    ),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u{445}\u{d7}]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", "${1} "),
    (r"\s+", " "),
    // Characters around the whole text.
    (r#"^["']([\w\W]+)["']$"#, "${1}"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
];

/// Separators between words; more than three of them count as joining words.
const JOINTS: [char; 2] = ['-', '_'];

/// Part of a word for Python.
const WORD: &str = r"[\p{L}\p{N}_]";

/// Each list of rules twice: for texts in ASCII, and for others with Python's boundaries of words, which take longer. The
/// crate's own count combining marks as parts of words, but not all numbers.
static RULES: LazyLock<[[Rules; 2]; 3]> = LazyLock::new(|| {
    let boundary = format!("(?:(?<={WORD})(?!{WORD})|(?<!{WORD})(?={WORD}))");
    [&ADDRESSES[..], &SIGNS[..], &PHRASES[..]].map(|rules| {
        [r"\b", boundary.as_str()].map(|boundary| {
            let each = rules.iter();
            each.filter_map(|&(pattern, with)| {
                let pattern = pattern.replace(r"\b", boundary);
                Some((Regex::new(&pattern).ok()?, with))
            })
            .collect()
        })
    })
});

/// Maximum characters of a caption: text encoders take a hundred words, and some rules look ahead.
const LONGEST: usize = 20_000;

/// The caption for the text encoder.
pub fn clean(caption: &str) -> String {
    let caption = match caption.char_indices().nth(LONGEST) {
        Some((end, _)) => &caption[..end],
        None => caption,
    };
    once(&once(caption))
}

fn once(caption: &str) -> String {
    let [addresses, signs, phrases] = &*RULES;
    let text = stripped(&unquoted(caption)).to_lowercase();
    let text = markup::visible(&applied(addresses, text));
    let text = applied(signs, text);
    let text = match text.matches(JOINTS).count() {
        0..=3 => text,
        _ => text.replace(JOINTS, " "),
    };
    let text = unescape(&unescape(&repair::repaired(&text)));
    let text = applied(phrases, stripped(&text).to_owned());
    stripped(&text).to_owned()
}

/// The text without what Python takes for white space at its ends.
fn stripped(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

fn applied(rules: &[Rules; 2], mut text: String) -> String {
    for (rule, with) in &rules[usize::from(!text.is_ascii())] {
        // If a rule fails on a text, the text is unchanged.
        if let Ok(Cow::Owned(changed)) = rule.try_replacen(&text, 0, *with) {
            text = changed;
        }
    }
    text
}

/// Decodes URL escapes: `+` for a space, `%41` for a letter.
fn unquoted(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let digits = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        let escaped = digits
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(if bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_compiles() {
        let counts = RULES.each_ref().map(|twice| twice.each_ref().map(Vec::len));
        let expected = [ADDRESSES.len(), SIGNS.len(), PHRASES.len()];
        assert_eq!(counts, expected.map(|count| [count; 2]));
    }

    /// Results of ftfy's repair and of LlamaGen's own code (tests/peers/cleaning.py).
    #[test]
    fn captions_are_cleaned_as_published() {
        let golden = include_str!("../../../../tests/golden/captions/cleaned.json");
        let known: Vec<[String; 3]> = serde_json::from_str(golden).unwrap();
        for [text, repaired, cleaned] in &known {
            assert_eq!(repair::repaired(text), *repaired, "{text:?}");
            assert_eq!(clean(text), *cleaned, "{text:?}");
        }
        assert!(known.len() > 80, "{} captions", known.len());
    }

    /// In these texts a pass adds at most a space to two characters, or a character to U+0130, whose lower case has two.
    fn check_length(text: &str) {
        let read: Vec<char> = text.chars().take(LONGEST).collect();
        let dotted = read.iter().filter(|&&c| c == '\u{130}').count();
        let (count, most) = (clean(text).chars().count(), (read.len() + dotted) * 9 / 4);
        assert!(count <= most, "{count} characters, at most {most}");
    }

    #[test]
    fn no_text_is_too_strange() {
        for text in [
            "%",
            "%e",
            "%zz%\u{e9}",
            "<",
            "<a",
            "&",
            "&#",
            "&#x110000;",
            "<!--",
            "\u{130}",
        ] {
            check_length(text);
        }
        let long = "a.".repeat(50_000) + "com@";
        check_length(&long);
    }
}
