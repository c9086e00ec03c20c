"""Sample stickers from a checkpoint.

    python sample.py                                            # a built-in sticker, every second frame made
    python sample.py --text "a red heart beating" --seeds 0-7                 # generation from text
    python sample.py --image cat.png [--text "a cat waving"] [--length 24]    # ... from a reference frame
    python sample.py --mode interpolate --input keyframes.webp --factor 2     # frames between
    python sample.py --mode predict --input start.gif --given 4 [--backward]  # frames after (before)
    python sample.py --mode loop --image cat.png                              # ends where it begins
    python sample.py --mask 10010001 --input sticker.webp                     # any pattern: 1 = given
    python sample.py --from-metadata out.webp --out again.webp                # repeat what made a file

Without --ckpt: the newest run under runs/, else the checkpoint shipped in weights/. Given frames come back
untouched. Stickers longer than the model's clip are made window after window.
"""

import argparse
import hashlib
import math
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from curriculum import make_masks
from data import DataError, fit_frames, read_metadata, read_sticker, save_sheet, unpremultiply, write_sticker
from rdtf import (RDTF, SAMPLERS, AutoencoderKL, Config, blend, guided_eps, keep_memory, read_weights,
                  sample)

FORMAT = 1                               # of checkpoints
HERE = Path(__file__).parent
SHIPPED = "weights/fluent-64.pt"
BUILT_IN = "assets/stickers/1f436.webp", "dog face"         # where --input is missing: calm motion
SUFFIXES = (".webp", ".gif", ".apng", ".png", ".mp4")
DURATION = 125                           # ms per frame where the input has no times


class Loaded(NamedTuple):
    """A model ready to sample: RDTF and autoencoder in eval mode on one device, configuration, and what the
    file says of itself."""

    model: RDTF
    vae: AutoencoderKL
    cfg: Config
    meta: dict


@contextmanager
def ema_weights(module, ema):
    """Within: the module's parameters are the averaged ones. After: exactly what they were."""
    averaged = {name: p.data for name, p in module.named_parameters() if name in ema}
    kept = {name: p.clone() for name, p in averaged.items()}
    for name, p in averaged.items():
        p.copy_(ema[name])
    try:
        yield module
    finally:
        for name, p in averaged.items():
            p.copy_(kept[name])


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_model(path, device="cpu", flag="--ckpt"):
    """A checkpoint of train.py, whole or exported (half precision, without EMA) -> Loaded, in fp32, with the
    averaged weights where there are any. flag: what messages call it."""
    if not Path(path).is_file():
        raise DataError(f"{flag} {path}: no such file; train one with `python train.py`")
    try:
        data = read_weights(path)
    except Exception as e:
        raise DataError(f"{flag} {path}: not a checkpoint that can be opened safely ({type(e).__name__}); "
                        f"use a run's last.pt")
    if not isinstance(data, dict) or "format" not in data:
        raise DataError(f"{flag} {path}: not a checkpoint of rdtf; use a run's last.pt")
    if data["format"] != FORMAT:
        raise DataError(f"{flag} {path}: written by another version of rdtf (format {data['format']}, this "
                        f"one reads {FORMAT}); use that version")
    if data.get("stage") != "main":
        raise DataError(f"{flag} {path}: an autoencoder alone; use a run's last.pt")
    try:
        cfg = Config(**data["config"])
        model, vae = RDTF(cfg, data.get("text_encoder") or ()), AutoencoderKL(cfg)
        weights = {**data["model"], **(data.get("ema") or {})}
        model.load_state_dict({k: v.float() for k, v in weights.items()})
        vae.load_state_dict({k: v.float() for k, v in data["vae"].items()})
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:120]
        raise DataError(f"{flag} {path}: damaged, or written by another version of rdtf ({reason})")
    try:
        for m in (model, vae):
            m.to(device).eval().requires_grad_(False)
    except (AssertionError, RuntimeError) as e:
        raise DataError(f"--device {device}: {first_line(e)}; try --device cpu")
    return Loaded(model, vae, cfg, {k: data.get(k) for k in ("step", "fingerprint", "vae_id")})


# ------------------------------------------------------------------------------------------------------------
# One clip of each sticker of a batch


def to_device(x, device):
    """Tensors, lists and dicts of them; None stays."""
    if isinstance(x, dict):
        return {k: to_device(v, device) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [to_device(y, device) for y in x]
    return None if x is None else x.to(device, non_blocking=True)


def noise_like(shape, generators, device):
    """One generator per sticker, always on the CPU: its noise does not depend on the batch or the device."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def with_detail(clip, frames, seen, cond):
    """Decoded frames -> the same with what the autoencoder lost of the given ones put back (ours).

    clip: what was made; frames, seen: the given frames (cond (b, t) is True there), as they are and decoded;
    all (b, t, 4, s, s). The loss is blended over time as in `rdtf.blend` and fades out where the clip differs
    from the blend of `seen`, to nothing at 1/3 of the range: what stands still stays as sharp as the given
    frames, what moves leaves no ghost (measured in benchmarks/README.md).
    """
    still = (1 - 3 * (clip - blend(seen, cond)).abs().amax(2, keepdim=True)).clamp(min=0)
    clip = (clip + still * blend(frames - seen, cond)).clamp(0, 1)
    return torch.cat([torch.minimum(clip[:, :, :3], clip[:, :, 3:]), clip[:, :, 3:]], 2)


@torch.no_grad()
def sample_clips(loaded, captions, frames, cond_mask, frame_mask=None, *, steps=50, sampler="ddim", eta=1.0,
                 text_scale=None, image_scale=None, rescale=0.0, negative="", seeds=(0,), precision="auto",
                 progress=None):
    """The one way to sample: (b, F, 4, s, s) premultiplied RGBA in [0, 1] in and out.

    captions: b strings, "" = no text. frames: given frames where cond_mask (b, F) is True, anything
    elsewhere. frame_mask (b, F): True = a frame that is wanted; None = all. seeds: a number or CPU generator
    per sticker. negative takes the place of "no text" in guidance. Scales: None = the checkpoint's.
    progress(i, latents) is called after every step. Given frames are put back.
    """
    model, vae, cfg, _ = loaded
    device = next(model.parameters()).device
    b = len(captions)
    cond = torch.as_tensor(np.asarray(cond_mask), dtype=torch.bool, device=device)
    real = torch.ones_like(cond)
    if frame_mask is not None:
        real = torch.as_tensor(np.asarray(frame_mask), dtype=torch.bool, device=device)
    frames = torch.where(cond[:, :, None, None, None], frames.to(device).float(), 0.0)
    text_scale = cfg.text_scale if text_scale is None else text_scale
    image_scale = cfg.image_scale if image_scale is None else image_scale
    shape = (cfg.frames, cfg.latent_channels, cfg.size // cfg.f, cfg.size // cfg.f)
    z = torch.zeros(b, *shape, device=device)
    if cond.any():
        z[cond] = vae.encode(frames[cond])
    gens = [s if isinstance(s, torch.Generator) else torch.Generator().manual_seed(int(s)) for s in seeds]
    bf16 = precision == "bf16" or precision == "auto" and device.type == "cuda"
    text = [to_device(model.text.tokenize(c), device) for c in (list(captions), [negative] * b)]
    has_text = any(c != negative for c in captions)
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        x = noise_like(shape, gens, device)
        eps = guided_eps(model, *text, z, cond, real, text_scale, image_scale, has_text, rescale, noise=x)
        x = sample(eps, x, steps, sampler, eta, lambda: noise_like(shape, gens, device), progress)
    clip = torch.stack([vae.decode(row) for row in x])
    if cond.any():
        clip = with_detail(clip, frames, torch.stack([vae.decode(row) for row in z]), cond)
    clip = torch.where(cond[:, :, None, None, None], frames, clip)
    return torch.where(real[:, :, None, None, None], clip, 0.0)


def to_premultiplied(frames, size):
    """(t, h, w, 4) straight RGBA uint8 of any size -> (t, 4, size, size) premultiplied float in [0, 1]."""
    return torch.from_numpy(fit_frames(frames, size)).permute(0, 3, 1, 2).float() / 255


def to_straight(clip):
    """(t, 4, s, s) premultiplied float in [0, 1] -> (t, s, s, 4) straight RGBA uint8, rounded."""
    return unpremultiply((clip.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


# ------------------------------------------------------------------------------------------------------------
# Modes: mode(make, given, args, F) -> (clip (b, t, 4, s, s), source: per frame the index of the given frame
# it is, or -1). given: (b, m, 4, s, s), m = 0 without any; make(frames, cond, real) is one window.


def window(make, given, mask, F):
    """Given frames (b, m, ...) go to the m ones of mask, in order -> (b, len(mask), 4, s, s)."""
    cond, real = make_masks(mask, len(mask), F)
    frames = given.new_zeros(given.shape[0], F, *given.shape[2:])
    frames[:, torch.from_numpy(cond)] = given
    return make(frames, cond, real)[:, :len(mask)]


def extend(make, clip, keep, length, F, backward=False):
    """Window after window: the last (backward: first) `keep` frames are given, until there are `length`."""
    while clip.shape[1] < length:
        new = min(F - keep, length - clip.shape[1])
        if backward:
            clip = torch.cat([window(make, clip[:, :keep], "0" * new + "1" * keep, F)[:, :new], clip], 1)
        else:
            clip = torch.cat([clip, window(make, clip[:, -keep:], "1" * keep + "0" * new, F)[:, keep:]], 1)
    return clip


def generate(make, given, args, F):
    """From text, from a reference frame, or --mask: any pattern."""
    mask = args.mask or ("1" if args.image else "0") + "0" * ((args.frames or F) - 1)
    ones, m = [i for i, x in enumerate(mask) if x == "1"], given.shape[1]
    if len(mask) > F:
        raise DataError(f"--mask {mask}: {len(mask)} places, this model makes {F} frames; use fewer")
    if m == 1:                                                              # one picture, at every 1
        pick = [0] * len(ones)
    elif m in (0, len(ones)):
        pick = list(range(m))
    else:                                                                   # those frames of a sticker
        pick = ones
    if len(pick) != len(ones) or pick and max(pick) >= m:
        raise DataError(f"--mask {mask}: wants 1 picture, {len(ones)} given frames or a sticker of "
                        f"{len(mask)}, --input has {m}")
    clip = window(make, given[:, pick], mask, F)
    if args.length:
        if args.length <= F:
            raise DataError(f"--length {args.length}: one clip has {F} frames; use --frames for fewer")
        clip = extend(make, clip, F // 2, args.length, F)
    source = [-1] * clip.shape[1]
    for i, j in zip(ones, pick):
        source[i] = j
    return clip, source


def predict(make, given, args, F):
    """A prefix -> what follows (a suffix -> what comes before)."""
    m, n = given.shape[1], args.frames or F
    keep = args.given or min(m, max(1, n // 2))
    if not 1 <= keep < n:
        raise DataError(f"--given {keep}: choose 1 to {n - 1}, so that there is something to make")
    if keep > m:
        raise DataError(f"--given {keep}: --input has only {m} frame(s)")
    length = args.length or m + n - keep
    if length <= m:
        raise DataError(f"--length {length}: --input already has {m} frames; ask for more")
    new = [-1] * (length - m)
    clip = extend(make, given, keep, length, F, args.backward)
    return clip, new + list(range(m)) if args.backward else list(range(m)) + new


def interpolate(make, given, args, F):
    """factor - 1 new frames between every neighbouring pair; neighbouring windows share one keyframe."""
    f, m = args.factor or 2, given.shape[1]
    if m < 2:
        raise DataError("--mode interpolate: --input must hold 2 keyframes or more (a sticker, or pictures)")
    if f >= F:
        raise DataError(f"--factor {f}: this model makes {F} frames at a time")
    length = args.length or (m - 1) * f + 1
    if not 2 <= length <= (m - 1) * f + 1:
        raise DataError(f"--length {length}: {m} keyframes at --factor {f} make 2 to "
                        f"{(m - 1) * f + 1} frames")
    clip, per, first = given[:, :1], (F - 1) // f, 0                        # pairs per window
    while clip.shape[1] < length:
        keys = given[:, first:first + per + 1]
        pairs = keys.shape[1] - 1
        clip = torch.cat([clip, window(make, keys, "1" + ("0" * (f - 1) + "1") * pairs, F)[:, 1:]], 1)
        first += pairs
    return clip[:, :length], [i // f if i % f == 0 else -1 for i in range(length)]


def loop(make, given, args, F):
    """The first frame is given again as the last one, which is left out: the file's own loop closes there."""
    n = args.frames or F - 1
    if not 2 <= n < F:
        raise DataError(f"--frames {n} with --mode loop: choose 2 to {F - 1}")
    return window(make, given[:, [0, 0]], "1" + "0" * (n - 1) + "1", F)[:, :n], [0] + [-1] * (n - 1)


MODES = {"generate": generate, "predict": predict, "interpolate": interpolate, "loop": loop}


def maker(loaded, args, seeds, progress):
    """-> make(frames, cond, real), one window of every sticker of a batch. A sticker has one generator, which
    its windows use up in turn."""
    b, gens = len(seeds), [torch.Generator().manual_seed(s) for s in seeds]
    names = ("steps", "sampler", "text_scale", "image_scale", "rescale", "negative", "precision")
    settings = {**{k: getattr(args, k) for k in names}, "eta": 1.0 if args.eta is None else args.eta}

    def make(frames, cond, real):
        cond, real = (np.repeat(m[None], b, 0) for m in (cond, real))
        return sample_clips(loaded, [args.text] * b, frames, cond, real, seeds=gens, progress=progress,
                            **settings).cpu()
    return make


# ------------------------------------------------------------------------------------------------------------
# Flags in, files out


def load_given(args, size):
    """--image / --input / a built-in sticker -> ((m, size, size, 4) straight RGBA, m durations in ms)."""
    paths, every = [args.image] if args.image else args.input, args.every or 1
    if not paths and args.mode == "generate":
        return np.zeros((0, size, size, 4), np.uint8), []
    first_only = args.image or args.mode == "loop" or len(paths) > 1
    if not paths:
        paths, every, args.text = [HERE / BUILT_IN[0]], args.every or 2, args.text or BUILT_IN[1]
        which = "its first frame" if first_only else f"frames 1, {1 + every}, {1 + 2 * every}, .."
        print(f"no --input: taking the built-in sticker {BUILT_IN[0]} ({BUILT_IN[1]}), {which}")
    frames, times = [], []
    for path in paths:
        clip, durations = read_sticker(path)
        if first_only:
            clip, durations = clip[:1], durations[:1]
        if clip.shape[1:3] != (size, size):
            print(f"{path}: {clip.shape[2]}x{clip.shape[1]} pixels, fitted to {size}x{size}", file=sys.stderr)
            clip = unpremultiply(fit_frames(clip, size))
        frames.append(clip)
        times += durations
    frames = np.concatenate(frames)[::every]
    return frames, [sum(times[i:i + every]) for i in range(0, len(times), every)]


def frame_times(args, times, count):
    """-> ms per frame: --duration, else the input's: its whole duration kept (interpolate) or its mean."""
    if args.duration or not times or min(times) <= 0:
        return [args.duration or DURATION] * count
    if args.mode != "interpolate":
        return [max(10, round(sum(times) / len(times)))] * count
    f = args.factor or 2                                 # a keyframe shares its time with those after it
    split = [d * (j + 1) // f - d * j // f for d in times[:-1] for j in range(f)] + times[-1:]
    return [max(10, x) for x in split[:count]]


def parse_seeds(text):
    """"0-7", "3" or "1,5,9" -> list of ints."""
    seeds = []
    try:
        for part in text.split(","):
            a, dash, b = part.partition("-")
            a, b = int(a), int(b if dash else a)
            if not 0 <= a <= b < 2 ** 32 or len(seeds) + b - a >= 1000:     # torch's generators use 32 bits
                raise ValueError
            seeds += range(a, b + 1)
    except ValueError:
        raise DataError(f"--seeds {text}: write 0-7, 3 or 1,5,9 (each 0 to {2 ** 32 - 1}, at most 1000)")
    return list(dict.fromkeys(seeds))                                       # a seed named twice counts once


def default_checkpoint():
    runs = sorted(Path("runs").glob("*/last.pt"), key=lambda p: p.stat().st_mtime)
    found = runs[-1] if runs else HERE / SHIPPED
    if not found.exists():
        raise DataError("no checkpoint: train one with `python train.py`, or name one with --ckpt")
    return str(found)


def fail(message):
    raise DataError(message)


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = fail                                                          # one line, like all bad input
    a = p.add_argument
    a("--ckpt", default="", help="checkpoint; default: the newest of runs/, else the shipped one")
    a("--mode", choices=list(MODES),
      help="default: generate with --text, --image or --mask, else interpolate. Without --input: a built-in")
    a("--text", default="", help="caption; empty = none")
    a("--negative", default="", help="caption to steer away from (takes the place of 'no text' in guidance)")
    a("--image", default="", help="reference frame: a picture, or the first frame of a sticker")
    a("--input", nargs="+", default=[], metavar="FILE", help="a sticker, or several pictures in order")
    a("--every", type=int, default=0,
      help="use every N-th frame of --input only; 0 = all (of the built-in sticker: every second)")
    a("--given", type=int, default=0,
      help="predict: the last (--backward: first) frames of --input that are looked at; 0 = half a clip")
    a("--backward", action="store_true", help="predict: make the frames before --input instead of after")
    a("--factor", type=int, choices=[2, 3], help="interpolate: time steps per keyframe; default 2")
    a("--mask", default="", help="any pattern such as 10010010: 1 = given, 0 = made")
    a("--frames", type=int, default=0, help="frames of one clip (loop: of the file), 0 = all the model has")
    a("--length", type=int, default=0,
      help="frames of the whole sticker, window after window; 0 = one window (interpolate: all keyframes)")
    a("--seeds", default="0", help="one sticker per seed: 0-7, 3 or 1,5,9; default %(default)s")
    a("--batch-size", type=int, default=0, help="stickers at a time; 0 = 1 on CPUs, 8 on GPUs")
    a("--sampler", default="ddim", choices=SAMPLERS,
      help="ddim (default), ddpm = ancestral, dpm = DPM-Solver++(2M), for few steps")
    a("--steps", type=int, default=50, help="denoising steps, 1 to 1000; default %(default)s")
    a("--eta", type=float, help="ddim: 0 = deterministic, 1 = the paper and the default")
    a("--text-scale", type=float, help="guidance by the caption, 1 = none; default: the checkpoint's")
    a("--image-scale", type=float, help="guidance by the given frames, 1 = none; default: the checkpoint's")
    a("--rescale", type=float, default=0.0, help="0 to 1: pull the guided std back, against oversaturation")
    a("--out", default="sticker.webp",
      help=f"file, suffix {' '.join(SUFFIXES)} (.png: frames side by side); several seeds: NAME-SEED")
    a("--sheet", default="", help="contact sheet PNG; default: NAME-sheet.png for several seeds, else none")
    a("--duration", type=int, default=0,
      help=f"ms per frame; 0 = the input's mean (interpolate: its whole duration is kept), else {DURATION}")
    a("--size", type=int, default=0, help="edge of the file in pixels, 0 = the model's")
    a("--max-kb", type=int, default=0, help="largest file, kB, 0 = no limit (Telegram 256, WhatsApp 500)")
    a("--device", default="auto", help="auto (default), cpu, cuda or mps")
    a("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 on CUDA, else fp32")
    a("--from-metadata", default="", metavar="FILE",
      help="every setting from a file made before; --out, --sheet, --ckpt and --device may be given anew")
    return p


def check(args):
    """Each wrong combination says what to add or remove. Needs no model; settles the mode."""
    a = args
    wrong = [
        (a.image and a.input, "--image and --input: remove one"),
        (a.mask and a.mode not in (None, "generate"), f"--mask with --mode {a.mode}: remove one"),
        (not set(a.mask) <= {"0", "1"}, f"--mask {a.mask}: zeros and ones only, such as 10010010"),
        (a.mask and "0" not in a.mask, f"--mask {a.mask}: nothing to make; put a 0 somewhere"),
        ("1" in a.mask and not (a.image or a.input), f"--mask {a.mask}: add --input or --image"),
        (a.mask and "1" not in a.mask,
         f"--mask {a.mask}: gives no frame; put a 1 somewhere, or use --frames {len(a.mask)} instead"),
        (a.mask and a.frames, "--frames with --mask: remove --frames, the mask says how many"),
    ]
    args.mode = a.mode or ("generate" if a.mask or a.image or a.text and not a.input else "interpolate")
    wrong += [
        (a.mode in ("predict", "interpolate") and a.image, f"--image with --mode {a.mode}: use --input"),
        (a.mode == "generate" and a.input and not a.mask, "--input with --mode generate: use --image for a "
         "reference frame, --mask to say which frames are given, or another --mode"),
        (a.mode == "generate" and not (a.text or a.image or a.mask),
         "--mode generate: nothing to go by; add --text \"...\", --image FILE or --mask"),
        (a.given and a.mode != "predict", "--given: only with --mode predict; remove it"),
        (a.backward and a.mode != "predict", "--backward: only with --mode predict; remove it"),
        (a.factor and a.mode != "interpolate", "--factor: only with --mode interpolate; remove it"),
        (a.every and (a.image or a.mode == "loop" or a.mode == "generate" and not a.input),
         "--every: only where several frames of --input are used; remove it"),
        (a.length and a.mode == "loop", "--length with --mode loop: remove it, or use --frames"),
        (a.length and a.frames, "--length and --frames: remove one"),
        (a.frames and a.mode == "interpolate", "--frames with --mode interpolate: use --length"),
        (a.eta is not None and a.sampler != "ddim", f"--eta with --sampler {a.sampler}: remove it"),
        (a.eta is not None and not 0 <= a.eta <= 1, f"--eta {a.eta}: choose 0 to 1"),
        (not 0 <= a.rescale <= 1, f"--rescale {a.rescale}: choose 0 to 1"),
        (not 1 <= a.steps <= 1000, f"--steps {a.steps}: choose 1 to 1000"),
        (a.duration and a.duration < 10, f"--duration {a.duration}: at least 10 ms"),
        (a.size > 4096, f"--size {a.size}: at most 4096"),
        (Path(a.out).suffix.lower() not in SUFFIXES, f"--out {a.out}: end it in one of {' '.join(SUFFIXES)}"),
        (a.sheet and Path(a.sheet).suffix.lower() != ".png", f"--sheet {a.sheet}: end it in .png"),
        (a.sheet and a.sheet == a.out, f"--sheet {a.sheet}: the same file as --out; choose another"),
        (Path(a.out) in map(Path, [a.image, *a.input]), f"--out {a.out}: is the input; choose another"),
        (a.negative and a.text_scale in (0, 1), "--negative: needs a --text-scale other than 0 and 1"),
    ]
    for name in ("every", "given", "frames", "length", "batch_size", "size", "max_kb"):
        wrong.append((getattr(a, name) < 0, f"--{name.replace('_', '-')} {getattr(a, name)}: not below 0"))
    for name in ("text_scale", "image_scale"):
        value = getattr(a, name)
        bad = value is not None and not math.isfinite(value)
        wrong.append((bad, f"--{name.replace('_', '-')} {value}: give a finite number"))
    for bad, message in wrong:
        if bad:
            raise DataError(message)


def check_writable(flag, path):
    """Before anything is sampled: may this file be made there?"""
    folder = Path(path).parent
    while not folder.exists():
        folder = folder.parent
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(0, "is a folder")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        where = "" if Path(path).is_dir() else f"in {folder}: "
        raise DataError(f"{flag} {path}: can't be written ({where}{e.strerror}); choose another place")


def repeat(args):
    """-> (the settings that made a file, but --out, --sheet, --ckpt, --device as given now; its metadata)."""
    saved, p = read_metadata(args.from_metadata), parser()
    flags = saved.get("rdtf")
    if not isinstance(flags, list) or not all(isinstance(x, str) for x in flags):
        raise DataError(f"{args.from_metadata}: carries no rdtf settings; only files written by sample.py do "
                        f"(not .mp4)")
    anew = ("out", "sheet", "ckpt", "device")
    for name, value in vars(args).items():
        if name not in (*anew, "from_metadata") and value != p.get_default(name):
            raise DataError(f"--{name.replace('_', '-')} with --from-metadata: remove one of them")
    try:
        again = p.parse_args(flags)
    except DataError as e:
        raise DataError(f"{args.from_metadata}: settings of another version of rdtf ({e})")
    for name in anew:
        value = getattr(args, name)
        setattr(again, name, again.ckpt if name == "ckpt" and not value else value)
    if again.ckpt and not Path(again.ckpt).is_file():
        print(f"{again.ckpt}, which made {args.from_metadata}, is not there: taking the default checkpoint")
        again.ckpt = ""
    again.from_metadata = ""
    return again, saved


def as_flags(args, seed, batch):
    """All settings of one sticker as a list of flags, which is what its metadata keeps."""
    flags = [f"--seeds={seed}", f"--batch-size={batch}"]
    for name, value in vars(args).items():
        if name in ("out", "sheet", "device", "from_metadata", "seeds", "batch_size"):
            continue
        if value is None or value is False or value in ("", []):     # but a scale or an eta of 0 is kept
            continue
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, *value] if name == "input" else [f"{flag}={value}"]
    return flags


def run(args):
    """Everything that can be refused is refused before the first step."""
    args, saved = repeat(args) if args.from_metadata else (args, {})
    check(args)
    seeds, out, kind = parse_seeds(args.seeds), Path(args.out), args.device
    sheet = args.sheet or (str(out.with_name(f"{out.stem}-sheet.png")) if len(seeds) > 1 else "")
    check_writable("--out", out)
    if sheet:
        check_writable("--sheet", sheet)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    args.ckpt = args.ckpt or default_checkpoint()
    loaded = load_model(args.ckpt, kind)
    F, size = loaded.cfg.frames, loaded.cfg.size
    if args.frames > F:
        raise DataError(f"--frames {args.frames}: this model makes 1 to {F}; for more use --length")
    if len(args.text.encode()) > loaded.cfg.text_bytes and not loaded.cfg.text_dims:
        print(f"--text: only its first {loaded.cfg.text_bytes} bytes are read", file=sys.stderr)
    straight, times = load_given(args, size)
    loaded.meta["input"] = hashlib.sha256(straight.tobytes()).hexdigest()[:16]
    changed = [k for k, v in loaded.meta.items() if saved and saved.get(k) != v]
    if changed:
        print(f"not what made the file, so the result may differ: {', '.join(changed)}", file=sys.stderr)
    given = to_premultiplied(straight, size) if len(straight) else torch.zeros(0, 4, size, size)
    mode, windows = MODES[args.mode], []
    mode(lambda frames, cond, real: windows.append(1) or frames, given[None], args, F)      # counts, checks
    batch = args.batch_size or (1 if kind == "cpu" else 8)         # on a CPU a batch saves no time
    groups = [seeds[i:i + batch] for i in range(0, len(seeds), batch)]
    print(f"{args.ckpt} (update {loaded.meta['step']}): {args.mode}, {len(seeds)} sticker(s), "
          f"{args.sampler} {args.steps} steps, {kind}")
    steps = len(groups) * len(windows) * args.steps
    bar = tqdm(total=steps, unit="step", desc="sampling", disable=None, dynamic_ncols=True)
    clips = []
    for group in groups:
        if saved:                     # other batch sizes round differently: repeat in one of the same size
            group = group + group[-1:] * (batch - len(group))
        made, source = mode(maker(loaded, args, group, lambda i, x: bar.update(1)),
                            given.expand(len(group), *given.shape), args, F)
        for seed, clip in zip(dict.fromkeys(group), made):
            frames = to_straight(clip)
            for i, j in enumerate(source):             # given frames: unpremultiplying would round soft alpha
                if j >= 0:
                    frames[i] = straight[j]
            path = out if len(seeds) == 1 else out.with_name(f"{out.stem}-{seed}{out.suffix}")
            ms = frame_times(args, times, len(frames))
            info = write_sticker(path, frames, ms, max_kb=args.max_kb, size=args.size,
                                 metadata={"rdtf": as_flags(args, seed, len(group)), **loaded.meta})
            clips.append(frames)
            bar.write(f"{path}: {info['frames']} frames, {sum(ms)} ms, {info['bytes'] / 1000:.1f} kB")
    bar.close()
    if sheet:
        save_sheet(sheet, clips, [f"seed {s}" for s in seeds])
        print(f"{sheet}: {len(clips)} sticker(s)")

def main(argv=None):
    keep_memory()
    try:
        run(parser().parse_args(argv))
        return
    except (DataError, ImportError) as e:
        message = str(e)
    except UnicodeEncodeError:
        message = "--text or --negative: not valid UTF-8"
    except OSError as e:
        message = f"{e.filename or 'a file'}: {e.strerror or first_line(e)}"
    except torch.OutOfMemoryError as e:
        message = f"out of memory ({first_line(e)}); lower --batch-size"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"sample.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
