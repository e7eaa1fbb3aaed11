//! Heights and widths, of images in pixels and of maps in tokens.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A size as written: one number for a square, or [height, width].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Size {
    /// The side of a square.
    Side(#[schemars(range(min = 1, max = 8192))] usize),
    /// Height and width.
    Sides(#[schemars(inner(range(min = 1, max = 8192)))] [usize; 2]),
}

impl Size {
    /// Height and width.
    pub fn sides(self) -> (usize, usize) {
        match self {
            Self::Side(side) => (side, side),
            Self::Sides([height, width]) => (height, width),
        }
    }
}

/// A height and a width. Files store it as a [`Size`], a square always as one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Size", into = "Size")]
pub struct Sides {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Sides {
    /// As many rows as columns.
    pub const fn square(side: usize) -> Self {
        Self {
            height: side,
            width: side,
        }
    }

    /// Pixels or tokens in it, saturating.
    pub const fn area(self) -> usize {
        self.height.saturating_mul(self.width)
    }

    /// Halved this many times, rounded down.
    pub fn halved(self, times: usize) -> Self {
        let halved = |side: usize| {
            let times = u32::try_from(times).unwrap_or(u32::MAX);
            side.checked_shr(times).unwrap_or(0)
        };
        Self {
            height: halved(self.height),
            width: halved(self.width),
        }
    }

    /// Whether both are multiples of a factor.
    pub const fn is_multiple_of(self, factor: usize) -> bool {
        self.height.is_multiple_of(factor) && self.width.is_multiple_of(factor)
    }
}

impl From<Size> for Sides {
    fn from(size: Size) -> Self {
        let (height, width) = size.sides();
        Self { height, width }
    }
}

impl From<Sides> for Size {
    fn from(sides: Sides) -> Self {
        match sides.height == sides.width {
            true => Self::Side(sides.height),
            false => Self::Sides([sides.height, sides.width]),
        }
    }
}

impl fmt::Display for Sides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {}", self.height, self.width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_square_is_one_number_in_a_file() {
        let written = |sides: Sides| serde_json::to_string(&sides).expect("JSON");
        let read = |text: &str| serde_json::from_str::<Sides>(text).expect("sides");
        assert_eq!(written(Sides::square(8)), "8");
        assert_eq!(read("8"), read("[8,8]"));
        let wide = read("[4,6]");
        assert_eq!((wide.height, wide.width, wide.area()), (4, 6, 24));
        assert_eq!(written(wide), "[4,6]");
        assert_eq!(wide.halved(1), read("[2,3]"));
        assert_eq!(wide.halved(200).area(), 0);
        assert!(serde_json::from_str::<Sides>("[4]").is_err());
        assert_eq!(Sides::square(usize::MAX).area(), usize::MAX);
    }
}
