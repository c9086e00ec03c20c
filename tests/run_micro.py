"""train.py with one more preset, "micro", that a test can afford: `python tests/run_micro.py FLAGS`.

`start` runs it in a process forked from a server that has imported everything already: that saves seconds.
Hooks are failures to order: they run in that process before train.main().
"""

import functools
import multiprocessing
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

import curriculum  # noqa: E402
import rdtf  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1)])                # its first use imports seconds' worth of torch: here, once
rdtf.PRESETS["micro"] = dict(size=32, latent_channels=4, widths=(32,), head_dim=8, context_dim=16,
                             prediction="v", residual=True, text_layers=1, text_bytes=16,
                             vae_widths=(32, 32), text_scale=2.0)
# as above: with one channel per group a bias before a GroupNorm has rounding for a gradient; Adam scales it
rdtf.PRESETS["micro64"] = dict(rdtf.PRESETS["micro"], widths=(64,))
train.RECIPES["micro"] = dict(steps=6, batch_size=2, lr=1e-3, ema=0.9, warmup=2, schedule="cosine",
                              vae_steps=4, vae_batch_size=2)
train.RECIPES["micro64"] = train.RECIPES["micro"]
train.sample_sheet = functools.partial(train.sample_sheet, steps=1)
train.validation_batch = functools.partial(train.validation_batch, count=6)


def main(argv, output=None, env=None, hook=None, *hook_args):
    if output:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
    os.environ.update(env or {})
    curriculum.WARMUP = 2                   # in this process only: the level moves within a few updates
    if hook:
        globals()[hook](*hook_args)
    sys.argv = ["train.py", "--preset", "micro", "--device", "cpu", "--precision", "fp32", *argv]
    train.main()


server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["run_micro"])


def start(*rest):
    process = server.Process(target=main, args=rest)
    process.start()
    return process


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


def signal_at(number, step):
    """The process sends itself a signal when it draws its batch of an update."""
    batch = train.MainStage.batch

    def signalling(self, raw, now):
        if now == step:
            os.kill(os.getpid(), number)
        return batch(self, raw, now)

    train.MainStage.batch = signalling


if __name__ == "__main__":
    main(sys.argv[1:])
