//! Writing the metrics and the log of an attempt into the store, in batches, beside the attempt.
//!
//! In: points and lines, as fast as they come. Out: rows, four times a second. The queue is bounded: while there is no
//! [`room`](Recorder::room), workers are not read, and buffer their messages themselves. An unwritable store never disturbs
//! the stage: lost rows are counted and reported.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::frame::Points;
use crate::store::{
    AttemptId, Batch, JobKey, LogLine, LogSource, MetricPoint, ReadMark, Recording, Store,
    StoreError, Time,
};

/// How often rows are written; a killed runner loses at most this and the worker's buffer (0.1 s).
const INTERVAL: Duration = Duration::from_millis(250);
/// Maximum points in the queue or being written, 25 MB. At half of it workers are no longer read, which leaves room for
/// messages in transit; beyond it, which needs an unwritable store, new points are lost.
const MOST_POINTS: usize = 1 << 20;
/// The same for lines, in bytes.
const MOST_BYTES: usize = 32 << 20;
/// Maximum lines of one attempt in the store; a plugin that logs endlessly must not fill the disk.
const MOST_LINES: usize = 50_000;
/// Maximum series of one attempt, and of all its parts: each takes memory here and space in the history.
#[cfg(not(test))]
const MOST_SERIES: usize = 16_384;
#[cfg(test)]
const MOST_SERIES: usize = 200;
const MOST_SERIES_OF_PARTS: usize = 16 * MOST_SERIES;
/// How long the end of an attempt waits for the last rows.
const PATIENCE: Duration = Duration::from_secs(30);

/// Takes points and lines of one attempt.
#[derive(Debug)]
pub struct Recorder {
    shared: Arc<RecorderState>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct RecorderState {
    waiting: Mutex<Queue>,
    wake: Notify,
    hurry: Notify,
    /// Notified when there may be room again.
    freed: Notify,
    most: Backlog,
}

/// An amount of records.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Backlog {
    points: usize,
    /// Of lines.
    bytes: usize,
}

#[derive(Debug, Default)]
struct Queue {
    points: HashMap<String, Vec<MetricPoint>>,
    lines: Vec<LogLine>,
    lines_taken: usize,
    /// All series so far.
    series: HashSet<String>,
    /// Their names, without the numbers of parts.
    names: HashSet<String>,
    /// Whether there were too many of them.
    has_more_series: bool,
    /// What is waiting.
    amount: Backlog,
    /// Rows taken out for writing, and still in memory.
    writing: Backlog,
    /// Whether the last write failed: waiting for the store would be useless.
    stalled: bool,
    lost_points: usize,
    lost_lines: usize,
    /// The read positions of jobs' elements after the queue has been written.
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
        let most = Backlog {
            points: MOST_POINTS,
            bytes: MOST_BYTES,
        };
        Self::begin_within(most, store, attempt, warn)
    }

    fn begin_within(
        most: Backlog,
        store: Arc<Store>,
        attempt: AttemptId,
        warn: impl Fn(String) + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(RecorderState {
            most,
            ..RecorderState::default()
        });
        let task = tokio::spawn(write_rows(store, attempt, Arc::clone(&shared), warn));
        Self { shared, task }
    }

    /// Waits until the queue has room. Cancel-safe.
    pub async fn room(&self) {
        loop {
            let mut freed = std::pin::pin!(self.shared.freed.notified());
            // From here on no notification is missed.
            freed.as_mut().enable();
            if self.shared.has_room() {
                return;
            }
            self.shared.hurry.notify_one();
            freed.await;
        }
    }

    /// Whether it can.
    pub fn has_room(&self) -> bool {
        self.shared.has_room()
    }

    /// Records points, lines, and the read position of a job's element: they are written together.
    pub fn record(
        &self,
        points: impl IntoIterator<Item = Points>,
        lines: impl IntoIterator<Item = LogLine>,
        mark: Option<ReadMark>,
    ) {
        let most = self.shared.most;
        let mut waiting = self.shared.waiting();
        for batch in points {
            waiting.take_points(batch, most.points);
        }
        for line in lines {
            waiting.take_line(line, most.bytes);
        }
        if let Some(mark) = mark {
            waiting.marks.insert((mark.job, mark.element), mark.number);
        }
        drop(waiting);
        self.shared.wake.notify_one();
    }

    /// Records points.
    #[cfg(test)]
    pub fn points(&self, batches: impl IntoIterator<Item = Points>) {
        self.record(batches, [], None);
    }

    /// Records a line.
    pub fn line(&self, line: LogLine) {
        self.record([], [line], None);
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

impl Queue {
    fn take_points(&mut self, batch: Points, most: usize) {
        if !self.admits(&batch.series) {
            return;
        }
        let held = self.amount.points + self.writing.points;
        let taken = most.saturating_sub(held).min(batch.steps.len());
        self.lost_points += batch.steps.len() - taken;
        self.amount.points += taken;
        let columns = batch.steps.iter().zip(&batch.values).zip(&batch.at);
        let points = columns
            .take(taken)
            .map(|((&step, &value), &at)| MetricPoint {
                step,
                value,
                at: Time(at),
            });
        self.points.entry(batch.series).or_default().extend(points);
    }

    fn take_line(&mut self, line: LogLine, most: usize) {
        self.lines_taken += 1;
        match self.lines_taken {
            taken if taken <= MOST_LINES => {
                let held = self.amount.bytes + self.writing.bytes;
                if held + size(&line) > most {
                    self.lost_lines += 1;
                } else {
                    self.amount.bytes += size(&line);
                    self.lines.push(line);
                }
            }
            taken if taken == MOST_LINES + 1 => {
                let text = format!("more than {MOST_LINES} lines: the rest is dropped");
                self.lines.push(LogLine {
                    at: line.at,
                    level: 2,
                    source: LogSource::Runner,
                    text,
                });
            }
            _ => {}
        }
    }

    /// Whether there is room for points of a series.
    fn admits(&mut self, series: &str) -> bool {
        if self.series.contains(series) {
            return true;
        }
        let name = series
            .rsplit_once("/part-")
            .map_or(series, |(name, _)| name);
        let has_name = self.names.contains(name);
        if (has_name || self.names.len() < MOST_SERIES) && self.series.len() < MOST_SERIES_OF_PARTS
        {
            if !has_name {
                self.names.insert(name.to_owned());
            }
            return self.series.insert(series.to_owned());
        }
        if !std::mem::replace(&mut self.has_more_series, true) {
            let text = format!("more than {MOST_SERIES} series: points of the others are dropped");
            self.lines
                .push(LogLine::of_runner(retort_abi::LogLevel::Warn, text));
        }
        false
    }

    fn is_empty(&self) -> bool {
        self.points.is_empty() && self.lines.is_empty() && self.marks.is_empty()
    }
}

impl RecorderState {
    /// No holder of this lock panics midway.
    fn waiting(&self) -> MutexGuard<'_, Queue> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether to read workers: half of the capacity is reserved for messages in transit.
    fn has_room(&self) -> bool {
        let waiting = self.waiting();
        let (amount, writing) = (waiting.amount, waiting.writing);
        waiting.stalled
            || waiting.closing
            || (amount.points + writing.points < self.most.points.div_ceil(2)
                && amount.bytes + writing.bytes < self.most.bytes.div_ceil(2))
    }

    /// Takes out the queue for writing.
    fn take(&self) -> Queue {
        let mut waiting = self.waiting();
        waiting.writing = std::mem::take(&mut waiting.amount);
        Queue {
            points: std::mem::take(&mut waiting.points),
            lines: std::mem::take(&mut waiting.lines),
            amount: waiting.writing,
            lost_points: std::mem::take(&mut waiting.lost_points),
            lost_lines: std::mem::take(&mut waiting.lost_lines),
            marks: std::mem::take(&mut waiting.marks),
            lines_taken: waiting.lines_taken,
            closing: waiting.closing,
            ..Queue::default()
        }
    }

    /// Releases the rows taken out; `stalled`: because the store could not be written to.
    fn let_go(&self, stalled: bool) {
        let mut waiting = self.waiting();
        waiting.writing = Backlog::default();
        waiting.stalled = stalled;
        drop(waiting);
        self.freed.notify_waiters();
    }
}

/// What a line takes.
fn size(line: &LogLine) -> usize {
    line.text.len() + size_of::<LogLine>()
}

async fn write_rows(
    store: Arc<Store>,
    attempt: AttemptId,
    shared: Arc<RecorderState>,
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
    let (mut lost_points, mut lost_lines) = (0, 0);
    loop {
        shared.wake.notified().await;
        let batch = shared.take();
        lost_points += batch.lost_points;
        lost_lines += batch.lost_lines;
        for (count, all, what) in [
            (batch.lost_points, "metrics", "points"),
            (batch.lost_lines, "the log", "lines"),
        ] {
            if count > 0 {
                let why = format!("{count} {what} came while the store could not be written to");
                complain(all, why);
            }
        }
        let recording = Recording {
            points: batch.points.into_iter().map(Batch::from).collect(),
            lines: batch.lines,
            marks: marks(batch.marks),
        };
        let left = match recording.is_empty() {
            true => None,
            false => write_together(&store, attempt, recording, &mut complain).await,
        };
        // Before notifying about room.
        let kept = left.is_none();
        if let Some(recording) = left {
            give_back_marks(&shared, &recording.marks);
            give_back(&shared, recording.points, batch.amount.points);
            give_back_lines(&shared, recording.lines);
        }
        shared.let_go(!kept);
        if batch.closing {
            // Returned rows are retried as long as the end of the attempt waits.
            if shared.waiting().is_empty() {
                break;
            }
            shared.wake.notify_one();
            tokio::time::sleep(INTERVAL).await;
            continue;
        }
        let _ = tokio::time::timeout(INTERVAL, shared.hurry.notified()).await;
    }
    for (count, what) in [(lost_points, "metric points"), (lost_lines, "log lines")] {
        if count > 0 {
            let text = format!(
                "{count} {what} are lost: they came while the store could not be written to"
            );
            let line = LogLine::of_runner(retort_abi::LogLevel::Warn, text);
            if let Err(error) = store.append_log(attempt, &[line]).await {
                complain("what was lost", error.to_string());
            }
        }
    }
}

/// Writes rows together. Returns those to retry.
async fn write_together(
    store: &Store,
    attempt: AttemptId,
    mut recording: Recording,
    complain: &mut impl FnMut(&str, String),
) -> Option<Recording> {
    loop {
        let error = match store.record(attempt, &recording).await {
            Ok(()) => return None,
            Err(error) => error,
        };
        let what = match (recording.points.is_empty(), recording.lines.is_empty()) {
            (false, _) => "metrics",
            (true, false) => "the log",
            (true, true) => "how far jobs were heard",
        };
        complain(what, error.to_string());
        if is_for_a_moment(&error) {
            return Some(recording);
        }
        // Points that the store refuses are lost; the log may still be writable.
        if recording.points.is_empty() || recording.lines.is_empty() {
            return None;
        }
        recording.points.clear();
    }
}

fn marks(marks: HashMap<(JobKey, usize), u64>) -> Vec<ReadMark> {
    let marks = marks.into_iter();
    let marks = marks.map(|((job, element), number)| ReadMark {
        job,
        element,
        number,
    });
    marks.collect()
}

/// Unwritten marks are written with the next batch, unless there are newer ones.
fn give_back_marks(shared: &RecorderState, marks: &[ReadMark]) {
    let mut waiting = shared.waiting();
    for mark in marks {
        let place = waiting.marks.entry((mark.job, mark.element));
        place.or_insert(mark.number);
    }
}

/// Whether to retry: another writer was active, or the disk was full.
fn is_for_a_moment(error: &StoreError) -> bool {
    matches!(error, StoreError::Busy | StoreError::Full)
}

/// Unwritten points are written with the next batch, if there is room.
fn give_back(shared: &RecorderState, batches: Vec<Batch>, count: usize) {
    let mut waiting = shared.waiting();
    if waiting.amount.points + count > shared.most.points {
        waiting.lost_points += count;
        return;
    }
    waiting.amount.points += count;
    for Batch { series, mut points } in batches {
        let newer = waiting.points.entry(series).or_default();
        points.append(newer);
        *newer = points;
    }
}

/// The same for lines.
fn give_back_lines(shared: &RecorderState, lines: Vec<LogLine>) {
    let mut waiting = shared.waiting();
    let bytes: usize = lines.iter().map(size).sum();
    if waiting.amount.bytes + bytes > shared.most.bytes {
        waiting.lost_lines += lines.len();
        return;
    }
    waiting.amount.bytes += bytes;
    waiting.lines.splice(..0, lines);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Axis;
    use crate::store::tests::{begin, open};

    const MOST: Backlog = Backlog {
        points: 8000,
        bytes: 100_000,
    };

    fn frame(first: u64) -> Points {
        Points {
            series: "loss".into(),
            steps: (first..first + 1000).collect(),
            values: vec![0.5; 1000],
            at: vec![7; 1000],
        }
    }

    fn line(length: usize) -> LogLine {
        LogLine::of_runner(retort_abi::LogLevel::Info, "x".repeat(length))
    }

    #[tokio::test]
    async fn of_series_without_number_some_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(open(dir.path()).await);
        let (run, _, attempt) = begin(&store, "digits", "d").await;
        let recorder = Recorder::begin(Arc::clone(&store), attempt, |what| panic!("{what}"));
        let of = |number: usize| Points {
            series: format!("s{number}"),
            steps: vec![1],
            values: vec![0.5],
            at: vec![7],
        };
        for _ in 0..2 {
            recorder.points((0..MOST_SERIES + 100).map(of));
        }
        // Those of parts share a name.
        let of_part = |part: usize| Points {
            series: format!("s0/part-{part}"),
            ..of(0)
        };
        recorder.points((1..=50).map(of_part));
        recorder.end().await;
        let series = store.last_metrics(&run).await.unwrap();
        assert_eq!(series.len(), MOST_SERIES + 50);
        let log: Vec<String> = sqlx::query_scalar("select text from logs")
            .fetch_all(store.pool())
            .await
            .unwrap();
        assert!(
            log.len() == 1 && log[0].contains("more than 200 series"),
            "{log:?}"
        );
    }

    /// A lock that another process might hold.
    async fn locked(store: &Store) -> sqlx::SqliteConnection {
        use sqlx::Connection;
        let path = store.dir().join("history.db");
        let address = format!("sqlite://{}", path.display());
        let mut other = sqlx::SqliteConnection::connect(&address).await.unwrap();
        sqlx::query("begin immediate")
            .execute(&mut other)
            .await
            .unwrap();
        other
    }

    #[tokio::test]
    async fn who_is_faster_than_the_store_is_held_back_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(open(dir.path()).await);
        let (run, _, attempt) = begin(&store, "digits", "d").await;
        let recorder =
            Recorder::begin_within(MOST, Arc::clone(&store), attempt, |what| panic!("{what}"));
        let mut lock = locked(&store).await;
        let mut feed = Box::pin(async {
            for frame_number in 0..30 {
                recorder.room().await;
                recorder.points([frame(frame_number * 1000)]);
                recorder.room().await;
                recorder.line(line(5000));
            }
        });
        let held_back = tokio::time::timeout(Duration::from_millis(400), &mut feed).await;
        assert!(held_back.is_err(), "nobody could have written so much");
        {
            let waiting = recorder.shared.waiting();
            let held = waiting.amount.points + waiting.writing.points;
            assert!((4000..=5000).contains(&held), "{held} points");
        }
        sqlx::query("rollback").execute(&mut lock).await.unwrap();
        feed.as_mut().await;
        drop(feed);
        recorder.end().await;
        assert_eq!(store.log(attempt).await.unwrap().len(), 30);
        let whole = crate::store::CurveQuery {
            buckets: 1,
            axis: Axis::Step,
            from: 0,
            to: u64::MAX,
        };
        let curve = store.curve(&run, "loss", whole).await.unwrap();
        assert_eq!(
            curve.iter().map(|bucket| bucket.points).sum::<u64>(),
            30_000
        );
    }

    #[tokio::test]
    async fn what_a_store_that_takes_nothing_costs_is_bounded_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(open(dir.path()).await);
        let (_, _, attempt) = begin(&store, "digits", "d").await;
        let recorder = Recorder::begin_within(MOST, Arc::clone(&store), attempt, |_| {});
        // As after a failed write; nothing is awaited, so nothing is written meanwhile.
        recorder.shared.let_go(true);
        for number in 0..20 {
            assert!(recorder.shared.has_room(), "nobody waits for nothing");
            recorder.points([frame(number * 1000)]);
            recorder.line(line(9_500));
        }
        {
            let waiting = recorder.shared.waiting();
            assert_eq!((waiting.amount.points, waiting.lost_points), (8000, 12_000));
            assert_eq!((waiting.lines.len(), waiting.lost_lines), (10, 10));
            assert!(waiting.amount.bytes <= MOST.bytes);
        }
        recorder.end().await;
        let log = store.log(attempt).await.unwrap();
        let told: Vec<&str> = log[10..].iter().map(|line| line.text.as_str()).collect();
        assert_eq!(
            told,
            [
                "12000 metric points are lost: they came while the store could not be written to",
                "10 log lines are lost: they came while the store could not be written to"
            ]
        );
    }

    #[tokio::test]
    async fn what_is_written_and_how_far_a_job_was_heard_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(open(dir.path()).await);
        for round in 0..30_u64 {
            let (run, _, attempt) = begin(&store, "digits", &format!("d{round}")).await;
            let name = format!("job-{round}");
            let job = store.begin_job(attempt, &name, &name, None).await.unwrap();
            let recorder = Recorder::begin(Arc::clone(&store), attempt, |what| panic!("{what}"));
            for number in 0..200 {
                let points = Points {
                    series: "loss".into(),
                    steps: vec![number],
                    values: vec![0.5],
                    at: vec![7],
                };
                let mark = ReadMark {
                    job,
                    element: 0,
                    number: number + 1,
                };
                recorder.record([points], [line(10)], Some(mark));
                recorder.shared.hurry.notify_one();
                tokio::time::sleep(Duration::from_micros(37 * round)).await;
            }
            // Killed, at any moment.
            drop(recorder);
            // What was on its way to the disk is there, or is not; when it comes between two looks, they are taken again.
            let heard = async || store.open_jobs(&name).await.unwrap()[0].imported[0].1;
            let mut before = heard().await;
            loop {
                let series = store.last_metrics(&run).await.unwrap();
                let points = series.first().map_or(0, |series| series.points);
                let lines = store.log(attempt).await.unwrap().len() as u64;
                let after = heard().await;
                if before == after {
                    assert_eq!((points, lines), (after, after), "round {round}");
                    break;
                }
                before = after;
            }
        }
    }

    #[test]
    fn what_was_not_written_comes_first_again_or_is_counted() {
        let shared = RecorderState {
            most: MOST,
            ..RecorderState::default()
        };
        let batch = |step: u64| Batch {
            series: "loss".into(),
            points: vec![MetricPoint {
                step,
                value: 0.5,
                at: Time(1),
            }],
        };
        shared
            .waiting()
            .points
            .insert("loss".into(), batch(2).points);
        shared.waiting().amount.points = 7999;
        give_back(&shared, vec![batch(1)], 1);
        let steps: Vec<u64> = shared.waiting().points["loss"]
            .iter()
            .map(|point| point.step)
            .collect();
        assert_eq!(steps, [1, 2]);
        give_back(&shared, vec![batch(0)], 1);
        give_back_lines(&shared, vec![line(200_000)]);
        let waiting = shared.waiting();
        assert_eq!((waiting.lost_points, waiting.lost_lines), (1, 1));
        assert_eq!(
            waiting.amount,
            Backlog {
                points: 8000,
                bytes: 0
            }
        );
    }
}
