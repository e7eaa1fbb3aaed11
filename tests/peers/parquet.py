#!/usr/bin/env python3
"""Writes the Parquet files of tests/golden/parquet: small data sets of images, as other libraries write them.

    parquet.py OUT

Needs pyarrow, Pillow and datasets (Hugging Face). `expected.json` has the files' contents: the cells of each
column, with numbers and texts unchanged, bytes as [length, CRC-32], and null for a missing cell.
"""

import io
import json
import pathlib
import sys
import zlib

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
expected = {}


def image(i, kind="PNG"):
    """Image i: 6 x 4, red rises with i."""
    picture = Image.new("RGB", (6, 4), (i * 20, 100, 255 - i * 20))
    picture.putpixel((i % 6, 0), (255, 255, 255))
    file = io.BytesIO()
    picture.save(file, kind, quality=90)
    return file.getvalue()


def note(name):
    """Records what pyarrow reads in a file."""
    columns = {}
    for field in (table := pq.read_table(out / name)).flatten().schema:
        cells = table.flatten().column(field.name).to_pylist()
        columns[field.name] = [[len(x), zlib.crc32(x)] if isinstance(x, bytes) else x for x in cells]
    expected[name] = columns


def write(name, table, **options):
    pq.write_table(table, out / name, **options)
    note(name)


# Like Hugging Face's library: a struct of bytes and path, classes by number with their names in the metadata.
# Classes are not in alphabetical order.
features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "cat", "dog"])})
rows = {"image": [{"bytes": image(i), "path": f"{i}.png"} for i in range(12)], "label": [i % 3 for i in range(12)]}
whole = datasets.Dataset.from_dict(rows, features=features)
whole.to_parquet(out / "hub.parquet", batch_size=5)
note("hub.parquet")
for number in range(2):
    name = f"train-0000{number}-of-00002.parquet"
    whole.shard(2, number, contiguous=True).to_parquet(out / name)
    note(name)

# Captions, images as plain bytes, some rows without an image or a caption; pages with checksums.
images = [image(i, "JPEG") if i != 3 else None for i in range(7)]
captions = [f"picture {i}" if i != 5 else None for i in range(7)]
captioned = pa.table({"id": range(7), "text": captions, "jpg": pa.array(images, pa.binary())})
write("captions.parquet", captioned, compression="none", write_page_checksum=True, row_group_size=4)

# Text as classes, no dictionaries, and version 2 data pages.
labels = ["b", "a", None, "b", "a", "a"]
named = pa.table({"image": pa.array([image(i) for i in range(6)], pa.binary()), "label": labels, "flag": [True, False, True] * 2})
second = {"use_dictionary": False, "data_page_version": "2.0"}
write("zstd.parquet", named, compression="zstd", **second)
write("plain-2.parquet", named, compression="none", **second)
write("gzip.parquet", named, compression="gzip")
# Pages of two rows, with most cells in a dictionary.
many = pa.table({"image": pa.array([image(i % 3) for i in range(40)], pa.binary()), "label": pa.array([i % 3 for i in range(40)], pa.int32())})
write("dictionary.parquet", many, compression="snappy", data_page_size=1, write_batch_size=2)

# Invalid classes: an invalid name, and a class without rows.
long = pa.table({"image": pa.array([image(0), image(1)], pa.binary()), "label": ["x" * 2000, "y"]})
write("long.parquet", long)
rows = {"image": [{"bytes": image(i), "path": None} for i in range(2)], "label": [0, 2]}
datasets.Dataset.from_dict(rows, features=features).to_parquet(out / "absent.parquet")
note("absent.parquet")

# Unsupported contents.
listed = pa.table({"image": pa.array([image(0)], pa.binary()), "captions": [["a", "b"]]})
delta = {"use_dictionary": False, "column_encoding": {"label": "DELTA_BINARY_PACKED"}}
pq.write_table(listed, out / "lists.parquet")
pq.write_table(named, out / "brotli.parquet", compression="brotli")
pq.write_table(pa.table({"label": [1, 2, 3]}), out / "delta.parquet", **delta)

(out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
