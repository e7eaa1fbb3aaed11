//! Images that several processes decode.

use std::collections::BTreeMap;

use retort_abi::Part;

use super::*;
use crate::data::content::Damaged;
use crate::files::tests::names;

/// The files that a source writes, and the images that it leaves out.
fn written(
    options: &DataOptions,
    dir: &Path,
    parts: Option<&Path>,
) -> (BTreeMap<String, Vec<u8>>, Vec<Damaged>) {
    let out = tempfile::tempdir().unwrap();
    let source = Source::open(options, dir, &mut |_, _| true).unwrap();
    let (_, damaged) = prepared::write(source, out.path(), parts, &mut |_| true).unwrap();
    let entries = std::fs::read_dir(out.path()).unwrap().map(Result::unwrap);
    let files = entries.map(|entry| {
        let bytes = std::fs::read(entry.path()).unwrap();
        (entry.file_name().into_string().unwrap(), bytes)
    });
    (files.collect(), damaged)
}

/// Decodes the share of one of three parts; returns its reported progress.
fn decode(options: &DataOptions, dir: &Path, work: &Path, index: usize) -> Vec<(u64, u64)> {
    let source = Source::open(options, dir, &mut |_, _| true).unwrap();
    let mut said = Vec::new();
    source
        .decode_share(Part { index, of: 3 }, work, &mut |done, total| {
            said.push((done, total));
            true
        })
        .unwrap();
    said
}

#[test]
fn what_parts_decode_is_what_the_whole_would() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for i in 0..6 {
        save(dir, &format!("x/{}/{i}.png", i % 2), grey(10 * i));
    }
    let whole = std::fs::read(dir.join("x/0/0.png")).unwrap();
    for name in ["0/1-cut.png", "1/9-cut.png"] {
        std::fs::write(dir.join("x").join(name), &whole[..whole.len() - 20]).unwrap();
    }
    let options = DataOptions {
        skip_damaged: true,
        ..folder("x")
    };
    // Eight items in four chunks.
    let alone = written(&options, dir, None);
    assert_eq!(alone.1.len(), 2);
    let work = tempfile::tempdir().unwrap();
    let work = work.path();
    assert_eq!(decode(&options, dir, work, 0).last(), Some(&(4, 4)));
    assert_eq!(names(work), ["decoded-000000", "decoded-000003"]);
    // Part 2 of 3 has not finished.
    assert!(written(&options, dir, Some(work)) == alone);
    assert_eq!(decode(&options, dir, work, 2).last(), Some(&(2, 2)));
    assert_eq!(decode(&options, dir, work, 1).last(), Some(&(2, 2)));
    assert_eq!(names(work).len(), 4);
    assert!(written(&options, dir, Some(work)) == alone);

    // A restarted part decodes nothing twice: an existing chunk is enough.
    let file = work.join("decoded-000001/images.npy");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    decode(&options, dir, work, 1);
    let changed = written(&options, dir, Some(work));
    assert!(changed.0["images-00000.npy"] != alone.0["images-00000.npy"]);
    assert_eq!(changed.0["labels.npy"], alone.0["labels.npy"]);
    // An incomplete chunk counts as missing.
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    assert!(written(&options, dir, Some(work)) == alone);
    std::fs::write(work.join("decoded-000002/chunk.json"), "[").unwrap();
    assert!(written(&options, dir, Some(work)) == alone);

    // So does one with other items, as from a process that cannot read a file.
    std::fs::rename(dir.join("x/0/2.png"), dir.join("hidden.png")).unwrap();
    save(dir, "x/1/99.png", grey(7));
    for part in 0..3 {
        decode(&options, dir, work, part);
    }
    std::fs::remove_file(dir.join("x/1/99.png")).unwrap();
    std::fs::rename(dir.join("hidden.png"), dir.join("x/0/2.png")).unwrap();
    assert!(written(&options, dir, Some(work)) == alone);
    for part in 0..3 {
        decode(&options, dir, work, part);
    }
    assert_eq!(names(work).len(), 4, "{:?}", names(work));
    assert!(written(&options, dir, Some(work)) == alone);

    // Damaged images that may not be left out are reported by the worker of the whole, all at once.
    let strict = Source::open(&folder("x"), dir, &mut |_, _| true).unwrap();
    let error = strict
        .read_with(Some(work), &mut |_| true, &mut |_| Ok(()))
        .unwrap_err();
    assert!(
        error.to_string().contains("2 of 8 images are damaged"),
        "{error}"
    );
}

#[test]
fn a_part_that_is_asked_to_stop_leaves_whole_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    (0..12).for_each(|i| save(dir, &format!("x/{i:02}.png"), grey(i)));
    let work = tempfile::tempdir().unwrap();
    let source = Source::open(&folder("x"), dir, &mut |_, _| true).unwrap();
    let part = Part { index: 0, of: 2 };
    let stopped = source.decode_share(part, work.path(), &mut |done, _| done == 0);
    assert!(stopped.is_err());
    assert!(names(work.path()).len() <= 3, "those of the first batch");
    let alone = written(&folder("x"), dir, None);
    assert!(written(&folder("x"), dir, Some(work.path())) == alone);
}

#[test]
fn rows_of_tables_and_files_of_archives_are_decoded_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    parquet::copy(dir, &[("hub.parquet", "a.parquet")]);
    save(dir, "a.png", grey(1));
    save(dir, "b.png", grey(2));
    let (a, b) = (
        std::fs::read(dir.join("a.png")).unwrap(),
        std::fs::read(dir.join("b.png")).unwrap(),
    );
    let archive = archived_images::tests::tar(&[("0/a.png", &a), ("0/b.png", &b), ("1/c.png", &a)]);
    std::fs::write(dir.join("y.tar"), archive).unwrap();
    let tar = DataOptions {
        tar: Some("y.tar".into()),
        ..DataOptions::default()
    };
    for options in [parquet::parquet("a.parquet"), tar] {
        let work = tempfile::tempdir().unwrap();
        let alone = written(&options, dir, None);
        for part in [1, 0] {
            decode(&options, dir, work.path(), part);
            assert!(written(&options, dir, Some(work.path())) == alone);
        }
    }
}
