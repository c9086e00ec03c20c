"""Sticker files in, training clips out: reading, writing, keyframes, captions, the store.

The paper trains on clips of F = 8 discrete frames: per sticker and per draw, k ~ U{3..8} frames are chosen by
clustering (Table 6), so neighbours in a clip differ by a jump, not by a tick. This file reads any folder of
stickers, finds those frames once, and keeps them in a memory-mapped store that training reads undecoded.

    python data.py prepare my_stickers --out cache/mine --size 64         # a store of pixels
    python data.py prepare my_stickers --out cache/mine --size 128 --vae runs/vae/vae.pt     # ... of latents
    python data.py convert in.gif out.webp --size 512 --max-kb 500
    python data.py convert in.gif --for telegram                    # or whatsapp, signal, discord, line
    python data.py info out.webp                                    # what it is, and the command that made it

stickers/ holds scripts that build sets. Axis letters: t frame, c channel, h w rows and columns. A sticker is
uint8 RGBA (t, h, w, 4): straight in files, premultiplied in training, where colour under alpha 0 is 0.
"""
import argparse
import bisect
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

SUFFIXES = (".gif", ".webp", ".png", ".apng", ".jpg", ".jpeg", ".mp4", ".webm")
IMAGES = ("GIF", "WEBP", "PNG", "JPEG")      # the only decoders Pillow may try: some others start programs
MAX_BYTES = 64 << 20                         # limits against decompression bombs: bytes of a file,
MAX_PIXELS = 1 << 24                         # pixels of a frame,
MAX_FRAMES = 1000
MAX_TOTAL = 1 << 27                          # and pixels of all frames together (512 MiB of RGBA)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)        # we refuse those ourselves
FILTERS = ("small", "aspect", "entropy", "duplicate")           # VSD2M's filters; the thresholds are ours:
MIN_SIDE, MAX_ASPECT, MIN_ENTROPY = 32, 3.0, 0.3                # pixels, ratio, bits
MIN_K = 3                                    # fewest frames of a clip; F is the most (Table 6: 3 to 8)
SHARD = 1000                                 # stickers per shard of a store
FORMAT = "rdtf-stickers-2"
SPLITS = ("train", "held_out")


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


def fit(image, size):
    """PIL RGBA image -> premultiplied uint8 (size, size, 4), scaled to its longer side, centred."""
    w, h = (max(1, round(side * size / max(image.size))) for side in image.size)
    image = image.convert("RGBa")      # premultiplied first: else colours under alpha 0 bleed into the edges
    x = np.asarray(image if image.size == (w, h) else image.resize((w, h), Image.Resampling.BICUBIC))
    out = np.zeros((size, size, 4), np.uint8)
    top, left = (size - h) // 2, (size - w) // 2
    out[top:top + h, left:left + w] = np.minimum(x, x[..., 3:])      # bicubic can lift a colour above alpha
    return out


def fit_frames(frames, size):
    """Straight uint8 RGBA (t, h, w, 4) -> premultiplied (t, size, size, 4), aspect kept."""
    return np.stack([fit(Image.fromarray(np.ascontiguousarray(frame)), size) for frame in frames])


def fit_straight(frames, size):
    """The same -> straight. One frame at a time: unpremultiplying takes several times a frame's memory."""
    return np.stack([unpremultiply(frame) for frame in fit_frames(frames, size)])


def to_straight(clip):
    """A torch tensor (t, 4, s, s), premultiplied in [0, 1] -> straight uint8 RGBA (t, s, s, 4), rounded."""
    return unpremultiply((clip.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


# ------------------------------------------------------------------------------------------------------------
# Reading

def _rgba(image):
    """One PIL frame of any mode -> RGBA. 16-bit grey is scaled (Pillow's convert would clip it to white)."""
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image).astype(np.float64)
        grey = (grey / (257 if grey.max() > 255 else 1)).clip(0, 255).round()
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGBA")


def _reason(error, path):
    text = " ".join(str(error).split()).replace(repr(str(path)), "").replace(str(path), "").strip(" :'")
    return text[:120] or type(error).__name__


def _limit(path, frames, size):
    w, h = size
    if w * h > MAX_PIXELS or frames > MAX_FRAMES or frames * w * h > MAX_TOTAL:
        raise DataError(f"{path}: {frames} frames of {w}x{h} are over the limits ({MAX_PIXELS} pixels each, "
                        f"{MAX_FRAMES} frames, {MAX_TOTAL} pixels in all); make it smaller or shorter first")


def ffmpeg():
    try:
        import imageio_ffmpeg
        return imageio_ffmpeg
    except ImportError as error:
        raise DataError("video (MP4, WebM) needs `pip install imageio-ffmpeg`") from error


def _video_frames(path):
    source = str(Path(path).resolve())                       # "cat:1.webm" would be a protocol of ffmpeg's
    reader = ffmpeg().read_frames(source)
    codec = next(reader)["codec"].split()[0]
    reader.close()
    own = {"vp8": ["-c:v", "libvpx"], "vp9": ["-c:v", "libvpx-vp9"]}.get(codec, [])   # the others drop alpha
    reader = ffmpeg().read_frames(source, "rgba", bits_per_pixel=32, input_params=own)
    meta = next(reader)
    for i, frame in enumerate(reader):
        _limit(path, i + 1, meta["size"])
        ms = [round(1000 * j / (meta["fps"] or 25)) for j in (i, i + 1)]
        yield Image.frombytes("RGBA", meta["size"], frame), ms[1] - ms[0]


def _image_frames(path):
    with Image.open(path, formats=IMAGES) as image:
        photo = image.format in ("JPEG", "MPO")        # a camera's MPO is a JPEG with another view behind it
        count, size = 1 if photo else getattr(image, "n_frames", 1), image.size
        _limit(path, count, size)
        # An APNG may carry a picture for old viewers that is none of its frames.
        start = int(image.format == "PNG" and count > 1 and bool(image.info.get("default_image")))
        for i in range(start, count):
            try:
                image.seek(i)
                image.load()               # WebP knows a frame's duration only after load()
                frame = _rgba(ImageOps.exif_transpose(image) if photo else image)
            except Exception as error:
                raise DataError(f"{path}: damaged at frame {i} of {count} ({_reason(error, path)}); "
                                f"replace or delete it") from error
            ms = float(image.info.get("duration") or 0)      # browsers show a frame without a time for 100 ms
            ms = round(ms) if 0 < ms < 1e6 else 100
            yield (frame.crop((0, 0, *size)), ms) if count > 1 else (frame, 0)       # a GIF's may stick out


def _is_video(path):
    """MP4 or WebM, whatever the name says?"""
    with open(path, "rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3"


def iter_frames(path):
    """Yields (PIL RGBA image, duration in ms) per frame; DataError for all that is no whole sticker."""
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'is a folder; name a file' if path.is_dir() else 'no such file'}")
        if not 0 < path.stat().st_size <= MAX_BYTES:
            raise DataError(f"{path}: is empty or over {MAX_BYTES >> 20} MiB; replace or delete it")
        count = 0
        for count, pair in enumerate((_video_frames if _is_video(path) else _image_frames)(path), 1):
            yield pair
        if not count:
            raise DataError(f"{path}: no picture in it; replace or delete it")
    except DataError:
        raise
    except Exception as error:             # decoders raise nearly everything on damaged bytes
        raise DataError(f"{path}: damaged, or no sticker: {_reason(error, path)}; "
                        f"replace or delete it") from error


def read_sticker(path):
    """Reads GIF, WebP, APNG, PNG, JPEG, and MP4 or WebM if imageio-ffmpeg is installed.

    Returns (frames uint8 (t, h, w, 4) straight RGBA, durations: t ints in ms, [0] for a single picture).
    Colour under alpha 0 is 0. Raises DataError if a frame is damaged or a limit (MAX_*) is passed.
    """
    frames, durations = zip(*((np.asarray(frame), ms) for frame, ms in iter_frames(path)))
    frames = np.stack(frames)
    return np.where(frames[..., 3:] > 0, frames, 0), list(durations)


# ------------------------------------------------------------------------------------------------------------
# Writing

LEVELS = {".webp": (None, 90, 75, 60, 45, 30, 15), ".gif": (255, 128, 64, 32, 16),      # quality, colours;
          ".apng": (None, 128, 64, 32, 16), ".png": (None, 128, 64, 32, 16),            # None: lossless;
          ".webm": (18, 26, 34, 42, 50, 63)}                                            # crf
WORDS = {".webp": "quality", ".webm": "quality crf"}              # what a level is; of the others: colours


# What a platform takes as a moving sticker (2025-26). rule: "exact" = padded, "side" = one side is just so,
# "most" = only shrunk. ms: the least per frame; seconds: the most, of all loops; loops: the most, 0 = for
# ever; whole: the app may stop at the first frame, which must show the sticker; still: for a still one;
# unit: a loop takes a multiple of so many seconds, 0 = any time.
Platform = namedtuple("Platform", "suffix width height rule kb fewest most ms seconds loops whole still unit",
                      defaults=[0])
PLATFORMS = {name: Platform(*row) for name, *row in (
    ("telegram", ".webm", 512, 512, "side", 256, 2, 90, 100 / 3, 3, 0, False, "webp --size 512 --max-kb 512"),
    ("whatsapp", ".webp", 512, 512, "exact", 500, 2, 1000, 10, 10, 0, True, "webp --size 512 --max-kb 100"),
    ("signal", ".png", 512, 512, "most", 300, 2, 150, 20, 3, 0, False, "png --size 512 --max-kb 300"),
    ("discord", ".png", 320, 320, "exact", 512, 2, 250, 20, 5, 0, False, "png --size 320 --max-kb 512"),
    ("line", ".png", 320, 270, "side", 300, 5, 20, 10, 4, 4, True, "png --size 320 --max-kb 1000", 1))}


def pick_by_time(times, count):
    """Indices of the frames shown at the middles of `count` equal parts of the whole time."""
    ends = np.cumsum(times)
    return np.searchsorted(ends, (np.arange(count) + 0.5) * ends[-1] / count)


def resample(frames, times, count, least):
    """-> (`count` frames by time, all as long and at least `least` ms, which of the frames they are)."""
    index = pick_by_time(times, count)
    if count > 1 and (frames[index] == frames[index[0]]).all():      # what moves is short: it must be seen
        index[-1] = (frames != frames[index[0]]).sum((1, 2, 3)).argmax()
        index.sort()
    ends = np.linspace(0, max(sum(times), least * count), count + 1)
    return frames[index], np.diff(ends.round()).astype(int).tolist(), index


def fit_platform(frames, times, row):
    """Straight frames and ms -> (frames, ms, loops, what was given up) within the limits of a Platform."""
    count, total, lost = len(frames), sum(times), []
    if not any((a != b).any() for a, b in zip(frames, frames[1:])):
        raise DataError(f"--for makes moving stickers and this is a still picture; for a still one use "
                        f"`data.py convert IN OUT.{row.still}`")
    wanted = min(total, 1000 * row.seconds)
    over = wanted < total
    wanted = max(1, round(wanted / 1000 / row.unit)) * 1000 * row.unit if row.unit else wanted
    if wanted != total:
        how = "faster" if wanted < total else "slower"
        lost.append(f"{wanted / 1000:g} seconds instead of {total / 1000:.4g} (it plays {how})")
        times, total = np.diff((np.cumsum([0, *times]) * wanted / total).round()).astype(int).tolist(), wanted
    most = min(row.most, MAX_TOTAL // (row.width * row.height))
    kept = max(row.fewest, min(count, most, int(total / row.ms + 1e-6)))
    if over or kept != count or min(times) < row.ms:
        frames, times, index = resample(frames, times, kept, row.ms)
        lost += [f"{len(set(index))} of {count} frames"] * (len(set(index)) < count)
    seen = (frames[..., 3] > 0).mean((1, 2))
    first = int((seen >= seen.max() / 2).argmax()) if row.whole else 0
    lost += [f"its start (it begins with frame {first + 1}, the first that shows enough)"] * (first > 0)
    h, w = frames.shape[1:3]
    side = min(row.width * max(w, h) // w, row.height * max(w, h) // h)        # the longer one
    side = min(side, max(w, h)) if row.rule == "most" else side
    frames = fit_straight(np.roll(frames, -first, 0), side)
    if row.rule != "exact":
        h, w = (max(1, round(x * side / max(w, h))) for x in (h, w))
        frames = frames[:, (side - h) // 2:, (side - w) // 2:][:, :h, :w]      # without the padding of fit
    loops = max(1, min(row.loops, int(1000 * row.seconds / sum(times)))) if row.loops else 0
    return frames, times[first:] + times[:first], loops, lost


def _webm(frames, times, level, text):
    """VP9 with alpha, of one frame rate, 30 a second at most."""
    total = sum(times)
    count = max(1, min(round(total / min(times)), total * 30 // 1000, MAX_FRAMES))
    picked = frames[pick_by_time(times, count)]
    with tempfile.TemporaryDirectory() as folder:            # a pipe can't take the length, written last
        command = [ffmpeg().get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgba",
                   "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-framerate", f"{1000 * count}/{total}",
                   "-i", "-", "-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-crf", str(level), "-b:v", "0",
                   "-auto-alt-ref", "0", "-deadline", "good", "-cpu-used", "4", "-threads", "2",
                   *(["-metadata", f"comment={text}"] if text else []), f"{folder}/a.webm"]
        done = subprocess.run(command, input=picked.tobytes(), capture_output=True)
        if done.returncode:
            raise DataError(f"ffmpeg: {' '.join(done.stderr.decode(errors='replace').split())[:200]}")
        return Path(folder, "a.webm").read_bytes()


def _encode(suffix, frames, times, level, text=None, loops=0, every=False):
    """Straight frames -> bytes of a looping file. every: APNG keeps frames that equal the one before."""
    if suffix == ".webm":
        return _webm(frames, times, level, text)
    options, pictures = {}, [Image.fromarray(x) for x in frames]
    if suffix == ".webp":
        exif = Image.Exif()
        if text:
            exif[0x010E] = text                                          # ImageDescription
        options = {"format": "WEBP", "method": 4, "exif": exif.tobytes() if text else b"",
                   "lossless": level is None, "quality": level or 60}
    elif suffix == ".gif":
        # one palette for all frames, or it flickers; alpha is cut at one half by us, since Pillow's quantiser
        # does it unpredictably; disposal 2, or every frame would be drawn over the one before
        clear = frames[..., 3] < 128
        flat = np.where(clear[..., None], 0, frames[..., :3]).reshape(-1, frames.shape[2], 3)
        flat = Image.fromarray(flat).quantize(level, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        coded = np.where(clear, 255, np.asarray(flat).reshape(clear.shape)).astype(np.uint8)
        pictures = [Image.fromarray(x) for x in coded]
        for picture in pictures:
            picture.putpalette((flat.getpalette() + [0] * 768)[:768])
        ticks = 10 * np.round(np.cumsum(times) / 10)                     # steps of 10 ms; the sum stays right
        times = np.maximum(20, np.diff(ticks, prepend=0)).astype(int).tolist()
        options = {"format": "GIF", "transparency": 255, "disposal": 2, "optimize": False,
                   **({"comment": text.encode()} if text else {})}
    else:
        info = PngInfo()
        if text:
            info.add_text("Comment", text)
        if level:
            tall = Image.fromarray(frames.reshape(-1, frames.shape[2], 4))
            tall = np.asarray(tall.quantize(level, Image.Quantize.FASTOCTREE).convert("RGBA"))
            pictures = [Image.fromarray(x) for x in tall.reshape(frames.shape)]
        options = {"format": "PNG", "pnginfo": info}
    if len(pictures) > 1:
        options.update(save_all=True, append_images=pictures[1:], duration=times, loop=loops)
        if every:
            options["disposal"] = [i % 2 for i in range(len(times))]   # Pillow joins only those that agree
    buffer = io.BytesIO()
    pictures[0].save(buffer, **options)
    return buffer.getvalue()


def wanted_path(path, platform, default):
    """The output's path: as given, else `default` with the platform's suffix; DataError for another."""
    if platform and path not in ("", "-") and Path(path).suffix.lower() != PLATFORMS[platform].suffix:
        raise DataError(f"{path}: end it in {PLATFORMS[platform].suffix}: --for {platform} writes that")
    path = path or default + (PLATFORMS[platform].suffix if platform else ".webp")
    suffix = Path(path).suffix.lower()
    if path != "-" and (suffix not in LEVELS or Path(path).is_dir()):
        raise DataError(f"{path}: name a file that ends in one of {' '.join(LEVELS)}")
    if suffix == ".webm" or platform == "telegram":
        ffmpeg()                                             # it may be missing: told before the work
    return path


def write_sticker(path, frames, durations, *, max_kb=0, size=0, metadata=None, platform=""):
    """Writes a looping sticker; the suffix decides: .webp .gif .apng .webm .png (frames side by side).

    frames uint8 (t, h, w, 4) straight RGBA; durations in ms, an int or t of them, at least 10 each (20 in
    GIF). WebP and APNG keep pixels and times exactly (but colour under alpha 0 becomes 0); GIF has 1 bit of
    alpha, 255 colours and steps of 10 ms; WebM is lossy, with one frame rate of 30 at most.
    size > 0: fit into a square of this side first. max_kb > 0: at most so many times 1000 bytes, by lower
    quality or fewer colours, then by fewer frames. platform: one of PLATFORMS: its limits hold instead (and
    .png is an APNG). path "-": stdout. metadata: a dict for JSON, kept in the file. Returns dict(path, bytes,
    frames, ms, message); the message says what was given up. Raises DataError if it can't be done.
    """
    path = wanted_path(str(path), platform, "")
    suffix = Path(path).suffix.lower() if path != "-" else ".webp"
    frames, row, loops = np.asarray(frames), PLATFORMS.get(platform), 0
    if frames.ndim != 4 or frames.shape[-1] != 4 or frames.dtype != np.uint8 or not frames.size:
        raise DataError(f"{path}: frames must be uint8 (t, h, w, 4), not {frames.dtype} {frames.shape}")
    times = np.broadcast_to(np.clip(durations, 10, 600_000), len(frames)).astype(int).tolist()   # GIF: 11 min
    lost, count = [], len(frames)
    if row:
        suffix, max_kb = row.suffix.replace(".png", ".apng"), row.kb
        frames, times, loops, lost = fit_platform(frames, times, row)
    elif size:
        _limit(path, len(frames), (size, size))
        frames = fit_straight(frames, size)
    frames = np.where(frames[..., 3:] > 0, frames, 0)
    if suffix == ".gif" and min(times) < 20:                 # viewers slow down what is faster
        frames, times, index = resample(frames, times, min(count, max(2, sum(times) // 20)), 20)
        lost = [f"{len(set(index))} of {count} frames"] * (len(set(index)) < count)
    if suffix == ".png":
        frames, times = np.concatenate(frames, 1)[None], [sum(times)]
    text = None if metadata is None else json.dumps(metadata)
    levels, fewest, limit = LEVELS[suffix], row.fewest if row else 2, 1000 * max_kb or math.inf
    steps = [1] + [2 ** i for i in range(1, 10) if len(frames[::2 ** i]) >= fewest]

    @cache
    def coded(step, level):
        merged = [sum(times[i:i + step]) for i in range(0, len(frames), step)]
        try:
            return _encode(suffix, frames[::step], merged, level, text, loops, fewest > 2)
        except DataError:
            raise
        except Exception as error:                           # past a format's limits Pillow raises anything
            raise DataError(f"{path}: {suffix} can't hold this ({_reason(error, path)}); lower --size or "
                            f"choose another suffix") from error

    def fits(step, level):     # lossless is slow: not even tried where every second frame is too much already
        easy = level != levels[0] or 2 * step not in steps or fits(2 * step, level)
        return not max_kb or easy and len(coded(step, level)) <= limit

    # All frames if some level allows it, else every second, fourth, ..; then the best level. A lossy level
    # is smaller than the one before; a lossless file may be smaller than a lossy one.
    step = next((x for x in steps if fits(x, levels[-1]) or fits(x, levels[0])), steps[-1])
    at = 0 if fits(step, levels[0]) else bisect.bisect_left(levels, True, lo=1, key=partial(fits, step))
    level = levels[min(at, len(levels) - 1)]
    data = coded(step, level)
    if len(data) > limit:
        advice = "make it simpler or shorter" if row else "raise --max-kb or lower --size"
        raise DataError(f"{path}: {len(data) / 1000:.1f} kB at the lowest setting, over {max_kb:g}; {advice}")
    kept = count if suffix == ".png" else len(frames[::step])
    if suffix == ".webm":
        kept = max(1, min(kept, sum(times) * 30 // 1000))
    if kept < len(frames):
        lost = [x for x in lost if not x.endswith("frames")] + [f"{kept} of {count} frames"]
    lost += [f"{WORDS.get(suffix, 'colours')} {level}"] * (level != levels[0])
    why = f"for {platform}" if row else f"to stay under {max_kb:g} kB" if max_kb else \
        f"{50 if suffix == '.gif' else 30} a second at most"
    message = f"{path}: {' and '.join(lost)}, {why}" if lost else ""
    if message:
        print(message, file=sys.stderr)
    if path == "-":
        sys.__stdout__.buffer.write(data)                    # sys.stdout may have been turned to stderr
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(path).with_name(f".writing-{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, path) from error
    return {"path": path, "bytes": len(data), "frames": kept, "ms": sum(times), "message": message}


def save_sheet(path, rows, labels=None):
    """Contact sheet over a light checkerboard: a row per clip, straight uint8 RGBA (t, h, w, 4), all of one
    h, w; labels: a string per row, drawn left. With suffix .webp the sheet moves: a row is a list of clips
    side by side, and all play together at 8 frames a second."""
    moving, left, gap = Path(path).suffix == ".webp", 150 if labels else 0, 2
    grid = rows if moving else [[frame[None] for frame in clip] for clip in rows]          # of clips
    h, w = grid[0][0].shape[1:3]
    tile = max(4, h // 8)
    squares = (np.arange(h)[:, None] // tile + np.arange(w) // tile) % 2 * 24
    ground = Image.fromarray((255 - squares).astype(np.uint8)).convert("RGBA")
    font, pages = ImageFont.load_default(11), []
    for time in range(max(len(clip) for row in grid for clip in row)):
        page = Image.new("RGB", (left + max(map(len, grid)) * (w + gap), len(grid) * (h + gap)), "white")
        for y, row in enumerate(grid):
            for x, clip in enumerate(row):
                frame = Image.fromarray(np.ascontiguousarray(clip[min(time, len(clip) - 1)]))
                page.paste(Image.alpha_composite(ground, frame), (left + x * (w + gap), y * (h + gap)))
            if labels:
                lines = textwrap.wrap(labels[y], 26)[:max(1, h // 13)]
                ImageDraw.Draw(page).multiline_text((2, y * (h + gap) + 2), "\n".join(lines), "black", font)
        pages.append(page)
    how = {"save_all": True, "append_images": pages[1:], "duration": 125, "loop": 0, "quality": 85}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pages[0].save(path, **(how if moving else {"format": "PNG", "optimize": True}))


# ------------------------------------------------------------------------------------------------------------
# Keyframes by clustering (Table 6)

def frame_features(frames):
    """Premultiplied uint8 (t, h, w, 4) -> float64 (t, 1024) in [0, 1]: 16x16 thumbnails (the release takes
    VGG-16 features; thumbnails need no other pretrained network: ours)."""
    images = [Image.fromarray(np.ascontiguousarray(x), "RGBa") for x in frames]
    small = [np.asarray(image.resize((16, 16), Image.Resampling.BOX)) for image in images]
    return np.stack(small).reshape(len(frames), -1) / 255.0


def _distances(x, centres):
    """Squared distances (t, k) of the rows of x (t, d) to the centres (k, d)."""
    return (x ** 2).sum(1)[:, None] - 2 * x @ centres.T + (centres ** 2).sum(1)


def _add_farthest(x, chosen, k):
    """Row numbers of x until there are k: each new one is the farthest from those chosen."""
    while len(chosen) < k:
        left = np.setdiff1d(np.arange(len(x)), chosen)       # a row is chosen once, whatever rounding says
        chosen = [*chosen, int(left[_distances(x[left], x[chosen]).min(1).argmax()])]
    return chosen


def _k_means(x, k):
    """k-means of the rows of x -> k of them, increasing: in each cluster the one nearest to its centre.

    Deterministic: Lloyd's iterations from two starts (equal parts in time; rows far from each other); the
    tighter result wins.
    """
    best = np.inf
    far = _distances(x, x[_add_farthest(x, [0], k)]).argmin(1)
    for labels in (np.arange(len(x)) * k // len(x), far):
        for _ in range(50):
            centres = np.stack([x[labels == c].mean(0) for c in np.unique(labels)])
            distance = _distances(x, centres)
            labels, before = distance.argmin(1), labels
            if (labels == before).all():
                break
        near = distance.min(1).round(9)                      # of two frames that are as near, the first
        if near.sum() < best - 1e-9:
            best = near.sum()
            members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
            chosen = [m[near[m].argmin()] for m in members]
    return sorted(_add_farthest(x, chosen, k))               # if a cluster died there are fewer than k


def find_keyframes(frames, most=8):
    """Premultiplied uint8 RGBA (t, h, w, 4) -> int16 (most - 2, most): row k - 3 is the k-frame clip, indices
    increasing, -1 after.

    k-means over the frames, then the frame nearest to each cluster's centre (ours). The release takes the
    first frame of each cluster, which covers the motion worse than even spacing (benchmarks/README.md).
    Frames that look like the one before them do not count, so a row has min(k, frames that count) entries.
    Frames that come back later count: a loop goes there and back.
    """
    x = frame_features(frames)
    counts = np.flatnonzero(np.concatenate([[True], (x[1:] != x[:-1]).any(1)]))
    table = np.full((most - MIN_K + 1, most), -1, np.int16)
    for row, k in zip(table, range(MIN_K, most + 1)):
        chosen = counts if len(counts) <= k else counts[_k_means(x[counts], k)]
        row[:len(chosen)] = chosen
    return table


# ------------------------------------------------------------------------------------------------------------
# A folder of stickers with captions

class Item(NamedTuple):
    path: str
    name: str                                # of the file, relative to the folder
    caption: str
    tags: tuple = ()                         # words that come back in other captions; the first always stays
    split: int = 0                           # of SPLITS


def is_held_out(concept, share=0.1):
    """About this share of all concepts, the same ones everywhere: a hash of the name decides (ours)."""
    number = hashlib.blake2s(concept.encode("utf-8", "surrogatepass")).digest()[:4]
    return int.from_bytes(number, "little") % round(1 / max(share, 1e-9)) == 0


def _read_metadata(path):
    """metadata.jsonl -> {file_name: line as dict}; {} if there is none."""
    rows = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            if line.strip():
                row = json.loads(line)
                rows[str(row["file_name"])] = row
                tags, split = row.get("tags") or [], row.get("split") or SPLITS[0]
                if not isinstance(tags, list) or split not in SPLITS:
                    raise ValueError("tags are a list of words, split is train or held_out")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: line {number} must be a JSON object with file_name and text in UTF-8 "
                            f"({error}); correct it") from error
    return rows


def list_stickers(folder, hold_out=0.05):
    """Every sticker file below a folder, sorted by name, as a list of Item. DataError if there is nothing.

    Captions: `metadata.jsonl` (file_name, text; optional: tags, a list of words, and split, "held_out" for
    stickers never to train on), else a .txt file of the same name, else the file name in words. Where no
    split is named, this share of 40 stickers or more is held out by name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder of stickers or a prepared store")
    known, items = _read_metadata(folder / "metadata.jsonl"), []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in SUFFIXES or "/." in f"/{name}" or path.is_dir():
            continue
        row, beside = known.get(name, {}), path.with_suffix(".txt")
        caption = row.get("text")
        if caption is None and beside.is_file():
            caption = beside.read_text(encoding="utf-8-sig", errors="replace")
        caption = re.sub(r"[\W_]+", " ", path.stem) if caption is None else str(caption)
        tags, split = tuple(map(str, row.get("tags") or ())), int(row.get("split") == SPLITS[1])
        items.append(Item(str(path), name, " ".join(caption.split()), tags, split))
    if not items:
        raise DataError(f"{folder}: no sticker in it; it must hold some of {' '.join(SUFFIXES)}")
    items.sort(key=lambda item: item.name)
    if missing := sorted(known.keys() - {item.name for item in items}):
        print(f"{folder / 'metadata.jsonl'}: {len(missing)} of {len(known)} lines name no sticker here, such "
              f"as {missing[0]!r}", file=sys.stderr)
    if hold_out and len(items) >= 40 and not any(row.get("split") for row in known.values()):
        items = [item._replace(split=int(is_held_out(item.name, hold_out))) for item in items]
    return items


# ------------------------------------------------------------------------------------------------------------
# From a file to what the store keeps of it

class Decoded(NamedTuple):
    frames: np.ndarray                       # uint8 premultiplied (m, 4, size, size): only those some k needs
    keys: np.ndarray                         # int16 (F - 2, F), relative to frames
    duration: int                            # ms, of the whole sticker


def keep_keyframes(fitted, duration, most=8):
    """Premultiplied (t, size, size, 4) and duration in ms -> Decoded."""
    table = find_keyframes(fitted, most)
    used = np.unique(table[table >= 0])
    frames = np.ascontiguousarray(fitted[used].transpose(0, 3, 1, 2))
    return Decoded(frames, np.where(table < 0, -1, np.searchsorted(used, table)).astype(np.int16), duration)


def _entropy(frames):
    """(m, 4, h, w) -> bits of the grey levels over white, the largest over the frames; 0: empty."""
    grey = frames[:, :3].sum(1, dtype=np.int32) // 3 + 255 - frames[:, 3]
    return max(Image.fromarray(x).entropy() for x in grey.clip(0, 255).astype(np.uint8))


def decode_frames(pairs, size, most, filters=FILTERS):
    """(PIL RGBA image, ms) of each frame -> ("ok", Decoded), or one of "unreadable" and FILTERS, and why."""
    fitted, duration = [], 0
    try:
        for frame, ms in pairs:
            w, h = frame.size
            if "small" in filters and min(w, h) < MIN_SIDE:
                return "small", f"{w}x{h}, under {MIN_SIDE} pixels"
            if "aspect" in filters and max(w, h) > MAX_ASPECT * min(w, h):
                return "aspect", f"{w}x{h}, over {MAX_ASPECT:g} to 1"
            if (len(fitted) + 1) * size * size > MAX_TOTAL:
                return "unreadable", f"over {len(fitted)} frames, too many at --size {size}"
            fitted.append(fit(frame, size))     # at once: a full-size frame is never kept
            duration += ms
    except DataError as error:
        return "unreadable", str(error)
    decoded = keep_keyframes(np.stack(fitted), duration, most)
    if "entropy" in filters and _entropy(decoded.frames) < MIN_ENTROPY:
        return "entropy", f"under {MIN_ENTROPY} bits: nearly empty or one flat colour"
    return "ok", decoded


def decode_item(path, size, most, filters=FILTERS):
    """`decode_frames` of a file."""
    warnings.filterwarnings("ignore", module="PIL")      # about files that read well all the same
    reason, found = decode_frames(iter_frames(path), size, most, filters)
    if reason == "unreadable":
        found = found.removeprefix(f"{path}: ").removesuffix("; replace or delete it")
    return reason, found


def serve(work):
    """The life of a decoding process: an item from stdin, its result to stdout, until there are no more."""
    out, sys.stdout = sys.stdout.buffer, sys.stderr                # a library's prints must not get between
    out.write(b"+")                                                # told by its absence: it could not start
    out.flush()
    with contextlib.suppress(EOFError):
        while True:
            pickle.dump(work(pickle.load(sys.stdin.buffer)), out)
            out.flush()


def in_order(work, items, workers, timeout=120):
    """Yields work(item) in order, from `workers` processes (0: from this one); work: a partial of a function
    with keywords that their repr can make again: numbers and strings.

    A process that crashes or hangs costs the item it was at, which comes back as ("unreadable", why). Each
    has a thread here that talks to it, and a session of its own: a Ctrl-C reaches our main thread only.
    """
    if workers < 1:
        yield from map(work, items)
        return
    file = Path(work.func.__code__.co_filename).resolve()          # a script's module is __main__ only here
    path = [str(file.parent), str(Path(__file__).resolve().parent), *sys.path]
    code = (f"import sys; sys.path[:] = {path}; import data, functools, {file.stem} as module\n"
            f"data.serve(functools.partial(module.{work.func.__name__}, **{work.keywords}))")
    mine, processes = threading.local(), []

    def one(item):
        fresh = not hasattr(mine, "process")
        if fresh:
            mine.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, start_new_session=True)
            processes.append(mine.process)
        clock = threading.Timer(timeout, mine.process.kill)
        clock.start()
        try:
            if fresh and mine.process.stdout.read(1) != b"+":
                raise DataError("no decoding process can start here, their own message says why; "
                                "data.py prepare --workers 0 does without")
            pickle.dump(item, mine.process.stdin)
            mine.process.stdin.flush()
            return pickle.load(mine.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            del mine.process
            return "unreadable", f"its decoder crashed or took over {timeout:g} s; delete it"
        finally:
            clock.cancel()

    threads = ThreadPoolExecutor(workers)
    try:
        yield from threads.map(one, items)
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:                            # one may have started meanwhile
            process.kill()
            process.communicate()


def processes():
    """-> (number of this process, how many torchrun started)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def cores():
    """How many CPU cores this process may use: of torchrun's processes each has its share."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def decode(items, size, most, filters, workers, seen, work=None, sources=None):
    """-> (rows: list of (Item, Decoded), left out: list of (reason, name, text)). work(source, size, most,
    filters) reads the sticker of an item; None: `decode_item` of its path. seen: digests of the stickers so
    far -> name; what looks exactly like one of them is a duplicate."""
    work, rows, left_out = partial(work or decode_item, size=size, most=most, filters=filters), [], []
    results = in_order(work, sources or [item.path for item in items], workers)
    for item, (reason, result) in zip(items, results):
        first = seen.setdefault(_digest(result), item.name) if reason == "ok" else item.name
        if first != item.name and "duplicate" in filters:
            reason, result = "duplicate", f"same frames as {first}"
        if reason == "ok":
            rows.append((item, result))
        else:
            left_out.append((reason, item.name, result))
    return rows, left_out


def report(folder, total, left_out, max_bad):
    """Prints what was left out and why; DataError if nothing is left or too many files are unreadable."""
    reasons = {}
    for reason, name, text in left_out:
        reasons.setdefault(reason, []).append(f"{name} ({text})")
    for reason, files in reasons.items():
        shown = ", ".join(files[:5] + ["..."] * (len(files) > 5))
        print(f"left out, {reason}: {len(files)} of {total}: {shown}", file=sys.stderr)
    bad = len(reasons.get("unreadable", ()))
    if bad > max_bad * total:
        raise DataError(f"{folder}: {bad} of {total} files are unreadable, over --max-bad {max_bad:g}; "
                        f"replace them, or prepare the folder with a higher one "
                        f"(OUT.partial/report.txt names all)")
    if len(left_out) == total:
        raise DataError(f"{folder}: all {total} files are left out, see why above; replace them, or prepare "
                        f"the folder with --filter none")


# ------------------------------------------------------------------------------------------------------------
# Training data

def index_type(most):
    """The entry of one sticker in the index."""
    frames = [("shard", "<i4"), ("offset", "<i8"), ("count", "<i4")]        # shards[shard][offset:][:count]
    clips = [("keys", "<i2", (most - MIN_K + 1, most)), ("duration", "<i4")]        # keyframes; ms
    texts = [("text", "<i8"), ("length", "<i4"), ("split", "u1")]           # text[text:][:length]; of SPLITS
    return np.dtype([*frames, *clips, *texts, ("digest", "V16")])           # digest of frames and keyframes


def _digest(decoded):
    return hashlib.blake2b(decoded.keys.tobytes() + decoded.frames.tobytes(), digest_size=16).digest()


def encode_frames(vae, frames, batch=32):
    """uint8 premultiplied (m, 4, h, w) -> float16 latents (m, c, h/f, w/f); without a VAE as is."""
    if vae is None:
        return frames
    import torch
    from rdtf import has_bf16
    if frames.shape[-1] % vae.f:
        raise DataError(f"--size {frames.shape[-1]}: must be a multiple of {vae.f}, the VAE's reduction")
    device, shape = vae.mean.device, (0, len(vae.mean), *(x // vae.f for x in frames.shape[2:]))
    parts = [np.zeros(shape, np.float16)]                                   # a shard may have no frame at all
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
        for i in tqdm(range(0, len(frames), batch), "encoding", leave=False, disable=None):
            x = torch.from_numpy(np.array(frames[i:i + batch])).to(device).float() / 255
            parts.append(vae.encode(x).half().cpu().numpy())
    return np.concatenate(parts)


def pack(rows, size, most, vae=None):
    """list of (Item, Decoded) -> (frames (M, 4, s, s), or with a VAE their latents, index (n,), text uint8
    (bytes,)) of one shard."""
    index, texts = np.zeros(len(rows), index_type(most)), [np.zeros(0, np.uint8)]
    offset = length = 0
    for i, (item, decoded) in enumerate(rows):
        text = json.dumps([item.name, item.caption, item.tags]).encode()
        index[i] = (0, offset, len(decoded.frames), decoded.keys, min(decoded.duration, 2 ** 31 - 1),
                    length, len(text), item.split, _digest(decoded))
        texts.append(np.frombuffer(text, np.uint8))
        offset, length = offset + len(decoded.frames), length + len(text)
    frames = [np.zeros((0, 4, size, size), np.uint8)] + [d.frames for _, d in rows]
    return encode_frames(vae, np.concatenate(frames)), index, np.concatenate(texts)


def make_meta(size, most, vae=None):
    """What a set says of itself, but its fingerprint."""
    return {"format": FORMAT, "kind": "latents" if vae else "pixels", "size": size, "frames": most,
            "vae": vae.fingerprint() if vae else None}


def alike(meta):
    """What sets that are trained on together share."""
    return [meta[key] for key in ("kind", "size", "frames", "vae")]


class Stickers:
    """Stickers ready for training, in memory or memory-mapped: the same object either way.

    shards: list of arrays (M, C, H, W), uint8 premultiplied RGBA (kind "pixels") or float16 latents; only
    frames that some k needs. index: array of `index_type`; keys[k - 3] is a sticker's k-frame clip. text:
    uint8, JSON [name, caption, tags] of each. meta: dict (format, kind, size, frames, vae, fingerprint).
    """

    def __init__(self, shards, index, text, meta):
        self.shards, self.index, self.text, self.meta = shards, index, text, dict(meta)
        self.size = meta["size"]           # side of the pictures in pixels, for latents too
        if "fingerprint" not in meta:      # stands for frames, order, captions, splits, size and autoencoder
            digest = hashlib.blake2b(json.dumps(alike(meta)).encode(), digest_size=8)
            digest.update(np.ascontiguousarray(index).tobytes() + np.ascontiguousarray(text).tobytes())
            self.meta["fingerprint"] = digest.hexdigest()

    def __len__(self):
        return len(self.index)

    def frames(self, item):
        """All kept frames of a sticker, (m, C, H, W)."""
        entry = self.index[item]
        start = int(entry["offset"])
        return self.shards[entry["shard"]][start:start + int(entry["count"])]

    def texts(self, item):
        """-> (name, caption, list of tags)."""
        start = int(self.index[item]["text"])
        return json.loads(self.text[start:start + int(self.index[item]["length"])].tobytes())

    def caption(self, item, rng=None):
        """The caption: its name and the first tag. With rng (numpy Generator) it is drawn for one clip: the
        first tag, up to three others, and three times in four the name (ours)."""
        _, caption, tags = self.texts(item)
        if not tags:
            return caption
        named = [caption] * (caption != "")
        if rng is None:
            return ", ".join(named + tags[:1])
        more = rng.permutation(tags[1:])[:rng.integers(4)].tolist() if tags[1:] else []
        return ", ".join(named * (rng.random() >= 0.25) + tags[:1] + more)

    def select(self, split):
        """Positions (int64, increasing) of the stickers of a split, "train" or "held_out"."""
        return np.flatnonzero(self.index["split"] == SPLITS.index(split))

    def encode(self, vae):
        """-> the same as latents of this autoencoder, in memory; itself if it holds them already. Of several
        processes each encodes its part."""
        if self.meta["kind"] == "latents":
            if self.meta["vae"] != vae.fingerprint():
                raise DataError(f"--data: the store holds latents of VAE {self.meta['vae']}, the run uses "
                                f"{vae.fingerprint()}; prepare it again with --vae, or without it (pixels "
                                f"suit every VAE)")
            return self
        import torch.distributed as dist
        (rank, world), shards = processes(), []
        for shard in self.shards:
            latents = encode_frames(vae, np.array_split(shard, world)[rank])
            if world > 1:
                parts = [None] * world
                dist.all_gather_object(parts, latents)
                latents = np.concatenate(parts)
            shards.append(latents)
        return Stickers(shards, self.index, self.text, make_meta(self.size, self.meta["frames"], vae))


def join(sets):
    """Several sets of one kind, size and autoencoder -> one Stickers, and the number of the set of each."""
    first, shards, length = sets[0], 0, 0
    source = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    if any(alike(s.meta) != alike(first.meta) for s in sets):
        raise DataError("--data: the sets differ in size, kind (pixels, latents) or autoencoder; prepare "
                        "them alike")
    if len(sets) == 1:
        return first, source
    index, text = np.concatenate([s.index for s in sets]), np.concatenate([s.text for s in sets])
    for i, s in enumerate(sets):
        index["shard"][source == i] += shards
        index["text"][source == i] += length
        shards, length = shards + len(s.shards), length + len(s.text)
    meta = make_meta(first.size, first.meta["frames"]) | {key: first.meta[key] for key in ("kind", "vae")}
    return Stickers([x for s in sets for x in s.shards], index, text, meta), source


def draw_clip(stickers, item, rng, full=0.0, shortest=1):
    """One training clip: k ~ U{3..F} frames of a sticker, a fresh k for every draw (Table 6).

    full: share of the draws that take k = F instead (ours: less padding). shortest: k is never below it.
    Returns (clip (F, C, H, W) float32, n): n real frames in time order, then zeros; pixels premultiplied in
    [0, 1], latents as stored. A sticker with fewer distinct frames gives all it has, a still one n = 1.
    """
    most = stickers.meta["frames"]
    whole, k = rng.random() < full, int(rng.integers(min(max(MIN_K, shortest), most), most + 1))
    keys = stickers.index[item]["keys"][(most if whole else k) - MIN_K]
    keys = keys[keys >= 0].astype(np.int64)
    frames = stickers.frames(item)
    clip = np.zeros((most, *frames.shape[1:]), np.float32)
    clip[:len(keys)] = frames[keys]
    return (clip / 255 if stickers.meta["kind"] == "pixels" else clip), len(keys)


# ------------------------------------------------------------------------------------------------------------
# The store: a folder of shards, each written beside and renamed whole, then index.npy, text.npy, meta.json

def _put(path, content):
    """Writes an array or a string, and waits until it is on the disk."""
    with open(path, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode(errors="backslashreplace"))
        else:
            np.save(file, content)
        file.flush()
        os.fsync(file.fileno())


def write_store(out, meta, inputs, shards, make, check=lambda left_out: None):
    """Writes a store of `shards` shards at `out`, and opens it.

    make(i, seen) -> (frames, index, text, left out) of shard i; seen: digest -> name of the stickers so far.
    check(left out) may raise a DataError before anything is published. inputs: a string that stands for all
    that goes in. Work goes to OUT.partial; killed, the next call with the same inputs goes on after the last
    whole shard. The store replaces an old one at the end, but never anything else.
    """
    out, inputs = Path(out).resolve(), hashlib.blake2b(inputs.encode()).hexdigest()
    work = out.with_name(out.name + ".partial")
    old = out.with_name(out.name + ".old")
    for path, whole in (out, is_store(out)), (work, (work / "inputs").exists()), (old, is_store(old)):
        if path.exists() and not whole and (not path.is_dir() or any(path.iterdir())):
            raise DataError(f"{path}: exists and is no prepared store; choose another --out")
    if (out / "inputs").exists() and (out / "inputs").read_text() == inputs:
        print(f"{out}: already prepared from these files")
        return open_store(out)
    if work.exists() and not ((work / "inputs").exists() and (work / "inputs").read_text() == inputs):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    _put(work / "inputs", inputs)
    seen, left_out, parts = {}, [], []
    for i in tqdm(range(shards), "preparing", unit="shard", disable=None):
        shard, fresh = work / f"shard-{i:05d}", work / "fresh"
        if not shard.exists():
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            *arrays, lost = make(i, seen)
            for name, array in zip(("frames", "index", "text"), arrays):
                _put(fresh / f"{name}.npy", array)
            _put(fresh / "left_out.json", json.dumps(lost))
            os.replace(fresh, shard)
        left_out += json.loads((shard / "left_out.json").read_text())
        part = Stickers([shard], np.load(shard / "index.npy"), np.load(shard / "text.npy"), meta)
        seen.update((part.index[j]["digest"].tobytes(), part.texts(j)[0]) for j in range(len(part)))
        parts.append(part)
    _put(work / "report.txt", "".join("\t".join(row) + "\n" for row in left_out))
    check(left_out)
    whole, _ = join(parts)
    _put(work / "index.npy", whole.index)
    _put(work / "text.npy", whole.text)
    _put(work / "meta.json", json.dumps(whole.meta | {"shards": shards}, indent=1))
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)               # of a call that was killed just here
        os.replace(out, old)
    os.replace(work, out)
    shutil.rmtree(old, ignore_errors=True)
    return open_store(out)


def is_store(folder):
    """A folder that `write_store` wrote, whole or damaged since? Others may hold a meta.json, too."""
    return all(Path(folder, name).exists() for name in ("meta.json", "inputs"))


def open_store(folder):
    """A store -> Stickers, memory-mapped: neither memory nor time grow with the frames in it."""
    folder = Path(folder)
    if not is_store(folder):                                 # it may be the user's own stickers
        raise DataError(f"{folder}: no prepared store; write one with data.py prepare FOLDER --out STORE")
    with contextlib.suppress(ImportError, OSError, ValueError):         # a mapped shard keeps its file open
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise ValueError(f"its format is {meta['format']!r}, this version reads {FORMAT!r}")
        shards = [np.load(folder / f"shard-{i:05d}" / "frames.npy", "r") for i in range(meta["shards"])]
        index, text = (np.load(folder / name, "r") for name in ("index.npy", "text.npy"))
        if len(index) == 0 or index.dtype != index_type(meta["frames"]):
            raise ValueError("its index is of another kind")
        return Stickers(shards, index, text, meta)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        if getattr(error, "errno", 0) == errno.EMFILE:
            raise DataError(f"{folder}: too many shards for this system's limit of open files; raise it with "
                            f"ulimit -n") from error
        raise DataError(f"{folder}: no whole store ({_reason(error, folder)}); delete it and prepare it "
                        f"again") from error


def prepare(folder, out, size, vae=None, workers=2, filters=FILTERS, max_bad=0.1, hold_out=0.05, most=8):
    """Decodes a folder of stickers into a store (latents if a VAE is given) -> the opened Stickers."""
    items, meta = list_stickers(folder, hold_out), make_meta(size, most, vae)
    stats = [os.stat(item.path) if os.path.exists(item.path) else None for item in items]
    inputs = repr((meta, sorted(filters), [(*item[1:], s and (s.st_size, s.st_mtime_ns))
                                           for item, s in zip(items, stats)]))

    def make(i, seen):
        rows, lost = decode(items[i * SHARD:(i + 1) * SHARD], size, most, filters, workers, seen)
        return *pack(rows, size, most, vae), lost

    return write_store(out, meta, inputs, math.ceil(len(items) / SHARD), make,
                       lambda left_out: report(folder, len(items), left_out, max_bad))


def open_stickers(spec, size, most=8, hold_out=0.05):
    """A folder of stickers, a prepared store, "synthetic" or "synthetic:COUNT" -> Stickers of `size` px."""
    spec, rows = str(spec), []
    if is_store(spec):
        stickers = open_store(spec)
        if (stickers.size, stickers.meta["frames"]) != (size, most):
            raise DataError(f"{spec}: it holds {stickers.meta['frames']} frames of {stickers.size} pixels; "
                            f"the run needs `data.py prepare --frames {most} --size {size}`")
        return stickers
    if re.fullmatch(r"synthetic(:[1-9]\d*)?", spec):
        from stickers.procedural import sticker
        for i in range(int(spec.partition(":")[2] or 512)):
            frames, times, caption, _ = sticker(i, size)
            item = Item("", f"synthetic-{i}", caption, (), int(is_held_out(caption)))
            rows.append((item, keep_keyframes(premultiply(frames), sum(times), most)))
    else:
        items = list_stickers(spec, hold_out)
        rows, left_out = decode(items, size, most, FILTERS, cores() if len(items) > 200 else 0, {})
        report(spec, len(items), left_out, 0.1)
    frames, index, text = pack(rows, size, most)
    return Stickers([frames], index, text, make_meta(size, most))


# ------------------------------------------------------------------------------------------------------------
# Command line

def number(kind, low, high=math.inf):
    """An argparse type: a finite number of this kind from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}: choose {low} to {high}" if high < math.inf else
                                             f"{text}: must be at least {low}")
        return value
    parse.__name__ = kind.__name__
    return parse


def make_store(args, make):
    """--vae and --device of a parser opened, then make(vae) -> Stickers, and what came out."""
    vae = None
    if args.vae:
        import rdtf
        vae = rdtf.load_vae(args.vae).to(rdtf.find_device(args.device))
    s = make(vae)
    print(f"{args.out}: {len(s)} stickers ({len(s.select('held_out'))} held out), {sum(map(len, s.shards))} "
          f"frames of {'x'.join(map(str, s.shards[0].shape[1:]))}")
    if Path(args.out, "report.txt").stat().st_size:
        print(f"{Path(args.out, 'report.txt')}: names each file left out, and why")


def one_line(name, work):
    """Calls work() -> exit status. What a user can mend becomes one line, other faults keep their traceback
    (but a ValueError, which is how rdtf.py refuses bad input)."""
    try:
        work()
        return 0
    except KeyboardInterrupt:
        print(f"\n{name}: stopped at once; repeat the command, a run or a store goes on where it was",
              file=sys.stderr)
        return 130
    except (DataError, ImportError, MemoryError, OSError, ValueError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or "out of memory" in str(error)
        message = " ".join(str(error).split())[:400] or "out of memory"
        if isinstance(error, RuntimeError) and not full:
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}; is there room, may you read and write it?"
    advice = "; lower --batch-size (train.py: and raise --accumulation, or add --checkpointing)" * full
    print(f"{name}: {message}{advice}", file=sys.stderr)
    return 2


def told(done):
    """What write_sticker did, in a line."""
    return f"{done['path']}: {done['frames']} frames, {done['ms']} ms, {done['bytes'] / 1000:.1f} kB"


def read_metadata(path):
    """The dict that write_sticker kept in a file; {} without any."""
    if _is_video(path):
        path = str(Path(path).resolve())
        command = [ffmpeg().get_ffmpeg_exe(), "-v", "quiet", "-i", path, "-f", "ffmetadata", "-"]
        text = subprocess.run(command, capture_output=True).stdout.decode(errors="replace")
        text = re.sub(r"\\(.)", r"\1", (re.findall(r"(?i)^comment=(.*)", text, re.M) or [""])[0])
    else:
        text = ""
        with contextlib.suppress(SyntaxError), Image.open(path, formats=IMAGES) as image:   # EXIF may be junk
            text = image.info.get("comment") or image.info.get("Comment") or image.getexif().get(0x010E)
    try:
        return dict(json.loads(text or "{}"))
    except (ValueError, TypeError, RecursionError):
        return {}


def run(args):
    if args.command == "prepare":
        filters = [] if args.filter == "none" else args.filter.split(",")
        if not set(filters) <= set(FILTERS):
            raise DataError(f"--filter {args.filter}: give some of {','.join(FILTERS)}, or none")
        make_store(args, lambda vae: prepare(args.folder, args.out, args.size, vae, args.workers, filters,
                                             args.max_bad, args.hold_out, args.frames))
    elif args.command == "convert":
        if args.platform and (args.size or args.max_kb):
            raise DataError("--size or --max-kb with --for: remove it, --for says both")
        if not args.output and not args.platform:
            raise DataError("no output: name a file, or say --for telegram (or another platform)")
        source = Path(args.input)
        out = wanted_path(args.output, args.platform, f"{source.stem}-{args.platform}")
        if source.exists() and Path(out).exists() and source.samefile(out):
            raise DataError(f"{out}: is the input; choose another output")
        done = write_sticker(out, *read_sticker(args.input), size=args.size, max_kb=args.max_kb,
                             platform=args.platform)
        print(told(done), file=sys.stderr if out == "-" else None)
    else:
        frames, times = read_sticker(args.input)
        print(f"{args.input}: {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}, {sum(times)} ms")
        for key, value in read_metadata(args.input).items():
            print(f"  {key}: {value}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    a = commands.add_parser("prepare", help="decode a folder once into a store").add_argument
    a("folder", help="folder of stickers")
    a("--out", required=True, help="the new store")
    a("--vae", default="", help="VAE checkpoint: store its latents; empty: store pixels")
    a("--device", default="cpu", help="where the VAE runs: cpu, cuda or mps")
    a("--size", type=number(int, 8, 1024), default=64, help="side of the pictures in pixels")
    a("--frames", type=number(int, MIN_K, 64), default=8, help="frames of the longest clip, F")
    a("--workers", type=number(int, 0), default=cores(), help="decoding processes; 0: this one")
    a("--filter", default=",".join(FILTERS), help="what to leave out, some of %(default)s; or none")
    a("--max-bad", type=number(float, 0, 1), default=0.1, help="largest share of unreadable files")
    a("--hold-out", type=number(float, 0, 0.5), default=0.05,
      help="share never trained on of 40 stickers or more (one in round(1 / share)), where metadata.jsonl "
      "names no split; 0: none")
    a = commands.add_parser("convert", help="write a sticker in another format, size or quality").add_argument
    a("input", help="sticker file")
    a("output", nargs="?", default="",
      help=f"the suffix decides: {' '.join(LEVELS)}; - writes to stdout; default with --for: INPUT-PLATFORM")
    a("--for", dest="platform", default="", choices=list(PLATFORMS), help="all limits of this platform hold")
    a("--size", type=number(int, 0, 4096), default=0, help="fit into a square of this side; 0: as it is")
    a("--max-kb", type=number(float, 0), default=0, help="largest file in kB (1000 bytes); 0: no limit")
    a = commands.add_parser("info", help="frames, times, and the command that made a file").add_argument
    a("input", help="sticker file")
    args = parser.parse_args(arguments)
    return one_line("data.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
