"""Claims about the autoencoder: it takes Stable Diffusion's weights (the diffusers layout at its real size,
with random values), and stickers/vae.py trains our own."""

import signal

import numpy as np
import pytest
import torch

from data import open_store
from rdtf import load_vae
from stickers import vae as vae_script
from test_train import begin, difference, go, log_of, store  # noqa: F401: a fixture

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


def load(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file(state, path)
    else:
        torch.save(state, path)
    try:
        return load_vae(path)
    finally:
        path.unlink()                                       # a third of a gigabyte


def test_encodes_and_decodes_as_diffusers(theirs, tmp_path):
    alpha, colour = torch.rand(2, 1, 32, 32), torch.rand(2, 3, 32, 32)
    rgba = torch.cat([colour * alpha, alpha], 1)            # premultiplied; SD sees it on white, in [-1, 1]
    ours = load(theirs.state_dict(), tmp_path / "vae.safetensors")
    assert (ours.f, ours.cfg.latent_channels, ours.training) == (8, 4, False)
    with torch.no_grad():
        latents = theirs.encode(2 * (colour * alpha + 1 - alpha) - 1).latent_dist.mean * SCALE
        assert latents.std() > 1e-2 and latents.shape == (2, 4, 4, 4)
        assert torch.allclose(ours.encode(rgba), latents, atol=1e-4, rtol=0)
        latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
        wanted, made = theirs.decode(latents / SCALE).sample / 2 + 0.5, ours.decode(latents)
    assert torch.allclose(made[:, :3], wanted.clamp(0, 1), atol=1e-4, rtol=0)
    assert ((wanted > 0) & (wanted < 1)).float().mean() > 0.2, "clamped everywhere: nothing was compared"
    assert torch.all(made[:, 3] == 1)


def test_loads_half_precision_and_the_names_and_shapes_of_before_diffusers_018(theirs, tmp_path):
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old, wanted = {}, theirs.state_dict()
    for name, value in wanted.items():
        as_conv = ".attentions.0.to_" in name and value.ndim == 2
        for new, was in names.items():
            name = name.replace(new, was)
        old[name] = (value[:, :, None, None] if as_conv else value).half()
    assert set(wanted) - set(old), "no attention in the state dict"
    state = load(old, tmp_path / "vae.pt").state_dict()
    assert set(state) == set(wanted) | {"mean", "std"}
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


class Code:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize("content, words", [
    (None, "no such file"), (b"# a readme", "opened safely"), ({"x": Code()}, "opened safely"),
    ({"format": 2, "stage": "vae", "step": 3}, "training has not ended"),
    (torch.zeros(3), "not an autoencoder"),
    ({"decoder.conv_in.weight": torch.zeros(3)}, "not an autoencoder"), ({"vae": {}}, "not an autoencoder")])
def test_any_other_file_is_refused_in_one_line_and_never_run(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "vae.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, "vae.pt")
    with pytest.raises(ValueError, match=words) as error:
        load_vae("vae.pt")
    assert str(error.value).startswith("vae.pt: ") and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------
# Training our own: stickers/vae.py


def test_it_learns_and_leaves_a_small_file_with_measured_statistics(store, tmp_path):  # noqa: F811
    go(tmp_path, store, "--steps", 40, "--log-every", 1, "--batch-size", 4, program="vae")
    losses = [x["loss"] for x in log_of(tmp_path, "vae")]
    assert len(losses) == 40 and np.mean(losses[30:34]) < 0.6 * np.mean(losses[:4])
    vae, data = load_vae(tmp_path / "vae.pt"), torch.load(tmp_path / "vae.pt", weights_only=True)
    assert all(x.dtype == torch.float16 for x in data["vae"].values()) and "optimizers" not in data
    x = vae_script.draw_pictures(open_store(store), range(24), range(24), 1)
    with torch.no_grad():
        z = vae.encode(x)
        assert vae_script.picture_loss(vae.decode(z), x).mean() < np.mean(losses[:4])
    assert z.mean((0, 2, 3)).abs().max() < 0.5 and (z.std((0, 2, 3)) - 1).abs().max() < 0.5


def test_stopped_killed_and_resumed_it_equals_undisturbed_bitwise(store, tmp_path):  # noqa: F811
    flags, out = ("--steps", 6, "--save-every", 1), tmp_path / "run"
    go(tmp_path / "calm", store, *flags, program="vae")
    hooks = [("signal_at", int(signal.SIGTERM), "vae_losses", 1)]
    printed = go(out, store, *flags, hooks=hooks, program="vae")
    assert "same command" in printed and torch.load(out / "training.pt", weights_only=True)["step"] == 2
    assert not (out / "vae.pt").exists()
    for place in ((2, "half"), (1, "written"), (2, "renamed")):
        process = begin(out, store, flags, None, [("kill_in_save", *place)], program="vae")
        process.join()
        assert process.exitcode == -signal.SIGKILL
    go(out, store, *flags, program="vae")
    assert not difference(tmp_path / "calm" / "training.pt", out / "training.pt")
    assert (tmp_path / "calm" / "vae.pt").read_bytes() == (out / "vae.pt").read_bytes()
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("flags, words", [
    (["--data", "{tmp}/none"], "none"), (["--steps", "0"], "--steps: 0: must be at least 1"),
    (["--preset", "paper"], "--vae"), (["--size", "30"], "multiple of 4"),
    (["--out", "{tmp}/file/run"], "file"), (["--out", "{tmp}/run"], "training.pt: no vae checkpoint"),
    (["--device", "cuda:77"], "--device cpu")])
def test_bad_input_of_its_training_is_one_line(tmp_path, capsys, flags, words):
    (tmp_path / "run").mkdir()
    for name in ("file", "run/training.pt"):
        (tmp_path / name).write_text("no checkpoint")
    given = ["--data", "synthetic:8", "--out", str(tmp_path / "out"), "--device", "cpu"]
    try:
        code = vae_script.main(given + [x.format(tmp=tmp_path) for x in flags])
    except SystemExit as end:                               # argparse
        code = end.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.startswith("vae.py: ") and words in error and "\n" not in error, error
