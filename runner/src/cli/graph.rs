//! `retort graph`.

use clap::ValueEnum;

use crate::cli::lineage::short as short_hash;
use crate::cli::{Context, Error, RecipeArgs, output};
use crate::cluster::devices;
use crate::plan::{Plan, PlannedStage};
use crate::plugin::{Plugins, search_dirs};
use crate::recipe;
use crate::settings::Settings;

/// Arguments of `graph`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// The language of the drawing.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub format: GraphFormat,
}

/// Languages of the drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GraphFormat {
    /// Indented lines.
    Text,
    /// Graphviz: `retort graph r.yaml --format dot | dot -Tsvg > r.svg`.
    Dot,
    /// Mermaid, for Markdown.
    Mermaid,
}

/// Prints the graph of stages.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let recipe = recipe::read(&args.recipe.recipe, &args.recipe.set, context.home())?;
    let runtime = context.runtime()?;
    let store = context.known_store(&runtime)?;
    let mut plugins = Plugins::new(search_dirs(&context.plugin_dirs), &runtime, store.as_ref());
    let settings = Settings::read(&recipe.source.base_dir, &context.given())?;
    let plan = devices::plan(&recipe, &mut plugins, &settings)?;
    let drawing = match args.format {
        GraphFormat::Text => text(&plan),
        GraphFormat::Dot => dot(&plan),
        GraphFormat::Mermaid => mermaid(&plan),
    };
    output::print(&drawing)?;
    Ok(())
}

/// A node: a stage, or an artifact of the store that the recipe takes.
struct Node<'p> {
    name: &'p str,
    /// Its kind, in the second line.
    text: String,
    /// None for an artifact, which has no inputs.
    stage: Option<&'p PlannedStage>,
}

/// The given artifacts, then the stages in execution order.
fn nodes(plan: &Plan) -> Vec<Node<'_>> {
    let given = plan.given.iter().map(|given| Node {
        name: &given.name,
        text: format!("{} {}", given.kind, short_hash(&given.hash)),
        stage: None,
    });
    let stages = plan.stages.iter().map(|stage| Node {
        name: &stage.name,
        text: stage.kind.clone(),
        stage: Some(stage),
    });
    given.chain(stages).collect()
}

/// The inputs of a node: their indices, each with the options that name it.
fn inputs(nodes: &[Node<'_>], node: &Node<'_>) -> Vec<(usize, Vec<String>)> {
    let mut inputs: Vec<(usize, Vec<String>)> = Vec::new();
    for reference in node.stage.iter().flat_map(|stage| &stage.references) {
        let named = |other: &Node<'_>| other.name == reference.stage;
        let Some(index) = nodes.iter().position(named) else {
            continue;
        };
        let option = reference.pointer[1..].replace('/', ".");
        match inputs.iter_mut().find(|(input, _)| *input == index) {
            Some((_, options)) => options.push(option),
            None => inputs.push((index, vec![option])),
        }
    }
    inputs
}

/// A line for each node.
fn text(plan: &Plan) -> String {
    let nodes = nodes(plan);
    let widest = |of: fn(&Node<'_>) -> usize| nodes.iter().map(of).max().unwrap_or(0);
    let (names, kinds) = (
        widest(|node| node.name.len()),
        widest(|node| node.text.len()),
    );
    let mut text = String::new();
    for node in &nodes {
        let inputs: Vec<&str> = inputs(&nodes, node)
            .into_iter()
            .map(|(input, _)| nodes[input].name)
            .collect();
        let (name, kind) = (node.name, &node.text);
        let end = match (node.stage, inputs.as_slice()) {
            (None, _) => "(in the store)".to_owned(),
            (Some(_), []) => String::new(),
            (Some(_), inputs) => format!("<- {}", inputs.join(", ")),
        };
        let line = format!("{name:names$}  {kind:kinds$}  {end}");
        text.push_str(&format!("{}\n", line.trim_end()));
    }
    text
}

/// Given artifacts have dashed frames.
fn dot(plan: &Plan) -> String {
    let nodes = nodes(plan);
    let mut text = format!(
        "digraph \"{}\" {{\n  rankdir=LR;\n  node [shape=box];\n",
        plan.name
    );
    for Node {
        name,
        text: kind,
        stage,
    } in &nodes
    {
        let style = if stage.is_none() {
            ", style=dashed"
        } else {
            ""
        };
        text.push_str(&format!(
            "  \"{name}\" [label=\"{name}\\n{kind}\"{style}];\n"
        ));
    }
    for node in &nodes {
        for (input, options) in inputs(&nodes, node) {
            text.push_str(&format!(
                "  \"{}\" -> \"{}\" [label=\"{}\"];\n",
                nodes[input].name,
                node.name,
                options.join(", ")
            ));
        }
    }
    text + "}\n"
}

/// Numbers as node names, because Mermaid has reserved words such as `end`. Given artifacts are round.
fn mermaid(plan: &Plan) -> String {
    let nodes = nodes(plan);
    let mut text = "flowchart LR\n".to_owned();
    for (index, node) in nodes.iter().enumerate() {
        let label = format!("\"{}<br/>{}\"", node.name, node.text);
        text.push_str(&match node.stage {
            Some(_) => format!("  n{index}[{label}]\n"),
            None => format!("  n{index}([{label}])\n"),
        });
    }
    for (index, node) in nodes.iter().enumerate() {
        for (input, options) in inputs(&nodes, node) {
            text.push_str(&format!(
                "  n{input} -->|\"{}\"| n{index}\n",
                options.join(", ")
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::fake;

    #[test]
    fn a_graph_in_every_language() {
        let recipe = "version: 1\nname: g\nbackend: fake\nstages:\n  end: {kind: tokenizer, data: d}\n  s: {kind: pretrain, tokenizer: end}\n";
        let plan = fake::plan(recipe, &[]).unwrap();
        assert_eq!(text(&plan), "end  tokenizer\ns    pretrain   <- end\n");
        assert_eq!(
            dot(&plan),
            r#"digraph "g" {
  rankdir=LR;
  node [shape=box];
  "end" [label="end\ntokenizer"];
  "s" [label="s\npretrain"];
  "end" -> "s" [label="tokenizer"];
}
"#
        );
        assert_eq!(
            mermaid(&plan),
            r#"flowchart LR
  n0["end<br/>tokenizer"]
  n1["s<br/>pretrain"]
  n0 -->|"tokenizer"| n1
"#
        );
    }

    #[test]
    fn artifacts_that_are_given_are_nodes() {
        let hash = "0123456789abcdef".repeat(4);
        let recipe = format!(
            "version: 1\nname: g\nbackend: fake\nartifacts:\n  codes: {{hash: {hash}, kind: tokenizer}}\nstages:\n  \
             s: {{kind: pretrain, tokenizer: codes}}\n"
        );
        let plan = fake::plan(&recipe, &[]).unwrap();
        let short = short_hash(&hash);
        assert_eq!(
            text(&plan),
            format!(
                "codes  tokenizer {short}  (in the store)\ns      pretrain{0:1$}  <- codes\n",
                "",
                short.len() + 2
            )
        );
        let dot = dot(&plan);
        assert!(
            dot.contains(&format!(
                "\"codes\" [label=\"codes\\ntokenizer {short}\", style=dashed];"
            )) && dot.contains("\"codes\" -> \"s\" [label=\"tokenizer\"];"),
            "{dot}"
        );
        let mermaid = mermaid(&plan);
        assert!(
            mermaid.contains(&format!("n0([\"codes<br/>tokenizer {short}\"])"))
                && mermaid.contains("n0 -->|\"tokenizer\"| n1"),
            "{mermaid}"
        );
    }
}
