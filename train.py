"""Train RDTF: DFGN with dual masks and the curriculum, on stickers in an autoencoder's latents.

    python train.py                                       # built-in stickers, preset tiny, CPU or GPU
    torchrun --nproc_per_node 8 train.py --preset base --batch-size 16 --data cache/mine --out runs/mine
    python train.py --dry-run --preset base               # parameters, memory, time; nothing is written
    python train.py --out runs/mine --export mine.pt      # the averaged weights in half precision

The same command goes on where it was stopped, also after kill -9. Every draw is a pure function of the seed,
the global sample index and the saved losses. The global batch is --batch-size, which is per process, times
processes times --accumulation: where it stays the same, as it does without that flag for tiny and base where
their 16 can be divided, the number of processes does not change the run.
The autoencoder is trained before, by stickers/vae.py; the presets tiny and base come with one.
"""

import argparse
import copy
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from curriculum import TASKS, Curriculum, make_masks
from data import (DataError, cores, draw_clip, join, number, one_line, open_stickers, processes, save_sheet,
                  to_straight, write_sticker)
from rdtf import (FORMAT, PRESETS, RDTF, SAMPLING, SHIPPED, AutoencoderKL, Config, FrozenText, Loaded,
                  add_lora, alphas_cumprod, blend, find_device, fingerprint, has_bf16, load_model, load_vae,
                  read_weights, reason, sample_clips, to_device)

HERE = Path(__file__).parent
LOG_SNR = torch.logit(alphas_cumprod()).numpy()                             # of a noise step, falling
BUILT_IN = [str(HERE / "stickers" / name) for name in ("characters", "fluent:0.2")]
SMALL = dict(accumulation=1, optimizer="muon", lr=0.01, weight_decay=0.1, schedule="cosine", full=0.7,
             tasks="t2v,t2v,t2v,i2v,it2v,predict_pre,predict_post,interpolate", word_drop=0.1,
             noise_levels="normal", save_every=200, eval_every=100)
LARGE = dict(save_every=1000, eval_every=500)           # their checkpoints have gigabytes
RECIPES = {  # what the flags of a preset default to; batch_size: of all processes together, one each at least
    "tiny": dict(SMALL, steps=320, batch_size=16, lr=0.014, ema=0.998, warmup=25),
    "base": dict({**SMALL, **LARGE}, steps=100_000, batch_size=16, ema=0.9999, warmup=1000),
    # Table 6: 50 K updates, 16 GPUs x batch 1 x accumulation 6, lr 1e-5
    "paper": dict(LARGE, accumulation=6, optimizer="adamw", lr=1e-5, weight_decay=0.01, schedule="constant",
                  full=0.0, tasks=",".join(TASKS), word_drop=0.2, noise_levels="uniform", steps=50_000,
                  batch_size=1, ema=0.9999, warmup=0),
}
LORA = dict(batch_size=8, optimizer="adamw", lr=5e-3, weight_decay=0.01, warmup=50)      # changed with --lora


def parser():
    about = f"{__doc__.splitlines()[0]} A default of None is what the preset's recipe says."
    p = argparse.ArgumentParser(description=about,
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
    a("--vae", default="", help="vae.pt, a checkpoint, or Stable Diffusion's weights; empty: that of --init, "
                                "else the shipped one for tiny and base")
    a("--init", default="", metavar="FILE", help="checkpoint whose weights and autoencoder it starts from")
    a("--lora", type=count, default=0, metavar="RANK",
      help="0, or train only LoRA of this rank in the attentions of --init; --export then writes it alone")
    a("--text-encoder", nargs="+", default=[], metavar="FOLDER",
      help="one or two local Hugging Face text encoders; none: byte transformer")
    a("--temporal", default="sti", choices=["sti", "conv3d"], help="what mixes frames (Table 3)")
    a("--steps", type=some, help="updates of the weights")
    a("--batch-size", type=some,
      help="clips per process and micro-step; None: the recipe's (tiny and base 16), shared by the processes")
    a("--accumulation", type=some, help="micro-steps per update")
    a("--optimizer", choices=["adamw", "muon"], help="muon: for matrices, with AdamW for the rest")
    a("--lr", type=rate, help="peak learning rate; with muon AdamW has a tenth of it")
    a("--schedule", choices=["constant", "cosine"], help="of the learning rate, after warm-up")
    a("--warmup", type=count, help="updates of linear warm-up, 0 = none")
    a("--weight-decay", type=rate, help="decoupled; with muon of its matrices only")
    a("--grad-clip", type=rate, default=1.0, help="largest gradient norm, 0 = no clipping")
    a("--ema", type=share, help="decay of the averaged weights, 0 = they are the newest ones")
    a("--curriculum", default="adaptive", choices=["none", "linear", "adaptive"], help="Table 4: -, LCL, DCL")
    a("--tasks", help=f"comma-separated, of {', '.join(TASKS)}; one that is named twice weighs twice")
    a("--full", type=share, help="share of the clips that have all F frames, where they can")
    a("--min-frames", type=some, default=1, help="leave out stickers with fewer different frames, F at most")
    a("--drop", type=half, default=0.05,
      help="probability of dropping text and given frames together; where none is given, once more of text")
    a("--text-drop", type=half, default=0.05,
      help="probability of dropping text alone where a frame is given; set 0.5 where a caption is a name")
    a("--word-drop", type=share, help="probability that a word of the caption becomes # (release: 0.2)")
    a("--noise-levels", choices=["uniform", "normal"], help="noise steps: uniform (paper), or normal log-SNR")
    a("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of weights and every draw")
    a("--device", default="auto", help="auto, cpu, cuda or mps")
    a("--precision", default="auto", choices=["auto", "bf16", "fp32"],
      help="of the updates; auto: bf16 where it is fast")
    a("--compile", action="store_true", help="torch.compile the model")
    a("--checkpointing", action="store_true", help="recompute layers in the backward: less memory, slower")
    a("--save-every", type=count, help="updates between checkpoints, 0 = only at the end")
    a("--keep-every", type=count, default=0,
      help="updates between numbered checkpoints with a sheet of samples, 0 = none")
    a("--eval-every", type=count, help="updates between held-out losses, 0 = only at the end")
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
        self.rank, self.world = processes()
        self.main, self.device = self.rank == 0, find_device(args.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            # the others wait while the main process evaluates, samples and saves
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=1))
            torch.set_num_threads(cores())                                  # torchrun gives each just one
        self.bf16 = args.precision == "bf16" or args.precision == "auto" and has_bf16(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


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

    def __getitem__(self, g):
        turn, place = divmod(g, 1000)
        s = int(self.plan[place])
        before = turn * int(self.counts[s]) + int((self.plan[:place] == s).sum())           # of this set
        epoch, k = divmod(before, len(self.groups[s]))
        return int(self.groups[s][permutation(self.seed, 1, s, epoch, count=len(self.groups[s]))[k]])


def draw_row(stickers, order, g, args):
    """Sample g -> (clip (F, c, h, w) fp32, n real frames, caption, g)."""
    item, rng = order[g], np.random.default_rng([args.seed, 2, g])
    clip, n = draw_clip(stickers, item, rng, args.full, args.min_frames)
    return torch.from_numpy(clip), n, stickers.caption(item, rng), g


def noise_step(kind, g, rng):
    """The noise step 0..999 of sample g. Neighbouring samples are spread evenly over the distribution.
    uniform: the paper's. normal: log-SNR, of the paper's schedule, ~ N(-0.6, 2), but 30 % are drawn from the
    noisiest fifth (36 % end up there): there the caption decides, and what moves where, and a network that
    sees it seldom lets the noise through (ours)."""
    u = (g * 0.6180339887498949 + 0.5) % 1                           # golden-section sequence
    late = rng.random() < 0.3                                        # drawn for both: the rest stays the same
    if kind == "uniform":
        return int(1000 * u)
    if late:
        return 800 + int(200 * u)
    wanted = -0.6 + 2 * NormalDist().inv_cdf(min(max(u, 1e-9), 1 - 1e-9))
    return int(np.clip(np.searchsorted(-LOG_SNR, -wanted), 0, 999))


def draw_noise(rngs, shape, device):
    """-> (len(rngs), *shape) fp32, each row from its own numpy Generator. For a GPU they only give the seeds:
    it draws the numbers itself, other ones, which would take the host as long as all else of a clip."""
    place = device if device.type == "cuda" else torch.device("cpu")
    noise, stream = torch.empty(len(rngs), *shape, device=place), torch.Generator(place)
    for rng, row in zip(rngs, noise):
        if noise.is_cuda:
            row.normal_(generator=stream.manual_seed(int(rng.integers(2 ** 63))))
        else:
            rng.standard_normal(out=row.numpy(), dtype=np.float32)
    return noise


def make_batch(rows, text, curriculum, weights, args, device=torch.device("cpu")):
    """list of `draw_row`s -> kwargs of RDTF.forward, on the CPU but for the noise.
    Task, masks, dropping, noise and its step of each clip are drawn here, from (seed, g) alone. Text and
    given frames are dropped here and nowhere else (release: text of i2v; the rest is ours: two-scale guidance
    needs (no text, no image) and (no text, image) to be trained)."""
    drawn = []
    for clip, n, caption, g in rows:
        rng = np.random.default_rng([args.seed, 3, g])
        task = curriculum.draw(weights, n, rng)
        cond, real = make_masks(task, n, len(clip), rng=rng)
        words = ["#" if rng.random() < args.word_drop else word for word in caption.split()]      # release
        u, alone = rng.random(), args.text_drop if cond.any() else args.drop
        told = " ".join(words) if TASKS[task].text and u >= args.drop + alone else ""
        drawn.append((told, cond & (u >= args.drop), real, noise_step(args.noise_levels, g, rng), rng))
    texts, cond, real, steps, rngs = zip(*drawn)
    cond, real = (torch.from_numpy(np.stack(x)) for x in (cond, real))
    return dict(x0=torch.stack([row[0] for row in rows]), noise=draw_noise(rngs, rows[0][0].shape, device),
                t=torch.tensor(steps), text=text.tokenize(texts), cond_mask=cond, frame_mask=real)


def prepare(step, text, stickers, order, curriculum, args, ctx):
    """All that the host does for an update -> (weights of the tasks, batches of its micro-steps)."""
    weights, batches = curriculum.weights(step), []
    for micro in range(step * args.accumulation, (step + 1) * args.accumulation):
        first = (micro * ctx.world + ctx.rank) * args.batch_size            # of this process's samples
        rows = [draw_row(stickers, order, g, args) for g in range(first, first + args.batch_size)]
        batch = make_batch(rows, text, curriculum, weights, args, ctx.device)
        if ctx.device.type == "cuda":                                       # else its copy could wait
            batch = {k: x if x.is_cuda else x.pin_memory() for k, x in batch.items()}
        batches.append(batch)
    return weights, batches


# ------------------------------------------------------------------------------------------------------------
# Optimizers. Learning rate and averaging are pure functions of the step.


def orthogonal(m, steps=5):
    """(n, rows, columns) fp32 -> about the nearest matrices with orthonormal rows or columns.
    Newton-Schulz with the quintic coefficients of Muon (Jordan et al. 2024): X <- (a + b G + c G^2) X with
    G = X X^T. The factors need G alone, which is small: X is multiplied once, by their product."""
    x = m.mT if m.shape[1] > m.shape[2] else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, one = x @ x.mT, torch.eye(x.shape[1], device=x.device)
    product = one.expand_as(gram)
    for _ in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) + 3.4445 * one
        product, gram = factor @ product, factor @ gram @ factor            # the gram of the next X
    x = product @ x
    return x.mT if m.shape[1] > m.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices and convolutions seen as (out, rest).
    Every update has the same size, so weights grow until the decay balances it, and what was learnt fades
    within 1 / (lr weight_decay) updates: benchmarks/README.md says what too little and too much of it do.
    Of several processes each makes its part of the updates orthogonal, and sends it to the others."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        rank, world = processes()
        for group in self.param_groups:
            lr, beta, shapes, updates = group["lr"], group["momentum"], {}, []
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                shapes.setdefault(p.flatten(1).shape, []).append(p)
            # few kernels: all of one shape at once; the costly ones in `orthogonal` first, for even parts
            groups = sorted(shapes.items(), reverse=True,
                            key=lambda x: len(x[1]) * min(x[0]) ** 2 * (max(x[0]) + 10 * min(x[0])))
            for i, (_, params) in enumerate(groups):
                grads, m = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(m, grads, 1 - beta)
                u = torch.stack([x.flatten(1) for x in torch._foreach_lerp(grads, m, beta)])
                updates.append(orthogonal(u).contiguous() if i % world == rank else u)
            for i, ((rows, columns), params) in enumerate(groups):
                if world > 1:
                    dist.broadcast(updates[i], i % world)
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, [x.view_as(p) for p, x in zip(params, updates[i])],
                                    alpha=-lr * max(1.0, rows / columns) ** 0.5)


def make_optimizers(module, kind, weight_decay):
    """-> list of optimizers; `share` in their groups is of the learning rate.
    With muon AdamW trains what is no hidden matrix: norms, biases, embeddings, the entrance and the exit, and
    STI's small parts, at a tenth of the rate and without decay."""
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    ends = ("conv_in.", "conv_out.", "embed.", "words.", "position", "number", ".detail.")
    hidden = {n: p for n, p in params.items()
              if kind == "muon" and p.ndim > 1 and not any(x in "." + n for x in ends)}
    rest = [p for n, p in params.items() if n not in hidden]
    share, decay = (0.1, 0.0) if hidden else (1.0, weight_decay)
    adamw = torch.optim.AdamW([{"params": rest, "share": share}], lr=0.0, betas=(0.9, 0.999),
                              weight_decay=decay, fused=rest[0].device.type != "mps")
    if not hidden:
        return [adamw]
    return [Muon([{"params": list(hidden.values()), "share": 1.0}], 0.0, weight_decay=weight_decay), adamw]


def learning_rate(step, peak, warmup, schedule, steps):
    """At an update (from 0): linear warm-up, then constant (paper) or half a cosine to peak / 20 (ours)."""
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if schedule == "constant":
        return peak * ramp
    return peak * ramp * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(steps, 1)))))


@torch.no_grad()
def update_weights(optimizers, lr, params, ema, decay, step, grad_clip):
    """Clip, step, average -> gradient norm. A broken gradient counts as zero. The average is short at first,
    so that it forgets the random start (ours)."""
    norm = nn.utils.clip_grad_norm_(params.values(), grad_clip or math.inf)
    for p in (p for p in params.values() if p.grad is not None):
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch._foreach_lerp_(list(ema.values()), [params[n] for n in ema],
                         1 - min(decay, (1 + step) / (10 + step)))
    return norm


def watch(loss, bad, step, path, args):
    """-> how many losses in a row were not finite; DataError if there were too many."""
    bad = 0 if math.isfinite(loss) else bad + 1
    if bad >= args.patience or bad and step == args.steps:
        raise DataError(f"the loss was not finite for the last {bad} updates, up to {step}; {path} was not "
                        f"touched since. Lower --lr or try --precision fp32")
    return bad


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
        raise DataError(f"{path}: cannot be written ({reason(cause)}); the checkpoint before is intact. "
                        f"Make room on the disk and run the same command again")


def check_config(path, old, new, free=()):
    """DataError unless the Config of a file is that of this run, but for how it samples and what is free."""
    for key, value in asdict(new).items():
        was = getattr(old, key)
        if key not in (*SAMPLING, *free) and was != value:
            raise DataError(f"{path}: made with {key} = {was}, this run has {value}; take the --preset and "
                            "flags it was made with, or another file or --out")


def load_checkpoint(path, stage, cfg=None):
    """-> dict. DataError unless it is of this stage (main, or vae: stickers/vae.py) and of this Config."""
    try:
        data = read_weights(path)
        assert data["format"] == FORMAT and data["stage"] == stage
        old, _ = Config(**data["config"]), data["optimizers"]                # an exported file has none
    except Exception as e:                                                  # broken files raise anything
        raise DataError(f"{path}: no {stage} checkpoint of this version ({type(e).__name__}); move it away "
                        "or choose another --out")
    check_config(path, old, cfg or old)
    return data


def state_of(step, model, average, optimizers):
    return {"step": step, "model": model.state_dict(), "ema": average.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers]}


def restore(saved, path, model, average, optimizers):
    """The state in a checkpoint -> in place; returns how many updates are done."""
    try:
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]                 # flags count, not checkpoints
            optimizer.load_state_dict({**state, "param_groups": groups})
        return saved["step"]
    except (KeyError, ValueError, RuntimeError, TypeError) as e:
        raise DataError(f"{path}: does not fit this run ({reason(e)}); choose another --out, or the flags it "
                        "was made with")


def write_line(path, line):
    """Append a line to log.jsonl; what is not finite becomes null, which every JSON reader takes."""
    with open(path, "a") as f:
        f.write(re.sub("NaN|-?Infinity", "null", json.dumps(line)) + "\n")


def read_lines(path):
    """A file of JSON lines -> list of them, without half-written ones; [] where there is no file."""
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else ():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def read_log(path):
    """log.jsonl -> {(stage, step): line}. A resumed run appends: of lines of one step the last one counts."""
    lines = (x for x in read_lines(path) if isinstance(x, dict) and {"stage", "step"} <= x.keys())
    return {(x["stage"], x["step"]): x for x in lines}


# ------------------------------------------------------------------------------------------------------------
# What the run shows of itself


def validation_rows(stickers, items, tasks, count=48):
    """Fixed clips of held-out stickers: every task sees the same ones -> list of (task, list of rows)."""
    rows, each = [], max(1, count // len(tasks))
    for j in range(each):
        item = items[j * len(items) // each]
        clip, n = draw_clip(stickers, item, np.random.default_rng([1234, j]), full=1.0)
        rows.append((torch.from_numpy(clip), n, stickers.caption(item), j))
    return [(t, [row for row in rows if TASKS[t].given(row[1])]) for t in tasks]


@torch.no_grad()
def validate(model, fixed, ctx):
    """-> {"loss": of all, task: loss per frame that counts, "ev": {task: EV of `RDTF.mean`}}."""
    args = argparse.Namespace(seed=1234, drop=0.0, text_drop=0.0, word_drop=0.0, noise_levels="uniform")
    losses, ev = {}, {}
    for task, rows in fixed:
        only, sums = Curriculum("none", 1, (task,)), torch.zeros(4)
        for part in (rows[i:i + 8] for i in range(0, len(rows), 8)):
            batch = to_device(make_batch(part, model.text, only, [1.0], args), ctx.device)
            x0, cond, real = batch["x0"], batch["cond_mask"], batch["frame_mask"]
            with ctx.autocast():
                loss = model(**batch)[:, 0]
                mean = model.mean(**{k: x for k, x in batch.items() if k != "t"})
            made, counted = real & ~cond, model.counted(cond, real).float().mean(1)
            wrong, blend_wrong = (((y - x0) ** 2)[made].sum() for y in (mean, blend(x0, cond)))
            sums += torch.stack([loss.sum(), counted.sum(), wrong, blend_wrong]).float().cpu()
        loss, frames, wrong, blend_wrong = sums.tolist()
        if frames > 0:
            losses[task] = loss / frames
        if blend_wrong > 0 and any(TASKS[task].given(rows[0][1])):
            ev[task] = 1 - wrong / blend_wrong
    return {"loss": sum(losses.values()) / max(1, len(losses)), **losses, "ev": ev}


@torch.no_grad()
def sample_sheet(loaded, stickers, items, tasks, out, name):
    """samples.png and, moving, samples.webp: three held-out stickers as they are stored, then what the
    network makes of them in each trained task. What it makes of the first is left as TASK.webp, too."""
    rows, device = [], loaded.vae.mean.device
    for j, item in enumerate(items[:3]):
        z, n = draw_clip(stickers, item, np.random.default_rng([7, int(item)]), full=1.0)
        truth, caption = loaded.vae.decode(torch.from_numpy(z).to(device)), stickers.caption(item)
        row = [(caption, to_straight(truth[:n]))]
        for task in (t for t in tasks if TASKS[t].given(n)):
            cond, real = make_masks(task, n, len(z), choice=0)
            text = caption * TASKS[task].text
            clip = sample_clips(loaded, [text], truth[None], cond[None], real[None], seeds=[j])
            row.append((task, to_straight(clip[0, :n])))
            if j == 0:
                write_sticker(out / f"{task}.webp", row[-1][1], 125)
        rows.append(row)
    labels, clips = ([[cell[k] for cell in row] for row in rows] for k in (0, 1))
    save_sheet(out / f"{name}.png", sum(clips, []), sum(labels, []))
    save_sheet(out / f"{name}.webp", clips, [row[0] for row in labels])


def plot_log(log, png):
    """Over updates, a curve per task: the loss per frame that counts of held-out clips (left; grey: training)
    and EV of the one-step mean (right)."""
    lines, wheel = read_log(log).values(), ("red", "orange", "brown", "blue", "deepskyblue", "green")
    trained, held = ([x for x in lines if x["stage"] == stage] for stage in ("main", "eval"))
    image = Image.new("RGB", (1280, 420), "white")
    draw = ImageDraw.Draw(image)
    for left, title, curves in (
            (50, "loss", {"training": [(x["step"], x["loss"]) for x in trained],
                          **{t: [(x["step"], x.get(t)) for x in held] for t in TASKS}}),
            (690, "EV, 0: the blend", {t: [(x["step"], x["ev"].get(t)) for x in held] for t in TASKS})):
        curves = {name: [p for p in points if p[1] is not None] for name, points in curves.items()}
        xs, ys = zip(*[p for points in curves.values() for p in points] or [(1, 0.0)])
        low, right = max(min(ys), -0.2), max(xs)
        high = max(low, float(np.quantile(ys, 0.97))) + 1e-3
        draw.rectangle((left, 50, left + 460, 370), outline="#444444")
        draw.text((left, 30), f"{title}: {low:.3f} to {high:.3f} over {right} updates", "#444444")
        for i, (name, points) in enumerate(curves.items()):
            colour = "#999999" if name == "training" else wheel[list(TASKS).index(name) % 6]
            points = [(left + 460 * x / right, 370 - 320 * float(np.clip((y - low) / (high - low), 0, 1)))
                      for x, y in points]
            draw.line(points, colour, 1 if name == "training" else 2)
            draw.text((left + 470, 56 + 13 * i), name * bool(points), colour)
    image.save(png)


def print_parts(model, vae, args):
    parts = {**dict(model.net.named_children()), "DFGN": model.net, "text": model.text, "autoencoder": vae}
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = 3 if args.optimizer == "adamw" else 2                          # gradient, moments: Muon has one
    memory = 4 * (2e6 * (sizes["DFGN"] + sizes["text"]) + copies * trained) / 2 ** 30
    print("parameters: " + ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items() if size > 0.001))
    print(f"memory per process: weights, gradients, moments and EMA {memory:.2f} GiB")


# ------------------------------------------------------------------------------------------------------------
# The run


@stop_on_signals()
def train(cfg, vae, stickers, order, shown, curriculum, args, ctx, out):
    """The run, read top to bottom -> finished? Leaves last.pt, log.jsonl, and at the end samples.png,
    samples.webp, one sticker per task and loss.png."""
    torch.manual_seed(args.seed)
    model = RDTF(cfg, args.text_encoder)
    path, log, device, tasks = out / "last.pt", out / "log.jsonl", ctx.device, curriculum.tasks
    writes, resumed = ctx.main and not args.dry_run, path.exists() and not args.dry_run
    static = {"format": FORMAT, "stage": "main", "config": asdict(cfg), "args": vars(args),
              "fingerprint": stickers.meta["fingerprint"], "text_encoder": getattr(model.text, "paths", []),
              "vae": {k: v.cpu() for k, v in vae.state_dict().items()}, "vae_id": vae.fingerprint()}
    if args.init and not resumed:
        given = load_model(args.init)
        check_config(args.init, given.cfg, cfg, () if args.lora else ("zero_snr",))     # is learnt anew
        if given.vae.fingerprint() != static["vae_id"]:
            raise DataError(f"--init {args.init}: was trained with another autoencoder; leave --vae out")
        model.load_state_dict(given.model.state_dict())
        del given
    if args.lora:
        add_lora(model, args.lora)
    model.to(device).train()
    average = copy.deepcopy(model).eval()                                   # has the averaged weights
    if args.text_encoder:                                                   # frozen: once is enough
        average.text.encoders = model.text.encoders
    params, ema = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, average))
    optimizers = make_optimizers(model, args.optimizer, args.weight_decay)
    now, history = 0, curriculum.state_dict()
    if resumed:
        saved = load_checkpoint(path, "main", cfg)
        if saved["args"].get("lora", 0) != args.lora:
            raise DataError(f"{path}: made with --lora {saved['args'].get('lora', 0)}; give that, or "
                            "another --out")
        if saved["vae_id"] != static["vae_id"]:
            raise DataError(f"{path}: made with another autoencoder; name that with --vae, or another --out")
        if saved["fingerprint"] != static["fingerprint"] and ctx.main:
            print(f"note: the data changed since {path} was written; the run goes on with what is there now")
        now, history = restore(saved, path, model, average, optimizers), saved["curriculum"]
        del saved                                                           # a second copy of everything
    if ctx.world > 1:
        starts = [None] * ctx.world
        dist.all_gather_object(starts, now)
        if len(set(starts)) > 1:
            raise DataError(f"--out {out}: processes see different files; all machines must share it")
    if ctx.main:
        print_parts(model, vae, args)

    model.net.checkpointing = args.checkpointing
    if args.compile:                                                        # in place: names of weights stay
        model.compile()
    places = [device.index] if device.type == "cuda" else None              # (a view: gradients kept once)
    net = model if ctx.world == 1 else DDP(model, places, gradient_as_bucket_view=True,
                                           broadcast_buffers=False)         # a constant
    loaded, fixed = Loaded(average, vae, cfg, {}), validation_rows(stickers, shown, tasks)
    global_batch, start, bad, window = args.batch_size * args.accumulation * ctx.world, now, 0, []

    def save(file):
        if writes and not bad:
            save_checkpoint(file, {**static, **state_of(now, model, average, optimizers),
                                   "curriculum": curriculum.state_dict()})

    # The batch of an update is made before the loss of the one before it is known: a GPU works meanwhile.
    source = model.text, stickers, order, curriculum, args, ctx
    curriculum.load_state_dict({k: v[:-1] for k, v in history.items()})
    ready = prepare(now, *source)
    curriculum.load_state_dict(history)
    bar = tqdm(range(start, args.steps), "training", total=args.steps, initial=start, dynamic_ncols=True,
               disable=None if ctx.main else True)                          # None: unless in a terminal
    for step in bar:
        # ------------------------------------------------------------------------------------ one update
        began, (weights, batches), now = time.perf_counter(), ready, step + 1
        stats, share = torch.zeros(3, device=device), 0.0                   # loss, counted frames, stop
        for micro, batch in enumerate(batches, 1):
            with nullcontext() if micro == len(batches) or ctx.world == 1 else net.no_sync():
                with ctx.autocast():
                    losses = net(**to_device(batch, device))                # b 2: diffusion, draft
                # DDP averages gradients over ranks, the loss is a sum over the global batch: undo the average
                (losses.sum() * (ctx.world / global_batch)).backward()
            stats[0] += losses[:, 0].detach().float().sum()
            share += float(model.counted(batch["cond_mask"], batch["frame_mask"]).float().mean(1).sum())
        lr = learning_rate(step, args.lr, args.warmup, args.schedule, args.steps)
        norm = update_weights(optimizers, lr, params, ema, args.ema, step, args.grad_clip)
        stats[1], stats[2] = share, float(STOP["since"] > 0)
        if ctx.world > 1:                                                   # each rank has a part of the mean
            dist.all_reduce(stats)
        # What is logged, and what the curriculum reads, is per frame that counts: tasks differ in how many do
        stats[0], stats[1], queued = stats[0] / stats[1], norm, time.perf_counter()
        ready = prepare(now, *source)
        data_time = time.perf_counter() - queued
        # the only wait for the device, but for one a batch where frozen text encoders sort their captions
        loss, norm, stop = stats.tolist()
        curriculum.record(loss)
        bad = watch(loss, bad, now, path, args)
        # -------------------------------------------------------------------------------------------- log
        window.append((loss, norm, time.perf_counter() - began, data_time))
        if not args.dry_run and (now % args.log_every == 0 or now == args.steps):
            loss, norm, *_ = np.mean(window, 0)
            *_, seconds, data_time = np.sum(window, 0)
            rate = len(window) * global_batch / seconds
            bar.set_postfix_str(f"loss {loss:.4f} {rate:.1f} clips/s")
            if ctx.main:
                write_line(log, {
                    "step": now, "stage": "main", "loss": loss, "grad_norm": norm, "lr": lr,
                    "mix": dict(zip(tasks, weights.round(4).tolist())),
                    "time": {"seconds": round(seconds, 3), "samples_per_second": round(rate, 2),
                             "data": round(data_time / seconds, 4)}})
            window.clear()
        # --------------------------------------------------------------------------------- once in a while
        final, pause = now == args.steps, now - start == args.max_updates
        evaluating, saving, keeping = (n > 0 and now % n == 0 for n in (args.eval_every, args.save_every,
                                                                        args.keep_every))
        if stop or pause or final or saving:                                # first: we may be killed soon
            save(path)
        if keeping:
            save(path.with_name(f"{path.stem}-{now:07d}.pt"))
        if writes and (final or evaluating and not stop):
            write_line(log, {"step": now, "stage": "eval", **validate(average, fixed, ctx)})
        if writes and keeping and not (final or stop):
            sample_sheet(loaded, stickers, shown, tasks, out, f"samples-{now:07d}")
        if stop or pause:
            if bad and writes:
                print(f"not saved: the last loss was not finite; {path} is as it was before")
            break
    if args.dry_run and ctx.main:
        seconds = float(np.mean(window[1:] or window, 0)[2])                # the first update warms up
        print(f"time: {seconds:.2f} s per update, {args.steps} updates take about "
              f"{args.steps * seconds / 3600:.1f} hours. Nothing was written.")
        if device.type == "cuda":
            print(f"peak on the GPU {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")
    finished = now >= args.steps
    if finished and writes:
        if start >= args.steps:
            print(f"{path} has all its {args.steps} updates already; raise --steps to go on")
        sample_sheet(loaded, stickers, shown, tasks, out, "samples")
        plot_log(log, out / "loss.png")
    return finished


# ------------------------------------------------------------------------------------------------------------
# Start


def resolve(args):
    """Fill in the preset's recipe, check what can be checked before anything is loaded -> Config."""
    recipe = {**RECIPES[args.preset], **(LORA if args.lora else {})}
    recipe["batch_size"] = max(1, recipe["batch_size"] // processes()[1])
    for key, value in recipe.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or f"runs/{args.preset}"
    if args.lora and not (args.init and args.optimizer == "adamw"):
        raise DataError(f"--lora {args.lora}: needs --init FILE, what it is trained on top of, and adamw")
    if args.dry_run:                                                        # four updates take as long as any
        args.data, args.steps, args.max_updates = ["synthetic:16"], max(args.steps, 5), 4
    shipped = str(SHIPPED) if args.preset in ("tiny", "base") and SHIPPED.exists() else ""
    args.vae = args.vae or args.init or shipped
    if not set(args.tasks.split(",")) <= set(TASKS):
        raise DataError(f"--tasks {args.tasks}: choose from {','.join(TASKS)}")
    settings = dict(PRESETS[args.preset], temporal=args.temporal, text_dims=())
    if args.text_encoder:
        probe = FrozenText(Config(**settings), args.text_encoder)
        probe.load()
        settings["text_dims"] = probe.widths()
    return Config(**settings)


def open_vae(args, cfg):
    """The autoencoder of --vae, which cfg then describes. A dry run takes an untrained one where none is."""
    if not args.vae and not args.dry_run:
        raise DataError(f"--preset {args.preset} has no autoencoder of its own here: add --vae FILE, Stable "
                        f"Diffusion's for paper, else one that stickers/vae.py trained")
    vae = load_vae(args.vae) if args.vae else AutoencoderKL(cfg).eval().requires_grad_(False)
    if (vae.f, vae.cfg.latent_channels) != (cfg.f, cfg.latent_channels):
        raise DataError(f"--vae {args.vae}: f = {vae.f} with {vae.cfg.latent_channels} channels, preset "
                        f"{args.preset} needs f = {cfg.f} with {cfg.latent_channels}")
    vars(cfg).update({k: v for k, v in vars(vae.cfg).items() if k.startswith("vae_")})
    return vae


def open_data(args, cfg, fewest):
    """--data -> (Stickers, Order of the training samples, held-out stickers in turn from each set), of those
    with `fewest` different frames or more."""
    paths, shares = [], []
    for spec in args.data:
        named = re.fullmatch(r"(.+):(0?\.\d*[1-9]\d*)", spec)
        paths.append(named[1] if named else spec)
        shares.append(float(named[2]) if named else None)
    stickers, source = join([open_stickers(p, cfg.size, cfg.frames, args.hold_out) for p in paths])
    usable, split = stickers.index["count"] >= fewest, stickers.index["split"]
    groups, shown = ([np.flatnonzero(usable & (source == s) & (split == part)) for s in range(len(paths))]
                     for part in (0, 1))                                    # 0: training, 1: held out
    for path, group in zip(paths, groups):
        if not len(group):
            raise DataError(f"--data {path}: nothing is left to train on; lower --min-frames, widen --tasks")
    named, free = sum(s for s in shares if s), sum(len(g) for g, s in zip(groups, shares) if not s)
    if free and named > 1 - 1e-6 or not free and abs(named - 1) > 1e-6:
        raise DataError(f"--data: the shares sum to {named:g}; they must leave something to sets without "
                        "one, or sum to 1")
    shares = [s or (1 - named) * len(g) / free for g, s in zip(groups, shares)]
    in_turn = [i for turn in zip_longest(*shown) for i in turn if i is not None]
    return stickers, Order(groups, shares, args.seed), in_turn


def run(args):
    cfg = resolve(args)
    ctx, out, tasks = Context(args), Path(args.out), args.tasks.split(",")
    if ctx.main and not args.dry_run:
        out.mkdir(parents=True, exist_ok=True)
    curriculum = Curriculum(args.curriculum, args.steps, tasks, made=cfg.clean)
    stills = any(curriculum.allowed(t, 1) for t in tasks)                   # can a still train any of them?
    vae = open_vae(args, cfg).to(ctx.device)
    stickers, order, shown = open_data(args, cfg, args.min_frames if stills else max(2, args.min_frames))
    if ctx.main:
        batch, count = args.batch_size * args.accumulation * ctx.world, sum(map(len, order.groups))
        print(json.dumps({"config": asdict(cfg), "flags": vars(args)}))
        print(f"{count} training stickers in {len(order.groups)} set(s), {len(shown)} held out; {ctx.world} "
              f"process(es) x batch {args.batch_size} x accumulation {args.accumulation} = {batch} clips per "
              f"update, {args.steps} updates = {args.steps * batch / count:.1f} epochs; {ctx.device}, "
              f"{'bf16 autocast' if ctx.bf16 else 'fp32'}")
    if not shown:                                                           # then show what it trains on
        shown = [i for group in order.groups for i in group[:64]]
    shown = [i for i in shown if stickers.index["count"][i] > 1] or shown
    finished = train(cfg, vae, stickers.encode(vae), order, shown, curriculum, args, ctx, out)
    if ctx.main and not args.dry_run:
        ckpt, caption = shlex.quote(str(out / "last.pt")), shlex.quote(stickers.caption(shown[0]))
        print(f"done: {ckpt}, {out / 'samples.webp'}, {out / 'loss.png'}. Next:\n"
              f"  python sample.py --ckpt {ckpt} --text {caption} --seeds 0-3" if finished else
              f"stopped; the same command goes on from {out}")


def export(args):
    """OUT/last.pt -> a small file that sample.py, --vae and --init read; of a LoRA only what it added."""
    path = Path(args.out or f"runs/{args.preset}", "last.pt")
    if not path.exists():
        raise DataError(f"--export: {path} does not exist; train first, or name the run with --out")
    if args.export.endswith(".safetensors"):
        raise DataError(f"--export {args.export}: writes a PyTorch file; end it in .pt")
    if Path(args.export).resolve() == path.resolve():
        raise DataError(f"--export {args.export}: is the run's own checkpoint; choose another name")
    data = load_checkpoint(path, "main")
    kept = ("format", "stage", "step", "config", "vae_id", "text_encoder", "fingerprint")
    small, weights = {k: data[k] for k in kept}, {k: v.half() for k, v in data["ema"].items()}
    if lora := {k: weights.pop(k) for k in list(weights) if ".lora_" in k}:      # what it added, alone
        small.update(stage="lora", lora=lora, base=fingerprint(weights))
    else:
        small.update(ema={}, model=weights, vae={k: v.half() for k, v in data["vae"].items()})
    Path(args.export).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(args.export, small)
    print(f"{args.export}: {os.path.getsize(args.export) / 2 ** 20:.1f} MiB, update {data['step']}")


def main():
    args = parser().parse_args()
    status = one_line("train.py", lambda: export(args) if args.export else run(args))
    if status:                      # torchrun ends the others; to leave their group could wait for them
        sys.exit(status)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
