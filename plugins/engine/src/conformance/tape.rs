//! The tape's gradients on a backend: `backward` against differences of the loss along random directions.

use super::host::Host;
use super::{MemoryLayout, Suite, difference};
use crate::backend::{Backend, Mask, Precision, Unary, Window};
use crate::error::Result;
use crate::tape::{Variable, backward};

/// A function of parameters, written as model code is.
type Model<'a, B> = &'a dyn Fn(&[Variable<B>]) -> Result<Variable<B>>;

impl<B: Backend> Suite<'_, B> {
    pub(super) fn tape(&mut self) {
        let b = self.b;
        let [x, y] = [50, 51].map(|seed| Host::random(&[3, 4, 6], seed, -1.0, 1.0));
        let one = std::slice::from_ref(&x);
        let two = [x.clone(), y];
        self.slope("reshape", one, &|p| p[0].reshape(&[6, 12]));
        self.slope("permute", one, &|p| p[0].permute(&[2, 0, 1]));
        self.slope("narrow", one, &|p| p[0].narrow(1, 1, 2));
        self.slope("slices beside each other", one, &|p| {
            let [a, b, c] = [0, 2, 4].map(|start| p[0].narrow(2, start, 2));
            a?.mul(&b?)?.add(&c?)
        });
        self.slope("slices with gaps", one, &|p| {
            p[0].narrow(2, 3, 1)?.mul(&p[0].narrow(2, 1, 1)?)
        });
        self.slope("slices that overlap, and the whole", one, &|p| {
            let (a, b) = (p[0].narrow(2, 0, 3)?, p[0].narrow(2, 2, 3)?);
            a.mul(&b)?.sum(&[2])?.add(&p[0])
        });
        self.slope("slices of two dimensions", one, &|p| {
            let (a, b) = (p[0].narrow(1, 1, 1)?, p[0].narrow(2, 5, 1)?);
            a.mul(&b)
        });
        self.slope("cat", &two, &|p| Variable::cat(&[&p[0], &p[1]], 1));
        let half = || b.full(&[3, 4, 6], 0.5).map(Variable::constant);
        self.slope("cat of a constant", one, &|p| {
            Variable::cat(&[&half()?, &p[0]], 2)
        });
        self.slope("mul by a constant", one, &|p| half()?.mul(&p[0]));
        self.slope("add", &two, &|p| p[0].add(&p[1]));
        self.slope("sub", &two, &|p| p[0].sub(&p[1]));
        self.slope("mul", &two, &|p| p[0].mul(&p[1]));
        self.slope("mul by itself", one, &|p| p[0].mul(&p[0]));
        let small = [x.clone(), Host::random(&[4, 1], 52, -1.0, 1.0)];
        self.slope("expand", &small[1..], &|p| p[0].expand(&[3, 4, 6]));
        self.slope("add, broadcast", &small, &|p| p[1].add(&p[0]));
        self.slope("sub, broadcast", &small, &|p| p[0].sub(&p[1]));
        self.slope("mul, broadcast", &small, &|p| p[1].mul(&p[0]));
        self.slope("affine", one, &|p| p[0].affine(-1.5, 0.5));
        self.slope("unary", one, &|p| p[0].unary(Unary::Tanh));
        self.slope("sum", one, &|p| p[0].sum(&[0, 2]));
        self.slope("mean", one, &|p| p[0].mean(&[1]));
        self.slope("mean_all", one, &|p| p[0].mul(&p[0])?.mean_all());

        let table = Host::random(&[5, 4], 58, -1.0, 1.0);
        self.slope("rows", &[table], &|p| {
            p[0].rows(&b.indices(&[4, 1, 4, 0], &[2, 2])?)
        });

        self.slope("softmax", one, &|p| p[0].softmax());
        let logits = Host::random(&[4, 9], 60, -2.0, 2.0);
        self.slope("cross_entropy", &[logits], &|p| {
            p[0].cross_entropy(&b.indices(&[8, 0, 3, 3], &[4])?)
        });
    }

    pub(super) fn tape_of_norms(&mut self) {
        let x = Host::random(&[3, 4, 6], 50, -1.0, 1.0);
        let one = std::slice::from_ref(&x);
        let scale = Host::random(&[6], 59, 0.5, 1.5);
        self.slope("rms_norm", &[x.clone(), scale], &|p| {
            p[0].rms_norm(&p[1], 1e-5, Precision::Storage)
        });
        let scale = Host::random(&[6], 59, 0.5, 1.5);
        self.slope(
            "rms_norm of what is used again",
            &[x.clone(), scale],
            &|p| {
                let x = p[0].affine(1.5, 0.0)?;
                let y = x.rms_norm(&p[1], 1e-5, Precision::Storage)?;
                x.add(&y)?
                    .mul(&p[0].rms_norm(&p[1], 1e-5, Precision::Storage)?)
            },
        );
        self.slope("layer_norm", one, &|p| p[0].layer_norm(1e-5));
        let [scale, shift] = [64, 65].map(|seed| Host::random(&[3, 1, 6], seed, 0.5, 1.5));
        self.alike(
            "modulated_norm",
            &[x.clone(), scale, shift],
            &|p| p[0].modulated_norm(&p[1], &p[2], 1e-5),
            &|p| p[0].layer_norm(1e-5)?.mul(&p[1])?.add(&p[2]),
        );
        let [scale, shift] = [64, 65].map(|seed| Host::random(&[3, 1, 6], seed, 0.5, 1.5));
        self.alike(
            "modulated_norm of what is used again",
            &[x.clone(), scale, shift],
            &|p| {
                let x = p[0].affine(1.5, 0.0)?;
                x.modulated_norm(&p[1], &p[2], 1e-5)?.add(&x)
            },
            &|p| {
                let x = p[0].affine(1.5, 0.0)?;
                x.add(&x.layer_norm(1e-5)?.mul(&p[1])?.add(&p[2])?)
            },
        );
        let gate = Host::random(&[3, 1, 6], 66, 0.5, 1.5);
        let terms = [x.clone(), x.clone(), gate, x.clone()];
        self.alike(
            "gated_add",
            &terms,
            &|p| p[0].gated_add(&p[1], &p[2], Some(&p[3])),
            &|p| p[0].add(&p[1].mul(&p[2])?)?.add(&p[3]),
        );
        let heads = Host::random(&[2, 3, 2, 4], 67, -1.0, 1.0);
        let length = Host::random(&[2], 68, 0.5, 1.5);
        let by = |p: &[Variable<B>]| p[1].reshape(&[2, 1]);
        self.alike(
            "unit",
            &[heads.clone(), length],
            &|p| p[0].unit(Some(&p[1])),
            &|p| p[0].l2_normalise()?.mul(&by(p)?),
        );
        self.alike(
            "unit without lengths",
            &[heads],
            &|p| p[0].unit(None),
            &|p| p[0].l2_normalise(),
        );
        self.alike(
            "activation",
            one,
            &|p| p[0].activation(Unary::GeluTanh, Precision::Factor),
            &|p| p[0].unary(Unary::GeluTanh),
        );
        let image = Host::random(&[2, 4, 5, 5], 61, -1.0, 1.0);
        let norm = [62, 63].map(|seed| Host::random(&[4], seed, 0.5, 1.5));
        let inputs = [image.clone(), norm[0].clone(), norm[1].clone()];
        self.slope("group_norm", &inputs, &|p| {
            p[0].group_norm(2, &p[1], &p[2], 1e-5)
        });
        self.slope("group_norm_silu", &inputs, &|p| {
            p[0].group_norm_silu(2, &p[1], &p[2], 1e-5)
        });
        self.slope("group_norm_silu of what is used again", &inputs, &|p| {
            let x = p[0].affine(1.5, 0.0)?;
            x.group_norm_silu(2, &p[1], &p[2], 1e-5)?.add(&x)
        });
        let window = Window {
            size: 2,
            stride: 2,
            padding: 0,
        };
        self.slope("max_pool2d", std::slice::from_ref(&image), &|p| {
            p[0].max_pool2d(window)
        });
    }

    pub(super) fn tape_of_products(&mut self) {
        let b = self.b;
        let left = Host::random(&[3, 5, 6], 53, -1.0, 1.0);
        let gated = std::slice::from_ref(&left);
        self.slope("swiglu", gated, &|p| p[0].swiglu());
        let right = Host::random(&[3, 6, 4], 54, -1.0, 1.0);
        self.slope("matmul", &[left.clone(), right], &|p| {
            p[0].matmul(&p[1], false)
        });
        let right = Host::random(&[3, 4, 6], 55, -1.0, 1.0);
        self.slope("matmul, transposed", &[left.clone(), right], &|p| {
            p[0].matmul(&p[1], true)
        });
        let w = Host::random(&[7, 6], 56, -1.0, 1.0);
        let bias = Host::random(&[7], 57, -1.0, 1.0);
        self.slope("linear", &[left, w, bias], &|p| {
            p[0].linear(&p[1], Some(&p[2]))
        });
        let image = Host::random(&[2, 4, 5, 5], 61, -1.0, 1.0);
        let kernel = Host::random(&[3, 4, 3, 3], 64, -0.5, 0.5);
        let bias = Host::random(&[3], 65, -1.0, 1.0);
        self.slope("conv2d", &[image.clone(), kernel.clone()], &|p| {
            p[0].conv2d(&p[1], 2, [1, 0])
        });
        let three = [image.clone(), kernel.clone(), bias.clone()];
        self.slope("conv2d_upsampled", &three, &|p| {
            p[0].conv2d_upsampled(&p[1], &p[2], [1, 0])
        });
        let residual = Host::random(&[2, 3, 3, 2], 63, -1.0, 1.0);
        self.slope("conv2d_bias", &[image, kernel, bias, residual], &|p| {
            p[0].conv2d_bias(&p[1], &p[2], Some(&p[3]), 2, [1, 0])
        });

        let qkv = [66, 67, 68].map(|seed| Host::random(&[2, 5, 2, 4], seed, -1.0, 1.0));
        self.slope("attention", &qkv, &|p| {
            Variable::attention(&p[0], &p[1], &p[2], &Mask::Causal, 0.5)
        });
        let packed = Host::random(&[2, 5, 24], 69, -1.0, 1.0);
        let angle = Host::random(&[5, 2], 70, -3.0, 3.0);
        self.slope("packed_attention", &[packed], &|p| {
            let table = |f: &dyn Fn(f64) -> f64| {
                b.floats(&Host::build(&[5, 2], |i| f(angle.at(i))).to_f32(), &[5, 2])
            };
            let rope = (table(&f64::cos)?, table(&f64::sin)?);
            p[0].packed_attention(2, &rope, &Mask::Causal, 0.5)
        });
    }

    /// A node whose result may be rounded, which would disturb differences: its gradients are compared with those of other
    /// nodes.
    fn alike(&mut self, name: &str, params: &[Host], model: Model<'_, B>, other: Model<'_, B>) {
        let name = format!("tape: {name}");
        let found = self.gradients(params, model);
        let found = found.and_then(|(found, _)| Ok((found, self.gradients(params, other)?.0)));
        match found {
            Ok((found, wanted)) => {
                for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                    let wanted = Host::build(&[wanted.len()], |at| f64::from(wanted[at[0]]));
                    let error = difference(found, &wanted);
                    self.record(format!("{name} {i}"), error, 64.0 * self.unit);
                }
            }
            Err(error) => self.record(format!("{name}: {error}"), f64::INFINITY, 0.0),
        }
    }

    /// The gradient of `sum(weights * model(params))` along directions, against central differences.
    fn slope(&mut self, name: &str, params: &[Host], model: Model<'_, B>) {
        let name = format!("tape: {name}");
        // In differences of rounded values the rounding error is divided by the step.
        let (h, tolerance) = (self.unit.cbrt(), 60.0 * self.unit.powf(2.0 / 3.0));
        match self.slope_error(params, model, h) {
            Ok(error) => self.record(name, error, tolerance),
            Err(error) => self.record(format!("{name}: {error}"), f64::INFINITY, tolerance),
        }
    }

    /// Gradients of the sum of a model's outputs, weighted at random, and the weights.
    fn gradients(&self, params: &[Host], model: Model<'_, B>) -> Result<(Vec<Vec<f32>>, Host)> {
        let leaves: Vec<(String, Variable<B>)> = params
            .iter()
            .enumerate()
            .map(|(i, p)| {
                Ok((
                    format!("{i}"),
                    Variable::parameter(self.put(p, MemoryLayout::Whole)?),
                ))
            })
            .collect::<Result<_>>()?;
        let vars: Vec<Variable<B>> = leaves.iter().map(|(_, v)| v.clone()).collect();
        let y = model(&vars)?;
        drop(vars);
        let shape = y.shape();
        let weights = Host::random(&shape, 71, -1.0, 1.0);
        let dims: Vec<usize> = (0..shape.len()).collect();
        let loss = y
            .mul(&Variable::constant(
                self.put(&weights, MemoryLayout::Whole)?,
            ))?
            .sum(&dims)?;
        drop(y);
        let gradients = backward(loss, &leaves)?;
        let gradients: Result<_> = gradients.iter().map(B::to_floats).collect();
        Ok((gradients?, weights))
    }

    fn slope_error(&self, params: &[Host], model: Model<'_, B>, h: f64) -> Result<f64> {
        let (gradients, weights) = self.gradients(params, model)?;
        let value = |at: &[Host]| -> Result<f64> {
            let vars: Vec<Variable<B>> = at
                .iter()
                .map(|p| Ok(Variable::constant(self.put(p, MemoryLayout::Whole)?)))
                .collect::<Result<_>>()?;
            let y = B::to_floats(model(&vars)?.value())?;
            Ok(y.iter()
                .zip(&weights.data)
                .map(|(&y, w)| f64::from(y) * w)
                .sum())
        };
        let mut worst = 0.0f64;
        for seed in 0..4 {
            let along: Vec<Host> = params
                .iter()
                .enumerate()
                .map(|(i, p)| Host::random(&p.shape, 100 + 10 * seed + i as u64, -1.0, 1.0))
                .collect();
            let moved = |sign: f64| -> Vec<Host> {
                params
                    .iter()
                    .zip(&along)
                    .map(|(p, u)| Host::build(&p.shape, |i| p.at(i) + sign * h * u.at(i)))
                    .collect()
            };
            let measured = (value(&moved(1.0))? - value(&moved(-1.0))?) / (2.0 * h);
            let computed: f64 = gradients
                .iter()
                .zip(&along)
                .flat_map(|(g, u)| g.iter().zip(&u.data))
                .map(|(&g, u)| f64::from(g) * u)
                .sum();
            worst = worst.max((measured - computed).abs() / measured.abs().max(1.0));
        }
        Ok(worst)
    }
}
