//! Images in Parquet files written by `tests/peers/parquet.py`.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::data::error::DataError;
use crate::data::item::{Item, ItemLocation};
use crate::data::parquet as tables;

/// Copies files of `tests/golden/parquet` under other names.
pub(super) fn copy(dir: &Path, files: &[(&str, &str)]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/parquet");
    for (from, to) in files {
        let to = dir.join(to);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(folder.join(from), to).unwrap();
    }
}

pub(super) fn parquet(name: &str) -> DataOptions {
    DataOptions {
        parquet: Some(name.into()),
        ..DataOptions::default()
    }
}

/// Red of the middle of image i, which rises with i.
fn red(images: &Images, i: usize) -> f32 {
    let pixels = images.gather(&[i]).unwrap().0;
    ((pixels[2 * 6 + 3] + 1.0) * 127.5).round()
}

#[test]
fn a_data_set_of_the_hub_is_read_with_its_classes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    copy(dir, &[("hub.parquet", "a.parquet")]);
    let images = read(&parquet("a.parquet"), dir).unwrap();
    assert_eq!((images.shape(), images.len()), ([3, 4, 6], 12));
    // In the order of their numbers, not of the alphabet.
    assert_eq!(images.names, ["owl", "cat", "dog"]);
    assert_eq!(images.labels, [0, 1, 2].repeat(4));
    (0..12).for_each(|i| assert_eq!(red(&images, i), 20.0 * i as f32, "{i}"));

    let shards = [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ];
    copy(
        dir,
        &shards.map(|name| (name, name)).map(|(name, to)| (name, to)),
    );
    let moved: Vec<_> = shards.iter().map(|name| format!("set/{name}")).collect();
    copy(dir, &[(shards[0], &moved[0]), (shards[1], &moved[1])]);
    std::fs::write(dir.join("set/README.md"), "about it").unwrap();
    let whole = read(&folder("set"), dir).unwrap();
    assert_eq!(
        (&whole.labels, &whole.names),
        (&images.labels, &images.names)
    );
    assert_eq!(pixels(&whole), pixels(&images));
    std::fs::remove_file(dir.join(&moved[0])).unwrap();
    let source = Source::open(&folder("set"), dir, &mut |_, _| true).unwrap();
    let told = source
        .notices
        .iter()
        .any(|(_, text)| text.ends_with("1 of 2 files of train are there"));
    assert!(told, "{:?}", source.notices);
}

#[test]
fn every_way_of_packing_gives_the_same_images() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    copy(
        dir,
        &["zstd", "gzip", "plain-2"].map(|name| {
            let name: &str = Box::leak(format!("{name}.parquet").into_boxed_str());
            (name, name)
        }),
    );
    // One row has no class; another column is complete.
    let error = read(&parquet("zstd.parquet"), dir).unwrap_err();
    assert_eq!(
        error,
        "zstd.parquet: zstd.parquet row 2 has no class, though 5 rows have one"
    );
    let options = |name: &str| DataOptions {
        label: Some("flag".into()),
        ..parquet(name)
    };
    let first = read(&options("zstd.parquet"), dir).unwrap();
    assert_eq!(first.labels, [1, 0, 1, 1, 0, 1]);
    for name in ["gzip.parquet", "plain-2.parquet"] {
        assert_eq!(
            pixels(&read(&options(name), dir).unwrap()),
            pixels(&first),
            "{name}"
        );
    }
    copy(dir, &[("dictionary.parquet", "d.parquet")]);
    let images = read(&parquet("d.parquet"), dir).unwrap();
    assert_eq!(images.names, ["0", "1", "2"]);
    (0..40).for_each(|i| assert_eq!(red(&images, i), 20.0 * (i % 3) as f32, "{i}"));
}

#[test]
fn rows_without_images_are_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    copy(dir, &[("captions.parquet", "c.parquet")]);
    let error = read(&parquet("c.parquet"), dir).unwrap_err();
    let expected = "c.parquet: 1 of 7 images are damaged:\n  c.parquet row 3: no bytes; a data set whose rows refer to \
                    other files has to be saved with their content in it";
    assert!(error.starts_with(expected), "{error}");
    let options = DataOptions {
        skip_damaged: true,
        ..parquet("c.parquet")
    };
    let mut found = Vec::new();
    let source = Source::open(&options, dir, &mut |_, _| true).unwrap();
    let damaged = source.read(&mut |_| true, &mut |image| {
        found.push((image.name.to_owned(), image.caption.map(str::to_owned)));
        Ok(())
    });
    assert_eq!(damaged.unwrap()[0].name, "c.parquet row 3");
    let rows = [0, 1, 2, 4, 5, 6];
    let wanted = rows.map(|i| {
        let caption = (i != 5).then(|| format!("picture {i}"));
        (format!("c.parquet row {i}"), caption)
    });
    assert_eq!(found, wanted);
}

#[test]
fn what_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    copy(
        dir,
        &[
            ("delta.parquet", "delta.parquet"),
            ("lists.parquet", "lists.parquet"),
            ("hub.parquet", "hub.parquet"),
            ("hub.parquet", "split/train-00000-of-00001.parquet"),
            ("hub.parquet", "split/test-00000-of-00001.parquet"),
            ("hub.parquet", "names/a.parquet"),
            ("dictionary.parquet", "names/b.parquet"),
        ],
    );
    let check = |options: &DataOptions, expected: &str| {
        let said = read(options, dir).unwrap_err();
        assert!(said.starts_with(expected), "{said}");
    };
    check(
        &parquet("delta.parquet"),
        "delta.parquet: no column of images: expected one named `image`, with bytes or a structure of `bytes` and `path`; it has \
         label",
    );
    let named = DataOptions {
        label: Some("animal".into()),
        ..parquet("hub.parquet")
    };
    check(
        &named,
        "hub.parquet: no column named \"animal\" (`label`); it has image.bytes, image.path, label",
    );
    // Lists in a column of another name do not matter; classes or captions in lists would be lost.
    assert_eq!(read(&parquet("lists.parquet"), dir).unwrap().len(), 1);
    let mut lists = std::fs::read(dir.join("lists.parquet")).unwrap();
    for at in 0..lists.len() {
        if lists[at..].starts_with(b"captions") {
            lists[at..at + 8].copy_from_slice(b"category");
        }
    }
    std::fs::write(dir.join("classes.parquet"), lists).unwrap();
    check(
        &parquet("classes.parquet"),
        "classes.parquet: column category.list.element, row group 0: it holds lists; expected one value in a row",
    );
    check(
        &folder("split"),
        "split: files of several splits (test, train): keep those to read in a folder",
    );
    check(
        &folder("names"),
        "names/b.parquet: its images are in column image, those of",
    );
    copy(
        dir,
        &[
            ("long.parquet", "long.parquet"),
            ("absent.parquet", "absent.parquet"),
        ],
    );
    check(
        &parquet("long.parquet"),
        "long.parquet: row 0: a class of 2000 bytes; names have at most 1024",
    );
    check(
        &parquet("absent.parquet"),
        "absent.parquet: 1 of 3 classes have no image (cat, ...)",
    );
    // Notes that are no JSON.
    copy(dir, &[("train-00000-of-00002.parquet", "few.parquet")]);
    let path = dir.join("few.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    let names = bytes.windows(5).position(|w| w == b"\"owl\"").unwrap();
    bytes[names..names + 5].copy_from_slice(b"[owl\"");
    std::fs::write(&path, &bytes).unwrap();
    check(
        &parquet("few.parquet"),
        "few.parquet: its note `huggingface`: expected JSON",
    );
    std::fs::write(dir.join("empty.parquet"), b"PAR1").unwrap();
    check(
        &parquet("empty.parquet"),
        "empty.parquet: not a Parquet file: it is too short for one",
    );
    check(&parquet("nothing.parquet"), "nothing.parquet: no such file");
    let labelled = DataOptions {
        label: Some("label".into()),
        ..folder("images")
    };
    save(dir, "images/a.png", grey(1));
    check(&labelled, "images: no Parquet files alone in it");
    let table = "{\"file_name\": \"a.png\", \"label\": \"x\"}\n";
    std::fs::write(dir.join("images/metadata.jsonl"), table).unwrap();
    check(&labelled, "images: `label` names a column of Parquet files");
}

#[test]
fn a_cell_that_rows_repeat_is_examined_once() {
    let item = Item {
        name: "a".into(),
        label: 0,
        caption: None,
        location: ItemLocation::Row(0, 0),
    };
    let (cells, examined) = (*b"one two", AtomicUsize::new(0));
    let (one, two) = (Some(&cells[..3]), Some(&cells[4..]));
    let parts: Vec<_> = [one, two, None, one].repeat(100);
    let part: Vec<_> = parts.iter().map(|bytes| (&item, *bytes)).collect();
    let made = tables::made_of(&part, &|_, bytes| {
        examined.fetch_add(1, Ordering::SeqCst);
        bytes.map(<[u8]>::to_vec)
    });
    assert_eq!(examined.into_inner(), 3);
    let expected = parts.iter().map(|bytes| bytes.map(<[u8]>::to_vec));
    assert!(made.into_iter().eq(expected));
}

#[test]
fn pages_without_wanted_rows_can_be_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    copy(dir.path(), &[("hub.parquet", "a.parquet")]);
    let files = vec![dir.path().join("a.parquet")];
    let rows = tables::read(dir.path(), files, None, &mut |_, _| true).unwrap();
    // The last of twelve rows, in three groups.
    let last = &rows.items[11..];
    let is_there = |_: &Item, bytes: Option<&[u8]>| bytes.is_some();
    let mut taken = Vec::new();
    let all = rows.tables.each(last, 4, &is_there, &mut |first, made| {
        taken.push((first, made));
        Ok::<_, DataError>(())
    });
    all.unwrap();
    assert_eq!(taken, [(0, vec![]), (0, vec![]), (0, vec![true])]);
    let stopped = rows
        .tables
        .each(last, 4, &is_there, &mut |_, _: Vec<bool>| {
            Err(DataError::Cancelled)
        });
    assert!(matches!(stopped, Err(DataError::Cancelled)));
}
