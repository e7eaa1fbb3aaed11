//! Times of training, distillation and sampling, with random weights: what `cargo bench --bench speed` prints.
//!
//! The phases of distillation are timed on networks of published shapes; then the steps of stages that train, the reading of
//! images, and sampling with what follows, by running the stages themselves. Every column computes the same, one after the
//! other in one run, so that they may be compared on a busy machine too. Beside each row stands the least time that the machine
//! allows: operations over the rate of a large matrix product, or bytes that must be read or written over the rate at which
//! memory is read, whichever is longer. At its end stand the ratios of the best plugin to PyTorch, each with its goal.

pub mod busy;
mod clock;
mod loader;
mod peer;
mod phases;
mod ratio;
mod reference;
mod stage_clock;
mod stage_row;
mod timed;
mod work;

use retort_engine::error::Result;

use ratio::Goals;
use reference::SOLVER;

pub(crate) use clock::least;
pub use clock::machine;
pub use peer::Peer;
pub use phases::BackendRun;
pub use ratio::Side;
pub use reference::{Drawn, Phase, Reference};
pub use stage_row::{RowFiles, StageRow};
pub use timed::Timed;

/// The width of a row's title.
const TITLE: usize = 64;

/// The table's columns and the machine's limits.
struct Table {
    columns: Vec<Box<dyn Timed>>,
    /// Operations per second, and bytes per second.
    limits: [f64; 2],
}

/// Prints the table of all rows, or of those whose line holds the first argument of this program; columns are all, or
/// those that the second names, between commas.
pub fn report(mut all: Vec<Box<dyn Timed>>) -> Result<()> {
    let mut given = std::env::args().skip(1).filter(|a| !a.starts_with('-'));
    let [only, column] = [given.next(), given.next()].map(Option::unwrap_or_default);
    all.retain(|c| column.is_empty() || column.split(',').any(|name| name == c.name()));
    let mut table = Table {
        columns: all,
        limits: machine()?,
    };
    table.head();
    for r in Reference::all()? {
        table.phases(&r, &only)?;
    }
    for row in stage_row::all()? {
        if row.title.contains(&only) {
            table.stage(&row)?;
        }
    }
    Ok(())
}

impl Table {
    fn head(&self) {
        let [rate, bandwidth] = self.limits;
        println!(
            "This machine: {:.0} GFLOP/s in a product of 1536 x 1536 matrices, {:.1} GB/s read from memory. Seconds, the \
             least of several, and how many floors; the best plugin's time over PyTorch's, `>` where the goal is missed.",
            rate / 1e9,
            bandwidth / 1e9
        );
        let names = self.columns.iter().map(|c| format!("{:>15}", c.name()));
        let ratios = Goals::HEADS.iter().map(|head| format!("{head:>14}"));
        println!(
            "{:<TITLE$}{:>10}{:>10}{:>9}{}",
            "",
            "GFLOP",
            "MB",
            "floor",
            names.chain(ratios).collect::<String>()
        );
    }

    /// The phases of a reference whose titles hold `only`.
    fn phases(&mut self, r: &Reference, only: &str) -> Result<()> {
        let title = |phase: Phase| format!("{}, batch {}: {}", r.name, r.batch, phase.name());
        let phases: Vec<Phase> = Phase::ALL
            .into_iter()
            .filter(|&phase| title(phase).contains(only))
            .collect();
        if phases.is_empty() {
            return Ok(());
        }
        let drawn = Drawn::new(r)?;
        let mut columns = Vec::new();
        for timed in &mut self.columns {
            eprintln!("{}: {} ..", r.name, timed.name());
            columns.push(timed.times(r, &drawn, &phases)?);
        }
        for (i, &phase) in phases.iter().enumerate() {
            let times: Vec<Option<f64>> = columns.iter().map(|column| column[i]).collect();
            self.line(&title(phase), r.work(phase), &times, Goals::PHASES);
            if let Phase::Map(n) | Phase::Plain(n) = phase {
                let evaluations = SOLVER.steps + 1;
                let what = format!("milliseconds a token, of {evaluations} evaluations at most");
                Self::second_line(&what, &times, |seconds| {
                    format!("{:.3}", 1e3 * seconds / n as f64)
                });
            }
        }
        Ok(())
    }

    /// A row of a stage.
    fn stage(&mut self, row: &StageRow) -> Result<()> {
        let files = row.files()?;
        let mut times = Vec::new();
        for timed in &mut self.columns {
            eprintln!("{}: {} ..", row.title, timed.name());
            times.push(timed.stage_seconds(row, &files)?);
        }
        self.line(&row.title, row.work, &times, Goals::STAGES);
        if let Some(images) = row.images {
            Self::second_line("images per second", &times, |seconds| {
                format!("{:.0}", images as f64 / seconds)
            });
        }
        Ok(())
    }

    fn line(&self, title: &str, (flop, bytes): (f64, f64), times: &[Option<f64>], goals: Goals) {
        let [rate, bandwidth] = self.limits;
        let floor = (flop / rate).max(bytes / bandwidth);
        let seconds = times.iter().map(|time| match time {
            Some(seconds) if seconds / floor >= 100.0 => {
                format!("{seconds:>9.4} {:>4.0}x", seconds / floor)
            }
            Some(seconds) => format!("{seconds:>9.4} {:>4.1}x", seconds / floor),
            None => format!("{:>15}", "-"),
        });
        let sides = self.columns.iter().map(|c| c.side());
        let sides: Vec<(Side, Option<f64>)> = sides.zip(times.iter().copied()).collect();
        let ratios = goals.cells(&sides).map(|cell| format!("{cell:>14}"));
        println!(
            "{title:<TITLE$}{:>10.1}{:>10.0}{floor:>9.4}{}",
            flop / 1e9,
            bytes / 1e6,
            seconds.chain(ratios).collect::<String>()
        );
    }

    /// Another figure of a row's columns.
    fn second_line(what: &str, times: &[Option<f64>], figure: impl Fn(f64) -> String) {
        let cells = times.iter().map(|time| match time {
            Some(seconds) => format!("{:>15}", figure(*seconds)),
            None => format!("{:>15}", "-"),
        });
        let width = TITLE + 29;
        println!(
            "{:<width$}{}",
            format!("  {what}"),
            cells.collect::<String>()
        );
    }
}
