// The kernels of the CUDA variant: what candle and cuBLAS do not bring, or not in one launch.
//
// In: row-major arrays of f32 where nothing else is said; sizes and places by value, so that a launch copies nothing to
// the device. A matrix's rows, a query, a token have a block each, and what a block computes does not depend on the
// others, so that results do not depend on batches. Nothing is added up in an order that could change from run to run.
// Deliberately absent: shapes and errors (`launch.rs` checks what it passes). The text is also compiled for the host, where
// tests run it thread by thread (`tests/emulator`): what that emulation lacks may not be used here.

#ifndef EMULATED
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(BLOCK) name(__VA_ARGS__)
// With few enough registers for so many blocks at once on a multiprocessor.
#define KERNEL_AT_ONCE(blocks, name, ...) extern "C" __global__ void __launch_bounds__(BLOCK, blocks) name(__VA_ARGS__)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]
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

// Adjacent elements that a thread reads or writes at once.
template <class T, unsigned N> struct alignas(N * sizeof(T)) Some {
    T of[N];
};

template <unsigned N> __device__ inline Some<float, N> load(const float* x) { return *(const Some<float, N>*)x; }
template <class T, unsigned N> __device__ inline void store(T* to, const Some<float, N>& x) {
    Some<T, N> y;
    for (unsigned e = 0; e < N; ++e) put(y.of[e], x.of[e]);
    *(Some<T, N>*)to = y;
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
        Some<From, 4> x = *(const Some<From, 4>*)(from + a);
        Some<To, 4> y;
        for (int e = 0; e < 4; ++e) put(y.of[e], wide(x.of[e]));
        *(Some<To, 4>*)(to + b) = y;
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

__device__ inline float unary(int f, float x) {
    switch (f) {
        case EXP: return expf(x);
        case LOG: return logf(x);
        case SQRT: return sqrtf(x);
        case SQUARE: return x * x;
        case RECIP: return 1.0f / x;
        case TANH: return tanhf(x);
        case SIGMOID: return sigmoid(x);
        case ERF: return erff(x);
        case SILU: return x * sigmoid(x);
        case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.7978845608f * x * (1.0f + 0.044715f * x * x)));
        case GELU_ERF: return 0.5f * x * (1.0f + erff(0.7071067812f * x));
        default: return x > 0.0f ? x : 0.0f;
    }
}
template <unsigned N, class T> __device__ void unary(unsigned n, int f, const float* from, T* to) {
    EACH(i, n) {
        Some<float, N> x = load<N>(from + (size_t)i * N);
        for (unsigned e = 0; e < N; ++e) x.of[e] = unary(f, x.of[e]);
        store(to + (size_t)i * N, x);
    }
}
KERNEL(unary_f32, unsigned n, int f, const float* from, float* to) { unary<1>(n, f, from, to); }
KERNEL(unary_bf16, unsigned n, int f, const float* from, bf16* to) { unary<1>(n, f, from, to); }
KERNEL(unary_four_f32, unsigned n, int f, const float* from, float* to) { unary<4>(n, f, from, to); }
KERNEL(unary_four_bf16, unsigned n, int f, const float* from, bf16* to) { unary<4>(n, f, from, to); }

// From the argument, the result and the gradient of the result.
__device__ inline float unary_slope(int f, float x, float y) {
    float d;
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
    return d;
}
template <unsigned N>
__device__ void unary_backward(unsigned n, int f, const float* xs, const float* ys, const float* gs, float* to) {
    EACH(i, n) {
        size_t place = (size_t)i * N;
        Some<float, N> x = load<N>(xs + place), y = load<N>(ys + place), g = load<N>(gs + place);
        for (unsigned e = 0; e < N; ++e) g.of[e] *= unary_slope(f, x.of[e], y.of[e]);
        store(to + place, g);
    }
}
KERNEL(unary_backward_one, unsigned n, int f, const float* xs, const float* ys, const float* gs, float* to) {
    unary_backward<1>(n, f, xs, ys, gs, to);
}
KERNEL(unary_backward_four, unsigned n, int f, const float* xs, const float* ys, const float* gs, float* to) {
    unary_backward<4>(n, f, xs, ys, gs, to);
}

// In the order of the engine's `Binary`.
enum { ADD, SUB, MUL, DIV, MAX };

__device__ inline float binary(int f, float a, float b) {
    switch (f) {
        case ADD: return a + b;
        case SUB: return a - b;
        case MUL: return a * b;
        case DIV: return a / b;
        default: return a > b ? a : b;
    }
}
// Places of elements, or of four at a time.
template <unsigned N>
__device__ void binary(unsigned n, int f, const Places& p, const float* as, const float* bs, float* to) {
    EACH(i, n) {
        long long i_a, i_b;
        both(p, i, i_a, i_b);
        Some<float, N> a = load<N>(as + i_a), b = load<N>(bs + i_b);
        for (unsigned e = 0; e < N; ++e) a.of[e] = binary(f, a.of[e], b.of[e]);
        store(to + (size_t)i * N, a);
    }
}
KERNEL(binary_one, unsigned n, int f, Places p, const float* as, const float* bs, float* to) {
    binary<1>(n, f, p, as, bs, to);
}
KERNEL(binary_four, unsigned n, int f, Places p, const float* as, const float* bs, float* to) {
    binary<4>(n, f, p, as, bs, to);
}

// x + y gate (+ added) for rows of `row` = l c elements with a gate (c) each; nothing is added where `added` is null.
template <unsigned N>
__device__ void gated_add(unsigned n, unsigned row, unsigned c, const float* xs, const float* ys, const float* gates,
                          const float* added, float* to) {
    EACH(i, n) {
        unsigned place = i * N;
        Some<float, N> x = load<N>(xs + place), y = load<N>(ys + place), gate = load<N>(gates + place / row * c + place % c);
        for (unsigned e = 0; e < N; ++e) x.of[e] += y.of[e] * gate.of[e];
        if (added) {
            y = load<N>(added + place);
            for (unsigned e = 0; e < N; ++e) x.of[e] += y.of[e];
        }
        store(to + place, x);
    }
}
KERNEL(gated_add_one, unsigned n, unsigned row, unsigned c, const float* x, const float* y, const float* gate,
       const float* added, float* to) {
    gated_add<1>(n, row, c, x, y, gate, added, to);
}
KERNEL(gated_add_four, unsigned n, unsigned row, unsigned c, const float* x, const float* y, const float* gate,
       const float* added, float* to) {
    gated_add<4>(n, row, c, x, y, gate, added, to);
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

// Columns of `outer` times (rows, columns), `part` rows at a time: -> (outer, parts, columns). With `by`, of the products
// with it.
KERNEL(sum_columns, unsigned outer, unsigned rows, unsigned columns, unsigned part, const float* x, const float* by,
       float* to) {
    unsigned parts = (rows + part - 1) / part;
    EACH(i, outer * parts * columns) {
        unsigned from = i / columns % parts * part, end = from + part < rows ? from + part : rows;
        size_t start = (size_t)(i / columns / parts) * rows * columns + i % columns;
        float sum = 0.0f;
        for (unsigned row = from; row < end; ++row) {
            size_t place = start + (size_t)row * columns;
            sum += by ? x[place] * by[place] : x[place];
        }
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

// A row of at most BLOCK * 32 elements, which its threads hold.
template <unsigned N> struct Row {
    static constexpr unsigned HELD = 32 / N;
    Some<float, N> of[HELD];
};
#define HOLD(k, i, d) \
    _Pragma("unroll") for (unsigned k = 0; k < Row<N>::HELD; ++k) \
        if (unsigned i = (k * BLOCK + threadIdx.x) * N; i < (d))

// The row's moments, and the row less its mean over its deviation.
template <unsigned N> __device__ void standardise(unsigned d, float eps, Row<N>& row, float& mean, float& r) {
    float sum = 0.0f, square = 0.0f;
    HOLD(k, i, d) for (unsigned e = 0; e < N; ++e) sum += row.of[k].of[e];
    mean = total(sum) / d;
    HOLD(k, i, d) for (unsigned e = 0; e < N; ++e) square += (row.of[k].of[e] - mean) * (row.of[k].of[e] - mean);
    r = 1.0f / sqrtf(total(square) / d + eps);
    HOLD(k, i, d) for (unsigned e = 0; e < N; ++e) row.of[k].of[e] = (row.of[k].of[e] - mean) * r;
}

// Layer norm of rows (b l, d), times the scale plus the shift of the row's sequence, (b, d) each.
template <unsigned N, class T>
__device__ void modulated_norm(unsigned l, unsigned d, float eps, const float* x, const float* scale, const float* shift,
                               T* to) {
    size_t first = (size_t)blockIdx.x * d, own = (size_t)(blockIdx.x / l) * d;
    Row<N> row;
    float mean, r;
    HOLD(k, i, d) row.of[k] = load<N>(x + first + i);
    standardise(d, eps, row, mean, r);
    HOLD(k, i, d) {
        Some<float, N> times = load<N>(scale + own + i), plus = load<N>(shift + own + i);
        for (unsigned e = 0; e < N; ++e) row.of[k].of[e] = row.of[k].of[e] * times.of[e] + plus.of[e];
        store(to + first + i, row.of[k]);
    }
}
#define MODULATED_NORM(name, N, T)                                                                                   \
    KERNEL(modulated_norm_##name, unsigned l, unsigned d, float eps, const float* x, const float* scale,             \
           const float* shift, T* to) {                                                                              \
        modulated_norm<N>(l, d, eps, x, scale, shift, to);                                                           \
    }
MODULATED_NORM(one_f32, 1, float)
MODULATED_NORM(one_bf16, 1, bf16)
MODULATED_NORM(four_f32, 4, float)
MODULATED_NORM(four_bf16, 4, bf16)

// Gradient for x; and the mean and the reciprocal of the deviation of each row.
template <unsigned N>
__device__ void modulated_norm_backward(unsigned l, unsigned d, float eps, const float* x, const float* scale,
                                        const float* g, float* dx, float* moments) {
    size_t first = (size_t)blockIdx.x * d, own = (size_t)(blockIdx.x / l) * d;
    Row<N> row, grad;
    float mean, r, sum = 0.0f, along = 0.0f;
    HOLD(k, i, d) row.of[k] = load<N>(x + first + i);
    standardise(d, eps, row, mean, r);
    HOLD(k, i, d) {
        Some<float, N> times = load<N>(scale + own + i);
        grad.of[k] = load<N>(g + first + i);
        for (unsigned e = 0; e < N; ++e) {
            grad.of[k].of[e] *= times.of[e];
            sum += grad.of[k].of[e];
            along += grad.of[k].of[e] * row.of[k].of[e];
        }
    }
    sum = total(sum) / d;
    along = total(along) / d;
    HOLD(k, i, d) {
        for (unsigned e = 0; e < N; ++e) row.of[k].of[e] = r * (grad.of[k].of[e] - sum - row.of[k].of[e] * along);
        store(dx + first + i, row.of[k]);
    }
    if (threadIdx.x == 0) {
        moments[2 * (size_t)blockIdx.x] = mean;
        moments[2 * (size_t)blockIdx.x + 1] = r;
    }
}
KERNEL(modulated_norm_backward_one, unsigned l, unsigned d, float eps, const float* x, const float* scale, const float* g,
       float* dx, float* moments) {
    modulated_norm_backward<1>(l, d, eps, x, scale, g, dx, moments);
}
KERNEL(modulated_norm_backward_four, unsigned l, unsigned d, float eps, const float* x, const float* scale, const float* g,
       float* dx, float* moments) {
    modulated_norm_backward<4>(l, d, eps, x, scale, g, dx, moments);
}

// What `part` rows of each of b sequences (l, d) add to the gradients of their scale and shift: -> (2, b, parts, d).
KERNEL(sum_modulation, unsigned b, unsigned l, unsigned d, unsigned part, const float* x, const float* g,
       const float* moments, float* to) {
    unsigned parts = (l + part - 1) / part, all = b * parts * d;
    EACH(i, all) {
        unsigned from = i / d % parts * part, end = from + part < l ? from + part : l, sequence = i / d / parts;
        float scale = 0.0f, shift = 0.0f;
        for (unsigned at = from; at < end; ++at) {
            size_t row = (size_t)sequence * l + at, place = row * d + i % d;
            scale += g[place] * (x[place] - moments[2 * row]) * moments[2 * row + 1];
            shift += g[place];
        }
        to[i] = scale;
        to[all + i] = shift;
    }
}

// Rows (n h, d) over their lengths, times a length per head where there are lengths; a warp each. A row of zeros stays so.
template <class T> __device__ void unit(unsigned rows, unsigned h, unsigned d, const float* x, const float* length, T* to) {
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    size_t first = (size_t)row * d;
    float square = 0.0f;
    for (unsigned i = lane; i < d; i += 32) square += x[first + i] * x[first + i];
    float r = (length ? length[row % h] : 1.0f) / sqrtf(across<Add>(square) + 1e-24f);
    for (unsigned i = lane; i < d; i += 32) put(to[first + i], x[first + i] * r);
}
KERNEL(unit_f32, unsigned rows, unsigned h, unsigned d, const float* x, const float* length, float* to) {
    unit(rows, h, d, x, length, to);
}
KERNEL(unit_bf16, unsigned rows, unsigned h, unsigned d, const float* x, const float* length, bf16* to) {
    unit(rows, h, d, x, length, to);
}
// `dlength` (n, h): what each row adds to the gradient of its head's length.
KERNEL(unit_backward, unsigned rows, unsigned h, unsigned d, const float* x, const float* length, const float* g, float* dx,
       float* dlength) {
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    size_t first = (size_t)row * d;
    float square = 0.0f, along = 0.0f;
    for (unsigned i = lane; i < d; i += 32) {
        square += x[first + i] * x[first + i];
        along += g[first + i] * x[first + i];
    }
    float r = 1.0f / sqrtf(across<Add>(square) + 1e-24f), by = (length ? length[row % h] : 1.0f) * r;
    along = across<Add>(along) * r;
    for (unsigned i = lane; i < d; i += 32) dx[first + i] = by * (g[first + i] - x[first + i] * r * along);
    if (lane == 0) dlength[row] = along;
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
                Some<float, 4> four = *(const Some<float, 4>*)from;
                if (s.halvings) {
                    for (unsigned e = 0; e < 8; ++e) line[1 + e] = four.of[e / 2];
                } else {
                    for (unsigned e = 0; e < 4; ++e) line[1 + e] = four.of[e];
                    four = *(const Some<float, 4>*)(from + 4);
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
// go into theirs. The first goes to row `place` of the tables and of the caches, or to row 0 where it is null.
template <class T>
__device__ void rope_cached(unsigned n, unsigned l, unsigned h, unsigned half, Steps qs, Steps ks, Steps vs, Steps keys,
                            Steps values, const float* q, const float* k, const float* v, const float* cosines,
                            const float* sines, float* to, T* key, T* value, const unsigned* place) {
    unsigned row = place ? *place : 0;
    EACH(i, n) {
        unsigned pair = i % half, head = i / half % h, at = i / half / h % l, b = i / half / h / l, e = 2 * pair;
        float c = cosines[(row + at) * half + pair], s = sines[(row + at) * half + pair];
        const float* own = q + b * qs.s[0] + at * qs.s[1] + head * qs.s[2] + e;
        to[2 * (size_t)i] = own[0] * c - own[1] * s;
        to[2 * (size_t)i + 1] = own[0] * s + own[1] * c;
        own = k + b * ks.s[0] + at * ks.s[1] + head * ks.s[2] + e;
        T* cached = key + b * keys.s[0] + (row + at) * keys.s[1] + head * keys.s[2] + e;
        put(cached[0], own[0] * c - own[1] * s);
        put(cached[1], own[0] * s + own[1] * c);
        own = v + b * vs.s[0] + at * vs.s[1] + head * vs.s[2] + e;
        cached = value + b * values.s[0] + (row + at) * values.s[1] + head * values.s[2] + e;
        put(cached[0], own[0]);
        put(cached[1], own[1]);
    }
}
KERNEL(rope_cached_f32, unsigned n, unsigned l, unsigned h, unsigned half, Steps qs, Steps ks, Steps vs, Steps keys,
       Steps values, const float* q, const float* k, const float* v, const float* cosines, const float* sines, float* to,
       float* key, float* value, const unsigned* place) {
    rope_cached(n, l, h, half, qs, ks, vs, keys, values, q, k, v, cosines, sines, to, key, value, place);
}
KERNEL(rope_cached_bf16, unsigned n, unsigned l, unsigned h, unsigned half, Steps qs, Steps ks, Steps vs, Steps keys,
       Steps values, const float* q, const float* k, const float* v, const float* cosines, const float* sines, float* to,
       bf16* key, bf16* value, const unsigned* place) {
    rope_cached(n, l, h, half, qs, ks, vs, keys, values, q, k, v, cosines, sines, to, key, value, place);
}

// Scores (rows = b h lq, lk) to weights: scaled, masked, softmax. `causal` or a bias or neither. A warp per row: most rows
// are short.
KERNEL(weights, unsigned rows, unsigned h, unsigned lq, unsigned lk, float scale, int causal, Steps steps,
       const float* bias, const float* scores, float* to) {
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    size_t at = (size_t)row * lk;
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
    for (unsigned i = lane; i < lk; i += 32) {
        float p = 0.0f;
        if (i < seen) p = share * expf(scale * scores[at + i] + (own ? own[i * steps.s[3]] : 0.0f) - top);
        to[at + i] = p;
    }
}

// Gradients for the scores, given those for the weights; a warp per row.
KERNEL(weights_backward, unsigned rows, unsigned lk, float scale, const float* p, const float* g, float* to) {
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    size_t at = (size_t)row * lk;
    float along = 0.0f;
    for (unsigned i = lane; i < lk; i += 32) along += p[at + i] * g[at + i];
    along = across<Add>(along);
    for (unsigned i = lane; i < lk; i += 32) to[at + i] = scale * p[at + i] * (g[at + i] - along);
}

// A few queries (b, lq, h, d) against many keys, without scores in memory: what a step with a cache of keys and values
// does. A block per query and head; its scores, the query and the partial sums lie in shared memory: lk + d + BLOCK floats.
// With a place, a query sees the keys up to that row.
template <class T>
__device__ void attend(unsigned h, unsigned lq, unsigned lk, unsigned d, float scale, int causal, Steps qs, Steps ks,
                       Steps vs, Steps steps, const float* bias, const float* q, const T* k, const T* v, T* to,
                       const unsigned* place) {
    DYNAMIC_SHARED(shared);
    float *scores = shared, *query = shared + lk, *sums = query + d;
    unsigned head = blockIdx.x % h, at = blockIdx.x / h % lq, b = blockIdx.x / h / lq;
    unsigned seen = place ? *place + 1 : causal ? lk - lq + at + 1 : lk, lane = threadIdx.x % 32;
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
       Steps steps, const float* bias, const float* q, const float* k, const float* v, float* to,
       const unsigned* place) {
    attend(h, lq, lk, d, scale, causal, qs, ks, vs, steps, bias, q, k, v, to, place);
}
KERNEL(attend_bf16, unsigned h, unsigned lq, unsigned lk, unsigned d, float scale, int causal, Steps qs, Steps ks, Steps vs,
       Steps steps, const float* bias, const float* q, const bf16* k, const bf16* v, bf16* to,
       const unsigned* place) {
    attend(h, lq, lk, d, scale, causal, qs, ks, vs, steps, bias, q, k, v, to, place);
}

// ---- attention in bf16 -------------------------------------------------------------------------------------------

// Products on tensor cores, with everything between them in registers: scores are never in memory. A block has 128 rows
// that stay (queries, or keys where these get their gradients), 16 for each warp, and goes over the others in tiles. In
// registers are fragments as `mma` takes them: with g = lane / 4 and t = lane % 4, a lane has of 16 rows of sums
// c[0], c[1]: row g, columns 2 t and 2 t + 1; c[2], c[3]: the same of row g + 8.

#ifndef EMULATED
// c (16, 8) += a (16, 16) b (16, 8).
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four matrices (8, 8) from shared memory: of matrix i the rows begin where lanes 8 i to 8 i + 7 say, and a lane gets row g,
// columns 2 t and 2 t + 1; or rows 2 t and 2 t + 1 of column g.
__device__ inline void matrices(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}
__device__ inline void matrices_turned(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}
// Two numbers as bf16, rounded as `put` does, the first in the lower half.
__device__ inline unsigned rounded(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

__device__ inline float low(unsigned both) { return __uint_as_float(both << 16); }
__device__ inline float high(unsigned both) { return __uint_as_float(both & 0xffff0000u); }

// Scores are in units of log 2.
constexpr float LOG2_E = 1.4426950409f;

// Rows that stay in a block, those of a warp, and those of a tile of the others; elements from row to row in shared
// memory, so that eight rows begin in different banks.
constexpr unsigned STAY = 128, GROUP = 16;
template <int D> constexpr unsigned TILE = D > 64 ? 32 : 64;
template <int D> constexpr unsigned LEAD = D + 8;

// A tensor (b, l, h, d) in f32 or bf16 with a dense last dimension.
struct Heads {
    const void* x;
    long long s[3];
    int half;
    int fours;  // whether any four elements from a multiple of four on may be read at once
};

// What sees what. `kinds`: for every 16 queries and 16 keys what `kind` would have to read the bias for; or null.
struct Seen {
    unsigned lq, lk;
    int causal;
    const float* bias;
    Steps steps;
    const unsigned* kinds;
};

// Of 16 queries and 16 keys: no score counts, all do as they are, or it has to be looked at each.
enum { HIDDEN, PLAIN, MIXED };

// Keys that a query sees, the bias aside.
__device__ inline unsigned seen_by(const Seen& m, unsigned query) {
    unsigned seen = m.lk - m.lq + query + 1;
    return m.causal && seen < m.lk ? seen : m.lk;
}

__device__ inline unsigned kind(const Seen& m, unsigned queries, unsigned keys) {
    unsigned q = queries * GROUP, k = keys * GROUP, last = q + GROUP < m.lq ? q + GROUP - 1 : m.lq - 1;
    if (q >= m.lq || k >= seen_by(m, last)) return HIDDEN;
    if (m.kinds) return m.kinds[(size_t)queries * ((m.lk + GROUP - 1) / GROUP) + keys];
    return !m.bias && k + GROUP <= seen_by(m, q) ? PLAIN : MIXED;
}

// The kinds of a bias (lq, lk) for all sequences and heads; a warp for each.
KERNEL(mask_kinds, unsigned n, Seen m, unsigned* to) {
    unsigned own = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (own >= n) return;
    unsigned across = (m.lk + GROUP - 1) / GROUP, q = own / across * GROUP + lane / 16, k = own % across * GROUP + lane % 16;
    bool hidden = true, plain = true;
    for (unsigned end = q + GROUP; q < end && q < m.lq; q += 2) {
        float x = k < m.lk ? m.bias[q * m.steps.s[2] + k * m.steps.s[3]] : lowest();
        hidden = hidden && x == lowest();
        plain = plain && x == 0.0f;
    }
    hidden = __ballot_sync(0xffffffffu, hidden) == 0xffffffffu;
    plain = __ballot_sync(0xffffffffu, plain) == 0xffffffffu;
    if (lane == 0) to[own] = hidden ? HIDDEN : plain ? PLAIN : MIXED;
}

// A tile, and of each warp's 16 rows and each 16 of the tile whether they are hidden or mixed: bits from the first on.
template <int D> struct Tile {
    static constexpr unsigned GROUPS = TILE<D> / GROUP;
    unsigned at, hidden, mixed;

    // The first from `at` on of which something counts. Every warp finds the same.
    __device__ void find(const Seen& m, unsigned part, bool keys_stay, unsigned tiles) {
        unsigned lane = threadIdx.x % 32;
        for (; at < tiles; ++at) {
            unsigned own = part * WARPS + lane / GROUPS, other = at * GROUPS + lane % GROUPS, what = HIDDEN;
            if (lane < WARPS * GROUPS) what = keys_stay ? kind(m, other, own) : kind(m, own, other);
            hidden = __ballot_sync(0xffffffffu, what == HIDDEN);
            mixed = __ballot_sync(0xffffffffu, what == MIXED);
            if (~hidden) break;
        }
        unsigned first = threadIdx.x / 32 * GROUPS;
        hidden = hidden >> first & ((1u << GROUPS) - 1);
        mixed >>= first;
    }
    __device__ bool none() const { return hidden == (1u << GROUPS) - 1; }
};

// Rows of a head on their way into shared memory. An item is four elements of each thread, ROWS rows of all.
template <int D> struct Rows {
    static constexpr unsigned ROWS = BLOCK / (D / 4);
    const Heads& from;
    // Of this thread in the first item: where its elements are, how many, and its row; and how many rows there are for it.
    const char* first;
    unsigned some, row, l;
    // Bytes to the next item.
    long long step;

    __device__ Rows(const Heads& x, unsigned b, unsigned head, unsigned l, unsigned d) : from(x) {
        unsigned e = threadIdx.x % (D / 4) * 4, size = x.half ? sizeof(bf16) : sizeof(float);
        row = threadIdx.x / (D / 4);
        some = e < d ? d - e : 0;
        this->l = some ? l : 0;
        first = (const char*)x.x + (b * x.s[0] + row * x.s[1] + head * x.s[2] + e) * size;
        step = ROWS * x.s[1] * size;
    }

    struct alignas(8) Pairs {
        unsigned of[2];
    };
    __device__ void take(unsigned item, unsigned (&held)[4]) const {
        for (int n = 0; n < 4; ++n) held[n] = 0;
        if (item * ROWS + row >= l) return;
        const char* own = first + item * step;
        if (from.half && from.fours) {
            Pairs pairs = *(const Pairs*)own;
            held[0] = pairs.of[0];
            held[1] = pairs.of[1];
        } else if (from.fours) {
            Some<float, 4> four = *(const Some<float, 4>*)own;
            for (int n = 0; n < 4; ++n) held[n] = __float_as_uint(four.of[n]);
        } else if (from.half) {
            for (unsigned n = 0; n < 4; ++n)
                if (n < some) held[n / 2] |= (unsigned)((const bf16*)own)[n].bits << n % 2 * 16;
        } else {
            for (unsigned n = 0; n < 4; ++n)
                if (n < some) held[n] = __float_as_uint(((const float*)own)[n]);
        }
    }
    // To the item's place in shared memory.
    __device__ void put_down(const unsigned (&held)[4], unsigned item, bf16* tile) const {
        Pairs pairs{{held[0], held[1]}};
        if (!from.half) {
            pairs.of[0] = rounded(__uint_as_float(held[0]), __uint_as_float(held[1]));
            pairs.of[1] = rounded(__uint_as_float(held[2]), __uint_as_float(held[3]));
        }
        *(Pairs*)(tile + (item * ROWS + row) * LEAD<D> + threadIdx.x % (D / 4) * 4) = pairs;
    }

    // All of a tile of COUNT rows.
    template <unsigned COUNT> __device__ void move(unsigned tile, bf16* to) const {
        constexpr unsigned ITEMS = COUNT / ROWS, SOME = ITEMS < 4 ? ITEMS : 4;
        for (unsigned i = 0; i < ITEMS; i += SOME) {
            unsigned held[SOME][4];
#pragma unroll
            for (unsigned n = 0; n < SOME; ++n) take(tile * ITEMS + i + n, held[n]);
#pragma unroll
            for (unsigned n = 0; n < SOME; ++n) put_down(held[n], i + n, to);
        }
    }
    // The rows of this block that stay, as left operands of this warp. Goes through shared memory, which is free after.
    __device__ void stay(unsigned part, bf16* tile, unsigned (&to)[D / 16][4]) const {
        move<STAY>(part, tile);
        __syncthreads();
        unsigned lane = threadIdx.x % 32;
        const bf16* own = tile + (threadIdx.x / 32 * GROUP + lane % 16) * LEAD<D> + lane / 16 * 8;
#pragma unroll
        for (int e = 0; e < D / 16; ++e) matrices(to[e], own + e * 16);
        __syncthreads();
    }
};

// What of a tile is on its way to shared memory while 16 rows of the one before are multiplied.
template <int D> struct Share {
    static constexpr unsigned ITEMS = TILE<D> / Rows<D>::ROWS, GROUPS = TILE<D> / GROUP;
    static constexpr unsigned MOST = (ITEMS + GROUPS - 1) / GROUPS;
    unsigned held[MOST][4] = {};

    __device__ static unsigned begin(unsigned group) { return group * ITEMS / GROUPS; }
    __device__ void take(const Rows<D>& rows, unsigned tile, unsigned group) {
#pragma unroll
        for (unsigned n = 0; n < MOST; ++n)
            if (begin(group) + n < begin(group + 1)) rows.take(tile * ITEMS + begin(group) + n, held[n]);
    }
    __device__ void put_down(const Rows<D>& rows, unsigned group, bf16* to) {
#pragma unroll
        for (unsigned n = 0; n < MOST; ++n)
            if (begin(group) + n < begin(group + 1)) rows.put_down(held[n], begin(group) + n, to);
    }
};

// c (16, 16) = a (16, D) times 16 rows of a tile, transposed.
template <int D> __device__ void along(const unsigned (&a)[D / 16][4], const bf16* rows, float (*c)[4]) {
    unsigned lane = threadIdx.x % 32;
    rows += (lane / 16 * 8 + lane % 8) * LEAD<D> + lane / 8 % 2 * 8;
    for (int i = 0; i < 4; ++i) c[0][i] = c[1][i] = 0.0f;
#pragma unroll
    for (int e = 0; e < D / 16; ++e) {
        unsigned b[4];
        matrices(b, rows + e * 16);
        mma(c[0], a[e], b);
        mma(c[1], a[e], b + 2);
    }
}

// sums (16, D) += p (16, 16) times 16 rows of a tile.
template <int D> __device__ void onto(const float (*p)[4], const bf16* rows, float (&sums)[D / 8][4]) {
    unsigned lane = threadIdx.x % 32;
    rows += lane % 16 * LEAD<D> + lane / 16 * 8;
    unsigned a[4];
    for (int i = 0; i < 4; ++i) a[i] = rounded(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int e = 0; e < D / 16; ++e) {
        unsigned b[4];
        matrices_turned(b, rows + e * 16);
        mma(sums[2 * e], a, b);
        mma(sums[2 * e + 1], a, b + 2);
    }
}

// Scores of 16 rows and 16 others from products: in units of log 2, -inf where a key is not seen.
__device__ inline void scores(const Seen& m, const float* bias, bool mixed, bool keys_stay, float scale, unsigned row,
                              unsigned other, float (*s)[4]) {
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] *= scale;
    if (!mixed) return;
    unsigned lane = threadIdx.x % 32;
    row += lane / 4;
    other += lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        unsigned r = row + i / 2 % 2 * 8, o = other + i / 4 * 8 + i % 2;
        unsigned q = keys_stay ? o : r, k = keys_stay ? r : o;
        // Queries behind the last are nobody's.
        if (q >= m.lq) q = m.lq - 1;
        float& x = s[i / 4][i % 4];
        if (k >= seen_by(m, q)) {
            x = lowest();
        } else if (bias) {
            x += LOG2_E * bias[q * m.steps.s[2] + k * m.steps.s[3]];
        }
    }
}

// Of the four lanes that share a row.
template <class Op> __device__ float of_row(float x) {
    x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return Op::of(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

template <class T> struct alignas(2 * sizeof(T)) Two {
    T of[2];
};

// Sums (16, D) of this warp, times a number for each of both rows, into rows of (b, l, h, d).
template <int D, class T>
__device__ void write(const float (&sums)[D / 8][4], float upper, float lower, unsigned row, unsigned l, unsigned b,
                      unsigned h, unsigned head, unsigned d, T* to) {
    unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        unsigned own = row + lane / 4 + i * 8;
        float factor = i ? lower : upper;
        if (own >= l) continue;
        T* out = to + (((size_t)b * l + own) * h + head) * d;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            unsigned e = n * 8 + lane % 4 * 2;
            Two<T> two;
            put(two.of[0], factor * sums[n][2 * i]);
            put(two.of[1], factor * sums[n][2 * i + 1]);
            if (d % 2 == 0) {
                if (e < d) *(Two<T>*)(out + e) = two;
            } else {
                if (e < d) out[e] = two.of[0];
                if (e + 1 < d) out[e + 1] = two.of[1];
            }
        }
    }
}

template <class T> __device__ inline void swap(T*& a, T*& b) {
    T* before = a;
    a = b;
    b = before;
}

// The place of a block: parts of 128 rows, then heads, then sequences.
struct Place {
    unsigned part, head, b;
    __device__ Place(unsigned l, unsigned h) {
        unsigned parts = (l + STAY - 1) / STAY;
        part = blockIdx.x % parts;
        head = blockIdx.x / parts % h;
        b = blockIdx.x / parts / h;
    }
    // The first row of this warp.
    __device__ unsigned row() const { return part * STAY + threadIdx.x / 32 * GROUP; }
};

// softmax(scale q k^T + mask) v -> (b, lq, h, d)
template <int D>
__device__ void attention(unsigned h, unsigned d, float scale, const Heads& q, const Heads& k, const Heads& v, const Seen& m,
                          bf16* to) {
    constexpr unsigned GROUPS = TILE<D> / GROUP, SIZE = TILE<D> * LEAD<D>;
    DYNAMIC_SHARED(shared);
    bf16 *now = (bf16*)shared, *next = now + 2 * SIZE;
    Place own(m.lq, h);
    const float* bias = m.bias ? m.bias + own.b * m.steps.s[0] + own.head * m.steps.s[1] : nullptr;
    unsigned a[D / 16][4], tiles = (m.lk + TILE<D> - 1) / TILE<D>;
    Rows<D>(q, own.b, own.head, m.lq, d).stay(own.part, now, a);
    Rows<D> keys(k, own.b, own.head, m.lk, d), values(v, own.b, own.head, m.lk, d);
    float sums[D / 8][4] = {}, top[2] = {lowest(), lowest()}, sum[2] = {};
    Tile<D> tile{0, 0, 0};
    tile.find(m, own.part, false, tiles);
    keys.template move<TILE<D>>(tile.at, now);
    values.template move<TILE<D>>(tile.at, now + SIZE);
    __syncthreads();
    scale *= LOG2_E;
    while (tile.at < tiles) {
        Tile<D> then{tile.at + 1, 0, 0};
        then.find(m, own.part, false, tiles);
        float s[2 * GROUPS][4];
#pragma unroll
        for (unsigned j = 0; j < GROUPS; ++j) {
            Share<D> share;
            share.take(keys, then.at, j);
            if (tile.hidden >> j & 1) {
                for (int i = 0; i < 8; ++i) s[2 * j + i / 4][i % 4] = lowest();
            } else {
                along<D>(a, now + j * GROUP * LEAD<D>, s + 2 * j);
                scores(m, bias, tile.mixed >> j & 1, false, scale, own.row(), tile.at * TILE<D> + j * GROUP, s + 2 * j);
            }
            share.put_down(keys, j, next);
        }
        if (!tile.none()) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float most = top[i];
#pragma unroll
                for (unsigned n = 0; n < 2 * GROUPS; ++n) most = Max::of(most, Max::of(s[n][2 * i], s[n][2 * i + 1]));
                most = of_row<Max>(most);
                // A row that has not seen a key yet.
                float from = most == lowest() ? 0.0f : most, shrunk = power_of_two(top[i] - from);
                top[i] = most;
                sum[i] *= shrunk;
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    sums[n][2 * i] *= shrunk;
                    sums[n][2 * i + 1] *= shrunk;
                }
#pragma unroll
                for (unsigned n = 0; n < 2 * GROUPS; ++n) {
                    s[n][2 * i] = power_of_two(s[n][2 * i] - from);
                    s[n][2 * i + 1] = power_of_two(s[n][2 * i + 1] - from);
                    sum[i] += s[n][2 * i] + s[n][2 * i + 1];
                }
            }
        }
#pragma unroll
        for (unsigned j = 0; j < GROUPS; ++j) {
            Share<D> share;
            share.take(values, then.at, j);
            if (!(tile.hidden >> j & 1)) onto<D>(s + 2 * j, now + SIZE + j * GROUP * LEAD<D>, sums);
            share.put_down(values, j, next + SIZE);
        }
        __syncthreads();
        swap(now, next);
        tile = then;
    }
    write<D>(sums, 1.0f / of_row<Add>(sum[0]), 1.0f / of_row<Add>(sum[1]), own.row(), m.lq, own.b, h, own.head, d, to);
}

// Gradients for q from those of the result y, in two rounds over the keys. The first finds each query's logarithm of the sum
// of its weights; with it the weights follow from the scores. It and the share of the gradient that the softmax takes back,
// the sum of y times its gradient, go to `logs` and `backs` (b, h, lq).
template <int D>
__device__ void attention_dq(unsigned h, unsigned d, float scale, const Heads& q, const Heads& k, const Heads& v,
                             const Heads& y, const Heads& g, const Seen& m, float* logs, float* backs, float* dq) {
    constexpr unsigned GROUPS = TILE<D> / GROUP, SIZE = TILE<D> * LEAD<D>;
    DYNAMIC_SHARED(shared);
    bf16 *now = (bf16*)shared, *next = now + 2 * SIZE;
    Place own(m.lq, h);
    const float* bias = m.bias ? m.bias + own.b * m.steps.s[0] + own.head * m.steps.s[1] : nullptr;
    unsigned a[D / 16][4], c[D / 16][4], tiles = (m.lk + TILE<D> - 1) / TILE<D>;
    Rows<D> keys(k, own.b, own.head, m.lk, d), values(v, own.b, own.head, m.lk, d);
    float back[2] = {}, log[2], scale_2 = scale * LOG2_E;
    Rows<D>(y, own.b, own.head, m.lq, d).stay(own.part, now, a);
    Rows<D>(g, own.b, own.head, m.lq, d).stay(own.part, now, c);
#pragma unroll
    for (int e = 0; e < D / 16; ++e) {
#pragma unroll
        for (int i = 0; i < 4; ++i) back[i % 2] += low(a[e][i]) * low(c[e][i]) + high(a[e][i]) * high(c[e][i]);
    }
    Rows<D>(q, own.b, own.head, m.lq, d).stay(own.part, now, a);
    Tile<D> first{0, 0, 0};
    first.find(m, own.part, false, tiles);
    {
        // A lane looks at its own columns until the end.
        float top[2] = {lowest(), lowest()}, sum[2] = {};
        keys.template move<TILE<D>>(first.at, now);
        __syncthreads();
        for (Tile<D> tile = first; tile.at < tiles;) {
            Tile<D> then{tile.at + 1, 0, 0};
            then.find(m, own.part, false, tiles);
#pragma unroll 1
            for (unsigned j = 0; j < GROUPS; ++j) {
                Share<D> share;
                share.take(keys, then.at, j);
                if (!(tile.hidden >> j & 1)) {
                    float s[2][4];
                    along<D>(a, now + j * GROUP * LEAD<D>, s);
                    scores(m, bias, tile.mixed >> j & 1, false, scale_2, own.row(), tile.at * TILE<D> + j * GROUP, s);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float most = Max::of(Max::of(s[0][2 * i], s[0][2 * i + 1]), Max::of(s[1][2 * i], s[1][2 * i + 1]));
                        most = Max::of(top[i], most);
                        float from = most == lowest() ? 0.0f : most;
                        sum[i] *= power_of_two(top[i] - from);
                        for (int n = 0; n < 4; ++n) sum[i] += power_of_two(s[n / 2][2 * i + n % 2] - from);
                        top[i] = most;
                    }
                }
                share.put_down(keys, j, next);
            }
            __syncthreads();
            swap(now, next);
            tile = then;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = of_row<Max>(top[i]);
            log[i] = most + log2f(of_row<Add>(top[i] == lowest() ? 0.0f : sum[i] * power_of_two(top[i] - most)));
            back[i] = of_row<Add>(back[i]);
            unsigned lane = threadIdx.x % 32, row = own.row() + lane / 4 + i * 8;
            if (lane % 4 == 0 && row < m.lq) {
                size_t at = ((size_t)own.b * h + own.head) * m.lq + row;
                logs[at] = log[i];
                backs[at] = back[i];
            }
        }
    }
    float sums[D / 8][4] = {};
    keys.template move<TILE<D>>(first.at, now);
    values.template move<TILE<D>>(first.at, now + SIZE);
    __syncthreads();
    for (Tile<D> tile = first; tile.at < tiles;) {
        Tile<D> then{tile.at + 1, 0, 0};
        then.find(m, own.part, false, tiles);
#pragma unroll 1
        for (unsigned j = 0; j < GROUPS; ++j) {
            Share<D> more_keys, more_values;
            more_keys.take(keys, then.at, j);
            more_values.take(values, then.at, j);
            if (!(tile.hidden >> j & 1)) {
                float p[2][4], dp[2][4];
                along<D>(a, now + j * GROUP * LEAD<D>, p);
                along<D>(c, now + SIZE + j * GROUP * LEAD<D>, dp);
                scores(m, bias, tile.mixed >> j & 1, false, scale_2, own.row(), tile.at * TILE<D> + j * GROUP, p);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& x = p[i / 4][i % 4];
                    x = power_of_two(x - log[i / 2 % 2]) * (dp[i / 4][i % 4] - back[i / 2 % 2]);
                }
                onto<D>(p, now + j * GROUP * LEAD<D>, sums);
            }
            more_keys.put_down(keys, j, next);
            more_values.put_down(values, j, next + SIZE);
        }
        __syncthreads();
        swap(now, next);
        tile = then;
    }
    write<D>(sums, scale, scale, own.row(), m.lq, own.b, h, own.head, d, dq);
}

// Gradients for k and v, after those for q: keys stay, queries pass.
template <int D>
__device__ void attention_dkv(unsigned h, unsigned d, float scale, const Heads& q, const Heads& k, const Heads& v,
                              const Heads& g, const Seen& m, const float* logs, const float* backs, float* dk, float* dv) {
    constexpr unsigned GROUPS = TILE<D> / GROUP, SIZE = TILE<D> * LEAD<D>;
    DYNAMIC_SHARED(shared);
    // Of either tile: queries, gradients, and two numbers of each query.
    bf16 *now = (bf16*)(shared + 4 * TILE<D>), *next = now + 2 * SIZE;
    float *numbers = shared, *next_numbers = shared + 2 * TILE<D>;
    Place own(m.lk, h);
    const float* bias = m.bias ? m.bias + own.b * m.steps.s[0] + own.head * m.steps.s[1] : nullptr;
    unsigned a[D / 16][4], c[D / 16][4], tiles = (m.lq + TILE<D> - 1) / TILE<D>, lane = threadIdx.x % 32;
    Rows<D>(k, own.b, own.head, m.lk, d).stay(own.part, now, a);
    Rows<D>(v, own.b, own.head, m.lk, d).stay(own.part, now, c);
    Rows<D> queries(q, own.b, own.head, m.lq, d), grads(g, own.b, own.head, m.lq, d);
    logs += ((size_t)own.b * h + own.head) * m.lq;
    backs += ((size_t)own.b * h + own.head) * m.lq;
    // Weights of queries behind the last become zero.
    auto number = [&](unsigned tile, float* to) {
        unsigned i = threadIdx.x % TILE<D>, row = tile * TILE<D> + i;
        if (threadIdx.x < TILE<D>) to[threadIdx.x] = row < m.lq ? logs[row] : INFINITY;
        else if (threadIdx.x < 2 * TILE<D>) to[threadIdx.x] = row < m.lq ? backs[row] : 0.0f;
    };
    float keys_sums[D / 8][4] = {}, values_sums[D / 8][4] = {}, scale_2 = scale * LOG2_E;
    Tile<D> tile{0, 0, 0};
    tile.find(m, own.part, true, tiles);
    queries.template move<TILE<D>>(tile.at, now);
    grads.template move<TILE<D>>(tile.at, now + SIZE);
    number(tile.at, numbers);
    __syncthreads();
    while (tile.at < tiles) {
        Tile<D> then{tile.at + 1, 0, 0};
        then.find(m, own.part, true, tiles);
        number(then.at, next_numbers);
#pragma unroll 1
        for (unsigned j = 0; j < GROUPS; ++j) {
            Share<D> more_queries, more_grads;
            more_queries.take(queries, then.at, j);
            more_grads.take(grads, then.at, j);
            if (!(tile.hidden >> j & 1)) {
                float p[2][4], dp[2][4];
                along<D>(a, now + j * GROUP * LEAD<D>, p);
                along<D>(c, now + SIZE + j * GROUP * LEAD<D>, dp);
                scores(m, bias, tile.mixed >> j & 1, true, scale_2, own.row(), tile.at * TILE<D> + j * GROUP, p);
                const float* of_column = numbers + j * GROUP + lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& x = p[i / 4][i % 4];
                    x = power_of_two(x - of_column[i / 4 * 8 + i % 2]);
                }
                onto<D>(p, now + SIZE + j * GROUP * LEAD<D>, values_sums);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    p[i / 4][i % 4] *= dp[i / 4][i % 4] - of_column[TILE<D> + i / 4 * 8 + i % 2];
                }
                onto<D>(p, now + j * GROUP * LEAD<D>, keys_sums);
            }
            more_queries.put_down(queries, j, next);
            more_grads.put_down(grads, j, next + SIZE);
        }
        __syncthreads();
        swap(now, next);
        swap(numbers, next_numbers);
        tile = then;
    }
    write<D>(keys_sums, scale, scale, own.row(), m.lk, own.b, h, own.head, d, dk);
    write<D>(values_sums, 1.0f, 1.0f, own.row(), m.lk, own.b, h, own.head, d, dv);
}

// Below compute capability 8.0 tensor cores do not know bf16.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// Registers suffice for `two` blocks at once, or for one.
#define ATTENTION(D, two, one)                                                                                       \
    KERNEL_AT_ONCE(two, attention_##D, unsigned h, unsigned d, float scale, Heads q, Heads k, Heads v, Seen m,       \
                   bf16* to) {                                                                                       \
        attention<D>(h, d, scale, q, k, v, m, to);                                                                   \
    }                                                                                                                \
    KERNEL_AT_ONCE(two, attention_dq_##D, unsigned h, unsigned d, float scale, Heads q, Heads k, Heads v, Heads y,   \
                   Heads g, Seen m, float* logs, float* backs, float* dq) {                                          \
        attention_dq<D>(h, d, scale, q, k, v, y, g, m, logs, backs, dq);                                             \
    }                                                                                                                \
    KERNEL_AT_ONCE(one, attention_dkv_##D, unsigned h, unsigned d, float scale, Heads q, Heads k, Heads v, Heads g,  \
                   Seen m, const float* logs, const float* backs, float* dk, float* dv) {                            \
        attention_dkv<D>(h, d, scale, q, k, v, g, m, logs, backs, dk, dv);                                           \
    }
ATTENTION(32, 2, 2)
ATTENTION(64, 2, 1)
ATTENTION(128, 1, 1)
#endif

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
    // Whatever equals the last of the most probable stays too.
    unsigned long long ties = 0;
    ALONG(i, k) if (ordered(row[i]) == last) ++ties;
    unsigned equals = (unsigned)together<Add>(ties, 0ull);
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

// Of each coordinate of a codebook (d, k), a block each: the mean of its squares and the square of its mean.
KERNEL(spread_parts, unsigned k, const float* codes, double* to) {
    double sum = 0.0, squares = 0.0;
    ALONG(i, k) {
        double c = codes[(size_t)blockIdx.x * k + i];
        sum += c;
        squares += c * c;
    }
    double mean = together<Add>(sum, 0.0) / k;
    squares = together<Add>(squares, 0.0) / k;
    if (threadIdx.x == 0) {
        to[2 * blockIdx.x] = squares;
        to[2 * blockIdx.x + 1] = mean * mean;
    }
}

// The table of steps for a codebook whose coordinates have these, from that for a spread of 1: all of it goes by the inverse
// of the spread, the root mean square deviation of a coordinate. One block.
KERNEL(spread_steps, unsigned d, unsigned n, const double* parts, const float* unit, float* to) {
    double mean_square = 0.0, square_of_mean = 0.0;
    for (unsigned e = 0; e < d; ++e) {
        mean_square += parts[2 * e];
        square_of_mean += parts[2 * e + 1];
    }
    double spread = sqrt((mean_square - square_of_mean) / d);
    // Rounding leaves something of equal codes.
    float scale = spread > 1e-4 * sqrt(mean_square / d) && spread < 1e30 ? (float)(1.0 / spread) : 1.0f;
    ALONG(i, n) to[i] = unit[i] * scale;
}

// A token's state.
template <int D> struct alignas(16) Token {
    float z[D];
    float ahead[D];
    float slopes[KEPT][D];
    float sums[D][WARPS];
    unsigned counts[WARPS];
};

// What all threads have added up, as the slope of a token, with the greatest log weight of all and the sum relative to it.
template <int D> __device__ void settle(Token<D>& t, const float* sums, int slope, float& top, float& sum) {
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

// A code (D) among those that a thread adds up, relative to its own greatest log weight: its own, which is returned.
template <int D>
__device__ inline float consider(const float* c, float square, float logit, float s, const float* ahead, float& top,
                                 float& sum, float* sums) {
    float along = 0.0f;
#pragma unroll
    for (int e = 0; e < D; ++e) along += c[e] * ahead[e];
    float log_weight = logit + s * (along - 0.5f * s * square);
    if (log_weight == lowest()) return log_weight;
    if (log_weight > top) {
        float scale = expf(top - log_weight);
        sum *= scale;
#pragma unroll
        for (int e = 0; e < D; ++e) sums[e] *= scale;
        top = log_weight;
    }
    float w = expf(log_weight - top);
    sum += w;
#pragma unroll
    for (int e = 0; e < D; ++e) sums[e] += w * c[e];
    return log_weight;
}

template <int D> __device__ inline float read_code(float* c, unsigned k, unsigned j, const float* codes) {
    float square = 0.0f;
#pragma unroll
    for (int e = 0; e < D; ++e) c[e] = codes[(size_t)e * k + j];
#pragma unroll
    for (int e = 0; e < D; ++e) square += c[e] * c[e];
    return square;
}

// dz/ds ahead into a slope, with the greatest log weight and the sum of the weights relative to it. `list` are the
// codes that are left, or null for all.
template <int D>
__device__ void velocity(Token<D>& t, unsigned k, unsigned count, const unsigned* list, const float* codes,
                         const float* logits, float s, int slope, float* kept, float& top, float& sum) {
    // Codes that a thread reads together, so that it waits for memory once.
    constexpr unsigned SOME = D <= 8 ? 4 : D <= 16 ? 2 : 1;
    float sums[D];
    for (int e = 0; e < D; ++e) sums[e] = 0.0f;
    top = lowest();
    sum = 0.0f;
    for (unsigned start = threadIdx.x; start < count; start += SOME * BLOCK) {
        float c[SOME][D], squares[SOME], own[SOME];
#pragma unroll
        for (unsigned o = 0; o < SOME; ++o) {
            unsigned i = start + o * BLOCK, j = i >= count ? 0 : list ? list[i] : i;
            own[o] = logits[j];
            squares[o] = read_code<D>(c[o], k, j, codes);
        }
#pragma unroll
        for (unsigned o = 0; o < SOME; ++o) {
            unsigned i = start + o * BLOCK;
            if (i < count) kept[i] = consider<D>(c[o], squares[o], own[o], s, t.ahead, top, sum, sums);
        }
    }
    settle(t, sums, slope, top, sum);
}

// The same of N tokens that look at all codes: each code is read once. `own` are their places in logits and `kept`.
template <int D, int N>
__device__ void velocities(Token<D>* t, const unsigned* own, unsigned k, const float* codes, const float* logits, float s,
                           int slope, float* kept, float* top, float* sum) {
    float sums[N][D];
#pragma unroll
    for (int o = 0; o < N; ++o) {
        for (int e = 0; e < D; ++e) sums[o][e] = 0.0f;
        top[o] = lowest();
        sum[o] = 0.0f;
    }
    ALONG(i, k) {
        float c[D], square = read_code<D>(c, k, i, codes);
#pragma unroll
        for (int o = 0; o < N; ++o) {
            size_t place = (size_t)own[o] * k + i;
            kept[place] = consider<D>(c, square, logits[place], s, t[o].ahead, top[o], sum[o], sums[o]);
        }
    }
#pragma unroll
    for (int o = 0; o < N; ++o) settle(t[o], sums[o], slope, top[o], sum[o]);
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

// Takes a token a step of the Adams method on: `row` has the weights of its slopes.
template <int D> __device__ void advance(Token<D>& t, const float* row) {
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

template <int D> __device__ void begin(Token<D>& t, const float* noise) {
    ALONG(e, D) {
        t.z[e] = t.ahead[e] = noise[e];
        for (int slope = 0; slope < KEPT; ++slope) t.slopes[slope][e] = 0.0f;
    }
}

// Codes whose log weights are not far below the greatest.
__device__ inline unsigned near(unsigned count, const float* kept, float least) {
    unsigned left = 0;
    ALONG(i, count) left += kept[i] > least ? 1u : 0u;
    return together<Add>(left, 0u);
}

// The code of a token from a step on, at which it looks at all codes; their velocity is known there already if `known`. A
// token that is decided ends; codes that no longer matter go.
template <int D>
__device__ unsigned finish(Token<D>& t, unsigned k, const Flow& f, const float* logits, const float* codes,
                           const float* steps, float* kept, unsigned* list, int step, bool known, float top, float sum) {
    unsigned count = k;
    bool all = true;
    for (;; ++step) {
        const float* row = steps + step * ROW;
        float s = row[0];
        if (!known) velocity<D>(t, k, count, all ? nullptr : list, codes, logits, s, step % KEPT, kept, top, sum);
        known = false;
        unsigned left = near(count, kept, top - f.dropped), lead = leader(count, kept, top);
        unsigned found = all ? lead : list[lead];
        if (step + 1 == f.points || left <= 1) return found;
        if (sum - 1.0f <= f.undecided &&
            others<D>(t, k, count, all ? nullptr : list, codes, s, kept, top, lead) <= f.undecided)
            return found;
        if (2 * left <= count) {
            __syncthreads();
            count = shorten(t.counts, count, list, all, kept, top - f.dropped);
            all = false;
        }
        advance(t, row);
    }
}

// The AR flow map (the engine's `flow.rs` has the mathematics) of n tokens, N to a block: the Adams method of `steps`, a ROW
// each. codes (D, k). `kept` and `list` (n, k) are working memory. Tokens of a block go together until one of them leaves
// codes behind. What a token becomes does not depend on the others.
template <int D, int N>
__device__ void flow(unsigned n, unsigned k, const Flow& f, const float* logits, const float* noise, const float* codes,
                     const float* steps, float* kept, unsigned* list, unsigned* ids) {
    __shared__ Token<D> t[N];
    unsigned own[N];
    float top[N], sum[N];
    // The last block may have fewer: it does the last token several times.
#pragma unroll
    for (int o = 0; o < N; ++o) own[o] = blockIdx.x * N + o < n ? blockIdx.x * N + o : n - 1;
    for (int o = 0; o < N; ++o) begin(t[o], noise + (size_t)own[o] * D);
    __syncthreads();
    int step = 0;
    for (bool apart = N == 1; !apart;) {
        const float* row = steps + step * ROW;
        velocities<D, N>(t, own, k, codes, logits, row[0], step % KEPT, kept, top, sum);
        apart = step + 1 == f.points;
#pragma unroll
        for (int o = 0; o < N; ++o) {
            if (apart) continue;
            apart = sum[o] - 1.0f <= f.undecided || 2 * near(k, kept + (size_t)own[o] * k, top[o] - f.dropped) <= k;
        }
        if (apart) break;
        for (int o = 0; o < N; ++o) advance(t[o], row);
        ++step;
    }
#pragma unroll
    for (int o = 0; o < N; ++o) {
        size_t at = (size_t)own[o] * k;
        unsigned found =
            finish<D>(t[o], k, f, logits + at, codes, steps, kept + at, list + at, step, N > 1, top[o], sum[o]);
        if (threadIdx.x == 0) ids[own[o]] = found;
        __syncthreads();
    }
}
#define FLOW(D, N)                                                                                                    \
    KERNEL(flow_##D, unsigned n, unsigned k, Flow f, const float* logits, const float* noise, const float* codes,    \
           const float* steps, float* kept, unsigned* list, unsigned* ids) {                                         \
        flow<D, 1>(n, k, f, logits, noise, codes, steps, kept, list, ids);                                           \
    }                                                                                                                \
    KERNEL(flow_together_##D, unsigned n, unsigned k, Flow f, const float* logits, const float* noise,               \
           const float* codes, const float* steps, float* kept, unsigned* list, unsigned* ids) {                     \
        flow<D, N>(n, k, f, logits, noise, codes, steps, kept, list, ids);                                           \
    }
FLOW(4, 4)
FLOW(8, 4)
FLOW(16, 4)
// More sums than that do not fit into a thread's registers.
FLOW(32, 2)
