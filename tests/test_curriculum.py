"""Dual masks and curriculum: the claims of Table 7 and Section 6 of the method, against slow references."""

import math

import numpy as np
import pytest

from curriculum import (GENERATION, PATTERNS, TASKS, Curriculum, adaptive_weight, allowed, choices,
                        make_masks, static_weight)

CASES = [(task, n) for task in TASKS for n in range(1, 9) if allowed(task, n)]


@pytest.mark.parametrize("task,n", CASES)
def test_masks_never_give_padding_and_leave_work(task, n):
    for seed in range(200):
        given, real = make_masks(task, n, rng=np.random.default_rng(seed))
        assert real.sum() == n and real[:n].all()
        assert not (given & ~real).any()
        if n > 1:
            assert (real & ~given).any(), "at least one frame to make"
        if task != "t2v":
            assert given.any(), "at least one frame given"


def slow_options(task, n):
    """Table 7 written out, one given-set per choice."""
    if task == "t2v":
        return [set()]
    if task in ("i2v", "it2v"):
        return [{i} for i in range(n)]
    if task == "interpolate":
        return [{i for i in range(n) if p[i] == "1"} for p in ("10101010", "01010101", "10010010")]
    if task == "predict_pre":
        return [set(range(s, n)) for s in range(1, n // 2 + 2) if s < n]
    return [set(range(e)) for e in range(n // 2, n) if e > 0]


@pytest.mark.parametrize("task,n", CASES)
def test_masks_are_distributed_as_stated(task, n):
    options = [frozenset(s) for s in slow_options(task, n)]
    draws = 3000
    rng = np.random.default_rng(0)
    counts = {o: 0 for o in options}
    for _ in range(draws):
        given, _ = make_masks(task, n, rng=rng)
        counts[frozenset(np.flatnonzero(given))] += 1       # KeyError: a mask that the table does not have
    expected = {o: draws * options.count(o) / len(options) for o in counts}
    chi2 = sum((counts[o] - expected[o]) ** 2 / expected[o] for o in counts)
    k = len(counts) - 1
    assert chi2 < k + 4 * math.sqrt(2 * k) + 4, (counts, chi2)


def test_every_row_of_table_7_is_reachable_by_choice():
    for task, n in CASES:
        made = {frozenset(np.flatnonzero(make_masks(task, n, at=at)[0])) for at in choices(task, n)}
        assert made == {frozenset(s) for s in slow_options(task, n)}


def test_explicit_patterns_and_loop():
    given, real = make_masks("10010010", 8)
    assert "".join(str(int(x)) for x in given) == "10010010" and real.all()
    assert make_masks("1111", 3)[0].sum() == 3                              # never past n
    given, _ = make_masks("loop", 6)
    assert list(np.flatnonzero(given)) == [0, 5]
    assert list(np.flatnonzero(make_masks("interpolate", 16, frames=16, at=0)[0])) == list(range(0, 16, 2))


@pytest.mark.parametrize("call,words", [
    (lambda: make_masks("zoom", 8), "zoom"), (lambda: make_masks("t2v", 9), "1 to 8"),
    (lambda: make_masks("predict_post", 1), "at least 2"), (lambda: make_masks("it2v", 4, at=4), "choice 4"),
    (lambda: make_masks("1" * 9, 8), "9 places"), (lambda: Curriculum("hard", 1), "hard")])
def test_bad_calls_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------------------------------------------


def slow_history(losses):
    """PID score and level after every loss, written from METHOD.md with plain lists. A NaN keeps its place in
    the window.
    """
    out, scores = [], []
    for i, loss in enumerate(losses):
        window = [x for x in losses[:i + 1][-1000:] if math.isfinite(x)]
        before = window[-2] if len(window) > 1 else window[-1]
        score = 5 * loss + 3 * sum(window) / len(window) + 1.3 * (loss - before)
        scores.append(score if math.isfinite(loss) else math.nan)
        finite = [s for s in scores[-1000:] if math.isfinite(s)]
        q = sum(s < finite[-1] for s in finite) / len(finite)
        out.append((scores[-1], min(4, math.floor(round(5 * (1 - q), 9))) if len(finite) >= 10 else 0))
    return out


SERIES = {
    "falling": [1 / (1 + 0.01 * i) for i in range(1300)], "constant": [0.5] * 60, "short": [0.3] * 9,
    "spikes": [1.0 + 10 * (i % 37 == 0) for i in range(200)],
    "noise": list(np.random.default_rng(1).gamma(2, 0.1, 1500)),
    "nan": [0.3, math.nan, 0.2, math.inf] * 10 + [0.1] * 10,
}


@pytest.mark.parametrize("name", SERIES)
def test_score_and_level_against_slow_reference(name):
    cur = Curriculum("adaptive", 100)
    for i, (loss, (score, level)) in enumerate(zip(SERIES[name], slow_history(SERIES[name]))):
        cur.record(loss)
        assert cur.scores[-1] == pytest.approx(score, rel=1e-12, nan_ok=True), i
        assert cur.level() == level, i


def test_the_first_updates_are_easiest_and_high_loss_means_easier():
    cur = Curriculum("adaptive", 100)
    for loss in [0.5] * 9:
        cur.record(loss)
        assert cur.level() == 0
    for loss in np.linspace(0.5, 0.1, 50):
        cur.record(loss)
    assert cur.level() == 4                                 # the lowest score of its history: hardest
    cur.record(2.0)
    assert cur.level() == 0                                                 # the highest: easiest


def test_weights_are_the_stated_straight_lines():
    assert [static_weight("t2v", u) for u in (0, 0.5, 1)] == pytest.approx([0.1, 0.5, 0.9])
    assert [static_weight("interpolate", u) for u in (0, 0.5, 1)] == pytest.approx([0.9, 0.5, 0.1])
    assert [static_weight("predict_pre", u) for u in (0, 0.5, 1)] == pytest.approx([0.7, 0.5, 0.3])
    assert [adaptive_weight("it2v", level) for level in range(5)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    easier = [adaptive_weight("interpolate", level) for level in range(5)]
    assert easier == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])
    w = dict(zip(TASKS, Curriculum("linear", 100).weights(0)))
    assert w["interpolate"] / w["t2v"] == pytest.approx(9)
    assert np.allclose(Curriculum("none", 100).weights(37), 1 / 6)
    easy = Curriculum("adaptive", 100).weights(0)           # no history: level 0 on top of the static part
    assert dict(zip(TASKS, easy / easy[1]))["interpolate"] == pytest.approx(1.8 / 0.2)


def test_weights_use_only_losses_of_updates_before_the_last():
    a, b = Curriculum("adaptive", 50), Curriculum("adaptive", 50)
    for i in range(30):
        a.record(0.5 - 0.01 * i)
        b.record(0.5 - 0.01 * i)
    a.record(9.0)
    b.record(0.01)
    assert np.array_equal(a.weights(31), b.weights(31)) and not np.array_equal(a.weights(32), b.weights(32))


def test_draws_follow_the_weights_and_skip_what_one_frame_cannot_do():
    cur = Curriculum("linear", 100)
    w = cur.weights(20)
    draws = [cur.draw(w, 8, np.random.default_rng([1, i])) for i in range(4000)]
    for task, p in zip(TASKS, w):
        assert abs(draws.count(task) / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    assert {cur.draw(w, 1, np.random.default_rng(i)) for i in range(200)} == set(GENERATION)
    with pytest.raises(ValueError, match="1 frame"):
        Curriculum("none", 1, ("interpolate",)).draw([1.0], 1, np.random.default_rng(0))


def test_state_is_restored_exactly():
    a = Curriculum("adaptive", 500)
    for x in np.random.default_rng(3).gamma(2, 0.1, 137):
        a.record(x)
    b = Curriculum("adaptive", 500)
    b.load_state_dict(a.state_dict())
    for x in (0.3, 0.1, 0.9):
        assert np.array_equal(a.weights(len(a.losses) + 1), b.weights(len(b.losses) + 1))
        a.record(x)
        b.record(x)
    assert a.scores == b.scores and len(PATTERNS) == 3
