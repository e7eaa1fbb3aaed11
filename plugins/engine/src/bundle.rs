//! Networks as artifacts: a directory with `config.json` and safetensors under published names.
//!
//! ```text
//! tokenizer/  config.json  tokenizer.safetensors
//! teacher/    config.json  tokenizer.safetensors  model.safetensors
//! student/    config.json  tokenizer.safetensors  model.safetensors   (the moving average)
//!             snapshots/1000.safetensors ..                           (the same after 1000 steps, if asked for)
//! ```
//!
//! A directory is self-contained: a student comes with the tokenizer that decodes its predictions.

use std::path::{Path, PathBuf};

use retort_checkpoint::{json, regular};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::files::{CONFIG_MOST, link};
use crate::model::{
    ConditioningShape, Student, Teacher, TokenShape, Tokenizer, llamagen, msvq, var, vq,
};
use crate::size::Sides;
use crate::weights::{self, CheckpointWeights, InitialValue, Loader, ParameterSource, Weights};

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
    /// Names of the classes of a teacher or student, if they have names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
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
        let Sides { height, width } = shape.image_size;
        [shape.image_channels, height, width]
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

    /// Positions of the coarsest feature maps.
    pub fn positions(&self) -> usize {
        let shape = match self {
            Self::Vq(c) => &c.autoencoder,
            Self::Msvq(c) => &c.autoencoder,
        };
        shape.map().area()
    }

    /// Channels of the feature maps at the images' full size.
    pub fn finest_channels(&self) -> usize {
        let shape = match self {
            Self::Vq(c) => &c.autoencoder,
            Self::Msvq(c) => &c.autoencoder,
        };
        shape
            .channels
            .saturating_mul(shape.multipliers.first().copied().unwrap_or(1))
    }

    /// Builds the tokenizer.
    pub fn build<B: Backend>(&self, loader: &mut Loader<B>) -> Result<Box<dyn Tokenizer<B>>> {
        match self {
            Self::Vq(c) => Ok(Box::new(vq::VqModel::load(loader, c)?)),
            Self::Msvq(c) => Ok(Box::new(msvq::MultiScaleVq::load(loader, c)?)),
        }
    }
}

/// The most tokens of an image, blocks of a network and channels of a block that a file may claim: the network is built
/// before its weights are looked up.
const TOKENS_MOST: usize = 1 << 16;
const BLOCKS_MOST: usize = 1000;
const WIDTH_MOST: usize = 1 << 16;
/// The longest side of an image.
const SIDE_MOST: usize = 8192;

/// Tokens in maps of these sides, saturating.
fn tokens(scales: &[usize]) -> usize {
    let areas = scales.iter().map(|&side| Sides::square(side).area());
    areas.fold(0, usize::saturating_add)
}

impl Config {
    /// Refuses shapes beyond those of any network.
    fn check(&self) -> Result<(), String> {
        let (shape, maps) = match &self.tokenizer {
            TokenizerConfig::Vq(c) => (&c.autoencoder, 0),
            TokenizerConfig::Msvq(c) => (&c.autoencoder, tokens(&c.scales)),
        };
        let image = shape.image_size;
        let mut sizes = vec![
            (
                "/tokenizer/image_size",
                image.height.max(image.width),
                SIDE_MOST,
                "pixels",
            ),
            ("/tokenizer/scales", maps, TOKENS_MOST, "tokens"),
            (
                "/tokenizer/res_blocks",
                shape.res_blocks,
                BLOCKS_MOST,
                "blocks",
            ),
        ];
        if let Some(network) = &self.network {
            let (field, tokens) = match network {
                NetworkConfig::Llamagen(c) => ("/network/side", c.map.area()),
                NetworkConfig::Var(c) => ("/network/scales", tokens(&c.scales)),
            };
            let (depth, width) = network.size();
            if let NetworkConfig::Llamagen(llamagen::Config {
                condition: ConditioningShape::Captions(captions),
                ..
            }) = network
            {
                let field = "/network/captions/positions";
                sizes.push((field, captions.positions, TOKENS_MOST, "tokens"));
            }
            sizes.extend([
                (field, tokens, TOKENS_MOST, "tokens"),
                ("/network/depth", depth, BLOCKS_MOST, "blocks"),
                ("/network/width", width, WIDTH_MOST, "channels"),
            ]);
        }
        match sizes.iter().find(|(_, found, most, _)| found > most) {
            None => Ok(()),
            Some((field, found, most, what)) => {
                Err(format!("{field}: {found} {what}, expected at most {most}"))
            }
        }
    }
}

impl NetworkConfig {
    /// Shape of the token sequences.
    pub fn token_shape(&self) -> TokenShape {
        match self {
            Self::Llamagen(c) => c.token_shape(),
            Self::Var(c) => c.token_shape(),
        }
    }

    /// Number and width of its blocks.
    pub fn size(&self) -> (usize, usize) {
        match self {
            Self::Llamagen(c) => (c.depth, c.width),
            Self::Var(c) => (c.depth, c.width),
        }
    }

    /// Whether guidance of this strength has an effect in the family: then generation computes two rows per image.
    pub fn is_guided(&self, guidance: Option<f64>) -> bool {
        match self {
            Self::Llamagen(_) => guidance.is_some_and(|s| s > 1.0),
            Self::Var(_) => guidance.is_some_and(|w| w != 0.0),
        }
    }

    /// Builds the teacher. Some families read the feature maps that the tokenizer's quantiser makes of tokens, so the
    /// tokenizer's shape and weights are given too.
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

    /// Number of classes that it is conditioned on, if it is conditioned on classes.
    pub fn classes(&self) -> Option<usize> {
        match self.token_shape().condition {
            ConditioningShape::Classes(classes) => Some(classes),
            ConditioningShape::Captions(_) => None,
        }
    }

    /// The same network for another number of classes.
    pub fn with_classes(mut self, classes: usize) -> Self {
        match &mut self {
            Self::Llamagen(c) => c.condition = ConditioningShape::Classes(classes),
            Self::Var(c) => c.classes = classes,
        }
        self
    }

    /// Name of the parameter with an embedding for each class.
    pub fn class_embedding(&self) -> &'static str {
        match self {
            Self::Llamagen(_) => llamagen::CLASS_EMBEDDING,
            Self::Var(_) => var::CLASS_EMBEDDING,
        }
    }

    /// Whether a student's parameter affects only its logits.
    pub fn is_of_logits(&self, name: &str) -> bool {
        let own: &[&str] = match self {
            Self::Llamagen(_) => &llamagen::LOGITS,
            Self::Var(_) => &var::LOGITS,
        };
        own.iter().any(|prefix| name.starts_with(prefix))
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

    /// The initial value of a parameter in a student of this teacher. Parameters whose meaning changes are drawn anew; blocks
    /// beyond the teacher's start as the identity.
    pub fn start(&self, name: &str) -> InitialValue {
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
        let config: Config = json::parse(&text).map_err(|e| Error::data(&path, e))?;
        if config.format != FORMAT {
            return Err(Error::data(
                &path,
                format!("format {}, expected {FORMAT}", config.format),
            ));
        }
        config.check().map_err(|e| Error::data(&path, e))?;
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
    pub fn tokenizer_file(&self) -> Result<CheckpointWeights> {
        CheckpointWeights::open(&self.dir.join(TOKENIZER), None)
    }

    /// The weights of the teacher or student.
    pub fn network_file(&self) -> Result<CheckpointWeights> {
        CheckpointWeights::open(&self.dir.join(MODEL), None)
    }

    /// The training steps with a snapshot of the student's weights, ascending.
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
        let stored = CheckpointWeights::open(&self.dir.join(file), None)?;
        let origin = stored.path().display().to_string();
        build(&mut Loader::new(
            backend,
            ParameterSource::Files(std::slice::from_ref(&stored)),
            false,
            origin,
        ))
    }
}

/// The differences of two shapes, for people: `codebook_dim 8 here, 4 there`.
pub fn differences(here: &impl Serialize, there: &impl Serialize) -> String {
    let fields = |x: Result<serde_json::Value, serde_json::Error>| match x {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    let (here, there) = (
        fields(serde_json::to_value(here)),
        fields(serde_json::to_value(there)),
    );
    let absent = serde_json::Value::Null;
    let mut names: Vec<&String> = here.keys().chain(there.keys()).collect();
    names.sort();
    names.dedup();
    let values = names.iter().map(|name| {
        let of = |x: &serde_json::Map<String, serde_json::Value>| {
            x.get(*name).unwrap_or(&absent).to_string()
        };
        (name, of(&here), of(&there))
    });
    let told = values.filter(|(_, here, there)| here != there);
    let told = told.map(|(name, here, there)| format!("{name} {here} here, {there} there"));
    told.collect::<Vec<_>>().join("; ")
}

const FORMAT: u32 = 1;

/// Writes the directory of a tokenizer.
pub fn write_tokenizer(dir: &Path, config: &TokenizerConfig, weights: &Weights) -> Result<()> {
    write_config(dir, config, None, (&[], &[]))?;
    weights::write(&dir.join(TOKENIZER), weights)
}

/// Writes the directory of a teacher or student, with the tokenizer of another directory. `shown`: a student's timesteps and
/// the names of the classes.
pub fn write_network(
    dir: &Path,
    tokenizer: &Bundle<'_>,
    network: (&NetworkConfig, &Weights),
    shown: (&[usize], &[String]),
) -> Result<()> {
    write_config(dir, &tokenizer.config.tokenizer, Some(network.0), shown)?;
    link(&tokenizer.dir.join(TOKENIZER), &dir.join(TOKENIZER))?;
    weights::write(&dir.join(MODEL), network.1)
}

/// Writes the directory of a student as it was at an earlier step of its training.
pub fn write_snapshot(dir: &Path, student: &Bundle<'_>, step: u64) -> Result<()> {
    let c = &student.config;
    let shown = (c.timesteps.as_slice(), c.classes.as_slice());
    write_config(dir, &c.tokenizer, c.network.as_ref(), shown)?;
    link(&student.dir.join(TOKENIZER), &dir.join(TOKENIZER))?;
    link(&student.dir.join(snapshot(step)), &dir.join(MODEL))
}

/// The file in a student's directory with its weights after this many steps.
pub fn snapshot(step: u64) -> PathBuf {
    Path::new(SNAPSHOTS).join(format!("{step}.safetensors"))
}

/// Writes the configuration of a directory, with timesteps and names of classes.
pub fn write_config(
    dir: &Path,
    tokenizer: &TokenizerConfig,
    network: Option<&NetworkConfig>,
    (timesteps, classes): (&[usize], &[String]),
) -> Result<()> {
    let config = Config {
        format: FORMAT,
        tokenizer: tokenizer.clone(),
        network: network.cloned(),
        timesteps: timesteps.to_vec(),
        classes: classes.to_vec(),
    };
    let path = dir.join(CONFIG);
    let text = serde_json::to_string_pretty(&config).map_err(|e| Error::Internal(e.to_string()))?;
    std::fs::write(&path, text + "\n").map_err(Error::io(&path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_beyond_any_network_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = TokenizerConfig::Msvq(msvq::Config::published(&[1, 2, 4]));
        let var = var::Config::published("d16").unwrap();
        let network = |change: &dyn Fn(&mut var::Config)| {
            let mut own = var.clone();
            change(&mut own);
            NetworkConfig::Var(own)
        };
        let map = |height, width| {
            NetworkConfig::Llamagen(llamagen::Config {
                width: 64,
                depth: 1,
                heads: 1,
                vocabulary: 16,
                codebook_dim: 4,
                map: Sides { height, width },
                condition: ConditioningShape::Classes(2),
            })
        };
        let check = |tokenizer: &TokenizerConfig, network: &NetworkConfig, expected: &str| {
            write_config(dir.path(), tokenizer, Some(network), (&[], &[])).unwrap();
            match Bundle::open(dir.path()) {
                Ok(_) => assert_eq!(expected, ""),
                Err(e) => {
                    let said = e.to_string();
                    let whole = format!("config.json: {expected}");
                    assert!(!expected.is_empty() && said.contains(&whole), "{said}");
                }
            }
        };
        check(&tokenizer, &network(&|_| {}), "");
        check(&tokenizer, &map(256, 256), "");
        for (wrong, expected) in [
            (
                map(1_000_000, 1_000_000),
                "/network/side: 1000000000000 tokens, expected at most 65536",
            ),
            (
                network(&|c| c.scales = vec![1, 100_000]),
                "/network/scales: 10000000001 tokens, expected at most 65536",
            ),
            (
                network(&|c| c.depth = 1_000_000_000),
                "/network/depth: 1000000000 blocks, expected at most 1000",
            ),
            (
                network(&|c| c.width = usize::MAX),
                "/network/width: 18446744073709551615 channels, expected at most 65536",
            ),
        ] {
            check(&tokenizer, &wrong, expected);
        }
        let mut shape = msvq::Config::published(&[1, 2, 4]);
        shape.scales = vec![usize::MAX; 3];
        let expected = "/tokenizer/scales: 18446744073709551615 tokens, expected at most 65536";
        check(
            &TokenizerConfig::Msvq(shape.clone()),
            &network(&|_| {}),
            expected,
        );
        shape.autoencoder.image_size = Sides::square(10_000);
        let expected = "/tokenizer/image_size: 10000 pixels, expected at most 8192";
        check(&TokenizerConfig::Msvq(shape), &network(&|_| {}), expected);
    }
}
