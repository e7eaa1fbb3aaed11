//! References between stages: whether they exist, and the order in which stages can run.

use std::collections::HashMap;

use super::{Planner, UnresolvedStage};
use crate::diagnostic::Finding;
use crate::plan::Reference;
use crate::schema;
use crate::yaml::{EntryPart, escape};

/// Maximum reported faults in a stage's references.
const MOST_FAULTS: usize = 100;

impl Planner<'_> {
    /// Reports references to missing stages or to stages of the wrong kind.
    pub(super) fn check_references(&mut self, unresolved_stages: &[UnresolvedStage<'_>]) {
        let by_name = indices(unresolved_stages);
        for given in &self.recipe.given {
            if by_name.contains_key(given.name.as_str()) {
                let message = format!("`{}` is a stage too", given.name);
                let pointer = format!("/artifacts/{}", escape(&given.name));
                let finding = Finding::error(pointer, message);
                self.report(
                    finding.hint("give one of them another name"),
                    EntryPart::Key,
                );
            }
        }
        for unresolved in unresolved_stages {
            let before = self.findings.len();
            for reference in &unresolved.references {
                // More would not be read.
                if self.findings.len() - before >= MOST_FAULTS {
                    break;
                }
                let at = format!("{}{}", unresolved.pointer, reference.pointer);
                // A `${...}` that could not be replaced.
                if self.findings.iter().any(|finding| finding.pointer == at) {
                    continue;
                }
                let option = reference.pointer[1..].replace('/', ".");
                let fits = |output: &str| {
                    reference.kinds.is_empty() || reference.kinds.iter().any(|kind| kind == output)
                };
                let fitting = || -> Vec<&str> {
                    unresolved_stages
                        .iter()
                        .filter(|other| other.stage.name != unresolved.stage.name)
                        .filter(|other| other.kind().is_some_and(|kind| fits(&kind.output)))
                        .map(|other| other.stage.name.as_str())
                        .collect()
                };
                let wanted = match reference.kinds.as_slice() {
                    [] => "an artifact".to_owned(),
                    kinds => format!("`{}`", kinds.join("` or `")),
                };
                let fitting_hint = || match fitting().as_slice() {
                    [] => format!("no stage of this recipe makes {wanted}"),
                    names => format!("stages that make {wanted}: {}", schema::list(names)),
                };
                let mut given = self.recipe.given.iter();
                if let Some(given) = given.find(|given| given.name == reference.stage) {
                    if !fits(&given.kind) {
                        let message = format!(
                            "stage `{}`: `{option}` wants {wanted}, but the artifact `{}` is a `{}`",
                            unresolved.stage.name, given.name, given.kind
                        );
                        self.report(
                            Finding::error(at, message).hint(fitting_hint()),
                            EntryPart::Value,
                        );
                    }
                    continue;
                }
                let target = by_name.get(reference.stage.as_str());
                let Some(target) = target.map(|&index| &unresolved_stages[index]) else {
                    let message = format!(
                        "stage `{}`: `{option}` names the stage `{}`, which is not in the recipe",
                        unresolved.stage.name, reference.stage
                    );
                    let names = unresolved_stages
                        .iter()
                        .map(|other| other.stage.name.as_str());
                    let hint = match schema::nearest(&reference.stage, names) {
                        Some(near) => format!("did you mean `{near}`?"),
                        None => fitting_hint(),
                    };
                    self.report(Finding::error(at, message).hint(hint), EntryPart::Value);
                    continue;
                };
                // An unknown kind has been reported.
                let Some(kind) = target.kind() else { continue };
                if !fits(&kind.output) {
                    let message = format!(
                        "stage `{}`: `{option}` wants {wanted}, but stage `{}` ({}) makes `{}`",
                        unresolved.stage.name, reference.stage, kind.kind, kind.output
                    );
                    self.report(
                        Finding::error(at, message).hint(fitting_hint()),
                        EntryPart::Value,
                    );
                }
            }
        }
    }

    /// Indices of the stages, each after all that it refers to, otherwise as in the recipe. Cycles are reported.
    pub(super) fn order(&mut self, unresolved_stages: &[UnresolvedStage<'_>]) -> Vec<usize> {
        let by_name = indices(unresolved_stages);
        let inputs: Vec<Vec<usize>> = unresolved_stages
            .iter()
            .map(|unresolved| {
                let stages = unresolved
                    .references
                    .iter()
                    .map(|reference| &reference.stage);
                stages
                    .filter_map(|name| by_name.get(name.as_str()).copied())
                    .collect()
            })
            .collect();
        let mut order = Vec::new();
        let mut placed = vec![false; unresolved_stages.len()];
        // Quadratic, but recipes have a few dozen stages and at most a thousand.
        while let Some(next) = (0..unresolved_stages.len())
            .find(|&stage| !placed[stage] && inputs[stage].iter().all(|&input| placed[input]))
        {
            placed[next] = true;
            order.push(next);
        }
        let Some(start) = placed.iter().position(|placed| !placed) else {
            return order;
        };
        // Every stage left has an unplaced input: following those must come back to a stage already seen.
        let mut path = vec![start];
        let cycle = loop {
            let last = path[path.len() - 1];
            let Some(&next) = inputs[last].iter().find(|&&input| !placed[input]) else {
                return order;
            };
            if let Some(first) = path.iter().position(|&stage| stage == next) {
                break path[first..].to_vec();
            }
            path.push(next);
        };
        let name = |stage: usize| unresolved_stages[stage].stage.name.as_str();
        let mut names: Vec<&str> = cycle.iter().map(|&stage| name(stage)).collect();
        names.push(names[0]);
        let first = &unresolved_stages[cycle[0]];
        let wants = |reference: &&Reference| reference.stage == names[1];
        let pointer = first
            .references
            .iter()
            .find(wants)
            .map_or("", |reference| reference.pointer.as_str());
        let message = match cycle.as_slice() {
            [only] => format!("stage `{}` needs itself", name(*only)),
            _ => format!("stages need each other in a cycle: {}", names.join(" -> ")),
        };
        let finding = Finding::error(format!("{}{pointer}", first.pointer), message)
            .hint("an arrow means \"takes the output of\"; remove one of these references");
        self.report(finding, EntryPart::Value);
        order
    }
}

/// The stages by name.
fn indices<'a>(unresolved_stages: &[UnresolvedStage<'a>]) -> HashMap<&'a str, usize> {
    unresolved_stages
        .iter()
        .enumerate()
        .map(|(index, unresolved)| (unresolved.stage.name.as_str(), index))
        .collect()
}
