//! libtorch against the engine's definitions, and the process it makes.

use std::collections::BTreeSet;
use std::path::Path;

use retort_engine::conformance;
use retort_libtorch::Libtorch;
use retort_tests::examination;

fn open() -> Libtorch {
    Libtorch::open("cpu", "f32", 2).expect("a CPU")
}

#[test]
fn operations() {
    conformance::verify(&open());
}

#[test]
fn threads_are_as_many_as_asked_for_and_of_one_library() {
    open();
    assert_eq!(tch::get_num_threads(), 2);
    let maps = std::fs::read_to_string("/proc/self/maps").expect("the process's memory");
    let libraries: BTreeSet<&str> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter_map(|path| Path::new(path).file_name()?.to_str())
        .filter(|name| name.contains("gomp") || name.contains("libomp") || name.contains("iomp"))
        .collect();
    assert_eq!(libraries.len(), 1, "{libraries:?}");
}

#[test]
fn libtorch_is_as_a_plugin_has_to_be() {
    let rows = examination::check("libtorch");
    // A GPU that cannot be used here says why, in each dtype.
    let of = |row: &&serde_json::Value| row["of"].as_str().unwrap_or_default().starts_with("cuda");
    let gpus: Vec<_> = rows.iter().filter(of).collect();
    assert!(gpus.len() >= 3, "{gpus:?}");
    for row in gpus {
        let why = row["detail"].as_str().unwrap_or_default();
        let skipped = row["verdict"] == "skipped" && why.len() > 20;
        assert!(skipped || row["verdict"] == "passed", "{row}");
    }
}
