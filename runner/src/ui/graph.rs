//! A directed acyclic graph as SVG: nodes in layers from left to right, by their distance from the sources.
//!
//! In: nodes with two lines of text and a style, and edges. Out: SVG with the colours of the page's style sheet; a node may be
//! a link. Texts are escaped here, and cut by characters, because SVG has no ellipsis.

use maud::{Markup, html};

use crate::terminal;

/// A node.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its first line.
    pub title: String,
    /// Its second line.
    pub text: String,
    /// The class that sets its colour.
    pub style: &'static str,
    /// Its link.
    pub link: Option<String>,
}

const WIDTH: usize = 168;
const HEIGHT: usize = 46;
const ACROSS: usize = 36;
const DOWN: usize = 16;
/// Room for an edge that passes a column.
const LANE: usize = 14;
/// The number of characters that fit.
const TITLE: usize = 18;
const TEXT: usize = 24;
/// The most nodes that are drawn.
pub const MOST: usize = 400;

/// The graph; edges are pairs of indices (from, to). Nodes beyond the first [`MOST`] are left out.
pub fn svg(label: &str, nodes: &[Node], edges: &[(usize, usize)]) -> Markup {
    let nodes = &nodes[..nodes.len().min(MOST)];
    let mut edges: Vec<(usize, usize)> = edges
        .iter()
        .copied()
        .filter(|&(from, to)| from < nodes.len() && to < nodes.len() && from != to)
        .collect();
    edges.sort_unstable();
    edges.dedup();
    let (places, ways) = places(nodes.len(), &edges);
    let columns = places.iter().map(|place| place.column + 1).max();
    let width =
        columns.unwrap_or(0) * (WIDTH + ACROSS) - if columns.is_some() { ACROSS - 4 } else { 0 };
    let height = places
        .iter()
        .map(|place| place.top + place.height)
        .max()
        .unwrap_or(0)
        + 4;
    let left = |place: &Position| place.column * (WIDTH + ACROSS) + 2;
    let middle = |place: &Position| place.top + place.height / 2 + 2;
    // From one side of a column to the other, straight through the columns in between.
    let path = |way: &Vec<usize>| {
        let mut path = String::new();
        for (number, &spot) in way.iter().enumerate() {
            let (x, y) = (left(&places[spot]), middle(&places[spot]));
            match number {
                0 => path += &format!("M{} {y}", x + WIDTH),
                _ => {
                    let from = middle(&places[way[number - 1]]);
                    let bend = ACROSS / 2;
                    path += &format!(
                        "C{} {from} {} {y} {x} {y}",
                        x.saturating_sub(bend),
                        x.saturating_sub(bend)
                    );
                    if number + 1 < way.len() {
                        path += &format!("H{}", x + WIDTH);
                    }
                }
            }
        }
        path
    };
    html! {
        div.scroll {
            svg.graph role="img" aria-label=(label) width=(width) height=(height) viewBox=(format!("0 0 {} {}", width.max(1), height.max(1))) {
                @for way in &ways { path.edge d=(path(way)) {} }
                @for (number, node) in nodes.iter().enumerate() {
                    @let (x, y) = (left(&places[number]), places[number].top + 2);
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
        g class=(format!("node {}", node.style)) {
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

/// The position of a node, or of an edge's passage through a column.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Position {
    column: usize,
    top: usize,
    height: usize,
}

/// The positions of nodes: the column is the length of the longest path to a node. After them come the positions at which edges
/// pass columns; each edge is a path through such positions.
fn places(count: usize, edges: &[(usize, usize)]) -> (Vec<Position>, Vec<Vec<usize>>) {
    let mut columns = vec![0_usize; count];
    // As many rounds as nodes suffice for any path, and end the loop if the graph has a cycle.
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
    let mut spots: Vec<Position> = columns
        .iter()
        .map(|&column| Position {
            column,
            top: 0,
            height: HEIGHT,
        })
        .collect();
    // Many edges through many columns would be unreadable.
    let span = |&(from, to): &(usize, usize)| columns[to].saturating_sub(columns[from] + 1);
    let passes: usize = edges.iter().map(span).sum();
    let ways: Vec<Vec<usize>> = edges
        .iter()
        .map(|&(from, to)| {
            let mut way = vec![from];
            if passes <= 4 * MOST {
                for column in columns[from] + 1..columns[to] {
                    way.push(spots.len());
                    spots.push(Position {
                        column,
                        top: 0,
                        height: LANE,
                    });
                }
            }
            way.push(to);
            way
        })
        .collect();
    let last = spots.iter().map(|spot| spot.column).max().unwrap_or(0);
    let mut heights = vec![0; last + 1];
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); spots.len()];
    for way in &ways {
        for pair in way.windows(2) {
            before[pair[1]].push(pair[0]);
        }
    }
    for (column, height) in heights.iter_mut().enumerate() {
        let mut order: Vec<usize> = (0..spots.len())
            .filter(|&spot| spots[spot].column == column)
            .collect();
        // Next to their predecessors, so that few edges cross.
        let wanted = |spot: usize| match before[spot].as_slice() {
            [] => spot * (HEIGHT + DOWN),
            from => {
                from.iter()
                    .map(|&other| spots[other].top + spots[other].height / 2)
                    .sum::<usize>()
                    / from.len()
            }
        };
        order.sort_by_cached_key(|&spot| (wanted(spot), spot));
        let mut top = 0;
        for spot in order {
            spots[spot].top = top;
            top += spots[spot].height + DOWN;
        }
        *height = top;
    }
    // A shorter column is centred.
    let tallest = heights.iter().copied().max().unwrap_or(0);
    for spot in &mut spots {
        spot.top += (tallest - heights[spot.column]) / 2;
    }
    (spots, ways)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_stand_behind_what_they_come_from() {
        let check =
            |count: usize, edges: &[(usize, usize)], columns: &[usize], ways: &[&[usize]]| {
                let (spots, found) = places(count, edges);
                let stand: Vec<usize> = spots.iter().take(count).map(|spot| spot.column).collect();
                assert_eq!((stand.as_slice(), found.len()), (columns, ways.len()));
                assert!(
                    found.iter().zip(ways).all(|(found, way)| found == way),
                    "{found:?}"
                );
                // Nothing overlaps.
                for (number, one) in spots.iter().enumerate() {
                    let beside = spots[number + 1..]
                        .iter()
                        .filter(|other| other.column == one.column);
                    for other in beside {
                        assert!(
                            one.top + one.height <= other.top
                                || other.top + other.height <= one.top
                        );
                    }
                }
            };
        check(
            4,
            &[(0, 1), (1, 3), (0, 2), (2, 3)],
            &[0, 1, 1, 2],
            &[&[0, 1], &[1, 3], &[0, 2], &[2, 3]],
        );
        // The long edge passes beside the node in between.
        check(
            3,
            &[(0, 2), (0, 1), (1, 2)],
            &[0, 1, 2],
            &[&[0, 3, 2], &[0, 1], &[1, 2]],
        );
        check(0, &[], &[], &[]);
        // It has a cycle, and the layout still ends.
        assert_eq!(places(2, &[(0, 1), (1, 0)]).0.len(), 2);
    }

    #[test]
    fn texts_are_escaped_and_cut() {
        let node = Node {
            title: "<script>alert(1)</script>".into(),
            text: "\u{202e}x".into(),
            style: "good",
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
