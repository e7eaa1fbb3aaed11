//! A stream that says when something has changed: browsers then ask for what they show again.
//!
//! What is looked at are the sizes and times of a few files: the databases, what is written ahead of them, and the progress
//! of one run. No query is made, however many pages are open.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use hyper::body::Bytes;
use tokio::sync::mpsc;

use super::Site;
use super::reply::{Content, Reply, TEXT};
use super::request::PageRequest;
use crate::artifact::is_inner_path;
use crate::executor::gauge;

/// How often files are looked at.
const INTERVAL: Duration = Duration::from_millis(400);
/// After so many looks without a change browsers are told to look all the same: that a runner has died changes no file.
const AGAIN: u32 = 12;
/// Most streams at a time.
const STREAMS: usize = 64;

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// A place among the streams, given back when dropped.
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
pub fn answer(site: &Site, request: &PageRequest) -> Reply {
    let Some(seat) = StreamPermit::take() else {
        return Reply::new(TEXT, "too many pages are open\n").status(503);
    };
    let mut files: Vec<PathBuf> = Vec::new();
    for served in &site.stores {
        files.extend(["history.db", "history.db-wal"].map(|name| served.dir().join(name)));
        // The name of a run is somebody's text until a store knows it: it names no other place.
        if let Some(run) = request
            .query
            .get("run")
            .filter(|run| is_inner_path(run) && !run.contains('/'))
        {
            files.push(gauge::path(&served.layout.staging(run)));
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
        content: Content::Pieces(receiver),
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
