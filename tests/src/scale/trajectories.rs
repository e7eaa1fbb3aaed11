//! The processor time of trajectories by the number of tokens and of codes, on candle, with random weights.
//!
//! A teacher's attention over L tokens costs L^2, everything else of a sample L; its head and the flow map cost K for each
//! token, with K codes. The width is small, so the flow map has a larger share than at published sizes.

use retort_candle::Candle;
use retort_engine::backend::{FlowSolver, Tensors, flow};
use retort_engine::bundle::{Family, NetworkConfig, TokenizerConfig};
use retort_engine::error::Result;
use retort_engine::model::autoencoder::Shape;
use retort_engine::model::{ConditioningShape, llamagen, vq};
use retort_engine::random::noises;
use retort_engine::sampler::{Choice, Distribution, autoregressive};
use retort_engine::size::Sides;
use retort_engine::weights::{Loader, ParameterSource};

use crate::clock::Clock;
use crate::speed::{BackendRun, Drawn, Reference};

/// Samples at a time.
const BATCH: usize = 4;
/// Dimension of a code.
const DIM: usize = 8;

/// Seconds of processor time for one sample of `side` x `side` tokens of `codes` codes: the least of three times.
///
/// # Errors
/// The network cannot be built or run.
pub fn seconds(side: usize, codes: usize) -> Result<f64> {
    let reference = reference(side, codes);
    let drawn = Drawn::new(&reference)?;
    let on = BackendRun {
        name: "candle".into(),
        backend: Candle::open("cpu", "f32", 0)?,
    };
    let frozen = |weights| Loader::new(&on.backend, ParameterSource::Host(weights), false, "drawn");
    let tokenizer = reference.tokenizer.build(&mut frozen(&drawn.tokenizer))?;
    let codebook = tokenizer.codebook()?;
    let of_codes = (&reference.tokenizer, &mut frozen(&drawn.tokenizer));
    let teacher = reference
        .network
        .teacher(&mut frozen(&drawn.teacher), of_codes)?;
    let (_, labels, _) = on.inputs(&reference)?;
    let shape = reference.network.token_shape();
    let drawing = noises(2, 0..BATCH as u64, shape.count(), DIM);
    let noise = on.backend.floats(&drawing, &[BATCH, shape.count(), DIM])?;
    let distribution = Distribution {
        guidance: Some(2.0),
        ..Default::default()
    };
    let mut least = f64::INFINITY;
    for _ in 0..3 {
        let clock = Clock::start();
        let mut choice = Choice::Flow {
            noise: &noise,
            codebook: &codebook,
            solver: FlowSolver { steps: flow::STEPS },
        };
        let ids = autoregressive(
            &*teacher,
            &labels,
            &distribution,
            &mut choice,
            None,
            shape.steps.len(),
        )?;
        Candle::to_indices(&ids)?;
        least = least.min(clock.stop().cpu);
    }
    Ok(least / BATCH as f64)
}

/// A small LlamaGen.
fn reference(side: usize, codes: usize) -> Reference {
    let map = Sides::square(side);
    Reference {
        family: Family::Llamagen,
        name: "small",
        batch: BATCH,
        tokenizer: TokenizerConfig::Vq(vq::Config {
            autoencoder: Shape {
                image_channels: 3,
                image_size: Sides::square(2 * side),
                channels: 8,
                multipliers: vec![1, 1],
                res_blocks: 1,
                norm_groups: 4,
                z_channels: 4,
            },
            vocabulary: codes,
            codebook_dim: DIM,
            l2_norm: true,
        }),
        network: NetworkConfig::Llamagen(llamagen::Config {
            width: 128,
            depth: 4,
            heads: 4,
            vocabulary: codes,
            codebook_dim: DIM,
            map,
            condition: ConditioningShape::Classes(10),
        }),
    }
}
