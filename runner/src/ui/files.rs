//! Files of artifacts: pictures are shown, other files are downloaded.
//!
//! A file is addressed by the hash of an artifact in a store and a path that the store lists for it. The path may come from an
//! imported history, so it has to stay inside the artifact, and no link may lead to it ([`artifact::open_inner`]).

use std::fs::File;
use std::io::{self, Read};

use hyper::body::Bytes;
use tokio::sync::mpsc;

use super::reply::{Content, HttpError, Reply};
use super::request::PageRequest;
use super::{ServedStore, ServerState};
use crate::artifact;
use crate::artifact::is_hash;
use crate::store::ArtifactFile;

/// Bytes per chunk.
const PIECE: usize = 64 << 10;
/// The largest picture that is sent to be shown.
const LONGEST_PICTURE: u64 = 64 << 20;

/// Sends a file: `/file/HASH?path=PATH`.
pub async fn answer(
    site: &ServerState,
    request: &PageRequest,
    hash: &str,
) -> Result<Reply, HttpError> {
    let path = request.query.get("path").unwrap_or_default();
    let (served, files) = find(site, hash).await?;
    let listed = files
        .iter()
        .find(|file| file.path == path)
        .ok_or_else(|| HttpError::NotFound("this artifact has no such file".into()))?;
    let file = open(served, hash, listed)?;
    let is_picture = path.ends_with(".png") && listed.size <= LONGEST_PICTURE;
    let kind = if is_picture {
        "image/png"
    } else {
        "application/octet-stream"
    };
    let reply = Reply {
        content: Content::Streamed(pieces(file, listed.size)),
        ..Reply::new(kind, "")
    };
    let last = path.rsplit('/').next().unwrap_or_default();
    let plain: String = last
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "._-".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect();
    let manner = if is_picture && request.query.get("keep").is_none() {
        "inline"
    } else {
        "attachment"
    };
    Ok(reply.forever().header(
        "content-disposition",
        format!("{manner}; filename=\"{plain}\""),
    ))
}

/// The files of an artifact, and its store.
pub async fn find<'s>(
    site: &'s ServerState,
    hash: &str,
) -> Result<(&'s ServedStore, Vec<ArtifactFile>), HttpError> {
    if is_hash(hash) {
        for served in &site.stores {
            if let Some(files) = served.store.artifact_files(hash).await?
                && served.layout.artifact(hash).is_dir()
            {
                return Ok((served, files));
            }
        }
    }
    Err(HttpError::NotFound(
        "no store here has this artifact's files".into(),
    ))
}

/// Opens a listed file.
pub fn open(served: &ServedStore, hash: &str, listed: &ArtifactFile) -> Result<File, HttpError> {
    artifact::open_inner(&served.layout.artifact(hash), &listed.path)
        .map_err(|error| HttpError::File(format!("{}: {error}", listed.path)))
}

fn pieces(mut file: File, size: u64) -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(2);
    tokio::task::spawn_blocking(move || {
        let mut left = size;
        while left > 0 {
            let mut piece = vec![0; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
            let read = file.read(&mut piece);
            let (piece, over) = match read {
                Ok(0) => return,
                Ok(count) => {
                    piece.truncate(count);
                    left -= count as u64;
                    (Ok(Bytes::from(piece)), false)
                }
                Err(error) => (Err(error), true),
            };
            if sender.blocking_send(piece).is_err() || over {
                return;
            }
        }
    });
    receiver
}
