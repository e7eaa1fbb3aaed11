// The kernels of the CUDA variant: what candle and cuBLAS do not bring, or not in one launch.
//
// In: row-major arrays of f32 where nothing else is said; sizes and places by value, so that a launch copies nothing to
// the device. A matrix's rows, a query, a token have a block each, and what a block computes does not depend on the
// others, so that results do not depend on batches. Nothing is added up in an order that could change from run to run.
// Deliberately absent: shapes and errors (`launch.rs` checks what it passes). The text is also compiled for the host, where
// tests run it thread by thread (`emulator/`): what that emulation lacks may not be used here.

#include "kernels/common.cuh"
#include "kernels/movement.cuh"
#include "kernels/arithmetic.cuh"
#include "kernels/reductions.cuh"
#include "kernels/tables.cuh"
#include "kernels/softmax.cuh"
#include "kernels/norms.cuh"
#include "kernels/images.cuh"
#include "kernels/attention.cuh"
#include "kernels/attention_bf16.cuh"
#include "kernels/optimiser.cuh"
#include "kernels/choice.cuh"
#include "kernels/flow.cuh"
