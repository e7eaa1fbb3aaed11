//! Ranks: processes that train one network together, each on its share of every batch.
//!
//! A backend's library brings the [`Collective`] through which they meet; the engine says what is exchanged, and when.
//! Every rank starts from the same state, takes the same samples of its own share and gets the same sums, bit for bit: so
//! all hold the same weights after each step, and only the first writes.

use std::any::Any;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use retort_abi::{ArtifactMeta, Cancel, Failure, Host, LogLevel, Part};

use crate::error::{Error, Result};

/// What ranks exchange. All call the same functions in the same order with buffers of the same size, and a call returns
/// when it is done.
pub trait Collective: Send + Sync {
    /// Which of the ranks this process is, from 0.
    fn rank(&self) -> usize;
    /// The number of ranks.
    fn size(&self) -> usize;
    /// Puts the sum over all ranks into each one's buffer; all get the same bits.
    ///
    /// # Errors
    /// [`crate::error::Error::Rank`]: another rank is gone, or has not come in time.
    fn all_reduce(&self, values: &mut [f32]) -> Result<()>;
    /// Puts the values of one rank into the buffers of all.
    ///
    /// # Errors
    /// [`crate::error::Error::Rank`].
    fn broadcast(&self, values: &mut [f32], root: usize) -> Result<()>;
    /// Waits for all ranks.
    ///
    /// # Errors
    /// [`crate::error::Error::Rank`].
    fn barrier(&self) -> Result<()>;

    /// What the backend exchanges tensors with in the memory of its device
    /// ([`Optimiser::begin_exchange_`](crate::backend::Optimiser::begin_exchange_)); none, where all goes through the host's.
    fn on_device(&self) -> Option<&dyn Any> {
        None
    }

    /// The values of all ranks in one list of so many, of which a rank has those from `at` on: the same bits for all.
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

    /// The part of so many samples, one after the other, that a rank's share is cut into; `cut` in how many. The shares of
    /// all ranks make the whole, and differ by a sample at most.
    fn share(&self, samples: usize, part: usize, cut: usize) -> Range<usize> {
        let parts = cut * self.size();
        let at = |part: usize| part * samples / parts;
        let own = self.rank() * cut + part;
        at(own)..at(own + 1)
    }
}

/// Where ranks meet, by the names that `torchrun` gives its variables, and how long they wait for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// Host of the first rank.
    pub host: String,
    /// Port on it.
    pub port: u16,
    /// What it is called among several at the same address; empty where it is the only one.
    pub name: String,
    /// Whether `torchrun` itself listens there.
    pub held: bool,
    /// How long another rank is waited for.
    pub patience: Duration,
}

/// How long that is where nobody says.
const PATIENCE: Duration = Duration::from_secs(600);

impl Meeting {
    /// As the variables say to the process of a part.
    ///
    /// # Errors
    /// One is missing, or makes no sense.
    pub fn read(part: Part, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let missing = |name: &str| {
            Error::Rank(format!(
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
            // At an address that retort has chosen nobody else listens.
            held: !name.is_empty()
                && given("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|held| held == "True"),
            name,
            patience: patience.map_err(|_| missing("RETORT_RANK_TIMEOUT"))?,
        })
    }
}

/// One process alone: nothing is exchanged.
#[derive(Debug, Clone, Copy, Default)]
pub struct Single;

impl Collective for Single {
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

/// The host of a rank that is not the first: what all would say alike, the first says.
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

    struct At(usize, usize);

    impl Collective for At {
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
        let meeting = |changes: &[(&str, &str)]| {
            let given = [("MASTER_ADDR", "n1"), ("MASTER_PORT", "29500")];
            Meeting::read(part, |name| {
                let mut all = changes.iter().chain(&given);
                all.find(|(known, _)| *known == name)
                    .map(|(_, value)| (*value).to_owned())
            })
        };
        let agent = ("TORCHELASTIC_USE_AGENT_STORE", "True");
        let plain = meeting(&[agent]).unwrap();
        assert_eq!((plain.port, plain.held), (29500, false));
        assert_eq!(plain.patience, PATIENCE);
        let named =
            meeting(&[agent, ("RETORT_MEETING", "t"), ("RETORT_RANK_TIMEOUT", "5")]).unwrap();
        assert!(named.held && named.patience.as_secs() == 5);
        for wrong in [
            ("MASTER_PORT", "x"),
            ("MASTER_ADDR", ""),
            ("RETORT_RANK_TIMEOUT", "soon"),
        ] {
            let error = meeting(&[wrong]).unwrap_err().to_string();
            assert!(
                error.contains("worker 2 of 2") && error.contains(wrong.0),
                "{error}"
            );
        }
    }

    #[test]
    fn shares_make_the_whole() {
        for samples in [1, 7, 32, 33] {
            for (size, cut) in [(1, 1), (2, 1), (4, 3), (5, 2)] {
                let shares = (0..size).flat_map(|rank| {
                    (0..cut).map(move |part| At(rank, size).share(samples, part, cut))
                });
                let all: Vec<usize> = shares.clone().flatten().collect();
                assert_eq!(all, (0..samples).collect::<Vec<_>>());
                let lengths: Vec<usize> = shares.map(|share| share.len()).collect();
                let [least, most] = [lengths.iter().min(), lengths.iter().max()];
                assert!(most.unwrap() - least.unwrap() <= 1, "{lengths:?}");
            }
        }
        assert_eq!(Single.share(9, 0, 1), 0..9);
    }
}
