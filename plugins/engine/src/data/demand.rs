//! What decoding an image takes beside its pixels: the memory of a decoder, and the pieces it is made of.
//!
//! In: the content of an image file. Decoders take it on trust that an image is made as images are: one of a few
//! megabytes can make them hold its coefficients beside its pixels, or begin millions of strips anew.

use image::ImageFormat;

/// The most strips or tiles of a TIFF: ten times as many as an image of [`super::raster::MOST_PIXELS`] has rows.
const MOST_PIECES: u64 = 1 << 16;

/// Bytes that a decoder holds beside the pixels it gives. `content` may be the beginning of a file.
pub(super) fn beside(content: &[u8], format: ImageFormat, pixels: u64) -> u64 {
    match format {
        ImageFormat::Jpeg => coefficients(content).unwrap_or(0),
        ImageFormat::WebP => pixels.saturating_mul(planes(content)),
        _ => 0,
    }
}

/// Bytes of the coefficients of a progressive JPEG: two for each sample, and none is done before the last scan.
fn coefficients(content: &[u8]) -> Option<u64> {
    let mut at = 2;
    loop {
        let &[0xff, marker] = content.get(at..at + 2)? else {
            return None;
        };
        match marker {
            // Fill bytes.
            0xff => at += 1,
            0xc2 => break,
            // Another frame, or the first scan.
            0xc0 | 0xc1 | 0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf | 0xda => return None,
            0x01 | 0xd0..=0xd8 => at += 2,
            _ => at += 2 + usize::from(u16_be(content, at + 2)?),
        }
    }
    let (height, width) = (u16_be(content, at + 5)?, u16_be(content, at + 7)?);
    let count = usize::from(*content.get(at + 9)?);
    let components = content.get(at + 10..at + 10 + 3 * count)?;
    let factors = |place: usize| {
        let byte = components[place];
        (u64::from(byte >> 4), u64::from(byte & 15))
    };
    let places = (0..count).map(|number| 3 * number + 1);
    let most = places.clone().map(factors);
    let (across, down) = most.fold((1, 1), |(a, d), (x, y)| (a.max(x), d.max(y)));
    // Of whole blocks, as many as the coarsest component needs.
    let whole = |size: u16, most: u64| u64::from(size).div_ceil(8 * most) * 8;
    let (width, height) = (whole(width, across), whole(height, down));
    Some(
        places
            .map(factors)
            .map(|(x, y)| 2 * width * x * height * y)
            .sum(),
    )
}

/// Bytes that a pixel of a WebP takes beside what is given: planes of luma and chroma, colours without opacity, opacity
/// by itself, the canvas of an animation.
fn planes(content: &[u8]) -> u64 {
    const ANIMATED: u8 = 2;
    match (content.get(12..16), content.get(20)) {
        (Some(b"VP8 "), _) => 2,
        (Some(b"VP8L"), _) => 4,
        (_, Some(flags)) if flags & ANIMATED != 0 => 15,
        _ => 7,
    }
}

/// That the first image of a TIFF has not more pieces than images have, nor pieces that share their bytes: each is
/// unpacked by itself.
pub(super) fn check_pieces(content: &[u8]) -> Result<(), String> {
    match pieces(content) {
        Some((count, _)) if count > MOST_PIECES => Err(format!(
            "an image in {count} strips or tiles: more than {MOST_PIECES} are not decoded"
        )),
        Some((_, bytes)) if bytes > content.len() as u64 => Err(format!(
            "an image whose strips or tiles take {bytes} bytes, in a file of {}",
            content.len()
        )),
        _ => Ok(()),
    }
}

/// How many strips or tiles the first image of a TIFF has, and of how many bytes in all. Nothing, where that cannot be
/// read: then the decoder cannot read it either.
fn pieces(content: &[u8]) -> Option<(u64, u64)> {
    const COUNTS: [u64; 2] = [279, 325];
    const PLACES: [u64; 2] = [273, 324];
    let tiff = Tiff {
        content,
        little: content.starts_with(b"II"),
    };
    let large = tiff.number(2, 2)? == 43;
    // Where the directory is named, how its entries are counted, and the size of an entry and of its numbers.
    let (first, counted, entry, word) = if large { (8, 8, 20, 8) } else { (4, 2, 12, 4) };
    let at = tiff.number(first, word)?;
    let (mut most, mut bytes) = (0, 0_u64);
    for number in 0..tiff.number(at, counted)?.min(1 << 16) {
        let at = at.checked_add(counted + number * entry)?;
        let (tag, kind) = (tiff.number(at, 2)?, tiff.number(at + 2, 2)?);
        let count = tiff.number(at + 4, word)?;
        if !PLACES.contains(&tag) && !COUNTS.contains(&tag) {
            continue;
        }
        most = most.max(count);
        if !COUNTS.contains(&tag) || count > MOST_PIECES {
            continue;
        }
        let size = match kind {
            3 => 2,
            4 | 13 => 4,
            16 | 18 => 8,
            _ => continue,
        };
        let value = at + 4 + word;
        let values = match count * size <= word {
            true => value,
            false => tiff.number(value, word)?,
        };
        for number in 0..count {
            let length = tiff.number(values.checked_add(number * size)?, size)?;
            bytes = bytes.saturating_add(length);
        }
    }
    Some((most, bytes))
}

struct Tiff<'c> {
    content: &'c [u8],
    little: bool,
}

impl Tiff<'_> {
    /// A number of 2, 4 or 8 bytes.
    fn number(&self, at: u64, size: u64) -> Option<u64> {
        let at = usize::try_from(at).ok()?;
        let bytes = self
            .content
            .get(at..at.checked_add(usize::try_from(size).ok()?)?)?;
        let add = |sum: u64, &byte: &u8| sum << 8 | u64::from(byte);
        Some(match self.little {
            true => bytes.iter().rev().fold(0, add),
            false => bytes.iter().fold(0, add),
        })
    }
}

fn u16_be(content: &[u8], at: usize) -> Option<u16> {
    let &[high, low] = content.get(at..at + 2)? else {
        return None;
    };
    Some(u16::from_be_bytes([high, low]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::raster;

    /// A progressive JPEG up to its frame.
    fn jpeg(side: u16, factors: &[u8]) -> Vec<u8> {
        let side = side.to_be_bytes();
        let mut frame = [&[8][..], &side, &side, &[factors.len() as u8]].concat();
        for (number, factor) in factors.iter().enumerate() {
            frame.extend([number as u8 + 1, *factor, 0]);
        }
        let length = (frame.len() as u16 + 2).to_be_bytes();
        let comment = b"\xff\xfe\x00\x04hi";
        [b"\xff\xd8", &comment[..], b"\xff\xc2", &length, &frame].concat()
    }

    /// A TIFF of so many strips of one row, all of them the same `length` bytes.
    fn tiff(strips: u32, length: u32, big: bool) -> Vec<u8> {
        let half = |number: u16| {
            if big {
                number.to_be_bytes()
            } else {
                number.to_le_bytes()
            }
        };
        let word = |number: u32| {
            if big {
                number.to_be_bytes()
            } else {
                number.to_le_bytes()
            }
        };
        let start = if big { b"MM\0\x2a" } else { b"II\x2a\0" };
        let mut file = [&start[..], &word(8), &half(9)].concat();
        let data = 8 + 2 + 9 * 12 + 4;
        let entries = [
            (256, 8),
            (257, strips),
            (258, 8),
            (259, 1),
            (262, 1),
            (273, data),
            (277, 1),
            (278, 1),
            (279, data + 4 * strips),
        ];
        for (tag, value) in entries {
            let count = if tag == 273 || tag == 279 { strips } else { 1 };
            file.extend([&half(tag)[..], &half(4), &word(count), &word(value)].concat());
        }
        file.extend(word(0));
        (0..strips).for_each(|_| file.extend(word(data + 8 * strips)));
        (0..strips).for_each(|_| file.extend(word(length)));
        file.extend([7; 8]);
        file
    }

    #[test]
    fn coefficients_of_progressive_jpegs_are_counted() {
        assert_eq!(coefficients(&jpeg(8192, &[0x11; 3])), Some(8192 * 8192 * 6));
        // Chroma at a quarter, and rounded up to whole blocks.
        assert_eq!(
            coefficients(&jpeg(17, &[0x22, 0x11, 0x11])),
            Some(2 * (32 * 32 + 2 * 16 * 16))
        );
        let mut cut = jpeg(8192, &[0x11; 3]);
        cut.truncate(20);
        assert_eq!(coefficients(&cut), None);
    }

    #[test]
    fn pieces_of_tiffs_are_counted() {
        for big in [false, true] {
            assert_eq!(pieces(&tiff(4, 8, big)), Some((4, 32)));
            // A number that is its own place.
            assert_eq!(pieces(&tiff(70_000, 8, big)).unwrap().0, 70_000);
        }
        assert!(
            check_pieces(&tiff(70_000, 8, false))
                .unwrap_err()
                .contains("70000 strips")
        );
        let shared = check_pieces(&tiff(1000, 100_000, true)).unwrap_err();
        assert!(
            shared.contains("100000000 bytes, in a file of 8"),
            "{shared}"
        );
        // Before the decoder is asked.
        let said = raster::header(&tiff(70_000, 8, false)).unwrap_err();
        assert!(said.contains("70000 strips"), "{said}");
        assert_eq!(raster::header(&tiff(4, 8, true)).unwrap().height, 4);
        for length in 0..200 {
            let _ = pieces(&tiff(4, 8, false)[..length.min(150)]);
        }
    }
}
