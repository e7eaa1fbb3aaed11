//! Structures that kernels take by value, laid out as in the kernels' source.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use retort_engine::backend::Window;
use retort_engine::error::{Error, Result};

/// Dimensions that a kernel walks.
const RANK: usize = 8;

/// `StridedDims` of the kernels: the sizes of dimensions, and the steps of two tensors along each.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StridedDims {
    rank: i32,
    size: [u32; RANK],
    first: [i64; RANK],
    second: [i64; RANK],
}

// SAFETY: a plain structure laid out as the kernel's.
unsafe impl DeviceRepr for StridedDims {}

impl StridedDims {
    /// From a shape and the steps of one or two tensors. Dimensions that are contiguous in both are merged.
    pub fn new(shape: &[usize], first: &[usize], second: &[usize]) -> Result<Self> {
        Self::of(merged(shape, first, second))
    }

    /// The same for groups of four adjacent elements in both; None if elements are not always in such groups.
    pub fn fours(shape: &[usize], first: &[usize], second: &[usize]) -> Result<Option<Self>> {
        let mut merged = merged(shape, first, second);
        match merged.pop() {
            Some([n, 1, 1]) if n % 4 == 0 => merged.push([n / 4, 4, 4]),
            _ => return Ok(None),
        }
        let outer = &merged[..merged.len() - 1];
        let apart = outer.iter().all(|[_, a, b]| a % 4 == 0 && b % 4 == 0);
        apart.then(|| Self::of(merged)).transpose()
    }

    fn of(merged: Vec<[usize; 3]>) -> Result<Self> {
        if merged.len() > RANK {
            let message = format!(
                "a tensor whose memory has {} dimensions; the kernels take at most {RANK}",
                merged.len()
            );
            return Err(Error::Backend(message));
        }
        let mut places = Self {
            rank: merged.len() as i32,
            size: [1; RANK],
            first: [0; RANK],
            second: [0; RANK],
        };
        for (d, [n, a, b]) in merged.into_iter().enumerate() {
            places.size[d] = n as u32;
            places.first[d] = a as i64;
            places.second[d] = b as i64;
        }
        Ok(places)
    }
}

/// Size and steps of each dimension, contiguous ones merged.
fn merged(shape: &[usize], first: &[usize], second: &[usize]) -> Vec<[usize; 3]> {
    let mut merged: Vec<[usize; 3]> = Vec::new();
    for ((&n, &a), &b) in shape.iter().zip(first).zip(second) {
        match merged.last_mut() {
            _ if n == 1 => {}
            Some(outer) if outer[1] == n * a && outer[2] == n * b => {
                *outer = [outer[0] * n, a, b];
            }
            _ => merged.push([n, a, b]),
        }
    }
    merged
}

/// `Steps` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Steps([i64; 4]);

// SAFETY: as above.
unsafe impl DeviceRepr for Steps {}

impl Steps {
    /// The steps of up to four dimensions.
    pub fn new(strides: &[usize]) -> Self {
        let mut steps = [0; 4];
        steps
            .iter_mut()
            .zip(strides)
            .for_each(|(step, &stride)| *step = stride as i64);
        Self(steps)
    }
}

/// `Heads` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub start: u64,
    pub steps: [i64; 3],
    pub half: i32,
    pub fours: i32,
}

// SAFETY: as above.
unsafe impl DeviceRepr for Heads {}

/// `VisibleKeys` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VisibleKeys {
    pub lq: u32,
    pub lk: u32,
    pub causal: i32,
    pub bias: u64,
    pub steps: Steps,
    pub kinds: u64,
}

// SAFETY: as above.
unsafe impl DeviceRepr for VisibleKeys {}

/// `PoolWindow` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PoolWindow {
    h: u32,
    w: u32,
    kh: u32,
    kw: u32,
    stride: u32,
    ph: u32,
    pw: u32,
    oh: u32,
    ow: u32,
    halvings: u32,
}

// SAFETY: as above.
unsafe impl DeviceRepr for PoolWindow {}

impl PoolWindow {
    /// A kernel of `size` pixels over an image.
    pub fn new(image: [usize; 2], size: [usize; 2], stride: usize, padding: [usize; 2]) -> Self {
        let count = |d: usize| {
            Window {
                size: size[d],
                stride,
                padding: padding[d],
            }
            .count(image[d]) as u32
        };
        Self {
            h: image[0] as u32,
            w: image[1] as u32,
            kh: size[0] as u32,
            kw: size[1] as u32,
            stride: stride as u32,
            ph: padding[0] as u32,
            pw: padding[1] as u32,
            oh: count(0),
            ow: count(1),
            halvings: 0,
        }
    }

    /// The same over images that are stored at half the height and width, each pixel standing for a block of 2 x 2.
    pub fn halved(self) -> Self {
        Self {
            halvings: 1,
            ..self
        }
    }

    /// Number of windows in each direction.
    pub fn windows(&self) -> [usize; 2] {
        [self.oh as usize, self.ow as usize]
    }
}

/// `Adamw` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Adamw {
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub grad_scale: f32,
    pub root: f32,
    pub rate: f32,
    pub keep: f32,
}

// SAFETY: as above.
unsafe impl DeviceRepr for Adamw {}

/// `Flow` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Flow {
    pub points: i32,
    pub dropped: f32,
    pub undecided: f32,
}

// SAFETY: as above.
unsafe impl DeviceRepr for Flow {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_that_lie_together_are_one() {
        let whole = StridedDims::new(&[2, 3, 4], &[12, 4, 1], &[12, 4, 1]).expect("places");
        assert_eq!((whole.rank, whole.size[0], whole.first[0]), (1, 24, 1));
        let row = StridedDims::new(&[5, 1, 4], &[4, 4, 1], &[0, 0, 1]).expect("places");
        assert_eq!(
            (row.rank, row.size[0], row.second[0], row.second[1]),
            (2, 5, 0, 1)
        );
        assert!(StridedDims::new(&[2; 9], &[3; 9], &[5; 9]).is_err());
    }

    #[test]
    fn fours_lie_together_in_both() {
        let fours = |shape: &[usize], first: &[usize], second: &[usize]| {
            StridedDims::fours(shape, first, second).expect("places")
        };
        let rows = fours(&[3, 8], &[12, 1], &[8, 1]).expect("fours");
        assert_eq!(
            (rows.size[..2].to_vec(), rows.first[..2].to_vec()),
            (vec![3, 2], vec![12, 4])
        );
        assert!(fours(&[3, 8], &[13, 1], &[8, 1]).is_none());
        assert!(fours(&[3, 6], &[8, 1], &[8, 1]).is_none());
        assert!(fours(&[8, 3], &[1, 8], &[3, 1]).is_none());
        assert!(fours(&[1], &[1], &[1]).is_none());
    }
}
