//! The script that Slurm runs.

use std::path::Path;

use crate::cluster::slurm::Layout;
use crate::settings::Profile;

/// The script of a job: the prologue, then this program, once for each rank if there are ranks.
pub fn text(dir: &Path, profile: &Profile, layout: Layout) -> Result<String, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let (meeting, start) = match layout {
        Layout::Single | Layout::Array(_) => ("", ""),
        // When one rank fails, the others get time to save their work.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Overrides, Settings};

    #[test]
    fn the_prologue_comes_before_the_worker() {
        let root = tempfile::tempdir().unwrap();
        let given = Overrides {
            slurm: vec!["prologue=module load cuda\nexport X=1".into()],
            ..Overrides::default()
        };
        let settings = Settings::read(root.path(), &given).unwrap();
        let profile = settings.profile("distill").unwrap();
        let spool = Path::new("/spool/it's");
        let one = text(spool, &profile, Layout::Single).unwrap();
        assert!(
            one.starts_with("#!/bin/bash\nmodule load cuda\nexport X=1\n"),
            "{one}"
        );
        assert!(
            one.ends_with(" worker --spool '/spool/it'\\''s'\n"),
            "{one}"
        );
        let ranks = text(spool, &profile, Layout::Ranks(2)).unwrap();
        let at = |words: &str| ranks.find(words).expect(words);
        assert!(at("export X=1") < at("MASTER_ADDR") && at("MASTER_ADDR") < at("exec srun"));
    }
}
