"""Do STI, dual masks and the curriculum help? Tables 3 and 4 of the paper in small, on real stickers.

    python benchmarks/ablation.py run generation dual linear adaptive conv3d --minutes 10 \\
        --out runs/ablation --vae weights/stickers-64.pt --measure cache/fluent \\
        --data cache/fluent.z:0.5 --more cache/characters.z
    python benchmarks/ablation.py table runs/ablation            # mean and spread over the seeds; ablation.md

Each variant is preset `tiny` with all six tasks but for what its name says, trained for equal process time
by ladder.py (which see, also for going on after a stop). At the end the averaged weights are measured: EV of
the one-step mean on the held-out stickers of --measure, and on fixed held-out clips of all sets, noise,
steps and masks the loss of every task, trained or not: that is what dual masks are for.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import ladder  # noqa: E402
import rdtf  # noqa: E402
import train  # noqa: E402
from curriculum import TASKS  # noqa: E402
from ladder import Rung  # noqa: E402

VARIANTS = {
    "generation": Rung("generation only, short clips dropped", "tiny",
                       flags=dict(tasks="i2v,t2v,it2v", min_frames=8, full=1.0)),
    "dual": Rung("dual masks", "tiny"),
    "linear": Rung("dual masks + linear", "tiny", flags=dict(curriculum="linear")),
    "adaptive": Rung("dual masks + adaptive", "tiny", flags=dict(curriculum="adaptive")),
    "conv3d": Rung("dual masks, 3-D convolutions for STI", "tiny", flags=dict(temporal="conv3d")),
}
CLIPS = 192                               # of the losses, over all tasks
ladder.RUNGS.update(VARIANTS)             # each stands on `tiny` there


class Clock(ladder.Clock):
    def measure(self, path, seconds):
        """EV as in the ladder; at the end the losses as well, beside it in losses.json."""
        super().measure(path, seconds)
        if seconds >= self.budget:
            loaded, flags = rdtf.load_model(path), train.parser().parse_args(
                ["--data", *self.args.data, *self.args.more])
            stickers, _, held_out = train.open_data(flags, loaded.cfg, 2)
            rows = train.validation_rows(stickers.encode(loaded.vae), held_out, list(TASKS), CLIPS)
            losses = train.validate(loaded.model, rows, train.Context(flags))
            (self.out / "losses.json").write_text(json.dumps(losses))


def run(name, args):
    ladder.run(name, args, Clock)


def table(args):
    """Mean over the seeds, ± half of the range where there are two or more."""
    lines = ["| variant | seeds | CPU min | updates | " + " | ".join([f"EV {m}" for m in ladder.MODES]) +
             " | loss, all | " + " | ".join(TASKS) + " |"]
    lines.append("|---" * (5 + len(ladder.MODES) + len(TASKS)) + "|")
    for name, variant in VARIANTS.items():
        paths = sorted(Path(args.out).glob(f"{name}-*/losses.json"))
        means = [train.read_lines(path.with_name("measured.jsonl"))[-1] for path in paths]
        losses = [json.loads(path.read_text()) for path in paths]
        columns = [[x["modes"][m]["EV"][0] for x in means] for m in ladder.MODES]
        columns += [[x[task] for x in losses] for task in ("loss", *TASKS)]
        if paths:
            cells = [f"{np.mean(c):.3f}" + f" ± {np.ptp(c) / 2:.3f}" * (len(c) > 1) for c in columns]
            known = [len(paths), f"{means[0]['seconds'] / 60:.1f}", "/".join(str(x["step"]) for x in means)]
            lines.append("| " + " | ".join(map(str, [variant.what, *known, *cells])) + " |")
    if len(lines) == 2:
        raise ladder.data.DataError(f"{args.out}: nothing measured there yet")
    (Path(args.out) / "ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main(arguments=None):
    args = ladder.parser(__doc__, VARIANTS, "runs/ablation", ",".join(TASKS)).parse_args(arguments)
    ladder.command(args, arguments, __file__, run, table)


if __name__ == "__main__":
    main()
