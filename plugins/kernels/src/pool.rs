//! Threads that share work.

use std::sync::Mutex;

use rayon::prelude::*;

/// Threads of a library.
pub trait Pool: Sync {
    /// How many there are.
    fn threads(&self) -> usize;

    /// Runs a task with each number below `count`, in any order, and returns when all are done.
    fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync));
}

/// rayon's threads.
#[derive(Debug, Clone, Copy)]
pub struct Rayon;

impl Pool for Rayon {
    fn threads(&self) -> usize {
        rayon::current_num_threads()
    }

    fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..count).into_par_iter().for_each(task);
    }
}

/// The calling thread alone.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl Pool for Alone {
    fn threads(&self) -> usize {
        1
    }

    fn each(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(task);
    }
}

/// Runs a task with each `size` elements of `out`, the last ones perhaps fewer, and their number.
pub(crate) fn chunks<T: Send>(
    pool: &impl Pool,
    out: &mut [T],
    size: usize,
    task: impl Fn(usize, &mut [T]) + Sync,
) {
    // Nobody ever waits for a lock: each is taken once.
    let parts: Vec<Mutex<&mut [T]>> = out.chunks_mut(size).map(Mutex::new).collect();
    pool.each(parts.len(), &|i| {
        if let Ok(mut part) = parts[i].lock() {
            task(i, &mut part);
        }
    });
}
