//! Through the real binary: recipes with stages of this plugin, trainings with several workers, the examination of the plugin.
//! Most tests wait for other processes, so they are one binary and run side by side.

mod cluster;
mod examination;
mod ranks;
mod recipe;

use std::path::PathBuf;

// The cluster's set-up, shared with the runner's tests, looks for it here.
use cluster::lab;

/// The binary beside the plugins; tests lie two directories below.
fn binary() -> PathBuf {
    let this = std::env::current_exe().expect("this test's path");
    let dir = this.ancestors().nth(2).expect("target/release");
    for file in ["retort", "libretort_candle.so", "libretort_libtorch.so"] {
        assert!(
            dir.join(file).exists(),
            "{} is missing: make build libtorch",
            dir.join(file).display()
        );
    }
    dir.join("retort")
}
