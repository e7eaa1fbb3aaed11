//! Functions of each element.

use candle_core::DType;
use retort_engine::backend::Unary;
use retort_engine::error::Result;

use crate::cuda::arguments::four;
use crate::cuda::kernels;
use crate::cuda::launch::{blocks, launch};
use crate::cuda::tensor::Tensor;
use crate::cuda::tensor::{device, fresh, pointer};

type T = Tensor;

/// A function of each element, in a type.
pub fn unary(x: &T, f: Unary, dtype: DType) -> Result<T> {
    let from = x.single()?;
    let device = device(&from)?;
    let to = fresh(&device, from.dims(), dtype)?;
    let four = four(from.elem_count(), &[&from])?;
    let kernel = match (four, dtype) {
        (true, DType::BF16) => kernels::unary_four_bf16,
        (true, _) => kernels::unary_four_f32,
        (false, DType::BF16) => kernels::unary_bf16,
        (false, _) => kernels::unary_f32,
    };
    let n = from.elem_count() / if four { 4 } else { 1 };
    launch(
        &device,
        kernel,
        blocks(n)?,
        0,
        (n as u32, f as i32, pointer(&from)?, pointer(&to)?),
    )?;
    Ok(x.like(to))
}
