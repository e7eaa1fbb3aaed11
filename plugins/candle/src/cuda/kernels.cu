// The kernels of the CUDA variant: what candle and cuBLAS do not bring, or not in one launch.
//
// In: row-major arrays of f32 where nothing else is said; sizes and places by value, so that a launch copies nothing to
// the device. A matrix's rows, a query, a token have a block each, and what a block computes does not depend on the
// others, so that results do not depend on batches. Nothing is added up in an order that could change from run to run.
// Deliberately absent: shapes and errors (`launch.rs` checks what it passes). The text is also compiled for the host, where
// tests run it thread by thread (`tests/emulator`): what that emulation lacks may not be used here.

#ifndef EMULATED
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(BLOCK) name(__VA_ARGS__)
#define DYNAMIC_SHARED(name) extern __shared__ float name[]
#endif

// Threads of every block.
constexpr int BLOCK = 256;
constexpr int WARPS = BLOCK / 32;
// Dimensions that a tensor may have.
constexpr int RANK = 8;

// Where the elements of two tensors lie: for each dimension its size, and the step to the next element in either.
struct Places {
    int rank;
    unsigned size[RANK];
    long long first[RANK];
    long long second[RANK];
};

struct bf16 {
    unsigned short bits;
};

__device__ inline float wide(float x) { return x; }
__device__ inline unsigned wide(unsigned x) { return x; }
__device__ inline float wide(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline void put(float& to, float x) { to = x; }
__device__ inline void put(unsigned& to, unsigned x) { to = x; }
// To the nearest, the even one of two.
__device__ inline void put(bf16& to, float x) {
    unsigned bits = __float_as_uint(x);
    bool number = (bits & 0x7fffffffu) <= 0x7f800000u;
    to.bits = number ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fffu;
}

// IEEE's half: ten bits of a significand as TF32 has, but five of an exponent.
struct fp16 {
    unsigned short bits;
};

// To the nearest, the even one of two. Numbers beyond the range become its ends; below 6e-5 the step is 6e-8.
__device__ inline void put(fp16& to, float x) {
    float size = fabsf(x);
    if (size > 65504.0f && size < INFINITY) x = x > 0.0f ? 65504.0f : -65504.0f;
#ifndef EMULATED
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
    unsigned all = __float_as_uint(x), bits = all & 0x7fffffffu;
    if (bits > 0x7f800000u) {
        bits = 0x7fffu;
    } else if (bits == 0x7f800000u) {
        bits = 0x7c00u;
    } else if (bits < 0x38800000u) {
        // One half has the step of what is below 2^-14 as its last bit.
        bits = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u;
    } else {
        bits = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    }
    to.bits = (unsigned short)(bits | (all >> 16 & 0x8000u));
#endif
}

__device__ inline float lowest() { return -INFINITY; }

// The elements that this thread is to look at.
#define EACH(i, n) for (unsigned i = blockIdx.x * BLOCK + threadIdx.x; i < (n); i += gridDim.x * BLOCK)
#define ALONG(i, n) for (unsigned i = threadIdx.x; i < (n); i += BLOCK)

__device__ inline long long first(const Places& p, unsigned i) {
    long long at = 0;
    for (int d = p.rank - 1; d >= 0; --d) {
        at += (long long)(i % p.size[d]) * p.first[d];
        i /= p.size[d];
    }
    return at;
}

__device__ inline void both(const Places& p, unsigned i, long long& a, long long& b) {
    a = b = 0;
    for (int d = p.rank - 1; d >= 0; --d) {
        unsigned at = i % p.size[d];
        i /= p.size[d];
        a += (long long)at * p.first[d];
        b += (long long)at * p.second[d];
    }
}

struct Add {
    template <class T> __device__ static T of(T a, T b) { return a + b; }
};
struct Max {
    template <class T> __device__ static T of(T a, T b) { return a > b ? a : b; }
};
struct Min {
    template <class T> __device__ static T of(T a, T b) { return a < b ? a : b; }
};

// The values of all threads of a warp as one, in the same order at every call; all threads get it.
template <class Op, class T> __device__ T across(T x) {
    for (int step = 16; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// The values of all threads of a block as one, in the same order at every call; all threads get it.
template <class Op, class T> __device__ T together(T x, T none) {
    __shared__ T parts[WARPS];
    x = across<Op>(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = none;
    for (int w = 0; w < WARPS; ++w) x = Op::of(x, parts[w]);
    return x;
}

__device__ inline float total(float x) { return together<Add>(x, 0.0f); }
__device__ inline float greatest(float x) { return together<Max>(x, lowest()); }

// ---- movement ----------------------------------------------------------------------------------------------------

// Adjacent elements that one instruction reads or writes.
template <class T> struct alignas(4 * sizeof(T)) Four {
    T of[4];
};

template <class From, class To> __device__ void copy(unsigned n, const Places& p, const From* from, To* to) {
    EACH(i, n) {
        long long a, b;
        both(p, i, a, b);
        put(to[b], wide(from[a]));
    }
}
// Places of elements four at a time.
template <class From, class To> __device__ void copy_four(unsigned n, const Places& p, const From* from, To* to) {
    EACH(i, n) {
        long long a, b;
        both(p, i, a, b);
        Four<From> x = *(const Four<From>*)(from + a);
        Four<To> y;
        for (int e = 0; e < 4; ++e) put(y.of[e], wide(x.of[e]));
        *(Four<To>*)(to + b) = y;
    }
}
#define COPY(name, From, To)                                                                                     \
    KERNEL(copy_##name, unsigned n, Places p, const From* from, To* to) { copy(n, p, from, to); }                \
    KERNEL(copy_four_##name, unsigned n, Places p, const From* from, To* to) { copy_four(n, p, from, to); }
COPY(f32_f32, float, float)
COPY(f32_bf16, float, bf16)
COPY(f32_f16, float, fp16)
COPY(bf16_f32, bf16, float)
COPY(bf16_bf16, bf16, bf16)
COPY(u32_u32, unsigned, unsigned)

KERNEL(fill_f32, unsigned n, float value, float* to) {
    EACH(i, n) to[i] = value;
}
KERNEL(fill_bf16, unsigned n, float value, bf16* to) {
    EACH(i, n) put(to[i], value);
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

// In the order of the engine's `Unary`.
enum { EXP, LOG, SQRT, SQUARE, RECIP, TANH, SIGMOID, ERF, SILU, GELU_TANH, GELU_ERF, RELU };

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

KERNEL(unary, unsigned n, int f, const float* from, float* to) {
    EACH(i, n) {
        float x = from[i], y;
        switch (f) {
            case EXP: y = expf(x); break;
            case LOG: y = logf(x); break;
            case SQRT: y = sqrtf(x); break;
            case SQUARE: y = x * x; break;
            case RECIP: y = 1.0f / x; break;
            case TANH: y = tanhf(x); break;
            case SIGMOID: y = sigmoid(x); break;
            case ERF: y = erff(x); break;
            case SILU: y = x * sigmoid(x); break;
            case GELU_TANH: y = 0.5f * x * (1.0f + tanhf(0.7978845608f * x * (1.0f + 0.044715f * x * x))); break;
            case GELU_ERF: y = 0.5f * x * (1.0f + erff(0.7071067812f * x)); break;
            default: y = x > 0.0f ? x : 0.0f; break;
        }
        to[i] = y;
    }
}

// From the argument, the result and the gradient of the result.
KERNEL(unary_backward, unsigned n, int f, const float* xs, const float* ys, const float* gs, float* to) {
    EACH(i, n) {
        float x = xs[i], y = ys[i], d;
        switch (f) {
            case EXP: d = y; break;
            case LOG: d = 1.0f / x; break;
            case SQRT: d = 0.5f / y; break;
            case SQUARE: d = 2.0f * x; break;
            case RECIP: d = -y * y; break;
            case TANH: d = 1.0f - y * y; break;
            case SIGMOID: d = y * (1.0f - y); break;
            case ERF: d = 1.1283791671f * expf(-x * x); break;
            case SILU: {
                float s = sigmoid(x);
                d = s * (1.0f + x * (1.0f - s));
                break;
            }
            case GELU_TANH: {
                float t = tanhf(0.7978845608f * x * (1.0f + 0.044715f * x * x));
                d = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608f * (1.0f + 0.134145f * x * x);
                break;
            }
            case GELU_ERF:
                d = 0.5f * (1.0f + erff(0.7071067812f * x)) + 0.3989422804f * x * expf(-0.5f * x * x);
                break;
            default: d = y > 0.0f ? 1.0f : 0.0f; break;
        }
        to[i] = d * gs[i];
    }
}

// In the order of the engine's `Binary`.
enum { ADD, SUB, MUL, DIV, MAX };

KERNEL(binary, unsigned n, int f, Places p, const float* as, const float* bs, float* to) {
    EACH(i, n) {
        long long i_a, i_b;
        both(p, i, i_a, i_b);
        float a = as[i_a], b = bs[i_b], y;
        switch (f) {
            case ADD: y = a + b; break;
            case SUB: y = a - b; break;
            case MUL: y = a * b; break;
            case DIV: y = a / b; break;
            default: y = a > b ? a : b; break;
        }
        to[i] = y;
    }
}

KERNEL(affine, unsigned n, float mul, float add, const float* from, float* to) {
    EACH(i, n) to[i] = from[i] * mul + add;
}

// x (rows, 2 d) -> (rows, d)
template <class T> __device__ void swiglu(unsigned n, unsigned d, const float* x, T* to) {
    EACH(i, n) {
        const float* a = x + (size_t)(i / d) * 2 * d + i % d;
        put(to[i], a[0] * sigmoid(a[0]) * a[d]);
    }
}
KERNEL(swiglu_f32, unsigned n, unsigned d, const float* x, float* to) { swiglu(n, d, x, to); }
KERNEL(swiglu_bf16, unsigned n, unsigned d, const float* x, bf16* to) { swiglu(n, d, x, to); }

KERNEL(swiglu_backward, unsigned n, unsigned d, const float* x, const float* g, float* to) {
    EACH(i, n) {
        size_t at = (size_t)(i / d) * 2 * d + i % d;
        float a = x[at], b = x[at + d], s = sigmoid(a);
        to[at] = g[i] * b * s * (1.0f + a * (1.0f - s));
        to[at + d] = g[i] * a * s;
    }
}

// ---- sums and extrema --------------------------------------------------------------------------------------------

// A block per sum: `kept` leads to its first element, `gone` to the others from there.
KERNEL(sum, unsigned terms, Places kept, Places gone, const float* x, float* to) {
    const float* from = x + first(kept, blockIdx.x);
    float sum = 0.0f;
    ALONG(i, terms) sum += from[first(gone, i)];
    sum = total(sum);
    if (threadIdx.x == 0) to[blockIdx.x] = sum;
}

// A thread per sum.
KERNEL(sum_few, unsigned n, unsigned terms, Places kept, Places gone, const float* x, float* to) {
    EACH(i, n) {
        const float* from = x + first(kept, i);
        float sum = 0.0f;
        for (unsigned t = 0; t < terms; ++t) sum += from[first(gone, t)];
        to[i] = sum;
    }
}

// Columns of `outer` times (rows, columns), `part` rows at a time: -> (outer, parts, columns).
KERNEL(sum_columns, unsigned outer, unsigned rows, unsigned columns, unsigned part, const float* x, float* to) {
    unsigned parts = (rows + part - 1) / part;
    EACH(i, outer * parts * columns) {
        unsigned from = i / columns % parts * part, end = from + part < rows ? from + part : rows;
        const float* own = x + (size_t)(i / columns / parts) * rows * columns + i % columns;
        float sum = 0.0f;
        for (unsigned row = from; row < end; ++row) sum += own[(size_t)row * columns];
        to[i] = sum;
    }
}

KERNEL(max_last, unsigned k, const float* x, float* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest();
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    if (threadIdx.x == 0) to[blockIdx.x] = top;
}

KERNEL(argmax_last, unsigned k, const float* x, unsigned* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest();
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    unsigned at = k - 1;
    ALONG(i, k) if (row[i] == top && i < at) at = i;
    at = together<Min>(at, k - 1);
    if (threadIdx.x == 0) to[blockIdx.x] = at;
}

// ---- tables ------------------------------------------------------------------------------------------------------

// An id beyond the table gives numbers that nobody overlooks.
template <class T> __device__ void rows(unsigned n, unsigned d, unsigned k, const T* table, const unsigned* ids, float* to) {
    EACH(i, n) {
        unsigned id = ids[i / d];
        to[i] = id < k ? wide(table[(size_t)id * d + i % d]) : NAN;
    }
}
KERNEL(rows_f32, unsigned n, unsigned d, unsigned k, const float* table, const unsigned* ids, float* to) {
    rows(n, d, k, table, ids, to);
}
KERNEL(rows_bf16, unsigned n, unsigned d, unsigned k, const bf16* table, const unsigned* ids, float* to) {
    rows(n, d, k, table, ids, to);
}

// A block per row of the table of k looks for the gradients that belong to it, always in the same order, among `part` of
// the n: -> (parts, k, d).
KERNEL(rows_adjoint, unsigned n, unsigned k, unsigned d, unsigned part, const float* g, const unsigned* ids, float* to) {
    __shared__ unsigned char hit[BLOCK];
    float* row = to + (size_t)blockIdx.x * d;
    unsigned own = blockIdx.x % k, from = blockIdx.x / k * part, end = from + part < n ? from + part : n;
    ALONG(e, d) row[e] = 0.0f;
    for (unsigned start = from; start < end; start += BLOCK) {
        unsigned i = start + threadIdx.x;
        bool found = i < end && ids[i] == own;
        unsigned some = together<Max>(found ? 1u : 0u, 0u);
        if (!some) continue;
        hit[threadIdx.x] = found;
        __syncthreads();
        for (unsigned t = 0; t < BLOCK; ++t) {
            if (hit[t]) ALONG(e, d) row[e] += g[(size_t)(start + t) * d + e];
        }
        __syncthreads();
    }
}

KERNEL(pick, unsigned n, unsigned k, const float* x, const unsigned* ids, float* to) {
    EACH(i, n) to[i] = ids[i] < k ? x[(size_t)i * k + ids[i]] : NAN;
}

KERNEL(pick_adjoint, unsigned n, unsigned k, const float* g, const unsigned* ids, float* to) {
    EACH(i, n) to[i] = ids[i / k] == i % k ? g[i / k] : 0.0f;
}

// ---- rows of probabilities ---------------------------------------------------------------------------------------

KERNEL(softmax, unsigned k, const float* x, float* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest(), sum = 0.0f;
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    ALONG(i, k) sum += expf(row[i] - top);
    float scale = 1.0f / total(sum);
    ALONG(i, k) to[(size_t)blockIdx.x * k + i] = scale * expf(row[i] - top);
}

KERNEL(softmax_backward, unsigned k, const float* y, const float* g, float* to) {
    size_t at = (size_t)blockIdx.x * k;
    float along = 0.0f;
    ALONG(i, k) along += y[at + i] * g[at + i];
    along = total(along);
    ALONG(i, k) to[at + i] = y[at + i] * (g[at + i] - along);
}

KERNEL(cross_entropy, unsigned k, const float* x, const unsigned* ids, float* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest(), sum = 0.0f;
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    ALONG(i, k) sum += expf(row[i] - top);
    sum = total(sum);
    unsigned id = ids[blockIdx.x];
    if (threadIdx.x == 0) to[blockIdx.x] = id < k ? logf(sum) - (row[id] - top) : NAN;
}

KERNEL(cross_entropy_backward, unsigned k, const float* x, const unsigned* ids, const float* g, float* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest(), sum = 0.0f;
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    ALONG(i, k) sum += expf(row[i] - top);
    float scale = 1.0f / total(sum), grad = g[blockIdx.x];
    unsigned id = ids[blockIdx.x];
    ALONG(i, k) to[(size_t)blockIdx.x * k + i] = grad * (scale * expf(row[i] - top) - (i == id ? 1.0f : 0.0f));
}

// ---- norms -------------------------------------------------------------------------------------------------------

template <class T> __device__ void rms_norm(unsigned d, float eps, const float* x, const float* w, T* to) {
    size_t at = (size_t)blockIdx.x * d;
    float square = 0.0f;
    ALONG(i, d) square += x[at + i] * x[at + i];
    float r = 1.0f / sqrtf(total(square) / d + eps);
    ALONG(i, d) put(to[at + i], x[at + i] * r * w[i]);
}
// The same for short rows: a warp each.
template <class T>
__device__ void rms_norm_short(unsigned rows, unsigned d, float eps, const float* x, const float* w, T* to) {
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    size_t at = (size_t)row * d;
    float square = 0.0f;
    for (unsigned i = lane; i < d; i += 32) square += x[at + i] * x[at + i];
    float r = 1.0f / sqrtf(across<Add>(square) / d + eps);
    for (unsigned i = lane; i < d; i += 32) put(to[at + i], x[at + i] * r * w[i]);
}
KERNEL(rms_norm_short_f32, unsigned rows, unsigned d, float eps, const float* x, const float* w, float* to) {
    rms_norm_short(rows, d, eps, x, w, to);
}
KERNEL(rms_norm_short_bf16, unsigned rows, unsigned d, float eps, const float* x, const float* w, bf16* to) {
    rms_norm_short(rows, d, eps, x, w, to);
}
KERNEL(rms_norm_f32, unsigned, unsigned d, float eps, const float* x, const float* w, float* to) {
    rms_norm(d, eps, x, w, to);
}
KERNEL(rms_norm_bf16, unsigned, unsigned d, float eps, const float* x, const float* w, bf16* to) {
    rms_norm(d, eps, x, w, to);
}

// `dw`: what each row adds to the gradient of w.
KERNEL(rms_norm_backward, unsigned, unsigned d, float eps, const float* x, const float* w, const float* g, float* dx,
       float* dw) {
    size_t at = (size_t)blockIdx.x * d;
    float square = 0.0f, along = 0.0f;
    ALONG(i, d) {
        square += x[at + i] * x[at + i];
        along += g[at + i] * w[i] * x[at + i];
    }
    float r = 1.0f / sqrtf(total(square) / d + eps);
    along = total(along) * r / d;
    ALONG(i, d) {
        float n = x[at + i] * r;
        dx[at + i] = r * (g[at + i] * w[i] - n * along);
        dw[at + i] = g[at + i] * n;
    }
}

KERNEL(rms_norm_short_backward, unsigned rows, unsigned d, float eps, const float* x, const float* w, const float* g,
       float* dx, float* dw) {
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    size_t at = (size_t)row * d;
    float square = 0.0f, along = 0.0f;
    for (unsigned i = lane; i < d; i += 32) {
        square += x[at + i] * x[at + i];
        along += g[at + i] * w[i] * x[at + i];
    }
    float r = 1.0f / sqrtf(across<Add>(square) / d + eps);
    along = across<Add>(along) * r / d;
    for (unsigned i = lane; i < d; i += 32) {
        float n = x[at + i] * r;
        dx[at + i] = r * (g[at + i] * w[i] - n * along);
        dw[at + i] = g[at + i] * n;
    }
}

// Mean and the reciprocal of the deviation of a row.
__device__ inline void moments(unsigned n, float eps, const float* row, float& mean, float& r) {
    float sum = 0.0f, square = 0.0f;
    ALONG(i, n) sum += row[i];
    mean = total(sum) / n;
    ALONG(i, n) square += (row[i] - mean) * (row[i] - mean);
    r = 1.0f / sqrtf(total(square) / n + eps);
}

// Rows of n values in groups of channels: channel i / area % channels has a scale and a shift. Without them (null) this
// is the layer norm. Followed by silu, if `active`.
KERNEL(group_norm, unsigned n, unsigned area, unsigned groups, float eps, int active, const float* x, const float* w,
       const float* bias, float* to) {
    size_t at = (size_t)blockIdx.x * n;
    unsigned channel = w ? blockIdx.x % groups * (n / area) : 0;
    float mean, r;
    moments(n, eps, x + at, mean, r);
    ALONG(i, n) {
        float y = (x[at + i] - mean) * r;
        if (w) y = y * w[channel + i / area] + bias[channel + i / area];
        to[at + i] = active ? y * sigmoid(y) : y;
    }
}

// Layer norm of rows (b l, d), times the scale plus the shift of the row's sequence, (b, d) each.
template <class T>
__device__ void modulated_norm(unsigned l, unsigned d, float eps, const float* x, const float* scale, const float* shift,
                               T* to) {
    size_t at = (size_t)blockIdx.x * d, own = (size_t)(blockIdx.x / l) * d;
    float mean, r;
    moments(d, eps, x + at, mean, r);
    ALONG(i, d) put(to[at + i], (x[at + i] - mean) * r * scale[own + i] + shift[own + i]);
}
KERNEL(modulated_norm_f32, unsigned l, unsigned d, float eps, const float* x, const float* scale, const float* shift,
       float* to) {
    modulated_norm(l, d, eps, x, scale, shift, to);
}
KERNEL(modulated_norm_bf16, unsigned l, unsigned d, float eps, const float* x, const float* scale, const float* shift,
       bf16* to) {
    modulated_norm(l, d, eps, x, scale, shift, to);
}

// `dw`: what each element adds to the gradient of its channel's scale; not wanted where it is null.
KERNEL(group_norm_backward, unsigned n, unsigned area, unsigned groups, float eps, const float* x, const float* w,
       const float* g, float* dx, float* dw) {
    size_t at = (size_t)blockIdx.x * n;
    unsigned channel = w ? blockIdx.x % groups * (n / area) : 0;
    float mean, r, sum = 0.0f, along = 0.0f;
    moments(n, eps, x + at, mean, r);
    ALONG(i, n) {
        float gw = w ? g[at + i] * w[channel + i / area] : g[at + i];
        sum += gw;
        along += gw * (x[at + i] - mean) * r;
    }
    sum = total(sum) / n;
    along = total(along) / n;
    ALONG(i, n) {
        float y = (x[at + i] - mean) * r;
        float gw = w ? g[at + i] * w[channel + i / area] : g[at + i];
        dx[at + i] = r * (gw - sum - y * along);
        if (dw) dw[at + i] = g[at + i] * y;
    }
}

// ---- images ------------------------------------------------------------------------------------------------------

// How a window slides over an image of h x w pixels.
struct Slide {
    unsigned h, w;         // pixels
    unsigned kh, kw;       // window
    unsigned stride;
    unsigned ph, pw;       // pixels beyond the image on each side
    unsigned oh, ow;       // windows
    unsigned halvings;     // how often both sides are halved in memory, where each pixel stands for a block
};

// Adjacent elements that a thread writes at once.
template <class T, unsigned N> struct alignas(N * sizeof(T)) Some {
    T of[N];
};

// The pixels under each window, zero beyond the image: (c, h, w) -> (c, kh, kw, oh, ow), for every image.
// A thread takes adjacent windows of a row.
template <class T, unsigned N> __device__ void unfold(unsigned n, const Slide& s, const float* x, Some<T, N>* to) {
    EACH(i, n) {
        unsigned per_row = s.ow / N, rest = i / per_row, first = i % per_row * N;
        unsigned row = rest % s.oh;
        rest /= s.oh;
        unsigned kx = rest % s.kw;
        rest /= s.kw;
        unsigned ky = rest % s.kh, plane = rest / s.kh;
        int y = (int)(row * s.stride + ky) - (int)s.ph, v = (int)(first * s.stride + kx) - (int)s.pw;
        const float* from = x + ((size_t)plane * (s.h >> s.halvings) + (y >> s.halvings)) * (s.w >> s.halvings);
        Some<T, N> all;
        for (unsigned e = 0; e < N; ++e, v += s.stride) {
            bool inside = y >= 0 && y < (int)s.h && v >= 0 && v < (int)s.w;
            put(all.of[e], inside ? from[v >> s.halvings] : 0.0f);
        }
        to[i] = all;
    }
}
KERNEL(unfold_one_f32, unsigned n, Slide s, const float* x, Some<float, 1>* to) { unfold(n, s, x, to); }
KERNEL(unfold_four_f32, unsigned n, Slide s, const float* x, Some<float, 4>* to) { unfold(n, s, x, to); }
KERNEL(unfold_one_f16, unsigned n, Slide s, const float* x, Some<fp16, 1>* to) { unfold(n, s, x, to); }
KERNEL(unfold_eight_f16, unsigned n, Slide s, const float* x, Some<fp16, 8>* to) { unfold(n, s, x, to); }

// The same where windows of 3 x 3 keep the size of the image, as most do. A thread reads what lies under eight adjacent
// windows once, and writes it to all nine places.
KERNEL(unfold_3x3_f16, unsigned n, Slide s, const float* x, Some<fp16, 8>* to) {
    EACH(i, n) {
        unsigned per_row = s.w / 8, column = i % per_row, row = i / per_row % s.h, plane = i / per_row / s.h;
        size_t area = per_row * s.h, own = 9 * plane * area + row * per_row + column;
        unsigned wide = s.w >> s.halvings, read = 8 >> s.halvings;
        for (unsigned ky = 0; ky < 3; ++ky) {
            unsigned y = row + ky - 1;
            float line[10] = {};
            if (y < s.h) {
                const float* from = x + ((size_t)plane * (s.h >> s.halvings) + (y >> s.halvings)) * wide + column * read;
                Four<float> four = *(const Four<float>*)from;
                if (s.halvings) {
                    for (unsigned e = 0; e < 8; ++e) line[1 + e] = four.of[e / 2];
                } else {
                    for (unsigned e = 0; e < 4; ++e) line[1 + e] = four.of[e];
                    four = *(const Four<float>*)(from + 4);
                    for (unsigned e = 0; e < 4; ++e) line[5 + e] = four.of[e];
                }
                if (column > 0) line[0] = from[-1];
                if (column + 1 < per_row) line[9] = from[read];
            }
            fp16 rounded[10];
            for (unsigned e = 0; e < 10; ++e) put(rounded[e], line[e]);
            for (unsigned kx = 0; kx < 3; ++kx) {
                Some<fp16, 8> all;
                for (unsigned e = 0; e < 8; ++e) all.of[e] = rounded[e + kx];
                to[own + (3 * ky + kx) * area] = all;
            }
        }
    }
}

// Adds to images (b, o, area) a number for each of o and, where there is one, a residual of their size.
template <unsigned N>
__device__ void plus(unsigned n, unsigned area, unsigned o, const float* bias, const Some<float, N>* residual,
                     Some<float, N>* to) {
    EACH(i, n) {
        float b = bias[i / (area / N) % o];
        Some<float, N> y = to[i], r = {};
        if (residual) r = residual[i];
        for (unsigned e = 0; e < N; ++e) y.of[e] += b + r.of[e];
        to[i] = y;
    }
}
KERNEL(plus_one, unsigned n, unsigned area, unsigned o, const float* bias, const Some<float, 1>* residual,
       Some<float, 1>* to) {
    plus(n, area, o, bias, residual, to);
}
KERNEL(plus_four, unsigned n, unsigned area, unsigned o, const float* bias, const Some<float, 4>* residual,
       Some<float, 4>* to) {
    plus(n, area, o, bias, residual, to);
}

// Adjoint: each pixel gathers what lies over it.
KERNEL(fold, unsigned n, Slide s, const float* g, float* to) {
    EACH(i, n) {
        unsigned x = i % s.w, y = i / s.w % s.h, plane = i / (s.w * s.h), area = s.oh * s.ow;
        const float* from = g + (size_t)plane * s.kh * s.kw * area;
        float sum = 0.0f;
        for (unsigned dy = 0; dy < s.kh; ++dy) {
            unsigned v = y + s.ph - dy;
            if (y + s.ph < dy || v % s.stride || v / s.stride >= s.oh) continue;
            for (unsigned dx = 0; dx < s.kw; ++dx) {
                unsigned u = x + s.pw - dx;
                if (x + s.pw < dx || u % s.stride || u / s.stride >= s.ow) continue;
                sum += from[(dy * s.kw + dx) * area + v / s.stride * s.ow + u / s.stride];
            }
        }
        to[i] = sum;
    }
}

// The first of the greatest pixels under a window, row by row: its place in the image, and its value.
__device__ inline unsigned top_of(const Slide& s, const float* image, unsigned window, float& top) {
    unsigned place = 0;
    bool some = false;
    for (unsigned at = 0; at < s.kh * s.kw; ++at) {
        int y = (int)(window / s.ow * s.stride + at / s.kw) - (int)s.ph;
        int x = (int)(window % s.ow * s.stride + at % s.kw) - (int)s.pw;
        if (y < 0 || y >= (int)s.h || x < 0 || x >= (int)s.w) continue;
        float value = image[(size_t)y * s.w + x];
        if (!some || value > top) {
            top = value;
            place = y * s.w + x;
            some = true;
        }
    }
    return place;
}

KERNEL(max_pool, unsigned n, Slide s, const float* x, float* to) {
    EACH(i, n) {
        unsigned area = s.oh * s.ow;
        float top = lowest();
        top_of(s, x + (size_t)(i / area) * s.h * s.w, i % area, top);
        to[i] = top;
    }
}

KERNEL(max_pool_backward, unsigned n, Slide s, const float* x, const float* g, float* to) {
    EACH(i, n) {
        unsigned plane = i / (s.h * s.w), place = i % (s.h * s.w), u = place % s.w + s.pw, v = place / s.w + s.ph;
        const float* image = x + (size_t)plane * s.h * s.w;
        float sum = 0.0f;
        for (unsigned dy = 0; dy < s.kh; ++dy) {
            if (v < dy || (v - dy) % s.stride || (v - dy) / s.stride >= s.oh) continue;
            for (unsigned dx = 0; dx < s.kw; ++dx) {
                if (u < dx || (u - dx) % s.stride || (u - dx) / s.stride >= s.ow) continue;
                unsigned window = (v - dy) / s.stride * s.ow + (u - dx) / s.stride;
                float top = lowest();
                if (top_of(s, image, window, top) == place) sum += g[(size_t)plane * s.oh * s.ow + window];
            }
        }
        to[i] = sum;
    }
}

// ---- attention ---------------------------------------------------------------------------------------------------

// Steps of (b, l, h) in a tensor whose last dimension is dense, and of (b, h, lq, lk) in a bias.
struct Steps {
    long long s[4];
};

// x (b, l, h, 2 half) -> the same, row-major.
KERNEL(rope, unsigned n, unsigned l, unsigned h, unsigned half, Steps from, const float* x, const float* cosines,
       const float* sines, float* to) {
    EACH(i, n) {
        unsigned pair = i % half, head = i / half % h, at = i / half / h % l, b = i / half / h / l;
        const float* from_pair = x + b * from.s[0] + at * from.s[1] + head * from.s[2] + 2 * pair;
        float c = cosines[at * half + pair], s = sines[at * half + pair], re = from_pair[0], im = from_pair[1];
        to[2 * (size_t)i] = re * c - im * s;
        to[2 * (size_t)i + 1] = re * s + im * c;
    }
}

// What a step of a generation does with its positions (b, l, h, 2 half): queries turn, keys turn into their cache, values
// go into theirs.
template <class T>
__device__ void rope_cached(unsigned n, unsigned l, unsigned h, unsigned half, Steps qs, Steps ks, Steps vs, Steps keys,
                            Steps values, const float* q, const float* k, const float* v, const float* cosines,
                            const float* sines, float* to, T* key, T* value) {
    EACH(i, n) {
        unsigned pair = i % half, head = i / half % h, at = i / half / h % l, b = i / half / h / l, e = 2 * pair;
        float c = cosines[at * half + pair], s = sines[at * half + pair];
        const float* own = q + b * qs.s[0] + at * qs.s[1] + head * qs.s[2] + e;
        to[2 * (size_t)i] = own[0] * c - own[1] * s;
        to[2 * (size_t)i + 1] = own[0] * s + own[1] * c;
        own = k + b * ks.s[0] + at * ks.s[1] + head * ks.s[2] + e;
        T* cached = key + b * keys.s[0] + at * keys.s[1] + head * keys.s[2] + e;
        put(cached[0], own[0] * c - own[1] * s);
        put(cached[1], own[0] * s + own[1] * c);
        own = v + b * vs.s[0] + at * vs.s[1] + head * vs.s[2] + e;
        cached = value + b * values.s[0] + at * values.s[1] + head * values.s[2] + e;
        put(cached[0], own[0]);
        put(cached[1], own[1]);
    }
}
KERNEL(rope_cached_f32, unsigned n, unsigned l, unsigned h, unsigned half, Steps qs, Steps ks, Steps vs, Steps keys,
       Steps values, const float* q, const float* k, const float* v, const float* cosines, const float* sines, float* to,
       float* key, float* value) {
    rope_cached(n, l, h, half, qs, ks, vs, keys, values, q, k, v, cosines, sines, to, key, value);
}
KERNEL(rope_cached_bf16, unsigned n, unsigned l, unsigned h, unsigned half, Steps qs, Steps ks, Steps vs, Steps keys,
       Steps values, const float* q, const float* k, const float* v, const float* cosines, const float* sines, float* to,
       bf16* key, bf16* value) {
    rope_cached(n, l, h, half, qs, ks, vs, keys, values, q, k, v, cosines, sines, to, key, value);
}

// Scores (rows = b h lq, span) to weights: scaled, masked, softmax over lk of them, zeros behind. `causal` or a bias or
// neither. A warp per row: most rows are short.
template <class T>
__device__ void weights(unsigned rows, unsigned h, unsigned lq, unsigned lk, unsigned span, float scale, int causal,
                        Steps steps, const float* bias, const float* scores, T* to) {
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    size_t at = (size_t)row * span;
    unsigned q = row % lq, head = row / lq % h, b = row / lq / h;
    unsigned seen = causal ? lk - lq + q + 1 : lk;
    const float* own = bias ? bias + b * steps.s[0] + head * steps.s[1] + q * steps.s[2] : bias;
    float top = lowest(), sum = 0.0f;
    for (unsigned i = lane; i < seen; i += 32) {
        top = Max::of(top, scale * scores[at + i] + (own ? own[i * steps.s[3]] : 0.0f));
    }
    top = across<Max>(top);
    for (unsigned i = lane; i < seen; i += 32) {
        sum += expf(scale * scores[at + i] + (own ? own[i * steps.s[3]] : 0.0f) - top);
    }
    float share = 1.0f / across<Add>(sum);
    for (unsigned i = lane; i < span; i += 32) {
        float p = 0.0f;
        if (i < seen) p = share * expf(scale * scores[at + i] + (own ? own[i * steps.s[3]] : 0.0f) - top);
        put(to[at + i], p);
    }
}
KERNEL(weights_f32, unsigned rows, unsigned h, unsigned lq, unsigned lk, unsigned span, float scale, int causal,
       Steps steps, const float* bias, const float* scores, float* to) {
    weights(rows, h, lq, lk, span, scale, causal, steps, bias, scores, to);
}
KERNEL(weights_bf16, unsigned rows, unsigned h, unsigned lq, unsigned lk, unsigned span, float scale, int causal,
       Steps steps, const float* bias, const float* scores, bf16* to) {
    weights(rows, h, lq, lk, span, scale, causal, steps, bias, scores, to);
}

// Gradients for the scores, given those for the weights; a warp per row.
template <class T>
__device__ void weights_backward(unsigned rows, unsigned span, float scale, const float* p, const float* g, T* to) {
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    size_t at = (size_t)row * span;
    float along = 0.0f;
    for (unsigned i = lane; i < span; i += 32) along += p[at + i] * g[at + i];
    along = across<Add>(along);
    for (unsigned i = lane; i < span; i += 32) put(to[at + i], scale * p[at + i] * (g[at + i] - along));
}
KERNEL(weights_backward_f32, unsigned rows, unsigned span, float scale, const float* p, const float* g, float* to) {
    weights_backward(rows, span, scale, p, g, to);
}
KERNEL(weights_backward_bf16, unsigned rows, unsigned span, float scale, const float* p, const float* g, bf16* to) {
    weights_backward(rows, span, scale, p, g, to);
}

// A few queries (b, lq, h, d) against many keys, without scores in memory: what a step with a cache of keys and values
// does. A block per query and head; its scores, the query and the partial sums lie in shared memory: lk + d + BLOCK floats.
template <class T>
__device__ void attend(unsigned h, unsigned lq, unsigned lk, unsigned d, float scale, int causal, Steps qs, Steps ks,
                       Steps vs, Steps steps, const float* bias, const float* q, const T* k, const T* v, T* to) {
    DYNAMIC_SHARED(shared);
    float *scores = shared, *query = shared + lk, *sums = query + d;
    unsigned head = blockIdx.x % h, at = blockIdx.x / h % lq, b = blockIdx.x / h / lq;
    unsigned seen = causal ? lk - lq + at + 1 : lk, lane = threadIdx.x % 32;
    q += b * qs.s[0] + at * qs.s[1] + head * qs.s[2];
    k += b * ks.s[0] + head * ks.s[2];
    v += b * vs.s[0] + head * vs.s[2];
    if (bias) bias += b * steps.s[0] + head * steps.s[1] + at * steps.s[2];
    // Rounded as the keys are.
    ALONG(e, d) {
        T rounded;
        put(rounded, q[e]);
        query[e] = wide(rounded);
    }
    __syncthreads();
    // A warp per key.
    float top = lowest();
    for (unsigned i = threadIdx.x / 32; i < seen; i += WARPS) {
        float along = 0.0f;
        for (unsigned e = lane; e < d; e += 32) along += query[e] * wide(k[i * ks.s[1] + e]);
        along = scale * across<Add>(along) + (bias ? bias[i * steps.s[3]] : 0.0f);
        if (lane == 0) scores[i] = along;
        top = Max::of(top, along);
    }
    top = greatest(top);
    float sum = 0.0f;
    ALONG(i, seen) {
        float p = expf(scores[i] - top);
        sum += p;
        scores[i] = p;
    }
    float share = 1.0f / total(sum);
    // As many threads per coordinate as there are.
    for (unsigned begin = 0; begin < d; begin += BLOCK) {
        unsigned width = d - begin < BLOCK ? d - begin : BLOCK, teams = BLOCK / width;
        unsigned team = threadIdx.x / width, e = begin + threadIdx.x % width;
        float along = 0.0f;
        if (team < teams) {
            for (unsigned i = team; i < seen; i += teams) along += scores[i] * wide(v[i * vs.s[1] + e]);
        }
        __syncthreads();
        sums[threadIdx.x] = along;
        __syncthreads();
        if (team == 0) {
            for (unsigned t = 1; t < teams; ++t) along += sums[t * width + threadIdx.x];
            put(to[(size_t)blockIdx.x * d + e], share * along);
        }
    }
}
KERNEL(attend_f32, unsigned h, unsigned lq, unsigned lk, unsigned d, float scale, int causal, Steps qs, Steps ks, Steps vs,
       Steps steps, const float* bias, const float* q, const float* k, const float* v, float* to) {
    attend(h, lq, lk, d, scale, causal, qs, ks, vs, steps, bias, q, k, v, to);
}
KERNEL(attend_bf16, unsigned h, unsigned lq, unsigned lk, unsigned d, float scale, int causal, Steps qs, Steps ks, Steps vs,
       Steps steps, const float* bias, const float* q, const bf16* k, const bf16* v, bf16* to) {
    attend(h, lq, lk, d, scale, causal, qs, ks, vs, steps, bias, q, k, v, to);
}

// ---- optimiser ---------------------------------------------------------------------------------------------------

struct Adamw {
    float beta1, beta2, eps, grad_scale;
    float root;   // 1 / sqrt(correction2)
    float rate;   // lr / correction1
    float keep;   // 1 - lr weight_decay
};

KERNEL(adamw, unsigned n, Adamw s, float* p, float* m, float* v, const float* g) {
    EACH(i, n) {
        float grad = g[i] * s.grad_scale;
        m[i] = s.beta1 * m[i] + (1.0f - s.beta1) * grad;
        v[i] = s.beta2 * v[i] + (1.0f - s.beta2) * grad * grad;
        p[i] = p[i] * s.keep - s.rate * m[i] / (sqrtf(v[i]) * s.root + s.eps);
    }
}

KERNEL(ema, unsigned n, float decay, float rest, float* average, const float* x) {
    EACH(i, n) average[i] = decay * average[i] + rest * x[i];
}

// ---- choosing codes ----------------------------------------------------------------------------------------------

// Bits that order as the numbers do.
__device__ inline unsigned ordered(float x) {
    unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Weights as whole numbers, whose sum does not depend on their order.
__device__ inline unsigned long long share_of(float x, float top) {
    return (unsigned long long)(exp((double)(x - top)) * 1099511627776.0);
}

// The value in a row at which the sum of weights, from the greatest down, first is over `target`, as ordered bits; and the
// sum of those above it. Eight bits of it at a time. Values below `least` weigh nothing; each weighs 1 if `count`.
__device__ inline unsigned descend(unsigned k, const float* row, bool count, float top, unsigned least,
                                   unsigned long long target, unsigned long long* buckets, unsigned long long& above) {
    unsigned found = 0, known = 0;
    above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        ALONG(i, 256) buckets[i] = 0;
        __syncthreads();
        ALONG(i, k) {
            unsigned bits = ordered(row[i]);
            if ((bits & known) != found || bits < least) continue;
            atomicAdd(&buckets[(bits >> shift) & 255u], count ? 1ull : share_of(row[i], top));
        }
        __syncthreads();
        unsigned bucket = 255;
        while (bucket > 0 && above + buckets[bucket] <= target) above += buckets[bucket--];
        found |= bucket << shift;
        known |= 255u << shift;
        __syncthreads();
    }
    return found;
}

// Logits over the temperature, -inf where a code is excluded: below the `keep` greatest, and of these below those that
// together have `share` of the probability. Equals stay in the order of their indices.
KERNEL(truncate, unsigned k, float temperature, unsigned keep, double share, const float* x, float* to) {
    __shared__ unsigned long long buckets[256];
    __shared__ unsigned counts[WARPS];
    const float* from = x + (size_t)blockIdx.x * k;
    float *row = to + (size_t)blockIdx.x * k, top = lowest();
    ALONG(i, k) {
        row[i] = from[i] / temperature;
        top = Max::of(top, row[i]);
    }
    top = greatest(top);
    if (keep >= k && share >= 1.0) return;
    unsigned long long above;
    unsigned last = descend(k, row, true, top, 0, keep - 1, buckets, above);
    unsigned equals = keep - (unsigned)above;
    if (share < 1.0) {
        unsigned long long sum = 0;
        ALONG(i, k) if (ordered(row[i]) > last) sum += share_of(row[i], top);
        sum = together<Add>(sum, 0ull);
        float value = last & 0x80000000u ? __uint_as_float(last & 0x7fffffffu) : __uint_as_float(~last);
        sum += equals * share_of(value, top);
        unsigned long long target = (unsigned long long)(share * (double)sum);
        unsigned cut = descend(k, row, false, top, last, target, buckets, above);
        unsigned most = cut == last ? equals : k;
        value = cut & 0x80000000u ? __uint_as_float(cut & 0x7fffffffu) : __uint_as_float(~cut);
        unsigned long long each = share_of(value, top);
        unsigned long long needed = each ? (target - above) / each + 1 : most;
        last = cut;
        equals = needed < most ? (unsigned)needed : most;
    }
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, seen = 0;
    for (unsigned start = 0; start < k; start += BLOCK) {
        unsigned i = start + threadIdx.x, bits = i < k ? ordered(row[i]) : 0;
        bool equal = i < k && bits == last;
        unsigned votes = __ballot_sync(0xffffffffu, equal);
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        unsigned rank = seen + __popc(votes & ((1u << lane) - 1u));
        for (unsigned w = 0; w < WARPS; ++w) {
            if (w < warp) rank += counts[w];
            seen += counts[w];
        }
        if (i < k && (bits < last || (equal && rank >= equals))) row[i] = lowest();
        __syncthreads();
    }
}

// The code at which the cumulative probability of a row passes a number in [0, 1). Each thread adds up a part of its own.
KERNEL(categorical, unsigned k, const float* x, const double* uniforms, unsigned* ids) {
    __shared__ double sums[BLOCK];
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest();
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    unsigned part = (k + BLOCK - 1) / BLOCK, begin = threadIdx.x * part, end = begin + part < k ? begin + part : k;
    double own = 0.0;
    unsigned last = 0;
    for (unsigned i = begin; i < end; ++i) {
        double w = exp((double)(row[i] - top));
        if (w > 0.0) last = i;
        own += w;
    }
    sums[threadIdx.x] = own;
    __syncthreads();
    double before = 0.0, all = 0.0;
    for (unsigned t = 0; t < BLOCK; ++t) {
        if (t == threadIdx.x) before = all;
        all += sums[t];
    }
    double left = uniforms[blockIdx.x] * all - before;
    unsigned found = k;
    if (left >= 0.0 && left < own) {
        for (unsigned i = begin; i < end && found == k; ++i) {
            left -= exp((double)(row[i] - top));
            if (left < 0.0) found = i;
        }
    }
    found = together<Min>(found, k);
    last = together<Max>(last, 0u);
    if (threadIdx.x == 0) ids[blockIdx.x] = found < k ? found : last;
}

// The numbers of the flow map: evaluations, how far below the leader a code is dropped, and the probability of the others
// at which a token is decided.
struct Flow {
    int points;
    float dropped;
    float undecided;
};

// Slopes that a step goes by, and what stands in the table of steps for each: s, then for each slope in its place its weight
// in z, then in where the next step evaluates.
constexpr int KEPT = 5, ROW = 1 + 2 * KEPT;

// The table of steps for a codebook (d, k), from that for a spread of 1: all of it goes by the inverse of the spread, the
// root mean square deviation of a coordinate. One block.
KERNEL(spread_steps, unsigned k, unsigned d, unsigned n, const float* codes, const float* unit, float* to) {
    double mean_square = 0.0, square_of_mean = 0.0;
    for (unsigned e = 0; e < d; ++e) {
        double sum = 0.0, squares = 0.0;
        ALONG(i, k) {
            double c = codes[(size_t)e * k + i];
            sum += c;
            squares += c * c;
        }
        double mean = together<Add>(sum, 0.0) / k;
        mean_square += together<Add>(squares, 0.0) / k;
        square_of_mean += mean * mean;
    }
    double spread = sqrt((mean_square - square_of_mean) / d);
    // Rounding leaves something of equal codes.
    float scale = spread > 1e-4 * sqrt(mean_square / d) && spread < 1e30 ? (float)(1.0 / spread) : 1.0f;
    ALONG(i, n) to[i] = unit[i] * scale;
}

// A token's state.
template <int D> struct Token {
    float z[D];
    float ahead[D];
    float slopes[KEPT][D];
    float sums[D][WARPS];
    unsigned counts[WARPS];
};

// dz/ds ahead into a slope, with the greatest log weight and the sum of the weights relative to it. `list` are the
// codes that are left, or null for all. Each thread sums relative to its own greatest weight.
template <int D>
__device__ void velocity(Token<D>& t, unsigned k, unsigned count, const unsigned* list, const float* codes,
                         const float* logits, float s, int slope, float* kept, float& top, float& sum) {
    float sums[D];
    for (int e = 0; e < D; ++e) sums[e] = 0.0f;
    top = lowest();
    sum = 0.0f;
    ALONG(i, count) {
        unsigned j = list ? list[i] : i;
        float c[D], along = 0.0f, square = 0.0f;
#pragma unroll
        for (int e = 0; e < D; ++e) {
            c[e] = codes[(size_t)e * k + j];
            along += c[e] * t.ahead[e];
            square += c[e] * c[e];
        }
        float w = logits[j] + s * (along - 0.5f * s * square);
        kept[i] = w;
        if (w == lowest()) continue;
        if (w > top) {
            float scale = expf(top - w);
            sum *= scale;
#pragma unroll
            for (int e = 0; e < D; ++e) sums[e] *= scale;
            top = w;
        }
        w = expf(w - top);
        sum += w;
#pragma unroll
        for (int e = 0; e < D; ++e) sums[e] += w * c[e];
    }
    float own = top;
    top = greatest(top);
    float scale = own == lowest() ? 0.0f : expf(own - top);
    sum = total(scale * sum);
#pragma unroll
    for (int e = 0; e < D; ++e) {
        float x = across<Add>(scale * sums[e]);
        if (threadIdx.x % 32 == 0) t.sums[e][threadIdx.x / 32] = x;
    }
    __syncthreads();
    ALONG(e, D) {
        float x = 0.0f;
        for (int w = 0; w < WARPS; ++w) x += t.sums[e][w];
        t.slopes[slope][e] = x / sum;
    }
    __syncthreads();
}

// Where in the list the leading code is.
__device__ inline unsigned leader(unsigned count, const float* kept, float top) {
    unsigned at = count;
    ALONG(i, count) if (kept[i] == top && i < at) at = i;
    at = together<Min>(at, count);
    return at < count ? at : 0;
}

// The probability that may ever go to other codes than the leading one. While z moves along the leader's code c, its lead
// over another is a parabola in s; with a, the difference of the codes, the lead falls by at most slope^2 / (2 |a|^2).
template <int D>
__device__ float others(const Token<D>& t, unsigned k, unsigned count, const unsigned* list, const float* codes, float s,
                        const float* kept, float top, unsigned lead) {
    unsigned own = list ? list[lead] : lead;
    float rest = 0.0f;
    ALONG(i, count) {
        unsigned j = list ? list[i] : i;
        if (j == own) continue;
        float along = 0.0f, with = 0.0f, square = 0.0f, longer = 0.0f;
#pragma unroll
        for (int e = 0; e < D; ++e) {
            float ci = codes[(size_t)e * k + own], cj = codes[(size_t)e * k + j], a = ci - cj;
            along += t.ahead[e] * a;
            with += ci * a;
            square += a * a;
            longer += a * (ci + cj);
        }
        float slope = along + s * (with - longer);
        float fall = slope < 0.0f ? slope : 0.0f;
        rest += expf(kept[i] - top + 0.5f * fall * fall / (square + 1.17549435e-38f));
    }
    return total(rest);
}

// Leaves those codes in the list whose log weight is above `least`, in order.
__device__ inline unsigned shorten(unsigned* counts, unsigned count, unsigned* list, bool all, const float* kept, float least) {
    unsigned done = 0, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (unsigned start = 0; start < count; start += BLOCK) {
        unsigned i = start + threadIdx.x;
        bool stays = i < count && kept[i] > least;
        unsigned j = i < count && !all ? list[i] : i;
        unsigned votes = __ballot_sync(0xffffffffu, stays);
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        unsigned at = done + __popc(votes & ((1u << lane) - 1u));
        for (unsigned w = 0; w < WARPS; ++w) {
            if (w < warp) at += counts[w];
            done += counts[w];
        }
        if (stays) list[at] = j;
        __syncthreads();
    }
    return done;
}

// The AR flow map (the engine's `flow.rs` has the mathematics) of one token: the Adams method of `steps`, a ROW each. codes
// (D, k). `kept` and `list` (n, k) are working memory. A token that is decided ends; codes that no longer matter go.
template <int D>
__device__ void flow(unsigned k, Flow f, const float* logits, const float* noise, const float* codes, const float* steps,
                     float* kept, unsigned* list, unsigned* ids) {
    __shared__ Token<D> t;
    logits += (size_t)blockIdx.x * k;
    kept += (size_t)blockIdx.x * k;
    list += (size_t)blockIdx.x * k;
    ALONG(e, D) {
        t.z[e] = t.ahead[e] = noise[(size_t)blockIdx.x * D + e];
        for (int slope = 0; slope < KEPT; ++slope) t.slopes[slope][e] = 0.0f;
    }
    __syncthreads();
    unsigned count = k, found = 0;
    bool all = true;
    for (int step = 0;; ++step) {
        const float* row = steps + step * ROW;
        float s = row[0], top, sum;
        velocity<D>(t, k, count, all ? nullptr : list, codes, logits, s, step % KEPT, kept, top, sum);
        unsigned left = 0;
        ALONG(i, count) left += kept[i] > top - f.dropped ? 1u : 0u;
        left = together<Add>(left, 0u);
        unsigned lead = leader(count, kept, top);
        found = all ? lead : list[lead];
        if (step + 1 == f.points || left <= 1) break;
        if (sum - 1.0f <= f.undecided &&
            others<D>(t, k, count, all ? nullptr : list, codes, s, kept, top, lead) <= f.undecided)
            break;
        if (2 * left <= count) {
            __syncthreads();
            count = shorten(t.counts, count, list, all, kept, top - f.dropped);
            all = false;
        }
        ALONG(e, D) {
            float z = t.z[e], ahead = z;
            for (int slope = 0; slope < KEPT; ++slope) {
                z += row[1 + slope] * t.slopes[slope][e];
                ahead += row[1 + KEPT + slope] * t.slopes[slope][e];
            }
            t.z[e] = z;
            t.ahead[e] = ahead;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) ids[blockIdx.x] = found;
}
KERNEL(flow_4, unsigned k, Flow f, const float* logits, const float* noise, const float* codes, const float* steps,
       float* kept, unsigned* list, unsigned* ids) {
    flow<4>(k, f, logits, noise, codes, steps, kept, list, ids);
}
KERNEL(flow_8, unsigned k, Flow f, const float* logits, const float* noise, const float* codes, const float* steps,
       float* kept, unsigned* list, unsigned* ids) {
    flow<8>(k, f, logits, noise, codes, steps, kept, list, ids);
}
KERNEL(flow_16, unsigned k, Flow f, const float* logits, const float* noise, const float* codes, const float* steps,
       float* kept, unsigned* list, unsigned* ids) {
    flow<16>(k, f, logits, noise, codes, steps, kept, list, ids);
}
KERNEL(flow_32, unsigned k, Flow f, const float* logits, const float* noise, const float* codes, const float* steps,
       float* kept, unsigned* list, unsigned* ids) {
    flow<32>(k, f, logits, noise, codes, steps, kept, list, ids);
}
