//! Whether a worker that others wait for still lives.
//!
//! A worker of a part shows it by a message every [`BEAT`], sent by a thread of its own: whatever its stage computes, loads or
//! waits for, it goes on. Only a process that is stopped, or whose machine hangs, sends none. Whoever supervises one of a
//! training looks every second and counts. Looks are counted, not time, so that a supervisor that was itself stopped
//! meanwhile finds nothing amiss.

use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior};

/// How often a worker shows that it lives.
pub const BEAT: Duration = Duration::from_secs(2);
/// How often its supervisor looks.
const LOOK: Duration = Duration::from_secs(1);
/// After so many looks without a sign it is taken for dead.
const MOST: u32 = 30;

/// The times at which a supervisor looks.
pub fn looks() -> Interval {
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks
}

/// The signs of life of a worker.
#[derive(Debug, Default)]
pub struct Heartbeat {
    /// Looks since the last one; none before the first.
    looks: Option<u32>,
}

impl Heartbeat {
    /// It has shown that it lives.
    pub fn beat(&mut self) {
        self.looks = Some(0);
    }

    /// It has sent something: as good a sign, once there are any.
    pub fn heard(&mut self) {
        self.looks = self.looks.map(|_| 0);
    }

    /// A look: whether it has been silent for too long.
    pub fn look(&mut self) -> bool {
        self.looks = self.looks.map(|looks| looks + 1);
        self.looks.is_some_and(|looks| looks >= MOST)
    }

    /// How long it has been silent.
    pub fn silence(&self) -> Duration {
        LOOK * self.looks.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_silent_worker_is_lost() {
        let mut heartbeat = Heartbeat::default();
        let silent = |heartbeat: &mut Heartbeat, looks: u32| (0..looks).any(|_| heartbeat.look());
        heartbeat.heard();
        assert!(
            !silent(&mut heartbeat, 10 * MOST),
            "it has not begun to beat"
        );
        for _ in 0..10 {
            heartbeat.beat();
            assert!(!silent(&mut heartbeat, MOST - 1), "late, and alive");
        }
        heartbeat.heard();
        assert!(!silent(&mut heartbeat, MOST - 1));
        assert!(silent(&mut heartbeat, 1));
        assert_eq!(heartbeat.silence(), Duration::from_secs(30));
        assert!(15 * BEAT <= MOST * LOOK, "many beats have to be missing");
    }
}
