//! One machine at a time writes to a store.
//!
//! SQLite's write-ahead log and the locks of work directories hold among the processes of one machine. A store on a
//! shared file system is seen by several, so the one that writes says so, in files that need no lock: `hosts/<n>` names
//! a machine (by its boot), or nobody. The file with the greatest number counts; the next is made by a hard link, which
//! only one can make, wherever they are. Processes of the machine that has the store share it.
//!
//! A machine that is gone is known by its heartbeat, which stands in its file: one that is old by this machine's clock is
//! watched for a while before its store is taken, because clocks differ.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use retort_checkpoint::regular;
use serde::{Deserialize, Serialize};

use super::StoreError;
use super::lease::{AHEAD_LIMIT, HEARTBEAT_LIMIT, Holder};
use super::time::Time;
use crate::artifact;

/// How long a heartbeat is watched that seems old: two of them, and some.
#[cfg(not(test))]
const WATCH: Duration = Duration::from_secs(12);
#[cfg(test)]
const WATCH: Duration = Duration::from_millis(700);
/// Files of earlier machines that are kept: who reads an old list of the directory goes on from one of them.
const KEPT: u64 = 16;
/// Bytes of a file, always: it is written over in its place.
const SIZE: usize = 512;

/// Who may write.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Host {
    host: String,
    boot: String,
    /// The process that took the store; others of its machine share it.
    pid: u32,
    /// The last heartbeat of any of them: milliseconds since 1970.
    at: i64,
    /// Nobody: the last process of the machine has left.
    free: bool,
}

/// This machine's right to write, for as long as a process of it holds this.
#[derive(Debug)]
pub(super) struct HostLock {
    dir: PathBuf,
    number: u64,
    host: Host,
    /// Shared with the other processes of this machine; none where the file system has no locks.
    lock: Option<File>,
}

/// Whether machines have said before that they write here.
pub(super) fn is_known(store: &Path) -> bool {
    store.join("hosts").exists()
}

/// Takes back that a machine has said so, where nothing else was made.
pub(super) fn forget(store: &Path) {
    let _ = fs::remove_dir_all(store.join("hosts"));
}

/// Takes the right to write to a store for this machine.
///
/// # Errors
/// [`StoreError::Elsewhere`]: another machine has it.
pub(super) async fn claim(store: &Path) -> Result<Option<HostLock>, StoreError> {
    let dir = store.join("hosts");
    let refused = |error| StoreError::refused(&dir, error);
    match fs::create_dir_all(&dir) {
        Ok(()) => {}
        // Nothing of it can be written: that will be said of the database.
        Err(error) if may_not_write(&error) => return Ok(None),
        Err(error) => return Err(refused(error)),
    }
    let lock = artifact::open_lock(&dir.join("lock")).ok();
    let lock = lock.filter(|file| file.try_lock_shared().is_ok());
    let this = Holder::this_process();
    let host = Host {
        host: this.host,
        boot: this.boot,
        pid: this.pid,
        at: Time::now().0,
        free: false,
    };
    loop {
        let current = current(&dir).map_err(refused)?;
        let next = match &current {
            None => 0,
            Some((number, found)) if !found.free && found.boot == host.boot => {
                let host_lock = HostLock {
                    dir: dir.clone(),
                    number: *number,
                    host,
                    lock,
                };
                let _ = host_lock.beat();
                return Ok(Some(host_lock));
            }
            Some((_, found)) if !found.free && lives(&dir, found, &host).await => {
                return Err(elsewhere(store, found));
            }
            Some((number, _)) => number + 1,
        };
        match put(&dir, next, &host) {
            Ok(()) => {
                for old in (0..next.saturating_sub(KEPT)).rev().take(2) {
                    let _ = fs::remove_file(dir.join(old.to_string()));
                }
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) if may_not_write(&error) => return Ok(None),
            Err(error) => return Err(refused(error)),
        }
    }
}

/// Whether a store may be read here: not while another machine writes to it, whose log this one would not see.
///
/// # Errors
/// [`StoreError::Elsewhere`].
pub(super) fn check(store: &Path) -> Result<(), StoreError> {
    let Ok(Some((_, found))) = current(&store.join("hosts")) else {
        return Ok(());
    };
    let this = Holder::this_process();
    match found.free || found.boot == this.boot || is_old(&found) || found.host == this.host {
        true => Ok(()),
        false => Err(elsewhere(store, &found)),
    }
}

fn elsewhere(store: &Path, found: &Host) -> StoreError {
    StoreError::Elsewhere {
        path: store.to_owned(),
        host: found.host.clone(),
        pid: found.pid,
    }
}

/// Of a time that has passed long ago, or that is far from having come.
fn is_old(found: &Host) -> bool {
    let (now, at) = (Time::now(), Time(found.at));
    now.since(at) > HEARTBEAT_LIMIT || at.since(now) > AHEAD_LIMIT
}

/// Whether another machine still uses it.
async fn lives(dir: &Path, found: &Host, this: &Host) -> bool {
    // One of the same name was this machine before it was started again, as far as can be told.
    if !is_old(found) && found.host != this.host {
        return true;
    }
    let began = Time::now();
    while Time::now().since(began) < WATCH {
        tokio::time::sleep(Duration::from_millis(500)).await;
        match current(dir) {
            Ok(Some((_, now))) if now == *found => {}
            Ok(Some((_, now))) => return !now.free && now.boot != this.boot,
            _ => return false,
        }
    }
    false
}

/// The file that counts.
fn current(dir: &Path) -> io::Result<Option<(u64, Host)>> {
    for _ in 0..20 {
        let names = match fs::read_dir(dir) {
            Ok(entries) => entries.flatten().map(|entry| entry.file_name()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let numbers = names.filter_map(|name| name.to_str()?.parse::<u64>().ok());
        // More numbers than hosts can have taken: nobody wrote it.
        let numbers = numbers.filter(|number| *number < u64::MAX / 2);
        let Some(mut number) = numbers.max() else {
            return Ok(None);
        };
        // The list may be of a while ago.
        while fs::symlink_metadata(dir.join((number + 1).to_string())).is_ok() {
            number += 1;
        }
        // It may be written over just now.
        if let Ok(bytes) = regular::read(&dir.join(number.to_string()), SIZE as u64)
            && let Ok(host) = serde_json::from_slice(&bytes)
        {
            return Ok(Some((number, host)));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(io::Error::other(
        "its content is invalid; remove it if no retort uses the store",
    ))
}

/// The bytes of a file.
fn bytes(host: &Host) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(host).unwrap_or_default();
    bytes.resize(SIZE.max(bytes.len()), b' ');
    bytes
}

/// Makes a file of this number, whole, unless there is one.
fn put(dir: &Path, number: u64, host: &Host) -> io::Result<()> {
    let draft = tempfile::Builder::new().prefix(".host").tempfile_in(dir)?;
    draft.as_file().write_all_at(&bytes(host), 0)?;
    draft.as_file().sync_all()?;
    fs::hard_link(draft.path(), dir.join(number.to_string()))
}

impl HostLock {
    /// Says that this machine still has the store.
    pub(super) fn beat(&self) -> io::Result<()> {
        let host = Host {
            at: Time::now().0,
            ..self.host.clone()
        };
        let path = self.dir.join(self.number.to_string());
        File::options()
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?
            .write_all_at(&bytes(&host), 0)
    }
}

impl Drop for HostLock {
    /// The last process of this machine leaves the store free.
    fn drop(&mut self) {
        let Some(lock) = self.lock.take() else { return };
        let _ = lock.unlock();
        match lock.try_lock() {
            Ok(()) => {
                let free = Host {
                    free: true,
                    at: Time::now().0,
                    ..self.host.clone()
                };
                if current(&self.dir)
                    .is_ok_and(|now| now.is_some_and(|(number, _)| number == self.number))
                {
                    let _ = put(&self.dir, self.number + 1, &free);
                }
                // Closing is not enough: a process that is being started has a copy of this descriptor for a moment, and
                // who comes meanwhile would find the lock taken.
                let _ = lock.unlock();
            }
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

/// Whether somebody may read a store and not write to it.
fn may_not_write(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn other(at: i64) -> Host {
        Host {
            host: "login2".into(),
            boot: "another".into(),
            pid: 4711,
            at,
            free: false,
        }
    }

    #[tokio::test]
    async fn processes_of_one_machine_share_a_store_and_leave_it_free() {
        let root = tempfile::tempdir().unwrap();
        let first = claim(root.path()).await.unwrap().unwrap();
        let second = claim(root.path()).await.unwrap().unwrap();
        assert_eq!((first.number, second.number), (0, 0));
        check(root.path()).unwrap();
        drop(first);
        let dir = root.path().join("hosts");
        assert!(
            !current(&dir).unwrap().unwrap().1.free,
            "one is still there"
        );
        drop(second);
        assert!(current(&dir).unwrap().unwrap().1.free);
        // Another machine may take it then.
        put(&dir, 2, &other(Time::now().0)).unwrap();
        put(&dir, 2, &other(0)).unwrap_err();
        for error in [
            claim(root.path()).await.unwrap_err(),
            check(root.path()).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("login2") && text.contains("4711"), "{text}");
        }
    }

    #[tokio::test]
    async fn the_store_of_a_machine_that_is_gone_is_taken() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("hosts");
        fs::create_dir(&dir).unwrap();
        // Its clock may be an hour behind: while its heart beats it has the store.
        put(&dir, 0, &other(Time::now().0 - 3_600_000)).unwrap();
        check(root.path()).unwrap();
        for number in 0..30 {
            let claimed = claim(root.path()).await.unwrap().unwrap();
            assert_eq!(claimed.number, 2 * number + 1);
            claimed.beat().unwrap();
            drop(claimed);
        }
        assert!(fs::read_dir(&dir).unwrap().count() < 30, "old ones go");
    }

    #[tokio::test]
    async fn a_time_that_has_not_come_and_a_link_hold_no_store() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("hosts");
        fs::create_dir(&dir).unwrap();
        put(&dir, 0, &other(Time::now().0 + 40 * 24 * 3_600_000)).unwrap();
        fs::write(dir.join(u64::MAX.to_string()), "").unwrap();
        check(root.path()).unwrap();
        let claimed = claim(root.path()).await.unwrap().unwrap();
        assert_eq!(claimed.number, 1);
        let mine = root.path().join("mine");
        fs::write(&mine, "mine").unwrap();
        fs::remove_file(dir.join("1")).unwrap();
        std::os::unix::fs::symlink(&mine, dir.join("1")).unwrap();
        claimed.beat().unwrap_err();
        assert_eq!(fs::read(&mine).unwrap(), b"mine");
    }
}
