#!/usr/bin/env python3
"""Reads images with Pillow: writes plugins/engine/fixtures/images, the reference of the engine's tests.

    pip install pillow numpy
    python3 tests/peers/pictures.py

`formats/` holds small files of every format and kind; `formats.json` their pixels: RGB or grey over white, with
EXIF's orientation applied. `resized.json` holds one picture and the results of Pillow's filters.
"""
import json
import pathlib

import numpy as np
from PIL import Image, ImageOps, __version__

out = pathlib.Path(__file__).resolve().parents[2] / "plugins/engine/fixtures/images"
formats = out / "formats"
formats.mkdir(parents=True, exist_ok=True)

h, w = 12, 16
y, x = np.mgrid[0:h, 0:w]
rgb = np.stack([x * 255 // (w - 1), y * 255 // (h - 1), (x * 7 + y * 11) % 256], -1).astype(np.uint8)
grey = ((x * 9 + y * 5) % 256).astype(np.uint8)
alpha = np.where((x + y) % 3 == 0, 0, np.where((x + y) % 3 == 1, 128, 255)).astype(np.uint8)
smooth = Image.fromarray(rgb)

saved = {}


def shown(image, kind):
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert(kind))


def save(name, image, kind="RGB", **options):
    path = formats / name
    image.save(path, **options)
    with Image.open(path) as again:
        again.seek(0)
        pixels = shown(again, kind)
    saved[name] = {"shape": list(np.atleast_3d(pixels).shape), "pixels": pixels.flatten().tolist()}


save("rgb.png", smooth)
save("rgba.png", Image.fromarray(np.dstack([rgb, alpha])))
save("grey.png", Image.fromarray(grey), "L")
save("grey-alpha.png", Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "L")
save("palette.png", smooth.quantize(16))
clear = smooth.quantize(16)
save("palette-clear.png", clear, transparency=3)
save("one-bit.png", Image.fromarray(grey).convert("1"), "L")
save("smooth.jpg", smooth, quality=95, subsampling=0)
save("progressive.jpg", smooth, quality=95, subsampling=0, progressive=True)
save("grey.jpg", Image.fromarray(grey), "L", quality=95)
save("cmyk.jpg", smooth.convert("CMYK"), quality=100, subsampling=0)
for orientation in range(1, 9):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(f"turned-{orientation}.jpg", smooth, quality=95, subsampling=0, exif=exif)
save("lossless.webp", smooth, lossless=True)
save("lossless-clear.webp", Image.fromarray(np.dstack([rgb, alpha])), lossless=True, exact=True)
save("lossy.webp", smooth, quality=90)
save("frames.gif", smooth.quantize(32), save_all=True, append_images=[ImageOps.invert(smooth).quantize(32)])
save("rgb.bmp", smooth)
save("grey.bmp", Image.fromarray(grey), "L")
save("rgb.tiff", smooth)
save("packed.tiff", smooth, compression="tiff_lzw")
save("grey.tiff", Image.fromarray(grey), "L")
# 16 bits: Pillow drops the lower byte, so the expected values are given here.
deep = (grey.astype(np.uint16) << 8) | grey
Image.fromarray(deep).save(formats / "sixteen.png")
saved["sixteen.png"] = {"shape": [h, w, 1], "pixels": grey.flatten().tolist()}
# Pillow does not write interlaced files, so this one is assembled here: seven passes without filters.
import struct
import zlib

passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
raw = b""
for x0, y0, dx, dy in passes:
    for row in rgb[y0::dy, x0::dx]:
        if row.size:
            raw += b"\0" + row.tobytes()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


head = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 1)
(formats / "interlaced.png").write_bytes(
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
)
with Image.open(formats / "interlaced.png") as again:
    assert (np.asarray(again) == rgb).all()
saved["interlaced.png"] = {"shape": [h, w, 3], "pixels": rgb.flatten().tolist()}
(out / "formats.json").write_text(json.dumps({"pillow": __version__, "files": saved}, separators=(",", ":")) + "\n")

# A picture with edges, odd sides and noise.
rng = np.random.default_rng(7)
picture = np.where(((np.mgrid[0:37, 0:53].sum(0) // 5) % 2)[..., None] == 0, [230, 40, 90], [10, 200, 120])
picture = np.clip(picture + rng.integers(-25, 26, picture.shape), 0, 255).astype(np.uint8)
source = Image.fromarray(picture)
filters = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def adm(image, side):
    """As ADM's `center_crop_arr` describes it: halve, scale the shorter side, take the middle."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


cases = []
for name, resampling in filters.items():
    for height, width in [(8, 8), (16, 24), (37, 20), (48, 57)]:
        size = (width, height)
        fits = {
            "stretch": source.resize(size, resampling),
            "cover": ImageOps.fit(source, size, resampling),
            "contain": ImageOps.pad(source, size, resampling, color=(255, 255, 255)),
        }
        for fit, image in fits.items():
            if (height, width) in [(16, 24), (8, 8)] or (fit, name) == ("stretch", "bicubic"):
                cases.append((fit, name, image))
for side in (8, 30):
    cases.append(("adm", "bicubic", adm(source, side)))
(out / "resized.json").write_text(
    json.dumps(
        {
            "pillow": __version__,
            "source": {"shape": list(picture.shape), "pixels": picture.flatten().tolist()},
            "cases": [
                {"fit": fit, "filter": name, "size": [i.height, i.width], "pixels": np.asarray(i).flatten().tolist()}
                for fit, name, i in cases
            ],
        },
        separators=(",", ":"),
    )
    + "\n"
)
