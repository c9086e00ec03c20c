"""stickers/vsd2m.py: the layout of the authors' loader becomes a store; the LMDB is made here."""
import json

import numpy as np
import pytest

import data
from corpus import clip, encoded
from stickers import vsd2m
from test_data import HalfVAE

lmdb = pytest.importorskip("lmdb", reason="needs lmdb (tests/requirements.txt)")


def write(folder, stickers, first=0, name="frames.lmdb"):
    """[(md5, frames, caption)] -> paths of JSON lines and LMDB; frames as PNG, WebP or JPEG in turn."""
    labels, kinds = [], ("PNG", "WEBP", "PNG", "JPEG")
    with lmdb.open(str(folder / name), map_size=1 << 26) as env, env.begin(write=True) as txn:
        for n, (md5, frames, caption) in enumerate(stickers):
            options = {"lossless": True} if kinds[n % 4] == "WEBP" else {}
            for i, frame in enumerate(frames):
                raw = frame if isinstance(frame, bytes) else encoded(frame[None], kinds[n % 4], **options)
                txn.put(f"{md5}_{i + first}".encode(), raw)
            labels.append({"md5": md5, "nframes": len(frames), "fmt": "gif", "eng_cap": caption})
    (folder / "labels.jsonl").write_text("".join(json.dumps(x) + "\n" for x in labels) + "\n")
    return folder / "labels.jsonl", folder / name


@pytest.fixture
def few():
    """Twelve good stickers, then one of each kind that is left out."""
    good = [(f"{i:032x}", clip(t=1 + i % 5, seed=i), f"caption  {i}") for i in range(12)]
    flat = np.full((2, 48, 48, 4), 255, np.uint8)
    twin = good[4][1]                                                       # the flat one becomes JPEG
    return good + [("small", clip(h=20, w=40), "s"), ("aspect", clip(h=40, w=160), "a"), ("twin", twin, "t"),
                   ("flat", flat, "f"), ("broken", [b"\x89PNG no picture"], "b")]


def test_a_store_has_the_stickers_captions_and_keyframes(few, tmp_path):
    store = vsd2m.vsd2m(*write(tmp_path, few), tmp_path / "store", 32)
    assert [store.texts(i)[:2] for i in range(12)] == [[f"{i:032x}", f"caption {i}"] for i in range(12)]
    assert len(store) == 12 and (store.size, store.meta["kind"]) == (32, "pixels")
    report = dict(x.split("\t")[1::-1] for x in (tmp_path / "store" / "report.txt").read_text().splitlines())
    assert report == {"small": "small", "aspect": "aspect", "flat": "entropy", "twin": "duplicate",
                      "broken": "unreadable"}
    for i in (0, 1, 2, 4, 8):                                               # JPEG (3, 7, 11) loses alpha
        whole = data.keep_keyframes(data.fit_frames(few[i][1], 32), 0)
        assert np.array_equal(store.frames(i), whole.frames)
        assert np.array_equal(store.index[i]["keys"], whole.keys)
    assert store.index["duration"].tolist() == [125 * (1 + i % 5) for i in range(12)]
    shapes = {data.draw_clip(store, i, np.random.default_rng(i))[0].shape for i in range(12)}
    assert shapes == {(8, 4, 32, 32)}


def test_it_resumes_after_the_last_whole_shard(few, tmp_path, monkeypatch):
    paths = write(tmp_path, few, first=1)                                   # frames that count from 1
    monkeypatch.setattr(vsd2m, "SHARD", 5)
    whole, decode, seen = vsd2m.vsd2m(*paths, tmp_path / "whole", 32), vsd2m.decode_label, []

    def dying(label, **more):
        seen.append(label[0].name)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return decode(label, **more)
    monkeypatch.setattr(vsd2m, "decode_label", dying)
    with pytest.raises(KeyboardInterrupt):
        vsd2m.vsd2m(*paths, tmp_path / "store", 32)
    again = vsd2m.vsd2m(*paths, tmp_path / "store", 32)
    assert seen[8] == few[5][0] and len(seen) == 8 + len(few) - 5     # the first shard is not done again
    assert again.meta == whole.meta and np.array_equal(again.index, whole.index)
    assert all(np.array_equal(a, b) for a, b in zip(again.shards, whole.shards, strict=True))


def test_worker_processes_latents_and_no_filters(few, tmp_path):
    paths = write(tmp_path, few[:-1])
    one, two = (vsd2m.vsd2m(*paths, tmp_path / f"store{n}", 32, HalfVAE("one"), n, ()) for n in (0, 2))
    assert len(one) == len(few) - 1 and one.meta["kind"] == "latents" and one.meta["vae"]
    assert np.array_equal(one.index, two.index) and np.array_equal(one.shards[0], two.shards[0])


def test_the_command_line_and_its_one_line_errors(few, tmp_path, capsys):
    labels, frames = map(str, write(tmp_path, few[:12]))
    flags = ["--out", str(tmp_path / "store"), "--workers", "0", "--size", "32"]
    assert vsd2m.main([labels, frames, *flags, "--hold-out", "0.5"]) == 0
    assert 0 < len(data.open_store(tmp_path / "store").select("held_out")) < 12
    (tmp_path / "bad.jsonl").write_text('{"md5": "x", "nframes": 2}\n{"md5": "y"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "gone.jsonl").write_text('{"md5": "gone", "nframes": 3, "eng_cap": ""}\n')
    capsys.readouterr()
    for words, expected in (([str(tmp_path / "bad.jsonl"), frames], "bad.jsonl: line 2"),
                            ([str(tmp_path / "empty.jsonl"), frames], "empty.jsonl: no line"),
                            ([str(tmp_path / "none.jsonl"), frames], "none.jsonl"),
                            ([labels, str(tmp_path / "none.lmdb")], "none.lmdb: no LMDB"),
                            ([labels, frames, "--filter", "dull"], "--filter dull"),
                            ([str(tmp_path / "gone.jsonl"), frames, "--max-bad", "0"], "1 of 1")):
        assert vsd2m.main([*words, *flags]) == 2
        assert expected in capsys.readouterr().err.splitlines()[-1]
