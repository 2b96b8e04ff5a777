"""Tiny bases and adapters whose weights follow from key names alone, and what the published code made of them.

The figures in published.json were computed by the official code of each system (named there, with its commit) on these
very weights and inputs: float32, CPU, one thread, torch 2.13, diffusers 0.42.1; where it fixes a size, with that size
made small. Of each output twelve values, evenly spread, and the largest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.restoration.weights import COUNTER, drawn

FILE = Path(__file__).with_name("published.json")
PUBLISHED: Mapping[str, Any] = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
STEPS = 3


def filled(module: nn.Module) -> Any:
    """The module with weights drawn by their keys, for inference."""
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if COUNTER not in key and value.is_floating_point():
                value.copy_(drawn(key, tuple(value.shape)))
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:  # gates
            parameter.data.copy_(0.5 + drawn(name, ()))
    return module.requires_grad_(False).eval()


def noise(*shape: int, seed: int) -> Tensor:
    """Unit-variance numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base(kind: str, template: Path, folder: Path) -> Path:
    """A diffusers folder like the template's, "sd15" or "sdxl", with tokens 64 or 128 wide and drawn weights."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    pipe: Any = DiffusionPipeline.from_pretrained(template)
    config = pipe.text_encoder.config
    config.hidden_size, config.num_attention_heads = 64, 4
    unet = dict(pipe.unet.config) | {"cross_attention_dim": 128 if kind == "sdxl" else 64}
    parts = {"text_encoder": filled(CLIPTextModel(config)), "unet": filled(UNet2DConditionModel.from_config(unet))}
    if kind == "sdxl":
        second = pipe.text_encoder_2.config
        second.hidden_size, second.num_attention_heads, second.hidden_act = 64, 4, "gelu"
        parts["text_encoder_2"] = filled(CLIPTextModelWithProjection(second))
    for name, part in parts.items():
        setattr(pipe, name, part)
        pipe.register_to_config(**{name: (part.__class__.__module__.split(".")[0], part.__class__.__name__)})
    pipe.save_pretrained(folder)
    return folder


def difference(made: Tensor, name: str) -> float:
    """Largest difference from the published code's values, as a share of its output's largest value."""
    known = PUBLISHED[name]
    assert list(made.shape) == known["shape"]
    flat = made.flatten()
    places = torch.linspace(0, len(flat) - 1, len(known["values"])).long()
    return float((flat[places] - torch.tensor(known["values"])).abs().max()) / known["largest"]


def figures(output: Tensor, source: str) -> dict[str, Any]:
    """What published.json keeps of an output; source: repository and commit."""
    flat = output.detach().flatten()
    values = flat[torch.linspace(0, len(flat) - 1, 12).long()].tolist()
    return {"source": source, "shape": list(output.shape), "values": values, "largest": float(flat.abs().max())}


# --- small adapters -------------------------------------------------------------------------------------------------

CLIP: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}
PHOTOMAKER_CLIP = CLIP | {"hidden_size": 64, "num_attention_heads": 1}
FACE, CODE = 512, 18 * 512


def image_encoder(folder: Path) -> None:
    """`image_encoder/` in the folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    filled(CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP))).save_pretrained(folder / "image_encoder")


def adapter(name: str, model: Any, folder: Path, **more: Any) -> Any:
    """A small adapter of a family, loaded from the official file that is written into the folder."""
    from transformers import CLIPVisionConfig

    from facegen.adapter import find_adapters, load_adapter
    from facegen.adapters.storymaker import PeopleProjection
    from facegen.models.clip import ClipView, load_clip
    from facegen.models.eva import EvaSizes, EvaTower
    from facegen.models.id_tokens import TokenSizes
    from facegen.models.projections import FacePlusProjection, FaceProjection, ProjectionSizes
    from facegen.models.resampler import PerceiverSizes, Resampler

    width, seen = model.text_width, CLIP["hidden_size"]
    heads = max(width // 64, 1)
    reader = PerceiverSizes(seen, width, width, depth=2, heads=heads)
    if name in ("storymaker", "ip_adapter_faceid", "ip_adapter", "id_animator"):
        image_encoder(folder)
        clip = ClipView(load_clip(folder), bgr=False)
    dim = FACE
    small: dict[str, Any] = dict(more)
    if name == "storymaker":
        projector = PeopleProjection(ProjectionSizes(FACE, 2 * FACE, 4, width), reader, reader, queries=16)
        small |= {"clip": clip, "projector": projector, "rank": 4}
    elif name == "photomaker":
        small |= {"vision": CLIPVisionConfig(**PHOTOMAKER_CLIP), "rank": 4}
    elif name == "pulid":
        eva = EvaTower(EvaSizes(width=64, inner=64, output=768, depth=21, head=64, patch=14, image=28))
        sizes = TokenSizes(1280, 64, (64, 64), (64, 64), 64, width, own=5, queries=8, depth=10)
        small |= {"eva": filled(eva), "sizes": sizes}
    elif name == "facechain_fact":
        dim, small["sizes"] = 48, PerceiverSizes(48, 64, width, depth=2, heads=2)
        small["queries"] = 16
    elif name == "id_animator":
        dim, small["sizes"], small["rank"] = seen, reader, 4
    elif name == "precisecontrol":
        dim = CODE
    elif name == "ip_adapter_faceid":
        variant = more["variant"]
        if variant == "unnorm":
            small["projector"] = Resampler(PerceiverSizes(FACE, 64, width, depth=2, heads=1), queries=16)
        elif variant == "portrait":
            small["projector"] = FaceProjection(ProjectionSizes(FACE, 1024, 16, width))
        else:
            small |= {"projector": FacePlusProjection(ProjectionSizes(FACE, 1024, 4, width), reader), "clip": clip}
        small["rank"] = 4
    elif name == "ip_adapter":
        dim = CLIP["projection_dim"] if more["variant"] == "plain" else seen
        if more["variant"] == "plus":
            small["projector"] = Resampler(reader, queries=16)
    made: Any = find_adapters()[name].fresh(model, dim, **small)
    filled(made.modules())
    path = made.save(folder)
    if name == "pulid":
        tower = {f"visual.{key}": value for key, value in small["eva"].state_dict().items()}
        from facegen import checkpoints

        checkpoints.write(folder / "EVA02_CLIP_L_336_psz14_s6B.pt", tower)
    if name == "photomaker":
        return type(made).from_pretrained(path, model, heads=PHOTOMAKER_CLIP["num_attention_heads"])
    return load_adapter(path, model)


ARC_FACE = 48  # numbers of a face embedding here: a token has 64, officially 512 of 768


def arc2face(model: Any, folder: Path) -> Any:
    """Arc2Face with all its parts, from official files."""
    import copy

    from diffusers import ControlNetModel, UNet2DConditionModel

    from facegen.adapters.arc2face import Arc2Face, Expression, Parts
    from facegen.conditions import LoraCondition, LowRankWeights
    from facegen.models.projections import FaceProjection, ProjectionSizes
    from facegen.models.streams import Streams

    made = Arc2Face.fresh(model, ARC_FACE)
    filled(made.encoder)
    unet = UNet2DConditionModel.from_config(model.unet.config)
    with torch.no_grad():
        for key, value in unet.state_dict().items():
            value.copy_(drawn(f"own.{key}", tuple(value.shape)))
    streams = Streams.fresh(model, generator=torch.Generator())
    projector = FaceProjection(ProjectionSizes(55, 55, 4, model.text_width))
    pose = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    layers = {}
    for layer in model.attention_layers:
        if not layer.cross:
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                name = f"{layer.name.removesuffix('.processor')}.{part}"
                down, up = drawn(f"{name}.down", (4, layer.width)), drawn(f"{name}.up", (layer.width, 4))
                layers[name] = LowRankWeights(down=down, up=up)
    parts = Parts(filled(pose), filled(Expression(projector, streams)), LoraCondition(layers=layers))
    whole = Arc2Face(copy.deepcopy(made.encoder), model, unet.eval(), parts)
    whole.save(folder)
    again = Arc2Face.from_pretrained(folder, model)
    again.encoder.config.face_embedding_dim = ARC_FACE
    return again
