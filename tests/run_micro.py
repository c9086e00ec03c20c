"""train.py and stickers/vae.py with small presets that a test can afford: `python tests/run_micro.py FLAGS`.

`start` runs it in a process forked from a server that has imported everything already: that saves seconds.
Hooks are failures to order, or things to look at: they run in that process before main().
"""

import functools
import gc
import multiprocessing
import os
import signal
import sys
import weakref
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

import curriculum  # noqa: E402
import rdtf  # noqa: E402
import train  # noqa: E402
from stickers import vae  # noqa: E402

torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1)])                # its first use imports seconds' worth of torch: once
SMALL = dict(size=32, widths=(32,), head_dim=8, context_dim=16, text_layers=1, text_bytes=16,
             vae_widths=(32, 32), steps=1)
rdtf.PRESETS["micro"] = rdtf.PRESETS["tiny"] | SMALL
# with one channel per group a bias before a GroupNorm has rounding for a gradient; Adam scales it
rdtf.PRESETS["micro64"] = rdtf.PRESETS["micro"] | dict(widths=(64,))
rdtf.PRESETS["paperlike"] = SMALL                  # what `tiny` adds is off: eps, given frames in the loss
for preset in ("micro", "micro64", "paperlike"):
    train.RECIPES[preset] = dict(steps=6, batch_size=2, optimizer="adamw", lr=1e-3, weight_decay=0.01,
                                 ema=0.9, warmup=2, schedule="cosine", noise_levels="normal", full=0.3,
                                 accumulation=1, tasks=",".join(curriculum.TASKS), word_drop=0.2,
                                 save_every=200, eval_every=100)
train.validation_rows = functools.partial(train.validation_rows, count=6)
sheet = train.sample_sheet
train.sample_sheet = lambda loaded, stickers, items, *a, **k: sheet(loaded, stickers, items[:1], *a, **k)


def main(argv, output=None, env=None, hooks=(), program="train"):
    if output:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
    os.environ.update(env or {})
    curriculum.WARMUP = 2                          # in this process only: the level moves soon
    for name, *arguments in hooks:
        globals()[name](*arguments)
    flags = ["--preset", "micro", "--device", "cpu", "--precision", "fp32", *argv]
    if program == "vae":
        sys.exit(vae.main(["--batch-size", "2", *flags]))
    sys.argv = ["train.py", *flags]
    train.main()


server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["run_micro"])


def start(*rest):
    process = server.Process(target=main, args=rest)
    process.start()
    return process


def before(name, action):
    """action() runs before every call of a function of train.py, else of stickers/vae.py."""
    module = train if hasattr(train, name) else vae
    function = getattr(module, name)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        action()
        return function(*args, **kwargs)
    setattr(module, name, wrapped)


def signal_at(number, name, call):
    """The process sends itself a signal at the call-th call (from 0) of a function."""
    left = [call]

    def act():
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), number)
    before(name, act)


def kill_in_save(number, where):
    """SIGKILL during the number-th save: half its bytes written, all written, renamed."""
    count, save, fsync, replace = [0], torch.save, os.fsync, os.replace

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def half_save(data, file):
        count[0] += 1
        save(data, file)
        if count[0] == number and where == "half":
            file.flush()
            os.ftruncate(file.fileno(), file.tell() // 2)
            die()

    def dying_fsync(fd):
        fsync(fd)
        if count[0] == number and where == "written":
            die()

    def dying_replace(a, b):
        replace(a, b)
        if count[0] == number and where == "renamed" and str(b).endswith(".pt"):
            die()

    torch.save, os.fsync, os.replace = half_save, dying_fsync, dying_replace


def nan_losses(first, last):
    """The losses of the forward passes first .. last (from 0) are NaN."""
    count, forward = [0], rdtf.RDTF.forward

    def broken(self, *args, **kwargs):
        losses = forward(self, *args, **kwargs)
        if self.training:
            count[0] += 1
            if first <= count[0] - 1 <= last:
                return losses * float("nan")
        return losses

    rdtf.RDTF.forward = broken


def eager_backend():
    """--compile without a compiler: Dynamo's graph, in one piece, as it is (AOT autograd takes 16 s more).
    One graph serves all updates, or shapes change."""
    torch._dynamo.config.error_on_recompile = True
    module = torch.nn.Module
    module.compile = functools.partialmethod(module.compile, backend="eager", fullgraph=True)


def checkpoint_must_go():
    """At the first update nothing may hold the checkpoint that was loaded."""
    class Watched(dict):
        pass
    load, seen = train.load_checkpoint, []

    def watched(*args):
        data = Watched(load(*args))
        seen.append(weakref.ref(data))
        return data

    def gone():
        gc.collect()
        assert seen and not any(x() for x in seen), "a second copy of everything is kept"
    train.load_checkpoint = watched
    before("make_batch", gone)


def seventh_task():
    """One more row of the table of tasks, before train.py names all of them in a recipe, and nothing else."""
    row = curriculum.Task(lambda n: [{0, n - 1}] * (n > 2), (0.5, 0.5), (0.9, 0.9))
    curriculum.TASKS["between"] = row
    train.RECIPES["micro"]["tasks"] = ",".join(curriculum.TASKS)


if __name__ == "__main__":
    main(sys.argv[1:])
