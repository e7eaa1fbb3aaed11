//! Stages as Slurm jobs: on a real Slurm with two nodes on this machine, and at scale on a simulated one.

#[path = "cluster/broken.rs"]
mod broken;
#[path = "cluster/fake.rs"]
mod fake;
#[path = "cluster/forgotten.rs"]
mod forgotten;
#[path = "cluster/imagined.rs"]
mod imagined;
#[path = "cluster/jobs.rs"]
mod jobs;
#[path = "cluster/profiles.rs"]
mod profiles;
#[path = "cluster/restarts.rs"]
mod restarts;
#[path = "cluster/site.rs"]
mod site;
#[path = "cluster/stages.rs"]
mod stages;
