//! Programs that tests write and run at once.

use std::path::Path;
use std::process::Command;

/// Writes a script, through another process: a child that another test starts meanwhile would inherit this process's open file
/// for a moment, and a file that is open for writing cannot be run.
///
/// # Panics
/// It cannot be written.
pub fn script(path: &Path, text: &str) {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text).expect("a draft");
    let copied = Command::new("install")
        .arg("-m755")
        .args([&*draft, path])
        .status();
    assert!(copied.expect("`install`").success(), "{}", path.display());
    std::fs::remove_file(draft).expect("a draft");
}
