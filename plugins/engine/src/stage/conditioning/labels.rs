//! Labels of samples: the class of each, or the number of its caption.
//!
//! They are computed for some samples at a time. Memory does not grow with their number.

use std::ops::Range;

use super::Rule;
use crate::random::{Sequence, Stream};

/// How labels follow from a sample's index.
#[derive(Debug, Clone)]
pub enum SampleLabels {
    /// By a rule, with a seed and the number of classes.
    Rule(Rule, u64, usize),
    /// In turn: of n labels, sample i has the one in place i mod n.
    Turn(Vec<u32>),
    /// In the proportions of labels, for this many samples: of n labels, sample i has the one in place i n / count.
    Proportions(Vec<u32>, u64),
}

impl SampleLabels {
    /// In turn, of so many.
    pub fn numbers(count: usize) -> Self {
        Self::Rule(Rule::Balanced, 0, count)
    }

    /// `count` samples in the proportions of labels.
    pub(super) fn proportions(labels: Vec<u32>, count: u64) -> Self {
        match labels.len() as u64 {
            // Only the labels that a sample has.
            all if count < all => {
                let own = (0..count).map(|i| labels[place(i, labels.len(), count)]);
                Self::Turn(own.collect())
            }
            _ => Self::Proportions(labels, count),
        }
    }

    /// The given labels, of which each sample has one; none, if a rule gives them.
    pub(super) fn given(&self) -> &[u32] {
        match self {
            Self::Rule(..) => &[],
            Self::Turn(labels) | Self::Proportions(labels, _) => labels,
        }
    }

    /// The labels of some samples.
    pub fn of(&self, samples: Range<u64>) -> Vec<u32> {
        samples.map(|sample| self.label(sample)).collect()
    }

    fn label(&self, sample: u64) -> u32 {
        match self {
            Self::Rule(Rule::Balanced, _, classes) => (sample % *classes as u64) as u32,
            Self::Rule(Rule::Drawn, seed, classes) => {
                Sequence::new(*seed, Stream::Class, sample).below(*classes) as u32
            }
            Self::Turn(labels) => labels[(sample % labels.len() as u64) as usize],
            Self::Proportions(labels, count) => labels[place(sample, labels.len(), *count)],
        }
    }
}

/// The place of a sample's label among all, if `count` samples have them in their proportions.
fn place(sample: u64, all: usize, count: u64) -> usize {
    (u128::from(sample) * all as u128 / u128::from(count)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_classes_are_even_and_a_function_of_seed_and_sample() {
        let rule: Rule = serde_json::from_str("\"drawn\"").unwrap();
        let labels = |rule, seed, count| SampleLabels::Rule(rule, seed, 10).of(0..count);
        let drawn = labels(rule, 7, 10_000);
        // A sample's class depends neither on the number of samples nor on the start of the range.
        assert_eq!(labels(rule, 7, 300), drawn[..300]);
        assert_ne!(labels(rule, 8, 300), drawn[..300]);
        assert_ne!(labels(Rule::Balanced, 7, 300), drawn[..300]);
        // 1000 of each, within five standard deviations of 30; exactly equal numbers would not be random.
        let mut counts = [0; 10];
        drawn.iter().for_each(|&class| counts[class as usize] += 1);
        assert!(
            counts.iter().all(|n| (850..=1150).contains(n)),
            "{counts:?}"
        );
        assert!(counts.iter().any(|&n| n != 1000), "{counts:?}");
        // Their order has no pattern.
        let pairs = drawn.windows(2).filter(|pair| pair[0] == pair[1]).count();
        assert!((850..=1150).contains(&pairs), "{pairs}");
        assert_eq!(labels(Rule::Balanced, 7, 12)[8..], [8, 9, 0, 1]);
    }

    #[test]
    fn the_last_of_very_many_samples_are_computed_alone() {
        let count = 5_000_000_000_000;
        let check = |labels: SampleLabels, last: [u32; 3]| {
            assert_eq!(labels.of(count - 3..count), last, "{labels:?}");
        };
        check(SampleLabels::numbers(7), [2, 3, 4]);
        check(SampleLabels::Turn(vec![5, 9]), [9, 5, 9]);
        check(SampleLabels::proportions(vec![5, 9], count), [9, 9, 9]);
        let drawn = SampleLabels::Rule(Rule::Drawn, 7, 10);
        assert_eq!(
            drawn.of(count - 3..count),
            drawn.of(count - 3..count + 1)[..3]
        );
    }

    #[test]
    fn proportions_are_those_of_the_images() {
        let images = vec![0, 0, 1, 3];
        let check = |count, expected: &[u32], given: &[u32]| {
            let labels = SampleLabels::proportions(images.clone(), count);
            assert_eq!(labels.of(0..count), expected);
            assert_eq!(labels.given(), given);
        };
        check(8, &[0, 0, 0, 0, 1, 1, 3, 3], &images);
        check(4, &images, &images);
        // An image that stands for no sample need not be of a known class.
        check(2, &[0, 1], &[0, 1]);
    }
}
