//! `Candle` as the engine's backend: for each operation the fused kernel where one fits, else the plain form.

use retort_engine::backend::{
    AdamwStep, Attention, Binary, Exchange, FlowSolver, Layers, Mask, Norms, Optimiser, Precision,
    Sampling, Tensors, Unary, Window, composed_linear_backward, unpack, upsample2,
};
use retort_engine::error::Result;
use retort_kernels::half::Unit;
use retort_kernels::half::windows::Rounding;

use crate::activation::silu;
use crate::layout::whole;
use crate::plain::Plain;
use crate::tensor::{Raw, Tensor};
use crate::view::fits;
use crate::{
    Candle, activation, arithmetic, attention, convolution, flow, half, layout, modulation, norm,
    optimiser, pooling, product, softmax,
};

type T = Tensor;

impl Candle {
    fn put(&self, raw: Result<Raw>) -> Result<T> {
        Ok(Tensor::new(raw?, self.half))
    }
}

impl Tensors for Candle {
    type Tensor = Tensor;

    fn of(x: &T) -> Self {
        Self { half: x.half }
    }

    fn exact(&self) -> Self {
        Self { half: false }
    }

    fn factor(x: &T) -> Result<T> {
        half::factor(x)
    }

    fn floats(&self, data: &[f32], shape: &[usize]) -> Result<T> {
        self.put(Plain.floats(data, shape))
    }

    fn indices(&self, data: &[u32], shape: &[usize]) -> Result<T> {
        self.put(Plain.indices(data, shape))
    }

    fn full(&self, shape: &[usize], value: f32) -> Result<T> {
        self.put(Plain.full(shape, value))
    }

    fn to_floats(x: &T) -> Result<Vec<f32>> {
        Plain::to_floats(&x.single()?)
    }

    fn to_indices(x: &T) -> Result<Vec<u32>> {
        Plain::to_indices(x)
    }

    fn shape(x: &T) -> Vec<usize> {
        Plain::shape(x)
    }

    fn reshape(x: &T, shape: &[usize]) -> Result<T> {
        x.with(Plain::reshape(&whole(x)?, shape))
    }

    fn permute(x: &T, dims: &[usize]) -> Result<T> {
        x.with(Plain::permute(x, dims))
    }

    fn narrow(x: &T, dim: usize, start: usize, len: usize) -> Result<T> {
        x.with(Plain::narrow(x, dim, start, len))
    }

    fn cat(xs: &[&T], dim: usize) -> Result<T> {
        let raws: Vec<&Raw> = xs.iter().copied().map(raw).collect();
        let made = if fits(&raws) && beside(&raws, dim) {
            layout::cat(&raws, dim)
        } else {
            Plain::cat(&raws, dim)
        };
        let half = xs.first().is_some_and(|x| x.half);
        Candle { half }.put(made)
    }

    fn expand(x: &T, shape: &[usize]) -> Result<T> {
        x.with(Plain::expand(x, shape))
    }

    fn unary(x: &T, f: Unary) -> Result<T> {
        let fused = fits(&[x]).then(|| activation::unary(x, f)).flatten();
        x.with(fused.unwrap_or_else(|| Plain::unary(x, f)))
    }

    fn binary(a: &T, b: &T, f: Binary) -> Result<T> {
        let fused = fits(&[a, b]).then(|| arithmetic::binary(a, b, f)).flatten();
        a.with(fused.unwrap_or_else(|| Plain::binary(a, b, f)))
    }

    fn affine(x: &T, mul: f64, add: f64) -> Result<T> {
        x.with(if fits(&[x]) {
            arithmetic::affine(x, mul, add)
        } else {
            Plain::affine(x, mul, add)
        })
    }

    fn sum(x: &T, dims: &[usize]) -> Result<T> {
        x.with(if fits(&[x]) {
            arithmetic::sum(x, dims)
        } else {
            Plain::sum(x, dims)
        })
    }

    fn max_last(x: &T) -> Result<T> {
        x.with(Plain::max_last(x))
    }

    fn argmax_last(x: &T) -> Result<T> {
        x.with(if fits(&[x]) {
            softmax::argmax_last(x)
        } else {
            Plain::argmax_last(x)
        })
    }

    fn matmul(a: &T, b: &T, ta: bool, tb: bool) -> Result<T> {
        a.with(if fits(&[a, b]) && a.rank() >= 2 {
            product::matmul(a, b, ta, tb)
        } else {
            Plain::matmul(a, b, ta, tb)
        })
    }

    fn rows(table: &T, ids: &T) -> Result<T> {
        let found = table.with(Plain::rows(table, ids))?;
        found.with(found.single())
    }

    fn rows_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        grad.with(Plain::rows_adjoint(grad, ids, k))
    }

    fn pick(x: &T, ids: &T) -> Result<T> {
        x.with(Plain::pick(x, ids))
    }

    fn pick_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        grad.with(Plain::pick_adjoint(grad, ids, k))
    }

    fn conv2d(x: &T, w: &T, stride: usize, padding: [usize; 2]) -> Result<T> {
        x.with(if fits(&[x, w]) {
            convolution::conv2d(x, w, None, None, stride, padding, forward(x))
        } else {
            Plain::conv2d(x, w, stride, padding)
        })
    }

    fn conv2d_backward(
        x: &T,
        w: &T,
        grad: &T,
        stride: usize,
        padding: [usize; 2],
        want: (bool, bool),
    ) -> Result<(Option<T>, Option<T>)> {
        let (dx, dw) = if fits(&[x, w, grad]) {
            convolution::conv2d_backward(x, w, grad, stride, padding, backward(grad), want)?
        } else {
            Plain::conv2d_backward(x, w, grad, stride, padding, want)?
        };
        Ok((dx.map(|dx| x.like(dx)), dw.map(|dw| w.like(dw))))
    }

    fn write_(x: &T, dim: usize, start: usize, src: &T) -> Result<()> {
        Plain::write_(x, dim, start, src)
    }

    fn assign_(x: &T, src: &T) -> Result<()> {
        Plain::assign_(x, src)
    }
}

impl Layers for Candle {
    fn conv2d_bias(
        x: &T,
        w: &T,
        bias: &T,
        residual: Option<&T>,
        stride: usize,
        padding: [usize; 2],
    ) -> Result<T> {
        let fit = fits(&[x, w, bias])
            && bias.elem_count() == w.dims()[0]
            && residual.is_none_or(|residual| fits(&[residual]));
        x.with(if fit {
            convolution::conv2d(
                x,
                w,
                Some(bias),
                residual.map(raw),
                stride,
                padding,
                forward(x),
            )
        } else {
            Plain::conv2d_bias(x, w, bias, residual.map(raw), stride, padding)
        })
    }

    fn conv2d_upsampled(x: &T, w: &T, bias: &T, padding: [usize; 2]) -> Result<T> {
        let fused = match fits(&[x, w, bias]) && bias.elem_count() == w.dims()[0] {
            true => convolution::conv2d_upsampled(x, w, bias, padding)?,
            false => None,
        };
        match fused {
            Some(y) => Ok(x.like(y)),
            None => Self::conv2d_bias(&upsample2::<Self>(x)?, w, bias, None, 1, padding),
        }
    }

    fn unary_backward(x: &T, y: &T, grad: &T, f: Unary) -> Result<T> {
        let fused = (fits(&[x, y, grad]) && same(x, y) && same(x, grad))
            .then(|| activation::unary_backward(x, y, grad, f))
            .flatten();
        x.with(fused.unwrap_or_else(|| Plain::unary_backward(x, y, grad, f)))
    }

    fn linear(x: &T, w: &T, bias: Option<&T>) -> Result<T> {
        let fit = fits(&[x])
            && (w.tiles.is_some() || fits(&[w]))
            && bias.is_none_or(|b| fits(&[b]) && b.dims() == &w.dims()[..1])
            && w.rank() == 2
            && ends_with(x, &w.dims()[1..]);
        let bias = bias.map(raw);
        x.with(match (x.half && fit).then(Unit::best).flatten() {
            Some(unit) => half::linear(unit, x, w, bias),
            None if fit => product::linear(x, &w.single()?, bias),
            None => Plain::linear(x, &w.single()?, bias),
        })
    }

    fn linear_backward(x: Option<&T>, w: Option<&T>, grad: &T) -> Result<(Option<T>, Option<T>)> {
        let w = w.map(|w| w.with(w.single())).transpose()?;
        let w = w.as_ref();
        let fit = fits(&[grad]) && [x, w].into_iter().flatten().all(|x| fits(&[x]));
        if let Some(unit) = (grad.half && fit).then(Unit::best).flatten() {
            let (dx, dw) = half::linear_backward(unit, x.map(raw), w.map(raw), grad)?;
            return Ok((dx.map(|dx| grad.like(dx)), dw.map(|dw| grad.like(dw))));
        }
        composed_linear_backward::<Self>(x, w, grad)
    }

    fn softmax(x: &T) -> Result<T> {
        x.with(if fits(&[x]) {
            softmax::softmax(x)
        } else {
            Plain::softmax(x)
        })
    }

    fn softmax_backward(y: &T, grad: &T) -> Result<T> {
        y.with(if fits(&[y, grad]) && same(y, grad) {
            softmax::softmax_backward(y, grad)
        } else {
            Plain::softmax_backward(y, grad)
        })
    }

    fn gated_add(x: &T, y: &T, gate: &T, added: Option<&T>) -> Result<T> {
        let fit = fits(&[x, y, gate]) && modulates(x, gate) && same(x, y) && joins(added, x);
        x.with(if fit {
            modulation::gated_add(x, y, gate, added.map(raw))
        } else {
            Plain::gated_add(x, y, gate, added.map(raw))
        })
    }

    fn gated_add_backward(y: &T, gate: &T, grad: &T) -> Result<(T, T)> {
        y.with_two(
            if fits(&[y, gate, grad]) && modulates(y, gate) && same(y, grad) {
                modulation::gated_add_backward(y, gate, grad)
            } else {
                Plain::gated_add_backward(y, gate, grad)
            },
        )
    }

    fn max_pool2d(x: &T, window: Window) -> Result<T> {
        x.with(if fits(&[x]) && pooling::pooled(x, window) {
            pooling::max_pool2d(x, window)
        } else {
            Plain::max_pool2d(x, window)
        })
    }

    fn max_pool2d_backward(x: &T, grad: &T, window: Window) -> Result<T> {
        x.with(if fits(&[x, grad]) && pooling::pooled(x, window) {
            pooling::max_pool2d_backward(x, grad, window)
        } else {
            Plain::max_pool2d_backward(x, grad, window)
        })
    }

    fn swiglu(x: &T) -> Result<T> {
        x.with(if fits(&[x]) {
            activation::swiglu(x)
        } else {
            Plain::swiglu(x)
        })
    }

    fn swiglu_backward(x: &T, grad: &T) -> Result<T> {
        x.with(
            if fits(&[x, grad]) && 2 * grad.elem_count() == x.elem_count() {
                activation::swiglu_backward(x, grad)
            } else {
                Plain::swiglu_backward(x, grad)
            },
        )
    }

    fn cross_entropy(logits: &T, ids: &T) -> Result<T> {
        logits.with(if fits(&[logits]) {
            softmax::cross_entropy(logits, ids)
        } else {
            Plain::cross_entropy(logits, ids)
        })
    }

    fn cross_entropy_backward(logits: &T, ids: &T, grad: &T) -> Result<T> {
        logits.with(
            if fits(&[logits, grad]) && grad.elem_count() == ids.elem_count() {
                softmax::cross_entropy_backward(logits, ids, grad)
            } else {
                Plain::cross_entropy_backward(logits, ids, grad)
            },
        )
    }
}

impl Norms for Candle {
    fn rms_norm(x: &T, w: &T, eps: f64, precision: Precision) -> Result<T> {
        x.with(
            if fits(&[x, w]) && ends_with(x, w.dims()) && w.rank() == 1 {
                norm::rms_norm(x, w, eps)
            } else {
                Plain::rms_norm(x, w, eps, precision)
            },
        )
    }

    fn rms_norm_backward(x: &T, w: &T, grad: &T, eps: f64) -> Result<(T, T)> {
        Self::rms_norm_backward_adding(x, w, grad, eps, None)
    }

    fn rms_norm_backward_adding(
        x: &T,
        w: &T,
        grad: &T,
        eps: f64,
        added: Option<&T>,
    ) -> Result<(T, T)> {
        let fit = fits(&[x, w, grad])
            && ends_with(x, w.dims())
            && w.rank() == 1
            && same(x, grad)
            && joins(added, x);
        x.with_two(if fit {
            norm::rms_norm_backward(x, w, grad, eps, added.map(raw))
        } else {
            Plain::rms_norm_backward_adding(x, w, grad, eps, added.map(raw))
        })
    }

    fn layer_norm(x: &T, eps: f64) -> Result<T> {
        x.with(if fits(&[x]) {
            norm::layer_norm(x, eps)
        } else {
            Plain::layer_norm(x, eps)
        })
    }

    fn layer_norm_backward(x: &T, grad: &T, eps: f64) -> Result<T> {
        x.with(if fits(&[x, grad]) && same(x, grad) {
            norm::layer_norm_backward(x, grad, eps)
        } else {
            Plain::layer_norm_backward(x, grad, eps)
        })
    }

    fn modulated_norm(x: &T, scale: &T, shift: &T, eps: f64) -> Result<T> {
        x.with(
            if fits(&[x, scale, shift]) && modulates(x, scale) && modulates(x, shift) {
                norm::modulated_norm(x, scale, shift, eps)
            } else {
                Plain::modulated_norm(x, scale, shift, eps)
            },
        )
    }

    fn modulated_norm_backward(x: &T, scale: &T, grad: &T, eps: f64) -> Result<(T, T, T)> {
        Self::modulated_norm_backward_adding(x, scale, grad, eps, None)
    }

    fn modulated_norm_backward_adding(
        x: &T,
        scale: &T,
        grad: &T,
        eps: f64,
        added: Option<&T>,
    ) -> Result<(T, T, T)> {
        let fit =
            fits(&[x, scale, grad]) && modulates(x, scale) && same(x, grad) && joins(added, x);
        x.with_three(if fit {
            modulation::modulated_norm_backward(x, scale, grad, eps, added.map(raw))
        } else {
            Plain::modulated_norm_backward_adding(x, scale, grad, eps, added.map(raw))
        })
    }

    fn group_norm(x: &T, groups: usize, w: &T, bias: &T, eps: f64) -> Result<T> {
        x.with(if fits(&[x, w, bias]) && grouped(x, groups, &[w, bias]) {
            norm::group_norm(x, groups, w, bias, eps, |y| y)
        } else {
            Plain::group_norm(x, groups, w, bias, eps)
        })
    }

    fn group_norm_silu(x: &T, groups: usize, w: &T, bias: &T, eps: f64) -> Result<T> {
        x.with(if fits(&[x, w, bias]) && grouped(x, groups, &[w, bias]) {
            norm::group_norm(x, groups, w, bias, eps, silu)
        } else {
            Plain::group_norm_silu(x, groups, w, bias, eps)
        })
    }

    fn group_norm_backward(x: &T, groups: usize, w: &T, grad: &T, eps: f64) -> Result<(T, T, T)> {
        x.with_three(
            if fits(&[x, w, grad]) && grouped(x, groups, &[w]) && same(x, grad) {
                norm::group_norm_backward(x, groups, w, None, grad, eps, None)
            } else {
                Plain::group_norm_backward(x, groups, w, grad, eps)
            },
        )
    }

    fn group_norm_silu_backward(
        x: &T,
        groups: usize,
        [w, bias]: [&T; 2],
        y: &T,
        grad: &T,
        eps: f64,
        added: Option<&T>,
    ) -> Result<(T, T, T)> {
        let fit = fits(&[x, w, bias, grad])
            && grouped(x, groups, &[w, bias])
            && same(x, grad)
            && joins(added, x);
        x.with_three(if fit {
            norm::group_norm_backward(x, groups, w, Some(bias), grad, eps, added.map(raw))
        } else {
            Plain::group_norm_silu_backward(x, groups, [w, bias], y, grad, eps, added.map(raw))
        })
    }
}

impl Attention for Candle {
    fn rope(x: &T, cos: &T, sin: &T) -> Result<T> {
        let tables = |x: &T| cos.dims() == [x.dims()[1], x.dims()[3] / 2] && same(cos, sin);
        x.with(if fits(&[x, cos, sin]) && x.rank() == 4 && tables(x) {
            attention::rope(x, cos, sin)
        } else {
            Plain::rope(x, cos, sin)
        })
    }

    fn attention(q: &T, k: &T, v: &T, mask: &Mask<T>, scale: f64) -> Result<T> {
        q.with(if fits(&[q, k, v]) && masked(mask) {
            attention::attention(q, k, v, &raw_mask(mask), scale)
        } else {
            Plain::attention(q, k, v, &raw_mask(mask), scale)
        })
    }

    fn attention_backward(
        q: &T,
        k: &T,
        v: &T,
        mask: &Mask<T>,
        scale: f64,
        y: &T,
        grad: &T,
    ) -> Result<(T, T, T)> {
        q.with_three(
            if fits(&[q, k, v, y, grad]) && masked(mask) && same(q, y) && same(q, grad) {
                attention::attention_backward(q, k, v, &raw_mask(mask), scale, y, grad)
            } else {
                Plain::attention_backward(q, k, v, &raw_mask(mask), scale, y, grad)
            },
        )
    }

    fn packed_attention(
        qkv: &T,
        heads: usize,
        tables: [&T; 2],
        mask: &Mask<T>,
        scale: f64,
    ) -> Result<(T, [T; 3])> {
        let parts = unpack::<Self>(qkv, heads)?;
        let rotating = rotates(&parts[0], tables, mask);
        let (tables, mask) = (tables.map(raw), &raw_mask(mask));
        if rotating {
            let y = attention::rotated_attention(parts.each_ref().map(raw), tables, mask, scale)?;
            // The backward pass rotates them again.
            Ok((qkv.like(y), parts))
        } else {
            let (y, parts) = Plain::packed_attention(qkv, heads, tables, mask, scale)?;
            Ok((qkv.like(y), parts.map(|part| qkv.like(part))))
        }
    }

    fn packed_attention_backward(
        parts: [&T; 3],
        tables: [&T; 2],
        mask: &Mask<T>,
        scale: f64,
        y: &T,
        grad: &T,
    ) -> Result<T> {
        // As in the forward pass, so that either both rotate or neither does.
        let rotating = rotates(parts[0], tables, mask);
        let (raws, tables, mask) = (parts.map(raw), tables.map(raw), &raw_mask(mask));
        parts[0].with(if rotating {
            attention::rotated_attention_backward(raws, tables, mask, scale, [y, grad])
        } else {
            Plain::packed_attention_backward(raws, tables, mask, scale, y, grad)
        })
    }
}

/// Whether the kernels of attention rotate queries (b, l, h, d) and keys themselves.
fn rotates(q: &T, [cos, sin]: [&T; 2], mask: &Mask<T>) -> bool {
    fits(&[q, cos, sin])
        && masked(mask)
        && q.dims()[3].is_multiple_of(2)
        && cos.dims() == [q.dims()[1], q.dims()[3] / 2]
        && same(cos, sin)
}

impl Exchange for Candle {}

impl Optimiser for Candle {
    fn adamw_(p: &T, m: &T, v: &T, g: &T, s: &AdamwStep) -> Result<()> {
        let written = [p, m, v];
        if fits(&[p, m, v, g]) && written.iter().all(|x| x.is_contiguous() && same(x, g)) {
            optimiser::adamw_(p, m, v, g, s, None)
        } else {
            Plain::adamw_(p, m, v, g, s)
        }
    }

    fn adamw_averaged_(
        p: &T,
        m: &T,
        v: &T,
        g: &T,
        s: &AdamwStep,
        average: &T,
        decay: f64,
    ) -> Result<()> {
        let written = [p, m, v, average];
        if fits(&[p, m, v, g, average]) && written.iter().all(|x| x.is_contiguous() && same(x, g)) {
            optimiser::adamw_(p, m, v, g, s, Some((average, decay)))
        } else {
            Plain::adamw_averaged_(p, m, v, g, s, average, decay)
        }
    }

    fn sum_of_squares(x: &T) -> Result<T> {
        x.with(if fits(&[x]) {
            optimiser::sum_of_squares(x)
        } else {
            Plain::sum_of_squares(x)
        })
    }

    fn ema_(average: &T, x: &T, decay: f64) -> Result<()> {
        if fits(&[average, x]) && average.is_contiguous() && same(average, x) {
            optimiser::ema_(average, x, decay)
        } else {
            Plain::ema_(average, x, decay)
        }
    }
}

impl Sampling for Candle {
    fn flow_map(logits: &T, noise: &T, codebook: &T, solver: &FlowSolver) -> Result<T> {
        logits.with(if fits(&[logits, noise, codebook]) {
            flow::flow_map(logits, noise, codebook, solver)
        } else {
            Plain::flow_map(logits, noise, codebook, solver)
        })
    }
}

/// What the kernels compute with.
fn raw(x: &T) -> &Raw {
    &x.raw
}

fn raw_mask(mask: &Mask<T>) -> Mask<Raw> {
    match mask {
        Mask::Full => Mask::Full,
        Mask::Causal => Mask::Causal,
        Mask::Bias(bias) => Mask::Bias(bias.raw.clone()),
    }
}

/// How the operands of a convolution are rounded: images must be exact, their gradients need not be.
fn forward(x: &T) -> Option<Rounding> {
    x.half.then_some(Rounding::Twice)
}

fn backward(grad: &T) -> Option<Rounding> {
    grad.half.then_some(Rounding::Once)
}

/// Whether tensors differ only in a dimension.
fn beside(xs: &[&Raw], dim: usize) -> bool {
    let others = |x: &Raw| {
        x.dims()[..dim] == xs[0].dims()[..dim] && x.dims()[dim + 1..] == xs[0].dims()[dim + 1..]
    };
    !xs.is_empty() && dim < xs[0].rank() && xs.iter().all(|x| x.rank() == xs[0].rank() && others(x))
}

fn same(a: &T, b: &T) -> bool {
    a.dims() == b.dims()
}

/// Whether a kernel may add this, if anything, to a result of x's shape.
fn joins(added: Option<&T>, x: &T) -> bool {
    added.is_none_or(|added| fits(&[added]) && same(x, added))
}

fn ends_with(x: &T, end: &[usize]) -> bool {
    x.dims().ends_with(end)
}

/// Whether each sequence of (b, l, c) has its parameters (b, 1, c).
fn modulates(x: &T, parameters: &T) -> bool {
    x.rank() == 3 && parameters.dims() == [x.dims()[0], 1, x.dims()[2]]
}

/// Whether channels divide into groups and each has its parameters.
fn grouped(x: &T, groups: usize, parameters: &[&T]) -> bool {
    x.rank() == 4
        && groups > 0
        && x.dims()[1].is_multiple_of(groups)
        && parameters.iter().all(|p| p.dims() == &x.dims()[1..2])
}

fn masked(mask: &Mask<T>) -> bool {
    match mask {
        Mask::Full | Mask::Causal => true,
        Mask::Bias(bias) => fits(&[bias]),
    }
}
