//! An artifact: its files, the artifacts it was made from and those made from it.

use maud::{Markup, html};

use super::graph::{self, Node};
use super::page::{self, Page, Section};
use super::reply::{HttpError, Reply};
use super::request::{PageRequest, link};
use super::{ServedStore, ServerState};
use crate::store::{ArtifactRow, Lineage, StoreError};
use crate::table;

/// The most artifacts in a lineage, and the most files that are listed.
const MOST: usize = 120;
const FILES: usize = 500;

/// The page.
pub async fn answer(
    site: &ServerState,
    _: &PageRequest,
    reference: &str,
) -> Result<Reply, HttpError> {
    let (served, hash) = find(site, reference).await?;
    let lineage = served.store.lineage_within(&hash, MOST).await?;
    let files = served
        .store
        .artifact_files(&hash)
        .await?
        .unwrap_or_default();
    let own = lineage.artifacts.iter().find(|one| one.depth == 0);
    let runs: Vec<String> = own
        .and_then(|one| one.run.as_ref())
        .map(|run| run.0.clone())
        .into_iter()
        .collect();
    let body = html! {
        h1 { "Artifact " (page::hash(&hash)) }
        @if let Some(own) = own {
            dl.facts {
                dt { "kind" } dd { (page::name(&own.kind)) }
                dt { "size" } dd.num { (table::bytes(own.size)) }
                dt { "made" } dd { (page::ago(own.created)) @if let Some(run) = &own.run { " by " (page::name(own.stage.as_deref().unwrap_or_default())) " of run " (page::run_link(run)) } }
                dt { "hash" } dd.mono.wrap { (hash) }
            }
        }
        section {
            h2 { "Lineage" }
            p.hint { "On the left: what it was made from. On the right: what was made from it." @if lineage.artifacts.len() >= MOST { " The nearest " (MOST) " are shown." } }
            (drawing(&lineage))
        }
        section {
            h2 { "Files" }
            (listing(&hash, &files))
        }
    };
    Ok(Page {
        title: "Artifact",
        place: Section::Other,
        runs: &runs,
        pinned: false,
        live: None,
        body,
    }
    .reply(site))
}

async fn find<'s>(
    site: &'s ServerState,
    reference: &str,
) -> Result<(&'s ServedStore, String), HttpError> {
    let mut first = None;
    for served in &site.stores {
        match served.store.resolve_artifact(reference).await {
            Ok(hash) => return Ok((served, hash)),
            Err(error @ (StoreError::NoArtifact { .. } | StoreError::AmbiguousArtifact { .. })) => {
                first = first.or(Some(error))
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(first.map_or_else(
        || HttpError::NotFound("there is no store".into()),
        HttpError::from,
    ))
}

/// The files of an artifact, for download.
pub fn listing(hash: &str, files: &[crate::store::ArtifactFile]) -> Markup {
    html! {
        div.scroll { table {
            thead { tr { th scope="col" { "File" } th.num scope="col" { "Size" } th scope="col" { "Hash" } } }
            tbody {
                @for file in files.iter().take(FILES) {
                    tr {
                        td { a href=(link(&format!("/file/{hash}"), &[("path", &file.path), ("keep", "1")])) { (page::name(&file.path)) } }
                        td.num { (table::bytes(file.size)) }
                        td { (page::hash(&file.hash)) }
                    }
                }
            }
        } }
        @if files.len() > FILES { p.dim { "and " (files.len() - FILES) " more" } }
    }
}

fn drawing(lineage: &Lineage) -> Markup {
    let nodes: Vec<Node> = lineage
        .artifacts
        .iter()
        .map(|one| Node {
            title: one.stage.clone().unwrap_or_else(|| one.kind.clone()),
            text: format!("{} {}", one.kind, table::bytes(one.size)),
            style: if one.depth == 0 { "now" } else { "old" },
            link: Some(format!("/artifact/{}", one.hash)),
        })
        .collect();
    let place = |hash: &String| lineage.artifacts.iter().position(|one| one.hash == *hash);
    let edges = lineage
        .made_from
        .iter()
        .filter_map(|(made, from)| Some((place(from)?, place(made)?)));
    graph::svg(
        "Lineage of the artifact",
        &nodes,
        &edges.collect::<Vec<_>>(),
    )
}

/// The artifacts of a run, each with its inputs.
pub fn of_run(artifacts: &[ArtifactRow]) -> Markup {
    let mut hashes: Vec<&str> = Vec::new();
    let mut nodes = Vec::new();
    for row in artifacts {
        if hashes.contains(&row.artifact.hash.as_str()) || nodes.len() >= graph::MOST {
            continue;
        }
        hashes.push(&row.artifact.hash);
        nodes.push(Node {
            title: if row.is_output {
                row.stage.clone()
            } else {
                format!("{}/{}", row.stage, row.artifact.name)
            },
            text: format!("{} {}", row.artifact.kind, table::bytes(row.artifact.size)),
            style: if row.reused { "old" } else { "good" },
            link: Some(format!("/artifact/{}", row.artifact.hash)),
        });
    }
    let place = |hash: &str| hashes.iter().position(|known| *known == hash);
    let edges = artifacts.iter().flat_map(|row| {
        let made = place(&row.artifact.hash);
        row.made_from
            .iter()
            .filter_map(move |from| Some((place(from)?, made?)))
    });
    graph::svg(
        "Which artifact of the run was made from which",
        &nodes,
        &edges.collect::<Vec<_>>(),
    )
}
