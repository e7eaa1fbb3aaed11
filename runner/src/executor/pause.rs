//! Pausing a run (Ctrl-Z): runner and workers stop together, and deadlines are extended.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::worker::process;

/// How long a run has been stopped.
#[derive(Debug, Default)]
pub struct PauseClock {
    milliseconds: AtomicU64,
}

impl PauseClock {
    /// All pauses so far together.
    pub fn total(&self) -> Duration {
        Duration::from_millis(self.milliseconds.load(Ordering::Relaxed))
    }

    /// The running time since `began`, excluding pauses; `before` is the total pause at that time.
    pub fn worked(&self, began: Instant, before: Duration) -> Duration {
        began
            .elapsed()
            .saturating_sub(self.total().saturating_sub(before))
    }

    /// Stops all workers and this process until it is continued. To be called on the event loop's thread: nothing may read a
    /// clock before the pause is counted.
    pub fn stop(&self) {
        let began = Instant::now();
        process::signal_all(libc::SIGSTOP);
        // SAFETY: a plain system call; it returns once the process is continued.
        unsafe { libc::raise(libc::SIGSTOP) };
        process::signal_all(libc::SIGCONT);
        let pause = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.milliseconds.fetch_add(pause, Ordering::Relaxed);
    }
}
