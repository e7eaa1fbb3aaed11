//! Stages that make samples in shards (`trajectories` and `sample`): the list of shards, this process's share of them, and
//! the rest after an interruption.
//!
//! Finished shards stay in the work directory, so an interruption loses at most the open one. With n parts, each part of a
//! divided stage makes every n-th shard there, and the worker of the whole takes over all of them. Other machines make other
//! samples (`range`), and their folders are taken over (`parts`). Deliberately absent: what a sample is.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use retort_checkpoint::sample_shards::{MOST_SHARDS, Shard, cut, hash, joined};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::backend::Backend;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::files::replace;

/// A folder with a part of a stage's output.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(rename = "Part")]
pub struct PartDir(#[schemars(extend("x-retort-file" = "dir"))] pub String);

/// A stage's options about its samples.
pub struct SampleRange {
    /// Number of samples.
    pub count: u64,
    /// The samples to make; all, if left out.
    pub range: Option<[u64; 2]>,
    /// Samples per file.
    pub size: u64,
}

/// A shard of the result, and its existing file, if a part contains it.
pub struct PlannedShard {
    /// The shard, with its hash if a part has it.
    pub shard: Shard,
    /// The file.
    pub from: Option<PathBuf>,
}

impl SampleRange {
    /// Refuses an empty or invalid range, and more shards than a set may have.
    pub fn check(&self) -> Result<()> {
        match self.range {
            Some([start, end]) if start >= end || end > self.count => {
                let message = format!(
                    "range [{start}, {end}]: expected [start, end] with start < end, and end at most {}, the count",
                    self.count
                );
                Err(Error::option("/range", message))
            }
            _ => self.check_shards(),
        }
    }

    fn check_shards(&self) -> Result<()> {
        let samples = self.samples();
        let samples = samples.end - samples.start;
        let shards = samples.div_ceil(self.size.max(1));
        if shards <= MOST_SHARDS {
            return Ok(());
        }
        let message = format!(
            "{samples} samples in shards of {}: {shards} files, and a set has at most {MOST_SHARDS}; expected a `shard_size` of \
             at least {}",
            self.size,
            samples.div_ceil(MOST_SHARDS)
        );
        Err(Error::option("/shard_size", message))
    }

    /// The samples of the result.
    pub fn samples(&self) -> Range<u64> {
        let [start, end] = self.range.unwrap_or([0, self.count]);
        start..end
    }

    /// The largest actual batch, given the maximum batch size.
    pub fn at_once(&self, batch: usize) -> usize {
        let all = self.samples();
        let most = (all.end - all.start).min(self.size);
        usize::try_from(most).map_or(batch, |most| batch.min(most))
    }

    /// The shards of the result, in order, with existing files of parts.
    pub fn shards(&self, parts: Vec<(PathBuf, Vec<Shard>)>) -> Result<Vec<PlannedShard>> {
        let all = self.samples();
        let (mut shards, mut next) = (Vec::new(), all.start);
        let gap = |samples| cut(samples, self.size).map(|shard| PlannedShard { shard, from: None });
        for (dir, found) in joined(parts)? {
            let from = dir.join(&found.file);
            if found.start < all.start || found.end > all.end {
                let message = format!(
                    "{}: samples {}..{} lie beyond {}..{}",
                    from.display(),
                    found.start,
                    found.end,
                    all.start,
                    all.end
                );
                return Err(Error::option("/parts", message));
            }
            shards.extend(gap(next..found.start));
            next = found.end;
            let shard = Shard {
                hash: found.hash,
                ..Shard::of(found.start..found.end)
            };
            shards.push(PlannedShard {
                shard,
                from: Some(from),
            });
        }
        shards.extend(gap(next..all.end));
        Ok(shards)
    }
}

/// The progress of making shards, for the host.
pub struct ShardProgress<'a, 'b, B: Backend> {
    context: &'a Context<'b, B>,
    unit: &'static str,
    done: u64,
    total: u64,
    made: u64,
    clock: Instant,
}

impl<B: Backend> ShardProgress<'_, '_, B> {
    /// Ends the stage if it has been asked to stop; called before each batch.
    pub fn go_on(&self) -> Result<()> {
        self.context.go_on()
    }

    /// Adds this many finished samples.
    pub fn made(&mut self, samples: u64) {
        self.made += samples;
        self.done(samples);
    }

    fn done(&mut self, samples: u64) {
        self.done += samples;
        self.context.host.progress(self.done, self.total, self.unit);
    }
}

/// What a process wrote.
pub struct WrittenShards {
    /// Samples made by this process.
    pub samples: u64,
    /// Samples of its share, including existing ones.
    pub share: u64,
    /// The seconds it took.
    pub seconds: f64,
}

/// Makes the missing shards of this process's share in the work directory. `check` refuses a file with other samples than
/// those to be made; `make` writes a shard.
pub fn make<'b, B: Backend>(
    context: &Context<'b, B>,
    shards: &[PlannedShard],
    unit: &'static str,
    check: impl Fn(&Path, &Shard) -> Result<()>,
    mut make: impl FnMut(&Path, &Shard, &mut ShardProgress<'_, 'b, B>) -> Result<()>,
) -> Result<WrittenShards> {
    let work = context.work_dir()?;
    let own: Vec<&PlannedShard> = match context.job.part {
        None => shards.iter().collect(),
        Some(part) => {
            let open = shards.iter().filter(|planned| planned.from.is_none());
            let numbered = open.enumerate();
            numbered
                .filter_map(|(number, planned)| part.takes(number).then_some(planned))
                .collect()
        }
    };
    let total = own.iter().map(|p| p.shard.end - p.shard.start).sum();
    let mut progress = ShardProgress {
        context,
        unit,
        done: 0,
        total,
        made: 0,
        clock: Instant::now(),
    };
    // What is there already is reported at once: the first report shows what earlier processes have saved.
    let (mut made, mut missing) = (0, Vec::new());
    for planned in own {
        // Each is read.
        progress.go_on()?;
        let PlannedShard { shard, from } = planned;
        if from.is_none() && check(&work.join(&shard.file), shard).is_ok() {
            made += shard.end - shard.start;
        } else {
            missing.push(planned);
        }
    }
    // The total work of a divided stage is known once each part has reported its share.
    if made > 0 || context.job.part.is_some() {
        progress.done(made);
    }
    for PlannedShard { shard, from } in missing {
        let path = work.join(&shard.file);
        match from {
            Some(from) => {
                progress.go_on()?;
                check(from, shard)?;
                replace(&path, |partial| {
                    std::fs::copy(from, partial)
                        .map(drop)
                        .map_err(Error::io(from))
                })?;
                progress.done(shard.end - shard.start);
            }
            None => replace(&path, |partial| make(partial, shard, &mut progress))?,
        }
    }
    Ok(WrittenShards {
        samples: progress.made,
        share: total,
        seconds: progress.clock.elapsed().as_secs_f64(),
    })
}

/// Some samples in batches.
pub fn batches(samples: Range<u64>, size: usize) -> impl Iterator<Item = Range<u64>> {
    let Range { start, end } = samples;
    let starts = (start..end).step_by(size);
    starts.map(move |first| first..(first + size as u64).min(end))
}

/// The shards with the hashes of their files in a directory.
pub fn hashed(dir: &Path, shards: Vec<PlannedShard>) -> Result<Vec<Shard>> {
    shards
        .into_iter()
        .map(|PlannedShard { shard, .. }| {
            let hash = Some(hash(&dir.join(&shard.file))?);
            Ok(Shard { hash, ..shard })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_a_number_of_shards_that_its_manifest_can_list() {
        let check = |count, range, size, expected: Option<&str>| {
            let said = SampleRange { count, range, size }.check();
            let said = said.err().map(|error| error.to_string());
            match (expected, &said) {
                (None, None) => {}
                (Some(expected), Some(said)) => assert!(said.contains(expected), "{said}"),
                _ => panic!("{expected:?}: {said:?}"),
            }
        };
        check(100_000_000, None, 1000, None);
        check(u64::MAX, Some([0, 5]), 1, None);
        check(5_000_000_000, None, 10_000, Some("500000 files"));
        check(5_000_000_000, None, 10_000, Some("at least 50000"));
        check(5_000_000_000, None, 50_000, None);
        check(u64::MAX, None, 1, Some("at most 100000"));
        check(8, Some([5, 9]), 1, Some("end at most 8"));
    }
}
