"""Samplers against an oracle that a wrong step list cannot satisfy, exact moments, and diffusers' schedulers.

diffusers' DDIM is right where its previous step, t - 1000 // n, is the next entry of its own list: for n that
divides 1000. test_sampling_math.py holds the schedule, the loss and guidance.
"""

import pytest
import torch

from rdtf import STEPS, alphas_cumprod, q_sample, sample, timesteps, to_y0

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                timestep_spacing="trailing")
ABAR = alphas_cumprod()


def abar(t):
    return ABAR[t].view(-1, 1, 1, 1, 1)


def of_noise(eps):
    """A network that puts out the noise -> denoise(y, t) -> y_0."""
    return lambda y, t: to_y0(eps(y), y, abar(t), "eps")


def wavy(y):
    return 0.9 * torch.tanh(y)


def pair(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(1, 8, 4, 4, 4, generator=gen) * 2, torch.randn(1, 8, 4, 4, 4, generator=gen)


def test_every_n_gives_n_different_steps_from_999():
    for n in range(1, STEPS + 1):
        ts = timesteps(n)
        assert len(ts) == n and ts[0] == STEPS - 1 and ts[-1] >= 0 and all(a > b for a, b in zip(ts, ts[1:]))
    with pytest.raises(ValueError, match="steps=0"):
        timesteps(0)
    with pytest.raises(ValueError, match="euler"):
        sample(None, torch.zeros(1), sampler="euler")


def test_sampling_asks_the_device_for_no_float64(monkeypatch):
    """Apple's GPUs have none."""
    monkeypatch.setattr(torch.Tensor, "double", lambda x: pytest.fail("float64"))
    for sampler in ("ddim", "dpm"):
        sample(of_noise(wavy), pair()[1], 3, sampler, abar=ABAR)


@pytest.mark.parametrize("n", (1, 2, 7, 13, 30, 50, 1000))
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_the_state_stays_on_the_line_between_y0_and_noise(n, sampler):
    """The oracle always says the one noise, whatever y is. One that reads it off y would hide a wrong
    previous step, since its last estimate of y_0 is right from any state."""
    y0, noise = pair()
    start, states, draws = q_sample(y0, noise, abar([STEPS - 1])), [], []
    out = sample(of_noise(lambda y: noise), start, n, sampler, eta=0.0, noise=lambda: draws.append(1),
                 callback=lambda i, y: states.append(y))
    for t, y in zip(timesteps(n)[1:], states):
        assert torch.allclose(y, q_sample(y0, noise, abar([t])), atol=1e-3)
    assert len(states) == n and torch.allclose(out, y0, atol=1e-3) and not draws


def moments(sampler, n, eta, mu, s, schedule):
    """Exact mean and std of a sampler's result for data N(mu, s^2) and the true E[y_0 | y_t]: all is linear,
    so each source of noise has a row of its own in which it is 1 and all others are 0. The start is the
    marginal of the data at step 999; the usual N(0, 1) lacks sqrt(abar_999) mu = 0.068 mu, and nothing with
    zero_snr."""
    draws = []

    def denoise(y, t):
        a = schedule[t].view(-1, 1, 1, 1, 1).double()
        return mu + a.sqrt() * s * s / (a * s * s + 1 - a) * (y - a.sqrt() * mu)

    def noise():
        row = torch.zeros(n + 2, 1, 1, 1, 1)
        row[2 + len(draws)] = 1
        draws.append(row)
        return row
    a = schedule[-1].item()
    y = torch.full((n + 2, 1, 1, 1, 1), a ** 0.5 * mu)                      # row 0: the mean
    y[1] += (a * s * s + 1 - a) ** 0.5                                      # row 1: the start
    out = sample(denoise, y, n, sampler, eta, noise, abar=schedule).double().flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


# largest relative error of the std: what few steps cost (measured, rounded up). The mean is exact.
@pytest.mark.parametrize("sampler, eta, n, tolerance", [
    ("ddim", 0.0, 7, 0.37), ("ddim", 0.0, 50, 0.09), ("ddim", 0.0, 1000, 0.01), ("ddim", 0.5, 1000, 0.01),
    ("ddim", 1.0, 50, 0.13), ("ddim", 1.0, 1000, 0.02), ("dpm", 0.0, 7, 0.34), ("dpm", 0.0, 50, 0.05),
    ("dpm", 0.0, 1000, 0.003)])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_gaussian_keeps_its_mean_and_deviation(sampler, eta, n, tolerance, zero_snr):
    mu, s = 1.5, 0.4
    mean, std = moments(sampler, n, eta, mu, s, alphas_cumprod(zero_snr))
    tolerance += 0.02 * (zero_snr and n <= 50)              # its first steps lie further apart in log-SNR
    assert abs(mean - mu) / s < 1e-3 and abs(std - s) / s < tolerance, (mean, std)


def compare(peer, n, sampler, our_eta=0.0, **how):
    """Our sampler and a scheduler of diffusers, step for step, with the same network and the same noise."""
    peer.set_timesteps(n)
    assert peer.timesteps.tolist() == timesteps(n)
    y, states, gen = pair(1)[1], [], torch.Generator().manual_seed(2)
    sample(of_noise(wavy), y, n, sampler, our_eta, noise=lambda: torch.randn(y.shape, generator=gen),
           callback=lambda i, x: states.append(x))
    gen = torch.Generator().manual_seed(2)
    for t, state in zip(peer.timesteps, states, strict=True):
        y = peer.step(wavy(y), t, y, generator=gen, **how).prev_sample
        assert torch.allclose(state, y, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 50, 1000])
def test_ddim_equals_diffusers_step_for_step(n):
    """With eta 1 it is ancestral sampling, too: DDPMScheduler with the small variance."""
    diffusers = pytest.importorskip("diffusers")
    for eta in (0.0, 0.6, 1.0):
        compare(diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True), n, "ddim", eta,
                eta=eta)
    ddpm = diffusers.DDPMScheduler(**SCHEDULE, clip_sample=False, variance_type="fixed_small")
    compare(ddpm, n, "ddim", 1.0)


@pytest.mark.parametrize("n", [2, 20, 50])
def test_dpm_solver_equals_diffusers_step_for_step(n):
    diffusers = pytest.importorskip("diffusers")
    compare(diffusers.DPMSolverMultistepScheduler(**SCHEDULE, final_sigmas_type="zero"), n, "dpm")
