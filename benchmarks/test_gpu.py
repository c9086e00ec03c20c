"""gpu.py runs as its help says, here in miniature; its figures need a GPU."""
import sys
from types import SimpleNamespace

import gpu
import pytest
import rdtf


def test_every_job_in_miniature(monkeypatch, capsys):
    monkeypatch.setattr(rdtf, "PRESETS", rdtf.PRESETS.copy())
    for module in (gpu.train, gpu.vae):
        monkeypatch.setattr(module, "PRESETS", rdtf.PRESETS)
    for name in ("MODES", "EAGER_SIZES", "COMPILED_SIZES"):
        monkeypatch.setattr(gpu, name, getattr(gpu, name).copy())
    gpu.main("--device cpu --miniature --repeats 1".split())
    table = capsys.readouterr().out.split("|---|---|---|\n")[1].strip().splitlines()
    assert len(table) == 1 + 2 + 6 + 2 * (2 + 1 + 1) and "passed" in table[0]
    assert sum("clips/s" in row for row in table) == 8 and sum("Table 8" in row for row in table) == 4
    assert sum("bf16 peak" in row and "45 %" in row for row in table) == 2
    assert "24 GiB" in table[2] and "40 GiB" in table[1]


def test_a_job_that_fails_or_takes_too_long_is_a_row(tmp_path, monkeypatch):
    args = SimpleNamespace(device="cpu", repeats=1)
    assert gpu.apart("smoke", args, 5)[0][1].startswith("no time left")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu.apart("smoke", args, 60)[0][1].startswith("failed")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '[\"paper\", \"7 ms\", \"\"]'\necho out of memory >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert gpu.apart("smoke", args, 60) == [("paper", "7 ms", ""), ("smoke", "failed: out of memory", "")]
    monkeypatch.undo()
    if not gpu.torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU here"):
            gpu.main([])
