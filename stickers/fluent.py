"""Microsoft's Fluent animated emoji (MIT), as LobeHub packs them for npm (MIT): 730 MB to fetch.

    python stickers/fluent.py --out data/fluent --no-tones
    python data.py prepare data/fluent --out data/fluent64 --size 64

The WebP files are unpacked unchanged: 256 pixels, transparent, up to 97 frames. The same command again goes
on where it stopped, and writes metadata.jsonl anew for what is there.
"""
import argparse
import re
import sys
import tarfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError  # noqa: E402
from stickers.fetch import (  # noqa: E402
    concept_of, emojibase, npm_pack, run, settings, split_of, tone_words, write_metadata, write_whole)

PARTS = {  # part -> (npm package, version, sha256)
    1: ("@lobehub/fluent-emoji-anim-1", "1.0.0",
        "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea"),
    2: ("@lobehub/fluent-emoji-anim-2", "1.0.0",
        "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0"),
    3: ("@lobehub/fluent-emoji-anim-3", "1.0.0",
        "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43"),
    4: ("@lobehub/fluent-emoji-anim-4", "1.0.0",
        "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"),
}
NAME = re.compile(r"[0-9a-f]+([-_][0-9a-f]+)*\.webp")       # code points


def unpack(tarball, out, tones):
    """Writes the tarball's stickers into `out`, with skin tones or without; those there already stay."""
    with tarfile.open(tarball) as tar:
        for member in tqdm(tar, tarball.name, unit="file"):
            name = Path(member.name).name              # the base name alone: no member can leave `out`
            wanted = member.isfile() and NAME.fullmatch(name) and not (out / name).exists()
            if wanted and (tones or not tone_words(name[:-5])):
                write_whole(out / name, tar.extractfile(member).read())


def describe(out, cache):
    """-> a row of metadata.jsonl for every sticker in the folder `out`."""
    known, rows = emojibase(cache), []
    for path in sorted(out.glob("*.webp")):
        concept = concept_of(path.stem) if NAME.fullmatch(path.name) else ""
        if concept not in known:
            print(f"{path}: no emoji of Unicode; its name will be its caption", file=sys.stderr)
            continue
        text, tags = known[concept]
        tone = tone_words(path.stem)
        with Image.open(path) as image:
            rows.append({"file_name": path.name, "text": f"{text} {tone}".strip(), "tags": tags,
                         "concept": concept, "animated": image.n_frames > 1, "tone": bool(tone),
                         "split": split_of(concept)})
    return rows


def fluent(out, parts=tuple(PARTS), tones=True, cache="cache"):
    """Fetches and unpacks the parts that are not there yet, and writes metadata.jsonl."""
    out = Path(out)
    settings(out)
    for part in parts:
        done = out / f".part-{part}{'' if tones else '-no-tones'}.done"
        if done.exists() or (out / f".part-{part}.done").exists():
            print(f"part {part}: already there")
            continue
        unpack(npm_pack(*PARTS[part], cache), out, tones)
        done.touch()
    rows = describe(out, cache)
    write_metadata(out, rows)
    animated = sum(row["animated"] for row in rows)
    print(f"{animated} animated, {len({row['concept'] for row in rows})} concepts")


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Fetch Microsoft's Fluent animated emoji.")
    parser.add_argument("--out", default="data/fluent", help="folder to fill")
    parser.add_argument("--parts", default="1,2,3,4", help="which of the four packages, such as 3 or 1,2")
    parser.add_argument("--no-tones", action="store_true",
                        help="leave out skin-tone variants (734 of the 2,109 animated ones stay)")
    parser.add_argument("--cache", default="cache", help="folder that keeps the npm packages")
    args = parser.parse_args(arguments)

    def work():
        if not re.fullmatch(r"[1-4](,[1-4])*", args.parts):
            raise DataError(f"--parts {args.parts}: give some of 1,2,3,4")
        parts = sorted({int(part) for part in args.parts.split(",")})
        fluent(args.out, parts, not args.no_tones, args.cache)
    return run(work)


if __name__ == "__main__":
    sys.exit(main())
