//! Does a backend compute what the engine means? Every operation against plain f64 loops, every gradient against
//! finite differences; and in [`golden`] whole networks against the published code.
//!
//! In: an opened backend. Out: one [`Case`] per comparison, with its error and what was allowed. Inputs are small and of odd
//! sizes. Each is given three times: contiguous, cut out of a larger tensor, and transposed in memory, because kernels fail
//! at edges and strides. Tolerances follow the measured precision of the backend's floats. Every backend, fused or composed,
//! must pass; speed does not matter here.

mod arithmetic;
mod attention;
mod choices;
pub mod golden;
pub mod host;
mod layers;
mod tape;

use crate::backend::Backend;
use crate::error::Result;

use host::Host;

/// One comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// The operation, the shapes where they matter, and the layout of its inputs.
    pub name: String,
    /// The largest difference of an element, relative to the largest element (at least 1); infinite if the backend failed or
    /// returned another shape. For indices: the share that differs.
    pub error: f64,
    /// The greatest error allowed.
    pub tolerance: f64,
    /// Whether the error is within the tolerance.
    pub passed: bool,
    /// Whether the result depends on codes that the backend chose: a backend that rounds operands of products may choose
    /// others that are nearly as probable.
    pub chosen: bool,
}

impl Case {
    /// A comparison. It passes unless the error is NaN or exceeds the tolerance.
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
        // The factors below are for sums that round at every step; if only operands are rounded, errors are smaller.
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
    suite.rounded(Suite::packed_attentions);
    suite.rounded(Suite::repeated);
    suite.losses();
    suite.flow_maps();
    suite.choices();
    suite.tape();
    suite.tape_of_norms();
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
enum MemoryLayout {
    /// Row-major.
    Whole,
    /// Cut out of a tensor that is greater in every dimension.
    Padded,
    /// Cut out of a tensor whose dimensions are reversed.
    Transposed,
}

const LAYOUTS: [MemoryLayout; 3] = [
    MemoryLayout::Whole,
    MemoryLayout::Padded,
    MemoryLayout::Transposed,
];

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
    fn put(&self, x: &Host, layout: MemoryLayout) -> Result<B::Tensor> {
        let rank = x.shape.len();
        if layout == MemoryLayout::Whole || x.data.is_empty() {
            return self.b.floats(&x.to_f32(), &x.shape);
        }
        let reversed: Vec<usize> = (0..rank).rev().collect();
        let inner = match layout {
            MemoryLayout::Transposed => host::permute(x, &reversed),
            _ => x.clone(),
        };
        let padded: Vec<usize> = inner.shape.iter().map(|n| n + 3).collect();
        let outer = Host::build(&padded, |i| {
            let own: Option<Vec<usize>> = i
                .iter()
                .zip(&inner.shape)
                .map(|(&i, &n)| i.checked_sub(1).filter(|&i| i < n))
                .collect();
            // Elements around the cut must not affect the result.
            own.map_or(7777.0, |own| inner.at(&own))
        });
        let mut y = self.b.floats(&outer.to_f32(), &padded)?;
        for (d, &n) in inner.shape.iter().enumerate() {
            y = B::narrow(&y, d, 1, n)?;
        }
        match layout {
            MemoryLayout::Transposed => B::permute(&y, &reversed),
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

    /// One operation, with its inputs in each layout.
    fn op(
        &mut self,
        name: &str,
        inputs: &[Host],
        want: &Host,
        factor: f64,
        run: &dyn Fn(&[B::Tensor]) -> Result<B::Tensor>,
    ) {
        for layout in LAYOUTS {
            let got = self.put_all(inputs, layout).and_then(|x| run(&x));
            self.compare(&format!("{name} {layout:?}"), got, want, factor);
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
        for layout in LAYOUTS {
            let got = self.put_all(inputs, layout).and_then(|x| {
                let y = run(&x)?;
                backward(&x, &y, &self.put(&weights, layout)?)
            });
            let got = match got {
                Ok(got) => got,
                Err(error) => {
                    let name = format!("{name} backward {layout:?}: {error}");
                    self.record(name, f64::INFINITY, 0.0);
                    continue;
                }
            };
            for (i, gradient) in got.into_iter().enumerate() {
                let want = wanted[i]
                    .get_or_insert_with(|| host::gradient(truth, inputs, i, &weights))
                    .clone();
                let name = format!("{name} backward {i} {layout:?}");
                self.compare(&name, Ok(gradient), &want, factor);
            }
        }
    }

    fn put_all(&self, inputs: &[Host], layout: MemoryLayout) -> Result<Vec<B::Tensor>> {
        inputs.iter().map(|x| self.put(x, layout)).collect()
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
