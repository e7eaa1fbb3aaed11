//! Trainings by several ranks: what they exchange, and what remains of a skipped step.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use retort_abi::{
    ArtifactMeta, Cancel, Failure, FailureCode, Host, LogLevel, Part, Plugin, StageJob,
};
use retort_candle::Candle;
use retort_engine::backend::{Tensors, Unary};
use retort_engine::collective::{Collective, SingleRank};
use retort_engine::plugin::{EnginePlugin, PluginInfo};
use retort_engine::tape::Variable;
use retort_engine::train::{HeldOut, StepOutput, TrainOptions, TrainingLoop};
use retort_engine::weights::Weights;
use retort_engine::{Error, Result};
use retort_tests::threads::{ThreadRank, ranks, together};
use serde_json::json;

/// Points of series: steps and values.
type Series = BTreeMap<String, Vec<(u64, f64)>>;

/// Records its calls.
#[derive(Default)]
struct Listener {
    lines: Mutex<Vec<String>>,
    series: Mutex<Series>,
    others: Mutex<Vec<&'static str>>,
}

impl Listener {
    fn also(&self, call: &'static str) {
        self.others.lock().expect("calls").push(call);
    }
}

impl Host for Listener {
    fn log(&self, level: LogLevel, message: &str) {
        match level {
            LogLevel::Info | LogLevel::Warn => {
                self.lines.lock().expect("lines").push(message.into());
            }
            _ => {}
        }
    }
    fn metric(&self, series: &str, step: u64, value: f64) {
        let mut all = self.series.lock().expect("series");
        all.entry(series.into()).or_default().push((step, value));
    }
    fn progress(&self, _: u64, _: u64, _: &str) {
        self.also("progress");
    }
    fn cancelled(&self) -> Cancel {
        Cancel::Run
    }
    fn artifact_begin(&self, _: &str, _: &str) -> Result<(u64, PathBuf), Failure> {
        self.also("artifact");
        Err(Failure::new(FailureCode::Internal, "none"))
    }
    fn artifact_commit(&self, _: u64, _: &ArtifactMeta) -> Result<(), Failure> {
        Ok(())
    }
    fn artifact_abort(&self, _: u64) {}
}

fn candle() -> Candle {
    Candle::open("cpu", "f32", 1).expect("a CPU")
}

type Named = Vec<(String, Variable<Candle>)>;

/// Parameters of these sizes.
fn parameters(backend: &Candle, sizes: &[usize]) -> Named {
    let parameter = |(number, size): (usize, &usize)| {
        let values: Vec<f32> = (0..*size)
            .map(|at| ((at % 1000) as f32 * 0.7 + number as f32).sin())
            .collect();
        let tensor = backend.floats(&values, &[*size]).expect("a vector");
        (format!("p{number}"), Variable::parameter(tensor))
    };
    sizes.iter().enumerate().map(parameter).collect()
}

fn options(steps: u64, zero_stage: u8) -> TrainOptions {
    TrainOptions {
        steps,
        batch: 4,
        warmup: 1,
        learning_rate: 0.01,
        checkpoint_seconds: 1000,
        zero_stage,
        ..Default::default()
    }
}

/// The mean square of all parameters, weighted by a rank's share of a step's part.
fn loss(params: &Named, share: f64) -> Result<Variable<Candle>> {
    let mut sum: Option<Variable<Candle>> = None;
    for (_, p) in params {
        let square = p.unary(Unary::Square)?.mean_all()?;
        sum = Some(match sum {
            None => square,
            Some(sum) => sum.add(&square)?,
        });
    }
    let sum = sum.ok_or_else(|| Error::Internal("no parameters".into()))?;
    sum.affine(share, 0.0)
}

/// Two steps of a training, each in `parts`.
fn trained(
    dir: &Path,
    ranks: &dyn Collective,
    sizes: &[usize],
    parts: usize,
    zero_stage: u8,
) -> Weights {
    let (backend, host) = (candle(), Listener::default());
    let params = parameters(&backend, sizes);
    let options = options(2, zero_stage);
    let fit = TrainingLoop {
        host: &host,
        backend: &backend,
        work_dir: Some(dir),
        name: "test",
        ranks,
        options: &options,
        params: &params,
        ema: None,
        kept: None,
        adversary: None,
    };
    let share = 1.0 / (parts * ranks.size()) as f64;
    let part = |_, _| Ok(StepOutput::new(loss(&params, share)?, Vec::new()));
    fit.run_in_parts(parts, part, None).expect("weights")
}

/// Gradients of 60 MB take two sums, and with sharded moments the weights take as many messages. Either way, and with any
/// number of parts, all ranks have the weights of a single process.
#[test]
fn gradients_of_several_buckets_are_those_of_one_process() {
    let sizes = [3_500_000, 3_500_001, 7, 4_000_000, 4_000_000];
    let dir = tempfile::tempdir().expect("a directory");
    let alone = trained(dir.path(), &SingleRank, &sizes, 1, 0);
    for (parts, zero_stage) in [(1, 0), (2, 0), (1, 1)] {
        let dir = tempfile::tempdir().expect("a directory");
        let made = together(2, |rank| {
            let weights = trained(dir.path(), rank, &sizes, parts, zero_stage);
            (weights, rank.sums.lock().expect("lengths").clone())
        });
        for (weights, sums) in &made {
            let buckets: Vec<usize> = sums.iter().copied().filter(|n| *n > 1000).collect();
            assert_eq!(buckets.len(), 4, "{buckets:?}");
            assert_eq!(
                buckets.iter().sum::<usize>(),
                2 * sizes.iter().sum::<usize>()
            );
            for (name, values) in &alone {
                assert!(values.data == weights[name].data, "{name}, {parts} parts");
            }
        }
    }
}

/// A rank's training of a few numbers: its result and its host's calls.
struct Trained {
    made: Result<Weights>,
    host: Listener,
}

impl Trained {
    fn said(self) -> Vec<String> {
        self.host.lines.into_inner().expect("lines")
    }

    fn series(&self, name: &str) -> Vec<(u64, f64)> {
        let all = self.host.series.lock().expect("series");
        all.get(name).cloned().unwrap_or_default()
    }
}

/// Trains. The callback before a step also returns a factor for its loss.
fn train_few(
    dir: &Path,
    ranks: &dyn Collective,
    options: &TrainOptions,
    before: impl Fn(u64, &Candle, &Named) -> Result<f64>,
) -> Trained {
    let (backend, host) = (candle(), Listener::default());
    let params = parameters(&backend, &[5, 3]);
    let fit = TrainingLoop {
        host: &host,
        backend: &backend,
        work_dir: Some(dir),
        name: "test",
        ranks,
        options,
        params: &params,
        ema: None,
        kept: None,
        adversary: None,
    };
    let share = 1.0 / ranks.size() as f64;
    let step = |step| {
        let factor = before(step, &backend, &params)?;
        Ok(StepOutput::new(loss(&params, factor * share)?, Vec::new()))
    };
    let made = fit.run(step, None);
    Trained { made, host }
}

/// The steps, of eight, in which each rank waits less long for the others than it may.
fn hurried_steps(checkpoint_seconds: u64, measured_every: u64) -> Vec<Vec<usize>> {
    let dir = tempfile::tempdir().expect("a directory");
    let options = TrainOptions {
        checkpoint_seconds,
        ..options(8, 0)
    };
    together(2, |rank| {
        let (backend, host) = (candle(), Listener::default());
        let params = parameters(&backend, &[5, 3]);
        let fit = TrainingLoop {
            host: &host,
            backend: &backend,
            work_dir: Some(dir.path()),
            name: "test",
            ranks: rank,
            options: &options,
            params: &params,
            ema: None,
            kept: None,
            adversary: None,
        };
        let mut measure = || -> Result<f64> { Ok(1.0) };
        let held_out = HeldOut {
            every: measured_every,
            name: "held_out",
            measure: &mut measure,
            keep_best: false,
        };
        let step = |_| Ok(StepOutput::new(loss(&params, 0.5)?, Vec::new()));
        fit.run(step, Some(held_out)).expect("weights");
        let set = rank.patience.lock().expect("times").clone();
        // Before each step and after it.
        let steps: Vec<&[Option<Duration>]> = set.chunks(2).collect();
        assert_eq!(steps.len(), 8);
        assert!(steps.iter().all(|times| times[1].is_none()), "{set:?}");
        let least = Duration::from_secs(40);
        assert!(set.iter().flatten().all(|time| *time >= least), "{set:?}");
        let is_hurried = |step: &usize| steps[*step][0].is_some();
        (0..8).filter(is_hurried).collect::<Vec<usize>>()
    })
}

/// Ranks wait long for each other only when one of them may be busy alone: at first, after a measurement, after a checkpoint.
#[test]
fn ranks_wait_long_for_each_other_when_one_may_be_busy_alone() {
    let expected = vec![2, 3, 5, 6, 7];
    assert_eq!(hurried_steps(1000, 4), [expected.clone(), expected]);
    let saves_each = hurried_steps(0, 100);
    assert!(saves_each.iter().all(Vec::is_empty), "{saves_each:?}");
}

/// A training continues with another number of ranks, and reports it.
#[test]
fn how_many_ranks_trained_before_is_said() {
    let dir = tempfile::tempdir().expect("a directory");
    together(3, |rank| trained(dir.path(), rank, &[5, 3], 1, 0));
    let said = together(2, |rank| {
        let trained = train_few(dir.path(), rank, &options(4, 0), |_, _, _| Ok(1.0));
        trained.made.as_ref().expect("weights");
        trained.said()
    });
    let expected = "test: continuing from step 2 of 4; workers until now: 3, from here on: 2";
    assert!(said.iter().all(|said| said == &[expected]), "{said:?}");
}

/// Diverging weights are detected at the next checkpoint, which is not written. They have a separate error, because neither
/// fewer workers nor a retry would help.
#[test]
fn ranks_whose_weights_differ_end_before_a_checkpoint() {
    let dir = tempfile::tempdir().expect("a directory");
    let errors = together(2, |rank| {
        let trained = train_few(dir.path(), rank, &options(3, 0), |step, backend, params| {
            if step == 1 && rank.rank() == 1 {
                let value = params[0].1.value();
                let mut values = Candle::to_floats(value)?;
                values[3] = f32::from_bits(values[3].to_bits() + 1);
                Candle::assign_(value, &backend.floats(&values, &[5])?)?;
            }
            Ok(1.0)
        });
        trained.made.expect_err("weights that differ")
    });
    for error in errors {
        assert!(matches!(error, Error::RanksDiffer(_)), "{error:?}");
        let expected = "before step 3, 1 of 2 workers have different weights from the first";
        assert!(error.to_string().contains(expected), "{error}");
        let failure = Failure::from(error);
        assert_eq!(failure.code, FailureCode::WorkersDiffer);
        assert!(!failure.retryable);
    }
    let left = std::fs::read_dir(dir.path()).expect("a directory").count();
    assert_eq!(left, 0);
}

/// The seconds give communication's share of a step, and how much of it the backward pass hides.
#[test]
fn shares_of_communication_follow_from_its_seconds() {
    let dir = tempfile::tempdir().expect("a directory");
    let told = together(2, |rank| {
        let trained = train_few(dir.path(), rank, &options(21, 0), |_, _, _| Ok(1.0));
        let of = |name: &str| trained.series(&format!("test/{name}"));
        [
            "communication",
            "communication_wait",
            "step_seconds",
            "communication_share",
            "overlap",
        ]
        .map(of)
    });
    assert_eq!(told[0], told[1], "means over all");
    let [seconds, waits, steps, shares, overlaps] = &told[0];
    for series in &told[0] {
        let at: Vec<u64> = series.iter().map(|(step, _)| *step).collect();
        assert_eq!(at, [0, 10, 20]);
    }
    for at in 0..3 {
        let [seconds, wait, step, share, overlap] =
            [seconds, waits, steps, shares, overlaps].map(|series| series[at].1);
        assert!(0.0 < seconds && 0.0 <= wait && wait <= seconds * 1.001);
        assert!(seconds < step, "{seconds} of {step} s");
        for part in [share, overlap] {
            assert!((0.0..=1.0).contains(&part), "{part}");
        }
        assert!((share - wait / step).abs() < 1e-5, "{share}");
        assert!((overlap - (1.0 - wait / seconds)).abs() < 1e-3, "{overlap}");
    }
    let alone = train_few(dir.path(), &SingleRank, &options(30, 0), |_, _, _| Ok(1.0));
    assert!(!alone.series("test/loss").is_empty());
    for name in [
        "communication",
        "step_seconds",
        "communication_share",
        "overlap",
    ] {
        assert!(alone.series(&format!("test/{name}")).is_empty(), "{name}");
    }
}

/// If the loss is not finite on one rank, all skip the step. It counts once, and all have the weights of a single process.
#[test]
fn a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all() {
    let bad = |step| if step == 2 { f64::NAN } else { 1.0 };
    for zero_stage in [0, 1] {
        let dir = tempfile::tempdir().expect("a directory");
        let alone = train_few(dir.path(), &SingleRank, &options(5, 0), |step, _, _| {
            Ok(bad(step))
        });
        let alone = alone.made.expect("weights");
        let dir = tempfile::tempdir().expect("a directory");
        let made = together(2, |rank| {
            let options = options(5, zero_stage);
            train_few(dir.path(), rank, &options, |step, _, _| {
                Ok(if rank.rank() == 1 { bad(step) } else { 1.0 })
            })
        });
        for trained in made {
            assert_eq!(trained.series("test/skipped_steps"), [(2, 1.0)]);
            let weights = trained.made.as_ref().expect("weights");
            for (name, values) in &alone {
                assert!(values.data == weights[name].data, "{name}");
            }
            let said = trained.said();
            assert!(said[0].ends_with("the step is skipped"), "{said:?}");
        }
    }
}

/// Too many in a row end all ranks for that reason.
#[test]
fn losses_of_one_rank_that_are_not_finite_end_all() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = TrainOptions {
        skip_at_most: 2,
        ..options(9, 0)
    };
    let errors = together(2, |rank| {
        let trained = train_few(dir.path(), rank, &options, |step, _, _| {
            Ok(match rank.rank() == 1 && step > 3 {
                true => f64::INFINITY,
                false => 1.0,
            })
        });
        let counted = trained.series("test/skipped_steps");
        assert_eq!(counted, [(4, 1.0), (5, 2.0), (6, 3.0)]);
        trained.made.expect_err("too many").to_string()
    });
    assert_eq!(errors[0], errors[1]);
    let expected = "3 steps in a row were skipped, and `skip_at_most` is 2";
    assert!(errors[0].contains(expected), "{}", errors[0]);
}

/// Only the first rank writes checkpoints, whatever the occasion: time, too many skipped steps, a lost rank, the end. Another
/// rank's directory would not even exist.
#[test]
fn the_first_rank_alone_writes_checkpoints() {
    /// Time and the end; skipped steps; a lost rank.
    const CASES: [&str; 3] = ["due", "skipped", "gone"];
    for (case, zero_stage) in CASES.iter().flat_map(|case| [(*case, 0), (*case, 1)]) {
        let dir = tempfile::tempdir().expect("a directory");
        let options = TrainOptions {
            checkpoint_seconds: 0,
            skip_at_most: 0,
            ..options(4, zero_stage)
        };
        let made = together(2, |rank| {
            let own = dir.path().join(rank.rank().to_string());
            if rank.rank() == 0 {
                std::fs::create_dir(&own).expect("a directory");
            }
            let trained = train_few(&own, rank, &options, |step, _, _| match case {
                "skipped" if step == 2 => Ok(f64::NAN),
                // Here, all learn of it at the same time.
                "gone" if step == 2 => Err(Error::Rank("another worker is gone".into())),
                _ => Ok(1.0),
            });
            assert!(
                !trained
                    .host
                    .others
                    .lock()
                    .expect("calls")
                    .contains(&"artifact")
            );
            trained.made.map(drop).map_err(|error| error.to_string())
        });
        assert_eq!(made[0], made[1], "{case}");
        assert_eq!(made[0].is_ok(), case == "due", "{case}: {made:?}");
        let names = |path: PathBuf| -> Vec<String> {
            let entries = std::fs::read_dir(path).expect("a directory");
            let name =
                |entry: std::io::Result<std::fs::DirEntry>| entry.expect("an entry").file_name();
            entries
                .map(|entry| name(entry).into_string().expect("a name"))
                .collect()
        };
        assert_eq!(names(dir.path().to_owned()), ["0"], "{case}");
        assert_eq!(
            names(dir.path().join("0")),
            ["test.checkpoint.safetensors"],
            "{case}"
        );
    }
}

/// The ranks of the next stage, by number.
static NEXT: Mutex<BTreeMap<usize, ThreadRank>> = Mutex::new(BTreeMap::new());

fn meet(_: &Candle, part: Part) -> Result<Box<dyn Collective>> {
    let rank = NEXT.lock().expect("ranks").remove(&part.index);
    Ok(Box::new(rank.expect("a rank")))
}

/// A whole stage with two workers, as the runner starts it: only the first sends metrics, progress and files, and neither sends
/// artifacts.
#[test]
fn of_the_workers_of_a_stage_the_first_alone_tells_and_writes() {
    let plugin = EnginePlugin::<Candle> {
        about: PluginInfo {
            name: "threads",
            version: "1",
            summary: "",
            license: "",
            devices: &["cpu"],
            dtypes: &["f32"],
            libraries: &[],
        },
        open: Candle::open,
        devices: Vec::new,
        collective: Some(meet),
    };
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/data/digits.csv");
    let digits = digits.canonicalize().expect("the digits");
    let dir = tempfile::tempdir().expect("a directory");
    NEXT.lock()
        .expect("ranks")
        .extend(ranks(2).map(|rank| (rank.rank(), rank)));
    let hosts = [0, 1].map(|_| Listener::default());
    std::thread::scope(|scope| {
        for (index, host) in hosts.iter().enumerate() {
            let work_dir = dir.path().join(index.to_string());
            std::fs::create_dir(&work_dir).expect("a directory");
            let job = StageJob {
                stage: "codes".into(),
                kind: "tokenizer".into(),
                options: json!({
                    "data": {"csv": digits, "height": 8, "width": 8, "max": 16},
                    "codebook_size": 16, "codebook_dim": 4, "channels": 8, "z_channels": 8,
                    "train": {"steps": 6, "batch": 8, "checkpoint_seconds": 0},
                }),
                seed: 1,
                device: "cpu".into(),
                dtype: "f32".into(),
                threads: 1,
                base_dir: dir.path().to_owned(),
                work_dir: Some(work_dir),
                inputs: BTreeMap::new(),
                sources: BTreeMap::new(),
                prepared: BTreeMap::new(),
                part: Some(Part { index, of: 2 }),
            };
            let plugin = &plugin;
            scope.spawn(move || {
                // A waiting rank blocks a thread, so each has one.
                let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
                let pool = pool.expect("a thread");
                pool.install(|| plugin.run(host, &job)).expect("an end");
            });
        }
    });
    let told = hosts.map(|host| {
        let lines = host.lines.into_inner().expect("lines").len();
        let series = host.series.into_inner().expect("series").len();
        let others = host.others.into_inner().expect("calls");
        assert!(!others.contains(&"artifact"), "the whole makes it");
        [lines, series, others.len()].map(|count| count > 0)
    });
    assert_eq!(told[0][1..], [true; 2], "series and progress");
    assert_eq!(told[1], [false; 3]);
    let checkpoint = |index: usize| {
        let entries = std::fs::read_dir(dir.path().join(index.to_string()));
        let mut names = entries
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name());
        names.any(|name| name.to_string_lossy().contains("checkpoint"))
    };
    assert_eq!([checkpoint(0), checkpoint(1)], [true, false]);
}

/// Steps leave state for later ones (a codebook's averages); a failed or skipped step leaves none.
#[test]
fn state_of_a_step_that_was_not_taken_is_as_before_it() {
    for fails in [false, true] {
        let dir = tempfile::tempdir().expect("a directory");
        let (backend, host) = (candle(), Listener::default());
        let params = parameters(&backend, &[3]);
        let options = options(4, 0);
        let kept = RefCell::new(vec![0.0]);
        let is_bad = Cell::new(true);
        let fit = TrainingLoop {
            host: &host,
            backend: &backend,
            work_dir: Some(dir.path()),
            name: "test",
            ranks: &SingleRank,
            options: &options,
            params: &params,
            ema: None,
            kept: Some(&kept),
            adversary: None,
        };
        let step = |step| {
            kept.borrow_mut()[0] += 1.0;
            let bad = step == 2 && is_bad.replace(step != 2);
            if bad && fails {
                return Err(Error::Rank("another worker is gone".into()));
            }
            let share = if bad { f64::NAN } else { 1.0 };
            Ok(StepOutput::new(loss(&params, share)?, Vec::new()))
        };
        let made = fit.run(step, None);
        match fails {
            true => {
                made.expect_err("a rank is gone");
                assert_eq!(*kept.borrow(), [2.0]);
                // The checkpoint is from before the step, so every step counts once.
                fit.run(step, None).expect("weights");
                assert_eq!(*kept.borrow(), [4.0]);
            }
            false => {
                made.expect("weights");
                assert_eq!(*kept.borrow(), [3.0]);
            }
        }
    }
}
