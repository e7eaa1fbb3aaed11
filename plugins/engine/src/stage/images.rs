//! `images`: prepares a data set once for all stages that read it.
//!
//! Parts decode image files into the work directory, which holds a second copy of the decoded images until the stage ends.

use std::path::Path;

use retort_abi::{ArtifactDraft, ArtifactMeta, Cancel, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::Backend;
use crate::context::Context;
use crate::data::DataOptions;
use crate::data::cache;
use crate::data::content::Damaged;
use crate::data::prepared::{self, Description};
use crate::data::source::Source;
use crate::error::{Error, Result};
use crate::stage::Stage;

/// Damaged files that the log names.
const NAMED: usize = 20;

/// Options of `images`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Where the images come from, and their size.
    pub data: DataOptions,
}

/// The stage.
pub struct Images;

impl<B: Backend> Stage<B> for Images {
    type Options = Options;
    const KIND: &'static str = "images";
    const OUTPUT: &'static str = "images";
    const REVISION: u32 = 2;
    const SUMMARY: &'static str = "decode and resize a data set's images once for all stages";

    const DIVISIBLE: bool = true;

    fn check(o: &Options, _: &Path) -> Result<()> {
        if let Some(stage) = &o.data.images {
            let message =
                format!("{stage} has already prepared its images: name their source files");
            return Err(Error::option("/data/images", message));
        }
        if o.data.crop.is_some() || o.data.flip {
            let message = "`crop` and `flip` are for the stages that train: `data: {images: STAGE, flip: true}` there";
            return Err(Error::option("/data", message));
        }
        o.data
            .check()
            .map_err(|e| Error::option("/data", e.to_string()))
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let host = context.host;
        let source = Source::open(&o.data, &context.job.base_dir, &mut |done, total| {
            host.progress(done, total, cache::LOOKED_AT);
            host.cancelled() == Cancel::Run
        })?;
        let goes_on = |done, total| {
            host.progress(done, total, "images");
            host.cancelled() == Cancel::Run
        };
        let work = context.job.work_dir.as_deref();
        if let Some(part) = context.job.part {
            let count = source.decode_share(part, context.work_dir()?, &mut { goes_on })?;
            host.log(LogLevel::Info, &format!("decoded {count} image files"));
            return Ok(StageResult::of_part());
        }
        for (level, message) in &source.notices {
            host.log(*level, message);
        }
        host.log(LogLevel::Info, &source.summary());
        let total = source.count() as u64;
        let draft = ArtifactDraft::begin(host, "images", &context.job.stage)?;
        let (description, damaged) =
            prepared::write(source, draft.path(), work, &mut |done| goes_on(done, total))?;
        for Damaged { name, why } in damaged.iter().take(NAMED) {
            host.log(LogLevel::Warn, &format!("left out: {name}: {why}"));
        }
        if damaged.len() > NAMED {
            let message = format!(
                "left out: {} more; manifest.jsonl beside the images lists all {}",
                damaged.len() - NAMED,
                damaged.len()
            );
            host.log(LogLevel::Warn, &message);
        }
        let Description {
            count,
            channels,
            height,
            width,
            ..
        } = description;
        let classes = description.classes.len();
        let output = draft.commit(&ArtifactMeta::default())?;
        let summary = json!({
            "images": count, "channels": channels, "height": height, "width": width, "classes": classes,
            "damaged": damaged.len(),
        });
        Ok(StageResult { output, summary })
    }
}
