"""The README's pictures: held-out stickers next to what a checkpoint makes of them, in every mode.

    python benchmarks/gallery.py --ckpt weights/fluent-64.pt --data cache/fluent --out assets/fluent

writes OUT.png (every frame; one block of rows per sticker) and OUT.webp (the same clips, animated side by
side).
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data  # noqa: E402
import quality  # noqa: E402
import sample  # noqa: E402

ROWS = {"interpolate-2": "interpolate", "predict-post": "predict (4 given)", "it2v": "image + text",
        "t2v": "text only"}


def lively(stickers, split, count, seed):
    """Those `count` stickers of a random sample of 3 `count` that move most -> list of int, their clips."""
    items = quality.choose(stickers, split, 3 * count, np.random.default_rng(seed))
    if not items:
        raise data.DataError(f"--data: no sticker of 8 distinct frames in split {split}; try the other")
    clips = quality.clips_of(stickers, items)
    first = quality.motion(clips, quality.EVERY).argsort()[::-1][:count]
    return [items[i] for i in first], clips[first]


def gallery(args):
    model = sample.load_model(args.ckpt, device=args.device)
    quality.default_scales(args, model.cfg)
    stickers = data.open_stickers(args.data, model.cfg.size)
    items, truth = lively(stickers, args.split, args.count, args.seed)
    captions, seeds = [stickers.caption(i) for i in items], [args.seed + j for j in range(len(items))]
    columns = {"truth": truth}
    for mode, name in ROWS.items():
        columns[name] = quality.generate(model, truth, captions, quality.mask_of(mode), args, seeds)
    blocks = [[quality.to_uint8(clips[j]) for clips in columns.values()] for j in range(len(items))]
    labels = [name for caption in captions for name in (caption, *ROWS.values())]
    data.save_sheet(f"{args.out}.png", [clip for block in blocks for clip in block], labels)
    wall = np.concatenate([np.concatenate(block, axis=2) for block in blocks], axis=1)
    data.write_sticker(f"{args.out}.webp", wall, 150, lossless=False)
    print(f"{args.out}.png, {args.out}.webp: rows {captions}; columns {', '.join(columns)}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    quality.sampling_flags(p)
    p.add_argument("--data", required=True, help="prepared store of pixels, or folder of stickers")
    p.add_argument("--out", required=True, help="file stem of the pictures")
    p.add_argument("--split", default="held_out", choices=["held_out", "train"], help="which stickers")
    p.add_argument("--count", type=int, default=5, help="stickers shown")
    p.add_argument("--seed", type=int, default=0, help="of the choice and of the noise")
    try:
        gallery(p.parse_args())
    except data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
