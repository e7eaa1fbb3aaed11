//! Tensors on a GPU: candle's, with the precision of the products that they take part in.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage};
use retort_engine::backend::Precision;
use retort_engine::error::{Error, Result};

use crate::cuda::kernels;
use crate::cuda::launch::{blocks, launch};
use crate::cuda::structures::StridedDims;
use crate::failed;

/// A tensor of candle.
pub type Raw = candle_core::Tensor;

/// A tensor on a GPU.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Elements and their location.
    pub raw: Raw,
    /// Whether products take their operands in bf16.
    pub half: bool,
}

impl Tensor {
    /// A new tensor with the same product precision as this one.
    pub fn like(&self, raw: Raw) -> Self {
        Self {
            raw,
            half: self.half,
        }
    }

    /// The same for a result of candle.
    pub fn with(&self, raw: candle_core::Result<Raw>) -> Result<Self> {
        Ok(self.like(raw.map_err(failed)?))
    }

    /// Row-major f32, the type of everything except products.
    pub fn single(&self) -> Result<Raw> {
        convert(&self.raw, DType::F32)
    }

    /// f32 with any strides.
    pub fn floats(&self) -> Result<Raw> {
        match self.raw.dtype() {
            DType::F32 => Ok(self.raw.clone()),
            _ => self.single(),
        }
    }

    /// Row-major, in the type in which products compute.
    pub fn operand(&self) -> Result<Raw> {
        convert(&self.raw, self.storage())
    }

    /// The type of operands of products.
    pub fn storage(&self) -> DType {
        if self.half { DType::BF16 } else { DType::F32 }
    }

    /// The type of a result that is asked for in a precision.
    pub fn stored_as(&self, precision: Precision) -> DType {
        match precision {
            Precision::Storage => DType::F32,
            Precision::Factor => self.storage(),
        }
    }
}

/// The GPU that a tensor lies on.
pub fn device(x: &Raw) -> Result<CudaDevice> {
    match x.device() {
        Device::Cuda(device) => Ok(device.clone()),
        _ => Err(Error::Internal(
            "a kernel of the GPU got a tensor of the host".into(),
        )),
    }
}

/// The address of a tensor's first element on its GPU. Work that reads or writes it must be enqueued on the device's stream,
/// on which memory is also freed, before the tensor is dropped.
pub fn pointer(x: &Raw) -> Result<u64> {
    fn start<T: DeviceRepr>(slice: &CudaSlice<T>, offset: usize) -> u64 {
        let stream = slice.stream();
        slice.device_ptr(stream).0 + (offset * size_of::<T>()) as u64
    }
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::Internal(
            "a kernel of the GPU got a tensor of the host".into(),
        ));
    };
    let offset = layout.start_offset();
    match &storage.slice {
        CudaStorageSlice::F32(slice) => Ok(start(slice, offset)),
        CudaStorageSlice::BF16(slice) => Ok(start(slice, offset)),
        CudaStorageSlice::F16(slice) => Ok(start(slice, offset)),
        CudaStorageSlice::U32(slice) => Ok(start(slice, offset)),
        CudaStorageSlice::F64(slice) => Ok(start(slice, offset)),
        _ => Err(Error::Internal(format!(
            "no kernel knows {:?}",
            storage.dtype()
        ))),
    }
}

/// An uninitialised tensor that a kernel is about to overwrite completely.
pub fn fresh(device: &CudaDevice, shape: &[usize], dtype: DType) -> Result<Raw> {
    fn made<T: DeviceRepr + CudaDType>(device: &CudaDevice, n: usize) -> Result<CudaStorage> {
        // SAFETY: the caller writes every element before any is read.
        let slice = unsafe { device.alloc::<T>(n.max(1)) }.map_err(failed)?;
        Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
    }
    let n = shape.iter().product();
    let storage = match dtype {
        DType::BF16 => made::<half::bf16>(device, n)?,
        DType::F16 => made::<half::f16>(device, n)?,
        DType::U32 => made::<u32>(device, n)?,
        _ => made::<f32>(device, n)?,
    };
    let none = BackpropOp::none();
    Ok(Raw::from_storage(
        Storage::Cuda(storage),
        shape,
        none,
        false,
    ))
}

/// The same numbers, row-major, in a type; the tensor itself if it already is.
pub fn convert(x: &Raw, dtype: DType) -> Result<Raw> {
    if x.dtype() == dtype && x.is_contiguous() {
        return Ok(x.clone());
    }
    let to = fresh(&device(x)?, x.dims(), dtype)?;
    copy(x, &to)?;
    Ok(to)
}

/// The same tensor, row-major.
pub fn whole(x: &Raw) -> Result<Raw> {
    convert(x, x.dtype())
}

/// A tensor's elements on the host, row-major; if it is a view, only its own elements.
pub fn to_host<T: DeviceRepr + CudaDType>(x: &Raw) -> Result<Vec<T>> {
    let (x, n) = (whole(x)?, x.elem_count());
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::Internal(
            "expected a tensor on a GPU, got one on the host".into(),
        ));
    };
    let start = layout.start_offset();
    let own = storage
        .as_cuda_slice::<T>()
        .map_err(failed)?
        .slice(start..start + n);
    storage.device().clone_dtoh(&own).map_err(failed)
}

/// The same tensor, with adjacent elements in its last dimension and any steps before.
pub fn dense_last(x: &Raw) -> Result<Raw> {
    match (x.stride().last(), x.dims().last()) {
        (Some(1), _) | (_, Some(1)) => Ok(x.clone()),
        _ => whole(x),
    }
}

/// Copies elements to a tensor of the same shape, which every clone of it sees.
pub fn copy(from: &Raw, to: &Raw) -> Result<()> {
    if from.dims() != to.dims() {
        return Err(Error::Backend(format!(
            "copy: the shapes {:?} and {:?} differ",
            from.dims(),
            to.dims()
        )));
    }
    let [single, four] = match (from.dtype(), to.dtype()) {
        (DType::F32, DType::F32) => [kernels::copy_f32_f32, kernels::copy_four_f32_f32],
        (DType::F32, DType::BF16) => [kernels::copy_f32_bf16, kernels::copy_four_f32_bf16],
        (DType::F32, DType::F16) => [kernels::copy_f32_f16, kernels::copy_four_f32_f16],
        (DType::BF16, DType::F32) => [kernels::copy_bf16_f32, kernels::copy_four_bf16_f32],
        (DType::BF16, DType::BF16) => [kernels::copy_bf16_bf16, kernels::copy_four_bf16_bf16],
        (DType::U32, DType::U32) => [kernels::copy_u32_u32, kernels::copy_four_u32_u32],
        (from, to) => {
            return Err(Error::Backend(format!(
                "a tensor of {from:?} cannot be copied to one of {to:?}: there is no kernel for it"
            )));
        }
    };
    let (n, starts) = (from.elem_count(), [pointer(from)?, pointer(to)?]);
    let together = |x: &Raw, start: u64| start.is_multiple_of(4 * x.dtype().size_in_bytes() as u64);
    let fours = match together(from, starts[0]) && together(to, starts[1]) {
        true => StridedDims::fours(from.dims(), from.stride(), to.stride())?,
        false => None,
    };
    let (kernel, n, places) = match fours {
        Some(places) => (four, n / 4, places),
        None => {
            let places = StridedDims::new(from.dims(), from.stride(), to.stride())?;
            (single, n, places)
        }
    };
    let device = device(from)?;
    launch(
        &device,
        kernel,
        blocks(n)?,
        0,
        (n as u32, places, starts[0], starts[1]),
    )
}
