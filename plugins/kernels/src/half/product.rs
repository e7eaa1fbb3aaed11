//! Matrix products.

use std::mem::MaybeUninit;

use super::{BLOCK, Line, Packed, Side, Unit};
use crate::Pool;

/// What a product is added to.
#[derive(Debug, Clone, Copy)]
pub enum Start<'a> {
    /// Nothing.
    Zero,
    /// One element for each column.
    Bias(&'a [f32]),
    /// What the result holds.
    Result,
}

/// Blocks of a task, down and across: their operands stay in the second-level cache.
const TASK: [usize; 2] = [4, 8];

/// c (m, n), its rows `c_row` apart, becomes a (m, k) times b (k, n) plus `start`.
///
/// # Panics
/// The operands do not fit each other, c is shorter than the sizes say, or the processor lacks the unit.
pub fn product(
    unit: Unit,
    pool: &impl Pool,
    (c, c_row): (&mut [f32], usize),
    a: &Packed,
    b: &Packed,
    start: Start<'_>,
) {
    let (m, n) = (a.outer(), b.outer());
    let biased = match start {
        Start::Bias(bias) => bias.len() >= n,
        _ => true,
    };
    let last = (m - 1).saturating_mul(c_row).saturating_add(n);
    assert!(
        [a.side(), b.side()] == [Side::Left, Side::Right]
            && a.inner() == b.inner()
            && biased
            && n <= c_row
            && last <= c.len()
            && unit.exists(),
        "a product beyond its operands"
    );
    let whole = Whole {
        unit,
        at: c.as_mut_ptr(),
        row: c_row,
        sizes: [m, n],
        start,
    };
    let whole = &whole;
    let [high, wide] = [m, n].map(|size| size.div_ceil(BLOCK));
    let [down, across] = [high.div_ceil(TASK[0]), wide.div_ceil(TASK[1])];
    pool.each(down * across, &|task: usize| {
        let (i, j) = (task / across * TASK[0], task % across * TASK[1]);
        #[cfg(target_arch = "x86_64")]
        let _tiles = (unit == Unit::Tiles).then(super::amx::Tiles::new);
        for i in i..(i + TASK[0]).min(high) {
            for j in j..(j + TASK[1]).min(wide) {
                // SAFETY: the block begins inside the result, and no other task writes it; both operands have as many steps.
                unsafe { whole.block([i, j], a.block(i), b.block(j), a.steps()) };
            }
        }
    });
}

/// The result of a product, which several tasks write.
struct Whole<'a> {
    unit: Unit,
    at: *mut f32,
    row: usize,
    sizes: [usize; 2],
    start: Start<'a>,
}

// SAFETY: each task writes blocks of its own.
unsafe impl Sync for Whole<'_> {}

impl Whole<'_> {
    /// Computes a block, given its tiles of both operands.
    ///
    /// # Safety
    /// The block begins inside the result, nobody else uses it, and the operands have `steps` tiles in each strip.
    unsafe fn block(
        &self,
        [i, j]: [usize; 2],
        a: [*const Line; 2],
        b: [*const Line; 2],
        steps: usize,
    ) {
        let [i, j] = [i, j].map(|block| block * BLOCK);
        let (rows, columns) = (
            (self.sizes[0] - i).min(BLOCK),
            (self.sizes[1] - j).min(BLOCK),
        );
        let is_part = rows < BLOCK || columns < BLOCK;
        let mut bias = [0.0f32; BLOCK];
        let mut part = MaybeUninit::<[f32; BLOCK * BLOCK]>::uninit();
        let part: *mut f32 = part.as_mut_ptr().cast();
        // SAFETY: rows and columns are inside the result, and inside the part, which has room for a block.
        unsafe {
            let c = self.at.add(i * self.row + j);
            let copy = |from: *const f32, from_row: usize, to: *mut f32, to_row: usize| {
                for r in 0..rows {
                    let from = from.add(r * from_row);
                    from.copy_to_nonoverlapping(to.add(r * to_row), columns);
                }
            };
            let to = if is_part {
                part.write_bytes(0, BLOCK * BLOCK);
                (part, BLOCK)
            } else {
                (c, self.row)
            };
            let from = match self.start {
                Start::Zero => None,
                Start::Bias(all) => {
                    bias[..columns].copy_from_slice(&all[j..][..columns]);
                    Some((bias.as_ptr(), 0))
                }
                Start::Result => {
                    if is_part {
                        copy(c, self.row, part, BLOCK);
                    }
                    Some((to.0.cast_const(), to.1))
                }
            };
            #[cfg(target_arch = "x86_64")]
            match self.unit {
                Unit::Tiles => super::amx::block(a, b, steps, from, to),
                Unit::Pairs => super::pairs::block(a, b, steps, from, to),
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = (a, b, steps, from, to, self.unit);
            if is_part {
                copy(part, BLOCK, c, self.row);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use retort_engine::random::noise;

    use super::super::Element;
    use super::*;
    use crate::{Matrix, Rayon};

    /// A matrix, stored by rows or by columns.
    fn operand<E>(data: &[E], [rows, columns]: [usize; 2], turned: bool) -> Matrix<'_, E> {
        match turned {
            true => Matrix::rows(data, rows).turned(),
            false => Matrix::rows(data, columns),
        }
    }

    fn rounded(x: f32) -> f64 {
        bf16::from_f32(x).to_f64()
    }

    /// Checks a product of these matrices against float64; the operands are the numbers as they are rounded.
    fn check<E: Element>(unit: Unit, [m, k, n]: [usize; 3], convert: impl Fn(f32) -> E) {
        let (a, b) = (noise(1, 0, m, k), noise(2, 0, k, n));
        let given = |x: &[f32]| x.iter().map(|&x| convert(x)).collect::<Vec<E>>();
        let (given_a, given_b) = (given(&a), given(&b));
        let (bias, c_row) = (noise(3, 0, 1, n), n + 3);
        let before = noise(4, 0, m, c_row);
        for turned in [[false, false], [false, true], [true, false], [true, true]] {
            let left = operand(&given_a, [m, k], turned[0]);
            let right = operand(&given_b, [k, n], turned[1]);
            let left_packed = Packed::new(&Rayon, Side::Left, left, [m, k]);
            let right_packed = Packed::new(&Rayon, Side::Right, right, [n, k]);
            for start in [Start::Zero, Start::Bias(&bias), Start::Result] {
                let mut c = before.clone();
                let to = (&mut c[..], c_row);
                product(unit, &Rayon, to, &left_packed, &right_packed, start);
                for at in 0..m * c_row {
                    let (i, j) = (at / c_row, at % c_row);
                    let factors = |p| {
                        (
                            a[i * left.row + p * left.column],
                            b[p * right.row + j * right.column],
                        )
                    };
                    let products = (0..k).map(factors);
                    let sum = || products.map(|(a, b)| rounded(a) * rounded(b)).sum::<f64>();
                    let want = match start {
                        _ if j >= n => f64::from(before[at]),
                        Start::Zero => sum(),
                        Start::Bias(bias) => sum() + f64::from(bias[j]),
                        Start::Result => sum() + f64::from(before[at]),
                    };
                    let error = (want - f64::from(c[at])).abs();
                    assert!(
                        error < 2e-6 * (k as f64).sqrt() + 1e-6,
                        "{error:e} at ({i}, {j}) of {m}, {k}, {n}, {turned:?}, {start:?}, {unit:?}"
                    );
                }
            }
        }
    }

    fn units() -> Vec<Unit> {
        let units = [Unit::Tiles, Unit::Pairs];
        let (there, missing): (Vec<_>, Vec<_>) = units.into_iter().partition(|unit| unit.exists());
        for unit in missing {
            eprintln!("skipped: this processor has no {unit:?}");
        }
        there
    }

    #[test]
    fn products_are_those_of_rounded_operands() {
        for unit in units() {
            for sizes in [
                [33, 45, 70],
                [5, 3, 2],
                [1, 1, 1],
                [64, 64, 96],
                [130, 257, 31],
                [16, 32, 300],
            ] {
                check(unit, sizes, |x| x);
                check(unit, sizes, bf16::from_f32);
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_how_many_there_are() {
        let [many, k, n] = [100, 70, 50];
        let (x, w) = (noise(1, 0, many, k), noise(2, 0, k, n));
        for unit in units() {
            let b = Packed::new(&Rayon, Side::Right, operand(&w, [k, n], false), [n, k]);
            let rows = |m: usize| {
                let a = operand(&x[..m * k], [m, k], false);
                let a = Packed::new(&Rayon, Side::Left, a, [m, k]);
                let mut c = vec![0.0; m * n];
                product(unit, &Rayon, (&mut c, n), &a, &b, Start::Zero);
                c
            };
            let all = rows(many);
            for m in [1, 2, 15, 16, 17, 31, 33, 64] {
                assert_eq!(rows(m), all[..m * n], "{m} rows, {unit:?}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for unit in units() {
            for x in [f32::NAN, f32::INFINITY, f32::from_bits(0x7f80_0001)] {
                let (mut a, b) = (vec![1.0; 40], vec![1.0; 40]);
                a[20] = x;
                let a = Packed::new(&Rayon, Side::Left, operand(&a, [1, 40], false), [1, 40]);
                let b = Packed::new(&Rayon, Side::Right, operand(&b, [40, 1], false), [1, 40]);
                let mut c = [0.0];
                product(unit, &Rayon, (&mut c, 1), &a, &b, Start::Zero);
                assert!(!c[0].is_finite(), "{x} gives {}", c[0]);
            }
        }
    }

    #[test]
    #[should_panic(expected = "an operand beyond its memory")]
    fn nothing_is_read_beyond_an_operand() {
        let from = Matrix::rows(&[1.0f32; 5], 3);
        Packed::new(&Rayon, Side::Left, from, [2, 3]);
    }
}
