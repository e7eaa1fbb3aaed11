//! Processes' memory, by Linux's figures.

/// This process's peak, in KiB.
pub fn peak() -> usize {
    own("VmHWM:")
}

/// The peak of another process so far, in KiB; None if it has ended.
pub fn peak_of(pid: u32) -> Option<usize> {
    memory(&pid.to_string(), "VmHWM:")
}

/// This process's current memory, in KiB.
pub fn resident() -> usize {
    own("VmRSS:")
}

/// A figure of this process's memory, in KiB.
fn own(figure: &str) -> usize {
    memory("self", figure).expect("Linux has the figure")
}

/// A figure of a process's memory, in KiB; None if it has ended.
fn memory(process: &str, figure: &str) -> Option<usize> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(figure))?;
    line.trim().trim_end_matches(" kB").trim().parse().ok()
}
