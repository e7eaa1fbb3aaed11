//! Products of matrices by cuBLAS: operands in f32, bf16 or fp16, sums in f32, results in f32 or bf16.

use std::ffi::c_void;

use candle_core::CudaDevice;
use candle_core::DType;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use retort_engine::error::{Error, Result};

use crate::cuda::tensor::{Raw, convert, device, fresh, pointer, whole};
use crate::failed;

/// A stack of matrices in memory.
#[derive(Debug, Clone, Copy)]
pub struct Matrices {
    pub start: u64,
    pub dtype: DType,
    pub rows: usize,
    pub columns: usize,
    /// Elements from row to row of the stored matrix, whose rows are dense.
    pub lead: usize,
    /// Whether it is stored transposed.
    pub turned: bool,
    /// Elements from matrix to matrix; 0 if all are the same matrix.
    step: usize,
}

impl Matrices {
    /// The last two dimensions of a tensor (.., rows, columns); `None` if cuBLAS cannot address them.
    pub fn of(x: &Raw, turned: bool) -> Result<Option<Self>> {
        let (dims, strides) = (x.dims(), x.stride());
        let end = dims.len();
        let (mut sizes, mut steps) = (
            [dims[end - 2], dims[end - 1]],
            [strides[end - 2], strides[end - 1]],
        );
        let (lead_dims, lead_strides) = (&dims[..end - 2], &strides[..end - 2]);
        // A single step over all leading dimensions, ignoring sizes of 1.
        let mut step = None;
        let mut within = 1;
        for (&n, &stride) in lead_dims.iter().zip(lead_strides).rev() {
            if n == 1 {
                continue;
            }
            match step {
                None => step = Some(stride),
                Some(step) if stride == step * within => {}
                Some(_) => return Ok(None),
            }
            within *= n;
        }
        if turned {
            sizes.reverse();
            steps.reverse();
        }
        let [rows, columns] = sizes;
        let lies = |outer: usize, outer_step: usize, inner: usize, inner_step: usize| {
            let adjacent = inner_step == 1 || inner == 1;
            let apart = outer == 1 || outer_step >= inner.max(1);
            (adjacent && apart).then_some(if outer == 1 { inner.max(1) } else { outer_step })
        };
        let straight = lies(rows, steps[0], columns, steps[1]).map(|lead| (lead, false));
        let across = || lies(columns, steps[1], rows, steps[0]).map(|lead| (lead, true));
        let Some((lead, turned)) = straight.or_else(across) else {
            return Ok(None);
        };
        Ok(Some(Self {
            start: pointer(x)?,
            dtype: x.dtype(),
            rows,
            columns,
            lead,
            turned,
            step: step.unwrap_or(0),
        }))
    }
}

/// How f32 operands are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum F32Products {
    /// They are multiplied without rounding.
    Exact,
    /// They are rounded to TF32, which has the range of f32 and eight times the precision of bf16.
    Tf32,
}

/// a (.., m, k) times b (.., k, n), either given transposed: (.., m, n) in f32. Operands are both f32 or both bf16, with the
/// same number of matrices, or one of them a single matrix without leading dimensions.
pub fn product(a: &Raw, b: &Raw, ta: bool, tb: bool) -> Result<Raw> {
    let lead = |x: &Raw| x.dims()[..x.rank() - 2].to_vec();
    let (one, other) = (lead(a), lead(b));
    let leads = if one.len() >= other.len() {
        &one
    } else {
        &other
    };
    let fits = |x: &[usize]| x.is_empty() || x == leads.as_slice();
    let size =
        |x: &Raw, d: usize, turned: bool| x.dims()[x.rank() - 2 + usize::from(turned ^ (d == 1))];
    let (m, k, n) = (size(a, 0, ta), size(a, 1, ta), size(b, 1, tb));
    if !fits(&one) || !fits(&other) || k != size(b, 0, tb) || a.dtype() != b.dtype() {
        return Err(Error::Backend(format!(
            "product of {:?} {:?} and {:?} {:?}",
            a.dims(),
            a.dtype(),
            b.dims(),
            b.dtype()
        )));
    }
    let mut shape = leads.clone();
    shape.extend([m, n]);
    let to = fresh(&device(a)?, &shape, DType::F32)?;
    product_into(a, b, ta, tb, &to, 0.0, F32Products::Exact)?;
    Ok(to)
}

/// The same, added to `keep` times the contents of a row-major tensor of the result's shape.
pub fn product_into(
    a: &Raw,
    b: &Raw,
    ta: bool,
    tb: bool,
    to: &Raw,
    keep: f32,
    f32_products: F32Products,
) -> Result<()> {
    // A copy lives as long as this function; by then its use has been enqueued on the stream.
    let (whole_a, whole_b);
    let left = match Matrices::of(a, ta)? {
        Some(matrices) => matrices,
        None => {
            whole_a = whole(a)?;
            Matrices::of(&whole_a, ta)?.ok_or_else(odd)?
        }
    };
    let right = match Matrices::of(b, tb)? {
        Some(matrices) => matrices,
        None => {
            whole_b = whole(b)?;
            Matrices::of(&whole_b, tb)?.ok_or_else(odd)?
        }
    };
    let count: usize = to.dims()[..to.rank() - 2].iter().product();
    if to.elem_count() == 0 {
        return Ok(());
    }
    multiply(&device(to)?, count, left, right, to, keep, f32_products)
}

fn odd() -> Error {
    Error::Internal(
        "a product: expected matrices whose rows or columns lie densely in memory".into(),
    )
}

/// cuBLAS is column-major: a row-major C = A B is C' = B' A' there.
fn multiply(
    device: &CudaDevice,
    count: usize,
    a: Matrices,
    b: Matrices,
    to: &Raw,
    keep: f32,
    f32_products: F32Products,
) -> Result<()> {
    let int = |n: usize| {
        i32::try_from(n).map_err(|_| {
            Error::Backend(format!(
                "a matrix with a side of {n} is too large for cuBLAS, which takes at most {}",
                i32::MAX
            ))
        })
    };
    let kind = |dtype: DType| match dtype {
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    };
    let sums = match (a.dtype, f32_products) {
        (DType::F32, F32Products::Tf32) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let turn = |x: Matrices| match x.turned {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    };
    let (m, n, k) = (int(a.rows)?, int(b.columns)?, int(a.columns)?);
    let one = 1.0f32;
    let number = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
    let stream = device.cuda_stream();
    stream
        .context()
        .bind_to_thread()
        .map_err(|error| failed(candle_core::Error::wrap(error)))?;
    // SAFETY: the matrices lie in memory of this device with as many elements as their sizes and steps say, and the handle
    // works on the stream on which that memory is freed.
    unsafe {
        result::gemm_strided_batched_ex(
            *device.cublas_handle().handle(),
            turn(b),
            turn(a),
            n,
            m,
            k,
            number(&one),
            b.start as *const c_void,
            kind(b.dtype),
            int(b.lead)?,
            b.step as i64,
            a.start as *const c_void,
            kind(a.dtype),
            int(a.lead)?,
            a.step as i64,
            number(&keep),
            pointer(to)? as *mut c_void,
            kind(to.dtype()),
            n,
            (a.rows * b.columns) as i64,
            int(count)?,
            sums,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .map_err(|error| failed(candle_core::Error::wrap(error)))
}

/// Both as operands of one product, in bf16 if requested.
pub fn operands(a: &Raw, b: &Raw, half: bool) -> Result<(Raw, Raw)> {
    let dtype = if half { DType::BF16 } else { DType::F32 };
    let as_is = |x: &Raw| match x.dtype() == dtype {
        true => Ok(x.clone()),
        false => convert(x, dtype),
    };
    Ok((as_is(a)?, as_is(b)?))
}
