"""Train RDTF: first the autoencoder (unless one is given), then DFGN with dual masks and the curriculum.

    python train.py                                          # built-in stickers, preset tiny, CPU or whatever is there
    torchrun --nproc_per_node 8 train.py --preset base --data data/fluent --out runs/fluent
    python train.py --dry-run --preset paper                 # the plan: parameters, memory, time; nothing is written
    python train.py --stage vae --data data/fluent           # the autoencoder only

The same command resumes where it was stopped, also after kill -9. Every draw is a pure function of (seed, update, global sample
index) and of the saved loss history, so neither the number of processes, nor accumulation, nor workers change the run.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from curriculum import GENERATION, TASKS, Curriculum, make_masks
from data import DataError, draw_clip, open_stickers, save_sheet, write_sticker
from rdtf import PRESETS, RDTF, AutoencoderKL, Config, VAEStep, drop_words, load_vae, read_weights
from sample import Loaded, ema_weights, sample_clips, to_straight

FORMAT = 1                                           # of checkpoints
BUILT_IN = Path(__file__).parent / "assets" / "stickers"
RECIPES = {  # what the flags of a preset default to
    "tiny": dict(steps=700, batch_size=8, lr=1e-3, vae_steps=900, vae_batch_size=16, ema=0.995, warmup=50, schedule="cosine"),
    "base": dict(steps=100_000, batch_size=16, lr=2e-4, vae_steps=20_000, vae_batch_size=32, ema=0.9999, warmup=1000, schedule="cosine"),
    # Table 6: 50 K updates, 16 GPUs x batch 1 x accumulation 6, lr 1e-5 constant
    "paper": dict(steps=50_000, batch_size=1, accumulation=6, lr=1e-5, vae_steps=0, vae_batch_size=8, ema=0.9999, warmup=0,
                  schedule="constant"),
}


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    a = p.add_argument
    recipe = "default: the preset's recipe"
    a("--data", default=str(BUILT_IN), help="folder of stickers, prepared store, or synthetic[:COUNT]")
    a("--out", default="", help="run folder; empty: runs/PRESET")
    a("--preset", default="tiny", help=f"size of everything: {', '.join(PRESETS)}")
    a("--stage", default="auto", choices=["auto", "vae"], help="vae: stop after the autoencoder; auto: autoencoder if needed, then DFGN")
    a("--vae", default="", help="autoencoder to use (a run's vae.pt, a checkpoint, or Stable-Diffusion weights); empty: train one")
    a("--text-encoder", nargs="+", default=[], metavar="PATH", help="one or two local Hugging Face text encoders; none: byte transformer")
    a("--temporal", default="sti", choices=["sti", "conv3d", "gated"], help="how a layer mixes frames (Table 3's ablation)")
    a("--steps", type=int, default=None, help=f"updates of DFGN ({recipe})")
    a("--batch-size", type=int, default=None, help=f"clips per process and micro-step ({recipe})")
    a("--accumulation", type=int, default=None, help=f"micro-steps per update ({recipe}, else 1)")
    a("--lr", type=float, default=None, help=f"peak learning rate ({recipe})")
    a("--schedule", default=None, choices=["constant", "cosine"], help=f"of the learning rate after warm-up ({recipe})")
    a("--warmup", type=int, default=None, help=f"updates of linear warm-up, 0 = none ({recipe})")
    a("--weight-decay", type=float, default=0.01, help="of AdamW (Table 6)")
    a("--grad-clip", type=float, default=1.0, help="largest gradient norm, 0 = no clipping")
    a("--ema", type=float, default=None, help=f"decay of the averaged weights, 0 = none ({recipe})")
    a("--vae-steps", type=int, default=None, help=f"updates of the autoencoder ({recipe})")
    a("--vae-batch-size", type=int, default=None, help=f"pictures per process and update ({recipe})")
    a("--vae-lr", type=float, default=1e-3, help="peak learning rate of the autoencoder")
    a("--vae-kl", type=float, default=1e-5, help="weight of the KL term")
    a("--curriculum", default="adaptive", choices=["none", "linear", "adaptive"], help="Table 4: equal weights, LCL, DCL")
    a("--tasks", default=",".join(TASKS), help="comma-separated subset to train")
    a("--min-frames", type=int, default=1, help="stickers with fewer frames than this are left out, 1 = keep all")
    a("--drop", type=float, default=0.05, help="probability of dropping text and given frames together, and of text alone")
    a("--word-drop", type=float, default=0.2, help="probability with which a word of the caption becomes #")
    a("--seed", type=int, default=0, help="of weights and every draw")
    a("--device", default="auto", help="auto, cpu, cuda or mps")
    a("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 autocast where the hardware has it")
    a("--compile", action="store_true", help="torch.compile the network")
    a("--checkpointing", action="store_true", help="recompute layers in the backward pass: less memory, about a third more time")
    a("--workers", type=int, default=0, help="loader processes, 0 = load in the main process (enough for stores)")
    a("--save-every", type=int, default=200, help="updates between checkpoints, 0 = only at the end")
    a("--keep-every", type=int, default=0, help="updates between numbered checkpoints that are kept, 0 = none")
    a("--sample-every", type=int, default=0, help="updates between sample sheets, 0 = only at the end")
    a("--eval-every", type=int, default=100, help="updates between held-out losses, 0 = never")
    a("--log-every", type=int, default=10, help="updates between lines of log.jsonl")
    a("--patience", type=int, default=20, help="stop after this many non-finite losses in a row")
    a("--max-updates", type=int, default=0, help="save and stop after this many updates of this start, 0 = no limit")
    a("--tensorboard", action="store_true", help="also write TensorBoard events (needs the tensorboard package)")
    a("--dry-run", action="store_true", help="print the plan and the time of three updates, write nothing")
    return p


# ----------------------------------------------------------------------------------------------------------------
# Where we run


class Context:
    """Device, ranks and precision, found by themselves. LOCAL_RANK picks the device, RANK the share of the work."""

    def __init__(self, args):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        kind = args.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise DataError(f"--device {args.device}: not usable here ({str(e).splitlines()[0]}); try --device cpu")
        if kind == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        self.bf16 = args.precision == "bf16" or args.precision == "auto" and has_bf16(self.device)
        self.main = self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def has_bf16(device):
    """Hardware with bf16 arithmetic; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# ----------------------------------------------------------------------------------------------------------------
# Samples: everything about sample g of update s follows from (seed, s, g)


@lru_cache(maxsize=2)
def permutation(seed, epoch, count):
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def item_of(items, seed, g):
    """The sticker of global sample g: every sticker once per epoch, in an order of its own each time."""
    epoch, place = divmod(g, len(items))
    return int(items[permutation(seed, epoch, len(items))[place]])


class Clips(Dataset):
    """Global sample index g -> (clip (F, c, h, w) fp32, n, caption, g). What depends on the curriculum is drawn in `finish`."""

    def __init__(self, stickers, items, seed, frames):
        self.stickers, self.items, self.seed, self.frames = stickers, items, seed, frames

    def __getitem__(self, g):
        item = item_of(self.items, self.seed, g)
        clip, n = draw_clip(self.stickers, item, np.random.default_rng([self.seed, 2, g]), self.frames)
        return torch.from_numpy(clip), n, self.stickers.caption(item), g


def collate(rows):
    clips, n, captions, g = zip(*rows)
    return torch.stack(clips), n, captions, g


def finish(batch, text, curriculum, weights, args, frames):
    """Task, masks, dropping, noise and noise step of each clip -> keyword arguments of RDTF.forward, and the tasks.

    Text and given frames are dropped here and nowhere else (the release drops text for i2v; dropping for two-scale guidance is ours:
    it needs (no text, no image) and (no text, image) to be trained).
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
        t.append(int(rng.integers(1000)))
        noise.append(rng.standard_normal(clips.shape[1:], dtype=np.float32))
    real = torch.from_numpy(np.stack(real))
    return dict(x0=clips, noise=torch.from_numpy(np.stack(noise)), t=torch.tensor(t), text=text.tokenize(texts),
                cond_mask=torch.from_numpy(np.stack(cond)), frame_mask=real), torch.tensor(tasks)


class Pictures(Dataset):
    """Global sample index g -> (picture (4, h, w) premultiplied in [0, 1], g): a random stored frame, mirrored half the time."""

    def __init__(self, stickers, items, seed):
        self.stickers, self.items, self.seed = stickers, items, seed

    def __getitem__(self, g):
        entry = self.stickers.index[item_of(self.items, self.seed, g)]
        rng = np.random.default_rng([self.seed, 4, g])
        x = self.stickers.frames[int(entry["offset"]) + int(rng.integers(int(entry["count"])))]
        x = torch.from_numpy(np.array(x)).float() / 255
        return x.flip(-1) if rng.random() < 0.5 else x, g


def global_indices(step, micro, batch, accumulation, ctx):
    """The sample indices of this process in micro-step `micro` of update `step`: a slice of the update's row of samples."""
    first = (step * accumulation + micro) * batch * ctx.world + ctx.rank * batch
    return list(range(first, first + batch))


def to_device(x, device):
    if isinstance(x, torch.Tensor):
        return x.to(device, non_blocking=True)
    return [to_device(y, device) for y in x] if isinstance(x, list) else x


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints: plain dicts of tensors, numbers and strings


def save_checkpoint(path, data):
    """Write beside, fsync, rename: whatever happens, `path` is a whole checkpoint, the old one or the new one."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as f:
            torch.save(data, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:                                    # torch reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({str(e).splitlines()[0]}); the last checkpoint is intact. "
                        f"Free some disk space and run the same command again")


def load_checkpoint(path, stage):
    """-> dict; opens tensors and numbers only (a pickle that wants to run code is refused)."""
    try:
        data = read_weights(path)
    except Exception as e:
        raise DataError(f"{path}: not a checkpoint that can be opened safely ({type(e).__name__}); move it away or choose another --out")
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("stage") != stage:
        raise DataError(f"{path}: not a {stage} checkpoint of format {FORMAT}; move it away or choose another --out")
    return data


def trim_log(path, step):
    """Drop what was logged after the checkpoint that is resumed from, also a half-written line."""
    if not path.exists():
        return
    keep = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                keep.append(line)
        except (ValueError, KeyError):
            break
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(x + "\n" for x in keep))
    os.replace(partial, path)


# ----------------------------------------------------------------------------------------------------------------
# The loop. Both stages run through it.


def learning_rate(step, peak, warmup, schedule, steps):
    """lr at an update (0-based): linear warm-up, then constant (paper) or half a cosine to a twentieth of the peak (ours)."""
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if schedule == "constant":
        return peak * ramp
    return peak * ramp * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(steps, 1)))))


def ema_decay(step, decay):
    """Short at first, so that the average forgets the random start (ours)."""
    return min(decay, (1 + step) / (10 + step))


class Stage:
    """What the loop needs to know about a stage. module(**kwargs) gives losses (b,); batch(...) gives kwargs and groups."""

    name, file = "", ""

    def __init__(self, module, dataset, args, ctx, steps, batch_size, accumulation, lr, warmup, schedule):
        self.module, self.dataset, self.args, self.ctx = module, dataset, args, ctx
        self.steps, self.batch_size, self.accumulation = steps, batch_size, accumulation
        self.lr, self.warmup, self.schedule = lr, warmup, schedule
        self.curriculum = Curriculum("none", steps)                        # keeps the loss history in both stages
        self.groups = ()                                                   # names of what losses are split by


class MainStage(Stage):
    name, file = "main", "last.pt"

    def __init__(self, *rest, curriculum):
        super().__init__(*rest)
        self.curriculum = curriculum
        self.groups = TASKS + ("q1", "q2", "q3", "q4")                      # tasks, and quartiles of the noise step
        self.frames = self.module.cfg.frames

    def batch(self, raw, step):
        """-> kwargs, and a (b, groups) table of how much each clip's loss counts for each group."""
        kwargs, tasks = finish(raw, self.module.text, self.curriculum, self.curriculum.weights(step), self.args, self.frames)
        # reported per real frame: the training loss weighs a clip by its n / F
        real = kwargs["frame_mask"].float().mean(1)
        table = torch.zeros(len(tasks), len(self.groups))
        table[torch.arange(len(tasks)), tasks] = real
        table[torch.arange(len(tasks)), len(TASKS) + kwargs["t"] // 250] = real
        if bool(kwargs["frame_mask"].all()):
            kwargs["frame_mask"] = None
        return kwargs, table

    def collate(self, rows):
        return collate(rows)


class VAEStage(Stage):
    name, file = "vae", "vae.pt"

    def batch(self, raw, step):
        x, gs = raw
        f, c = self.module.vae.f, self.module.vae.latent_channels
        noise = [np.random.default_rng([self.args.seed, 5, g]).standard_normal((c, x.shape[2] // f, x.shape[3] // f), np.float32) for g in gs]
        return dict(x=x, noise=torch.from_numpy(np.stack(noise))), torch.zeros(len(gs), 0)

    def collate(self, rows):
        x, g = zip(*rows)
        return torch.stack(x), g


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


STOP = {"signal": 0}


def fit(stage, out, extra, callbacks=(), verbose=True):
    """Train a stage to its last update, resuming from `out`/`stage.file`. -> (ema dict, finished?).

    extra: what the checkpoint carries besides (config, vae, ...). callbacks: (every, f(step, ema)) run by the main process.
    """
    args, ctx, cur = stage.args, stage.ctx, stage.curriculum
    module = stage.module.to(ctx.device).train()
    params = [p for p in module.parameters() if p.requires_grad]
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    fused = ctx.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(params, lr=stage.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=fused)
    ema = {n: p.detach().float().clone() for n, p in zip(names, params)} if args.ema else {}
    path, log_path, start = out / stage.file, out / "log.jsonl", 0
    if path.exists() and not args.dry_run:
        saved = load_checkpoint(path, stage.name)
        if saved["config"] != extra["config"]:
            raise DataError(f"{path}: a checkpoint of another preset or configuration; choose another --out or the flags it was made with")
        module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema = {n: v.to(ctx.device) for n, v in saved["ema"].items()}
        cur.load_state_dict(saved["curriculum"])
        start = saved["step"]
        if saved.get("fingerprint") != extra["fingerprint"] and ctx.main:
            print(f"note: the data changed since {path} was written; the run goes on with what is there now")
    if start >= stage.steps:
        return ema, True
    if ctx.main and not args.dry_run and stage.name == "main":
        trim_log(log_path, start)
    net = DDP(module, device_ids=[ctx.device.index] if ctx.device.type == "cuda" else None) if ctx.world > 1 else module
    loader = iter(DataLoader(stage.dataset, batch_sampler=Indices(stage, start), num_workers=args.workers, collate_fn=stage.collate,
                             pin_memory=ctx.device.type == "cuda", persistent_workers=args.workers > 0))
    writer = tensorboard(out) if args.tensorboard and ctx.main and not args.dry_run else None
    global_batch = stage.batch_size * stage.accumulation * ctx.world
    bar = tqdm(total=stage.steps, initial=start, desc=stage.name, disable=not (ctx.main and verbose), dynamic_ncols=True, mininterval=1.0)
    pending, bad, window, last = None, 0, [], time.perf_counter()
    first, times = start, []

    def save(step, file=path):
        if ctx.main:
            save_checkpoint(file, {"format": FORMAT, "stage": stage.name, "step": step, "model": module.state_dict(), "ema": ema,
                                   "optimizer": optimizer.state_dict(), "curriculum": cur.state_dict(), **extra})

    def read():
        """Fetch the statistics of the update before: it is long done, so nothing waits for the GPU. -> True: stop."""
        nonlocal pending, bad
        if pending is None:
            return False
        step, values = pending
        values, pending = values.tolist(), None
        loss, norm, stop, split = values[0], values[1], values[2], values[3:]
        cur.record(loss)
        bad = 0 if math.isfinite(loss) else bad + 1
        if bad >= args.patience:
            raise DataError(f"the loss was not finite for {bad} updates in a row (last: update {step}). Nothing was overwritten since the last "
                            f"checkpoint. Lower --lr, raise --warmup, or try --precision fp32")
        k = len(stage.groups)
        window.append((loss, norm, split[:k], split[k:]))
        if ctx.main and not args.dry_run and (step % args.log_every == 0 or step == stage.steps):
            log(step)
        return stop > 0

    def log(step):
        sums, counts = (np.sum([w[i] for w in window], axis=0) for i in (2, 3))
        groups = {g: float(s / c) for g, s, c in zip(stage.groups, sums, counts) if c > 0}
        mix = {t: float(round(w, 4)) for t, w in zip(cur.tasks, cur.weights(step))} if stage.name == "main" else {}
        loss = float(np.mean([w[0] for w in window]))
        line = dict(step=step, stage=stage.name, loss=loss, grad_norm=float(np.mean([w[1] for w in window])),
                    lr=learning_rate(step - 1, stage.lr, stage.warmup, stage.schedule, stage.steps), **({"groups": groups, "mix": mix} if mix else {}))
        seconds = time.perf_counter() - log.since
        line["time"] = {"seconds": round(seconds, 3), "samples_per_second": round(len(window) * global_batch / max(seconds, 1e-9), 2)}
        write_log(line)
        if writer:
            writer.add_scalar(f"{stage.name}/loss", loss, step)
        ease = f" gen {100 * sum(mix.get(t, 0) for t in GENERATION):.0f}%" if mix else ""
        bar.set_postfix_str(f"loss {loss:.4f}{ease} {line['time']['samples_per_second']}/s")
        window.clear()
        log.since = time.perf_counter()

    def write_log(line):
        with open(log_path, "a") as f:
            f.write(json.dumps(line) + "\n")

    log.since = time.perf_counter()
    done = stage.steps
    for step in range(start, stage.steps):
        # -------------------------------------------------------------------------------------------- one update
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.lr, stage.warmup, stage.schedule, stage.steps)
        stats = torch.zeros(3 + 2 * len(stage.groups), device=ctx.device)
        for micro in range(stage.accumulation):
            kwargs, table = stage.batch(next(loader), step)
            kwargs, table = {k: to_device(v, ctx.device) for k, v in kwargs.items()}, table.to(ctx.device)
            last_micro = micro == stage.accumulation - 1
            with nullcontext() if last_micro or ctx.world == 1 else net.no_sync():
                with ctx.autocast():
                    losses = net(**kwargs)                                  # (b,)
                # DDP averages gradients over ranks, the loss is a sum over the global batch: undo the average
                (losses.sum() * (ctx.world / global_batch)).backward()
            losses = losses.detach().float()
            stats[0] += losses.sum() / global_batch
            if stage.groups:
                k = len(stage.groups)
                stats[3:3 + k] += ((table > 0).float() * losses[:, None]).sum(0)
                stats[3 + k:] += table.sum(0)
        norm = torch.nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf)
        for p in params:                                                    # a broken update becomes none
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            torch._foreach_lerp_(list(ema.values()), [p.detach().float() for p in params], 1 - ema_decay(step, args.ema))
        # --------------------------------------------------------------------------------------------------------
        stats[2] = STOP["signal"]
        if ctx.world > 1:
            dist.all_reduce(stats)
        stats[1] = norm
        stop, pending = read(), (step + 1, stats)
        now = time.perf_counter()
        times.append(now - last)
        last = now
        bar.update(1)
        limit = args.max_updates and step + 1 - first >= args.max_updates
        final = step + 1 == stage.steps
        saving = final or args.save_every and (step + 1) % args.save_every == 0
        keeping = args.keep_every and (step + 1) % args.keep_every == 0
        due = [f for every, f in callbacks if every and (step + 1) % every == 0 and not final]
        if stop or limit or saving or keeping or due:
            stop = read() or stop                                           # the newest loss is part of what is saved
            if not args.dry_run and bad == 0 and (stop or limit or saving):
                save(step + 1)
            if not args.dry_run and bad == 0 and keeping:
                save(step + 1, path.with_name(f"{path.stem}-{step + 1:07d}.pt"))
            for f in due:
                if ctx.main:
                    f(step + 1, ema)
            last = time.perf_counter()
        if (stop or limit) and not final:
            done = step + 1
            break
    bar.close()
    if writer:
        writer.close()
    fit.times = times
    return ema, done == stage.steps


def tensorboard(out):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DataError("--tensorboard needs the optional package tensorboard: pip install tensorboard")
    return SummaryWriter(str(out))


# ----------------------------------------------------------------------------------------------------------------
# The two stages


def train_vae(cfg, stickers, items, args, ctx, out):
    """-> AutoencoderKL (frozen, EMA weights, statistics measured), or None if stopped early."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(cfg)
    config = asdict(cfg)
    path = out / VAEStage.file
    stage = VAEStage(VAEStep(vae, args.vae_kl), Pictures(stickers, items, args.seed), args, ctx, args.vae_steps, args.vae_batch_size, 1,
                     args.vae_lr, min(50, args.vae_steps), "cosine")
    extra = {"config": config, "fingerprint": stickers.meta["fingerprint"], "args": vars(args)}
    ema, finished = fit(stage, out, extra)
    if not finished:
        return None
    with ema_weights(stage.module, ema):
        vae = AutoencoderKL(cfg)
        vae.load_state_dict({k: v.detach().cpu() for k, v in stage.module.vae.state_dict().items()})
    vae = vae.to(ctx.device).eval().requires_grad_(False)
    measure_statistics(vae, stickers, items, args.seed)
    if ctx.main and not args.dry_run:
        saved = load_checkpoint(path, "vae")
        if "vae" not in saved:
            saved["vae"] = {k: v.cpu() for k, v in vae.state_dict().items()}
            save_checkpoint(path, saved)
    return vae


@torch.no_grad()
def measure_statistics(vae, stickers, items, seed, most=2048):
    """Mean and std of the raw latents per channel over (a sample of) the training frames."""
    entries = stickers.index[items]
    frames = np.concatenate([np.arange(int(e["offset"]), int(e["offset"]) + int(e["count"])) for e in entries[:20 * most]])
    if len(frames) > most:
        frames = np.sort(np.random.default_rng([seed, 6]).choice(frames, most, replace=False))
    device = vae.mean.device
    parts = [vae.moments(torch.from_numpy(np.array(stickers.frames[chunk])).to(device).float() / 255)[0]
             for chunk in np.array_split(frames, max(1, len(frames) // 64))]
    vae.set_statistics(torch.cat(parts))


def validation_batch(stickers, items, text, args, cfg, count=48):
    """Fixed clips, noise, steps and masks: `count` of them, tasks in turn, so that checkpoints and runs can be compared."""
    fixed = argparse.Namespace(seed=1234, drop=0.0, word_drop=0.0)
    moving = items[stickers.index["count"][items] > 1] if len(items) else items
    moving = moving if len(moving) else items
    clips = Clips(stickers, moving, fixed.seed, cfg.frames)
    kwargs, groups = [], []
    for i, task in enumerate(t for t in TASKS for _ in range(-(-count // len(TASKS)))):
        one = Curriculum("none", 1, GENERATION + (task,))
        weights = np.array([0.0] * len(GENERATION) + [1.0])
        row = clips[i % max(count // len(TASKS), 1)]                        # every task sees the same clips ...
        k, g = finish(collate([(*row[:3], i)]), text, one, weights if row[1] > 1 else one.weights(0), fixed, cfg.frames)
        k["t"] = torch.tensor([int((i % max(count // len(TASKS), 1) + 0.5) * 1000 * len(TASKS) / count) % 1000])  # ... and steps
        kwargs.append(k)
        groups.append(g)
    join = {k: torch.cat([x[k] for x in kwargs]) if isinstance(kwargs[0][k], torch.Tensor) else
            [torch.cat(y) for y in zip(*(x[k] for x in kwargs))] for k in kwargs[0]}
    return join, torch.cat(groups)


@torch.no_grad()
def validate(module, batch, groups, ctx, chunk=8):
    """-> {"loss", task: loss per real frame} of the module's present weights on the fixed batch."""
    was = module.training
    module.eval()
    losses = []
    for i in range(0, len(groups), chunk):
        part = {k: to_device(v[i:i + chunk] if isinstance(v, torch.Tensor) else [y[i:i + chunk] for y in v], ctx.device) for k, v in batch.items()}
        with ctx.autocast():
            losses.append(module(**part).float().cpu())
    module.train(was)
    losses, real = torch.cat(losses), batch["frame_mask"].float().mean(1)
    out = {"loss": float(losses.sum() / real.sum())}
    return out | {t: float(losses[groups == i].sum() / real[groups == i].sum()) for i, t in enumerate(TASKS) if (groups == i).any()}


def train_main(cfg, vae, stickers, train_items, held_items, args, ctx, out):
    torch.manual_seed(args.seed)
    model = RDTF(cfg, args.text_encoder).to(ctx.device)
    if ctx.main:
        print_parts(model, vae)
    model.net.checkpointing = args.checkpointing
    if args.compile:
        model.net.compile()                                                 # in place: state-dict names stay as they are
    tasks = tuple(args.tasks.split(","))
    stage = MainStage(model, Clips(stickers, train_items, args.seed, cfg.frames), args, ctx, args.steps, args.batch_size, args.accumulation,
                      args.lr, args.warmup, args.schedule, curriculum=Curriculum(args.curriculum, args.steps, tasks))
    extra = {"config": asdict(cfg), "args": vars(args), "fingerprint": stickers.meta["fingerprint"], "vae": {k: v.cpu() for k, v in vae.state_dict().items()},
             "vae_id": vae.id, "text_encoder": list(args.text_encoder)}
    shown = held_items if len(held_items) else train_items
    val, val_groups = validation_batch(stickers, shown, model.text, args, cfg)

    def evaluate(step, ema):
        with ema_weights(model, ema):
            values = validate(model, val, val_groups, ctx)
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, "stage": "eval", **values}) + "\n")

    def show(step, ema):
        with ema_weights(model, ema):
            sample_sheet(Loaded(model, vae, cfg, {}), stickers, shown, out, f"samples-{step:07d}", ctx)

    ema, finished = fit(stage, out, extra, callbacks=[(args.eval_every, evaluate), (args.sample_every, show)])
    if args.dry_run or not ctx.main:
        return finished
    if finished:
        evaluate(args.steps, ema)
        with ema_weights(model, ema):
            sample_sheet(Loaded(model, vae, cfg, {}), stickers, shown, out, "samples", ctx, stickers_too=True)
        plot_log(out / "log.jsonl", out / "loss.png")
    return finished


def sample_sheet(loaded, stickers, items, out, name, ctx, stickers_too=False, steps=25):
    """Contact sheet of fixed inputs in every mode: truth, then what the network makes of it; given frames as they are."""
    was = loaded.model.training
    loaded.model.eval()
    moving = [i for i in items if stickers.index["count"][i] > 1][:2] or list(items[:1])
    clips = [draw_clip(stickers, i, np.random.default_rng([7, int(i)]), loaded.cfg.frames) for i in moving]
    rows, labels = [], []
    with torch.no_grad():
        z = torch.from_numpy(np.stack([c for c, _ in clips])).to(ctx.device)
        truth = torch.stack([loaded.vae.decode(x) for x in z]).cpu()
    for j, (item, (_, n)) in enumerate(zip(moving, clips)):
        caption = stickers.caption(item)
        rows.append(truth[j, :n])
        labels.append(f"truth: {caption}")
        for task in ("t2v", "it2v", "predict_post", "interpolate"):
            if n < 2 and task not in GENERATION:
                continue
            cond, real = make_masks(task, n, loaded.cfg.frames, at={"predict_post": max(1, n // 2)}.get(task, 0))
            clip = sample_clips(loaded, [caption], truth[j:j + 1].to(ctx.device), cond[None], real[None], steps=steps, sampler="dpm", seeds=[j])
            rows.append(clip[0, :n].cpu())
            labels.append(task)
            if stickers_too and j == 0:
                write_sticker(out / f"{task}.webp", to_straight(clip[0, :n].cpu()), 125)
    save_sheet(out / f"{name}.png", [to_straight(r) for r in rows], labels)
    loaded.model.train(was)


def plot_log(log_path, png):
    """Losses over updates: training (grey dots) and held-out per task (lines), logarithmic."""
    lines = [json.loads(x) for x in Path(log_path).read_text().splitlines()]
    train = [(x["step"], x["loss"]) for x in lines if x["stage"] == "main"]
    evals = {t: [(x["step"], x[t]) for x in lines if x["stage"] == "eval" and t in x] for t in TASKS}
    series = [("train", "#999999", train)] + [(t, c, evals[t]) for t, c in zip(TASKS, ("#d62728", "#ff7f0e", "#8c564b", "#1f77b4", "#17becf", "#2ca02c"))]
    points = [p for _, _, s in series for p in s if p[1] > 0 and math.isfinite(p[1])]
    if not points:
        return
    w, h, m = 800, 480, 50
    x1, lo, hi = max(p[0] for p in points), math.log10(min(p[1] for p in points)), math.log10(max(p[1] for p in points))
    hi = hi if hi > lo else lo + 1
    image = Image.new("RGB", (w, h), "white")
    draw = ImageDraw.Draw(image)

    def place(p):
        return m + (w - 2 * m) * p[0] / x1, h - m - (h - 2 * m) * (math.log10(max(p[1], 1e-12)) - lo) / (hi - lo)

    draw.rectangle((m, m, w - m, h - m), outline="#444444")
    for i in range(5):
        v = lo + (hi - lo) * i / 4
        draw.text((4, place((0, 10 ** v))[1] - 6), f"{10 ** v:.3f}", fill="#444444")
        draw.text((m + (w - 2 * m) * i / 4 - 10, h - m + 6), f"{int(x1 * i / 4)}", fill="#444444")
    for i, (name, colour, s) in enumerate(series):
        s = [place(p) for p in s if math.isfinite(p[1]) and p[1] > 0]
        if name == "train":
            for x, y in s:
                draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=colour)
        elif len(s) > 1:
            draw.line(s, fill=colour, width=2)
        draw.text((m + 8 + 105 * i, m - 18), name, fill=colour)
    draw.text((w // 2 - 60, h - 18), "loss per real frame, over updates", fill="#444444")
    image.save(png)


def print_parts(model, vae):
    net = model.net
    parts = {"condition encoder": net.condition_encoder, "transformer_in": net.transformer_in, "down": net.down, "mid": net.mid, "up": net.up,
             "text": model.text, "autoencoder (frozen)": vae}
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()}
    count["rest of DFGN"] = sum(p.numel() for p in net.parameters()) - sum(count[k] for k in list(parts)[:5])
    print("parameters: " + ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in count.items()))


# ----------------------------------------------------------------------------------------------------------------
# Start


def resolve(args):
    """Fill in the preset's recipe and check what can be checked before anything is loaded. -> (args, Config)."""
    if args.preset not in PRESETS:
        raise DataError(f"--preset {args.preset}: unknown; choose one of {', '.join(PRESETS)}")
    for key, value in {"accumulation": 1, **RECIPES[args.preset]}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.out = args.out or f"runs/{args.preset}"
    for name in ("steps", "batch_size", "accumulation", "vae_batch_size", "log_every", "patience", "min_frames"):
        if getattr(args, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    tasks = args.tasks.split(",")
    if not set(tasks) <= set(TASKS):
        raise DataError(f"--tasks {args.tasks}: choose from {','.join(TASKS)}")
    settings = dict(PRESETS[args.preset], temporal=args.temporal)
    if args.text_encoder:
        from rdtf import FrozenText
        probe = FrozenText(Config(**settings), args.text_encoder)
        try:
            probe.load()
        except (ImportError, OSError, ValueError) as e:
            raise DataError(f"--text-encoder: {str(e).splitlines()[0]}")
        settings["text_dims"] = probe.widths()
    elif PRESETS[args.preset].get("text_dims"):
        settings["text_dims"] = ()
    return args, Config(**settings)


def choose_items(stickers, args):
    """-> (training items, held-out items); held-out stickers are never trained on."""
    keep = stickers.index["count"] >= args.min_frames
    if not set(args.tasks.split(",")) & set(GENERATION):
        keep &= stickers.index["count"] > 1                                 # nothing to predict or interpolate in a still
    train, held = (np.array([i for i in stickers.select(s) if keep[i]], dtype=np.int64) for s in ("train", "held_out"))
    if not len(train):
        raise DataError(f"--data {args.data}: no sticker is left to train on; lower --min-frames or widen --tasks")
    return train, held


def run(args):
    args, cfg = resolve(args)
    ctx, out = Context(args), Path(args.out)
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, on_signal)
    stickers = open_stickers(args.data, cfg.size)
    train, held = choose_items(stickers, args)
    if ctx.main and not args.dry_run:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise DataError(f"--out {out}: cannot be made ({e.strerror})")
    if ctx.main:
        print(json.dumps({"config": asdict(cfg), "flags": vars(args)}))
        batch = args.batch_size * args.accumulation * ctx.world
        print(f"{len(train)} training stickers ({int((stickers.index['count'][train] == 1).sum())} static), {len(held)} held out; "
              f"{ctx.world} process(es) x batch {args.batch_size} x accumulation {args.accumulation} = {batch} clips per update, "
              f"{args.steps} updates = {args.steps * batch / len(train):.1f} epochs; {ctx.device}, {'bf16 autocast' if ctx.bf16 else 'fp32'}")
    vae = get_vae(cfg, stickers, train, args, ctx, out)
    if vae is None or args.stage == "vae":
        done = vae is not None
        if ctx.main:
            print(f"autoencoder: {out / 'vae.pt'}" if done else f"stopped; the same command goes on from {out}")
        return
    stickers = stickers.encode(vae)
    finished = train_main(cfg, vae, stickers, train, held, args, ctx, out)
    if ctx.main and args.dry_run:
        print_plan(args, ctx)
    elif ctx.main and finished:
        print(f"done: {out / 'last.pt'}, {out / 'samples.png'}, {out / 'loss.png'}. Next:\n"
              f"  python sample.py --ckpt {out / 'last.pt'} --text \"{stickers.caption(int(train[0]))}\" --seeds 0-3")
    elif ctx.main:
        print(f"stopped; the same command goes on from {out / 'last.pt'}")


def get_vae(cfg, stickers, items, args, ctx, out):
    if args.vae:
        if not Path(args.vae).exists():
            raise DataError(f"--vae {args.vae}: no such file")
        try:
            vae = load_vae(args.vae)
        except Exception as e:
            raise DataError(f"--vae {args.vae}: not an autoencoder that can be opened ({str(e).splitlines()[0]})")
        if (vae.f, vae.latent_channels) != (cfg.f, cfg.latent_channels):
            raise DataError(f"--vae {args.vae}: f = {vae.f} with {vae.latent_channels} channels, preset {args.preset} needs f = {cfg.f} with {cfg.latent_channels}")
        for key, value in vae.settings.items():                             # the checkpoint's configuration describes this one
            setattr(cfg, key, value)
        return vae.to(ctx.device)
    if stickers.meta["kind"] == "latents":
        raise DataError(f"--data {args.data}: holds latents; name their autoencoder with --vae")
    if cfg.vae_channels == 3:
        raise DataError(f"--preset {args.preset} uses Stable Diffusion's autoencoder: give its weights with --vae FILE.safetensors")
    return train_vae(cfg, stickers, items, args, ctx, out)


def print_plan(args, ctx):
    seconds = sorted(fit.times)[len(fit.times) // 2]
    memory = f", peak {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB on the GPU" if ctx.device.type == "cuda" else ""
    print(f"plan: {seconds:.2f} s per update (median of {len(fit.times)}){memory}; {args.steps} updates take about "
          f"{args.steps * seconds / 3600:.1f} hours. Nothing was written.")


def on_signal(number, frame):
    if STOP["signal"]:
        raise KeyboardInterrupt
    STOP["signal"] = 1
    print("\nstopping after this update; once more to stop at once", file=sys.stderr)


def main():
    args = parser().parse_args()
    try:
        run(args)
    except DataError as e:
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
