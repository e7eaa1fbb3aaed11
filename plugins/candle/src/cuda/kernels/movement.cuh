// Copies between layouts and types.

template <class From, class To> __device__ void copy(unsigned n, const StridedDims& p, const From* from, To* to) {
    EACH(i, n) {
        long long a, b;
        both(p, i, a, b);
        put(to[b], wide(from[a]));
    }
}
// Copies elements in groups of four.
template <class From, class To> __device__ void copy_four(unsigned n, const StridedDims& p, const From* from, To* to) {
    EACH(i, n) {
        long long a, b;
        both(p, i, a, b);
        Some<From, 4> x = *(const Some<From, 4>*)(from + a);
        Some<To, 4> y;
        for (int e = 0; e < 4; ++e) put(y.of[e], wide(x.of[e]));
        *(Some<To, 4>*)(to + b) = y;
    }
}
#define COPY(name, From, To)                                                                           \
    KERNEL(copy_##name, unsigned n, StridedDims p, const From* from, To* to) { copy(n, p, from, to); } \
    KERNEL(copy_four_##name, unsigned n, StridedDims p, const From* from, To* to) { copy_four(n, p, from, to); }
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
