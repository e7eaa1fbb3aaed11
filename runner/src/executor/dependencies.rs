//! Which stages of a plan take results of which, by their positions in it.

use std::collections::HashMap;

use crate::plan::Plan;

/// The references between a plan's stages, looked up once: a stage comes after all that it refers to.
pub(super) struct Dependencies<'p> {
    positions: HashMap<&'p str, usize>,
    /// For each stage the positions of those that it refers to.
    inputs: Vec<Vec<usize>>,
}

impl<'p> Dependencies<'p> {
    pub(super) fn of(plan: &'p Plan) -> Self {
        let names = plan.stages.iter().map(|stage| stage.name.as_str());
        let positions: HashMap<&str, usize> = names.zip(0..).collect();
        let inputs = plan.stages.iter().map(|stage| {
            let names = stage.references.iter().map(|input| input.stage.as_str());
            names
                .filter_map(|name| positions.get(name).copied())
                .collect()
        });
        Self {
            inputs: inputs.collect(),
            positions,
        }
    }

    /// The position of the stage with this name.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.positions.get(name).copied()
    }

    /// For each stage whether it can never run beside this one: it is needed by it or needs it, directly or indirectly, or is
    /// the stage itself. One look at every reference, because inputs come first.
    pub(super) fn related(&self, stage: usize) -> Vec<bool> {
        let mut before = vec![false; self.inputs.len()];
        let mut after = before.clone();
        before[stage] = true;
        after[stage] = true;
        for earlier in (0..=stage).rev() {
            if before[earlier] {
                for &input in &self.inputs[earlier] {
                    before[input] = true;
                }
            }
        }
        for later in stage + 1..self.inputs.len() {
            after[later] = self.inputs[later].iter().any(|&input| after[input]);
        }
        let both = before.into_iter().zip(after);
        both.map(|(before, after)| before || after).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn related(inputs: Vec<Vec<usize>>, stage: usize) -> Vec<bool> {
        let positions = HashMap::new();
        Dependencies { positions, inputs }.related(stage)
    }

    #[test]
    fn stages_are_related_by_any_number_of_others() {
        // 0 -> 1 -> 2 -> 4, and 0 -> 3; nothing refers to 5.
        let inputs = || vec![vec![], vec![0], vec![1], vec![0], vec![2], vec![]];
        for (stage, expected) in [
            (0, [true, true, true, true, true, false]),
            (1, [true, true, true, false, true, false]),
            (3, [true, false, false, true, false, false]),
            (4, [true, true, true, false, true, false]),
            (5, [false, false, false, false, false, true]),
        ] {
            assert_eq!(related(inputs(), stage), expected, "of stage {stage}");
        }
    }

    /// Each stage reads the two before it, so there are more ways through them than anyone could walk; a search that begins
    /// anew for every pair of stages would not end either.
    #[test]
    fn every_reference_is_looked_at_once() {
        let count = 200_000;
        let inputs: Vec<Vec<usize>> = (0..count)
            .map(|stage: usize| (stage.saturating_sub(2)..stage).collect())
            .collect();
        let found = related(inputs, count / 2);
        assert!(found.into_iter().all(|related| related));
    }
}
