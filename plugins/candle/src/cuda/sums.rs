//! Sums over dimensions, and tensors of one value.

use candle_core::{CudaDevice, DType};
use retort_engine::error::{Error, Result};

use crate::cuda::kernels;
use crate::cuda::launch::{blocks, counted, launch};
use crate::cuda::structures::StridedDims;
use crate::cuda::tensor::{Raw, device, fresh, pointer};
use crate::failed;

/// Floats, all `value`.
pub fn full(device: &CudaDevice, shape: &[usize], value: f32) -> Result<Raw> {
    let to = fresh(device, shape, DType::F32)?;
    fill(&to, value)?;
    Ok(to)
}

/// Sets all elements of a row-major tensor.
pub fn fill(x: &Raw, value: f32) -> Result<()> {
    let (device, n) = (device(x)?, x.elem_count());
    let kernel = match x.dtype() {
        DType::BF16 => kernels::fill_bf16,
        _ => kernels::fill_f32,
    };
    launch(
        &device,
        kernel,
        blocks(n)?,
        0,
        (n as u32, value, pointer(x)?),
    )
}

/// Sums of an f32 tensor over dimensions, which stay with size 1.
pub fn sum(x: &Raw, dims: &[usize]) -> Result<Raw> {
    let device = device(x)?;
    let part = |gone: bool| -> [Vec<usize>; 2] {
        let of = |all: &[usize]| {
            let own = all.iter().enumerate();
            own.filter(|(d, _)| dims.contains(d) == gone)
                .map(|(_, &n)| n)
                .collect()
        };
        [of(x.dims()), of(x.stride())]
    };
    let [kept, kept_steps] = part(false);
    let [gone, gone_steps] = part(true);
    let (n, terms): (usize, usize) = (kept.iter().product(), gone.iter().product());
    let mut shape = x.dims().to_vec();
    dims.iter().for_each(|&d| shape[d] = 1);
    counted(x.elem_count())?;
    if n == 0 || terms == 0 {
        let to = fresh(&device, &shape, DType::F32)?;
        fill(&to, 0.0)?;
        return Ok(to);
    }
    // Many rows, added up column by column.
    let together = dims.windows(2).all(|pair| pair[1] == pair[0] + 1);
    let columns: usize = dims
        .last()
        .map_or(1, |&d| x.dims()[d + 1..].iter().product());
    if together && x.is_contiguous() && columns >= 8 && terms >= 64 {
        let all = sum_columns(x, None, [n / columns, terms, columns])?;
        return all.reshape(shape).map_err(failed);
    }
    let to = fresh(&device, &shape, DType::F32)?;
    let kept = StridedDims::new(&kept, &kept_steps, &kept_steps)?;
    let gone = StridedDims::new(&gone, &gone_steps, &gone_steps)?;
    if terms < 64 {
        launch(
            &device,
            kernels::sum_few,
            blocks(n)?,
            0,
            (
                n as u32,
                terms as u32,
                kept,
                gone,
                pointer(x)?,
                pointer(&to)?,
            ),
        )?;
    } else {
        launch(
            &device,
            kernels::sum,
            n,
            0,
            (terms as u32, kept, gone, pointer(x)?, pointer(&to)?),
        )?;
    }
    Ok(to)
}

/// How many of the rows one thread adds up, given this many sums: enough work for all threads, and few parts.
pub fn part_of(rows: usize, sums: usize) -> usize {
    let parts = (65536 / sums.max(1)).clamp(1, (rows / 16).max(1));
    rows.div_ceil(parts).max(1)
}

/// Sums over the rows of row-major (outer, rows, columns): -> (outer, columns); of the products with another tensor, if
/// there is one. First some of the rows each, then these.
pub fn sum_columns(x: &Raw, by: Option<&Raw>, [outer, rows, columns]: [usize; 3]) -> Result<Raw> {
    let device = device(x)?;
    let part = part_of(rows, outer * columns);
    let parts = rows.div_ceil(part);
    let once = |from: &Raw, by: Option<&Raw>, rows: usize, part: usize| {
        let to = fresh(&device, &[outer, rows.div_ceil(part), columns], DType::F32)?;
        launch(
            &device,
            kernels::sum_columns,
            blocks(to.elem_count())?,
            0,
            (
                outer as u32,
                rows as u32,
                columns as u32,
                part as u32,
                pointer(from)?,
                by.map_or(Ok(0), pointer)?,
                pointer(&to)?,
            ),
        )?;
        Ok::<_, Error>(to)
    };
    let some = once(x, by, rows, part)?;
    let all = match parts {
        1 => some,
        _ => once(&some, None, parts, parts)?,
    };
    all.reshape((outer, columns)).map_err(failed)
}
