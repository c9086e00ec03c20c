"""Stable-Diffusion-type autoencoder weights: the diffusers layout at its real size, with random values."""

import pytest
import torch

from rdtf import load_vae

SCALE = 0.18215                                             # of Stable Diffusion's latents


@pytest.fixture(scope="module")
def theirs():
    """diffusers' AutoencoderKL in the configuration of Stable Diffusion's (84 M parameters), values that fp16
    holds."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (tests/requirements.txt)")
    torch.manual_seed(0)
    kind = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **kind).eval()
    for name, value in vae.named_parameters():
        if value.ndim == 1:                                 # else biases are 0 and the norms' gains all 1
            value.data.add_(0.1 * torch.randn_like(value))
        value.data = value.data.half().float()
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def picture():
    """Translucent premultiplied RGBA (2, 4, 32, 32), and the RGB over white in [-1, 1] that SD sees of it."""
    alpha = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    colour = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return torch.cat([colour * alpha, alpha], 1), 2 * (colour * alpha + 1 - alpha) - 1


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_encodes_and_decodes_as_diffusers(suffix, theirs, picture, tmp_path):
    path, state = tmp_path / f"vae{suffix}", theirs.state_dict()
    if suffix == ".pt":
        torch.save({name: value.half() for name, value in state.items()}, path)
    else:
        pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file(state, path)
    ours, (rgba, seen) = load_vae(path), picture
    path.unlink()                                           # a third of a gigabyte
    assert (ours.f, ours.latent_channels, ours.training) == (8, 4, False)
    with torch.no_grad():
        latents = theirs.encode(seen).latent_dist.mean * SCALE
        assert latents.std() > 1e-2 and latents.shape == (2, 4, 4, 4)
        assert torch.allclose(ours.encode(rgba), latents, atol=1e-4, rtol=0)
        latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
        wanted = theirs.decode(latents / SCALE).sample / 2 + 0.5
        made = ours.decode(latents)
    assert torch.allclose(made[:, :3], wanted.clamp(0, 1), atol=1e-4, rtol=0)
    assert ((wanted > 0) & (wanted < 1)).float().mean() > 0.2, "clamped everywhere: nothing was compared"
    assert torch.all(made[:, 3] == 1)


def test_loads_the_names_and_shapes_of_before_diffusers_018(theirs, tmp_path):
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old, wanted = {}, theirs.state_dict()
    for name, value in wanted.items():
        as_conv = ".attentions.0.to_" in name and value.ndim == 2
        for new, was in names.items():
            name = name.replace(new, was)
        old[name] = value[:, :, None, None] if as_conv else value
    assert set(wanted) - set(old), "no attention in the state dict"
    torch.save(old, tmp_path / "vae.pt")
    state = load_vae(tmp_path / "vae.pt").state_dict()
    (tmp_path / "vae.pt").unlink()
    assert set(state) == set(wanted) | {"mean", "std"}
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_weights_of_another_network_are_refused(theirs, tmp_path):
    state = {name: value for name, value in theirs.state_dict().items() if "mid_block" not in name}
    torch.save(state, tmp_path / "vae.pt")
    with pytest.raises(RuntimeError, match="mid_block"):
        load_vae(tmp_path / "vae.pt")
    (tmp_path / "vae.pt").unlink()
