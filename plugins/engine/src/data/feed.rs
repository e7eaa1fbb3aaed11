//! Batches for training, prepared by another thread while a step computes.
//!
//! Which images a step sees is a function of its number, so the thread can run ahead, and a resumed training starts with the
//! right ones. Nothing here affects a result, only how long a step waits, which is recorded.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use super::{Augment, Images};
use crate::error::{Error, Result};

/// Images as a step sees them.
pub struct ImageBatch {
    /// Values (b, channels, height, width) in [-1, 1].
    pub pixels: Vec<f32>,
    /// Their classes (b).
    pub labels: Vec<u32>,
}

/// Batches prepared ahead of the current step.
const AHEAD: u64 = 2;

/// Steps over which waiting is averaged.
const AVERAGED: usize = 10;

/// Batches by step.
pub struct Feed {
    wanted: Option<Sender<u64>>,
    made: Receiver<Result<ImageBatch>>,
    /// Steps requested from the thread, in order.
    asked: VecDeque<u64>,
    waits: VecDeque<f64>,
    thread: Option<JoinHandle<()>>,
}

impl Feed {
    /// Starts a thread. `picks` returns the images of a step, `augment` their augmentation.
    pub fn new(
        images: Arc<Images>,
        picks: impl Fn(u64) -> Vec<usize> + Send + 'static,
        augment: impl Fn(u64) -> Augment + Send + 'static,
    ) -> Self {
        let (wanted, steps) = channel::<u64>();
        let (send, made) = channel();
        let thread = std::thread::spawn(move || {
            for step in steps {
                let batch = images.gather_augmented(&picks(step), Some(augment(step)));
                if send
                    .send(batch.map(|(pixels, labels)| ImageBatch { pixels, labels }))
                    .is_err()
                {
                    return;
                }
            }
        });
        Self {
            wanted: Some(wanted),
            made,
            asked: VecDeque::new(),
            waits: VecDeque::new(),
            thread: Some(thread),
        }
    }

    /// The batch of a step.
    pub fn take(&mut self, step: u64) -> Result<ImageBatch> {
        let begun = Instant::now();
        while self.asked.front().is_some_and(|first| *first != step) {
            self.asked.pop_front();
            self.receive()?.ok();
        }
        for ahead in step + self.asked.len() as u64..=step + AHEAD {
            let wanted = self.wanted.as_ref().ok_or_else(gone)?;
            wanted.send(ahead).map_err(|_| gone())?;
            self.asked.push_back(ahead);
        }
        self.asked.pop_front();
        let batch = self.receive()?;
        if self.waits.len() == AVERAGED {
            self.waits.pop_front();
        }
        self.waits.push_back(begun.elapsed().as_secs_f64());
        batch
    }

    /// Seconds that a step waited for its images, on average over the last ones: the figure `data_wait`.
    pub fn wait(&self) -> (&'static str, f64) {
        (
            "data_wait",
            self.waits.iter().sum::<f64>() / self.waits.len().max(1) as f64,
        )
    }

    fn receive(&self) -> Result<Result<ImageBatch>> {
        self.made.recv().map_err(|_| gone())
    }
}

fn gone() -> Error {
    Error::Internal("the thread that reads images is gone".into())
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.wanted = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
