"""Characters: same for ever, captions that say what is drawn, a reader that reads them back."""
import collections
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import attributes
import data
from stickers import characters

ROOT = Path(__file__).resolve().parent.parent
BUILT_IN = ROOT / "stickers" / "characters"
ROWS = [json.loads(line) for line in (BUILT_IN / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture
def drawing():
    for package in ("dicebear", "dicebear_styles", "resvg_py"):
        pytest.importorskip(package, reason=characters.MISSING)


def frames_of(row):
    return data.read_sticker(BUILT_IN / row["file_name"])[0]


# ------------------------------------------------------------------------------------------------------------
# Captions and splits

def test_choices_of_an_index_never_change():
    chosen = characters.choices(1703)
    assert chosen == characters.choices(1703)
    assert [characters.choices(i)["text"] for i in range(3)] == [
        "a grey face with a top hat, spinning", "a green face with horns, shaking",
        "a brown critter with horns, laughing"]


def test_captions_name_all_attributes_and_nothing_else():
    for index in range(2000):
        chosen = characters.choices(index)
        words = re.fullmatch(r"an? (\w+) (critter|clay figure|face|pot) with (?:an? )?([a-z ]+), (\w+)",
                             chosen["text"])
        colour, kind, top, action = words.groups()
        assert (kind, colour, top, action) == tuple(chosen[word] for word in characters.WORDS)
        assert colour in characters.COLOURS and action in characters.ACTIONS and top in characters.TOPS[kind]


def test_all_words_occur_about_equally_often():
    for word in characters.WORDS:
        counts = collections.Counter(row[word] for row in ROWS if word != "top" or row["kind"] == "pot")
        assert max(counts.values()) < 2.2 * min(counts.values()), counts


def test_whole_combinations_are_held_out():
    splits = {}
    for row in ROWS:
        combination = tuple(row[word] for word in characters.WORDS)
        assert splits.setdefault(combination, row["split"]) == row["split"]
        assert (row["split"] == "held_out") == data.is_held_out(row["text"])
    assert 0.07 < np.mean([row["split"] == "held_out" for row in ROWS]) < 0.13
    trained = {row[word] for row in ROWS if row["split"] == "train" for word in characters.WORDS}
    held = {row[word] for row in ROWS if row["split"] == "held_out" for word in characters.WORDS}
    assert held <= trained, "held-out captions are new combinations of known words"


def test_a_motion_is_a_loop_whose_frames_differ():
    for action in characters.ACTIONS:
        poses = [characters.pose(action, i / 8, 1.0) for i in range(8)]
        assert all(a != b for a, b in zip(poses, poses[1:] + poses[:1])), action


# ------------------------------------------------------------------------------------------------------------
# The built-in set

def test_built_in_set_is_small_whole_and_described():
    names = sorted(path.name for path in BUILT_IN.glob("*.webp"))
    assert names == [row["file_name"] for row in ROWS] == [f"{i:08}.webp" for i in range(1000)]
    assert sum(path.stat().st_size for path in BUILT_IN.iterdir()) <= 4_000_000
    assert "CC0 1.0" in (BUILT_IN / "LICENSE").read_text()
    for index, row in enumerate(ROWS):
        with Image.open(BUILT_IN / row["file_name"]) as image:
            assert (image.size, image.n_frames) == ((64, 64), 8)
        chosen = characters.choices(index)
        assert row["text"] == chosen["text"] and all(row[word] == chosen[word] for word in characters.WORDS)


def test_built_in_clips_move_and_are_transparent():
    for row in ROWS[::40]:
        frames = frames_of(row)
        assert frames.shape == (8, 64, 64, 4)
        assert (frames[..., 3] == 0).mean() > 0.3 and (frames[..., 3] == 255).mean() > 0.04
        moved = np.abs(np.diff(data.premultiply(frames).astype(int), axis=0)).mean((1, 2, 3)) / 255
        assert moved.min() > 0.002 and moved.mean() > 0.008, row["text"]


def test_reader_reads_built_in_clips():
    for row in ROWS[7::33]:
        assert attributes.read_character(frames_of(row)) == {word: row[word] for word in characters.WORDS}


def test_reader_reads_soft_and_noisy_clips():
    rng = np.random.default_rng(0)
    for row in ROWS[11::200]:
        worse = attributes.worsen(frames_of(row), 1, 0.03, rng)
        assert attributes.read_character(worse) == {word: row[word] for word in characters.WORDS}


def test_reader_says_none_where_nothing_moves_or_nothing_is_there():
    frames = frames_of(ROWS[0])
    still = attributes.read_character(np.repeat(frames[:1], 8, 0))
    assert still["action"] is None and still["colour"] == ROWS[0]["colour"]
    assert set(attributes.read_character(np.zeros_like(frames)).values()) == {None}


# ------------------------------------------------------------------------------------------------------------
# Drawing

def test_drawing_again_gives_the_built_in_pixels(drawing):
    for index in (0, 3, 9, 10, 18):
        clip, chosen = characters.character(index)
        again, _ = characters.character(index)
        assert (clip == again).all() and chosen == characters.choices(index)
        small = characters.limit_colours(clip, 16)
        assert (small == frames_of(ROWS[index])).all()
        assert len(np.unique(small[small[..., 3] > 0][:, :3], axis=0)) <= 16
        assert np.abs(data.premultiply(small).astype(int) - data.premultiply(clip)).mean() < 1.5


def test_every_part_draws(drawing):
    seen = set()
    for kind, parts in characters.STYLES.items():
        for top in characters.TOPS[kind]:
            for body in parts["bodies"][:2]:
                clip = characters.draw(kind, "red", top, "laughing", body, parts["open"][0],
                                       parts["mouth"][0], frames=2, size=32)
                assert clip[..., 3].max() == 255
                seen.add(clip.tobytes())
    assert len(seen) == 2 * sum(map(len, characters.TOPS.values()))


def test_fresh_clips_are_read(drawing):
    for index in range(2_000_000, 2_000_010):
        clip, chosen = characters.character(index)
        assert attributes.read_character(clip) == {word: chosen[word] for word in characters.WORDS}


def test_resume_writes_the_same_bytes(drawing, tmp_path, capsys):
    def build(folder, *more):
        return characters.main(["--out", str(tmp_path / folder), "--workers", "1", "--size", "32", *more])

    def contents(folder):
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
    assert build("whole", "--count", "6") == build("parts", "--count", "3") == 0
    (tmp_path / "parts" / "00000001.webp").unlink()
    kept = (tmp_path / "parts" / "00000000.webp").stat().st_mtime_ns
    assert build("parts", "--count", "4", "--start", "2") == build("parts", "--count", "6") == 0
    assert contents("whole") == contents("parts")
    assert (tmp_path / "parts" / "00000000.webp").stat().st_mtime_ns == kept
    assert build("whole", "--count", "6", "--frames", "4") == 2, "another way to draw needs another folder"
    assert "delete it" in capsys.readouterr().err


def test_bad_input_gives_one_line(tmp_path, capsys):
    for flag, value in (("--count", "0"), ("--size", "4"), ("--frames", "1"), ("--start", "-1")):
        assert characters.main(["--out", str(tmp_path / "x"), flag, value]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and flag in error
    assert not (tmp_path / "x").exists()


def test_missing_packages_are_named(tmp_path):
    block = "import sys; sys.modules['dicebear'] = None; sys.path.insert(0, '.'); " \
            "from stickers import characters; sys.exit(characters.main(sys.argv[1:]))"
    result = subprocess.run([sys.executable, "-c", block, "--out", str(tmp_path / "x")], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "pip install dicebear" in result.stderr
