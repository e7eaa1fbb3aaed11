//! Folders of images: which of their files are data.
//!
//! In: a name, and the first bytes of a file. Out: whether a loader of images reads it. The runner needs this because unread
//! files do not affect a result. The loader uses it too, so that both agree. It also checks what decoders take for
//! granted. Deliberately absent: decoding.

use std::io::{self, Read};
use std::path::Path;

use crate::regular;

/// How many bytes of a file identify an image's format.
const START: u64 = 16;

/// The longest image file that is decoded.
pub const LONGEST_FILE: u64 = 1 << 28;

/// The most files that a folder of data may hold.
pub const MOST_FILES: usize = 1 << 22;

/// The most folders in it, links followed.
pub const MOST_FOLDERS: usize = 1 << 18;

/// Names of tables that describe the images of a folder, directly in it; the first one that exists counts.
pub const TABLES: [&str; 4] = [
    "metadata.jsonl",
    "metadata.csv",
    "metadata.tsv",
    "metadata.json",
];

/// Formats of image files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Windows bitmap.
    Bmp,
    /// GIF.
    Gif,
    /// JPEG.
    Jpeg,
    /// PNG.
    Png,
    /// TIFF.
    Tiff,
    /// WebP.
    WebP,
}

/// The format of a file that begins with these bytes.
pub fn format(start: &[u8]) -> Option<Format> {
    let begins = |with: &[u8]| start.starts_with(with);
    match () {
        () if begins(b"\x89PNG\r\n\x1a\n") => Some(Format::Png),
        () if begins(b"\xff\xd8\xff") => Some(Format::Jpeg),
        () if begins(b"GIF87a") || begins(b"GIF89a") => Some(Format::Gif),
        () if begins(b"RIFF") && start.get(8..12) == Some(b"WEBP") => Some(Format::WebP),
        () if begins(b"MM\0*") || begins(b"II*\0") => Some(Format::Tiff),
        () if begins(b"BM") => Some(Format::Bmp),
        () => None,
    }
}

/// Whether a file or folder with this name is not data: hidden, or created by a file manager.
pub fn is_hidden(name: &str) -> bool {
    let known = [
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "__macosx",
        "@eadir",
    ];
    name.starts_with('.') || known.contains(&&*name.to_ascii_lowercase())
}

/// Whether a name claims to be an image, so that other content means damage.
pub fn promises_image(name: &str) -> bool {
    let endings = [
        "png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff",
    ];
    let ending = Path::new(name).extension().unwrap_or_default();
    endings
        .iter()
        .any(|known| ending.eq_ignore_ascii_case(known))
}

/// Whether a name claims to be a tar archive.
pub fn promises_tar(name: &str) -> bool {
    let ending = Path::new(name).extension().unwrap_or_default();
    ending.eq_ignore_ascii_case("tar")
}

/// Whether a name claims to be a Parquet file.
pub fn promises_parquet(name: &str) -> bool {
    let ending = Path::new(name).extension().unwrap_or_default();
    ending.eq_ignore_ascii_case("parquet")
}

/// Whether a name claims to be a file with many images.
pub fn promises_archive(name: &str) -> bool {
    promises_tar(name) || promises_parquet(name)
}

/// Whether a data file is too long for an image, so that only its beginning is read. `inner` is its name within the folder.
pub fn is_too_long(inner: &str, bytes: u64) -> bool {
    let is_list = !inner.contains('/') && (promises_archive(inner) || TABLES.contains(&inner));
    bytes > LONGEST_FILE && !is_list
}

/// Whether a loader reads the file at `path`, whose name within the folder is `inner`: it is an image, or its name says so,
/// or it is a table or an archive directly in the folder. If the name says nothing, the content decides.
///
/// # Errors
/// The content has to decide and cannot be read.
pub fn is_data(path: &Path, inner: &str) -> io::Result<bool> {
    let outermost = !inner.contains('/');
    if promises_image(inner) || outermost && (promises_archive(inner) || TABLES.contains(&inner)) {
        return Ok(true);
    }
    let mut start = Vec::new();
    regular::open(path)?.take(START).read_to_end(&mut start)?;
    Ok(format(&start).is_some())
}

/// Checks that the palette of a PNG consists of whole colours: the library that decodes it assumes so. `content` may be the
/// beginning of a file.
///
/// # Errors
/// It does not.
pub fn check_palettes(content: &[u8]) -> Result<(), String> {
    let mut at = 8_usize;
    while let Some(&[a, b, c, d, ref kind @ ..]) = content.get(at..at.saturating_add(8)) {
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        match kind {
            b"PLTE" if length > 768 || !length.is_multiple_of(3) => {
                return Err(format!(
                    "a palette of {length} bytes: expected three for each of up to 256 colours"
                ));
            }
            b"IDAT" => break,
            _ => at = at.saturating_add(length).saturating_add(12),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_image_is_no_data_unless_its_name_says_so() {
        let root = tempfile::tempdir().unwrap();
        let check = |inner: &str, content: &[u8], expected: bool| {
            let path = root.path().join(inner);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, content).unwrap();
            assert_eq!(is_data(&path, inner).unwrap(), expected, "{inner}");
        };
        check("README.txt", b"about these images", false);
        check("LICENSE", b"", false);
        check("0/notes.json", b"{}", false);
        check("0/metadata.csv", b"a table below is none", false);
        check("0/a.tar", b"nor is an archive", false);
        check("metadata.csv", b"file_name", true);
        check("a.TAR", b"", true);
        check("a.parquet", b"", true);
        check("0/a.parquet", b"nor is a table", false);
        check("0/a.PNG", b"damaged", true);
        check("0/without-ending", b"\xff\xd8\xff\xe0", true);
        check("0/a.dat", b"RIFF\x10\0\0\0WEBPVP8L", true);
        check("0/a.wav", b"RIFF\x10\0\0\0WAVE", false);
    }

    #[test]
    fn a_palette_has_whole_colours() {
        let chunk = |kind: &[u8; 4], length: usize| {
            let length_field = (length as u32).to_be_bytes();
            [&length_field[..], kind, &vec![0; length], &[0; 4]].concat()
        };
        let check = |palette: usize, expected: bool| {
            let start = b"\x89PNG\r\n\x1a\n".to_vec();
            let file = [
                start,
                chunk(b"IHDR", 13),
                chunk(b"PLTE", palette),
                chunk(b"IDAT", 1),
            ];
            let file = file.concat();
            assert_eq!(check_palettes(&file).is_ok(), expected, "{palette}");
            // Its beginning alone tells nothing.
            assert!(check_palettes(&file[..20]).is_ok());
        };
        check(12, true);
        check(768, true);
        check(13, false);
        check(771, false);
    }
}
