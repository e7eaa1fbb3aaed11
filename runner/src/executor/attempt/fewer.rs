//! A training that has lost workers: whether it goes on with fewer, and with how many.

use super::event_loop::Losses;
use crate::executor::end::End;
use crate::executor::spec::AttemptSpec;

/// Ends of cluster jobs by which a worker, or its node, is lost.
const LOSSES: [&str; 10] = [
    "node failed",
    "node failed, or preempted",
    "preempted",
    "no nodes",
    "died without reporting a reason",
    "gone from Slurm",
    "started too often",
    "not started again",
    "not submitted again",
    "its worker was killed by SIGKILL",
];

/// How an attempt ended, where that is the loss of workers that the next one can do without.
pub(super) fn workers(spec: &AttemptSpec, end: End, losses: &Losses) -> End {
    let workers = spec.stage.workers.len();
    let Some(least) = spec.stage.min_workers.filter(|_| spec.stage.together) else {
        return end;
    };
    let is_loss = match &end {
        End::Died(_) => true,
        End::Cluster(end) => LOSSES.contains(&end.reason.as_str()),
        // Another one does not answer, and lives.
        End::Failed(failure) => failure.retryable,
        _ => false,
    };
    let left = left(workers, losses.parts.len(), losses.nodes.len(), least);
    match left.filter(|_| is_loss) {
        Some(left) => End::LostWorkers {
            cause: Box::new(end),
            workers,
            left,
        },
        None => end,
    }
}

/// How many of so many workers go on when some are lost: one less at least, and where all of a cluster's job are gone, those
/// that one node fewer has.
fn left(workers: usize, lost: usize, nodes: usize, least: usize) -> Option<usize> {
    let fewer = match lost >= workers {
        true => workers
            .div_ceil(nodes.max(1))
            .min(workers.saturating_sub(1)),
        false => lost.max(1),
    };
    // As few as may be are better than none.
    let left = workers.checked_sub(fewer.max(1))?.max(least);
    (left < workers).then_some(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_go_on_as_are_left_and_no_fewer_than_the_recipe_says() {
        // Workers, lost, nodes, least.
        assert_eq!(left(4, 1, 0, 1), Some(3));
        assert_eq!(left(4, 3, 0, 2), Some(2));
        assert_eq!(left(4, 0, 0, 1), Some(3), "one hangs");
        assert_eq!(left(8, 8, 2, 1), Some(4), "a job of two nodes");
        assert_eq!(left(8, 8, 2, 6), Some(6));
        assert_eq!(left(4, 4, 1, 1), Some(1), "all on one node");
        assert_eq!(left(2, 1, 0, 2), None);
        assert_eq!(left(1, 1, 0, 1), None);
    }
}
