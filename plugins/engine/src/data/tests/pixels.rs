//! What pixels become: of every format, and at every size.

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
