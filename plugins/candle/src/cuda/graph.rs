//! Repeated operations, recorded as a CUDA graph: launching it costs the host as much as launching a few kernels.
//!
//! A step of an AR teacher is some hundred kernels of a few microseconds, which the host would have to launch one by one. So
//! the first call runs them one by one, which loads all kernels; the second call records them; later calls copy their inputs
//! to the recorded addresses and launch the graph. Memory that the step allocates belongs to the graph.

use candle_core::DType;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, DriverError};
use retort_engine::backend::ReplayState;
use retort_engine::error::{Error, Result};

use crate::cuda::tensor::{Raw, Tensor, copy, device, fresh};
use crate::failed;

type Step<'a> = &'a mut dyn FnMut(&[&Tensor]) -> Result<Tensor>;

/// The state between calls.
enum GraphState {
    /// It ran once, with a result of this shape and type.
    RunOnce(Vec<usize>, DType),
    Recorded(Recorded),
}

struct Recorded {
    graph: CudaGraph,
    inputs: Vec<Tensor>,
    output: Tensor,
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // The graph may still be running. Its errors also reach whoever reads its results, so they are ignored here.
        if let Ok(device) = device(&self.output.raw) {
            let _ = device.cuda_stream().synchronize();
        }
    }
}

/// The backend's `repeat`.
pub fn repeat(kept: &mut ReplayState, inputs: &[&Tensor], step: Step<'_>) -> Result<Tensor> {
    let first = inputs
        .first()
        .ok_or_else(|| Error::Internal("repeat: expected at least one input, got none".into()))?;
    let stream = device(&first.raw)?.cuda_stream();
    // Without memory pools, allocations are synchronous and cannot be recorded.
    if !stream.context().has_async_alloc() {
        return step(inputs);
    }
    match kept
        .0
        .as_mut()
        .and_then(|kept| kept.downcast_mut::<GraphState>())
    {
        None => {
            let y = step(inputs)?;
            let once = GraphState::RunOnce(y.raw.dims().to_vec(), y.raw.dtype());
            kept.0 = Some(Box::new(once));
            Ok(y)
        }
        Some(kept) => {
            if let GraphState::RunOnce(shape, dtype) = kept {
                *kept = GraphState::Recorded(record(inputs, shape, *dtype, step)?);
            }
            let GraphState::Recorded(recorded) = kept else {
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
    // Every tensor made in between is dropped before the end.
    let made = step(&given).and_then(|y| copy(&y.raw, &output.raw));
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    made?;
    let graph = graph.map_err(refused)?;
    Ok(Recorded {
        graph: graph.ok_or_else(|| {
            Error::Internal(
                "repeat: expected a step with operations on the GPU, got one without".into(),
            )
        })?,
        inputs,
        output,
    })
}
