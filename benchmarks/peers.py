"""Ours beside what people would use today: the same stickers, the same CPU time, the same measures.

    pip install --no-deps -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py run ours paper vdp --minutes 60 --out runs/peers --measure cache/fluent \\
        --data cache/fluent:0.55 cache/characters:0.45 --paper-vae f8c16.pt
    python benchmarks/peers.py table runs/peers                  # prints peers.md and writes it

| peer | what it is |
|---|---|
| ours | preset `tiny` as it is |
| paper | the paper's recipe at the width of our first `tiny`: eps, f = 8, AdamW 1e-5, uniform noise steps |
| vdp | PyPI video-diffusion-pytorch: its U-Net (dim 64), L1 loss, Adam 1e-4; 64 px, 8 frames, no text |

vdp sees RGB over white: that is its default, the measures see stickers over white, too, and alpha would be
one more thing to learn. It has no masks, so it trains on stickers of 8 keyframes only, and it can neither
predict nor interpolate: it generates, without captions. All have batches of --batch-size, in bf16 where the
CPU has it; the paper's batch is 96 and vdp's 64, which would leave them a handful of updates here. vdp's
averaged weights begin at update 2,000, which takes it a day of one core: they are left out.

Time is process time of training alone (ladder.Clock); rates and curriculum follow its share, not updates.
Each peer is a process on one thread. The same command goes on where it was stopped, also after kill -9.
"""
import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data  # noqa: E402
import features  # noqa: E402
import ladder  # noqa: E402
import quality  # noqa: E402
import rdtf  # noqa: E402
import train  # noqa: E402

PEERS = {"ours": "preset tiny", "paper": "the paper's recipe", "vdp": "video-diffusion-pytorch, no text"}
PAPER = dict(latent_channels=16, vae_patch=4, widths=(64, 128))     # the rest of Config is the paper's
SIZE, FRAMES = 64, quality.FRAMES
INSTALL = "pip install --no-deps -r benchmarks/requirements-peers.txt"


# -------------------------------------------------------------------------------------------- ours and paper
class Clock(ladder.Clock):
    """ladder.Clock, but each preset keeps its own schedule: the share of the time that is over takes the
    place of the share of the updates."""

    def __init__(self, out, args):
        self.schedule = train.learning_rate
        super().__init__(out, args)                                 # puts `rate` in its place

    def rate(self, step, peak, warmup, schedule, steps):
        super().rate(step, peak, warmup, schedule, steps)           # starts the clock and ends the run
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return ramp * self.schedule(steps * self.share(), peak, 0, schedule, steps)


def train_rdtf(name, args, out):
    """ours, paper: train.py on the clock, which also measures EV and PSNR of the one-step mean."""
    vae = args.paper_vae if name == "paper" else args.vae
    if not vae:
        raise data.DataError("--paper-vae FILE is missing: paper needs an autoencoder of f = 8 with 16 "
                             "channels: python stickers/vae.py --latent-channels 16 --vae-patch 4")
    rdtf.PRESETS["paper"] = PAPER
    preset = "paper" if name == "paper" else "tiny"
    words = ["--preset", preset, "--data", *args.data, "--vae", vae, "--out", out, "--seed", args.seed,
             "--steps", ladder.FOREVER, "--batch-size", args.batch_size, "--accumulation", 1,
             "--eval-every", 0, "--save-every", args.save_every]
    words += ["--lr", 0.01, "--warmup", 50] if preset == "tiny" else []     # for 8 clips instead of 16
    Clock(out, args)
    train.run(train.parser().parse_args([str(word) for word in words]))


def sample_rdtf(args, out, captions):
    """Captions -> clips (n, 8, h, w, 4), sampled as the preset says."""
    blank = np.zeros((len(captions), FRAMES, SIZE, SIZE, 4), np.float32)
    settings = SimpleNamespace(ckpt=out / "last.pt", precision="auto", batch=8, steps=None, sampler=None,
                               eta=1.0, text_scale=None, image_scale=None, temperature=None)
    model = rdtf.load_model(out / "last.pt")
    return quality.generate(model, blank, captions, quality.NONE, settings, list(range(len(blank))))


# ------------------------------------------------------------------------------------------------------- vdp
def open_vdp(args):
    """-> the package's GaussianDiffusion, made as its README does."""
    without = "torchvision" not in sys.modules
    if without:                           # reads GIFs for the package's Trainer, which wants CUDA: not used
        sys.modules["torchvision"] = mock.MagicMock()
    try:
        from video_diffusion_pytorch import GaussianDiffusion, Unet3D
    except ImportError as error:
        raise data.DataError(f"vdp: no module {error.name}; {INSTALL}") from None
    finally:
        if without:
            del sys.modules["torchvision"]
    torch.manual_seed(args.seed)
    return GaussianDiffusion(Unet3D(dim=args.vdp_dim), image_size=SIZE, num_frames=FRAMES)


def bf16():
    return torch.autocast("cpu", torch.bfloat16, enabled=rdtf.has_bf16(torch.device("cpu")))


def vdp_batch(stickers, order, samples, seed):
    """Numbers of b samples -> (b, 3, t, h, w), RGB over white in [0, 1]: what the package takes."""
    rows, flags = [], SimpleNamespace(seed=seed, full=1.0, min_frames=FRAMES)
    for g in samples:
        clip, n, _, _ = train.draw_row(stickers, order, g, flags)           # t 4 h w, n real frames
        rows.append(clip[torch.arange(FRAMES).clamp(max=n - 1)])            # it knows no padding
    x = torch.stack(rows)
    return (x[:, :, :3] + 1 - x[:, :, 3:]).transpose(1, 2).contiguous()


def train_vdp(name, args, out):
    """What the package's Trainer does, without CUDA. Saved once a minute and at the end."""
    flags = SimpleNamespace(data=args.data, seed=args.seed, hold_out=0.05)
    stickers, order, _ = train.open_data(flags, rdtf.Config(), FRAMES)
    if stickers.meta["kind"] != "pixels":
        raise data.DataError(f"--data {args.data[0]}: holds latents; vdp works on pixels")
    model, path, budget, b = open_vdp(args), out / "last.pt", 60 * args.minutes, args.batch_size
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    step, spent = 0, 0.0
    if path.exists():
        saved = rdtf.read_weights(path)
        try:
            step, spent = saved["step"], saved["seconds"]
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise data.DataError(f"{path}: not of vdp with --vdp-dim {args.vdp_dim}; give the one it was "
                                 "made with, or another --out") from None
    began, kept = time.process_time(), spent
    while spent < budget:
        with bf16():
            loss = model(vdp_batch(stickers, order, range(step * b, (step + 1) * b), args.seed))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        spent, began = spent + time.process_time() - began, time.process_time()
        if spent >= budget or spent - kept >= min(60, budget / 4):
            print(f"vdp: {spent:.0f} of {budget:.0f} s, update {step}, loss {loss.item():.3f}", flush=True)
            train.save_checkpoint(path, {"step": step, "seconds": spent, "model": model.state_dict(),
                                         "optimizer": optimizer.state_dict()})
            kept, began = spent, time.process_time()                        # saving is not on the clock
    train.write_line(out / "measured.jsonl", {"seconds": spent, "step": step, "modes": {}})


def sample_vdp(args, out, captions):
    """-> clips (n, 8, h, w, 4), opaque. Ancestral steps on its own cosine schedule, estimates clipped to
    [-1, 1] as it does, but --vdp-steps of them, not its 1000, which would take hours."""
    model, clips = open_vdp(args).eval(), []
    model.load_state_dict(rdtf.read_weights(out / "last.pt")["model"])

    def denoise(y, t):                                                      # y b c t h w
        return model.predict_start_from_noise(y, t, model.denoise_fn(y, t)).clamp(-1, 1)
    its_own = mock.patch.object(rdtf, "alphas_cumprod", lambda: model.alphas_cumprod)
    with torch.no_grad(), bf16(), its_own:
        for i in range(len(captions)):
            g = torch.Generator().manual_seed(i)
            noise = partial(torch.randn, 1, 3, FRAMES, SIZE, SIZE, generator=g)
            y = rdtf.sample(denoise, noise(), args.vdp_steps, "ddim", 1.0, noise)[0]         # c t h w
            clips.append(torch.cat([(y + 1) / 2, torch.ones_like(y[:1])]).permute(1, 2, 3, 0))
    return (torch.stack(clips).clamp(0, 1) * 255).round().numpy() / np.float32(255)


# ------------------------------------------------------------------------------------------------------ both
def measure(name, args, out, stickers, plan):
    """KID, FVD and motion of --samples generated clips beside as many held-out stickers -> samples.png and
    generation.json; once for all that of the floor, real stickers of other concepts."""
    step, path = rdtf.read_weights(out / "last.pt")["step"], out / "generation.json"
    now, kept = dict(step=step, N=len(plan["items"])), quality.read_json(path) if path.exists() else {}
    if now.items() <= kept.items():
        return print(f"{out}: has its {args.minutes:g} minutes and is measured already")
    real, other = (quality.clips_of(stickers, plan[key]) for key in ("items", "others"))
    made = {out: (sample_vdp if name == "vdp" else sample_rdtf)(args, out, plan["captions"])}
    quality.save_sheet(out / "samples.png", real, quality.NONE, {name: made[out]})
    floor = out.parent / "floor"
    if not (floor / path.name).exists() or quality.read_json(floor / path.name)["N"] != now["N"]:
        made[floor] = other
    bench, wanted = quality.Bench(args.networks), {"i3d", "frames"}
    truth = bench.raw(real, quality.EVERY, plan["captions"], only=wanted)
    for folder, clips in made.items():
        found = quality.summarise(bench.raw(clips, quality.EVERY, plan["captions"], only=wanted), truth)
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_text(json.dumps(
            now | {"clips": step * args.batch_size, "measures": found}))


def run(name, args):
    """Train one peer in this process until its time is over, then measure it."""
    out = Path(args.out) / f"{name}-{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    stickers = data.open_stickers(args.measure, SIZE)               # first: are there enough held-out ones?
    plan = quality.make_plan(stickers, args.samples, 0)

    def over():
        return any(x["seconds"] >= 60 * args.minutes for x in train.read_lines(out / "measured.jsonl"))
    if not over():
        (train_vdp if name == "vdp" else train_rdtf)(name, args, out)
    if over():                                                      # else a signal stopped it
        measure(name, args, out, stickers, plan)


def table(args):
    """What was measured of each peer, last, and of what needs no training."""
    root, modes = Path(args.out), ladder.MODES
    found = {p.parent.name: train.read_lines(p) for p in sorted(root.glob("*/measured.jsonl"))}
    means = {name: lines[-1] for name, lines in found.items() if lines}
    made = {p.parent.name: quality.read_json(p) for p in sorted(root.glob("*/generation.json"))}
    if not means:
        raise data.DataError(f"{root}: nothing measured there yet; `peers.py run` first, or another folder")
    columns = [m for m in quality.TABLES if any(m in x["measures"] for x in made.values())]
    heads = ["peer", "CPU min", "updates", "clips", *(f"EV {m} | dB" for m in modes), *columns]
    lines = ["| " + " | ".join(heads) + " |", "|---" * (len(heads) + len(modes)) + "|"]

    def line(title, counts=("", "", ""), mean={}, name=""):
        cells = [f"{mean[m][key][0]:.{n}f}" if key in mean.get(m, {}) else ""
                 for m in modes for key, n in (("EV", 3), ("ours", 2))]
        cells += [quality.cell(m, made.get(name, {"measures": {}})["measures"].get(m)) for m in columns]
        lines.append("| " + " | ".join([title, *counts, *cells]) + " |")
    for name, x in means.items():
        counts = f"{x['seconds'] / 60:.1f}", str(x["step"]), str(made.get(name, {}).get("clips", ""))
        line(f"{name}: {PEERS.get(name.rsplit('-', 1)[0])}", counts, x["modes"], name)
    known = next((x["modes"] for x in means.values() if "copy" in x["modes"].get(modes[0], {})), {})
    for rival in ("copy", "blend", "bridge", "flow", "ceiling") if known else ():
        line(rival, mean={m: {"ours": row[rival]} for m, row in known.items() if rival in row})
    line("floor: other real stickers", name="floor")
    (root / "peers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main(arguments=None):
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("names", nargs="+", choices=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    p.add_argument("--minutes", type=float, default=60, help="process time of training")
    p.add_argument("--out", default="runs/peers", help="folder of all runs")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--data", nargs="+", default=train.BUILT_IN, help="as for train.py; pixels")
    p.add_argument("--vae", default=str(train.SHIPPED), help="ours: autoencoder, as for train.py")
    p.add_argument("--paper-vae", help="paper: file with an autoencoder of f = 8 and 16 channels")
    p.add_argument("--batch-size", type=int, default=8, help="clips per update, for all")
    p.add_argument("--vdp-dim", type=int, default=64, help="vdp: width of its first level")
    p.add_argument("--vdp-steps", type=int, default=50, help="vdp: sampling steps")
    p.add_argument("--measure", required=True, help="store of pixels, for held-out stickers")
    p.add_argument("--count", type=int, default=64, help="of them for EV and PSNR of the mean")
    p.add_argument("--samples", type=int, default=64, help="... and for generation")
    p.add_argument("--networks", default=features.NETWORKS, help="folder that features.py fetch filled")
    p.add_argument("--save-every", type=int, default=50, help="ours, paper: updates between checkpoints")
    p.set_defaults(marks=1)                                         # ladder.Clock: measured at the end only
    p = commands.add_parser("table")
    p.add_argument("out", help="folder of the runs")
    args = top.parse_args(arguments)
    ladder.command(args, arguments, __file__, run, table)


if __name__ == "__main__":
    main()
