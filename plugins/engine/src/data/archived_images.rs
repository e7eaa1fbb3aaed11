//! Tar archives of image files: which entries are images, and which files accompany them.
//!
//! Nothing is unpacked: images are decoded from their bytes in the archive. Deliberately absent: the format of archives
//! (`retort_checkpoint::tar`).

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::Arc;

use retort_checkpoint::images::promises_image;
use retort_checkpoint::json;
use retort_checkpoint::tar::{Archive, EntryKind};
use serde_json::Value;

use super::content;
use super::error::{DataError, shown};
use super::item::{Item, ItemLocation};
use super::table;
use super::table::{MemoryBudget, cost};

/// Bytes of an entry of [`Sidecars`], with the tree's overhead.
const SIDECAR: usize = 80;

/// Classes and captions beside images in an archive, by the common part of their names.
type Sidecars = BTreeMap<Box<str>, (Option<Arc<str>>, Option<Box<str>>)>;

/// The contents of a source's archives.
#[derive(Debug, Default)]
pub(super) struct ArchivedImages {
    /// Image files, in the order of the archives.
    pub(super) items: Vec<Item>,
    /// Classes as written, by the numbers that items have.
    pub(super) classes: BTreeMap<Arc<str>, u32>,
    held: MemoryBudget,
}

impl ArchivedImages {
    /// The class of an item.
    fn class(&mut self, text: Arc<str>) -> u32 {
        let next = self.classes.len() as u32;
        *self.classes.entry(text).or_insert(next)
    }

    /// Adds the image files of the archive with this number.
    pub(super) fn read(&mut self, path: &Path, number: u32) -> Result<(), DataError> {
        let of = |error: retort_checkpoint::Error| match error {
            retort_checkpoint::Error::Io(error) => DataError::read(path, "file", error),
            error => DataError::content(path, error.to_string()),
        };
        let full = |message: String| DataError::content(path, message);
        let mut archive = Archive::new(content::open_archive(path)?).map_err(of)?;
        let first = self.items.len();
        let mut sidecars = Sidecars::new();
        while let Some(entry) = archive.next().map_err(of)? {
            if is_hidden(&entry.name) {
                continue;
            }
            if let Some(what) = cannot_be_read(entry.kind) {
                // Its content is elsewhere.
                if promises_image(&entry.name) {
                    let message = format!("{} is {what}", shown(&entry.name));
                    return Err(DataError::content(path, message));
                }
                continue;
            }
            let (key, ending) = split(&entry.name);
            let ending = ending.to_ascii_lowercase();
            if !matches!(&*ending, "cls" | "class" | "txt" | "caption" | "json") {
                self.held.file(&entry.name).map_err(full)?;
                self.items.push(Item {
                    name: entry.name.into(),
                    label: Item::UNLABELLED,
                    caption: None,
                    location: ItemLocation::Archive(number, entry.range),
                });
                continue;
            }
            let text = archive.text(entry.range).map_err(of)?;
            if !sidecars.contains_key(key) {
                self.held.take(SIDECAR + cost(key)).map_err(full)?;
                sidecars.insert(key.into(), (None, None));
            }
            let said = self.said(&ending, &text);
            let (label, caption) = said.map_err(|fault| match fault {
                Fault::Full(message) => full(message),
                Fault::Content(message) => full(format!("{}: {message}", shown(&entry.name))),
            })?;
            let known = sidecars.entry(key.into()).or_default();
            // A separate file takes precedence over a field of a JSON object.
            match ending.as_str() {
                "json" => {
                    known.0 = known.0.take().or(label);
                    known.1 = known.1.take().or(caption);
                }
                _ => {
                    known.0 = label.or(known.0.take());
                    known.1 = caption.or(known.1.take());
                }
            }
        }
        let added = &self.items[first..];
        if let Some(twice) = twice(added.iter().map(|item| &*item.name)) {
            let message = format!(
                "{} is in it twice, as `tar -r` and `tar -u` leave it; unpack it and pack it again",
                shown(twice)
            );
            return Err(DataError::content(path, message));
        }
        if sidecars.is_empty() {
            return Ok(());
        }
        for place in first..self.items.len() {
            let Some((label, caption)) = sidecars.get(split(&self.items[place].name).0) else {
                continue;
            };
            // If several images share a caption file, each gets the caption.
            let cost = caption.as_deref().map_or(0, cost);
            self.held.take(cost).map_err(full)?;
            self.items[place].caption.clone_from(caption);
            if let Some(label) = label {
                self.items[place].label = self.class(Arc::clone(label));
            }
        }
        Ok(())
    }

    /// The class and the caption that a file beside images holds.
    #[expect(clippy::type_complexity, reason = "as in `Sidecars`")]
    fn said(
        &mut self,
        ending: &str,
        text: &str,
    ) -> Result<(Option<Arc<str>>, Option<Box<str>>), Fault> {
        let (label, caption) = match ending {
            "cls" | "class" => (Some(text.to_owned()), None),
            "txt" | "caption" => (None, Some(text.to_owned())),
            _ => {
                let value: Value = json::parse(text.as_bytes())
                    .map_err(|error| Fault::Content(format!("expected JSON: {error}")))?;
                let field = |names: [&str; 3]| table::text(&value, &names).map_err(Fault::Content);
                let label = field(["label", "class", "cls"])?;
                (label, field(["caption", "text", "prompt"])?)
            }
        };
        let label = label.map(|label| self.held.label(&label));
        let label = label.transpose().map_err(Fault::Full)?;
        self.held
            .take(caption.as_deref().map_or(0, cost))
            .map_err(Fault::Full)?;
        Ok((label, caption.map(Into::into)))
    }
}

/// Why a file beside an image cannot be used.
enum Fault {
    /// The names and texts exceed their memory budget.
    Full(String),
    /// Its content is not what was expected.
    Content(String),
}

/// Why the bytes of an entry are not those of the file.
fn cannot_be_read(kind: EntryKind) -> Option<&'static str> {
    match kind {
        EntryKind::Whole => None,
        EntryKind::Link => Some("a link; pack it with `tar --dereference --hard-dereference`"),
        EntryKind::Sparse => Some("a sparse file; pack it without `--sparse`"),
    }
}

/// A duplicate name. Found by hashes: sorting millions of names would take several times as long.
fn twice<'n>(names: impl Iterator<Item = &'n str> + Clone) -> Option<&'n str> {
    let keys = RandomState::new();
    let mut hashes: Vec<u64> = names.clone().map(|name| keys.hash_one(name)).collect();
    hashes.sort_unstable();
    let suspects = hashes.windows(2).filter(|pair| pair[0] == pair[1]);
    suspects.map(|pair| pair[0]).find_map(|hash| {
        let mut same: Vec<&str> = names
            .clone()
            .filter(|name| keys.hash_one(name) == hash)
            .collect();
        same.sort_unstable();
        same.windows(2)
            .find(|pair| pair[0] == pair[1])
            .map(|pair| pair[0])
    })
}

/// Whether a file, or a folder that it lies in, is hidden.
fn is_hidden(name: &str) -> bool {
    let hidden = |part: &str| part.starts_with('.') && part != ".";
    name.split('/').any(hidden)
}

/// The key shared by files that belong together, and the rest of the name: split at the first dot of the file name.
fn split(name: &str) -> (&str, &str) {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[base..].find('.') {
        Some(dot) => (&name[..base + dot], &name[base + dot + 1..]),
        None => (name, ""),
    }
}

/// The depth of the folders that are the classes: the first level that is not common to all files; `None` if all files are in
/// one folder.
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

    fn list(bytes: &[u8]) -> Result<ArchivedImages, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(&path, bytes).unwrap();
        let mut found = ArchivedImages::default();
        let read = found.read(&path, 0);
        read.map(|()| found).map_err(|error| error.to_string())
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
        let labels: Vec<_> = found.items.iter().map(|item| item.label).collect();
        assert_eq!(labels, [0, 1, Item::UNLABELLED]);
        assert_eq!((found.classes["7"], found.classes["3"]), (0, 1));
        assert_eq!(found.items[1].caption.as_deref(), Some("a hat"));
        assert_eq!(*found.items[2].name, *long);
        for (item, text) in found.items.iter().zip(["first", "second", "third"]) {
            let ItemLocation::Archive(_, part) = item.location else {
                panic!("{item:?}");
            };
            let (start, end) = (part.start as usize, (part.start + part.size) as usize);
            assert_eq!(&bytes[start..end], text.as_bytes());
        }
    }

    #[test]
    fn a_pax_header_names_the_next_file() {
        let mut bytes = entry("pax", b'x', b"19 path=b/c d.png\n\n");
        bytes.extend(entry("short", b'0', b"content"));
        assert_eq!(&*list(&bytes).unwrap().items[0].name, "b/c d.png");
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
        // Not images, hidden, or a header of another file: no image is missing.
        let bytes = [
            entry("a.png", b'0', b"first"),
            entry("readme.txt", b'2', b""),
            entry("x/._b.png", b'1', b""),
            header,
            entry("folder", b'5', b""),
            entry("c.png", b'0', b"second"),
        ]
        .concat();
        assert_eq!(list(&bytes).unwrap().items.len(), 2);
    }

    #[test]
    fn faults_of_archives_are_named() {
        let whole = tar(&[("a.png", &[1; 700])]);
        assert!(list(&[]).unwrap_err().contains("it ends"));
        let said = list(&[0; 2048]).unwrap_err();
        assert!(said.contains("a tar archive without files"), "{said}");
        assert!(
            list(&whole[..800])
                .unwrap_err()
                .contains("a file of 700 bytes begins")
        );
        // In a header, and in the zeros that fill a file's last block. Between two blocks it may have been made so.
        let files = tar(&[("a.png", &[1; 700]), ("b.png", &[1; 700])]);
        for length in [1300, 1535, 1600, 2800] {
            let said = list(&files[..length]).unwrap_err();
            assert!(
                said.contains("it ends in the middle of a block; was all of it copied?"),
                "{length}: {said}"
            );
        }
        assert_eq!(list(&files[..1536]).unwrap().items.len(), 1);
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
                .contains("bytes begins, but the archive ends first")
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
