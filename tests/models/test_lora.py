"""LoRA files of every spelling give what diffusers makes of them, and leave the model as it was.

Tiny SD 1.x and SDXL, 5 DDIM or Euler steps; the same arithmetic (W x + up(down(x))·gain) in the same order: max
difference 0.0.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import against_diffusers
import pytest
import torch
from against_diffusers import Case, draw
from safetensors.torch import save_file
from torch import Tensor

from facegen.attention.processor import install
from facegen.conditions import LoraCondition
from facegen.errors import CheckpointBroken, WeightsMissing, WrongAdapter, WrongBaseModel, WrongRequest
from facegen.models.base import Model
from facegen.models.lora import load_lora
from facegen.models.lora_blocks import in_blocks
from facegen.models.lora_names import sgm

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


def layers_of(model: Model, *, convolutions: bool) -> dict[str, Tensor]:
    """A LoRA in peft's spelling on every layer of the UNet (convolutions too: LoCon, LCM-LoRA) and the text encoders,
    of a rank of its own in each.
    """
    tensors: dict[str, Tensor] = {}
    seed = 0
    for prefix, network in {"unet": model.unet, **model.text_encoders()}.items():
        for name, module in network.named_modules():
            conv = isinstance(module, torch.nn.Conv2d)
            if not (conv and convolutions) and not isinstance(module, torch.nn.Linear):
                continue
            if not convolutions and "attentions" not in name and prefix == "unet":
                continue
            seed += 1
            rank = RANK + (seed % 3 if prefix == "unet" else 0)
            weight = module.get_parameter("weight")
            level = "text_model." if prefix.startswith("text") and not name.startswith("text_") else ""
            down, ones = draw(seed, rank, *weight.shape[1:]), (1,) * (weight.ndim - 2)
            tensors[f"{prefix}.{level}{name}.lora_A.weight"] = down / weight[0].numel() ** 0.5
            tensors[f"{prefix}.{level}{name}.lora_B.weight"] = draw(seed + 1000, weight.shape[0], rank, *ones) * 0.1
    return tensors


def in_kohyas(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The same in kohya's spelling."""
    halves = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for key, value in tensors.items()}
    return kohya(halves, family)


def official(tensors: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """kohya's spelling of SDXL's UNet, which follows Stability's own code."""
    names = {
        f"lora_unet_{name.replace('.', '_')}": f"lora_unet_{sgm(model.unet, name).replace('.', '_')}"
        for name, module in model.unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    split = {key: key.split(".", 1) for key in tensors}
    return {f"{names.get(split[key][0], split[key][0])}.{split[key][1]}": value for key, value in tensors.items()}


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random network enlarges the last bit's rounding from step to step; of one step it is what it is."""
    monkeypatch.setattr(against_diffusers, "STEPS", 1)


def theirs(case: Case, *files: Path, weights: list[Any]) -> Tensor:
    """diffusers' pipeline wearing the files."""
    pipe: Any = case.pipeline(fresh=True)
    names = [f"lora{place}" for place in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipe.set_adapters(names, weights)
    return pipe(**case.arguments(), latents=case.noise).images


def ours(case: Case, *loras: LoraCondition) -> Tensor:
    """Our loop wearing them."""
    text = case.model().encode_text(case.prompts, ["blurry, text"], loras=loras)
    return case.run([text, *loras])


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, against the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.usefixtures("one_step")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_convolutions_act_as_in_diffusers(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    """LoCon's and LCM-LoRA's layers: linear layers and convolutions, of different ranks."""
    case = Case(folders[family], family, "euler" if family == "sdxl" else "ddim")
    file = tmp_path / "locon.safetensors"
    # diffusers confuses conv_in and the time embeddings of kohya's files with layers of the blocks.
    inside = {k: v for k, v in layers_of(case.model(), convolutions=True).items() if ".0." in k or "mid_block" in k}
    save_file(in_kohyas(inside, family), file)
    lora = load_lora(file, case.model(), scale=0.7)
    assert {low.down.shape[0] for low in lora.layers.values()} == {4, 5, 6}
    found = ours(case, lora)
    assert far(found, theirs(case, file, weights=[0.7])) <= 1e-5
    assert far(found, case.run([case.text()])) > 1e-3


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_layer_has_its_own_alpha(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Against weights into which W + alpha/r · up · down was written; diffusers takes one alpha for all attentions."""
    model = Case(folders[family], family, "ddim").model()
    plain = in_kohyas(layers_of(model, convolutions=True), family)
    alphas = [key for key in plain if key.endswith(".alpha")]
    plain |= {key: torch.tensor(1.0 + place % 4) for place, key in enumerate(alphas)}
    file = tmp_path / "alphas.safetensors"
    save_file(plain, file)
    lora = load_lora(file, model)
    assert lora.text_layers
    assert len(lora.layers) + len(lora.text_layers) == len(alphas)
    written = copy.copy(model)
    written.unet = copy.deepcopy(model.unet)
    written.attention_layers = install(written.unet)
    for name, low in lora.layers.items():
        weight = written.unet.get_submodule(name).get_parameter("weight")
        rank = low.down.shape[0]
        alpha = plain[f"lora_unet_{name.replace('.', '_')}.alpha"].item()
        added = (low.up.flatten(1).double() @ low.down.flatten(1).double()) * (alpha / rank)
        weight.data = (weight.double() + added.view_as(weight)).float()
    text = model.encode_text(["a face"])
    noise = draw(3, 2, 4, 8, 8)
    outputs = []
    for one, conditions in ((model, [text, lora]), (written, [text])):
        with torch.no_grad(), one.prepare(conditions, 1, True) as prepared:
            outputs.append(one.predict(noise, 500, prepared.throughout()))
    assert far(*outputs) <= 1e-5


def test_kohyas_names_of_sdxl(folders: dict[str, Path], tmp_path: Path) -> None:
    case = Case(folders["sdxl"], "sdxl", "ddim")
    plain = in_kohyas(layers_of(case.model(), convolutions=True), "sdxl")
    files = [tmp_path / "own.safetensors", tmp_path / "sgm.safetensors"]
    save_file(plain, files[0])
    save_file(official(plain, case.model()), files[1])
    one, other = (load_lora(file, case.model()) for file in files)
    assert set(official(plain, case.model())) != set(plain)
    assert one.layers.keys() == other.layers.keys()
    assert all(torch.equal(low.down, other.layers[name].down) for name, low in one.layers.items())


@pytest.mark.usefixtures("one_step")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_stacked_with_weights_per_block(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    case = Case(folders[family], family, "euler" if family == "sdxl" else "ddim")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    tensors = layers_of(case.model(), convolutions=False)
    save_file(tensors, files[0])
    save_file({key: value * 0.5 if "lora_A" in key else value for key, value in tensors.items()}, files[1])
    up = "0" if family == "sdxl" else "1"
    blocks = {"down": 0.4, "mid": 0.0, f"up.{up}": [0.3, 1.2], "text": 0.6}
    same = {"unet": {"down": 0.4, "mid": 0.0, "up": {f"block_{up}": [0.3, 1.2]}}, "text_encoder": 0.6}
    if family == "sdxl":
        same["text_encoder_2"] = 0.6
    model = case.model()
    before = digest(model)
    loras = [in_blocks(load_lora(files[0], model), blocks, model), load_lora(files[1], model, scale=-0.5)]
    found = ours(case, *loras)
    assert far(found, theirs(case, *files, weights=[same, -0.5])) <= 1e-5
    assert digest(model) == before
    assert not any(module._forward_hooks for module in model.unet.modules())
    assert far(found, ours(case, load_lora(files[0], model), loras[1])) > 1e-3
    assert any(name.startswith("down_blocks") for name in loras[0].layers)
    assert not any(name.startswith("mid_block") for name in loras[0].layers)


def digest(model: Model) -> dict[str, float]:
    """Every number of the model, summed by tensor in float64."""
    networks = {"unet": model.unet, "vae": model.vae, **model.text_encoders()}
    return {f"{n}.{k}": v.double().sum().item() for n, net in networks.items() for k, v in net.state_dict().items()}


def test_kohyas_list_of_blocks(folders: dict[str, Path], tmp_path: Path) -> None:
    """The tiny SD 1.x has IN00 to IN03, M00 and OUT00 to OUT03; IN01, M00, OUT02 and OUT03 attend."""
    model = Case(folders["sd15"], "sd15", "ddim").model()
    file = tmp_path / "lora.safetensors"
    save_file(layers_of(model, convolutions=True), file)
    lora = load_lora(file, model)

    def strengths(blocks: Any) -> dict[str, float]:
        worn = in_blocks(lora, blocks, model)
        everything = {**worn.layers, **(worn.text_layers or {})}
        full = {**lora.layers, **(lora.text_layers or {})}
        return {name: everything[name].gain / low.gain if name in everything else 0.0 for name, low in full.items()}

    whole = strengths({"lbw": [0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9]})
    expected = {
        "conv_in": 1,
        "down_blocks.0.resnets.0.conv1": 2,
        "down_blocks.0.downsamplers.0.conv": 3,
        "down_blocks.1.resnets.0.conv2": 4,
        "mid_block.resnets.1.conv1": 5,
        "up_blocks.0.resnets.0.conv1": 6,
        "up_blocks.0.upsamplers.0.conv": 7,
        "up_blocks.1.attentions.0.proj_in": 8,
        "up_blocks.1.resnets.1.conv1": 9,
        "time_embedding.linear_1": 0.5,
        "conv_out": 0.5,
    }
    assert {name: whole[name] for name in expected} == pytest.approx(expected)
    assert {value for name, value in whole.items() if name.startswith("text")} == {0.5}
    short = strengths({"lbw": (1, 2, 3, 4, 5)})
    assert short["down_blocks.0.attentions.0.proj_in"] == pytest.approx(2)
    assert short["down_blocks.1.resnets.0.conv1"] == 0
    assert short["up_blocks.1.attentions.1.proj_in"] == pytest.approx(5)
    named = strengths({"down": 0.5, "down.0.0": 2, "mid": 3, "rest": 0})
    assert named["down_blocks.0.resnets.0.conv1"] == pytest.approx(2)
    assert named["down_blocks.0.downsamplers.0.conv"] == named["down_blocks.1.resnets.0.conv1"] == pytest.approx(0.5)
    assert named["mid_block.attentions.0.proj_in"] == pytest.approx(3)
    assert (named["conv_in"], named["up_blocks.0.resnets.0.conv1"]) == (0, 1)
    for wrong, says in (
        ({"down.7": 1}, "no block 'down.7'"),
        ({"mid": [1, 2]}, "one number"),
        ({"down": [1, 2, 3]}, "one number, or 2"),
        ({"lbw": [1, 2, 3]}, "10 numbers .* or 5 .* not 3"),
        ({"lbw": 1}, "one list"),
    ):
        with pytest.raises(WrongRequest, match=says):
            in_blocks(lora, wrong, model)


@pytest.mark.usefixtures("one_step")
def test_alphas_that_peft_and_diffusers_keep_elsewhere(folders: dict[str, Path], tmp_path: Path) -> None:
    """peft writes alpha beside the weights, diffusers into the file's header; the files are made by themselves."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    case = Case(folders["sd15"], "sd15", "ddim")
    pipe: Any = case.pipeline(fresh=True)
    config = LoraConfig(
        r=4, lora_alpha=6, alpha_pattern={"attn2.to_k": 2}, use_rslora=True, target_modules=["to_q", "to_k"]
    )
    wrapped: Any = get_peft_model(pipe.unet, config)
    fill_lora(wrapped)
    weights = get_peft_model_state_dict(wrapped)
    wrapped.save_pretrained(tmp_path / "peft" / "unet")
    kind: Any = type(pipe)
    kind.save_lora_weights(
        tmp_path / "diffusers",
        unet_lora_layers={key.removeprefix("base_model.model."): value for key, value in weights.items()},
        **_collate_lora_metadata({"unet": wrapped}),
    )
    file = tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
    expected = theirs(case, file, weights=[1.0])
    for place in (tmp_path / "peft", tmp_path / "peft" / "unet", file, file.parent):
        lora = load_lora(place, case.model())
        gains = {name.split(".")[-2:][0]: low.gain for name, low in lora.layers.items() if name.endswith("to_k")}
        assert gains == {"attn1": 3.0, "attn2": 1.0}
        assert far(ours(case, lora), expected) <= 1e-5
    with pytest.raises(WeightsMissing, match="no LoRA"):
        load_lora(tmp_path, case.model())


def fill_lora(network: torch.nn.Module) -> None:
    """peft's own start changes nothing."""
    with torch.no_grad():
        for place, (name, parameter) in enumerate(network.named_parameters()):
            if "lora_" in name:
                parameter.copy_(draw(place, *parameter.shape) * 0.2)


def test_lycoris_tucker_form_is_one_convolution(folders: dict[str, Path], tmp_path: Path) -> None:
    model = Case(folders["sd15"], "sd15", "ddim").model()
    width, name = 16, "down_blocks.0.resnets.0.conv1"
    down, mid, up = draw(1, 4, width, 1, 1), draw(2, 4, 4, 3, 3), draw(3, width, 4, 1, 1)
    key = f"lora_unet_{name.replace('.', '_')}"
    file = tmp_path / "tucker.safetensors"
    halves = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"{key}.{half}": value for half, value in halves.items()}, file)
    low = load_lora(file, model).layers[name]
    x = draw(4, 1, width, 8, 8)
    conv = torch.nn.functional.conv2d
    slowly = conv(conv(conv(x, down), mid, padding=1), up)
    at_once = conv(conv(x, low.down, padding=1), low.up)
    assert low.gain == 0.5
    assert far(at_once, slowly) <= 1e-5


def test_keys_that_fit_nothing_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    model = Case(folders["sd15"], "sd15", "ddim").model()
    plain = weights(model)
    file = tmp_path / "style.safetensors"
    stray = {
        f"lora_unet_nowhere_{place}.lora_{half}.weight": torch.ones(2, 2) for place in "abcd" for half in ("up", "down")
    }
    save_file({**kohya(plain, "sd15"), **stray}, file)
    with pytest.raises(WrongBaseModel) as error:
        load_lora(file, model)
    said = str(error.value)
    assert "style.safetensors" in said
    assert "4 of its" in said
    assert "lora_unet_nowhere_a" in said
    assert "1 more" in said
    assert "\n" not in said
    save_file({**plain, "bundle_emb.word.string_to_param.*": torch.ones(2, 2)}, file)
    with pytest.raises(WrongAdapter, match=r"bundle_emb\.word"):
        load_lora(file, model)
    save_file(
        {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 1, 1), "unet.conv_in.lora_B.weight": torch.ones(16, 2, 1, 1)},
        file,
    )
    with pytest.raises(WrongBaseModel, match="kernel"):
        load_lora(file, model)
