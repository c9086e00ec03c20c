"""sample.py end to end through its command line, with a micro checkpoint of random weights."""

import os
from dataclasses import asdict

import numpy as np
import pytest
import torch

import sample
from data import premultiply, read_metadata, read_sticker, write_sticker
from rdtf import RDTF, AutoencoderKL, Config

torch.set_num_threads(1)
MICRO = dict(size=32, widths=(32, 32), layers=1, head_dim=16, context_dim=32, text_layers=1,
             latent_channels=4, vae_widths=(32, 32), text_scale=3.0, image_scale=2.0)
TIMES = [70, 130, 100, 90, 40, 110]


def checkpoint(**settings):
    """A checkpoint as train.py saves it; every weight matters (none is left at its initial zero)."""
    torch.manual_seed(0)
    cfg = Config(**{**MICRO, **settings})
    model, vae = RDTF(cfg), AutoencoderKL(cfg)
    for p in model.parameters():
        if not p.abs().sum():
            torch.nn.init.normal_(p, std=0.05)
    ema = {k: v + 0.01 for k, v in model.named_parameters()}
    return {"format": 1, "stage": "main", "step": 7, "config": asdict(cfg), "model": model.state_dict(),
            "ema": {k: v.detach() for k, v in ema.items()}, "vae": vae.state_dict(), "vae_id": vae.id,
            "text_encoder": [], "fingerprint": "x"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """micro.pt, soft.webp (6 frames of random soft alpha, 32x32), one.png, wide.gif (3 frames, 40x20)."""
    folder = tmp_path_factory.mktemp("home")
    torch.save(checkpoint(), folder / "micro.pt")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 32, 32, 4), dtype=np.uint8)
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


def cli(flags, steps=2):
    extra = [] if "--from-metadata" in flags else ["--ckpt", "micro.pt"] * ("--ckpt" not in flags) + \
        ["--steps", str(steps)] * ("--steps" not in flags)
    sample.main(flags.split() + extra)


def fails(flags, capsys):
    """-> the one line on stderr; the exit status must be 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample.main(flags if isinstance(flags, list) else flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("sample.py: ") and err.count("\n") == 1, err
    return err


def soft():
    return read_sticker("soft.webp")[0]


def spy(monkeypatch):
    """Records what sample_clips is given and what it returns: list of (frames, cond, real, seeds, result)."""
    calls, real_one = [], sample.sample_clips

    def recorded(loaded, captions, frames, cond, real, **settings):
        out = real_one(loaded, captions, frames, cond, real, **settings)
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
    "--mode predict --input soft.webp --given 2": ({i: i for i in range(6)}, 12),
    "--mode predict --input soft.webp --given 3 --backward": ({5 + i: i for i in range(6)}, 11),
    "--mode predict --input soft.webp --frames 3": ({i: i for i in range(6)}, 8),
    "--mode loop --input soft.webp": ({0: 0}, 7),
    "--mask 011001 --input soft.webp": ({1: 1, 2: 2, 5: 5}, 6),
    "--mask 1001 --image soft.webp": ({0: 0, 3: 0}, 4),
    "--mask 11010111 --input soft.webp": ({0: 0, 1: 1, 3: 2, 5: 3, 6: 4, 7: 5}, 8),
    "--image soft.webp": ({0: 0}, 8),
    "--image soft.webp --length 11": ({0: 0}, 11),
}


@pytest.mark.parametrize("flags", WHERE)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm"])
def test_given_frames_are_pixel_equal(here, flags, sampler):
    where, count = WHERE[flags]
    out = "out.apng" if sampler == "dpm" else "out.webp"
    cli(f"{flags} --sampler {sampler} --out {out}", steps=1 if sampler == "ddpm" else 2)
    made, truth = read_sticker(out)[0], soft()
    assert len(made) == count
    for i in range(count):
        if i in where:
            assert np.array_equal(made[i], truth[where[i]]), f"frame {i}"
        else:
            assert not any(np.array_equal(made[i], x) for x in truth)


def test_what_stands_still_stays_as_sharp_as_it_was(here, monkeypatch):
    """An autoencoder of random weights loses all there is; a network that finds that nothing moves must give
    the given picture back all the same, and never colour above alpha."""
    loaded = sample.load_model("micro.pt")
    picture = torch.from_numpy(premultiply(soft()[:1])).permute(0, 3, 1, 2)[None].float() / 255
    frames, cond = picture.expand(2, 8, -1, -1, -1).clone(), np.zeros((2, 8), bool)
    cond[0, 2] = cond[1, 0] = cond[1, 5] = True
    frames[~torch.from_numpy(cond)] = float("nan")                        # nobody looks at those
    z = loaded.vae.encode(picture[0]).expand(2, 8, -1, -1, -1)
    assert (loaded.vae.decode(z[0]) - picture[0]).abs().mean() > 0.1
    monkeypatch.setattr(sample, "sample", lambda *a: z)
    made = sample.sample_clips(loaded, ["", ""], frames, cond, seeds=[0, 1])
    assert (made - picture).abs().max() < 1e-5
    noise, given, seen = torch.rand(3, 1, 8, 4, 5, 5)
    out = sample.with_detail(noise, given, seen, torch.from_numpy(cond[1:]))
    assert 0 <= out.min() and out.max() <= 1 and (out[:, :, :3] <= out[:, :, 3:]).all()


def test_what_moves_leaves_no_ghost_of_lost_detail():
    """A dot that the autoencoder loses: where the body has gone, the dot does not stay behind."""
    body, dot = torch.zeros(1, 2, 4, 8, 8), torch.zeros(1, 2, 4, 8, 8)
    body[:, :, :, :, :4] = 0.5
    dot[:, :, :2, 3, 1] = -0.25
    moved = body.roll(4, -1)
    clip, cond = torch.stack([body[:, 0], moved[:, 1]], 1), torch.zeros(1, 2)
    cond = cond.bool().index_fill(1, torch.tensor([0]), True)
    assert torch.equal(sample.with_detail(body, body + dot, body, cond)[:, 1], (body + dot)[:, 1])
    assert torch.equal(sample.with_detail(clip, body + dot, body, cond)[:, 1], moved[:, 1])


@pytest.mark.parametrize("n", range(1, 9))
def test_one_to_eight_frames(here, n):
    cli(f"--text cat --frames {n}", steps=1)
    assert len(read_sticker("sticker.webp")[0]) == n
    if n in (1, 5):
        cli(f"--image one.webp --frames {n}", steps=1)
        made = read_sticker("sticker.webp")[0]
        assert len(made) == n and np.array_equal(made[0], soft()[0])


def test_chained_prediction_goes_on_from_its_own_frames(here, monkeypatch):
    calls = spy(monkeypatch)
    cli("--mode predict --input soft.webp --given 3 --length 15", steps=1)
    assert len(calls) == 2 and len(read_sticker("sticker.webp")[0]) == 15
    assert [c[1].sum() for c in calls] == [3, 3] and [c[2].sum() for c in calls] == [8, 7]
    assert torch.equal(calls[1][0][0, :3], calls[0][4][0, 5:8])
    assert calls[0][3] == calls[1][3], "one generator goes on: each window has noise of its own"
    calls.clear()
    cli("--mode predict --input soft.webp --given 3 --length 15 --backward", steps=1)
    assert torch.equal(calls[1][0][0, 4:7], calls[0][4][0, :3])          # 4 new ones before the 3 given
    assert calls[1][1][0].tolist() == [False] * 4 + [True] * 3 + [False]


def test_interpolation_windows_share_one_keyframe(here, monkeypatch):
    calls = spy(monkeypatch)
    cli("--mode interpolate --input soft.webp", steps=1)
    given = torch.from_numpy(premultiply(soft())).permute(0, 3, 1, 2) / 255
    assert [c[1][0].nonzero()[0].tolist() for c in calls] == [[0, 2, 4, 6], [0, 2, 4]]
    assert torch.equal(calls[0][0][0, 6], calls[1][0][0, 0]) and torch.equal(calls[0][0][0, 6], given[3])
    cli("--mode interpolate --input one.webp one.webp soft.webp", steps=1)       # pictures in order
    made = read_sticker("sticker.webp")
    assert len(made[0]) == 5 and all(np.array_equal(made[0][i], soft()[0]) for i in (0, 2, 4))


def test_a_loop_closes(here, monkeypatch):
    calls = spy(monkeypatch)
    cli("--mode loop --image soft.webp --frames 5", steps=1)
    frames, cond, real, _, _ = calls[0]
    assert cond[0].nonzero()[0].tolist() == [0, 5] and real[0].sum() == 6
    assert torch.equal(frames[0, 0], frames[0, 5])
    assert len(read_sticker("sticker.webp")[0]) == 5        # the closing frame is frame 0, played next


def test_without_input_a_built_in_sticker_is_taken(here, capsys):
    truth, times = read_sticker(sample.HERE / sample.BUILT_IN[0])
    torch.save(checkpoint(size=64), "big.pt")
    cli("--ckpt big.pt", steps=1)
    printed = capsys.readouterr().out.splitlines()[0]
    name = f"{sample.BUILT_IN[0]} (dog face)"
    assert printed == f"no --input: taking the built-in sticker {name}, frames 1, 3, 5, .."
    made, ms = read_sticker("sticker.webp")
    assert np.array_equal(made[::2], truth[::2]) and len(made) == 15 and sum(ms) == sum(times)
    cli("--ckpt big.pt --mode predict --backward", steps=1)
    assert np.array_equal(read_sticker("sticker.webp")[0][4:], truth[::2])
    capsys.readouterr()
    cli("--ckpt big.pt --mode loop", steps=1)
    made, ms = read_sticker("sticker.webp")
    assert np.array_equal(made[0], truth[0]) and set(ms) == {times[0]} and len(made) == 7
    assert "its first frame" in capsys.readouterr().out


def test_frame_times(here):
    cli("--mode interpolate --input soft.webp --factor 3", steps=1)
    ms = read_sticker("sticker.webp")[1]
    assert sum(ms) == sum(TIMES) and ms[:3] == [23, 23, 24] and ms[-1] == 110
    cli("--mode interpolate --input soft.webp --every 4", steps=1)              # frames 0 and 4
    made, ms = read_sticker("sticker.webp")
    assert np.array_equal(made[[0, 2]], soft()[[0, 4]]) and ms == [195, 195, 150]
    cli("--mode predict --input soft.webp", steps=1)
    assert read_sticker("sticker.webp")[1] == [90] * 10
    cli("--mode predict --input soft.webp --duration 55", steps=1)
    assert read_sticker("sticker.webp")[1] == [55] * 10
    cli("--text cat", steps=1)
    assert read_sticker("sticker.webp")[1] == [125] * 8


# ------------------------------------------------------------------------------------------------------------
# Seeds, batches, metadata


def test_a_sticker_depends_on_its_seed_alone(here):
    cli("--text cat --seeds 3-5 --batch-size 1 --out a.apng")
    cli("--text cat --seeds 5,3,4 --batch-size 3 --out b.apng")
    cli("--text cat --seeds 4 --out c.apng")
    a, b = ({s: read_sticker(f"{x}-{s}.apng")[0].astype(int) for s in (3, 4, 5)} for x in "ab")
    assert all(np.abs(premultiply(a[s].astype(np.uint8)).astype(int) -
                      premultiply(b[s].astype(np.uint8)).astype(int)).max() <= 1 for s in a)
    assert np.array_equal(a[4], read_sticker("c.apng")[0]) and not np.array_equal(a[3], a[4])
    assert (here / "a-sheet.png").exists() and not (here / "c-sheet.png").exists()
    cli("--text cat --seeds 4 --sheet rows.png --out c.apng", steps=1)
    assert (here / "rows.png").exists()


def test_batches_equal_single_stickers_in_fp32(here):
    loaded, state = sample.load_model("micro.pt"), torch.get_rng_state()
    frames, cond = torch.rand(3, 8, 4, 32, 32), np.zeros((3, 8), bool)
    torch.set_rng_state(state)
    cond[0, 0] = cond[1, 3:5] = True                                      # and the third is given none
    real = np.arange(8)[None] < np.array([8, 5, 3])[:, None]
    captions, seeds = ["cat", "", "a star"], [5, 6, 7]
    both = sample.sample_clips(loaded, captions, frames, cond, real, steps=3, seeds=seeds, negative="bad")
    assert torch.equal(torch.get_rng_state(), state), "nobody's random numbers are used up"
    for i in range(3):
        one = sample.sample_clips(loaded, captions[i:i + 1], frames[i:i + 1], cond[i:i + 1], real[i:i + 1],
                                  steps=3, seeds=seeds[i:i + 1], negative="bad")
        assert torch.allclose(one[0], both[i], atol=1e-5)
    assert both[2, 3:].abs().max() == 0                                   # frames that nobody asked for
    loaded.model.train()
    again = sample.sample_clips(loaded, captions, frames, cond, real, steps=3, seeds=seeds, negative="bad")
    assert torch.equal(again, both), "nothing may hang on .training"


@pytest.mark.parametrize("suffix", ["webp", "gif", "apng", "png"])
def test_metadata_repeats_a_file_bit_for_bit(here, suffix):
    cli(f"--mode predict --input soft.webp --given 2 --backward --negative bad --seeds 3,9 --text two "
        f"--eta 0.5 --text-scale 2.5 --out a.{suffix}")
    cli(f"--from-metadata a-9.{suffix} --out b.{suffix}")
    assert (here / f"a-9.{suffix}").read_bytes() == (here / f"b.{suffix}").read_bytes()
    assert read_sticker(f"a-9.{suffix}")[0].tobytes() == read_sticker(f"b.{suffix}")[0].tobytes()
    kept = read_metadata(f"b.{suffix}")
    assert {"--text=two", "--seeds=9", "--steps=2", "--eta=0.5"} <= set(kept["rdtf"]) and kept["step"] == 7


def test_a_sticker_of_a_batch_is_repeated_in_a_batch_of_that_size(here, monkeypatch):
    cli("--text cat --seeds 3-6 --batch-size 3 --out a.apng --text-scale 0 --eta 0")
    calls = spy(monkeypatch)
    cli("--from-metadata a-5.apng --out b.apng")
    assert len(calls[0][3]) == 3 and (here / "a-5.apng").read_bytes() == (here / "b.apng").read_bytes()
    assert {"--text-scale=0.0", "--eta=0.0", "--batch-size=3"} <= set(read_metadata("b.apng")["rdtf"])
    cli("--from-metadata a-6.apng --out b.apng")                    # it was alone in the second batch
    assert len(calls[1][3]) == 1 and (here / "a-6.apng").read_bytes() == (here / "b.apng").read_bytes()


def test_metadata_notices_what_changed(here, capsys):
    cli("--image one.webp --out a.webp", steps=1)
    write_sticker("one2.webp", soft()[1:2], 100)
    os.replace("one2.webp", "one.webp")
    capsys.readouterr()
    cli("--from-metadata a.webp --out b.webp")
    assert "may differ: input" in capsys.readouterr().err
    assert "--text with --from-metadata" in fails("--from-metadata a.webp --text cat", capsys)
    assert "carries no rdtf settings" in fails("--from-metadata soft.webp", capsys)
    for flags in (["--nonsense=1"], ["--steps=many"], [1]):
        write_sticker("odd.webp", soft(), 100, metadata={"rdtf": flags})
        assert "odd.webp" in fails("--from-metadata odd.webp", capsys)


# ------------------------------------------------------------------------------------------------------------
# Guidance as it is called from here


def branches(loaded, monkeypatch):
    """-> list that collects the batch of every network call, list that collects every condition."""
    net, calls, conditions = loaded.model.net, [], []
    forward, condition = net.forward, net.condition
    monkeypatch.setattr(net, "forward", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k))
    monkeypatch.setattr(net, "condition", lambda *a: conditions.append(1) or condition(*a))
    return calls, conditions


@pytest.mark.parametrize("caption,given,scales,count", [
    ("cat", True, (3, 2), 3), ("cat", True, (7.5, 7.5), 2), ("cat", True, (1, 1), 1),
    ("cat", True, (0, 0), 1), ("cat", False, (3, 2), 2), ("", True, (3, 2), 2),
    ("", True, (3, 1), 1), ("", False, (3, 2), 1)])
def test_no_pass_is_wasted_and_conditions_are_computed_once(here, monkeypatch, caption, given, scales, count):
    loaded = sample.load_model("micro.pt")
    calls, conditions = branches(loaded, monkeypatch)
    cond = np.zeros((1, 8), bool)
    cond[0, 0] = given
    sample.sample_clips(loaded, [caption], torch.rand(1, 8, 4, 32, 32), cond, steps=4, text_scale=scales[0],
                        image_scale=scales[1])
    assert calls == [count] * 4 and conditions == [1]


def test_negative_text_steers_without_a_caption_too(here, monkeypatch):
    loaded = sample.load_model("micro.pt")
    frames, cond = torch.zeros(1, 8, 4, 32, 32), np.zeros((1, 8), bool)

    def made(caption, negative, scale):
        return sample.sample_clips(loaded, [caption], frames, cond, steps=2, text_scale=scale,
                                   negative=negative)
    plain = made("", "", 3.0)
    assert torch.equal(made("", "ugly", 1.0), plain), "at scale 1 the negative text is not looked at"
    assert not torch.allclose(made("", "ugly", 3.0), plain, atol=1e-3)
    assert not torch.allclose(made("", "ugly", 3.0), made("ugly", "", 1.0), atol=1e-3), "not asked for"


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_weights_are_the_averaged_ones_whatever_the_file_is(here):
    data = checkpoint()
    loaded = sample.load_model("micro.pt")
    for name, p in loaded.model.named_parameters():
        assert torch.equal(p, data["ema"][name]) and not p.requires_grad
    shipped = {k: v.half() for k, v in {**data["model"], **data["ema"]}.items()}      # train.py --export
    for ema in ({}, None):
        vae = {k: v.half() for k, v in data["vae"].items()}
        torch.save({**data, "model": shipped, "ema": ema, "vae": vae}, "h.pt")
        half = sample.load_model("h.pt")
        for a, b in zip(loaded.model.parameters(), half.model.parameters()):
            assert b.dtype == torch.float32 and torch.allclose(a, b, atol=2e-3)


def test_a_checkpoint_that_does_not_fit_says_so(here, capsys):
    data = checkpoint()
    (here / "noise.pt").write_bytes(b"not a checkpoint")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({**data, "format": 99}, "future.pt")
    torch.save({**data, "stage": "vae"}, "vae.pt")
    torch.save({**data, "config": {**data["config"], "wings": 2}}, "wings.pt")
    torch.save({**data, "config": {**data["config"], "context_dim": 64}}, "other.pt")
    torch.save({k: v for k, v in data.items() if k != "vae"}, "half.pt")
    for file, words in (("missing.pt", "no such file"), ("noise.pt", "opened safely"),
                        ("tensor.pt", "not a checkpoint"),
                        ("future.pt", "another version of rdtf (format 99"),
                        ("vae.pt", "autoencoder alone"), ("wings.pt", "another version"),
                        ("wings.pt", "wings"), ("other.pt", "size mismatch"), ("half.pt", "vae")):
        err = fails(f"--text cat --ckpt {file}", capsys)
        assert file in err and words in err
    assert "--device nowhere" in fails("--text cat --ckpt micro.pt --device nowhere", capsys)


def test_the_newest_run_is_the_default_then_the_shipped_one(here, monkeypatch, capsys):
    monkeypatch.setattr(sample, "HERE", here)
    assert "no checkpoint" in fails("--text cat", capsys)
    (here / "weights").mkdir()
    (here / "weights/fluent-64.pt").touch()
    assert sample.default_checkpoint() == str(here / "weights/fluent-64.pt")
    for i, name in enumerate("ba"):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "last.pt").touch()
        os.utime(here / "runs" / name / "last.pt", (i, i))
    assert sample.default_checkpoint() == os.path.join("runs", "a", "last.pt")


# ------------------------------------------------------------------------------------------------------------
# Files and flags


def test_size_limit_and_fitting(here, capsys):
    cli("--text cat --size 96 --max-kb 40 --out big.webp", steps=1)
    assert read_sticker("big.webp")[0].shape[1:3] == (96, 96) and (here / "big.webp").stat().st_size <= 40_000
    capsys.readouterr()
    cli("--mode interpolate --input wide.gif --out w.webp", steps=1)
    assert "wide.gif: 40x20 pixels, fitted to 32x32" in capsys.readouterr().err
    made = read_sticker("w.webp")[0]
    assert made.shape == (5, 32, 32, 4) and made[0, 0, 0, 3] == 0 and made[0, 16, 16, 3] == 255
    cli(f"--text {'x' * 80} --out deep/er/t.webp", steps=1)
    assert "first 64 bytes" in capsys.readouterr().err and (here / "deep/er/t.webp").exists()


WRONG = {   # flags -> what the line must name
    "--image one.webp --input soft.webp": "--image and --input",
    "--mode interpolate --input one.webp": "2 keyframes",
    "--mode interpolate --image one.webp": "use --input",
    "--mode interpolate --input soft.webp --mask 10": "--mask with --mode interpolate",
    "--mode interpolate --input soft.webp --frames 4": "--frames with --mode interpolate",
    "--mode interpolate --input soft.webp --length 40": "--length 40",
    "--mode interpolate --input soft.webp --factor 4": "--factor",
    "--mode predict --input soft.webp --given 8": "--given 8",
    "--mode predict --input one.webp --given 2": "only 1 frame",
    "--mode predict --input soft.webp --length 6": "--length 6",
    "--mode predict --input soft.webp --factor 2": "--factor: only with --mode interpolate",
    "--mode predict --input soft.webp --frames 9": "--frames 9",
    "--mode predict --input soft.webp --frames 4 --length 20": "--length and --frames",
    "--mode loop --input soft.webp --mask 101": "--mask with --mode loop",
    "--mode loop --input soft.webp --frames 8": "--frames 8",
    "--mode loop --input soft.webp --length 30": "--length with --mode loop",
    "--mode generate": "nothing to go by",
    "--mode generate --input soft.webp": "--image for a reference frame",
    "--mode dance": "--mode",
    "--text cat --given 2": "--given: only with --mode predict",
    "--text cat --backward": "--backward: only with --mode predict",
    "--text cat --frames 9": "--frames 9",
    "--text cat --frames -1": "--frames -1",
    "--text cat --length 5": "--length 5",
    "--mask 1002": "zeros and ones",
    "--mask 1111 --input soft.webp": "nothing to make",
    "--mask 1001": "add --input or --image",
    "--mask 0000 --image one.webp": "gives no frame",
    "--mask 00000 --text cat": "--frames 5",
    "--mask 1010 --frames 4 --image one.webp": "--frames with --mask",
    "--mask 101010101 --image one.webp": "9 places",
    "--mask 11100000 --input soft.webp one.webp": "--input has 2",
    "--text cat --steps 0": "--steps 0",
    "--text cat --steps 1001": "--steps 1001",
    "--text cat --steps x": "--steps",
    "--text cat --sampler euler": "--sampler",
    "--text cat --sampler dpm --eta 1": "--eta with --sampler dpm",
    "--text cat --eta 1.5": "--eta 1.5",
    "--text cat --rescale nan": "--rescale nan",
    "--text cat --text-scale inf": "--text-scale inf",
    "--text cat --text-scale 1 --negative dog": "--negative",
    "--text cat --seeds 7-0": "--seeds 7-0",
    "--text cat --seeds one": "--seeds one",
    "--text cat --seeds 18446744073709551616": "--seeds 18446744073709551616",
    "--text cat --seeds 0-1000": "at most 1000",
    "--text cat --seeds -1": "--seeds -1",
    "--text cat --seeds 1,": "--seeds 1,",
    "--text cat --every 2": "--every: only",
    "--image soft.webp --every 2": "--every: only",
    "--mode loop --input soft.webp --every 2": "--every: only",
    "--mode interpolate --input soft.webp --every -1": "--every -1",
    "--mode interpolate --input soft.webp --every 6": "2 keyframes",
    "--text cat --batch-size -2": "--batch-size -2",
    "--text cat --duration 5": "--duration 5",
    "--text cat --size -4": "--size -4",
    "--text cat --max-kb -4": "--max-kb -4",
    "--text cat --out cat.bmp": "--out cat.bmp",
    "--text cat --sheet cat.jpg": "--sheet cat.jpg",
    "--text cat --out cat": "--out cat: end it in",
    "--image soft.webp --out ./soft.webp": "is the input",
    "--text cat --out a.png --sheet a.png": "--sheet a.png: the same file",
    "--text cat --speed 3": "--speed",
    "--image missing.png": "missing.png",
    "--image broken.webp": "broken.webp",
    "--input soft.webp broken.webp --mode interpolate": "broken.webp",
    "--image micro.pt": "micro.pt",
    "--from-metadata missing.webp": "missing.webp",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_say_what_is_wrong(here, capsys, monkeypatch, flags):
    def never(*args, **kwargs):
        raise AssertionError("sampled although the flags are wrong")
    monkeypatch.setattr(sample, "sample_clips", never)
    extra = [] if "--from-metadata" in flags else ["--ckpt", "micro.pt"]
    assert WRONG[flags] in fails(flags.split() + extra, capsys)


@pytest.mark.parametrize("flags,words", [
    ("--out one.webp/x.webp", "can't be written (in one.webp"), ("--out a.webp", "is a folder"),
    ("--out a.webp/b/c/d.webp --sheet one.webp/s.png", "--sheet one.webp/s.png"),
    ("--seeds 0-1 --out one.webp/deep/x.webp", "choose another place"),
     ("--out /proc/x.webp", "/proc/x.webp")])
def test_a_place_that_cannot_be_written_is_named_before_sampling(here, capsys, monkeypatch, flags, words):
    if "/proc" in flags and not os.path.isdir("/proc"):
        pytest.skip("needs a folder that nobody may write")
    monkeypatch.setattr(sample, "sample_clips", None)
    (here / "a.webp").mkdir()
    assert words in fails(f"--text cat --ckpt micro.pt {flags}", capsys)
    assert not list((here / "a.webp").iterdir()), "nothing is made before it is known to work"


def test_text_that_is_no_text(here, capsys):
    assert "not valid UTF-8" in fails(["--text", "\udcff", "--ckpt", "micro.pt"], capsys)


def test_to_device_keeps_the_structure_and_ema_weights_puts_back(here):
    x = {"a": torch.ones(2), "b": [torch.zeros(1), None], "c": None}
    moved = sample.to_device(x, "meta")
    assert moved["a"].device.type == moved["b"][0].device.type == "meta"
    assert moved["b"][1] is moved["c"] is None
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), sample.ema_weights(layer, {"weight": torch.full((2, 2), 7.0)}):
        assert (layer.weight == 7).all()
        raise KeyboardInterrupt
    assert torch.equal(layer.weight, before)
