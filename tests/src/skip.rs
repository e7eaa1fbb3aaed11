//! Tests that not every machine can do.

use std::io::Write;

/// Says that a test is left out, and why. Where `RETORT_SKIP_IS_FAILURE` is set, the machine has what tests need, and
/// the test fails instead.
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

/// The same, where the reason is what this machine forbids, not what it lacks: that is no failure anywhere.
pub fn leave_out(why: &str) {
    // Written past the test harness, which would swallow it.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}
