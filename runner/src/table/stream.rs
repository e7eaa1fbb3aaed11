//! Rows that are printed as they come: as many as there are, in little memory.
//!
//! JSON and CSV take a row at a time. A table, and Markdown with its columns of numbers, need to know all rows before the
//! first is printed: of these the first [`MOST_ROWS`] are.

use std::io::{self, Write};

use serde_json::Value;

use super::{Cell, MOST_ROWS, Rows, Style, object, plain};

/// Bytes of a table's texts.
const MOST_BYTES: usize = 32 << 20;

/// Rows on their way out.
#[derive(Debug)]
pub struct Stream<W: Write> {
    style: Style,
    out: W,
    /// Of a table, what will be printed; otherwise its heads alone.
    rows: Rows,
    count: usize,
    bytes: usize,
}

impl<W: Write> Stream<W> {
    /// No rows yet, under these column heads.
    ///
    /// # Errors
    /// Of writing.
    pub fn new(heads: &[&str], style: Style, mut out: W) -> io::Result<Self> {
        let rows = Rows::new(heads);
        match style {
            Style::Csv => out.write_all(record(rows.heads.iter().cloned()).as_bytes())?,
            Style::Json | Style::Table { .. } | Style::Markdown => {}
        }
        Ok(Self {
            style,
            out,
            rows,
            count: 0,
            bytes: 0,
        })
    }

    /// Prints a row, or keeps it; whether there may be more.
    ///
    /// # Errors
    /// Of writing.
    pub fn push(&mut self, row: Vec<Cell>) -> io::Result<bool> {
        match self.style {
            Style::Csv => {
                let text = record(row.iter().map(|cell| plain(&cell.data)));
                self.out.write_all(text.as_bytes())?;
            }
            Style::Json => {
                let value = object(&self.rows.heads, &row);
                list_value(&mut self.out, self.count == 0, &value)?;
            }
            Style::Table { .. } | Style::Markdown => {
                let bytes = row
                    .iter()
                    .map(|cell| cell.text.len() + plain(&cell.data).len());
                self.bytes += bytes.sum::<usize>();
                if self.count >= MOST_ROWS || self.bytes > MOST_BYTES {
                    return Ok(false);
                }
                self.rows.push(row);
            }
        }
        self.count += 1;
        Ok(true)
    }

    /// Prints the rest; how many rows there were.
    ///
    /// # Errors
    /// Of writing.
    pub fn end(mut self) -> io::Result<usize> {
        match self.style {
            Style::Csv => {}
            Style::Json => end_list(&mut self.out, self.count == 0)?,
            style => self.out.write_all(self.rows.render(style).as_bytes())?,
        }
        self.out.flush()?;
        Ok(self.count)
    }
}

/// Writes a value of a JSON list. Before the first nothing is written, so that a failure until then leaves no half of a list.
///
/// # Errors
/// Of writing.
pub fn list_value(out: &mut impl Write, is_first: bool, value: &Value) -> io::Result<()> {
    let before = if is_first { "[" } else { "," };
    let text = format!("{value:#}").replace('\n', "\n  ");
    write!(out, "{before}\n  {text}")
}

/// Writes the end of a JSON list.
///
/// # Errors
/// Of writing.
pub fn end_list(out: &mut impl Write, is_empty: bool) -> io::Result<()> {
    out.write_all(if is_empty { b"[]\n" } else { b"\n]\n" })
}

/// A line of CSV.
fn record(fields: impl Iterator<Item = String>) -> String {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let written = writer.write_record(fields.collect::<Vec<_>>());
    // Into memory: it cannot fail.
    debug_assert!(written.is_ok());
    let bytes = writer.into_inner().unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streamed(style: Style, rows: &[Vec<Cell>]) -> String {
        let mut out = Vec::new();
        let mut stream = Stream::new(&["name", "value"], style, &mut out).unwrap();
        for row in rows {
            assert!(stream.push(row.clone()).unwrap());
        }
        assert_eq!(stream.end().unwrap(), rows.len());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn rows_come_out_as_if_they_had_been_collected() {
        let rows = [
            vec!["a, \"b\"\nc".into(), Cell::number(0.5)],
            vec![Cell::none(), Cell::number(f64::NAN)],
        ];
        for count in 0..=rows.len() {
            let mut collected = Rows::new(&["name", "value"]);
            for row in &rows[..count] {
                collected.push(row.clone());
            }
            let table = Style::Table {
                width: None,
                color: false,
            };
            for style in [Style::Json, Style::Csv, Style::Markdown, table] {
                assert_eq!(streamed(style, &rows[..count]), collected.render(style));
            }
        }
    }

    #[test]
    fn a_table_ends_and_what_is_for_programs_does_not() {
        let style = Style::Table {
            width: None,
            color: false,
        };
        let mut table = Stream::new(&["n"], style, io::sink()).unwrap();
        let mut lines = Stream::new(&["n"], Style::Csv, io::sink()).unwrap();
        for number in 0..MOST_ROWS as u64 {
            assert!(table.push(vec![number.into()]).unwrap());
            assert!(lines.push(vec![number.into()]).unwrap());
        }
        assert!(!table.push(vec![1_u64.into()]).unwrap());
        assert!(lines.push(vec![1_u64.into()]).unwrap());
        assert_eq!(table.end().unwrap(), MOST_ROWS);
        assert_eq!(lines.end().unwrap(), MOST_ROWS + 1);
        let mut wide = Stream::new(&["n"], style, io::sink()).unwrap();
        assert!(!wide.push(vec!["x".repeat(MOST_BYTES).into()]).unwrap());
    }
}
