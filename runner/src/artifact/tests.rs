//! Artifacts: publishing, refusals, and leftovers.

use super::*;
use retort_abi::ArtifactMeta;

fn filled(root: &Path, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let dir = root.join(name);
    fs::create_dir_all(&dir).unwrap();
    for (path, text) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn record(contents: &Contents) -> ArtifactRecord {
    ArtifactRecord {
        hash: contents.hash.clone(),
        kind: "k".into(),
        name: "n".into(),
        size: contents.size,
        files: contents.files.clone(),
        meta: ArtifactMeta::default(),
    }
}

#[test]
fn a_lock_that_nobody_holds_is_tidied_up() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout::new(root.path()).unwrap();
    let held = layout.open_work("held").unwrap().unwrap();
    fs::remove_dir(held.path()).unwrap();
    let work = root.path().join("work");
    // A killed runner left this one; the other one guards work that can be resumed.
    fs::write(work.join("idle.lock"), "").unwrap();
    fs::write(work.join("needed.lock"), "").unwrap();
    fs::create_dir(work.join("needed")).unwrap();
    fs::write(work.join("needed/checkpoint"), "").unwrap();
    layout.tidy();
    let there = |name: &str| work.join(name).exists();
    assert!(there("held.lock") && there("needed.lock") && !there("idle.lock"));
}

#[test]
fn the_hash_is_of_paths_and_bytes() {
    let root = tempfile::tempdir().unwrap();
    let hash = |name: &str, files: &[(&str, &str)]| {
        contents(&filled(root.path(), name, files)).unwrap().hash
    };
    let reference = hash("a", &[("x", "1"), ("d/y", "2")]);
    assert_eq!(reference, hash("b", &[("d/y", "2"), ("x", "1")]));
    assert_ne!(reference, hash("c", &[("x", "1"), ("d/z", "2")]));
    assert_ne!(reference, hash("d", &[("x", "1"), ("d/y", "3")]));
}

#[test]
fn names_from_the_history_lead_nowhere() {
    for plain in ["codes", "größte", "a.b", "x y"] {
        assert_eq!(file_name(plain), plain);
    }
    let odd = [
        "",
        ".",
        "..",
        "../../x",
        "/",
        "a/b",
        "a_b/",
        "\x1b[2J",
        "a\0b",
        "\\",
        &"x".repeat(999),
    ];
    let names: Vec<String> = odd.iter().map(|name| file_name(name)).collect();
    for (name, odd) in names.iter().zip(odd) {
        assert!(is_inner_path(name) && !name.contains('/'), "{name}");
        assert_ne!(name, odd);
        assert_eq!(names.iter().filter(|other| *other == name).count(), 1);
    }
}

#[test]
fn only_files_within_an_artifact_are_opened() {
    let root = tempfile::tempdir().unwrap();
    let dir = filled(root.path(), "a", &[("x", "1"), ("d/y", "2")]);
    fs::write(root.path().join("secret"), "3").unwrap();
    std::os::unix::fs::symlink(root.path().join("secret"), dir.join("link")).unwrap();
    std::os::unix::fs::symlink(root.path(), dir.join("up")).unwrap();
    let pipe =
        std::ffi::CString::new(dir.join("pipe").into_os_string().into_encoded_bytes()).unwrap();
    // SAFETY: a C string.
    assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
    for path in ["x", "d/y"] {
        assert!(open_inner(&dir, path).is_ok(), "{path}");
    }
    let secret = root.path().join("secret");
    let refused = [
        "../secret",
        "link",
        "up/secret",
        "pipe",
        "d",
        "d/../x",
        "",
        secret.to_str().unwrap(),
    ];
    for path in refused {
        assert!(open_inner(&dir, path).is_err(), "{path}");
    }
}

#[test]
fn committing_moves_once_and_again() {
    let root = tempfile::tempdir().unwrap();
    let artifacts = root.path().join("artifacts");
    let first = commit(
        &filled(root.path(), "a", &[("x", "1"), ("d/y", "2")]),
        &artifacts,
    )
    .unwrap();
    let place = artifacts.join(&first.hash);
    assert_eq!(
        (
            first.size,
            fs::read_to_string(place.join("d/y")).unwrap().as_str()
        ),
        (2, "2")
    );
    assert_eq!(
        first,
        commit(
            &filled(root.path(), "b", &[("x", "1"), ("d/y", "2")]),
            &artifacts
        )
        .unwrap()
    );
    assert!(!root.path().join("a").exists() && !root.path().join("b").exists());
    assert!(verify(&place, &record(&first)).is_empty());

    fs::remove_file(place.join("x")).unwrap();
    commit(
        &filled(root.path(), "c", &[("x", "1"), ("d/y", "2")]),
        &artifacts,
    )
    .unwrap();
    assert!(
        verify(&place, &record(&first)).is_empty(),
        "a damaged one is replaced"
    );
}

#[test]
fn damage_is_named() {
    let root = tempfile::tempdir().unwrap();
    let artifacts = root.path().join("artifacts");
    let made = record(
        &commit(
            &filled(root.path(), "a", &[("x", "1"), ("y", "2"), ("z", "3")]),
            &artifacts,
        )
        .unwrap(),
    );
    let place = artifacts.join(&made.hash);
    fs::remove_file(place.join("x")).unwrap();
    fs::remove_file(place.join("y")).unwrap();
    fs::write(place.join("y"), "!").unwrap();
    // Too long to read: its size is enough, and surplus bytes are not read either.
    fs::remove_file(place.join("z")).unwrap();
    for name in ["z", "new"] {
        let file = File::create(place.join(name)).unwrap();
        file.set_len(1 << 40).unwrap();
    }
    let found: Vec<_> = verify(&place, &made)
        .into_iter()
        .map(|damage| (damage.path, damage.problem))
        .collect();
    let expected = [
        ("x", "missing"),
        ("y", "changed"),
        ("z", "changed"),
        ("new", "added"),
    ];
    assert_eq!(
        found,
        expected.map(|(path, problem)| (path.to_owned(), problem.to_owned()))
    );
    assert_eq!(
        verify(&root.path().join("nowhere"), &made)[0].problem,
        "missing"
    );
}

#[test]
fn only_files_make_an_artifact() {
    let root = tempfile::tempdir().unwrap();
    let artifacts = root.path().join("artifacts");
    let linked = filled(root.path(), "a", &[("x", "1")]);
    std::os::unix::fs::symlink("/etc/passwd", linked.join("link")).unwrap();
    assert!(matches!(
        commit(&linked, &artifacts),
        Err(ArtifactError::Kind { .. })
    ));
    assert!(matches!(
        commit(&filled(root.path(), "b", &[]), &artifacts),
        Err(ArtifactError::Empty)
    ));
    assert!(!artifacts.exists(), "nothing became visible");
}

#[test]
fn staging_of_dead_runs_is_removed() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout::new(root.path()).unwrap();
    let alive = layout.open_staging("alive").unwrap();
    fs::create_dir_all(layout.staging("dead").join("1")).unwrap();
    fs::write(root.path().join("staging/dead.lock"), "").unwrap();
    let _mine = layout.open_staging("mine").unwrap();
    assert!(!layout.staging("dead").exists() && !root.path().join("staging/dead.lock").exists());
    assert!(layout.staging("alive").exists() && layout.staging("mine").exists());
    drop(alive);
    assert!(!layout.staging("alive").exists());
}

#[test]
fn a_work_directory_has_one_owner_and_survives_unless_empty() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout::new(root.path()).unwrap();
    let work = layout.open_work("d").unwrap().unwrap();
    assert!(layout.open_work("d").unwrap().is_none());
    fs::write(work.path().join("checkpoint"), "1").unwrap();
    drop(work);
    let again = layout.open_work("d").unwrap().unwrap();
    assert!(again.path().join("checkpoint").exists());
    again.remove();
    assert_eq!(fs::read_dir(root.path().join("work")).unwrap().count(), 0);
    drop(layout.open_work("e").unwrap());
    assert_eq!(fs::read_dir(root.path().join("work")).unwrap().count(), 0);
}

#[test]
fn only_errors_in_artifacts_say_how_to_mend_one() {
    let hash = "0123456789abcdef".repeat(4);
    let within =
        |name: &str| format!("/store/artifacts/{name}/config.json: expected value at line 1");
    assert_eq!(repair_of(&within(&hash)), Some(REPAIR));
    // Neither mends a disk.
    let failed = std::io::Error::from_raw_os_error(libc::EIO);
    for message in [
        format!("cannot read /data/d.csv: {failed}"),
        format!("/store/artifacts/{hash}/config.json: {failed}"),
    ] {
        assert_eq!(repair_of(&message), Some(DISK), "{message}");
    }
    let twice = format!("artifacts/x: {}", within(&hash));
    assert_eq!(repair_of(&twice), Some(REPAIR));
    for other in [
        within(&hash[1..]),
        within("größe"),
        "/data/artifacts/".to_owned(),
        format!("artifacts/{hash}"),
        hash,
    ] {
        assert_eq!(repair_of(&other), None, "{other}");
    }
}
