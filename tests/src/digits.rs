//! The recipe that most whole runs start from: a tokenizer and a teacher that train in seconds, on the handwritten digits.

use std::path::{Path, PathBuf};

/// A recipe with two stages, `codes` and `teacher`, and those that a test adds.
#[derive(Debug, Clone, Copy)]
pub struct Digits<'a> {
    /// The backend, by its plugin.
    pub backend: &'a str,
    /// Further lines at the top of the recipe: `seed: 3`.
    pub top: &'a str,
    /// Further options of the tokenizer: `train: {steps: 40}`.
    pub codes: &'a str,
    /// Size and further options of the teacher.
    pub teacher: &'a str,
}

impl Digits<'_> {
    /// The recipe with these stages appended, each indented by two spaces.
    pub fn recipe(&self, stages: &str) -> String {
        let Self {
            backend,
            top,
            codes,
            teacher,
        } = self;
        let digits = file();
        let digits = digits.display();
        let stages = stages.trim_start_matches('\n');
        format!(
            "\
version: 1
backend: {backend}
{top}
params:
  data: {{csv: {digits}, height: 8, width: 8, max: 16}}
stages:
  codes: {{kind: tokenizer, data: \"${{params.data}}\", codebook_size: 16, codebook_dim: 4, channels: 8, z_channels: 8, {codes}}}
  teacher: {{kind: pretrain, tokenizer: codes, data: \"${{params.data}}\", {teacher}}}
{stages}"
        )
    }
}

/// The digits: 8 x 8 grey values and a class, one image per line.
///
/// # Panics
/// They are missing in the repository.
pub fn file() -> PathBuf {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/data/digits.csv");
    file.canonicalize().expect("the digits")
}
