// Elementwise functions.

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
// Offsets of single elements, or of groups of four.
template <unsigned N>
__device__ void binary(unsigned n, int f, const StridedDims& p, const float* as, const float* bs, float* to) {
    EACH(i, n) {
        long long i_a, i_b;
        both(p, i, i_a, i_b);
        Some<float, N> a = load<N>(as + i_a), b = load<N>(bs + i_b);
        for (unsigned e = 0; e < N; ++e) a.of[e] = binary(f, a.of[e], b.of[e]);
        store(to + (size_t)i * N, a);
    }
}
KERNEL(binary_one, unsigned n, int f, StridedDims p, const float* as, const float* bs, float* to) {
    binary<1>(n, f, p, as, bs, to);
}
KERNEL(binary_four, unsigned n, int f, StridedDims p, const float* as, const float* bs, float* to) {
    binary<4>(n, f, p, as, bs, to);
}

// x + y gate (+ added, unless null) for rows of `row` = l c elements with a gate (c) each.
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
