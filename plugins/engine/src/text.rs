//! A text encoder in a folder in Hugging Face's format, and captions as features.
//!
//! ```text
//! folder/  config.json  tokenizer.json  model.safetensors | pytorch_model.bin | several of either and their .index.json
//! ```
//!
//! A text is cleaned as in LlamaGen's own code ([`caption`]), and cut if it is too long for the model.

pub mod caption;
mod entities;
mod markup;
mod repair;
mod tokenizer;

use std::path::{Path, PathBuf};

use retort_checkpoint::sharded_weights::ShardPlace;
use retort_checkpoint::{Checkpoint, json, regular};

use self::tokenizer::BoundedTokenizer;
use crate::backend::Backend;
use crate::captions;
use crate::error::{Error, Result};
use crate::model::t5::{Config, EMBEDDINGS, Encoder};
use crate::weights::{CheckpointWeights, Loader, ParameterSource};

/// An encoder that has not been loaded yet.
pub struct TextEncoder {
    dir: PathBuf,
    config: Config,
    tokenizer: BoundedTokenizer,
}

/// The most bytes of `config.json`.
const CONFIG: u64 = 1 << 20;

/// Texts encoded at a time.
const BATCH: usize = 16;

impl TextEncoder {
    /// Reads configuration and tokenizer of a folder and finds its weights.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = regular::read(&path, CONFIG).map_err(Error::io(&path))?;
        let config: Config = json::parse(&text).map_err(|e| Error::data(&path, e))?;
        config.check().map_err(|e| Error::data(&path, e))?;
        let tokenizer = BoundedTokenizer::open(&dir.join("tokenizer.json"))?;
        if let ShardPlace::Index(index) = ShardPlace::find(dir).map_err(Error::checkpoint(dir))? {
            let files = index
                .files()
                .filter(|(_, weights)| weights.iter().any(|name| is_wanted(name)))
                .map(|(file, _)| index.path_of(file));
            if let Some(missing) = files.into_iter().find(|file| !file.exists()) {
                let message = "does not exist, but the index beside it names it";
                return Err(Error::data(missing, message));
            }
        }
        Ok(Self {
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
        let path = self.tokenizer.path().to_owned();
        let encode = |text: &String| {
            let ids = self.tokenizer.ids(&caption::clean(text), most)?;
            if ids.len() > most {
                let message = format!(
                    "{} tokens of a text that is cut to {most}: its post_processor adds too many",
                    ids.len()
                );
                return Err(Error::data(&path, message));
            }
            match ids
                .iter()
                .find(|&&id| id as usize >= self.config.vocab_size)
            {
                Some(id) => {
                    let all = self.config.vocab_size;
                    let message = format!("token {id}, but config.json declares {all} tokens");
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

    /// Writes the features of texts for a model that takes `most` tokens. `told` gets how many are done, and may stop the
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
        let checkpoint = Checkpoint::open_part(&self.dir, is_wanted);
        let checkpoint = checkpoint.map_err(Error::checkpoint(&self.dir))?;
        let all = checkpoint.select(None);
        let all = all.map_err(Error::checkpoint(&self.dir))?.clone();
        let stored = CheckpointWeights::of(&self.dir, checkpoint, all);
        let has = |name: &&&str| stored.shape(name).is_some();
        let embeddings = EMBEDDINGS.iter().find(has).unwrap_or(&EMBEDDINGS[0]);
        let origin = self.dir.display().to_string();
        let source = ParameterSource::Files(std::slice::from_ref(&stored));
        let mut loader = Loader::new(backend, source, false, origin);
        Encoder::load(&mut loader, &self.config, embeddings)
    }
}

/// Whether a weight belongs to the encoder: the decoder's may be in separate files, which are not needed.
fn is_wanted(name: &str) -> bool {
    !name.starts_with("decoder.") && name != "lm_head.weight"
}
