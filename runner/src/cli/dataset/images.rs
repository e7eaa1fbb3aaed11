//! `retort dataset info` of prepared images: their shape, and how many there are of each class, from `images.json` and
//! `manifest.jsonl`.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use retort_checkpoint::sample_shards::MANIFEST;
use retort_checkpoint::{json, regular};
use serde::Deserialize;

use super::{class_names, of_each};
use crate::cli::{Error, Exit};
use crate::table::Rows;

const DESCRIPTION: &str = "images.json";
/// Bytes of the longest description that is read.
const LONGEST_DESCRIPTION: u64 = 64 << 20;
/// A row for each source file.
const SOURCES: &str = "manifest.jsonl";
/// Bytes of its longest line that is read.
const LONGEST_ROW: u64 = 8 << 20;

/// The relevant part of the description.
#[derive(Debug, Deserialize)]
struct Description {
    count: u64,
    channels: u64,
    height: u64,
    width: u64,
    classes: Vec<String>,
    #[serde(default)]
    damaged: u64,
}

/// The relevant part of a row; a file that was left out has no label.
#[derive(Debug, Deserialize)]
struct SourceRow {
    label: Option<u32>,
}

/// Whether a folder has prepared images.
pub(super) fn are_in(folder: &Path) -> bool {
    folder.is_dir() && folder.join(DESCRIPTION).exists() && !folder.join(MANIFEST).exists()
}

/// What there is to say about them: a row for each fact.
pub(super) fn facts(dir: &Path) -> Result<Rows, Error> {
    let path = dir.join(DESCRIPTION);
    let found: Description = regular::read(&path, LONGEST_DESCRIPTION)
        .and_then(|text| Ok(json::parse(&text)?))
        .map_err(|error| failed(&path, &error))?;
    let path = dir.join(SOURCES);
    let counts = counts(&path, found.classes.len()).map_err(|error| failed(&path, &error))?;
    let mut rows = Rows::new(&["fact", "value"]);
    for (name, value) in [
        ("folder", dir.display().to_string().into()),
        ("images", found.count.into()),
        ("channels", found.channels.into()),
        ("height", found.height.into()),
        ("width", found.width.into()),
        ("classes", (found.classes.len() as u64).into()),
        ("class_names", class_names(&found.classes)),
        ("images_of_each", of_each(&counts, &found.classes)),
        ("damaged", found.damaged.into()),
    ] {
        rows.push([name.into(), value]);
    }
    Ok(rows)
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::new(Exit::Internal, format!("{}: {error}", path.display()))
}

/// Images of each class.
fn counts(path: &Path, classes: usize) -> io::Result<BTreeMap<u32, u64>> {
    let mut reader = BufReader::new(regular::open(path)?);
    let (mut counts, mut line) = (BTreeMap::new(), Vec::new());
    let mut number = 0_u64;
    loop {
        line.clear();
        number += 1;
        let invalid = |message: String| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("line {number}: {message}"),
            )
        };
        let mut bounded = (&mut reader).take(LONGEST_ROW);
        if bounded.read_until(b'\n', &mut line)? == 0 {
            return Ok(counts);
        }
        let row: SourceRow = json::parse(&line).map_err(|error| invalid(error.to_string()))?;
        let Some(label) = row.label else {
            continue;
        };
        if label as usize >= classes {
            return Err(invalid(format!(
                "label {label}, expected labels below {classes}"
            )));
        }
        *counts.entry(label).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_each_class_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOURCES);
        let good = "{\"image\": 0, \"label\": 1}\n{\"file\": \"a.png\", \"damaged\": \"cut\"}\n";
        std::fs::write(&path, good).unwrap();
        assert_eq!(counts(&path, 2).unwrap(), BTreeMap::from([(1, 1)]));
        for (bad, expected) in [
            ("{\"label\": 2}", "line 3: label 2, expected labels below 2"),
            ("{\"label\": ", "line 3: "),
        ] {
            std::fs::write(&path, format!("{good}{bad}\n")).unwrap();
            let error = counts(&path, 2).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
