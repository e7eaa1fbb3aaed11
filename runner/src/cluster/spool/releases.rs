//! How often a runner has released an element that Slurm could not launch: whoever takes the job over goes on counting.

use std::io;
use std::path::Path;

use super::{make_dir, patiently, put, word};

/// The file in an element's directory, which exists only if it was released.
const RELEASES: &str = "releases";

/// The number so far.
pub fn releases(dir: &Path) -> u32 {
    word(&dir.join(RELEASES)).parse().unwrap_or(0)
}

/// Notes the number.
///
/// # Errors
/// What the file system says.
pub fn note_releases(dir: &Path, count: u32) -> io::Result<()> {
    // It may not have begun.
    patiently(|| make_dir(dir))?;
    put(&dir.join(RELEASES), count.to_string().as_bytes())
}
