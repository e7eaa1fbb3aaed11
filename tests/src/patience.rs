//! An end to programs that tests would wait for forever.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

use crate::process::ProcessStat;

/// How long a program that a test has started may run, on a machine that may be very busy.
const LIMIT: Duration = Duration::from_secs(600);

/// From now on, kills each child of this process that has run for ten minutes, and says so. Its test then fails, instead of
/// waiting forever.
pub fn limit_children() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(thread::spawn(watch)));
}

fn watch() {
    let mut seen: HashMap<(i32, u64), Instant> = HashMap::new();
    loop {
        let now: Vec<(i32, u64)> = children()
            .into_iter()
            .filter_map(|child| Some((child, started(child)?)))
            .collect();
        seen.retain(|child, _| now.contains(child));
        for child in now {
            let since = seen.entry(child).or_insert_with(Instant::now);
            if since.elapsed() > LIMIT {
                kill(child.0, child.1);
            }
        }
        thread::sleep(Duration::from_secs(2));
    }
}

/// The processes that this one has started, in any thread.
fn children() -> Vec<i32> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten();
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|ids| {
            ids.split_whitespace()
                .filter_map(|id| id.parse().ok())
                .collect::<Vec<i32>>()
        })
        .collect()
}

/// When a process started: with its number, this names it for good.
fn started(process: i32) -> Option<u64> {
    let stat = ProcessStat::of(process.try_into().ok()?)?;
    Some(stat.started)
}

fn kill(process: i32, start: u64) {
    // SAFETY: plain system calls; the descriptor is new and nobody else's.
    unsafe {
        let descriptor = libc::syscall(libc::SYS_pidfd_open, process, 0);
        let Ok(descriptor @ 0..) = i32::try_from(descriptor) else {
            return;
        };
        let descriptor = OwnedFd::from_raw_fd(descriptor);
        // The descriptor belongs to the process that had this number when it was opened.
        if started(process) != Some(start) {
            return;
        }
        let arguments = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        // Written past the test harness, which would keep it for a test that may never end.
        let _ = writeln!(
            std::io::stderr(),
            "*** killed, because a test waited for it for more than {} s: {arguments}***",
            LIMIT.as_secs()
        );
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            descriptor.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
}
