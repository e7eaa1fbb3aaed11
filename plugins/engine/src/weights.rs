//! Named weights: on the host, in files, and as the variables of a model.
//!
//! A model asks a [`Loader`] for each of its parameters by its published name, with the shape it expects; the loader
//! takes it from weights that exist or draws it. So one constructor serves training from scratch, fine-tuning and
//! inference, and a missing or misshapen weight is an error that names it.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::random::{Sequence, Stream};
use crate::tape::Var;

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

/// Named variables of a model, in the order in which it asked for them.
pub type Params<B> = Vec<(String, Var<B>)>;

/// Reads the floats of a safetensors file (f32, f16, bf16 and f64 become f32).
pub fn read(path: &Path) -> Result<Weights> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::data(path, format!("not a safetensors file: {e}")))?;
    file.iter()
        .map(|(name, view)| {
            let data = floats(&view).ok_or_else(|| {
                Error::data(
                    path,
                    format!("tensor {name} has type {:?}, expected floats", view.dtype()),
                )
            })?;
            Ok((
                name.to_owned(),
                Floats {
                    shape: view.shape().to_vec(),
                    data,
                },
            ))
        })
        .collect()
}

/// The elements of a tensor of floats.
pub fn floats(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let bytes = view.data();
    Some(match view.dtype() {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        Dtype::F64 => bytes
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32)
            .collect(),
        Dtype::BF16 => bytes
            .chunks_exact(2)
            .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        Dtype::F16 => bytes
            .chunks_exact(2)
            .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        _ => return None,
    })
}

/// The elements of a tensor of non-negative integers, whatever their width.
pub fn indices(view: &TensorView<'_>) -> Option<Vec<u32>> {
    let bytes = view.data();
    match view.dtype() {
        Dtype::U8 => Some(bytes.iter().map(|&b| u32::from(b)).collect()),
        Dtype::U16 => Some(
            bytes
                .chunks_exact(2)
                .map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])))
                .collect(),
        ),
        Dtype::U32 | Dtype::I32 => bytes
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .map(in_range)
            .collect(),
        Dtype::I64 | Dtype::U64 => bytes
            .chunks_exact(8)
            .map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .map(|x| u32::try_from(x).ok().and_then(in_range))
            .collect(),
        _ => None,
    }
}

/// Indices are below 2^31: the upper half are negative numbers of a signed type.
fn in_range(x: u32) -> Option<u32> {
    (x <= i32::MAX as u32).then_some(x)
}

/// Writes weights as f32 safetensors.
pub fn write(path: &Path, weights: &Weights) -> Result<()> {
    let bytes: BTreeMap<&str, Vec<u8>> = weights
        .iter()
        .map(|(name, w)| (name.as_str(), le_bytes(&w.data)))
        .collect();
    let views = weights.iter().map(|(name, w)| {
        TensorView::new(Dtype::F32, w.shape.clone(), &bytes[name.as_str()])
            .map(|view| (name.clone(), view))
            .map_err(|e| Error::Internal(format!("{name}: {e}")))
    });
    let views: Vec<_> = views.collect::<Result<_>>()?;
    safetensors::serialize_to_file(views, None, path).map_err(|e| Error::data(path, e))
}

/// Little-endian bytes of floats.
pub fn le_bytes(data: &[f32]) -> Vec<u8> {
    data.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Copies variables to the host.
pub fn from_params<B: Backend>(params: &[(String, Var<B>)]) -> Result<Weights> {
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

/// How a parameter starts when there is no weight for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All the same value.
    Constant(f32),
    /// Normal with a standard deviation.
    Normal(f32),
    /// Uniform within plus and minus a bound.
    Uniform(f32),
}

/// Where a [`Loader`] finds parameters.
pub enum Source<'a, B: Backend> {
    /// Weights on the host; an absent one is an error.
    Host(&'a Weights),
    /// Weights on the host; absent ones are drawn with the seed.
    HostOrInit(&'a Weights, u64),
    /// All are drawn with the seed.
    Init(u64),
    /// Tensors already on the device, shared with whoever else holds them.
    Device(&'a BTreeMap<String, B::Tensor>),
}

/// Gives a model its parameters and remembers them.
pub struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: Source<'a, B>,
    trainable: bool,
    /// What the weights are, for messages: a path.
    origin: String,
    params: Params<B>,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// A loader of constants (`trainable: false`) or of variables that want gradients.
    pub fn new(
        backend: &'a B,
        source: Source<'a, B>,
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

    /// Whether the parameters never change, so that something derived from them may be kept: they are neither trained
    /// here nor shared with whoever trains them.
    pub fn frozen(&self) -> bool {
        !self.trainable && !matches!(self.source, Source::Device(_))
    }

    /// The parameter of a name and shape.
    pub fn get(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Var<B>> {
        let drawn = |seed| {
            self.backend
                .floats(&draw(seed, name, shape.iter().product(), init), shape)
        };
        let value = match &self.source {
            Source::Init(seed) => drawn(*seed)?,
            Source::HostOrInit(weights, seed) if !weights.contains_key(name) => drawn(*seed)?,
            Source::Host(weights) | Source::HostOrInit(weights, _) => {
                let found = weights.get(name).ok_or_else(|| self.missing(name, shape))?;
                self.check_shape(name, &found.shape, shape)?;
                if let Some(at) = found.data.iter().position(|x| !x.is_finite()) {
                    return Err(Error::data(
                        &self.origin,
                        format!("weight {name} holds {} at element {at}", found.data[at]),
                    ));
                }
                self.backend.floats(&found.data, shape)?
            }
            Source::Device(tensors) => {
                let found = tensors.get(name).ok_or_else(|| self.missing(name, shape))?;
                self.check_shape(name, &B::shape(found), shape)?;
                found.clone()
            }
        };
        let var = if self.trainable {
            Var::parameter(value)
        } else {
            Var::constant(value)
        };
        self.params.push((name.to_owned(), var.clone()));
        Ok(var)
    }

    /// The parameters given out so far.
    pub fn into_params(self) -> Params<B> {
        self.params
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

/// A parameter drawn from its name and the seed, so that the order of construction does not matter.
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
    }
    out
}
