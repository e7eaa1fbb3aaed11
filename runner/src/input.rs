//! Files and folders named by a stage's options: their content, and detection of changes while it is in use.
//!
//! In: a path and whether it is a file or a folder. Out: a [`FileSnapshot`]: a hash of the content, as for an artifact, and
//! every file's metadata, with which a later check detects changes. Links are followed. Names that begin with a dot, and
//! files of file managers ([`is_hidden`]), are not data: they are ignored, and no loader reads them. In a folder of images,
//! files that are neither images nor tables are ignored too. Hashes are cached ([`Folder`]), and files are not read again
//! while the file system reports no change. Deliberately absent: the cache's storage (in the store), and the meaning of
//! files.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use retort_checkpoint::images::{self, MOST_FILES, MOST_FOLDERS, is_hidden};
use retort_checkpoint::regular::{self, Extent};
use retort_checkpoint::sharded_weights::ShardPlace;
use serde::{Deserialize, Serialize};

/// A file written less than this before a check could be rewritten undetected: file systems store times with a resolution of
/// up to two seconds.
const CLOCK_STEP: i128 = 2_000_000_000;
/// Maximum visits of folders that were visited before: links can multiply them.
const MOST_AGAIN: usize = 1 << 14;
/// Maximum nesting of links.
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
    /// A directory, with only the files that an image loader reads.
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
    /// A folder inside itself through a link, or endless links.
    #[error(
        "{} is in a cycle of links, or the last of {MOST_AGAIN} folders that links lead to again; remove the links",
        path.display()
    )]
    LinkCycle {
        /// Where that was noticed.
        path: PathBuf,
    },
    /// A network's weights in several files, some of which are missing.
    #[error("{}: {message}", path.display())]
    Weights {
        /// What the option names.
        path: PathBuf,
        /// Why they are none.
        message: String,
    },
    /// A mostly sparse file.
    #[error("{}", mostly_holes(path, *extent))]
    Sparse {
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
    TooManyFiles {
        /// The folder.
        path: PathBuf,
        /// The limit.
        most: usize,
    },
    /// Too many folders.
    #[error(
        "{} holds more than {MOST_FOLDERS} folders, links followed; put the files into tar archives (`tar:`), or into fewer \
         folders",
        path.display()
    )]
    TooManyFolders {
        /// The folder.
        path: PathBuf,
    },
    /// A name that a digest cannot represent.
    #[error("the name of {} is not UTF-8", path.display())]
    Name {
        /// The entry.
        path: PathBuf,
    },
}

impl InputError {
    /// Reading it would take far too long.
    pub fn interrupted(
        path: &Path,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        failed("look at", path)(io::Error::other(error))
    }
}

/// The metadata of a file that changes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Nanoseconds since 1970.
    modified: i64,
    /// The time of its last change of any kind (ctime), which nobody can set.
    changed: i64,
}

impl FileStamp {
    /// From a file's metadata.
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

    /// Whether the file could be written after `now` without a visible change. Only the time of the last change tells: anybody
    /// can set the other, even to a time in the future.
    fn is_young(&self, now: i128) -> bool {
        now - i128::from(self.changed) < CLOCK_STEP
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

/// The files behind a path at one time.
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

/// The compared aspects of two listings.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ListingHashes {
    /// Names, locations, sizes and modification times.
    content: blake3::Hash,
    /// Owners, permissions, and link counts.
    rights: blake3::Hash,
    /// Times of changes of any kind.
    changes: blake3::Hash,
}

/// The content of a file or folder at one time.
#[derive(Debug, Clone)]
pub struct FileSnapshot {
    /// Hex BLAKE3 of a file; of a folder, of the list of its files.
    pub hash: String,
    traces: ListingHashes,
    /// Whether something may have been written since then undetected.
    young: bool,
}

/// The cached hashes of one folder's files, or of a single file, in order of names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folder(BTreeMap<String, ([u8; 56], [u8; 32])>);

impl Listing {
    /// Lists a file or everything in a folder without reading content.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn of(path: &Path, kind: FileKind) -> Result<Self, InputError> {
        Self::of_few(path, kind, MOST_FILES)
    }

    /// The same with a limit on the number of files.
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

    /// The cache keys of the files: the folders that contain them, or the file itself. Names that the store cannot represent
    /// are left out.
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

    /// The path of a file with this name.
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

    /// Hashes the files without a valid cached hash. Returns the snapshot, and new cache entries.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn hashed(
        &self,
        remembered: &BTreeMap<String, Folder>,
    ) -> Result<(FileSnapshot, BTreeMap<String, Folder>), InputError> {
        self.hashed_while(&|| true, remembered)
    }

    /// The same, for as long as the hashes are wanted.
    ///
    /// # Errors
    /// [`InputError`], also if they are not wanted any more.
    pub fn hashed_while(
        &self,
        is_wanted: &dyn Fn() -> bool,
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
                // Its content affects nothing, and reading it would take long.
                None if self.kind == FileKind::Images && images::is_too_long(name, stamp.size) => {
                    blake3::hash(b"")
                }
                None => {
                    let path = self.at(name);
                    let file = regular::open(&path).map_err(failed("open", &path))?;
                    content_hash_while(is_wanted, file).map_err(failed("read", &path))?
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
            // Paths contain no NUL, and the numbers are text, so different lists give different bytes.
            list.update(format!("{name}\0{}\0{hex}\n", stamp.size).as_bytes());
            single = hex.to_string();
        }
        // Missing files are dropped from the cache when new ones are added.
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

    /// The name of a cached file in this listing.
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

    /// Whether nothing has been written since the snapshot. A file with different permissions or another hard link counts as
    /// unchanged. A file that was written counts as changed, even if its content is equal again: a reader may have seen other
    /// content.
    pub fn is_as(&self, snapshot: &FileSnapshot) -> bool {
        let (now, then) = (&self.traces, &snapshot.traces);
        now.content == then.content && (now.changes == then.changes || now.rights != then.rights)
    }

    /// The most recently changed file, to be named in a message.
    pub fn newest(&self) -> PathBuf {
        let newest = self.files.iter().max_by_key(|file| file.stamp.changed);
        match newest {
            Some(file) => self.at(&file.name),
            None => self.path.clone(),
        }
    }
}

impl FileSnapshot {
    /// Whether a file was written so recently that another write could go undetected.
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

    /// Reads the output of [`Folder::pack`]; None for anything else, which is then hashed again.
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

/// A reader that fails as soon as its content is not wanted any more.
struct WhileWanted<'w, R> {
    is_wanted: &'w dyn Fn() -> bool,
    reader: R,
}

impl<R: Read> Read for WhileWanted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match (self.is_wanted)() {
            true => self.reader.read(buffer),
            false => Err(io::Error::other("nobody waits for its hash any more")),
        }
    }
}

/// BLAKE3 of an open file's bytes.
///
/// # Errors
/// It cannot be read, or is longer than reported: some files are endless.
pub fn content_hash(file: File) -> io::Result<blake3::Hash> {
    content_hash_while(&|| true, file)
}

fn content_hash_while(is_wanted: &dyn Fn() -> bool, file: File) -> io::Result<blake3::Hash> {
    let length = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    let reader = file.take(length.saturating_add(1));
    hasher.update_reader(WhileWanted { is_wanted, reader })?;
    if hasher.count() > length {
        let message = format!(
            "it has more than the {length} bytes that it is said to have; does another program write it?"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(hasher.finalize())
}

/// A file found while walking folders.
#[derive(Debug)]
struct ListedFile {
    name: Box<str>,
    stamp: FileStamp,
    /// Owner, permissions, and link count.
    owner: [u8; 24],
}

/// A way through folders.
struct Walk {
    path: PathBuf,
    files: Vec<ListedFile>,
    /// Remaining number of allowed files.
    room: usize,
    most: usize,
    /// The parent folders of this one.
    above: Vec<(u64, u64)>,
    /// All folders, and visits of those that were visited before.
    seen: HashSet<(u64, u64)>,
    again: usize,
    /// Whether to skip files that no image loader reads.
    only_images: bool,
    /// The extent of all files to read, and the sparsest one.
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
            seen: HashSet::new(),
            again: 0,
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

    /// Refuses files that would take far longer to read than their space on the disk explains.
    fn expect_content(&self) -> Result<(), InputError> {
        match &self.hollow {
            Some((path, extent))
                if self.extent.is_hollow()
                    && regular::has_hole(path).map_err(failed("open", path))? =>
            {
                Err(InputError::Sparse {
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
            return Err(InputError::LinkCycle {
                path: dir.to_owned(),
            });
        }
        self.above.push(place);
        self.again += usize::from(!self.seen.insert(place));
        if self.again >= MOST_AGAIN {
            return Err(InputError::LinkCycle {
                path: dir.to_owned(),
            });
        }
        if self.seen.len() > MOST_FOLDERS {
            return Err(InputError::TooManyFolders {
                path: self.path.clone(),
            });
        }
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
                // ELOOP, which has no stable name in std.
                _ if source.raw_os_error() == Some(libc::ELOOP) => {
                    InputError::LinkCycle { path: path.clone() }
                }
                _ => failed("read", &path)(source),
            })?;
            let name = match inner {
                "" => own,
                inner => format!("{inner}/{own}"),
            };
            if !found.is_dir() {
                // Non-images too, because they are examined.
                self.room = self
                    .room
                    .checked_sub(1)
                    .ok_or_else(|| InputError::TooManyFiles {
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
