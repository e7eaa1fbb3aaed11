//! What decoding a JPEG costs beyond its pixels: coefficients that are kept, and blocks that are visited again by each scan.
//!
//! In: a JPEG, or the beginning of one. Out: its [`Frame`]. Up to the first scan segments are read exactly as the decoder reads
//! them, and what lies between them is refused: otherwise the decoder could find another frame than is found here. After
//! that, every place that may begin a scan counts.

/// The most blocks of 8 x 8 pixels that all scans of a frame may visit: 32 times those of a grey image of 2^26
/// pixels.
pub(super) const MOST_BLOCKS: u64 = 1 << 25;

/// The frame of a JPEG, and its scans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) width: u64,
    pub(super) height: u64,
    /// Horizontal and vertical sampling of each component.
    factors: Vec<(u64, u64)>,
    /// Whether the coefficients are kept until the last scan.
    keeps: bool,
    /// Components in all scans.
    scanned: u64,
    /// Whether an end of the image follows the first scan.
    ends: bool,
}

impl Frame {
    /// Reads the segments of a JPEG. None if it ends before its first scan: then the decoder fails too.
    pub(super) fn of(content: &[u8]) -> Result<Option<Self>, String> {
        let (mut at, mut frame) = (2, None);
        loop {
            let left = content.get(at..).unwrap_or_default();
            // Fill bytes may precede a marker.
            let fill = left.iter().take_while(|byte| **byte == 0xff).count();
            match left.get(fill) {
                None => return Ok(None),
                Some(marker) if fill == 0 || *marker == 0 => {
                    return Err(format!(
                        "a damaged JPEG: expected a segment at byte {at}, found something else; save it again"
                    ));
                }
                Some(_) => at += fill,
            }
            let (Some(&marker), Some(length)) = (content.get(at), u16_be(content, at + 1)) else {
                return Ok(None);
            };
            let segment = content.get(at + 3..);
            match marker {
                0xc0..=0xc2 => frame = segment.and_then(|segment| Self::read(segment, marker)),
                0xda => break,
                _ => {}
            }
            at += 1 + usize::from(length.max(2));
        }
        let Some(mut frame) = frame else {
            return Err("a damaged JPEG: a scan without a frame; save it again".into());
        };
        // The number of components of a scan follows its length.
        let components = |at: usize| content.get(at + 3).copied().map_or(1, |n| n.clamp(1, 4));
        frame.scanned = components(at).into();
        let scans = content.get(at..).unwrap_or_default();
        frame.ends = scans.windows(2).rev().any(|two| two == [0xff, 0xd9]);
        frame.keeps |= frame.scanned < frame.factors.len() as u64;
        if frame.keeps {
            for (place, two) in content[at + 1..].windows(2).enumerate() {
                if two == [0xff, 0xda] {
                    frame.scanned += u64::from(components(at + 2 + place));
                }
            }
        }
        Ok(Some(frame))
    }

    /// The frame in a segment with this marker.
    fn read(segment: &[u8], marker: u8) -> Option<Self> {
        let (height, width) = (u16_be(segment, 1)?, u16_be(segment, 3)?);
        let components = segment.get(6..6 + 3 * usize::from(*segment.get(5)?))?;
        let (components, _) = components.as_chunks::<3>();
        Some(Self {
            width: width.into(),
            height: height.into(),
            factors: components
                .iter()
                .map(|[_, byte, _]| (u64::from(byte >> 4), u64::from(byte & 15)))
                .collect(),
            keeps: marker == 0xc2,
            scanned: 0,
            ends: false,
        })
    }

    /// Blocks of each component, rounded up to whole blocks of the coarsest one.
    fn blocks(&self) -> impl Iterator<Item = u64> {
        let most = |(a, d): (u64, u64), (x, y): &(u64, u64)| (a.max(*x), d.max(*y));
        let (across, down) = self.factors.iter().fold((1, 1), most);
        let (wide, high) = (
            self.width.div_ceil(8 * across),
            self.height.div_ceil(8 * down),
        );
        self.factors.iter().map(move |(x, y)| wide * x * high * y)
    }

    /// Bytes of the coefficients that are kept.
    pub(super) fn coefficients(&self) -> u64 {
        match self.keeps {
            true => self.blocks().map(|blocks| 2 * 64 * blocks).sum(),
            false => 0,
        }
    }

    /// Bytes of the decoded samples.
    pub(super) fn samples(&self) -> u64 {
        self.width * self.height * self.factors.len() as u64
    }

    /// Blocks that all scans visit, at most.
    pub(super) fn visited(&self) -> u64 {
        let most = self.blocks().max().unwrap_or(0);
        most.saturating_mul(self.scanned)
    }

    /// Refuses more scans of so many blocks than anybody stores.
    pub(super) fn check(&self) -> Result<(), String> {
        match self.visited() {
            0..=MOST_BLOCKS => Ok(()),
            visited => Err(format!(
                "a JPEG of {} x {} pixels whose scans visit {visited} blocks: more than {MOST_BLOCKS} are not decoded; save it \
                 with fewer scans, or not progressive",
                self.width, self.height
            )),
        }
    }
}

/// Refuses a JPEG that ends before its image does: the decoder fills the rest with grey and says nothing. Pillow refuses the
/// same files.
pub(super) fn check_end(content: &[u8]) -> Result<(), String> {
    match Frame::of(content)? {
        Some(frame) if frame.ends => Ok(()),
        _ => Err("a truncated JPEG: its end is missing; copy or download it again".into()),
    }
}

fn u16_be(content: &[u8], at: usize) -> Option<u16> {
    let &[high, low] = content.get(at..at.checked_add(2)?)? else {
        return None;
    };
    Some(u16::from_be_bytes([high, low]))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::raster;

    /// A segment.
    pub(in crate::data) fn segment(marker: u8, content: &[u8]) -> Vec<u8> {
        let length = (content.len() as u16 + 2).to_be_bytes();
        [&[0xff, marker][..], &length, content].concat()
    }

    /// A frame's segment.
    pub(in crate::data) fn frame(marker: u8, side: u16, factors: &[u8]) -> Vec<u8> {
        let side = side.to_be_bytes();
        let mut frame = [&[8][..], &side, &side, &[factors.len() as u8]].concat();
        for (number, factor) in factors.iter().enumerate() {
            frame.extend([number as u8 + 1, *factor, 0]);
        }
        segment(marker, &frame)
    }

    /// The segment of a scan of the first components, and a few bits.
    pub(in crate::data) fn scan(components: u8) -> Vec<u8> {
        let mut scan = vec![components];
        (1..=components).for_each(|number| scan.extend([number, 0]));
        scan.extend([0, 0, 0]);
        [segment(0xda, &scan), vec![0x12, 0xff, 0, 0x34]].concat()
    }

    /// A JPEG of a frame of this kind, and of scans of so many components.
    pub(in crate::data) fn jpeg(marker: u8, side: u16, factors: &[u8], scans: &[u8]) -> Vec<u8> {
        let comment = segment(0xfe, b"\xff\xda hi");
        let scans = scans.iter().flat_map(|components| scan(*components));
        let scans: Vec<u8> = scans.collect();
        let start = [b"\xff\xd8", &comment[..]].concat();
        [
            &start,
            &frame(marker, side, factors)[..],
            &scans,
            b"\xff\xd9",
        ]
        .concat()
    }

    fn read(content: &[u8]) -> Frame {
        Frame::of(content).unwrap().unwrap()
    }

    #[test]
    fn coefficients_of_progressive_jpegs_are_counted() {
        let of = |side, factors: &[u8]| read(&jpeg(0xc2, side, factors, &[1])).coefficients();
        assert_eq!(of(8192, &[0x11; 3]), 8192 * 8192 * 6);
        // Chroma at a quarter, and rounded up to whole blocks.
        let chroma = of(17, &[0x22, 0x11, 0x11]);
        assert_eq!(chroma, 2 * (32 * 32 + 2 * 16 * 16));
        // Sequential ones are kept only if each component has its own scan.
        assert_eq!(read(&jpeg(0xc0, 64, &[0x11; 3], &[3])).coefficients(), 0);
        let apart = read(&jpeg(0xc0, 64, &[0x11; 3], &[1, 1, 1]));
        assert_eq!(apart.coefficients(), 64 * 64 * 6);
        let whole = jpeg(0xc2, 8192, &[0x11; 3], &[1]);
        (0..whole.len() - 16).for_each(|length| assert_eq!(Frame::of(&whole[..length]), Ok(None)));
    }

    #[test]
    fn scans_of_a_jpeg_are_counted_before_it_is_decoded() {
        let ordinary = read(&jpeg(0xc2, 8192, &[0x11], &[1; 10]));
        assert_eq!((ordinary.visited(), ordinary.check()), (10 << 20, Ok(())));
        let many = jpeg(0xc2, 8192, &[0x11], &[1; 99]);
        let expected = "a JPEG of 8192 x 8192 pixels whose scans visit 103809024 blocks: more than 33554432 are not decoded; \
                        save it with fewer scans, or not progressive";
        assert_eq!(read(&many).check().unwrap_err(), expected);
        assert_eq!(raster::header(&many).unwrap_err(), expected);
        // A small image may have any number of scans, and each counts its components.
        let small = read(&jpeg(0xc2, 512, &[0x11; 3], &[3; 99]));
        assert_eq!((small.visited(), small.check()), ((99 * 3) << 12, Ok(())));
        // A sequential image is decoded by its first scan.
        assert_eq!(
            read(&jpeg(0xc0, 8192, &[0x11], &[1; 99])).visited(),
            1 << 20
        );
    }

    /// The decoder makes an image of any beginning.
    #[test]
    fn a_truncated_jpeg_is_damaged() {
        let formats = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/images/formats");
        for name in ["grey.jpg", "cmyk.jpg", "progressive.jpg", "smooth.jpg"] {
            let whole = std::fs::read(format!("{formats}/{name}")).unwrap();
            let decode = |content: &[u8]| raster::decode(content, [255; 3]);
            // What stands behind the end is not part of the image.
            let longer = [&whole[..], b"more"].concat();
            assert_eq!(decode(&longer), decode(&whole), "{name}");
            assert!(decode(&whole).is_ok(), "{name}");
            for length in [whole.len() - 1, whole.len() - 2, whole.len() - 9] {
                assert_eq!(
                    decode(&whole[..length]).unwrap_err(),
                    "a truncated JPEG: its end is missing; copy or download it again",
                    "{name}, {length} bytes"
                );
                // A header is read from the beginning alone.
                assert!(raster::header(&whole[..length]).is_ok(), "{name}");
            }
        }
    }

    #[test]
    fn a_frame_is_hidden_from_no_reader() {
        let whole = jpeg(0xc2, 8192, &[0x11; 3], &[1]);
        let refused = |before: &[u8]| {
            let hidden = [&whole[..2], before, &whole[2..]].concat();
            Frame::of(&hidden).unwrap_err()
        };
        for between in [&b"\0\0"[..], b"\xff\0", b"\xff\xff\0\xff"] {
            let said = refused(between);
            assert!(said.contains("expected a segment at byte 2"), "{said}");
        }
        // As the decoder does: fill bytes, and markers whose length it reads.
        for before in [&b"\xff\xff"[..], b"\xff\xd0\0\x04ab", b"\xff\xd8\0\x02"] {
            let hidden = [&whole[..2], before, &whole[2..]].concat();
            assert_eq!(read(&hidden), read(&whole), "{before:?}");
        }
        let none = [&b"\xff\xd8"[..], &scan(1)].concat();
        assert!(
            Frame::of(&none)
                .unwrap_err()
                .contains("a scan without a frame")
        );
    }
}
