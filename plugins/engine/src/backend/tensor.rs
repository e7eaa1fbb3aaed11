//! The operations that a backend must implement. Start here: everything else is composed of these.
//!
//! Shapes are given with each operation, in row-major order (the layout in memory is up to the backend); broadcasting is
//! NumPy's. An operation's arguments define it, never a backend's default. Tensors are reference counted and cheap to clone.
//! They are immutable except through methods whose names end in `_`, which write in place; every clone sees the change.

use std::fmt::Debug;

use crate::error::Result;

/// The type of a result that need not have the storage type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// That of storage: f32.
    Storage,
    /// The type of products' operands, for tensors read only by products ([`Tensors::factor`]).
    Factor,
}

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

/// A tensor library. Storage is f32; a backend may compute products in another type.
pub trait Tensors: Sized + Send + Sync + 'static {
    /// A tensor: of floats (the backend's compute type or f32) or of indices (unsigned, at least 32 bits).
    type Tensor: Clone + Send + Sync + Debug;

    /// The backend of a tensor, with its device and precision: for making tensors that are combined with it.
    fn of(x: &Self::Tensor) -> Self;

    /// The same device with products in f32: for measurements, which must not depend on a recipe's `dtype`.
    fn exact(&self) -> Self;

    /// An upper bound of the bytes free for tensors on a device with its own memory. None if tensors are in host memory, or
    /// if it is unknown.
    fn free_memory(&self) -> Option<u64> {
        None
    }

    /// Copies floats to the device.
    fn floats(&self, data: &[f32], shape: &[usize]) -> Result<Self::Tensor>;

    /// Copies indices to the device.
    fn indices(&self, data: &[u32], shape: &[usize]) -> Result<Self::Tensor>;

    /// Floats, all `value`.
    fn full(&self, shape: &[usize], value: f32) -> Result<Self::Tensor>;

    /// The same numbers in the type in which products are computed: for weights and caches that only products
    /// ([`Layers::linear`](crate::backend::Layers::linear), [`Attention::attention`](crate::backend::Attention::attention))
    /// read.
    fn factor(x: &Self::Tensor) -> Result<Self::Tensor> {
        Ok(x.clone())
    }

    /// Copies floats to the host, row-major.
    fn to_floats(x: &Self::Tensor) -> Result<Vec<f32>>;

    /// Copies indices to the host, row-major.
    fn to_indices(x: &Self::Tensor) -> Result<Vec<u32>>;

    /// Sizes of the dimensions.
    fn shape(x: &Self::Tensor) -> Vec<usize>;

    /// Same elements, other shape.
    fn reshape(x: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;

    /// Dimension i of the result is dimension `dims[i]` of x.
    fn permute(x: &Self::Tensor, dims: &[usize]) -> Result<Self::Tensor>;

    /// Elements start..start+len of a dimension.
    fn narrow(x: &Self::Tensor, dim: usize, start: usize, len: usize) -> Result<Self::Tensor>;

    /// Concatenates tensors along a dimension.
    fn cat(xs: &[&Self::Tensor], dim: usize) -> Result<Self::Tensor>;

    /// Broadcasts to a shape of the same or higher rank.
    fn expand(x: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;

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

    /// Index of the maximum over the last dimension, which is removed; the lowest index among equals.
    fn argmax_last(x: &Self::Tensor) -> Result<Self::Tensor>;

    /// Matrix product of the last two dimensions, (.., m, k) x (.., k, n) -> (.., m, n), with equal leading dimensions; `ta`
    /// and `tb` mean that an operand is given transposed.
    fn matmul(a: &Self::Tensor, b: &Self::Tensor, ta: bool, tb: bool) -> Result<Self::Tensor>;

    /// Rows of a table: (k, d) indexed by ids of any shape -> (ids.., d).
    fn rows(table: &Self::Tensor, ids: &Self::Tensor) -> Result<Self::Tensor>;

    /// Adjoint of [`Tensors::rows`]: adds each gradient row (ids.., d) to its row of a zero table (k, d).
    fn rows_adjoint(grad: &Self::Tensor, ids: &Self::Tensor, k: usize) -> Result<Self::Tensor>;

    /// One element of the last dimension per index: (.., k) with ids (..) -> (..).
    fn pick(x: &Self::Tensor, ids: &Self::Tensor) -> Result<Self::Tensor>;

    /// Adjoint of [`Tensors::pick`]: grad (..) placed at its index in zeros (.., k).
    fn pick_adjoint(grad: &Self::Tensor, ids: &Self::Tensor, k: usize) -> Result<Self::Tensor>;

    /// Cross-correlation: (b, c, h, w) with (o, c, kh, kw) -> (b, o, h', w'); `padding` are the zeros above and below,
    /// and left and right.
    fn conv2d(
        x: &Self::Tensor,
        w: &Self::Tensor,
        stride: usize,
        padding: [usize; 2],
    ) -> Result<Self::Tensor>;

    /// Gradients of [`Tensors::conv2d`] for its input and its kernel; each is computed only when wanted.
    fn conv2d_backward(
        x: &Self::Tensor,
        w: &Self::Tensor,
        grad: &Self::Tensor,
        stride: usize,
        padding: [usize; 2],
        want: (bool, bool),
    ) -> Result<(Option<Self::Tensor>, Option<Self::Tensor>)>;

    /// Writes `src` into x at `start` along a dimension (the KV cache).
    fn write_(x: &Self::Tensor, dim: usize, start: usize, src: &Self::Tensor) -> Result<()>;

    /// Replaces the values of x by those of `src`, of the same shape.
    fn assign_(x: &Self::Tensor, src: &Self::Tensor) -> Result<()>;
}
