//! A teacher's generation: given tokens in one pass, guidance for some of the steps, parallel drawing of tokens, and how many
//! network passes each sampler makes.

use std::cell::Cell;

use retort_candle::Candle;
use retort_engine::Result;
use retort_engine::backend::{Tensors, Unary};
use retort_engine::bundle::{NetworkConfig, TokenizerConfig};
use retort_engine::model::dropout::Dropout;
use retort_engine::model::{
    BatchConditioning, CaptionBatch, CaptionShape, ConditioningShape, Generation, Guidance,
    Prediction, PrefixMask, Student, Teacher, TokenShape,
};
use retort_engine::random::noise;
use retort_engine::sampler::{
    Assistant, Choice, Distribution, StudentSampler, autoregressive, choices, skipping,
};
use retort_engine::size::Sides;
use retort_engine::stage::sample::drawer::Sampler;
use retort_engine::tape::{Variable, backward};
use retort_engine::weights::{Floats, Loader, ParameterSource, Weights};
use retort_tests::small;

type Tensor = <Candle as Tensors>::Tensor;

const BATCH: usize = 3;

struct Case {
    backend: Candle,
    teacher: Box<dyn Teacher<Candle>>,
    student: Box<dyn Student<Candle>>,
    codebook: Tensor,
}

fn candle() -> Candle {
    Candle::open("cpu", "f32", 1).expect("a CPU")
}

/// A teacher and a student of each family, with random weights.
fn cases() -> [Case; 2] {
    let [(raster, of_raster), (scales, of_scales)] = small::families(&[1, 2, 3, 4]);
    [
        Case::new(&raster, &of_raster),
        Case::new(&scales, &of_scales),
    ]
}

impl Case {
    fn new(network: &NetworkConfig, tokenizer: &TokenizerConfig) -> Self {
        let backend = candle();
        let of_tokenizer = disturbed(&backend, |loader| tokenizer.build(loader).map(drop));
        let load = |weights| Loader::new(&backend, ParameterSource::Host(weights), false, "drawn");
        let codes = tokenizer.build(&mut load(&of_tokenizer)).expect("codes");
        let of_teacher = disturbed(&backend, |loader| {
            let with = (tokenizer, &mut load(&of_tokenizer));
            network.teacher(loader, with).map(drop)
        });
        let of_student = disturbed(&backend, |loader| network.student(loader).map(drop));
        let with = (tokenizer, &mut load(&of_tokenizer));
        Self {
            codebook: codes.codebook().expect("codes"),
            teacher: network
                .teacher(&mut load(&of_teacher), with)
                .expect("a teacher"),
            student: network.student(&mut load(&of_student)).expect("a student"),
            backend,
        }
    }

    fn conditioning(&self) -> BatchConditioning<Candle> {
        let labels: Vec<u32> = (0..BATCH as u32).collect();
        BatchConditioning::Classes(self.backend.indices(&labels, &[BATCH]).expect("labels"))
    }

    /// Tokens of the first AR steps (b, l).
    fn tokens(&self, steps: usize) -> Tensor {
        let shape = self.teacher.token_shape();
        let l = shape.count();
        let ids: Vec<u32> = (0..BATCH * l).map(|i| (i * 7 % 16) as u32).collect();
        let all = self.backend.indices(&ids, &[BATCH, l]).expect("tokens");
        Candle::narrow(&all, 1, 0, shape.tokens_before(steps)).expect("tokens")
    }

    /// Logits of each AR step of a generation that is given the same tokens.
    fn logits(&self, guidance: Option<Guidance>) -> Vec<Vec<f32>> {
        let shape = self.teacher.token_shape();
        let all = self.tokens(shape.steps.len());
        let mut generation = self
            .teacher
            .generate(&self.conditioning(), guidance)
            .expect("a generation");
        let (mut previous, mut at) = (None, 0);
        let each = shape.steps.iter().map(|&count| {
            let logits = generation.advance(previous.as_ref()).expect("logits");
            previous = Some(Candle::narrow(&all, 1, at, count).expect("tokens"));
            at += count;
            Candle::to_floats(&logits).expect("floats")
        });
        each.collect()
    }
}

/// A network's initial parameters, with noise added.
fn disturbed(backend: &Candle, build: impl FnOnce(&mut Loader<Candle>) -> Result<()>) -> Weights {
    let mut loader = Loader::new(backend, ParameterSource::Init(1), true, "drawn");
    build(&mut loader).expect("a network");
    let params = loader.into_params();
    let each = params.iter().enumerate().map(|(i, (name, p))| {
        let mut data = Candle::to_floats(p.value()).expect("floats");
        let noise = noise(4, i as u64, data.len(), 1);
        data.iter_mut().zip(noise).for_each(|(x, n)| *x += 0.1 * n);
        let shape = p.shape();
        (name.clone(), Floats { shape, data })
    });
    each.collect()
}

fn guidance(interval: Option<usize>) -> Option<Guidance> {
    Some(Guidance {
        scale: 2.0,
        interval,
    })
}

#[track_caller]
fn close(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    let scale = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let most = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let most = most.fold(0.0f32, f32::max);
    assert!(most <= 1e-5 * scale, "{what}: {most} of {scale}");
}

/// A dropped caption has the unconditional features after its own padding, and they get no gradient.
#[test]
fn a_dropped_caption_is_that_of_none() {
    let [(mut network, tokenizer), _] = small::families(&[1, 2]);
    let (positions, width) = (5, 6);
    if let NetworkConfig::Llamagen(c) = &mut network {
        c.condition = ConditioningShape::Captions(CaptionShape { positions, width });
    }
    let backend = candle();
    let weights = disturbed(&backend, |loader| {
        let mut codes = Loader::new(&backend, ParameterSource::Init(2), false, "drawn");
        network.teacher(loader, (&tokenizer, &mut codes)).map(drop)
    });
    let mut loader = Loader::new(&backend, ParameterSource::Host(&weights), true, "drawn");
    let mut codes = Loader::new(&backend, ParameterSource::Init(2), false, "drawn");
    let teacher = network
        .teacher(&mut loader, (&tokenizer, &mut codes))
        .expect("a teacher");
    let params = loader.into_params();

    let none = &weights["cls_embedding.uncond_embedding"].data;
    let padding = vec![2, 0, 4];
    let mut given = noise(9, 0, BATCH * positions * width, 1);
    for (features, before) in given.chunks_exact_mut(positions * width).zip(&padding) {
        features[..before * width].fill(0.0);
    }
    let forced = |features: &[f32], dropped: &[bool]| {
        let shape = [BATCH, positions, width];
        let captions = CaptionBatch {
            features: backend.floats(features, &shape).expect("features"),
            padding: padding.clone(),
            dropped: dropped.to_vec(),
        };
        let l = teacher.token_shape().count();
        let tokens = backend
            .indices(&vec![3; BATCH * l], &[BATCH, l])
            .expect("tokens");
        teacher
            .forced(&BatchConditioning::Captions(captions), &tokens)
            .expect("logits")
    };
    let logits = |features: &[f32], dropped: &[bool]| {
        Candle::to_floats(forced(features, dropped).value()).expect("floats")
    };
    let mut replaced = given.clone();
    for row in [0, 2] {
        replaced[row * positions * width..][..positions * width].copy_from_slice(none);
    }
    let dropped = logits(&given, &[true, false, true]);
    assert_eq!(dropped, logits(&replaced, &[]));
    assert_ne!(dropped, logits(&given, &[]));
    assert_eq!(logits(&given, &[false; BATCH]), logits(&given, &[]));

    let loss = || {
        let squares = forced(&given, &[true, false, true]).unary(Unary::Square);
        squares.and_then(|x| x.mean_all()).expect("a loss")
    };
    // The unconditional features are not a parameter and get no gradient; every parameter gets one.
    let error = backward(loss(), &params).expect_err("one without a part");
    assert!(
        error
            .to_string()
            .contains("uncond_embedding had no part in the loss"),
        "{error}"
    );
    let is_trained =
        |(name, _): &&(String, Variable<Candle>)| name != "cls_embedding.uncond_embedding";
    let trained: Vec<_> = params.iter().filter(is_trained).cloned().collect();
    assert_eq!(trained.len() + 1, params.len());
    let gradients = backward(loss(), &trained).expect("gradients");
    for ((name, _), gradient) in trained.iter().zip(&gradients) {
        let values = Candle::to_floats(gradient).expect("floats");
        assert!(values.iter().any(|x| *x != 0.0), "{name}");
    }
}

/// Two rows of four tokens are the first half of four rows of four: later tokens do not change earlier ones.
#[test]
fn a_map_may_have_other_rows_than_columns() {
    let of = |height, width| {
        let [(mut network, mut tokenizer), _] = small::families(&[1, 2, 4]);
        let map = Sides { height, width };
        if let NetworkConfig::Llamagen(c) = &mut network {
            c.map = map;
        }
        if let TokenizerConfig::Vq(c) = &mut tokenizer {
            let (height, width) = (2 * height, 2 * width);
            c.autoencoder.image_size = Sides { height, width };
        }
        let case = Case::new(&network, &tokenizer);
        // Only of the first image, because the other images' tokens depend on their number.
        let first = |logits: Vec<f32>| logits[..16].to_vec();
        case.logits(None).into_iter().map(first).collect::<Vec<_>>()
    };
    let (square, wide, tall) = (of(4, 4), of(2, 4), of(4, 2));
    assert_eq!((wide.len(), tall.len()), (8, 8));
    for (k, logits) in wide.iter().enumerate() {
        close(&format!("wide, step {k}"), &square[k], logits);
    }
    // The second row of a tall map starts two tokens earlier.
    close("tall, first row", &square[1], &tall[1]);
    let apart = square[4].iter().zip(&tall[4]);
    assert!(apart.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) > 1e-3);
}

#[test]
fn given_tokens_go_through_in_one_pass() {
    for case in cases() {
        for guided in [None, guidance(None)] {
            let expected = case.logits(guided);
            let steps = case.teacher.token_shape().steps.len();
            for known in [1, steps / 2, steps - 1] {
                let mut generation = case
                    .teacher
                    .generate(&case.conditioning(), guided)
                    .expect("a generation");
                let logits = generation
                    .prefill(&case.tokens(known), PrefixMask::Causal)
                    .expect("logits");
                let logits = Candle::to_floats(&logits).expect("floats");
                close(&format!("step {known}"), &expected[known], &logits);
                // And it continues from there.
                if known + 1 < steps {
                    let (all, count) =
                        (case.tokens(steps), case.teacher.token_shape().steps[known]);
                    let at = case.teacher.token_shape().tokens_before(known);
                    let next = Candle::narrow(&all, 1, at, count).expect("tokens");
                    let logits = generation.advance(Some(&next)).expect("logits");
                    let logits = Candle::to_floats(&logits).expect("floats");
                    close("the step after", &expected[known + 1], &logits);
                }
            }
        }
    }
}

#[test]
fn guidance_ends_after_its_interval() {
    for case in cases() {
        let (all, none) = (case.logits(guidance(None)), case.logits(None));
        // As published: token 0 and the tokens after it up to number `interval`, counted from 0.
        let some = case.logits(guidance(Some(1)));
        for (step, logits) in some.iter().enumerate() {
            let (expected, other) = match step {
                0..=2 => (&all, &none),
                _ => (&none, &all),
            };
            close(&format!("step {step}"), &expected[step], logits);
            // VAR's first scale never has guidance.
            assert!(step == 0 || other[step] != *logits, "step {step}");
        }
    }
}

#[test]
fn tokens_drawn_at_once_see_the_known_ones_alone() {
    for case in cases() {
        let shape = case.teacher.token_shape();
        let (steps, k) = (shape.steps.len(), shape.vocabulary);
        let at_once = |known: usize| {
            let tokens = (known > 0).then(|| case.tokens(known));
            let logits = case
                .teacher
                .at_once(&case.conditioning(), guidance(None), tokens.as_ref())
                .expect("logits");
            let l = shape.count() - shape.tokens_before(known);
            assert_eq!(Candle::shape(&logits), [BATCH, l, k]);
            let first = Candle::narrow(&logits, 1, 0, shape.steps[known]).expect("a step");
            Candle::to_floats(&first).expect("floats")
        };
        let expected = case.logits(guidance(None));
        // The next step is the same as when sampling step by step.
        for known in [0, 1, steps - 1] {
            close(&format!("{known} known"), &expected[known], &at_once(known));
        }
    }
}

/// With or without the tokens before it, a position has the same guidance as step by step.
#[test]
fn tokens_drawn_at_once_are_guided_as_step_by_step() {
    for case in cases() {
        let shape = case.teacher.token_shape();
        let steps = shape.steps.len();
        // Logits of each step from `known` on.
        let at_once = |known: usize, guidance: Option<Guidance>| -> Vec<Vec<f32>> {
            let tokens = (known > 0).then(|| case.tokens(known));
            let logits = case
                .teacher
                .at_once(&case.conditioning(), guidance, tokens.as_ref())
                .expect("logits");
            let start = shape.tokens_before(known);
            let each = (known..steps).map(|step| {
                let at = shape.tokens_before(step) - start;
                let own = Candle::narrow(&logits, 1, at, shape.steps[step]).expect("a step");
                Candle::to_floats(&own).expect("floats")
            });
            each.collect()
        };
        let interval = guidance(Some(1));
        for (known, expected) in case.logits(interval).iter().enumerate() {
            let some = at_once(known, interval);
            close(&format!("{known} known"), expected, &some[0]);
            let (all, none) = (at_once(known, guidance(None)), at_once(known, None));
            for (i, logits) in some.iter().enumerate() {
                let step = known + i;
                let (own, other) = match step {
                    0..=2 => (&all[i], &none[i]),
                    _ => (&none[i], &all[i]),
                };
                close(&format!("step {step}, {known} known"), own, logits);
                // VAR's first scale never has guidance.
                assert!(step == 0 || other != logits, "step {step}, {known} known");
            }
        }
    }
}

#[test]
fn a_guidance_that_guides_nothing_is_none() {
    let of = |scale| {
        Some(Guidance {
            scale,
            interval: None,
        })
    };
    let [raster, scales] = cases();
    let at_once = |case: &Case, guidance| {
        let logits = case.teacher.at_once(&case.conditioning(), guidance, None);
        Candle::to_floats(&logits.expect("logits")).expect("floats")
    };
    for (case, nothing, something) in [
        (&raster, &[1.0, 0.5, 0.0, -2.0][..], 1.5),
        (&scales, &[0.0], 0.5),
    ] {
        let (none, none_at_once) = (case.logits(None), at_once(case, None));
        for &scale in nothing {
            assert_eq!(case.logits(of(scale)), none, "{scale}");
            assert_eq!(at_once(case, of(scale)), none_at_once, "{scale}");
        }
        assert_ne!(case.logits(of(something)), none);
        assert_ne!(at_once(case, of(something)), none_at_once);
    }
}

/// The last step takes a pass of the teacher too.
#[test]
fn a_teacher_without_its_last_step_is_the_teacher() {
    for case in cases() {
        let (conditioning, steps) = (case.conditioning(), case.teacher.token_shape().steps.len());
        let distribution = Distribution {
            guidance: Some(2.0),
            cfg_interval: Some(1),
            ..Distribution::default()
        };
        let tokens = |skip: usize| {
            let (mut drawn, teacher) = (choices(1, 0, BATCH), &*case.teacher);
            let mut choice = Choice::Random(&mut drawn);
            let ids = match skip {
                0 => autoregressive(
                    teacher,
                    &conditioning,
                    &distribution,
                    &mut choice,
                    None,
                    steps,
                ),
                _ => {
                    let end = steps - skip;
                    skipping(teacher, &conditioning, &distribution, &mut choice, end)
                }
            };
            Candle::to_indices(&ids.expect("tokens")).expect("ids")
        };
        assert_eq!(tokens(1), tokens(0));
        assert_ne!(tokens(steps), tokens(0));
    }
}

/// Counts the passes of a teacher and a student.
struct Counted<'a, T: ?Sized> {
    network: &'a T,
    passes: &'a Cell<usize>,
}

struct CountedGeneration<'a> {
    inner: Box<dyn Generation<Candle> + 'a>,
    passes: &'a Cell<usize>,
}

fn count(passes: &Cell<usize>) {
    passes.set(passes.get() + 1);
}

impl Teacher<Candle> for Counted<'_, dyn Teacher<Candle>> {
    fn token_shape(&self) -> &TokenShape {
        self.network.token_shape()
    }

    fn forced_with(
        &self,
        conditioning: &BatchConditioning<Candle>,
        tokens: &Tensor,
        dropout: &Dropout,
    ) -> Result<Variable<Candle>> {
        count(self.passes);
        self.network.forced_with(conditioning, tokens, dropout)
    }

    fn recompute(&mut self, _: bool) {}

    fn generate<'a>(
        &'a self,
        conditioning: &BatchConditioning<Candle>,
        guidance: Option<Guidance>,
    ) -> Result<Box<dyn Generation<Candle> + 'a>> {
        Ok(Box::new(CountedGeneration {
            inner: self.network.generate(conditioning, guidance)?,
            passes: self.passes,
        }))
    }

    fn at_once(
        &self,
        conditioning: &BatchConditioning<Candle>,
        guidance: Option<Guidance>,
        known: Option<&Tensor>,
    ) -> Result<Tensor> {
        count(self.passes);
        self.network.at_once(conditioning, guidance, known)
    }
}

impl Generation<Candle> for CountedGeneration<'_> {
    fn advance(&mut self, previous: Option<&Tensor>) -> Result<Tensor> {
        count(self.passes);
        self.inner.advance(previous)
    }

    fn prefill(&mut self, tokens: &Tensor, mask: PrefixMask) -> Result<Tensor> {
        count(self.passes);
        self.inner.prefill(tokens, mask)
    }
}

impl Student<Candle> for Counted<'_, dyn Student<Candle>> {
    fn token_shape(&self) -> &TokenShape {
        self.network.token_shape()
    }

    fn predict(
        &self,
        x: &Tensor,
        conditioning: &BatchConditioning<Candle>,
        data: &Tensor,
    ) -> Result<Prediction<Candle>> {
        count(self.passes);
        self.network.predict(x, conditioning, data)
    }

    fn recompute(&mut self, _: bool) {}

    fn continuous(&self, prediction: &Prediction<Candle>) -> Result<Variable<Candle>> {
        self.network.continuous(prediction)
    }
}

/// A sampler's passes for a batch.
fn passes(case: &Case, sampler: &Sampler) -> usize {
    let passes = Cell::new(0);
    let teacher = Counted::<dyn Teacher<Candle>> {
        network: &*case.teacher,
        passes: &passes,
    };
    let student = Counted::<dyn Student<Candle>> {
        network: &*case.student,
        passes: &passes,
    };
    let shape = case.teacher.token_shape();
    let (steps, l, d) = (shape.steps.len(), shape.count(), shape.dim);
    let eps = case
        .backend
        .floats(&noise(5, 0, BATCH * l, d), &[BATCH, l, d])
        .expect("noise");
    let mut drawn = choices(1, 0, BATCH);
    let mut choice = Choice::Random(&mut drawn);
    let (conditioning, plain) = (case.conditioning(), Distribution::default());
    let of_student = StudentSampler {
        student: &student,
        codebook: &case.codebook,
        split: steps,
    };
    match sampler {
        Sampler::Teacher { .. } => {
            autoregressive(&teacher, &conditioning, &plain, &mut choice, None, steps).map(drop)
        }
        Sampler::Student { timesteps, .. } => {
            of_student.sample(&eps, &conditioning, timesteps).map(drop)
        }
        Sampler::Assisted {
            timesteps,
            teacher_start,
            prefix,
            ..
        } => {
            let assistant = Assistant {
                teacher: &teacher,
                start: *teacher_start,
                distribution: &plain,
                mask: *prefix,
            };
            of_student
                .assisted(&eps, &conditioning, *timesteps, &assistant, &mut choice)
                .map(drop)
        }
        Sampler::Skip { skip, .. } => {
            skipping(&teacher, &conditioning, &plain, &mut choice, steps - skip).map(drop)
        }
        Sampler::Flow { .. } | Sampler::Independent { .. } => unreachable!("not tried here"),
    }
    .expect("samples");
    passes.get()
}

#[test]
fn samplers_make_the_passes_that_they_say() {
    let of = |text: &str| -> Sampler { serde_json::from_str(text).expect("a sampler") };
    let [raster, scales] = cases();
    for (case, samplers) in [
        (
            &raster,
            vec![
                (r#"{"kind": "teacher", "teacher": "t"}"#, 16),
                (
                    r#"{"kind": "student", "student": "s", "timesteps": [0, 6]}"#,
                    2,
                ),
                (
                    r#"{"kind": "assisted", "student": "s", "teacher": "t", "timesteps": [0, 9], "teacher_start": 5}"#,
                    6,
                ),
                (
                    r#"{"kind": "assisted", "student": "s", "teacher": "t", "timesteps": [0, 9], "teacher_start": 0}"#,
                    10,
                ),
                (r#"{"kind": "skip", "teacher": "t", "skip": 10}"#, 7),
                (r#"{"kind": "skip", "teacher": "t", "skip": 16}"#, 1),
            ],
        ),
        (
            &scales,
            vec![
                (r#"{"kind": "teacher", "teacher": "t"}"#, 4),
                (
                    r#"{"kind": "assisted", "student": "s", "teacher": "t", "timesteps": [0, 3], "teacher_start": 2, "prefix": "published"}"#,
                    3,
                ),
                (
                    r#"{"kind": "assisted", "student": "s", "teacher": "t", "timesteps": [0, 3], "teacher_start": 0}"#,
                    4,
                ),
                (r#"{"kind": "skip", "teacher": "t", "skip": 1}"#, 4),
                (r#"{"kind": "skip", "teacher": "t", "skip": 3}"#, 2),
            ],
        ),
    ] {
        for (text, expected) in samplers {
            let sampler = of(text);
            assert_eq!(
                sampler.passes(case.teacher.token_shape()),
                expected,
                "{text}"
            );
            assert_eq!(passes(case, &sampler), expected, "{text}");
        }
    }
}

/// The steps in the paper's tables.
#[test]
fn assisted_passes_are_the_steps_of_the_tables() {
    let raster = TokenShape {
        steps: vec![1; 256],
        vocabulary: 16384,
        dim: 8,
        condition: ConditioningShape::Classes(1000),
    };
    let scales = TokenShape {
        steps: [1, 2, 3, 4, 5, 6, 8, 10, 13, 16].map(|n| n * n).to_vec(),
        ..raster.clone()
    };
    let check = |shape: &TokenShape, t: usize, start: usize, expected: usize| {
        let text = format!(
            r#"{{"kind": "assisted", "student": "s", "teacher": "t", "timesteps": [0, {t}], "teacher_start": {start}}}"#
        );
        let sampler: Sampler = serde_json::from_str(&text).expect("a sampler");
        assert_eq!(sampler.passes(shape), expected, "{text}");
    };
    for (start, expected) in [(4, 3), (3, 4), (0, 6)] {
        check(&scales, 5, start, expected);
    }
    for (start, expected) in [(60, 22), (40, 42), (0, 81)] {
        check(&raster, 80, start, expected);
    }
}

/// The paper's VAR-skip-1 and -2, LlamaGen-skip-106 and -156, as in the recipe.
#[test]
fn baselines_take_the_steps_of_the_table() {
    let recipe = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../recipes/paper/baselines.yaml"
    );
    let recipe = std::fs::read_to_string(recipe).expect("the recipe");
    let number = |before: &str| -> usize {
        let (_, after) = recipe.split_once(before).expect(before);
        let digits = after.chars().take_while(char::is_ascii_digit);
        digits.collect::<String>().parse().expect(before)
    };
    let check = |steps: usize, skip: usize, expected: usize| {
        let shape = TokenShape {
            steps: vec![1; steps],
            vocabulary: 16384,
            dim: 8,
            condition: ConditioningShape::Classes(1000),
        };
        let text = format!(r#"{{"kind": "skip", "teacher": "t", "skip": {skip}}}"#);
        let sampler: Sampler = serde_json::from_str(&text).expect("a sampler");
        assert_eq!(sampler.passes(&shape), expected, "{text}");
    };
    check(10, number("\n  skip: "), 9);
    check(10, number("\n  skip_more: "), 8);
    check(256, number("params.skip="), 150);
    check(256, number("params.skip_more="), 100);
    // The teachers.
    check(10, 1, 10);
    check(256, 1, 256);
}
