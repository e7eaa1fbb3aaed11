#!/usr/bin/env python3
"""Reads a file of `retort artifacts export ARTIFACT --as published` with torch.

    published.py FILE [DIRECTORY]

Loads the file with torch.load (weights_only, so it contains no unknown calls) and prints its
dictionaries. With the directory of the artifact, compares every weight with `model.safetensors` or
`tokenizer.safetensors` there, bit for bit. Needs torch.
"""

import json
import pathlib
import struct
import sys

import torch


def dictionaries(value, path=()):
    """Dictionaries of tensors, with their paths."""
    if not isinstance(value, dict):
        return
    tensors = {name: x for name, x in value.items() if isinstance(x, torch.Tensor)}
    if tensors:
        yield ".".join(path), tensors
    for name, inner in value.items():
        yield from dictionaries(inner, (*path, str(name)))


def arrays(path):
    """Names and tensors of a safetensors file."""
    kinds = {"F32": torch.float32, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "I32": torch.int32, "I64": torch.int64}
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        start, end = (8 + length + at for at in tensor["data_offsets"])
        kind = kinds[tensor["dtype"]]
        x = torch.frombuffer(bytearray(data[start:end]), dtype=kind) if end > start else torch.empty(0, dtype=kind)
        yield name, x.reshape(tensor["shape"])


def main():
    file = pathlib.Path(sys.argv[1])
    found = list(dictionaries(torch.load(file, map_location="cpu", weights_only=True)))
    for path, tensors in found:
        print(f"{path or 'top level'}: {len(tensors)} tensors, {sum(x.numel() for x in tensors.values()):,} elements")
    if len(sys.argv) < 3:
        return
    folder = pathlib.Path(sys.argv[2])
    for name in ("model.safetensors", "tokenizer.safetensors"):
        if not (folder / name).exists():
            continue
        own = dict(arrays(folder / name))
        for path, tensors in found:
            if not own.keys() <= tensors.keys():
                continue
            same = all(torch.equal(x, tensors[key]) for key, x in own.items())
            print(f"{path or 'top level'}: {'equal to' if same else 'DIFFERS from'} {name}")
            if not same:
                sys.exit(1)


if __name__ == "__main__":
    main()
