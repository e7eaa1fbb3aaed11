#!/usr/bin/env python3
"""The networks of the speed bench in plain PyTorch, at published shapes and with random weights.

    speed.py FAMILY DTYPE BATCH THREADS PHASE...

FAMILY is llamagen (size B), llamagen-L or var (size d16), DTYPE f32 or bf16 (autocast), PHASE teacher, student, decode or
train. With DEVICE=cuda in the environment everything is on a GPU. With COMPILE=MODE, torch.compile compiles it in that mode
(default, reduce-overhead, max-autotune): each pass as a whole, LlamaGen's teacher step by step with a cache of fixed size,
VAR's block by block.
Prints one JSON object: seconds of each phase, the least of two or three repetitions, and under "compile" the seconds of
the two repetitions before, in which it is compiled. Needs torch alone; nothing here learns anything, so norms and heads are as
they are drawn.
"""

import json
import math
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

GUIDANCE = 2.0
DEVICE = os.environ.get("DEVICE", "cpu")
COMPILE = os.environ.get("COMPILE")


def compiled(f):
    """`f` compiled, once per shape; unchanged without COMPILE."""
    if not COMPILE:
        return f
    # A VAR teacher has ten shapes.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(f, mode=COMPILE, fullgraph=True, dynamic=False)


def rms(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


class LlamaBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x, turn, cache=None, at=0):
        b, l, c = x.shape
        q, k, v = self.wqkv(rms(x, self.norm1)).view(b, l, 3, self.heads, -1).unbind(2)
        q, k, v = rotate(q, turn).transpose(1, 2), rotate(k, turn).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            cache[0][:, :, at : at + l], cache[1][:, :, at : at + l] = k, v
            k, v = cache[0][:, :, : at + l], cache[1][:, :, : at + l]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self.wo(y.transpose(1, 2).reshape(b, l, c))
        h = rms(x, self.norm2)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def rotate(x, turn):
    """x (b, l, h, d); turn (l, d/2) complex, as cosine and sine in the last dimension."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    cos, sin = turn[None, :, None, :, 0], turn[None, :, None, :, 1]
    turned = [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin]
    return torch.stack(turned, -1).flatten(3).type_as(x)


class Continuous(nn.Module):
    def __init__(self, width, dim):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, width) * 0.02)
        self.linear = nn.Linear(width, dim)

    def forward(self, x, condition):
        shift, scale = (self.table[None] + condition).chunk(2, 1)
        return self.linear(F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift)


class LlamaGen(nn.Module):
    """Teacher and student in one: they share all but the embedding of tokens."""

    width, depth, heads, codes, dim, side, labels = 768, 12, 12, 16384, 8, 16, 1000

    def __init__(self):
        super().__init__()
        w, hidden = self.width, (8 * self.width // 3 + 255) // 256 * 256
        self.classes = nn.Embedding(self.labels + 1, w)
        self.tokens, self.vectors = nn.Embedding(self.codes, w), nn.Linear(self.dim, w)
        self.kinds = nn.Embedding(2, w)
        self.blocks = nn.ModuleList(LlamaBlock(w, self.heads, hidden) for _ in range(self.depth))
        self.norm = nn.Parameter(torch.ones(w))
        self.output = nn.Linear(w, self.codes, bias=False)
        self.continuous = Continuous(w, self.dim)
        self.length = self.side**2
        half = w // self.heads // 4
        angles = torch.outer(torch.arange(self.side), 10000 ** (-torch.arange(half) / half))
        rows = angles[:, None].expand(-1, self.side, -1)
        columns = angles[None].expand(self.side, -1, -1)
        turn = torch.cat([rows, columns], -1).flatten(0, 1)
        turn = torch.stack([turn.cos(), turn.sin()], -1)
        self.register_buffer("turn", torch.cat([torch.zeros_like(turn[:1]), turn]))

    def generate(self, labels):
        b = len(labels)
        rows = torch.cat([labels, torch.full_like(labels, self.labels)])
        shape = (2 * b, self.heads, self.length, self.width // self.heads)
        kind = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else torch.float32
        caches = [(torch.zeros(shape, dtype=kind), torch.zeros(shape, dtype=kind)) for _ in self.blocks]
        x = self.classes(rows)[:, None]
        for at in range(self.length):
            for block, cache in zip(self.blocks, caches):
                x = block(x, self.turn[at : at + 1], cache, at)
            cond, uncond = self.output(rms(x, self.norm)).chunk(2)
            ids = (uncond + GUIDANCE * (cond - uncond)).argmax(-1)
            x = self.tokens(ids.repeat(2, 1))
        return ids

    def generate_compiled(self, labels):
        """The same with a cache of fixed size, which a CUDA graph needs: `generate` has kernels for every length."""
        step = getattr(self, "_step", None) or LlamaStep(self, 2 * len(labels))
        object.__setattr__(self, "_step", step)
        x = self.classes(torch.cat([labels, torch.full_like(labels, self.labels)]))[:, None]
        for at in range(self.length):
            # A graph's result is overwritten by its next run.
            x = step.run(x, step.places[at : at + 1]).clone()
        return x

    def forced(self, ids, labels):
        """Logits of all tokens, each given those before it."""
        x = torch.cat([self.classes(labels)[:, None], self.tokens(ids[:, :-1])], 1)
        for block in self.blocks:
            x = block(x, self.turn[:-1])
        return self.output(rms(x, self.norm))

    def student(self, noise, labels):
        condition = self.classes(labels)[:, None]
        x = torch.cat([condition, self.vectors(noise)], 1)
        kinds = torch.zeros(x.shape[:2], dtype=torch.long)
        kinds[:, 0] = 1
        x = x + self.kinds(kinds)
        for block in self.blocks:
            x = block(x, self.turn)
        return self.output(rms(x, self.norm)[:, 1:]), self.continuous(x, condition)[:, 1:]


class LlamaGenL(LlamaGen):
    width, depth, heads = 1024, 24, 16


class LlamaStep(nn.Module):
    """One AR step of a teacher with its caches: the embedding of its input -> that of the chosen token."""

    def __init__(self, model, rows):
        super().__init__()
        object.__setattr__(self, "model", model)
        kind = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else torch.float32
        shape = (rows, model.heads, model.length, model.width // model.heads)
        for i in range(model.depth):
            self.register_buffer(f"k{i}", torch.zeros(shape, dtype=kind))
            self.register_buffer(f"v{i}", torch.zeros(shape, dtype=kind))
        self.register_buffer("places", torch.arange(model.length))
        self.run = compiled(self.forward)

    def forward(self, x, at):
        model, (b, _, c) = self.model, x.shape
        turn, sees = model.turn[at], (self.places <= at)[None, None, None]
        for i, block in enumerate(model.blocks):
            q, k, v = block.wqkv(rms(x, block.norm1)).view(b, 1, 3, model.heads, -1).unbind(2)
            q, k, v = rotate(q, turn).transpose(1, 2), rotate(k, turn).transpose(1, 2), v.transpose(1, 2)
            keys, values = getattr(self, f"k{i}"), getattr(self, f"v{i}")
            keys.index_copy_(2, at, k.to(keys.dtype))
            values.index_copy_(2, at, v.to(values.dtype))
            y = F.scaled_dot_product_attention(q, keys, values, sees)
            x = x + block.wo(y.transpose(1, 2).reshape(b, 1, c))
            h = rms(x, block.norm2)
            x = x + block.w2(F.silu(block.w1(h)) * block.w3(h))
        cond, uncond = model.output(rms(x, model.norm)).chunk(2)
        ids = (uncond + GUIDANCE * (cond - uncond)).argmax(-1)
        return model.tokens(ids.repeat(2, 1))


class VarBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.length = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, condition, mask=None, cache=None, kinds=None):
        b, l, c = x.shape
        g1, g2, s1, s2, t1, t2 = self.modulation(F.silu(condition)).view(b, 1, 6, c).unbind(2)
        h = F.layer_norm(x, (c,), eps=1e-6) * (1 + s1) + t1
        q, k, v = self.qkv(h).view(b, l, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (F.normalize(q, dim=-1) * self.length.exp()).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        x = x + g1 * self.proj(y.transpose(1, 2).reshape(b, l, c))
        if kinds is not None:
            x = x + kinds
        h = F.layer_norm(x, (c,), eps=1e-6) * (1 + s2) + t2
        return x + g2 * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class Var(nn.Module):
    """Teacher and student in one: they share all but what marks noise and data, and the mask."""

    depth, codes, dim, labels, scales = 16, 4096, 32, 1000, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

    def __init__(self):
        super().__init__()
        self.width = w = 64 * self.depth
        self.length = sum(n * n for n in self.scales)
        self.classes, self.embed = nn.Embedding(self.labels + 1, w), nn.Linear(self.dim, w)
        self.positions = nn.Parameter(torch.randn(1, 1 + self.length, w) * 0.02)
        self.codebook = nn.Embedding(self.codes, self.dim)
        self.phi = nn.ModuleList(nn.Conv2d(self.dim, self.dim, 3, padding=1) for _ in range(4))
        self.blocks = nn.ModuleList(VarBlock(w, self.depth) for _ in range(self.depth))
        self.kinds = nn.Embedding(2, w)
        self.layer_kinds = nn.ModuleList(nn.Linear(w, w) for _ in range(self.depth + 1))
        self.modulation = nn.Linear(w, 2 * w)
        self.head = nn.Linear(w, self.codes)
        self.continuous = Continuous(w, self.dim)
        scale = torch.cat([torch.full((n * n,), i + 1) for i, n in enumerate((0,) + self.scales) if n])
        scale = torch.cat([torch.zeros(1), scale])
        sees = (scale[:, None] > scale[None]) | torch.eye(len(scale), dtype=torch.bool)
        self.register_buffer("mask", sees)
        self.register_buffer("causal", scale[1:, None] >= scale[None, 1:])

    def logits(self, x, condition):
        scale, shift = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        return self.head(F.layer_norm(x, (self.width,), eps=1e-6) * (1 + scale) + shift)

    def generate(self, labels):
        rows = torch.cat([labels, torch.full_like(labels, self.labels)])
        condition = self.classes(rows)
        caches = [[] for _ in self.blocks]
        x, at = condition[:, None] + self.positions[:, :1], 0
        features = torch.zeros(len(labels), self.dim, self.scales[-1], self.scales[-1])
        for i, n in enumerate(self.scales):
            for block, cache in zip(self.blocks, caches):
                x = block(x, condition, None, cache)
            cond, uncond = self.logits(x, condition).chunk(2)
            t = GUIDANCE * i / (len(self.scales) - 1)
            ids = ((1 + t) * cond - t * uncond).argmax(-1)
            at += n * n
            if i + 1 < len(self.scales):
                codes = self.codebook(ids).transpose(1, 2).unflatten(2, (n, n))
                codes = F.interpolate(codes, self.scales[-1], mode="bicubic")
                features = features + 0.5 * codes + 0.5 * self.phi[i * 4 // 10](codes)
                m = self.scales[i + 1]
                view = F.interpolate(features, m, mode="area").flatten(2).transpose(1, 2)
                x = self.embed(view).repeat(2, 1, 1) + self.positions[:, at : at + m * m]
        return ids

    def forced(self, ids, labels):
        """Logits of all tokens, each given those of coarser scales. The tokenizer's part has no gradient."""
        with torch.no_grad():
            at, views, side = 0, [], self.scales[-1]
            features = torch.zeros(len(ids), self.dim, side, side)
            for i, n in enumerate(self.scales[:-1]):
                codes = self.codebook(ids[:, at : at + n * n]).transpose(1, 2).unflatten(2, (n, n))
                codes = F.interpolate(codes, side, mode="bicubic")
                features = features + 0.5 * codes + 0.5 * self.phi[i * 4 // 10](codes)
                views.append(F.interpolate(features, self.scales[i + 1], mode="area").flatten(2))
                at += n * n
        condition = self.classes(labels)
        x = self.embed(torch.cat(views, 2).transpose(1, 2))
        x = torch.cat([condition[:, None], x], 1) + self.positions[:, : self.length]
        for block in self.blocks:
            x = block(x, condition, self.causal)
        return self.logits(x, condition)

    def student(self, noise, labels):
        condition = self.classes(labels)
        x = torch.cat([condition[:, None], self.embed(noise)], 1) + self.positions
        kinds = torch.zeros(x.shape[:2], dtype=torch.long)
        kinds[:, 0] = 1
        kinds = self.kinds(kinds)
        x = x + kinds
        for block, layer in zip(self.blocks, self.layer_kinds):
            x = block(x, condition, self.mask, None, layer(kinds))
        x = x + self.layer_kinds[-1](kinds)
        return self.logits(x, condition)[:, 1:], self.continuous(x, condition[:, None])[:, 1:]


class Residual(nn.Module):
    def __init__(self, i, o, groups=32):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, i, 1e-6), nn.Conv2d(i, o, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, o, 1e-6), nn.Conv2d(o, o, 3, padding=1)
        self.shortcut = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    def __init__(self, c, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, 1e-6)
        self.qkv, self.out = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in self.qkv(self.norm(x)).chunk(3, 1))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.out(y.reshape(x.shape))


def middle(width, groups):
    return [Residual(width, width, groups), Attention(width, groups), Residual(width, width, groups)]


def encoder(dim, z, channels, multipliers, blocks, groups, colours):
    """The encoder of a VQ tokenizer, down to the codes' width."""
    width, layers = channels, [nn.Conv2d(colours, channels, 3, padding=1)]
    for i, multiplier in enumerate(multipliers):
        last = i + 1 == len(multipliers)
        for _ in range(blocks):
            layers.append(Residual(width, channels * multiplier, groups))
            width = channels * multiplier
            if last:
                layers.append(Attention(width, groups))
        if not last:
            layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)]
    layers += [*middle(width, groups), nn.GroupNorm(groups, width, 1e-6), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, z, 3, padding=1), nn.Conv2d(z, dim, 1))


def decoder(dim, z, channels, multipliers=(1, 1, 2, 2, 4), blocks=2, groups=32, colours=3):
    """The decoder of a VQ tokenizer; LlamaGen's maps codes of width 8 to z; VAR's codes already have that width."""
    width = multipliers[-1] * channels
    layers = [nn.Conv2d(dim, z, 1 if dim != z else 3, padding=0 if dim != z else 1)]
    layers += [nn.Conv2d(z, width, 3, padding=1), *middle(width, groups)]
    for i, multiplier in enumerate(reversed(multipliers)):
        for _ in range(blocks + 1):
            layers.append(Residual(width, channels * multiplier, groups))
            width = channels * multiplier
            if i == 0:
                layers.append(Attention(width, groups))
        if i + 1 < len(multipliers):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
    layers += [nn.GroupNorm(groups, width, 1e-6), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, colours, 3, padding=1))


COMPILED = []


def least(once):
    times = []
    if COMPILE:
        start = time.perf_counter()
        # Graphs are recorded in the second run.
        once(), once()
        COMPILED.append(time.perf_counter() - start)
    while len(times) < (3 if not times or times[0] <= 5 else 2):
        start = time.perf_counter()
        once()
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def main(family, dtype, batch, threads, *phases):
    torch.manual_seed(0)
    torch.set_num_threads(int(threads))
    torch.set_default_device(DEVICE)
    batch, result = int(batch), {}
    model = {"llamagen": LlamaGen, "llamagen-L": LlamaGenL, "var": Var}[family]()
    labels, noise = torch.arange(batch), torch.randn(batch, model.length, model.dim)
    cast = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bf16")
    with torch.no_grad(), cast:
        if "teacher" in phases:
            generate = model.generate
            if COMPILE and family == "var":
                for block in model.blocks:
                    block.forward = compiled(block.forward)
            elif COMPILE:
                generate = model.generate_compiled
            result["teacher"] = least(lambda: generate(labels))
        if "student" in phases:
            student = compiled(model.student)
            result["student"] = least(lambda: student(noise, labels))
        if "decode" in phases:
            images = decoder(8, 256, 128) if family != "var" else decoder(32, 32, 160)
            latents, images = torch.randn(batch, model.dim, 16, 16), compiled(images)
            result["decode"] = least(lambda: images(latents))
            del images
    if "train" in phases:
        targets = torch.arange(batch * model.length) * 37 % model.codes
        idle = {"tokens", "phi", "codebook"} | ({"positions"} if family != "var" else set())
        used = [p for name, p in model.named_parameters() if name.split(".")[0] not in idle]
        optimiser = torch.optim.AdamW(used, lr=1e-5, betas=(0.9, 0.95))

        student = compiled(model.student)

        def step():
            optimiser.zero_grad()
            with cast:
                logits, continuous = student(noise, labels)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets) + continuous.float().square().mean()
            loss.backward()
            optimiser.step()

        result["train"] = least(step)
    if COMPILE:
        result["compile"] = sum(COMPILED)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
