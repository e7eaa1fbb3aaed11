"""Writes the images of emoji.tar with captions, for captions.yaml: captioned/ with metadata.jsonl, and captions.txt, which has
each caption once.

usage: python3 recipes/data/caption_emoji.py
"""

import json
import pathlib
import tarfile
import unicodedata

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = HERE / "captioned"
UNSPOKEN = ("variation selector", "zero width joiner")


def caption(file):
    """The Unicode names of an emoji's characters, and its group.

    activities/google-1f3a3.webp: fishing pole and fish (activities)
    """
    characters = [chr(int(code, 16)) for code in file.stem.split("-")[1:]]
    # An older Python doesn't know the newest characters.
    names = [unicodedata.name(character, "").lower() for character in characters]
    names = [name.removeprefix("regional indicator symbol letter ") for name in names if name and not name.startswith(UNSPOKEN)]
    group = file.parent.name.replace("-", " ")
    return f"{', '.join(names)} ({group})" if names else group


with tarfile.open(HERE / "emoji.tar") as archive:
    files = sorted(pathlib.PurePath(member.name) for member in archive if member.isfile())
    archive.extractall(FOLDER)
captions = [caption(file) for file in files]
with open(FOLDER / "metadata.jsonl", "w") as table:
    for file, text in zip(files, captions):
        row = {"file_name": str(file), "label": file.parent.name, "caption": text}
        table.write(json.dumps(row) + "\n")
(FOLDER / "captions.txt").write_text("".join(f"{text}\n" for text in dict.fromkeys(captions)))
