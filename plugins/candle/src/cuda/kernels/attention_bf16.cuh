// Attention in bf16 on tensor cores, without scores in memory, with gradients.

// Products on tensor cores, with all intermediate values in registers: scores are never in memory. A block keeps 128 rows
// (queries, or keys when it computes their gradients), 16 per warp, and iterates over the others in tiles. Registers hold
// `mma` fragments: with g = lane / 4 and t = lane % 4, a lane has, of 16 rows of sums,
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
// Four matrices (8, 8) from shared memory: lanes 8 i to 8 i + 7 give the addresses of matrix i's rows, and a lane gets row g,
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
// Two numbers as bf16, rounded like in `put`, the first in the lower half.
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

// Scores are in base-2 logarithms.
constexpr float LOG2_E = 1.4426950409f;

// Rows that a block keeps, those of a warp, and those of a tile of the others; the row stride in shared memory, chosen so
// that eight rows begin in different banks.
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

// The mask. `kinds`: for every 16 queries and 16 keys, the precomputed `kind`, which would read the bias; or null.
struct Seen {
    unsigned lq, lk;
    int causal;
    const float* bias;
    Steps steps;
    const unsigned* kinds;
};

// The kind of a block of 16 queries and 16 keys: all scores hidden, all visible without bias, or mixed.
enum { HIDDEN, PLAIN, MIXED };

// Keys that a query sees, apart from the bias.
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

// The kinds of a bias (lq, lk) for all sequences and heads; one warp each.
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

// A tile, and for each warp's 16 rows and each 16 rows of the tile whether they are hidden or mixed, as bits.
template <int D> struct Tile {
    static constexpr unsigned GROUPS = TILE<D> / GROUP;
    unsigned at, hidden, mixed;

    // The first tile from `at` on that is not hidden. Every warp finds the same.
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

// Copies rows of a head into shared memory. An item is four elements of each thread, ROWS rows in all.
template <int D> struct Rows {
    static constexpr unsigned ROWS = BLOCK / (D / 4);
    const Heads& from;
    // This thread's elements in the first item: where they are, how many, and the row; and the number of its rows.
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
    // To the item's position in shared memory.
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
    // The rows that this block keeps, as left operands of this warp. Goes through shared memory, which is free afterwards.
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

// The part of a tile that is copied to shared memory while 16 rows of the previous tile are multiplied.
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

// Scores of 16 rows and 16 others from products: base-2 logarithms, -inf for hidden keys.
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
        // Beyond the last query.
        if (q >= m.lq) q = m.lq - 1;
        float& x = s[i / 4][i % 4];
        if (k >= seen_by(m, q)) {
            x = lowest();
        } else if (bias) {
            x += LOG2_E * bias[q * m.steps.s[2] + k * m.steps.s[3]];
        }
    }
}

// Over the four lanes that share a row.
template <class Op> __device__ float of_row(float x) {
    x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return Op::of(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

template <class T> struct alignas(2 * sizeof(T)) Two {
    T of[2];
};

// Writes sums (16, D) of this warp, times a number for each of both rows, to rows of (b, l, h, d).
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

// The position of a block: parts of 128 rows, then heads, then sequences.
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
                // A row without visible keys so far.
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
        // Each lane keeps to its own columns until the end.
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

// Gradients for k and v, after those for q: the block keeps keys and iterates over queries.
template <int D>
__device__ void attention_dkv(unsigned h, unsigned d, float scale, const Heads& q, const Heads& k, const Heads& v,
                              const Heads& g, const Seen& m, const float* logs, const float* backs, float* dk, float* dv) {
    constexpr unsigned GROUPS = TILE<D> / GROUP, SIZE = TILE<D> * LEAD<D>;
    DYNAMIC_SHARED(shared);
    // Per tile: queries, gradients, and two numbers per query.
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
    // Weights of queries beyond the last become zero.
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

// Below compute capability 8.0, tensor cores do not support bf16.
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
