//! The language of `--where`, which selects runs.
//!
//! ```text
//! metrics.1-step.frechet_distance < 20 and params.student.train.steps >= 900
//! state = failed or (not tag = baseline and started > 2026-01-01)
//! ```
//!
//! In: text. Out: a [`Filter`] whose parts know their position in the text, or a [`FilterError`] with a position. The meaning
//! and existence of fields is the store's business (`store/select.rs`).
//!
//! ```text
//! expr       = all { "or" all }
//! all        = one { "and" one }
//! one        = "not" one | "(" expr ")" | field [ comparison ]
//! comparison = operator value | [ "not" ] "in" "(" value { "," value } ")"
//! operator   = "=" | "==" | "!=" | "<" | "<=" | ">" | ">=" | "~" | "!~"
//! ```
//!
//! A field without a comparison tests whether a run has it. `~` tests whether a text contains another; `*` and `?` in that
//! make it a pattern for the whole text. Names and values with other characters are quoted, entirely or partly: `metrics."odd
//! name".last`.

use std::ops::Range;
use std::path::Path;

use crate::diagnostic::{Finding, Report};

/// The file name in error positions.
const NAME: &str = "filter";

/// A filter, as text and parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct Filter {
    /// As written.
    pub text: String,
    /// What it means.
    pub expr: Expr,
}

/// The name of a field, as written and parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct Name {
    /// As written.
    pub text: String,
    /// What it means.
    pub field: Field,
}

/// A condition on a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Expr {
    /// All of them hold.
    And(Vec<Expr>),
    /// One of them holds.
    Or(Vec<Expr>),
    /// It does not hold.
    Not(Box<Expr>),
    /// The run has it.
    Has(Field),
    /// A field compared with a value.
    Compare(Field, Operator, Value),
    /// A field is one of several values.
    In(Field, Vec<Value>),
}

/// A name, and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// Its parts, separated by dots.
    pub parts: Vec<String>,
    /// Where it stands: bytes of the text.
    pub at: Range<usize>,
}

/// How to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// `=`
    Equal,
    /// `!=`
    Unequal,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
    /// `~`
    Like,
    /// `!~`
    Unlike,
}

/// The operator, and its position.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// As written, without quotes.
    pub text: String,
    /// Whether it was quoted: then it is always a text.
    pub quoted: bool,
    /// Where it stands: bytes of the text.
    pub at: Range<usize>,
}

/// An error in a filter.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct FilterError {
    /// What.
    pub message: String,
    /// The text.
    pub text: String,
    /// Where in it: bytes.
    pub at: Range<usize>,
    /// What to do.
    pub hint: Option<String>,
}

impl Field {
    /// As people write it.
    pub fn name(&self) -> String {
        self.parts.join(".")
    }
}

impl Value {
    /// Its number, if it is one.
    pub fn number(&self) -> Option<f64> {
        if self.quoted {
            return None;
        }
        match self.text.to_ascii_lowercase().as_str() {
            "inf" | "+inf" | "infinity" => Some(f64::INFINITY),
            "-inf" | "-infinity" => Some(f64::NEG_INFINITY),
            // Rust parses more words as numbers than people write.
            text if text.contains(|c: char| c.is_ascii_digit()) => {
                text.replace('_', "").parse().ok()
            }
            _ => None,
        }
    }

    /// Whether it is a word with a special meaning: `nan`, `true`, ...
    pub fn is_word(&self, word: &str) -> bool {
        !self.quoted && self.text.eq_ignore_ascii_case(word)
    }
}

impl FilterError {
    /// At a place.
    pub fn new(message: impl Into<String>, at: Range<usize>) -> Self {
        Self {
            message: message.into(),
            text: String::new(),
            at,
            hint: None,
        }
    }

    /// Says what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// In this text.
    pub fn in_text(mut self, text: &str) -> Self {
        text.clone_into(&mut self.text);
        self
    }

    /// The position, and the marked text.
    pub fn marked(&self) -> String {
        self.finding().place_in(Path::new(NAME), &self.text)
    }

    fn finding(&self) -> Finding {
        let finding = Finding::error("", self.message.as_str());
        Finding {
            hint: self.hint.clone(),
            ..finding.at_bytes(&self.text, self.at.clone())
        }
    }
}

impl From<FilterError> for Report {
    fn from(error: FilterError) -> Self {
        Self {
            path: NAME.into(),
            findings: vec![error.finding()],
            text: error.text,
        }
    }
}

/// Reads a filter.
///
/// # Errors
/// [`FilterError`]: where the text becomes invalid, and what was expected there.
pub fn parse(text: &str) -> Result<Filter, FilterError> {
    let expr = read(text).map_err(|error| error.in_text(text))?;
    Ok(Filter {
        text: text.to_owned(),
        expr,
    })
}

/// Reads the name of a field.
///
/// # Errors
/// [`FilterError`].
pub fn parse_name(text: &str) -> Result<Name, FilterError> {
    let tokens = tokens(text).map_err(|error| error.in_text(text))?;
    let [
        Token {
            kind: Kind::Word(parts),
            at,
        },
    ] = tokens.as_slice()
    else {
        let error = FilterError::new("expected the name of a field", 0..text.len());
        return Err(error.in_text(text));
    };
    let field = Field {
        parts: parts.iter().map(|part| part.text.clone()).collect(),
        at: at.clone(),
    };
    Ok(Name {
        text: text.to_owned(),
        field,
    })
}

fn read(text: &str) -> Result<Expr, FilterError> {
    let tokens = tokens(text)?;
    let mut parser = Parser {
        tokens: &tokens,
        end: text.len(),
        depth: 0,
        terms: 0,
    };
    let expr = parser.expr()?;
    match parser.tokens.first() {
        None => Ok(expr),
        Some(rest) => Err(
            FilterError::new("expected `and`, `or` or the end", rest.at.clone())
                .hint("quote values that contain spaces"),
        ),
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Token {
    kind: Kind,
    at: Range<usize>,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    /// Parts between dots.
    Word(Vec<NamePart>),
    Operator(Operator),
    Open,
    Close,
    Comma,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct NamePart {
    text: String,
    quoted: bool,
}

fn tokens(text: &str) -> Result<Vec<Token>, FilterError> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(character) = text[at..].chars().next() {
        let rest = &text[at..];
        let two = rest.get(..2).unwrap_or_default();
        let (kind, length) = match (two, character) {
            (_, c) if c.is_whitespace() => {
                at += c.len_utf8();
                continue;
            }
            ("==", _) => (Kind::Operator(Operator::Equal), 2),
            ("!=", _) => (Kind::Operator(Operator::Unequal), 2),
            ("<=", _) => (Kind::Operator(Operator::LessOrEqual), 2),
            (">=", _) => (Kind::Operator(Operator::GreaterOrEqual), 2),
            ("!~", _) => (Kind::Operator(Operator::Unlike), 2),
            (_, '=') => (Kind::Operator(Operator::Equal), 1),
            (_, '<') => (Kind::Operator(Operator::Less), 1),
            (_, '>') => (Kind::Operator(Operator::Greater), 1),
            (_, '~') => (Kind::Operator(Operator::Like), 1),
            (_, '(') => (Kind::Open, 1),
            (_, ')') => (Kind::Close, 1),
            (_, ',') => (Kind::Comma, 1),
            (_, '!') => {
                return Err(FilterError::new("`!` alone means nothing", at..at + 1)
                    .hint("write `not`, or `!=`"));
            }
            _ => {
                let (parts, length) = word(text, at)?;
                (Kind::Word(parts), length)
            }
        };
        tokens.push(Token {
            kind,
            at: at..at + length,
        });
        at += length;
    }
    Ok(tokens)
}

/// A word that begins at `start`, and its length: up to a space or operator outside quotes.
fn word(text: &str, start: usize) -> Result<(Vec<NamePart>, usize), FilterError> {
    let mut parts = vec![NamePart::default()];
    let mut characters = text[start..].char_indices();
    while let Some((place, character)) = characters.next() {
        // There is always a last part.
        let Some(part) = parts.last_mut() else { break };
        match character {
            '"' | '\'' => {
                let inside = &text[start + place + 1..];
                let Some(length) = inside.find(character) else {
                    let at = start + place..text.len();
                    return Err(FilterError::new(format!("unclosed quote {character}"), at));
                };
                part.text.push_str(&inside[..length]);
                part.quoted = true;
                let end = place + 1 + length;
                characters.by_ref().find(|(place, _)| *place == end);
            }
            '.' => parts.push(NamePart::default()),
            c if c.is_whitespace() || "()=<>!~,".contains(c) => return Ok((parts, place)),
            c => part.text.push(c),
        }
    }
    Ok((parts, text.len() - start))
}

struct Parser<'t> {
    tokens: &'t [Token],
    /// Length of the text.
    end: usize,
    depth: usize,
    /// Conditions and values so far.
    terms: usize,
}

/// Maximum conditions and values of a filter: SQLite allows a thousand.
const MOST_TERMS: usize = 500;

impl<'t> Parser<'t> {
    fn expr(&mut self) -> Result<Expr, FilterError> {
        self.depth += 1;
        if self.depth > 100 {
            return Err(FilterError::new("too many parentheses", self.here()));
        }
        let mut any = vec![self.all()?];
        while self.takes_word("or") {
            any.push(self.all()?);
        }
        self.depth -= 1;
        Ok(one_or(any, Expr::Or))
    }

    fn all(&mut self) -> Result<Expr, FilterError> {
        let mut all = vec![self.one()?];
        while self.takes_word("and") {
            all.push(self.one()?);
        }
        Ok(one_or(all, Expr::And))
    }

    fn one(&mut self) -> Result<Expr, FilterError> {
        let mut negated = false;
        while self.takes_word("not") {
            negated = !negated;
        }
        let expr = if self.takes(&Kind::Open) {
            let expr = self.expr()?;
            self.expect(&Kind::Close, "`)`")?;
            expr
        } else {
            self.comparison()?
        };
        Ok(if negated {
            Expr::Not(Box::new(expr))
        } else {
            expr
        })
    }

    /// Counts another condition or value.
    fn count(&mut self) -> Result<(), FilterError> {
        self.terms += 1;
        match self.terms > MOST_TERMS {
            true => {
                let message = format!("more than {MOST_TERMS} conditions and values");
                Err(FilterError::new(message, self.here())
                    .hint("ask in several pieces, or by `retort query`"))
            }
            false => Ok(()),
        }
    }

    fn comparison(&mut self) -> Result<Expr, FilterError> {
        self.count()?;
        let field = self.field()?;
        if let Some(Token {
            kind: Kind::Operator(operator),
            ..
        }) = self.tokens.first()
        {
            self.tokens = &self.tokens[1..];
            return Ok(Expr::Compare(field, *operator, self.value()?));
        }
        let negated = self.takes_word("not");
        if !self.takes_word("in") {
            return match negated {
                true => Err(FilterError::new("expected `in`", self.here())),
                false => Ok(Expr::Has(field)),
            };
        }
        self.expect(&Kind::Open, "`(`")?;
        let mut values = vec![self.value()?];
        while self.takes(&Kind::Comma) {
            self.count()?;
            values.push(self.value()?);
        }
        self.expect(&Kind::Close, "`,` or `)`")?;
        let found = Expr::In(field, values);
        Ok(if negated {
            Expr::Not(Box::new(found))
        } else {
            found
        })
    }

    fn field(&mut self) -> Result<Field, FilterError> {
        let (parts, at) = self.word().ok_or_else(|| {
            FilterError::new("expected a field", self.here()).hint(
                "for example `state`, `recipe`, `tag`, `params.student.train.steps`, `metrics.loss.last`",
            )
        })?;
        let parts = parts.iter().map(|part| part.text.clone()).collect();
        Ok(Field { parts, at })
    }

    fn value(&mut self) -> Result<Value, FilterError> {
        let (parts, at) = self
            .word()
            .ok_or_else(|| FilterError::new("expected a value", self.here()))?;
        let texts: Vec<&str> = parts.iter().map(|part| part.text.as_str()).collect();
        Ok(Value {
            text: texts.join("."),
            quoted: parts.iter().any(|part| part.quoted),
            at,
        })
    }

    /// Takes the next token if it is a word but not a keyword.
    fn word(&mut self) -> Option<(&'t [NamePart], Range<usize>)> {
        let (token, rest) = self.tokens.split_first()?;
        match &token.kind {
            Kind::Word(parts) if !is_keyword(parts) => {
                self.tokens = rest;
                Some((parts, token.at.clone()))
            }
            _ => None,
        }
    }

    /// The position of the next token, or the end.
    fn here(&self) -> Range<usize> {
        self.tokens
            .first()
            .map_or(self.end..self.end, |token| token.at.clone())
    }

    fn takes(&mut self, kind: &Kind) -> bool {
        let found = self.tokens.first().is_some_and(|token| token.kind == *kind);
        if found {
            self.tokens = &self.tokens[1..];
        }
        found
    }

    fn takes_word(&mut self, word: &str) -> bool {
        let found = self
            .tokens
            .first()
            .is_some_and(|token| matches!(&token.kind, Kind::Word(parts) if is_word(parts, word)));
        if found {
            self.tokens = &self.tokens[1..];
        }
        found
    }

    fn expect(&mut self, kind: &Kind, what: &str) -> Result<(), FilterError> {
        match self.takes(kind) {
            true => Ok(()),
            false => Err(FilterError::new(format!("expected {what}"), self.here())),
        }
    }
}

fn one_or(mut parts: Vec<Expr>, many: fn(Vec<Expr>) -> Expr) -> Expr {
    match parts.len() {
        1 => parts.remove(0),
        _ => many(parts),
    }
}

fn is_keyword(parts: &[NamePart]) -> bool {
    ["and", "or", "not", "in"]
        .iter()
        .any(|word| is_word(parts, word))
}

fn is_word(parts: &[NamePart], word: &str) -> bool {
    matches!(parts, [part] if !part.quoted && part.text.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A filter in compact form, with all parentheses.
    fn brief(expr: &Expr) -> String {
        let join = |parts: &[Expr], word: &str| {
            let parts: Vec<String> = parts.iter().map(brief).collect();
            format!("({})", parts.join(word))
        };
        match expr {
            Expr::And(parts) => join(parts, " & "),
            Expr::Or(parts) => join(parts, " | "),
            Expr::Not(part) => format!("!{}", brief(part)),
            Expr::Has(field) => field.parts.join("."),
            Expr::Compare(field, operator, value) => {
                format!("{}:{operator:?}:{}", field.parts.join("."), value.text)
            }
            Expr::In(field, values) => {
                let values: Vec<&str> = values.iter().map(|value| value.text.as_str()).collect();
                format!("{}:{}", field.parts.join("."), values.join(","))
            }
        }
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        assert_eq!(brief(&parse(text).unwrap().expr), expected);
    }

    #[track_caller]
    fn check_error(text: &str, message: &str, marked: &str) {
        let error = parse(text).unwrap_err();
        assert_eq!(error.message, message);
        assert_eq!(error.marked().lines().nth(3).unwrap(), marked);
    }

    #[test]
    fn and_binds_tighter_than_or_and_not_tightest() {
        check(
            "metrics.fd.last < 3 and params.distill.steps >= 2000",
            "(metrics.fd.last:Less:3 & params.distill.steps:GreaterOrEqual:2000)",
        );
        check("a or b and not c", "(a | (b & !c))");
        check("NOT (a or b) AND c", "(!(a | b) & c)");
        check("not not a", "a");
        check(
            "a in (1, 2.5,'x y') or b not in (c)",
            "(a:1,2.5,x y | !b:c)",
        );
    }

    #[test]
    fn names_and_values_may_be_anything() {
        check(
            "metrics.\"odd, name\".last=1e-3",
            "metrics.odd, name.last:Equal:1e-3",
        );
        check("tag='größte \"alle\"'", "tag:Equal:größte \"alle\"");
        check(
            "metrics.distill/loss.min<-0.5",
            "metrics.distill/loss.min:Less:-0.5",
        );
        check("note ~ 'and'", "note:Like:and");
        let Expr::Compare(_, _, value) = parse("x = '3'").unwrap().expr else {
            panic!()
        };
        assert_eq!((value.number(), value.quoted), (None, true));
    }

    #[test]
    fn numbers_are_told_from_words() {
        let number = |text: &str| {
            let value = Value {
                text: text.into(),
                quoted: false,
                at: 0..0,
            };
            value.number()
        };
        assert_eq!(number("2_000"), Some(2000.0));
        assert_eq!(number("-Inf"), Some(f64::NEG_INFINITY));
        for word in ["nan", "1.2.3", "failed", "e5x"] {
            assert_eq!(number(word), None, "{word}");
        }
    }

    #[test]
    fn errors_point_at_the_place() {
        check_error("state = ", "expected a value", "  |         ^");
        check_error("(a or b", "expected `)`", "  |        ^");
        check_error(
            "ä = failed tags",
            "expected `and`, `or` or the end",
            "  |            ^^^^",
        );
        check_error("a and or b", "expected a field", "  |       ^^");
        check_error("a = 'b", "unclosed quote '", "  |     ^^");
        check_error("a ! b", "`!` alone means nothing", "  |   ^");
        check_error("a not b", "expected `in`", "  |       ^");
        check_error("", "expected a field", "  | ^");
        check_error("漢字 = 'b", "unclosed quote '", "  |        ^^");
        assert!(parse(&"(".repeat(100_000)).is_err());
    }
}
