//! Memory that threads share: whoever needs some waits until there is enough.
//!
//! In: a number of bytes. Out: a guard that keeps them. Whoever needs more than there is gets all of it, alone: the limit is
//! [`MOST_MEMORY`].

use std::sync::{Condvar, Mutex, PoisonError};

/// The bytes of files in memory.
pub(super) static FILES: MemoryPool = MemoryPool::new(24 << 20);

/// The bytes that decoders of images use in addition to the files.
pub(super) static DECODERS: MemoryPool = MemoryPool::new(256 << 20);

/// The most memory that an image may take: its file, and its pixels as decoded and as converted.
pub(super) const MOST_MEMORY: u64 = 480 << 20;

/// A number of bytes for all threads.
#[derive(Debug)]
pub(super) struct MemoryPool {
    total: u64,
    taken: Mutex<u64>,
    freed: Condvar,
}

/// Bytes taken from a pool. Dropping it returns them.
#[derive(Debug)]
pub(super) struct MemoryPermit {
    pool: &'static MemoryPool,
    bytes: u64,
}

impl MemoryPool {
    pub(super) const fn new(total: u64) -> Self {
        Self {
            total,
            taken: Mutex::new(0),
            freed: Condvar::new(),
        }
    }

    /// Waits until so many bytes are free. A holder must not take more: that could deadlock.
    pub(super) fn take(&'static self, bytes: u64) -> MemoryPermit {
        let bytes = bytes.min(self.total);
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |taken: &mut u64| *taken + bytes > self.total;
        let taken = self.freed.wait_while(taken, is_full);
        *taken.unwrap_or_else(PoisonError::into_inner) += bytes;
        MemoryPermit { pool: self, bytes }
    }
}

impl Drop for MemoryPermit {
    fn drop(&mut self) {
        let taken = self.pool.taken.lock();
        *taken.unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.pool.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn threads_share_the_memory_of_one() {
        static POOL: MemoryPool = MemoryPool::new(10);
        static USED: AtomicU64 = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for number in 0..32 {
                scope.spawn(move || {
                    // Some need more than there is.
                    let bytes = [2, 3, 5, 1000][number % 4];
                    let _permit = POOL.take(bytes);
                    let own = bytes.min(10);
                    assert!(USED.fetch_add(own, Ordering::SeqCst) + own <= 10);
                    std::thread::yield_now();
                    USED.fetch_sub(own, Ordering::SeqCst);
                });
            }
        });
        assert_eq!(*POOL.taken.lock().unwrap(), 0);
    }
}
