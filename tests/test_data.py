"""data.py: what it promises about files, keyframes, stores and clips."""
import gc
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import corpus
import numpy as np
import pytest
from PIL import Image

import data

ROOT = Path(data.__file__).parent
BUILT_IN = ROOT / "assets" / "stickers"


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    return folder, corpus.build(folder)


def moving(t=5, size=32):
    """Straight RGBA (t, size, size, 4): smooth colours, soft alpha, colour 0 under alpha 0."""
    y, x = np.mgrid[:size, :size] / size
    away = [np.hypot(x - 0.4 - 0.05 * i, y - 0.5) for i in range(t)]
    frames = np.stack([np.stack([x, y, (x + y + i / t) % 1, 1.5 - 3 * away[i]], -1) for i in range(t)])
    frames = (frames.clip(0, 1) * 255).round().astype(np.uint8)
    return np.where(frames[..., 3:] > 0, frames, 0)


def write_folder(folder, count, size=40, start=0):
    """A folder of small stickers: static and animated, in three formats."""
    folder.mkdir(exist_ok=True)
    for i in range(start, start + count):
        path = folder / f"{i:04d} thing.{('webp', 'gif', 'apng', 'apng')[i % 4]}"
        frames = moving(1 + i % 11, size) // 64 * 64       # few colours: quick to write
        frames[..., :3] ^= np.uint8(i)
        data.write_sticker(path, frames, 40 + i)
    return folder


def same_stickers(a, b):
    same = np.array_equal(a.frames, b.frames) and np.array_equal(a.index, b.index)
    return same and bytes(a.text) == bytes(b.text)


# Pixels ---------------------------------------------------------------------------------------------------

def test_premultiplied_colours_come_back():
    colours, alphas = np.meshgrid(np.arange(256), np.arange(256))
    x = np.stack([colours, 255 - colours, colours // 2, alphas], -1).astype(np.uint8)
    p = data.premultiply(x)
    assert np.array_equal(p[..., :3], np.round(x[..., :3] * (x[..., 3:] / 255)).astype(np.uint8))
    assert np.array_equal(data.premultiply(data.unpremultiply(p)), p)
    opaque = x[..., 3] == 255
    assert np.array_equal(data.unpremultiply(p)[opaque], x[opaque])


def test_fit_keeps_the_aspect_and_no_colour_leaks_from_under_alpha_zero():
    frames = np.zeros((1, 40, 100, 4), np.uint8)
    frames[..., 1] = 255                                # transparent green around
    frames[0, 10:30, 20:80] = [200, 0, 0, 255]          # an opaque red box
    x = data.fit_frames(frames, 50)[0]
    assert x.shape == (50, 50, 4) and x[..., 1].max() == 0
    assert (x[:15] == 0).all() and (x[35:] == 0).all() and (x[25, 25] == [200, 0, 0, 255]).all()
    noise = data.fit_frames(corpus.clip(2, 48, 48), 64)          # bicubic overshoots
    assert (noise[..., :3] <= noise[..., 3:]).all()
    assert np.array_equal(data.fit_frames(frames[:, :, :40], 40), data.premultiply(frames[:, :, :40]))


# Files ----------------------------------------------------------------------------------------------------

def test_every_odd_file_reads_or_is_named(odd):
    folder, expected = odd
    assert len(expected) >= 60
    for name, gives in expected.items():
        start = time.monotonic()
        try:
            frames, times = data.read_sticker(folder / name)
            result = len(frames)
            assert frames.dtype == np.uint8 and frames.shape[3:] == (4,) and len(times) == result
            assert all(isinstance(t, int) and t >= 0 for t in times) and (result == 1 or min(times) > 0)
        except data.DataError as error:
            result = "bad"
            assert name in str(error) and "\n" not in str(error)
        assert gives in (None, result), (name, result)
        assert time.monotonic() - start < 10, name


def test_a_folder_of_odd_files_prepares_and_reports_each_bad_one(odd, tmp_path, capsys):
    folder, expected = odd
    stickers = data.prepare(folder, tmp_path / "store", 16, workers=2, filters=(), max_bad=1)
    names = {stickers.name(i) for i in range(len(stickers))}
    reported = {line.split("\t")[1] for line in (tmp_path / "store" / "report.txt").read_text().splitlines()}
    clean = {name.encode("utf-8", "backslashreplace").decode(): gives for name, gives in expected.items()}
    assert names | {n for n in clean if any(r.startswith(n.split("\t")[0]) for r in reported)} >= set(clean)
    assert {n for n, gives in clean.items() if isinstance(gives, int)} <= names
    assert not names & {n for n, gives in clean.items() if gives == "bad"}
    assert len(names) + stickers.meta["left_out"]["unreadable"] == len(expected)
    with pytest.raises(data.DataError, match="--max-bad"):
        data.prepare(folder, tmp_path / "other", 16, workers=2, filters=(), max_bad=0.1)


def test_reading_bad_files_leaks_no_memory(odd):
    folder, expected = odd
    names = [name for name in expected if not name.endswith((".mp4", ".webm"))]

    def resident():
        for name in names:
            data.decode_item(folder / name, 16)
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    resident()
    before = resident()
    resident()
    assert resident() - before < 8 << 20


def test_mutated_files_never_do_more_than_fail(tmp_path):
    rng, end, seen = random.Random(5), time.monotonic() + 4, {"ok": 0, "unreadable": 0}
    frames = corpus.clip(3, 24, 20)
    seeds = [corpus.encoded(frames, kind) for kind in ("GIF", "WEBP", "PNG")]
    seeds += [corpus.encoded(frames[:1], kind) for kind in ("JPEG", "PNG")]
    seeds += [corpus.encoded(frames, "WEBP", lossless=True)]
    path = tmp_path / "mutant.bin"
    while time.monotonic() < end or sum(seen.values()) < 100:
        mutant = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            at = rng.randrange(len(mutant))
            kind = rng.randrange(5)
            if kind == 0:
                mutant[at] = rng.randrange(256)
            elif kind == 1:
                mutant[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                del mutant[at:at + rng.randrange(1, 40)]
            elif kind == 3:
                mutant[at:at] = rng.randbytes(rng.randrange(1, 40))
            else:
                mutant[at:at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
            mutant = mutant or bytearray(b"x")
        path.write_bytes(mutant)
        start = time.monotonic()
        seen[data.decode_item(path, 16, ())[0]] += 1
        assert time.monotonic() - start < 5
    assert min(seen.values()) > 10, seen


@pytest.mark.parametrize("disposal", range(4))
def test_gif_frames_are_composited_as_the_format_says(odd, disposal):
    colour = np.array([[0, 0, 0, 255], [255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 0, 0]])
    b = np.array(([2] * 8 + [3] * 8) * 16)
    one, patch, three = colour[np.full((16, 16), 1)], colour[b[:64].reshape(8, 8)], colour[b.reshape(16, 16)]

    def over(below, above):
        return np.where(above[..., 3:] > 0, above, below)
    canvas, clear = one.copy(), np.zeros_like(one)
    second = (canvas if disposal != 2 and disposal != 3 else clear).copy()
    second[4:12, 4:12] = over(second[4:12, 4:12], patch)
    kept = {0: second, 1: second, 2: second.copy(), 3: clear}[disposal]
    if disposal == 2:
        kept[4:12, 4:12] = 0
    frames, times = data.read_sticker(odd[0] / f"disposal-{disposal}.gif")
    shown = np.where(frames[..., 3:] > 0, frames, 0)
    assert np.array_equal(shown, np.stack([one, second, over(kept, three)])) and times == [70, 70, 70]


def test_colours_of_unusual_modes(odd):
    folder, _ = odd
    grey = data.read_sticker(folder / "16-bit.png")[0][0, 0, :, 0]
    assert grey.tolist() == [0, 85, 170, 255]
    assert data.read_sticker(folder / "2-bit.png")[0][0, 0, :, 0].tolist() == [0, 85, 170, 255]
    rgb = data.read_sticker(folder / "whole.jpg")[0].astype(int)
    assert data.read_sticker(folder / "turned.jpg")[0].shape[1:3] == rgb.shape[2:0:-1]
    assert data.read_sticker(folder / "zero-times.gif")[1] == [100, 100]
    assert len(set(data.read_sticker(folder / "fallback.apng")[1])) == 1


@pytest.mark.parametrize("suffix", [".webp", ".apng"])
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    frames, times = moving(7), [40, 42, 125, 33, 100, 57, 1000]
    meta = {"prompt": "ein Stern ✨ 'quoted'", "seed": 3}
    done = data.write_sticker(tmp_path / f"a{suffix}", frames, times, metadata=meta)
    back, when = data.read_sticker(tmp_path / f"a{suffix}")
    assert np.array_equal(back, frames) and when == times
    assert data.read_metadata(tmp_path / f"a{suffix}") == meta
    assert done["bytes"] == (tmp_path / f"a{suffix}").stat().st_size
    assert done["frames"] == 7 and not done["message"]
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.info["loop"] == 0


@pytest.mark.parametrize("suffix", [".webp", ".apng", ".gif"])
def test_equal_neighbours_keep_their_time(tmp_path, suffix):
    frames = moving(3)[[0, 0, 1, 1, 1, 2]]
    frames[..., 3] = np.where(frames[..., 3] >= 128, 255, 0)
    data.write_sticker(tmp_path / f"a{suffix}", frames, 50)
    back, times = data.read_sticker(tmp_path / f"a{suffix}")
    shown = np.repeat(np.arange(len(back)), [t // 50 for t in times])
    assert sum(times) == 300 and len(shown) == 6
    assert np.abs(back[shown].astype(int)[..., 3] - frames[..., 3]).max() == 0
    data.write_sticker(tmp_path / f"b{suffix}", frames[[0, 0]], 70)
    # one frame: its time has no meaning
    assert sum(data.read_sticker(tmp_path / f"b{suffix}")[1]) in (0, 140)


def test_gif_alpha_is_cut_cleanly_colours_are_exact_and_times_add_up(tmp_path):
    frames = moving(8, 24)
    few = frames // 64 * 64
    few[..., 3] = frames[..., 3]
    data.write_sticker(tmp_path / "a.gif", few, 42, metadata={"a": ["b", 1]})
    back, times = data.read_sticker(tmp_path / "a.gif")
    seen = few[..., 3] >= 128
    assert np.array_equal(back[..., 3] == 255, seen) and np.array_equal(back[..., 3] == 0, ~seen)
    assert np.array_equal(back[..., :3][seen], few[..., :3][seen])
    assert abs(sum(times) - 8 * 42) <= 10 and set(times) == {40, 50}
    assert data.read_metadata(tmp_path / "a.gif") == {"a": ["b", 1]}
    many = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 4), dtype=np.uint8)
    many[..., 3] = 255
    data.write_sticker(tmp_path / "b.gif", many, 100)
    error = np.abs(data.read_sticker(tmp_path / "b.gif")[0].astype(int) - many)[..., :3]
    assert error.mean() < 25       # 8192 random colours on 255
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0 and image.disposal_method == 2
    data.write_sticker(tmp_path / "c.gif", np.zeros((3, 8, 8, 4), np.uint8), 100)
    assert data.read_sticker(tmp_path / "c.gif")[0].max() == 0


def test_lossy_webp_sheet_and_video(tmp_path):
    frames = moving(5, 33)
    data.write_sticker(tmp_path / "a.webp", frames, 80, lossless=False)
    back, times = data.read_sticker(tmp_path / "a.webp")
    error = np.abs(data.premultiply(back).astype(int) - data.premultiply(frames))
    assert times == [80] * 5 and error.mean() < 6
    data.write_sticker(tmp_path / "a.png", frames, 80)
    sheet = data.read_sticker(tmp_path / "a.png")[0]
    assert sheet.shape == (1, 33, 5 * 33, 4) and np.array_equal(sheet[0][:, 33:66], frames[1])
    data.save_sheet(tmp_path / "sheet.png", [frames, frames[:2]], ["a label", "another"])
    assert data.read_sticker(tmp_path / "sheet.png")[0].shape[1:] == (70, 150 + 5 * 35, 4)
    pytest.importorskip("imageio_ffmpeg")
    data.write_sticker(tmp_path / "a.mp4", frames, [40, 80, 40, 40, 200])
    video, times = data.read_sticker(tmp_path / "a.mp4")
    assert abs(sum(times) - 400) <= 40 and video.shape[1:] == (34, 34, 4)
    assert video[0, 0, 0].min() > 230       # white where it was transparent


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".apng"])
def test_platform_limits(tmp_path, suffix, capsys):
    frames = corpus.clip(8, 64, 64)
    free = data.write_sticker(tmp_path / f"a{suffix}", frames, 50)["bytes"]
    for share in (0.6, {".gif": 0.3, ".webp": 0.1, ".apng": 0.08}[suffix]):
        path = tmp_path / f"b{suffix}"
        done = data.write_sticker(path, frames, 50, max_kb=free * share / 1000, metadata={"x": 1})
        back, times = data.read_sticker(path)
        assert done["bytes"] <= free * share and sum(times) == 400 and data.read_metadata(path) == {"x": 1}
        assert len(back) == done["frames"] and "to stay under" in capsys.readouterr().err
    assert done["frames"] < 8
    with pytest.raises(data.DataError, match="--max-kb"):
        data.write_sticker(tmp_path / f"c{suffix}", frames, 50, max_kb=0.05)
    data.write_sticker(tmp_path / f"d{suffix}", frames[:, :40], 50, size=96)
    assert data.read_sticker(tmp_path / f"d{suffix}")[0].shape[1:] == (96, 96, 4)


def test_writing_nonsense_is_refused_and_leaves_no_file(tmp_path):
    good = moving(2)
    for name, frames, times in (("a.bmp", good, 50), ("a", good, 50), ("a.gif", good.astype(float), 50),
                                ("a.gif", good[0], 50), ("a.gif", good[:0], 50),
                                ("a.gif", good[..., :3], 50), ("a.gif", good, [50])):
        with pytest.raises(data.DataError, match="a"):
            data.write_sticker(tmp_path / name, frames, times)
    assert not list(tmp_path.iterdir())
    (tmp_path / "no.webp").write_text("?")
    with pytest.raises(data.DataError, match="no.webp"):
        data.read_metadata(tmp_path / "no.webp")
    Image.fromarray(good[0]).save(tmp_path / "plain.png")
    assert data.read_metadata(tmp_path / "plain.png") == {}


# Keyframes ------------------------------------------------------------------------------------------------

def slow_k_means(x, labels, k):
    """Lloyd's algorithm as in the textbook -> (within-cluster sum of squares, labels)."""
    for _ in range(50):
        nowhere = np.full(x.shape[1], np.inf)
        centres = [x[labels == c].mean(0) if (labels == c).any() else nowhere for c in range(k)]
        distance = np.stack([((x - c) ** 2).sum(1) for c in centres], 1)
        if (distance.argmin(1) == labels).all():
            break
        labels = distance.argmin(1)
    return distance.min(1).sum(), labels


def test_keyframes_equal_a_slow_reference():
    for index in (0, 4, 9, 23):
        frames = data.premultiply(data.synthetic_sticker(index)[0])
        x, t = data.frame_features(frames), len(frames)
        table = data.find_keyframes(frames)
        assert table.dtype == np.int16 and table.shape == (6, 8)
        assert np.array_equal(table, data.find_keyframes(frames))
        for k in range(3, 9):
            row = table[k - 3][table[k - 3] >= 0]
            if len({r.tobytes() for r in x}) <= k:
                assert len(row) == len({r.tobytes() for r in x})
                continue
            centres = [0]
            while len(centres) < k:
                centres.append(int(((x[:, None] - x[centres]) ** 2).sum(-1).min(1).argmax()))
            starts = [np.arange(t) * k // t, ((x[:, None] - x[centres]) ** 2).sum(-1).argmin(1)]
            found = [slow_k_means(x, start, k) for start in starts]
            labels = min(found, key=lambda result: round(result[0], 9))[1]
            assert row.tolist() == sorted(np.flatnonzero(labels == c)[0] for c in set(labels))


def test_keyframes_are_the_first_of_each_scene_and_never_doubles():
    scenes = np.stack([np.full((32, 32, 4), 40 + 50 * i, np.uint8) for i in range(4)])
    noise = np.random.default_rng(0).integers(0, 6, (20, 32, 32, 4), dtype=np.uint8)
    frames = scenes[[0] * 7 + [1] * 2 + [2] * 8 + [3] * 3] + noise
    assert data.find_keyframes(frames)[1].tolist() == [0, 7, 9, 17, -1, -1, -1, -1]
    back_and_forth = scenes[[0, 1, 0, 1, 0, 0, 1, 2, 2, 1, 0]]
    for row in data.find_keyframes(back_and_forth):
        assert row.tolist() == [0, 1, 7, -1, -1, -1, -1, -1]
    one = data.find_keyframes(scenes[:1])
    assert (one[:, 0] == 0).all() and (one[:, 1:] == -1).all()
    assert data.find_keyframes(scenes)[5].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


# Folders, stores, clips -----------------------------------------------------------------------------------

def test_captions_and_splits(tmp_path):
    for name in ("one.webp", "two-of_them.webp", "deep/three.webp"):
        data.write_sticker(tmp_path / name, moving(1), 0)
    (tmp_path / "deep" / "three.txt").write_text("  a caption\nin two lines ")
    line = '{"file_name": "one.webp", "text": "uno ✨", "split": "held_out"}\n\n'
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8")
    items = {item.name: item for item in data.list_stickers(tmp_path)}
    assert [items[n].caption for n in ("one.webp", "two-of_them.webp", "deep/three.webp")] == \
        ["uno ✨", "two of them", "a caption in two lines"]
    assert [item.split for item in items.values()] == [0, 1, 0]
    stickers = data.Stickers.from_folder(tmp_path, 32, filters=())
    assert stickers.select("held_out").tolist() == [1]
    assert stickers.caption(1) == "uno ✨" and stickers.name(0) == "deep/three.webp"
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "one.webp"}\nnonsense\n')
    with pytest.raises(data.DataError, match="line 2"):
        data.list_stickers(tmp_path)


def test_held_out_is_one_in_ten_and_fixed():
    held = [i for i in range(5000) if data.is_held_out(str(i))]
    assert 400 < len(held) < 600 and held[:5] == [20, 21, 27, 29, 34]


def test_store_equals_folder_and_memory(tmp_path):
    folder = write_folder(tmp_path / "in", 14)
    memory = data.Stickers.from_folder(folder, 32)
    store = data.prepare(folder, tmp_path / "store", 32, workers=1)
    memory.save(tmp_path / "saved")
    saved = data.Stickers.open(tmp_path / "saved")
    assert same_stickers(memory, store) and same_stickers(memory, saved)
    assert isinstance(store.frames, np.memmap)
    assert memory.meta["fingerprint"] == store.meta["fingerprint"] == saved.meta["fingerprint"]
    assert data.Stickers.from_folder(folder, 48).meta["fingerprint"] != memory.meta["fingerprint"]
    for item in range(len(memory)):
        for seed in range(3):
            rngs = [np.random.default_rng([seed, item]) for _ in range(3)]
            clips = [data.draw_clip(s, item, rng) for s, rng in zip((memory, store, saved), rngs)]
            assert all(np.array_equal(c, clips[0][0]) and n == clips[0][1] for c, n in clips)
    with pytest.raises(data.DataError, match="--size 64"):
        data.open_stickers(tmp_path / "store", 64)
    assert len(data.open_stickers(tmp_path / "store", 32)) == len(data.open_stickers(folder, 32)) == 14
    assert data.open_stickers(tmp_path / "store", 16, larger=True).size == 32
    with pytest.raises(data.DataError, match="--size 64"):
        data.open_stickers(tmp_path / "store", 64, larger=True)


def test_draw_clip_draws_every_k_evenly_and_pads_with_zeros():
    stickers = data.Stickers.synthetic(8, 32)
    rng = np.random.default_rng(0)
    item = int(stickers.index["count"].argmax())
    drawn = np.bincount([data.draw_clip(stickers, item, rng)[1] for _ in range(3000)], minlength=9)
    assert drawn[:3].sum() == 0 and (abs(drawn[3:] - 500) < 90).all()
    for item, length in itertools.product(range(8), (1, 3, 8)):
        clip, n = data.draw_clip(stickers, item, rng, length)
        assert clip.shape == (length, 4, 32, 32) and clip.dtype == np.float32 and 1 <= n <= length
        assert clip.max() <= 1 and (clip[n:] == 0).all() and all(clip[i].any() for i in range(n))
        assert len({frame.tobytes() for frame in clip[:n]}) == n
        count = int(stickers.index["count"][item])
        assert n == 1 if count == 1 else n >= min(3, length, count)
    drawn = {data.draw_clip(stickers, item, rng, shortest=7)[1] for _ in range(60)}
    assert drawn == {7, 8}                                              # never below `shortest`
    assert {data.draw_clip(stickers, item, rng, shortest=8)[1] for _ in range(20)} == {8}


def test_clips_hold_original_frames_in_time_order(tmp_path):
    frames = np.zeros((20, 32, 32, 4), np.uint8)
    frames[..., 3] = 255
    for i in range(20):
        frames[i, :, :, 0], frames[i, i:i + 8, :, 1] = 12 * i, 200
    data.write_sticker(tmp_path / "a.apng", frames, 42)
    stickers = data.Stickers.from_folder(tmp_path, 32)
    assert stickers.index["duration"][0] == 840
    for seed in range(20):
        clip, n = data.draw_clip(stickers, 0, np.random.default_rng(seed))
        which = np.round(clip[:n, 0, 0, 0] * 255 / 12).astype(int)
        assert (np.diff(which) > 0).all() and which[0] == 0
        assert np.array_equal((clip[:n] * 255).round().astype(np.uint8).transpose(0, 2, 3, 1), frames[which])


class HalfVAE:
    """Stands for rdtf.AutoencoderKL: f = 2, latents are means of 2x2 pixels less one half."""
    f, latent_channels, channels = 2, 4, 4

    def __init__(self, id):
        self.id = id

    def parameters(self):
        return []

    def encode(self, x):
        assert x.ndim == 4 and x.shape[1] == 4 and 0 <= x.min() and x.max() <= 1
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5)) - 0.5


def test_latents_on_the_fly_equal_latents_prepared_and_another_vae_is_refused(tmp_path):
    folder, vae = write_folder(tmp_path / "in", 8), HalfVAE("one")
    store = data.prepare(folder, tmp_path / "store", 32, vae, workers=0)
    fly = data.Stickers.from_folder(folder, 32).encode(vae)
    assert store.meta["kind"] == fly.meta["kind"] == "latents" and store.frames.shape[1:] == (4, 16, 16)
    assert store.frames.dtype == np.float16 and same_stickers(store, fly)
    assert store.meta["fingerprint"] == fly.meta["fingerprint"]
    for item in range(8):
        a, b = (data.draw_clip(s, item, np.random.default_rng(item)) for s in (store, fly))
        assert np.array_equal(a[0], b[0]) and a[1] == b[1] and (a[0][a[1]:] == 0).all() and a[0].min() < 0
    assert store.encode(vae) is store
    with pytest.raises(data.DataError, match="prepare it again"):
        store.encode(HalfVAE("two"))
    vae.f = 5
    with pytest.raises(data.DataError, match="--size 32"):
        data.Stickers.from_folder(folder, 32).encode(vae)


# Changed copies ---------------------------------------------------------------------------------------------

def test_varied_stickers_are_premultiplied_move_alike_and_keep_grey():
    frames = np.ascontiguousarray(data.fit_frames(moving(6), 32).transpose(0, 3, 1, 2))
    grey = frames.copy()
    grey[:, :3] = frames[:, 3:] // 2
    kept = 0
    for seed in range(40):
        new, holds = data.vary(frames, np.random.default_rng(seed))
        again, _ = data.vary(frames, np.random.default_rng(seed))
        assert new.shape == frames.shape and new.dtype == np.uint8 and np.array_equal(new, again)
        assert (new[:, :3] <= new[:, 3:]).all() and not np.array_equal(new, frames)
        still, _ = data.vary(frames[[2, 2]], np.random.default_rng(seed))
        assert np.array_equal(still[0], still[1]) and np.array_equal(still[0], new[2])
        turned, _ = data.vary(grey, np.random.default_rng(seed))       # about the grey axis: grey stays
        assert np.ptp(turned[:, :3].astype(int), axis=1).max() <= 1
        if holds:                                                      # not recoloured: red stays red
            red = frames.copy()
            red[:, 1:3] = 0
            assert not data.vary(red, np.random.default_rng(seed))[0][:, 1:3].any()
        kept += holds
    assert 3 <= kept <= 20                                             # of 40, a quarter


def test_a_mirrored_sticker_is_the_mirror_image_of_one():
    class Fixed:                                                       # no turn, size, shift or colour
        def __init__(self, mirror):
            self.mirror, self.scalars = mirror, [0.0, 1.0, 0.0]

        def uniform(self, low, high, size=None):
            return np.zeros(size) if size else self.scalars.pop(0)

        def random(self, size):
            return np.array([0.0 if self.mirror else 1.0, 1.0])

    frames = np.ascontiguousarray(data.fit_frames(moving(3), 32).transpose(0, 3, 1, 2))
    same, holds = data.vary(frames, Fixed(False))
    assert holds and np.abs(same.astype(int) - frames).max() <= 1
    other, holds = data.vary(frames, Fixed(True))
    assert not holds and np.abs(other[..., ::-1].astype(int) - frames).max() <= 1


def test_augmented_store(tmp_path, capsys):
    plain = data.Stickers.synthetic(24, 32)
    plain.save(tmp_path / "plain")
    more = data.augment(plain, 3)
    train, held = plain.select("train"), plain.select("held_out")
    assert len(held) and len(more) == 3 * len(train) + len(held)
    assert len(more.select("held_out")) == len(held)
    for split in ("train", "held_out"):
        step = 3 if split == "train" else 1
        for i, j in zip(plain.select(split), more.select(split)[::step]):          # each as it is comes first
            a, b = (data.draw_clip(s, k, np.random.default_rng(0)) for s, k in ((plain, i), (more, j)))
            assert np.array_equal(a[0], b[0]) and a[1] == b[1]
            assert plain.caption(i) == more.caption(j) and plain.name(i) == more.name(j)
    captions = {more.name(j): more.caption(j) for j in more.select("train")}
    assert len(captions) == len(more.select("train"))                              # names stay unique
    assert any("#" in n and not c for n, c in captions.items())
    assert all(c in ("", captions[n.partition("#")[0]]) for n, c in captions.items())
    vae = HalfVAE("one")
    assert same_stickers(data.augment(plain, 3, vae), more.encode(vae))
    assert data.augment(plain, 3, vae).meta == more.encode(vae).meta
    with pytest.raises(data.DataError, match="without --vae"):
        data.augment(plain.encode(vae), 3)
    command = ["augment", str(tmp_path / "plain"), "--size", "32", "--out"]
    assert data.main([*command, str(tmp_path / "more"), "--copies", "3"]) == 0
    assert same_stickers(data.Stickers.open(tmp_path / "more"), more)
    assert data.main([*command, str(tmp_path / "few"), "--copies", "1"]) == 2
    assert "--copies 1" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert data.main([*command, str(tmp_path / "mine")]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_filters_report_names_and_counts(tmp_path, capsys):
    folder = write_folder(tmp_path / "in", 12)
    data.write_sticker(folder / "tiny.webp", moving(2, 31), 50)
    data.write_sticker(folder / "long.webp", np.concatenate([moving(2, 40)] * 4, 2), 50)
    data.write_sticker(folder / "blank.webp", np.zeros((1, 40, 40, 4), np.uint8), 0)
    data.write_sticker(folder / "copy.apng", data.read_sticker(folder / "0003 thing.apng")[0], 99)
    (folder / "broken.gif").write_bytes(b"GIF89a")
    with pytest.raises(data.DataError, match="--max-bad 0.1"):
        data.prepare(folder, tmp_path / "store", 32, workers=0)
    assert not (tmp_path / "store").exists()
    told = capsys.readouterr().err
    for reason, name in (("small", "tiny"), ("aspect", "long"), ("entropy", "blank"), ("duplicate", "copy"),
                         ("unreadable", "broken")):
        assert f"left out, {reason}: 1" in told and name in told
    # goes on from the finished work
    store = data.prepare(folder, tmp_path / "store", 32, workers=0, max_bad=0.5)
    assert len(store) == 12 and sum(store.meta["left_out"].values()) == 5
    assert len(data.prepare(folder, tmp_path / "all", 32, workers=0, filters=(), max_bad=0.5)) == 16
    with pytest.raises(data.DataError, match="--max-bad"):
        data.Stickers.from_folder(folder, 32)
    assert same_stickers(data.Stickers.from_folder(folder, 32, max_bad=0.5), store)


def command(*arguments, **options):
    call = [sys.executable, str(ROOT / "data.py"), *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, **options)


def test_prepare_killed_in_the_middle_continues_to_the_same_store(tmp_path):
    folder = write_folder(tmp_path / "in", 30, 100)
    (folder / "0011 broken.gif").write_bytes(b"GIF89a")
    whole = data.prepare(folder, tmp_path / "whole", 96, workers=0)
    arguments = [sys.executable, str(ROOT / "data.py"), "prepare", str(folder),
                 "--out", str(tmp_path / "out"), "--size", "96", "--workers", "0"]
    journal = tmp_path / "out.partial" / "journal.jsonl"
    kills = 0
    for lines in (5, 18):
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > lines):
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills and not (tmp_path / "out").exists()
    with open(journal, "ab") as file:                  # and it died while it wrote
        file.write(b'{"reason": "ok", "ends"')
    with open(tmp_path / "out.partial" / "frames.bin", "ab") as file:
        file.write(b"half a frame")
    done = command(*arguments[2:])
    assert done.returncode == 0 and "continuing after" in done.stdout, done.stderr
    store = data.Stickers.open(tmp_path / "out")
    assert same_stickers(store, whole) and store.meta == whole.meta and not journal.parent.exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} == \
        {"frames.bin", "index.bin", "text.bin", "meta.json", "report.txt"}
    assert "already prepared" in command(*arguments[2:]).stdout
    write_folder(folder, 1, start=90)  # other inputs: prepared anew, in place of the old store
    assert command(*arguments[2:]).returncode == 0 and len(data.Stickers.open(tmp_path / "out")) == 31
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_journal_ahead_of_its_data_is_cut_back(tmp_path):
    folder = write_folder(tmp_path / "in", 6)
    whole = data.prepare(folder, tmp_path / "a", 32, workers=0)
    real = data.Report.finish
    data.Report.finish = lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            data.prepare(folder, tmp_path / "b", 32, workers=0)
    finally:
        data.Report.finish = real
    with open(tmp_path / "b.partial" / "frames.bin", "ab") as file:
        file.truncate(file.tell() // 2)                # as after a power loss
    assert same_stickers(data.prepare(folder, tmp_path / "b", 32, workers=0), whole)


def test_two_at_once_are_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = write_folder(tmp_path / "in", 2)
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial" / "journal.jsonl", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(data.DataError, match="another prepare"):
            data.prepare(folder, tmp_path / "out", 32, workers=0)


def test_a_million_entries_open_in_under_a_second(tmp_path):
    count, sample = 1_000_000, data.Stickers.synthetic(1, 8)
    index = np.tile(sample.index, count)
    index["offset"] = np.arange(count)
    index["count"] = 1
    index["split"] = np.arange(count) % 10 == 3
    index.tofile(tmp_path / "index.bin")
    (tmp_path / "text.bin").write_bytes(sample.text)
    with open(tmp_path / "frames.bin", "wb") as file:
        file.truncate(count * 4 * 8 * 8)               # sparse
    meta = {**sample.meta, "count": count, "shape": [count, 4, 8, 8], "dtype": "|u1"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    start = time.perf_counter()
    stickers = data.Stickers.open(tmp_path)
    caption = stickers.caption(654_321)
    data.draw_clip(stickers, 777_777, np.random.default_rng(0))
    assert time.perf_counter() - start < 1 and len(stickers) == count and caption == sample.caption(0)
    assert len(stickers.select("held_out")) == count // 10


def act(order):
    """What a worker does in the next test."""
    if order == "die":
        os._exit(9)
    if order == "hang":
        time.sleep(60)
    return "ok", order


def test_workers_that_die_or_hang_cost_one_item_each():
    orders = [*range(5), "die", *range(5, 9), "hang", "die", *range(9, 14)]
    start = time.monotonic()
    results = list(data.in_order(act, orders, 2, timeout=2))
    assert time.monotonic() - start < 50
    assert [r for r in results if r[0] == "ok"] == [("ok", i) for i in range(14)]
    bad = [i for i, order in enumerate(orders) if isinstance(order, str)]
    assert [i for i, r in enumerate(results) if r[0] == "unreadable"] == bad
    assert not multiprocessing.active_children()


def test_decoding_stays_a_bounded_way_ahead():
    taken = itertools.count()
    last = 0

    def orders():
        nonlocal last
        for last in taken:
            if last == 200:
                return
            yield last
    results = data.in_order(act, orders(), 2)
    for position, _ in enumerate(results):
        if position < 20:
            time.sleep(0.02)
        assert last - position <= 2 * 8 + 1


# Procedural and built-in stickers, Fluent, the command line -----------------------------------------------

def test_synthetic_stickers_are_the_same_for_ever_and_say_what_they_show():
    stickers = [data.synthetic_sticker(i) for i in range(60)]
    again = data.synthetic_sticker(17)
    assert np.array_equal(again[0], stickers[17][0]) and again[1:] == stickers[17][1:]
    for frames, times, caption, what in stickers:
        assert frames.shape[1:] == (64, 64, 4) and len(times) == len(frames) <= 40
        assert all(what[key] in caption for key in ("colour", "shape", "scale"))
        assert (what["motion"] == "still") == (len(frames) == 1)
        assert what["motion"] == "still" or caption.endswith(data.MOTIONS[what["motion"]])
        solid = frames[0][frames[0][..., 3] > 240]
        # soft edges
        assert frames[..., 3].max() > 240 and len(solid) and len(np.unique(frames[0][..., 3])) > 3
        edge = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], 1)
        assert edge[..., 3].max() == 0  # stays inside
    counts = [len(frames) for frames, *_ in stickers]
    assert 1 in counts and max(counts) > 25 and np.median(counts) < 15
    assert len({caption for _, _, caption, _ in stickers}) > 50
    s = data.open_stickers("synthetic:30", 32)
    assert len(s) == 30 and 0 < len(s.select("train")) < 30 and s.caption(17) == stickers[17][2]


def test_built_in_stickers():
    files = [p for p in BUILT_IN.iterdir()]
    assert sum(p.stat().st_size for p in files) <= 2.2e6
    assert {"LICENSE-LobeHub", "LICENSE-Microsoft", "metadata.jsonl"} <= {p.name for p in files}
    s = data.open_stickers(BUILT_IN, 64)
    assert len(s) == len({s.caption(i) for i in range(64)}) == 64 and (s.index["count"] > 1).sum() == 52
    assert all(s.caption(i).isascii() and not s.caption(i)[0].isdigit() for i in range(64))
    rows = [json.loads(line) for line in (BUILT_IN / "metadata.jsonl").read_text().splitlines()]
    assert not any(data.is_held_out(row["concept"]) for row in rows)
    frames, times = data.read_sticker(BUILT_IN / "1f600.webp")
    assert frames.shape == (16, 64, 64, 4) and 1000 < sum(times) < 5000


def test_emoji_captions_with_and_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    for codes, words in (("1f600", "grinning face"), ("1f3c4-200d-2640-fe0f", "surfer woman"),
                         ("0033-fe0f-20e3", "digit three keycap"), ("1f1e9-1f1ea", "flag de"),
                         ("1f44b-1f3fd", "waving hand sign medium skin tone"),
                         ("1f3f4-e0067-e0062-e0065-e006e-e0067-e007f", "waving black flag gbeng")):
        assert data.emoji_caption([int(c, 16) for c in codes.split("-")]) == words
    monkeypatch.undo()
    pytest.importorskip("emoji")
    assert data.emoji_caption([0x1F3C4, 0x200D, 0x2640, 0xFE0F]) == "woman surfing"
    assert data.emoji_caption([0x1F1E9, 0x1F1EA]) == "flag germany"


def fluent_tarball(path):
    with tarfile.open(path, "w:gz") as tar:
        names = ("1f600", "1f44b", "1f44b-1f3fd", "1f3f4-e0067_e0062", "1f3c4-200d-2640-fe0f")
        for i, name in enumerate(names):
            file = path.with_name("x.webp")
            data.write_sticker(file, moving(1 + i), 42)
            tar.add(file, f"package/assets/{name}.webp")
        tar.add(file, "../../outside.webp")
        tar.add(file, "package/assets/../../../1f47d.webp")
        link = tarfile.TarInfo("package/assets/1f47e.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        file.unlink()


def test_fluent_from_npm(tmp_path):
    """A stand-in for npm hands out a small package."""
    bin, out = tmp_path / "bin", tmp_path / "deep" / "out"
    bin.mkdir()
    fluent_tarball(tmp_path / "package.tgz")
    npm = bin / "npm"
    npm.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/calls\ncp {tmp_path}/package.tgz "
                   "$4/lobehub-fluent-emoji-anim-3-1.0.0.tgz\n")
    npm.chmod(0o755)
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    done = command("fluent", "--out", out, "--parts", "3", "--no-tones", env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().startswith("pack @lobehub/fluent-emoji-anim-3@1.0.0 "
                                                       "--pack-destination")
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert {r["file_name"].removesuffix(".webp") for r in rows} == \
        {"1f600", "1f44b", "1f3f4-e0067_e0062", "1f3c4-200d-2640-fe0f", "1f47d"}
    assert not list(tmp_path.rglob("*outside*")) and not list(out.rglob("*.tgz"))
    assert [r["animated"] for r in rows if r["file_name"] == "1f600.webp"] == [False]
    done = command("fluent", "--out", out, "--parts", "3", env=env)        # now with tones
    assert done.returncode == 0
    rows = {r["file_name"]: r for r in map(json.loads, (out / "metadata.jsonl").read_text().splitlines())}
    assert rows["1f44b-1f3fd.webp"]["tone"] and not rows["1f44b.webp"]["tone"]
    assert rows["1f44b-1f3fd.webp"]["concept"] == rows["1f44b.webp"]["concept"] == "1f44b"
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    assert "already there" in command("fluent", "--out", out, "--parts", "3", env=env).stdout
    npm.write_text("#!/bin/sh\necho 'npm error network down' >&2\nexit 1\n")
    for path, words in ((env["PATH"], "network down"), (str(tmp_path), "install Node.js")):
        done = command("fluent", "--out", out, "--parts", "1", env={**env, "PATH": path})
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    half = (tmp_path / "package.tgz").read_bytes()[:700]
    (tmp_path / "lobehub-fluent-emoji-anim-2-1.0.0.tgz").write_bytes(half)
    done = command("fluent", "--out", out, "--parts", "2", "--tarballs", tmp_path)
    assert done.returncode == 2 and "damaged" in done.stderr and "Traceback" not in done.stderr


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    good = write_folder(tmp_path / "good", 3)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "meta.json").write_text('{"format": "rdtf-stickers-1"}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "meta.json").write_text('{"format": "rdtf-stickers-0"}')
    for words, *arguments in (("no such folder", "prepare", tmp_path / "nowhere", "--out", tmp_path / "o"),
                              ("no sticker in it", "prepare", tmp_path / "empty", "--out", tmp_path / "o"),
                              ("--size 3", "prepare", good, "--out", tmp_path / "o", "--size", "3"),
                              ("--filter odd", "prepare", good, "--out", tmp_path / "o", "--filter", "odd"),
                              ("no prepared store", "prepare", good, "--out", good),
                              ("--parts 5", "fluent", "--out", tmp_path / "f", "--parts", "5"),
                              ("not a file", "convert", tmp_path / "no.gif", tmp_path / "o.webp"),
                              (".bmp", "convert", good / "0000 thing.webp", tmp_path / "o.bmp"),
                              ("check the path", "prepare", good, "--out", "/proc/nowhere/store")):
        assert data.main([str(a) for a in arguments]) == 2
        told = capsys.readouterr().err.strip()
        assert words in told and told.startswith("error: ") and "\n" not in told, told
    for folder, words in (("half", "no whole store"), ("other", "prepare it again"), ("nowhere", "no such")):
        with pytest.raises(data.DataError, match=words):
            data.open_stickers(tmp_path / folder, 64)
    with pytest.raises(data.DataError, match="at least one"):
        data.open_stickers("synthetic:0", 64)
    data.prepare(good, tmp_path / "store", 32, workers=0)
    with open(tmp_path / "store" / "frames.bin", "ab") as file:
        file.truncate(100)
    with pytest.raises(data.DataError, match="no whole store"):
        data.open_stickers(tmp_path / "store", 32)
    assert data.main(["convert", str(good / "0002 thing.apng"), str(tmp_path / "c.gif"), "--size", "24"]) == 0
    shutil.rmtree(tmp_path / "store")
