//! Decoding one image file.
//!
//! In: the content of a PNG, JPEG, WebP, GIF, BMP or TIFF file, told apart by content. Out: a [`Raster`] of 8 bits, grey or
//! RGB. Of several frames or pages the first is taken, EXIF's orientation is applied, transparent pixels are laid over a
//! background, 16 bits and floats are rounded to 8. Colour profiles (ICC) are not applied: values are used as stored, as in
//! Pillow and torchvision.
//!
//! The size that a header claims is checked before anything is decoded or allocated.

use std::io::Cursor;
use std::panic::AssertUnwindSafe;

use image::metadata::Orientation;
use image::{
    ColorType, DynamicImage, GrayImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage,
};
use retort_checkpoint::images;

use super::content::NOT_SUPPORTED;
use super::memory_pool::MOST_MEMORY;
use super::{decoding_cost, jpeg, memory_pool, tiff};

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

/// A file's header: the properties of the decoded image.
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

/// The longest side that an image may have: a resized image may be as large as its longer side squared.
const LONGEST_SIDE: u32 = 1 << 16;

/// The most memory for a PNG's other chunks. The library unpacks a colour profile unasked.
const MOST_BESIDE: u64 = 16 << 20;

/// The supported formats, for messages.
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

/// An image whose header has been read, and checked.
pub(super) struct Opened<'c, D> {
    pub(super) decoder: D,
    format: ImageFormat,
    turned: Orientation,
    /// Bytes that decoding takes in addition to the file.
    memory: u64,
    /// Its pixels, if they lie in the file as they are.
    raw: Option<Vec<&'c [u8]>>,
}

pub(super) fn open(content: &[u8]) -> Result<Opened<'_, impl ImageDecoder + '_>, String> {
    let Some(format) = format(content) else {
        let found = match content {
            [] => "an empty file",
            _ => "something else",
        };
        return Err(format!("expected {FORMATS}, found {found}"));
    };
    if format == ImageFormat::Png {
        images::check_palettes(content)?;
    }
    let beside = decoding_cost::check(content, format)?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(match format {
        ImageFormat::Png => MOST_BESIDE,
        _ => MOST_MEMORY,
    });
    let mut reader = ImageReader::with_format(Cursor::new(content), format);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(fault)?;
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
    let turned = decoder.orientation().map_err(fault)?;
    let pixels = u64::from(width) * u64::from(height);
    let converted = match decoder.color_type() {
        ColorType::L8 | ColorType::Rgb8 => 0,
        kind => pixels * if kind.has_color() { 3 } else { 1 },
    };
    // A quarter turn makes a copy.
    let copied = match is_quarter(turned) {
        true => decoder.total_bytes(),
        false => 0,
    };
    let raw = match format {
        ImageFormat::Tiff => tiff::raw(content),
        _ => None,
    };
    let bytes = |strips: &Vec<&[u8]>| strips.iter().map(|strip| strip.len() as u64).sum::<u64>();
    let raw = raw.filter(|strips| converted == 0 && bytes(strips) == decoder.total_bytes());
    let stored = decoder.original_color_type().bits_per_pixel();
    let buffers = match raw {
        Some(_) => 0,
        None => pixels * decoding_cost::of_pixels(content, format, stored),
    };
    let memory = decoder
        .total_bytes()
        .saturating_add(converted.max(copied))
        .saturating_add(buffers)
        .saturating_add(beside);
    let all = memory.saturating_add(content.len() as u64);
    if all > MOST_MEMORY {
        return Err(format!(
            "an image of {width} x {height} pixels that takes {} MiB to decode: at most {} are allowed",
            all >> 20,
            MOST_MEMORY >> 20
        ));
    }
    Ok(Opened {
        decoder,
        format,
        turned,
        memory,
        raw,
    })
}

fn is_quarter(turned: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(
        turned,
        Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH
    )
}

/// The result of a decoder; a panic counts as damage.
fn survived<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    std::panic::catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("damaged in a way that its decoder does not expect".to_owned()))
}

fn fault(error: image::ImageError) -> String {
    // A decoder's message may quote the file: keep one line of it.
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    let line: String = line.chars().take(200).collect();
    match error {
        image::ImageError::Unsupported(_) => format!("{NOT_SUPPORTED}{line}"),
        _ => line,
    }
}

/// Reads a header. `content` may be the beginning of a file; then an error may mean that more is needed.
pub fn header(content: &[u8]) -> Result<Header, String> {
    survived(|| header_of(content))
}

fn header_of(content: &[u8]) -> Result<Header, String> {
    // The memory that a decoder takes to read a header.
    let _permit = memory_pool::DECODERS.take(MOST_BESIDE.saturating_add(content.len() as u64));
    let Opened {
        decoder,
        format,
        turned,
        ..
    } = open(content)?;
    let (mut width, mut height) = decoder.dimensions();
    let colour = decoder.color_type().has_color();
    if is_quarter(turned) {
        (width, height) = (height, width);
    }
    Ok(Header {
        format,
        height,
        width,
        colour,
    })
}

/// Decodes a file's content, over `background` where it is transparent.
pub fn decode(content: &[u8], background: [u8; 3]) -> Result<Raster, String> {
    decode_then(content, background, Ok)
}

/// The same, and passes the image on while its memory is still reserved.
pub(super) fn decode_then<T>(
    content: &[u8],
    background: [u8; 3],
    then: impl FnOnce(Raster) -> Result<T, String>,
) -> Result<T, String> {
    survived(|| {
        let opened = open(content)?;
        if opened.format == ImageFormat::Jpeg {
            jpeg::check_end(content)?;
        }
        let _permit = memory_pool::DECODERS.take(opened.memory);
        then(pixels_of(opened, background)?)
    })
}

fn pixels_of(opened: Opened<'_, impl ImageDecoder>, background: [u8; 3]) -> Result<Raster, String> {
    let turned = opened.turned;
    let mut image = match opened.raw {
        Some(strips) => of_strips(&strips, &opened.decoder)?,
        None => DynamicImage::from_decoder(opened.decoder).map_err(fault)?,
    };
    image.apply_orientation(turned);
    let (height, width) = (image.height() as usize, image.width() as usize);
    let (grey, clear) = (!image.color().has_color(), image.color().has_alpha());
    let (channels, pixels) = match (grey, clear) {
        (true, false) => (1, image.into_luma8().into_raw()),
        (false, false) => (3, image.into_rgb8().into_raw()),
        // With a coloured background grey images become coloured.
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

/// The image that lies in strips as it is.
fn of_strips(strips: &[&[u8]], decoder: &impl ImageDecoder) -> Result<DynamicImage, String> {
    let (width, height) = decoder.dimensions();
    let pixels = strips.concat();
    let image = match decoder.color_type().has_color() {
        true => RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8),
        false => GrayImage::from_raw(width, height, pixels).map(DynamicImage::ImageLuma8),
    };
    image.ok_or_else(|| "strips of another size than the image".to_owned())
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
