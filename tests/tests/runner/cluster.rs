//! Stages as jobs of Slurm: against a real one, of two nodes on this machine, and at scale against one that is imagined.

#[path = "cluster/broken.rs"]
mod broken;
#[path = "cluster/imagined.rs"]
mod imagined;
#[path = "cluster/jobs.rs"]
mod jobs;
#[path = "cluster/site.rs"]
mod site;
