//! The input of a student's perceptual term: the sequence that sampling would end with.

use std::collections::BTreeMap;

use retort_candle::Candle;
use retort_engine::backend::Tensors;
use retort_engine::bundle::{NetworkConfig, TokenizerConfig};
use retort_engine::model::{BatchConditioning, Prediction, Student, Tokenizer};
use retort_engine::perceptual::{self, PerceptualMetric};
use retort_engine::random::noise;
use retort_engine::sampler::StudentSampler;
use retort_engine::splice::TrajectoryState;
use retort_engine::tape::{Variable, backward};
use retort_engine::weights::{Floats, Loader, ParameterSource, Params, Weights};
use retort_tests::small;

type Tensor = <Candle as Tensors>::Tensor;

/// A small student and its tokenizer, with weights that use every part.
struct Case {
    backend: Candle,
    network: NetworkConfig,
    tokenizer: Box<dyn Tokenizer<Candle>>,
    codebook: Tensor,
    weights: Weights,
    /// AR steps before the continuous head takes over, and their tokens.
    split: usize,
    boundary: usize,
}

/// One of each family: LlamaGen's split counts tokens, VAR's scales.
fn cases() -> [Case; 2] {
    let [(raster, of_raster), (scales, of_scales)] = small::families(&[1, 2, 4]);
    [
        Case::new(raster, of_raster, 6, 6),
        Case::new(scales, of_scales, 2, 5),
    ]
}

impl Case {
    fn new(network: NetworkConfig, shape: TokenizerConfig, split: usize, boundary: usize) -> Self {
        let backend = Candle::open("cpu", "f32", 1).expect("a CPU");
        let mut loader = Loader::new(&backend, ParameterSource::Init(1), true, "drawn");
        network.student(&mut loader).expect("a student");
        let weights = disturbed(&loader.into_params());
        let mut loader = Loader::new(&backend, ParameterSource::Init(2), true, "drawn");
        shape.build(&mut loader).expect("a tokenizer");
        let of_tokenizer = disturbed(&loader.into_params());
        let mut loader = Loader::new(
            &backend,
            ParameterSource::Host(&of_tokenizer),
            false,
            "disturbed",
        );
        let tokenizer = shape.build(&mut loader).expect("a tokenizer");
        Self {
            codebook: tokenizer.codebook().expect("codes"),
            network,
            tokenizer,
            weights,
            split,
            boundary,
            backend,
        }
    }

    fn student(&self, weights: &Weights) -> (Box<dyn Student<Candle>>, Params<Candle>) {
        let source = ParameterSource::Host(weights);
        let mut loader = Loader::new(&self.backend, source, true, "student");
        let student = self.network.student(&mut loader).expect("a student");
        (student, loader.into_params())
    }

    /// X_t of samples at these timesteps, whose tokens are i, i + 1, .. modulo 16, and those tokens' vectors (b, L, D).
    fn state(&self, timesteps: &[usize]) -> (TrajectoryState<Candle>, Tensor) {
        let shape = self.network.token_shape();
        let (b, l, d) = (timesteps.len(), shape.count(), shape.dim);
        let ids: Vec<u32> = (0..b)
            .flat_map(|i| (0..l).map(move |at| ((i + at) % 16) as u32))
            .collect();
        let ids = self.backend.indices(&ids, &[b, l]).expect("tokens");
        let target = Candle::rows(&self.codebook, &ids).expect("vectors");
        let vectors = Candle::to_floats(&target).expect("floats");
        let known: Vec<usize> = timesteps.iter().map(|&t| shape.tokens_before(t)).collect();
        let mut x = Vec::new();
        for (i, &known) in known.iter().enumerate() {
            x.extend(&vectors[i * l * d..(i * l + known) * d]);
            x.extend(&noise(9, i as u64, l, d)[known * d..]);
        }
        let x = self.backend.floats(&x, &[b, l, d]).expect("X_t");
        (TrajectoryState { x, known }, target)
    }

    fn conditioning(&self, b: usize) -> BatchConditioning<Candle> {
        let labels: Vec<u32> = (0..b as u32).collect();
        BatchConditioning::Classes(self.backend.indices(&labels, &[b]).expect("labels"))
    }

    fn predict(
        &self,
        student: &dyn Student<Candle>,
        state: &TrajectoryState<Candle>,
    ) -> Prediction<Candle> {
        let conditioning = self.conditioning(state.known.len());
        let kinds = state.kinds().expect("kinds");
        student
            .predict(&state.x, &conditioning, &kinds)
            .expect("a prediction")
    }

    /// The perceptual term on pixels, with at most `most` images decoded at once.
    fn term(
        &self,
        student: &dyn Student<Candle>,
        prediction: &Prediction<Candle>,
        (state, target): &(TrajectoryState<Candle>, Tensor),
        most: usize,
    ) -> Variable<Candle> {
        let head = || student.continuous(prediction);
        let logits = prediction.logits.value();
        let sequence = state.finish(logits, head, &self.codebook, self.boundary);
        let sequence = sequence.expect("a sequence");
        perceptual::distance(
            &*self.tokenizer,
            &PerceptualMetric::Pixels,
            most,
            &sequence,
            target,
        )
        .expect("a distance")
    }

    fn gradients(&self, timesteps: &[usize], most: usize) -> (f32, BTreeMap<String, Vec<f32>>) {
        let (student, params) = self.student(&self.weights);
        let state = self.state(timesteps);
        let prediction = self.predict(&*student, &state.0);
        let term = self.term(&*student, &prediction, &state, most);
        let value = value(&term);
        // The logits' head does not affect the term.
        let logits = prediction
            .logits
            .mean_all()
            .and_then(|mean| mean.affine(0.0, 0.0));
        let loss = term.add(&logits.expect("a mean")).expect("a sum");
        drop((prediction, term));
        let all = backward(loss, &params).expect("gradients");
        let named = params.iter().zip(&all);
        let named =
            named.map(|((name, _), g)| (name.clone(), Candle::to_floats(g).expect("floats")));
        (value, named.collect())
    }
}

/// Parameters' values with noise added.
fn disturbed(params: &Params<Candle>) -> Weights {
    let each = params.iter().enumerate().map(|(i, (name, p))| {
        let mut data = Candle::to_floats(p.value()).expect("floats");
        let noise = noise(4, i as u64, data.len(), 1);
        data.iter_mut().zip(noise).for_each(|(x, n)| *x += 0.1 * n);
        let shape = p.shape();
        (name.clone(), Floats { shape, data })
    });
    each.collect()
}

fn value(x: &Variable<Candle>) -> f32 {
    Candle::to_floats(x.value()).expect("a value")[0]
}

/// Different logits at the positions of tokens (`known`), or at all others.
fn with_other_logits(
    prediction: &mut Prediction<Candle>,
    state: &TrajectoryState<Candle>,
    known: bool,
) {
    let shape = prediction.logits.shape();
    let mut logits = Candle::to_floats(prediction.logits.value()).expect("floats");
    for (i, &first) in state.known.iter().enumerate() {
        let row = &mut logits[i * shape[1] * shape[2]..][..shape[1] * shape[2]];
        let (head, tail) = row.split_at_mut(first * shape[2]);
        let part = if known { head } else { tail };
        let other = noise(6, i as u64, part.len(), 1);
        part.iter_mut().zip(other).for_each(|(x, n)| *x = 10.0 * n);
    }
    let logits = Candle::of(&state.x)
        .floats(&logits, &shape)
        .expect("logits");
    prediction.logits = Variable::constant(logits);
}

#[test]
fn logits_of_known_tokens_do_not_move_the_perceptual_term() {
    for case in cases() {
        let (student, _) = case.student(&case.weights);
        // In one batch, the known tokens of some samples reach `split` and those of others do not.
        for (timesteps, reached) in [(vec![case.split; 3], true), (vec![0, case.split, 1], false)] {
            let state = case.state(&timesteps);
            let mut prediction = case.predict(&*student, &state.0);
            let before = value(&case.term(&*student, &prediction, &state, 3));
            with_other_logits(&mut prediction, &state.0, true);
            let same = value(&case.term(&*student, &prediction, &state, 3));
            assert_eq!(before.to_bits(), same.to_bits(), "{timesteps:?}");
            with_other_logits(&mut prediction, &state.0, false);
            let other = value(&case.term(&*student, &prediction, &state, 3));
            assert_eq!(before == other, reached, "{timesteps:?}: {before}, {other}");
        }
    }
}

#[test]
fn training_sees_the_sequence_that_sampling_ends_with() {
    for case in cases() {
        let (student, _) = case.student(&case.weights);
        let l = student.token_shape().count();
        for t in [0, 1, case.split, case.split + 1] {
            if t >= student.token_shape().steps.len() {
                continue;
            }
            let (state, target) = case.state(&[t, t]);
            let (noise, _) = case.state(&[0, 0]);
            let sampler = StudentSampler {
                student: &*student,
                codebook: &case.codebook,
                split: case.split,
            };
            let sampled = sampler
                .pass(&target, &noise.x, &case.conditioning(2), t)
                .expect("a pass");
            let prediction = case.predict(&*student, &state);
            let head = || student.continuous(&prediction);
            let logits = prediction.logits.value();
            let trained = state
                .finish(logits, head, &case.codebook, case.boundary)
                .expect("a sequence");
            let [sampled, trained, target] =
                [&sampled, trained.value(), &target].map(|x| Candle::to_floats(x).expect("floats"));
            assert_eq!(sampled, trained, "t = {t}");
            // Computed by hand: known tokens, then argmax codes, then the head.
            let codes = Candle::rows(&case.codebook, &Candle::argmax_last(logits).expect("ids"));
            let codes = Candle::to_floats(&codes.expect("codes")).expect("floats");
            let head = student.continuous(&prediction).expect("a head");
            let head = Candle::to_floats(head.value()).expect("floats");
            let (known, d) = (state.known[0], student.token_shape().dim);
            for (at, x) in trained.iter().enumerate() {
                let expected = match at / d % l {
                    i if i < known => target[at],
                    i if i < case.boundary => codes[at],
                    _ => head[at],
                };
                assert_eq!(*x, expected, "t = {t}, element {at}");
            }
        }
    }
}

#[test]
fn the_gradient_of_the_head_is_the_slope_of_the_perceptual_term() {
    const STEP: f32 = 2e-3;
    for case in cases() {
        let timesteps = [0, case.split, 1];
        let (_, gradients) = case.gradients(&timesteps, 3);
        let at = |weights: &Weights| {
            let (student, _) = case.student(weights);
            let state = case.state(&timesteps);
            let prediction = case.predict(&*student, &state.0);
            f64::from(value(&case.term(&*student, &prediction, &state, 3)))
        };
        let names: Vec<&String> = gradients
            .keys()
            .filter(|n| n.starts_with("final_layer_conti."))
            .collect();
        assert_eq!(names.len(), 3);
        for name in names {
            // Along the gradient, so that nothing cancels.
            let g = &gradients[name];
            let norm = g.iter().map(|x| x * x).sum::<f32>().sqrt();
            assert!(norm > 1e-3, "{name}: {norm}");
            let moved = |by: f32| {
                let mut weights = case.weights.clone();
                let data = &mut weights.get_mut(name).expect("a weight").data;
                data.iter_mut()
                    .zip(g)
                    .for_each(|(x, g)| *x += by * g / norm);
                at(&weights)
            };
            let slope = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
            let error = (slope / f64::from(norm) - 1.0).abs();
            assert!(error < 0.01, "{name}: slope {slope}, gradient {norm}");
        }
    }
}

#[test]
fn images_decoded_a_few_at_a_time_give_the_same_gradient() {
    for case in cases() {
        let timesteps = [0, case.split, 1, 0, 1];
        let (whole, gradients) = case.gradients(&timesteps, 5);
        for most in [1, 2, 3] {
            let (parts, others) = case.gradients(&timesteps, most);
            assert!((whole - parts).abs() < 1e-5 * whole, "{whole}, {parts}");
            for (name, g) in &gradients {
                let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
                let apart: Vec<f32> = g.iter().zip(&others[name]).map(|(a, b)| a - b).collect();
                assert!(
                    norm(&apart) <= 1e-5 * norm(g) + 1e-9,
                    "{name}, {most} at once"
                );
            }
        }
    }
}
