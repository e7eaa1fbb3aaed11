//! A soak's tests and findings.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What was tested, and every broken promise.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Seed of all choices.
    pub seed: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Hostile inputs, by target.
    pub inputs: BTreeMap<String, Inputs>,
    /// Disturbances of processes and the disk that hit, by kind.
    pub disturbances: BTreeMap<String, u64>,
    /// Counts of other events, by name.
    pub counts: BTreeMap<String, u64>,
    /// What could not be tested here, and why.
    pub left_out: Vec<String>,
    /// Broken promises.
    pub violations: Vec<String>,
}

/// The inputs of one target.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    /// The number of inputs.
    pub count: u64,
    /// The number of different outcomes.
    pub outcomes: u64,
    /// Processor time of the slowest, in seconds.
    pub slowest: f64,
    /// The most memory that the process had, in KiB.
    pub peak_kib: u64,
}

impl Report {
    /// An empty report.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }

    /// Adds the report of a concurrent soak.
    pub fn add(&mut self, other: Self) {
        self.seconds = self.seconds.max(other.seconds);
        self.inputs.extend(other.inputs);
        for (kind, count) in other.disturbances {
            *self.disturbances.entry(kind).or_default() += count;
        }
        for (what, count) in other.counts {
            *self.counts.entry(what).or_default() += count;
        }
        for what in other.left_out {
            if !self.left_out.contains(&what) {
                self.left_out.push(what);
            }
        }
        self.violations.extend(other.violations);
    }

    /// Counts something.
    pub fn count(&mut self, what: &str) {
        *self.counts.entry(what.to_owned()).or_default() += 1;
    }

    /// Counts a disturbance that hit.
    pub fn disturbed(&mut self, how: &str) {
        *self.disturbances.entry(how.to_owned()).or_default() += 1;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}, {:.0} s", self.seed, self.seconds)?;
        if !self.inputs.is_empty() {
            let all: u64 = self.inputs.values().map(|inputs| inputs.count).sum();
            writeln!(f, "{all} inputs")?;
            for (target, inputs) in &self.inputs {
                writeln!(
                    f,
                    "  {target:14} {:>10} inputs, {:>6} outcomes, slowest {:.2} s, at most {} MiB",
                    inputs.count,
                    inputs.outcomes,
                    inputs.slowest,
                    inputs.peak_kib >> 10
                )?;
            }
        }
        if !self.disturbances.is_empty() {
            let all: u64 = self.disturbances.values().sum();
            let ended = |kind: &&String| kind.ends_with("killed") || kind.ends_with("aborted");
            let kills: u64 = (self.disturbances.keys().filter(ended))
                .map(|kind| self.disturbances[kind])
                .sum();
            writeln!(f, "{all} disturbances, {kills} of them kills")?;
            for (kind, count) in &self.disturbances {
                writeln!(f, "  {kind:32} {count:>8}")?;
            }
        }
        for (name, count) in &self.counts {
            writeln!(f, "  {name:32} {count:>8}")?;
        }
        for what in &self.left_out {
            writeln!(f, "*** LEFT OUT: {what} ***")?;
        }
        for violation in &self.violations {
            writeln!(f, "VIOLATION: {violation}")?;
        }
        write!(f, "{} violations", self.violations.len())
    }
}
