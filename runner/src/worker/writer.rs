//! Artifacts that a stage is writing: each in its own directory, until it is committed or aborted.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use retort_abi::{ArtifactMeta, Failure, FailureCode};

use super::lock;
use crate::artifact::{self, ArtifactError};
use crate::store::ArtifactRecord;

/// Artifacts being written.
pub(super) struct ArtifactWriter {
    staging: PathBuf,
    artifacts: PathBuf,
    open: Mutex<Drafts>,
}

#[derive(Default)]
struct Drafts {
    last_id: u64,
    open: HashMap<u64, OpenArtifact>,
}

struct OpenArtifact {
    kind: String,
    name: String,
    path: PathBuf,
}

impl ArtifactWriter {
    pub(super) fn new(staging: PathBuf, artifacts: PathBuf) -> Self {
        Self {
            staging,
            artifacts,
            open: Mutex::default(),
        }
    }

    pub(super) fn begin(&self, kind: String, name: String) -> Result<(u64, PathBuf), Failure> {
        let mut drafts = lock(&self.open);
        let id = drafts.last_id + 1;
        let path = self.staging.join(id.to_string());
        std::fs::create_dir_all(&path).map_err(|error| io_failure("make", &path, &error))?;
        drafts.last_id = id;
        drafts.open.insert(
            id,
            OpenArtifact {
                kind,
                name,
                path: path.clone(),
            },
        );
        Ok((id, path))
    }

    pub(super) fn commit(&self, id: u64, meta: ArtifactMeta) -> Result<ArtifactRecord, Failure> {
        let draft = lock(&self.open).open.remove(&id).ok_or_else(|| {
            Failure::new(
                FailureCode::Internal,
                format!("artifact_commit({id}): no artifact with this id is open"),
            )
        })?;
        let contents = artifact::commit(&draft.path, &self.artifacts)
            .map_err(|error| commit_failure(&draft, &error))?;
        let artifact::Contents { hash, size, files } = contents;
        Ok(ArtifactRecord {
            hash,
            kind: draft.kind,
            name: draft.name,
            size,
            files,
            meta,
        })
    }

    pub(super) fn abort(&self, id: u64) {
        if let Some(draft) = lock(&self.open).open.remove(&id) {
            let _ = std::fs::remove_dir_all(draft.path);
        }
    }
}

fn commit_failure(draft: &OpenArtifact, error: &ArtifactError) -> Failure {
    let what = format!(
        "the {} `{}` cannot be made an artifact: {error}",
        draft.kind, draft.name
    );
    match error {
        ArtifactError::Io { path, source, .. } => Failure {
            message: what,
            ..io_failure("use", path, source)
        },
        _ => Failure::new(FailureCode::BadData, what),
    }
}

fn io_failure(action: &str, path: &Path, error: &std::io::Error) -> Failure {
    let failure = Failure::new(
        FailureCode::Io,
        format!("cannot {action} {}: {error}", path.display()),
    );
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => failure
            .hint("free some space, or choose another disk with --store; then `retort resume`"),
        std::io::ErrorKind::FileTooLarge => failure.hint(
            "this is the limit on the size of files: `ulimit -f unlimited` in this shell lifts it; then `retort resume`",
        ),
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_become_artifacts_once() {
        let root = tempfile::tempdir().unwrap();
        let writer =
            ArtifactWriter::new(root.path().join("staging"), root.path().join("artifacts"));
        let (id, path) = writer.begin("student".into(), "best".into()).unwrap();
        std::fs::write(path.join("a"), "1").unwrap();
        let record = writer.commit(id, ArtifactMeta::default()).unwrap();
        assert_eq!(
            (record.kind.as_str(), record.name.as_str(), record.size),
            ("student", "best", 1)
        );
        assert!(
            root.path()
                .join("artifacts")
                .join(&record.hash)
                .join("a")
                .exists()
        );
        assert!(
            writer
                .commit(id, ArtifactMeta::default())
                .unwrap_err()
                .message
                .contains("no artifact with this id")
        );
        let (id, path) = writer.begin("student".into(), "none".into()).unwrap();
        writer.abort(id);
        assert!(!path.exists());
    }
}
