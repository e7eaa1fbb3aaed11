//! Conditioning options of `sample` and `trajectories`: classes, captions, or features of captions. The options of `pretrain`
//! are in `training`.

pub mod labels;
pub mod training;

use std::path::Path;

use retort_abi::Cancel;
use retort_checkpoint::regular;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::captions::{self, CaptionFeatures, ConditioningSource};
use crate::context::Context;
use crate::data::prepared::Prepared;
use crate::error::{Error, Result};
use crate::files::{MakeLock, make_once, resolve};
use crate::model::{CaptionShape, ConditioningShape};
use crate::numpy;
use crate::stage::noise::TensorFile;
use crate::text::TextEncoder;
use crate::weights::CheckpointWeights;

use labels::SampleLabels;

/// Classes of samples.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Labels {
    /// `balanced`: sample i has class i mod classes; `drawn`: one that is drawn.
    Rule(Rule),
    /// Classes in turn: of n in the list, sample i has the class in place i mod n.
    List(Vec<Class>),
    /// From a file.
    File(TensorFile),
    /// Those of images.
    Images(ImageProportions),
}

/// A class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Class {
    /// By its number.
    Number(u32),
    /// By name: that of the folder of its images.
    Name(String),
}

impl Class {
    /// Its number, among classes of these names.
    fn number(&self, names: &[String]) -> Result<u32, String> {
        let name = match self {
            Self::Number(number) => return Ok(*number),
            Self::Name(name) => name,
        };
        match names.iter().position(|own| own == name) {
            Some(number) => Ok(number as u32),
            None if names.is_empty() => {
                Err(format!("{name}: the classes of this model have no names"))
            }
            None => Err(format!(
                "no class {name}; the model has {}",
                names.join(", ")
            )),
        }
    }
}

/// Classes in the proportions of images.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageProportions {
    /// The `images` stage that prepared them: of `count` samples, sample i has the class of image i n / count, rounded down,
    /// of n.
    #[schemars(extend("x-retort-artifact" = ["images"]))]
    pub images: String,
}

/// A rule that gives every sample a class.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// Sample i has class i mod classes.
    Balanced,
    /// Every sample has a class drawn from all with equal chances.
    Drawn,
}

impl Default for Labels {
    fn default() -> Self {
        Self::Rule(Rule::Balanced)
    }
}

impl Labels {
    /// The classes of `count` samples, all below the number of the model's.
    fn resolve<B: Backend>(
        &self,
        context: &Context<'_, B>,
        count: u64,
        (classes, names): (usize, &[String]),
    ) -> Result<SampleLabels> {
        let (base, seed) = (&context.job.base_dir, context.job.seed);
        let pointer = "/labels";
        let labels = match self {
            Self::Rule(rule) => SampleLabels::Rule(*rule, seed, classes),
            Self::List(list) => {
                let given: Vec<u32> = list
                    .iter()
                    .map(|class| class.number(names))
                    .collect::<Result<_, _>>()
                    .map_err(|message| Error::option(pointer, message))?;
                SampleLabels::Turn(given)
            }
            Self::File(given) => {
                let given = given.indices(base)?;
                if given.len() as u64 != count {
                    let message = format!("{} labels for {count} samples", given.len());
                    return Err(Error::option(pointer, message));
                }
                SampleLabels::Turn(given)
            }
            Self::Images(ImageProportions { images }) => {
                let all = Prepared::open(context.input_dir(images)?)?.labels;
                SampleLabels::proportions(all, count)
            }
        };
        match labels
            .given()
            .iter()
            .find(|&&label| label as usize >= classes)
        {
            Some(label) => {
                let message = format!(
                    "class {label}: the model has the classes 0 to {}",
                    classes - 1
                );
                Err(Error::option(pointer, message))
            }
            None => Ok(labels),
        }
    }
}

/// Texts.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "Texts")]
pub enum CaptionText {
    /// The same for all samples.
    One(String),
    /// Sample i has text i mod their number.
    List(Vec<String>),
    /// The lines of a text file.
    Lines(Lines),
}

/// A text file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Lines {
    /// The file, one text a line.
    #[schemars(extend("x-retort-file" = "file"))]
    pub file: String,
}

/// Features of captions from a file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Features {
    /// The file, `.npy` or `.safetensors`: n captions, or one, of at most as many tokens as the model takes, (n, tokens,
    /// width) or (tokens, width). Sample i has caption i mod n.
    #[schemars(extend("x-retort-file" = "file"))]
    pub file: String,
    /// Name of the tensor in a safetensors file.
    #[serde(default = "tensor")]
    pub tensor: String,
    /// Name of the mask in a safetensors file, (n, tokens), 1 at a caption's tokens. Without a mask, rows of zeros are
    /// padding.
    #[serde(default)]
    pub mask: Option<String>,
    /// The mask in a `.npy` file of its own.
    #[serde(default)]
    #[schemars(extend("x-retort-file" = "file"))]
    pub mask_file: Option<String>,
}

fn tensor() -> String {
    "features".into()
}

/// Options of a stage.
pub struct ConditioningOptions<'o> {
    /// `labels`
    pub labels: Option<&'o Labels>,
    /// `caption`
    pub caption: Option<&'o CaptionText>,
    /// `text_encoder`
    pub text_encoder: Option<&'o str>,
    /// `features`
    pub features: Option<&'o Features>,
}

/// The conditioning of samples.
pub struct Conditioning {
    /// Class of each sample, or number of its caption.
    pub labels: SampleLabels,
    /// The meaning of the labels.
    pub source: ConditioningSource,
    /// The captions, if they were given as text.
    pub texts: Vec<String>,
}

impl ConditioningOptions<'_> {
    /// Refuses contradictions, and lists of labels that do not fit `count` samples; files that exist already must be valid.
    pub fn check(&self, base: &Path, count: u64) -> Result<()> {
        let refuse = |pointer: &str, message: &str| Err(Error::option(pointer, message));
        if let Some(Labels::List(list)) = self.labels
            && (list.is_empty() || list.len() as u64 > count)
        {
            let message = format!(
                "{} labels for {count} samples: expected 1 to {count}, which samples take in turn",
                list.len()
            );
            return refuse("/labels", &message);
        }
        match (self.caption, self.text_encoder, self.features) {
            (Some(_), _, Some(_)) => {
                return refuse("/features", "captions and features exclude each other");
            }
            (Some(_), None, _) => {
                let message = "a caption needs a `text_encoder`: the folder of a flan-t5 with config.json, \
                               tokenizer.json and its weights (or give `features`)";
                return refuse("/caption", message);
            }
            (None, Some(_), _) => {
                return refuse("/text_encoder", "no `caption` to encode");
            }
            _ => {}
        }
        if self.labels.is_some() && (self.caption.is_some() || self.features.is_some()) {
            let message = "a model is conditioned on classes or on captions: give `labels` or captions, not both";
            return refuse("/labels", message);
        }
        if let Some(texts) = self.caption {
            texts.read(base)?;
        }
        let existing = |path: &str| Some(resolve(base, path)).filter(|path| path.exists());
        if let Some(folder) = self.text_encoder.and_then(existing) {
            TextEncoder::open(&folder)
                .map_err(|e| Error::option("/text_encoder", e.to_string()))?;
        }
        if let Some(features) = self.features
            && features.files().all(|file| existing(file).is_some())
        {
            features
                .open(base)
                .map_err(|e| Error::option("/features", e.to_string()))?;
        }
        Ok(())
    }

    /// The conditioning of `count` samples of a model whose classes may have names. Captions become features, in a file of
    /// the work directory.
    pub fn resolve<B: Backend>(
        &self,
        context: &Context<'_, B>,
        (shape, names): (&ConditioningShape, &[String]),
        count: u64,
    ) -> Result<Conditioning> {
        let base = &context.job.base_dir;
        let shape = match shape {
            ConditioningShape::Captions(shape) => *shape,
            ConditioningShape::Classes(classes) => {
                let message = "this model is conditioned on classes: give `labels`";
                if self.caption.is_some() {
                    return Err(Error::option("/caption", message));
                }
                if self.features.is_some() {
                    return Err(Error::option("/features", message));
                }
                let balanced = Labels::default();
                let labels = self.labels.unwrap_or(&balanced);
                return Ok(Conditioning {
                    labels: labels.resolve(context, count, (*classes, names))?,
                    source: ConditioningSource::Classes(*classes),
                    texts: Vec::new(),
                });
            }
        };
        let message = "this model is conditioned on captions: give `caption` and `text_encoder`, or `features`";
        if self.labels.is_some() {
            return Err(Error::option("/labels", message));
        }
        let path = context.work_dir()?.join(captions::FILE);
        // One part of a divided stage makes the file; the others wait for it.
        let lock = context.lock(captions::FILE)?;
        let mut texts = Vec::new();
        match (self.caption, self.text_encoder, self.features) {
            (Some(wanted), Some(folder), _) => {
                texts = wanted.read(base)?;
                if !path.exists() {
                    let encoder = TextEncoder::open(&resolve(base, folder))?;
                    if encoder.width() != shape.width {
                        let message = format!(
                            "{folder}: a text encoder of width {}, the model takes features of width {}",
                            encoder.width(),
                            shape.width
                        );
                        return Err(Error::option("/text_encoder", message));
                    }
                    encode(context, encoder, &texts, shape.positions, &path, &lock)?;
                }
            }
            (_, _, Some(features)) => {
                if !path.exists() {
                    let mut table = features.open(base)?;
                    make_once(&path, &lock, |partial| table.copy(shape, partial))?;
                }
            }
            _ => return Err(Error::option("", message)),
        }
        let captions = CaptionFeatures::open(&path, shape)?;
        let source = ConditioningSource::Captions(captions.into());
        Ok(Conditioning {
            labels: SampleLabels::numbers(source.len()),
            source,
            texts,
        })
    }
}

/// Writes the features of texts, of at most this many tokens each.
fn encode<B: Backend>(
    context: &Context<'_, B>,
    encoder: TextEncoder,
    texts: &[String],
    most: usize,
    path: &Path,
    lock: &MakeLock,
) -> Result<()> {
    let told = |done: usize| match context.host.cancelled() {
        Cancel::Run => {
            let all = texts.len() as u64;
            context.host.progress(done as u64, all, "captions");
            Ok(())
        }
        _ => Err(Error::Cancelled),
    };
    make_once(path, lock, |partial| {
        // In f32: it is computed once, and T5 is known to suffer from bf16.
        let backend = &context.backend.exact();
        encoder.encode(backend, texts, most, partial, told)
    })
}

/// The most bytes of a file of captions.
const LINES_MOST: u64 = 256 << 20;

impl CaptionText {
    /// The texts, in order.
    fn read(&self, base: &Path) -> Result<Vec<String>> {
        let texts = match self {
            Self::One(text) => vec![text.clone()],
            Self::List(texts) => texts.clone(),
            Self::Lines(lines) => {
                let path = resolve(base, &lines.file);
                let text = match regular::read(&path, LINES_MOST) {
                    // The runner reports missing files.
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                    text => text.map_err(Error::io(&path))?,
                };
                let text = String::from_utf8(text)
                    .map_err(|e| Error::data(&path, format!("not UTF-8: {}", e.utf8_error())))?;
                text.lines().map(str::to_owned).collect()
            }
        };
        match texts.iter().position(|text| text.trim().is_empty()) {
            Some(at) => Err(Error::option(
                "/caption",
                format!("caption {} is empty", at + 1),
            )),
            None if texts.is_empty() => Err(Error::option("/caption", "no caption")),
            None => Ok(texts),
        }
    }
}

/// Features in a file, with their mask.
struct Table {
    source: FeatureFile,
    /// Captions, tokens, width.
    shape: [usize; 3],
    /// Whether each token is one of the caption (n, tokens).
    mask: Option<Vec<bool>>,
}

enum FeatureFile {
    Numpy(numpy::Rows),
    Safetensors(CheckpointWeights, String),
}

impl Features {
    fn files(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.file.as_str()).chain(self.mask_file.as_deref())
    }

    fn open(&self, base: &Path) -> Result<Table> {
        let path = resolve(base, &self.file);
        let form = numpy::Form::of(&path)?;
        if form == numpy::Form::Archive {
            let message =
                "an archive of NumPy arrays; expected one array (`.npy`), or a safetensors file";
            return Err(Error::data(&path, message));
        }
        let (source, shape) = if form == numpy::Form::Array {
            if self.mask.is_some() {
                let message = "`mask` names a tensor of a safetensors file; beside a .npy file give `mask_file`";
                return Err(Error::data(&path, message));
            }
            let rows = numpy::Rows::open(&path)?;
            let shape = rows.shape().to_vec();
            (FeatureFile::Numpy(rows), shape)
        } else {
            let stored = CheckpointWeights::open(&path, None)?;
            let found = stored.shape(&self.tensor).map(<[usize]>::to_vec);
            let missing = || Error::data(&path, format!("no tensor {}", self.tensor));
            let shape = found.ok_or_else(missing)?;
            (FeatureFile::Safetensors(stored, self.tensor.clone()), shape)
        };
        let shape = match *shape.as_slice() {
            [tokens, width] => [1, tokens, width],
            [n, tokens, width] => [n, tokens, width],
            _ => {
                let message = format!("features of shape {shape:?}, expected (n, tokens, width)");
                return Err(Error::data(&path, message));
            }
        };
        if shape.contains(&0) {
            return Err(Error::data(&path, format!("features of shape {shape:?}")));
        }
        let mask = self.mask(base, &source, [shape[0], shape[1]])?;
        Ok(Table {
            source,
            shape,
            mask,
        })
    }

    /// The mask of captions, given their number and number of tokens.
    fn mask(
        &self,
        base: &Path,
        source: &FeatureFile,
        [captions, tokens]: [usize; 2],
    ) -> Result<Option<Vec<bool>>> {
        // Before it is read: a file may claim any number of elements.
        let check = |path: &Path, found: &[usize]| {
            let elements = found.iter().try_fold(1usize, |n, &m| n.checked_mul(m));
            if elements == captions.checked_mul(tokens) {
                return Ok(());
            }
            let message =
                format!("a mask of shape {found:?} for {captions} captions of {tokens} tokens");
            Err(Error::data(path, message))
        };
        if let Some(file) = &self.mask_file {
            let path = resolve(base, file);
            let mut rows = numpy::Rows::open(&path)?;
            check(&path, rows.shape())?;
            let found = rows.read(0, captions * tokens)?;
            return Ok(Some(found.iter().map(|&x| x != 0.0).collect()));
        }
        let (Some(name), FeatureFile::Safetensors(stored, _)) = (&self.mask, source) else {
            return Ok(None);
        };
        if let Some(found) = stored.shape(name) {
            check(stored.path(), found)?;
        }
        let found = stored
            .indices(name)
            .map(|ids| ids.iter().map(|&x| x != 0).collect());
        let floats = || {
            stored
                .floats(name)
                .map(|x| x.iter().map(|&x| x != 0.0).collect())
        };
        found.or_else(|_| floats()).map(Some)
    }
}

impl Table {
    /// Features of a caption, (tokens, width), and which of its tokens are not padding.
    fn caption(&mut self, number: usize) -> Result<(Vec<f32>, Vec<bool>)> {
        let [_, tokens, width] = self.shape;
        let row = tokens * width;
        let features = match &mut self.source {
            FeatureFile::Numpy(rows) => rows.read(number * row, row)?,
            FeatureFile::Safetensors(stored, name) => {
                match stored.shape(name).map(<[usize]>::len) {
                    Some(2) => stored.floats(name)?,
                    _ => stored.rows(name, number, 1)?,
                }
            }
        };
        let counts = match &self.mask {
            Some(mask) => mask[number * tokens..][..tokens].to_vec(),
            None => {
                let each = features.chunks_exact(width);
                each.map(|token| token.iter().any(|&x| x != 0.0)).collect()
            }
        };
        Ok((features, counts))
    }

    /// Writes the features of all captions for a model with captions of a shape, one caption in memory at a time.
    fn copy(&mut self, shape: CaptionShape, path: &Path) -> Result<()> {
        let [n, tokens, width] = self.shape;
        let refuse = |message: String| Err(Error::option("/features", message));
        if width != shape.width {
            return refuse(format!(
                "features of width {width}, the model takes up to {} tokens of width {}",
                shape.positions, shape.width
            ));
        }
        let mut lengths = Vec::with_capacity(n);
        for number in 0..n {
            let counts = match &self.mask {
                Some(mask) => mask[number * tokens..][..tokens].to_vec(),
                None => self.caption(number)?.1,
            };
            match counts.iter().filter(|&&c| c).count() {
                0 => return refuse(format!("caption {number} has no token")),
                length if length > shape.positions => {
                    return refuse(format!(
                        "caption {number} has {length} tokens, the model takes at most {}",
                        shape.positions
                    ));
                }
                length => lengths.push(length as u32),
            }
        }
        captions::write(path, &lengths, width, |give| {
            for number in 0..n {
                let (features, counts) = self.caption(number)?;
                let kept = features.chunks_exact(width).zip(counts);
                let kept: Vec<f32> = kept
                    .filter(|(_, counts)| *counts)
                    .flat_map(|(token, _)| token.iter().copied())
                    .collect();
                if let Some(bad) = kept.iter().find(|x| !x.is_finite()) {
                    return refuse(format!("caption {number} holds {bad}"));
                }
                give(&kept)?;
            }
            Ok(())
        })
    }
}
