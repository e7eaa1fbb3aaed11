//! An image of a source: what it is called and shows, and where its bytes are.

use retort_checkpoint::tar::FileRange;

/// An image of a source.
#[derive(Debug)]
pub(super) struct Item {
    /// Path within the folder or archive.
    pub(super) name: Box<str>,
    pub(super) label: u32,
    pub(super) caption: Option<Box<str>>,
    pub(super) place: Place,
}

/// Where the bytes of an item are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In a file of its own.
    File,
    /// In the archive of a number.
    Archive(u32, FileRange),
    /// In a row of the table of a number.
    Row(u32, u64),
}

impl Item {
    /// The label of a file whose class is not known yet.
    pub(super) const UNLABELLED: u32 = u32::MAX;
}
