"""Speed, size and keyframes of data.py, measured.

    # against the naive loop: Pillow, one process, no cache
    python benchmarks/data_bench.py speed --data data/fluent
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
        self.wall, self.cpu = time.perf_counter() - self.start[0], sum(os.times()[:4]) - self.start[1]

    def rate(self, count):
        return f"{count / self.wall:8.1f} a second wall, {1000 * self.cpu / count:9.3f} ms CPU each"


def naive_clip(path, size, rng):
    """What a first version of a loader does, every time: open, decode all, resize all, take k frames."""
    frames = []
    with Image.open(path) as image:
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGBA").resize((size, size))))
    k = int(rng.integers(3, 9))
    clip = np.zeros((8, size, size, 4), np.float32)
    chosen = np.arange(min(k, len(frames))) * len(frames) // min(k, len(frames))
    clip[:len(chosen)] = np.stack([frames[i] for i in chosen]) / np.float32(255)
    return clip


def choose(folder, count):
    """`count` items of a folder, evenly spread (all: 0)."""
    items = data.list_stickers(folder)
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def speed(args):
    rng = np.random.default_rng(0)
    items = choose(args.data, args.count)
    source = sum(os.path.getsize(item.path) for item in items)
    print(f"{len(items)} stickers, {source / len(items) / 1000:.1f} kB each as files, {args.size} pixels, "
          f"{os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}")
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
        kept = sum(file.stat().st_size for file in Path(folder, "store0").iterdir())
        print(f"store: {kept / len(store) / 1000:.1f} kB a sticker, {len(store.frames) / len(store):.1f} "
              "frames a sticker; "
              f"as float16 latents of f = 8, 4 channels: {kept / len(store) / 1000 / 32:.2f} kB")
        draws = 20 * len(store)
        with Clock() as clock:
            for i in range(draws):
                data.draw_clip(store, i % len(store), rng)
        print(f"draw_clip, every epoch       {clock.rate(draws)}   ({naive / (clock.cpu / draws):.0f} times "
              "less CPU than naive)")


def features(item, size=64):
    fitted = np.stack([data._fit(frame, size) for frame, _ in data.iter_frames(item.path)])
    return fitted, data.frame_features(fitted)


def coverage(x, chosen):
    """Mean over all frames of the RMS distance (0..1, thumbnails) to the nearest chosen frame."""
    return float(np.sqrt(((x[:, None] - x[list(chosen)]) ** 2).mean(-1)).min(1).mean())


def choices(fitted):
    """-> {k: {name: frame indices}}, as many of each kind."""
    tables, found = [data.find_keyframes(fitted, pick) for pick in ("first", "centre")], {}
    for k, first, centre in zip(range(data.MIN_K, data.MAX_K + 1), *tables):
        n = int((first >= 0).sum())
        found[k] = {"evenly spaced": np.arange(n) * len(fitted) // n, "first of cluster": first[:n],
                    "centre of cluster": centre[:n]}
    return found


def keyframes(args):
    found, total = {}, 0
    for item in choose(args.data, args.count):
        fitted, x = features(item)
        if len(fitted) > 1:
            total += 1
            for k, rows in choices(fitted).items():
                for name, chosen in rows.items():
                    found.setdefault(name, {}).setdefault(k, []).append(coverage(x, chosen))
    print(f"{total} animated stickers: mean distance of all frames to the nearest chosen one (x 1000), "
          f"and how often it is smaller than with even spacing")
    print(f"{'k':18}" + "".join(f"{k:14}" for k in found["evenly spaced"]))
    for name, columns in found.items():
        even = found["evenly spaced"]
        cells = [(1000 * np.mean(d), 100 * np.mean(np.array(d) < even[k])) for k, d in columns.items()]
        print(f"{name:18}" + "".join(f"{d:8.2f} {w:4.0f}%" for d, w in cells))


def sheet(args):
    wanted = args.names.split(",")
    items = {item.caption: item for item in data.list_stickers(args.data)}
    rows, labels = [], []
    for name in wanted:
        if name not in items:
            raise data.DataError(f"--names: no sticker is called {name!r} in {args.data}; choose others")
        fitted, x = features(items[name])
        straight = data.unpremultiply(fitted)
        for how, chosen in choices(fitted)[args.k].items():
            rows.append(straight[list(chosen)])
            labels.append(f"{name}: {how}, distance {1000 * coverage(x, chosen):.0f}")
    data.save_sheet(args.out, rows, labels)
    print(f"{args.out}: {len(rows)} rows")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "keyframes", "sheet"))
    parser.add_argument("--data", required=True, help="folder of stickers")
    parser.add_argument("--count", type=int, default=0, help="use so many of its stickers, evenly spread; 0: "
                                                             "all")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (speed)")
    parser.add_argument("--k", type=int, default=5, help="frames in a clip, 3 to 8 (sheet)")
    parser.add_argument("--names", default="winking face,man running,party popper,dolphin,exploding head",
                        help="captions of the stickers to show (sheet)")
    parser.add_argument("--out", default="assets/keyframes.png", help="PNG file (sheet)")
    args = parser.parse_args()
    try:
        {"speed": speed, "keyframes": keyframes, "sheet": sheet}[args.what](args)
    except data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
