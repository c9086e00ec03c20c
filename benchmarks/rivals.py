"""The paper's question: a small network from scratch, or a few weights of a larger one? (Tables 1, 2 and 8)

    python benchmarks/rivals.py train base --data cache/characters.z cache/emoji.z --minutes 240 --out runs
    python benchmarks/rivals.py count --base runs/base-240m-0/last.pt      # what each method trains
    python benchmarks/rivals.py train lora --base runs/base-240m-0/last.pt --data cache/fluent.z \\
        --measure cache/fluent --minutes 30 --out runs/rivals                  # and so on for each METHOD
    python benchmarks/rivals.py table runs/rivals --measure cache/fluent        # rivals.md and rivals.png

A method takes a trained, larger RDTF, freezes it, adds what it adds and returns what is to be trained. Added
parts act through forward hooks: the base's code and the names of its weights stay as they are. All methods
get the same process time of training on the target; `ladder.Clock` keeps it. A run goes on where it was
stopped. The base was trained on other stickers; its time is counted in one column and not in another.

The methods' own bases were text-to-image networks that had to learn motion; ours knows all tasks already, so
every rival begins with what RDTF's base can do. Each departure from a method's source says "ours".
"""
import argparse
import json
import math
import re
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data  # noqa: E402
import ladder  # noqa: E402
import quality  # noqa: E402
import rdtf  # noqa: E402
import train  # noqa: E402
from rdtf import (DFGN, RDTF, Config, Detail, LoRA, Semantic, SpatialTransformer,  # noqa: E402
                  TemporalConv, TemporalTransformer, TransformerBlock, add_lora, attend, merge_lora)

# ---------------------------------------------------------------------------------------------------- methods
# RDTF -> {name: tensor} of what is trained. Axis letters are those of rdtf.py.


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def zero(layer):
    """The same layer, all zeros: what ends in it starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Bottleneck(nn.Module):
    """W_up gelu(W_down x) over (..., c), W_up = 0."""

    def __init__(self, c, inner):
        super().__init__()
        self.down, self.up = nn.Linear(c, inner), zero(nn.Linear(inner, c))

    def forward(self, x):
        return self.up(F.gelu(self.down(x)))


def beside(module, part, after=False):
    """From now on module(x) = y + part(x), y what it was; with `after` y + part(y)."""
    module.adapter = part
    module.register_forward_hook(lambda module, x, y: y + module.adapter(y if after else x[0]))


def adapter(model):
    """Houlsby et al. (arXiv 1902.00751): a bottleneck after every attention and feed-forward of the
    transformer blocks, inside their residuals. Its width C/4 is SimDA's (theirs: 8 to 256)."""
    model.requires_grad_(False)
    for block in [m for m in model.net.modules() if isinstance(m, TransformerBlock)]:
        for module in (block.attn1, block.attn2, block.ff):
            c = module.out.out_features
            beside(module, Bottleneck(c, c // 4), after=True)
    return trained(model)


# SimDA: the token at row r, column c of each 4x4 tile comes from so many frames earlier (its attention.py)
SHIFT = torch.tensor([[4, 3, 2, 1], [3, 2, 1, 0], [2, 1, 0, 0], [1, 2, 3, 4]])


def shift_frames(x, frames):
    """(b t) (h w) d -> the same shape, each token from SHIFT frames earlier; where there is no such frame it
    stays. Maps are square."""
    side = math.isqrt(x.shape[1])
    earlier = SHIFT.to(x.device).repeat(side // 4 + 1, side // 4 + 1)[:side, :side].flatten()     # (h w)
    i = torch.arange(frames, device=x.device)[:, None]                      # t 1
    source = torch.where(i >= earlier, i - earlier, i)                      # t (h w)
    place = torch.arange(side * side, device=x.device)
    return x.unflatten(0, (-1, frames))[:, source, place].flatten(0, 1)


def latent_shift_attention(attn, frames, x):
    """Self-attention of `attn` over (b t) n d. Its keys and values are the shifted tokens of the frame before
    and of the frame itself (the first one: twice itself). No weights are added."""
    inner = attn.q.weight.shape[0] // 3
    kv = F.linear(shift_frames(x, frames), attn.q.weight[inner:]).unflatten(0, (-1, frames))      # b t n 2i
    kv = torch.cat([kv[:, [0, *range(frames - 1)]], kv], 2).flatten(0, 1)   # (b t) 2n 2i
    (q,), (k, v) = attn.split(F.linear(x, attn.q.weight[:inner]), 1), attn.split(kv, 2)
    return attn.out(attend(q, k, v).transpose(1, 2).flatten(2))             # (b t) n d


class TemporalAdapter(nn.Module):
    """SimDA's Up(DWConv(3,1,1)(Down x)) over (b t) c h w, bottleneck c/2, without a non-linearity, Up = 0."""

    def __init__(self, c, frames):
        super().__init__()
        self.frames, inner = frames, c // 2
        self.down, self.up = nn.Conv2d(c, inner, 1), zero(nn.Conv2d(inner, c, 1))
        self.conv = nn.Conv2d(inner, inner, (3, 1), padding=(1, 0), groups=inner)

    def forward(self, x):
        y = rearrange(self.down(x), "(b t) c h w -> b c t (h w)", t=self.frames)
        y = rearrange(self.conv(y), "b c t (h w) -> (b t) c h w", h=x.shape[2])
        return self.up(y)


def simda(model, shift=True):
    """SimDA (arXiv 2308.09710): spatial adapters after self-attention and beside the feed-forward, a temporal
    one before each spatial transformer, latent-shift attention. Ours: the temporal adapter comes after STI,
    and the adapter beside the feed-forward reads its normalised input."""
    model.requires_grad_(False)
    for layer in (x for x in model.net.layers() if x.spatial):
        block, frames = layer.spatial.block, model.cfg.frames
        d, c = block.attn1.out.out_features, layer.spatial.norm.num_channels
        beside(block.attn1, Bottleneck(d, d // 4), after=True)
        beside(block.ff, Bottleneck(d, d // 4))
        beside(layer.mix, TemporalAdapter(c, frames), after=True)
        if shift:
            block.attn1.forward = partial(latent_shift_attention, block.attn1, frames)
    return trained(model)


def note_reference(net, given, context, cond_mask=None, frame_mask=None):
    """DFGN.condition, which alone knows what is given: the reference is the first such frame, or frame 1."""
    none = torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
    net.reference = (none if cond_mask is None else cond_mask).int().argmax(1)          # b
    return DFGN.condition(net, given, context, cond_mask, frame_mask)


def first_frame_attention(net, attn, inputs, out):
    """Hook of a spatial self-attention: out + Attn(Z W_q', K_1, V_1) W_o', with the frozen keys and values of
    each clip's reference frame."""
    x, b = inputs[0], len(net.reference)                                    # (b t) n d
    clip = x.unflatten(0, (b, -1))
    first = clip[torch.arange(b, device=x.device), net.reference]           # b n d
    inner = attn.q.weight.shape[0] // 3
    k, v = attn.split(F.linear(first, attn.q.weight[inner:]), 2)            # each b heads n d
    (q,) = attn.split(attn.first_q(clip.flatten(1, 2)), 1)                  # b heads (t n) d: as one row
    y = attn.first_out(attend(q, k, v).transpose(1, 2).flatten(2))          # b (t n) d
    return out + y.view_as(out)


def i2v_adapter(model):
    """I2V-Adapter (arXiv 2312.16693): beside every spatial self-attention a second query and a second output
    projection, which starts as zero. Frame 1 enters clean, as all given frames of our base do. Ours: its
    place is taken by the first given frame, since some tasks do not give frame 1."""
    if not model.cfg.clean:
        raise data.DataError("i2v-adapter: the base must see given frames clean (Config.clean)")
    model.requires_grad_(False)
    for layer in (x for x in model.net.layers() if x.spatial):
        attn = layer.spatial.block.attn1
        attn.first_q = nn.Linear(attn.q.in_features, attn.out.in_features, bias=False)
        attn.first_out = zero(nn.Linear(attn.out.in_features, attn.out.out_features))
        attn.register_forward_hook(partial(first_frame_attention, model.net))
    model.net.condition = partial(note_reference, model.net)
    return trained(model)


@contextmanager
def frame_similarity_prior():
    """I2V-Adapter's start of sampling: where one frame is given, its latents in every frame, half from a
    blurred copy (9 of 64 latents, as theirs), noised to the first step: with `zero_snr` nothing is left."""
    denoiser, sample, clip = rdtf.denoiser, rdtf.sample, {}

    def note(model, text, negative, given, cond_mask, frame_mask, *rest):
        clip.update(model=model, given=given, mask=cond_mask, real=frame_mask)
        return denoiser(model, text, negative, given, cond_mask, frame_mask, *rest)

    def start(denoise, y, steps, *rest):
        model, given, mask = clip["model"], clip["given"], clip["mask"]
        z = rdtf.blend(given, mask)                                         # b t c h w: copies of it
        size = max(3, z.shape[-1] * 9 // 64 | 1)
        flat = F.avg_pool2d(z.flatten(0, 1), size, 1, size // 2, count_include_pad=False).view_as(z)
        guess, unit = model.guess(given, mask, clip["real"])
        half = torch.rand(z.shape, generator=torch.Generator().manual_seed(0)).to(z.device) < 0.5
        prior = (torch.where(half, z, flat) - guess) / unit
        one = (mask.sum(1) == 1).view(-1, 1, 1, 1, 1)
        y = torch.where(one, rdtf.q_sample(prior, y, model.abar[rdtf.timesteps(steps)[0]]), y)
        return sample(denoise, y, steps, *rest)
    with patch.multiple(rdtf, denoiser=note, sample=start):
        yield


def absorbers(model):
    """Customize-A-Video (arXiv 2402.14780), stage 1: spatial LoRA learns what the stickers look like, on
    single frames: each frame of a clip is one, since no layer over time is left. STI looks within a frame."""
    for m in model.net.modules():
        if isinstance(m, (TemporalTransformer, TemporalConv, Detail)):
            m.forward = lambda x: x
        if isinstance(m, Semantic):
            m.frames = 1
    return add_lora(model, 4, SpatialTransformer)


def absorb(layer, x):
    """A frozen LoRA layer that is there in training only."""
    return LoRA.forward(layer, x) if layer.training else F.linear(x, layer.weight, layer.bias)


def customize(model):
    """Customize-A-Video, stage 2: with the absorbers there, temporal LoRA of rank 4 learns motion alone. At
    sampling the absorbers are dropped."""
    add_lora(model, 4, SpatialTransformer)
    for m in [m for m in model.modules() if isinstance(m, LoRA)]:
        m.forward = partial(absorb, m)
    return add_lora(model, 4, TemporalTransformer)


class Method(NamedTuple):
    what: str
    add: Callable                         # RDTF -> {name: tensor} that is trained
    lr: float                             # ours; --lr takes another
    optimizer: str = "adamw"
    tuned: bool = True                    # starts from --base


METHODS = {
    "lora": Method("LoRA", partial(add_lora, rank=8), 2e-3),
    "lora-temporal": Method("LoRA, in time only", partial(add_lora, rank=8, where=TemporalTransformer), 2e-3),
    "adapter": Method("Adapter (Houlsby)", adapter, 1e-3),
    "simda": Method("SimDA", simda, 1e-3),
    "i2v-adapter": Method("I2V-Adapter", i2v_adapter, 1e-3),
    "customize": Method("Customize-A-Video", customize, 2e-3),
    "full": Method("full fine-tuning", trained, 3e-3, "muon"),
    "scratch": Method("ours: small, from scratch", trained, 0.01, "muon", False),
    "base": Method("the base, not tuned", trained, 0.01, "muon", False),
}
STAGES = METHODS | {"absorbers": Method("", absorbers, 2e-3)}
ABSORBING = 0.2                           # share of the time of stage 1 (ours)
WIDE = (64, 160, 256)                     # of `base`: 19.4 M parameters in DFGN, `tiny` then had 4.5 M
TINY = Config(**rdtf.PRESETS["tiny"])

# --------------------------------------------------------------------------------------------------- training

@contextmanager
def built_as(name, cfg=TINY, weights=None):
    """Within, rdtf.py and train.py build every RDTF as the method does, with `weights` as far as they go; the
    preset tiny is `cfg`. After, they are as before, ladder.Clock's changes included."""
    def build(cfg, text_paths=()):
        model = RDTF(cfg, text_paths)
        STAGES[name].add(model)
        if weights and model.load_state_dict(weights, strict=False).unexpected_keys:
            raise data.DataError(f"{name}: the base has other layers")
        return model
    clocked = dict(learning_rate=train.learning_rate, save_checkpoint=train.save_checkpoint)
    with patch.object(rdtf, "RDTF", build), patch.multiple(train, RDTF=build, **clocked), \
            patch.dict(rdtf.PRESETS, tiny=asdict(cfg)):
        yield


def spend(name, cfg, weights, minutes, out, args, tasks, measured=True):
    """Train as `name` until the process time is spent -> was it? False where a signal came first."""
    out.mkdir(parents=True, exist_ok=True)
    done = train.read_lines(out / ("measured.jsonl" if measured else "clock.jsonl"))
    if any(x["seconds"] >= 60 * minutes for x in done):
        print(f"{out}: has its {minutes:g} minutes already")
        return True
    optimizer, lr = args.optimizer or STAGES[name].optimizer, args.lr or STAGES[name].lr
    flags = dict(data=args.data, out=out, vae=args.vae or args.base, steps=ladder.FOREVER, seed=args.seed,
                 tasks=tasks, temporal=cfg.temporal, batch_size=args.batch_size, optimizer=optimizer, lr=lr,
                 weight_decay=(train.LORA if optimizer == "adamw" else train.RECIPES["tiny"])["weight_decay"],
                 curriculum="none", warmup=50, eval_every=0, save_every=args.save_every)
    words = [[f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
             for key, value in flags.items()]
    with built_as(name, cfg, weights):
        clock = ladder.Clock(out, SimpleNamespace(**vars(args) | dict(minutes=minutes)))
        clock.measure = clock.measure if measured else lambda *rest: None
        train.run(train.parser().parse_args(sum(words, [])))
    return clock.spent() >= 60 * minutes


def train_command(args):
    """Train one method in this process until its time is over."""
    name, method, minutes = args.method, METHODS[args.method], args.minutes
    out, cfg, weights = Path(args.out) / f"{name}-{minutes:g}m-{args.seed}", TINY, None
    if method.tuned:
        if not args.base:
            raise data.DataError(f"train {name}: needs --base FILE")
        base = rdtf.load_model(args.base)
        cfg, weights = base.cfg, base.model.state_dict()
    elif name == "base":
        cfg = replace(TINY, widths=tuple(args.widths))
    args.vae = args.vae or args.base or str(train.SHIPPED)
    clock = train.read_lines(Path(args.base or "-").with_name("clock.jsonl"))
    took = args.base_minutes or (clock[-1]["seconds"] / 60 if clock else None)      # None: nobody knows
    settings = dict(method=name, minutes=minutes, seed=args.seed, data=args.data, tasks=args.tasks,
                    lr=args.lr or method.lr, optimizer=args.optimizer or method.optimizer,
                    base=args.base * method.tuned, base_minutes=took if method.tuned else 0)
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise data.DataError(f"{out}: made with other flags, see settings.json; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))
    torch.set_num_threads(args.threads)
    if name == "customize":
        first, minutes = ABSORBING * minutes, (1 - ABSORBING) * minutes
        if not spend("absorbers", cfg, weights, first, out / "absorbers", args, "t2v", measured=False):
            return
        found = rdtf.read_weights(out / "absorbers" / "last.pt")["ema"]
        weights = weights | {n: x for n, x in found.items() if ".lora_" in n}
    spend(name, cfg, weights, minutes, out, args, args.tasks)


def count_command(args):
    """How many of how many parameters each method trains, and their names; * stands for every layer."""
    base = rdtf.load_model(args.base)
    for name in (n for n, method in STAGES.items() if method.tuned):
        model, kinds = RDTF(base.cfg), {}
        for n, p in STAGES[name].add(model).items():
            kind = re.sub(r"^net\.(down|mid|up)\.\d+(.layers\.\d+)?", "*", n)
            kinds.setdefault(kind, []).append(p.numel())
        now, whole = sum(map(sum, kinds.values())), sum(p.numel() for p in model.parameters())
        print(f"{name}: trains {now:,} of {whole:,} parameters ({100 * now / whole:.1f} %)")
        for kind, sizes in kinds.items() if name != "full" else ():
            print(f"    {kind}: {len(sizes)} x, {sum(sizes):,}")


# ------------------------------------------------------------------------------------------------------ table
MODES = {"it2v": "I&T → V", "interpolate-2": "interpolation", "predict-post": "prediction"}
FIGURES = {  # of every mode: name -> (title, decimals); what no network is there for is left out
    "EV": ("EV of the mean ↑", 3), "PSNR": ("PSNR of the mean, dB ↑", 2), "FVD": ("FVD ↓", 0),
    "KID x1000": ("KID x1000 ↓", 1), "motion / real": ("motion / real →1", 2), "R@1": ("text match R@1 ↑", 3),
}


def load(path, name):
    """A run's checkpoint -> Loaded, trained and all parameters; LoRA is merged, absorbers are dropped."""
    with built_as(name):
        loaded = rdtf.load_model(path)
    model = loaded.model
    tensors = {n: p for n, p in model.named_parameters() if ".lora_" in n}  # the absorbers', too
    now = sum(p.numel() for p in (trained(model) | tensors).values())
    whole = sum(p.numel() for p in model.parameters())
    if tensors:
        plain = RDTF(loaded.cfg)
        plain.load_state_dict(model.state_dict(), strict=False)
        merge_lora(plain, {n: x for n, x in tensors.items() if name != "customize" or ".spatial." not in n})
        loaded = loaded._replace(model=plain.eval())
    loaded.model.requires_grad_(True)                                       # as load_model leaves it
    return loaded, now, whole


@torch.no_grad()
def forward_ms(loaded, args):
    """Milliseconds of process time of the network on one clip, the least of five calls."""
    model, x, times = loaded.model, torch.zeros(1, *loaded.cfg.latent_shape), []
    text, cond = model.text(model.text.tokenize(["a cat"])), torch.arange(x.shape[1])[None] == 0
    with quality.autocast(args, x.device):
        for _ in range(5):
            began = time.process_time()
            model.net(x, torch.tensor([500]), x, text, cond)
            times.append(1000 * (time.process_time() - began))
    return min(times)


def measure(path, name, args, stickers, plan, bench):
    """A checkpoint -> its row of the tables as JSON has it, and its clips of I&T -> V."""
    loaded, now, whole = load(path, name)
    real, captions = quality.clips_of(stickers, plan["items"]), plan["captions"]
    row, shown = dict(step=loaded.meta["step"], trained=now, whole=whole, ms=forward_ms(loaded, args)), None
    means = quality.one_step_means(loaded, real, captions, MODES, args, rivals=False)
    for mode in MODES:
        mask, _ = quality.mode_of(mode)
        with frame_similarity_prior() if name == "i2v-adapter" else nullcontext():
            clips = quality.generate(loaded, real, captions, mask, args, plan["seeds"])
        shown = clips[:args.pictures] if mode == "it2v" else shown
        found = quality.summarise(*(bench.raw(x, ~mask, captions) for x in (clips, real)), args.draws)
        row[mode] = found | dict(EV=means[mode]["EV"], PSNR=means[mode]["ours"])
    return row, shown


def entries(out):
    """Runs in a folder, and the bases they began with -> {label: (checkpoint, settings)}, as in METHODS."""
    runs = {}
    for path in sorted(Path(out).glob("*/last.pt")):
        if path.with_name("settings.json").exists():
            runs[path.parent.name] = path, json.loads(path.with_name("settings.json").read_text())
    for s in [s for _, s in runs.values() if s["base"]]:
        base = Path(s["base"])
        runs.setdefault(base.parent.name, (base, s | dict(method="base", minutes=0)))
    if not runs:
        raise data.DataError(f"{out}: no runs there yet")
    return dict(sorted(runs.items(), key=lambda run: list(METHODS).index(run[1][1]["method"])))


def table_command(args):
    """Measure what is not measured yet, print the tables, draw the picture."""
    out, runs, rows, shown = Path(args.out), entries(args.out), {}, {}
    first, _ = next(iter(runs.values()))
    stickers = data.open_stickers(args.measure, rdtf.read_weights(first)["config"]["size"])
    plan, bench = quality.make_plan(stickers, args.count, 0), quality.Bench(args.networks)
    quality.teaching_pool(bench, stickers, plan)
    for label, (path, settings) in runs.items():
        key = vars(args) | dict(plan=plan, file=[str(path), path.stat().st_mtime])
        cache = out / "measured" / f"{label}.json"
        known = json.loads(cache.read_text()) if cache.exists() else {}
        if known.get("key") != json.loads(json.dumps(key)):
            row, clips = measure(path, settings["method"], args, stickers, plan, bench)
            known = dict(key=key, row=row)
            cache.parent.mkdir(exist_ok=True)
            np.save(cache.with_suffix(".npy"), clips)
            cache.write_text(json.dumps(known))
        rows[label], shown[label] = settings | known["row"], np.load(cache.with_suffix(".npy"))
    (out / "rivals.md").write_text(tables(rows, plan))
    print(tables(rows, plan))
    clips, labels = [], []
    for i, clip in enumerate(quality.clips_of(stickers, plan["items"][:args.pictures])):
        clips += [clip[:1], clip, *(x[i] for x in shown.values())]
        labels += [f"reference and text: {plan['captions'][i]}", "truth", *shown]
    data.save_sheet(out / "rivals.png", [quality.to_uint8(clip) for clip in clips], labels)


def tables(rows, plan):
    """{label: row} -> markdown: a table per mode as the paper's Tables 1 and 2, one of costs as Table 8."""
    lines = [f"N = {len(plan['items'])} held-out stickers; value ± half of the 95 % bootstrap interval."]

    def add(heads, cells):                                                  # cells: row -> list of strings
        lines.extend(["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"])
        for label, row in rows.items():
            name = f"{METHODS[row['method']].what} ({label})"
            lines.append(f"| {' | '.join([name, *cells(row)])} |")
    for mode, title in MODES.items():
        here = [f for f in FIGURES if any(f in row[mode] for row in rows.values())]
        add([title, *(FIGURES[f][0] for f in here)],
            lambda row: [" ± ".join(f"{x:.{FIGURES[f][1]}f}" for x in row[mode].get(f, ())) for f in here])
    add(["cost", "trained, M", "all parameters, M", "a forward, ms", "updates", "CPU min", "with the base's"],
        lambda row: [f"{row['trained'] / 1e6:.2f}", f"{row['whole'] / 1e6:.2f}", f"{row['ms']:.0f}",
                     str(row["step"]), f"{row['minutes']:g}", "?" if row["base_minutes"] is None else
                     f"{row['minutes'] + row['base_minutes']:.3g}"])
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------- main

def parser():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, form = top.add_subparsers(dest="command", required=True), argparse.ArgumentDefaultsHelpFormatter
    p = commands.add_parser("train", formatter_class=form)
    p.add_argument("method", choices=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--base", default="", help="checkpoint that is tuned")
    p.add_argument("--base-minutes", type=float, help="CPU minutes it took; None: the clock beside it")
    p.add_argument("--vae", default="", help="file with the autoencoder; empty: --base, else the shipped one")
    p.add_argument("--data", nargs="+", required=True, help="as for train.py: the target; of base the source")
    p.add_argument("--minutes", type=float, default=30, help="process time of training")
    p.add_argument("--out", default="runs/rivals", help="folder of all runs")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--lr", type=float, help="peak learning rate; None: the method's")
    p.add_argument("--optimizer", choices=["adamw", "muon"], help="None: the method's")
    p.add_argument("--widths", type=int, nargs="+", default=WIDE, help="of base")
    p.add_argument("--tasks", default="i2v,it2v,predict_pre,predict_post,interpolate", help="tasks trained")
    p.add_argument("--batch-size", type=int, default=8, help="clips per update")
    p.add_argument("--threads", type=int, default=1, help="of the CPU; --minutes counts the time of all")
    p.add_argument("--marks", type=int, default=3, help="measurements of the one-step mean on the way")
    p.add_argument("--save-every", type=int, default=50, help="updates between checkpoints")
    commands.add_parser("count").add_argument("--base", required=True, help="checkpoint")
    t = commands.add_parser("table", formatter_class=form)
    t.add_argument("out", help="folder of the runs")
    t.add_argument("--pictures", type=int, default=3, help="of them in rivals.png")
    t.add_argument("--draws", type=int, default=200, help="bootstrap draws for the intervals")
    for p in (p, t):
        p.add_argument("--measure", required=True, help="store of pixels, for held-out stickers")
        p.add_argument("--count", type=int, default=64, help="of them")
    quality.sampling_flags(t)
    quality.network_flags(t)
    t.set_defaults(precision="auto", batch=8, ckpt="")                      # read by quality.py
    return top


def main(arguments=None):
    args = parser().parse_args(arguments)
    try:
        dict(train=train_command, count=count_command, table=table_command)[args.command](args)
    except (data.DataError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
