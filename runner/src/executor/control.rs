//! The user's signals to the runs of this process: received once and passed on to each.
//!
//! The first Ctrl-C or similar signal asks runs to stop at a checkpoint, the second ends them at once; Ctrl-Z pauses the
//! whole process.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::executor::pause::PauseClock;

/// Sends signals to all runs of this process.
#[derive(Debug, Clone)]
pub struct Control {
    heard: Arc<watch::Sender<Vec<i32>>>,
    pub(super) pauses: Arc<PauseClock>,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            heard: Arc::new(watch::Sender::new(Vec::new())),
            pauses: Arc::default(),
        }
    }
}

impl Control {
    /// Passes a signal on. To be called on the event loop's thread.
    pub fn send(&self, signal: i32) {
        match signal {
            libc::SIGTSTP => self.pauses.stop(),
            signal => self.heard.send_modify(|heard| heard.push(signal)),
        }
    }

    /// The first signal that requested the end.
    pub fn first(&self) -> Option<i32> {
        self.heard.borrow().first().copied()
    }

    /// A run's receiver of signals that it has not handled yet.
    pub(super) fn follow(&self) -> Follower {
        Follower {
            heard: self.heard.subscribe(),
            known: 0,
        }
    }
}

/// The pending signals of one run.
#[derive(Debug)]
pub(super) struct Follower {
    heard: watch::Receiver<Vec<i32>>,
    known: usize,
}

impl Follower {
    /// The next signal.
    pub(super) async fn next(&mut self) -> i32 {
        let known = self.known;
        match self.heard.wait_for(|heard| heard.len() > known).await {
            Ok(heard) => {
                self.known += 1;
                heard[known]
            }
            // Nobody can pull any more.
            Err(_) => std::future::pending().await,
        }
    }
}

/// The signals that end or pause a run. Signals that were ignored when the program started (`nohup`, a background job of a
/// script) stay ignored.
pub struct Signals {
    interrupt: Option<Signal>,
    terminate: Option<Signal>,
    hangup: Option<Signal>,
    stop: Option<Signal>,
}

impl Signals {
    /// This disables their default effect.
    ///
    /// # Errors
    /// The system's.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            stop: listen(SignalKind::from_raw(libc::SIGTSTP))?,
        })
    }

    /// The next one.
    pub async fn next(&mut self) -> i32 {
        tokio::select! {
            () = receive(&mut self.interrupt) => libc::SIGINT,
            () = receive(&mut self.terminate) => libc::SIGTERM,
            () = receive(&mut self.hangup) => libc::SIGHUP,
            () = receive(&mut self.stop) => libc::SIGTSTP,
        }
    }
}

fn listen(kind: SignalKind) -> std::io::Result<Option<Signal>> {
    // SAFETY: only queries the current action; the call fills the structure when it succeeds.
    let ignored = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(kind.as_raw_value(), std::ptr::null(), &mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    };
    if ignored {
        Ok(None)
    } else {
        signal(kind).map(Some)
    }
}

/// Waits for a signal; forever if it is ignored.
async fn receive(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}
