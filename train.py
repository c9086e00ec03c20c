"""Train RDTF: first the autoencoder (unless one is given), then DFGN with dual masks and the curriculum.

    python train.py                                 # built-in stickers, preset tiny, CPU or whatever is there
    torchrun --nproc_per_node 8 train.py --preset base --data data/fluent --out runs/fluent
    python train.py --dry-run --preset base           # the plan: parameters, memory, time; nothing is written
    python train.py --stage vae --data data/fluent           # the autoencoder only

The same command resumes where it was stopped, also after kill -9. Every draw is a pure function of the seed,
the global sample index and the saved loss history: processes, accumulation and workers do not change the run.
"""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from curriculum import GENERATION, TASKS, Curriculum, allowed, choices, make_masks
from data import DataError, Stickers, draw_clip, open_stickers, save_sheet, write_sticker
from rdtf import (PRESETS, RDTF, AutoencoderKL, Config, FrozenText, VAEStep, drop_words, keep_memory,
                  load_vae, read_weights)
from sample import (FORMAT, HERE, SHIPPED, Loaded, ema_weights, first_line, load_model, sample_clips,
                    to_device, to_straight)

BUILT_IN = HERE / "assets" / "stickers"
RECIPES = {  # what the flags of a preset default to
    # many small updates: after as many clips, 1000 x 4 reached a lower held-out loss than 500 x 8
    "tiny": dict(steps=700, batch_size=4, lr=1e-3, ema=0.998, warmup=50, schedule="cosine",
                 vae_steps=600, vae_batch_size=16),
    "base": dict(steps=100_000, batch_size=16, lr=2e-4, ema=0.9999, warmup=1000, schedule="cosine",
                 vae_steps=20_000, vae_batch_size=32),
    # Table 6: 50 K updates, 16 GPUs x batch 1 x accumulation 6, lr 1e-5; Stable Diffusion's autoencoder
    "paper": dict(steps=50_000, batch_size=1, accumulation=6, lr=1e-5, ema=0.9999, warmup=0,
                  schedule="constant", vae_steps=0, vae_batch_size=8),
}


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    a = p.add_argument
    recipe = "default: the preset's recipe"
    a("--data", default=str(BUILT_IN), help="folder of stickers, prepared store, or synthetic[:COUNT]")
    a("--out", default="", help="run folder; empty: runs/PRESET")
    a("--preset", default="tiny", help=f"size of everything: {', '.join(PRESETS)}")
    a("--stage", default="auto", choices=["auto", "vae"], help="vae: the autoencoder only; auto: DFGN too")
    a("--vae", default="",
      help="autoencoder to use (a run's vae.pt, a checkpoint, or Stable-Diffusion weights); train: train "
           "one; empty: that of --init, else the shipped one for tiny and base")
    a("--init", default="", metavar="FILE",
      help="checkpoint to start from instead of random weights, with its autoencoder: train.py's last.pt or "
           "an exported one; the steps count from 0")
    a("--text-encoder", nargs="+", default=[], metavar="PATH",
      help="one or two local Hugging Face text encoders; none: byte transformer")
    a("--temporal", default="sti", choices=["sti", "conv3d", "gated"], help="mixes frames (Table 3)")
    a("--steps", type=int, default=None, help=f"updates of DFGN ({recipe})")
    a("--batch-size", type=int, default=None, help=f"clips per process and micro-step ({recipe})")
    a("--accumulation", type=int, default=None, help=f"micro-steps per update ({recipe}, else 1)")
    a("--lr", type=float, default=None, help=f"peak learning rate ({recipe})")
    a("--schedule", default=None, choices=["constant", "cosine"], help=f"of lr after warm-up ({recipe})")
    a("--warmup", type=int, default=None, help=f"updates of linear warm-up, 0 = none ({recipe})")
    a("--weight-decay", type=float, default=0.01, help="of AdamW (Table 6)")
    a("--grad-clip", type=float, default=1.0, help="largest gradient norm, 0 = no clipping")
    a("--ema", type=float, default=None, help=f"decay of the averaged weights, 0 = none ({recipe})")
    a("--vae-steps", type=int, default=None, help=f"updates of the autoencoder ({recipe})")
    a("--vae-batch-size", type=int, default=None, help=f"pictures per process and update ({recipe})")
    a("--vae-lr", type=float, default=1e-3, help="peak learning rate of the autoencoder")
    a("--vae-kl", type=float, default=1e-5, help="weight of the KL term")
    a("--curriculum", default="adaptive", choices=["none", "linear", "adaptive"], help="Table 4: -, LCL, DCL")
    a("--tasks", default=",".join(TASKS), help="comma-separated subset to train")
    a("--min-frames", type=int, default=1, help="stickers and clips with fewer frames are left out, 1: none")
    a("--drop", type=float, default=0.05, help="probability of dropping text and image, and of text alone")
    a("--word-drop", type=float, default=0.2, help="probability with which a word of the caption becomes #")
    a("--high-noise", type=float, default=1.0,
      help="noise steps of clips from text alone are 1000 u^(1/x), u uniform: 1 is uniform (paper); 3 puts "
           "half of them above 800, where the caption decides (ours)")
    a("--seed", type=int, default=0, help="of weights and every draw")
    a("--device", default="auto", help="auto, cpu, cuda or mps")
    a("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 where it is fast")
    a("--compile", action="store_true", help="torch.compile the network")
    a("--checkpointing", action="store_true", help="recompute layers in the backward: less memory, slower")
    a("--workers", type=int, default=0, help="loader processes, 0 = load in the main one (enough for stores)")
    a("--save-every", type=int, default=200, help="updates between checkpoints, 0 = only at the end")
    a("--keep-every", type=int, default=0, help="updates between numbered checkpoints, 0 = none")
    a("--sample-every", type=int, default=0, help="updates between sample sheets, 0 = only at the end")
    a("--eval-every", type=int, default=100, help="updates between held-out losses, 0 = never")
    a("--log-every", type=int, default=10, help="updates between lines of log.jsonl")
    a("--patience", type=int, default=20, help="stop after this many non-finite losses in a row")
    a("--max-updates", type=int, default=0, help="save and stop after this many updates, 0 = no limit")
    a("--tensorboard", action="store_true", help="also write TensorBoard events (needs tensorboard)")
    a("--export", default="", metavar="FILE",
      help="write the averaged weights of OUT/last.pt (--stage vae: OUT/vae.pt) in half precision and stop")
    a("--dry-run", action="store_true", help="print the plan and the time of three updates, write nothing")
    return p


# ------------------------------------------------------------------------------------------------------------
# Where we run


class Context:
    """Device, ranks and precision. LOCAL_RANK picks the device, RANK the share of the work."""

    def __init__(self, args):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        local, kind = int(os.environ.get("LOCAL_RANK", 0)), args.device
        if kind == "auto":
            mps = torch.backends.mps.is_available()
            kind = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        try:
            self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise DataError(f"--device {args.device}: not usable here ({first_line(e)}); try --device cpu")
        kind = self.device.type
        if kind == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1 and not dist.is_initialized():
            # the others wait while the main process evaluates, samples and saves
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=1))
        self.bf16 = args.precision == "bf16" or args.precision == "auto" and has_bf16(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def agree(self, value, what):
        """DataError unless all processes hold the same integer. Also a barrier."""
        if self.world > 1:
            x = torch.tensor([value, -value], device=self.device)
            dist.all_reduce(x, dist.ReduceOp.MAX)
            if int(x[0]) != -int(x[1]):
                raise DataError(f"{what}: processes see different files; all machines must share it")


def has_bf16(device):
    """Hardware with bf16 arithmetic; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    cpu = torch.cpu
    return device.type == "cpu" and (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


# ------------------------------------------------------------------------------------------------------------
# Samples: everything about sample g of the run follows from (seed, g)


@lru_cache(maxsize=2)
def permutation(seed, epoch, count):
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def item_of(items, seed, g):
    """The sticker of global sample g: every sticker once per epoch, in an order of its own each time."""
    epoch, place = divmod(g, len(items))
    return int(items[permutation(seed, epoch, len(items))[place]])


class Clips(Dataset):
    """Global sample index g -> (clip (F, c, h, w) fp32, n, caption, g). `finish` adds masks and noise."""

    def __init__(self, stickers, items, seed, frames, shortest=1):
        self.stickers, self.items, self.seed = stickers, items, seed
        self.frames, self.shortest = frames, shortest

    def __getitem__(self, g):
        item = item_of(self.items, self.seed, g)
        rng = np.random.default_rng([self.seed, 2, g])
        clip, n = draw_clip(self.stickers, item, rng, self.frames, self.shortest)
        return torch.from_numpy(clip), n, self.stickers.caption(item), g


class Pictures(Dataset):
    """Global sample index g -> (picture (4, size, size) premultiplied in [0, 1], g), flipped half the time.

    Of stored pictures that are larger, half are shrunk and half are cut out at random: the autoencoder is
    convolutional, and so learns two scales for the price of the smaller (ours).
    """

    def __init__(self, stickers, items, seed, size):
        self.stickers, self.items, self.seed, self.size = stickers, items, seed, size

    def __getitem__(self, g):
        entry = self.stickers.index[item_of(self.items, self.seed, g)]
        rng = np.random.default_rng([self.seed, 4, g])
        x = self.stickers.frames[int(entry["offset"]) + int(rng.integers(int(entry["count"])))]
        x = torch.from_numpy(np.array(x)).float() / 255
        if spare := x.shape[-1] - self.size:
            if rng.random() < 0.5:
                top, left = rng.integers(spare + 1, size=2)
                x = x[:, top:top + self.size, left:left + self.size]
            else:
                x = F.interpolate(x[None], self.size, mode="area")[0]
        return x.flip(-1) if rng.random() < 0.5 else x, g


def collate(rows):
    """list of samples -> their pictures or clips stacked, everything else as tuples."""
    x, *rest = zip(*rows)
    return (torch.stack(x), *rest)


def finish(batch, text, curriculum, weights, args, frames):
    """Task, masks, dropping, noise and noise step of each clip -> kwargs of RDTF.forward, task numbers (b,).

    Text and given frames are dropped here and nowhere else (the release drops text for i2v; dropping for
    two-scale guidance is ours: it needs (no text, no image) and (no text, image) to be trained).
    """
    clips, ns, captions, gs = batch
    tasks, texts, cond, real, t, noise = [], [], [], [], [], []
    for n, caption, g in zip(ns, captions, gs):
        rng = np.random.default_rng([args.seed, 3, g])
        task = curriculum.draw(weights, n, rng)
        given, frame = make_masks(task, n, frames, rng=rng)
        caption = drop_words(caption, rng, args.word_drop)
        u = rng.random()
        tasks.append(TASKS.index(task))
        texts.append("" if task == "i2v" or u < 2 * args.drop else caption)
        cond.append(given & (u >= args.drop))
        real.append(frame)
        t.append(int(1000 * rng.random() ** (1 / args.high_noise if task == "t2v" else 1)))
        noise.append(rng.standard_normal(clips.shape[1:], dtype=np.float32))
    noise, cond, real = (torch.from_numpy(np.stack(x)) for x in (noise, cond, real))
    kwargs = dict(x0=clips, noise=noise, t=torch.tensor(t), text=text.tokenize(texts), cond_mask=cond,
                  frame_mask=real)
    return kwargs, torch.tensor(tasks)


def global_indices(step, micro, batch, accumulation, ctx):
    """The samples of this process in micro-step `micro` of update `step`: a slice of the update's."""
    first = (step * accumulation + micro) * batch * ctx.world + ctx.rank * batch
    return list(range(first, first + batch))


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
    except (OSError, RuntimeError) as e:                           # torch reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        cause = e if isinstance(e, OSError) else e.__context__ or e
        raise DataError(f"{path}: cannot be written ({first_line(cause)}); the checkpoint before is intact. "
                        f"Make room on the disk and run the same command again")


def load_checkpoint(path, stage):
    """-> dict; opens tensors and numbers only (a pickle that wants to run code is refused)."""
    try:
        data = read_weights(path)
    except Exception as e:                                          # whatever a broken file makes torch raise
        raise DataError(f"{path}: not a checkpoint that can be opened safely ({type(e).__name__}); move it "
                        f"away or choose another --out")
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("stage") != stage:
        raise DataError(f"{path}: no {stage} checkpoint of format {FORMAT}; choose another --out")
    return data


def check_config(path, saved, config, stage):
    """DataError unless the checkpoint was made with this configuration; sampling defaults may differ."""
    try:
        old = asdict(Config(**saved["config"]))
    except (TypeError, ValueError, KeyError):
        old = {}
    for key, value in config.items():
        vae = key.startswith("vae_") or key in ("size", "latent_channels")
        if key not in ("text_scale", "image_scale") and (vae or stage == "main") and old.get(key) != value:
            raise DataError(f"{path}: made with {key} = {old.get(key)}, this run has {value}; choose "
                            f"another --out, or the --preset and flags it was made with")


def write_line(path, line):
    """Append a line to log.jsonl; what is not finite becomes null, which every JSON reader takes."""
    def clean(x):
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x
    with open(path, "a") as f:
        f.write(json.dumps(clean(line)) + "\n")


def trim_log(path, stage, step):
    """Drop what this stage logged after update `step`, where it resumes, and half-written lines."""
    if not path.exists():
        return
    keep = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step or (line["stage"] == "vae") != (stage == "vae"):
                keep.append(text + "\n")
        except (ValueError, KeyError, TypeError):
            pass
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(keep))
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------------------
# The loop. Both stages run through it.


def learning_rate(step, peak, warmup, schedule, steps):
    """At an update (from 0): linear warm-up, then constant (paper) or half a cosine to peak / 20 (ours)."""
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if schedule == "constant":
        return peak * ramp
    return peak * ramp * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(steps, 1)))))


def ema_decay(step, decay):
    """Short at first, so that the average forgets the random start (ours)."""
    return min(decay, (1 + step) / (10 + step))


class MainStage:
    """DFGN. What `fit` needs of a stage: names, numbers, module(**kwargs) -> losses (b,), batch()."""

    name, file = "main", "last.pt"
    groups = TASKS + ("q1", "q2", "q3", "q4")   # what losses are split by: tasks, quartiles of the noise step

    def __init__(self, model, dataset, args, ctx):
        self.module, self.dataset, self.args, self.ctx = model, dataset, args, ctx
        self.steps, self.batch_size, self.accumulation = args.steps, args.batch_size, args.accumulation
        self.lr, self.warmup, self.schedule = args.lr, args.warmup, args.schedule
        self.curriculum = Curriculum(args.curriculum, args.steps, args.tasks.split(","))

    def batch(self, raw, step):
        """-> kwargs of the module, (b, groups) table of how much each clip's loss counts for each group."""
        cur, text, frames = self.curriculum, self.module.text, self.module.cfg.frames
        kwargs, tasks = finish(raw, text, cur, cur.weights(step), self.args, frames)
        # reported per real frame: the training loss weighs a clip by its n / F
        real, rows = kwargs["frame_mask"].float().mean(1), torch.arange(len(tasks))
        table = torch.zeros(len(tasks), len(self.groups))
        table[rows, tasks] = real
        table[rows, len(TASKS) + kwargs["t"] // 250] = real
        return kwargs, table


class VAEStage:
    name, file, groups = "vae", "vae.pt", ()

    def __init__(self, module, dataset, args, ctx):
        self.module, self.dataset, self.args, self.ctx = module, dataset, args, ctx
        self.steps, self.batch_size, self.accumulation = args.vae_steps, args.vae_batch_size, 1
        self.lr, self.warmup, self.schedule = args.vae_lr, min(50, args.vae_steps), "cosine"
        self.curriculum = Curriculum("none", args.vae_steps)                # it keeps the loss history

    def batch(self, raw, step):
        (x, gs), vae = raw, self.module.vae
        shape = (vae.latent_channels, x.shape[2] // vae.f, x.shape[3] // vae.f)
        noise = [np.random.default_rng([self.args.seed, 5, g]).standard_normal(shape, np.float32) for g in gs]
        return dict(x=x, noise=torch.from_numpy(np.stack(noise))), torch.zeros(len(gs), 0)


class Indices:
    """Batch sampler: the global indices of this process, from an update on, for ever."""

    def __init__(self, stage, step):
        self.stage, self.step = stage, step

    def __iter__(self):
        s, step = self.stage, self.step
        while True:
            for micro in range(s.accumulation):
                yield global_indices(step, micro, s.batch_size, s.accumulation, s.ctx)
            step += 1


class Log:
    """Statistics of updates; every --log-every of them become a line of log.jsonl and of the progress bar."""

    def __init__(self, stage, out, start, window):
        self.stage, self.path, self.every, ctx = stage, out / "log.jsonl", stage.args.log_every, stage.ctx
        self.writes = ctx.main and not stage.args.dry_run
        self.window, self.since, self.updates, self.waited = window, 0.0, 0, 0.0
        self.writer = tensorboard(out) if stage.args.tensorboard and self.writes else None
        if self.writes:
            trim_log(self.path, stage.name, start)
        self.bar = tqdm(total=stage.steps, initial=start, desc=stage.name, disable=not self.writes,
                        dynamic_ncols=True, mininterval=1.0)

    def add(self, step, statistics, clock, waited):
        """statistics: [loss, gradient norm, sums per group, weights per group]; clock: seconds trained."""
        self.bar.update(1)
        self.window.append(statistics)
        self.updates, self.waited = self.updates + 1, self.waited + waited
        if step % self.every and step < self.stage.steps:
            return
        s, means, k = self.stage, np.mean(self.window, 0), len(self.stage.groups)
        sums, weights = means[2:2 + k], means[2 + k:]
        line = {"step": step, "stage": s.name, "loss": float(means[0]), "grad_norm": float(means[1]),
                "lr": learning_rate(step - 1, s.lr, s.warmup, s.schedule, s.steps)}
        ease = ""
        if k:
            mix = dict(zip(s.curriculum.tasks, s.curriculum.weights(step).round(4).tolist()))
            line["groups"] = {g: float(a / b) for g, a, b in zip(s.groups, sums, weights) if b > 0}
            line["mix"] = mix
            ease = f" gen {100 * sum(mix.get(t, 0) for t in GENERATION):.0f}%"
        # training only, without evaluation, sampling and saving; data: share of it spent on making batches
        seconds = max(clock - self.since, 1e-9)
        rate = self.updates * s.batch_size * s.accumulation * s.ctx.world / seconds
        line["time"] = {"seconds": round(seconds, 3), "samples_per_second": round(rate, 2),
                        "data": round(self.waited / seconds, 4)}
        if self.writes:
            write_line(self.path, line)
        if self.writer:
            for key in ("loss", "grad_norm", "lr"):
                self.writer.add_scalar(f"{s.name}/{key}", line[key], step)
        self.bar.set_postfix_str(f"loss {line['loss']:.4f}{ease} {rate:.1f}/s")
        self.window.clear()
        self.since, self.updates, self.waited = clock, 0, 0.0

    def close(self):
        self.bar.close()
        if self.writer:
            self.writer.close()


def tensorboard(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DataError("--tensorboard needs the optional package tensorboard: pip install tensorboard")
    return SummaryWriter(str(out))


STOP = {"since": 0.0}                                # when the first signal came


def on_signal(number, frame):
    """SIGTERM, Ctrl-C: stop after this update. torchrun repeats a Ctrl-C: a quick second one is ignored."""
    now = time.monotonic()
    if not STOP["since"]:
        STOP["since"] = now
        # not print, which may have been interrupted and cannot be entered twice
        os.write(2, b"\nstopping after this update; Ctrl-C once more to stop at once\n")
    elif number == signal.SIGINT and now - STOP["since"] > 2:
        raise KeyboardInterrupt


def quiet_worker(index):
    """Loader workers leave signals to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fit(stage, out, extra, callbacks=()):
    """Train a stage to its last update, resuming from `out`/`stage.file`. -> (EMA dict, finished?).

    extra: what the checkpoint carries besides (config, vae, ..). callbacks: (every, f(step, ema)), run by the
    main process every so many updates and after the last; every = 0: never.
    """
    args, ctx, cur = stage.args, stage.ctx, stage.curriculum
    module = stage.module.to(ctx.device).train()
    names, params = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad))
    optimizer = torch.optim.AdamW(params, lr=stage.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                  fused=ctx.device.type in ("cuda", "cpu"))
    ema = {n: p.detach().float().clone() for n, p in zip(names, params)} if args.ema else {}
    path, start, window = out / stage.file, 0, []
    if path.exists() and not args.dry_run:
        saved = load_checkpoint(path, stage.name)
        check_config(path, saved, extra["config"], stage.name)
        if saved.get("vae_id") != extra.get("vae_id"):
            raise DataError(f"{path}: made with another autoencoder; name that with --vae, or another --out")
        try:
            module.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            cur.load_state_dict(saved["curriculum"])
            ema = {n: saved["ema"][n].to(ctx.device) if n in saved["ema"] else v for n, v in ema.items()}
            start, window = saved["step"], saved.get("window", [])
        except (KeyError, ValueError, RuntimeError, TypeError) as e:
            raise DataError(f"{path}: does not fit this version ({first_line(e)}); choose another --out")
        if saved.get("fingerprint") != extra["fingerprint"] and ctx.main:
            print(f"note: the data changed since {path} was written; the run goes on with what is there now")
    ctx.agree(start, f"--out {out}")
    if start >= stage.steps:
        return ema, True
    for group in optimizer.param_groups:                             # flags win over what the checkpoint says
        group["weight_decay"] = args.weight_decay
    cuda = ctx.device.type == "cuda"
    net = module
    if ctx.world > 1:
        net = DDP(module, device_ids=[ctx.device.index] if cuda else None, broadcast_buffers=False)
    loader = iter(DataLoader(stage.dataset, batch_sampler=Indices(stage, start), num_workers=args.workers,
                             collate_fn=collate, pin_memory=cuda, worker_init_fn=quiet_worker))
    global_batch, k = stage.batch_size * stage.accumulation * ctx.world, len(stage.groups)
    log, pending, bad = Log(stage, out, start, window), None, 0

    def micro_batch(step):
        kwargs, table = stage.batch(next(loader), step)
        return to_device(kwargs, ctx.device), table.to(ctx.device, non_blocking=True)

    def update(step):
        """One update of the weights -> [loss, norm, groups, stop] on the device, seconds spent on batches."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.lr, stage.warmup, stage.schedule, stage.steps)
        stats, waited = torch.zeros(3 + 2 * k, device=ctx.device), 0.0
        for micro in range(stage.accumulation):
            began = time.perf_counter()
            kwargs, table = micro_batch(step)
            waited += time.perf_counter() - began
            last = micro == stage.accumulation - 1
            with nullcontext() if last or ctx.world == 1 else net.no_sync():
                with ctx.autocast():
                    losses = net(**kwargs)                                  # (b,)
                # DDP averages gradients over ranks, the loss is a sum over the global batch: undo the average
                (losses.sum() * (ctx.world / global_batch)).backward()
            losses = losses.detach().float()
            stats[0] += losses.sum() / global_batch
            stats[2:2 + k] += torch.where(table > 0, losses[:, None], 0.0).sum(0)
            stats[2 + k:2 + 2 * k] += table.sum(0)
        norm = torch.nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf)
        for p in params:                                                    # a broken gradient counts as zero
            if p.grad is not None:
                p.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            torch._foreach_lerp_(list(ema.values()), [p.detach().float() for p in params],
                                 1 - ema_decay(step, args.ema))
        stats[-1] = float(STOP["since"] > 0)
        if ctx.world > 1:
            dist.all_reduce(stats)                                # sums: every rank has its share of the mean
        stats[1] = norm
        return stats, waited

    def read():
        """The statistics of the update before, long done: nobody waits for the GPU. -> stop, on all ranks?"""
        nonlocal pending, bad
        if pending is None:
            return False
        (step, stats, clock, waited), pending = pending, None
        *values, stop = stats.tolist()
        cur.record(values[0])
        bad = 0 if math.isfinite(values[0]) else bad + 1
        log.add(step, values, clock, waited)
        if bad >= args.patience or bad and step == stage.steps:
            raise DataError(f"the loss was not finite for the last {bad} update(s), up to {step}; {path} was "
                            f"not touched since. Lower --lr, raise --warmup or try --precision fp32")
        return stop > 0

    def save(step, file=path):
        if ctx.main and bad == 0:
            save_checkpoint(file, {
                "format": FORMAT, "stage": stage.name, "step": step, "model": module.state_dict(), "ema": ema,
                "optimizer": optimizer.state_dict(), "curriculum": cur.state_dict(),
                "window": log.window, **extra})

    if args.dry_run:
        print_plan(stage, net, params, lambda: micro_batch(0)[0], update)
        return ema, False
    clock, last, step = 0.0, time.perf_counter(), start
    with closing(log):
        for step in range(start + 1, stage.steps + 1):
            # ----------------------------------------------------------------------------------- one update
            stats, waited = update(step - 1)
            stop = read()
            now = time.perf_counter()
            clock, last = clock + now - last, now
            pending = (step, stats, clock, waited)
            # ---------------------------------------------------------------------------- once in a while
            final, limit = step == stage.steps, args.max_updates and step - start >= args.max_updates
            saving, keeping = (n and step % n == 0 for n in (args.save_every, args.keep_every))
            due = [f for n, f in callbacks if n and (final or step % n == 0)]
            if stop or limit or final or due or saving or keeping:
                stop = read() or stop                           # the newest loss is part of what is saved
                if stop:                                        # who stops us may not wait for samples
                    save(step)
                for f in due:                                   # before saving: the log holds all that a
                    if ctx.main:                                # checkpoint has behind it
                        f(step, ema)
                if limit or final or saving:
                    save(step)
                if keeping:
                    save(step, path.with_name(f"{path.stem}-{step:07d}.pt"))
                last = time.perf_counter()
            if stop or limit:
                break
    return ema, step == stage.steps


def print_plan(stage, net, params, batch, update):
    """--dry-run: memory, the time of three updates, and what the whole stage takes."""
    ctx, saved, own = stage.ctx, {}, {p.untyped_storage().data_ptr() for p in params}

    def note(x):
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    if ctx.device.type != "cuda":
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), ctx.autocast():
            net(**batch()).sum().backward()
        net.zero_grad()
    times = []
    for i in range(4):                                                      # the first one warms up
        began = time.perf_counter()
        update(i)[0].tolist()                                               # waits for the device
        times.append(time.perf_counter() - began)
    weights = (20 if stage.args.ema else 16) * sum(p.numel() for p in params)  # with gradient and two moments
    memory = f"weights, gradients, moments and EMA {weights / 2 ** 30:.2f} GiB"
    if ctx.device.type == "cuda":
        memory += f", peak on the GPU {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB"
    else:
        memory += f", activations {sum(saved.values()) / 2 ** 30:.2f} GiB per micro-step"
    seconds = sorted(times[1:])[1]
    if ctx.main:
        print(f"memory per process: {memory}\n"
              f"time: {seconds:.2f} s per update (median of 3), {stage.steps} updates of stage {stage.name} "
              f"take about {stage.steps * seconds / 3600:.1f} hours. Nothing was written.")


# ------------------------------------------------------------------------------------------------------------
# The two stages


def train_vae(cfg, stickers, items, args, ctx, out):
    """-> AutoencoderKL (frozen, EMA weights, statistics measured), or None if stopped early."""
    path = out / VAEStage.file
    saved = load_checkpoint(path, "vae") if path.exists() and not args.dry_run else {}
    whole = "vae" in saved and saved["step"] >= args.vae_steps
    ctx.agree(int(whole), f"--out {out}")
    if whole:
        check_config(path, saved, asdict(cfg), "vae")
        return load_vae(path).to(ctx.device)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(cfg)
    stage = VAEStage(VAEStep(vae, args.vae_kl), Pictures(stickers, items, args.seed, cfg.size), args, ctx)
    extra = {"config": asdict(cfg), "fingerprint": stickers.meta["fingerprint"], "args": vars(args)}
    ema, finished = fit(stage, out, extra)
    if not finished:
        return None
    with ema_weights(stage.module, ema):                                 # averaged weights become the weights
        state = {k: v.detach().clone() for k, v in vae.state_dict().items()}
    vae.load_state_dict(state)
    vae.eval().requires_grad_(False)
    measure_statistics(vae, stickers, items, args.seed)
    if ctx.main:
        state = {k: v.cpu() for k, v in vae.state_dict().items()}
        save_checkpoint(path, load_checkpoint(path, "vae") | {"vae": state})
    return vae


@torch.no_grad()
def measure_statistics(vae, stickers, items, seed, most=2048):
    """Mean and std of the raw latents per channel over (a sample of) the training frames."""
    entries = stickers.index[items[:20 * most]]
    frames = np.concatenate([int(e["offset"]) + np.arange(int(e["count"])) for e in entries])
    if len(frames) > most:
        frames = np.sort(np.random.default_rng([seed, 6]).choice(frames, most, replace=False))
    parts = []
    for chunk in np.array_split(frames, max(1, len(frames) // 64)):
        x = torch.from_numpy(np.array(stickers.frames[chunk])).to(vae.mean.device).float() / 255
        parts.append(vae.moments(x)[0])
    vae.set_statistics(torch.cat(parts))


def validation_batch(stickers, items, text, tasks, frames, count=48):
    """Fixed clips, noise, steps and masks: updates and runs can be compared -> (kwargs, task numbers).

    Every task of `tasks` sees the same clips and the same noise steps, spread evenly; about `count` in all.
    """
    fixed = argparse.Namespace(seed=1234, drop=0.0, word_drop=0.0, high_noise=1.0)
    moving = items[stickers.index["count"][items] > 1]
    clips = Clips(stickers, moving if len(moving) else items, fixed.seed, frames)
    each, parts = max(count // len(tasks), 1), []
    for i, task in enumerate(tasks):
        weights = np.eye(len(TASKS))[TASKS.index(task)]                     # this task and no other
        for j in range(each):
            clip, n, caption, _ = clips[j]
            if allowed(task, n):
                one = collate([(clip, n, caption, i * each + j)])
                kwargs, group = finish(one, text, Curriculum("none", 1), weights, fixed, frames)
                kwargs["t"] = torch.tensor([int((j + 0.5) * 1000 / each)])
                parts.append((kwargs, group))

    def join(values):
        return [torch.cat(x) for x in zip(*values)] if isinstance(values[0], list) else torch.cat(values)

    kwargs, groups = zip(*parts)
    return {key: join([x[key] for x in kwargs]) for key in kwargs[0]}, torch.cat(groups)


@torch.no_grad()
def validate(module, batch, groups, ctx, chunk=8):
    """-> {"loss", task: loss per real frame} of the module's present weights on the fixed batch."""
    was, losses = module.training, []
    module.eval()
    for i in range(0, len(groups), chunk):
        rows = slice(i, i + chunk)
        part = {k: [x[rows] for x in v] if isinstance(v, list) else v[rows] for k, v in batch.items()}
        with ctx.autocast():
            losses.append(module(**to_device(part, ctx.device)).float().cpu())
    module.train(was)
    losses, real = torch.cat(losses), batch["frame_mask"].float().mean(1)
    split = {"loss": groups >= 0} | {t: groups == i for i, t in enumerate(TASKS) if (groups == i).any()}
    return {name: float(losses[x].sum() / real[x].sum()) for name, x in split.items()}


def train_main(cfg, vae, stickers, train_items, held_items, args, ctx, out):
    """-> finished? Leaves last.pt, log.jsonl; at the end samples.png, one sticker per mode and loss.png."""
    torch.manual_seed(args.seed)
    model = RDTF(cfg, args.text_encoder)
    if args.init and not (out / MainStage.file).exists():               # else the run goes on from there
        given = load_model(args.init, flag="--init")
        check_config(args.init, {"config": asdict(given.cfg)}, asdict(cfg), "main")
        if given.vae.id != vae.id:
            raise DataError(f"--init {args.init}: was trained with another autoencoder; leave --vae out")
        model.load_state_dict(given.model.state_dict())
    model.to(ctx.device)
    if ctx.main:
        print_parts(model, vae)
    model.net.checkpointing = args.checkpointing
    if args.compile:  # in place: state-dict names stay as they are. The autoencoder is left alone: torch 2.13
        # on a CPU compiles the decoder's bf16 backward pass to zeros (measured: benchmarks/README.md)
        model.net.compile()
    stage = MainStage(model, Clips(stickers, train_items, args.seed, cfg.frames, args.min_frames), args, ctx)
    extra = {"config": asdict(cfg), "args": vars(args), "fingerprint": stickers.meta["fingerprint"],
             "vae": {k: v.cpu() for k, v in vae.state_dict().items()}, "vae_id": vae.id,
             "text_encoder": list(args.text_encoder)}
    shown, tasks = held_items if len(held_items) else train_items, args.tasks.split(",")
    if ctx.main and not len(held_items):
        print("note: no sticker is held out; evaluation and samples use training stickers")
    fixed = validation_batch(stickers, shown, model.text, tasks, cfg.frames)

    def eager():  # evaluation and sampling come in other batch sizes; compiling for each would take minutes
        return torch.compiler.set_stance("force_eager") if args.compile else nullcontext()

    def evaluate(step, ema):
        with ema_weights(model, ema), eager():
            write_line(out / "log.jsonl", {"step": step, "stage": "eval", **validate(model, *fixed, ctx)})

    def show(step, ema, name="samples-{:07d}", stickers_too=False):
        with ema_weights(model, ema), eager():
            sample_sheet(Loaded(model, vae, cfg, {}), stickers, shown, tasks, out, name.format(step), ctx,
                         stickers_too)

    ema, finished = fit(stage, out, extra, callbacks=[(args.eval_every, evaluate), (args.sample_every, show)])
    if finished and ctx.main:
        plot, checkpoint = out / "loss.png", out / stage.file
        # the plot is written last
        if plot.exists() and plot.stat().st_mtime >= checkpoint.stat().st_mtime:
            print(f"{checkpoint} has all its {args.steps} updates already; raise --steps to go on")
        else:
            show(args.steps, ema, "samples", stickers_too=True)
            plot_log(out / "log.jsonl", plot)
    return finished


@torch.no_grad()
def sample_sheet(loaded, stickers, items, tasks, out, name, ctx, stickers_too=False, steps=25):
    """Contact sheet of fixed inputs: what is stored, then what the network makes in each trained mode."""
    was = loaded.model.training
    loaded.model.eval()
    modes = [t for t in ("t2v", "it2v", "predict_post", "interpolate") if t in tasks] or tasks
    moving = [i for i in items if stickers.index["count"][i] > 1][:2] or list(items[:1])
    rows, labels = [], []
    for j, item in enumerate(moving):
        z, n = draw_clip(stickers, item, np.random.default_rng([7, int(item)]), loaded.cfg.frames)
        truth = loaded.vae.decode(torch.from_numpy(z).to(ctx.device))
        caption = stickers.caption(item)
        rows.append(to_straight(truth[:n].cpu()))
        labels.append(f"truth: {caption}")
        for task in (t for t in modes if allowed(t, n)):
            cond, real = make_masks(task, n, loaded.cfg.frames, at=choices(task, n)[0])
            text = "" if task == "i2v" else caption
            clip = sample_clips(loaded, [text], truth[None], cond[None], real[None], steps=steps,
                                sampler="dpm", seeds=[j])
            rows.append(to_straight(clip[0, :n].cpu()))
            labels.append(task)
            if stickers_too and j == 0:
                write_sticker(out / f"{task}.webp", rows[-1], 125)
    save_sheet(out / f"{name}.png", rows, labels)
    loaded.model.train(was)


def plot_log(log_path, png):
    """Losses over updates: training (grey dots) and held-out per task (lines), logarithmic."""
    lines = [json.loads(x) for x in Path(log_path).read_text().splitlines()]
    colours = ("#d62728", "#ff7f0e", "#8c564b", "#1f77b4", "#17becf", "#2ca02c")
    series = [("train", "#999999", [(x["step"], x["loss"]) for x in lines if x["stage"] == "main"])]
    series += [(t, c, [(x["step"], x[t]) for x in lines if x["stage"] == "eval" and t in x])
               for t, c in zip(TASKS, colours)]
    series = [(name, colour, [p for p in s if p[1]]) for name, colour, s in series]     # null: was not finite
    points = [p for _, _, s in series for p in s]
    if not points:
        return
    w, h, m = 800, 480, 50
    right, logs = max(p[0] for p in points), [math.log10(p[1]) for p in points]
    low, high = min(logs), max(max(logs), min(logs) + 1e-3)
    image = Image.new("RGB", (w, h), "white")
    draw = ImageDraw.Draw(image)

    def place(p):
        return m + (w - 2 * m) * p[0] / right, h - m - (h - 2 * m) * (math.log10(p[1]) - low) / (high - low)

    draw.rectangle((m, m, w - m, h - m), outline="#444444")
    for i in range(5):
        v = 10 ** (low + (high - low) * i / 4)
        draw.text((4, place((0, v))[1] - 6), f"{v:.3f}", fill="#444444")
        draw.text((m + (w - 2 * m) * i / 4 - 10, h - m + 6), f"{right * i // 4}", fill="#444444")
    for i, (name, colour, s) in enumerate(series):
        if name == "train":
            for x, y in map(place, s):
                draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=colour)
        elif len(s) > 1:
            draw.line([place(p) for p in s], fill=colour, width=2)
        draw.text((m + 8 + 105 * i, m - 18), name, fill=colour)
    draw.text((w // 2 - 60, h - 18), "loss per real frame, over updates", fill="#444444")
    image.save(png)


def print_parts(model, vae):
    net = model.net
    parts = {"condition encoder": net.condition_encoder, "transformer_in": net.transformer_in,
             "down": net.down, "mid": net.mid, "up": net.up, "DFGN": net, "text": model.text,
             "autoencoder (frozen)": vae}
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()}
    print("parameters: " + ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in count.items()))


# ------------------------------------------------------------------------------------------------------------
# Start

LOWEST = {  # what flags may be at least, and at most
    **dict.fromkeys("steps batch_size accumulation vae_batch_size log_every patience min_frames "
                    "high_noise".split(), 1),
    **dict.fromkeys("vae_steps warmup workers save_every keep_every sample_every eval_every max_updates seed "
                    "lr vae_lr vae_kl weight_decay grad_clip ema drop word_drop".split(), 0)}
HIGHEST = {"ema": 1, "drop": 0.5, "word_drop": 1}


def resolve(args):
    """Fill in the preset's recipe, check what can be checked before anything is loaded. -> (args, Config)."""
    if args.preset not in PRESETS:
        raise DataError(f"--preset {args.preset}: unknown; choose one of {', '.join(PRESETS)}")
    for key, value in {"accumulation": 1, **RECIPES[args.preset]}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or f"runs/{args.preset}"
    for key, low in LOWEST.items():
        value, high = getattr(args, key), HIGHEST.get(key, math.inf)
        if not low <= value <= high:
            wanted = f"choose {low} to {high}" if key in HIGHEST else f"must be at least {low}"
            raise DataError(f"--{key.replace('_', '-')} {value}: {wanted}")
    if args.init and args.vae == "train":
        raise DataError(f"--init {args.init} with --vae train: its autoencoder belongs to it; remove one")
    args.vae = args.vae or args.init
    shipped = HERE / SHIPPED
    if not args.vae and args.stage == "auto" and args.preset in ("tiny", "base") and shipped.exists():
        args.vae = str(shipped)
    if args.vae == "train":
        args.vae = ""
    if not set(args.tasks.split(",")) <= set(TASKS):
        raise DataError(f"--tasks {args.tasks}: choose from {','.join(TASKS)}")
    settings = dict(PRESETS[args.preset], temporal=args.temporal, text_dims=())
    if args.text_encoder:
        probe = FrozenText(Config(**settings), args.text_encoder)
        try:
            probe.load()
        except (ImportError, OSError, ValueError) as e:
            raise DataError(f"--text-encoder: {first_line(e)}")
        settings["text_dims"] = probe.widths()
    return args, Config(**settings)


def choose_items(stickers, args):
    """-> (training items, held-out items); held-out stickers are never trained on."""
    keep = stickers.index["count"] >= args.min_frames
    if not set(args.tasks.split(",")) & set(GENERATION):
        keep &= stickers.index["count"] > 1                     # nothing to predict or interpolate in a still
    train, held = (x[keep[x]] for x in (stickers.select("train"), stickers.select("held_out")))
    if not len(train):
        raise DataError(f"--data {args.data}: nothing is left to train on; lower --min-frames, widen --tasks")
    return train, held


def get_vae(cfg, stickers, items, args, ctx, out):
    """-> the autoencoder: --vae, else trained (--dry-run: as it starts); None if its training was stopped."""
    if args.vae:
        named = f"{'--init' if args.vae == args.init else '--vae'} {args.vae}"
        if not Path(args.vae).exists():
            raise DataError(f"{named}: no such file")
        try:
            vae = load_vae(args.vae)
        except Exception as e:                                      # whatever a broken file makes torch raise
            raise DataError(f"{named}: not an autoencoder that can be opened ({first_line(e)})")
        if (vae.f, vae.latent_channels) != (cfg.f, cfg.latent_channels):
            raise DataError(f"{named}: f = {vae.f} with {vae.latent_channels} channels, preset "
                            f"{args.preset} needs f = {cfg.f} with {cfg.latent_channels}")
        for key, value in vae.settings.items():                         # the configuration describes this one
            setattr(cfg, key, value)
        return vae.to(ctx.device)
    if stickers.meta["kind"] == "latents":
        raise DataError(f"--data {args.data}: holds latents; name their autoencoder with --vae")
    if args.dry_run and args.stage == "auto":
        return AutoencoderKL(cfg).to(ctx.device).eval().requires_grad_(False)
    if cfg.vae_channels == 3:
        raise DataError(f"--preset {args.preset} uses Stable Diffusion's autoencoder: add --vae FILE")
    if args.vae_steps < 1:
        raise DataError("--vae-steps 0: without --vae there must be at least 1")
    return train_vae(cfg, stickers, items, args, ctx, out)


def run(args):
    STOP["since"] = 0.0
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, on_signal)
    args, cfg = resolve(args)
    ctx, out = Context(args), Path(args.out)
    if ctx.main and not args.dry_run:
        out.mkdir(parents=True, exist_ok=True)
    stickers = open_stickers(args.data, cfg.size, larger=args.stage == "vae")
    train, held = choose_items(stickers, args)
    if ctx.main:
        batch = args.batch_size * args.accumulation * ctx.world
        static = int((stickers.index["count"][train] == 1).sum())
        print(json.dumps({"config": asdict(cfg), "flags": vars(args)}))
        print(f"{len(train)} training stickers ({static} static), {len(held)} held out; {ctx.world} "
              f"process(es) x batch {args.batch_size} x accumulation {args.accumulation} = {batch} clips per "
              f"update, {args.steps} updates = {args.steps * batch / len(train):.1f} epochs; {ctx.device}, "
              f"{'bf16 autocast' if ctx.bf16 else 'fp32'}")
    if args.dry_run:                                                  # a few stickers tell as much about time
        train, held = train[:8], held[:0]
        index = stickers.index[:train[-1] + 1]
        frames = stickers.frames[:int(index[-1]["offset"]) + int(index[-1]["count"])]
        stickers = Stickers(frames, index, stickers.text, stickers.meta)
    vae = get_vae(cfg, stickers, train, args, ctx, out)
    if vae is not None and args.stage == "auto":
        finished = train_main(cfg, vae, stickers.encode(vae), train, held, args, ctx, out)
        caption = shlex.quote(stickers.caption(int(train[0])))
        done = f"done: {out / 'last.pt'}, {out / 'samples.png'}, {out / 'loss.png'}. Next:\n" \
               f"  python sample.py --ckpt {shlex.quote(str(out / 'last.pt'))} --text {caption} --seeds 0-3"
    else:
        finished, done = vae is not None, f"done: {out / 'vae.pt'}. Next: the same without --stage vae"
    if ctx.main and not args.dry_run:
        print(done if finished else f"stopped; the same command goes on from {out}")


def export(args):
    """OUT/last.pt -> a small file that sample.py and --vae read: averaged weights, autoencoder, settings.

    With --stage vae OUT/vae.pt, the autoencoder alone.
    """
    stage = VAEStage if args.stage == "vae" else MainStage
    path = Path(args.out or f"runs/{args.preset}") / stage.file
    if not path.exists():
        raise DataError(f"--export: {path} does not exist; train first, or name the run with --out")
    data = load_checkpoint(path, stage.name)
    if "vae" not in data:
        raise DataError(f"--export: the training of {path} has not ended; the same command goes on")
    kept = ("format", "stage", "step", "config", "vae_id", "text_encoder", "fingerprint")
    small = {k: data[k] for k in kept if k in data}
    small["vae"] = {k: v.half() for k, v in data["vae"].items()}
    if stage is MainStage:
        small.update(ema={}, model={k: v.half() for k, v in {**data["model"], **data["ema"]}.items()})
    Path(args.export).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(args.export, small)
    print(f"{args.export}: {os.path.getsize(args.export) / 2 ** 20:.1f} MiB, update {data['step']}")


def main():
    args = parser().parse_args()
    keep_memory()
    try:
        if args.export:
            export(args)
        else:
            run(args)
    except DataError as e:
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"train.py: {e.filename or args.out}: {e.strerror or e}; is there room, may you write there?",
              file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as e:
        print(f"train.py: out of memory ({first_line(e)}); lower --batch-size and raise --accumulation, or "
              f"add --checkpointing", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
