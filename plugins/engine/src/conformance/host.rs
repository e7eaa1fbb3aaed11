//! The operations as plain loops over f64 on the host: the reference for a backend's results.
//!
//! Slow and obvious on purpose. Gradients are central differences of these functions, so that no derivative is written
//! down twice.

use crate::backend::{Binary, Unary, Window};

/// A row-major array of f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub data: Vec<f64>,
}

impl Host {
    /// An array whose element at an index is `f(index)`.
    pub fn build(shape: &[usize], mut f: impl FnMut(&[usize]) -> f64) -> Self {
        let count: usize = shape.iter().product();
        let data = (0..count).map(|flat| f(&unravel(flat, shape))).collect();
        Self {
            shape: shape.to_vec(),
            data,
        }
    }

    /// Pseudo-random elements in [low, high), rounded to f32 so that a backend can hold them exactly.
    pub fn random(shape: &[usize], seed: u64, low: f64, high: f64) -> Self {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self::build(shape, |_| {
            // splitmix64
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            let unit = ((z ^ (z >> 31)) >> 40) as f64 / (1u64 << 24) as f64;
            f64::from((low + (high - low) * unit) as f32)
        })
    }

    /// The element at an index.
    pub fn at(&self, index: &[usize]) -> f64 {
        self.data[ravel(index, &self.shape)]
    }

    /// The element that NumPy's broadcasting reads at an index of a shape of the same or higher rank.
    pub fn broadcast_at(&self, index: &[usize]) -> f64 {
        let lead = index.len() - self.shape.len();
        let own: Vec<usize> = index[lead..]
            .iter()
            .zip(&self.shape)
            .map(|(&i, &n)| if n == 1 { 0 } else { i })
            .collect();
        self.at(&own)
    }

    /// Same elements, other shape.
    pub fn reshaped(&self, shape: &[usize]) -> Self {
        Self {
            shape: shape.to_vec(),
            data: self.data.clone(),
        }
    }

    /// Elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        self.data.iter().map(|&x| x as f32).collect()
    }

    fn last(&self) -> usize {
        *self.shape.last().expect("rank >= 1")
    }

    /// A function of each row of the last dimension.
    fn map_rows(&self, f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
        self.data.chunks_exact(self.last()).flat_map(f).collect()
    }
}

/// The index of a row-major position.
pub fn unravel(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (i, &n) in index.iter_mut().zip(shape).rev() {
        *i = flat % n;
        flat /= n;
    }
    index
}

fn ravel(index: &[usize], shape: &[usize]) -> usize {
    index
        .iter()
        .zip(shape)
        .fold(0, |flat, (&i, &n)| flat * n + i)
}

/// Gradient of the sum of `weights * f(inputs)` for input `which`, by central differences at up to 61 elements spread over
/// the input; NaN marks the others, which are not tested.
pub fn gradient(
    f: &dyn Fn(&[Host]) -> Host,
    inputs: &[Host],
    which: usize,
    weights: &Host,
) -> Host {
    let loss = |inputs: &[Host]| -> f64 {
        let y = f(inputs);
        y.data.iter().zip(&weights.data).map(|(y, w)| y * w).sum()
    };
    let mut moved = inputs.to_vec();
    let count = inputs[which].data.len();
    let mut data = vec![f64::NAN; count];
    // A stride that shares no factor with common sizes reaches every row and every column in turn.
    for n in 0..count.min(61) {
        let i = if count <= 61 { n } else { n * 1009 % count };
        let (x, h) = (inputs[which].data[i], 1e-5);
        moved[which].data[i] = x + h;
        let up = loss(&moved);
        moved[which].data[i] = x - h;
        let down = loss(&moved);
        moved[which].data[i] = x;
        data[i] = (up - down) / (2.0 * h);
    }
    Host {
        shape: inputs[which].shape.clone(),
        data,
    }
}

/// The error function by its series of positive terms.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-18 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}

/// One element-wise function at one point.
pub fn unary_at(x: f64, f: Unary) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match f {
        Unary::Exp => x.exp(),
        Unary::Log => x.ln(),
        Unary::Sqrt => x.sqrt(),
        Unary::Square => x * x,
        Unary::Recip => 1.0 / x,
        Unary::Tanh => x.tanh(),
        Unary::Sigmoid => sigmoid(x),
        Unary::Erf => erf(x),
        Unary::Silu => x * sigmoid(x),
        Unary::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + u.tanh())
        }
        Unary::GeluErf => 0.5 * x * (1.0 + erf(x * 0.5f64.sqrt())),
        Unary::Relu => x.max(0.0),
    }
}

/// `Tensors::unary`
pub fn unary(x: &Host, f: Unary) -> Host {
    Host::build(&x.shape, |i| unary_at(x.at(i), f))
}

/// `Tensors::binary`
pub fn binary(a: &Host, b: &Host, f: Binary) -> Host {
    let rank = a.shape.len().max(b.shape.len());
    let size = |x: &Host, d: usize| {
        let lead = rank - x.shape.len();
        if d < lead { 1 } else { x.shape[d - lead] }
    };
    let shape: Vec<usize> = (0..rank).map(|d| size(a, d).max(size(b, d))).collect();
    Host::build(&shape, |i| {
        let (a, b) = (a.broadcast_at(i), b.broadcast_at(i));
        match f {
            Binary::Add => a + b,
            Binary::Sub => a - b,
            Binary::Mul => a * b,
            Binary::Div => a / b,
            Binary::Max => a.max(b),
        }
    })
}

/// `Tensors::permute`
pub fn permute(x: &Host, dims: &[usize]) -> Host {
    let shape: Vec<usize> = dims.iter().map(|&d| x.shape[d]).collect();
    Host::build(&shape, |i| {
        let mut own = vec![0; dims.len()];
        for (&at, &d) in i.iter().zip(dims) {
            own[d] = at;
        }
        x.at(&own)
    })
}

/// `Tensors::narrow`
pub fn narrow(x: &Host, dim: usize, start: usize, len: usize) -> Host {
    let mut shape = x.shape.clone();
    shape[dim] = len;
    Host::build(&shape, |i| {
        let mut own = i.to_vec();
        own[dim] += start;
        x.at(&own)
    })
}

/// `Tensors::cat`
pub fn cat(a: &Host, b: &Host, dim: usize) -> Host {
    let mut shape = a.shape.clone();
    shape[dim] += b.shape[dim];
    Host::build(&shape, |i| {
        if i[dim] < a.shape[dim] {
            a.at(i)
        } else {
            let mut own = i.to_vec();
            own[dim] -= a.shape[dim];
            b.at(&own)
        }
    })
}

/// `Tensors::expand`
pub fn expand(x: &Host, shape: &[usize]) -> Host {
    Host::build(shape, |i| x.broadcast_at(i))
}

/// `Tensors::sum`
pub fn sum(x: &Host, dims: &[usize]) -> Host {
    let mut shape = x.shape.clone();
    dims.iter().for_each(|&d| shape[d] = 1);
    let mut y = Host::build(&shape, |_| 0.0);
    for (flat, value) in x.data.iter().enumerate() {
        let mut index = unravel(flat, &x.shape);
        dims.iter().for_each(|&d| index[d] = 0);
        y.data[ravel(&index, &shape)] += value;
    }
    y
}

/// `Tensors::matmul`
pub fn matmul(a: &Host, b: &Host, ta: bool, tb: bool) -> Host {
    let turned = |x: &Host, turn: bool| {
        let rank = x.shape.len();
        let mut dims: Vec<usize> = (0..rank).collect();
        if turn {
            dims.swap(rank - 1, rank - 2);
        }
        permute(x, &dims)
    };
    let (a, b) = (turned(a, ta), turned(b, tb));
    let rank = a.shape.len();
    let k = a.shape[rank - 1];
    let mut shape = a.shape.clone();
    shape[rank - 1] = b.shape[rank - 1];
    Host::build(&shape, |i| {
        (0..k)
            .map(|j| {
                let (mut left, mut right) = (i.to_vec(), i.to_vec());
                left[rank - 1] = j;
                right[rank - 2] = j;
                a.at(&left) * b.at(&right)
            })
            .sum()
    })
}

/// `Layers::linear`
pub fn linear(x: &Host, w: &Host, bias: Option<&Host>) -> Host {
    let mut shape = x.shape.clone();
    *shape.last_mut().expect("rank >= 1") = w.shape[0];
    let data = x.map_rows(|row| {
        (0..w.shape[0])
            .map(|o| {
                let dot: f64 = row.iter().enumerate().map(|(i, x)| x * w.at(&[o, i])).sum();
                dot + bias.map_or(0.0, |b| b.data[o])
            })
            .collect()
    });
    Host { shape, data }
}

/// `Tensors::conv2d`
pub fn conv2d(x: &Host, w: &Host, stride: usize, padding: [usize; 2]) -> Host {
    let out = |d: usize| (x.shape[d] + 2 * padding[d - 2] - w.shape[d]) / stride + 1;
    let (kh, kw) = (w.shape[2], w.shape[3]);
    let shape = [x.shape[0], w.shape[0], out(2), out(3)];
    Host::build(&shape, |i| {
        let mut total = 0.0;
        for c in 0..x.shape[1] {
            for dy in 0..kh {
                for dx in 0..kw {
                    let (y, xx) = (i[2] * stride + dy, i[3] * stride + dx);
                    let inside = |at: usize, d: usize| {
                        at.checked_sub(padding[d - 2]).filter(|&at| at < x.shape[d])
                    };
                    if let (Some(y), Some(xx)) = (inside(y, 2), inside(xx, 3)) {
                        total += x.at(&[i[0], c, y, xx]) * w.at(&[i[1], c, dy, dx]);
                    }
                }
            }
        }
        total
    })
}

/// `Layers::max_pool2d`
pub fn max_pool2d(x: &Host, window: Window) -> Host {
    let count = |d: usize| window.count(x.shape[d]);
    Host::build(&[x.shape[0], x.shape[1], count(2), count(3)], |i| {
        let range = |i: usize, d: usize| {
            let first = i * window.stride;
            first.saturating_sub(window.padding)
                ..(first + window.size - window.padding).min(x.shape[d])
        };
        range(i[2], 2)
            .flat_map(|y| range(i[3], 3).map(move |xx| (y, xx)))
            .map(|(y, xx)| x.at(&[i[0], i[1], y, xx]))
            .fold(f64::NEG_INFINITY, f64::max)
    })
}

/// `Layers::softmax`
pub fn softmax(x: &Host) -> Host {
    Host {
        shape: x.shape.clone(),
        data: x.map_rows(softmax_row),
    }
}

fn softmax_row(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
    let total: f64 = e.iter().sum();
    e.iter().map(|e| e / total).collect()
}

/// `Norms::rms_norm`
pub fn rms_norm(x: &Host, w: &Host, eps: f64) -> Host {
    let data = x.map_rows(|row| {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let r = 1.0 / (mean + eps).sqrt();
        row.iter().zip(&w.data).map(|(x, w)| x * r * w).collect()
    });
    Host {
        shape: x.shape.clone(),
        data,
    }
}

/// `Norms::layer_norm`
pub fn layer_norm(x: &Host, eps: f64) -> Host {
    let data = x.map_rows(|row| {
        let n = row.len() as f64;
        let mean = row.iter().sum::<f64>() / n;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
        let r = 1.0 / (variance + eps).sqrt();
        row.iter().map(|x| (x - mean) * r).collect()
    });
    Host {
        shape: x.shape.clone(),
        data,
    }
}

/// `Norms::group_norm`
pub fn group_norm(x: &Host, groups: usize, w: &Host, bias: &Host, eps: f64) -> Host {
    let size = x.data.len() / (x.shape[0] * groups);
    let y = layer_norm(&x.reshaped(&[x.shape[0] * groups, size]), eps).reshaped(&x.shape);
    Host::build(&x.shape, |i| y.at(i) * w.data[i[1]] + bias.data[i[1]])
}

/// `Attention::rope`
pub fn rope(x: &Host, cos: &Host, sin: &Host) -> Host {
    Host::build(&x.shape, |i| {
        let pair = i[3] / 2;
        let at = |d: usize| x.at(&[i[0], i[1], i[2], d]);
        let (c, s) = (cos.at(&[i[1], pair]), sin.at(&[i[1], pair]));
        let (a, b) = (at(2 * pair), at(2 * pair + 1));
        if i[3] % 2 == 0 {
            a * c - b * s
        } else {
            a * s + b * c
        }
    })
}

/// `Attention::attention`; the bias is (lq, lk).
pub fn attention(q: &Host, k: &Host, v: &Host, bias: Option<&Host>, scale: f64) -> Host {
    let (lq, lk, heads, d) = (q.shape[1], k.shape[1], q.shape[2], q.shape[3]);
    let at = |b: usize, l: usize, i: usize, h: usize| ((b * l + i) * heads + h) * d;
    let mut y = vec![0.0; q.data.len()];
    for b in 0..q.shape[0] {
        for h in 0..heads {
            for i in 0..lq {
                let query = &q.data[at(b, lq, i, h)..][..d];
                let scores: Vec<f64> = (0..lk)
                    .map(|j| {
                        let key = &k.data[at(b, lk, j, h)..][..d];
                        let dot: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                        scale * dot + bias.map_or(0.0, |x| x.broadcast_at(&[b, h, i, j]))
                    })
                    .collect();
                let out = &mut y[at(b, lq, i, h)..][..d];
                for (j, p) in softmax_row(&scores).into_iter().enumerate() {
                    let value = &v.data[at(b, lk, j, h)..][..d];
                    out.iter_mut().zip(value).for_each(|(y, v)| *y += p * v);
                }
            }
        }
    }
    Host {
        shape: q.shape.clone(),
        data: y,
    }
}

/// `Layers::swiglu`
pub fn swiglu(x: &Host) -> Host {
    let d = x.last() / 2;
    let mut shape = x.shape.clone();
    *shape.last_mut().expect("rank >= 1") = d;
    let data = x.map_rows(|row| {
        (0..d)
            .map(|i| unary_at(row[i], Unary::Silu) * row[d + i])
            .collect()
    });
    Host { shape, data }
}

/// `Layers::cross_entropy`
pub fn cross_entropy(logits: &Host, ids: &[u32]) -> Host {
    let data: Vec<f64> = logits
        .data
        .chunks_exact(logits.last())
        .zip(ids)
        .map(|(row, &id)| -softmax_row(row)[id as usize].ln())
        .collect();
    Host {
        shape: vec![data.len()],
        data,
    }
}
