//! Taking over: matches slots without a job with elements that an earlier runner submitted.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use retort_abi::Part;
use tokio::time::Instant;

use super::slot::{self, Slot};
use super::{DispatchLoop, Job, unknown, watch};
use crate::cluster::slurm::{ElementStatus, Key, Layout};
use crate::cluster::spool::{self, Reader, SpoolError};
use crate::store::{ElementUpdate, JobKey, StoreError};

impl DispatchLoop {
    /// Matches slots without a job with elements that another runner submitted.
    pub(super) async fn adopt(&mut self) -> Result<(), StoreError> {
        let unclaimed = |job: &Job| {
            !job.over && job.slots.iter().all(Option::is_none) && job.given_up.contains(&false)
        };
        if !self.slots.iter().any(Slot::is_new) || !self.jobs.iter().any(unclaimed) {
            return Ok(());
        }
        let known = self.look_for_elements().await;
        let (mut taken, mut count) = (BTreeSet::new(), 0);
        let submitted = submitted(self.jobs.iter().map(|job| job.elements.as_slice()));
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            let places = submitted.get(&name(slot.part));
            let Some(places) = places.filter(|_| slot.is_new()) else {
                continue;
            };
            if let Some(key) = self.take_element(index, places, known.as_ref()).await? {
                taken.insert(key);
                count += 1;
            }
        }
        for key in taken {
            self.to.store.job_taken(key, self.to.attempt).await?;
        }
        if count > 0 {
            self.warn(format!(
                "{count} of {} elements were submitted before and are taken up",
                self.slots.len()
            ));
        }
        self.ask_at = Instant::now();
        self.end_useless_jobs().await?;
        // Before their successors are submitted.
        self.cancel_left().await;
        Ok(())
    }

    /// What Slurm says about the elements that slots without a job could take. None if it does not answer.
    async fn look_for_elements(&self) -> Option<HashMap<Key, ElementStatus>> {
        let asked = self.slots.iter().filter(|slot| slot.is_new());
        let asked: BTreeSet<_> = asked.map(|slot| name(slot.part)).collect();
        let wanted = |job: &Job, element: usize| {
            !job.over && !job.given_up[element] && asked.contains(&name(job.elements[element]))
        };
        let places: Vec<Key> = self
            .jobs
            .iter()
            .filter(|job| !job.results_only)
            .flat_map(|job| {
                let elements = (0..job.elements.len()).filter(|element| wanted(job, *element));
                elements.map(|element| (job.id, job.layout.element(element)))
            })
            .collect();
        let ids = self.open_jobs();
        let known = self.to.slurm.look_back(&ids, |known| {
            places.iter().any(|key| !known.contains_key(key))
        });
        known.await.ok()
    }

    /// Gives a slot the newest element that goes on or has a result, of these jobs and elements with its work. Returns the key
    /// of that element's job.
    async fn take_element(
        &mut self,
        index: usize,
        places: &[(usize, usize)],
        known: Option<&HashMap<Key, ElementStatus>>,
    ) -> Result<Option<JobKey>, StoreError> {
        for &(at, element) in places.iter().rev() {
            let job = &self.jobs[at];
            if job.slots[element].is_some() || job.over || job.given_up[element] {
                continue;
            }
            let dir = spool::element_dir(&job.dir, element);
            let own = dir.clone();
            let place = (job.id, job.layout.element(element));
            let said = known.map(|known| known.get(&place));
            let goes_on = said.is_none_or(|said| said.is_some_and(|said| !said.state.is_final()));
            let goes_on = goes_on && !job.results_only;
            let needed = job.needed_spools(element);
            // A spool may be long, and the file system may hang.
            let judged = move || {
                let mut needed = needed.iter();
                let worth = needed.try_fold(true, |all, dir| {
                    Ok::<_, SpoolError>(all && slot::is_worth_taking(dir, goes_on)?)
                });
                Ok::<_, SpoolError>((worth?, spool::releases(&own)))
            };
            let judged = tokio::task::spawn_blocking(judged).await;
            let judged = judged.map_err(|error| unknown(&dir, error))?;
            let (is_worth_taking, released) = judged.map_err(|error| unknown(&dir, error))?;
            let (key, mark, results_only) = (job.key, job.marks[element], job.results_only);
            if !is_worth_taking && results_only {
                match job.layout {
                    Layout::Ranks(_) => self.jobs[at].given_up.fill(true),
                    _ => self.jobs[at].given_up[element] = true,
                }
                continue;
            }
            if !is_worth_taking {
                // It ended while no runner was there.
                let reason = said.flatten().map(|said| watch::reason(said.state));
                let reason = reason.unwrap_or("gone from Slurm").to_owned();
                let reader = Reader::new(dir.clone());
                self.slots[index]
                    .read_out((key, element), reader, mark, &mut self.news)
                    .await
                    .map_err(|error| unknown(&dir, error))?;
                self.news
                    .push((key, element, ElementUpdate::Lost { reason }));
                self.jobs[at].given_up[element] = true;
                continue;
            }
            self.slots[index].wasted = job.wasted[element];
            self.slots[index].released = released;
            self.jobs[at].slots[element] = Some(index);
            self.slots[index].place((key, element), Reader::new(dir), mark);
            // Its records are there.
            self.slots[index].expected = results_only;
            // A runner must not leave before what follows them is submitted.
            self.slots[index].unsubmitted.set(results_only);
            return Ok(Some(key));
        }
        Ok(None)
    }

    /// Ends jobs that no slot has taken, with another number of parts or ended without a result: they would get in the way.
    async fn end_useless_jobs(&mut self) -> Result<(), StoreError> {
        let whole = self.slots.iter().all(|slot| slot.part.is_none());
        for job in &mut self.jobs {
            let of_parts = job.elements.iter().any(Option::is_some);
            if job.over
                || job.results_only
                || job.slots.iter().any(Option::is_some)
                || (of_parts == whole)
            {
                continue;
            }
            job.over = true;
            let _ = spool::ask_to_end(&job.dir);
            self.to_cancel.push(job.id);
            self.to.store.job_over(job.key).await?;
        }
        Ok(())
    }
}

/// What identifies a piece of work: which part of how many, or None for all of it.
fn name(part: Option<Part>) -> Option<(usize, usize)> {
    part.map(|part| (part.index, part.of))
}

/// Where each piece of work was submitted: jobs and the elements in them, in order. So taking over looks once at each element
/// of the earlier jobs, however many there are. It reads the spool of each that may have a result.
fn submitted<'a>(
    jobs: impl Iterator<Item = &'a [Option<Part>]>,
) -> BTreeMap<Option<(usize, usize)>, Vec<(usize, usize)>> {
    let mut found = BTreeMap::<_, Vec<_>>::new();
    for (job, elements) in jobs.enumerate() {
        for (element, part) in elements.iter().enumerate() {
            found.entry(name(*part)).or_default().push((job, element));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earlier_elements_are_found_by_their_work_oldest_first() {
        let part = |index| Some(Part { index, of: 3 });
        let jobs = [
            vec![part(0), part(1), part(2)],
            vec![None],
            vec![part(2), part(0)],
            vec![Some(Part { index: 2, of: 4 })],
        ];
        let found = submitted(jobs.iter().map(Vec::as_slice));
        assert_eq!(found[&Some((2, 3))], [(0, 2), (2, 0)]);
        assert_eq!(found[&Some((1, 3))], [(0, 1)]);
        assert_eq!(found[&None], [(1, 0)]);
        // Another number of parts is other work.
        assert_eq!(found[&Some((2, 4))], [(3, 0)]);
        assert_eq!(found.values().flatten().count(), 7);
    }
}
