// The kernels of the CUDA variant: operations that candle and cuBLAS lack, or need several launches for.
//
// In: row-major arrays of f32 unless stated otherwise; sizes and strides by value, so that a launch copies nothing to the
// device. Each row of a matrix, query or token has a block, whose result does not depend on other blocks, so results do not
// depend on batches. The order of every sum is fixed. Deliberately absent: shapes and errors (`launch.rs` checks its
// arguments). The source is also compiled for the host, where tests run it thread by thread (`emulator/`), so only features
// that the emulation has may be used.

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
