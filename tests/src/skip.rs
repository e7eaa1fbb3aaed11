//! Tests that not every machine can run.

use std::io::Write;

/// Prints that a test is skipped, and why. If `RETORT_SKIP_IS_FAILURE` is set, the machine should have everything that tests
/// need, and the test fails instead.
///
/// # Panics
/// There.
pub fn skip(why: &str) {
    assert!(
        std::env::var_os("RETORT_SKIP_IS_FAILURE").is_none(),
        "left out, where nothing may be: {why}"
    );
    leave_out(why);
}

/// The same, if this machine forbids the test instead of lacking something: that is never a failure.
pub fn leave_out(why: &str) {
    // Written past the test harness, which would swallow it.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}
