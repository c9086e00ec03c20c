"""Sample stickers from a checkpoint.

    python sample.py --text "a red heart beating" --seeds 0-7                 # generation from text python
    sample.py --image cat.png [--text "a cat waving"]                  # ... from a reference frame python
    sample.py --mode interpolate --input keyframes.webp --factor 2     # frames between python sample.py
    --mode predict --input start.gif --given 4 [--backward]  # frames after (before) python sample.py --mode
    loop --image cat.png                              # first frame = last frame python sample.py --mask
    10010001 --input sticker.webp                     # any pattern: 1 = given, 0 = made python sample.py
    --from-metadata out.webp                                 # repeat what made a file

Without --ckpt: the newest run under runs/, else the checkpoint shipped in weights/. Given frames come back
untouched.
"""

import argparse
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from curriculum import make_masks
from data import DataError, fit_frames, read_metadata, read_sticker, save_sheet, unpremultiply, write_sticker
from rdtf import RDTF, SAMPLERS, AutoencoderKL, Config, guided_eps, keep_memory, read_weights, sample

FORMAT = 1
HERE = Path(__file__).parent
BUILT_IN = HERE / "assets" / "stickers" / "1f44b.webp"                     # a waving hand, for a first look


class Loaded(NamedTuple):
    """A model ready to sample: RDTF and autoencoder in eval mode on one device, configuration, and what the
    file says of itself.
    """

    model: RDTF
    vae: AutoencoderKL
    cfg: Config
    meta: dict


@contextmanager
def ema_weights(module, ema):
    """Within: the module's parameters are the averaged ones. After: exactly what they were."""
    kept = {}
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name in ema:
                kept[name] = p.detach().clone()
                p.copy_(ema[name])
    try:
        yield module
    finally:
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name in kept:
                    p.copy_(kept[name])


def load_model(path, device="cpu"):
    """A checkpoint of train.py (or a shipped one) -> Loaded, with the averaged weights where there are any.
    """
    if not Path(path).exists():
        raise DataError(f"--ckpt {path}: no such file; train one with `python train.py`")
    try:
        data = read_weights(path)
    except Exception as e:
        raise DataError(f"--ckpt {path}: not a checkpoint that can be opened safely ({type(e).__name__})")
    if not isinstance(data, dict) or data.get("stage") != "main":
        raise DataError(f"--ckpt {path}: not a checkpoint of a whole model; use a run's last.pt")
    if data.get("format") != FORMAT:
        raise DataError(f"--ckpt {path}: format {data.get('format')}, this version reads {FORMAT}; use the rdtf version "
                        f"that wrote it")
    cfg = Config(**data["config"])
    model, vae = RDTF(cfg, data.get("text_encoder", ())), AutoencoderKL(cfg)
    model.load_state_dict({k: v.float() for k, v in {**data["model"], **data.get("ema", {})}.items()})
    vae.load_state_dict({k: v.float() for k, v in data["vae"].items()})
    for m in (model, vae):
        m.to(device).eval().requires_grad_(False)
    return Loaded(model, vae, cfg, {k: data.get(k) for k in ("step", "fingerprint", "vae_id")})


def noise_like(shape, generators, device):
    """One generator per sticker, always on the CPU: results do not depend on the batch or the device."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@torch.no_grad()
def sample_clips(loaded, captions, frames, cond_mask, frame_mask=None, *, steps=50, sampler="ddim", eta=1.0,
                 text_scale=None, image_scale=None, rescale=0.0, negative="", seeds=(0,), precision="auto",
                 progress=None):
    """The one way to sample: (b, F, 4, s, s) premultiplied RGBA in [0, 1] in and out.

    captions: b strings, "" = no text. frames: given frames where cond_mask (b, F) is True, anything
    elsewhere. frame_mask (b, F): True = a frame that is wanted. seeds: one per sticker. Scales default to the
    checkpoint's. Given frames are put back untouched.
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
    gens = [torch.Generator().manual_seed(int(s)) for s in seeds]
    bf16 = precision == "bf16" or precision == "auto" and device.type == "cuda"
    text = [to_device(model.text.tokenize(c), device) for c in (list(captions), [negative] * b)]
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        x = noise_like(shape, gens, device)
        eps = guided_eps(model, *text, z, cond, real, text_scale, image_scale, any(captions), rescale, x)
        x = sample(eps, x, steps, sampler, eta, lambda: noise_like(shape, gens, device), progress)
    clip = torch.stack([vae.decode(row) for row in x])
    clip = torch.where(cond[:, :, None, None, None], frames, clip)
    return torch.where(real[:, :, None, None, None], clip, 0.0)


def to_device(x, device):
    return [y.to(device) for y in x] if isinstance(x, list) else x.to(device)


def to_premultiplied(frames, size):
    """(t, h, w, 4) straight RGBA uint8 of any size -> (t, 4, size, size) premultiplied float in [0, 1]."""
    return torch.from_numpy(fit_frames(frames, size)).permute(0, 3, 1, 2).float() / 255


def to_straight(clip):
    """(t, 4, s, s) premultiplied float in [0, 1] -> (t, s, s, 4) straight RGBA uint8, rounded."""
    return unpremultiply((clip.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


# ----------------------------------------------------------------------------------------------------------------
# From flags to clips


def window_masks(args, F):
    """-> (n, cond_mask, frame_mask) of a single clip in the modes that make exactly one."""
    n = args.frames or (len(args.mask) if args.mask else F)
    if not 1 <= n <= F:
        raise DataError(f"--frames {n}: this model makes 1 to {F}; longer: --mode interpolate, or predict with --length")
    task = args.mask or ("loop" if args.mode == "loop" else "it2v" if args.image else "t2v")
    try:
        return (n, *make_masks(task, n, F, at=None if args.mask or task == "loop" else 0))
    except ValueError as e:
        raise DataError(f"--mask {args.mask or args.mode}: {e}")


def single(make, given, args, F):
    """generate, loop and --mask: one clip. given: (m, 4, s, s) or None."""
    n, cond, real = window_masks(args, F)
    ones = int(cond.sum())
    frames = torch.zeros(F, 4, make.size, make.size)
    if ones:
        if given is None:
            what = f"--mask {args.mask}" if args.mask else f"--mode {args.mode}"
            raise DataError(f"{what} gives {ones} frame(s): add --input or --image")
        if args.mode == "loop" or len(given) == 1:
            frames[torch.from_numpy(cond)] = given[:1]
        elif len(given) >= n:
            frames[:n] = given[:n]
        elif len(given) == ones:
            frames[torch.from_numpy(cond)] = given
        else:
            raise DataError(f"--mask {args.mask}: wants {ones} given frames or a sticker of {n}, --input has "
                            f"{len(given)}")
    clip = make(frames, cond, real)[:n]
    return clip[:-1] if args.mode == "loop" and n > 1 else clip             # the last frame is the first again


def predict(make, given, args, F):
    """A prefix -> what follows (or a suffix -> what comes before), window after window until --length."""
    keep = args.given or min(len(given), max(1, F // 2))
    if not 1 <= keep < F:
        raise DataError(f"--given {keep}: choose 1 to {F - 1}, so that there is something to make")
    if keep > len(given):
        raise DataError(f"--given {keep}: --input has only {len(given)} frame(s)")
    clip, length = given, args.length or (args.frames or F) + len(given) - keep
    if length <= len(given):
        raise DataError(f"--length {length}: --input already has {len(given)} frames; ask for more")
    while len(clip) < length:
        n = min(F, keep + length - len(clip))
        frames = torch.zeros(F, 4, make.size, make.size)
        if args.backward:
            cond, real = make_masks("0" * (n - keep) + "1" * keep, n, F)
            frames[n - keep:n] = clip[:keep]
            clip = torch.cat([make(frames, cond, real)[:n - keep], clip])
        else:
            cond, real = make_masks("1" * keep, n, F)
            frames[:keep] = clip[-keep:]
            clip = torch.cat([clip, make(frames, cond, real)[keep:n]])
    return clip


def interpolate(make, given, args, F):
    """factor - 1 new frames between every neighbouring pair; windows share one keyframe."""
    f = args.factor
    if len(given) < 2:
        raise DataError("--mode interpolate: --input must hold at least 2 keyframes (a sticker or several pictures)")
    clip, per = given[:1], (F - 1) // f + 1                                 # keyframes per window
    first = 0
    while first < len(given) - 1:
        keys = given[first:first + per]
        n = (len(keys) - 1) * f + 1
        cond, real = make_masks(("1" + "0" * (f - 1)) * (len(keys) - 1) + "1", n, F)
        frames = torch.zeros(F, 4, make.size, make.size)
        frames[0:n:f] = keys
        clip = torch.cat([clip, make(frames, cond, real)[1:n]])
        first += len(keys) - 1
    return clip


MODES = {"generate": single, "predict": predict, "interpolate": interpolate, "loop": single}


class Maker:
    """make(frames, cond, real) -> (F, 4, s, s): one window of one sticker. Windows of a sticker continue its
    seed.
    """

    def __init__(self, loaded, args, seed, progress):
        self.loaded, self.args, self.seed, self.progress, self.calls = loaded, args, seed, progress, 0
        self.size = loaded.cfg.size

    def __call__(self, frames, cond, real):
        a, seed = self.args, self.seed + 1_000_003 * self.calls
        self.calls += 1
        names = ("steps", "sampler", "eta", "text_scale", "image_scale", "rescale", "negative", "precision")
        options = {k: getattr(a, k) for k in names}
        return sample_clips(self.loaded, [a.text], frames[None], cond[None], real[None], seeds=[seed],
                            progress=self.progress, **options)[0].cpu()


def load_given(args, size):
    """--image / --input -> ((m, 4, s, s) premultiplied in [0, 1], (m, s, s, 4) the same pixels as stored,
    total ms), or Nones.
    """
    paths = [args.image] if args.image else args.input
    if not paths:
        return None, None, 0
    frames, total = [], 0
    for path in paths:
        clip, durations = read_sticker(path)
        clip, total = clip[::args.every], total + sum(durations)
        if clip.shape[1:3] != (size, size):
            print(f"{path}: {clip.shape[2]}x{clip.shape[1]} pixels, fitted to {size}x{size}", file=sys.stderr)
            clip = unpremultiply(fit_frames(clip, size))
        frames.append(clip if len(paths) == 1 else clip[:1])
    straight = np.concatenate(frames)
    straight = straight[:1] if args.image else straight
    return to_premultiplied(straight, size), straight, total


def parse_seeds(text):
    """"0-7", "3" or "1,5,9" -> list of ints."""
    try:
        seeds = []
        for part in str(text).split(","):
            a, dash, b = part.partition("-")
            seeds += list(range(int(a), int(b) + 1)) if dash else [int(a)]
        if not seeds or min(seeds) < 0:
            raise ValueError
        return seeds
    except ValueError:
        raise DataError(f"--seeds {text}: write 0-7, 3 or 1,5,9")


def default_checkpoint():
    runs = sorted(Path("runs").glob("*/last.pt"), key=lambda p: p.stat().st_mtime)
    found = runs[-1:] or sorted((HERE / "weights").glob("*.pt"))
    if not found:
        raise DataError("no checkpoint: train one with `python train.py`, or name one with --ckpt")
    return str(found[0])


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    a = p.add_argument
    a("--ckpt", default="", help="checkpoint; empty: the newest of runs/, else the shipped one")
    a("--mode", default="generate", choices=list(MODES), help="what to make")
    a("--text", default="", help="caption; empty = none")
    a("--negative", default="", help="caption to steer away from (takes the place of 'no text' in guidance)")
    a("--image", default="", help="reference frame: a picture, or the first frame of a sticker")
    a("--input", nargs="+", default=[], metavar="FILE", help="a sticker, or several pictures in order")
    a("--every", type=int, default=1, help="use every N-th frame of --input only")
    a("--given", type=int, default=0, help="predict: frames of --input that are given, 0 = half a clip")
    a("--backward", action="store_true", help="predict: make the frames before --input instead of after")
    a("--factor", type=int, default=2, choices=[2, 3], help="interpolate: time steps per given frame")
    a("--mask", default="", help="any pattern such as 10010010: 1 = given, 0 = made")
    a("--frames", type=int, default=0, help="frames to make, 0 = all the model has")
    a("--length", type=int, default=0, help="predict: frames of the whole sticker, 0 = one window")
    a("--seeds", default="0", help="one sticker per seed: 0-7, 3 or 1,5,9")
    a("--sampler", default="ddim", choices=SAMPLERS, help="dpm = DPM-Solver++(2M), good from 15 steps")
    a("--steps", type=int, default=50, help="denoising steps, 1 to 1000")
    a("--eta", type=float, default=1.0, help="ddim: 0 = deterministic, 1 = the paper")
    a("--text-scale", type=float, default=None, help="guidance by the caption, 1 = none; default: the model's")
    a("--image-scale", type=float, default=None, help="guidance by given frames, 1 = none; default: the model's")
    a("--rescale", type=float, default=0.0, help="0..1: pull the guided std back, against oversaturation")
    a("--out", default="sticker.webp",
      help="file; the suffix is the format: .webp .gif .apng .png (sheet) .mp4; several seeds: NAME-SEED")
    a("--sheet", default="", help="also write a contact sheet PNG (several seeds always do)")
    a("--duration", type=int, default=0,
      help="milliseconds per frame; 0: 125, and for interpolate what keeps the time the input takes")
    a("--size", type=int, default=0, help="edge of the file in pixels, 0 = the model's")
    a("--max-kb", type=int, default=0, help="largest file in KB (WhatsApp 500, Signal 300), 0 = no limit")
    a("--device", default="auto", help="auto, cpu, cuda or mps")
    a("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 on GPUs, fp32 on CPUs")
    a("--from-metadata", default="", metavar="FILE",
      help="take every setting from a file made before; --out and --ckpt may be given anew")
    return p


def check(args):
    """Each wrong combination says what to add or remove."""
    if args.image and args.input:
        raise DataError("--image and --input: give one of them")
    if args.mode in ("predict", "interpolate") and args.image:
        raise DataError(f"--image with --mode {args.mode}: use --input FILE (a sticker or pictures)")
    if args.mode in ("predict", "interpolate") and not args.input:
        raise DataError(f"--mode {args.mode}: add --input FILE (a sticker or pictures)")
    if args.mode in ("predict", "interpolate") and args.mask:
        raise DataError(f"--mask with --mode {args.mode}: remove one; --mask alone takes any pattern")
    if args.mode == "loop" and not (args.image or args.input):
        raise DataError("--mode loop: add --image FILE, the frame it begins and ends with")
    if args.mode == "loop" and args.mask:
        raise DataError("--mask with --mode loop: remove one")
    if args.mode == "generate" and args.input and not args.mask:
        raise DataError("--input with --mode generate: use --image for a reference frame, or --mask for given frames")
    if args.mode == "generate" and not (args.text or args.image or args.mask):
        raise DataError("nothing to go by: add --text \"...\", --image FILE, or choose another --mode")
    if args.mask and not set(args.mask) <= {"0", "1"}:
        raise DataError(f"--mask {args.mask}: zeros and ones only, such as 10010010")
    for flag, wanted in (("given", "predict"), ("backward", "predict"), ("length", "predict")):
        if getattr(args, flag) and args.mode != wanted:
            raise DataError(f"--{flag}: only with --mode {wanted}; remove it")
    if args.frames and args.mode == "interpolate":
        raise DataError("--frames with --mode interpolate: remove it, the length follows from --input and --factor")
    if not 1 <= args.steps <= 1000:
        raise DataError(f"--steps {args.steps}: choose 1 to 1000")
    if args.duration and args.duration < 10 or args.duration < 0:
        raise DataError(f"--duration {args.duration}: at least 10 ms, or 0")
    if args.every < 1:
        raise DataError(f"--every {args.every}: at least 1")


def run(args):
    if args.from_metadata:
        saved = read_metadata(args.from_metadata)
        if "rdtf" not in saved:
            raise DataError(f"{args.from_metadata}: carries no rdtf settings; only files written by sample.py do")
        keep = {"out": args.out, "ckpt": args.ckpt or saved["rdtf"].get("ckpt", ""), "device": args.device,
                "from_metadata": args.from_metadata}
        args = argparse.Namespace(**{**vars(args), **saved["rdtf"], **keep})
    if args.mode in ("predict", "interpolate", "loop") and not (args.input or args.image) and BUILT_IN.exists():
        args.input, args.every = [str(BUILT_IN)], 4
        print(f"no --input: taking every 4th frame of the built-in sticker {BUILT_IN.name}", file=sys.stderr)
    check(args)
    kind = args.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    args.ckpt = args.ckpt or default_checkpoint()
    try:
        loaded = load_model(args.ckpt, kind)
    except (RuntimeError, AssertionError) as e:
        raise DataError(f"--device {args.device} / --ckpt {args.ckpt}: {str(e).splitlines()[0]}")
    seeds, F = parse_seeds(args.seeds), loaded.cfg.frames
    given, straight, total = load_given(args, loaded.cfg.size)
    out, clips = Path(args.out), []
    with tqdm(unit="step", desc="sampling", dynamic_ncols=True) as bar:
        for seed in seeds:
            clip = MODES[args.mode](Maker(loaded, args, seed, lambda i, x: bar.update(1)), given, args, F)
            frames = restore(to_straight(clip), clip, given, straight)
            settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "from_metadata")}
            settings["seeds"] = str(seed)
            path = out if len(seeds) == 1 else out.with_name(f"{out.stem}-{seed}{out.suffix}")
            duration = args.duration or (max(10, round(total / len(frames))) if args.mode == "interpolate" else 125)
            info = write_sticker(path, frames, duration, max_kb=args.max_kb, size=args.size,
                                 metadata={"rdtf": settings, **loaded.meta})
            clips.append(frames)
            note = f" ({info['message']})" if info.get("message") else ""
            bar.write(f"{path}: {len(frames)} frames, {path.stat().st_size / 1024:.1f} KB{note}")
    if args.sheet or len(seeds) > 1:
        sheet = args.sheet or str(out.with_name(f"{out.stem}-sheet.png"))
        save_sheet(sheet, clips, [f"seed {s}" for s in seeds])
        print(f"{sheet}: {len(clips)} stickers")


def restore(frames, clip, given, straight):
    """Put the given frames' own bytes in: unpremultiplying soft alpha would round them."""
    if given is not None:
        for i, x in enumerate(clip):
            same = (given == x).flatten(1).all(1)
            if same.any():
                frames[i] = straight[int(same.nonzero()[0])]
    return frames


def main():
    args = parser().parse_args()
    keep_memory()
    try:
        run(args)
    except DataError as e:
        print(f"sample.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
