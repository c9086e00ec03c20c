"""RDTF: few-frame video diffusion for animated stickers, trained from scratch on few resources (arXiv 2503.17735).

This file is the model, read top to bottom: configuration -> layers -> DFGN (the denoising network) -> text encoders
-> AutoencoderKL -> diffusion (noise schedule, loss, guidance, samplers). The two ideas about *data*, dual masks and the
curriculum, are in curriculum.py; stickers come from data.py; `python train.py` trains and `python sample.py` samples.

Axis letters: b clip, t frame, c channel, h w rows and columns, n tokens, d width. A clip is (b, t, c, h, w) at every
public function. Inside the network frames are folded into the batch, `(b t) c h w` in channels-last memory, so that
"(b t) (h w) c" tokens and "b (t h) w c" clips are views of the same storage and only mixing over time has to copy.

Sources are cited as in the docstrings below: "Table N" / "eq." of the paper, "release" for the authors' code, "ours"
for decisions of this project where both are silent.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Config:
    """Everything that rebuilds the model; saved as a plain dict in every checkpoint. Defaults are the preset `tiny`."""

    size: int = 64                        # sticker edge, pixels
    frames: int = 8                       # F, frames of a clip (fixed: STI's detail branch has F channels)
    # DFGN
    latent_channels: int = 4
    widths: tuple = (64, 128, 192)        # channels per level; the last level has no attention
    layers: int = 2                       # layers per down level; up levels have one more
    head_dim: int = 32
    context_dim: int = 128                # width of the text tokens
    temporal: str = "sti"                 # sti | conv3d (Table 3's ablation) | gated (the overview figure's fusion)
    # text: a byte transformer trained with the network, unless text_dims names the widths of frozen encoders
    text_layers: int = 3
    text_bytes: int = 64
    text_dims: tuple = ()
    # autoencoder
    vae_channels: int = 4                 # 4: premultiplied RGBA (ours), 3: RGB composited on white (SD type)
    vae_widths: tuple = (32, 64, 128)     # one width per level, so f = 2^(levels - 1)
    vae_layers: int = 1
    vae_attention: bool = False
    # sampling defaults (Section 4 of the paper uses 7.5 and 7.5; small models do best with less, see README)
    text_scale: float = 7.5
    image_scale: float = 7.5

    def __post_init__(self):
        for name in ("widths", "text_dims", "vae_widths"):
            setattr(self, name, tuple(getattr(self, name)))
        if self.temporal not in MIXERS:
            raise ValueError(f"temporal={self.temporal!r}: choose one of {', '.join(MIXERS)}")

    @property
    def f(self):
        """Pixels per latent along one edge."""
        return 2 ** (len(self.vae_widths) - 1)


PRESETS = {
    # 64 px RGBA, latents 4x16x16: the quickstart, the tests and the shipped checkpoint. A laptop CPU trains it.
    "tiny": dict(text_scale=2.0, image_scale=1.0),
    # 128 px RGBA, latents 4x32x32: one consumer GPU.
    "base": dict(size=128, widths=(128, 256, 384, 512), head_dim=64, context_dim=512, text_layers=6,
                 text_scale=5.0, image_scale=1.5),
    # The paper's network and input (Table 6, release): 256 px, Stable Diffusion's VAE, 4x32x32 latents, text 1024-d.
    "paper": dict(size=256, widths=(320, 640, 1024, 1280), head_dim=64, context_dim=1024, text_dims=(1024, 768),
                  vae_channels=3, vae_widths=(128, 256, 512, 512), vae_layers=2, vae_attention=True),
}

# ----------------------------------------------------------------------------------------------------------------
# Layers. Every one takes and returns `(b t) c h w` feature maps unless its docstring says otherwise.


def timestep_embedding(t, dim):
    """(b,) integer steps -> (b, dim) fp32 sinusoids, cos first, frequencies 10000^(-i / (dim/2)) (release).

    Always fp32: in bf16 only 507 of the 1000 steps stay distinct.
    """
    freqs = torch.exp(-math.log(10000.0) / (dim // 2) * torch.arange(dim // 2, device=t.device, dtype=torch.float32))
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


def tokens(x):
    """(b t) c h w -> (b t) (h w) c: a view, because feature maps are channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def feature_map(x, h, w):
    """(b t) (h w) c -> (b t) c h w in channels-last memory; the inverse view of `tokens`."""
    return x.unflatten(1, (h, w)).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """GN SiLU conv, + time, GN SiLU conv, skip by identity or 1x1 conv (release; eps 1e-5)."""

    def __init__(self, c_in, c_out, time_dim):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in, eps=1e-5), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(32, c_out, eps=1e-5), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):                                              # emb: b d, already through SiLU
        h = self.conv1(F.silu(self.norm1(x)))                               # (b t) c_out h w
        e = self.time(emb).to(h.dtype).repeat_interleave(h.shape[0] // emb.shape[0], 0)
        h = self.conv2(F.silu(self.norm2(h + e[:, :, None, None])))
        return self.skip(x) + h


class Attention(nn.Module):
    """Multi-head attention with one fused projection; q, k, v without bias, output with (release).

    context_dim = 0: self-attention. Otherwise keys and values come from `project_context`, computed by the caller, once
    per clip (all frames share them) and, when sampling, once for all steps.
    """

    def __init__(self, dim, heads, head_dim, context_dim=0):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q = nn.Linear(dim, inner if context_dim else 3 * inner, bias=False)
        self.kv = nn.Linear(context_dim, 2 * inner, bias=False) if context_dim else None
        self.out = nn.Linear(inner, dim)

    def split(self, x, parts):
        """b n (parts heads d) -> `parts` tensors b heads n d."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def project_context(self, context):
        return self.split(self.kv(context), 2)                              # two of b heads n d

    def forward(self, x, kv=None):                                          # x: b n d
        if kv is None:
            q, k, v = self.split(self.q(x), 3)
        else:
            (q,), (k, v) = self.split(self.q(x), 1), kv
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))  # no mask anywhere: flash kernels apply
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GEGLU x4 with the exact gelu (release)."""

    def __init__(self, dim):
        super().__init__()
        self.proj, self.out = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """LN attention, LN attention, LN feed-forward, each residual. The 2nd attention reads `kv` or is another self-attention."""

    def __init__(self, dim, heads, head_dim, context_dim=0):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads, head_dim)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, head_dim, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x, kv=None):
        x = x + self.attn1(self.norm1(x))
        if kv is None:
            x = x + self.attn2(self.norm2(x))
        else:  # the frames of a clip are one row of queries: b (t n) d against b n d, nothing is expanded
            rows = x.shape[0] // kv[0].shape[0]
            y = self.norm2(x).unflatten(0, (-1, rows)).flatten(1, 2)
            x = x + self.attn2(y, kv).unflatten(1, (rows, -1)).flatten(0, 1)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Per frame over its h*w tokens, with cross-attention to the text (release)."""

    def __init__(self, c, head_dim, context_dim):
        super().__init__()
        heads = c // head_dim
        self.norm = nn.GroupNorm(32, c, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(c, heads * head_dim), nn.Linear(heads * head_dim, c)
        self.block = TransformerBlock(heads * head_dim, heads, head_dim, context_dim)

    def forward(self, x, kv):
        h, w = x.shape[-2:]
        y = self.proj_in(tokens(self.norm(x)))                              # (b t) (h w) d
        return x + feature_map(self.proj_out(self.block(y, kv)), h, w)


class TemporalTransformer(nn.Module):
    """Per pixel over its t tokens; both attentions are self-attentions; no positional encoding (release)."""

    def __init__(self, c, heads, head_dim, frames):
        super().__init__()
        self.frames, self.norm = frames, nn.GroupNorm(32, c, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(c, heads * head_dim), nn.Linear(heads * head_dim, c)
        self.block = TransformerBlock(heads * head_dim, heads, head_dim)

    def forward(self, x):
        t, (h, w) = self.frames, x.shape[-2:]
        clip = rearrange(x, "(b t) c h w -> b c (t h) w", t=t)              # a view; GN over (c/32, t, h, w)
        y = rearrange(self.norm(clip), "b c (t n) w -> (b n w) t c", t=t)   # the one copy in ...
        y = self.proj_out(self.block(self.proj_in(y)))                      # (b h w) t c
        return x + rearrange(y, "(b h w) t c -> (b t) c h w", h=h, w=w)     # ... and the one copy out, in the sum


# -- mixing neighbouring frames: one of these three stands behind every ResBlock


class Semantic(nn.Module):
    """STI's semantic branch: every 2x2-pooled position of every frame attends to all others (release, Table 6).

    Entities jump between discrete frames, so what a pixel needs from another frame is seldom at the same pixel.
    """

    def __init__(self, c, frames):
        super().__init__()
        self.frames, self.attn = frames, Attention(c, 8, 32)

    def forward(self, x):
        p = rearrange(F.avg_pool2d(x, 2), "(b t) c h w -> b (t h w) c", t=self.frames)
        a = rearrange(self.attn(p), "b (t h w) c -> (b t) c h w", t=self.frames, h=x.shape[-2] // 2)
        return x + F.interpolate(a, size=x.shape[-2:], mode="nearest")


class Detail(nn.Module):
    """STI's detail branch: the t frames are the CHANNELS of a map, every feature channel its own map (release).

    About 2.4 k weights shared by all feature channels. It is the only place where the order of frames is known.
    """

    def __init__(self, frames):
        super().__init__()
        self.frames = frames
        self.norms = nn.ModuleList(nn.GroupNorm(1, frames, eps=1e-6) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(frames, frames, 3, padding=1) for _ in range(4))

    def forward(self, x):
        c = x.shape[1]
        # (b c) t h w with t innermost in memory: 8 channels-last channels is what convolution kernels like
        d = rearrange(x, "(b t) c h w -> (b c) h w t", t=self.frames).contiguous().permute(0, 3, 1, 2)
        for i in (0, 2):
            r = self.convs[i](F.silu(self.norms[i](d)))
            d = d + self.convs[i + 1](F.silu(self.norms[i + 1](r)))
        return rearrange(d, "(b c) t h w -> (b t) c h w", c=c).contiguous(memory_format=torch.channels_last)


class STI(nn.Module):
    """Spatio-temporal interaction layer: GN(w1 * semantic + w2 * detail), w starts at (0, 1); no outer residual (release)."""

    def __init__(self, c, frames):
        super().__init__()
        self.semantic, self.detail = Semantic(c, frames), Detail(frames)
        self.w1, self.w2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.norm = nn.GroupNorm(32, c, eps=1e-6)

    def forward(self, x):
        return self.norm(self.w1.to(x.dtype) * self.semantic(x) + self.w2.to(x.dtype) * self.detail(x))


class GatedSTI(nn.Module):
    """The overview figure's fusion: an MLP on both pooled branches gives the two gates of each clip (sizes are ours)."""

    def __init__(self, c, frames):
        super().__init__()
        self.semantic, self.detail, self.frames = Semantic(c, frames), Detail(frames), frames
        self.gate = nn.Sequential(nn.Linear(2 * c, c), nn.SiLU(), nn.Linear(c, 2))
        self.norm = nn.GroupNorm(32, c, eps=1e-6)

    def forward(self, x):
        s, d = self.semantic(x), self.detail(x)
        pooled = rearrange(torch.cat([s, d], 1), "(b t) c h w -> b c (t h w)", t=self.frames).mean(-1)
        g = self.gate(pooled).softmax(-1).to(x.dtype).repeat_interleave(self.frames, 0)[:, :, None, None, None]
        return self.norm(g[:, 0] * s + g[:, 1] * d)


class TemporalConv(nn.Module):
    """Table 3's "DFGN(3D-Conv)": x + 4 x [GN, SiLU, temporal conv (3,1,1)], the last conv starts at zero (release).

    The (3,1,1) convolution is written as a 2-D one over (t, h*w): Conv3d in bf16 is slow and hungry on every backend.
    """

    def __init__(self, c, frames):
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


MIXERS = {"sti": STI, "gated": GatedSTI, "conv3d": TemporalConv}


class Layer(nn.Module):
    """ResBlock -> STI [-> spatial transformer -> temporal transformer]: the unit DFGN is made of."""

    def __init__(self, c_in, c_out, cfg, attention):
        super().__init__()
        self.res = ResBlock(c_in, c_out, 4 * cfg.widths[0])
        self.mix = MIXERS[cfg.temporal](c_out, cfg.frames)
        self.spatial = SpatialTransformer(c_out, cfg.head_dim, cfg.context_dim) if attention else None
        self.temporal = TemporalTransformer(c_out, c_out // cfg.head_dim, cfg.head_dim, cfg.frames) if attention else None

    def forward(self, x, emb, kv=None):
        x = self.mix(self.res(x, emb))
        return self.temporal(self.spatial(x, kv)) if self.spatial else x


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConditionEncoder(nn.Module):
    """Clean latents of the given frames (zeros elsewhere) -> features of the same shape (release).

    Three 3x3 convs per frame, then one encoder layer over the t frames of each pixel at width d = 4.
    """

    def __init__(self, c, frames):
        super().__init__()
        self.frames = frames
        self.convs = nn.ModuleList([nn.Conv2d(c, 4 * c, 3, padding=1), nn.Conv2d(4 * c, 4 * c, 3, padding=1),
                                    nn.Conv2d(4 * c, c, 3, padding=1)])
        self.norm, self.attn = nn.LayerNorm(c), Attention(c, 2, 4)
        self.ff1, self.ff2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x):                                                   # (b t) c h w
        h, w = x.shape[-2:]
        x = self.convs[2](F.silu(self.convs[1](F.silu(self.convs[0](x)))))
        x = rearrange(x, "(b t) c h w -> (b h w) t c", t=self.frames)
        x = x + self.attn(self.norm(x))
        x = x + self.ff2(F.gelu(self.ff1(x)))
        return rearrange(x, "(b h w) t c -> (b t) c h w", h=h, w=w)


# ----------------------------------------------------------------------------------------------------------------
# DFGN, the discrete frame generation network


class Condition(NamedTuple):
    """What the network is told besides the noisy latents; constant over the steps of a sampling run."""

    features: torch.Tensor                # (b t) c h w, of the condition encoder
    kv: list                              # one (keys, values) pair per layer with attention, None for the others
    frame_mask: torch.Tensor | None       # b t bool, True = real frame; None = all are


class DFGN(nn.Module):
    """Latent video U-Net that predicts the noise (release; METHOD: widths, Table 6; parameters, Table 8).

    net(x, t, cond, context, cond_mask=None, frame_mask=None):
        x          (b, t, c, h, w) noisy latents
        t          (b,) integer steps 0..999
        cond       (b, t, c, h, w) clean latents; frames that are not given are ignored (cond_mask None: pass zeros there)
        context    (b, n, d) text tokens
        cond_mask  (b, t) bool, True = given;  frame_mask (b, t) bool, True = real, False = padding
    returns the predicted noise, (b, t, c, h, w) fp32. Height and width must divide by 2^(levels - 1) * 2.

    Padded frames are zeroed at the entrance (ours), so what padding holds can never reach a real frame.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.checkpointing = cfg, False
        ws, c, n = cfg.widths, cfg.latent_channels, len(cfg.widths)
        attends = [i < n - 1 for i in range(n)]                             # all levels but the last
        self.time = nn.Sequential(nn.Linear(ws[0], 4 * ws[0]), nn.SiLU(), nn.Linear(4 * ws[0], 4 * ws[0]))
        self.condition_encoder = ConditionEncoder(c, cfg.frames)
        self.conv_in = nn.Conv2d(2 * c, ws[0], 3, padding=1)
        self.transformer_in = TemporalTransformer(ws[0], 8, cfg.head_dim, cfg.frames)

        self.down, skips, width = nn.ModuleList(), [ws[0]], ws[0]
        for i, w in enumerate(ws):
            layers = [Layer(width if j == 0 else w, w, cfg, attends[i]) for j in range(cfg.layers)]
            last = nn.Conv2d(w, w, 3, stride=2, padding=1) if i < n - 1 else None
            self.down.append(nn.ModuleDict({"layers": nn.ModuleList(layers), **({"scale": last} if last else {})}))
            skips += [w] * (cfg.layers + (i < n - 1))
            width = w
        self.mid = nn.ModuleList([Layer(width, width, cfg, True), Layer(width, width, cfg, False)])
        self.up = nn.ModuleList()
        for i, w in reversed(list(enumerate(ws))):
            layers = []
            for _ in range(cfg.layers + 1):
                layers.append(Layer(width + skips.pop(), w, cfg, attends[i]))
                width = w
            self.up.append(nn.ModuleDict({"layers": nn.ModuleList(layers), **({"scale": Upsample(w)} if i else {})}))
        self.norm_out, self.conv_out = nn.GroupNorm(32, ws[0], eps=1e-5), nn.Conv2d(ws[0], c, 3, padding=1)
        self.init_weights()
        self.to(memory_format=torch.channels_last)

    def init_weights(self):
        """PyTorch's defaults, but every residual branch ends in zeros, so that each starts as the identity, and so does
        the network's output (ours, as DiT and the LDM family do; the release does not say). STI's own start is w = (0, 1)."""
        zero = [self.conv_out]
        for m in self.modules():
            if isinstance(m, ResBlock):
                zero.append(m.conv2)
            elif isinstance(m, (SpatialTransformer, TemporalTransformer)):
                zero.append(m.proj_out)
            elif isinstance(m, Detail):
                zero += [m.convs[1], m.convs[3]]
            elif isinstance(m, TemporalConv):
                zero.append(m.convs[-1])
        for m in zero:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def layers(self):
        """All layers in the order in which forward runs them."""
        return [layer for stage in self.down for layer in stage["layers"]] + list(self.mid) + \
               [layer for stage in self.up for layer in stage["layers"]]

    def condition(self, cond, context, cond_mask=None, frame_mask=None):
        """Everything that depends neither on the noisy latents nor on the step -> Condition."""
        given = frame_mask
        if cond_mask is not None:
            given = cond_mask if frame_mask is None else cond_mask & frame_mask
        if given is not None:                                               # where, not *: NaN * 0 is NaN
            cond = torch.where(given[:, :, None, None, None], cond, 0)
        features = self.condition_encoder(cond.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        kv = [m.spatial.block.attn2.project_context(context) if m.spatial else None for m in self.layers()]
        return Condition(features, kv, frame_mask)

    def forward(self, x, t, cond=None, context=None, cond_mask=None, frame_mask=None, condition=None):
        if condition is None:
            condition = self.condition(cond, context, cond_mask, frame_mask)
        emb = F.silu(self.time(timestep_embedding(t, self.cfg.widths[0])))  # b d, shared by all frames and layers
        if condition.frame_mask is not None:
            x = torch.where(condition.frame_mask[:, :, None, None, None], x, 0)
        b, f = x.shape[:2]
        x = x.flatten(0, 1)                                                 # (b t) c h w
        x = torch.cat([x, condition.features.to(x.dtype)], 1).contiguous(memory_format=torch.channels_last)
        x = self.run(self.transformer_in, self.conv_in(x))                  # (b t) w0 h w
        skips, kv = [x], iter(condition.kv)
        for stage in self.down:
            for layer in stage["layers"]:
                x = self.run(layer, x, emb, next(kv))                       # (b t) w_i h/2^i w/2^i
                skips.append(x)
            if "scale" in stage:
                x = stage["scale"](x)
                skips.append(x)
        for layer in self.mid:
            x = self.run(layer, x, emb, next(kv))
        for stage in self.up:
            for layer in stage["layers"]:
                x = self.run(layer, torch.cat([x, skips.pop()], 1), emb, next(kv))
            if "scale" in stage:
                x = stage["scale"](x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return x.unflatten(0, (b, f)).float()

    def run(self, module, *args):
        """Recompute the module in the backward pass instead of storing it, if asked to."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)
