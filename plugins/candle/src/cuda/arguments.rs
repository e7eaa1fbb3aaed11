//! Checks arguments of kernels: shapes that must agree, rows, and whether pointers allow reading four elements at a time.

use candle_core::DType;
use retort_engine::error::{Error, Result};

use crate::cuda::launch::counted;
use crate::cuda::tensor::Tensor;
use crate::cuda::tensor::{Raw, convert, pointer};
use crate::failed;

type T = Tensor;

/// Whether rows of f32 can be read four elements at a time, in tensors that are row-major.
pub fn four(n: usize, all: &[&Raw]) -> Result<bool> {
    Ok(n.is_multiple_of(4) && together(all)?)
}

/// Whether tensors of f32 begin where four elements may be read at once.
pub fn together(all: &[&Raw]) -> Result<bool> {
    for x in all {
        if !pointer(x)?.is_multiple_of(16) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Heads of x (b, l, h, d), and their lengths.
pub fn lengths(x: &Raw, length: Option<&T>) -> Result<(usize, Option<Raw>)> {
    let h = x.dims4().map_err(failed)?.2;
    Ok((h, length.map(|length| sized(length, h)).transpose()?))
}

/// A tensor row by row: itself in f32, how many rows, and their length.
pub fn rows(x: &T) -> Result<(Raw, usize, u32)> {
    let from = x.single()?;
    let (n, last) = (from.elem_count(), from.dims().last().copied().unwrap_or(0));
    if n == 0 {
        return Err(Error::Backend(format!(
            "a tensor of the shape {:?} has no elements; this operation needs at least one row",
            from.dims()
        )));
    }
    counted(n)?;
    Ok((from, n / last, last as u32))
}

/// A parameter of so many elements.
pub fn sized(w: &T, n: usize) -> Result<Raw> {
    if w.raw.elem_count() != n {
        return Err(Error::Backend(format!(
            "a parameter {:?}, expected {n} elements",
            w.raw.dims()
        )));
    }
    convert(&w.raw, DType::F32)
}

/// Rows of a group norm, their length, and the pixels of a channel.
pub fn grouped(x: &Raw, groups: usize) -> Result<[usize; 3]> {
    let (b, c, h, w) = x.dims4().map_err(failed)?;
    if groups == 0 || c % groups != 0 || x.elem_count() == 0 {
        return Err(Error::Backend(format!(
            "group norm: {:?} in {groups} groups",
            x.dims()
        )));
    }
    counted(x.elem_count())?;
    Ok([b * groups, c / groups * h * w, h * w])
}

pub fn same(a: &Raw, b: &Raw) -> Result<()> {
    if a.dims() == b.dims() {
        return Ok(());
    }
    Err(Error::Backend(format!(
        "the shapes {:?} and {:?} differ",
        a.dims(),
        b.dims()
    )))
}

/// The number of elements of tensors written in place and of one that is read.
pub fn in_place(written: &[&T], read: &T) -> Result<usize> {
    for x in written {
        same(&x.raw, &read.raw)?;
        if x.raw.dtype() != DType::F32 || !x.raw.is_contiguous() {
            return Err(Error::Backend(
                "written in place: f32 and row-major only".into(),
            ));
        }
    }
    Ok(read.raw.elem_count())
}
