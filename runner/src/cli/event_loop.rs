//! The event loop of a command. At its end it does not wait for ever.

use std::ops::Deref;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// How long to wait at the end for threads whose results nobody needs any more: those that collect a killed worker, or read a
/// file. On a network disk that does not answer, neither ends.
const PATIENCE: Duration = Duration::from_secs(3);

/// A single-threaded runtime for the store and the executor, the only async code.
#[derive(Debug)]
pub struct EventLoop(Option<Runtime>);

impl EventLoop {
    /// Starts it.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn start() -> std::io::Result<Self> {
        Builder::new_current_thread()
            .enable_all()
            .build()
            .map(Some)
            .map(Self)
    }
}

impl Deref for EventLoop {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_timeout(PATIENCE);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::EventLoop;

    #[test]
    fn a_thread_that_does_not_end_keeps_no_command() {
        let (stay, told) = mpsc::channel::<()>();
        let events = EventLoop::start().unwrap();
        let stuck = events.spawn_blocking(move || told.recv());
        drop(events);
        assert!(!stuck.is_finished());
        drop(stay);
    }
}
