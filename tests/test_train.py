"""Claims about the training loop: exact, restartable, watchable. Runs are real ones, of a preset "micro"."""

import ast
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import run_micro
import train
from curriculum import TASKS, Curriculum
from data import DataError, Stickers

DETERMINISTIC = ("step", "model", "ema", "optimizer", "curriculum", "window", "vae", "vae_id", "config",
                 "fingerprint")
RUN = ("--log-every", "3", "--eval-every", "4")
JOINT = ("--preset", "micro64", "--steps", 10, "--lr", 1e-4, *RUN)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Clips of 1 to 8 frames; some stickers are held out."""
    stickers = Stickers.synthetic(24, 32)
    still = int(stickers.select("train")[2])
    stickers.index["count"][still] = 1
    stickers.index["keys"][still], stickers.index["keys"][still, :, 0] = -1, 0
    folder = tmp_path_factory.mktemp("data") / "store"
    stickers.save(folder)
    return folder


def go(out, store, *flags, env=None, hook=(), code=0):
    """A run to its end -> what it printed."""
    text = Path(f"{out}.txt")
    flags = ["--data", str(store), "--out", str(out), *map(str, flags)]
    process = run_micro.start(flags, str(text), env, *hook)
    process.join()
    printed = text.read_text()
    assert process.exitcode == code, printed
    return printed


@pytest.fixture(scope="session")
def vae(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("vae") / "run"
    go(out, store, "--stage", "vae", "--vae-steps", 2)
    return out / "vae.pt"


@pytest.fixture(scope="session")
def plain(store, vae, tmp_path_factory):
    """Ten undisturbed updates."""
    out = tmp_path_factory.mktemp("plain") / "run"
    go(out, store, "--vae", vae, "--steps", 10, *RUN)
    return out


def load(path):
    return torch.load(path, weights_only=True)


def flatten(x, name=""):
    if isinstance(x, dict):
        return {k: v for key, value in x.items() for k, v in flatten(value, f"{name}.{key}").items()}
    if isinstance(x, (list, tuple)):
        return {k: v for i, value in enumerate(x) for k, v in flatten(value, f"{name}.{i}").items()}
    return {name: x}


def difference(a, b):
    """Names of what differs between two checkpoints, bit for bit."""
    a, b = (flatten({k: v for k, v in x.items() if k in DETERMINISTIC}) for x in (a, b))
    assert len(a) > 100

    def same(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or x != x and y != y    # NaN

    return sorted(set(a) ^ set(b)) + [k for k in a.keys() & b.keys() if not same(a[k], b[k])]


def log_of(out):
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "time"} for x in lines]


def largest(a, b):
    """The largest difference of any parameter."""
    return max(float((a["model"][k] - b["model"][k]).abs().max()) for k in a["model"])


def ranks(out, store, *flags, hook=()):
    """Two gloo processes, as torchrun starts them; the hook is for the second."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = ["--data", str(store), "--out", str(out), *map(str, flags)]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    hooks = {"0": (), "1": hook}
    both = [run_micro.start(flags, f"{out}.txt", env | {"RANK": r, "LOCAL_RANK": r}, *hooks[r]) for r in "01"]
    for p in both:
        p.join()
    return [p.exitcode for p in both]


# ------------------------------------------------------------------------------------------------------------
# Exact


@pytest.fixture(scope="session")
def joint(store, vae, tmp_path_factory):
    """One process, batch 4."""
    out = tmp_path_factory.mktemp("joint") / "run"
    go(out, store, "--vae", vae, "--batch-size", 4, *JOINT)
    return out


def close(a, b):
    """Two logs that may differ in rounding only."""
    a, b = (flatten(x) for x in (a, b))
    assert a.keys() == b.keys() and len(a) > 20
    for k, v in a.items():
        assert v == (b[k] if isinstance(v, str) else pytest.approx(b[k], rel=1e-4, abs=1e-6)), k


def test_two_processes_equal_one_with_the_joint_batch(store, vae, joint, tmp_path):
    out = tmp_path / "run"
    assert ranks(out, store, "--vae", vae, "--batch-size", 2, *JOINT) == [0, 0]
    a, b = load(joint / "last.pt"), load(out / "last.pt")
    assert largest(a, b) < 1e-6
    assert largest(a, {"model": a["model"] | a["ema"]}) > 1e-5              # the weights did move
    # also: what is logged is a mean over ranks, and the curriculum saw the same losses
    close(log_of(joint), log_of(out))
    assert np.allclose(a["curriculum"]["losses"], b["curriculum"]["losses"], rtol=1e-5)
    stickers = Stickers.open(store)
    clips = train.Clips(stickers, stickers.select("train"), 0, 8)
    lengths = {clips[g][1] for g in range(40)}                              # what the 10 updates have seen
    assert len(lengths) > 3 and 1 in lengths


def test_accumulation_equals_one_large_batch(store, vae, joint, tmp_path):
    go(tmp_path / "run", store, "--vae", vae, "--batch-size", 1, "--accumulation", 4, *JOINT)
    assert largest(load(joint / "last.pt"), load(tmp_path / "run" / "last.pt")) < 1e-6
    close(log_of(joint), log_of(tmp_path / "run"))


def test_stopped_and_resumed_equals_undisturbed_bitwise(store, vae, plain, tmp_path):
    out, flags = tmp_path / "run", ("--vae", vae, "--steps", 10, *RUN)
    printed = go(out, store, *flags, "--max-updates", 5)                    # 5: in the middle of a log window
    assert "same command" in printed and load(out / "last.pt")["step"] == 5
    go(out, store, *flags)
    assert not difference(load(plain / "last.pt"), load(out / "last.pt"))
    assert log_of(plain) == log_of(out)


def test_workers_change_nothing(store, vae, plain, tmp_path):
    go(tmp_path / "run", store, "--vae", vae, "--steps", 10, *RUN, "--workers", 2)
    assert not difference(load(plain / "last.pt"), load(tmp_path / "run" / "last.pt"))


def test_larger_pictures_are_shrunk_or_cut_for_the_autoencoder():
    stickers = Stickers.synthetic(4, 32)
    whole, small = train.Pictures(stickers, [0], 0, 32), train.Pictures(stickers, [0], 0, 16)
    frames = torch.from_numpy(stickers.frames[:int(stickers.index["count"][0])]).float() / 255
    kinds = {"shrunk": 0, "cut": 0}
    for g in range(40):
        (x, _), (y, _) = whole[g], small[g]
        assert x.shape == (4, 32, 32) and y.shape == (4, 16, 16)
        sources = torch.cat([frames, frames.flip(-1)])
        assert (sources == x).flatten(1).all(1).any()
        shrunk = (F.interpolate(sources, 16, mode="area") - y).flatten(1).abs().amax(1).min() < 1e-6
        tiles = sources.unfold(2, 16, 1).unfold(3, 16, 1).permute(0, 2, 3, 1, 4, 5)     # n 17 17 4 16 16
        cut = (tiles == y).flatten(3).all(3).any()
        assert shrunk or cut
        kinds["shrunk" if shrunk else "cut"] += 1
    assert min(kinds.values()) >= 10


def test_samples_and_evaluation_within_change_nothing(store, vae, plain, tmp_path):
    """Sampling restores train mode, weights and random state."""
    flags = ("--vae", vae, "--steps", 10, "--log-every", 3, "--eval-every", 1, "--sample-every", 2)
    go(tmp_path / "run", store, *flags)
    assert not difference(load(plain / "last.pt"), load(tmp_path / "run" / "last.pt"))
    assert (tmp_path / "run" / "samples-0000004.png").exists()


def test_held_out_stickers_are_never_trained_on(store, tmp_path):
    """Both stages give the same weights whatever the held-out stickers look like."""
    stickers, flags = Stickers.open(store), ("--steps", 4, "--vae-steps", 2, "--eval-every", 0)
    frames = np.array(stickers.frames)
    held = stickers.select("held_out")
    assert len(held)
    for i in held:
        entry = stickers.index[i]
        frames[entry["offset"]:entry["offset"] + entry["count"]] = 7
    Stickers(frames, np.array(stickers.index), bytes(stickers.text), stickers.meta).save(tmp_path / "other")
    go(tmp_path / "a", store, *flags)
    go(tmp_path / "b", tmp_path / "other", *flags)
    for file in ("vae.pt", "last.pt"):
        assert not difference(load(tmp_path / "a" / file), load(tmp_path / "b" / file))


# ------------------------------------------------------------------------------------------------------------
# Restartable


def test_killed_twenty_times_it_ends_as_undisturbed(store, tmp_path):
    """SIGKILL at random moments and within saves, in both stages; the same command ends at the same bits."""
    flags = ("--steps", 5, "--vae-steps", 3, "--save-every", 1, "--log-every", 2, "--eval-every", 2)
    began = time.monotonic()
    go(tmp_path / "calm", store, *flags)
    calm = time.monotonic() - began
    rng, kills, round_ = random.Random(0), 0, 0
    in_save = [(n, where) for n in (1, 2) for where in ("half", "written", "renamed")]
    while kills < 20:
        out = tmp_path / f"killed{round_}"
        round_ += 1
        while True:
            hook = ("kill_in_save", *in_save.pop()) if in_save else ()
            argv = ["--data", str(store), "--out", str(out), *map(str, flags)]
            process = run_micro.start(argv, f"{out}.txt", None, *hook)
            process.join(None if hook or kills >= 20 else rng.uniform(0.02, 0.9) * calm)
            process.kill()                                                  # nothing, if it is done
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, Path(f"{out}.txt").read_text()
            kills += 1
            for file in ("vae.pt", "last.pt"):                              # never half a checkpoint
                if (out / file).exists():
                    load(out / file)
        for file in ("vae.pt", "last.pt"):
            assert not difference(load(tmp_path / "calm" / file), load(out / file))
        assert log_of(out) == log_of(tmp_path / "calm")


def test_sigterm_saves_and_exits_cleanly(store, vae, plain, tmp_path):
    out, flags = tmp_path / "run", ("--vae", vae, "--steps", 10, *RUN)
    printed = go(out, store, *flags, hook=("signal_at", int(signal.SIGTERM), 4))
    assert "stopping after this update" in printed and 5 <= load(out / "last.pt")["step"] <= 6
    go(out, store, *flags)
    assert not difference(load(plain / "last.pt"), load(out / "last.pt"))
    assert log_of(plain) == log_of(out)


def test_processes_agree_on_stopping(store, vae, plain, tmp_path):
    """A signal to one of them stops both at the same update."""
    flags = ("--vae", vae, "--steps", 8, "--batch-size", 1)
    assert ranks(tmp_path / "run", store, *flags, hook=("signal_at", int(signal.SIGTERM), 2)) == [0, 0]
    assert 3 <= load(tmp_path / "run" / "last.pt")["step"] <= 4
    assert [x.name for x in (tmp_path / "run").glob("*.pt*")] == ["last.pt"]


def test_a_second_ctrl_c_stops_at_once(capfd):
    old = train.STOP["since"]
    try:
        train.STOP["since"] = 0.0
        train.on_signal(signal.SIGINT, None)
        train.on_signal(signal.SIGINT, None)                              # torchrun passes the same Ctrl-C on
        train.STOP["since"] -= 5
        train.on_signal(signal.SIGTERM, None)
        with pytest.raises(KeyboardInterrupt):
            train.on_signal(signal.SIGINT, None)
    finally:
        train.STOP["since"] = old
    assert capfd.readouterr().err.count("stopping") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_leaves_the_old_checkpoint(store, vae, tmp_path):
    out, flags = tmp_path / "run", ("--vae", vae, "--steps", 6)
    go(out, store, *flags, "--max-updates", 2)
    before = (out / "last.pt").read_bytes()
    (out / "last.pt.tmp").symlink_to("/dev/full")                       # every write: no space left on device
    printed = go(out, store, *flags, code=2).splitlines()
    assert "last.pt: cannot be written" in printed[-1] and "No space left" in printed[-1]
    assert not any("Traceback" in x for x in printed)
    assert (out / "last.pt").read_bytes() == before
    go(out, store, *flags)
    assert load(out / "last.pt")["step"] == 6


def test_a_finished_run_says_so_and_is_left_alone(store, vae, plain):
    before = (plain / "last.pt").read_bytes(), (plain / "log.jsonl").read_bytes()
    printed = go(plain, store, "--vae", vae, "--steps", 10, *RUN)
    assert "already" in printed and "python sample.py --ckpt" in printed
    assert before == ((plain / "last.pt").read_bytes(), (plain / "log.jsonl").read_bytes())


def test_a_finished_run_has_everything(plain):
    files = {x.name for x in plain.iterdir()}
    assert {"last.pt", "log.jsonl", "samples.png", "loss.png"} <= files
    assert {"t2v.webp", "it2v.webp", "predict_post.webp", "interpolate.webp"} <= files
    assert not any(x.endswith(".tmp") for x in files)


def test_a_log_has_one_line_per_update_and_kind_and_is_json(plain):
    lines = log_of(plain)
    assert [x["step"] for x in lines if x["stage"] == "main"] == [3, 6, 9, 10]
    assert [x["step"] for x in lines if x["stage"] == "eval"] == [4, 8, 10]
    history = load(plain / "last.pt")["curriculum"]["losses"]
    for line, first in zip([x for x in lines if x["stage"] == "main"], (0, 3, 6, 9)):
        assert line["loss"] == pytest.approx(np.mean(history[first:first + 3]))
    for text in (plain / "log.jsonl").read_text().splitlines():
        spent = json.loads(text).get("time")
        if spent:                                                           # two clips per update
            assert spent["seconds"] > 0 and 0 <= spent["data"] <= 1
            count = spent["samples_per_second"] * spent["seconds"]
            assert count == pytest.approx(2 * (3 if json.loads(text)["step"] < 10 else 1), rel=0.05)


def test_trim_log(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [dict(step=s, stage=x) for s, x in ((9, "vae"), (2, "main"), (3, "main"), (3, "eval"))]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 4, "sta')
    train.trim_log(path, "main", 2)
    assert [json.loads(x) for x in path.read_text().splitlines()] == lines[:2]
    train.trim_log(path, "vae", 4)
    assert [json.loads(x) for x in path.read_text().splitlines()] == lines[1:2]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoints_are_plain_dicts_that_carry_everything(plain):
    data = load(plain / "last.pt")
    assert {"format", "stage", "step", "config", "model", "ema", "optimizer", "curriculum", "vae", "vae_id",
            "fingerprint", "text_encoder", "args"} <= set(data)
    plain_types = (torch.Tensor, int, float, str, bool, type(None))
    assert all(isinstance(x, plain_types) for x in flatten(data).values())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["last.pt", "vae.pt"])
def test_a_malicious_pickle_is_refused(store, vae, tmp_path, file, capsys, quiet_signals):
    out = tmp_path / "run"
    out.mkdir()
    torch.save({"format": 1, "stage": file[:-3], "x": Malicious(tmp_path / "harmed")}, out / file)
    torch.load(out / file, weights_only=False)                              # it would work ...
    (tmp_path / "harmed").unlink()
    flags = ["--vae", str(vae)] if file == "last.pt" else []
    error = refused(["--data", str(store), "--out", str(out), *flags], capsys)
    assert file in error and "safely" in error and not (tmp_path / "harmed").exists()       # ... but not here


def test_ema_is_fp32_and_follows_its_recurrence(store, vae, tmp_path):
    go(tmp_path / "run", store, "--vae", vae, "--steps", 3, "--keep-every", 1, "--precision", "bf16")
    a, b = (load(tmp_path / "run" / f"last-000000{i}.pt") for i in (1, 2))
    decay = train.ema_decay(1, 0.9)
    for name, value in b["ema"].items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, a["ema"][name] * decay + b["model"][name] * (1 - decay), atol=1e-6), name


# ------------------------------------------------------------------------------------------------------------
# Divergence


def test_non_finite_losses_stop_the_run_with_advice(store, vae, tmp_path):
    flags = ("--vae", vae, "--steps", 9, "--patience", 3, "--save-every", 1, "--log-every", 1)
    out = tmp_path / "run"
    printed = go(out, store, *flags, hook=("nan_losses", 4, 99), code=2)
    assert "--lr" in printed.splitlines()[-1] and "3 update(s)" in printed.splitlines()[-1]
    data = load(out / "last.pt")
    assert data["step"] == 4 and all(torch.isfinite(x).all() for x in data["model"].values())
    assert any(x["loss"] is None for x in log_of(out))


def test_a_few_non_finite_losses_do_no_harm(store, vae, tmp_path):
    flags = ("--vae", vae, "--steps", 6, "--patience", 3, "--save-every", 1)
    go(tmp_path / "run", store, *flags, hook=("nan_losses", 2, 3))
    data = load(tmp_path / "run" / "last.pt")
    assert data["step"] == 6
    assert all(torch.isfinite(x).all() for x in [*data["model"].values(), *data["ema"].values()])
    assert np.isnan(data["curriculum"]["losses"]).tolist() == [False, False, True, True, False, False]


# ------------------------------------------------------------------------------------------------------------
# Pure functions


def test_schedules_are_pure_functions_of_the_step():
    lr = [train.learning_rate(s, 2.0, 4, "cosine", 20) for s in range(21)]
    assert lr[:3] == pytest.approx([0.5, 0.99414, 1.46506], abs=1e-4) and lr[20] == pytest.approx(0.1)
    assert max(lr) <= 2.0 and lr[4:] == sorted(lr[4:], reverse=True)
    assert [train.learning_rate(s, 2.0, 0, "constant", 20) for s in (0, 7, 19)] == [2.0] * 3     # the paper's
    assert train.ema_decay(0, 0.999) == 0.1 and train.ema_decay(10 ** 6, 0.999) == 0.999


def test_every_sticker_once_per_epoch_and_ranks_share_an_update():
    items = np.array([3, 5, 8, 13, 21])
    for epoch in range(3):
        assert sorted(train.item_of(items, 0, 5 * epoch + i) for i in range(5)) == items.tolist()
    one = [train.global_indices(7, m, 6, 2, Namespace(world=1, rank=0)) for m in range(2)]
    two = [train.global_indices(7, m, 3, 2, Namespace(world=2, rank=r)) for m in range(2) for r in range(2)]
    assert sum(one, []) == sum(two, []) == list(range(84, 96))


@pytest.mark.parametrize("tasks", [TASKS, ("predict_post", "interpolate")])
def test_the_validation_batch_is_fixed_and_has_the_trained_tasks_only(store, tasks):
    stickers = Stickers.open(store)
    cfg = train.Config(**run_micro.rdtf.PRESETS["micro"])
    text = run_micro.rdtf.ByteText(cfg)
    held = stickers.select("held_out")
    (a, groups), (b, _) = (train.validation_batch(stickers, held, text, tasks, 8, count=12) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [TASKS[i] for i in groups] == [t for t in tasks for _ in range(12 // len(tasks))]
    each = 12 // len(tasks)
    assert torch.equal(a["x0"][:each], a["x0"][each:2 * each])              # the tasks see the same clips
    assert int(a["t"].max()) >= 750 and int(a["t"].min()) <= 250


def test_words_reach_the_network_and_the_empty_caption_is_zeros():
    torch.manual_seed(0)
    text = run_micro.rdtf.ByteText(train.Config(**run_micro.rdtf.PRESETS["micro"]))             # 16 bytes
    tok = text.tokenize(["a red heart in the sky", "red", "", "ReD", "红心"])
    long, short, none, case, chinese = tok
    assert bytes(long[:, 0].tolist()) == b"a red heart in t" and bytes(short[:4, 0].tolist()) == b"red "
    assert len(set(long[2:6, 1].tolist())) == 1                                         # one row a word
    assert torch.equal(long[2:6, 1], short[:4, 1]) and not none.any()
    assert long[0, 1] != long[2, 1] and torch.equal(short, case) and (chinese[:7, 0] > 0).all()
    states = text(tok)
    assert (states[2] == 0).all() and (states[1, 4:] == 0).all() and (states[1, :4] != 0).any(1).all()
    assert (states[0, :4] - states[1, :4]).square().mean() > 0.1


def test_no_growth_of_the_text_encoder_can_drown_the_words():
    """Training lets the residual stream grow a common vector of 20 times the words' size (measured on the
    procedural set): after the last LayerNorm, captions then differ by 1 % of their variance and nothing is
    learned from them."""
    torch.manual_seed(0)
    text = run_micro.rdtf.ByteText(train.Config(**run_micro.rdtf.PRESETS["micro"])).requires_grad_(False)
    red, blue = text.tokenize(["big red star", "big sky star"])             # differ in bytes 4, 5 and 6

    def difference():
        a, b = text(torch.stack([red, blue]))
        return (a - b)[4:7].square().mean().item()
    before = difference()
    text.blocks[0].ff.out.bias += 40 * torch.randn_like(text.blocks[0].ff.out.bias)
    assert difference() > before / 4                                        # without a way around: 1/600


def test_pooled_text_is_the_mean_token_and_nothing_without_a_caption():
    rdtf = run_micro.rdtf
    torch.manual_seed(0)
    cfg = train.Config(**{**rdtf.PRESETS["micro64"], "pooled_text": True})
    model = rdtf.RDTF(cfg).requires_grad_(False)
    states = model.text(model.text.tokenize(["red", "", "a red heart"]))    # b n d, zeros past the end
    clip = torch.zeros(3, cfg.frames, cfg.latent_channels, 8, 8)
    pooled = model.net.condition(clip, states).pooled
    expected = [model.net.pool(states[i, :n].mean(0)) for i, n in ((0, 4), (2, 12))]
    assert torch.allclose(pooled[[0, 2]], torch.stack(expected), atol=1e-5) and (pooled[1] == 0).all()
    torch.nn.init.normal_(model.net.conv_out.weight)
    for layer in model.net.layers():                                        # cross-attention says nothing ...
        assert (layer.spatial is None) or (layer.spatial.proj_out.weight == 0).all()
    for block in (m for m in model.modules() if isinstance(m, rdtf.ResBlock)):
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, t = torch.randn(1, *clip.shape[1:]).expand(3, -1, -1, -1, -1), torch.full((3,), 500)
    out = model.net(x, t, clip, states)
    assert not torch.allclose(out[0], out[2], atol=1e-3)                    # ... the caption arrives anyway


def test_a_subset_of_tasks_trains_and_samples_it_only(store, vae, tmp_path):
    out = tmp_path / "run"
    flags = ("--tasks", "interpolate,predict_pre", "--steps", 4, "--log-every", 1, "--eval-every", 2)
    go(out, store, "--vae", vae, *flags)
    for line in log_of(out):
        named = set(line) | set(line.get("mix", {})) | set(line.get("groups", {}))
        assert named & set(TASKS) <= {"interpolate", "predict_pre"}
    assert {x.name for x in out.glob("*.webp")} == {"interpolate.webp"}


def finished(store, task, **flags):
    """What `finish` makes of 2,000 samples of one clip, all of one task -> its kwargs, the captions seen."""
    stickers, seen = Stickers.open(store), []
    text = Namespace(tokenize=lambda texts: seen.extend(texts))
    args = Namespace(**{"seed": 0, "drop": 0.0, "word_drop": 0.0, "high_noise": 1.0, **flags})
    clips = train.Clips(stickers, stickers.select("train"), 0, 8)
    batch = train.collate([clips[0][:3] + (g,) for g in range(2000)])
    curriculum = Curriculum("none", 1, (task,))
    kwargs, _ = train.finish(batch, text, curriculum, curriculum.weights(0), args, 8)
    return kwargs, seen


def test_dropping_is_decided_per_sample_by_its_number(store):
    kwargs, seen = finished(store, "it2v", drop=0.1)
    no_text, no_image = np.array([x == "" for x in seen]), ~kwargs["cond_mask"].any(1).numpy()
    assert abs(no_text.mean() - 0.2) < 0.03 and abs(no_image.mean() - 0.1) < 0.03
    assert (no_text | ~no_image).all()                                      # an image is never dropped alone


@pytest.mark.parametrize("task, power, above", [("t2v", 1.0, 0.2), ("t2v", 3.0, 0.488), ("it2v", 3.0, 0.2)])
def test_noise_steps_are_uniform_unless_high_noise_is_asked_for_text_alone(store, task, power, above):
    t = finished(store, task, high_noise=power)[0]["t"]
    assert abs((t >= 800).float().mean().item() - above) < 0.04 and 0 <= int(t.min()) and int(t.max()) <= 999
    assert (t < 100).any() and (t > 900).any()


# ------------------------------------------------------------------------------------------------------------
# Flags, plan, bad input


def test_every_flag_is_read_and_has_help():
    tree = ast.parse(Path(train.__file__).read_text())
    loads = [x for x in ast.walk(tree) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Load)]
    read = {x.attr for x in loads if "args" in (getattr(x.value, "id", None), getattr(x.value, "attr", None))}
    for action in train.parser()._actions:
        assert action.help and len(action.help) > 3, action.dest
        assert action.dest in read | {"help"}, f"--{action.dest} is never read"
    texts = train.parser().format_help()
    for preset, recipe in train.RECIPES.items():
        assert set(recipe) <= {a.dest for a in train.parser()._actions}, preset
    assert texts.count("default: ") >= len(train.parser()._actions) - 12


def test_dry_run_writes_nothing(store, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    text, old = str(tmp_path / "printed"), os.getcwd()
    os.chdir(work)
    try:
        process = run_micro.start(["--data", str(store), "--dry-run", "--tensorboard"], text)
        process.join()
    finally:
        os.chdir(old)
    printed = Path(text).read_text()
    assert process.exitcode == 0, printed
    for part in ("parameters: ", "memory per process: ", "activations", "clips per update", "hours"):
        assert part in printed
    assert not list(work.iterdir())


@pytest.fixture
def quiet_signals():
    """train.main() in this process sets handlers; put pytest's back."""
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in old.items():
        signal.signal(s, handler)


def refused(flags, capsys):
    """-> the one line on stderr."""
    old, sys.argv = sys.argv, ["train.py", "--preset", "micro", "--device", "cpu", *map(str, flags)]
    try:
        with pytest.raises(SystemExit) as end:
            train.main()
    finally:
        sys.argv = old
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("train.py: ") and "\n" not in error, error
    return error


BAD = {
    "no folder": (["--data", "{tmp}/none"], "none"),
    "empty folder": (["--data", "{tmp}"], "{tmp}"),
    "preset": (["--preset", "huge"], "tiny, base, paper"),
    "task": (["--tasks", "t2v,dance"], "predict_post"),
    "batch": (["--batch-size", "0"], "--batch-size 0"),
    "lr": (["--lr", "-1"], "--lr -1"),
    "ema": (["--ema", "1.5"], "0 to 1"),
    "no such vae": (["--vae", "{tmp}/none.pt"], "none.pt"),
    "no autoencoder": (["--vae", "{tmp}/file"], "{tmp}/file"),
    "no vae steps": (["--vae-steps", "0"], "--vae"),
    "out is a file": (["--out", "{tmp}/file/run"], "{tmp}/file"),
    "other vae": (["--out", "{run}", "--vae", "{other}"], "another autoencoder"),
    "other network": (["--out", "{run}", "--vae", "{vae}", "--temporal", "conv3d"], "temporal = sti"),
    "no such start": (["--init", "{tmp}/none.pt"], "--init {tmp}/none.pt: no such file"),
    "start is no checkpoint": (["--init", "{tmp}/file"], "--init {tmp}/file: not an autoencoder"),
    "start is an autoencoder": (["--init", "{vae}"], "--init {vae}: an autoencoder alone"),
    "start of another network": (["--init", "{run}/last.pt", "--temporal", "conv3d"], "temporal = sti"),
    "start and new vae": (["--init", "{run}/last.pt", "--vae", "train"], "--vae train: its autoencoder"),
    "start of another vae": (["--init", "{run}/last.pt", "--vae", "{other}"], "leave --vae out"),
    "device": (["--device", "cuda:77"], "--device cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, store, vae, plain, tmp_path, capsys, quiet_signals):
    (tmp_path / "file").write_text("no folder, no checkpoint")
    other = tmp_path / "other.pt"
    if "{other}" in BAD[case][0]:
        data = load(vae)
        data["vae"]["mean"] += 1
        torch.save(data, other)
    flags, expected = BAD[case]
    if case == "empty folder":
        (tmp_path / "file").unlink()
    places = dict(tmp=tmp_path, run=plain, vae=vae, other=other)
    flags = ["--data", str(store), "--out", str(tmp_path / "out"), *(x.format(**places) for x in flags)]
    assert expected.format(**places) in refused(flags, capsys)


def test_the_command_line_gives_exit_code_two(tmp_path):
    """The one test that starts train.py itself."""
    command = [sys.executable, train.__file__, "--data", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout.count("\n") == 0
    assert re.fullmatch(r"train\.py: .*none.*\n", done.stderr)


def test_a_failed_write_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    train.save_checkpoint(path, {"x": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="last.pt.*No space left.*intact"):
        train.save_checkpoint(path, {"x": 2})
    assert load(path) == {"x": 1} and [x.name for x in tmp_path.iterdir()] == ["last.pt"]


def test_exports_are_half_precision_and_can_be_used(store, vae, plain, tmp_path, monkeypatch, capsys):
    def export(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()

    export("--export", tmp_path / "a" / "vae.pt", "--stage", "vae", "--out", vae.parent)
    export("--export", tmp_path / "all.pt", "--out", plain)
    whole, small = load(plain / "last.pt"), load(tmp_path / "all.pt")
    assert small["ema"] == {} and "optimizer" not in small and "optimizer" not in load(tmp_path / "a/vae.pt")
    for name, averaged in whole["ema"].items():
        assert small["model"][name].dtype == torch.float16
        assert torch.equal(small["model"][name], averaged.half())
    x = torch.rand(1, 4, 32, 32)
    for file in ("a/vae.pt", "all.pt"):
        with torch.no_grad():
            z, exact = (train.load_vae(path).encode(x) for path in (tmp_path / file, vae))
        assert torch.allclose(z, exact, atol=0.02)
    # a run that starts from it: with no rate the weights stay, and its autoencoder comes along
    out, flags = tmp_path / "run", ("--init", tmp_path / "all.pt", "--lr", 0, "--steps", 1)
    go(out, store, *flags)
    for name, value in load(out / "last.pt")["model"].items():
        assert torch.equal(value, small["model"][name].float()), name
    (tmp_path / "all.pt").rename(tmp_path / "moved.pt")
    go(out, store, "--vae", tmp_path / "moved.pt", "--lr", 0, "--steps", 2)     # resumed: not needed any more
    assert load(out / "last.pt")["step"] == 2
    with pytest.raises(SystemExit):
        export("--export", tmp_path / "b.pt", "--out", tmp_path / "nothing")
    assert "train first" in capsys.readouterr().err
