//! Images in folders, archives and tables: which files count, which are damaged, and the messages.

use super::*;

#[test]
fn a_folder_is_read_by_class() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for class in 0..11u8 {
        save(dir, &format!("grey/{class}/a.png"), grey(class));
    }
    let images = read(&folder("grey"), dir).unwrap();
    assert_eq!((images.shape(), images.classes), ([1, 2, 3], 11));
    assert_eq!(
        pixels(&images)[10 * 6],
        10.0 / 255.0 * 2.0 - 1.0,
        "10 comes after 9"
    );

    let mut rgb = image::RgbImage::from_pixel(1, 2, image::Rgb([255, 0, 0]));
    rgb.put_pixel(0, 1, image::Rgb([0, 255, 0]));
    save(dir, "rgb/dog/deep/a.png", rgb);
    let images = read(&folder("rgb"), dir).unwrap();
    assert_eq!(pixels(&images), [1.0, -1.0, -1.0, 1.0, -1.0, -1.0]); // (c, h, w)
    assert_eq!(images.names, ["dog"]);

    save(dir, "rgb/elk/b.png", grey(1));
    save(dir, "rgb/elk/c.png", grey(1));
    let error = read(&folder("rgb"), dir).unwrap_err();
    assert_eq!(
        error,
        "rgb: images of 2 sizes (height x width): 2 x 3 (2), 2 x 1 (1); give the size to bring them to, as in \
         `size: [2, 3]`"
    );
    std::fs::remove_dir_all(dir.join("rgb/elk")).unwrap();
    std::fs::create_dir(dir.join("rgb/elk")).unwrap();
    std::fs::write(dir.join("rgb/elk/notes.txt"), "no picture").unwrap();
    let error = read(&folder("rgb"), dir).unwrap_err();
    assert_eq!(
        error,
        "rgb/elk: expected image files (PNG, JPEG, WebP, GIF, BMP or TIFF), found none; files of other kinds: .txt 1"
    );
    std::fs::rename(dir.join("grey/4"), dir.join("grey/12")).unwrap();
    let error = read(&folder("grey"), dir).unwrap_err();
    assert!(
        error.contains("class 4 has no image, though classes go up to 12"),
        "{error}"
    );
    std::fs::rename(dir.join("grey/12"), dir.join("grey/4")).unwrap();
    save(dir, "grey/00/a.png", grey(0));
    let error = read(&folder("grey"), dir).unwrap_err();
    assert_eq!(
        error,
        "grey: folders `0` and `00` both mean class 0; rename one"
    );
}

#[test]
fn a_folder_without_classes_is_one_class() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    save(dir, "00/b.png", grey(7));
    save(dir, "00/a.png", grey(5));
    std::fs::write(dir.join("00/.DS_Store"), "x").unwrap();
    std::fs::write(dir.join("00/Thumbs.db"), "x").unwrap();
    std::fs::write(dir.join("00/notes.txt"), "x").unwrap();
    let source = Source::open(&folder("00"), dir, &mut |_, _| true).unwrap();
    assert_eq!(source.notices.len(), 1, "{:?}", source.notices);
    assert!(
        source.notices[0]
            .1
            .ends_with("1 files are not images and were left out: .txt 1")
    );
    let images = read(&folder("00"), dir).unwrap();
    assert_eq!(
        (&images.names[..], &images.labels[..]),
        (&["00".to_owned()][..], &[0, 0][..])
    );
    assert_eq!(pixels(&images)[0], 5.0 / 255.0 * 2.0 - 1.0, "by name");

    save(dir, "00/more/a.png", grey(5));
    let error = read(&folder("00"), dir).unwrap_err();
    assert!(
        error
            .starts_with("00: 2 images (a.png, ...) lie beside the folders of classes (more, ...)"),
        "{error}"
    );
    std::fs::create_dir(dir.join("nothing")).unwrap();
    assert!(
        read(&folder("nothing"), dir)
            .unwrap_err()
            .ends_with("found none")
    );
    assert_eq!(
        read(&folder("missing"), dir).unwrap_err(),
        "missing: no such folder"
    );
    let error = read(&folder("00/a.png"), dir).unwrap_err();
    assert!(
        error.starts_with("00/a.png: is a file; expected a folder"),
        "{error}"
    );
}

#[test]
fn links_are_followed_and_loops_named() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    save(dir, "blobs/two.png", grey(2));
    std::fs::create_dir_all(dir.join("data/0")).unwrap();
    symlink(dir.join("blobs/two.png"), dir.join("data/0/a.png")).unwrap();
    std::fs::create_dir_all(dir.join("other")).unwrap();
    symlink(dir.join("blobs/two.png"), dir.join("other/b.jpg")).unwrap();
    symlink(dir.join("other"), dir.join("data/1")).unwrap();
    let images = read(&folder("data"), dir).unwrap();
    assert_eq!((images.len(), images.classes), (2, 2));

    symlink(dir.join("data"), dir.join("data/0/up")).unwrap();
    let error = read(&folder("data"), dir).unwrap_err();
    assert!(
        error.starts_with("data/0/up: a link to a folder that it lies in"),
        "{error}"
    );
    std::fs::remove_file(dir.join("data/0/up")).unwrap();
    symlink("self", dir.join("data/0/self")).unwrap();
    let error = read(&folder("data"), dir).unwrap_err();
    assert_eq!(error, "data/0/self: a link that leads to itself");
    std::fs::remove_file(dir.join("data/0/self")).unwrap();
    symlink("nowhere", dir.join("data/0/broken")).unwrap();
    let error = read(&folder("data"), dir).unwrap_err();
    assert!(
        error.starts_with("data/0/broken: a link that leads nowhere"),
        "{error}"
    );
}

#[test]
fn damaged_images_are_told_at_once_or_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for i in 0..3 {
        save(dir, &format!("x/0/{i}.png"), grey(i));
        save(dir, &format!("x/1/{i}.png"), grey(i));
    }
    let whole = std::fs::read(dir.join("x/0/0.png")).unwrap();
    let cut = &whole[..whole.len() - 20];
    std::fs::write(dir.join("x/0/cut.png"), cut).unwrap();
    std::fs::write(dir.join("x/0/empty.png"), "").unwrap();
    std::fs::write(dir.join("x/1/text.jpeg"), "no picture").unwrap();
    std::fs::write(dir.join("x/1/start.png"), b"\xff\xd8\xff\xe0 no jpeg").unwrap();
    let error = read(&folder("x"), dir).unwrap_err();
    assert!(
        error.starts_with("x: 4 of 10 images are damaged:\n  0/cut.png: "),
        "{error}"
    );
    for name in [
        "0/empty.png: expected PNG, JPEG",
        "1/text.jpeg: expected PNG, JPEG",
        "1/start.png: ",
    ] {
        assert!(error.contains(name), "{name} in {error}");
    }
    let lenient = DataOptions {
        skip_damaged: true,
        ..folder("x")
    };
    let (images, damaged) = Images::read(
        Source::open(&lenient, dir, &mut |_, _| true).unwrap(),
        &mut |_| true,
    )
    .unwrap();
    let names: Vec<&str> = damaged
        .iter()
        .map(|damaged| damaged.name.as_str())
        .collect();
    assert_eq!(
        names,
        ["0/cut.png", "0/empty.png", "1/start.png", "1/text.jpeg"]
    );
    assert_eq!(images.labels, [0, 0, 0, 1, 1, 1]);
    for i in 0..30 {
        std::fs::write(dir.join(format!("x/0/more{i}.png")), cut).unwrap();
    }
    let error = read(&folder("x"), dir).unwrap_err();
    assert!(
        error.starts_with("x: 34 of 40 images are damaged:"),
        "{error}"
    );
    // Of all, the first with their reasons.
    for i in 0..30 {
        assert!(error.contains(&format!("0/more{i}.png")), "{error}");
    }
    for i in 0..3 {
        std::fs::write(dir.join(format!("x/1/{i}.png")), cut).unwrap();
    }
    assert_eq!(
        read(&lenient, dir).unwrap_err(),
        "x: all images of class 1 are damaged"
    );
}

/// A PNG that claims a size and holds `data` deflated.
fn claim(width: u32, height: u32, data: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(data).unwrap();
    let chunk = |kind: &[u8; 4], data: &[u8]| {
        let mut sum = flate2::Crc::new();
        sum.update(kind);
        sum.update(data);
        let length = (data.len() as u32).to_be_bytes();
        [&length[..], kind, data, &sum.sum().to_be_bytes()].concat()
    };
    let head = [
        &width.to_be_bytes()[..],
        &height.to_be_bytes(),
        &[8, 2, 0, 0, 0],
    ]
    .concat();
    let parts = [
        chunk(b"IHDR", &head),
        chunk(b"IDAT", &packed.finish().unwrap()),
        chunk(b"IEND", &[]),
    ];
    [b"\x89PNG\r\n\x1a\n".to_vec(), parts.concat()].concat()
}

#[test]
fn what_a_header_claims_is_checked_before_it_is_decoded() {
    let huge = claim(20_000, 20_000, &[0; 1 << 20]);
    for content in [&huge[..], &huge[..64]] {
        let error = raster::header(content).unwrap_err();
        assert_eq!(
            error,
            "an image of 20000 x 20000 pixels: more than 67108864 are not decoded"
        );
        assert_eq!(raster::decode(content, [0; 3]).unwrap_err(), error);
    }
    assert!(raster::header(&claim(u32::MAX, u32::MAX, &[])).is_err());
    // More deflated data than its size needs: the rest is not read.
    let (width, height) = (16, 16);
    let bomb = claim(width, height, &vec![0; 64 << 20]);
    assert!(bomb.len() < 100_000);
    let image = raster::decode(&bomb, [0; 3]).unwrap();
    assert_eq!(image.pixels, vec![0; 16 * 16 * 3]);
    // Less than it needs.
    assert!(raster::decode(&claim(4000, 4000, &[0; 100]), [0; 3]).is_err());
}

#[test]
fn a_mixed_folder_comes_to_one_size_and_one_kind() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    save(dir, "x/0/grey.png", grey(100));
    save(
        dir,
        "x/0/rgba.png",
        image::RgbaImage::from_pixel(8, 8, image::Rgba([255, 0, 0, 0])),
    );
    save(
        dir,
        "x/1/rgb.bmp",
        image::RgbImage::from_pixel(16, 4, image::Rgb([0, 0, 255])),
    );
    // The extension does not match its format.
    std::fs::copy(dir.join("x/1/rgb.bmp"), dir.join("x/1/no-ending")).unwrap();
    let options = DataOptions {
        size: Some(Size::Sides([4, 6])),
        ..folder("x")
    };
    let source = Source::open(&options, dir, &mut |_, _| true).unwrap();
    assert!(
        source.notices[1]
            .1
            .contains("4 images of several formats, BMP 2, PNG 2:")
    );
    assert_eq!(
        source.notices[0].1,
        "1 of 4 images are grey, the others are not: all are read as RGB"
    );
    let images = read(&options, dir).unwrap();
    assert_eq!((images.len(), images.shape()), (4, [3, 4, 6]));
    let all = pixels(&images);
    let at = |image: usize, channel: usize| all[(image * 3 + channel) * 24];
    let value = |byte: u8| f32::from(byte) / 255.0 * 2.0 - 1.0;
    assert_eq!([at(0, 0), at(0, 1), at(0, 2)], [value(100); 3]);
    assert_eq!(
        [at(1, 0), at(1, 1), at(1, 2)],
        [1.0; 3],
        "white shows through"
    );
    assert_eq!([at(2, 0), at(2, 1), at(2, 2)], [-1.0, -1.0, 1.0]);
    let black = DataOptions {
        channels: Some(1),
        background: serde_json::from_str("\"black\"").unwrap(),
        ..options
    };
    let images = read(&black, dir).unwrap();
    assert_eq!(images.shape(), [1, 4, 6]);
    assert_eq!(pixels(&images)[24], -1.0, "black shows through");
    assert_eq!(pixels(&images)[48], value(29), "luma of blue");
}

#[test]
fn a_tar_archive_and_a_folder_of_them_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    save(dir, "a.png", grey(10));
    save(dir, "b.png", grey(20));
    let (a, b) = (
        std::fs::read(dir.join("a.png")).unwrap(),
        std::fs::read(dir.join("b.png")).unwrap(),
    );
    let by_folder = archived_images::tests::tar(&[
        ("e/food/b.png", &b),
        ("e/flags/a.png", &a),
        ("e/README.md", b"text"),
    ]);
    std::fs::write(dir.join("x.tar"), by_folder).unwrap();
    let tar = |name: &str| DataOptions {
        tar: Some(name.into()),
        ..DataOptions::default()
    };
    let images = read(&tar("x.tar"), dir).unwrap();
    assert_eq!(images.names, ["flags", "food"]);
    assert_eq!(images.labels, [1, 0]);
    assert_eq!(pixels(&images)[0], 20.0 / 255.0 * 2.0 - 1.0);
    std::fs::create_dir(dir.join("shards")).unwrap();
    let first = archived_images::tests::tar(&[
        ("0.png", &a),
        ("0.cls", b"1"),
        ("1.png", &b),
        ("1.cls", b"0"),
    ]);
    let second = archived_images::tests::tar(&[("2.png", &b), ("2.json", b"{\"label\": 1}")]);
    std::fs::write(dir.join("shards/a.tar"), first).unwrap();
    std::fs::write(dir.join("shards/b.tar"), second).unwrap();
    assert_eq!(read(&folder("shards"), dir).unwrap().labels, [1, 0, 1]);
    std::fs::write(
        dir.join("shards/c.tar"),
        archived_images::tests::tar(&[("3.png", &b)]),
    )
    .unwrap();
    assert_eq!(
        read(&folder("shards"), dir).unwrap_err(),
        "shards: 3.png has no class, though 3 files have one"
    );
    let cut = archived_images::tests::tar(&[("0/3.png", &b[..b.len() - 10]), ("0/4.png", &b)]);
    std::fs::write(dir.join("cut.tar"), cut).unwrap();
    assert!(
        read(&tar("cut.tar"), dir)
            .unwrap_err()
            .starts_with("cut.tar: 1 of 2 images are damaged:\n  0/3.png: ")
    );
}

#[test]
fn a_table_says_what_belongs_to_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (name, value) in [("x/p/a.png", 10), ("x/b.png", 20), ("x/not-named.png", 30)] {
        save(dir, name, grey(value));
    }
    std::fs::write(
        dir.join("x/metadata.csv"),
        "file_name,label\np/a.png,1.0\nb.png,0.0\n",
    )
    .unwrap();
    let images = read(&folder("x"), dir).unwrap();
    assert_eq!(
        (&images.labels[..], &images.names[..]),
        (&[1, 0][..], &["0".to_owned(), "1".to_owned()][..])
    );
    std::fs::write(dir.join("elsewhere.tsv"), "b.png\tdog\np/a.png\tcat\n").unwrap();
    let named = DataOptions {
        table: Some("elsewhere.tsv".into()),
        ..folder("x")
    };
    let images = read(&named, dir).unwrap();
    assert_eq!(
        (&images.labels[..], &images.names[..]),
        (&[1, 0][..], &["cat".to_owned(), "dog".to_owned()][..])
    );
    std::fs::write(dir.join("elsewhere.tsv"), "b.png\tdog\ngone.png\tcat\n").unwrap();
    let error = read(&named, dir).unwrap_err();
    assert!(
        error.contains("1 of 2 images are damaged:\n  gone.png: no such file"),
        "{error}"
    );
}
