//! The terminal: its graphics protocol and its size.

use std::io::{self, IsTerminal, Read};

use clap::ValueEnum;
use image::RgbaImage;
use image::imageops::{self, FilterType};

use crate::cli::output;
use crate::cli::show::encode::{self, EncodeError};

/// Maximum sides of a drawn picture, in pixels.
pub const MOST_PIXELS: u32 = 16_384;
/// Asks whether kitty's protocol is known, then for the terminal's attributes, which every terminal gives.
const QUESTION: &str = "\x1b_Gi=1,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[c";
/// Maximum bytes of an answer.
const MOST_ANSWER: usize = 1024;
/// Timeout between bytes of an answer, in tenths of a second.
const PATIENCE: u8 = 10;

/// How a terminal draws pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// The best that the terminal says it can; half blocks in tmux and screen; paths where there is no terminal.
    Auto,
    /// The protocol of kitty.
    Kitty,
    /// The protocol of iTerm2.
    Iterm,
    /// Sixel graphics.
    Sixel,
    /// Half blocks in colours: any terminal can.
    Blocks,
    /// Print the paths of the files instead.
    Paths,
}

/// The character cells of a terminal, and the pixels of each.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    /// Columns and lines.
    pub cells: (u32, u32),
    /// Width and height of a place in pixels.
    pub cell: (u32, u32),
}

impl Screen {
    /// The terminal behind stdout, with defaults for unknown sizes.
    pub fn of_stdout() -> Self {
        // SAFETY: a structure of numbers, for which zeros are values.
        let mut size: libc::winsize = unsafe { std::mem::zeroed() };
        // SAFETY: the call fills the structure, which lives until it returns, or leaves it as it is.
        unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
        let or = |value: u16, usual| if value == 0 { usual } else { value.into() };
        let cells = (or(size.ws_col, 80), or(size.ws_row, 24));
        let pixels = |all: u16, cells: u32, usual| match u32::from(all) / cells {
            0 => usual,
            pixels => pixels,
        };
        Self {
            cells,
            cell: (
                pixels(size.ws_xpixel, cells.0, 8),
                pixels(size.ws_ypixel, cells.1, 16),
            ),
        }
    }

    /// A picture at its size on this screen: `columns` wide, else enlarged by a whole number while it fits. Never wider than
    /// the screen. Enlarged pixels stay square.
    pub fn fitted(&self, picture: &RgbaImage, columns: Option<u32>, manner: Protocol) -> RgbaImage {
        let (across, down) = match manner {
            Protocol::Blocks => (1, 2),
            _ => self.cell,
        };
        let most = self.cells.0 * across;
        let (width, height) = picture.dimensions();
        let (width, height) = (width.max(1), height.max(1));
        // One line is reserved for the prompt.
        let lines = self.cells.1.saturating_sub(1) * down;
        let wanted = match columns {
            Some(columns) => (columns * across).min(most),
            None => (width * (most / width).min(lines / height).max(1)).min(most),
        };
        let tall = |wide: u32| u64::from(height) * u64::from(wide) / u64::from(width);
        let (wide, tall) = match tall(wanted) {
            fits @ ..=MOST_TALL => (wanted, fits as u32),
            _ => {
                let wide = u64::from(width) * MOST_TALL / u64::from(height);
                (wide as u32, MOST_PIXELS)
            }
        };
        let (wide, tall) = (wide.max(1), tall.max(1));
        let filter = match wide >= width {
            true => FilterType::Nearest,
            false => FilterType::Triangle,
        };
        imageops::resize(picture, wide, tall, filter)
    }

    /// Encodes a picture of this size in the given protocol.
    pub fn drawn(
        &self,
        picture: RgbaImage,
        manner: Protocol,
        truecolor: bool,
    ) -> Result<String, EncodeError> {
        match manner {
            Protocol::Kitty => encode::kitty(&picture),
            Protocol::Iterm => encode::iterm(&picture, picture.width().div_ceil(self.cell.0)),
            Protocol::Sixel => encode::sixel(picture),
            Protocol::Auto | Protocol::Blocks | Protocol::Paths => {
                Ok(encode::blocks(&picture, truecolor))
            }
        }
    }
}

const MOST_TALL: u64 = MOST_PIXELS as u64;

/// Whether the terminal has 24-bit colours, by its environment.
pub fn truecolor(variable: impl Fn(&str) -> String) -> bool {
    let says = variable("COLORTERM");
    says.contains("truecolor") || says.contains("24bit") || variable("TERM").ends_with("-direct")
}

/// The terminal's best protocol, by its environment (`""` for unset variables), else by its answer.
pub fn best(variable: impl Fn(&str) -> String, ask: impl FnOnce() -> Vec<u8>) -> Protocol {
    let term = variable("TERM");
    let is = |names: &[&str]| names.iter().any(|name| term.contains(name));
    let there = |name| !variable(name).is_empty();
    if there("TMUX") || there("STY") || term.starts_with("tmux") || term.starts_with("screen") {
        // Both discard graphics unless configured otherwise.
        return Protocol::Blocks;
    }
    let program = variable("TERM_PROGRAM");
    if is(&["kitty", "ghostty"]) || program == "ghostty" || there("KITTY_WINDOW_ID") {
        return Protocol::Kitty;
    }
    if ["iTerm.app", "WezTerm", "mintty"].contains(&program.as_str())
        || variable("LC_TERMINAL") == "iTerm2"
    {
        return Protocol::Iterm;
    }
    if is(&["sixel", "foot", "mlterm", "yaft"]) {
        return Protocol::Sixel;
    }
    if term == "dumb" {
        // A dumb terminal prints escape sequences instead of interpreting them.
        return Protocol::Paths;
    }
    if term.is_empty() || term == "linux" {
        return Protocol::Blocks;
    }
    by_answer(&ask())
}

/// Interprets an answer: kitty's `OK`, or attribute 4 (`ESC [ ? 62 ; 4 c`).
fn by_answer(answer: &[u8]) -> Protocol {
    let answer = String::from_utf8_lossy(answer);
    let attributes = answer
        .split("\x1b[?")
        .nth(1)
        .and_then(|rest| rest.split_once('c'));
    let sixel = attributes.is_some_and(|(list, _)| list.split(';').skip(1).any(|one| one == "4"));
    match answer.contains("\x1b_Gi=1;OK") {
        true => Protocol::Kitty,
        false if sixel => Protocol::Sixel,
        false => Protocol::Blocks,
    }
}

/// The terminal's answer, if it can be queried.
pub fn ask() -> Vec<u8> {
    let mut answer = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() || !io::stdout().is_terminal() {
        return answer;
    }
    let Some(_raw_mode) = RawMode::begin() else {
        return answer;
    };
    if output::draw(QUESTION).is_err() {
        return answer;
    }
    let mut byte = [0];
    let mut stdin = stdin.lock();
    let whole = |answer: &[u8]| {
        let from = answer.windows(3).position(|bytes| bytes == b"\x1b[?");
        from.is_some_and(|from| answer[from..].contains(&b'c'))
    };
    while answer.len() < MOST_ANSWER && !whole(&answer) {
        match stdin.read(&mut byte) {
            Ok(1) => answer.push(byte[0]),
            _ => break,
        }
    }
    answer
}

/// While it exists, the terminal does not echo input and does not buffer it.
struct RawMode(libc::termios);

impl RawMode {
    fn begin() -> Option<Self> {
        // SAFETY: a structure of numbers, for which zeros are values.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: asks for this process' groups, and fills a structure that lives until the call returns.
        let ours = unsafe {
            libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp()
                && libc::tcgetattr(libc::STDIN_FILENO, &raw mut before) == 0
        };
        // A background process would be stopped.
        if !ours {
            return None;
        }
        let mut quiet = before;
        // Signals are disabled too: a kill here would leave the terminal without echo.
        quiet.c_lflag &= !(libc::ICANON | libc::ECHO | libc::ISIG);
        quiet.c_cc[libc::VMIN] = 0;
        quiet.c_cc[libc::VTIME] = PATIENCE;
        set(&quiet).then_some(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        set(&self.0);
    }
}

fn set(mode: &libc::termios) -> bool {
    // SAFETY: the call reads a structure that lives until it returns.
    unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSAFLUSH, mode) == 0 }
}

#[cfg(test)]
mod tests;
