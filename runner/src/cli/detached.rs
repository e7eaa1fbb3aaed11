//! Runs that their runner has left to Slurm: their states are updated from Slurm before they are shown.

use std::collections::HashMap;

use crate::cli::{Context, Error, output};
use crate::cluster::slurm::{ElementStatus, Slurm, State};
use crate::store::{DetachedJobs, Store};

/// Asks Slurm about the runs that have no runner any more but unfinished jobs, and corrects their states in the store.
/// Returns those that Slurm still works on, or whose state is unknown.
pub async fn refresh(store: &Store, context: &Context) -> Result<Vec<DetachedJobs>, Error> {
    let left = store.left_to_scheduler().await?;
    if left.is_empty() {
        return Ok(left);
    }
    let jobs: Vec<u64> = left.iter().flat_map(|left| left.jobs.clone()).collect();
    let slurm = Slurm::default();
    let known = match slurm.look(&jobs).await {
        Ok(known) => known,
        Err(error) => {
            if !context.quiet {
                output::say(&format!(
                    "{error}; runs that were left to it are shown as they were last known"
                ));
            }
            return Ok(left);
        }
    };
    let mut alive = Vec::new();
    for run in left {
        let said: Vec<&ElementStatus> = known
            .iter()
            .filter(|((job, _), said)| run.jobs.contains(job) && !said.state.is_final())
            .map(|(_, said)| said)
            .collect();
        // A read-only store is shown as it is.
        if said.is_empty() {
            let _ = store.scheduler_is_done(&run).await;
            continue;
        }
        let waiting = said.iter().all(|said| said.state == State::Pending);
        let _ = store
            .scheduler_says(&run, waiting.then(|| most(&said)))
            .await;
        alive.push(run);
    }
    Ok(alive)
}

/// The reason that most have.
fn most<'a>(said: &[&'a ElementStatus]) -> &'a str {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for said in said {
        *counts.entry(&said.reason).or_default() += 1;
    }
    let most = counts
        .into_iter()
        .max_by_key(|(reason, count)| (*count, *reason));
    most.map_or("", |(reason, _)| reason)
}
