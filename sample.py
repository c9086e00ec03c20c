"""Sample stickers from a checkpoint.

    python sample.py                                            # a built-in sticker, every second frame made
    python sample.py --text "a green face with a crown, sleeping" --seeds 0-7        # generation from text
    python sample.py --image cat.png [--text "a cat waving"] [--length 24]    # ... from a reference frame
    python sample.py --mode interpolate --input keyframes.webp --factor 2     # frames between
    python sample.py --mode predict --input start.gif --given 4 [--backward]  # frames after (before)
    python sample.py --mode loop --image cat.png                              # ends where it begins
    python sample.py --mask 10010001 --input sticker.webp                     # any pattern: 1 = given
    python sample.py --text "a cat waving" --for telegram                     # a file it takes

Without --ckpt: the newest run under runs/, else the checkpoint in weights/. Given frames come back untouched.
Stickers longer than the model's clip are made window after window. Every file carries the command that made
it: `python data.py info FILE`.
"""

import argparse
import contextlib
import math
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")    # on busy cores waiting threads spin for 20 s of CPU
import numpy as np
import torch
from tqdm import tqdm

from curriculum import make_masks
from data import (LEVELS, MAX_FRAMES, PLATFORMS, DataError, fit_straight, number, one_line, premultiply,
                  read_sticker, save_sheet, to_straight, told, wanted_path, write_sticker)
from rdtf import SAMPLERS, SHIPPED, find_device, load_lora, load_model, sample_clips

BUILT_IN = Path(__file__).parent / "stickers" / "fluent" / "1f436.webp", "dog face"       # without --input
DURATION = 125                           # ms per frame where the input has no times


# ------------------------------------------------------------------------------------------------------------
# Modes: mode(make, given, args, F) -> (clip (b, t, 4, s, s), source: {frame of it: the given frame that it
# is}). given: (b, m, 4, s, s), m = 0 without any; make(frames, cond, real) is one window.


def window(make, given, mask, F):
    """Given frames (b, m, ...) go to the m ones of mask, in order -> (b, len(mask), 4, s, s)."""
    cond, real = make_masks(mask, len(mask), F)
    frames = given.new_zeros(len(given), F, *given.shape[2:])
    frames[:, torch.from_numpy(cond)] = given
    return make(frames, cond, real)[:, :len(mask)]


def extend(make, clip, keep, length, F, backward=False):
    """Window after window: the last (backward: first) `keep` frames are given, until there are `length`."""
    while clip.shape[1] < length:
        kept = min(keep, clip.shape[1])
        new = min(F - kept, length - clip.shape[1])
        if backward:
            made = window(make, clip[:, :kept], "0" * new + "1" * kept, F)[:, :new]
            clip = torch.cat([made, clip], 1)
        else:
            made = window(make, clip[:, -kept:], "1" * kept + "0" * new, F)[:, kept:]
            clip = torch.cat([clip, made], 1)
    return clip


def generate(make, given, args, F):
    """From text, from a reference frame, or --mask: any pattern."""
    mask = args.mask or ("1" if args.image else "0") + "0" * ((args.frames or F) - 1)
    ones, m = [i for i, x in enumerate(mask) if x == "1"], given.shape[1]
    if len(mask) > F:
        raise DataError(f"--mask {mask}: {len(mask)} places, this model makes {F} frames; use fewer")
    if m == 1:
        pick = [0] * len(ones)                                     # one picture goes to every 1
    elif m == len(ones):
        pick = list(range(m))                                      # as many as there are ones: in order
    elif ones and m > max(ones):
        pick = ones                                                # a whole sticker: its own frames
    else:
        raise DataError(f"--mask {mask}: wants 1 picture, {len(ones)} given frames or a sticker of "
                        f"{len(mask)}, --input has {m}")
    clip = window(make, given[:, pick], mask, F)
    if args.length:
        if args.length <= len(mask):
            raise DataError(f"--length {args.length}: one clip has {len(mask)} frames; use --frames")
        clip = extend(make, clip, F // 2, args.length, F)
    return clip, dict(zip(ones, pick))


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
    clip, first = extend(make, given, keep, length, F, args.backward), (length - m) * args.backward
    return clip, {first + i: i for i in range(m)}


def interpolate(make, given, args, F):
    """factor - 1 new frames between every neighbouring pair; neighbouring windows share one keyframe."""
    f, m = args.factor or 2, given.shape[1]
    if m < 2:
        raise DataError("--mode interpolate: --input is one still picture; give several or a moving sticker, "
                        "or make it move with --image")
    if f >= F:
        raise DataError(f"--factor {f}: this model makes {F} frames at a time")
    most = (m - 1) * f + 1
    length = args.length or most
    if not 2 <= length <= min(most, MAX_FRAMES):
        raise DataError(f"--length {length}: {m} keyframes at --factor {f} make 2 to {min(most, MAX_FRAMES)} "
                        f"frames; choose such a length, or fewer keyframes with --every")
    clip, per = given[:, :1], (F - 1) // f                                  # pairs per window
    for first in range(0, math.ceil((length - 1) / f), per):
        keys = given[:, first:first + per + 1]
        mask = "1" + ("0" * (f - 1) + "1") * (keys.shape[1] - 1)
        clip = torch.cat([clip, window(make, keys, mask, F)[:, 1:]], 1)
    return clip[:, :length], {i: i // f for i in range(0, length, f)}


def loop(make, given, args, F):
    """The first frame is given again as the last one, which is left out: the file's own loop closes there."""
    n = args.frames or F - 1
    if not 2 <= n < F:
        raise DataError(f"--frames {n} with --mode loop: choose 2 to {F - 1}")
    return window(make, given[:, [0, 0]], "1" + "0" * (n - 1) + "1", F)[:, :n], {0: 0}


MODES = {"generate": generate, "predict": predict, "interpolate": interpolate, "loop": loop}

# ------------------------------------------------------------------------------------------------------------
# Flags in, files out


def load_given(args, size):
    """--image / --input / a built-in sticker -> ((m, size, size, 4) straight RGBA, m durations in ms)."""
    paths, every = [args.image] if args.image else args.input, args.every or 1
    if not paths and args.mode == "generate":
        return np.zeros((0, size, size, 4), np.uint8), []
    first_only = args.image or args.mode == "loop" or len(paths) > 1
    if not paths:
        paths, every, args.text = [BUILT_IN[0]], args.every or 2, args.text or BUILT_IN[1]
        which = "its first frame" if first_only else f"frames 1, {1 + every}, {1 + 2 * every}, .."
        print(f"no --input: taking the built-in sticker {BUILT_IN[0].name} ({BUILT_IN[1]}), {which}")
    frames, times = [], []
    for path in paths:
        clip, durations = read_sticker(path)
        if first_only:
            clip, durations = clip[:1], [round(sum(durations) / len(durations))]
        if clip.shape[1:3] != (size, size):
            print(f"{path}: {clip.shape[2]}x{clip.shape[1]} pixels, fitted to {size}x{size}", file=sys.stderr)
            clip = fit_straight(clip, size)
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
    found = max(Path("runs").glob("*/last.pt"), key=lambda p: p.stat().st_mtime, default=SHIPPED)
    if not found.exists():
        raise DataError("no checkpoint: train one with `python train.py`, or name one with --ckpt")
    return str(found)


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    a, count, scale = p.add_argument, number(int, 0), number(float, -100, 100)
    a("--ckpt", default="", help="checkpoint; default: the newest of runs/, else the shipped one")
    a("--lora", default="", metavar="FILE", help="what train.py --lora learnt on top of --ckpt, exported")
    a("--mode", choices=list(MODES),
      help="default: generate with --mask, --image or --text alone, else interpolate (a built-in sticker)")
    a("--text", default="", help="caption; empty = none")
    a("--negative", default="", help="caption to steer away from (takes the place of 'no text' in guidance)")
    a("--image", default="", help="reference frame: a picture, or the first frame of a sticker")
    a("--input", nargs="+", action="extend", default=[], metavar="FILE",
      help="a sticker, or several pictures in order")
    a("--every", type=count, default=0,
      help="use every N-th frame of --input only; 0 = all (of the built-in sticker: every second)")
    a("--given", type=count, default=0,
      help="predict: the last (--backward: first) frames of --input that are looked at; 0 = half a clip")
    a("--backward", action="store_true", help="predict: make the frames before --input instead of after")
    a("--factor", type=int, choices=[2, 3], help="interpolate: time steps per keyframe; default 2")
    a("--mask", default="", help="any pattern such as 10010010: 1 = given, 0 = made")
    a("--frames", type=count, default=0, help="frames of one clip (loop: of the file), 0 = all the model has")
    a("--length", type=number(int, 0, MAX_FRAMES), default=0,
      help="frames of the whole sticker, window after window; 0 = one window (interpolate: all keyframes)")
    a("--seeds", default="0", help="one sticker per seed: 0-7, 3 or 1,5,9; default %(default)s")
    a("--batch-size", type=count, default=0, help="stickers at a time; 0 = 1 on CPUs, 8 on GPUs")
    a("--sampler", choices=SAMPLERS,
      help="ddim (the paper's), dpm = DPM-Solver++(2M), for few steps; default: the checkpoint's")
    a("--steps", type=number(int, 1, 1000), help="denoising steps; default: the checkpoint's (ddim: 50)")
    a("--eta", type=number(float, 0, 1), help="ddim: 0 = deterministic, 1 = the paper and the default")
    a("--text-scale", type=scale, help="guidance by the caption, 1 = none; default: the checkpoint's, "
      "less 1 for each given frame, 1 at least (not with preset paper)")
    a("--image-scale", type=scale,
      help="guidance by the given frames, 1 = none; default: the checkpoint's; not for tiny and base, which "
           "diffuse the difference to them")
    a("--temperature", type=number(float, 0, 2),
      help="of the noise: below 1 calmer and cleaner, above livelier; default: the checkpoint's")
    a("--out", default="",
      help=f"file, suffix {' '.join(LEVELS)} (.png: frames side by side), or - for stdout; several seeds: "
           "NAME-SEED; default: sticker.webp, with --for its suffix")
    a("--for", dest="platform", default="", choices=list(PLATFORMS), help="all limits of this platform hold")
    a("--duration", type=number(int, 0), default=0,
      help=f"ms per frame; 0 = the input's mean (interpolate: its whole duration is kept), else {DURATION}")
    a("--size", type=number(int, 0, 4096), default=0, help="edge of the file in pixels, 0 = the model's")
    a("--max-kb", type=count, default=0, help="largest file, kB, 0 = no limit; see --for")
    a("--device", default="auto", help="auto (default), cpu, cuda or mps")
    a("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 where it is fast")
    return p


def check(a):
    """Each wrong combination says what to add or remove. Needs no model; settles the mode."""
    a.out = wanted_path(a.out, a.platform, "sticker")
    a.mode = a.mode or ("generate" if a.mask or a.image or a.text and not a.input else "interpolate")
    only = {"given": "predict", "backward": "predict", "factor": "interpolate"}
    for bad, message in [
        (a.image and a.input, "--image and --input: remove one"),
        (a.mask and a.mode != "generate", f"--mask with --mode {a.mode}: remove one"),
        (not set(a.mask) <= {"0", "1"} or a.mask and len(set(a.mask)) < 2,
         f"--mask {a.mask}: write zeros and ones, at least one of each, such as 10010010"),
        ("1" in a.mask and not (a.image or a.input), f"--mask {a.mask}: add --input or --image"),
        (a.mask and a.frames, "--frames with --mask: remove --frames, the mask says how many"),
        (a.mode in ("predict", "interpolate") and a.image, f"--image with --mode {a.mode}: use --input"),
        (a.mode == "generate" and a.input and not a.mask, "--input with --mode generate: use --image for a "
         "reference frame, --mask to say which frames are given, or another --mode"),
        (a.mode == "generate" and not (a.text or a.image or a.mask),
         "--mode generate: nothing to go by; add --text \"...\", --image FILE or --mask"),
        *((getattr(a, name) and a.mode != mode, f"--{name}: only with --mode {mode}; remove it")
          for name, mode in only.items()),
        (a.every and (a.image or a.mode == "loop" or a.mode == "generate" and not a.input),
         "--every: only where several frames of --input are used; remove it"),
        (a.mode == "loop" and len(a.input) > 1, "--mode loop: takes one --input; remove the others"),
        (a.length and a.mode == "loop", "--length with --mode loop: remove it, or use --frames"),
        (a.length and a.frames, "--length and --frames: remove one"),
        (a.frames and a.mode == "interpolate", "--frames with --mode interpolate: use --length"),
        (a.frames == 1 and a.mode == "predict", "--frames 1 with --mode predict: there is nothing to make"),
        (a.duration and a.duration < 10, f"--duration {a.duration}: at least 10 ms"),
        (a.platform and (a.size or a.max_kb), "--size or --max-kb with --for: remove it, --for says both"),
        (a.platform and a.frames == 1, "--frames 1 with --for: a moving sticker has 2 frames or more"),
    ]:
        if bad:
            raise DataError(message)


def settle(args, cfg):
    """What needs the checkpoint's configuration: sampler, steps, scales."""
    if args.frames > cfg.frames:
        raise DataError(f"--frames {args.frames}: this model makes 1 to {cfg.frames}; for more use --length")
    if cfg.residual and args.image_scale not in (None, 1):
        raise DataError(f"--image-scale {args.image_scale:g}: this checkpoint diffuses the difference to the "
                        f"given frames and has no guidance by them; leave it out")
    if args.negative and (cfg.text_scale if args.text_scale is None else args.text_scale) in (0, 1):
        raise DataError("--negative: needs a --text-scale other than 0 and 1")
    if len(args.text.encode(errors="replace")) > cfg.text_bytes and not cfg.text_dims:
        print(f"--text: only its first {cfg.text_bytes} bytes are read", file=sys.stderr)
    args.sampler = args.sampler or cfg.sampler
    args.steps = args.steps or (cfg.steps if args.sampler == cfg.sampler else SAMPLERS[args.sampler])
    if args.eta is not None and args.sampler != "ddim":
        raise DataError(f"--eta with --sampler {args.sampler}: remove it")


def run(args, command):
    """Everything that can be refused is refused before the first step."""
    check(args)
    seeds, out = parse_seeds(args.seeds), Path(args.out)
    sheet, several = out.with_name(f"{out.stem}-sheet.png"), len(seeds) > 1
    paths = {s: out.with_name(f"{out.stem}-{s}{out.suffix}") if several else out for s in seeds}
    if args.out == "-" and several:
        raise DataError(f"--out - with --seeds {args.seeds}: stdout takes one sticker; name a file")
    for path in (*paths.values(), *[sheet, sheet.with_suffix(".webp")] * several):
        if path.resolve() in [Path(x).resolve() for x in (args.image, *args.input) if x]:
            raise DataError(f"--out {args.out}: {path} is the input; choose another")
    out.parent.mkdir(parents=True, exist_ok=True)
    device = find_device(args.device)
    if args.lora and not args.ckpt:
        raise DataError(f"--lora {args.lora}: name with --ckpt the checkpoint it was trained on")
    if not args.ckpt:
        args.ckpt = default_checkpoint()                           # "the newest run" will be another one soon
        command += f" --ckpt {shlex.quote(args.ckpt)}"
    loaded = load_model(args.ckpt, device)
    if args.lora:
        load_lora(args.lora, loaded)
    cfg, F = loaded.cfg, loaded.cfg.frames
    settle(args, cfg)
    straight, times = load_given(args, cfg.size)
    given = torch.from_numpy(premultiply(straight)).permute(0, 3, 1, 2).float() / 255     # m 4 size size
    mode, windows = MODES[args.mode], []

    def count(frames, cond, real):
        windows.append(cond)
        return frames

    mode(count, given[None], args, F)                              # a rehearsal: counts windows, and checks
    batch = args.batch_size or (1 if device.type == "cpu" else 8)         # on a CPU a batch saves no time
    groups = [seeds[i:i + batch] for i in range(0, len(seeds), batch)]
    print(f"{args.ckpt} (update {loaded.meta['step']}): {args.mode}, {len(seeds)} sticker(s), "
          f"{args.sampler} {args.steps} steps, {device.type}")
    bar = tqdm(total=len(groups) * len(windows) * args.steps, unit="step", desc="sampling", disable=None)
    clips, failed = {}, {}
    for group in groups:
        gens = [torch.Generator().manual_seed(s) for s in group]   # one serves all windows of a sticker

        def make(frames, cond, real):
            cond, real = (np.repeat(m[None], len(frames), 0) for m in (cond, real))
            return sample_clips(loaded, [args.text] * len(frames), frames, cond, real, steps=args.steps,
                                sampler=args.sampler, eta=1.0 if args.eta is None else args.eta,
                                text_scale=args.text_scale, image_scale=args.image_scale, seeds=gens,
                                temperature=args.temperature, negative=args.negative,
                                progress=lambda i, x: bar.update(1),
                                bf16={"auto": None, "bf16": True, "fp32": False}[args.precision]).cpu()

        made, source = mode(make, given.expand(len(group), *given.shape), args, F)
        for seed, clip in zip(group, made):
            frames = to_straight(clip)
            for i, j in source.items():                            # unpremultiplying would round soft alpha
                frames[i] = straight[j]
            ms = frame_times(args, times, len(frames))
            try:
                info = write_sticker(paths[seed], frames, ms, max_kb=args.max_kb, size=args.size,
                                     platform=args.platform,
                                     metadata={"command": f"{command} --seeds {seed}", **loaded.meta})
                bar.write(told(info))
                clips[seed] = frames
            except DataError as error:                             # too large: must not cost the others
                failed[seed] = error
    bar.close()
    if several and clips:
        shown = list(clips.values())
        save_sheet(sheet, shown, [f"seed {s}" for s in clips])
        wide = max(4, math.ceil(len(shown) / (16_383 // (cfg.size + 2))))           # WebP is no higher
        save_sheet(sheet.with_suffix(".webp"), [shown[i:i + wide] for i in range(0, len(shown), wide)])
        print(f"{sheet}, {sheet.with_suffix('.webp').name}: {len(shown)} stickers")
    if failed:
        more = f" (and {len(failed) - 1} more of the {len(seeds)} stickers)" * (len(failed) > 1)
        raise DataError(f"{next(iter(failed.values()))}{more}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr if args.out == "-" else sys.stdout):
        status = one_line("sample.py", lambda: run(args, shlex.join(["python", "sample.py", *argv])))
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
