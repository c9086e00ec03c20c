"""Procedural stickers (ours): caption and pixels say the same four things; so conditioning can be measured.

    python stickers/procedural.py --out data/procedural --count 1000

`train.py --data synthetic` draws the same ones in memory. Sticker number i is the same for ever.
"""
import argparse
import functools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

PALETTE = {"red": (225, 40, 45), "orange": (245, 135, 25), "yellow": (250, 215, 60), "green": (60, 170, 70),
           "blue": (45, 95, 225), "purple": (140, 60, 190), "pink": (250, 140, 195), "black": (45, 45, 50)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon")
MOTIONS = {"bounce": "bouncing", "spin": "spinning", "pulse": "pulsing", "shake": "shaking",
           "blink": "blinking", "orbit": "orbiting"}
RADIUS = {"small": 0.15, "big": 0.25}     # of the picture's side


@functools.lru_cache(None)
def _outline(shape):
    """Polygon (n, 2) of a shape, x right and y down, centred on 0, radius about 1."""
    a = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    if shape == "circle":
        x, y = 0.95 * np.cos(a), 0.95 * np.sin(a)
    elif shape == "square":
        x, y = np.array([-1, 1, 1, -1]) * 0.85, np.array([-1, -1, 1, 1]) * 0.85
    elif shape == "triangle":
        x, y = 1.2 * np.sin(a[::24]), -1.2 * np.cos(a[::24])
    elif shape == "star":
        r = np.tile([1.25, 0.55], 5)
        x, y = r * np.sin(np.arange(10) * np.pi / 5), -r * np.cos(np.arange(10) * np.pi / 5)
    elif shape == "heart":
        x = np.sin(a) ** 3 * 1.1
        y = -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 15 - 0.15
    else:      # moon: a disc less a disc
        b = np.linspace(-1, 1, 36)
        x = np.concatenate([-1.1 * np.cos(b * 2.2) + 0.25, -0.8 * np.cos(b[::-1] * 1.72) + 0.77])
        y = np.concatenate([1.1 * np.sin(b * 2.2), 0.9 * np.sin(b[::-1] * 1.72)])
    return np.stack([x, y], 1)


def _draw_frame(size, shape, colour, centre, radius, angle, opacity):
    """One straight RGBA frame (size, size, 4), drawn at 4x and averaged: soft edges. Two eyes tell up from
    down."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    body = Image.new("L", (4 * size, 4 * size))
    paint = Image.new("RGB", body.size, colour)

    def draw(image, points, fill):
        corners = (points @ turn * radius + centre) * 4 * size
        ImageDraw.Draw(image).polygon(corners.ravel().tolist(), fill=fill)
    draw(body, _outline(shape), 255)
    for x in (-0.55, -0.25) if shape == "moon" else (-0.3, 0.3):
        for part, grey in ((0.21, 255), (0.11, 20)):
            draw(paint, _outline("circle") * part + (x, -0.1), (grey, grey, grey))
    alpha = np.asarray(body.reduce(4))[..., None]
    colour = np.asarray(paint.reduce(4)) * (alpha > 0)
    return np.concatenate([colour, (alpha * opacity + 0.5).astype(np.uint8)], -1)


def sticker(index, size=64):
    """Procedural sticker number `index`, the same for ever.

    Returns (frames uint8 (t, size, size, 4) straight RGBA, durations in ms, caption such as "a small red star
    spinning", attributes: dict of colour, shape, motion (or "still"), scale). t: 1 (one in ten), else 4 to 40
    with a long tail, one loop of the motion.
    """
    rng = np.random.default_rng([1703, int(index)])
    colour, shape, scale = (str(rng.choice(list(names))) for names in (PALETTE, SHAPES, RADIUS))
    still = rng.random() < 0.1
    motion = "still" if still else str(rng.choice(list(MOTIONS)))
    t = 1 if still else min(40, 4 + int(rng.exponential(9)))
    radius, way = RADIUS[scale] * rng.uniform(0.95, 1.05), rng.choice([-1, 1])
    centre = 0.5 + rng.uniform(-0.02, 0.02, 2)
    tilt, amplitude = rng.uniform(-0.2, 0.2), {"small": 0.2, "big": 0.13}[scale]
    frames = []
    for i in range(t):
        wave = 2 * np.pi * (i + 0.25) / t      # the way back shows other frames than the way there
        place, r, angle, opacity = centre.copy(), radius, tilt, 1.0
        if motion == "bounce":
            place[1] += amplitude * (1 - 2 * abs(np.sin(wave / 2)))
        elif motion == "shake":
            place[0] += amplitude * way * np.cos(wave)
        elif motion == "orbit":
            place += amplitude * np.array([np.cos(way * wave), np.sin(way * wave)])
        elif motion == "spin":
            angle += way * wave
        elif motion == "pulse":
            r *= 1 + 0.25 * np.cos(wave)
        elif motion == "blink":
            opacity = 0.6 + 0.4 * np.cos(wave)
        frames.append(_draw_frame(size, shape, PALETTE[colour], place, r, angle, opacity))
    caption = f"a {scale} {colour} {shape} {MOTIONS.get(motion, '')}".strip()
    times = [0] if still else [int(rng.integers(4, 13)) * 10] * t
    attributes = {"colour": colour, "shape": shape, "motion": motion, "scale": scale}
    return np.stack(frames), times, caption, attributes


def save(out, count, size):
    """Writes stickers 0 .. count - 1 as lossless WebP into the folder `out`, with metadata.jsonl. Resumes."""
    # Not at the top: data.py itself imports this file.
    from tqdm import tqdm

    from data import write_sticker
    from stickers.fetch import settings, split_of, write_metadata
    settings(out, size=size, count=count)
    rows = []
    for index in tqdm(range(count), "drawing", unit="sticker"):
        frames, durations, caption, attributes = sticker(index, size)
        path = Path(out) / f"{index:06}.webp"
        if not path.exists():
            write_sticker(path, frames, durations)
        rows.append({"file_name": path.name, "text": caption, "split": split_of(caption), **attributes})
    write_metadata(out, rows)


def main(arguments=None):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from data import DataError
    from stickers.fetch import run
    parser = argparse.ArgumentParser(description="Draw procedural stickers.")
    parser.add_argument("--out", default="data/procedural", help="folder to fill")
    parser.add_argument("--count", type=int, default=1000, help="how many")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    args = parser.parse_args(arguments)

    def work():
        if not 1 <= args.count <= 1_000_000 or not 8 <= args.size <= 1024:
            raise DataError("give --count 1 to 1000000 and --size 8 to 1024 pixels")
        save(args.out, args.count, args.size)
    return run(work)


if __name__ == "__main__":
    sys.exit(main())
