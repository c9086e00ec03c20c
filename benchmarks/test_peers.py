"""peers.py in miniature: each peer trains some seconds, goes on after kill -9, is measured; the table."""
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import ladder
import peers
import pytest
import rdtf
import torch
import train
from data import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with untrained autoencoders: f = 4 for ours, f = 8 for the paper's recipe."""
    folder = tmp_path_factory.mktemp("peers")
    for name, settings in (("ours", rdtf.PRESETS["tiny"]), ("paper", peers.PAPER)):
        cfg = rdtf.Config(**settings)
        content = {"vae": rdtf.AutoencoderKL(cfg).state_dict(), "config": asdict(cfg)}
        torch.save(content, folder / f"{name}.pt")
    return folder


def words(folder, name, minutes):
    flags = "--data synthetic:40 --measure synthetic:60 --count 1 --samples 1 --batch-size 1 " \
            "--save-every 2 --vdp-dim 8 --vdp-steps 2"
    return ["run", name, "--minutes", str(minutes), "--out", str(folder / "runs"), "--vae",
            str(folder / "ours.pt"), "--paper-vae", str(folder / "paper.pt"), "--networks",
            str(folder / "none"), *flags.split()]


def killed_and_resumed(folder, name, capsys):
    """A peer's run: killed after its first checkpoint, gone on with, measured; done a third time: nothing."""
    out = folder / "runs" / f"{name}-0"
    command = [sys.executable, peers.__file__]
    process = subprocess.Popen([*command, *words(folder, name, 0.2)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if (out / "last.pt").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    before = rdtf.read_weights(out / "last.pt")["step"]
    subprocess.run([*command, *words(folder, name, 0.1)], check=True, capture_output=True)
    last = train.read_lines(out / "measured.jsonl")[-1]
    assert last["seconds"] >= 6 and last["step"] >= before > 0 and (out / "samples.png").exists()
    assert ("flow" in last["modes"].get("interpolate-2", {})) == (name != "vdp")
    peers.main(words(folder, name, 0.1))
    assert "already" in capsys.readouterr().out


def test_peers_in_miniature_and_their_table(folder, capsys):
    for name in ("ours", "paper"):
        killed_and_resumed(folder, name, capsys)
    measured = json.loads(Path(folder, "runs", "ours-0", "generation.json").read_text())
    assert measured["N"] == 1
    peers.main([*words(folder, "ours", 0.1), "--samples", "2"])           # other stickers: measured anew
    assert json.loads(Path(folder, "runs", "ours-0", "generation.json").read_text())["N"] == 2
    capsys.readouterr()
    peers.main(["table", str(folder / "runs")])
    text = capsys.readouterr().out
    assert (folder / "runs" / "peers.md").read_text() == text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({row.count("|") for row in rows}) == 1
    starts = "ours-0: preset", "paper-0: the paper's", "| flow |", "| floor: other real stickers |"
    assert all(any(start in row for row in rows) for start in starts) and "motion / real" in rows[0]


def test_vdp_in_miniature(folder, capsys):
    pytest.importorskip("einops_exts", reason=peers.INSTALL)
    killed_and_resumed(folder, "vdp", capsys)
    with pytest.raises(SystemExit, match="not of vdp with --vdp-dim 16"):
        peers.main([*words(folder, "vdp", 9), "--vdp-dim", "16"])


def test_one_line_says_what_is_missing(folder, monkeypatch):
    with pytest.raises(SystemExit, match="--paper-vae FILE is missing"):
        peers.main([*words(folder, "paper", 9), "--paper-vae", "", "--out", str(folder / "x")])
    with pytest.raises(SystemExit, match="nothing measured there yet"):
        peers.main(["table", str(folder / "nothing")])
    monkeypatch.setitem(sys.modules, "video_diffusion_pytorch", None)
    with pytest.raises(DataError, match="requirements-peers.txt"):
        peers.open_vdp(None)
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__name__ == "torchvision"
