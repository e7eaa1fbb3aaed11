// Windows over images: convolutions as products, pooling.

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
// A thread handles adjacent windows of a row.
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

// The same for the common case of 3 x 3 windows that keep the image's size. A thread reads the pixels under eight adjacent
// windows once, and writes them to all nine positions.
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

// Adds a number per channel o and, if given, a residual of the same size to images (b, o, area).
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

// Adjoint: each pixel gathers from the windows over it.
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

// The first of the greatest pixels under a window, row by row: its index in the image, and its value.
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
