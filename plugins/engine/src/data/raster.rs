//! One image file, as bytes, made pixels.
//!
//! In: the content of a PNG, JPEG, WebP, GIF, BMP or TIFF file, told apart by content. Out: a [`Raster`] of 8 bits, grey or
//! RGB. Of several frames or pages the first is taken, EXIF's orientation is applied, transparency is laid over a
//! background, 16 bits and floats are rounded to 8. Colour profiles (ICC) are not applied: values are taken as they are
//! stored, as Pillow and torchvision take them.
//!
//! The size that a header claims is checked before anything is decoded or allocated.

use std::io::Cursor;
use std::panic::AssertUnwindSafe;
use std::sync::{Mutex, PoisonError};

use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use retort_checkpoint::images;

use super::decoding_cost;

/// Pixels of 8 bits, row by row, the channels of a pixel side by side: (height, width, channels).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raster {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Values.
    pub pixels: Vec<u8>,
}

/// What a file's header says of the image as it will be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The file's format.
    pub format: ImageFormat,
    /// Height in pixels.
    pub height: u32,
    /// Width in pixels.
    pub width: u32,
    /// Whether it has colour channels.
    pub colour: bool,
}

/// The most pixels that an image may have: 8192 x 8192, more than any camera that training data comes from.
pub const MOST_PIXELS: u64 = 1 << 26;

/// The longest side that an image may have: what is made of one may be as large as its longer side squared.
const LONGEST_SIDE: u32 = 1 << 16;

/// The most memory that an image may take: its file, its pixels as they are stored, and as they are used.
const MOST_MEMORY: u64 = 480 << 20;

/// The most memory for what a PNG holds beside its pixels. A colour profile is unpacked before anybody asks for it.
const MOST_BESIDE: u64 = 16 << 20;

/// Images of more pixels than this are decoded one after the other.
const LARGE: u64 = 1 << 23;

/// Held while a large image is decoded: many threads with one each would not fit in memory.
static LARGE_IMAGES: Mutex<()> = Mutex::new(());

/// The formats that are read, as they are named in messages.
pub const FORMATS: &str = "PNG, JPEG, WebP, GIF, BMP or TIFF";

/// The format of a file that begins with these bytes.
pub fn format(start: &[u8]) -> Option<ImageFormat> {
    images::format(start).map(|format| match format {
        images::Format::Bmp => ImageFormat::Bmp,
        images::Format::Gif => ImageFormat::Gif,
        images::Format::Jpeg => ImageFormat::Jpeg,
        images::Format::Png => ImageFormat::Png,
        images::Format::Tiff => ImageFormat::Tiff,
        images::Format::WebP => ImageFormat::WebP,
    })
}

pub(super) fn decoder(content: &[u8]) -> Result<impl ImageDecoder + '_, String> {
    let Some(format) = format(content) else {
        let found = match content {
            [] => "an empty file",
            _ => "something else",
        };
        return Err(format!("expected {FORMATS}, found {found}"));
    };
    match format {
        ImageFormat::Png => check_palettes(content)?,
        ImageFormat::Tiff => decoding_cost::check_pieces(content)?,
        ImageFormat::WebP => decoding_cost::check_canvas(content)?,
        _ => {}
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(match format {
        ImageFormat::Png => MOST_BESIDE,
        _ => MOST_MEMORY,
    });
    let mut reader = ImageReader::with_format(Cursor::new(content), format);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(fault)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MOST_PIXELS {
        let message = format!(
            "an image of {width} x {height} pixels: more than {MOST_PIXELS} are not decoded"
        );
        return Err(message);
    }
    if width.max(height) > LONGEST_SIDE {
        let message = format!(
            "an image of {width} x {height} pixels: sides of more than {LONGEST_SIDE} are not decoded"
        );
        return Err(message);
    }
    if width == 0 || height == 0 {
        return Err(format!("an image of {width} x {height} pixels"));
    }
    let used = match decoder.color_type() {
        ColorType::L8 | ColorType::Rgb8 => 0,
        kind => u64::from(width) * u64::from(height) * if kind.has_color() { 3 } else { 1 },
    };
    let beside = decoding_cost::beside(content, format, u64::from(width) * u64::from(height));
    let memory = (content.len() as u64)
        .saturating_add(decoder.total_bytes())
        .saturating_add(used)
        .saturating_add(beside);
    if memory > MOST_MEMORY {
        return Err(format!(
            "an image of {width} x {height} pixels that takes {} MiB to decode: no more than {} are used",
            memory >> 20,
            MOST_MEMORY >> 20
        ));
    }
    Ok(decoder)
}

/// The library takes it on trust that a PNG's palette is one of whole colours. `content` may be the beginning of a file.
fn check_palettes(content: &[u8]) -> Result<(), String> {
    let mut at = 8_usize;
    while let Some(&[a, b, c, d, ref kind @ ..]) = content.get(at..at.saturating_add(8)) {
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        match kind {
            b"PLTE" if length > 768 || !length.is_multiple_of(3) => {
                return Err(format!(
                    "a palette of {length} bytes: expected three for each of up to 256 colours"
                ));
            }
            b"IDAT" => break,
            _ => at = at.saturating_add(length).saturating_add(12),
        }
    }
    Ok(())
}

/// What a decoder makes of a file; one that panics has found damage as well.
fn survived<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    std::panic::catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("damaged in a way that its decoder does not expect".to_owned()))
}

fn fault(error: image::ImageError) -> String {
    // A decoder's message may quote what it found: one line of it is enough.
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.chars().take(200).collect()
}

/// Reads a header. `content` may be the beginning of a file; then an error may mean that more is needed.
pub fn header(content: &[u8]) -> Result<Header, String> {
    survived(|| header_of(content))
}

fn header_of(content: &[u8]) -> Result<Header, String> {
    let mut decoder = decoder(content)?;
    let (mut width, mut height) = decoder.dimensions();
    let colour = decoder.color_type().has_color();
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    let turned = decoder.orientation().map_err(fault)?;
    if matches!(
        turned,
        Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH
    ) {
        (width, height) = (height, width);
    }
    Ok(Header {
        format: format(content).unwrap_or(ImageFormat::Png),
        height,
        width,
        colour,
    })
}

/// Decodes a file's content, over `background` where it is transparent.
pub fn decode(content: &[u8], background: [u8; 3]) -> Result<Raster, String> {
    survived(|| pixels_of(content, background))
}

fn pixels_of(content: &[u8], background: [u8; 3]) -> Result<Raster, String> {
    let mut decoder = decoder(content)?;
    let (width, height) = decoder.dimensions();
    let large = u64::from(width) * u64::from(height) > LARGE;
    let _alone = large.then(|| LARGE_IMAGES.lock().unwrap_or_else(PoisonError::into_inner));
    let turned = decoder.orientation().map_err(fault)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(fault)?;
    image.apply_orientation(turned);
    let (height, width) = (image.height() as usize, image.width() as usize);
    let (grey, clear) = (!image.color().has_color(), image.color().has_alpha());
    let (channels, pixels) = match (grey, clear) {
        (true, false) => (1, image.into_luma8().into_raw()),
        (false, false) => (3, image.into_rgb8().into_raw()),
        // A coloured background would make grey images coloured.
        (true, true) if background[0] == background[1] && background[1] == background[2] => {
            let image = image.into_luma_alpha8();
            (1, over(image.as_raw(), &background[..1]))
        }
        (_, true) => {
            let image = image.into_rgba8();
            (3, over(image.as_raw(), &background))
        }
    };
    Ok(Raster {
        height,
        width,
        channels,
        pixels,
    })
}

/// Pixels with opacity as last value, laid over a colour.
fn over(pixels: &[u8], background: &[u8]) -> Vec<u8> {
    let n = background.len();
    let mut out = Vec::with_capacity(pixels.len() / (n + 1) * n);
    for pixel in pixels.chunks_exact(n + 1) {
        let opacity = u32::from(pixel[n]);
        for (value, behind) in pixel.iter().zip(background) {
            let sum = u32::from(*value) * opacity + u32::from(*behind) * (255 - opacity);
            out.push(((sum + 127) / 255) as u8);
        }
    }
    out
}

/// Luma of a colour (ITU-R BT.601, as Pillow computes it).
pub fn luma([r, g, b]: [u8; 3]) -> u8 {
    let sum = 19595 * u32::from(r) + 38470 * u32::from(g) + 7471 * u32::from(b);
    ((sum + (1 << 15)) >> 16) as u8
}

impl Raster {
    /// The same picture in another number of channels, 1 or 3.
    pub fn with_channels(self, channels: usize) -> Self {
        let pixels = match (self.channels, channels) {
            (1, 3) => self.pixels.iter().flat_map(|&v| [v, v, v]).collect(),
            (3, 1) => {
                let (pixels, _) = self.pixels.as_chunks::<3>();
                pixels.iter().map(|&pixel| luma(pixel)).collect()
            }
            _ => return self,
        };
        Self {
            channels,
            pixels,
            ..self
        }
    }
}
