//! Compiles the functions that tch lacks (`src/aten.cpp`, `src/collective.cpp`) and records the path of libtorch, so that the
//! plugin finds it at run time without LD_LIBRARY_PATH.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=src/aten.cpp");
    println!("cargo::rerun-if-changed=src/collective.cpp");
    println!("cargo::rerun-if-changed=src/guarded.h");
    let lib = std::env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is");
    let lib = PathBuf::from(lib);
    let lib = lib
        .canonicalize()
        .unwrap_or_else(|error| panic!("{}: {error}", lib.display()));
    let root = lib.parent().expect("libtorch/lib has a parent");
    let file = lib.join("libtorch_cpu.so");
    println!("cargo::rerun-if-changed={}", file.display());
    println!("cargo::rustc-env=RETORT_LIBTORCH_LIB={}", lib.display());
    println!("cargo::rustc-env=RETORT_LIBTORCH_VERSION={}", version(root));
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
    // Programs that compare both plugins link both; each has an entry symbol, and neither is called.
    println!("cargo::rustc-link-arg-tests=-Wl,--allow-multiple-definition");
    println!("cargo::rustc-link-arg-benches=-Wl,--allow-multiple-definition");
    println!("cargo::rustc-link-arg-examples=-Wl,--allow-multiple-definition");
    // Some dependencies mark functions for export; the plugin exports only its entry symbol.
    println!("cargo::rustc-link-arg-cdylib=-Wl,--exclude-libs,ALL");
    // libtorch's loops over its threads are OpenMP's, expanded where they are used.
    println!("cargo::rustc-link-arg=-L{}", lib.display());
    println!("cargo::rustc-link-arg=-l:{}", openmp(&lib));
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .flag("-fopenmp")
        .warnings(false)
        .include(root.join("include"))
        .file("src/aten.cpp")
        .compile("retort_aten");
    // C++20, as c10d's headers are. The last folder stands in for Gloo's own headers if they are missing.
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .warnings(false)
        // Whoever guesses that a group is Gloo's puts calls into Gloo in its place, and links libtorch's GPU half for them.
        .flag_if_supported("-fno-devirtualize")
        .flag_if_supported("-fno-devirtualize-speculatively")
        .include(root.join("include"))
        .include(root.join("include/torch/csrc/api/include"))
        .include("gloo")
        .file("src/collective.cpp")
        .compile("retort_collective");
}

/// The OpenMP bundled with libtorch, or else the system's, which libtorch then uses: a process must not have two.
fn openmp(lib: &Path) -> String {
    let files = lib.read_dir().into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().into_string().ok());
    let own = |name: &String| name.starts_with("libgomp") || name.starts_with("libiomp5");
    names
        .into_iter()
        .find(own)
        .unwrap_or_else(|| "libgomp.so.1".into())
}

/// The version that libtorch's own header gives.
fn version(root: &Path) -> String {
    let header = root.join("include/torch/headeronly/version.h");
    let text = std::fs::read_to_string(&header)
        .unwrap_or_else(|error| panic!("{}: {error}", header.display()));
    let part = |name: &str| {
        let start = format!("#define TORCH_VERSION_{name} ");
        text.lines()
            .find_map(|line| line.strip_prefix(&start))
            .unwrap_or_else(|| panic!("{}: no version", header.display()))
    };
    ["MAJOR", "MINOR", "PATCH"].map(part).join(".")
}
