// Shared by all kernels: threads, number formats, element offsets, sums over a block.

#ifndef EMULATED
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(BLOCK) name(__VA_ARGS__)
// With few enough registers for this many concurrent blocks on a multiprocessor.
#define KERNEL_AT_ONCE(blocks, name, ...) extern "C" __global__ void __launch_bounds__(BLOCK, blocks) name(__VA_ARGS__)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]
#endif

// Threads of every block.
constexpr int BLOCK = 256;
constexpr int WARPS = BLOCK / 32;
// The most dimensions of a tensor.
constexpr int RANK = 8;

// The layout of two tensors of the same shape: for each dimension its size, and its stride in either tensor.
struct StridedDims {
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
// Rounds to nearest even.
__device__ inline void put(bf16& to, float x) {
    unsigned bits = __float_as_uint(x);
    bool number = (bits & 0x7fffffffu) <= 0x7f800000u;
    to.bits = number ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fffu;
}

// IEEE half precision: ten significand bits, like TF32, but five exponent bits.
struct fp16 {
    unsigned short bits;
};

// Rounds to nearest even. Numbers beyond the range become its ends; below 6e-5 the step is 6e-8.
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
        // Around 0.5 an f32 has the same step as a half below 2^-14.
        bits = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u;
    } else {
        bits = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    }
    to.bits = (unsigned short)(bits | (all >> 16 & 0x8000u));
#endif
}

__device__ inline float lowest() { return -INFINITY; }

// The elements that this thread processes.
#define EACH(i, n) for (unsigned i = blockIdx.x * BLOCK + threadIdx.x; i < (n); i += gridDim.x * BLOCK)
#define ALONG(i, n) for (unsigned i = threadIdx.x; i < (n); i += BLOCK)

__device__ inline long long first(const StridedDims& p, unsigned i) {
    long long at = 0;
    for (int d = p.rank - 1; d >= 0; --d) {
        at += (long long)(i % p.size[d]) * p.first[d];
        i /= p.size[d];
    }
    return at;
}

__device__ inline void both(const StridedDims& p, unsigned i, long long& a, long long& b) {
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

// Combines the values of a warp's threads, in the same order at every call; all threads get the result.
template <class Op, class T> __device__ T across(T x) {
    for (int step = 16; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Combines the values of a block's threads, in the same order at every call; all threads get the result.
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
