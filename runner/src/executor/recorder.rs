//! Writing the metrics and the log of an attempt into the store, in batches, beside the attempt.
//!
//! In: points and lines, as fast as they come. Out: rows, four times a second. A store that cannot take them never
//! disturbs the stage: what waits is bounded, what is lost is counted and told.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::frame::Points;
use crate::store::{
    AttemptId, Batch, JobKey, LogLine, LogSource, MetricPoint, Store, StoreError, Time,
};

/// How often rows are written; a kill of the runner loses at most this and what the worker holds back (0.1 s).
const INTERVAL: Duration = Duration::from_millis(250);
/// Points that may wait, as many as in the worker; beyond, new ones are lost.
const MOST_POINTS: usize = 1 << 22;
/// Lines that one attempt may have in the store; a plugin that talks without end must not fill the disk.
const MOST_LINES: usize = 50_000;
/// How long the end of an attempt waits for the last rows.
const PATIENCE: Duration = Duration::from_secs(30);

/// Takes points and lines of one attempt.
#[derive(Debug)]
pub struct Recorder {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    wake: Notify,
    hurry: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    points: HashMap<String, Vec<MetricPoint>>,
    /// How many points there are in all.
    count: usize,
    lines: Vec<LogLine>,
    lines_taken: usize,
    lost_points: usize,
    /// How far elements of jobs have been heard when what came before has been written.
    marks: HashMap<(JobKey, usize), u64>,
    closing: bool,
}

impl Recorder {
    /// Begins to record for an attempt. `warn` is told, once, when rows cannot be written.
    pub fn begin(
        store: Arc<Store>,
        attempt: AttemptId,
        warn: impl Fn(String) + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let task = tokio::spawn(write_rows(store, attempt, Arc::clone(&shared), warn));
        Self { shared, task }
    }

    /// Records points.
    pub fn points(&self, batches: impl IntoIterator<Item = Points>) {
        let mut waiting = self.shared.waiting();
        for batch in batches {
            let room = MOST_POINTS.saturating_sub(waiting.count);
            let taken = room.min(batch.steps.len());
            waiting.lost_points += batch.steps.len() - taken;
            waiting.count += taken;
            let columns = batch.steps.iter().zip(&batch.values).zip(&batch.at);
            let points = columns
                .take(taken)
                .map(|((&step, &value), &at)| MetricPoint {
                    step,
                    value,
                    at: Time(at),
                });
            waiting
                .points
                .entry(batch.series)
                .or_default()
                .extend(points);
        }
        drop(waiting);
        self.shared.wake.notify_one();
    }

    /// Records a line.
    pub fn line(&self, line: LogLine) {
        let mut waiting = self.shared.waiting();
        waiting.lines_taken += 1;
        match waiting.lines_taken {
            taken if taken <= MOST_LINES => waiting.lines.push(line),
            taken if taken == MOST_LINES + 1 => {
                let text = format!("more than {MOST_LINES} lines: what follows is not kept");
                waiting.lines.push(LogLine {
                    at: line.at,
                    level: 2,
                    source: LogSource::Runner,
                    text,
                });
            }
            _ => {}
        }
        drop(waiting);
        self.shared.wake.notify_one();
    }

    /// Notes how far an element of a job has been heard, once everything before has been written.
    pub fn mark(&self, job: JobKey, element: usize, number: u64) {
        self.shared.waiting().marks.insert((job, element), number);
        self.shared.wake.notify_one();
    }

    /// Writes what still waits.
    pub async fn end(mut self) {
        self.shared.waiting().closing = true;
        self.shared.wake.notify_one();
        self.shared.hurry.notify_one();
        let _ = tokio::time::timeout(PATIENCE, &mut self.task).await;
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.points.is_empty() && self.lines.is_empty()
    }
}

impl Shared {
    /// Nothing that holds this lock panics half-way.
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Waiting {
        let mut waiting = self.waiting();
        Waiting {
            points: std::mem::take(&mut waiting.points),
            count: std::mem::take(&mut waiting.count),
            lines: std::mem::take(&mut waiting.lines),
            lost_points: std::mem::take(&mut waiting.lost_points),
            marks: std::mem::take(&mut waiting.marks),
            lines_taken: waiting.lines_taken,
            closing: waiting.closing,
        }
    }
}

async fn write_rows(
    store: Arc<Store>,
    attempt: AttemptId,
    shared: Arc<Shared>,
    warn: impl Fn(String) + Send + Sync,
) {
    let mut warned = false;
    let mut complain = |what: &str, error: String| {
        if !std::mem::replace(&mut warned, true) {
            warn(format!(
                "{what} cannot be recorded (the stage goes on): {error}"
            ));
        }
    };
    loop {
        shared.wake.notified().await;
        let batch = shared.take();
        // Whether what came before the marks has been written, or is lost.
        let mut kept = true;
        if batch.lost_points > 0 {
            complain(
                "metrics",
                format!(
                    "{} points came faster than they could be written",
                    batch.lost_points
                ),
            );
        }
        let points: Vec<Batch> = batch.points.into_iter().map(Batch::from).collect();
        if !points.is_empty()
            && let Err(error) = store.append_metrics(attempt, &points).await
        {
            complain("metrics", error.to_string());
            if is_for_a_moment(&error) {
                kept = false;
                give_back(&shared, points, batch.count);
            }
        }
        if !batch.lines.is_empty()
            && let Err(error) = store.append_log(attempt, &batch.lines).await
        {
            complain("the log", error.to_string());
            if is_for_a_moment(&error) {
                kept = false;
                shared.waiting().lines.splice(..0, batch.lines);
            }
        }
        if !kept {
            let mut waiting = shared.waiting();
            for (element, number) in batch.marks {
                waiting.marks.entry(element).or_insert(number);
            }
        } else if !batch.marks.is_empty() {
            let marks = batch.marks.into_iter();
            let marks = marks.map(|((job, element), number)| (job, element, number));
            if let Err(error) = store.note_imported(marks).await {
                tracing::debug!("marks: {error}");
            }
        }
        if batch.closing {
            // What was given back is tried again, for as long as the end of the attempt waits.
            if shared.waiting().is_empty() {
                return;
            }
            shared.wake.notify_one();
            tokio::time::sleep(INTERVAL).await;
            continue;
        }
        let _ = tokio::time::timeout(INTERVAL, shared.hurry.notified()).await;
    }
}

/// Whether the next batch may have more luck: another writer was at work, or the disk was full.
fn is_for_a_moment(error: &StoreError) -> bool {
    matches!(error, StoreError::Busy | StoreError::Full)
}

/// Points that could not be written are written with the next batch.
fn give_back(shared: &Shared, batches: Vec<Batch>, count: usize) {
    let mut waiting = shared.waiting();
    if waiting.count + count <= MOST_POINTS {
        waiting.count += count;
        for Batch { series, mut points } in batches {
            let newer = waiting.points.entry(series).or_default();
            points.append(newer);
            *newer = points;
        }
    }
}

/// A line said by the runner itself.
pub fn own_line(level: retort_abi::LogLevel, text: impl Into<String>) -> LogLine {
    LogLine {
        at: Time::now(),
        level: level as u32,
        source: LogSource::Runner,
        text: text.into(),
    }
}
