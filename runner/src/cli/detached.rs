//! Detached runs, left to Slurm: their states are updated from Slurm before they are shown.

use std::collections::HashMap;

use crate::cli::{Context, Error, output};
use crate::cluster::slurm::{ElementStatus, Slurm, SlurmError, State};
use crate::store::{DetachedJobs, Store};

/// Runs with unfinished jobs but no runner, after Slurm was asked about them.
pub struct Asked {
    /// Those that Slurm still runs, or whose state is unknown.
    pub left: Vec<DetachedJobs>,
    /// Why their states could not be asked.
    pub silence: Option<SlurmError>,
}

/// As [`ask`], and says why Slurm could not be asked.
pub async fn refresh(store: &Store, context: &Context) -> Result<Vec<DetachedJobs>, Error> {
    let Asked { left, silence } = ask(store).await?;
    if let Some(error) = silence
        && !context.quiet
    {
        output::say(&format!(
            "{error}; runs that were left to it are shown as they were last known"
        ));
    }
    Ok(left)
}

/// Asks Slurm about runs with unfinished jobs but no runner, and corrects their states in the store.
pub async fn ask(store: &Store) -> Result<Asked, Error> {
    let mut left = store.left_to_scheduler().await?;
    let asked = |left, silence| Ok(Asked { left, silence });
    if left.is_empty() {
        return asked(left, None);
    }
    let slurm = Slurm::default();
    for run in &mut left {
        for name in &run.names {
            match slurm.find(name).await {
                Ok(job) => run.jobs.extend(job),
                Err(error) => return asked(left, Some(error)),
            }
        }
    }
    let jobs: Vec<u64> = left.iter().flat_map(|left| left.jobs.clone()).collect();
    let known = slurm.look_back(&jobs, |known| {
        let is_known = |job: &u64| known.keys().any(|(known, _)| known == job);
        !jobs.iter().all(is_known)
    });
    let known = match known.await {
        Ok(known) => known,
        Err(error) => return asked(left, Some(error)),
    };
    let mut alive = Vec::new();
    for run in left {
        let its_own = known.iter().filter(|((job, _), _)| run.jobs.contains(job));
        let (ended, said): (Vec<_>, Vec<_>) = its_own
            .map(|(_, said)| said)
            .partition(|said| said.state.is_final());
        // If it cannot be recorded it is still shown.
        if said.is_empty() {
            let faults = ended.iter().filter_map(|said| said.state.fault());
            let _ = store.scheduler_is_done(&run, most(faults)).await;
            continue;
        }
        let waiting = said.iter().all(|said| said.state == State::Pending);
        let reasons = said
            .iter()
            .map(|said: &&ElementStatus| said.reason.as_str());
        let waiting = waiting.then(|| most(reasons).unwrap_or_default());
        let _ = store.scheduler_says(&run, waiting).await;
        alive.push(run);
    }
    asked(alive, None)
}

/// The most frequent reason.
fn most<'a>(said: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for said in said {
        *counts.entry(said).or_default() += 1;
    }
    let most = counts
        .into_iter()
        .max_by_key(|(reason, count)| (*count, *reason));
    most.map(|(reason, _)| reason)
}
