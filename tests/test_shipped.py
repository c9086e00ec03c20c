"""The checkpoint in weights/: what a fresh clone can do without training."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import quality  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import premultiply, read_sticker  # noqa: E402


def clip(path, frames):
    """-> (1, t, h, w, 4) float32 premultiplied in [0, 1], as quality.py measures it."""
    return premultiply(read_sticker(path)[0][frames])[None].astype(np.float32) / 255


def test_it_is_small_and_brings_the_autoencoder_of_new_runs():
    file = ROOT / sample.SHIPPED
    assert sum(f.stat().st_size for f in file.parent.iterdir()) < 25e6
    loaded = sample.load_model(file)
    assert loaded.cfg.size == 64 and loaded.meta["step"] > 0
    args, _ = train.resolve(train.parser().parse_args([]))
    assert Path(args.vae) == file


@pytest.mark.parametrize("name", ["1f525", "1f680"])                # fire, rocket: calm motion
def test_frames_between_are_nearer_to_the_truth_than_their_neighbours(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)                             # no runs/ here: the shipped one is taken
    path = ROOT / f"assets/stickers/{name}.webp"
    sample.main(["--mode", "interpolate", "--input", str(path), "--every", "2", "--length", "7",
                 "--sampler", "dpm", "--steps", "4", "--out", "made.webp"])
    made, truth = clip("made.webp", slice(0, 7)), clip(path, slice(0, 7))
    mask = np.arange(7) % 2 == 0
    assert np.array_equal(made[:, mask], truth[:, mask])
    copy, ours = (quality.psnr(truth, x, ~mask)[0] for x in (quality.copy_nearest(truth, mask), made))
    assert ours > copy + 1                                         # measured: 2.9 and 1.6 dB


def test_without_any_flag_there_is_a_sticker(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample.main(["--sampler", "dpm", "--steps", "1"])
    assert sample.BUILT_IN[0] in capsys.readouterr().out
    made, truth = read_sticker("sticker.webp")[0], read_sticker(ROOT / sample.BUILT_IN[0])[0][::2]
    assert len(made) == 2 * len(truth) - 1 and np.array_equal(made[::2], truth)
