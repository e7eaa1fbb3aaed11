//! Operations that are done again: recorded as a CUDA graph, whose launch costs the host what a few kernels do.
//!
//! A step of an AR teacher is some hundred kernels of a few microseconds, each of which the host would have to ask for. So
//! the first call does them one by one, after which all kernels are loaded; the second records them; later ones copy their
//! inputs to where the recorded ones lay, and launch. What the step allocates is memory of the graph.

use candle_core::DType;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, DriverError};
use retort_engine::backend::Recording;
use retort_engine::error::{Error, Result};

use crate::cuda::tensor::{Raw, Tensor, copy, device, fresh};
use crate::failed;

type Step<'a> = &'a mut dyn FnMut(&[&Tensor]) -> Result<Tensor>;

/// What is kept between calls.
enum KeptGraph {
    /// It was done once, with a result of this shape and type.
    Once(Vec<usize>, DType),
    Recorded(Recorded),
}

struct Recorded {
    graph: CudaGraph,
    inputs: Vec<Tensor>,
    output: Tensor,
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // It may still be running. An error belongs to what runs; whoever reads its results gets it too.
        if let Ok(device) = device(&self.output.raw) {
            let _ = device.cuda_stream().synchronize();
        }
    }
}

/// The backend's `repeat`.
pub fn repeat(kept: &mut Recording, inputs: &[&Tensor], step: Step<'_>) -> Result<Tensor> {
    let first = inputs
        .first()
        .ok_or_else(|| Error::Internal("repeat: no inputs".into()))?;
    let stream = device(&first.raw)?.cuda_stream();
    // Without pools of memory the driver allocates at once, which cannot be recorded.
    if !stream.context().has_async_alloc() {
        return step(inputs);
    }
    match kept
        .0
        .as_mut()
        .and_then(|kept| kept.downcast_mut::<KeptGraph>())
    {
        None => {
            let y = step(inputs)?;
            let once = KeptGraph::Once(y.raw.dims().to_vec(), y.raw.dtype());
            kept.0 = Some(Box::new(once));
            Ok(y)
        }
        Some(kept) => {
            if let KeptGraph::Once(shape, dtype) = kept {
                *kept = KeptGraph::Recorded(record(inputs, shape, *dtype, step)?);
            }
            let KeptGraph::Recorded(recorded) = kept else {
                return Err(Error::Internal("repeat: nothing was recorded".into()));
            };
            for (from, to) in inputs.iter().zip(&recorded.inputs) {
                copy(&from.raw, &to.raw)?;
            }
            recorded.graph.launch().map_err(refused)?;
            Ok(recorded.output.clone())
        }
    }
}

fn refused(error: DriverError) -> Error {
    failed(candle_core::Error::wrap(error))
}

fn record(inputs: &[&Tensor], shape: &[usize], dtype: DType, step: Step<'_>) -> Result<Recorded> {
    let own = |x: &Raw| fresh(&device(x)?, x.dims(), x.dtype());
    let inputs: Vec<Tensor> = inputs
        .iter()
        .map(|x| Ok(x.like(own(&x.raw)?)))
        .collect::<Result<_>>()?;
    let given: Vec<&Tensor> = inputs.iter().collect();
    let device = device(&inputs[0].raw)?;
    let output = inputs[0].like(fresh(&device, shape, dtype)?);
    let stream = device.cuda_stream();
    // Other threads may go on calling the driver.
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    stream.begin_capture(mode).map_err(refused)?;
    // Every tensor that is made in between is gone before the end.
    let made = step(&given).and_then(|y| copy(&y.raw, &output.raw));
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    made?;
    let graph = graph.map_err(refused)?;
    Ok(Recorded {
        graph: graph.ok_or_else(|| Error::Internal("repeat: a step of no operations".into()))?,
        inputs,
        output,
    })
}
