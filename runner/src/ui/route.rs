//! From an address to a page.

use hyper::Method;

use super::reply::{HttpError, Reply};
use super::request::PageRequest;
use super::{
    ServerState, assets, changes, compare, curves, events, files, lineage, page, pictures, run,
    runs, sweeps,
};

/// Answers an allowed request.
pub async fn answer(site: &ServerState, request: &PageRequest) -> Reply {
    match find(site, request).await {
        Ok(reply) => reply,
        Err(problem) => page::problem(site, &problem),
    }
}

async fn find(site: &ServerState, request: &PageRequest) -> Result<Reply, HttpError> {
    let path: Vec<&str> = request.path.iter().map(String::as_str).collect();
    // Checked at every request: another machine may have taken the store meanwhile.
    if !matches!(path.as_slice(), ["assets" | "events", ..]) {
        for served in &site.stores {
            served.store.check_host().await?;
        }
    }
    if request.method == Method::POST {
        return match path.as_slice() {
            ["change", what] => changes::answer(site, request, what).await,
            _ => Err(nothing()),
        };
    }
    match path.as_slice() {
        [] => runs::answer(site, request).await,
        ["run", id] => run::overview(site, request, id).await,
        ["run", id, tab] => run::tab(site, request, id, tab).await,
        ["curves"] => curves::answer(site, request).await,
        ["curves", "data.json"] => curves::data(site, request).await,
        ["curves", "curves.svg"] => curves::svg(site, request).await,
        ["curves", "curves.csv"] => curves::csv(site, request).await,
        ["pictures"] => pictures::answer(site, request).await,
        ["compare"] => compare::answer(site, request).await,
        ["artifact", hash] => lineage::answer(site, request, hash).await,
        ["file", hash] => files::answer(site, request, hash).await,
        ["sample", hash, number] => pictures::sample(site, hash, number).await,
        ["sweep", id] => sweeps::answer(site, request, id).await,
        ["sweep", id, "plot.svg"] => sweeps::svg(site, id).await,
        ["events"] => Ok(events::answer(site, request)),
        ["change", "remove"] => changes::confirm(site, request).await,
        ["assets", name] => assets::answer(name).ok_or_else(nothing),
        _ => Err(nothing()),
    }
}

fn nothing() -> HttpError {
    HttpError::NotFound("there is no page under this address".into())
}
