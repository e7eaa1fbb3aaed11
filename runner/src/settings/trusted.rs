//! The project files that the user has trusted, by real path and hash.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use super::{SettingsError, distrusted, file, wrong};
use crate::trust;

/// The file, beside the user's settings, that lists trusted project files.
const TRUSTED: &str = "trusted";

/// Whether the user has trusted a file with this hash.
pub(super) fn is_trusted(
    path: &Path,
    hash: &str,
    user_dir: Option<&Path>,
) -> Result<bool, SettingsError> {
    let Some(user_dir) = user_dir else {
        return Ok(false);
    };
    let place = user_dir.join(TRUSTED);
    let known = trust::read_hashes(&place).map_err(|error| distrusted(&place, error))?;
    let name = trusted_name(path)?;
    Ok(known.is_some_and(|known| known.get(&name).is_some_and(|known| known == hash)))
}

/// The key of a trusted file: its real path.
fn trusted_name(path: &Path) -> Result<String, SettingsError> {
    let shown = path.display();
    let real = std::fs::canonicalize(path)
        .map_err(|error| wrong(format!("cannot read {shown}: {error}")))?;
    match real.to_str() {
        Some(name) if !name.contains(char::is_control) => Ok(name.to_owned()),
        _ => Err(wrong(format!(
            "{shown} cannot be remembered: its path has characters that are no text"
        ))),
    }
}

/// Trusts the commands of a project's file until it changes. Returns the commands: name and value.
///
/// # Errors
/// It is invalid, others could change it, or there is no place to record it.
pub fn trust_file(
    path: &Path,
    user_dir: Option<&Path>,
) -> Result<Vec<(String, String)>, SettingsError> {
    let user_dir = user_dir.ok_or_else(|| {
        wrong("there is no place to remember it: neither XDG_CONFIG_HOME nor HOME is set")
    })?;
    let (layer, hash) = file(path)?;
    let place = user_dir.join(TRUSTED);
    let known = trust::read_hashes(&place).map_err(|error| distrusted(&place, error))?;
    let mut known = known.unwrap_or_default();
    known.insert(trusted_name(path)?, hash);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(user_dir)
        .map_err(|error| wrong(format!("cannot make {}: {error}", user_dir.display())))?;
    trust::write_hashes(&place, &known).map_err(|error| wrong(error.to_string()))?;
    let kinds = layer.slurm.kinds.iter();
    let kinds = kinds.map(|(kind, partial)| (format!("slurm.kinds.{kind}"), partial));
    let all = std::iter::once(("slurm".to_owned(), &layer.slurm)).chain(kinds);
    let lines = all.flat_map(|(name, partial)| {
        let run = ["sbatch", "prologue"].into_iter();
        run.filter_map(move |key| Some((format!("{name}.{key}"), partial.value(key)?)))
    });
    Ok(lines.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::tests::write;
    use crate::settings::{FILE, Overrides, Settings};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn lines_that_came_with_a_project_run_once_they_are_trusted() {
        let root = tempfile::tempdir().unwrap();
        let (project, user) = (root.path().join("p"), root.path().join("u/retort"));
        let path = project.join(FILE);
        let given = Overrides {
            user_dir: Some(user.clone()),
            ..Overrides::default()
        };
        let profile = |given: &Overrides, kind: &str| {
            Settings::read(&project.join("a"), given).and_then(|settings| settings.profile(kind))
        };
        let harmless = "executor = 'slurm'\n[slurm]\npartition = 'short'\ncpus = 2\n";
        write(&path, harmless);
        assert_eq!(profile(&given, "sample").unwrap().cpus, Some(2));
        for lines in [
            "prologue = 'touch x'",
            "sbatch = ['--exclusive']",
            "[slurm.kinds.distill]\nprologue = 'touch x'",
        ] {
            write(&path, &format!("{harmless}{lines}\n"));
            let error = profile(&given, "distill").unwrap_err();
            assert!(
                error.message.contains("have not trusted"),
                "{lines}: {error}"
            );
            assert!(
                error
                    .hint
                    .unwrap()
                    .contains("`retort trust` in its directory"),
                "{lines}"
            );
            let settings = Settings::read(&project, &given).unwrap();
            assert_eq!(settings.untrusted().count(), 1);
            // Settings that have no effect need no trust.
            let of_kind = lines.contains("kinds");
            assert_eq!(profile(&given, "sample").is_ok(), of_kind, "{lines}");
            let mut own = given.clone();
            own.slurm = vec!["prologue=:".into(), "sbatch=--nice".into()];
            assert_eq!(profile(&own, "distill").unwrap().prologue, ":");
            let trusted = trust_file(&path, Some(&user)).unwrap();
            assert_eq!(trusted.len(), 1, "{trusted:?}");
            profile(&given, "distill").unwrap();
            // From another directory, through a link to the project.
            let link = root.path().join("link");
            if !link.is_symlink() {
                std::os::unix::fs::symlink("p", &link).unwrap();
            }
            let settings = Settings::read(&link, &given).unwrap();
            settings.profile("distill").unwrap();
            write(&path, &format!("{harmless}{lines} # changed\n"));
            profile(&given, "distill").unwrap_err();
        }
        // A copy elsewhere is another project.
        trust_file(&path, Some(&user)).unwrap();
        let copy = root.path().join("q");
        write(&copy.join(FILE), &std::fs::read_to_string(&path).unwrap());
        let settings = Settings::read(&copy, &given).unwrap();
        settings.profile("distill").unwrap_err();
        // The user's own settings need no further trust.
        write(&user.join(FILE), "[slurm]\nprologue = 'module load x'\n");
        let settings = Settings::read(root.path(), &given).unwrap();
        assert_eq!(
            settings.profile("distill").unwrap().prologue,
            "module load x"
        );
        // A list that others could write to is ignored.
        let memory = user.join(TRUSTED);
        std::fs::set_permissions(&memory, std::fs::Permissions::from_mode(0o666)).unwrap();
        let error = profile(&given, "distill").unwrap_err();
        assert!(error.message.contains("writable by everybody"), "{error}");
        trust_file(&path, None).unwrap_err();
    }
}
