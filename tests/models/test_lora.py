"""LoRA files of every spelling give what diffusers makes of them, and leave the model as it was.

Tiny SD 1.x and SDXL, 5 DDIM or Euler steps; the same arithmetic (W x + up(down(x))·gain) in the same order: max
difference 0.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from against_diffusers import Case, draw
from safetensors.torch import save_file
from torch import Tensor

from facegen.errors import CheckpointBroken, WrongAdapter, WrongBaseModel
from facegen.models.base import Model
from facegen.models.lora import load_lora

RANK, ALPHA = 4, 2.0


def weights(model: Model) -> dict[str, Tensor]:
    """A LoRA in diffusers' spelling (`unet.<module>.lora.down.weight`) on attention and feed-forward layers, and on
    the text encoders.
    """
    tensors: dict[str, Tensor] = {}
    parts = {"unet": model.unet, **model.text_encoders()}
    seed = 0
    for prefix, network in parts.items():
        for name, module in network.named_modules():
            wanted = name.endswith(("to_q", "to_k", "to_v", "to_out.0", "q_proj", "out_proj"))
            if not wanted or not isinstance(module, torch.nn.Linear):
                continue
            seed += 1
            level = "text_model." if prefix.startswith("text") and not name.startswith("text_model") else ""
            key = f"{prefix}.{level}{name}"
            tensors[f"{key}.lora.down.weight"] = draw(seed, RANK, module.in_features) / module.in_features**0.5
            tensors[f"{key}.lora.up.weight"] = draw(seed + 1000, module.out_features, RANK) * 0.3
    return tensors


def kohya(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The same in kohya's spelling: flat names, lora_down and lora_up, an alpha for each layer."""
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name, half = key.removesuffix(".weight").rsplit(".lora.", 1)
        part, _, module = name.partition(".")
        both = family == "sdxl"
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if both else "lora_te", "text_encoder_2": "lora_te2"}[
            part
        ]
        flat = f"{prefix}_{module.replace('.', '_')}"
        out[f"{flat}.lora_{half}.weight"] = value
        out[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return out


def spelt_by_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in diffusers' spelling, which has another word for text encoders."""
    return {
        key.replace(".lora.", ".lora_linear_layer.") if key.startswith("text") else key: value
        for key, value in tensors.items()
    }


def peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in peft's spelling: lora_A and lora_B."""
    return {key.replace("lora.down", "lora_A").replace("lora.up", "lora_B"): value for key, value in tensors.items()}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "peft"])
def test_lora_files_act_as_in_diffusers(folders: dict[str, Path], tmp_path: Path, family: str, spelling: str) -> None:
    case = Case(folders[family], family, "euler" if family == "sdxl" else "ddim")
    model = case.model()
    plain = weights(model)
    tensors = {"kohya": kohya(plain, family), "diffusers": spelt_by_diffusers(plain), "peft": peft(plain)}[spelling]
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}

    lora = load_lora(file, model, scale=0.8)
    assert lora.text_layers
    gain = next(iter(lora.layers.values())).gain
    assert gain == (ALPHA / RANK if spelling == "kohya" else 1.0)
    text = model.encode_text(case.prompts, ["blurry, text"], loras=[lora])
    assert not torch.equal(text.embeds, case.text().embeds)
    ours = case.run([text, lora])

    pipe: Any = case.pipeline(fresh=True)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="test")
    pipe.set_adapters(["test"], [0.8])
    theirs = pipe(**case.arguments(), latents=case.noise).images
    assert (ours - theirs).abs().max().item() == 0.0
    assert not torch.equal(ours, case.run([case.text()]))
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())


def test_what_is_no_fitting_lora_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    model = Case(folders["sd15"], "sd15", "ddim").model()
    plain = weights(model)

    def saved(tensors: dict[str, Tensor]) -> Path:
        file = tmp_path / "lora.safetensors"
        save_file(tensors, file)
        return file

    half = dict(plain)
    half.pop(next(key for key in half if "lora.up" in key))
    with pytest.raises(CheckpointBroken, match="one half"):
        load_lora(saved(half), model)
    with pytest.raises(WrongAdapter, match="no LoRA"):
        load_lora(saved({"some.weight": torch.ones(2, 2)}), model)
    with pytest.raises(WrongAdapter, match="DoRA"):
        load_lora(saved({**plain, "unet.x.lora.dora_scale": torch.ones(2)}), model)
    with pytest.raises(WrongBaseModel):
        load_lora(saved(weights(Case(folders["sdxl"], "sdxl", "ddim").model())), model)
