//! The worker: the process that loads one plugin, makes one call and leaves.
//!
//! In: a [`Task`] over a socket that arrives as standard input. Out: frames over the same socket, then `_exit`. Whatever a
//! plugin does to its process happens here. Deliberately absent: the history, and any decisions: a worker only follows
//! requests ([`process`] is the runner's end of the socket).
//!
//! No worker outlives its runner: when the runner's end of the socket closes, or its process dies, the whole process
//! group of the worker is killed. Two mechanisms, because a plugin may disturb either.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use retort_abi::Cancel;

use crate::frame::{Answer, Call, FromWorker, Inbox, Task, ToWorker};

use host::LoadedPlugin;
use outbox::Outbox;
use services::Services;
use writer::ArtifactWriter;

pub mod death;
pub mod heartbeat;
mod host;
mod outbox;
pub mod process;
pub mod remote;
mod services;
mod writer;

pub use outbox::{LONGEST_LINE, shortened};

/// Why the process cannot be a worker.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The command was typed by hand.
    #[error("this command is started by retort itself, with a socket as its standard input")]
    NotAWorker,
    /// An error of the operating system.
    #[error("the worker cannot be set up: {0}")]
    Setup(std::io::Error),
}

/// Runs a worker; returns only if it cannot start.
///
/// # Errors
/// [`WorkerError`].
pub fn main(parent: u32) -> Result<std::convert::Infallible, WorkerError> {
    let socket = take_socket()?;
    follow_parent(parent)?;
    let inbox = socket.try_clone().map_err(WorkerError::Setup)?;
    let outbox = Arc::new(Outbox::new(socket));
    // In the words of the ABI.
    let stop = Arc::new(AtomicU32::new(Cancel::Run as u32));
    let (send_task, task) = std::sync::mpsc::channel();
    let heard = Arc::clone(&stop);
    std::thread::spawn(move || listen(inbox, &send_task, &heard));
    // The sender stays with the listener, which ends the process before it could be dropped.
    let Ok(task) = task.recv() else { leave() };
    let pump = Arc::clone(&outbox);
    std::thread::spawn(move || pump.pump());
    if matches!(&task.call, Call::Run { job, .. } if job.part.is_some()) {
        let heartbeat = Arc::clone(&outbox);
        std::thread::spawn(move || {
            loop {
                heartbeat.send(&FromWorker::Heartbeat);
                std::thread::sleep(heartbeat::BEAT);
            }
        });
    }
    work(*task, &outbox, stop);
    leave()
}

/// Loads the plugin, makes the call, sends the answer.
fn work(task: Task, outbox: &Arc<Outbox>, stop: Arc<AtomicU32>) {
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
    // Never dropped, because a thread of the plugin may still call after the end.
    let services: &'static Services = Box::leak(Box::new(Services {
        outbox: Arc::clone(outbox),
        stop,
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

/// Moves the socket that arrived as standard input out of the plugin's way, and leaves an empty input in its place.
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
    // SAFETY: the descriptor is new and nothing else owns it.
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
fn listen(mut socket: UnixStream, tasks: &std::sync::mpsc::Sender<Box<Task>>, stop: &AtomicU32) {
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
                Ok(Some(ToWorker::StopAtCheckpoint)) => {
                    stop.fetch_max(Cancel::AtCheckpoint as u32, Ordering::Relaxed);
                }
                Ok(Some(ToWorker::StopNow)) => {
                    stop.fetch_max(Cancel::Now as u32, Ordering::Relaxed);
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

/// Ends the process without running destructors: a plugin's may crash or hang.
fn leave() -> ! {
    let _ = std::io::stdout().flush();
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

/// A plugin's panic does not damage this data: these locks guard plain queues.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
