//! The half of libtorch that drives GPUs, loaded when it is asked for.
//!
//! The plugin is linked with the CPU half only, so it works where CUDA's libraries are absent. Loading
//! `libtorch_cuda.so` registers its operations with the half that is loaded already.

use std::path::Path;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Number of CUDA devices, at least 1, or why none can be used. Loads what is needed at the first call.
pub fn devices() -> Result<usize, &'static str> {
    static LOADED: OnceLock<Result<usize, String>> = OnceLock::new();
    LOADED
        .get_or_init(load)
        .as_ref()
        .map_or_else(|why| Err(why.as_str()), |&count| Ok(count))
}

fn load() -> Result<usize, String> {
    let file = Path::new(env!("RETORT_LIBTORCH_LIB")).join("libtorch_cuda.so");
    if !file.exists() {
        return Err(format!(
            "{} has no CUDA; install one that has (make libtorch CUDA=1)",
            env!("RETORT_LIBTORCH_LIB")
        ));
    }
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
    match tch::Cuda::device_count() {
        count if count > 0 => Ok(count as usize),
        _ => Err("no CUDA device: there is no GPU, or its driver is missing or too old for this libtorch".into()),
    }
}
