//! From candle's tensors to slices and back: the only file that knows candle's storage on the host.

use ::half::bf16;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor};
use retort_engine::error::{Error, Result};
use std::sync::Mutex;

use crate::{T, failed};

/// Binds tensors' names to slices of their elements for the rest of the scope. A slice starts at the first element, so a
/// whole tensor is a plain slice, and a view is read through its strides.
macro_rules! floats {
    ($($x:ident),+) => {
        $(
            let (guard, layout) = $x.storage_and_layout();
            let $x = $crate::view::elements(&guard, layout)?;
        )+
    };
}
pub(crate) use floats;

/// Whether a kernel may read these: f32 in host memory, not empty.
pub fn fits(xs: &[&T]) -> bool {
    xs.iter()
        .all(|x| x.dtype() == DType::F32 && x.device().is_cpu() && x.elem_count() > 0)
}

/// Elements that a kernel is about to overwrite completely. Their initial values are unspecified: clearing them would take a
/// tenth of a training step.
pub fn fresh(shape: &[usize]) -> Vec<f32> {
    let count = shape.iter().product();
    if cfg!(debug_assertions) {
        return vec![f32::NAN; count];
    }
    let mut data: Vec<f32> = Vec::with_capacity(count);
    // SAFETY: the memory is the vector's own, of `count` elements. The assembly gets its address, so the compiler must assume
    // that it writes every element; any bits are a valid float.
    unsafe {
        std::arch::asm!("/* {0} */", in(reg) data.as_mut_ptr(), options(nostack, preserves_flags));
        data.set_len(count);
    }
    data
}

/// Elements that a kernel adds to.
pub fn zeros(shape: &[usize]) -> Vec<f32> {
    vec![0.0; shape.iter().product()]
}

/// A tensor of these elements.
pub fn tensor(data: Vec<f32>, shape: &[usize]) -> Result<T> {
    Tensor::from_vec(data, shape, &Device::Cpu).map_err(failed)
}

/// A host tensor's storage from its first element on.
pub fn elements<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(CpuStorage::F32(data)) => Ok(&data[layout.start_offset()..]),
        _ => Err(another()),
    }
}

/// The same of a tensor in bf16.
pub fn halves<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [bf16]> {
    match storage {
        Storage::Cpu(CpuStorage::BF16(data)) => Ok(&data[layout.start_offset()..]),
        _ => Err(another()),
    }
}

fn another() -> Error {
    Error::Internal("a kernel of the host got another tensor".into())
}

/// A host tensor of indices, row-major.
pub fn ids(x: &T) -> Result<Vec<u32>> {
    x.flatten_all().and_then(|x| x.to_vec1()).map_err(failed)
}

/// Lets `f` write the elements of a whole tensor; every clone of it sees them.
pub fn write<R: Send>(x: &T, f: impl FnOnce(&mut [f32]) -> R + Send) -> Result<R> {
    let call = Write(Mutex::new(Call::Open(f)));
    x.inplace_op1(&call).map_err(failed)?;
    match call.0.into_inner() {
        Ok(Call::Done(result)) => Ok(result),
        _ => Err(Error::Internal("an in-place kernel did not run".into())),
    }
}

struct Write<F, R>(Mutex<Call<F, R>>);

enum Call<F, R> {
    Open(F),
    Running,
    Done(R),
}

impl<R: Send, F: FnOnce(&mut [f32]) -> R + Send> InplaceOp1 for Write<F, R> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("written in place: f32 and row-major only")
        };
        let Ok(mut call) = self.0.lock() else {
            candle_core::bail!("an in-place kernel panicked")
        };
        if let Call::Open(f) = std::mem::replace(&mut *call, Call::Running) {
            *call = Call::Done(f(&mut data[start..end]));
        }
        Ok(())
    }
}
