"""Do dual masks and the curriculum help? A small honest version of Table 4: same seeds, same number of
updates, held-out losses.

    python benchmarks/ablation.py --data synthetic:600 --vae runs/vae/vae.pt --out runs/ablation --steps 300

trains every variant with every seed and measures the averaged weights of each on the same held-out clips,
noise, noise steps and masks, twice: on clips of 3 to 8 frames, as trained with dual masks, and on full clips
of 8 frames, as the first variant is trained. It prints mean ± standard deviation over the seeds per task,
anew whenever a seed is done in all variants. 1 is "predict nothing". A variant that never trained a task is
measured on it all the same: that is what dual masks are for. The same command goes on after an interruption:
a run from its last checkpoint, what is done is not repeated.
"""
import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import train  # noqa: E402
from curriculum import TASKS  # noqa: E402
from rdtf import PRESETS, Config, load_model, load_vae, read_weights  # noqa: E402
from stickers.augment import augment  # noqa: E402

# folder of the runs, less the seed -> (name in the table, flags of train.py)
VARIANTS = {
    "generation": ("generation only, short clips dropped",
                   ["--tasks", "i2v,t2v,it2v", "--min-frames", "8", "--full", "1", "--curriculum", "none"]),
    "dual": ("dual masks", ["--curriculum", "none"]),
    "linear": ("dual masks + linear", ["--curriculum", "linear"]),
    "adaptive": ("dual masks + adaptive", ["--curriculum", "adaptive"]),
}
SETS = {"clips": "Held-out clips of 3 to 8 frames", "full": "Held-out clips of 8 frames"}


def train_one(args, run, key, seed):
    """train.py as a child process; it goes on from the run's last checkpoint if there is one."""
    if (run / "last.pt").exists() and read_weights(run / "last.pt")["step"] >= args.steps:
        return
    flags = {"preset": args.preset, "data": Path(args.out, "latents"), "vae": args.vae, "out": run,
             "seed": seed, "steps": args.steps, "batch-size": args.batch_size, "eval-every": 0,
             "save-every": 100}
    command = [sys.executable, str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in flags.items())]
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "output.txt", "a") as log:
        code = subprocess.run(command + VARIANTS[key][1], stdout=log, stderr=log).returncode
    if code or read_weights(run / "last.pt")["step"] < args.steps:
        raise data.DataError(f"{run}: train.py ended early with code {code}, see {run / 'output.txt'}; "
                             "the same command goes on")


def rows_of(stickers, full, count):
    """Fixed held-out clips for every task -> as train.validate takes them. full: those of 8 frames only."""
    held = stickers.select("held_out")
    held = held[stickers.index["keys"][held, -1].min(1) >= 0] if full else held
    if not len(held):
        raise data.DataError("--data: no held-out sticker of 8 distinct frames; take more stickers")
    rows = []
    for j in range(max(1, count // len(TASKS))):
        item = int(held[j % len(held)])
        clip, n = data.draw_clip(stickers, item, np.random.default_rng([1234, j]), full=float(full))
        rows.append((torch.from_numpy(clip), n, stickers.caption(item), j))
    return [(task, [row for row in rows if TASKS[task].given(row[1])]) for task in TASKS]


def measure(run, fixed, count, ctx):
    """Held-out losses of a run's averaged weights -> {set: {"loss", task: loss}}; kept in its losses.json."""
    path = run / "losses.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("count") != count:
        model = load_model(run / "last.pt", device=ctx.device).model
        kept = {name: train.validate(model, rows, ctx) for name, rows in fixed.items()} | {"count": count}
        path.write_text(json.dumps(kept))
    return kept


def table(losses, which):
    """{variant: [losses of every seed]} -> one Markdown table of a set."""
    lines = ["| variant | all | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 2) + "|"]
    for key, rows in losses.items():
        cells = [np.array([row[which][k] for row in rows]) for k in ("loss", *TASKS)]
        spread = [f"{c.mean():.4f} ± {c.std(ddof=1):.4f}" if len(c) > 1 else f"{c[0]:.4f}" for c in cells]
        lines.append(f"| {VARIANTS[key][0]} | " + " | ".join(spread) + " |")
    return "\n".join(lines)


def ablation(args):
    out, cfg = Path(args.out), Config(**PRESETS[args.preset])
    out.mkdir(parents=True, exist_ok=True)
    shared = {key: getattr(args, key) for key in ("data", "vae", "preset", "steps", "batch_size")}
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != shared:
        raise data.DataError(f"--out {out}: its {path.name} has other flags; choose another folder")
    path.write_text(json.dumps(shared))
    stickers = augment(data.open_stickers(args.data, cfg.size), out / "latents", 1, load_vae(args.vae))
    fixed = {name: rows_of(stickers, name == "full", args.count) for name in SETS}
    print(f"{len(stickers.select('train'))} training stickers, {len(stickers.select('held_out'))} held out; "
          f"{len(VARIANTS)} variants x {args.seeds} seeds x {args.steps} updates of {args.batch_size} clips",
          flush=True)
    ctx = train.Context(train.parser().parse_args(["--precision", "fp32"]))
    losses = {key: [] for key in VARIANTS}
    for seed in range(args.seeds):
        for key in VARIANTS:
            run = out / f"{key}-{seed}"
            train_one(args, run, key, seed)
            losses[key].append(measure(run, fixed, args.count, ctx))
        report = [f"{title}, mean ± standard deviation over {seed + 1} seed(s)\n\n{table(losses, which)}\n"
                  for which, title in SETS.items()]
        (out / "ablation.md").write_text("\n".join(report))
        (out / "ablation.json").write_text(json.dumps({"flags": vars(args), "losses": losses}, indent=1))
        print("\n".join(report), flush=True)


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="synthetic:600", help="as for train.py, pixels")
    p.add_argument("--vae", required=True, help="autoencoder all runs share")
    p.add_argument("--out", default="runs/ablation", help="folder of the runs, ablation.md and ablation.json")
    p.add_argument("--preset", default="tiny", choices=list(PRESETS), help="network")
    p.add_argument("--steps", type=int, default=300, help="updates of every run")
    p.add_argument("--batch-size", type=int, default=8, help="clips per update")
    p.add_argument("--seeds", type=int, default=3, help="runs per variant")
    p.add_argument("--count", type=int, default=192, help="clips of each measurement, over all tasks")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                 # so that the child is ended, too
    try:
        ablation(p.parse_args(arguments))
    except (data.DataError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
