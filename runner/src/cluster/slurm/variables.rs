//! Variables of the shell that may not reach Slurm's programs.

/// Variables of `sbatch` that override what retort asks for, or how it asks; without `SBATCH_`.
const STEERING: [&str; 11] = [
    "ARRAY_INX",
    "CLUSTERS",
    "ERROR",
    "INPUT",
    "JOB_NAME",
    "NO_REQUEUE",
    "OPEN_MODE",
    "OUTPUT",
    "REQUEUE",
    "SIGNAL",
    "WAIT",
];
/// Variables with which Slurm's programs find and know the controller; without `SLURM_`.
const OF_SITE: [&str; 5] = ["CONF", "CONF_SERVER", "JWT", "MPI_TYPE", "UMASK"];

/// Whether a variable of the shell may not reach Slurm's programs, nor through `sbatch` a job: it chooses another cluster,
/// filters answers, steers `sbatch`, or describes a job in which the shell itself runs (`in_job`).
pub(super) fn is_stray(name: &str, in_job: bool) -> bool {
    if let Some(name) = name.strip_prefix("SBATCH_") {
        return STEERING.contains(&name);
    }
    let Some(name) = name.strip_prefix("SLURM_") else {
        return name.starts_with("SQUEUE_") || name.starts_with("SCANCEL_");
    };
    let of_job = name.starts_with("ARRAY_") || name.starts_with("JOB_");
    let of_task = matches!(name, "PROCID" | "LOCALID" | "RESTART_COUNT" | "JOBID");
    name == "CLUSTERS" || of_job || of_task || (in_job && !OF_SITE.contains(&name))
}
