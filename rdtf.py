"""RDTF: few-frame video diffusion for animated stickers, trained from scratch on few resources (arXiv
2503.17735).

This file is the model, read top to bottom: configuration -> layers -> DFGN (the denoising network) -> text
encoders -> AutoencoderKL -> diffusion (noise schedule, loss, guidance, samplers). The two ideas about *data*,
dual masks and the curriculum, are in curriculum.py; stickers come from data.py; `python train.py` trains and
`python sample.py` samples.

Axis letters: b clip, t frame, c channel, h w rows and columns, n tokens, d width. A clip is (b, t, c, h, w)
at every public function. Inside the network frames are folded into the batch, `(b t) c h w` in channels-last
memory, so that "(b t) (h w) c" tokens and "b (t h) w c" clips are views of the same storage and only mixing
over time has to copy.

Sources are cited as in the docstrings below: "Table N" / "eq." of the paper, "release" for the authors' code,
"ours" for decisions of this project where both are silent.
"""

import ctypes
import hashlib
import math
import zlib
from dataclasses import asdict, dataclass
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
    """Everything that rebuilds the model; saved as a plain dict in every checkpoint. Defaults are the preset
    `tiny`.
    """

    size: int = 64                        # sticker edge, pixels
    frames: int = 8                       # F, frames of a clip (fixed: STI's detail branch has F channels)
    # DFGN
    latent_channels: int = 16
    widths: tuple = (64, 128)             # channels per level; the last level has no attention
    layers: int = 1                       # layers per down level; up levels have one more
    head_dim: int = 32
    context_dim: int = 128                # width of the text tokens
    temporal: str = "sti"                 # sti | conv3d (Table 3's ablation) | gated (the overview figure)
    prediction: str = "eps"               # what the output means: the noise (paper) or v (ours, see RDTF)
    residual: bool = False                # diffuse what differs from the given frames (ours, see `blend`)
    pooled_text: bool = False             # the mean text token enters with the step, too (ours, see DFGN)
    # text: a byte transformer trained with the network, unless text_dims names the widths of frozen encoders
    text_layers: int = 3
    text_bytes: int = 64
    text_dims: tuple = ()
    # autoencoder
    vae_channels: int = 4                 # 4: premultiplied RGBA (ours), 3: RGB composited on white (SD type)
    vae_patch: int = 4                    # pixels folded into channels at the entrance (1: SD type)
    vae_widths: tuple = (64, 128)         # one width per level, so f = vae_patch * 2^(levels - 1)
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
        return self.vae_patch * 2 ** (len(self.vae_widths) - 1)


PRESETS = {
    # 64 px RGBA, latents 16x8x8: quickstart, tests, shipped checkpoint. A laptop CPU trains it.
    "tiny": dict(prediction="v", residual=True, pooled_text=True, text_scale=2.0, image_scale=1.25),
    # 128 px RGBA, latents 16x16x16: one consumer GPU.
    "base": dict(size=128, prediction="v", residual=True, pooled_text=True, widths=(192, 384, 576), layers=2,
                 head_dim=64, context_dim=512, text_layers=6, text_scale=5.0, image_scale=1.5),
    # The paper's network and input (Table 6, release): 256 px, Stable Diffusion's VAE, 4x32x32 latents.
    "paper": dict(size=256, latent_channels=4, widths=(320, 640, 1024, 1280), layers=2, head_dim=64,
                  context_dim=1024, text_dims=(1024, 768), vae_channels=3, vae_patch=1,
                  vae_widths=(128, 256, 512, 512), vae_layers=2, vae_attention=True),
}

# ------------------------------------------------------------------------------------------------------------
# Layers. Every one takes and returns `(b t) c h w` feature maps unless its docstring says otherwise.


def keep_memory():
    """Tell glibc to keep freed blocks instead of giving them back: every step would pay for page faults.

    It takes the page faults out of a training step (system time 0.06-0.10 to under 0.05 s of 0.9 s for
    `tiny`, 0.7-1.0 to under 0.1 s of 4-5 s for benchmarks/speed.py on one core). Does nothing where there is
    no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):
        mallopt(option, value)


def timestep_embedding(t, dim):
    """(b,) integer steps -> (b, dim) fp32 sinusoids, cos first, frequencies 10000^(-i / (dim/2)) (release).

    Always fp32: in bf16 only 507 of the 1000 steps stay distinct.
    """
    i = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(10000.0) / (dim // 2) * i)
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


def layout(x):
    """Memory format of feature maps: channels-last on GPUs (tensor cores, and tokens are views); plain on
    CPUs, whose channels-last GroupNorm is 5 to 40 times slower than the plain one (benchmarks/README.md)."""
    return torch.channels_last if x.is_cuda else torch.contiguous_format


def tokens(x):
    """(b t) c h w -> (b t) (h w) c: a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def feature_map(x, h, w):
    """(b t) (h w) c -> (b t) c h w in channels-last memory; the inverse view of `tokens`."""
    return x.unflatten(1, (h, w)).permute(0, 3, 1, 2)


def start_at_zero(modules):
    """Zeroes weight and bias of each, so that the branches they end start by adding nothing."""
    for m in modules:
        nn.init.zeros_(m.weight)
        nn.init.zeros_(m.bias)


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


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v over b heads n d. No mask anywhere, so that flash kernels apply.

    Training on a CPU is the exception: the backward of its flash kernel takes 2 to 4 times as long as plain
    matmuls in bf16 and for 8 tokens (benchmarks/README.md).
    """
    if q.device.type == "cpu" and q.requires_grad and (q.dtype == torch.bfloat16 or k.shape[-2] <= 16):
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention with one fused projection; q, k, v without bias, output with (release).

    context_dim = 0: self-attention. Otherwise keys and values come from `project_context`, computed by the
    caller, once per clip (all frames share them) and, when sampling, once for all steps.
    """

    def __init__(self, dim, heads, head_dim, context_dim=0):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.q = nn.Linear(dim, inner if context_dim else 3 * inner, bias=False)
        self.kv = nn.Linear(context_dim, 2 * inner, bias=False) if context_dim else None
        self.out = nn.Linear(inner, dim)

    def split(self, x, parts):
        """b n (parts heads d) -> `parts` tensors b heads n d."""
        # unbound before transposing: the backward pass stacks the gradients as the projection wants them
        return [y.transpose(1, 2) for y in x.unflatten(-1, (parts, self.heads, -1)).unbind(2)]

    def project_context(self, context):
        return self.split(self.kv(context), 2)                              # two of b heads n d

    def forward(self, x, kv=None):                                          # x: b n d
        if kv is None:
            q, k, v = self.split(self.q(x), 3)
        else:
            (q,), (k, v) = self.split(self.q(x), 1), kv
        return self.out(attend(q, k.to(q.dtype), v.to(q.dtype)).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GEGLU x4 with the exact gelu (release)."""

    def __init__(self, dim):
        super().__init__()
        self.proj, self.out = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        # two products instead of halves of one: the backward pass need not join the widest map of the network
        value, gate = (F.linear(x, w, b) for w, b in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2)))
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """LN attention, LN attention, LN feed-forward, each residual. The 2nd attention reads `kv` or is another
    self-attention.
    """

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
        return x + rearrange(y, "(b h w) t c -> (b t) c h w", h=h, w=w)   # ... and one copy out


# -- mixing neighbouring frames: one of these three stands behind every ResBlock


class Semantic(nn.Module):
    """STI's semantic branch: every 2x2-pooled position of every frame attends to all others (release, Table
    6).

    Entities jump between discrete frames, so what a pixel needs from another frame is seldom at the same
    pixel.
    """

    def __init__(self, c, frames):
        super().__init__()
        self.frames, self.attn = frames, Attention(c, 8, 32)

    def forward(self, x):
        p = rearrange(F.avg_pool2d(x, 2), "(b t) c h w -> b (t h w) c", t=self.frames)
        a = rearrange(self.attn(p), "b (t h w) c -> (b t) c h w", t=self.frames, h=x.shape[-2] // 2)
        return x + F.interpolate(a, size=x.shape[-2:], mode="nearest")


class Detail(nn.Module):
    """STI's detail branch: the t frames are the CHANNELS of a map, every feature channel its own map
    (release).

    About 2.4 k weights shared by all feature channels. It is the only place where the order of frames is
    known.
    """

    def __init__(self, frames):
        super().__init__()
        self.frames = frames
        self.norms = nn.ModuleList(nn.GroupNorm(1, frames, eps=1e-6) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(frames, frames, 3, padding=1) for _ in range(4))

    def forward(self, x):
        c = x.shape[1]
        d = rearrange(x, "(b t) c h w -> (b c) t h w", t=self.frames).contiguous(memory_format=layout(x))
        for i in (0, 2):
            r = self.convs[i](F.silu(self.norms[i](d)))
            d = d + self.convs[i + 1](F.silu(self.norms[i + 1](r)))
        return rearrange(d, "(b c) t h w -> (b t) c h w", c=c).contiguous(memory_format=layout(x))


class STI(nn.Module):
    """Spatio-temporal interaction layer: GN(w1 * semantic + w2 * detail), w starts at (0, 1); no outer
    residual (release).
    """

    def __init__(self, c, frames):
        super().__init__()
        self.semantic, self.detail = Semantic(c, frames), Detail(frames)
        self.w1, self.w2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.norm = nn.GroupNorm(32, c, eps=1e-6)

    def forward(self, x):
        return self.norm(self.w1.to(x.dtype) * self.semantic(x) + self.w2.to(x.dtype) * self.detail(x))


class GatedSTI(nn.Module):
    """The overview figure's fusion: an MLP on both pooled branches gives the two gates of each clip (sizes
    are ours).
    """

    def __init__(self, c, frames):
        super().__init__()
        self.semantic, self.detail, self.frames = Semantic(c, frames), Detail(frames), frames
        self.gate = nn.Sequential(nn.Linear(2 * c, c), nn.SiLU(), nn.Linear(c, 2))
        self.norm = nn.GroupNorm(32, c, eps=1e-6)

    def forward(self, x):
        s, d = self.semantic(x), self.detail(x)
        pooled = rearrange(torch.cat([s, d], 1), "(b t) c h w -> b c (t h w)", t=self.frames).mean(-1)
        g = self.gate(pooled).softmax(-1).to(x.dtype).repeat_interleave(self.frames, 0)     # (b t) 2
        g = g[:, :, None, None, None]
        return self.norm(g[:, 0] * s + g[:, 1] * d)


class TemporalConv(nn.Module):
    """Table 3's "DFGN(3D-Conv)": x + 4 x [GN, SiLU, temporal conv (3,1,1)], the last conv starts at zero
    (release).

    The (3,1,1) convolution is written as a 2-D one over (t, h*w): Conv3d in bf16 is slow and hungry on every
    backend.
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
        self.spatial = self.temporal = None
        if attention:
            self.spatial = SpatialTransformer(c_out, cfg.head_dim, cfg.context_dim)
            self.temporal = TemporalTransformer(c_out, c_out // cfg.head_dim, cfg.head_dim, cfg.frames)

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


# ------------------------------------------------------------------------------------------------------------
# DFGN, the discrete frame generation network


class Condition(NamedTuple):
    """What the network is told besides the noisy latents; constant over the steps of a sampling run."""

    features: torch.Tensor                # (b t) c h w, of the condition encoder
    kv: list                              # (keys, values) per layer with attention, None for others
    pooled: torch.Tensor | float          # b d, added to the step's embedding; 0 without pooled_text
    frame_mask: torch.Tensor | None       # b t bool, True = real frame; None = all are


class DFGN(nn.Module):
    """Latent video U-Net that predicts the noise (release; METHOD: widths, Table 6; parameters, Table 8).

    net(x, t, cond, context, cond_mask=None, frame_mask=None):
        x           (b, t, c, h, w) noisy latents
        t           (b,) integer steps 0..999
        cond        (b, t, c, h, w) clean latents; frames that are not given are ignored (without cond_mask:
                    pass zeros there)
        context     (b, n, d) text tokens
        cond_mask   (b, t) bool, True = given
        frame_mask  (b, t) bool, True = real, False = padding
    returns the predicted noise, (b, t, c, h, w) fp32. Height and width must divide by 2^(levels - 1) * 2.

    Padded frames are zeroed at the entrance (ours), so what padding holds can never reach a real frame.

    pooled_text (ours, for the small presets): the mean of the text tokens that are not zeros is added to the
    step's embedding, so every ResBlock hears the caption before cross-attention has learned where to look.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.checkpointing = cfg, False
        ws, c, n = cfg.widths, cfg.latent_channels, len(cfg.widths)
        attends = [i < n - 1 for i in range(n)]                             # all levels but the last
        self.time = nn.Sequential(nn.Linear(ws[0], 4 * ws[0]), nn.SiLU(), nn.Linear(4 * ws[0], 4 * ws[0]))
        self.pool = nn.Linear(cfg.context_dim, 4 * ws[0], bias=False) if cfg.pooled_text else None
        self.condition_encoder = ConditionEncoder(c, cfg.frames)
        self.conv_in = nn.Conv2d(2 * c, ws[0], 3, padding=1)
        self.transformer_in = TemporalTransformer(ws[0], 8, cfg.head_dim, cfg.frames)

        self.down, skips, width = nn.ModuleList(), [ws[0]], ws[0]
        for i, w in enumerate(ws):
            layers = [Layer(width if j == 0 else w, w, cfg, attends[i]) for j in range(cfg.layers)]
            scale = {"scale": nn.Conv2d(w, w, 3, stride=2, padding=1)} if i < n - 1 else {}
            self.down.append(nn.ModuleDict({"layers": nn.ModuleList(layers)} | scale))
            skips += [w] * (cfg.layers + (i < n - 1))
            width = w
        self.mid = nn.ModuleList([Layer(width, width, cfg, True), Layer(width, width, cfg, False)])
        self.up = nn.ModuleList()
        for i, w in reversed(list(enumerate(ws))):
            layers = []
            for _ in range(cfg.layers + 1):
                layers.append(Layer(width + skips.pop(), w, cfg, attends[i]))
                width = w
            scale = {"scale": Upsample(w)} if i else {}
            self.up.append(nn.ModuleDict({"layers": nn.ModuleList(layers)} | scale))
        self.norm_out, self.conv_out = nn.GroupNorm(32, ws[0], eps=1e-5), nn.Conv2d(ws[0], c, 3, padding=1)
        self.init_weights()

    def init_weights(self):
        """PyTorch's defaults, but every residual branch ends in zeros, so that each starts as the identity,
        and so does the network's output (ours, as DiT and the LDM family do; the release does not say). STI's
        own start is w = (0, 1)."""
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
        start_at_zero(zero)

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
        features = self.condition_encoder(cond.flatten(0, 1).contiguous(memory_format=layout(cond)))
        kv = [m.spatial.block.attn2.project_context(context) if m.spatial else None for m in self.layers()]
        pooled = 0.0
        if self.pool:                                                       # states past the end are zeros
            count = (context != 0).any(-1).sum(1, keepdim=True).clamp(min=1)
            pooled = self.pool(context.sum(1) / count)
        return Condition(features, kv, pooled, frame_mask)

    def forward(self, x, t, cond=None, context=None, cond_mask=None, frame_mask=None, condition=None):
        if condition is None:
            condition = self.condition(cond, context, cond_mask, frame_mask)
        emb = self.time(timestep_embedding(t, self.cfg.widths[0])) + condition.pooled
        emb = F.silu(emb)                                                   # b d, for all frames and layers
        if condition.frame_mask is not None:
            x = torch.where(condition.frame_mask[:, :, None, None, None], x, 0)
        b, f = x.shape[:2]
        x = x.flatten(0, 1)                                                 # (b t) c h w
        x = torch.cat([x, condition.features.to(x.dtype)], 1).contiguous(memory_format=layout(x))
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


# ------------------------------------------------------------------------------------------------------------
# Text


WORDS = 4096                              # rows for whole words; two words that share one differ in spelling


class ByteText(nn.Module):
    """The default text encoder: a small transformer over UTF-8 bytes, trained with the network (ours).

    No vocabulary file and any language. A byte enters as what it is + where it is + the word it belongs to,
    by a row that the word's checksum picks: from bytes alone nothing was learned of the captions in the time
    in which words had a first effect (benchmarks/README.md). Captions are cut to `text_bytes`; states
    past their end are zeros, which attention reads as nothing (a mask would rule out flash kernels). The
    empty caption, all zeros, is "no text".

    What enters is added to what comes out: the stream of the blocks grows a part that all captions share,
    and after the last LayerNorm nothing else would be left (1 % of the variance where 17 % entered, and
    colours were never learned: benchmarks/README.md).
    """

    def __init__(self, cfg):
        super().__init__()
        d, self.length = cfg.context_dim, cfg.text_bytes
        self.embed, self.words = nn.Embedding(256, d), nn.Embedding(WORDS, d)
        self.position = nn.Parameter(0.02 * torch.randn(self.length, d))
        heads = max(1, d // 64)
        self.blocks = nn.ModuleList(TransformerBlock(d, heads, d // heads) for _ in range(cfg.text_layers))
        self.norm = nn.LayerNorm(d)
        for block in self.blocks:                                           # each starts as the identity
            start_at_zero([block.attn1.out, block.attn2.out, block.ff.out])

    def tokenize(self, captions):
        """list of b strings -> (b, n, 2) int16 on the CPU: bytes and rows of `words`, zeros past the end."""
        rows = []
        for caption in captions:
            words = [w.encode("utf-8") for w in caption.lower().split()]
            pairs = [(byte, zlib.crc32(w) % WORDS) for w in words for byte in w + b" "][:self.length]
            rows.append(pairs + [(0, 0)] * (self.length - len(pairs)))
        return torch.tensor(rows, dtype=torch.int16)

    def forward(self, tok):                                                 # b n 2 -> b n d
        byte, word = tok.long().unbind(-1)
        real = (byte > 0)[..., None]
        entered = x = (self.embed(byte) + self.position + self.words(word)) * real
        for block in self.blocks:
            x = block(x)
        return entered + self.norm(x) * real


class FrozenText(nn.Module):
    """Frozen Hugging Face encoders, token states concatenated along the sequence (release, Table 6: CLIP
    1024-d and T5).

    An encoder whose width is not context_dim passes a trained MLP d -> 2048 -> context_dim with SiLU
    (release: T5 768-d). The encoders themselves are not part of the checkpoint; `paths` names them and
    embeddings are cached per caption.
    """

    def __init__(self, cfg, paths=()):
        super().__init__()
        self.paths, self.cache, self.encoders = list(paths), {}, None
        self.project = nn.ModuleList(
            nn.Identity() if d == cfg.context_dim else
            nn.Sequential(nn.Linear(d, 2048), nn.SiLU(), nn.Linear(2048, cfg.context_dim))
            for d in cfg.text_dims)

    def load(self):
        """Open the encoders (kept off the module list: they are neither trained nor saved)."""
        try:
            from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel, AutoModel
        except ImportError as e:
            raise ImportError("--text-encoder needs an optional package: pip install transformers") from e
        kinds = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
        self.encoders = []
        for path in self.paths:
            model = kinds.get(AutoConfig.from_pretrained(path).model_type, AutoModel).from_pretrained(path)
            self.encoders.append((AutoTokenizer.from_pretrained(path), model.eval().requires_grad_(False)))

    def widths(self):
        return tuple(m.config.hidden_size for _, m in self.encoders)

    @torch.no_grad()
    def tokenize(self, captions):
        """list of b strings -> list of (b, 77, d_i) fp32 token states, one per encoder."""
        if self.encoders is None:
            self.load()
        for c in captions:
            if c not in self.cache:
                if len(self.cache) > 100_000:                         # captions with dropped words never end
                    self.cache.clear()
                self.cache[c] = []
                for tokenizer, model in self.encoders:
                    ids = tokenizer(c, padding="max_length", max_length=77, truncation=True,
                                    return_tensors="pt")
                    kwargs = {"attention_mask": ids["attention_mask"]} if "attention_mask" in ids else {}
                    self.cache[c].append(model(ids["input_ids"], **kwargs).last_hidden_state[0].half())
        return [torch.stack([self.cache[c][i] for c in captions]).float() for i in range(len(self.encoders))]

    def forward(self, states):
        return torch.cat([p(s) for p, s in zip(self.project, states)], dim=1)


def drop_words(caption, rng, p=0.2):
    """Caption augmentation: each word becomes '#' with probability p (release). rng: numpy Generator."""
    return " ".join("#" if rng.random() < p else w for w in caption.split())


# ------------------------------------------------------------------------------------------------------------
# Autoencoder. Module names are those of Stable Diffusion's VAE in diffusers, so that its weights load as they
# are.


class VAEResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class VAEAttention(nn.Module):
    """Single-head self-attention over the pixels of the coarsest map."""

    def __init__(self, c):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        y = tokens(self.group_norm(x)).unsqueeze(1)                         # n 1 (h w) c
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + feature_map(self.to_out[0](y.squeeze(1)), *x.shape[-2:])


class VAEMid(nn.Module):
    def __init__(self, c, attention):
        super().__init__()
        self.resnets = nn.ModuleList([VAEResBlock(c, c), VAEResBlock(c, c)])
        self.attentions = nn.ModuleList([VAEAttention(c)] if attention else [])

    def forward(self, x):
        x = self.resnets[0](x)
        for a in self.attentions:
            x = a(x)
        return self.resnets[1](x)


class VAEDown(nn.Module):
    def __init__(self, c_in, c_out, layers, scale):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResBlock(c_in if j == 0 else c_out, c_out) for j in range(layers))
        down = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, stride=2)})
        self.downsamplers = nn.ModuleList([down] if scale else [])

    def forward(self, x):
        for r in self.resnets:
            x = r(x)
        for d in self.downsamplers:                                   # pads right and below, as LDM does
            x = d["conv"](F.pad(x, (0, 1, 0, 1)))
        return x


class VAEUp(nn.Module):
    def __init__(self, c_in, c_out, layers, scale):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResBlock(c_in if j == 0 else c_out, c_out) for j in range(layers))
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if scale else [])

    def forward(self, x):
        for m in [*self.resnets, *self.upsamplers]:
            x = m(x)
        return x


class VAEEncoder(nn.Module):
    def __init__(self, channels, widths, layers, attention, latent):
        super().__init__()
        n = len(widths)
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAEDown(widths[max(i - 1, 0)], w, layers, i < n - 1) for i, w in enumerate(widths))
        self.mid_block = VAEMid(widths[-1], attention)
        self.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nn.Module):
    def __init__(self, channels, widths, layers, attention, latent):
        super().__init__()
        ws = widths[::-1]
        self.conv_in = nn.Conv2d(latent, ws[0], 3, padding=1)
        self.mid_block = VAEMid(ws[0], attention)
        self.up_blocks = nn.ModuleList(
            VAEUp(ws[max(i - 1, 0)], w, layers + 1, i < len(ws) - 1) for i, w in enumerate(ws))
        self.conv_norm_out = nn.GroupNorm(32, ws[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(ws[-1], channels, 3, padding=1)

    def forward(self, z):
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class AutoencoderKL(nn.Module):
    """Pictures <-> latents. One class for Stable Diffusion's weights (3 channels) and for our own RGBA-native
    one.

    Pictures are premultiplied RGBA in [0, 1], (n, 4, h, w), on both sides. The 4-channel autoencoder sees
    them as they are; the 3-channel one sees them composited on white and gives back opaque ones. Latents are
    normalised per channel: mean and std are measured on the training set (`set_statistics`) and are part of
    the weights.
    """

    def __init__(self, cfg):
        super().__init__()
        self.settings = {k: v for k, v in asdict(cfg).items() if k.startswith("vae_")}
        self.f, self.patch = cfg.f, cfg.vae_patch
        self.channels, self.latent_channels = cfg.vae_channels, cfg.latent_channels
        args = (cfg.vae_channels * cfg.vae_patch ** 2, cfg.vae_widths, cfg.vae_layers, cfg.vae_attention,
                cfg.latent_channels)
        self.encoder, self.decoder = VAEEncoder(*args), VAEDecoder(*args)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)
        self.register_buffer("mean", torch.zeros(cfg.latent_channels))
        self.register_buffer("std", torch.ones(cfg.latent_channels))

    def moments(self, x):
        """Premultiplied RGBA (n, 4, h, w) in [0, 1] -> raw posterior mean and log-variance, each (n, c, h/f,
        w/f).
        """
        if self.channels == 3:
            x = x[:, :3] + (1 - x[:, 3:])                                   # composite on white
        x = F.pixel_unshuffle(2 * x - 1, self.patch)
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode_raw(self, z):
        """Raw latents -> pictures, not clamped (the loss wants the overshoot)."""
        y = (F.pixel_shuffle(self.decoder(self.post_quant_conv(z)).float(), self.patch) + 1) / 2
        return y if self.channels == 4 else torch.cat([y, torch.ones_like(y[:, :1])], 1)

    def encode(self, x):
        """Pictures -> normalised latents (the posterior mean: the cache must be deterministic)."""
        return (self.moments(x)[0] - self.mean[:, None, None]) / self.std[:, None, None]

    def decode(self, z):
        """Normalised latents -> premultiplied RGBA in [0, 1], colour never above alpha."""
        y = self.decode_raw(z * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)
        return torch.cat([torch.minimum(y[:, :3], y[:, 3:]), y[:, 3:]], 1)

    def set_statistics(self, latents):
        """latents: raw posterior means (n, c, h, w) of the training set."""
        self.mean.copy_(latents.mean((0, 2, 3)))
        self.std.copy_(latents.std((0, 2, 3)))

    @property
    def id(self):
        """A short hash of the weights: latent caches are valid for one autoencoder only."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class VAEStep(nn.Module):
    """One training step of the autoencoder: L1 + squared error on premultiplied RGBA and on RGB over white,
    plus KL (ours).

    A sticker is always seen over some background; black is premultiplied RGB itself, white is the other
    extreme. forward(x, noise): pictures (n, 4, h, w) and noise (n, c, h/f, w/f) -> losses (n,).
    """

    def __init__(self, vae, kl_weight):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, x, noise):
        mean, logvar = self.vae.moments(x)
        y = self.vae.decode_raw(mean + (0.5 * logvar).exp() * noise)
        error = torch.cat([y - x, (y[:, :3] - y[:, 3:]) - (x[:, :3] - x[:, 3:])], 1)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar)
        return (error.abs() + 4 * error ** 2).flatten(1).mean(1) + self.kl_weight * kl.flatten(1).mean(1)


def read_weights(path):
    """A dict of tensors from .safetensors or .pt; never runs code that the file carries."""
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError as e:
            raise ImportError(".safetensors needs an optional package: pip install safetensors") from e
        return load_file(str(path))
    return torch.load(path, map_location="cpu", weights_only=True)


def load_vae(path):
    """An autoencoder from our checkpoint (any that carries a "vae"), or from Stable-Diffusion-type weights.
    """
    data = read_weights(path)
    if "vae" in data:
        vae, state = AutoencoderKL(Config(**data["config"])), data["vae"]
    else:
        vae, state = AutoencoderKL(Config(**PRESETS["paper"])), {}
        old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        for name, value in data.items():
            for a, b in old.items():                                        # files from before diffusers 0.18
                name = name.replace(f"attentions.0.{a}.", f"attentions.0.{b}.")
            is_linear = ".attentions.0.to_" in name and value.ndim == 4     # 1x1 convs in LDM's own files
            state[name] = value[:, :, 0, 0] if is_linear else value
        c = vae.latent_channels
        state.update(mean=torch.zeros(c), std=torch.full((c,), 1 / 0.18215))
    vae.load_state_dict({k: v.float() for k, v in state.items()})
    return vae.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Diffusion (Section 4 / Table 6 of the paper: 1000 steps, scaled-linear betas 0.00085..0.0120, noise
# prediction)

STEPS = 1000


def alphas_cumprod():
    """(1000,) fp32: the product of 1 - beta, betas linear in sqrt(beta). LDM code calls this schedule
    "linear".
    """
    betas = np.linspace(0.00085 ** 0.5, 0.0120 ** 0.5, STEPS, dtype=np.float64) ** 2
    return torch.from_numpy(np.cumprod(1 - betas)).float()


def q_sample(x0, noise, t, abar):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, always fp32. t: (b,)."""
    a = abar.to(x0.device)[t].view(-1, *[1] * (x0.ndim - 1))
    return a.sqrt() * x0.float() + (1 - a).sqrt() * noise


def blend(cond, cond_mask):
    """Given latents (b, t, c, h, w), given where cond_mask (b, t) is True -> what one would guess from them
    alone: between two given frames their linear blend, outside them a copy of the nearest, zeros without any.
    """
    t = cond.shape[1]
    i = torch.arange(t, device=cond.device)
    before = torch.where(cond_mask, i, -1).cummax(1).values                 # (b, t): the last given frame, -1
    after = torch.where(cond_mask, i, t).flip(1).cummin(1).values.flip(1)   # (b, t): the next given frame, t
    share = (i - before).to(cond.dtype) / (after - before).clamp(min=1)     # of the next one
    share = torch.where(before < 0, 1.0, torch.where(after == t, 0.0, share))
    cond = torch.where(cond_mask[:, :, None, None, None], cond, 0)          # where, not *: NaN * 0 is NaN
    row = torch.arange(len(cond), device=cond.device)[:, None]
    return torch.lerp(cond[row, before.clamp(min=0)], cond[row, after.clamp(max=t - 1)],
                      share[:, :, None, None, None])


class RDTF(nn.Module):
    """DFGN plus its text encoder: all that the main stage trains. forward is the diffusion step of training.

    prediction "eps" is the paper's. prediction "v" (ours, for the small presets) reads the same output as
    v = sqrt(abar) noise - sqrt(1 - abar) x_0 (arXiv 2202.00512). At high noise the noise is nearly the input:
    a network of 64 channels spends itself on passing 16 latent channels through, and an error of 0.07 in it
    is an error of 1 in x_0. v is then x_0 itself, which is what given frames and caption tell (measured in
    benchmarks/README.md).

    residual (ours, for the small presets): the network sees and predicts x_0 - `blend` of the given frames.
    Noise, steps and loss are the same (the error of a difference is the error of the whole), but the network
    starts from a blend of the given frames and learns what moves, instead of first learning to copy.
    """

    def __init__(self, cfg, text_paths=()):
        super().__init__()
        self.cfg, self.net = cfg, DFGN(cfg)
        self.text = FrozenText(cfg, text_paths) if cfg.text_dims else ByteText(cfg)
        self.register_buffer("abar", alphas_cumprod(), persistent=False)

    def forward(self, x0, noise, t, text, cond_mask, frame_mask=None):
        """Per-clip losses (b,): squared error over the real frames / (F c h w) (release).

        The denominator is a constant, so every real frame of every sticker weighs the same and sums over
        micro-batches and ranks are exact with ragged lengths. Given frames count: they are noised like the
        rest. x0, noise: (b, t, c, h, w); text: what `text.tokenize` gave; cond_mask, frame_mask (b, t) bool;
        frame_mask None: nothing is padded.
        """
        cond = x0
        if self.cfg.residual:
            x0 = x0 - blend(x0, cond_mask)
        out = self.net(q_sample(x0, noise, t, self.abar), t, cond, self.text(text), cond_mask, frame_mask)
        target = noise
        if self.cfg.prediction == "v":
            a = self.abar[t].view(-1, 1, 1, 1, 1)
            target = a.sqrt() * noise - (1 - a).sqrt() * x0
        error = (out - target) ** 2
        if frame_mask is not None:
            error = torch.where(frame_mask[:, :, None, None, None], error, 0)
        return error.flatten(1).mean(1)


def guidance_weights(text_scale, image_scale, has_text, has_image):
    """Two-scale guidance as a weighted sum of network calls: {(text?, image?): weight}, zero weights left
    out.

    e = e(0,0) + s_I (e(0,I) - e(0,0)) + s_T (e(T,I) - e(0,I)), InstructPix2Pix eq. 3 (the paper prints no
    formula: ours). Without text (or image) the branches that differ in it only are one, so nobody pays for a
    pass that cannot matter.
    """
    weights = {}
    for key, w in (((0, 0), 1 - image_scale), ((0, 1), image_scale - text_scale), ((1, 1), text_scale)):
        key = (bool(key[0] and has_text), bool(key[1] and has_image))
        weights[key] = weights.get(key, 0.0) + w
    return {k: w for k, w in weights.items() if abs(w) > 1e-8}


def guided_eps(model, text, negative, cond, cond_mask, frame_mask, text_scale, image_scale, has_text=True,
               rescale=0.0, noise=None):
    """-> eps(x, t): guided noise prediction; what is constant over the steps is computed here, once.

    text, negative: outputs of `text.tokenize` for the captions and for "no text"; rescale in [0, 1] pulls the
    guided prediction's std back to the conditional one's (arXiv 2305.08891 eq. 15-16). noise, like cond: the
    given frames enter every step as q_sample(cond, noise, t), just as the network saw them in training
    (ours); None: they are denoised too.
    """
    weights = guidance_weights(text_scale, image_scale, has_text, bool(cond_mask.any()))
    context = {k: model.text(text if k else negative) for k in {key[0] for key in weights}}
    keys = list(weights)
    b, n = cond_mask.shape[0], len(keys)
    masks = torch.cat([cond_mask if image else torch.zeros_like(cond_mask) for _, image in keys])
    fmask = None if frame_mask is None or bool(frame_mask.all()) else frame_mask.repeat(n, 1)
    contexts = torch.cat([context[k] for k, _ in keys])
    conds = cond.repeat(n, 1, 1, 1, 1)
    constant = model.net.condition(conds, contexts, masks, fmask)
    w = torch.tensor([weights[k] for k in keys], device=cond.device).view(n, 1, 1, 1, 1, 1)
    guess = blend(conds, masks) if model.cfg.residual else 0.0

    def eps(x, t):
        if noise is not None:
            x = torch.where(cond_mask[:, :, None, None, None], q_sample(cond, noise, t, model.abar), x)
        a = model.abar[t].repeat(n).view(-1, 1, 1, 1, 1)
        y = x.repeat(n, 1, 1, 1, 1) - a.sqrt() * guess
        out = model.net(y, t.repeat(n), condition=constant)
        if model.cfg.prediction == "v":
            out = a.sqrt() * out + (1 - a).sqrt() * y
        out = out.unflatten(0, (n, b))
        guided = (w * out).sum(0)
        if rescale and n > 1:
            full = out[keys.index(max(keys))]                               # the branch that sees the most
            ratio = full.std((1, 2, 3, 4), keepdim=True) / guided.std((1, 2, 3, 4), keepdim=True)
            guided = guided * (rescale * ratio + 1 - rescale)
        return guided

    return eps


def timesteps(n):
    """n decreasing steps from 999: 999, 999 - 1000/n, ... ("trailing"; arXiv 2305.08891 says why to begin at
    the end).
    """
    if not 1 <= n <= STEPS:
        raise ValueError(f"steps={n}: choose 1..{STEPS}")
    return [round(STEPS * (n - i) / n) - 1 for i in range(n)]


SAMPLERS = ("ddim", "ddpm", "dpm")


def sample(eps, x, steps=50, sampler="ddim", eta=1.0, noise=None, callback=None):
    """Denoise x ~ N(0, 1) (b, t, c, h, w) to x_0 by `steps` calls of eps(x, t) with t (b,).

    ddim: arXiv 2010.02502 eq. 12 with eta (the paper's choice is 50 steps, eta 1.0). ddpm: ancestral sampling
    with the true posterior of the strided chain, which is ddim at eta 1. dpm: DPM-Solver++(2M), arXiv
    2211.01095 algorithm 2, for few steps. noise: () -> tensor like x, needed when eta > 0. The previous step
    is the list's next entry, never t - T // n; nothing is clipped, these are latents.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r}: choose one of {', '.join(SAMPLERS)}")
    eta = {"ddpm": 1.0, "dpm": 0.0}.get(sampler, eta)
    abar, ts = alphas_cumprod().double(), timesteps(steps)
    old = None                                                              # (x0, log-SNR) of the step before
    for i, t in enumerate(ts):
        a = abar[t].item()
        a_next = abar[ts[i + 1]].item() if i + 1 < steps else 1.0
        e = eps(x, torch.full((x.shape[0],), t, device=x.device)).float()
        x0 = (x - (1 - a) ** 0.5 * e) / a ** 0.5
        if sampler == "dpm":
            lam = 0.5 * math.log(a / (1 - a))
            d = x0
            if a_next < 1:
                h = 0.5 * math.log(a_next / (1 - a_next)) - lam
                if old is not None:
                    r = (lam - old[1]) / h
                    d = x0 + (x0 - old[0]) / (2 * r)
                x = ((1 - a_next) / (1 - a)) ** 0.5 * x - a_next ** 0.5 * math.expm1(-h) * d
            else:                                                           # infinite log-SNR: first order
                x = x0
            old = (x0, lam)
        else:
            var = eta ** 2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
            x = a_next ** 0.5 * x0 + max(1 - a_next - var, 0.0) ** 0.5 * e
            if var > 0:
                x = x + var ** 0.5 * noise()
        if callback:
            callback(i, x)
    return x
