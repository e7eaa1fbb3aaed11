//! Encodes pixels for terminals: as escape sequences, or as coloured characters.

use std::fmt::Write as _;
use std::io::Cursor;

use anstyle::{Color, RgbColor};
use anstyle_lossy::rgb_to_xterm;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use icy_sixel::{EncodeOptions, QuantizeMethod, SixelError, SixelImage};
use image::{ImageError, ImageFormat, Rgba, RgbaImage};

/// Characters per chunk, the maximum of kitty's protocol.
const CHUNK: usize = 4096;
/// Alpha below this counts as transparent in formats without partial transparency.
const OPAQUE: u8 = 128;

/// A picture that the encoder refuses.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// As a PNG.
    #[error(transparent)]
    Png(#[from] ImageError),
    /// As sixels.
    #[error(transparent)]
    Sixel(#[from] SixelError),
}

/// The protocol of kitty: a PNG in chunks. The terminal answers nothing (`q=2`).
pub fn kitty(picture: &RgbaImage) -> Result<String, EncodeError> {
    let data = STANDARD.encode(png(picture)?);
    let mut text = String::with_capacity(data.len() + data.len() / 128 + 64);
    let mut keys = "a=T,f=100,";
    let mut rest = data.as_str();
    while !rest.is_empty() {
        let (chunk, after) = rest.split_at(CHUNK.min(rest.len()));
        let more = u8::from(!after.is_empty());
        let _ = write!(text, "\x1b_G{keys}q=2,m={more};{chunk}\x1b\\");
        (keys, rest) = ("", after);
    }
    Ok(text + "\n")
}

/// The protocol of iTerm2: a PNG as an inline file, this many columns wide.
pub fn iterm(picture: &RgbaImage, columns: u32) -> Result<String, EncodeError> {
    let png = png(picture)?;
    let size = png.len();
    let data = STANDARD.encode(png);
    Ok(format!(
        "\x1b]1337;File=inline=1;size={size};width={columns};preserveAspectRatio=1:{data}\x07\n"
    ))
}

fn png(picture: &RgbaImage) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    picture.write_to(&mut Cursor::new(&mut bytes), ImageFormat::Png)?;
    Ok(bytes)
}

/// Sixel graphics of at most 256 colours. Without dithering: enlarged pixels stay plain squares.
pub fn sixel(picture: RgbaImage) -> Result<String, EncodeError> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let image = SixelImage::try_from_rgba(picture.into_raw(), width, height)?;
    let options = EncodeOptions {
        diffusion: 0.0,
        quantize_method: QuantizeMethod::kmeans(),
        ..EncodeOptions::default()
    };
    Ok(image.encode_with(&options)? + "\n")
}

/// Half blocks: a character is two pixels, the upper one its colour and the lower one its background.
pub fn blocks(picture: &RgbaImage, truecolor: bool) -> String {
    let mut text = String::new();
    for y in (0..picture.height()).step_by(2) {
        // The colours set last in this line.
        let mut set = (None, None);
        for x in 0..picture.width() {
            let pixel = |y| picture.get_pixel_checked(x, y).filter(|p| p.0[3] >= OPAQUE);
            let (character, front, back) = match (pixel(y), pixel(y + 1)) {
                (None, None) => (' ', set.0, None),
                (None, lower) => ('▄', lower, None),
                (upper, lower) => ('▀', upper, lower),
            };
            let color = |pixel: &Rgba<u8>| {
                let [r, g, b, _] = pixel.0;
                let color = RgbColor(r, g, b);
                match truecolor {
                    true => Color::Rgb(color),
                    false => Color::Ansi256(rgb_to_xterm(color)),
                }
            };
            if set.0 != front
                && let Some(pixel) = front
            {
                let _ = write!(text, "{}", color(pixel).render_fg());
            }
            match back {
                _ if set.1 == back => {}
                None => text.push_str("\x1b[49m"),
                Some(pixel) => {
                    let _ = write!(text, "{}", color(pixel).render_bg());
                }
            }
            set = (front, back);
            text.push(character);
        }
        text.push_str("\x1b[0m\n");
    }
    text
}

#[cfg(test)]
mod tests;
