//! A small convolutional classifier. Its features measure samples and may serve as a perceptual loss.

use std::path::Path;

use retort_checkpoint::{json, regular};
use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Unary};
use crate::error::{Error, Result};
use crate::files::CONFIG_MOST;
use crate::tape::Variable;
use crate::weights::{self, Init, Loader, ParameterSource};

/// Shape of a classifier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Channels, height and width of the images.
    pub image: [usize; 3],
    /// Number of features.
    pub features: usize,
    /// Number of classes.
    pub classes: usize,
}

/// A convolution and strided convolutions down to a side of at most 2, a layer of features, a linear classifier.
pub struct Net<B: Backend> {
    convs: Vec<(Variable<B>, Variable<B>)>,
    feature: (Variable<B>, Variable<B>),
    output: (Variable<B>, Variable<B>),
    /// Its shape.
    pub config: Config,
}

impl<B: Backend> Net<B> {
    /// Takes the parameters.
    pub fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        let [channels, mut h, mut w] = config.image;
        let mut convs = Vec::new();
        let (mut input, mut output) = (channels, 32);
        while convs.is_empty() || h.max(w) > 2 {
            if !convs.is_empty() {
                (h, w) = (h.div_ceil(2), w.div_ceil(2));
            }
            let name = format!("conv.{}", convs.len());
            let bound = (6.0 / (9 * input) as f32).sqrt();
            let weight = loader.get(
                &format!("{name}.weight"),
                &[output, input, 3, 3],
                Init::Uniform(bound),
            )?;
            convs.push((
                weight,
                loader.get(&format!("{name}.bias"), &[output], Init::Constant(0.0))?,
            ));
            (input, output) = (output, (output * 2).min(64));
        }
        let mut dense = |name: &str, i: usize, o: usize| -> Result<(Variable<B>, Variable<B>)> {
            let weight = loader.get(
                &format!("{name}.weight"),
                &[o, i],
                Init::Uniform((6.0 / i as f32).sqrt()),
            )?;
            Ok((
                weight,
                loader.get(&format!("{name}.bias"), &[o], Init::Constant(0.0))?,
            ))
        };
        let feature = dense("feature", input * h * w, config.features)?;
        let output = dense("output", config.features, config.classes)?;
        Ok(Self {
            convs,
            feature,
            output,
            config: config.clone(),
        })
    }

    /// Features (b, f) of images (b, c, h, w) in [-1, 1]; differentiable.
    pub fn features(&self, images: &Variable<B>) -> Result<Variable<B>> {
        let maps = self.maps(images)?;
        self.features_of(&maps[maps.len() - 1])
    }

    /// The output of each convolution, (b, c', h', w'), finest first; differentiable.
    pub fn maps(&self, images: &Variable<B>) -> Result<Vec<Variable<B>>> {
        let mut maps: Vec<Variable<B>> = Vec::new();
        for (i, (weight, bias)) in self.convs.iter().enumerate() {
            let stride = if i == 0 { 1 } else { 2 };
            let map = maps
                .last()
                .unwrap_or(images)
                .conv2d_bias(weight, bias, None, stride, [1, 1])?
                .unary(Unary::Silu)?;
            maps.push(map);
        }
        Ok(maps)
    }

    /// Features (b, f) of the last of the maps.
    pub fn features_of(&self, x: &Variable<B>) -> Result<Variable<B>> {
        let s = x.shape();
        let flat = x.reshape(&[s[0], s[1] * s[2] * s[3]])?;
        flat.linear(&self.feature.0, Some(&self.feature.1))?
            .unary(Unary::Silu)
    }

    /// Logits (b, classes) of features (b, f).
    pub fn classify(&self, features: &Variable<B>) -> Result<Variable<B>> {
        features.linear(&self.output.0, Some(&self.output.1))
    }

    /// Features and most probable classes of images (n, c, h, w) in [-1, 1] on the host.
    pub fn measure(&self, backend: &B, images: &[f32]) -> Result<(Vec<f32>, Vec<u32>)> {
        let [c, h, w] = self.config.image;
        let (mut features, mut classes) = (Vec::new(), Vec::new());
        for part in images.chunks(500 * c * h * w) {
            let x = backend.floats(part, &[part.len() / (c * h * w), c, h, w])?;
            let f = self.features(&Variable::constant(x))?;
            classes.extend(B::to_indices(&B::argmax_last(self.classify(&f)?.value())?)?);
            features.extend(B::to_floats(f.value())?);
        }
        Ok((features, classes))
    }

    /// Loads from an artifact, as constants.
    pub fn open(backend: &B, dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = regular::read(&path, CONFIG_MOST).map_err(Error::io(&path))?;
        let config: Config = json::parse(&text).map_err(|e| Error::data(&path, e))?;
        let path = dir.join(MODEL);
        let weights = weights::read(&path)?;
        Self::load(
            &mut Loader::new(
                backend,
                ParameterSource::Host(&weights),
                false,
                path.display().to_string(),
            ),
            &config,
        )
    }
}

/// The file with its weights, beside `config.json`.
pub const MODEL: &str = "model.safetensors";
