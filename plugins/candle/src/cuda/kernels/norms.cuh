// Normalisations, with gradients.

template <class T> __device__ void rms_norm(unsigned d, float eps, const float* x, const float* w, T* to) {
    size_t at = (size_t)blockIdx.x * d;
    float square = 0.0f;
    ALONG(i, d) square += x[at + i] * x[at + i];
    float r = 1.0f / sqrtf(total(square) / d + eps);
    ALONG(i, d) put(to[at + i], x[at + i] * r * w[i]);
}
// The same for short rows: one warp each.
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

// `dw`: each row's contribution to the gradient of w.
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

// The mean and the reciprocal standard deviation of a row.
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

// The row's moments, and the standardised row.
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
