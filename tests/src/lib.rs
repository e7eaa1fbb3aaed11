//! Tests through the real binary; they are in `tests/`. Deliberately absent: anything that is not a test.
