//! Folders of images: which of their files are data.
//!
//! In: a name, and the first bytes of a file. Out: whether a loader of images reads it. The runner asks, because what
//! nobody reads decides no result, and the loader does, so that both mean the same files. Deliberately absent: decoding.

use std::io::{self, Read};
use std::path::Path;

use crate::regular;

/// As many first bytes as tell the format of an image.
const START: u64 = 16;

/// The longest image file that is decoded.
pub const LONGEST_FILE: u64 = 1 << 28;

/// The most files that a folder of data may hold.
pub const MOST_FILES: usize = 1 << 22;

/// Tables in a folder, directly in it, that say what its images are; the first that is there counts.
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

/// Whether a file or folder of this name is no data: hidden, or put there by a system beside what people keep.
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

/// Whether a name promises an image, so that other content means damage.
pub fn promises_image(name: &str) -> bool {
    let endings = [
        "png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff",
    ];
    let ending = Path::new(name).extension().unwrap_or_default();
    endings
        .iter()
        .any(|known| ending.eq_ignore_ascii_case(known))
}

/// Whether a name promises a tar archive.
pub fn promises_tar(name: &str) -> bool {
    let ending = Path::new(name).extension().unwrap_or_default();
    ending.eq_ignore_ascii_case("tar")
}

/// Whether a name promises a Parquet file.
pub fn promises_parquet(name: &str) -> bool {
    let ending = Path::new(name).extension().unwrap_or_default();
    ending.eq_ignore_ascii_case("parquet")
}

/// Whether a name promises a file of many images.
pub fn promises_archive(name: &str) -> bool {
    promises_tar(name) || promises_parquet(name)
}

/// Whether a file of data is too long for an image, so that nobody reads more than its beginning: `inner` is its name
/// within the folder.
pub fn is_too_long(inner: &str, bytes: u64) -> bool {
    let is_list = !inner.contains('/') && (promises_archive(inner) || TABLES.contains(&inner));
    bytes > LONGEST_FILE && !is_list
}

/// Whether a loader reads the file at `path`, whose name within the folder is `inner`: it is an image, or its name says
/// so, or it is a table or an archive directly in the folder. A file whose name says nothing is looked into.
///
/// # Errors
/// It has to be looked into, and cannot be.
pub fn is_data(path: &Path, inner: &str) -> io::Result<bool> {
    let outermost = !inner.contains('/');
    if promises_image(inner) || outermost && (promises_archive(inner) || TABLES.contains(&inner)) {
        return Ok(true);
    }
    let mut start = Vec::new();
    regular::open(path)?.take(START).read_to_end(&mut start)?;
    Ok(format(&start).is_some())
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
}
