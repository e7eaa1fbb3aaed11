//! X_t, and the final sequence that a student makes of it (Distilled Decoding, arXiv 2412.17153, section 3.3): the one
//! function with which training and sampling assemble a prediction.
//!
//! ```text
//! X_t       tokens' codebook vectors where a sample holds them, noise after them
//! sequence  X_t's own tokens where it holds them; of the others the argmax codes before `split`, the continuous head after it
//! ```
//!
//! b samples, L tokens, codes of dimension D. Codes and known tokens carry no gradient; the head's vectors do.

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tape::Variable;

/// X_t of some samples.
#[derive(Debug, Clone)]
pub struct TrajectoryState<B: Backend> {
    /// Codebook vectors of the known tokens, noise after them: (b, L, D).
    pub x: B::Tensor,
    /// How many leading tokens of each sample are known (b).
    pub known: Vec<usize>,
}

/// The source of a position of the final sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenSource {
    Known,
    Codes,
    Head,
}

impl<B: Backend> TrajectoryState<B> {
    /// 1 where it holds a token, 0 where it holds noise: (b, L).
    pub fn kinds(&self) -> Result<B::Tensor> {
        let (b, l) = (self.known.len(), B::shape(&self.x)[1]);
        let kinds = self
            .known
            .iter()
            .flat_map(|&k| (0..l).map(move |i| u32::from(i < k)));
        B::of(&self.x).indices(&kinds.collect::<Vec<_>>(), &[b, l])
    }

    /// The final sequence (b, L, D), from logits (b, L, K) and the continuous head's vectors (b, L, D), which are computed
    /// only if a position uses them. `boundary` is the number of tokens before `split`.
    pub fn finish(
        &self,
        logits: &B::Tensor,
        head: impl FnOnce() -> Result<Variable<B>>,
        codebook: &B::Tensor,
        boundary: usize,
    ) -> Result<Variable<B>> {
        let shape = B::shape(&self.x);
        let (l, d) = (shape[1], shape[2]);
        let source_of = |known: usize, i: usize| match i {
            i if i < known => TokenSource::Known,
            i if i < boundary => TokenSource::Codes,
            _ => TokenSource::Head,
        };
        let sources: Vec<TokenSource> = self
            .known
            .iter()
            .flat_map(|&known| (0..l).map(move |i| source_of(known, i)))
            .collect();
        let mut used = Vec::new();
        let mut uses = |source, vectors: Variable<B>| {
            used.push((source, vectors.reshape(&[sources.len(), d])?));
            Ok::<_, Error>(())
        };
        if sources.contains(&TokenSource::Known) {
            uses(TokenSource::Known, Variable::constant(self.x.clone()))?;
        }
        if sources.contains(&TokenSource::Codes) {
            let codes = B::rows(codebook, &B::argmax_last(logits)?)?;
            uses(TokenSource::Codes, Variable::constant(codes))?;
        }
        if sources.contains(&TokenSource::Head) {
            uses(TokenSource::Head, head()?)?;
        }
        if let [(_, whole)] = &used[..] {
            return whole.reshape(&shape);
        }
        // Each position takes its row from its source.
        let rows = sources.iter().enumerate().map(|(at, source)| {
            let place = used.iter().take_while(|(other, _)| other != source).count();
            (place * sources.len() + at) as u32
        });
        let rows: Vec<u32> = rows.collect();
        let table = Variable::cat(&used.iter().map(|(_, v)| v).collect::<Vec<_>>(), 0)?;
        table.rows(&B::of(&self.x).indices(&rows, &shape[..2])?)
    }
}
