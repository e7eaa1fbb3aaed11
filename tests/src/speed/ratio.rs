//! The columns of the table, and how the best plugin compares with the others: the ratio to PyTorch in f32, in bf16 and
//! compiled, each beside its goal.

/// What a column measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// A plugin of this project.
    Plugin,
    /// PyTorch as it is, in f32.
    Full,
    /// The same, with autocast to bf16.
    Half,
    /// PyTorch compiled, in either type.
    Compiled,
}

/// The largest ratios of the best plugin's time to PyTorch's that a row should have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Goals {
    pub full: f64,
    pub half: f64,
    pub compiled: f64,
}

impl Goals {
    /// Of the phases of distillation.
    pub(super) const PHASES: Self = Self {
        full: 0.5,
        half: 0.75,
        compiled: 1.0,
    };
    /// Of the stages' rows.
    pub(super) const STAGES: Self = Self {
        full: 0.5,
        half: 0.9,
        compiled: 1.0,
    };

    /// The heads of the columns.
    pub(super) const HEADS: [&'static str; 3] = ["best / f32", "/ bf16", "/ compiled"];

    /// The cells of a row whose columns took these seconds: `0.41 <= 0.50`, or `0.62 >  0.50` where the goal is missed.
    pub(super) fn cells(self, times: &[(Side, Option<f64>)]) -> [String; 3] {
        let best = |wanted: Side| {
            let of = times.iter().filter(|(side, _)| *side == wanted);
            of.filter_map(|(_, seconds)| *seconds)
                .min_by(f64::total_cmp)
        };
        let goals = [
            (Side::Full, self.full),
            (Side::Half, self.half),
            (Side::Compiled, self.compiled),
        ];
        goals.map(|(other, goal)| match best(Side::Plugin).zip(best(other)) {
            None => "-".into(),
            Some((own, other)) => {
                let ratio = own / other;
                let sign = if ratio <= goal { "<=" } else { "> " };
                format!("{ratio:.2} {sign} {goal:.2}")
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_plugin_is_compared_and_missed_goals_are_marked() {
        let times = [
            (Side::Plugin, Some(3.0)),
            (Side::Plugin, Some(2.0)),
            (Side::Plugin, None),
            (Side::Full, Some(5.0)),
            (Side::Half, Some(2.5)),
            (Side::Compiled, Some(4.0)),
            (Side::Compiled, Some(1.0)),
        ];
        let cells = Goals::PHASES.cells(&times);
        assert_eq!(cells, ["0.40 <= 0.50", "0.80 >  0.75", "2.00 >  1.00"]);
        assert_eq!(Goals::STAGES.cells(&times)[1], "0.80 <= 0.90");
        let cells = Goals::STAGES.cells(&times[..3]);
        assert_eq!(cells, ["-", "-", "-"], "without PyTorch");
    }
}
