"""Draws animated characters whose captions compose: "a green critter with horns, laughing".

    pip install dicebear-core dicebear-styles dicebear-schema resvg-py
    python stickers/characters.py --out data/characters --count 10000 --size 64
    python stickers/characters.py --out stickers/characters --count 1000 --colours 16      # the built-in set

Four styles of DiceBear (Critters, Clay, Moods, Sprouts; all CC0 1.0) give the parts as SVG; this file chooses
them, moves the whole, changes the face over time, and draws with resvg. The hats of faces, tears and letters
are ours. Sticker number i is a pure function of i. Whole combinations of kind, colour, top and action are
held out of training.

Coordinates are those of the styles: 100 units a side, y downwards, whatever the size in pixels.
"""
import argparse
import functools
import io
import json
import multiprocessing
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError, cores, write_sticker  # noqa: E402
from stickers.fetch import run, settings, split_of, write_metadata  # noqa: E402

COLOURS = {"red": "#dc2f34", "orange": "#f58a1f", "yellow": "#fad93c", "green": "#43b04e", "blue": "#3370e8",
           "purple": "#8e44c4", "pink": "#fa91c8", "brown": "#87532f", "grey": "#a3a8b0"}
# Word in the caption -> variant of the style; only tops that are clearly visible at 64 pixels.
TOPS = {"critter": {"horns": "horns", "round ears": "earsRound", "spikes": "spikes", "antenna": "bobble",
                    "fin": "fin", "sprout": "sprout"},
        "clay figure": {"horns": "horns", "round ears": "ears", "spikes": "spikes", "antennae": "antenna",
                        "curl": "curl", "bump": "nub"},
        "face": {"crown": "", "party hat": "", "top hat": "", "bow": "", "halo": "", "horns": ""},
        "pot": {"cactus": "cactus", "flower": "flower", "palm tree": "palm", "grass": "grass",
                "bush": "bush", "leaf": "seedling"}}
PLURAL = ("horns", "round ears", "spikes", "antennae", "grass")         # words that take no article
ACTIONS = ("laughing", "winking", "jumping", "shaking", "dancing", "growing", "swaying", "sleeping",
           "spinning", "crying")
# What captions don't tell: shapes of the body (of the part "main") and faces. "open" are the eyes of actions
# that leave them open, "mouth" the mouths; "scale" is the size in the picture, "feet" the y of the foot.
STYLES = {
    "critter": {
        "style": "critters", "main": "body", "scale": 0.64, "feet": 100,
        "bodies": ("dome", "block", "squat", "round", "wedge", "bell"),
        "open": ("round", "bigPupils", "sideeye", "wide"), "mouth": ("smile", "smirk", "catMouth"),
        "happy": "happy", "shut": "closedLine", "squint": "squint", "wink": "wink",
        "laugh": "grin", "frown": "frown", "gasp": "ooh"},
    "clay figure": {
        "style": "clay", "main": "body", "scale": 0.76, "feet": 93,
        "bodies": ("pear", "boulder", "loaf", "egg", "blob", "squat"),
        "open": ("googly", "even", "side", "inward"), "mouth": ("smile", "smirk", "cat"),
        "happy": "happy", "shut": "happy", "squint": "tiny", "wink": "wink",          # "shut": turned over
        "laugh": "laugh", "frown": "frown", "gasp": "o"},
    "face": {
        "style": "moods", "main": "face", "scale": 0.63, "feet": 92,
        "bodies": ("circle", "squircle", "softSquare", "wide"),
        "open": ("pupils", "bigPupils", "sparkle", "lookSide"), "mouth": ("smile", "smirk", "cat"),
        "happy": "happy", "shut": "closed", "squint": "squint", "wink": "wink",
        "laugh": "bigSmile", "frown": "frown", "gasp": "gasp"},
    "pot": {
        "style": "sprouts", "main": "pot", "scale": 0.79, "feet": 100,
        "bodies": ("taper", "cylinder", "bowl", "tub", "bag", "rim"),
        "open": ("round", "bigPupils", "sideeye", "wide"), "mouth": ("smile", "tinySmile", "catMouth"),
        "happy": "happy", "shut": "closedLine", "squint": "angry", "wink": "wink",
        "laugh": "grin", "frown": "frown", "gasp": "ooh"}}
# Width and height of a part in the styles; twice the height of a top, which is enlarged about its foot.
SIZES = {"eyes": {"critters": (46, 24), "clay": (42, 20), "moods": (50, 19), "sprouts": (40, 17)},
         "mouth": {"critters": (29, 16), "clay": (26, 12), "moods": (36, 15), "sprouts": (20, 12)},
         "top": {"critters": (51, 84), "clay": (44, 50)}}
WORDS = ("kind", "colour", "top", "action")
ALPHAS = 7                      # steps of alpha where colours are limited
GROUND, MIDDLE = 97, 52         # y where the feet stand; y of the axis of a spin
FACE_TOP = {"circle": 11, "squircle": 11, "softSquare": 11, "wide": 15}       # y of the upper edge
HATS = {                        # drawn by us; (0, 0) is the middle of the upper edge
    "crown": '<path d="M-20 4V-22l11 11L0-26l9 15 11-11V4Z" fill="#fbbf24" stroke="#a16207" '
             'stroke-width="2.5"/>',
    "party hat": '<path d="M-16 5L0-30L16 5Z" fill="#14b8a6"/><path d="M-12-5L12 5H-3Z" fill="#fff"/>'
                 '<circle cy="-29" r="6" fill="#f43f5e"/>',
    "top hat": '<path d="M-30 6V0h14v-28h32v28h14v6Z" fill="#1e293b"/><path d="M-16-9h32v7h-32Z" '
               'fill="#e11d48"/>',
    "bow": '<path d="M0-5L-25-20V10ZM0-5L25-20V10Z" fill="#ec4899" stroke="#9d174d" stroke-width="2.5"/>'
           '<circle cy="-5" r="6" fill="#9d174d"/>',
    "halo": '<ellipse cy="-16" rx="25" ry="8" fill="none" stroke="#fde047" stroke-width="6"/>',
    "horns": '<path d="M-16 8C-19-6-26-14-36-20c-2 14 2 26 10 34ZM16 8C19-6 26-14 36-20c2 14-2 26-10 34Z" '
             'fill="#7f1d1d"/>'}
MISSING = "drawing characters needs `pip install dicebear-core dicebear-styles dicebear-schema resvg-py`"


@functools.cache
def load_style(name):
    """Name of a DiceBear style -> Style; DataError with the pip command where the packages are missing."""
    try:
        import dicebear
        import dicebear_styles
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise DataError(MISSING) from error
    return dicebear.Style(json.loads((Path(list(dicebear_styles.__path__)[0]) / f"{name}.json").read_text()))


@functools.lru_cache(64)
def body_svg(kind, colour, top, body, eyes, mouth, wide=1.0, turned=False):
    """One standing character -> SVG elements, without the outer <svg>. wide: how much larger the mouth is;
    turned: eyes upside down (a smiling shut eye becomes a sleeping one)."""
    from dicebear import Avatar
    parts = STYLES[kind]
    style, shade = parts["style"], COLOURS[colour]
    above = TOPS[kind][top] or "none"
    svg = str(Avatar(load_style(style), {
        "seed": "rdtf", "backgroundColor": "#00000000", "animationVariant": "none", "patternProbability": 0,
        "cheeksProbability": 0, "topProbability": 100, f"{parts['main']}Variant": body,
        f"{parts['main']}Color": shade, "accentColor": shade, "plantColor": "#4cae3c",
        "bloomColor": "#fb5f8a", "eyesVariant": eyes, "mouthVariant": mouth, "topVariant": above,
        "plantVariant": above}))
    svg = re.sub(r"<metadata.*?</metadata>|<!--.*?-->|^<svg[^>]*>|</svg>$", "", svg, flags=re.S)
    svg = re.sub(r'opacity="\.1[35]"', 'opacity="0"', svg)        # no shadows: soft edges cost bytes
    # Tops may now stand out of the style's own frame, which still cuts the body off at its foot.
    svg = svg.replace('<rect width="100" height="100" rx="0" ry="0"/>',
                      '<rect x="-50" y="-80" width="200" height="180"/>')

    def place(match):
        where, part = match.groups()
        w, h = SIZES[part][style]
        grow = {"eyes": 1.1 if kind == "pot" else 1.25, "mouth": 1.25 * wide, "top": 1.35}[part]
        flip = -1 if part == "eyes" and turned else 1
        return (f'<use transform="{where} translate({w / 2} {h / 2}) scale({grow} {grow * flip}) '
                f'translate({-w / 2} {-h / 2})" href="#{part}-')
    svg = re.sub(r'<use transform="([^"]*)" href="#(eyes|mouth|top)-', place, svg)
    if kind == "face":
        svg = f'{svg}<g transform="translate(50 {FACE_TOP[body]}) scale(1.1)">{HATS[top]}</g>'
    return svg


def eye_places(svg, style):
    """SVG of body_svg -> ((x, y) of the left eye, (x, y) of the right eye)."""
    where = re.search(r'<use transform="translate\(([-\d.]+) ([-\d.]+)\)[^"]*" href="#eyes-', svg)
    x, y = map(float, where.groups())
    w, h = SIZES["eyes"][style]
    return (x + 0.2 * w, y + h / 2), (x + 0.8 * w, y + h / 2)


def pose(action, phase, amount):
    """Where and how a character stands. action: one of ACTIONS; phase: 0 to 1, the part of the loop; amount:
    amplitude, about 1. Returns a dict: x, y (shift), angle in degrees about the feet (of a spin: about the
    middle), sx, sy (scale about the same point), eyes and mouth (names in STYLES; None: its own), wide (size
    of the mouth)."""
    wave, twice = 2 * np.pi * phase, 4 * np.pi * phase
    p = {"x": 0.0, "y": 0.0, "angle": 0.0, "sx": 1.0, "sy": 1.0, "eyes": None, "mouth": None, "wide": 1.0}
    hill = (0.5 - 0.5 * np.cos(wave)) * amount
    if action == "laughing":
        beat = np.cos(twice)
        p |= {"y": -3 - 3 * beat * amount, "sy": 1 + 0.12 * beat * amount, "sx": 1 - 0.08 * beat * amount,
              "eyes": "happy", "mouth": "laugh", "wide": 1.2 + 0.5 * beat}
    elif action == "winking":
        p |= {"angle": 24 * hill - 8, "eyes": "wink" if 0.3 < phase < 0.7 else None}
    elif action == "jumping":
        air = np.sin(np.pi * np.clip((phase - 0.15) / 0.7, 0, 1))
        low = (0.1 < phase < 0.15) + 0.6 * (phase > 0.85)      # crouch before, land after
        p |= {"y": -19 * air * amount, "sy": 1 - 0.26 * low + 0.05 * air, "sx": 1 + 0.16 * low - 0.04 * air,
              "mouth": "laugh" if air > 0.5 else None}
    elif action == "shaking":
        p |= {"x": 15 * np.cos(twice) * amount, "eyes": "squint", "mouth": "frown"}
    elif action == "dancing":
        p |= {"x": -14 * np.sin(wave) * amount, "y": -10 * abs(np.sin(twice)) * amount,
              "angle": 17 * np.sin(wave) * amount, "eyes": "happy", "mouth": "laugh"}
    elif action == "growing":
        size = 0.4 + 0.6 * min(1, phase / 0.75) if phase <= 0.8 else 0.7
        p |= {"sx": size, "sy": size}
    elif action == "swaying":
        p |= {"angle": 24 * np.sin(wave) * amount}
    elif action == "sleeping":
        breath = 0.5 - 0.5 * np.cos(wave)
        p |= {"angle": 10, "sy": 1 - 0.18 * breath * amount, "sx": 1 + 0.1 * breath * amount, "eyes": "shut",
              "mouth": "gasp"}
    elif action == "spinning":
        p |= {"angle": 360 * phase}
    elif action == "crying":
        p |= {"x": 3 * np.cos(2 * twice) * amount, "sy": 0.94 - 0.05 * np.cos(2 * twice), "eyes": "shut",
              "mouth": "frown", "wide": 1.2}
    return p


def letters(phase, side):
    """The two z letters that rise from a sleeper -> SVG. side: 1 right, -1 left."""
    out = []
    for late in (0.0, 0.5):
        at = (phase + late) % 1
        x, y, size = 50 + side * (26 + 12 * at), 40 - 30 * at, 0.5 + 0.6 * at
        out.append(f'<path transform="translate({x:.2f} {y:.2f}) scale({size:.3f})" d="M-7-7H7L-7 7H7" '
                   'stroke="#4f46e5" stroke-width="5" stroke-linejoin="round" stroke-linecap="round"/>')
    return "".join(out)


def tears(eyes, phase):
    """Drops that fly out of both eyes -> SVG."""
    out = []
    for (x, y), side in zip(eyes, (-1, 1)):
        for late in (0.0, 0.5):
            at = (phase + late) % 1
            across, down = x + side * (4 + 30 * at), y - 20 * at + 52 * at * at
            out.append(f'<path transform="translate({across:.2f} {down:.2f}) '
                       f'rotate({-side * (60 - 80 * at):.1f})" d="M0-10C8 0 7 7 0 7S-8 0 0-10Z" '
                       'fill="#7dd3fc" stroke="#0284c7" stroke-width="2"/>')
    return "".join(out)


def choices(index):
    """Sticker number -> all that makes it, as a dict: the words of its caption (kind, colour, top, action),
    the caption itself as text, and what it does not tell (body, eyes, mouth, amount, grow, flip, duration in
    ms)."""
    rng = np.random.default_rng([2605, int(index)])
    kind, colour = str(rng.choice(list(TOPS))), str(rng.choice(list(COLOURS)))
    top, action = str(rng.choice(list(TOPS[kind]))), str(rng.choice(ACTIONS))
    named = top if top in PLURAL else f"a{'n' if top[0] in 'aeiou' else ''} {top}"
    body, eyes, mouth = (str(rng.choice(STYLES[kind][name])) for name in ("bodies", "open", "mouth"))
    return {"kind": kind, "colour": colour, "top": top, "action": action,
            "text": f"a{'n' if colour[0] in 'aeiou' else ''} {colour} {kind} with {named}, {action}",
            "body": body, "eyes": eyes, "mouth": mouth, "amount": rng.uniform(0.9, 1.1),
            "grow": rng.uniform(0.95, 1.05), "flip": bool(rng.integers(2)),
            "duration": int(rng.integers(10, 14)) * 10}


def draw(kind, colour, top, action, body, eyes, mouth, amount=1.0, grow=1.0, flip=False, frames=8, size=64):
    """A character by its parts -> uint8 (frames, size, size, 4), straight RGBA, one loop of the action."""
    parts, out = STYLES[kind], []
    load_style(parts["style"])                          # first, for its message
    import resvg_py
    for i in range(frames):
        phase = i / frames
        p = pose(action, phase, amount)
        inner = body_svg(kind, colour, top, body, parts[p["eyes"]] if p["eyes"] else eyes,
                         parts[p["mouth"]] if p["mouth"] else mouth, round(p["wide"], 3),
                         kind == "clay figure" and p["eyes"] == "shut")
        if action == "crying":
            inner += tears(eye_places(inner, parts["style"]), phase)
        scale, foot = parts["scale"] * grow, parts["feet"]
        pivot, ground = (58, MIDDLE) if action == "spinning" else (foot, GROUND)
        transform = (f'translate({50 + p["x"]:.3f} {ground + p["y"]:.3f}) rotate({p["angle"]:.3f}) '
                     f'scale({scale * p["sx"]:.4f} {scale * p["sy"]:.4f}) translate(-50 {-pivot})')
        svg = f'<g transform="{transform}">{inner}</g>'
        if flip:
            svg = f'<g transform="translate(100 0) scale(-1 1)">{svg}</g>'
        if action == "sleeping":
            svg += letters(phase, -1 if flip else 1)
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100" fill="none">{svg}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
        out.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")))
    return np.stack(out)


def character(index, size=64, frames=8):
    """Sticker number `index`, the same for ever -> (frames uint8 (t, size, size, 4) straight RGBA, its
    choices)."""
    chosen = choices(index)
    parts = {name: value for name, value in chosen.items() if name not in ("text", "duration")}
    return draw(**parts, frames=frames, size=size), chosen


def write(index, folder, size, frames, colours=0):
    """Draws sticker `index` into folder unless it is there -> its line of metadata.jsonl (a dict). colours:
    at most so many in a clip, for small files (0: any)."""
    path, chosen = Path(folder) / f"{index:08}.webp", choices(index)
    if not path.exists():                               # files appear whole or not at all
        clip, _ = character(index, size, frames)
        write_sticker(path, limit_colours(clip, colours) if colours else clip, chosen["duration"])
    return {"file_name": path.name, "text": chosen["text"], "split": split_of(chosen["text"]),
            **{word: chosen[word] for word in WORDS}}


def limit_colours(clip, count):
    """Straight RGBA uint8 (t, h, w, 4) -> the same with at most count colours in all frames together, and
    alpha in ALPHAS steps: at 64 pixels a difference of 0.5 of 255 on average, and half the bytes."""
    alpha = np.rint(np.rint(clip[..., 3] * (ALPHAS / 255)) * (255 / ALPHAS)).astype(np.uint8)
    seen, out = alpha > 0, np.zeros_like(clip)
    few = Image.fromarray(clip[seen][None, :, :3])
    few = few.quantize(count, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    out[seen, :3], out[seen, 3] = np.asarray(few.convert("RGB"))[0], alpha[seen]
    return out


def save(out, indices, size, frames, colours, workers):
    """Draws stickers `indices` into the folder `out`, with metadata.jsonl, which keeps its lines about
    others. Resumes."""
    for style in {parts["style"] for parts in STYLES.values()}:
        load_style(style)                               # what is missing is told once, not by every worker
    settings(out, size=size, frames=frames, colours=colours)
    table, rows = Path(out) / "metadata.jsonl", {}
    if table.exists():
        try:
            lines = [json.loads(line) for line in table.read_text().splitlines()]
            rows = {line["file_name"]: line for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{table}: no list of captions; delete it") from error
    task = functools.partial(write, folder=out, size=size, frames=frames, colours=colours)
    with multiprocessing.Pool(workers) as pool:
        done = tqdm(pool.imap(task, indices, 16), "drawing", len(indices), unit="sticker")
        rows |= {row["file_name"]: row for row in done}
    write_metadata(out, [rows[name] for name in sorted(rows)])


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Draw animated characters whose captions compose.")
    parser.add_argument("--out", default="data/characters", help="folder to fill")
    parser.add_argument("--count", type=int, default=10000, help="how many")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--frames", type=int, default=8, help="frames of a loop")
    parser.add_argument("--colours", type=int, default=0, help="most colours of a clip (0: any)")
    parser.add_argument("--workers", type=int, default=cores(), help="processes")
    args = parser.parse_args(arguments)

    def work():
        for name, low, high in (("count", 1, 10 ** 6), ("start", 0, 10 ** 8 - args.count), ("size", 16, 1024),
                                ("frames", 2, 64), ("workers", 1, 64), ("colours", 0, 256)):
            if not low <= getattr(args, name) <= high:
                raise DataError(f"--{name} {getattr(args, name)}: give {low} to {high}")
        save(args.out, range(args.start, args.start + args.count), args.size, args.frames, args.colours,
             args.workers)
    return run(work)


if __name__ == "__main__":
    sys.exit(main())
