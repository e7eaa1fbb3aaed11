//! The tensor operations a plugin must bring: one trait, monomorphised once per plugin.
//!
//! In: tensors of dynamic rank, row-major by meaning (layout is the backend's own affair). Out: new tensors; shapes
//! are given beside each operation, broadcasting is NumPy's. Nothing here knows gradients: the engine's tape
//! (`tape.rs`) owns differentiation and asks for values only. Operations worth fusing come as a pair, forward and
//! backward, with composed defaults, so that a new backend starts with the required methods and replaces the rest
//! one at a time. Deliberately absent: random numbers, parameters, optimiser state, files: the engine owns them, so
//! that backends agree and resumed runs are exact. Semantics are arguments, never a backend's default.
//!
//! Tensors are reference counted and cheap to clone. They are immutable except through the methods whose names end
//! in `_`, which write in place and are seen by every clone.

use std::any::Any;
use std::fmt::Debug;

use crate::error::Result;

/// Element-wise functions of one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unary {
    /// e^x
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root.
    Sqrt,
    /// x^2
    Square,
    /// 1/x
    Recip,
    /// Hyperbolic tangent.
    Tanh,
    /// 1/(1+e^-x)
    Sigmoid,
    /// The error function.
    Erf,
    /// x * sigmoid(x)
    Silu,
    /// GELU by the tanh approximation (torch `approximate="tanh"`).
    GeluTanh,
    /// GELU by the error function.
    GeluErf,
    /// max(x, 0)
    Relu,
}

/// Element-wise functions of two arguments, with broadcasting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    /// a + b
    Add,
    /// a - b
    Sub,
    /// a * b
    Mul,
    /// a / b
    Div,
    /// The greater of the two.
    Max,
}

/// Which keys a query may see.
#[derive(Debug, Clone)]
pub enum Mask<T> {
    /// All.
    Full,
    /// Query i of lq sees keys 0..=(lk - lq + i).
    Causal,
    /// Added to the scores before the softmax: (lq, lk), or of rank 4 and broadcast to (b, h, lq, lk).
    Bias(T),
}

/// One AdamW step's numbers (Loshchilov and Hutter 2019, arXiv 1711.05101), bias corrections already computed.
#[derive(Debug, Clone, Copy)]
pub struct AdamwStep {
    /// Learning rate at this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// 1 - beta1^step
    pub correction1: f64,
    /// 1 - beta2^step
    pub correction2: f64,
    /// The gradient is multiplied by this first (clipping by global norm).
    pub grad_scale: f64,
}

/// The numbers of the AR flow map (`flow.rs`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlowSolver {
    /// Steps of the Adams method, an evaluation of the codebook each (`flow::steps`).
    pub steps: usize,
}

impl Default for FlowSolver {
    fn default() -> Self {
        Self {
            steps: crate::flow::STEPS,
        }
    }
}

/// Which codes a row of logits leaves to choose from (`choice.rs`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Truncation {
    /// Logits are divided by this.
    pub temperature: f64,
    /// Only so many of the most probable codes stay; 0 keeps all.
    pub top_k: usize,
    /// Of these only the most probable whose probabilities sum to this, the first over the sum included; 1 keeps all.
    pub top_p: f64,
}

/// Square windows that slide over an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Side of the window.
    pub size: usize,
    /// Step to the next window, in both directions.
    pub stride: usize,
    /// Positions beyond the image on each side, which no value ever comes from.
    pub padding: usize,
}

impl Window {
    /// Number of windows along a side of `n` pixels.
    pub fn count(&self, n: usize) -> usize {
        match (n + 2 * self.padding).checked_sub(self.size) {
            Some(beyond) => beyond / self.stride + 1,
            None => 0,
        }
    }
}

/// What [`Backend::repeat`] keeps between calls: the backend's own affair, nothing at first.
#[derive(Default)]
pub struct Recording(pub Option<Box<dyn Any>>);

/// A tensor library.
pub trait Backend: Sized + Send + Sync + 'static {
    /// A tensor: of floats (the backend's compute type or f32) or of indices (unsigned, at least 32 bits).
    type Tensor: Clone + Send + Sync + Debug;

    /// The same device, with products in f32: for what is measured and must not depend on a recipe's `dtype`.
    fn exact(&self) -> Self;

    // ---- host and device -------------------------------------------------------------------------------------

    /// Copies floats to the device.
    fn floats(&self, data: &[f32], shape: &[usize]) -> Result<Self::Tensor>;
    /// Copies indices to the device.
    fn indices(&self, data: &[u32], shape: &[usize]) -> Result<Self::Tensor>;
    /// Floats, all `value`.
    fn full(&self, shape: &[usize], value: f32) -> Result<Self::Tensor>;
    /// Copies floats to the device of another tensor.
    fn floats_beside(other: &Self::Tensor, data: &[f32], shape: &[usize]) -> Result<Self::Tensor>;
    /// Floats, all `value`, on the device of another tensor.
    fn full_beside(other: &Self::Tensor, shape: &[usize], value: f32) -> Result<Self::Tensor> {
        Self::floats_beside(other, &vec![value; shape.iter().product()], shape)
    }
    /// Copies indices to the device of another tensor.
    fn indices_beside(other: &Self::Tensor, data: &[u32], shape: &[usize]) -> Result<Self::Tensor>;
    /// The same numbers in the type in which products are computed: for weights and caches that only products
    /// ([`Backend::linear`], [`Backend::attention`]) read.
    fn factor(x: &Self::Tensor) -> Result<Self::Tensor> {
        Ok(x.clone())
    }
    /// Copies floats to the host, row-major.
    fn to_floats(x: &Self::Tensor) -> Result<Vec<f32>>;
    /// Copies indices to the host, row-major.
    fn to_indices(x: &Self::Tensor) -> Result<Vec<u32>>;
    /// Sizes of the dimensions.
    fn shape(x: &Self::Tensor) -> Vec<usize>;

    // ---- movement --------------------------------------------------------------------------------------------

    /// Same elements, other shape.
    fn reshape(x: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;
    /// Dimension i of the result is dimension `dims[i]` of x.
    fn permute(x: &Self::Tensor, dims: &[usize]) -> Result<Self::Tensor>;
    /// Elements start..start+len of a dimension.
    fn narrow(x: &Self::Tensor, dim: usize, start: usize, len: usize) -> Result<Self::Tensor>;
    /// Tensors one behind the other along a dimension.
    fn cat(xs: &[&Self::Tensor], dim: usize) -> Result<Self::Tensor>;
    /// Broadcasts to a shape of the same or higher rank.
    fn expand(x: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;

    // ---- arithmetic ------------------------------------------------------------------------------------------

    /// A function of each element.
    fn unary(x: &Self::Tensor, f: Unary) -> Result<Self::Tensor>;
    /// A function of pairs of elements, broadcasting.
    fn binary(a: &Self::Tensor, b: &Self::Tensor, f: Binary) -> Result<Self::Tensor>;
    /// x * mul + add
    fn affine(x: &Self::Tensor, mul: f64, add: f64) -> Result<Self::Tensor>;
    /// Sum over dimensions, which stay with size 1.
    fn sum(x: &Self::Tensor, dims: &[usize]) -> Result<Self::Tensor>;
    /// Maximum over the last dimension, which stays with size 1.
    fn max_last(x: &Self::Tensor) -> Result<Self::Tensor>;
    /// Index of the maximum over the last dimension, which goes; the lowest index among equals.
    fn argmax_last(x: &Self::Tensor) -> Result<Self::Tensor>;
    /// Matrix product of the last two dimensions, (.., m, k) x (.., k, n) -> (.., m, n), with equal leading
    /// dimensions; `ta`, `tb` say that an operand is given transposed.
    fn matmul(a: &Self::Tensor, b: &Self::Tensor, ta: bool, tb: bool) -> Result<Self::Tensor>;
    /// Rows of a table: (k, d) indexed by ids of any shape -> (ids.., d).
    fn rows(table: &Self::Tensor, ids: &Self::Tensor) -> Result<Self::Tensor>;
    /// Adjoint of [`Backend::rows`]: adds each gradient row (ids.., d) to its row of a zero table (k, d).
    fn rows_adjoint(grad: &Self::Tensor, ids: &Self::Tensor, k: usize) -> Result<Self::Tensor>;
    /// One element of the last dimension per index: (.., k) with ids (..) -> (..).
    fn pick(x: &Self::Tensor, ids: &Self::Tensor) -> Result<Self::Tensor>;
    /// Adjoint of [`Backend::pick`]: grad (..) placed at its index in zeros (.., k).
    fn pick_adjoint(grad: &Self::Tensor, ids: &Self::Tensor, k: usize) -> Result<Self::Tensor>;

    /// Cross-correlation: (b, c, h, w) with (o, c, kh, kw) -> (b, o, h', w'); `padding` are the zeros above and below,
    /// and left and right.
    fn conv2d(
        x: &Self::Tensor,
        w: &Self::Tensor,
        stride: usize,
        padding: [usize; 2],
    ) -> Result<Self::Tensor>;
    /// [`Backend::conv2d`] plus a bias (o) and, where there is one, a residual of the result's shape.
    fn conv2d_bias(
        x: &Self::Tensor,
        w: &Self::Tensor,
        bias: &Self::Tensor,
        residual: Option<&Self::Tensor>,
        stride: usize,
        padding: [usize; 2],
    ) -> Result<Self::Tensor> {
        let y = Self::conv2d(x, w, stride, padding)?;
        let bias = Self::reshape(bias, &[Self::shape(&y)[1], 1, 1])?;
        let y = Self::binary(&y, &bias, Binary::Add)?;
        match residual {
            Some(residual) => Self::binary(&y, residual, Binary::Add),
            None => Ok(y),
        }
    }
    /// [`Backend::conv2d_bias`] with stride 1 of images twice as high and wide ([`upsample2`]).
    fn conv2d_upsampled(
        x: &Self::Tensor,
        w: &Self::Tensor,
        bias: &Self::Tensor,
        padding: [usize; 2],
    ) -> Result<Self::Tensor> {
        Self::conv2d_bias(&upsample2::<Self>(x)?, w, bias, None, 1, padding)
    }
    /// Gradients of [`Backend::conv2d`] for its input and its kernel; each is computed only when wanted.
    fn conv2d_backward(
        x: &Self::Tensor,
        w: &Self::Tensor,
        grad: &Self::Tensor,
        stride: usize,
        padding: [usize; 2],
        want: (bool, bool),
    ) -> Result<(Option<Self::Tensor>, Option<Self::Tensor>)>;

    // ---- in place --------------------------------------------------------------------------------------------

    /// Writes `src` into x at `start` along a dimension (the KV cache).
    fn write_(x: &Self::Tensor, dim: usize, start: usize, src: &Self::Tensor) -> Result<()>;
    /// Replaces the values of x by those of `src`, of the same shape.
    fn assign_(x: &Self::Tensor, src: &Self::Tensor) -> Result<()>;
    /// One AdamW step on a parameter and its moments.
    fn adamw_(
        p: &Self::Tensor,
        m: &Self::Tensor,
        v: &Self::Tensor,
        g: &Self::Tensor,
        s: &AdamwStep,
    ) -> Result<()> {
        let g = Self::affine(g, s.grad_scale, 0.0)?;
        let m1 = Self::binary(
            &Self::affine(m, s.beta1, 0.0)?,
            &Self::affine(&g, 1.0 - s.beta1, 0.0)?,
            Binary::Add,
        )?;
        let g2 = Self::unary(&g, Unary::Square)?;
        let v1 = Self::binary(
            &Self::affine(v, s.beta2, 0.0)?,
            &Self::affine(&g2, 1.0 - s.beta2, 0.0)?,
            Binary::Add,
        )?;
        let denominator = Self::affine(
            &Self::unary(&v1, Unary::Sqrt)?,
            s.correction2.sqrt().recip(),
            s.eps,
        )?;
        let update = Self::affine(
            &Self::binary(&m1, &denominator, Binary::Div)?,
            s.lr / s.correction1,
            0.0,
        )?;
        let p1 = Self::binary(
            &Self::affine(p, 1.0 - s.lr * s.weight_decay, 0.0)?,
            &update,
            Binary::Sub,
        )?;
        Self::assign_(m, &m1)?;
        Self::assign_(v, &v1)?;
        Self::assign_(p, &p1)
    }
    /// average <- decay * average + (1 - decay) * x
    fn ema_(average: &Self::Tensor, x: &Self::Tensor, decay: f64) -> Result<()> {
        let a = Self::affine(average, decay, 0.0)?;
        let b = Self::affine(x, 1.0 - decay, 0.0)?;
        Self::assign_(average, &Self::binary(&a, &b, Binary::Add)?)
    }

    // ---- fused, with composed defaults ------------------------------------------------------------------------

    /// [`Backend::unary`], for products to read: it may be in their type.
    fn unary_factor(x: &Self::Tensor, f: Unary) -> Result<Self::Tensor> {
        Self::unary(x, f)
    }

    /// Gradient of [`Backend::unary`]: `x` its argument, `y` its result.
    fn unary_backward(
        x: &Self::Tensor,
        y: &Self::Tensor,
        grad: &Self::Tensor,
        f: Unary,
    ) -> Result<Self::Tensor> {
        let mul = |a: &Self::Tensor, b: &Self::Tensor| Self::binary(a, b, Binary::Mul);
        match f {
            Unary::Exp => mul(grad, y),
            Unary::Log => Self::binary(grad, x, Binary::Div),
            Unary::Sqrt => Self::affine(&Self::binary(grad, y, Binary::Div)?, 0.5, 0.0),
            Unary::Square => Self::affine(&mul(grad, x)?, 2.0, 0.0),
            Unary::Recip => Self::affine(&mul(grad, &Self::unary(y, Unary::Square)?)?, -1.0, 0.0),
            Unary::Tanh => mul(
                grad,
                &Self::affine(&Self::unary(y, Unary::Square)?, -1.0, 1.0)?,
            ),
            Unary::Sigmoid => mul(grad, &mul(y, &Self::affine(y, -1.0, 1.0)?)?),
            Unary::Silu => {
                // s (1 + x (1 - s))
                let s = Self::unary(x, Unary::Sigmoid)?;
                let inner = Self::affine(&mul(x, &Self::affine(&s, -1.0, 1.0)?)?, 1.0, 1.0)?;
                mul(grad, &mul(&s, &inner)?)
            }
            Unary::GeluTanh => {
                // y = x/2 (1 + tanh u), u = c (x + a x^3)
                let (c, a) = ((2.0 / std::f64::consts::PI).sqrt(), 0.044715);
                let x2 = Self::unary(x, Unary::Square)?;
                let u = mul(x, &Self::affine(&x2, c * a, c)?)?;
                let t = Self::unary(&u, Unary::Tanh)?;
                let dt = Self::affine(&Self::unary(&t, Unary::Square)?, -0.5, 0.5)?;
                let du = Self::affine(&x2, 3.0 * c * a, c)?;
                let d = Self::binary(
                    &Self::affine(&t, 0.5, 0.5)?,
                    &mul(&mul(x, &dt)?, &du)?,
                    Binary::Add,
                )?;
                mul(grad, &d)
            }
            Unary::GeluErf => {
                // y = x Phi(x), y' = Phi(x) + x phi(x)
                let phi = Self::affine(
                    &Self::unary(&Self::affine(x, 0.5f64.sqrt(), 0.0)?, Unary::Erf)?,
                    0.5,
                    0.5,
                )?;
                let bell = Self::unary(
                    &Self::affine(&Self::unary(x, Unary::Square)?, -0.5, 0.0)?,
                    Unary::Exp,
                )?;
                let density =
                    Self::affine(&bell, (2.0 * std::f64::consts::PI).sqrt().recip(), 0.0)?;
                mul(grad, &Self::binary(&phi, &mul(x, &density)?, Binary::Add)?)
            }
            Unary::Erf => {
                let bell = Self::unary(
                    &Self::affine(&Self::unary(x, Unary::Square)?, -1.0, 0.0)?,
                    Unary::Exp,
                )?;
                mul(
                    grad,
                    &Self::affine(&bell, 2.0 / std::f64::consts::PI.sqrt(), 0.0)?,
                )
            }
            Unary::Relu => {
                // y/|y| is 1 where y > 0: y / max(y, tiny)
                let tiny = Self::affine(y, 0.0, f32::MIN_POSITIVE as f64)?;
                mul(
                    grad,
                    &Self::binary(y, &Self::binary(y, &tiny, Binary::Max)?, Binary::Div)?,
                )
            }
        }
    }

    /// x (.., i) times w (o, i) transposed, plus bias (o): -> (.., o).
    fn linear(
        x: &Self::Tensor,
        w: &Self::Tensor,
        bias: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor> {
        let (mut shape, wide) = (Self::shape(x), Self::shape(w));
        let rows = shape.iter().product::<usize>() / wide[1];
        let y = Self::matmul(&Self::reshape(x, &[rows, wide[1]])?, w, false, true)?;
        let y = match bias {
            Some(b) => Self::binary(&y, b, Binary::Add)?,
            None => y,
        };
        *shape.last_mut().expect("linear: rank >= 1") = wide[0];
        Self::reshape(&y, &shape)
    }

    /// Gradients of [`Backend::linear`] for its input, given w, and for its weight, given x.
    fn linear_backward(
        x: Option<&Self::Tensor>,
        w: Option<&Self::Tensor>,
        grad: &Self::Tensor,
    ) -> Result<(Option<Self::Tensor>, Option<Self::Tensor>)> {
        let flat = |x: &Self::Tensor| {
            let shape = Self::shape(x);
            let last = shape[shape.len() - 1];
            Self::reshape(x, &[shape.iter().product::<usize>() / last, last])
        };
        let g = flat(grad)?;
        let dx = |w: &Self::Tensor| {
            let mut shape = Self::shape(grad);
            *shape.last_mut().expect("linear: rank >= 1") = Self::shape(w)[1];
            Self::reshape(&Self::matmul(&g, w, false, false)?, &shape)
        };
        let dw = |x: &Self::Tensor| Self::matmul(&g, &flat(x)?, true, false);
        Ok((w.map(dx).transpose()?, x.map(dw).transpose()?))
    }

    /// Softmax over the last dimension.
    fn softmax(x: &Self::Tensor) -> Result<Self::Tensor> {
        let last = Self::shape(x).len() - 1;
        let e = Self::unary(
            &Self::binary(x, &Self::max_last(x)?, Binary::Sub)?,
            Unary::Exp,
        )?;
        Self::binary(&e, &Self::sum(&e, &[last])?, Binary::Div)
    }
    /// Gradient of [`Backend::softmax`] from its result.
    fn softmax_backward(y: &Self::Tensor, grad: &Self::Tensor) -> Result<Self::Tensor> {
        let last = Self::shape(y).len() - 1;
        let inner = Self::sum(&Self::binary(y, grad, Binary::Mul)?, &[last])?;
        Self::binary(y, &Self::binary(grad, &inner, Binary::Sub)?, Binary::Mul)
    }

    /// x / sqrt(mean(x^2) + eps) * w over the last dimension; w (d).
    fn rms_norm(x: &Self::Tensor, w: &Self::Tensor, eps: f64) -> Result<Self::Tensor> {
        Self::binary(
            &Self::binary(x, &inverse_rms::<Self>(x, eps)?, Binary::Mul)?,
            w,
            Binary::Mul,
        )
    }
    /// Gradients of [`Backend::rms_norm`] for x and w.
    fn rms_norm_backward(
        x: &Self::Tensor,
        w: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
    ) -> Result<(Self::Tensor, Self::Tensor)> {
        let last = Self::shape(x).len() - 1;
        let d = Self::shape(x)[last] as f64;
        let r = inverse_rms::<Self>(x, eps)?;
        let n = Self::binary(x, &r, Binary::Mul)?;
        let gw = Self::binary(grad, w, Binary::Mul)?;
        let inner = Self::affine(
            &Self::sum(&Self::binary(&gw, &n, Binary::Mul)?, &[last])?,
            1.0 / d,
            0.0,
        )?;
        let dx = Self::binary(
            &Self::binary(&gw, &Self::binary(&n, &inner, Binary::Mul)?, Binary::Sub)?,
            &r,
            Binary::Mul,
        )?;
        let all: Vec<usize> = (0..last).collect();
        let dw = Self::reshape(
            &Self::sum(&Self::binary(grad, &n, Binary::Mul)?, &all)?,
            &Self::shape(w),
        )?;
        Ok((dx, dw))
    }

    /// [`Backend::rms_norm`] for products alone to read: in their type, if that is another ([`Backend::factor`]).
    fn rms_norm_factor(x: &Self::Tensor, w: &Self::Tensor, eps: f64) -> Result<Self::Tensor> {
        Self::rms_norm(x, w, eps)
    }

    /// x / |x| of x (b, l, h, d) over the last dimension, times a length per head (h) where there are lengths, for
    /// products to read: it may be in their type. Zeros stay zeros.
    fn unit(x: &Self::Tensor, length: Option<&Self::Tensor>) -> Result<Self::Tensor> {
        let y = unit::<Self>(x)?;
        match length {
            Some(length) => Self::binary(&y, &of_heads::<Self>(length)?, Binary::Mul),
            None => Ok(y),
        }
    }
    /// Gradients of [`Backend::unit`] for x and the lengths.
    fn unit_backward(
        x: &Self::Tensor,
        length: Option<&Self::Tensor>,
        grad: &Self::Tensor,
    ) -> Result<(Self::Tensor, Option<Self::Tensor>)> {
        let (scale, eps) = root_mean_square::<Self>(x)?;
        let Some(length) = length else {
            return Ok((Self::rms_norm_backward(x, &scale, grad, eps)?.0, None));
        };
        let along = Self::binary(grad, &unit::<Self>(x)?, Binary::Mul)?;
        let dlength = Self::reshape(&Self::sum(&along, &[0, 1, 3])?, &Self::shape(length))?;
        let grad = Self::binary(grad, &of_heads::<Self>(length)?, Binary::Mul)?;
        let dx = Self::rms_norm_backward(x, &scale, &grad, eps)?.0;
        Ok((dx, Some(dlength)))
    }

    /// (x - mean) / sqrt(var + eps) over the last dimension, without affine part.
    fn layer_norm(x: &Self::Tensor, eps: f64) -> Result<Self::Tensor> {
        Ok(standardise::<Self>(x, eps)?.0)
    }
    /// Gradient of [`Backend::layer_norm`].
    fn layer_norm_backward(
        x: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
    ) -> Result<Self::Tensor> {
        let (y, r) = standardise::<Self>(x, eps)?;
        standardise_backward::<Self>(&y, &r, grad)
    }

    /// [`Backend::layer_norm`] of x (b, l, c) times scale plus shift, (b, 1, c) each, for products to read: it may be in
    /// their type.
    fn modulated_norm(
        x: &Self::Tensor,
        scale: &Self::Tensor,
        shift: &Self::Tensor,
        eps: f64,
    ) -> Result<Self::Tensor> {
        let y = Self::layer_norm(x, eps)?;
        Self::binary(&Self::binary(&y, scale, Binary::Mul)?, shift, Binary::Add)
    }

    /// Gradients of [`Backend::modulated_norm`] for x, scale and shift.
    fn modulated_norm_backward(
        x: &Self::Tensor,
        scale: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)> {
        let along = Self::binary(grad, &Self::layer_norm(x, eps)?, Binary::Mul)?;
        let (dscale, dshift) = (Self::sum(&along, &[1])?, Self::sum(grad, &[1])?);
        let grad = Self::binary(grad, scale, Binary::Mul)?;
        Ok((Self::layer_norm_backward(x, &grad, eps)?, dscale, dshift))
    }

    /// x + y gate (+ added): x, y and added (b, l, c), gate (b, 1, c).
    fn gated_add(
        x: &Self::Tensor,
        y: &Self::Tensor,
        gate: &Self::Tensor,
        added: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor> {
        let sum = Self::binary(x, &Self::binary(y, gate, Binary::Mul)?, Binary::Add)?;
        match added {
            Some(added) => Self::binary(&sum, added, Binary::Add),
            None => Ok(sum),
        }
    }
    /// Gradients of [`Backend::gated_add`] for y and the gate; those for x and what is added are `grad` itself.
    fn gated_add_backward(
        y: &Self::Tensor,
        gate: &Self::Tensor,
        grad: &Self::Tensor,
    ) -> Result<(Self::Tensor, Self::Tensor)> {
        let dgate = Self::sum(&Self::binary(grad, y, Binary::Mul)?, &[1])?;
        Ok((Self::binary(grad, gate, Binary::Mul)?, dgate))
    }

    /// Group normalisation of (b, c, h, w) with scale and shift (c).
    fn group_norm(
        x: &Self::Tensor,
        groups: usize,
        w: &Self::Tensor,
        bias: &Self::Tensor,
        eps: f64,
    ) -> Result<Self::Tensor> {
        let s = Self::shape(x);
        let grouped = Self::reshape(
            x,
            &[s[0] * groups, s.iter().product::<usize>() / (s[0] * groups)],
        )?;
        let y = Self::reshape(&standardise::<Self>(&grouped, eps)?.0, &s)?;
        let (w, bias) = (
            Self::reshape(w, &[s[1], 1, 1])?,
            Self::reshape(bias, &[s[1], 1, 1])?,
        );
        Self::binary(&Self::binary(&y, &w, Binary::Mul)?, &bias, Binary::Add)
    }
    /// [`Backend::group_norm`], then [`Unary::Silu`], as before every convolution of a decoder.
    fn group_norm_silu(
        x: &Self::Tensor,
        groups: usize,
        w: &Self::Tensor,
        bias: &Self::Tensor,
        eps: f64,
    ) -> Result<Self::Tensor> {
        Self::unary(&Self::group_norm(x, groups, w, bias, eps)?, Unary::Silu)
    }
    /// Gradients of [`Backend::group_norm`] for x, scale and shift.
    fn group_norm_backward(
        x: &Self::Tensor,
        groups: usize,
        w: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)> {
        let s = Self::shape(x);
        let flat = [s[0] * groups, s.iter().product::<usize>() / (s[0] * groups)];
        let (y, r) = standardise::<Self>(&Self::reshape(x, &flat)?, eps)?;
        let normal = Self::reshape(&y, &s)?;
        let dw = Self::reshape(
            &Self::sum(&Self::binary(grad, &normal, Binary::Mul)?, &[0, 2, 3])?,
            &[s[1]],
        )?;
        let db = Self::reshape(&Self::sum(grad, &[0, 2, 3])?, &[s[1]])?;
        let gw = Self::binary(grad, &Self::reshape(w, &[s[1], 1, 1])?, Binary::Mul)?;
        let dx = standardise_backward::<Self>(&y, &r, &Self::reshape(&gw, &flat)?)?;
        Ok((Self::reshape(&dx, &s)?, dw, db))
    }

    /// The greatest value of each window of (b, c, h, w): -> (b, c, h', w').
    fn max_pool2d(x: &Self::Tensor, window: Window) -> Result<Self::Tensor> {
        let all = windows::<Self>(x, window)?;
        let s = Self::shape(&all);
        Self::reshape(&Self::max_last(&all)?, &s[..4])
    }
    /// Gradient of [`Backend::max_pool2d`]: it goes to the first of a window's greatest values, row by row.
    fn max_pool2d_backward(
        x: &Self::Tensor,
        grad: &Self::Tensor,
        window: Window,
    ) -> Result<Self::Tensor> {
        let all = windows::<Self>(x, window)?;
        let first = Self::argmax_last(&all)?;
        let spread = Self::pick_adjoint(grad, &first, window.size * window.size)?;
        windows_adjoint::<Self>(&spread, &Self::shape(x), window)
    }

    /// Rotates interleaved pairs: x (b, l, h, d), cos and sin (l, d/2).
    fn rope(x: &Self::Tensor, cos: &Self::Tensor, sin: &Self::Tensor) -> Result<Self::Tensor> {
        let s = Self::shape(x);
        let half = [s[0], s[1], s[2], s[3] / 2, 1];
        let pairs = Self::reshape(x, &[s[0], s[1], s[2], s[3] / 2, 2])?;
        let (a, b) = (
            Self::narrow(&pairs, 4, 0, 1)?,
            Self::narrow(&pairs, 4, 1, 1)?,
        );
        let table = |t: &Self::Tensor| Self::reshape(t, &[1, half[1], 1, half[3], 1]);
        let (cos, sin) = (table(cos)?, table(sin)?);
        let mul = |a: &Self::Tensor, b: &Self::Tensor| Self::binary(a, b, Binary::Mul);
        let re = Self::binary(&mul(&a, &cos)?, &mul(&b, &sin)?, Binary::Sub)?;
        let im = Self::binary(&mul(&a, &sin)?, &mul(&b, &cos)?, Binary::Add)?;
        Self::reshape(&Self::cat(&[&re, &im], 4)?, &s)
    }

    /// What a step of a generation does with its positions: q, k, v (b, l, h, d), of which q and k turn by cos and sin
    /// (l, d/2); keys and values go into caches (b, l', h, d) at position `at`. Returns the queries.
    #[expect(clippy::too_many_arguments, reason = "one pass over them all")]
    fn rope_cached(
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        cos: &Self::Tensor,
        sin: &Self::Tensor,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        at: usize,
    ) -> Result<Self::Tensor> {
        Self::write_(keys, 1, at, &Self::rope(k, cos, sin)?)?;
        Self::write_(values, 1, at, v)?;
        Self::rope(q, cos, sin)
    }

    /// softmax(scale q k^T + mask) v: q (b, lq, h, d), k and v (b, lk, h, d) -> (b, lq, h, d), for products to read: it
    /// may be in their type.
    fn attention(
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        mask: &Mask<Self::Tensor>,
        scale: f64,
    ) -> Result<Self::Tensor> {
        let p = attention_weights::<Self>(q, k, mask, scale)?;
        Self::permute(
            &Self::matmul(&p, &heads_first::<Self>(v)?, false, false)?,
            &[0, 2, 1, 3],
        )
    }
    /// Gradients of [`Backend::attention`] for q, k and v; `y` is its result.
    fn attention_backward(
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        mask: &Mask<Self::Tensor>,
        scale: f64,
        y: &Self::Tensor,
        grad: &Self::Tensor,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)> {
        let _ = y; // kept for fused implementations
        let p = attention_weights::<Self>(q, k, mask, scale)?; // (b, h, lq, lk)
        let g = heads_first::<Self>(grad)?;
        let dv = Self::matmul(&p, &g, true, false)?;
        let dp = Self::matmul(&g, &heads_first::<Self>(v)?, false, true)?;
        let ds = Self::affine(&Self::softmax_backward(&p, &dp)?, scale, 0.0)?;
        let dq = Self::matmul(&ds, &heads_first::<Self>(k)?, false, false)?;
        let dk = Self::matmul(&ds, &heads_first::<Self>(q)?, true, false)?;
        let back = |x: Self::Tensor| Self::permute(&x, &[0, 2, 1, 3]);
        Ok((back(dq)?, back(dk)?, back(dv)?))
    }

    /// What the position after `at` others of each sequence does, q, k and v (b, 1, h, d): q and k turn by row `at` of cos
    /// and sin (n, d/2), k and v go into their caches (b, n, h, d) at `at`, and q attends to what these hold up to there,
    /// with `hidden` (b, 1, 1, n) added to the scores: -> (b, 1, h, d).
    ///
    /// `place` holds `at` too, as indices (1), for a backend that does it again with another ([`Backend::repeat`]).
    fn attend_next(
        [q, k, v]: [&Self::Tensor; 3],
        [cos, sin]: [&Self::Tensor; 2],
        [keys, values]: [&Self::Tensor; 2],
        at: usize,
        _place: &Self::Tensor,
        hidden: Option<&Self::Tensor>,
        scale: f64,
    ) -> Result<Self::Tensor> {
        let row = |table| Self::narrow(table, 0, at, 1);
        let q = Self::rope_cached(q, k, v, &row(cos)?, &row(sin)?, keys, values, at)?;
        let seen = |cache| Self::narrow(cache, 1, 0, at + 1);
        let mask = match hidden {
            None => Mask::Full,
            Some(hidden) => Mask::Bias(Self::narrow(hidden, 3, 0, at + 1)?),
        };
        Self::attention(&q, &seen(keys)?, &seen(values)?, &mask, scale)
    }

    /// What `step` makes of the inputs. It has to do the same operations whenever it is called with what was `kept`, on
    /// tensors of the same shapes, all but the inputs those of the last time; so a backend may note them at one call and
    /// have them done at the next without calling it (a CUDA graph). Positions reach it as inputs. It moves nothing
    /// between host and device. What it returns is overwritten at the next call.
    fn repeat(
        _kept: &mut Recording,
        inputs: &[&Self::Tensor],
        step: &mut dyn FnMut(&[&Self::Tensor]) -> Result<Self::Tensor>,
    ) -> Result<Self::Tensor> {
        step(inputs)
    }

    /// silu(a) * b where x (.., 2 d) holds a then b: -> (.., d), for products to read: it may be in their type.
    fn swiglu(x: &Self::Tensor) -> Result<Self::Tensor> {
        let (a, b) = halves::<Self>(x)?;
        Self::binary(&Self::unary(&a, Unary::Silu)?, &b, Binary::Mul)
    }
    /// Gradient of [`Backend::swiglu`].
    fn swiglu_backward(x: &Self::Tensor, grad: &Self::Tensor) -> Result<Self::Tensor> {
        let (a, b) = halves::<Self>(x)?;
        let s = Self::unary(&a, Unary::Silu)?;
        let da = Self::unary_backward(&a, &s, &Self::binary(grad, &b, Binary::Mul)?, Unary::Silu)?;
        let db = Self::binary(grad, &s, Binary::Mul)?;
        Self::cat(&[&da, &db], Self::shape(x).len() - 1)
    }

    /// -log softmax(logits)[id] per row: logits (n, k), ids (n) -> (n).
    fn cross_entropy(logits: &Self::Tensor, ids: &Self::Tensor) -> Result<Self::Tensor> {
        let shifted = Self::binary(logits, &Self::max_last(logits)?, Binary::Sub)?;
        let total = Self::unary(
            &Self::sum(&Self::unary(&shifted, Unary::Exp)?, &[1])?,
            Unary::Log,
        )?;
        let n = Self::shape(logits)[0];
        Self::binary(
            &Self::reshape(&total, &[n])?,
            &Self::pick(&shifted, ids)?,
            Binary::Sub,
        )
    }
    /// Gradient of [`Backend::cross_entropy`] for the logits; grad (n).
    fn cross_entropy_backward(
        logits: &Self::Tensor,
        ids: &Self::Tensor,
        grad: &Self::Tensor,
    ) -> Result<Self::Tensor> {
        let s = Self::shape(logits);
        let spread = Self::binary(
            &Self::softmax(logits)?,
            &Self::reshape(grad, &[s[0], 1])?,
            Binary::Mul,
        )?;
        Self::binary(&spread, &Self::pick_adjoint(grad, ids, s[1])?, Binary::Sub)
    }

    /// Logits (n, k) over the temperature, -inf where a code is excluded; equal ones go by their index. The default asks the
    /// host.
    fn truncate(logits: &Self::Tensor, truncation: &Truncation) -> Result<Self::Tensor> {
        crate::choice::truncate::<Self>(logits, truncation)
    }
    /// The code of each row of logits (n, k) at which the cumulative probability passes a number in [0, 1): -> ids (n).
    /// The default asks the host.
    fn categorical(logits: &Self::Tensor, uniforms: &[f64]) -> Result<Self::Tensor> {
        crate::choice::categorical::<Self>(logits, uniforms)
    }

    /// AR flow matching (`flow.rs` has the mathematics): logits (n, k) after guidance and truncation
    /// (-inf where excluded), noise (n, d), codebook (k, d) -> ids (n).
    fn flow_map(
        logits: &Self::Tensor,
        noise: &Self::Tensor,
        codebook: &Self::Tensor,
        solver: &FlowSolver,
    ) -> Result<Self::Tensor> {
        crate::flow::composed::<Self>(logits, noise, codebook, solver)
    }
}

/// A root mean square norm is this scale, (d), times smaller than the vector over its length; and an epsilon as small as
/// torch's in F.normalize, which keeps a zero vector finite.
pub(crate) fn root_mean_square<B: Backend>(x: &B::Tensor) -> Result<(B::Tensor, f64)> {
    let shape = B::shape(x);
    let d = shape[shape.len() - 1];
    let scale = B::full_beside(x, &[d], (d as f32).sqrt().recip())?;
    Ok((scale, 1e-24 / d as f64))
}

/// x / |x| over the last dimension.
fn unit<B: Backend>(x: &B::Tensor) -> Result<B::Tensor> {
    let (scale, eps) = root_mean_square::<B>(x)?;
    B::rms_norm(x, &scale, eps)
}

/// Numbers per head (h) as (h, 1).
fn of_heads<B: Backend>(x: &B::Tensor) -> Result<B::Tensor> {
    B::reshape(x, &[B::shape(x)[0], 1])
}

/// Each pixel of (b, c, h, w) becomes a block of 2 x 2 (nearest neighbour): (b, c, 2 h, 2 w).
pub fn upsample2<B: Backend>(x: &B::Tensor) -> Result<B::Tensor> {
    let s = B::shape(x);
    let pixels = B::reshape(x, &[s[0], s[1], s[2], 1, s[3], 1])?;
    let blocks = B::expand(&pixels, &[s[0], s[1], s[2], 2, s[3], 2])?;
    B::reshape(&blocks, &[s[0], s[1], 2 * s[2], 2 * s[3]])
}

fn inverse_rms<B: Backend>(x: &B::Tensor, eps: f64) -> Result<B::Tensor> {
    let last = B::shape(x).len() - 1;
    let d = B::shape(x)[last] as f64;
    let mean = B::affine(
        &B::sum(&B::unary(x, Unary::Square)?, &[last])?,
        1.0 / d,
        eps,
    )?;
    B::unary(&B::unary(&mean, Unary::Sqrt)?, Unary::Recip)
}

/// The standardised x over the last dimension and the reciprocal of its deviation.
fn standardise<B: Backend>(x: &B::Tensor, eps: f64) -> Result<(B::Tensor, B::Tensor)> {
    let last = B::shape(x).len() - 1;
    let d = B::shape(x)[last] as f64;
    let mean = B::affine(&B::sum(x, &[last])?, 1.0 / d, 0.0)?;
    let centred = B::binary(x, &mean, Binary::Sub)?;
    let variance = B::affine(
        &B::sum(&B::unary(&centred, Unary::Square)?, &[last])?,
        1.0 / d,
        eps,
    )?;
    let r = B::unary(&B::unary(&variance, Unary::Sqrt)?, Unary::Recip)?;
    Ok((B::binary(&centred, &r, Binary::Mul)?, r))
}

/// Gradient through [`standardise`]: r (g - mean(g) - y mean(g y)).
fn standardise_backward<B: Backend>(
    y: &B::Tensor,
    r: &B::Tensor,
    grad: &B::Tensor,
) -> Result<B::Tensor> {
    let last = B::shape(y).len() - 1;
    let d = B::shape(y)[last] as f64;
    let mean = B::affine(&B::sum(grad, &[last])?, 1.0 / d, 0.0)?;
    let along = B::affine(
        &B::sum(&B::binary(grad, y, Binary::Mul)?, &[last])?,
        1.0 / d,
        0.0,
    )?;
    let g = B::binary(
        &B::binary(grad, &mean, Binary::Sub)?,
        &B::binary(y, &along, Binary::Mul)?,
        Binary::Sub,
    )?;
    B::binary(&g, r, Binary::Mul)
}

/// (b, l, h, d) -> (b, h, l, d)
fn heads_first<B: Backend>(x: &B::Tensor) -> Result<B::Tensor> {
    B::permute(x, &[0, 2, 1, 3])
}

/// Attention weights (b, h, lq, lk).
fn attention_weights<B: Backend>(
    q: &B::Tensor,
    k: &B::Tensor,
    mask: &Mask<B::Tensor>,
    scale: f64,
) -> Result<B::Tensor> {
    let scores = B::affine(
        &B::matmul(&heads_first::<B>(q)?, &heads_first::<B>(k)?, false, true)?,
        scale,
        0.0,
    )?;
    let scores = match mask {
        Mask::Full => scores,
        Mask::Causal => B::binary(&scores, &causal_bias::<B>(&scores)?, Binary::Add)?,
        Mask::Bias(bias) => B::binary(&scores, bias, Binary::Add)?,
    };
    B::softmax(&scores)
}

fn halves<B: Backend>(x: &B::Tensor) -> Result<(B::Tensor, B::Tensor)> {
    let shape = B::shape(x);
    let last = shape.len() - 1;
    let d = shape[last] / 2;
    Ok((B::narrow(x, last, 0, d)?, B::narrow(x, last, d, d)?))
}

/// 0 where a query may see a key, -inf elsewhere: (lq, lk) of the scores (b, h, lq, lk).
fn causal_bias<B: Backend>(scores: &B::Tensor) -> Result<B::Tensor> {
    let s = B::shape(scores);
    let (lq, lk) = (s[2], s[3]);
    let bias: Vec<f32> = (0..lq * lk)
        .map(|i| {
            if i % lk <= i / lk + lk - lq {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        })
        .collect();
    B::floats_beside(scores, &bias, &[lq, lk])
}

/// The values of each window in its last dimension: (b, c, h, w) -> (b, c, h', w', size^2).
fn windows<B: Backend>(x: &B::Tensor, window: Window) -> Result<B::Tensor> {
    let s = B::shape(x);
    let Window {
        size,
        stride,
        padding,
    } = window;
    // A frame of the lowest float, wide enough for whole steps from every place in the window.
    let mut framed = x.clone();
    for d in [2, 3] {
        let all = size - 1 + window.count(s[d]) * stride;
        framed = frame::<B>(&framed, d, padding, all, f32::MIN)?;
    }
    let (high, wide) = (window.count(s[2]), window.count(s[3]));
    let mut places = Vec::with_capacity(size * size);
    for (dy, dx) in (0..size).flat_map(|dy| (0..size).map(move |dx| (dy, dx))) {
        let place = B::narrow(&framed, 2, dy, high * stride)?;
        let place = B::narrow(&place, 3, dx, wide * stride)?;
        let place = B::reshape(&place, &[s[0], s[1], high, stride, wide, stride])?;
        let place = B::narrow(&B::narrow(&place, 3, 0, 1)?, 5, 0, 1)?;
        places.push(B::reshape(&place, &[s[0], s[1], high, wide, 1])?);
    }
    B::cat(&places.iter().collect::<Vec<_>>(), 4)
}

/// Adjoint of [`windows`] for images of a shape.
fn windows_adjoint<B: Backend>(
    grad: &B::Tensor,
    shape: &[usize],
    window: Window,
) -> Result<B::Tensor> {
    let Window {
        size,
        stride,
        padding,
    } = window;
    let (high, wide) = (window.count(shape[2]), window.count(shape[3]));
    let sides = [high, wide].map(|n| size - 1 + n * stride);
    let mut sum: Option<B::Tensor> = None;
    for place in 0..size * size {
        let g = B::narrow(grad, 4, place, 1)?;
        let g = B::reshape(&g, &[shape[0], shape[1], high, 1, wide, 1])?;
        let g = frame::<B>(&frame::<B>(&g, 3, 0, stride, 0.0)?, 5, 0, stride, 0.0)?;
        let g = B::reshape(&g, &[shape[0], shape[1], high * stride, wide * stride])?;
        let g = frame::<B>(&g, 2, place / size, sides[0], 0.0)?;
        let g = frame::<B>(&g, 3, place % size, sides[1], 0.0)?;
        sum = Some(match sum {
            Some(sum) => B::binary(&sum, &g, Binary::Add)?,
            None => g,
        });
    }
    let mut dx = sum.expect("a window has at least one place");
    for d in [2, 3] {
        // Pixels beyond the last window got nothing.
        dx = frame::<B>(&dx, d, 0, padding + shape[d], 0.0)?;
        dx = B::narrow(&dx, d, padding, shape[d])?;
    }
    Ok(dx)
}

/// Lengthens a dimension to at least `all` elements: `before` of a value, then x, then that value again.
fn frame<B: Backend>(
    x: &B::Tensor,
    dim: usize,
    before: usize,
    all: usize,
    value: f32,
) -> Result<B::Tensor> {
    let mut shape = B::shape(x);
    let after = all.saturating_sub(before + shape[dim]);
    let one = B::floats_beside(x, &[value], &vec![1; shape.len()])?;
    let mut side = |n: usize| {
        shape[dim] = n;
        B::expand(&one, &shape)
    };
    let (left, right) = (side(before)?, side(after)?);
    let mut parts = Vec::with_capacity(3);
    if before > 0 {
        parts.push(&left);
    }
    parts.push(x);
    if after > 0 {
        parts.push(&right);
    }
    B::cat(&parts, dim)
}
