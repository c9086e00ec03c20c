"""RDTF: few-frame video diffusion for animated stickers, trained on few resources (arXiv 2503.17735).

This file is the model, read top to bottom: configuration -> layers -> given frames -> DFGN (the denoising
network) -> LoRA -> text encoders -> autoencoder -> diffusion (noise, loss, guidance, samplers) -> loading,
sampling. The paper's two ideas about *data*, dual masks and the curriculum, are in curriculum.py. data.py
reads stickers, `python train.py` trains and `python sample.py` samples.

Axis letters: b clip, t frame, c channel, h w rows and columns, n tokens, d width. A clip is (b, t, c, h, w)
at every public function. Inside the network frames are folded into the batch: (b t) c h w.

Sources: "Table N" / "eq. N" of the paper; "release: NAME" is a module's name in the authors' weights, which
tests/release.py maps onto ours; "ours" where both are silent. Measurements are in benchmarks/README.md.
"""

import hashlib
import math
import os
import re
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Config:
    """All that rebuilds a model; a plain dict of it is part of every checkpoint."""

    size: int = 64                        # edge of a sticker, pixels
    frames: int = 8                       # F, frames of a clip (STI's detail branch has F channels)
    # DFGN
    latent_channels: int = 4
    widths: tuple = (32, 64, 128)         # channels per level; the last level has no attention
    layers: int = 1                       # layers per down level; an up level has one more
    head_dim: int = 32
    context_dim: int = 128                # width of a text token
    temporal: str = "sti"                 # sti | conv3d (the ablation of Table 3)
    # where the small presets depart from the paper (ours; `paper` has all of them off)
    narrow: bool = False                  # transformer_in, STI: as wide as their level, 2 heads or more
    prediction: str = "eps"               # what the output means: the noise (paper) or v
    zero_snr: bool = False                # the last noise step is noise alone (arXiv 2305.08891)
    residual: bool = False                # diffuse the difference to what the given frames tell (`bridge`)
    inputs: bool = False                  # the network reads guess, unit, both masks and the frame number
    clean: bool = False                   # given frames enter without noise and are left out of the loss
    pooled_text: bool = False             # the mean text token is added to the embedding of the noise step
    film: bool = False                    # that embedding scales and shifts features; norms of >= 8 channels
    draft: bool = False                   # the mean text token draws a clip, learnt directly, as an input
    bypass: bool = False                  # what enters also reaches the exit directly, around all norms
    # text: a byte transformer trained with the network, unless text_dims names the widths of frozen encoders
    text_layers: int = 3
    text_bytes: int = 96
    text_dims: tuple = ()
    # autoencoder
    vae_channels: int = 4                 # 4: premultiplied RGBA (ours), 3: RGB on white (Stable Diffusion)
    vae_patch: int = 2                    # pixels folded into channels at the entrance (1: none)
    vae_widths: tuple = (64, 128)         # one per level; pixels per latent f = vae_patch * 2^(levels - 1)
    vae_layers: int = 1
    vae_attention: bool = False
    # how sample.py samples unless told otherwise (the paper's choice is the default here)
    sampler: str = "ddim"
    steps: int = 50
    text_scale: float = 7.5
    image_scale: float = 7.5
    temperature: float = 1.0              # factor of all noise that sampling draws

    def __post_init__(self):
        for name in ("widths", "text_dims", "vae_widths"):
            setattr(self, name, tuple(getattr(self, name)))
        if self.temporal not in MIXERS:
            raise ValueError(f"temporal={self.temporal!r}: choose one of {', '.join(MIXERS)}")
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction={self.prediction!r}: choose eps or v")
        if self.zero_snr and self.prediction == "eps":
            raise ValueError("zero_snr: noise alone does not tell what the noise hides; use prediction v")

    @property
    def f(self):
        """Pixels per latent along one edge."""
        return self.vae_patch * 2 ** (len(self.vae_widths) - 1)

    @property
    def latent_shape(self):
        """(t, c, h, w) of a clip of latents."""
        return self.frames, self.latent_channels, self.size // self.f, self.size // self.f


SAMPLING = ("sampler", "steps", "text_scale", "image_scale", "temperature")     # fields that training ignores
SMALL = dict(narrow=True, prediction="v", zero_snr=True, residual=True, inputs=True, clean=True,
             pooled_text=True, film=True, draft=True, bypass=True, sampler="dpm", steps=8, text_scale=3.0,
             image_scale=1.0, temperature=0.7)
PRESETS = {
    # 64 px RGBA, latents 4x16x16: the quickstart, the tests, the shipped checkpoint. A laptop CPU trains it.
    "tiny": dict(SMALL),
    # 128 px RGBA, latents 4x32x32 as in the paper: one consumer GPU.
    "base": dict(SMALL, size=128, widths=(128, 256, 384, 512), layers=2, head_dim=64, context_dim=512,
                 text_layers=6),
    # The paper's network and input (Table 6): 256 px, Stable Diffusion's autoencoder, latents 4x32x32.
    "paper": dict(size=256, widths=(320, 640, 1024, 1280), layers=2, head_dim=64, context_dim=1024,
                  text_dims=(1024, 768), vae_channels=3, vae_patch=1, vae_widths=(128, 256, 512, 512),
                  vae_layers=2, vae_attention=True),
}

# ------------------------------------------------------------------------------------------------------------
# The noise schedule (Table 6: 1000 steps, scaled-linear betas from 0.00085 to 0.0120)

STEPS = 1000


def alphas_cumprod(zero_snr=False):
    """(1000,) fp32: the product of 1 - beta, betas linear in sqrt(beta) (LDM code calls this "linear").

    Its last step still holds 0.068 y_0, which sampling cannot start from. zero_snr: sqrt(abar) is moved and
    stretched so that it ends at 0 and begins where it did (arXiv 2305.08891, algorithm 1)."""
    betas = np.linspace(0.00085 ** 0.5, 0.0120 ** 0.5, STEPS, dtype=np.float64) ** 2
    root = np.cumprod(1 - betas) ** 0.5
    if zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return torch.from_numpy(root ** 2).float()


# ------------------------------------------------------------------------------------------------------------
# Layers: each takes and returns feature maps (b t) c h w, unless its docstring says otherwise.


def timestep_embedding(t, dim):
    """(b,) integer steps -> (b, dim) fp32 sinusoids, cos first, frequencies 10000^(-i / (dim/2)) (release).
    In bf16 only 507 of the 1000 steps would stay distinct."""
    i = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    args = t.float()[:, None] * torch.exp(-math.log(10000.0) / (dim // 2) * i)
    return torch.cat([args.cos(), args.sin()], dim=-1)


class ResBlock(nn.Module):
    """GN SiLU conv [+ time] GN SiLU conv, plus a skip (release: resnets); the autoencoder's has no time.
    With `film` the time scales and shifts what the second norm gave (ours, after arXiv 2105.05233)."""

    def __init__(self, c_in, c_out, time_dim=0, eps=1e-5, film=False):
        super().__init__()
        self.film = film
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in, eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, (1 + film) * c_out) if time_dim else None
        self.norm2, self.conv2 = nn.GroupNorm(32, c_out, eps), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb=None):                                         # emb: b d, after SiLU
        y = self.conv1(F.silu(self.norm1(x)))                               # (b t) c_out h w
        if self.time:
            e = self.time(emb).to(y.dtype)                                  # b c_out, with film b 2c_out
            e = e.repeat_interleave(len(y) // len(e), 0)[:, :, None, None]
        if self.film:
            shift, scale = e.chunk(2, 1)
            y = torch.addcmul(shift, self.norm2(y), 1 + scale)
        else:
            y = self.norm2(y + e if self.time else y)
        return self.conv_shortcut(x) + self.conv2(F.silu(y))


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v over b heads n d. There is no mask, so that flash kernels apply. On a CPU
    their backward pass is slow in bf16 and over few tokens: plain products there (benchmarks/README.md). A
    CUDA grid has at most 65,535 blocks along b."""
    slow = q.device.type == "cpu" and q.requires_grad and (q.dtype == torch.bfloat16 or k.shape[-2] <= 16)
    if slow or len(q) > 65535:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention over b n d; q, k, v without bias, the output with one (release: attn1, attn2).

    context_dim = 0 means self-attention. Otherwise `project_context` makes keys and values: once per clip,
    since its frames share them, and once for all steps of a sampling run."""

    def __init__(self, dim, heads, head_dim, context_dim=0):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q = nn.Linear(dim, inner if context_dim else 3 * inner, bias=False)
        self.kv = nn.Linear(context_dim, 2 * inner, bias=False) if context_dim else None
        self.out = nn.Linear(inner, dim)

    def split(self, x, parts):
        """b n (parts heads d) -> `parts` tensors b heads n d."""
        return [y.transpose(1, 2) for y in x.unflatten(-1, (parts, self.heads, -1)).unbind(2)]

    def project_context(self, context):
        return self.split(self.kv(context), 2)                              # two of b heads n d

    def forward(self, x, kv=None):
        q, k, v = self.split(self.q(x), 3) if kv is None else (*self.split(self.q(x), 1), *kv)  # b heads n d
        y = attend(q, k.to(q.dtype), v.to(q.dtype))                         # b heads n d
        return self.out(y.transpose(1, 2).flatten(2))                       # b n dim


class FeedForward(nn.Module):
    """GEGLU, four times as wide, with the exact gelu (release: ff)."""

    def __init__(self, dim):
        super().__init__()
        self.proj, self.out = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        # two products, not halves of one: the backward pass need not join the widest map of the network
        value, gate = (F.linear(x, w, b) for w, b in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2)))
        return self.out(value * F.gelu(gate))                               # b n 4d -> b n d


class TransformerBlock(nn.Module):
    """Attention, attention, feed-forward, each after a LayerNorm and inside a residual (release:
    transformer_blocks). The second attention reads `kv`, or is another self-attention."""

    def __init__(self, dim, heads, head_dim, context_dim=0):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads, head_dim)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, head_dim, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x, kv=None):                                          # b n d
        x = x + self.attn1(self.norm1(x))
        if kv is None:
            x = x + self.attn2(self.norm2(x))
        else:  # the frames of a clip become one row of queries, so that keys and values need no copies
            t = len(x) // len(kv[0])
            y = self.norm2(x).unflatten(0, (-1, t)).flatten(1, 2)           # (b t) n d -> b (t n) d
            x = x + self.attn2(y, kv).unflatten(1, (t, -1)).flatten(0, 1)   # (b t) n d
        return x + self.ff(self.norm3(x))


def tokens(x):
    """(b t) c h w -> (b t) (h w) c."""
    return x.flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """GN, Linear, a block over some tokens, Linear, inside a residual: the layers of the next two."""

    def __init__(self, c, heads, head_dim, frames=0, context_dim=0):
        super().__init__()
        self.frames, self.norm = frames, nn.GroupNorm(32, c, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(c, heads * head_dim), nn.Linear(heads * head_dim, c)
        self.block = TransformerBlock(heads * head_dim, heads, head_dim, context_dim)


class SpatialTransformer(Transformer):
    """Over the h*w places of each frame, with cross-attention to the text (release: attentions)."""

    def forward(self, x, kv):
        y = self.proj_in(tokens(self.norm(x)))                              # (b t) (h w) d
        y = self.proj_out(self.block(y, kv))                                # (b t) (h w) c
        return x + y.transpose(1, 2).unflatten(2, x.shape[-2:])             # (b t) c h w


class TemporalTransformer(Transformer):
    """Over the t frames of each pixel, without text and without positions (release: temp_attentions)."""

    def forward(self, x):
        t, (h, w) = self.frames, x.shape[-2:]
        clip = rearrange(x, "(b t) c h w -> b c (t h) w", t=t)              # statistics over (c/32, t, h, w)
        y = rearrange(self.norm(clip), "b c (t h) w -> (b h w) t c", t=t)
        y = self.proj_out(self.block(self.proj_in(y)))                      # (b h w) t c
        return x + rearrange(y, "(b h w) t c -> (b t) c h w", h=h, w=w)


class Semantic(nn.Module):
    """STI's semantic branch: all 2x2-pooled positions of all frames are tokens of one sequence (Table 6).
    Entities jump between discrete frames: what a pixel needs of another one is seldom at the same place."""

    def __init__(self, c, frames, heads):
        super().__init__()
        self.frames, self.attn = frames, Attention(c, heads, 32)

    def forward(self, x):
        p = rearrange(F.avg_pool2d(x, 2), "(b t) c h w -> b (t h w) c", t=self.frames)    # a quarter as many
        a = rearrange(self.attn(p), "b (t h w) c -> (b t) c h w", t=self.frames, h=x.shape[-2] // 2)
        return x + F.interpolate(a, size=x.shape[-2:], mode="nearest")      # (b t) c h w


class Detail(nn.Module):
    """STI's detail branch: the t frames are the channels of a map, each feature channel has its own map
    (release: conv_layers). Only here the paper's network knows the order of frames."""

    def __init__(self, frames):
        super().__init__()
        self.frames = frames
        self.norms = nn.ModuleList(nn.GroupNorm(1, frames, eps=1e-6) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(frames, frames, 3, padding=1) for _ in range(4))

    def forward(self, x):
        c = x.shape[1]
        d = rearrange(x, "(b t) c h w -> (b c) t h w", t=self.frames)
        for i in (0, 2):
            r = self.conv(i, d)                                             # (b c) t h w
            d = d + self.conv(i + 1, r)
        return rearrange(d, "(b c) t h w -> (b t) c h w", c=c)

    def conv(self, i, x):
        """Norm, SiLU, convolution. A CPU's kernels work on 16 maps at a time: there 16 are made and 8 are
        dropped, which takes a tenth off a training step in bf16 (benchmarks/README.md)."""
        conv, spare = self.convs[i], -self.frames % 16 if x.device.type == "cpu" else 0
        weight, bias = conv.weight, conv.bias
        if spare:
            weight, bias = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, spare)), F.pad(bias, (0, spare))
        return F.conv2d(F.silu(self.norms[i](x)), weight, bias, padding=1)[:, :self.frames]


class STI(nn.Module):
    """Spatio-temporal interaction: GN(w1 * semantic + w2 * detail), no residual (release: temp_convs)."""

    def __init__(self, c, frames, heads=8):
        super().__init__()
        self.semantic, self.detail = Semantic(c, frames, heads), Detail(frames)
        self.w1, self.w2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.norm = nn.GroupNorm(32, c, eps=1e-6)

    def forward(self, x):
        return self.norm(self.w1.to(x.dtype) * self.semantic(x) + self.w2.to(x.dtype) * self.detail(x))


class TemporalConv(nn.Module):
    """Table 3's "DFGN(3D-Conv)": x + 4 x [GN, SiLU, temporal conv (3,1,1)]. The convolution is a 2-D one over
    (t, h*w): Conv3d in bf16 is slow and hungry on every backend."""

    def __init__(self, c, frames, heads=0):
        super().__init__()
        self.frames = frames
        self.norms = nn.ModuleList(nn.GroupNorm(32, c, eps=1e-5) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(c, c, (3, 1), padding=(1, 0)) for _ in range(4))

    def forward(self, x):
        w = x.shape[-1]
        y = rearrange(x, "(b t) c h w -> b c t (h w)", t=self.frames)
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.silu(norm(y)))
        return x + rearrange(y, "b c t (h w) -> (b t) c h w", w=w)


MIXERS = {"sti": STI, "conv3d": TemporalConv}


class Layer(nn.Module):
    """ResBlock -> STI [-> spatial transformer -> temporal transformer]: the unit that DFGN is made of."""

    def __init__(self, c_in, c_out, cfg, attention):
        super().__init__()
        heads = c_out // cfg.head_dim
        self.res = ResBlock(c_in, c_out, 4 * cfg.widths[0], film=cfg.film)
        self.mix = MIXERS[cfg.temporal](c_out, cfg.frames, max(2, c_out // 32) if cfg.narrow else 8)
        self.spatial = self.temporal = None
        if attention:
            self.spatial = SpatialTransformer(c_out, heads, cfg.head_dim, context_dim=cfg.context_dim)
            self.temporal = TemporalTransformer(c_out, heads, cfg.head_dim, cfg.frames)

    def forward(self, x, emb, kv=None):
        x = self.mix(self.res(x, emb))                                      # (b t) c_out h w
        return self.temporal(self.spatial(x, kv)) if self.spatial else x


def upsample(c):
    """Doubles the map: nearest neighbour, then a convolution."""
    return nn.Sequential(OrderedDict(up=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1)))


class ConditionEncoder(nn.Module):
    """Latents of the given frames (zeros elsewhere, or the guess) -> features of the same shape: three convs
    per frame, an encoder layer over the t frames of each pixel (release: image_latents_proj_in and
    image_latents_temporal_encoder)."""

    def __init__(self, c, frames):
        super().__init__()
        self.frames = frames
        self.convs = nn.ModuleList([nn.Conv2d(c, 4 * c, 3, padding=1), nn.Conv2d(4 * c, 4 * c, 3, padding=1),
                                    nn.Conv2d(4 * c, c, 3, padding=1)])
        self.norm, self.attn = nn.LayerNorm(c), Attention(c, 2, 4)
        self.ff1, self.ff2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x):
        h, w = x.shape[-2:]
        x = self.convs[2](F.silu(self.convs[1](F.silu(self.convs[0](x)))))  # (b t) c h w
        x = rearrange(x, "(b t) c h w -> (b h w) t c", t=self.frames)
        x = x + self.attn(self.norm(x))
        x = x + self.ff2(F.gelu(self.ff1(x)))
        return rearrange(x, "(b h w) t c -> (b t) c h w", h=h, w=w)


def start_at_zero(root, names):
    """The last layers of residual branches, which start as the identity: weights whose name has the regular
    expression `names`. All else starts as PyTorch does, but STI's 0 and 1 (release), frame numbers (0) and
    the places of a text (0.02)."""
    for name, p in root.named_parameters():
        if re.search(names, name):
            nn.init.zeros_(p)


# ------------------------------------------------------------------------------------------------------------
# Given frames: what one would guess from them alone (ours). Masks are (b, t) bool; `where`, not *, since
# NaN * 0 is NaN.


def spread(mask):
    """(b, t) -> (b, t, 1, 1, 1)."""
    return mask[:, :, None, None, None]


def neighbours(cond_mask):
    """-> the last given frame up to each frame, or -1, and the next one from it on, or t; both (b, t)."""
    t = cond_mask.shape[1]
    i = torch.arange(t, device=cond_mask.device)
    return (torch.where(cond_mask, i, -1).cummax(1).values,
            torch.where(cond_mask, i, t).flip(1).cummin(1).values.flip(1))


def blend(given, cond_mask):
    """Latents (b, t, c, h, w), given where cond_mask (b, t) is True -> the linear blend of the given frames
    around each frame, outside them a copy of the nearest one, zeros without any."""
    before, after = neighbours(cond_mask)
    b, t = cond_mask.shape
    i = torch.arange(t, device=given.device)
    share = (i - before).to(given.dtype) / (after - before).clamp(min=1)    # b t: of the next one
    share = torch.where(before < 0, 1.0, torch.where(after == t, 0.0, share))
    given = torch.where(spread(cond_mask), given, 0)
    row = torch.arange(b, device=given.device)[:, None]
    return torch.lerp(given[row, before.clamp(min=0)], given[row, after.clamp(max=t - 1)], spread(share))


def bridge(given, cond_mask, frame_mask):
    """Latents (b, t, c, h, w), given where cond_mask (b, t) is True, real where frame_mask is -> a guess at
    the other real frames of a loop: after its last frame comes the first (ours; why: benchmarks/README.md).

    A loop is taken for an Ornstein-Uhlenbeck process whose correlation falls by e in an eighth of a turn. So
    a frame u eighths behind a given one and v before the next differs from the mean of all given frames by
    (sinh(v) difference of the one + sinh(u) difference of the other) / sinh(u + v)."""
    t, (before, after) = cond_mask.shape[1], neighbours(cond_mask)
    i, n = torch.arange(t, device=given.device), frame_mask.sum(1, keepdim=True).clamp(min=1)
    before = torch.where(before < 0, before[:, -1:].clamp(min=0) - n, before)             # a turn before
    after = torch.where(after == t, after[:, :1] % t + n, after)            # a turn later; none given: 0
    u, v = 8 * (i - before) / n, 8 * (after - i) / n                        # b t
    given = torch.where(spread(cond_mask), given, 0)
    mean = given.sum(1, keepdim=True) / spread(cond_mask.sum(1, keepdim=True).clamp(min=1))
    first, second = (given.take_along_dim(spread(i % n), 1) - mean for i in (before, after))
    guess = mean + (spread(v.sinh()) * first + spread(u.sinh()) * second) / spread((u + v).sinh())
    return torch.where(spread(cond_mask), given, torch.where(spread(frame_mask), guess, 0))


def guess_frames(given, cond_mask, frame_mask):
    """-> (guess (b, t, c, h, w): `bridge`; unit (b, 1, 1, 1, 1): how far off it will be about, RMS).

    The process assumes that what it diffuses has variance 1. What differs from the guess has between 0.002
    and 0.25, and the given frames tell which: where neighbouring ones differ much, so do the frames between.
    Added to that is 0.25^2, for what moves although they agree. One given frame tells nothing about motion:
    its unit is a constant. Without any, the guess is zero and the latents themselves have variance 1."""
    last = neighbours(cond_mask)[0]
    last = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)   # b t: given before it, or -1
    pair = cond_mask & (last >= 0)                                          # b t: has a given neighbour
    jump = torch.where(spread(pair), given - given.take_along_dim(spread(last.clamp(min=0)), 1), 0).square()
    square = jump.mean((2, 3, 4)).sum(1) / pair.sum(1).clamp(min=1)         # b: mean over the pairs
    count = cond_mask.sum(1)
    unit = torch.where(count > 1, (square + 0.0625).sqrt(), torch.where(count == 1, 0.8, 1.0))
    return bridge(given, cond_mask, frame_mask), unit[:, None, None, None, None]


# ------------------------------------------------------------------------------------------------------------
# DFGN, the discrete frame generation network


class Condition(NamedTuple):
    """What the network is told besides noisy latents and step; constant over a sampling run."""

    features: torch.Tensor                # (b t) c' h w: the condition encoder's, masks, the draft
    kv: list                              # (keys, values) of each layer with attention, None for others
    pooled: torch.Tensor | float          # b d, added to the step's embedding; 0 without pooled_text
    real: torch.Tensor                    # b t bool, False = padding
    draft: torch.Tensor | None            # b t c h w, what the caption alone says; part of the features


class DFGN(nn.Module):
    """Latent video U-Net (Tables 6 and 8; its module names are the release's where tests/release.py says so).

    net(x, t, given, context, cond_mask=None, frame_mask=None):
        x           (b, t, c, h, w) noisy latents
        t           (b,) integer noise steps 0..999
        given       (b, t, c, h, w) clean latents; frames that are not given are ignored (without cond_mask:
                    pass zeros there)
        context     (b, n, d) text tokens
        cond_mask   (b, t) bool, True = given
        frame_mask  (b, t) bool, True = real, False = padding
    returns (b, t, c, h, w) fp32: the noise, or v. 2^levels divides height and width.

    Padded frames are zeroed at the entrance (ours), so what padding holds can never reach a real frame."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.checkpointing = cfg, False
        ws, c, n = cfg.widths, cfg.latent_channels, len(cfg.widths)
        heads = max(2, ws[0] // cfg.head_dim) if cfg.narrow else 8
        self.time = nn.Sequential(nn.Linear(ws[0], 4 * ws[0]), nn.SiLU(), nn.Linear(4 * ws[0], 4 * ws[0]))
        self.pool = nn.Linear(cfg.context_dim, 4 * ws[0], bias=False) if cfg.pooled_text else None
        self.condition_encoder = ConditionEncoder(c, cfg.frames)
        self.register_buffer("abar", alphas_cumprod(cfg.zero_snr), persistent=False)
        enters = c * (2 + cfg.draft) + 3 * cfg.inputs                       # channels
        # The mean text token (b, d) -> a clip as the caption has it, (b, t, c, h, w). It has a loss of its
        # own (`RDTF.forward`), so it learns within a few hundred updates; without it a network must place
        # its first strokes by the padding of its convolutions (ours).
        self.draft = nn.Sequential(OrderedDict(
            hidden=nn.Linear(cfg.context_dim, 256), act=nn.SiLU(),
            out=nn.Linear(256, math.prod(cfg.latent_shape)),
            clip=nn.Unflatten(1, cfg.latent_shape))) if cfg.draft else None
        self.conv_in = nn.Conv2d(enters, ws[0], 3, padding=1)
        self.bypass = nn.Linear(4 * ws[0], c * enters) if cfg.bypass else None
        self.number = nn.Parameter(torch.zeros(cfg.frames, ws[0])) if cfg.inputs else None
        self.transformer_in = TemporalTransformer(ws[0], heads, cfg.head_dim, cfg.frames)

        self.down, skips, width = nn.ModuleList(), [ws[0]], ws[0]
        for i, w in enumerate(ws):
            layers = [Layer(width if j == 0 else w, w, cfg, i < n - 1) for j in range(cfg.layers)]
            scale = {"scale": nn.Conv2d(w, w, 3, stride=2, padding=1)} if i < n - 1 else {}
            self.down.append(nn.ModuleDict({"layers": nn.ModuleList(layers)} | scale))
            skips += [w] * (cfg.layers + (i < n - 1))
            width = w
        self.mid = nn.ModuleList([Layer(width, width, cfg, True), Layer(width, width, cfg, False)])
        self.up = nn.ModuleList()
        for i, w in reversed(list(enumerate(ws))):
            layers = []
            for _ in range(cfg.layers + 1):
                layers.append(Layer(width + skips.pop(), w, cfg, i < n - 1))
                width = w
            scale = {"scale": upsample(w)} if i else {}
            self.up.append(nn.ModuleDict({"layers": nn.ModuleList(layers)} | scale))
        self.norm_out, self.conv_out = nn.GroupNorm(32, ws[0], eps=1e-5), nn.Conv2d(ws[0], c, 3, padding=1)
        if cfg.film:  # a norm over one channel takes away what the step, a caption or a colour add to it
            for m in [m for m in self.modules() if isinstance(m, nn.GroupNorm)]:
                m.num_groups = min(m.num_groups, max(1, m.num_channels // 8))
        start_at_zero(self, r"res\.conv2|proj_out|detail\.convs\.[13]|mix\.convs\.3|conv_out|"
                            r"draft\.out|bypass")

    def layers(self):
        """All layers in the order in which forward runs them."""
        return [m for m in self.modules() if isinstance(m, Layer)]

    def condition(self, given, context, cond_mask=None, frame_mask=None):
        """All that depends neither on the noisy latents nor on the step -> Condition."""
        b, f, _, h, w = given.shape
        real = torch.ones(b, f, dtype=torch.bool, device=given.device) if frame_mask is None else frame_mask
        known = real if cond_mask is None else cond_mask & real             # b t
        given = torch.where(spread(known), given, 0)                        # b t c h w
        extra = []
        if self.cfg.inputs:                                                 # zeros would mean the mean latent
            given, unit = guess_frames(given, known, real)
            maps = known.float(), real.float(), unit.log().view(b, 1).expand(b, f)
            extra = [torch.stack(maps, 2).flatten(0, 1)[:, :, None, None].expand(-1, -1, h, w)]
        pooled, draft = 0.0, None
        if self.pool or self.draft:                                         # ByteText: past the end are zeros
            count = (context != 0).any(-1).sum(1, keepdim=True).clamp(min=1)
            mean = context.sum(1) / count                                   # b d
            pooled = self.pool(mean) if self.pool else 0.0                  # b d
            if self.draft:
                draft = torch.where(spread(real), self.draft(mean), 0)      # b t c h w
                extra.append(draft.flatten(0, 1))
        features = self.condition_encoder(given.flatten(0, 1))              # (b t) c h w
        features = torch.cat([features, *(x.to(features.dtype) for x in extra)], 1)
        kv = [m.spatial.block.attn2.project_context(context) if m.spatial else None for m in self.layers()]
        return Condition(features, kv, pooled, real, draft)

    def forward(self, x, t, given=None, context=None, cond_mask=None, frame_mask=None, condition=None):
        if condition is None:
            condition = self.condition(given, context, cond_mask, frame_mask)
        emb = self.time(timestep_embedding(t, self.cfg.widths[0])) + condition.pooled
        emb = F.silu(emb)                                                   # b d, for all frames and layers
        b, f = x.shape[:2]
        x = torch.where(spread(condition.real), x, 0)                       # b t c h w
        entered = torch.cat([x.flatten(0, 1), condition.features.to(x.dtype)], 1)         # (b t) c+c' h w
        x = self.conv_in(entered)                                           # (b t) w0 h w
        if self.number is not None:
            x = x + self.number.to(x.dtype).repeat(b, 1)[:, :, None, None]
        x = self.run(self.transformer_in, x)
        skips, kv = [x], iter(condition.kv)
        for stage in self.down:
            for layer in stage["layers"]:
                x = self.run(layer, x, emb, next(kv))                       # (b t) w_i h/2^i w/2^i
                skips.append(x)
            if "scale" in stage:
                x = stage["scale"](x)                                       # (b t) w_i h/2^(i+1) w/2^(i+1)
                skips.append(x)
        for layer in self.mid:
            x = self.run(layer, x, emb, next(kv))
        for stage in self.up:
            for layer in stage["layers"]:
                x = torch.cat([x, skips.pop()], 1)                          # (b t) w_(i+1)+w_skip h/2^i w/2^i
                x = self.run(layer, x, emb, next(kv))                       # (b t) w_i h/2^i w/2^i
            if "scale" in stage:
                x = stage["scale"](x)                                       # (b t) w_i h/2^(i-1) w/2^(i-1)
        x = self.conv_out(F.silu(self.norm_out(x))).unflatten(0, (b, f))    # b t c h w
        if self.bypass:  # colours, which norms take away; sqrt(abar): of noise alone nothing passes
            noisy, told = self.bypass(emb).unflatten(1, (x.shape[2], -1)).tensor_split([x.shape[2]], 2)
            weights = torch.cat([self.abar[t].sqrt()[:, None, None] * noisy, told], 2)    # b c c+c'
            x = x + torch.einsum("boi,btihw->btohw", weights, entered.unflatten(0, (b, f)))
        return x.float()                                                    # b t c h w

    def run(self, module, *args):
        """Recompute the module in the backward pass instead of storing it, if asked to."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
        return module(*args)


# ------------------------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685): a trained model learns a few new stickers through few weights

ALPHA = 8                                 # what is learnt counts ALPHA / rank: any rank, one learning rate


class LoRA(nn.Module):
    """In place of a Linear layer: W + (alpha / r) B A, W frozen, A random, B = 0: it starts as that layer.
    A fused layer, q k v in one, has an A and a B for each of its parts, as if they were apart."""

    def __init__(self, linear, rank, parts):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias                 # they keep their names
        out, width = linear.weight.shape
        self.lora_a = nn.Parameter(torch.randn(parts * rank, width) * width ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(parts, out // parts, rank))

    def forward(self, x):
        low = F.linear(F.linear(x, self.lora_a), torch.block_diag(*self.lora_b))          # b n out
        return F.linear(x, self.weight, self.bias) + ALPHA / self.lora_b.shape[-1] * low


def add_lora(model, rank, where=nn.Module):
    """Freezes an RDTF, adds LoRA to q, k, v, out of its network's attentions -> {name: tensor} to be trained.
    where: only inside modules of this class, such as TemporalTransformer."""
    model.requires_grad_(False)
    inside = (m for root in model.net.modules() if isinstance(root, where) for m in root.modules())
    for m in dict.fromkeys(m for m in inside if isinstance(m, Attention)):
        m.q, m.out = LoRA(m.q, rank, 1 if m.kv else 3), LoRA(m.out, rank, 1)
        m.kv = LoRA(m.kv, rank, 2) if m.kv else None
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merge_lora(model, tensors):
    """What `add_lora` returned, trained -> into the weights of a model without LoRA: no cost is left."""
    for name in (n.removesuffix("lora_a") for n in tensors if n.endswith(".lora_a")):
        a, b = tensors[name + "lora_a"], tensors[name + "lora_b"]
        model.get_parameter(name + "weight").data += ALPHA / b.shape[-1] * torch.block_diag(*b) @ a


# ------------------------------------------------------------------------------------------------------------
# Text

WORDS = 4096                              # rows for whole words; two words that share one differ in spelling


class ByteText(nn.Module):
    """The default text encoder: a small transformer over UTF-8 bytes, trained with the network (ours).

    It needs no vocabulary and takes any language. A byte enters as its value + its place + a row for the word
    it belongs to. Captions are cut to `text_bytes`; tokens past their end are zeros. What enters is added to
    what comes out, or the blocks bury the words under what all captions share. "" is all zeros: no text."""

    def __init__(self, cfg):
        super().__init__()
        d, self.length = cfg.context_dim, cfg.text_bytes
        self.embed, self.words = nn.Embedding(256, d), nn.Embedding(WORDS, d)
        self.position = nn.Parameter(torch.empty(self.length, d))
        heads = max(1, d // 64)
        self.blocks = nn.ModuleList(TransformerBlock(d, heads, d // heads) for _ in range(cfg.text_layers))
        self.norm = nn.LayerNorm(d)
        nn.init.normal_(self.position, std=0.02)
        start_at_zero(self, r"blocks.*\.out\.")

    def tokenize(self, captions):
        """list of b strings -> (b, n, 2) int16 on the CPU: bytes and rows of `words`, zeros past the end."""
        rows = np.zeros((len(captions), self.length, 2), np.int16)
        for row, caption in zip(rows, captions):
            words = [w.encode("utf-8", "replace") for w in caption.lower().split()]
            text = b"".join(w + b" " for w in words)[:self.length]
            row[:len(text), 0] = np.frombuffer(text, np.uint8)
            numbers, lengths = [zlib.crc32(w) % WORDS for w in words], [len(w) + 1 for w in words]
            row[:len(text), 1] = np.repeat(numbers, lengths)[:self.length]
        return torch.from_numpy(rows)

    def forward(self, tok):
        byte, word = tok.long().unbind(-1)                                  # b n
        real = (byte > 0)[..., None]
        entered = x = (self.embed(byte) + self.position + self.words(word)) * real     # b n d
        for block in self.blocks:
            x = block(x)
        return entered + self.norm(x) * real


class FrozenText(nn.Module):
    """Frozen Hugging Face encoders; their tokens are joined along the sequence (Table 6: CLIP 1024-d, T5).

    An encoder whose width is not context_dim passes a trained MLP d -> 2048 -> context_dim (release, for the
    768-d T5). The encoders come from local folders, `paths`, and stay out of the module list: nothing trains
    or saves them."""

    def __init__(self, cfg, paths=()):
        super().__init__()
        self.paths, self.encoders, self.dims = [str(Path(p).resolve()) for p in paths], [], cfg.text_dims
        self.project = nn.ModuleList(
            nn.Identity() if d == cfg.context_dim else
            nn.Sequential(nn.Linear(d, 2048), nn.SiLU(), nn.Linear(2048, cfg.context_dim)) for d in self.dims)

    def load(self):
        """Open the encoders. ValueError, one line, where a folder holds none."""
        try:
            from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel
        except ImportError as e:
            raise ImportError("frozen text encoders need a package: pip install transformers") from e
        kinds = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
        for path in self.paths:
            try:                                                            # never asks the Hub
                kind = AutoConfig.from_pretrained(path, local_files_only=True).model_type
                model = kinds.get(kind, AutoModel).from_pretrained(path, local_files_only=True)
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            except Exception as e:                                          # broken files raise anything
                raise ValueError(f"{path}: not a folder with a text encoder ({reason(e)})") from None
            self.encoders.append((tokenizer, model.eval().requires_grad_(False)))

    def widths(self):
        return tuple(model.config.hidden_size for _, model in self.encoders)

    def tokenize(self, captions):
        """list of b strings -> (b, encoders, 2, 77) int64 on the CPU: token ids, 1 where a token is real."""
        if not self.encoders:
            self.load()
            if self.widths() != self.dims:
                raise ValueError(f"text encoders of widths {self.widths()}, this model wants {self.dims}")
        rows = [tokenizer(list(captions), padding="max_length", max_length=77, truncation=True,
                          return_tensors="pt") for tokenizer, _ in self.encoders]
        return torch.stack([torch.stack([x["input_ids"], x["attention_mask"]], 1) for x in rows], 1)

    @torch.compiler.disable                                                 # a new shape with every batch
    def forward(self, tok):
        """Each caption is encoded once however often the batch has it, on the device of `tok`."""
        once, back = torch.unique(tok, dim=0, return_inverse=True)
        states = []
        for i, (_, model) in enumerate(self.encoders):
            ids, mask = once[:, i].unbind(1)                                # unique captions 77
            with torch.no_grad():
                x = model.to(tok.device)(ids, attention_mask=mask).last_hidden_state
            states.append(self.project[i](x)[back])                         # b 77 d
        return torch.cat(states, 1)                                         # b n d


# ------------------------------------------------------------------------------------------------------------
# Autoencoder. Module names are those of Stable Diffusion's in diffusers, so its weights load as they are.


class VAEAttention(nn.Module):
    """Single-head self-attention over the pixels of the coarsest map."""

    def __init__(self, c):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        y = tokens(self.group_norm(x)).unsqueeze(1)                         # n 1 (h w) c
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y)).squeeze(1)
        return x + self.to_out[0](y).transpose(1, 2).unflatten(2, x.shape[-2:])


class VAEBlock(nn.Module):
    """ResBlocks; the middle may have attention after its first one, a level ends in a change of scale."""

    def __init__(self, c_in, c_out, layers, scale=None, attention=False):
        super().__init__()
        blocks = (ResBlock(c_in if j == 0 else c_out, c_out, eps=1e-6) for j in range(layers))
        self.resnets = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList([VAEAttention(c_out)] if attention else [])
        half = OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c_out, c_out, 3, stride=2))
        self.downsamplers = nn.ModuleList([nn.Sequential(half)] if scale == "down" else [])   # pads as LDM
        self.upsamplers = nn.ModuleList([upsample(c_out)] if scale == "up" else [])

    def forward(self, x):
        for m in (self.resnets[0], *self.attentions, *self.resnets[1:], *self.downsamplers, *self.upsamplers):
            x = m(x)
        return x


class VAEHalf(nn.Module):
    """Encoder (scale "down": levels from fine to coarse, the middle) or decoder ("up": the other way)."""

    def __init__(self, c_in, c_out, widths, layers, attention, scale):
        super().__init__()
        self.scale, last = scale, len(widths) - 1
        levels = nn.ModuleList(VAEBlock(widths[max(i - 1, 0)], w, layers, scale if i < last else None)
                               for i, w in enumerate(widths))
        coarse = widths[0 if scale == "up" else -1]
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.add_module(scale + "_blocks", levels)
        self.mid_block = VAEBlock(coarse, coarse, 2, attention=attention)
        self.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x):                                                   # n c_in h w
        x = self.conv_in(x)                                                 # n w0 h w
        up = self.scale == "up"
        for block in (self.mid_block, *self.up_blocks) if up else (*self.down_blocks, self.mid_block):
            x = block(x)                                                    # n w_i, half or twice the edge
        return self.conv_out(F.silu(self.conv_norm_out(x)))                 # n c_out h w


class AutoencoderKL(nn.Module):
    """Pictures <-> latents: Stable Diffusion's (3 channels) or our own, native in RGBA.

    Pictures are premultiplied RGBA in [0, 1], (n, 4, h, w), on both sides. With 4 channels the network sees
    them as they are; with 3 it sees them on white and gives back opaque ones. Latents are normalised per
    channel by statistics of the training set, which are part of the weights."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.f = cfg, cfg.f
        c, ws, layers, attention = cfg.latent_channels, cfg.vae_widths, cfg.vae_layers, cfg.vae_attention
        patch = cfg.vae_channels * cfg.vae_patch ** 2
        self.encoder = VAEHalf(patch, 2 * c, ws, layers, attention, "down")
        self.decoder = VAEHalf(c, patch, ws[::-1], layers + 1, attention, "up")
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("std", torch.ones(c))

    def moments(self, x):
        """Pictures -> raw posterior mean and log-variance, each (n, c, h/f, w/f)."""
        if self.cfg.vae_channels == 3:
            x = x[:, :3] + (1 - x[:, 3:])                                   # on white
        x = F.pixel_unshuffle(2 * x - 1, self.cfg.vae_patch)                # n c*p^2 H/p W/p
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, 1)  # each n c h w
        return mean, logvar.clamp(-30, 20)

    def decode_raw(self, z):
        """Raw latents -> pictures, not clamped (the loss wants the overshoot)."""
        y = (F.pixel_shuffle(self.decoder(self.post_quant_conv(z)).float(), self.cfg.vae_patch) + 1) / 2
        return y if self.cfg.vae_channels == 4 else torch.cat([y, torch.ones_like(y[:, :1])], 1)

    def encode(self, x):
        """Pictures -> normalised latents (the posterior mean: stores must be deterministic)."""
        return (self.moments(x)[0] - self.mean[:, None, None]) / self.std[:, None, None]

    def decode(self, z):
        """Normalised latents -> pictures."""
        return premultiplied(self.decode_raw(z * self.std[:, None, None] + self.mean[:, None, None]))

    def fingerprint(self):
        return fingerprint(self.state_dict())


def premultiplied(x):
    """(..., 4, h, w) -> within [0, 1], colour never above alpha."""
    colour, alpha = x.clamp(0, 1).split([3, 1], -3)
    return torch.cat([torch.minimum(colour, alpha), alpha], -3)


def fingerprint(weights):
    """A short hash of a state dict in half precision, so that an exported checkpoint has the same one. Stores
    of latents fit one autoencoder only, and LoRA's weights one model."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def reason(e):
    """An exception -> what it says, on one line."""
    return (" ".join(str(e).split()) or type(e).__name__)[:120]


def read_weights(path):
    """A dict of tensors from .safetensors or .pt; never runs code that the file carries. ValueError, one
    line, if it can't be opened."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(str(path))
        data = torch.load(path, map_location="cpu", weights_only=True)
        return data if isinstance(data, dict) else {}
    except ImportError as e:
        raise ImportError(f"{path} needs an optional package: pip install safetensors") from e
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as e:                                                  # broken files raise anything
        raise ValueError(f"{path}: no weights that can be opened safely ({type(e).__name__})") from None


def load_vae(path):
    """The autoencoder of one of our checkpoints, or Stable Diffusion's -> frozen AutoencoderKL. ValueError,
    one line, for any other file."""
    data = read_weights(path)
    if data.get("stage") == "lora":
        raise ValueError(f"{path}: a LoRA alone, for sample.py --lora; name what it was trained on")
    try:
        if "vae" in data:
            vae, state = AutoencoderKL(Config(**data["config"])), data["vae"]
        else:
            vae, state = AutoencoderKL(Config(**PRESETS["paper"])), {}
            old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
            for name, value in data.items():
                for a, b in old.items():                                    # files from before diffusers 0.18
                    name = name.replace(f"attentions.0.{a}.", f"attentions.0.{b}.")
                is_linear = ".attentions.0.to_" in name and value.ndim == 4  # 1x1 convs in LDM's own files
                state[name] = value[:, :, 0, 0] if is_linear else value
            c = vae.cfg.latent_channels
            state.update(mean=torch.zeros(c), std=torch.full((c,), 1 / 0.18215))
        vae.load_state_dict({k: v.float() for k, v in state.items()})
    except Exception as e:
        raise ValueError(f"{path}: not an autoencoder, or its training has not ended ({reason(e)})") from None
    return vae.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Diffusion (Section 4)


def q_sample(y0, noise, a):
    """y_t = sqrt(a) y_0 + sqrt(1 - a) noise in fp32; a: abar of each clip's step, (b, 1, 1, 1, 1)."""
    return a.sqrt() * y0.float() + (1 - a).sqrt() * noise


def target(y0, noise, a, prediction):
    """What the network is to put out: the noise (paper), or v (arXiv 2202.00512; ours for small presets).

    At high noise the noise is nearly the input: a small network spends itself on passing it through, and an
    error of 0.07 in it is an error of 1 in y_0. v is y_0 itself there, up to its sign."""
    return noise if prediction == "eps" else a.sqrt() * noise - (1 - a).sqrt() * y0


def to_y0(out, y, a, prediction):
    """The inverse of `target`: the network's output for y = y_t -> its estimate of y_0."""
    if prediction == "eps":
        return (y - (1 - a).sqrt() * out) / a.sqrt()
    return a.sqrt() * y - (1 - a).sqrt() * out


class RDTF(nn.Module):
    """DFGN plus its text encoder: all that the main run trains. forward is the diffusion step of training.

    The process runs on y_0: the clean latents x_0 themselves (paper), or with `residual` (x_0 - guess) / unit
    of `guess_frames` (ours): the network learns what moves, instead of first learning to copy."""

    def __init__(self, cfg, text_paths=()):
        super().__init__()
        self.cfg, self.net = cfg, DFGN(cfg)
        self.text = FrozenText(cfg, text_paths) if cfg.text_dims else ByteText(cfg)

    @property
    def abar(self):
        return self.net.abar

    def guess(self, x0, cond_mask, frame_mask):
        """-> (guess, unit), so that x_0 = guess + unit * y_0; 0 and 1 without `residual`."""
        return guess_frames(x0, cond_mask, frame_mask) if self.cfg.residual else (0.0, 1.0)

    def noised(self, y0, noise, t, cond_mask):
        """-> (y_t as the network sees it, abar (b, 1, 1, 1, 1)). With `clean` given frames stay clean."""
        a = self.abar[t].view(-1, 1, 1, 1, 1)
        y = q_sample(y0, noise, a)
        return (torch.where(spread(cond_mask), y0, y) if self.cfg.clean else y), a

    def counted(self, cond_mask, frame_mask):
        """(b, t): the frames that count in the loss. Real ones; with `clean` only made ones."""
        return frame_mask & ~cond_mask if self.cfg.clean else frame_mask

    def forward(self, x0, noise, t, text, cond_mask, frame_mask):
        """Losses (b, 1): squared error over the frames that count / (F c h w) (release, Table 7); with a
        draft (b, 2), also its own, over real frames (ours).

        `counted` says which. The denominator is a constant, so every such frame of every sticker weighs the
        same, and sums over micro-batches and ranks are exact with ragged lengths.
        x0, noise (b, t, c, h, w); t (b,); text: what `text.tokenize` gave; masks (b, t) bool."""
        guess, unit = self.guess(x0, cond_mask, frame_mask)
        y0 = (x0 - guess) / unit
        y, a = self.noised(y0, noise, t, cond_mask)
        condition = self.net.condition(x0, self.text(text), cond_mask, frame_mask)
        out = self.net(y, t, condition=condition)
        # `where` before the square: else NaN in padding would come back through its gradient
        counts, wanted = self.counted(cond_mask, frame_mask), target(y0, noise, a, self.cfg.prediction)
        errors = [torch.where(spread(counts), out - wanted, 0)]
        if condition.draft is not None:
            errors.append(torch.where(spread(frame_mask), condition.draft - x0, 0))
        return torch.stack(errors, 1).square().flatten(2).mean(2)

    @torch.no_grad()
    def mean(self, x0, noise, text, cond_mask, frame_mask):
        """What sampling in one step makes: the estimate of x_0 from noise alone, (b, t, c, h, w). x0 is read
        where it is given. EV = 1 - its squared error / that of `blend`, over made frames."""
        denoise, finish = denoiser(self, text, text, x0, cond_mask, frame_mask, 1.0, 1.0, noise)
        return finish(denoise(noise, torch.full((len(x0),), STEPS - 1, device=x0.device)))


def guidance_weights(text_scale, image_scale, has_text, has_image):
    """Two-scale guidance as a weighted sum of network calls: {(text?, image?): weight}, zeros left out.

    e = e(0,0) + s_I (e(0,I) - e(0,0)) + s_T (e(T,I) - e(0,I)): InstructPix2Pix (arXiv 2211.09800 eq. 3); the
    paper prints no formula. Branches that differ only in what is not there are one."""
    weights = {}
    for key, w in (((0, 0), 1 - image_scale), ((0, 1), image_scale - text_scale), ((1, 1), text_scale)):
        key = (bool(key[0] and has_text), bool(key[1] and has_image))
        weights[key] = weights.get(key, 0.0) + w
    return {k: w for k, w in weights.items() if abs(w) > 1e-8}


def denoiser(model, text, negative, given, cond_mask, frame_mask, text_scale, image_scale, noise,
             has_text=True):
    """-> (denoise(y, t) -> y_0: the guided estimate; finish(y_0) -> x_0).

    What is constant over the steps is computed here, once. text, negative: what `text.tokenize` gave for the
    captions and for "no text". given (b, t, c, h, w) latents, used where cond_mask (b, t) is True. noise, of
    the same shape: with it given frames enter every step as they did in training."""
    if model.cfg.residual and image_scale != 1:
        raise ValueError(f"image_scale={image_scale}: must be 1, since the residual has other units without "
                         f"given frames")
    guess, unit = model.guess(given, cond_mask, frame_mask)
    weights = guidance_weights(text_scale, image_scale, has_text, bool(cond_mask.any()))
    n, b, keys = len(weights), len(given), list(weights)
    states = {k: model.text(text if k else negative) for k in {key[0] for key in keys}}
    masks = torch.cat([cond_mask if image else torch.zeros_like(cond_mask) for _, image in keys])
    condition = model.net.condition(given.repeat(n, 1, 1, 1, 1), torch.cat([states[k] for k, _ in keys]),
                                    masks, frame_mask.repeat(n, 1))
    w = torch.tensor([weights[k] for k in keys], device=given.device).view(n, 1, 1, 1, 1, 1)
    given_y0 = torch.zeros_like(given) if model.cfg.residual else given

    def denoise(y, t):
        entered, a = model.noised(given_y0, noise, t, cond_mask)
        y = torch.where(spread(cond_mask), entered, y)
        out = model.net(y.repeat(n, 1, 1, 1, 1), t.repeat(n), condition=condition)
        # the weights sum to 1 and y is the same, so guiding the output guides noise, v and y_0 alike
        return to_y0((w * out.unflatten(0, (n, b))).sum(0), y, a, model.cfg.prediction)

    return denoise, lambda y0: guess + unit * y0


def timesteps(n):
    """n decreasing steps: 999, 999 - 1000/n, ... ("trailing": arXiv 2305.08891 says why to begin there)."""
    if not 1 <= n <= STEPS:
        raise ValueError(f"steps={n}: choose 1..{STEPS}")
    return [round(STEPS * (n - i) / n) - 1 for i in range(n)]


SAMPLERS = {"ddim": 50, "dpm": 8}         # and the steps of one that is not the checkpoint's own


def sample(denoise, y, steps=50, sampler="ddim", eta=1.0, noise=None, callback=None, abar=None):
    """y ~ N(0, 1) (b, t, c, h, w) -> y_0, by `steps` calls of denoise(y, t) with t (b,).

    ddim: arXiv 2010.02502 eq. 12 with eta (the paper: 50 steps, eta 1.0, which is ancestral sampling). dpm:
    DPM-Solver++(2M), arXiv 2211.01095 algorithm 2, for few steps. noise: () -> tensor like y, for
    eta > 0. abar: of the model, None = the paper's. The step before is the list's next entry, never
    t - T // n. Nothing is clipped."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r}: choose one of {', '.join(SAMPLERS)}")
    noise = noise or (lambda: torch.randn_like(y))
    abar, ts = (alphas_cumprod() if abar is None else abar).tolist(), timesteps(steps)
    old = None                                                              # (y0, log-SNR) of the step before
    for i, t in enumerate(ts):
        a, a_next = abar[t], abar[ts[i + 1]] if i + 1 < steps else 1.0
        y0 = denoise(y, torch.full((len(y),), t, device=y.device)).float()
        if sampler == "ddim":
            e = (y - a ** 0.5 * y0) / (1 - a) ** 0.5
            var = eta ** 2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
            y = a_next ** 0.5 * y0 + max(1 - a_next - var, 0.0) ** 0.5 * e
            if var > 0:
                y = y + var ** 0.5 * noise()
        elif a_next == 1:                                                   # infinite log-SNR: first order
            y = y0
        else:
            lam, lam_next = (0.5 * math.log(x / (1 - x)) if x else -math.inf for x in (a, a_next))
            d = y0
            if old is not None:
                d = y0 + (y0 - old[0]) * (lam_next - lam) / (2 * (lam - old[1]))
            y = ((1 - a_next) / (1 - a)) ** 0.5 * y - a_next ** 0.5 * math.expm1(lam - lam_next) * d
            old = (y0, lam)
        if callback:
            callback(i, y)
    return y


# ------------------------------------------------------------------------------------------------------------
# A model ready to use

FORMAT = 2                                # of checkpoints
SHIPPED = Path(__file__).parent / "weights" / "stickers-64.pt"


def find_device(name):
    """auto, cpu, cuda, cuda:1 or mps -> torch.device; of torchrun's processes each has a GPU of its own, and
    none has Apple's, whose tensors gloo can't send. ValueError, one line, where it can't be used."""
    rank, alone = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) == 1
    if name == "auto":
        mps = torch.backends.mps.is_available() and alone
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not alone and (name == "mps" or name.startswith("cuda:")):
        raise ValueError(f"--device {name}: for one process; leave torchrun out, or give --device "
                         f"{'cpu' if name == 'mps' else 'cuda, each a GPU of its own'}")
    if name == "cuda" and 0 < torch.cuda.device_count() <= rank:
        raise ValueError(f"--device cuda: this machine has {torch.cuda.device_count()} GPU(s) for more "
                         f"processes; lower --nproc_per_node")
    try:
        own = torch.device("cuda", rank) if name == "cuda" else name
        return torch.zeros(1, device=own).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: not usable here ({reason(e)}); try --device cpu") from None


@lru_cache
def has_bf16(device):
    """Is bf16 arithmetic faster than fp32 on this torch.device? An EPYC with bf16 instructions is four times
    as fast in them, a Xeon that has them but no AMX half as fast; emulated they never pay
    (benchmarks/README.md). No stopwatch: one answer for a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    cpu = Path("/proc/cpuinfo")                                             # where there is none: fp32
    amd = cpu.exists() and "AuthenticAMD" in cpu.read_text() and torch.cpu._is_avx512_bf16_supported()
    return device.type == "cpu" and (amd or torch.cpu._is_amx_tile_supported())


class Loaded(NamedTuple):
    """Networks in eval mode on one device, configuration, what the file says of itself."""

    model: RDTF
    vae: AutoencoderKL
    cfg: Config
    meta: dict


def load_model(path, device="cpu"):
    """A checkpoint of train.py, whole or exported -> Loaded, in fp32, with the averaged weights where there
    are any. ValueError, one line, for any other file."""
    data = read_weights(path)
    if data.get("format") != FORMAT or data.get("stage") != "main":
        alone = {"vae": "an autoencoder alone", "lora": "a LoRA alone, for sample.py --lora"}
        what = alone.get(data.get("stage"), "no checkpoint of this version of rdtf")
        raise ValueError(f"{path}: {what}; use a run's last.pt")
    try:
        cfg = Config(**data["config"])
        model, vae = RDTF(cfg, data.get("text_encoder") or ()), AutoencoderKL(cfg)
        weights = {k: v.float() for k, v in {**data["model"], **(data.get("ema") or {})}.items()}
        more = weights.keys() - model.state_dict().keys()
        lora = {k: weights.pop(k) for k in more if ".lora_" in k}           # of a run with train.py --lora
        model.load_state_dict(weights)
        merge_lora(model, lora)
        vae.load_state_dict({k: v.float() for k, v in data["vae"].items()})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: damaged, or of another version of rdtf ({reason(e)})") from None
    # weights stay trainable: autocast keeps its bf16 copies of a step for the next one only then
    return Loaded(model.to(device).eval(), vae.to(device).eval(), cfg,
                  {k: data.get(k) for k in ("step", "fingerprint", "vae_id")})


def load_lora(path, loaded):
    """What `train.py --lora` exported -> into the weights of the model it was trained on. ValueError, one
    line, for any other file or model."""
    data = read_weights(path)
    if data.get("format") != FORMAT or data.get("stage") != "lora" or "lora" not in data:
        raise ValueError(f"{path}: no LoRA of this version of rdtf; write one with train.py --lora, --export")
    if data.get("base") != fingerprint(loaded.model.state_dict()):
        raise ValueError(f"{path}: trained on top of another checkpoint; give that one with --ckpt")
    merge_lora(loaded.model, to_device(data["lora"], loaded.vae.mean.device))


def to_device(x, device):
    """A dict of tensors. Only CUDA may copy later: elsewhere the source could be gone by then."""
    later = torch.device(device).type == "cuda"
    return {k: v.to(device, non_blocking=later) for k, v in x.items()}


def decode_clips(vae, x, z, frames, cond_mask, frame_mask):
    """Latents x (b, t, c, h, w) -> pictures (b, t, 4, s, s); where cond_mask (b, t) is True: `frames`, whose
    latents are z.

    What the autoencoder loses of the given frames is known, and of their bridge, too. A made frame gets back
    what is lost of the one among these that it is most like, place by place, as far as it is like it (ours:
    0.7 dB between Fluent frames, benchmarks/README.md)."""
    def show(z):
        return torch.stack([vae.decode(row) for row in z]).float()
    given = spread(cond_mask)
    clip = show(torch.where(given, z, x))                                   # b t 4 s s
    if not cond_mask.any():
        return clip
    # the bridge, as the autoencoder shows it: mean of the bridge of what it shows, and of what it shows of it
    guess, shown = (bridge(y, cond_mask, frame_mask) for y in (frames, clip))
    shown = (shown + show(bridge(z, cond_mask, frame_mask))) / 2
    # (as the autoencoder shows it, as it is, is it known in this clip?)
    known = [(clip[:, [i]], frames[:, [i]], cond_mask[:, i]) for i in range(clip.shape[1])]
    known += [(shown, guess, cond_mask.any(1))]
    apart = []
    for look, _, there in known:                                            # each b t s s
        d = F.avg_pool2d((clip - look).square().mean(2), 9, 1, 4, count_include_pad=False)
        apart.append(torch.where(there[:, None, None, None], d, 9.0))       # 9: farther than any
    apart = torch.stack(apart)
    which, at_all = (-apart / 0.03 ** 2).softmax(0), torch.exp(-apart / 0.1 ** 2)         # most? at all?
    back = sum(w[:, :, None] * (true - look) for w, (look, true, _) in zip(which * at_all, known))
    return torch.where(given, frames, premultiplied(clip + back))


@torch.no_grad()
def sample_clips(loaded, captions, frames, cond_mask, frame_mask=None, *, steps=None, sampler=None, eta=1.0,
                 text_scale=None, image_scale=None, temperature=None, negative="", seeds=(0,), bf16=None,
                 progress=None):
    """The one way to sample: (b, F, 4, s, s) premultiplied RGBA in [0, 1] in and out.

    captions: b strings, "" = no text. frames: given frames where cond_mask (b, F) is True, anything
    elsewhere. frame_mask (b, F): True = a frame that is wanted; None = all. seeds: a number or CPU generator
    per sticker. negative takes the place of "no text" in guidance. temperature: the noise is multiplied by
    it; below 1 clips come nearer to the one-step mean: calmer, and less torn (ours). None: the checkpoint's
    own sampler, steps, scales and temperature, but with `residual` the text scale is one less for each given
    frame (of the sticker with the fewest), 1 (half the work) at least: they say more than the caption (ours);
    bf16 where the device has it.
    progress(i, y) is called after every step.
    """
    model, vae, cfg, _ = loaded
    device, b = model.abar.device, len(captions)
    cond = torch.as_tensor(cond_mask, dtype=torch.bool, device=device)
    real = torch.ones_like(cond) if frame_mask is None else \
        torch.as_tensor(frame_mask, dtype=torch.bool, device=device)
    cond = cond & real                                                      # else padding would be looked at
    frames = torch.where(spread(cond), frames.to(device).float(), 0.0)
    if text_scale is None:
        told = int(cond.sum(1).min()) if cfg.residual and not negative else 0
        text_scale = max(1.0, cfg.text_scale - told) if told else cfg.text_scale
    image_scale = cfg.image_scale if image_scale is None else image_scale
    temperature = cfg.temperature if temperature is None else temperature
    if len(seeds) != b:
        raise ValueError(f"{len(seeds)} seeds for {b} stickers: give one each")
    gens = [s if isinstance(s, torch.Generator) else torch.Generator().manual_seed(int(s)) for s in seeds]

    def noise():  # one generator per sticker, always on the CPU: it depends on no batch and no device
        drawn = torch.stack([torch.randn(cfg.latent_shape, generator=g) for g in gens])
        return temperature * drawn.to(device)

    bf16 = has_bf16(device) if bf16 is None else bf16
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        z = torch.zeros(b, *cfg.latent_shape, device=device)
        if cond.any():
            z[cond] = vae.encode(frames[cond])
        text, none = (model.text.tokenize(c).to(device) for c in (list(captions), [negative] * b))
        y = noise()
        denoise, finish = denoiser(model, text, none, z, cond, real, text_scale, image_scale, y,
                                   any(c != negative for c in captions))
        x = finish(sample(denoise, y, steps or cfg.steps, sampler or cfg.sampler, eta, noise, progress,
                          model.abar))
        clip = decode_clips(vae, x, z, frames, cond, real)
    return torch.where(spread(real), clip, 0.0)
