"""The paper's text path, frozen encoders: a tiny random CLIP and T5 with their tokenizers, made here."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from rdtf import FORMAT, RDTF, AutoencoderKL, Config, FrozenText, load_model, sample_clips

WORDS = ["<pad>", "<unk>", "</s>", "a", "red", "cat", "star"]
MICRO = dict(size=16, widths=(32,), layers=1, head_dim=16, context_dim=24, text_dims=(24, 16),
             vae_widths=(32, 32))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """-> paths of a CLIP tower as wide as context_dim and of a narrower T5, as --text-encoder takes them."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (tests/requirements.txt)")
    tokenizers = pytest.importorskip("tokenizers")
    home = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    ids = dict(vocab_size=len(WORDS), pad_token_id=0, bos_token_id=3, eos_token_id=2)
    clip = transformers.CLIPTextConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                                       num_attention_heads=2, max_position_embeddings=77, **ids)
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                               decoder_start_token_id=0, **ids)
    transformers.CLIPTextModel(clip).save_pretrained(home / "clip")
    transformers.T5EncoderModel(t5).save_pretrained(home / "t5")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    for name in ("clip", "t5"):
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>",
                                             eos_token="</s>").save_pretrained(home / name)
    return [home / "clip", home / "t5"]


def test_tokens_are_joined_projected_and_encoded_once_per_caption(folders):
    text = FrozenText(Config(**MICRO), folders)
    tok = text.tokenize(["a red cat", "", "a red cat", "a star", "a red cat"])
    assert tok.shape == (5, 2, 2, 77) and tok.dtype == torch.int64 and tok.device.type == "cpu"
    sizes = []
    for _, encoder in text.encoders:
        encoder.register_forward_hook(lambda m, i, o: sizes.append(len(o.last_hidden_state)))
    out = text(tok)
    assert sizes == [3, 3], "each caption of the batch is encoded once"
    assert out.shape == (5, 154, 24) and torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])
    for i, (tokenizer, encoder) in enumerate(text.encoders):                # by hand, one caption at a time
        for j, caption in enumerate(["a red cat", ""]):
            ids = tokenizer(caption, padding="max_length", max_length=77, return_tensors="pt")
            state = text.project[i](encoder(ids["input_ids"], attention_mask=ids["attention_mask"])[0][0])
            assert torch.allclose(out[j, 77 * i:77 * i + 77], state, atol=1e-5)


def test_only_the_projection_is_trained_and_saved(folders):
    text = FrozenText(Config(**MICRO), folders)
    text.train()
    text(text.tokenize(["a cat"])).square().sum().backward()
    shapes = {k: tuple(v.shape) for k, v in text.state_dict().items()}
    assert shapes == {"project.1.0.weight": (2048, 16), "project.1.0.bias": (2048,),
                      "project.1.2.weight": (24, 2048), "project.1.2.bias": (24,)}
    assert all(p.grad.abs().sum() > 0 for p in text.parameters())
    for _, encoder in text.encoders:
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_encoders_follow_the_device_of_the_tokens(folders):
    text = FrozenText(Config(**MICRO), folders)
    tok, moved = text.tokenize(["a cat"]), []
    for _, encoder in text.encoders:
        encoder.to = lambda device, encoder=encoder: moved.append(device) or encoder
    text(tok)
    assert moved == [tok.device] * 2


def test_a_checkpoint_finds_its_encoders_anywhere_and_never_asks_the_hub(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders[0].parent)
    cfg = Config(**MICRO)
    model, vae = RDTF(cfg, ["clip", "t5"]), AutoencoderKL(cfg)              # relative paths, as typed
    torch.save({"format": FORMAT, "stage": "main", "config": asdict(cfg), "model": model.state_dict(),
                "vae": vae.state_dict(), "text_encoder": model.text.paths}, tmp_path / "last.pt")
    monkeypatch.chdir(tmp_path)
    made = sample_clips(load_model("last.pt"), ["a cat"], torch.zeros(1, 8, 4, 16, 16),
                        np.zeros((1, 8), bool), steps=1)
    assert made.shape == (1, 8, 4, 16, 16) and made.isfinite().all()
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("went to the network"))
    for paths, words in (([tmp_path / "gone"], "gone: not a folder with a text encoder"),
                         (["some/name"], "name: not a folder with a text encoder"),
                         ([tmp_path], "not a folder with a text encoder"), (folders[:1], "widths")):
        with pytest.raises(ValueError, match=words) as error:
            FrozenText(cfg, paths).tokenize(["a cat"])
        assert "\n" not in str(error.value)
