"""What trainers call a layer, against the names of the real architectures (their shapes alone, without weights)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from facegen.models.lora_names import Names, part_of, sgm

# Sizes in which only the topology is that of the published models.
SD15: dict[str, Any] = {"layers_per_block": 2, "block_out_channels": (8, 8, 8, 8), "cross_attention_dim": 8}
SDXL: dict[str, Any] = {
    "layers_per_block": 2,
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
}


def unet(sizes: dict[str, Any]) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(norm_num_groups=4, attention_head_dim=4, **sizes)


@pytest.mark.parametrize(
    ("key", "layer", "half"),
    [
        ("lora_unet_mid_block_proj.lora_down.weight", "lora_unet_mid_block_proj", "down"),
        ("lora_te1_text_model_x.lora_up.weight", "lora_te1_text_model_x", "up"),
        ("lora_unet_a_conv1.lora_mid.weight", "lora_unet_a_conv1", "mid"),
        ("lora_unet_a_conv1.alpha", "lora_unet_a_conv1", "alpha"),
        ("unet.a.attn1.processor.to_q_lora.down.weight", "unet.a.attn1.processor.to_q", "down"),
        ("unet.a.attn1.to_q.lora.up.weight", "unet.a.attn1.to_q", "up"),
        ("text_encoder.a.q_proj.lora_linear_layer.down.weight", "text_encoder.a.q_proj", "down"),
        ("unet.a.to_q.lora_A.weight", "unet.a.to_q", "down"),
        ("base_model.model.a.to_q.lora_B.default.weight", "base_model.model.a.to_q", "up"),
        ("unet.a.to_q.alpha", "unet.a.to_q", "alpha"),
    ],
)
def test_keys_of_every_trainer(key: str, layer: str, half: str) -> None:
    assert part_of(key) == (layer, half)


@pytest.mark.parametrize("key", ["unet.a.to_q.weight", "bundle_emb.x.string_to_param.*", "lora_unet_a.diff_b", "alpha"])
def test_other_keys_are_none(key: str) -> None:
    assert part_of(key) is None


@pytest.mark.parametrize(
    ("sizes", "name", "official"),
    [
        (SD15, "conv_in", "input_blocks.0.0"),
        (SD15, "time_embedding.linear_2", "time_embed.2"),
        (SD15, "down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        (SD15, "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (SD15, "down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        (SD15, "down_blocks.3.resnets.1.time_emb_proj", "input_blocks.11.0.emb_layers.1"),
        (SD15, "mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        (SD15, "mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        (SD15, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        (SD15, "up_blocks.1.attentions.2.proj_out", "output_blocks.5.1.proj_out"),
        (SD15, "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        (SD15, "up_blocks.3.resnets.2.conv_shortcut", "output_blocks.11.0.skip_connection"),
        (SD15, "conv_out", "out.2"),
        (SDXL, "add_embedding.linear_1", "label_emb.0.0"),
        (
            SDXL,
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k",
        ),
        (SDXL, "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        (SDXL, "up_blocks.2.resnets.2.conv1", "output_blocks.8.0.in_layers.2"),
    ],
)
def test_names_of_the_official_code(sizes: dict[str, Any], name: str, official: str) -> None:
    assert sgm(unet(sizes), name) == official


def test_each_spelling_means_one_layer() -> None:
    for sizes in (SD15, SDXL):
        net = unet(sizes)
        layers = [name for name, one in net.named_modules() if isinstance(one, (nn.Linear, nn.Conv2d))]
        assert len({sgm(net, name) for name in layers}) == len(layers)


def test_names_are_found_in_the_right_network() -> None:
    names = Names({"unet": {"mid_x": "mid.x"}, "text_encoder": {"y": "y", "z": "z"}, "text_encoder_2": {"z": "z.2"}})
    assert names.find("lora_unet_mid_x") == ("unet", "mid.x")
    assert names.find("diffusion_model.mid.x") == ("unet", "mid.x")
    assert names.find("base_model.model.mid.x") == names.find("mid.processor.x") == ("unet", "mid.x")
    assert names.find("lora_te2_z") == ("text_encoder_2", "z.2")
    assert names.find("lora_te_z") == names.find("z") == ("text_encoder", "z")
    assert names.find("unet.y") is None
