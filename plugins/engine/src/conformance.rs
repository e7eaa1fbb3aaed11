//! Does a backend compute what the engine means? Every operation against plain f64 loops, every gradient against
//! finite differences; and in [`golden`] whole networks against the published code.
//!
//! In: an opened backend. Out: one [`Case`] per comparison, with its error and what was allowed. Inputs are small, of
//! odd sizes, and given three times: whole, cut out of a greater tensor, and transposed in memory, because kernels
//! err at edges and strides. Tolerances follow the precision of the backend's floats, which is measured. Any backend,
//! fused or composed, must pass; speed is nobody's concern here.

pub mod golden;
pub mod host;
mod tape;

use crate::backend::{
    AdamwStep, Backend, Binary, FlowSolver, Mask, Recording, Truncation, Unary, Window,
};
use crate::choice::{categorical_row, truncate_row};
use crate::error::Result;
use crate::flow;

use host::Host;

/// One comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// The operation, the shapes where they matter, and the layout of its inputs.
    pub name: String,
    /// Greatest difference of an element, relative to the greatest element (at least 1); infinite when the backend
    /// refused or gave another shape. For indices: the share that differs.
    pub error: f64,
    /// The greatest error allowed.
    pub tolerance: f64,
    /// Whether the error is within the tolerance.
    pub passed: bool,
    /// Whether the result follows from codes that the backend chose: where others are nearly as probable, a backend that
    /// rounds operands of products may choose those.
    pub chosen: bool,
}

impl Case {
    /// A comparison, which passed unless the error is greater than the tolerance or no number.
    pub fn new(name: String, error: f64, tolerance: f64) -> Self {
        Self {
            name,
            error,
            tolerance,
            passed: error <= tolerance,
            chosen: false,
        }
    }
}

/// Runs every comparison, prints them, and panics over those that failed: the whole of a backend's test.
pub fn verify<B: Backend>(b: &B) {
    let cases = check(b);
    for case in &cases {
        println!(
            "{} {:<60} {:9.2e} of {:8.1e}",
            if case.passed { "  " } else { "! " },
            case.name,
            case.error,
            case.tolerance
        );
    }
    let failed: Vec<&Case> = cases.iter().filter(|case| !case.passed).collect();
    assert!(
        failed.is_empty(),
        "{} of {} cases: {failed:#?}",
        failed.len(),
        cases.len()
    );
}

/// Runs every comparison.
pub fn check<B: Backend>(b: &B) -> Vec<Case> {
    check_rounded(b, 0.0)
}

/// Runs every comparison on a backend whose products round their operands, by `rounding` of their size at most: 2^-8 for
/// bf16, which has 8 bits.
pub fn check_rounded<B: Backend>(b: &B, rounding: f64) -> Vec<Case> {
    let unit = precision(b);
    let mut suite = Suite {
        b,
        unit,
        // Factors below are meant for sums that round at every step; where only operands do, errors stay smaller.
        unit_of_products: unit.max(rounding / 16.0),
        cases: Vec::new(),
    };
    suite.movement();
    suite.elementwise();
    suite.reductions();
    suite.rounded(Suite::products);
    suite.tables();
    suite.rounded(Suite::convolutions);
    suite.rounded(Suite::upsampled);
    suite.pools();
    suite.in_place();
    suite.activations();
    suite.norms();
    suite.rope();
    suite.rounded(Suite::factors);
    suite.rounded(Suite::attentions);
    suite.rounded(Suite::repeated);
    suite.losses();
    suite.flow_maps();
    suite.choices();
    suite.tape();
    suite.rounded(Suite::tape_of_products);
    suite.cases
}

/// The relative spacing of the backend's floats: 2^-23 for f32.
fn precision<B: Backend>(b: &B) -> f64 {
    let mut unit = 1.0f64;
    loop {
        let next = 1.0 + unit / 2.0;
        let kept = b
            .floats(&[next as f32], &[1])
            .and_then(|x| B::to_floats(&x))
            .is_ok_and(|x| x == [next as f32]);
        if !kept || unit < f64::from(f32::EPSILON) * 1.5 {
            return unit;
        }
        unit /= 2.0;
    }
}

/// How the elements of an input lie in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Lie {
    /// Row-major.
    Whole,
    /// Cut out of a tensor that is greater in every dimension.
    Padded,
    /// Cut out of a tensor whose dimensions are reversed.
    Turned,
}

const LIES: [Lie; 3] = [Lie::Whole, Lie::Padded, Lie::Turned];

struct Suite<'a, B: Backend> {
    b: &'a B,
    /// Relative spacing of floats: what tolerances are multiples of.
    unit: f64,
    /// The same for what multiplies matrices.
    unit_of_products: f64,
    cases: Vec<Case>,
}

/// Gradients of a fused pair: (inputs, result, gradient of the result) -> gradients of the first inputs.
type Backward<'a, T> = &'a dyn Fn(&[T], &T, &T) -> Result<Vec<T>>;

impl<B: Backend> Suite<'_, B> {
    fn put(&self, x: &Host, lie: Lie) -> Result<B::Tensor> {
        let rank = x.shape.len();
        if lie == Lie::Whole || x.data.is_empty() {
            return self.b.floats(&x.to_f32(), &x.shape);
        }
        let reversed: Vec<usize> = (0..rank).rev().collect();
        let inner = match lie {
            Lie::Turned => host::permute(x, &reversed),
            _ => x.clone(),
        };
        let padded: Vec<usize> = inner.shape.iter().map(|n| n + 3).collect();
        let outer = Host::build(&padded, |i| {
            let own: Option<Vec<usize>> = i
                .iter()
                .zip(&inner.shape)
                .map(|(&i, &n)| i.checked_sub(1).filter(|&i| i < n))
                .collect();
            // What lies around the cut must never show.
            own.map_or(7777.0, |own| inner.at(&own))
        });
        let mut y = self.b.floats(&outer.to_f32(), &padded)?;
        for (d, &n) in inner.shape.iter().enumerate() {
            y = B::narrow(&y, d, 1, n)?;
        }
        match lie {
            Lie::Turned => B::permute(&y, &reversed),
            _ => Ok(y),
        }
    }

    /// A part whose tolerances are those of products.
    fn rounded(&mut self, part: impl FnOnce(&mut Self)) {
        let unit = std::mem::replace(&mut self.unit, self.unit_of_products);
        part(self);
        self.unit = unit;
    }

    fn record(&mut self, name: String, error: f64, tolerance: f64) {
        self.cases.push(Case::new(name, error, tolerance));
    }

    /// Compares a result; the tolerance is `factor` spacings of the backend's floats.
    fn compare(&mut self, name: &str, got: Result<B::Tensor>, want: &Host, factor: f64) {
        let tolerance = factor * self.unit;
        match got.and_then(|y| Ok((B::shape(&y), B::to_floats(&y)?))) {
            Ok((shape, data)) if shape == want.shape => {
                self.record(name.into(), difference(&data, want), tolerance);
            }
            Ok((shape, _)) => self.record(
                format!("{name}: shape {shape:?}, expected {:?}", want.shape),
                f64::INFINITY,
                tolerance,
            ),
            Err(error) => self.record(format!("{name}: {error}"), f64::INFINITY, tolerance),
        }
    }

    /// One operation, its inputs lying in each way.
    fn op(
        &mut self,
        name: &str,
        inputs: &[Host],
        want: &Host,
        factor: f64,
        run: &dyn Fn(&[B::Tensor]) -> Result<B::Tensor>,
    ) {
        for lie in LIES {
            let got = self.put_all(inputs, lie).and_then(|x| run(&x));
            self.compare(&format!("{name} {lie:?}"), got, want, factor);
        }
    }

    /// A fused pair: the forward operation against `truth`, its gradients against differences of `truth`.
    fn pair(
        &mut self,
        name: &str,
        inputs: &[Host],
        factor: f64,
        truth: &dyn Fn(&[Host]) -> Host,
        run: &dyn Fn(&[B::Tensor]) -> Result<B::Tensor>,
        backward: Backward<'_, B::Tensor>,
    ) {
        let y = truth(inputs);
        self.op(name, inputs, &y, factor, run);
        let weights = Host::random(&y.shape, 99, -1.0, 1.0);
        let mut wanted: Vec<Option<Host>> = vec![None; inputs.len()];
        for lie in LIES {
            let got = self.put_all(inputs, lie).and_then(|x| {
                let y = run(&x)?;
                backward(&x, &y, &self.put(&weights, lie)?)
            });
            let got = match got {
                Ok(got) => got,
                Err(error) => {
                    let name = format!("{name} backward {lie:?}: {error}");
                    self.record(name, f64::INFINITY, 0.0);
                    continue;
                }
            };
            for (i, gradient) in got.into_iter().enumerate() {
                let want = wanted[i]
                    .get_or_insert_with(|| host::gradient(truth, inputs, i, &weights))
                    .clone();
                let name = format!("{name} backward {i} {lie:?}");
                self.compare(&name, Ok(gradient), &want, factor);
            }
        }
    }

    fn put_all(&self, inputs: &[Host], lie: Lie) -> Result<Vec<B::Tensor>> {
        inputs.iter().map(|x| self.put(x, lie)).collect()
    }

    fn movement(&mut self) {
        let x = Host::random(&[3, 4, 5], 1, -1.0, 1.0);
        let y = Host::random(&[3, 2, 5], 2, -1.0, 1.0);
        let one = std::slice::from_ref(&x);
        self.op("reshape", one, &x.reshaped(&[6, 10]), 0.0, &|x| {
            B::reshape(&x[0], &[6, 10])
        });
        let turned = host::permute(&x, &[2, 0, 1]);
        self.op("permute", one, &turned, 0.0, &|x| {
            B::permute(&x[0], &[2, 0, 1])
        });
        let cut = host::narrow(&x, 1, 1, 2);
        self.op("narrow", one, &cut, 0.0, &|x| B::narrow(&x[0], 1, 1, 2));
        let both = host::cat(&x, &y, 1);
        self.op("cat", &[x.clone(), y], &both, 0.0, &|x| {
            B::cat(&[&x[0], &x[1]], 1)
        });
        let row = Host::random(&[4, 1], 3, -1.0, 1.0);
        let wide = host::expand(&row, &[2, 4, 3]);
        self.op("expand", &[row], &wide, 0.0, &|x| {
            B::expand(&x[0], &[2, 4, 3])
        });
        let full = Host::build(&[2, 3], |_| 0.5);
        let got = self.b.full(&[2, 3], 0.5);
        let beside = got.and_then(|x| B::full_beside(&x, &[2, 3], 0.5));
        self.compare("full", beside, &full, 0.0);
    }

    fn elementwise(&mut self) {
        let sizes: [(&[usize], &[usize]); 9] = [
            (&[5, 7], &[5, 7]),
            (&[3, 5, 37], &[37]),
            (&[3, 5, 37], &[1]),
            (&[6, 19], &[6, 1]),
            (&[4, 1, 9], &[3, 1]),
            (&[3, 5, 37], &[3, 1, 37]),
            (&[2, 3, 4, 2, 5], &[2, 1, 1, 2, 1]),
            (&[7], &[2, 3, 7]),
            (&[2, 5, 3, 3], &[5, 1, 1]),
        ];
        for f in [
            Binary::Add,
            Binary::Sub,
            Binary::Mul,
            Binary::Div,
            Binary::Max,
        ] {
            for (left, right) in sizes {
                let inputs = [
                    Host::random(left, 4, -2.0, 2.0),
                    Host::random(right, 5, 0.5, 2.0),
                ];
                let want = host::binary(&inputs[0], &inputs[1], f);
                let name = format!("{f:?} {left:?} {right:?}");
                self.op(&name, &inputs, &want, 2.0, &|x| B::binary(&x[0], &x[1], f));
            }
        }
        let x = Host::random(&[3, 4, 11], 6, -2.0, 2.0);
        let want = Host::build(&x.shape, |i| 1.5 * x.at(i) - 0.25);
        self.op("affine", &[x], &want, 2.0, &|x| {
            B::affine(&x[0], 1.5, -0.25)
        });
    }

    fn reductions(&mut self) {
        let x = Host::random(&[3, 5, 4, 7], 7, -1.0, 1.0);
        let one = std::slice::from_ref(&x);
        let sets: [&[usize]; 7] = [
            &[3],
            &[0],
            &[1, 2],
            &[0, 2, 3],
            &[0, 1, 2],
            &[1],
            &[0, 1, 2, 3],
        ];
        for dims in sets {
            let want = host::sum(&x, dims);
            self.op(&format!("sum {dims:?}"), one, &want, 16.0, &|x| {
                B::sum(&x[0], dims)
            });
        }
        let wide = Host::random(&[4, 67], 8, -3.0, 3.0);
        let max = Host::build(&[4, 1], |i| {
            let row = &wide.data[i[0] * 67..][..67];
            row.iter().copied().fold(f64::NEG_INFINITY, f64::max)
        });
        self.op("max_last", std::slice::from_ref(&wide), &max, 0.0, &|x| {
            B::max_last(&x[0])
        });
        // Few distinct values, so that the maximum occurs several times.
        let ties = Host::build(&[5, 3, 67], |i| {
            ((i[0] * 31 + i[1] * 17 + i[2] * 7) % 5) as f64
        });
        let want: Vec<u32> = ties
            .data
            .chunks_exact(67)
            .map(|row| {
                let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                row.iter().position(|&x| x == max).unwrap_or(0) as u32
            })
            .collect();
        for lie in LIES {
            let got = self.put(&ties, lie).and_then(|x| B::argmax_last(&x));
            self.ids(&format!("argmax_last {lie:?}"), got, &[5, 3], &want);
        }
    }

    /// Compares indices: the error is the share that differs.
    fn ids(&mut self, name: &str, got: Result<B::Tensor>, shape: &[usize], want: &[u32]) {
        match got.and_then(|y| Ok((B::shape(&y), B::to_indices(&y)?))) {
            Ok((found, ids)) if found == shape => {
                let wrong = ids.iter().zip(want).filter(|(a, b)| a != b).count();
                self.record(name.into(), wrong as f64 / want.len() as f64, 0.0);
            }
            Ok((found, _)) => self.record(
                format!("{name}: shape {found:?}, expected {shape:?}"),
                f64::INFINITY,
                0.0,
            ),
            Err(error) => self.record(format!("{name}: {error}"), f64::INFINITY, 0.0),
        }
    }

    fn products(&mut self) {
        for (m, k, n) in [
            (5, 7, 3),
            (1, 33, 19),
            (40, 1, 9),
            (17, 65, 1),
            (70, 50, 90),
        ] {
            for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
                let left = if ta { [k, m] } else { [m, k] };
                let right = if tb { [n, k] } else { [k, n] };
                let inputs = [
                    Host::random(&left, 9, -1.0, 1.0),
                    Host::random(&right, 10, -1.0, 1.0),
                ];
                let want = host::matmul(&inputs[0], &inputs[1], ta, tb);
                let name = format!("matmul {m}x{k}x{n} {ta} {tb}");
                self.op(&name, &inputs, &want, 64.0, &|x| {
                    B::matmul(&x[0], &x[1], ta, tb)
                });
            }
        }
        for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
            let left = if ta { [2, 3, 7, 5] } else { [2, 3, 5, 7] };
            let right = if tb { [2, 3, 4, 7] } else { [2, 3, 7, 4] };
            let inputs = [
                Host::random(&left, 11, -1.0, 1.0),
                Host::random(&right, 12, -1.0, 1.0),
            ];
            let want = host::matmul(&inputs[0], &inputs[1], ta, tb);
            let name = format!("matmul batched {ta} {tb}");
            self.op(&name, &inputs, &want, 64.0, &|x| {
                B::matmul(&x[0], &x[1], ta, tb)
            });
        }
        for (shape, o) in [(vec![1, 13], 5), (vec![3, 9, 13], 21), (vec![50, 96], 40)] {
            let i = shape[shape.len() - 1];
            let inputs = [
                Host::random(&shape, 13, -1.0, 1.0),
                Host::random(&[o, i], 14, -1.0, 1.0),
                Host::random(&[o], 15, -1.0, 1.0),
            ];
            let plain = host::linear(&inputs[0], &inputs[1], None);
            let biased = host::linear(&inputs[0], &inputs[1], Some(&inputs[2]));
            self.op(
                &format!("linear {shape:?}"),
                &inputs[..2],
                &plain,
                64.0,
                &|x| B::linear(&x[0], &x[1], None),
            );
            self.op(
                &format!("linear with bias {shape:?}"),
                &inputs,
                &biased,
                64.0,
                &|x| B::linear(&x[0], &x[1], Some(&x[2])),
            );
        }
    }

    fn tables(&mut self) {
        let (k, d) = (6, 5);
        let ids = [3u32, 0, 3, 5, 3, 1];
        let table = Host::random(&[k, d], 16, -1.0, 1.0);
        let want = Host::build(&[2, 3, d], |i| {
            table.at(&[ids[i[0] * 3 + i[1]] as usize, i[2]])
        });
        let index = |b: &B, shape: &[usize]| b.indices(&ids, shape);
        let b = self.b;
        self.op("rows", &[table], &want, 0.0, &|x| {
            B::rows(&x[0], &index(b, &[2, 3])?)
        });
        let grad = Host::random(&[2, 3, d], 17, -1.0, 1.0);
        let mut sum = Host::build(&[k, d], |_| 0.0);
        for (n, row) in grad.data.chunks_exact(d).enumerate() {
            for (e, g) in row.iter().enumerate() {
                sum.data[ids[n] as usize * d + e] += g;
            }
        }
        self.op("rows_adjoint", &[grad], &sum, 4.0, &|x| {
            B::rows_adjoint(&x[0], &index(b, &[2, 3])?, k)
        });
        let x = Host::random(&[3, 2, k], 18, -1.0, 1.0);
        let picked = Host::build(&[3, 2], |i| {
            x.at(&[i[0], i[1], ids[i[0] * 2 + i[1]] as usize])
        });
        self.op("pick", &[x], &picked, 0.0, &|x| {
            B::pick(&x[0], &index(b, &[3, 2])?)
        });
        let grad = Host::random(&[3, 2], 19, -1.0, 1.0);
        let placed = Host::build(&[3, 2, k], |i| {
            let hit = ids[i[0] * 2 + i[1]] as usize == i[2];
            if hit { grad.at(&i[..2]) } else { 0.0 }
        });
        self.op("pick_adjoint", &[grad], &placed, 0.0, &|x| {
            B::pick_adjoint(&x[0], &index(b, &[3, 2])?, k)
        });
        let got = index(b, &[3, 2]).and_then(|x| B::permute(&x, &[1, 0]));
        self.ids("indices permuted", got, &[2, 3], &[3, 3, 3, 0, 5, 1]);
    }

    fn convolutions(&mut self) {
        let shapes: [([usize; 4], [usize; 4], usize, [usize; 2]); 15] = [
            ([2, 3, 7, 6], [4, 3, 3, 3], 1, [1, 1]),
            ([1, 2, 5, 5], [3, 2, 1, 1], 1, [0, 0]),
            ([2, 3, 8, 8], [5, 3, 3, 3], 2, [1, 1]),
            ([1, 3, 9, 7], [2, 3, 2, 4], 2, [0, 0]),
            ([2, 1, 6, 5], [3, 1, 5, 5], 1, [2, 2]),
            ([1, 4, 8, 8], [2, 4, 4, 4], 2, [1, 1]),
            ([2, 3, 5, 5], [2, 3, 1, 1], 2, [0, 0]),
            // Kernels along one direction.
            ([2, 3, 6, 9], [4, 3, 1, 7], 1, [0, 3]),
            ([2, 3, 9, 6], [4, 3, 7, 1], 1, [3, 0]),
            ([1, 2, 5, 4], [3, 2, 3, 1], 1, [1, 0]),
            ([1, 2, 8, 9], [3, 2, 1, 3], 2, [0, 1]),
            // More padding than the kernel reaches over.
            ([1, 2, 4, 5], [3, 2, 1, 2], 1, [2, 1]),
            // Rows of whole vectors.
            ([2, 3, 5, 8], [4, 3, 3, 3], 1, [1, 1]),
            ([1, 2, 3, 24], [3, 2, 3, 3], 1, [1, 1]),
            ([2, 2, 5, 16], [3, 2, 3, 3], 2, [1, 1]),
        ];
        for (x, w, stride, padding) in shapes {
            let inputs = [
                Host::random(&x, 20, -1.0, 1.0),
                Host::random(&w, 21, -1.0, 1.0),
            ];
            self.pair(
                &format!("conv2d {x:?} {w:?} stride {stride} padding {padding:?}"),
                &inputs,
                256.0,
                &|x| host::conv2d(&x[0], &x[1], stride, padding),
                &|x| B::conv2d(&x[0], &x[1], stride, padding),
                &|x, _, g| {
                    let both = B::conv2d_backward(&x[0], &x[1], g, stride, padding, (true, true))?;
                    Ok([both.0, both.1].into_iter().flatten().collect())
                },
            );
            let [x, w] = inputs;
            let bias = Host::random(&[w.shape[0]], 24, -1.0, 1.0);
            let y = host::conv2d(&x, &w, stride, padding);
            let want = Host::build(&y.shape, |i| y.at(i) + bias.at(&[i[1]]));
            let name = format!("conv2d_bias {:?} {:?}", x.shape, w.shape);
            let mut inputs = vec![x, w, bias];
            self.op(&name, &inputs, &want, 256.0, &|x| {
                B::conv2d_bias(&x[0], &x[1], &x[2], None, stride, padding)
            });
            let residual = Host::random(&y.shape, 25, -1.0, 1.0);
            let want = Host::build(&y.shape, |i| want.at(i) + residual.at(i));
            inputs.push(residual);
            self.op(&format!("{name} residual"), &inputs, &want, 256.0, &|x| {
                B::conv2d_bias(&x[0], &x[1], &x[2], Some(&x[3]), stride, padding)
            });
        }
    }

    fn upsampled(&mut self) {
        // The last two are large enough for other algorithms.
        let shapes: [([usize; 4], [usize; 4], [usize; 2]); 7] = [
            ([2, 3, 4, 3], [4, 3, 3, 3], [1, 1]),
            ([1, 2, 3, 5], [3, 2, 1, 1], [0, 0]),
            ([1, 2, 3, 3], [2, 2, 3, 2], [0, 2]),
            ([2, 3, 3, 4], [2, 3, 3, 3], [1, 1]),
            ([1, 2, 2, 12], [3, 2, 3, 3], [1, 1]),
            ([1, 32, 16, 17], [32, 32, 3, 3], [1, 1]),
            ([2, 32, 19, 15], [33, 32, 3, 3], [1, 1]),
        ];
        for (x, w, padding) in shapes {
            let (x, w) = (
                Host::random(&x, 26, -1.0, 1.0),
                Host::random(&w, 27, -1.0, 1.0),
            );
            let bias = Host::random(&[w.shape[0]], 28, -1.0, 1.0);
            let s = &x.shape;
            let large = Host::build(&[s[0], s[1], 2 * s[2], 2 * s[3]], |i| {
                x.at(&[i[0], i[1], i[2] / 2, i[3] / 2])
            });
            let y = host::conv2d(&large, &w, 1, padding);
            let want = Host::build(&y.shape, |i| y.at(i) + bias.at(&[i[1]]));
            self.op(
                &format!("conv2d_upsampled {:?} {:?}", x.shape, w.shape),
                &[x, w, bias],
                &want,
                2048.0,
                &|x| B::conv2d_upsampled(&x[0], &x[1], &x[2], padding),
            );
        }
    }

    fn pools(&mut self) {
        let shapes: [([usize; 4], [usize; 3]); 6] = [
            ([2, 3, 6, 8], [2, 2, 0]),
            ([1, 2, 7, 5], [2, 2, 0]), // the last row and column belong to no window
            ([2, 1, 9, 8], [3, 2, 0]),
            ([1, 3, 5, 4], [3, 1, 1]),
            ([1, 2, 7, 6], [3, 2, 1]),
            ([1, 2, 8, 9], [2, 3, 0]), // pixels between the windows
        ];
        for (shape, [size, stride, padding]) in shapes {
            let window = Window {
                size,
                stride,
                padding,
            };
            // All below zero, so that padding would show.
            let x = Host::random(&shape, 34, -2.0, -1.0);
            self.pair(
                &format!("max_pool2d {shape:?} {size} stride {stride} padding {padding}"),
                &[x],
                16.0,
                &|x| host::max_pool2d(&x[0], window),
                &|x| B::max_pool2d(&x[0], window),
                &|x, _, g| Ok(vec![B::max_pool2d_backward(&x[0], g, window)?]),
            );
        }
        // Among equals the first takes the gradient.
        let window = Window {
            size: 2,
            stride: 2,
            padding: 0,
        };
        let ties = Host {
            shape: vec![1, 1, 2, 4],
            data: vec![0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0],
        };
        let want = Host {
            shape: ties.shape.clone(),
            data: vec![0.0, 3.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        };
        let got = self.put(&ties, Lie::Whole).and_then(|x| {
            B::max_pool2d_backward(&x, &self.b.floats(&[3.0, 5.0], &[1, 1, 1, 2])?, window)
        });
        self.compare("max_pool2d backward of equals", got, &want, 0.0);
    }

    fn in_place(&mut self) {
        let x = Host::random(&[2, 5, 3], 22, -1.0, 1.0);
        let src = Host::random(&[2, 2, 3], 23, -1.0, 1.0);
        let want = Host::build(&x.shape, |i| {
            if (2..4).contains(&i[1]) {
                src.at(&[i[0], i[1] - 2, i[2]])
            } else {
                x.at(i)
            }
        });
        let other = Host::random(&[2, 5, 3], 24, -1.0, 1.0);
        for lie in LIES {
            // The target is whole, as parameters and caches are; the clone must see what is written.
            let wrote = self.put(&x, Lie::Whole).and_then(|x| {
                let seen = x.clone();
                B::write_(&x, 1, 2, &self.put(&src, lie)?)?;
                Ok(seen)
            });
            self.compare(&format!("write_ {lie:?}"), wrote, &want, 0.0);
            let assigned = self.put(&x, Lie::Whole).and_then(|x| {
                let seen = x.clone();
                B::assign_(&x, &self.put(&other, lie)?)?;
                Ok(seen)
            });
            self.compare(&format!("assign_ {lie:?}"), assigned, &other, 0.0);
            let averaged = self.put(&x, Lie::Whole).and_then(|x| {
                let seen = x.clone();
                B::ema_(&x, &self.put(&other, lie)?, 0.75)?;
                Ok(seen)
            });
            let mean = Host::build(&x.shape, |i| 0.75 * x.at(i) + 0.25 * other.at(i));
            self.compare(&format!("ema_ {lie:?}"), averaged, &mean, 4.0);
            self.adamw(lie);
        }
    }

    fn adamw(&mut self, lie: Lie) {
        let shape = [3, 37];
        let step = AdamwStep {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.05,
            correction1: 1.0 - 0.9f64.powi(3),
            correction2: 1.0 - 0.95f64.powi(3),
            grad_scale: 0.5,
        };
        let [p, m, g] = [25, 26, 27].map(|seed| Host::random(&shape, seed, -1.0, 1.0));
        let v = Host::random(&shape, 28, 0.01, 1.0);
        let each = |f: &dyn Fn(usize) -> f64| Host {
            shape: shape.to_vec(),
            data: (0..p.data.len()).map(f).collect(),
        };
        let m1 = each(&|i| 0.9 * m.data[i] + 0.1 * 0.5 * g.data[i]);
        let v1 = each(&|i| 0.95 * v.data[i] + 0.05 * (0.5 * g.data[i]).powi(2));
        let p1 = each(&|i| {
            let root = (v1.data[i] / step.correction2).sqrt() + step.eps;
            p.data[i] * (1.0 - step.lr * step.weight_decay)
                - step.lr * m1.data[i] / step.correction1 / root
        });
        let run = || {
            let [p, m, v] = [
                self.put(&p, Lie::Whole)?,
                self.put(&m, Lie::Whole)?,
                self.put(&v, Lie::Whole)?,
            ];
            let seen = [p.clone(), m.clone(), v.clone()];
            B::adamw_(&p, &m, &v, &self.put(&g, lie)?, &step)?;
            Ok::<_, crate::Error>(seen)
        };
        match run() {
            Ok([p, m, v]) => {
                self.compare(&format!("adamw_ p {lie:?}"), Ok(p), &p1, 16.0);
                self.compare(&format!("adamw_ m {lie:?}"), Ok(m), &m1, 4.0);
                self.compare(&format!("adamw_ v {lie:?}"), Ok(v), &v1, 4.0);
            }
            Err(error) => self.record(format!("adamw_ {lie:?}: {error}"), f64::INFINITY, 0.0),
        }
    }

    fn activations(&mut self) {
        for f in [
            Unary::Exp,
            Unary::Log,
            Unary::Sqrt,
            Unary::Square,
            Unary::Recip,
            Unary::Tanh,
            Unary::Sigmoid,
            Unary::Erf,
            Unary::Silu,
            Unary::GeluTanh,
            Unary::GeluErf,
            Unary::Relu,
        ] {
            let low = match f {
                Unary::Log | Unary::Sqrt | Unary::Recip => 0.1,
                _ => -5.0,
            };
            let x = Host::random(&[3, 5, 19], 29, low, 3.0);
            self.pair(
                &format!("{f:?}"),
                &[x],
                32.0,
                &|x| host::unary(&x[0], f),
                &|x| B::unary(&x[0], f),
                &|x, y, g| Ok(vec![B::unary_backward(&x[0], y, g, f)?]),
            );
        }
        // Far out: saturation must be exact, and nothing may turn into NaN.
        let far = Host {
            shape: vec![8],
            data: vec![-1e4, -104.0, -88.0, -30.0, 0.0, 30.0, 60.0, 1e4],
        };
        for f in [
            Unary::Tanh,
            Unary::Sigmoid,
            Unary::Erf,
            Unary::Silu,
            Unary::GeluTanh,
            Unary::GeluErf,
            Unary::Relu,
        ] {
            let want = host::unary(&far, f);
            let got = self.put(&far, Lie::Whole).and_then(|x| B::unary(&x, f));
            self.compare(&format!("{f:?} far out"), got, &want, 4.0);
            let slope = host::gradient(
                &|x| host::unary(&x[0], f),
                std::slice::from_ref(&far),
                0,
                &Host::build(&[8], |_| 1.0),
            );
            let got = self.put(&far, Lie::Whole).and_then(|x| {
                let ones = self.b.full(&[8], 1.0)?;
                B::unary_backward(&x, &B::unary(&x, f)?, &ones, f)
            });
            // At 0 the slope of relu is a convention: both sides of the kink are right.
            if f != Unary::Relu {
                self.compare(&format!("{f:?} backward far out"), got, &slope, 64.0);
            }
        }
    }

    /// What is made for products to read.
    fn factors(&mut self) {
        let x = Host::random(&[3, 5, 38], 30, -4.0, 4.0);
        self.pair(
            "swiglu",
            &[x],
            64.0,
            &|x| host::swiglu(&x[0]),
            &|x| B::swiglu(&x[0]),
            &|x, _, g| Ok(vec![B::swiglu_backward(&x[0], g)?]),
        );
        let x = Host::random(&[2, 3, 37], 31, -1.0, 1.5);
        let w = Host::random(&[37], 32, 0.5, 1.5);
        let want = host::rms_norm(&x, &w, 1e-5);
        self.op("rms_norm_factor", &[x, w], &want, 128.0, &|x| {
            B::rms_norm_factor(&x[0], &x[1], 1e-5)
        });
        for d in [6, 64] {
            let inputs = [
                Host::random(&[2, 5, 3, d], 73, -1.0, 1.5),
                Host::random(&[3], 74, 0.5, 4.0),
            ];
            let truth = |x: &[Host]| {
                let d = x[0].shape[3];
                let norm = host::rms_norm(&x[0], &Host::build(&[d], |_| 1.0), 0.0);
                Host::build(&x[0].shape, |i| {
                    let length = x.get(1).map_or(1.0, |length| length.at(&[i[2]]));
                    norm.at(i) / (d as f64).sqrt() * length
                })
            };
            self.pair(
                &format!("unit {d}"),
                &inputs,
                128.0,
                &truth,
                &|x| B::unit(&x[0], Some(&x[1])),
                &|x, _, g| {
                    let (dx, dlength) = B::unit_backward(&x[0], Some(&x[1]), g)?;
                    Ok([Some(dx), dlength].into_iter().flatten().collect())
                },
            );
            self.pair(
                &format!("unit {d} without lengths"),
                &inputs[..1],
                128.0,
                &truth,
                &|x| B::unit(&x[0], None),
                &|x, _, g| Ok(vec![B::unit_backward(&x[0], None, g)?.0]),
            );
        }
        let x = Host::random(&[3, 4, 37], 75, -3.0, 3.0);
        let want = host::unary(&x, Unary::GeluTanh);
        self.op("unary_factor", &[x], &want, 32.0, &|x| {
            B::unary_factor(&x[0], Unary::GeluTanh)
        });
        // Lengths of rows that are not, and that are, whole vectors.
        for c in [37, 64] {
            let inputs = [
                Host::random(&[3, 4, c], 70, -1.0, 1.5),
                Host::random(&[3, 1, c], 71, -1.5, 1.5),
                Host::random(&[3, 1, c], 72, -1.5, 1.5),
            ];
            self.pair(
                &format!("modulated_norm {c}"),
                &inputs,
                128.0,
                &|x| {
                    let normal = host::layer_norm(&x[0], 1e-5);
                    Host::build(&x[0].shape, |i| {
                        normal.at(i) * x[1].at(&[i[0], 0, i[2]]) + x[2].at(&[i[0], 0, i[2]])
                    })
                },
                &|x| B::modulated_norm(&x[0], &x[1], &x[2], 1e-5),
                &|x, _, g| {
                    let (dx, dscale, dshift) = B::modulated_norm_backward(&x[0], &x[1], g, 1e-5)?;
                    Ok(vec![dx, dscale, dshift])
                },
            );
            let inputs = [
                Host::random(&[3, 4, c], 76, -1.0, 1.5),
                Host::random(&[3, 4, c], 77, -1.5, 1.5),
                Host::random(&[3, 1, c], 78, -1.5, 1.5),
                Host::random(&[3, 4, c], 79, -1.5, 1.5),
            ];
            let truth = |x: &[Host]| {
                Host::build(&x[0].shape, |i| {
                    let added = x.get(3).map_or(0.0, |added| added.at(i));
                    x[0].at(i) + x[1].at(i) * x[2].at(&[i[0], 0, i[2]]) + added
                })
            };
            for n in [3, 4] {
                self.pair(
                    &format!("gated_add of {n}, {c}"),
                    &inputs[..n],
                    8.0,
                    &truth,
                    &|x| B::gated_add(&x[0], &x[1], &x[2], x.get(3)),
                    &|x, _, g| {
                        let (dy, dgate) = B::gated_add_backward(&x[1], &x[2], g)?;
                        Ok(vec![g.clone(), dy, dgate])
                    },
                );
            }
        }
        self.rope_cached();
    }

    fn rope_cached(&mut self) {
        let [q, k, v] = [46, 47, 48].map(|seed| Host::random(&[2, 2, 3, 8], seed, -1.0, 1.0));
        let angle = Host::random(&[2, 4], 49, -3.0, 3.0);
        let cos = Host::build(&[2, 4], |i| angle.at(i).cos());
        let sin = Host::build(&[2, 4], |i| angle.at(i).sin());
        // Positions 3 and 4 of six.
        let cached = |x: &Host| {
            Host::build(&[2, 6, 3, 8], |i| match i[1].checked_sub(3) {
                Some(at) if at < 2 => x.at(&[i[0], at, i[2], i[3]]),
                _ => 0.0,
            })
        };
        let turned = [&q, &k].map(|x| host::rope(x, &cos, &sin));
        let want = [turned[0].clone(), cached(&turned[1]), cached(&v)];
        for lie in LIES {
            let inputs = [&q, &k, &v, &cos, &sin].map(Host::clone);
            let got = self.put_all(&inputs, lie).and_then(|x| {
                let cache = || B::factor(&self.b.full(&[2, 6, 3, 8], 0.0)?);
                let (keys, values) = (cache()?, cache()?);
                let q = B::rope_cached(&x[0], &x[1], &x[2], &x[3], &x[4], &keys, &values, 3)?;
                Ok([q, keys, values])
            });
            match got {
                Ok(got) => {
                    for ((got, want), of) in got.into_iter().zip(&want).zip(["q", "keys", "values"])
                    {
                        self.compare(&format!("rope_cached {of} {lie:?}"), Ok(got), want, 32.0);
                    }
                }
                Err(error) => {
                    let name = format!("rope_cached {lie:?}: {error}");
                    self.record(name, f64::INFINITY, 0.0);
                }
            }
        }
    }

    fn norms(&mut self) {
        for d in [5, 32, 97] {
            let x = Host::random(&[2, 3, d], 31, -1.0, 1.5);
            let w = Host::random(&[d], 32, 0.5, 1.5);
            self.pair(
                &format!("rms_norm {d}"),
                &[x.clone(), w],
                128.0,
                &|x| host::rms_norm(&x[0], &x[1], 1e-5),
                &|x| B::rms_norm(&x[0], &x[1], 1e-5),
                &|x, _, g| {
                    let (dx, dw) = B::rms_norm_backward(&x[0], &x[1], g, 1e-5)?;
                    Ok(vec![dx, dw])
                },
            );
            self.pair(
                &format!("layer_norm {d}"),
                &[x],
                128.0,
                &|x| host::layer_norm(&x[0], 1e-6),
                &|x| B::layer_norm(&x[0], 1e-6),
                &|x, _, g| Ok(vec![B::layer_norm_backward(&x[0], g, 1e-6)?]),
            );
        }
        for (shape, groups) in [([2, 6, 3, 5], 3), ([3, 4, 4, 4], 4), ([2, 5, 1, 7], 1)] {
            let c = shape[1];
            let inputs = [
                Host::random(&shape, 33, -1.0, 1.5),
                Host::random(&[c], 34, 0.5, 1.5),
                Host::random(&[c], 35, -1.0, 1.0),
            ];
            let normal = host::group_norm(&inputs[0], groups, &inputs[1], &inputs[2], 1e-6);
            self.op(
                &format!("group_norm_silu {shape:?} in {groups}"),
                &inputs,
                &host::unary(&normal, Unary::Silu),
                128.0,
                &|x| B::group_norm_silu(&x[0], groups, &x[1], &x[2], 1e-6),
            );
            self.pair(
                &format!("group_norm {shape:?} in {groups}"),
                &inputs,
                128.0,
                &|x| host::group_norm(&x[0], groups, &x[1], &x[2], 1e-6),
                &|x| B::group_norm(&x[0], groups, &x[1], &x[2], 1e-6),
                &|x, _, g| {
                    let (dx, dw, db) = B::group_norm_backward(&x[0], groups, &x[1], g, 1e-6)?;
                    Ok(vec![dx, dw, db])
                },
            );
        }
    }

    fn rope(&mut self) {
        let x = Host::random(&[2, 5, 3, 6], 36, -1.0, 1.0);
        let angle = Host::random(&[5, 3], 37, -3.0, 3.0);
        let cos = Host::build(&[5, 3], |i| angle.at(i).cos());
        let sin = Host::build(&[5, 3], |i| angle.at(i).sin());
        let want = host::rope(&x, &cos, &sin);
        self.op("rope", &[x, cos, sin], &want, 4.0, &|x| {
            B::rope(&x[0], &x[1], &x[2])
        });
    }

    fn attentions(&mut self) {
        // (batch, queries, keys, heads, head size); of some size, where kernels go tile by tile, only some masks.
        let all: &[&str] = &[];
        for (b, lq, lk, h, d, some) in [
            (2, 5, 5, 3, 4, all),
            (1, 17, 17, 2, 24, all),
            (2, 1, 9, 2, 32, all),
            (1, 3, 35, 1, 5, all),
            (1, 33, 33, 1, 16, all),
            (1, 7, 9, 1, 132, all),
            (2, 37, 81, 2, 12, all),
            (1, 150, 210, 1, 20, &["full", "causal", "bias of levels"]),
            (1, 140, 140, 1, 64, &["causal", "bias of levels"]),
            (1, 70, 133, 1, 100, &["bias of levels", "bias of heads"]),
        ] {
            // Blocks of two: a position sees its own block and the ones before, as in next-scale prediction.
            let blocks = Host::build(&[lq, lk], |i| {
                if i[1] / 2 <= (i[0] + lk - lq) / 2 {
                    0.0
                } else {
                    f64::NEG_INFINITY
                }
            });
            // Blocks that grow: a position sees itself and the blocks before its own, and whole tiles see nothing.
            let levels = Host::build(&[lq, lk], |i| {
                let own = i[0] + lk - lq;
                if i[1] == own || i[1].isqrt() < own.isqrt() {
                    0.0
                } else {
                    f64::NEG_INFINITY
                }
            });
            let causal = Host::build(&[lq, lk], |i| {
                if i[1] <= i[0] + lk - lq {
                    0.0
                } else {
                    f64::NEG_INFINITY
                }
            });
            let inputs = [
                Host::random(&[b, lq, h, d], 38, -2.0, 2.0),
                Host::random(&[b, lk, h, d], 39, -2.0, 2.0),
                Host::random(&[b, lk, h, d], 40, -1.0, 1.0),
            ];
            // Hidden keys that depend on the sequence, and on the query too; and a bias for each head.
            let padded = |rows: usize| {
                Host::build(&[b, 1, rows, lk], |i| {
                    if i[3] < (i[0] + i[2] + 1).min(lk - 1) {
                        f64::NEG_INFINITY
                    } else {
                        0.0
                    }
                })
            };
            let (hidden, each) = (padded(1), padded(lq));
            let own = Host::random(&[b, h, lq, lk], 47, -2.0, 2.0);
            let backend = self.b;
            for (name, bias) in [
                ("full", None),
                ("causal", Some(&causal)),
                ("bias", Some(&blocks)),
                ("bias of levels", Some(&levels)),
                ("bias of sequences", Some(&hidden)),
                ("bias of sequences and queries", Some(&each)),
                ("bias of heads", Some(&own)),
            ] {
                if !some.is_empty() && !some.contains(&name) {
                    continue;
                }
                let mask = || -> Result<Mask<B::Tensor>> {
                    Ok(match (name, bias) {
                        (_, None) => Mask::Full,
                        ("causal", _) => Mask::Causal,
                        (_, Some(bias)) => Mask::Bias(backend.floats(&bias.to_f32(), &bias.shape)?),
                    })
                };
                let scale = (d as f64).sqrt().recip();
                self.pair(
                    &format!("attention {name} ({b}, {lq}, {lk}, {h}, {d})"),
                    &inputs,
                    128.0,
                    &|x| host::attention(&x[0], &x[1], &x[2], bias, scale),
                    &|x| B::attention(&x[0], &x[1], &x[2], &mask()?, scale),
                    &|x, y, g| {
                        let (dq, dk, dv) =
                            B::attention_backward(&x[0], &x[1], &x[2], &mask()?, scale, y, g)?;
                        Ok(vec![dq, dk, dv])
                    },
                );
            }
        }
    }

    /// Positions of a generation one after the other, each like the one before: the backend may record how it is done.
    fn repeated(&mut self) {
        let (b, n, h, d, scale) = (2, 7, 3, 8, 0.3);
        let [qs, ks, vs] = [61, 62, 63].map(|seed| Host::random(&[b, n, h, d], seed, -2.0, 2.0));
        let angle = Host::random(&[n, d / 2], 64, -3.0, 3.0);
        let cos = Host::build(&[n, d / 2], |i| angle.at(i).cos());
        let sin = Host::build(&[n, d / 2], |i| angle.at(i).sin());
        let hidden = Host::build(&[b, 1, 1, n], |i| match i[0] == 1 && i[3] < 2 {
            true => f64::NEG_INFINITY,
            false => 0.0,
        });
        let turned = [&qs, &ks].map(|x| host::rope(x, &cos, &sin));
        for bias in [None, Some(&hidden)] {
            let got = (|| {
                let put = |x: &Host| self.put(x, Lie::Whole);
                let cache = || B::factor(&self.b.full(&[b, n, h, d], 0.0)?);
                let (keys, values, bias) = (cache()?, cache()?, bias.map(put).transpose()?);
                let (cos, sin) = (put(&cos)?, put(&sin)?);
                let first = |x: &Host| host::narrow(x, 1, 0, 3);
                B::write_(&keys, 1, 0, &put(&first(&turned[1]))?)?;
                B::write_(&values, 1, 0, &put(&first(&vs))?)?;
                let mut kept = Recording::default();
                (3..n)
                    .map(|at| {
                        let own = |x: &Host| put(&host::narrow(x, 1, at, 1));
                        let [q, k, v] = [own(&qs)?, own(&ks)?, own(&vs)?];
                        let place = self.b.indices(&[at as u32], &[1])?;
                        let y = B::repeat(&mut kept, &[&q, &k, &v, &place], &mut |x| {
                            let (qkv, caches) = ([x[0], x[1], x[2]], [&keys, &values]);
                            let bias = bias.as_ref();
                            B::attend_next(qkv, [&cos, &sin], caches, at, x[3], bias, scale)
                        })?;
                        // It is overwritten at the next.
                        B::to_floats(&y)
                    })
                    .collect::<Result<Vec<_>>>()
            })();
            let with = if bias.is_some() { ", some hidden" } else { "" };
            for at in 3..n {
                let seen = |x: &Host| host::narrow(x, 1, 0, at + 1);
                let bias = bias.map(|bias| host::narrow(bias, 3, 0, at + 1));
                let q = host::narrow(&turned[0], 1, at, 1);
                let want = host::attention(&q, &seen(&turned[1]), &seen(&vs), bias.as_ref(), scale);
                let name = format!("attend_next at {at}, repeated{with}");
                match &got {
                    Ok(got) => {
                        let error = difference(&got[at - 3], &want);
                        self.record(name, error, 128.0 * self.unit);
                    }
                    Err(error) => self.record(format!("{name}: {error}"), f64::INFINITY, 0.0),
                }
            }
        }
    }

    fn losses(&mut self) {
        for n in [3, 19, 64] {
            let x = Host::random(&[2, 5, n], 41, -4.0, 4.0);
            self.pair(
                &format!("softmax {n}"),
                &[x],
                32.0,
                &|x| host::softmax(&x[0]),
                &|x| B::softmax(&x[0]),
                &|_, y, g| Ok(vec![B::softmax_backward(y, g)?]),
            );
        }
        let mut x = Host::random(&[4, 9], 42, -3.0, 3.0);
        for i in [0, 7, 12, 20] {
            x.data[i] = f64::NEG_INFINITY;
        }
        let want = host::softmax(&x);
        self.op("softmax with -inf", &[x], &want, 32.0, &|x| {
            B::softmax(&x[0])
        });

        let ids = [3u32, 0, 66, 5, 1];
        let b = self.b;
        let x = Host::random(&[5, 67], 43, -8.0, 8.0);
        let index = || b.indices(&ids, &[5]);
        self.pair(
            "cross_entropy",
            &[x],
            32.0,
            &|x| host::cross_entropy(&x[0], &ids),
            &|x| B::cross_entropy(&x[0], &index()?),
            &|x, _, g| Ok(vec![B::cross_entropy_backward(&x[0], &index()?, g)?]),
        );
    }

    /// Truncated logits and drawn codes as on the host, some logits being equal.
    fn choices(&mut self) {
        let (n, k) = (5, 700);
        let mut logits = Host::random(&[n, k], 91, -4.0, 4.0);
        for i in (0..n * k).step_by(3) {
            logits.data[i] = (logits.data[i] * 2.0).round() / 2.0;
        }
        for (temperature, top_k, top_p) in [
            (1.0, 0, 1.0),
            (0.7, 0, 1.0),
            (1.0, 1, 1.0),
            (1.3, 40, 1.0),
            (1.0, 0, 0.5),
            (0.9, 300, 0.9),
            (1.0, 3, 0.99),
            (1.0, 700, 0.001),
        ] {
            let truncation = Truncation {
                temperature,
                top_k,
                top_p,
            };
            let mut want = logits.to_f32();
            want.chunks_mut(k)
                .for_each(|row| truncate_row(row, &truncation));
            for lie in LIES {
                let got = self.put(&logits, lie);
                let got = got.and_then(|x| B::to_floats(&B::truncate(&x, &truncation)?));
                let close = |(a, b): (&f32, &f32)| {
                    a == b || (a - b).abs() <= 4.0 * (self.unit * f64::from(b.abs())) as f32
                };
                let others = got.map_or(f64::INFINITY, |got| {
                    let pairs = got.iter().zip(&want);
                    pairs.filter(|&pair| !close(pair)).count() as f64 / want.len() as f64
                });
                self.record(format!("{truncation:?} {lie:?}"), others, 0.0);
            }
            // Drawn from what is left, at all heights.
            let uniforms: Vec<f64> = (0..n).map(|i| i as f64 / n as f64 + 0.013).collect();
            let ids = want.chunks(k).zip(&uniforms);
            let ids: Vec<u32> = ids.map(|(row, &u)| categorical_row(row, u)).collect();
            let got = self
                .b
                .floats(&want, &[n, k])
                .and_then(|x| B::to_indices(&B::categorical(&x, &uniforms)?));
            let others = got.map_or(f64::INFINITY, |got| {
                got.iter().zip(&ids).filter(|(a, b)| a != b).count() as f64 / n as f64
            });
            self.record(format!("drawn from {truncation:?}"), others, 0.0);
        }
    }

    fn flow_maps(&mut self) {
        let solver = FlowSolver::default();
        // A few tokens, and many: a backend may go another way with those.
        let few = [(40, 64, 4), (30, 129, 8), (20, 50, 3)];
        for (n, k, d) in few.into_iter().chain([(514, 36, 4), (513, 24, 20)]) {
            let mut logits = Host::random(&[n, k], 44, -4.0, 4.0);
            // Every third code excluded, and in the first row all but one.
            for (i, x) in logits.data.iter_mut().enumerate() {
                if i % 3 == 1 || (i < k && i != 6) {
                    *x = f64::NEG_INFINITY;
                }
            }
            let noise = Host::random(&[n, d], 45, -1.7, 1.7);
            let codes = Host::random(&[k, d], 46, -1.0, 1.0);
            let want: Vec<u32> = logits
                .to_f32()
                .chunks_exact(k)
                .zip(noise.to_f32().chunks_exact(d))
                .map(|(l, z)| flow::reference(l, z, &codes.to_f32(), 96).0 as u32)
                .collect();
            for lie in LIES {
                let got = self
                    .put_all(&[logits.clone(), noise.clone(), codes.clone()], lie)
                    .and_then(|x| B::flow_map(&x[0], &x[1], &x[2], &solver));
                self.ids(&format!("flow_map {k} x {d} {lie:?}"), got, &[n], &want);
            }
        }
    }
}

fn difference(got: &[f32], want: &Host) -> f64 {
    let scale = want.data.iter().fold(1.0f64, |m, x| m.max(x.abs())); // NaN is passed over
    got.iter()
        .zip(&want.data)
        .map(|(&g, &w)| {
            let g = f64::from(g);
            if g == w || (w.is_nan() && g.is_finite()) {
                0.0
            } else if g.is_nan() || !g.is_finite() {
                f64::INFINITY
            } else {
                (g - w).abs() / scale
            }
        })
        .fold(0.0, f64::max)
}
