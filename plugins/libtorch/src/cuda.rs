//! The GPU half of libtorch, loaded on demand.
//!
//! The plugin is linked only with the CPU half, so it works without CUDA's libraries. Loading `libtorch_cuda.so` registers
//! its operations with the CPU half.

use std::ffi::{CStr, c_char, c_int};
use std::path::PathBuf;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::aten;

/// A GPU, from its driver.
#[derive(Debug, Clone)]
pub struct Gpu {
    /// What its maker calls it.
    pub model: String,
    /// Bytes of its memory.
    pub memory: u64,
}

/// The CUDA devices, at least one, or why none can be used. Loads what is needed at the first call.
///
/// # Errors
/// What is missing, and what to do.
pub fn devices() -> Result<&'static [Gpu], &'static str> {
    static LOADED: OnceLock<Result<Vec<Gpu>, String>> = OnceLock::new();
    LOADED
        .get_or_init(load)
        .as_deref()
        .map_err(std::string::String::as_str)
}

/// The file of the GPU half, beside the loaded half, if this libtorch has one.
pub(crate) fn file() -> Option<PathBuf> {
    let file = aten::library().with_file_name("libtorch_cuda.so");
    file.exists().then_some(file)
}

fn load() -> Result<Vec<Gpu>, String> {
    let Some(file) = file() else {
        return Err(format!(
            "{} has no CUDA; install one that has (make libtorch CUDA=1)",
            aten::library().display()
        ));
    };
    // SAFETY: loading runs the initialisers of libtorch, which the user installed and which this plugin is built with.
    let library =
        unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_GLOBAL) }.map_err(|error| {
            let cause =
                std::error::Error::source(&error).map_or(error.to_string(), |e| e.to_string());
            format!(
                "{cause}; CUDA's libraries are installed with libtorch by `make libtorch CUDA=1`"
            )
        })?;
    // Operations are registered for good: it must never be unloaded.
    std::mem::forget(library);
    let count = tch::Cuda::device_count();
    let none =
        "no CUDA device: there is no GPU, or its driver is missing or too old for this libtorch";
    if count <= 0 {
        return Err(none.into());
    }
    (0..count as c_int)
        .map(|i| described(i).map_err(|error| format!("{none}: {error}")))
        .collect()
}

/// Asks the driver; libtorch does not tell.
fn described(index: c_int) -> Result<Gpu, libloading::Error> {
    let (mut device, mut name, mut memory) = (0, [0; 128], 0usize);
    // SAFETY: the functions have these types in every version of CUDA's driver interface, and write only within the given
    // bounds.
    unsafe {
        let driver = Library::new("libcuda.so.1")?;
        driver.get::<unsafe extern "C" fn(u32) -> c_int>(b"cuInit")?(0);
        driver.get::<unsafe extern "C" fn(*mut c_int, c_int) -> c_int>(b"cuDeviceGet")?(
            &mut device,
            index,
        );
        driver
            .get::<unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int>(b"cuDeviceGetName")?(
            name.as_mut_ptr(),
            name.len() as c_int - 1,
            device,
        );
        driver.get::<unsafe extern "C" fn(*mut usize, c_int) -> c_int>(b"cuDeviceTotalMem_v2")?(
            &mut memory,
            device,
        );
        Ok(Gpu {
            model: CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned(),
            memory: memory as u64,
        })
    }
}
