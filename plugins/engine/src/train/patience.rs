//! How long ranks wait for each other in a step: one that hangs should end the attempt soon, and a slow one should not.
//!
//! Steps take about the same time on all ranks, so a wait of many steps means that a rank hangs. The first step of a process is
//! an exception (memory, compilation), and so is a step after something that takes long on one rank only: writing a
//! checkpoint, measuring on held-out data. These wait as long as ranks may at all.

use std::time::Duration;

/// The least time to wait in any other step, and how many of the longest one so far. A process that is stopped as a whole is
/// known to the runner before, by 30 seconds of silence, which is the more precise reason.
const LEAST: Duration = Duration::from_secs(40);
const STEPS: u32 = 10;

#[derive(Debug, Default)]
pub(super) struct Patience {
    /// The longest ordinary step so far.
    longest: Option<Duration>,
    /// Whether the next step is an ordinary one, and not an exception.
    is_steady: bool,
}

impl Patience {
    /// How long the next step's exchanges may wait; None: as long as ranks may at all.
    pub(super) fn of_the_next(&self) -> Option<Duration> {
        let longest = self.longest.filter(|_| self.is_steady)?;
        Some(LEAST.max(longest.saturating_mul(STEPS)))
    }

    /// A step has taken this long.
    pub(super) fn note(&mut self, took: Duration) {
        if std::mem::replace(&mut self.is_steady, true) {
            self.longest = self.longest.max(Some(took));
        }
    }

    /// What follows takes longer on some ranks than on others, and the next step waits for them.
    pub(super) fn unsettle(&mut self) {
        self.is_steady = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_steady_steps_are_short_of_patience() {
        let seconds = Duration::from_secs;
        let mut patience = Patience::default();
        assert_eq!(patience.of_the_next(), None, "the first step");
        patience.note(seconds(50));
        assert_eq!(patience.of_the_next(), None, "nothing to compare with");
        patience.note(seconds(1));
        assert_eq!(patience.of_the_next(), Some(LEAST));
        patience.note(seconds(5));
        patience.note(seconds(2));
        assert_eq!(patience.of_the_next(), Some(seconds(50)));
        // It waits for the rank that writes, which is no measure of a step.
        patience.unsettle();
        assert_eq!(patience.of_the_next(), None);
        patience.note(seconds(60));
        assert_eq!(patience.of_the_next(), Some(seconds(50)));
    }
}
