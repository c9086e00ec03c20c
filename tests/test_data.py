"""data.py: what it promises about files, keyframes, stores and clips."""
import functools
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus
import numpy as np
import pytest
import torch
from PIL import Image

import data
from stickers import procedural

ROOT = Path(data.__file__).parent
PATH = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data\n"
SMALL = PATH + "data.SHARD = 6; sys.exit(data.main(sys.argv[1:]))"                  # small shards


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
    shards = len(a.shards) == len(b.shards) and all(map(np.array_equal, a.shards, b.shards))
    return shards and np.array_equal(a.index, b.index) and bytes(a.text) == bytes(b.text)


def names(stickers):
    return [stickers.texts(i)[0] for i in range(len(stickers))]


def command(*arguments, code=None, **options):
    """data.py, or the program `code`, as a process that has ended."""
    call = [sys.executable, *(["-c", code] if code else [ROOT / "data.py"]), *arguments]
    return subprocess.run(list(map(str, call)), capture_output=True, text=True, timeout=60, **options)


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


def test_to_straight_rounds_and_undoes_premultiplying():
    frames = moving(3)
    x = torch.from_numpy(data.premultiply(frames)).permute(0, 3, 1, 2) / 255
    assert np.array_equal(data.to_straight(x), data.unpremultiply(data.premultiply(frames)))
    nudged = x + torch.where(x < 0.5, 0.4, -0.4) / 255
    assert np.array_equal(data.to_straight(nudged), data.to_straight(x))
    assert data.to_straight(torch.tensor([[[[9.0]]] * 4]))[0, 0, 0].tolist() == [255] * 4


# Reading ----------------------------------------------------------------------------------------------------

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
    store = data.prepare(folder, tmp_path / "store", 16, workers=2, filters=(), max_bad=1)
    lines = (tmp_path / "store" / "report.txt").read_text().splitlines()
    assert all(line.startswith("unreadable\t") for line in lines)
    assert len(store) + len(lines) == len(expected)
    kept, told = set(names(store)), "\n".join(lines)
    for name, gives in expected.items():
        clean = name.encode("utf-8", "backslashreplace").decode()
        if gives == "bad":
            assert name not in kept and clean in told
        elif gives is not None:
            assert name in kept and clean not in told
    capsys.readouterr()
    with pytest.raises(data.DataError, match="--max-bad 0.1"):
        data.prepare(folder, tmp_path / "other", 16, workers=0, filters=(), max_bad=0.1)
    told = capsys.readouterr().err.strip()
    assert told.startswith("left out, unreadable") and "\n" not in told and not (tmp_path / "other").exists()
    assert (tmp_path / "other.partial" / "report.txt").read_text().splitlines() == lines


def test_reading_bad_files_leaks_no_memory(odd):
    def resident():
        for name in odd[1]:
            data.decode_item(odd[0] / name, 16, 8)
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    resident()
    before = resident()
    assert resident() - before < 8 << 20


def test_mutated_files_never_do_more_than_fail(tmp_path):
    rng, seen = random.Random(5), {"ok": 0, "unreadable": 0}
    frames = corpus.clip(3, 24, 20)
    seeds = [corpus.encoded(frames, kind) for kind in ("GIF", "WEBP", "PNG")]
    seeds += [corpus.encoded(frames[:1], kind) for kind in ("JPEG", "PNG")]
    path = tmp_path / "mutant.bin"
    for _ in range(300):
        mutant = bytearray(rng.choice(seeds))
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            at, kind = rng.randrange(len(mutant)), rng.randrange(4)
            if kind == 0:
                mutant[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del mutant[at:min(at + rng.randrange(1, 40), len(mutant) - 1)]
            elif kind == 2:
                mutant[at:at] = rng.randbytes(rng.randrange(1, 40))
            else:
                mutant[at:at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
        path.write_bytes(mutant)
        start = time.monotonic()
        seen[data.decode_item(path, 16, 8, ())[0]] += 1
        assert time.monotonic() - start < 5
    assert min(seen.values()) > 15, seen


@pytest.mark.parametrize("disposal", range(4))
def test_gif_frames_are_composited_as_the_format_says(odd, disposal):
    """0 and 1: the frame stays; 2: its place is cleared; 3: what was there before it comes back."""
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


def test_video_reads_where_its_decoder_is_installed(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="video needs imageio-ffmpeg")
    writer = ffmpeg.write_frames(str(tmp_path / "a.mp4"), (32, 32), fps=20)
    writer.send(None)
    for frame in moving(5)[..., :3]:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    frames, times = data.read_sticker(tmp_path / "a.mp4")
    assert frames.shape == (5, 32, 32, 4) and times == [50] * 5 and frames[..., 3].min() == 255


def test_a_gif_of_one_frame_has_no_time(tmp_path):
    picture = Image.fromarray(moving(1)[0, ..., :3])
    picture.save(tmp_path / "a.gif", duration=100)
    assert data.read_sticker(tmp_path / "a.gif")[1] == [0]


# Writing ----------------------------------------------------------------------------------------------------

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


def test_sheets(tmp_path):
    frames = moving(5, 33)
    data.write_sticker(tmp_path / "a.png", frames, 80)
    sheet = data.read_sticker(tmp_path / "a.png")[0]
    assert sheet.shape == (1, 33, 5 * 33, 4) and np.array_equal(sheet[0][:, 33:66], frames[1])
    data.save_sheet(tmp_path / "sheet.png", [frames, frames[:2]], ["a label", "another"])
    assert data.read_sticker(tmp_path / "sheet.png")[0].shape[1:] == (70, 150 + 5 * 35, 4)
    data.save_sheet(tmp_path / "moves.webp", [[frames, frames[:2]], [frames]])
    moves, times = data.read_sticker(tmp_path / "moves.webp")
    assert moves.shape == (5, 70, 70, 4) and times == [125] * 5
    assert np.abs(moves[2, :33, 35:68].astype(int) - moves[4, :33, 35:68]).max() < 16   # the short one waits


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
                                ("a.gif", good[..., :3], 50)):
        with pytest.raises(data.DataError, match="a"):
            data.write_sticker(tmp_path / name, frames, times)
    assert not list(tmp_path.iterdir())
    data.write_sticker(tmp_path / "slow.gif", good, 10 ** 9)             # more than a GIF's two bytes hold
    assert data.read_sticker(tmp_path / "slow.gif")[1] == [600_000] * 2


# Keyframes --------------------------------------------------------------------------------------------------

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


def slow_keyframes(x, k):
    """The frames nearest to the centres of k clusters, the tighter of two starts, as METHOD.md says it."""
    centres = [0]
    while len(centres) < k:
        centres.append(int(((x[:, None] - x[centres]) ** 2).sum(-1).min(1).argmax()))
    starts = [np.arange(len(x)) * k // len(x), ((x[:, None] - x[centres]) ** 2).sum(-1).argmin(1)]
    labels = min((slow_k_means(x, start, k) for start in starts), key=lambda found: round(found[0], 9))[1]
    chosen = []
    for c in set(labels):
        members = np.flatnonzero(labels == c)
        distance = ((x[members] - x[members].mean(0)) ** 2).sum(1).round(9)
        chosen.append(int(members[distance.argmin()]))
    return sorted(chosen)


@pytest.mark.parametrize("index", [0, 4, 9, 23])
def test_keyframes_equal_a_slow_reference(index):
    frames = data.premultiply(procedural.sticker(index, 64)[0])
    table = data.find_keyframes(frames)
    counts = [i for i, x in enumerate(data.frame_features(frames))
              if i == 0 or (x != data.frame_features(frames[i - 1:i])).any()]
    assert table.dtype == np.int16 and table.shape == (6, 8)
    for k, row in zip(range(3, 9), table):
        chosen = counts
        if len(counts) > k:
            chosen = [counts[i] for i in slow_keyframes(data.frame_features(frames[counts]), k)]
        assert row.tolist() == chosen + [-1] * (8 - len(chosen))


SCENES = np.stack([np.full((32, 32, 4), 40 + 50 * i, np.uint8) for i in range(4)])


def test_keyframes_are_one_of_each_scene():
    noise = np.random.default_rng(0).integers(0, 6, (20, 32, 32, 4), dtype=np.uint8)
    row = data.find_keyframes(SCENES[[0] * 7 + [1] * 2 + [2] * 8 + [3] * 3] + noise)[1]
    assert [0 if i < 7 else 1 if i < 9 else 2 if i < 17 else 3 for i in row[:4]] == [0, 1, 2, 3]
    assert row[4:].tolist() == [-1] * 4
    still = data.find_keyframes(SCENES[[0, 0, 0]])
    assert (still[:, 0] == 0).all() and (still[:, 1:] == -1).all()
    assert data.find_keyframes(SCENES)[5].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


def test_a_held_frame_counts_once_and_one_that_comes_back_counts_again():
    there_and_back = data.find_keyframes(SCENES[[0, 0, 1, 1, 1, 2, 1, 1, 0]])
    assert there_and_back[5].tolist() == [0, 2, 5, 6, 8, -1, -1, -1]
    for order in ([0, 1] * 10, [0, 1, 2] * 7, [0, 0, 1, 1] * 6, [0, 1, 2, 3, 2, 1] * 3):
        # far fewer different frames than k: clusters die, yet k different moments are found
        for k, row in zip(range(3, 9), data.find_keyframes(SCENES[order])):
            chosen = row[:k].tolist()
            assert min(chosen) >= 0 and chosen == sorted(set(chosen)) and (row[k:] == -1).all()
            assert all(i == 0 or order[i] != order[i - 1] for i in chosen)


# Folders ----------------------------------------------------------------------------------------------------

def test_captions_tags_and_splits(tmp_path):
    for i, name in enumerate(("one.webp", "two-of_them.webp", "deep/three.webp")):
        data.write_sticker(tmp_path / name, moving(1 + i), 0)
    (tmp_path / "deep" / "three.txt").write_text("  a caption\nin two lines ")
    line = '{"file_name": "one.webp", "text": "uno ✨", "tags": ["food", "red"], "split": "held_out"}\n\n'
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8")
    s = data.open_stickers(tmp_path, 32)
    assert [s.texts(i) for i in range(3)] == [["deep/three.webp", "a caption in two lines", []],
                                              ["one.webp", "uno ✨", ["food", "red"]],
                                              ["two-of_them.webp", "two of them", []]]
    assert s.select("held_out").tolist() == [1] and s.caption(1) == "uno ✨, food"
    for bad in ('nonsense', '{"file_name": "x", "tags": "cute"}', '{"file_name": "x", "split": "test"}'):
        (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "one.webp"}}\n{bad}\n')
        with pytest.raises(data.DataError, match="line 2"):
            data.list_stickers(tmp_path)


def test_captions_as_editors_and_exports_write_them(tmp_path, capsys):
    """Faults: a byte order mark in the caption; hidden folders; a null that turned holding out off; a typo in
    a file name that nobody was told of; ", animal" for a sticker without a name."""
    for i in range(45):
        (tmp_path / f"{i}.png").touch()
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "0.png").touch()
    (tmp_path / "0.txt").write_text("waving cat", encoding="utf-8-sig")
    rows = [{"file_name": f"{i}.png", "text": "", "tags": ["animal"], "split": None} for i in range(1, 45)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"file_name": "typo.png"}])))
    items = data.list_stickers(tmp_path)
    assert len(items) == 45 and items[0].caption == "waving cat" and any(item.split for item in items)
    assert "1 of 45 lines name no sticker here, such as 'typo.png'" in capsys.readouterr().err
    keys = data.keep_keyframes(data.premultiply(moving(1)), 0)
    frames, index, text = data.pack([(items[1], keys)], 32, 8)
    s = data.Stickers([frames], index, text, data.make_meta(32, 8))
    drawn = {s.caption(0, np.random.default_rng(i)) for i in range(9)}
    assert s.caption(0) == "animal" and drawn == {"animal"}


def test_a_caption_is_drawn_from_name_and_tags_by_the_rng_alone():
    item = data.Item("", "x", "cherry", ("fruit", "red", "sweet", "two", "food"))
    keys = data.keep_keyframes(data.premultiply(moving(1)), 0)
    frames, index, text = data.pack([(item, keys), (data.Item("", "y", "plain"), keys)], 32, 8)
    s = data.Stickers([frames], index, text, data.make_meta(32, 8))
    drawn = [s.caption(0, np.random.default_rng(i)).split(", ") for i in range(400)]
    assert drawn == [s.caption(0, np.random.default_rng(i)).split(", ") for i in range(400)]
    named = [words for words in drawn if words[0] == "cherry"]
    assert 260 < len(named) < 340                                       # three in four
    for words in drawn:
        assert words[words[0] == "cherry"] == "fruit"                   # the first tag is always there
        more = words[1 + (words[0] == "cherry"):]
        assert len(more) == len(set(more)) <= 3 and set(more) <= {"red", "sweet", "two", "food"}
    assert {len(words) - (words[0] == "cherry") for words in drawn} == {1, 2, 3, 4}
    assert s.caption(0) == "cherry, fruit" and s.caption(1, np.random.default_rng(0)) == "plain"


def test_held_out_is_one_in_ten_and_fixed():
    held = [i for i in range(5000) if data.is_held_out(str(i))]
    assert 400 < len(held) < 600 and held[:5] == [20, 21, 27, 29, 34]


def test_a_folder_of_forty_holds_some_out_by_name(tmp_path):
    for i in range(400):
        (tmp_path / f"{i}.png").touch()
    held = {item.name for item in data.list_stickers(tmp_path) if item.split}
    assert 8 <= len(held) <= 32                                         # 5 %
    assert not any(item.split for item in data.list_stickers(tmp_path, hold_out=0))
    assert len([item for item in data.list_stickers(tmp_path, 0.2) if item.split]) > 2 * len(held)
    for i in range(39, 400):
        (tmp_path / f"{i}.png").unlink()
    assert not any(item.split for item in data.list_stickers(tmp_path))            # 39 are too few
    (tmp_path / "39.png").touch()
    assert {item.name for item in data.list_stickers(tmp_path) if item.split} == \
        {name for name in held if int(name[:-4]) < 40}                  # the same ones as among 400
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "3.png", "split": "held_out"}')
    assert [item.name for item in data.list_stickers(tmp_path) if item.split] == ["3.png"]


def test_filters_report_but_only_unreadable_files_are_bad(tmp_path, capsys):
    folder = write_folder(tmp_path / "in", 12)
    for i in range(8):
        data.write_sticker(folder / f"tiny{i}.apng", moving(2, 31), 50)
    data.write_sticker(folder / "long.apng", np.concatenate([moving(2, 40)] * 4, 2), 50)
    data.write_sticker(folder / "blank.apng", np.zeros((1, 40, 40, 4), np.uint8), 0)
    data.write_sticker(folder / "copy.apng", data.read_sticker(folder / "0003 thing.apng")[0], 99)
    store = data.prepare(folder, tmp_path / "store", 32, workers=0)
    told = capsys.readouterr().err
    for reason, count, name in (("small", 8, "tiny3"), ("aspect", 1, "long"), ("entropy", 1, "blank"),
                                ("duplicate", 1, "copy")):
        assert f"left out, {reason}: {count} of 23" in told and name in told
    assert len(store) == 12 and len((tmp_path / "store" / "report.txt").read_text().splitlines()) == 11
    assert same_stickers(data.open_stickers(folder, 32), store)
    for i in range(3):
        (folder / f"broken{i}.gif").write_bytes(b"GIF89a")
    for call in (lambda: data.open_stickers(folder, 32),
                 lambda: data.prepare(folder, tmp_path / "new", 32, workers=0)):
        with pytest.raises(data.DataError, match="3 of 26 files are unreadable.*prepare the folder"):
            call()
    assert not (tmp_path / "new").exists()
    assert len(data.prepare(folder, tmp_path / "new", 32, workers=0, max_bad=0.2)) == 12
    assert len(data.prepare(folder, tmp_path / "all", 32, workers=0, filters=(), max_bad=0.2)) == 23
    for path in [*folder.glob("0*"), *folder.glob("copy*")]:
        path.unlink()
    with pytest.raises(data.DataError, match="all 13 files are left out.*--filter none"):
        data.prepare(folder, tmp_path / "none", 32, workers=0, max_bad=1)


# Clips ------------------------------------------------------------------------------------------------------

def test_draw_clip_draws_every_k_evenly_and_pads_with_zeros():
    stickers, rng = data.open_stickers("synthetic:8", 32), np.random.default_rng(0)
    item = int(stickers.index["count"].argmax())
    drawn = np.bincount([data.draw_clip(stickers, item, rng)[1] for _ in range(3000)], minlength=9)
    assert drawn[:3].sum() == 0 and (abs(drawn[3:] - 500) < 90).all()
    for i in range(8):
        clip, n = data.draw_clip(stickers, i, rng)
        assert clip.shape == (8, 4, 32, 32) and clip.dtype == np.float32 and clip.max() <= 1
        assert (clip[n:] == 0).all() and all(frame.any() for frame in clip[:n])
        assert n == 1 if stickers.index["count"][i] == 1 else n >= min(3, stickers.index["count"][i])
    assert {data.draw_clip(stickers, item, rng, shortest=7)[1] for _ in range(60)} == {7, 8}
    assert {data.draw_clip(stickers, item, rng, full=1.0)[1] for _ in range(20)} == {8}
    halves = [data.draw_clip(stickers, item, rng, full=0.5)[1] == 8 for _ in range(1000)]
    assert 520 < sum(halves) < 650                                      # 1/2 + 1/12


@pytest.mark.parametrize("most", [5, 8, 16])
def test_f_is_one_setting(most):
    """Fault: Config.frames = 16 trained on 8 real frames and padding."""
    stickers = data.open_stickers("synthetic:8", 32, most)
    drawn = [data.draw_clip(stickers, i, np.random.default_rng(s)) for i in range(8) for s in range(40)]
    assert {len(clip) for clip, _ in drawn} == {most} and max(n for _, n in drawn) == most


def test_clips_hold_original_frames_in_time_order(tmp_path):
    frames = np.zeros((20, 32, 32, 4), np.uint8)
    frames[..., 3] = 255
    for i in range(20):
        frames[i, :, :, 0], frames[i, i:i + 8, :, 1] = 12 * i, 200
    data.write_sticker(tmp_path / "a.apng", frames, 42)
    stickers = data.open_stickers(tmp_path, 32)
    assert stickers.index["duration"][0] == 840
    for seed in range(20):
        clip, n = data.draw_clip(stickers, 0, np.random.default_rng(seed))
        which = np.round(clip[:n, 0, 0, 0] * 255 / 12).astype(int)
        assert (np.diff(which) > 0).all()
        assert np.array_equal((clip[:n] * 255).round().astype(np.uint8).transpose(0, 2, 3, 1), frames[which])


class HalfVAE:
    """Stands for rdtf.AutoencoderKL: f = 2, latents are means of 2x2 pixels less one half."""
    f, mean = 2, torch.zeros(4)

    def __init__(self, name):
        self.fingerprint = lambda: name

    def encode(self, x):
        assert x.ndim == 4 and x.shape[1] == 4 and 0 <= x.min() and x.max() <= 1
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5)) - 0.5


def test_latents_on_the_fly_equal_latents_prepared_and_another_vae_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 3)
    folder, vae = write_folder(tmp_path / "in", 8), HalfVAE("one")
    store = data.prepare(folder, tmp_path / "store", 32, vae, workers=0)
    fly = data.prepare(folder, tmp_path / "pixels", 32, workers=0).encode(vae)
    assert store.meta["kind"] == fly.meta["kind"] == "latents" and store.shards[0].shape[1:] == (4, 16, 16)
    assert len(store.shards) == 3 and store.shards[0].dtype == np.float16 and same_stickers(store, fly)
    assert store.meta["fingerprint"] == fly.meta["fingerprint"]
    for item in range(8):
        a, b = (data.draw_clip(s, item, np.random.default_rng(item)) for s in (store, fly))
        assert np.array_equal(a[0], b[0]) and a[1] == b[1] and (a[0][a[1]:] == 0).all() and a[0].min() < 0
    assert store.encode(vae) is store
    with pytest.raises(data.DataError, match="prepare it again"):
        store.encode(HalfVAE("two"))
    assert data.encode_frames(vae, np.zeros((0, 4, 32, 32), np.uint8)).shape == (0, 4, 16, 16)
    vae.f = 5
    with pytest.raises(data.DataError, match="--size 32"):
        data.open_stickers(folder, 32).encode(vae)


def test_joined_sets_hold_what_each_held(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 4)
    sets = [data.prepare(write_folder(tmp_path / "in", 6), tmp_path / "store", 32, workers=0),
            data.open_stickers("synthetic:5", 32),
            data.open_stickers(write_folder(tmp_path / "b", 3, start=50), 32)]
    whole, source = data.join(sets)
    assert source.tolist() == [0] * 6 + [1] * 5 + [2] * 3 and len(whole) == 14
    place = 0
    for s in sets:
        for i in range(len(s)):
            a, b = (data.draw_clip(x, j, np.random.default_rng(i)) for x, j in ((s, i), (whole, place)))
            assert np.array_equal(a[0], b[0]) and a[1] == b[1]
            assert s.texts(i) == whole.texts(place) and s.index[i]["split"] == whole.index[place]["split"]
            place += 1
    assert same_stickers(data.join([whole])[0], whole)
    prints = {data.join(order)[0].meta["fingerprint"] for order in (sets, sets[:2], sets[1::-1], sets[:1])}
    assert len(prints) == 4
    for other in (data.open_stickers("synthetic:5", 48), data.open_stickers("synthetic:5", 32, 5),
                  sets[1].encode(HalfVAE("one"))):
        with pytest.raises(data.DataError, match="the sets differ"):
            data.join([sets[0], other])


# Stores -----------------------------------------------------------------------------------------------------

def test_store_equals_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SHARD", 5)
    folder = write_folder(tmp_path / "in", 14)
    memory, store = data.open_stickers(folder, 32), data.prepare(folder, tmp_path / "store", 32, workers=1)
    assert isinstance(store.shards[0], np.memmap) and len(store.shards) == 3 and names(memory) == names(store)
    for item in range(14):
        for seed in range(3):
            a, b = (data.draw_clip(s, item, np.random.default_rng([seed, item])) for s in (memory, store))
            assert np.array_equal(a[0], b[0]) and a[1] == b[1]
    again = data.open_stickers(tmp_path / "store", 32)
    assert same_stickers(again, store) and again.meta == store.meta
    with pytest.raises(data.DataError, match="--frames 8 --size 64"):
        data.open_stickers(tmp_path / "store", 64)
    with pytest.raises(data.DataError, match="--frames 16 --size 32"):
        data.open_stickers(tmp_path / "store", 32, 16)
    (folder / "metadata.jsonl").write_text('{"file_name": "0003 thing.apng", "text": "new"}')
    prints = {data.open_stickers(folder, size).meta["fingerprint"] for size in (32, 48)}
    assert len(prints | {memory.meta["fingerprint"]}) == 3              # captions and size count
    capsys.readouterr()
    assert data.prepare(folder, tmp_path / "store", 32, workers=0).caption(3) == "new"      # prepared anew
    data.prepare(folder, tmp_path / "store", 32, workers=0)
    assert "already prepared" in capsys.readouterr().out
    os.replace(tmp_path / "store", tmp_path / "store.old")                # killed just when it took its place
    assert data.prepare(folder, tmp_path / "store", 32, workers=0).caption(3) == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "store"]


def test_prepare_killed_in_the_middle_continues_to_the_same_bytes(tmp_path):
    folder = write_folder(tmp_path / "in", 30, 100)
    (folder / "0011 broken.gif").write_bytes(b"GIF89a")
    shutil.copy(folder / "0002 thing.apng", folder / "0033 copy.apng")      # of a sticker in another shard
    arguments = ["prepare", folder, "--size", "96", "--workers", "0", "--out"]
    assert command(*arguments, tmp_path / "whole", code=SMALL).returncode == 0
    kills = 0
    for shard in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", SMALL, *map(str, arguments), str(tmp_path / "out")],
                                   stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "out.partial" / f"shard-{shard:05d}").exists():
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills and not (tmp_path / "out").exists()
    first = (tmp_path / "out.partial" / "shard-00000" / "frames.npy").stat()
    (tmp_path / "out.partial" / "fresh").mkdir(exist_ok=True)              # and it died while it wrote
    (tmp_path / "out.partial" / "fresh" / "frames.npy").write_bytes(b"half a frame")
    assert command(*arguments, tmp_path / "out", code=SMALL).returncode == 0
    assert (tmp_path / "out" / "shard-00000" / "frames.npy").stat().st_mtime_ns == first.st_mtime_ns
    whole, out = ({p.relative_to(tmp_path / x): p.read_bytes() for p in (tmp_path / x).rglob("*.*")}
                  for x in ("whole", "out"))
    assert whole == out and len(whole) > 20
    assert "0033 copy.apng\tsame frames as 0002 thing.apng" in (tmp_path / "out" / "report.txt").read_text()
    assert not (tmp_path / "out.partial").exists()


def test_a_store_may_have_more_shards_than_files_may_be_open_by_default(tmp_path, monkeypatch):
    """Fault: 1,024 open files are the default of many systems, a store of 10^6 stickers has 1,000 shards."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(data, "SHARD", 1)
    write_folder(tmp_path / "in", 30)
    data.prepare(tmp_path / "in", tmp_path / "out", 32, workers=0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, limits[1]))
        store = data.open_store(tmp_path / "out")
        assert len(store.shards) == 30 and store.frames(len(store) - 1).shape[1:] == (4, 32, 32)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_workers_that_die_or_hang_cost_one_item_each():
    orders, start = [0, 1, "die", *range(3, 8), "hang", 9, 10], time.monotonic()
    results = list(data.in_order(functools.partial(corpus.act), orders, 2, timeout=5))
    assert time.monotonic() - start < 30
    for order, result in zip(orders, results, strict=True):
        assert result[0] == "unreadable" if isinstance(order, str) else result == ("ok", order)


def test_a_decoder_that_cannot_start_ends_the_run_and_not_file_by_file(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(data.DataError, match="no decoding process can start here"):
        list(data.in_order(functools.partial(corpus.act), [1, 2, 3], 2, timeout=5))


def test_a_script_without_a_main_guard_prepares_too(tmp_path):
    write_folder(tmp_path / "in", 9)
    (tmp_path / "script.py").write_text(PATH + "data.prepare('in', 'out', 32, workers=2)")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode and len(data.open_store(tmp_path / "out")) > 3, done.stderr


@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_while_data_are_decoded(tmp_path, workers):
    folder = tmp_path / "in"
    data.write_sticker(folder / "0.webp", moving(20, 250), 50)
    for i in range(1, 60):
        shutil.copy(folder / "0.webp", folder / f"{i}.webp")
    process = subprocess.Popen([sys.executable, "-c", SMALL, "prepare", str(folder), "--out",
                                str(tmp_path / "out"), "--workers", workers, "--filter", "none"],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (tmp_path / "out.partial" / "shard-00000").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)                              # as a terminal does, to all of them
    err = process.communicate(timeout=10)[1]
    assert process.returncode == 130 and "goes on where it was" in err
    assert "Traceback" not in err
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()


def test_training_stops_at_once_while_it_decodes_its_data(tmp_path):
    """Fault: the handler of the training loop was there already, and waited for an update to end."""
    folder = write_folder(tmp_path / "in", 3)
    slow = PATH + ("import time, train\n"
                   "def wait(*a, **k): print('decoding', flush=True); time.sleep(60)\n"
                   "data.decode_item = wait\n"
                   "train.main()")
    process = subprocess.Popen([sys.executable, "-c", slow, "--data", folder, "--out", tmp_path / "run"],
                               stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    while "decoding" not in (line := process.stdout.readline()):
        assert line, "it ended before it decoded"
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(15)
    finally:
        process.kill()


# The command line -------------------------------------------------------------------------------------------

def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    good, out = write_folder(tmp_path / "good", 3), tmp_path / "o"
    torch.save({"step": 3, "stage": "vae"}, tmp_path / "unfinished.pt")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "meta.json").write_text('{"format": ')
    (tmp_path / "broken" / "inputs").touch()
    monkeypatch.chdir(tmp_path)
    data.write_sticker("long.webp", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 4), np.uint8), 100)
    for words, *arguments in (("no such folder", "prepare", tmp_path / "nowhere", "--out", out),
                              ("no sticker in it", "prepare", tmp_path / "empty", "--out", out),
                              ("--filter odd", "prepare", good, "--out", out, "--filter", "odd"),
                              ("no prepared store", "prepare", good, "--out", good),
                              ("no prepared store", "prepare", good, "--out", "."),
                              ("README.md: no", "prepare", good, "--out", out, "--vae", ROOT / "README.md"),
                              ("unfinished.pt: no", "prepare", good, "--out", out, "--vae", "unfinished.pt"),
                              ("no such file", "convert", tmp_path / "no.gif", tmp_path / "o.webp"),
                              ("no such file", "info", tmp_path / "no.gif"),
                              ("is a folder", "info", tmp_path / "good"),
                              ("of 4096x4096 are over", "convert", "long.webp", "o.webp", "--size", "4096"),
                              (".bmp", "convert", good / "0000 thing.webp", tmp_path / "o.bmp"),
                              ("nowhere", "prepare", good, "--out", "/proc/nowhere/store")):
        assert data.main([str(a) for a in arguments]) == 2, arguments
        told = capsys.readouterr().err.strip()
        assert words in told and told.startswith("data.py: ") and "\n" not in told, told
    for flags in (("--size", "-3"), ("--hold-out", "nan"), ("--max-bad", "2"), ("--workers", "-1")):
        with pytest.raises(SystemExit) as stopped:
            data.main(["prepare", str(good), "--out", str(out), *flags])
        assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    (tmp_path / "o.partial").mkdir()                                      # somebody's own folder
    (tmp_path / "o.partial" / "thesis.txt").touch()
    assert data.main(["prepare", str(good), "--out", str(out)]) == 2
    assert "o.partial" in capsys.readouterr().err and (tmp_path / "o.partial" / "thesis.txt").exists()
    # fault: what holds a meta.json was taken for a store, and replaced
    (good / "meta.json").write_text('{"title": "my pack"}')
    before = sorted(good.iterdir())
    assert data.main(["prepare", str(good), "--out", str(good), "--size", "32", "--workers", "0"]) == 2
    assert "no prepared store" in capsys.readouterr().err and sorted(good.iterdir()) == before
    assert len(data.open_stickers(good, 32)) == 3
    # a broken store is in nobody's way: it is replaced
    assert data.main(["prepare", str(good), "--out", "broken", "--size", "32", "--workers", "0"]) == 0


def test_stores_that_are_not_whole_are_refused(tmp_path):
    store = data.prepare(write_folder(tmp_path / "good", 3), tmp_path / "store", 32, workers=0)
    frames = store.shards[0].filename
    damage = {"meta.json": b'{"format": "rdtf-stickers-1"}', "index.npy": b"", "text.npy": None,
              "shard-00000/frames.npy": Path(frames).read_bytes()[:999]}
    for name, content in damage.items():
        shutil.copytree(tmp_path / "store", tmp_path / "bad", dirs_exist_ok=True)
        (tmp_path / "bad" / name).unlink()
        if content is not None:
            (tmp_path / "bad" / name).write_bytes(content)
        with pytest.raises(data.DataError, match="no whole store.*delete it"):
            data.open_stickers(tmp_path / "bad", 32)
    with pytest.raises(data.DataError, match="good: no prepared store; write one"):     # never "delete it"
        data.open_store(tmp_path / "good")
    for spec, words in ((tmp_path / "nowhere", "no such"), ("synthetic:0", "no such folder")):
        with pytest.raises(data.DataError, match=words):
            data.open_stickers(spec, 64)


def test_what_was_left_out_is_told_with_the_place_of_the_whole_list(tmp_path, capsys, monkeypatch):
    """Fault: of 8 files 5 were named, and nothing said where the others are."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "in", 2)
    prepare = ["prepare", "in", "--size", "32", "--workers", "0", "--max-bad", "0.8", "--out"]
    assert data.main([*prepare, "all"]) == 0 and "report.txt" not in capsys.readouterr().out
    for i in range(8):
        (tmp_path / "in" / f"bad {i}.gif").write_bytes(b"GIF89a")
    assert data.main([*prepare, "some"]) == 0
    told = capsys.readouterr()
    assert "8 of 10: bad 0.gif" in told.err and "bad 4.gif" in told.err and "bad 5.gif" not in told.err
    path, = re.findall("^(.*): names each file left out", told.out, re.M)
    assert "bad 7.gif" in Path(path).read_text()
    assert data.main([*prepare, "none", "--max-bad", "0.5"]) == 2
    path, = re.findall(r"\((\S*) names all\)", capsys.readouterr().err)
    assert "bad 7.gif" in Path(path.replace("OUT", "none")).read_text()


def test_convert_and_info(tmp_path, capsys):
    data.write_sticker(tmp_path / "a.apng", moving(4), 50, metadata={"command": "python sample.py --seeds 3"})
    assert data.main(["convert", str(tmp_path / "a.apng"), str(tmp_path / "b.gif"), "--size", "24"]) == 0
    assert data.read_sticker(tmp_path / "b.gif")[0].shape == (4, 24, 24, 4)
    capsys.readouterr()
    assert data.main(["info", str(tmp_path / "a.apng")]) == 0
    told = capsys.readouterr().out
    assert "4 frames of 32x32, 200 ms" in told and "command: python sample.py --seeds 3" in told
    Image.fromarray(moving(1)[0]).save(tmp_path / "plain.png")
    assert data.read_metadata(tmp_path / "plain.png") == {}
    Image.fromarray(moving(1)[0]).save(tmp_path / "junk.webp", exif=b"garbage!garbage!")
    assert data.read_metadata(tmp_path / "junk.webp") == {}


def test_a_camera_s_second_view_is_no_second_frame(tmp_path):
    view, exif = Image.new("RGB", (32, 16), "red"), Image.Exif()
    exif[0x0112] = 6                                                    # turn it by 90 degrees
    view.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[view], exif=exif)
    assert data.read_sticker(tmp_path / "a.jpg")[0].shape == (1, 32, 16, 4)
