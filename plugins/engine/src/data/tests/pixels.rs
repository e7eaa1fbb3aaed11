//! Pixels of every format and size.

use super::*;

#[derive(serde::Deserialize)]
struct Shown {
    shape: Vec<usize>,
    pixels: Vec<u8>,
}

#[test]
fn a_palette_of_no_whole_colours_is_damage() {
    let file = include_bytes!("../../../../../tests/soak/corpus/image/palette_of_13_bytes.png");
    let error = raster::decode(file, [0; 3]).unwrap_err();
    assert!(error.starts_with("a palette of 13 bytes"), "{error}");
    assert_eq!(raster::header(file).unwrap_err(), error);
}

/// The soak's examples of every format, and of pictures larger than what holds them.
#[test]
fn what_a_small_file_holds_is_not_larger_than_it_says() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/soak/corpus");
    let read = |name: &str| {
        let content = std::fs::read(corpus.join(name)).unwrap();
        raster::decode(&content, [0; 3]).map(|image| (image.height, image.width, image.channels))
    };
    for (name, shape) in [
        ("image/grey.jpg", (8, 8, 1)),
        ("image/rgb.jpg", (8, 8, 3)),
        ("image/progressive.jpg", (8, 8, 3)),
        ("image/colours.gif", (2, 2, 3)),
        ("image/part.gif", (2, 2, 3)),
        ("image/rgb.bmp", (2, 2, 3)),
        ("image/palette.bmp", (2, 2, 3)),
        ("image/packed.bmp", (2, 2, 3)),
        ("image/lossless.webp", (2, 2, 3)),
        ("image/extended.webp", (2, 2, 3)),
        ("image/animated.webp", (2, 2, 3)),
        ("tiff/jpeg_strip.tiff", (8, 8, 1)),
    ] {
        assert_eq!(read(name), Ok(shape), "{name}");
    }
    for (name, expected) in [
        ("image/enormous.jpg", "whose scans visit 130023424 blocks"),
        (
            "image/enormous.gif",
            "a frame of 60000 x 60000 pixels on a canvas of 2 x 2",
        ),
        ("image/enormous.bmp", "60000"),
        (
            "image/enormous.webp",
            "a picture of 16000 x 16000 pixels on a canvas of 2 x 2",
        ),
        (
            "tiff/jpeg_strip_enormous.tiff",
            "a JPEG of 16000 x 16000 pixels; expected at most 8 x 8",
        ),
    ] {
        let said = read(name).unwrap_err();
        assert!(said.contains(expected), "{name}: {said}");
    }
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
        // Lossy formats do not define the rounding of their transforms.
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
        let found =
            resample::fit(source.clone(), (h, w), case.fit, case.filter, &[255; 3]).unwrap();
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
