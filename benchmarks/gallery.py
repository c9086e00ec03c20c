"""The README's pictures: held-out stickers beside what a checkpoint makes of them, in every mode.

    python benchmarks/gallery.py --ckpt CKPT --data cache/characters --more cache/fluent --count 4 \\
        --out assets/samples

writes OUT.webp, which moves (a row per sticker: truth, from text, from image + text, predicted from its first
half, every second frame given), and OUT.png, all frames of it. The stickers are the first --count of the
fixed list of `quality.py`: nothing is picked by hand. With --lora FILE: of the stickers it was trained on the
truth, from text without that LoRA and with it, and with it from image + text and from the first half.
"""
import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data  # noqa: E402
import quality  # noqa: E402
import rdtf  # noqa: E402

COLUMNS = {"t2v": "text", "it2v": "image + text", "predict-post": "first half given",
           "interpolate-2": "every second given"}


def gallery(args):
    model = rdtf.load_model(args.ckpt, args.device)
    columns, rows, captions = [(label, model, mode) for mode, label in COLUMNS.items()], [], []
    if args.lora:
        tuned = rdtf.load_model(args.ckpt, args.device)
        rdtf.load_lora(args.lora, tuned)
        columns = [("text, before", model, "t2v"), *((label, tuned, mode) for label, _, mode in columns[:3])]
    for store in (args.data, *args.more):
        stickers, split = data.open_stickers(store, model.cfg.size), "train" if args.lora else "held_out"
        _, truth, words = quality.first_of(stickers, args.count, args.seed, split)
        clips, seeds = [truth], list(range(len(truth)))
        for _, network, mode in columns:
            clips.append(quality.generate(network, truth, words, quality.mode_of(mode)[0], args, seeds))
        rows += [[quality.to_uint8(made[j]) for made in clips] for j in range(len(truth))]
        captions += words
    data.save_sheet(f"{args.out}.webp", rows, captions)
    labels = [label for label, *_ in columns]
    data.save_sheet(f"{args.out}.png", [clip for row in rows for clip in row],
                    [label for caption in captions for label in (caption, *labels)])
    print(f"{args.out}.webp, {args.out}.png: rows {captions}; columns truth, {', '.join(labels)}")


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for flags in (quality.model_flags, quality.sampling_flags, quality.data_flags):
        flags(p)
    p.add_argument("--more", nargs="*", default=[], metavar="DATA", help="further sets: as many rows of each")
    p.add_argument("--lora", default="", metavar="FILE", help="LoRA on top of --ckpt, from train.py --export")
    p.add_argument("--out", required=True, help="file stem of the pictures")
    p.set_defaults(count=5)
    try:
        gallery(p.parse_args(arguments))
    except (data.DataError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
