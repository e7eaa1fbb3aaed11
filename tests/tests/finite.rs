//! NaN and infinity: which steps training skips, and what sampling refuses, on any backend.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use retort_abi::{ArtifactMeta, Cancel, Failure, FailureCode, Host, LogLevel};
use retort_candle::Candle;
use retort_engine::Error;
use retort_engine::backend::{FlowSolver, Tensors, Unary};
use retort_engine::collective::SingleRank;
use retort_engine::model::dropout::Dropout;
use retort_engine::model::{
    BatchConditioning, ConditioningShape, Generation, Guidance, PrefixMask, Teacher, TokenShape,
};
use retort_engine::random::noise;
use retort_engine::sampler::{Choice, Distribution, autoregressive, choices};
use retort_engine::tape::Variable;
use retort_engine::train::{StepOutput, TrainOptions, TrainingLoop};

type Tensor = <Candle as Tensors>::Tensor;

fn candle() -> Candle {
    Candle::open("cpu", "f32", 1).expect("a CPU")
}

/// Predicts the same for every token, except for one sample at one AR step.
struct Broken {
    shape: TokenShape,
    sample: usize,
    step: usize,
    value: f32,
}

struct Tokens<'a>(&'a Broken, usize);

impl Teacher<Candle> for Broken {
    fn token_shape(&self) -> &TokenShape {
        &self.shape
    }
    fn forced_with(
        &self,
        _: &BatchConditioning<Candle>,
        _: &Tensor,
        _: &Dropout,
    ) -> Result<Variable<Candle>, Error> {
        Err(Error::Internal("not asked for".into()))
    }
    fn recompute(&mut self, _: bool) {}
    fn generate<'a>(
        &'a self,
        _: &BatchConditioning<Candle>,
        _: Option<Guidance>,
    ) -> Result<Box<dyn Generation<Candle> + 'a>, Error> {
        Ok(Box::new(Tokens(self, 0)))
    }
    fn at_once(
        &self,
        _: &BatchConditioning<Candle>,
        _: Option<Guidance>,
        _: Option<&Tensor>,
    ) -> Result<Tensor, Error> {
        Err(Error::Internal("not asked for".into()))
    }
}

impl Generation<Candle> for Tokens<'_> {
    fn advance(&mut self, _: Option<&Tensor>) -> Result<Tensor, Error> {
        let (count, k) = (self.0.shape.steps[self.1], self.0.shape.vocabulary);
        let mut logits = noise(1, self.1 as u64, 3 * count, k);
        if self.1 == self.0.step {
            // The scale's last token.
            logits[((self.0.sample + 1) * count - 1) * k + 2] = self.0.value;
        }
        self.1 += 1;
        candle().floats(&logits, &[3, count, k])
    }
    fn prefill(&mut self, _: &Tensor, _: PrefixMask) -> Result<Tensor, Error> {
        Err(Error::Internal("not asked for".into()))
    }
}

#[test]
fn logits_that_are_not_finite_name_their_sample() {
    let backend = candle();
    let shape = TokenShape {
        steps: vec![1, 4, 9],
        vocabulary: 7,
        dim: 2,
        condition: ConditioningShape::Classes(3),
    };
    let classes = backend.indices(&[0, 1, 2], &[3]).expect("classes");
    let eps = backend
        .floats(&noise(5, 0, 3 * 14, 2), &[3, 14, 2])
        .expect("noise");
    let codebook = backend.floats(&noise(6, 0, 7, 2), &[7, 2]).expect("codes");
    let truncated = Distribution {
        top_k: 3,
        ..Default::default()
    };
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5] {
        let teacher = Broken {
            shape: shape.clone(),
            sample: 1,
            step: 2,
            value,
        };
        for distribution in [Distribution::default(), truncated] {
            let mut drawn = choices(1, 40, 3);
            let random = Choice::Random(&mut drawn);
            let flow = Choice::Flow {
                noise: &eps,
                codebook: &codebook,
                solver: FlowSolver { steps: 10 },
            };
            for mut choice in [random, flow] {
                let conditioning = BatchConditioning::Classes(classes.clone());
                let made =
                    autoregressive(&teacher, &conditioning, &distribution, &mut choice, None, 3);
                match made.map_err(|e| e.of_samples(40)) {
                    Ok(_) => assert!(value.is_finite(), "{value}"),
                    Err(e) => {
                        let expected =
                            "sample 41: the teacher's logits at AR step 2 are not finite";
                        assert_eq!(e.to_string(), expected);
                        assert_eq!(Failure::from(e).code, FailureCode::Numerical);
                    }
                }
            }
        }
    }
}

/// Stores metrics; nothing else is used.
#[derive(Default)]
struct Recorder(Mutex<Vec<(String, u64, f64)>>);

impl Recorder {
    fn of(&self, name: &str) -> Vec<(u64, f64)> {
        let all = self.0.lock().expect("no panic");
        let own = all.iter().filter(|(own, _, _)| own == name);
        own.map(|(_, step, value)| (*step, *value)).collect()
    }
}

impl Host for Recorder {
    fn log(&self, _: LogLevel, _: &str) {}
    fn metric(&self, name: &str, step: u64, value: f64) {
        self.0
            .lock()
            .expect("no panic")
            .push((name.into(), step, value));
    }
    fn progress(&self, _: u64, _: u64, _: &str) {}
    fn cancelled(&self) -> Cancel {
        Cancel::Run
    }
    fn artifact_begin(&self, _: &str, _: &str) -> Result<(u64, PathBuf), Failure> {
        Err(Failure::new(FailureCode::Internal, "none"))
    }
    fn artifact_commit(&self, _: u64, _: &ArtifactMeta) -> Result<(), Failure> {
        Ok(())
    }
    fn artifact_abort(&self, _: u64) {}
}

/// Trains one vector towards 0 for 40 steps, of which some have a loss or a gradient that is not finite. Returns what it
/// ends with, and the steps that were computed.
fn train(
    host: &Recorder,
    work_dir: &Path,
    skip_at_most: u64,
    bad: impl Fn(u64) -> Option<f32>,
) -> (Result<Vec<f32>, Error>, Vec<u64>) {
    let backend = candle();
    let x = backend.floats(&[1.0, -2.0, 3.0], &[3]).expect("a vector");
    let params = vec![("x".to_owned(), Variable::parameter(x))];
    let options = TrainOptions {
        steps: 40,
        warmup: 1,
        skip_at_most,
        ..Default::default()
    };
    let fit = TrainingLoop {
        host,
        backend: &backend,
        work_dir: Some(work_dir),
        name: "test",
        ranks: &SingleRank,
        options: &options,
        params: &params,
        ema: None,
        kept: None,
        adversary: None,
    };
    let seen = RefCell::new(Vec::new());
    let made = fit.run(
        |step| {
            seen.borrow_mut().push(step);
            let by = backend.floats(&[bad(step).unwrap_or(1.0)], &[1])?;
            let square = params[0].1.unary(Unary::Square)?.mean_all()?;
            let loss = square.mul(&Variable::constant(by))?;
            let figures = Vec::new();
            Ok(StepOutput::new(loss, figures))
        },
        None,
    );
    let made = made.map(|weights| weights["x"].data.clone());
    (made, seen.into_inner())
}

#[test]
fn steps_that_are_not_finite_are_left_out_and_counted() {
    for value in [f32::NAN, f32::INFINITY] {
        let [dir, other] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        let host = Recorder::default();
        let bad = |step| matches!(step, 5 | 6 | 20).then_some(value);
        let (made, steps) = train(&host, dir.path(), 2, bad);
        let made = made.expect("weights");
        assert_eq!(steps.len(), 40);
        assert!(made.iter().all(|x| x.is_finite()));
        let counted = host.of("test/skipped_steps");
        assert_eq!(counted, [(5, 1.0), (6, 2.0), (20, 3.0)]);
        // Those steps change nothing; the others do.
        let (whole, _) = train(&Recorder::default(), other.path(), 2, |_| None);
        let moved = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
        let whole = whole.expect("weights");
        assert!(moved(&whole) < moved(&made) && moved(&made) < 14.0);
    }
}

#[test]
fn a_training_fails_beyond_the_limit_and_goes_on_after_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let bad = |step| (10..14).contains(&step).then_some(f32::NAN);
    let (made, steps) = train(&Recorder::default(), dir.path(), 2, bad);
    let error = made.expect_err("three steps in a row").to_string();
    assert!(
        error.contains("at step 12 the loss is NaN") && error.contains("`skip_at_most`"),
        "{error}"
    );
    assert_eq!(steps.last(), Some(&12));
    // It continues the training after the steps that made it fail.
    let host = Recorder::default();
    let (made, steps) = train(&host, dir.path(), 2, bad);
    made.expect("weights");
    assert_eq!((steps[0], steps.len()), (13, 27));
    assert_eq!(host.of("test/skipped_steps"), [(13, 4.0)]);

    let dir = tempfile::tempdir().expect("a directory");
    let (made, _) = train(&Recorder::default(), dir.path(), 0, |step| {
        (step == 3).then_some(f32::NAN)
    });
    made.expect_err("not one");
}

#[test]
fn a_training_that_ends_in_more_faults_than_it_took_steps_fails() {
    let ends_in = |from: u64| {
        let dir = tempfile::tempdir().expect("a directory");
        let bad = |step| (step >= from).then_some(f32::NAN);
        train(&Recorder::default(), dir.path(), 100, bad).0
    };
    let error = ends_in(1).expect_err("one step was taken").to_string();
    let said = "; the last 39 of its 40 steps were skipped, more than were taken";
    assert!(
        error.contains("at step 39 the loss is NaN") && error.ends_with(said),
        "{error}"
    );
    ends_in(19).expect_err("19 steps were taken, 21 left out");
    ends_in(20).expect("as many steps as were left out");
}

#[test]
fn a_damaged_checkpoint_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let bad = |step| (step == 12).then_some(f32::NAN);
    let (made, _) = train(&Recorder::default(), dir.path(), 0, bad);
    made.expect_err("a step that is not left out");
    let mut files = std::fs::read_dir(dir.path()).expect("a directory");
    let file = files.next().expect("a checkpoint").expect("a file").path();
    let whole = std::fs::read(&file).expect("a checkpoint");
    for kept in [0, 20, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..kept]).expect("a checkpoint");
        let (made, _) = train(&Recorder::default(), dir.path(), 0, |_| None);
        let error = made.expect_err("it is cut off").to_string();
        let named = error.starts_with(&file.display().to_string());
        assert!(
            named && error.ends_with("; delete it to start anew"),
            "{error}"
        );
    }
}

#[test]
fn weights_that_are_not_finite_are_no_result() {
    // The last steps are skipped, so that nothing hides the effect of the step before.
    let dir = tempfile::tempdir().expect("a directory");
    let backend = candle();
    let params = vec![(
        "x".to_owned(),
        Variable::parameter(backend.floats(&[1.0], &[1]).expect("a number")),
    )];
    let options = TrainOptions {
        steps: 2,
        warmup: 1,
        learning_rate: f64::INFINITY,
        ..Default::default()
    };
    let fit = TrainingLoop {
        host: &Recorder::default(),
        backend: &backend,
        work_dir: Some(dir.path()),
        name: "test",
        ranks: &SingleRank,
        options: &options,
        params: &params,
        ema: None,
        kept: None,
        adversary: None,
    };
    let step = |_| {
        let loss = params[0].1.unary(Unary::Square)?.mean_all()?;
        let figures = Vec::new();
        Ok(StepOutput::new(loss, figures))
    };
    let error = fit
        .run(step, None)
        .expect_err("an infinite weight")
        .to_string();
    assert!(error.contains("weights of x"), "{error}");
}
