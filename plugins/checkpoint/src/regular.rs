//! Files that are files: opening what somebody named without waiting for it.
//!
//! In: a path. Out: an open regular file, or an error that says what is there instead. A pipe would be waited for, a
//! device may have no end, and opening one may already do something: so the path is looked at first, opened without
//! waiting, and what was opened is looked at again. Links are followed. Deliberately absent: the path in messages;
//! whoever asked has it.

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Opens a regular file for reading.
///
/// # Errors
/// It cannot be opened, or is no regular file ([`io::ErrorKind::InvalidInput`]).
pub fn open(path: &Path) -> io::Result<File> {
    expect_regular(&std::fs::metadata(path)?)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    expect_regular(&file.metadata()?)?;
    Ok(file)
}

/// The bytes of a regular file that has at most `limit`.
///
/// # Errors
/// As [`open`]; it is longer ([`io::ErrorKind::FileTooLarge`]); it cannot be read.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // It may grow meanwhile: what counts is what was read.
    open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let message = format!("it is longer than {limit} bytes, the most that is read");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(bytes)
}

/// Nothing, if this is what is known of a regular file.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`], with what it is.
pub fn expect_regular(found: &Metadata) -> io::Result<()> {
    if found.is_file() {
        return Ok(());
    }
    let message = format!("it is {}, not a regular file", kind(found.file_type()));
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

/// In words: `a directory`.
pub fn kind(found: FileType) -> &'static str {
    match found {
        _ if found.is_file() => "a regular file",
        _ if found.is_dir() => "a directory",
        _ if found.is_symlink() => "a symbolic link",
        _ if found.is_fifo() => "a named pipe",
        _ if found.is_socket() => "a socket",
        _ if found.is_block_device() || found.is_char_device() => "a device",
        _ => "something special",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[track_caller]
    fn check(path: &Path, said: &str) {
        let error = read(path, 10).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }

    #[test]
    fn what_is_no_file_is_named_at_once() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let pipe = std::ffi::CString::new(at("pipe").into_os_string().into_encoded_bytes());
        // SAFETY: a plain system call on a path that ends with NUL.
        assert_eq!(unsafe { libc::mkfifo(pipe.unwrap().as_ptr(), 0o600) }, 0);
        let _socket = UnixListener::bind(at("socket")).unwrap();
        std::os::unix::fs::symlink(at("pipe"), at("link")).unwrap();
        std::os::unix::fs::symlink(at("loop"), at("loop")).unwrap();
        check(&at("pipe"), "a named pipe, not a regular file");
        check(&at("link"), "a named pipe, not a regular file");
        check(&at("socket"), "a socket, not a regular file");
        check(root.path(), "a directory, not a regular file");
        check(Path::new("/dev/zero"), "a device, not a regular file");
        check(Path::new("/dev/null"), "a device, not a regular file");
        assert!(open(&at("loop")).is_err());
        assert_eq!(
            open(&at("nothing")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn a_file_has_its_bytes_up_to_the_limit() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        std::fs::write(&file, "0123456789").unwrap();
        assert_eq!(read(&file, 10).unwrap(), b"0123456789");
        std::fs::write(&file, "0123456789a").unwrap();
        check(&file, "longer than 10 bytes");
    }
}
