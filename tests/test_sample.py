"""sample.py end to end through its command line, with micro checkpoints of random weights."""

import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rdtf
import sample
from data import DataError, premultiply, read_metadata, read_sticker, write_sticker
from rdtf import FORMAT, RDTF, AutoencoderKL, Config, load_model, sample_clips

MICRO = dict(size=32, widths=(32, 32), layers=1, head_dim=16, context_dim=32, text_layers=1, text_bytes=64,
             vae_widths=(32, 32), text_scale=3.0, image_scale=2.0, steps=2)
OURS = dict(narrow=True, prediction="v", residual=True, inputs=True, clean=True, pooled_text=True,
            sampler="dpm", image_scale=1.0)
TIMES = [70, 130, 100, 90, 40, 110]


def checkpoint(**settings):
    """A checkpoint as train.py saves it; every weight matters (none is left at its initial zero)."""
    torch.manual_seed(0)
    cfg = Config(**{**MICRO, **settings})
    model, vae = RDTF(cfg), AutoencoderKL(cfg)
    for p in model.parameters():
        if not p.abs().sum():
            torch.nn.init.normal_(p, std=0.05)
    ema = {k: v.detach() + 0.01 for k, v in model.named_parameters()}
    return {"format": FORMAT, "stage": "main", "step": 7, "config": asdict(cfg), "model": model.state_dict(),
            "ema": ema, "vae": vae.state_dict(), "vae_id": vae.fingerprint(), "text_encoder": [],
            "fingerprint": "x"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """micro.pt (as the paper), ours.pt, soft.webp (6 frames of soft alpha), one.webp, wide.gif (40x20)."""
    folder = tmp_path_factory.mktemp("home")
    torch.save(checkpoint(), folder / "micro.pt")
    torch.save(checkpoint(**OURS), folder / "ours.pt")
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 4), dtype=np.uint8)
    write_sticker(folder / "soft.webp", frames, TIMES)
    write_sticker(folder / "one.webp", frames[:1], 100)
    wide = np.full((3, 20, 40, 4), 255, np.uint8)
    wide[1, :, :, 0] = 0
    write_sticker(folder / "wide.gif", wide, 80)
    (folder / "broken.webp").write_bytes((folder / "soft.webp").read_bytes()[:900])
    return folder


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """An empty working folder with the files of `home` in it."""
    for file in home.iterdir():
        os.link(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cli(flags, ckpt="micro.pt"):
    sample.main(flags.split() + ["--ckpt", ckpt] * ("--ckpt" not in flags))


def fails(flags, capsys):
    """-> the one line on stderr; the exit status must be 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample.main(flags if isinstance(flags, list) else flags.split())
    err = capsys.readouterr().err
    lines = [x for x in err.splitlines() if not x.startswith(("usage:", " ", "sample.py: error:"))]
    assert stop.value.code == 2 and (len(lines) == 1 or "sample.py: error:" in err), err
    assert "Traceback" not in err
    return err


def soft():
    return read_sticker("soft.webp")[0]


def spy(monkeypatch):
    """Records what sample_clips is given and what it returns: list of (frames, cond, real, seeds, result)."""
    calls = []

    def recorded(loaded, captions, frames, cond, real, **settings):
        out = sample_clips(loaded, captions, frames, cond, real, **settings)
        calls.append((frames, np.asarray(cond), np.asarray(real), settings["seeds"], out))
        return out
    monkeypatch.setattr(sample, "sample_clips", recorded)
    return calls


# ------------------------------------------------------------------------------------------------------------
# Modes


WHERE = {   # flags -> {frame of the result: frame of the input}, frames of the result
    "--mode interpolate --input soft.webp": ({0: 0, 2: 1, 4: 2, 6: 3, 8: 4, 10: 5}, 11),
    "--mode interpolate --input soft.webp --factor 3": ({0: 0, 3: 1, 6: 2, 9: 3, 12: 4, 15: 5}, 16),
    "--mode interpolate --input soft.webp --length 4": ({0: 0, 2: 1}, 4),
    "--mode predict --input soft.webp --given 2 --out out.apng": ({i: i for i in range(6)}, 12),
    "--mode predict --input soft.webp --given 3 --backward": ({5 + i: i for i in range(6)}, 11),
    "--mode predict --input soft.webp --frames 3": ({i: i for i in range(6)}, 8),
    "--mode loop --input soft.webp": ({0: 0}, 7),
    "--mask 011001 --input soft.webp": ({1: 1, 2: 2, 5: 5}, 6),
    "--mask 1001 --image soft.webp": ({0: 0, 3: 0}, 4),
    "--mask 11010111 --input soft.webp": ({0: 0, 1: 1, 3: 2, 5: 3, 6: 4, 7: 5}, 8),
    "--mask 10 --image soft.webp --length 20": ({0: 0}, 20),       # a mask shorter than half a clip
    "--image soft.webp --length 11": ({0: 0}, 11),
}


@pytest.mark.parametrize("number, flags", list(enumerate(WHERE)))
def test_given_frames_are_pixel_equal(here, number, flags):
    where, count = WHERE[flags]
    out = "out.apng" if "apng" in flags else "sticker.webp"
    cli(flags, "ours.pt" if number % 2 else "micro.pt")
    made, truth = read_sticker(out)[0], soft()
    assert len(made) == count
    for i in range(count):
        if i in where:
            assert np.array_equal(made[i], truth[where[i]]), f"frame {i}"
        else:
            assert not any(np.array_equal(made[i], x) for x in truth)


def test_one_to_eight_frames(here):
    for n in (1, 5, 8):
        cli(f"--text cat --frames {n} --steps 1")
        assert len(read_sticker("sticker.webp")[0]) == n
        cli(f"--image one.webp --frames {n} --steps 1", "ours.pt")
        made = read_sticker("sticker.webp")[0]
        assert len(made) == n and np.array_equal(made[0], soft()[0])


def test_chained_prediction_goes_on_from_its_own_frames(here, monkeypatch):
    calls = spy(monkeypatch)
    cli("--mode predict --input soft.webp --given 3 --length 15 --steps 1")
    assert len(calls) == 2 and len(read_sticker("sticker.webp")[0]) == 15
    assert [c[1].sum() for c in calls] == [3, 3] and [c[2].sum() for c in calls] == [8, 7]
    assert torch.equal(calls[1][0][0, :3], calls[0][4][0, 5:8])
    assert calls[0][3] == calls[1][3], "one generator goes on: each window has noise of its own"
    calls.clear()
    cli("--mode predict --input soft.webp --given 3 --length 15 --backward --steps 1")
    assert torch.equal(calls[1][0][0, 4:7], calls[0][4][0, :3])          # 4 new ones before the 3 given
    assert calls[1][1][0].tolist() == [False] * 4 + [True] * 3 + [False]


def test_interpolation_windows_share_one_keyframe(here, monkeypatch):
    calls = spy(monkeypatch)
    cli("--mode interpolate --input soft.webp --steps 1")
    given = torch.from_numpy(premultiply(soft())).permute(0, 3, 1, 2) / 255
    assert [c[1][0].nonzero()[0].tolist() for c in calls] == [[0, 2, 4, 6], [0, 2, 4]]
    assert torch.equal(calls[0][0][0, 6], calls[1][0][0, 0]) and torch.equal(calls[0][0][0, 6], given[3])
    cli("--mode interpolate --input one.webp one.webp soft.webp --steps 1")      # pictures in order
    made = read_sticker("sticker.webp")
    assert len(made[0]) == 5 and all(np.array_equal(made[0][i], soft()[0]) for i in (0, 2, 4))


def test_a_loop_closes(here, monkeypatch):
    calls = spy(monkeypatch)
    cli("--mode loop --image soft.webp --frames 5 --steps 1")
    frames, cond, real, _, _ = calls[0]
    assert cond[0].nonzero()[0].tolist() == [0, 5] and real[0].sum() == 6
    assert torch.equal(frames[0, 0], frames[0, 5])
    assert len(read_sticker("sticker.webp")[0]) == 5        # the closing frame is frame 0, played next


def test_without_input_a_built_in_sticker_is_taken(here, capsys):
    path, caption = sample.BUILT_IN
    truth, times = read_sticker(path)
    torch.save(checkpoint(size=64, steps=1), "big.pt")
    cli("--ckpt big.pt")
    assert f"the built-in sticker {path.name} ({caption}), frames 1, 3, 5, .." in capsys.readouterr().out
    made, ms = read_sticker("sticker.webp")
    assert np.array_equal(made[::2], truth[::2]) and len(made) == 15 and sum(ms) == sum(times)
    cli("--ckpt big.pt --mode predict --backward")
    assert np.array_equal(read_sticker("sticker.webp")[0][4:], truth[::2])
    cli("--ckpt big.pt --mode loop")
    made, ms = read_sticker("sticker.webp")
    assert np.array_equal(made[0], truth[0]) and len(made) == 7
    assert set(ms) == {round(sum(times) / len(times))}


def test_of_an_animated_image_the_mean_time_is_kept(here):
    frames = read_sticker(sample.BUILT_IN[0])[0][:4]
    write_sticker("slow.webp", frames, [2000, 40, 60, 60])
    torch.save(checkpoint(size=64, steps=1), "big.pt")
    cli("--ckpt big.pt --image slow.webp")
    assert set(read_sticker("sticker.webp")[1]) == {540}


def test_frame_times(here):
    for flags, frames, wanted in (
            ("interpolate --factor 3", 16, None), ("interpolate --every 4", 3, [195, 195, 150]),
            ("predict", 10, [90] * 10), ("predict --duration 55", 10, [55] * 10)):
        cli(f"--input soft.webp --steps 1 --mode {flags}")
        made, ms = read_sticker("sticker.webp")
        assert len(made) == frames and (ms == wanted if wanted else sum(ms) == sum(TIMES))
    cli("--text cat --steps 1")
    assert read_sticker("sticker.webp")[1] == [125] * 8


# ------------------------------------------------------------------------------------------------------------
# sample_clips


@pytest.mark.parametrize("name", ["micro.pt", "ours.pt"])
def test_a_sticker_knows_nothing_of_its_batch_or_of_what_it_was_not_given(here, name):
    loaded, state = load_model(name), torch.get_rng_state()
    frames = torch.rand(3, 8, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    cond = np.zeros((3, 8), bool)
    cond[0, 0] = cond[1, 3:5] = True                                      # and the third is given none
    real = np.arange(8)[None] < np.array([8, 5, 3])[:, None]
    captions, seeds, how = ["cat", "", "a star"], [5, 6, 7], dict(steps=3, negative="bad", bf16=False)
    both = sample_clips(loaded, captions, frames, cond, real, seeds=seeds, **how)
    assert torch.equal(torch.get_rng_state(), state), "nobody's random numbers are used up"
    assert torch.equal(both[cond], frames[cond]) and both[~real].abs().max() == 0
    for i in range(3):
        one = sample_clips(loaded, captions[i:i + 1], frames[i:i + 1], cond[i:i + 1], real[i:i + 1],
                           seeds=seeds[i:i + 1], **how)
        assert torch.allclose(one[0], both[i], atol=1e-4)
    junk, past = frames.clone(), cond.copy()
    junk[~cond] = float("nan")
    past[1, 6] = True                                                     # "given" after the last real frame
    loaded.model.train()                                                  # nothing may hang on .training
    assert torch.equal(sample_clips(loaded, captions, junk, past, real, seeds=seeds, **how), both)


@pytest.mark.parametrize("caption, given, scales, count", [
    ("cat", True, (3, 2), 3), ("cat", True, (7.5, 7.5), 2), ("cat", True, (1, 1), 1),
    ("cat", True, (0, 0), 1), ("cat", False, (3, 2), 2), ("", True, (3, 2), 2), ("", True, (3, 1), 1),
    ("", False, (3, 2), 1)])
def test_no_pass_is_wasted_and_conditions_are_computed_once(here, monkeypatch, caption, given, scales, count):
    loaded = load_model("micro.pt")
    net, calls, conditions = loaded.model.net, [], []
    forward, condition = net.forward, net.condition
    monkeypatch.setattr(net, "forward", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k))
    monkeypatch.setattr(net, "condition", lambda *a: conditions.append(1) or condition(*a))
    cond = np.zeros((1, 8), bool)
    cond[0, 0] = given
    sample_clips(loaded, [caption], torch.rand(1, 8, 4, 32, 32), cond, steps=4, text_scale=scales[0],
                 image_scale=scales[1])
    assert calls == [count] * 4 and conditions == [1]


def test_the_caption_counts_less_the_more_frames_are_given(here, monkeypatch):
    """Unless told otherwise, and only where the network starts from the frames."""
    scales, denoiser = [], rdtf.denoiser
    monkeypatch.setattr(rdtf, "denoiser", lambda *a: scales.append(a[6]) or denoiser(*a))
    for name, more in (("ours.pt", {}), ("ours.pt", {"negative": "dog"}), ("ours.pt", {"text_scale": 2.0}),
                       ("micro.pt", {})):
        loaded = load_model(name)
        for count in range(4):
            cond = np.arange(8)[None] < count
            sample_clips(loaded, ["cat"], torch.rand(1, 8, 4, 32, 32), cond, steps=1, **more)
    assert scales == [3, 2, 1, 1, 3, 3, 3, 3, 2, 2, 2, 2, 3, 3, 3, 3]


def test_temperature_scales_the_noise_the_first_and_the_later_one(here, monkeypatch):
    loaded, seen = load_model("micro.pt"), []
    frames, cond = torch.zeros(1, 8, 4, 32, 32), np.zeros((1, 8), bool)

    def spy(denoise, y, steps, sampler, eta, noise, *rest):
        seen.append((y, noise()))
        return y
    monkeypatch.setattr(rdtf, "sample", spy)
    for more in ({}, {"temperature": 1.0}, {"temperature": 0.5}):
        sample_clips(loaded, ["cat"], frames, cond, **more)
    sample_clips(loaded._replace(cfg=replace(loaded.cfg, temperature=0.5)), ["cat"], frames, cond)
    for own, one, half, told in zip(*seen):
        assert torch.equal(own, one) and torch.equal(one / 2, half) and torch.equal(half, told)


def test_negative_text_steers_without_a_caption_too(here):
    loaded, frames, cond = load_model("micro.pt"), torch.zeros(1, 8, 4, 32, 32), np.zeros((1, 8), bool)

    def made(caption, negative, scale):
        return sample_clips(loaded, [caption], frames, cond, steps=2, text_scale=scale, negative=negative)
    plain = made("", "", 3.0)
    assert torch.equal(made("", "ugly", 1.0), plain), "at scale 1 the negative text is not looked at"
    assert not torch.allclose(made("", "ugly", 3.0), plain, atol=1e-3)
    assert not torch.allclose(made("", "ugly", 3.0), made("ugly", "", 1.0), atol=1e-3), "not asked for"


class Casts(TorchDispatchMode):
    """Counts conversions to bf16."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_to_copy" in str(func) and (kwargs or {}).get("dtype") == torch.bfloat16
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_to_bf16_once_per_run_not_in_every_step(here):
    loaded, marks = load_model("micro.pt"), []
    with Casts() as casts:
        sample_clips(loaded, ["cat"], torch.zeros(1, 8, 4, 32, 32), np.zeros((1, 8), bool), steps=4,
                     bf16=True, progress=lambda i, y: marks.append(casts.count))
    first, *others = np.diff([0, *marks])
    weights = sum(p.ndim > 1 for p in loaded.model.net.parameters())
    assert len(set(others)) == 1 and first - others[0] > weights, (first, others)


def test_bf16_is_taken_where_the_hardware_has_it(here, monkeypatch):
    fast = rdtf.has_bf16.__wrapped__                        # it answers once for all
    for capability, has in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert fast(torch.device("cuda")) == has
    assert not fast(torch.device("mps"))
    for vendor, amx, bf16, pays in (
            ("GenuineIntel", True, True, True), ("GenuineIntel", False, True, False),
            ("AuthenticAMD", False, True, True), ("AuthenticAMD", False, False, False)):
        with monkeypatch.context() as patch:
            patch.setattr(rdtf.Path, "read_text", lambda path: f"vendor_id : {vendor}")
            patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
            patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
            assert bool(fast(torch.device("cpu"))) == pays or not rdtf.Path("/proc/cpuinfo").exists()
    asked = []
    monkeypatch.setattr(rdtf, "has_bf16", lambda device: asked.append(device) or False)
    sample_clips(load_model("micro.pt"), [""], torch.zeros(1, 8, 4, 32, 32), np.zeros((1, 8), bool), steps=1)
    assert asked == [torch.device("cpu")]


# ------------------------------------------------------------------------------------------------------------
# Seeds and metadata


def test_each_sticker_has_a_seed_of_its_own(here):
    with pytest.raises(ValueError, match="1 seeds for 2 stickers"):
        blank, none = torch.zeros(2, 8, 4, 32, 32), np.zeros((2, 8), bool)
        sample_clips(load_model("micro.pt"), ["cat", "cat"], blank, none)


def test_a_sticker_depends_on_its_seed_alone(here):
    cli("--text cat --seeds 3-5 --out a.apng --precision fp32")
    cli("--text cat --seeds 5,3,4 --batch-size 3 --out b.apng --precision fp32")
    cli("--text cat --seeds 4 --out c.apng --precision fp32")
    a, b = ({s: premultiply(read_sticker(f"{x}-{s}.apng")[0]).astype(int) for s in (3, 4, 5)} for x in "ab")
    assert all(np.abs(a[s] - b[s]).max() <= 1 for s in a) and not np.array_equal(a[3], a[4])
    assert np.array_equal(a[4], premultiply(read_sticker("c.apng")[0]))
    assert (here / "a-sheet.png").exists() and (here / "a-sheet.webp").exists()
    assert not (here / "c-sheet.png").exists()


@pytest.mark.parametrize("suffix", ["webp", "gif", "apng", "png"])
def test_the_command_in_the_metadata_makes_the_same_pixels_again(here, suffix):
    (here / "runs/old").mkdir(parents=True)
    os.link("micro.pt", "runs/old/last.pt")
    sample.main(["--mode", "predict", "--input", "soft.webp", "--given", "2", "--backward", "--eta", "0.5",
                 "--text", 'a "red" cat', "--negative", "a dog", "--seeds", "3,9", "--out", f"a.{suffix}"])
    kept = read_metadata(f"a-9.{suffix}")
    assert kept["step"] == 7 and kept["vae_id"] == torch.load("micro.pt")["vae_id"]
    (here / "runs/new").mkdir()                                     # now another run is the newest one
    torch.save(checkpoint(head_dim=8), "runs/new/last.pt")
    command = shlex.split(kept["command"])
    assert command[:2] == ["python", "sample.py"]
    sample.main([*command[2:], "--out", f"b.{suffix}"])
    assert read_sticker(f"a-9.{suffix}")[0].tobytes() == read_sticker(f"b.{suffix}")[0].tobytes()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_weights_are_the_averaged_ones_whatever_the_file_is(here):
    data, loaded = checkpoint(), load_model("micro.pt")
    for name, p in loaded.model.named_parameters():
        assert torch.equal(p, data["ema"][name])
    shipped = {k: v.half() for k, v in {**data["model"], **data["ema"]}.items()}      # train.py --export
    vae = {k: v.half() for k, v in data["vae"].items()}
    torch.save({**data, "model": shipped, "ema": {}, "vae": vae}, "h.pt")
    half = load_model("h.pt")
    for a, b in zip(loaded.model.parameters(), half.model.parameters()):
        assert b.dtype == torch.float32 and torch.allclose(a, b, atol=2e-3)
    assert half.vae.fingerprint() == loaded.vae.fingerprint() == data["vae_id"]


class Code:
    def __reduce__(self):
        return open, ("ran", "w")


def test_a_checkpoint_that_does_not_fit_says_so_and_none_may_run_code(here, capsys):
    data = checkpoint()
    (here / "noise.pt").write_bytes(b"not a checkpoint")
    for name, content in {
            "code": {**data, "args": Code()}, "tensor": torch.zeros(3), "future": {**data, "format": 99},
            "vae": {**data, "stage": "vae"}, "wings": {**data, "config": {**data["config"], "wings": 2}},
            "other": {**data, "config": {**data["config"], "context_dim": 64}},
            "half": {k: v for k, v in data.items() if k != "vae"}}.items():
        torch.save(content, f"{name}.pt")
    for name, words in (("missing", "no such file"), ("noise", "opened safely"), ("code", "opened safely"),
                        ("tensor", "no checkpoint"), ("future", "no checkpoint of this version"),
                        ("vae", "autoencoder alone"), ("wings", "wings"), ("other", "size mismatch"),
                        ("half", "vae")):
        err = fails(f"--text cat --ckpt {name}.pt", capsys)
        assert f"{name}.pt" in err and words in err
    assert not (here / "ran").exists()
    assert "--device cpu" in fails("--text cat --ckpt micro.pt --device nowhere", capsys)


def test_the_newest_run_is_the_default_then_the_shipped_one(here, monkeypatch, capsys):
    monkeypatch.setattr(sample, "SHIPPED", here / "shipped.pt")
    assert "no checkpoint" in fails("--text cat", capsys)
    (here / "shipped.pt").touch()
    assert sample.default_checkpoint() == str(here / "shipped.pt")
    for i, name in enumerate("ba"):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "last.pt").touch()
        os.utime(here / "runs" / name / "last.pt", (i, i))
    assert sample.default_checkpoint() == os.path.join("runs", "a", "last.pt")


# ------------------------------------------------------------------------------------------------------------
# Files and flags


def test_size_limit_and_fitting(here, capsys):
    cli("--text cat --size 96 --max-kb 40 --out big.webp --steps 1")
    assert read_sticker("big.webp")[0].shape[1:3] == (96, 96) and (here / "big.webp").stat().st_size <= 40_000
    capsys.readouterr()
    cli("--mode interpolate --input wide.gif --out w.webp --steps 1")
    assert "wide.gif: 40x20 pixels, fitted to 32x32" in capsys.readouterr().err
    made = read_sticker("w.webp")[0]
    assert made.shape == (5, 32, 32, 4) and made[0, 0, 0, 3] == 0 and made[0, 16, 16, 3] == 255
    cli(f"--text {'x' * 80} --out deep/er/t.webp --steps 1")
    assert "first 64 bytes" in capsys.readouterr().err and (here / "deep/er/t.webp").exists()


def test_a_sticker_that_can_not_be_written_costs_no_other_one(here, monkeypatch, capsys):
    usual = sample.write_sticker

    def picky(path, *args, **how):
        if path.name == "s-1.webp":
            raise DataError(f"{path}: too large")
        return usual(path, *args, **how)
    monkeypatch.setattr(sample, "write_sticker", picky)
    with pytest.raises(SystemExit) as stopped:
        cli("--text cat --steps 1 --seeds 0-2 --out s.webp --batch-size 3")
    assert stopped.value.code == 2 and capsys.readouterr().err.strip().endswith("s-1.webp: too large")
    assert sorted(p.name for p in here.glob("s-*")) == ["s-0.webp", "s-2.webp", "s-sheet.png", "s-sheet.webp"]


@pytest.mark.parametrize("flags, start", [("", b"RIFF"), ("--for line", b"\x89PNG")])
def test_stdout_gets_the_sticker_and_nothing_else(here, flags, start):
    command = [sys.executable, sample.__file__, *"--ckpt micro.pt --mode loop --image soft.webp".split(),
               "--steps", "1", "--out", "-", *flags.split()]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(start) and b"7 frames" in done.stderr
    (here / "out").write_bytes(done.stdout)
    assert len(read_sticker("out")[0]) == 7 and "--out -" in read_metadata("out")["command"]
    assert not (here / "-").exists() and not (here / "sticker.webp").exists()


def test_for_a_platform_the_name_gets_its_suffix(here, capsys):
    cli("--text cat --steps 1 --for whatsapp")
    assert read_sticker("sticker.webp")[0].shape == (8, 512, 512, 4)
    cli("--text cat --steps 1 --for line --seeds 0-1 --frames 6 --out a.png")
    for seed in "01":
        frames, times = read_sticker(f"a-{seed}.png")
        assert frames.shape == (6, 270, 270, 4) and sum(times) == 1000
        assert "--for line" in read_metadata(f"a-{seed}.png")["command"]
    assert len(read_sticker("a-sheet.webp")[0]) == 6, "the sheet moves"


WRONG = {   # flags -> what the line must name
    "--image one.webp --input soft.webp": "--image and --input",
    "--mode interpolate --input one.webp": "one still picture",
    "--mode interpolate --image one.webp": "use --input",
    "--lora micro.pt": "no LoRA of this version",
    "--lora nothing.pt": "no such file",
    "--mode interpolate --input soft.webp --mask 10": "--mask with --mode interpolate",
    "--mode interpolate --input soft.webp --frames 4": "--frames with --mode interpolate",
    "--mode interpolate --input soft.webp --length 40": "--length 40",
    "--mode predict --input soft.webp --given 8": "--given 8",
    "--mode predict --input one.webp --given 2": "only 1 frame",
    "--mode predict --input soft.webp --length 6": "--length 6",
    "--mode predict --input soft.webp --frames 9": "--frames 9",
    "--mode predict --input soft.webp --frames 1": "--frames 1",
    "--mode loop --input soft.webp --frames 8": "--frames 8",
    "--mode loop --input soft.webp --length 30": "--length with --mode loop",
    "--mode generate": "nothing to go by",
    "--mode generate --input soft.webp": "--image for a reference frame",
    "--text cat --given 2": "--given: only with --mode predict",
    "--text cat --frames -1": "--frames: -1",
    "--text cat --length 5": "--length 5",
    "--mask 1002": "zeros and ones",
    "--mask 1111 --input soft.webp": "at least one of each",
    "--mask 1001": "add --input or --image",
    "--mask 1010 --frames 4 --image one.webp": "--frames with --mask",
    "--mask 101010101 --image one.webp": "9 places",
    "--mask 11100000 --input soft.webp one.webp": "--input has 2",
    "--text cat --steps 0": "--steps: 0",
    "--text cat --sampler dpm --eta 1": "--eta with --sampler dpm",
    "--text cat --eta 1.5": "--eta: 1.5",
    "--text cat --temperature -1": "--temperature: -1",
    "--text cat --text-scale inf": "--text-scale: inf",
    "--text cat --text-scale 1 --negative dog": "--negative",
    "--text cat --ckpt ours.pt --image-scale 2": "--image-scale 2",
    "--text cat --seeds 7-0": "--seeds 7-0",
    "--text cat --seeds 18446744073709551616": "--seeds 18446744073709551616",
    "--text cat --seeds 0-1000": "at most 1000",
    "--text cat --seeds=-1": "--seeds -1",
    "--text cat --every 2": "--every: only",
    "--text cat --duration 5": "--duration 5",
    "--text cat --out cat": ": cat: name a file that ends in",
    "--text cat --out one.webp/x.webp": "one.webp",
    "--text cat --for line --out x.webp": ": x.webp: end it in .png",
    "--text cat --for line --size 64": "--size or --max-kb with --for",
    "--text cat --for line --frames 1": "--frames 1 with --for",
    "--text cat --for myspace": "--for",
    "--text cat --out - --seeds 0-3": "one sticker",
    "--image soft.webp --out ./soft.webp": "is the input",
    "--image soft.webp --out x/../soft.webp": "is the input",
    "--image a-1.webp --out a.webp --seeds 0-1": "a-1.webp is the input",
    "--image a-sheet.webp --out a.webp --seeds 0-1": "a-sheet.webp is the input",
    "--text cat --length 1001": "--length: 1001",
    "--mode loop --input soft.webp one.webp": "takes one --input",
    "--mode loop --input soft.webp --input one.webp": "takes one --input",
    "--text cat --speed 3": "--speed",
    "--image missing.png": "missing.png",
    "--image broken.webp": "broken.webp",
    "--image micro.pt": "micro.pt",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_say_what_is_wrong_before_anything_is_made(here, capsys, monkeypatch, flags):
    monkeypatch.setattr(sample, "sample_clips", None)
    extra = [] if "--ckpt" in flags else ["--ckpt", "micro.pt"]
    assert WRONG[flags] in fails(flags.split() + extra, capsys)
