//! Tar archives of image files, as they lie: which bytes of an archive are which file.
//!
//! Read here are the headers that GNU tar, BSD tar and Python write (ustar, long names, pax paths and sizes). Nothing is
//! unpacked: images are decoded from the bytes in their place. Deliberately absent: compressed archives, which could be
//! read from the beginning only, and sparse files.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use std::sync::Arc;

use retort_checkpoint::images::promises_image;
use retort_checkpoint::json;
use retort_checkpoint::sign::{TAR_BLOCK, is_tar_header, tar_number};
use serde_json::Value;

use super::error::{DataError, shown};
use super::table::{Held, LONGEST_PATH, Row, cost};
use super::{file, table};

/// A file in an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where its bytes begin.
    pub start: u64,
    /// How many there are.
    pub size: u64,
}

/// The longest name, class or caption that is read.
const LONGEST_TEXT: u64 = 1 << 16;

/// Bytes of an entry of [`Beside`], with what a tree takes.
const BESIDE: usize = 80;

const BLOCK: u64 = TAR_BLOCK as u64;

/// Opens an archive.
pub fn open(path: &Path) -> Result<File, DataError> {
    let expected = "a tar archive (for a folder of archives, `folder:`)";
    file::open(path, expected)
}

/// What lies beside images in an archive, by what is common to their names: class and caption.
type Beside = BTreeMap<Box<str>, (Option<Arc<str>>, Option<Box<str>>)>;

/// The image files of an archive with their classes and captions, in the order of the archive; and their places. `held` is
/// what is held of all archives of a source.
pub fn read(path: &Path, held: &mut Held) -> Result<Vec<(Row, Part)>, DataError> {
    let file = open(path)?;
    let metadata = file
        .metadata()
        .map_err(|e| DataError::read(path, "file", e))?;
    let mut archive = Archive {
        path,
        file: BufReader::new(file),
        size: metadata.len(),
        at: 0,
    };
    let mut images = Vec::new();
    let mut beside = Beside::new();
    let full = |message: String| DataError::content(path, message);
    while let Some((name, part)) = archive.next()? {
        if is_hidden(&name) {
            continue;
        }
        let (key, ending) = split(&name);
        let text = |archive: &mut Archive| archive.text(part);
        let ending = ending.to_ascii_lowercase();
        let ending = ending.as_str();
        if matches!(ending, "cls" | "class" | "txt" | "caption" | "json")
            && !beside.contains_key(key)
        {
            held.take(BESIDE + cost(key)).map_err(full)?;
            beside.insert(key.into(), (None, None));
        }
        match ending {
            "cls" | "class" => {
                let label = held.label(&text(&mut archive)?).map_err(full)?;
                beside.entry(key.into()).or_default().0 = Some(label);
            }
            "txt" | "caption" => {
                let caption = text(&mut archive)?;
                held.take(cost(&caption)).map_err(full)?;
                beside.entry(key.into()).or_default().1 = Some(caption.into());
            }
            "json" => {
                let text = text(&mut archive)?;
                let value: Value = json::parse(text.as_bytes()).map_err(|error| {
                    let name = shown(&name);
                    DataError::content(path, format!("{name}: expected JSON: {error}"))
                })?;
                let field = |names: [&str; 3]| {
                    let text = table::text(&value, &names);
                    text.map_err(|message| {
                        DataError::content(path, format!("{}: {message}", shown(&name)))
                    })
                };
                let label = field(["label", "class", "cls"])?.map(|label| held.label(&label));
                let label = label.transpose().map_err(full)?;
                let caption = field(["caption", "text", "prompt"])?;
                held.take(caption.as_deref().map_or(0, cost))
                    .map_err(full)?;
                let entry = beside.entry(key.into()).or_default();
                entry.0 = entry.0.take().or(label);
                entry.1 = entry.1.take().or(caption.map(Into::into));
            }
            _ => {
                let row = Row {
                    file: name.into(),
                    label: None,
                    caption: None,
                    line: 0,
                };
                held.add(&row).map_err(full)?;
                images.push((row, part));
            }
        }
    }
    let mut names: Vec<&str> = images.iter().map(|(row, _)| &*row.file).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let message = format!(
            "{} is in it twice, as `tar -r` and `tar -u` leave it; unpack it and pack it again",
            shown(twice[0])
        );
        return Err(DataError::content(path, message));
    }
    for (row, _) in &mut images {
        if let Some((label, caption)) = beside.get(split(&row.file).0) {
            // Of several images with one caption each has it.
            held.take(caption.as_deref().map_or(0, cost))
                .map_err(full)?;
            row.label.clone_from(label);
            row.caption.clone_from(caption);
        }
    }
    Ok(images)
}

/// Whether a file, or a folder that it lies in, is hidden.
fn is_hidden(name: &str) -> bool {
    let hidden = |part: &str| part.starts_with('.') && part != ".";
    name.split('/').any(hidden)
}

/// The key that files which belong together share, and what makes them different: at the first dot of the last name.
fn split(name: &str) -> (&str, &str) {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[base..].find('.') {
        Some(dot) => (&name[..base + dot], &name[base + dot + 1..]),
        None => (name, ""),
    }
}

struct Archive<'a> {
    path: &'a Path,
    file: BufReader<File>,
    size: u64,
    /// Where the next header begins.
    at: u64,
}

impl Archive<'_> {
    fn fault(&self, message: impl std::fmt::Display) -> DataError {
        DataError::content(
            self.path,
            format!("not a whole tar archive: at byte {} {message}", self.at),
        )
    }

    fn io(&self) -> impl FnOnce(io::Error) -> DataError + use<> {
        let path = self.path.to_owned();
        move |error| DataError::read(&path, "file", error)
    }

    /// The bytes of a part, which are few.
    fn bytes(&mut self, part: Part) -> Result<Vec<u8>, DataError> {
        if part.size > LONGEST_TEXT {
            return Err(self.fault(format!("{} bytes where a short text should be", part.size)));
        }
        let mut bytes = vec![0; part.size as usize];
        self.file
            .seek(SeekFrom::Start(part.start))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(self.io())?;
        Ok(bytes)
    }

    fn text(&mut self, part: Part) -> Result<String, DataError> {
        let bytes = self.bytes(part)?;
        let text = String::from_utf8(bytes).map_err(|_| self.fault("a text that is not UTF-8"))?;
        Ok(text.trim().to_owned())
    }

    /// The next regular file.
    fn next(&mut self) -> Result<Option<(String, Part)>, DataError> {
        let (mut long_name, mut long_size, mut sparse) = (None, None, false);
        loop {
            let mut head = [0; TAR_BLOCK];
            if self.at + BLOCK > self.size {
                return match self.at {
                    0 => Err(self.fault("it ends")),
                    // GNU tar ends archives with empty blocks, others simply end.
                    at if at >= self.size => Ok(None),
                    _ => Err(self.fault("it ends in the middle of a header")),
                };
            }
            let from = self.at;
            self.file
                .seek(SeekFrom::Start(from))
                .and_then(|_| self.file.read_exact(&mut head))
                .map_err(self.io())?;
            if head.iter().all(|byte| *byte == 0) {
                return match from {
                    0 => Err(self.fault("there is nothing")),
                    _ => Ok(None),
                };
            }
            if head.starts_with(&[0x1f, 0x8b]) {
                let message = "a compressed archive; unpack it first (`gunzip`): images are read from their place in it";
                return Err(DataError::content(self.path, message));
            }
            if !is_tar_header(&head) {
                return Err(self.fault("a header whose sum is wrong"));
            }
            let size = tar_number(&head[124..136])
                .ok_or_else(|| self.fault("a size that is no number"))?;
            let size = long_size.take().unwrap_or(size);
            let part = Part {
                start: from + BLOCK,
                size,
            };
            let end = part
                .start
                .checked_add(size)
                .and_then(|end| end.checked_next_multiple_of(BLOCK));
            if part
                .start
                .checked_add(size)
                .is_none_or(|end| end > self.size)
            {
                return Err(self.fault(format!(
                    "a file of {size} bytes begins, which are not there"
                )));
            }
            self.at = end.unwrap_or(self.size);
            match head[156] {
                kind @ (b'0' | 0 | b'7' | b'1' | b'2' | b'S') => {
                    let name = match long_name.take() {
                        Some(name) => name,
                        None => {
                            name(&head).ok_or_else(|| self.fault("a name that is not UTF-8"))?
                        }
                    };
                    if name.len() > LONGEST_PATH {
                        return Err(self.fault(format!("a name of {} bytes", name.len())));
                    }
                    let stored = match kind {
                        b'1' | b'2' => {
                            "a link; pack it with `tar --dereference --hard-dereference`"
                        }
                        b'S' => "a sparse file; pack it without `--sparse`",
                        _ if sparse => "a sparse file; pack it without `--sparse`",
                        // Old archives mark folders by their names only.
                        _ if name.ends_with('/') => continue,
                        _ => return Ok(Some((name, part))),
                    };
                    // What is in it is not here.
                    if promises_image(&name) && !is_hidden(&name) {
                        let message = format!("{} is {stored}", shown(&name));
                        return Err(DataError::content(self.path, message));
                    }
                    sparse = false;
                }
                b'L' => {
                    let bytes = self.bytes(part)?;
                    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
                    let name = std::str::from_utf8(name)
                        .map_err(|_| self.fault("a name that is not UTF-8"))?;
                    long_name = Some(name.to_owned());
                }
                b'x' => {
                    let bytes = self.bytes(part)?;
                    for (key, value) in records(&bytes) {
                        match key {
                            "path" => long_name = Some(value.to_owned()),
                            "size" => long_size = value.parse().ok(),
                            key => sparse |= key.starts_with("GNU.sparse."),
                        }
                    }
                }
                // Folders, links, devices, and what concerns the whole archive.
                _ => (long_name, long_size, sparse) = (None, None, false),
            }
        }
    }
}

/// The name of a header, with its prefix where it has one.
fn name(head: &[u8; TAR_BLOCK]) -> Option<String> {
    let field = |from: usize, to: usize| {
        let bytes = head[from..to]
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        std::str::from_utf8(bytes).ok()
    };
    let name = field(0, 100)?;
    match field(345, 500)? {
        prefix if &head[257..263] == b"ustar\0" && !prefix.is_empty() => {
            Some(format!("{prefix}/{name}"))
        }
        _ => Some(name.to_owned()),
    }
}

/// The records of a pax header: `LENGTH KEY=VALUE\n`.
fn records(bytes: &[u8]) -> Vec<(&str, &str)> {
    let (mut found, mut rest) = (Vec::new(), std::str::from_utf8(bytes).unwrap_or_default());
    while let Some((length, _)) = rest.split_once(' ') {
        let Some((record, after)) = length.parse().ok().and_then(|n| rest.split_at_checked(n))
        else {
            break;
        };
        if record.len() <= length.len() {
            break;
        }
        if let Some((key, value)) = record[length.len() + 1..].split_once('=') {
            found.push((key, value.trim_end_matches('\n')));
        }
        rest = after;
    }
    found
}

/// How deep in the paths of files the folders stand that tell them apart, their classes: the first that is not common to
/// all; or `None` where they all lie in one folder.
pub fn folders<'r>(rows: impl Iterator<Item = &'r str> + Clone) -> Option<usize> {
    let mut files = rows.clone();
    let first = files.next()?;
    let common = files.fold(above(first).count(), |common, file| {
        let same = above(first).zip(above(file)).take_while(|(a, b)| a == b);
        same.count().min(common)
    });
    let mut files = rows;
    files
        .any(|file| above(file).nth(common).is_some())
        .then_some(common)
}

/// The folder at a depth in the path of a file, or nothing.
pub fn folder(file: &str, depth: usize) -> &str {
    above(file).nth(depth).unwrap_or_default()
}

/// The folders that a file lies in.
fn above(file: &str) -> impl Iterator<Item = &str> {
    let parents = file.rsplit_once('/').map_or("", |(parents, _)| parents);
    parents.split('/').filter(|part| !matches!(*part, "" | "."))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An archive of files, as tar writes it.
    pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, content) in files {
            if name.len() > 100 {
                out.extend(entry("././@LongLink", b'L', name.as_bytes()));
                out.extend(entry(&name[..100], b'0', content));
            } else {
                out.extend(entry(name, b'0', content));
            }
        }
        out.extend([0; 1024]);
        out
    }

    fn entry(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
        let mut head = [0u8; 512];
        head[..name.len()].copy_from_slice(name.as_bytes());
        head[100..108].copy_from_slice(b"0000644\0");
        head[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        head[148..156].fill(b' ');
        head[156] = kind;
        head[257..263].copy_from_slice(b"ustar\0");
        let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut out = head.to_vec();
        out.extend(content);
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }

    fn list(bytes: &[u8]) -> Result<Vec<(Row, Part)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(&path, bytes).unwrap();
        read(&path, &mut Held::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn files_are_found_in_their_places_with_what_lies_beside_them() {
        let long = format!("{}/x.png", "n".repeat(120));
        let bytes = tar(&[
            ("a/0001.jpg", b"first"),
            ("a/0001.cls", b"7\n"),
            ("a/0002.seg.png", b"second"),
            ("a/0002.json", br#"{"label": 3, "caption": "a hat"}"#),
            ("a/.hidden.png", b"no"),
            (&long, b"third"),
        ]);
        let found = list(&bytes).unwrap();
        let rows: Vec<_> = found.iter().map(|(row, _)| row.clone()).collect();
        let labels: Vec<_> = rows.iter().map(|row| row.label.as_deref()).collect();
        assert_eq!(labels, [Some("7"), Some("3"), None]);
        assert_eq!(rows[1].caption.as_deref(), Some("a hat"));
        assert_eq!(*rows[2].file, *long);
        for ((_, part), text) in found.iter().zip(["first", "second", "third"]) {
            let (start, end) = (part.start as usize, (part.start + part.size) as usize);
            assert_eq!(&bytes[start..end], text.as_bytes());
        }
    }

    #[test]
    fn a_pax_header_names_the_next_file() {
        let mut bytes = entry("pax", b'x', b"19 path=b/c d.png\n\n");
        bytes.extend(entry("short", b'0', b"content"));
        assert_eq!(&*list(&bytes).unwrap()[0].0.file, "b/c d.png");
    }

    #[test]
    fn images_that_are_not_in_the_archive_or_twice_are_said() {
        let check = |more: Vec<u8>, expected: &str| {
            let bytes = [entry("a.png", b'0', b"first"), more].concat();
            let said = list(&bytes).unwrap_err();
            assert!(said.ends_with(expected), "{said}");
        };
        let again =
            "a.png is in it twice, as `tar -r` and `tar -u` leave it; unpack it and pack it again";
        check(entry("a.png", b'0', b"second"), again);
        let link = "b.png is a link; pack it with `tar --dereference --hard-dereference`";
        check(entry("b.png", b'1', b""), link);
        check(entry("b.png", b'2', b""), link);
        let sparse = "b.png is a sparse file; pack it without `--sparse`";
        check(entry("b.png", b'S', b""), sparse);
        let header = entry("pax", b'x', b"22 GNU.sparse.major=1\n");
        check([header.clone(), entry("b.png", b'0', b"")].concat(), sparse);
        check(
            entry("b\n.json", b'0', br#"{"class": [1]}"#),
            r"b\n.json: `class` is a list: expected a text or a number",
        );
        let name = "n".repeat(5000);
        check(
            [
                entry("././@LongLink", b'L', name.as_bytes()),
                entry("n", b'0', b""),
            ]
            .concat(),
            "a name of 5000 bytes",
        );
        // Not of images, hidden, or a header that was of another file: nothing is missing.
        let bytes = [
            entry("a.png", b'0', b"first"),
            entry("readme.txt", b'2', b""),
            entry("x/._b.png", b'1', b""),
            header,
            entry("folder", b'5', b""),
            entry("c.png", b'0', b"second"),
        ]
        .concat();
        assert_eq!(list(&bytes).unwrap().len(), 2);
    }

    #[test]
    fn faults_of_archives_are_named() {
        let whole = tar(&[("a.png", &[1; 700])]);
        assert!(list(&[]).unwrap_err().contains("it ends"));
        assert!(list(&[0; 2048]).unwrap_err().contains("there is nothing"));
        assert!(
            list(&whole[..800])
                .unwrap_err()
                .contains("a file of 700 bytes begins")
        );
        assert!(
            list(b"\x1f\x8b compressed".repeat(50).as_slice())
                .unwrap_err()
                .contains("a compressed archive")
        );
        let mut wrong = whole.clone();
        wrong[0] = b'b';
        assert!(
            list(&wrong)
                .unwrap_err()
                .contains("a header whose sum is wrong")
        );
        let mut huge = whole;
        huge[124..136].copy_from_slice(b"77777777777\0");
        huge[148..156].fill(b' ');
        let sum: u32 = huge[..512].iter().map(|byte| u32::from(*byte)).sum();
        huge[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert!(
            list(&huge)
                .unwrap_err()
                .contains("bytes begins, which are not there")
        );
    }

    #[test]
    fn classes_are_the_first_folders_that_differ() {
        let of = |files: &[&str]| {
            let depth = folders(files.iter().copied())?;
            let classes = files.iter().map(|file| folder(file, depth).to_owned());
            Some(classes.collect::<Vec<_>>())
        };
        assert_eq!(
            of(&["./e/flags/a.png", "./e/food/x/b.png"]).unwrap(),
            ["flags", "food"]
        );
        assert_eq!(of(&["e/a.png", "e/f/b.png"]).unwrap(), ["", "f"]);
        assert_eq!(of(&["e/a.png", "e/b.png"]), None);
        assert_eq!(of(&["a.png"]), None);
        assert_eq!(of(&[]), None);
    }
}
