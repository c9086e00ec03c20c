"""Reads colour, shape, motion and scale off frames of the procedural stickers (data.synthetic_sticker).

    python benchmarks/attributes.py --count 300        # how often the reader is right on true clips

Plain geometry, so that conditioning can be measured without a trained judge: alpha gives a mask; the mask's
place, area and opacity give the motion; its polar map, compared with examples of every shape at every angle,
gives the shape. Made for clips that a model made: soft edges and noise are expected; empty ones read None.
"""
import argparse
import functools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

ANGLES, RADII = 72, 16
NAMES = ("colour", "shape", "motion", "scale")


def measure(frame):
    """Straight RGBA uint8 (h, w, 4) -> (opacity, centre (x, y), area, polar map (ANGLES, RADII)); the
    picture's side is 1; None where nothing is visible. Polar map: alpha by angle and radius / sqrt(area)."""
    alpha = frame[..., 3] / 255.0
    opacity = np.sort(alpha.ravel())[-max(alpha.size // 100, 4):].mean()       # of the most opaque 1 %
    if opacity < 0.08:
        return None
    h, w = alpha.shape
    mask = np.clip(alpha / opacity, 0, 1)
    mask = mask * (mask > 0.3)                                                  # leaves out faint haze
    y, x = (np.mgrid[:h, :w] + 0.5) / h
    area = mask.sum()
    centre = np.array([(mask * x).sum(), (mask * y).sum()]) / area
    area /= h * w
    angle = np.arange(ANGLES) * 2 * np.pi / ANGLES
    radius = (np.arange(RADII) + 0.5) / RADII * 1.3 * np.sqrt(area)
    px = (centre[0] + np.cos(angle)[:, None] * radius) * w
    py = (centre[1] + np.sin(angle)[:, None] * radius) * h
    inside = (px >= 0) & (px < w) & (py >= 0) & (py < h)
    polar = mask[py.clip(0, h - 1).astype(int), px.clip(0, w - 1).astype(int)] * inside
    return opacity, centre, area, polar


@functools.cache
def examples(size, each=4):
    """Stickers to compare with, `each` of every shape and scale -> (shapes, scales, sides, polar maps), one
    row per sticker; side = mean sqrt(area) over its frames."""
    found, index = {}, 0
    while len(found) < len(data.SHAPES) * len(data.RADIUS) or min(map(len, found.values())) < each:
        frames, _, _, truth = data.synthetic_sticker(index, size)
        kind = found.setdefault((truth["shape"], truth["scale"]), [])
        if len(kind) < each:
            seen = [measure(frame) for frame in frames]
            side = np.mean([np.sqrt(m[2]) for m in seen])
            kind.append((truth["shape"], truth["scale"], side, seen[0][3]))
        index += 1
    shapes, scales, sides, polars = zip(*(example for kind in found.values() for example in kind))
    return shapes, scales, np.array(sides), np.stack(polars)


def turned_distances(a, b):
    """Polar maps (n, ANGLES, RADII) and (m, ANGLES, RADII) -> (n, m), the smallest mean squared difference
    over all turns: correlation over angles by FFT, summed over radii."""
    product = np.einsum("nfr,mfr->nmf", np.fft.rfft(a, axis=1), np.fft.rfft(b, axis=1).conj(), optimize=True)
    likeness = np.fft.irfft(product, n=ANGLES, axis=2).max(2)
    return ((a ** 2).sum((1, 2))[:, None] + (b ** 2).sum((1, 2)) - 2 * likeness) / (ANGLES * RADII)


def read_motion(frames, seen):
    """Straight RGBA frames and what `measure` saw in each -> name of the motion.

    The thresholds are half of what the generator draws: opacity falls by 0.8, size changes by half, a path is
    0.22 of the side or longer (but the centre of a spinning heart or moon moves by up to 0.12, too)."""
    opacity, side = np.array([m[0] for m in seen]), np.sqrt([m[2] for m in seen])
    across, down = np.ptp([m[1] for m in seen], axis=0) > 0.17
    if np.ptp(opacity) > 0.3:
        return "blink"
    if np.ptp(side) / side.mean() > 0.25:
        return "pulse"
    if across or down:
        return "orbit" if across and down else "shake" if across else "bounce"
    solid = data.premultiply(frames) / 255.0
    change = np.abs(solid - solid[0]).mean((1, 2, 3)).max() / side.mean() ** 2     # per unit of visible area
    return "spin" if change > 0.04 else "still"


def read_attributes(frames):
    """Clip uint8 (t, h, w, 4) straight RGBA -> {"colour", "shape", "motion", "scale"} in the words of
    data.synthetic_sticker; every value None where nothing is visible."""
    seen = [measure(frame) for frame in frames]
    visible = [i for i, m in enumerate(seen) if m]
    if not visible:
        return dict.fromkeys(NAMES)
    frames, seen = frames[visible], [seen[i] for i in visible]
    inner = np.concatenate([frame[frame[..., 3] > 0.8 * 255 * m[0]][:, :3] for frame, m in zip(frames, seen)])
    colour = np.median(inner, 0)                                    # the eyes are a tenth of the area
    shapes, scales, sides, polars = examples(frames.shape[1])
    shape = shapes[turned_distances(np.stack([m[3] for m in seen]), polars).mean(0).argmin()]
    side = np.mean([np.sqrt(m[2]) for m in seen])
    same = [i for i, name in enumerate(shapes) if name == shape]
    return {"colour": min(data.PALETTE, key=lambda name: ((colour - data.PALETTE[name]) ** 2).sum()),
            "shape": shape, "motion": read_motion(frames, seen),
            "scale": scales[min(same, key=lambda i: abs(sides[i] - side))]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="stickers (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default: %(default)s)")
    args = parser.parse_args()
    right = {name: 0 for name in NAMES}
    for index in range(10 ** 6, 10 ** 6 + args.count):
        frames, _, _, truth = data.synthetic_sticker(index, args.size)
        keys = data.find_keyframes(data.premultiply(frames))[-1]
        read = read_attributes(frames[keys[keys >= 0]])
        for name in NAMES:
            right[name] += read[name] == truth[name]
    print(", ".join(f"{name} {100 * hits / args.count:.1f} %" for name, hits in right.items()))


if __name__ == "__main__":
    main()
