"""Dual masks and the difficulty-adaptive curriculum: RDTF's two ideas on using little data well.

A *condition mask* says which frames of a clip are given, so one network learns generation, prediction and
interpolation. A *frame mask* (the paper's loss mask) says which frames are real, so clips shorter than F can
be trained on. The *curriculum* says which task a sample trains, easy ones first.

Difficulty (paper, Section 3.4; release: curriculum). The entropy of a task has a static part known beforehand
(generation has to invent most, interpolation least), a straight line over training, and an adaptive part read
off the training loss: a PID-type score, its percentile in the history, and from it one of five levels. The
release's code does not run: it reads a level before the first score exists, and sorts the history in place,
which destroys the order that its "last 1000" needs. We keep its constants; the details are ours.
"""
import math
from typing import Callable, NamedTuple

import numpy as np


class Task(NamedTuple):
    given: Callable                       # n real frames -> list of the sets of frames that may be given
    static: tuple                         # weight at the start and at the end of training
    adaptive: tuple                       # weight at level 0 (easy) and at level 4 (hard)
    text: bool = True                     # False: the caption is dropped


# One row per task (Table 7; weights: release). A new task is a new row and nothing else anywhere.
TASKS = {
    "i2v": Task(lambda n: [{i} for i in range(n)], (0.1, 0.9), (0.1, 0.9), text=False),
    "t2v": Task(lambda n: [set()], (0.1, 0.9), (0.1, 0.9)),
    "it2v": Task(lambda n: [{i} for i in range(n)], (0.1, 0.9), (0.1, 0.9)),
    # the first given frame s ~ U{1..n//2+1}, kept below n
    "predict_pre": Task(lambda n: [set(range(s, n)) for s in range(1, min(n // 2 + 2, n))],
                        (0.7, 0.3), (0.5, 0.5)),
    # the number of given frames e ~ U{n//2..n-1}, at least 1
    "predict_post": Task(lambda n: [set(range(e)) for e in range(max(1, n // 2), n)], (0.7, 0.3), (0.5, 0.5)),
    # every second frame from the first or the second on, or every third
    "interpolate": Task(lambda n: [set(range(0, n, 2)), set(range(1, n, 2)), set(range(0, n, 3))] * (n > 1),
                        (0.9, 0.1), (0.9, 0.1)),
}


def make_masks(task, n, frames=8, choice=None, rng=None):
    """-> (cond_mask, frame_mask), two (frames,) bool arrays: True = given, True = real.

    Training and sampling make their masks here. n: real frames, 1..frames; frames from n on are never given.
    The set of given frames is number `choice` of the task's, else rng (a numpy Generator) draws it. A string
    such as "10010010" in place of a task names the given frames. ValueError if it can't be done.
    """
    if not 1 <= n <= frames:
        raise ValueError(f"{n} frames: a clip has 1 to {frames}")
    if task and set(task) <= {"0", "1"}:
        if len(task) > frames:
            raise ValueError(f"mask {task}: {len(task)} places, a clip has {frames} frames")
        options = [{i for i, x in enumerate(task[:n]) if x == "1"}]
    elif task in TASKS:
        options = TASKS[task].given(n)
    else:
        raise ValueError(f"task {task!r}: choose one of {', '.join(TASKS)}, or a mask such as 10010010")
    if not options:
        raise ValueError(f"task {task}: needs a clip of at least 2 frames")
    if choice is None:
        choice = int(rng.integers(len(options))) if len(options) > 1 else 0
    if not 0 <= choice < len(options):
        raise ValueError(f"task {task} with {n} frames: choice {choice} is not below {len(options)}")
    i = np.arange(frames)
    return np.isin(i, list(options[choice])), i < n


WINDOW = 1000                             # losses and scores that are looked back on (release)
WARMUP = 10                               # with fewer scores the level is 0, the easiest (ours)


class Curriculum:
    """kind: "none" = equal weights, "linear" = the static part (Table 4: LCL), "adaptive" = static + adaptive
    (DCL). The history of losses and their scores is its state: [i] is of update i."""

    def __init__(self, kind, total, tasks=tuple(TASKS), made=False):
        """total: updates of the run. tasks: one that is named twice weighs twice. made: a clip must have a
        frame that is not given (Config.clean)."""
        if kind not in ("none", "linear", "adaptive"):
            raise ValueError(f"curriculum {kind!r}: choose one of none, linear, adaptive")
        self.kind, self.total, self.tasks, self.made = kind, max(total, 1), tuple(dict.fromkeys(tasks)), made
        self.times = np.array([tuple(tasks).count(t) for t in self.tasks])
        self.losses, self.scores = [], []

    def record(self, loss):
        """The loss of one update, per frame that counts -> its score is kept, too:
        P = 5.0 L_now + 3.0 mean(last <= 1000 L) + 1.3 (L_now - L_before) (release); NaN if L is not finite.
        """
        self.losses.append(float(loss))
        recent = [x for x in self.losses[-WINDOW:] if math.isfinite(x)]
        score = math.nan
        if math.isfinite(self.losses[-1]):
            before = recent[-2] if len(recent) > 1 else recent[-1]
            score = 5.0 * recent[-1] + 3.0 * math.fsum(recent) / len(recent) + 1.3 * (recent[-1] - before)
        self.scores.append(score)

    def level(self):
        """0 (easy) .. 4 (hard): fifths of 1 - q, q = share of the last 1000 scores below the newest."""
        scores = np.array(self.scores[-WINDOW:])
        scores = scores[np.isfinite(scores)]
        if len(scores) < WARMUP:
            return 0
        return min(4, int(5 * (1 - np.mean(scores < scores[-1])) + 1e-9))     # 1e-9: 1 - 0.4 is three fifths

    def weights(self, step):
        """(len(tasks),) probabilities at a step."""
        rows, u, level = [TASKS[t] for t in self.tasks], min(step / self.total, 1.0), self.level()
        w = np.ones(len(rows))
        if self.kind != "none":
            w = np.array([(1 - u) * row.static[0] + u * row.static[1] for row in rows])
        if self.kind == "adaptive":
            w += [row.adaptive[0] + (row.adaptive[1] - row.adaptive[0]) * level / 4 for row in rows]
        return w * self.times / (w * self.times).sum()

    def allowed(self, task, n):
        """Can a clip of n real frames train this task?"""
        return any(len(x) < n or not self.made for x in TASKS[task].given(n))

    def draw(self, weights, n, rng):
        """A task for a clip of n real frames; one uniform number of rng is used whatever the weights are."""
        u = rng.random()
        w = np.where([self.allowed(t, n) for t in self.tasks], weights, 0.0)
        if w.sum() == 0:
            raise ValueError(f"tasks {', '.join(self.tasks)}: none can be done with a clip of {n} frame")
        return self.tasks[min(int(np.searchsorted(np.cumsum(w) / w.sum(), u, side="right")), len(w) - 1)]

    def state_dict(self):
        return {"losses": list(self.losses), "scores": list(self.scores)}

    def load_state_dict(self, state):
        self.losses, self.scores = list(state["losses"]), list(state["scores"])
