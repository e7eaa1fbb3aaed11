// Sums and extrema over dimensions.

// One block per sum: `kept` gives the offset of its first element, `gone` those of the others from there.
KERNEL(sum, unsigned terms, StridedDims kept, StridedDims gone, const float* x, float* to) {
    const float* from = x + first(kept, blockIdx.x);
    float sum = 0.0f;
    ALONG(i, terms) sum += from[first(gone, i)];
    sum = total(sum);
    if (threadIdx.x == 0) to[blockIdx.x] = sum;
}

// One thread per sum.
KERNEL(sum_few, unsigned n, unsigned terms, StridedDims kept, StridedDims gone, const float* x, float* to) {
    EACH(i, n) {
        const float* from = x + first(kept, i);
        float sum = 0.0f;
        for (unsigned t = 0; t < terms; ++t) sum += from[first(gone, t)];
        to[i] = sum;
    }
}

// Columns of `outer` times (rows, columns), `part` rows at a time: -> (outer, parts, columns). With `by`, of the products
// with it.
KERNEL(sum_columns, unsigned outer, unsigned rows, unsigned columns, unsigned part, const float* x, const float* by,
       float* to) {
    unsigned parts = (rows + part - 1) / part;
    EACH(i, outer * parts * columns) {
        unsigned from = i / columns % parts * part, end = from + part < rows ? from + part : rows;
        size_t start = (size_t)(i / columns / parts) * rows * columns + i % columns;
        float sum = 0.0f;
        for (unsigned row = from; row < end; ++row) {
            size_t place = start + (size_t)row * columns;
            sum += by ? x[place] * by[place] : x[place];
        }
        to[i] = sum;
    }
}

KERNEL(max_last, unsigned k, const float* x, float* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest();
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    if (threadIdx.x == 0) to[blockIdx.x] = top;
}

KERNEL(argmax_last, unsigned k, const float* x, unsigned* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest();
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    unsigned at = k - 1;
    ALONG(i, k) if (row[i] == top && i < at) at = i;
    at = together<Min>(at, k - 1);
    if (threadIdx.x == 0) to[blockIdx.x] = at;
}
