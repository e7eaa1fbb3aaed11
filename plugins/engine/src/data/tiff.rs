//! What decoding a TIFF's first image costs, before anything of it is decoded.
//!
//! In: the content of a file. Out: the bytes that a decoder needs for one strip or tile, or why the image is refused. A
//! directory of a few entries can ask a decoder to hold millions of values, to unpack millions of strips or tiles that share
//! their bytes or are larger than the image, and to decode a JPEG of any size in each.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::content::NOT_SUPPORTED;
use super::jpeg::{Frame, MOST_BLOCKS};
use super::memory_pool::MOST_MEMORY;

/// The most strips or tiles: ten times as many as an image of 2^26 pixels has rows, if it is square.
const MOST_PIECES: u64 = 1 << 16;

/// The most values of any other tag that the decoder reads: as many as a pixel may have samples.
const MOST_VALUES: u64 = 1 << 16;

/// The most bytes of JPEG tables, counted for each strip or tile: each is decoded with a copy of them.
const MOST_TABLES: u64 = 1 << 26;

/// Tags that the decoder reads.
mod tag {
    pub(super) const WIDTH: u64 = 256;
    pub(super) const HEIGHT: u64 = 257;
    pub(super) const BITS: u64 = 258;
    pub(super) const COMPRESSION: u64 = 259;
    pub(super) const PHOTOMETRIC: u64 = 262;
    pub(super) const STRIP_OFFSETS: u64 = 273;
    pub(super) const ORIENTATION: u64 = 274;
    pub(super) const SAMPLES: u64 = 277;
    pub(super) const ROWS_PER_STRIP: u64 = 278;
    pub(super) const STRIP_LENGTHS: u64 = 279;
    pub(super) const PLANAR: u64 = 284;
    pub(super) const PREDICTOR: u64 = 317;
    pub(super) const TILE_WIDTH: u64 = 322;
    pub(super) const TILE_HEIGHT: u64 = 323;
    pub(super) const TILE_OFFSETS: u64 = 324;
    pub(super) const TILE_LENGTHS: u64 = 325;
    pub(super) const EXTRA_SAMPLES: u64 = 338;
    pub(super) const SAMPLE_FORMAT: u64 = 339;
    pub(super) const JPEG_TABLES: u64 = 347;
    pub(super) const SUBSAMPLING: u64 = 530;

    /// Those of strips and tiles.
    pub(super) const LISTS: [u64; 4] = [STRIP_OFFSETS, STRIP_LENGTHS, TILE_OFFSETS, TILE_LENGTHS];

    /// The others.
    pub(super) const OTHERS: [u64; 16] = [
        WIDTH,
        HEIGHT,
        BITS,
        COMPRESSION,
        PHOTOMETRIC,
        ORIENTATION,
        SAMPLES,
        ROWS_PER_STRIP,
        PLANAR,
        PREDICTOR,
        TILE_WIDTH,
        TILE_HEIGHT,
        EXTRA_SAMPLES,
        SAMPLE_FORMAT,
        JPEG_TABLES,
        SUBSAMPLING,
    ];
}

/// Refuses a TIFF whose first image would take too much time. Returns the bytes that decoding one of its strips or tiles
/// takes. What cannot be read here the decoder cannot read either.
pub(super) fn check(content: &[u8]) -> Result<u64, String> {
    let Some(directory) = Directory::read(content)? else {
        return Ok(0);
    };
    let bytes = [tag::STRIP_LENGTHS, tag::TILE_LENGTHS]
        .iter()
        .flat_map(|tag| directory.numbers(*tag))
        .fold(0, u64::saturating_add);
    if bytes > content.len() as u64 {
        return Err(format!(
            "an image whose strips or tiles take {bytes} bytes, in a file of {}",
            content.len()
        ));
    }
    let number = |tag, absent| directory.numbers(tag).next().unwrap_or(absent);
    let (width, height) = (number(tag::WIDTH, 0), number(tag::HEIGHT, 0));
    let is_tiled = directory.entries.contains_key(&tag::TILE_OFFSETS);
    let (wide, high) = match is_tiled {
        true => (
            number(tag::TILE_WIDTH, width),
            number(tag::TILE_HEIGHT, height),
        ),
        false => (width, number(tag::ROWS_PER_STRIP, height).min(height)),
    };
    // Rows are unpacked with the padding of the last tile, and with samples that are not colours.
    let row = width.div_ceil(wide.max(1)).saturating_mul(wide);
    let bits = number(tag::BITS, 1).saturating_mul(number(tag::SAMPLES, 1));
    let unpacked = row.saturating_mul(height).saturating_mul(bits) / 8;
    if unpacked > MOST_MEMORY {
        return Err(format!(
            "an image of {width} x {height} pixels in strips or tiles of {wide} x {high}, which take {} MiB: at most {} are \
             unpacked",
            unpacked >> 20,
            MOST_MEMORY >> 20
        ));
    }
    let (colours, packing) = (number(tag::PHOTOMETRIC, 0), number(tag::COMPRESSION, 1));
    let sample = (number(tag::SAMPLE_FORMAT, 1), number(tag::BITS, 1));
    match (unsupported(colours, packing, sample), packing) {
        (Some(what), _) => Err(format!(
            "{NOT_SUPPORTED}{what}; save it as PNG, as in `magick old.tif new.png`"
        )),
        (None, 7) => directory.jpegs(is_tiled, (wide, high)),
        (None, _) => Ok(0),
    }
}

/// What the decoder cannot read, or would read wrongly, of an image with these colours, this packing, and samples of this kind
/// (1: whole numbers, 3: floats) and number of bits.
fn unsupported(colours: u64, packing: u64, (kind, bits): (u64, u64)) -> Option<String> {
    const FLOATS: u64 = 3;
    match (colours, kind) {
        _ if packing == 6 => Some("JPEG of the old kind (compression 6)".into()),
        (3, _) => Some("colours of a palette".into()),
        (6, _) => Some("colours as YCbCr".into()),
        (8..=10, _) => Some("colours as Lab".into()),
        (2, FLOATS) if bits == 32 => None,
        (_, FLOATS) => Some(format!(
            "floats of {bits} bits; expected such of 32 bits as RGB"
        )),
        _ if bits > 16 => Some(format!("whole numbers of {bits} bits; expected 8 or 16")),
        _ => None,
    }
}

/// The strips of an image whose pixels lie in the file as they are decoded: grey or RGB, of 8 bits, not packed. None for any
/// other, and if strips are missing.
pub(super) fn raw(content: &[u8]) -> Option<Vec<&[u8]>> {
    let directory = Directory::read(content).ok()??;
    let number = |tag, absent| directory.numbers(tag).next().unwrap_or(absent);
    let all = |tag, wanted| directory.numbers(tag).all(|value| value == wanted);
    let samples = number(tag::SAMPLES, 1);
    // Of these tags 1 means: as it is.
    let plain = [
        tag::COMPRESSION,
        tag::PLANAR,
        tag::PREDICTOR,
        tag::SAMPLE_FORMAT,
    ];
    let others = [tag::EXTRA_SAMPLES, tag::TILE_OFFSETS];
    let is_raw = matches!((number(tag::PHOTOMETRIC, 0), samples), (1, 1) | (2, 3))
        && directory.numbers(tag::BITS).count() as u64 == samples
        && all(tag::BITS, 8)
        && plain.into_iter().all(|tag| all(tag, 1))
        && !others.iter().any(|tag| directory.entries.contains_key(tag));
    if !is_raw {
        return None;
    }
    let (width, height) = (number(tag::WIDTH, 0), number(tag::HEIGHT, 0));
    let rows = number(tag::ROWS_PER_STRIP, height);
    let mut strips = Vec::new();
    let mut below = height;
    let offsets = directory.numbers(tag::STRIP_OFFSETS);
    for (start, length) in offsets.zip(directory.numbers(tag::STRIP_LENGTHS)) {
        let high = rows.min(below);
        if high == 0 || width.checked_mul(samples)?.checked_mul(high)? != length {
            return None;
        }
        let (start, length) = (usize::try_from(start).ok()?, usize::try_from(length).ok()?);
        strips.push(content.get(start..start.checked_add(length)?)?);
        below -= high;
    }
    (below == 0).then_some(strips)
}

/// A tag's values.
#[derive(Clone, Copy)]
struct Entry {
    /// The type of its values.
    kind: u64,
    count: u64,
    /// Where the values are.
    at: u64,
}

impl Entry {
    /// Bytes of a value, if that is a whole number from 0.
    fn size(self) -> Option<u64> {
        match self.kind {
            1 | 7 => Some(1),
            3 => Some(2),
            4 | 13 => Some(4),
            16 | 18 => Some(8),
            _ => None,
        }
    }
}

/// The tags of the first image that the decoder reads.
struct Directory<'c> {
    tiff: Tiff<'c>,
    entries: BTreeMap<u64, Entry>,
}

impl<'c> Directory<'c> {
    /// None if it does not lie in the content.
    fn read(content: &'c [u8]) -> Result<Option<Self>, String> {
        let tiff = Tiff {
            content,
            little: content.starts_with(b"II"),
        };
        let mut directory = Self {
            tiff,
            entries: BTreeMap::new(),
        };
        let Some(large) = tiff.number(2, 2).map(|kind| kind == 43) else {
            return Ok(None);
        };
        // The position of the directory's offset, the width of its entry count, and the size of an entry and of its numbers.
        let (first, counted, size, word) = if large { (8, 8, 20, 8) } else { (4, 2, 12, 4) };
        let place = tiff.number(first, word);
        let Some((at, count)) = place.and_then(|at| Some((at, tiff.number(at, counted)?))) else {
            return Ok(None);
        };
        for number in 0..count.min(1 << 16) {
            let at = at.saturating_add(counted + number * size);
            let Some((tag, entry)) = tiff.entry(at, word) else {
                return Ok(None);
            };
            let of_pieces = tag::LISTS.contains(&tag);
            let is_read = of_pieces || tag::OTHERS.contains(&tag);
            // In a large directory the decoder looks for the entry after one of unknown type elsewhere.
            let is_known = matches!(entry.kind, 1..=13 | 16..=18);
            if is_read && entry.size().is_none() || large && !is_known {
                return Err(format!(
                    "tag {tag} has values of type {}; expected whole numbers",
                    entry.kind
                ));
            }
            if !is_read {
                continue;
            }
            let count = entry.count;
            if of_pieces && count > MOST_PIECES {
                return Err(format!(
                    "an image in {count} strips or tiles: more than {MOST_PIECES} are not decoded"
                ));
            }
            if !of_pieces && count > MOST_VALUES {
                return Err(format!(
                    "tag {tag} has {count} values: more than {MOST_VALUES} are not read"
                ));
            }
            if directory.entries.insert(tag, entry).is_some() {
                return Err(format!(
                    "tag {tag} stands twice in its directory; expected it once"
                ));
            }
        }
        Ok(Some(directory))
    }

    /// A tag's values, as far as they are numbers and in the content.
    fn numbers(&self, tag: u64) -> impl Iterator<Item = u64> {
        let entry = self.entries.get(&tag).copied();
        let entry = entry.and_then(|entry| Some((entry, entry.size()?)));
        let tiff = self.tiff;
        entry.into_iter().flat_map(move |(entry, size)| {
            (0..entry.count)
                .map_while(move |number| tiff.number(entry.at.checked_add(number * size)?, size))
        })
    }

    /// The same for strips or tiles that are JPEGs, each of at most so many pixels.
    fn jpegs(&self, is_tiled: bool, (wide, high): (u64, u64)) -> Result<u64, String> {
        let (offsets, lengths) = match is_tiled {
            true => (tag::TILE_OFFSETS, tag::TILE_LENGTHS),
            false => (tag::STRIP_OFFSETS, tag::STRIP_LENGTHS),
        };
        let tables: Vec<u8> = self
            .numbers(tag::JPEG_TABLES)
            .map(|byte| byte as u8)
            .collect();
        let count = self.entries.get(&offsets).map_or(0, |entry| entry.count);
        if tables.len() as u64 * count > MOST_TABLES {
            return Err(format!(
                "JPEG tables of {} bytes for each of {count} strips or tiles; expected a few hundred",
                tables.len()
            ));
        }
        // Scans of one strip have whole blocks.
        let (wide, high) = (wide.saturating_add(15), high.saturating_add(15));
        let content = self.tiff.content;
        let (mut held, mut visited) = (0, 0_u64);
        let places = self.numbers(offsets).zip(self.numbers(lengths));
        for (number, (start, length)) in places.enumerate() {
            let place = |at: u64| content.len().min(usize::try_from(at).unwrap_or(usize::MAX));
            let piece = &content[place(start)..place(start.saturating_add(length))];
            // The decoder reads the tables, less their end, and then the JPEG, less its start.
            let whole = match tables.len() {
                0..2 => Cow::Borrowed(piece),
                end => [&tables[..end - 2], piece.get(2..).unwrap_or_default()]
                    .concat()
                    .into(),
            };
            let fault = |why| format!("strip or tile {number}: {why}");
            let Some(frame) = Frame::of(&whole).map_err(fault)? else {
                continue;
            };
            if frame.width > wide || frame.height > high {
                return Err(fault(format!(
                    "a JPEG of {} x {} pixels; expected at most {} x {}",
                    frame.width,
                    frame.height,
                    wide - 15,
                    high - 15
                )));
            }
            visited = visited.saturating_add(frame.visited());
            held = held.max(frame.samples() + frame.coefficients() + 2 * whole.len() as u64);
        }
        match visited {
            0..=MOST_BLOCKS => Ok(held),
            _ => Err(format!(
                "JPEGs whose scans visit {visited} blocks: more than {MOST_BLOCKS} are not decoded; save the image with fewer \
                 scans"
            )),
        }
    }
}

#[derive(Clone, Copy)]
struct Tiff<'c> {
    content: &'c [u8],
    little: bool,
}

impl Tiff<'_> {
    /// A number of 1, 2, 4 or 8 bytes.
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

    /// A tag and its entry in a directory; `word` is the width of offsets.
    fn entry(&self, at: u64, word: u64) -> Option<(u64, Entry)> {
        let (tag, kind) = (self.number(at, 2)?, self.number(at + 2, 2)?);
        let count = self.number(at + 4, word)?;
        let at = at + 4 + word;
        let last = self.number(at, word)?;
        let mut entry = Entry { kind, count, at };
        if entry
            .size()
            .is_some_and(|size| count.saturating_mul(size) > word)
        {
            entry.at = last;
        }
        Some((tag, entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::jpeg::tests::{jpeg, scan};
    use crate::data::raster;

    /// A TIFF with such entries (tag, type, values), whose strips are these bytes. Tags 273 and 279 are added.
    fn tiff(big: bool, entries: &[(u32, u32, Vec<u32>)], strips: &[&[u8]]) -> Vec<u8> {
        let number = |number: u32, bytes: usize| match big {
            true => number.to_be_bytes()[4 - bytes..].to_vec(),
            false => number.to_le_bytes()[..bytes].to_vec(),
        };
        let start = if big { b"MM\0\x2a" } else { b"II\x2a\0" };
        let mut file = [&start[..], &[0; 4]].concat();
        let mut lists = [Vec::new(), Vec::new()];
        for strip in strips {
            lists[0].push(file.len() as u32);
            lists[1].push(strip.len() as u32);
            file.extend_from_slice(strip);
        }
        let [offsets, lengths] = lists;
        let mut entries = entries.to_vec();
        entries.extend([(273, 4, offsets), (279, 4, lengths)]);
        entries.sort_by_key(|entry| entry.0);
        let mut directory = number(entries.len() as u32, 2);
        for (tag, kind, values) in &entries {
            let width = [1, 2, 4][[1, 3, 4].iter().position(|of| of == kind).unwrap_or(0)];
            let mut bytes: Vec<u8> = values.iter().flat_map(|v| number(*v, width)).collect();
            if bytes.len() > 4 {
                let at = file.len() as u32;
                file.append(&mut bytes);
                bytes = number(at, 4);
            }
            bytes.resize(4, 0);
            directory.extend([number(*tag, 2), number(*kind, 2)].concat());
            directory.extend([number(values.len() as u32, 4), bytes].concat());
        }
        let at = number(file.len() as u32, 4);
        file[4..8].copy_from_slice(&at);
        [file, directory, vec![0; 4]].concat()
    }

    /// Entries of a grey image of 8 x `height` pixels, packed in this way, a strip for so many rows.
    fn grey(height: u32, compression: u32, rows: u32) -> Vec<(u32, u32, Vec<u32>)> {
        let entries = [
            (256, 8),
            (257, height),
            (258, 8),
            (259, compression),
            (262, 1),
            (277, 1),
            (278, rows),
        ];
        entries.map(|(tag, value)| (tag, 4, vec![value])).to_vec()
    }

    /// What is said of it before the decoder is asked.
    fn refused(content: &[u8], expected: &str) {
        let said = check(content).unwrap_err();
        assert!(said.contains(expected), "{said}");
        assert_eq!(raster::header(content).unwrap_err(), said);
    }

    /// Entries of an RGB image of these sides, packed in this way, a strip for so many rows.
    fn rgb((width, height): (u32, u32), compression: u32, rows: u32) -> Vec<(u32, u32, Vec<u32>)> {
        let entries = [
            (256, vec![width]),
            (257, vec![height]),
            (258, vec![8; 3]),
            (259, vec![compression]),
            (262, vec![2]),
            (277, vec![3]),
            (278, vec![rows]),
        ];
        entries.map(|(tag, values)| (tag, 4, values)).to_vec()
    }

    #[test]
    fn pixels_that_are_not_packed_are_taken_as_they_are() {
        let pixels: Vec<u8> = (0..8 * 5 * 3).collect();
        let strips = [&pixels[..72], &pixels[72..]];
        let content = tiff(false, &rgb((8, 5), 1, 3), &strips);
        assert_eq!(raw(&content).unwrap(), strips);
        let decoded = raster::decode(&content, [0; 3]).unwrap();
        assert_eq!((decoded.width, decoded.height), (8, 5));
        assert_eq!((decoded.channels, decoded.pixels), (3, pixels.clone()));
        let grey = tiff(true, &grey(4, 1, 2), &[&pixels[..16], &pixels[16..32]]);
        assert_eq!(raw(&grey).unwrap().concat(), pixels[..32]);
        assert_eq!(raster::decode(&grey, [0; 3]).unwrap().pixels, pixels[..32]);
        // Packed, short, with too few strips, with others than colours.
        let alpha = [rgb((8, 5), 1, 3), vec![(338, 3, vec![0])]].concat();
        for content in [
            tiff(false, &rgb((8, 5), 8, 3), &strips),
            tiff(false, &rgb((8, 5), 1, 3), &[strips[0], &strips[1][1..]]),
            tiff(false, &rgb((8, 5), 1, 3), &strips[..1]),
            tiff(false, &alpha, &strips),
        ] {
            assert!(raw(&content).is_none());
        }
        for length in 0..content.len() {
            let _ = raw(&content[..length]);
        }
    }

    #[test]
    fn a_whole_image_of_another_kind_is_not_called_damaged() {
        let pixels = [0; 8 * 4 * 8];
        let with = |tag: u32, value: u32, bits: u32| {
            let mut entries = grey(4, 1, 4);
            entries.retain(|entry| entry.0 != tag && entry.0 != 258);
            entries.extend([(tag, 4, vec![value]), (258, 4, vec![bits])]);
            tiff(false, &entries, &[&pixels[..8 * 4 * bits as usize / 8]])
        };
        for (content, what) in [
            (with(262, 3, 8), "colours of a palette"),
            (with(262, 6, 8), "colours as YCbCr"),
            (with(262, 8, 8), "colours as Lab"),
            (with(339, 3, 32), "floats of 32 bits"),
            (with(339, 3, 64), "floats of 64 bits"),
            (with(339, 1, 32), "whole numbers of 32 bits"),
        ] {
            refused(&content, &format!("not supported: {what}"));
        }
        // The library's own words.
        let said = raster::header(&with(339, 2, 8)).unwrap_err();
        assert!(said.starts_with(NOT_SUPPORTED), "{said}");
    }

    #[test]
    fn the_largest_image_may_lie_in_a_tiff_as_it_is() {
        let pixels = vec![0; 8192 * 8192 * 3];
        let content = |compression| tiff(false, &rgb((8192, 8192), compression, 8192), &[&pixels]);
        let header = raster::header(&content(1)).unwrap();
        assert_eq!((header.width, header.height), (8192, 8192));
        // A packed one needs a buffer.
        let said = raster::header(&content(5)).unwrap_err();
        assert!(said.contains("takes 576 MiB to decode"), "{said}");
    }

    #[test]
    fn pieces_of_tiffs_are_counted() {
        for big in [false, true] {
            let good = tiff(big, &grey(4, 1, 1), &[&[7; 8][..]; 4]);
            assert_eq!(check(&good), Ok(0));
            assert_eq!(raster::header(&good).unwrap().height, 4);
            (0..good.len()).for_each(|length| drop(check(&good[..length])));
            let many = tiff(big, &grey(70_000, 1, 1), &[&[][..]; 70_000]);
            refused(&many, "an image in 70000 strips or tiles");
            // All strips in the same bytes.
            let mut shared = tiff(big, &grey(1000, 1, 1), &[&[][..]; 1000]);
            let length = if big {
                50_000_u32.to_be_bytes()
            } else {
                50_000_u32.to_le_bytes()
            };
            shared[4008..8008].copy_from_slice(&length.repeat(1000));
            refused(
                &shared,
                "strips or tiles take 50000000 bytes, in a file of 8",
            );
        }
    }

    #[test]
    fn values_of_a_tag_are_counted() {
        let with = |tag, kind, values: Vec<u32>| {
            let entries = [grey(8, 1, 8), vec![(tag, kind, values)]].concat();
            tiff(false, &entries, &[&[0; 64][..]])
        };
        for tag in [338, 339, 530, 347] {
            let expected = format!("tag {tag} has 65537 values: more than 65536 are not read");
            refused(&with(tag, 1, vec![1; 65_537]), &expected);
        }
        assert_eq!(check(&with(339, 1, vec![1; 65_536])), Ok(0));
        // What the decoder does not read, such as a colour profile.
        assert_eq!(check(&with(34_675, 1, vec![1; 100_000])), Ok(0));
        refused(&with(279, 4, vec![64]), "tag 279 stands twice");
        refused(&with(339, 5, vec![1]), "tag 339 has values of type 5");
    }

    #[test]
    fn tiles_larger_than_an_image_are_not_unpacked() {
        let tiles = |wide: u32, samples: u32| {
            let mut entries = grey(8, 8, 8);
            entries[5].2 = vec![samples];
            entries.truncate(6);
            entries.extend([(322, 4, vec![wide]), (323, 4, vec![8])]);
            entries.extend([(324, 4, vec![8]), (325, 4, vec![0])]);
            tiff(false, &entries, &[])
        };
        assert_eq!(check(&tiles(512, 1)), Ok(0));
        refused(
            &tiles(1 << 28, 1),
            "strips or tiles of 268435456 x 8, which take 2048 MiB",
        );
        refused(&tiles(1 << 20, 65_535), "which take");
    }

    #[test]
    fn a_jpeg_within_a_tiff_is_no_larger_than_its_place() {
        let with = |strips: &[&[u8]], rows: u32| tiff(false, &grey(8, 7, rows), strips);
        let fits = jpeg(0xc0, 8, &[0x11], &[1]);
        assert_eq!(check(&with(&[&fits], 8)), Ok(64 + 2 * fits.len() as u64));
        let huge = jpeg(0xc0, 16_384, &[0x11], &[1]);
        let expected = "a JPEG of 16384 x 16384 pixels; expected at most 8 x ";
        refused(&with(&[&huge], 8), &format!("strip or tile 0: {expected}8"));
        let second = format!("strip or tile 1: {expected}4");
        refused(&with(&[&fits, &huge], 4), &second);
        let garbage = [&fits[..2], &[0], &fits[2..]].concat();
        refused(&with(&[&garbage], 8), "strip or tile 0: a damaged JPEG");
        // The frame may be in the tables.
        let bytes = |jpeg: &[u8]| jpeg.iter().map(|byte| u32::from(*byte)).collect::<Vec<_>>();
        let tables = [&huge[..huge.len() - 16], b"\xff\xd9"].concat();
        let entries = [grey(8, 7, 8), vec![(347, 1, bytes(&tables))]].concat();
        let rest = [&b"\xff\xd8"[..], &scan(1)].concat();
        refused(&tiff(false, &entries, &[&rest]), expected);
        refused(&tiff(false, &grey(8, 6, 8), &[&fits]), "magick old.tif");
    }

    #[test]
    fn scans_and_tables_of_jpegs_within_a_tiff_are_counted() {
        let mut entries = grey(8 * 2048, 7, 8);
        let strip = jpeg(0xc2, 8, &[0x11], &[1; 2000]);
        let strips = vec![&strip[..]; 2048];
        assert_eq!(
            check(&tiff(false, &entries, &strips[..2])).map(|held| held > 64),
            Ok(true)
        );
        let strip = jpeg(0xc2, 16, &[0x11], &[1; 5000]);
        let strips = vec![&strip[..]; 2048];
        refused(
            &tiff(false, &entries, &strips),
            "JPEGs whose scans visit 40960000 blocks",
        );
        entries.push((347, 1, vec![0; 65_536]));
        refused(
            &tiff(false, &entries, &strips),
            "JPEG tables of 65536 bytes for each of 2048",
        );
    }
}
