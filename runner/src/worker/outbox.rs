//! A worker's messages to its runner: points, lines and progress are queued, so that no call of a stage blocks.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use retort_abi::{Failure, FailureCode, LogLevel};

use super::lock;
use crate::frame::{self, FromWorker, Line, Points, Progress};
use crate::store::Time;

/// How often metrics, log lines and progress are sent.
const INTERVAL: Duration = Duration::from_millis(100);

/// Most points and lines of one frame: far below the size limit of a frame.
const BATCH: usize = 8192;

/// Frames of metric points kept while the runner does not read: four million points, 100 MB. Beyond that the oldest are
/// dropped.
const MOST_PARCELS: usize = 512;

/// Log lines kept while the runner does not read, and their bytes. Beyond that new ones are dropped.
const MOST_LINES: usize = 1 << 16;
const MOST_LINE_BYTES: usize = 32 << 20;
/// Most bytes of lines of one frame. JSON may make them six times as long.
const LINES_OF_A_FRAME: usize = 4 << 20;

/// Longest log line, in bytes.
pub const LONGEST_LINE: usize = 16 << 10;

/// The messages waiting to be sent to the runner.
pub(super) struct Outbox {
    socket: Mutex<UnixStream>,
    pending: Mutex<Pending>,
    wake: Condvar,
}

#[derive(Default)]
struct Pending {
    batches: VecDeque<PointBatch>,
    lines: Vec<Line>,
    line_bytes: usize,
    progress: Option<Progress>,
    lost_points: u64,
    lost_lines: u64,
}

/// Points of one frame, grouped by series as they come. So a stage's call costs one look-up and three numbers, however many
/// points are pending.
#[derive(Debug, Default)]
struct PointBatch {
    series: Vec<Points>,
    places: HashMap<String, usize>,
    count: usize,
}

impl PointBatch {
    fn add(&mut self, series: &str, step: u64, value: f64, at: i64) {
        let place = match self.places.get(series) {
            Some(&place) => place,
            None => {
                self.places.insert(series.to_owned(), self.series.len());
                self.series.push(Points {
                    series: series.to_owned(),
                    ..Points::default()
                });
                self.series.len() - 1
            }
        };
        let points = &mut self.series[place];
        points.steps.push(step);
        points.values.push(value);
        points.at.push(at);
        self.count += 1;
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.lines.is_empty() && self.progress.is_none()
    }
}

impl Outbox {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket: Mutex::new(socket),
            pending: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    /// Sends pending messages, at most every [`INTERVAL`]; runs on its own thread.
    pub(super) fn pump(&self) -> ! {
        loop {
            let pending = lock(&self.pending);
            drop(self.wake.wait_while(pending, |pending| pending.is_empty()));
            // Order matters: the socket is taken first, so that nothing overtakes a batch on its way.
            {
                let mut socket = lock(&self.socket);
                self.send_pending(&mut socket);
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Sends a message, after everything that is pending. Waits for the runner to read.
    pub(super) fn send(&self, message: &FromWorker) {
        let mut socket = lock(&self.socket);
        self.send_pending(&mut socket);
        write_frame(&mut socket, message);
    }

    fn send_pending(&self, socket: &mut UnixStream) {
        // One batch at a time, so that unsent points are never in memory twice; and only the batches of this moment, so
        // that the loop ends.
        let batches = lock(&self.pending).batches.len();
        for _ in 0..batches {
            let Some(batch) = lock(&self.pending).batches.pop_front() else {
                break;
            };
            write_frame(socket, &FromWorker::Metrics(batch.series));
        }
        let (pending, mut lines) = {
            let mut now = lock(&self.pending);
            let batches = std::mem::take(&mut now.batches);
            let mut pending = std::mem::take(&mut *now);
            now.batches = batches;
            let lines = std::mem::take(&mut pending.lines);
            (pending, lines)
        };
        for (count, what) in [
            (pending.lost_points, "metric points"),
            (pending.lost_lines, "log lines"),
        ] {
            if count > 0 {
                let text =
                    format!("{count} {what} came faster than they could be recorded and are lost");
                lines.push(Line {
                    level: LogLevel::Warn as u32,
                    text,
                    at: Time::now().0,
                });
            }
        }
        while !lines.is_empty() {
            let mut bytes = 0;
            let fits = |line: &&Line| {
                bytes += line.text.len();
                bytes <= LINES_OF_A_FRAME
            };
            let first = lines.iter().take(BATCH / 8);
            let count = first.take_while(fits).count().max(1);
            let batch: Vec<Line> = lines.drain(..count).collect();
            write_frame(socket, &FromWorker::Log(batch));
        }
        if let Some(progress) = pending.progress {
            write_frame(socket, &FromWorker::Progress(progress));
        }
    }

    pub(super) fn metric(&self, series: &str, step: u64, value: f64) {
        let at = Time::now().0;
        self.put(|pending| {
            if pending
                .batches
                .back()
                .is_none_or(|batch| batch.count >= BATCH)
            {
                if pending.batches.len() >= MOST_PARCELS {
                    let oldest = pending.batches.pop_front();
                    pending.lost_points += oldest.map_or(0, |batch| batch.count as u64);
                }
                pending.batches.push_back(PointBatch::default());
            }
            if let Some(batch) = pending.batches.back_mut() {
                batch.add(series, step, value, at);
            }
        });
    }

    pub(super) fn log(&self, level: LogLevel, text: &str) {
        let at = Time::now().0;
        self.put(|pending| {
            for line in text.lines() {
                let text = shortened(line);
                let bytes = pending.line_bytes + text.len();
                if pending.lines.len() >= MOST_LINES || bytes > MOST_LINE_BYTES {
                    pending.lost_lines += 1;
                    continue;
                }
                pending.line_bytes = bytes;
                pending.lines.push(Line {
                    level: level as u32,
                    text,
                    at,
                });
            }
        });
    }

    pub(super) fn progress(&self, progress: Progress) {
        self.put(|pending| pending.progress = Some(progress));
    }

    /// Adds to the pending messages. The pump is woken only if there were none, because waking it costs a system call, which
    /// each of a stage's calls would have to pay.
    fn put(&self, add: impl FnOnce(&mut Pending)) {
        let mut pending = lock(&self.pending);
        let idle = pending.is_empty();
        add(&mut pending);
        drop(pending);
        if idle {
            self.wake.notify_one();
        }
    }
}

/// A line cut to [`LONGEST_LINE`].
pub fn shortened(line: &str) -> String {
    if line.len() <= LONGEST_LINE {
        return line.to_owned();
    }
    let end = (0..=LONGEST_LINE)
        .rev()
        .find(|&end| line.is_char_boundary(end))
        .unwrap_or(0);
    format!("{} ... ({} bytes)", &line[..end], line.len())
}

fn write_frame(socket: &mut UnixStream, message: &FromWorker) {
    let bytes = frame::encode(message).unwrap_or_else(|error| {
        let failure = Failure::new(
            FailureCode::Internal,
            format!("the worker's message cannot be sent: {error}"),
        );
        frame::encode(&FromWorker::Failed(failure)).unwrap_or_default()
    });
    // The listener handles a runner that is gone.
    let _ = socket.write_all(&bytes);
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;

    use super::*;
    use crate::frame::Inbox;

    /// The frames that `act` makes an outbox send.
    fn frames(act: impl FnOnce(&Outbox)) -> Vec<FromWorker> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn(move || {
            let (mut theirs, mut inbox, mut bytes) = (theirs, Inbox::default(), Vec::new());
            theirs.read_to_end(&mut bytes).unwrap();
            inbox.extend(&bytes);
            std::iter::from_fn(|| inbox.take().unwrap()).collect()
        });
        act(&Outbox::new(ours));
        reader.join().unwrap()
    }

    fn steps(frame: &FromWorker) -> Vec<(&str, &[u64])> {
        let FromWorker::Metrics(series) = frame else {
            panic!("{frame:?}")
        };
        series
            .iter()
            .map(|points| (points.series.as_str(), points.steps.as_slice()))
            .collect()
    }

    #[test]
    fn pending_points_and_lines_leave_before_the_answer() {
        let sent = frames(|outbox| {
            for step in 0..BATCH as u64 {
                outbox.metric(if step == 7 { "other" } else { "loss" }, step, 0.5);
            }
            outbox.metric("other", BATCH as u64, f64::NAN);
            outbox.log(LogLevel::Info, "one\ntwo");
            outbox.progress(Progress {
                done: 1,
                total: 2,
                unit: "steps".into(),
            });
            outbox.progress(Progress {
                done: 2,
                total: 2,
                unit: "steps".into(),
            });
            outbox.send(&FromWorker::Loaded);
        });
        let [first, second, FromWorker::Log(lines), progress, last] = sent.as_slice() else {
            panic!("{sent:?}");
        };
        let loss: Vec<u64> = (0..BATCH as u64).filter(|step| *step != 7).collect();
        assert_eq!(
            steps(first),
            [("loss", loss.as_slice()), ("other", [7].as_slice())]
        );
        assert_eq!(steps(second), [("other", [BATCH as u64].as_slice())]);
        assert_eq!(
            lines
                .iter()
                .map(|line| line.text.as_str())
                .collect::<Vec<_>>(),
            ["one", "two"]
        );
        assert_eq!(
            *progress,
            FromWorker::Progress(Progress {
                done: 2,
                total: 2,
                unit: "steps".into()
            })
        );
        assert_eq!(*last, FromWorker::Loaded);
    }

    #[test]
    fn what_is_too_much_is_counted() {
        let sent = frames(|outbox| {
            for _ in 0..MOST_LINES + 3 {
                outbox.log(LogLevel::Info, "x");
            }
            outbox.send(&FromWorker::Loaded);
        });
        let Some(FromWorker::Log(lines)) = sent.iter().rev().nth(1) else {
            panic!("no log at the end")
        };
        assert_eq!(
            lines.last().unwrap().text,
            "3 log lines came faster than they could be recorded and are lost"
        );
        let outbox = Outbox::new(UnixStream::pair().unwrap().0);
        let most = (MOST_PARCELS * BATCH) as u64;
        for step in 0..most + 1 {
            outbox.metric("loss", step, 0.5);
        }
        for _ in 0..2 * MOST_LINE_BYTES / LONGEST_LINE {
            outbox.log(LogLevel::Info, &"x".repeat(LONGEST_LINE));
        }
        let pending = lock(&outbox.pending);
        assert!(pending.line_bytes <= MOST_LINE_BYTES && pending.lost_lines > 0);
        assert_eq!(
            (pending.batches.len(), pending.lost_points),
            (MOST_PARCELS, BATCH as u64)
        );
        let first = |batch: Option<&PointBatch>| batch.unwrap().series[0].steps[0];
        assert_eq!(
            first(pending.batches.front()),
            BATCH as u64,
            "the oldest go"
        );
        assert_eq!(first(pending.batches.back()), most);
    }

    #[test]
    fn lines_that_grow_on_the_wire_fit_into_frames() {
        // JSON writes each of these bytes as six.
        let line = "\u{1}".repeat(LONGEST_LINE);
        let sent = frames(|outbox| {
            for _ in 0..BATCH / 8 {
                outbox.log(LogLevel::Info, &line);
            }
            outbox.send(&FromWorker::Loaded);
        });
        let lines = sent.iter().map(|frame| match frame {
            FromWorker::Log(lines) => lines.len(),
            FromWorker::Loaded => 0,
            other => panic!("{other:?}"),
        });
        assert_eq!(lines.sum::<usize>(), BATCH / 8);
    }

    #[test]
    fn a_call_does_not_wait_for_a_runner_that_does_not_read() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        while ours.write(&[0; 1024]).is_ok_and(|count| count > 0) {}
        ours.set_nonblocking(false).unwrap();
        let outbox = Arc::new(Outbox::new(ours));
        let pump = Arc::clone(&outbox);
        std::thread::spawn(move || pump.pump());
        let (said, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            outbox.metric("loss", 0, 0.5);
            // The pump holds the socket, which is full, and will not release it.
            while outbox.socket.try_lock().is_ok() {
                std::thread::yield_now();
            }
            for step in 1..4 * BATCH as u64 {
                outbox.metric("loss", step, 0.5);
            }
            let _ = said.send(());
        });
        done.recv_timeout(Duration::from_secs(60))
            .expect("the calls return");
    }

    #[test]
    fn the_pump_sends_what_comes_after_it_had_nothing_to_do() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let outbox = Arc::new(Outbox::new(ours));
        let pump = Arc::clone(&outbox);
        std::thread::spawn(move || pump.pump());
        let (mut inbox, mut bytes) = (Inbox::default(), vec![0; 4096]);
        for step in 0..3 {
            outbox.metric("loss", step, 0.5);
            let frame = loop {
                if let Some(frame) = inbox.take::<FromWorker>().unwrap() {
                    break frame;
                }
                let count = theirs.read(&mut bytes).expect("a frame");
                inbox.extend(&bytes[..count]);
            };
            assert_eq!(steps(&frame), [("loss", [step].as_slice())]);
        }
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let line = "é".repeat(LONGEST_LINE);
        let cut = shortened(&line);
        assert!(
            cut.ends_with(&format!("... ({} bytes)", line.len())) && cut.len() < LONGEST_LINE + 40
        );
        assert_eq!(shortened("short"), "short");
    }
}
