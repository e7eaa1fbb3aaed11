//! Files named by options: which count, which are cached, which are refused.

use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};

fn filled(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    root
}

fn snapshot(path: &Path) -> FileSnapshot {
    let listing = Listing::of(path, FileKind::Dir).unwrap();
    listing.hashed(&BTreeMap::new()).unwrap().0
}

/// Makes a file's times old enough to be trusted.
fn age(path: &Path) {
    let hour_ago = SystemTime::now() - std::time::Duration::from_secs(3600);
    let file = fs::File::options().append(true).open(path).unwrap();
    file.set_modified(hour_ago).unwrap();
}

/// The same listing, looked at as soon as its files had been changed.
fn at_once(mut listing: Listing) -> Listing {
    let changes = listing.files.iter().map(|file| file.stamp.changed);
    listing.now = changes.max().unwrap().into();
    listing
}

/// The same listing, looked at long after.
fn later(mut listing: Listing) -> Listing {
    listing.now += 10 * CLOCK_STEP;
    listing
}

#[test]
fn a_folder_is_hashed_as_an_artifact_would_be() {
    let root = filled(&[("x", "1"), ("d/y", "2")]);
    let contents = crate::artifact::contents(root.path()).unwrap();
    assert_eq!(snapshot(root.path()).hash, contents.hash);
}

#[test]
fn links_count_as_what_they_lead_to() {
    let real = filled(&[("0/a.png", "1"), ("1/b.png", "2")]);
    let links = tempfile::tempdir().unwrap();
    fs::create_dir(links.path().join("0")).unwrap();
    symlink(real.path().join("0/a.png"), links.path().join("0/a.png")).unwrap();
    symlink(real.path().join("1"), links.path().join("1")).unwrap();
    assert_eq!(snapshot(links.path()).hash, snapshot(real.path()).hash);
    let top = links.path().join("top");
    symlink(real.path(), &top).unwrap();
    assert_eq!(snapshot(&top).hash, snapshot(real.path()).hash);
}

/// As in the caches of Hugging Face: names are links to files named after their content.
#[test]
fn a_cache_of_published_files_is_what_it_leads_to() {
    let files = [
        ("config.json", "{}"),
        ("tokenizer.json", "[]"),
        ("model.safetensors", "weights"),
    ];
    let real = filled(&files);
    let cache = tempfile::tempdir().unwrap();
    let (blobs, revision) = (cache.path().join("blobs"), cache.path().join("snapshots/1"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&revision).unwrap();
    for (name, content) in files {
        let blob = blake3::hash(content.as_bytes()).to_hex().to_string();
        fs::write(blobs.join(&blob), content).unwrap();
        symlink(Path::new("../../blobs").join(&blob), revision.join(name)).unwrap();
    }
    let hash = |path: &Path, kind: FileKind| {
        let listing = Listing::of(path, kind).unwrap();
        listing.hashed(&BTreeMap::new()).unwrap().0.hash
    };
    for kind in [FileKind::Dir, FileKind::Weights] {
        let before = hash(&revision, kind);
        assert_eq!(before, hash(real.path(), kind), "{kind:?}");
        let weights = fs::read_link(revision.join("model.safetensors")).unwrap();
        let blob = revision.join(weights);
        fs::write(&blob, "other weights").unwrap();
        assert_ne!(hash(&revision, kind), before, "{kind:?}");
        fs::write(&blob, "weights").unwrap();
    }
}

#[test]
fn what_is_too_long_for_an_image_is_not_read() {
    let root = filled(&[("0/a.png", ""), ("b.tar", "")]);
    let hash = || {
        let listing = Listing::of(root.path(), FileKind::Images).unwrap();
        listing.hashed(&BTreeMap::new()).unwrap().0.hash
    };
    let write = |name: &str, at: u64| {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().write(true).open(root.path().join(name));
        file.unwrap().write_at(b"x", at).unwrap();
    };
    write("0/a.png", images::LONGEST_FILE);
    let before = hash();
    write("0/a.png", 1 << 20);
    assert_eq!(hash(), before);
    write("0/a.png", images::LONGEST_FILE + 1);
    let longer = hash();
    assert_ne!(longer, before);
    // An archive has no such limit.
    write("b.tar", images::LONGEST_FILE);
    let before = hash();
    write("b.tar", 1 << 20);
    assert_ne!(hash(), before);
}

#[track_caller]
fn refused(make: impl Fn(&Path), said: &[&str]) {
    let root = filled(&[("0/a.png", "1")]);
    make(root.path());
    let error = Listing::of(root.path(), FileKind::Dir)
        .unwrap_err()
        .to_string();
    for text in said {
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn cycles_broken_links_and_pipes_are_named() {
    refused(
        |root| symlink(root, root.join("0/up")).unwrap(),
        &["0/up", "cycle"],
    );
    refused(
        |root| symlink("self", root.join("self")).unwrap(),
        &["/self", "cycle"],
    );
    refused(
        |root| symlink("none", root.join("0/x")).unwrap(),
        &["0/x", "link to none"],
    );
    let pipe = |root: &Path| {
        let made = std::process::Command::new("mkfifo")
            .arg(root.join("0/p.png"))
            .status();
        assert!(made.unwrap().success());
    };
    refused(pipe, &["0/p.png", "a named pipe"]);
    // Each folder links twice to the next: two to the power of forty ways.
    let ladder = |root: &Path| {
        for step in 0..40 {
            let (here, next) = (format!("s{step}"), format!("../s{}", step + 1));
            fs::create_dir_all(root.join(format!("s{}", step + 1))).unwrap();
            fs::create_dir_all(root.join(&here)).unwrap();
            symlink(&next, root.join(&here).join("a")).unwrap();
            symlink(&next, root.join(&here).join("b")).unwrap();
        }
    };
    refused(ladder, &["links lead to again"]);
}

/// Links to a folder of many: each of them leads to all.
#[test]
fn folders_that_links_multiply_are_counted() {
    let root = filled(&[("many/0/a.png", "1")]);
    let at = |name: String| root.path().join(name);
    for number in 0..150 {
        fs::create_dir_all(at(format!("many/{number}"))).unwrap();
    }
    let links = |numbers: std::ops::Range<u32>| {
        numbers.for_each(|number| symlink("many", at(format!("link{number}"))).unwrap());
        Listing::of(root.path(), FileKind::Images).map(|listing| listing.files.len())
    };
    assert_eq!(links(0..100).unwrap(), 101);
    let said = links(100..150).unwrap_err().to_string();
    assert!(
        said.contains("the last of 16384 folders that links lead to again"),
        "{said}"
    );
}

#[test]
fn what_no_loader_reads_does_not_count() {
    let root = filled(&[("0/a.png", "1")]);
    let before = snapshot(root.path());
    for name in [
        ".DS_Store",
        "0/.a.png.swp",
        "0/Thumbs.db",
        "desktop.ini",
        ".git/config",
    ] {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }
    assert_eq!(snapshot(root.path()).hash, before.hash);
    assert!(
        Listing::of(root.path(), FileKind::Dir)
            .unwrap()
            .is_as(&before)
    );
    fs::write(root.path().join("0/b.png"), "x").unwrap();
    assert_ne!(snapshot(root.path()).hash, before.hash);
}

#[test]
fn what_is_remembered_is_not_read_again() {
    let root = filled(&[("0/a", "1"), ("0/b", "2"), ("1/c", "3")]);
    let listing = || later(Listing::of(root.path(), FileKind::Dir).unwrap());
    let (first, remembered) = listing().hashed(&BTreeMap::new()).unwrap();
    assert_eq!(remembered.len(), 2, "{remembered:?}");
    assert_eq!(
        listing().folders(),
        remembered.keys().cloned().collect::<Vec<_>>()
    );
    let again: BTreeMap<_, _> = remembered
        .iter()
        .map(|(folder, files)| (folder.clone(), Folder::unpack(&files.pack())))
        .collect();
    assert_eq!(again, remembered);
    // A wrong cached hash shows that the file is not read.
    let mut wrong = remembered.clone();
    for files in wrong.values_mut() {
        files.0.values_mut().for_each(|(_, hash)| hash[0] ^= 1);
    }
    let (trusting, anew) = listing().hashed(&wrong).unwrap();
    assert_ne!(trusting.hash, first.hash);
    assert!(anew.is_empty());
    // One file is another one now, one is gone: the others of its folder are still not read.
    fs::write(root.path().join("0/a"), "9").unwrap();
    let (_, anew) = listing().hashed(&remembered).unwrap();
    assert_eq!(anew.len(), 1);
    fs::remove_file(root.path().join("0/b")).unwrap();
    let (_, anew) = listing().hashed(&remembered).unwrap();
    assert_eq!(
        anew.values().next().unwrap().0.len(),
        1,
        "what is gone is forgotten"
    );
}

#[test]
fn what_was_just_written_is_not_remembered() {
    let root = filled(&[("a", "1")]);
    let listing = || at_once(Listing::of(root.path(), FileKind::Dir).unwrap());
    let (fresh, anew) = listing().hashed(&BTreeMap::new()).unwrap();
    assert!(fresh.is_young() && anew.is_empty());
    // Setting its time back does not make it older: it was changed just now.
    age(&root.path().join("a"));
    let (fresh, anew) = listing().hashed(&BTreeMap::new()).unwrap();
    assert!(fresh.is_young() && anew.is_empty());
}

#[test]
fn a_file_dated_in_the_future_is_remembered() {
    let root = filled(&[("a", "1")]);
    let file = fs::File::options()
        .append(true)
        .open(root.path().join("a"))
        .unwrap();
    let ahead = SystemTime::now() + std::time::Duration::from_secs(1 << 30);
    file.set_modified(ahead).unwrap();
    let listing = || Listing::of(root.path(), FileKind::Dir).unwrap();
    let (fresh, anew) = at_once(listing()).hashed(&BTreeMap::new()).unwrap();
    assert!(fresh.is_young() && anew.is_empty(), "it was just changed");
    let (old, anew) = later(listing()).hashed(&BTreeMap::new()).unwrap();
    assert!(!old.is_young() && anew.len() == 1);
}

#[test]
fn a_change_is_seen_even_when_it_was_taken_back() {
    let root = filled(&[("a", "1"), ("b", "2")]);
    let before = snapshot(root.path());
    let now = || Listing::of(root.path(), FileKind::Dir).unwrap();
    let a = root.path().join("a");
    let modified = fs::metadata(&a).unwrap().modified().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    fs::set_permissions(&a, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(now().is_as(&before), "rights are no content");
    fs::set_permissions(&a, fs::Permissions::from_mode(0o644)).unwrap();
    let before = snapshot(root.path());
    std::thread::sleep(std::time::Duration::from_millis(50));
    fs::write(&a, "9").unwrap();
    assert!(!now().is_as(&before));
    assert_eq!(now().newest(), a);
    fs::write(&a, "1").unwrap();
    let file = fs::File::options().append(true).open(&a).unwrap();
    file.set_modified(modified).unwrap();
    assert_eq!(snapshot(root.path()).hash, before.hash);
    assert!(!now().is_as(&before), "it looks as before, but was written");
}

#[test]
fn other_bytes_are_no_memory() {
    let files = BTreeMap::from([("a".to_owned(), ([1; 56], [2; 32]))]);
    let packed = Folder(files).pack();
    for end in 0..packed.len() {
        assert!(end == 1 || Folder::unpack(&packed[..end]).0.is_empty());
    }
    assert_eq!(Folder::unpack(b"\xff\xff\xff").0.len(), 0);
}

#[test]
fn what_is_mostly_holes_is_named_and_not_read() {
    let root = filled(&[("0/a.png", "1"), ("b.tar", "1"), ("c", "1")]);
    let stretch = |name: &str, length: u64| {
        let file = fs::File::options().write(true).open(root.path().join(name));
        file.unwrap().set_len(length).unwrap();
    };
    let said = |kind| match Listing::of(root.path(), kind) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    // Nobody reads an image of this length.
    stretch("0/a.png", 60 << 30);
    assert_eq!(said(FileKind::Images), "");
    assert!(said(FileKind::Dir).contains("0/a.png is 64424509440 bytes long and mostly holes"));
    stretch("0/a.png", 1);
    stretch("b.tar", 60 << 30);
    assert!(said(FileKind::Images).contains("b.tar is 64424509440 bytes"));
    let of_itself = Listing::of(&root.path().join("b.tar"), FileKind::File);
    assert!(matches!(of_itself, Err(InputError::Sparse { .. })));
    // Many that are each not so long.
    stretch("b.tar", 600 << 20);
    assert_eq!(said(FileKind::Dir), "");
    stretch("c", 601 << 20);
    assert!(said(FileKind::Dir).contains("/c is "));
}

#[test]
fn more_files_than_can_be_held_are_refused() {
    let root = filled(&[("0/a.png", "1"), ("0/b.txt", "2"), ("1/c.png", "3")]);
    let list = |kind, most| Listing::of_few(root.path(), kind, most).map(|found| found.files.len());
    assert_eq!(list(FileKind::Dir, 3).unwrap(), 3);
    // A text file among images is examined, too.
    assert_eq!(list(FileKind::Images, 3).unwrap(), 2);
    for kind in [FileKind::Dir, FileKind::Images] {
        let said = list(kind, 2).unwrap_err().to_string();
        assert!(said.contains("holds more than 2 files"), "{said}");
        assert!(said.starts_with(root.path().to_str().unwrap()), "{said}");
    }
}

#[test]
fn hashing_ends_when_nobody_waits_for_it() {
    let root = filled(&[("a", &"x".repeat(1 << 20))]);
    let listing = Listing::of(&root.path().join("a"), FileKind::File).unwrap();
    let looks = std::cell::Cell::new(0);
    let is_wanted = || looks.replace(looks.get() + 1) < 2;
    assert!(listing.hashed_while(&is_wanted, &BTreeMap::new()).is_err());
    assert_eq!(looks.get(), 3);
}
