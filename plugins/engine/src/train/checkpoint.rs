//! What an interruption leaves: parameters, moments, averages and the best weights so far, in one file.

use std::path::PathBuf;

use super::{State, TrainingLoop};
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
    pub(super) fn save(&self, step: u64, state: &State<B>) -> Result<()> {
        let State {
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
        // f32 holds whole numbers exactly up to 2^24 only: the counters travel as two halves.
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

    /// Takes up the checkpoint and returns the next step.
    pub(super) fn restore(&self, state: &mut State<B>) -> Result<u64> {
        let State {
            moments,
            best,
            skipped,
        } = state;
        let Some(path) = self.path().filter(|p| p.exists()) else {
            return Ok(0);
        };
        let damaged =
            |message: &str| Error::data(&path, format!("{message}; delete it to start anew"));
        let all = weights::read(&path).map_err(|error| match error {
            Error::Data { message, .. } => damaged(&message),
            other => other,
        })?;
        let unfit = |name: &str| damaged(&format!("checkpoint without a fitting {name}"));
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
        Ok(counter(0))
    }
}
