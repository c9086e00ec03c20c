"""Trains the autoencoder, which turns pictures of stickers into latents and back. One process.

    python stickers/vae.py --data cache/fluent:0.6 cache/characters:0.4 --steps 6600 --out runs/vae
    python train.py --vae runs/vae/vae.pt --data cache/fluent cache/characters

It leaves OUT/vae.pt, in half precision. OUT/training.pt is what the same command goes on from where it was
stopped, also after kill -9. Every draw is a pure function of the seed and the sample or update.
"""
import argparse
import copy
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError, number, one_line, processes  # noqa: E402
from rdtf import FORMAT, PRESETS, AutoencoderKL, Config  # noqa: E402
from train import (  # noqa: E402
    STOP, Context, learning_rate, load_checkpoint, make_optimizers, open_data, restore, save_checkpoint,
    state_of, stop_on_signals, update_weights, watch, write_line)


def picture_loss(y, x):
    """L1 + squared error + L1 of the gradients at three scales, of premultiplied RGBA and of RGB on white.
    (Ours.) A sticker is always seen on some background: black is premultiplied RGB itself, white the other
    extreme. y, x: (n, 4, h, w) -> (n,)."""
    e = torch.cat([y - x, (y[:, :3] - y[:, 3:]) - (x[:, :3] - x[:, 3:])], 1)
    loss = (e.abs() + 4 * e ** 2).flatten(1).mean(1)
    for _ in range(3):
        across, down = e[..., 1:] - e[..., :-1], e[..., 1:, :] - e[..., :-1, :]
        loss = loss + 0.5 * (across.abs().flatten(1).mean(1) + down.abs().flatten(1).mean(1))
        e = F.avg_pool2d(e, 2)
    return loss


def transform(z, x, f, choice, share):
    """The same change of raw latents z and pictures x, f pixels per latent (EQ-VAE, arXiv 2502.09509).
    choice 0..5: upside down, mirrored, two quarter turns, smaller (share in [0, 1]: 0.6 to 1), moved by half
    a latent. What decodes right after it has a spatial order that convolutions can use."""
    if choice < 2:
        return z.flip(choice - 2), x.flip(choice - 2)
    if choice < 4:
        return z.rot90(2 * choice - 5, (2, 3)), x.rot90(2 * choice - 5, (2, 3))
    if choice == 4:
        edge = max(2, round(z.shape[-1] * (0.6 + 0.4 * share)))
        resize = dict(mode="bilinear", antialias=True)                      # no backward on Apple's GPU
        smaller = F.interpolate(z.cpu() if z.is_mps else z, edge, **resize)
        return smaller.to(z.device), F.interpolate(x, f * edge, **resize)
    return (z + z.roll(1, 3)) / 2, x.roll(f // 2, 3)


def vae_losses(vae, x, noise, kl_weight, choice, share, finish):
    """Pictures (n, 4, h, w) -> losses (n,) of one update (ours).
    noise (n, c, h/f, w/f) serves twice: the posterior's sample, and extra noise of up to 0.3 standard
    deviations, since a network's latents are never exact. The first half of the batch, which has the weaker
    half of that noise, is compared after a `transform`. finish = True trains the decoder alone, on clean
    latents: the last part of a run."""
    if finish:
        with torch.no_grad():
            mean = vae.moments(x)[0]
        return picture_loss(vae.decode_raw(mean), x)
    mean, logvar = vae.moments(x)
    strength = torch.linspace(0, 1, len(x)).to(x)[:, None, None, None]
    extra = 0.3 * mean.detach().std((0, 2, 3), keepdim=True) * strength
    z, half = mean + noise * (logvar.exp() + extra ** 2).sqrt(), len(x) // 2
    moved, wanted = transform(z[:half], x[:half], vae.f, choice, share)
    pairs = [(moved, wanted), (z[half:], x[half:])][half == 0:]
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar)
    losses = torch.cat([picture_loss(vae.decode_raw(a), b) for a, b in pairs])
    return losses + kl_weight * kl.flatten(1).mean(1)


def draw_pictures(stickers, order, samples, seed):
    """Sample numbers -> pictures (n, 4, size, size) premultiplied in [0, 1], mirrored half the time."""
    pictures = []
    for g in samples:
        frames, rng = stickers.frames(order[g]), np.random.default_rng([seed, 4, g])
        x = torch.from_numpy(np.array(frames[int(rng.integers(len(frames)))])).float() / 255
        pictures.append(x.flip(-1) if rng.random() < 0.5 else x)
    return torch.stack(pictures)


@stop_on_signals()
def train_vae(cfg, stickers, order, args, ctx):
    """-> the autoencoder with averaged weights and measured statistics, or None if it was stopped."""
    out, steps, batch = Path(args.out), args.steps, args.batch_size
    path, start, bad = out / "training.pt", 0, 0
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(cfg).to(ctx.device)
    average = copy.deepcopy(vae).eval()
    params, ema = (dict(m.named_parameters()) for m in (vae, average))
    optimizers = make_optimizers(vae, "muon", 0.01)                         # small: there is no attention
    if path.exists():
        start = restore(load_checkpoint(path, "vae", cfg), path, vae, average, optimizers)

    for step in tqdm(range(start, steps), "autoencoder", steps, initial=start, disable=None):
        rng = np.random.default_rng([args.seed, 5, step])
        choice, share, finish = int(rng.integers(6)), rng.random(), step >= 0.85 * steps
        x = draw_pictures(stickers, order, range(step * batch, (step + 1) * batch), args.seed).to(ctx.device)
        noise = np.random.default_rng([args.seed, 6, step]).standard_normal(
            (batch, *cfg.latent_shape[1:]), np.float32)
        with ctx.autocast():
            loss = vae_losses(vae, x, torch.from_numpy(noise).to(x), args.kl, choice, share, finish).mean()
        loss.backward()
        lr = learning_rate(step, args.lr, min(50, steps), "cosine", steps)
        norm = update_weights(optimizers, lr, params, ema, 0.999, step, 1.0)
        loss, stop, now = loss.item(), STOP["since"] > 0, step + 1
        bad = watch(loss, bad, now, path, args)
        if now % args.log_every == 0:
            write_line(out / "log.jsonl", {"step": now, "stage": "vae", "loss": loss, "lr": lr,
                                           "grad_norm": float(norm)})
        if (now % args.save_every == 0 or now == steps or stop) and not bad:
            save_checkpoint(path, {"format": FORMAT, "stage": "vae", "config": asdict(cfg),
                                   **state_of(now, vae, average, optimizers)})
        if stop:
            return None
    with torch.no_grad():
        pictures = draw_pictures(stickers, order, range(1024), args.seed).to(ctx.device)
        z = torch.cat([average.moments(x)[0] for x in pictures.split(64)])  # raw posterior means, n c h w
        average.mean.copy_(z.mean((0, 2, 3)))
        average.std.copy_(z.std((0, 2, 3)))
    return average


def parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"vae.py: {message}\n")
    a, some = p.add_argument, number(int, 1)
    a("--data", nargs="+", required=True, metavar="SET[:SHARE]", help="sets of pixels, as for train.py")
    a("--hold-out", type=number(float, 0, 0.5), default=0.05, help="as for train.py")
    a("--out", default="runs/vae", help="run folder")
    a("--preset", default="tiny", choices=list(PRESETS), help="what this autoencoder is for")
    a("--size", type=number(int, 8), help="edge of the pictures, pixels; None: the preset's")
    a("--latent-channels", type=some, help="channels of the latents; None: the preset's")
    a("--vae-patch", type=some, help="pixels folded at the entrance, half of f; None: the preset's")
    a("--steps", type=some, default=6600, help="updates")
    a("--batch-size", type=some, default=16, help="pictures per update")
    a("--lr", type=number(float, 0), default=0.02, help="peak learning rate (Muon)")
    a("--kl", type=number(float, 0), default=1e-4, help="weight of the KL term")
    a("--seed", type=number(int, 0), default=0, help="of weights and every draw")
    a("--device", default="auto", help="auto, cpu, cuda or mps")
    a("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 where it is fast")
    a("--save-every", type=some, default=200, help="updates between checkpoints")
    a("--log-every", type=some, default=10, help="updates between lines of log.jsonl")
    a("--patience", type=some, default=20, help="stop after this many non-finite losses in a row")
    return p


def run(args):
    own = {k: getattr(args, k) for k in ("size", "latent_channels", "vae_patch") if getattr(args, k)}
    if processes()[1] > 1:
        raise DataError("torchrun: the autoencoder trains in one process; start it with python")
    cfg, ctx, out = Config(**PRESETS[args.preset] | own), Context(args), Path(args.out)
    if cfg.vae_channels == 3:
        raise DataError(f"--preset {args.preset} uses Stable Diffusion's autoencoder: give that to train.py "
                        "with --vae, or train one here for --preset base")
    if cfg.size % cfg.f:
        raise DataError(f"--size {cfg.size}: must be a multiple of {cfg.f}, the pixels per latent")
    stickers, order, _ = open_data(args, cfg, fewest=1)
    if stickers.meta["kind"] == "latents":
        raise DataError(f"--data {args.data[0]}: holds latents; prepare it without --vae")
    out.mkdir(parents=True, exist_ok=True)
    vae = train_vae(cfg, stickers, order, args, ctx)
    if vae is None:
        return print(f"stopped; the same command goes on from {out}")
    state = {k: v.half().cpu() for k, v in vae.state_dict().items()}
    save_checkpoint(out / "vae.pt", {"format": FORMAT, "stage": "vae", "config": asdict(cfg), "vae": state})
    print(f"done: {out / 'vae.pt'}, {vae.fingerprint()}. Next: python train.py --vae {out / 'vae.pt'}")


def main(arguments=None):
    args = parser().parse_args(arguments)
    return one_line("vae.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
