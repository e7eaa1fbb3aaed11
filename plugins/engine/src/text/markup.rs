//! The visible text of HTML, as BeautifulSoup takes it with Python's own parser: without tags, comments, scripts and styles.

use super::entities;

/// The visible text, in lower case as the given one; its references are decoded.
pub fn visible(text: &str) -> String {
    let (mut out, mut left, mut tolerates) = (String::with_capacity(text.len()), text, true);
    while let Some(at) = left.find(['&', '<']) {
        out.push_str(&left[..at]);
        left = &left[at..];
        if left.starts_with('<') {
            if let Some((shown, rest)) = character_data(left) {
                out.push_str(shown);
                left = rest;
            } else if let Some(bytes) = tag(left) {
                left = after(&left[..bytes], &left[bytes..]);
            } else {
                let (shown, rest) = left.split_at(broken_tag(left));
                out.push_str(shown);
                left = rest;
            }
            continue;
        }
        match reference(left) {
            Some((characters, bytes)) => {
                out.push_str(&characters);
                left = &left[bytes..];
            }
            // The parser skips one `&#` without a number and gives up at the next.
            None if tolerates && left.contains(';') => {
                tolerates = false;
                out.push_str("&#");
                left = &left[2..];
            }
            None => break,
        }
    }
    out.push_str(left);
    out
}

/// Whether a `<` begins a tag, a comment or a declaration.
fn begins_tag(text: &str) -> bool {
    text[1..].starts_with(|c: char| c.is_ascii_alphabetic() || "/!?".contains(c))
}

/// The content of a section `<![cdata[..]]>` at the start of a text, which is shown as it is, and what follows.
fn character_data(text: &str) -> Option<(&str, &str)> {
    text.strip_prefix("<![cdata[")?.split_once("]]>")
}

/// Bytes of the tag, comment or declaration at the start of a text; none, if it does not end.
fn tag(text: &str) -> Option<usize> {
    let first = text.find('>').filter(|_| begins_tag(text))?;
    if let Some(inner) = text.strip_prefix("<!--") {
        let ends = |&(at, _): &(usize, &str)| inner[..at].trim_end().ends_with("--");
        return inner
            .match_indices('>')
            .find(ends)
            .map(|(at, _)| 4 + at + 1);
    }
    match text[1..].starts_with(['/', '!', '?']) {
        true => Some(first + 1),
        false => opening_tag(text),
    }
}

/// Bytes of an opening tag, whose quoted values may contain `>`.
fn opening_tag(text: &str) -> Option<usize> {
    let (mut at, mut is_value) = (1, false);
    while let Some(c) = text[at..].chars().next() {
        match c {
            '>' => return Some(at + 1),
            '"' | '\'' if is_value => {
                // To the closing quote, if there is one.
                at += text[at + 1..].find(c).map_or(0, |bytes| bytes + 1);
                is_value = false;
            }
            '=' => is_value = true,
            c if !c.is_whitespace() => is_value = false,
            _ => {}
        }
        at += c.len_utf8();
    }
    None
}

/// Bytes that are shown of what does not end like a tag: a `<` alone, or all up to the next sign.
fn broken_tag(text: &str) -> usize {
    let next = |sign| text[1..].find(sign).filter(|_| begins_tag(text));
    match (next('>'), next('<')) {
        (Some(at), _) => at + 2,
        (None, Some(at)) => at + 1,
        (None, None) => 1,
    }
}

/// Where the text goes on after a tag: the content of a script or a style is not visible.
fn after<'t>(tag: &str, left: &'t str) -> &'t str {
    let name = tag[1..]
        .split(|c: char| "\t\n\r\u{c} />\0".contains(c))
        .next();
    match name {
        Some(name @ ("script" | "style")) if !tag.ends_with("/>") => {
            let close = format!("</{name}");
            let ends = |&(at, _): &(usize, &str)| {
                let rest = left[at + close.len()..].trim_start();
                rest.starts_with('>')
            };
            let end = left.match_indices(close.as_str()).find(ends);
            end.map_or("", |(at, _)| &left[at..])
        }
        _ => left,
    }
}

/// The characters of the reference at the start of a text, and its bytes; none, if `&#` has no number. References count only
/// if another character follows.
fn reference(text: &str) -> Option<(String, usize)> {
    let rest = &text[1..];
    if let Some(digits) = rest.strip_prefix('#') {
        let (number, bytes) = entities::number(digits)?;
        let next = digits[bytes..].chars().next()?;
        let bytes = 2 + bytes + usize::from(next == ';');
        let is_reference = !next.is_ascii_hexdigit();
        return is_reference.then(|| (entities::character(number).into(), bytes));
    }
    if !rest.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return Some(("&".to_owned(), 1));
    }
    let ends_name = |c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '.';
    let end = match rest.find(ends_name).or_else(|| rest.rfind(['-', '.'])) {
        Some(end) => end,
        // Before a last letter the parser loses the sign.
        None if rest.len() == 1 => return Some((String::new(), 1)),
        None => return Some(("&".to_owned(), 1)),
    };
    let (name, next) = rest.split_at(end);
    let characters = match entities::named(&format!("{name};")) {
        Some(characters) => characters.to_owned(),
        None => format!("&{name}"),
    };
    Some((characters, 1 + end + usize::from(next.starts_with(';'))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Results of BeautifulSoup.
    #[test]
    fn text_is_what_a_reader_sees() {
        for (text, expected) in [
            ("<a href='x>y'>hi</a><br/>there", "hithere"),
            ("<!-- a -- > b -->c<?p x?>d<!doctype html>e", " b -->cde"),
            ("<script>if (a < b) {}</script>shown<style>p {}", "shown"),
            ("<script>a</scripts></script >b<style>c</style", "b"),
            ("<![cdata[x > y &lt; <b>]]>z", "x > y &lt; <b>z"),
            ("x <3 y</", "x <3 y</"),
            ("a <b and c<i>d</i>", "a d"),
            ("a <b", "a <b"),
            ("r&d", "rd"),
            ("tom &jerry", "tom &jerry"),
            (
                "&eacute; &eacute. &foo; caf&eacute",
                "\u{e9} &eacute. &foo caf&eacute",
            ),
            ("&#65;&#x41 &#65", "AA &#65"),
            ("&#; &#65; <b>", "&#; A "),
            ("&# <b>", "&# <b>"),
        ] {
            assert_eq!(visible(text), expected, "{text}");
        }
    }
}
