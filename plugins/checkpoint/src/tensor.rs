//! A tensor in a file: type, shape, strides, position of the first element, and how its elements are read.

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::source::Source;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// Bytes of a view that are reordered at a time.
const SLAB: usize = 8 << 20;
/// Gaps of up to this many bytes between elements are read instead of skipped.
const GAP: u64 = 4096;
/// Bytes read ahead when gaps are that small.
const AHEAD: u64 = 64 << 10;
/// The most bytes read at once for runs whose average gap is at most [`GAP`].
const HELD: u64 = 64 << 20;
/// A view may be larger than its file up to this many bytes.
const VIEW: u64 = 64 << 20;
/// The most dimensions of a tensor.
pub(crate) const DIMENSIONS: usize = 16;
/// The most tensors of a file.
pub(crate) const TENSORS: u64 = 100_000;

/// A tensor that has not been read yet. Several may share a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// Elements between neighbours of each dimension; 0 repeats one.
    strides: Vec<usize>,
    /// Position of the first element in its source.
    start: u64,
    /// Which of the sources of a checkpoint it lies in.
    pub(crate) source: usize,
}

impl Tensor {
    /// A tensor whose elements are contiguous in the file, last dimension fastest.
    pub(crate) fn contiguous(dtype: Dtype, shape: Vec<usize>, start: u64) -> Self {
        let strides = row_major(&shape);
        Self {
            dtype,
            shape,
            strides,
            start,
            source: 0,
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
            source: 0,
        })
    }

    /// The same in another of a checkpoint's sources.
    pub(crate) fn within(mut self, source: usize) -> Self {
        self.source = source;
        self
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
        // A tensor without elements may have any strides.
        let before = (first as u64).saturating_mul(self.strides[0] as u64);
        part.start = part.start.saturating_add(before.saturating_mul(size));
        Some(part)
    }

    /// One element as a tensor of shape (1), if the index is valid.
    pub fn element(&self, place: &[usize]) -> Option<Self> {
        if place.len() != self.shape.len() {
            return None;
        }
        let size = self.dtype.bitsize() as u64 / 8;
        let mut part = self.clone();
        for ((&at, &n), &stride) in place.iter().zip(&self.shape).zip(&self.strides) {
            if at >= n {
                return None;
            }
            let before = (at as u64).saturating_mul(stride as u64);
            part.start = part.start.saturating_add(before.saturating_mul(size));
        }
        (part.shape, part.strides) = (vec![1], vec![1]);
        Some(part)
    }

    /// Position of the first element, if it has one.
    pub(crate) fn begins(&self) -> Option<u64> {
        (self.elements() > 0).then_some(self.start)
    }

    /// Position and length of its bytes, if its elements are contiguous and in order.
    pub(crate) fn run(&self) -> Option<(u64, u64)> {
        match self.merged()[..] {
            [] | [(_, 1)] => Some((self.start, self.bytes())),
            _ => None,
        }
    }

    /// Whether the elements are floats of a type that can be read as such.
    pub fn is_float(&self) -> bool {
        matches!(
            self.dtype,
            Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16
        )
    }

    /// Bytes of an element.
    pub(crate) fn width(&self) -> usize {
        self.dtype.bitsize() / 8
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

    /// Number of elements, if the memory for them is justified: a view may repeat elements, so a small file may describe a
    /// huge tensor.
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

    /// Passes on the elements' little-endian bytes, last dimension fastest, in pieces of whole elements. The tensor must have
    /// been checked.
    pub(crate) fn visit(&self, source: &Source, mut each: impl FnMut(&[u8])) -> Result<()> {
        let size = self.dtype.bitsize() / 8;
        if self.elements() == 0 {
            return Ok(());
        }
        let dims = self.merged();
        let (&(n, stride), outer) = match dims.split_last() {
            None => (&(1, 1), &[][..]),
            Some((last, outer)) => (last, outer),
        };
        if outer.is_empty() && stride == 1 {
            let bytes = (n * size) as u64;
            let mut buffer = vec![0; CHUNK.min(bytes as usize)];
            let end = self.start + bytes;
            let mut position = self.start;
            while position < end {
                let n = (end - position).min(buffer.len() as u64) as usize;
                source.read_at(position, &mut buffer[..n])?;
                each(&buffer[..n]);
                position += n as u64;
            }
            return Ok(());
        }
        let end = self.start + (reach(&dims) + 1) * size as u64;
        let mut window = Window {
            source,
            end,
            start: 0,
            bytes: Vec::new(),
        };
        let mut slab = Vec::new();
        slabs(
            &dims,
            SLAB / size,
            self.start,
            size as u64,
            &mut |start, dims| {
                slab.resize(dims.iter().map(|d| d.0).product::<usize>() * size, 0);
                gather(&mut window, (start, size), dims, &mut slab)?;
                each(&slab);
                Ok(())
            },
        )
    }

    /// Sizes and strides without dimensions of size 1, with contiguous dimensions merged.
    fn merged(&self) -> Vec<(usize, usize)> {
        let mut merged: Vec<(usize, usize)> = Vec::new();
        for (&n, &stride) in self.shape.iter().zip(&self.strides) {
            match merged.last_mut() {
                _ if n == 1 => {}
                Some(last) if stride.checked_mul(n) == Some(last.1) => *last = (last.0 * n, stride),
                _ => merged.push((n, stride)),
            }
        }
        merged
    }
}

/// Elements from the first to the last of a view.
fn reach(dims: &[(usize, usize)]) -> u64 {
    dims.iter()
        .map(|&(n, stride)| (n as u64 - 1) * stride as u64)
        .sum()
}

/// Divides a view into parts of at most `most` elements, in order: gives the position and the dimensions of each.
fn slabs(
    dims: &[(usize, usize)],
    most: usize,
    start: u64,
    size: u64,
    each: &mut impl FnMut(u64, &[(usize, usize)]) -> Result<()>,
) -> Result<()> {
    let inner: usize = dims[1..].iter().map(|d| d.0).product();
    let (n, stride) = dims[0];
    let at = |i: usize| start + i as u64 * stride as u64 * size;
    if inner > most {
        return (0..n).try_for_each(|i| slabs(&dims[1..], most, at(i), size, each));
    }
    let mut part = dims.to_vec();
    for first in (0..n).step_by((most / inner).max(1)) {
        part[0].0 = (most / inner).max(1).min(n - first);
        each(at(first), &part)?;
    }
    Ok(())
}

/// Reorders the elements of a view. They are read in file order, by runs; skipped bytes are not read, however far the view
/// reaches.
fn gather(
    window: &mut Window<'_>,
    (start, size): (u64, usize),
    dims: &[(usize, usize)],
    out: &mut [u8],
) -> Result<()> {
    // (entries, stride in the file, stride in the result), the widest stride in the file first; repetitions are outermost.
    let mut order = Vec::with_capacity(dims.len());
    let mut own = 1;
    for &(n, stride) in dims.iter().rev() {
        order.push((n, stride, own));
        own *= n;
    }
    order.sort_by_key(|&(_, stride, _)| {
        std::cmp::Reverse(if stride == 0 { usize::MAX } else { stride })
    });
    let Some(((n, stride, step), outer)) = order.split_last().map(|(last, outer)| (*last, outer))
    else {
        return Ok(());
    };
    // Contiguous runs at once, anything else element by element.
    let run = if stride == 1 { n.min(CHUNK / size) } else { 1 };
    let block = dense_block(outer, (n, stride, run), size as u64);
    let mut index = vec![0; outer.len()];
    let (mut from, mut to) = (start, 0);
    loop {
        if let Some(DenseBlock { dim, entries, span }) = block
            && index.iter().skip(dim + 1).all(|&i| i == 0)
            && index
                .get(dim)
                .is_none_or(|&i: &usize| i.is_multiple_of(entries))
        {
            window.hold(from, span)?;
        }
        for first in (0..n).step_by(run) {
            let count = run.min(n - first);
            let position = from + (first * stride * size) as u64;
            let bytes = window.bytes(position, count * size)?;
            let place = (to + first * step) * size;
            if step == 1 {
                out[place..place + bytes.len()].copy_from_slice(bytes);
            } else {
                for (i, element) in bytes.chunks_exact(size).enumerate() {
                    let place = place + i * step * size;
                    out[place..place + size].copy_from_slice(element);
                }
            }
        }
        // The next run, the innermost dimension first.
        let mut dim = outer.len();
        loop {
            if dim == 0 {
                return Ok(());
            }
            dim -= 1;
            let (n, stride, step) = outer[dim];
            index[dim] += 1;
            from += (stride * size) as u64;
            to += step;
            if index[dim] < n {
                break;
            }
            from -= (n * stride * size) as u64;
            to -= n * step;
            index[dim] = 0;
        }
    }
}

/// A part of a view whose bytes are read at once: some entries of a dimension, with everything inside them.
struct DenseBlock {
    dim: usize,
    entries: usize,
    /// Bytes from the first to the last of it.
    span: u64,
}

/// The largest part of a view that is dense enough to be read at once, if there is one: otherwise scattered elements would
/// each be read separately. The dimension after `outer` has `n` entries, in runs of `run`.
fn dense_block(
    outer: &[(usize, usize, usize)],
    (n, stride, run): (usize, usize, usize),
    size: u64,
) -> Option<DenseBlock> {
    let mut found = None;
    let mut span = (n as u64 - 1)
        .saturating_mul(stride as u64)
        .saturating_add(1);
    span = span.saturating_mul(size);
    let mut runs = n.div_ceil(run) as u64;
    let is_close = |runs: u64, span| runs.saturating_mul(GAP) >= span;
    if span <= HELD && is_close(runs, span) {
        let (dim, entries) = (outer.len(), 1);
        found = Some(DenseBlock { dim, entries, span });
    }
    for (dim, &(n, stride, _)) in outer.iter().enumerate().rev() {
        if span > HELD {
            break;
        }
        let step = (stride as u64).saturating_mul(size);
        let more = (HELD - span).checked_div(step).unwrap_or(u64::MAX);
        let entries = (n as u64).min(more.saturating_add(1));
        span += (entries - 1) * step;
        runs = runs.saturating_mul(entries);
        if is_close(runs, span) {
            let entries = entries as usize;
            found = Some(DenseBlock { dim, entries, span });
        }
        if entries < n as u64 {
            break;
        }
    }
    found
}

/// The most recently read bytes of a source.
struct Window<'a> {
    source: &'a Source,
    /// The end of the readable range.
    end: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    /// Reads this many bytes, up to the end, unless they are in the buffer.
    fn hold(&mut self, position: u64, len: u64) -> Result<()> {
        let len = len.min(self.end - position);
        let last = self.start + self.bytes.len() as u64;
        if position < self.start || position + len > last {
            self.bytes.resize(len as usize, 0);
            self.start = position;
            self.source.read_at(position, &mut self.bytes)?;
        }
        Ok(())
    }

    fn bytes(&mut self, position: u64, len: usize) -> Result<&[u8]> {
        let last = self.start + self.bytes.len() as u64;
        let held = position >= self.start && position + len as u64 <= last;
        if !held {
            // If the next bytes are close, read through the gap.
            let close = !self.bytes.is_empty() && position >= self.start && position <= last + GAP;
            let ahead = if close { AHEAD } else { 0 };
            let len = ahead.max(len as u64).min(self.end - position);
            self.bytes.resize(len as usize, 0);
            self.start = position;
            self.source.read_at(position, &mut self.bytes)?;
        }
        let at = (position - self.start) as usize;
        Ok(&self.bytes[at..at + len])
    }
}

fn elements(shape: &[usize]) -> Option<u64> {
    shape
        .iter()
        .try_fold(1u64, |product, &n| product.checked_mul(n as u64))
}

/// Strides of a contiguous tensor; dimensions of size 1 may have any.
pub(crate) fn row_major(shape: &[usize]) -> Vec<usize> {
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
    fn large_views_are_read_as_small_ones() {
        // 300 x 70 x 50 elements of four bytes, in all orders of dimensions, in parts of every size.
        let n = [300usize, 70, 50];
        let storage: Vec<u8> = (0..n.iter().product::<usize>() as u32)
            .flat_map(u32::to_le_bytes)
            .collect();
        let source = Source::Memory(storage.as_slice().into());
        let strides = [70 * 50, 50, 1];
        for [a, b, c] in [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let dims = [a, b, c].map(|d| (n[d], strides[d]));
            let mut expected = Vec::new();
            for i in 0..dims[0].0 {
                for j in 0..dims[1].0 {
                    for k in 0..dims[2].0 {
                        let at = i * dims[0].1 + j * dims[1].1 + k * dims[2].1;
                        expected.extend((at as u32).to_le_bytes());
                    }
                }
            }
            for most in [1, 7, 50, 60, 5000, 1 << 20] {
                let (mut found, end) = (Vec::new(), storage.len() as u64);
                let mut window = Window {
                    source: &source,
                    end,
                    start: 0,
                    bytes: Vec::new(),
                };
                slabs(&dims, most, 0, 4, &mut |start, dims| {
                    let mut slab = vec![0; dims.iter().map(|d| d.0).product::<usize>() * 4];
                    assert!(slab.len() <= 4 * most);
                    gather(&mut window, (start, 4), dims, &mut slab)?;
                    found.extend(slab);
                    Ok(())
                })
                .unwrap();
                assert!(found == expected, "{a} {b} {c} by {most}");
            }
        }
    }

    #[test]
    fn strewn_elements_are_read_together() {
        // Neighbours of the view are further apart than a gap, but interleaved.
        let storage: Vec<u8> = (0..2_000_000u32).map(|i| (i % 251) as u8).collect();
        for (shape, strides) in [([190, 200], [5000, 5001]), ([200, 190], [5001, 5000])] {
            let dims = (shape.to_vec(), strides.to_vec());
            let tensor = Tensor::view(Dtype::U8, dims, 7, (0, 2_000_000)).unwrap();
            let at = |i| 7 + i / shape[1] * strides[0] + i % shape[1] * strides[1];
            let expected: Vec<u8> = (0..190 * 200).map(|i| storage[at(i)]).collect();
            assert!(bytes(&tensor, &storage) == expected);
        }
        // Everything at once; as many entries as fit; repetitions included; nothing that is far apart.
        let check = |outer: &[(usize, usize, usize)], inner, expected| {
            let found = dense_block(outer, inner, 1);
            assert_eq!(
                found.map(|block| (block.dim, block.entries, block.span)),
                expected
            );
        };
        let span = 4095 * 5001 + 2047 * 5000 + 1;
        check(&[(4096, 5001, 1)], (2048, 5000, 1), Some((0, 4096, span)));
        let inner = 2047 * 5000 + 1;
        let entries = (HELD - inner) / 17_000 + 1;
        let span = inner + (entries - 1) * 17_000;
        let expected = Some((0, entries as usize, span));
        check(&[(4096, 17_000, 1)], (2048, 5000, 1), expected);
        check(&[(3, 0, 1)], (2, 9, 1), Some((0, 3, 10)));
        check(&[(3, 1 << 30, 1)], (2, 9, 1), Some((0, 1, 10)));
        check(&[], (2, 1 << 25, 1), None);
    }

    #[test]
    fn what_a_view_passes_over_is_not_read() {
        // 64 GiB of holes, except for both ends.
        let file = tempfile::tempfile().unwrap();
        let len = 64u64 << 30;
        file.set_len(len).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, b"ab", 0).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, b"yz", len - 2).unwrap();
        let source = Source::File(std::sync::Arc::new(file), len);
        let whole = len as usize;
        let view = |shape: &[usize], strides: &[usize]| {
            let dims = (shape.to_vec(), strides.to_vec());
            let tensor = Tensor::view(Dtype::U8, dims, 0, (0, len)).unwrap();
            let mut out = Vec::new();
            tensor
                .visit(&source, |piece| out.extend_from_slice(piece))
                .unwrap();
            out
        };
        assert_eq!(view(&[2], &[whole - 1]), b"az");
        assert_eq!(view(&[2, 2], &[1, whole - 2]), b"aybz");
        assert_eq!(view(&[3, 2], &[0, whole - 1]), b"azazaz");
        assert_eq!(view(&[2, 2, 2], &[whole - 2, 0, 1]), b"ababyzyz");
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
