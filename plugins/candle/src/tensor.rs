//! Tensors on the host: candle's, with the precision of the products that they take part in.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use candle_core::DType;
use retort_engine::error::Result;
use retort_kernels::half::Packed;

use crate::failed;

/// A tensor of candle: f32, or indices; bf16 for weights that only products read.
pub type Raw = candle_core::Tensor;

/// The tiles of a weight that never changes, made when the first product needs them.
#[derive(Debug, Clone, Default)]
pub struct Tiles(pub(crate) Arc<OnceLock<Packed>>);

/// A tensor on the host. Kernels, which never look at the precision, take it as candle's.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Elements.
    pub(crate) raw: Raw,
    /// Whether products take their operands in bf16.
    pub(crate) half: bool,
    /// What products take instead of the elements of a weight that never changes.
    pub(crate) tiles: Option<Tiles>,
}

impl Tensor {
    /// A result of an operation on this tensor: its products have the same precision.
    pub fn like(&self, raw: Raw) -> Self {
        Self::new(raw, self.half)
    }

    /// A tensor with this precision of products. Elements in bf16 are weights that only products read: they get tiles.
    pub fn new(raw: Raw, half: bool) -> Self {
        let tiles = (half && raw.dtype() == DType::BF16).then(Tiles::default);
        Self { raw, half, tiles }
    }

    /// The same for a result that may have failed.
    pub fn with(&self, raw: Result<Raw>) -> Result<Self> {
        Ok(self.like(raw?))
    }

    /// The same for two results.
    pub fn with_two(&self, raw: Result<(Raw, Raw)>) -> Result<(Self, Self)> {
        let (a, b) = raw?;
        Ok((self.like(a), self.like(b)))
    }

    /// The same for three results.
    pub fn with_three(&self, raw: Result<(Raw, Raw, Raw)>) -> Result<(Self, Self, Self)> {
        let (a, b, c) = raw?;
        Ok((self.like(a), self.like(b), self.like(c)))
    }

    /// The elements in f32.
    pub fn single(&self) -> Result<Raw> {
        match self.raw.dtype() {
            DType::BF16 => self.raw.to_dtype(DType::F32).map_err(failed),
            _ => Ok(self.raw.clone()),
        }
    }
}

impl Deref for Tensor {
    type Target = Raw;

    fn deref(&self) -> &Raw {
        &self.raw
    }
}

impl From<Raw> for Tensor {
    /// A tensor whose products are in f32.
    fn from(raw: Raw) -> Self {
        Self::new(raw, false)
    }
}

#[cfg(test)]
mod tests {
    use retort_engine::backend::{Binary, Layers, Tensors};

    use crate::Candle;

    #[test]
    fn results_take_the_precision_of_their_first_operand() {
        let open = |dtype| Candle::open("cpu", dtype, 1).expect("the CPU opens");
        let single = open("f32").full(&[2, 2], 1.0).expect("a tensor");
        let half = open("bf16").full(&[2, 2], 1.0).expect("a tensor");
        assert!(half.half && !single.half);
        for (a, b) in [(&half, &single), (&single, &half)] {
            let sum = Candle::binary(a, b, Binary::Add).expect("a sum");
            let whole = Candle::cat(&[a, b], 0).expect("a whole");
            let y = Candle::linear(a, b, None).expect("a product");
            assert_eq!([sum.half, whole.half, y.half], [a.half; 3]);
        }
        let of = Candle::of(&half);
        assert!(of.full(&[1], 1.0).expect("a tensor").half);
        assert!(!of.exact().full(&[1], 1.0).expect("a tensor").half);
        assert!(Candle::open("cpu", "f16", 1).is_err());
    }
}
