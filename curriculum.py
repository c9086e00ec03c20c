"""Dual masks and the difficulty-adaptive curriculum: RDTF's two ideas on using little data well.

A *condition mask* says which frames of a clip are given, so that one network learns generation, prediction
and interpolation. A *frame mask* (the paper's loss mask) says which frames are real, so that clips shorter
than F can be trained on. The *curriculum* says which of the tasks a sample trains, easy ones first.

Difficulty (paper, Section 3.4; release `curriculum`). The entropy of a task is split in two: a static part
known beforehand (generation has to invent most, interpolation least) that follows a straight line over
training, and an adaptive part read off the training loss. The release computes a PID-type score of the loss,
its percentile in the history and from it one of five levels, but does not run: it looks the level up in a
table before the first score exists, and sorts the history in place, which destroys the time order its "last
1000" needs. We keep its constants and do what it evidently means; every such point is marked "ours".
"""

import math

import numpy as np

TASKS = ("i2v", "t2v", "it2v", "predict_pre", "predict_post", "interpolate")
GENERATION = ("i2v", "t2v", "it2v")
PATTERNS = ("10101010", "01010101", "10010010")     # given frames of interpolation (Table 7, release)


# ------------------------------------------------------------------------------------------------------------
# Dual masks


def choices(task, n):
    """The values a task's one free choice may take for n real frames (Table 7, release; bounds for small n
    are ours).

    i2v, it2v: which frame is given. interpolate: which of PATTERNS. predict_pre: the first given frame s,
    U{1..n//2+1}, kept below n. predict_post: how many frames are given, U{n//2..n-1}, at least one. t2v,
    loop: nothing to choose.
    """
    return {"i2v": range(n), "it2v": range(n), "t2v": range(1), "loop": range(1),
            "interpolate": range(len(PATTERNS)), "predict_pre": range(1, min(n // 2 + 1, n - 1) + 1),
            "predict_post": range(max(1, n // 2), n)}[task]


def allowed(task, n):
    """A clip of one frame has nothing to predict or interpolate."""
    return n > 1 or task in GENERATION


def make_masks(task, n, frames=8, at=None, rng=None):
    """-> (cond_mask, frame_mask), two (frames,) bool arrays: True = given, True = real. Training and sampling
    both call this.

    n: real frames, 1..frames. The task's free choice is `at` if given (see `choices`), else drawn from rng, a
    numpy Generator. Frames from n on are never given. "loop" gives the first and the last frame. Any other
    string of zeros and ones is an explicit pattern, "10010010". Raises ValueError on an unknown task, n out
    of range or an impossible choice.
    """
    if not 1 <= n <= frames:
        raise ValueError(f"{n} frames: a clip has 1 to {frames}")
    i = np.arange(frames)
    real = i < n
    if task and set(task) <= {"0", "1"}:
        if len(task) > frames:
            raise ValueError(f"mask {task}: {len(task)} places, a clip has {frames} frames")
        given = np.array([x == "1" for x in task.ljust(frames, "0")])
        return given & real, real
    if task not in TASKS + ("loop",):
        raise ValueError(f"task {task!r}: choose one of {', '.join(TASKS)}, loop, or a mask such as 10010010")
    if not allowed(task, n):
        raise ValueError(f"task {task}: needs a clip of at least 2 frames")
    options = choices(task, n)
    if at is None:
        at = options[int(rng.integers(len(options)))] if len(options) > 1 else options[0]
    elif at not in options:
        raise ValueError(f"task {task} with {n} frames: choice {at} is not in {list(options)}")
    if task == "t2v":
        given = i < 0
    elif task in ("i2v", "it2v"):
        given = i == at
    elif task == "interpolate":
        given = np.array([x == "1" for x in (PATTERNS[at] * (frames // 8 + 1))[:frames]])
    elif task == "predict_pre":
        given = i >= at
    elif task == "predict_post":
        given = i < at
    else:
        given = (i == 0) | (i == n - 1)
    return given & real, real


# ------------------------------------------------------------------------------------------------------------
# Curriculum

WINDOW = 1000                                        # losses and scores that are looked back on (release)
WARMUP = 10                                          # with fewer scores the level is 0, the easiest (ours)


def static_weight(task, u):
    """Straight lines over the training progress u in [0, 1]: easy tasks fade, hard ones grow (release)."""
    start, end = (0.1, 0.9) if task in GENERATION else (0.9, 0.1) if task == "interpolate" else (0.7, 0.3)
    return start + (end - start) * u


def adaptive_weight(task, level):
    """level 0 (easy) .. 4 (hard): generation 0.1 .. 0.9, interpolation the reverse, prediction always 0.5
    (release).
    """
    if task in GENERATION:
        return 0.1 + 0.2 * level
    return 0.9 - 0.2 * level if task == "interpolate" else 0.5


class Curriculum:
    """kind: "none" = equal weights, "linear" = the static part (the paper's LCL), "adaptive" = static +
    adaptive (DCL), Table 4.

    The history is part of the state: `losses[i]` belongs to update i (NaN where the loss was not finite),
    `scores[i]` likewise. Weights at step s use updates 0 .. s-2 only, so that nobody has to wait for the loss
    of the update just made (ours).
    """

    def __init__(self, kind, total, tasks=TASKS):
        if kind not in ("none", "linear", "adaptive"):
            raise ValueError(f"curriculum {kind!r}: choose one of none, linear, adaptive")
        self.kind, self.total, self.tasks = kind, max(total, 1), tuple(tasks)
        self.losses, self.scores = [], []

    def record(self, loss):
        """The training loss of one update, a mean over everything. A loss that is not finite leaves no score
        (ours).
        """
        self.losses.append(float(loss))
        self.scores.append(self.score())

    def score(self):
        """P = 5.0 L_now + 3.0 mean(last <= 1000 L) + 1.3 (L_now - L_before) (release); NaN if L_now is not
        finite.
        """
        if not math.isfinite(self.losses[-1]):
            return math.nan
        recent = [x for x in self.losses[-WINDOW:] if math.isfinite(x)]
        before = recent[-2] if len(recent) > 1 else recent[-1]
        return 5.0 * recent[-1] + 3.0 * (math.fsum(recent) / len(recent)) + 1.3 * (recent[-1] - before)

    def level(self, updates=None):
        """0 (easy) .. 4 (hard) after the first `updates` updates: fifths of 1 - q, q = share of the last 1000
        scores below the newest.
        """
        scores = np.array(self.scores[:updates][-WINDOW:] if updates != 0 else [])
        scores = scores[np.isfinite(scores)]
        if len(scores) < WARMUP:
            return 0
        q = np.mean(scores < scores[-1])
        return min(4, int(5 * (1 - q) + 1e-9))       # 1e-9: 1 - 0.4 must count as three fifths

    def weights(self, step):
        """(len(tasks),) probabilities at a step; a sample that cannot do some tasks renormalises over those
        it can.
        """
        if self.kind == "none":
            w = np.ones(len(self.tasks))
        else:
            u = min(step / self.total, 1.0)
            w = np.array([static_weight(t, u) for t in self.tasks])
            if self.kind == "adaptive":
                level = self.level(max(step - 1, 0))
                w = w + np.array([adaptive_weight(t, level) for t in self.tasks])
        return w / w.sum()

    def draw(self, weights, n, rng):
        """A task for a clip of n real frames; one uniform number of rng is used whatever the weights are."""
        u = rng.random()
        w = np.where([allowed(t, n) for t in self.tasks], weights, 0.0)
        if w.sum() == 0:
            raise ValueError(f"tasks {', '.join(self.tasks)}: none can be done with a clip of {n} frame")
        return self.tasks[min(int(np.searchsorted(np.cumsum(w) / w.sum(), u, side="right")), len(w) - 1)]

    def state_dict(self):
        return {"losses": list(self.losses), "scores": list(self.scores)}

    def load_state_dict(self, state):
        self.losses, self.scores = list(state["losses"]), list(state["scores"])
