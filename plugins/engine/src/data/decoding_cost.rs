//! The cost of decoding an image beyond its pixels: the decoder's memory, and pictures larger than their canvas.
//!
//! In: the content of an image file, or the beginning of one. Decoders trust the file's structure: a file of a few megabytes
//! can make them hold all coefficients in addition to the pixels, or a picture of any size for a canvas of a few pixels. JPEG
//! and TIFF have files of their own.

use image::ImageFormat;

use super::jpeg::Frame;
use super::tiff;

/// Refuses content that would take far too long, before the decoder sees it. Returns bytes that the decoder holds in addition
/// to those of [`of_pixels`].
pub(super) fn check(content: &[u8], format: ImageFormat) -> Result<u64, String> {
    match format {
        ImageFormat::Gif => check_frame(content),
        ImageFormat::Jpeg => {
            let Some(frame) = Frame::of(content)? else {
                return Ok(0);
            };
            frame.check()?;
            // The decoder copies the file.
            Ok(frame.coefficients() + content.len() as u64)
        }
        ImageFormat::Tiff => tiff::check(content),
        ImageFormat::WebP => {
            check_canvas(content)?;
            check_metadata(content).map(|()| 0)
        }
        _ => Ok(0),
    }
}

/// Bytes that a decoder holds for each pixel in addition to those it returns. `stored` is a pixel's bits in the file.
pub(super) fn of_pixels(content: &[u8], format: ImageFormat, stored: u16) -> u64 {
    match format {
        // It decodes into a buffer of its own.
        ImageFormat::Tiff => u64::from(stored).div_ceil(8),
        ImageFormat::WebP => planes(content),
        _ => 0,
    }
}

/// Bytes per pixel of a WebP in addition to the result: planes of luma and chroma, colours without alpha, alpha alone, the
/// canvas of an animation.
fn planes(content: &[u8]) -> u64 {
    const ANIMATED: u8 = 2;
    match (content.get(12..16), content.get(20)) {
        (Some(b"VP8 "), _) => 2,
        (Some(b"VP8L"), _) => 4,
        (_, Some(flags)) if flags & ANIMATED != 0 => 15,
        _ => 7,
    }
}

/// Refuses a GIF whose first frame is larger than its canvas: the library decodes all of it. Returns the bytes for a frame that
/// does not fill the canvas.
fn check_frame(content: &[u8]) -> Result<u64, String> {
    let side = |at: usize| Some(u64::from(u16_le(content, at)?));
    let (Some(width), Some(height)) = (side(6), side(8)) else {
        return Ok(0);
    };
    let Some(at) = descriptor(content) else {
        return Ok(0);
    };
    match (side(at + 1), side(at + 5), side(at + 7)) {
        (_, Some(w), Some(h)) if w > width || h > height => Err(format!(
            "a frame of {w} x {h} pixels on a canvas of {width} x {height}"
        )),
        (Some(left), Some(w), Some(h)) if left > 0 || w < width => Ok(4 * w * h),
        _ => Ok(0),
    }
}

/// Where the descriptor of a GIF's first frame begins. None if the content ends before it, or has blocks that no decoder knows.
fn descriptor(content: &[u8]) -> Option<usize> {
    let palette = |flags: u8| match flags & 0x80 {
        0 => 0,
        _ => 6 << (flags & 7),
    };
    let mut at = 13 + palette(*content.get(10)?);
    loop {
        match content.get(at)? {
            0x2c => return Some(at),
            // An extension: its kind, and pieces up to an empty one.
            0x21 => {
                at += 2;
                while let length @ 1.. = *content.get(at)? {
                    at += 1 + usize::from(length);
                }
                at += 1;
            }
            _ => return None,
        }
    }
}

/// Refuses a WebP whose picture is larger than its canvas: the library compares the two only after decoding. `content` may be
/// the beginning of a file.
fn check_canvas(content: &[u8]) -> Result<(), String> {
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

/// The most bytes of a WebP's chunk of metadata.
const MOST_METADATA: u32 = 16 << 20;

/// Refuses a WebP whose metadata claims to be long: the library takes memory for it before it reads it.
fn check_metadata(content: &[u8]) -> Result<(), String> {
    let metadata = |kind: &[u8]| matches!(kind, b"EXIF" | b"ICCP" | b"XMP ");
    let long =
        chunks(content, false).find(|chunk| metadata(chunk.kind) && chunk.length > MOST_METADATA);
    match long {
        Some(Chunk { kind, length, .. }) => Err(format!(
            "metadata of {length} bytes ({}), more than {} MiB; save it without",
            kind.escape_ascii(),
            MOST_METADATA >> 20
        )),
        None => Ok(()),
    }
}

/// The sides of the largest picture in a WebP with a canvas, as its own header gives them.
fn picture(content: &[u8]) -> Option<(u32, u32)> {
    let sides = chunks(content, true).filter_map(|Chunk { kind, inside, .. }| match kind {
        b"VP8 " if content.get(inside + 3..inside + 6) == Some(&[0x9d, 1, 0x2a]) => {
            let side = |at| Some(u24_le(content, at)? & 0x3fff);
            side(inside + 6).zip(side(inside + 8))
        }
        b"VP8L" if content.get(inside) == Some(&0x2f) => {
            let bits = content.get(inside + 1..)?.first_chunk()?;
            let bits = u32::from_le_bytes(*bits);
            Some(((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1))
        }
        _ => None,
    });
    sides.reduce(|(known_w, known_h), (w, h)| (known_w.max(w), known_h.max(h)))
}

/// A chunk of a WebP: its kind, its length, and where its content begins.
struct Chunk<'c> {
    kind: &'c [u8],
    length: u32,
    inside: usize,
}

/// The chunks of a WebP, as far as their headers are there; with those inside the frames of an animation, or without.
fn chunks(content: &[u8], with_frames: bool) -> impl Iterator<Item = Chunk<'_>> {
    let mut at = 12_usize;
    std::iter::from_fn(move || {
        let header = content.get(at..at.checked_add(8)?)?;
        let (kind, length) = header.split_at(4);
        let length = u32::from_le_bytes(length.try_into().ok()?);
        let inside = at + 8;
        at = match kind {
            // A frame: its chunks follow its place and size.
            b"ANMF" if with_frames => inside + 16,
            _ => inside.saturating_add(length as usize + length as usize % 2),
        };
        Some(Chunk {
            kind,
            length,
            inside,
        })
    })
}

fn u16_le(content: &[u8], at: usize) -> Option<u16> {
    let &[low, high] = content.get(at..at + 2)? else {
        return None;
    };
    Some(u16::from_le_bytes([low, high]))
}

/// The number in three bytes.
fn u24_le(content: &[u8], at: usize) -> Option<u32> {
    let &[low, middle, high] = content.get(at..at + 3)? else {
        return None;
    };
    Some(u32::from_le_bytes([low, middle, high, 0]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::raster;

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
    fn metadata_is_no_longer_than_it_may_be() {
        let small = chunk(b"EXIF", &[1, 2, 3]);
        assert_eq!(check_metadata(&webp(&[&small])), Ok(()));
        for kind in [b"EXIF", b"ICCP", b"XMP "] {
            let claim = [&kind[..], &0x8260_001a_u32.to_le_bytes()].concat();
            let content = webp(&[&small, &claim]);
            let said = raster::header(&content).unwrap_err();
            assert!(said.starts_with("metadata of 2187329562 bytes"), "{said}");
            for length in 0..content.len() {
                let _ = check_metadata(&content[..length]);
            }
        }
    }

    /// A GIF of a canvas of 8 x 8, and a frame of these sides at this place.
    fn gif(left: u16, sides: (u16, u16)) -> Vec<u8> {
        let (width, height) = sides;
        let numbers = [left, 0, width, height];
        let numbers: Vec<u8> = numbers.into_iter().flat_map(u16::to_le_bytes).collect();
        let parts = [
            &b"GIF89a\x08\0\x08\0\x80\0\0"[..],
            // Two colours, and two extensions.
            &[0, 0, 0, 9, 9, 9],
            b"\x21\xf9\x04\0\0\0\0\0\x21\xfe\x01,\x02,,\0\x2c",
            &numbers,
            &[0, 2, 2, 0x4c, 1, 0, 0x3b],
        ];
        parts.concat()
    }

    #[test]
    fn a_frame_larger_than_its_canvas_is_not_decoded() {
        assert_eq!(check_frame(&gif(0, (8, 8))), Ok(0));
        // It is decoded apart from the canvas.
        assert_eq!(check_frame(&gif(2, (4, 3))), Ok(4 * 4 * 3));
        for (sides, told) in [((9, 8), "9 x 8"), ((10_900, 10_900), "10900 x 10900")] {
            let content = gif(0, sides);
            let expected = format!("a frame of {told} pixels on a canvas of 8 x 8");
            assert_eq!(check_frame(&content).unwrap_err(), expected);
            assert_eq!(raster::header(&content).unwrap_err(), expected);
            (0..content.len()).for_each(|length| drop(check_frame(&content[..length])));
        }
    }
}
