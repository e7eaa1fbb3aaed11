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

/// That the picture in a WebP is not larger than the canvas that is said to hold it: the library decodes it before it
/// compares the two. `content` may be the beginning of a file.
pub(super) fn check_canvas(content: &[u8]) -> Result<(), String> {
    if content.get(12..16) != Some(b"VP8X") {
        return Ok(());
    }
    let side = |at: usize| Some(u24_le(content, at)? + 1);
    let (Some(width), Some(height)) = (side(24), side(27)) else {
        return Ok(());
    };
    match picture(content) {
        Some((w, h)) if w > width || h > height => Err(format!(
            "a picture of {w} x {h} pixels on a canvas of {width} x {height}"
        )),
        _ => Ok(()),
    }
}

/// The sides of the largest picture in a WebP with a canvas, as its own header gives them.
fn picture(content: &[u8]) -> Option<(u32, u32)> {
    let mut most: Option<(u32, u32)> = None;
    let mut at = 12_usize;
    while let Some(kind) = content.get(at..at.checked_add(4)?) {
        let Some(length) = content.get(at + 4..at + 8) else {
            break;
        };
        let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
        let inside = at + 8;
        let found = match kind {
            b"VP8 " if content.get(inside + 3..inside + 6) == Some(&[0x9d, 1, 0x2a]) => {
                let side = |at| Some(u24_le(content, at)? & 0x3fff);
                side(inside + 6).zip(side(inside + 8))
            }
            b"VP8L" if content.get(inside) == Some(&0x2f) => {
                let bits = content.get(inside + 1..inside + 5);
                let bits = bits
                    .and_then(|bits| bits.try_into().ok())
                    .map(u32::from_le_bytes);
                bits.map(|bits| ((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1))
            }
            _ => None,
        };
        if let Some((w, h)) = found {
            let (known_w, known_h) = most.unwrap_or((0, 0));
            most = Some((known_w.max(w), known_h.max(h)));
        }
        at = match kind {
            // A frame of an animation: its chunks follow its place and size.
            b"ANMF" => inside + 16,
            _ => inside.checked_add(length)?.checked_add(length % 2)?,
        };
    }
    most
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
    // Of all entries together: they may share what they count.
    let (mut most, mut listed, mut bytes) = (0, 0_u64, 0_u64);
    for number in 0..tiff.number(at, counted)?.min(1 << 16) {
        let at = at.checked_add(counted + number * entry)?;
        let (tag, kind) = (tiff.number(at, 2)?, tiff.number(at + 2, 2)?);
        let count = tiff.number(at + 4, word)?;
        if !PLACES.contains(&tag) && !COUNTS.contains(&tag) {
            continue;
        }
        most = most.max(count);
        if !COUNTS.contains(&tag) {
            continue;
        }
        listed = listed.saturating_add(count);
        if listed > MOST_PIECES || bytes > content.len() as u64 {
            return Some((most.max(listed), bytes));
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

/// The number in three bytes.
fn u24_le(content: &[u8], at: usize) -> Option<u32> {
    let &[low, middle, high] = content.get(at..at + 3)? else {
        return None;
    };
    Some(u32::from_le_bytes([low, middle, high, 0]))
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

    /// A WebP of a canvas of 8 x 8 that holds these chunks.
    fn webp(chunks: &[&[u8]]) -> Vec<u8> {
        let canvas = chunk(b"VP8X", &[0, 0, 0, 0, 7, 0, 0, 7, 0, 0]);
        [&b"RIFF\xff\xff\0\0WEBP"[..], &canvas, &chunks.concat()].concat()
    }

    fn chunk(kind: &[u8], content: &[u8]) -> Vec<u8> {
        let mut chunk = [kind, &(content.len() as u32).to_le_bytes(), content].concat();
        chunk.resize(chunk.len().next_multiple_of(2), 0);
        chunk
    }

    #[test]
    fn a_picture_larger_than_its_canvas_is_not_decoded() {
        let lossy = |side: u16| {
            let side = side.to_le_bytes();
            chunk(
                b"VP8 ",
                &[&[0x50, 0, 0, 0x9d, 1, 0x2a][..], &side, &side, &[0; 3]].concat(),
            )
        };
        let lossless = |side: u32| {
            let bits = (side - 1) | (side - 1) << 14;
            chunk(b"VP8L", &[&[0x2f][..], &bits.to_le_bytes()].concat())
        };
        let frame = |inside: &[u8]| chunk(b"ANMF", &[&[0; 16][..], inside].concat());
        let exif = chunk(b"EXIF", &[1, 2, 3]);
        for good in [lossy(8), lossless(8), frame(&lossy(4)), exif.clone()] {
            assert_eq!(check_canvas(&webp(&[&exif, &good])), Ok(()));
        }
        for large in [lossy(16_383), lossless(16_383), frame(&lossy(16_383))] {
            let content = webp(&[&exif, &large]);
            let expected = "a picture of 16383 x 16383 pixels on a canvas of 8 x 8";
            assert_eq!(check_canvas(&content).unwrap_err(), expected);
            // Before the decoder is asked for pixels.
            assert_eq!(raster::header(&content).unwrap_err(), expected);
            let second = webp(&[&frame(&lossy(8)), &frame(&large)]);
            assert_eq!(check_canvas(&second).unwrap_err(), expected);
            for length in 0..content.len() {
                let _ = check_canvas(&content[..length]);
            }
        }
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
        // A directory of entries that share one list.
        let entry = |value: u32| {
            let start = [279_u16.to_le_bytes(), 4_u16.to_le_bytes()].concat();
            [
                start,
                30_000_u32.to_le_bytes().to_vec(),
                value.to_le_bytes().to_vec(),
            ]
            .concat()
        };
        let list = 8 + 2 + 65_535 * 12;
        let mut shared = [&b"II\x2a\0"[..], &[8, 0, 0, 0, 255, 255]].concat();
        (0..65_535).for_each(|_| shared.extend(entry(list)));
        shared.extend([0; 4 * 30_000]);
        assert_eq!(pieces(&shared), Some((90_000, 0)));
        assert!(check_pieces(&shared).unwrap_err().contains("90000 strips"));
        for length in 0..200 {
            let _ = pieces(&tiff(4, 8, false)[..length.min(150)]);
        }
    }
}
