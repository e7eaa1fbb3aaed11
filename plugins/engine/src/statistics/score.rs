//! The inception score: Salimans et al. 2016, arXiv 1606.03498, section 4.
//!
//! In: logits (n, classes), row after row. Out: its mean and deviation over splits.

use super::{StatisticsError, rows};

/// Mean and spread of the inception score over its splits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InceptionScore {
    /// Mean over the splits, from 1 to the number of classes.
    pub mean: f64,
    /// Standard deviation over the splits (divisor: number of splits).
    pub deviation: f64,
}

/// Whether the rows are sorted by class and have several classes, so that consecutive parts have few classes each.
pub fn is_sorted_by_class(labels: &[u32]) -> bool {
    let runs = labels.chunk_by(|a, b| a == b).count();
    let mut classes = labels.to_vec();
    classes.sort_unstable();
    classes.dedup();
    (2..labels.len()).contains(&runs) && runs == classes.len()
}

/// Inception score of logits (n, classes), taken in `splits` consecutive parts.
pub fn inception_score(
    logits: &[f32],
    classes: usize,
    splits: usize,
) -> Result<InceptionScore, StatisticsError> {
    let count = rows("logits", logits, classes)?;
    let mut running = RunningScore::new(count, classes, splits)?;
    running.add(logits)?;
    running.finish()
}

/// The inception score of logits that arrive in parts; only sums are kept: the score of a split is exp(mean of sum p ln p -
/// sum q ln q), q the mean of its probabilities p.
#[derive(Debug, Clone)]
pub struct RunningScore {
    count: usize,
    classes: usize,
    /// Rows so far.
    seen: usize,
    /// The position at which each row counts for the splits; its own position if None.
    places: Option<Vec<u32>>,
    /// Per split: its rows so far, the sum of p ln p, and the sums of p.
    splits: Vec<(usize, f64, Vec<f64>)>,
}

impl RunningScore {
    /// Of `count` rows to come.
    pub fn new(count: usize, classes: usize, splits: usize) -> Result<Self, StatisticsError> {
        if splits == 0 || count < splits {
            return Err(StatisticsError::TooFew {
                what: "inception score",
                needed: splits.max(1),
                found: count,
            });
        }
        Ok(Self {
            count,
            classes,
            seen: 0,
            places: None,
            splits: vec![(0, 0.0, vec![0.0; classes]); splits],
        })
    }

    /// The same with rows assigned to splits in another order: each row has a unique position below their count.
    pub fn dealt(self, places: Vec<u32>) -> Self {
        Self {
            places: Some(places),
            ..self
        }
    }

    /// Adds logits (n, classes).
    pub fn add(&mut self, logits: &[f32]) -> Result<(), StatisticsError> {
        rows("logits", logits, self.classes)?;
        for row in logits.chunks_exact(self.classes) {
            // Split k begins at position k count / splits, rounded down.
            let place = match &self.places {
                Some(places) => places.get(self.seen).map_or(self.count, |&at| at as usize),
                None => self.seen,
            };
            let split = ((place + 1) * self.splits.len() - 1) / self.count;
            let Some((rows, entropy, sums)) = self.splits.get_mut(split) else {
                break; // more rows than announced: `finish` says so
            };
            let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let total: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
            for (sum, &x) in sums.iter_mut().zip(row) {
                let log = f64::from(x) - max - total.ln();
                *sum += log.exp();
                *entropy += log.exp() * log;
            }
            *rows += 1;
            self.seen += 1;
        }
        Ok(())
    }

    /// The score of all rows.
    pub fn finish(self) -> Result<InceptionScore, StatisticsError> {
        if self.seen != self.count {
            return Err(StatisticsError::Shape {
                what: "logits",
                expected: format!("{} rows", self.count),
                found: self.seen,
            });
        }
        let scores: Vec<f64> = self
            .splits
            .iter()
            .map(|(rows, entropy, sums)| {
                let n = *rows as f64;
                let means = sums.iter().map(|sum| sum / n).filter(|q| *q > 0.0);
                (entropy / n - means.map(|q| q * q.ln()).sum::<f64>()).exp()
            })
            .collect();
        let n = scores.len() as f64;
        let mean = scores.iter().sum::<f64>() / n;
        let variance = scores
            .iter()
            .map(|score| (score - mean).powi(2))
            .sum::<f64>()
            / n;
        Ok(InceptionScore {
            mean,
            deviation: variance.sqrt(),
        })
    }
}
