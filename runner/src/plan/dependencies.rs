//! Which stages of a plan take results of which, by their positions in it.

use std::collections::HashMap;

use super::{Plan, Reference};

/// The references between a plan's stages, looked up once: a stage comes after all that it refers to.
pub(crate) struct Dependencies<'p> {
    positions: HashMap<&'p str, usize>,
    /// For each stage the positions of those that it refers to.
    inputs: Vec<Vec<usize>>,
}

impl<'p> Dependencies<'p> {
    /// By all references.
    pub(crate) fn of(plan: &'p Plan) -> Self {
        Self::by(plan, |_| true)
    }

    /// Only by these references.
    pub(crate) fn by(plan: &'p Plan, counts: fn(&Reference) -> bool) -> Self {
        let names = plan.stages.iter().map(|stage| stage.name.as_str());
        let positions: HashMap<&str, usize> = names.zip(0..).collect();
        let inputs = plan.stages.iter().map(|stage| {
            let references = stage.references.iter().filter(|one| counts(one));
            references
                .filter_map(|reference| positions.get(reference.stage.as_str()).copied())
                .collect()
        });
        Self {
            inputs: inputs.collect(),
            positions,
        }
    }

    /// The position of the stage with this name.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.positions.get(name).copied()
    }

    /// For each stage whether it is one of these or needed by one of them, directly or indirectly. One look at every reference,
    /// because inputs come first.
    pub(crate) fn before(&self, stages: &[usize]) -> Vec<bool> {
        let mut before = vec![false; self.inputs.len()];
        for &stage in stages {
            before[stage] = true;
        }
        for later in (0..before.len()).rev() {
            if before[later] {
                for &input in &self.inputs[later] {
                    before[input] = true;
                }
            }
        }
        before
    }

    /// For each stage whether it is this one or needs it, directly or indirectly. Also one look at every reference.
    pub(crate) fn after(&self, stage: usize) -> Vec<bool> {
        let mut after = vec![false; self.inputs.len()];
        after[stage] = true;
        for later in stage + 1..after.len() {
            after[later] = self.inputs[later].iter().any(|&input| after[input]);
        }
        after
    }

    /// For each stage whether it can never run beside this one: it is needed by it or needs it, or is the stage itself.
    pub(crate) fn related(&self, stage: usize) -> Vec<bool> {
        let both = self.before(&[stage]).into_iter().zip(self.after(stage));
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
