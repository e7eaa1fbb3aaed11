//! Errors in users' texts (recipes, filters, settings): what, where, and how to fix them.
//!
//! In: findings with a position in a text or in a command-line argument. Out: text with `file:line:column` and the marked
//! line, escaped for terminals and of bounded length for any input. Deliberately absent: finding anything, and exit codes.

use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use unicode_width::UnicodeWidthStr;

use crate::terminal::{clean, paint};
use crate::yaml;

pub use crate::yaml::Position;
pub use retort_abi::Severity;

/// Findings beyond this many are counted, not shown.
const SHOWN: usize = 20;

/// Characters of a message or a hint that are shown.
const MOST_WORDS: usize = 1500;

/// Characters of a line that are shown before the mark, and from the mark on.
const AROUND: (usize, usize) = (80, 120);

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `error` stops everything, `warning` is shown.
    pub severity: Severity,
    /// What is at fault.
    pub cause: Cause,
    /// The position, if it is in the text.
    pub position: Option<Position>,
    /// How many characters are marked from there on; None: the YAML key or value that begins there.
    #[serde(skip)]
    pub marked: Option<usize>,
    /// The position, if it is in a command-line argument.
    #[serde(default)]
    pub argument: Option<Argument>,
    /// JSON pointer from the recipe's root, empty for the whole recipe.
    pub pointer: String,
    /// The error and the expectation.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// A position in a command-line argument.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Argument {
    /// The argument: `--set seed=3`.
    pub text: String,
    /// Where in it.
    pub position: Position,
}

/// What is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    /// The recipe, or a `--set`.
    Recipe,
    /// A plugin that the recipe asks for.
    Plugin,
}

/// All findings about one text: a recipe, a filter, a file with settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is not valid", .path.display())]
pub struct Report {
    /// The text's file, as typed, or a description.
    pub path: PathBuf,
    /// The text; empty if it could not be read.
    pub text: String,
    /// The findings.
    pub findings: Vec<Finding>,
}

impl Finding {
    /// An error in the recipe, without a position yet.
    pub fn error(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            cause: Cause::Recipe,
            position: None,
            marked: None,
            argument: None,
            pointer: pointer.into(),
            message: message.into(),
            hint: None,
        }
    }

    /// A warning about the recipe, without a position yet.
    pub fn warning(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::error(pointer, message)
        }
    }

    /// Says where.
    pub fn at(mut self, position: Option<Position>) -> Self {
        self.position = position;
        self
    }

    /// Sets the position: bytes of a text.
    pub fn at_bytes(mut self, text: &str, bytes: Range<usize>) -> Self {
        let start = text.floor_char_boundary(bytes.start);
        let end = text.floor_char_boundary(bytes.end).max(start);
        self.position = Some(yaml::end_of(&text[..start]));
        self.marked = Some(text[start..end].chars().count());
        self
    }

    /// Says what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Formatted as by rustc: title, position, marked line, hint.
    pub fn render(&self, path: &Path, text: &str, color: bool) -> String {
        let (name, severity) = match self.severity {
            Severity::Error => ("error", "1;31"),
            Severity::Warning => ("warning", "1;33"),
        };
        let side = |text: &str| paint(text, "1;34", color);
        let excerpt = self.excerpt(path, text);
        let margin = excerpt.margin();
        let mut shown = format!(
            "{}{}",
            paint(name, severity, color),
            paint(
                &format!(": {}", brief(&self.message, "       ")),
                "1",
                color
            )
        );
        shown.push('\n');
        shown.push_str(&excerpt.draw(severity, color));
        if let Some(hint) = &self.hint {
            let indentation = " ".repeat(margin + 9);
            let _ = write!(
                shown,
                "\n{:margin$} {}\n{:margin$} {} {}: {}",
                "",
                side("|"),
                "",
                side("="),
                paint("help", "1", color),
                clean(&brief(hint, &indentation))
            );
        }
        shown
    }

    /// Only the position and the marked line, without colours.
    pub fn place_in(&self, path: &Path, text: &str) -> String {
        self.excerpt(path, text).draw("", false)
    }

    fn excerpt(&self, path: &Path, text: &str) -> Excerpt {
        let (source, path, position) = match &self.argument {
            Some(argument) => (
                argument.text.as_str(),
                "command line".to_owned(),
                Some(argument.position),
            ),
            None => (text, path.display().to_string(), self.position),
        };
        let marked = position.and_then(|at| {
            let mut lines = yaml::lines(source);
            let line = lines.nth(at.line.checked_sub(1)?);
            // Something missing at the end of a text may be on an empty line.
            let line = line.or_else(|| self.marked.map(|_| ""))?;
            let marked = match self.marked {
                Some(characters) => Marked::span(line, at.column, characters),
                None => Marked::token(line, at.column),
            };
            Some((at.line, marked))
        });
        let place = position.map_or_else(String::new, |at| format!(":{}:{}", at.line, at.column));
        Excerpt {
            place: format!("{}{place}", clean(&path)),
            marked,
        }
    }
}

/// A finding's position, and the line with its number.
struct Excerpt {
    place: String,
    marked: Option<(usize, Marked)>,
}

impl Excerpt {
    /// Characters of the line's number.
    fn margin(&self) -> usize {
        self.marked
            .as_ref()
            .map_or(0, |(number, _)| number.to_string().len())
    }

    fn draw(&self, severity: &str, color: bool) -> String {
        let margin = self.margin();
        let arrow = paint("-->", "1;34", color);
        let mut shown = format!("{:margin$}{arrow} {}", "", self.place);
        if let Some((number, marked)) = &self.marked {
            shown.push('\n');
            shown.push_str(&marked.frame(*number, severity, color));
        }
        shown
    }
}

/// A message of any length, truncated; further lines are indented.
fn brief(message: &str, indentation: &str) -> String {
    let cut = match message.char_indices().nth(MOST_WORDS) {
        Some((end, _)) => format!("{}...", &message[..end]),
        None => message.to_owned(),
    };
    cut.replace('\n', &format!("\n{indentation}"))
}

/// A line as shown, and the mark's position in terminal columns.
struct Marked {
    line: String,
    before: usize,
    width: usize,
}

impl Marked {
    /// Marks the key or value that begins at a column of a line.
    fn token(line: &str, column: usize) -> Self {
        Self::new(line, column, token_length)
    }

    /// Marks this many characters from a column of a line on; at least one.
    fn span(line: &str, column: usize, characters: usize) -> Self {
        Self::new(line, column, |rest| {
            let end = rest.char_indices().nth(characters.max(1));
            end.map_or(rest.len(), |(end, _)| end)
        })
    }

    /// The line with its number, and the carets below it, in the colour of a severity.
    fn frame(&self, number: usize, severity: &str, color: bool) -> String {
        let Self {
            line,
            before,
            width,
        } = self;
        let side = |text: &str| paint(text, "1;34", color);
        let (margin, bar) = (number.to_string().len(), side("|"));
        let carets = paint(&"^".repeat(*width), severity, color);
        format!(
            "{:margin$} {bar}\n{} {bar} {line}\n{:margin$} {bar} {:before$}{carets}",
            "",
            side(&number.to_string()),
            "",
            ""
        )
    }

    /// `length` returns the marked bytes of the text from there. Of a long line only the surroundings are shown.
    fn new(line: &str, column: usize, length: impl FnOnce(&str) -> usize) -> Self {
        let skipped = column.saturating_sub(1);
        let start = line
            .char_indices()
            .nth(skipped)
            .map_or(line.len(), |(start, _)| start);
        let (before, rest) = line.split_at(start);
        let first = skipped.saturating_sub(AROUND.0);
        let before: String = before.chars().skip(first).map(visible).collect();
        let before = match first {
            0 => before,
            _ => format!("...{before}"),
        };
        let cut = rest.char_indices().nth(AROUND.1);
        let (near, more) = match cut {
            Some((end, _)) => (&rest[..end], "..."),
            None => (rest, ""),
        };
        let (token, after) = near.split_at(length(near));
        let [token, after] =
            [token, after].map(|text| text.chars().map(visible).collect::<String>());
        Self {
            before: before.width(),
            width: token.width().max(1),
            line: format!("{before}{token}{after}{more}")
                .trim_end()
                .to_owned(),
        }
    }
}

/// A character as it is shown in a line.
fn visible(character: char) -> String {
    match character {
        '\t' => "    ".to_owned(),
        c => clean(c.encode_utf8(&mut [0; 4])).into_owned(),
    }
}

impl Report {
    /// How many errors there are; warnings do not count.
    pub fn errors(&self) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.severity == Severity::Error)
            .count()
    }

    /// Whether only plugins are at fault.
    pub fn only_plugins(&self) -> bool {
        self.errors() > 0
            && self
                .findings
                .iter()
                .filter(|finding| finding.severity == Severity::Error)
                .all(|finding| finding.cause == Cause::Plugin)
    }

    /// The findings in order of position, the first ones in full.
    pub fn render(&self, color: bool) -> String {
        let mut findings: Vec<&Finding> = self.findings.iter().collect();
        findings.sort_by_key(|finding| (finding.position.is_none(), finding.position));
        let mut text: Vec<String> = findings
            .iter()
            .take(SHOWN)
            .map(|finding| finding.render(&self.path, &self.text, color))
            .collect();
        if findings.len() > SHOWN {
            text.push(format!("... and {} more", findings.len() - SHOWN));
        }
        text.join("\n\n")
    }
}

/// Bytes of the key or value at the beginning of `text`, to be marked by carets. At least one character, if there is one.
fn token_length(text: &str) -> usize {
    let Some(first) = text.chars().next() else {
        return 0;
    };
    if matches!(first, '"' | '\'')
        && let Some(end) = text[1..].find(first)
    {
        return end + 2;
    }
    if first.is_whitespace() {
        return first.len_utf8();
    }
    let mut end = text.len();
    for stop in [": ", ", ", " #", "]", "}"] {
        end = end.min(text.find(stop).unwrap_or(end));
    }
    let token = text[..end].trim_end();
    token
        .strip_suffix(':')
        .unwrap_or(token)
        .len()
        .max(first.len_utf8())
}

/// Expects these findings: line, column, part of the message with its hint; in order of position.
#[cfg(test)]
#[track_caller]
pub fn expect(findings: &[Finding], expected: &[(usize, usize, &str)]) {
    let mut found: Vec<(usize, usize, String)> = findings
        .iter()
        .map(|finding| {
            let at = finding.position.unwrap_or(Position { line: 0, column: 0 });
            let hint = finding.hint.as_deref().unwrap_or_default();
            (at.line, at.column, format!("{} / {hint}", finding.message))
        })
        .collect();
    found.sort();
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for ((line, column, said), (at_line, at_column, part)) in found.iter().zip(expected) {
        assert!(
            (line, column) == (at_line, at_column) && said.contains(part),
            "{found:#?}\nnot {part}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_shows_its_line() {
        let finding = Finding::error("/stages/é/stpes", "unknown option `stpes`")
            .at(Some(Position {
                line: 3,
                column: 10,
            }))
            .hint("did you mean `steps`?");
        let text = "version: 1\nstages:\n  é: {x, stpes: 1}\n";
        assert_eq!(
            finding.render(Path::new("a/r.yaml"), text, false),
            "\
error: unknown option `stpes`
 --> a/r.yaml:3:10
  |
3 |   é: {x, stpes: 1}
  |          ^^^^^
  |
  = help: did you mean `steps`?"
        );
    }

    #[test]
    fn a_finding_without_a_place_names_the_file() {
        let text = Finding::error("", "the file is empty").render(Path::new("r.yaml"), "", false);
        assert_eq!(text, "error: the file is empty\n--> r.yaml");
    }

    #[test]
    fn carets_stand_under_one_token() {
        let check = |text: &str, token: &str| assert_eq!(&text[..token_length(text)], token);
        check("steps: 3", "steps");
        check("steps:", "steps");
        check("a b, c", "a b");
        check("'a: b' # c", "'a: b'");
        check("x]", "x");
        check("", "");
        check("\tx: 1", "\t");
        check("\u{a0}x", "\u{a0}");
        check("\u{3000}", "\u{3000}");
        check("]", "]");
        check("漢: x", "漢");
    }

    #[test]
    fn marks_stand_under_what_they_mark() {
        let check = |line: &str, column: usize, shown: &str, carets: &str| {
            let finding = Finding::error("", "x").at(Some(Position { line: 1, column }));
            let text = finding.render(Path::new("r"), line, false);
            let lines: Vec<&str> = text.lines().skip(3).collect();
            assert_eq!(
                lines,
                [format!("1 | {shown}"), format!("  | {carets}")],
                "{line:?}"
            );
        };
        check("漢字: [x", 5, "漢字: [x", "      ^^");
        check("\u{a0}a", 1, "\u{a0}a", "^");
        check("\u{3000}a", 1, "\u{3000}a", "^^");
        check("\u{200b}a: 1", 1, "\\u200ba: 1", "^^^^^^^");
        check("\u{202e}a: b", 5, "\\u202ea: b", "         ^");
        check("\ta: b", 5, "    a: b", "       ^");
        check("a", 2, "a", " ^");
        check("a", 20, "a", " ^");
    }

    #[test]
    fn what_is_shown_is_bounded_and_safe() {
        let long = "é".repeat(100_000);
        let finding = Finding::error("", format!("\x1b[2J{long}"))
            .at(Some(Position {
                line: 1,
                column: 50_000,
            }))
            .hint(format!("\u{9b}\n{long}"));
        for color in [false, true] {
            let text = finding.render(Path::new("\x1b]0;x"), &long, color);
            assert!(text.len() < 10_000, "{}", text.len());
            assert!(
                !text.contains("\x1b[2J") && !text.contains("\x1b]") && !text.contains('\u{9b}')
            );
        }
        let lost = Finding::error("", "x").at(Some(Position { line: 0, column: 0 }));
        assert!(
            lost.render(Path::new("r"), "a", false)
                .contains("--> r:0:0")
        );
    }

    #[test]
    fn a_finding_in_an_argument_shows_the_argument() {
        let finding = Finding {
            argument: Some(Argument {
                text: "--set seed=x".into(),
                position: Position {
                    line: 1,
                    column: 12,
                },
            }),
            ..Finding::error("/seed", "wrong")
        };
        assert_eq!(
            finding.render(Path::new("r.yaml"), "seed: 1", false),
            "error: wrong\n --> command line:1:12\n  |\n1 | --set seed=x\n  |            ^"
        );
    }

    #[test]
    fn only_plugins_at_fault() {
        let check = |causes: &[Cause], expected| {
            let findings = causes
                .iter()
                .map(|&cause| Finding {
                    cause,
                    ..Finding::error("", "x")
                })
                .collect();
            let report = Report {
                path: "r.yaml".into(),
                text: String::new(),
                findings,
            };
            assert_eq!(report.only_plugins(), expected);
        };
        check(&[], false);
        check(&[Cause::Plugin], true);
        check(&[Cause::Plugin, Cause::Recipe], false);
    }
}
