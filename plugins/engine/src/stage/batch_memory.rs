//! The minimum memory per sample of a batch, from the shapes of networks. It is checked before a batch starts, because a
//! failed allocation ends the process, perhaps after hours ([`crate::memory`]).
//!
//! These are lower bounds: the tensors that certainly exist at the same time. A batch that passes may still not fit.

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
    // They are stored as operands of products: in two bytes if these are rounded.
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

/// Decoding: the larger of a convolution's input and output at the image's full size, and the attention of the coarsest
/// feature maps.
fn decoding(tokenizer: &TokenizerConfig) -> Option<u64> {
    let [_, height, width] = tokenizer.image();
    let convolution = memory::floats(&[2, tokenizer.finest_channels(), height, width])?;
    Some(convolution.max(attention(tokenizer.positions())?))
}

/// A tokenizer's attention in its coarsest feature maps: scores of all pairs of positions, and their softmax.
pub fn attention(positions: usize) -> Option<u64> {
    memory::floats(&[2, positions, positions])
}

/// A sample: the larger of drawing and decoding it. It is drawn by a student, by a teacher with a distribution, or by both.
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

/// A sample in a training step of a network of tokens: its logits and their gradient, if the loss reaches them, and for each
/// block the inputs of its products, or only the block's input if the rest is recomputed.
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

/// Refuses a batch that does not fit into the memory of its device, or of the host.
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
    use crate::published::{ShapeHints, published};
    use crate::size::Sides;

    #[test]
    fn the_attention_of_a_decoder_counts() {
        let size = |size: &str| ShapeHints {
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
