"""Claims about the training loop: exact, restartable, watchable. Runs are real ones, of small presets."""

import ast
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rdtf
import run_micro
import train
from curriculum import TASKS, Curriculum
from data import DataError, Stickers, make_meta, open_stickers, open_store, write_store

DETERMINISTIC = ("step", "model", "ema", "optimizers", "curriculum", "vae", "vae_id", "config", "fingerprint")
RUN = ("--log-every", "3", "--eval-every", "4")
JOINT = ("--preset", "micro64", "--steps", 6, "--lr", 1e-4, *RUN)


def save_store(stickers, out):
    parts = stickers.shards[0], np.array(stickers.index), np.array(stickers.text), []
    return write_store(out, make_meta(32, 8), str(out), 1, lambda i, seen: parts, lambda left_out: None)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Clips of 1 to 8 frames; some stickers are held out."""
    stickers = open_stickers("synthetic:24", 32)
    still = int(stickers.select("train")[2])
    stickers.index["count"][still] = 1
    stickers.index["keys"][still], stickers.index["keys"][still, :, 0] = -1, 0
    folder = tmp_path_factory.mktemp("data") / "store"
    save_store(stickers, folder)
    return folder


def begin(out, data, flags, env=None, hooks=(), program="train"):
    data = [str(data)] if isinstance(data, (str, Path)) else list(map(str, data))
    flags = ["--data", *data, "--out", str(out), *map(str, flags)]
    return run_micro.start(flags, f"{out}.txt", env, hooks, program)


def go(out, data, *flags, hooks=(), code=0, program="train"):
    """A run to its end -> what it printed."""
    process = begin(out, data, flags, None, hooks, program)
    process.join()
    printed = Path(f"{out}.txt").read_text()
    assert process.exitcode == code, printed
    return printed


def ranks(out, data, *flags, hooks=((), ())):
    """Two gloo processes, as torchrun starts them; hooks of each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [begin(out, data, flags, env | {"RANK": str(r), "LOCAL_RANK": str(r)}, hooks[r]) for r in (0, 1)]
    for p in both:
        p.join()
    assert [p.exitcode for p in both] == [0, 0], Path(f"{out}.txt").read_text()


@pytest.fixture(scope="session")
def vae(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("vae") / "run"
    go(out, store, "--steps", 2, program="vae")
    return out / "vae.pt"


@pytest.fixture(scope="session")
def plain(store, vae, tmp_path_factory):
    """Ten undisturbed updates."""
    out = tmp_path_factory.mktemp("plain") / "run"
    go(out, store, "--vae", vae, "--steps", 10, *RUN)
    return out


@pytest.fixture(scope="session")
def joint(store, vae, tmp_path_factory):
    """One process, batch 4, fp32."""
    out = tmp_path_factory.mktemp("joint") / "run"
    go(out, store, "--vae", vae, "--batch-size", 4, *JOINT)
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
    """Names of what differs between two checkpoint files, bit for bit."""
    a, b = (flatten({k: v for k, v in load(x).items() if k in DETERMINISTIC}) for x in (a, b))
    assert len(a) > 100

    def same(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or x != x and y != y    # NaN

    return sorted(set(a) ^ set(b)) + [k for k in a.keys() & b.keys() if not same(a[k], b[k])]


def log_of(out, *stages):
    lines = train.read_log(out / "log.jsonl")
    return [{k: v for k, v in x.items() if k != "time"} for (stage, _), x in lines.items() if stage in stages]


def largest(a, b):
    """The largest difference of any parameter."""
    return max(float((a["model"][k] - b["model"][k]).abs().max()) for k in a["model"])


def losses_of(out):
    return np.array(load(out / "last.pt")["curriculum"]["losses"])


# ------------------------------------------------------------------------------------------------------------
# Exact


def close(a, b):
    """Two logs that may differ in rounding only."""
    a, b = (flatten(x) for x in (a, b))
    assert a.keys() == b.keys() and len(a) > 20
    for k, v in a.items():
        assert v == (b[k] if isinstance(v, str) else pytest.approx(b[k], rel=1e-4, abs=1e-5)), k


def test_two_processes_and_accumulation_equal_one_with_the_joint_batch(store, vae, joint, tmp_path):
    """Also the logged means over ranks, and the curriculum's losses."""
    ranks(tmp_path / "run", store, "--vae", vae, "--batch-size", 1, "--accumulation", 2, *JOINT)
    a, b = load(joint / "last.pt"), load(tmp_path / "run" / "last.pt")
    assert largest(a, b) < 1e-6
    assert largest(a, {"model": a["model"] | a["ema"]}) > 1e-5              # the weights did move
    close(log_of(joint, "main", "eval"), log_of(tmp_path / "run", "main", "eval"))
    assert np.allclose(a["curriculum"]["losses"], b["curriculum"]["losses"], rtol=1e-5)
    stickers = open_store(store)
    order = train.Order([stickers.select("train")], [1.0], 0)
    args = Namespace(seed=0, full=0.3, min_frames=1)
    lengths = {train.draw_row(stickers, order, g, args)[1] for g in range(24)}      # what was trained on
    assert len(lengths) > 3 and 1 in lengths


def test_two_processes_in_bf16_compiled_checkpointed_accumulating_train_alike(store, vae, joint, tmp_path):
    """Nothing but rounding may differ from fp32 in one process. Clips are ragged, a second graph fails."""
    flags = ("--vae", vae, "--batch-size", 1, "--accumulation", 2, *JOINT, "--precision", "bf16", "--compile",
             "--checkpointing")
    ranks(tmp_path / "run", store, *flags, hooks=[[("eager_backend",)]] * 2)
    assert np.allclose(losses_of(joint), losses_of(tmp_path / "run"), rtol=0.03)
    a, b = load(joint / "last.pt"), load(tmp_path / "run" / "last.pt")
    assert a["model"].keys() == b["model"].keys() and 0 < largest(a, b) < 20e-4      # 6 updates of about lr
    assert all(x.dtype == torch.float32 for x in [*b["model"].values(), *b["ema"].values()])


@pytest.mark.parametrize("name", ["mps", "cuda:0"])
def test_processes_do_not_share_a_device_by_name(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"--device {name}: for one process"):
        rdtf.find_device(name)


def test_two_nodes_equal_one_process_with_the_joint_batch(store, vae, joint, tmp_path):
    """README's command for several nodes: here two torchrun agents on one machine, one process each."""
    readme = (Path(train.__file__).parent / "README.md").read_text()
    command = re.search(r"torchrun (--nnodes 2 [^\n]*) train.py", readme)[1]
    command = command.replace("--nproc_per_node 8", "--nproc_per_node 1")
    assert "HOST:29500" in command and "--nproc_per_node 1" in command
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        command = command.replace("HOST:29500", f"127.0.0.1:{s.getsockname()[1]}")
    flags = "--data", store, "--out", tmp_path / "run", "--vae", vae, "--batch-size", 2, *JOINT
    words = [sys.executable, "-m", "torch.distributed.run", *command.split(), run_micro.__file__, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen([str(x) for x in words], env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    try:
        assert [node.wait(120) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert largest(load(joint / "last.pt"), load(tmp_path / "run" / "last.pt")) < 1e-6
    close(log_of(joint, "main", "eval"), log_of(tmp_path / "run", "main", "eval"))


class Casts(TorchDispatchMode):
    """Weak references to all that is made bf16 within."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16 and args[0].is_leaf:
            self.made.append(weakref.ref(out))
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_copies_of_weights_do_not_pile_up(checkpointing):
    """Over fp32 weights: as many of them in each update, none alive after it."""
    torch.manual_seed(0)
    cfg = train.Config(**train.PRESETS["micro"])
    net, counts = train.RDTF(cfg).net, []
    net.checkpointing = checkpointing
    x, given = torch.randn(2, 2, *cfg.latent_shape)
    mask = torch.ones(2, 8, dtype=torch.bool)
    for _ in range(3):
        with Casts() as casts:
            with torch.autocast("cpu", torch.bfloat16):
                out = net(x, torch.tensor([1, 2]), given, torch.randn(2, 5, cfg.context_dim), ~mask, mask)
            assert checkpointing or any(copy() is not None for copy in casts.made)
            out.square().mean().backward()
        del out
        gc.collect()
        assert not any(copy() is not None for copy in casts.made)
        counts.append(len(casts.made))
    assert counts[0] > 20 and len(set(counts)) == 1
    assert {p.dtype for p in net.parameters()} == {p.grad.dtype for p in net.parameters()} == {torch.float32}


def test_what_is_logged_does_not_tell_how_many_frames_were_given(store, vae, tmp_path):
    """A network that has learnt nothing puts out zeros: its loss is the mean square of v, about 1 a frame."""
    flags = ("--vae", vae, "--steps", 2, "--lr", 0, "--log-every", 1, "--full", 1, "--batch-size", 8)
    for task in ("t2v", "predict_post"):                                    # all are made, or half and less
        go(tmp_path / task, store, *flags, "--tasks", task)
        losses = losses_of(tmp_path / task)
        assert (losses > 0.6).all() and (losses < 1.6).all(), (task, losses)
        assert [x["loss"] for x in log_of(tmp_path / task, "main")] == losses.tolist()


def test_accumulation_equals_one_large_batch(store, vae, joint, tmp_path):
    go(tmp_path / "run", store, "--vae", vae, "--batch-size", 1, "--accumulation", 4, *JOINT)
    assert largest(load(joint / "last.pt"), load(tmp_path / "run" / "last.pt")) < 1e-6
    close(log_of(joint, "main", "eval"), log_of(tmp_path / "run", "main", "eval"))


def test_stopped_and_resumed_equals_undisturbed_bitwise(store, vae, plain, tmp_path):
    """And sample sheets, evaluation and numbered checkpoints within change nothing."""
    out, flags = tmp_path / "run", ("--vae", vae, "--steps", 10, "--log-every", 3, "--eval-every", 2)
    flags += "--keep-every", 4
    printed = go(out, store, *flags, "--max-updates", 4)
    assert "same command" in printed and load(out / "last.pt")["step"] == 4
    go(out, store, *flags, hooks=[("checkpoint_must_go",)])
    assert not difference(plain / "last.pt", out / "last.pt")
    assert log_of(plain, "eval") == [x for x in log_of(out, "eval") if x["step"] in (4, 8, 10)]
    assert all((out / x).exists() for x in ("samples-0000004.png", "samples-0000008.webp", "last-0000008.pt"))


def test_two_processes_with_muon_on_two_sets_resume_bitwise(store, vae, tmp_path):
    """The paper's kind of network; one process makes the same run but for rounding."""
    flags = ("--preset", "paperlike", "--optimizer", "muon", "--steps", 4, "--vae", vae, "--batch-size", 1)
    data, a, b, c = [f"{store}:0.7", "synthetic:9"], tmp_path / "a", tmp_path / "b", tmp_path / "c"
    ranks(a, data, *flags)
    ranks(b, data, *flags, "--max-updates", 2)
    before = load(b / "last.pt")["model"]
    ranks(b, data, *flags)
    assert not difference(a / "last.pt", b / "last.pt")
    go(c, data, *flags[:-1], 2)
    assert np.allclose(losses_of(a), losses_of(c), rtol=0.02)
    one, two = load(c / "last.pt")["model"], load(a / "last.pt")["model"]
    apart = {k: float((one[k] - two[k]).norm() / (one[k] - before[k]).norm().clamp(min=1e-6))
             for k in one if one[k].ndim > 1}                               # of what two updates changed
    assert max(apart.values()) < 0.01, apart


@pytest.mark.parametrize("program, file", [("train", "last.pt"), ("vae", "training.pt")])
def test_held_out_stickers_are_never_trained_on(store, vae, tmp_path, program, file):
    """The weights are the same whatever the held-out stickers look like."""
    stickers, flags = open_store(store), ("--steps", 3)
    flags += ("--vae", vae, "--eval-every", 0) if program == "train" else ()
    frames, held = np.array(stickers.shards[0]), stickers.select("held_out")
    assert len(held)
    for i in held:
        entry = stickers.index[i]
        frames[entry["offset"]:entry["offset"] + entry["count"]] = 7
    save_store(Stickers([frames], stickers.index, stickers.text, stickers.meta), tmp_path / "other")
    go(tmp_path / "a", store, *flags, program=program)
    go(tmp_path / "b", tmp_path / "other", *flags, program=program)
    assert not difference(tmp_path / "a" / file, tmp_path / "b" / file)


# ------------------------------------------------------------------------------------------------------------
# Restartable


def test_killed_in_saves_it_ends_as_undisturbed(store, vae, tmp_path):
    """SIGKILL within saves; the same command ends at the same bits."""
    flags = ("--steps", 6, "--vae", vae, "--save-every", 1, "--eval-every", 6)
    go(tmp_path / "calm", store, *flags)
    out = tmp_path / "killed"
    for place in ((1, "half"), (2, "written"), (2, "renamed"), (1, "written"), (2, "half"), (1, "renamed")):
        process = begin(out, store, flags, None, [("kill_in_save", *place)])
        process.join()
        assert process.exitcode == -signal.SIGKILL, Path(f"{out}.txt").read_text()
        for file in out.glob("*.pt"):                                       # never half a checkpoint
            load(file)
    assert load(out / "last.pt")["step"] == 5
    go(out, store, *flags)
    assert not difference(tmp_path / "calm" / "last.pt", out / "last.pt")
    assert log_of(out, "eval") == log_of(tmp_path / "calm", "eval")
    assert not list(out.glob("*.tmp"))


def test_a_signal_saves_and_ends_both_processes_at_the_same_update(store, vae, plain, tmp_path):
    out, flags = tmp_path / "run", ("--vae", vae, "--steps", 10, "--batch-size", 1)
    ranks(out, store, *flags, hooks=[(), [("signal_at", int(signal.SIGTERM), "make_batch", 4)]])
    assert "stopping after this update" in Path(f"{out}.txt").read_text()
    assert load(out / "last.pt")["step"] == 5
    assert [x.name for x in out.glob("*.pt*")] == ["last.pt"]
    go(tmp_path / "one", store, "--vae", vae, "--steps", 10, *RUN,
       hooks=[("signal_at", int(signal.SIGINT), "make_batch", 4)])
    go(tmp_path / "one", store, "--vae", vae, "--steps", 10, *RUN)
    assert not difference(plain / "last.pt", tmp_path / "one" / "last.pt")


def test_a_signal_outside_the_loop_ends_at_once(store, vae, tmp_path):
    for name in ("open_data", "open_vae"):
        hooks = [("signal_at", int(signal.SIGTERM), name, 0)]
        process = begin(tmp_path / name, store, ("--vae", vae), None, hooks)
        process.join()
        assert process.exitcode == -signal.SIGTERM
    hooks = [("signal_at", int(signal.SIGINT), "open_vae", 0)]
    printed = go(tmp_path / "c", store, "--vae", vae, hooks=hooks, code=130)
    assert "stopped at once" in printed and "Traceback" not in printed


def test_a_second_ctrl_c_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.stop_on_signals():
        train.on_signal(signal.SIGINT, None)
        train.on_signal(signal.SIGINT, None)                                # torchrun repeats it
        train.STOP["since"] -= 5
        train.on_signal(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGINT) is train.on_signal
        train.on_signal(signal.SIGINT, None)
    assert capfd.readouterr().err.count("stopping") == 1 and signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_leaves_the_old_checkpoint(store, vae, tmp_path):
    out, flags = tmp_path / "run", ("--vae", vae, "--steps", 4)
    go(out, store, *flags, "--max-updates", 2)
    before = (out / "last.pt").read_bytes()
    (out / "last.pt.tmp").symlink_to("/dev/full")                           # no space left on device
    printed = go(out, store, *flags, code=2).splitlines()
    assert "last.pt: cannot be written" in printed[-1] and "No space left" in printed[-1]
    assert not any("Traceback" in x for x in printed) and (out / "last.pt").read_bytes() == before


def test_a_finished_run_has_everything_says_so_and_is_left_alone(store, vae, plain):
    files = {x.name for x in plain.iterdir()}
    assert {"last.pt", "log.jsonl", "samples.png", "samples.webp", "loss.png"} <= files
    assert {f"{task}.webp" for task in TASKS} <= files and not any(x.endswith(".tmp") for x in files)
    kept = (plain / "last.pt").read_bytes(), (plain / "log.jsonl").read_bytes()
    printed = go(plain, store, "--vae", vae, "--steps", 10, *RUN)
    assert "already" in printed and "python sample.py --ckpt" in printed
    assert kept == ((plain / "last.pt").read_bytes(), (plain / "log.jsonl").read_bytes())


def test_the_log_holds_means_shares_of_time_and_ev(plain):
    lines, history = log_of(plain, "main", "eval"), losses_of(plain)
    train_lines, held = ([x for x in lines if x["stage"] == stage] for stage in ("main", "eval"))
    assert [x["step"] for x in train_lines] == [3, 6, 9, 10] and [x["step"] for x in held] == [4, 8, 10]
    for line, first in zip(train_lines, (0, 3, 6, 9)):
        assert line["loss"] == pytest.approx(np.mean(history[first:first + 3]))
        assert sum(line["mix"].values()) == pytest.approx(1, abs=1e-3)
    for line in held:
        assert set(TASKS) <= set(line) and set(line["ev"]) == set(TASKS) - {"t2v"}
        assert line["loss"] == pytest.approx(np.mean([line[t] for t in TASKS]))
    for text in (plain / "log.jsonl").read_text().splitlines():
        spent = json.loads(text).get("time")
        if spent:                                                           # two clips per update
            assert spent["seconds"] > 0 and 0 <= spent["data"] <= 1
            count = spent["samples_per_second"] * spent["seconds"]
            assert count == pytest.approx(2 * (3 if json.loads(text)["step"] < 10 else 1), rel=0.05)


def test_of_a_step_the_last_line_counts_and_broken_lines_none(tmp_path):
    path = tmp_path / "log.jsonl"
    train.write_line(path, {"step": 1, "stage": "main", "loss": float("nan")})
    train.write_line(path, {"step": 2, "stage": "main", "loss": 1.0})
    with open(path, "a") as f:
        f.write('{"step": 3, "sta\n[1]\n')
    train.write_line(path, {"step": 2, "stage": "main", "loss": 2.0})
    assert [x["loss"] for x in train.read_log(path).values()] == [None, 2.0]
    train.plot_log(path, tmp_path / "loss.png")                             # whatever is in it


# ------------------------------------------------------------------------------------------------------------
# Changed flags, other sets, other tasks


def test_averaged_weights_begin_as_the_loaded_ones(store, vae, plain, tmp_path):
    """--ema after --ema 0; other flags change on the way, too, and the flag of weight decay counts."""
    out = tmp_path / "run"
    go(out, store, "--vae", vae, "--steps", 4, "--ema", 0, "--lr", 0.02)
    assert not largest({"model": load(out / "last.pt")["ema"]}, load(out / "last.pt"))
    changed = ("--ema", 0.5, "--tasks", "t2v,interpolate", "--batch-size", 1, "--accumulation", 2,
               "--weight-decay", 0.5, "--min-frames", 2, "--curriculum", "linear")
    go(out, [store, "synthetic:5:0.2"], "--vae", vae, "--steps", 6, "--lr", 1e-3, *changed)
    data, params = load(out / "last.pt"), [0.0, 0.0]
    torch.manual_seed(0)
    start = dict(train.RDTF(train.Config(**data["config"])).named_parameters())
    for name, x in data["ema"].items():
        params[0] = max(params[0], float((x - data["model"][name]).abs().max()))
        params[1] = max(params[1], float((x - start[name].detach()).abs().max()))
    assert params[0] < 0.003 < 0.02 < params[1]                             # near the weights, not the start
    assert {g["weight_decay"] for g in data["optimizers"][0]["param_groups"]} == {0.5}
    assert len(data["curriculum"]["losses"]) == 6 and "the data changed" in Path(f"{out}.txt").read_text()


def test_a_task_is_one_row_of_the_table(store, vae, tmp_path):
    """A seventh row trains, is evaluated, sampled and plotted, with no other change."""
    out = tmp_path / "run"
    go(out, store, "--vae", vae, "--steps", 4, "--log-every", 1, "--eval-every", 2, hooks=[("seventh_task",)])
    assert all("between" in x and "between" in x["ev"] for x in log_of(out, "eval"))
    assert all("between" in x["mix"] for x in log_of(out, "main")) and (out / "between.webp").exists()
    drawn = []
    with pytest.MonkeyPatch.context() as m:
        m.setitem(TASKS, "between", TASKS["t2v"])
        m.setattr(train.ImageDraw.ImageDraw, "text", lambda self, xy, text, *more: drawn.append(text))
        train.plot_log(out / "log.jsonl", tmp_path / "loss.png")
    assert drawn.count("between") == drawn.count("interpolate") == 2        # of the loss and of EV


@pytest.mark.parametrize("tasks", ["interpolate,predict_pre", "i2v"])
def test_a_subset_of_tasks_trains_and_samples_it_only(store, vae, tmp_path, tasks):
    """With i2v alone a still would have nothing to make: it is left out."""
    out = tmp_path / "run"
    go(out, store, "--vae", vae, "--tasks", tasks, "--steps", 4, "--batch-size", 6, "--log-every", 1)
    for line in log_of(out, "main", "eval"):
        named = set(line) | set(line.get("mix", {}))
        assert named & set(TASKS) <= set(tasks.split(","))
    assert {x.stem for x in out.glob("*.webp")} == {"samples", *tasks.split(",")}


def test_every_set_has_its_share_and_every_sticker_its_turn():
    groups = [np.arange(5), np.arange(5, 12), np.arange(12, 15)]
    order = train.Order(groups, [0.3, 0.69995, 0.00005], 7)
    seen = [order[g] for g in range(30_000)]
    sizes = [sum(i in set(group) for i in seen) for group in groups]
    assert sizes == [9000, 20970, 30]                                       # 0.00005 becomes 1 of 1000
    for group in groups:                                                    # once per epoch of its set
        own = np.array([i for i in seen if i in set(group)])
        for epoch in own[:len(own) // len(group) * len(group)].reshape(-1, len(group)):
            assert sorted(epoch) == sorted(group)
    assert seen[:500] == [train.Order(groups, [0.3, 0.69995, 0.00005], 7)[g] for g in range(500)]
    assert seen[:500] != [train.Order(groups, [0.3, 0.69995, 0.00005], 8)[g] for g in range(500)]


# ------------------------------------------------------------------------------------------------------------
# Divergence


def test_non_finite_losses_stop_the_run_with_advice(store, vae, tmp_path):
    flags = ("--vae", vae, "--steps", 9, "--patience", 3, "--save-every", 1, "--log-every", 1)
    out = tmp_path / "run"
    printed = go(out, store, *flags, hooks=[("nan_losses", 4, 99)], code=2)
    assert "--lr" in printed.splitlines()[-1] and "last 3 updates" in printed.splitlines()[-1]
    data = load(out / "last.pt")
    assert data["step"] == 4 and all(torch.isfinite(x).all() for x in data["model"].values())
    assert any(x["loss"] is None for x in log_of(out, "main"))
    paused = tmp_path / "paused"                                            # fault: it said nothing
    printed = go(paused, store, *flags, "--max-updates", 5, hooks=[("nan_losses", 4, 99)])
    assert "not saved: the last loss" in printed and load(paused / "last.pt")["step"] == 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_few_non_finite_losses_do_no_harm(store, vae, tmp_path, optimizer):
    flags = ("--vae", vae, "--steps", 6, "--patience", 3, "--save-every", 1, "--optimizer", optimizer)
    go(tmp_path / "run", store, *flags, hooks=[("nan_losses", 2, 3)])
    data = load(tmp_path / "run" / "last.pt")
    assert data["step"] == 6
    assert all(torch.isfinite(x).all() for x in [*data["model"].values(), *data["ema"].values()])
    assert np.isnan(data["curriculum"]["losses"]).tolist() == [False, False, True, True, False, False]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoints_are_plain_dicts_that_carry_everything(plain):
    data = load(plain / "last.pt")
    assert {"format", "stage", "step", "config", "model", "ema", "optimizers", "curriculum", "vae", "vae_id",
            "fingerprint", "text_encoder", "args"} <= set(data)
    kinds = (torch.Tensor, int, float, str, bool, type(None))
    assert all(isinstance(x, kinds) for x in flatten(data).values())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_refused(store, vae, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    torch.save({"format": 2, "stage": "main", "x": Malicious(tmp_path / "harmed")}, out / "last.pt")
    torch.load(out / "last.pt", weights_only=False)                         # it would work ...
    (tmp_path / "harmed").unlink()
    error = refused(["--data", str(store), "--out", str(out), "--vae", vae], capsys)
    assert "last.pt: no " in error and not (tmp_path / "harmed").exists()   # ... but not here


def test_ema_is_fp32_and_follows_its_recurrence(store, vae, tmp_path):
    go(tmp_path / "run", store, "--vae", vae, "--steps", 3, "--keep-every", 1, "--precision", "bf16")
    a, b = (load(tmp_path / "run" / f"last-000000{i}.pt") for i in (1, 2))
    decay = 2 / 11                                              # min(0.9, (1 + step) / (10 + step))
    for name, value in b["ema"].items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, a["ema"][name] * decay + b["model"][name] * (1 - decay), atol=1e-6), name


def test_exports_are_half_precision_and_can_be_used(store, vae, plain, tmp_path, monkeypatch, capsys):
    def export(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()

    export("--export", tmp_path / "a" / "all.pt", "--out", plain)
    (tmp_path / "a" / "all.pt").rename(tmp_path / "all.pt")
    whole, small = load(plain / "last.pt"), load(tmp_path / "all.pt")
    assert small["ema"] == {} and "optimizers" not in small
    for name, averaged in whole["ema"].items():
        assert torch.equal(small["model"][name], averaged.half())
    assert train.load_vae(tmp_path / "all.pt").fingerprint() == whole["vae_id"] == small["vae_id"]
    # neither over the run's own checkpoint nor in its place
    shutil.copy(tmp_path / "all.pt", tmp_path / "last.pt")
    for out, file, words in ((plain, plain / "last.pt", "own checkpoint"),
                             (tmp_path, "b.pt", "no main checkpoint")):
        with pytest.raises(SystemExit):
            export("--export", file, "--out", out)
        assert words in capsys.readouterr().err
    # a run that starts from it: with no rate the weights stay, and its autoencoder comes along
    out, flags = tmp_path / "run", ("--init", tmp_path / "all.pt", "--lr", 0, "--steps", 1)
    go(out, store, *flags)
    for name, value in load(out / "last.pt")["model"].items():
        assert torch.equal(value, small["model"][name].float()), name
    # the noise schedule may be another one, but not below a LoRA
    small["config"]["zero_snr"] = not small["config"].get("zero_snr", False)
    torch.save(small, tmp_path / "other.pt")
    go(tmp_path / "again", store, "--init", tmp_path / "other.pt", "--steps", 1)
    lora = ["--data", str(store), "--init", str(tmp_path / "other.pt"), "--lora", "2"]
    assert "made with zero_snr" in refused(lora, capsys)
    (tmp_path / "all.pt").rename(tmp_path / "moved.pt")
    go(out, store, "--vae", tmp_path / "moved.pt", "--lr", 0, "--steps", 2)     # resumed: not needed any more
    assert load(out / "last.pt")["step"] == 2
    with pytest.raises(SystemExit):
        export("--export", tmp_path / "b.pt", "--out", tmp_path / "nothing")
    assert "train first" in capsys.readouterr().err


def test_lora_is_a_small_file_beside_its_base_and_resumes(store, plain, tmp_path, monkeypatch, capsys):
    """The base is not touched; base + file = the run's own checkpoint; another base is refused."""
    def export(out, file):
        monkeypatch.setattr(sys, "argv", ["train.py", "--export", str(file), "--out", str(out)])
        train.main()

    base, lora, run = tmp_path / "base.pt", tmp_path / "lora.pt", tmp_path / "run"
    export(plain, base)
    flags = ("--init", base, "--lora", 2, "--lr", 0.01, "--steps", 4)
    go(run, store, *flags, "--max-updates", 2)
    go(run, store, *flags)
    go(tmp_path / "whole", store, *flags)
    a, b = load(run / "last.pt"), load(tmp_path / "whole" / "last.pt")
    for name, value in a["ema"].items():
        assert torch.equal(value, b["ema"][name]), name
        if ".lora_" not in name:
            assert torch.equal(value, load(base)["model"][name].float()), name
    export(run, lora)
    assert lora.stat().st_size < base.stat().st_size / 4
    own, beside = (train.load_model(x) for x in (run / "last.pt", base))
    before = {n: p.clone() for n, p in beside.model.state_dict().items()}
    rdtf.load_lora(lora, beside)
    for name, value in beside.model.state_dict().items():
        assert torch.allclose(value, own.model.state_dict()[name], atol=1e-4), name     # in half precision
    changed = {n for n, p in beside.model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed and all(".attn" in n or "semantic" in n for n in changed)
    with pytest.raises(ValueError, match="another checkpoint"):
        rdtf.load_lora(lora, own)
    with pytest.raises(ValueError, match="no LoRA"):
        rdtf.load_lora(base, own)
    assert "needs --init" in refused(["--data", str(store), "--lora", "2"], capsys)
    changed = [str(x) for x in ("--data", store, "--out", run, "--init", base, "--lora", 4)]
    assert "made with --lora 2" in refused(changed, capsys)
    assert "a LoRA alone" in refused(["--data", str(store), "--init", str(lora)], capsys)


# ------------------------------------------------------------------------------------------------------------
# Pure functions


def test_schedules_are_pure_functions_of_the_step():
    lr = [train.learning_rate(s, 2.0, 4, "cosine", 20) for s in range(21)]
    assert lr[:3] == pytest.approx([0.5, 0.99414, 1.46506], abs=1e-4) and lr[20] == pytest.approx(0.1)
    assert max(lr) <= 2.0 and lr[4:] == sorted(lr[4:], reverse=True)
    assert [train.learning_rate(s, 2.0, 0, "constant", 20) for s in (0, 7, 19)] == [2.0] * 3     # the paper's


def test_muon_makes_orthogonal_steps_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    m = torch.randn(2, 24, 10)
    x = train.orthogonal(m)
    assert (torch.linalg.svdvals(x) - 1).abs().max() < 0.35                 # the quintic's band
    y = m.double() / m.double().norm(dim=(1, 2), keepdim=True)              # as it is usually written
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    assert (x - y).abs().max() < 1e-3
    model = train.RDTF(train.Config(**train.PRESETS["micro"]))
    muon, adamw = train.make_optimizers(model, "muon", 0.0)
    a, b = ({id(p) for g in o.param_groups for p in g["params"]} for o in (muon, adamw))
    assert [o.param_groups[0]["share"] for o in (muon, adamw)] == [1.0, 0.1]
    assert not a & b and a | b == {id(p) for p in model.parameters()}
    names = {n for n, p in model.named_parameters() if id(p) in b}
    assert {"net.conv_in.weight", "net.conv_out.weight"} <= names
    assert all(p.ndim > 1 for p in model.parameters() if id(p) in a)


def batch_of(store, task, **flags):
    """What `make_batch` makes of 2,000 samples of one clip, all of one task -> kwargs, captions."""
    stickers, seen = open_store(store), []
    text = Namespace(tokenize=lambda texts: seen.extend(texts))
    args = Namespace(**{"seed": 0, "drop": 0.0, "text_drop": 0.0, "word_drop": 0.0, "noise_levels": "uniform",
                        "full": 0.0, "min_frames": 1, **flags})
    order = train.Order([stickers.select("train")], [1.0], 0)
    row = train.draw_row(stickers, order, 0, args)
    curriculum = Curriculum("none", 1, (task,))
    rows = [row[:3] + (g,) for g in range(2000)]
    return train.make_batch(rows, text, curriculum, curriculum.weights(0), args), seen


def test_dropping_is_decided_per_sample_by_its_number(store):
    kwargs, seen = batch_of(store, "it2v", drop=0.1, text_drop=0.3)
    no_text, no_image = np.array([x == "" for x in seen]), ~kwargs["cond_mask"].any(1).numpy()
    assert abs(no_text.mean() - 0.4) < 0.03 and abs(no_image.mean() - 0.1) < 0.03
    assert (no_text | ~no_image).all()                                      # an image is never dropped alone
    seen = batch_of(store, "t2v", drop=0.1, text_drop=0.3)[1]
    assert abs(np.mean([x == "" for x in seen]) - 0.2) < 0.03


@pytest.mark.parametrize("task, levels, above", [("t2v", "uniform", 0.2), ("it2v", "normal", 0.364),
                                                 ("t2v", "normal", 0.364)])
def test_noise_steps_are_spread_as_asked(store, task, levels, above):
    t = batch_of(store, task, noise_levels=levels)[0]["t"]
    assert abs((t >= 800).float().mean().item() - above) < 0.03 and 0 <= int(t.min()) and int(t.max()) <= 999
    assert (t < 100).any() and (t > 900).any()


def test_validation_clips_are_fixed_and_the_same_for_every_task(store):
    stickers = open_store(store)
    held = stickers.select("held_out")
    a, b = (train.validation_rows(stickers, held, ["t2v", "interpolate"]) for _ in range(2))
    assert [t for t, _ in a] == ["t2v", "interpolate"] and len(a[0][1]) == 3
    for (_, x), (_, y) in zip(a + [a[0]], b + [a[1]]):
        assert all(torch.equal(i[0], j[0]) and i[1:] == j[1:] for i, j in zip(x, y, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Flags, bad input


def test_every_flag_is_read_and_has_help():
    tree = ast.parse(Path(train.__file__).read_text())
    loads = [x for x in ast.walk(tree) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Load)]
    read = {x.attr for x in loads if "args" in (getattr(x.value, "id", None), getattr(x.value, "attr", None))}
    flags = train.parser()._actions
    for action in flags:
        assert action.help and len(action.help) > 3, action.dest
        assert action.dest in read | {"help"}, f"--{action.dest} is never read"
    for preset, recipe in train.RECIPES.items():
        assert set(recipe) <= {a.dest for a in flags}, preset
        args = train.parser().parse_args(["--preset", preset])
        train.resolve(args)
        assert all(value is not None for value in vars(args).values()), preset


@pytest.mark.parametrize("flags, world, expected", [
    (["--preset", "tiny"], 1, 16), (["--preset", "tiny"], 2, 8), (["--preset", "base"], 3, 5),
    (["--preset", "tiny"], 64, 1), (["--preset", "paper"], 16, 1), (["--batch-size", "4"], 2, 4),
    (["--lora", "4", "--init", "x.pt"], 1, 8)])
def test_processes_share_the_batch_of_a_recipe(flags, world, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    args = train.parser().parse_args(flags)
    train.resolve(args)
    assert args.batch_size == expected


def test_dry_run_writes_nothing(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = run_micro.start(["--data", str(store), "--dry-run"], "printed")
    process.join()
    printed = Path("printed").read_text()
    assert process.exitcode == 0, printed
    for part in ("parameters: ", "memory per process: ", "clips per update", "hours"):
        assert part in printed
    assert [x.name for x in tmp_path.iterdir()] == ["printed"]


def refused(flags, capsys):
    """-> the one line on stderr."""
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit) as end:
        m.setattr(sys, "argv", ["train.py", "--preset", "micro", "--device", "cpu", *map(str, flags)])
        train.main()
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("train.py: ") and "\n" not in error, error
    return error


BAD = {
    "no folder": (["--vae", "{vae}", "--data", "{tmp}/none"], "{tmp}/none: no such folder"),
    "empty folder": (["--vae", "{vae}", "--data", "{tmp}/empty"], "{tmp}/empty"),
    "shares over 1": (["--vae", "{vae}", "--data", "{store}:0.7", "{store}:0.5"], "sum to 1.2"),
    "nothing left": (["--vae", "{vae}", "--data", "{store}:0.5", "{store}:0.5", "synthetic:4"], "sum to 1"),
    "no long stickers": (["--vae", "{vae}", "--min-frames", "99"], "--min-frames"),
    "preset": (["--preset", "huge"], "--preset"),
    "task": (["--tasks", "t2v,dance"], "predict_post"),
    "batch": (["--batch-size", "0"], "--batch-size: 0: must be at least 1"),
    "lr": (["--lr", "-1"], "--lr: -1"),
    "not finite": (["--lr", "inf"], "--lr: inf"),
    "ema": (["--ema", "1.5"], "choose 0 to 1"),
    "no such flag": (["--workers", "2"], "--workers"),
    "no such vae": (["--vae", "{tmp}/none.pt"], "none.pt"),
    "no autoencoder": (["--vae", "{tmp}/file"], "{tmp}/file: no"),
    "unfinished vae": (["--vae", "{tmp}/odd.pt"], "{tmp}/odd.pt: no"),
    "no vae at all": ([], "stickers/vae.py"),
    "vae of another reduction": (["--vae", "{vae}", "--preset", "f8"], "needs f = 8"),
    "out is a file": (["--out", "{tmp}/file/run"], "{tmp}/file"),
    "other vae": (["--out", "{run}", "--vae", "{other}"], "another autoencoder"),
    "other network": (["--out", "{run}", "--vae", "{vae}", "--temporal", "conv3d"], "temporal = sti"),
    "other optimizer": (["--out", "{run}", "--vae", "{vae}", "--optimizer", "muon"], "does not fit"),
    "no such start": (["--init", "{tmp}/none.pt"], "{tmp}/none.pt: no such file"),
    "start is no checkpoint": (["--init", "{tmp}/file"], "{tmp}/file: no"),
    "start is an autoencoder": (["--init", "{vae}"], "{vae}: an autoencoder alone"),
    "start of another network": (["--init", "{run}/last.pt", "--temporal", "conv3d"], "temporal = sti"),
    "start of another vae": (["--init", "{run}/last.pt", "--vae", "{other}"], "leave --vae out"),
    "device": (["--device", "cuda:77"], "--device cpu"),
}


@pytest.fixture(scope="session")
def places(store, vae, plain, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty").mkdir()
    (tmp / "file").write_text("no folder, no checkpoint")
    data = load(vae)
    torch.save({k: v for k, v in data.items() if k != "vae"}, tmp / "odd.pt")
    data["vae"]["mean"] += 1
    torch.save(data, tmp / "other.pt")
    train.PRESETS["f8"] = train.PRESETS["micro"] | {"vae_widths": (32, 32, 32)}
    train.RECIPES["f8"] = train.RECIPES["micro"]
    return dict(tmp=tmp, store=store, run=plain, vae=vae, other=tmp / "other.pt")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, places, tmp_path, capsys):
    flags, expected = BAD[case]
    flags = ["--data", places["store"], "--out", tmp_path / "out", *(x.format(**places) for x in flags)]
    assert expected.format(**places) in refused(flags, capsys)


def test_the_command_line_gives_exit_code_two(tmp_path):
    """The one test that starts train.py itself."""
    command = [sys.executable, train.__file__, "--data", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: ") and "none" in done.stderr


def test_a_failed_write_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    train.save_checkpoint(path, {"x": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="last.pt.*No space left.*intact"):
        train.save_checkpoint(path, {"x": 2})
    assert load(path) == {"x": 1} and [x.name for x in tmp_path.iterdir()] == ["last.pt"]


def test_a_caption_that_is_the_name_of_a_task_keeps_its_truth_on_the_sheet(tmp_path, monkeypatch):
    cfg = train.Config(**train.PRESETS["micro"])
    loaded = train.Loaded(train.RDTF(cfg), train.AutoencoderKL(cfg), cfg, {})
    clip = np.zeros((8, *cfg.latent_shape[1:]), np.float16)
    stickers = Namespace(caption=lambda item: "interpolate")
    monkeypatch.setattr(train, "draw_clip", lambda *a, **k: (np.float32(clip), 8))
    sheets = {}
    monkeypatch.setattr(train, "save_sheet", lambda path, *sheet: sheets.update({path.suffix: sheet}))
    train.sample_sheet(loaded, stickers, [0], ("interpolate", "t2v"), tmp_path, "samples")
    assert sheets[".png"][1] == ["interpolate", "interpolate", "t2v"] and len(sheets[".webp"][0][0]) == 3


# ------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.parametrize("flags", [["--optimizer", "muon"], ["--checkpointing"], ["--lora", "2", "--init"]],
                         ids=["muon", "checkpointing", "lora"])
def test_an_update_reads_nothing_of_the_device_but_its_loss(store, vae, plain, tmp_path, monkeypatch, flags):
    """On "meta" tensors have a place but no content: what mixes places or reads a value raises. So an update
    (batches, network, gradients, optimizers, average) passes, up to the line that reads the loss."""
    monkeypatch.setattr(train.Context, "autocast", lambda self: nullcontext())          # knows no meta
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: adamw(*a, **k | {"fused": False}))
    monkeypatch.setattr(rdtf.AutoencoderKL, "to", lambda self, device: self)             # encodes before
    last = plain / "last.pt"
    flags = [*flags, str(last)] if "--init" in flags else [*flags, "--vae", str(vae)]
    args = train.parser().parse_args(["--preset", "micro", "--data", str(store), "--device", "meta",
                                      "--batch-size", "2", "--accumulation", "2", "--steps", "2",
                                      "--out", str(tmp_path / "run"), *flags])
    with pytest.raises(NotImplementedError, match="no data") as caught:
        train.run(args)
    frame = [x for x in caught.traceback if x.path == Path(train.__file__)][-1]
    assert "stats.tolist()" in str(frame.statement)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("flags", [[], ["--compile"]], ids=["eager", "compiled"])
def test_three_updates_on_a_gpu_resumed_and_sampled(store, tmp_path, flags):
    root, out = Path(train.__file__).parent, tmp_path / "run"
    command = [sys.executable, "train.py", "--data", "synthetic:16", "--batch-size", 2, "--device", "cuda",
               "--precision", "bf16", "--out", out, "--log-every", 1, *flags]
    for steps in (2, 3):
        subprocess.run([str(x) for x in (*command, "--steps", steps)], check=True, cwd=root)
    assert load(out / "last.pt")["step"] == 3 and all(x["loss"] for x in log_of(out, "main"))
    sample = [sys.executable, "sample.py", "--ckpt", out / "last.pt", "--text", "a red heart", "--out",
              out / "x.webp"]
    subprocess.run([str(x) for x in sample], check=True, cwd=root)
