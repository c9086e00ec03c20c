"""What the training loop costs beside the network: share of an update for batches and log, time of a save.

    python benchmarks/loop.py                                     # preset tiny, synthetic stickers
    python benchmarks/loop.py --updates 100 --preset base --data cache/fluent128
    python benchmarks/loop.py --rate 3000 --batch-size 128        # what the host adds beside a GPU so fast

--rate: in place of the network a clock stands for a GPU that trains so many clips a second. As a GPU does, it
draws the noise and works while the next batches are made, and the loop waits for it where it reads the loss.
An untrained autoencoder makes the latents, time does not depend on weights. Wall-clock: use an idle machine.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402

SPENT, CLIPS = {}, [0]


def timed(owner, name, label):
    """Add up the seconds of a function under a label."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            SPENT.setdefault(label, []).append(time.perf_counter() - began)
    setattr(owner, name, wrapper)


def fake_gpu(rate):
    """The network costs nothing; an update has its loss when a GPU of so many clips a second would."""
    record, ready = train.Curriculum.record, [0.0]

    def update(*args):
        ready[0] = time.perf_counter() + CLIPS[0] / rate
        return torch.zeros(())

    def read(self, loss):                                                   # right after the loss is read
        time.sleep(max(0.0, ready[0] - time.perf_counter()))
        record(self, loss)

    def forward(self, x0, **rest):
        CLIPS[0] = len(x0)
        return torch.ones(len(x0), requires_grad=True)

    train.RDTF.forward, train.update_weights, train.Curriculum.record = forward, update, read
    train.validate, train.plot_log = lambda *args: {}, lambda *args: None
    train.draw_noise = lambda rngs, shape, device: torch.empty(1).expand(len(rngs), *shape)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--preset", default="tiny", help="as in train.py")
    p.add_argument("--data", nargs="+", default=["synthetic:32"], help="as in train.py, pixels")
    p.add_argument("--updates", type=int, default=30, help="updates to time, the first two excluded")
    p.add_argument("--batch-size", type=int, default=0, help="clips per process, 0 = the preset's")
    p.add_argument("--precision", default="auto", help="as in train.py")
    p.add_argument("--rate", type=float, default=0, help="clips a second of a GPU that a clock stands for")
    own = p.parse_args()
    cfg = train.Config(**train.PRESETS[own.preset])
    train.sample_sheet = lambda *args, **kwargs: None
    timed(train, "write_line", "log")
    timed(train.Curriculum, "record", "curriculum")
    timed(train, "save_checkpoint", "save")
    if own.rate:
        fake_gpu(own.rate)
    with tempfile.TemporaryDirectory() as folder:
        vae = train.AutoencoderKL(cfg)
        torch.save({"vae": vae.state_dict(), "config": asdict(cfg)}, Path(folder, "vae.pt"))
        flags = ["--preset", own.preset, "--data", *own.data, "--out", folder, "--vae", folder + "/vae.pt",
                 "--steps", own.updates, "--precision", own.precision, "--log-every", 1, "--eval-every", 0,
                 "--save-every", 0]
        flags += ["--batch-size", own.batch_size] if own.batch_size else []
        train.run(train.parser().parse_args([str(x) for x in flags]))
        lines = train.read_log(Path(folder, "log.jsonl")).items()
        lines = [x["time"] for (stage, _), x in lines if stage == "main"][2:]
    seconds = np.array([x["seconds"] for x in lines])
    waited = np.array([x["data"] for x in lines]) * seconds
    log = np.array(SPENT["log"][2:own.updates]) + np.array(SPENT["curriculum"][2:])
    whole = seconds.sum() / 100
    if own.rate:
        ideal = (own.batch_size or train.RECIPES[own.preset]["batch_size"]) / own.rate
        print(f"the host adds {np.median(seconds) / ideal - 1:.1%} to an update of {1e3 * ideal:.1f} ms")
    print(f"update {np.median(seconds) * 1e3:.1f} ms (median of {len(lines)})\n"
          f"batches (clips, masks, noise) {np.median(waited) * 1e3:.2f} ms = {waited.sum() / whole:.2f} %\n"
          f"log and curriculum, a line per update {np.median(log) * 1e3:.2f} ms = {log.sum() / whole:.2f} %\n"
          f"a checkpoint {np.median(SPENT['save']) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
