"""Which part of the recipe helps? Variants trained for equal CPU time, each a rung on top of the one before.

    python benchmarks/ladder.py run f4c4 units inputs --minutes 45 --out runs/ladder \\
        --vae weights/stickers-64.pt --data cache/fluent.z --more cache/characters.z cache/flying.z:0.25 \\
        --measure cache/fluent
    python benchmarks/ladder.py table runs/ladder                # ladder.md and ladder.png

Time is process time of training alone, so a busy machine does not matter; the learning rate follows it,
too: warm-up, flat, then down over the last 30 %. A curriculum runs its course in it. At --marks moments
the averaged weights are measured (`quality.py mean`, not on the clock). Every variant is a process of its
own on one thread; the same command goes on where it was stopped, also after kill -9. Stores of latents
(--data, --more) save encoding at every start, but fit one autoencoder: f8c16 and vae2 need stores of
pixels, and f8c16 an autoencoder with f = 8 and 16 channels (`python stickers/vae.py --latent-channels 16
--vae-patch 4`).
"""
import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data  # noqa: E402
import quality  # noqa: E402
import rdtf  # noqa: E402
import train  # noqa: E402
from curriculum import Curriculum  # noqa: E402


def without_units(given, cond_mask, frame_mask):
    """In place of rdtf.guess_frames: the blend, as if what differs from it had variance 1."""
    return rdtf.blend(given, cond_mask), given.new_ones(len(given), 1, 1, 1, 1)


def linear(given, cond_mask, frame_mask, usual=rdtf.guess_frames):
    """In place of rdtf.guess_frames: the blend, in its units."""
    return rdtf.blend(given, cond_mask), usual(given, cond_mask, frame_mask)[1]


def seldom_late(kind, g, rng, usual=train.noise_step):
    """In place of train.noise_step: normal log-SNR for all, no share of its own for the noisiest fifth."""
    return usual(kind, g, SimpleNamespace(random=lambda: 1.0))


class Rung(NamedTuple):
    what: str
    after: str = ""                       # the rung that it adds to
    config: dict = {}                     # what changes in Config
    flags: dict = {}                      # ... and in the flags of train.py
    guess: object = None                  # stands in for rdtf.guess_frames; None: as before
    steps: object = None                  # stands in for train.noise_step; None: as before
    more: bool | None = None              # with the sets of --more? None: as before


RUNGS = {
    "f8c16": Rung("the first release's: f = 8, 16 channels", "", dict(
        latent_channels=16, vae_patch=4, widths=(64, 128), narrow=False, inputs=False, clean=False,
        zero_snr=False, film=False, draft=False, bypass=False),
        dict(optimizer="adamw", lr=1e-3, weight_decay=0.01, noise_levels="uniform", full=0.0),
        without_units, seldom_late, False),
    "f4c4": Rung("f = 4, 4 channels, narrow attention", "f8c16", dict(
        latent_channels=4, vae_patch=2, widths=(32, 64, 128), narrow=True)),
    "units": Rung("+ residual in its own units", "f4c4", guess=linear),
    "inputs": Rung("+ guess, masks, frame number as inputs", "units", dict(inputs=True)),
    "clean": Rung("+ given frames clean", "inputs", dict(clean=True)),
    "data": Rung("+ full clips, the sets of --more", "clean", flags=dict(full=0.5), more=True),
    "muon": Rung("+ Muon", "data", flags=dict(optimizer="muon", lr=0.01, weight_decay=0.5)),
    "noise": Rung("+ normal noise levels", "muon", flags=dict(noise_levels="normal")),
    "late": Rung("+ 30 % in the noisiest fifth", "noise", steps=train.noise_step),
    "decay": Rung("+ weight decay 0.1", "late", flags=dict(weight_decay=0.1)),
    "alone": Rung("+ a last noise step of noise alone", "decay", dict(zero_snr=True)),
    "film": Rung("+ FiLM, norms of 8 channels", "alone", dict(film=True)),
    "draft": Rung("+ a draft from the caption, a bypass", "film", dict(draft=True, bypass=True)),
    "tiny": Rung("+ a bridge around the loop for a blend (= tiny)", "draft", guess=rdtf.guess_frames),
    "adamw": Rung("tiny with AdamW", "tiny", flags=dict(optimizer="adamw", lr=1e-3, weight_decay=0.01)),
    "lr02": Rung("tiny, rate 0.02", "tiny", flags=dict(lr=0.02)),
    "lr005": Rung("tiny, rate 0.005", "tiny", flags=dict(lr=0.005)),
    "batch4": Rung("tiny, batches of 4", "tiny", flags=dict(batch_size=4)),
    "names": Rung("tiny, --text-drop 0.5", "tiny", flags=dict(text_drop=0.5)),
    "fluent": Rung("tiny without the sets of --more", "tiny", more=False),
    "vae2": Rung("tiny with another autoencoder (--vae)", "tiny"),
}
FOREVER = 10 ** 6                         # updates; the clock stops the run
MODES = ("interpolate-2", "interpolate-3", "predict-post", "it2v")
TASKS = "i2v,it2v,predict_pre,predict_post,interpolate"


def rung(name):
    """-> all that the rung and those below it change."""
    this = RUNGS[name]
    if not this.after:
        return this
    below = rung(this.after)
    return Rung(this.what, "", below.config | this.config, below.flags | this.flags,
                *(b if t is None else t for t, b in zip(this[4:], below[4:])))


class Clock:
    """Stands in for two functions of train.py: `learning_rate`, called once in every update, follows the
    clock and ends the run, and `save_checkpoint`, after which it is noted how much time is in the checkpoint
    and the weights are measured when a mark has passed. A curriculum's course follows the clock, too."""

    def __init__(self, out, args):
        self.out, self.budget = out, 60 * args.minutes
        self.args, self.began, self.before = args, None, 0.0
        self.save = train.save_checkpoint
        if (out / "last.pt").exists():
            step = rdtf.read_weights(out / "last.pt")["step"]
            known = (x["seconds"] for x in train.read_lines(out / "clock.jsonl") if x["step"] <= step)
            self.before = max(known, default=0.0)
        train.learning_rate, train.save_checkpoint = self.rate, self.saved
        weights = Curriculum.weights
        Curriculum.weights = lambda curriculum, step: weights(curriculum, curriculum.total * self.share())

    def spent(self):
        return self.before + (0 if self.began is None else time.process_time() - self.began)

    def share(self):
        return min(1.0, self.spent() / self.budget)

    def rate(self, step, peak, warmup, schedule, steps):
        self.began = time.process_time() if self.began is None else self.began
        if self.spent() >= self.budget:
            train.STOP["since"] = time.monotonic()                  # ends after this update, and saves
        return peak * min(1, (step + 1) / max(1, warmup)) * max(0.02, min(1, (1 - self.share()) / 0.3))

    def saved(self, path, content):
        self.save(path, content)
        seconds, paused = self.spent(), time.process_time()
        with open(self.out / "clock.jsonl", "a") as file:
            file.write(json.dumps({"step": content["step"], "seconds": seconds}) + "\n")
        done = max((x["seconds"] for x in train.read_lines(self.out / "measured.jsonl")), default=0.0)
        if seconds >= self.budget > done or seconds // (self.budget / self.args.marks) > \
                done // (self.budget / self.args.marks):
            self.measure(path, seconds)
        self.began += time.process_time() - paused

    def measure(self, path, seconds):
        a, model = self.args, rdtf.load_model(path)
        _, clips, captions = quality.first_of(data.open_stickers(a.measure, model.cfg.size), a.count)
        settings = SimpleNamespace(precision="auto", batch=8, draws=50)
        with torch.random.fork_rng():
            found = quality.one_step_means(model, clips, captions, MODES, settings, seconds >= self.budget)
        with open(self.out / "measured.jsonl", "a") as file:
            file.write(json.dumps({"seconds": seconds, "step": model.meta["step"], "modes": found}) + "\n")


def run(name, args, clock=Clock):
    """Train one variant in this process until its time is over."""
    this, out = rung(name), Path(args.out) / f"{name}-{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    if any(x["seconds"] >= 60 * args.minutes for x in train.read_lines(out / "measured.jsonl")):
        return print(f"{out}: has its {args.minutes:g} minutes already")
    torch.set_num_threads(1)
    rdtf.PRESETS["tiny"].update(this.config)
    rdtf.guess_frames, train.noise_step = this.guess, this.steps
    keys = ("vae", "seed", "tasks", "save_every", "batch_size")
    passed = {key: getattr(args, key) for key in keys}
    flags = passed | dict(curriculum="none", warmup=50) | this.flags | dict(
        data=args.data + args.more * bool(this.more), out=out, steps=FOREVER, eval_every=0)
    words = [[f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
             for key, value in flags.items() if value is not None]
    clock(out, args)
    train.run(train.parser().parse_args(sum(words, [])))


def table(args):
    """The last measurement of every variant as a table, all of them as curves."""
    runs = {p.parent.name: train.read_lines(p) for p in sorted(Path(args.out).glob("*/measured.jsonl"))}
    if not runs:
        raise data.DataError(f"{args.out}: nothing measured there yet")
    order = sorted(runs, key=lambda name: (list(RUNGS).index(name.rsplit("-", 1)[0]), name))
    rows = [f"| rung | CPU min | updates | {' | '.join(f'EV {m} | dB' for m in MODES)} |",
            "|---" * (3 + 2 * len(MODES)) + "|"]
    for name in order:
        last = runs[name][-1]
        cells = [f"{last['modes'][m]['EV'][0]:.3f} | {last['modes'][m]['ours'][0]:.2f}" for m in MODES]
        rows.append(f"| {name}: {RUNGS[name.rsplit('-', 1)[0]].what} | {last['seconds'] / 60:.1f} | "
                    f"{last['step']} | {' | '.join(cells)} |")
    for rival in list(quality.MEAN_COLUMNS)[1:]:
        known = next((runs[n][-1]["modes"] for n in order if "copy" in runs[n][-1]["modes"][MODES[0]]), {})
        cells = [f" | {known[m][rival][0]:.2f}" if rival in known.get(m, {}) else " | " for m in MODES]
        rows.append(f"| {rival} | | | {' | '.join(cells)} |")
    (Path(args.out) / "ladder.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))
    try:
        import matplotlib
    except ImportError:
        return print("no ladder.png: pip install matplotlib", file=sys.stderr)
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(MODES), figsize=(4.2 * len(MODES), 3.6), layout="constrained")
    for mode, axis in zip(MODES, axes):
        for name in order:
            points = [(x["seconds"] / 60, x["modes"][mode]["EV"][0]) for x in runs[name]]
            axis.plot(*zip(*points), "o-", ms=3, label=name)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(title=mode, xlabel="CPU minutes", ylabel="EV of the one-step mean")
    axes[0].legend(fontsize=7)
    figure.savefig(Path(args.out) / "ladder.png", dpi=110)


def command(args, arguments, file, run, table):
    """The commands `table DIR` and `run NAME ...` of `file`; peers.py has the same."""
    try:
        if args.command == "table":
            table(args)
        elif len(args.names) == 1:
            run(args.names[0], args)
        else:                                                       # a process each: patches must not mix
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            words = list(sys.argv[1:] if arguments is None else arguments)
            rest = words[1 + len(args.names):]
            for name in args.names:
                subprocess.run([sys.executable, file, "run", name, *rest], check=True)
    except (data.DataError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


def parser(about, rungs, out, tasks):
    """The flags of the commands `run` and `table`; ablation.py has the same."""
    top = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                            epilog="; ".join(f"{name}: {r.what}" for name, r in rungs.items()))
    p.add_argument("names", nargs="+", choices=list(rungs), metavar="NAME", help=", ".join(rungs))
    p.add_argument("--minutes", type=float, default=45, help="process time of training")
    p.add_argument("--out", default=out, help="folder of all runs")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--data", nargs="+", default=[train.BUILT_IN[1]], help="as for train.py")
    p.add_argument("--more", nargs="+", default=[train.BUILT_IN[0]], help="sets that join at rung `data`")
    p.add_argument("--vae", required=True, help="as for train.py")
    p.add_argument("--tasks", default=tasks, help="tasks trained")
    p.add_argument("--batch-size", type=int, default=8, help="clips per update")
    p.add_argument("--measure", default=str(train.HERE / "stickers" / "fluent"), help="pixels")
    p.add_argument("--count", type=int, default=64, help="of them")
    p.add_argument("--marks", type=int, default=6, help="measurements")
    p.add_argument("--save-every", type=int, default=50, help="updates between checkpoints")
    p = commands.add_parser("table")
    p.add_argument("out", help="folder of the runs")
    return top


def main(arguments=None):
    args = parser(__doc__, RUNGS, "runs/ladder", TASKS).parse_args(arguments)
    command(args, arguments, __file__, run, table)


if __name__ == "__main__":
    main()
