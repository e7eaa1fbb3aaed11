//! The minimum memory of a batch's sample, from the shapes of networks: checked before a batch is begun, because a failed
//! allocation ends the process, or the stage after hours ([`crate::memory`]).
//!
//! Lower bounds: what surely exists at one time. What passes may still not fit.

use crate::backend::Backend;
use crate::bundle::{NetworkConfig, TokenizerConfig};
use crate::context::Context;
use crate::error::Result;
use crate::memory;
use crate::sampler::Distribution;

/// Generating: keys and values of all blocks, for two rows with guidance.
pub fn generating(
    network: &NetworkConfig,
    distribution: &Distribution,
    dtype: &str,
) -> Option<u64> {
    let (depth, width) = network.size();
    let rows = match network.is_guided(distribution.guidance) {
        true => 2,
        false => 1,
    };
    // They are kept as products read them: in two bytes where these are rounded.
    let floats = match dtype {
        "f32" => 2,
        _ => 1,
    };
    memory::floats(&[rows, floats, depth, width, network.token_shape().count()])
}

/// A pass of a student: the logits of all tokens.
fn student(network: &NetworkConfig) -> Option<u64> {
    let shape = network.token_shape();
    memory::floats(&[shape.count(), shape.vocabulary])
}

/// Decoding: the larger of what goes into and comes out of a convolution at the image's full size, and the attention between
/// the coarsest feature maps.
fn decoding(tokenizer: &TokenizerConfig) -> Option<u64> {
    let [_, height, width] = tokenizer.image();
    let convolution = memory::floats(&[2, tokenizer.finest_channels(), height, width])?;
    Some(convolution.max(attention(tokenizer.positions())?))
}

/// The attention of a tokenizer between its coarsest feature maps: scores of all pairs of positions, and their softmax.
pub fn attention(positions: usize) -> Option<u64> {
    memory::floats(&[2, positions, positions])
}

/// A sample: the larger of drawing and decoding it. A student draws it, or a teacher by a distribution, or both do.
pub fn sampling(
    by_student: bool,
    distribution: Option<&Distribution>,
    network: &NetworkConfig,
    tokenizer: Option<&TokenizerConfig>,
    dtype: &str,
) -> Option<u64> {
    let passes = match by_student {
        true => student(network)?,
        false => 0,
    };
    let drawing = match distribution {
        Some(distribution) => generating(network, distribution, dtype)?.max(passes),
        None => passes,
    };
    let decoding = tokenizer.map_or(Some(0), decoding)?;
    Some(drawing.max(decoding))
}

/// A sample of a step that trains a network of tokens: its logits and their gradient, if the loss reaches them, and in each
/// block the input of its products, or of the block alone where the rest is computed again.
pub fn training(network: &NetworkConfig, logits: bool, recompute: bool) -> Option<u64> {
    let (depth, width) = network.size();
    let shape = network.token_shape();
    let block = if recompute { 1 } else { 4 };
    let blocks = memory::floats(&[shape.count(), depth, block, width])?;
    let logits = match logits {
        true => memory::floats(&[2, shape.count(), shape.vocabulary])?,
        false => 0,
    };
    blocks.checked_add(logits)
}

/// Refuses a batch that does not fit into the memory that it is computed in: the device's, or the host's.
///
/// # Errors
/// At the option `pointer`.
pub fn check<B: Backend>(
    context: &Context<'_, B>,
    pointer: &str,
    batch: usize,
    each: Option<u64>,
) -> Result<()> {
    memory::check_batch(pointer, batch, each, memory::free_for(context.backend))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Family;
    use crate::published::{Hints, published};
    use crate::size::Sides;

    #[test]
    fn the_attention_of_a_decoder_counts() {
        let size = |size: &str| Hints {
            size: Some(size.into()),
            ..Default::default()
        };
        let (mut tokenizer, _) = published(Family::Llamagen, &size("B")).expect("a size");
        // 128 channels of 256 x 256, in and out: more than 256 x 256 pairs of 16 x 16 positions.
        assert_eq!(decoding(&tokenizer), Some(4 * 2 * 128 * 256 * 256));
        let change = |tokenizer: &mut TokenizerConfig, multipliers: usize, side: usize| {
            let TokenizerConfig::Vq(vq) = tokenizer else {
                panic!("a tokenizer of LlamaGen");
            };
            vq.autoencoder.multipliers.truncate(multipliers);
            vq.autoencoder.image_size = Sides::square(side);
        };
        // Two levels leave 128 x 128 positions.
        change(&mut tokenizer, 2, 256);
        assert_eq!(decoding(&tokenizer), Some(4 * 2 * 128u64.pow(4)));
        change(&mut tokenizer, 2, usize::MAX / 2);
        assert_eq!(decoding(&tokenizer), None);
    }
}
