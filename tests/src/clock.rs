//! Wall-clock and processor time: machines are busy, so benches give both.

use std::time::Instant;

/// Wall-clock and processor time since a start.
#[derive(Debug)]
pub struct Clock {
    began: Instant,
    cpu: f64,
    whose: libc::c_int,
}

/// In seconds.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// By the clock on the wall.
    pub wall: f64,
    /// User and system time.
    pub cpu: f64,
}

impl Clock {
    /// Of this process.
    pub fn start() -> Self {
        Self::of(libc::RUSAGE_SELF)
    }

    /// Of the processes that this one has started and that have ended meanwhile.
    pub fn of_children() -> Self {
        Self::of(libc::RUSAGE_CHILDREN)
    }

    fn of(whose: libc::c_int) -> Self {
        Self {
            began: Instant::now(),
            cpu: cpu(whose),
            whose,
        }
    }

    /// The times up to now.
    pub fn stop(&self) -> Timing {
        Timing {
            wall: self.began.elapsed().as_secs_f64(),
            cpu: cpu(self.whose) - self.cpu,
        }
    }
}

impl std::fmt::Display for Timing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.1} ms ({:.1} ms of processor time)",
            1e3 * self.wall,
            1e3 * self.cpu
        )
    }
}

/// User and system time, in seconds.
fn cpu(whose: libc::c_int) -> f64 {
    // SAFETY: the structure is filled by the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(whose, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
