"""DFGN is the release's network, padding never leaks, and what is cached or recomputed changes nothing."""

import dataclasses
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rdtf import (DFGN, PRESETS, RDTF, STI, Config, ResBlock, TemporalConv, guess_frames,
                  timestep_embedding)
from release import build, to_ours

GOLDEN = Path(__file__).with_name("golden_dfgn.npz")
SMALL = dict(latent_channels=4, widths=(32, 64), head_dim=16, context_dim=24, layers=1)
OURS = dict(size=32, narrow=True, inputs=True, pooled_text=True, film=True, draft=True, bypass=True)
VARIANTS = {"paper": {}, "conv3d": dict(temporal="conv3d"), "ours": OURS}


# ------------------------------------------------------------------------------------------------------------
# The release's names and shapes, written down independently of our modules


def release_shapes(config):
    """config in the release's words -> {name: shape} of its state dict."""
    ws, d, hd = config["block_out_channels"], config["cross_attention_dim"], config["attention_head_dim"]
    layers, c = config.get("layers_per_block", 2), config.get("in_channels", 4)
    frames = config.get("num_frames", 8)
    time, shapes = 4 * ws[0], {}

    def add(name, *shape, bias=True):
        shapes[name + ".weight"] = list(shape)
        if bias:
            shapes[name + ".bias"] = [shape[0]]

    def attention(name, q, kv, inner):
        add(name + ".to_q", inner, q, bias=False)
        add(name + ".to_k", inner, kv, bias=False)
        add(name + ".to_v", inner, kv, bias=False)
        add(name + ".to_out.0", q, inner)

    def transformer(name, w, heads, text):
        inner = heads * hd
        add(name + ".norm", w)
        add(name + ".proj_in", inner, w)
        add(name + ".proj_out", w, inner)
        block = name + ".transformer_blocks.0"
        for i in (1, 2, 3):
            add(f"{block}.norm{i}", inner)
        attention(block + ".attn1", inner, inner, inner)
        attention(block + ".attn2", inner, text or inner, inner)
        add(block + ".ff.net.0.proj", 8 * inner, inner)
        add(block + ".ff.net.2", inner, 4 * inner)

    def resnet(name, a, b):
        add(name + ".norm1", a)
        add(name + ".conv1", b, a, 3, 3)
        add(name + ".time_emb_proj", b, time)
        add(name + ".norm2", b)
        add(name + ".conv2", b, b, 3, 3)
        if a != b:
            add(name + ".conv_shortcut", b, a, 1, 1)

    def sti(name, w):
        shapes[name + ".w1"] = shapes[name + ".w2"] = [1]
        attention(name + ".transformer_blocks", w, w, 256)
        for i in (0, 1):
            for j in (1, 2):
                add(f"{name}.conv_layers.{i}.norm{j}", frames)
                add(f"{name}.conv_layers.{i}.conv{j}", frames, frames, 3, 3)
        add(name + ".norm", w)

    def layer(stage, i, a, b, attends):
        resnet(f"{stage}.resnets.{i}", a, b)
        sti(f"{stage}.temp_convs.{i}", b)
        if attends:
            transformer(f"{stage}.attentions.{i}", b, b // hd, d)
            transformer(f"{stage}.temp_attentions.{i}", b, b // hd, 0)

    add("conv_in", ws[0], 2 * c, 3, 3)
    transformer("transformer_in", ws[0], 8, 0)
    for i, (a, b) in enumerate(((c, 4 * c), (4 * c, 4 * c), (4 * c, c))):
        add(f"image_latents_proj_in.{2 * i}", b, a, 3, 3)
    encoder = "image_latents_temporal_encoder"
    add(encoder + ".norm1", c)
    attention(encoder + ".attn1", c, c, 8)
    add(encoder + ".ff.net.0.proj", 4 * c, c)
    add(encoder + ".ff.net.2", c, 4 * c)
    add("time_embedding.linear_1", time, ws[0])
    add("time_embedding.linear_2", time, time)
    skips, width = [ws[0]], ws[0]
    for i, w in enumerate(ws):
        for j in range(layers):
            layer(f"down_blocks.{i}", j, width, w, i < len(ws) - 1)
            skips.append(w)
            width = w
        if i < len(ws) - 1:
            add(f"down_blocks.{i}.downsamplers.0.conv", w, w, 3, 3)
            skips.append(w)
    layer("mid_block", 0, width, width, True)
    layer("mid_block", 1, width, width, False)
    for i, w in enumerate(reversed(ws)):
        for j in range(layers + 1):
            layer(f"up_blocks.{i}", j, width + skips.pop(), w, i > 0)
            width = w
        if i < len(ws) - 1:
            add(f"up_blocks.{i}.upsamplers.0.conv", w, w, 3, 3)
    add("conv_norm_out", ws[0])
    add("conv_out", c, ws[0], 3, 3)
    return shapes


def release_weights(config):
    """The conformance weights: a fixed function of each release name and shape."""
    weights = {}
    for name, shape in release_shapes(config).items():
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) >= 2:
            z = z / math.sqrt(np.prod(shape[1:]))
        else:
            z = 1 + 0.1 * z if name.endswith((".weight", ".w1", ".w2")) else 0.1 * z
        weights[name] = torch.from_numpy(z.astype(np.float32))
    return weights


# ------------------------------------------------------------------------------------------------------------
# Helpers


def random_net(seed=0, **changes):
    """A small DFGN without zeros, so that every path carries signal and gradient."""
    torch.manual_seed(seed)
    net = DFGN(Config(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            elif name.endswith("weight") or name[-2:] in ("w1", "w2"):
                p.normal_(1, 0.1)
            else:
                p.normal_(0, 0.1)
    return net


def inputs(b=1, h=8, w=8, frames=8, c=4, tokens=5, d=24, seed=1):
    g = torch.Generator().manual_seed(seed)
    clip = lambda: torch.randn(b, frames, c, h, w, generator=g)  # noqa: E731
    return clip(), torch.randint(0, 1000, (b,), generator=g), clip(), torch.randn(b, tokens, d, generator=g)


def close(a, b, tolerance):
    """Largest deviation in units of b's standard deviation."""
    assert a.shape == b.shape
    assert float((a - b).abs().max() / b.std()) < tolerance


def gradients(net, loss):
    net.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}


# ------------------------------------------------------------------------------------------------------------
# Fidelity


def test_golden_vector():
    """Output and intermediate maps of the release, fp32, every frame real (the taps are every 13th value)."""
    z = np.load(GOLDEN)
    config = json.loads(str(z["config"]))
    net = build(config)
    net.load_state_dict(to_ours(release_weights(config), config))
    first, taps = net.down[0]["layers"][0], {}
    modules = {"image_latents_temporal_encoder": net.condition_encoder, "conv_in": net.conv_in,
               "transformer_in": net.transformer_in, "down_blocks.0.resnets.0": first.res,
               "down_blocks.0.temp_convs.0": first.mix, "down_blocks.0.attentions.0": first.spatial,
               "down_blocks.0.temp_attentions.0": first.temporal, "mid_block": net.mid[1]}
    for name, module in modules.items():
        module.register_forward_hook(lambda m, i, o, name=name: taps.setdefault(name, o))
    with torch.no_grad():
        out = net(*(torch.from_numpy(z[k]) for k in ("x", "t", "cond", "context")))
    close(out, torch.from_numpy(z["out"]), 1e-4)
    names = [k[4:] for k in z.files if k.startswith("tap:")]
    assert sorted(names) == sorted(modules)
    for name in names:
        tap = taps[name]
        if name == "image_latents_temporal_encoder":  # the release keeps it as (b h w) t c
            tap = tap.permute(2, 3, 0, 1)
        want, std = torch.from_numpy(z["tap:" + name]), float(z["std:" + name])
        assert float((tap.reshape(-1)[::13] - want).abs().max()) < 1e-4 * std, name


@pytest.mark.parametrize("widths, layers, head, text, h, w, b", [
    ((32, 64), 1, 8, 16, 8, 12, 2), ((32, 32), 2, 32, 40, 4, 4, 1), ((64, 32, 96), 3, 32, 8, 8, 16, 1)])
def test_other_configs(widths, layers, head, text, h, w, b):
    """Release-named weights of any width, depth, head and text width load strictly; any latent size runs."""
    config = dict(block_out_channels=list(widths), layers_per_block=layers, attention_head_dim=head,
                  cross_attention_dim=text)
    weights, net = release_weights(config), build(config)
    net.load_state_dict(to_ours(weights, config), strict=True)
    assert sum(p.numel() for p in net.parameters()) == sum(v.numel() for v in weights.values())
    with torch.no_grad():
        x, t, cond, context = inputs(b, h, w, d=text)
        out = net(x, t, cond, context)
        assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all()
        assert 0.01 < out.std() < 100
        for i in range(b):  # clips of a batch know nothing of each other
            close(net(x[i:i + 1], t[i:i + 1], cond[i:i + 1], context[i:i + 1]), out[i:i + 1], 1e-4)


def test_paper_preset_has_096_billion_parameters():
    """Table 8: 0.96 B; the release's default network with the T5 projection is 0.9601 B."""
    with torch.device("meta"):
        model = RDTF(Config(**PRESETS["paper"]))
    mixers = [layer.mix for layer in model.net.layers()]
    assert len(mixers) == 22 and all(isinstance(m, STI) for m in mixers)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 4) == 0.9601


def test_sti_equals_a_slow_reference():
    """The layer, written with loops over clips, frames, tokens and channels in float64."""
    torch.manual_seed(0)
    b, t, c, h, w = 2, 8, 64, 4, 6
    m = STI(c, t).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(b * t, c, h, w, dtype=torch.float64)
    with torch.no_grad():
        got = m(x).unflatten(0, (b, t))

        def norm(z, groups, module):  # z: channels h w
            out = torch.stack([(g - g.mean()) / (g.var(correction=0) + 1e-6).sqrt() for g in z.chunk(groups)])
            return out.view_as(z) * module.weight[:, None, None] + module.bias[:, None, None]

        for clip, want in zip(x.unflatten(0, (b, t)), got):
            pooled = torch.stack([clip[f, :, i:i + 2, j:j + 2].mean((1, 2))
                                  for f in range(t) for i in range(0, h, 2) for j in range(0, w, 2)])  # n c
            q, k, v = (pooled @ part.T for part in m.semantic.attn.q.weight.chunk(3))  # n 256
            heads = []
            for a in range(8):
                s = slice(32 * a, 32 * a + 32)
                rows = [((q[i, s] * k[:, s]).sum(1) / 32 ** 0.5).softmax(0) @ v[:, s] for i in range(len(q))]
                heads.append(torch.stack(rows))
            attended = torch.cat(heads, 1) @ m.semantic.attn.out.weight.T + m.semantic.attn.out.bias
            semantic, detail, i = clip.clone(), clip.clone(), 0
            for f in range(t):
                for y in range(0, h, 2):
                    for z in range(0, w, 2):
                        semantic[f, :, y:y + 2, z:z + 2] += attended[i][:, None, None]
                        i += 1
            for channel in range(c):
                d = clip[:, channel]  # t h w: the frames are the channels
                for j in (0, 2):
                    r = d
                    for k in (j, j + 1):
                        conv = m.detail.convs[k]
                        r = F.silu(norm(r, 1, m.detail.norms[k]))
                        r = F.conv2d(r[None], conv.weight, conv.bias, padding=1)[0]
                    d = d + r
                detail[:, channel] = d
            for f in range(t):
                fused = norm(m.w1 * semantic[f] + m.w2 * detail[f], 32, m.norm)
                close(want[f], fused, 1e-9)


def test_temporal_conv_equals_conv3d():
    """Table 3's ablation: four [GN, SiLU, (3,1,1) convolution] and a residual, against Conv3d."""
    torch.manual_seed(0)
    b, t, c, h, w = 2, 8, 32, 4, 6
    m, x = TemporalConv(c, t), torch.randn(b * t, c, h, w)
    torch.nn.init.normal_(m.convs[-1].weight, std=0.1)
    with torch.no_grad():
        clip = x.unflatten(0, (b, t)).transpose(1, 2)
        y = clip
        for norm, conv in zip(m.norms, m.convs):
            y = F.conv3d(F.silu(norm(y)), conv.weight[..., None], conv.bias, padding=(1, 0, 0))
        close(m(x).unflatten(0, (b, t)).transpose(1, 2), clip + y, 1e-5)


def test_timestep_embedding():
    """cos first; all 1000 steps stay distinct, also under bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        e = timestep_embedding(torch.arange(1000), 32)
    assert e.dtype == torch.float32 and len(torch.unique(e, dim=0)) == 1000
    assert torch.allclose(e[7, :2], torch.tensor([7.0, 7 * 10000 ** (-1 / 16)]).cos())
    assert torch.allclose(e[7, 16:18], torch.tensor([7.0, 7 * 10000 ** (-1 / 16)]).sin())


# ------------------------------------------------------------------------------------------------------------
# Padding, variants, order


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_never_reaches_a_real_frame(variant):
    """Whatever padding holds, outputs on real frames and all gradients are bit-equal."""
    net, (x, t, cond, context) = random_net(**VARIANTS[variant]), inputs()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for n, junk in ((1, 1e4), (4, math.nan), (7, math.inf)):
        mask = (torch.arange(8) < n)[None]
        given = torch.arange(8)[None] % 2 == 0                          # also "given" frames past n
        results = []
        for value in (0.0, junk):
            x2, c2 = x.clone(), cond.clone()
            x2[:, n:] = c2[:, n:] = value
            out = net(x2, t, c2, context, given, mask)[:, :n]
            results.append((out, gradients(net, ((out - target[:, :n]) ** 2).mean())))
        (out, grads), (out2, grads2) = results
        assert out.isfinite().all() and torch.equal(out, out2), n
        assert all(torch.equal(grads[k], grads2[k]) for k in grads), n
    with torch.no_grad():                                               # n = F: a full mask is no mask
        full = torch.ones(1, 8, dtype=torch.bool)
        assert torch.equal(net(x, t, cond, context, given, full), net(x, t, cond, context, given))


def test_frames_not_given_are_ignored():
    net, (x, t, cond, context) = random_net(), inputs()
    given = torch.arange(8)[None] == 3
    with torch.no_grad():
        zeros, junk = torch.where(given[:, :, None, None, None], cond, 0), cond.clone()
        junk[:, 5] = float("nan")
        want = net(x, t, zeros, context)
        assert torch.equal(net(x, t, junk, context, given), want)
        assert not torch.allclose(net(x, t, torch.zeros_like(cond), context), want)


def test_inputs_tell_the_guess_both_masks_and_the_frame_number():
    """`inputs`: the condition encoder reads the guess, three more maps hold given, real and log unit, a row
    per frame number is added after conv_in. Without it nothing of this is there (the golden vector)."""
    net, (x, t, cond, context) = random_net(**OURS), inputs(b=2)
    given, real = torch.zeros(2, 8, dtype=torch.bool), torch.arange(8)[None] < torch.tensor([[8], [5]])
    given[0, [1, 6]] = given[1, 2] = True
    seen = []
    net.condition_encoder.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    features = net.condition(cond, context, given, real).features.unflatten(0, (2, 8))
    guess, unit = guess_frames(cond, given, real)
    assert torch.equal(seen[0].unflatten(0, (2, 8)), guess)
    for channel, want in ((4, given.float()), (5, real.float()), (6, unit.log().view(2, 1).expand(2, 8))):
        assert torch.equal(features[:, :, channel], want[:, :, None, None].expand(2, 8, 8, 8))
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    with torch.no_grad():
        before = net(x, t, cond, context, given, real)
        net.number.copy_(net.number[order])
        assert not torch.allclose(net(x, t, cond, context, given, real), before)


def test_a_norm_over_one_channel_hides_the_step_and_film_does_not():
    x, (a, b) = torch.randn(8, 32, 8, 8), torch.randn(2, 1, 16)
    plain, film = ResBlock(32, 32, 16), ResBlock(32, 32, 16, film=True)
    assert torch.allclose(plain(x, a), plain(x, b), atol=1e-4)              # 32 groups of 32 channels
    assert (film(x, a) - film(x, b)).abs().mean() > 0.05

    def channels(**settings):
        norms = [m for m in DFGN(Config(**SMALL, **settings)).modules() if isinstance(m, torch.nn.GroupNorm)]
        return {m.num_channels // m.num_groups for m in norms if m.num_groups > 1 or m.num_channels > 8}

    assert min(channels()) == 1 and min(channels(film=True)) == 8


def test_the_caption_draws_a_draft_of_real_frames():
    net = DFGN(Config(**SMALL, **OURS))
    given, real = torch.zeros(2, 8, 4, 8, 8), torch.arange(8).expand(2, 8) < 5
    context = torch.randn(2, 6, 24)

    def drafts(context):
        return net.condition(given, context, real & False, real).features[:, -4:].unflatten(0, (2, 8))

    assert drafts(context).abs().max() == 0                                 # at the start there is none
    torch.nn.init.normal_(net.draft.out.weight, std=0.1)
    seen = drafts(context)
    assert (seen[0, :5] - seen[1, :5]).abs().mean() > 0.01 and seen[:, 5:].abs().max() == 0
    assert (seen[0, 0] - seen[0, 1]).abs().mean() > 0.01                    # each frame has its own
    padded = torch.cat([context, torch.zeros(2, 3, 24)], 1)                 # past the end of a caption
    assert torch.allclose(drafts(padded), seen, atol=1e-6)


def test_the_bypass_carries_a_colour_and_of_noise_alone_nothing():
    net = DFGN(Config(**SMALL, **OURS, prediction="v", zero_snr=True))   # conv_out is 0: that is all
    (x, given), context = torch.randn(2, 2, 8, 4, 8, 8), torch.randn(2, 6, 24)
    cond = torch.arange(8).expand(2, 8) < 1

    def out(x, t, given=given):
        return net(x, torch.full((2,), t), given, context, cond)

    assert out(x, 500).abs().max() == 0
    torch.nn.init.normal_(net.bypass.weight, std=0.1)
    assert torch.equal(out(x, 999), out(-x, 999)) and (out(x, 999) - out(x, 999, -given)).abs().mean() > 0.01
    apart = out(x + 1, 500) - out(x, 500)                                   # one colour more, everywhere
    assert apart.abs().mean() > 0.01 and torch.allclose(apart, apart[..., :1, :1].expand_as(apart), atol=1e-5)


def test_narrow_attention_is_as_wide_as_its_level():
    for narrow, transformer_in, sti in ((False, 8 * 16, (256, 256)), (True, 64, (64, 128))):
        net = DFGN(Config(**{**SMALL, "widths": (64, 128)}, narrow=narrow))
        assert net.transformer_in.block.attn1.q.weight.shape[0] == 3 * transformer_in
        for stage, width in zip(net.down, sti):
            assert stage["layers"][0].mix.semantic.attn.q.weight.shape[0] == 3 * width


@pytest.mark.parametrize("n, variant", [(1, "paper"), (8, "paper"), (1, "conv3d"), (1, "ours"), (8, "ours")])
def test_every_parameter_gets_a_gradient(n, variant):
    """Also with one real frame, else DistributedDataParallel would stop at unused parameters."""
    x, t, cond, context = inputs()
    mask = (torch.arange(8) < n)[None]
    fresh = DFGN(Config(**SMALL, **VARIANTS[variant]))
    grads = gradients(fresh, fresh(x, t, cond, context, None, mask)[:, :n].sum())
    assert all(g is not None for g in grads.values())
    net = random_net(widths=(64, 64), **VARIANTS[variant])
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    loss = ((net(x, t, cond, context, None, mask) - target)[:, :n] ** 2).mean()
    for name, g in gradients(net, loss).items():
        assert g.isfinite().all(), name
        if not name.endswith("detail.convs.3.bias"):  # a frame's mean: the group norm removes it
            assert g.abs().sum() > 0, name


def test_a_fresh_network_predicts_zero():
    net, (x, t, cond, context) = DFGN(Config(**SMALL)), inputs()
    with torch.no_grad():
        assert net(x, t, cond, context).abs().max() == 0


def test_only_the_detail_branch_knows_the_order_of_frames():
    x, t, cond, context = inputs()
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    for weight, blind in ((0.0, True), (1.0, False)):
        net = random_net()
        with torch.no_grad():
            for layer in net.layers():
                layer.mix.w2.fill_(weight)
            straight, shuffled = net(x, t, cond, context), net(x[:, order], t, cond[:, order], context)
            assert torch.allclose(straight[:, order], shuffled, atol=1e-3) == blind


# ------------------------------------------------------------------------------------------------------------
# Speed and memory options change nothing


@pytest.mark.parametrize("variant", ["paper", "ours"])
def test_cached_condition_equals_uncached(variant):
    net, (x, t, cond, context) = random_net(**VARIANTS[variant]), inputs(b=2)
    given, mask = torch.arange(8)[None].repeat(2, 1) == 2, torch.arange(8)[None].repeat(2, 1) < 6
    with torch.no_grad():
        cached = net.condition(cond, context, given, mask)
        for t in (t, t // 2):
            assert torch.equal(net(x, t, condition=cached), net(x, t, cond, context, given, mask))


def test_checkpointing_gives_the_same_gradients():
    net, (x, t, cond, context) = random_net(), inputs(b=2)
    plain = gradients(net, net(x, t, cond, context).square().mean())
    net.checkpointing = True
    recomputed = gradients(net, net(x, t, cond, context).square().mean())
    for name in plain:
        assert torch.allclose(plain[name], recomputed[name], rtol=1e-4, atol=1e-7), name


def test_bf16_autocast_stays_close():
    net, (x, t, cond, context) = random_net(), inputs()
    with torch.no_grad():
        want = net(x, t, cond, context)
        with torch.autocast("cpu", torch.bfloat16):
            got = net(x, t, cond, context)
    assert got.dtype == torch.float32
    assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.99


def test_training_and_inference_agree():
    """The CPU takes other attention kernels when gradients are wanted; the result may not depend on it."""
    net, (x, t, cond, context) = random_net(), inputs()
    with torch.no_grad():
        want = net(x, t, cond, context)
    close(net(x, t, cond, context).detach(), want, 1e-4)


def test_config_round_trip():
    cfg = Config(**PRESETS["paper"])
    assert Config(**json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg
    with pytest.raises(ValueError, match="temporal"):
        Config(temporal="conv4d")
