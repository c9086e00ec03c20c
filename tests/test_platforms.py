"""Stickers for platforms: each file is read back as the platform would, and held to the published limits."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data

ROOT = Path(__file__).parent.parent
STICKERS = {"character": ROOT / "stickers/characters/00000000.webp",
            "fluent": ROOT / "stickers/fluent/1f436.webp"}
# Said once more here, from the platforms' own pages (2025-26): the table of data.py must hold to it.
#            suffix   w    h    kB  frames    s  loops
LIMITS = {
    "telegram": (".webm", 512, 512, 256, 2, 90, 3, 0),
    "whatsapp": (".webp", 512, 512, 500, 2, 1250, 10, 0),
    "signal": (".png", 512, 512, 300, 2, 150, 3, 0),
    "discord": (".png", 320, 320, 512, 2, 250, 5, 0),
    "line": (".png", 320, 270, 300, 5, 20, 4, 4),
}


def need_ffmpeg(platform="telegram"):
    if platform == "telegram":
        pytest.importorskip("imageio_ffmpeg", reason="WebM needs imageio-ffmpeg")


def detail(count=97, size=256):
    """Noise that drifts within a disc: it compresses badly."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    y, x = np.mgrid[:size, :size] - size / 2
    alpha = np.where(np.hypot(x, y) < size * 0.47, 255, 0).astype(np.uint8)[..., None]
    return np.stack([np.concatenate([np.roll(noise, 2 * i, 0), alpha], -1) for i in range(count)])


@pytest.fixture(scope="module")
def sources():
    return {"detail": (detail(), [42] * 97), **{name: data.read_sticker(p) for name, p in STICKERS.items()}}


def chunks(path):
    """A PNG's chunks: list of (name, content)."""
    raw, at, found = path.read_bytes(), 8, []
    while at < len(raw):
        n = int.from_bytes(raw[at:at + 4], "big")
        found.append((raw[at + 4:at + 8], raw[at + 8:at + 8 + n]))
        at += n + 12
    return found


def loops_of(path):
    """From the bytes: acTL of an APNG, ANIM of a WebP; 0 = for ever."""
    if path.suffix == ".png":
        return int.from_bytes(dict(chunks(path))[b"acTL"][4:8], "big")
    if path.suffix == ".webp":
        raw = path.read_bytes()
        at = raw.index(b"ANIM")
        return int.from_bytes(raw[at + 12:at + 14], "little")
    return 0                                                    # of a WebM the player decides


def hold(path, platform, source):
    """Every limit of LIMITS, on the file at path."""
    suffix, w, h, kb, fewest, most, seconds, loops = LIMITS[platform]
    frames, times = data.read_sticker(path)
    assert path.suffix == suffix and path.stat().st_size <= 1000 * kb
    assert fewest <= len(frames) <= most
    played = loops_of(path)
    assert (1 <= played <= loops) if loops else played == 0
    slack = len(times) if platform == "telegram" else 0         # a WebM's frame rate is told rounded
    assert sum(times) * max(1, played) <= 1000 * seconds + slack
    assert min(times) >= (33 if platform == "telegram" else 8)
    tall, wide = frames.shape[1:3]
    if platform in ("whatsapp", "discord"):
        assert (wide, tall) == (w, h)
    assert wide <= w and tall <= h
    assert platform != "telegram" or max(wide, tall) == 512
    assert platform != "line" or max(wide, tall) >= 270 and sum(times) in (1000, 2000, 3000, 4000)
    seen = (frames[..., 3] > 0).mean((1, 2))
    assert platform not in ("whatsapp", "line") or seen[0] >= 0.5 * seen.max(), "frame 1 is whole"
    assert frames[..., 3].min() == 0 and frames[..., 3].max() > 250, "alpha is kept"
    fh, fw = source.shape[1:3]
    if platform not in ("whatsapp", "discord"):
        assert abs(wide / tall - fw / fh) < 0.02 * fw / fh
    if platform == "telegram":
        import imageio_ffmpeg
        meta = next(imageio_ffmpeg.read_frames(str(path)))
        assert meta["codec"].startswith("vp9") and meta["fps"] <= 30 and meta["duration"] <= 3
        assert "Audio" not in str(meta) and b"A_OPUS" not in path.read_bytes()
    return frames, times


@pytest.mark.parametrize("name", [*STICKERS, "detail"])
@pytest.mark.parametrize("platform", LIMITS)
def test_every_limit_of_every_platform_holds(tmp_path, capsys, sources, platform, name):
    need_ffmpeg(platform)
    frames, times = sources[name]
    path = tmp_path / f"a{LIMITS[platform][0]}"
    done = data.write_sticker(path, frames, times, platform=platform, metadata={"a": 'b=c; "d"'})
    back, when = hold(path, platform, frames)
    said = capsys.readouterr().err
    assert said.count("\n") <= 1 and (done["message"] in said)
    assert ("frames" in said) == (done["frames"] < len(frames)) and done["frames"] >= len(back)
    assert ("seconds" in said) == (sum(times) > 1000 * LIMITS[platform][6] or
                                   platform == "line" and sum(times) % 1000 > 0)
    assert data.read_metadata(path) == {"a": 'b=c; "d"'}


@pytest.mark.parametrize("platform", LIMITS)
@pytest.mark.parametrize("shape, count, ms", [((40, 90), 2, 500), ((91, 31), 3, 20), ((700, 600), 30, 1000)])
def test_odd_shapes_and_times_fit_too(tmp_path, platform, shape, count, ms):
    need_ffmpeg(platform)
    frames = np.zeros((count, *shape, 4), np.uint8)
    for i in range(count):                                      # a bar that fills, over a corner that stays
        frames[i, 5:25, 5:6 + (shape[1] - 10) * (i + 1) // count] = [200, 90, 5 * i, 255]
        frames[i, 10:20, 2:5] = [0, 0, 255, 255]
    path = tmp_path / f"a{LIMITS[platform][0]}"
    data.write_sticker(path, frames, ms, platform=platform)
    hold(path, platform, frames)


def test_a_sticker_of_a_platform_begins_with_a_picture(tmp_path, capsys):
    frames = np.zeros((8, 64, 64, 4), np.uint8)
    for i in range(3, 8):
        frames[i, 8:56, 8:40 + 2 * i] = [20 * i, 90, 90, 255]
    data.write_sticker(tmp_path / "a.webp", frames, range(100, 108), platform="whatsapp")
    back, times = data.read_sticker(tmp_path / "a.webp")
    assert "begins with frame 4" in capsys.readouterr().err
    assert (back[0, ..., 3] > 0).mean() > 0.3 and times == [*range(103, 108), 303]    # 3 empty ones are one


def test_what_a_platform_takes_stays_within_our_own_limit_of_pixels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "MAX_TOTAL", 5 * 512 * 512)
    frames = np.full((10, 64, 64, 4), 255, np.uint8)
    frames[:, 5:9, 5:9, 0] = np.arange(0, 200, 20)[:, None, None]
    assert data.write_sticker(tmp_path / "a.webp", frames, 100, platform="whatsapp")["frames"] == 5
    assert "5 of 10 frames" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".webp", ".webm", ".apng", ".gif"])
def test_the_size_search_takes_the_first_setting_that_fits_and_tries_few(tmp_path, monkeypatch, suffix):
    """The first of all frames from the best level down, then every second, ..; a lossless file may be the
    smallest of all."""
    levels, calls = data.LEVELS[suffix], []

    def encode(suffix, frames, times, level, *_):
        calls.append(len(frames))
        return bytes(each[level] * len(frames))

    monkeypatch.setattr(data, "_encode", encode)
    frames = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 4), dtype=np.uint8)
    for best in (900, 35):
        each = dict(zip(levels, (best, 400, 300, 210, 140, 90, 40)))
        for limit in (50000, 13001, 9000, 4500, 3000, 1401, 1300, 700):
            calls.clear()
            fits = [(s, x) for s in (1, 2, 4, 8, 16) for x in levels if each[x] * len(frames[::s]) <= limit]
            done = data.write_sticker(tmp_path / f"a{suffix}", frames, 50, max_kb=limit / 1000)
            step, level = fits[0]
            assert done["frames"] == len(frames[::step]) and done["bytes"] == each[level] * done["frames"]
            assert len(calls) <= 10, (limit, calls)


def test_a_file_for_line_takes_whole_seconds_and_keeps_its_rhythm(tmp_path, capsys):
    frames = np.zeros((6, 40, 40, 4), np.uint8)
    for i in range(6):
        frames[i, :, 6 * i:6 * i + 8] = 255
    for times, wanted in (([100, 300, 100, 100, 100, 175], 1000), ([250] * 5 + [200], 1000),
                          ([200] * 5 + [1000], 2000)):
        data.write_sticker(tmp_path / "a.png", frames, times, platform="line")
        found = np.array(data.read_sticker(tmp_path / "a.png")[1])
        assert found.sum() == wanted and np.abs(found - np.array(times) * wanted / sum(times)).max() < 1
        assert ("seconds" in capsys.readouterr().err) == (sum(times) != wanted)


@pytest.mark.parametrize("platform", ["signal", "discord", "line"])
def test_what_moves_for_a_moment_still_moves(tmp_path, platform):
    """Fault: where frames were left out it could be the only one that differed: a still picture."""
    for count, times in ((40, [100] * 40), (2, [1000, 10])):
        frames = np.full((count, 40, 40, 4), 200, np.uint8)
        frames[-1, 5:20] = [0, 0, 255, 255]
        data.write_sticker(tmp_path / "a.png", frames, times, platform=platform)
        back, _ = data.read_sticker(tmp_path / "a.png")
        assert any((a != b).any() for a, b in zip(back, back[1:]))


def test_a_gif_is_no_faster_than_viewers_play_it(tmp_path, capsys):
    frames = np.zeros((60, 32, 32, 4), np.uint8)
    for i in range(60):
        frames[i, :, i // 2:i // 2 + 2 + i % 2] = [0, 250, 0, 255]
    done = data.write_sticker(tmp_path / "a.gif", frames, [17, 16, 17] * 20)
    assert sum(data.read_sticker(tmp_path / "a.gif")[1]) == done["ms"] == 1000 and done["frames"] == 50
    assert "50 of 60 frames, 50 a second at most" in capsys.readouterr().err
    assert data.write_sticker(tmp_path / "b.gif", frames[::30], 10)["ms"] == 40      # two still alternate
    assert data.read_sticker(tmp_path / "b.gif")[1] == [20, 20]


def test_what_a_format_cannot_hold_is_one_line(tmp_path, capsys):
    frames = np.zeros((2, 2, 17000, 4), np.uint8)
    frames[1] = 255
    data.write_sticker(tmp_path / "wide.apng", frames, 100)
    assert data.main(["convert", str(tmp_path / "wide.apng"), str(tmp_path / "wide.webp")]) == 2
    line = capsys.readouterr().err
    assert "wide.webp: .webp can't hold this" in line and line.count("\n") == 1
    (tmp_path / "folder.webp").mkdir()
    assert data.main(["convert", str(tmp_path / "wide.apng"), str(tmp_path / "folder.webp")]) == 2
    assert "folder.webp: name a file" in capsys.readouterr().err
    assert not list(tmp_path.glob(".writing*"))


def test_frames_are_chosen_by_the_nearest_time():
    assert data.pick_by_time([50] * 6, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert data.pick_by_time([50] * 6, 3).tolist() == [0, 2, 4]
    assert data.pick_by_time([10, 10, 80], 5).tolist() == [0, 2, 2, 2, 2]


def test_a_still_picture_is_told_what_to_do_instead(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = np.full((3, 40, 40, 4), 200, np.uint8)
    for platform in LIMITS:
        need_ffmpeg(platform)
        data.write_sticker(tmp_path / "still.png", frames[:1], 0)
        assert data.main(["convert", str(tmp_path / "still.png"), "--for", platform]) == 2
        line = capsys.readouterr().err
        assert "still picture" in line and line.count("\n") == 1
        out, *flags = re.search(r"convert IN (.*)`", line).group(1).split()
        out = str(tmp_path / out)
        assert data.main(["convert", str(tmp_path / "still.png"), out, *flags]) == 0
        capsys.readouterr()


def test_names_of_files_are_the_platforms(tmp_path, capsys, monkeypatch, sources):
    monkeypatch.chdir(tmp_path)
    need_ffmpeg()
    data.write_sticker(tmp_path / "in.webp", *sources["character"])
    for platform, (suffix, *_) in LIMITS.items():
        wrong = ["convert", str(tmp_path / "in.webp"), str(tmp_path / "a.gif"), "--for", platform]
        assert data.main(wrong) == 2
        said = capsys.readouterr().err                           # convert has no flag --out
        assert f"a.gif: end it in {suffix}" in said and "--out" not in said
        assert data.main(["convert", str(tmp_path / "in.webp"), "--for", platform]) == 0
        assert (tmp_path / f"in-{platform}{suffix}").exists()
    for arguments, words in ((["in.webp"], "no output"), (["in.webp", "in.webp"], "is the input"),
                             (["in.webp", "--for", "line", "--size", "64"], "remove it")):
        assert data.main(["convert", *[str(tmp_path / x) if "." in x else x for x in arguments]]) == 2
        assert words in capsys.readouterr().err


# WebM -------------------------------------------------------------------------------------------------------

def test_alpha_survives_a_webm(tmp_path, sources):
    need_ffmpeg()
    for name in STICKERS:
        frames, times = sources[name]
        data.write_sticker(tmp_path / "a.webm", frames, times, metadata={"x": [1, "ü"]})
        back, when = data.read_sticker(tmp_path / "a.webm")
        assert abs(sum(when) - sum(times)) <= 2
        assert data.read_metadata(tmp_path / "a.webm") == {"x": [1, "ü"]}
        shown = data.pick_by_time(times, len(back))
        error = np.abs(data.premultiply(back).astype(int) - data.premultiply(frames[shown]))
        assert error[..., 3].mean() <= 2 and error[..., :3].mean() <= 4, (name, error.mean((0, 1, 2)))
        assert set(when) <= {round(times[0]) - 1, round(times[0]), round(times[0]) + 1}


def test_a_webm_keeps_times_to_its_frame_rate(tmp_path):
    need_ffmpeg()
    frames = np.zeros((3, 33, 47, 4), np.uint8)                 # odd sides too
    for i in range(3):
        frames[i, :, 10 * i:10 * i + 20] = [250, 0, 0, 255]
    data.write_sticker(tmp_path / "a.webm", frames, [100, 300, 200])
    back, times = data.read_sticker(tmp_path / "a.webm")
    assert times == [100] * 6 and back.shape[1:] == (33, 47, 4)
    which = [int(np.abs(frames[..., 3].astype(int) - x[..., 3]).mean((1, 2)).argmin()) for x in back]
    assert which == [0, 1, 1, 1, 2, 2]


def test_a_webm_tells_of_frames_that_are_too_fast_for_it(tmp_path, capsys):
    """Fault: 11 frames of 18 ms were told, and 5 were in the file."""
    need_ffmpeg()
    frames = np.zeros((11, 32, 32, 4), np.uint8)
    for i in range(11):
        frames[i, :, 2 * i:2 * i + 8] = [0, 250, 0, 255]
    done = data.write_sticker(tmp_path / "a.webm", frames, 18)
    assert done["frames"] == len(data.read_sticker(tmp_path / "a.webm")[0]) == 5
    assert "5 of 11 frames, 30 a second at most" in capsys.readouterr().err
    assert data.write_sticker(tmp_path / "a.webm", frames, 50)["frames"] == 11 and not capsys.readouterr().err


def test_without_its_package_video_is_one_line(tmp_path, monkeypatch, capsys, sources):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    (tmp_path / "a.webm").write_bytes(b"\x1aE\xdf\xa3" + bytes(99))
    data.write_sticker(tmp_path / "in.webp", *sources["character"])
    for arguments in (["convert", "a.webm", "b.gif"], ["convert", "in.webp", "b.webm"],
                      ["convert", "in.webp", "--for", "telegram"], ["info", "a.webm"]):
        assert data.main([str(tmp_path / x) if "." in x else x for x in arguments]) == 2
        line = capsys.readouterr().err
        assert "pip install imageio-ffmpeg" in line and line.count("\n") == 1


def test_a_damaged_video_is_one_line(tmp_path, capsys):
    need_ffmpeg()
    for name, content in (("a.webm", b"\x1aE\xdf\xa3" + bytes(99)), ("b.mp4", b"0000ftypisom" + bytes(99))):
        (tmp_path / name).write_bytes(content)
        assert data.main(["info", str(tmp_path / name)]) == 2
        line = capsys.readouterr().err
        assert name in line and line.count("\n") == 1 and "Traceback" not in line


# Standard output --------------------------------------------------------------------------------------------

def test_convert_to_stdout_prints_nothing_else(tmp_path, sources):
    data.write_sticker(tmp_path / "in.webp", *sources["character"])
    for flags, start in (([], b"RIFF"), (["--for", "line"], b"\x89PNG")):
        command = [sys.executable, ROOT / "data.py", "convert", tmp_path / "in.webp", "-", *flags]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == 0 and done.stdout.startswith(start) and b"frames" in done.stderr
        (tmp_path / "out").write_bytes(done.stdout)
        with Image.open(tmp_path / "out") as image:
            assert image.n_frames > 1
