//! Tiny networks of each family: images of 8 x 8, 16 codes, 10 classes.

use retort_engine::bundle::{NetworkConfig, TokenizerConfig};
use retort_engine::model::autoencoder::Shape;
use retort_engine::model::{ConditioningShape, llamagen, msvq, var, vq};
use retort_engine::size::Sides;

/// LlamaGen with 4 x 4 tokens, and VAR with these scales.
pub fn families(scales: &[usize]) -> [(NetworkConfig, TokenizerConfig); 2] {
    let autoencoder = Shape {
        image_channels: 1,
        image_size: Sides::square(8),
        channels: 8,
        multipliers: vec![1, 1],
        res_blocks: 1,
        norm_groups: 4,
        z_channels: 4,
    };
    let (vocabulary, codebook_dim, classes) = (16, 4, 10);
    let raster = NetworkConfig::Llamagen(llamagen::Config {
        width: 32,
        depth: 2,
        heads: 2,
        vocabulary,
        codebook_dim,
        map: Sides::square(4),
        condition: ConditioningShape::Classes(classes),
    });
    let of_raster = TokenizerConfig::Vq(vq::Config {
        autoencoder: autoencoder.clone(),
        vocabulary,
        codebook_dim,
        l2_norm: true,
    });
    let network_of_scales = NetworkConfig::Var(var::Config {
        width: 32,
        depth: 2,
        heads: 2,
        vocabulary,
        codebook_dim,
        scales: scales.to_vec(),
        classes,
        shared_adaln: false,
        attn_l2_norm: true,
    });
    let of_scales = TokenizerConfig::Msvq(msvq::Config {
        autoencoder,
        vocabulary,
        scales: scales.to_vec(),
        phi_convs: 2,
    });
    [(raster, of_raster), (network_of_scales, of_scales)]
}
