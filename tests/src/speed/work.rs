//! Operations and weights of networks, from their shapes: what floors are made of. A multiplication with its addition counts as
//! two operations; norms and activations are left out.

use retort_engine::model::autoencoder::Shape;

/// What one image costs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Cost {
    /// Operations of a forward pass.
    pub operations: f64,
    /// Weights of convolutions and linear layers.
    pub weights: f64,
}

impl Cost {
    /// A kernel applied at side x side positions of the result.
    fn convolution(&mut self, input: usize, output: usize, kernel: usize, side: usize) {
        let weights = (input * output * kernel * kernel) as f64;
        self.weights += weights;
        self.operations += 2.0 * weights * (side * side) as f64;
    }

    fn residual(&mut self, input: usize, output: usize, side: usize) {
        self.convolution(input, output, 3, side);
        self.convolution(output, output, 3, side);
        if input != output {
            self.convolution(input, output, 1, side);
        }
    }

    fn attention(&mut self, width: usize, side: usize) {
        (0..4).for_each(|_| self.convolution(width, width, 1, side));
        self.operations += 4.0 * width as f64 * (side as f64).powi(4);
    }

    fn middle(&mut self, width: usize, side: usize) {
        self.residual(width, width, side);
        self.attention(width, side);
        self.residual(width, width, side);
    }

    /// Both together.
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            operations: self.operations + other.operations,
            weights: self.weights + other.weights,
        }
    }
}

/// An encoder, from images to z.
pub(super) fn encoder(c: &Shape) -> Cost {
    let mut cost = Cost::default();
    let mut side = c.image_size.height;
    let mut width = c.channels;
    cost.convolution(c.image_channels, width, 3, side);
    for (i, multiplier) in c.multipliers.iter().enumerate() {
        let (output, last) = (c.channels * multiplier, i + 1 == c.multipliers.len());
        for _ in 0..c.res_blocks {
            cost.residual(width, output, side);
            width = output;
            if last {
                cost.attention(width, side);
            }
        }
        if !last {
            side /= 2;
            cost.convolution(width, width, 3, side);
        }
    }
    cost.middle(width, side);
    cost.convolution(width, c.z_channels, 3, side);
    cost
}

/// A decoder, from z to images.
pub(super) fn decoder(c: &Shape) -> Cost {
    let mut cost = Cost::default();
    let levels = c.multipliers.len();
    let mut side = c.map().height;
    let mut width = c.channels * c.multipliers[levels - 1];
    cost.convolution(c.z_channels, width, 3, side);
    cost.middle(width, side);
    for (i, multiplier) in c.multipliers.iter().rev().enumerate() {
        let output = c.channels * multiplier;
        for _ in 0..=c.res_blocks {
            cost.residual(width, output, side);
            width = output;
            if i == 0 {
                cost.attention(width, side);
            }
        }
        if i + 1 < levels {
            side *= 2;
            cost.convolution(width, width, 3, side);
        }
    }
    cost.convolution(width, c.image_channels, 3, side);
    cost
}

/// VGG-16 without its linear layers, as LPIPS uses it.
pub(super) fn vgg(mut side: usize) -> Cost {
    let mut cost = Cost::default();
    let mut input = 3;
    for (convolutions, width) in [(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)] {
        for _ in 0..convolutions {
            cost.convolution(input, width, 3, side);
            input = width;
        }
        side /= 2;
    }
    cost
}

/// A PatchGAN with this many strided convolutions, the first to `width` channels.
pub(super) fn discriminator(mut side: usize, width: usize, layers: usize) -> Cost {
    let mut cost = Cost::default();
    let mut input = 3;
    for layer in 0..layers {
        side /= 2;
        let output = width << layer.min(3);
        cost.convolution(input, output, 4, side);
        input = output;
    }
    // Without a stride a kernel of 4 with a padding of 1 removes a pixel.
    cost.convolution(input, width << layers.min(3), 4, side - 1);
    cost.convolution(width << layers.min(3), 1, 4, side - 2);
    cost
}

/// A classifier of images (c, h, w), down to its features.
pub(super) fn classifier([channels, mut height, mut width]: [usize; 3], features: usize) -> Cost {
    let mut cost = Cost::default();
    let (mut input, mut output, mut first) = (channels, 32, true);
    while first || height.max(width) > 2 {
        if !first {
            (height, width) = (height.div_ceil(2), width.div_ceil(2));
        }
        first = false;
        cost.convolution(input, output, 3, height.max(width));
        (input, output) = (output, (output * 2).min(64));
    }
    cost.convolution(input * height * width, features, 1, 1);
    cost
}

/// Bytes that an optimiser moves in a step: AdamW reads weights, gradients and two moments and writes three of them; a moving
/// average is read and written.
pub(super) fn step_bytes(weights: f64, averaged: bool) -> f64 {
    let tensors = if averaged { 9.0 } else { 7.0 };
    4.0 * tensors * weights
}

#[cfg(test)]
mod tests {
    use super::*;
    use retort_engine::size::Sides;

    #[test]
    fn a_small_network_costs_what_its_weights_cost() {
        let shape = Shape {
            image_channels: 3,
            image_size: Sides::square(4),
            channels: 2,
            multipliers: vec![1, 1],
            res_blocks: 1,
            norm_groups: 1,
            z_channels: 5,
        };
        // Convolutions: in, two of a block, down, four and four of the middle and of the last block, two attentions, out.
        let blocks = 9 * 4;
        let encoder = encoder(&shape);
        assert_eq!(
            encoder.weights as usize,
            9 * 6 + 2 * blocks + blocks + 6 * blocks + 2 * 16 + 9 * 10
        );
        let fine = 16 * (9 * 6 + 2 * blocks);
        let coarse = 4 * (blocks + 6 * blocks + 2 * 16 + 9 * 10);
        let attention = 2 * 4 * 2 * 16;
        assert_eq!(encoder.operations as usize, 2 * (fine + coarse) + attention);
        assert!(decoder(&shape).operations > encoder.operations);
    }

    #[test]
    fn vgg_has_its_published_weights() {
        assert_eq!(vgg(64).weights as usize, 14_710_464);
        assert_eq!(vgg(224).operations as usize / 1_000_000_000, 30);
    }
}
