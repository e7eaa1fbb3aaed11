//! `dtype: bf16` of candle: close to f32.

use retort_candle::Candle;
use retort_engine::backend::{Layers, Tensors};
use retort_kernels::half::Unit;
use retort_tests::precision;

fn open(dtype: &str) -> Candle {
    Candle::open("cpu", dtype, 2).expect("a CPU")
}

#[test]
fn networks_stay_close_in_bf16() {
    let apart = precision::student(&open("f32"), &open("bf16")).expect("both precisions");
    println!("{apart:?}");
    match Unit::best() {
        Some(_) => apart.check(),
        None => assert_eq!([apart.logits, apart.worst_gradient], [0.0, 0.0]),
    }
}

/// The tiles of a weight that never changes are those that a product makes of the weight itself.
#[test]
fn weights_that_never_change_give_the_same_products() {
    let b = open("bf16");
    let numbers = |count: usize| {
        (0..count)
            .map(|i| (i as f32 * 0.37).sin())
            .collect::<Vec<_>>()
    };
    let x = b.floats(&numbers(7 * 40), &[7, 40]).expect("floats");
    let w = b.floats(&numbers(30 * 40), &[30, 40]).expect("floats");
    let kept = Candle::factor(&w).expect("a factor");
    let [once, again, plain] = [&kept, &kept, &w].map(|w| {
        let y = Candle::linear(&x, w, None).expect("a product");
        Candle::to_floats(&y).expect("floats")
    });
    assert!(once == again && once == plain);
    let ids = b.indices(&[2, 0], &[2]).expect("indices");
    let rows = Candle::rows(&kept, &ids).expect("rows");
    let whole = Candle::to_floats(&kept).expect("floats");
    let rows = Candle::to_floats(&rows).expect("floats");
    assert_eq!(rows, [&whole[80..120], &whole[..40]].concat());
    let wanted = Candle::to_floats(&w).expect("floats");
    let error = whole.iter().zip(&wanted).map(|(a, b)| (a - b).abs());
    assert!(error.fold(0.0, f32::max) < 2f32.powi(-8));
}
