//! From logits on: losses, truncation, drawn codes and the flow map.

use super::host::{self, Host};
use super::{LAYOUTS, Suite};
use crate::backend::choice::{categorical_row, truncate_row};
use crate::backend::flow;
use crate::backend::{Backend, FlowSolver, Truncation};

impl<B: Backend> Suite<'_, B> {
    pub(super) fn losses(&mut self) {
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

    /// Truncated logits and drawn codes equal the host's, also with equal logits.
    pub(super) fn choices(&mut self) {
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
            for layout in LAYOUTS {
                let got = self.put(&logits, layout);
                let got = got.and_then(|x| B::to_floats(&B::truncate(&x, &truncation)?));
                let close = |(a, b): (&f32, &f32)| {
                    a == b || (a - b).abs() <= 4.0 * (self.unit * f64::from(b.abs())) as f32
                };
                let others = got.map_or(f64::INFINITY, |got| {
                    let pairs = got.iter().zip(&want);
                    pairs.filter(|&pair| !close(pair)).count() as f64 / want.len() as f64
                });
                self.record(format!("{truncation:?} {layout:?}"), others, 0.0);
            }
            // Drawn from the remaining codes, over the whole range of numbers.
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

    pub(super) fn flow_maps(&mut self) {
        let solver = FlowSolver::default();
        // A few tokens and many, for which a backend may use another kernel.
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
            for layout in LAYOUTS {
                let got = self
                    .put_all(&[logits.clone(), noise.clone(), codes.clone()], layout)
                    .and_then(|x| B::flow_map(&x[0], &x[1], &x[2], &solver));
                self.ids(&format!("flow_map {k} x {d} {layout:?}"), got, &[n], &want);
            }
        }
    }
}
