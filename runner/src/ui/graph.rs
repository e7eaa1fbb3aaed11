//! A directed graph without cycles as SVG: nodes in layers from left to right, by how far they are from the beginning.
//!
//! In: nodes with two lines of text and a tone, and edges. Out: SVG that takes its colours from the page's style sheet; a
//! node may be a link. Texts are escaped here, and cut by characters: a picture has no ellipsis of its own.

use std::collections::HashMap;

use maud::{Markup, html};

use crate::terminal;

/// A node.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its first line.
    pub title: String,
    /// Its second line.
    pub text: String,
    /// The class that colours it.
    pub tone: &'static str,
    /// Where it leads.
    pub link: Option<String>,
}

const WIDTH: usize = 148;
const HEIGHT: usize = 46;
const ACROSS: usize = 46;
const DOWN: usize = 16;
/// Characters that fit.
const TITLE: usize = 18;
const TEXT: usize = 23;
/// Most nodes that are drawn.
pub const MOST: usize = 400;

/// The graph; edges are pairs of places (from, to). What is beyond [`MOST`] nodes is left out.
pub fn svg(label: &str, nodes: &[Node], edges: &[(usize, usize)]) -> Markup {
    let nodes = &nodes[..nodes.len().min(MOST)];
    let mut edges: Vec<(usize, usize)> = edges
        .iter()
        .copied()
        .filter(|&(from, to)| from < nodes.len() && to < nodes.len() && from != to)
        .collect();
    edges.sort_unstable();
    edges.dedup();
    let places = places(nodes.len(), &edges);
    let columns = places.iter().map(|place| place.0 + 1).max().unwrap_or(0);
    let rows = places.iter().map(|place| place.1 + 1).max().unwrap_or(0);
    let (width, height) = (columns * (WIDTH + ACROSS), rows * (HEIGHT + DOWN));
    let at = |node: usize| {
        let (column, row) = places[node];
        // A column with fewer nodes stands in the middle.
        let own = places.iter().filter(|place| place.0 == column).count();
        let shift = (rows - own) * (HEIGHT + DOWN) / 2;
        (
            column * (WIDTH + ACROSS) + 2,
            row * (HEIGHT + DOWN) + shift + 2,
        )
    };
    let path = |&(from, to): &(usize, usize)| {
        let ((x1, y1), (x2, y2)) = (at(from), at(to));
        let (x1, y1, y2) = (x1 + WIDTH, y1 + HEIGHT / 2, y2 + HEIGHT / 2);
        let bend = (x2.saturating_sub(x1) / 2).min(60).max(ACROSS / 2);
        format!(
            "M{x1} {y1}C{} {y1} {} {y2} {x2} {y2}",
            x1 + bend,
            x2.saturating_sub(bend)
        )
    };
    html! {
        div.scroll {
            svg.graph role="img" aria-label=(label) width=(width) height=(height) viewBox=(format!("0 0 {} {}", width.max(1), height.max(1))) {
                @for edge in &edges { path.edge d=(path(edge)) {} }
                @for (number, node) in nodes.iter().enumerate() {
                    @let (x, y) = at(number);
                    @match &node.link {
                        Some(link) => { a href=(link) { (drawn(node, x, y)) } }
                        None => (drawn(node, x, y)),
                    }
                }
            }
        }
    }
}

fn drawn(node: &Node, x: usize, y: usize) -> Markup {
    html! {
        g class=(format!("node {}", node.tone)) {
            title { (terminal::clean_line(&format!("{}: {}", node.title, node.text))) }
            rect x=(x) y=(y) width=(WIDTH) height=(HEIGHT) rx="7" {}
            rect.side x=(x) y=(y + 6) width="3" height=(HEIGHT - 12) rx="1.5" {}
            text.title x=(x + 13) y=(y + 20) { (cut(&node.title, TITLE)) }
            text.small x=(x + 13) y=(y + 35) { (cut(&node.text, TEXT)) }
        }
    }
}

fn cut(text: &str, most: usize) -> String {
    let text = terminal::clean_line(text);
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Column and row of each node: as far to the right as the longest way to it, below those it is not joined to.
fn places(count: usize, edges: &[(usize, usize)]) -> Vec<(usize, usize)> {
    let mut columns = vec![0_usize; count];
    // As often as there are nodes is enough for any way, and an end for what is no such graph.
    for _ in 0..count {
        let mut changed = false;
        for &(from, to) in edges {
            if columns[to] <= columns[from] && columns[from] + 1 < count.max(2) {
                columns[to] = columns[from] + 1;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    let mut rows = vec![0_usize; count];
    let mut taken: HashMap<usize, usize> = HashMap::new();
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|&node| columns[node]);
    let mut start = 0;
    while start < order.len() {
        let column = columns[order[start]];
        let end = start
            + order[start..]
                .iter()
                .take_while(|&&node| columns[node] == column)
                .count();
        // Beside those that it comes from, so that few edges cross.
        let height = |node: usize| {
            let from = edges
                .iter()
                .filter(|edge| edge.1 == node)
                .map(|edge| rows[edge.0]);
            let (sum, count) = from.fold((0, 0), |(sum, count), row| (sum + row * 100, count + 1));
            if count == 0 { node * 100 } else { sum / count }
        };
        order[start..end].sort_by_cached_key(|&node| (height(node), node));
        for &node in &order[start..end] {
            let next = taken.entry(column).or_default();
            rows[node] = *next;
            *next += 1;
        }
        start = end;
    }
    columns.into_iter().zip(rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_stand_behind_what_they_come_from() {
        assert_eq!(
            places(4, &[(0, 1), (1, 3), (0, 2), (2, 3)]),
            [(0, 0), (1, 0), (1, 1), (2, 0)]
        );
        assert_eq!(
            places(3, &[(0, 2), (0, 1), (1, 2)]),
            [(0, 0), (1, 0), (2, 0)]
        );
        // No such graph, and still an end.
        assert_eq!(places(2, &[(0, 1), (1, 0)]).len(), 2);
        assert_eq!(places(0, &[]), []);
    }

    #[test]
    fn texts_are_escaped_and_cut() {
        let node = Node {
            title: "<script>alert(1)</script>".into(),
            text: "\u{202e}x".into(),
            tone: "good",
            link: Some("/run/\"><".into()),
        };
        let svg = svg("a \"graph\"", &[node], &[(0, 0), (0, 9)]).into_string();
        assert!(
            !svg.contains("<script") && svg.contains("&lt;script&gt;"),
            "{svg}"
        );
        assert!(
            svg.contains("\\u202e") && !svg.contains('\u{202e}'),
            "{svg}"
        );
        assert!(
            svg.contains("/run/&quot;&gt;&lt;") && svg.contains('…'),
            "{svg}"
        );
    }
}
