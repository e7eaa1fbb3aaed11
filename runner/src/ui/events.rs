//! A stream of change notifications: browsers then reload what they show.
//!
//! It only checks the sizes and times of a few files: the databases, their write-ahead logs, and the progress of one run. It
//! makes no query, however many pages are open.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use hyper::body::Bytes;
use tokio::sync::mpsc;

use super::ServerState;
use super::reply::{Content, Reply, TEXT};
use super::request::PageRequest;
use crate::artifact::is_inner_path;
use crate::executor::progress_file;

/// How often files are checked.
const INTERVAL: Duration = Duration::from_millis(400);
/// After this many checks without a change, browsers are told to reload anyway: a runner's death changes no file.
const AGAIN: u32 = 12;
/// The most streams at a time.
const STREAMS: usize = 64;

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// A slot among the streams, released when dropped.
struct StreamPermit;

impl StreamPermit {
    fn take() -> Option<Self> {
        let taken = OPEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| {
            (open < STREAMS).then_some(open + 1)
        });
        taken.ok().map(|_| Self)
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The stream.
pub fn answer(site: &ServerState, request: &PageRequest) -> Reply {
    let Some(seat) = StreamPermit::take() else {
        return Reply::new(TEXT, "too many pages are open\n").status(503);
    };
    let mut files: Vec<PathBuf> = Vec::new();
    for served in &site.stores {
        files.extend(["history.db", "history.db-wal"].map(|name| served.dir().join(name)));
        // A run's name is untrusted until a store knows it, so it must not lead to another path.
        if let Some(run) = request
            .query
            .get("run")
            .filter(|run| is_inner_path(run) && !run.contains('/'))
        {
            files.push(progress_file::path(&served.layout.staging(run)));
        }
    }
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let _seat = seat;
        let mut seen = looks(&files);
        let mut quiet = 0;
        let mut message = "retry: 3000\n\n";
        loop {
            if sender
                .send(Ok(Bytes::from_static(message.as_bytes())))
                .await
                .is_err()
            {
                return;
            }
            loop {
                tokio::select! {
                    () = tokio::time::sleep(INTERVAL) => {}
                    () = sender.closed() => return,
                }
                let now = looks(&files);
                quiet += 1;
                if now != seen {
                    (seen, quiet, message) = (now, 0, "event: change\ndata: changed\n\n");
                    break;
                }
                if quiet >= AGAIN {
                    (quiet, message) = (0, "event: change\ndata: again\n\n");
                    break;
                }
            }
        }
    });
    Reply {
        content: Content::Streamed(receiver),
        ..Reply::new("text/event-stream", "")
    }
}

fn looks(files: &[PathBuf]) -> Vec<Option<(u64, SystemTime)>> {
    let look = |path: &PathBuf| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.len(), found.modified().ok()?))
    };
    files.iter().map(look).collect()
}
