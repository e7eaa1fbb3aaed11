//! Exports from a store: runs and artifacts go to the requested place and nowhere else.

use std::os::unix::fs::symlink;

use crate::imports::{change, contents};
use crate::lab::{Lab, fifo};

#[test]
fn an_export_takes_nothing_but_the_files_of_artifacts() {
    let lab = Lab::new(&[
        "a: {kind: do, text: hello}",
        "b: {kind: do, text: second, input: a}",
    ]);
    lab.run(&[]).expect(0);
    let secret = lab.dir.path().join("secret.txt");
    std::fs::write(&secret, "do not tell anybody").unwrap();
    let artifacts = lab.store_dir().join("artifacts");
    let hashes = lab.entries("artifacts");
    let thing = artifacts.join(&hashes[0]).join("thing.txt");
    let file = lab.dir.path().join("out.db");
    let replaced: [&dyn Fn(); 5] = [
        &|| symlink(&secret, &thing).unwrap(),
        &|| fifo(&thing),
        &|| symlink("/dev/zero", &thing).unwrap(),
        &|| std::fs::create_dir(&thing).unwrap(),
        &|| std::fs::write(&thing, "hallo").unwrap(),
    ];
    for replace in replaced {
        if thing.is_dir() && !thing.is_symlink() {
            std::fs::remove_dir(&thing).unwrap();
        } else {
            std::fs::remove_file(&thing).unwrap();
        }
        replace();
        let out = file.to_str().unwrap();
        let said = lab
            .retort(&["runs", "export", "--files", "--force", "-o", out])
            .expect(1);
        assert!(said.stdout.contains(&hashes[0]), "{}", said.stdout);
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(11).any(|part| part == b"do not tell"));
        // It contains nothing of the artifact, and all of the other.
        let fresh = Lab::new(&[]);
        fresh.retort(&["runs", "import", out]).expect(0);
        assert_eq!(fresh.entries("artifacts"), hashes[1..]);
    }
    // A record with a path to the outside, from a store that somebody else has written to.
    change(
        &lab.store_dir().join("history.db"),
        &format!(
            "update artifacts set files = replace(files, 'thing.txt', '{}')",
            secret.display()
        ),
    );
    let out = file.to_str().unwrap();
    lab.retort(&["runs", "export", "--files", "--force", "-o", out])
        .expect(1);
    let bytes = std::fs::read(&file).unwrap();
    assert!(!bytes.windows(11).any(|part| part == b"do not tell"));
    lab.retort(&["artifacts", "verify"]).expect(1);
}

#[test]
fn names_from_a_store_lead_nowhere_in_event_files() {
    let lab = Lab::new(&[
        "a: {kind: do, act: flood, amount: 100}",
        "b: {kind: do, act: flood, amount: 100, input: a}",
    ]);
    lab.run(&[]).expect(0);
    change(
        &lab.store_dir().join("history.db"),
        "update runs set id = '../../../evil'; update stages set name = '..' where name = 'a';
         update stages set name = '../../' || name where name = 'b';
         update outputs set meta = '{\"preview\": \"../../../r.yaml\"}'",
    );
    let out = lab.dir.path().join("deep/er/events");
    std::fs::create_dir_all(&out).unwrap();
    lab.retort(&[
        "runs",
        "export",
        "--as",
        "tensorboard",
        "-o",
        out.to_str().unwrap(),
    ])
    .expect(0);
    let inside = contents(&out);
    assert_eq!(
        inside.values().filter(|bytes| bytes.is_some()).count(),
        2,
        "{inside:?}"
    );
    let around = contents(&lab.dir.path().join("deep"));
    assert_eq!(around.len(), inside.len() + 2, "{:?}", around.keys());
    assert!(!lab.dir.path().join("evil").exists());
}

#[test]
fn an_export_takes_the_place_of_a_file_and_of_nothing_else() {
    let lab = Lab::new(&["a: {kind: do, text: hello}"]);
    lab.run(&[]).expect(0);
    let dir = lab.dir.path();
    fifo(&dir.join("pipe"));
    symlink("/dev/null", dir.join("device")).unwrap();
    std::fs::create_dir(dir.join("folder")).unwrap();
    for (name, kind) in [
        ("pipe", "a named pipe"),
        ("device", "a device"),
        ("folder", "a directory"),
    ] {
        lab.retort(&["runs", "export", "--force", "-o", name])
            .expect(1)
            .saying(&[name, kind, "not a regular file"]);
    }
    assert!(dir.join("device").is_symlink() && dir.join("folder").is_dir());
    // The file is made at the link's target, and the link stays.
    std::fs::write(dir.join("real.db"), "old").unwrap();
    symlink("real.db", dir.join("link.db")).unwrap();
    lab.retort(&["runs", "export", "--force", "-o", "link.db"])
        .expect(0);
    assert!(dir.join("link.db").is_symlink());
    let there = Lab::new(&[]);
    there
        .retort(&["runs", "import", dir.join("real.db").to_str().unwrap()])
        .expect(0);
    lab.retort(&["runs", "export", "--force", "-o", "store/history.db"])
        .expect(1)
        .saying(&["it is the history of the store itself"]);
    assert!(lab.latest().is_some());
}
