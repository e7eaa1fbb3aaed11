//! The runner's end of a worker: starting it, reading its events, signalling it, and how it ended.
//!
//! In: a [`Task`]. Out: [`WorkerEvent`] events, of which the last is always the exit. A worker leads its own
//! process group, so that a Ctrl-C in the terminal does not reach it, and everything it starts can be ended with it.
//! Deliberately absent: what the events mean for a stage (the executor's).

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use retort_abi::Failure;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use crate::frame::{self, Answer, FrameError, FromWorker, Inbox, Task, ToWorker};
use crate::store::{LogSource, Usage};
use crate::worker::death::{ExitStatus, UnexpectedExit};
use crate::worker::remote::ElementEvent;
use crate::worker::{LONGEST_LINE, shortened};

/// How long to wait for a dead worker's remaining output: processes that left its group may hold the pipes open.
const DRAIN: Duration = Duration::from_millis(500);

/// How long after SIGKILL a worker is given up. It executes nothing of its own any more, but the kernel does not end it while
/// it waits for a disk or a device, and needs a while to take back much memory.
const UNKILLABLE: Duration = Duration::from_secs(120);

/// How many of a dead worker's last lines are reported.
const LAST_LINES: usize = 8;

/// Signals that a scheduler sends to every process of a job. A worker ignores them, because its supervisor decides how it
/// ends.
const OF_SCHEDULERS: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGUSR1];

/// Process ids of the workers that have not been collected.
static ALIVE: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// Signals every worker of this process, and everything in their groups.
pub fn signal_all(signal: i32) {
    // While the lock is held, no worker is reaped, so their ids cannot be reused.
    alive().iter().for_each(|&pid| signal_group(pid, signal));
}

fn alive() -> MutexGuard<'static, BTreeSet<u32>> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A worker process.
#[derive(Debug)]
pub struct Worker {
    pid: u32,
    wire: WorkerSocket,
    stdout: Lines,
    stderr: Lines,
    exit: Option<JoinHandle<WorkerExit>>,
    /// Its exit, once known; reported after everything that it left behind has been read.
    ended: Option<(WorkerExit, tokio::time::Instant)>,
    /// When it was first sent SIGKILL.
    killed: OnceLock<tokio::time::Instant>,
}

/// Something a worker did.
#[derive(Debug)]
pub enum WorkerEvent {
    /// It sent a frame.
    Frame(FromWorker),
    /// It sent an invalid frame; further frames are not read.
    Malformed(FrameError),
    /// It, or something it loaded or started, wrote a line.
    Line(LogSource, String),
    /// An event of a remote worker only.
    Remote(ElementEvent),
    /// It has ended, and its whole process group with it. Always last.
    Exited(WorkerExit),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorkerExit {
    /// With a code or by a signal.
    pub status: ExitStatus,
    /// Its usage.
    pub usage: Usage,
    /// Whether memory ran out at that time; None if its supervisor cannot tell.
    pub out_of_memory: Option<bool>,
}

/// Why a plugin did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No process could be started.
    #[error("a worker process could not be started: {0}")]
    Spawn(io::Error),
    /// The plugin could not be loaded.
    #[error("{message}")]
    NotLoaded {
        /// Why.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The plugin answered with a failure.
    #[error("{0}")]
    Failed(Failure),
    /// The worker died.
    #[error("the plugin ended its process: {}: {}{}", death.reason(), death.message(), quoted(output))]
    Died {
        /// How.
        death: UnexpectedExit,
        /// The last lines it wrote.
        output: String,
    },
    /// The plugin hangs.
    #[error("the plugin did not answer within {} s", after.as_secs())]
    TimedOut {
        /// The time limit.
        after: Duration,
    },
    /// It could not be asked.
    #[error("the plugin cannot be asked: {0}")]
    Unsendable(FrameError),
    /// It sent an invalid message.
    #[error("the plugin's worker sent an invalid message: {0}")]
    Malformed(String),
}

fn quoted(output: &str) -> String {
    if output.is_empty() {
        String::new()
    } else {
        format!(", having written:\n{output}")
    }
}

/// Makes one call other than a run, in a new worker, and waits for the answer.
///
/// # Errors
/// [`AskError`].
pub async fn ask(task: Task, limit: Duration) -> Result<Answer, AskError> {
    let mut worker = Worker::spawn(1, &[]).map_err(AskError::Spawn)?;
    let sent = worker.send(&ToWorker::Start(Box::new(task))).await;
    sent.map_err(AskError::Unsendable)?;
    let mut answer = None;
    let mut output = VecDeque::new();
    let conversation = async {
        loop {
            match worker.next().await {
                WorkerEvent::Frame(FromWorker::Answer(given)) => answer = Some(Ok(given)),
                WorkerEvent::Frame(FromWorker::Failed(failure)) => {
                    answer = Some(Err(AskError::Failed(failure)))
                }
                WorkerEvent::Frame(FromWorker::NotLoaded { message, hint }) => {
                    answer = Some(Err(AskError::NotLoaded { message, hint }));
                }
                WorkerEvent::Frame(_) | WorkerEvent::Remote(_) => {}
                WorkerEvent::Malformed(error) => {
                    answer = Some(Err(AskError::Malformed(error.to_string())))
                }
                WorkerEvent::Line(_, line) => {
                    output.truncate(LAST_LINES - 1);
                    output.push_front(line);
                }
                WorkerEvent::Exited(exit) => return exit,
            }
        }
    };
    let ended = tokio::time::timeout(limit, conversation).await;
    let Ok(exit) = ended else {
        worker.signal(libc::SIGKILL);
        while !matches!(worker.next().await, WorkerEvent::Exited(_)) {}
        return Err(AskError::TimedOut { after: limit });
    };
    answer.unwrap_or_else(|| {
        let last: Vec<&str> = output.iter().rev().map(String::as_str).collect();
        Err(AskError::Died {
            death: UnexpectedExit::new(exit.status, last.iter().copied(), false),
            output: last.join("\n"),
        })
    })
}

impl Worker {
    /// Starts a worker process whose libraries may use `threads` threads, with these variables besides its environment. To
    /// be called on a thread that lives as long as the runner: the kernel ends the worker with it.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn spawn(threads: usize, variables: &[(&str, OsString)]) -> io::Result<Self> {
        Self::start(threads, variables, |_| {})
    }

    /// The same in a job of a scheduler, whose signals the worker ignores.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn spawn_in_job(threads: usize, variables: &[(&str, OsString)]) -> io::Result<Self> {
        Self::start(threads, variables, |command| {
            // SAFETY: between fork and exec only an async-signal-safe function is called.
            unsafe {
                command.pre_exec(|| {
                    for signal in OF_SCHEDULERS {
                        libc::signal(signal, libc::SIG_IGN);
                    }
                    Ok(())
                })
            };
        })
    }

    fn start(
        threads: usize,
        variables: &[(&str, OsString)],
        prepare: impl FnOnce(&mut Command),
    ) -> io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let threads = threads.max(1).to_string();
        let mut command = Command::new(own_program()?);
        command
            .arg0("retort")
            .args(["worker", "--parent", &std::process::id().to_string()])
            .env("RAYON_NUM_THREADS", &threads)
            .env("OMP_NUM_THREADS", &threads)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        prepare(&mut command);
        let mut child = command.spawn()?;
        let pid = child.id();
        alive().insert(pid);
        let exit = tokio::task::spawn_blocking(move || reap(pid));
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(io::Error::other("no pipes"));
        };
        Ok(Self {
            pid,
            wire: WorkerSocket::new(ours)?,
            stdout: Lines::new(OwnedFd::from(stdout))?,
            stderr: Lines::new(OwnedFd::from(stderr))?,
            exit: Some(exit),
            ended: None,
            killed: OnceLock::new(),
        })
    }

    /// Its process id, which is also that of its group.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a message. If the worker is gone that is no error here: its exit will be reported.
    ///
    /// # Errors
    /// The message cannot be encoded, because a path in it is not UTF-8: there would never be an answer.
    pub async fn send(&mut self, message: &ToWorker) -> Result<(), FrameError> {
        self.wire.send(message).await
    }

    /// Signals the worker and everything in its group; nothing once it has ended.
    pub fn signal(&self, signal: i32) {
        if self.exit.is_some() {
            signal_group(self.pid, signal);
            if signal == libc::SIGKILL {
                self.killed.get_or_init(tokio::time::Instant::now);
            }
        }
    }

    /// The worker's next event. Cancel-safe. Not to be called after [`WorkerEvent::Exited`].
    pub async fn next(&mut self) -> WorkerEvent {
        loop {
            match self.wire.take() {
                Ok(Some(message)) => return WorkerEvent::Frame(message),
                Ok(None) => {}
                Err(error) => return WorkerEvent::Malformed(error),
            }
            if let Some(line) = self.stdout.take() {
                return WorkerEvent::Line(LogSource::Stdout, line);
            }
            if let Some(line) = self.stderr.take() {
                return WorkerEvent::Line(LogSource::Stderr, line);
            }
            let silent = self.wire.closed() && self.stdout.closed() && self.stderr.closed();
            match &self.ended {
                Some((exit, _)) if silent => return WorkerEvent::Exited(*exit),
                Some((exit, since)) if since.elapsed() > DRAIN => {
                    return WorkerEvent::Exited(*exit);
                }
                _ => self.wait().await,
            }
        }
    }

    /// Waits until there is something new in one of the sources.
    async fn wait(&mut self) {
        let ended = self.ended.is_some();
        tokio::select! {
            // In this order: what was sent before the exit is read before it.
            biased;
            () = self.wire.read(), if !self.wire.closed() => {}
            () = self.stdout.read(), if !self.stdout.closed() => {}
            () = self.stderr.read(), if !self.stderr.closed() => {}
            exit = async { self.exit.as_mut().expect("waited for once").await }, if self.exit.is_some() => {
                self.exit = None;
                let exit = exit.unwrap_or(WorkerExit { status: ExitStatus::Code(-1), usage: Usage::default(), out_of_memory: None });
                self.ended = Some((exit, tokio::time::Instant::now()));
            }
            () = tokio::time::sleep(DRAIN), if ended => {}
            () = given_up(self.killed.get()), if self.exit.is_some() => {
                self.exit = None;
                let exit = WorkerExit { status: ExitStatus::Signal(libc::SIGKILL), usage: Usage::default(), out_of_memory: None };
                self.ended = Some((exit, tokio::time::Instant::now()));
            }
        }
    }
}

/// Waits until a worker that was killed at this time is given up; forever if it was not.
async fn given_up(killed: Option<&tokio::time::Instant>) {
    match killed {
        Some(killed) => tokio::time::sleep_until(*killed + UNKILLABLE).await,
        None => std::future::pending().await,
    }
}

impl Drop for Worker {
    /// No worker is orphaned.
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
    }
}

/// The running program, even if its file has been replaced since.
fn own_program() -> io::Result<std::path::PathBuf> {
    if cfg!(target_os = "linux") {
        Ok("/proc/self/exe".into())
    } else {
        std::env::current_exe()
    }
}

fn signal_group(pid: u32, signal: i32) {
    // Process ids fit.
    let group = -(pid as libc::pid_t);
    // SAFETY: a plain system call; the group exists until its leader is reaped, which `reap` does after its last signal.
    unsafe { libc::kill(group, signal) };
}

/// Waits for the end of a child, kills the rest of its group while the group's id is still valid, and collects the child.
fn reap(pid: u32) -> WorkerExit {
    // Process ids fit.
    let id = pid as libc::pid_t;
    // SAFETY: plain system calls on our own child, which fill the structures.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        while libc::waitid(libc::P_PID, pid, &mut info, libc::WEXITED | libc::WNOWAIT) != 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
        signal_group(pid, libc::SIGKILL);
        alive().remove(&pid);
        let (mut status, mut usage) = (0, std::mem::zeroed::<libc::rusage>());
        while libc::wait4(id, &mut status, 0, &mut usage) != id {
            if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return WorkerExit {
                    status: ExitStatus::Code(-1),
                    usage: Usage::default(),
                    out_of_memory: None,
                };
            }
        }
        let status = if libc::WIFSIGNALED(status) {
            ExitStatus::Signal(libc::WTERMSIG(status))
        } else {
            ExitStatus::Code(libc::WEXITSTATUS(status))
        };
        let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
        // Linux counts kibibytes, macOS bytes.
        let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
        let usage = Usage {
            cpu_seconds: Some(seconds(usage.ru_utime) + seconds(usage.ru_stime)),
            max_rss: Some(usage.ru_maxrss.cast_unsigned() * unit),
        };
        WorkerExit {
            status,
            usage,
            out_of_memory: None,
        }
    }
}

/// The runner's end of the socket to a worker, which may send anything.
#[derive(Debug)]
pub struct WorkerSocket {
    /// None once it is closed or has delivered an invalid message.
    socket: Option<UnixStream>,
    inbox: Inbox,
}

impl WorkerSocket {
    /// Takes a connected socket; to be called within a runtime.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn new(socket: std::os::unix::net::UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket: Some(UnixStream::from_std(socket)?),
            inbox: Inbox::default(),
        })
    }

    /// Whether nothing more will come.
    pub fn closed(&self) -> bool {
        self.socket.is_none()
    }

    /// Sends a message. A closed peer is no error here.
    ///
    /// # Errors
    /// It cannot be written, because a path in it is not UTF-8.
    pub async fn send(&mut self, message: &ToWorker) -> Result<(), FrameError> {
        let bytes = frame::encode(message)?;
        if let Some(socket) = &mut self.socket {
            let _ = socket.write_all(&bytes).await;
        }
        Ok(())
    }

    /// Waits for bytes or the end of the stream. Cancel-safe.
    pub async fn read(&mut self) {
        let Some(socket) = &mut self.socket else {
            return;
        };
        let mut bytes = [0; 16 << 10];
        match socket.read(&mut bytes).await {
            Ok(0) | Err(_) => self.socket = None,
            Ok(count) => self.inbox.extend(&bytes[..count]),
        }
    }

    /// The next whole message that has been read, if any.
    ///
    /// # Errors
    /// The bytes are no valid message; nothing more is read.
    pub fn take(&mut self) -> Result<Option<FromWorker>, FrameError> {
        let message = self.inbox.take();
        if message.is_err() {
            self.socket = None;
            self.inbox = Inbox::default();
        }
        message
    }
}

/// Lines of a pipe.
#[derive(Debug)]
struct Lines {
    pipe: Option<pipe::Receiver>,
    bytes: Vec<u8>,
    /// The number of bytes known to contain no end of line.
    searched: usize,
    /// Whether the rest of a cut line is being skipped.
    skipping: bool,
}

impl Lines {
    fn new(pipe: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            pipe: Some(pipe::Receiver::from_owned_fd(pipe)?),
            bytes: Vec::new(),
            searched: 0,
            skipping: false,
        })
    }

    fn closed(&self) -> bool {
        self.pipe.is_none()
    }

    async fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut bytes = [0; 16 << 10];
        match pipe.read(&mut bytes).await {
            Ok(0) | Err(_) => self.pipe = None,
            Ok(count) => self.bytes.extend_from_slice(&bytes[..count]),
        }
    }

    /// The next line, without its end; a line longer than [`LONGEST_LINE`] is cut.
    fn take(&mut self) -> Option<String> {
        loop {
            let end = self.bytes[self.searched..]
                .iter()
                .position(|&byte| byte == b'\n');
            let (line, rest, whole) = match end {
                Some(end) => (self.searched + end, self.searched + end + 1, true),
                None if self.bytes.len() > LONGEST_LINE => {
                    (self.bytes.len(), self.bytes.len(), false)
                }
                None if self.closed() && !self.bytes.is_empty() => {
                    (self.bytes.len(), self.bytes.len(), true)
                }
                None => {
                    self.searched = self.bytes.len();
                    return None;
                }
            };
            let text = String::from_utf8_lossy(&self.bytes[..line])
                .trim_end_matches('\r')
                .to_owned();
            self.bytes.drain(..rest);
            self.searched = 0;
            let skip = std::mem::replace(&mut self.skipping, !whole);
            if !skip {
                return Some(if whole {
                    shortened(&text)
                } else {
                    format!("{} ...", shortened(&text))
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_worker_that_does_not_die_is_given_up() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (stdout, _written) = io::pipe().unwrap();
        let (stderr, _said) = io::pipe().unwrap();
        let killed = tokio::time::Instant::now() - UNKILLABLE;
        let mut worker = Worker {
            // No process has it.
            pid: i32::MAX as u32,
            wire: WorkerSocket::new(ours).unwrap(),
            stdout: Lines::new(stdout.into()).unwrap(),
            stderr: Lines::new(stderr.into()).unwrap(),
            exit: Some(tokio::spawn(std::future::pending())),
            ended: None,
            killed: OnceLock::from(killed),
        };
        let WorkerEvent::Exited(exit) = worker.next().await else {
            panic!("its end was expected");
        };
        assert!(matches!(exit.status, ExitStatus::Signal(libc::SIGKILL)));
    }
}
