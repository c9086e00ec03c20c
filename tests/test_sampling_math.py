"""Diffusion: schedule, samplers and guidance, against oracles, analytic targets and diffusers."""

import math

import numpy as np
import pytest
import torch

from rdtf import (RDTF, Config, alphas_cumprod, blend, guidance_weights, guided_eps, q_sample,
                  sample, timestep_embedding, timesteps)

SMALL = dict(widths=(32, 32), layers=1, head_dim=16, context_dim=32, text_layers=1, latent_channels=4)


def test_schedule_is_the_scaled_linear_one():
    a = alphas_cumprod()
    assert a.dtype == torch.float32 and a.shape == (1000,)
    assert a[0].item() == pytest.approx(1 - 0.00085, abs=1e-6)
    assert a[-1].item() == pytest.approx(0.0046602, rel=1e-3)
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.allclose(a, peer.alphas_cumprod, rtol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 2, 50, 100, 1000])
def test_ddim_equals_diffusers_where_n_divides_1000(n, eta):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                   clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    peer.set_timesteps(n)
    assert peer.timesteps.tolist() == timesteps(n)
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(1, 8, 4, 4, 4, generator=gen)
    noises = [torch.randn(x.shape, generator=gen) for _ in range(n)]

    def eps(x, t):
        return torch.tanh(x) * 0.9

    ours = sample(eps, x, n, "ddim", eta, noise=iter(noises).__next__)
    theirs, k = x, iter(noises)
    for t in peer.timesteps:
        z = next(k) if eta else None
        theirs = peer.step(eps(theirs, t), t, theirs, eta=eta, variance_noise=z).prev_sample
    # the last step has variance 0, so that its noise is not drawn by ours and is multiplied by 0 there
    assert torch.allclose(ours, theirs, atol=2e-3, rtol=1e-3)


def test_guidance_weights_leave_out_what_cannot_matter():
    assert guidance_weights(7.5, 7.5, True, True) == {(0, 0): -6.5, (1, 1): 7.5}
    assert guidance_weights(3.0, 2.0, True, True) == {(0, 0): -1.0, (0, 1): -1.0, (1, 1): 3.0}
    assert guidance_weights(1.0, 1.0, True, True) == {(1, 1): 1.0}        # scale 1: conditional, one pass
    assert guidance_weights(0.0, 0.0, True, True) == {(0, 0): 1.0}        # scale 0: unconditional, one pass
    assert guidance_weights(0.0, 1.0, True, True) == {(0, 1): 1.0}
    assert guidance_weights(5.0, 9.0, True, False) == {(0, 0): -4.0, (1, 0): 5.0}
    assert guidance_weights(9.0, 5.0, False, True) == {(0, 0): -4.0, (0, 1): 5.0}
    assert guidance_weights(9.0, 5.0, False, False) == {(0, 0): 1.0}
    for scales in ((7.5, 7.5), (3.0, 2.0), (0.5, 0.2)):
        assert sum(guidance_weights(*scales, True, True).values()) == pytest.approx(1.0)


def model(prediction="eps", residual=False, pooled=False):
    torch.manual_seed(0)
    m = RDTF(Config(**SMALL, prediction=prediction, residual=residual, pooled_text=pooled)).eval()
    for p in m.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return m.requires_grad_(False)


@pytest.mark.parametrize("prediction, residual, pooled",
                         [("eps", False, False), ("v", False, False), ("v", True, False), ("v", True, True)])
@pytest.mark.parametrize("scales", [(3.0, 2.0), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)])
def test_cached_guidance_equals_three_plain_calls(scales, prediction, residual, pooled):
    m = model(prediction, residual, pooled)
    gen = torch.Generator().manual_seed(5)
    x, cond = torch.randn(2, 8, 4, 8, 8, generator=gen), torch.randn(2, 8, 4, 8, 8, generator=gen)
    given = torch.zeros(2, 8, dtype=torch.bool)
    given[:, ::2] = True
    text, none = m.text.tokenize(["a red star", "a cat"]), m.text.tokenize(["", ""])
    t = torch.tensor([400, 900])

    def plain(tok, mask):
        a = m.abar[t].view(-1, 1, 1, 1, 1)
        y = x - a.sqrt() * blend(cond, mask) if residual else x
        out = m.net(y, t, cond, m.text(tok), mask)
        return out if prediction == "eps" else a.sqrt() * out + (1 - a).sqrt() * y

    e00, e0i, eti = plain(none, given & False), plain(none, given), plain(text, given)
    st, si = scales
    expected = e00 + si * (e0i - e00) + st * (eti - e0i)
    got = guided_eps(m, text, none, cond, given, None, st, si)(x, t)
    assert torch.allclose(got, expected, atol=1e-4)
    assert got.shape[2] == 4 and not torch.allclose(got[:, :, 3], e00[:, :, 3]) or scales == (0.0, 0.0)


def test_given_frames_enter_noised_and_negative_text_replaces_no_text():
    m = model()
    gen = torch.Generator().manual_seed(6)
    x, cond, noise = (torch.randn(1, 8, 4, 8, 8, generator=gen) for _ in range(3))
    given = torch.zeros(1, 8, dtype=torch.bool)
    given[:, 0] = True
    text, none, bad = (m.text.tokenize([c]) for c in ("a star", "", "blurry"))
    t = torch.tensor([300])
    a = guided_eps(m, text, none, cond, given, None, 1.0, 1.0, noise=noise)(x, t)
    x2 = x.clone()
    x2[:, 0] = 77.0                                   # what x holds at given frames is not looked at
    assert torch.equal(a, guided_eps(m, text, none, cond, given, None, 1.0, 1.0, noise=noise)(x2, t))
    assert not torch.allclose(guided_eps(m, text, bad, cond, given, None, 3.0, 1.0)(x, t),
                              guided_eps(m, text, none, cond, given, None, 3.0, 1.0)(x, t))
    r = guided_eps(m, text, none, cond, given, None, 6.0, 1.0, rescale=1.0)(x, t)
    full = guided_eps(m, text, none, cond, given, None, 1.0, 1.0)(x, t)
    assert r.std((1, 2, 3, 4)).item() == pytest.approx(full.std((1, 2, 3, 4)).item(), rel=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_v_and_eps_losses_agree_on_a_perfect_network(residual):
    """For the true v, the loss is 0 and the noise that sampling reads off it is the true noise."""
    m = model("v", residual)
    x0, noise = torch.randn(2, 8, 4, 8, 8), torch.randn(2, 8, 4, 8, 8)
    t = torch.tensor([10, 990])
    a = m.abar[t].view(-1, 1, 1, 1, 1)
    given = torch.zeros(2, 8, dtype=torch.bool)
    given[0, [1, 4]] = True
    v = a.sqrt() * noise - (1 - a).sqrt() * (x0 - blend(x0, given) * residual)
    m.net.forward = lambda x, t, *rest, **kw: v
    tok = m.text.tokenize(["", ""])
    assert m(x0, noise, t, tok, given).abs().max() == 0
    eps = guided_eps(m, tok, tok, x0, given, None, 1.0, 1.0, has_text=False)
    eps = eps(q_sample(x0, noise, t, m.abar), t)
    assert torch.allclose(eps, noise, atol=1e-4)


def test_a_network_that_knows_nothing_makes_the_blend_of_the_given_frames():
    """residual: at the start, before any training, interpolation is the blend and prediction the copy."""
    m = model("v", residual=True)
    x0, noise = torch.randn(2, 8, 4, 8, 8), torch.randn(2, 8, 4, 8, 8)
    given = torch.zeros(2, 8, dtype=torch.bool)
    given[0, ::2] = given[1, :4] = True

    def knows_nothing(x, t, **kw):                                  # no difference: x is noise, by its level
        a = m.abar[t].view(-1, 1, 1, 1, 1)
        return a.sqrt() / (1 - a).sqrt() * x
    m.net.forward = knows_nothing
    tok = m.text.tokenize(["", ""])
    eps = guided_eps(m, tok, tok, x0, given, None, 1.0, 1.0, has_text=False)
    assert torch.allclose(sample(eps, noise, 20, "dpm"), blend(x0, given), atol=1e-3)


def test_blend_is_numpy_interpolation_in_every_pattern():
    rng = np.random.default_rng(0)
    for _ in range(200):
        t = int(rng.integers(1, 9))
        given = rng.random((3, t)) < 0.4
        x = rng.standard_normal((3, t, 2, 2, 2))
        hidden = np.where(given[:, :, None, None, None], x, np.nan)         # others are never looked at
        y = blend(torch.from_numpy(hidden), torch.from_numpy(given)).reshape(3, t, 8)
        for i in range(3):
            at = np.flatnonzero(given[i])
            for j in range(8):
                want = np.interp(np.arange(t), at, x[i, at].reshape(-1, 8)[:, j]) if len(at) else np.zeros(t)
                assert np.allclose(y[i, :, j], want)


def test_the_loss_is_the_stated_sum_over_real_frames():
    m = model()
    x0, noise = torch.randn(3, 8, 4, 8, 8), torch.randn(3, 8, 4, 8, 8)
    t, tok = torch.tensor([5, 500, 950]), m.text.tokenize(["a", "b", ""])
    real = torch.arange(8)[None] < torch.tensor([8, 3, 1])[:, None]
    given = real & (torch.arange(8)[None] == 0)
    losses = m(x0, noise, t, tok, given, real)
    eps = m.net(q_sample(x0, noise, t, m.abar), t, x0, m.text(tok), given, real)
    for i, n in enumerate((8, 3, 1)):
        expected = ((eps[i, :n] - noise[i, :n]) ** 2).sum() / (8 * 4 * 8 * 8)
        assert losses[i].item() == pytest.approx(expected.item(), rel=1e-5)
    x0[1, 3:] = math.nan                                                    # padding may hold anything
    noise[2, 1:] = math.inf
    assert torch.equal(m(x0, noise, t, tok, given, real), losses)


def test_fp32_where_bf16_would_lose():
    t = torch.arange(1000)
    with torch.autocast("cpu", torch.bfloat16):
        emb = timestep_embedding(t, 64)
        x = q_sample(torch.randn(4, 8, 4, 4, 4), torch.randn(4, 8, 4, 4, 4), t[:4], alphas_cumprod())
    assert emb.dtype == torch.float32 and x.dtype == torch.float32
    assert len(np.unique(emb.numpy(), axis=0)) == 1000
    assert len(torch.unique(t.bfloat16())) < 600                            # why the steps are never cast
    with pytest.raises(ValueError, match="steps=0"):
        timesteps(0)
    with pytest.raises(ValueError, match="euler"):
        sample(None, torch.zeros(1), sampler="euler")
