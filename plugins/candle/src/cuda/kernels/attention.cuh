// Attention with scores in memory, rotary positions, and the next position of a generation.

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

// A generation step's positions (b, l, h, 2 half): rotates queries and keys, and writes keys and values to their caches. The
// first position uses row `place` of the tables and of the caches, or row 0 if it is null.
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

// Scores (rows = b h lq, lk) to weights: scaled, masked, softmax. `causal` or a bias or neither. One warp per row, because
// most rows are short.
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

// Gradients of the scores from those of the weights; one warp per row.
KERNEL(weights_backward, unsigned rows, unsigned lk, float scale, const float* p, const float* g, float* to) {
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    size_t at = (size_t)row * lk;
    float along = 0.0f;
    for (unsigned i = lane; i < lk; i += 32) along += p[at + i] * g[at + i];
    along = across<Add>(along);
    for (unsigned i = lane; i < lk; i += 32) to[at + i] = scale * p[at + i] * (g[at + i] - along);
}

// A few queries (b, lq, h, d) against many keys, without scores in memory, for steps with a cache of keys and values. One block
// per query and head, with its scores, the query and the partial sums in shared memory: lk + d + BLOCK floats. With a place, a
// query sees the keys up to that row.
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
    // Rounded like the keys.
    ALONG(e, d) {
        T rounded;
        put(rounded, q[e]);
        query[e] = wide(rounded);
    }
    __syncthreads();
    // One warp per key.
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
    // As many threads per coordinate as possible.
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
