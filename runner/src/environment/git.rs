//! The commit that is checked out around a directory, from git's files alone.
//!
//! In: a directory. Out: the hash of its commit, in hex. Nothing in a repository is believed but where HEAD points: no
//! program is run, no setting is read, so that looking at somebody else's repository does nothing that its owner wrote.
//! Every file is a regular one and short, and every chain of names ends. Deliberately absent: whether files differ from
//! the commit, which only git's filters could tell; repositories whose references are no files (reftable).

use std::fs;
use std::path::{Component, Path, PathBuf};

use memchr::memmem;
use retort_checkpoint::regular;

/// Bytes of the longest file with one name or hash in it.
const LONGEST: u64 = 4096;
/// Bytes of the longest `packed-refs` that is looked through: a million references.
const LONGEST_LIST: u64 = 64 << 20;
/// References that name another one, at most so many in a row; git follows five.
const LONGEST_CHAIN: usize = 5;

/// The commit checked out around `dir`; none where there is no repository, no commit, or what cannot be read.
pub fn commit(dir: &Path) -> Option<String> {
    let git = dir.ancestors().find_map(repository)?;
    let common = common_dir(&git);
    let mut name = "HEAD".to_owned();
    for _ in 0..=LONGEST_CHAIN {
        // Of a worktree, only what is its own lies in its own directory.
        let loose = [&git, &common]
            .into_iter()
            .find_map(|dir| line(&dir.join(&name)));
        let Some(text) = loose else {
            return packed(&common.join("packed-refs"), &name);
        };
        let Some(target) = text.strip_prefix("ref:") else {
            return hash(&text);
        };
        name = reference(target.trim())?;
    }
    None
}

/// The directory of the repository whose top this is. In a worktree or a submodule `.git` is a file that names it.
fn repository(dir: &Path) -> Option<PathBuf> {
    let git = dir.join(".git");
    let git = match fs::metadata(&git).ok()?.is_dir() {
        true => git,
        false => dir.join(line(&git)?.strip_prefix("gitdir:")?.trim()),
    };
    git.join("HEAD").exists().then_some(git)
}

/// Where the references lie that all worktrees of a repository share.
fn common_dir(git: &Path) -> PathBuf {
    line(&git.join("commondir")).map_or_else(|| git.to_owned(), |dir| git.join(dir))
}

/// A name below `refs/` that stays there.
fn reference(name: &str) -> Option<String> {
    let path = Path::new(name);
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    (plain && path.starts_with("refs")).then(|| name.to_owned())
}

/// The first line of a short file.
fn line(path: &Path) -> Option<String> {
    let text = String::from_utf8(regular::read(path, LONGEST).ok()?).ok()?;
    Some(text.lines().next()?.trim().to_owned())
}

/// A hash in hex, of SHA-1 or of SHA-256.
fn hash(text: &str) -> Option<String> {
    let hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    (hex && [40, 64].contains(&text.len())).then(|| text.to_ascii_lowercase())
}

/// The hash of a reference in the list of those that have no file of their own: lines `HASH NAME`. The list is searched as
/// one text, because lines may be short and many.
fn packed(list: &Path, name: &str) -> Option<String> {
    let bytes = regular::read(list, LONGEST_LIST).ok()?;
    let name = format!(" {name}");
    let at = memmem::find_iter(&bytes, &name)
        .find(|at| matches!(bytes.get(at + name.len()), None | Some(b'\n' | b'\r')))?;
    let line = memchr::memrchr(b'\n', &bytes[..at]).map_or(0, |end| end + 1);
    hash(std::str::from_utf8(&bytes[line..at]).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn git(dir: &Path, arguments: &[&str]) -> String {
        let output = Command::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-C"])
            .arg(dir)
            .args(arguments)
            .stderr(Stdio::null())
            .output()
            .expect("git");
        assert!(output.status.success(), "git {arguments:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// A repository with one commit, and what git says of it.
    fn repository(dir: &Path) -> String {
        git(dir, &["init", "-q"]);
        fs::write(dir.join("recipe.yaml"), "version: 1").unwrap();
        git(dir, &["add", "."]);
        git(dir, &["commit", "-q", "-m", "first"]);
        git(dir, &["rev-parse", "HEAD"])
    }

    #[test]
    fn the_commit_is_what_git_says() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("main");
        fs::create_dir_all(dir.join("deep/er")).unwrap();
        assert_eq!(commit(&dir), None);
        git(&dir, &["init", "-q"]);
        assert_eq!(commit(&dir), None, "no commit yet");
        let first = repository(&dir);
        let found = |dir: &Path| commit(dir).unwrap();
        assert_eq!(found(&dir), first);
        assert_eq!(found(&dir.join("deep/er")), first);
        git(&dir, &["pack-refs", "--all"]);
        assert!(
            !dir.join(".git/refs/heads")
                .read_dir()
                .unwrap()
                .any(|_| true),
            "packed"
        );
        assert_eq!(found(&dir), first);
        git(&dir, &["commit", "-q", "--allow-empty", "-m", "second"]);
        let second = git(&dir, &["rev-parse", "HEAD"]);
        assert_eq!(found(&dir), second, "the file counts, not the older list");
        git(&dir, &["checkout", "-q", "--detach", &first]);
        assert_eq!(found(&dir), first);
        git(
            &dir,
            &[
                "worktree", "add", "-q", "-b", "a/branch", "../other", &second,
            ],
        );
        let other = root.path().join("other");
        assert_eq!(found(&other), second);
        git(&dir, &["pack-refs", "--all"]);
        assert_eq!(found(&other), second);
    }

    #[test]
    fn what_is_no_repository_of_git_s_ends_at_once() {
        let root = tempfile::tempdir().unwrap();
        let first = repository(root.path());
        let at = |name: &str| root.path().join(".git").join(name);
        let head = |text: &str| fs::write(at("HEAD"), text).unwrap();
        let outside = root.path().join("outside");
        fs::write(&outside, &first).unwrap();
        for target in [
            "ref: ../outside",
            "ref: refs/../../outside",
            &format!("ref: {}", outside.display()),
            "ref: refs/heads/none",
            "ref: ",
            "",
            "no hash",
            &first[1..],
        ] {
            head(target);
            assert_eq!(commit(root.path()), None, "{target}");
        }
        head("ref: refs/heads/a");
        fs::write(at("refs/heads/a"), "ref: refs/heads/b").unwrap();
        fs::write(at("refs/heads/b"), "ref: refs/heads/a").unwrap();
        assert_eq!(commit(root.path()), None, "a loop");
        head("ref: refs/heads/pipe");
        let status = Command::new("mkfifo").arg(at("refs/heads/pipe")).status();
        assert!(status.unwrap().success());
        assert_eq!(commit(root.path()), None, "a pipe");
        head(&"a".repeat(1 << 20));
        assert_eq!(commit(root.path()), None, "a long file");
        head("ref: refs/heads/c");
        let long = format!("{}\n{first} refs/heads/c\n", "x".repeat(10 << 20));
        fs::write(at("packed-refs"), long).unwrap();
        assert_eq!(
            commit(root.path()),
            Some(first.clone()),
            "behind a long line"
        );
        let other = "0".repeat(40);
        let many = format!(
            "{}{other} refs/heads/c2\n{other} refs/heads/c/d\n{first} refs/heads/c",
            "\n".repeat(60 << 20)
        );
        fs::write(at("packed-refs"), many).unwrap();
        assert_eq!(
            commit(root.path()),
            Some(first.clone()),
            "behind many lines"
        );
        fs::write(
            at("packed-refs"),
            format!("{other}\n{first} refs/heads/c\n"),
        )
        .unwrap();
        assert_eq!(commit(root.path()), Some(first), "the hash of its own line");
        let list = fs::File::create(at("packed-refs")).unwrap();
        list.set_len(1 << 40).unwrap();
        assert_eq!(commit(root.path()), None, "a list without end");
        fs::remove_file(at("HEAD")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", at("HEAD")).unwrap();
        assert_eq!(commit(root.path()), None, "a device");
    }
}
