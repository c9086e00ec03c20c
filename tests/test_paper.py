"""`paper` from its data to a sticker, in miniature: the paper's recipe and settings, all widths tiny.

The autoencoder is a .safetensors file with the names of Stable Diffusion's, the text encoders are folders.
"""
import functools
import sys

import numpy as np
import pytest
import torch

import rdtf
import sample
import train
from data import read_sticker
from test_text import folders  # noqa: F401: a fixture
from test_train import difference

TINY = dict(size=64, widths=(32, 32, 64), layers=1, head_dim=16, context_dim=24, text_dims=(24, 16),
            vae_widths=(32, 32, 32, 32), vae_layers=1)


@pytest.fixture
def paper(folders, tmp_path, monkeypatch):  # noqa: F811
    """-> go(run, *flags): the command of the paper's preset."""
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    monkeypatch.setitem(rdtf.PRESETS, "paper", rdtf.PRESETS["paper"] | TINY)
    monkeypatch.setattr(train, "sample_clips", functools.partial(rdtf.sample_clips, steps=1))
    sheet = train.sample_sheet
    monkeypatch.setattr(train, "sample_sheet", lambda *a, **k: sheet(*a[:2], a[2][:1], *a[3:], **k))
    monkeypatch.setattr(train, "validation_rows", functools.partial(train.validation_rows, count=6))
    torch.manual_seed(1)
    state = rdtf.AutoencoderKL(rdtf.Config(**rdtf.PRESETS["paper"])).state_dict()
    vae = {k: v for k, v in state.items() if k not in ("mean", "std")}      # Stable Diffusion's has neither
    assert "encoder.down_blocks.0.resnets.0.conv1.weight" in vae
    safetensors.save_file(vae, tmp_path / "sd.safetensors")

    def go(run, *flags):
        flags = ["--preset", "paper", "--data", "synthetic:12", "--vae", tmp_path / "sd.safetensors",
                 "--text-encoder", *folders, "--steps", 2, "--device", "cpu", "--out", tmp_path / run, *flags]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()
        return tmp_path / run
    return go


def test_the_paper_trains_saves_resumes_and_samples(paper, tmp_path, capsys, monkeypatch):
    whole = paper("whole")
    paper("run", "--max-updates", 1)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 1
    eager = functools.partialmethod(torch.nn.Module.compile, backend="eager")         # no compiler is needed
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    run = paper("run", "--compile")                                         # frozen encoders stay outside
    assert not difference(whole / "last.pt", run / "last.pt")
    data = torch.load(run / "last.pt", weights_only=True)
    cfg, args = rdtf.Config(**data["config"]), data["args"]
    assert (cfg.prediction, cfg.sampler, cfg.steps) == ("eps", "ddim", 50)
    assert (cfg.text_scale, cfg.image_scale) == (7.5, 7.5)
    assert not any((cfg.narrow, cfg.residual, cfg.inputs, cfg.clean, cfg.pooled_text)) and cfg.f == 8
    assert (args["optimizer"], args["noise_levels"], args["schedule"]) == ("adamw", "uniform", "constant")
    assert (args["lr"], args["weight_decay"], args["batch_size"], args["accumulation"]) == (1e-5, 0.01, 1, 6)
    assert not any(k.startswith("text.encoders") for k in data["model"]) and len(data["text_encoder"]) == 2
    assert {"samples.webp", "samples.png", "loss.png", "interpolate.webp"} <= {x.name for x in run.iterdir()}
    capsys.readouterr()
    clip = run / "interpolate.webp"
    for words, given in ((["--text", "a red cat"], False), (["--input", clip, "--steps", 2], True)):
        words = ["--ckpt", run / "last.pt", "--out", tmp_path / "x.webp", "--device", "cpu", *words]
        sample.main([str(x) for x in words])
        assert f"ddim {2 if given else 50} steps" in capsys.readouterr().out
        frames, _ = read_sticker(tmp_path / "x.webp")
        assert frames.shape[1:] == (64, 64, 4) and len(frames) >= 8
        made = frames[1::2] if given else frames
        assert (made[..., 3] == 255).all() and np.ptp(made[..., :3]) > 0    # RGB: opaque
