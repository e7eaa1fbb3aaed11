//! `pretrain`: trains a class-conditional AR teacher on a tokenizer's tokens.

use std::path::Path;

use retort_abi::{ArtifactMeta, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::Backend;
use crate::bundle::{self, Bundle, Family, NetworkConfig, TokenizerConfig};
use crate::context::Context;
use crate::data::{Data, Images};
use crate::error::{Error, Result};
use crate::model::{CODEBOOK, ConditionShape, Conditions, Teacher, llamagen, var};
use crate::random::{Sequence, Stream};
use crate::stage::tokenizer::batch_shape;
use crate::stage::{Stage, room};
use crate::train::{Fit, HeldOut, Mean, StepOutput, TrainOptions, average, shared};
use crate::weights::{Loader, Source, Start, Stored};

/// Options of `pretrain`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The family of the teacher, which is that of its tokenizer: `llamagen` predicts one token after the other, `var` all
    /// tokens of a scale at once.
    #[serde(default)]
    pub family: Family,
    /// The stage that trained the tokenizer.
    #[schemars(extend("x-retort-artifact" = ["tokenizer"]))]
    pub tokenizer: String,
    /// Images to learn from.
    pub data: Data,
    /// The stage of a teacher to go on from, trained here or published, of the same shape and with the tokens of the same
    /// codebook. For other classes the embedding of classes is made anew.
    #[serde(default)]
    #[schemars(extend("x-retort-artifact" = ["teacher"]))]
    pub from: Option<String>,
    /// Share of each class kept out of training, to measure the loss.
    #[serde(default = "held_out")]
    #[schemars(range(min = 0, max = 0.9))]
    pub held_out: f64,
    /// Width C of the transformer.
    #[schemars(range(min = 4, max = 65536))]
    pub width: usize,
    /// Number of blocks.
    #[schemars(range(min = 1, max = 1024))]
    pub depth: usize,
    /// Attention heads; they divide the width. LlamaGen: width / heads is a multiple of 4.
    #[schemars(range(min = 1, max = 65536))]
    pub heads: usize,
    /// VAR: whether queries and keys are L2-normalised.
    #[serde(default = "attn_l2_norm")]
    pub attn_l2_norm: bool,
    /// VAR: whether the blocks share the map from the class to their modulation, as in the largest published model.
    #[serde(default)]
    pub shared_adaln: bool,
    /// Probability with which a label is dropped in training, for guidance.
    #[serde(default = "label_dropout")]
    #[schemars(range(min = 0, max = 1))]
    pub label_dropout: f64,
    /// Probability with which a token is replaced by a random code at the input: a regulariser for small data.
    #[serde(default)]
    #[schemars(range(min = 0, max = 0.9))]
    pub token_noise: f64,
    /// Whether the weights with the lowest held-out loss are kept, instead of the last.
    #[serde(default = "keep_best")]
    pub keep_best: bool,
    /// How to train.
    #[serde(default)]
    pub train: TrainOptions,
}

fn held_out() -> f64 {
    0.1
}
fn attn_l2_norm() -> bool {
    true
}
fn label_dropout() -> f64 {
    0.1
}
fn keep_best() -> bool {
    true
}

/// The stage.
pub struct Pretrain;

impl<B: Backend> Stage<B> for Pretrain {
    type Options = Options;
    const KIND: &'static str = "pretrain";
    const OUTPUT: &'static str = "teacher";
    const REVISION: u32 = 3;
    const TOGETHER: bool = true;
    const SUMMARY: &'static str = "train an autoregressive teacher on a tokenizer's tokens";

    fn check(o: &Options, _base_dir: &Path) -> Result<()> {
        o.data
            .check()
            .map_err(|e| Error::option("/data", e.to_string()))?;
        // The rest of the shape comes with the tokenizer.
        match o.family {
            Family::Llamagen => shape_of_llamagen(o, (2, 1), 1, 1).check(),
            Family::Var => shape_of_var(o, (2, 1), &[1, 2], 1).check(),
        }
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let (backend, seed) = (context.backend, context.job.seed);
        let ranks = context.ranks;
        context.check_share(o.train.batch, 1)?;
        let source = Bundle::open(context.input_dir(&o.tokenizer)?)?;
        let images = context.images(&o.data)?;
        if images.shape() != source.config.tokenizer.image() {
            let message = format!(
                "images of {} x {} x {}, but the tokenizer {} was made for {:?}",
                images.channels,
                images.height,
                images.width,
                o.tokenizer,
                source.config.tokenizer.image()
            );
            return Err(Error::option("/data", message));
        }
        let network = network(o, &source.config.tokenizer, images.classes)?;
        room::check(
            context,
            "/train/batch",
            o.train.batch.div_ceil(ranks.size()),
            room::training(&network, true, false),
        )?;
        // Tokens are made once, of each image as it may be seen: as it is, and mirrored.
        let views: &[bool] = if images.flips() {
            &[false, true]
        } else {
            &[false]
        };
        let tokens = views
            .iter()
            .map(|&mirrored| encode_all(backend, &source, &images, mirrored, o.train.batch))
            .collect::<Result<Vec<_>>>()?;
        let shape = network.token_shape();
        let l = shape.count();
        let (train, held) = images.split(o.held_out, seed);
        // Tokens of image i in a view.
        let of = |view: usize, i: usize| tokens[view][i * l..(i + 1) * l].iter().copied();

        let frozen = source.tokenizer_file()?;
        let build = |loader: &mut Loader<B>| {
            let frozen = Source::Files(std::slice::from_ref(&frozen));
            let mut tokenizer = Loader::new(backend, frozen, false, o.tokenizer.as_str());
            network.teacher(loader, (&source.config.tokenizer, &mut tokenizer))
        };
        let from = match &o.from {
            Some(stage) => Some(start_from(context, stage, &source, &network, &images)?),
            None => None,
        };
        let anew = |name: &str| match &from {
            Some(from) if from.anew && name == network.class_embedding() => Start::Drawn,
            _ => Start::Weight(name.into()),
        };
        let start = match &from {
            Some(from) => Source::Start {
                file: &from.file,
                of: &anew,
                seed,
            },
            None => Source::Init(seed),
        };
        let origin = o.from.as_deref().unwrap_or("new teacher");
        let mut loader = Loader::new(backend, start, true, origin);
        let model = build(&mut loader)?;
        let params = loader.into_params();
        let average = average(backend, &o.train, &params)?;
        let shared = shared(&params, average.as_ref());
        let source_of = Source::Device(&shared);
        let measured = build(&mut Loader::new(backend, source_of, false, "teacher"))?;

        // Logits (n L, K) of all tokens of n images.
        let logits = |model: &dyn Teacher<B>, labels: &[u32], seen: &[u32]| {
            let n = labels.len();
            let logits = model.forced(
                &Conditions::Classes(backend.indices(labels, &[n])?),
                &backend.indices(seen, &[n, l])?,
            )?;
            logits.reshape(&[n * l, shape.vocabulary])
        };
        let fit = Fit {
            host: context.host,
            backend,
            work_dir: Some(context.work_dir()?),
            name: "pretrain",
            ranks,
            options: &o.train,
            params: &params,
            ema: average.as_ref(),
            kept: None,
            adversary: None,
        };
        let step = |step: u64| {
            let mut choice = Sequence::new(seed, Stream::Step, step);
            let picks: Vec<usize> = (0..o.train.batch)
                .map(|_| train[choice.below(train.len())])
                .collect();
            let labels: Vec<u32> = picks
                .iter()
                .map(|&i| {
                    if choice.uniform() < o.label_dropout {
                        images.classes as u32
                    } else {
                        images.labels[i]
                    }
                })
                .collect();
            let mut wanted = Vec::with_capacity(picks.len() * l);
            for &i in &picks {
                let view = match views.len() {
                    1 => 0,
                    n => choice.below(n),
                };
                wanted.extend(of(view, i));
            }
            let mut seen = wanted.clone();
            if o.token_noise > 0.0 {
                for token in &mut seen {
                    if choice.uniform() < o.token_noise {
                        *token = choice.below(shape.vocabulary) as u32;
                    }
                }
            }
            // What is drawn does not depend on who else takes a share.
            let own = ranks.share(picks.len(), 0, 1);
            let part = own.len() as f64 / picks.len() as f64;
            let of_own = own.start * l..own.end * l;
            let wanted = backend.indices(&wanted[of_own.clone()], &[of_own.len()])?;
            let mut loss = logits(&*model, &labels[own], &seen[of_own])?.cross_entropy(&wanted)?;
            if ranks.is_shared() {
                loss = loss.affine(part, 0.0)?;
            }
            Ok(StepOutput::new(loss, Vec::new()))
        };
        let measured_on = if held.is_empty() { &train } else { &held };
        // What a step of training takes, whatever the number of images.
        let held_out_loss = |model: &dyn Teacher<B>| {
            let mut losses = Mean::default();
            for picks in measured_on.chunks(o.train.batch) {
                let labels: Vec<u32> = picks.iter().map(|&i| images.labels[i]).collect();
                let wanted: Vec<u32> = picks.iter().flat_map(|&i| of(0, i)).collect();
                let logits = logits(model, &labels, &wanted)?;
                let wanted = backend.indices(&wanted, &[wanted.len()])?;
                losses.add(&B::to_floats(&B::cross_entropy(logits.value(), &wanted)?)?);
            }
            Ok(losses.value())
        };
        let mut measure = || held_out_loss(&*measured);
        let every = (o.train.steps / 40).max(10);
        let held_out = HeldOut {
            every,
            name: "held_out_loss",
            measure: &mut measure,
            keep_best: o.keep_best,
        };
        let weights = fit.run(step, Some(held_out))?;
        if context.job.part.is_some() {
            return Ok(StageResult::of_part());
        }

        let source_of = Source::Host(&weights);
        let kept = build(&mut Loader::new(backend, source_of, false, "teacher"))?;
        let held_out_loss = held_out_loss(&*kept)?;
        context.host.log(
            LogLevel::Info,
            &format!("held-out loss {held_out_loss:.4} nats per token"),
        );
        let summary = json!({ "held_out_loss": held_out_loss });
        context.finish("teacher", ArtifactMeta::default(), summary, |dir| {
            let mut numbered = images.names.iter().enumerate();
            let numbered = numbered.all(|(i, name)| *name == i.to_string());
            let names = if numbered { &[][..] } else { &images.names };
            bundle::write_network(dir, &source, (&network, &weights), (&[], names))
        })
    }
}

/// A teacher to go on from.
struct Origin {
    /// Its weights.
    file: Stored,
    /// Whether it knows other classes.
    anew: bool,
}

/// Opens the teacher to go on from, if it fits a new one of this shape on these tokens.
fn start_from<B: Backend>(
    context: &Context<'_, B>,
    stage: &str,
    tokenizer: &Bundle<'_>,
    network: &NetworkConfig,
    images: &Images,
) -> Result<Origin> {
    let refuse = |message: String| Err(Error::option("/from", message));
    let bundle = Bundle::open(context.input_dir(stage)?)?;
    let own = bundle.network()?;
    let Some(classes) = own.classes() else {
        return refuse(format!(
            "{stage} is made for captions; a teacher of classes cannot start from it"
        ));
    };
    if own.clone().with_classes(images.classes) != *network {
        let what = bundle::differences(network, &own.clone().with_classes(images.classes));
        return refuse(format!("{stage} is a teacher of another shape: {what}"));
    }
    let codebook = |bundle: &Bundle<'_>| bundle.tokenizer_file()?.floats(CODEBOOK);
    if codebook(&bundle)? != codebook(tokenizer)? {
        return refuse(format!(
            "{stage} was trained on the tokens of another codebook, where each number means another code: train it anew, or \
             take its tokenizer here"
        ));
    }
    let same = classes == images.classes
        && (bundle.config.classes.is_empty() || bundle.config.classes == images.names);
    if !same {
        let message = format!(
            "{stage} knows {classes} other classes: the embedding of the {} here is made anew",
            images.classes
        );
        context.host.log(LogLevel::Info, &message);
    }
    Ok(Origin {
        file: bundle.network_file()?,
        anew: !same,
    })
}

/// The teacher's shape, for a tokenizer and a number of classes.
fn network(o: &Options, tokenizer: &TokenizerConfig, classes: usize) -> Result<NetworkConfig> {
    let codebook = tokenizer.codebook();
    match (o.family, tokenizer) {
        (Family::Llamagen, TokenizerConfig::Vq(t)) => Ok(NetworkConfig::Llamagen(
            shape_of_llamagen(o, codebook, t.autoencoder.side(), classes),
        )),
        (Family::Var, TokenizerConfig::Msvq(t)) => Ok(NetworkConfig::Var(shape_of_var(
            o, codebook, &t.scales, classes,
        ))),
        _ => {
            let message = format!(
                "family {}, but the tokenizer {} is one of family {}",
                o.family,
                o.tokenizer,
                tokenizer.family()
            );
            Err(Error::option("/family", message))
        }
    }
}

fn shape_of_llamagen(
    o: &Options,
    (vocabulary, codebook_dim): (usize, usize),
    side: usize,
    classes: usize,
) -> llamagen::Config {
    llamagen::Config {
        width: o.width,
        depth: o.depth,
        heads: o.heads,
        vocabulary,
        codebook_dim,
        side,
        condition: ConditionShape::Classes(classes),
    }
}

fn shape_of_var(
    o: &Options,
    (vocabulary, codebook_dim): (usize, usize),
    scales: &[usize],
    classes: usize,
) -> var::Config {
    var::Config {
        width: o.width,
        depth: o.depth,
        heads: o.heads,
        vocabulary,
        codebook_dim,
        scales: scales.to_vec(),
        classes,
        shared_adaln: o.shared_adaln,
        attn_l2_norm: o.attn_l2_norm,
    }
}

/// Tokens (n, L) of all images, perhaps mirrored, so many at once.
fn encode_all<B: Backend>(
    backend: &B,
    source: &Bundle<'_>,
    images: &Images,
    mirrored: bool,
    at_once: usize,
) -> Result<Vec<u32>> {
    let tokenizer = source.tokenizer(backend)?;
    let all: Vec<usize> = (0..images.len()).collect();
    let mut tokens = Vec::new();
    for picks in all.chunks(at_once) {
        let (pixels, _) = match mirrored {
            true => images.gather_mirrored(picks)?,
            false => images.gather(picks)?,
        };
        let pixels = backend.floats(&pixels, &batch_shape(images, picks.len()))?;
        tokens.extend(B::to_indices(&tokenizer.encode(&pixels)?)?);
    }
    Ok(tokens)
}
