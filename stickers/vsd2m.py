"""A store from the authors' own data, VSD2M, as their loader reads it: JSON lines and an LMDB of frames.

    pip install lmdb
    python stickers/vsd2m.py labels.jsonl frames.lmdb --out cache/vsd2m --size 256 --vae sd-vae.safetensors
    python stickers/vsd2m.py labels.jsonl frames.lmdb --out cache/vsd2m64 --size 64              # as pixels

A line is {"md5": .., "nframes": 12, "fmt": "gif", "eng_cap": "a cat waves"}; the LMDB has an encoded picture
under each key MD5_FRAME, from MD5_0 (or MD5_1) on. It has no times: a frame counts 125 ms (ours). The
project page links the data, its licence is not stated. Reading streams, and resumes where it was stopped.
"""
import argparse
import hashlib
import io
import json
import math
import os
import sys
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import (  # noqa: E402
    FILTERS, IMAGES, MAX_FRAMES, MAX_PIXELS, SHARD, DataError, Item, cores, decode, decode_frames,
    is_held_out, make_meta, make_store, number, one_line, pack, report, write_store)

FRAME_MS = 125


@lru_cache(maxsize=1)                      # once per process
def database(path):
    """-> a read transaction of an LMDB: a folder, or a file."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError("reading VSD2M needs `pip install lmdb`") from error
    try:
        return lmdb.open(path, subdir=os.path.isdir(path), readonly=True, lock=False, readahead=False,
                         create=False).begin()
    except lmdb.Error as error:
        raise DataError(f"{path}: no LMDB that can be opened ({error}); give its folder or file") from error


def read_labels(path, hold_out):
    """JSON lines -> list of (Item, frames). An Item's name is the md5; its hash decides the split."""
    labels, place = [], 0
    try:
        with open(path, encoding="utf-8") as file:
            for place, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    md5, caption = str(row["md5"]), " ".join(str(row.get("eng_cap") or "").split())
                    held = bool(hold_out) and is_held_out(md5, hold_out)
                    labels.append((Item("", md5, caption, (), int(held)), int(row["nframes"])))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: line {place} is no JSON object with md5, nframes and eng_cap ({error}); "
                        f"correct it") from error
    if not labels:
        raise DataError(f"{path}: no line in it; give the JSON lines of VSD2M")
    return labels


def read_frames(frames, md5, count):
    """Yields (PIL RGBA image, ms) of each frame of a sticker; DataError if one is missing or broken."""
    if not 1 <= count <= MAX_FRAMES:
        raise DataError(f"{count} frames")
    first = 0 if frames.get(f"{md5}_0".encode()) else 1
    for i in range(first, first + count):
        data = frames.get(f"{md5}_{i}".encode())
        if not data:
            raise DataError(f"no frame {md5}_{i}")
        try:
            with Image.open(io.BytesIO(data), formats=IMAGES) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels, too many")
                yield image.convert("RGBA"), FRAME_MS
        except Exception as error:                                          # broken bytes raise anything
            raise DataError(f"frame {i}: {' '.join(str(error).split())[:100]}") from error


def decode_label(label, path, size, most, filters):
    """A line of `read_labels` -> what `data.decode_item` makes of a file."""
    (_, md5, *_), count = label
    return decode_frames(read_frames(database(path), md5, count), size, most, filters)


def vsd2m(labels, path, out, size, vae=None, workers=0, filters=FILTERS, hold_out=0.05, max_bad=0.1, most=8):
    """JSON lines and LMDB -> the opened store of pixels, or of latents with a VAE."""
    rows, meta, path = read_labels(labels, hold_out), make_meta(size, most, vae), str(path)
    database(path)                                                          # missing: says so at once
    stat = os.stat(os.path.join(path, "data.mdb") if os.path.isdir(path) else path)
    words = hashlib.blake2b(repr(rows).encode()).hexdigest()

    def make(i, seen):
        part = rows[i * SHARD:(i + 1) * SHARD]
        kept, left_out = decode([item for item, _ in part], size, most, filters, workers, seen,
                                partial(decode_label, path=path), part)
        return *pack(kept, size, most, vae), left_out

    return write_store(out, meta, repr((meta, sorted(filters), words, stat.st_size, stat.st_mtime_ns)),
                       math.ceil(len(rows) / SHARD), make,
                       lambda left_out: report(labels, len(rows), left_out, max_bad))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a = parser.add_argument
    a("labels", help="JSON lines: md5, nframes, fmt, eng_cap")
    a("lmdb", help="LMDB, a folder or a file, with keys MD5_FRAME")
    a("--out", required=True, help="the new store")
    a("--vae", default="", help="VAE checkpoint: store its latents; empty: store pixels")
    a("--device", default="cpu", help="where the VAE runs: cpu, cuda or mps")
    a("--size", type=number(int, 8, 1024), default=256, help="side of the pictures in pixels")
    a("--workers", type=number(int, 0), default=cores(), help="decoding processes; 0: this one")
    a("--filter", default=",".join(FILTERS), help="what to leave out, some of %(default)s; or none")
    a("--max-bad", type=number(float, 0, 1), default=0.1, help="largest share of unreadable stickers")
    a("--hold-out", type=number(float, 0, 0.5), default=0.05, help="share never trained on; 0: none")
    args = parser.parse_args(arguments)

    def work():
        filters = [] if args.filter == "none" else args.filter.split(",")
        if not set(filters) <= set(FILTERS):
            raise DataError(f"--filter {args.filter}: give some of {','.join(FILTERS)}, or none")
        make_store(args, lambda vae: vsd2m(args.labels, args.lmdb, args.out, args.size, vae, args.workers,
                                           filters, args.hold_out, args.max_bad))
    return one_line("vsd2m.py", work)


if __name__ == "__main__":
    sys.exit(main())
