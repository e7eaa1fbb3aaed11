//! Checkpoints: parameters, moments, averages and the best weights so far, in one file.

use std::path::{Path, PathBuf};

use retort_checkpoint::regular;

use super::{TrainingLoop, TrainingState};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::files::replace;
use crate::weights::{self, Floats, Weights};

impl<B: Backend> TrainingLoop<'_, B> {
    /// The file.
    pub(super) fn path(&self) -> Option<PathBuf> {
        self.work_dir.map(|dir| {
            dir.join(format!(
                "{}.checkpoint.safetensors",
                self.name.replace('/', "-")
            ))
        })
    }

    /// Writes it before a step.
    pub(super) fn save(&self, step: u64, state: &TrainingState<B>) -> Result<()> {
        let TrainingState {
            moments,
            best,
            skipped,
        } = state;
        let owners = self.owners();
        let writes = self.ranks.rank() == 0;
        let Some(path) = self.path().filter(|_| writes || owners.is_some()) else {
            return Ok(());
        };
        let mut all = Weights::new();
        for (at, held) in moments.iter().enumerate() {
            let both = self.moments_of(at, held.as_ref(), owners.as_deref())?;
            if !writes {
                continue;
            }
            let (name, p) = &self.params[at];
            for (kind, data) in ["m", "v"].into_iter().zip(both) {
                let shape = p.shape();
                all.insert(format!("{kind}.{name}"), Floats { shape, data });
            }
        }
        if !writes {
            return Ok(());
        }
        let mut put = |name: String, t: &B::Tensor| -> Result<()> {
            all.insert(
                name,
                Floats {
                    shape: B::shape(t),
                    data: B::to_floats(t)?,
                },
            );
            Ok(())
        };
        for (name, p) in self.params {
            put(format!("param.{name}"), p.value())?;
        }
        for (name, t) in self.ema.into_iter().flatten() {
            put(format!("ema.{name}"), t)?;
        }
        // f32 represents integers exactly only up to 2^24, so counters are stored as two halves.
        let halves = [step, skipped.all, skipped.in_a_row]
            .into_iter()
            .flat_map(|x| [(x >> 20) as f32, (x & 0xf_ffff) as f32]);
        all.insert(
            "step".into(),
            Floats {
                shape: vec![6],
                data: halves.collect(),
            },
        );
        let ranks = Floats {
            shape: vec![1],
            data: vec![self.ranks.size() as f32],
        };
        all.insert("ranks".into(), ranks);
        if let Some(kept) = self.kept {
            let data = kept.borrow().clone();
            let shape = vec![data.len()];
            all.insert("kept".into(), Floats { shape, data });
        }
        if let Some((figure, weights)) = best {
            let bits = figure.to_bits();
            let parts = (0..4)
                .map(|i| ((bits >> (16 * i)) & 0xffff) as f32)
                .collect();
            all.insert(
                "best".into(),
                Floats {
                    shape: vec![4],
                    data: parts,
                },
            );
            all.extend(
                weights
                    .iter()
                    .map(|(name, w)| (format!("best.{name}"), w.clone())),
            );
        }
        replace(&path, |partial| weights::write(partial, &all))
    }

    /// Loads the checkpoint. Returns the next step, and how many ranks made the previous ones.
    pub(super) fn restore(&self, state: &mut TrainingState<B>) -> Result<(u64, usize)> {
        let TrainingState {
            moments,
            best,
            skipped,
        } = state;
        let Some(path) = self.path() else {
            return Ok((0, self.ranks.size()));
        };
        let damaged =
            |message: &str| Error::data(&path, format!("{message}; delete it to start anew"));
        let all = found(&path, weights::read).map_err(|error| match error {
            Error::Data { message, .. } => damaged(&message),
            other => other,
        })?;
        let Some(all) = all else {
            return Ok((0, self.ranks.size()));
        };
        let unfit = |name: &str| {
            damaged(&format!(
                "the checkpoint has no {name} of the expected shape"
            ))
        };
        let put = |name: String, t: &B::Tensor| -> Result<()> {
            let shape = B::shape(t);
            let found = all
                .get(&name)
                .filter(|w| w.shape == shape)
                .ok_or_else(|| unfit(&name))?;
            B::assign_(t, &self.backend.floats(&found.data, &shape)?)
        };
        for ((name, p), state) in self.params.iter().zip(moments.iter()) {
            put(format!("param.{name}"), p.value())?;
            if let Some(state) = state {
                put(format!("m.{name}"), &state.m)?;
                put(format!("v.{name}"), &state.v)?;
            }
        }
        for (name, t) in self.ema.into_iter().flatten() {
            put(format!("ema.{name}"), t)?;
        }
        if let Some(kept) = self.kept {
            let mut kept = kept.borrow_mut();
            let found = all.get("kept").map(|found| &found.data);
            let found = found.filter(|found| found.len() == kept.len());
            kept.clone_from(found.ok_or_else(|| unfit("kept"))?);
        }
        if let Some(parts) = all.get("best") {
            let bits = parts
                .data
                .iter()
                .enumerate()
                .fold(0, |bits, (i, &p)| bits | (p as u64) << (16 * i));
            let weights = all
                .iter()
                .filter_map(|(name, w)| Some((name.strip_prefix("best.")?.to_owned(), w.clone())));
            *best = Some((f64::from_bits(bits), weights.collect()));
        }
        let counters = all
            .get("step")
            .filter(|s| s.data.len() == 6)
            .ok_or_else(|| unfit("step"))?;
        let counter =
            |i: usize| ((counters.data[2 * i] as u64) << 20) | counters.data[2 * i + 1] as u64;
        (skipped.all, skipped.in_a_row) = (counter(1), counter(2));
        // Older checkpoints do not have it.
        let ranks = all.get("ranks").and_then(|ranks| ranks.data.first());
        let ranks = ranks.map_or(self.ranks.size(), |ranks| *ranks as usize);
        Ok((counter(0), ranks))
    }
}

/// The contents of a checkpoint, if there is one. On a shared file system its handle, or its directory's, may be stale for a
/// moment. That must not count as absence, which would restart the training, nor as damage.
fn found(path: &Path, mut read: impl FnMut(&Path) -> Result<Weights>) -> Result<Option<Weights>> {
    let is_stale =
        |error: &Error| matches!(error, Error::Io { source, .. } if regular::is_stale(source));
    regular::patiently_where(is_stale, || {
        match path.try_exists().map_err(Error::io(path))? {
            true => read(path).map(Some),
            false => Ok(None),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_behind_a_stale_handle_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.checkpoint.safetensors");
        let stale = || std::io::Error::from(std::io::ErrorKind::StaleNetworkFileHandle);
        let mut tries = 0;
        let mut read = |path: &Path| {
            tries += 1;
            match tries {
                1 | 2 => Err(Error::io(path)(stale())),
                3 => Ok(Weights::new()),
                _ => Err(Error::io(path)(std::io::Error::other("broken"))),
            }
        };
        assert!(found(&path, &mut read).unwrap().is_none());
        std::fs::write(&path, "").unwrap();
        assert!(found(&path, &mut read).unwrap().is_some());
        assert!(found(&path, &mut read).is_err());
        assert_eq!(tries, 4, "what is broken is not tried again");
        // The file system's error kind is preserved when reading a tensor fails.
        let stale = retort_checkpoint::Error::Io(stale());
        let Error::Io { source, .. } = Error::checkpoint(&path)(stale) else {
            panic!("no error of the file system");
        };
        assert!(regular::is_stale(&source));
    }
}
