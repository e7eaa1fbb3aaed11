// Rows of probabilities: softmax and cross-entropy, with gradients.

KERNEL(softmax, unsigned k, const float* x, float* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest(), sum = 0.0f;
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    ALONG(i, k) sum += expf(row[i] - top);
    float scale = 1.0f / total(sum);
    ALONG(i, k) to[(size_t)blockIdx.x * k + i] = scale * expf(row[i] - top);
}

KERNEL(softmax_backward, unsigned k, const float* y, const float* g, float* to) {
    size_t at = (size_t)blockIdx.x * k;
    float along = 0.0f;
    ALONG(i, k) along += y[at + i] * g[at + i];
    along = total(along);
    ALONG(i, k) to[at + i] = y[at + i] * (g[at + i] - along);
}

KERNEL(cross_entropy, unsigned k, const float* x, const unsigned* ids, float* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest(), sum = 0.0f;
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    ALONG(i, k) sum += expf(row[i] - top);
    sum = total(sum);
    unsigned id = ids[blockIdx.x];
    if (threadIdx.x == 0) to[blockIdx.x] = id < k ? logf(sum) - (row[id] - top) : NAN;
}

KERNEL(cross_entropy_backward, unsigned k, const float* x, const unsigned* ids, const float* g, float* to) {
    const float* row = x + (size_t)blockIdx.x * k;
    float top = lowest(), sum = 0.0f;
    ALONG(i, k) top = Max::of(top, row[i]);
    top = greatest(top);
    ALONG(i, k) sum += expf(row[i] - top);
    float scale = 1.0f / total(sum), grad = g[blockIdx.x];
    unsigned id = ids[blockIdx.x];
    ALONG(i, k) to[(size_t)blockIdx.x * k + i] = grad * (scale * expf(row[i] - top) - (i == id ? 1.0f : 0.0f));
}
