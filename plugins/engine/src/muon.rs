//! Muon for the matrices inside transformer blocks (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural
//! networks"): the gradient's momentum, moved towards the nearest matrix with orthonormal rows or columns by five
//! Newton-Schulz steps. Everything else (embeddings, heads, norms) stays with AdamW.
//!
//! ```text
//! m <- beta m + g;   u = g + beta m;   X = u / |u|;   five times: A = X X^T, X <- a X + (b A + c A^2) X
//! p <- (1 - lr decay) p - lr sqrt(max(1, rows / columns)) X
//! ```

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Binary};
use crate::error::Result;
use crate::tape::scalar;

/// Options of Muon.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Muon {
    /// Peak learning rate of the block matrices; it rises and falls with that of AdamW.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate: f64,
    /// Decay of the momentum.
    #[schemars(range(min = 0, max = 1))]
    pub momentum: f64,
}

impl Default for Muon {
    fn default() -> Self {
        Self {
            learning_rate: 0.02,
            momentum: 0.95,
        }
    }
}

/// Coefficients of the quintic that drives singular values towards 1 in few steps.
const QUINTIC: (f64, f64, f64) = (3.4445, -4.775, 2.0315);
const ITERATIONS: usize = 5;

/// Whether Muon updates a parameter: a matrix inside a block.
pub fn applies(name: &str, shape: &[usize]) -> bool {
    shape.len() == 2 && (name.starts_with("layers.") || name.starts_with("blocks."))
}

/// One step on a matrix and its momentum, at learning rate `lr` with decoupled weight decay. Packed projections of
/// queries, keys and values are three matrices.
pub fn step<B: Backend>(
    (name, p, m): (&str, &B::Tensor, &B::Tensor),
    g: &B::Tensor,
    options: &Muon,
    lr: f64,
    weight_decay: f64,
    grad_scale: f64,
) -> Result<()> {
    let g = B::affine(g, grad_scale, 0.0)?;
    let add = |a: &B::Tensor, b: &B::Tensor| B::binary(a, b, Binary::Add);
    let momentum = add(&B::affine(m, options.momentum, 0.0)?, &g)?;
    let update = add(&g, &B::affine(&momentum, options.momentum, 0.0)?)?;
    B::assign_(m, &momentum)?;
    let shape = B::shape(p);
    let parts = if name.contains("qkv") { 3 } else { 1 };
    let rows = shape[0] / parts;
    let scale = (rows as f64 / shape[1] as f64).max(1.0).sqrt();
    let pieces = (0..parts)
        .map(|i| orthogonal::<B>(&B::narrow(&update, 0, i * rows, rows)?))
        .collect::<Result<Vec<_>>>()?;
    let direction = B::cat(&pieces.iter().collect::<Vec<_>>(), 0)?;
    let kept = B::affine(p, 1.0 - lr * weight_decay, 0.0)?;
    B::assign_(
        p,
        &B::binary(&kept, &B::affine(&direction, lr * scale, 0.0)?, Binary::Sub)?,
    )
}

/// A matrix with approximately the singular vectors of x and singular values near 1.
fn orthogonal<B: Backend>(x: &B::Tensor) -> Result<B::Tensor> {
    let shape = B::shape(x);
    let tall = shape[0] > shape[1];
    let norm = scalar::<B>(&B::sum_of_squares(x)?)?.sqrt();
    let mut x = B::affine(x, 1.0 / (norm + 1e-7), 0.0)?;
    if tall {
        x = B::permute(&x, &[1, 0])?;
    }
    let (a, b, c) = QUINTIC;
    for _ in 0..ITERATIONS {
        let square = B::matmul(&x, &x, false, true)?;
        let fourth = B::affine(&B::matmul(&square, &square, false, false)?, c, 0.0)?;
        let inner = B::binary(&B::affine(&square, b, 0.0)?, &fourth, Binary::Add)?;
        x = B::binary(
            &B::affine(&x, a, 0.0)?,
            &B::matmul(&inner, &x, false, false)?,
            Binary::Add,
        )?;
    }
    if tall { B::permute(&x, &[1, 0]) } else { Ok(x) }
}
