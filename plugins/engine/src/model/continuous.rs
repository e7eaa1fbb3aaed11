//! The student's continuous head (Distilled Decoding, arXiv 2412.17153): codebook vectors from the stack's output, by a
//! layer norm without affine part, modulated by the condition's embedding, and a linear map. The same in all families.

use crate::backend::Backend;
use crate::error::Result;
use crate::model::Prediction;
use crate::tape::Variable;
use crate::weights::{Init, Loader};

const EPS: f64 = 1e-6;

/// Prefix of the names of the parameters that only the continuous head uses.
pub const CONTINUOUS_HEAD: &str = "final_layer_conti.";

/// The head: (b, l, C) -> (b, l, D).
pub(super) struct Continuous<B: Backend> {
    /// Rows: shift, scale.
    scale_shift: Variable<B>,
    weight: Variable<B>,
    bias: Variable<B>,
}

impl<B: Backend> Continuous<B> {
    /// Loads the parameters of a head from width C to D, whose matrix is drawn with the family's standard deviation.
    pub(super) fn load(
        loader: &mut Loader<B>,
        width: usize,
        dim: usize,
        deviation: f32,
    ) -> Result<Self> {
        let inner = (width as f32).sqrt().recip();
        let name = |part: &str| format!("{CONTINUOUS_HEAD}{part}");
        let (table, matrix) = (name("scale_shift_table"), name("linear.weight"));
        Ok(Self {
            scale_shift: loader.get(&table, &[2, width], Init::Normal(inner))?,
            weight: loader.factor(&matrix, &[dim, width], Init::Normal(deviation))?,
            bias: loader.get(&name("linear.bias"), &[dim], Init::Constant(0.0))?,
        })
    }

    /// Codebook vectors (b, L, D): LN(h) (1 + scale + c) + shift + c with c the condition's embedding, then linear. The
    /// condition's positions are dropped.
    pub(super) fn forward(&self, prediction: &Prediction<B>) -> Result<Variable<B>> {
        let l = prediction.logits.shape()[1];
        let front = prediction.hidden.shape()[1] - l;
        let h = prediction.hidden.narrow(1, front, l)?;
        let row = |i| self.scale_shift.narrow(0, i, 1)?.add(&prediction.condition); // (b, 1, C)
        let (shift, scale) = (row(0)?, row(1)?);
        h.modulated_norm(&scale.affine(1.0, 1.0)?, &shift, EPS)?
            .linear(&self.weight, Some(&self.bias))
    }
}
