//! `retort lineage`: an artifact's ancestors and descendants.

use clap::ValueEnum;

use crate::cli::{Context, Error, FormatArgs, output};
use crate::store::{Access, Lineage, LineageArtifact, Store};
use crate::table::{Cell, Rows, Style};

/// Arguments of `lineage`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The artifact: a prefix of its hash, or RUN/STAGE for the output of a stage (`latest/student`).
    #[arg(value_name = "ARTIFACT")]
    pub artifact: String,
    /// Only its ancestors.
    #[arg(long, conflicts_with = "down")]
    pub up: bool,
    /// Only its descendants.
    #[arg(long)]
    pub down: bool,
    /// Print a graph instead of rows.
    #[arg(long, value_name = "LANGUAGE")]
    pub graph: Option<Language>,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Graph languages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// Graphviz.
    Dot,
    /// Mermaid, for Markdown.
    Mermaid,
}

/// Prints the lineage of an artifact.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let mut lineage = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let hash = store.resolve_artifact(&args.artifact).await?;
        let lineage = store.lineage(&hash).await?;
        store.close().await;
        Ok::<_, Error>(lineage)
    })?;
    lineage
        .artifacts
        .retain(|one| !(args.up && one.depth > 0 || args.down && one.depth < 0));
    let kept = |hash: &String| lineage.artifacts.iter().any(|one| one.hash == *hash);
    let edges = lineage.made_from.iter();
    lineage.made_from = edges
        .filter(|(made, from)| kept(made) && kept(from))
        .cloned()
        .collect();
    let style = args.format.style(context);
    let text = match (args.graph, style) {
        (Some(Language::Dot), _) => dot(&lineage),
        (Some(Language::Mermaid), _) => mermaid(&lineage),
        (None, Style::Json) => format!("{:#}\n", serde_json::json!(lineage)),
        (None, style) => rows(&lineage).render(style),
    };
    Ok(output::print(&text)?)
}

fn rows(lineage: &Lineage) -> Rows {
    let mut rows = Rows::new(&[
        "depth",
        "hash",
        "kind",
        "stage",
        "run",
        "made",
        "size",
        "made from",
    ]);
    for one in &lineage.artifacts {
        let place = match one.depth {
            0 => "=".to_owned(),
            depth if depth < 0 => "<".repeat(depth.unsigned_abs() as usize),
            depth => ">".repeat(depth as usize),
        };
        let from: Vec<&str> = lineage
            .made_from
            .iter()
            .filter(|(made, _)| *made == one.hash)
            .map(|(_, from)| short(from))
            .collect();
        rows.push([
            Cell::new(place, one.depth),
            Cell::hash(&one.hash),
            one.kind.as_str().into(),
            one.stage.as_deref().into(),
            one.run.as_ref().map(|run| run.0.as_str()).into(),
            one.created.into(),
            Cell::bytes(one.size),
            from.join(" ").into(),
        ]);
    }
    rows
}

fn label(one: &LineageArtifact, line: &str) -> String {
    let made = match (&one.stage, &one.run) {
        (Some(stage), Some(run)) => format!("{line}{stage}, run {run}"),
        _ => String::new(),
    };
    let label = format!("{} {}{made}", one.kind, short(&one.hash));
    label.replace('"', "'")
}

fn dot(lineage: &Lineage) -> String {
    let mut text = "digraph lineage {\n  rankdir=LR;\n  node [shape=box];\n".to_owned();
    for one in &lineage.artifacts {
        let style = if one.depth == 0 { ", style=bold" } else { "" };
        let label = label(one, "\n").replace('\\', "\\\\").replace('\n', "\\n");
        text += &format!("  \"{}\" [label=\"{label}\"{style}];\n", one.hash);
    }
    for (made, from) in &lineage.made_from {
        text += &format!("  \"{from}\" -> \"{made}\";\n");
    }
    text + "}\n"
}

fn mermaid(lineage: &Lineage) -> String {
    let place = |hash: &str| lineage.artifacts.iter().position(|one| one.hash == hash);
    let mut text = "flowchart LR\n".to_owned();
    for (number, one) in lineage.artifacts.iter().enumerate() {
        text += &format!("  n{number}[\"{}\"]\n", label(one, "<br/>"));
    }
    for (made, from) in &lineage.made_from {
        if let (Some(made), Some(from)) = (place(made), place(from)) {
            text += &format!("  n{from} --> n{made}\n");
        }
    }
    text
}

pub(super) fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{RunId, Time};

    fn one(hash: &str, depth: i32) -> LineageArtifact {
        LineageArtifact {
            hash: hash.into(),
            depth,
            kind: "student".into(),
            size: 3,
            run: Some(RunId("r1".into())),
            stage: Some("di\"still".into()),
            created: Time(0),
        }
    }

    #[test]
    fn a_lineage_in_every_language() {
        let lineage = Lineage {
            artifacts: vec![one("aa", -1), one("bb", 0)],
            made_from: vec![("bb".into(), "aa".into())],
        };
        assert_eq!(
            mermaid(&lineage),
            "flowchart LR\n  n0[\"student aa<br/>di'still, run r1\"]\n  n1[\"student bb<br/>di'still, run r1\"]\n  n0 --> n1\n"
        );
        let dot = dot(&lineage);
        assert!(
            dot.contains("\"aa\" -> \"bb\";")
                && dot.contains("student bb\\ndi'still, run r1\", style=bold"),
            "{dot}"
        );
    }
}
