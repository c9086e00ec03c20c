"""Every rival starts as the base, trains its own parameters alone, and does what its paper says."""
import copy
import json
from dataclasses import replace
from functools import lru_cache

import pytest
import rivals  # first: it says where rdtf.py is

import rdtf
import torch
import train
from rdtf import RDTF, AutoencoderKL, Config, SpatialTransformer, TemporalTransformer, add_lora, merge_lora

SMALL = Config(**rdtf.PRESETS["tiny"] | dict(
    size=32, widths=(32, 64), head_dim=16, context_dim=32, text_layers=1, text_bytes=16, vae_widths=(32, 32),
    steps=1))
ONE_LEVEL = replace(SMALL, widths=(32,))                            # what the commands can be tested with
TUNED = [name for name, method in rivals.STAGES.items() if method.tuned]
ADDED = [name for name in TUNED if name != "full"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_base(seed=0, cfg=SMALL):
    """A network without zeros where training would have left none, so that all its parts matter."""
    torch.manual_seed(seed)
    model = RDTF(cfg)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def base():
    return make_base()


def rival(name, base, **more):
    """-> (a copy of the base as the method changes it, what is trained)."""
    model = RDTF(base.cfg)
    parameters = rivals.STAGES[name].add(model, **more)
    model.load_state_dict(base.state_dict(), strict=False)
    return model, parameters


def batch(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (2, *model.cfg.latent_shape)
    cond = torch.zeros(2, 8, dtype=torch.bool)
    cond[0, 2] = cond[1, :4] = True
    real = torch.arange(8)[None] < torch.tensor([[8], [6]])
    return dict(x0=torch.randn(shape, generator=g), noise=torch.randn(shape, generator=g),
                t=torch.tensor([300, 900]), text=model.text.tokenize(["a red cat", "a dog"]), cond_mask=cond,
                frame_mask=real)


def output(model, **changes):
    """The network's output (b, t, c, h, w) for the batch."""
    k = batch(model) | changes
    return model.net(k["noise"], k["t"], k["x0"], model.text(k["text"]), k["cond_mask"], k["frame_mask"])


def stir(parameters, size=0.2):
    """As if they had been trained."""
    g = torch.Generator().manual_seed(1)
    for p in parameters.values():
        p.data += size * torch.randn(p.shape, generator=g)


# ------------------------------------------------------------------------------------------------ all methods

@pytest.mark.parametrize("name", [n for n in TUNED if n != "absorbers"])
@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
def test_each_starts_as_the_base(name, temporal, base):
    base = base if temporal == "sti" else make_base(cfg=replace(SMALL, temporal="conv3d"))
    model, parameters = rival(name, base, **dict(shift=False) if name == "simda" else {})
    with torch.no_grad():
        assert torch.equal(output(model), output(base))
        if name != "full":
            stir(parameters)
            assert not torch.allclose(output(model), output(base), atol=1e-3)      # it does change something


def test_absorbers_start_as_the_base_without_time(base):
    plain = RDTF(SMALL)
    plain.load_state_dict(base.state_dict())
    rivals.absorbers(plain)                                         # its LoRA is zero
    model, parameters = rival("absorbers", base)
    stir(parameters)
    with torch.no_grad():
        whole, x = output(model), batch(model)["noise"].clone()
        x[0, 5] += 1
        other = output(model, noise=x)
    changed = (whole != other).flatten(2).any(-1)                   # b t
    assert changed[0].tolist() == [i == 5 for i in range(8)] and not changed[1].any()


@pytest.mark.parametrize("name", TUNED)
def test_only_its_parameters_are_trained_and_the_base_stays(name, base):
    model, parameters = rival(name, base)
    names = set(parameters)
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(parameters[n] is p for n, p in model.named_parameters() if n in names)
    if name != "full":
        assert not names & set(base.state_dict())
    optimizer = torch.optim.AdamW(parameters.values(), 1e-2)
    started = {n: x.clone() for n, x in model.state_dict().items()}
    model.train()
    for _ in range(2):                                          # what ends in zeros has no gradient at first
        optimizer.zero_grad()
        model(**batch(model)).sum().backward()
        optimizer.step()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert grads <= names
    assert grads == names or name == "full"                         # a base may have parts without use
    moved = {n for n, x in model.state_dict().items() if not torch.equal(x, started[n])}
    assert moved and moved <= names


@pytest.mark.parametrize("name", ADDED)
def test_a_copy_is_apart(name, base):
    """train.py averages weights in a copy of the model: its hooks must read the copy."""
    model, parameters = rival(name, base)
    copied = copy.deepcopy(model)
    stir({n: p for n, p in copied.named_parameters() if n in parameters})
    both = {}
    with torch.no_grad():
        for who, m in (("copy", copied), ("model", model)):
            both[who] = output(m)
        stir(parameters)
        assert not torch.allclose(both["copy"], both["model"], atol=1e-3)
        assert torch.allclose(output(model), both["copy"], atol=1e-6)


@pytest.mark.parametrize("name", TUNED)
def test_updates_lower_the_loss_of_a_fixed_batch(name, base):
    model, parameters = rival(name, base)
    optimizer, losses = torch.optim.AdamW(parameters.values(), 3e-3), []
    for _ in range(6):
        loss = model(**batch(model)).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------- one by one

def test_lora_counts_and_where(base):
    def attentions(kind):
        return [m.block for m in RDTF(SMALL).net.modules() if isinstance(m, kind)]
    model = RDTF(SMALL)
    names = add_lora(model, 4, TemporalTransformer)
    assert len(names) == 2 * 2 * 2 * len(attentions(TemporalTransformer))   # a, b; q, out; two attentions
    assert all(".temporal." in n or "transformer_in" in n for n in names)
    names = add_lora(RDTF(SMALL), 4, SpatialTransformer)
    assert len(names) == (2 * 2 + 2 * 3) * len(attentions(SpatialTransformer)) and \
        all(".spatial." in n for n in names)
    names = add_lora(RDTF(SMALL), 4)
    assert any("semantic" in n for n in names) and any("condition_encoder" in n for n in names)
    assert not any(n.startswith("text.") for n in names)
    q = names["net.transformer_in.block.attn1.q.lora_b"]
    assert q.shape == (3, 32, 4)                                    # q, k and v have a part each


def test_lora_merged_equals_lora_apart(base):
    model = RDTF(SMALL)
    model.load_state_dict(base.state_dict())
    parameters = add_lora(model, 4)
    stir(parameters, 0.05)
    merged = RDTF(SMALL)
    merged.load_state_dict(base.state_dict())
    merge_lora(merged, {n: p.detach() for n, p in parameters.items()})
    with torch.no_grad():
        apart = output(model)
        assert (apart - output(base)).abs().max() > 0.1
        assert torch.allclose(output(merged), apart, atol=1e-5)


def test_the_parts_of_a_fused_layer_do_not_mix():
    layer = rdtf.LoRA(torch.nn.Linear(6, 9, bias=False), 2, 3)
    with torch.no_grad():
        layer.lora_b[1] = 1.0                                       # only k learnt something
        x = torch.randn(5, 6)
        change = layer(x) - x @ layer.weight.T
        k = rdtf.ALPHA / 2 * (x @ layer.lora_a[2:4].T).sum(1, keepdim=True)
    assert torch.allclose(change, torch.cat([0 * k, k, 0 * k], 1).repeat_interleave(3, 1), atol=1e-5)


def test_shift_table_against_a_loop():
    """Token (r, c) of frame i comes from d frames earlier, d by its place in a 4x4 tile; else it stays."""
    rows = "4321", "3210", "2100", "1234"
    t, side = 8, 6                                                  # no multiple of 4
    x = torch.arange(2 * t * side * side, dtype=torch.float32).view(2 * t, side * side, 1).repeat(1, 1, 3)
    out = rivals.shift_frames(x, t)
    for b in range(2):
        for i in range(t):
            for r in range(side):
                for c in range(side):
                    d = int(rows[r % 4][c % 4])
                    source = i - d if i >= d else i
                    assert torch.equal(out[b * t + i, r * side + c], x[b * t + source, r * side + c])


def test_latent_shift_attention_against_a_loop(base):
    attn, t = base.net.down[0]["layers"][0].spatial.block.attn1, 8
    x = torch.randn(2 * t, 16, 32)
    moved, wq = rivals.shift_frames(x, t), attn.q.weight
    with torch.no_grad():
        out = rivals.latent_shift_attention(attn, t, x)
        for b, i in ((0, 0), (0, 1), (1, 7)):
            seen = torch.cat([moved[b * t + max(i - 1, 0)], moved[b * t + i]])
            heads = []
            for h in range(attn.heads):
                q, k, v = (wq[j * 32 + h * 16:j * 32 + (h + 1) * 16] for j in range(3))
                score = (x[b * t + i] @ q.T) @ (seen @ k.T).T / 4
                heads.append(score.softmax(-1) @ (seen @ v.T))
            assert torch.allclose(out[b * t + i], attn.out(torch.cat(heads, -1)), atol=1e-5)


def test_simda_shifts_in_the_network(base):
    model, _ = rival("simda", base)
    with torch.no_grad():
        assert not torch.allclose(output(model), output(base), atol=1e-3)


def test_temporal_adapter_sees_three_frames_of_one_channel_each():
    part = rivals.TemporalAdapter(4, 8)
    stir(dict(part.named_parameters()))
    x = torch.randn(16, 4, 3, 3)
    y = x.clone()
    y[5, :, 1, 1] += 1                                              # clip 0, frame 5
    with torch.no_grad():
        a, b = part(x), part(y)
    changed = ((a - b).abs() > 1e-6).any(1)                         # (b t) h w
    assert sorted(set(changed.nonzero()[:, 0].tolist())) == [4, 5, 6]
    assert changed[:, 1, 1].sum() == changed.sum() == 3
    assert torch.allclose(part(x + y), part(x) + part(y) - part(0 * x), atol=1e-4)      # no non-linearity


@pytest.mark.parametrize("given", [0, 3])
def test_i2v_adapter_reads_the_first_given_frame(base, given):
    """Brute force over heads, and no other frame's keys matter."""
    model, parameters = rival("i2v-adapter", base)
    stir(parameters)
    attn = model.net.down[0]["layers"][0].spatial.block.attn1
    before = base.net.down[0]["layers"][0].spatial.block.attn1
    cond = torch.zeros(2, 8, dtype=torch.bool)
    cond[0, given], cond[0, 6], cond[1] = True, True, False         # clip 1 has no given frame: its frame 0
    x = torch.randn(16, 16, 32)
    with torch.no_grad():
        output(model, cond_mask=cond)                               # says which frames are given
        extra = attn(x) - before(x)
        wq, wk, wv = attn.first_q.weight, attn.q.weight[32:64], attn.q.weight[64:]
        for b, i in ((0, 0), (0, 5), (1, 2)):
            first, heads = x[8 * b + (given if b == 0 else 0)], []
            for h in range(attn.heads):
                at = slice(16 * h, 16 * h + 16)
                score = (x[8 * b + i] @ wq[at].T) @ (first @ wk[at].T).T / 4
                heads.append(score.softmax(-1) @ (first @ wv[at].T))
            assert torch.allclose(extra[8 * b + i], attn.first_out(torch.cat(heads, -1)), atol=1e-4)


def test_i2v_adapter_wants_clean_frames():
    with pytest.raises(rivals.data.DataError, match="clean"):
        rivals.i2v_adapter(RDTF(replace(SMALL, clean=False)))


def test_customize_drops_its_absorbers(base):
    model, parameters = rival("customize", base)
    assert all("temporal" in n or "transformer_in" in n for n in parameters)
    stir({n: p for n, p in model.named_parameters() if ".lora_" in n and ".spatial." in n})
    with torch.no_grad():
        assert torch.equal(output(model.eval()), output(base.eval()))
        assert not torch.allclose(output(model.train()), output(base), atol=1e-3)


def test_frame_similarity_prior(monkeypatch):
    """Where one frame is given the start is its latents, half of them blurred, noised; elsewhere noise."""
    cfg, starts = replace(SMALL, zero_snr=False), []
    vae = AutoencoderKL(cfg).eval()
    loaded = rdtf.Loaded(make_base(cfg=cfg).eval(), vae, cfg, {})
    monkeypatch.setattr(rdtf, "sample", lambda denoise, y, *rest: starts.append(y) or y)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 0] = mask[1, 0] = mask[1, 4] = True
    frames = torch.rand(2, 8, 4, 32, 32)
    run = dict(cond_mask=mask, seeds=[0, 1], bf16=False)
    rdtf.sample_clips(loaded, ["a", "b"], frames, **run)
    with rivals.frame_similarity_prior():
        rdtf.sample_clips(loaded, ["a", "b"], frames, **run)
    rdtf.sample_clips(loaded, ["a", "b"], frames, **run)
    plain, prior, again = starts
    assert torch.equal(plain, again) and torch.equal(plain[1], prior[1])
    a = rdtf.alphas_cumprod()[999]
    y0 = (prior[0] - (1 - a).sqrt() * plain[0]) / a.sqrt()          # in units of the residual
    with torch.no_grad():
        z = vae.encode(frames[0, :1])
    blurred = torch.nn.functional.avg_pool2d(z, 3, 1, 1, count_include_pad=False)
    kept, other = y0.abs() < 1e-4, (y0 - (blurred - z) / 0.8).abs() < 1e-4
    assert (kept | other).all() and 0.4 < kept.float().mean() < 0.6


# ----------------------------------------------------------------------------------------------- the commands

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a tiny base, as train.py writes it."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    vae = AutoencoderKL(ONE_LEVEL)
    train.save_checkpoint(path / "last.pt", {
        "format": rdtf.FORMAT, "stage": "main", "config": rivals.asdict(ONE_LEVEL), "step": 7, "ema": {},
        "vae": vae.state_dict(), "vae_id": vae.fingerprint(), "model": make_base(cfg=ONE_LEVEL).state_dict()})
    (path / "clock.jsonl").write_text('{"step": 7, "seconds": 90}\n')
    return path


def train_one(folder, out, name, *more, minutes=0.005):
    rivals.main(["train", name, "--base", str(folder / "last.pt"), "--data", "synthetic:64", "--measure",
                 "synthetic:300", "--count", "8", "--marks", "1", "--minutes", str(minutes), "--out",
                 str(out), "--batch-size", "1", "--save-every", "4", *more])
    return next(out.glob(f"{name}-*m-0"))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(rivals, "TINY", replace(ONE_LEVEL, context_dim=16))
    once = lru_cache(rivals.data.open_stickers)                     # drawing them takes seconds
    monkeypatch.setattr(rivals.data, "open_stickers", once)
    monkeypatch.setattr(train, "open_stickers", once)
    was = rdtf.PRESETS["tiny"].copy(), train.RDTF, train.learning_rate, train.save_checkpoint
    yield
    assert was == (rdtf.PRESETS["tiny"], train.RDTF, train.learning_rate, train.save_checkpoint)


def test_train_resume_and_table(folder, small, tmp_path, capsys):
    base = rdtf.read_weights(folder / "last.pt")["model"]
    for name in rivals.METHODS:
        if name in ("base", "lora-temporal"):
            continue
        run = train_one(folder, tmp_path, name)
        saved = rdtf.read_weights(run / "last.pt")
        same = [n for n in base if n in saved["model"] and torch.equal(saved["model"][n], base[n])]
        new = saved["model"].keys() - base.keys()
        if rivals.METHODS[name].tuned:
            assert (len(same) == len(base) and new) if name != "full" else len(same) < len(base)
            assert name == "full" or all(torch.equal(saved["ema"][n], base[n]) for n in base)
            assert any(not torch.equal(saved["ema"][n], saved["model"][n]) for n in new or base)
        rows = [json.loads(line) for line in (run / "measured.jsonl").read_text().splitlines()]
        assert 1 <= rows[-1]["step"] <= saved["step"] and "EV" in rows[-1]["modes"]["it2v"]
    assert rdtf.read_weights(tmp_path / "customize-0.005m-0" / "absorbers" / "last.pt")["step"] >= 1

    capsys.readouterr()
    train_one(folder, tmp_path, "lora")                             # spent already
    assert "minutes already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other flags"):
        train_one(folder, tmp_path, "lora", "--lr", "0.5")

    rivals.main(["table", str(tmp_path), "--measure", "synthetic:300", "--count", "8", "--pictures", "1",
                 "--draws", "5", "--networks", str(tmp_path / "none")])
    text = (tmp_path / "rivals.md").read_text()
    cost = {line.split("(")[-1].split(")")[0]: [x.strip() for x in line.split("|")[2:-1]]
            for line in text.split("| cost")[1].splitlines()[2:]}
    assert len(cost) == len(rivals.METHODS) - 1 and (tmp_path / "rivals.png").exists()
    assert [float(x) for x in cost[folder.name][-2:]] == [0, 1.5]   # 90 seconds of the base's clock
    assert float(cost["scratch-0.005m-0"][-1]) < 0.02 and float(cost["lora-0.005m-0"][-1]) >= 1.5
    assert float(cost["scratch-0.005m-0"][1]) < float(cost[folder.name][1])
    assert text.count("EV of the mean") == 3 and "nan" not in text
    measured = sorted((tmp_path / "measured").glob("*.json"))
    old = [path.stat().st_mtime_ns for path in measured]
    rivals.main(["table", str(tmp_path), "--measure", "synthetic:300", "--count", "8", "--pictures", "1",
                 "--draws", "5", "--networks", str(tmp_path / "none")])
    assert old == [path.stat().st_mtime_ns for path in measured]    # nothing is measured twice


def test_a_stopped_run_goes_on(folder, small, tmp_path, monkeypatch):
    """A signal in the absorbers' stage stops there; the same command ends that stage and then the other."""
    names, saves = [], []
    real, save = train.train, train.save_checkpoint

    def stop(path, content):
        save(path, content)
        saves.append(content["step"])
        if len(saves) == 1:
            train.STOP["since"] = 1.0                               # as on_signal does
    with monkeypatch.context() as patched:
        patched.setattr(train, "train", lambda *a: names.append(a[-1].name) or real(*a))
        patched.setattr(train, "save_checkpoint", stop)
        run = train_one(folder, tmp_path, "customize", "--save-every", "1", minutes=0.04)
        assert names == ["absorbers"] and saves == [1, 2] and not (run / "last.pt").exists()
        train_one(folder, tmp_path, "customize", "--save-every", "1", minutes=0.04)
    assert names == ["absorbers", "absorbers", run.name]
    first = rdtf.read_weights(run / "absorbers" / "last.pt")
    assert first["step"] > 2 and saves[2] == 3
    last = rdtf.read_weights(run / "last.pt")["model"]
    absorbers = {n: x for n, x in first["ema"].items() if ".lora_" in n}
    assert absorbers and all(torch.equal(last[n], x) for n, x in absorbers.items())     # loaded, then frozen


def test_a_base_is_trained_here(folder, small, tmp_path):
    run = train_one(folder, tmp_path, "base", "--widths", "64")
    assert rdtf.load_model(run / "last.pt").cfg.widths == (64,) and rivals.TINY.widths == (32,)
    settings = json.loads((run / "settings.json").read_text())
    assert settings["base"] == "" and settings["base_minutes"] == 0


def test_tuning_needs_a_base(tmp_path):
    with pytest.raises(SystemExit, match="needs --base"):
        rivals.main(f"train lora --data synthetic --measure synthetic --out {tmp_path}".split())


def test_count_names_what_is_trained(folder, capsys):
    rivals.main(["count", "--base", str(folder / "last.pt")])
    text = capsys.readouterr().out
    assert text.count(": trains ") == len(TUNED) and "full: trains" in text and "(100.0 %)" in text
    assert "*.spatial.block.attn1.first_q.weight" in text and "*.mix.adapter.conv.weight" in text
