//! `retort graph`.

use clap::ValueEnum;

use crate::cli::{Context, Error, RecipeArgs, talk};
use crate::plan::{self, Plan, PlannedStage};
use crate::plugin::{Plugins, search_dirs};
use crate::recipe;

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
    let plan = plan::plan(&recipe, &mut plugins)?;
    let drawing = match args.format {
        GraphFormat::Text => text(&plan),
        GraphFormat::Dot => dot(&plan),
        GraphFormat::Mermaid => mermaid(&plan),
    };
    talk::print(&drawing)?;
    Ok(())
}

/// What a stage takes from others: their indices, each with the options that name it.
fn inputs<'p>(plan: &'p Plan, stage: &'p PlannedStage) -> Vec<(usize, Vec<String>)> {
    let mut inputs: Vec<(usize, Vec<String>)> = Vec::new();
    for reference in &stage.references {
        let Some(index) = plan
            .stages
            .iter()
            .position(|other| other.name == reference.stage)
        else {
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

/// A line per stage, in the order in which they can run.
fn text(plan: &Plan) -> String {
    let width = |of: fn(&PlannedStage) -> &str| {
        plan.stages
            .iter()
            .map(|stage| of(stage).len())
            .max()
            .unwrap_or(0)
    };
    let (names, kinds) = (width(|stage| &stage.name), width(|stage| &stage.kind));
    let mut text = String::new();
    for stage in &plan.stages {
        let inputs: Vec<&str> = inputs(plan, stage)
            .into_iter()
            .map(|(input, _)| plan.stages[input].name.as_str())
            .collect();
        let line = match inputs.as_slice() {
            [] => format!("{:names$}  {}", stage.name, stage.kind),
            inputs => format!(
                "{:names$}  {:kinds$}  <- {}",
                stage.name,
                stage.kind,
                inputs.join(", ")
            ),
        };
        text.push_str(&format!("{line}\n"));
    }
    text
}

fn dot(plan: &Plan) -> String {
    let mut text = format!(
        "digraph \"{}\" {{\n  rankdir=LR;\n  node [shape=box];\n",
        plan.name
    );
    for stage in &plan.stages {
        text.push_str(&format!(
            "  \"{0}\" [label=\"{0}\\n{1}\"];\n",
            stage.name, stage.kind
        ));
    }
    for stage in &plan.stages {
        for (input, options) in inputs(plan, stage) {
            let input = &plan.stages[input].name;
            text.push_str(&format!(
                "  \"{input}\" -> \"{}\" [label=\"{}\"];\n",
                stage.name,
                options.join(", ")
            ));
        }
    }
    text + "}\n"
}

/// Numbers as node names: Mermaid has reserved words, `end` among them.
fn mermaid(plan: &Plan) -> String {
    let mut text = "flowchart LR\n".to_owned();
    for (index, stage) in plan.stages.iter().enumerate() {
        text.push_str(&format!(
            "  n{index}[\"{}<br/>{}\"]\n",
            stage.name, stage.kind
        ));
    }
    for (index, stage) in plan.stages.iter().enumerate() {
        for (input, options) in inputs(plan, stage) {
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
}
