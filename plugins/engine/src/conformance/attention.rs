//! Attention, rotary positions, and positions of a generation one after the other.

use super::host::{self, Host};
use super::{LAYOUTS, MemoryLayout, Suite, difference};
use crate::backend::{Backend, Mask, ReplayState};
use crate::error::Result;

impl<B: Backend> Suite<'_, B> {
    pub(super) fn rope_cached(&mut self) {
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
        for layout in LAYOUTS {
            let inputs = [&q, &k, &v, &cos, &sin].map(Host::clone);
            let got = self.put_all(&inputs, layout).and_then(|x| {
                let cache = || B::factor(&self.b.full(&[2, 6, 3, 8], 0.0)?);
                let (keys, values) = (cache()?, cache()?);
                let q = B::rope_cached(&x[0], &x[1], &x[2], &x[3], &x[4], &keys, &values, 3)?;
                Ok([q, keys, values])
            });
            match got {
                Ok(got) => {
                    for ((got, want), of) in got.into_iter().zip(&want).zip(["q", "keys", "values"])
                    {
                        self.compare(&format!("rope_cached {of} {layout:?}"), Ok(got), want, 32.0);
                    }
                }
                Err(error) => {
                    let name = format!("rope_cached {layout:?}: {error}");
                    self.record(name, f64::INFINITY, 0.0);
                }
            }
        }
    }

    pub(super) fn rope(&mut self) {
        let x = Host::random(&[2, 5, 3, 6], 36, -1.0, 1.0);
        let angle = Host::random(&[5, 3], 37, -3.0, 3.0);
        let cos = Host::build(&[5, 3], |i| angle.at(i).cos());
        let sin = Host::build(&[5, 3], |i| angle.at(i).sin());
        let want = host::rope(&x, &cos, &sin);
        self.op("rope", &[x, cos, sin], &want, 4.0, &|x| {
            B::rope(&x[0], &x[1], &x[2])
        });
    }

    pub(super) fn attentions(&mut self) {
        // (batch, queries, keys, heads, head size); large sizes, which kernels process tile by tile, only with some masks.
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
                let mask = || mask(backend, name, bias);
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

    pub(super) fn packed_attentions(&mut self) {
        // Many sequences, and few.
        for (b, l, h, d) in [(9, 5, 2, 4), (2, 7, 3, 6), (8, 1, 2, 4)] {
            let angle = Host::random(&[l, d / 2], 66, -3.0, 3.0);
            let inputs = [
                Host::random(&[b, l, 3 * h * d], 65, -2.0, 2.0),
                Host::build(&[l, d / 2], |i| angle.at(i).cos()),
                Host::build(&[l, d / 2], |i| angle.at(i).sin()),
            ];
            let causal = Host::build(&[l, l], |i| match i[1] <= i[0] {
                true => 0.0,
                false => f64::NEG_INFINITY,
            });
            // Padding in front, of another length in each sequence; a padded position sees itself.
            let padded = Host::build(&[b, 1, l, l], |i| {
                match i[3] == i[2] || (i[3] < i[2] && i[3] >= i[0] % l) {
                    true => 0.0,
                    false => f64::NEG_INFINITY,
                }
            });
            let backend = self.b;
            for (name, bias) in [
                ("full", None),
                ("causal", Some(&causal)),
                ("bias of sequences", Some(&padded)),
            ] {
                let mask = || mask(backend, name, bias);
                self.pair(
                    &format!("packed_attention {name} ({b}, {l}, {h}, {d})"),
                    &inputs,
                    128.0,
                    &|x| {
                        let part = |i: usize| {
                            host::narrow(&x[0], 2, i * h * d, h * d).reshaped(&[b, l, h, d])
                        };
                        let turned = [0, 1].map(|i| host::rope(&part(i), &x[1], &x[2]));
                        host::attention(&turned[0], &turned[1], &part(2), bias, 0.5)
                    },
                    &|x| Ok(B::packed_attention(&x[0], h, [&x[1], &x[2]], &mask()?, 0.5)?.0),
                    &|x, y, g| {
                        let (tables, mask) = ([&x[1], &x[2]], mask()?);
                        let (_, qkv) = B::packed_attention(&x[0], h, tables, &mask, 0.5)?;
                        let qkv = qkv.each_ref();
                        let dqkv = B::packed_attention_backward(qkv, tables, &mask, 0.5, y, g)?;
                        Ok(vec![dqkv])
                    },
                );
            }
        }
    }

    /// Positions of a generation in sequence, with identical operations, which the backend may record.
    pub(super) fn repeated(&mut self) {
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
                let put = |x: &Host| self.put(x, MemoryLayout::Whole);
                let cache = || B::factor(&self.b.full(&[b, n, h, d], 0.0)?);
                let (keys, values, bias) = (cache()?, cache()?, bias.map(put).transpose()?);
                let (cos, sin) = (put(&cos)?, put(&sin)?);
                let first = |x: &Host| host::narrow(x, 1, 0, 3);
                B::write_(&keys, 1, 0, &put(&first(&turned[1]))?)?;
                B::write_(&values, 1, 0, &put(&first(&vs))?)?;
                let mut kept = ReplayState::default();
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
                        // The next call overwrites it.
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
}

/// The mask of a case: all but two kinds are a bias.
fn mask<B: Backend>(backend: &B, name: &str, bias: Option<&Host>) -> Result<Mask<B::Tensor>> {
    Ok(match (name, bias) {
        (_, None) => Mask::Full,
        ("causal", _) => Mask::Causal,
        (_, Some(bias)) => Mask::Bias(backend.floats(&bias.to_f32(), &bias.shape)?),
    })
}
