//! Reads elements' spools, and asks Slurm about silent ones.

use std::collections::BTreeSet;

use retort_abi::LogLevel;
use tokio::time::Instant;

use super::slot::{Phase, Slot, StopRequest, too_often};
use super::{DispatchLoop, GATHER, Job};
use crate::cluster::slurm::{ElementStatus, Key, State, id};
use crate::cluster::spool::{self, Reader, Record, SpoolError, SpoolReading, StartEnd};
use crate::store::{ElementUpdate, JobKey, StoreError, Time};
use crate::worker::remote::ClusterEnd;

/// How often Slurm has to report an element as over if the element has not done so: its last records may be on their way.
const SETTLED: u32 = 3;
/// How many spools of queued elements are read although Slurm has not reported them as running.
const FEW: usize = 64;
/// How many elements Slurm is asked to start without delay, per poll.
const HURRY: usize = 32;
/// The most bytes of a job's output that are reported.
const LAST_WORDS: u64 = 2000;
/// The most bytes of spools that are read per round, of all elements and of one: records stay in memory until the run has
/// processed them.
const AT_ONCE: u64 = 32 << 20;
const OF_ONE: u64 = 8 << 20;

/// The records read from an element, and whether there may be more.
type Read = (usize, Reader, Vec<Record>, Result<bool, SpoolError>);

impl DispatchLoop {
    /// Reads elements' new records.
    pub(super) async fn hear(&mut self) -> Result<(), StoreError> {
        let queued = self
            .slots
            .iter()
            .filter(|slot| slot.phase == Phase::Queued && !slot.expected);
        let all = queued.count() <= FEW;
        let mut readers = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let heard = slot.is_heard() || (all && slot.phase == Phase::Queued);
            if heard && let Some(reader) = slot.reader.take() {
                readers.push((index, reader));
            }
        }
        if readers.is_empty() {
            return Ok(());
        }
        // A hanging file system must not stop the heartbeat.
        // The element that came last in the previous round comes first.
        let first = self.heard_from % readers.len();
        self.heard_from = self.heard_from.wrapping_add(1);
        readers.rotate_left(first);
        let read = tokio::task::spawn_blocking(move || read_some(readers, AT_ONCE));
        let read: Vec<Read> = read.await.unwrap_or_default();
        for (index, reader, records, result) in read {
            let slot = &mut self.slots[index];
            slot.reader = Some(reader);
            slot.take(records, &mut self.news).await;
            let key = slot.job;
            if slot.phase == Phase::Over {
                self.news
                    .extend(key.map(|(key, element)| (key, element, ElementUpdate::Over)));
                continue;
            }
            if matches!(result, Ok(true)) {
                // It is not silent: there is more to read.
                slot.absent = 0;
            }
            let broken = slot.broken.map(str::to_owned);
            let (message, damaged) = match (broken, result) {
                (Some(message), _) => (message, true),
                (None, Err(error)) => (
                    error.to_string(),
                    matches!(error, SpoolError::Damaged { .. }),
                ),
                (None, Ok(_)) => continue,
            };
            slot.why.clone_from(&message);
            if !damaged {
                continue;
            }
            // Nothing reads its spool any more, and it must not run at the same time as its successor.
            if let Some((job, element)) = self.key(&self.slots[index]) {
                if Instant::now() < self.cancel_at {
                    continue;
                }
                if let Err(error) = self.to.slurm.cancel(job, &[element], false).await {
                    self.is_not_cancelled(&error);
                    continue;
                }
            }
            let slot = &mut self.slots[index];
            slot.end(ClusterEnd {
                reason: "spool damaged".into(),
                message,
                hint: Some("`retort resume` submits what has no result again".into()),
            })
            .await;
        }
        self.explain().await;
        Ok(())
    }

    /// Asks Slurm, and decides about elements that have not reported an end. Returns whether to ask again soon.
    pub(super) async fn ask(&mut self) -> Result<bool, StoreError> {
        let at_work = |slot: &&Slot| slot.job.is_some() && slot.phase != Phase::Over;
        if !self.slots.iter().any(|slot| at_work(&slot)) {
            return Ok(false);
        }
        let ids = self.open_jobs();
        let place = |slot: &Slot| self.key(slot).filter(|_| slot.phase != Phase::Over);
        let places: Vec<Option<Key>> = self.slots.iter().map(place).collect();
        let known = self.to.slurm.look_back(&ids, |known| {
            places.iter().flatten().any(|key| !known.contains_key(key))
        });
        let known = match known.await {
            Ok(known) => known,
            Err(error) => {
                self.is_silent(&error);
                return Ok(false);
            }
        };
        if std::mem::replace(&mut self.silent, false) {
            self.warn("Slurm answers again");
        }
        let (mut hurried, mut released) = (0, BTreeSet::new());
        for (index, place) in places.into_iter().enumerate() {
            let Some(place) = place else { continue };
            let said = known.get(&place).cloned();
            let slot = &mut self.slots[index];
            match said {
                Some(said) if said.state == State::Pending && slot.is_held(&said.reason) => {
                    self.release_or_end(index, place, &said, &mut released)
                        .await;
                }
                Some(said) if said.state == State::Pending => {
                    if slot.start.is_some() && slot.phase == Phase::Running && slot.absent < 1 {
                        // Wait for one more poll: its last records may be on their way.
                        slot.absent += 1;
                        continue;
                    }
                    (slot.absent, slot.expected) = (0, false);
                    waits(slot, &said, &mut self.news);
                    // Slurm delays a restart by two minutes.
                    if !slot.hurried && said.reason == "BeginTime" && hurried < HURRY {
                        (slot.hurried, hurried) = (true, hurried + 1);
                        self.to.slurm.start_now(place.0, place.1).await;
                    }
                }
                Some(said) if said.state == State::Running => {
                    slot.absent = 0;
                    slot.expected = true;
                    slot.hurried = false;
                    advance(slot);
                }
                said => {
                    slot.expected = true;
                    if advance(slot) {
                        slot.absent = 0;
                        continue;
                    }
                    slot.absent += 1;
                    let unborn = slot.level > StopRequest::GoOn && slot.start.is_none();
                    if slot.absent >= SETTLED || unborn {
                        self.conclude(index, place, said).await;
                    }
                }
            }
        }
        self.explain().await;
        let unsettled = |slot: &Slot| slot.absent > 0 && slot.phase != Phase::Over;
        Ok(self.slots.iter().any(unsettled))
    }

    /// Releases an element that Slurm holds because it could not launch it, or ends it after too many releases. `released`:
    /// the places that were released in this round.
    async fn release_or_end(
        &mut self,
        index: usize,
        place: Key,
        said: &ElementStatus,
        released: &mut BTreeSet<Key>,
    ) {
        let slot = &mut self.slots[index];
        waits(slot, said, &mut self.news);
        if slot.released < self.to.profile.requeue {
            slot.released += 1;
            let held = format!(
                "Slurm could not launch it ({}); it is released",
                said.reason
            );
            slot.note(LogLevel::Warn, held).await;
            self.note_releases(index);
            // Ranks are one job.
            if released.insert(place) {
                self.to.slurm.release(place.0, place.1).await;
            }
            return;
        }
        if Instant::now() < self.cancel_at {
            return;
        }
        if let Err(error) = self.to.slurm.cancel(place.0, &[place.1], false).await {
            self.is_not_cancelled(&error);
            return;
        }
        let slot = &mut self.slots[index];
        slot.end(ClusterEnd {
            reason: "launch failed".into(),
            message: format!(
                "Slurm could not launch job {} ({}), after all restarts that `requeue` allows",
                id(place.0, place.1),
                said.reason
            ),
            hint: Some(
                "who runs the cluster sees why in the log of the node; `retort resume` tries again"
                    .into(),
            ),
        })
        .await;
        let over = |(key, element)| (key, element, ElementUpdate::Over);
        self.news.extend(slot.job.map(over));
    }

    /// Notes in its spool how often an element was released, for the runner that takes it over.
    pub(super) fn note_releases(&self, index: usize) {
        let slot = &self.slots[index];
        if let Some((key, element)) = slot.job
            && let Some(job) = self.job(key)
        {
            // Without the note, that runner may release it as often again.
            let _ = spool::note_releases(&spool::element_dir(&job.dir, element), slot.released);
        }
    }

    fn key(&self, slot: &Slot) -> Option<Key> {
        let (key, element) = slot.job?;
        let job = self.job(key)?;
        Some((job.id, job.layout.element(element)))
    }

    /// A job of this stage.
    pub(super) fn job(&self, key: JobKey) -> Option<&Job> {
        self.jobs.iter().find(|job| job.key == key)
    }

    /// Slurm has finished with an element that has not reported its end.
    async fn conclude(&mut self, index: usize, place: Key, said: Option<ElementStatus>) {
        let slot = &mut self.slots[index];
        let job = slot.job;
        let state = said.as_ref().map(|said| said.state);
        let node = said.map(|said| said.node).unwrap_or_default();
        let name = id(place.0, place.1);
        let at = match node.is_empty() {
            true => String::new(),
            false => format!(" on {node}"),
        };
        if slot.held.has_result() {
            slot.start_ended("succeeded", Time::now().0, &mut self.news);
            slot.deliver().await;
        } else if slot.level > StopRequest::GoOn
            && state.is_none_or(|state| state == State::Cancelled)
        {
            slot.start_ended("stopped", Time::now().0, &mut self.news);
            slot.killed().await;
        } else {
            let printed = self.printed(index);
            let wasted = self.wasted(index).await;
            let slot = &mut self.slots[index];
            let EndReason {
                reason,
                message,
                again,
            } = end_reason(slot, state, &name, &at, &printed);
            slot.start_ended(reason, Time::now().0, &mut self.news);
            let requeue = self.to.profile.requeue;
            if again && wasted <= requeue {
                slot.wasted = wasted;
                slot.note(LogLevel::Warn, format!("{message}; it is submitted again"))
                    .await;
                slot.again();
                slot.why = reason.to_owned();
                self.submit_at = Instant::now() + GATHER;
            } else if again && requeue > 0 {
                slot.end(too_often(&message)).await;
            } else {
                let hint = match state {
                    Some(State::OutOfMemory) => {
                        "set `memory` in retort.toml, or make batches smaller"
                    }
                    Some(State::Completed | State::Failed) if !again => {
                        "correct `prologue` and `sbatch` in retort.toml; what the job printed stands above"
                    }
                    _ => "`retort resume` submits what has no result again",
                };
                slot.end(ClusterEnd {
                    reason: reason.to_owned(),
                    message,
                    hint: Some(hint.to_owned()),
                })
                .await;
            }
        }
        if let Some((key, element)) = job {
            self.news.push((key, element, ElementUpdate::Over));
        }
    }

    /// How many starts of an element have been wasted in a row, in its present job and those before.
    async fn wasted(&self, index: usize) -> u32 {
        let slot = &self.slots[index];
        let job = slot
            .job
            .and_then(|(key, element)| Some((self.job(key)?, element)));
        let Some((job, element)) = job else {
            return slot.wasted;
        };
        let dir = spool::element_dir(&job.dir, element);
        let reporter = spool::element_dir(&job.dir, job.layout.reporter(element));
        let earlier = slot.wasted;
        // The file system may hang.
        let counted =
            tokio::task::spawn_blocking(move || spool::all_wasted_starts(&dir, &reporter, earlier));
        counted.await.unwrap_or(earlier)
    }

    /// The end of a job's own output: errors of its prologue and of Slurm.
    fn printed(&self, index: usize) -> String {
        let Some((key, element)) = self.slots[index].job else {
            return String::new();
        };
        let Some(job) = self.job(key) else {
            return String::new();
        };
        let script = job.layout.element(element).unwrap_or(0);
        let path = job.dir.join(format!("{script}.out"));
        let end = spool::printed(&path, LAST_WORDS).unwrap_or_default();
        let text = String::from_utf8_lossy(&end);
        match text.trim() {
            "" => String::new(),
            text => format!("; it printed:\n{text}"),
        }
    }
}

/// Why an element that has not reported its end is over: a short reason and a sentence; and whether the job may be
/// resubmitted.
struct EndReason {
    reason: &'static str,
    message: String,
    again: bool,
}

/// Why an element of job `name` ended, by its last `state` in Slurm. `at`: its node; `printed`: the job's output.
fn end_reason(slot: &Slot, state: Option<State>, name: &str, at: &str, printed: &str) -> EndReason {
    let said_why = matches!(
        slot.over,
        Some(StartEnd::TimeLimit { .. } | StartEnd::Again { .. })
    );
    let never_began = slot.start.is_none() && slot.over.is_none();
    let (reason, message, again) = match state {
        _ if said_why => (
            "not started again",
            format!("Slurm has not started job {name} again"),
            true,
        ),
        Some(State::Cancelled) => (
            "cancelled in Slurm",
            format!("somebody has cancelled job {name} in Slurm (scancel)"),
            false,
        ),
        Some(State::Timeout) => (
            "time limit",
            format!("job {name} reached its time limit{at}"),
            true,
        ),
        Some(State::NodeFailed) => (
            "node failed",
            format!("the node of job {name} failed{at}"),
            true,
        ),
        Some(State::Preempted) => ("preempted", format!("job {name} was preempted{at}"), true),
        Some(State::OutOfMemory) => (
            "out of memory in Slurm",
            format!("job {name} exceeded its memory limit{at}"),
            false,
        ),
        Some(State::Deadline) => (
            "deadline",
            format!("the deadline of job {name} has passed"),
            false,
        ),
        Some(State::Completed | State::Failed | State::Pending | State::Running) if never_began => {
            (
                "job failed",
                format!("job {name} ended before its worker began{at}{printed}"),
                false,
            )
        }
        Some(_) => (
            "died without reporting a reason",
            format!("job {name} ended{at}, and its worker gave no reason{printed}"),
            true,
        ),
        None => (
            "gone from Slurm",
            format!("Slurm no longer knows job {name}, whose worker reported no end"),
            true,
        ),
    };
    EndReason {
        reason,
        message,
        again,
    }
}

/// Reads elements' new records, in parts: once `room` bytes have been read, up to the end of a record, the other elements
/// wait for the next round.
fn read_some(readers: Vec<(usize, Reader)>, room: u64) -> Vec<Read> {
    let mut room = room;
    let mut read_one = |(index, mut reader): (usize, Reader)| -> Read {
        let mut records = Vec::new();
        let begun = reader.cost();
        let most = room.min(OF_ONE);
        let mut more = Ok(true);
        while matches!(more, Ok(true)) && reader.cost() - begun < most {
            more = reader
                .look(&mut records)
                .map(|seen| seen == SpoolReading::More);
        }
        room = room.saturating_sub(reader.cost() - begun);
        (index, reader, records, more)
    };
    readers.into_iter().map(&mut read_one).collect()
}

/// How a start ended that has not reported its end, by its state in Slurm.
pub(super) fn reason(state: State) -> &'static str {
    state.fault().unwrap_or("died without reporting a reason")
}

/// Goes on to the next start of an element, if that has begun. Returns whether it has.
fn advance(slot: &mut Slot) -> bool {
    slot.reader.as_mut().is_some_and(Reader::advance)
}

/// Handles an element that waits in Slurm's queue. If it was running, it has lost its node or was preempted.
fn waits(
    slot: &mut Slot,
    said: &ElementStatus,
    news: &mut Vec<(crate::store::JobKey, usize, ElementUpdate)>,
) {
    slot.lose_start(Time::now().0, true);
    slot.phase = Phase::Queued;
    if slot.why != said.reason {
        slot.why.clone_from(&said.reason);
        if let Some((key, element)) = slot.job {
            news.push((key, element, ElementUpdate::Queued(said.reason.clone())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::spool::{SpoolEvent, Writer};
    use crate::store::LogSource;

    #[test]
    fn a_look_at_many_spools_reads_a_part_and_the_next_one_goes_on() {
        let root = tempfile::tempdir().unwrap();
        let mut readers = Vec::new();
        for element in 0..4 {
            let dir = root.path().join(element.to_string());
            let mut writer = Writer::open(&dir).unwrap();
            for size in [3 << 20, 3 << 20, 10] {
                writer.push(SpoolEvent::Line {
                    source: LogSource::Stdout,
                    text: "x".repeat(size),
                });
            }
            writer.flush().unwrap();
            readers.push((element, Reader::new(dir)));
        }
        let mut looks = 0;
        let mut heard = [0; 4];
        while heard.iter().sum::<usize>() < 12 {
            let before: u64 = readers.iter().map(|(_, reader)| reader.cost()).sum();
            let read = read_some(readers, 4 << 20);
            readers = Vec::new();
            for (element, reader, records, result) in read {
                result.unwrap();
                heard[element] += records.len();
                readers.push((element, reader));
            }
            let after: u64 = readers.iter().map(|(_, reader)| reader.cost()).sum();
            // The limit may be exceeded by one record.
            assert!(
                after - before <= (4 << 20) + (4 << 20),
                "{}",
                after - before
            );
            readers.rotate_left(1);
            looks += 1;
            assert!(looks < 20, "{heard:?}");
        }
        assert_eq!(heard, [3; 4]);
        assert!(looks >= 4, "{looks}");
    }
}
