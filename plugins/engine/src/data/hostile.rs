//! Tests: hostile data files, and paths that are not files.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use image::ImageDecoder;

use super::options::DataOptions;
use super::raster;
use super::source::Source;

/// The error for options that name `name`.
fn refused(dir: &Path, option: &str, name: &str) -> String {
    let options = serde_json::json!({ option: name, "height": 8, "width": 8 });
    let mut options = options.as_object().unwrap().clone();
    if option != "csv" {
        options.retain(|key, _| key == option);
    }
    if option == "table" {
        options.insert("folder".into(), "images".into());
    }
    let options: DataOptions = serde_json::from_value(options.into()).unwrap();
    let error = Source::open(&options, dir, &mut |_, _| true)
        .err()
        .expect("an error");
    error.to_string()
}

#[test]
fn what_is_no_file_is_named_and_never_opened() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let made = Command::new("mkfifo").arg(at("pipe")).status();
    assert!(made.unwrap().success());
    let _socket = UnixListener::bind(at("socket")).unwrap();
    std::fs::create_dir_all(at("images/0")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", at("device")).unwrap();
    for option in ["csv", "tar", "arrays", "table"] {
        for (name, kind) in [
            ("pipe", "a named pipe"),
            ("socket", "a socket"),
            ("device", "a device"),
            ("images", "a directory"),
        ] {
            let error = refused(dir.path(), option, name);
            let expected = format!("{name}: it is {kind}, not a regular file; expected a");
            assert!(error.contains(&expected), "{option}: {error}");
        }
        let error = refused(dir.path(), option, "nothing");
        assert!(error.ends_with("no such file"), "{option}: {error}");
    }
}

#[test]
fn a_record_without_end_is_not_held() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("images")).unwrap();
    let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
    write("wide.csv", "1,".repeat(9 << 20));
    let error = refused(dir.path(), "csv", "wide.csv");
    assert!(
        error.contains("wide.csv: line 1: a record of more than 16777216 bytes"),
        "{error}"
    );
    let line = "1,".repeat(64) + "0\n";
    write("quote.csv", format!("{line}\n\"{}", line.repeat(140_000)));
    let error = refused(dir.path(), "csv", "quote.csv");
    assert!(
        error.contains("quote.csv: line 3: a record of more than"),
        "{error}"
    );
    write("table.csv", format!("file\na.png\n{}", ",".repeat(2 << 20)));
    let error = refused(dir.path(), "table", "table.csv");
    assert!(
        error.contains("table.csv: line 3: a record of more than 1048576 bytes"),
        "{error}"
    );
}

/// A PNG with this depth and colour type, with a chunk before its pixels, which are missing.
fn png(side: u32, bits: u8, colour: u8, kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    png_of((side, side), bits, colour, kind, data)
}

/// The same with a width and a height.
fn png_of(
    (width, height): (u32, u32),
    bits: u8,
    colour: u8,
    kind: &[u8; 4],
    data: &[u8],
) -> Vec<u8> {
    let chunk = |kind: &[u8; 4], data: &[u8]| {
        let mut sum = flate2::Crc::new();
        sum.update(kind);
        sum.update(data);
        let length = (data.len() as u32).to_be_bytes();
        [&length[..], kind, data, &sum.sum().to_be_bytes()].concat()
    };
    let (width, height) = (width.to_be_bytes(), height.to_be_bytes());
    let head = [&width[..], &height, &[bits, colour, 0, 0, 0]].concat();
    let parts = [
        chunk(b"IHDR", &head),
        chunk(kind, data),
        chunk(b"IDAT", &[]),
    ];
    [b"\x89PNG\r\n\x1a\n".to_vec(), parts.concat()].concat()
}

#[test]
fn a_colour_profile_is_not_unpacked_without_end() {
    let packed = |bytes: usize| {
        use std::io::Write;
        let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&vec![7; bytes]).unwrap();
        let profile = [b"a\0\0", &packed.finish().unwrap()[..]].concat();
        png(8, 8, 2, b"iCCP", &profile)
    };
    let profile = |content: &[u8]| {
        let found = raster::open(content)
            .unwrap()
            .decoder
            .icc_profile()
            .unwrap();
        found.map(|profile| profile.len())
    };
    assert_eq!(profile(&packed(1 << 20)), Some(1 << 20));
    // A damaged profile is ignored.
    assert_eq!(profile(&packed(64 << 20)), None);
}

#[test]
fn an_image_that_does_not_fit_in_memory_is_not_decoded() {
    let claim = |bits, colour| raster::header(&png(8000, bits, colour, b"tIME", &[0; 7]));
    assert_eq!(claim(8, 2).unwrap().height, 8000);
    assert_eq!(
        claim(16, 6).unwrap_err(),
        "an image of 8000 x 8000 pixels that takes 671 MiB to decode: at most 480 are allowed"
    );
}

#[test]
fn an_image_like_a_thread_is_not_decoded() {
    let claim = |sides| raster::header(&png_of(sides, 8, 0, b"tIME", &[0; 7]));
    assert_eq!(claim((1, 65_536)).unwrap().height, 65_536);
    for (width, height) in [(1, 67_108_864), (1, 65_537), (65_537, 1)] {
        assert_eq!(
            claim((width, height)).unwrap_err(),
            format!(
                "an image of {width} x {height} pixels: sides of more than 65536 are not decoded"
            )
        );
    }
}
