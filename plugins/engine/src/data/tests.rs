mod folders;
mod many;
mod parquet;
mod parts;
mod pixels;
mod training;

use image::DynamicImage;

use super::resample::{Filter, Fit};
use super::*;
use crate::size::Size;

fn csv(text: &[u8], options: DataOptions) -> Result<Images, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.csv"), text).unwrap();
    let options = DataOptions {
        csv: Some("a.csv".into()),
        ..options
    };
    read(&options, dir.path())
}

/// The images of options, or the error message without the directory's path.
fn read(options: &DataOptions, dir: &Path) -> Result<Images, String> {
    let images = || {
        let source = Source::open(options, dir, &mut |_, _| true)?;
        let (images, _) = Images::read(source, &mut |_| true)?;
        Ok(images.seen_as(options)?)
    };
    images().map_err(|error: crate::Error| {
        error
            .to_string()
            .replace(&format!("{}/", dir.display()), "")
    })
}

fn folder(name: &str) -> DataOptions {
    DataOptions {
        folder: Some(name.into()),
        ..DataOptions::default()
    }
}

/// All pixels, (n, c, h, w).
fn pixels(images: &Images) -> Vec<f32> {
    let all: Vec<usize> = (0..images.len()).collect();
    images.gather(&all).unwrap().0
}

fn save(dir: &Path, name: &str, image: impl Into<DynamicImage>) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    image.into().save(path).unwrap();
}

fn grey(value: u8) -> image::GrayImage {
    image::GrayImage::from_pixel(3, 2, image::Luma([value]))
}

fn max16() -> DataOptions {
    DataOptions {
        max: Some(16.0),
        ..DataOptions::default()
    }
}

fn check(text: &str, options: DataOptions, expected: &str) {
    assert_eq!(
        csv(text.as_bytes(), options).unwrap_err(),
        expected,
        "{text:?}"
    );
}

#[test]
fn a_csv_is_read() {
    let images = csv(b"0,16,8,4,1\n16,16,0,0,0\n\n", max16()).unwrap();
    assert_eq!(
        (images.channels, images.height, images.width, images.classes),
        (1, 2, 2, 2)
    );
    assert_eq!(
        pixels(&images),
        [-1.0, 1.0, 0.0, -0.5, 1.0, 1.0, -1.0, -1.0]
    );
    assert_eq!(images.labels, [1, 0]);
    assert_eq!(images.gather(&[1, 0, 1]).unwrap().1, [0, 1, 0]);
    assert_eq!(images.gather(&[1]).unwrap().0, [1.0, 1.0, -1.0, -1.0]);
    let wide = DataOptions {
        height: Some(1),
        header: true,
        ..DataOptions::default()
    };
    let images = csv(b"a,b,class\n 2, 4 ,0\n1,0,0", wide).unwrap();
    assert_eq!((images.height, images.width), (1, 2));
    assert_eq!(pixels(&images), [0.0, 1.0, -0.5, -1.0]);
}

#[test]
fn of_many_files_that_are_not_there_some_are_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("i")).unwrap();
    let table = |present: &str| {
        let mut text = String::from("file_name,label\n");
        (0..100_000).for_each(|i| text.push_str(&format!("d/{i:06}.png,0\n")));
        text.push_str(present);
        std::fs::write(dir.path().join("i/metadata.csv"), text).unwrap();
    };
    table("");
    let error = read(&folder("i"), dir.path()).unwrap_err();
    let expected = "i: none of the 4096 images examined can be read, one in 24 of 100000; the others were not examined:\n  \
                    d/000000.png: no such file\n  d/000024.png: no such file\n";
    assert!(error.starts_with(expected), "{error}");
    assert!(error.contains("\n  and 4076 more\n"), "{error}");
    // If one exists, all are examined and reported.
    save(dir.path(), "i/a.png", grey(1));
    table("a.png,0\n");
    let text = std::fs::read_to_string(dir.path().join("i/metadata.csv")).unwrap();
    let text = text.replace("d/000024.png", "e.png");
    std::fs::write(dir.path().join("i/metadata.csv"), text).unwrap();
    save(dir.path(), "i/e.png", grey(1));
    let error = read(&folder("i"), dir.path()).unwrap_err();
    assert!(
        error.starts_with("i: 99999 of 100001 images are damaged:"),
        "{error}"
    );
    let options = DataOptions {
        skip_damaged: true,
        ..folder("i")
    };
    assert_eq!(read(&options, dir.path()).unwrap().len(), 2);
}

#[test]
fn csv_faults_are_named() {
    check(
        "",
        max16(),
        "a.csv: expected lines of grey values and a class, found none",
    );
    check(
        "0,0,0,0,0\n0,0,x,0,0",
        max16(),
        "a.csv:2: column 3: expected a number, found `x`",
    );
    check(
        "a,b,c,d,e\n",
        max16(),
        "a.csv:1: column 1: expected a number (if the first line holds column names, say `header: true`), found `a`",
    );
    check(
        "0,0,0,0,0\n0,nan,0,0,0",
        max16(),
        "a.csv:2: column 2: expected a number, found `nan`",
    );
    check(
        "0,0,0,0,0\n0,,0,0,0",
        max16(),
        "a.csv:2: column 2: expected a number, found nothing",
    );
    check(
        "0,0,0,0,0\r\n\r\n0,17,0,0,0",
        max16(),
        "a.csv:3: column 2: expected a grey value from 0 to 16 (`max`), found `17`",
    );
    check(
        "0,-1,0,0,0",
        DataOptions::default(),
        "a.csv:1: column 2: expected a grey value of at least 0, found `-1`",
    );
    for (row, found) in [("0,0,0,0", 4), ("0,0,0,0,0,0", 6)] {
        let expected =
            format!("a.csv:2: expected 5 (2 x 2 grey values and the class) columns, found {found}");
        check(&format!("0,0,0,0,0\n{row}\n"), max16(), &expected);
    }
    for class in ["1.5", "-1", "four", ""] {
        let error = csv(format!("0,0,0,0,{class}").as_bytes(), max16()).unwrap_err();
        assert!(
            error.starts_with("a.csv:1: column 5: expected a class"),
            "{error}"
        );
    }
    check(
        "0,0,0,0,0\n0,0,0,0,2",
        max16(),
        "a.csv: class 1 has no image, though classes go up to 2; number them 0, 1, 2, ...",
    );
    check(
        "0,0,0,0,4000000000",
        max16(),
        "a.csv: class 0 has no image, though classes go up to 4000000000; number them 0, 1, 2, ...",
    );
    check(
        "0,0,0,0\n",
        max16(),
        "a.csv: the first line has 4 columns, that is 3 grey values and the class; \
         3 is no square, so give `height` and `width`",
    );
    let tall = DataOptions {
        height: Some(3),
        ..max16()
    };
    check(
        "0,0,0,0,0\n",
        tall,
        "a.csv: the first line has 5 columns, that is 4 grey values and the class; \
         4 is no multiple of 3, the given side",
    );
    let error = csv(b"0,0,0,0,0\n0,\xff\xfe,0,0,0", max16()).unwrap_err();
    assert!(
        error.starts_with("a.csv:2: column 2: expected a number"),
        "{error}"
    );
}

#[test]
fn sources_are_checked() {
    let none = DataOptions::default();
    let fault = |options: &DataOptions| read(options, Path::new("/base")).unwrap_err();
    assert!(fault(&none).contains("`csv: FILE`"));
    let both = DataOptions {
        csv: Some("a".into()),
        ..folder("b")
    };
    assert_eq!(
        fault(&both),
        "data: `folder` and `csv` exclude each other; keep one"
    );
    let missing = DataOptions {
        csv: Some("no/such.csv".into()),
        ..none.clone()
    };
    assert_eq!(fault(&missing), "no/such.csv: no such file");
    let error = Source::open(&missing, Path::new("/base"), &mut |_, _| true)
        .err()
        .unwrap();
    assert_eq!(
        retort_abi::Failure::from(error).code,
        retort_abi::FailureCode::MissingInput
    );
    for (options, message) in [
        (
            DataOptions {
                max: Some(16.0),
                ..folder("b")
            },
            "data: `max` belongs to `csv` or `arrays`, not to `folder`",
        ),
        (
            DataOptions {
                skip_damaged: true,
                ..both.clone()
            },
            "data: `folder` and `csv` exclude each other; keep one",
        ),
        (
            DataOptions {
                channels: Some(2),
                ..folder("b")
            },
            "data: `channels` is 1 (grey) or 3 (RGB)",
        ),
        (
            DataOptions {
                fit: Fit::Contain,
                ..folder("b")
            },
            "data: `fit` needs a `size`",
        ),
        (
            DataOptions {
                size: Some(Size::Sides([8, 16])),
                fit: Fit::Adm,
                ..folder("b")
            },
            "data: `fit: adm` makes squares, `size` is 8 x 16",
        ),
        (
            DataOptions {
                size: Some(Size::Side(8)),
                crop: Some(Size::Side(9)),
                ..folder("b")
            },
            "data: `crop` 9 x 9 is larger than `size` 8 x 8",
        ),
        (
            DataOptions {
                images: Some("x".into()),
                size: Some(Size::Side(8)),
                ..none
            },
            "data: images of an `images` stage have their size, channels and background: change them there",
        ),
    ] {
        assert_eq!(options.check().unwrap_err().to_string(), message);
    }
}

#[test]
fn numpy_arrays_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let write = |name: &str, descr: &str, shape: &[usize], data: &[u8]| {
        let file = [crate::numpy::header(descr, shape), data.to_vec()].concat();
        std::fs::write(dir.join(name), file).unwrap();
    };
    let bytes: Vec<u8> = (0..24).collect();
    write("last.npy", "|u1", &[2, 2, 2, 3], &bytes);
    write("first.npy", "|u1", &[2, 3, 2, 2], &bytes);
    write(
        "labels.npy",
        "<i8",
        &[2],
        &[[1u8, 0, 0, 0, 0, 0, 0, 0], [0; 8]].concat(),
    );
    let arrays = |name: &str| DataOptions {
        arrays: Some(name.into()),
        labels: Some("labels.npy".into()),
        ..DataOptions::default()
    };
    let value = |byte: u8| f32::from(byte) / 255.0 * 2.0 - 1.0;
    let images = read(&arrays("last.npy"), dir).unwrap();
    assert_eq!(
        (images.shape(), &images.labels[..]),
        ([3, 2, 2], &[1, 0][..])
    );
    assert_eq!(
        pixels(&images)[..4],
        [value(0), value(3), value(6), value(9)]
    );
    let images = read(&arrays("first.npy"), dir).unwrap();
    assert_eq!(
        pixels(&images)[..4],
        [value(0), value(1), value(2), value(3)]
    );

    let floats: Vec<u8> = [0.0f32, 0.5, 1.0, 0.25]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    write("floats.npy", "<f4", &[2, 2, 1], &floats);
    let error = read(&arrays("floats.npy"), dir).unwrap_err();
    assert_eq!(
        error,
        "floats.npy: images of type f4; say which value is white: `max: 1`, `max: 255`"
    );
    let unit = DataOptions {
        max: Some(1.0),
        ..arrays("floats.npy")
    };
    assert_eq!(
        pixels(&read(&unit, dir).unwrap()),
        [-1.0, value(128), 1.0, value(64)]
    );
    write("cut.npy", "|u1", &[9, 2, 2, 3], &bytes);
    assert!(
        read(&arrays("cut.npy"), dir)
            .unwrap_err()
            .contains("labels of shape [2] for 9 images")
    );
    let bare = DataOptions {
        labels: None,
        ..arrays("cut.npy")
    };
    assert_eq!(
        read(&bare, dir).unwrap_err(),
        "cut.npy: it ends early: its shape is [9, 2, 2, 3]"
    );
}

#[test]
fn large_arrays_are_read_and_endless_labels_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let write = |name: &str, shape: &[usize], data: &[u8]| {
        let file = [crate::numpy::header("|b1", shape), data.to_vec()].concat();
        std::fs::write(dir.join(name), file).unwrap();
    };
    let arrays = |images: &str| DataOptions {
        arrays: Some(images.into()),
        labels: Some("labels.npy".into()),
        ..DataOptions::default()
    };
    let values: Vec<u8> = (0..300 * 300).map(|i| u8::from(i % 7 == 0)).collect();
    write("wide.npy", &[1, 300, 300], &values);
    write("labels.npy", &[1], &[0]);
    let found = pixels(&read(&arrays("wide.npy"), dir).unwrap());
    let expected = values.iter().map(|&value| f32::from(value) * 2.0 - 1.0);
    assert!(found.iter().copied().eq(expected));
    // As many as the header says, but without data.
    write("many.npy", &[200_000_000, 1, 1], &[]);
    write("labels.npy", &[200_000_000, 1, 1], &[]);
    assert_eq!(
        read(&arrays("many.npy"), dir).unwrap_err(),
        "labels.npy: labels of 200000000 images, expected at most 67108864"
    );
}

#[test]
fn the_class_stands_first_last_or_under_its_name() {
    let labelled = |label: &str| DataOptions {
        label: Some(label.into()),
        ..max16()
    };
    let first = csv(b"1,0,16,8,4\n0.0,16,16,0,0\n", labelled("first")).unwrap();
    assert_eq!((&first.labels[..], pixels(&first)[1]), (&[1, 0][..], 1.0));
    let named = csv(
        b"a,b,kind,c,d\n0,16,1.0,8,4\n16,16,0.0,0,0\n",
        labelled("kind"),
    )
    .unwrap();
    assert_eq!(
        (&named.labels[..], pixels(&named)),
        (&first.labels[..], pixels(&first))
    );
    let error = csv(b"a,b,kind,c,d\n0,16,1,8,4\n", labelled("class"))
        .err()
        .unwrap();
    assert_eq!(
        error,
        "a.csv: no column named \"class\" in the first line, which begins `a`, `b`, `kind`, `c`"
    );
    // Values other than bytes keep 255 levels.
    let wide = DataOptions::default();
    let images = csv(b"0,500,1000,250.5,0", wide).unwrap();
    let value = |byte: f32| byte / 255.0 * 2.0 - 1.0;
    assert_eq!(pixels(&images), [-1.0, value(128.0), 1.0, value(64.0)]);
    // When resized, sixteen levels become as many as a byte can hold.
    let sized = DataOptions {
        size: Some(Size::Side(1)),
        filter: Filter::Box,
        ..max16()
    };
    assert_eq!(pixels(&csv(b"0,16,8,8,0", sized).unwrap()), [value(128.0)]);
}

#[test]
fn the_schema_marks_paths_and_closes_the_object() {
    let schema = schemars::schema_for!(DataOptions).to_value();
    assert_eq!(schema["properties"]["csv"]["x-retort-file"], "file");
    assert_eq!(schema["properties"]["folder"]["x-retort-file"], "images");
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(schema["properties"]["header"]["default"], false);
    assert!(schema["properties"]["csv"].get("default").is_none());
}

/// Reading headers and rows of tables reports progress, and can be stopped.
#[test]
fn a_source_is_looked_over_as_long_as_one_lets_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    (0..3).for_each(|i| save(dir, &format!("set/a/{i}.png"), grey(i)));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/parquet");
    std::fs::copy(golden.join("hub.parquet"), dir.join("a.parquet")).unwrap();
    let png = std::fs::read(dir.join("set/a/0.png")).unwrap();
    let tar = super::archived_images::tests::tar(&[("a/0.png", &png), ("b/1.png", &png)]);
    std::fs::write(dir.join("a.tar"), tar).unwrap();
    let named = |option: &str, name: &str| -> DataOptions {
        serde_json::from_value(serde_json::json!({ option: name })).unwrap()
    };
    for (options, images) in [
        (named("folder", "set"), 3),
        (named("parquet", "a.parquet"), 12),
        (named("tar", "a.tar"), 2),
    ] {
        let mut heard = Vec::new();
        let source = Source::open(&options, dir, &mut |done, total| {
            heard.push((done, total));
            true
        });
        assert_eq!(source.unwrap().count(), images);
        assert_eq!(heard.last(), Some(&(images as u64, images as u64)));
        for last in 1..=heard.len() {
            let mut asked = 0;
            let source = Source::open(&options, dir, &mut |_, _| {
                asked += 1;
                asked < last
            });
            assert!(
                matches!(source.err(), Some(DataError::Cancelled)),
                "{options:?}"
            );
            assert_eq!(asked, last);
        }
    }
}
