//! From an address to a page.

use hyper::Method;

use super::reply::{Problem, Reply};
use super::request::Ask;
use super::{
    Site, assets, changes, compare, curves, events, files, lineage, page, pictures, run, runs,
    sweeps,
};

/// Answers a request that may be answered.
pub async fn answer(site: &Site, ask: &Ask) -> Reply {
    match find(site, ask).await {
        Ok(reply) => reply,
        Err(problem) => page::problem(site, &problem),
    }
}

async fn find(site: &Site, ask: &Ask) -> Result<Reply, Problem> {
    let path: Vec<&str> = ask.path.iter().map(String::as_str).collect();
    if ask.method == Method::POST {
        return match path.as_slice() {
            ["change", what] => changes::answer(site, ask, what).await,
            _ => Err(nothing()),
        };
    }
    match path.as_slice() {
        [] => runs::answer(site, ask).await,
        ["run", id] => run::overview(site, ask, id).await,
        ["run", id, tab] => run::tab(site, ask, id, tab).await,
        ["curves"] => curves::answer(site, ask).await,
        ["curves", "data.json"] => curves::data(site, ask).await,
        ["curves", "curves.svg"] => curves::svg(site, ask).await,
        ["curves", "curves.csv"] => curves::csv(site, ask).await,
        ["pictures"] => pictures::answer(site, ask).await,
        ["compare"] => compare::answer(site, ask).await,
        ["artifact", hash] => lineage::answer(site, ask, hash).await,
        ["file", hash] => files::answer(site, ask, hash).await,
        ["sample", hash, number] => pictures::sample(site, hash, number).await,
        ["sweep", id] => sweeps::answer(site, ask, id).await,
        ["sweep", id, "plot.svg"] => sweeps::svg(site, id).await,
        ["events"] => Ok(events::answer(site, ask)),
        ["change", "remove"] => changes::confirm(site, ask).await,
        ["assets", name] => assets::answer(name).ok_or_else(nothing),
        _ => Err(nothing()),
    }
}

fn nothing() -> Problem {
    Problem::NotFound("there is no page under this address".into())
}
