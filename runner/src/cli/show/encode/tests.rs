//! Encoded pictures, decoded as a terminal would.

use super::*;

/// A picture of many colours; its lower right corner is transparent where `hole` says so.
fn picture(width: u32, height: u32, colors: u32, hole: bool) -> RgbaImage {
    RgbaImage::from_fn(width, height, |x, y| {
        let number = (y * width + x) % colors;
        let alpha = if hole && x >= width / 2 && y >= height / 2 {
            0
        } else {
            255
        };
        let [r, g, b] = [number * 7, number * 31 / 2, number / 3].map(|value| (value % 256) as u8);
        Rgba([r, g, b, alpha])
    })
}

fn from_base64(data: &str) -> RgbaImage {
    let bytes = STANDARD.decode(data).unwrap();
    image::load_from_memory(&bytes).unwrap().to_rgba8()
}

#[test]
fn kitty_gets_a_png_in_chunks() {
    for picture in [picture(3, 2, 6, true), picture(300, 200, 60_000, true)] {
        let text = kitty(&picture).unwrap();
        let mut data = String::new();
        let chunks: Vec<&str> = text.trim_end().split_terminator("\x1b\\").collect();
        for (nth, chunk) in chunks.iter().enumerate() {
            let (keys, part) = chunk
                .strip_prefix("\x1b_G")
                .unwrap()
                .split_once(';')
                .unwrap();
            let more = u8::from(nth + 1 < chunks.len());
            let first = if nth == 0 { "a=T,f=100," } else { "" };
            assert_eq!(keys, format!("{first}q=2,m={more}"));
            assert!(part.len() <= 4096 && (more == 0 || part.len() == 4096));
            data.push_str(part);
        }
        assert_eq!(from_base64(&data), picture);
    }
}

#[test]
fn iterm_gets_a_png() {
    let picture = picture(30, 20, 600, true);
    let text = iterm(&picture, 12).unwrap();
    let inner = text.strip_prefix("\x1b]1337;File=").unwrap();
    let (keys, data) = inner
        .strip_suffix("\x07\n")
        .unwrap()
        .split_once(':')
        .unwrap();
    let size = STANDARD.decode(data).unwrap().len();
    assert_eq!(
        keys,
        format!("inline=1;size={size};width=12;preserveAspectRatio=1")
    );
    assert_eq!(from_base64(data), picture);
}

/// Decodes sixels on a transparent background: whole bands of six rows.
fn from_sixel(text: &str, height: u32) -> RgbaImage {
    let read = SixelImage::decode(text.as_bytes()).unwrap();
    assert_eq!(read.height as u32, height.next_multiple_of(6));
    let bands = RgbaImage::from_raw(read.width as u32, read.height as u32, read.pixels).unwrap();
    assert!(
        bands
            .rows()
            .skip(height as usize)
            .flatten()
            .all(|pixel| pixel.0[3] == 0)
    );
    image::imageops::crop_imm(&bands, 0, 0, bands.width(), height).to_image()
}

/// The maximum and mean colour difference of two pictures; transparent pixels must be so in both.
fn far(a: &RgbaImage, b: &RgbaImage) -> (u8, f64) {
    assert_eq!(a.dimensions(), b.dimensions());
    let (mut most, mut sum) = (0, 0.0);
    for (a, b) in a.pixels().zip(b.pixels()) {
        assert_eq!(a.0[3], b.0[3]);
        for channel in 0..3 {
            let far = if a.0[3] == 0 {
                0
            } else {
                a.0[channel].abs_diff(b.0[channel])
            };
            most = most.max(far);
            sum += f64::from(far);
        }
    }
    (most, sum / f64::from(a.width() * a.height() * 3))
}

#[test]
fn sixels_are_the_pixels() {
    // A colour register has a precision of hundredths; with many colours, similar ones share a register.
    let smooth = RgbaImage::from_fn(90, 70, |x, y| Rgba([x as u8 * 2, y as u8 * 3, 90, 255]));
    let grey = RgbaImage::from_fn(256, 9, |x, _| Rgba([x as u8, x as u8, x as u8, 255]));
    for (picture, bound, mean_bound) in [
        (picture(1, 1, 1, false), 2, 2.0),
        (picture(5, 7, 9, true), 2, 2.0),
        (picture(64, 13, 256, true), 64, 2.0),
        (grey, 8, 3.0),
        (smooth, 48, 4.0),
    ] {
        let read = from_sixel(&sixel(picture.clone()).unwrap(), picture.height());
        let (most, mean) = far(&picture, &read);
        let size = picture.dimensions();
        assert!(
            most <= bound && mean < mean_bound,
            "{size:?}: {most} {mean}"
        );
    }
    // Equal columns are written once.
    let plain = sixel(RgbaImage::from_pixel(500, 6, Rgba([255, 0, 0, 255]))).unwrap();
    assert!(plain.contains("#0!500~"), "{plain:?}");
}

/// The two pixels of each half block, by line.
fn from_blocks(text: &str, color: impl Fn(&str) -> [u8; 3]) -> RgbaImage {
    let lines: Vec<&str> = text.lines().collect();
    let mut rows: Vec<Vec<Rgba<u8>>> = Vec::new();
    for line in lines {
        let (mut front, mut back) = (Rgba([0; 4]), Rgba([0; 4]));
        let (mut upper, mut lower) = (Vec::new(), Vec::new());
        let mut rest = line;
        while let Some(character) = rest.chars().next() {
            rest = &rest[character.len_utf8()..];
            let shown = |code: &str| {
                let [r, g, b] = color(code);
                Rgba([r, g, b, 255])
            };
            match character {
                '\x1b' => {
                    let (code, after) = rest[1..].split_once('m').unwrap();
                    rest = after;
                    match (code.strip_prefix("38;"), code.strip_prefix("48;")) {
                        (Some(code), _) => front = shown(code),
                        (_, Some(code)) => back = shown(code),
                        _ => back = Rgba([0; 4]),
                    }
                }
                '▀' => (upper.push(front), lower.push(back)).0,
                '▄' => (upper.push(back), lower.push(front)).0,
                ' ' => (upper.push(back), lower.push(back)).0,
                other => panic!("{other:?}"),
            }
        }
        rows.extend([upper, lower]);
    }
    let width = rows[0].len() as u32;
    RgbaImage::from_fn(width, rows.len() as u32, |x, y| {
        rows[y as usize][x as usize]
    })
}

/// The same with black where it is transparent, and an even number of rows.
fn even(picture: &RgbaImage) -> RgbaImage {
    let height = picture.height().next_multiple_of(2);
    RgbaImage::from_fn(picture.width(), height, |x, y| {
        let pixel = picture.get_pixel_checked(x, y).copied();
        pixel.filter(|pixel| pixel.0[3] > 0).unwrap_or(Rgba([0; 4]))
    })
}

#[test]
fn half_blocks_are_the_pixels() {
    let numbers = |code: &str| {
        code.split(';')
            .map(|number| number.parse().unwrap())
            .collect()
    };
    let truecolor = |code: &str| {
        let numbers: Vec<u8> = numbers(code);
        assert_eq!(numbers[0], 2);
        [numbers[1], numbers[2], numbers[3]]
    };
    for (width, height, colors, hole) in [(1, 1, 1, false), (4, 3, 3, true), (30, 20, 600, true)] {
        let picture = picture(width, height, colors, hole);
        let read = from_blocks(&blocks(&picture, true), truecolor);
        assert_eq!(read, even(&picture), "{width} x {height}");
    }
    let of_256 = |code: &str| {
        let numbers: Vec<u8> = numbers(code);
        assert_eq!(numbers[0], 5);
        match numbers[1] {
            grey @ 232.. => [8 + 10 * (grey - 232); 3],
            cube => [(cube - 16) / 36, (cube - 16) / 6 % 6, (cube - 16) % 6]
                .map(|step| [0, 95, 135, 175, 215, 255][usize::from(step)]),
        }
    };
    // Few colours are exact; others are approximated.
    let grey = RgbaImage::from_fn(24, 2, |x, _| {
        let value = 8 + 10 * x as u8;
        Rgba([value, value, value, 255])
    });
    assert_eq!(from_blocks(&blocks(&grey, false), of_256), grey);
    let picture = picture(30, 20, 600, false);
    let (most, mean) = far(&picture, &from_blocks(&blocks(&picture, false), of_256));
    assert!(most <= 48 && mean < 20.0, "{most} {mean}");
}
