//! A tokenizer's losses and metrics, compared with NumPy in float64 (tests/peers/losses.py) and with the tape.

use std::ops::Range;
use std::path::PathBuf;

use retort_abi::{ArtifactMeta, Cancel, Failure, FailureCode, Host, LogLevel};
use retort_candle::Candle;
use retort_engine::backend::{Tensors, Unary};
use retort_engine::collective::{Collective, SingleRank};
use retort_engine::model::LastConvolution;
use retort_engine::model::discriminator::{self, Discriminator};
use retort_engine::stage::tokenizer::codebook::Codebook;
use retort_engine::stage::tokenizer::loss::{
    Adversarial, Adversary, BatchPart, Criterion, PixelLoss, entropy,
};
use retort_engine::stage::tokenizer::quality::{psnr, ssim};
use retort_engine::tape::{Variable, backward};
use retort_engine::train::{Decay, StepOutput, TrainOptions, TrainingLoop, average};
use retort_engine::weights::{Floats, Loader, ParameterSource, Weights};
use retort_tests::threads::{ThreadRank, together};

type Tensor = <Candle as Tensors>::Tensor;

fn candle() -> Candle {
    Candle::open("cpu", "f32", 1).expect("a CPU")
}

/// Samples of a sine: the same numbers as in losses.py.
fn values(count: usize, step: f64, shift: f64, scale: f64) -> Vec<f32> {
    let value = |i: usize| (scale * (step * i as f64).sin() + shift) as f32;
    (1..=count).map(value).collect()
}

fn near(found: f64, expected: f64, what: &str) {
    let off = (found - expected).abs();
    assert!(
        off < 1e-4 * (1.0 + expected.abs()),
        "{what}: {found}, expected {expected}"
    );
}

fn number(x: &Tensor) -> f64 {
    f64::from(Candle::to_floats(x).expect("a number")[0])
}

/// Weights of a PatchGAN of 4 channels and 2 strided convolutions.
fn weights() -> Weights {
    let all: [(&str, &[usize], f64, f64, f64); 10] = [
        ("0.weight", &[4, 3, 4, 4], 0.7, 0.0, 0.3),
        ("0.bias", &[4], 1.1, 0.0, 0.1),
        ("2.weight", &[8, 4, 4, 4], 0.9, 0.0, 0.2),
        ("3.weight", &[8], 0.5, 1.0, 0.2),
        ("3.bias", &[8], 1.3, 0.0, 0.1),
        ("5.weight", &[16, 8, 4, 4], 1.7, 0.0, 0.2),
        ("6.weight", &[16], 0.4, 1.0, 0.2),
        ("6.bias", &[16], 0.8, 0.0, 0.1),
        ("8.weight", &[1, 16, 4, 4], 2.1, 0.0, 0.3),
        ("8.bias", &[1], 0.6, 0.0, 0.1),
    ];
    let own = |(name, shape, step, shift, scale): (&str, &[usize], f64, f64, f64)| {
        let data = values(shape.iter().product(), step, shift, scale);
        let shape = shape.to_vec();
        (format!("d.main.{name}"), Floats { shape, data })
    };
    all.into_iter().map(own).collect()
}

const SHAPE: [usize; 4] = [2, 3, 16, 16];

fn images() -> Vec<f32> {
    values(SHAPE.iter().product(), 0.37, 0.0, 1.0)
}

fn reconstructions() -> Vec<f32> {
    values(SHAPE.iter().product(), 0.37, 0.05, 0.8)
}

#[test]
fn the_discriminator_is_the_published_one() {
    let (backend, weights) = (candle(), weights());
    let mut loader = Loader::new(&backend, ParameterSource::Host(&weights), false, "values");
    let network = Discriminator::load(&mut loader, "d.", 3, (4, 2)).expect("a discriminator");
    let logits = |pixels: &[f32]| -> Vec<f64> {
        let x = Variable::<Candle>::constant(backend.floats(pixels, &SHAPE).expect("images"));
        let logits = network.forward(&x).expect("logits");
        assert_eq!(logits.shape(), [2, 1, 2, 2]);
        let floats = Candle::to_floats(logits.value()).expect("floats");
        floats.into_iter().map(f64::from).collect()
    };
    let (real, fake) = (logits(&images()), logits(&reconstructions()));
    near(real[0], -1.738_466_57, "the first patch");
    near(real[1], 7.217_496_75, "the second patch");
    let mean = |x: &[f64], f: fn(f64) -> f64| x.iter().map(|&x| f(x)).sum::<f64>() / x.len() as f64;
    near(-mean(&fake, |x| x), 0.136_078_451, "adversarial");
    let hinge = mean(&real, |x| (1.0 - x).max(0.0)) + mean(&fake, |x| (1.0 + x).max(0.0));
    near(0.5 * hinge, 3.502_956_52, "hinge");
}

#[test]
fn layers_that_leave_no_patch_are_refused() {
    let check = |side, layers| discriminator::check(side, layers, "/layers");
    assert!(check(32, 3).is_ok() && check(256, 3).is_ok() && check(8, 1).is_ok());
    let error = check(16, 3).expect_err("too many").to_string();
    assert!(error.contains("at most 2"), "{error}");
    let error = check(4, 1).expect_err("too small").to_string();
    assert!(error.contains("too small"), "{error}");
}

#[test]
fn pixels_are_compared_by_squares_or_by_absolute_values() {
    let backend = candle();
    let x = backend.floats(&images(), &SHAPE).expect("images");
    for (pixels, expected) in [
        (PixelLoss::L2, 0.022_440_990_8),
        (PixelLoss::L1, 0.131_235_833),
    ] {
        let made = Variable::<Candle>::parameter(
            backend.floats(&reconstructions(), &SHAPE).expect("images"),
        );
        let criterion = Criterion {
            pixels,
            metric: None,
            adversary: None,
            at_once: 1,
        };
        // Without an adversary, nothing uses the last convolution's input.
        let last = LastConvolution {
            input: x.clone(),
            kernel: x.clone(),
        };
        let (loss, figures) = criterion
            .loss(made, &x, &last, 0, &BatchPart::WHOLE)
            .expect("a loss");
        near(number(loss.value()), expected, "the loss");
        assert_eq!(figures[0].0, "reconstruction");
    }
}

/// Gradients of the kernel of a convolution whose outputs are judged by an adversary with these parameters.
fn pull(
    x: &Tensor,
    judge: &[(String, Variable<Candle>)],
    of: impl FnOnce(Variable<Candle>) -> Variable<Candle>,
) -> Vec<f64> {
    let backend = candle();
    let kernel = backend.floats(&values(3 * 3 * 9, 0.3, 0.0, 0.2), &[3, 3, 3, 3]);
    let kernel = Variable::<Candle>::parameter(kernel.expect("a kernel"));
    let made = Variable::<Candle>::constant(x.clone()).conv2d(&kernel, 1, [1, 1]);
    let loss = of(made.expect("images"));
    let mut params = vec![("kernel".to_owned(), kernel)];
    params.extend_from_slice(judge);
    let gradients = backward(loss, &params).expect("a gradient");
    let floats = Candle::to_floats(&gradients[0]).expect("floats");
    floats.into_iter().map(f64::from).collect()
}

#[test]
fn the_adversary_pulls_as_much_as_the_other_terms() {
    let backend = candle();
    let seen = backend.floats(&reconstructions(), &SHAPE).expect("a map");
    let real = backend.floats(&images(), &SHAPE).expect("images");
    let kernel = backend.floats(&values(3 * 3 * 9, 0.3, 0.0, 0.2), &[3, 3, 3, 3]);
    let last = || LastConvolution {
        input: seen.clone(),
        kernel: kernel.as_ref().expect("a kernel").clone(),
    };
    let of = |weight: f64, cap: f64, start: u64| {
        let options = Adversarial {
            weight,
            start,
            cap,
            channels: 4,
            layers: 2,
            learning_rate: None,
        };
        let (adversary, params) = Adversary::new(&backend, 5, 3, &options).expect("an adversary");
        let criterion = Criterion {
            pixels: PixelLoss::L2,
            metric: None,
            adversary: Some(adversary),
            at_once: 2,
        };
        (criterion, params)
    };
    let (criterion, params) = of(0.5, 1e4, 10);
    let judged =
        |criterion: &Criterion<Candle>, judge: &[(String, Variable<Candle>)], step: u64| {
            let mut figures = Vec::new();
            let gradient = pull(&seen, judge, |made| {
                let (loss, said) = criterion
                    .loss(made, &real, &last(), step, &BatchPart::WHOLE)
                    .expect("a loss");
                figures = said;
                loss
            });
            (gradient, figures)
        };
    let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    // Before it begins, only pixels contribute.
    let (pixels, figures) = judged(&criterion, &[], 9);
    assert_eq!(figures.len(), 1);
    let (both, figures) = judged(&criterion, &params, 10);
    let figure = |name: &str| {
        let own = figures.iter().find(|(own, _)| *own == name);
        own.unwrap_or_else(|| panic!("no {name}")).1
    };
    let own: Vec<f64> = both.iter().zip(&pixels).map(|(a, b)| a - b).collect();
    // The weight is |pixels| / (|adversary| + 1e-4), as published: not quite even.
    let expected = 0.5 * (1.0 - 1e-4 * figure("adaptive_weight") / length(&pixels));
    near(
        length(&own) / length(&pixels),
        expected,
        "its pull beside theirs",
    );
    assert!(figure("adaptive_weight") > 0.0 && figure("discriminator") > 0.0);
    // The cap holds.
    let (criterion, params) = of(0.5, 1e-3, 0);
    let (capped, figures) = judged(&criterion, &params, 0);
    assert_eq!(
        figures
            .iter()
            .find(|f| f.0 == "adaptive_weight")
            .map(|f| f.1),
        Some(1e-3)
    );
    assert!(length(&capped) < 1.01 * length(&pixels));

    // The adversary learns only from the hinge loss: the tokenizer's terms do not reach it.
    let (criterion, params) = of(0.5, 1e4, 0);
    let made = Variable::<Candle>::constant(seen.clone());
    let (loss, _) = criterion
        .loss(made, &real, &last(), 0, &BatchPart::WHOLE)
        .expect("a loss");
    let gradients = backward(loss, &params).expect("gradients of the adversary");
    assert_eq!(gradients.len(), 10);
}

#[test]
fn entropy_is_low_where_choices_are_sure_and_even() {
    let backend = candle();
    let var = |data: &[f32], shape: [usize; 2]| {
        Variable::<Candle>::parameter(backend.floats(data, &shape).expect("a matrix"))
    };
    let z = var(&values(20, 0.9, 0.0, 1.0), [5, 4]);
    let codes = var(&values(24, 1.9, 0.0, 1.0), [6, 4]);
    let term = entropy(&z, &codes, 0.5, &BatchPart::WHOLE).expect("a term");
    near(number(term.value()), -0.826_394_362, "entropy");
    let params = [("z".to_owned(), z), ("codes".to_owned(), codes)];
    let gradients = backward(term, &params).expect("gradients");
    let square = Candle::unary(&gradients[1], Unary::Square).expect("squares");
    let sum = Candle::sum(&square, &[0, 1]).expect("a sum");
    assert!(number(&sum) > 0.0);
}

/// Two ranks' results for a part each, in order.
fn by_two<T: Send>(of: impl Fn(&ThreadRank) -> T + Sync) -> [T; 2] {
    let Ok(both) = together(2, of).try_into() else {
        panic!("two results of two ranks");
    };
    both
}

/// The evenness of choices is computed over both ranks, and is not the mean of theirs.
#[test]
fn ranks_judge_their_choices_together() {
    let (of_z, of_codes) = (values(20, 0.9, 0.0, 1.0), values(24, 1.9, 0.0, 1.0));
    // Vectors 0..2 are the first rank's, 2..5 the second's.
    let term = |rows: Range<usize>, part: &BatchPart<'_>| {
        let backend = candle();
        let var = |data: &[f32], shape: [usize; 2]| {
            Variable::<Candle>::parameter(backend.floats(data, &shape).expect("a matrix"))
        };
        let z = var(&of_z[rows.start * 4..rows.end * 4], [rows.len(), 4]);
        let codes = var(&of_codes, [6, 4]);
        let term = entropy(&z, &codes, 0.5, part)
            .and_then(|term| term.affine(part.fraction, 0.0))
            .expect("its share");
        let value = number(term.value());
        let params = [("z".to_owned(), z), ("codes".to_owned(), codes)];
        let gradients = backward(term, &params).expect("gradients");
        let floats = |g: &Tensor| Candle::to_floats(g).expect("floats");
        (value, floats(&gradients[0]), floats(&gradients[1]))
    };
    let whole = term(0..5, &BatchPart::WHOLE);
    let [first, second] = by_two(|rank| {
        let rows = [0..2, 2..5][rank.rank()].clone();
        let fraction = rows.len() as f64 / 5.0;
        let part = BatchPart {
            ranks: rank,
            fraction,
        };
        term(rows, &part)
    });
    near(first.0 + second.0, whole.0, "the term");
    let of_z = [first.1, second.1].concat();
    for (found, expected) in of_z.iter().zip(&whole.1) {
        near(f64::from(*found), f64::from(*expected), "a gradient of z");
    }
    for (i, expected) in whole.2.iter().enumerate() {
        let found = first.2[i] + second.2[i];
        near(
            f64::from(found),
            f64::from(*expected),
            "a gradient of codes",
        );
    }
}

/// Codes use the vectors that all ranks looked up, in batch order.
#[test]
fn ranks_keep_one_codebook() {
    let kept = |ranks: &dyn Collective, own: Range<usize>| {
        let backend = candle();
        let tensor = backend.floats(&[1.0, 0.0, 0.0, 1.0, 5.0, 5.0], &[3, 2]);
        let codebook = Codebook::new(&backend, tensor.expect("codes"), Some(0.5));
        let codebook = codebook.expect("a codebook");
        // Three images of two tokens.
        let (tokens, z) = ([0, 0, 1, 2, 2, 1], values(12, 0.7, 0.0, 1.0));
        let mine = own.start * 2..own.end * 2;
        let ids = backend.indices(&tokens[mine.clone()], &[mine.len()]);
        let z = backend.floats(&z[mine.start * 2..mine.end * 2], &[mine.len(), 2]);
        let (ids, z) = (ids.expect("ids"), z.expect("vectors"));
        codebook.look_up(&ids, Some(&z)).expect("looked up");
        let lookups = codebook.note(ranks, own, 3).expect("noted");
        let kept = codebook.kept.borrow().clone();
        (lookups.tokens, lookups.z, kept)
    };
    let alone = kept(&SingleRank, 0..3);
    let [first, second] = by_two(|rank| kept(rank, [0..1, 1..3][rank.rank()].clone()));
    assert_eq!(first, alone);
    assert_eq!(second, alone);
}

/// The adversary's weight follows from the kernel's gradients over all shares together.
#[test]
fn ranks_weigh_their_adversary_alike() {
    let weight = |ranks: &ThreadRank, own: Range<usize>| {
        let backend = candle();
        let (size, shape) = (3 * 16 * 16, [own.len(), 3, 16, 16]);
        let place = own.start * size..own.end * size;
        let of = |data: Vec<f32>| {
            backend
                .floats(&data[place.clone()], &shape)
                .expect("images")
        };
        let (real, seen) = (of(images()), of(reconstructions()));
        let kernel = backend.floats(&values(3 * 3 * 9, 0.3, 0.0, 0.2), &[3, 3, 3, 3]);
        let last = LastConvolution {
            input: seen.clone(),
            kernel: kernel.expect("a kernel"),
        };
        let options = Adversarial {
            weight: 0.5,
            start: 0,
            cap: 1e4,
            channels: 4,
            layers: 2,
            learning_rate: None,
        };
        let (adversary, _) = Adversary::new(&backend, 5, 3, &options).expect("an adversary");
        let criterion = Criterion {
            pixels: PixelLoss::L2,
            metric: None,
            adversary: Some(adversary),
            at_once: 2,
        };
        let part = BatchPart {
            ranks,
            fraction: own.len() as f64 / 2.0,
        };
        let made = Variable::<Candle>::parameter(seen.clone());
        let (_, figures) = criterion
            .loss(made, &real, &last, 0, &part)
            .expect("a loss");
        figures
            .iter()
            .find(|f| f.0 == "adaptive_weight")
            .expect("a weight")
            .1
    };
    let [first, second] = by_two(|rank| weight(rank, rank.rank()..rank.rank() + 1));
    assert_eq!(first.to_bits(), second.to_bits());
    assert!(first > 0.0);
}

#[test]
fn figures_of_reconstructions_are_the_usual_ones() {
    let (a, b) = (images(), reconstructions());
    let stride = 3 * 16 * 16;
    let expected = [(22.509_698, 0.970_475_2), (22.510_661, 0.969_738_04)];
    let pairs = a.chunks_exact(stride).zip(b.chunks_exact(stride));
    for ((a, b), (ratio, similarity)) in pairs.zip(expected) {
        near(psnr(a, b), ratio, "PSNR");
        near(ssim(a, b, [3, 16, 16]), similarity, "SSIM");
    }
    let small = |x: &[f32]| -> Vec<f32> {
        let row = |i: usize| x[(i / 8) * 256 + (i % 8) * 16..][..8].to_vec();
        (0..24).flat_map(row).collect()
    };
    near(
        ssim(&small(&a), &small(&b), [3, 8, 8]),
        0.975_008_071,
        "SSIM of small images",
    );
    assert_eq!(psnr(&a, &a), 100.0);
    near(ssim(&a[..stride], &a[..stride], [3, 16, 16]), 1.0, "SSIM");
}

#[test]
fn codes_are_averages_of_what_they_are_looked_up_for() {
    let backend = candle();
    let tensor = backend.floats(&[1.0, 0.0, 0.0, 1.0, 5.0, 5.0], &[3, 2]);
    let tensor = tensor.expect("codes");
    let codes = || Candle::to_floats(&tensor).expect("codes");
    let codebook = Codebook::new(&backend, tensor.clone(), Some(0.5)).expect("a codebook");
    // Two images, looked up in two parts.
    for (tokens, z) in [
        (&[0, 0][..], &[3.0, 0.0, 1.0, 0.0][..]),
        (&[1], &[0.0, 3.0]),
    ] {
        let ids = backend.indices(tokens, &[tokens.len()]).expect("ids");
        let z = backend.floats(z, &[tokens.len(), 2]).expect("vectors");
        codebook.look_up(&ids, Some(&z)).expect("looked up");
    }
    let lookups = codebook.note(&SingleRank, 0..2, 2).expect("noted");
    let z = lookups.z;
    assert_eq!(lookups.tokens, [0, 0, 1]);
    codebook.settle().expect("settled");
    // Code 0: weight 0.5 + 0.5 x 2, sum 0.5 (1, 0) + 0.5 (4, 0); code 1: 0.5 + 0.5, 0.5 (0, 1) + 0.5 (0, 3); code 2 stays.
    for (found, expected) in codes().iter().zip([5.0 / 3.0, 0.0, 0.0, 2.0, 5.0, 5.0]) {
        near(f64::from(*found), expected, "a code");
    }
    let (used, perplexity) = codebook.use_lately();
    near(used, 2.0 / 3.0, "use");
    // Two thirds and one third.
    near(perplexity, 1.889_881_6, "perplexity");
    // The unused code moves onto a vector that was looked up, and stays there when the codes settle.
    assert_eq!(codebook.restart(&z, 1, 0).expect("restarted"), [2]);
    let moved = codes()[4..].to_vec();
    assert!(
        [[3.0, 0.0], [1.0, 0.0], [0.0, 3.0]]
            .iter()
            .any(|row| moved == row)
    );
    codebook.settle().expect("settled");
    near(f64::from(codes()[4]), f64::from(moved[0]), "the moved code");
    // All count as unused again.
    assert_eq!(codebook.restart(&z, 1, 1).expect("restarted"), [0, 1, 2]);
}

/// Hears nothing, and never stops a training.
struct Silent;

impl Host for Silent {
    fn log(&self, _: LogLevel, _: &str) {}
    fn metric(&self, _: &str, _: u64, _: f64) {}
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

/// A code that a restart has moved has neither momentum nor an average of where it was.
#[test]
fn a_moved_code_begins_without_a_past() {
    let backend = candle();
    let codes = backend.floats(&[1.0, 1.0], &[2, 1]).expect("codes");
    let params = vec![("codes".to_owned(), Variable::parameter(codes))];
    let now = || Candle::to_floats(params[0].1.value()).expect("codes");
    let options = TrainOptions {
        steps: 3,
        warmup: 0,
        learning_rate: 0.1,
        decay: Decay::Constant,
        weight_decay: 0.0,
        clip: 0.0,
        ema: 0.5,
        ..TrainOptions::default()
    };
    let averages = average(&backend, &options, &params).expect("averages");
    let fit = TrainingLoop {
        host: &Silent,
        backend: &backend,
        work_dir: None,
        name: "test",
        ranks: &SingleRank,
        options: &options,
        params: &params,
        ema: averages.as_ref(),
        kept: None,
        adversary: None,
    };
    let averaged = fit.run(
        |step| {
            // The gradient of both codes is 1.
            let loss = params[0].1.sum(&[0, 1])?.reshape(&[1])?;
            let mut output = StepOutput::new(loss, Vec::new());
            if step == 2 {
                let moved = backend.floats(&[now()[0], 10.0], &[2, 1])?;
                Candle::assign_(params[0].1.value(), &moved)?;
                output.anew = Some(("codes", vec![1]));
            }
            Ok(output)
        },
        None,
    );
    let averaged = averaged.expect("weights")["codes"].data.clone();
    near(f64::from(now()[0]), 0.7, "three full steps");
    // 0.1 m / sqrt(v), with m = 0.1 / (1 - 0.9^3) and v = 0.05 / (1 - 0.95^3).
    near(f64::from(now()[1]), 10.0 - 0.062_322, "a step from nothing");
    // The decay at step 2 is 3 / 12.
    near(
        f64::from(averaged[1]),
        10.0 - 0.75 * 0.062_322,
        "its average",
    );
}
