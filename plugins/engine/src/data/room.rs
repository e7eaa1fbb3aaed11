//! Memory that threads share: whoever needs some waits until there is enough.
//!
//! In: a number of bytes. Out: a guard that keeps them. What needs more than there is gets all of it, alone: its limit is
//! [`MOST_MEMORY`].

use std::sync::{Condvar, Mutex, PoisonError};

/// The bytes of files in memory.
pub(super) static FILES: Room = Room::new(24 << 20);

/// The bytes that decoders of images use in addition to the files.
pub(super) static DECODERS: Room = Room::new(256 << 20);

/// The most memory that an image may take: its file, and its pixels as decoded and as converted.
pub(super) const MOST_MEMORY: u64 = 480 << 20;

/// So many bytes for all threads.
#[derive(Debug)]
pub(super) struct Room {
    all: u64,
    taken: Mutex<u64>,
    freed: Condvar,
}

/// Bytes of a room, until it is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    room: &'static Room,
    bytes: u64,
}

impl Room {
    pub(super) const fn new(all: u64) -> Self {
        Self {
            all,
            taken: Mutex::new(0),
            freed: Condvar::new(),
        }
    }

    /// Waits for room for so many bytes. Who has some of a room must not wait for more of it.
    pub(super) fn take(&'static self, bytes: u64) -> Taken {
        let bytes = bytes.min(self.all);
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |taken: &mut u64| *taken + bytes > self.all;
        let taken = self.freed.wait_while(taken, is_full);
        *taken.unwrap_or_else(PoisonError::into_inner) += bytes;
        Taken { room: self, bytes }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let taken = self.room.taken.lock();
        *taken.unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.room.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn threads_share_the_memory_of_one() {
        static ROOM: Room = Room::new(10);
        static USED: AtomicU64 = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for number in 0..32 {
                scope.spawn(move || {
                    // Some need more than there is.
                    let bytes = [2, 3, 5, 1000][number % 4];
                    let _room = ROOM.take(bytes);
                    let own = bytes.min(10);
                    assert!(USED.fetch_add(own, Ordering::SeqCst) + own <= 10);
                    std::thread::yield_now();
                    USED.fetch_sub(own, Ordering::SeqCst);
                });
            }
        });
        assert_eq!(*ROOM.taken.lock().unwrap(), 0);
    }
}
