//! Ranks in one process: threads that exchange through shared memory.

use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use retort_engine::collective::Collective;
use retort_engine::error::Result;

/// The shared state of all ranks.
struct Shared {
    sum: Mutex<Vec<f32>>,
    all: Barrier,
}

/// One rank.
pub struct ThreadRank {
    number: usize,
    size: usize,
    shared: Arc<Shared>,
    /// The lengths of the sums, in order.
    pub sums: Mutex<Vec<usize>>,
    /// How long exchanges may wait, as it was set.
    pub patience: Mutex<Vec<Option<Duration>>>,
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.number
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        self.sums.lock().expect("lengths").push(values.len());
        self.exchange(values, true)
    }

    fn broadcast(&self, values: &mut [f32], root: usize) -> Result<()> {
        self.exchange(values, self.number == root)
    }

    fn barrier(&self) -> Result<()> {
        self.shared.all.wait();
        Ok(())
    }

    fn set_patience(&self, patience: Option<Duration>) {
        self.patience.lock().expect("times").push(patience);
    }
}

impl ThreadRank {
    /// Replaces everybody's values with the sum over the contributing ranks.
    fn exchange(&self, values: &mut [f32], gives: bool) -> Result<()> {
        {
            let mut sum = self.shared.sum.lock().expect("the sum");
            sum.resize(values.len(), 0.0);
            if gives {
                sum.iter_mut().zip(&*values).for_each(|(sum, x)| *sum += x);
            }
        }
        self.shared.all.wait();
        values.copy_from_slice(&self.shared.sum.lock().expect("the sum"));
        if self.shared.all.wait().is_leader() {
            self.shared.sum.lock().expect("the sum").clear();
        }
        self.shared.all.wait();
        Ok(())
    }
}

/// This many ranks, in order.
pub fn ranks(size: usize) -> impl Iterator<Item = ThreadRank> {
    let shared = Arc::new(Shared {
        sum: Mutex::default(),
        all: Barrier::new(size),
    });
    (0..size).map(move |number| ThreadRank {
        number,
        size,
        shared: Arc::clone(&shared),
        sums: Mutex::default(),
        patience: Mutex::default(),
    })
}

/// The results of this many ranks, in order.
pub fn together<T: Send>(size: usize, of: impl Fn(&ThreadRank) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let start = |rank: ThreadRank| {
            let of = &of;
            scope.spawn(move || of(&rank))
        };
        let ranks: Vec<_> = ranks(size).map(start).collect();
        let ended = ranks.into_iter().map(|rank| rank.join().expect("a rank"));
        ended.collect()
    })
}
