//! What pages need beside themselves: it is inside the binary.

use super::reply::Reply;

const JS: &str = "text/javascript; charset=utf-8";

/// The asset of a name.
pub fn answer(name: &str) -> Option<Reply> {
    let (kind, content) = match name {
        "style.css" => ("text/css; charset=utf-8", include_str!("assets/style.css")),
        "theme.js" => (JS, include_str!("assets/theme.js")),
        "app.js" => (JS, include_str!("assets/app.js")),
        "chart.js" => (JS, include_str!("assets/chart.js")),
        "pictures.js" => (JS, include_str!("assets/pictures.js")),
        "icon.svg" => ("image/svg+xml", include_str!("assets/icon.svg")),
        _ => return None,
    };
    Some(Reply::new(kind, content))
}
