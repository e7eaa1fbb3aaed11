//! Opening regular files safely: a path may be anything, and opening it must not block.
//!
//! In: a path. Out: an open regular file, or an error that says what is there instead. Opening a pipe would block, a device
//! may have no end, and merely opening one may have an effect. So the path is checked first, opened without blocking, and the
//! open file is checked again. Links are followed, except by `open_itself` and its variants. Callers that expect stale
//! handles use [`patiently`]. Deliberately absent: the path in messages, which the caller knows.

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

/// How often an operation is retried while a handle is stale, and the time between.
const STALE_TRIES: u32 = 10;
const STALE_PAUSE: Duration = Duration::from_millis(200);

/// Retries while the file system reports a stale handle. NFS does so after a file or directory was replaced: it exists under
/// another handle. Other errors are returned at once, and this one after the last retry.
///
/// # Errors
/// The last error of `act`.
pub fn patiently<T>(act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    patiently_where(is_stale, act)
}

/// The same for another error type; `is_stale` says whether an error was caused by a stale handle.
///
/// # Errors
/// As [`patiently`].
pub fn patiently_where<T, E>(
    is_stale: impl Fn(&E) -> bool,
    mut act: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    for _ in 1..STALE_TRIES {
        match act() {
            Err(error) if is_stale(&error) => std::thread::sleep(STALE_PAUSE),
            done => return done,
        }
    }
    act()
}

/// Whether a file system has reported a stale handle.
pub fn is_stale(error: &io::Error) -> bool {
    // The kind is kept when a message with the file's name is added.
    error.kind() == io::ErrorKind::StaleNetworkFileHandle
}

/// Opens a regular file for reading.
///
/// # Errors
/// It cannot be opened, or is not a regular file ([`io::ErrorKind::InvalidInput`]).
pub fn open(path: &Path) -> io::Result<File> {
    open_with(&std::fs::metadata(path)?, path, 0)
}

/// Opens the regular file that was `found` at a path, with these flags of `open` added.
fn open_with(found: &Metadata, path: &Path, flags: i32) -> io::Result<File> {
    expect_regular(found)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | flags)
        .open(path)?;
    expect_regular(&file.metadata()?)?;
    expect_stored(&file)?;
    Ok(file)
}

/// Refuses files that the kernel generates (`/proc`, `/sys`): they look regular but may have no end.
fn expect_stored(file: &File) -> io::Result<()> {
    // SAFETY: plain data, filled by the call; the descriptor is open.
    let is_generated = unsafe {
        let mut found: libc::statfs = std::mem::zeroed();
        libc::fstatfs(file.as_raw_fd(), &mut found) == 0
            && matches!(
                found.f_type,
                libc::PROC_SUPER_MAGIC
                    | libc::SYSFS_MAGIC
                    | libc::DEBUGFS_MAGIC
                    | libc::TRACEFS_MAGIC
                    | libc::CGROUP2_SUPER_MAGIC
                    | libc::SECURITYFS_MAGIC
            )
    };
    match is_generated {
        true => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is made by the kernel when it is read (/proc, /sys), not a regular file",
        )),
        false => Ok(()),
    }
}

/// Opens the regular file at a path without following a link there.
///
/// # Errors
/// As [`open`]; it is a link.
pub fn open_itself(path: &Path) -> io::Result<File> {
    open_with(&std::fs::symlink_metadata(path)?, path, libc::O_NOFOLLOW)
}

/// Opens it for writing, empty, and creates it if missing.
///
/// # Errors
/// As [`open_itself`]. Anything else at the path is left untouched.
pub fn create_itself(path: &Path) -> io::Result<File> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => expect_regular(&found)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_NOFOLLOW)
        .open(path)?;
    expect_regular(&file.metadata()?)?;
    file.set_len(0)?;
    Ok(file)
}

/// The last bytes of an open file, at most `limit`.
///
/// # Errors
/// It cannot be read.
pub fn end_of(mut file: File, limit: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    file.seek(io::SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The bytes of a regular file that has at most `limit`.
///
/// # Errors
/// As [`open`]; it is longer ([`io::ErrorKind::FileTooLarge`]); it cannot be read.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    whole(open(path)?, limit)
}

/// The bytes of an open file that has at most `limit`.
///
/// # Errors
/// It is longer ([`io::ErrorKind::FileTooLarge`]); it cannot be read.
pub fn whole(file: File, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // It may grow meanwhile: the bytes that were read count.
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let message = format!("it is longer than {limit} bytes, the most that is read");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(bytes)
}

/// Below this size, a file or the files of a folder are not checked for sparseness.
const MUCH: u64 = 1 << 30;
/// Above it, a size of more than this many times the bytes on the disk is refused.
const HOLLOW: u64 = 16;

/// A file's length and its space on the disk. Files may have holes, which cost nothing to create but as much as data to read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extent {
    length: u64,
    stored: u64,
}

impl Extent {
    /// From a file's metadata.
    pub fn of(found: &Metadata) -> Self {
        Self {
            length: found.len(),
            stored: found.blocks().saturating_mul(512),
        }
    }

    /// Of both.
    pub fn and(self, other: Self) -> Self {
        Self {
            length: self.length.saturating_add(other.length),
            stored: self.stored.saturating_add(other.stored),
        }
    }

    /// How long it is.
    pub fn length(self) -> u64 {
        self.length
    }

    /// Bytes that are not on the disk.
    pub fn missing(self) -> u64 {
        self.length.saturating_sub(self.stored)
    }

    /// Whether most of a large size is missing on the disk. Compressing file systems also use little space: see [`has_hole`].
    pub fn is_hollow(self) -> bool {
        self.length > MUCH && self.stored.saturating_mul(HOLLOW) < self.length
    }
}

/// Whether a file has a hole. False if it is only compressed, or if the file system does not report holes.
///
/// # Errors
/// As [`open`].
pub fn has_hole(path: &Path) -> io::Result<bool> {
    let file = open(path)?;
    let length = file.metadata()?.len();
    // SAFETY: a plain system call on a descriptor that is open; its position is nobody else's.
    let hole = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_HOLE) };
    Ok(u64::try_from(hole).is_ok_and(|hole| hole < length))
}

/// Succeeds if this is the metadata of a regular file.
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
        for name in ["pipe", "link", "socket", "/dev/null", ""] {
            let error = create_itself(&at(name)).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{name}: {error}");
        }
        assert!(open(&at("loop")).is_err());
        assert_eq!(
            open(&at("nothing")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn only_a_stale_handle_is_tried_again_and_not_for_ever() {
        let tried = |errors: &[i32]| {
            let mut tries = 0;
            let done = patiently(|| {
                tries += 1;
                match errors.get(tries - 1) {
                    Some(code) => Err(io::Error::from_raw_os_error(*code)),
                    None => Ok("there"),
                }
            });
            (done.map_err(|error| error.raw_os_error()), tries)
        };
        assert_eq!(tried(&[]), (Ok("there"), 1));
        assert_eq!(tried(&[libc::ESTALE; 3]), (Ok("there"), 4));
        let other = [libc::ESTALE, libc::EIO];
        assert_eq!(tried(&other), (Err(Some(libc::EIO)), 2));
        let always = [libc::ESTALE; 2 * STALE_TRIES as usize];
        let (done, tries) = tried(&always);
        assert_eq!(
            (done, tries),
            (Err(Some(libc::ESTALE)), STALE_TRIES as usize)
        );
    }

    #[test]
    fn a_file_of_holes_is_known_without_being_read() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let extent = || Extent::of(&std::fs::metadata(&path).unwrap());
        assert!(!extent().is_hollow() && !has_hole(&path).unwrap());
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(60 << 30).unwrap();
        assert!(extent().is_hollow() && has_hole(&path).unwrap());
        assert!(extent().missing() > 59 << 30);
        // Many files that are each too small to be checked.
        file.set_len(MUCH / 2).unwrap();
        assert!(!extent().is_hollow());
        let many = (0..10).fold(Extent::default(), |sum, _| sum.and(extent()));
        assert!(many.is_hollow());
    }

    #[test]
    fn a_file_has_its_bytes_up_to_the_limit() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        std::fs::write(&file, "0123456789").unwrap();
        assert_eq!(read(&file, 10).unwrap(), b"0123456789");
        let end = |limit| end_of(open_itself(&file).unwrap(), limit).unwrap();
        assert_eq!(end(3), b"789");
        assert_eq!(end(30), b"0123456789");
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for error in [
            open_itself(&link).unwrap_err(),
            create_itself(&link).unwrap_err(),
        ] {
            let said = error.to_string();
            assert!(
                said.contains("a symbolic link, not a regular file"),
                "{said}"
            );
        }
        let other = root.path().join("other");
        for text in ["long", "new"] {
            io::Write::write_all(&mut create_itself(&other).unwrap(), text.as_bytes()).unwrap();
            assert_eq!(read(&other, 10).unwrap(), text.as_bytes());
        }
        std::fs::write(&file, "0123456789a").unwrap();
        check(&file, "longer than 10 bytes");
    }
}
