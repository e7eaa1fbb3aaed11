//! Files and folders that a stage's options name: their content, and whether it changes while it is used.
//!
//! In: a path and whether it is a file or a folder. Out: a [`FileSnapshot`]: a hash of the content, as of an artifact, and
//! every file's metadata, by which a later check tells whether anything was written. Links are followed.
//! Names that begin with a dot, and leftovers of file managers ([`is_hidden`]), are not data: they are ignored, and
//! no loader reads them; nor is, in a folder of images, what is neither an image nor a list of them. What has been hashed
//! is remembered ([`Folder`]) and not read again while the file system says that it is as it was. Deliberately absent:
//! where that is remembered (the store), and what files mean.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use retort_checkpoint::images::{self, MOST_FILES, is_hidden};
use retort_checkpoint::regular::{self, Extent};
use retort_checkpoint::shards::ShardPlace;
use serde::{Deserialize, Serialize};

/// A file written less than this before a check may be rewritten undetectably: file systems
/// keep times in steps of up to two seconds.
const CLOCK_STEP: i128 = 2_000_000_000;
/// Folders reached by links, at most: links that lead to the same folders again and again would never end.
const MOST_LINKED: usize = 100_000;
/// Links within links within a folder, at most.
const DEEPEST: usize = 128;
/// Version of [`Folder`]'s bytes.
const PACKED: u8 = 1;

/// The message about a mostly sparse file.
pub fn mostly_holes(path: &Path, extent: Extent) -> String {
    format!(
        "{} is {} bytes long and mostly holes: {} bytes of it are not on the disk. An incomplete download or copy? Fetch it \
         again; if this is intended, fill the holes: `cp --sparse=never`",
        path.display(),
        extent.length(),
        extent.missing()
    )
}

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// One file.
    File,
    /// A directory, with everything in it.
    Dir,
    /// A directory, with the files in it that a loader of images reads.
    Images,
    /// Weights of a network: a file, or the folder or index of several.
    Weights,
}

/// Why a file or folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The file system refuses.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Neither file nor folder.
    #[error("{} is {kind}: expected files and folders of files", path.display())]
    Kind {
        /// The entry.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A link to nothing.
    #[error("{} is a link to {}, which does not exist", path.display(), target.display())]
    Broken {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A folder within itself, by a link; or links without end.
    #[error("{} is in a cycle of links, or leads to {MOST_LINKED} or more folders", path.display())]
    Loop {
        /// Where that was noticed.
        path: PathBuf,
    },
    /// A network's weights in several files, of which something is missing.
    #[error("{}: {message}", path.display())]
    Weights {
        /// What the option names.
        path: PathBuf,
        /// Why they are none.
        message: String,
    },
    /// A mostly sparse file.
    #[error("{}", mostly_holes(path, *extent))]
    Hollow {
        /// The file.
        path: PathBuf,
        /// What it takes.
        extent: Extent,
    },
    /// Too many files.
    #[error(
        "{} holds more than {most} files; put them into tar archives (`tar:`), or into several folders",
        path.display()
    )]
    Many {
        /// The folder.
        path: PathBuf,
        /// The most that are looked at.
        most: usize,
    },
    /// A name that a digest cannot hold.
    #[error("the name of {} is not UTF-8", path.display())]
    Name {
        /// The entry.
        path: PathBuf,
    },
}

impl InputError {
    /// It would take far too long to read.
    pub fn interrupted(
        path: &Path,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        failed("look at", path)(io::Error::other(error))
    }
}

/// A file's metadata that changes with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Nanoseconds since 1970.
    modified: i64,
    /// When anything about it was changed, which nobody can set.
    changed: i64,
}

impl FileStamp {
    /// Of a file that was looked at.
    pub fn of(found: &Metadata) -> Self {
        // Up to the year 2262.
        let nanoseconds =
            |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
        Self {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            modified: nanoseconds(found.mtime(), found.mtime_nsec()),
            changed: nanoseconds(found.ctime(), found.ctime_nsec()),
        }
    }

    /// Whether the file could be written after `now` and look as before.
    fn is_young(&self, now: i128) -> bool {
        now - i128::from(self.modified.max(self.changed)) < CLOCK_STEP
    }

    fn bytes(&self) -> [u8; 56] {
        let mut bytes = [0; 56];
        bytes[..8].copy_from_slice(&self.device.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.inode.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..40].copy_from_slice(&i128::from(self.modified).to_le_bytes());
        bytes[40..].copy_from_slice(&i128::from(self.changed).to_le_bytes());
        bytes
    }
}

/// The files that a path stands for, as they are at a moment.
#[derive(Debug)]
pub struct Listing {
    path: PathBuf,
    kind: FileKind,
    /// Sorted by name, which is relative to `path`; that of a file itself is empty.
    files: Vec<ListedFile>,
    traces: ListingHashes,
    /// When it was made.
    now: i128,
}

/// What is compared of two listings.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ListingHashes {
    /// Names, places, sizes and times of writing.
    content: blake3::Hash,
    /// Owners, rights, and numbers of names.
    rights: blake3::Hash,
    /// Times of changes of any kind.
    changes: blake3::Hash,
}

/// The content of a file or folder at a moment.
#[derive(Debug, Clone)]
pub struct FileSnapshot {
    /// Hex BLAKE3 of a file; of a folder, of the list of its files.
    pub hash: String,
    traces: ListingHashes,
    /// Whether something may have been written since without a trace.
    young: bool,
}

/// What is remembered of the files of one folder, or of one file that is named itself: in the order of names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folder(BTreeMap<String, ([u8; 56], [u8; 32])>);

impl Listing {
    /// Looks at a file or at everything in a folder; reads no content.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn of(path: &Path, kind: FileKind) -> Result<Self, InputError> {
        Self::of_few(path, kind, MOST_FILES)
    }

    /// The same of at most so many files.
    fn of_few(path: &Path, kind: FileKind, most: usize) -> Result<Self, InputError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now = i128::try_from(now.as_nanos()).unwrap_or(i128::MAX);
        let (mut walk, mut base) = (Walk::new(path, most), None);
        match kind {
            FileKind::File => {
                let found = fs::metadata(path).map_err(failed("read", path))?;
                walk.file(path, String::new(), &found)?;
            }
            FileKind::Dir => walk.folder(path, "")?,
            FileKind::Images => {
                walk.only_images = true;
                walk.folder(path, "")?;
            }
            FileKind::Weights => {
                let files = ShardPlace::find(path).map(|place| place.files());
                let files = files.map_err(|error| InputError::Weights {
                    path: path.to_owned(),
                    message: error.to_string(),
                })?;
                if let [only] = files.as_slice() {
                    return Self::of_few(only, FileKind::File, most);
                }
                base = files
                    .first()
                    .and_then(|file| file.parent())
                    .map(Path::to_owned);
                for file in &files {
                    let inner = file.strip_prefix(base.as_deref().unwrap_or(path));
                    let name = inner.ok().and_then(Path::to_str);
                    let name = name.ok_or_else(|| InputError::Name { path: file.clone() })?;
                    let found = fs::metadata(file).map_err(failed("read", file))?;
                    walk.file(file, name.to_owned(), &found)?;
                }
            }
        }
        walk.expect_content()?;
        walk.files.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut content = blake3::Hasher::new();
        let mut rights = blake3::Hasher::new();
        let mut changes = blake3::Hasher::new();
        for ListedFile { name, stamp, owner } in &walk.files {
            // No name holds a NUL.
            content
                .update(name.as_bytes())
                .update(b"\0")
                .update(&stamp.bytes()[..40]);
            rights.update(name.as_bytes()).update(b"\0").update(owner);
            changes.update(&stamp.bytes()[40..]);
        }
        Ok(Self {
            path: base.unwrap_or_else(|| path.to_owned()),
            kind,
            files: walk.files,
            traces: ListingHashes {
                content: content.finalize(),
                rights: rights.finalize(),
                changes: changes.finalize(),
            },
            now,
        })
    }

    /// Under which names the files are remembered: the folders that hold them, or the file itself. Without those that
    /// the store could not name.
    pub fn folders(&self) -> Vec<String> {
        let mut folders: Vec<String> = Vec::new();
        for ListedFile { name, .. } in &self.files {
            let Some((folder, _)) = self.place(name) else {
                continue;
            };
            if folders.last() != Some(&folder) {
                folders.push(folder);
            }
        }
        folders.sort();
        folders.dedup();
        folders
    }

    /// Where a file of this name lies.
    fn at(&self, name: &str) -> PathBuf {
        match name {
            "" => self.path.clone(),
            name => self.path.join(name),
        }
    }

    /// The folder of a file, and its name in it.
    fn place<'n>(&self, name: &'n str) -> Option<(String, &'n str)> {
        let (inner, own) = name.rsplit_once('/').unwrap_or(("", name));
        Some((self.at(inner).into_os_string().into_string().ok()?, own))
    }

    /// Hashes the files that are not remembered as they are. Returns the snapshot, and what is to be remembered anew.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn hashed(
        &self,
        remembered: &BTreeMap<String, Folder>,
    ) -> Result<(FileSnapshot, BTreeMap<String, Folder>), InputError> {
        let mut anew: BTreeMap<String, Folder> = BTreeMap::new();
        let mut list = blake3::Hasher::new();
        let mut single = String::new();
        let mut young = false;
        for ListedFile { name, stamp, .. } in &self.files {
            let place = self.place(name);
            let known = place.as_ref().and_then(|(folder, own)| {
                let (bytes, hash) = remembered.get(folder)?.0.get(*own)?;
                (*bytes == stamp.bytes()).then_some(blake3::Hash::from_bytes(*hash))
            });
            let is_young = stamp.is_young(self.now);
            let hash = match known {
                Some(hash) => hash,
                // What it holds decides nothing, and to read it would take long.
                None if self.kind == FileKind::Images && images::is_too_long(name, stamp.size) => {
                    blake3::hash(b"")
                }
                None => {
                    let path = self.at(name);
                    let file = regular::open(&path).map_err(failed("open", &path))?;
                    content_hash(file).map_err(failed("read", &path))?
                }
            };
            young |= known.is_none() && is_young;
            if known.is_none()
                && !is_young
                && let Some((folder, own)) = place
            {
                let start = || remembered.get(&folder).cloned().unwrap_or_default();
                let folder = anew.entry(folder.clone()).or_insert_with(start);
                folder
                    .0
                    .insert(own.to_owned(), (stamp.bytes(), *hash.as_bytes()));
            }
            let hex = hash.to_hex();
            // No path holds a NUL, and the numbers are text: no two lists write the same bytes.
            list.update(format!("{name}\0{}\0{hex}\n", stamp.size).as_bytes());
            single = hex.to_string();
        }
        // Files that are gone are forgotten with the next ones that are new.
        for (folder, files) in &mut anew {
            let here = |own: &String| {
                let name = self.inside(folder, own);
                self.files
                    .binary_search_by(|known| (*known.name).cmp(&*name))
                    .is_ok()
            };
            files.0.retain(|own, _| here(own));
        }
        let snapshot = FileSnapshot {
            hash: match self.kind {
                FileKind::File => single,
                FileKind::Dir | FileKind::Images | FileKind::Weights => {
                    list.finalize().to_hex().to_string()
                }
            },
            traces: self.traces.clone(),
            young,
        };
        Ok((snapshot, anew))
    }

    /// The name that a remembered file would have here.
    fn inside(&self, folder: &str, own: &str) -> String {
        let inner = Path::new(folder)
            .strip_prefix(&self.path)
            .unwrap_or(Path::new(""));
        match inner.to_str() {
            Some("") | None => own.to_owned(),
            Some(inner) => format!("{inner}/{own}"),
        }
    }

    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        self.files.iter().map(|file| file.stamp.size).sum()
    }

    /// Whether nothing has been written since the snapshot. A file with other permissions, or with another hard link,
    /// is unchanged; one that was written is not, even with equal content again: a reader may have seen other content.
    pub fn is_as(&self, snapshot: &FileSnapshot) -> bool {
        let (now, then) = (&self.traces, &snapshot.traces);
        now.content == then.content && (now.changes == then.changes || now.rights != then.rights)
    }

    /// The file that was changed last, to be named where something has changed.
    pub fn newest(&self) -> PathBuf {
        let newest = self.files.iter().max_by_key(|file| file.stamp.changed);
        match newest {
            Some(file) => self.at(&file.name),
            None => self.path.clone(),
        }
    }
}

impl FileSnapshot {
    /// Whether a file was written so shortly before that another writing may have left no trace.
    pub fn is_young(&self) -> bool {
        self.young
    }
}

impl Folder {
    /// As bytes for the store.
    pub fn pack(&self) -> Vec<u8> {
        let mut bytes = vec![PACKED];
        for (name, (stamp, hash)) in &self.0 {
            // Names of files are shorter than 64 KiB everywhere.
            let length = u16::try_from(name.len()).unwrap_or(u16::MAX);
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(&name.as_bytes()[..length.into()]);
            bytes.extend_from_slice(stamp);
            bytes.extend_from_slice(hash);
        }
        bytes
    }

    /// What [`Folder::pack`] wrote; nothing where it is something else: then it is hashed anew.
    pub fn unpack(bytes: &[u8]) -> Self {
        let read = || {
            let mut rest = bytes.strip_prefix(&[PACKED])?;
            let mut files = BTreeMap::new();
            while !rest.is_empty() {
                let (length, after) = rest.split_first_chunk::<2>()?;
                let (name, after) = after.split_at_checked(u16::from_le_bytes(*length).into())?;
                let (stamp, after) = after.split_first_chunk::<56>()?;
                let (hash, after) = after.split_first_chunk::<32>()?;
                files.insert(std::str::from_utf8(name).ok()?.to_owned(), (*stamp, *hash));
                rest = after;
            }
            Some(files)
        };
        Self(read().unwrap_or_default())
    }
}

/// BLAKE3 of an open file's bytes.
///
/// # Errors
/// It cannot be read.
pub fn content_hash(file: File) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok(hasher.finalize())
}

/// A file found in a walk through folders.
#[derive(Debug)]
struct ListedFile {
    name: Box<str>,
    stamp: FileStamp,
    /// Owner, rights, and number of names.
    owner: [u8; 24],
}

/// A way through folders.
struct Walk {
    path: PathBuf,
    files: Vec<ListedFile>,
    /// How many more files may come.
    room: usize,
    most: usize,
    /// The folders that lead to this one.
    above: Vec<(u64, u64)>,
    linked: usize,
    /// Whether files that no loader of images reads are passed over.
    only_images: bool,
    /// What all files that are to be read take, and the one of which most is missing.
    extent: Extent,
    hollow: Option<(PathBuf, Extent)>,
}

impl Walk {
    fn new(path: &Path, most: usize) -> Self {
        Self {
            path: path.to_owned(),
            files: Vec::new(),
            room: most,
            most,
            above: Vec::new(),
            linked: 0,
            only_images: false,
            extent: Extent::default(),
            hollow: None,
        }
    }

    fn file(&mut self, path: &Path, name: String, found: &Metadata) -> Result<(), InputError> {
        if !found.is_file() {
            let kind = regular::kind(found.file_type());
            return Err(InputError::Kind {
                path: path.to_owned(),
                kind,
            });
        }
        let mut owner = [0; 24];
        owner[..4].copy_from_slice(&found.mode().to_le_bytes());
        owner[4..8].copy_from_slice(&found.uid().to_le_bytes());
        owner[8..12].copy_from_slice(&found.gid().to_le_bytes());
        owner[16..].copy_from_slice(&found.nlink().to_le_bytes());
        if !(self.only_images && images::is_too_long(&name, found.size())) {
            let extent = Extent::of(found);
            self.extent = self.extent.and(extent);
            let most = self.hollow.as_ref().map_or(0, |(_, most)| most.missing());
            if extent.missing() > most {
                self.hollow = Some((path.to_owned(), extent));
            }
        }
        self.files.push(ListedFile {
            name: name.into(),
            stamp: FileStamp::of(found),
            owner,
        });
        Ok(())
    }

    /// Refuses files that would take far longer to read than what is on the disk explains.
    fn expect_content(&self) -> Result<(), InputError> {
        match &self.hollow {
            Some((path, extent))
                if self.extent.is_hollow()
                    && regular::has_hole(path).map_err(failed("open", path))? =>
            {
                Err(InputError::Hollow {
                    path: path.clone(),
                    extent: *extent,
                })
            }
            _ => Ok(()),
        }
    }

    fn folder(&mut self, dir: &Path, inner: &str) -> Result<(), InputError> {
        let found = fs::metadata(dir).map_err(failed("read", dir))?;
        let place = (found.dev(), found.ino());
        if self.above.contains(&place) || self.above.len() >= DEEPEST {
            return Err(InputError::Loop {
                path: dir.to_owned(),
            });
        }
        self.above.push(place);
        for entry in fs::read_dir(dir).map_err(failed("read", dir))? {
            let entry = entry.map_err(failed("read", dir))?;
            let path = entry.path();
            let Ok(own) = entry.file_name().into_string() else {
                return Err(InputError::Name { path });
            };
            if is_hidden(&own) {
                continue;
            }
            let is_link = entry
                .file_type()
                .map_err(failed("read", &path))?
                .is_symlink();
            let found = fs::metadata(&path).map_err(|source| match source.kind() {
                io::ErrorKind::NotFound if is_link => InputError::Broken {
                    target: fs::read_link(&path).unwrap_or_default(),
                    path: path.clone(),
                },
                // ELOOP, which std has no stable name for.
                _ if source.raw_os_error() == Some(libc::ELOOP) => {
                    InputError::Loop { path: path.clone() }
                }
                _ => failed("read", &path)(source),
            })?;
            let name = match inner {
                "" => own,
                inner => format!("{inner}/{own}"),
            };
            if !found.is_dir() {
                // Those that are no images too: they are looked at.
                self.room = self.room.checked_sub(1).ok_or_else(|| InputError::Many {
                    path: self.path.clone(),
                    most: self.most,
                })?;
                let counts = !self.only_images
                    || !found.is_file()
                    || images::is_data(&path, &name).map_err(failed("read", &path))?;
                if counts {
                    self.file(&path, name, &found)?;
                }
                continue;
            }
            self.linked += usize::from(is_link);
            if self.linked > MOST_LINKED {
                return Err(InputError::Loop { path });
            }
            self.folder(&path, &name)?;
        }
        self.above.pop();
        Ok(())
    }
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> InputError {
    let path = path.to_owned();
    move |source| InputError::Io {
        action,
        path: path.clone(),
        source,
    }
}
