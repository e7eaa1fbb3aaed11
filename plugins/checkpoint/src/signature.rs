//! Whether the first bytes of a file match its extension.
//!
//! In: a path. Out: why no reader will accept the file, if so. This is checked before a file is hashed, because hashing a
//! large file takes long. The headers of archives are checked too, as far as that is quick. Deliberately absent: any other
//! content, which the file's reader checks.

use std::borrow::Cow;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::{images, parquet, regular, tar};

/// Why the file at `path` contradicts its extension. None if it may match, if the extension means nothing, or if the file
/// cannot be read, which its reader will report. Archives are checked until the deadline.
pub fn broken(path: &Path, until: Instant) -> Option<Cow<'static, str>> {
    let ending = path.extension()?.to_str()?.to_ascii_lowercase();
    let known = [
        "tar",
        "parquet",
        "npz",
        "npy",
        "csv",
        "tsv",
        "jsonl",
        "safetensors",
    ];
    if !known.contains(&ending.as_str()) {
        return None;
    }
    let mut start = Vec::new();
    let file = regular::open(path).ok()?;
    let read = (&file).take(tar::BLOCK as u64).read_to_end(&mut start);
    read.ok()?;
    if let Some(wrong) = begins_wrong(&ending, &start) {
        return Some(wrong.into());
    }
    match ending.as_str() {
        "tar" => {
            (&file).rewind().ok()?;
            tar::broken(file, until).map(Cow::Owned)
        }
        "parquet" => parquet::broken(file).map(Cow::Owned),
        _ => None,
    }
}

/// The error in the first bytes of a file with this extension.
fn begins_wrong(ending: &str, start: &[u8]) -> Option<&'static str> {
    let begins = |with: &[u8]| start.starts_with(with);
    let compressed = begins(b"\x1f\x8b")
        || begins(b"BZh")
        || begins(b"\xfd7zXZ\0")
        || begins(b"\x28\xb5\x2f\xfd");
    match ending {
        // For an empty table the reader has a better message.
        "csv" | "tsv" | "jsonl" if start.is_empty() => None,
        _ if start.is_empty() => Some("it is empty"),
        _ if begins(b"version https://git-lfs.github.com/") => {
            Some("a pointer of Git LFS in place of the file: `git lfs pull` fetches it")
        }
        "tar" if compressed => {
            Some("a compressed archive; unpack it first: files are read from their place in it")
        }
        _ if compressed => Some("it is compressed; unpack it first"),
        "tar" if start.len() == tar::BLOCK && start.iter().all(|byte| *byte == 0) => {
            Some(tar::EMPTY)
        }
        "tar" if !start.first_chunk().is_some_and(tar::is_header) => {
            Some("not a tar archive: its first header is wrong")
        }
        "npz" if !begins(b"PK") => {
            Some("not an archive of NumPy arrays: it does not begin as a zip file")
        }
        "npy" if !begins(b"\x93NUMPY") => Some("not a NumPy array: its first bytes are wrong"),
        "safetensors" if start.get(8) != Some(&b'{') => {
            Some("not a safetensors file: its first bytes are wrong")
        }
        "csv" | "tsv" | "jsonl" if start.contains(&0) => {
            Some("not text in UTF-8: there are zero bytes at its beginning")
        }
        _ => None,
    }
}

/// The same for the archives and tables directly in a folder of images: the first damaged one.
pub fn broken_in(folder: &Path, until: Instant) -> Option<(PathBuf, Cow<'static, str>)> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let named = entries.filter(|entry| {
        let name = entry.file_name();
        let is_list = |name: &str| images::promises_archive(name) || images::TABLES.contains(&name);
        name.to_str().is_some_and(is_list)
    });
    let mut paths: Vec<PathBuf> = named.map(|entry| entry.path()).collect();
    paths.sort();
    paths
        .into_iter()
        .find_map(|path| broken(&path, until).map(|why| (path, why)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + std::time::Duration::from_secs(60)
    }

    #[test]
    fn a_file_keeps_what_its_name_promises_or_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let check = |name: &str, content: &[u8], said: Option<&str>| {
            let path = root.path().join(name);
            std::fs::write(&path, content).unwrap();
            match (broken(&path, soon()), said) {
                (Some(found), Some(said)) => assert!(found.contains(said), "{name}: {found}"),
                (found, said) => assert_eq!(found.as_deref(), said, "{name}"),
            }
        };
        let mut head = [0; tar::BLOCK];
        head[..5].copy_from_slice(b"a.png");
        let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        check("a.tar", &head, None);
        // The second header is invalid, or claims more bytes than there are.
        let after = |more: &[u8]| [&head[..], more].concat();
        check("a.tar", &after(&[0; 1024]), None);
        check("a.tar", &after(&[7; 512]), Some("at byte 512 a header"));
        check("a.tar", &after(&[0; 100]), Some("at byte 512 it ends"));
        // A long archive is not checked to its end.
        let path = root.path().join("long.tar");
        let whole = [head; 64].concat();
        std::fs::write(&path, [&whole[..], &[7; 512]].concat()).unwrap();
        assert!(broken(&path, soon()).unwrap().contains("at byte 32768"));
        let past = Instant::now() - std::time::Duration::from_nanos(1);
        assert_eq!(broken(&path, past), None);
        std::fs::remove_file(path).unwrap();
        head[0] = b'b';
        check("a.tar", &head, Some("first header"));
        check("a.TAR", b"\x1f\x8b\x08", Some("compressed archive"));
        check("a.tar", &[0; 4096], Some("a tar archive without files"));
        check("a.tar", &[0; 100], Some("first header"));
        check("a.tar", b"", Some("empty"));
        check(
            "a.parquet",
            b"PK\x03\x04.........",
            Some("first bytes are wrong"),
        );
        check("a.parquet", b"PAR1.........", Some("end as one"));
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12";
        check("a.parquet", pointer, Some("git lfs pull"));
        check("a.parquet", b"PAR1\0\0\0\0PAR1", None);
        check("a.npz", b"PK\x03\x04", None);
        check("a.npz", b"\x93NUMPY", Some("zip file"));
        check("a.npy", b"\x93NUMPY\x01\0", None);
        check("a.npy", b"PK", Some("NumPy"));
        check("a.csv", b"1,2,3", None);
        check("a.csv", &[0; 100], Some("zero bytes"));
        check("a.jsonl", b"\x28\xb5\x2f\xfd...", Some("compressed"));
        check("a.safetensors", b"\x02\0\0\0\0\0\0\0{}", None);
        check("a.safetensors", b"PK\x03\x04", Some("safetensors"));
        check("a.png", b"anything", None);
        check("csv", b"", None);
        check("a.csv", b"", None);
        assert_eq!(broken(&root.path().join("nothing.tar"), soon()), None);
        // In a folder only archives and tables are checked.
        let (path, why) = broken_in(root.path(), soon()).unwrap();
        assert!(path.ends_with("a.TAR") && why.contains("compressed"));
        for name in ["a.tar", "a.TAR"] {
            std::fs::remove_file(root.path().join(name)).unwrap();
        }
        assert_eq!(broken_in(root.path(), soon()), None);
        check("metadata.csv", &[0; 100], Some("zero bytes"));
        assert!(
            broken_in(root.path(), soon())
                .unwrap()
                .0
                .ends_with("metadata.csv")
        );
        assert_eq!(broken_in(&root.path().join("nothing"), soon()), None);
    }
}
