"""Speed, size and keyframes of data.py, measured.

    python benchmarks/data_bench.py speed --data data/fluent            # against the naive loop
    python benchmarks/data_bench.py keyframes --data data/fluent        # how well the chosen frames cover it
    python benchmarks/data_bench.py sheet --data data/fluent --out assets/keyframes.png

CPU seconds are printed beside wall seconds: on a machine that does other work too, only they can be compared.
"""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402


class Clock:
    """Wall and CPU seconds (this process and its ended children) of a with-block."""

    def __enter__(self):
        self.start = time.perf_counter(), sum(os.times()[:4])
        return self

    def __exit__(self, *_):
        self.wall = time.perf_counter() - self.start[0]
        self.cpu = max(0.01, sum(os.times()[:4]) - self.start[1])           # a tick of the clock at least

    def rate(self, count):
        return f"{count / self.wall:8.1f} a second wall, {1000 * self.cpu / count:9.3f} ms CPU each"


def naive_clip(path, size, rng):
    """What a first version of a loader does, every time: open, decode all, resize all, take k frames."""
    frames = []
    with Image.open(path) as image:
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGBA").resize((size, size))))
    k = min(int(rng.integers(3, 9)), len(frames))
    clip = np.zeros((8, size, size, 4), np.float32)
    clip[:k] = np.stack([frames[i] for i in np.arange(k) * len(frames) // k]) / np.float32(255)
    return clip


def choose(folder, count):
    """`count` items of a folder, evenly spread (all: 0)."""
    items = data.list_stickers(folder)
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def speed(args):
    rng, items = np.random.default_rng(0), choose(args.data, args.count)
    source = sum(os.path.getsize(item.path) for item in items) / len(items)
    print(f"{len(items)} stickers, {source / 1000:.1f} kB each as files, {args.size} pixels, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with Clock() as clock:
        for item in items:
            naive_clip(item.path, args.size, rng)
    naive = clock.cpu / len(items)
    print(f"naive loop, every epoch      {clock.rate(len(items))}")
    with tempfile.TemporaryDirectory() as folder:
        links = Path(folder, "in")
        links.mkdir()
        for i, item in enumerate(items):
            (links / f"{i}{os.path.splitext(item.path)[1]}").symlink_to(Path(item.path).resolve())
        for workers in (0, 2):
            with Clock() as clock:
                store = data.prepare(links, Path(folder, f"store{workers}"), args.size, workers=workers)
            print(f"prepare, once, {workers} workers    {clock.rate(len(store))}")
        kept, frames = (sum(map(count, store.shards)) / len(store) for count in (lambda x: x.nbytes, len))
        print(f"store: {kept / 1000:.1f} kB and {frames:.1f} frames a sticker; as float16 latents of f = 4, "
              f"4 channels: {kept / 8000:.2f} kB")
        draws = 20 * len(store)
        with Clock() as clock:
            for i in range(draws):
                data.draw_clip(store, i % len(store), rng)
        print(f"draw_clip, every epoch       {clock.rate(draws)}   ({naive / (clock.cpu / draws):.0f} times "
              "less CPU than naive)")


def coverage(x, chosen):
    """Mean over all frames of the RMS distance (0..1, thumbnails) to the nearest chosen frame."""
    return float(np.sqrt(((x[:, None] - x[list(chosen)]) ** 2).mean(-1)).min(1).mean())


def choices(path):
    """-> (frames, their features, {k: {rule: chosen frames}}), as many chosen of each rule."""
    frames = np.stack([data.fit(frame, 64) for frame, _ in data.iter_frames(path)])
    found = {}
    for k, row in enumerate(data.find_keyframes(frames), data.MIN_K):
        row = row[row >= 0]
        found[k] = {"evenly spaced": np.arange(len(row)) * len(frames) // len(row), "centre of cluster": row}
    return frames, data.frame_features(frames), found


def keyframes(args):
    found, total = {}, 0
    for item in choose(args.data, args.count):
        frames, x, rules = choices(item.path)
        total += len(frames) > 1
        for k, rows in rules.items() if len(frames) > 1 else ():
            for name, chosen in rows.items():
                found.setdefault(name, {}).setdefault(k, []).append(coverage(x, chosen))
    print(f"{total} animated stickers: mean distance of all frames to the nearest chosen one (x 1000), "
          f"and how often it is smaller than with even spacing")
    even = found["evenly spaced"]
    print(f"{'k':18}" + "".join(f"{k:14}" for k in even))
    for name, columns in found.items():
        cells = [(1000 * np.mean(d), 100 * np.mean(np.array(d) < even[k])) for k, d in columns.items()]
        print(f"{name:18}" + "".join(f"{d:8.2f} {w:4.0f}%" for d, w in cells))


def sheet(args):
    items, rows, labels = {item.caption: item for item in data.list_stickers(args.data)}, [], []
    for name in args.names.split(","):
        if name not in items:
            raise data.DataError(f"--names: no sticker is called {name!r} in {args.data}; choose others")
        frames, x, rules = choices(items[name].path)
        for rule, chosen in rules[args.k].items():
            rows.append(data.unpremultiply(frames[chosen]))
            labels.append(f"{name}: {rule}, distance {1000 * coverage(x, chosen):.0f}")
    data.save_sheet(args.out, rows, labels)
    print(f"{args.out}: {len(rows)} rows")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a = parser.add_argument
    a("what", choices=("speed", "keyframes", "sheet"))
    a("--data", required=True, help="folder of stickers")
    a("--count", type=int, default=0, help="use so many of its stickers, evenly spread; 0: all")
    a("--size", type=int, default=64, help="side of the pictures in pixels (speed)")
    a("--k", type=int, default=5, choices=range(3, 9), help="frames in a clip (sheet)")
    a("--names", default="winking face,man running,party popper,dolphin,exploding head",
      help="captions of the stickers to show (sheet)")
    a("--out", default="assets/keyframes.png", help="PNG file (sheet)")
    args = parser.parse_args()
    return data.one_line("data_bench.py", lambda: globals()[args.what](args))


if __name__ == "__main__":
    sys.exit(main())
