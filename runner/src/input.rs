//! Files and folders that a stage's options name: their content, and whether it changes while it is used.
//!
//! In: a path and whether it is a file or a folder. Out: a [`Snapshot`]: a hash of the content, as of an artifact, and
//! what the file system says of every file, by which a later look tells whether anything was written. Links are followed.
//! Names that begin with a dot, and the leavings of file managers ([`is_hidden`]), are no data: they count for nothing, and
//! no loader reads them; nor is, in a folder of images, what is neither an image nor a list of them. What has been hashed is remembered ([`Folder`]) and not read again while the file system says
//! that it is as it was. Deliberately absent: where that is remembered (the store), and what files mean.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use retort_checkpoint::images::{self, is_hidden};
use retort_checkpoint::regular::{self, Extent};
use retort_checkpoint::shards::Place;

use crate::plan::FileKind;

/// A file that was written less than this before it was looked at may be written again without a trace: file systems
/// tell times in steps of up to two seconds.
const CLOCK_STEP: i128 = 2_000_000_000;
/// Folders reached by links, at most: links that lead to the same folders again and again would never end.
const MOST_LINKED: usize = 100_000;
/// Links within links within a folder, at most.
const DEEPEST: usize = 128;
/// Version of [`Folder`]'s bytes.
const PACKED: u8 = 1;

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
    #[error("{} leads round in a circle of links, or to {MOST_LINKED} folders and more", path.display())]
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
    /// A file most of which is on no disk.
    #[error(
        "{} is {length} bytes long and mostly holes: {missing} bytes of it are not on the disk. An unfinished download or copy? \
         Fetch it again; if it is meant to be so, fill the holes: `cp --sparse=never`",
        path.display()
    )]
    Hollow {
        /// The file.
        path: PathBuf,
        /// How long it is.
        length: u64,
        /// How much of that is not on the disk.
        missing: u64,
    },
    /// A name that a digest cannot hold.
    #[error("the name of {} is not UTF-8", path.display())]
    Name {
        /// The entry.
        path: PathBuf,
    },
}

impl InputError {
    /// Nobody could wait for the look at it.
    pub fn interrupted(
        path: &Path,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        failed("look at", path)(io::Error::other(error))
    }
}

/// What the file system says of a file, as far as it changes when the file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Nanoseconds since 1970.
    modified: i128,
    /// When anything about it was changed, which nobody can set.
    changed: i128,
}

impl Stamp {
    /// Of a file that was looked at.
    pub fn of(found: &Metadata) -> Self {
        let nanoseconds =
            |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
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
        now - self.modified.max(self.changed) < CLOCK_STEP
    }

    fn bytes(&self) -> [u8; 56] {
        let mut bytes = [0; 56];
        bytes[..8].copy_from_slice(&self.device.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.inode.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.modified.to_le_bytes());
        bytes[40..].copy_from_slice(&self.changed.to_le_bytes());
        bytes
    }
}

/// The files that a path stands for, as they are at a moment.
#[derive(Debug)]
pub struct Listing {
    path: PathBuf,
    kind: FileKind,
    /// Sorted by name, which is relative to `path`; that of a file itself is empty.
    files: Vec<(String, Stamp)>,
    traces: Traces,
    /// When it was made.
    now: i128,
}

/// What is compared of two listings.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Traces {
    /// Names, places, sizes and times of writing.
    content: blake3::Hash,
    /// Owners, rights, and numbers of names.
    rights: blake3::Hash,
    /// Times of changes of any kind.
    changes: blake3::Hash,
}

/// The content of a file or folder at a moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Hex BLAKE3 of a file; of a folder, of the list of its files.
    pub hash: String,
    traces: Traces,
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
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now = i128::try_from(now.as_nanos()).unwrap_or(i128::MAX);
        let (mut walk, mut base) = (Walk::default(), None);
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
                let files = Place::find(path).map(|place| place.files());
                let files = files.map_err(|error| InputError::Weights {
                    path: path.to_owned(),
                    message: error.to_string(),
                })?;
                if let [only] = files.as_slice() {
                    return Self::of(only, FileKind::File);
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
        walk.files.sort_by(|a, b| a.0.cmp(&b.0));
        let mut content = blake3::Hasher::new();
        let mut rights = blake3::Hasher::new();
        let mut changes = blake3::Hasher::new();
        for (name, stamp, owner) in &walk.files {
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
            files: walk
                .files
                .into_iter()
                .map(|(name, stamp, _)| (name, stamp))
                .collect(),
            traces: Traces {
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
        for (name, _) in &self.files {
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
    ) -> Result<(Snapshot, BTreeMap<String, Folder>), InputError> {
        let mut anew: BTreeMap<String, Folder> = BTreeMap::new();
        let mut list = blake3::Hasher::new();
        let mut single = String::new();
        let mut young = false;
        for (name, stamp) in &self.files {
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
                    .binary_search_by(|(known, _)| known.as_str().cmp(&name))
                    .is_ok()
            };
            files.0.retain(|own, _| here(own));
        }
        let snapshot = Snapshot {
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
        self.files.iter().map(|(_, stamp)| stamp.size).sum()
    }

    /// Whether nothing has been written since the snapshot. A file whose rights were changed, or that got a further name,
    /// is as it was; one that was written is not, even if it now holds the same again: who knows what was read meanwhile.
    pub fn is_as(&self, snapshot: &Snapshot) -> bool {
        let (now, then) = (&self.traces, &snapshot.traces);
        now.content == then.content && (now.changes == then.changes || now.rights != then.rights)
    }

    /// The file that was changed last, to be named where something has changed.
    pub fn newest(&self) -> PathBuf {
        let newest = self.files.iter().max_by_key(|(_, stamp)| stamp.changed);
        match newest {
            Some((name, _)) => self.at(name),
            None => self.path.clone(),
        }
    }
}

impl Snapshot {
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

/// A way through folders.
#[derive(Default)]
struct Walk {
    /// Name, stamp, and owner and rights.
    files: Vec<(String, Stamp, [u8; 24])>,
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
        self.files.push((name, Stamp::of(found), owner));
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
                    length: extent.length(),
                    missing: extent.missing(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn filled(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn snapshot(path: &Path) -> Snapshot {
        let listing = Listing::of(path, FileKind::Dir).unwrap();
        listing.hashed(&BTreeMap::new()).unwrap().0
    }

    /// Makes a file's times old enough to be believed.
    fn age(path: &Path) {
        let hour_ago = SystemTime::now() - std::time::Duration::from_secs(3600);
        let file = fs::File::options().append(true).open(path).unwrap();
        file.set_modified(hour_ago).unwrap();
    }

    /// The same listing, looked at long after.
    fn later(mut listing: Listing) -> Listing {
        listing.now += 10 * CLOCK_STEP;
        listing
    }

    #[test]
    fn a_folder_is_hashed_as_an_artifact_would_be() {
        let root = filled(&[("x", "1"), ("d/y", "2")]);
        let contents = crate::artifact::contents(root.path()).unwrap();
        assert_eq!(snapshot(root.path()).hash, contents.hash);
    }

    #[test]
    fn links_count_as_what_they_lead_to() {
        let real = filled(&[("0/a.png", "1"), ("1/b.png", "2")]);
        let links = tempfile::tempdir().unwrap();
        fs::create_dir(links.path().join("0")).unwrap();
        symlink(real.path().join("0/a.png"), links.path().join("0/a.png")).unwrap();
        symlink(real.path().join("1"), links.path().join("1")).unwrap();
        assert_eq!(snapshot(links.path()).hash, snapshot(real.path()).hash);
        let top = links.path().join("top");
        symlink(real.path(), &top).unwrap();
        assert_eq!(snapshot(&top).hash, snapshot(real.path()).hash);
    }

    /// As the caches of Hugging Face: names lead to files that are called after their content.
    #[test]
    fn a_cache_of_published_files_is_what_it_leads_to() {
        let files = [
            ("config.json", "{}"),
            ("tokenizer.json", "[]"),
            ("model.safetensors", "weights"),
        ];
        let real = filled(&files);
        let cache = tempfile::tempdir().unwrap();
        let (blobs, revision) = (cache.path().join("blobs"), cache.path().join("snapshots/1"));
        fs::create_dir_all(&blobs).unwrap();
        fs::create_dir_all(&revision).unwrap();
        for (name, content) in files {
            let blob = blake3::hash(content.as_bytes()).to_hex().to_string();
            fs::write(blobs.join(&blob), content).unwrap();
            symlink(Path::new("../../blobs").join(&blob), revision.join(name)).unwrap();
        }
        let hash = |path: &Path, kind: FileKind| {
            let listing = Listing::of(path, kind).unwrap();
            listing.hashed(&BTreeMap::new()).unwrap().0.hash
        };
        for kind in [FileKind::Dir, FileKind::Weights] {
            let before = hash(&revision, kind);
            assert_eq!(before, hash(real.path(), kind), "{kind:?}");
            let weights = fs::read_link(revision.join("model.safetensors")).unwrap();
            let blob = revision.join(weights);
            fs::write(&blob, "other weights").unwrap();
            assert_ne!(hash(&revision, kind), before, "{kind:?}");
            fs::write(&blob, "weights").unwrap();
        }
    }

    #[test]
    fn what_is_too_long_for_an_image_is_not_read() {
        let root = filled(&[("0/a.png", ""), ("b.tar", "")]);
        let hash = || {
            let listing = Listing::of(root.path(), FileKind::Images).unwrap();
            listing.hashed(&BTreeMap::new()).unwrap().0.hash
        };
        let write = |name: &str, at: u64| {
            use std::os::unix::fs::FileExt;
            let file = fs::File::options().write(true).open(root.path().join(name));
            file.unwrap().write_at(b"x", at).unwrap();
        };
        write("0/a.png", images::LONGEST_FILE);
        let before = hash();
        write("0/a.png", 1 << 20);
        assert_eq!(hash(), before);
        write("0/a.png", images::LONGEST_FILE + 1);
        let longer = hash();
        assert_ne!(longer, before);
        // An archive has no such limit.
        write("b.tar", images::LONGEST_FILE);
        let before = hash();
        write("b.tar", 1 << 20);
        assert_ne!(hash(), before);
    }

    #[test]
    fn what_is_mostly_holes_is_named_and_not_read() {
        let root = filled(&[("0/a.png", "1"), ("b.tar", "1"), ("c", "1")]);
        let stretch = |name: &str, length: u64| {
            let file = fs::File::options().write(true).open(root.path().join(name));
            file.unwrap().set_len(length).unwrap();
        };
        let said = |kind| match Listing::of(root.path(), kind) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        // Nobody reads an image of this length.
        stretch("0/a.png", 60 << 30);
        assert_eq!(said(FileKind::Images), "");
        assert!(said(FileKind::Dir).contains("0/a.png is 64424509440 bytes long and mostly holes"));
        stretch("0/a.png", 1);
        stretch("b.tar", 60 << 30);
        assert!(said(FileKind::Images).contains("b.tar is 64424509440 bytes"));
        let of_itself = Listing::of(&root.path().join("b.tar"), FileKind::File);
        assert!(matches!(of_itself, Err(InputError::Hollow { .. })));
        // Many that are each not so long.
        stretch("b.tar", 600 << 20);
        assert_eq!(said(FileKind::Dir), "");
        stretch("c", 601 << 20);
        assert!(said(FileKind::Dir).contains("/c is "));
    }

    #[track_caller]
    fn refused(make: impl Fn(&Path), said: &[&str]) {
        let root = filled(&[("0/a.png", "1")]);
        make(root.path());
        let error = Listing::of(root.path(), FileKind::Dir)
            .unwrap_err()
            .to_string();
        for text in said {
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn circles_broken_links_and_pipes_are_named() {
        refused(
            |root| symlink(root, root.join("0/up")).unwrap(),
            &["0/up", "circle"],
        );
        refused(
            |root| symlink("self", root.join("self")).unwrap(),
            &["/self", "circle"],
        );
        refused(
            |root| symlink("none", root.join("0/x")).unwrap(),
            &["0/x", "link to none"],
        );
        let pipe = |root: &Path| {
            let made = std::process::Command::new("mkfifo")
                .arg(root.join("0/p.png"))
                .status();
            assert!(made.unwrap().success());
        };
        refused(pipe, &["0/p.png", "a named pipe"]);
        // Each folder links twice to the next: two to the power of forty ways.
        let ladder = |root: &Path| {
            for step in 0..40 {
                let (here, next) = (format!("s{step}"), format!("../s{}", step + 1));
                fs::create_dir_all(root.join(format!("s{}", step + 1))).unwrap();
                fs::create_dir_all(root.join(&here)).unwrap();
                symlink(&next, root.join(&here).join("a")).unwrap();
                symlink(&next, root.join(&here).join("b")).unwrap();
            }
        };
        refused(ladder, &["folders and more"]);
    }

    #[test]
    fn what_no_loader_reads_does_not_count() {
        let root = filled(&[("0/a.png", "1")]);
        let before = snapshot(root.path());
        for name in [
            ".DS_Store",
            "0/.a.png.swp",
            "0/Thumbs.db",
            "desktop.ini",
            ".git/config",
        ] {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        assert_eq!(snapshot(root.path()).hash, before.hash);
        assert!(
            Listing::of(root.path(), FileKind::Dir)
                .unwrap()
                .is_as(&before)
        );
        fs::write(root.path().join("0/b.png"), "x").unwrap();
        assert_ne!(snapshot(root.path()).hash, before.hash);
    }

    #[test]
    fn what_is_remembered_is_not_read_again() {
        let root = filled(&[("0/a", "1"), ("0/b", "2"), ("1/c", "3")]);
        let listing = || later(Listing::of(root.path(), FileKind::Dir).unwrap());
        let (first, remembered) = listing().hashed(&BTreeMap::new()).unwrap();
        assert_eq!(remembered.len(), 2, "{remembered:?}");
        assert_eq!(
            listing().folders(),
            remembered.keys().cloned().collect::<Vec<_>>()
        );
        let again: BTreeMap<_, _> = remembered
            .iter()
            .map(|(folder, files)| (folder.clone(), Folder::unpack(&files.pack())))
            .collect();
        assert_eq!(again, remembered);
        // A wrong hash in memory shows that the file is not read.
        let mut wrong = remembered.clone();
        for files in wrong.values_mut() {
            files.0.values_mut().for_each(|(_, hash)| hash[0] ^= 1);
        }
        let (trusting, anew) = listing().hashed(&wrong).unwrap();
        assert_ne!(trusting.hash, first.hash);
        assert!(anew.is_empty());
        // One file is another one now, one is gone: the others of its folder are still not read.
        fs::write(root.path().join("0/a"), "9").unwrap();
        let (_, anew) = listing().hashed(&remembered).unwrap();
        assert_eq!(anew.len(), 1);
        fs::remove_file(root.path().join("0/b")).unwrap();
        let (_, anew) = listing().hashed(&remembered).unwrap();
        assert_eq!(
            anew.values().next().unwrap().0.len(),
            1,
            "what is gone is forgotten"
        );
    }

    #[test]
    fn what_was_just_written_is_not_remembered() {
        let root = filled(&[("a", "1")]);
        let (fresh, anew) = Listing::of(root.path(), FileKind::Dir)
            .unwrap()
            .hashed(&BTreeMap::new())
            .unwrap();
        assert!(fresh.is_young() && anew.is_empty());
        // A time that was set back does not make it older: it was changed just now.
        age(&root.path().join("a"));
        let (fresh, anew) = Listing::of(root.path(), FileKind::Dir)
            .unwrap()
            .hashed(&BTreeMap::new())
            .unwrap();
        assert!(fresh.is_young() && anew.is_empty());
    }

    #[test]
    fn a_change_is_seen_even_when_it_was_taken_back() {
        let root = filled(&[("a", "1"), ("b", "2")]);
        let before = snapshot(root.path());
        let now = || Listing::of(root.path(), FileKind::Dir).unwrap();
        let a = root.path().join("a");
        let modified = fs::metadata(&a).unwrap().modified().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        fs::set_permissions(&a, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(now().is_as(&before), "rights are no content");
        fs::set_permissions(&a, fs::Permissions::from_mode(0o644)).unwrap();
        let before = snapshot(root.path());
        std::thread::sleep(std::time::Duration::from_millis(50));
        fs::write(&a, "9").unwrap();
        assert!(!now().is_as(&before));
        assert_eq!(now().newest(), a);
        fs::write(&a, "1").unwrap();
        let file = fs::File::options().append(true).open(&a).unwrap();
        file.set_modified(modified).unwrap();
        assert_eq!(snapshot(root.path()).hash, before.hash);
        assert!(!now().is_as(&before), "it looks as before, but was written");
    }

    #[test]
    fn other_bytes_are_no_memory() {
        let files = BTreeMap::from([("a".to_owned(), ([1; 56], [2; 32]))]);
        let packed = Folder(files).pack();
        for end in 0..packed.len() {
            assert!(end == 1 || Folder::unpack(&packed[..end]).0.is_empty());
        }
        assert_eq!(Folder::unpack(b"\xff\xff\xff").0.len(), 0);
    }
}
