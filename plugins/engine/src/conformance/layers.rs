//! Operations of layers: products, tables, convolutions, pools, norms and factors of products.

use super::host::{self, Host};
use super::{MemoryLayout, Suite};
use crate::backend::{Backend, Binary, Precision, Unary, Window};

impl<B: Backend> Suite<'_, B> {
    pub(super) fn products(&mut self) {
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

    pub(super) fn tables(&mut self) {
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

    pub(super) fn convolutions(&mut self) {
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
            // More padding than the kernel's reach.
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

    pub(super) fn upsampled(&mut self) {
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

    pub(super) fn pools(&mut self) {
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
            // All negative, so that padding would show in the result.
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
        // Among equals the first gets the gradient.
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
        let got = self.put(&ties, MemoryLayout::Whole).and_then(|x| {
            B::max_pool2d_backward(&x, &self.b.floats(&[3.0, 5.0], &[1, 1, 1, 2])?, window)
        });
        self.compare("max_pool2d backward of equals", got, &want, 0.0);
    }

    /// Operations whose results only products read.
    pub(super) fn factors(&mut self) {
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
        self.op("rms_norm as a factor", &[x, w], &want, 128.0, &|x| {
            B::rms_norm(&x[0], &x[1], 1e-5, Precision::Factor)
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
        self.op("activation as a factor", &[x], &want, 32.0, &|x| {
            B::activation(&x[0], Unary::GeluTanh, Precision::Factor)
        });
        self.modulations();
        self.rope_cached();
    }

    fn modulations(&mut self) {
        // Lengths of rows that are not, and that are, whole vectors.
        for c in [37, 64] {
            let inputs = [
                Host::random(&[3, 4, c], 70, -1.0, 1.5),
                Host::random(&[3, 1, c], 71, -1.5, 1.5),
                Host::random(&[3, 1, c], 72, -1.5, 1.5),
            ];
            let truth = |x: &[Host]| {
                let normal = host::layer_norm(&x[0], 1e-5);
                Host::build(&x[0].shape, |i| {
                    normal.at(i) * x[1].at(&[i[0], 0, i[2]]) + x[2].at(&[i[0], 0, i[2]])
                })
            };
            self.pair(
                &format!("modulated_norm {c}"),
                &inputs,
                128.0,
                &truth,
                &|x| B::modulated_norm(&x[0], &x[1], &x[2], 1e-5),
                &|x, _, g| {
                    let (dx, dscale, dshift) = B::modulated_norm_backward(&x[0], &x[1], g, 1e-5)?;
                    Ok(vec![dx, dscale, dshift])
                },
            );
            let known = Host::random(&[3, 4, c], 80, -1.0, 1.0);
            let inputs = [inputs.as_slice(), &[known]].concat();
            self.pair(
                &format!("modulated_norm {c}, adding"),
                &inputs,
                128.0,
                &truth,
                &|x| B::modulated_norm(&x[0], &x[1], &x[2], 1e-5),
                &|x, _, g| {
                    let (dx, dscale, dshift) =
                        B::modulated_norm_backward_adding(&x[0], &x[1], g, 1e-5, Some(&x[3]))?;
                    let dx = B::binary(&dx, &x[3], Binary::Sub)?;
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
    }

    pub(super) fn norms(&mut self) {
        for d in [5, 32, 97] {
            let x = Host::random(&[2, 3, d], 31, -1.0, 1.5);
            let w = Host::random(&[d], 32, 0.5, 1.5);
            self.pair(
                &format!("rms_norm {d}"),
                &[x.clone(), w],
                128.0,
                &|x| host::rms_norm(&x[0], &x[1], 1e-5),
                &|x| B::rms_norm(&x[0], &x[1], 1e-5, Precision::Storage),
                &|x, _, g| {
                    let (dx, dw) = B::rms_norm_backward(&x[0], &x[1], g, 1e-5)?;
                    Ok(vec![dx, dw])
                },
            );
            let known = Host::random(&x.shape, 36, -1.0, 1.0);
            let inputs = [x.clone(), Host::random(&[d], 32, 0.5, 1.5), known];
            self.pair(
                &format!("rms_norm {d}, adding"),
                &inputs,
                128.0,
                &|x| host::rms_norm(&x[0], &x[1], 1e-5),
                &|x| B::rms_norm(&x[0], &x[1], 1e-5, Precision::Storage),
                &|x, _, g| {
                    let (dx, dw) = B::rms_norm_backward_adding(&x[0], &x[1], g, 1e-5, Some(&x[2]))?;
                    let dx = B::binary(&dx, &x[2], Binary::Sub)?;
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
            let known = Host::random(&shape, 37, -1.0, 1.0);
            for is_known in [false, true] {
                let mut inputs = inputs.to_vec();
                inputs.push(known.clone());
                self.pair(
                    &format!("group_norm_silu {shape:?} in {groups}, adding {is_known}"),
                    &inputs,
                    128.0,
                    &|x| {
                        let normal = host::group_norm(&x[0], groups, &x[1], &x[2], 1e-6);
                        host::unary(&normal, Unary::Silu)
                    },
                    &|x| B::group_norm_silu(&x[0], groups, &x[1], &x[2], 1e-6),
                    &|x, y, g| {
                        let (affine, known) = ([&x[1], &x[2]], is_known.then_some(&x[3]));
                        let (dx, dw, db) =
                            B::group_norm_silu_backward(&x[0], groups, affine, y, g, 1e-6, known)?;
                        let dx = match known {
                            Some(known) => B::binary(&dx, known, Binary::Sub)?,
                            None => dx,
                        };
                        Ok(vec![dx, dw, db])
                    },
                );
            }
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
}
