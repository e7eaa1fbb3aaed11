//! Operations on elements: movement, arithmetic, reductions, activations, and writing in place.

use super::host::{self, Host};
use super::{LAYOUTS, MemoryLayout, Suite};
use crate::backend::{AdamwStep, Backend, Binary, Unary};

impl<B: Backend> Suite<'_, B> {
    pub(super) fn movement(&mut self) {
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
        let beside = got.and_then(|x| B::of(&x).full(&[2, 3], 0.5));
        self.compare("full", beside, &full, 0.0);
    }

    pub(super) fn elementwise(&mut self) {
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

    pub(super) fn reductions(&mut self) {
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
        let want = Host::build(&[1], |_| x.data.iter().map(|x| x * x).sum());
        self.op("sum_of_squares", one, &want, 64.0, &|x| {
            B::sum_of_squares(&x[0])
        });
        let blocks = Host::random(&[5, 3, 2, 7, 2], 7, -1.0, 1.0);
        let want = host::sum(&blocks, &[2, 4]);
        self.op("sum of blocks", &[blocks], &want, 4.0, &|x| {
            B::sum(&x[0], &[2, 4])
        });
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
        for layout in LAYOUTS {
            let got = self.put(&ties, layout).and_then(|x| B::argmax_last(&x));
            self.ids(&format!("argmax_last {layout:?}"), got, &[5, 3], &want);
        }
    }

    pub(super) fn in_place(&mut self) {
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
        for layout in LAYOUTS {
            // The target is whole, as parameters and caches are; the clone must see what is written.
            let wrote = self.put(&x, MemoryLayout::Whole).and_then(|x| {
                let seen = x.clone();
                B::write_(&x, 1, 2, &self.put(&src, layout)?)?;
                Ok(seen)
            });
            self.compare(&format!("write_ {layout:?}"), wrote, &want, 0.0);
            let assigned = self.put(&x, MemoryLayout::Whole).and_then(|x| {
                let seen = x.clone();
                B::assign_(&x, &self.put(&other, layout)?)?;
                Ok(seen)
            });
            self.compare(&format!("assign_ {layout:?}"), assigned, &other, 0.0);
            let averaged = self.put(&x, MemoryLayout::Whole).and_then(|x| {
                let seen = x.clone();
                B::ema_(&x, &self.put(&other, layout)?, 0.75)?;
                Ok(seen)
            });
            let mean = Host::build(&x.shape, |i| 0.75 * x.at(i) + 0.25 * other.at(i));
            self.compare(&format!("ema_ {layout:?}"), averaged, &mean, 4.0);
            self.adamw(layout, false);
            self.adamw(layout, true);
        }
    }

    /// AdamW alone, or with the parameter's average.
    pub(super) fn adamw(&mut self, layout: MemoryLayout, is_averaged: bool) {
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
        let average = Host::random(&shape, 29, -1.0, 1.0);
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
        let (name, average1) = match is_averaged {
            true => (
                "adamw_averaged_",
                each(&|i| 0.75 * average.data[i] + 0.25 * p1.data[i]),
            ),
            false => ("adamw_", average.clone()),
        };
        let run = || {
            let put = |x| self.put(x, MemoryLayout::Whole);
            let (p, m, v, average) = (put(&p)?, put(&m)?, put(&v)?, put(&average)?);
            let seen = [p.clone(), m.clone(), v.clone(), average.clone()];
            let g = self.put(&g, layout)?;
            match is_averaged {
                true => B::adamw_averaged_(&p, &m, &v, &g, &step, &average, 0.75)?,
                false => B::adamw_(&p, &m, &v, &g, &step)?,
            }
            Ok::<_, crate::Error>(seen)
        };
        match run() {
            Ok([p, m, v, average]) => {
                self.compare(&format!("{name} p {layout:?}"), Ok(p), &p1, 16.0);
                self.compare(&format!("{name} m {layout:?}"), Ok(m), &m1, 4.0);
                self.compare(&format!("{name} v {layout:?}"), Ok(v), &v1, 4.0);
                let name = format!("{name} average {layout:?}");
                self.compare(&name, Ok(average), &average1, 16.0);
            }
            Err(error) => self.record(format!("{name} {layout:?}: {error}"), f64::INFINITY, 0.0),
        }
    }

    pub(super) fn activations(&mut self) {
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
            let got = self
                .put(&far, MemoryLayout::Whole)
                .and_then(|x| B::unary(&x, f));
            self.compare(&format!("{f:?} far out"), got, &want, 4.0);
            let slope = host::gradient(
                &|x| host::unary(&x[0], f),
                std::slice::from_ref(&far),
                0,
                &Host::build(&[8], |_| 1.0),
            );
            let got = self.put(&far, MemoryLayout::Whole).and_then(|x| {
                let ones = self.b.full(&[8], 1.0)?;
                B::unary_backward(&x, &B::unary(&x, f)?, &ones, f)
            });
            // At 0 the slope of relu is a convention: both one-sided slopes are accepted.
            if f != Unary::Relu {
                self.compare(&format!("{f:?} backward far out"), got, &slope, 64.0);
            }
        }
    }
}
