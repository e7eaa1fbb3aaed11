use image::Rgba;

use super::*;

fn screen() -> Screen {
    Screen {
        cells: (80, 24),
        cell: (10, 20),
    }
}

fn size(width: u32, height: u32, columns: Option<u32>, manner: Protocol) -> (u32, u32) {
    let picture = RgbaImage::new(width, height);
    screen().fitted(&picture, columns, manner).dimensions()
}

#[test]
fn pictures_fit_the_screen() {
    // Enlarged by whole numbers while they fit; a line is left.
    assert_eq!(size(34, 34, None, Protocol::Kitty), (34 * 13, 34 * 13));
    assert_eq!(size(34, 34, None, Protocol::Blocks), (34, 34));
    assert_eq!(size(8, 8, None, Protocol::Blocks), (40, 40));
    // A tall one scrolls, a wide one shrinks.
    assert_eq!(size(100, 1000, None, Protocol::Sixel), (100, 1000));
    assert_eq!(size(1600, 1000, None, Protocol::Sixel), (800, 500));
    assert_eq!(size(160, 160, None, Protocol::Blocks), (80, 80));
    // As wide as somebody wants, but for the screen.
    assert_eq!(size(34, 17, Some(20), Protocol::Iterm), (200, 100));
    assert_eq!(size(34, 17, Some(20), Protocol::Blocks), (20, 10));
    assert_eq!(size(34, 17, Some(1000), Protocol::Blocks), (80, 40));
    // Nothing grows without bound, and nothing vanishes.
    assert_eq!(size(1, 10_000, Some(80), Protocol::Kitty), (1, MOST_PIXELS));
    assert_eq!(size(10_000, 1, Some(1), Protocol::Blocks), (1, 1));
}

#[test]
fn enlarged_pixels_stay_squares() {
    let color = |x: u32, y: u32| Rgba([(x * 90) as u8, (y * 90) as u8, 7, 255]);
    let picture = RgbaImage::from_fn(3, 3, color);
    let large = screen().fitted(&picture, None, Protocol::Kitty);
    let times = large.width() / 3;
    assert!(times > 10);
    for (x, y, pixel) in large.enumerate_pixels() {
        assert_eq!(*pixel, color(x / times, y / times));
    }
}

#[test]
fn the_environment_says_what_a_terminal_draws() {
    let never = || -> Vec<u8> { panic!("asked") };
    for (variables, expected) in [
        (&[("TERM", "xterm-kitty")] as &[_], Protocol::Kitty),
        (
            &[("KITTY_WINDOW_ID", "1"), ("TERM", "xterm")],
            Protocol::Kitty,
        ),
        (&[("TERM_PROGRAM", "ghostty")], Protocol::Kitty),
        (
            &[("TERM_PROGRAM", "iTerm.app"), ("TERM", "xterm")],
            Protocol::Iterm,
        ),
        (&[("TERM_PROGRAM", "WezTerm")], Protocol::Iterm),
        (
            &[("LC_TERMINAL", "iTerm2"), ("TERM", "xterm")],
            Protocol::Iterm,
        ),
        (&[("TERM", "foot-extra")], Protocol::Sixel),
        (&[("TERM", "xterm-sixel")], Protocol::Sixel),
        (&[("TERM", "mlterm")], Protocol::Sixel),
        (
            &[("TERM", "xterm-kitty"), ("TMUX", "/tmp/x")],
            Protocol::Blocks,
        ),
        (
            &[("TERM", "screen.xterm-256color"), ("KITTY_WINDOW_ID", "1")],
            Protocol::Blocks,
        ),
        (&[("TERM", "linux")], Protocol::Blocks),
        (&[("TERM", "dumb")], Protocol::Paths),
        (&[], Protocol::Blocks),
    ] {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map_or_else(String::new, |(_, value)| (*value).to_owned())
        };
        assert_eq!(best(variable, never), expected, "{variables:?}");
    }
}

#[test]
fn an_answer_says_what_a_terminal_draws() {
    let xterm = |name: &str| if name == "TERM" { "xterm-256color" } else { "" }.to_owned();
    for (answer, expected) in [
        ("\x1b_Gi=1;OK\x1b\\\x1b[?62;c", Protocol::Kitty),
        ("\x1b[?62;4;22c", Protocol::Sixel),
        ("\x1b[?4;6c", Protocol::Blocks),
        ("\x1b[?62;14;22c", Protocol::Blocks),
        ("x\x1b[?1;4c", Protocol::Sixel),
        ("\x1b[?1;4", Protocol::Blocks),
        ("\x1b_Gi=1;EINVAL\x1b\\\x1b[?1;2c", Protocol::Blocks),
        ("", Protocol::Blocks),
    ] {
        let manner = best(xterm, || answer.as_bytes().to_vec());
        assert_eq!(manner, expected, "{answer:?}");
    }
    assert!(!truecolor(xterm));
    assert!(truecolor(|name| if name == "COLORTERM" {
        "24bit"
    } else {
        ""
    }
    .to_owned()));
}
