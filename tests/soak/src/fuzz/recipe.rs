//! Recipes, from their text to a plan or the diagnostics on the terminal; filters of `--where`.

use std::path::Path;
use std::rc::Rc;

use retort::plan::{self, Build, DescribeError, Descriptions, PluginIdentity};
use retort::{filter, recipe};
use retort_abi::{Description, Device, Diagnostic, StageJob};
use retort_candle::Candle;
use retort_engine::stage;

use super::Target;

pub const RECIPE: Target = Target {
    name: "recipe",
    exercise: exercise_recipe,
    tokens: &[
        b"version: 1\n",
        b"backend: candle\n",
        b"stages:\n",
        b"params:\n",
        b"${params.a}",
        b"${params",
        b"$${",
        b"{kind: ",
        b"kind: distill\n",
        b"kind: trajectories\n",
        b"kind: sample\n",
        b"train: {steps: ",
        b"batch: 4611686018427387904",
        b"threads: 1000000000",
        b"seed: 0x1f",
        b"timeout: 1h",
        b"workers: 4",
        b"device: cuda:1",
        b"dtype: bf16",
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!binary ",
        b"!tag ",
        b"- ",
        b"? ",
        b": ",
        b", ",
        b"|\n  ",
        b">-\n  ",
        b"---\n",
        b"...\n",
        b"%YAML 1.1\n",
        b"\"\\u202e\"",
        b"'''",
        b"[",
        b"]",
        b"{",
        b"}",
        b"~",
        b".nan",
        b"-.inf",
        b"\n#set a.b=c\n",
        b"\n#set stages.a.train.steps=1e3\n",
        b"\n#set params.x=[1, {y: z}]\n",
    ],
    mend: None,
    examples: None,
};

pub const FILTER: Target = Target {
    name: "filter",
    exercise: exercise_filter,
    tokens: &[
        b"metrics.",
        b"params.",
        b".last",
        b".min",
        b" and ",
        b" or ",
        b"not ",
        b" in (",
        b"(",
        b")",
        b" ~ ",
        b" != ",
        b" >= ",
        b"'",
        b"\"",
        b"\\",
        b"state = failed",
        b"started > ",
        b"2026-11-28",
        b"1h30m",
        b"none",
        b"tags",
        b",",
        b"%",
        b"_",
        b"*",
    ],
    mend: None,
    examples: None,
};

/// The text is a recipe; its lines `#set CHANGE` are given as `--set`, too.
fn exercise_recipe(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let set: Vec<String> = text
        .lines()
        .filter_map(|line| Some(line.strip_prefix("#set ")?.to_owned()))
        .collect();
    let recipe = match recipe::parse(Path::new("r.yaml"), "/nonexistent".into(), text, &set) {
        Ok(recipe) => recipe,
        Err(report) => return report.render(true),
    };
    let mut plugins = Candles;
    match plan::plan(&recipe, &mut plugins) {
        Err(report) => report.render(true),
        Ok(plan) => {
            let mut outcome = String::new();
            let findings = plan.validate(&mut plugins);
            for finding in findings
                .iter()
                .chain(&plan.warnings)
                .chain(&plan.missing_files())
            {
                outcome.push_str(&finding.render(&plan.path, &plan.text, false));
            }
            // What a run freezes is what `resume` continues.
            let frozen = serde_json::to_string(&plan).expect("a plan is data");
            let thawed: plan::Plan = serde_json::from_str(&frozen).expect("and read back");
            assert_eq!(thawed.stages, plan.stages);
            outcome
        }
    }
}

fn exercise_filter(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let named = match filter::parse_name(&text) {
        Ok(name) => format!("{:?}", name.field.parts.len()),
        Err(error) => error.marked(),
    };
    match filter::parse(&text) {
        Ok(filter) => format!("{named} {:?}", filter.expr),
        Err(error) => format!("{named} {error} {}", error.marked()),
    }
}

/// Knows the plugin `candle`, in this process.
struct Candles;

impl Descriptions for Candles {
    fn describe(&mut self, plugin: &str) -> Result<Rc<Build>, DescribeError> {
        if plugin != "candle" {
            return Err(DescribeError {
                message: format!("plugin `{plugin}` was not found"),
                hint: None,
            });
        }
        let identity = PluginIdentity {
            name: plugin.into(),
            path: "/plugins/libretort_candle.so".into(),
            version: "0.1.0".into(),
            hash: "f00d".into(),
        };
        Ok(Build::new(identity, description()))
    }

    fn variants(&mut self, _: &str) -> Vec<Result<Rc<Build>, DescribeError>> {
        Vec::new()
    }

    fn devices(&mut self, _: &PluginIdentity) -> Result<Vec<Device>, DescribeError> {
        let cpu = Device {
            name: "cpu".into(),
            model: String::new(),
            memory: None,
            unusable: None,
        };
        Ok(vec![cpu])
    }

    fn validate(
        &mut self,
        _: &str,
        jobs: &[StageJob],
    ) -> Result<Vec<Vec<Diagnostic>>, DescribeError> {
        let kinds = stage::all::<Candle>();
        let check = |job: &StageJob| {
            let kind = kinds.iter().find(|kind| (kind.describe)().kind == job.kind);
            (kind.expect("the plan knows the kind").check)(job)
        };
        Ok(jobs.iter().map(check).collect())
    }

    fn names(&mut self) -> Vec<String> {
        vec!["candle".into()]
    }
}

/// What the plugin says of itself, made once: it takes longer than to read a recipe.
fn description() -> Description {
    thread_local! {
        static DESCRIPTION: Description = Description {
            name: "candle".into(),
            version: "0.1.0".into(),
            summary: String::new(),
            license: String::new(),
            devices: vec!["cpu".into()],
            dtypes: vec!["f32".into()],
            families: vec!["llamagen".into(), "var".into()],
            libraries: Vec::new(),
            stages: stage::all::<Candle>().iter().map(|kind| (kind.describe)()).collect(),
        };
    }
    DESCRIPTION.with(Clone::clone)
}
