//! Recipes, from their text to a plan or the diagnostics on the terminal; filters of `--where`.

use std::path::Path;
use std::rc::Rc;

use retort::plan::{self, Build, DescribeError, Descriptions, PluginIdentity};
use retort::settings::{self, Overrides, Settings};
use retort::sweep::{self, Parameter, Sweep};
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

/// Recipes with varied values, and `--sweep`; a sweep's definition as in histories.
pub const SWEEP: Target = Target {
    name: "sweep",
    exercise: exercise_sweep,
    tokens: &[
        b"sweep:\n  parameters:\n",
        b"    params.a: [1, 2]\n",
        b"    seed: {min: 1, max: 9}\n",
        b"{min: -9223372036854775808, max: 9223372036854775807}",
        b"{min: 1e-300, max: 1e300, log: true, count: 10000}",
        b"  sample: 10000\n",
        b"  seed: 18446744073709551615\n",
        b"  asha: {metric: loss, rungs: [1, 2, 4], reduction_factor: 2}\n",
        b"  objective: {metric: loss, goal: max}\n",
        b"\n#sweep seed=1..9",
        b"\n#sweep params.a=1,2,3",
        b"\n#sweep params.a=1e-5..1e-2 log 7",
        b"\"choice\":[\"1\",\"2\"]",
        b"\"whole\":{\"min\":0,\"max\":9,\"log\":true}",
        b"\"real\":{\"min\":0.0,\"max\":1.0,\"log\":false,\"count\":0}",
        b"..",
        b",",
        b"=",
        b"[",
        b"{",
        b"null",
        b".inf",
        b"-0.0",
    ],
    mend: None,
    examples: None,
};

/// A project's settings, and flags in its lines `#slurm KEY=VALUE`.
pub const PROJECT: Target = Target {
    name: "project",
    exercise: exercise_project,
    tokens: &[
        b"executor = \"slurm\"\n",
        b"[slurm]\n",
        b"[slurm.kinds.distill]\n",
        b"[slurm.kinds.a.kinds.b]\n",
        b"partition = \"p\"\n",
        b"time = 90\n",
        b"time = 18446744073709551615\n",
        b"cpus = 0\n",
        b"cpus = -1\n",
        b"array-limit = 9223372036854775807\n",
        b"array_limit = 1\n",
        b"requeue = 4294967295\n",
        b"signal = \"99999999999999h\"\n",
        b"poll = \"0.0000001s\"\n",
        b"sbatch = [\"--nice\", \"--array=1\"]\n",
        b"prologue = \"\"\"\n",
        b"'''",
        b"gres = \"gpu:1\"\n",
        b"\n#slurm distill.time=1:00",
        b"\n#slurm sbatch=--nice",
        b"[[slurm]]",
        b"\"\\u0000\"",
        b"{}",
        b"=",
    ],
    mend: None,
    examples: None,
};

fn exercise_sweep(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let parse = |set: &[String]| {
        recipe::parse(
            Path::new("r.yaml"),
            "/nonexistent".into(),
            text.clone(),
            set,
        )
    };
    let points = |sweep: &Sweep| match sweep.points() {
        Ok(points) => {
            assert!(points.len() as u64 <= sweep::MAX_POINTS);
            let set = points.last().cloned().unwrap_or_default();
            let said = sweep.shortage(points.len());
            let outcome = format!("{:?} {said:?}", points.len().checked_ilog2());
            match parse(&set) {
                Ok(_) => outcome,
                Err(report) => outcome + &report.render(false),
            }
        }
        Err(error) => error.to_string(),
    };
    if let Ok(sweep) = serde_json::from_str::<Sweep>(&text) {
        return points(&sweep);
    }
    let given = text.lines().filter_map(|line| line.strip_prefix("#sweep "));
    let given = given.map(Parameter::parse).collect::<Result<Vec<_>, _>>();
    let given = match given {
        Ok(given) => given,
        Err(error) => return error.to_string(),
    };
    let recipe = match parse(&[]) {
        Ok(recipe) => recipe,
        Err(report) => return report.render(false),
    };
    let mut sweep = recipe.sweep.clone().unwrap_or(Sweep {
        parameters: Vec::new(),
        objective: None,
        sample: None,
        asha: None,
    });
    sweep.parameters.extend(given);
    points(&sweep)
}

fn exercise_project(bytes: &[u8]) -> String {
    thread_local! {
        static FOLDER: tempfile::TempDir = super::folder();
    }
    FOLDER.with(|folder| {
        let path = folder.path().join(settings::FILE);
        std::fs::write(&path, bytes).expect("a file");
        let text = String::from_utf8_lossy(bytes);
        let slurm = text.lines().filter_map(|line| line.strip_prefix("#slurm "));
        let given = Overrides {
            slurm: slurm.map(str::to_owned).collect(),
            user_dir: Some(folder.path().join("user")),
            ..Overrides::default()
        };
        let settings = match Settings::read(folder.path(), &given) {
            Ok(settings) => settings,
            Err(error) => return error.to_string(),
        };
        let mut outcome = format!(
            "{:?} {}",
            settings.executor().0,
            settings.asks_for_gpus("distill")
        );
        for (name, _, _) in settings.list() {
            outcome.push_str(&name);
        }
        for kind in ["distill", "sample"] {
            match settings.profile(kind) {
                Ok(profile) => {
                    let runs = !profile.prologue.is_empty() || !profile.sbatch.is_empty();
                    let own = !given.slurm.is_empty();
                    assert!(own || !runs, "what nobody has trusted runs");
                    outcome.push_str(&format!("{:?}", profile.poll.as_secs().checked_ilog2()));
                }
                Err(error) => outcome.push_str(&error.to_string()),
            }
        }
        outcome
    })
}

/// The text is a recipe; its lines `#set CHANGE` are also passed as `--set`.
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
            // `resume` continues with what the run has frozen.
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

/// The plugin's description, made once, because it takes longer than reading a recipe.
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
