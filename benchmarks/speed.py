"""Speed and memory of DFGN beside diffusers' I2VGenXLUNet (the release's parent) and UNet3DConditionModel.

    python benchmarks/speed.py                         # training step and forward, bf16 autocast and fp32
    python benchmarks/speed.py --sampling              # 50 DDIM steps with two-scale guidance, one sticker
    python benchmarks/speed.py --compile               # the same, our network compiled
    python benchmarks/speed.py --preset paper --count  # what can be counted without a GPU (gpu.py: on one)

One process, all models on the same inputs, one run of each in turn (a busy machine slows all of them alike);
the ratio is the median over rounds of peer / ours. Peers need `pip install diffusers`; without it only ours
is measured.

Matched: widths, layers per level, levels with attention, head width, text width and tokens, frames, latents,
batch, dtype, random weights, default attention processors (SDPA). Not matched, the peers are what they are:
I2VGenXLUNet has (3,1,1) temporal convolutions where DFGN has STI, and adds 68 image tokens to the text tokens
and an fps embedding; UNet3DConditionModel has temporal convolutions too, no condition frames and no condition
encoder. Neither knows padding.
"""

import argparse
import os
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import rdtf  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# The models, all called as eps(x, t, cond, context) with clips (b, t, c, h, w)


def build_ours(cfg, device):
    net = rdtf.DFGN(cfg).to(device)
    fill(net)
    return net, net


def diffusers_words(cfg):
    return dict(in_channels=cfg.latent_channels, out_channels=cfg.latent_channels,
                block_out_channels=cfg.widths, layers_per_block=cfg.layers,
                cross_attention_dim=cfg.context_dim, attention_head_dim=cfg.head_dim)


def build_i2vgenxl(cfg, device):
    from diffusers import I2VGenXLUNet
    net = I2VGenXLUNet(**diffusers_words(cfg)).to(device)
    fill(net)

    def call(x, t, cond, context):
        fps, image = torch.full_like(t, 8), context[:, 0]           # the image embedding has the text's width
        y = net(x.transpose(1, 2), t, fps, cond.transpose(1, 2), image, context, return_dict=False)[0]
        return y.transpose(1, 2)

    return net, call


def build_unet3d(cfg, device):
    from diffusers import UNet3DConditionModel
    net = UNet3DConditionModel(**diffusers_words(cfg)).to(device)
    fill(net)

    def call(x, t, cond, context):
        return net(x.transpose(1, 2), t, context, return_dict=False)[0].transpose(1, 2)

    return net, call


BUILDERS = {"ours": build_ours, "I2VGenXLUNet": build_i2vgenxl, "UNet3DConditionModel": build_unet3d}


def fill(net):
    """Zero-initialised weights get values, or whole branches would be multiplications by zero."""
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)


def autocast(device, dtype):
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")


# ------------------------------------------------------------------------------------------------------------
# Measuring


class Clock:
    """Seconds of wall time, or of CPU time (all threads): on a busy machine only the latter is stable."""

    def __init__(self, device, kind):
        self.device, self.now = device, time.process_time if kind == "cpu" else time.perf_counter

    def __call__(self, work):
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = self.now()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.now() - start


def alternate(clock, works, repeats, warmup=1):
    """{name: function} -> {name: list of seconds}; one run of each in turn."""
    for _ in range(warmup):
        for work in works.values():
            work()
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work))
    return times


def matmul_peak(clock, device, dtype, repeats=8):
    """FLOP/s of the best of some square matrix products: what this machine gives at this moment."""
    n = 8192 if device == "cuda" else 2048
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = torch.randn(n, n, device=device).to(kind), torch.randn(n, n, device=device).to(kind)
    for _ in range(2):
        a @ b
    return 2 * n ** 3 / min(clock(lambda: a @ b) for _ in range(repeats))


def count_flops(work):
    """Matmul and convolution FLOPs; attention is counted as the matmuls it is, whatever kernel would run."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def report(title, times, flops, peak):
    """flops: {name: FLOPs of one run} or None."""
    print(f"\n{title}")
    print(f"{'':22s} {'median s':>9s} {'min s':>9s} {'peer/ours':>10s} {'GFLOP':>9s} {'of peak':>8s}")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["ours"]))
        middle = statistics.median(seconds)
        tail = f"{flops[name] / 1e9:9.1f} {flops[name] / middle / peak:8.1%}" if flops else ""
        print(f"{name:22s} {middle:9.3f} {min(seconds):9.3f} {ratio:9.2f}x {tail}", flush=True)


# ------------------------------------------------------------------------------------------------------------
# What is measured


def compare(models, data, args, clock):
    """One training step (forward + backward, no optimizer) and one forward in inference mode."""
    def train(net, call, dtype):
        net.zero_grad(set_to_none=True)
        with autocast(args.device, dtype):
            y = call(*data)
        y.float().square().mean().backward()

    def infer(net, call, dtype):
        with torch.inference_mode(), autocast(args.device, dtype):
            call(*data)

    steps = {"training step": train, "forward": infer}
    flops = {title: {name: count_flops(lambda: step(*m, args.dtype[0])) for name, m in models.items()}
             for title, step in steps.items()}                              # this warms up, too
    if args.compile:
        models["ours"][0].compile()
    for i, dtype in enumerate(args.dtype):
        peak = matmul_peak(clock, args.device, dtype)
        print(f"\n{dtype}: matmul peak {peak / 1e9:.0f} GFLOP/s", flush=True)
        for title, step in steps.items():
            works = {name: lambda m=m, step=step: step(*m, dtype) for name, m in models.items()}
            times = alternate(clock, works, args.repeats, warmup=1 if i or args.compile else 0)
            report(f"{title}, {dtype}", times, flops[title], peak)


def compare_sampling(models, data, args, clock):
    """DDIM with eta 1 and two-scale guidance for one sticker, from noise to latents.

    Peers do what the release does: three calls a step, each with its condition. Ours computes the condition
    (encoder, text keys and values) once; at the paper's equal scales the middle call has weight zero and is
    left out (exact).
    """
    x, _, cond, context = data
    negative, mask = torch.zeros_like(context), torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[:, 0] = True
    cond = torch.where(mask[:, :, None, None, None], cond, 0)
    model, real = rdtf.RDTF(models["ours"][0].cfg).to(x.device), torch.ones_like(mask)
    abar = rdtf.alphas_cumprod()
    model.net, model.text = models["ours"][0], torch.nn.Identity()          # texts come as tokens
    branches = ((negative, torch.zeros_like(cond)), (negative, cond), (context, cond))

    def sample(denoise):
        return rdtf.sample(denoise, x, args.steps, noise=lambda: torch.randn_like(x))

    def ours(text_scale, image_scale):
        sample(rdtf.denoiser(model, context, negative, cond, mask, real, text_scale, image_scale, x)[0])

    def peer(call, text_scale, image_scale):
        def denoise(x, t):
            none, image, both = (call(x, t, c, text).float() for text, c in branches)
            noise = none + image_scale * (image - none) + text_scale * (both - image)
            return rdtf.to_y0(noise, x, abar[t[0]], "eps")
        sample(denoise)

    for dtype in args.dtype:
        for scales in ((7.5, 7.5), (7.5, 2.0)):
            def run(work, *rest):
                with torch.inference_mode(), autocast(args.device, dtype):
                    work(*rest, *scales)
            works = {name: (lambda: run(ours)) if name == "ours" else (lambda call=m[1]: run(peer, call))
                     for name, m in models.items()}
            times = alternate(clock, works, args.repeats, warmup=int(args.compile or args.device != "cpu"))
            title = f"{args.steps} DDIM steps, text scale {scales[0]}, image scale {scales[1]}, {dtype}"
            report(title, times, None, 1)


def saved_bytes(net, work):
    """Bytes that autograd keeps from the forward to the backward pass, the parameters not counted."""
    own, kept = {p.untyped_storage()._cdata for p in net.parameters()}, {}

    def pack(x):
        if x.untyped_storage()._cdata not in own:
            kept[x.untyped_storage()._cdata] = x.untyped_storage()  # holding it: the id is not used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = work()
    total = sum(s.nbytes() for s in kept.values())
    del out
    return total


def count(cfg, args):
    """What needs no GPU: all on the meta device, in bf16. Autocast on a GPU keeps fp32 norms on top."""
    with torch.device("meta"):
        net = rdtf.DFGN(cfg).bfloat16()
        data = inputs(cfg, args.batch, args.latent, args.text_tokens, "meta", torch.bfloat16)
    n = parameters(net)
    print(f"parameters {n / 1e6:.1f} M; weights, gradients and AdamW in fp32 {16 * n / 2 ** 30:.1f} GiB")
    forward = count_flops(lambda: net(*data))
    print(f"batch {args.batch}: forward {forward / 1e9:.0f} GFLOP, backward about {2 * forward / 1e9:.0f}")
    for net.checkpointing in (False, True):
        gib = saved_bytes(net, lambda: net(*data)) / 2 ** 30
        print(f"kept for the backward pass, checkpointing {net.checkpointing}: {gib:.2f} GiB")


def inputs(cfg, b, latent, tokens, device, dtype=torch.float32):
    clip = (b, cfg.frames, cfg.latent_channels, latent, latent)
    x, cond = (torch.randn(clip, device=device, dtype=dtype) for _ in range(2))
    context = torch.randn(b, tokens, cfg.context_dim, device=device, dtype=dtype)
    return x, torch.full((b,), 500, device=device), cond, context


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--preset", default="", choices=["", "paper"],
                   help="paper: the 0.96 B network; default: the small one")
    p.add_argument("--widths", type=int, nargs="+", default=[64, 128, 192, 256], help="channels per level")
    p.add_argument("--head-dim", type=int, default=64, help="channels per attention head")
    p.add_argument("--context-dim", type=int, default=256, help="width of the text tokens")
    p.add_argument("--text-tokens", type=int, default=77, help="text tokens a clip")
    p.add_argument("--latent", type=int, default=32, help="latent rows and columns")
    p.add_argument("--batch", type=int, default=1, help="clips")
    p.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"],
                   help="bf16 is autocast")
    p.add_argument("--peers", nargs="*", default=list(BUILDERS)[1:], choices=list(BUILDERS)[1:],
                   help="networks of diffusers; none after the flag: only ours")
    p.add_argument("--repeats", type=int, default=3, help="rounds; the median is printed")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    p.add_argument("--clock", default="wall", choices=["wall", "cpu"],
                   help="cpu: CPU seconds, for busy machines")
    p.add_argument("--sampling", action="store_true", help="measure whole sampling runs, not single steps")
    p.add_argument("--steps", type=int, default=50, help="sampling steps")
    p.add_argument("--compile", action="store_true", help="torch.compile our network (minutes at the start)")
    p.add_argument("--count", action="store_true", help="count parameters, FLOPs and bytes, then stop")
    args = p.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: no GPU here; --count tells what can be counted without one")
    if args.peers and len(args.widths) != 4:
        sys.exit("--widths: the peers have four levels; give four widths, or --peers without a name")
    if args.threads:
        torch.set_num_threads(args.threads)
    cfg = rdtf.Config(**rdtf.PRESETS["paper"]) if args.preset else rdtf.Config(
        widths=args.widths, layers=2, head_dim=args.head_dim, context_dim=args.context_dim, latent_channels=4)
    clock = Clock(args.device, args.clock)
    if args.count:
        return count(cfg, args)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {args.device}, {threads} threads, {args.clock} seconds\n"
          f"widths {cfg.widths}, head {cfg.head_dim}, text {args.text_tokens}x{cfg.context_dim}, "
          f"{args.batch}x{cfg.frames} frames of {args.latent}x{args.latent} latents")
    models = {}
    for name in ["ours", *args.peers]:
        try:
            models[name] = BUILDERS[name](cfg, args.device)
        except ImportError:
            print(f"{name}: left out, it needs the optional package: pip install diffusers", file=sys.stderr)
            continue
        print(f"{name:22s} {parameters(models[name][0]) / 1e6:.2f} M parameters")
    if args.compile and args.sampling:
        models["ours"][0].compile()
    data = inputs(cfg, args.batch, args.latent, args.text_tokens, args.device)
    (compare_sampling if args.sampling else compare)(models, data, args, clock)


if __name__ == "__main__":
    main()
