//! Settings of several origins: precedence, and refusals.

use super::*;
use std::os::unix::fs::PermissionsExt;

pub(super) fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
}

#[test]
fn the_stronger_origin_wins_and_is_named() {
    let root = tempfile::tempdir().unwrap();
    let (project, user) = (root.path().join("p"), root.path().join("u"));
    write(
        &project.join(FILE),
        "executor = 'slurm'\n[slurm]\npartition = 'project'\ntime = 90\ncpus = 2\n[slurm.kinds.distill]\ncpus = 8\n",
    );
    write(
        &user.join(FILE),
        "executor = 'local'\n[slurm]\npartition = 'user'\naccount = 'me'\n[slurm.kinds.distill]\naccount = 'us'\n",
    );
    let mut given = Overrides {
        user_dir: Some(user.clone()),
        ..Overrides::default()
    };
    let of = |given: &Overrides| Settings::read(&project.join("a/b"), given).unwrap();
    let settings = of(&given);
    let project_file = project.join(FILE).display().to_string();
    assert_eq!(settings.executor(), (Executor::Slurm, &*project_file));
    let profile = settings.profile("distill").unwrap();
    assert_eq!(
        (
            profile.partition.as_deref(),
            profile.account.as_deref(),
            profile.time.as_deref()
        ),
        (Some("project"), Some("us"), Some("90"))
    );
    assert_eq!((profile.cpus, profile.requeue), (Some(8), DEFAULT_REQUEUE));
    assert_eq!(settings.profile("sample").unwrap().cpus, Some(2));
    given.executor_variable = Some("local".into());
    given.slurm_variable = Some("partition=variable cpus=4".into());
    let settings = of(&given);
    assert_eq!(settings.executor(), (Executor::Local, "environment"));
    assert_eq!(settings.profile("distill").unwrap().cpus, Some(4));
    given.executor = Some(Executor::Slurm);
    given.slurm = vec![
        "distill.cpus=16".into(),
        "sbatch=--exclusive".into(),
        "sbatch=--nice".into(),
    ];
    let settings = of(&given);
    assert_eq!(settings.executor(), (Executor::Slurm, "flag"));
    let profile = settings.profile("distill").unwrap();
    assert_eq!(
        (profile.cpus, profile.sbatch.join(" ").as_str()),
        (Some(16), "--exclusive --nice")
    );
    let listed = settings.list();
    let origin = |name: &str| {
        let found = listed.iter().find(|(known, _, _)| known == name);
        found.map(|(_, value, origin)| (value.as_str(), origin.as_str()))
    };
    assert_eq!(origin("slurm.partition"), Some(("variable", "environment")));
    assert_eq!(origin("slurm.kinds.distill.cpus"), Some(("16", "flag")));
    assert_eq!(origin("slurm.time"), Some(("90", &*project_file)));
    assert_eq!(Settings::default().executor(), (Executor::Local, "default"));
}

/// Settings of a project's file and of the words of `--slurm`.
fn settings(text: &str, slurm: &[&str]) -> Settings {
    let root = tempfile::tempdir().unwrap();
    write(&root.path().join(FILE), text);
    let given = Overrides {
        slurm: slurm.iter().map(|&word| word.to_owned()).collect(),
        ..Overrides::default()
    };
    let mut settings = Settings::read(root.path(), &given).unwrap();
    settings.layers[2].origin = "project".into();
    settings
}

#[test]
fn what_is_listed_of_a_kind_is_what_holds_for_it() {
    let text = "[slurm.kinds.distill]\ncpus = 8\ntime = '4:00:00'\n";
    let settings = settings(text, &["cpus=4"]);
    assert_eq!(settings.profile("distill").unwrap().cpus, Some(4));
    let list = settings.list();
    let of_kinds: Vec<_> = list
        .iter()
        .filter(|(name, _, _)| name.starts_with("slurm.kinds."))
        .map(|(name, value, origin)| [name.as_str(), value, origin])
        .collect();
    let expected = [
        ["slurm.kinds.distill.time", "4:00:00", "project"],
        ["slurm.kinds.distill.cpus", "4", "flag"],
    ];
    assert_eq!(of_kinds, expected);
}

#[test]
fn what_nobody_sets_is_listed_with_its_default() {
    let text = "[slurm]\nqos = 'low'\n";
    // Where stages run on this machine, only what somebody has set.
    assert_eq!(settings(text, &[]).list().len(), 2);
    let settings = settings(&format!("executor = 'slurm'\n{text}"), &[]);
    let list = settings.list();
    assert_eq!(list.len(), 1 + DEFAULTS.len());
    for (name, value, origin) in &list {
        match name.as_str() {
            "executor" => assert_eq!((&**value, &**origin), ("slurm", "project")),
            "slurm.qos" => assert_eq!((&**value, &**origin), ("low", "project")),
            _ => assert_eq!(origin, "default", "{name}"),
        }
    }
    // As they are applied.
    let profile = settings.profile("sample").unwrap();
    let default = |key: &str| DEFAULTS.iter().find(|(name, _)| *name == key).unwrap().1;
    assert_eq!(default("requeue"), profile.requeue.to_string());
    for (key, time) in [
        ("signal", profile.signal),
        ("poll", profile.poll),
        ("shrink-after", profile.shrink_after),
    ] {
        assert_eq!(duration::parse(default(key)).unwrap(), time, "{key}");
    }
}

#[test]
fn a_kind_has_gpus_where_its_own_jobs_ask_for_them() {
    let all = ["tokenizer", "distill", "sample"];
    let check = |text: &str, slurm: &[&str], expected: [bool; 3]| {
        let settings = settings(text, slurm);
        let found = all.map(|kind| settings.asks_for_gpus(kind));
        assert_eq!(found, expected, "{text} {slurm:?}");
    };
    let of_one = "[slurm.kinds.distill]\ngres = 'gpu:2'\n";
    check("", &[], [false; 3]);
    check(of_one, &[], [false, true, false]);
    check(of_one, &["gres=gpu:1"], [true; 3]);
    check(
        "[slurm]\ngres = 'gpu:1'\n",
        &["sample.gres=none"],
        [true, true, false],
    );
    check("", &["sbatch=--gpus-per-task=1"], [true; 3]);
    check(
        "",
        &["distill.sbatch=--gres=gpu:a100:1"],
        [false, true, false],
    );
    check(
        "",
        &["distill.sbatch=-G4", "sbatch=--nice"],
        [false, true, false],
    );
    check(
        "[slurm]\nsbatch = ['--gpus=1']\n",
        &["sample.sbatch=--nice"],
        [true, true, false],
    );
}

#[test]
fn the_file_above_is_found_from_the_directory_of_a_bare_name() {
    let here = project_file(Path::new("."));
    assert_eq!(project_file(Path::new("")), here);
    let root = tempfile::tempdir().unwrap();
    write(&root.path().join(FILE), "");
    let found = project_file(&root.path().join("a/./b"));
    assert_eq!(found, Some(root.path().join(FILE)));
}

#[test]
fn what_makes_no_sense_is_named() {
    let root = tempfile::tempdir().unwrap();
    for (text, expected) in [
        ("executor = 'cloud'", "unknown variant `cloud`"),
        ("[slurm]\npartitoin = 'x'", "unknown field `partitoin`"),
        ("[slurm]\ncpus = 'x'", "line 2"),
        ("[slurm", "retort.toml"),
        ("[slurm]\npartition = \"a\\nb\"", "more than a line"),
        ("[slurm.kinds.a.kinds.b]\ncpus = 1", "kinds of its own"),
        ("[slurm]\ncpus = 0", "slurm.cpus is 0"),
        ("[slurm]\nsbatch = ['x']", "expected an option"),
        ("[slurm]\nsbatch = ['--array=1-2']", "retort sets itself"),
        ("[slurm]\nsbatch = ['-a1-2']", "retort sets itself"),
        ("[slurm]\nsbatch = ['-W']", "retort sets itself"),
        (
            "[slurm]\nsbatch = ['--clusters=far']",
            "this machine's cluster only",
        ),
        (
            "[slurm]\nsbatch = ['--clus=far']",
            "this machine's cluster only",
        ),
        ("[slurm]\nsbatch = ['-Mfar']", "this machine's cluster only"),
        ("[slurm.kinds.'']\ncpus = 1", "has no name"),
        ("[slurm]\nsignal = '60'", "expected a time"),
    ] {
        write(&root.path().join(FILE), text);
        let error = Settings::read(root.path(), &Overrides::default())
            .and_then(|settings| settings.profile("sample").map(drop))
            .expect_err(text);
        assert!(error.message.contains(expected), "{text}: {error}");
        assert!(error.message.contains("retort.toml"), "{text}: {error}");
    }
    std::fs::remove_file(root.path().join(FILE)).unwrap();
    for word in ["x", "=", "cpus=many", "a.b.c=1", "nothing=1"] {
        let given = Overrides {
            slurm: vec![word.to_owned()],
            ..Overrides::default()
        };
        let error = Settings::read(root.path(), &given).expect_err(word);
        assert!(error.message.starts_with("--slurm"), "{error}");
    }
}

#[test]
fn a_file_that_others_could_change_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(FILE);
    write(&path, "executor = 'slurm'");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    let error = Settings::read(&root.path().join("x"), &Overrides::default()).unwrap_err();
    assert!(
        error.message.contains("is writable by everybody"),
        "{error}"
    );
    assert!(error.hint.unwrap().contains("chmod o-w"));
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/null", &path).unwrap();
    let error = Settings::read(&root.path().join("x"), &Overrides::default()).unwrap_err();
    assert!(error.message.contains("is a device or a pipe"), "{error}");
    let hint = error.hint.unwrap();
    assert!(
        hint.contains("put a regular file") && !hint.contains("chmod"),
        "{hint}"
    );
}

#[test]
fn a_job_has_more_time_than_its_signal_takes() {
    let root = tempfile::tempdir().unwrap();
    let of = |time: &str| {
        let given = Overrides {
            slurm: vec![format!("time={time}"), "signal=90s".into()],
            ..Overrides::default()
        };
        let profile = Settings::read(root.path(), &given).unwrap().profile("do");
        profile.map(|_| ()).map_err(|error| error.message)
    };
    for time in ["1", "1:30", "0:1:30", "0-0:1"] {
        let message = of(time).unwrap_err();
        assert!(
            message.contains("not more than slurm.signal (90 s)"),
            "{message}"
        );
    }
    for time in [
        "2",
        "1:31",
        "0:1:31",
        "1-0",
        "0-0:2",
        "0",
        "UNLIMITED",
        "soon",
    ] {
        assert_eq!(of(time), Ok(()), "{time}");
    }
}
