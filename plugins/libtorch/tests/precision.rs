//! `dtype: bf16`: close to f32 where it rounds, equal to f32 where it must not.

use retort_engine::Result;
use retort_engine::backend::{self, FlowSolver, Layers, Norms, Sampling, Tensors, Unary};
use retort_engine::model::{BatchConditioning, ConditioningShape, Student, llamagen};
use retort_engine::random::noise;
use retort_engine::size::Sides;
use retort_engine::tape::{Variable, backward};
use retort_engine::weights::{Loader, ParameterSource};
use retort_libtorch::{Libtorch, ProductPrecision};
use retort_tests::agreement::drawn;
use tch::Device;

const BATCH: usize = 4;

fn config() -> llamagen::Config {
    llamagen::Config {
        width: 64,
        depth: 4,
        heads: 4,
        vocabulary: 100,
        codebook_dim: 8,
        map: Sides::square(6),
        condition: ConditioningShape::Classes(10),
    }
}

fn on(precision: ProductPrecision) -> Libtorch {
    Libtorch::with(Device::Cpu, precision, 2)
}

/// Logits of a student with constant weights, and the gradients of a step with trainable ones.
fn student(precision: ProductPrecision) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
    let (backend, c) = (on(precision), config());
    let build = |loader: &mut Loader<'_, Libtorch>| llamagen::GptStudent::load(loader, &c);
    let weights = drawn(&on(ProductPrecision::Full), build)?;
    let (l, d) = (c.map.area(), c.codebook_dim);
    let eps: Vec<f32> = (0..BATCH as u64).flat_map(|i| noise(5, i, l, d)).collect();
    let eps = backend.floats(&eps, &[BATCH, l, d])?;
    let labels = BatchConditioning::Classes(backend.indices(&[1, 2, 3, 4], &[BATCH])?);
    let kinds = backend.indices(&vec![0; BATCH * l], &[BATCH, l])?;
    let ids: Vec<u32> = (0..BATCH * l).map(|i| i as u32 * 7 % 100).collect();
    let ids = backend.indices(&ids, &[BATCH * l])?;

    let mut loader = Loader::new(&backend, ParameterSource::Host(&weights), false, "drawn");
    let network = llamagen::GptStudent::load(&mut loader, &c)?;
    let logits = network.predict(&eps, &labels, &kinds)?.logits;
    let logits = Libtorch::to_floats(logits.value())?;

    let mut loader = Loader::new(&backend, ParameterSource::Host(&weights), true, "drawn");
    let network = llamagen::GptStudent::load(&mut loader, &c)?;
    let params = loader.into_params();
    let prediction = network.predict(&eps, &labels, &kinds)?;
    let far = network
        .continuous(&prediction)?
        .unary(Unary::Square)?
        .mean_all()?;
    let loss = prediction
        .logits
        .reshape(&[BATCH * l, c.vocabulary])?
        .cross_entropy(&ids)?
        .add(&far)?;
    drop((prediction, far, network));
    let gradients = backward(loss, &params)?;
    let gradients = gradients.iter().map(Libtorch::to_floats);
    Ok((logits, gradients.collect::<Result<_>>()?))
}

fn distance(x: &[f32], y: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let between: f64 = x.iter().zip(y).map(|(x, y)| square(x - y)).sum();
    let own: f64 = x.iter().map(|&x| square(x)).sum();
    (between / own).sqrt()
}

/// bf16 has 8 bits: single products are off by 2^-9, a network of this depth by a few of them.
#[test]
fn networks_stay_close() {
    let (logits, gradients) = student(ProductPrecision::Full).expect("f32");
    for precision in [ProductPrecision::Half, ProductPrecision::Weights] {
        let (rounded, rounded_gradients) = student(precision).expect("bf16");
        let error = distance(&logits, &rounded);
        println!("{precision:?}: logits {error:.2e}");
        assert!(error > 1e-4, "{precision:?}: nothing was rounded");
        assert!(error < 1e-2, "{precision:?}: logits differ by {error}");
        let worst = gradients
            .iter()
            .zip(&rounded_gradients)
            .map(|(x, y)| distance(x, y))
            .fold(0.0, f64::max);
        println!("{precision:?}: worst gradient {worst:.2e}");
        assert!(worst < 5e-2, "{precision:?}: gradients differ by {worst}");
    }
}

/// Searches, sums, norms and optimiser steps are bit-identical to f32.
#[test]
fn everything_but_products_is_exact() {
    let compute = |precision| -> Result<Vec<Vec<f32>>> {
        let b = on(precision);
        let x = b.floats(&noise(1, 0, 30, 8), &[30, 8])?;
        let w = b.floats(&noise(1, 1, 1, 8), &[8])?;
        let codes = b.floats(&noise(2, 0, 50, 8), &[50, 8])?;
        let logits = b.floats(&noise(3, 0, 30, 50), &[30, 50])?;
        let ids = Libtorch::flow_map(&logits, &x, &codes, &FlowSolver::default())?;
        let ids = Libtorch::to_indices(&ids)?
            .iter()
            .map(|&i| i as f32)
            .collect();
        let all = [
            Libtorch::matmul(&x, &codes, false, true)?,
            Libtorch::rms_norm(&x, &w, 1e-5, backend::Precision::Storage)?,
            Libtorch::softmax(&logits)?,
            Libtorch::sum(&x, &[0])?,
            Variable::<Libtorch>::constant(x)
                .mean_all()?
                .value()
                .clone(),
        ];
        let mut all: Vec<Vec<f32>> = all.iter().map(Libtorch::to_floats).collect::<Result<_>>()?;
        all.push(ids);
        Ok(all)
    };
    let full = compute(ProductPrecision::Full).expect("f32");
    for precision in [ProductPrecision::Half, ProductPrecision::Weights] {
        assert_eq!(full, compute(precision).expect("bf16"), "{precision:?}");
    }
}

#[test]
fn weights_that_only_products_read_take_half_the_memory() {
    let b = on(ProductPrecision::Half);
    let x = b.floats(&[1.0, 1.001, -3.3, 0.0], &[2, 2]).expect("floats");
    let kept = Libtorch::to_floats(&Libtorch::factor(&x).expect("a factor")).expect("floats");
    assert_eq!(kept, [1.0, 1.0, -3.296_875, 0.0]);
    let exact = b.exact().floats(&[1.001], &[1]).expect("floats");
    let kept = Libtorch::to_floats(&Libtorch::factor(&exact).expect("a factor")).expect("floats");
    assert_eq!(kept, [1.001]);
}

/// Without bf16 multiplication, weights of linear maps are read in bf16 and products computed in f32.
#[test]
fn only_weights_of_linear_maps_are_rounded_without_the_hardware() {
    let b = on(ProductPrecision::Weights);
    let (n, i, o) = (3, 40, 7);
    let (x, w) = (noise(1, 0, n, i), noise(2, 0, o, i));
    let kept = |shape: &[usize]| {
        let kept = Libtorch::factor(&b.floats(&w, shape)?)?;
        Ok::<_, retort_engine::Error>((Libtorch::to_floats(&kept)?, kept))
    };
    let (rounded, weight) = kept(&[o, i]).expect("a weight");
    assert_ne!(rounded, w);
    assert_eq!(kept(&[o, i, 1, 1]).expect("a kernel").0, w);
    // Few rows and many are computed by different code.
    for rows in [n, 50 * n] {
        let x = x.repeat(rows / n);
        let given = b.floats(&x, &[rows, i]).expect("floats");
        let y = Libtorch::linear(&given, &weight, None).expect("a product");
        for (at, y) in Libtorch::to_floats(&y).expect("floats").iter().enumerate() {
            let (r, c) = (at / o, at % o);
            let pairs = x[r * i..][..i].iter().zip(&rounded[c * i..][..i]);
            let sum: f64 = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            assert!(
                (sum - f64::from(*y)).abs() < 1e-5,
                "{rows} rows: {sum}, not {y}"
            );
        }
    }
}
