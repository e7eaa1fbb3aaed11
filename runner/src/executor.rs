//! Runs a plan: its stages in worker processes, as their inputs become ready.
