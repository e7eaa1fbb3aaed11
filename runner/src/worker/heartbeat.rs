//! Detects that a worker which others wait for hangs.
//!
//! The worker of a part sends a message every [`BEAT`], from a separate thread, so that the messages go on whatever its stage
//! computes, loads or waits for. Only a process that is stopped, or whose machine hangs, sends none. The supervisor of a
//! training's worker checks every second. It counts checks instead of time, so that a supervisor that was itself stopped for a
//! while does not take its worker for dead.

use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior};

/// The time between two heartbeats of a worker.
pub const BEAT: Duration = Duration::from_secs(2);
/// The time between two checks by its supervisor.
const LOOK: Duration = Duration::from_secs(1);
/// The number of checks without a sign of life after which a worker is taken for dead.
const MOST: u32 = 30;

/// The times of a supervisor's checks.
pub fn looks() -> Interval {
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks
}

/// The signs of life of a worker.
#[derive(Debug, Default)]
pub struct Heartbeat {
    /// The number of checks since the last sign of life; None before the first.
    looks: Option<u32>,
}

impl Heartbeat {
    /// It has sent a heartbeat.
    pub fn beat(&mut self) {
        self.looks = Some(0);
    }

    /// It has sent something else, which counts as a sign of life once it has sent a heartbeat.
    pub fn heard(&mut self) {
        self.looks = self.looks.map(|_| 0);
    }

    /// A check: whether it has been silent for too long.
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
