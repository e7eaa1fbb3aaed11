//! Steps of optimisers, in place.

use crate::backend::tensor::{Binary, Tensors, Unary};
use crate::error::Result;

/// One AdamW step's numbers (Loshchilov and Hutter 2019, arXiv 1711.05101), bias corrections already computed.
#[derive(Debug, Clone, Copy)]
pub struct AdamwStep {
    /// Learning rate at this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// 1 - beta1^step
    pub correction1: f64,
    /// 1 - beta2^step
    pub correction2: f64,
    /// The gradient is multiplied by this first (clipping by global norm).
    pub grad_scale: f64,
}

/// Updates of parameters and of their averages, in one pass if the backend can.
pub trait Optimiser: Tensors {
    /// One AdamW step on a parameter and its moments.
    fn adamw_(
        p: &Self::Tensor,
        m: &Self::Tensor,
        v: &Self::Tensor,
        g: &Self::Tensor,
        s: &AdamwStep,
    ) -> Result<()> {
        let g = Self::affine(g, s.grad_scale, 0.0)?;
        let m1 = Self::binary(
            &Self::affine(m, s.beta1, 0.0)?,
            &Self::affine(&g, 1.0 - s.beta1, 0.0)?,
            Binary::Add,
        )?;
        let g2 = Self::unary(&g, Unary::Square)?;
        let v1 = Self::binary(
            &Self::affine(v, s.beta2, 0.0)?,
            &Self::affine(&g2, 1.0 - s.beta2, 0.0)?,
            Binary::Add,
        )?;
        let denominator = Self::affine(
            &Self::unary(&v1, Unary::Sqrt)?,
            s.correction2.sqrt().recip(),
            s.eps,
        )?;
        let update = Self::affine(
            &Self::binary(&m1, &denominator, Binary::Div)?,
            s.lr / s.correction1,
            0.0,
        )?;
        let p1 = Self::binary(
            &Self::affine(p, 1.0 - s.lr * s.weight_decay, 0.0)?,
            &update,
            Binary::Sub,
        )?;
        Self::assign_(m, &m1)?;
        Self::assign_(v, &v1)?;
        Self::assign_(p, &p1)
    }

    /// [`Optimiser::adamw_`], then [`Optimiser::ema_`] of the parameter.
    fn adamw_averaged_(
        p: &Self::Tensor,
        m: &Self::Tensor,
        v: &Self::Tensor,
        g: &Self::Tensor,
        s: &AdamwStep,
        average: &Self::Tensor,
        decay: f64,
    ) -> Result<()> {
        Self::adamw_(p, m, v, g, s)?;
        Self::ema_(average, p, decay)
    }

    /// The sum of the squares of all elements, for the norm of a gradient: (1).
    fn sum_of_squares(x: &Self::Tensor) -> Result<Self::Tensor> {
        let dims: Vec<usize> = (0..Self::shape(x).len()).collect();
        Self::reshape(&Self::sum(&Self::unary(x, Unary::Square)?, &dims)?, &[1])
    }

    /// average <- decay * average + (1 - decay) * x
    fn ema_(average: &Self::Tensor, x: &Self::Tensor, decay: f64) -> Result<()> {
        let a = Self::affine(average, decay, 0.0)?;
        let b = Self::affine(x, 1.0 - decay, 0.0)?;
        Self::assign_(average, &Self::binary(&a, &b, Binary::Add)?)
    }
}
