"""benchmarks/speed.py runs as its help says; what it measures is in benchmarks/README.md."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import speed  # noqa: E402

SMALL = ("--widths 32 32 32 64 --head-dim 32 --latent 16 --text-tokens 5 --repeats 1 --clock cpu "
         "--no-keep-memory")


def test_a_small_sampling_run_beside_a_peer(monkeypatch, capsys):
    pytest.importorskip("diffusers", reason="the peers are diffusers' networks")
    flags = "--sampling --steps 2 --dtype bf16 --peers I2VGenXLUNet"
    monkeypatch.setattr(sys, "argv", ["speed.py", *SMALL.split(), *flags.split()])
    speed.main()
    tables = [part.splitlines() for part in capsys.readouterr().out.split("\n\n") if "peer/ours" in part]
    assert len(tables) == 2                                             # two pairs of guidance scales
    for title, head, ours, peer in tables:
        assert ours.split()[0] == "ours" and ours.split()[3] == "1.00x"
        assert peer.split()[0] == "I2VGenXLUNet" and float(peer.split()[1]) > 0


def test_peers_have_four_levels(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--widths", "32", "64"])
    with pytest.raises(SystemExit, match="--widths: the peers have four levels"):
        speed.main()


def test_counting_the_paper_needs_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--preset", "paper", "--count", "--no-keep-memory"])
    speed.main()
    out = capsys.readouterr().out
    assert "parameters 956.4 M" in out and "checkpointing True" in out
