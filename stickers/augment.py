"""More out of a prepared store of pixels: changed copies of a small set, or stills that fly (both ours).

    python stickers/augment.py cache/mine --out cache/mine_x8 --copies 8
    python stickers/augment.py cache/emoji --out cache/flying --copies 4 --fly
    python stickers/augment.py cache/mine --out cache/mine_z --copies 1 --vae runs/vae/vae.pt    # as latents

Held-out stickers are never changed.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import (  # noqa: E402
    SHARD, DataError, Decoded, Item, keep_keyframes, make_meta, make_store, number, one_line,
    open_store, pack, write_store)


def warp(frames, matrices):
    """uint8 premultiplied (m, 4, s, s), a (2, 3) affine matrix each, output -> input in [-1, 1] -> the same
    kind of frames. Outside is transparent."""
    x = torch.from_numpy(np.array(frames)).float()
    grid = F.affine_grid(torch.tensor(np.stack(matrices), dtype=torch.float32), list(x.shape),
                         align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    return torch.minimum(x.clamp(min=0), x[:, 3:]).round().byte().numpy()       # colour never above alpha


def vary(frames, rng):
    """A sticker's frames -> (one like it, does its caption still hold) (ours). All frames alike: up to 20
    degrees turned, 0.8 to 1.1 times as large, moved by up to a tenth, mirrored half the time, and half the
    time its colours turned about the grey axis. "Red arrow to the left" would then be wrong."""
    angle, scale, hue = np.deg2rad(rng.uniform(-20, 20)), rng.uniform(0.8, 1.1), rng.uniform(0, 2 * np.pi)
    dx, dy = rng.uniform(-0.2, 0.2, 2)                                      # of the half side
    mirror, recolour = rng.random(2) < 0.5
    c, s, sign = np.cos(angle) / scale, np.sin(angle) / scale, -1 if mirror else 1
    x = warp(frames, [np.array([[sign * c, sign * -s, dx], [s, c, dy]])] * len(frames))
    if recolour:                                                            # Rodrigues' formula
        axis = np.full(3, 3 ** -0.5)
        turn = np.cos(hue) * np.eye(3) + np.sin(hue) * np.cross(np.eye(3), axis)
        turn += (1 - np.cos(hue)) * np.outer(axis, axis)
        colour = np.einsum("ij,mjhw->mihw", turn, x[:, :3]).round()
        x = np.concatenate([colour.clip(0, x[:, 3:]).astype(np.uint8), x[:, 3:]], 1)
    return x, not (mirror or recolour)


def fly(picture, rng, most):
    """One frame (4, s, s) -> (most, 4, s, s): it moves by up to 0.35 of the edge, turns, grows and squashes,
    at even speed, faster and faster, there and back, or bouncing (ours). Correspondence between frames can
    be learnt from thousands of stills, where there are few animations."""
    u = np.linspace(0, 1, most)
    path = [u, u ** 2, np.sin(2 * np.pi * u) / 2, 4 * u * (1 - u)][rng.integers(4)]
    shift, spin = rng.uniform(-0.7, 0.7, 2), np.deg2rad(rng.uniform(-60, 60)) * (rng.random() < 0.5)
    grow = np.log(rng.uniform(0.7, 1.2)) * (rng.random() < 0.5)
    squash = rng.uniform(-0.2, 0.2) * (rng.random() < 0.5)
    base, start = rng.uniform(0.55, 0.9), rng.uniform(-0.15, 0.15, 2) - shift * rng.uniform(0.2, 0.6)
    matrices = []
    for p in path:
        c, s, size = np.cos(spin * p), np.sin(spin * p), base * np.exp(grow * p)
        inverse = np.array([[c, s], [-s, c]]) / (size * np.array([[1 + squash * p], [1 - squash * p]]))
        matrices.append(np.concatenate([inverse, -inverse @ (start + shift * p)[:, None]], 1))
    return warp(np.repeat(picture[None], most, 0), matrices)


def augment(stickers, out, copies, vae=None, flying=False, seed=0):
    """Every training sticker `copies` times, as it is and then changed by `vary`, without its caption where
    that no longer holds; held-out ones once. flying: `copies` flights of its first frame instead, half of
    them over another sticker's. -> the opened store."""
    if stickers.meta["kind"] != "pixels":
        raise DataError("augment: the store holds latents, it takes pixels; prepare it again without --vae")
    size, most, per = stickers.size, stickers.meta["frames"], max(1, SHARD // copies)
    train = stickers.select("train")
    items = train if flying else np.arange(len(stickers))
    if not len(items):
        raise DataError("augment: every sticker of the store is held out; there is none to fly")

    def change(i, copy):
        rng, whole = np.random.default_rng((seed, i, copy, flying)), stickers.frames(i)
        name, caption, tags = stickers.texts(i)
        entry, name = stickers.index[i], f"{name}#{copy}" if copy else name
        if flying:
            new = fly(np.asarray(whole[0]), rng, most)
            if rng.random() < 0.5:                                          # over a slower one: occlusion
                under = fly(np.asarray(stickers.frames(int(rng.choice(train)))[0]), rng, most)
                new, caption, tags = new + (under * (1 - new[:, 3:] / 255)).round().astype(np.uint8), "", ()
            keys = keep_keyframes(new.transpose(0, 2, 3, 1), 0, most)
            return Item("", name, caption, tuple(tags)), keys._replace(duration=125 * most)
        new, holds = vary(whole, rng) if copy else (np.asarray(whole), True)
        item = Item("", name, caption if holds else "", tuple(tags) if holds else (), int(entry["split"]))
        return item, Decoded(new, entry["keys"], int(entry["duration"]))

    def make(shard, seen):
        rows = [change(int(i), copy) for i in items[shard * per:(shard + 1) * per]
                for copy in range(1 if stickers.index[i]["split"] else copies)]
        return *pack(rows, size, most, vae), []

    meta = make_meta(size, most, vae)
    return write_store(out, meta, repr((meta, stickers.meta["fingerprint"], copies, flying, seed)),
                       math.ceil(len(items) / per), make)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store", help="prepared store of pixels")
    parser.add_argument("--out", required=True, help="the new store")
    parser.add_argument("--vae", default="", help="VAE checkpoint: store its latents; empty: store pixels")
    parser.add_argument("--device", default="cpu", help="where the VAE runs: cpu, cuda or mps")
    parser.add_argument("--copies", type=number(int, 1, 1000), default=8,
                        help="how often each sticker is in it, itself included")
    parser.add_argument("--fly", action="store_true", help="fly the first frame, half of them over another's")
    args = parser.parse_args(arguments)

    def work():
        if Path(args.store).resolve() == Path(args.out).resolve():
            raise DataError(f"--out {args.out}: is the store itself; choose another")
        make_store(args, lambda vae: augment(open_store(args.store), args.out, args.copies, vae, args.fly))
    return one_line("augment.py", work)


if __name__ == "__main__":
    sys.exit(main())
