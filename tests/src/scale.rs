//! Cost against size: what `cargo bench -p retort-tests --bench scale` prints.
//!
//! The cost c of something of size n is taken to grow as c = a n^e. The exponent e is the slope of a straight line through the
//! points (log n, log c), by least squares: 0 for a cost that does not depend on the size, 1 for a proportional one. A cost
//! that every size has (the start of a process) makes it smaller, so each line of a table also gives the exponent between it
//! and the line before.

pub mod trajectories;

/// The costs of one thing by its size, and what they may be.
#[derive(Debug)]
pub struct Curve {
    /// What costs.
    pub name: &'static str,
    /// What is counted: `tokens`.
    pub size: &'static str,
    /// What is paid: `ms`.
    pub unit: &'static str,
    /// Sizes and costs, the smallest size first.
    pub points: Vec<(u64, f64)>,
    /// What is promised.
    pub bound: Bound,
}

/// A promise about the costs.
#[derive(Debug, Clone, Copy)]
pub enum Bound {
    /// The exponent is at most this.
    Exponent(f64),
    /// Every cost is at most this.
    Cost(f64),
}

impl Curve {
    /// The exponent of all points; NaN for fewer than two sizes.
    pub fn exponent(&self) -> f64 {
        slope(&self.points)
    }

    /// Whether the promise is kept.
    pub fn holds(&self) -> bool {
        match self.bound {
            Bound::Exponent(most) => self.exponent() <= most,
            Bound::Cost(most) => self.points.iter().all(|&(_, cost)| cost <= most),
        }
    }

    /// Its table, and whether the promise is kept.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{}\n{:>16}{:>14}{:>12}\n",
            self.name, self.size, self.unit, "exponent"
        );
        for (at, &(size, cost)) in self.points.iter().enumerate() {
            let step = match at {
                0 => String::new(),
                at => format!("{:.2}", slope(&self.points[at - 1..=at])),
            };
            text += &format!("{size:>16}{cost:>14.2}{step:>12}\n");
        }
        let bound = match self.bound {
            Bound::Exponent(most) => format!("at most {most}"),
            Bound::Cost(most) => format!("the cost at most {most} {}", self.unit),
        };
        let kept = match self.holds() {
            true => "holds",
            false => "DOES NOT HOLD",
        };
        text + &format!("exponent {:.2}; bound: {bound}: {kept}\n", self.exponent())
    }
}

/// The slope of the line through the logarithms, by least squares.
fn slope(points: &[(u64, f64)]) -> f64 {
    let logs: Vec<(f64, f64)> = points
        .iter()
        .map(|&(size, cost)| ((size as f64).ln(), cost.max(f64::MIN_POSITIVE).ln()))
        .collect();
    let count = logs.len() as f64;
    let (x, y) = logs
        .iter()
        .fold((0.0, 0.0), |sum, log| (sum.0 + log.0, sum.1 + log.1));
    let (x, y) = (x / count, y / count);
    let (mut above, mut below) = (0.0, 0.0);
    for log in logs {
        above += (log.0 - x) * (log.1 - y);
        below += (log.0 - x) * (log.0 - x);
    }
    above / below
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: &[(u64, f64)], bound: Bound) -> Curve {
        Curve {
            name: "a thing",
            size: "things",
            unit: "ms",
            points: points.to_vec(),
            bound,
        }
    }

    #[test]
    fn the_exponent_is_that_of_the_cost() {
        for exponent in [0.0, 0.5, 1.0, 2.0] {
            let points: Vec<(u64, f64)> = [10_u64, 20, 40, 1000]
                .map(|size| (size, 3.0 * (size as f64).powf(exponent)))
                .to_vec();
            let found = curve(&points, Bound::Cost(1.0)).exponent();
            assert!((found - exponent).abs() < 1e-12, "{found} for {exponent}");
        }
        // A deviation counts by its square: no single point decides.
        let uneven = [(1, 1.0), (10, 20.0), (100, 100.0), (1000, 1000.0)];
        let found = curve(&uneven, Bound::Cost(1.0)).exponent();
        assert!((found - 0.97).abs() < 0.01, "{found}");
    }

    #[test]
    fn a_bound_is_on_the_exponent_or_on_every_cost() {
        let points = [(1, 1.0), (10, 10.0), (100, 100.0)];
        let holds = |bound| curve(&points, bound).holds();
        assert!(holds(Bound::Exponent(1.1)) && !holds(Bound::Exponent(0.9)));
        assert!(holds(Bound::Cost(100.0)) && !holds(Bound::Cost(99.0)));
        // A cost that cannot be measured keeps no promise.
        assert!(!curve(&points[..1], Bound::Exponent(1.1)).holds());
        let table = curve(&points, Bound::Cost(99.0)).table();
        assert!(table.contains("DOES NOT HOLD"), "{table}");
    }
}
