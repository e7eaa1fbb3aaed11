//! What is wrong with a recipe, where, and what to do about it.
//!
//! In: findings with a place in the recipe. Out: text with `file:line:column` and the marked line. Deliberately
//! absent: finding anything, and exit codes.

use std::path::{Path, PathBuf};

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};
use serde::{Deserialize, Serialize};

pub use retort_abi::Severity;

/// Findings beyond this many are counted, not shown.
const SHOWN: usize = 20;

/// A place in a text; both count from 1, columns in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `error` stops everything, `warning` is shown.
    pub severity: Severity,
    /// What is at fault.
    pub cause: Cause,
    /// Where, if it is in the recipe's text (values from `--set` are not).
    pub position: Option<Position>,
    /// JSON pointer from the recipe's root, empty where the whole recipe is meant.
    pub pointer: String,
    /// What is wrong and what was expected.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// What is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    /// What is written in the recipe, or was given by `--set`.
    Recipe,
    /// A plugin that the recipe asks for.
    Plugin,
}

/// All that was found in one recipe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is not a valid recipe", .path.display())]
pub struct Report {
    /// The recipe's file, as people named it.
    pub path: PathBuf,
    /// Its text; empty where it could not be read.
    pub text: String,
    /// The findings.
    pub findings: Vec<Finding>,
}

impl Finding {
    /// An error in the recipe, without a place yet.
    pub fn error(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            cause: Cause::Recipe,
            position: None,
            pointer: pointer.into(),
            message: message.into(),
            hint: None,
        }
    }

    /// A warning about the recipe, without a place yet.
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

    /// Says what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Shown as rustc does: title, place, marked line, hint.
    pub fn render(&self, path: &Path, text: &str, color: bool) -> String {
        let path = path.display().to_string();
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let title = level.primary_title(&self.message);
        let line = self
            .position
            .and_then(|at| Some((at, text.lines().nth(at.line - 1)?)));
        // Only the line itself is given to the renderer: a recipe may have megabytes.
        let group = match line {
            Some((at, line)) => {
                let start = line
                    .char_indices()
                    .nth(at.column - 1)
                    .map_or(line.len(), |(start, _)| start);
                let span = start..start + token_length(&line[start..]);
                let snippet = Snippet::source(line)
                    .line_start(at.line)
                    .path(path)
                    .annotation(AnnotationKind::Primary.span(span));
                title.element(snippet)
            }
            None => {
                let origin = Origin::path(path);
                Group::with_title(title).element(match self.position {
                    Some(at) => origin.line(at.line).char_column(at.column),
                    None => origin,
                })
            }
        };
        let group = match &self.hint {
            Some(hint) => group.element(Level::HELP.message(hint)),
            None => group,
        };
        let renderer = if color {
            Renderer::styled()
        } else {
            Renderer::plain()
        };
        renderer.render(&[group]).to_string()
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

    /// Whether nothing but plugins is at fault.
    pub fn only_plugins(&self) -> bool {
        self.errors() > 0
            && self
                .findings
                .iter()
                .filter(|finding| finding.severity == Severity::Error)
                .all(|finding| finding.cause == Cause::Plugin)
    }

    /// The findings in the order of their places, the first of them in full.
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

/// Bytes of the key or value at the beginning of `text`: what the carets stand under.
fn token_length(text: &str) -> usize {
    if let Some(quote @ ('"' | '\'')) = text.chars().next()
        && let Some(end) = text[1..].find(quote)
    {
        return end + 2;
    }
    if text.starts_with(char::is_whitespace) {
        return 1;
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
        .max(1)
        .min(text.len())
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
