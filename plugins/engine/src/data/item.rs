//! An image of a source: its name, class and caption, and the location of its bytes.

use retort_checkpoint::tar::FileRange;

/// An image of a source.
#[derive(Debug, Clone)]
pub(super) struct Item {
    /// Path within the folder or archive.
    pub(super) name: Box<str>,
    pub(super) label: u32,
    pub(super) caption: Option<Box<str>>,
    pub(super) location: ItemLocation,
}

/// Where the bytes of an item are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ItemLocation {
    /// In a file of its own.
    File,
    /// In the archive with a number.
    Archive(u32, FileRange),
    /// In a row of the table with a number.
    Row(u32, u64),
}

impl Item {
    /// The label of a file whose class is not known yet.
    pub(super) const UNLABELLED: u32 = u32::MAX;
}

/// Gets how many items of how many have been examined; returns whether to continue.
pub type Progress<'a> = dyn FnMut(u64, u64) -> bool + 'a;
