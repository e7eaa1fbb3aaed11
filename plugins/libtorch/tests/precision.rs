//! `dtype: bf16`: close to f32 where it rounds, equal to f32 where it must not.

use retort_engine::Result;
use retort_engine::backend::{self, FlowSolver, Layers, Norms, Sampling, Tensors};
use retort_engine::random::noise;
use retort_engine::tape::Variable;
use retort_libtorch::{Libtorch, ProductPrecision};
use retort_tests::precision;
use tch::Device;

fn on(precision: ProductPrecision) -> Libtorch {
    Libtorch::with(Device::Cpu, precision, 2)
}

#[test]
fn networks_stay_close() {
    for precision in [ProductPrecision::Half, ProductPrecision::Weights] {
        let apart = precision::student(&on(ProductPrecision::Full), &on(precision));
        let apart = apart.expect("both precisions");
        println!("{precision:?}: {apart:?}");
        apart.check();
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
