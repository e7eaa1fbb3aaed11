//! This process's memory, by Linux's figures.

/// This process's peak, in KiB.
pub fn peak() -> usize {
    memory("VmHWM:")
}

/// This process's current memory, in KiB.
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
