//! Rows, printed for people (a table, Markdown) or for programs (JSON, CSV).
//!
//! A cell has both: a text for people ("3 min ago") and its raw value. Only this module knows the formats;
//! it returns text, and printing is the command line's.

use std::borrow::Cow;

use comfy_table::{
    Attribute, Cell as TableCell, CellAlignment, Color, ContentArrangement, presets,
};
use serde_json::{Map, Number, Value};

use crate::store::{AnswerValue, RunState, StageState, Time};
use crate::terminal::{clean, clean_line, name, painted};

mod stream;
#[cfg(test)]
mod tests;

pub use stream::{Stream, end_list, list_value};

/// How rows are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Aligned columns.
    Table {
        /// Width of the terminal, in columns: longer rows are wrapped. None: unlimited.
        width: Option<u16>,
        /// Whether to use colours.
        color: bool,
    },
    /// A Markdown table.
    Markdown,
    /// A list of objects, one per row.
    Json,
    /// Comma-separated values with a header line.
    Csv,
}

/// Rows under a title.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    /// Printed above the rows, for people; may be empty.
    pub title: String,
    heads: Vec<String>,
    rows: Vec<Vec<Cell>>,
}

/// A cell: a text for people and its raw value.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    text: String,
    data: Value,
    style: CellStyle,
}

/// A text's meaning, shown as a colour.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CellStyle {
    /// Nothing in particular.
    #[default]
    Plain,
    /// Well.
    Ok,
    /// Not well.
    Error,
    /// To be looked at.
    Warning,
    /// Of less interest.
    Dim,
}

/// Rows of a table. All of them are kept in memory for the layout, some kilobytes each.
const MOST_ROWS: usize = 10_000;
/// Characters of a table, blanks included: one long cell makes every line as long.
const MOST_CHARACTERS: usize = 32 << 20;

impl Rows {
    /// No rows yet, under these column heads.
    pub fn new(heads: &[&str]) -> Self {
        Self {
            heads: heads.iter().map(|head| (*head).to_owned()).collect(),
            ..Self::default()
        }
    }

    /// Under a title.
    pub fn titled(mut self, title: impl Into<String>) -> Self {
        self.title = title.into();
        self
    }

    /// Adds a row: one cell per head. A row of another length is a bug.
    pub fn push(&mut self, row: impl IntoIterator<Item = Cell>) {
        self.rows.push(row.into_iter().collect());
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// The rows as text, ending in a line feed.
    pub fn render(&self, style: Style) -> String {
        match style {
            Style::Table { width, color } => self.table(width, color),
            Style::Markdown => self.markdown(),
            Style::Json => format!("{:#}\n", self.objects()),
            Style::Csv => self.csv(),
        }
    }

    /// The rows as text that follows what was rendered before, for a list that grows: CSV and Markdown without heads.
    pub fn render_more(&self, style: Style) -> String {
        let text = self.render(style);
        let heads = match style {
            Style::Markdown => 2,
            Style::Csv => 1,
            Style::Table { .. } | Style::Json => 0,
        };
        text.split_inclusive('\n').skip(heads).collect()
    }

    /// The rows as a list of objects.
    pub fn objects(&self) -> Value {
        self.rows
            .iter()
            .map(|row| object(&self.heads, row))
            .collect()
    }

    fn table(&self, width: Option<u16>, color: bool) -> String {
        let mut table = comfy_table::Table::new();
        table
            .load_style(presets::NOTHING)
            .force_no_tty()
            .set_content_arrangement(ContentArrangement::Dynamic);
        if let Some(width) = width {
            table.set_width(width);
        }
        if color {
            table.enforce_styling();
        }
        // Without heads the rows are a list of names and values.
        if self.heads.iter().any(|head| !head.is_empty()) {
            table.set_header(self.heads.iter().map(|head| {
                let cell = TableCell::new(visible(head, false));
                if color {
                    cell.add_attribute(Attribute::Bold)
                } else {
                    cell
                }
            }));
        }
        let most = self.longest_cell();
        for row in self.rows.iter().take(MOST_ROWS) {
            table.add_row(row.iter().map(|cell| {
                let text = visible(&shortened(&cell.text, most), true);
                styled(TableCell::new(text), cell.style)
            }));
        }
        for (place, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if self.is_numeric(place) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let title = if self.title.is_empty() {
            String::new()
        } else {
            format!("{}\n", visible(&self.title, false))
        };
        let more = match self.rows.len().saturating_sub(MOST_ROWS) {
            0 => String::new(),
            more => format!(
                "... and {more} more; CSV and JSON have all {}\n",
                self.rows.len()
            ),
        };
        // The cells are escaped: remaining escape sequences are our colours.
        format!("{title}{}\n{more}", painted(&table.trim_fmt()))
    }

    fn markdown(&self) -> String {
        let line = |cells: &mut dyn Iterator<Item = String>| {
            format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
        };
        let escape = |text: &str| {
            visible(text, false)
                .replace('\\', "\\\\")
                .replace('|', "\\|")
        };
        let mut text = if self.title.is_empty() {
            String::new()
        } else {
            format!("**{}**\n\n", escape(&self.title))
        };
        text += &line(&mut self.heads.iter().map(|head| escape(head)));
        text += &line(&mut (0..self.heads.len()).map(|place| {
            if self.is_numeric(place) {
                "---:"
            } else {
                "---"
            }
            .to_owned()
        }));
        for row in &self.rows {
            text += &line(&mut row.iter().map(|cell| escape(&cell.text)));
        }
        text
    }

    fn csv(&self) -> String {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let data = self
            .rows
            .iter()
            .map(|row| row.iter().map(|cell| plain(&cell.data)).collect::<Vec<_>>());
        let heads = self.heads.clone();
        for record in std::iter::once(heads).chain(data) {
            // Into memory, and every row as long as the first: neither can fail. A row that is not is a bug to be seen.
            if let Err(error) = writer.write_record(&record) {
                debug_assert!(false, "{error}");
            }
        }
        writer
            .into_inner()
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The most lines of a cell, and characters of each, with which the table stays within [`MOST_CHARACTERS`]. What a
    /// table of usual texts holds is never shortened.
    fn longest_cell(&self) -> usize {
        let rows = || self.rows.iter().take(MOST_ROWS);
        let takes = |most: usize| {
            let lines = rows().map(|row| {
                let lines = row.iter().map(|cell| cell.text.lines().count().min(most));
                lines.max().unwrap_or(0).max(1)
            });
            let mut widths = vec![0; self.heads.len()];
            for (width, cell) in rows().flat_map(|row| widths_of(row, most)) {
                if let Some(widest) = widths.get_mut(cell) {
                    *widest = width.max(*widest);
                }
            }
            lines.sum::<usize>().saturating_mul(widths.iter().sum())
        };
        let mut limits = [usize::MAX, 4096, 1024, 256, 64].into_iter();
        limits
            .find(|most| takes(*most) <= MOST_CHARACTERS)
            .unwrap_or(16)
    }

    /// Whether a column holds numbers and nothing else, so that it is aligned to the right.
    fn is_numeric(&self, place: usize) -> bool {
        let mut cells = self
            .rows
            .iter()
            .filter_map(|row| row.get(place))
            .filter(|cell| !cell.data.is_null())
            .peekable();
        cells.peek().is_some()
            && cells.all(|cell| cell.data.is_number() || is_non_finite(&cell.data))
    }
}

impl Cell {
    /// A text for people, and the datum behind it.
    pub fn new(text: impl Into<String>, data: impl Into<Value>) -> Self {
        Self {
            text: text.into(),
            data: data.into(),
            style: CellStyle::Plain,
        }
    }

    /// A name that a file brings: for people on one line, whatever is in it.
    pub fn name(text: &str) -> Self {
        Self::new(name(text), text)
    }

    /// The text for people.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Nothing.
    pub fn none() -> Self {
        Self::new("", Value::Null)
    }

    /// A number, shown with about six digits.
    pub fn number(value: f64) -> Self {
        let text = number(value);
        match Number::from_f64(value) {
            Some(data) => Self::new(text, data),
            None => Self::new(text, non_finite(value)),
        }
    }

    /// A JSON value: texts as they are, numbers in brief, the rest as JSON.
    pub fn json(value: &Value) -> Self {
        let text = match value {
            Value::Null => String::new(),
            Value::Number(number) if number.is_f64() => {
                self::number(number.as_f64().unwrap_or(f64::NAN))
            }
            value => plain(value),
        };
        Self::new(text, value.clone())
    }

    /// A hash: its beginning is enough for people.
    pub fn hash(hash: &str) -> Self {
        Self::new(hash.get(..12).unwrap_or(hash), hash)
    }

    /// A number of bytes.
    pub fn bytes(size: u64) -> Self {
        Self::new(bytes(size), size)
    }

    /// A duration in seconds.
    pub fn seconds(seconds: f64) -> Self {
        Self {
            text: duration(seconds),
            ..Self::number(seconds)
        }
    }

    /// The same with a mark behind the text for people.
    pub fn marked(mut self, mark: &str) -> Self {
        self.text.push_str(mark);
        self
    }

    /// The same in another style.
    pub fn style(mut self, style: CellStyle) -> Self {
        self.style = style;
        self
    }
}

impl From<RunState> for Cell {
    fn from(state: RunState) -> Self {
        let cell_style = match state {
            RunState::Succeeded => CellStyle::Ok,
            RunState::Failed | RunState::Lost => CellStyle::Error,
            RunState::Interrupted => CellStyle::Warning,
            RunState::Queued | RunState::Running => CellStyle::Plain,
        };
        Self::from(state.name()).style(cell_style)
    }
}

impl From<StageState> for Cell {
    fn from(state: StageState) -> Self {
        let cell_style = match state {
            StageState::Succeeded | StageState::Reused => CellStyle::Ok,
            StageState::Failed | StageState::Lost => CellStyle::Error,
            StageState::Interrupted => CellStyle::Warning,
            StageState::Skipped => CellStyle::Dim,
            StageState::Queued | StageState::Running => CellStyle::Plain,
        };
        Self::from(state.name()).style(cell_style)
    }
}

impl From<AnswerValue> for Cell {
    fn from(value: AnswerValue) -> Self {
        match value {
            AnswerValue::Real(number) => Self::number(number),
            AnswerValue::Json(value) => Self::json(&value),
        }
    }
}

impl From<Time> for Cell {
    /// For people: how long ago it was.
    fn from(time: Time) -> Self {
        Self::new(ago(time.seconds_to(Time::now())), time.to_string())
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::new(text, text)
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::new(text.clone(), text)
    }
}

impl From<u64> for Cell {
    fn from(number: u64) -> Self {
        Self::new(number.to_string(), number)
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(cell: Option<T>) -> Self {
        cell.map_or_else(Self::none, Into::into)
    }
}

impl From<&retort_abi::Table> for Rows {
    fn from(table: &retort_abi::Table) -> Self {
        let mut rows = Self {
            title: table.title.clone(),
            heads: table.columns.clone(),
            rows: Vec::new(),
        };
        for row in &table.rows {
            // A plugin may give rows of any length.
            rows.push(
                (0..table.columns.len())
                    .map(|place| row.get(place).map_or_else(Cell::none, Cell::json)),
            );
        }
        rows
    }
}

/// A number in brief: about six digits.
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 {
            "∞".to_owned()
        } else {
            "-∞".to_owned()
        }
    } else if value == value.trunc() && magnitude < 1e9 {
        format!("{value}")
    } else if (1e-4..1e9).contains(&magnitude) {
        // Six digits in all, of which so many before the point.
        let before = magnitude.log10().floor() as i32 + 1;
        let text = format!("{value:.*}", usize::try_from(6 - before).unwrap_or(0));
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            text
        }
    } else {
        format!("{value:.4e}")
    }
}

/// A number of bytes in brief: `1.5 MB`.
pub fn bytes(size: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = size as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 { 0 } else { 1 };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A duration in brief: `0.3 s`, `1m 05s`, `2h 10m`, `3d 4h`.
pub fn duration(seconds: f64) -> String {
    if seconds < 59.95 {
        return format!("{:.1} s", seconds.max(0.0));
    }
    let whole = seconds.round() as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}m {:02}s", whole % 60),
        (0, _) => format!("{hours}h {minutes:02}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// How long ago something was: `just now`, `5 min ago`, `3 days ago`; or will be, which says that a clock was wrong.
pub fn ago(seconds: f64) -> String {
    // Clocks of machines differ by some seconds.
    if seconds < -60.0 {
        let until = ago(-seconds);
        return format!("in {} (clock?)", until.trim_end_matches(" ago"));
    }
    let count = |unit: f64, name: &str| {
        let number = (seconds / unit).floor();
        let plural = if number == 1.0 || name == "min" {
            ""
        } else {
            "s"
        };
        format!("{number} {name}{plural} ago")
    };
    match seconds {
        ..10.0 => "just now".to_owned(),
        ..60.0 => format!("{seconds:.0} s ago"),
        ..3600.0 => count(60.0, "min"),
        ..86_400.0 => count(3600.0, "hour"),
        _ => count(86_400.0, "day"),
    }
}

fn object(heads: &[String], row: &[Cell]) -> Value {
    let data = row.iter().map(|cell| cell.data.clone());
    Value::Object(Map::from_iter(heads.iter().cloned().zip(data)))
}

/// The widths of the cells of a row, no more than `most`, and their places.
fn widths_of(row: &[Cell], most: usize) -> impl Iterator<Item = (usize, usize)> {
    row.iter().enumerate().map(move |(place, cell)| {
        let widths = cell
            .text
            .lines()
            .map(|line| line.chars().take(most).count());
        (widths.max().unwrap_or(0), place)
    })
}

/// A text of at most so many lines, each of at most so many characters.
fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    let fits = text.len() <= most
        || (text.lines().count() <= most && text.lines().all(|line| line.chars().count() <= most));
    if fits {
        return Cow::Borrowed(text);
    }
    let lines = text.lines().take(most).map(|line| {
        let kept = line
            .char_indices()
            .nth(most)
            .map_or(line, |(end, _)| &line[..end]);
        let more = if kept.len() < line.len() { "..." } else { "" };
        format!("{kept}{more}")
    });
    let mut kept = lines.collect::<Vec<_>>().join("\n");
    if text.lines().count() > most {
        kept.push_str("\n...");
    }
    Cow::Owned(kept)
}

fn styled(cell: TableCell, cell_style: CellStyle) -> TableCell {
    match cell_style {
        CellStyle::Plain => cell,
        CellStyle::Ok => cell.fg(Color::Green),
        CellStyle::Error => cell.fg(Color::Red),
        CellStyle::Warning => cell.fg(Color::Yellow),
        CellStyle::Dim => cell.add_attribute(Attribute::Dim),
    }
}

/// A datum as CSV has it: texts as they are, nothing for null, the rest as JSON.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}

fn non_finite(value: f64) -> &'static str {
    if value.is_nan() {
        "NaN"
    } else if value > 0.0 {
        "Infinity"
    } else {
        "-Infinity"
    }
}

fn is_non_finite(value: &Value) -> bool {
    matches!(value.as_str(), Some("NaN" | "Infinity" | "-Infinity"))
}

/// A text that cannot play tricks with the terminal: names come from anywhere. Line feeds stay where a cell may have
/// several lines.
fn visible(text: &str, lines: bool) -> String {
    match lines {
        true => clean(&text.replace('\t', " ")).into_owned(),
        false => clean_line(text),
    }
}
