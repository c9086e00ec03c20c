"""speed.py, ladder.py, ablation.py run as their help says; what they measure is in benchmarks/README.md."""
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import ablation
import ladder
import numpy as np
import pytest
import rdtf
import speed
import torch
import train
from curriculum import TASKS, Curriculum


@pytest.fixture
def vae(tmp_path):
    """A file with an untrained autoencoder."""
    cfg, path = rdtf.Config(**rdtf.PRESETS["tiny"]), tmp_path / "vae.pt"
    torch.save({"vae": rdtf.AutoencoderKL(cfg).state_dict(), "config": asdict(cfg)}, path)
    return str(path)


def test_a_small_sampling_run_beside_a_peer(capsys):
    pytest.importorskip("diffusers", reason="the peers are diffusers' networks")
    speed.main("--widths 32 32 32 64 --head-dim 32 --latent 16 --text-tokens 5 --repeats 1 --clock cpu "
               "--sampling --steps 2 --dtype bf16 --peers I2VGenXLUNet".split())
    tables = [part.splitlines() for part in capsys.readouterr().out.split("\n\n") if "peer/ours" in part]
    assert len(tables) == 2                                             # two pairs of guidance scales
    for title, head, ours, peer in tables:
        assert ours.split()[0] == "ours" and ours.split()[3] == "1.00x"
        assert peer.split()[0] == "I2VGenXLUNet" and float(peer.split()[1]) > 0


def test_counting_the_paper_needs_no_gpu(capsys):
    speed.main(["--preset", "paper", "--count"])
    out = capsys.readouterr().out
    assert "parameters 956.4 M" in out and "checkpointing True" in out
    with pytest.raises(SystemExit, match="--widths: the peers have four levels"):
        speed.main(["--widths", "32", "64"])


def test_rungs_add_up():
    assert ladder.rung("noise").flags == dict(optimizer="muon", lr=0.01, weight_decay=0.5,
                                              noise_levels="normal", full=0.5)
    assert ladder.rung("tiny").flags["weight_decay"] == train.RECIPES["tiny"]["weight_decay"] == 0.1
    top, tiny = ladder.rung("tiny"), rdtf.Config(**rdtf.PRESETS["tiny"])
    assert (top.guess, top.steps) == (rdtf.guess_frames, train.noise_step)
    assert top.more and all(getattr(tiny, key) == value for key, value in top.config.items())
    assert ladder.rung("noise").steps == ladder.seldom_late and not ladder.rung("fluent").more
    assert ladder.rung("f4c4").guess == ladder.without_units
    cfg = rdtf.Config(**rdtf.PRESETS["tiny"] | ladder.rung("f8c16").config)
    assert (cfg.f, cfg.latent_channels) == (8, 16)


def test_a_ladder_in_miniature(tmp_path, vae, capsys):
    """Two variants of a few seconds; the second call resumes, a third has nothing to do; then the table."""

    def words(names, minutes):
        flags = "--data synthetic:16 --more synthetic:17 --measure synthetic:60 --count 1 --marks 2"
        return ["run", *names, "--minutes", str(minutes), "--out", str(tmp_path), "--vae", vae,
                *flags.split(), "--batch-size", "2", "--save-every", "2"]

    def run(*what):
        subprocess.run([sys.executable, ladder.__file__, *words(*what)], capture_output=True, check=True)
    run(["f4c4", "noise"], 0.02)
    first = train.read_lines(tmp_path / "noise-0" / "measured.jsonl")
    assert "flow" in first[-1]["modes"]["interpolate-2"] and first[-1]["seconds"] >= 1.2
    run(["noise"], 0.04)
    clock = [x["seconds"] for x in train.read_lines(tmp_path / "noise-0" / "clock.jsonl")]
    assert clock == sorted(clock) and clock[-1] >= 2.4
    ladder.main(words(["noise"], 0.04))
    assert "already" in capsys.readouterr().out
    ladder.main(["table", str(tmp_path)])
    table = Path(tmp_path, "ladder.md").read_text()
    assert "| f4c4-0: f = 4" in table and "| noise-0: + normal" in table and "| flow |" in table


def test_a_curriculum_follows_the_clock(tmp_path, monkeypatch):
    """Half of the time is half of the course, whatever the number of updates."""
    for owner, name in ((ladder.train, "learning_rate"), (ladder.train, "save_checkpoint"),
                        (Curriculum, "weights")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    whole = [Curriculum("linear", 100).weights(step) for step in (0, 50, 100)]
    clock = ladder.Clock(tmp_path, SimpleNamespace(minutes=1))
    for seconds, expected in zip((0, 30, 90), whole):
        clock.before = seconds
        assert np.allclose(Curriculum("linear", ladder.FOREVER).weights(7), expected)


def test_an_ablation_in_miniature(tmp_path, vae, capsys):
    """Variants train at their own setting and are measured on all tasks, also on those they never saw."""
    flags = "--minutes 0.02 --data synthetic:60 --more synthetic:61 --measure synthetic:60 --count 1 " \
            "--marks 1"
    subprocess.run([sys.executable, ablation.__file__, "run", "generation", "conv3d", *flags.split(),
                    "--vae", vae, "--batch-size", "2", "--save-every", "2", "--out", str(tmp_path)],
                   capture_output=True, check=True)
    ablation.main(["table", str(tmp_path)])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" |")[0] for row in rows[2:]] == [f"| {ablation.VARIANTS[name].what}"
                                                        for name in ("generation", "conv3d")]
    assert "predict_post" in rows[0] and not any("nan" in row for row in rows)
    losses = json.loads(Path(tmp_path, "generation-0", "losses.json").read_text())
    assert losses["interpolate"] > 0 and set(TASKS) < set(losses)
    assert rdtf.load_model(tmp_path / "conv3d-0" / "last.pt").cfg.temporal == "conv3d"
