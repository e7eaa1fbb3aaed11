//! Products with a bias by cuBLASLt, which adds the bias while it writes the result: no separate pass over the result.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Mutex;

use candle_core::DType;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use retort_engine::error::{Error, Result};

use crate::cuda::product::Matrices;
use crate::cuda::tensor::{Raw, device, fresh, pointer};
use crate::failed;

/// Bytes of workspace for algorithms.
const WORKSPACE: usize = 32 << 20;

/// The key of a chosen algorithm: sizes, leading dimensions, type, transpositions, and alignment of the addresses.
type Key = ([usize; 3], [usize; 2], DType, [bool; 2], [u32; 3]);

/// cuBLASLt on one GPU.
struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: Raw,
    /// None if cuBLASLt has no algorithm.
    algorithms: HashMap<Key, Option<sys::cublasLtMatmulAlgo_t>>,
}

// SAFETY: one thread at a time uses it, and the handle may be used from any.
unsafe impl Send for Library {}

/// By the number of the GPU.
static LIBRARIES: Mutex<Option<HashMap<usize, Library>>> = Mutex::new(None);

/// Describes a product, for as long as a call of the library needs it.
struct Description {
    product: sys::cublasLtMatmulDesc_t,
    /// Layouts of the first factor, the second, and the result.
    layouts: Vec<sys::cublasLtMatrixLayout_t>,
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: each was made by the library, and nobody else has it.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            for &layout in &self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

fn refused(error: result::CublasError) -> Error {
    failed(candle_core::Error::wrap(error))
}

/// a (rows, i) times b (o, i) transposed, plus a bias (o): (rows, o) in f32. None if cuBLASLt cannot do it. Operands are both
/// f32 or both bf16.
pub fn biased(a: &Raw, b: &Raw, bias: &Raw) -> Result<Option<Raw>> {
    let (Some(left), Some(right)) = (Matrices::of(a, false)?, Matrices::of(b, true)?) else {
        return Ok(None);
    };
    let device = device(a)?;
    let to = fresh(&device, &[left.rows, right.columns], DType::F32)?;
    if to.elem_count() == 0 {
        return Ok(Some(to));
    }
    let (result_at, bias_at) = (pointer(&to)?, pointer(bias)?);
    let even = |at: u64| 1 << at.trailing_zeros().clamp(2, 8);
    if even(bias_at) < 16 {
        return Ok(None);
    }
    let key = (
        [left.rows, right.columns, left.columns],
        [left.lead, right.lead],
        left.dtype,
        [left.turned, right.turned],
        [even(left.start), even(right.start), even(result_at)],
    );
    let mut all = LIBRARIES.lock().map_err(|_| {
        Error::Internal(
            "cuBLASLt cannot be used any more: a thread panicked while it used it".into(),
        )
    })?;
    let all = all.get_or_insert_default();
    let stream = device.cuda_stream();
    let number = stream.context().ordinal();
    let library = match all.entry(number) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(place) => place.insert(Library {
            handle: result::create_handle().map_err(refused)?,
            workspace: fresh(&device, &[WORKSPACE / 4], DType::F32)?,
            algorithms: HashMap::new(),
        }),
    };
    let description = describe(&key, bias_at)?;
    let handle = library.handle;
    let algorithm = match library.algorithms.entry(key) {
        Entry::Occupied(known) => *known.get(),
        Entry::Vacant(place) => *place.insert(choose(handle, &description, key.4)?),
    };
    let Some(algorithm) = algorithm else {
        return Ok(None);
    };
    let (one, none) = (1.0f32, 0.0f32);
    let number = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
    let layouts = &description.layouts;
    // SAFETY: the matrices lie in memory of this device with as many elements as their sizes and leading dimensions say, and
    // that memory is freed on the same stream. The workspace lives as long as the process, and one stream orders its uses.
    unsafe {
        result::matmul(
            handle,
            description.product,
            number(&one),
            number(&none),
            right.start as *const c_void,
            layouts[0],
            left.start as *const c_void,
            layouts[1],
            result_at as *const c_void,
            layouts[2],
            result_at as *mut c_void,
            layouts[2],
            &raw const algorithm,
            pointer(&library.workspace)? as *mut c_void,
            WORKSPACE,
            stream.cu_stream().cast(),
        )
    }
    .map_err(refused)?;
    Ok(Some(to))
}

/// cuBLASLt is column-major: a row-major C = A B is C' = B' A' there, and a bias of its columns is one of rows.
fn describe(key: &Key, bias: u64) -> Result<Description> {
    let &([m, n, k], [lead_a, lead_b], dtype, [turned_a, turned_b], _) = key;
    let kind = match dtype {
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    };
    let single = sys::cudaDataType_t::CUDA_R_32F;
    let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
    let mut description = Description {
        product: result::create_matmul_desc(sums, single).map_err(refused)?,
        layouts: Vec::new(),
    };
    let as_lies = |rows, columns, turned| {
        if turned {
            (columns, rows)
        } else {
            (rows, columns)
        }
    };
    let (rows_b, columns_b) = as_lies(n, k, turned_b);
    let (rows_a, columns_a) = as_lies(k, m, turned_a);
    for (kind, rows, columns, lead) in [
        (kind, rows_b, columns_b, lead_b),
        (kind, rows_a, columns_a, lead_a),
        (single, n, m, n),
    ] {
        let layout = result::create_matrix_layout(kind, rows as u64, columns as u64, lead as i64);
        description.layouts.push(layout.map_err(refused)?);
    }
    use sys::cublasLtMatmulDescAttributes_t as Of;
    let turn = |turned: bool| match turned {
        true => cublasOperation_t::CUBLAS_OP_T as i32,
        false => cublasOperation_t::CUBLAS_OP_N as i32,
    };
    let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32;
    for (attribute, value) in [
        (Of::CUBLASLT_MATMUL_DESC_TRANSA, turn(turned_b)),
        (Of::CUBLASLT_MATMUL_DESC_TRANSB, turn(turned_a)),
        (Of::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue),
    ] {
        // SAFETY: these attributes are 32 bits wide.
        let set = unsafe {
            let value = (&raw const value).cast();
            result::set_matmul_desc_attribute(description.product, attribute, value, 4)
        };
        set.map_err(refused)?;
    }
    // SAFETY: this is an address.
    unsafe {
        let at = Of::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
        let value = (&raw const bias).cast();
        result::set_matmul_desc_attribute(description.product, at, value, 8).map_err(refused)?;
    }
    Ok(description)
}

/// The algorithm that the library considers fastest, for this alignment of both factors and the result.
fn choose(
    handle: sys::cublasLtHandle_t,
    description: &Description,
    [even_a, even_b, even_c]: [u32; 3],
) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Wish;
    let preference = result::create_matmul_pref().map_err(refused)?;
    let set = |wish, value: *const c_void, size| {
        // SAFETY: each caller gives the size of the attribute, and a value of it.
        unsafe { result::set_matmul_pref_attribute(preference, wish, value, size) }
    };
    let workspace = WORKSPACE;
    let most = Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    let mut wished = set(most, (&raw const workspace).cast(), 8);
    for (wish, even) in [
        (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, even_b),
        (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, even_a),
        (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, even_c),
        (Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, even_c),
    ] {
        wished = wished.and_then(|()| set(wish, (&raw const even).cast(), 4));
    }
    let layouts = &description.layouts;
    // SAFETY: all were made by the library and are in use here alone; the preference goes after.
    let found = unsafe {
        let found = result::get_matmul_algo_heuristic(
            handle,
            description.product,
            layouts[0],
            layouts[1],
            layouts[2],
            layouts[2],
            preference,
        );
        let _ = result::destroy_matmul_pref(preference);
        found
    };
    wished.map_err(refused)?;
    Ok(found.ok().map(|found| found.algo))
}
