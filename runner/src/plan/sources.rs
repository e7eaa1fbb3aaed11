//! The stages before a stage, for its plugin's check of the options.

use std::collections::BTreeMap;

use retort_abi::SourceStage;

use super::PlannedStage;

/// The stages before a stage, directly or not, by name.
pub(crate) type StageSources = BTreeMap<String, SourceStage>;

/// The most bytes of stages, as JSON, that one plan gives to its plugins: the last of a thousand stages may depend on all
/// others.
const MOST_BYTES: usize = 4 << 20;
/// Bytes that a stage counts for besides its options: thousands of tiny ones take memory too.
const EACH: usize = 256;

/// A plan's stages.
pub(crate) struct Sources<'a> {
    /// With the bytes that they count for.
    stages: BTreeMap<&'a str, (&'a PlannedStage, usize)>,
    /// Bytes that may still be given.
    room: usize,
}

impl<'a> Sources<'a> {
    pub(crate) fn new(stages: &'a [PlannedStage]) -> Self {
        let sized = stages.iter().map(|stage| {
            let size = stage.options.to_string().len() + EACH;
            (stage.name.as_str(), (stage, size))
        });
        Self {
            stages: sized.collect(),
            room: MOST_BYTES,
        }
    }

    /// The stages on which a stage depends, directly or not; some are left out once there is no more room.
    pub(crate) fn of(&mut self, stage: &'a PlannedStage) -> StageSources {
        let mut found = BTreeMap::new();
        let mut open = vec![stage];
        while let Some(next) = open.pop() {
            for reference in &next.references {
                // An artifact of the store is no stage.
                let Some(&(source, size)) = self.stages.get(reference.stage.as_str()) else {
                    continue;
                };
                if size > self.room || found.contains_key(&source.name) {
                    continue;
                }
                self.room -= size;
                let (kind, options) = (source.kind.clone(), source.options.clone());
                found.insert(source.name.clone(), SourceStage { kind, options });
                open.push(source);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake;
    use super::*;

    #[test]
    fn a_stage_knows_all_stages_before_it_while_there_is_room() {
        let text = "version: 1\nbackend: fake\nstages:\n  codes: {kind: tokenizer, data: d.csv}\n  \
                    teacher: {kind: pretrain, tokenizer: codes}\n  \
                    student: {kind: distill, teacher: teacher, tokenizer: codes}\n  \
                    other: {kind: tokenizer, data: e.csv}\n";
        let plan = fake::plan(text, &[]).unwrap();
        let mut sources = Sources::new(&plan.stages);
        let mut check = |stage: &str, expected: &[&str]| {
            let found = sources.of(plan.stage(stage).unwrap());
            assert_eq!(found.keys().collect::<Vec<_>>(), expected, "{stage}");
            for (name, source) in &found {
                let stage = plan.stage(name).unwrap();
                assert_eq!(
                    (&source.kind, &source.options),
                    (&stage.kind, &stage.options)
                );
            }
        };
        check("student", &["codes", "teacher"]);
        check("teacher", &["codes"]);
        check("codes", &[]);
        let mut sources = Sources::new(&plan.stages);
        sources.room = sources.stages["teacher"].1;
        let found = sources.of(plan.stage("student").unwrap());
        assert_eq!(found.keys().collect::<Vec<_>>(), ["teacher"]);
        assert_eq!(sources.room, 0);
    }
}
