//! Parity with the published PyTorch code: whole networks on a backend against results computed with it.
//!
//! In: an opened backend and a directory like `tests/golden` in the repository, with a folder for each network: its sizes, a
//! rule for its weights (`weights.json`), and the published code's results on the CPU in float32 (`expected.safetensors`).
//! Out: one [`Case`] per tensor. Every tensor must agree within 1e-4 of its largest magnitude, every token exactly; none is
//! left out.

mod captions;
mod classes;
mod measures;
mod prefix;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::Case;
use crate::backend::{Backend, FlowSolver};
use crate::error::{Error, Result};
use crate::weights::{CheckpointWeights, Floats, Loader, ParameterSource, Weights};

pub use measures::measures;

/// Largest allowed error, relative to the largest magnitude of the tensor.
pub const TOLERANCE: f64 = 1e-4;

/// Largest difference relative to the largest magnitude expected.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let scale = expected
        .iter()
        .fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
    let differences = found
        .iter()
        .zip(expected)
        .map(|(a, b)| f64::from((a - b).abs()));
    // Not `f64::max`, which would not see a NaN.
    differences.fold(0.0, |m, x| if x <= m { m } else { x }) / scale
}

/// Expected tensors of a file, and which of them have been compared.
struct Expected {
    path: PathBuf,
    stored: CheckpointWeights,
    seen: RefCell<BTreeSet<String>>,
}

impl Expected {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            stored: CheckpointWeights::open(path, None)?,
            seen: RefCell::default(),
        })
    }

    fn has(&self, name: &str) -> bool {
        self.stored.shape(name).is_some()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let missing = || Error::data(&self.path, format!("no tensor `{name}`"));
        Ok(self.stored.shape(name).ok_or_else(missing)?.to_vec())
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>> {
        self.seen.borrow_mut().insert(name.to_owned());
        self.stored.floats(name)
    }

    fn indices(&self, name: &str) -> Result<Vec<u32>> {
        self.seen.borrow_mut().insert(name.to_owned());
        self.stored.indices(name)
    }

    /// A number: a tensor of one element.
    fn number(&self, name: &str) -> Result<f64> {
        let one = self.floats(name)?.first().copied();
        one.map(f64::from)
            .ok_or_else(|| Error::data(&self.path, format!("`{name}` is empty")))
    }

    /// Fails if tensors of the file were not compared, except those whose names begin with `spared`: an omitted tensor has
    /// not passed.
    fn all_seen(&self, spared: Option<&str>) -> Result<()> {
        let seen = self.seen.borrow();
        let is_spared = |name: &str| spared.is_some_and(|prefix| name.starts_with(prefix));
        let mut names = self.stored.shapes().map(|(name, _)| name);
        match names.find(|name| !seen.contains(*name) && !is_spared(name)) {
            None => Ok(()),
            Some(name) => Err(Error::data(
                &self.path,
                format!("nothing is compared with `{name}`"),
            )),
        }
    }
}

/// The suite under way.
struct Suite<'b, B: Backend> {
    backend: &'b B,
    network: &'static str,
    expected: Expected,
    /// The value of [`Case::chosen`] for the next comparisons.
    chosen: bool,
    cases: Vec<Case>,
}

impl<'b, B: Backend> Suite<'b, B> {
    fn open(backend: &'b B, network: &'static str, expected: &Path) -> Result<Self> {
        Ok(Self {
            backend,
            network,
            expected: Expected::open(expected)?,
            chosen: false,
            cases: Vec::new(),
        })
    }

    fn tensor(&self, name: &str) -> Result<B::Tensor> {
        self.backend
            .floats(&self.expected.floats(name)?, &self.expected.shape(name)?)
    }

    fn ids(&self, name: &str) -> Result<B::Tensor> {
        self.backend
            .indices(&self.expected.indices(name)?, &self.expected.shape(name)?)
    }

    fn floats(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        self.values(name, &B::shape(found), &B::to_floats(found)?)
    }

    fn values(&mut self, name: &str, shape: &[usize], found: &[f32]) -> Result<()> {
        let wanted = self.expected.shape(name)?;
        let expected = self.expected.floats(name)?;
        let name = format!("{}/{name}", self.network);
        self.record(match shape == wanted {
            true => Case::new(name, relative_error(found, &expected), TOLERANCE),
            false => Case::new(
                format!("{name}: shape {shape:?}, expected {wanted:?}"),
                f64::INFINITY,
                TOLERANCE,
            ),
        });
        Ok(())
    }

    fn record(&mut self, case: Case) {
        let chosen = self.chosen;
        self.cases.push(Case { chosen, ..case });
    }

    fn tokens(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        let (found, expected) = (B::to_indices(found)?, self.expected.indices(name)?);
        let pairs = found.iter().zip(&expected);
        let differing = match found.len() == expected.len() {
            true => pairs.filter(|(a, b)| a != b).count() as f64 / found.len() as f64,
            false => f64::INFINITY,
        };
        let name = format!("{}/{name}", self.network);
        let chosen = true;
        let case = Case::new(name, differing, 0.0);
        self.cases.push(Case { chosen, ..case });
        Ok(())
    }

    /// Compares decoded images: `{name}.image` is the decoder's output, `{name}.image01` the image in [0, 1].
    fn image(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        let shown = format!("{name}.image01");
        if !self.expected.has(&shown) {
            return self.floats(&format!("{name}.image"), found);
        }
        let pixels = B::to_floats(found)?;
        let pixels: Vec<f32> = pixels
            .iter()
            .map(|x| ((x + 1.0) / 2.0).clamp(0.0, 1.0))
            .collect();
        self.values(&shown, &B::shape(found), &pixels)
    }
}

/// Compares all networks with the results in `dir`.
///
/// # Errors
/// The backend fails, or a file is missing or invalid.
pub fn check<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let mut cases = models(backend, dir)?;
    cases.extend(measures(backend, dir)?);
    Ok(cases)
}

/// Compares the networks that make images, and their samplers.
///
/// # Errors
/// As [`check`].
pub fn models<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let mut cases = flow(backend, dir)?;
    cases.extend(classes::llamagen(backend, dir)?);
    cases.extend(classes::var(backend, dir)?);
    cases.extend(prefix::check(backend, dir)?);
    cases.extend(classes::var_variants(backend)?);
    cases.extend(captions::check(backend, dir)?);
    Ok(cases)
}

/// Compares the flow map with the float64 reference on every case of `flow`.
fn flow<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for case in ["small", "llamagen", "topk", "var"] {
        let file = dir.join(format!("flow/flow_{case}.safetensors"));
        let mut suite = Suite::open(backend, "flow", &file)?;
        let [logits, noise, codebook] =
            ["logits", "noise", "codebook"].map(|name| suite.tensor(name));
        let ids = B::flow_map(&logits?, &noise?, &codebook?, &FlowSolver::default())?;
        suite.tokens("token", &ids)?;
        cases.extend(suite.cases.into_iter().map(|known| Case {
            name: format!("flow/{case}/token"),
            chosen: false,
            ..known
        }));
    }
    Ok(cases)
}

/// Sizes of a network, in a file of JSON.
struct Numbers {
    path: PathBuf,
    values: Value,
}

impl Numbers {
    fn open(path: PathBuf) -> Result<Self> {
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let values = serde_json::from_str(&text).map_err(|e| Error::data(&path, e))?;
        Ok(Self { path, values })
    }

    /// A value: of a number `usize`, of a list `Vec<usize>`, of a flag `bool`.
    fn get<'a, T: Deserialize<'a>>(&'a self, name: &str) -> Result<T> {
        T::deserialize(&self.values[name])
            .map_err(|e| Error::data(&self.path, format!("`{name}`: {e}")))
    }

    /// The sizes of one of several networks.
    fn of(&self, network: &str) -> Self {
        Self {
            path: self.path.clone(),
            values: self.values[network].clone(),
        }
    }
}

/// Weights by the name of the network's part.
struct Parts(PathBuf, BTreeMap<String, Weights>);

impl Parts {
    fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("weights.json");
        let parts = procedural_weights(&path)?;
        Ok(Self(path, parts))
    }

    fn get(&self, part: &str) -> Result<&Weights> {
        let missing = || Error::data(&self.0, format!("no part `{part}`"));
        self.1.get(part).ok_or_else(missing)
    }

    fn tensor(&self, part: &str, name: &str) -> Result<&Floats> {
        let missing = || Error::data(&self.0, format!("no tensor `{name}` in `{part}`"));
        self.get(part)?.get(name).ok_or_else(missing)
    }

    fn loader<'b, B: Backend>(&'b self, backend: &'b B, part: &str) -> Result<Loader<'b, B>> {
        let source = ParameterSource::Host(self.get(part)?);
        Ok(Loader::new(backend, source, false, part.to_owned()))
    }
}

/// A tensor in `weights.json`: element i is scale * (2u - 1) + shift, u from SplitMix64 started at the seed.
#[derive(Deserialize)]
struct RandomTensor {
    name: String,
    shape: Vec<usize>,
    seed: u64,
    scale: f64,
    shift: f64,
}

impl RandomTensor {
    fn floats(&self) -> Floats {
        let count = self.shape.iter().product::<usize>() as u64;
        let data = (0..count).map(|i| {
            let mut z = self
                .seed
                .wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let u = ((z ^ (z >> 31)) >> 40) as f64 * 2f64.powi(-24);
            (self.scale * (2.0 * u - 1.0) + self.shift) as f32
        });
        Floats {
            data: data.collect(),
            shape: self.shape.clone(),
        }
    }
}

/// The weights of the parts of a network that `weights.json` describes.
///
/// # Errors
/// It cannot be read.
pub fn procedural_weights(path: &Path) -> Result<BTreeMap<String, Weights>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let parts: BTreeMap<String, Vec<RandomTensor>> =
        serde_json::from_str(&text).map_err(|e| Error::data(path, e))?;
    let named = |tensors: Vec<RandomTensor>| {
        let each = tensors.into_iter();
        each.map(|tensor| (tensor.name.clone(), tensor.floats()))
            .collect()
    };
    let parts = parts.into_iter();
    Ok(parts
        .map(|(part, tensors)| (part, named(tensors)))
        .collect())
}
