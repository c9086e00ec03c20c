"""stickers/augment.py: changed copies and flights are premultiplied, repeatable and honest about captions."""
import shutil

import numpy as np
import pytest

import data
from stickers import augment, procedural
from test_data import HalfVAE, moving


def planes(frames, size=32):
    """Straight frames -> premultiplied (t, 4, size, size)."""
    return np.ascontiguousarray(data.fit_frames(frames, size).transpose(0, 3, 1, 2))


def test_varied_stickers_are_premultiplied_move_alike_and_keep_grey():
    frames = planes(moving(6))
    grey = frames.copy()
    grey[:, :3] = frames[:, 3:] // 2
    kept = 0
    for seed in range(40):
        new, holds = augment.vary(frames, np.random.default_rng(seed))
        again, _ = augment.vary(frames, np.random.default_rng(seed))
        assert new.shape == frames.shape and new.dtype == np.uint8 and np.array_equal(new, again)
        assert (new[:, :3] <= new[:, 3:]).all() and not np.array_equal(new, frames)
        still, _ = augment.vary(frames[[2, 2]], np.random.default_rng(seed))
        assert np.array_equal(still[0], still[1]) and np.array_equal(still[0], new[2])
        turned, _ = augment.vary(grey, np.random.default_rng(seed))       # about the grey axis: grey stays
        assert np.ptp(turned[:, :3].astype(int), axis=1).max() <= 1
        if holds:                                                      # not recoloured: red stays red
            red = frames.copy()
            red[:, 1:3] = 0
            assert not augment.vary(red, np.random.default_rng(seed))[0][:, 1:3].any()
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

    frames = planes(moving(3))
    same, holds = augment.vary(frames, Fixed(False))
    assert holds and np.abs(same.astype(int) - frames).max() <= 1
    other, holds = augment.vary(frames, Fixed(True))
    assert not holds and np.abs(other[..., ::-1].astype(int) - frames).max() <= 1


def test_a_flight_is_the_picture_moved_and_premultiplied():
    picture, spans = planes(moving(1))[0], []
    for seed in range(30):
        clip = augment.fly(picture, np.random.default_rng(seed), 8)
        assert clip.shape == (8, 4, 32, 32) and clip.dtype == np.uint8 and (clip[:, :3] <= clip[:, 3:]).all()
        assert np.array_equal(clip, augment.fly(picture, np.random.default_rng(seed), 8))
        mass = clip[:, 3].astype(float)
        assert mass.sum((1, 2)).max() > 0
        spans.append(np.abs(np.diff(clip.astype(int), axis=0)).max())
    assert min(spans) > 20                                              # every one moves


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A store of 24 pixel stickers, some held out, and augment's command on it."""
    monkeypatch.setattr(data, "SHARD", 10)
    monkeypatch.setattr(augment, "SHARD", 10)
    procedural.save(tmp_path / "in", 24, 32)
    store = data.prepare(tmp_path / "in", tmp_path / "plain", 32, workers=0, filters=())
    assert 0 < len(store.select("held_out")) < 24
    command = [str(tmp_path / "plain"), "--out", str(tmp_path / "more")]
    return store, lambda *flags: augment.main([*command, *flags])


def test_augmented_store(plain, tmp_path, capsys):
    store, main = plain
    assert main("--copies", "3") == 0
    more = data.open_store(tmp_path / "more")
    train, held = store.select("train"), store.select("held_out")
    assert len(more) == 3 * len(train) + len(held) and len(more.select("held_out")) == len(held)
    for split, step in (("train", 3), ("held_out", 1)):
        # each as it is comes first
        for i, j in zip(store.select(split), more.select(split)[::step], strict=True):
            assert np.array_equal(store.frames(i), more.frames(j)) and store.texts(i) == more.texts(j)
    texts = [more.texts(j) for j in more.select("train")]
    captions = {name: caption for name, caption, _ in texts}
    assert len(captions) == len(texts) and any("#" in n and not c for n, c in captions.items())
    assert all(c in ("", captions[n.partition("#")[0]]) for n, c in captions.items())
    fresh = augment.augment(store, tmp_path / "latents", 1, HalfVAE("one"))              # as latents
    assert [fresh.texts(i) for i in range(24)] == [store.texts(i) for i in range(24)]
    both = (np.concatenate(s.shards) for s in (fresh, store.encode(HalfVAE("one"))))
    assert np.array_equal(*both)
    with pytest.raises(data.DataError, match="without --vae"):
        augment.augment(fresh, tmp_path / "again", 3)
    shutil.rmtree(tmp_path / "more")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "thesis.txt").write_text("years of work")
    capsys.readouterr()
    assert main() == 2 and "choose another --out" in capsys.readouterr().err
    assert main("--out", str(tmp_path / "more" / ".." / "plain")) == 2      # fault: it was replaced
    assert "is the store itself" in capsys.readouterr().err


def test_flying_stickers(plain, tmp_path):
    store, main = plain
    assert main("--fly", "--copies", "2") == 0
    flying = data.open_store(tmp_path / "more")
    known = {tuple(store.texts(i)[:2]) for i in store.select("train")}
    assert len(flying) == 2 * len(known) and not len(flying.select("held_out"))
    alone = 0
    for i in range(len(flying)):
        name, caption, _ = flying.texts(i)
        alone += bool(caption)                          # two by two they have no caption
        assert not caption or (name.partition("#")[0], caption) in known
        assert data.draw_clip(flying, i, np.random.default_rng(i))[1] >= 2
    assert 0.2 < alone / len(flying) < 0.8
