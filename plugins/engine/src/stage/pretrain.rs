//! `pretrain`: trains an AR teacher on a tokenizer's tokens, of classes or of captions.
//!
//! Captions are learned as in LlamaGen: features of a text encoder at the end of 120 positions. A dropped caption is replaced
//! by the unconditional features after the same padding; these are random and never trained.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use retort_abi::{ArtifactMeta, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::Backend;
use crate::bundle::{self, Bundle, Family, NetworkConfig, TokenizerConfig};
use crate::captions::ConditioningSource;
use crate::context::Context;
use crate::data::{Data, Images, View};
use crate::error::{Error, Result};
use crate::files::{make_once, read_or_remove};
use crate::model::dropout::{Dropout, DropoutRates};
use crate::model::{CODEBOOK, ConditioningShape, Teacher, TokenShape, llamagen, var};
use crate::numpy;
use crate::random::{Sequence, Stream};
use crate::size::Sides;
use crate::stage::conditioning::Features;
use crate::stage::conditioning::training::{POSITIONS, TrainingCaptions};
use crate::stage::tokenizer::batch_shape;
use crate::stage::{Stage, batch_memory};
use crate::tape::Variable;
use crate::train::{
    HeldOut, Mean, StepOutput, TrainOptions, TrainingLoop, average, check_parts, one_part, shared,
};
use crate::weights::{
    self, CheckpointWeights, InitialValue, Loader, ParameterSource, Params, Weights,
};

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
    #[schemars(extend("x-retort-prepared" = Data::prepared_by()))]
    pub data: Data,
    /// The stage of a teacher to start from, trained here or published, of the same shape and with the tokens of the same
    /// codebook. For other classes the class embedding is drawn anew.
    #[serde(default)]
    #[schemars(extend("x-retort-artifact" = ["teacher"]))]
    pub from: Option<String>,
    /// Share of each class held out from training, for its loss.
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
    /// LlamaGen: folder of the flan-t5 that makes features of the images' captions: config.json, tokenizer.json and its
    /// weights. The teacher then is one of captions, which `data` has to have.
    #[serde(default)]
    #[schemars(extend("x-retort-file" = "dir"))]
    pub text_encoder: Option<String>,
    /// LlamaGen: features of captions from a file, those of image i in place i, instead of `text_encoder`.
    #[serde(default)]
    pub features: Option<Features>,
    /// The most tokens of a caption; longer ones are cut by the text encoder.
    #[serde(default = "caption_tokens")]
    #[schemars(range(min = 1, max = 65536))]
    pub caption_tokens: usize,
    /// Probability with which a label or a caption is dropped in training, for guidance.
    #[serde(default = "label_dropout")]
    #[schemars(range(min = 0, max = 1))]
    pub label_dropout: f64,
    /// Probability with which a token is replaced by a random code at the input: a regulariser for small data.
    #[serde(default)]
    #[schemars(range(min = 0, max = 0.9))]
    pub token_noise: f64,
    /// Probability with which an entry of what an attention or a feed-forward layer adds is left out in training. Published:
    /// 0.1 for LlamaGen, 0 for VAR.
    #[serde(default)]
    #[schemars(range(min = 0, max = 0.9))]
    pub dropout: f64,
    /// LlamaGen: probability with which an entry of the embeddings of condition and tokens is left out in training. Published:
    /// 0.1.
    #[serde(default)]
    #[schemars(range(min = 0, max = 0.9))]
    pub token_dropout: f64,
    /// Probability with which the attention of the last block, and likewise its feed-forward layer, adds nothing for an image
    /// in training; in earlier blocks it is lower, down to 0 in the first. Published: 0 for LlamaGen, depth / 240 for VAR.
    #[serde(default)]
    #[schemars(range(min = 0, max = 0.9))]
    pub drop_path: f64,
    /// Parts of a batch that are computed one after the other: memory holds the activations of one, and their gradients
    /// add up to those of the batch.
    #[serde(default = "one_part")]
    #[schemars(range(min = 1))]
    pub accumulate: usize,
    /// Whether activations inside the teacher's blocks are computed again in the backward pass instead of being kept:
    /// memory for about a third more time. The result has the same bits.
    #[serde(default)]
    pub recompute: bool,
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
fn caption_tokens() -> usize {
    POSITIONS
}
fn label_dropout() -> f64 {
    0.1
}
fn keep_best() -> bool {
    true
}

impl Options {
    /// What a step leaves out of the teacher, for images of a batch from this number on.
    fn dropout_of_step(&self, seed: u64, step: u64, first: usize) -> Dropout {
        let rates = DropoutRates {
            token: self.token_dropout,
            residual: self.dropout,
            path: self.drop_path,
        };
        Dropout {
            rates,
            seed,
            step,
            first,
        }
    }

    fn captions(&self) -> TrainingCaptions<'_> {
        TrainingCaptions {
            text_encoder: self.text_encoder.as_deref(),
            features: self.features.as_ref(),
            positions: self.caption_tokens,
        }
    }
}

/// The stage.
pub struct Pretrain;

impl<B: Backend> Stage<B> for Pretrain {
    type Options = Options;
    const KIND: &'static str = "pretrain";
    const OUTPUT: &'static str = "teacher";
    const REVISION: u32 = 4;
    const TOGETHER: bool = true;
    const SUMMARY: &'static str = "train an autoregressive teacher on a tokenizer's tokens";

    fn check(o: &Options, base_dir: &Path) -> Result<()> {
        o.data
            .check()
            .map_err(|e| Error::option("/data", e.to_string()))?;
        check_parts(o.accumulate, o.train.batch)?;
        if o.captions().are_given() && o.family == Family::Var {
            let pointer = if o.features.is_some() {
                "/features"
            } else {
                "/text_encoder"
            };
            let message =
                "teachers of `family: var` know classes alone: captions need `family: llamagen`";
            return Err(Error::option(pointer, message));
        }
        if o.token_dropout > 0.0 && o.family == Family::Var {
            let message = "not for `family: var`: take `dropout`, `drop_path` or `token_noise`";
            return Err(Error::option("/token_dropout", message));
        }
        o.captions().check(base_dir)?;
        // The tokenizer determines the rest of the shape.
        match o.family {
            Family::Llamagen => {
                let classes = ConditioningShape::Classes(1);
                shape_of_llamagen(o, (2, 1), Sides::square(1), classes).check()
            }
            Family::Var => shape_of_var(o, (2, 1), &[1, 2], 1).check(),
        }
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        context.check_share(o.train.batch, o.accumulate)?;
        let inputs = Inputs::open(context, o)?;
        let networks = Networks::load(context, o, &inputs)?;
        let Some(weights) = train(context, o, &inputs, &networks)? else {
            return Ok(StageResult::of_part());
        };
        let loss = measure(context, o, &inputs, &weights)?;
        let summary = json!({ "held_out_loss": loss });
        context.finish("teacher", ArtifactMeta::default(), summary, |dir| {
            let network = (&inputs.network, &weights);
            bundle::write_network(dir, &inputs.source, network, (&[], inputs.names()))
        })
    }
}

/// The inputs of a teacher's training.
struct Inputs<'a> {
    /// The tokenizer, and its weights.
    source: Bundle<'a>,
    frozen: CheckpointWeights,
    images: Images,
    /// The teacher's conditioning, and the class or caption of each image.
    conditioning: ConditioningSource,
    labels: Vec<u32>,
    /// Training images, and held-out images.
    train: Vec<usize>,
    held: Vec<usize>,
    /// Tokens (n, L) of all images, for each view; the first is the middle.
    views: Vec<Vec<u32>>,
    network: NetworkConfig,
    shape: TokenShape,
    from: Option<StartingTeacher>,
}

impl<'a> Inputs<'a> {
    /// Opens them and checks that they match.
    fn open<B: Backend>(context: &Context<'a, B>, o: &Options) -> Result<Self> {
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
        let captions = o.captions().resolve(context, &images)?;
        let condition = match &captions {
            Some(captions) => ConditioningShape::Captions(captions.shape),
            None => ConditioningShape::Classes(images.classes),
        };
        let network = network(o, &source.config.tokenizer, condition)?;
        batch_memory::check(
            context,
            "/train/batch",
            o.train.batch.div_ceil(o.accumulate * context.ranks.size()),
            batch_memory::training(&network, true, o.recompute),
        )?;
        // Tokens are computed once, for each view of each image.
        let seen = images.views().into_iter().enumerate();
        let views = seen
            .map(|view| tokens(context, &source, &images, view, o.train.batch))
            .collect::<Result<Vec<_>>>()?;
        context.host.log(
            LogLevel::Info,
            &format!(
                "tokens of {} images, in {} views each",
                images.len(),
                views.len()
            ),
        );
        let (train, held) = images.split(o.held_out, context.job.seed);
        let frozen = source.tokenizer_file()?;
        let from = match &o.from {
            Some(stage) => Some(start_from(context, stage, &source, &network, &images)?),
            None => None,
        };
        let (conditioning, labels) = match captions {
            Some(captions) => (
                ConditioningSource::Captions(captions.captions.into()),
                captions.numbers,
            ),
            None => (
                ConditioningSource::Classes(images.classes),
                images.labels.clone(),
            ),
        };
        Ok(Self {
            frozen,
            conditioning,
            labels,
            train,
            held,
            views,
            shape: network.token_shape(),
            from,
            source,
            images,
            network,
        })
    }

    /// The teacher with these weights.
    fn build<B: Backend>(
        &self,
        loader: &mut Loader<'_, B>,
        o: &Options,
    ) -> Result<Box<dyn Teacher<B>>> {
        let frozen = ParameterSource::Files(std::slice::from_ref(&self.frozen));
        let mut tokenizer = Loader::new(loader.backend(), frozen, false, o.tokenizer.as_str());
        let config = &self.source.config.tokenizer;
        self.network.teacher(loader, (config, &mut tokenizer))
    }

    /// Tokens of an image in a view.
    fn tokens(&self, view: usize, image: usize) -> &[u32] {
        let l = self.shape.count();
        &self.views[view][image * l..(image + 1) * l]
    }

    /// Loss of all tokens of held-out images, in nats per token.
    fn held_out_loss<B: Backend>(
        &self,
        backend: &B,
        o: &Options,
        model: &dyn Teacher<B>,
    ) -> Result<f64> {
        let picks = match self.held.is_empty() {
            true => &self.train,
            false => &self.held,
        };
        let mut losses = Mean::default();
        // Fixed parameters of a training step.
        for picks in picks.chunks(o.train.batch) {
            let labels: Vec<u32> = picks.iter().map(|&i| self.labels[i]).collect();
            let tokens = picks.iter().flat_map(|&i| self.tokens(0, i));
            let wanted: Vec<u32> = tokens.copied().collect();
            let whole = Dropout::default();
            let logits = self.logits(backend, model, (&labels, &[]), &wanted, &whole)?;
            let wanted = backend.indices(&wanted, &[wanted.len()])?;
            losses.add(&B::to_floats(&B::cross_entropy(logits.value(), &wanted)?)?);
        }
        Ok(losses.value())
    }

    /// Logits (n L, K) of all tokens (n, L) of n images with these classes or captions, some of them dropped.
    fn logits<B: Backend>(
        &self,
        backend: &B,
        model: &dyn Teacher<B>,
        (labels, dropped): (&[u32], &[bool]),
        seen: &[u32],
        dropout: &Dropout,
    ) -> Result<Variable<B>> {
        let (n, shape) = (labels.len(), model.token_shape());
        let l = shape.count();
        let conditioning = self
            .conditioning
            .batch_with_dropout(backend, labels, dropped)?;
        let seen = backend.indices(seen, &[n, l])?;
        let logits = model.forced_with(&conditioning, &seen, dropout)?;
        logits.reshape(&[n * l, shape.vocabulary])
    }

    /// Names of the classes, if they have names.
    fn names(&self) -> &[String] {
        if let ConditioningSource::Captions(_) = self.conditioning {
            return &[];
        }
        let mut numbered = self.images.names.iter().enumerate();
        match numbered.all(|(i, name)| *name == i.to_string()) {
            true => &[],
            false => &self.images.names,
        }
    }
}

/// The teacher in training.
struct Networks<B: Backend> {
    model: Box<dyn Teacher<B>>,
    params: Params<B>,
    /// Parameters that are not trained.
    still: Params<B>,
    average: Option<BTreeMap<String, B::Tensor>>,
    /// The teacher with the weights that would be kept now.
    measured: Box<dyn Teacher<B>>,
}

impl<B: Backend> Networks<B> {
    fn load(context: &Context<'_, B>, o: &Options, inputs: &Inputs<'_>) -> Result<Self> {
        let (backend, seed) = (context.backend, context.job.seed);
        let from = inputs.from.as_ref();
        let anew = |name: &str| match from {
            Some(from) if from.anew && name == inputs.network.class_embedding() => {
                InitialValue::Drawn
            }
            _ => InitialValue::Weight(name.into()),
        };
        let start = match from {
            Some(from) => ParameterSource::Start {
                file: &from.file,
                of: &anew,
                seed,
            },
            None => ParameterSource::Init(seed),
        };
        let origin = o.from.as_deref().unwrap_or("new teacher");
        let mut loader = Loader::new(backend, start, true, origin);
        let mut model = inputs.build(&mut loader, o)?;
        model.recompute(o.recompute);
        let (still, params): (Vec<_>, Vec<_>) = loader
            .into_params()
            .into_iter()
            .partition(|(name, _)| name == llamagen::UNCONDITIONAL);
        let average = average(backend, &o.train, &params)?;
        let mut tensors = shared(&params, average.as_ref());
        tensors.extend(shared(&still, None));
        let source = ParameterSource::Device(&tensors);
        let measured = inputs.build(&mut Loader::new(backend, source, false, "teacher"), o)?;
        Ok(Self {
            model,
            params,
            still,
            average,
            measured,
        })
    }
}

/// The data of a training step.
struct TokenBatch {
    /// Classes or numbers of captions (n).
    labels: Vec<u32>,
    /// Which of them are dropped, for guidance.
    dropped: Vec<bool>,
    /// Tokens (n, L) to predict.
    wanted: Vec<u32>,
    /// The teacher's input: the same with some tokens replaced.
    seen: Vec<u32>,
}

impl TokenBatch {
    /// The batch of a step.
    fn draw(o: &Options, inputs: &Inputs<'_>, seed: u64, step: u64) -> Self {
        let mut choice = Sequence::new(seed, Stream::Step, step);
        let picks: Vec<usize> = (0..o.train.batch)
            .map(|_| inputs.train[choice.below(inputs.train.len())])
            .collect();
        let labels = picks.iter().map(|&i| inputs.labels[i]).collect();
        let dropped = picks.iter().map(|_| choice.uniform() < o.label_dropout);
        let dropped = dropped.collect();
        let mut wanted = Vec::with_capacity(picks.len() * inputs.shape.count());
        for &i in &picks {
            let view = match inputs.views.len() {
                1 => 0,
                n => choice.below(n),
            };
            wanted.extend_from_slice(inputs.tokens(view, i));
        }
        let mut seen = wanted.clone();
        if o.token_noise > 0.0 {
            for token in &mut seen {
                if choice.uniform() < o.token_noise {
                    *token = choice.below(inputs.shape.vocabulary) as u32;
                }
            }
        }
        Self {
            labels,
            dropped,
            wanted,
            seen,
        }
    }
}

/// Trains the teacher: its weights, or None in a worker that shares the training and is not the first.
fn train<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    inputs: &Inputs<'_>,
    networks: &Networks<B>,
) -> Result<Option<Weights>> {
    let (backend, ranks) = (context.backend, context.ranks);
    let fit = TrainingLoop {
        host: context.host,
        backend,
        work_dir: Some(context.work_dir()?),
        name: "pretrain",
        ranks,
        options: &o.train,
        params: &networks.params,
        ema: networks.average.as_ref(),
        kept: None,
        adversary: None,
    };
    let part = |step: u64, part: usize| {
        let batch = TokenBatch::draw(o, inputs, context.job.seed, step);
        // Random choices do not depend on the number of workers.
        let (n, l) = (batch.labels.len(), inputs.shape.count());
        let own = ranks.share(n, part, o.accumulate);
        let whole = own.len() == n;
        let fraction = own.len() as f64 / n as f64;
        let tokens = own.start * l..own.end * l;
        let wanted = backend.indices(&batch.wanted[tokens.clone()], &[tokens.len()])?;
        let dropout = o.dropout_of_step(context.job.seed, step, own.start);
        let (labels, seen) = (
            (&batch.labels[own.clone()], &batch.dropped[own]),
            &batch.seen[tokens],
        );
        let logits = inputs.logits(backend, &*networks.model, labels, seen, &dropout)?;
        let mut loss = logits.cross_entropy(&wanted)?;
        if !whole {
            loss = loss.affine(fraction, 0.0)?;
        }
        Ok(StepOutput::new(loss, Vec::new()))
    };
    let mut measure = || inputs.held_out_loss(backend, o, &*networks.measured);
    let held_out = HeldOut {
        every: (o.train.steps / 40).max(10),
        name: "held_out_loss",
        measure: &mut measure,
        keep_best: o.keep_best,
    };
    let mut weights = fit.run_in_parts(o.accumulate, part, Some(held_out))?;
    weights.extend(weights::from_params(&networks.still)?);
    Ok(context.job.part.is_none().then_some(weights))
}

/// Logs and returns the held-out loss of the final weights.
fn measure<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    inputs: &Inputs<'_>,
    weights: &Weights,
) -> Result<f64> {
    let (host, backend) = (context.host, context.backend);
    let mut loader = Loader::new(backend, ParameterSource::Host(weights), false, "teacher");
    let kept = inputs.build(&mut loader, o)?;
    let loss = inputs.held_out_loss(backend, o, &*kept)?;
    let message = format!("held-out loss {loss:.4} nats per token");
    host.log(LogLevel::Info, &message);
    Ok(loss)
}

/// A teacher to go on from.
struct StartingTeacher {
    /// Its weights.
    file: CheckpointWeights,
    /// Whether its classes differ.
    anew: bool,
}

/// Opens the teacher to start from, and checks that it matches the new one's shape and tokens.
fn start_from<B: Backend>(
    context: &Context<'_, B>,
    stage: &str,
    tokenizer: &Bundle<'_>,
    network: &NetworkConfig,
    images: &Images,
) -> Result<StartingTeacher> {
    let refuse = |message: String| Err(Error::option("/from", message));
    let bundle = Bundle::open(context.input_dir(stage)?)?;
    let own = bundle.network()?;
    let of = |network: &NetworkConfig| match network.classes() {
        Some(_) => "classes",
        None => "captions",
    };
    if of(own) != of(network) {
        return refuse(format!(
            "{stage} is a teacher of {}; one of {} cannot start from it",
            of(own),
            of(network)
        ));
    }
    let alike = match own.classes() {
        Some(_) => own.clone().with_classes(images.classes),
        None => own.clone(),
    };
    if alike != *network {
        let what = bundle::differences(network, &alike);
        return refuse(format!("{stage} is a teacher of another shape: {what}"));
    }
    let codebook = |bundle: &Bundle<'_>| bundle.tokenizer_file()?.floats(CODEBOOK);
    if codebook(&bundle)? != codebook(tokenizer)? {
        return refuse(format!(
            "{stage} was trained on the tokens of another codebook, where each number means another code: train it anew, or \
             take its tokenizer here"
        ));
    }
    let other = own.classes().filter(|classes| {
        let named = &bundle.config.classes;
        *classes != images.classes || !(named.is_empty() || *named == images.names)
    });
    if let Some(classes) = other {
        let message = format!(
            "{stage} knows {classes} other classes: the embedding of the {} here is made anew",
            images.classes
        );
        context.host.log(LogLevel::Info, &message);
    }
    Ok(StartingTeacher {
        file: bundle.network_file()?,
        anew: other.is_some(),
    })
}

/// The teacher's shape, for a tokenizer and a conditioning.
fn network(
    o: &Options,
    tokenizer: &TokenizerConfig,
    condition: ConditioningShape,
) -> Result<NetworkConfig> {
    let codebook = tokenizer.codebook();
    match (o.family, tokenizer, condition) {
        (Family::Llamagen, TokenizerConfig::Vq(t), _) => Ok(NetworkConfig::Llamagen(
            shape_of_llamagen(o, codebook, t.autoencoder.map(), condition),
        )),
        (Family::Var, TokenizerConfig::Msvq(t), ConditioningShape::Classes(classes)) => Ok(
            NetworkConfig::Var(shape_of_var(o, codebook, &t.scales, classes)),
        ),
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
    map: Sides,
    condition: ConditioningShape,
) -> llamagen::Config {
    llamagen::Config {
        width: o.width,
        depth: o.depth,
        heads: o.heads,
        vocabulary,
        codebook_dim,
        map,
        condition,
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

/// Tokens (n, L) of all images in a view with this number: computed once, and kept in the work directory for other workers and
/// for a resumed training.
fn tokens<B: Backend>(
    context: &Context<'_, B>,
    source: &Bundle<'_>,
    images: &Images,
    (number, view): (usize, View),
    at_once: usize,
) -> Result<Vec<u32>> {
    let name = format!("tokens-{number}.npy");
    let path = context.work_dir()?.join(&name);
    let lock = context.lock(&name)?;
    let (vocabulary, _) = source.config.tokenizer.codebook();
    let kept = || kept_tokens(&path, images.len(), vocabulary);
    if let Some(found) = read_or_remove(&path, kept)? {
        return Ok(found);
    }
    let tokens = encode_all(context, source, images, view, at_once)?;
    make_once(&path, &lock, |partial| {
        let header = numpy::header("<u4", &[images.len(), tokens.len() / images.len()]);
        let write = || {
            let mut file = BufWriter::new(File::create(partial)?);
            file.write_all(&header)?;
            for token in &tokens {
                file.write_all(&token.to_le_bytes())?;
            }
            file.flush()
        };
        write().map_err(Error::io(partial))
    })?;
    Ok(tokens)
}

/// Images whose tokens are read from a file at a time.
const READ_AT_ONCE: usize = 4096;

/// Tokens of this many images in a file, if it is complete.
fn kept_tokens(path: &Path, images: usize, vocabulary: usize) -> Option<Vec<u32>> {
    let rows = numpy::Rows::open(path).ok()?;
    let l = match *rows.shape() {
        [n, l] if n == images && rows.kind() == "u4" => l,
        _ => return None,
    };
    let mut found = Vec::with_capacity(images.checked_mul(l)?);
    for start in (0..images).step_by(READ_AT_ONCE) {
        let mut bytes = vec![0; READ_AT_ONCE.min(images - start) * l * 4];
        rows.read_bytes((start * l * 4) as u64, &mut bytes).ok()?;
        let (quads, _) = bytes.as_chunks();
        found.extend(quads.iter().map(|quad| u32::from_le_bytes(*quad)));
    }
    found
        .iter()
        .all(|token| (*token as usize) < vocabulary)
        .then_some(found)
}

/// Tokens (n, L) of all images in a view, this many at once.
fn encode_all<B: Backend>(
    context: &Context<'_, B>,
    source: &Bundle<'_>,
    images: &Images,
    view: View,
    at_once: usize,
) -> Result<Vec<u32>> {
    let backend = context.backend;
    let tokenizer = source.tokenizer(backend)?;
    let all: Vec<usize> = (0..images.len()).collect();
    let mut tokens = Vec::new();
    for picks in all.chunks(at_once) {
        context.go_on()?;
        let (pixels, _) = images.gather_view(picks, view)?;
        let pixels = backend.floats(&pixels, &batch_shape(images, picks.len()))?;
        tokens.extend(B::to_indices(&tokenizer.encode(&pixels)?)?);
    }
    Ok(tokens)
}
