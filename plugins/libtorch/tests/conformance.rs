//! libtorch against the engine's definitions, and the process it makes.

use std::collections::BTreeSet;
use std::path::Path;

use retort_engine::conformance;
use retort_libtorch::Libtorch;

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
