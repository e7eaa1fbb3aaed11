#!/usr/bin/env python3
"""The stages of the speed bench in plain PyTorch: training steps, the reading of images, sampling with what follows.

    stages.py ROW DTYPE THREADS

ROW is the JSON in which tests/src/speed/stage_row.rs describes a row: the stage's options, the shapes of the networks, the
batch. DTYPE is f32 or bf16 (autocast). With COMPILE=MODE in the environment, torch.compile compiles the passes; optimisers
and averages stay torch's own loops over all tensors.
Prints one JSON object: the seconds of a step, the least of at least five, and under "compile" those of the two steps before, in
which it is compiled. It is empty if the row cannot run here: images need Pillow. Needs torch; nothing here learns anything.
"""

import json
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import speed
from speed import COMPILE, compiled


def least(once):
    """Seconds of the fastest of at least five runs that take three seconds, after two others; fewer if they are slow."""
    start = time.perf_counter()
    once(), once()
    before, times = time.perf_counter() - start, []
    while not (len(times) >= 5 and sum(times) >= 3 or len(times) >= 2 and sum(times) >= 20):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times)} | ({"compile": before} if COMPILE else {})


class Optimiser:
    """AdamW with the gradient's norm limited to 1, and a moving average if a recipe has one."""

    def __init__(self, model, train, parameters=None):
        self.model, self.parameters = model, list(parameters or model.parameters())
        rate = train["learning_rate"]
        self.adamw = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        self.average = None
        if train["ema"]:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(train["ema"]))

    def step(self, loss):
        self.adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        if self.average:
            self.average.update_parameters(self.model)


class Tokenizer(nn.Module):
    def __init__(self, c):
        super().__init__()
        dim, z = c["codebook_dim"], c["z_channels"]
        shape = c["channels"], c["multipliers"], c["res_blocks"], c["norm_groups"], c["image_channels"]
        self.encoder = speed.encoder(dim, z, *shape)
        decoder = speed.decoder(dim, z, *shape)
        # Apart: the adversary's weight compares gradients of its kernel.
        self.decoder, self.last = decoder[:-1], decoder[-1]
        self.codebook = nn.Parameter(torch.randn(c["vocabulary"], dim))

    def forward(self, images):
        """What the last convolution reads, and the loss of the codebook with the commitment loss."""
        z = self.encoder(images)
        b, d, h, w = z.shape
        z = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, d).float(), dim=-1)
        codes = F.normalize(self.codebook, dim=-1)
        chosen = F.embedding((z.detach() @ codes.detach().T).argmax(-1), codes)
        loss = F.mse_loss(chosen, z.detach()) + 0.25 * F.mse_loss(z, chosen.detach())
        through = z + (chosen - z).detach()
        return self.decoder(through.view(b, h, w, d).permute(0, 3, 1, 2)), loss

    def decode(self, codes):
        return self.last(self.decoder(codes))


class Lpips(nn.Module):
    """LPIPS on VGG-16: the mean over five maps of weighted squares between unit vectors of channels."""

    def __init__(self):
        super().__init__()
        width, self.stages, self.linear = 3, nn.ModuleList(), nn.ModuleList()
        for count, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            layers = [nn.MaxPool2d(2)] if self.stages else []
            for _ in range(count):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
            self.stages.append(nn.Sequential(*layers))
            self.linear.append(nn.Conv2d(channels, 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, a, b):
        a, b = ((x - self.shift) / self.scale for x in (a, b))
        distance = 0.0
        for stage, linear in zip(self.stages, self.linear):
            a, b = stage(a), stage(b)
            square = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
            distance = distance + linear(square).mean()
        return distance


def discriminator(width=64, layers=3):
    """A PatchGAN."""
    stack = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for layer in range(1, layers + 1):
        i, o = width << min(layer - 1, 3), width << min(layer, 3)
        stride = 2 if layer < layers else 1
        stack += [nn.Conv2d(i, o, 4, stride, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
    return nn.Sequential(*stack, nn.Conv2d(o, 1, 4, 1, 1))


def tokenizer(row, cast):
    options, c = row["options"], row["tokenizer"]
    model = Tokenizer(c)
    optimiser = Optimiser(model, options["train"])
    images = torch.rand(row["batch"], c["image_channels"], c["image_size"], c["image_size"]) * 2 - 1
    forward = compiled(model.forward)

    def step():
        with cast:
            features, loss = forward(images)
            made = model.last(features)
            loss = loss + F.mse_loss(made.float(), images)
        optimiser.step(loss)

    if "adversarial" not in options:
        return least(step)

    # Gradients at the last kernel are taken before those of all parameters.
    torch._functorch.config.donated_buffer = False
    metric, judge = Lpips(), discriminator()
    second = Optimiser(judge, options["train"])
    compare, judging = compiled(metric.forward), compiled(judge.forward)

    def pull(loss):
        return torch.autograd.grad(loss, model.last.weight, retain_graph=True)[0].norm()

    def adversarial_step():
        judge.requires_grad_(False)
        with cast:
            features, loss = forward(images)
            made = model.last(features)
            near = F.mse_loss(made.float(), images) + compare(made, images)
            fooled = -judging(made).mean()
        weight = (pull(near) / (pull(fooled) + 1e-4)).clamp(max=1e4).detach()
        optimiser.step(loss + near + 0.5 * weight * fooled)
        judge.requires_grad_(True)
        with cast:
            real, fake = judging(images), judging(made.detach())
            hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        second.step(hinge)

    return least(adversarial_step)


def network(row):
    """A LlamaGen or VAR of the row's shape."""
    n = row["network"]
    names = {"depth": n["depth"], "codes": n["vocabulary"], "dim": n["codebook_dim"], "labels": n["classes"]}
    if n["family"] == "var":
        return type("Own", (speed.Var,), names | {"scales": tuple(n["scales"])})()
    names |= {"width": n["width"], "heads": n["heads"], "side": n["side"]}
    return type("Own", (speed.LlamaGen,), names)()


def labels_of(row, count):
    return torch.arange(count) % row["network"]["classes"]


def pretrain(row, cast):
    model = network(row)
    ids = torch.arange(row["batch"] * model.length) * 37 % model.codes
    seen, labels = ids.view(row["batch"], -1), labels_of(row, row["batch"])
    return next_tokens(row, cast, model, lambda forced: forced(seen, labels), model.forced, ids)


def distill(row, cast):
    row["network"]["depth"] = row["options"]["depth"]
    model = network(row)
    ids = torch.arange(row["batch"] * model.length) * 37 % model.codes
    noise, labels = torch.randn(row["batch"], model.length, model.dim), labels_of(row, row["batch"])
    return next_tokens(row, cast, model, lambda student: student(noise, labels)[0], model.student, ids)


def next_tokens(row, cast, model, logits, of, ids):
    """Steps of cross-entropy on the logits that `logits` takes from the pass `of`."""
    run = compiled(of)
    with cast:
        F.cross_entropy(logits(of).flatten(0, 1).float(), ids).backward()
    # Teacher and student are one class here: each leaves some parameters of the other without a gradient.
    used = [p for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    optimiser = Optimiser(model, row["options"]["train"], used)

    def step():
        with cast:
            loss = F.cross_entropy(logits(run).flatten(0, 1).float(), ids)
        optimiser.step(loss)

    return least(step)


def sample(row, cast):
    c, model = row["tokenizer"], network(row)
    decode = compiled(Tokenizer(c).decode)
    codebook = F.normalize(torch.randn(model.codes, model.dim), dim=-1)
    channels, side = c["image_channels"], c["image_size"]
    layers, width, wide = [nn.Conv2d(channels, 32, 3, padding=1), nn.SiLU()], 32, 64
    while side > 2:
        layers += [nn.Conv2d(width, wide, 3, 2, padding=1), nn.SiLU()]
        side, width = (side + 1) // 2, wide
    layers += [nn.Flatten(), nn.Linear(width * side * side, row["features"]), nn.SiLU()]
    features, student = compiled(nn.Sequential(*layers).forward), compiled(model.student)
    count, batch = row["count"], row["batch"]
    assert count % batch == 0

    def once():
        found = []
        with torch.no_grad(), cast:
            for _ in range(count // batch):
                noise, labels = torch.randn(batch, model.length, model.dim), labels_of(row, batch)
                ids = student(noise, labels)[0].argmax(-1)
                codes = codebook[ids].view(batch, model.side, model.side, -1).permute(0, 3, 1, 2)
                images = (decode(codes).clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)
                found.append(features(images.float() / 127.5 - 1).float())
        return torch.cat(found)

    assert once().shape == (count, row["features"])
    return least(once)


def images(row, cast):
    try:
        from PIL import Image
    except ImportError:
        return {}
    folder, side = row["folder"], row["side"]
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            image = Image.open(paths[index]).convert("RGB").resize((side, side), Image.BICUBIC)
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            return pixels.view(side, side, 3).permute(2, 0, 1).float() / 127.5 - 1

    # The workers start before the first pass, which is not counted.
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=32, num_workers=2, persistent_workers=True)
    return least(lambda: sum(len(batch) for batch in loader))


def main(row, dtype, threads):
    torch.manual_seed(0)
    torch.set_num_threads(int(threads))
    row = json.loads(row)
    if row["kind"] == "images" and (COMPILE or dtype != "f32"):
        return print("{}")
    cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
    kinds = {"tokenizer": tokenizer, "pretrain": pretrain, "distill": distill, "sample": sample, "images": images}
    print(json.dumps(kinds[row["kind"]](row, cast)))


if __name__ == "__main__":
    main(*sys.argv[1:])
