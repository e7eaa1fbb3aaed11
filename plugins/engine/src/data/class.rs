//! Classes by name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::error::{DataError, shown};

/// The numbering of classes: numbers keep their value, other names are numbered alphabetically.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classes {
    /// Name of each class.
    pub names: Vec<String>,
    /// The class of each name as written.
    by_name: BTreeMap<String, u32>,
    /// Whether only some names are numbers: then all are ordered alphabetically.
    pub mixed: bool,
}

/// The longest name of a class.
pub const LONGEST: usize = 1024;

/// The most classes.
const MOST: usize = 1 << 18;

/// Refuses more classes than there may be.
pub fn limit(path: &Path, classes: usize) -> Result<(), DataError> {
    within(classes).map_err(|message| DataError::content(path, message))
}

/// The same as a message, for callers that do not know the file.
pub fn within(classes: usize) -> Result<(), String> {
    match classes <= MOST {
        true => Ok(()),
        false => Err(format!(
            "more than {MOST} classes, the most there may be; are these captions, or names of files?"
        )),
    }
}

/// Refuses names that are too long to print, or would disturb a terminal.
pub fn named<'n>(
    path: &Path,
    names: impl IntoIterator<Item = &'n String>,
) -> Result<(), DataError> {
    let is_name = |name: &String| name.len() <= LONGEST && !name.chars().any(char::is_control);
    match names.into_iter().find(|name| !is_name(name)) {
        None => Ok(()),
        Some(wrong) => {
            let message = format!(
                "a class of the name `{}`; names have at most {LONGEST} bytes, and no control characters",
                shown(wrong)
            );
            Err(DataError::content(path, message))
        }
    }
}

/// The class that a text denotes: `3`, or `3.0` as written by pandas.
pub fn number(text: &str) -> Option<u64> {
    let whole = match text.split_once('.') {
        Some((whole, zeros)) if !zeros.is_empty() && zeros.bytes().all(|b| b == b'0') => whole,
        Some(_) => return None,
        None => text,
    };
    let digits = !whole.is_empty() && whole.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| whole.parse().ok()).flatten()
}

impl Classes {
    /// Orders the names found at `path`. `apart`: whether they are folders, where two names for one number are refused; in a
    /// table they are one class.
    pub fn new(
        path: &Path,
        found: impl IntoIterator<Item = String>,
        folders: bool,
    ) -> Result<Self, DataError> {
        let mut names = BTreeSet::new();
        for name in found {
            names.insert(name);
            limit(path, names.len())?;
        }
        named(path, &names)?;
        let numbers: Vec<Option<u64>> = names.iter().map(|name| number(name)).collect();
        if numbers.contains(&None) {
            let mixed = numbers.iter().any(Option::is_some);
            let by_name = names.iter().cloned().zip(0..).collect();
            return Ok(Self {
                names: names.into_iter().collect(),
                by_name,
                mixed,
            });
        }
        let mut first: BTreeMap<u64, &String> = BTreeMap::new();
        for (number, name) in numbers.iter().flatten().zip(&names) {
            if let Some(other) = first.insert(*number, name)
                && folders
            {
                let message =
                    format!("folders `{other}` and `{name}` both mean class {number}; rename one");
                return Err(DataError::content(path, message));
            }
        }
        contiguous(path, first.keys().copied())?;
        Ok(Self {
            names: first.keys().map(u64::to_string).collect(),
            by_name: names
                .iter()
                .zip(&numbers)
                .map(|(name, number)| (name.clone(), number.unwrap_or(0) as u32))
                .collect(),
            mixed: false,
        })
    }

    /// The class of a name that was among those found.
    pub fn of(&self, name: &str) -> u32 {
        self.by_name.get(name).copied().unwrap_or(0)
    }
}

/// Refuses classes, in ascending order, with a gap.
pub fn contiguous(path: &Path, classes: impl IntoIterator<Item = u64>) -> Result<(), DataError> {
    let (mut missing, mut last) = (None, 0);
    for (class, expected) in classes.into_iter().zip(0u64..) {
        if class != expected {
            missing.get_or_insert(expected);
        }
        last = class;
    }
    match missing {
        None => Ok(()),
        Some(missing) => Err(DataError::ClassGap {
            path: path.to_owned(),
            missing,
            last,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(names: &[&str], folders: bool) -> Result<Vec<String>, String> {
        let names = names.iter().map(|name| (*name).to_owned());
        let classes = Classes::new(Path::new("x"), names, folders);
        classes.map(|c| c.names).map_err(|error| error.to_string())
    }

    #[test]
    fn numbers_order_by_number_and_names_by_the_alphabet() {
        let numbers = ["2", "10", "1", "0", "3", "4", "5", "6", "7", "8", "9"];
        assert_eq!(order(&numbers, true).unwrap()[10], "10");
        assert_eq!(order(&["dog", "cat", "cat"], true).unwrap(), ["cat", "dog"]);
        let mixed =
            Classes::new(Path::new("x"), ["2", "cat", "10"].map(str::to_owned), true).unwrap();
        assert_eq!((mixed.mixed, mixed.of("10"), mixed.of("2")), (true, 0, 1));
    }

    #[test]
    fn two_names_of_one_number() {
        let error = order(&["0", "00", "1"], true).unwrap_err();
        assert_eq!(
            error,
            "x: folders `0` and `00` both mean class 0; rename one"
        );
        assert_eq!(order(&["0", "0.0", "1.0"], false).unwrap(), ["0", "1"]);
        let error = order(&["0", "2"], false).unwrap_err();
        assert!(
            error.contains("class 1 has no image, though classes go up to 2"),
            "{error}"
        );
        for name in ["a\nb", "\x1b[2J", &"x".repeat(2000)] {
            let error = order(&["b", name], true).unwrap_err();
            assert!(error.starts_with("x: a class of the name `") && error.len() < 400);
            assert!(!error.contains(char::is_control), "{error}");
        }
        for text in ["", "-1", "1.5", "1.", "1e3", "+1", "99999999999999999999"] {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
