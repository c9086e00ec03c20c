"""Dual masks and curriculum: the claims of Table 7 and Section 6 of the method, against slow references."""

import math

import numpy as np
import pytest

from curriculum import TASKS, Curriculum, Task, make_masks

CASES = [(task, n) for task in TASKS for n in range(1, 9) if TASKS[task].given(n)]
GENERATION = {"i2v", "t2v", "it2v"}


def patterns(*texts):
    return [frozenset(i for i, x in enumerate(text) if x == "1") for text in texts]


def slow_options(task, n):
    """Table 7 written out, one set of given frames per choice."""
    if task == "t2v":
        return [frozenset()]
    if task in ("i2v", "it2v"):
        return [frozenset([i]) for i in range(n)]
    if task == "interpolate":
        return patterns("10101010"[:n], "01010101"[:n], "10010010"[:n])
    if task == "predict_pre":
        return [frozenset(range(s, n)) for s in range(1, n // 2 + 2) if s < n]
    return [frozenset(range(e)) for e in range(n // 2, n) if e > 0]


@pytest.mark.parametrize("task,n", CASES)
def test_masks_are_those_of_table_7_drawn_evenly(task, n):
    options, rng, draws = slow_options(task, n), np.random.default_rng(0), 2000
    counts = dict.fromkeys(options, 0)
    for _ in range(draws):
        given, real = make_masks(task, n, rng=rng)
        assert given.shape == real.shape == (8,) and real.tolist() == [i < n for i in range(8)]
        counts[frozenset(np.flatnonzero(given))] += 1       # KeyError: a mask that the table does not have
        assert not (given & ~real).any(), "padding is never given"
        assert task == "t2v" or given.any(), "at least one frame given"
        assert n == 1 or (real & ~given).any(), "at least one frame to make"
    expected = {o: draws * options.count(o) / len(options) for o in counts}
    chi2, k = sum((counts[o] - expected[o]) ** 2 / expected[o] for o in counts), len(counts) - 1
    assert chi2 < k + 4 * math.sqrt(2 * k) + 4, (counts, chi2)
    made = [frozenset(np.flatnonzero(make_masks(task, n, choice=i)[0])) for i in range(len(options))]
    assert made == options


def test_one_frame_trains_generation_only_and_no_other_length_is_without_a_task():
    assert {task for task in TASKS if TASKS[task].given(1)} == GENERATION
    assert {task for task, n in CASES if n == 2} == set(TASKS)


def test_explicit_masks_and_longer_clips():
    given, real = make_masks("10010010", 8)
    assert "".join(str(int(x)) for x in given) == "10010010" and real.all()
    assert make_masks("1111", 3)[0].sum() == 3                              # never past n
    for choice, places in enumerate((range(0, 16, 2), range(1, 16, 2), range(0, 16, 3))):
        given, real = make_masks("interpolate", 16, frames=16, choice=choice)
        assert np.flatnonzero(given).tolist() == list(places) and real.all()


@pytest.mark.parametrize("call,words", [
    (lambda: make_masks("zoom", 8), "zoom"), (lambda: make_masks("t2v", 9), "1 to 8"),
    (lambda: make_masks("t2v", 0), "1 to 8"), (lambda: make_masks("predict_post", 1), "at least 2"),
    (lambda: make_masks("it2v", 4, choice=4), "choice 4"),
    (lambda: make_masks("it2v", 4, choice=-1), "choice -1"),
    (lambda: make_masks("1" * 9, 8), "9 places"), (lambda: Curriculum("hard", 1), "hard")])
def test_bad_calls_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_seventh_task_is_one_new_row(monkeypatch):
    """First and last frame given. Masks, weights and draws know it without any other change."""
    row = Task(lambda n: [{0, n - 1}] * (n > 2), static=(0.2, 0.6), adaptive=(0.8, 0.4))
    monkeypatch.setitem(TASKS, "ends", row)
    given, real = make_masks("ends", 6)
    assert np.flatnonzero(given).tolist() == [0, 5] and real.sum() == 6
    with pytest.raises(ValueError, match="ends"):
        make_masks("ends", 2)
    cur = Curriculum("adaptive", 100, tuple(TASKS))
    weights = dict(zip(cur.tasks, cur.weights(50)))                         # level 0: 0.4 + 0.8
    assert weights["ends"] / weights["t2v"] == pytest.approx((0.4 + 0.8) / (0.5 + 0.1))
    drawn = {n: {cur.draw(cur.weights(50), n, np.random.default_rng(i)) for i in range(200)} for n in (2, 8)}
    assert drawn[8] == set(TASKS) and drawn[2] == set(TASKS) - {"ends"}


# ------------------------------------------------------------------------------------------------------------


def slow_history(losses):
    """PID score and level after every loss, written from METHOD.md with plain lists. A NaN keeps its place in
    the window."""
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
    "noise": list(np.random.default_rng(1).gamma(2, 0.1, 1200)),
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
    assert cur.level() == 0                                 # the highest: easiest


@pytest.mark.parametrize("kind", ["none", "linear", "adaptive"])
def test_weights_are_the_stated_straight_lines(kind):
    steps = {"generation": (0.1, 0.9), "predict": (0.7, 0.3), "interpolate": (0.9, 0.1)}
    levels = {"generation": (0.1, 0.3, 0.5, 0.7, 0.9), "predict": (0.5,) * 5,
              "interpolate": (0.9, 0.7, 0.5, 0.3, 0.1)}
    cur = Curriculum(kind, 100)
    for level, step in ((level, step) for level in range(5) for step in (0, 25, 100, 300)):
        cur.level = lambda: level
        u, expected = min(step / 100, 1), []
        for task in TASKS:
            group = "generation" if task in GENERATION else task.partition("_")[0]
            static = (1 - u) * steps[group][0] + u * steps[group][1]
            expected.append({"none": 1, "linear": static, "adaptive": static + levels[group][level]}[kind])
        assert np.allclose(cur.weights(step), np.array(expected) / sum(expected))


def test_draws_follow_the_weights_and_skip_what_one_frame_cannot_do():
    cur = Curriculum("linear", 100)
    w = cur.weights(20)
    draws = [cur.draw(w, 8, np.random.default_rng([1, i])) for i in range(4000)]
    for task, p in zip(TASKS, w):
        assert abs(draws.count(task) / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    assert {cur.draw(w, 1, np.random.default_rng(i)) for i in range(200)} == GENERATION
    with pytest.raises(ValueError, match="1 frame"):
        Curriculum("none", 1, ("interpolate",)).draw([1.0], 1, np.random.default_rng(0))
    made = Curriculum("none", 1, made=True)                 # some frame must be left to make
    assert {made.draw(made.weights(0), 1, np.random.default_rng(i)) for i in range(50)} == {"t2v"}


def test_a_draw_uses_one_number_whatever_the_weights_are():
    left = set()
    for weights, n in (([1, 0, 0, 0, 0, 0], 8), ([0, 0, 0, 0, 0, 1], 8), ([1, 1, 1, 1, 1, 1], 1)):
        rng = np.random.default_rng(5)
        Curriculum("none", 1).draw(weights, n, rng)
        left.add(rng.random())
    assert len(left) == 1


def test_state_is_restored_exactly():
    a, b = Curriculum("adaptive", 500), Curriculum("adaptive", 500)
    for x in np.random.default_rng(3).gamma(2, 0.1, 137):
        a.record(x)
    b.load_state_dict(a.state_dict())
    for i, x in enumerate((0.3, 0.1, 0.9)):
        assert np.array_equal(a.weights(138 + i), b.weights(138 + i))
        a.record(x)
        b.record(x)
    assert a.scores == b.scores and a.losses == b.losses
