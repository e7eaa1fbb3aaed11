//! An HTTP response before it is written: status, type, headers, content.

use std::io;

use hyper::body::Bytes;
use tokio::sync::mpsc::Receiver;

use crate::filter::FilterError;
use crate::store::StoreError;

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The type of the content.
    pub kind: &'static str,
    /// Whether the content never changes under its address.
    pub forever: bool,
    /// Further headers.
    pub headers: Vec<(&'static str, String)>,
    /// The content.
    pub content: Content,
}

/// The body of an answer.
#[derive(Debug)]
pub enum Content {
    /// All of it.
    Buffered(Bytes),
    /// A stream.
    Streamed(Receiver<io::Result<Bytes>>),
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Nothing has this address or name.
    #[error("{0}")]
    NotFound(String),
    /// The request is invalid.
    #[error("{0}")]
    BadRequest(String),
    /// It is not allowed.
    #[error("{0}")]
    Refused(String),
    /// A filter, or the name of a field.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The store failed.
    #[error(transparent)]
    Store(StoreError),
    /// A file cannot be read.
    #[error("{0}")]
    File(String),
}

impl From<StoreError> for HttpError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Filter(error) => Self::Filter(*error),
            error => Self::Store(error),
        }
    }
}

impl HttpError {
    /// Its HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::NotFound(_) => 404,
            Self::BadRequest(_) | Self::Filter(_) => 400,
            Self::Refused(_) => 403,
            Self::Store(
                StoreError::NoRun { .. }
                | StoreError::AmbiguousRun { .. }
                | StoreError::NoArtifact { .. }
                | StoreError::AmbiguousArtifact { .. },
            ) => 404,
            Self::Store(StoreError::Busy | StoreError::InUse | StoreError::Elsewhere { .. }) => 409,
            Self::Store(_) | Self::File(_) => 500,
        }
    }
}

/// The content type of pages.
pub const HTML: &str = "text/html; charset=utf-8";
/// The content type of plain texts.
pub const TEXT: &str = "text/plain; charset=utf-8";
/// The content type of data.
pub const JSON: &str = "application/json";

impl Reply {
    /// An answer with content of a type.
    pub fn new(kind: &'static str, content: impl Into<Bytes>) -> Self {
        Self {
            status: 200,
            kind,
            forever: false,
            headers: Vec::new(),
            content: Content::Buffered(content.into()),
        }
    }

    /// The same with another status.
    pub fn status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    /// The same, for download.
    pub fn forever(mut self) -> Self {
        self.forever = true;
        self
    }

    /// The same with a header.
    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// A redirection to another page.
    pub fn see(place: &str) -> Self {
        Self::new(TEXT, "").status(303).header("location", place)
    }

    /// The content as text, for tests.
    #[cfg(test)]
    pub fn text(&self) -> String {
        match &self.content {
            Content::Buffered(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Content::Streamed(_) => String::new(),
        }
    }
}
