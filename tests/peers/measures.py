#!/usr/bin/env python3
"""The measuring networks and figures, computed by the usual packages.

    measures.py golden           write tests/golden/measures, the reference of `make test`
    measures.py check RETORT     run a recipe with the binary RETORT and compare its evaluation with these packages

Needs a separate virtual environment, with the versions that made the committed results:

    pip install torch==2.13.0 torchvision==0.28.0 pytorch-fid==0.3.0 lpips==0.1.4 torch-fidelity==0.4.0 \
        numpy==2.4.6 scipy==1.17.1 safetensors==0.8.0 pillow==13.0.0

Nothing is downloaded: all weights are procedural. Element i of a tensor is scale (2 u - 1) + shift, where u is number
i + 1 of SplitMix64 started at `seed`, its upper 24 bits over 2^24.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import lpips
import numpy as np
import pytorch_fid.fid_score as fid
import pytorch_fid.inception as fid_inception
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
import torchvision
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/measures"
SPLITS = 10
NEIGHBOURS = 3


def procedural(spec):
    """The tensor of a recipe, f32."""
    count = int(np.prod(spec["shape"], dtype=np.int64))
    with np.errstate(over="ignore"):
        z = np.uint64(spec["seed"]) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    u = (z >> np.uint64(40)).astype(np.float64) * 2.0**-24
    return (spec["scale"] * (2 * u - 1) + spec["shift"]).astype(np.float32).reshape(spec["shape"])


def recipe(name, shape, scale, shift=0.0):
    # FNV-1a of the name: a seed that does not depend on the other tensors.
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    return {"name": name, "shape": list(shape), "seed": seed, "scale": scale, "shift": shift}


def uniform_he(shape):
    return float(np.sqrt(6 / np.prod(shape[1:])))


def tensors(specs):
    return {spec["name"]: torch.from_numpy(procedural(spec)) for spec in specs}


def vgg_specs():
    specs = []
    for name, value in torchvision.models.vgg16(weights=None).features.state_dict().items():
        scale = uniform_he(value.shape) if value.dim() == 4 else 0.1
        specs.append(recipe(f"features.{name}", value.shape, scale))
    return specs


def linear_specs():
    widths = [64, 128, 256, 512, 512]
    return [recipe(f"lin{i}.model.1.weight", (1, width, 1, 1), 0.5, 0.5) for i, width in enumerate(widths)]


def inception_specs():
    # The layers of the network, without the download that its constructor starts.
    fid_inception.load_state_dict_from_url = lambda *_, **__: {}
    load, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, lambda *_, **__: None
    network = fid_inception.fid_inception_v3()
    torch.nn.Module.load_state_dict = load
    kinds = {
        "bn.weight": (0.2, 1.0),
        "bn.bias": (0.2, 0.0),
        "bn.running_mean": (0.2, 0.0),
        "bn.running_var": (0.4, 1.0),
        "fc.bias": (0.5, 0.0),
    }
    specs = []
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        scale, shift = next((kind for end, kind in kinds.items() if name.endswith(end)), (uniform_he(value.shape), 0.0))
        specs.append(recipe(name, value.shape, scale, shift))
    return specs


def inception(state, dims=2048):
    """pytorch-fid's network."""
    fid_inception.load_state_dict_from_url = lambda *_, **__: state
    return fid_inception.InceptionV3([fid_inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()


def all_features(state):
    """A function from images in [0, 1] to pytorch-fid's features of every depth, and spatial ones."""
    fid_inception.load_state_dict_from_url = lambda *_, **__: state
    network = fid_inception.InceptionV3([0, 1, 2, 3]).eval()
    spatial = []
    network.blocks[2][6].branch1x1.register_forward_hook(lambda _, __, out: spatial.append(out))

    def look(images):
        spatial.clear()
        with torch.no_grad():
            maps = network(images)
        found = {str(m.shape[1]): m.mean((2, 3)).numpy() for m in maps}
        # ADM's evaluation suite: the first seven channels of mixed_6/conv, channels last.
        found["spatial"] = spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1).numpy()
        return found

    return look


def fidelity_network(state, dims="2048"):
    """torch-fidelity's network, which prepares images as TensorFlow 1 does: features and logits of uint8 images."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        return fidelity.FeatureExtractorInceptionV3(
            "inception", [dims, "logits_unbiased"], feature_extractor_weights_path=file.name
        )


def perceptual(vgg, linear):
    """The lpips package's network."""
    made = torchvision.models.vgg16
    torchvision.models.vgg16 = lambda **_: made(weights=None)
    network = lpips.LPIPS(net="vgg", pretrained=False, verbose=False).eval()
    torchvision.models.vgg16 = made
    for name, value in network.net.state_dict().items():
        value.copy_(vgg["features." + name.split(".", 1)[1]])
    for i in range(5):
        getattr(network, f"lin{i}").model[1].weight.data.copy_(linear[f"lin{i}.model.1.weight"])
    return network


def quantised(x):
    return np.floor(np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def golden():
    parts = {"vgg": vgg_specs(), "linear": linear_specs(), "inception": inception_specs()}
    # Images vary in brightness and contrast; grey ones have one channel.
    sizes = {"small": (2, 3, 48, 64), "exact": (2, 3, 299, 299), "large": (1, 3, 320, 310), "grey": (1, 1, 32, 32)}
    parts["images"] = [
        recipe(f"{name}.{i}", shape[1:], 0.5 / (i + 1), 0.5 - 0.1 * i)
        for name, shape in sizes.items()
        for i in range(shape[0])
    ]
    parts["pairs"] = [recipe(f"{side}.{i}", (3, 40, 48), 1.0 / (i + 1), 0.1 * i) for i in range(2) for side in "ab"]
    parts["sets"] = [
        recipe("real", (300, 48), 1.0, 0.2),
        recipe("fake", (260, 48), 0.9, 0.25),
        recipe("few", (30, 48), 1.0, 0.2),
        recipe("logits", (203, 30), 4.0),
    ]
    expected = {}

    network = perceptual(tensors(parts["vgg"]), tensors(parts["linear"]))
    pairs = tensors(parts["pairs"])
    a, b = (torch.stack([pairs[f"{side}.{i}"] for i in range(2)]) for side in "ab")
    a.requires_grad_()
    distance = network(a, b)
    distance.sum().backward()
    expected["lpips.distance"] = distance.detach().flatten().numpy()
    expected["lpips.gradient"] = a.grad.numpy()
    a1, b1 = a.detach()[:, :1], b[:, :1]
    with torch.no_grad():
        expected["lpips.grey"] = network(a1.expand(-1, 3, -1, -1), b1.expand(-1, 3, -1, -1)).flatten().numpy()

    state = tensors(parts["inception"])
    look, tensorflow = all_features(state), fidelity_network(state)
    images = tensors(parts["images"])
    for name, shape in sizes.items():
        bytes_ = np.stack([quantised(images[f"{name}.{i}"].numpy()) for i in range(shape[0])])
        x = torch.from_numpy(bytes_).expand(-1, 3, -1, -1)
        for key, value in look(x.float() / 255).items():
            expected[f"inception.{name}.{key}"] = value
        with torch.no_grad():
            features, logits = tensorflow(x)
        expected[f"tensorflow.{name}.2048"], expected[f"tensorflow.{name}.logits"] = features.numpy(), logits.numpy()

    sets = {name: value.numpy() for name, value in tensors(parts["sets"]).items()}
    moments = {name: (np.mean(sets[name].astype(np.float64), 0), np.cov(sets[name].astype(np.float64), rowvar=False))
               for name in ["real", "fake", "few"]}
    frechet = {
        "fake": fid.calculate_frechet_distance(*moments["real"], *moments["fake"]),
        # Singular: pytorch-fid's matrix root is inexact there, so the definition is computed by eigenvectors.
        "few": frechet_by_eigenvectors(moments["real"], moments["few"]),
    }
    assert abs(frechet["fake"] - frechet_by_eigenvectors(moments["real"], moments["fake"])) < 1e-9
    score = isc_features_to_metric(torch.from_numpy(sets["logits"]), splits=SPLITS, shuffle=False)
    both = prc_features_to_metric(
        torch.from_numpy(sets["fake"]), torch.from_numpy(sets["real"]),
        prc_neighborhood=NEIGHBOURS, prc_batch_size=10000, save_cpu_ram=False, verbose=False,
    )
    expected["sets.mean"], expected["sets.covariance"] = moments["real"]
    expected["sets.figures"] = np.array([
        frechet["fake"], frechet["few"], score["inception_score_mean"], score["inception_score_std"],
        both["precision"], both["recall"],
    ])
    GOLDEN.mkdir(parents=True, exist_ok=True)
    lines = {part: ",\n".join("  " + json.dumps(spec) for spec in specs) for part, specs in parts.items()}
    text = ",\n".join(f'"{part}": [\n{body}\n]' for part, body in lines.items())
    (GOLDEN / "weights.json").write_text("{\n" + text + "\n}\n")
    save_file({name: np.ascontiguousarray(value) for name, value in expected.items()}, GOLDEN / "expected.safetensors")
    print("figures:", expected["sets.figures"], "lpips:", expected["lpips.distance"])


def frechet_by_eigenvectors(a, b):
    def root(matrix):
        values, vectors = scipy.linalg.eigh(matrix)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T

    half = root(a[1])
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(half @ b[1] @ half), 0)).sum()
    return np.sum((a[0] - b[0]) ** 2) + np.trace(a[1]) + np.trace(b[1]) - 2 * cross


RECIPE = """
version: 1
seed: 3
backend: candle
device: cpu
params:
  data: {{csv: "{data}", height: 8, width: 8, max: 16}}
stages:
  codes:
    kind: tokenizer
    data: ${{params.data}}
    codebook_size: 16
    codebook_dim: 4
    channels: 8
    z_channels: 8
    train: {{steps: 60, batch: 32}}
  teacher:
    kind: pretrain
    tokenizer: codes
    data: ${{params.data}}
    width: 32
    depth: 2
    heads: 2
    train: {{steps: 60, batch: 32}}
  pairs:
    kind: trajectories
    teacher: teacher
    count: 64
  student:
    kind: distill
    teacher: teacher
    trajectories: pairs
    timesteps: [0]
    train: {{steps: 20, batch: 32}}
  made:
    kind: sample
    seed: 5
    sampler: {{kind: flow, teacher: teacher}}
    count: {count}
    resize: 32
  student-made:
    kind: sample
    seed: 5
    sampler: {{kind: student, student: student, timesteps: [0]}}
    count: {count}
    resize: 32
  evaluation:
    kind: evaluate
    data: ${{params.data}}
    inception: inception.pth
    dims: 64
    save_statistics: true
    samples: {{made: made, student: student-made}}
    kernel: {{}}
    lpips: {{vgg: vgg.pth, linear: linear.pth, beside: made}}
  reference:
    kind: evaluate
    statistics: reference.npz
    inception: inception.pth
    dims: 64
    samples: {{made: made}}
  tensorflow:
    kind: evaluate
    data: ${{params.data}}
    inception: inception.pth
    dims: 64
    preparation: [pytorch, tensorflow]
    samples: {{made: made}}
"""
COUNT = 90


def run(retort, folder, state, rows):
    """Runs the recipe: the reports by stage, the sets of samples (n, 1, 32, 32), uint8, and the saved statistics."""
    # The last lines must not remove the only image of a class.
    (folder / "some.csv").write_text("\n".join(rows) + "\n")
    # The published file contains counters besides the weights.
    norms = [name.removesuffix("running_mean") for name in state if name.endswith("running_mean")]
    counters = {f"{name}num_batches_tracked": torch.tensor(0) for name in norms}
    torch.save(state | counters, folder / "inception.pth")
    torch.save(tensors(vgg_specs()), folder / "vgg.pth")
    torch.save(tensors(linear_specs()), folder / "linear.pth")
    (folder / "recipe.yaml").write_text(RECIPE.format(data="some.csv", count=COUNT))
    store = ["--store", str(folder / "store")]
    subprocess.run([retort, "run", "recipe.yaml", *store], cwd=folder, check=True, stdout=sys.stderr)
    shown = subprocess.run(
        [retort, "query", "--json", *store, "select stage, output from v_stages"],
        cwd=folder, check=True, capture_output=True, text=True,
    )
    paths = {row["stage"]: folder / "store/artifacts" / row["output"] for row in json.loads(shown.stdout)}
    reports = {
        stage: json.loads((paths[stage] / "evaluation.json").read_text())["sets"]
        for stage in ["evaluation", "reference", "tensorflow"]
    }
    made = {}
    for name, stage in [("made", "made"), ("student", "student-made")]:
        shards = json.loads((paths[stage] / "manifest.json").read_text())["shards"]
        made[name] = np.concatenate([load_file(paths[stage] / shard["file"])["images"] for shard in shards])
    return reports, made, np.load(paths["evaluation"] / "statistics.npz")


def check(retort):
    """End to end: images through the binary, and the same images as PNG files through the packages."""
    state = tensors(inception_specs())
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rows = (ROOT / "recipes/data/digits.csv").read_text().splitlines()[:COUNT]
        real = np.array([row.split(",")[:64] for row in rows], np.float32).reshape(-1, 1, 8, 8) / 16
        real = quantised(real)
        # Like the images in ADM's reference files: channels last.
        np.savez(folder / "reference.npz", arr_0=real.repeat(3, 1).transpose(0, 2, 3, 1))
        reports, sets, saved = run(retort, folder, state, rows)
        sets = {"real": real, **sets}
        look, fidelity_look, figures = all_features(state), fidelity_network(state, "64"), {}
        for name, images in sets.items():
            files = folder / name
            files.mkdir()
            for i, image in enumerate(images):
                Image.fromarray(image[0]).save(files / f"{i:06}.png")
            paths = sorted(files.glob("*.png"))
            network = inception(state, 64)
            figures[name] = fid.calculate_activation_statistics(paths, network, 30, 64, "cpu", 0)
            colour = torch.from_numpy(images).expand(-1, 3, -1, -1)
            figures[f"{name} all"] = look(colour.float() / 255)
            with torch.no_grad():
                figures[f"{name} tensorflow"] = [x.numpy() for x in fidelity_look(colour)]
        fc = state["fc.weight"]

        def moments(features):
            return np.mean(features, 0), np.cov(features, rowvar=False)

        def score(logits):
            found = isc_features_to_metric(logits, splits=SPLITS, shuffle=False)
            return {
                "inception_score": found["inception_score_mean"],
                "inception_score_deviation": found["inception_score_std"],
            }

        def compared(name):
            """The report about a set, by a stage with real images."""
            of_set = torch.from_numpy(figures[f"{name} all"]["64"])
            of_real = torch.from_numpy(figures["real all"]["64"])
            spatial = [moments(figures[f"{which} all"]["spatial"].astype(np.float64)) for which in ["real", name]]
            both = prc_features_to_metric(
                of_set, of_real, prc_neighborhood=NEIGHBOURS, prc_batch_size=10000, save_cpu_ram=False, verbose=False
            )
            return {
                "frechet_distance": fid.calculate_frechet_distance(*figures["real"], *figures[name]),
                "spatial_frechet_distance": frechet_by_eigenvectors(*spatial),
                **score(torch.from_numpy(figures[f"{name} all"]["2048"]) @ fc.T),
                "precision": both["precision"],
                "recall": both["recall"],
            }

        def kernel(name):
            # A single subset with all images, so only its order is random.
            found = kid_features_to_metric(
                *(torch.from_numpy(figures[f"{which} all"]["64"]) for which in [name, "real"]),
                kid_subsets=1, kid_subset_size=COUNT, verbose=False,
            )
            return {"kernel_distance": found["kernel_inception_distance_mean"]}

        look = perceptual(tensors(vgg_specs()), tensors(linear_specs()))
        pair = [torch.from_numpy(sets[name]).expand(-1, 3, -1, -1).float() / 127.5 - 1 for name in ["made", "student"]]
        with torch.no_grad():
            lpips_mean = look(*pair).mean().item()
        of_tensorflow = {name: figures[f"{name} tensorflow"] for name in ["real", "made"]}
        distance = frechet_by_eigenvectors(*(moments(f[0].astype(np.float64)) for f in of_tensorflow.values()))
        expected = [
            ("evaluation", "made", compared("made") | kernel("made")),
            ("evaluation", "student", compared("student") | kernel("student") | {"lpips": lpips_mean}),
            # The images of a reference file are the same.
            ("reference", "made", compared("made")),
            ("tensorflow", "made/pytorch", compared("made")),
            (
                "tensorflow",
                "made/tensorflow",
                {"frechet_distance": distance, **score(torch.from_numpy(of_tensorflow["made"][1]))},
            ),
        ]
        found = [
            (f"{stage}, {name}: {key}", reports[stage][name][key], value)
            for stage, name, values in expected
            for key, value in values.items()
        ]
        spatial = moments(figures["real all"]["spatial"].astype(np.float64))
        found += [
            ("statistics, mu", saved["mu"], figures["real"][0]),
            ("statistics, sigma", saved["sigma"], figures["real"][1]),
            ("statistics, mu_s", saved["mu_s"], spatial[0]),
            ("statistics, sigma_s", saved["sigma_s"], spatial[1]),
        ]
        sys.exit(int(not all([agree(*row) for row in found])))


def agree(name, ours, theirs):
    """Prints a figure, or the largest of an array, and whether both are the same."""
    if ours is None:
        print(f"{name:<56} retort has none, packages {theirs:.12g}")
        return False
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12)
    largest = [np.abs(x).max() if np.ndim(x) else x for x in (ours, theirs)]
    print(f"{name:<56} retort {largest[0]:<20.12g} packages {largest[1]:<20.12g} relative difference {error:.1e}")
    return error <= 1e-3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("golden")
    commands.add_parser("check").add_argument("retort", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.command == "golden":
        golden()
    else:
        check(arguments.retort.resolve())
