//! A uniquely identified process, and whether it is alive.
//!
//! It is identified by machine boot, pid namespace, pid, and start time (pids are reused; a pid with another start time is a
//! different process). If the reader has the same boot and namespace, the process table decides, whatever the clock says.
//! Otherwise (another machine or container) only the age of the heartbeat can.

use std::time::Duration;

use super::time::Time;

/// A heartbeat older than this, seen from another machine, means that the runner is gone. Runners send one every few seconds;
/// the rest allows for clock differences and busy disks.
pub(super) const HEARTBEAT_LIMIT: Duration = Duration::from_secs(120);

/// How far another machine's clock may be ahead.
pub(super) const AHEAD_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// A uniquely identified process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) host: String,
    pub(super) boot: String,
    pub(super) pid_namespace: String,
    pub(super) pid: u32,
    pub(super) process_started: u64,
}

impl Holder {
    /// This process.
    pub(super) fn this_process() -> Self {
        let read = |path: &str| {
            std::fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let pid = std::process::id();
        Self {
            host: read("/proc/sys/kernel/hostname"),
            boot: read("/proc/sys/kernel/random/boot_id"),
            pid_namespace: std::fs::read_link("/proc/self/ns/pid")
                .map(|link| link.to_string_lossy().into_owned())
                .unwrap_or_default(),
            pid,
            process_started: started(pid).unwrap_or_default(),
        }
    }

    /// Whether this process still lives, as far as `reader` can tell.
    pub(super) fn lives(&self, reader: &Holder, heartbeat: Time, now: Time) -> bool {
        if self.boot == reader.boot
            && self.pid_namespace == reader.pid_namespace
            && !self.boot.is_empty()
        {
            started(self.pid) == Some(self.process_started)
        } else {
            // A clock may be ahead of ours, but not so far that the run would never end.
            now.since(heartbeat) <= HEARTBEAT_LIMIT && heartbeat.since(now) <= AHEAD_LIMIT
        }
    }
}

/// A process's start time, in clock ticks since boot; None if it does not exist or is a zombie.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in brackets, may hold spaces and brackets: count from behind it.
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl Fn(&mut Holder), heartbeat_age_s: i64, lives: bool) {
        let reader = Holder::this_process();
        let mut holder = reader.clone();
        change(&mut holder);
        let now = Time::now();
        assert_eq!(
            holder.lives(&reader, Time(now.0 - heartbeat_age_s * 1000), now),
            lives,
            "{holder:?}"
        );
    }

    #[test]
    fn on_the_same_machine_the_process_decides_and_not_the_clock() {
        check(|_| {}, 1_000_000, true);
        check(|_| {}, -1_000_000, true);
        check(|holder| holder.process_started += 1, 0, false);
        check(|holder| holder.pid = 0x7fff_fff0, 0, false);
    }

    #[test]
    fn elsewhere_the_heartbeat_decides() {
        check(|holder| holder.boot = "another".into(), 1, true);
        check(|holder| holder.boot = "another".into(), 1_000, false);
        check(
            |holder| (holder.pid, holder.pid_namespace) = (1, "another container".into()),
            1,
            true,
        );
        check(
            |holder| (holder.pid, holder.pid_namespace) = (1, "another container".into()),
            1_000,
            false,
        );
        // A clock ahead of ours does not make a run lost.
        check(|holder| holder.boot = "another".into(), -1_000, true);
        // No clock is ahead by days: such a run would otherwise never end.
        let far = i64::try_from(AHEAD_LIMIT.as_secs()).unwrap() + 60;
        check(|holder| holder.boot = "another".into(), -far, false);
        check(
            |holder| holder.boot = "another".into(),
            -1_000_000_000,
            false,
        );
    }

    #[test]
    fn the_remains_of_a_process_do_not_live() {
        let mut child = std::process::Command::new("true")
            .spawn()
            .expect("`true` exists");
        let pid = child.id();
        // Not yet waited for, the child becomes a zombie: present in the process table, gone for us.
        while started(pid).is_some() {
            std::thread::yield_now();
        }
        child.wait().expect("own child");
        assert_eq!(started(pid), None);
    }
}
