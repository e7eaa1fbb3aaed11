//! The server: HTTP/1 over TCP, one task per connection. [`route`](super::route) makes the answers.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, SET_COOKIE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use super::connections::{Activity, Connections, Observed};
use super::guard::{AccessDecision, Guard};
use super::reply::{Content, Reply, TEXT};
use super::request::{self, Fields, PageRequest};
use super::{ServerState, route};
use crate::store;

/// The time limit for a request's headers.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the statements for one answer may take. They also end when the browser no longer waits.
const LONGEST: Duration = Duration::from_secs(60);
/// The most bytes of a form.
const FORM: usize = 64 << 10;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Serves a site until `stop` ends.
pub async fn serve(site: Arc<ServerState>, listener: TcpListener, stop: impl Future<Output = ()>) {
    let mut connections = Connections::default();
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => return,
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, or the caller has gone away again.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        connections.make_room();
        let activity = Arc::new(Activity::default());
        let (site, shared) = (Arc::clone(&site), Arc::clone(&activity));
        let task = tokio::spawn(async move {
            let service = service_fn(|request| answer(&site, &shared, request));
            let stream = Observed::new(stream, &shared);
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_buf_size(64 << 10)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection has ended");
            }
        });
        connections.add(task.abort_handle(), activity);
    }
}

async fn answer(
    site: &ServerState,
    activity: &Activity,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    let is_head = head.method == Method::HEAD;
    let reply = match site.guard.decide(&head.method, &head.uri, &head.headers) {
        AccessDecision::Refuse(why) => Reply::new(TEXT, format!("{why}\n")).status(403),
        AccessDecision::SetCookie { cookie, place } => {
            Reply::see(&place).header(SET_COOKIE.as_str(), cookie)
        }
        AccessDecision::Allow => match form(&head.method, body).await {
            Err(reply) => reply,
            Ok(form) => match request::path(head.uri.path()) {
                None => Reply::new(TEXT, "there is no such page\n").status(404),
                Some(path) => {
                    let request = PageRequest {
                        method: head.method,
                        path,
                        query: Fields::read(head.uri.query().unwrap_or_default()),
                        form,
                    };
                    let _at_work = activity.begin();
                    store::within(LONGEST, route::answer(site, &request)).await
                }
            },
        },
    };
    Ok(response(reply, is_head))
}

async fn form(method: &Method, body: Incoming) -> Result<Fields, Reply> {
    match *method {
        Method::GET | Method::HEAD => Ok(Fields::default()),
        Method::POST => {
            let read = tokio::time::timeout(PATIENCE, Limited::new(body, FORM).collect());
            match read.await {
                Ok(Ok(read)) => Ok(Fields::read(&String::from_utf8_lossy(&read.to_bytes()))),
                _ => Err(Reply::new(TEXT, "the form is too long, or did not come\n").status(413)),
            }
        }
        _ => Err(Reply::new(TEXT, "only GET, HEAD and POST are understood\n").status(405)),
    }
}

fn response(reply: Reply, is_head: bool) -> Response<Body> {
    let whole = |bytes: Bytes| {
        Full::new(bytes)
            .map_err(|never| match never {})
            .boxed_unsync()
    };
    let content = match reply.content {
        _ if is_head => whole(Bytes::new()),
        Content::Buffered(bytes) => whole(bytes),
        Content::Streamed(pieces) => {
            let frames = stream::unfold(pieces, |mut pieces| async {
                let piece = pieces.recv().await?;
                Some((piece.map(Frame::data), pieces))
            });
            StreamBody::new(frames).boxed_unsync()
        }
    };
    let mut response = Response::new(content);
    *response.status_mut() =
        StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    for (name, value) in Guard::headers() {
        headers.insert(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(reply.kind));
    let kept = match reply.forever {
        true => "private, max-age=31536000, immutable",
        false => "no-store",
    };
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(kept));
    for (name, value) in reply.headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    response
}
