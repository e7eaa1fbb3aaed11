//! `run` and `resume` in processes that `torchrun` has started: rank 0 runs the recipe, the others its trainings with it.

use crate::cli::{Context, Error, Exit};
use crate::cluster::torchrun::{self, FollowError, LaunchedRank};
use crate::environment;
use crate::plan::{Origin, Plan};
use crate::plugin::Plugins;

/// Runs its part of the trainings that rank 0 posts, until rank 0 ends.
pub fn follow(place: &LaunchedRank, context: &Context) -> Result<(), Error> {
    // Ctrl-C in a terminal reaches all ranks; rank 0 handles it. SAFETY: ignores a signal, from here on.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
    let node = environment::host_name();
    let following = torchrun::follow(&context.store, place, &node);
    match context.runtime()?.block_on(following) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::said(Exit::StageFailed)),
        Err(error @ FollowError::Alone { .. }) => {
            Err(Error::new(Exit::StageFailed, error.to_string()).hint(
                "all ranks need the same --store, on a file system that they share, and the same MASTER_ADDR and MASTER_PORT",
            ))
        }
        Err(error) => Err(Error::new(Exit::Internal, error.to_string())),
    }
}

/// Refuses to start if several processes would all resume the same run: whether they work together is recorded in the
/// history, which only one of them may open.
pub fn check_is_first() -> Result<(), Error> {
    match LaunchedRank::read(|name| std::env::var(name).ok()) {
        Ok(place) if place.rank > 0 => Err(not_told(&place)),
        _ => Ok(()),
    }
}

/// The error for processes started as a group without --executor torchrun.
pub fn not_told(place: &LaunchedRank) -> Error {
    let message = format!(
        "this is process {} of {} (RANK, WORLD_SIZE), and only with --executor torchrun do they resume a run together",
        place.rank, place.size
    );
    Error::new(Exit::Usage, message)
        .hint("torchrun --nproc-per-node 4 --no-python retort resume --executor torchrun")
}

/// Gives each training a worker in every one of the processes.
pub fn spread(
    plan: &mut Plan,
    plugins: &mut Plugins<'_>,
    place: &LaunchedRank,
) -> Result<(), Error> {
    if place.size == 1 {
        return Ok(());
    }
    let mut trainings = 0;
    for stage in &mut plan.stages {
        let (_, description) = plugins.describe_file(&stage.plugin.path)?;
        let mut kinds = description.stages.iter();
        let kind = kinds.find(|kind| kind.kind == stage.kind);
        if !kind.is_some_and(|kind| kind.together && kind.divisible) {
            continue;
        }
        let (written, origin) = (stage.workers.len(), stage.origins.get("/workers"));
        if written > 1 && written != place.size && origin != Some(&Origin::Derived) {
            return Err(Error::new(
                Exit::Usage,
                format!(
                    "stage `{}` has {written} workers, and {} processes were started (WORLD_SIZE)",
                    stage.name, place.size
                ),
            )
            .hint(format!(
                "--set stages.{}.workers={}",
                stage.name, place.size
            )));
        }
        stage.workers = vec![stage.device.clone(); place.size];
        stage.together = true;
        let origin = stage.origins.entry("/workers".into());
        origin.or_insert(Origin::Derived);
        trainings += 1;
    }
    if trainings == 0 {
        let message = format!(
            "no stage of this recipe is trained by several processes, and {} were started (WORLD_SIZE)",
            place.size
        );
        return Err(Error::new(Exit::Usage, message).hint(
            "a tokenizer, pretrain or distill stage can be, with `backend: libtorch` or on GPUs",
        ));
    }
    Ok(())
}
