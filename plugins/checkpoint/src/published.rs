//! Networks of an artifact, exported for the published scripts.
//!
//! In: a directory with `config.json` and weights under published names, as `tokenizer`, `teacher` and `student` stages
//! write it. Out: a torch file with the weights where those scripts look, and with the buffers without which they refuse
//! it:
//!
//! ```text
//! VAR       tokenizer, teacher   weights at the top
//!           student              trainer.ema_parameters, trainer.var_wo_ddp
//! LlamaGen  tokenizer, teacher   model
//!           student              ema, model
//! ```
//!
//! A student's artifact contains only the moving average: both names refer to it, and its elements are stored once.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::writer::TorchWriter;
use crate::{Checkpoint, Dictionary, json, regular};

/// A network of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArtifactNetwork {
    /// The teacher or student.
    Network,
    /// The tokenizer.
    Tokenizer,
}

/// What an artifact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A tokenizer.
    Tokenizer,
    /// A teacher.
    Teacher,
    /// A student.
    Student,
}

impl Kind {
    /// The network that the artifact is named after.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "tokenizer" => Some(Self::Tokenizer),
            "teacher" => Some(Self::Teacher),
            "student" => Some(Self::Student),
            _ => None,
        }
    }
}

/// An error, and the file it is about.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct ExportError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub message: String,
}

/// The most bytes of a configuration.
const CONFIG_MOST: u64 = 1 << 20;
/// Counters that the file of LlamaGen's tokenizer always has.
const CODEBOOK_USED: usize = 65536;
/// The most tokens of an image: the mask has an entry for each pair of them.
const TOKENS_MOST: u64 = 1 << 14;
/// The most blocks of a network, and their greatest width.
const BLOCKS_MOST: u64 = 1000;
const WIDTH_MOST: u64 = 1 << 16;
/// The most counts of used codes, of all scales together.
const COUNTS_MOST: u64 = 1 << 24;

/// Writes a network of an artifact's directory to an empty file, of which `to` is the path.
///
/// # Errors
/// The directory holds no such network, or a file cannot be read or written.
pub fn export(
    dir: &Path,
    kind: Kind,
    part: ArtifactNetwork,
    (file, to): (File, &Path),
) -> Result<(), ExportError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |error: &dyn std::fmt::Display| ExportError {
            path: path.clone(),
            message: error.to_string(),
        }
    };
    let path = dir.join("config.json");
    let text = regular::read(&path, CONFIG_MOST).map_err(|e| at(&path)(&e))?;
    let config: Value = json::parse(&text).map_err(|e| at(&path)(&e))?;
    let family = |network: &str| config[network]["family"].as_str().map(str::to_owned);
    let (weights, name) = match part {
        ArtifactNetwork::Network => ("model.safetensors", "network"),
        ArtifactNetwork::Tokenizer => ("tokenizer.safetensors", "tokenizer"),
    };
    let family = family(name).ok_or_else(|| at(&path)(&"it holds no teacher or student"))?;
    check_size(name, &config[name]).map_err(|e| at(&path)(&e))?;
    let weights_at = dir.join(weights);
    let stored = Checkpoint::open(&weights_at).map_err(|e| at(&weights_at)(&e))?;
    let weights = stored.select(None).map_err(|e| at(&weights_at)(&e))?;

    let mut job = Job {
        stored: &stored,
        weights,
        config: &config,
        writer: TorchWriter::new(file),
    };
    let written = match (part, kind, family.as_str()) {
        (ArtifactNetwork::Tokenizer, _, "msvq") => job.all(Buffers::Msvq),
        (ArtifactNetwork::Tokenizer, _, "vq") => job.under(&["model"], Buffers::Vq),
        (_, Kind::Student, "var") => {
            job.writer.open("trainer");
            let done = job.under(&["ema_parameters", "var_wo_ddp"], Buffers::Var { first: 1 });
            job.writer.close();
            done
        }
        (_, _, "var") => job.all(Buffers::Var { first: 0 }),
        (_, Kind::Student, "llamagen") => job.under(&["ema", "model"], Buffers::None),
        (_, _, "llamagen") => job.under(&["model"], Buffers::None),
        (_, _, other) => {
            let message = format!("family {other} was never published");
            return Err(ExportError { path, message });
        }
    };
    written
        .and_then(|()| job.writer.finish())
        .map_err(|e| at(to)(&e))
}

/// Refuses a shape whose buffers are larger than those of any network: a few digits could demand all memory.
fn check_size(name: &str, shape: &Value) -> Result<(), String> {
    let number = |field: &str| shape[field].as_u64().unwrap_or(0);
    let sides = || shape["scales"].as_array().into_iter().flatten();
    let areas = sides()
        .map(|n| n.as_u64().unwrap_or(0))
        .map(|n| n.saturating_mul(n));
    let counts = number("vocabulary").saturating_mul(sides().count() as u64);
    for (what, found, most) in [
        (
            "tokens in all scales",
            areas.fold(0, u64::saturating_add),
            TOKENS_MOST,
        ),
        ("codes in all scales", counts, COUNTS_MOST),
        ("blocks", number("depth"), BLOCKS_MOST),
        ("channels", number("width"), WIDTH_MOST),
    ] {
        if found > most {
            return Err(format!(
                "`{name}` has {found} {what}, expected at most {most}"
            ));
        }
    }
    Ok(())
}

/// Which buffers accompany the weights.
#[derive(Clone, Copy)]
enum Buffers {
    None,
    /// Counts of used codes, one row a scale.
    Msvq,
    /// Counts of used codes.
    Vq,
    /// Levels, mask and the keys' bias; with the class as a scale of its own in front, `first` is 1.
    Var {
        first: usize,
    },
}

struct Job<'a> {
    stored: &'a Checkpoint,
    weights: &'a Dictionary,
    config: &'a Value,
    writer: TorchWriter,
}

impl Job<'_> {
    /// The same weights under each name.
    fn under(&mut self, names: &[&str], buffers: Buffers) -> std::io::Result<()> {
        for (number, name) in names.iter().enumerate() {
            self.writer.open(name);
            if number == 0 {
                self.all(buffers)?;
            } else {
                for (name, _) in self.weights.tensors() {
                    self.writer.again(name);
                }
                self.buffers(buffers, true)?;
            }
            self.writer.close();
        }
        Ok(())
    }

    fn all(&mut self, buffers: Buffers) -> std::io::Result<()> {
        for (name, tensor) in self.weights.tensors() {
            let data = self.stored.floats(tensor).map_err(std::io::Error::other)?;
            self.writer.floats(name, &tensor.shape, &data)?;
        }
        self.buffers(buffers, false)
    }

    fn buffers(&mut self, buffers: Buffers, again: bool) -> std::io::Result<()> {
        for (name, shape, values) in self.values(buffers) {
            if again {
                self.writer.again(&name);
                continue;
            }
            match values {
                Values::Floats(data) => self.writer.floats(&name, &shape, &data)?,
                Values::Longs(data) => self.writer.longs(&name, &shape, &data)?,
            }
        }
        Ok(())
    }

    /// Names, shapes and elements of buffers, for a checked shape.
    fn values(&self, buffers: Buffers) -> Vec<(String, Vec<usize>, Values)> {
        let number = |value: &Value| value.as_u64().unwrap_or(0) as usize;
        let zeros = |name: &str, shape: Vec<usize>| {
            let count = shape.iter().product();
            (name.to_owned(), shape, Values::Floats(vec![0.0; count]))
        };
        match buffers {
            Buffers::None => Vec::new(),
            Buffers::Vq => vec![zeros("quantize.codebook_used", vec![CODEBOOK_USED])],
            Buffers::Msvq => {
                let tokenizer = &self.config["tokenizer"];
                let scales = tokenizer["scales"].as_array().map_or(0, Vec::len);
                let codes = number(&tokenizer["vocabulary"]);
                vec![zeros("quantize.ema_vocab_hit_SV", vec![scales, codes])]
            }
            Buffers::Var { first } => {
                let network = &self.config["network"];
                let sides = network["scales"].as_array().into_iter().flatten();
                let cells = std::iter::repeat_n(1, first).chain(sides.map(|n| number(n).pow(2)));
                let levels = cells.enumerate();
                let levels = levels.flat_map(|(k, n)| std::iter::repeat_n(k as i64, n));
                let levels: Vec<i64> = levels.collect();
                let l = levels.len();
                let sees = |i: usize, j: usize| match first {
                    0 => levels[j] <= levels[i],
                    _ => levels[j] < levels[i] || i == j,
                };
                let mask = (0..l * l).map(|at| match sees(at / l, at % l) {
                    true => 0.0,
                    false => f32::NEG_INFINITY,
                });
                let mask = Values::Floats(mask.collect());
                let width = number(&network["width"]);
                let mut all = vec![
                    ("attn_bias_for_masking".to_owned(), vec![1, 1, l, l], mask),
                    ("lvl_1L".to_owned(), vec![1, l], Values::Longs(levels)),
                ];
                for block in 0..number(&network["depth"]) {
                    let name = format!("blocks.{block}.attn.zero_k_bias");
                    all.push(zeros(&name, vec![width]));
                }
                all
            }
        }
    }
}

enum Values {
    Floats(Vec<f32>),
    Longs(Vec<i64>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_without_end_are_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("out.pth");
        let check = |part, config: &str, expected: &str| {
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            let file = File::create(&to).unwrap();
            let found = export(dir.path(), Kind::Teacher, part, (file, &to));
            let said = found.unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        };
        for (fields, expected) in [
            (
                r#""scales": [100000]"#,
                "config.json: `network` has 10000000000 tokens in all scales, expected at most 16384",
            ),
            (
                r#""scales": [18446744073709551615, 1]"#,
                "`network` has 18446744073709551615 tokens",
            ),
            (
                r#""scales": [1], "depth": 1000000000000000000"#,
                "`network` has 1000000000000000000 blocks, expected at most 1000",
            ),
            (
                r#""scales": [1], "depth": 1, "width": 1000000000000"#,
                "`network` has 1000000000000 channels, expected at most 65536",
            ),
            // A published shape: the next step looks for its weights.
            (
                r#""scales": [1, 2, 3, 4, 6, 9, 13, 18, 24, 32], "depth": 36, "width": 2304"#,
                "model.safetensors: ",
            ),
        ] {
            let config = format!(r#"{{"network": {{"family": "var", {fields}}}}}"#);
            check(ArtifactNetwork::Network, &config, expected);
        }
        let codes =
            r#"{"tokenizer": {"family": "msvq", "vocabulary": 1000000000000, "scales": [1, 2]}}"#;
        let expected =
            "`tokenizer` has 2000000000000 codes in all scales, expected at most 16777216";
        check(ArtifactNetwork::Tokenizer, codes, expected);
    }
}
