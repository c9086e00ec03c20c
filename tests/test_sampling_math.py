"""Diffusion: schedule, targets, guessed frames, loss, one-step mean and guidance, against slow loops."""

import math

import numpy as np
import pytest
import torch

import rdtf
from rdtf import (RDTF, Config, alphas_cumprod, blend, bridge, denoiser, guess_frames, guidance_weights,
                  q_sample, sample, target, timestep_embedding, to_y0)

SMALL = dict(widths=(32, 32), layers=1, head_dim=16, context_dim=32, text_layers=1)
OURS = dict(size=32, narrow=True, prediction="v", zero_snr=True, residual=True, inputs=True, clean=True,
            pooled_text=True, film=True, draft=True, bypass=True)
VARIANTS = {"paper": {}, "v": dict(prediction="v"), "clean": dict(prediction="v", clean=True), "ours": OURS}
SHAPE = (3, 8, 4, 8, 8)


def model(variant):
    torch.manual_seed(0)
    m = RDTF(Config(**SMALL, **VARIANTS[variant])).eval()
    for p in m.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return m.requires_grad_(False)


def clips(seed=5):
    """-> x0, noise, cond_mask, frame_mask of three clips: every second frame given, one of five, none."""
    gen = torch.Generator().manual_seed(seed)
    real = torch.arange(8)[None] < torch.tensor([8, 5, 3])[:, None]
    given = torch.zeros(3, 8, dtype=torch.bool)
    given[0, ::2] = given[1, 1] = True
    return torch.randn(SHAPE, generator=gen), torch.randn(SHAPE, generator=gen), given, real


def wide(mask):
    return mask[:, :, None, None, None]


def test_schedule_is_the_scaled_linear_one():
    a = alphas_cumprod()
    assert a.dtype == torch.float32 and a.shape == (1000,)
    assert a[0].item() == pytest.approx(1 - 0.00085, abs=1e-6)
    assert a[-1].item() == pytest.approx(0.0046602, rel=1e-3)
    zero = alphas_cumprod(zero_snr=True)
    assert zero[-1] == 0 and zero[0] == a[0] and (zero[1:] < a[1:]).all()
    diffusers = pytest.importorskip("diffusers")
    for ours, rescaled in ((a, False), (zero, True)):
        peer = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       rescale_betas_zero_snr=rescaled)
        assert torch.allclose(ours, peer.alphas_cumprod, rtol=2e-5, atol=1e-6 if rescaled else 1e-8)
    with pytest.raises(ValueError, match="prediction v"):
        Config(zero_snr=True)


def test_fp32_where_bf16_would_lose():
    t = torch.arange(1000)
    with torch.autocast("cpu", torch.bfloat16):
        emb = timestep_embedding(t, 64)
        y = q_sample(torch.randn(SHAPE), torch.randn(SHAPE), alphas_cumprod()[:3].view(-1, 1, 1, 1, 1))
    assert emb.dtype == y.dtype == torch.float32 and len(torch.unique(emb, dim=0)) == 1000
    assert len(torch.unique(t.bfloat16())) < 600                            # why the steps are never cast


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_to_y0_undoes_target(prediction):
    y0, noise, _, _ = clips()
    for t in (0, 300, 999):
        a = alphas_cumprod()[[t]].double().view(-1, 1, 1, 1, 1)
        out = target(y0.double(), noise, a, prediction)
        assert torch.allclose(to_y0(out, a.sqrt() * y0 + (1 - a).sqrt() * noise, a, prediction), y0.double())


# ------------------------------------------------------------------------------------------------------------
# What one would guess


def slow_bridge(x, given, n):
    """One value per frame (t,) -> what is expected of a loop of n frames, one frame at a time."""
    at, out = np.flatnonzero(given), np.zeros(len(x))
    for i in range(n if len(at) else 0):
        before, after = min((i - k) % n for k in at), min((k - i) % n for k in at)
        u, v, mean = 8 * before / n, 8 * after / n, x[at].mean()
        a, b = x[(i - before) % n] - mean, x[(i + after) % n] - mean
        out[i] = x[i] if i in at else mean + (np.sinh(v) * a + np.sinh(u) * b) / np.sinh(u + v)
    return out


def test_bridge_blend_and_unit_are_slow_loops_in_every_pattern():
    rng = np.random.default_rng(0)
    for _ in range(200):
        t = int(rng.integers(1, 9))
        n = rng.integers(1, t + 1, (3, 1))
        real = np.arange(t) < n
        given = (rng.random((3, t)) < 0.4) & real
        x = rng.standard_normal((3, t, 2, 2, 2)) * rng.choice([0.01, 1.0], (3, 1, 1, 1, 1))
        hidden = torch.from_numpy(np.where(wide(given), x, np.nan))         # others are never looked at
        guess, unit = guess_frames(hidden, torch.from_numpy(given), torch.from_numpy(real))
        linear = blend(hidden, torch.from_numpy(given))
        for i in range(3):
            at = np.flatnonzero(given[i])
            for j, place in enumerate(np.ndindex(2, 2, 2)):
                values = x[i, at][(slice(None), *place)]
                want = np.interp(np.arange(t), at, values) if len(at) else np.zeros(t)
                assert np.allclose(linear.reshape(3, t, 8)[i, :, j], want)
                want = slow_bridge(x[i].reshape(t, 8)[:, j], given[i], n[i, 0])
                assert np.allclose(guess.reshape(3, t, 8)[i, :, j], want)
            jumps = [((x[i, b] - x[i, a]) ** 2).mean() for a, b in zip(at, at[1:])]
            want = math.sqrt(sum(jumps) / len(jumps) + 0.25 ** 2) if jumps else 0.8 if len(at) else 1.0
            assert unit[i].item() == pytest.approx(want)
        assert torch.equal(guess[torch.from_numpy(given)], torch.from_numpy(x[given]))   # bit for bit


def test_the_bridge_of_a_loop_turns_with_it():
    """Where the turn begins makes no difference; frames that agree, and one alone, are what is guessed."""
    x, given, real = torch.randn(1, 8, 4, 2, 2), torch.zeros(1, 8, dtype=torch.bool), torch.ones(1, 8) > 0
    given[0, [0, 1, 4]] = True
    whole = bridge(x, given, real)
    for k in range(8):
        assert torch.allclose(bridge(x.roll(k, 1), given.roll(k, 1), real), whole.roll(k, 1), atol=1e-6)
    assert torch.allclose(bridge(x[:, :1].expand_as(x), given, real), x[:, :1].expand_as(x), atol=1e-6)
    given[0, [1, 4]] = False
    assert torch.allclose(bridge(x, given, real), x[:, :1].expand_as(x), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_stated_sum_over_the_frames_that_count(variant):
    """... and whatever padding holds changes neither the loss nor a gradient."""
    m, (x0, noise, given, real) = model(variant).requires_grad_(True), clips()
    cfg, t, tok = m.cfg, torch.tensor([5, 500, 950]), m.text.tokenize(["a", "b", ""])
    losses = m(x0, noise, t, tok, given, real)                              # b 1, b 2 with a draft
    losses.sum().backward()
    grads = {k: p.grad.clone() for k, p in m.named_parameters()}
    for i, n in enumerate((8, 5, 3)):                                       # one clip at a time, by frames
        one = slice(i, i + 1)
        guess, unit = m.guess(x0[one], given[one], real[one])
        y0, a = (x0[one] - guess) / unit, m.abar[t[i]]
        y = a.sqrt() * y0 + (1 - a).sqrt() * noise[one]
        if cfg.clean:
            y[0, given[i]] = y0[0, given[i]]
        told = m.net.condition(x0[one], m.text(tok[one]), given[one], real[one])
        want, out = 0.0, m.net(y, t[one], condition=told)
        for f in range(n):
            if not (cfg.clean and given[i, f]):
                v = a.sqrt() * noise[i, f] - (1 - a).sqrt() * y0[0, f]
                want += ((out[0, f] - (noise[i, f] if cfg.prediction == "eps" else v)) ** 2).sum().item()
        drawn = [((told.draft - x0[one])[0, :n] ** 2).sum().item()] if cfg.draft else []
        assert losses[i].tolist() == pytest.approx([x / (8 * 4 * 8 * 8) for x in (want, *drawn)], rel=1e-4)
    m.zero_grad()
    x0[1, 5:], noise[2, 3:] = math.nan, math.inf                            # padding may hold anything
    again = m(x0, noise, t, tok, given, real)
    again.sum().backward()
    assert torch.equal(again, losses)
    assert all(torch.equal(p.grad, grads[k]) for k, p in m.named_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_perfect_network_has_no_loss_and_all_of_the_motion(variant):
    """An oracle that knows x_0: loss 0; the one-step mean is x_0 (EV 1), the sampler ends at x_0. One that
    says that nothing differs from the guess has EV 0 and samples the guess."""
    m, (x0, noise, given, real) = model(variant), clips()
    guess, unit = m.guess(x0, given, real)
    tok, knows = m.text.tokenize(["", "", ""]), [True]

    def oracle(y, t, *rest, **condition):
        a = m.abar[t].view(-1, 1, 1, 1, 1)
        y0 = ((x0 if knows[0] else guess) - guess) / unit
        return target(y0, (y - a.sqrt() * y0) / (1 - a).sqrt(), a, m.cfg.prediction)
    m.net.forward = oracle
    made = real & ~given
    assert m(x0, noise, torch.tensor([10, 500, 990]), tok, given, real)[:, 0].max() < 1e-8
    assert torch.allclose(m.mean(x0, noise, tok, given, real)[made], x0[made], atol=1e-3)
    for knows[0], wanted in ((True, x0), (False, guess + torch.zeros_like(x0))):
        mean = m.mean(x0, noise, tok, given, real)
        start = ((guess - x0) ** 2 * wide(made)).sum()
        ev = 1 - ((mean - x0) ** 2 * wide(made)).sum() / start
        assert ev.item() == pytest.approx(1.0 if knows[0] else 0.0, abs=1e-3)
        denoise, finish = denoiser(m, tok, tok, x0, given, real, 1.0, 1.0, noise, False)
        for sampler, eta in (("dpm", 0.0), ("ddim", 0.0)):
            y = finish(sample(denoise, noise, 10, sampler, eta))
            assert torch.allclose(y[made], wanted[made], atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mean_sees_nothing_of_the_truth(variant):
    m, (x0, noise, given, real) = model(variant), clips()
    tok, other = m.text.tokenize(["a", "b", ""]), torch.where(wide(given), x0, torch.randn_like(x0))
    made = real & ~given
    assert torch.equal(*(m.mean(x, noise, tok, given, real)[made] for x in (x0, other)))
    far = torch.where(wide(given), x0 + 1, x0)
    assert not torch.allclose(*(m.mean(x, noise, tok, given, real)[made] for x in (x0, far)), atol=1e-2)


# ------------------------------------------------------------------------------------------------------------
# Guidance


def test_guidance_weights_leave_out_what_cannot_matter():
    assert guidance_weights(7.5, 7.5, True, True) == {(0, 0): -6.5, (1, 1): 7.5}
    assert guidance_weights(3.0, 2.0, True, True) == {(0, 0): -1.0, (0, 1): -1.0, (1, 1): 3.0}
    assert guidance_weights(1.0, 1.0, True, True) == {(1, 1): 1.0}        # scale 1: conditional, one pass
    assert guidance_weights(0.0, 0.0, True, True) == {(0, 0): 1.0}        # scale 0: unconditional, one pass
    assert guidance_weights(0.0, 1.0, True, True) == {(0, 1): 1.0}
    assert guidance_weights(5.0, 9.0, True, False) == {(0, 0): -4.0, (1, 0): 5.0}
    assert guidance_weights(9.0, 5.0, False, True) == {(0, 0): -4.0, (0, 1): 5.0}
    assert guidance_weights(9.0, 5.0, False, False) == {(0, 0): 1.0}


@pytest.mark.parametrize("variant, scales", [
    *((v, s) for v in ("paper", "v") for s in ((3.0, 2.0), (1.0, 1.0), (0.0, 0.0))),
    ("clean", (3.0, 2.0)), ("ours", (3.0, 1.0)), ("ours", (0.0, 1.0))])
def test_guidance_equals_three_plain_calls(variant, scales):
    m, (x0, noise, given, real) = model(variant), clips()
    y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    text, none = m.text.tokenize(["a red star", "a cat", "a sun"]), m.text.tokenize(["dog"] * 3)
    t, (st, si) = torch.tensor([400, 900, 10]), scales
    guess, unit = m.guess(x0, given, real)
    entered, a = m.noised((x0 - guess) / unit, noise, t, given)             # as in training
    seen = torch.where(wide(given), entered, y)

    def plain(tok, mask):
        return to_y0(m.net(seen, t, x0, m.text(tok), mask, real), seen, a, m.cfg.prediction)
    e00, e0i, eti = plain(none, given & False), plain(none, given), plain(text, given)
    wanted = e00 + si * (e0i - e00) + st * (eti - e0i)
    hidden = torch.where(wide(given), x0, math.nan)                         # others are never looked at
    denoise, finish = denoiser(m, text, none, hidden, given, real, st, si, noise)
    got = denoise(y, t)
    assert torch.allclose(got, wanted, atol=1e-3)
    assert torch.equal(denoise(torch.where(wide(given), 77.0, y), t), got)  # y at given frames is replaced
    assert torch.allclose(finish(got), guess + unit * wanted, atol=1e-3)
    if st > 1:
        other = denoiser(m, text, m.text.tokenize([""] * 3), hidden, given, real, st, si, noise)[0]
        assert not torch.allclose(other(y, t), got, atol=1e-3)              # the negative text counts
    if m.cfg.residual:
        with pytest.raises(ValueError, match="image_scale=2"):
            denoiser(m, text, none, hidden, given, real, st, 2.0, noise)


class HalfVAE(torch.nn.Module):
    """Loses every second column of a picture."""
    def decode(self, z):
        return z.repeat_interleave(2, -1)


def test_what_the_autoencoder_loses_comes_back_where_a_made_frame_shows_the_same():
    gen = torch.Generator().manual_seed(0)
    frames = rdtf.premultiplied(torch.rand(1, 8, 4, 16, 16, generator=gen))
    frames[:, 1:] = frames[:, :1]                                           # a still ...
    frames[:, 6:, :, :, 8:] = 1 - frames[:, 6:, :, :, 8:]                   # ... that changes in one half
    given, real, z = torch.arange(8)[None] == 0, torch.ones(1, 8, dtype=torch.bool), frames[..., ::2]
    clip = rdtf.decode_clips(HalfVAE(), z, z, frames, given, real)
    plain = rdtf.premultiplied(HalfVAE().decode(z))
    assert torch.equal(clip[:, 0], frames[:, 0]) and not torch.allclose(plain[:, 1], frames[:, 1], atol=0.1)
    assert torch.allclose(clip[:, 1:6], frames[:, 1:6], atol=1e-6)          # all is back
    left = clip[:, 6:, :, :, :4]
    assert torch.allclose(left, frames[:, 6:, :, :, :4], atol=1e-6)         # here, too, out of reach of
    assert torch.allclose(clip[:, 6:, :, :, 12:], plain[:, 6:, :, :, 12:], atol=1e-3)       # what changed
    assert 0 <= clip.min() and (clip[:, :, :3] <= clip[:, :, 3:]).all()
    both = torch.cat([given, torch.zeros_like(given)])                      # nothing given, nothing known
    two = rdtf.decode_clips(HalfVAE(), *(x.repeat(2, 1, 1, 1, 1) for x in (z, z, frames)), both,
                            real.repeat(2, 1))
    assert torch.equal(two[:1], clip) and torch.equal(two[1:], plain)
    assert torch.equal(rdtf.decode_clips(HalfVAE(), z, z, frames, ~real, real), HalfVAE().decode(z))


def test_a_pose_that_comes_back_gets_its_own_details_not_those_of_the_nearest_given_frame():
    gen = torch.Generator().manual_seed(1)
    a, b = rdtf.premultiplied(torch.rand(2, 4, 16, 16, generator=gen)).unbind()
    frames, real = torch.stack([a, b, a, b, a, b, a, b])[None], torch.ones(1, 8, dtype=torch.bool)
    given, z = torch.arange(8)[None] < 2, frames[..., ::2]
    assert torch.allclose(rdtf.decode_clips(HalfVAE(), z, z, frames, given, real), frames, atol=1e-3)
