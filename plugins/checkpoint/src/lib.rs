//! Reads checkpoint files as data: torch's zip archives, its older pickles, and safetensors. Writes the first of these.
//!
//! In: a file that somebody published. Out: dictionaries of named tensors, read one at a time and converted on the way, so
//! that a large file takes no more memory than its largest tensor. No code in a pickle is executed; see `pickle.rs`. All
//! sizes are checked before anything is allocated: a hostile file causes an error, never a crash, an endless loop or
//! exhausted memory.
//!
//! Deliberately absent: any tensor library, and any knowledge of particular networks, except the layouts that published
//! scripts expect ([`published`]).

pub mod archive;
pub mod checksum;
mod error;
pub mod images;
pub mod json;
mod ndarray;
pub mod parquet;
mod pickle;
pub mod published;
pub mod regular;
mod safetensors;
pub mod sample_shards;
pub mod sharded_weights;
pub mod signature;
mod source;
pub mod tar;
mod tensor;
mod torch;
pub mod trajectories;
pub mod writer;

use std::collections::HashMap;
use std::path::Path;

pub use ::safetensors::Dtype;
pub use error::{Error, Result};
pub use tensor::Tensor;

use checksum::Checksums;
use source::Source;

/// Kinds of checkpoint file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// A zip archive of `torch.save`.
    TorchZip,
    /// Pickles of `torch.save` before 1.6.
    TorchLegacy,
    /// Safetensors.
    Safetensors,
}

impl Container {
    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::TorchZip => "torch zip",
            Self::TorchLegacy => "torch legacy",
            Self::Safetensors => "safetensors",
        }
    }
}

/// Named tensors under a path from the file's top, as in `trainer.ema_parameters`; the top's path is empty.
#[derive(Debug, Clone)]
pub struct Dictionary {
    /// Where it is.
    pub path: String,
    /// Names and tensors, in the order of the file.
    tensors: Vec<(String, Tensor)>,
    places: HashMap<String, usize>,
}

impl Dictionary {
    fn new(path: String) -> Self {
        Self {
            path,
            tensors: Vec::new(),
            places: HashMap::new(),
        }
    }

    /// A duplicate name has its last value, as in Python.
    fn insert(&mut self, name: String, tensor: Tensor) {
        match self.places.get(&name) {
            Some(&place) => self.tensors[place].1 = tensor,
            None => {
                self.places.insert(name.clone(), self.tensors.len());
                self.tensors.push((name, tensor));
            }
        }
    }

    /// Names and tensors, in the order of the file.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tensor of a name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.places.get(name).map(|&place| &self.tensors[place].1)
    }

    /// The tensors whose names have a prefix, with the prefix removed; None if there are none.
    pub fn part(&self, prefix: &str) -> Option<Self> {
        let mut part = Self::new(self.path.clone());
        for (name, tensor) in &self.tensors {
            if let Some(name) = name.strip_prefix(prefix) {
                part.insert(name.to_owned(), tensor.clone());
            }
        }
        (!part.tensors.is_empty()).then_some(part)
    }

    /// The common prefix of all tensors' names, up to a dot, as added by some program. Empty if there is none, or only one
    /// tensor.
    pub fn prefix(&self) -> &str {
        let [(first, _), rest @ ..] = self.tensors.as_slice() else {
            return "";
        };
        let common = rest.iter().fold(first.len(), |common, (name, _)| {
            let same = first.bytes().zip(name.bytes());
            same.take(common).take_while(|(a, b)| a == b).count()
        });
        match first.as_bytes()[..common].iter().rposition(|&b| b == b'.') {
            Some(dot) if !rest.is_empty() => &first[..=dot],
            _ => "",
        }
    }

    /// Whether it holds an optimiser's state rather than weights.
    pub fn is_optimiser(&self) -> bool {
        self.path.split('.').any(|part| part.starts_with("optim"))
    }
}

/// What was found in a file.
struct Content {
    dictionaries: Vec<Dictionary>,
    strangers: Vec<String>,
    /// Elements of arrays stored in the pickle itself: the source after the file.
    arrays: Vec<u8>,
}

/// An open checkpoint: a file, or the files of a network in several.
pub struct Checkpoint {
    sources: Vec<Source>,
    /// Checksums of each source.
    sums: Vec<Checksums>,
    container: Container,
    content: Content,
    files: usize,
}

impl Checkpoint {
    /// Opens a file and reads the descriptions of its tensors; the elements stay in the file. A folder or an index stands for
    /// the files of a sharded network, see [`sharded_weights`].
    ///
    /// # Errors
    /// It cannot be read, is not a checkpoint, is damaged, or exceeds the limits.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_part(path, |_| true)
    }

    /// The same; of several files only those with a wanted weight.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_part(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<Self> {
        match sharded_weights::ShardPlace::find(path)? {
            sharded_weights::ShardPlace::File(file) => {
                let opened = Source::open(&file).map_err(Error::from);
                opened
                    .and_then(Self::read)
                    .map_err(|e| sharded_weights::of(e, path, &file))
            }
            sharded_weights::ShardPlace::Index(index) => Self::join(&index, wanted),
        }
    }

    /// The tensors of several files as one dictionary.
    fn join(index: &sharded_weights::Index, wanted: impl Fn(&str) -> bool) -> Result<Self> {
        let (mut sources, mut sums, mut strangers) = (Vec::new(), Vec::new(), Vec::new());
        let mut dictionary = Dictionary::new(String::new());
        let mut container = None;
        let mut files = 0;
        // Files may be links: many links to one file would cause it to be read many times.
        let mut known = HashMap::new();
        for (file, weights) in index.files() {
            let mut names = weights.iter().filter(|name| wanted(name)).peekable();
            if names.peek().is_none() {
                continue;
            }
            let within = |e: Error| match e {
                Error::Io(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    Error::format(format!("the index names {file:?}, which does not exist"))
                }
                e => e.of(file),
            };
            let part = Source::open(&index.path_of(file)).map_err(Error::from);
            let part = part.map_err(within)?;
            if let Some(identity) = part.identity()?
                && let Some(other) = known.insert(identity, file)
            {
                return Err(Error::format(format!(
                    "the index names {other:?} and {file:?}, which are the same file: expected different ones"
                )));
            }
            let part = Self::read(part).map_err(within)?;
            let found = part.select(None).map_err(within)?;
            for name in names {
                let tensor = found.get(name).ok_or_else(|| {
                    Error::format(format!(
                        "{file:?} lacks {name:?}, which the index lists there"
                    ))
                })?;
                let tensor = tensor.clone().within(sources.len() + tensor.source);
                dictionary.insert(name.clone(), tensor);
            }
            container = container.or(Some(part.container));
            strangers.extend(part.content.strangers);
            sources.extend(part.sources);
            sums.extend(part.sums.into_iter().map(|sums| sums.of_file(file)));
            files += 1;
        }
        strangers.sort();
        strangers.dedup();
        let container = container.ok_or_else(|| Error::format("the index names no weights"))?;
        Ok(Self {
            sources,
            sums,
            container,
            content: Content {
                dictionaries: vec![dictionary],
                strangers,
                arrays: Vec::new(),
            },
            files,
        })
    }

    /// The same for the bytes of a file.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::read(Source::Memory(bytes.into()))
    }

    fn read(source: Source) -> Result<Self> {
        let start = source.bytes(0, source.len().min(9))?;
        // Safetensors first: its leading length may look like any other format.
        let mut sums = Checksums::default();
        let (container, mut content) = if safetensors::recognise(&start) {
            let content = Content {
                dictionaries: vec![safetensors::read(&source)?],
                strangers: Vec::new(),
                arrays: Vec::new(),
            };
            (Container::Safetensors, content)
        } else if torch::is_zip(&start) {
            let (content, found) = torch::read_zip(&source)?;
            sums = found;
            (Container::TorchZip, content)
        } else if torch::is_pickle(&start) {
            (Container::TorchLegacy, torch::read_legacy(&source)?)
        } else if start.is_empty() {
            return Err(Error::format("the file is empty"));
        } else {
            return Err(Error::format(
                "neither a file of torch.save (.pt, .pth) nor safetensors",
            ));
        };
        if content.dictionaries.is_empty() {
            let mut message = String::from("no tensors in this file");
            if !content.strangers.is_empty() {
                let names = content.strangers.join(", ");
                message.push_str(&format!("; loading it in Python would call {names}"));
            }
            return Err(Error::Format(message));
        }
        let arrays = std::mem::take(&mut content.arrays);
        Ok(Self {
            sources: vec![source, Source::Memory(arrays.into())],
            sums: vec![sums, Checksums::default()],
            container,
            content,
            files: 1,
        })
    }

    /// Kind of file.
    pub fn container(&self) -> Container {
        self.container
    }

    /// Number of files.
    pub fn files(&self) -> usize {
        self.files
    }

    /// Bytes in the files.
    pub fn size(&self) -> u64 {
        let sources = self.sources.iter().step_by(2);
        sources.map(Source::len).sum()
    }

    /// Dictionaries with tensors, outer ones first. A dictionary reachable by several paths is listed under the first.
    pub fn dictionaries(&self) -> &[Dictionary] {
        &self.content.dictionaries
    }

    /// Functions and classes that Python would call to load the file, here treated as opaque values; at most 100.
    pub fn strangers(&self) -> &[String] {
        &self.content.strangers
    }

    /// The dictionary at a path; without a path, the only one that is not an optimiser's state.
    pub fn select(&self, path: Option<&str>) -> Result<&Dictionary> {
        let all = self.dictionaries();
        let list = |of: &[&Dictionary]| -> String {
            let mut names: Vec<String> = of
                .iter()
                .take(12)
                .map(|d| format!("{} ({} tensors)", shown(&d.path), d.tensors.len()))
                .collect();
            if of.len() > 12 {
                names.push(format!("{} more", of.len() - 12));
            }
            names.join(", ")
        };
        let weights: Vec<&Dictionary> = all.iter().filter(|d| !d.is_optimiser()).collect();
        match path {
            Some(path) => all.iter().find(|d| d.path == path).ok_or_else(|| {
                let there = if weights.is_empty() {
                    all.iter().collect()
                } else {
                    weights
                };
                Error::Select(format!(
                    "no tensors under {}; there are {}",
                    shown(path),
                    list(&there)
                ))
            }),
            None => match weights.as_slice() {
                [only] => Ok(only),
                [] => Err(Error::Select(format!(
                    "only an optimiser's state in this file: {}",
                    list(&all.iter().collect::<Vec<_>>())
                ))),
                several => Err(Error::Select(format!(
                    "several dictionaries of tensors, select one: {}",
                    list(several)
                ))),
            },
        }
    }

    /// The elements of a tensor of floats, last dimension fastest.
    pub fn floats(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        let convert: fn(&[u8], &mut Vec<f32>) = match tensor.dtype {
            Dtype::F32 => |bytes, out| extend(bytes, out, f32::from_le_bytes),
            Dtype::F64 => |bytes, out| extend(bytes, out, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => |bytes, out| extend(bytes, out, |b| half::f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => {
                |bytes, out| extend(bytes, out, |b| half::bf16::from_le_bytes(b).to_f32())
            }
            other => return Err(Error::format(format!("type {other}, expected floats"))),
        };
        self.collect(tensor, convert)
    }

    /// The elements of a tensor of non-negative integers below 2^31, last dimension fastest.
    pub fn indices(&self, tensor: &Tensor) -> Result<Vec<u32>> {
        let convert: fn(&[u8], &mut Vec<i64>) = match tensor.dtype {
            Dtype::BOOL | Dtype::U8 => |bytes, out| extend(bytes, out, |[b]: [u8; 1]| i64::from(b)),
            Dtype::I8 => |bytes, out| extend(bytes, out, |b| i64::from(i8::from_le_bytes(b))),
            Dtype::U16 => |bytes, out| extend(bytes, out, |b| i64::from(u16::from_le_bytes(b))),
            Dtype::I16 => |bytes, out| extend(bytes, out, |b| i64::from(i16::from_le_bytes(b))),
            Dtype::U32 => |bytes, out| extend(bytes, out, |b| i64::from(u32::from_le_bytes(b))),
            Dtype::I32 => |bytes, out| extend(bytes, out, |b| i64::from(i32::from_le_bytes(b))),
            // Values above i64 wrap to negative numbers, which are refused below.
            Dtype::I64 | Dtype::U64 => |bytes, out| extend(bytes, out, i64::from_le_bytes),
            other => return Err(Error::format(format!("type {other}, expected integers"))),
        };
        let narrow = |&x: &i64| u32::try_from(x).ok().filter(|&x| x <= i32::MAX as u32);
        let (mut wide, mut wrong) = (Vec::new(), None);
        let found = self.collect(tensor, |bytes, out| {
            wide.clear();
            convert(bytes, &mut wide);
            out.extend(wide.iter().map_while(narrow));
            wrong = wrong.or(wide.iter().find(|x| narrow(x).is_none()).copied());
        })?;
        match wrong {
            None => Ok(found),
            Some(x) => Err(Error::format(format!(
                "{x}, expected integers from 0 to {}",
                i32::MAX
            ))),
        }
    }

    /// The little-endian bytes of a tensor in its own type, last dimension fastest.
    pub fn raw(&self, tensor: &Tensor) -> Result<Vec<u8>> {
        self.collect(tensor, |bytes, out| out.extend_from_slice(bytes))
    }

    fn collect<T>(
        &self,
        tensor: &Tensor,
        mut convert: impl FnMut(&[u8], &mut Vec<T>),
    ) -> Result<Vec<T>> {
        let source = &self.sources[tensor.source];
        // Missing elements are refused before any memory is allocated for them.
        let elements = tensor.check(source)?;
        let mut out = Vec::new();
        out.try_reserve_exact(
            elements
                * if size_of::<T>() == 1 {
                    tensor.width()
                } else {
                    1
                },
        )
        .map_err(|_| {
            let bytes = tensor.bytes();
            Error::format(format!("{bytes} bytes, more than there is memory for"))
        })?;
        let sums = &self.sums[tensor.source];
        sums.visit(source, tensor, |bytes| convert(bytes, &mut out))?;
        Ok(out)
    }
}

fn extend<const N: usize, T>(bytes: &[u8], out: &mut Vec<T>, convert: impl Fn([u8; N]) -> T) {
    let (elements, _) = bytes.as_chunks::<N>();
    out.extend(elements.iter().map(|&element| convert(element)));
}

/// A path as shown to people.
pub fn shown(path: &str) -> String {
    match path {
        "" => "the top level".to_owned(),
        path => format!("`{path}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_names_begin_with_is_a_prefix() {
        let check = |names: &[&str], expected: &str| {
            let mut dictionary = Dictionary::new(String::new());
            for name in names {
                let tensor = Tensor::contiguous(Dtype::F32, vec![1], 0);
                dictionary.insert((*name).into(), tensor);
            }
            assert_eq!(dictionary.prefix(), expected, "{names:?}");
        };
        check(&["model.a.w", "model.b.w"], "model.");
        check(
            &["ema_model.module.a.w", "ema_model.module.a.b"],
            "ema_model.module.a.",
        );
        check(&["layer.1", "layers.1"], "");
        check(&["a.w", "b.w"], "");
        check(&["a.w", "w"], "");
        check(&["a.w"], "");
        check(&["n\u{e4}.a", "n\u{e4}.b"], "n\u{e4}.");
        check(&["\u{e4}.a", "\u{e5}.b"], "");
        check(&[], "");
    }
}
