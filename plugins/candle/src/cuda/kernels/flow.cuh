// The AR flow map (the engine's `flow.rs` has the mathematics).

// The numbers of the flow map: evaluations, how far below the leader a code is dropped, and the probability of the others
// at which a token is decided.
struct Flow {
    int points;
    float dropped;
    float undecided;
};

// The number of slopes of a step, and of the entries per step in the table: s, then each slope's weight in z, then its weight
// in the next evaluation point.
constexpr int KEPT = 5, ROW = 1 + 2 * KEPT;

// For each coordinate of a codebook (d, k), one block each: the mean of its squares and the square of its mean.
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

// The table of steps for a codebook with these moments, from the table for a spread of 1: all of it scales with the inverse of
// the spread, the root mean square deviation of a coordinate. One block.
KERNEL(spread_steps, unsigned d, unsigned n, const double* parts, const float* unit, float* to) {
    double mean_square = 0.0, square_of_mean = 0.0;
    for (unsigned e = 0; e < d; ++e) {
        mean_square += parts[2 * e];
        square_of_mean += parts[2 * e + 1];
    }
    double spread = sqrt((mean_square - square_of_mean) / d);
    // Rounding leaves a remainder even for equal codes.
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

// Combines the sums of all threads into a token's slope, with the greatest log weight and the sum relative to it.
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

// Adds a code (D) to a thread's sums, which are relative to its greatest log weight. Returns the code's log weight.
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
    // Codes that a thread reads together, to wait for memory only once.
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

// The same for N tokens with all codes: each code is read once. `own` are the tokens' positions in logits and `kept`.
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

// The leading code's position in the list.
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

// Keeps the codes in the list whose log weight is above `least`, in order.
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

// Advances a token by a step of the Adams method: `row` has the weights of its slopes.
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

// Continues a token from a step, at which it starts with all codes (`known`: with the velocity already computed). It ends when
// the token is decided; codes that no longer matter are dropped.
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
    // The last block may have fewer: it repeats the last token.
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
// More sums do not fit into a thread's registers.
FLOW(32, 2)
