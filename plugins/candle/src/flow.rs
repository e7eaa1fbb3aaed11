//! The AR flow map on the host.

use candle_core::{Device, Tensor};
use retort_engine::backend::FlowSolver;
use retort_engine::error::{Error, Result};
use retort_kernels::{Rayon, flow};

use crate::layout::whole;
use crate::view::floats;
use crate::{T, failed};

/// logits (n, k), -inf where excluded; noise (n, d); codebook (k, d) -> ids (n).
pub fn flow_map(logits: &T, noise: &T, codebook: &T, solver: &FlowSolver) -> Result<T> {
    let ((n, k), (_, d)) = (
        logits.dims2().map_err(failed)?,
        noise.dims2().map_err(failed)?,
    );
    if noise.dims() != [n, d] || codebook.dims() != [k, d] {
        return Err(Error::Backend(format!(
            "flow map: logits {:?}, noise {:?}, codebook {:?}",
            logits.dims(),
            noise.dims(),
            codebook.dims()
        )));
    }
    let (logits, noise, codebook) = (&whole(logits)?, &whole(noise)?, &whole(codebook)?);
    floats!(logits, noise, codebook);
    let (logits, noise, codebook) = (&logits[..n * k], &noise[..n * d], &codebook[..k * d]);
    let ids = flow::flow_map(&Rayon, logits, noise, codebook, d, solver);
    Tensor::from_vec(ids, n, &Device::Cpu).map_err(failed)
}
