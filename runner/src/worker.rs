//! The process that loads one plugin and runs one stage.
