//! `teacher` and `student`: networks from published checkpoint files, with their tokenizer, or with random weights of a
//! published shape. Shapes are read from the files and checked weight by weight; the result is the same kind of
//! directory that training makes, in float32 safetensors.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use retort_abi::{ArtifactMeta, LogLevel, StageResult};
use retort_checkpoint::regular;
use retort_checkpoint::sharded_weights::ShardPlace;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::backend::Backend;
use crate::bundle::{self, Family};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::files::resolve;
use crate::published::{self, NetworkRole, ShapeHints};
use crate::sampler::check_from_zero;
use crate::size::{Sides, Size};
use crate::stage::Stage;
use crate::weights::{self, CheckpointWeights, Loader, ParameterSource, Params};

/// The files, and information that they lack. For a network in several files, name the folder or the index (`*.index.json`).
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Family of the networks.
    pub family: Family,
    /// The network's weights: a file (.pth, .pt or .safetensors), or the folder or index (*.index.json) of several.
    #[serde(default)]
    #[schemars(extend("x-retort-file" = "weights"))]
    pub model: Option<String>,
    /// The tokenizer's weights, in the same way.
    #[serde(default)]
    #[schemars(extend("x-retort-file" = "weights"))]
    pub tokenizer: Option<String>,
    /// Dictionary in `model` that holds the weights, as in `trainer.ema_parameters`; found by itself where the file is
    /// as published.
    #[serde(default)]
    pub select: Option<String>,
    /// Dictionary in `tokenizer` that holds the weights.
    #[serde(default)]
    pub tokenizer_select: Option<String>,
    /// Published size: LlamaGen B, L, XL, XXL, 3B; VAR d16, d20, d24, d30, d36. The file must match; default: any.
    #[serde(default)]
    pub size: Option<String>,
    /// Attention heads, for a LlamaGen network of no published size.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub heads: Option<usize>,
    /// LlamaGen: the side of its images in pixels, or [height, width]; 256, if left out.
    #[serde(default)]
    pub image_size: Option<Size>,
    /// Sides of the token maps of a VAR network of no published size, coarse to fine.
    #[serde(default)]
    pub scales: Option<Vec<usize>>,
    /// For a student: the AR steps that it was trained to start from, ascending from 0.
    #[serde(default)]
    pub timesteps: Vec<usize>,
    /// Draws random weights of a published size instead of reading files: to test speed and memory.
    #[serde(default)]
    pub random: bool,
}

impl Options {
    fn hints(&self) -> ShapeHints {
        ShapeHints {
            size: self.size.clone(),
            heads: self.heads,
            image_size: self.image_size.map(Sides::from),
            scales: self.scales.clone(),
        }
    }

    /// Refuses contradictions; existing files must contain such networks.
    fn check(&self, role: NetworkRole, base: &Path) -> Result<()> {
        if let Some(size) = &self.size {
            published::check_size(self.family, size)?;
        }
        if self.random {
            if self.size.is_none() {
                return Err(Error::option(
                    "/random",
                    "random weights need a published `size`",
                ));
            }
            return match (&self.model, &self.tokenizer) {
                (None, None) => Ok(()),
                _ => Err(Error::option(
                    "/random",
                    "random weights and files exclude each other",
                )),
            };
        }
        for (pointer, role) in [("/model", role), ("/tokenizer", NetworkRole::Tokenizer)] {
            let path = self.path(role, base)?;
            if path.exists() {
                self.open(role, base)
                    .map_err(|e| Error::option(pointer, e.to_string()))?;
            }
        }
        Ok(())
    }

    fn path(&self, role: NetworkRole, base: &Path) -> Result<PathBuf> {
        let (pointer, path) = match role {
            NetworkRole::Tokenizer => ("/tokenizer", &self.tokenizer),
            _ => ("/model", &self.model),
        };
        let missing = || {
            let name = &pointer[1..];
            Error::option(
                pointer,
                format!("`{name}` is missing: a checkpoint file (or `random: true`)"),
            )
        };
        Ok(resolve(base, path.as_ref().ok_or_else(missing)?))
    }

    fn open(&self, role: NetworkRole, base: &Path) -> Result<CheckpointWeights> {
        let select = match role {
            NetworkRole::Tokenizer => &self.tokenizer_select,
            _ => &self.select,
        };
        published::open(
            &self.path(role, base)?,
            self.family,
            role,
            select.as_deref(),
        )
    }
}

/// The stage that loads teachers.
pub struct TeacherStage;

impl<B: Backend> Stage<B> for TeacherStage {
    type Options = Options;
    const KIND: &'static str = "teacher";
    const OUTPUT: &'static str = "teacher";
    const REVISION: u32 = 2;
    const SUMMARY: &'static str =
        "load a published teacher and its tokenizer from checkpoint files";

    fn check(o: &Options, base: &Path) -> Result<()> {
        if !o.timesteps.is_empty() {
            return Err(Error::option("/timesteps", "a teacher has no timesteps"));
        }
        o.check(NetworkRole::Teacher, base)
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        run(context, o, NetworkRole::Teacher)
    }
}

/// The stage that loads students.
pub struct StudentStage;

impl<B: Backend> Stage<B> for StudentStage {
    type Options = Options;
    const KIND: &'static str = "student";
    const OUTPUT: &'static str = "student";
    const REVISION: u32 = 2;
    const SUMMARY: &'static str =
        "load a published student and its tokenizer from checkpoint files";

    fn check(o: &Options, base: &Path) -> Result<()> {
        check_from_zero(&o.timesteps, "/timesteps")?;
        o.check(NetworkRole::Student, base)
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        run(context, o, NetworkRole::Student)
    }
}

/// Weights for a file of the result.
struct WeightFile<'a, B: Backend> {
    source: Option<&'a CheckpointWeights>,
    params: Params<B>,
}

fn run<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    role: NetworkRole,
) -> Result<StageResult> {
    let base = &context.job.base_dir;
    let files = match o.random {
        true => None,
        false => Some((o.open(NetworkRole::Tokenizer, base)?, o.open(role, base)?)),
    };
    let hints = o.hints();
    let (tokenizer, network) = match &files {
        Some((tokenizer, network)) => {
            published::shapes(o.family, role, tokenizer, network, &hints)?
        }
        None => published::published(o.family, &hints)?,
    };
    let (tokenizer_file, network_file) =
        (files.as_ref().map(|f| &f.0), files.as_ref().map(|f| &f.1));

    // Building a network requests all its weights, which checks them.
    let tokenizer_weights = WeightFile {
        params: build(context, tokenizer_file, |loader| {
            tokenizer.build(loader).map(drop)
        })?,
        source: tokenizer_file,
    };
    let network_weights = WeightFile {
        params: match role {
            NetworkRole::Student => build(context, network_file, |loader| {
                network.student(loader).map(drop)
            })?,
            _ => {
                let mut quantiser = loader(context, tokenizer_file);
                build(context, network_file, |loader| {
                    network
                        .teacher(loader, (&tokenizer, &mut quantiser))
                        .map(drop)
                })?
            }
        },
        source: network_file,
    };
    for weights in [&tokenizer_weights, &network_weights] {
        report_prefix(context, weights);
        report_unexpected(context, weights);
    }

    let elements = |weights: &WeightFile<B>| -> usize {
        weights
            .params
            .iter()
            .map(|(_, p)| p.shape().iter().product::<usize>())
            .sum()
    };
    let (shape, size) = (network.token_shape(), elements(&network_weights));
    context.host.log(
        LogLevel::Info,
        &format!(
            "{} {}: {size} weights, {} tokens of {} codes; tokenizer: {} weights",
            o.family,
            role.name(),
            shape.count(),
            shape.vocabulary,
            elements(&tokenizer_weights)
        ),
    );
    let sources = match &files {
        Some((tokenizer, network)) => json!({
            "tokenizer": source(tokenizer)?,
            "model": source(network)?,
        }),
        None => Value::Null,
    };
    let mut meta = ArtifactMeta::default();
    meta.extra.insert("sources".into(), sources);
    let summary = json!({ "weights": size });
    context.finish(role.name(), meta, summary, |dir| {
        bundle::write_config(dir, &tokenizer, Some(&network), (&o.timesteps, &[]))?;
        tokenizer_weights.write(&dir.join(bundle::TOKENIZER))?;
        network_weights.write(&dir.join(bundle::MODEL))
    })
}

fn loader<'a, B: Backend>(
    context: &Context<'a, B>,
    file: Option<&'a CheckpointWeights>,
) -> Loader<'a, B> {
    let (source, origin) = match file {
        Some(stored) => (
            ParameterSource::Files(std::slice::from_ref(stored)),
            stored.path().display().to_string(),
        ),
        None => (
            ParameterSource::Init(context.job.seed),
            "random weights".to_owned(),
        ),
    };
    Loader::new(context.backend, source, false, origin)
}

fn build<'a, B: Backend>(
    context: &Context<'a, B>,
    file: Option<&'a CheckpointWeights>,
    network: impl FnOnce(&mut Loader<'a, B>) -> Result<()>,
) -> Result<Params<B>> {
    let mut loader = loader(context, file);
    network(&mut loader)?;
    Ok(loader.into_params())
}

impl<B: Backend> WeightFile<'_, B> {
    /// Writes the weights from the file, or the drawn ones.
    fn write(&self, path: &Path) -> Result<()> {
        let shapes = self
            .params
            .iter()
            .map(|(name, p)| (name.clone(), p.shape()));
        weights::write_each(path, shapes.collect(), |name| {
            let missing = || Error::Internal(format!("no weight {name}"));
            Ok(Cow::Owned(match self.source {
                Some(stored) => stored.floats(name)?,
                None => {
                    let found = self.params.iter().find(|(known, _)| known == name);
                    B::to_floats(found.ok_or_else(missing)?.1.value())?
                }
            }))
        })
    }
}

/// Logs which prefix was removed from a file's names.
fn report_prefix<B: Backend>(context: &Context<'_, B>, weights: &WeightFile<'_, B>) {
    if let Some(stored) = weights.source
        && !stored.prefix().is_empty()
    {
        let message = format!(
            "{}: using the weights whose names begin with `{}`, which is removed",
            stored.path().display(),
            stored.prefix()
        );
        context.host.log(LogLevel::Info, &message);
    }
}

/// Warns about weights in a file that the network does not use.
fn report_unexpected<B: Backend>(context: &Context<'_, B>, weights: &WeightFile<'_, B>) {
    let Some(stored) = weights.source else { return };
    let known: BTreeSet<&str> = weights
        .params
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    let unexpected: Vec<&str> = stored
        .shapes()
        .map(|(name, _)| name)
        .filter(|name| !known.contains(name) && !published::is_buffer(name))
        .collect();
    if unexpected.is_empty() {
        return;
    }
    let listed = unexpected
        .iter()
        .take(20)
        .copied()
        .collect::<Vec<_>>()
        .join(", ");
    let more = match unexpected.len().saturating_sub(20) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    let place = stored.path().display();
    context.host.log(
        LogLevel::Warn,
        &format!("{place}: not used, since this network has no such weights: {listed}{more}"),
    );
}

/// The source of the weights.
fn source(stored: &CheckpointWeights) -> Result<Value> {
    let path = stored.path();
    let name = |path: &Path| {
        let name = path.file_name();
        name.map(|name| name.to_string_lossy().into_owned())
    };
    let hash = |path: &Path| -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        let file = regular::open(path).map_err(Error::io(path))?;
        hasher.update_reader(file).map_err(Error::io(path))?;
        Ok(hasher.finalize().to_hex().to_string())
    };
    let place = ShardPlace::find(path).map_err(Error::checkpoint(path))?;
    let mut source = json!({
        "file": name(path),
        "dictionary": stored.dictionary(),
        "prefix": stored.prefix(),
    });
    match place.files().as_slice() {
        [only] => source["blake3"] = hash(only)?.into(),
        several => {
            let hashes = several
                .iter()
                .map(|path| Ok((name(path).unwrap_or_default(), hash(path)?.into())));
            source["files"] = Value::Object(hashes.collect::<Result<_>>()?);
        }
    }
    Ok(source)
}
