"""Train RDTF: DFGN with dual masks and the curriculum, on stickers in an autoencoder's latents.

    python train.py                                       # built-in stickers, preset tiny, CPU or GPU
    torchrun --nproc_per_node 8 train.py --preset base --data cache/fluent cache/emoji:0.2 --out runs/mine
    python train.py --dry-run --preset base               # parameters, memory, time; nothing is written
    python train.py --stage vae --data cache/fluent       # the autoencoder only

The same command goes on where it was stopped, also after kill -9. Every draw of the main run is a pure
function of the seed, the global sample index and the saved losses. The global batch is --batch-size, which is
per process, times processes times --accumulation: where it stays the same, the number of processes does not
change the run. The autoencoder's training draws its noise per process, so there it does.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from curriculum import TASKS, Curriculum, make_masks
from data import (DataError, Stickers, draw_clip, encode_frames, join, make_meta, number, open_stickers,
                  save_sheet, to_straight, write_sticker)
from rdtf import (FORMAT, PRESETS, RDTF, AutoencoderKL, Config, FrozenText, Loaded, alphas_cumprod,
                  drop_words, guess_frames, has_bf16, load_model, load_vae, read_weights, sample_clips,
                  to_device)

HERE = Path(__file__).parent
SHIPPED = HERE / "weights" / "stickers-64.pt"
LOG_SNR = torch.logit(alphas_cumprod()).numpy()                             # of a noise step, falling
BUILT_IN = [str(HERE / "stickers" / name) for name in ("characters", "fluent:0.2")]
SMALL = dict(optimizer="muon", lr=0.01, weight_decay=0.5, schedule="cosine", noise_levels="normal", full=0.7,
             word_drop=0.1, tasks="t2v,t2v,t2v,i2v,it2v,predict_pre,predict_post,interpolate")
RECIPES = {  # what the flags of a preset default to
    "tiny": dict(SMALL, steps=500, batch_size=8, ema=0.998, warmup=50, vae_steps=600, vae_batch_size=16),
    "base": dict(SMALL, steps=100_000, batch_size=16, ema=0.9999, warmup=1000, vae_steps=20_000,
                 vae_batch_size=32),
    # Table 6: 50 K updates, 16 GPUs x batch 1 x accumulation 6, lr 1e-5; Stable Diffusion's autoencoder
    "paper": dict(steps=50_000, batch_size=1, accumulation=6, optimizer="adamw", lr=1e-5, weight_decay=0.01,
                  ema=0.9999, warmup=0, schedule="constant", noise_levels="uniform", full=0.0, vae_steps=0,
                  vae_batch_size=8),
}


def parser():
    p = argparse.ArgumentParser(description=f"{__doc__.splitlines()[0]} None: the preset's recipe decides.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"train.py: {message}\n")
    a, some, count, rate = p.add_argument, number(int, 1), number(int, 0), number(float, 0)
    share, half = number(float, 0, 1), number(float, 0, 0.5)
    a("--data", nargs="+", default=BUILT_IN, metavar="SET[:SHARE]",
      help="folders, prepared stores, synthetic[:COUNT]; with their shares of the samples, else by size")
    a("--hold-out", type=half, default=0.05,
      help="share of a folder of 40 stickers or more that is not trained on, where it names no split itself")
    a("--out", default="", help="run folder; empty: runs/PRESET")
    a("--preset", default="tiny", choices=list(PRESETS), help="size of everything")
    a("--stage", default="auto", choices=["auto", "vae"], help="vae: the autoencoder only")
    a("--vae", default="", help="vae.pt, a checkpoint, or Stable Diffusion's weights; train: train one; "
                                "empty: that of --init, else the shipped one for tiny and base")
    a("--init", default="", metavar="FILE", help="checkpoint whose weights and autoencoder it starts from")
    a("--text-encoder", nargs="+", default=[], metavar="FOLDER",
      help="one or two local Hugging Face text encoders; none: byte transformer")
    a("--temporal", default="sti", choices=["sti", "conv3d"], help="what mixes frames (Table 3)")
    a("--steps", type=some, help="updates of the weights")
    a("--batch-size", type=some, help="clips per process and micro-step")
    a("--accumulation", type=some, help="micro-steps per update")
    a("--optimizer", choices=["adamw", "muon"], help="muon: for matrices, with AdamW for the rest")
    a("--lr", type=rate, help="peak learning rate; with muon AdamW has a tenth of it")
    a("--schedule", choices=["constant", "cosine"], help="of the learning rate, after warm-up")
    a("--warmup", type=count, help="updates of linear warm-up, 0 = none")
    a("--weight-decay", type=rate, help="decoupled; with muon of its matrices only")
    a("--grad-clip", type=rate, default=1.0, help="largest gradient norm, 0 = no clipping")
    a("--ema", type=share, help="decay of the averaged weights, 0 = none")
    a("--vae-steps", type=count, help="updates of the autoencoder")
    a("--vae-batch-size", type=some, help="pictures per process and update")
    a("--vae-lr", type=rate, default=0.02, help="peak learning rate of the autoencoder (Muon)")
    a("--vae-kl", type=rate, default=1e-4, help="weight of the KL term")
    a("--curriculum", default="adaptive", choices=["none", "linear", "adaptive"], help="Table 4: -, LCL, DCL")
    a("--tasks", help="comma-separated; one that is named twice weighs twice")
    a("--full", type=share, help="share of the clips that have all F frames, where they can")
    a("--min-frames", type=some, default=1, help="leave out stickers with fewer different frames")
    a("--drop", type=half, default=0.05, help="probability of dropping text and image, and of text alone")
    a("--word-drop", type=share, help="probability that a word of the caption becomes # (release: 0.2)")
    a("--noise-levels", choices=["uniform", "normal"], help="noise steps: uniform (paper), or normal log-SNR")
    a("--seed", type=count, default=0, help="of weights and every draw")
    a("--device", default="auto", help="auto, cpu, cuda or mps")
    a("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 where it is fast")
    a("--compile", action="store_true", help="torch.compile the network")
    a("--checkpointing", action="store_true", help="recompute layers in the backward: less memory, slower")
    a("--save-every", type=count, default=200, help="updates between checkpoints, 0 = only at the end")
    a("--keep-every", type=count, default=0, help="updates between numbered checkpoints, 0 = none")
    a("--sample-every", type=count, default=0, help="updates between sample sheets, 0 = only at the end")
    a("--eval-every", type=count, default=100, help="updates between held-out losses, 0 = only at the end")
    a("--log-every", type=some, default=10, help="updates between lines of log.jsonl")
    a("--patience", type=some, default=20, help="stop after this many non-finite losses in a row")
    a("--max-updates", type=count, default=0, help="save and stop after this many updates, 0 = no limit")
    a("--export", default="", metavar="FILE", help="write OUT's averaged weights in half precision and stop")
    a("--dry-run", action="store_true", help="print parameters, memory and the time of an update")
    return p


# ------------------------------------------------------------------------------------------------------------
# Where we run


class Context:
    """Device, ranks and precision. LOCAL_RANK picks the device, RANK the share of the work."""

    def __init__(self, args):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, local, kind = self.rank == 0, int(os.environ.get("LOCAL_RANK", 0)), args.device
        self.quiet = None if self.main else True                            # None: quiet unless in a terminal
        if kind == "auto":
            mps = torch.backends.mps.is_available()
            kind = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        try:
            self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise DataError(f"--device {args.device}: not usable here ({first_line(e)}); try --device cpu")
        if kind == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1 and not dist.is_initialized():
            # the others wait while the main process evaluates, samples and saves
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=1))
        self.bf16 = args.precision == "bf16" or args.precision == "auto" and has_bf16(self.device)
        self.ahead = kind == "cuda"                                         # batches are made while it works

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def sum(self, x):
        if self.world > 1:
            dist.all_reduce(x)

    def agree(self, value, what):
        """DataError unless all processes hold the same integer. Also a barrier."""
        total = torch.tensor([value, value ** 2], device=self.device)
        self.sum(total)
        if total.tolist() != [self.world * value, self.world * value ** 2]:
            raise DataError(f"{what}: processes see different files; all machines must share it")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


STOP = {"since": 0.0}                                                       # when the first signal came


def on_signal(number, frame):
    """SIGTERM, Ctrl-C: stop after this update. torchrun repeats a Ctrl-C: a quick second one is ignored."""
    now = time.monotonic()
    if not STOP["since"]:
        STOP["since"] = now
        # not print, which may have been interrupted and cannot be entered twice
        os.write(2, b"\nstopping after this update; Ctrl-C once more to stop at once\n")
    elif number == signal.SIGINT and now - STOP["since"] > 2:
        raise KeyboardInterrupt


@contextmanager
def stop_on_signals():
    """Within (or: in the decorated function) signals set STOP; elsewhere they end the process as usual."""
    STOP["since"] = 0.0
    old = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# ------------------------------------------------------------------------------------------------------------
# Samples: all about sample g of the run follows from (seed, g)


@lru_cache(maxsize=16)
def permutation(*seed, count):
    return np.random.default_rng(seed).permutation(count)


class Order:
    """Global sample index g -> a sticker: each set has its share of every 1000 samples and goes through its
    stickers once per epoch, in an order of its own each time."""

    def __init__(self, groups, shares, seed):
        """groups: an array of stickers per set; shares: of the samples, which sum to 1."""
        self.groups, self.seed = groups, seed
        self.counts = np.diff(np.round(1000 * np.cumsum([0, *shares])).astype(int))
        for s in np.flatnonzero(self.counts == 0):                          # a small set beside a huge one
            self.counts[[s, self.counts.argmax()]] += [1, -1]
        self.plan = np.repeat(np.arange(len(groups)), self.counts)[permutation(seed, 0, count=1000)]
        self.rank = np.zeros(1000, int)
        for s, n in enumerate(self.counts):
            self.rank[self.plan == s] = np.arange(n)

    def __getitem__(self, g):
        turn, place = divmod(g, 1000)
        s = int(self.plan[place])
        epoch, k = divmod(int(turn * self.counts[s] + self.rank[place]), len(self.groups[s]))
        return int(self.groups[s][permutation(self.seed, 1, s, epoch, count=len(self.groups[s]))[k]])


def draw_row(stickers, order, g, args):
    """Sample g -> (clip (F, c, h, w) fp32, n real frames, caption, g)."""
    item, rng = order[g], np.random.default_rng([args.seed, 2, g])
    clip, n = draw_clip(stickers, item, rng, args.full, args.min_frames)
    return torch.from_numpy(clip), n, stickers.caption(item, rng), g


def draw_picture(stickers, order, g, args):
    """Sample g -> picture (4, size, size) premultiplied in [0, 1], mirrored half the time."""
    frames, rng = stickers.frames(order[g]), np.random.default_rng([args.seed, 4, g])
    x = torch.from_numpy(np.array(frames[int(rng.integers(len(frames)))])).float() / 255
    return x.flip(-1) if rng.random() < 0.5 else x


def indices(micro, batch, ctx):
    """The global samples of this process in a micro-step, counted from the start of the run."""
    first = (micro * ctx.world + ctx.rank) * batch
    return range(first, first + batch)


def noise_step(kind, generation, g, rng):
    """The noise step 0..999 of sample g. Neighbouring samples are spread evenly over the distribution.
    uniform: the paper's. normal: log-SNR ~ N(-0.6, 2), but 30 % of what is made from text alone is in the
    noisiest fifth, where the caption decides (ours)."""
    u = (g * 0.6180339887498949 + 0.5) % 1                           # golden-section sequence
    late = rng.random() < 0.3 and generation
    if kind == "uniform":
        return int(1000 * u)
    if late:
        return 800 + int(200 * u)
    wanted = -0.6 + 2 * NormalDist().inv_cdf(min(max(u, 1e-9), 1 - 1e-9))
    return int(np.clip(np.searchsorted(-LOG_SNR, -wanted), 0, 999))


def make_batch(rows, text, curriculum, weights, args, task=None):
    """list of `draw_row`s -> (kwargs of RDTF.forward, list of tasks).
    Task, masks, dropping, noise and its step of each clip are drawn here, from (seed, g) alone. Text and
    given frames are dropped here and nowhere else (release: text of i2v; the rest is ours: two-scale guidance
    needs (no text, no image) and (no text, image) to be trained). task: take this one."""
    tasks, texts, cond, real, steps = [], [], [], [], []
    noise = np.empty((len(rows), *rows[0][0].shape), np.float32)
    for (clip, n, caption, g), mine in zip(rows, noise):
        rng = np.random.default_rng([args.seed, 3, g])
        drawn = curriculum.draw(weights, n, rng)
        tasks.append(task or drawn)
        given, frames = make_masks(tasks[-1], n, len(clip), rng=rng)
        caption, u = drop_words(caption, rng, args.word_drop), rng.random()
        texts.append(caption if TASKS[tasks[-1]].text and u >= 2 * args.drop else "")
        cond.append(given & (u >= args.drop))
        real.append(frames)
        steps.append(noise_step(args.noise_levels, not given.any(), g, rng))
        rng.standard_normal(out=mine, dtype=np.float32)
    cond, real = (torch.from_numpy(np.stack(x)) for x in (cond, real))
    return dict(x0=torch.stack([row[0] for row in rows]), noise=torch.from_numpy(noise),
                t=torch.tensor(steps), text=text.tokenize(texts), cond_mask=cond, frame_mask=real), tasks


def prepare(step, model, stickers, order, curriculum, groups, args, ctx):
    """All that the host does for an update -> (weights of the tasks, batches of its micro-steps, seconds).
    A batch also has `table`: what each clip counts in each of the log's groups."""
    weights, batches, began = curriculum.weights(step), [], time.perf_counter()
    for micro in range(args.accumulation):
        now = indices(step * args.accumulation + micro, args.batch_size, ctx)
        rows = [draw_row(stickers, order, g, args) for g in now]
        batch, drawn = make_batch(rows, model.text, curriculum, weights, args)
        real, cond, table = batch["frame_mask"], batch["cond_mask"], torch.zeros(len(rows), len(groups))
        counts = (real & ~cond if model.cfg.clean else real).float().mean(1)
        for row, task, t, share in zip(table, drawn, batch["t"].tolist(), counts):
            row[groups.index(task)] = row[t // 250 - 4] = share
        batch["table"] = table
        if ctx.device.type == "cuda":                                       # else its copy could wait
            batch = {k: x.pin_memory() for k, x in batch.items()}
        batches.append(batch)
    return weights, batches, time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------------
# Optimizers. Learning rate and averaging are pure functions of the step.


def orthogonal(m, steps=5):
    """(n, rows, columns) -> about the nearest matrices with orthonormal rows or columns.
    Newton-Schulz with the quintic coefficients of Muon (Jordan et al. 2024), in bf16."""
    tall = m.shape[1] > m.shape[2]
    x = m.bfloat16().mT if tall else m.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices and convolutions seen as (out, rest).
    Every update has the same size, so weights grow until the decay balances it. With a decay of 0.01 spectral
    norms reached 8 and the gradients exploded after 1,400 updates (benchmarks/README.md); 0.5 keeps them low.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.5):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, beta, shapes = group["lr"], group["momentum"], {}
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                shapes.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), params in shapes.items():                  # few kernels: those of one shape
                grads, m = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(m, grads, 1 - beta)
                u = orthogonal(torch.stack([x.flatten(1) for x in torch._foreach_lerp(grads, m, beta)]))
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, [x.view_as(p) for p, x in zip(params, u)],
                                    alpha=-lr * max(1.0, rows / columns) ** 0.5)


def make_optimizers(module, kind, weight_decay):
    """-> list of optimizers, their shares of the learning rate.
    With muon AdamW trains what is no hidden matrix: norms, biases, embeddings, the entrance and the exit, and
    STI's small parts, at a tenth of the rate and without decay."""
    params = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    fused = params[0][1].device.type != "mps"
    adamw = dict(lr=0.0, betas=(0.9, 0.999), fused=fused)
    if kind == "adamw":
        return [torch.optim.AdamW([p for _, p in params], weight_decay=weight_decay, **adamw)], [1.0]
    ends = ("conv_in.", "conv_out.", "embed.", "words.", "position", "number", ".detail.")
    hidden = [n for n, p in params if p.ndim > 1 and not any(x in "." + n for x in ends)]
    rest = [p for n, p in params if n not in hidden]
    return [Muon([p for n, p in params if n in hidden], 0.0, weight_decay=weight_decay),
            torch.optim.AdamW(rest, weight_decay=0.0, **adamw)], [1.0, 0.1]


def learning_rate(step, peak, warmup, schedule, steps):
    """At an update (from 0): linear warm-up, then constant (paper) or half a cosine to peak / 20 (ours)."""
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if schedule == "constant":
        return peak * ramp
    return peak * ramp * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(steps, 1)))))


def update_weights(optimizers, shares, lr, params, ema, decay, step, grad_clip):
    """Clip, step, average -> gradient norm. A broken gradient counts as zero. The average is short at first,
    so that it forgets the random start (ours)."""
    norm = nn.utils.clip_grad_norm_(params.values(), grad_clip or math.inf)
    for p in (p for p in params.values() if p.grad is not None):
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    for optimizer, share in zip(optimizers, shares):
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if ema:
        torch._foreach_lerp_(list(ema.values()), [params[n].detach().float() for n in ema],
                             1 - min(decay, (1 + step) / (10 + step)))
    return norm


def watch(loss, bad, step, path, args):
    """-> how many losses in a row were not finite; DataError if there were too many."""
    bad = 0 if math.isfinite(loss) else bad + 1
    if bad >= args.patience:
        raise DataError(f"the loss was not finite for the last {bad} updates, up to {step}; {path} was not "
                        f"touched since. Lower --lr, raise --warmup or try --precision fp32")
    return bad


@contextmanager
def averaged(module, ema, compiled):
    """Within: averaged weights, eval mode, not compiled, since batches have other sizes. After: as before."""
    params, was = dict(module.named_parameters()), module.training
    kept = {n: params[n].detach().clone() for n in ema}
    try:
        for n, value in ema.items():
            params[n].data.copy_(value)
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield module.eval()
    finally:
        for n, value in kept.items():
            params[n].data.copy_(value)
        module.train(was)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: plain dicts of tensors, numbers and strings


def save_checkpoint(path, data):
    """Write beside, fsync, rename: whatever happens, `path` is a whole checkpoint, the old or the new one."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as f:
            torch.save(data, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:                                    # torch: a full disk, RuntimeError
        partial.unlink(missing_ok=True)
        cause = e if isinstance(e, OSError) else e.__context__ or e
        raise DataError(f"{path}: cannot be written ({first_line(cause)}); the checkpoint before is intact. "
                        f"Make room on the disk and run the same command again")


def load_checkpoint(path, stage, config=None):
    """-> dict. DataError unless it is of this stage and configuration; how it samples may differ."""
    try:
        data = read_weights(path)
        assert data["format"] == FORMAT and data["stage"] == stage
        old = asdict(Config(**data["config"]))
    except Exception as e:                                                  # broken files raise anything
        raise DataError(f"{path}: no {stage} checkpoint of this version ({type(e).__name__}); move it away "
                        "or choose another --out")
    for key, value in (config or {}).items():
        wanted = stage == "main" or key.startswith("vae_") or key in ("size", "latent_channels")
        if wanted and key not in ("sampler", "steps", "text_scale", "image_scale") and old[key] != value:
            raise DataError(f"{path}: made with {key} = {old[key]}, this run has {value}; choose another "
                            "--out, or the --preset and flags it was made with")
    return data


def state_of(step, module, optimizers, ema):
    return {"step": step, "model": module.state_dict(), "ema": ema,
            "optimizers": [o.state_dict() for o in optimizers]}


def restore(saved, path, module, optimizers, device):
    """The state in a checkpoint -> in place; returns (averaged weights, updates done)."""
    try:
        module.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return {n: x.to(device) for n, x in saved["ema"].items()}, saved["step"]
    except (KeyError, ValueError, RuntimeError, TypeError) as e:
        raise DataError(f"{path}: does not fit this run ({first_line(e)}); choose another --out, or the "
                        "flags it was made with")


def write_line(path, line):
    """Append a line to log.jsonl; what is not finite becomes null, which every JSON reader takes."""
    def clean(x):
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x
    with open(path, "a") as f:
        f.write(json.dumps(clean(line)) + "\n")


def read_log(path):
    """log.jsonl -> {(stage, step): line}. A resumed run appends: of lines with one step the last one counts.
    Half-written lines are left out."""
    lines = {}
    for text in Path(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines[line["stage"], line["step"]] = line
        except (ValueError, KeyError, TypeError):
            pass
    return lines


# ------------------------------------------------------------------------------------------------------------
# The autoencoder


def picture_loss(y, x):
    """L1 + squared error + L1 of the gradients at three scales, of premultiplied RGBA and of RGB on white.
    (Ours.) A sticker is always seen on some background: black is premultiplied RGB itself, white the other
    extreme. y, x: (n, 4, h, w) -> (n,)."""
    e = torch.cat([y - x, (y[:, :3] - y[:, 3:]) - (x[:, :3] - x[:, 3:])], 1)
    loss = (e.abs() + 4 * e ** 2).flatten(1).mean(1)
    for _ in range(3):
        across, down = e[..., 1:] - e[..., :-1], e[..., 1:, :] - e[..., :-1, :]
        loss = loss + 0.5 * (across.abs().flatten(1).mean(1) + down.abs().flatten(1).mean(1))
        e = F.avg_pool2d(e, 2)
    return loss


def transform(z, x, f, choice, share):
    """The same change of raw latents z and pictures x, f pixels per latent (EQ-VAE, arXiv 2502.09509).
    choice 0..5: mirrored, upside down, two quarter turns, smaller (share in [0, 1]: 0.6 to 1), moved by half
    a latent. What decodes right after it has a spatial order that convolutions can use."""
    if choice < 2:
        return z.flip(choice - 2), x.flip(choice - 2)
    if choice < 4:
        return z.rot90(2 * choice - 5, (2, 3)), x.rot90(2 * choice - 5, (2, 3))
    if choice == 4:
        edge = max(2, round(z.shape[-1] * (0.6 + 0.4 * share)))
        resize = dict(mode="bilinear", antialias=True)
        return F.interpolate(z, edge, **resize), F.interpolate(x, f * edge, **resize)
    return (z + z.roll(1, 3)) / 2, x.roll(f // 2, 3)


def vae_losses(vae, x, noise, kl_weight, choice, share, finish):
    """Pictures (n, 4, h, w) -> losses (n,) of one update (ours).
    noise (n, c, h/f, w/f) serves twice: the posterior's sample, and extra noise of up to 0.3 standard
    deviations, since a network's latents are never exact. The first half of the batch is compared after a
    `transform`. finish = True trains the decoder alone, on clean latents: the last part of a run."""
    if finish:
        with torch.no_grad():
            mean = vae.moments(x)[0]
        return picture_loss(vae.decode_raw(mean), x)
    mean, logvar = vae.moments(x)
    strength = torch.linspace(0, 1, len(x)).to(x)[:, None, None, None]
    extra = 0.3 * mean.detach().std((0, 2, 3), keepdim=True) * strength
    z, half = mean + noise * (logvar.exp() + extra ** 2).sqrt(), len(x) // 2
    moved, wanted = transform(z[:half], x[:half], vae.f, choice, share)
    pairs = [(moved, wanted), (z[half:], x[half:])][half == 0:]
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar)
    losses = torch.cat([picture_loss(vae.decode_raw(a), b) for a, b in pairs])
    return losses + kl_weight * kl.flatten(1).mean(1)


@stop_on_signals()
def train_vae(cfg, stickers, order, args, ctx, out):
    """-> AutoencoderKL with averaged weights and measured statistics, or None if it was stopped."""
    path, steps, batch = out / "vae.pt", args.vae_steps, args.vae_batch_size
    torch.manual_seed(args.seed)
    module = nn.ModuleDict({"vae": AutoencoderKL(cfg)}).to(ctx.device)
    vae, params = module["vae"], dict(module.named_parameters())
    optimizers, shares = make_optimizers(module, "muon", 0.01)   # no attention: small decay will do
    ema, start, bad = {n: p.detach().float().clone() for n, p in params.items()}, 0, 0
    if path.exists():
        saved = load_checkpoint(path, "vae", asdict(cfg))
        if "vae" in saved and saved["step"] >= steps:
            return load_vae(path).to(ctx.device)
        ema, start = restore(saved, path, module, optimizers, ctx.device)
        del saved
    ctx.agree(start, f"--out {out}")

    def save(step, **more):
        if ctx.main and not bad:
            save_checkpoint(path, {"format": FORMAT, "stage": "vae", "config": asdict(cfg), **more,
                                   **state_of(step, module, optimizers, ema)})

    for step in tqdm(range(start, steps), "autoencoder", steps, initial=start, disable=ctx.quiet):
        x = [draw_picture(stickers, order, g, args) for g in indices(step, batch, ctx)]
        rng = np.random.default_rng([args.seed, 5, step])
        choice, share = int(rng.integers(6)), rng.random()                  # the same in all processes
        noise = np.random.default_rng([args.seed, 6, step, ctx.rank])
        noise = noise.standard_normal((batch, *cfg.latent_shape[1:]), np.float32)
        x, noise = torch.stack(x).to(ctx.device), torch.from_numpy(noise).to(ctx.device)
        with ctx.autocast():
            loss = vae_losses(vae, x, noise, args.vae_kl, choice, share, step >= 0.85 * steps).mean()
        loss.backward()
        for p in (p for p in params.values() if p.grad is not None):        # not DDP: the encoder may rest
            ctx.sum(p.grad.div_(ctx.world))
        lr = learning_rate(step, args.vae_lr, min(50, steps), "cosine", steps)
        norm = update_weights(optimizers, shares, lr, params, ema, 0.999, step, args.grad_clip)
        stats = torch.tensor([0.0, STOP["since"] > 0], device=ctx.device)
        stats[0] = loss.detach() / ctx.world
        ctx.sum(stats)
        loss, stop = stats.tolist()
        bad = watch(loss, bad, step + 1, path, args)
        if ctx.main and (step + 1) % args.log_every == 0:
            write_line(out / "log.jsonl", {"step": step + 1, "stage": "vae", "loss": loss, "lr": lr,
                                           "grad_norm": float(norm)})
        if args.save_every and (step + 1) % args.save_every == 0 or stop or step + 1 == steps:
            save(step + 1)
        if stop:
            return None
    vae.load_state_dict({**vae.state_dict(), **{n.removeprefix("vae."): x for n, x in ema.items()}})
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        sample = torch.stack([draw_picture(stickers, order, g, args) for g in range(1024)]).to(ctx.device)
        vae.set_statistics(torch.cat([vae.moments(x)[0] for x in sample.split(64)]))
    save(steps, vae={k: v.cpu() for k, v in vae.state_dict().items()})
    return vae


def encode(stickers, vae, ctx):
    """Pixels -> latents in memory. Each process encodes every world-th batch: the same ones however many."""
    if ctx.world == 1 or stickers.meta["kind"] == "latents":
        return stickers.encode(vae)
    batches = [shard[i:i + 32] for shard in stickers.shards for i in range(0, len(shard), 32)]
    mine = tqdm(batches[ctx.rank::ctx.world], "encoding", unit="batch", disable=ctx.quiet)
    parts = [None] * ctx.world
    dist.all_gather_object(parts, [encode_frames(vae, x) for x in mine])
    made = (parts[i % ctx.world][i // ctx.world] for i in range(len(batches)))
    latents = [np.concatenate([next(made) for _ in range(0, len(x), 32)]) for x in stickers.shards]
    meta = make_meta(stickers.size, stickers.meta["frames"], vae)
    return Stickers(latents, stickers.index, stickers.text, meta)


# ------------------------------------------------------------------------------------------------------------
# What the run shows of itself


def validation_rows(stickers, items, tasks, args, count=48):
    """Fixed clips of held-out stickers: every task sees the same ones -> list of (task, list of rows)."""
    moving = [i for i in items if stickers.index["count"][i] > 1] or list(items)
    rows = []
    for j in range(max(1, count // len(tasks))):
        item = moving[j * len(moving) // max(1, count // len(tasks)) % len(moving)]
        clip, n = draw_clip(stickers, item, np.random.default_rng([1234, j]), full=1.0)
        rows.append((torch.from_numpy(clip), n, stickers.caption(item), j))
    return [(t, [row for row in rows if TASKS[t].given(row[1])]) for t in tasks]


@torch.no_grad()
def validate(model, fixed, ctx):
    """-> {"loss": of all, task: loss per frame that counts, "ev": {task: EV of `RDTF.mean`}}."""
    args = argparse.Namespace(seed=1234, drop=0.0, word_drop=0.0, noise_levels="uniform")
    any_task, losses, ev = Curriculum("none", 1), {}, {}
    for task, rows in fixed:
        sums = torch.zeros(4)                                               # loss, frames, two errors
        for part in (rows[i:i + 8] for i in range(0, len(rows), 8)):
            kwargs = make_batch(part, model.text, any_task, any_task.weights(0), args, task)[0]
            x0, noise, t, text, cond, real = to_device(kwargs, ctx.device).values()
            with ctx.autocast():
                loss, mean = model(x0, noise, t, text, cond, real), model.mean(x0, noise, text, cond, real)
            made = real & ~cond
            errors = [((y - x0) ** 2)[made].sum() for y in (mean, guess_frames(x0, cond)[0])]
            counts = made if model.cfg.clean else real
            sums += torch.stack([loss.sum(), counts.float().mean(1).sum(), *errors]).float().cpu()
        if sums[1] > 0:
            losses[task] = float(sums[0] / sums[1])
        if sums[3] > 0 and any(TASKS[task].given(rows[0][1])):
            ev[task] = 1 - float(sums[2] / sums[3])
    return {"loss": sum(losses.values()) / max(1, len(losses)), **losses, "ev": ev}


@torch.no_grad()
def sample_sheet(loaded, stickers, items, tasks, out, name, stickers_too=False):
    """samples.png and, moving, samples.webp: the first held-out stickers as they are stored, then what the
    network makes of them in each trained task."""
    moving = [i for i in items if stickers.index["count"][i] > 1][:3] or list(items[:1])
    labels, grid, names, device = [], [], [], loaded.vae.mean.device
    for j, item in enumerate(moving):
        z, n = draw_clip(stickers, item, np.random.default_rng([7, int(item)]), full=1.0)
        truth, caption = loaded.vae.decode(torch.from_numpy(z).to(device)), stickers.caption(item)
        grid.append([to_straight(truth[:n])])
        names.append(caption)
        labels.append(f"truth: {caption}")
        for task in (t for t in tasks if TASKS[t].given(n)):
            cond, real = make_masks(task, n, len(z), choice=0)
            text = caption * TASKS[task].text
            clip = sample_clips(loaded, [text], truth[None], cond[None], real[None], seeds=[j])
            grid[-1].append(to_straight(clip[0, :n]))
            labels.append(task)
            if stickers_too and j == 0:
                write_sticker(out / f"{task}.webp", grid[-1][-1], 125)
    save_sheet(out / f"{name}.png", [clip for row in grid for clip in row], labels)
    save_sheet(out / f"{name}.webp", grid, names)


def plot_log(log, png):
    """Held-out loss per frame that counts (left; grey: training) and EV of the mean (right), over updates."""
    lines, wheel = list(read_log(log).values()), ("red", "orange", "brown", "blue", "deepskyblue", "green")
    held = [x for x in lines if x["stage"] == "eval"]
    losses = {"training": [(x["step"], x["loss"]) for x in lines if x["stage"] == "main"],
              **{t: [(x["step"], x.get(t)) for x in held] for t in TASKS}}
    ev = {"": [], **{t: [(x["step"], x["ev"].get(t)) for x in held] for t in TASKS}}
    image = Image.new("RGB", (1120, 420), "white")
    draw = ImageDraw.Draw(image)
    for left, title, series in ((50, "loss", losses), (610, "EV of the one-step mean, 0: the blend", ev)):
        series = {name: [p for p in points if p[1] is not None] for name, points in series.items()}
        xs, ys = zip(*[p for points in series.values() for p in points] or [(1, 0.0)])
        low, high, right = max(min(ys), -0.2), float(np.quantile(ys, 0.97)) + 1e-3, max(xs)
        draw.rectangle((left, 50, left + 460, 370), outline="#444444")
        draw.text((left, 30), f"{title}: {low:.3f} to {high:.3f} over {right} updates", "#444444")
        for i, (name, points) in enumerate(series.items()):
            colour = wheel[i % 6 - 1] if i else "#999999"
            points = [(left + 460 * x / right, 370 - 320 * float(np.clip((y - low) / (high - low), 0, 1)))
                      for x, y in points]
            draw.line(points, colour, 2 if i else 1)
            draw.text((left + 370, 56 + 13 * i), name * bool(points), colour)
    image.save(png)


def print_parts(model, vae):
    parts = {**dict(model.net.named_children()), "DFGN": model.net, "text": model.text, "autoencoder": vae}
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}
    print("parameters: " + ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items() if size > 0.001))


# ------------------------------------------------------------------------------------------------------------
# The run


@stop_on_signals()
def train(cfg, vae, stickers, order, shown, args, ctx, out):
    """The main run, read top to bottom -> finished? Leaves last.pt, log.jsonl, and at the end samples.png,
    samples.webp, one sticker per task and loss.png."""
    torch.manual_seed(args.seed)
    model = RDTF(cfg, args.text_encoder)
    path, log, device = out / "last.pt", out / "log.jsonl", ctx.device
    if args.init and not path.exists():                                     # else the run goes on from there
        given = load_model(args.init)
        load_checkpoint(args.init, "main", asdict(cfg))
        if given.vae.fingerprint() != vae.fingerprint():
            raise DataError(f"--init {args.init}: was trained with another autoencoder; leave --vae out")
        model.load_state_dict(given.model.state_dict())
        del given
    model.to(device).train()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizers, shares = make_optimizers(model, args.optimizer, args.weight_decay)
    curriculum = Curriculum(args.curriculum, args.steps, args.tasks.split(","), made=cfg.clean)
    tasks = list(curriculum.tasks)
    static = {"format": FORMAT, "stage": "main", "config": asdict(cfg), "args": vars(args),
              "fingerprint": stickers.meta["fingerprint"], "text_encoder": getattr(model.text, "paths", []),
              "vae": {k: v.cpu() for k, v in vae.state_dict().items()}, "vae_id": vae.fingerprint()}
    ema, start, groups, ready = {}, 0, tasks + ["q1", "q2", "q3", "q4"], None
    drawn_from = model, stickers, order, curriculum, groups, args, ctx
    if path.exists() and not args.dry_run:
        saved = load_checkpoint(path, "main", static["config"])
        if saved["vae_id"] != static["vae_id"]:
            raise DataError(f"{path}: made with another autoencoder; name that with --vae, or another --out")
        if saved["fingerprint"] != static["fingerprint"] and ctx.main:
            print(f"note: the data changed since {path} was written; the run goes on with what is there now")
        ema, start = restore(saved, path, model, optimizers, device)
        if ctx.ahead:                                                       # as below: without the last loss
            curriculum.load_state_dict({k: v[:-1] for k, v in saved["curriculum"].items()})
            ready = prepare(start, *drawn_from)
        curriculum.load_state_dict(saved["curriculum"])
        del saved                                                           # a second copy of everything
    # averaged weights begin as the weights that were loaded, where the checkpoint has none
    ema = {n: ema.get(n, p.detach().float().clone()) for n, p in params.items()} if args.ema else {}
    for group in optimizers[0].param_groups:                                # flags count, not checkpoints
        group["weight_decay"] = args.weight_decay
    ctx.agree(start, f"--out {out}")
    if ctx.main:
        print_parts(model, vae)

    model.net.checkpointing = args.checkpointing
    if args.compile:                                                        # in place: names of weights stay
        model.net.compile()
    net = DDP(model, device_ids=[device.index] if device.type == "cuda" else None) if ctx.world > 1 else model
    loaded, fixed = Loaded(model, vae, cfg, {}), validation_rows(stickers, shown, tasks, args)
    global_batch = args.batch_size * args.accumulation * ctx.world
    sums, bad, clock, data_time, done = torch.zeros(2 + 2 * len(groups)), 0, 0.0, 0.0, 0

    def save(step, file):
        if ctx.main and not bad:
            save_checkpoint(file, {**static, **state_of(step, model, optimizers, ema),
                                   "curriculum": curriculum.state_dict()})

    steps = 4 if args.dry_run else args.steps
    bar = tqdm(total=steps, initial=start, desc="training", disable=ctx.quiet, dynamic_ncols=True)
    for step in range(start, steps):
        # ------------------------------------------------------------------------------------ one update
        began = time.perf_counter()
        weights, batches, seconds = ready or prepare(step, *drawn_from)
        data_time += seconds
        stats = torch.zeros(3 + 2 * len(groups), device=device)             # loss, norm, groups, stop
        for micro, batch in enumerate(batches, 1):
            kwargs = to_device(batch, device)
            table = kwargs.pop("table")
            with nullcontext() if micro == len(batches) or ctx.world == 1 else net.no_sync():
                with ctx.autocast():
                    losses = net(**kwargs)                                  # (b,)
                # DDP averages gradients over ranks, the loss is a sum over the global batch: undo the average
                (losses.sum() * (ctx.world / global_batch)).backward()
            losses = losses.detach().float()
            stats[0] += losses.sum() / global_batch
            stats[2:-1] += torch.cat([torch.where(table > 0, losses[:, None], 0).sum(0), table.sum(0)])
        lr = learning_rate(step, args.lr, args.warmup, args.schedule, args.steps)
        norm = update_weights(optimizers, shares, lr, params, ema, args.ema, step, args.grad_clip)
        stats[-1] = float(STOP["since"] > 0)
        ctx.sum(stats)                                                      # each rank has a part of the mean
        stats[1] = norm
        # the tasks of the next batch do not know the loss of this one yet, if the GPU works meanwhile
        ready = prepare(step + 1, *drawn_from) if ctx.ahead and step + 1 < steps else None
        *values, stop = stats.tolist()                                      # the only wait for the device
        curriculum.record(values[0])
        bad = watch(values[0], bad, step + 1, path, args)
        # -------------------------------------------------------------------------------------------- log
        clock, done, now = clock + time.perf_counter() - began, done + 1, step + 1
        sums += torch.tensor(values)
        bar.update(1)
        if args.dry_run:
            if step == 0:                                                   # the first update warms up
                clock, done = 0.0, 0
            continue
        if ctx.main and (now % args.log_every == 0 or now == steps):
            means, k, rate = (sums / done).tolist(), len(groups), done * global_batch / clock
            write_line(log, {
                "step": now, "stage": "main", "loss": means[0], "grad_norm": means[1], "lr": lr,
                "groups": {g: a / b for g, a, b in zip(groups, means[2:2 + k], means[2 + k:]) if b > 0},
                "mix": dict(zip(tasks, weights.round(4).tolist())),
                "time": {"seconds": round(clock, 3), "samples_per_second": round(rate, 2),
                         "data": round(data_time / clock, 4)}})
            bar.set_postfix_str(f"loss {means[0]:.4f} {rate:.1f} clips/s")
            sums, clock, data_time, done = torch.zeros_like(sums), 0.0, 0.0, 0
        # --------------------------------------------------------------------------------- once in a while
        final, limit = now == steps, args.max_updates and now - start >= args.max_updates
        evaluating, saving, sampling, keeping = (
            n > 0 and now % n == 0 for n in (args.eval_every, args.save_every, args.sample_every,
                                             args.keep_every))
        if stop or limit or final or saving:                                # first: we may be killed soon
            save(now, path)
        if keeping:
            save(now, path.with_name(f"{path.stem}-{now:07d}.pt"))
        if ctx.main and not stop and (evaluating or sampling or final):
            with averaged(model, ema, args.compile):
                if evaluating or final:
                    write_line(log, {"step": now, "stage": "eval", **validate(model, fixed, ctx)})
                if sampling and not final:
                    sample_sheet(loaded, stickers, shown, tasks, out, f"samples-{now:07d}")
        if stop or limit:
            break
    bar.close()
    if args.dry_run:
        each = 4 * (2 + (2 if args.optimizer == "adamw" else 1) + bool(args.ema))      # bytes; Muon keeps one
        size = each * sum(p.numel() for p in params.values()) / 2 ** 30
        if ctx.main:
            print(f"memory per process: weights, gradients, moments and EMA {size:.2f} GiB\n"
                  f"time: {clock / done:.2f} s per update, {args.steps} updates take about "
                  f"{args.steps * clock / done / 3600:.1f} hours. Nothing was written.")
            if device.type == "cuda":
                print(f"peak on the GPU {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")
        return False
    finished, plot = start >= steps or now == steps, out / "loss.png"
    if finished and ctx.main:
        if start >= steps and plot.exists() and plot.stat().st_mtime > path.stat().st_mtime:
            print(f"{path} has all its {steps} updates already; raise --steps to go on")
        else:
            with averaged(model, ema, args.compile):
                sample_sheet(loaded, stickers, shown, tasks, out, "samples", stickers_too=True)
            plot_log(log, plot)
    return finished


# ------------------------------------------------------------------------------------------------------------
# Start


def resolve(args):
    """Fill in the preset's recipe, check what can be checked before anything is loaded -> Config."""
    common = {"accumulation": 1, "tasks": ",".join(TASKS), "word_drop": 0.2}
    for key, value in {**common, **RECIPES[args.preset]}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or f"runs/{args.preset}"
    if args.init and args.vae == "train":
        raise DataError(f"--init {args.init} with --vae train: its autoencoder belongs to it; remove one")
    if args.dry_run and args.stage == "vae":
        raise DataError("--dry-run with --stage vae: remove one")
    shipped = str(SHIPPED) if args.preset in ("tiny", "base") and SHIPPED.exists() else ""
    training = args.vae == "train" or args.stage == "vae"
    args.vae = "" if training else args.vae or args.init or shipped
    if not set(args.tasks.split(",")) <= set(TASKS):
        raise DataError(f"--tasks {args.tasks}: choose from {','.join(TASKS)}")
    settings = dict(PRESETS[args.preset], temporal=args.temporal, text_dims=())
    if args.text_encoder:
        probe = FrozenText(Config(**settings), args.text_encoder)
        probe.load()
        settings["text_dims"] = probe.widths()
    return Config(**settings)


def open_data(args, cfg):
    """--data -> (Stickers, Order of the training samples, held-out stickers in turn from each set)."""
    paths, shares, tasks = [], [], args.tasks.split(",")
    for spec in args.data:
        named = re.fullmatch(r"(.+):(0?\.\d*[1-9]\d*)", spec)
        paths.append(named[1] if named else spec)
        shares.append(float(named[2]) if named else None)
    stickers, source = join([open_stickers(p, cfg.size, cfg.frames, args.hold_out) for p in paths])
    keep, probe = stickers.index["count"] >= args.min_frames, Curriculum("none", 1, tasks, made=cfg.clean)
    if not any(probe.allowed(t, 1) for t in tasks):
        keep &= stickers.index["count"] > 1                                # a still cannot train these tasks
    train, held = (stickers.select(split)[keep[stickers.select(split)]] for split in ("train", "held_out"))
    groups, shown = ([x[source[x] == s] for s in range(len(paths))] for x in (train, held))
    for path, group in zip(paths, groups):
        if not len(group):
            raise DataError(f"--data {path}: nothing is left to train on; lower --min-frames, widen --tasks")
    named, free = sum(s for s in shares if s), sum(len(g) for g, s in zip(groups, shares) if not s)
    if free and named > 1 - 1e-6 or not free and abs(named - 1) > 1e-6:
        raise DataError(f"--data: the shares sum to {named:g}; they must leave something to sets without "
                        "one, or sum to 1")
    shares = [s or (1 - named) * len(g) / free for g, s in zip(groups, shares)]
    turns = [[g[i] for g in shown if i < len(g)] for i in range(max(map(len, shown)))]
    return stickers, Order(groups, shares, args.seed), [i for turn in turns for i in turn]


def get_vae(cfg, stickers, order, args, ctx, out):
    """-> the autoencoder: --vae, else trained (--dry-run: as it starts); None if its training was stopped."""
    if args.vae:
        vae = load_vae(args.vae)
        if (vae.f, vae.latent_channels) != (cfg.f, cfg.latent_channels):
            raise DataError(f"--vae {args.vae}: f = {vae.f} with {vae.latent_channels} channels, preset "
                            f"{args.preset} needs f = {cfg.f} with {cfg.latent_channels}")
        for key, value in vae.settings.items():                             # cfg describes this one
            setattr(cfg, key, value)
        return vae.to(ctx.device)
    if stickers.meta["kind"] == "latents":
        raise DataError(f"--data {args.data[0]}: holds latents; name their autoencoder with --vae")
    if args.dry_run:
        return AutoencoderKL(cfg).to(ctx.device).eval().requires_grad_(False)
    if cfg.vae_channels == 3:
        raise DataError(f"--preset {args.preset} uses Stable Diffusion's autoencoder: add --vae FILE")
    if args.vae_steps < 1:
        raise DataError("--vae-steps 0: without --vae there must be at least 1")
    return train_vae(cfg, stickers, order, args, ctx, out)


def run(args):
    cfg = resolve(args)
    ctx, out = Context(args), Path(args.out)
    if args.dry_run:                                                        # whose time is that of any others
        args.data = ["synthetic:16"]
    elif ctx.main:
        out.mkdir(parents=True, exist_ok=True)
    stickers, order, shown = open_data(args, cfg)
    if ctx.main:
        batch, count = args.batch_size * args.accumulation * ctx.world, sum(map(len, order.groups))
        print(json.dumps({"config": asdict(cfg), "flags": vars(args)}))
        print(f"{count} training stickers in {len(order.groups)} set(s), {len(shown)} held out; {ctx.world} "
              f"process(es) x batch {args.batch_size} x accumulation {args.accumulation} = {batch} clips per "
              f"update, {args.steps} updates = {args.steps * batch / count:.1f} epochs; {ctx.device}, "
              f"{'bf16 autocast' if ctx.bf16 else 'fp32'}")
        if not shown:
            print("note: no sticker is held out; evaluation and samples use training stickers")
    shown = shown or [i for group in order.groups for i in group[:64]]
    vae = get_vae(cfg, stickers, order, args, ctx, out)
    finished, done = vae is not None, f"done: {out / 'vae.pt'}. Next: the same without --stage vae"
    if finished and args.stage == "auto":
        finished = train(cfg, vae, encode(stickers, vae, ctx), order, shown, args, ctx, out)
        ckpt, caption = shlex.quote(str(out / "last.pt")), shlex.quote(stickers.caption(shown[0]))
        done = f"done: {ckpt}, {out / 'samples.webp'}, {out / 'loss.png'}. Next:\n" \
               f"  python sample.py --ckpt {ckpt} --text {caption} --seeds 0-3"
    if ctx.main and not args.dry_run:
        print(done if finished else f"stopped; the same command goes on from {out}")


def export(args):
    """OUT/last.pt (--stage vae: OUT/vae.pt) -> a small file that sample.py, --vae and --init read."""
    stage = "vae" if args.stage == "vae" else "main"
    path = Path(args.out or f"runs/{args.preset}") / ("vae.pt" if stage == "vae" else "last.pt")
    if not path.exists():
        raise DataError(f"--export: {path} does not exist; train first, or name the run with --out")
    data = load_checkpoint(path, stage)
    if "vae" not in data:
        raise DataError(f"--export: the training of {path} has not ended; the same command goes on")
    kept = ("format", "stage", "step", "config", "vae_id", "text_encoder", "fingerprint")
    small = {k: data[k] for k in kept if k in data}
    small["vae"] = {k: v.half() for k, v in data["vae"].items()}
    if stage == "main":
        small.update(ema={}, model={k: v.half() for k, v in {**data["model"], **data["ema"]}.items()})
    Path(args.export).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(args.export, small)
    print(f"{args.export}: {os.path.getsize(args.export) / 2 ** 20:.1f} MiB, update {data['step']}")


def main():
    args, code = parser().parse_args(), 2
    try:
        export(args) if args.export else run(args)
        return
    except (DataError, ImportError, ValueError) as e:
        message = first_line(e)
    except torch.OutOfMemoryError as e:
        message = f"out of memory ({first_line(e)}); lower --batch-size and raise --accumulation, or add " \
                  f"--checkpointing"
    except OSError as e:
        message = f"{e.filename or args.out}: {e.strerror or e}; is there room, may you write there?"
    except KeyboardInterrupt:
        message, code = "stopped at once; the same command goes on from the last checkpoint", 130
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
