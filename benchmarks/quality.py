"""How good are the stickers? Held-out clips, fixed masks and seeds, trivial rivals in the same table.

    python benchmarks/quality.py mean --ckpt runs/a/last.pt --data cache/fluent       # what was learnt?
    python benchmarks/quality.py gap --ckpt runs/a/last.pt --data cache/fluent cache/characters --out runs/gap
    python benchmarks/features.py fetch                  # once: networks for FVD, KVD, KID and text match
    python benchmarks/quality.py run --ckpt runs/a/last.pt --data cache/fluent --out runs/a/quality
    python benchmarks/quality.py compare runs/a/quality/results.json runs/b/quality/results.json
    python benchmarks/quality.py conditioning --ckpt runs/a/last.pt --set characters  # colour, top ...
    python benchmarks/validity.py --data cache/fluent    # do the measures see what they claim to see?

`mean` measures the one-step mean (RDTF.mean), `run` measures samples: a perfect sample has twice the squared
error of the mean, 3 dB, so PSNR tells progress of the mean only, FVD and motion that of samples only.

Clips are float32 (n, t, h, w, 4), premultiplied RGBA in [0, 1]; t = 8. Every figure is `value ± 1.96 s`, s =
standard deviation over bootstrap draws of the stickers (the same for truth and output: pairing counts). A
Frechet distance is biased upwards at small N: read it against the floor row (real clips of other concepts)
of the same N, never across N. Modes with given frames share them with the truth and can lie below that floor.
"""
import argparse
import hashlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data  # noqa: E402
import features  # noqa: E402
import rdtf  # noqa: E402
from curriculum import make_masks  # noqa: E402
from data import DataError  # noqa: E402

FRAMES = 8
EVERY, FIRST, NONE = np.ones(FRAMES, bool), np.arange(FRAMES) == 0, np.zeros(FRAMES, bool)
# mode -> (given frames, is the caption given); Table 7 of the paper with its random choices fixed
MODES = {
    "interpolate-2": ("10101010", True),
    "interpolate-3": ("10010010", True),
    "predict-post": ("11110000", True),
    "predict-pre": ("00001111", True),
    "t2v": ("00000000", True),
    "i2v": ("10000000", False),
    "it2v": ("10000000", True),
}
GENERATION = ("t2v", "i2v", "it2v")      # the truth is one of many answers: no per-pixel measures there


def mode_of(name):
    """A mode, or a mask such as 10000001 -> (bool (8,), True = given frame; is the caption given)."""
    pattern, text = MODES.get(name, (name, True))
    return make_masks(pattern, FRAMES, FRAMES)[0], text


# ----------------------------------------------------------------------------------------- per-pixel measures
# real, fake (n, t, h, w, 4); made: bool (t,), the frames the model had to make -> one number per clip (n,)

def psnr(real, fake, made):
    """Peak signal-to-noise ratio in dB, RGB over white, made frames; capped at 60 dB (identical frames)."""
    error = features.over_white(real[:, made]) - features.over_white(fake[:, made])
    return -10 * np.log10(np.maximum((error.astype(np.float64) ** 2).mean((1, 2, 3, 4)), 1e-6))


def gaussian(sigma, radius):
    kernel = torch.exp(-torch.arange(-radius, radius + 1).double() ** 2 / (2 * sigma ** 2))
    return kernel / kernel.sum()


def smooth(x, kernel):
    """Separable filter over the last two axes of (m, h, w), "valid" -> (m, h - k + 1, w - k + 1)."""
    return F.conv2d(F.conv2d(x[:, None], kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]


def ssim(real, fake, made):
    """Structural similarity (Wang et al. 2004: Gaussian window 11, sigma 1.5), RGB over white, made ones."""
    window = gaussian(1.5, 5)
    x, y = (torch.from_numpy(features.over_white(clips[:, made])).double() for clips in (real, fake))
    x, y = (rearrange(z, "n t h w c -> (n t c) h w") for z in (x, y))
    mx, my = smooth(x, window), smooth(y, window)
    vx, vy = smooth(x * x, window) - mx * mx, smooth(y * y, window) - my * my
    vxy = smooth(x * y, window) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    score = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return score.mean((1, 2)).view(len(real), -1).mean(1).numpy()


def alpha_error(real, fake, made):
    """Mean absolute error of alpha, made frames."""
    return np.abs(real[:, made] - fake[:, made])[..., 3].mean((1, 2, 3), dtype=np.float64)


def steps(clips, made):
    """Frame differences (n, pairs, h, w, 4) over neighbouring pairs with at least one made frame."""
    return (clips[:, 1:] - clips[:, :-1])[:, made[1:] | made[:-1]]


def temporal_error(real, fake, made):
    """Mean absolute error of the frame differences: flicker, lag and frozen motion all raise it."""
    return np.abs(steps(real, made) - steps(fake, made)).mean((1, 2, 3, 4), dtype=np.float64)


def motion(clips, made):
    """Mean absolute frame difference; fake / real = 1 is the right amount of motion, 0 a still picture."""
    return np.abs(steps(clips, made)).mean((1, 2, 3, 4), dtype=np.float64)


# ------------------------------------------------------------------- statistics of a set, and their intervals
# A statistic is a function of sticker weights w (n,), so that the bootstrap can draw stickers by count.

def mean(fake, real):
    return lambda w: w @ fake / w.sum()


def ratio(fake, real):
    return lambda w: w @ fake / (w @ real)


def frechet(fake, real):
    """Frechet distance of Gaussians fitted to features (n, d): |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    With S = A^T A the last trace is the nuclear norm of A1 A2^T: exact, with matrices of min(n, d) only."""
    def distance(w):
        keep = w > 0
        weight = w[keep, None] / w.sum()
        centres, spreads = [], []
        for x in (fake[keep], real[keep]):
            centres.append((weight * x).sum(0))
            spread = np.sqrt(weight * w.sum() / (w.sum() - 1)) * (x - centres[-1])
            spreads.append(np.linalg.qr(spread, mode="r") if len(spread) > spread.shape[1] else spread)
        a, b = spreads
        cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
        return ((centres[0] - centres[1]) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * cross
    return distance


def kernel(fake, real):
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 of KID (arXiv 1801.01401), in the form for equal
    sizes of Gretton et al. 2012, eq. 4. Features (n, d), or (n, t, d): then frames are the samples, and pairs
    of frames of one sticker are left out."""
    fake, real = (x.reshape(len(x), -1, x.shape[-1]) for x in (fake, real))

    def gram(x, y):
        cubes = (x.reshape(-1, x.shape[-1]) @ y.reshape(-1, y.shape[-1]).T / x.shape[-1] + 1) ** 3
        return cubes.reshape(len(x), x.shape[1], len(y), y.shape[1]).mean((1, 3))
    cross = gram(fake, real)
    h = gram(fake, fake) + gram(real, real) - cross - cross.T

    def distance(w):                     # a sticker drawn twice makes no pair with itself
        return (w @ h @ w - w ** 2 @ np.diag(h)) / (w.sum() ** 2 - (w ** 2).sum())
    return distance


def interval(statistic, n, draws=200, seed=0):
    """Statistic on all n stickers, and half the width of its 95 % interval: 1.96 standard deviations over
    bootstrap draws. Not percentiles: drawing with replacement adds to a distance's bias and shifts them."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.multinomial(n, np.full(n, 1 / n)).astype(float)) for _ in range(draws)]
    return float(statistic(np.ones(n))), float(1.96 * np.std(values, ddof=1))


class Measure(NamedTuple):
    source: str                          # the raw quantity it is made of
    how: Callable                        # the statistic
    better: str                          # which way: high, low or one
    decimals: int
    factor: float = 1


MEASURES = {
    "PSNR dB": Measure("psnr", mean, "high", 2), "SSIM": Measure("ssim", mean, "high", 3),
    "alpha MAE": Measure("alpha", mean, "low", 4), "temporal error": Measure("temporal", mean, "low", 4),
    "motion / real": Measure("motion", ratio, "one", 2),
    "FVD": Measure("i3d", frechet, "low", 0), "KVD": Measure("i3d", kernel, "low", 1),
    "KID x1000": Measure("frames", kernel, "low", 1, factor=1000),
    "R@1": Measure("r1", mean, "high", 3), "R@5": Measure("r5", mean, "high", 3),
}
# KVD saturates under noise: in a table of results a lower one may be the noisier. validity.py still has it.
TABLES = {name: measure for name, measure in MEASURES.items() if name != "KVD"}


def statistic(measure, fake, real):
    """fake, real: dicts of raw quantities -> function of weights."""
    m = MEASURES[measure]
    inner = m.how(fake[m.source], real.get(m.source))
    return lambda w: m.factor * inner(w)


# ----------------------------------------------------------------------------------------------------- rivals

def neighbours(mask, t):
    """Nearest given frames before and after t (None where there is none)."""
    given = np.flatnonzero(mask)
    before, after = given[given <= t], given[given >= t]
    return (before[-1] if len(before) else None), (after[0] if len(after) else None)


def copy_nearest(clips, mask):
    """Every frame = the nearest given frame (the earlier of two)."""
    given = np.flatnonzero(mask)
    return clips[:, [given[np.abs(given - t).argmin()] for t in range(clips.shape[1])]]


def given_in(clips, mask, device="cpu"):
    """bool mask (t,) -> the same for each of n clips, a tensor (n, t)."""
    return torch.from_numpy(np.array(mask)).to(device).expand(len(clips), -1)


def linear_blend(clips, mask):
    """Cross-fade of the two nearest given frames, premultiplied; outside of them the nearest one."""
    return rdtf.blend(torch.from_numpy(np.ascontiguousarray(clips)), given_in(clips, mask)).numpy()


def loop_bridge(clips, mask):
    """What ours starts from (rdtf.bridge), but of pictures."""
    given = given_in(clips, mask)
    return rdtf.bridge(torch.from_numpy(np.ascontiguousarray(clips)), given, torch.ones_like(given)).numpy()


def flow_warp(clips, mask):
    """Frames between two given ones from both, warped along DIS optical flow and cross-faded; beyond the
    given frames the last motion goes on at constant speed."""
    import cv2
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    h, w = clips.shape[2:4]
    grid = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32)

    def flow(clip, i, j):
        grey = [(features.over_white(clip[k]).mean(-1) * 255).astype(np.uint8) for k in (i, j)]
        return dis.calc(*grey, None)

    def warp(frame, offset):             # value at x = frame at x + offset(x); outside: transparent
        at = (grid + offset).astype(np.float32)
        return cv2.remap(np.ascontiguousarray(frame), at[..., 0], at[..., 1], cv2.INTER_LINEAR)

    given, out = np.flatnonzero(mask), clips.copy()
    for clip, result in zip(clips, out):
        for t in np.flatnonzero(~mask):
            a, b = neighbours(mask, t)
            if a is not None and b is not None:
                u = (t - a) / (b - a)
                result[t] = ((1 - u) * warp(clip[a], u * flow(clip, b, a))
                             + u * warp(clip[b], (1 - u) * flow(clip, a, b)))
            elif len(given) > 1:
                near, far = (given[-1], given[-2]) if b is None else (given[0], given[1])
                result[t] = warp(clip[near], abs(t - near) / abs(near - far) * flow(clip, near, far))
            else:
                result[t] = clip[given[0]]
    return out


# -------------------------------------------------------------------------------------------------- the bench

class Bench:
    """All measures that can be taken with what is on this machine.

    networks: folder of features.py's downloads, used as far as they are there; i3d_dtype: fp32 or bf16.
    `teach` fits the probe of text match."""

    def __init__(self, networks=features.NETWORKS, i3d_dtype="fp32"):
        here = {name for name in features.FILES if (Path(networks) / name).exists()}
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[i3d_dtype]
        self.i3d = features.I3D(networks, dtype) if "i3d-kinetics-400.ckpt" in here else None
        self.frames = features.EfficientNet(networks) if "efficientnet-lite0.pth" in here else None
        text = self.frames and {"minilm.safetensors", "minilm-vocab.txt"} <= here
        self.minilm = features.MiniLM(networks) if text else None
        self.probe, self.memory = None, {}
        if len(here) < len(features.FILES):
            print(f"some networks are not in {networks}: measures that need them are left out; "
                  "`python benchmarks/features.py fetch` gets them", file=sys.stderr)

    def once(self, network, clips):
        """network(clips), remembered: the truth and some rivals come back in several modes."""
        key = network, hashlib.sha1(np.ascontiguousarray(clips)).digest(), clips.shape
        if key not in self.memory:
            self.memory[key] = network(clips)
        return self.memory[key]

    def teach(self, clips, captions):
        """Fits the probe picture -> caption on training stickers."""
        if self.minilm:
            self.probe = features.RidgeProbe(self.frames(clips).mean(1), self.minilm(captions))

    def raw(self, fake, made, captions, real=None, only=None):
        """Raw quantities of clips, a dict of arrays with a row per clip; the per-pixel ones only with `real`.

        only: names of the quantities wanted (None: all). Text match: the caption of row i has to win against
        those of all other rows."""
        def wanted(*names):
            return only is None or only & set(names)
        found = {"motion": motion(fake, made)}
        if real is not None and wanted("psnr", "ssim", "alpha", "temporal"):
            found.update(psnr=psnr(real, fake, made), ssim=ssim(real, fake, made),
                         alpha=alpha_error(real, fake, made), temporal=temporal_error(real, fake, made))
        if self.i3d and wanted("i3d"):
            found["i3d"] = self.once(self.i3d, fake)
        if self.frames and wanted("frames", "r1", "r5"):
            found["frames"] = self.once(self.frames, fake[:, made])
        if self.probe and wanted("r1", "r5"):
            likeness = self.probe(found["frames"].mean(1), self.minilm(captions))
            rank = (likeness > np.diag(likeness)[:, None]).sum(1)
            found["r1"], found["r5"] = (rank < 1).astype(float), (rank < 5).astype(float)
        return found


def summarise(fake, real, draws=200):
    """Raw quantities of a method and of the truth -> {measure: (value, half width)}."""
    return {measure: interval(statistic(measure, fake, real), len(fake["motion"]), draws)
            for measure, m in TABLES.items() if m.source in fake and (m.how is mean or m.source in real)}


# ------------------------------------------------------------------------------------------ stickers and plan

def without_tone(caption):
    """"waving hand light skin tone" -> "waving hand": the tones of a concept count as one sticker here."""
    return re.sub(r"\b(medium-light|medium-dark|light|medium|dark) skin tone\b", "", caption).strip(" ,:")


def caption_of(stickers, i):
    return without_tone(stickers.caption(i))


def choose(stickers, split, count, rng, avoid=()):
    """Up to `count` random stickers of a split with 8 distinct key frames, one per concept -> list of int."""
    chosen, seen = [], set(avoid)
    for i in rng.permutation(stickers.select(split)):
        concept = caption_of(stickers, i)
        if stickers.index["keys"][i, -1].min() >= 0 and concept not in seen:
            seen.add(concept)
            chosen.append(int(i))
        if len(chosen) == count:
            break
    return chosen


def clips_of(stickers, items):
    """The 8 key frames of each sticker -> (n, 8, h, w, 4) float32 premultiplied RGBA in [0, 1]."""
    if stickers.meta["kind"] != "pixels":
        raise DataError("--data: quality is measured on pixels; prepare the store without --vae")
    clips = [stickers.frames(i)[stickers.index["keys"][i, -1].astype(np.int64)] for i in items]
    return np.stack(clips).transpose(0, 1, 3, 4, 2) / np.float32(255)


def first_of(stickers, count, seed=0, split="held_out"):
    """-> up to `count` stickers of a split that move, their clips and captions. DataError below 8."""
    items = choose(stickers, split, count, np.random.default_rng(seed))
    if len(items) < min(8, count):
        raise DataError(f"--data: {len(items)} stickers ({split}) of 8 distinct frames; at least "
                        f"{min(8, count)} are needed")
    return items, clips_of(stickers, items), [caption_of(stickers, i) for i in items]


def make_plan(stickers, count, seed):
    """Which stickers, masks and seeds: a pure function of the data, `count` and `seed`; plain JSON."""
    items, _, captions = first_of(stickers, count, seed)
    others = choose(stickers, "train", len(items), np.random.default_rng([seed, 1]), captions)
    if len(others) < len(items):
        raise DataError(f"--data: {len(others)} training stickers of 8 distinct frames; {len(items)} are "
                        "needed for the floor")
    return {"data": stickers.meta["fingerprint"], "size": int(stickers.size), "plan_seed": seed,
            "items": items, "names": [stickers.texts(i)[0] for i in items], "captions": captions,
            "others": others, "seeds": list(range(len(items))), "modes": {m: list(MODES[m]) for m in MODES}}


def teaching_pool(bench, stickers, plan, most=600):
    """Training stickers that the plan leaves; two frames of each teach the text probe -> list of int."""
    taken = plan["captions"] + [caption_of(stickers, i) for i in plan["others"]]
    pool = choose(stickers, "train", most, np.random.default_rng(plan["plan_seed"]), taken)
    if bench.minilm and len(pool) >= 32:
        bench.teach(clips_of(stickers, pool)[:, ::4], [caption_of(stickers, i) for i in pool])
    return pool


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); give what `quality.py run` wrote") from None


def word_retrieval(captions, stickers, pool):
    """For each caption the sticker of the pool that shares most words with it (Jaccard) -> list of int."""
    words = [set(caption_of(stickers, i).split()) for i in pool]

    def best(caption):
        mine = set(caption.split())
        return pool[int(np.argmax([len(mine & w) / max(len(mine | w), 1) for w in words]))]
    return [best(caption) for caption in captions]


# ------------------------------------------------------------------------------------------- clips of a model

def to_torch(clips, device="cpu"):
    """(n, t, h, w, 4) array -> (n, t, 4, h, w) tensor."""
    return torch.from_numpy(clips).permute(0, 1, 4, 2, 3).contiguous().to(device)


def autocast(args, device):
    on = rdtf.has_bf16(device) if args.precision == "auto" else args.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def generate(model, clips, captions, mask, args, seeds):
    """Clips and bool mask (8,) -> the model's clips (n, 8, h, w, 4), rounded to 8 bits like a file."""
    out, bf16 = [], {"auto": None, "bf16": True, "fp32": False}[args.precision]
    for i in tqdm(range(0, len(clips), args.batch), "sampling", leave=False, disable=None):
        part = slice(i, i + args.batch)
        made = rdtf.sample_clips(
            model, captions[part], to_torch(clips[part]), np.repeat(mask[None], len(clips[part]), 0),
            steps=args.steps, sampler=args.sampler, eta=args.eta, text_scale=args.text_scale,
            image_scale=args.image_scale, temperature=args.temperature, seeds=seeds[part], bf16=bf16)
        out.append(made.float().cpu().permute(0, 1, 3, 4, 2).numpy())
    out = np.concatenate(out)
    if not np.isfinite(out).all():
        raise DataError(f"--ckpt {args.ckpt}: its clips hold NaN; use an earlier one or --precision fp32")
    return (out.clip(0, 1) * 255).round().astype(np.float32) / 255


@torch.no_grad()
def decode(vae, x, z, clips, mask):
    """Latents x (n, t, c, h, w) of made frames, z of `clips` -> clips (n, t, h, w, 4), as in sampling."""
    given = given_in(clips, mask, z.device)
    made = rdtf.decode_clips(vae, x, z, to_torch(clips, z.device), given, torch.ones_like(given))
    return made.cpu().permute(0, 1, 3, 4, 2).numpy()


def to_uint8(clips):
    """Premultiplied float -> straight uint8 RGBA, for writing."""
    return data.unpremultiply((clips.clip(0, 1) * 255).round().astype(np.uint8))


# ------------------------------------------------------------------------------------------------------- mean
MEAN_MODES = ("interpolate-2", "interpolate-3", "predict-post", "predict-pre", "i2v", "it2v")
MEAN_COLUMNS = {"ours": "mean", "latent bridge": "bridge of latents", "bridge": "bridge of pictures",
                "blend": "blend of pictures", "copy": "copy", "flow": "flow", "ceiling": "autoencoder"}


@torch.no_grad()
def latents_of(model, clips):
    """Clips (n, t, h, w, 4) -> their latents and fixed noise, both (n, t, c, h, w)."""
    device = model.model.abar.device
    z = torch.stack([model.vae.encode(x).float() for x in to_torch(clips, device)])
    noise = [torch.randn(z[0].shape, generator=torch.Generator().manual_seed(i)) for i in range(len(z))]
    return z, torch.stack(noise).to(device)


@torch.no_grad()
def one_step(net, z, noise, text, given, batch):
    """Latents, noise (n, t, c, h, w), text tokens and bool (n, t) -> one-step means like the latents."""
    return torch.cat([net.mean(z[i], noise[i], text[i], given[i], torch.ones_like(given[i])).float()
                      for i in torch.arange(len(z)).split(batch)])


def squared_errors(z, fakes, made):
    """Per sticker: squared error of each of `fakes` over the frames in bool (t,) -> list of (n,) arrays."""
    return [((x - z)[:, np.flatnonzero(made)] ** 2).flatten(1).sum(1).double().cpu().numpy() for x in fakes]


@torch.no_grad()
def one_step_means(model, clips, captions, modes, args, rivals=True):
    """The error of the one-step mean, in latents and in pixels, beside what needs no training.

    -> {mode: {"EV", "EV bridge": (value, half width), "ours", "latent bridge", "ceiling", rivals: PSNR
    likewise}}. EV = 1 - squared error / that of the linear blend of the latents, over all made frames, of the
    mean and of the bridge that it starts from. rivals: also what is beside it."""
    net, vae, device = model.model, model.vae, model.model.abar.device
    n, found = len(clips), {}
    with autocast(args, device):
        z, noise = latents_of(model, clips)                                               # n t c h w
        for mode in modes:
            mask, with_text = mode_of(mode)
            text = net.text.tokenize(captions if with_text else [""] * n).to(device)
            given = given_in(z, mask, z.device)
            means = one_step(net, z, noise, text, given, args.batch)
            start = rdtf.bridge(z, given, torch.ones_like(given))
            *errors, base = squared_errors(z, (means, start, rdtf.blend(z, given)), ~mask)
            row = found[mode] = {key: interval(lambda w, known=ratio(e, base): 1 - known(w), n, args.draws)
                                 for key, e in zip(("EV", "EV bridge"), errors)}
            methods = {"ours": decode(vae, means, z, clips, mask)}
            if rivals:
                methods |= {**rivals_of(mode, clips, mask), "ceiling": decode(vae, z, z, clips, mask),
                            "latent bridge": decode(vae, start, z, clips, mask)}
            for name, fake in methods.items():
                row[name] = interval(mean(psnr(clips, fake, ~mask), None), n, args.draws)
    return found


def mean_table(found):
    lines = ["| | EV | bridge | " + " | ".join(f"{name} dB" for name in MEAN_COLUMNS.values()) + " |",
             "|---" * (3 + len(MEAN_COLUMNS)) + "|"]
    for mode, row in found.items():
        cells = [f"{row['EV'][0]:.3f} ± {row['EV'][1]:.3f}", f"{row['EV bridge'][0]:.3f}",
                 "{:.2f} ± {:.2f}".format(*row["ours"])]
        cells += [f"{row[name][0]:.2f}" if name in row else "" for name in list(MEAN_COLUMNS)[1:]]
        lines.append("| " + " | ".join([mode, *cells]) + " |")
    return "\n".join(lines)


def mean_command(args):
    """The `mean` command: EV and PSNR of the one-step mean of a checkpoint."""
    model = rdtf.load_model(args.ckpt, args.device)
    stickers = data.open_stickers(args.data, model.cfg.size)
    _, clips, captions = first_of(stickers, args.count, args.seed, args.split)
    captions = [""] * len(clips) if args.no_text else captions
    found = one_step_means(model, clips, captions, args.modes.split(","), args)
    print(f"{args.ckpt}, update {model.meta['step']}; N = {len(clips)} of {args.data} ({args.split}); "
          f"EV of the one-step mean (0: the blend), PSNR of made frames on white\n{mean_table(found)}")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps({"step": model.meta["step"], "modes": found}, indent=1))


# -------------------------------------------------------------------------------------------------------- gap
SECONDS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, math.inf)          # edges of the classes of gaps in seconds


@torch.no_grad()
def gap_errors(model, clips, captions, args):
    """How far off are frames between given ones that lie d = 2..7 frames apart?

    Every d-th frame from the first on is given, as in interpolation; what lies beyond the last given frame
    does not count. -> {d: (squared errors of the one-step mean (n,), of the blend (n,), values compared)}"""
    found = {}
    with autocast(args, model.model.abar.device):
        z, noise = latents_of(model, clips)
        text = model.model.text.tokenize(captions).to(z.device)
        for d in range(2, FRAMES):
            i = np.arange(FRAMES)
            mask = i % d == 0
            between = ~mask & (i < np.flatnonzero(mask)[-1])
            given = given_in(z, mask, z.device)
            fakes = one_step(model.model, z, noise, text, given, args.batch), rdtf.blend(z, given)
            found[d] = (*squared_errors(z, fakes, between), int(between.sum()) * z[0, 0].numel())
    return found


def gap_row(error, base, values, draws):
    """Arrays (n,) of stickers, zeros where one has no such gap -> {"N", "EV": (value, half), "RMS"}."""
    has = values > 0
    known = ratio(error[has], base[has])
    return {"N": int(has.sum()), "EV": interval(lambda w: 1 - known(w), int(has.sum()), draws),
            "RMS": float(np.sqrt(base.sum() / values.sum()))}


def gap_rows(found, durations, draws):
    """What `gap_errors` gave and durations in seconds (n,) -> ({d: row}, {"from-to s": row}).

    A clip has 8 keyframes of the whole sticker; the store knows its duration, not their times. So d frames
    are about d / 8 of it. A still or a store without times has duration 0 and is in no class of seconds."""
    frames = {str(d): gap_row(error, base, np.full(len(base), values), draws)
              for d, (error, base, values) in found.items()}
    seconds = {}
    for low, high in zip(SECONDS, SECONDS[1:]):
        sums = np.zeros((3, len(durations)))
        for d, (error, base, values) in found.items():
            gap = d / FRAMES * durations
            sums += np.where((gap > low) & (gap <= high), [error, base, np.full(len(base), values)], 0)
        if (sums[2] > 0).sum() >= 8:                         # a share of fewer stickers says nothing
            seconds[f"{low:g}-{high:g} s"] = gap_row(*sums, draws)
    return frames, seconds


def gap_plot(path, curves):
    """{store: (rows by frames, rows by seconds)} -> a picture of EV over the gap, two panels."""
    try:
        import matplotlib
    except ImportError:
        return print(f"no {path}: pip install matplotlib", file=sys.stderr)
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    ends = [f"{low:g}-{high:g} s" for low, high in zip(SECONDS, SECONDS[1:])]
    labels = [str(d) for d in range(2, FRAMES)], ends
    for j, (axis, names) in enumerate(zip(axes, labels)):
        for store, rows in curves.items():
            has = [name for name in names if name in rows[j]]
            values, halves = zip(*(rows[j][name]["EV"] for name in has)) if has else ((), ())
            axis.errorbar([names.index(name) for name in has], values, halves, fmt="o-", ms=4, label=store)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set_xticks(range(len(names)), [name.removesuffix(" s") for name in names])
    axes[0].set(xlabel="given frames lie d keyframes apart", ylabel="EV of the one-step mean")
    axes[1].set(xlabel="... about so many seconds")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def gap_command(args):
    """The `gap` command: does interpolation fail because given frames lie far apart?"""
    model, curves = rdtf.load_model(args.ckpt, args.device), {}
    for spec in args.data:
        stickers = data.open_stickers(spec, model.cfg.size)
        items, clips, captions = first_of(stickers, args.count, args.seed)
        durations = stickers.index["duration"][items] / 1000
        rows = curves[spec] = gap_rows(gap_errors(model, clips, captions, args), durations, args.draws)
        print(f"{args.ckpt}, update {model.meta['step']}; {len(clips)} held-out stickers of {spec}; made "
              "frames between given ones; RMS: of truth - blend, latents have 1\n"
              "| gap | stickers | EV | RMS |\n|---|---|---|---|")
        for name, row in [(f"{d} frames", r) for d, r in rows[0].items()] + list(rows[1].items()):
            print(f"| {name} | {row['N']} | {row['EV'][0]:.3f} ± {row['EV'][1]:.3f} | {row['RMS']:.3f} |")
        if not rows[1]:
            print("(no durations in this store, or too few stickers: no classes of seconds)")
        print()
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        named = {spec: dict(zip(("frames", "seconds"), rows)) for spec, rows in curves.items()}
        (out / "gap.json").write_text(json.dumps({"step": model.meta["step"], "stores": named}, indent=1))
        gap_plot(out / "gap.png", curves)


# -------------------------------------------------------------------------------------------------------- run

def rivals_of(mode, real, mask, retrieved=None):
    """Mode -> {rival: clips}."""
    if mode == "t2v":                    # nothing is given: a training sticker of similar caption, or a still
        return {"nearest caption": retrieved, "still (true first frame)": copy_nearest(real, FIRST)}
    rivals = {"copy": copy_nearest(real, mask)}
    if mask.sum() > 1:
        rivals |= {"blend": linear_blend(real, mask), "bridge": loop_bridge(real, mask),
                   "flow": flow_warp(real, mask)}
    return rivals


def save_sheet(path, real, mask, methods, most=6):
    """Truth, given frames and every method under each other for the first stickers."""
    rows, labels = [], []
    for i in range(min(most, len(real))):
        for name, clips in {"truth": real, "given": real * mask[:, None, None, None], **methods}.items():
            rows.append(to_uint8(clips[i]))
            labels.append(name)
    data.save_sheet(path, rows, labels)


def run(args):
    """The `run` command: tables, raw features and sheets of samples into --out."""
    model = rdtf.load_model(args.ckpt, args.device)
    stickers = data.open_stickers(args.data, model.cfg.size)
    plan = read_json(args.plan) if args.plan else make_plan(stickers, args.count, args.seed)
    if plan["data"] != stickers.meta["fingerprint"]:
        raise DataError(f"--plan {args.plan}: made for other data than {args.data}; leave it away")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(plan, indent=1))

    bench = Bench(args.networks, args.i3d_dtype)
    pool = teaching_pool(bench, stickers, plan)
    real, other = clips_of(stickers, plan["items"]), clips_of(stickers, plan["others"])
    captions = plan["captions"]
    retrieved = clips_of(stickers, word_retrieval(captions, stickers, pool or plan["others"]))
    with torch.no_grad(), autocast(args, model.model.abar.device):
        latents, _ = latents_of(model, real)

    results, raw = {"plan": plan, "settings": settings_of(args, model.cfg), "modes": {}}, {}
    for mode in args.modes.split(","):
        mask, with_text = mode_of(mode)
        made = ~mask
        ours = generate(model, real, captions if with_text else [""] * len(real), mask, args, plan["seeds"])
        methods = {"ours": ours, **rivals_of(mode, real, mask, retrieved),
                   "ceiling: truth through our autoencoder": decode(model.vae, latents, latents, real, mask)}
        truth = bench.raw(real, made, captions)
        pixels = None if mode in GENERATION else real
        raws = {name: bench.raw(clips, made, captions, pixels) for name, clips in methods.items()}
        raws["floor: other real clips"] = bench.raw(other, made, captions)
        table = {name: summarise(found, truth, args.draws) for name, found in raws.items()}
        if bench.probe:                  # what text match makes of the true clips: the most to be had
            table["truth"] = {measure: value for measure, value in summarise(truth, truth, args.draws).items()
                              if MEASURES[measure].how is mean}
        results["modes"][mode] = table
        for who, found in (("ours", raws["ours"]), ("truth", truth)):
            raw |= {f"{mode}|{who}|{key}": value.astype(np.float32) for key, value in found.items()}
        save_sheet(out / f"{mode}.png", real, mask, methods)
        print(markdown(mode, table), flush=True)

    np.savez_compressed(out / "raw.npz", **raw)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "results.md").write_text(report(results))
    print(f"written: {out}/results.json, results.md, raw.npz and one sheet per mode")


def settings_of(args, cfg):
    """How was sampled: what the flags leave open is the checkpoint's."""
    found = {key: getattr(args, key) for key in ("ckpt", "data", "eta", "precision")}
    return found | {key: getattr(cfg, key) if getattr(args, key) is None else getattr(args, key)
                    for key in rdtf.SAMPLING}


def cell(measure, entry):
    decimals = MEASURES[measure].decimals
    return f"{entry[0]:.{decimals}f} ± {entry[1]:.{decimals}f}" if entry else ""


def markdown(mode, table):
    """{method: {measure: (value, half width)}} -> one markdown table."""
    columns = [m for m in TABLES if any(m in row for row in table.values())]
    arrow = {"high": "↑", "low": "↓", "one": "→1"}
    head = "| " + " | ".join([mode] + [f"{m} {arrow[MEASURES[m].better]}" for m in columns]) + " |"
    rows = [" | ".join([name] + [cell(m, row.get(m)) for m in columns]) for name, row in table.items()]
    return "\n".join([head, "|---" * (len(columns) + 1) + "|", *(f"| {row} |" for row in rows), ""])


def report(results):
    plan, s = results["plan"], results["settings"]
    lines = [f"N = {len(plan['items'])} held-out stickers of {plan['size']} px, 8 frames; {s['steps']} steps "
             f"of {s['sampler']}, scales {s['text_scale']} (text; less where frames are given) and "
             f"{s['image_scale']} (image), temperature {s['temperature']}; value ± half of the 95 % "
             "bootstrap interval; per-pixel measures on the made frames only.", ""]
    return "\n".join(lines + [markdown(mode, table) for mode, table in results["modes"].items()])


def compare(args):
    """The `compare` command: B - A per mode and measure, paired over stickers; a verdict where the interval
    leaves out zero."""
    results = [read_json(path) for path in args.results]
    raws = []
    for path in args.results:
        try:
            raws.append(np.load(Path(path).with_name("raw.npz"), allow_pickle=False))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: no readable raw.npz beside it ({error}); run it again") from None
    plans = [{key: r["plan"].get(key) for key in ("data", "items", "seeds", "modes")} for r in results]
    if plans[0] != plans[1]:
        raise DataError(f"{args.results[1]}: other stickers, masks or seeds than {args.results[0]}; "
                        "run it again with the other's --plan")

    def parts(raw, mode, who):
        prefix = f"{mode}|{who}|"
        return {key[len(prefix):]: raw[key].astype(np.float64) for key in raw.files if key.startswith(prefix)}

    print(f"| N = {len(plans[0]['items'])} | measure | A | B | B - A | |\n|---|---|---|---|---|---|")
    for mode in (m for m in results[0]["modes"] if m in results[1]["modes"]):
        (a, ta), (b, tb) = [(parts(raw, mode, "ours"), parts(raw, mode, "truth")) for raw in raws]
        for measure, (source, _, way, decimals, _) in TABLES.items():
            if source in a and source in b:
                sa, sb, ones = statistic(measure, a, ta), statistic(measure, b, tb), np.ones(len(a[source]))
                value, half = interval(lambda w: sb(w) - sa(w), len(ones), args.draws)
                verdict = ""
                if abs(value) > half and way != "one":
                    verdict = "B better" if (value > 0) == (way == "high") else "A better"
                print(f"| {mode} | {measure} | {sa(ones):.{decimals}f} | {sb(ones):.{decimals}f} | "
                      f"{value:+.{decimals}f} ± {half:.{decimals}f} | {verdict} |")


# ----------------------------------------------------------------------------------------------- conditioning

def procedural_clips(args, size):
    """Moving procedural stickers of 8 distinct frames, from index --first on -> clips, captions, truths."""
    from stickers.procedural import sticker
    clips, captions, truths, index = [], [], [], args.first
    while len(clips) < args.count:
        frames, _, caption, truth = sticker(index, size)
        index += 1
        frames = data.premultiply(frames)
        keys = data.find_keyframes(frames)[-1]
        if truth["motion"] != "still" and keys.min() >= 0:
            clips.append(frames[keys].astype(np.float32) / 255)
            captions.append(caption)
            truths.append(truth)
    return np.stack(clips), captions, truths


def character_clips(args, size):
    """Held-out characters of --data, a set or store of stickers/characters.py -> clips, captions, truths."""
    from stickers.characters import choices
    stickers = data.open_stickers(args.data, size)
    items, clips, captions = first_of(stickers, args.count)
    try:
        truths = [choices(int(Path(stickers.texts(i)[0]).stem)) for i in items]
    except ValueError:
        raise DataError(f"--data {args.data}: its files are not named by numbers as those of "
                        "stickers/characters.py are") from None
    return clips, captions, truths


def agreement(clips, truths, read, names):
    """1.0 where the attribute read off a clip is the wanted one -> {attribute: (n,)}; empty clips: 0."""
    found = [read(to_uint8(clip)) if clip[..., 3].max() > 0.1 else {} for clip in clips]
    return {key: np.array([float(f.get(key) == t[key]) for f, t in zip(found, truths)]) for key in names}


def conditioning(args):
    """The `conditioning` command, for stickers whose captions say what can be read off the frames: colour,
    shape, motion and scale (procedural), or kind, colour, top and action (characters)."""
    import attributes
    model, people = rdtf.load_model(args.ckpt, args.device), args.set == "characters"
    real, captions, truths = (character_clips if people else procedural_clips)(args, model.cfg.size)
    read, names = (attributes.read_character, attributes.CHARACTER_NAMES) if people else (
        attributes.read_attributes, attributes.NAMES)
    swapped, others = captions[-1:] + captions[:-1], truths[-1:] + truths[:-1]
    silent, seeds = [""] * len(real), list(range(len(real)))

    def make(texts, mask):
        return generate(model, real, texts, mask, args, seeds)
    crossed = make(swapped, NONE)
    rows = {
        "the reader, on real clips": (real, truths),
        "t2v: the caption": (make(captions, NONE), truths),
        "t2v, captions swapped: the caption given": (crossed, others),
        "t2v, captions swapped: the old caption": (crossed, truths),
        "i2v: the reference": (make(silent, FIRST), truths),
        "it2v: caption and reference": (make(captions, FIRST), truths),
        "neither caption nor reference (chance)": (make(silent, NONE), truths),
    }
    args.data = args.data if people else "procedural"
    print(f"N = {len(real)}, {settings_of(args, model.cfg)}; % of clips that agree with ...\n"
          f"| | {' | '.join(names)} |\n" + "|---" * (1 + len(names)) + "|")
    results = {}
    for name, (clips, wanted) in rows.items():
        hits = agreement(clips, wanted, read, names)
        row = {key: interval(mean(100 * hits[key], None), len(real), args.draws) for key in names}
        cells = [f"{value:.0f} ± {half:.0f}" for value, half in row.values()]
        print("| " + " | ".join([name, *cells]) + " |")
        results[name] = row
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "conditioning.json").write_text(json.dumps(results, indent=1))
        text, both = rows["t2v: the caption"][0], rows["it2v: caption and reference"][0]
        sheet, labels = [], []
        for caption, *clips in list(zip(captions, real, text, both))[:8]:
            sheet += map(to_uint8, clips)
            labels += [caption, "from the caption", "from caption and 1st frame"]
        data.save_sheet(out / "conditioning.png", sheet, labels)


# ------------------------------------------------------------------------------------------------------- main

def model_flags(p):
    """What the loading of a model reads; benchmarks/gallery.py has the same."""
    p.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    p.add_argument("--device", default="cpu", help="torch device")
    p.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 if fast")
    p.add_argument("--batch", type=int, default=8, help="stickers at a time")


def sampling_flags(p):
    """What `generate` reads; None: the checkpoint's own."""
    p.add_argument("--steps", type=int, help="sampling steps")
    p.add_argument("--sampler", choices=rdtf.SAMPLERS, help="ddim or dpm")
    p.add_argument("--eta", type=float, default=1.0, help="noise of DDIM: 0 none, 1 the paper's")
    p.add_argument("--text-scale", type=float, help="guidance by caption, 1 = none")
    p.add_argument("--image-scale", type=float, help="guidance by given frames")
    p.add_argument("--temperature", type=float, help="of the noise")


def data_flags(p, several=None):
    p.add_argument("--data", required=True, nargs=several,
                   help="store of pixels, folder of stickers, or synthetic:N")
    p.add_argument("--count", type=int, default=64, help="N held-out stickers, or all if fewer")
    p.add_argument("--seed", type=int, default=0, help="which stickers are taken")


def network_flags(p):
    p.add_argument("--networks", default=features.NETWORKS, help="folder that features.py fetch filled")
    p.add_argument("--i3d-dtype", default="fp32", choices=["fp32", "bf16"], help="bf16: faster with AMX")


def parser():
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)

    def command(name, text, *groups):
        p = commands.add_parser(name, help=text, description=text,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--draws", type=int, default=200, help="bootstrap draws for the intervals")
        for group in groups:
            group(p)
        return p

    p = command("mean", "EV and PSNR of the one-step mean: was motion learnt?", model_flags, data_flags)
    p.add_argument("--out", help="file for the figures as JSON; unset: none")
    p.add_argument("--modes", default=",".join(MEAN_MODES), help="modes, or masks such as 10000001")
    p.add_argument("--split", default="held_out", choices=data.SPLITS, help="train: known by heart")
    p.add_argument("--no-text", action="store_true", help="without captions")

    p = command("gap", "EV in interpolation against the gap between given frames", model_flags,
                lambda p: data_flags(p, "+"))
    p.add_argument("--out", help="folder for gap.json and gap.png; unset: none")

    p = command("run", "measure samples of a checkpoint in every mode", model_flags, sampling_flags,
                data_flags, network_flags)
    p.add_argument("--out", required=True, help="folder for tables, plan, raw quantities and sheets")
    p.add_argument("--plan", help="plan.json of an earlier run, for the same stickers; unset: a new one")
    p.add_argument("--modes", default=",".join(MODES), help="comma-separated modes")

    p = command("compare", "B - A of two runs with the same plan, paired over stickers")
    p.add_argument("results", nargs=2, metavar="RESULTS.json", help="results.json of two runs")

    p = command("conditioning", "read off what was generated whether it follows the caption", model_flags,
                sampling_flags)
    p.add_argument("--set", default="procedural", choices=["procedural", "characters"], help="stickers")
    p.add_argument("--data", default=str(Path(data.__file__).parent / "stickers" / "characters"),
                   help="characters: a folder or store of them; its held-out ones are taken")
    p.add_argument("--count", type=int, default=64, help="stickers")
    p.add_argument("--first", type=int, default=10 ** 6, help="procedural: first index, beyond training's")
    p.add_argument("--out", help="folder for a sheet and the figures as JSON; unset: none")
    return top


def main(arguments=None):
    args = parser().parse_args(arguments)
    commands = {"mean": mean_command, "gap": gap_command, "run": run, "compare": compare,
                "conditioning": conditioning}
    try:
        commands[args.command](args)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
