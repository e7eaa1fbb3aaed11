//! With the feature `cuda`: compiles the kernels for GPUs to PTX, which the driver compiles for its GPU, and records the
//! toolkit and the compute capability. Without the feature it does nothing.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=src/cuda/kernels.cu");
    println!("cargo::rerun-if-changed=src/cuda/kernels");
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    println!("cargo::rerun-if-env-changed=NVCC");
    let nvcc = std::env::var("NVCC").unwrap_or("nvcc".into());
    let capability = std::env::var("CUDA_COMPUTE_CAP").unwrap_or("90".into());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let compiled = Command::new(&nvcc)
        .args(["--ptx", "-O3", "-std=c++17"])
        .arg(format!("-arch=compute_{capability}"))
        .arg("-o")
        .arg(out.join("kernels.ptx"))
        .arg("src/cuda/kernels.cu")
        .status();
    match compiled {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{nvcc}: {status}"),
        Err(error) => panic!("{nvcc}: {error}; `make cuda` builds with a CUDA toolkit"),
    }
    let said = Command::new(&nvcc).arg("--version").output();
    let said = said.map_or(String::new(), |o| {
        String::from_utf8_lossy(&o.stdout).into_owned()
    });
    let version = said
        .split("release ")
        .nth(1)
        .and_then(|rest| rest.split(',').next());
    let version = version.unwrap_or_else(|| panic!("{nvcc} --version names no release"));
    println!("cargo::rustc-env=RETORT_CUDA_VERSION={}", version.trim());
    println!("cargo::rustc-env=RETORT_CUDA_CAPABILITY={capability}");
    // Undefined symbols are an error at link time, not when the plugin is loaded.
    println!("cargo::rustc-link-arg-cdylib=-Wl,-z,defs");
}
