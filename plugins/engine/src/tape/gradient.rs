//! A gradient on its way to a node: slices of it are kept apart until the node needs all of it, so that slices which lie beside
//! each other are joined once, instead of being padded with zeros and added.

use std::collections::BTreeMap;

use crate::backend::{Backend, Binary};
use crate::error::Result;

/// What is known of a gradient.
pub(super) enum Gradient<T> {
    Whole(T),
    /// Slices of a dimension, which do not overlap, by their starts. Elsewhere it is zero.
    Slices {
        shape: Vec<usize>,
        dim: usize,
        slices: BTreeMap<usize, T>,
    },
}

/// All of a gradient.
pub(super) fn whole<B: Backend>(gradient: Gradient<B::Tensor>) -> Result<B::Tensor> {
    let (mut shape, dim, slices) = match gradient {
        Gradient::Whole(gradient) => return Ok(gradient),
        Gradient::Slices { shape, dim, slices } => (shape, dim, slices),
    };
    let (all, mut end, mut parts) = (shape[dim], 0, Vec::new());
    let mut zeros = |like: &B::Tensor, n: usize| {
        shape[dim] = n;
        let zero = B::of(like).floats(&[0.0], &vec![1; shape.len()])?;
        B::expand(&zero, &shape)
    };
    for (start, slice) in slices {
        if start > end {
            parts.push(zeros(&slice, start - end)?);
        }
        end = start + B::shape(&slice)[dim];
        parts.push(slice);
    }
    if let Some(last) = parts.last()
        && end < all
    {
        let rest = zeros(last, all - end)?;
        parts.push(rest);
    }
    B::cat(&parts.iter().collect::<Vec<_>>(), dim)
}

/// The sum of what is known and of more.
pub(super) fn merged<B: Backend>(
    known: Gradient<B::Tensor>,
    more: Gradient<B::Tensor>,
) -> Result<Gradient<B::Tensor>> {
    match (known, more) {
        (
            Gradient::Slices {
                shape,
                dim,
                mut slices,
            },
            Gradient::Slices {
                dim: along,
                slices: more,
                ..
            },
        ) if dim == along && apart::<B>(&slices, &more, dim) => {
            slices.extend(more);
            Ok(Gradient::Slices { shape, dim, slices })
        }
        (known, more) => {
            let (known, more) = (whole::<B>(known)?, whole::<B>(more)?);
            Ok(Gradient::Whole(B::binary(&known, &more, Binary::Add)?))
        }
    }
}

/// Whether no slice of one overlaps one of the other.
fn apart<B: Backend>(
    a: &BTreeMap<usize, B::Tensor>,
    b: &BTreeMap<usize, B::Tensor>,
    dim: usize,
) -> bool {
    let end = |start: usize, slice: &B::Tensor| start + B::shape(slice)[dim];
    a.iter().all(|(&start, slice)| {
        b.iter()
            .all(|(&other, beside)| end(start, slice) <= other || end(other, beside) <= start)
    })
}
