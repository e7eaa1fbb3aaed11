//! Training a tokenizer: its networks, a step, and measurements during training.

use std::collections::BTreeMap;
use std::ops::Range;

use retort_abi::LogLevel;

use super::codebook::{COLLAPSED, Codebook};
use super::loss::{self, Adversary, BatchPart, Criterion};
use super::{Inputs, Options, batch, batch_shape, training_feed};
use crate::backend::{Backend, Unary};
use crate::collective::Collective;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::model::{CODEBOOK, Reconstruction, Tokenizer, discriminator};
use crate::perceptual::PIXELS_AT_ONCE;
use crate::tape::{Variable, scalar};
use crate::train::{self, HeldOut, Mean, StepOutput, TrainingLoop, average, shared};
use crate::weights::{self, Loader, ParameterSource, Params, Weights};

/// The tokenizer in training.
pub struct Networks<'a, B: Backend> {
    model: Box<dyn Tokenizer<B>>,
    codebook: Codebook<'a, B>,
    criterion: Criterion<'a, B>,
    /// The trained parameters: the tokenizer's own, followed by the adversary's.
    params: Params<B>,
    /// Weights without a gradient: codes that are averages.
    still: Params<B>,
    /// The average of the tokenizer's own parameters.
    average: Option<BTreeMap<String, B::Tensor>>,
    /// The tokenizer with the weights that will be kept.
    measured: Box<dyn Tokenizer<B>>,
}

impl<'a, B: Backend> Networks<'a, B> {
    /// Loads them.
    pub fn load(context: &Context<'a, B>, o: &Options, inputs: &'a Inputs<B>) -> Result<Self> {
        let (backend, seed) = (context.backend, context.job.seed);
        let start = match &inputs.from {
            Some(file) => ParameterSource::Files(std::slice::from_ref(file)),
            None => ParameterSource::Init(seed),
        };
        let origin = o.from.as_deref().unwrap_or("new tokenizer");
        let mut loader = Loader::new(backend, start, true, origin);
        let mut model = inputs.config.build(&mut loader)?;
        model.recompute(o.recompute);
        let all = loader.into_params();
        let codebook = all.iter().find(|(name, _)| name == CODEBOOK);
        let codebook = codebook.ok_or_else(|| Error::Internal("no codebook".into()))?;
        let codebook = Codebook::new(backend, codebook.1.value().clone(), o.codebook_ema)?;
        // Averaged codes are not parameters.
        let averaged = |name: &str| o.codebook_ema.is_some() && name == CODEBOOK;
        let (still, mut params): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|(name, _)| averaged(name));

        let average = average(backend, &o.train, &params)?;
        let mut tensors = shared(&params, average.as_ref());
        tensors.extend(shared(&still, None));
        let source = ParameterSource::Device(&tensors);
        let mut loader = Loader::new(backend, source, false, "tokenizer");
        let measured = inputs.config.build(&mut loader)?;

        let [channels, height, width] = inputs.images.shape();
        let mut criterion = Criterion {
            pixels: o.pixels,
            metric: (o.perceptual.weight() > 0.0)
                .then_some((&inputs.metric, o.perceptual.weight())),
            adversary: None,
            at_once: (PIXELS_AT_ONCE / (height * width)).max(1),
        };
        if let Some(own) = &o.adversarial {
            discriminator::check(height.min(width), own.layers, "/adversarial/layers")?;
            let (adversary, its) = Adversary::new(backend, seed, channels, own)?;
            criterion.adversary = Some(adversary);
            params.extend(its);
        }
        Ok(Self {
            model,
            codebook,
            criterion,
            params,
            still,
            average,
            measured,
        })
    }

    /// The loss of a part x (b, c, h, w) of a step's batch, weighted by its share of the batch, its figures, and the step's
    /// changes to the codes, which are known with the last part.
    fn part(
        &self,
        context: &Context<'_, B>,
        o: &Options,
        x: &B::Tensor,
        step: u64,
        at: usize,
    ) -> Result<StepOutput<B>> {
        let (seed, ranks) = (context.job.seed, context.ranks);
        let images = B::shape(x)[0];
        let part = BatchPart {
            ranks,
            fraction: images as f64 / o.train.batch as f64,
        };
        let Reconstruction {
            images: made,
            z,
            codebook_loss,
            commitment_loss,
            tokens,
            codes,
            last,
        } = self.model.reconstruct(x)?;
        let restarts = o.restarts_after(step);
        let wanted = (restarts || o.codebook_ema.is_some()).then(|| z.value().clone());
        let (mut loss, mut figures) = self.criterion.loss(made, x, &last, step, &part)?;
        if o.codebook_ema.is_none() {
            loss = loss.add(&codebook_loss)?;
        }
        loss = loss.add(&commitment_loss.affine(o.commitment, 0.0)?)?;
        if let (Some(entropy), Some(codes)) = (o.entropy, codes) {
            let term = loss::entropy(&z, &codes, entropy.temperature, &part)?;
            figures.push(("entropy", scalar::<B>(term.value())?));
            loss = loss.add(&term.affine(entropy.weight, 0.0)?)?;
        }
        if part.fraction < 1.0 {
            loss = loss.affine(part.fraction, 0.0)?;
            let figures = figures.iter_mut();
            figures.for_each(|(_, figure)| *figure *= part.fraction);
        }
        self.codebook.look_up(&tokens, wanted.as_ref())?;
        let (mut used, mut perplexity, mut anew) = (0.0, 0.0, None);
        if at + 1 == o.accumulate {
            let lookups = self
                .codebook
                .note(ranks, own_share(ranks, o), o.train.batch)?;
            // Every rank knows the value for all, but reported figures are summed: divide it.
            let share = (ranks.size() as f64).recip();
            (used, perplexity) = self.codebook.use_lately();
            (used, perplexity) = (used * share, perplexity * share);
            if restarts {
                let codes = self.codebook.restart(&lookups.z, seed, step)?;
                anew = (!codes.is_empty() && o.codebook_ema.is_none()).then_some((CODEBOOK, codes));
            }
        }
        figures.extend([("codebook_usage", used), ("perplexity", perplexity)]);
        Ok(StepOutput {
            loss,
            figures,
            anew,
        })
    }

    /// Mean squared error of the reconstructions of held-out images.
    fn held_out_error(&self, backend: &B, o: &Options, inputs: &Inputs<B>) -> Result<f64> {
        let mut errors = Mean::default();
        // Fixed parameters of a training step.
        for picks in inputs.measured_on().chunks(o.train.batch) {
            let x = batch(backend, &inputs.images, picks)?;
            let r = self.measured.reconstruct(&x)?;
            let error = r.images.sub(&Variable::constant(x))?.unary(Unary::Square)?;
            errors.add(&B::to_floats(error.value())?);
        }
        Ok(errors.value())
    }

    /// The warning about the codebook, if too few of its codes are used.
    fn collapse(&self, o: &Options) -> Option<String> {
        let (used, perplexity) = self.codebook.use_lately();
        (used < COLLAPSED).then(|| {
            format!(
                "{:.0} of {} codes are in use (perplexity {perplexity:.1}): the codebook has collapsed; try another \
                 seed, a lower learning rate, `restart_every` or fewer codes",
                used * o.codebook_size as f64,
                o.codebook_size
            )
        })
    }
}

/// The images of a batch that this rank computes.
fn own_share(ranks: &dyn Collective, o: &Options) -> Range<usize> {
    ranks.share(o.train.batch, 0, 1)
}

/// Trains the tokenizer: its weights, or None in a worker that shares the training and is not the first.
pub fn train<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    inputs: &Inputs<B>,
    networks: &Networks<'_, B>,
) -> Result<Option<Weights>> {
    let (host, backend, ranks) = (context.host, context.backend, context.ranks);
    let codebook = &networks.codebook;
    let against = o.adversarial.as_ref().map(|own| own.training(&o.train));
    let against = o.adversarial.as_ref().zip(against.as_ref());
    let fit = TrainingLoop {
        host,
        backend,
        work_dir: Some(context.work_dir()?),
        name: "tokenizer",
        ranks,
        options: &o.train,
        params: &networks.params,
        ema: networks.average.as_ref(),
        kept: Some(&codebook.kept),
        adversary: against.map(|(own, options)| train::SecondOptimiser {
            prefix: loss::PREFIX,
            options,
            from: own.start,
        }),
    };
    let own = own_share(ranks, o);
    let mut feed = training_feed(
        &inputs.images,
        &inputs.train,
        (o.train.batch, own.clone()),
        context.job.seed,
    );
    let image = inputs.images.shape().iter().product::<usize>();
    let mut seen = None;
    let part = |step: u64, part: usize| {
        let mut wait = ("data_wait", 0.0);
        if part == 0 {
            seen = Some(feed.take(step)?);
            wait = feed.wait();
            wait.1 /= ranks.size() as f64;
            codebook.settle()?;
        }
        let missing = || Error::Internal("a step without images".into());
        let pixels = &seen.as_ref().ok_or_else(missing)?.pixels;
        let piece = ranks.share(o.train.batch, part, o.accumulate);
        let place = (piece.start - own.start) * image..(piece.end - own.start) * image;
        let x = backend.floats(&pixels[place], &batch_shape(&inputs.images, piece.len()))?;
        let mut output = networks.part(context, o, &x, step, part)?;
        output.figures.push(wait);
        Ok(output)
    };
    let mut warned = false;
    let mut measure = || {
        let error = networks.held_out_error(backend, o, inputs)?;
        if let (false, Some(message)) = (warned, networks.collapse(o)) {
            warned = true;
            host.log(LogLevel::Warn, &message);
        }
        Ok(error)
    };
    let held_out = HeldOut {
        every: (o.train.steps / 10).max(1),
        name: "held_out_error",
        measure: &mut measure,
        keep_best: false,
    };
    let mut trained = fit.run_in_parts(o.accumulate, part, Some(held_out))?;
    codebook.settle()?;
    trained.extend(weights::from_params(&networks.still)?);
    Ok(context.job.part.is_none().then_some(trained))
}
