//! The AR flow map in libtorch's own operations, for GPUs: `retort_engine::backend::flow` has the mathematics. In host
//! memory there is a kernel (`host.rs`).

use retort_engine::backend::FlowSolver;
use retort_engine::backend::flow;
use tch::{Kind, TchError, Tensor};

/// logits (n, k), -inf where excluded; noise (n, d); codebook (k, d) -> ids (n), all in f32.
pub(crate) fn flow_map(
    logits: &Tensor,
    noise: &Tensor,
    codes: &Tensor,
    solver: &FlowSolver,
) -> Result<Tensor, TchError> {
    let place = noise.device();
    let (n, d, kept) = (noise.size()[0], noise.size()[1], flow::ORDER as i64 + 1);
    let turned = codes.f_transpose(0, 1)?;
    let half_square = codes
        .f_square()?
        .f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?
        .f_mul_scalar_(0.5)?;
    let spread = spread(codes, &half_square)?;
    // s and the weights, which are integrals over s, scale with the inverse of the spread, so nothing has to leave the GPU.
    let steps = flow::steps(solver, 1.0);
    let count = steps.len() as i64;
    let points: Vec<f32> = steps.iter().map(|step| step.s as f32).collect();
    let points = Tensor::f_from_slice(&points)?.f_to(place)?.f_div(&spread)?;
    let squares = points.f_square()?;
    let moves: Vec<f32> = flow::moves(&steps).flat_map(|both| both.concat()).collect();
    let moves = Tensor::f_from_slice(&moves)?
        .f_view([count, 2, kept])?
        .f_to(place)?
        .f_div(&spread)?;
    // A ring buffer of slopes: each replaces the oldest, so that a step is one small product from z and all slopes to the new
    // z and the next evaluation point.
    let slopes = Tensor::f_zeros([kept, n * d], (Kind::Float, place))?;
    let mut z = noise.f_reshape([1, n * d])?;
    let mut ahead = noise.shallow_clone();
    let mut weights = logits.shallow_clone();
    for i in 0..count {
        // log p + s <z, c> - s^2 |c|^2 / 2
        weights = logits
            .f_sub(&half_square.f_mul(&squares.f_get(i)?)?)?
            .f_addmm_(&ahead.f_mul(&points.f_get(i)?)?, &turned)?;
        let mut slope = slopes.f_get(i % kept)?.f_view([n, d])?;
        slope.f_copy_(&weights.f_softmax(-1, Kind::Float)?.f_mm(codes)?)?;
        let both = z
            .f_expand([2, n * d], false)?
            .f_addmm(&moves.f_get(i)?, &slopes)?;
        z = both.f_narrow(0, 0, 1)?;
        ahead = both.f_get(1)?.f_view([n, d])?;
    }
    weights.f_argmax(-1, false)
}

/// [`flow::spread`] of codes (k, d), given half of |c|^2, as a tensor on the codes' device.
fn spread(codes: &Tensor, half_square: &Tensor) -> Result<Tensor, TchError> {
    let d = codes.size()[1] as f64;
    let mean_square = half_square.f_mean(Kind::Double)?.f_mul_scalar(2.0 / d)?;
    let centre = codes.f_mean_dim([0i64].as_slice(), false, Kind::Double)?;
    let square_of_mean = centre.f_square()?.f_sum(Kind::Double)?.f_div_scalar_(d)?;
    let spread = mean_square.f_sub(&square_of_mean)?.f_sqrt()?;
    let least = mean_square.f_sqrt()?.f_mul_scalar(1e-4)?;
    let some = spread
        .f_gt_tensor(&least)?
        .f_logical_and(&spread.f_isfinite()?)?;
    spread
        .f_where_self(&some, &spread.f_ones_like()?)?
        .f_to_kind(Kind::Float)
}

#[cfg(test)]
mod tests {
    use retort_engine::random::noise;

    use super::*;
    use crate::host;

    fn tensor(seed: u64, rows: usize, columns: usize, scale: f32) -> Tensor {
        let data: Vec<f32> = noise(seed, 0, rows, columns)
            .iter()
            .map(|x| scale * x)
            .collect();
        Tensor::from_slice(&data).view([rows as i64, columns as i64])
    }

    /// Nothing in it is specific to GPUs, so the test runs on the CPU.
    #[test]
    fn it_chooses_what_the_kernel_of_the_host_chooses() {
        for (n, k, d, scale) in [(200, 512, 8, 0.35), (100, 256, 32, 0.5), (50, 37, 5, 1.5)] {
            let [logits, noise, codes] = [
                tensor(1, n, k, 2.0),
                tensor(2, n, d, 1.0),
                tensor(3, k, d, scale),
            ];
            let solver = FlowSolver::default();
            let ids = flow_map(&logits, &noise, &codes, &solver).expect("ids");
            let kernel = host::flow_map(&logits, &noise, &codes, &solver);
            let kernel = kernel.expect("in host memory").expect("ids");
            let others = ids.ne_tensor(&kernel).sum(Kind::Int64).int64_value(&[]);
            assert_eq!(others, 0, "{n} tokens of {k} codes with {d} coordinates");
        }
    }

    #[test]
    fn equal_codes_have_a_spread() {
        let spread = |codes: &Tensor| {
            let half = codes
                .square()
                .sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
                * 0.5;
            super::spread(codes, &half)
                .expect("a number")
                .double_value(&[])
        };
        assert_eq!(
            spread(&Tensor::full([4, 3], 2.0, tch::kind::FLOAT_CPU)),
            1.0
        );
        assert_eq!(
            spread(&Tensor::from_slice(&[2.0f32, -2.0]).view([2, 1])),
            2.0
        );
    }
}
