//! Progress of the running stages, on a terminal or in plain lines.
