"""Lottie animations: any folder of .json and .tgs (Telegram) files, or the Meteocons weather icons from npm.

    pip install rlottie-python
    python stickers/lottie.py --out data/meteocons                  # 4 styles, 1,584 stickers (MIT)
    python stickers/lottie.py my_animations --out data/mine
    python data.py prepare data/meteocons --out data/meteocons64 --size 64

The name is the file's name in words. A folder around the files is their style: "line" in line/rain.json. A
name is held out in all styles, or in none.
"""
import argparse
import gzip
import io
import json
import re
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError, unpremultiply, write_sticker  # noqa: E402
from stickers.fetch import (  # noqa: E402
    drop_twin, npm_pack, run, settings, split_of, words_that_return, write_metadata)

METEOCONS = ("@meteocons/lottie", "0.1.0",
             "43ea2732abde8e429c4fc56a27bb2cefd853f8c34a904b57f86a4b5a2bf1a13d")
SUFFIXES = (".json", ".tgs")
MAX_BYTES = 16 << 20                   # of JSON, unpacked: a limit against gzip bombs
TRANSPARENT = 8                        # a frame is empty if no alpha is above this


def find(source):
    """A folder or an npm tarball -> yields (path in it, bytes) of every .json and .tgs file, by name."""
    source = Path(source)
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            yield path.relative_to(source), path.read_bytes()
        return
    try:
        with tarfile.open(source) as tar:
            for member in sorted(tar.getmembers(), key=lambda m: m.name):
                path = Path(member.name)
                if path.suffix.lower() in SUFFIXES and member.isfile():
                    yield path.relative_to(path.parts[0]), tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{source}: neither a folder nor a whole .tgz file ({error})") from error


def parse(data):
    """Bytes of a .json or .tgs file -> the animation as a dict, or None if it is none."""
    try:
        if data[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(MAX_BYTES + 1)
        found = json.loads(data) if len(data) <= MAX_BYTES else None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("layers") else None


def thaw(node):
    """Deletes the easing ("i" and "o") of the last keyframe of every animated value {"a": 1, "k": [...]}, in
    place. Nothing follows that keyframe, but with it rlottie shows frame 0 for ever."""
    if isinstance(node, dict) and node.get("a") == 1 and isinstance(node.get("k"), list):
        last = node["k"][-1] if node["k"] else None
        if isinstance(last, dict):
            last.pop("i", None)
            last.pop("o", None)
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        thaw(value)
    return node


def draw(animation, size, count, seconds):
    """An animation -> (frames uint8 (t, size, size, 4) straight RGBA, durations in ms): `count` frames,
    evenly spaced over the whole loop, or over its first `seconds` if it is longer. One frame if nothing
    moves."""
    from rlottie_python import LottieAnimation
    player = LottieAnimation.from_data(json.dumps(thaw(animation)))
    total, rate = player.lottie_animation_get_totalframe(), player.lottie_animation_get_framerate()
    if total < 1 or not rate > 0:
        raise ValueError("rlottie reads no frame in it")
    length = min(max(1, total - 1), seconds * rate)        # in its own frames; rlottie counts one too many
    count = max(1, min(count, int(length)))
    # The picture is premultiplied, whatever its mode says.
    frames = [np.asarray(player.render_pillow_frame(int(i * length / count), width=size, height=size))
              for i in range(count)]
    frames = unpremultiply(np.stack(frames))
    if frames[..., 3].max() <= TRANSPARENT:
        raise ValueError("it is empty")
    if (frames == frames[0]).all():
        frames = frames[:1]
    ends = np.round(np.arange(len(frames) + 1) * length / rate * 1000 / len(frames)).astype(int)
    return frames, np.diff(ends).tolist() if len(frames) > 1 else [0]


def words_of(stem):
    """"clear-day_2" -> ["clear", "day", "2"]."""
    return re.sub(r"[\W_]+", " ", stem).lower().split()


def lottie(source, out, size=128, count=8, seconds=2.0):
    """Draws every animation of the source into OUT/STYLE/NAME.webp, with metadata.jsonl. Resumes."""
    try:
        import rlottie_python  # noqa: F401
    except ImportError as error:
        raise DataError("drawing Lottie needs `pip install rlottie-python`") from error
    out = Path(out)
    settings(out, size=size, frames=count, seconds=seconds)
    rows, words, seen, bad, targets = [], {}, {}, [], set()
    for path, data in tqdm(list(find(source)), "drawing", unit="animation"):
        animation = parse(data)
        target = out / path.with_suffix(".webp")
        try:
            if animation is None:
                raise ValueError("no Lottie animation")
            if target in targets:
                raise ValueError("another file of this name, but for its ending, came before")
            targets.add(target)
            if not target.exists():
                frames, durations = draw(animation, size, count, seconds)
                write_sticker(target, frames, durations)
            if twin := drop_twin(target, seen):                        # such as Meteocons' fog and haze
                raise ValueError(f"same picture as {twin}")
        except (ValueError, OverflowError) as error:
            bad.append(f"{path}: {error}")
            continue
        name = " ".join(words_of(path.stem))
        words[name] = words_of(path.stem)
        style = " ".join(words_of(path.parent.name))
        rows.append({"file_name": path.with_suffix(".webp").as_posix(), "text": name, "style": style,
                     "split": split_of(name)})
    if bad:
        more = f"; and {len(bad) - 5} more" if bad[5:] else ""
        print(f"left out {len(bad)}: {'; '.join(bad[:5])}{more}", file=sys.stderr)
    returning = words_that_return(words)
    for row in rows:
        kept = [word for word in words[row["text"]] if word in returning]
        if row["style"]:
            row["tags"] = [row["style"] + " style", *dict.fromkeys(kept)]
    write_metadata(out, rows)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Draw Lottie animations as stickers.")
    parser.add_argument("source", nargs="?", default="",
                        help="folder of .json and .tgs files, or a .tgz of npm; default: Meteocons, fetched")
    parser.add_argument("--out", default="data/lottie", help="folder to fill")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--frames", type=int, default=8, help="frames of a sticker")
    parser.add_argument("--seconds", type=float, default=2.0, help="the longest part that is drawn")
    parser.add_argument("--cache", default="cache", help="folder that keeps the npm package")
    args = parser.parse_args(arguments)

    def work():
        if not 8 <= args.size <= 1024:
            raise DataError(f"--size {args.size}: must be 8 to 1024 pixels")
        if not 1 <= args.frames <= 100 or not 0.1 <= args.seconds <= 60:
            raise DataError("give --frames 1 to 100 and --seconds 0.1 to 60")
        if args.source and not Path(args.source).exists():
            raise DataError(f"{args.source}: no such folder or .tgz file")
        source = args.source or npm_pack(*METEOCONS, args.cache)
        lottie(source, args.out, args.size, args.frames, args.seconds)
    return run(work)


if __name__ == "__main__":
    sys.exit(main())
