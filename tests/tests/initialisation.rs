//! The initial values of networks, and the parameters without weight decay: as in the published trainings.

use retort_candle::Candle;
use retort_engine::backend::Tensors;
use retort_engine::bundle::NetworkConfig;
use retort_engine::model::{ConditioningShape, decays, llamagen, var};
use retort_engine::size::Sides;
use retort_engine::weights::{Loader, ParameterSource, Params};

fn scales(shared_adaln: bool) -> NetworkConfig {
    NetworkConfig::Var(var::Config {
        width: 192,
        depth: 3,
        heads: 4,
        vocabulary: 64,
        codebook_dim: 8,
        scales: vec![1, 2, 4],
        classes: 100,
        shared_adaln,
        attn_l2_norm: true,
    })
}

fn raster() -> NetworkConfig {
    NetworkConfig::Llamagen(llamagen::Config {
        width: 192,
        depth: 3,
        heads: 4,
        vocabulary: 64,
        codebook_dim: 8,
        map: Sides::square(4),
        condition: ConditioningShape::Classes(100),
    })
}

fn student(network: &NetworkConfig) -> Params<Candle> {
    let backend = Candle::open("cpu", "f32", 1).expect("a CPU");
    let mut loader = Loader::new(&backend, ParameterSource::Init(1), true, "drawn");
    network.student(&mut loader).expect("a student");
    loader.into_params()
}

/// The standard deviation of some elements of a parameter around 0.
fn deviation(params: &Params<Candle>, name: &str, part: impl Fn(&[f32]) -> &[f32]) -> f64 {
    let (_, p) = params
        .iter()
        .find(|(own, _)| own == name)
        .unwrap_or_else(|| panic!("no {name}"));
    let all = Candle::to_floats(p.value()).expect("floats");
    let part = part(&all);
    let sum: f64 = part.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    (sum / part.len() as f64).sqrt()
}

fn whole(x: &[f32]) -> &[f32] {
    x
}
fn gammas(x: &[f32]) -> &[f32] {
    &x[..x.len() / 3]
}
fn others(x: &[f32]) -> &[f32] {
    &x[x.len() / 3..]
}

#[track_caller]
fn check(params: &Params<Candle>, name: &str, part: impl Fn(&[f32]) -> &[f32], expected: f64) {
    let found = deviation(params, name, part);
    assert!(
        (found - expected).abs() <= 0.12 * expected,
        "{name}: deviation {found}, expected {expected}"
    );
}

#[test]
fn networks_start_as_the_published_ones() {
    let std = (1.0f64 / 192.0 / 3.0).sqrt();
    let own = student(&scales(false));
    check(&own, "blocks.1.ada_lin.1.weight", gammas, 1e-5 * std);
    check(&own, "blocks.1.ada_lin.1.weight", others, 0.5 * std);
    check(&own, "blocks.1.ada_lin.1.bias", whole, 0.0);
    check(&own, "head_nm.ada_lin.1.weight", whole, 0.5 * std);
    check(&own, "head.weight", whole, 0.02 * std);
    check(&own, "blocks.0.attn.proj.weight", whole, std / 6f64.sqrt());
    check(&own, "blocks.2.ffn.fc2.weight", whole, std / 6f64.sqrt());
    check(&own, "blocks.2.ffn.fc1.weight", whole, std);
    check(&own, "pos_1LC", whole, std);
    check(&own, "final_layer_conti.linear.weight", whole, std);
    let shared = student(&scales(true));
    let offset = (1.0f64 / 192.0).sqrt();
    check(&shared, "blocks.1.ada_gss", gammas, 1e-5 * offset);
    check(&shared, "blocks.1.ada_gss", others, 0.5 * offset);
    check(&shared, "shared_ada_lin.1.weight", whole, std);
    let raster = student(&raster());
    check(&raster, "tok_embeddings.weight", whole, 0.02);
    check(&raster, "tok_embeddings.bias", whole, 0.0);
    check(&raster, "layers.1.feed_forward.w2.weight", whole, 0.02);
    check(&raster, "final_layer_conti.linear.weight", whole, 0.02);
    check(&raster, "output.weight", whole, 0.0);
}

#[test]
fn weight_decay_spares_what_the_published_trainings_spare() {
    let spared = |network: &NetworkConfig| -> Vec<String> {
        let params = student(network).into_iter();
        let spared = params.filter(|(name, p)| p.shape().len() > 1 && !decays(name, &p.shape()));
        spared.map(|(name, _)| name).collect()
    };
    assert!(spared(&raster()).is_empty());
    let lengths = (0..3).map(|i| format!("blocks.{i}.attn.scale_mul_1H11"));
    let offsets = (0..3).map(|i| format!("blocks.{i}.ada_gss"));
    let places = ["lvl_embed.weight", "pos_1LC", "pos_start"].map(String::from);
    let mut expected: Vec<String> = places.into_iter().chain(lengths).chain(offsets).collect();
    let mut found = spared(&scales(true));
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
    // In every family, vectors have no weight decay; matrices and class embeddings do.
    for network in [raster(), scales(false)] {
        for (name, p) in student(&network) {
            let vector = p.shape().len() == 1;
            assert!(!vector || !decays(&name, &p.shape()), "{name}");
            let class = name.starts_with("cls_embedding") || name.starts_with("class_emb");
            assert!(!class || decays(&name, &p.shape()), "{name}");
        }
    }
}
