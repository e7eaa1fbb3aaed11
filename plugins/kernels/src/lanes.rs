//! Loops that the compiler vectorises, and their functions.
//!
//! A kernel is written once, as plain loops over f32; `.cargo/config.toml` has them compiled for AVX2 and FMA on x86-64, and
//! [`widest`] for AVX-512 too.
//! Sums run in [`LANES`] fixed lanes and are folded in a fixed order, and products are fused multiply-adds everywhere,
//! so a result depends neither on the width of the vectors nor on the number of threads.

/// Partial sums kept side by side: two AVX2 registers.
pub const LANES: usize = 16;

/// Runs `f` with the widest vectors that the processor has. Only what is inlined into `f` is compiled for these, so `f` and
/// its callees are `#[inline(always)]`.
#[inline(always)]
pub fn widest<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn in_512_bits<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        if has_512_bits() {
            // SAFETY: the processor has these instructions.
            return unsafe { in_512_bits(f) };
        }
    }
    f()
}

/// Whether the processor has the instructions of [`widest`] for 512 bits.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn has_512_bits() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512dq")
        && std::arch::is_x86_feature_detected!("avx512vl")
}

/// The sum of `f(x)`.
#[inline(always)]
pub fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for i in 0..LANES {
            lanes[i] += f(x[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    fold(lanes)
}

/// The inner product.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (xs, x_rest) = x.as_chunks::<LANES>();
    let (ys, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in xs.iter().zip(ys) {
        for i in 0..LANES {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane = x.mul_add(y, *lane);
    }
    fold(lanes)
}

/// The maximum; -inf without elements.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for i in 0..LANES {
            lanes[i] = greater(lanes[i], x[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = greater(*lane, x);
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, greater)
}

/// y += a x
#[inline(always)]
pub fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = a.mul_add(x, *y);
    }
}

/// The larger of two, as one instruction (`f32::max` needs three because of NaN).
#[inline(always)]
pub fn greater(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// The sum of the lanes, halves onto halves.
#[inline(always)]
pub fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// e^x within 2 units in the last place; 0 below e^-86.6 = 2.4e-38.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    let y = if x > 89.0 { 89.0 } else { x };
    let y = if y < -86.6 { -86.6 } else { y };
    let t = y.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = t - SHIFT;
    // ln 2 in two parts, the first short enough for an exact product.
    let r = n.mul_add(-0.693_359_4, y);
    let r = n.mul_add(2.121_944_4e-4, r);
    // The series of e^r; |r| <= ln(2)/2 leaves 5e-9 after eight terms.
    let mut p = 1.0 / 5040.0;
    p = f32::mul_add(p, r, 1.0 / 720.0);
    p = f32::mul_add(p, r, 1.0 / 120.0);
    p = f32::mul_add(p, r, 1.0 / 24.0);
    p = f32::mul_add(p, r, 1.0 / 6.0);
    p = f32::mul_add(p, r, 0.5);
    p = f32::mul_add(p, r, 1.0);
    p = f32::mul_add(p, r, 1.0);
    // 2^(n-1), then doubled: n = 128 has no f32 of its own.
    let scale = f32::from_bits(t.to_bits().wrapping_add(126) << 23);
    let e = p * scale * 2.0;
    if x < -86.6 { 0.0 } else { e }
}

/// 1/(1+e^-x)
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The normal distribution's cumulative function and density (Abramowitz and Stegun 7.1.26, error 1.5e-7).
#[inline(always)]
pub fn normal(x: f32) -> (f32, f32) {
    let bell = exp(-0.5 * x * x);
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / 0.327_591_1f32.mul_add(z, 1.0);
    let mut p = 1.061_405_4;
    p = f32::mul_add(p, t, -1.453_152);
    p = f32::mul_add(p, t, 1.421_413_7);
    p = f32::mul_add(p, t, -0.284_496_74);
    p = f32::mul_add(p, t, 0.254_829_6);
    let tail = 0.5 * p * t * bell;
    let below = if x < 0.0 { tail } else { 1.0 - tail };
    (below, bell * 0.398_942_3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_two_units() {
        for i in -860_000..=880_000 {
            let x = i as f32 * 1e-4;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (got / want - 1.0).abs() < 2.4e-7,
                "e^{x}: {got}, not {want}"
            );
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_see_every_element() {
        for n in 0..70 {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let want = (n * n.max(1) - n) as f32 / 2.0;
            assert_eq!(sum(&x, |x| x), want);
            assert_eq!(dot(&x, &vec![1.0; n]), want);
            if n > 0 {
                assert_eq!(max(&x), (n - 1) as f32);
            }
        }
    }
}
