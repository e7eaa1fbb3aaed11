//! A training that has lost workers: whether it restarts with all of them, or continues with fewer, and with how many.

use super::event_loop::LostWorkers;
use crate::executor::end::End;
use crate::executor::spec::AttemptSpec;
use crate::worker::death::ExitCause;

/// Ends of cluster jobs that mean a lost worker or node.
const LOSSES: [&str; 11] = [
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
    "its worker hangs",
];

/// The end of an attempt with local processes or externally started ranks. If workers were lost and a retry is left, the next
/// attempt starts with all of them.
pub(super) fn tried_again(spec: &AttemptSpec, end: End) -> End {
    let no_memory = matches!(&end, End::Died(death) if matches!(death.cause, ExitCause::KernelMemory | ExitCause::Memory));
    if !spec.stage.together || spec.retries == 0 || !is_loss(&end) || no_memory {
        return end;
    }
    let workers = spec.stage.workers.len();
    End::LostWorkers {
        cause: Box::new(end),
        workers,
        left: workers,
    }
}

/// The end of an attempt that lost workers which the next attempt can do without.
pub(super) fn lost_workers(spec: &AttemptSpec, end: End, lost: &LostWorkers) -> End {
    let workers = spec.stage.workers.len();
    let Some(least) = spec.stage.min_workers.filter(|_| spec.stage.together) else {
        return end;
    };
    let left = left(workers, lost.parts.len(), lost.nodes.len(), least);
    match left.filter(|_| is_loss(&end)) {
        Some(left) => End::LostWorkers {
            cause: Box::new(end),
            workers,
            left,
        },
        None => end,
    }
}

/// Whether workers are gone, or one hangs.
fn is_loss(end: &End) -> bool {
    match end {
        End::Died(_) | End::Hung(_) => true,
        End::Cluster(end) => LOSSES.contains(&end.reason.as_str()),
        // Another worker does not respond, but is alive.
        End::Failed(failure) => failure.is_retryable(),
        _ => false,
    }
}

/// The number of workers that continue after a loss: at least one fewer; if all workers of a cluster job are gone, as many as
/// one node fewer has.
fn left(workers: usize, lost: usize, nodes: usize, least: usize) -> Option<usize> {
    let fewer = match lost >= workers {
        true => workers
            .div_ceil(nodes.max(1))
            .min(workers.saturating_sub(1)),
        false => lost.max(1),
    };
    // The minimum is better than none.
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
