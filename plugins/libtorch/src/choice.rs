//! Choosing codes from rows of logits on their device; `retort_engine::backend::choice` is the definition.

use retort_engine::backend::Truncation;
use tch::{Kind, TchError, Tensor};

/// Elements processed together; intermediate values take eight bytes each.
const TOGETHER: i64 = 1 << 26;

/// logits (n, k) -> logits over the temperature, -inf where a code is excluded.
pub(crate) fn truncate(logits: &Tensor, truncation: &Truncation) -> Result<Tensor, TchError> {
    let Truncation {
        temperature,
        top_k,
        top_p,
    } = *truncation;
    let place = logits.device();
    // As a tensor: given a number, libtorch would multiply by its inverse.
    let scaled = logits.f_div(&Tensor::f_full([1], temperature, (Kind::Float, place))?)?;
    let k = scaled.size()[1];
    let keep = match top_k as i64 {
        0 => k,
        top_k => top_k.min(k),
    };
    if keep == k && top_p >= 1.0 {
        return Ok(scaled);
    }
    by_rows(&scaled, |rows, _| {
        let (sorted, order) = rows.f_sort_stable(true, -1, true)?;
        // Codes equal to the last of the most probable ones stay too.
        let last = sorted.f_narrow(1, keep - 1, 1)?;
        let mut left = sorted.f_masked_fill(&sorted.f_lt_tensor(&last)?, f64::NEG_INFINITY)?;
        if top_p < 1.0 {
            let sums = weights(&left, &left.f_narrow(1, 0, 1)?)?.f_cumsum(1, Kind::Double)?;
            let enough = sums.f_narrow(1, k - 1, 1)?.f_mul_scalar(top_p)?;
            // A code is excluded if the more probable ones suffice.
            let none = enough.f_zeros_like()?;
            let before = Tensor::f_cat(&[&none, &sums.f_narrow(1, 0, k - 1)?], 1)?;
            left = left.f_masked_fill_(&before.f_gt_tensor(&enough)?, f64::NEG_INFINITY)?;
        }
        rows.f_empty_like()?
            .f_fill_(f64::NEG_INFINITY)?
            .f_scatter_(1, &order, &left)
    })
}

/// logits (n, k), numbers in [0, 1) (n) -> ids (n).
pub(crate) fn categorical(logits: &Tensor, uniforms: &[f64]) -> Result<Tensor, TchError> {
    let uniforms = Tensor::f_from_slice(uniforms)?.f_to_device(logits.device())?;
    let k = logits.size()[1];
    by_rows(logits, |rows, first| {
        let weights = weights(rows, &rows.f_amax([1i64].as_slice(), true)?)?;
        let sums = weights.f_cumsum(1, Kind::Double)?;
        let passed = uniforms
            .f_narrow(0, first, rows.size()[0])?
            .f_unsqueeze(1)?
            .f_mul(&sums.f_narrow(1, k - 1, 1)?)?;
        let ids =
            sums.f_le_tensor(&passed)?
                .f_sum_dim_intlist([1i64].as_slice(), false, Kind::Int64)?;
        // If rounding makes a number exceed all sums, take the last possible code.
        let places = Tensor::f_arange(k, (Kind::Int64, logits.device()))?;
        let last = weights
            .f_gt_tensor(&Tensor::from(0.0))?
            .f_mul(&places)?
            .f_amax([1i64].as_slice(), false)?;
        ids.f_minimum(&last)
    })
}

/// exp(logits - top) in f64; the difference is taken in f32, as on the host.
fn weights(logits: &Tensor, top: &Tensor) -> Result<Tensor, TchError> {
    logits.f_sub(top)?.f_to_kind(Kind::Double)?.f_exp_()
}

/// Applies a function to some rows at a time, with the number of the first.
fn by_rows(
    x: &Tensor,
    of: impl Fn(&Tensor, i64) -> Result<Tensor, TchError>,
) -> Result<Tensor, TchError> {
    let (n, k) = (x.size()[0], x.size()[1]);
    let some = (TOGETHER / k.max(1)).clamp(1, n.max(1));
    if some >= n {
        return of(x, 0);
    }
    let parts: Result<Vec<_>, _> = (0..n)
        .step_by(some as usize)
        .map(|first| of(&x.f_narrow(0, first, some.min(n - first))?, first))
        .collect();
    Tensor::f_cat(&parts?, 0)
}
