//! What Slurm runs.

use std::path::Path;

use crate::cluster::slurm::Layout;
use crate::settings::Profile;

/// The script of a job: the prologue, and this very program, for each rank where there are ranks.
pub fn text(dir: &Path, profile: &Profile, layout: Layout) -> Result<String, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let (meeting, start) = match layout {
        Layout::Single | Layout::Array(_) => ("", ""),
        // One rank that ends badly leaves the others time to save their work.
        Layout::Ranks(_) => (
            include_str!("ranks.sh"),
            "srun --export=ALL --mpi=none --kill-on-bad-exit=0 --wait=0 ",
        ),
    };
    Ok(format!(
        "#!/bin/bash\n{}\n{meeting}exec {start}{} worker --spool {}\n",
        profile.prologue,
        quoted(&program),
        quoted(dir)
    ))
}
