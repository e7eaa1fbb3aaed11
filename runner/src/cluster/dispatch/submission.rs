//! Submission: which elements become a job, its directory and its specification, and how to react when the queue is full or
//! Slurm does not answer.

use std::path::Path;
use std::time::Duration;

use retort_abi::Part;
use tokio::time::Instant;

use super::slot::{Phase, StopRequest};
use super::{DispatchEvent, DispatchLoop, Job, LOOK, RETRY, SETTLE, script};
use crate::cluster::slurm::{NewJob, Slurm, SlurmError};
use crate::cluster::spool::{self, JobSpec, Reader, SavedProgress};
use crate::store::StoreError;
use crate::worker::remote::ClusterEnd;

impl DispatchLoop {
    /// Submits elements without a job.
    pub(super) async fn submit(&mut self) -> Result<(), StoreError> {
        let new: Vec<usize> = (0..self.slots.len())
            .filter(|index| {
                let slot = &self.slots[*index];
                slot.phase == Phase::New && slot.level == StopRequest::GoOn
            })
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        // An undivided stage is not part of an array.
        let (mut parts, wholes): (Vec<usize>, Vec<usize>) = new
            .into_iter()
            .partition(|index| self.slots[*index].part.is_some());
        // Rank 0 comes first, because its node has the rendezvous.
        parts.sort_by_key(|index| self.slots[*index].part.map(|part| part.index));
        let Some(chunk) = self.chunk_of(&parts).await else {
            return Ok(());
        };
        let arrays = parts.chunks(chunk).map(<[usize]>::to_vec);
        let singles = wholes.into_iter().map(|index| vec![index]);
        for slots in arrays.chain(singles).collect::<Vec<_>>() {
            match self.submit_some(&slots).await? {
                Ok(()) => self.put_off = RETRY.0,
                Err(SlurmError::Full { said }) => {
                    self.full(&slots, &said);
                    return Ok(());
                }
                Err(error @ SlurmError::Silent { .. }) => {
                    self.is_silent(&error);
                    self.submit_at = Instant::now() + self.to.profile.poll;
                    return Ok(());
                }
                Err(error) => {
                    let hint = match &error {
                        SlurmError::Refused { hint, .. } => Some(format!(
                            "{hint} (in retort.toml or with --slurm; `retort doctor` shows what is set)"
                        )),
                        _ => None,
                    };
                    let ended = ClusterEnd {
                        reason: "not submitted".into(),
                        message: error.to_string(),
                        hint,
                    };
                    for index in slots {
                        self.slots[index].end(ended.clone()).await;
                    }
                }
            }
        }
        Ok(())
    }

    /// How many of these parts go into one job; None if they have to wait for others.
    async fn chunk_of(&mut self, parts: &[usize]) -> Option<usize> {
        if !self.to.together {
            let size = self.to.slurm.cluster().await.array_size;
            return Some(self.chunk.map_or(size, |chunk| chunk.min(size)));
        }
        // Ranks run at the same time or not at all: those to be resubmitted wait for the others.
        let all = self.slots.iter().filter(|slot| slot.part.is_some());
        let (over, others): (Vec<_>, Vec<_>) = all
            .filter(|slot| slot.phase != Phase::New)
            .partition(|slot| slot.phase == Phase::Over);
        let Some(part) = parts.first().and_then(|index| self.slots[*index].part) else {
            // An undivided stage has a job of one element.
            return Some(1);
        };
        if over.is_empty() && others.is_empty() && parts.len() >= part.of {
            return Some(parts.len());
        }
        if others.is_empty() && !over.is_empty() {
            for &index in parts {
                let ended = ClusterEnd {
                    reason: "not submitted again".into(),
                    message: "other workers of this training have ended, and one cannot go on without them".into(),
                    hint: Some("`retort resume` goes on from the last checkpoint with all of them".into()),
                };
                self.slots[index].end(ended).await;
            }
        }
        self.submit_at = Instant::now() + SETTLE;
        None
    }

    /// The queue is full: tries fewer elements at once, and tries again later.
    fn full(&mut self, slots: &[usize], said: &str) {
        if self.put_off == RETRY.0 {
            self.warn(format!(
                "Slurm's queue is full ({said}); trying again until there is room"
            ));
        }
        for &index in slots {
            self.slots[index].why = format!("the queue is full: {said}");
        }
        if slots.len() > 1 && !self.to.together {
            self.chunk = Some(slots.len().div_ceil(2));
        }
        self.submit_at = Instant::now() + self.put_off;
        self.put_off = (self.put_off * 2).min(RETRY.1);
    }

    pub(super) fn is_silent(&mut self, error: &SlurmError) {
        if !std::mem::replace(&mut self.silent, true) {
            self.warn(format!("{error}; trying again"));
        }
    }

    /// Submits a job for these slots.
    async fn submit_some(&mut self, slots: &[usize]) -> Result<Result<(), SlurmError>, StoreError> {
        self.submitted += 1;
        let name = format!(
            "retort-{}-{}-{}-{}",
            self.to.digest.get(..12).unwrap_or(&self.to.digest),
            self.to.attempt,
            std::process::id(),
            self.submitted
        );
        let dir = self.spools().join(&name);
        let script = dir.join("batch.sh");
        let spec = self.spec(slots, &name);
        if let Err(message) = self.make_spool(&dir, &script, &spec) {
            let ended = ClusterEnd {
                reason: "not submitted".into(),
                message: format!("the spool in {} cannot be made: {message}", dir.display()),
                hint: None,
            };
            for &index in slots {
                self.slots[index].end(ended.clone()).await;
            }
            return Ok(Ok(()));
        }
        self.pass_progress_on(slots, &dir);
        let to = &self.to;
        let layout = spec.layout();
        let key = to
            .store
            .begin_job(to.attempt, &to.digest, &name, layout.elements())
            .await?;
        let job = NewJob {
            name: &name,
            script: &script,
            spool: &dir,
            layout,
            cpus: to.cpus,
            profile: &to.profile,
        };
        let id = match submit(&to.slurm, &job).await {
            Ok(id) => id,
            Err(error) => {
                to.store.job_refused(key).await?;
                let _ = std::fs::remove_dir_all(&dir);
                return Ok(Err(error));
            }
        };
        let cluster = to.slurm.cluster().await.name;
        to.store.job_submitted(key, id, &cluster).await?;
        (to.listener)(DispatchEvent::Submitted {
            job: id,
            elements: layout.elements(),
        });
        for (element, &index) in slots.iter().enumerate() {
            let reader = Reader::new(spool::element_dir(&dir, element));
            self.slots[index].place((key, element), reader, 0);
        }
        self.jobs.push(Job {
            key,
            id,
            dir,
            layout,
            slots: slots.iter().copied().map(Some).collect(),
            wasted: spec.wasted,
            marks: vec![0; spec.elements.len()],
            given_up: vec![false; spec.elements.len()],
            elements: spec.elements,
            stopping: false,
            results_only: false,
            over: false,
        });
        for &index in slots
            .iter()
            .filter(|index| self.slots[**index].released > 0)
        {
            self.note_releases(index);
        }
        self.ask_at = self.ask_at.min(Instant::now() + Duration::from_secs(1));
        Ok(Ok(()))
    }

    /// The specification of a job of these slots.
    fn spec(&self, slots: &[usize], name: &str) -> JobSpec {
        let to = &self.to;
        let elements: Vec<Option<Part>> =
            slots.iter().map(|index| self.slots[*index].part).collect();
        JobSpec {
            format: spool::FORMAT,
            task: self.slots[slots[0]].task.clone(),
            threads: to.cpus,
            requeue: to.profile.requeue,
            wasted: slots
                .iter()
                .map(|index| self.slots[*index].wasted)
                .collect(),
            interval: LOOK
                .max(Duration::from_millis(5) * u32::try_from(elements.len()).unwrap_or(u32::MAX)),
            again: true,
            ranks: to.together && elements[0].is_some(),
            meeting: name.to_owned(),
            elements,
        }
    }

    /// Makes the directory of a job's spool, with its specification and its script. The error says what failed.
    fn make_spool(&self, dir: &Path, script: &Path, spec: &JobSpec) -> Result<(), String> {
        spool::make_dir(dir).map_err(|error| error.to_string())?;
        spool::write_job_spec(dir, spec).map_err(|error| error.to_string())?;
        spool::ask_to_stop(dir, false).map_err(|error| error.to_string())?;
        let text = script::text(dir, &self.to.profile, spec.layout())?;
        spool::put(script, text.as_bytes()).map_err(|error| error.to_string())
    }

    /// Tells the elements of a new job what these slots saved in their last ones.
    fn pass_progress_on(&self, slots: &[usize], dir: &Path) {
        for (element, &index) in slots.iter().enumerate() {
            if let Some(earlier) = &self.slots[index].earlier {
                // Without it, the first start counts as one that gets further.
                let _ = SavedProgress::pass_on(earlier, &spool::element_dir(dir, element));
            }
        }
    }
}

/// Submits a job, and returns its id.
async fn submit(slurm: &Slurm, job: &NewJob<'_>) -> Result<u64, SlurmError> {
    let taken = slurm.submit(job).await;
    // Slurm may have accepted it nevertheless.
    if matches!(
        taken,
        Err(SlurmError::Silent { .. } | SlurmError::Full { .. })
    ) && let Ok(Some(id)) = found(slurm, job.name).await
    {
        return Ok(id);
    }
    taken
}

/// The id of the job with a name, if there is one. Retries for a while if Slurm does not answer: a job that nobody knows
/// about would run at the same time as the next one.
pub(super) async fn found(slurm: &Slurm, name: &str) -> Result<Option<u64>, SlurmError> {
    const TRIES: usize = 15;
    for _ in 1..TRIES {
        if let Ok(found) = slurm.find(name).await {
            return Ok(found);
        }
        tokio::time::sleep(RETRY.0).await;
    }
    slurm.find(name).await
}
