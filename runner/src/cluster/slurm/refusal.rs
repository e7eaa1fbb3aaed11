//! Why Slurm refuses a job: what `sbatch` says, and what to do about it.

use super::{ProgramOutput, SlurmError, words};

/// Phrases in `sbatch`'s errors, and what to do about each.
const REFUSALS: [(&str, &str); 14] = [
    (
        "invalid partition",
        "`sinfo --summarize` lists the partitions; set `partition`",
    ),
    (
        "Invalid account",
        "`sacctmgr show associations user=$USER` lists your accounts; set `account`, and `partition` to one that it may use",
    ),
    (
        "Invalid qos",
        "`sacctmgr show associations user=$USER format=account,qos` lists what you may use; set `qos`",
    ),
    (
        "generic resource",
        "`sinfo --Format=nodelist,gres` lists what nodes have; set `gres`",
    ),
    (
        "Memory specification",
        "no node has so much memory; `sinfo --Format=nodelist,memory` lists what they have; set `memory`",
    ),
    (
        "CPU count",
        "no node has so many processors; `sinfo --Format=nodelist,cpus` lists what they have; set `cpus`",
    ),
    (
        "policy",
        "`sacctmgr show associations user=$USER` and `sacctmgr show qos` list the limits; ask for less with `time`, `cpus`, `gres` or `memory`",
    ),
    (
        "time limit",
        "`sinfo --Format=partition,time` lists the longest times; set `time`",
    ),
    (
        "--time specification",
        "set `time` as Slurm writes it: `90` (minutes), `4:00:00`, `2-12:00:00`",
    ),
    (
        "feature specification",
        "`sinfo --Format=nodelist,features` lists what nodes have; correct `sbatch`",
    ),
    (
        "node configuration is not available",
        "no node of the partition has what the job asks for; compare `cpus`, `memory` and `gres` with `sinfo --long --Node`",
    ),
    (
        "array specification",
        "the cluster takes no array of this size: `scontrol show config` names MaxArraySize",
    ),
    (
        "Access/permission denied",
        "this user may not use the partition, or submit from this machine; ask who runs the cluster",
    ),
    (
        "unrecognized option",
        "a line of `sbatch` is no option of this cluster's sbatch",
    ),
];

/// Whether the controller did not answer, by what a program says.
pub(in crate::cluster) fn is_unanswered(said: &str) -> bool {
    let said = said.to_lowercase();
    ["nable to contact", "timed out", "zero bytes"]
        .iter()
        .any(|words| said.contains(words))
}

/// The meaning of a failed `sbatch`. `busy`: whether this user has jobs in the queue, perhaps too many.
pub(super) fn refusal(output: &ProgramOutput, busy: bool) -> SlurmError {
    let said = words(output);
    let has = |word: &str| said.to_lowercase().contains(&word.to_lowercase());
    if has("temporarily unable") || has("MaxJobCount") || has("SubmitJob") {
        return SlurmError::Full { said };
    }
    if is_unanswered(&said) || output.status.is_none() {
        return SlurmError::Silent { said };
    }
    // Slurm uses one text for limits of a job and of the queue; with an empty queue it means the job.
    if has("policy") && busy {
        return SlurmError::Full { said };
    }
    let hint = REFUSALS.iter().find(|(word, _)| has(word)).map_or(
        "correct the profile that `retort doctor` shows",
        |(_, hint)| hint,
    );
    SlurmError::Refused {
        said,
        hint: hint.to_owned(),
    }
}
