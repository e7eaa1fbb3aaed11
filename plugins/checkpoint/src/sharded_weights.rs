//! Networks in several files, the usual form of large ones: `model-00001-of-00003.safetensors` and so on, and an index that
//! maps weights to files.
//!
//! In: the path of a file, of an index (`*.index.json`), or of the folder with either. Out: the files. Names in an index
//! stay in its folder; links in the folder may lead anywhere, as in the caches of Hugging Face.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::error::{Error, Result};
use crate::tensor::TENSORS;
use crate::{json, regular};

/// The most bytes of an index.
const LONGEST: u64 = 16 << 20;
/// The most files of a network: all are open at once.
const FILES: usize = 512;
/// The most names in a folder that are looked at.
const NAMES: usize = 10_000;
/// How the name of an index ends.
const INDEX: &str = ".index.json";
/// File names of a folder's weights, in order of preference; each may be an index instead.
const USUAL: [&str; 4] = [
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
];
/// How the names of files of weights end.
const ENDINGS: [&str; 4] = [".safetensors", ".pt", ".pth", ".bin"];

/// What a path stands for.
pub enum ShardPlace {
    /// One file.
    File(PathBuf),
    /// Several.
    Index(Index),
}

impl ShardPlace {
    /// Examines a path.
    ///
    /// # Errors
    /// The folder has no weights, or several candidates; the index is invalid.
    pub fn find(path: &Path) -> Result<Self> {
        let found = if path.is_dir() {
            within(path)?
        } else {
            path.to_owned()
        };
        match found.to_string_lossy().ends_with(INDEX) {
            true => Index::read(&found)
                .map(Self::Index)
                .map_err(|e| of(e, path, &found)),
            false => Ok(Self::File(found)),
        }
    }

    /// All files: those with weights, and the index.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Self::File(path) => vec![path.clone()],
            Self::Index(index) => {
                let parts = index.files.keys().map(|file| index.path_of(file));
                [index.path.clone()].into_iter().chain(parts).collect()
            }
        }
    }
}

/// The error about a file that a folder stands for, if it is missing.
pub(crate) fn of(error: Error, path: &Path, file: &Path) -> Error {
    match file.file_name() {
        Some(name) if path != file => error.of(&name.to_string_lossy()),
        _ => error,
    }
}

/// The weights of a folder: a file or an index.
fn within(dir: &Path) -> Result<PathBuf> {
    for name in USUAL {
        for name in [name.to_owned(), format!("{name}{INDEX}")] {
            let path = dir.join(name);
            if path.exists() {
                return Ok(path);
            }
        }
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)?.take(NAMES) {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    let ending = |ends: &[&str]| -> Vec<&String> {
        let own = |name: &&String| ends.iter().any(|end| name.ends_with(end));
        names.iter().filter(own).collect()
    };
    let lone = |files: &[&String]| -> Option<String> {
        let mut files = files.iter();
        let shard = files.find(|name| SingleShard::of(Path::new(name.as_str())).is_some())?;
        Some((*shard).clone())
    };
    let (indices, files) = (ending(&[INDEX]), ending(&ENDINGS));
    match (indices.as_slice(), files.as_slice()) {
        ([only], _) => Ok(dir.join(only)),
        ([], [only]) if lone(&[only]).is_none() => Ok(dir.join(only)),
        ([], []) => Err(Error::format(format!(
            "a folder without weights: expected {} or its {INDEX}, or one file that ends with {}",
            USUAL[0],
            ENDINGS.join(", ")
        ))),
        ([], several) if lone(several).is_some() => Err(Error::format(format!(
            "a folder with shards ({}, ..) but without their index, a file that ends with {INDEX}; it lies where they were \
             published",
            lone(several).unwrap_or_default()
        ))),
        (several @ [_, ..], _) | ([], several) => {
            let names: Vec<&str> = several.iter().take(4).map(|name| name.as_str()).collect();
            let names = names.join(", ");
            Err(Error::format(format!(
                "a folder with several files of weights ({names}): name one of them"
            )))
        }
    }
}

/// Which file holds which weight.
pub struct Index {
    path: PathBuf,
    dir: PathBuf,
    files: BTreeMap<String, Vec<String>>,
}

impl Index {
    /// Reads an index.
    ///
    /// # Errors
    /// It cannot be read, is invalid, or names something outside its folder.
    pub fn read(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Document {
            weight_map: Files,
        }

        let text = regular::read(path, LONGEST)?;
        let document: Document = json::parse(&text).map_err(|e| {
            Error::format(format!(
                "not an index of weights ({{\"weight_map\": {{WEIGHT: FILE}}}}): {e}"
            ))
        })?;
        let files = document.weight_map.0;
        for name in files.keys() {
            let plain = !name.contains(['/', '\\', '\0']) && name != "." && name != "..";
            if !plain || !ENDINGS.iter().any(|end| name.ends_with(end)) {
                return Err(Error::format(format!(
                    "the index names {name:?}, expected a file of weights beside it"
                )));
            }
        }
        Ok(Self {
            path: path.to_owned(),
            dir: path.parent().map(Path::to_owned).unwrap_or_default(),
            files,
        })
    }

    /// Files, each with the names of its weights.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.files
            .iter()
            .map(|(file, weights)| (file.as_str(), weights.as_slice()))
    }

    /// Where a file lies.
    pub fn path_of(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }
}

/// The weights of each file, up to the limit. [`json::parse`] has refused a weight that comes twice.
struct Files(BTreeMap<String, Vec<String>>);

impl<'de> Deserialize<'de> for Files {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Weights;

        impl<'de> Visitor<'de> for Weights {
            type Value = Files;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("files by weight")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Files, A::Error> {
                let mut files = HashMap::<String, Vec<String>>::new();
                let mut count = 0;
                while let Some((weight, file)) = map.next_entry::<String, String>()? {
                    count += 1;
                    if count > TENSORS {
                        let message = format!("more than {TENSORS} weights, the most that is read");
                        return Err(de::Error::custom(message));
                    }
                    files.entry(file).or_default().push(weight);
                    if files.len() > FILES {
                        let message = format!("more than {FILES} files, the most that is read");
                        return Err(de::Error::custom(message));
                    }
                }
                Ok(Files(files.into_iter().collect()))
            }
        }

        deserializer.deserialize_map(Weights)
    }
}

/// A file whose name says that it is one of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SingleShard {
    /// Which, from 1 on.
    pub number: u32,
    /// Of how many.
    pub of: u32,
    /// The name of its index.
    pub index: String,
}

impl SingleShard {
    /// Of `model-00001-of-00003.safetensors` and its like.
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let (stem, ending) = name.rsplit_once('.')?;
        let (rest, of) = stem.rsplit_once("-of-")?;
        let (base, number) = rest.rsplit_once('-')?;
        let count = |digits: &str| -> Option<u32> {
            let digits = Some(digits).filter(|d| d.bytes().all(|b| b.is_ascii_digit()));
            digits?.parse().ok()
        };
        let (number, of) = (count(number)?, count(of)?);
        (of > 1).then(|| Self {
            number,
            of,
            index: format!("{base}.{ending}{INDEX}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::Checkpoint;

    /// A file of safetensors with a float of each name.
    fn write(path: &Path, names: &[&str]) {
        let data: Vec<[u8; 4]> = (0..names.len()).map(|i| (i as f32).to_le_bytes()).collect();
        let view =
            |bytes| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], bytes);
        let views = names
            .iter()
            .zip(&data)
            .map(|(name, bytes)| (*name, view(&bytes[..]).unwrap()));
        safetensors::serialize_to_file(views, None, path).unwrap();
    }

    fn index(dir: &Path, name: &str, map: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(
            &path,
            format!(r#"{{"metadata": {{}}, "weight_map": {map}}}"#),
        )
        .unwrap();
        path
    }

    const ONE: &str = "model-00001-of-00002.safetensors";
    const TWO: &str = "model-00002-of-00002.safetensors";

    #[test]
    fn the_folder_and_its_index_are_one_checkpoint_of_all_files() {
        let dir = tempfile::tempdir().unwrap();
        // As in a cache: the names are links to content elsewhere under other names.
        let (blobs, folder) = (dir.path().join("blobs"), dir.path().join("snapshot"));
        std::fs::create_dir(&blobs).unwrap();
        std::fs::create_dir(&folder).unwrap();
        write(&blobs.join("1"), &["a", "b"]);
        write(&blobs.join("2"), &["c"]);
        symlink("../blobs/1", folder.join(ONE)).unwrap();
        symlink("../blobs/2", folder.join(TWO)).unwrap();
        let map = format!(r#"{{"a": "{ONE}", "b": "{ONE}", "c": "{TWO}"}}"#);
        index(&blobs, "3", &map);
        let named = folder.join("model.safetensors.index.json");
        symlink("../blobs/3", &named).unwrap();
        let linked = dir.path().join("linked");
        symlink(&folder, &linked).unwrap();
        for path in [&folder, &named, &linked] {
            let all = Checkpoint::open(path).unwrap();
            assert_eq!(all.files(), 2);
            let found = all.select(None).unwrap();
            let read = |name: &str| all.floats(found.get(name).unwrap()).unwrap();
            assert_eq!(
                (read("a"), read("b"), read("c")),
                (vec![0.0], vec![1.0], vec![0.0])
            );
            let files = ShardPlace::find(path).unwrap().files();
            let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap()).collect();
            assert_eq!(names, ["model.safetensors.index.json", ONE, TWO]);
        }
        let part = Checkpoint::open_part(&folder, |name| name == "c").unwrap();
        assert_eq!(
            (part.files(), part.dictionaries()[0].tensors().len()),
            (1, 1)
        );
    }

    #[test]
    fn two_names_of_one_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join(ONE), &["a", "b"]);
        let map = format!(r#"{{"a": "{ONE}", "b": "{TWO}"}}"#);
        let path = index(dir.path(), "model.safetensors.index.json", &map);
        let expected = format!("the index names {ONE:?} and {TWO:?}, which are the same file");
        for hard in [false, true] {
            let two = dir.path().join(TWO);
            match hard {
                false => symlink(ONE, &two).unwrap(),
                true => {
                    std::fs::remove_file(&two).unwrap();
                    std::fs::hard_link(dir.path().join(ONE), &two).unwrap();
                }
            }
            let said = Checkpoint::open(&path).map(drop).unwrap_err().to_string();
            assert!(said.contains(&expected), "{said}");
        }
        // Of one of them nothing is wanted.
        let part = Checkpoint::open_part(&path, |name| name == "b").unwrap();
        assert_eq!(part.files(), 1);
    }

    #[test]
    fn a_folder_with_one_file_stands_for_it() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("weights.safetensors"), &["a"]);
        std::fs::write(dir.path().join("README.md"), "").unwrap();
        assert!(Checkpoint::open(dir.path()).is_ok());
    }

    #[test]
    fn faults_of_folders_and_indices_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let check = |map: &str, expected: &str| {
            let path = index(dir.path(), "model.safetensors.index.json", map);
            let said = Checkpoint::open(&path).map(drop).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        };
        write(&dir.path().join(ONE), &["a"]);
        for name in [
            "../x.safetensors",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "..",
            "",
            "a.txt",
        ] {
            check(&format!(r#"{{"a": {name:?}}}"#), "the index names");
        }
        check(
            &format!(r#"{{"b": "{ONE}"}}"#),
            "lacks \"b\", which the index lists there",
        );
        check(
            &format!(r#"{{"a": "{TWO}"}}"#),
            "names \"model-00002-of-00002.safetensors\", which does not exist",
        );
        check("{}", "the index names no weights");
        check("[1]", "not an index of weights");
        check(
            &format!(r#"{{"a": "{ONE}", "a": "{TWO}"}}"#),
            r#""a" comes twice"#,
        );
        let many: Vec<String> = (0..600).map(|i| format!(r#""w{i}": "{i}.pt""#)).collect();
        check(&format!("{{{}}}", many.join(",")), "more than 512 files");
        let many: Vec<String> = (0..100_001).map(|i| format!(r#""w{i}": "1.pt""#)).collect();
        check(
            &format!("{{{}}}", many.join(",")),
            "more than 100000 weights",
        );
        std::fs::create_dir(dir.path().join("f.pt")).unwrap();
        check(
            r#"{"a": "f.pt"}"#,
            "f.pt: it is a directory, not a regular file",
        );

        let check = |names: &[&str], expected: &str| {
            let dir = tempfile::tempdir().unwrap();
            for name in names {
                std::fs::write(dir.path().join(name), "").unwrap();
            }
            let said = Checkpoint::open(dir.path())
                .map(drop)
                .unwrap_err()
                .to_string();
            assert!(said.contains(expected), "{said}");
        };
        check(
            &[ONE],
            "shards (model-00001-of-00002.safetensors, ..) but without their index",
        );
        check(
            &["model.safetensors"],
            "model.safetensors: the file is empty",
        );
        check(
            &["model.safetensors.index.json"],
            "model.safetensors.index.json: not an index of weights",
        );
        check(&[], "a folder without weights");
        check(&["config.json"], "a folder without weights");
        check(
            &["a.pt", "b.pt"],
            "several files of weights (a.pt, b.pt): name one",
        );
        check(
            &[ONE, TWO],
            "shards (model-00001-of-00002.safetensors, ..) but without their index",
        );
    }

    #[test]
    fn a_lone_shard_is_known_by_its_name() {
        let check = |name: &str, expected: Option<(u32, u32, &str)>| {
            let expected = expected.map(|(number, of, index)| SingleShard {
                number,
                of,
                index: index.into(),
            });
            assert_eq!(SingleShard::of(Path::new(name)), expected, "{name}");
        };
        check(
            "d/model-00001-of-00002.safetensors",
            Some((1, 2, "model.safetensors.index.json")),
        );
        check(
            "pytorch_model-00003-of-00007.bin",
            Some((3, 7, "pytorch_model.bin.index.json")),
        );
        check("model-00001-of-00001.safetensors", None);
        check("one-of-two.pt", None);
        check("model.safetensors", None);
        check("a-+1-of-+2.pt", None);
    }
}
