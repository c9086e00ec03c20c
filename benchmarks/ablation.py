"""Do dual masks and the curriculum help? A small honest version of Table 4: same seeds, same number of
updates, held-out losses.

    python benchmarks/ablation.py --data synthetic:600 --vae runs/vae/vae.pt --out runs/ablation --steps 300

trains every variant with every seed and measures the averaged weights of each on the same held-out clips,
noise, noise steps and masks, twice: on clips of 3 to 8 frames as trained with dual masks, and on full clips
of 8 frames, as the first variant is trained. It prints mean ± standard deviation over the seeds per task,
anew whenever a seed is done in all variants. The loss is per real frame; 1 is "predict nothing". A variant
that never trained a task is measured on it all the same: that is what dual masks are for.

The same command goes on after an interruption: a run from its last checkpoint, what is done is not repeated.
Held-out stickers are those that train.py never trains on; clips are encoded once, into OUT/latents.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from curriculum import GENERATION, TASKS  # noqa: E402
from data import DataError, Stickers, open_stickers  # noqa: E402
from rdtf import PRESETS, Config, load_vae, read_weights  # noqa: E402
from sample import load_model  # noqa: E402
from train import Context, validate, validation_batch  # noqa: E402
from train import parser as train_parser  # noqa: E402

# folder of the runs, less the seed -> (name in the table, flags of train.py)
VARIANTS = {
    "generation": ("generation only, short clips dropped",
                   ["--tasks", ",".join(GENERATION), "--min-frames", "8", "--curriculum", "none"]),
    "dual": ("dual masks", ["--curriculum", "none"]),
    "linear": ("dual masks + linear", ["--curriculum", "linear"]),
    "adaptive": ("dual masks + adaptive", ["--curriculum", "adaptive"]),
}
SETS = {"clips": "Held-out clips of 3 to 8 frames", "full": "Held-out clips of 8 frames"}


def latents(args, out):
    """The data as latents, encoded once for all runs -> Stickers. DataError when OUT holds other runs."""
    shared = {key: getattr(args, key) for key in ("data", "vae", "preset", "steps", "batch_size")}
    path = out / "settings.json"                                    # written when the latents are there
    if path.exists():
        if json.loads(path.read_text()) != shared:
            raise DataError(f"--out {out}: its {path.name} has other flags; choose another folder")
    else:
        if not Path(args.vae).is_file():
            raise DataError(f"--vae {args.vae}: no such file; `python train.py --stage vae` makes one")
        stickers = open_stickers(args.data, Config(**PRESETS[args.preset]).size)
        stickers.encode(load_vae(args.vae)).save(out / "latents")
        path.write_text(json.dumps(shared))
    return Stickers.open(out / "latents")


def full_clips(stickers):
    """The same stickers, but of those with 8 distinct frames every draw gives all 8 -> Stickers, their items
    held out."""
    index = np.array(stickers.index)
    index["keys"][:] = index["keys"][:, -1:]
    held = stickers.select("held_out")
    held = held[index["keys"][held, -1].min(1) >= 0]
    return Stickers(stickers.frames, index, stickers.text, stickers.meta), held


def start(args, out, key, seed):
    """train.py as a child process; it goes on from the run's last checkpoint if there is one."""
    run = out / f"{key}-{seed}"
    command = [sys.executable, str(ROOT / "train.py"), "--preset", args.preset,
               "--data", str(out / "latents"), "--vae", args.vae, "--out", str(run), "--seed", str(seed),
               "--steps", str(args.steps), "--batch-size", str(args.batch_size), "--eval-every", "0",
               "--save-every", "100", "--log-every", "1", *["--compile"] * args.compile, *VARIANTS[key][1]]
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "output.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def is_done(args, run):
    """The averaged weights after all updates are there."""
    return (run / "last.pt").exists() and read_weights(run / "last.pt")["step"] >= args.steps


def train_all(args, out, seed):
    """Every variant with one seed, `--jobs` at a time; stopped runs save and go on next time."""
    todo = [key for key in VARIANTS if not is_done(args, out / f"{key}-{seed}")]
    for first in range(0, len(todo), args.jobs):
        keys, children = todo[first:first + args.jobs], []
        try:
            for key in keys:
                children.append(start(args, out, key, seed))
            codes = [child.wait() for child in children]
        finally:                                                            # we are stopped: so are they
            for child in children:
                child.terminate()
            for child in children:
                child.wait()
        for key, code in zip(keys, codes):
            run = out / f"{key}-{seed}"
            if code or not is_done(args, run):
                raise DataError(f"{run}: train.py ended early with code {code}, see {run / 'output.txt'}; "
                                "the same command goes on")


def measure(run, batches, count, ctx):
    """Held-out losses of a run's averaged weights -> {set: {"loss", task: loss}}; kept in its losses.json."""
    path = run / "losses.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("count") != count:
        loaded = load_model(run / "last.pt", device=ctx.device)
        kept = {name: validate(loaded.model, *batch(loaded), ctx) for name, batch in batches.items()}
        kept["count"] = count
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
    out = Path(args.out)
    stickers = latents(args, out)
    full, full_items = full_clips(stickers)
    items = stickers.select("held_out")
    if not len(full_items):
        raise DataError(f"--data {args.data}: no held-out sticker of 8 distinct frames; take more stickers")
    print(f"{len(stickers.select('train'))} training stickers, {len(items)} held out ({len(full_items)} of "
          f"them with 8 frames); {len(VARIANTS)} variants x {args.seeds} seeds x {args.steps} updates of "
          f"{args.batch_size} clips; {args.count} clips measured", flush=True)

    def batch(source, chosen):
        return lambda m: validation_batch(source, chosen, m.model.text, TASKS, m.cfg.frames, args.count)
    batches = {"clips": batch(stickers, items), "full": batch(full, full_items)}
    ctx = Context(train_parser().parse_args(["--precision", "fp32"]))
    losses = {key: [] for key in VARIANTS}
    for seed in range(args.seeds):
        train_all(args, out, seed)
        for key in VARIANTS:
            losses[key].append(measure(out / f"{key}-{seed}", batches, args.count, ctx))
        report = [f"{title}, mean ± standard deviation over {seed + 1} seed(s)\n\n{table(losses, which)}\n"
                  for which, title in SETS.items()]
        (out / "ablation.md").write_text("\n".join(report))
        (out / "ablation.json").write_text(json.dumps({"flags": vars(args), "losses": losses}, indent=1))
        print("\n".join(report), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="synthetic:600", help="as for train.py")
    p.add_argument("--vae", required=True, help="autoencoder all runs share")
    p.add_argument("--out", default="runs/ablation", help="folder of the runs, ablation.md and ablation.json")
    p.add_argument("--preset", default="tiny", choices=list(PRESETS), help="network")
    p.add_argument("--steps", type=int, default=300, help="updates of every run")
    p.add_argument("--batch-size", type=int, default=8, help="clips per update")
    p.add_argument("--seeds", type=int, default=3, help="runs per variant")
    p.add_argument("--count", type=int, default=192, help="clips of each measurement, over all tasks")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--compile", action="store_true", help="passed on to train.py")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                 # so that `finally` is reached
    try:
        ablation(p.parse_args())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
