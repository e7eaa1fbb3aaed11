#!/usr/bin/env python3
"""Reference results in float64 where none are published: flan-t5's encoder by the usual package, LlamaGen conditioned on
captions and VAR without L2-normalised attention by their definitions, each on the whole sequence, without caches.

    captions.py          write tests/golden/captions, the reference of `make test`

Needs a separate virtual environment, with the versions that made the committed results:

    pip install torch==2.13.0 transformers==5.24.0 numpy==2.4.6 safetensors==0.8.0

Nothing is downloaded: all weights are procedural, as in measures.py; the tokenizer is made here. There is no published
student of captions: the one here is what plugins/engine/src/model/llamagen.rs says it is.
"""

import json
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/captions"

TEXTS = [
    "  A photo of a red apple on the   TABLE ",
    "two cats",
    "a photo of two red cats and a dog on the table, and of one apple near the cats and the dog",
]
# Random token ids, with one text long enough for the widest buckets of relative positions.
LENGTHS = [90, 5, 33]
T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
GPT = dict(width=48, depth=2, heads=2, vocabulary=64, codebook_dim=8, side=4, positions=12, features=32)
GUIDANCE = 2.0
MIDDLE, SPLIT = 6, 10
VAR = dict(width=16, depth=2, heads=2, vocabulary=12, dim=4, classes=5, scales=[1, 2, 3], convs=4)


def procedural(spec):
    """The tensor of a recipe, rounded to f32, in f64."""
    count = int(np.prod(spec["shape"], dtype=np.int64))
    with np.errstate(over="ignore"):
        z = np.uint64(spec["seed"]) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    u = (z >> np.uint64(40)).astype(np.float64) * 2.0**-24
    values = (spec["scale"] * (2 * u - 1) + spec["shift"]).astype(np.float32).reshape(spec["shape"])
    return torch.from_numpy(values).double()


def recipe(part, name, shape, scale, shift=0.0):
    # FNV-1a of part and name: a seed that does not depend on the other tensors.
    seed = 0xCBF29CE484222325
    for byte in f"{part}/{name}".encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    return {"name": name, "shape": list(shape), "seed": seed, "scale": scale, "shift": shift}


def specs(part, shapes, scales=()):
    """Matrices that preserve magnitudes, norms around one, small biases; `scales` overrides that."""
    made = []
    for name, shape in shapes.items():
        default = (math.sqrt(3 / shape[-1]), 0.0) if len(shape) > 1 else (0.2, 1.0 if "norm" in name else 0.0)
        scale, shift = next((s for end, s in scales if name.endswith(end)), default)
        made.append(recipe(part, name, shape, scale, shift))
    return made


def tensors(made):
    return {spec["name"]: procedural(spec) for spec in made}


def tokenizer():
    words = ["a", "photo", "of", "red", "apple", "on", "the", "table", "two", "cat", "and", "one"]
    pieces = [(f"▁{word}", -2.0 - 0.1 * i) for i, word in enumerate(words)]
    pieces += [("▁", -5.0), ("s", -4.0), (",", -4.0), ("es", -4.5)]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz." if letter != "s"]
    special = ["<pad>", "</s>", "<unk>"]
    made = Tokenizer(models.Unigram([(name, 0.0) for name in special] + pieces, unk_id=2, byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.add_special_tokens(special)
    return made


def t5(weights):
    """The package's encoder: from token ids to features."""
    network = T5EncoderModel(T5Config(**T5)).double().eval()
    state = network.state_dict()
    tied = {"encoder.embed_tokens.weight": weights["shared.weight"]}
    network.load_state_dict({name: tied.get(name, weights.get(name)) for name in state})

    def encode(texts):
        longest = max(len(ids) for ids in texts)
        ids = torch.tensor([list(text) + [0] * (longest - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        with torch.no_grad():
            found = network(ids, attention_mask=mask).last_hidden_state
        return [row[: len(text)] for row, text in zip(found, texts)]

    return encode


def t5_shapes():
    names = T5EncoderModel(T5Config(**T5)).state_dict()
    return {name: value.shape for name, value in names.items() if name != "encoder.embed_tokens.weight"}


def gpt_shapes(student):
    c = GPT
    w, hidden = c["width"], -(-(8 * c["width"] // 3) // 256) * 256
    shapes = {
        "cls_embedding.cap_proj.fc1.weight": (w, c["features"]),
        "cls_embedding.cap_proj.fc2.weight": (w, w),
        "norm.weight": (w,),
        "output.weight": (c["vocabulary"], w),
    }
    for i in range(c["depth"]):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * w, w),
            f"layers.{i}.attention.wo.weight": (w, w),
            f"layers.{i}.feed_forward.w1.weight": (hidden, w),
            f"layers.{i}.feed_forward.w3.weight": (hidden, w),
            f"layers.{i}.feed_forward.w2.weight": (w, hidden),
            f"layers.{i}.attention_norm.weight": (w,),
            f"layers.{i}.ffn_norm.weight": (w,),
        }
    if not student:
        return shapes | {
            "cls_embedding.uncond_embedding": (c["positions"], c["features"]),
            "tok_embeddings.weight": (c["vocabulary"], w),
        }
    return shapes | {
        "tok_embeddings.weight": (w, c["codebook_dim"]),
        "tok_embeddings.bias": (w,),
        "n_d_embed.weight": (2, w),
        "final_layer_conti.scale_shift_table": (2, w),
        "final_layer_conti.linear.weight": (c["codebook_dim"], w),
        "final_layer_conti.linear.bias": (c["codebook_dim"],),
    }


def rms(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w


class Gpt:
    """LlamaGen's transformer on whole sequences."""

    def __init__(self, weights):
        self.w = weights
        c = GPT
        pairs = c["width"] // c["heads"] // 2
        frequencies = 10000.0 ** (-torch.arange(0, pairs, 2, dtype=torch.float64) / pairs)
        row, column = torch.arange(c["side"] ** 2) // c["side"], torch.arange(c["side"] ** 2) % c["side"]
        angles = torch.cat([row[:, None] * frequencies, column[:, None] * frequencies], 1)
        table = torch.polar(torch.ones_like(angles), angles)
        # The caption's positions have zeros, not an identity rotation.
        self.rotation = torch.cat([torch.zeros(c["positions"], pairs, dtype=table.dtype), table])

    def front(self, features):
        inner = F.gelu(features @ self.w["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
        return inner @ self.w["cls_embedding.cap_proj.fc2.weight"].T

    def stack(self, x, mask):
        """x (b, T + l, C), mask (b, T) with 1 at a caption's tokens."""
        (b, l, w), heads, t = x.shape, GPT["heads"], GPT["positions"]
        sees = torch.ones(l, l, dtype=torch.bool).tril().repeat(b, 1, 1)
        sees[:, :, :t] &= mask[:, None, :].bool()
        sees |= torch.eye(l, dtype=torch.bool)
        for i in range(GPT["depth"]):
            part = lambda name: self.w[f"layers.{i}.{name}.weight"]
            qkv = rms(x, part("attention_norm")) @ part("attention.wqkv").T
            q, k, v = (y.reshape(b, l, heads, -1) for y in qkv.chunk(3, -1))
            turn = lambda y: torch.view_as_real(
                torch.view_as_complex(y.reshape(b, l, heads, -1, 2)) * self.rotation[None, :l, None]
            ).flatten(3)
            q, k, v = (y.transpose(1, 2) for y in (turn(q), turn(k), v))
            scores = q @ k.transpose(2, 3) / math.sqrt(w // heads)
            scores = scores.masked_fill(~sees[:, None], -math.inf)
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, l, w)
            x = x + y @ part("attention.wo").T
            y = rms(x, part("ffn_norm"))
            x = x + (F.silu(y @ part("feed_forward.w1").T) * (y @ part("feed_forward.w3").T)) @ part("feed_forward.w2").T
        return x

    def logits(self, x):
        return rms(x, self.w["norm.weight"]) @ self.w["output.weight"].T

    def next(self, features, mask, tokens):
        """Logits of the tokens after the condition and after each of `tokens` (b, l)."""
        x = torch.cat([self.front(features), self.w["tok_embeddings.weight"][tokens]], 1)
        return self.logits(self.stack(x, mask))[:, GPT["positions"] - 1 :]

    def generate(self, features, mask, choose):
        """Tokens (b, side^2) under guidance; the unconditional rows hide the same positions."""
        b = len(features)
        none = self.w["cls_embedding.uncond_embedding"].expand_as(features)
        tokens = torch.zeros(b, 0, dtype=torch.long)
        for position in range(GPT["side"] ** 2):
            logits = self.next(torch.cat([features, none]), mask.repeat(2, 1), tokens.repeat(2, 1))[:, -1]
            logits = logits[b:] + GUIDANCE * (logits[:b] - logits[b:])
            tokens = torch.cat([tokens, choose(logits, position)[:, None]], 1)
        return tokens

    def student(self, features, mask, x, known):
        """Logits and codebook vectors of the final sequence, from X_t (b, l, D), of which the first `known` are data."""
        front, t = self.front(features), GPT["positions"]
        embedded = x @ self.w["tok_embeddings.weight"].T + self.w["tok_embeddings.bias"]
        sequence = torch.cat([front, embedded], 1)
        kinds = (torch.arange(sequence.shape[1]) < t + known).long()
        h = self.stack(sequence + self.w["n_d_embed.weight"][kinds], mask)[:, t:]
        mean = (front * mask[:, :, None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        shift, scale = (self.w["final_layer_conti.scale_shift_table"][i] + mean for i in range(2))
        y = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        continuous = y @ self.w["final_layer_conti.linear.weight"].T + self.w["final_layer_conti.linear.bias"]
        return self.logits(h), continuous


def flow_map(logits, noise, codebook):
    """Tokens (b) of noise (b, D): dz/ds = sum_j w_j c_j, classic Runge-Kutta, uniform in t = s / (1 + s)."""
    log_p, square = logits.log_softmax(-1), (codebook * codebook).sum(-1)

    def weights(z, s):
        return (log_p + s * (z @ codebook.T) - s * s * square / 2).softmax(-1)

    def slope(z, t):
        return (weights(z, t / (1 - t)) @ codebook) / (1 - t) ** 2

    z, steps, end = noise, 3000, 0.995
    for i in range(steps):
        t, h = end * i / steps, end / steps
        a = slope(z, t)
        b = slope(z + h / 2 * a, t + h / 2)
        c = slope(z + h / 2 * b, t + h / 2)
        d = slope(z + h * c, t + h)
        z = z + h / 6 * (a + 2 * b + 2 * c + d)
    found = weights(z, end / (1 - end)).max(-1)
    assert found.values.min() > 0.99, "a token is not decided"
    return found.indices


def gpt_results(expected, features, mask, parts):
    c = GPT
    l, b = c["side"] ** 2, len(features)
    teacher, student = Gpt(tensors(parts["gpt"])), Gpt(tensors(parts["dd"]))
    specs_of_vq = json.loads((ROOT / "tests/golden/llamagen/weights.json").read_text())["vq"]
    codebook = next(procedural(s) for s in specs_of_vq if s["name"] == "quantize.embedding.weight")
    codebook = F.normalize(codebook, dim=-1)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(c["vocabulary"], (b, l), generator=generator)
    noise = torch.randn(b, l, c["codebook_dim"], generator=generator).float().double()
    none = teacher.w["cls_embedding.uncond_embedding"].expand_as(features)
    expected["forced.tokens"] = tokens
    expected["forced.logits"] = teacher.next(features, mask, tokens[:, :-1])
    expected["forced.logits_uncond"] = teacher.next(none, mask, tokens[:, :-1])
    expected["greedy.tokens"] = teacher.generate(features, mask, lambda logits, _: logits.argmax(-1))
    path = teacher.generate(features, mask, lambda logits, i: flow_map(logits, noise[:, i], codebook))
    expected["noise"], expected["trajectory.tokens"] = noise, path
    for t in [0, MIDDLE]:
        x = torch.cat([codebook[path[:, :t]], noise[:, t:]], 1)
        logits, continuous = student.student(features, mask, x, t)
        expected[f"student.t{t}.logits"], expected[f"student.t{t}.continuous"] = logits, continuous
    latents = noise
    for t in [0, MIDDLE]:
        x = torch.cat([latents[:, :t], noise[:, t:]], 1)
        logits, continuous = student.student(features, mask, x, t)
        predicted = torch.cat([codebook[logits.argmax(-1)][:, :SPLIT], continuous[:, SPLIT:]], 1)
        latents = torch.cat([x[:, :t], predicted[:, t:]], 1)
    expected["two_step.latents"] = latents


def var_shapes():
    c = VAR
    w, d, l = c["width"], c["dim"], sum(n * n for n in c["scales"])
    linear = lambda name, i, o: {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
    shapes = {"class_emb.weight": (c["classes"] + 1, w), "pos_start": (1, 1, w), "pos_1LC": (1, l, w)}
    shapes |= {"lvl_embed.weight": (len(c["scales"]), w)} | linear("word_embed", d, w)
    for i in range(c["depth"]):
        block = f"blocks.{i}."
        shapes |= {f"{block}attn.mat_qkv.weight": (3 * w, w), f"{block}attn.q_bias": (w,), f"{block}attn.v_bias": (w,)}
        shapes |= linear(f"{block}attn.proj", w, w) | linear(f"{block}ada_lin.1", w, 6 * w)
        shapes |= linear(f"{block}ffn.fc1", w, 4 * w) | linear(f"{block}ffn.fc2", 4 * w, w)
    return shapes | linear("head_nm.ada_lin.1", w, 2 * w) | linear("head", w, c["vocabulary"])


def quantiser_shapes():
    c = VAR
    shapes = {"quantize.embedding.weight": (c["vocabulary"], c["dim"])}
    for i in range(c["convs"]):
        name = f"quantize.quant_resi.qresi_ls.{i}"
        shapes |= {f"{name}.weight": (c["dim"], c["dim"], 3, 3), f"{name}.bias": (c["dim"],)}
    return shapes


def var_results(expected, parts):
    """Teacher-forced logits, attention without L2 norms."""
    c, w, q = VAR, tensors(parts["var"]), tensors(parts["quantiser"])
    scales, side, width, heads = c["scales"], c["scales"][-1], c["width"], c["heads"]
    labels = torch.tensor([1, 4])
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(c["vocabulary"], (2, sum(n * n for n in scales)), generator=generator)
    ticks = np.linspace(1 / 3 / c["convs"], 1 - 1 / 3 / c["convs"], c["convs"])
    inputs, total, start = [], 0, 0
    for k, n in enumerate(scales[:-1]):
        codes = q["quantize.embedding.weight"][tokens[:, start : start + n * n]]
        start += n * n
        h = F.interpolate(codes.transpose(1, 2).reshape(2, -1, n, n), size=(side, side), mode="bicubic")
        conv = f"quantize.quant_resi.qresi_ls.{np.argmin(np.abs(ticks - k / (len(scales) - 1)))}"
        total = total + 0.5 * h + 0.5 * F.conv2d(h, q[f"{conv}.weight"], q[f"{conv}.bias"], padding=1)
        seen = F.interpolate(total, size=(scales[k + 1],) * 2, mode="area")
        inputs.append(seen.flatten(2).transpose(1, 2))
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)
    level = torch.tensor([k for k, n in enumerate(scales) for _ in range(n * n)])
    condition = w["class_emb.weight"][labels]
    first = condition[:, None] + w["pos_start"]
    x = torch.cat([first, linear(torch.cat(inputs, 1), "word_embed")], 1)
    x = x + w["lvl_embed.weight"][level] + w["pos_1LC"]
    hidden = level[None, :] > level[:, None]
    for i in range(c["depth"]):
        block = f"blocks.{i}."
        six = linear(F.silu(condition), f"{block}ada_lin.1").reshape(2, 1, 6, width).unbind(2)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six
        bias = torch.cat([w[f"{block}attn.q_bias"], torch.zeros(width).double(), w[f"{block}attn.v_bias"]])
        y = norm(x) * (1 + scale1) + shift1
        qkv = y @ w[f"{block}attn.mat_qkv.weight"].T + bias
        a, b, v = (part.reshape(2, -1, heads, width // heads).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = a @ b.transpose(2, 3) * (0.25 / math.sqrt(width // heads))
        y = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        x = x + gamma1 * linear(y.transpose(1, 2).reshape(2, -1, width), f"{block}attn.proj")
        y = linear(norm(x) * (1 + scale2) + shift2, f"{block}ffn.fc1")
        x = x + gamma2 * linear(F.gelu(y, approximate="tanh"), f"{block}ffn.fc2")
    scale, shift = linear(F.silu(condition), "head_nm.ada_lin.1").reshape(2, 1, 2, width).unbind(2)
    expected["var.labels"], expected["var.tokens"] = labels, tokens
    expected["var.logits"] = linear(norm(x) * (1 + scale) + shift, "head")


def main():
    parts = {
        "t5": specs("t5", t5_shapes(), [("q.weight", (0.5, 0.0)), ("relative_attention_bias.weight", (1.0, 0.0))]),
        "gpt": specs("gpt", gpt_shapes(False), [("uncond_embedding", (1.5, 0.0)), ("tok_embeddings.weight", (2.0, 0.0))]),
        "dd": specs("dd", gpt_shapes(True)),
        "var": specs("var", var_shapes()),
        "quantiser": specs("quantiser", quantiser_shapes(), [("embedding.weight", (1.7, 0.0))]),
    }
    expected = {}
    encode = t5(tensors(parts["t5"]))
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(T5["vocab_size"], (n,), generator=generator).tolist() for n in LENGTHS]
    for i, (ids, found) in enumerate(zip(texts, encode(texts))):
        expected[f"t5.{i}.ids"], expected[f"t5.{i}.features"] = torch.tensor(ids), found

    pieces, t = tokenizer(), GPT["positions"]
    pieces.enable_truncation(t)
    captions = [pieces.encode(" ".join(text.lower().split())).ids for text in TEXTS]
    assert len(captions[2]) == t and captions[2][-1] == 1 and len(captions[1]) < t
    pieces.no_truncation()
    features, mask = torch.zeros(len(TEXTS), t, T5["d_model"]).double(), torch.zeros(len(TEXTS), t).double()
    for i, (ids, found) in enumerate(zip(captions, encode(captions))):
        features[i, t - len(ids) :], mask[i, t - len(ids) :] = found, 1
        expected[f"caption.{i}.ids"] = torch.tensor(ids)
    expected["features"], expected["mask"] = features, mask
    gpt_results(expected, features, mask, parts)
    var_results(expected, parts)

    GOLDEN.mkdir(parents=True, exist_ok=True)
    lines = {part: ",\n".join("  " + json.dumps(spec) for spec in made) for part, made in parts.items()}
    text = ",\n".join(f'"{part}": [\n{body}\n]' for part, body in lines.items())
    (GOLDEN / "weights.json").write_text("{\n" + text + "\n}\n")
    numbers = {"gpt": GPT, "var": VAR, "guidance": GUIDANCE, "t_mid": MIDDLE, "split_t": SPLIT, "texts": TEXTS}
    (GOLDEN / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (GOLDEN / "config.json").write_text(json.dumps(T5, indent=1) + "\n")
    pieces.save(str(GOLDEN / "tokenizer.json"))
    narrow = lambda x: x.numpy().astype(np.float32) if x.is_floating_point() else x.numpy()
    save_file({name: np.ascontiguousarray(narrow(x)) for name, x in expected.items()}, GOLDEN / "expected.safetensors")
    for name in ["greedy.tokens", "trajectory.tokens"]:
        print(name, expected[name].tolist())


if __name__ == "__main__":
    main()
