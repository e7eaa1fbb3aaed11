//! stdout is for data, stderr for messages: only this module writes to either, or gives access ([`stdout`]).
//!
//! Everything written, including names and messages from untrusted sources, is escaped for terminals here
//! ([`terminal::show`]). Writing does not panic when the reader has gone away. While progress bars are on the screen,
//! messages are printed above them ([`attach`]).

use std::io::{self, IsTerminal, Write};
use std::sync::RwLock;

use indicatif::MultiProgress;
use tracing_subscriber::EnvFilter;

use crate::cli::{ColorChoice, Context};
use crate::terminal;

static BARS: RwLock<Option<MultiProgress>> = RwLock::new(None);

/// Writes data to stdout, safe for a terminal. A closed pipe is an error that folds into success: use `?`.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(terminal::show(text).as_bytes())?;
    stdout.flush()
}

/// Writes a picture to stdout: escape sequences made only of pixels, without any text.
pub fn draw(picture: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(picture.as_bytes())?;
    stdout.flush()
}

/// A writer for data in pieces, escaped for terminals like [`print`].
pub fn stdout() -> impl Write {
    io::BufWriter::new(SafeWriter {
        out: io::stdout().lock(),
        begun: Vec::new(),
    })
}

/// Escapes everything written through it ([`terminal::show`]).
struct SafeWriter<W> {
    out: W,
    /// The first bytes of an incomplete character.
    begun: Vec<u8>,
}

impl<W: Write> Write for SafeWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.begun.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.begun) {
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            _ => self.begun.len(),
        };
        let text = String::from_utf8_lossy(&self.begun[..whole]);
        self.out.write_all(terminal::show(&text).as_bytes())?;
        self.begun.drain(..whole);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes a line to stderr, above the progress bars if there are any. A missing reader is not an error: a terminal may be
/// closed at any moment.
pub fn say(line: &str) {
    let bars = BARS.read().ok().and_then(|bars| bars.clone());
    let _ = match bars {
        // Not `suspend`, which panics when the terminal is gone.
        Some(bars) => bars.println(terminal::show(line)),
        None => writeln!(io::stderr().lock(), "{}", terminal::show(line)),
    };
}

/// `1 stage`, `2 stages`.
pub fn count(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// From now on prints messages above these bars; `None` ends that.
pub fn attach(bars: Option<MultiProgress>) {
    if let Ok(mut current) = BARS.write() {
        *current = bars;
    }
}

/// Whether to colour what is written to `stream`.
pub fn wants_color(choice: ColorChoice, stream: &dyn Terminal) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => {
            let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
            !no_color && !dumb && stream.is_terminal()
        }
    }
}

/// Something that may be a terminal.
pub trait Terminal {
    /// Whether it is one.
    fn is_terminal(&self) -> bool;
}

impl Terminal for io::Stdout {
    fn is_terminal(&self) -> bool {
        IsTerminal::is_terminal(self)
    }
}

impl Terminal for io::Stderr {
    fn is_terminal(&self) -> bool {
        IsTerminal::is_terminal(self)
    }
}

/// Sends `tracing` to stderr: warnings by default, more with `-v`; RUST_LOG takes precedence.
pub fn start_tracing(context: &Context) {
    let level = match (context.quiet, context.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info,sqlx=warn",
        (_, 2) => "debug,sqlx=warn",
        _ => "trace",
    };
    let (filter, problem) = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => match EnvFilter::try_new(&text) {
            Ok(filter) => (filter, None),
            Err(error) => (
                EnvFilter::new(level),
                Some(format!("RUST_LOG is ignored: {error}")),
            ),
        },
        _ => (EnvFilter::new(level), None),
    };
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Its colours could not be distinguished from escape sequences in messages.
        .with_ansi(false)
        .with_target(context.verbose > 1)
        .without_time()
        .with_writer(|| LineWriter(Vec::new()))
        .try_init();
    if let Some(problem) = problem {
        tracing::warn!("{problem}");
    }
    // Only happens in a test that starts tracing twice.
    drop(started);
}

/// Collects an event and prints it when dropped.
struct LineWriter(Vec<u8>);

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        let text = String::from_utf8_lossy(&self.0);
        if !text.is_empty() {
            say(text.trim_end_matches('\n'));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_shown_as_the_whole_would_be() {
        let text = "a\u{9b}é🙂\x1b[2J\u{202e}\n";
        for size in 1..6 {
            let mut shown = SafeWriter {
                out: Vec::new(),
                begun: Vec::new(),
            };
            for piece in text.as_bytes().chunks(size) {
                shown.write_all(piece).unwrap();
            }
            assert_eq!(shown.out, terminal::show(text).as_bytes());
        }
    }
}
