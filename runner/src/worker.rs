//! The worker: the process that loads one plugin, makes one call and leaves.
//!
//! In: a [`Task`] over a socket that arrives as standard input. Out: frames over the same socket, then `_exit`. Whatever
//! a plugin does to its process, it does here. Deliberately absent: the history, and any decision: a worker does what it
//! is told until it is told to stop ([`process`] is the runner's end of the socket).
//!
//! No worker outlives its runner: when the runner's end of the socket closes, or its process dies, the whole process
//! group of the worker is killed. Two mechanisms, because a plugin may disturb either.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use retort_abi::ffi::{self, HostTable, Sink, Str};
use retort_abi::{ArtifactMeta, Cancel, Failure, FailureCode, LogLevel};

use crate::artifact::{self, ArtifactError};
use crate::frame::{self, Answer, Call, FromWorker, Inbox, Line, Points, Progress, Task, ToWorker};
use crate::plugin::host::LoadedPlugin;
use crate::store::{ArtifactRecord, Time};

pub mod death;
pub mod process;

/// How often metrics, log lines and progress are sent.
const INTERVAL: Duration = Duration::from_millis(100);
/// Points and lines of one frame, which keeps it far below the limit of a frame.
const BATCH: usize = 8192;
/// Frames of metric points kept while the runner does not read: four million points, 100 MB. Beyond, the oldest go.
const MOST_PARCELS: usize = 512;
/// Log lines kept while the runner does not read; beyond, further ones go.
const MOST_LINES: usize = 1 << 16;
/// Longest log line, in bytes.
pub const LONGEST_LINE: usize = 16 << 10;

/// Why a process is no worker.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Somebody typed the command.
    #[error("this command is started by retort itself, with a socket as its standard input")]
    NotAWorker,
    /// The operating system refuses.
    #[error("the worker cannot be set up: {0}")]
    Setup(std::io::Error),
}

/// Does the work of a worker; comes back only when it cannot begin.
///
/// # Errors
/// [`WorkerError`].
pub fn main(parent: u32) -> Result<std::convert::Infallible, WorkerError> {
    let socket = take_socket()?;
    follow_parent(parent)?;
    let inbox = socket.try_clone().map_err(WorkerError::Setup)?;
    let outbox = Arc::new(Outbox::new(socket));
    let cancel = Arc::new(AtomicU32::new(Cancel::Run as u32));
    let (send_task, task) = std::sync::mpsc::channel();
    let heard = Arc::clone(&cancel);
    std::thread::spawn(move || listen(inbox, &send_task, &heard));
    // The sender stays with the listener, which ends the process before it could be dropped.
    let Ok(task) = task.recv() else { leave() };
    let pump = Arc::clone(&outbox);
    std::thread::spawn(move || pump.pump());
    work(*task, &outbox, cancel);
    leave()
}

/// Loads the plugin, makes the call, sends the answer.
fn work(task: Task, outbox: &Arc<Outbox>, cancel: Arc<AtomicU32>) {
    let plugin = match LoadedPlugin::load(&task.plugin, task.hash.as_deref()) {
        Ok(plugin) => plugin,
        Err(error) => {
            outbox.send(&FromWorker::NotLoaded {
                message: error.to_string(),
                hint: error.hint(),
            });
            return;
        }
    };
    outbox.send(&FromWorker::Loaded);
    let writer = match &task.call {
        Call::Run {
            job,
            staging,
            artifacts,
            ..
        } if job.part.is_none() => Some(ArtifactWriter::new(staging.clone(), artifacts.clone())),
        _ => None,
    };
    // Never dropped: a thread of the plugin may call after its time, and must not find it gone.
    let services: &'static Services = Box::leak(Box::new(Services {
        outbox: Arc::clone(outbox),
        cancel,
        writer,
        over: AtomicBool::new(false),
        late: AtomicU64::new(0),
    }));
    let host = services.table();
    let linger = match &task.call {
        Call::Run { linger, .. } => *linger,
        _ => Duration::ZERO,
    };
    let answer = match task.call {
        Call::Describe => plugin
            .describe()
            .map(|description| Answer::Description(Box::new(description))),
        Call::Probe => plugin.probe(&host).map(Answer::Devices),
        Call::Validate(jobs) => jobs
            .iter()
            .map(|job| plugin.validate(&host, job))
            .collect::<Result<_, _>>()
            .map(Answer::Findings),
        Call::Provoke(jobs) => Ok(Answer::Provoked(
            jobs.iter().map(|job| plugin.validate(&host, job)).collect(),
        )),
        Call::Run { job, .. } => plugin.run(&host, &job).map(Answer::Result),
    };
    services.over.store(true, Ordering::Relaxed);
    std::thread::sleep(linger);
    let calls = services.late.load(Ordering::Relaxed);
    if calls > 0 {
        outbox.send(&FromWorker::Late { calls });
    }
    outbox.send(&match answer {
        Ok(answer) => FromWorker::Answer(answer),
        Err(failure) => FromWorker::Failed(failure),
    });
}

/// Moves the socket that arrived as standard input out of the plugin's way, and puts nothing in its place.
fn take_socket() -> Result<UnixStream, WorkerError> {
    let stdin = std::io::stdin();
    // SAFETY: plain system calls on a descriptor that is open as long as the process lives.
    let (is_socket, moved) = unsafe {
        let mut status: libc::stat = std::mem::zeroed();
        let known = libc::fstat(stdin.as_raw_fd(), &mut status) == 0;
        let is_socket = known && status.st_mode & libc::S_IFMT == libc::S_IFSOCK;
        (
            is_socket,
            if is_socket {
                libc::fcntl(stdin.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3)
            } else {
                -1
            },
        )
    };
    if !is_socket {
        return Err(WorkerError::NotAWorker);
    }
    if moved < 0 {
        return Err(WorkerError::Setup(std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(moved) };
    let null = std::fs::File::open("/dev/null").map_err(WorkerError::Setup)?;
    // SAFETY: both descriptors are open.
    if unsafe { libc::dup2(null.as_raw_fd(), stdin.as_raw_fd()) } < 0 {
        return Err(WorkerError::Setup(std::io::Error::last_os_error()));
    }
    Ok(UnixStream::from(socket))
}

/// Arranges that this process group dies with the runner, and that the kernel prefers it to the runner when memory runs
/// out; makes the C library's stdout line-buffered, because `_exit` does not write out what is left in it.
fn follow_parent(parent: u32) -> Result<(), WorkerError> {
    #[cfg(target_os = "linux")]
    {
        extern "C" fn die(_signal: libc::c_int) {
            kill_own_group();
        }
        // SAFETY: the handler calls nothing but async-signal-safe functions; the others are plain system calls, and
        // `stdout` is the C library's own stream.
        unsafe {
            unsafe extern "C" {
                static mut stdout: *mut libc::FILE;
            }
            libc::setvbuf(stdout, std::ptr::null_mut(), libc::_IOLBF, 0);
            let handler: extern "C" fn(libc::c_int) = die;
            libc::signal(libc::SIGHUP, handler as libc::sighandler_t);
            if std::env::var_os(process::SURVIVES_SIGTERM).is_some() {
                libc::signal(libc::SIGTERM, libc::SIG_IGN);
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGHUP) != 0 {
                return Err(WorkerError::Setup(std::io::Error::last_os_error()));
            }
            libc::prctl(libc::PR_SET_NAME, c"retort-worker".as_ptr());
        }
        let _ = std::fs::write("/proc/self/oom_score_adj", "500");
    }
    // The runner may have died before the line above.
    if std::os::unix::process::parent_id() != parent {
        kill_own_group();
    }
    Ok(())
}

/// Reads frames from the runner until it is gone.
fn listen(mut socket: UnixStream, tasks: &std::sync::mpsc::Sender<Box<Task>>, cancel: &AtomicU32) {
    let (mut inbox, mut bytes) = (Inbox::default(), vec![0; 64 << 10]);
    loop {
        match socket.read(&mut bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => kill_own_group(),
            Ok(count) => inbox.extend(&bytes[..count]),
        }
        loop {
            match inbox.take() {
                Ok(Some(ToWorker::Start(task))) => drop(tasks.send(task)),
                Ok(Some(ToWorker::CancelAtCheckpoint)) => {
                    cancel.fetch_max(Cancel::AtCheckpoint as u32, Ordering::Relaxed);
                }
                Ok(Some(ToWorker::CancelNow)) => {
                    cancel.fetch_max(Cancel::Now as u32, Ordering::Relaxed);
                }
                Ok(None) => break,
                Err(_) => kill_own_group(),
            }
        }
    }
}

/// Kills the worker and everything it has started.
fn kill_own_group() -> ! {
    // SAFETY: async-signal-safe system calls. The group is only killed when this process leads it: one typed by hand
    // in a shell must not take the shell's group along.
    unsafe {
        if libc::getpgrp() == libc::getpid() {
            libc::kill(0, libc::SIGKILL);
        }
        libc::_exit(1)
    }
}

/// Ends the process without the destructors of anything: a plugin's may crash or hang.
fn leave() -> ! {
    let _ = std::io::stdout().flush();
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

/// What waits to be sent to the runner.
struct Outbox {
    socket: Mutex<UnixStream>,
    pending: Mutex<Pending>,
    wake: Condvar,
}

#[derive(Default)]
struct Pending {
    parcels: VecDeque<Outgoing>,
    lines: Vec<Line>,
    progress: Option<Progress>,
    lost_points: u64,
    lost_lines: u64,
}

/// Points of one frame, put in their places as they come: what a stage's call costs is a look-up and three numbers,
/// however much waits.
#[derive(Debug, Default)]
struct Outgoing {
    series: Vec<Points>,
    places: HashMap<String, usize>,
    count: usize,
}

impl Outgoing {
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
        self.parcels.is_empty() && self.lines.is_empty() && self.progress.is_none()
    }
}

impl Outbox {
    fn new(socket: UnixStream) -> Self {
        Self {
            socket: Mutex::new(socket),
            pending: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    /// Sends what is pending, at most every [`INTERVAL`]; for a thread of its own.
    fn pump(&self) -> ! {
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
    fn send(&self, message: &FromWorker) {
        let mut socket = lock(&self.socket);
        self.send_pending(&mut socket);
        write_frame(&mut socket, message);
    }

    fn send_pending(&self, socket: &mut UnixStream) {
        let pending = std::mem::take(&mut *lock(&self.pending));
        for outgoing in pending.parcels {
            write_frame(socket, &FromWorker::Metrics(outgoing.series));
        }
        let mut lines = pending.lines;
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
        for batch in lines.chunks(BATCH / 8) {
            write_frame(socket, &FromWorker::Log(batch.to_vec()));
        }
        if let Some(progress) = pending.progress {
            write_frame(socket, &FromWorker::Progress(progress));
        }
    }

    fn metric(&self, series: &str, step: u64, value: f64) {
        let at = Time::now().0;
        self.put(|pending| {
            if pending
                .parcels
                .back()
                .is_none_or(|outgoing| outgoing.count >= BATCH)
            {
                if pending.parcels.len() >= MOST_PARCELS {
                    let oldest = pending.parcels.pop_front();
                    pending.lost_points += oldest.map_or(0, |outgoing| outgoing.count as u64);
                }
                pending.parcels.push_back(Outgoing::default());
            }
            if let Some(outgoing) = pending.parcels.back_mut() {
                outgoing.add(series, step, value, at);
            }
        });
    }

    fn log(&self, level: LogLevel, text: &str) {
        let at = Time::now().0;
        self.put(|pending| {
            for line in text.lines() {
                if pending.lines.len() >= MOST_LINES {
                    pending.lost_lines += 1;
                    continue;
                }
                pending.lines.push(Line {
                    level: level as u32,
                    text: shortened(line),
                    at,
                });
            }
        });
    }

    fn progress(&self, progress: Progress) {
        self.put(|pending| pending.progress = Some(progress));
    }

    /// Adds to what is pending. The pump waits only while there is nothing: waking it for more would cost every call
    /// of a stage a system call.
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
    // A runner that is gone is the listener's business.
    let _ = socket.write_all(&bytes);
}

/// What a plugin panicked over is whole enough for us: these locks guard plain queues.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Artifacts being written.
struct ArtifactWriter {
    staging: PathBuf,
    artifacts: PathBuf,
    open: Mutex<Drafts>,
}

#[derive(Default)]
struct Drafts {
    last_id: u64,
    open: HashMap<u64, Draft>,
}

struct Draft {
    kind: String,
    name: String,
    path: PathBuf,
}

impl ArtifactWriter {
    fn new(staging: PathBuf, artifacts: PathBuf) -> Self {
        Self {
            staging,
            artifacts,
            open: Mutex::default(),
        }
    }

    fn begin(&self, kind: String, name: String) -> Result<(u64, PathBuf), Failure> {
        let mut drafts = lock(&self.open);
        let id = drafts.last_id + 1;
        let path = self.staging.join(id.to_string());
        std::fs::create_dir_all(&path).map_err(|error| io_failure("make", &path, &error))?;
        drafts.last_id = id;
        drafts.open.insert(
            id,
            Draft {
                kind,
                name,
                path: path.clone(),
            },
        );
        Ok((id, path))
    }

    fn commit(&self, id: u64, meta: ArtifactMeta) -> Result<ArtifactRecord, Failure> {
        let draft = lock(&self.open).open.remove(&id).ok_or_else(|| {
            Failure::new(
                FailureCode::Internal,
                format!("artifact_commit({id}): no artifact with this id is open"),
            )
        })?;
        let contents = artifact::commit(&draft.path, &self.artifacts)
            .map_err(|error| commit_failure(&draft, &error))?;
        let artifact::Contents { hash, size, files } = contents;
        Ok(ArtifactRecord {
            hash,
            kind: draft.kind,
            name: draft.name,
            size,
            files,
            meta,
        })
    }

    fn abort(&self, id: u64) {
        if let Some(draft) = lock(&self.open).open.remove(&id) {
            let _ = std::fs::remove_dir_all(draft.path);
        }
    }
}

fn commit_failure(draft: &Draft, error: &ArtifactError) -> Failure {
    let what = format!(
        "the {} `{}` cannot be made an artifact: {error}",
        draft.kind, draft.name
    );
    match error {
        ArtifactError::Io { path, source, .. } => Failure {
            message: what,
            ..io_failure("use", path, source)
        },
        _ => Failure::new(FailureCode::BadData, what),
    }
}

fn io_failure(action: &str, path: &Path, error: &std::io::Error) -> Failure {
    let failure = Failure::new(
        FailureCode::Io,
        format!("cannot {action} {}: {error}", path.display()),
    );
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => failure
            .hint("free some space, or choose another disk with --store; then `retort resume`"),
        std::io::ErrorKind::FileTooLarge => failure.hint(
            "this is the limit on the size of files: `ulimit -f unlimited` in this shell lifts it; then `retort resume`",
        ),
        _ => failure,
    }
}

/// What the C table's functions work on.
struct Services {
    outbox: Arc<Outbox>,
    cancel: Arc<AtomicU32>,
    /// Only in `run` of a whole stage.
    writer: Option<ArtifactWriter>,
    /// Whether the plugin's function has returned.
    over: AtomicBool,
    /// Calls that came later.
    late: AtomicU64,
}

impl Services {
    fn table(&self) -> HostTable {
        HostTable {
            struct_size: size_of::<HostTable>() as u32,
            abi_minor: ffi::ABI_MINOR,
            ext: std::ptr::null(),
            ctx: std::ptr::from_ref(self).cast_mut().cast(),
            log: Some(log),
            metric: Some(metric),
            progress: Some(progress),
            cancelled: Some(cancelled),
            artifact_begin: Some(artifact_begin),
            artifact_commit: Some(artifact_commit),
            artifact_abort: Some(artifact_abort),
        }
    }
}

// The functions of the table. A panic in one of them aborts the worker, which is contained like any other fault.
//
// SAFETY of them all: `retort_plugin.h` obliges the plugin to pass our ctx, readable text and valid sinks, and to call
// only before the call returns that received the table, which is as long as `Services` lives. `Services` is Sync.

/// The services, as long as the plugin's function has not returned. Who calls later is counted and not heard.
///
/// # Safety
/// `ctx` is that of a table made by [`Services::table`], which still lives.
unsafe fn services<'a>(ctx: *mut c_void) -> Option<&'a Services> {
    // SAFETY: the caller vouches for it.
    let services = unsafe { &*ctx.cast::<Services>() };
    if services.over.load(Ordering::Relaxed) {
        services.late.fetch_add(1, Ordering::Relaxed);
        return None;
    }
    Some(services)
}

/// # Safety
/// The text is readable.
unsafe fn text(text: Str) -> String {
    // SAFETY: the caller vouches for it.
    String::from_utf8_lossy(unsafe { text.bytes() }).into_owned()
}

unsafe extern "C" fn log(ctx: *mut c_void, level: u32, message: Str) {
    // SAFETY: see above.
    let (Some(services), message) = (unsafe { (services(ctx), text(message)) }) else {
        return;
    };
    let level = match level {
        1 => LogLevel::Error,
        2 => LogLevel::Warn,
        4 => LogLevel::Debug,
        5 => LogLevel::Trace,
        _ => LogLevel::Info,
    };
    services.outbox.log(level, &message);
}

unsafe extern "C" fn metric(ctx: *mut c_void, name: Str, step: u64, value: f64) {
    // SAFETY: see above.
    let (Some(services), name) = (unsafe { (services(ctx), name.bytes()) }) else {
        return;
    };
    let series = String::from_utf8_lossy(name);
    services.outbox.metric(&series, step, value);
}

unsafe extern "C" fn progress(ctx: *mut c_void, done: u64, total: u64, unit: Str) {
    // SAFETY: see above.
    let (Some(services), unit) = (unsafe { (services(ctx), text(unit)) }) else {
        return;
    };
    services.outbox.progress(Progress { done, total, unit });
}

unsafe extern "C" fn cancelled(ctx: *mut c_void) -> u32 {
    // SAFETY: see above.
    let services = unsafe { services(ctx) };
    services.map_or(Cancel::Now as u32, |services| {
        services.cancel.load(Ordering::Relaxed)
    })
}

unsafe extern "C" fn artifact_begin(
    ctx: *mut c_void,
    kind: Str,
    name: Str,
    id: *mut u64,
    path_out: Sink,
    err: Sink,
) -> i32 {
    // SAFETY: see above.
    let (services, kind, name) = unsafe { (services(ctx), text(kind), text(name)) };
    let begun = services
        .and_then(|services| services.writer.as_ref())
        .ok_or_else(no_desk)
        .and_then(|writer| writer.begin(kind, name));
    match begun {
        Ok((number, path)) => {
            // SAFETY: see above; the staging path was made from JSON text and is UTF-8.
            unsafe {
                if !id.is_null() {
                    *id = number;
                }
                path_out.write(&path.to_string_lossy());
            }
            ffi::OK
        }
        // SAFETY: see above.
        Err(failure) => unsafe { refuse(&failure, err) },
    }
}

unsafe extern "C" fn artifact_commit(ctx: *mut c_void, id: u64, meta_json: Str, err: Sink) -> i32 {
    // SAFETY: see above.
    let (services, meta) = unsafe { (services(ctx), text(meta_json)) };
    let open = services.and_then(|services| Some((services, services.writer.as_ref()?)));
    let committed = open.ok_or_else(no_desk).and_then(|(services, writer)| {
        let meta = if meta.trim().is_empty() {
            Ok(ArtifactMeta::default())
        } else {
            serde_json::from_str(&meta)
        };
        let meta = meta.map_err(|error| {
            Failure::new(
                FailureCode::Internal,
                format!("artifact_commit({id}): the facts are no artifact meta: {error}"),
            )
        })?;
        let record = Box::new(writer.commit(id, meta)?);
        services.outbox.send(&FromWorker::Artifact { id, record });
        Ok(())
    });
    match committed {
        Ok(()) => ffi::OK,
        // SAFETY: see above.
        Err(failure) => unsafe { refuse(&failure, err) },
    }
}

unsafe extern "C" fn artifact_abort(ctx: *mut c_void, id: u64) {
    // SAFETY: see above.
    let services = unsafe { services(ctx) };
    if let Some(writer) = services.and_then(|services| services.writer.as_ref()) {
        writer.abort(id);
    }
}

fn no_desk() -> Failure {
    Failure::new(
        FailureCode::Unsupported,
        "artifacts are only made while a stage runs, and not by a part of it",
    )
}

/// # Safety
/// The sink is valid.
unsafe fn refuse(failure: &Failure, err: Sink) -> i32 {
    // SAFETY: the caller vouches for the sink.
    unsafe { err.write(&serde_json::to_string(failure).unwrap_or_default()) };
    if failure.code == FailureCode::Unsupported {
        ffi::UNSUPPORTED
    } else {
        ffi::FAILED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let pending = lock(&outbox.pending);
        assert_eq!(
            (pending.parcels.len(), pending.lost_points),
            (MOST_PARCELS, BATCH as u64)
        );
        let first = |outgoing: Option<&Outgoing>| outgoing.unwrap().series[0].steps[0];
        assert_eq!(
            first(pending.parcels.front()),
            BATCH as u64,
            "the oldest go"
        );
        assert_eq!(first(pending.parcels.back()), most);
    }

    #[test]
    fn a_call_does_not_wait_for_a_runner_that_does_not_read() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let outbox = Arc::new(Outbox::new(ours));
        let pump = Arc::clone(&outbox);
        std::thread::spawn(move || pump.pump());
        let (said, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for step in 0..4 * BATCH as u64 {
                outbox.metric("loss", step, 0.5);
                if step % 8192 == 0 {
                    // Time for the pump to run into the full socket.
                    std::thread::sleep(2 * INTERVAL);
                }
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

    #[test]
    fn drafts_become_artifacts_once() {
        let root = tempfile::tempdir().unwrap();
        let writer =
            ArtifactWriter::new(root.path().join("staging"), root.path().join("artifacts"));
        let (id, path) = writer.begin("student".into(), "best".into()).unwrap();
        std::fs::write(path.join("a"), "1").unwrap();
        let record = writer.commit(id, ArtifactMeta::default()).unwrap();
        assert_eq!(
            (record.kind.as_str(), record.name.as_str(), record.size),
            ("student", "best", 1)
        );
        assert!(
            root.path()
                .join("artifacts")
                .join(&record.hash)
                .join("a")
                .exists()
        );
        assert!(
            writer
                .commit(id, ArtifactMeta::default())
                .unwrap_err()
                .message
                .contains("no artifact with this id")
        );
        let (id, path) = writer.begin("student".into(), "none".into()).unwrap();
        writer.abort(id);
        assert!(!path.exists());
    }
}
