//! A tensor in a file: type, shape, strides, where its first element lies; and how its elements are read.

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::source::Source;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// A view may be larger than its file up to this many bytes.
const VIEW: u64 = 64 << 20;

/// A tensor that has not been read yet. Several may share a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// Elements between neighbours of each dimension; 0 repeats one.
    strides: Vec<usize>,
    /// Position of the first element in the file.
    start: u64,
}

impl Tensor {
    /// A tensor whose elements lie in the file one after the other, last dimension fastest.
    pub(crate) fn contiguous(dtype: Dtype, shape: Vec<usize>, start: u64) -> Self {
        let strides = row_major(&shape);
        Self {
            dtype,
            shape,
            strides,
            start,
        }
    }

    /// A view of a storage: `offset` and `strides` count elements, `storage` is (position, bytes) in the file.
    pub(crate) fn view(
        dtype: Dtype,
        (shape, strides): (Vec<usize>, Vec<usize>),
        offset: u64,
        storage: (u64, u64),
    ) -> Result<Self> {
        let size = dtype.bitsize() as u64 / 8;
        let beyond = || {
            Error::format(format!(
                "a tensor of shape {shape:?} reaches beyond its storage of {} bytes",
                storage.1
            ))
        };
        if shape.len() != strides.len() {
            return Err(Error::format(format!(
                "a tensor with {} sizes and {} strides",
                shape.len(),
                strides.len()
            )));
        }
        elements(&shape).ok_or_else(beyond)?;
        let empty = shape.contains(&0);
        let last = shape
            .iter()
            .zip(&strides)
            .try_fold(offset, |sum, (&n, &stride)| {
                let reach = (n.saturating_sub(1) as u64).checked_mul(stride as u64)?;
                sum.checked_add(reach)
            });
        let end = if empty {
            Some(0)
        } else {
            last.and_then(|last| last.checked_add(1))
        };
        let end = end
            .and_then(|end| end.checked_mul(size))
            .ok_or_else(beyond)?;
        if end > storage.1 {
            return Err(beyond());
        }
        Ok(Self {
            dtype,
            start: storage.0 + if empty { 0 } else { offset * size },
            shape,
            strides,
        })
    }

    /// `count` entries of the first dimension from `first` on, if there are so many.
    pub fn rows(&self, first: usize, count: usize) -> Option<Self> {
        let &rows = self.shape.first()?;
        if first.checked_add(count)? > rows {
            return None;
        }
        let mut part = self.clone();
        part.shape[0] = count;
        let size = self.dtype.bitsize() as u64 / 8;
        part.start += first as u64 * self.strides[0] as u64 * size;
        Some(part)
    }

    /// Whether the elements are floats of a type that can be read as such.
    pub fn is_float(&self) -> bool {
        matches!(
            self.dtype,
            Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16
        )
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        // Checked when the tensor was made.
        elements(&self.shape).unwrap_or(u64::MAX)
    }

    /// Bytes of the elements, in the tensor's own type.
    pub fn bytes(&self) -> u64 {
        self.elements()
            .saturating_mul(self.dtype.bitsize() as u64)
            .div_ceil(8)
    }

    /// Number of elements, once it is known to be worth the memory: a view may repeat elements, and so a small file
    /// may speak of a huge tensor.
    pub(crate) fn check(&self, source: &Source) -> Result<usize> {
        if self.dtype.bitsize() < 8 {
            return Err(Error::format(format!(
                "elements of type {} are not supported",
                self.dtype
            )));
        }
        if self.bytes() > source.len().max(VIEW) {
            return Err(Error::format(format!(
                "a view of shape {:?} is larger than the file it is in",
                self.shape
            )));
        }
        Ok(self.elements() as usize)
    }

    /// Gives the elements' little-endian bytes, last dimension fastest, in pieces of whole elements. The tensor must
    /// have been checked.
    pub(crate) fn visit(&self, source: &Source, mut each: impl FnMut(&[u8])) -> Result<()> {
        let size = self.dtype.bitsize() / 8;
        if self.elements() == 0 {
            return Ok(());
        }
        if self.strides == row_major(&self.shape) {
            let mut buffer = vec![0; CHUNK.min(self.bytes() as usize)];
            let end = self.start + self.bytes();
            let mut position = self.start;
            while position < end {
                let n = (end - position).min(buffer.len() as u64) as usize;
                source.read_at(position, &mut buffer[..n])?;
                each(&buffer[..n]);
                position += n as u64;
            }
            return Ok(());
        }
        let reach: usize = self
            .shape
            .iter()
            .zip(&self.strides)
            .map(|(n, s)| (n - 1) * s)
            .sum();
        let storage = source.bytes(self.start, (reach + 1) as u64 * size as u64)?;
        let mut piece = Vec::with_capacity(CHUNK);
        let mut index = vec![0; self.shape.len()];
        let mut at = 0;
        loop {
            piece.extend_from_slice(&storage[at * size..(at + 1) * size]);
            if piece.len() + size > CHUNK {
                each(&piece);
                piece.clear();
            }
            // The next index, last dimension first.
            let mut dim = self.shape.len();
            loop {
                if dim == 0 {
                    each(&piece);
                    return Ok(());
                }
                dim -= 1;
                index[dim] += 1;
                at += self.strides[dim];
                if index[dim] < self.shape[dim] {
                    break;
                }
                at -= self.strides[dim] * self.shape[dim];
                index[dim] = 0;
            }
        }
    }
}

fn elements(shape: &[usize]) -> Option<u64> {
    shape
        .iter()
        .try_fold(1u64, |product, &n| product.checked_mul(n as u64))
}

/// Strides of a tensor whose elements lie one after the other; dimensions of size 1 have any.
fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(tensor: &Tensor, storage: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let source = Source::Memory(storage.into());
        tensor
            .visit(&source, |piece| out.extend_from_slice(piece))
            .unwrap();
        out
    }

    #[test]
    fn views_are_read_in_their_own_order() {
        let check = |shape: &[usize], strides: &[usize], offset, expected: &[u8]| {
            let dims = (shape.to_vec(), strides.to_vec());
            let tensor = Tensor::view(Dtype::U8, dims, offset, (2, 6)).unwrap();
            assert_eq!(bytes(&tensor, b"--abcdef"), expected);
        };
        check(&[2, 3], &[3, 1], 0, b"abcdef");
        check(&[3, 2], &[1, 3], 0, b"adbecf");
        check(&[2, 2], &[0, 2], 1, b"bdbd");
        check(&[], &[], 5, b"f");
        check(&[0, 9], &[9, 1], 100, b"");
        check(&[1, 2], &[77, 4], 0, b"ae");
    }

    #[test]
    fn rows_are_a_part_of_the_first_dimension() {
        let dims = (vec![3, 2], vec![1, 3]);
        let tensor = Tensor::view(Dtype::U8, dims, 0, (2, 6)).unwrap();
        assert_eq!(bytes(&tensor.rows(1, 2).unwrap(), b"--abcdef"), b"becf");
        assert_eq!(bytes(&tensor.rows(3, 0).unwrap(), b"--abcdef"), b"");
        assert!(tensor.rows(2, 2).is_none() && tensor.rows(usize::MAX, 2).is_none());
    }

    #[test]
    fn views_beyond_their_storage_are_refused() {
        let check = |shape: &[usize], strides: &[usize], offset| {
            let dims = (shape.to_vec(), strides.to_vec());
            Tensor::view(Dtype::F32, dims, offset, (0, 24)).unwrap_err();
        };
        check(&[7], &[1], 0);
        check(&[6], &[1], 1);
        check(&[2], &[6], 0);
        check(&[usize::MAX, usize::MAX], &[0, 0], 0);
        check(&[2], &[usize::MAX], 0);
        check(&[2, 2], &[1], 0);
        check(&[1], &[1], u64::MAX);
    }

    #[test]
    fn a_view_much_larger_than_its_file_is_not_read() {
        let dims = (vec![1 << 20, 1 << 20], vec![0, 0]);
        let tensor = Tensor::view(Dtype::F32, dims, 0, (0, 4)).unwrap();
        let source = Source::Memory([0; 4].as_slice().into());
        assert!(tensor.check(&source).is_err());
    }
}
