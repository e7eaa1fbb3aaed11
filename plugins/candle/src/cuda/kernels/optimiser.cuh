// AdamW and moving averages of weights, in place.

struct Adamw {
    float beta1, beta2, eps, grad_scale;
    float root;   // 1 / sqrt(correction2)
    float rate;   // lr / correction1
    float keep;   // 1 - lr weight_decay
};

KERNEL(adamw, unsigned n, Adamw s, float* p, float* m, float* v, const float* g) {
    EACH(i, n) {
        float grad = g[i] * s.grad_scale;
        m[i] = s.beta1 * m[i] + (1.0f - s.beta1) * grad;
        v[i] = s.beta2 * v[i] + (1.0f - s.beta2) * grad * grad;
        p[i] = p[i] * s.keep - s.rate * m[i] / (sqrtf(v[i]) * s.root + s.eps);
    }
}

KERNEL(ema, unsigned n, float decay, float rest, float* average, const float* x) {
    EACH(i, n) average[i] = decay * average[i] + rest * x[i];
}
