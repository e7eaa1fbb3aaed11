//! Ranks: processes that train one network together, each on its share of every batch.
//!
//! A backend's library provides the [`Collective`] that connects them; the engine decides what is exchanged, and when. All
//! ranks start from the same state, each computes its share of the batch, and all get the same sums, bit for bit. So all hold
//! the same weights after each step, and only the first writes files.

use std::any::Any;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use retort_abi::{ArtifactMeta, Cancel, Failure, Host, LogLevel, Part};

use crate::error::{Error, Result};

/// Exchanges between ranks. All ranks call the same functions in the same order with buffers of the same size; a call returns
/// when the exchange is complete.
pub trait Collective: Send + Sync {
    /// Which of the ranks this process is, from 0.
    fn rank(&self) -> usize;
    /// The number of ranks.
    fn size(&self) -> usize;
    /// Replaces each rank's buffer by the sum over all ranks; all get the same bits.
    ///
    /// # Errors
    /// [`crate::error::Error::Rank`]: another rank is gone, or has not come in time.
    fn all_reduce(&self, values: &mut [f32]) -> Result<()>;
    /// Copies one rank's values into the buffers of all.
    ///
    /// # Errors
    /// [`crate::error::Error::Rank`].
    fn broadcast(&self, values: &mut [f32], root: usize) -> Result<()>;
    /// Waits for all ranks.
    ///
    /// # Errors
    /// [`crate::error::Error::Rank`].
    fn barrier(&self) -> Result<()>;

    /// How long each later exchange may wait for the other ranks; None, as at first: for [`Rendezvous::patience`]. That one is
    /// also the most; one that is longer than usual stretches this one ([`patience_within`]). Without other ranks nothing
    /// waits.
    fn set_patience(&self, _patience: Option<Duration>) {}

    /// The backend's handle for exchanging tensors in its device's memory
    /// ([`Exchange::begin_exchange_`](crate::backend::Exchange::begin_exchange_)); None if exchanges go through host
    /// memory.
    fn on_device(&self) -> Option<&dyn Any> {
        None
    }

    /// Gathers the values of all ranks into one list of this length; a rank contributes those from `at` on. All get the same
    /// bits.
    ///
    /// # Errors
    /// [`crate::error::Error::Rank`].
    fn gather(&self, own: &[f32], at: usize, all: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0; all];
        values[at..at + own.len()].copy_from_slice(own);
        if self.is_shared() {
            // A sum with zeros alone.
            self.all_reduce(&mut values)?;
        }
        Ok(values)
    }

    /// Whether there are others.
    fn is_shared(&self) -> bool {
        self.size() > 1
    }

    /// A range of a batch's samples: the batch is divided into shares for the ranks, and each share into `cut` parts. Shares
    /// differ by at most one sample.
    fn share(&self, samples: usize, part: usize, cut: usize) -> Range<usize> {
        let parts = cut * self.size();
        let at = |part: usize| part * samples / parts;
        let own = self.rank() * cut + part;
        at(own)..at(own + 1)
    }
}

/// Where ranks meet, in the environment variables of `torchrun`, and how long they wait for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// Host of the first rank.
    pub host: String,
    /// Port on it.
    pub port: u16,
    /// Its name, if several share the address; otherwise empty.
    pub name: String,
    /// Whether `torchrun` itself listens there.
    pub held: bool,
    /// How long to wait for another rank, at most.
    pub patience: Duration,
}

/// The default.
const PATIENCE: Duration = Duration::from_secs(600);

impl Rendezvous {
    /// Reads the environment variables of a part's process.
    ///
    /// # Errors
    /// One is missing, or makes no sense.
    pub fn read(part: Part, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let missing = |name: &str| {
            Error::Backend(format!(
                "worker {} of {} does not know where the others are: {name} is not set or makes no sense",
                part.index + 1,
                part.of
            ))
        };
        let port = given("MASTER_PORT").and_then(|port| port.parse().ok());
        let name = given("RETORT_MEETING").unwrap_or_default();
        let patience = match given("RETORT_RANK_TIMEOUT") {
            Some(value) => value.parse().map(Duration::from_secs),
            None => Ok(PATIENCE),
        };
        Ok(Self {
            host: given("MASTER_ADDR").ok_or_else(|| missing("MASTER_ADDR"))?,
            port: port.ok_or_else(|| missing("MASTER_PORT"))?,
            // At an address chosen by retort nobody else listens.
            held: !name.is_empty()
                && given("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|held| held == "True"),
            name,
            patience: patience.map_err(|_| missing("RETORT_RANK_TIMEOUT"))?,
        })
    }
}

/// How long an exchange may wait: `wished`, but not longer than ranks wait at all, which is `most`. A user who sets more than
/// the default has slower machines, so there every wait is longer in proportion.
pub fn patience_within(most: Duration, wished: Option<Duration>) -> Duration {
    let Some(wished) = wished else { return most };
    let stretch = (most.as_secs_f64() / PATIENCE.as_secs_f64()).max(1.0);
    let stretched = Duration::try_from_secs_f64(wished.as_secs_f64() * stretch);
    stretched.map_or(most, |stretched| stretched.min(most))
}

/// Measures how long a rank has waited. A pause of its process (Ctrl-Z) counts for a second at most: the other ranks pause
/// with it.
#[derive(Debug)]
pub struct WaitClock {
    looked: Instant,
    waited: Duration,
}

impl WaitClock {
    /// It starts now.
    pub fn start() -> Self {
        Self {
            looked: Instant::now(),
            waited: Duration::ZERO,
        }
    }

    /// The time since the start. To be asked several times a second.
    pub fn waited(&mut self) -> Duration {
        self.waited_at(Instant::now())
    }

    fn waited_at(&mut self, now: Instant) -> Duration {
        const MOST: Duration = Duration::from_secs(1);
        self.waited += now.duration_since(self.looked).min(MOST);
        self.looked = now;
        self.waited
    }
}

/// One process alone: nothing is exchanged.
#[derive(Debug, Clone, Copy, Default)]
pub struct SingleRank;

impl Collective for SingleRank {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _: &mut [f32], _: usize) -> Result<()> {
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}

/// The host of all ranks but the first: it drops messages that all ranks would send alike.
pub(crate) struct QuietHost<'a>(pub &'a dyn Host);

impl Host for QuietHost<'_> {
    fn log(&self, level: LogLevel, message: &str) {
        let level = match level {
            LogLevel::Info | LogLevel::Warn => LogLevel::Debug,
            other => other,
        };
        self.0.log(level, message);
    }

    fn metric(&self, _: &str, _: u64, _: f64) {}

    fn progress(&self, _: u64, _: u64, _: &str) {}

    fn cancelled(&self) -> Cancel {
        self.0.cancelled()
    }

    fn artifact_begin(&self, kind: &str, name: &str) -> Result<(u64, PathBuf), Failure> {
        self.0.artifact_begin(kind, name)
    }

    fn artifact_commit(&self, id: u64, meta: &ArtifactMeta) -> Result<(), Failure> {
        self.0.artifact_commit(id, meta)
    }

    fn artifact_abort(&self, id: u64) {
        self.0.artifact_abort(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct FakeRank(usize, usize);

    impl Collective for FakeRank {
        fn rank(&self) -> usize {
            self.0
        }
        fn size(&self) -> usize {
            self.1
        }
        fn all_reduce(&self, _: &mut [f32]) -> Result<()> {
            Ok(())
        }
        fn broadcast(&self, _: &mut [f32], _: usize) -> Result<()> {
            Ok(())
        }
        fn barrier(&self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn where_ranks_meet_is_read_from_the_contract() {
        let part = Part { index: 1, of: 2 };
        let rendezvous = |changes: &[(&str, &str)]| {
            let given = [("MASTER_ADDR", "n1"), ("MASTER_PORT", "29500")];
            Rendezvous::read(part, |name| {
                let mut all = changes.iter().chain(&given);
                all.find(|(known, _)| *known == name)
                    .map(|(_, value)| (*value).to_owned())
            })
        };
        let agent = ("TORCHELASTIC_USE_AGENT_STORE", "True");
        let plain = rendezvous(&[agent]).unwrap();
        assert_eq!((plain.port, plain.held), (29500, false));
        assert_eq!(plain.patience, PATIENCE);
        let named =
            rendezvous(&[agent, ("RETORT_MEETING", "t"), ("RETORT_RANK_TIMEOUT", "5")]).unwrap();
        assert!(named.held && named.patience.as_secs() == 5);
        for wrong in [
            ("MASTER_PORT", "x"),
            ("MASTER_ADDR", ""),
            ("RETORT_RANK_TIMEOUT", "soon"),
        ] {
            let error = rendezvous(&[wrong]).unwrap_err().to_string();
            assert!(
                error.contains("worker 2 of 2") && error.contains(wrong.0),
                "{error}"
            );
        }
    }

    #[test]
    fn a_longer_limit_makes_ranks_more_patient_everywhere() {
        let seconds = Duration::from_secs;
        let within = |most, wished| patience_within(seconds(most), Some(seconds(wished)));
        assert_eq!(patience_within(seconds(600), None), seconds(600));
        assert_eq!(within(600, 40), seconds(40));
        assert_eq!(within(30, 40), seconds(30));
        assert_eq!(within(1800, 40), seconds(120));
        assert_eq!(within(1800, 900), seconds(1800));
        assert_eq!(within(u64::MAX, u64::MAX), seconds(u64::MAX));
    }

    #[test]
    fn a_pause_is_no_wait() {
        let mut clock = WaitClock::start();
        let mut now = clock.looked;
        let mut after = |milliseconds| {
            now += Duration::from_millis(milliseconds);
            clock.waited_at(now).as_millis()
        };
        assert_eq!(after(300), 300);
        assert_eq!(after(400), 700);
        assert_eq!(after(3_600_000), 1700);
        assert_eq!(after(50), 1750);
    }

    #[test]
    fn shares_make_the_whole() {
        for samples in [1, 7, 32, 33] {
            for (size, cut) in [(1, 1), (2, 1), (4, 3), (5, 2)] {
                let shares = (0..size).flat_map(|rank| {
                    (0..cut).map(move |part| FakeRank(rank, size).share(samples, part, cut))
                });
                let all: Vec<usize> = shares.clone().flatten().collect();
                assert_eq!(all, (0..samples).collect::<Vec<_>>());
                let lengths: Vec<usize> = shares.map(|share| share.len()).collect();
                let [least, most] = [lengths.iter().min(), lengths.iter().max()];
                assert!(most.unwrap() - least.unwrap() <= 1, "{lengths:?}");
            }
        }
        assert_eq!(SingleRank.share(9, 0, 1), 0..9);
    }
}
