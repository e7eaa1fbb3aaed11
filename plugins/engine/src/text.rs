//! A text encoder in a folder as Hugging Face publishes it, and captions as features.
//!
//! ```text
//! folder/  config.json  tokenizer.json  model.safetensors | pytorch_model.bin | several of either and their .index.json
//! ```
//!
//! A text is brought to lower case and its white space to single blanks, as LlamaGen's own code does before anything else;
//! what that code removes from captions found on web pages (addresses, markup) is not looked for. A text longer than the
//! model takes is cut.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tokenizers::{Tokenizer, TruncationParams};

use crate::backend::Backend;
use crate::captions;
use crate::error::{Error, Result};
use crate::model::t5::{Config, EMBEDDINGS, Encoder};
use crate::weights::{Loader, Source, Stored};

/// An encoder that has not been loaded yet.
pub struct TextEncoder {
    dir: PathBuf,
    config: Config,
    tokenizer: Tokenizer,
    files: Vec<PathBuf>,
}

/// `*.index.json`: which file holds which weight.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Texts encoded at a time.
const BATCH: usize = 16;

impl TextEncoder {
    /// Reads configuration and tokenizer of a folder and finds its weights.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let config: Config = read_json(&path)?;
        config.check().map_err(|e| Error::data(&path, e))?;
        let path = dir.join("tokenizer.json");
        let text = std::fs::read(&path).map_err(Error::io(&path))?;
        let tokenizer = Tokenizer::from_bytes(text).map_err(|e| Error::data(&path, e))?;
        Ok(Self {
            files: weight_files(dir)?,
            dir: dir.to_owned(),
            config,
            tokenizer,
        })
    }

    /// Width F of a token's features.
    pub fn width(&self) -> usize {
        self.config.d_model
    }

    /// Token ids of texts, at most `most` each.
    fn tokens(&mut self, texts: &[String], most: usize) -> Result<Vec<Vec<u32>>> {
        let path = self.dir.join("tokenizer.json");
        let wrong = |e: tokenizers::Error| Error::data(&path, e);
        self.tokenizer.with_padding(None);
        let cut = TruncationParams {
            max_length: most,
            ..Default::default()
        };
        self.tokenizer.with_truncation(Some(cut)).map_err(wrong)?;
        let encode = |text: &String| {
            let text = text.to_lowercase();
            let words: Vec<&str> = text.split_whitespace().collect();
            let encoding = self
                .tokenizer
                .encode(words.join(" "), true)
                .map_err(wrong)?;
            let ids = encoding.get_ids().to_vec();
            match ids
                .iter()
                .find(|&&id| id as usize >= self.config.vocab_size)
            {
                Some(id) => {
                    let all = self.config.vocab_size;
                    let message = format!("token {id}, but config.json speaks of {all} tokens");
                    Err(Error::data(&path, message))
                }
                None if ids.is_empty() => {
                    Err(Error::data(&path, format!("no token in the text {text:?}")))
                }
                None => Ok(ids),
            }
        };
        texts.iter().map(encode).collect()
    }

    /// Writes the features of texts for a model that takes `most` tokens. `told` hears how many are done, and may stop the
    /// work by an error.
    pub fn encode<B: Backend>(
        mut self,
        backend: &B,
        texts: &[String],
        most: usize,
        path: &Path,
        mut told: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let tokens = self.tokens(texts, most)?;
        let encoder = self.load(backend)?;
        let lengths: Vec<u32> = tokens.iter().map(|ids| ids.len() as u32).collect();
        let (mut done, width) = (0, self.width());
        captions::write(path, &lengths, width, |give| {
            for batch in tokens.chunks(BATCH) {
                told(done)?;
                let ids: Vec<&[u32]> = batch.iter().map(Vec::as_slice).collect();
                let features = B::to_floats(&encoder.forward(backend, &ids)?)?; // (b, l, F)
                let row = features.len() / ids.len();
                for (row, ids) in features.chunks_exact(row).zip(&ids) {
                    give(&row[..ids.len() * width])?;
                }
                done += ids.len();
            }
            told(done)
        })
    }

    /// Loads the weights.
    fn load<B: Backend>(&self, backend: &B) -> Result<Encoder<B>> {
        let files: Vec<Stored> = self
            .files
            .iter()
            .map(|path| Stored::open(path, None))
            .collect::<Result<_>>()?;
        let has = |name: &&&str| files.iter().any(|file| file.shape(name).is_some());
        let embeddings = EMBEDDINGS.iter().find(has).unwrap_or(&EMBEDDINGS[0]);
        let origin = match self.files.as_slice() {
            [only] => only.display().to_string(),
            _ => self.dir.display().to_string(),
        };
        let mut loader = Loader::new(backend, Source::Files(&files), false, origin);
        Encoder::load(&mut loader, &self.config, embeddings)
    }
}

/// The files with the weights, whichever the folder has.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    for name in ["model.safetensors", "pytorch_model.bin"] {
        let (path, index) = (dir.join(name), dir.join(format!("{name}.index.json")));
        if path.exists() {
            return Ok(vec![path]);
        }
        if index.exists() {
            let Index { weight_map } = read_json(&index)?;
            // The decoder's weights may lie in a file of their own, which is not needed.
            let wanted = weight_map
                .iter()
                .filter(|(name, _)| !name.starts_with("decoder.") && *name != "lm_head.weight");
            let mut files: Vec<PathBuf> = wanted.map(|(_, file)| dir.join(file)).collect();
            files.sort();
            files.dedup();
            return match files.iter().find(|file| !file.exists()) {
                Some(file) => Err(Error::data(
                    file,
                    format!("does not exist, but {} names it", index.display()),
                )),
                None => Ok(files),
            };
        }
    }
    let message =
        "no model.safetensors and no pytorch_model.bin in this folder, nor their .index.json";
    Err(Error::data(dir, message))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| Error::data(path, e))
}
