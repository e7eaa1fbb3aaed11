// What the backend needs of libtorch and tch does not bind: backward operations (tch skips functions that take arrays
// of bool), a setting, and its threads.
//
// In: handles of at::Tensor as tch holds them, borrowed. Out: new handles, owned by the caller. A function returns
// nullptr, or the message of what was thrown; the message lives until the thread's next call.

#include <dlfcn.h>

#include <string>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/native_group_norm_backward.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>

#include "guarded.h"

using at::Tensor;

namespace {

void give(Tensor **out, Tensor tensor) {
  *out = tensor.defined() ? new Tensor(std::move(tensor)) : nullptr;
}

} // namespace

extern "C" {

// The file that libtorch was loaded from, which need not be the one that this was built with.
const char *retort_library() {
  static const std::string file = [] {
    Dl_info found{};
    dladdr(reinterpret_cast<void *>(&at::get_num_threads), &found);
    return std::string(found.dli_fname ? found.dli_fname : "");
  }();
  return file.c_str();
}

// f32 shall mean f32: by itself libtorch lets convolutions on GPUs round their operands to TF32.
const char *retort_no_tf32() {
  return guarded([] {
    at::globalContext().setAllowTF32CuDNN(false);
    at::globalContext().setAllowTF32CuBLAS(false);
  });
}

// Calls task(context, i) for each i below count on libtorch's own threads, and returns when all calls have returned.
const char *retort_each(int64_t count, void (*task)(const void *, int64_t), const void *context) {
  return guarded([&] {
    at::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i)
        task(context, i);
    });
  });
}

// Gradients of a 2-d cross-correlation for its input and its kernel; what is not wanted stays NULL.
const char *retort_conv2d_backward(const Tensor *x, const Tensor *w, const Tensor *grad, int64_t stride,
                                   int64_t padding_h, int64_t padding_w, bool want_x, bool want_w, Tensor **dx,
                                   Tensor **dw) {
  return guarded([&] {
    const int64_t strides[] = {stride, stride}, paddings[] = {padding_h, padding_w}, ones[] = {1, 1}, none[] = {0, 0};
    auto [gx, gw, gb] = at::convolution_backward(*grad, *x, *w, at::OptionalIntArrayRef(), strides, paddings, ones,
                                                 false, none, 1, {want_x, want_w, false});
    give(dx, std::move(gx));
    give(dw, std::move(gw));
  });
}

// Gradient of a layer norm over the last dimension, without affine part.
const char *retort_layer_norm_backward(const Tensor *x, const Tensor *grad, double eps, Tensor **dx) {
  return guarded([&] {
    const int64_t last[] = {x->size(-1)};
    auto [y, mean, rstd] = at::native_layer_norm(*x, last, {}, {}, eps);
    auto [gx, gw, gb] = at::native_layer_norm_backward(*grad, *x, last, mean, rstd, {}, {}, {true, false, false});
    give(dx, std::move(gx));
  });
}

// Gradients of a group norm of (b, c, h, w) for input, scale and shift.
const char *retort_group_norm_backward(const Tensor *x, int64_t groups, const Tensor *w, const Tensor *grad,
                                       double eps, Tensor **dx, Tensor **dw, Tensor **db) {
  return guarded([&] {
    const Tensor whole = x->contiguous(), g = grad->contiguous(), scale = w->contiguous();
    const int64_t n = whole.size(0), c = whole.size(1), area = whole.size(2) * whole.size(3);
    auto [y, mean, rstd] = at::native_group_norm(whole, {}, {}, n, c, area, groups, eps);
    auto [gx, gw, gb] =
        at::native_group_norm_backward(g, whole, mean, rstd, scale, n, c, area, groups, {true, true, true});
    give(dx, std::move(gx));
    give(dw, std::move(gw));
    give(db, std::move(gb));
  });
}

} // extern "C"
