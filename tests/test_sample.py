"""sample.py from the command line's point of view: every mode, what comes back, and every wrong call."""

import os
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import sample as cli
from data import read_metadata, read_sticker, synthetic_sticker, write_sticker
from rdtf import RDTF, AutoencoderKL, Config

MICRO = dict(widths=(32, 32), layers=1, head_dim=16, context_dim=32, text_layers=1, text_bytes=16, latent_channels=4,
             vae_patch=8, vae_widths=(32,), prediction="v", text_scale=2.0, image_scale=1.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a micro checkpoint, a sticker of 8 soft-edged frames and a picture of another size."""
    folder = tmp_path_factory.mktemp("sample")
    torch.manual_seed(0)
    cfg = Config(**MICRO)
    model, vae = RDTF(cfg), AutoencoderKL(cfg)
    torch.nn.init.normal_(model.net.conv_out.weight, std=0.05)
    data = {"format": 1, "stage": "main", "step": 3, "config": asdict(cfg), "text_encoder": [], "vae_id": vae.id,
            "fingerprint": "x"}
    torch.save({**data, "model": {k: v.half() for k, v in model.state_dict().items()}, "ema": {},
                "vae": {k: v.half() for k, v in vae.state_dict().items()}}, folder / "micro.pt")
    torch.save({**data, "format": 99, "model": {}, "vae": {}}, folder / "new.pt")
    (folder / "broken.pt").write_bytes(b"not a checkpoint")
    frames, _, _, _ = next(x for x in (synthetic_sticker(i) for i in range(200)) if len(x[0]) >= 8)
    write_sticker(folder / "in.webp", frames[:8], 80)
    Image.fromarray(frames[0]).resize((100, 50)).save(folder / "wide.png")
    (folder / "torn.webp").write_bytes((folder / "in.webp").read_bytes()[:60])
    return folder


def call(place, monkeypatch, *flags, ckpt="micro.pt"):
    """Runs sample.py's main in the folder -> exit code."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", ckpt, "--steps", "2", "--device", "cpu", *flags])
    try:
        cli.main()
    except SystemExit as e:
        return e.code
    return 0


GIVEN = {  # flags, frames of the result that must be frames of the input: {result: input}
    "interpolate 2": (["--mode", "interpolate", "--input", "in.webp"], 15, {2 * i: i for i in range(8)}),
    "interpolate 3": (["--mode", "interpolate", "--input", "in.webp", "--factor", "3"], 22, {3 * i: i for i in range(8)}),
    "interpolate every": (["--mode", "interpolate", "--input", "in.webp", "--every", "4"], 3, {0: 0, 2: 4}),
    "predict": (["--mode", "predict", "--input", "in.webp", "--given", "3"], 13, {i: i for i in range(8)}),
    "predict long": (["--mode", "predict", "--input", "in.webp", "--length", "17"], 17, {i: i for i in range(8)}),
    "predict backward": (["--mode", "predict", "--input", "in.webp", "--backward"], 12, {4 + i: i for i in range(8)}),
    "mask": (["--mask", "10010010", "--input", "in.webp"], 8, {0: 0, 3: 3, 6: 6}),
    "short mask": (["--mask", "0110", "--input", "in.webp"], 4, {1: 1, 2: 2}),
    "image": (["--image", "in.webp", "--text", "a star"], 8, {0: 0}),
    "loop": (["--mode", "loop", "--image", "in.webp"], 7, {0: 0}),
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("sampler,suffix", [("ddim", "webp"), ("dpm", "apng")])
def test_given_frames_come_back_untouched(place, monkeypatch, name, sampler, suffix):
    flags, count, given = GIVEN[name]
    assert call(place, monkeypatch, *flags, "--sampler", sampler, "--out", f"o.{suffix}") == 0
    frames, durations = read_sticker(place / f"o.{suffix}")
    source, _ = read_sticker(place / "in.webp")
    starts = np.cumsum([0] + list(durations[:-1]))                          # merged frames keep their time
    each = sum(durations) / count
    for result, i in given.items():
        got = frames[int(np.searchsorted(starts, (result + 0.5) * each, side="right")) - 1]
        visible = source[i][..., 3:] > 0                                    # colour under alpha 0 is nobody's
        assert np.array_equal(got[..., 3], source[i][..., 3]) and np.array_equal(got * visible, source[i] * visible), result


@pytest.mark.parametrize("n", range(1, 9))
def test_any_number_of_frames(place, monkeypatch, n):
    assert call(place, monkeypatch, "--text", "a red star", "--frames", str(n), "--out", "n.apng", "--sampler", "dpm") == 0
    assert sum(read_sticker(place / "n.apng")[1]) == 125 * n or n == 1


def test_seeds_repeat_and_do_not_depend_on_the_batch(place):
    loaded = cli.load_model(place / "micro.pt")
    empty, mask = torch.zeros(3, 8, 4, 64, 64), np.zeros((3, 8), bool)
    together = cli.sample_clips(loaded, ["a", "a", "b"], empty, mask, steps=3, seeds=[4, 5, 6])
    alone = cli.sample_clips(loaded, ["b"], empty[:1], mask[:1], steps=3, seeds=[6])
    assert torch.allclose(together[2], alone[0], atol=1e-4) and not torch.allclose(together[0], together[1])
    assert together.min() >= 0 and together.max() <= 1 and (together[:, :, :3] <= together[:, :, 3:] + 1e-6).all()


def test_a_file_can_be_repeated_from_its_metadata(place, monkeypatch):
    assert call(place, monkeypatch, "--text", "a blue heart", "--seeds", "3,8", "--out", "m.webp", "--text-scale", "3") == 0
    assert (place / "m-3.webp").exists() and (place / "m-sheet.png").exists()
    settings = read_metadata(place / "m-8.webp")["rdtf"]
    assert settings["text"] == "a blue heart" and settings["seeds"] == "8" and settings["text_scale"] == 3
    monkeypatch.setattr(sys, "argv", ["sample.py", "--from-metadata", "m-8.webp", "--out", "again.webp", "--device", "cpu"])
    cli.main()
    assert np.array_equal(read_sticker(place / "again.webp")[0], read_sticker(place / "m-8.webp")[0])


def test_sampling_leaves_the_random_state_and_ema_puts_weights_back(place):
    loaded = cli.load_model(place / "micro.pt")
    torch.manual_seed(9)
    before = torch.get_rng_state()
    cli.sample_clips(loaded, ["x"], torch.zeros(1, 8, 4, 64, 64), np.zeros((1, 8), bool), steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    name, p = next(iter(loaded.model.named_parameters()))
    kept = p.clone()
    with cli.ema_weights(loaded.model, {name: torch.full_like(p, 7.0)}):
        assert (p == 7).all()
    assert torch.equal(p, kept)


def test_interpolation_keeps_the_time_and_size_limits_hold(place, monkeypatch):
    assert call(place, monkeypatch, "--mode", "interpolate", "--input", "in.webp", "--out", "t.webp") == 0
    assert abs(sum(read_sticker(place / "t.webp")[1]) - 8 * 80) < 40
    assert call(place, monkeypatch, "--text", "x", "--size", "128", "--max-kb", "40", "--out", "k.webp") == 0
    assert (place / "k.webp").stat().st_size <= 40 * 1024 and read_sticker(place / "k.webp")[0].shape[1] == 128


def test_other_sizes_are_fitted_with_a_message(place, monkeypatch, capsys):
    assert call(place, monkeypatch, "--image", "wide.png", "--out", "w.webp") == 0
    assert "wide.png: 100x50 pixels, fitted to 64x64" in capsys.readouterr().err


def test_no_input_takes_a_built_in_sticker(place, monkeypatch, capsys):
    assert call(place, monkeypatch, "--mode", "interpolate", "--out", "b.webp") == 0
    assert "built-in sticker" in capsys.readouterr().err and len(read_sticker(place / "b.webp")[0]) == 7


WRONG = {
    "--image and --input": ["--image", "in.webp", "--input", "in.webp"], "add --text": [], "--given 9": ["--mode", "predict", "--input", "in.webp", "--given", "9"],
    "only with --mode predict": ["--text", "x", "--backward"], "--frames 9": ["--text", "x", "--frames", "9"], "zeros and ones": ["--mask", "10a", "--input", "in.webp"],
    "add --input or --image": ["--mask", "1010"], "--steps 0": ["--text", "x", "--steps", "0"], "--seeds a-b": ["--text", "x", "--seeds", "a-b"],
    "remove one": ["--mode", "loop", "--image", "in.webp", "--mask", "11"], "torn.webp": ["--image", "torn.webp"], "none.webp": ["--image", "none.webp"],
    "ask for more": ["--mode", "predict", "--input", "in.webp", "--length", "5"], "at least 2 keyframes": ["--mode", "interpolate", "--input", "wide.png"],
    "use --image for": ["--input", "in.webp"], "follows from": ["--mode", "interpolate", "--input", "in.webp", "--frames", "4"],
    "--duration 3": ["--text", "x", "--duration", "3"], "carries no rdtf": ["--from-metadata", "in.webp"], "--every 0": ["--mask", "10", "--input", "in.webp", "--every", "0"],
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_calls_say_what_to_change(place, monkeypatch, capsys, words):
    assert call(place, monkeypatch, *WRONG[words], "--out", "never.webp") == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sample.py:")]
    assert len(lines) == 1 and words in lines[0], lines
    assert not (place / "never.webp").exists()


@pytest.mark.parametrize("ckpt,words", [("new.pt", "format 99"), ("broken.pt", "cannot be opened safely|not a checkpoint"), ("no.pt", "no such file")])
def test_bad_checkpoints_are_named(place, monkeypatch, capsys, ckpt, words):
    assert call(place, monkeypatch, "--text", "x", ckpt=ckpt) == 2
    err = capsys.readouterr().err
    assert ckpt in err and any(w in err for w in words.split("|")) and "Traceback" not in err


def test_the_newest_run_is_the_default_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "b")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "last.pt").write_bytes(b"")
        os.utime(tmp_path / "runs" / name / "last.pt", (1000 - i, 1000 - i))
    assert cli.default_checkpoint() == "runs/a/last.pt"
