"""Do dual masks and the curriculum help? A small honest version of Table 4: same seeds, same number of
updates, held-out losses.

    python benchmarks/ablation.py --data synthetic:600 --vae runs/vae/vae.pt --out runs/ablation --steps 300
    --seeds 3

trains every variant with every seed (resumable: finished runs are skipped), then measures the EMA weights of
each on the same held-out clips, noise, steps and masks, and prints mean and standard deviation over the seeds
per task. The loss is per real frame, so that 1 is "predict nothing". A variant that never trained a task is
measured on it all the same: that is what dual masks are for.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from curriculum import GENERATION, TASKS  # noqa: E402
from data import open_stickers  # noqa: E402
from rdtf import load_vae  # noqa: E402
from sample import load_model  # noqa: E402
from train import Context, parser, validate, validation_batch  # noqa: E402

VARIANTS = {
    "generation only, short clips dropped": ["--tasks", ",".join(GENERATION), "--min-frames", "8", "--curriculum", "none"],
    "dual masks": ["--curriculum", "none"],
    "dual masks + linear": ["--curriculum", "linear"],
    "dual masks + adaptive": ["--curriculum", "adaptive"],
}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="synthetic:600", help="as for train.py")
    p.add_argument("--vae", required=True, help="autoencoder all runs share")
    p.add_argument("--out", default="runs/ablation", help="folder of the runs and of ablation.json, ablation.md")
    p.add_argument("--steps", type=int, default=300, help="updates of every run")
    p.add_argument("--batch-size", type=int, default=8, help="clips per update")
    p.add_argument("--seeds", type=int, default=3, help="runs per variant")
    p.add_argument("--count", type=int, default=192, help="clips of the held-out measurement, all tasks together")
    args = p.parse_args()
    out, table = Path(args.out), {}
    stickers = open_stickers(args.data, 64).encode(load_vae(args.vae))
    ctx = Context(parser().parse_args(["--precision", "fp32"]))
    for name, flags in VARIANTS.items():
        table[name] = []
        for seed in range(args.seeds):
            run = out / f"{list(VARIANTS).index(name)}-{seed}"
            command = [sys.executable, str(ROOT / "train.py"), "--data", args.data, "--vae", args.vae, "--out", str(run), "--seed", str(seed),
                       "--steps", str(args.steps), "--batch-size", str(args.batch_size), "--eval-every", "0", "--log-every", "1", *flags]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            loaded = load_model(run / "last.pt")
            batch, groups = validation_batch(stickers, stickers.select("held_out"), loaded.model.text, TASKS, loaded.cfg.frames, args.count)
            table[name].append(validate(loaded.model, batch, groups, ctx))
            print(name, seed, {k: round(v, 4) for k, v in table[name][-1].items()}, flush=True)
    (out / "ablation.json").write_text(json.dumps({"flags": vars(args), "losses": table}, indent=1))
    lines = ["| variant | all | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 2) + "|"]
    for name, rows in table.items():
        cells = [np.array([r[k] for r in rows]) for k in ("loss",) + TASKS]
        lines.append(f"| {name} | " + " | ".join(f"{c.mean():.4f} ± {c.std(ddof=1) if len(c) > 1 else 0:.4f}" for c in cells) + " |")
    (out / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
