//! Networks in several files, as large ones are published: `model-00001-of-00003.safetensors` and so on, and an index
//! that says which file holds which weight.
//!
//! In: the path of a file, of an index (`*.index.json`), or of the folder with either. Out: the files. Names in an index
//! stay in its folder; links in the folder may lead anywhere, as in the caches of Hugging Face.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::error::{Error, Result};
use crate::regular;
use crate::tensor::TENSORS;

/// The most bytes of an index.
const LONGEST: u64 = 16 << 20;
/// The most files of a network: all are open at once.
const FILES: usize = 512;
/// The most names in a folder that are looked at.
const NAMES: usize = 10_000;
/// How the name of an index ends.
const INDEX: &str = ".index.json";
/// What a folder's weights are called, the best first; each may be an index instead.
const USUAL: [&str; 4] = [
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
];
/// How the names of files of weights end.
const ENDINGS: [&str; 4] = [".safetensors", ".pt", ".pth", ".bin"];

/// What a path stands for.
pub enum Place {
    /// One file.
    File(PathBuf),
    /// Several.
    Index(Index),
}

impl Place {
    /// Looks at a path.
    ///
    /// # Errors
    /// A folder without weights, or with several that could be meant; an index that is none.
    pub fn find(path: &Path) -> Result<Self> {
        let found = if path.is_dir() {
            within(path)?
        } else {
            path.to_owned()
        };
        match found.to_string_lossy().ends_with(INDEX) {
            true => Index::read(&found).map(Self::Index),
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
    let (indices, files) = (ending(&[INDEX]), ending(&ENDINGS));
    match (indices.as_slice(), files.as_slice()) {
        ([only], _) | ([], [only]) => Ok(dir.join(only)),
        ([], []) => Err(Error::format(format!(
            "a folder without weights: expected {} or its {INDEX}, or one file that ends with {}",
            USUAL[0],
            ENDINGS.join(", ")
        ))),
        ([], several)
            if several
                .iter()
                .any(|name| Lone::of(Path::new(name)).is_some()) =>
        {
            Err(Error::format(format!(
                "a folder with shards ({}, ..) but without their index, a file that ends with {INDEX}",
                several[0]
            )))
        }
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
    /// It cannot be read, is none, or names something outside its folder.
    pub fn read(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Document {
            weight_map: Files,
        }

        let text = regular::read(path, LONGEST)?;
        let document: Document = serde_json::from_slice(&text).map_err(|e| {
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

/// The weights of each file, no more than are read.
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

/// A file that by its name is one of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lone {
    /// Which, from 1 on.
    pub number: u32,
    /// Of how many.
    pub of: u32,
    /// What the index would be called.
    pub index: String,
}

impl Lone {
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
