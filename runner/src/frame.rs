//! Frames between the runner and a worker.
