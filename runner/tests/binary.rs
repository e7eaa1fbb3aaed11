//! The binary is there and starts. Its behaviour is tried in the workspace's `tests/`; that this test needs the binary
//! is also what makes `cargo test` build it.

use std::process::Command;

#[test]
fn it_says_its_version() {
    let output = Command::new(env!("CARGO_BIN_EXE_retort"))
        .arg("--version")
        .output()
        .unwrap();
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("retort {}\n", env!("CARGO_PKG_VERSION"))
    );
}
