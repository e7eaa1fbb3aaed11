//! Networks as artifacts: a directory with `config.json` and safetensors under published names.
//!
//! ```text
//! tokenizer/  config.json  tokenizer.safetensors
//! teacher/    config.json  tokenizer.safetensors  model.safetensors
//! student/    config.json  tokenizer.safetensors  model.safetensors   (the moving average)
//!             snapshots/1000.safetensors ..                           (the same after 1000 steps, if asked for)
//! ```
//!
//! A directory is complete in itself: whoever loads a student can decode what it predicts.

use std::path::{Path, PathBuf};

use retort_checkpoint::regular;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::memory::floats;
use crate::model::{Student, Teacher, TokenShape, Tokenizer, llamagen, msvq, var, vq};
use crate::stage::link;
use crate::weights::{self, Loader, Source, Start, Stored, Weights};

/// `config.json` of a tokenizer, teacher or student.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Version of this layout.
    pub format: u32,
    /// The tokenizer's shape.
    pub tokenizer: TokenizerConfig,
    /// The teacher's or student's shape.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkConfig>,
    /// A student's timesteps, in AR steps, ascending from 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timesteps: Vec<usize>,
}

/// A family of networks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// One token after the other, in raster order.
    #[default]
    Llamagen,
    /// All tokens of a scale at once, coarse to fine.
    Var,
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Llamagen => "llamagen",
            Self::Var => "var",
        })
    }
}

/// Shape of a tokenizer, by family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "lowercase")]
pub enum TokenizerConfig {
    /// LlamaGen's VQ-16 and kin.
    Vq(vq::Config),
    /// VAR's multi-scale VQ.
    Msvq(msvq::Config),
}

/// Shape of a teacher or student, by family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "lowercase")]
pub enum NetworkConfig {
    /// LlamaGen.
    Llamagen(llamagen::Config),
    /// VAR.
    Var(var::Config),
}

const CONFIG: &str = "config.json";
/// The most bytes of a configuration.
pub const CONFIG_MOST: u64 = 1 << 20;
/// The file with the weights of the tokenizer.
pub const TOKENIZER: &str = "tokenizer.safetensors";
/// The file with the weights of the teacher or student.
pub const MODEL: &str = "model.safetensors";
/// The folder of a student with its weights at earlier steps of its training, one file each.
pub const SNAPSHOTS: &str = "snapshots";

impl TokenizerConfig {
    /// Channels, height and width of the images.
    pub fn image(&self) -> [usize; 3] {
        let shape = match self {
            Self::Vq(c) => &c.autoencoder,
            Self::Msvq(c) => &c.autoencoder,
        };
        [shape.image_channels, shape.image_size, shape.image_size]
    }

    /// Bytes that decoding holds of an image at least: input and output of a block at its widest.
    pub fn bytes_of_decoding(&self) -> Option<u64> {
        let shape = match self {
            Self::Vq(c) => &c.autoencoder,
            Self::Msvq(c) => &c.autoencoder,
        };
        let levels = shape.multipliers.iter().enumerate();
        let mut each = levels.map(|(level, multiplier)| {
            let side = (shape.image_size >> level).max(1);
            floats(&[2, shape.channels, *multiplier, side, side])
        });
        each.try_fold(0, |most: u64, level| Some(most.max(level?)))
    }

    /// The family whose tokens it makes.
    pub fn family(&self) -> Family {
        match self {
            Self::Vq(_) => Family::Llamagen,
            Self::Msvq(_) => Family::Var,
        }
    }

    /// Codebook size K and dimension D.
    pub fn codebook(&self) -> (usize, usize) {
        match self {
            Self::Vq(c) => (c.vocabulary, c.codebook_dim),
            Self::Msvq(c) => (c.vocabulary, c.autoencoder.z_channels),
        }
    }

    /// Builds the tokenizer.
    pub fn build<B: Backend>(&self, loader: &mut Loader<B>) -> Result<Box<dyn Tokenizer<B>>> {
        match self {
            Self::Vq(c) => Ok(Box::new(vq::VqModel::load(loader, c)?)),
            Self::Msvq(c) => Ok(Box::new(msvq::MultiScaleVq::load(loader, c)?)),
        }
    }
}

impl NetworkConfig {
    /// Shape of the token sequences.
    pub fn tokens(&self) -> TokenShape {
        match self {
            Self::Llamagen(c) => c.token_shape(),
            Self::Var(c) => c.token_shape(),
        }
    }

    /// Builds the teacher. Its tokenizer is given by shape and weights, for a family that feeds on the feature maps which
    /// the tokenizer's quantiser makes of tokens.
    pub fn teacher<B: Backend>(
        &self,
        loader: &mut Loader<B>,
        tokenizer: (&TokenizerConfig, &mut Loader<B>),
    ) -> Result<Box<dyn Teacher<B>>> {
        match (self, tokenizer) {
            (Self::Llamagen(c), _) => Ok(Box::new(llamagen::Gpt::load(loader, c)?)),
            (Self::Var(c), (TokenizerConfig::Msvq(t), weights)) => {
                let quantiser = msvq::Quantiser::load(weights, t)?;
                Ok(Box::new(var::Transformer::load(loader, c, quantiser)?))
            }
            (Self::Var(_), (TokenizerConfig::Vq(_), _)) => Err(Error::Internal(
                "a VAR teacher needs a multi-scale tokenizer".into(),
            )),
        }
    }

    /// Builds the student.
    pub fn student<B: Backend>(&self, loader: &mut Loader<B>) -> Result<Box<dyn Student<B>>> {
        match self {
            Self::Llamagen(c) => Ok(Box::new(llamagen::GptStudent::load(loader, c)?)),
            Self::Var(c) => Ok(Box::new(var::TransformerStudent::load(loader, c)?)),
        }
    }

    /// Whether the logits alone come of a parameter of a student.
    pub fn is_of_logits(&self, name: &str) -> bool {
        let own: &[&str] = match self {
            Self::Llamagen(_) => &llamagen::LOGITS,
            Self::Var(_) => &var::LOGITS,
        };
        own.iter().any(|prefix| name.starts_with(prefix))
    }

    /// Bytes that a teacher's generation holds of a sample at least: keys and values of all positions, and a step's logits;
    /// with guidance twice.
    pub fn bytes_of_generation(&self, guided: bool) -> Option<u64> {
        let (shape, rows) = (self.tokens(), 1 + usize::from(guided));
        let (width, depth) = match self {
            Self::Llamagen(c) => (c.width, c.depth),
            Self::Var(c) => (c.width, c.depth),
        };
        let positions = shape.tokens() + shape.condition.positions();
        let step = shape.steps.iter().max().copied().unwrap_or(1);
        let caches = floats(&[2, rows, depth, positions, width])?;
        caches.checked_add(floats(&[rows, step, shape.vocabulary])?)
    }

    /// The shape of a student of this teacher, with at least as many blocks.
    pub fn deepened(&self, depth: Option<usize>) -> Result<Self> {
        let own = match self {
            Self::Llamagen(c) => c.depth,
            Self::Var(c) => c.depth,
        };
        let depth = depth.unwrap_or(own);
        if depth < own {
            let message = format!("depth {depth}: the teacher has {own} blocks already");
            return Err(Error::option("/depth", message));
        }
        let mut student = self.clone();
        match &mut student {
            Self::Llamagen(c) => c.depth = depth,
            Self::Var(c) => c.depth = depth,
        }
        Ok(student)
    }

    /// From what a parameter of a student of this teacher starts. Parameters whose meaning changes are drawn anew; blocks
    /// beyond the teacher's start as the identity.
    pub fn start(&self, name: &str) -> Start {
        match self {
            Self::Llamagen(c) => c.start(name),
            Self::Var(c) => c.start(name),
        }
    }
}

/// A directory with networks.
#[derive(Debug, Clone)]
pub struct Bundle<'p> {
    dir: &'p Path,
    /// Its `config.json`.
    pub config: Config,
}

impl<'p> Bundle<'p> {
    /// Reads the configuration of a directory.
    pub fn open(dir: &'p Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let text = regular::read(&path, CONFIG_MOST).map_err(Error::io(&path))?;
        let config: Config = serde_json::from_slice(&text).map_err(|e| Error::data(&path, e))?;
        if config.format != FORMAT {
            return Err(Error::data(
                &path,
                format!("format {}, expected {FORMAT}", config.format),
            ));
        }
        Ok(Self { dir, config })
    }

    /// The shape of the teacher or student.
    pub fn network(&self) -> Result<&NetworkConfig> {
        let missing = || {
            Error::data(
                self.dir.join(CONFIG),
                "no `network`: this is a tokenizer, not a teacher or student",
            )
        };
        self.config.network.as_ref().ok_or_else(missing)
    }

    /// Loads the tokenizer as constants.
    pub fn tokenizer<B: Backend>(&self, backend: &B) -> Result<Box<dyn Tokenizer<B>>> {
        self.load(backend, TOKENIZER, |loader| {
            self.config.tokenizer.build(loader)
        })
    }

    /// The weights of the tokenizer.
    pub fn tokenizer_file(&self) -> Result<Stored> {
        Stored::open(&self.dir.join(TOKENIZER), None)
    }

    /// The weights of the teacher or student.
    pub fn network_file(&self) -> Result<Stored> {
        Stored::open(&self.dir.join(MODEL), None)
    }

    /// Steps of training after which a student's weights were kept, ascending.
    pub fn snapshots(&self) -> Result<Vec<u64>> {
        let dir = self.dir.join(SNAPSHOTS);
        if !dir.is_dir() {
            return Ok(Vec::new());
        }
        let mut steps = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(Error::io(&dir))? {
            let name = entry.map_err(Error::io(&dir))?.file_name();
            let step = name
                .to_str()
                .and_then(|name| name.strip_suffix(".safetensors"));
            steps.extend(step.and_then(|step| step.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Loads the teacher as constants.
    pub fn teacher<B: Backend>(&self, backend: &B) -> Result<Box<dyn Teacher<B>>> {
        let (network, shape) = (self.network()?, &self.config.tokenizer);
        self.load(backend, MODEL, |loader| {
            self.load(backend, TOKENIZER, |tokenizer| {
                network.teacher(loader, (shape, tokenizer))
            })
        })
    }

    /// Loads the student as constants.
    pub fn student<B: Backend>(&self, backend: &B) -> Result<Box<dyn Student<B>>> {
        let network = self.network()?;
        self.load(backend, MODEL, |loader| network.student(loader))
    }

    /// Builds a network tensor by tensor from one of the files.
    fn load<B: Backend, T>(
        &self,
        backend: &B,
        file: &str,
        build: impl FnOnce(&mut Loader<B>) -> Result<T>,
    ) -> Result<T> {
        let stored = Stored::open(&self.dir.join(file), None)?;
        let origin = stored.path().display().to_string();
        build(&mut Loader::new(
            backend,
            Source::Files(std::slice::from_ref(&stored)),
            false,
            origin,
        ))
    }
}

const FORMAT: u32 = 1;

/// Writes the directory of a tokenizer.
pub fn write_tokenizer(dir: &Path, config: &TokenizerConfig, weights: &Weights) -> Result<()> {
    write_config(dir, config, None, &[])?;
    weights::write(&dir.join(TOKENIZER), weights)
}

/// Writes the directory of a teacher or student, with the tokenizer of another directory.
pub fn write_network(
    dir: &Path,
    tokenizer: &Bundle<'_>,
    network: (&NetworkConfig, &Weights),
    timesteps: &[usize],
) -> Result<()> {
    write_config(dir, &tokenizer.config.tokenizer, Some(network.0), timesteps)?;
    link(&tokenizer.dir.join(TOKENIZER), &dir.join(TOKENIZER))?;
    weights::write(&dir.join(MODEL), network.1)
}

/// Writes the directory of a student as it was at an earlier step of its training.
pub fn write_snapshot(dir: &Path, student: &Bundle<'_>, step: u64) -> Result<()> {
    let c = &student.config;
    write_config(dir, &c.tokenizer, c.network.as_ref(), &c.timesteps)?;
    link(&student.dir.join(TOKENIZER), &dir.join(TOKENIZER))?;
    link(&student.dir.join(snapshot(step)), &dir.join(MODEL))
}

/// The file of a student's directory with its weights after so many steps.
pub fn snapshot(step: u64) -> PathBuf {
    Path::new(SNAPSHOTS).join(format!("{step}.safetensors"))
}

/// Writes the configuration of a directory.
pub fn write_config(
    dir: &Path,
    tokenizer: &TokenizerConfig,
    network: Option<&NetworkConfig>,
    timesteps: &[usize],
) -> Result<()> {
    let config = Config {
        format: FORMAT,
        tokenizer: tokenizer.clone(),
        network: network.cloned(),
        timesteps: timesteps.to_vec(),
    };
    let path = dir.join(CONFIG);
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::Internal(e.to_string()))?;
    std::fs::write(&path, text + "\n").map_err(Error::io(&path))
}
