//! One machine at a time writes to a store.
//!
//! SQLite's write-ahead log and the locks of work directories hold among the processes of one machine. A store on a shared
//! file system is visible to several machines, so the writing machine claims it in files that need no locks: `hosts/<n>`
//! names a machine (by its boot), or nobody. The file with the greatest number counts; the next one is created by a hard
//! link, which succeeds for only one process anywhere. Processes on the owning machine share the store.
//!
//! A dead machine is detected by the heartbeat in its file. If it is old by this machine's clock it is watched for a while
//! before the store is taken, because clocks differ. A machine that was only suspended may come back after that: so an owner
//! checks with every heartbeat and before every write that its number is still the greatest, and stops writing if it is not.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use retort_checkpoint::regular;
use serde::{Deserialize, Serialize};

use super::StoreError;
use super::holder::{AHEAD_LIMIT, HEARTBEAT_LIMIT, Holder};
use super::time::Time;
use crate::artifact;

/// How long an old heartbeat is watched: somewhat more than two intervals.
#[cfg(not(test))]
const WATCH: Duration = Duration::from_secs(12);
#[cfg(test)]
const WATCH: Duration = Duration::from_millis(700);
/// The heartbeat interval. It has its own thread, so that neither an import nor a full disk delays it.
const BEAT: Duration = Duration::from_secs(4);
/// How long ownership is assumed without checking: less than others watch before they take a store.
const BELIEVED: Duration = Duration::from_secs(6);
/// The longest time that a process leaving the store holds the lock exclusively.
const LEAVING: Duration = Duration::from_secs(2);
/// Number of older files that are kept, for readers with a stale directory listing.
const KEPT: u64 = 16;
/// The fixed size of a file, which is overwritten in place.
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
    /// Whether the claim is free, because the last process of the machine has left.
    free: bool,
}

/// How a machine claims the right to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClaimKind {
    /// For longer work: if the owner seems dead it is watched, and then its store is taken.
    Lasting,
    /// For recording something in passing: without waiting, and without taking another machine's store.
    Moment,
}

/// This machine's right to write, for as long as a process of it holds this.
#[derive(Debug)]
pub(super) struct HostLock {
    claim: Arc<Claim>,
    /// Dropping it ends the heartbeat thread.
    _beating: Option<mpsc::Sender<()>>,
    /// Shared with the other processes of this machine; None if the file system has no locks.
    lock: Option<File>,
}

/// This machine's claim on a store.
#[derive(Debug)]
struct Claim {
    dir: PathBuf,
    number: u64,
    host: Host,
    /// The time of the last check for a greater number, by two clocks: one stops while the machine sleeps, the other can be
    /// set by people.
    seen: Mutex<(Instant, Time)>,
    /// The machine that has taken the store.
    lost_to: OnceLock<Host>,
}

/// Whether a machine has claimed this store before.
pub(super) fn is_known(store: &Path) -> bool {
    store.join("hosts").exists()
}

/// Withdraws the first claim if nothing else was created.
pub(super) fn forget(store: &Path) {
    let _ = fs::remove_dir_all(store.join("hosts"));
}

/// Takes the right to write to a store for this machine.
///
/// # Errors
/// [`StoreError::Elsewhere`]: another machine has it.
pub(super) async fn claim(store: &Path, term: ClaimKind) -> Result<Option<HostLock>, StoreError> {
    let dir = store.join("hosts");
    let refused = |error| StoreError::refused(&dir, error);
    match fs::create_dir_all(&dir) {
        Ok(()) => {}
        // The directory is not writable: opening the database will report that.
        Err(error) if may_not_write(&error) => return Ok(None),
        Err(error) => return Err(refused(error)),
    }
    // Before looking who has it: a process of this machine that leaves the store free does so under its lock.
    let lock = share_lock(&dir).await;
    let host = Host::this();
    loop {
        let current = current(&dir).map_err(refused)?;
        let next = match &current {
            None => 0,
            Some((number, found)) if !found.free && found.boot == host.boot => {
                return Ok(Some(HostLock::new(dir, *number, host, lock, term)));
            }
            Some((_, found)) if !found.free && term == ClaimKind::Moment => {
                return Err(elsewhere(store, found));
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

/// The lock that the processes of this machine share; None if the file system has no locks.
async fn share_lock(dir: &Path) -> Option<File> {
    let file = artifact::open_lock(&dir.join("lock")).ok()?;
    let began = Instant::now();
    loop {
        match file.try_lock_shared() {
            Ok(()) => return Some(file),
            Err(TryLockError::WouldBlock) if began.elapsed() < LEAVING => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(_) => return None,
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

/// A time long ago, or far in the future.
fn is_old(found: &Host) -> bool {
    let (now, at) = (Time::now(), Time(found.at));
    now.since(at) > HEARTBEAT_LIMIT || at.since(now) > AHEAD_LIMIT
}

/// Whether another machine still uses it.
async fn lives(dir: &Path, found: &Host, this: &Host) -> bool {
    // A machine with the same name is probably this one before a reboot.
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

/// The greatest number.
fn newest(dir: &Path) -> io::Result<Option<u64>> {
    let names = match fs::read_dir(dir) {
        Ok(entries) => entries.flatten().map(|entry| entry.file_name()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let numbers = names.filter_map(|name| name.to_str()?.parse::<u64>().ok());
    // More numbers than machines can have claimed: this file was not written by retort.
    let numbers = numbers.filter(|number| *number < u64::MAX / 2);
    let Some(mut number) = numbers.max() else {
        return Ok(None);
    };
    // The listing may be stale.
    while fs::symlink_metadata(dir.join((number + 1).to_string())).is_ok() {
        number += 1;
    }
    Ok(Some(number))
}

/// The file that counts.
fn current(dir: &Path) -> io::Result<Option<(u64, Host)>> {
    for _ in 0..20 {
        let Some(number) = newest(dir)? else {
            return Ok(None);
        };
        // It may be being overwritten.
        if let Ok(bytes) = regular::read(&dir.join(number.to_string()), SIZE as u64)
            && let Ok(host) = serde_json::from_slice(&bytes)
        {
            return Ok(Some((number, host)));
        }
        thread::sleep(Duration::from_millis(20));
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

/// Makes a complete file with this number, unless there is one.
fn put(dir: &Path, number: u64, host: &Host) -> io::Result<()> {
    let draft = tempfile::Builder::new().prefix(".host").tempfile_in(dir)?;
    draft.as_file().write_all_at(&bytes(host), 0)?;
    draft.as_file().sync_all()?;
    fs::hard_link(draft.path(), dir.join(number.to_string()))
}

impl Host {
    /// This machine, by this process.
    fn this() -> Self {
        let this = Holder::this_process();
        Self {
            host: this.host,
            boot: this.boot,
            pid: this.pid,
            at: Time::now().0,
            free: false,
        }
    }
}

impl HostLock {
    fn new(dir: PathBuf, number: u64, host: Host, lock: Option<File>, term: ClaimKind) -> Self {
        let claim = Arc::new(Claim {
            dir,
            number,
            host,
            seen: Mutex::new((Instant::now(), Time::now())),
            lost_to: OnceLock::new(),
        });
        let _ = claim.beat();
        let beating = (term == ClaimKind::Lasting).then(|| keep_beating(&claim));
        Self {
            claim,
            _beating: beating,
            lock,
        }
    }

    /// Renews this machine's claim.
    ///
    /// # Errors
    /// [`StoreError::Elsewhere`]: another machine has taken the store. Others: the claim cannot be read or written.
    pub(super) async fn beat(&self) -> Result<(), StoreError> {
        self.apart(Claim::beat).await
    }

    /// Makes sure that this machine still has the store. Usually that costs nothing, because it was checked a moment ago.
    ///
    /// # Errors
    /// [`StoreError::Elsewhere`]: another machine has taken the store. Others: the claim cannot be read.
    pub(super) async fn confirm(&self) -> Result<(), StoreError> {
        match self.claim.lost_to.get() {
            Some(found) => Err(self.claim.lost(found)),
            None if self.claim.is_believed() => Ok(()),
            None => self.apart(Claim::look).await,
        }
    }

    /// As after a long suspension: the last check was long ago.
    #[cfg(test)]
    pub(super) fn disbelieve(&self) {
        self.claim.seen.lock().unwrap().1 = Time(0);
    }

    /// Runs a file operation on a thread: a hanging file system must not block everything else.
    async fn apart(
        &self,
        work: impl FnOnce(&Claim) -> Result<(), StoreError> + Send + 'static,
    ) -> Result<(), StoreError> {
        let claim = Arc::clone(&self.claim);
        let done = tokio::task::spawn_blocking(move || work(&claim)).await;
        done.unwrap_or_else(|error| {
            Err(StoreError::refused(
                &self.claim.dir,
                io::Error::other(error),
            ))
        })
    }
}

/// Sends heartbeats until the sender is dropped.
fn keep_beating(claim: &Arc<Claim>) -> mpsc::Sender<()> {
    let (stop, stopped) = mpsc::channel();
    let claim = Arc::clone(claim);
    let beating = thread::Builder::new().name("store".into());
    let begun = beating.spawn(move || {
        while stopped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
            if let Err(error) = claim.beat() {
                tracing::debug!("the store's heartbeat: {error}");
            }
        }
    });
    if let Err(error) = begun {
        tracing::debug!("the store's heartbeat: {error}");
    }
    stop
}

impl Claim {
    fn lost(&self, found: &Host) -> StoreError {
        elsewhere(self.dir.parent().unwrap_or(&self.dir), found)
    }

    fn is_believed(&self) -> bool {
        let (monotonic, wall) = *self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Time::now();
        monotonic.elapsed() < BELIEVED && now.since(wall).max(wall.since(now)) < BELIEVED
    }

    /// Checks whether another machine has taken the store.
    fn look(&self) -> Result<(), StoreError> {
        if let Some(found) = self.lost_to.get() {
            return Err(self.lost(found));
        }
        let before = (Instant::now(), Time::now());
        let refused = |error| StoreError::refused(&self.dir, error);
        if newest(&self.dir)
            .map_err(refused)?
            .is_some_and(|number| number > self.number)
            && let Some((_, found)) = current(&self.dir).map_err(refused)?
        {
            // Permanently: this process has not seen the writes since then.
            return Err(self.lost(self.lost_to.get_or_init(|| found)));
        }
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = before;
        Ok(())
    }

    fn beat(&self) -> Result<(), StoreError> {
        self.look()?;
        let host = Host {
            at: Time::now().0,
            ..self.host.clone()
        };
        let path = self.dir.join(self.number.to_string());
        File::options()
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path)
            .and_then(|file| file.write_all_at(&bytes(&host), 0))
            .map_err(|error| StoreError::refused(&path, error))
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
                    ..self.claim.host.clone()
                };
                let (dir, number) = (&self.claim.dir, self.claim.number);
                if newest(dir).is_ok_and(|newest| newest == Some(number)) {
                    let _ = put(dir, number + 1, &free);
                }
                // Closing is not enough: a child process that is just being started briefly has a copy of this descriptor,
                // and another process that arrives in that time would find the lock taken.
                let _ = lock.unlock();
            }
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

/// Whether the error means that the store is readable but not writable.
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
        let first = claim(root.path(), ClaimKind::Lasting)
            .await
            .unwrap()
            .unwrap();
        let second = claim(root.path(), ClaimKind::Lasting)
            .await
            .unwrap()
            .unwrap();
        assert_eq!((first.claim.number, second.claim.number), (0, 0));
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
            claim(root.path(), ClaimKind::Lasting).await.unwrap_err(),
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
            let claimed = claim(root.path(), ClaimKind::Lasting)
                .await
                .unwrap()
                .unwrap();
            assert_eq!(claimed.claim.number, 2 * number + 1);
            claimed.beat().await.unwrap();
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
        let claimed = claim(root.path(), ClaimKind::Lasting)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(claimed.claim.number, 1);
        let mine = root.path().join("mine");
        fs::write(&mine, "mine").unwrap();
        fs::remove_file(dir.join("1")).unwrap();
        std::os::unix::fs::symlink(&mine, dir.join("1")).unwrap();
        claimed.beat().await.unwrap_err();
        assert_eq!(fs::read(&mine).unwrap(), b"mine");
    }

    #[tokio::test]
    async fn who_was_stopped_and_comes_back_has_the_store_no_more() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("hosts");
        let claimed = claim(root.path(), ClaimKind::Moment)
            .await
            .unwrap()
            .unwrap();
        claimed.confirm().await.unwrap();
        // Another machine has taken it and released it.
        put(&dir, 1, &other(Time::now().0)).unwrap();
        let free = Host {
            free: true,
            ..other(Time::now().0)
        };
        put(&dir, 2, &free).unwrap();
        claimed.confirm().await.expect("seen a moment ago");
        claimed.disbelieve();
        for _ in 0..2 {
            let error = claimed.confirm().await.unwrap_err().to_string();
            assert!(error.contains("login2"), "{error}");
        }
        let before = fs::read(dir.join("0")).unwrap();
        claimed.beat().await.unwrap_err();
        assert_eq!(fs::read(dir.join("0")).unwrap(), before);
        drop(claimed);
        assert_eq!(newest(&dir).unwrap(), Some(2), "it leaves nothing free");
    }

    #[tokio::test]
    async fn for_a_moment_no_machine_s_store_is_taken() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("hosts");
        fs::create_dir(&dir).unwrap();
        put(&dir, 0, &other(0)).unwrap();
        check(root.path()).unwrap();
        let error = claim(root.path(), ClaimKind::Moment).await.unwrap_err();
        assert!(matches!(error, StoreError::Elsewhere { .. }), "{error}");
        assert_eq!(newest(&dir).unwrap(), Some(0));
    }

    #[tokio::test]
    async fn many_come_and_go_and_none_loses_the_store() {
        let root = tempfile::tempdir().unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let path = root.path().to_owned();
            tasks.spawn(async move {
                for _ in 0..10 {
                    let claimed = claim(&path, ClaimKind::Moment).await.unwrap().unwrap();
                    claimed.beat().await.unwrap();
                    tokio::task::yield_now().await;
                    claimed.beat().await.unwrap();
                }
            });
        }
        tasks.join_all().await;
    }
}
