//! The minimum memory of a student's training, before it starts: its parts, and the options that reduce them.
//!
//! In: shapes and options. Out: the bytes that the tape holds in f32. This is a lower bound: backends sometimes need more.

use super::{Options, PIXELS_AT_ONCE};
use crate::bundle::{NetworkConfig, TokenizerConfig};
use crate::memory::{floats, gigabytes};
use crate::perceptual::Perceptual;

/// Bytes, unless they overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainingMemory {
    /// Weights with their gradients, both moments and the average.
    weights: Option<u64>,
    /// Activations that a part of a batch keeps for its backward pass.
    activations: Option<u64>,
    /// The same for decoder and perceptual network, for the images decoded together.
    decoding: Option<u64>,
}

/// What the tape keeps per token in a block, in widths: the input, norms, queries, keys and values twice, attention's output,
/// and four widths twice in the feed-forward layer.
const WIDTHS_OF_A_BLOCK: usize = 18;

/// Channels and convolutions of VGG-16 between its poolings.
const VGG: [(usize, usize); 5] = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)];

impl TrainingMemory {
    /// For a student with this many parameters, on each of this many ranks.
    pub fn of(
        o: &Options,
        network: &NetworkConfig,
        tokenizer: &TokenizerConfig,
        parameters: usize,
        ranks: usize,
    ) -> Self {
        let shape = network.token_shape();
        let (width, depth) = match network {
            NetworkConfig::Llamagen(c) => (c.width, c.depth),
            NetworkConfig::Var(c) => (c.width, c.depth),
        };
        let part = o.train.batch.div_ceil(o.accumulate.saturating_mul(ranks));
        // All activations of every block, or only the blocks' inputs and all activations of one block.
        let kept = match o.recompute {
            true => depth.checked_add(WIDTHS_OF_A_BLOCK),
            false => depth.checked_mul(WIDTHS_OF_A_BLOCK),
        };
        let of_token = kept
            .and_then(|kept| kept.checked_mul(width))
            .and_then(|kept| kept.checked_add(2 * shape.vocabulary));
        let tokens = shape.count() + shape.condition.positions();
        let copies = if o.train.ema > 0.0 { 3 } else { 2 };
        let of_moments = match o.train.zero_stage {
            0 => parameters,
            _ => parameters.div_ceil(ranks),
        };
        let moments = floats(&[2, of_moments]);
        let decoding = match o.perceptual.weight() > 0.0 {
            false => Some(0),
            true => of_image(&o.perceptual, tokenizer).and_then(|image| {
                let together = o.decode_batch(tokenizer.image()).min(part);
                image.checked_mul(together as u64)
            }),
        };
        Self {
            weights: floats(&[copies, parameters])
                .and_then(|weights| weights.checked_add(moments?)),
            activations: of_token.and_then(|kept| floats(&[part, tokens, kept])),
            decoding,
        }
    }

    /// All of it.
    pub fn total(&self) -> Option<u64> {
        self.weights?
            .checked_add(self.activations?)?
            .checked_add(self.decoding?)
    }

    /// The parts, for people.
    pub fn describe(&self) -> String {
        let said = |bytes: Option<u64>| bytes.map_or("more than any machine has".into(), gigabytes);
        format!(
            "at least {} of memory (weights and optimiser {}, activations {}, decoding {})",
            said(self.total()),
            said(self.weights),
            said(self.activations),
            said(self.decoding)
        )
    }

    /// Why it does not fit into this many bytes, if so, and what to do.
    pub fn refusal(&self, o: &Options, free: u64) -> Option<String> {
        if self.total().is_some_and(|total| total <= free) {
            return None;
        }
        let mut advice = Vec::new();
        let (activations, decoding) = (self.activations, self.decoding);
        let large = |part: Option<u64>| part.is_none_or(|part| part > free / 8);
        if large(activations) && !o.recompute {
            advice.push("`recompute: true`".to_owned());
        }
        if large(activations) && o.accumulate < o.train.batch {
            advice.push(format!("a larger `accumulate` than {}", o.accumulate));
        }
        if large(decoding) && o.decode_batch != Some(1) {
            advice.push("`decode_batch: 1`".to_owned());
        }
        if large(self.weights) && o.train.zero_stage == 0 {
            advice.push("`zero_stage: 1` under `train` with several workers".to_owned());
        }
        let advice = match advice.is_empty() {
            true => "take a device with more memory, or a smaller student".to_owned(),
            false => format!("try {}", advice.join(", ")),
        };
        let (needs, free) = (self.describe(), gigabytes(free));
        Some(format!("training needs {needs}, {free} are free: {advice}"))
    }
}

/// Activations of decoding and measuring one image: in each residual block of the decoder the inputs of both norms and both
/// convolutions, and the outputs of VGG's convolutions.
fn of_image(perceptual: &Perceptual, tokenizer: &TokenizerConfig) -> Option<u64> {
    let shape = match tokenizer {
        TokenizerConfig::Vq(c) => &c.autoencoder,
        TokenizerConfig::Msvq(c) => &c.autoencoder,
    };
    // Pixels of a map at a level, one at least.
    let pixels = |level: usize| shape.image_size.halved(level).area().max(1);
    let mut layers = vec![floats(&[2, shape.image_channels, pixels(0)])];
    for (level, multiplier) in shape.multipliers.iter().enumerate() {
        let width = shape.channels * multiplier;
        let sizes = [4, shape.res_blocks + 1, width, pixels(level)];
        layers.push(floats(&sizes));
    }
    if matches!(perceptual, Perceptual::Lpips { .. }) {
        for (level, (channels, convolutions)) in VGG.into_iter().enumerate() {
            layers.push(floats(&[convolutions, channels, pixels(level)]));
        }
    }
    layers
        .into_iter()
        .try_fold(0u64, |sum, layer| sum.checked_add(layer?))
}

impl Options {
    /// How many images of this size the perceptual term decodes together.
    pub(super) fn decode_batch(&self, [_, height, width]: [usize; 3]) -> usize {
        let most = (PIXELS_AT_ONCE / (height * width)).max(1);
        self.decode_batch.unwrap_or(most)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bundle::Family;
    use crate::published::{ShapeHints, published};

    fn need(more: serde_json::Value) -> (Options, TrainingMemory) {
        let mut options = json!({
            "teacher": "t", "trajectories": "p", "timesteps": [0, 5], "split": 5,
            "perceptual": {"kind": "lpips", "weight": 1.0, "vgg": "v", "linear": "l"},
            "train": {"batch": 64, "ema": 0.9999},
        });
        for (name, value) in more.as_object().into_iter().flatten() {
            options[name] = value.clone();
        }
        let o: Options = serde_json::from_value(options).expect("options");
        let hints = ShapeHints {
            size: Some("d16".into()),
            ..Default::default()
        };
        let (tokenizer, network) = published(Family::Var, &hints).expect("a size");
        let need = TrainingMemory::of(&o, &network, &tokenizer, 330_000_000, 1);
        (o, need)
    }

    #[test]
    fn ranks_share_a_batch_and_sharded_moments() {
        let (hints, ranks) = (
            ShapeHints {
                size: Some("d16".into()),
                ..Default::default()
            },
            8,
        );
        let (tokenizer, network) = published(Family::Var, &hints).expect("a size");
        let of = |more, ranks| {
            let (o, _) = need(more);
            TrainingMemory::of(&o, &network, &tokenizer, 330_000_000, ranks)
        };
        let (one, all) = (of(json!({}), 1), of(json!({}), ranks));
        assert_eq!(all.weights, one.weights);
        assert_eq!(all.activations, one.activations.map(|one| one / 8));
        // All ranks hold the weights, gradients and the average; each holds an eighth of both moments.
        let train = json!({"batch": 64, "ema": 0.9999, "zero_stage": 1});
        let sharded = of(json!({ "train": train }), ranks);
        let copies = |count: f64| (count * 4.0 * 330e6) as u64;
        assert_eq!(one.weights, Some(copies(5.0)));
        assert_eq!(sharded.weights, Some(copies(3.25)));
    }

    #[test]
    fn options_bring_published_training_onto_smaller_devices() {
        const GB: u64 = 1_000_000_000;
        let plain = need(json!({"decode_batch": 64}));
        let all = plain.1.total().expect("a number");
        assert!(all > 80 * GB, "{}", plain.1.describe());
        let said = plain.1.refusal(&plain.0, 80 * GB).expect("a refusal");
        for advice in [
            "`recompute: true`",
            "a larger `accumulate` than 1",
            "`decode_batch: 1`",
        ] {
            assert!(said.contains(advice), "{said}");
        }
        // The figures in recipes/paper/var-train.yaml, and settings that fit into 24 GB.
        let default = need(json!({"recompute": true}));
        assert_eq!(default.1.refusal(&default.0, 80 * GB), None);
        let small = need(json!({"recompute": true, "accumulate": 8, "decode_batch": 2}));
        assert_eq!(small.1.refusal(&small.0, 24 * GB), None);
        assert!(small.1.total() < default.1.total());
    }

    #[test]
    fn sizes_beyond_numbers_are_refused() {
        let (o, _) = need(json!({}));
        let none = TrainingMemory {
            weights: None,
            activations: Some(1),
            decoding: Some(1),
        };
        let said = none.refusal(&o, u64::MAX).expect("a refusal");
        assert!(said.contains("more than any machine has"), "{said}");
    }
}
