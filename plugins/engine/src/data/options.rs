//! Where images come from and how they are resized, as in recipes.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::resample::{Filter, Fit};
use crate::size::Size;

/// Images that a stage reads: the `images` stage that prepared them, or where they come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Data {
    /// The `images` stage that prepared them.
    Stage(#[schemars(extend("x-retort-artifact" = ["images"]))] String),
    /// Their source. Stages with the same source share one `images` stage; a stage alone holds the images in memory or, where
    /// they are many, in its work directory.
    Source(Box<DataOptions>),
}

/// Where images come from: one of `folder`, `tar`, `parquet`, `arrays`, `csv` and `images`; and how they are resized.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataOptions {
    /// Folder of PNG, JPEG, WebP, GIF, BMP or TIFF files, told apart by content. Each folder in it is a class; without
    /// folders all images are of one class. With a file `metadata.jsonl` or `metadata.csv` (`file_name`, `label` or
    /// `caption`) that file says what belongs to it. With `.tar` files alone, or `.parquet` files, these are read one after
    /// the other. Folders named 0, 1, 2, ... give those classes; other names give classes in alphabetical order. Links are
    /// followed; hidden files and those of no known format are left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-file" = "images"))]
    pub folder: Option<String>,
    /// CSV or TSV file of paths within `folder` and classes, or `.jsonl`: in place of `metadata.csv`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-file" = "file"))]
    pub table: Option<String>,
    /// Tar archive of image files: the class is the folder within the archive, or what stands in a file of the same name
    /// that ends in `.cls` or `.json` (WebDataset).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-file" = "file"))]
    pub tar: Option<String>,
    /// Parquet file of image files, as Hugging Face has data sets: a column `image` of bytes, or of a structure with `bytes`;
    /// one of classes (`label`), numbers or texts; one of captions (`text`, `caption`). Several files in a folder: `folder`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-file" = "file"))]
    pub parquet: Option<String>,
    /// NumPy archive (`.npz`) of images and their labels, or array (`.npy`) of images: (n, height, width) or with one or
    /// three channels first or last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-file" = "file"))]
    pub arrays: Option<String>,
    /// NumPy array (`.npy`) of the labels of `arrays`, where they are not in the archive.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-file" = "file"))]
    pub labels: Option<String>,
    /// CSV file, one image a line: grey values row by row and the class (0, 1, 2, ...).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-file" = "file"))]
    pub csv: Option<String>,
    /// The `images` stage that prepared them, to be cropped or flipped here.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-retort-artifact" = ["images"]))]
    pub images: Option<String>,
    /// Height of the images of a CSV file, in pixels; taken from the number of columns when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub height: Option<usize>,
    /// Width of the images of a CSV file, in pixels; taken from the number of columns when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub width: Option<usize>,
    /// Value of white in a CSV file (16 for the UCI digits) or in arrays that do not hold bytes; in a CSV file the largest
    /// value when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub max: Option<f32>,
    /// Whether the first line of a CSV file holds column names.
    pub header: bool,
    /// Column of the class. In a CSV file: `first`, `last` or its name in the first line; `last`, if left out. In Parquet
    /// files: its name; `label`, `class` or the like, if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The size of images: the side of a square or [height, width]; if left out, all must have one size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// How images of other proportions are fitted.
    pub fit: Fit,
    /// The resampling filter.
    pub filter: Filter,
    /// 1 (grey) or 3 (RGB); left out, grey where all images are grey, else RGB.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = [1, 3]))]
    pub channels: Option<usize>,
    /// The colour behind transparent pixels and around images that are too small.
    pub background: Background,
    /// Whether damaged files are left out, counted and recorded, instead of ending the stage.
    pub skip_damaged: bool,
    /// Side or [height, width] that is cut out of each image once it has its size: anywhere in training, where a new place
    /// is drawn every epoch, in the middle elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<Size>,
    /// Whether training sees every other image mirrored, drawn anew every epoch.
    pub flip: bool,
}

/// How images were brought to their size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizing {
    /// The size.
    pub size: Size,
    /// How other proportions were fitted.
    pub fit: Fit,
    /// The resampling filter.
    pub filter: Filter,
}

impl fmt::Display for Sizing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (height, width) = self.size.sides();
        let fit = self.fit.name();
        write!(f, "brought to {height} x {width} by `fit: {fit}`")?;
        match self.fit {
            // It has its own filters.
            Fit::Adm => Ok(()),
            _ => write!(f, " and `filter: {}`", self.filter.name()),
        }
    }
}

/// A colour behind images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Background {
    /// By name.
    Name(BackgroundName),
    /// Red, green and blue, 0 to 255.
    Colour([u8; 3]),
}

/// A named background.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BackgroundName {
    /// 255, 255, 255.
    White,
    /// 128, 128, 128.
    Grey,
    /// 0, 0, 0.
    Black,
}

impl Default for Background {
    fn default() -> Self {
        Self::Name(BackgroundName::White)
    }
}

impl Background {
    /// Red, green and blue.
    pub fn colour(self) -> [u8; 3] {
        match self {
            Self::Colour(colour) => colour,
            Self::Name(BackgroundName::White) => [255; 3],
            Self::Name(BackgroundName::Grey) => [128; 3],
            Self::Name(BackgroundName::Black) => [0; 3],
        }
    }
}

impl From<DataOptions> for Data {
    fn from(options: DataOptions) -> Self {
        Self::Source(Box::new(options))
    }
}

impl Data {
    /// The mark of an option that holds it, for the runner: an `images` stage can prepare a source of image files for several
    /// stages, each of which augments the images for itself.
    pub fn prepared_by() -> serde_json::Value {
        serde_json::json!({
            "kind": "images", "sources": ["folder", "tar", "parquet"], "own": ["crop", "flip"],
        })
    }

    /// Checks what can be checked without touching a file.
    pub fn check(&self) -> Result<(), DataError> {
        match self {
            Self::Stage(_) => Ok(()),
            Self::Source(options) => options.check(),
        }
    }

    /// As [`Data::check`], for a stage that does not train on the images: options that vary by epoch make no sense there.
    pub fn check_fixed(&self) -> Result<(), DataError> {
        match self {
            Self::Source(options) if options.flip => {
                let message =
                    "data: `flip` is for training; this stage does not train on the images";
                Err(DataError::Options(message.into()))
            }
            _ => self.check(),
        }
    }
}

impl DataOptions {
    /// How images are brought to their size, if they are.
    pub fn sizing(&self) -> Option<Sizing> {
        let (fit, filter) = (self.fit, self.filter);
        self.size.map(|size| Sizing { size, fit, filter })
    }

    /// Checks what can be checked without touching a file.
    pub fn check(&self) -> Result<(), DataError> {
        let fault = |message: String| Err(DataError::Options(format!("data: {message}")));
        let sources = [
            ("folder", self.folder.is_some()),
            ("tar", self.tar.is_some()),
            ("parquet", self.parquet.is_some()),
            ("arrays", self.arrays.is_some()),
            ("csv", self.csv.is_some()),
            ("images", self.images.is_some()),
        ];
        let given: Vec<&str> = sources.iter().filter(|s| s.1).map(|s| s.0).collect();
        let source = match given[..] {
            [source] => source,
            [] => {
                let message = "say where the images are: `folder: DIR`, `tar: FILE`, `parquet: FILE`, `arrays: FILE` or \
                               `csv: FILE`";
                return fault(message.into());
            }
            _ => {
                return fault(format!(
                    "`{}` exclude each other; keep one",
                    given.join("` and `")
                ));
            }
        };
        // The source that an option belongs to, so that none is silently ignored.
        let belongs = [
            ("height", self.height.is_some(), &["csv"][..]),
            ("width", self.width.is_some(), &["csv"]),
            ("max", self.max.is_some(), &["csv", "arrays"]),
            ("header", self.header, &["csv"]),
            ("label", self.label.is_some(), &["csv", "parquet", "folder"]),
            ("labels", self.labels.is_some(), &["arrays"]),
            ("table", self.table.is_some(), &["folder"]),
            (
                "skip_damaged",
                self.skip_damaged,
                &["folder", "tar", "parquet"],
            ),
        ];
        for (option, given, of) in belongs {
            if given && !of.contains(&source) {
                return fault(format!(
                    "`{option}` belongs to `{}`, not to `{source}`",
                    of.join("` or `")
                ));
            }
        }
        if source == "images" {
            let changed = self.size.is_some()
                || self.channels.is_some()
                || self.fit != Fit::default()
                || self.filter != Filter::default()
                || self.background != Background::default();
            if changed {
                let message = "images of an `images` stage have their size, channels and background: change them there";
                return fault(message.into());
            }
        }
        if self.max.is_some_and(|max| !(max.is_finite() && max > 0.0)) {
            return fault("`max` must be a number above 0".into());
        }
        for (option, sides) in [
            ("height", self.height),
            ("width", self.width),
            ("size", self.size.map(|s| s.sides().0.min(s.sides().1))),
            ("crop", self.crop.map(|s| s.sides().0.min(s.sides().1))),
        ] {
            if sides == Some(0) {
                return fault(format!("`{option}` must be at least 1"));
            }
        }
        if self
            .channels
            .is_some_and(|channels| !matches!(channels, 1 | 3))
        {
            return fault("`channels` is 1 (grey) or 3 (RGB)".into());
        }
        if let (Some(size), Some(crop)) = (self.size, self.crop) {
            let ((h, w), (ch, cw)) = (size.sides(), crop.sides());
            if ch > h || cw > w {
                return fault(format!(
                    "`crop` {ch} x {cw} is larger than `size` {h} x {w}"
                ));
            }
        }
        match self.size.map(Size::sides) {
            Some((h, w)) if h > 8192 || w > 8192 => {
                fault(format!("`size` {h} x {w}: sides go up to 8192"))
            }
            Some((h, w)) if self.fit == Fit::Adm && h != w => {
                fault(format!("`fit: adm` makes squares, `size` is {h} x {w}"))
            }
            None if self.fit != Fit::default() => fault("`fit` needs a `size`".into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sizing_is_said_as_options_say_it() {
        let said = |options: DataOptions| options.sizing().map(|sizing| sizing.to_string());
        let of = |size, fit, filter| DataOptions {
            size,
            fit,
            filter,
            ..DataOptions::default()
        };
        assert_eq!(said(of(None, Fit::Cover, Filter::Bicubic)), None);
        let wide = of(Some(Size::Sides([24, 32])), Fit::Contain, Filter::Lanczos);
        let expected = "brought to 24 x 32 by `fit: contain` and `filter: lanczos`";
        assert_eq!(said(wide).as_deref(), Some(expected));
        let adm = of(Some(Size::Side(256)), Fit::Adm, Filter::Bicubic);
        let expected = "brought to 256 x 256 by `fit: adm`";
        assert_eq!(said(adm).as_deref(), Some(expected));
        // The names are those in recipes.
        for fit in [Fit::Cover, Fit::Contain, Fit::Stretch, Fit::Adm] {
            assert_eq!(serde_json::json!(fit), fit.name());
        }
        for filter in [
            Filter::Box,
            Filter::Bilinear,
            Filter::Bicubic,
            Filter::Lanczos,
        ] {
            assert_eq!(serde_json::json!(filter), filter.name());
        }
    }
}
