"""The scripts in stickers/: packages, words, splits, pictures. Tiny packages made here; no network."""
import gzip
import hashlib
import importlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DataError, is_held_out, read_sticker
from stickers import fetch, lottie, procedural

emoji, fluent = importlib.import_module("stickers.emoji"), importlib.import_module("stickers.fluent")
ROOT = Path(__file__).resolve().parent.parent
DOG, CAT, WAVE, JAPAN = "1f436", "1f431", "1f44b", "1f1ef-1f1f5"
TONED = "1f44b-1f3fb"
# A circle of one colour, as Iconify keeps it.
CIRCLE = '<circle cx="5" cy="5" r="4" fill="{}"/>'


def pack(cache, package, files):
    """Writes a tarball as npm does -> (package, version, sha256)."""
    path = Path(cache) / f"{package[0].lstrip('@').replace('/', '-')}-{package[1]}.tgz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return (*package[:2], hashlib.sha256(path.read_bytes()).hexdigest())


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def webp(colours):
    frames = [Image.new("RGBA", (40, 40), colour) for colour in colours]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=50, lossless=True)
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder with a tiny emojibase in it; here a word returns if one training concept has it."""
    entries = [("dog face", DOG, 3, 0, ["pet", "dog"]), ("cat face", CAT, 3, 0, ["pet"]),
               ("waving hand", WAVE, 1, 1, ["hello"]), ("flag: Japan", JAPAN, 9, 2, ["JP"]),
               ("red hair", "1f9b0", 2, 3, [])]
    data = [dict(zip(("label", "hexcode", "group", "subgroup", "tags"), entry)) for entry in entries]
    for entry in data:
        entry["hexcode"] = entry["hexcode"].upper()
    groups = {"subgroups": {"0": "animal-mammal", "1": "hand-fingers", "2": "country-flag", "3": "hair"}}
    files = {"en/data.json": data, "meta/groups.json": groups,
             "meta/unicode-names.json": {WAVE.upper(): "WAVING HAND SIGN"},
             "en/shortcodes/a.json": {DOG.upper(): ["dog", "puppy"], CAT.upper(): "cat"},
             "en/shortcodes/b.json": {CAT.upper(): "puppy", TONED.upper(): "toned"}}
    folder = tmp_path / "cache"
    monkeypatch.setattr(fetch, "MIN_CONCEPTS", 1)
    found = pack(folder, fetch.EMOJIBASE, files)
    for module in (fetch, emoji):
        monkeypatch.setattr(module, "EMOJIBASE", found)
    return folder


# ------------------------------------------------------------------------------------------------------------
# Packages and words

def test_tarball_is_checked_and_not_fetched_again(tmp_path, monkeypatch):
    package = pack(tmp_path, ("@some/thing", "1.0.0"), {"a.json": {}})
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    path = fetch.npm_pack(*package, tmp_path)
    assert path.name == "some-thing-1.0.0.tgz" and fetch.read_json(path, ["a.json"]) == [{}]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="sha256 is .*delete it"):
        fetch.npm_pack(*package, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="npm: not found; install Node.js"):
        fetch.npm_pack(*package, tmp_path)


@pytest.mark.parametrize("error", ["npm error code ENOTFOUND", "npm error ENOSPC: no space left", ""])
def test_failed_download_leaves_nothing(tmp_path, monkeypatch, error):
    def npm(call, **_):
        Path(call[-1], "half").write_bytes(b"x")
        return subprocess.CompletedProcess(call, 1, "", f"npm warn old\n{error}\n")
    monkeypatch.setattr(fetch.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(fetch.subprocess, "run", npm)
    with pytest.raises(DataError, match=f"failed .{error or 'no message'}.; check the network") as raised:
        fetch.npm_pack("thing", "1.0.0", "0" * 64, tmp_path)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_download_is_moved_into_the_cache(tmp_path, monkeypatch):
    package = pack(tmp_path / "registry", ("thing", "1.0.0"), {"a.json": 1})

    def npm(call, **_):
        data = (tmp_path / "registry/thing-1.0.0.tgz").read_bytes()
        Path(call[-1], "thing-1.0.0.tgz").write_bytes(data)
        return subprocess.CompletedProcess(call, 0, "", "")
    monkeypatch.setattr(fetch.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(fetch.subprocess, "run", npm)
    assert fetch.npm_pack(*package, tmp_path / "cache").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thing-1.0.0.tgz"]


def test_only_words_of_five_training_concepts_return():
    names = [f"concept {i}" for i in range(100)]
    train = [name for name in names if not is_held_out(name)]
    held = [name for name in names if is_held_out(name)]
    words = {name: [] for name in names}
    for chosen, word in ((train[:5], "often"), (train[:4] + held, "seldom"), (held, "never")):
        for name in chosen:
            words[name] += [word, word]
    assert fetch.words_that_return(words) == {"often"}


def test_words_of_emoji(cache):
    known = fetch.emojibase(cache)
    assert set(known) == {DOG, CAT, WAVE, JAPAN}            # hair is no emoji of its own
    assert known[DOG].text == "dog face" and known[JAPAN] == ("flag japan", ["flag"])
    expected = ["animal", "mammal", "nature", "pet", "dog"]
    assert known[DOG].tags == [word for word in expected if word != "dog" or not is_held_out(DOG)]
    assert known[WAVE].tags[0] in ("hand", "person")


def test_concept_is_code_points_less_tones():
    for name in ("1f3c3-1f3fd-200d-2642-fe0f", "1F3C3-200D-2642", "1f3c3_200d_2642_fe0f"):
        assert fetch.concept_of(name) == "1f3c3-200d-2642"
    assert fetch.tone_words("1f46b-1f3fb-1f3ff") == "light skin tone dark skin tone"


# ------------------------------------------------------------------------------------------------------------
# Fluent

def test_fluent(cache, tmp_path, monkeypatch, capsys):
    files = {f"assets/{DOG}.webp": webp(["red", "blue"]), f"assets/{WAVE}.webp": webp(["red"]),
             f"assets/{TONED}.webp": webp(["blue"]), "assets/../../evil.webp": b"", "README.md": b""}
    monkeypatch.setattr(fluent, "PARTS", {1: pack(cache, ("@f/1", "1.0.0"), files)})
    out = tmp_path / "fluent"
    call = ["--out", str(out), "--parts", "1", "--cache", str(cache)]
    assert fluent.main([*call, "--no-tones"]) == 0
    assert sorted(path.name for path in out.glob("*.webp")) == [f"{DOG}.webp", f"{WAVE}.webp"]
    assert fluent.main(call) == 0                          # the rest, and metadata anew
    (cache / "f-1-1.0.0.tgz").unlink()
    assert fluent.main(call) == 0 and "already there" in capsys.readouterr().out
    rows = {row["file_name"]: row for row in rows_of(out)}
    assert len(rows) == 3 and not (tmp_path / "evil.webp").exists()
    dog, toned = rows[f"{DOG}.webp"], rows[f"{TONED}.webp"]
    assert (dog["text"], dog["animated"], dog["tags"][0]) == ("dog face", True, "animal")
    assert (toned["text"], toned["tone"], toned["concept"]) == ("waving hand light skin tone", True, WAVE)
    assert all((row["split"] == "held_out") == is_held_out(row["concept"]) for row in rows.values())


def test_split_has_not_changed():
    held = [name for name in ("23-20e3", "2a-20e3", DOG, CAT, WAVE, "1f46f") if is_held_out(name)]
    assert held == ["2a-20e3"]


# ------------------------------------------------------------------------------------------------------------
# Emoji

@pytest.fixture
def styles(cache, monkeypatch):
    """Two styles: one with code points, with tones, a flag and a mirrored alias; one with names only."""
    icons = {name: {"body": CIRCLE.format(colour)} for name, colour in
             (("dog", "red"), ("wave", "blue"), ("wave-light", "pink"), ("japan", "white"))}
    icons["wave"]["body"] = '<path fill="#00f" d="M0 0h4v10H0z"/>'
    coded = {"icons": icons, "aliases": {"cat": {"parent": "wave", "hFlip": True}}, "width": 10, "height": 10}
    chars = {DOG: "dog", CAT: "cat", WAVE: "wave", TONED: "wave-light", JAPAN: "japan"}
    names = ("dogface", "puppy", "cat", "toned", "nothing", "wave")
    colours = ("lime", "navy", "tan", "gold", "green", "tan")
    bodies = {name: {"body": CIRCLE.format(colour), "width": 10} for name, colour in zip(names, colours)}
    named = {"icons": bodies, "height": 10, "aliases": {"waving-hand-sign": {"parent": "nothing"}}}
    found = {}
    for style, (icon, char) in {"noto": (coded, chars), "fxemoji": (named, {})}.items():
        package = pack(cache, emoji.STYLES[style], {"icons.json": icon, "chars.json": char})
        found[style] = (*package, emoji.STYLES[style][3])
    monkeypatch.setattr(emoji, "STYLES", found)
    return cache


def test_emoji(styles, tmp_path):
    pytest.importorskip("resvg_py", reason="pip install resvg-py")
    out = tmp_path / "emoji"
    call = ["--out", str(out), "--size", "32", "--cache", str(styles), "--styles", "noto,fxemoji"]
    assert emoji.main(call) == 0
    rows = {row["file_name"]: row for row in rows_of(out)}
    # "puppy" names two concepts, "wave" is a false friend, flags and tones are left out.
    expected = [f"{style}/{concept}.png" for style in ("fxemoji", "noto") for concept in (CAT, DOG, WAVE)]
    assert sorted(rows) == expected
    assert rows[f"noto/{DOG}.png"]["tags"][0] == "animal, noto style"
    assert rows[f"noto/{DOG}.png"]["text"] == rows[f"fxemoji/{DOG}.png"]["text"] == "dog face"
    dog = np.asarray(Image.open(out / f"noto/{DOG}.png"))
    assert dog.shape == (32, 32, 4) and dog[16, 16].tolist() == [255, 0, 0, 255] and dog[0, 0, 3] == 0
    wave, cat = (np.asarray(Image.open(out / f"noto/{c}.png")) for c in (WAVE, CAT))
    assert wave[16, 2, 3] == 255 and (cat == wave[:, ::-1]).all()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (out / f"noto/{CAT}.png").unlink()
    assert emoji.main(call) == 0                           # draws the missing one only
    assert [p for p, t in times.items() if p.stat().st_mtime_ns != t] == [out / f"noto/{CAT}.png"]


@pytest.mark.parametrize("held", [DOG, CAT, WAVE])
def test_no_held_out_concept_leaks_into_another_style(styles, tmp_path, monkeypatch, held):
    monkeypatch.setattr(fetch, "is_held_out", lambda concept: concept == held)
    monkeypatch.setattr(emoji, "draw", lambda out, style, pictures, size, seen: list(pictures))
    emoji.emoji(tmp_path / "emoji", ["noto", "fxemoji"], 32, styles)
    rows = rows_of(tmp_path / "emoji")
    assert len(rows) == 6
    assert {row["style"] for row in rows if row["split"] == "held_out"} == {"noto", "fxemoji"}
    assert all((row["split"] == "held_out") == (row["concept"] == held) for row in rows)


# ------------------------------------------------------------------------------------------------------------
# Lottie

def animation(opacity=100, moves=True, frames=60):
    """A red square of 20 in a picture of 100, which moves from left to right in 60 frames (1 s)."""
    ease = {"i": {"x": [0.5], "y": [1]}, "o": {"x": [0.5], "y": [0]}}
    keys = [{"t": 0, "s": [20, 50, 0], **ease}, {"t": frames, "s": [80, 50, 0], **ease}]
    still = {"a": 0, "k": [50, 50, 0]}
    shape = {"ty": "gr", "it": [
        {"ty": "rc", "d": 1, "s": {"a": 0, "k": [20, 20]}, "p": {"a": 0, "k": [0, 0]}, "r": {"a": 0, "k": 0}},
        {"ty": "fl", "c": {"a": 0, "k": [1, 0, 0, 1]}, "o": {"a": 0, "k": opacity}, "r": 1},
        {"ty": "tr", "p": {"a": 0, "k": [0, 0]}, "a": {"a": 0, "k": [0, 0]}, "s": {"a": 0, "k": [100, 100]},
         "r": {"a": 0, "k": 0}, "o": {"a": 0, "k": 100}}]}
    place = {"p": {"a": 1, "k": keys} if moves else still, "a": {"a": 0, "k": [0, 0, 0]},
             "r": {"a": 0, "k": 0}, "s": {"a": 0, "k": [100, 100, 100]}, "o": {"a": 0, "k": 100}}
    layer = {"ty": 4, "ip": 0, "op": frames, "st": 0, "ks": place, "shapes": [shape], "ind": 1, "sr": 1}
    return {"v": "5.5.0", "fr": 60, "ip": 0, "op": frames, "w": 100, "h": 100, "layers": [layer]}


def left_edges(frames):
    return [int(np.flatnonzero(frame[..., 3].any(0))[0]) for frame in frames]


def test_thaw_deletes_the_last_easing_only():
    one = lottie.thaw(animation())
    first, last = one["layers"][0]["ks"]["p"]["k"]
    assert "i" in first and "i" not in last and "o" not in last and last["s"] == [80, 50, 0]
    assert lottie.thaw({"a": 1, "k": []}) == {"a": 1, "k": []} and lottie.thaw({"a": 1, "k": [3]})["k"] == [3]


def test_lottie_moves_and_is_straight():
    pytest.importorskip("rlottie_python", reason="pip install rlottie-python")
    frames, durations = lottie.draw(animation(opacity=50), 64, 8, 2)
    assert frames.shape == (8, 64, 64, 4) and sum(durations) == 1000 and len(set(durations)) < 3
    edges = left_edges(frames)
    assert edges == sorted(edges) and edges[-1] > edges[0] + 20          # trap 1: not frozen after frame 0
    inside = frames[0, 32, 13]
    assert abs(int(inside[3]) - 128) < 4 and inside[0] > 250             # trap 2: red, not dark red
    frames, durations = lottie.draw(animation(frames=600), 64, 8, 2)     # 10 s: the first 2
    assert len(frames) == 8 and sum(durations) == 2000
    frames, durations = lottie.draw(animation(moves=False), 64, 8, 2)
    assert len(frames) == 1 and durations == [0]


def test_lottie_folder(tmp_path, capsys):
    pytest.importorskip("rlottie_python", reason="pip install rlottie-python")
    source, out = tmp_path / "in", tmp_path / "out"
    for style, opacity in (("line", 100), ("flat", 60)):
        (source / style).mkdir(parents=True)
        (source / style / "moving-square.json").write_text(json.dumps(animation(opacity)))
    (source / "line" / "same.json").write_text(json.dumps(animation()))
    (source / "sticker.tgs").write_bytes(gzip.compress(json.dumps(animation(moves=False)).encode()))
    (source / "bad.json").write_text('{"layers": ')
    (source / "half.tgs").write_bytes(gzip.compress(b"{}" * 99)[:20])
    (source / "manifest.json").write_text("{}")
    (source / "empty.json").write_text(json.dumps(animation(opacity=0)))
    (source / "sticker.JSON").write_text(json.dumps(animation(opacity=80)))
    call = [str(source), "--out", str(out), "--size", "32", "--frames", "4"]
    assert lottie.main(call) == 0
    told = capsys.readouterr().err
    assert "left out 6: bad.json: no Lottie" in told and "and 1 more" in told
    assert not (out / "line/same.webp").exists()
    rows = {row["file_name"]: row for row in rows_of(out)}
    assert sorted(rows) == ["flat/moving-square.webp", "line/moving-square.webp", "sticker.webp"]
    assert rows["line/moving-square.webp"]["text"] == "moving square" and "tags" not in rows["sticker.webp"]
    assert rows["line/moving-square.webp"]["tags"] == ["line style"]
    assert len({row["split"] for row in rows.values() if row["text"] == "moving square"}) == 1
    frames, durations = read_sticker(out / "line/moving-square.webp")
    assert len(frames) == 4 and sum(durations) == 1000
    before = (out / "sticker.webp").stat().st_mtime_ns
    assert lottie.main(call) == 0 and (out / "sticker.webp").stat().st_mtime_ns == before
    assert lottie.main([*call, "--frames", "5"]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_lottie_reads_an_npm_tarball(tmp_path):
    pack(tmp_path, ("icons", "1.0.0"), {"line/rain.json": animation(), "package.json": {}})
    found = dict(lottie.find(tmp_path / "icons-1.0.0.tgz"))
    assert [path.as_posix() for path in found] == ["line/rain.json", "package.json"]
    assert lottie.parse(found[Path("line/rain.json")])["w"] == 100
    (tmp_path / "bad.tgz").write_bytes(b"no")
    with pytest.raises(DataError, match="neither a folder nor a whole .tgz"):
        list(lottie.find(tmp_path / "bad.tgz"))


# ------------------------------------------------------------------------------------------------------------
# Procedural, and what all share

def test_procedural_has_not_changed():
    found = hashlib.sha256()
    for index in range(12):
        frames, durations, caption, attributes = procedural.sticker(index, 64)
        found.update(frames.tobytes() + json.dumps([durations, caption, attributes]).encode())
    assert found.hexdigest() == "1b5c021b915b7fccfa0f52974b36f2d956753fcde9cbee9c694e22d97536b181"


def test_procedural_folder(tmp_path):
    call = ["--out", str(tmp_path / "p"), "--count", "3", "--size", "32"]
    assert procedural.main(call) == 0 and procedural.main(call) == 0
    rows = rows_of(tmp_path / "p")
    frames, durations, caption, attributes = procedural.sticker(2, 32)
    assert rows[2]["text"] == caption and rows[2]["shape"] == attributes["shape"] and len(rows) == 3
    assert read_sticker(tmp_path / "p" / rows[2]["file_name"])[0].shape[1:] == (32, 32, 4)


def test_a_folder_with_captions_of_its_own_keeps_them(tmp_path, capsys):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.webp", "text": "mine"}\n')
    for call in (lambda: procedural.main(["--out", str(tmp_path), "--count", "1", "--size", "32"]),
                 lambda: fetch.run(lambda: fluent.fluent(tmp_path, ()))):
        assert call() == 2 and "did not write; choose another" in capsys.readouterr().err
    assert "mine" in (tmp_path / "metadata.jsonl").read_text()


def test_procedural_does_without_data_py():
    code = "import sys, stickers.procedural; sys.exit('data' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_built_in_stickers_have_tags():
    rows = rows_of(ROOT / "stickers/fluent")
    assert len(rows) == 64 == len(list((ROOT / "stickers/fluent").glob("*.webp")))
    assert all(row["tags"] and row["split"] == "train" for row in rows)


@pytest.mark.parametrize("module, missing, call", [
    (emoji, "resvg_py", []), (lottie, "rlottie_python", ["."])])
def test_missing_package_is_one_line(styles, tmp_path, monkeypatch, capsys, module, missing, call):
    monkeypatch.setitem(sys.modules, missing, None)
    assert module.main([*call, "--out", str(tmp_path / "out"), "--cache", str(styles)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"pip install {missing.replace('_py', '-py')}" in lines[0]


@pytest.mark.parametrize("module, call", [
    (emoji, ["--styles", "noto,cubist"]), (emoji, ["--size", "5"]), (fluent, ["--parts", "5"]),
    (lottie, ["--frames", "0"]), (lottie, ["nowhere"]), (procedural, ["--count", "0"])])
def test_bad_flags_are_one_line(tmp_path, capsys, module, call):
    assert module.main([*call, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_runs_as_a_script(tmp_path):
    call = [sys.executable, str(ROOT / "stickers/emoji.py"), "--styles", "cubist"]
    run = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: --styles cubist")
