//! Memory of this process, as Linux counts it.

/// The most that this process has had, in KiB.
pub fn peak() -> usize {
    memory("VmHWM:")
}

/// What this process has now, in KiB.
pub fn resident() -> usize {
    memory("VmRSS:")
}

/// A figure of this process's memory, in KiB.
fn memory(figure: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(figure))
        .expect("the figure");
    line.trim()
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .expect("a number")
}
