//! What a training step leaves out at random, against memorising: entries (dropout, Srivastava et al. 2014) and whole branches
//! of blocks (stochastic depth, Huang et al. 2016, arXiv 1603.09382), at the places of the published trainings.
//!
//! ```text
//! embeddings  x <- x m / (1 - token)
//! block i     x <- x + f(x) m n / ((1 - residual) (1 - path_i))     f attention or feed-forward
//!             path_i = path i / (depth - 1)
//! ```
//!
//! m is 0 or 1 per entry, n per image. Both are a pure function of (seed, step, image's number in the batch, place), so they do
//! not depend on parts of a batch or on the number of workers, and recomputation draws the same again.

use rayon::prelude::*;

use crate::backend::Backend;
use crate::error::Result;
use crate::random::{Sequence, Stream};
use crate::tape::Variable;

/// Probabilities, each below 1.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DropoutRates {
    /// Of an entry of the embeddings of condition and tokens.
    pub token: f64,
    /// Of an entry of what attention or a feed-forward layer adds.
    pub residual: f64,
    /// Of all that one of these adds in the last block; in earlier ones it is lower, down to 0 in the first.
    pub path: f64,
}

/// What a training step leaves out of a batch's images, the first of which has number `first`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Dropout {
    /// How often.
    pub rates: DropoutRates,
    /// Seed of the stage.
    pub seed: u64,
    /// The step, below 2^32.
    pub step: u64,
    /// Number in the batch of the first image, at most 2^20.
    pub first: usize,
}

/// The same within a block.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockDropout {
    all: Dropout,
    /// Probability that a branch adds nothing.
    path: f64,
    /// The place of the attention; that of the feed-forward layer follows.
    place: u64,
}

impl Dropout {
    /// Embeddings (b, l, C) with some entries 0.
    pub fn of_embeddings<B: Backend>(&self, x: Variable<B>) -> Result<Variable<B>> {
        self.apply(x, 0, (self.rates.token, 0.0))
    }

    /// What is left out of a block of `depth`.
    pub fn of_block(&self, block: usize, depth: usize) -> BlockDropout {
        BlockDropout {
            all: *self,
            path: self.rates.path * block as f64 / depth.saturating_sub(1).max(1) as f64,
            place: 1 + 2 * block as u64,
        }
    }

    fn apply<B: Backend>(
        &self,
        x: Variable<B>,
        place: u64,
        rates: (f64, f64),
    ) -> Result<Variable<B>> {
        if rates == (0.0, 0.0) {
            return Ok(x);
        }
        let mut shape = x.shape(); // (b, l, C)
        if rates.0 == 0.0 {
            shape[1..].fill(1);
        }
        let factors = self.factors(place, (shape[0], shape[1..].iter().product()), rates);
        x.mul(&Variable::constant(
            B::of(x.value()).floats(&factors, &shape)?,
        ))
    }

    /// The factors at a place, so many images of so many each: 0, or what keeps the expected value. The rates are those of an
    /// entry and of an image.
    fn factors(
        &self,
        place: u64,
        (images, each): (usize, usize),
        (entry, image): (f64, f64),
    ) -> Vec<f32> {
        let kept = ((1.0 - entry) * (1.0 - image)).recip() as f32;
        let mut factors = vec![0.0; images * each];
        let own = factors.par_chunks_mut(each.max(1)).enumerate();
        own.for_each(|(i, own)| {
            let index = (self.step << 32) | (((self.first + i) as u64) << 12) | place;
            let mut drawn = Sequence::new(self.seed, Stream::Dropout, index);
            if drawn.uniform() >= image {
                drawn.keep_some(1.0 - entry, kept, own);
            }
        });
        factors
    }
}

impl BlockDropout {
    /// What the attention adds (b, l, C), with some of it left out.
    pub fn of_attention<B: Backend>(&self, y: Variable<B>) -> Result<Variable<B>> {
        self.of_branch(y, self.place)
    }

    /// The same of the feed-forward layer.
    pub fn of_feed_forward<B: Backend>(&self, y: Variable<B>) -> Result<Variable<B>> {
        self.of_branch(y, self.place + 1)
    }

    fn of_branch<B: Backend>(&self, y: Variable<B>, place: u64) -> Result<Variable<B>> {
        self.all
            .apply(y, place, (self.all.rates.residual, self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dropout(first: usize) -> Dropout {
        Dropout {
            rates: DropoutRates {
                token: 0.1,
                residual: 0.1,
                path: 0.3,
            },
            seed: 3,
            step: 7,
            first,
        }
    }

    fn is_dropped(image: &[f32]) -> bool {
        image.iter().all(|&x| x == 0.0)
    }

    #[test]
    fn entries_and_images_are_dropped_at_their_rates() {
        let factors = dropout(0).factors(1, (2000, 50), (0.1, 0.25));
        let kept = 1.0 / (0.9 * 0.75);
        assert!(factors.iter().all(|&x| x == 0.0 || (x - kept).abs() < 1e-6));
        let images: Vec<&[f32]> = factors.chunks_exact(50).collect();
        let dropped = images.iter().filter(|image| is_dropped(image)).count();
        assert!((dropped as f64 / 2000.0 - 0.25).abs() < 0.03, "{dropped}");
        let rest: Vec<f32> = images
            .iter()
            .filter(|image| !is_dropped(image))
            .flat_map(|image| image.iter().copied())
            .collect();
        let zeros = rest.iter().filter(|&&x| x == 0.0).count() as f64 / rest.len() as f64;
        assert!((zeros - 0.1).abs() < 0.01, "{zeros}");
        let mean = factors.iter().sum::<f32>() / factors.len() as f32;
        assert!((mean - 1.0).abs() < 0.05, "{mean}");
    }

    #[test]
    fn an_image_has_its_own_wherever_it_is_computed() {
        let all = dropout(0).factors(2, (5, 11), (0.5, 0.0));
        assert_eq!(all[22..], dropout(2).factors(2, (3, 11), (0.5, 0.0)));
        let other = |dropout: Dropout, place| dropout.factors(place, (5, 11), (0.5, 0.0));
        assert_ne!(all, other(dropout(0), 3));
        assert_ne!(all, other(dropout(1), 2));
        let step = Dropout {
            step: 8,
            ..dropout(0)
        };
        assert_ne!(all, other(step, 2));
    }

    #[test]
    fn branches_are_left_out_more_often_in_later_blocks() {
        let of = |block, depth| dropout(0).of_block(block, depth);
        let paths = [0, 1, 2].map(|block| of(block, 3).path);
        for (path, expected) in paths.iter().zip([0.0, 0.15, 0.3]) {
            assert!((path - expected).abs() < 1e-12, "{paths:?}");
        }
        assert_eq!(of(0, 1).path, 0.0);
        // No two places are the same.
        assert_eq!([of(0, 3).place, of(1, 3).place], [1, 3]);
    }
}
