// Truncating logits and drawing codes.

// Bits that sort like the numbers.
__device__ inline unsigned ordered(float x) {
    unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Weights as integers, whose sum does not depend on their order.
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
    // Values equal to the last of the most probable stay too.
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

// The code at which the cumulative probability of a row passes a number in [0, 1). Each thread sums a separate part.
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
