"""Reads off the frames what captions say: colour, shape, motion and scale of procedural stickers; kind,
colour, top and action of characters.

    python benchmarks/attributes.py --count 300        # how often the reader is right on true clips
    python benchmarks/attributes.py --set characters --count 500 --blur 1 --noise 0.03

Both readers are plain geometry, so that conditioning can be measured without a trained judge. They are made
for clips that a model made: soft edges and noise are expected; empty clips read None.

Procedural stickers: alpha gives a mask; the mask's place, area and opacity give the motion; its polar map,
compared with examples of every shape at every angle, gives the shape.

Characters: every motion of the generator is undone in turn; the action is the one after which the frames
agree best. Their median then stands still: it is compared with the mean outline of every kind, body and top
in the built-in set, and most of its lower pixels tell the colour.
"""
import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
from PIL import ImageColor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from stickers import characters, procedural  # noqa: E402

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
    combinations = len(procedural.SHAPES) * len(procedural.RADIUS)
    while len(found) < combinations or min(map(len, found.values())) < each:
        frames, _, _, truth = procedural.sticker(index, size)
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
    stickers/procedural.py; every value None where nothing is visible."""
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
    palette = procedural.PALETTE
    return {"colour": min(palette, key=lambda name: ((colour - palette[name]) ** 2).sum()),
            "shape": shape, "motion": read_motion(frames, seen),
            "scale": scales[min(same, key=lambda i: abs(sides[i] - side))]}


# ------------------------------------------------------------------------------------------------------------
# Characters

CHARACTER_NAMES = characters.WORDS
GRID, COARSE = 48, 24          # side of a standing picture in pixels; and while its action is sought
AMOUNTS = (0.9, 1.0, 1.1)      # amplitudes to try: the generator draws 0.9 to 1.1
SIZES = (0.95, 1.0, 1.05)      # and sizes
SAME_MIRRORED = ("laughing", "jumping", "growing")     # motions that a mirror leaves as they are
SAME_AMOUNT = ("growing", "spinning")                  # and motions without an amplitude
SOFT = 0.01                    # the least variance of a pixel that is believed
BUILT_IN = Path(__file__).resolve().parent.parent / "stickers" / "characters"


@functools.cache
def undo(action, mirrored, amount, t, side):
    """Where the pixels of the standing picture are in every frame of an action: (t, side, side, 2) as (x, y);
    the picture's side is 1. The motion is the generator's own; no drawing package is needed."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 100
    places = []
    for i in range(t):
        pose = characters.pose(action, i / t, amount)
        ground = characters.MIDDLE if action == "spinning" else characters.GROUND
        angle = np.deg2rad(pose["angle"])
        dx, dy = (x - 50) * pose["sx"], (y - ground) * pose["sy"]
        px = 50 + pose["x"] + dx * np.cos(angle) - dy * np.sin(angle)
        py = ground + pose["y"] + dx * np.sin(angle) + dy * np.cos(angle)
        places.append(np.stack([100 - px if mirrored else px, py], -1) / 100)
    return np.stack(places)


def sample(frames, places):
    """Frames (t, h, w, c) at places (t, n, n, 2) -> (t, n, n, c); bilinear, 0 outside."""
    t, h, w, _ = frames.shape
    x, y = places[..., 0] * w - 0.5, places[..., 1] * h - 0.5
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    padded = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)))
    frame, out = np.arange(t)[:, None, None], 0
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (x - left if dx else left + 1 - x) * (y - top if dy else top + 1 - y)
            row, column = (top + dy + 1).clip(0, h + 1), (left + dx + 1).clip(0, w + 1)
            out = out + weight[..., None] * padded[frame, row, column]
    return out


def stand(frames, action, mirrored=False, amount=1.0):
    """Premultiplied frames (t, h, w, 4) in 0..1 -> their median once the action is undone (GRID, GRID, 4)."""
    return np.median(sample(frames, undo(action, mirrored, amount, len(frames), GRID)), 0)


def unrest(frames, action, mirrored=False, amount=1.0):
    """Premultiplied frames in 0..1 -> how much they differ once the action is undone, as a share of their
    energy."""
    standing = sample(frames, undo(action, mirrored, amount, len(frames), COARSE))
    return standing.var(0).sum() / ((standing ** 2).mean(0).sum() + 1e-6)


def read_action(frames):
    """Premultiplied frames in 0..1 -> (action, standing picture (GRID, GRID, 4)): of all motions of the
    generator the one that leaves least when it is undone; None where the frames differ less as they are."""
    tried = [(None, False, 1.0)]
    for action in characters.ACTIONS:
        for mirrored in (False,) if action in SAME_MIRRORED else (False, True):
            tried += [(action, mirrored, amount) for amount in ((1.0,) if action in SAME_AMOUNT else AMOUNTS)]
    best = min(tried, key=lambda motion: unrest(frames, *motion))
    return best[0], stand(frames, *best)


def lowest_row(standing):
    """Standing picture -> its lowest visible row, the last one where nothing is."""
    rows = np.flatnonzero(standing[..., 3].max(1) > 0.5)
    return rows[-1] if len(rows) else GRID - 1


def outline(standing, size=1.0):
    """Standing picture, premultiplied -> (GRID, GRID, 2), scaled by `size` and its lowest row put on the
    last: alpha, and darkness (ink of eyes and mouth), which no colour of a body changes much."""
    alpha = standing[..., 3]
    dark = alpha - standing[..., :3].max(-1)
    y, x = (np.mgrid[:GRID, :GRID] + 0.5) / GRID
    feet = (lowest_row(standing) + 1) / GRID
    places = np.stack([0.5 + (x - 0.5) / size, feet + (y - 1) / size], -1)
    return sample(np.stack([alpha, dark * (dark > 0.6)], -1)[None], places[None])[0]


def read_colour(standing):
    """Standing picture, premultiplied -> name of the colour that most pixels of its lowest quarter are
    nearest to (a plant grows above, hats sit above); None where nothing is solid."""
    low = lowest_row(standing)
    pixels = standing[max(0, low - GRID // 4):low + 1].reshape(-1, 4)
    solid = pixels[pixels[:, 3] > 0.8]
    names = list(characters.COLOURS)
    others = ["#1e293b", "#ffffff"]                                                    # ink, white of the eye
    palette = [ImageColor.getrgb(colour) for colour in [*characters.COLOURS.values(), *others]]
    nearest = ((solid[:, None, :3] * 255 - np.array(palette)) ** 2).sum(-1).argmin(1)
    votes = np.bincount(nearest, minlength=len(palette))[:len(names)]
    return names[votes.argmax()] if votes.any() else None


@functools.cache
def standing_templates(each=4):
    """-> (kinds, tops, outlines (n, GRID, GRID, 2), variance (GRID, GRID, 2)): the mean outline of up to
    `each` built-in characters of every kind, body and top, and how much outlines differ from their mean."""
    groups = {}
    for line in (BUILT_IN / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        chosen = characters.choices(int(Path(row["file_name"]).stem))
        group = groups.setdefault((chosen["kind"], chosen["body"], chosen["top"]), [])
        if len(group) < each:
            frames = data.premultiply(data.read_sticker(BUILT_IN / row["file_name"])[0]) / 255
            standing = stand(frames, chosen["action"], chosen["flip"], chosen["amount"])
            group.append(outline(standing, 1 / chosen["grow"]))
    means = np.stack([np.mean(group, 0) for group in groups.values()])
    variance = np.mean([np.var(group, 0) for group in groups.values()], 0)
    return [kind for kind, _, _ in groups], [top for _, _, top in groups], means, variance


def read_character(frames):
    """Clip uint8 (t, h, w, 4) straight RGBA, one whole loop in even steps -> {"kind", "colour", "top",
    "action"} in the words of stickers/characters.py; action None where nothing moves, all None where nothing
    is visible."""
    frames = data.premultiply(frames) / np.float32(255)
    if frames[..., 3].max() < 0.3:
        return dict.fromkeys(CHARACTER_NAMES)
    action, standing = read_action(frames)
    kinds, tops, means, variance = standing_templates()
    views = [outline(standing, size)[:, ::way] for size in SIZES for way in (1, -1)]      # or mirrored
    errors = [((means - view) ** 2 / (variance + SOFT)).sum((1, 2, 3)) for view in views]
    best = np.min(errors, 0).argmin()
    return {"kind": kinds[best], "colour": read_colour(standing), "top": tops[best], "action": action}


# ------------------------------------------------------------------------------------------------------------
# How often the readers are right on true clips

def worsen(frames, blur, noise, rng):
    """Straight uint8 RGBA (t, h, w, 4) -> the same with soft edges (Gaussian of `blur` pixels) and noise (its
    standard deviation; 1 is white): such are a model's clips."""
    x = data.premultiply(frames) / 255
    if blur:
        reach = np.arange(-np.ceil(3 * blur), np.ceil(3 * blur) + 1)
        kernel = np.exp(-reach ** 2 / (2 * blur ** 2))
        for axis in (1, 2):
            x = np.apply_along_axis(np.convolve, axis, x, kernel / kernel.sum(), "same")
    x = np.rint((x + noise * rng.standard_normal(x.shape)).clip(0, 1) * 255).astype(np.uint8)
    return data.unpremultiply(np.concatenate([np.minimum(x[..., :3], x[..., 3:]), x[..., 3:]], -1))


def true_clip(name, index, size):
    """-> (frames straight RGBA, dict of what is to be read) of sticker `index` of a set."""
    if name == "characters":
        frames, chosen = characters.character(index, size)
        return frames, {word: chosen[word] for word in CHARACTER_NAMES}
    frames, _, _, truth = procedural.sticker(index, size)
    keys = data.find_keyframes(data.premultiply(frames))[-1]
    return frames[keys[keys >= 0]], truth


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--set", choices=("procedural", "characters"), default="procedural")
    parser.add_argument("--count", type=int, default=300, help="stickers (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default: %(default)s)")
    parser.add_argument("--blur", type=float, default=0, help="soften by so many pixels")
    parser.add_argument("--noise", type=float, default=0, help="deviation of added noise; 1 is white")
    args = parser.parse_args()
    read, names = (read_character, CHARACTER_NAMES) if args.set == "characters" else (read_attributes, NAMES)
    right, rng = dict.fromkeys(names, 0), np.random.default_rng(0)
    try:
        for index in range(10 ** 6, 10 ** 6 + args.count):
            frames, truth = true_clip(args.set, index, args.size)
            found = read(worsen(frames, args.blur, args.noise, rng))
            for name in names:
                right[name] += found[name] == truth[name]
    except data.DataError as error:
        sys.exit(f"error: {error}")
    print(", ".join(f"{name} {100 * hits / args.count:.1f} %" for name, hits in right.items()))


if __name__ == "__main__":
    main()
