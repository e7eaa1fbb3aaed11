//! Cleaning captions as LlamaGen does before its text encoder, in training and in sampling: lower case, without URLs, markup,
//! file names, article numbers and phrases of shops, applied twice.
//!
//! In: a text. Out: a text. One step of its code is left out: mis-encoded text is not repaired.

use std::borrow::Cow;
use std::sync::LazyLock;

use fancy_regex::Regex;

/// The patterns, in this order, and their replacements.
type Rules = Vec<(Regex, &'static str)>;

/// URLs, before markup is removed.
const ADDRESSES: [(&str, &str); 3] = [
    ("<person>", "person"),
    (
        r"\b((?:https?:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)))",
        "",
    ),
    (
        r"\b((?:www:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)))",
        "",
    ),
];

/// Names, signs and numbers.
const SIGNS: [(&str, &str); 18] = [
    (r"@\w+\b", ""),
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
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),
    (r#"["']{2,}"#, "\""),
    (r"\.{2,}", " "),
    (
        r"[#\u{ae}\u{2022}\u{a9}\u{2122}&@\u{b7}\u{ba}\u{bd}\u{be}\u{bf}\u{a1}\u{a7}~()\[\]{}|\\/*]+",
        " ",
    ),
    (r"\s+\.\s+", " "),
];

/// Codes and phrases, after entities are decoded again.
const PHRASES: [(&str, &str); 17] = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
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

static RULES: LazyLock<[Rules; 3]> = LazyLock::new(|| {
    let compiled = |rules: &[(&str, &'static str)]| {
        let each = rules.iter();
        each.filter_map(|&(pattern, with)| Some((Regex::new(pattern).ok()?, with)))
            .collect()
    };
    [compiled(&ADDRESSES), compiled(&SIGNS), compiled(&PHRASES)]
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
    let text = unquoted(caption).trim().to_lowercase();
    let text = markup(&applied(addresses, text));
    let text = applied(signs, text);
    let text = match text.matches(JOINTS).count() {
        0..=3 => text,
        _ => text.replace(JOINTS, " "),
    };
    let text = entities(&entities(&text));
    applied(phrases, text.trim().to_owned()).trim().to_owned()
}

fn applied(rules: &Rules, mut text: String) -> String {
    for (rule, with) in rules {
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

/// The visible text of HTML: without tags and comments, with entities decoded.
fn markup(text: &str) -> String {
    let (mut out, mut left) = (String::with_capacity(text.len()), text);
    while let Some(at) = left.find('<') {
        let (before, tag) = left.split_at(at);
        out.push_str(before);
        let begins = tag[1..].starts_with(|c: char| c.is_ascii_alphabetic() || "/!?".contains(c));
        let end = match tag.strip_prefix("<!--") {
            Some(_) => tag.find("-->").map(|at| at + 3),
            None => tag.find('>').map(|at| at + 1),
        };
        match end.filter(|_| begins) {
            Some(end) => left = &tag[end..],
            None => {
                out.push('<');
                left = &tag[1..];
            }
        }
    }
    out.push_str(left);
    entities(&out)
}

/// Decodes entities: numeric ones, and the names that occur in captions.
fn entities(text: &str) -> String {
    let (mut out, mut left) = (String::with_capacity(text.len()), text);
    while let Some(at) = left.find('&') {
        let (before, entity) = left.split_at(at);
        out.push_str(before);
        let end = entity[1..]
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '#')
            .map_or(entity.len(), |end| end + 1);
        let name = &entity[1..end];
        match character(name) {
            Some(c) => {
                out.push(c);
                left = entity[end..].strip_prefix(';').unwrap_or(&entity[end..]);
            }
            None => {
                out.push('&');
                left = &entity[1..];
            }
        }
    }
    out.push_str(left);
    out
}

/// The character of an entity, given the text between `&` and `;`.
fn character(name: &str) -> Option<char> {
    if let Some(number) = name.strip_prefix('#') {
        let code = match number.strip_prefix(['x', 'X']) {
            Some(digits) => u32::from_str_radix(digits, 16).ok()?,
            None => number.parse().ok()?,
        };
        return char::from_u32(code);
    }
    let found = ENTITIES.iter().find(|(known, _)| *known == name);
    found.map(|&(_, c)| c)
}

const ENTITIES: [(&str, char); 37] = [
    ("amp", '&'),
    ("lt", '<'),
    ("gt", '>'),
    ("quot", '"'),
    ("apos", '\''),
    ("nbsp", '\u{a0}'),
    ("copy", '\u{a9}'),
    ("reg", '\u{ae}'),
    ("trade", '\u{2122}'),
    ("hellip", '\u{2026}'),
    ("mdash", '\u{2014}'),
    ("ndash", '\u{2013}'),
    ("lsquo", '\u{2018}'),
    ("rsquo", '\u{2019}'),
    ("ldquo", '\u{201c}'),
    ("rdquo", '\u{201d}'),
    ("laquo", '\u{ab}'),
    ("raquo", '\u{bb}'),
    ("bull", '\u{2022}'),
    ("middot", '\u{b7}'),
    ("deg", '\u{b0}'),
    ("times", '\u{d7}'),
    ("frac12", '\u{bd}'),
    ("pound", '\u{a3}'),
    ("euro", '\u{20ac}'),
    ("yen", '\u{a5}'),
    ("cent", '\u{a2}'),
    ("agrave", '\u{e0}'),
    ("eacute", '\u{e9}'),
    ("egrave", '\u{e8}'),
    ("ccedil", '\u{e7}'),
    ("ntilde", '\u{f1}'),
    ("auml", '\u{e4}'),
    ("ouml", '\u{f6}'),
    ("uuml", '\u{fc}'),
    ("szlig", '\u{df}'),
    ("oacute", '\u{f3}'),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_compiles() {
        let counts = RULES.each_ref().map(Vec::len);
        assert_eq!(counts, [ADDRESSES.len(), SIGNS.len(), PHRASES.len()]);
    }

    /// Results of LlamaGen's own code.
    #[test]
    fn captions_are_cleaned_as_published() {
        let known = [
            (
                "A Bowl of  Red Apples, on a wooden table.",
                "a bowl of red apples, on a wooden table.",
            ),
            (
                "\u{201c}Sunset\u{201d} \u{2014} over the (old) harbour\u{2026} #3 of 12",
                "\"sunset\" - over the old harbour\u{2026} of 12",
            ),
            (
                "<b>Vintage</b> poster &amp; frame, 24x36 in: free shipping!",
                "vintage poster frame, in: !",
            ),
            ("see https://example.com/a/b for more", "see for more"),
            (
                "photo by @someone at www.shop.com/cats - DSC_0041.jpg",
                "photo by at",
            ),
            ("this-is-my-very-cute_cat", "this is my very cute cat"),
            ("cat dog&nbsp;&quot;bird&quot; &lt;3", "cat dog \"bird\" <3"),
            ("'a single quoted caption'", "a single quoted caption"),
            ("IP 192.168.0.1 and id 1234567, jc6640 a1b2c3", "ip and id"),
            ("tea+cup%20saucer", "tea cup saucer"),
            (
                "\u{65e5}\u{672c} tower \u{2013} view ; 10:30 ",
                "tower - view ; 10:30",
            ),
            ("click on link to download free PDF images, page 12", "to"),
            (
                "***SALE*** 50% off!!! \"\"\"now\"\"\"",
                "sale 50% off!!! \"now\"",
            ),
            (
                "a cat : a dog,a bird.A fish",
                "a cat: a dog, a bird. a fish",
            ),
            ("user@mail.com wrote", "user wrote"),
            (
                "L\u{2019}\u{e9}t\u{e9} caf\u{e9} \u{bd} price",
                "l'\u{e9}t\u{e9} caf\u{e9} price",
            ),
            ("\\n hello \\n", "hello"),
            ("trailing dash -", "trailing dash"),
            (".hidden", ""),
        ];
        for (text, expected) in known {
            assert_eq!(clean(text), expected, "{text:?}");
        }
    }

    /// A pass adds at most a space to two characters, or a character to U+0130, whose lower case has two.
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
