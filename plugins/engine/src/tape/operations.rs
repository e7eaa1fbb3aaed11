//! The operations on variables: each computes its value and defines its backward function.

use std::collections::BTreeMap;

use super::Variable;
use super::gradient::Gradient;
use crate::backend::{
    Backend, Binary, Mask, Precision, Unary, Window, root_mean_square, upsample2,
};
use crate::error::Result;

impl<B: Backend> Variable<B> {
    /// Same elements, other shape.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        let before = self.shape();
        Ok(Self::from_op(
            B::reshape(&self.value, shape)?,
            &[self],
            move |g| Ok(vec![Some(B::reshape(g, &before)?)]),
        ))
    }

    /// Dimension i of the result is dimension `dims[i]`.
    pub fn permute(&self, dims: &[usize]) -> Result<Self> {
        let mut inverse = vec![0; dims.len()];
        for (i, &d) in dims.iter().enumerate() {
            inverse[d] = i;
        }
        Ok(Self::from_op(
            B::permute(&self.value, dims)?,
            &[self],
            move |g| Ok(vec![Some(B::permute(g, &inverse)?)]),
        ))
    }

    /// Elements start..start+len of a dimension.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        let before = self.shape();
        if len == before[dim] {
            return Ok(self.clone());
        }
        let value = B::narrow(&self.value, dim, start, len)?;
        let vjp = move |g: &B::Tensor, _: Option<&B::Tensor>| {
            let (shape, slices) = (before, BTreeMap::from([(start, g.clone())]));
            let gradient = Gradient::Slices { shape, dim, slices };
            // An empty slice has none, and would replace a longer one with the same start.
            Ok(vec![(len > 0).then_some(gradient)])
        };
        Ok(Self::made(value, &[self], Box::new(vjp), false))
    }

    /// Concatenates tensors along a dimension.
    pub fn cat(xs: &[&Variable<B>], dim: usize) -> Result<Self> {
        let values: Vec<&B::Tensor> = xs.iter().map(|x| &x.value).collect();
        let sizes: Vec<(usize, bool)> = xs.iter().map(|x| (x.shape()[dim], x.wants())).collect();
        Ok(Self::from_op(B::cat(&values, dim)?, xs, move |g| {
            let mut start = 0;
            sizes
                .iter()
                .map(|&(len, wanted)| {
                    start += len;
                    wanted
                        .then(|| B::narrow(g, dim, start - len, len))
                        .transpose()
                })
                .collect()
        }))
    }

    /// Broadcasts to a shape.
    pub fn expand(&self, shape: &[usize]) -> Result<Self> {
        let before = self.shape();
        Ok(Self::from_op(
            B::expand(&self.value, shape)?,
            &[self],
            move |g| Ok(vec![Some(sum_to::<B>(g.clone(), &before)?)]),
        ))
    }

    /// A function of each element.
    pub fn unary(&self, f: Unary) -> Result<Self> {
        Ok(self.mapped(B::unary(&self.value, f)?, f))
    }

    /// The same in a precision.
    pub fn activation(&self, f: Unary, precision: Precision) -> Result<Self> {
        Ok(self.mapped(B::activation(&self.value, f, precision)?, f))
    }

    fn mapped(&self, y: B::Tensor, f: Unary) -> Self {
        let (x, kept) = (self.value.clone(), y.clone());
        Self::from_op(y, &[self], move |g| {
            Ok(vec![Some(B::unary_backward(&x, &kept, g, f)?)])
        })
    }

    /// x * mul + add
    pub fn affine(&self, mul: f64, add: f64) -> Result<Self> {
        Ok(Self::from_op(
            B::affine(&self.value, mul, add)?,
            &[self],
            move |g| Ok(vec![Some(B::affine(g, mul, 0.0)?)]),
        ))
    }

    /// Sum, broadcasting.
    pub fn add(&self, other: &Self) -> Result<Self> {
        let (sa, sb) = (self.shape(), other.shape());
        let (wa, wb) = (self.wants(), other.wants());
        Ok(Self::from_op(
            B::binary(&self.value, &other.value, Binary::Add)?,
            &[self, other],
            move |g| {
                let to = |shape: &[usize]| sum_to::<B>(g.clone(), shape);
                Ok(vec![
                    wa.then(|| to(&sa)).transpose()?,
                    wb.then(|| to(&sb)).transpose()?,
                ])
            },
        ))
    }

    /// Difference, broadcasting.
    pub fn sub(&self, other: &Self) -> Result<Self> {
        let (sa, sb) = (self.shape(), other.shape());
        let (wa, wb) = (self.wants(), other.wants());
        Ok(Self::from_op(
            B::binary(&self.value, &other.value, Binary::Sub)?,
            &[self, other],
            move |g| {
                let to = |shape: &[usize]| sum_to::<B>(g.clone(), shape);
                let negative = || B::affine(&to(&sb)?, -1.0, 0.0);
                Ok(vec![
                    wa.then(|| to(&sa)).transpose()?,
                    wb.then(negative).transpose()?,
                ])
            },
        ))
    }

    /// Product, broadcasting.
    pub fn mul(&self, other: &Self) -> Result<Self> {
        let (a, b) = (self.clone_value_if(other), other.clone_value_if(self));
        let (sa, sb) = (self.shape(), other.shape());
        Ok(Self::from_op(
            B::binary(&self.value, &other.value, Binary::Mul)?,
            &[self, other],
            move |g| {
                let times = |x: &B::Tensor, shape: &[usize]| {
                    sum_to::<B>(B::binary(g, x, Binary::Mul)?, shape)
                };
                Ok(vec![
                    b.as_ref().map(|b| times(b, &sa)).transpose()?,
                    a.as_ref().map(|a| times(a, &sb)).transpose()?,
                ])
            },
        ))
    }

    /// Its own value, kept only if the other factor needs a gradient.
    fn clone_value_if(&self, other: &Self) -> Option<B::Tensor> {
        other.wants().then(|| self.value.clone())
    }

    /// Sum over dimensions, which stay with size 1.
    pub fn sum(&self, dims: &[usize]) -> Result<Self> {
        let before = self.shape();
        Ok(Self::from_op(
            B::sum(&self.value, dims)?,
            &[self],
            move |g| Ok(vec![Some(B::expand(g, &before)?)]),
        ))
    }

    /// Mean of all elements, a tensor of rank 1 and size 1.
    pub fn mean_all(&self) -> Result<Self> {
        let shape = self.shape();
        let n: usize = shape.iter().product();
        let dims: Vec<usize> = (0..shape.len()).collect();
        self.sum(&dims)?.affine(1.0 / n as f64, 0.0)?.reshape(&[1])
    }

    /// Mean of a dimension, which stays with size 1.
    pub fn mean(&self, dims: &[usize]) -> Result<Self> {
        let shape = self.shape();
        let n: usize = dims.iter().map(|&d| shape[d]).product();
        self.sum(dims)?.affine(1.0 / n as f64, 0.0)
    }

    /// Matrix product of the last two dimensions with equal leading ones; `tb` means that the second is given transposed.
    pub fn matmul(&self, other: &Self, tb: bool) -> Result<Self> {
        let (a, b) = (self.clone_value_if(other), other.clone_value_if(self));
        Ok(Self::from_op(
            B::matmul(&self.value, &other.value, false, tb)?,
            &[self, other],
            move |g| {
                let da = b
                    .as_ref()
                    .map(|b| B::matmul(g, b, false, !tb))
                    .transpose()?;
                let db = a
                    .as_ref()
                    .map(|a| {
                        if tb {
                            B::matmul(g, a, true, false)
                        } else {
                            B::matmul(a, g, true, false)
                        }
                    })
                    .transpose()?;
                Ok(vec![da, db])
            },
        ))
    }

    /// x (.., i) times w (o, i) transposed, plus bias (o).
    pub fn linear(&self, w: &Self, bias: Option<&Self>) -> Result<Self> {
        let y = B::linear(&self.value, &w.value, bias.map(|b| &b.value))?;
        let (x, kept) = (self.clone_value_if(w), w.clone_value_if(self));
        let outputs = w.shape()[0];
        let biased = bias.is_some_and(|b| b.wants());
        let parents: Vec<&Self> = [Some(self), Some(w), bias].into_iter().flatten().collect();
        Ok(Self::from_op(y, &parents, move |g| {
            let (dx, dw) = B::linear_backward(x.as_ref(), kept.as_ref(), g)?;
            let db = biased
                .then(|| sum_to::<B>(g.clone(), &[outputs]))
                .transpose()?;
            Ok(vec![dx, dw, db])
        }))
    }

    /// Rows of a table (k, d) by ids of any shape: (ids.., d).
    pub fn rows(&self, ids: &B::Tensor) -> Result<Self> {
        let (kept, k) = (ids.clone(), self.shape()[0]);
        Ok(Self::from_op(
            B::rows(&self.value, ids)?,
            &[self],
            move |g| Ok(vec![Some(B::rows_adjoint(g, &kept, k)?)]),
        ))
    }

    /// Softmax over the last dimension.
    pub fn softmax(&self) -> Result<Self> {
        let y = B::softmax(&self.value)?;
        let kept = y.clone();
        Ok(Self::from_op(y, &[self], move |g| {
            Ok(vec![Some(B::softmax_backward(&kept, g)?)])
        }))
    }

    /// x / sqrt(mean(x^2) + eps) * w over the last dimension.
    pub fn rms_norm(&self, w: &Self, eps: f64, precision: Precision) -> Result<Self> {
        let y = B::rms_norm(&self.value, &w.value, eps, precision)?;
        let (x, kept) = (self.value.clone(), w.value.clone());
        Ok(Self::from_adding_op(y, &[self, w], move |g, known| {
            let (dx, dw) = B::rms_norm_backward_adding(&x, &kept, g, eps, known)?;
            Ok(vec![Some(dx), Some(dw)])
        }))
    }

    /// x / |x| over the last dimension.
    pub fn l2_normalise(&self) -> Result<Self> {
        let (scale, eps) = root_mean_square::<B>(&self.value)?;
        self.rms_norm(&Self::constant(scale), eps, Precision::Storage)
    }

    /// x / |x| of (b, l, h, d) over the last dimension, times an optional length per head (h), as a [`Precision::Factor`].
    pub fn unit(&self, length: Option<&Self>) -> Result<Self> {
        let y = B::unit(&self.value, length.map(|l| &l.value))?;
        let (x, kept) = (self.value.clone(), length.map(|l| l.value.clone()));
        let parents: Vec<&Self> = [Some(self), length].into_iter().flatten().collect();
        Ok(Self::from_op(y, &parents, move |g| {
            let (dx, dlength) = B::unit_backward(&x, kept.as_ref(), g)?;
            Ok(vec![Some(dx), dlength])
        }))
    }

    /// (x - mean) / sqrt(var + eps) over the last dimension.
    pub fn layer_norm(&self, eps: f64) -> Result<Self> {
        let x = self.value.clone();
        Ok(Self::from_op(
            B::layer_norm(&self.value, eps)?,
            &[self],
            move |g| Ok(vec![Some(B::layer_norm_backward(&x, g, eps)?)]),
        ))
    }

    /// The same of x (b, l, c), times scale plus shift, (b, 1, c) each, as a [`Precision::Factor`]. The backward pass
    /// normalises again instead of keeping intermediate values.
    pub fn modulated_norm(&self, scale: &Self, shift: &Self, eps: f64) -> Result<Self> {
        let y = B::modulated_norm(&self.value, &scale.value, &shift.value, eps)?;
        let (x, kept) = (self.value.clone(), scale.value.clone());
        Ok(Self::from_adding_op(
            y,
            &[self, scale, shift],
            move |g, known| {
                let (dx, dscale, dshift) =
                    B::modulated_norm_backward_adding(&x, &kept, g, eps, known)?;
                Ok(vec![Some(dx), Some(dscale), Some(dshift)])
            },
        ))
    }

    /// x + y gate (+ added): x, y and added (b, l, c), gate (b, 1, c).
    pub fn gated_add(&self, y: &Self, gate: &Self, added: Option<&Self>) -> Result<Self> {
        let sum = B::gated_add(&self.value, &y.value, &gate.value, added.map(|a| &a.value))?;
        let (kept, by) = (y.value.clone(), gate.value.clone());
        let parents: Vec<&Self> = [Some(self), Some(y), Some(gate), added]
            .into_iter()
            .flatten()
            .collect();
        Ok(Self::from_op(sum, &parents, move |g| {
            let (dy, dgate) = B::gated_add_backward(&kept, &by, g)?;
            Ok(vec![
                Some(g.clone()),
                Some(dy),
                Some(dgate),
                Some(g.clone()),
            ])
        }))
    }

    /// Group normalisation of (b, c, h, w) with scale and shift (c).
    pub fn group_norm(&self, groups: usize, w: &Self, bias: &Self, eps: f64) -> Result<Self> {
        let y = B::group_norm(&self.value, groups, &w.value, &bias.value, eps)?;
        let (x, kept) = (self.value.clone(), w.value.clone());
        Ok(Self::from_op(y, &[self, w, bias], move |g| {
            let (dx, dw, db) = B::group_norm_backward(&x, groups, &kept, g, eps)?;
            Ok(vec![Some(dx), Some(dw), Some(db)])
        }))
    }

    /// The same, then silu. The backward pass normalises again instead of keeping intermediate values.
    pub fn group_norm_silu(&self, groups: usize, w: &Self, bias: &Self, eps: f64) -> Result<Self> {
        let y = B::group_norm_silu(&self.value, groups, &w.value, &bias.value, eps)?;
        let (x, scale, shift) = (self.value.clone(), w.value.clone(), bias.value.clone());
        let kept = y.clone();
        Ok(Self::from_adding_op(
            y,
            &[self, w, bias],
            move |g, known| {
                let affine = [&scale, &shift];
                let (dx, dw, db) =
                    B::group_norm_silu_backward(&x, groups, affine, &kept, g, eps, known)?;
                Ok(vec![Some(dx), Some(dw), Some(db)])
            },
        ))
    }

    /// Cross-correlation with a kernel (o, c, kh, kw); zero padding above and below, left and right.
    pub fn conv2d(&self, w: &Self, stride: usize, padding: [usize; 2]) -> Result<Self> {
        let (x, kept, want) = (
            self.value.clone(),
            w.value.clone(),
            (self.wants(), w.wants()),
        );
        let y = B::conv2d(&self.value, &w.value, stride, padding)?;
        Ok(Self::from_op(y, &[self, w], move |g| {
            let (dx, dw) = B::conv2d_backward(&x, &kept, g, stride, padding, want)?;
            Ok(vec![dx, dw])
        }))
    }

    /// The same plus bias (o) and, optionally, a residual of the result's shape.
    pub fn conv2d_bias(
        &self,
        w: &Self,
        bias: &Self,
        residual: Option<&Self>,
        stride: usize,
        padding: [usize; 2],
    ) -> Result<Self> {
        let y = B::conv2d_bias(
            &self.value,
            &w.value,
            &bias.value,
            residual.map(|r| &r.value),
            stride,
            padding,
        )?;
        let (x, kept, want) = (
            self.value.clone(),
            w.value.clone(),
            (self.wants(), w.wants()),
        );
        let (shape, learnt) = (bias.shape(), bias.wants());
        let parents: Vec<&Self> = [Some(self), Some(w), Some(bias), residual]
            .into_iter()
            .flatten()
            .collect();
        Ok(Self::from_op(y, &parents, move |g| {
            let (dx, dw) = B::conv2d_backward(&x, &kept, g, stride, padding, want)?;
            let sum = || B::reshape(&B::sum(g, &[0, 2, 3])?, &shape);
            Ok(vec![dx, dw, learnt.then(sum).transpose()?, Some(g.clone())])
        }))
    }

    /// The greatest value of each window of (b, c, h, w).
    pub fn max_pool2d(&self, window: Window) -> Result<Self> {
        let x = self.value.clone();
        Ok(Self::from_op(
            B::max_pool2d(&self.value, window)?,
            &[self],
            move |g| Ok(vec![Some(B::max_pool2d_backward(&x, g, window)?)]),
        ))
    }

    /// [`Variable::conv2d_bias`] with stride 1 on images enlarged twofold (nearest neighbour). The backward pass enlarges
    /// again instead of keeping the enlarged images.
    pub fn conv2d_upsampled(&self, w: &Self, bias: &Self, padding: [usize; 2]) -> Result<Self> {
        let y = B::conv2d_upsampled(&self.value, &w.value, &bias.value, padding)?;
        let (x, kept, want) = (
            self.value.clone(),
            w.value.clone(),
            (self.wants(), w.wants()),
        );
        let (s, shape, learnt) = (self.shape(), bias.shape(), bias.wants());
        Ok(Self::from_op(y, &[self, w, bias], move |g| {
            let (dx, dw) = B::conv2d_backward(&upsample2::<B>(&x)?, &kept, g, 1, padding, want)?;
            let sum = |dx| {
                let blocks = B::reshape(&dx, &[s[0], s[1], s[2], 2, s[3], 2])?;
                B::reshape(&B::sum(&blocks, &[3, 5])?, &s)
            };
            let db = || B::reshape(&B::sum(g, &[0, 2, 3])?, &shape);
            Ok(vec![
                dx.map(sum).transpose()?,
                dw,
                learnt.then(db).transpose()?,
            ])
        }))
    }

    /// silu(a) * b where the last dimension holds a then b.
    pub fn swiglu(&self) -> Result<Self> {
        let x = self.value.clone();
        Ok(Self::from_op(B::swiglu(&self.value)?, &[self], move |g| {
            Ok(vec![Some(B::swiglu_backward(&x, g)?)])
        }))
    }

    /// Attention: q (b, lq, h, d), k and v (b, lk, h, d) -> (b, lq, h, d).
    pub fn attention(
        q: &Self,
        k: &Self,
        v: &Self,
        mask: &Mask<B::Tensor>,
        scale: f64,
    ) -> Result<Self> {
        let y = B::attention(&q.value, &k.value, &v.value, mask, scale)?;
        let (qv, kv, vv, yv, mask) = (
            q.value.clone(),
            k.value.clone(),
            v.value.clone(),
            y.clone(),
            mask.clone(),
        );
        Ok(Self::from_op(y, &[q, k, v], move |g| {
            let (dq, dk, dv) = B::attention_backward(&qv, &kv, &vv, &mask, scale, &yv, g)?;
            Ok(vec![Some(dq), Some(dk), Some(dv)])
        }))
    }

    /// Self-attention from the packed projection (b, l, 3 h d), with rotary positions (cos, sin each (l, d/2)).
    ///
    /// One node instead of seven, so that a backend can rotate and attend in one pass over memory, forward and backward.
    pub fn packed_attention(
        &self,
        heads: usize,
        rope: &(B::Tensor, B::Tensor),
        mask: &Mask<B::Tensor>,
        scale: f64,
    ) -> Result<Self> {
        let tables = [&rope.0, &rope.1];
        let (y, qkv) = B::packed_attention(&self.value, heads, tables, mask, scale)?;
        let (rope, mask, kept, mut flat) = (rope.clone(), mask.clone(), y.clone(), self.shape());
        flat[2] /= 3;
        Ok(Self::from_op(B::reshape(&y, &flat)?, &[self], move |g| {
            let g = B::reshape(g, &B::shape(&kept))?;
            let (qkv, tables) = (qkv.each_ref(), [&rope.0, &rope.1]);
            let dqkv = B::packed_attention_backward(qkv, tables, &mask, scale, &kept, &g)?;
            Ok(vec![Some(dqkv)])
        }))
    }

    /// Mean of -log softmax(logits)[id] over rows: logits (n, k), ids (n) -> (1).
    pub fn cross_entropy(&self, ids: &B::Tensor) -> Result<Self> {
        self.cross_entropy_rows(ids)?.mean_all()
    }

    /// -log softmax(logits)[id] of each row: logits (n, k), ids (n) -> (n).
    pub fn cross_entropy_rows(&self, ids: &B::Tensor) -> Result<Self> {
        let rows = B::cross_entropy(&self.value, ids)?;
        let (x, ids) = (self.value.clone(), ids.clone());
        Ok(Self::from_op(rows, &[self], move |g| {
            Ok(vec![Some(B::cross_entropy_backward(&x, &ids, g)?)])
        }))
    }
}

/// Sums a gradient over the dimensions along which its argument was broadcast.
fn sum_to<B: Backend>(gradient: B::Tensor, shape: &[usize]) -> Result<B::Tensor> {
    let from = B::shape(&gradient);
    if from == shape {
        return Ok(gradient);
    }
    let lead = from.len() - shape.len();
    let dims: Vec<usize> = (0..from.len())
        .filter(|&i| i < lead || (shape[i - lead] == 1 && from[i] != 1))
        .collect();
    B::reshape(&B::sum(&gradient, &dims)?, shape)
}
