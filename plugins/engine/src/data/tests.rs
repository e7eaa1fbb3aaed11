use image::DynamicImage;

use super::options::Size;
use super::resample::{Filter, Fit};
use super::*;

fn csv(text: &[u8], options: DataOptions) -> Result<Images, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.csv"), text).unwrap();
    let options = DataOptions {
        csv: Some("a.csv".into()),
        ..options
    };
    read(&options, dir.path())
}

/// What options give, or the message without the directory's path.
fn read(options: &DataOptions, dir: &Path) -> Result<Images, String> {
    let images = || {
        let source = Source::open(options, dir)?;
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
    let expected = "i: none of 4096 images can be read that were looked at, one in 24 of 100000; the others were not:\n  \
                    d/000000.png: no such file\n  d/000024.png: no such file\n";
    assert!(error.starts_with(expected), "{error}");
    assert!(error.contains("\n  and 4076 more\n"), "{error}");
    // One that is there is enough for all to be looked at, and told.
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
    let error = Source::open(&missing, Path::new("/base")).err().unwrap();
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
fn a_split_is_stratified_and_repeatable() {
    let labels: Vec<u32> = (0..103).map(|i| i % 10).chain([10]).collect();
    let bytes = Bytes::Memory(vec![0; labels.len()]);
    let names = vec![String::new(); 11];
    let images = Images::new((1, 1, 1), 255.0, names, labels, bytes);
    let (train, held) = images.split(0.2, 7);
    assert_eq!((train.len(), held.len()), (84, 20));
    for class in 0..10 {
        assert_eq!(
            held.iter().filter(|&&i| images.labels[i] == class).count(),
            2
        );
    }
    assert!(
        train.contains(&103),
        "a class of one image stays in training"
    );
    let mut all = [train, held.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (0..104).collect::<Vec<_>>());
    assert_eq!(images.split(0.2, 7).1, held);
    assert_ne!(images.split(0.2, 8).1, held);
    assert!(images.split(0.0, 7).1.is_empty());
}

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
        "rgb: images of 2 sizes (height x width): 2 x 3 (2), 2 x 1 (1); say which size they are brought to, as in \
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
    let source = Source::open(&folder("00"), dir).unwrap();
    assert_eq!(source.notices.len(), 1, "{:?}", source.notices);
    assert!(
        source.notices[0]
            .1
            .ends_with("1 files are no images and were left out: .txt 1")
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
    let (images, damaged) =
        Images::read(Source::open(&lenient, dir).unwrap(), &mut |_| true).unwrap();
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
    assert!(error.contains("\n  and 14 more\n"), "{error}");
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
    // More deflated than its size needs: the rest is not asked for.
    let (width, height) = (16, 16);
    let bomb = claim(width, height, &vec![0; 64 << 20]);
    assert!(bomb.len() < 100_000);
    let image = raster::decode(&bomb, [0; 3]).unwrap();
    assert_eq!(image.pixels, vec![0; 16 * 16 * 3]);
    // Less than it needs.
    assert!(raster::decode(&claim(4000, 4000, &[0; 100]), [0; 3]).is_err());
}

#[derive(serde::Deserialize)]
struct Shown {
    shape: Vec<usize>,
    pixels: Vec<u8>,
}

#[test]
fn a_palette_of_no_whole_colours_is_damage() {
    let file = include_bytes!("../../../../tests/soak/corpus/image/palette_of_13_bytes.png");
    let error = raster::decode(file, [0; 3]).unwrap_err();
    assert!(error.starts_with("a palette of 13 bytes"), "{error}");
    assert_eq!(raster::header(file).unwrap_err(), error);
}

fn fixture<T: serde::de::DeserializeOwned>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/images")
        .join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn every_format_shows_what_it_shows_elsewhere() {
    #[derive(serde::Deserialize)]
    struct Formats {
        files: std::collections::BTreeMap<String, Shown>,
    }
    let formats: Formats = fixture("formats.json");
    assert_eq!(formats.files.len(), 30);
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/images/formats");
    for (name, shown) in &formats.files {
        let content = std::fs::read(dir.join(name)).unwrap();
        let found = raster::decode(&content, [255; 3]).unwrap_or_else(|e| panic!("{name}: {e}"));
        let header = raster::header(&content).unwrap();
        assert_eq!(
            (header.height as usize, header.width as usize),
            (found.height, found.width),
            "{name}"
        );
        let found = found.with_channels(shown.shape[2]);
        assert_eq!(
            [found.height, found.width, found.channels],
            shown.shape[..],
            "{name}"
        );
        let most = found
            .pixels
            .iter()
            .zip(&shown.pixels)
            .map(|(a, b)| a.abs_diff(*b))
            .max();
        // Lossy formats leave the rounding of their transforms open.
        let lossy = name.ends_with(".jpg") || name == "lossy.webp";
        assert!(
            most.unwrap() <= if lossy { 4 } else { 1 },
            "{name}: {most:?}"
        );
    }
}

#[test]
fn sizes_are_those_of_pillow_within_a_level() {
    #[derive(serde::Deserialize)]
    struct Case {
        fit: Fit,
        filter: Filter,
        size: [usize; 2],
        pixels: Vec<u8>,
    }
    #[derive(serde::Deserialize)]
    struct Resized {
        source: Shown,
        cases: Vec<Case>,
    }
    let resized: Resized = fixture("resized.json");
    assert!(resized.cases.len() > 20);
    let source = raster::Raster {
        height: resized.source.shape[0],
        width: resized.source.shape[1],
        channels: 3,
        pixels: resized.source.pixels,
    };
    for case in resized.cases {
        let [h, w] = case.size;
        let found = resample::fit(source.clone(), (h, w), case.fit, case.filter, &[255; 3]);
        let far = found
            .pixels
            .iter()
            .zip(&case.pixels)
            .map(|(a, b)| a.abs_diff(*b))
            .max()
            .unwrap();
        assert_eq!(found.pixels.len(), case.pixels.len());
        assert!(
            far <= 1,
            "{:?} {:?} {h} x {w}: {far} levels",
            case.fit,
            case.filter
        );
    }
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
    // The ending does not say what it is.
    std::fs::copy(dir.join("x/1/rgb.bmp"), dir.join("x/1/no-ending")).unwrap();
    let options = DataOptions {
        size: Some(Size::Sides([4, 6])),
        ..folder("x")
    };
    let source = Source::open(&options, dir).unwrap();
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
fn what_training_sees_is_a_function_of_seed_epoch_and_image() {
    let rows: Vec<String> = (0..40)
        .map(|i| {
            (0..36)
                .map(|p| format!("{},", (p * 7 + i) % 200))
                .collect::<String>()
                + "0"
        })
        .collect();
    let options = DataOptions {
        max: Some(255.0),
        crop: Some(Size::Side(4)),
        flip: true,
        ..DataOptions::default()
    };
    let images = csv(rows.join("\n").as_bytes(), options).unwrap();
    assert_eq!(images.shape(), [1, 4, 4]);
    let all: Vec<usize> = (0..40).collect();
    let seen = |seed, epoch| {
        images
            .gather_augmented(&all, Some(Augment { seed, epoch }))
            .unwrap()
            .0
    };
    let first = seen(3, 0);
    assert_eq!(first, seen(3, 0));
    assert_ne!(first, seen(3, 1));
    assert_ne!(first, seen(4, 0));
    // One by one and in another order.
    let one = images
        .gather_augmented(&[17], Some(Augment { seed: 3, epoch: 0 }))
        .unwrap()
        .0;
    assert_eq!(one, first[17 * 16..18 * 16]);
    // Every place and both ways round occur.
    let views: std::collections::BTreeSet<_> = (0..40)
        .map(|i| images.view(i, Some(Augment { seed: 3, epoch: 0 })))
        .collect();
    assert!(views.iter().any(|view| view.2) && views.iter().any(|view| !view.2));
    for place in 0..3 {
        assert!(
            views.iter().any(|view| view.0 == place) && views.iter().any(|view| view.1 == place)
        );
    }
    // The middle, as it is stored, without.
    let middle = images.gather(&[0]).unwrap().0;
    let value = |p: usize| (p * 7 % 200) as f32 / 255.0 * 2.0 - 1.0;
    assert_eq!(middle[..4], [value(7), value(8), value(9), value(10)]);
    let other = images.gather_mirrored(&[0]).unwrap().0;
    assert_eq!(other[..4], [value(10), value(9), value(8), value(7)]);
    let mirrored = (0..40)
        .find(|&i| images.view(i, Some(Augment { seed: 3, epoch: 0 })).2)
        .unwrap();
    let (top, left, _) = images.view(mirrored, Some(Augment { seed: 3, epoch: 0 }));
    let stored = |p: usize| ((p * 7 + mirrored) % 200) as f32 / 255.0 * 2.0 - 1.0;
    let row: Vec<f32> = (0..4).rev().map(|x| stored(top * 6 + left + x)).collect();
    assert_eq!(first[mirrored * 16..][..4], row[..]);
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
    let by_folder = shards::tests::tar(&[
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
    let first = shards::tests::tar(&[
        ("0.png", &a),
        ("0.cls", b"1"),
        ("1.png", &b),
        ("1.cls", b"0"),
    ]);
    let second = shards::tests::tar(&[("2.png", &b), ("2.json", b"{\"label\": 1}")]);
    std::fs::write(dir.join("shards/a.tar"), first).unwrap();
    std::fs::write(dir.join("shards/b.tar"), second).unwrap();
    assert_eq!(read(&folder("shards"), dir).unwrap().labels, [1, 0, 1]);
    std::fs::write(
        dir.join("shards/c.tar"),
        shards::tests::tar(&[("3.png", &b)]),
    )
    .unwrap();
    assert_eq!(
        read(&folder("shards"), dir).unwrap_err(),
        "shards: 3.png has no class, though 3 files have one"
    );
    let cut = shards::tests::tar(&[("0/3.png", &b[..b.len() - 10]), ("0/4.png", &b)]);
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
    // Other numbers than bytes keep 255 levels.
    let wide = DataOptions::default();
    let images = csv(b"0,500,1000,250.5,0", wide).unwrap();
    let value = |byte: f32| byte / 255.0 * 2.0 - 1.0;
    assert_eq!(pixels(&images), [-1.0, value(128.0), 1.0, value(64.0)]);
    // Brought to a size, sixteen levels become as many as there are.
    let sized = DataOptions {
        size: Some(Size::Side(1)),
        filter: Filter::Box,
        ..max16()
    };
    assert_eq!(pixels(&csv(b"0,16,8,8,0", sized).unwrap()), [value(128.0)]);
}

#[test]
fn prepared_images_are_those_that_were_prepared() {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<String> = (0..5).map(|i| format!("{i},1,2,3,{}", i % 2)).collect();
    let options = DataOptions {
        csv: Some("a.csv".into()),
        ..max16()
    };
    std::fs::write(dir.path().join("a.csv"), rows.join("\n")).unwrap();
    let source = Source::open(&options, dir.path()).unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let description = prepared::Description {
        format: 1,
        count: 0,
        channels: source.channels,
        height: source.height,
        width: source.width,
        white: source.white,
        classes: source.names.clone(),
        shard: 0,
        damaged: 0,
    };
    let mut writer = prepared::Writer::new(&out, description).unwrap();
    source
        .read(&mut |_| true, &mut |image| writer.push(&image))
        .unwrap();
    let damaged = source::Damaged {
        name: "b.png".into(),
        why: "cut".into(),
    };
    writer.finish(&[damaged]).unwrap();
    let images = Images::of(Prepared::open(&out).unwrap());
    let held = read(&options, dir.path()).unwrap();
    assert_eq!(
        (pixels(&images), &images.labels),
        (pixels(&held), &held.labels)
    );
    let manifest = std::fs::read_to_string(out.join("manifest.jsonl")).unwrap();
    assert_eq!(manifest.lines().count(), 6);
    assert!(
        manifest.ends_with("{\"file\":\"b.png\",\"damaged\":\"cut\"}\n"),
        "{manifest}"
    );
    std::fs::write(
        out.join("labels.npy"),
        [crate::numpy::header("<u4", &[5]), vec![9; 20]].concat(),
    )
    .unwrap();
    assert!(
        Prepared::open(&out)
            .err()
            .unwrap()
            .to_string()
            .contains("a label beyond 2 classes")
    );
}

#[test]
fn a_feed_gives_each_step_its_images_from_wherever_it_begins() {
    let rows: Vec<String> = (0..50).map(|i| format!("{i},0,0,0,0")).collect();
    let options = DataOptions {
        max: Some(50.0),
        ..DataOptions::default()
    };
    let images = std::sync::Arc::new(csv(rows.join("\n").as_bytes(), options).unwrap());
    let feed = || {
        let picks = |step: u64| vec![step as usize, (step * 7 % 50) as usize];
        feed::Feed::new(std::sync::Arc::clone(&images), picks, |step| Augment {
            seed: 1,
            epoch: step,
        })
    };
    let mut whole = feed();
    let all: Vec<Vec<f32>> = (0..20)
        .map(|step| whole.take(step).unwrap().pixels)
        .collect();
    assert_eq!(all[9][0], 9.0 / 50.0 * 2.0 - 1.0);
    let mut late = feed();
    for step in [11, 12, 5, 6, 6, 19] {
        assert_eq!(
            late.take(step).unwrap().pixels,
            all[step as usize],
            "step {step}"
        );
    }
    assert!(late.wait().1 >= 0.0);
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
