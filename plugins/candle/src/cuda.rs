//! The CUDA variant of the plugin: the engine on NVIDIA GPUs.
//!
//! [`Cuda`] is what the engine runs on. candle manages tensors, memory and views, cuBLAS multiplies matrices, and
//! `kernels.cu` does the rest; nothing is computed on the host. All tensors are f32 except operands of products: with `dtype:
//! bf16` linear maps and attention take operands in bf16, convolutions in fp16 or TF32, and all accumulate in f32. One stream
//! orders all work; the host waits only when it reads results.

mod arguments;
mod attention;
mod backend;
mod biased;
mod convolution;
mod elementwise;
mod flow;
mod graph;
mod kernels;
mod launch;
mod libraries;
mod nccl;
mod product;
mod structures;
mod sums;
mod tensor;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::result::device as probe;
use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUdevice_attribute, CUmemPool_attribute,
};
use retort_engine::error::{Error, Result};
use retort_engine::plugin::{EnginePlugin, PluginInfo};

pub use nccl::{Nccl, meet};

use crate::failed;

/// The toolkit that this plugin was built with.
const TOOLKIT: &str = env!("RETORT_CUDA_VERSION");
/// The lowest compute capability that the kernels were compiled for: 90 is 9.0.
const CAPABILITY: &str = env!("RETORT_CUDA_CAPABILITY");

const ABOUT: PluginInfo = PluginInfo {
    name: "candle",
    version: env!("CARGO_PKG_VERSION"),
    summary: "all stages on NVIDIA GPUs, on candle with fused kernels and cuBLAS",
    license: env!("CARGO_PKG_LICENSE"),
    devices: &["cuda"],
    dtypes: &["f32", "bf16"],
    libraries: &[concat!(
        "CUDA ",
        env!("RETORT_CUDA_VERSION"),
        " for compute capability ",
        env!("RETORT_CUDA_CAPABILITY"),
        " and above"
    )],
};

/// The backend: a GPU, and how precisely products are computed on it.
#[derive(Debug, Clone)]
pub struct Cuda {
    device: Device,
    half: bool,
}

impl Cuda {
    /// Opens a GPU, `cuda` or `cuda:N`; `dtype` is `f32` or `bf16`; `threads` is the size of the pool for what the host
    /// does (0: as many as there are cores).
    ///
    /// # Errors
    /// The device or the type is unknown or cannot be used here.
    pub fn open(device: &str, dtype: &str, threads: usize) -> Result<Self> {
        let half = match dtype {
            "f32" => false,
            "bf16" => true,
            _ => {
                let message = format!("{dtype}: expected f32 or bf16");
                return Err(Error::option("/dtype", message));
            }
        };
        let refused = |why: String| Error::option("/device", why);
        let index = match device.split_once(':').unwrap_or((device, "0")) {
            ("cuda", index) => index.parse::<usize>().ok(),
            _ => None,
        };
        let index = index.ok_or_else(|| refused(format!("{device}: expected cuda or cuda:N")))?;
        let found = devices();
        let name = format!("cuda:{index}");
        match found.iter().find(|device| device.name == name) {
            Some(device) if device.unusable.is_none() => {}
            Some(device) => {
                let why = device.unusable.clone().unwrap_or_default();
                return Err(refused(format!("{name} cannot be used: {why}")));
            }
            // Without any, the first entry says why.
            None => {
                let why = found.iter().find_map(|device| device.unusable.clone());
                let none = || format!("this machine has {} CUDA devices", found.len());
                return Err(refused(format!("{name}: {}", why.unwrap_or_else(none))));
            }
        }
        // An error means that the pool already exists, with the size that its creator chose.
        let _ = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global();
        Ok(Self {
            device: opened(index).map_err(failed)?,
            half,
        })
    }
}

/// A device whose memory is kept for the next tensor, with one stream for everything.
fn opened(index: usize) -> candle_core::Result<Device> {
    let device = Device::new_cuda_with_stream(index)?;
    if let Device::Cuda(cuda) = &device {
        // SAFETY: there is one stream, and it orders all uses of a tensor.
        unsafe { cuda.disable_event_tracking() };
        let stream = cuda.cuda_stream();
        let mut pool = std::ptr::null_mut();
        let mut all = u64::MAX;
        // SAFETY: the device is open, and the outputs are variables of this function. Without memory pools, every allocation
        // goes to the driver.
        unsafe {
            let found = sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device());
            if found == sys::CUresult::CUDA_SUCCESS {
                let keep = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
                let _ = sys::cuMemPoolSetAttribute(pool, keep, (&raw mut all).cast());
            }
        }
    }
    Ok(device)
}

/// Free bytes of the device, including those that its pool keeps for the next tensor.
pub(crate) fn free_memory(device: &Device) -> Option<u64> {
    let Device::Cuda(cuda) = device else {
        return None;
    };
    let context = cuda.cuda_stream().context().clone();
    context.bind_to_thread().ok()?;
    let (mut free, mut all) = (0, 0);
    let mut pool = std::ptr::null_mut();
    // Without a pool, or without an answer, assume that it keeps nothing.
    let (mut held, mut used) = (0u64, 0u64);
    // SAFETY: the device is open and its context current; the outputs are variables of this function, of the types that
    // these attributes have.
    unsafe {
        if sys::cuMemGetInfo_v2(&mut free, &mut all) != sys::CUresult::CUDA_SUCCESS {
            return None;
        }
        if sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device())
            == sys::CUresult::CUDA_SUCCESS
        {
            let ask = |attribute, value: &mut u64| {
                let _ = sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut *value).cast());
            };
            ask(
                CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
                &mut held,
            );
            ask(
                CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
                &mut used,
            );
        }
    }
    Some((free as u64).saturating_add(held.saturating_sub(used)))
}

/// What recipes call `candle` on `device: cuda`.
pub(crate) fn plugin() -> EnginePlugin<Cuda> {
    EnginePlugin {
        about: ABOUT,
        open: Cuda::open,
        devices,
        collective: Some(meet),
    }
}

/// The GPUs of this machine; without any, one entry that says why.
fn devices() -> Vec<retort_abi::Device> {
    match gpus() {
        Ok(found) if !found.is_empty() => found,
        found => vec![retort_abi::Device {
            unusable: Some(
                found.map_or_else(|why| why, |_| "this machine has no NVIDIA GPU".into()),
            ),
            ..retort_abi::Device::named("cuda:0")
        }],
    }
}

fn gpus() -> Result<Vec<retort_abi::Device>, String> {
    libraries::driver()?;
    let driver =
        |error| format!("the NVIDIA driver cannot be used: {error} (`nvidia-smi` shows its state)");
    // SAFETY: initialises the driver's state of this process.
    match unsafe { sys::cuInit(0) } {
        sys::CUresult::CUDA_SUCCESS => {}
        sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(Vec::new()),
        error => {
            return Err(driver(
                error
                    .result()
                    .map_or_else(|e| e.to_string(), |()| String::new()),
            ));
        }
    }
    let mut version = 0;
    // SAFETY: the output is a variable of this function.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|error| driver(error.to_string()))?;
    let blas = libraries::cublas();
    let count = probe::get_count().map_err(|error| driver(error.to_string()))?;
    let described = |index: i32| -> std::result::Result<retort_abi::Device, String> {
        let refused = |error: candle_core::cuda_backend::cudarc::driver::DriverError| {
            driver(error.to_string())
        };
        let device = probe::get(index).map_err(refused)?;
        let attribute = |which| {
            // SAFETY: the device is one of the driver's.
            unsafe { probe::get_attribute(device, which) }.map_err(refused)
        };
        let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let unusable = too_old(version)
            .or_else(|| too_small(major, minor))
            .or_else(|| blas.clone().err());
        Ok(retort_abi::Device {
            name: format!("cuda:{index}"),
            model: probe::get_name(device).map_err(refused)?,
            // SAFETY: as above.
            memory: Some(unsafe { probe::total_mem(device) }.map_err(refused)? as u64),
            unusable,
        })
    };
    (0..count).map(described).collect()
}

/// Why a driver cannot be used: it only accepts code of toolkits up to its own version. `version` is 13000 for 13.0.
fn too_old(version: i32) -> Option<String> {
    let (major, minor) = TOOLKIT.split_once('.')?;
    let needed = 1000 * major.parse::<i32>().ok()? + 10 * minor.parse::<i32>().ok()?;
    (version < needed).then(|| {
        format!(
            "the NVIDIA driver is too old: it supports CUDA {}.{}, and this was built with {TOOLKIT}; install a newer \
             driver, or build with an older toolkit (CUDA_HOME=DIR make cuda)",
            version / 1000,
            version % 1000 / 10
        )
    })
}

/// Why a GPU cannot be used: the kernels were compiled for later ones.
fn too_small(major: i32, minor: i32) -> Option<String> {
    let needed: i32 = CAPABILITY.parse().ok()?;
    let own = 10 * major + minor;
    (own < needed).then(|| {
        format!(
            "its compute capability is {major}.{minor}, and this was built for {}.{} and above; build for it with \
             CUDA_COMPUTE_CAP={own} make cuda",
            needed / 10,
            needed % 10
        )
    })
}

retort_abi::export_plugin!(crate::cuda::plugin());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_says_what_to_do() {
        assert_eq!(too_old(99_000), None);
        assert!(too_old(11_080).is_some_and(|why| why.contains("supports CUDA 11.8")));
        assert_eq!(too_small(99, 0), None);
        assert!(too_small(3, 5).is_some_and(|why| why.contains("CUDA_COMPUTE_CAP=35")));
    }

    #[test]
    fn unusable_settings_are_refused() {
        for (device, dtype) in [("cpu", "f32"), ("cuda:x", "f32"), ("cuda", "f16")] {
            let refused = Cuda::open(device, dtype, 1);
            assert!(
                matches!(refused, Err(Error::Options { .. })),
                "{device} {dtype}"
            );
        }
    }
}
