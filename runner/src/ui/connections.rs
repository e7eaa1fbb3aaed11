//! The open connections of the server. They are limited; a new one takes the place of the one that has been idle longest, so
//! that callers who send nothing, or read nothing, keep nobody out.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::AbortHandle;

/// The most connections at a time.
const MOST: usize = 256;

/// When something last happened on a connection.
#[derive(Debug)]
pub struct Activity {
    since: Instant,
    /// Milliseconds from `since` to the last byte that was read or written.
    last: AtomicU64,
    /// Requests that are being answered.
    at_work: AtomicUsize,
}

impl Default for Activity {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            last: AtomicU64::new(0),
            at_work: AtomicUsize::new(0),
        }
    }
}

impl Activity {
    /// Records that an answer is being made, until the result is dropped.
    pub fn begin(&self) -> impl Drop {
        struct AtWork<'a>(&'a Activity);
        impl Drop for AtWork<'_> {
            fn drop(&mut self) {
                self.0.at_work.fetch_sub(1, Ordering::Relaxed);
                self.0.happened();
            }
        }
        self.at_work.fetch_add(1, Ordering::Relaxed);
        AtWork(self)
    }

    fn happened(&self) {
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// When it was last active; None while an answer is being made.
    fn idle_since(&self) -> Option<Instant> {
        let last = std::time::Duration::from_millis(self.last.load(Ordering::Relaxed));
        (self.at_work.load(Ordering::Relaxed) == 0).then(|| self.since + last)
    }
}

/// All open connections.
#[derive(Debug, Default)]
pub struct Connections {
    open: Vec<(AbortHandle, Arc<Activity>)>,
}

impl Connections {
    /// If there are as many as may be, closes the one that has been idle longest. If all are at work, one more is allowed: each
    /// ends in bounded time.
    pub fn make_room(&mut self) {
        if self.open.len() < MOST {
            return;
        }
        self.open.retain(|(task, _)| !task.is_finished());
        let idle = self.open.iter().enumerate();
        let idle = idle.filter_map(|(place, (_, activity))| Some((activity.idle_since()?, place)));
        if self.open.len() >= MOST
            && let Some((_, place)) = idle.min()
        {
            self.open.swap_remove(place).0.abort();
        }
    }

    /// Adds one.
    pub fn add(&mut self, task: AbortHandle, activity: Arc<Activity>) {
        self.open.push((task, activity));
    }
}

/// A stream that records its activity.
#[derive(Debug)]
pub struct Observed<S> {
    stream: S,
    activity: Arc<Activity>,
}

impl<S> Observed<S> {
    /// Records the activity of a stream.
    pub fn new(stream: S, activity: &Arc<Activity>) -> Self {
        Self {
            stream,
            activity: Arc::clone(activity),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Observed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if read.is_ready() {
            self.activity.happened();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Observed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if written.is_ready() {
            self.activity.happened();
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        if written.is_ready() {
            self.activity.happened();
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
