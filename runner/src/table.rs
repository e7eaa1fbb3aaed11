//! Printing rows as a table, JSON, CSV or Markdown.
