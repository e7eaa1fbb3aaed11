//! Parameters as typed, and the points of a grid.
//!
//! `PATH=A,B,C` are values, `PATH=1..5` whole numbers, `PATH=0.1..1` numbers, to be drawn from, `PATH=0.1..1/4` four of
//! them, `PATH=log:1e-4..1e-2` numbers whose logarithms are even. A value is a value of `--set`: commas in brackets or
//! quotes belong to it.

use super::draw::{between, plain};
use super::{MAX_POINTS, Parameter, RandomSearch, Sweep, Values, draw};
use std::collections::HashSet;

/// Why there are no points.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SpaceError {
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

impl SpaceError {
    pub(super) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: hint.into(),
        }
    }
}

impl Parameter {
    /// Reads what was given with `--sweep`.
    ///
    /// # Errors
    /// [`SpaceError`], when it is not as described above.
    pub fn parse(text: &str) -> Result<Self, SpaceError> {
        let wrong = |message: String| {
            SpaceError::new(
                format!("`--sweep {text}`: {message}"),
                "write --sweep path=1e-3,2e-3 or --sweep path=1..5; `retort help run` has all forms",
            )
        };
        let Some((path, values)) = text.split_once('=') else {
            return Err(wrong("a `=` is missing".to_owned()));
        };
        let path = path.trim().to_owned();
        if path.is_empty() {
            return Err(wrong("there is no path before the `=`".to_owned()));
        }
        let values = Values::parse(values).map_err(wrong)?;
        Ok(Self { path, values })
    }
}

impl Values {
    fn parse(text: &str) -> Result<Self, String> {
        if let Some(range) = Self::range(text.trim())? {
            return Ok(range);
        }
        let items = items(text);
        if let Some(empty) = items.iter().position(String::is_empty) {
            return Err(format!("value {} is empty", empty + 1));
        }
        let mut seen = HashSet::new();
        if let Some(item) = items.iter().find(|item| !seen.insert(item.as_str())) {
            return Err(format!("the value `{item}` is there twice"));
        }
        Ok(Self::Choice(items))
    }

    /// A range, if the text is one.
    fn range(text: &str) -> Result<Option<Self>, String> {
        let (log, rest) = match text.strip_prefix("log:") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (rest, count) = match rest.split_once('/') {
            Some((rest, count)) => (rest, Some(count)),
            None => (rest, None),
        };
        let ends = rest
            .split_once("..")
            .map(|(min, max)| (min.trim(), max.trim()));
        let Some((min, max)) = ends else {
            return match log {
                true => Err("expected `log:MIN..MAX`".to_owned()),
                false => Ok(None),
            };
        };
        if let (Ok(min), Ok(max), None) = (min.parse(), max.parse(), count) {
            return Self::whole(min, max, log).map(Some);
        }
        let (Ok(min), Ok(max)) = (min.parse(), max.parse()) else {
            // `../data.csv` is a value.
            return match log {
                true => Err(format!("`{rest}` is not a range of numbers")),
                false => Ok(None),
            };
        };
        let count = count.map(|count| {
            let parsed = count.trim().parse::<u32>().ok();
            parsed.ok_or_else(|| format!("`{count}` is not a number of values"))
        });
        Self::real(min, max, log, count.transpose()?).map(Some)
    }

    pub(super) fn whole(min: i64, max: i64, log: bool) -> Result<Self, String> {
        match (min <= max, log && min < 1) {
            (false, _) => Err(format!("{min} is greater than {max}")),
            (_, true) => Err("a logarithm needs numbers above 0".to_owned()),
            _ => Ok(Self::Whole { min, max, log }),
        }
    }

    pub(super) fn real(min: f64, max: f64, log: bool, count: Option<u32>) -> Result<Self, String> {
        if !(min.is_finite() && max.is_finite() && (max - min).is_finite()) {
            return Err("a range has two finite numbers".to_owned());
        }
        match (min < max, log && min <= 0.0, count) {
            (false, ..) => Err(format!("{min} is not less than {max}")),
            (_, true, _) => Err("a logarithm needs numbers above 0".to_owned()),
            (_, _, Some(0 | 1)) => Err("a range has at least two values".to_owned()),
            _ => Ok(Self::Real {
                min,
                max,
                log,
                count,
            }),
        }
    }

    /// Whether they are values that can be written: a recorded sweep may come from elsewhere.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        match *self {
            Self::Choice(ref values) if values.is_empty() => Err("no values".to_owned()),
            Self::Choice(_) => Ok(()),
            Self::Whole { min, max, log } => Self::whole(min, max, log).map(drop),
            Self::Real {
                min,
                max,
                log,
                count,
            } => Self::real(min, max, log, count).map(drop),
        }
    }

    /// How many values there are; none where they are not counted.
    pub(super) fn count(&self) -> Option<u64> {
        match self {
            Self::Choice(values) => Some(values.len() as u64),
            // At most 2^64 - 1: the whole range of i64 has one more, which no grid of it would be different for.
            Self::Whole { min, max, .. } => Some(max.abs_diff(*min).saturating_add(1)),
            Self::Real { count, .. } => count.map(u64::from),
        }
    }

    /// One of the values that are counted, as text.
    pub(super) fn at(&self, index: u64) -> String {
        match self {
            Self::Choice(values) => values
                .get(usize::try_from(index).unwrap_or(usize::MAX))
                .cloned()
                .unwrap_or_default(),
            Self::Whole { min, .. } => min.saturating_add_unsigned(index).to_string(),
            Self::Real {
                min,
                max,
                log,
                count,
            } => {
                let part = index as f64 / (f64::from(count.unwrap_or(2)) - 1.0);
                plain(between(*min, *max, *log, part))
            }
        }
    }
}

impl Sweep {
    /// The values of each point, as `--set` has them.
    ///
    /// # Errors
    /// [`SpaceError`]: there are too many, or they cannot be counted.
    pub fn points(&self) -> Result<Vec<Vec<String>>, SpaceError> {
        for (place, parameter) in self.parameters.iter().enumerate() {
            let path = &parameter.path;
            parameter.values.check().map_err(|message| {
                SpaceError::new(format!("`{path}`: {message}"), "correct the range")
            })?;
            if self.parameters[..place]
                .iter()
                .any(|other| other.path == *path)
            {
                return Err(SpaceError::new(
                    format!("`{path}` is varied twice"),
                    "name all its values in one place",
                ));
            }
        }
        if self.parameters.is_empty() {
            return Err(SpaceError::new(
                "nothing is varied",
                "name values with --sweep path=1,2, or in the recipe's `sweep.parameters`",
            ));
        }
        match self.sample {
            Some(sample) => self.drawn(sample),
            None => self.grid(),
        }
    }

    /// The message if fewer points were found than are to be drawn.
    pub fn shortage(&self, found: usize) -> Option<String> {
        let asked = self.sample?.count as usize;
        (found < asked).then(|| {
            format!("--sample asks for {asked} points, but these values give only {found}")
        })
    }

    /// How many points a grid has; none where values are not counted.
    fn size(&self) -> Option<u64> {
        let mut counts = self
            .parameters
            .iter()
            .map(|parameter| parameter.values.count());
        counts.try_fold(1_u64, |product, count| Some(product.saturating_mul(count?)))
    }

    fn grid(&self) -> Result<Vec<Vec<String>>, SpaceError> {
        let uncounted = self.parameters.iter().find(|parameter| {
            let values = &parameter.values;
            values.count().is_none()
        });
        if let Some(parameter) = uncounted {
            return Err(SpaceError::new(
                format!(
                    "a grid cannot have all numbers of the range of `{}`",
                    parameter.path
                ),
                "say how many (0.1..1/5, or `count: 5`), list them, or draw points with --sample 20",
            ));
        }
        let size = self.size().unwrap_or(u64::MAX);
        if size > MAX_POINTS {
            let counts: Vec<String> = self
                .parameters
                .iter()
                .filter_map(|parameter| Some(parameter.values.count()?.to_string()))
                .collect();
            let product = match counts.len() {
                1 => String::new(),
                _ => format!(" ({})", counts.join(" x ")),
            };
            let number = match size {
                u64::MAX => "more than 10^19".to_owned(),
                size => size.to_string(),
            };
            return Err(SpaceError::new(
                format!("the grid has {number} points{product}; a sweep has at most {MAX_POINTS}"),
                "vary less, or draw points with --sample 20",
            ));
        }
        Ok((0..size).map(|index| self.point(index)).collect())
    }

    /// A point of the grid: the last parameter varies first.
    fn point(&self, mut index: u64) -> Vec<String> {
        let mut settings: Vec<String> = Vec::with_capacity(self.parameters.len());
        for Parameter { path, values } in self.parameters.iter().rev() {
            let count = values.count().unwrap_or(1).max(1);
            settings.push(format!("{path}={}", values.at(index % count)));
            index /= count;
        }
        settings.reverse();
        settings
    }

    /// Points that are drawn, each once.
    fn drawn(
        &self,
        RandomSearch { count, seed }: RandomSearch,
    ) -> Result<Vec<Vec<String>>, SpaceError> {
        if u64::from(count) > MAX_POINTS || count == 0 {
            return Err(SpaceError::new(
                format!("{count} points cannot be drawn; a sweep has 1 to {MAX_POINTS}"),
                "say a smaller number with --sample",
            ));
        }
        if let Some(size) = self.size().filter(|&size| size <= u64::from(count)) {
            // All there are.
            return Ok((0..size).map(|index| self.point(index)).collect());
        }
        Ok(draw::points(&self.parameters, count, seed))
    }
}

/// A text in pieces between commas, but for those in brackets or quotes.
fn items(text: &str) -> Vec<String> {
    let (mut items, mut item) = (Vec::new(), String::new());
    let (mut depth, mut quote) = (0_usize, None);
    for character in text.chars() {
        match (character, quote) {
            (_, Some(open)) if character == open => quote = None,
            (_, Some(_)) => {}
            // A quote within a word is an apostrophe.
            ('"' | '\'', None) if depth > 0 || item.trim().is_empty() => quote = Some(character),
            ('[' | '{', None) => depth += 1,
            (']' | '}', None) => depth = depth.saturating_sub(1),
            (',', None) if depth == 0 => {
                items.push(std::mem::take(&mut item).trim().to_owned());
                continue;
            }
            _ => {}
        }
        item.push(character);
    }
    items.push(item.trim().to_owned());
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep(parameters: &[&str], sample: Option<RandomSearch>) -> Sweep {
        Sweep {
            parameters: parameters
                .iter()
                .map(|text| Parameter::parse(text).unwrap())
                .collect(),
            objective: None,
            sample,
            asha: None,
        }
    }

    #[test]
    fn a_grid_has_every_combination() {
        let points = sweep(&["a.lr=1e-3,2e-3", "seed=1..3"], None)
            .points()
            .unwrap();
        let joined: Vec<String> = points.iter().map(|point| point.join(" ")).collect();
        assert_eq!(
            joined,
            [
                "a.lr=1e-3 seed=1",
                "a.lr=1e-3 seed=2",
                "a.lr=1e-3 seed=3",
                "a.lr=2e-3 seed=1",
                "a.lr=2e-3 seed=2",
                "a.lr=2e-3 seed=3",
            ]
        );
    }

    #[test]
    fn values_are_told_apart() {
        let values = |text: &str| Values::parse(text).unwrap();
        let choice =
            |items: &[&str]| Values::Choice(items.iter().map(|item| (*item).to_owned()).collect());
        assert_eq!(values("a, b"), choice(&["a", "b"]));
        assert_eq!(values("[0, 6],[0]"), choice(&["[0, 6]", "[0]"]));
        assert_eq!(
            values("{a: 1, b: [2,3]},'x,y'"),
            choice(&["{a: 1, b: [2,3]}", "'x,y'"])
        );
        assert_eq!(values("don't,won't"), choice(&["don't", "won't"]));
        assert_eq!(
            values("../a.csv,../b.csv"),
            choice(&["../a.csv", "../b.csv"])
        );
        let whole = |min, max, log| Values::Whole { min, max, log };
        assert_eq!(values("-1..5"), whole(-1, 5, false));
        assert_eq!(values("log:1..1000"), whole(1, 1000, true));
        assert_eq!(
            values("log:1e-4..1e-2/3"),
            Values::Real {
                min: 1e-4,
                max: 1e-2,
                log: true,
                count: Some(3)
            }
        );
    }

    #[test]
    fn wrong_values_are_refused() {
        let check = |text: &str, part: &str| {
            let error = Parameter::parse(text).unwrap_err();
            assert!(error.message.contains(part), "{}", error.message);
        };
        check("seed", "a `=` is missing");
        check("=1", "no path");
        check("seed=1,,2", "value 2 is empty");
        check("seed=", "value 1 is empty");
        check("seed=1,1", "`1` is there twice");
        check("seed=5..1", "5 is greater than 1");
        check("lr=log:0..1", "above 0");
        check("lr=log:x", "log:MIN..MAX");
        check("lr=0.1..0.5/1", "at least two");
        check("lr=0.1..inf", "finite");
        check("lr=0.1..0.5/x", "`x` is not a number of values");
    }

    #[test]
    fn fewer_points_than_are_to_be_drawn_are_said() {
        let said = |parameters: &[&str], count| {
            let sweep = sweep(parameters, Some(RandomSearch { count, seed: 1 }));
            sweep.shortage(sweep.points().unwrap().len())
        };
        assert_eq!(
            said(&["seed=1..5"], 20).unwrap(),
            "--sample asks for 20 points, but these values give only 5"
        );
        assert_eq!(said(&["seed=1..5"], 5), None);
        assert_eq!(said(&["seed=1..50"], 20), None);
        // Numbers are written with six digits: there are few between these.
        assert_eq!(
            said(&["lr=1..1.00003"], 20).unwrap(),
            "--sample asks for 20 points, but these values give only 4"
        );
        let none = sweep(&["seed=1..5"], None);
        assert_eq!(none.shortage(5), None);
    }

    #[test]
    fn too_many_points_are_counted_and_not_made() {
        let message = |parameters: &[&str], sample| {
            let error = sweep(parameters, sample).points().unwrap_err();
            error.message
        };
        assert_eq!(
            message(&["seed=1..1000000000"], None),
            "the grid has 1000000000 points; a sweep has at most 10000"
        );
        assert!(
            message(&["a=1..1000", "b=1..1000"], None).contains("1000000 points (1000 x 1000)")
        );
        let all = format!("{}..{}", i64::MIN, i64::MAX);
        let all = [format!("a={all}"), format!("b={all}")];
        assert!(message(&[&all[0], &all[1]], None).contains("more than 10^19"));
        assert!(message(&["a=0.1..1"], None).contains("all numbers of the range of `a`"));
        assert!(message(&["a=1,2", "a=3"], None).contains("`a` is varied twice"));
        let sample = Some(RandomSearch {
            count: 20_000,
            seed: 0,
        });
        assert!(message(&["a=1..5"], sample).contains("20000 points cannot be drawn"));
    }

    #[test]
    fn ranges_are_divided_evenly() {
        let values = Values::parse("log:1e-4..1e-2/3").unwrap();
        let all: Vec<String> = (0..3).map(|index| values.at(index)).collect();
        assert_eq!(all, ["0.0001", "0.001", "0.01"]);
        let values = Values::parse("0..1/4").unwrap();
        assert_eq!(values.at(1), "0.333333");
        assert_eq!(
            (plain(1.5e-7), plain(0.0), plain(3e9)),
            ("1.5e-7".into(), "0".into(), "3e9".into())
        );
    }
}
