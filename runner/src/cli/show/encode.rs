//! Pixels as what a terminal draws them from: escape sequences, or characters in colours.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write as _;
use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use color_quant::NeuQuant;
use image::{ImageError, ImageFormat, Rgba, RgbaImage};

/// Characters of a chunk; kitty's protocol allows no more.
const CHUNK: usize = 4096;
/// Colours of a sixel picture: what terminals have registers for.
const COLORS: usize = 256;
/// An alpha below this is transparent where a pixel is drawn or not.
const OPAQUE: u8 = 128;

/// The protocol of kitty: a PNG in chunks. The terminal answers nothing (`q=2`).
pub fn kitty(picture: &RgbaImage) -> Result<String, ImageError> {
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

/// The protocol of iTerm2: a PNG as an inline file, so many columns wide.
pub fn iterm(picture: &RgbaImage, columns: u32) -> Result<String, ImageError> {
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

/// Sixel graphics: a palette, then bands of six rows, one colour after the other, runs of equal columns with their length.
pub fn sixel(picture: &RgbaImage) -> String {
    let (palette, indices) = indexed(picture);
    let width = picture.width() as usize;
    // Pixels that nothing sets keep the background (`1`).
    let mut text = format!("\x1bP0;1q\"1;1;{width};{}", picture.height());
    for (number, color) in palette.iter().enumerate() {
        let [r, g, b] = color.map(|value| (u32::from(value) * 100 + 127) / 255);
        let _ = write!(text, "#{number};2;{r};{g};{b}");
    }
    for band in indices.chunks(width * 6) {
        let mut colors: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
        for (place, index) in band.iter().enumerate() {
            let Some(index) = index else { continue };
            let columns = colors.entry(*index).or_insert_with(|| vec![0; width]);
            columns[place % width] |= 1 << (place / width);
        }
        for (nth, (index, columns)) in colors.iter().enumerate() {
            let back = if nth == 0 { "" } else { "$" };
            let _ = write!(text, "{back}#{index}");
            for run in columns.chunk_by(|a, b| a == b) {
                let sixel = char::from(b'?' + run[0]);
                match run.len() {
                    length @ 4.. => {
                        let _ = write!(text, "!{length}{sixel}");
                    }
                    length => text.extend(std::iter::repeat_n(sixel, length)),
                }
            }
        }
        text.push('-');
    }
    text + "\x1b\\\n"
}

/// The colours of a picture and which one each pixel has; `None` where it is transparent. Few colours stay as they are.
fn indexed(picture: &RgbaImage) -> (Vec<[u8; 3]>, Vec<Option<u8>>) {
    let opaque = |pixel: &&Rgba<u8>| pixel.0[3] >= OPAQUE;
    let rgb = |pixel: &Rgba<u8>| [pixel.0[0], pixel.0[1], pixel.0[2]];
    let mut known: BTreeMap<[u8; 3], u8> = BTreeMap::new();
    for color in picture.pixels().filter(opaque).map(rgb) {
        let next = known.len();
        if let Entry::Vacant(unknown) = known.entry(color) {
            let Ok(next) = u8::try_from(next) else {
                return quantised(picture);
            };
            unknown.insert(next);
        }
    }
    let mut palette = vec![[0; 3]; known.len()];
    for (color, index) in &known {
        palette[usize::from(*index)] = *color;
    }
    let index = |pixel| opaque(&pixel).then(|| known[&rgb(pixel)]);
    (palette, picture.pixels().map(index).collect())
}

/// The same with so many colours that some stand for others.
fn quantised(picture: &RgbaImage) -> (Vec<[u8; 3]>, Vec<Option<u8>>) {
    let mut opaque = picture.clone();
    opaque.pixels_mut().for_each(|pixel| pixel.0[3] = u8::MAX);
    // Every pixel of a small picture is looked at, and as many of a large one.
    let every = (opaque.len() / 400_000).clamp(1, 30) as i32;
    let colors = NeuQuant::new(every, COLORS, opaque.as_raw());
    let map = colors.color_map_rgb();
    let palette = map.chunks_exact(3).map(|rgb| [rgb[0], rgb[1], rgb[2]]);
    let index = |(pixel, drawn): (&Rgba<u8>, &Rgba<u8>)| {
        let index = colors.index_of(&pixel.0);
        (drawn.0[3] >= OPAQUE).then(|| u8::try_from(index).unwrap_or(u8::MAX))
    };
    let pixels = opaque.pixels().zip(picture.pixels());
    (palette.collect(), pixels.map(index).collect())
}

/// Half blocks: a character is two pixels, the upper one its colour and the lower one its background.
pub fn blocks(picture: &RgbaImage, truecolor: bool) -> String {
    let mut text = String::new();
    for y in (0..picture.height()).step_by(2) {
        // What was set last in this line.
        let mut set = (None, None);
        for x in 0..picture.width() {
            let pixel = |y| picture.get_pixel_checked(x, y).filter(|p| p.0[3] >= OPAQUE);
            let (character, front, back) = match (pixel(y), pixel(y + 1)) {
                (None, None) => (' ', set.0, None),
                (None, lower) => ('▄', lower, None),
                (upper, lower) => ('▀', upper, lower),
            };
            if set.0 != front
                && let Some(color) = front
            {
                let _ = write!(text, "\x1b[38;{}m", code(color, truecolor));
            }
            match back {
                _ if set.1 == back => {}
                None => text.push_str("\x1b[49m"),
                Some(color) => {
                    let _ = write!(text, "\x1b[48;{}m", code(color, truecolor));
                }
            }
            set = (front, back);
            text.push(character);
        }
        text.push_str("\x1b[0m\n");
    }
    text
}

/// A colour as a parameter of SGR; of 256 the nearest: a cube of six steps, and 24 greys.
fn code(color: &Rgba<u8>, truecolor: bool) -> String {
    let [r, g, b, _] = color.0;
    if truecolor {
        return format!("2;{r};{g};{b}");
    }
    let level = |step: u8| if step == 0 { 0 } else { 55 + 40 * step };
    let step = |value: u8| (0..6).min_by_key(|step| level(*step).abs_diff(value));
    let steps = [r, g, b].map(|value| step(value).unwrap_or_default());
    let mean = (u16::from(r) + u16::from(g) + u16::from(b)) / 3;
    let grey = (mean.saturating_sub(3) / 10).min(23) as u8;
    let far = |other: [u8; 3]| -> u32 {
        let squares = [r, g, b].into_iter().zip(other);
        squares.map(|(a, b)| u32::from(a.abs_diff(b)).pow(2)).sum()
    };
    let cube = 16 + 36 * steps[0] + 6 * steps[1] + steps[2];
    match far([8 + 10 * grey; 3]) < far(steps.map(level)) {
        true => format!("5;{}", 232 + grey),
        false => format!("5;{cube}"),
    }
}

#[cfg(test)]
mod tests;
