//! Named weights: on the host, in files, and as the variables of a model.
//!
//! A model requests each parameter from a [`Loader`] by its published name and expected shape; the loader takes it from
//! existing weights or draws it. So one constructor serves training from scratch, fine-tuning and inference, and a missing or
//! misshapen weight is an error that names it.
//!
//! Files are read and written one tensor at a time: there is never a second copy of a model in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use retort_checkpoint::{Checkpoint, Dictionary, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::memory;
use crate::random::{Sequence, Stream};
use crate::tape::Variable;

/// Floats on the host with their shape, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Floats {
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// Elements.
    pub data: Vec<f32>,
}

/// Named tensors on the host.
pub type Weights = BTreeMap<String, Floats>;

/// Named variables of a model, in the order in which it requested them.
pub type Params<B> = Vec<(String, Variable<B>)>;

/// Named tensors in a checkpoint, read on demand.
pub struct CheckpointWeights {
    path: PathBuf,
    checkpoint: Checkpoint,
    dictionary: Dictionary,
    prefix: String,
}

impl CheckpointWeights {
    /// Opens a file; `select` is the path of the dictionary, which may be omitted if there is only one.
    pub fn open(path: &Path, select: Option<&str>) -> Result<Self> {
        let checkpoint = Checkpoint::open(path).map_err(Error::checkpoint(path))?;
        let dictionary = checkpoint.select(select).map_err(Error::checkpoint(path))?;
        let dictionary = dictionary.clone();
        Ok(Self::of(path, checkpoint, dictionary))
    }

    /// A dictionary of an open file.
    pub fn of(path: &Path, checkpoint: Checkpoint, dictionary: Dictionary) -> Self {
        Self {
            path: path.to_owned(),
            checkpoint,
            dictionary,
            prefix: String::new(),
        }
    }

    /// The same, with the prefix that was removed from the file's names.
    pub fn without(mut self, prefix: String) -> Self {
        self.prefix = prefix;
        self
    }

    /// The prefix of names in the file that is removed here.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The file, or the folder or index that stands for several.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of the dictionary in the file; empty at the top level.
    pub fn dictionary(&self) -> &str {
        &self.dictionary.path
    }

    /// Names and shapes, in the order of the file.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.dictionary
            .tensors()
            .map(|(name, tensor)| (name, tensor.shape.as_slice()))
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.dictionary
            .get(name)
            .map(|tensor| tensor.shape.as_slice())
    }

    /// The elements of a tensor of floats.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        self.read(name, Checkpoint::floats)
    }

    /// The elements of a tensor of non-negative integers, whatever their width.
    pub fn indices(&self, name: &str) -> Result<Vec<u32>> {
        self.read(name, Checkpoint::indices)
    }

    /// The floats of `count` entries of a tensor's first dimension, from `first` on.
    pub fn rows(&self, name: &str, first: usize, count: usize) -> Result<Vec<f32>> {
        self.read(name, |checkpoint, tensor| {
            checkpoint.floats(&entries(tensor, first, count)?)
        })
    }

    /// The same of a tensor of non-negative integers.
    pub fn index_rows(&self, name: &str, first: usize, count: usize) -> Result<Vec<u32>> {
        self.read(name, |checkpoint, tensor| {
            checkpoint.indices(&entries(tensor, first, count)?)
        })
    }

    /// One of them, by position.
    pub fn index_at(&self, name: &str, place: &[usize]) -> Result<u32> {
        let found = self.read(name, |checkpoint, tensor| {
            let element = tensor.element(place).ok_or_else(|| {
                let message = format!("shape {:?}, no element {place:?}", tensor.shape);
                retort_checkpoint::Error::Format(message)
            })?;
            checkpoint.indices(&element)
        })?;
        Ok(found[0])
    }

    fn read<T>(
        &self,
        name: &str,
        elements: impl Fn(&Checkpoint, &Tensor) -> retort_checkpoint::Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let missing = || Error::data(&self.path, format!("no tensor {name}"));
        let tensor = self.dictionary.get(name).ok_or_else(missing)?;
        elements(&self.checkpoint, tensor).map_err(|error| match error {
            error @ retort_checkpoint::Error::Io(_) => Error::checkpoint(&self.path)(error),
            error => Error::data(&self.path, format!("tensor {name}: {error}")),
        })
    }
}

/// Some entries of a tensor's first dimension.
fn entries(tensor: &Tensor, first: usize, count: usize) -> retort_checkpoint::Result<Tensor> {
    tensor.rows(first, count).ok_or_else(|| {
        let shape = &tensor.shape;
        let message = format!("shape {shape:?}, expected {count} rows from {first} on");
        retort_checkpoint::Error::Format(message)
    })
}

/// Reads all float tensors in a file; counters and masks of other types are skipped.
pub fn read(path: &Path) -> Result<Weights> {
    let stored = CheckpointWeights::open(path, None)?;
    let floats = stored.dictionary.tensors().filter(|(_, t)| t.is_float());
    floats
        .map(|(name, tensor)| {
            let (shape, data) = (tensor.shape.clone(), stored.floats(name)?);
            Ok((name.to_owned(), Floats { shape, data }))
        })
        .collect()
}

/// Writes weights as f32 safetensors.
pub fn write(path: &Path, weights: &Weights) -> Result<()> {
    let shapes = weights
        .iter()
        .map(|(name, w)| (name.clone(), w.shape.clone()));
    write_each(path, shapes.collect(), |name| {
        Ok(Cow::from(&weights[name].data))
    })
}

/// Writes f32 safetensors of these names and shapes, with one tensor in memory at a time.
pub fn write_each<'w>(
    path: &Path,
    shapes: Vec<(String, Vec<usize>)>,
    mut elements: impl FnMut(&str) -> Result<Cow<'w, [f32]>>,
) -> Result<()> {
    let described = shapes
        .iter()
        .map(|(name, shape)| (name.clone(), Dtype::F32, shape.clone()));
    let mut writer = Writer::create(path, described.collect())?;
    for (name, shape) in &shapes {
        let data = elements(name)?;
        if data.len() != shape.iter().product::<usize>() {
            let message = format!("{name}: {} elements for shape {shape:?}", data.len());
            return Err(Error::Internal(message));
        }
        writer.floats(&data)?;
    }
    writer.finish()
}

/// A writer of a safetensors file, whose elements are written piece by piece, tensor by tensor.
pub struct Writer {
    path: PathBuf,
    file: BufWriter<std::fs::File>,
    /// Remaining bytes.
    left: usize,
}

impl Writer {
    /// Starts a file of tensors of these names, types and shapes.
    pub fn create(path: &Path, tensors: Vec<(String, Dtype, Vec<usize>)>) -> Result<Self> {
        let (header, end) = header(tensors)?;
        let mut file = std::fs::File::create(path)
            .map(BufWriter::new)
            .map_err(Error::io(path))?;
        file.write_all(&header).map_err(Error::io(path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            left: end,
        })
    }

    /// The next elements, little-endian.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.left = self.left.checked_sub(bytes.len()).ok_or_else(|| {
            Error::Internal(format!(
                "{}: more elements than shapes say",
                self.path.display()
            ))
        })?;
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }

    /// The next elements of a tensor of f32.
    pub fn floats(&mut self, data: &[f32]) -> Result<()> {
        let mut pieces = data.chunks(1 << 18);
        pieces.try_for_each(|piece| self.bytes(&le_bytes(piece)))
    }

    /// Ends the file.
    pub fn finish(mut self) -> Result<()> {
        if self.left > 0 {
            let message = format!("{}: {} bytes are missing", self.path.display(), self.left);
            return Err(Error::Internal(message));
        }
        self.file.flush().map_err(Error::io(&self.path))
    }
}

/// The header for tensors of these names, types and shapes, and the number of bytes that follow it.
pub fn header(tensors: Vec<(String, Dtype, Vec<usize>)>) -> Result<(Vec<u8>, usize)> {
    let mut end = 0;
    let info = |(name, dtype, shape): (String, Dtype, Vec<usize>)| {
        let start = end;
        end += dtype.bitsize() / 8 * shape.iter().product::<usize>();
        let data_offsets = (start, end);
        let info = TensorInfo {
            dtype,
            shape,
            data_offsets,
        };
        (name, info)
    };
    let infos = tensors.into_iter().map(info).collect();
    let metadata = Metadata::new(None, infos).map_err(|e| Error::Internal(e.to_string()))?;
    let mut text = serde_json::to_vec(&metadata).map_err(|e| Error::Internal(e.to_string()))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    Ok((header, end))
}

/// Little-endian bytes of floats.
pub fn le_bytes(data: &[f32]) -> Vec<u8> {
    data.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Copies variables to the host.
pub fn from_params<B: Backend>(params: &[(String, Variable<B>)]) -> Result<Weights> {
    params
        .iter()
        .map(|(name, p)| {
            Ok((
                name.clone(),
                Floats {
                    shape: p.shape(),
                    data: B::to_floats(p.value())?,
                },
            ))
        })
        .collect()
}

/// The initialisation of a parameter without a weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All the same value.
    Constant(f32),
    /// Normal with a standard deviation.
    Normal(f32),
    /// Uniform within plus and minus a bound.
    Uniform(f32),
    /// Six consecutive modulations: normal, the first two (gammas) with a separate standard deviation.
    Modulation {
        /// Of the gammas.
        gamma: f32,
        /// Of scales and shifts.
        others: f32,
    },
}

/// The initial value of a parameter in a network that starts from another network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InitialValue {
    /// The other network's weight with this name; drawn if there is none.
    Weight(String),
    /// Its weight of the same name, with the first entry of this dimension duplicated in front. Earlier dimensions have size
    /// 1.
    Longer(usize),
    /// Zeros.
    Zeros,
    /// Drawn.
    Drawn,
}

/// The number that follows a prefix in a parameter's name, and what comes after it: `layers.3.norm` -> 3, `norm`.
pub fn numbered<'n>(name: &'n str, prefix: &str) -> Option<(usize, &'n str)> {
    let (number, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

/// A [`Loader`]'s source of parameters.
pub enum ParameterSource<'a, B: Backend> {
    /// Weights in files, each from the first file that has it; a missing one is an error.
    Files(&'a [CheckpointWeights]),
    /// Weights of another network, in a file, to start from.
    Start {
        /// The file.
        file: &'a CheckpointWeights,
        /// The initial value of each parameter.
        of: &'a dyn Fn(&str) -> InitialValue,
        /// For those that are drawn.
        seed: u64,
    },
    /// Weights on the host; a missing one is an error.
    Host(&'a Weights),
    /// All are drawn with the seed.
    Init(u64),
    /// Tensors already on the device, shared with their other owners.
    Device(&'a BTreeMap<String, B::Tensor>),
}

/// Gives a model its parameters and remembers them.
pub struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: ParameterSource<'a, B>,
    trainable: bool,
    /// The weights' path, for messages.
    origin: String,
    params: Params<B>,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// A loader of constants (`trainable: false`) or of variables with gradients.
    pub fn new(
        backend: &'a B,
        source: ParameterSource<'a, B>,
        trainable: bool,
        origin: impl Into<String>,
    ) -> Self {
        Self {
            backend,
            source,
            trainable,
            origin: origin.into(),
            params: Vec::new(),
        }
    }

    /// The backend that holds the parameters.
    pub fn backend(&self) -> &'a B {
        self.backend
    }

    /// Whether the parameters never change, so that derived tensors may be cached: they are neither trained here nor shared
    /// with a training.
    pub fn frozen(&self) -> bool {
        !self.trainable && !matches!(self.source, ParameterSource::Device(_))
    }

    /// The parameter of a name and shape.
    pub fn get(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Variable<B>> {
        let value = self.find(name, shape, init)?;
        Ok(self.hand_out(name, value))
    }

    /// The parameter of a name and shape that only products read: a constant is stored in the products' type.
    pub fn factor(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Variable<B>> {
        let value = self.find(name, shape, init)?;
        let value = if self.frozen() {
            B::factor(&value)?
        } else {
            value
        };
        Ok(self.hand_out(name, value))
    }

    fn find(&self, name: &str, shape: &[usize], init: Init) -> Result<B::Tensor> {
        let drawn = |seed| {
            memory::check_tensor(name, shape)?;
            self.backend
                .floats(&draw(seed, name, shape.iter().product(), init), shape)
        };
        match &self.source {
            ParameterSource::Init(seed) => drawn(*seed),
            ParameterSource::Files(files) => {
                let holder = files.iter().find(|file| file.shape(name).is_some());
                self.read(
                    holder.ok_or_else(|| self.missing(name, shape))?,
                    name,
                    shape,
                )
            }
            ParameterSource::Start { file, of, seed } => match of(name) {
                InitialValue::Weight(name) if file.shape(&name).is_some() => {
                    self.read(file, &name, shape)
                }
                InitialValue::Weight(_) | InitialValue::Drawn => drawn(*seed),
                InitialValue::Zeros => self.backend.full(shape, 0.0),
                InitialValue::Longer(dim) => {
                    let mut found = file
                        .shape(name)
                        .ok_or_else(|| self.missing(name, shape))?
                        .to_vec();
                    let mut data = file.floats(name)?;
                    let entry = found[dim + 1..].iter().product::<usize>();
                    data.splice(0..0, data[..entry].to_vec());
                    found[dim] += 1;
                    self.check_shape(name, &found, shape)?;
                    self.upload(name, &data, shape)
                }
            },
            ParameterSource::Host(weights) => {
                let found = weights.get(name).ok_or_else(|| self.missing(name, shape))?;
                self.check_shape(name, &found.shape, shape)?;
                self.upload(name, &found.data, shape)
            }
            ParameterSource::Device(tensors) => {
                let found = tensors.get(name).ok_or_else(|| self.missing(name, shape))?;
                self.check_shape(name, &B::shape(found), shape)?;
                Ok(found.clone())
            }
        }
    }

    /// A weight from a file.
    fn read(&self, file: &CheckpointWeights, name: &str, shape: &[usize]) -> Result<B::Tensor> {
        self.check_shape(name, file.shape(name).unwrap_or_default(), shape)?;
        self.upload(name, &file.floats(name)?, shape)
    }

    fn hand_out(&mut self, name: &str, value: B::Tensor) -> Variable<B> {
        let var = if self.trainable {
            Variable::parameter(value)
        } else {
            Variable::constant(value)
        };
        self.params.push((name.to_owned(), var.clone()));
        var
    }

    /// The parameters loaded so far.
    pub fn into_params(self) -> Params<B> {
        self.params
    }

    /// Copies a weight to the device, after checking that it is finite.
    fn upload(&self, name: &str, data: &[f32], shape: &[usize]) -> Result<B::Tensor> {
        if let Some(at) = data.iter().position(|x| !x.is_finite()) {
            let message = format!("weight {name} holds {} at element {at}", data[at]);
            return Err(Error::data(&self.origin, message));
        }
        self.backend.floats(data, shape)
    }

    fn missing(&self, name: &str, shape: &[usize]) -> Error {
        Error::data(
            &self.origin,
            format!("weight {name} with shape {shape:?} is missing"),
        )
    }

    fn check_shape(&self, name: &str, found: &[usize], expected: &[usize]) -> Result<()> {
        if found == expected {
            return Ok(());
        }
        Err(Error::data(
            &self.origin,
            format!("weight {name} has shape {found:?}, expected {expected:?}"),
        ))
    }
}

/// A parameter drawn by its name and the seed, so the order of construction does not matter.
fn draw(seed: u64, name: &str, count: usize, init: Init) -> Vec<f32> {
    let hash = blake3::hash(name.as_bytes());
    let index = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"));
    let mut sequence = Sequence::new(seed, Stream::Init, index);
    let mut out = vec![0.0; count];
    match init {
        Init::Constant(value) => out.fill(value),
        Init::Normal(deviation) => {
            sequence.normals(&mut out);
            out.iter_mut().for_each(|x| *x *= deviation);
        }
        Init::Uniform(bound) => out
            .iter_mut()
            .for_each(|x| *x = (2.0 * sequence.uniform() - 1.0) as f32 * bound),
        Init::Modulation { gamma, others } => {
            sequence.normals(&mut out);
            let (gammas, rest) = out.split_at_mut(count / 3);
            gammas.iter_mut().for_each(|x| *x *= gamma);
            rest.iter_mut().for_each(|x| *x *= others);
        }
    }
    out
}
