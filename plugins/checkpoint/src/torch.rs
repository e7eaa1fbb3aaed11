//! Files of `torch.save`: today's zip archives, and the sequence of pickles from before torch 1.6.
//!
//! ```text
//! zip     NAME/data.pkl  NAME/byteorder  NAME/data/KEY ..           entries are stored, not compressed
//! legacy  magic  protocol  system  value  [KEY ..]   then for each key: number of elements (u64), elements
//! ```
//!
//! The pickled value refers to storages by key, and to tensors by calls of a few functions with a storage, an offset, sizes
//! and strides. These calls and those for NumPy's arrays are interpreted; all others are opaque values.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use safetensors::Dtype;

use crate::archive::{Archive, Packing};
use crate::checksum::Checksums;
use crate::error::{Error, Result};
use crate::ndarray::Arrays;
use crate::pickle::{Id, MOST_BYTES, Node, Pickle};
use crate::source::Source;
use crate::tensor::{DIMENSIONS, TENSORS, Tensor};
use crate::{Content, Dictionary};

/// Levels of nested dictionaries that are searched.
const DEPTH: usize = 32;
/// The most calls that are listed as not interpreted.
const STRANGERS: usize = 100;
/// The most bytes in all names and paths together.
const NAMES: u64 = 32 << 20;

const MAGIC: &[u8] = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// Whether these first bytes claim to be an archive.
pub(crate) fn is_zip(start: &[u8]) -> bool {
    start.starts_with(b"PK")
}

/// Whether these first bytes claim to be a pickle.
pub(crate) fn is_pickle(start: &[u8]) -> bool {
    start.first() == Some(&0x80)
}

/// Locations of storages: key -> (position, bytes).
type Storages = BTreeMap<String, (u64, u64)>;

/// Reads an archive. Tensors are checked against the checksums when they are read.
pub(crate) fn read_zip(source: &Source) -> Result<(Content, Checksums)> {
    let archive = Archive::read(source.clone())?;
    let mut entries = Storages::new();
    let mut places = Vec::new();
    for entry in archive.entries() {
        let name = &entry.name;
        if entry.packing != Packing::Stored {
            return Err(Error::format(format!(
                "the archive's entry {name} is compressed or encrypted; torch stores entries as they are: unpack the \
                 archive and pack it again with `zip -0`"
            )));
        }
        let start = archive.start(entry)?;
        entries.insert(name.clone(), (start, entry.size));
        places.push((start, entry.clone()));
    }
    let prefix = match entries
        .keys()
        .find_map(|name| name.strip_suffix("data.pkl"))
    {
        Some(prefix) => prefix.to_owned(),
        None => {
            return Err(Error::format(
                "a zip archive without data.pkl: not written by torch.save",
            ));
        }
    };
    if let Some(&(start, len)) = entries.get(&format!("{prefix}byteorder")) {
        let order = source.bytes(start, len.min(16))?;
        if order != b"little" {
            return Err(Error::format(format!(
                "byte order {:?}: only little-endian files are supported; save it again on a little-endian machine",
                String::from_utf8_lossy(&order)
            )));
        }
    }
    let name = format!("{prefix}data.pkl");
    let (start, len) = entries[&name];
    check_pickle(len)?;
    let bytes = source.bytes(start, len)?;
    if let Some(entry) = archive.entry(&name).filter(|entry| entry.has_sum()) {
        entry.check(&bytes)?;
    }
    let pickle = Pickle::read(bytes.into(), 0)?;
    let folder = format!("{prefix}data/");
    let storages = entries
        .into_iter()
        .filter_map(|(name, place)| Some((name.strip_prefix(&folder)?.to_owned(), place)))
        .collect();
    let sums = Checksums::of_torch(places.into_iter());
    Ok((Content::of(pickle, storages)?, sums))
}

fn check_pickle(len: u64) -> Result<()> {
    if len > MOST_BYTES {
        return Err(Error::Limit {
            what: "bytes of pickle",
            limit: MOST_BYTES,
        });
    }
    Ok(())
}

/// Reads a sequence of pickles.
pub(crate) fn read_legacy(source: &Source) -> Result<Content> {
    let bytes: Arc<[u8]> = source.bytes(0, source.len().min(MOST_BYTES))?.into();
    let next = |start| Pickle::read(bytes.clone(), start);
    let magic = next(0)?;
    if !matches!(magic.node(magic.root), Node::Bytes(range) if magic.raw(range) == MAGIC) {
        return Err(Error::format(
            "a pickle, but not written by torch.save: only files of weights are read",
        ));
    }
    let protocol = next(magic.end)?;
    if protocol.count(protocol.root) != Some(1001) {
        return Err(Error::format(
            "an unknown version of torch's old file format",
        ));
    }
    let system = next(protocol.end)?;
    if let Node::Dict(items) = system.node(system.root) {
        for &(key, value) in items {
            if system.text(key) == Some("little_endian") && system.node(value) == &Node::Bool(false)
            {
                return Err(Error::format("only little-endian files are supported"));
            }
        }
    }
    let value = next(system.end)?;
    let keys = next(value.end)?;

    // The storages follow in the order of their keys; the value says how wide their elements are.
    let mut widths = BTreeMap::new();
    for node in value.nodes() {
        if let Some(reference) = StorageRef::of(&value, node) {
            widths.insert(reference.key.to_owned(), reference.width());
        }
    }
    let list = keys
        .elements(keys.root)
        .ok_or_else(|| Error::format("no list of storages after the value"))?;
    Limited::new("storages", TENSORS).add(list.len())?;
    let mut storages = Storages::new();
    let mut position = keys.end as u64;
    for &id in list {
        let key = keys.text(id).unwrap_or_default();
        let width = *widths
            .get(key)
            .ok_or_else(|| Error::format(format!("storage {key:?} belongs to no tensor")))?;
        let mut count = [0; 8];
        source.read_at(position, &mut count)?;
        let start = position + 8;
        let len = u64::from_le_bytes(count).checked_mul(width);
        let end = len.and_then(|len| start.checked_add(len));
        let (Some(len), Some(end)) = (len, end.filter(|&end| end <= source.len())) else {
            return Err(Error::format(format!("storage {key} is cut off")));
        };
        storages.insert(key.to_owned(), (start, len));
        position = end;
    }
    Content::of(value, storages)
}

/// A storage in a value: `("storage", type, key, device, elements[, view])`.
struct StorageRef<'p> {
    key: &'p str,
    /// None: bytes without a type.
    dtype: Option<Dtype>,
    /// First element and number of elements of a part (old files).
    part: Option<(u64, u64)>,
}

impl<'p> StorageRef<'p> {
    fn of(pickle: &'p Pickle, node: &Node) -> Option<Self> {
        let Node::Persistent(id) = node else {
            return None;
        };
        let parts = pickle.elements(*id)?;
        let &[kind, class, key, _device, _elements, ref rest @ ..] = parts else {
            return None;
        };
        if pickle.text(kind) != Some("storage") {
            return None;
        }
        let (module, name) = pickle.global(class)?;
        let part = rest.first().and_then(|&view| {
            let &[_key, offset, size] = pickle.elements(view)? else {
                return None;
            };
            Some((pickle.count(offset)?, pickle.count(size)?))
        });
        Some(Self {
            key: pickle.text(key)?,
            dtype: storage_type(module, name)?,
            part,
        })
    }

    /// Bytes of an element.
    fn width(&self) -> u64 {
        self.dtype.map_or(1, |dtype| dtype.bitsize() as u64 / 8)
    }
}

/// The type of a storage's elements; `Some(None)`: bytes without a type.
fn storage_type(module: &str, name: &str) -> Option<Option<Dtype>> {
    if !matches!(module, "torch" | "torch.cuda" | "torch.storage") {
        return None;
    }
    Some(Some(match name {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        "ComplexFloatStorage" => Dtype::C64,
        "UntypedStorage" => return Some(None),
        _ => return None,
    }))
}

/// `torch.float32` and so on, if the tensor itself has a type.
fn element_type(name: &str) -> Option<Dtype> {
    Some(match name {
        "float64" => Dtype::F64,
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "int64" => Dtype::I64,
        "int32" => Dtype::I32,
        "int16" => Dtype::I16,
        "int8" => Dtype::I8,
        "uint64" => Dtype::U64,
        "uint32" => Dtype::U32,
        "uint16" => Dtype::U16,
        "uint8" => Dtype::U8,
        "bool" => Dtype::BOOL,
        _ => return None,
    })
}

/// A pickled value with its storages.
struct Value {
    pickle: Pickle,
    storages: Storages,
    arrays: Arrays,
}

impl Value {
    /// The tensor that a value stands for, if any.
    fn tensor(&self, id: Id) -> Result<Option<Tensor>> {
        let mut id = id;
        // A parameter wraps a tensor, a subclass wraps the call that makes one; more than two wrappers do not occur in real
        // files.
        for _ in 0..4 {
            let Node::Call {
                callable,
                arguments,
            } = self.pickle.node(id)
            else {
                return Ok(None);
            };
            let Some(arguments) = self.pickle.elements(*arguments) else {
                return Ok(None);
            };
            let dtype = |at: usize| {
                let (module, name) = self.pickle.global(*arguments.get(at)?)?;
                if module == "torch" {
                    element_type(name)
                } else {
                    None
                }
            };
            match self.pickle.global(*callable) {
                Some(("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2")) => {
                    return self.rebuild(arguments, None);
                }
                Some(("torch._utils", "_rebuild_tensor_v3")) => {
                    return match dtype(6) {
                        Some(dtype) => self.rebuild(arguments, Some(dtype)),
                        None => Ok(None),
                    };
                }
                Some(("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state")) => {
                    let Some(&inner) = arguments.first() else {
                        return Ok(None);
                    };
                    id = inner;
                }
                Some(("torch._tensor", "_rebuild_from_type_v2")) => {
                    // (function, class, arguments, state)
                    let (Some(&function), Some(&inner)) = (arguments.first(), arguments.get(2))
                    else {
                        return Ok(None);
                    };
                    let function = self.pickle.global(function);
                    let plain = Some(("torch._utils", "_rebuild_tensor_v2"));
                    return match self.pickle.elements(inner) {
                        Some(arguments) if function == plain => self.rebuild(arguments, None),
                        _ => Ok(None),
                    };
                }
                _ => return Ok(None),
            }
        }
        Ok(None)
    }

    /// `(storage, offset, sizes, strides, ..)`; None if the element type is unknown here.
    fn rebuild(&self, arguments: &[Id], dtype: Option<Dtype>) -> Result<Option<Tensor>> {
        let malformed = || {
            Error::format(
                "a tensor whose storage, offset, sizes or strides are not as torch writes them",
            )
        };
        let &[storage, offset, sizes, strides, ..] = arguments else {
            return Err(malformed());
        };
        let Some(reference) = StorageRef::of(&self.pickle, self.pickle.node(storage)) else {
            return Ok(None);
        };
        let Some(dtype) = dtype.or(reference.dtype) else {
            return Ok(None);
        };
        let counts = |id: Id| -> Option<Vec<usize>> {
            let count = |&id: &Id| usize::try_from(self.pickle.count(id)?).ok();
            let all = self.pickle.elements(id)?;
            let few = all.len() <= DIMENSIONS;
            few.then(|| all.iter().map(count).collect()).flatten()
        };
        let (Some(shape), Some(strides), Some(offset)) =
            (counts(sizes), counts(strides), self.pickle.count(offset))
        else {
            return Err(malformed());
        };
        let key = reference.key;
        let &(start, len) = self
            .storages
            .get(key)
            .ok_or_else(|| Error::format(format!("storage {key} is missing in the file")))?;
        let storage = match reference.part {
            None => (start, len),
            Some((first, count)) => {
                let part = || {
                    let first = first.checked_mul(reference.width())?;
                    let bytes = count.checked_mul(reference.width())?;
                    (first.checked_add(bytes)? <= len).then(|| (start + first, bytes))
                };
                part().ok_or_else(|| {
                    Error::format(format!("a part that reaches beyond storage {key}"))
                })?
            }
        };
        Tensor::view(dtype, (shape, strides), offset, storage).map(Some)
    }

    /// The name of an entry in a container.
    fn name(&self, key: Id) -> Option<String> {
        match self.pickle.node(key) {
            Node::Int(n) => Some(n.to_string()),
            _ => self.pickle.text(key).map(str::to_owned),
        }
    }

    /// Names and nodes directly inside a container.
    fn children(&self, id: Id) -> Box<dyn Iterator<Item = (String, Id)> + '_> {
        match self.pickle.node(id) {
            Node::Dict(items) => Box::new(
                items
                    .iter()
                    .filter_map(|&(key, value)| Some((self.name(key)?, value))),
            ),
            Node::List(elements) | Node::Tuple(elements) => Box::new(
                elements
                    .iter()
                    .enumerate()
                    .map(|(i, &element)| (i.to_string(), element)),
            ),
            _ => Box::new(std::iter::empty()),
        }
    }

    /// All dictionaries with tensors, each once, outer ones first.
    fn dictionaries(&mut self) -> Result<Vec<Dictionary>> {
        let mut tensors = Limited::new("tensors", TENSORS);
        let mut names = Limited::new("bytes of names", NAMES);
        let mut found = Vec::new();
        let mut seen = HashSet::from([self.pickle.root]);
        let mut level = vec![(String::new(), self.pickle.root)];
        for _ in 0..DEPTH {
            let mut below = Vec::new();
            for (path, id) in level {
                let mut dictionary = Dictionary::new(path);
                let mut arrays = std::mem::take(&mut self.arrays);
                for (name, child) in self.children(id) {
                    let tensor = match self.tensor(child)? {
                        None => arrays.read(&self.pickle, child)?,
                        tensor => tensor,
                    };
                    if let Some(tensor) = tensor {
                        tensors.add(1)?;
                        names.add(name.len())?;
                        dictionary.insert(name, tensor);
                    } else if self.is_container(child) && seen.insert(child) {
                        let path = join(&dictionary.path, &name);
                        names.add(path.len())?;
                        below.push((path, child));
                    }
                }
                self.arrays = arrays;
                if !dictionary.tensors.is_empty() {
                    found.push(dictionary);
                }
            }
            level = below;
        }
        Ok(found)
    }

    fn is_container(&self, id: Id) -> bool {
        matches!(
            self.pickle.node(id),
            Node::Dict(_) | Node::List(_) | Node::Tuple(_)
        )
    }

    /// Names of imports that this crate does not interpret.
    fn strangers(&self) -> Vec<String> {
        let calls = self.pickle.nodes().filter_map(|node| match node {
            Node::Call { callable, .. } | Node::Built { callable, .. } => Some(*callable),
            _ => None,
        });
        let callables: HashSet<Id> = calls.collect();
        let mut names = BTreeSet::new();
        for (module, name) in callables
            .into_iter()
            .filter_map(|id| self.pickle.global(id))
        {
            let known = matches!(module, "torch._utils" | "torch._tensor" | "torch")
                || self.arrays.understand(module, name);
            if !known {
                names.insert(format!("{module}.{name}"));
                if names.len() > STRANGERS {
                    names.pop_last();
                }
            }
        }
        names.into_iter().collect()
    }
}

/// A quantity with a limit.
struct Limited {
    what: &'static str,
    limit: u64,
    left: u64,
}

impl Limited {
    fn new(what: &'static str, limit: u64) -> Self {
        Self {
            what,
            limit,
            left: limit,
        }
    }

    fn add(&mut self, n: usize) -> Result<()> {
        self.left = self.left.checked_sub(n as u64).ok_or(Error::Limit {
            what: self.what,
            limit: self.limit,
        })?;
        Ok(())
    }
}

impl Content {
    fn of(pickle: Pickle, storages: Storages) -> Result<Self> {
        let mut value = Value {
            pickle,
            storages,
            arrays: Arrays::default(),
        };
        Ok(Self {
            dictionaries: value.dictionaries()?,
            strangers: value.strangers(),
            arrays: value.arrays.into_bytes(),
        })
    }
}

fn join(path: &str, name: &str) -> String {
    match path {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    }
}
