"""Samplers against oracles that a wrong step list cannot satisfy, exact moments, and diffusers' schedulers.

test_sampling_math.py holds the schedule, guidance and the loss. diffusers' DDIM is right where its
previous step, t - 1000 // n, is the next entry of its own list: for n that divides 1000.
"""

import pytest
import torch

from rdtf import SAMPLERS, STEPS, alphas_cumprod, q_sample, sample, timesteps

torch.set_num_threads(1)
COUNTS = (1, 2, 7, 13, 30, 50, 1000)
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                timestep_spacing="trailing")


def pair(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(1, 8, 4, 4, 4, generator=gen) * 2, torch.randn(1, 8, 4, 4, 4, generator=gen)


def test_every_n_gives_n_different_steps_from_999():
    for n in range(1, STEPS + 1):
        ts = timesteps(n)
        assert len(ts) == n and ts[0] == STEPS - 1 and ts[-1] >= 0 and all(a > b for a, b in zip(ts, ts[1:]))


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_the_state_stays_on_the_line_between_x0_and_noise(n, sampler):
    """The oracle is told neither x nor t: it returns the one noise. One that reads the noise off x would hide
    a wrong previous step, since its last prediction of x0 is right from any state."""
    x0, noise = pair()
    abar, ts, states = alphas_cumprod(), timesteps(n), []
    start = q_sample(x0, noise, torch.tensor([STEPS - 1]), abar)
    out = sample(lambda x, t: noise, start, n, sampler, eta=0.0, callback=lambda i, x: states.append(x))
    for t, x in zip(ts[1:], states):
        assert torch.allclose(x, q_sample(x0, noise, torch.tensor([t]), abar), atol=1e-3)
    assert len(states) == n and torch.allclose(out, x0, atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 50, 13, 30])
def test_diffusers_ddim_meets_the_same_oracle_only_where_n_divides_1000(n):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True)
    peer.set_timesteps(n)
    x0, noise = pair()
    x = q_sample(x0, noise, torch.tensor([STEPS - 1]), alphas_cumprod())
    for t in peer.timesteps:
        x = peer.step(noise, t, x, eta=0.0).prev_sample
    assert torch.allclose(x, x0, atol=1e-3) == (1000 % n == 0)


def moments(sampler, n, eta, mu, s):
    """Exact mean and std of a sampler's result for data N(mu, s^2) and the true E[noise | x_t]: all is
    linear, so each source of noise has a row of its own in which it is 1 and all others are 0. The start is
    the marginal of the data at step 999; the usual N(0, 1) lacks sqrt(abar_999) mu = 0.068 mu."""
    abar, draws = alphas_cumprod().double(), []

    def eps(x, t):
        a = abar[t].view(-1, 1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mu) / (a * s * s + 1 - a)

    def noise():
        row = torch.zeros(n + 2, 1, 1, 1, 1)
        row[2 + len(draws)] = 1
        draws.append(row)
        return row
    a = abar[-1].item()
    x = torch.full((n + 2, 1, 1, 1, 1), a ** 0.5 * mu)                      # row 0: the mean
    x[1] += (a * s * s + 1 - a) ** 0.5                                      # row 1: the start
    out = sample(eps, x, n, sampler, eta, noise).double().flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


# largest relative error of the std: what few steps cost (measured, rounded up). The mean is exact.
MOMENTS = [("ddim", 0.0, 7, 0.37), ("ddim", 0.0, 13, 0.24), ("ddim", 0.0, 30, 0.13),
           ("ddim", 0.0, 50, 0.09), ("ddim", 0.0, 1000, 0.01), ("ddim", 0.5, 1000, 0.01),
           ("ddim", 1.0, 50, 0.13), ("ddim", 1.0, 1000, 0.02), ("ddpm", 1.0, 50, 0.13),
           ("ddpm", 1.0, 1000, 0.02), ("dpm", 0.0, 7, 0.34), ("dpm", 0.0, 20, 0.13),
           ("dpm", 0.0, 50, 0.05), ("dpm", 0.0, 1000, 0.003)]


@pytest.mark.parametrize("sampler,eta,n,tolerance", MOMENTS)
def test_a_gaussian_keeps_its_mean_and_deviation(sampler, eta, n, tolerance):
    mu, s = 1.5, 0.4
    mean, std = moments(sampler, n, eta, mu, s)
    assert abs(mean - mu) / s < 1e-3 and abs(std - s) / s < tolerance, (mean, std)


@pytest.mark.parametrize("n", [1, 2, 10, 50, 1000])
def test_ddpm_equals_diffusers_step_for_step(n):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(**SCHEDULE, clip_sample=False, variance_type="fixed_small")
    peer.set_timesteps(n)
    assert peer.timesteps.tolist() == timesteps(n)
    x, states = pair(1)[1], []
    gen = torch.Generator().manual_seed(2)
    sample(lambda x, t: 0.9 * torch.tanh(x), x, n, "ddpm", noise=lambda: torch.randn(x.shape, generator=gen),
           callback=lambda i, x: states.append(x))
    gen = torch.Generator().manual_seed(2)
    for t, state in zip(peer.timesteps, states):
        x = peer.step(0.9 * torch.tanh(x), t, x, generator=gen).prev_sample
        assert torch.allclose(state, x, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("n", [2, 20, 50])
def test_dpm_solver_equals_diffusers_step_for_step(n):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DPMSolverMultistepScheduler(**SCHEDULE, final_sigmas_type="zero")
    peer.set_timesteps(n)
    assert peer.timesteps.tolist() == timesteps(n)
    x, states = pair(1)[1], []
    sample(lambda x, t: 0.9 * torch.tanh(x), x, n, "dpm", callback=lambda i, x: states.append(x))
    for t, state in zip(peer.timesteps, states):
        x = peer.step(0.9 * torch.tanh(x), t, x).prev_sample
        assert torch.allclose(state, x, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_samplers_that_need_noise_ask_for_it(sampler):
    draws = []
    sample(lambda x, t: x, torch.zeros(1, 1, 1, 1, 1), 5, sampler, eta=0.0,
           noise=lambda: draws.append(1) or torch.zeros(1, 1, 1, 1, 1))
    assert len(draws) == (4 if sampler == "ddpm" else 0)                    # the last step adds none
