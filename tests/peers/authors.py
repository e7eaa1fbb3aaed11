#!/usr/bin/env python3
"""Runs one of our students in the released code of Distilled Decoding, and compares both outputs for the same noise.

    git clone https://github.com/microsoft/distilled_decoding
    pip install torch torchvision numpy huggingface_hub
    python3 tests/peers/authors.py distilled_decoding latest/student --steps 0,6 --retort target/release/retort

Draws noise, has retort sample with it and export the student and its tokenizer as published files, loads these with the
checkout's classes, in any size, and runs the loop of their scripts (VAR/sample.py and
LlamaGen/autoregressive/sample/eval_fewstep.py). Prints the differences of latents and images, and fails if they are large.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F

from published import arrays


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=pathlib.Path, help="a checkout of microsoft/distilled_decoding")
    parser.add_argument("student", help="the student's artifact: its hash, or RUN/STAGE")
    parser.add_argument("--steps", default="1", help="its passes: their number, or the AR steps from which they start (0,6)")
    parser.add_argument("--split", type=int, default=None, help="the AR step from which the continuous head's tokens are taken")
    parser.add_argument("--count", type=int, default=64, help="how many images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--retort", default="retort", help="the program")
    parser.add_argument("--store", default=".retort", help="its store")
    return parser.parse_args()


class Retort:
    """The program, with one directory for its output."""

    def __init__(self, options, folder):
        self.words = [options.retort, "--store", options.store]
        self.folder = folder

    def run(self, *words):
        subprocess.run([*self.words, *words], check=True, stdout=subprocess.DEVNULL)

    def ask(self, *words):
        return json.loads(subprocess.run([*self.words, *words, "--json"], check=True, stdout=subprocess.PIPE).stdout)

    def artifact(self, run, kind):
        return pathlib.Path(self.ask("artifacts", "list", run, "--kind", kind)[0]["path"])

    def export(self, student, network):
        path = self.folder / f"{network}.pth"
        self.run("artifacts", "export", student, "--as", "published", "--network", network, "-o", str(path))
        return torch.load(path, map_location="cpu", weights_only=True)

    def sample(self, options, noise, labels):
        """Latents (n, tokens, dim) and images in [0, 1]."""
        torch.save({"noise": noise}, self.folder / "noise.pt")
        words = ["sample", options.student, "-n", str(len(labels)), "--labels", ",".join(map(str, labels.tolist()))]
        words += ["--steps", options.steps, "--device", "cpu"]
        for setting in (
            f"images.noise={{file: {self.folder / 'noise.pt'}, tensor: noise}}",
            "images.latents=true",
            "images.images=f32",
        ):
            words += ["--set", setting]
        if options.split is not None:
            words += ["--set", f"images.sampler.split={options.split}"]
        self.run(*words)
        shards = sorted(self.artifact("latest", "samples").glob("shard-*.safetensors"))
        parts = [dict(arrays(shard)) for shard in shards]
        return (torch.cat([part[name] for part in parts]) for name in ("latents", "images"))


def resize(module, layers, sizes, groups, image_channels_of_decoder):
    """Makes the checkout build its tokenizer in other sizes than the published ones. `layers` defines its normalisation."""

    def resized(kind, sizes):
        return lambda **given: kind(**{**given, **sizes})

    outward = dict(sizes)
    outward[image_channels_of_decoder] = outward.pop("in_channels")
    module.Encoder, module.Decoder = resized(module.Encoder, sizes), resized(module.Decoder, outward)
    layers.Normalize = lambda channels, *_, **__: torch.nn.GroupNorm(groups, channels, eps=1e-6)


def published_sizes(config):
    tokenizer = config["tokenizer"]
    return {
        "ch": tokenizer["channels"],
        "ch_mult": tuple(tokenizer["multipliers"]),
        "num_res_blocks": tokenizer["res_blocks"],
        "in_channels": tokenizer["image_channels"],
    }


def llamagen(checkout, config, student, tokenizer):
    """The few-step sampler of LlamaGen/: (noise, labels, steps, split) -> latents, images."""
    sys.path[:0] = [str(checkout / "LlamaGen"), str(checkout / "LlamaGen" / "autoregressive")]
    from autoregressive.models import dd
    from tokenizer.tokenizer_image import vq_model

    size, image = config["network"], config["tokenizer"]
    resize(vq_model, vq_model, published_sizes(config), image["norm_groups"], "out_channels")
    vq = vq_model.VQModel(
        vq_model.ModelArgs(
            codebook_size=image["vocabulary"],
            codebook_embed_dim=image["codebook_dim"],
            codebook_l2_norm=image["l2_norm"],
            z_channels=image["z_channels"],
        )
    ).eval()
    vq.load_state_dict(tokenizer["model"])
    codebook = vq.quantize.embedding.weight.data
    codebook = F.normalize(codebook, p=2, dim=-1) if vq.quantize.l2_norm else codebook
    side = size["side"]
    network = dd.DDTransformer(
        dd.ModelArgs(
            dim=size["width"],
            n_layer=size["depth"],
            n_head=size["heads"],
            vocab_size=size["vocabulary"],
            block_size=side**2,
            num_classes=size["classes"],
            codebook_dim=size["codebook_dim"],
            codebook=codebook,
        )
    ).eval()
    missing, unknown = network.load_state_dict(student["ema"], strict=False)
    assert not missing and not unknown, (missing, unknown)

    def sample(noise, labels, steps, split):
        x = noise
        for step in steps:
            t = torch.full([len(labels)], float(step))
            x_t = network.perturb_data(x, t, noise)
            idx = (codebook[:, None, None, :] - x_t).square().sum(dim=-1).argmin(dim=0)
            found = network.final_predict(x_BLC=x_t, cond_idx=labels, timestep=t, idx=idx)
            x = network.get_final_x_BLC(found, side**2 if split is None else split)
        latents = x.reshape(len(labels), side, side, -1).permute(0, 3, 1, 2).contiguous()
        return x, (vq.decode(latents) + 1) / 2

    return sample


def var(checkout, config, student, tokenizer):
    """The few-step sampler of VAR/: (noise, labels, steps, split) -> latents, images."""
    sys.path.insert(0, str(checkout / "VAR"))
    from models import basic_vae, dd, vqvae

    size, image = config["network"], config["tokenizer"]
    resize(vqvae, basic_vae, published_sizes(config), image["norm_groups"], "in_channels")
    vae = vqvae.VQVAE(
        vocab_size=image["vocabulary"],
        z_channels=image["z_channels"],
        share_quant_resi=image["phi_convs"],
        v_patch_nums=tuple(image["scales"]),
    )
    vae.load_state_dict(tokenizer, strict=True)
    network = dd.DD_Model(
        vae_local=vae,
        num_classes=size["classes"],
        depth=size["depth"],
        embed_dim=size["width"],
        num_heads=size["heads"],
        shared_aln=size["shared_adaln"],
        attn_l2_norm=size["attn_l2_norm"],
        patch_nums=tuple(size["scales"]),
        flash_if_available=False,
        fused_if_available=False,
    ).eval()
    missing, unknown = network.load_state_dict(student["trainer"]["ema_parameters"], strict=False)
    assert not missing and not unknown, (missing, unknown)

    def sample(noise, labels, steps, split):
        x = noise
        for step in steps:
            t = torch.full([len(labels)], float(step))
            found = network.final_predict(labels, network.perturb_data(x, t, noise), t)
            x = network.get_final_sequence(*found, len(size["scales"]) if split is None else split)
        scales, start = size["scales"], 0
        f_hat = x.new_zeros(len(labels), network.Cvae, scales[-1], scales[-1])
        for i, side in enumerate(scales):
            part = x[:, start : start + side**2].transpose(1, 2).reshape(len(labels), network.Cvae, side, side)
            f_hat, _ = vae.quantize.get_next_autoregressive_input(i, len(scales), f_hat, part)
            start += side**2
        return x, vae.fhat_to_img(f_hat).add(1).mul(0.5)

    return sample


@torch.no_grad()
def main():
    options = arguments()
    if not (options.checkout / "VAR").is_dir() or not (options.checkout / "LlamaGen").is_dir():
        sys.exit(f"{options.checkout}: expected a checkout of microsoft/distilled_decoding, with VAR/ and LlamaGen/")
    with tempfile.TemporaryDirectory() as folder:
        retort = Retort(options, pathlib.Path(folder))
        student = retort.export(options.student, "own")
        tokenizer = retort.export(options.student, "tokenizer")
        run = options.student.split("/")[0]
        config = json.loads((retort.artifact(run, "student") / "config.json").read_text())
        size = config["network"]
        tokens = size["side"] ** 2 if "side" in size else sum(side**2 for side in size["scales"])
        random = torch.Generator().manual_seed(options.seed)
        noise = torch.randn([options.count, tokens, size["codebook_dim"]], generator=random)
        labels = torch.randint(0, size["classes"], [options.count], generator=random)
        numbers = [int(number) for number in options.steps.split(",")]
        steps = numbers if len(numbers) > 1 else config["timesteps"][: numbers[0]]
        ours = retort.sample(options, noise, labels)
        build = {"llamagen": llamagen, "var": var}[size["family"]]
        theirs = build(options.checkout.resolve(), config, student, tokenizer)(
            noise, labels, steps, options.split
        )
        failed = False
        for name, a, b in zip(("latents", "images"), ours, theirs):
            b = b.clamp(0, 1) if name == "images" else b
            apart = (a - b).abs()
            # Different tokens are not a rounding error: codes are chosen by the largest logit.
            differing = (apart.flatten(1).amax(1) > 1e-3).sum().item()
            print(f"{size['family']}: {name}: {len(a) - differing} of {len(a)} equal; largest difference {apart.max():.2g}, mean {apart.mean():.2g}")
            failed |= differing > len(a) // 100
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
