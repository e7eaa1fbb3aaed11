"""Reference values of tests/tests/tokenizer.rs, in float64 with only NumPy: a tokenizer's losses and figures.

    pip install numpy
    python3 tests/peers/losses.py
"""

import numpy as np


def values(count, step, shift=0.0, scale=1.0):
    """Samples of a sine: the same numbers as in the test."""
    return scale * np.sin(step * np.arange(1, count + 1)) + shift


def conv(x, w, bias, stride, pad):
    b, c, h, ww = x.shape
    o, _, k, _ = w.shape
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    oh, ow = (h + 2 * pad - k) // stride + 1, (ww + 2 * pad - k) // stride + 1
    y = np.zeros((b, o, oh, ow))
    for i in range(oh):
        for j in range(ow):
            part = x[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            y[:, :, i, j] = np.einsum("bckl,ockl->bo", part, w)
    return y if bias is None else y + bias[None, :, None, None]


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def batch_norm(x, scale, shift):
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * scale[None, :, None, None] + shift[None, :, None, None]


def discriminator(x):
    """PatchGAN of 4 channels and 2 strided convolutions."""
    x = leaky(conv(x, values(4 * 3 * 16, 0.7, scale=0.3).reshape(4, 3, 4, 4), values(4, 1.1, scale=0.1), 2, 1))
    x = conv(x, values(8 * 4 * 16, 0.9, scale=0.2).reshape(8, 4, 4, 4), None, 2, 1)
    x = leaky(batch_norm(x, values(8, 0.5, shift=1.0, scale=0.2), values(8, 1.3, scale=0.1)))
    x = conv(x, values(16 * 8 * 16, 1.7, scale=0.2).reshape(16, 8, 4, 4), None, 1, 1)
    x = leaky(batch_norm(x, values(16, 0.4, shift=1.0, scale=0.2), values(16, 0.8, scale=0.1)))
    return conv(x, values(16 * 16, 2.1, scale=0.3).reshape(1, 16, 4, 4), values(1, 0.6, scale=0.1), 1, 1)


def entropy(z, codes, temperature):
    near = -((z[:, None, :] - codes[None]) ** 2).sum(-1) / temperature
    near -= near.max(1, keepdims=True)
    p = np.exp(near) / np.exp(near).sum(1, keepdims=True)
    information = lambda p: (p * np.log(p + 1e-10)).sum(-1)
    return information(p.mean(0)) - information(p).mean()


def ssim(a, b):
    window = min(11, a.shape[1] - (1 - a.shape[1] % 2))
    g = np.exp(-(((np.arange(window) - window // 2) / 1.5) ** 2) / 2)
    g = np.outer(g, g) / g.sum() ** 2
    out = []
    for x, y in zip(a, b):
        places = []
        for i in range(x.shape[0] - window + 1):
            for j in range(x.shape[1] - window + 1):
                p, q = x[i : i + window, j : j + window], y[i : i + window, j : j + window]
                mp, mq = (g * p).sum(), (g * q).sum()
                vp, vq = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum()
                both = (g * (p - mp) * (q - mq)).sum()
                c1, c2 = 1e-4, 9e-4
                places.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
        out.append(np.mean(places))
    return np.mean(out)


images = values(2 * 3 * 16 * 16, 0.37).reshape(2, 3, 16, 16)
made = values(2 * 3 * 16 * 16, 0.37, shift=0.05, scale=0.8).reshape(2, 3, 16, 16)
real, fake = discriminator(images), discriminator(made)
print("discriminator", real.shape, real.ravel()[:3], real.sum())
print("hinge", 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()))
print("adversarial", -fake.mean())
print("l1", np.abs(images - made).mean(), "l2", ((images - made) ** 2).mean())
z, codes = values(5 * 4, 0.9).reshape(5, 4), values(6 * 4, 1.9).reshape(6, 4)
print("entropy", entropy(z, codes, 0.5))
unit = lambda x: np.clip(x * 0.5 + 0.5, 0, 1)
for a, b in zip(images, made):
    print("psnr", -10 * np.log10(((unit(a) - unit(b)) ** 2).mean()), "ssim", ssim(unit(a), unit(b)))
small = lambda x: unit(x[0, :, :8, :8])
print("ssim of 8 x 8", ssim(small(images), small(made)))
