//! Tagging, notes and removing runs: only with `--write`, only from our forms, and only through the store's functions. A
//! running run is never removed.

use maud::html;

use super::page::{self, Page, Section};
use super::reply::{HttpError, Reply};
use super::request::PageRequest;
use super::{ServedStore, ServerState};
use crate::store::{Access, RunId, Store, is_tag};

/// The longest tag and the longest note.
const TAG: usize = 200;
const NOTE: usize = 20_000;

/// Carries out a form's change.
pub async fn answer(
    site: &ServerState,
    request: &PageRequest,
    what: &str,
) -> Result<Reply, HttpError> {
    may_change(site)?;
    if !site.guard.is_sealed(request.form.get("seal")) {
        return Err(HttpError::Refused(
            "this form is not one of ours, or an old one: load the page again".into(),
        ));
    }
    let reference = request.form.get("run").unwrap_or_default();
    let (served, run) = site.find_run(reference).await?;
    let text = |name: &str, most: usize| match request.form.get(name).unwrap_or_default().trim() {
        long if long.chars().count() > most => Err(HttpError::BadRequest(format!(
            "a {name} has at most {most} characters"
        ))),
        text => Ok(text.to_owned()),
    };
    match what {
        "tag" => {
            let tag = text("tag", TAG)?;
            // Such a tag would never be found, because references are resolved in this order.
            if !is_tag(&tag) {
                return Err(HttpError::BadRequest(format!(
                    "`{tag}` cannot be a tag: it means something else, or nothing"
                )));
            }
            let store = writable(served).await?;
            store.tag_run(&run, &tag).await?;
            store.close().await;
        }
        "untag" => {
            let store = writable(served).await?;
            store
                .untag_run(&run, request.form.get("tag").unwrap_or_default())
                .await?;
            store.close().await;
        }
        "note" => {
            let note = text("note", NOTE)?;
            let store = writable(served).await?;
            store.note_run(&run, &note).await?;
            store.close().await;
        }
        "remove" => return remove(served, request, &run).await,
        _ => return Err(HttpError::NotFound("there is no such change".into())),
    }
    Ok(Reply::see(&page::run_path(&run.0)))
}

async fn remove(
    served: &ServedStore,
    request: &PageRequest,
    run: &RunId,
) -> Result<Reply, HttpError> {
    let dependents = served.store.dependents(std::slice::from_ref(run)).await?;
    if !dependents.is_empty() && request.form.get("force").is_none() {
        return Err(HttpError::BadRequest(format!(
            "stages of this run are reused by {} others",
            dependents.len()
        )));
    }
    if request.form.get("confirm") != Some(run.0.as_str()) {
        return Err(HttpError::BadRequest(
            "to remove a run, its whole id has to be typed".into(),
        ));
    }
    let store = writable(served).await?;
    store.remove_runs(std::slice::from_ref(run)).await?;
    store.close().await;
    Ok(Reply::see("/"))
}

/// Asks for confirmation before removing a run.
pub async fn confirm(site: &ServerState, request: &PageRequest) -> Result<Reply, HttpError> {
    may_change(site)?;
    let (served, run) = site
        .find_run(request.query.get("run").unwrap_or_default())
        .await?;
    let dependents = served.store.dependents(std::slice::from_ref(&run)).await?;
    let body = html! {
        section.narrow {
            h1 { "Remove run " (page::run_link(&run)) "?" }
            p { "This removes everything recorded about it: parameters, metrics, logs. The files of its artifacts stay until " code { "retort gc --remove" } "." }
            @if !dependents.is_empty() {
                div.alert role="alert" {
                    p { "Its stages are reused by " (dependents.len()) " other runs, which then no longer know where these results came from:" }
                    p { @for other in dependents.iter().take(20) { (page::run_link(other)) " " } @if dependents.len() > 20 { "…" } }
                }
            }
            form.stack method="post" action="/change/remove" {
                input type="hidden" name="seal" value=(site.guard.seal());
                input type="hidden" name="run" value=(run.0);
                @if !dependents.is_empty() {
                    label { input type="checkbox" name="force" value="1" required; " Remove it anyway" }
                }
                label for="confirm" { "Type the run's id" }
                input #confirm.mono type="text" name="confirm" required autocomplete="off" placeholder=(run.0);
                div { button.danger type="submit" { "Remove" } " " a.button href=(page::run_path(&run.0)) { "Keep it" } }
            }
        }
    };
    Ok(Page {
        title: "Remove a run",
        place: Section::Other,
        runs: &[],
        pinned: false,
        live: None,
        body,
    }
    .reply(site))
}

fn may_change(site: &ServerState) -> Result<(), HttpError> {
    match site.write {
        true => Ok(()),
        false => Err(HttpError::Refused(
            "this server is read-only: `retort ui --write` allows changes".into(),
        )),
    }
}

async fn writable(served: &ServedStore) -> Result<Store, HttpError> {
    Ok(Store::open(served.dir(), Access::ReadWrite).await?)
}
