// Rows of a table by their index, and the adjoint.

// An id beyond the table gives conspicuous numbers.
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
