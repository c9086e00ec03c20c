"""All that a GPU has to prove, in one command of under 9 minutes -> a markdown table.

    python benchmarks/gpu.py                                 # the table; rows without time left say so
    python benchmarks/gpu.py --only paper graphs             # jobs whose name has one of these words
    python benchmarks/gpu.py --device cpu --miniature        # the same code with tiny networks (the tests)

smoke: train, resume, sample. paper: peak memory of whole updates, Table 8's forward, share of the bf16 peak.
tiny, base: clips a second of whole updates with batches that are on the GPU already. What the host adds is
measured by loop.py. Every job is a process of its own: neither a crash nor a long compilation ends the rest.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import rdtf  # noqa: E402
import sample  # noqa: E402
import speed  # noqa: E402
import train  # noqa: E402
from stickers import vae  # noqa: E402

MODES = {"eager": None, "compiled": {}, "graphs": {"mode": "reduce-overhead"}}      # graphs: CUDA graphs
EAGER_SIZES = {"tiny": (16, 64, 256), "base": (4, 16)}                      # clips a batch
COMPILED_SIZES = {"tiny": (256,), "base": (16,)}                            # each size is compiled anew
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}                    # bf16, dense, of the data sheet
SMALL = dict(size=32, widths=(32,), layers=1, head_dim=8, context_dim=16, vae_widths=(32, 32))


def miniature():
    """Tiny networks under the names of the real ones, and a compiler that does nothing."""
    for name in ("tiny", "base"):
        rdtf.PRESETS[name] = rdtf.PRESETS[name] | SMALL | dict(text_layers=1, text_bytes=16, steps=1)
        EAGER_SIZES[name], COMPILED_SIZES[name] = (1, 2), (2,)
    rdtf.PRESETS["paper"] = rdtf.PRESETS["paper"] | SMALL | dict(size=64, vae_widths=(32,) * 4)
    MODES.update(compiled={"backend": "eager"}, graphs={"backend": "eager"})


def settle(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work, device, repeats):
    """Median of `repeats` runs after three that warm up (and compile)."""
    times = []
    for _ in range(3 + repeats):
        torch.compiler.cudagraph_mark_step_begin()
        settle(device)
        began = time.perf_counter()
        work()
        settle(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def updates(model, preset, loss, device):
    """-> a function that does one whole update, as train.py does it."""
    recipe, params = train.RECIPES[preset], dict(model.named_parameters())
    optimizers = train.make_optimizers(model, recipe["optimizer"], recipe["weight_decay"])
    ema = {n: p.detach().clone() for n, p in params.items()}

    def update():
        with torch.autocast(device, torch.bfloat16):
            value = loss()
        value.backward()
        train.update_weights(optimizers, 1e-5, params, ema, recipe["ema"], 0, 1.0)
    return update


def paper_net(device):
    """-> (Config, DFGN): 0.96 B weights, drawn where they are used."""
    cfg = rdtf.Config(**rdtf.PRESETS["paper"])
    with torch.device(device):
        return cfg, rdtf.DFGN(cfg).to(device)


def paper_inputs(cfg, b, device):
    """x, t, clean latents of the given frames, 2 x 77 text tokens."""
    x, given = (torch.randn(b, *cfg.latent_shape, device=device) for _ in range(2))
    return x, torch.full((b,), 500, device=device), given, torch.randn(b, 154, cfg.context_dim, device=device)


# ------------------------------------------------------------------------------------------------------------
# Jobs: job(args) -> rows (what, measured, aim), one after the other, as they are measured


def smoke(args):
    """vae.py and train.py for two updates, resumed for a third, and sample.py, in bf16."""
    with tempfile.TemporaryDirectory() as out:
        flags = ["--data", "synthetic:16", "--batch-size", 2, "--out", out, "--device", args.device,
                 "--precision", "bf16", "--log-every", 1]
        vae.run(vae.parser().parse_args([str(x) for x in (*flags, "--steps", 2)]))
        flags += ["--vae", f"{out}/vae.pt"]
        for steps in (2, 3):
            train.run(train.parser().parse_args([str(x) for x in (*flags, "--steps", steps)]))
        sample.main(["--ckpt", f"{out}/last.pt", "--text", "a red heart", "--out", f"{out}/x.webp",
                     "--device", args.device])
        lines = [x["loss"] for (stage, _), x in train.read_log(f"{out}/log.jsonl").items() if stage == "main"]
        assert len(lines) == 3 and all(lines) and Path(out, "x.webp").exists()
    yield "smoke test: train, resume, sample", "passed", "passes"


def memory(args, checkpointing):
    cfg, net = paper_net(args.device)
    net.checkpointing, data = checkpointing, paper_inputs(cfg, 1, args.device)
    update = updates(net, "paper", lambda: net(*data).square().mean(), args.device)
    for _ in range(3):
        update()
    gib = torch.cuda.max_memory_allocated() / 2 ** 30 if args.device == "cuda" else float("nan")
    yield (f"paper, batch 1, AdamW, EMA, bf16{', --checkpointing' * checkpointing}: peak memory",
           f"{gib:.1f} GiB", f"{24 if checkpointing else 40} GiB")


def paper(args, mode):
    """Forward + backward of 8 clips, or of as many as fit, and Table 8's forward."""
    cfg, net = paper_net(args.device)
    speed.fill(net)                                                         # or most products have zeros
    one = paper_inputs(cfg, 1, args.device)

    def step(data):
        net.zero_grad(set_to_none=True)
        with torch.autocast(args.device, torch.bfloat16):
            y = net(*data)
        y.square().mean().backward()

    def forward(bf16):
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=bf16):
            net(*one)

    flops = speed.count_flops(lambda: step(one))                            # before it is compiled
    if MODES[mode] is not None:
        net.compile(**MODES[mode])
    peak = speed.matmul_peak(speed.Clock(args.device, "wall"), args.device, "bf16")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    for b in (1,) if args.miniature else (8, 4, 2):
        try:
            took = seconds(partial(step, paper_inputs(cfg, b, args.device)), args.device, args.repeats)
        except torch.OutOfMemoryError:
            continue
        rate = b * flops / took
        sheet = next((f", {rate / p:.1%} of the data sheet's" for n, p in PEAKS.items() if n in name), "")
        yield (f"paper, batch {b}, forward + backward, {mode}",
               f"{1e3 * took:.1f} ms, {rate / 1e12:.2f} TFLOP/s, {rate / peak:.1%} of the bf16 peak of a "
               f"matrix product ({peak / 1e12:.2f}){sheet}", "45 %")
        break
    else:
        yield f"paper, forward + backward, {mode}", "out of memory", "45 %"
    for bf16 in (True, False):
        took = seconds(partial(forward, bf16), args.device, args.repeats)
        kind = "bf16" if bf16 else "fp32 (on a GPU convolutions in TF32)"
        yield f"paper, Table 8's forward, {kind}, {mode}", f"{1e3 * took:.1f} ms", "390 ms on a V100"


def small(args, preset, mode):
    """Clips a second of whole updates, for some sizes of the batch."""
    cfg = rdtf.Config(**rdtf.PRESETS[preset])
    for b in (EAGER_SIZES if mode == "eager" else COMPILED_SIZES)[preset]:
        torch.manual_seed(0)
        model = rdtf.RDTF(cfg).to(args.device).train()
        if MODES[mode] is not None:
            model.compile(**MODES[mode])
        x0, noise = torch.randn(2, b, *cfg.latent_shape, device=args.device)
        mask = torch.ones(b, cfg.frames, dtype=torch.bool, device=args.device)
        cond = F.pad(mask[:, :1], (0, cfg.frames - 1))
        text = model.text.tokenize(["green face with a crown, sleeping"] * b).to(args.device)
        t = torch.arange(b, device=args.device) * 999 // b
        update = updates(model, preset, lambda: model(x0, noise, t, text, cond, mask).mean(), args.device)
        try:
            rate = f"{b / seconds(update, args.device, args.repeats):.1f} clips/s"
        except torch.OutOfMemoryError:
            rate = "out of memory"
        yield f"{preset}, batch {b}, {mode}", rate, ""
        del model, update


JOBS = {"smoke": smoke, "paper-memory": partial(memory, checkpointing=False),
        "paper-memory-checkpointing": partial(memory, checkpointing=True),
        "paper-eager": partial(paper, mode="eager"),
        **{f"{p}-{m}": partial(small, preset=p, mode=m) for m in MODES for p in EAGER_SIZES},
        "paper-compiled": partial(paper, mode="compiled")}

# ------------------------------------------------------------------------------------------------------------


def apart(name, args, left):
    """A job in a process of its own, of at most `left` seconds -> its rows; what went wrong is one, too."""
    command = [sys.executable, __file__, "--job", name, "--device", args.device, "--repeats",
               str(args.repeats)]
    if left < 20:
        return [(name, "no time left: run it with --only", "")]
    try:
        done = subprocess.run(command, capture_output=True, timeout=left)
        said, why = done.stdout, (done.stderr.decode().strip() or "no message").splitlines()[-1][:150]
        wrong = [(name, f"failed: {why}", "")] if done.returncode else []
    except subprocess.TimeoutExpired as e:
        said, wrong = e.stdout or b"", [(name, f"not done after {left:.0f} s", "")]
    return [tuple(json.loads(x)) for x in said.decode().splitlines() if x.startswith('["')] + wrong


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="where")
    p.add_argument("--minutes", type=float, default=8.5, help="all jobs together")
    p.add_argument("--repeats", type=int, default=10, help="runs of which the median is taken")
    p.add_argument("--only", nargs="+", default=[""], metavar="WORD",
                   help=f"jobs whose name has one of these words: {', '.join(JOBS)}")
    p.add_argument("--miniature", action="store_true", help="tiny networks, one process: tests the code")
    p.add_argument("--job", default="", choices=["", *JOBS], help="one job in this process: its rows as JSON")
    args = p.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: no GPU here; --device cpu --miniature proves the code")
    if args.miniature:
        miniature()
    if args.job:
        for row in JOBS[args.job](args):
            print("\n" + json.dumps(row), flush=True)
        return
    end, rows = time.monotonic() + 60 * args.minutes, []
    for name in (n for n in JOBS if any(word in n for word in args.only)):
        began = time.monotonic()
        rows += JOBS[name](args) if args.miniature else apart(name, args, end - time.monotonic())
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"\n{where}, torch {torch.__version__}\n\n| what | measured | aim |\n|---|---|---|")
    print("\n".join(f"| {what} | {measured} | {aim} |" for what, measured, aim in rows))


if __name__ == "__main__":
    main()
