//! CUDA's libraries, loaded when they are needed.
//!
//! candle's cudarc is linked against libcuda, which comes with a driver, and libcublas, which users install in many ways. A
//! plugin linked against them could not be loaded if one is missing, and could not say why. So their functions are defined
//! here as jumps through slots, and [`load`] fills the slots with the functions that `dlopen` finds. A function of a missing
//! library reports that it is not initialised. libcurand is never loaded: candle creates a generator for each device, but
//! never draws from it, because the engine draws all random numbers.

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

#[cfg(target_arch = "x86_64")]
macro_rules! instructions {
    (jump $slot:expr) => {
        concat!("jmp qword ptr [rip + ", $slot, "]\n")
    };
    (answer $code:literal) => {
        concat!("mov eax, ", $code, "\nret\n")
    };
    (nothing) => {
        "mov qword ptr [rdi], 0\nxor eax, eax\nret\n"
    };
}

#[cfg(target_arch = "aarch64")]
macro_rules! instructions {
    (jump $slot:expr) => {
        concat!(
            "adrp x16, ",
            $slot,
            "\nldr x16, [x16, :lo12:",
            $slot,
            "]\nbr x16\n"
        )
    };
    (answer $code:literal) => {
        concat!("mov w0, #", $code, "\nret\n")
    };
    (nothing) => {
        "str xzr, [x0]\nmov w0, #0\nret\n"
    };
}

/// Defines functions as jumps through slots; until a slot is filled, its function returns `$code`.
macro_rules! library {
    ($slots:ident, $names:ident, $absent:literal, $code:literal, [$($name:literal)*]) => {
        const $names: &[&str] = &[$($name),*];

        unsafe extern "C" {
            static mut $slots: [*const c_void; $names.len()];
        }

        std::arch::global_asm!(concat!(
            ".pushsection .text.", $absent, ",\"ax\",@progbits\n",
            $absent, ":\n", instructions!(answer $code),
            $(
                ".globl ", $name, "\n.hidden ", $name, "\n.type ", $name, ",@function\n",
                $name, ":\n", instructions!(jump concat!("slot_", $name)),
            )*
            ".popsection\n",
            ".pushsection .data.rel.", $absent, ",\"aw\",@progbits\n.balign 8\n",
            ".globl ", stringify!($slots), "\n.hidden ", stringify!($slots), "\n",
            stringify!($slots), ":\n",
            $("slot_", $name, ": .quad ", $absent, "\n",)*
            ".popsection\n",
        ));
    };
}

/// Defines functions that return a fixed answer without a library.
macro_rules! answers {
    ([$($name:literal)*] $($answer:tt)+) => {
        std::arch::global_asm!(concat!(
            ".pushsection .text.retort_answers,\"ax\",@progbits\n",
            $(
                ".globl ", $name, "\n.hidden ", $name, "\n.type ", $name, ",@function\n",
                $name, ":\n",
            )*
            instructions!($($answer)+),
            ".popsection\n",
        ));
    };
}

// 3 is CUDA_ERROR_NOT_INITIALIZED.
library!(retort_driver_slots, DRIVER, "retort_no_driver", "3", [
    "cuCtxCreate_v3" "cuCtxCreate_v4" "cuCtxDestroy_v2" "cuCtxGetCacheConfig" "cuCtxGetCurrent" "cuCtxGetLimit"
    "cuCtxGetStreamPriorityRange" "cuCtxSetCacheConfig" "cuCtxSetCurrent" "cuCtxSetFlags" "cuCtxSetLimit"
    "cuCtxSynchronize" "cuDestroyExternalMemory" "cuDeviceGet" "cuDeviceGetAttribute" "cuDeviceGetCount"
    "cuDeviceGetDefaultMemPool" "cuDeviceGetMemPool" "cuDeviceGetName" "cuDeviceGetUuid" "cuDeviceGetUuid_v2"
    "cuDevicePrimaryCtxRelease_v2" "cuDevicePrimaryCtxRetain" "cuDeviceSetMemPool" "cuDeviceTotalMem_v2"
    "cuDriverGetVersion" "cuEventCreate" "cuEventDestroy_v2" "cuEventElapsedTime" "cuEventElapsedTime_v2"
    "cuEventQuery" "cuEventRecord" "cuEventSynchronize" "cuExternalMemoryGetMappedBuffer" "cuFuncGetAttribute"
    "cuFuncSetAttribute" "cuFuncSetCacheConfig" "cuGetErrorName" "cuGetErrorString" "cuGraphDestroy"
    "cuGraphExecDestroy" "cuGraphInstantiateWithFlags" "cuGraphLaunch" "cuGraphUpload" "cuImportExternalMemory"
    "cuInit" "cuLaunchCooperativeKernel" "cuLaunchHostFunc" "cuLaunchKernel" "cuMemAdvise_v2" "cuMemAllocAsync"
    "cuMemAllocFromPoolAsync" "cuMemAllocManaged" "cuMemAlloc_v2" "cuMemFreeAsync" "cuMemFreeHost"
    "cuMemFree_v2" "cuMemGetInfo_v2" "cuMemHostAlloc" "cuMemPoolCreate" "cuMemPoolDestroy"
    "cuMemPoolGetAttribute" "cuMemPoolSetAttribute" "cuMemPoolTrimTo" "cuMemPrefetchAsync_v2"
    "cuMemcpyDtoDAsync_v2" "cuMemcpyDtoD_v2" "cuMemcpyDtoHAsync_v2" "cuMemcpyDtoH_v2" "cuMemcpyHtoDAsync_v2"
    "cuMemcpyHtoD_v2" "cuMemcpyPeerAsync" "cuMemsetD8Async" "cuMemsetD8_v2" "cuModuleGetFunction"
    "cuModuleGetGlobal_v2" "cuModuleLoad" "cuModuleLoadData" "cuModuleUnload"
    "cuOccupancyAvailableDynamicSMemPerBlock" "cuOccupancyMaxActiveBlocksPerMultiprocessor"
    "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags" "cuOccupancyMaxActiveClusters"
    "cuOccupancyMaxPotentialBlockSize" "cuOccupancyMaxPotentialBlockSizeWithFlags"
    "cuOccupancyMaxPotentialClusterSize" "cuProfilerStart" "cuProfilerStop" "cuStreamAttachMemAsync"
    "cuStreamBeginCapture_v2" "cuStreamCreate" "cuStreamCreateWithPriority" "cuStreamDestroy_v2"
    "cuStreamEndCapture" "cuStreamIsCapturing" "cuStreamSynchronize" "cuStreamWaitEvent"
]);

// 1 is CUBLAS_STATUS_NOT_INITIALIZED.
library!(
    retort_cublas_slots,
    CUBLAS,
    "retort_no_cublas",
    "1",
    [
        "cublasCreate_v2" "cublasDasum_v2" "cublasDestroy_v2" "cublasDgemmStridedBatched" "cublasDgemm_v2"
        "cublasDgemv_v2" "cublasGemmEx" "cublasGemmGroupedBatchedEx" "cublasGemmStridedBatchedEx"
        "cublasGetPointerMode_v2" "cublasSasum_v2" "cublasSetPointerMode_v2" "cublasSetStream_v2"
        "cublasSgemmStridedBatched" "cublasSgemm_v2" "cublasSgemv_v2"
    ]
);

library!(
    retort_cublaslt_slots,
    CUBLASLT,
    "retort_no_cublaslt",
    "1",
    [
        "cublasLtCreate" "cublasLtMatmul" "cublasLtMatmulAlgoGetHeuristic" "cublasLtMatmulDescCreate"
        "cublasLtMatmulDescDestroy" "cublasLtMatmulDescSetAttribute" "cublasLtMatmulPreferenceCreate"
        "cublasLtMatmulPreferenceDestroy" "cublasLtMatmulPreferenceSetAttribute" "cublasLtMatrixLayoutCreate"
        "cublasLtMatrixLayoutDestroy"
    ]
);

answers!(["curandCreateGenerator"] nothing);
answers!([
    "curandSetStream" "curandSetPseudoRandomGeneratorSeed" "curandSetGeneratorOffset" "curandDestroyGenerator"
] answer "0");
// 101 is CURAND_STATUS_NOT_INITIALIZED: never called.
answers!([
    "curandGenerate" "curandGenerateLogNormal" "curandGenerateLogNormalDouble" "curandGenerateLongLong"
    "curandGenerateNormal" "curandGenerateNormalDouble" "curandGeneratePoisson" "curandGenerateUniform"
    "curandGenerateUniformDouble"
] answer "101");

/// Loads the driver's library on the first call.
///
/// # Errors
/// There is none.
pub fn driver() -> Result<(), String> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let load = || {
        // SAFETY: the driver's library, from the places of the system.
        let library = unsafe { Library::open(Some("libcuda.so.1"), RTLD_NOW | RTLD_GLOBAL) };
        let library =
            library.map_err(|error| format!("there is no NVIDIA driver ({})", cause(&error)))?;
        fill(library, DRIVER, (&raw mut retort_driver_slots).cast());
        Ok(())
    };
    LOADED.get_or_init(load).clone()
}

/// Loads cuBLAS and cuBLASLt on the first call.
///
/// # Errors
/// It is in none of the usual places.
pub fn cublas() -> Result<(), String> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let load = || {
        let major = env!("RETORT_CUDA_VERSION")
            .split('.')
            .next()
            .unwrap_or_default();
        let file = format!("libcublas.so.{major}");
        let mut places = vec![PathBuf::new()];
        places.extend(usual_places());
        let mut tried = Vec::new();
        for place in places {
            // cuBLAS needs it too and may not find it.
            let beside = place.join(format!("libcublasLt.so.{major}"));
            let path = place.join(&file);
            if !place.as_os_str().is_empty() && !path.exists() {
                continue;
            }
            // SAFETY: libraries of CUDA, from the places where users and systems install them.
            let opened = unsafe {
                let other = Library::open(Some(&beside), RTLD_NOW | RTLD_GLOBAL);
                other.and_then(|other| {
                    Ok((other, Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL)?))
                })
            };
            match opened {
                Ok((other, library)) => {
                    fill(other, CUBLASLT, (&raw mut retort_cublaslt_slots).cast());
                    fill(library, CUBLAS, (&raw mut retort_cublas_slots).cast());
                    return Ok(());
                }
                Err(error) => tried.push(cause(&error)),
            }
        }
        Err(format!(
            "{file} cannot be loaded ({}); install CUDA {major}'s libraries (pip install 'nvidia-cublas=={major}.*') and \
             name their directory in LD_LIBRARY_PATH",
            tried.join("; ")
        ))
    };
    LOADED.get_or_init(load).clone()
}

/// Opens NCCL.
///
/// # Errors
/// It is in none of the usual places.
pub fn nccl() -> Result<Library, String> {
    const FILE: &str = "libnccl.so.2";
    let mut tried = Vec::new();
    for place in std::iter::once(PathBuf::new()).chain(usual_places()) {
        let path = place.join(FILE);
        if !place.as_os_str().is_empty() && !path.exists() {
            continue;
        }
        // SAFETY: as for cuBLAS.
        match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => return Ok(library),
            Err(error) => tried.push(cause(&error)),
        }
    }
    let major = env!("RETORT_CUDA_VERSION").split('.').next();
    Err(format!(
        "{FILE}, by which workers on GPUs exchange gradients, cannot be loaded ({}); install it (pip install nvidia-nccl-cu{}) \
         and name its directory in LD_LIBRARY_PATH",
        tried.join("; "),
        major.unwrap_or_default()
    ))
}

/// Directories with CUDA's libraries that the system's loader does not search: those of toolkits and of Python packages, in a
/// virtual environment of a directory above this plugin or in the system.
fn usual_places() -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = ["/usr/local/cuda", "/opt/cuda"]
        .iter()
        .map(|root| Path::new(root).join("lib64"))
        .collect();
    let mut pythons = Vec::new();
    if let Some(file) = own_file() {
        for dir in file.ancestors().skip(1) {
            pythons.push(dir.join(".venv/lib"));
        }
    }
    pythons.extend(["/usr/local/lib", "/usr/lib", "/opt/conda/lib"].map(PathBuf::from));
    let inside = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    for lib in pythons {
        for python in inside(&lib) {
            let named = python.file_name().and_then(|name| name.to_str());
            if !named.is_some_and(|name| name.starts_with("python3")) {
                continue;
            }
            for packages in ["site-packages", "dist-packages"] {
                let vendor = python.join(packages).join("nvidia");
                places.extend(inside(&vendor).into_iter().map(|part| part.join("lib")));
            }
        }
    }
    places
}

/// The file that this code was loaded from.
fn own_file() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let here = own_file as *const () as usize;
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let bound = |text| usize::from_str_radix(text, 16).ok();
        let within = (bound(start)?..bound(end)?).contains(&here);
        within.then(|| PathBuf::from(&rest[rest.find('/')?..]).into())?
    })
}

/// Fills slots with a library's functions; a slot without one keeps its default answer. The library is never unloaded.
fn fill(library: Library, names: &[&'static str], slots: *mut *const c_void) {
    for (at, name) in names.iter().enumerate() {
        // SAFETY: only the address is taken.
        let symbol: Result<Symbol<*const c_void>, _> = unsafe { library.get(name.as_bytes()) };
        if let Ok(symbol) = symbol {
            // SAFETY: there are as many slots as names, and nobody jumps through them yet: whoever does has called this first.
            unsafe { slots.add(at).write(symbol.into_raw().cast_const()) };
        }
    }
    std::mem::forget(library);
}

fn cause(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}
