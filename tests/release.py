"""The authors' release in its own words: build our network from its config, and map its weights onto ours."""

import re

import torch

from rdtf import DFGN, Config


def build(config):
    """config: the release's keys (block_out_channels, cross_attention_dim, attention_head_dim; optional
    layers_per_block, in_channels, num_frames) -> DFGN."""
    if config.get("norm_num_groups", 32) != 32:
        raise ValueError("norm_num_groups: the method has 32 groups")
    return DFGN(Config(widths=tuple(config["block_out_channels"]), context_dim=config["cross_attention_dim"],
                       head_dim=config["attention_head_dim"], layers=config.get("layers_per_block", 2),
                       latent_channels=config.get("in_channels", 4), frames=config.get("num_frames", 8)))


# release name -> ours, applied in order; q/k/v are fused afterwards
RULES = [
    (r"^image_latents_proj_in\.(\d)\.", lambda m: f"condition_encoder.convs.{int(m[1]) // 2}."),
    (r"^image_latents_temporal_encoder\.norm1\.", "condition_encoder.norm."),
    (r"^image_latents_temporal_encoder\.attn1\.", "condition_encoder.attn."),
    (r"^image_latents_temporal_encoder\.ff\.net\.0\.proj\.", "condition_encoder.ff1."),
    (r"^image_latents_temporal_encoder\.ff\.net\.2\.", "condition_encoder.ff2."),
    (r"^time_embedding\.linear_1\.", "time.0."),
    (r"^time_embedding\.linear_2\.", "time.2."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r"down.\1.scale."),
    (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv\.", r"up.\1.scale.conv."),
    (r"^(down|up)_blocks\.(\d+)\.(resnets|temp_convs|attentions|temp_attentions)\.(\d+)\.",
     r"\1.\2.layers.\4.\3."),
    (r"^mid_block\.(resnets|temp_convs|attentions|temp_attentions)\.(\d+)\.", r"mid.\2.\1."),
    (r"\.resnets\.", ".res."),
    (r"\.temp_convs\.", ".mix."),
    (r"\.temp_attentions\.", ".temporal."),
    (r"\.attentions\.", ".spatial."),
    (r"\.res\.time_emb_proj\.", ".res.time."),
    (r"\.mix\.transformer_blocks\.", ".mix.semantic.attn."),
    (r"\.mix\.conv_layers\.(\d)\.(norm|conv)(\d)\.",
     lambda m: f".mix.detail.{m[2]}s.{2 * int(m[1]) + int(m[3]) - 1}."),
    (r"\.transformer_blocks\.0\.", ".block."),
    (r"\.ff\.net\.0\.proj\.", ".ff.proj."),
    (r"\.ff\.net\.2\.", ".ff.out."),
    (r"\.to_out\.0\.", ".out."),
]


def to_ours(release_state_dict, config):
    """The release's state dict (names -> tensors) -> ours, for `build(config).load_state_dict`."""
    ours = {}
    for name, value in release_state_dict.items():
        for pattern, new in RULES:
            name = re.sub(pattern, new, name)
        ours[name] = torch.as_tensor(value)
    for stem in {n[:-len(".to_q.weight")] for n in ours if n.endswith(".to_q.weight")}:
        q, k, v = (ours.pop(f"{stem}.to_{x}.weight") for x in "qkv")
        if re.search(r"spatial\.block\.attn2$", stem):         # cross-attention: q apart, k and v fused
            ours[f"{stem}.q.weight"], ours[f"{stem}.kv.weight"] = q, torch.cat([k, v])
        else:
            ours[f"{stem}.q.weight"] = torch.cat([q, k, v])
    return ours
