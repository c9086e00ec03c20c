"""The README's pictures: held-out stickers next to what a checkpoint makes of them, in every mode.

    python benchmarks/gallery.py --ckpt weights/fluent-64.pt --data cache/fluent --out assets/fluent

writes OUT.png (every frame; one block of rows per sticker) and OUT.webp (the same clips, animated side by
side).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from curriculum import make_masks  # noqa: E402
from data import Stickers, draw_clip, save_sheet, write_sticker  # noqa: E402
from sample import load_model, sample_clips, to_straight  # noqa: E402

ROWS = (("interpolate", "interpolate", 0), ("predict (4 given)", "predict_post", 4), ("image + text", "it2v", 0), ("text only", "t2v", 0))


def clips(stickers, split, count, seed):
    """`count` full clips of different moving stickers of a split, those that move most among a fixed random
    third.
    """
    items = [i for i in stickers.select(split) if stickers.index["count"][i] >= 8]
    items = np.random.default_rng(seed).permutation(items)[:3 * count]
    found = []
    for i in items:
        for attempt in range(64):                                           # keep drawing until k = 8
            clip, n = draw_clip(stickers, i, np.random.default_rng([seed, int(i), attempt]))
            if n == 8:
                found.append((float(np.abs(np.diff(clip, axis=0)).mean()), int(i), clip))
                break
    found.sort(key=lambda x: -x[0])
    return [(i, clip) for _, i, clip in found[:count]]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", required=True, help="checkpoint")
    p.add_argument("--data", required=True, help="prepared store of pixels")
    p.add_argument("--out", required=True, help="file stem of the pictures")
    p.add_argument("--split", default="held_out", help="held_out or train")
    p.add_argument("--count", type=int, default=5, help="stickers shown")
    p.add_argument("--steps", type=int, default=50, help="denoising steps")
    p.add_argument("--sampler", default="ddim", help="ddim, ddpm or dpm")
    p.add_argument("--seed", type=int, default=0, help="of the choice and of the noise")
    args = p.parse_args()
    loaded, stickers = load_model(args.ckpt), Stickers.open(args.data)
    chosen = clips(stickers, args.split, args.count, args.seed)
    truth = torch.from_numpy(np.stack([c for _, c in chosen]))
    captions = [stickers.caption(i) for i, _ in chosen]
    made = []
    for _, task, at in ROWS:
        cond, real = make_masks(task, 8, at=at)
        cond, real = (np.repeat(m[None], len(chosen), 0) for m in (cond, real))
        made.append(sample_clips(loaded, captions, truth, cond, real, steps=args.steps, sampler=args.sampler,
                                 seeds=[args.seed + j for j in range(len(chosen))]))
    rows, labels, wide = [], [], []
    for j, caption in enumerate(captions):
        block = [truth[j]] + [m[j] for m in made]
        rows += [to_straight(x) for x in block]
        labels += [caption] + [name for name, _, _ in ROWS]
        wide.append(np.concatenate([to_straight(x) for x in block], axis=2))
    save_sheet(f"{args.out}.png", rows, labels)
    write_sticker(f"{args.out}.webp", np.concatenate(wide, axis=1), 150, lossless=False)
    print(f"{args.out}.png, {args.out}.webp: rows {captions}; columns truth, {', '.join(name for name, _, _ in ROWS)}")


if __name__ == "__main__":
    main()
