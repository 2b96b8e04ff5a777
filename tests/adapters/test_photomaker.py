"""PhotoMaker: where the person stands in the prompt, when, and its two versions' files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen import checkpoints
from facegen.adapter import AdapterRequest, load_adapter
from facegen.adapters.photomaker import PhotoMaker, Version, expanded, phrase, without
from facegen.conditions import LoraCondition, TextCondition
from facegen.errors import CheckpointBroken, WrongBaseModel, WrongRequest
from facegen.models.base import Model
from facegen.models.clip import centre, vision_config
from facegen.models.sdxl import SDXLModel

DIM = 18
PROMPT = "a man img, red"
ASKED = AdapterRequest(height=64, width=64, prompt=PROMPT, negative_prompt="bad")
VERSIONS: tuple[Version, ...] = ("v1", "v2")
Photos = Callable[[int], Any]
Call = Callable[..., Tensor]


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> SDXLModel:
    return SDXLModel.from_pretrained(tiny_sdxl, device="cpu", dtype=torch.float32)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def call(model: Model, calls: Callable[[Model], Call]) -> Call:
    return calls(model)


def made(version: Version, model: Model, width: int = 1024, heads: int = 16) -> PhotoMaker:
    from transformers import CLIPVisionConfig

    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": heads}
    vision = CLIPVisionConfig(**sizes, image_size=112, patch_size=56)
    adapter = PhotoMaker.fresh(model, DIM, version=version, vision=vision, rank=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.modules().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    adapter.modules().requires_grad_(False).eval()
    return adapter


@pytest.fixture(params=VERSIONS)
def photomaker(request: pytest.FixtureRequest, model: Model) -> PhotoMaker:
    return made(request.param, model)


def test_the_word_is_repeated_for_every_token(model: SDXLModel) -> None:
    """As a tokenizer that knows the trigger as a special token, and the official loop over its ids, have it."""
    from transformers import CLIPTokenizer

    assert model.source is not None
    own = CLIPTokenizer.from_pretrained(model.source / "tokenizer")
    own.add_tokens(["img"], special_tokens=True)
    trigger = own.convert_tokens_to_ids("img")
    for prompt, count in ((PROMPT, 1), (PROMPT, 4), ("man img", 2), ("x" * 40 + " img, " + "y" * 60, 3)):
        ids = own(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        place = ids.index(trigger) - 1
        ids.remove(trigger)
        wanted = ids[:place] + [ids[place]] * count + ids[place + 1 :]
        wanted = (wanted + [own.pad_token_id] * 77)[:77]
        assert expanded(prompt, model.tokenizer, model, count) == (wanted, place)
        spelt = own.encode(prompt, add_special_tokens=False)
        spelt.remove(trigger)
        assert without(prompt, model) == own.decode(spelt)
    with pytest.raises(WrongRequest, match="no room for 80 tokens"):
        expanded(PROMPT, model.tokenizer, model, 80)
    with pytest.raises(WrongRequest, match="nearer to its beginning"):
        expanded("x" * 90 + " img", model.tokenizer, model, 1)


def test_the_trigger_is_put_behind_the_person() -> None:
    assert phrase("") == "a portrait of a person img"
    assert phrase("a young Woman with a man") == "a young Woman img with a man"
    assert phrase("a cat img") == "a cat img"
    for wrong, why in (("img a man", "stands behind"), ("a man img and img", "not 2 times"), ("a cat", "no word for")):
        with pytest.raises(WrongRequest, match=why):
            phrase(wrong)


def test_plain_then_personal(photomaker: PhotoMaker, model: SDXLModel, photos: Photos) -> None:
    plain, personal, lora = photomaker.conditions([photos(1), photos(2)], ASKED, model)
    assert isinstance(plain, TextCondition)
    assert isinstance(personal, TextCondition)
    assert isinstance(lora, LoraCondition)
    text = model.encode_text([without(PROMPT, model)], "bad")
    assert torch.equal(plain.embeds, text.embeds)
    assert plain.pooled is not None
    assert personal.pooled is not None
    count = 2 * (1 if photomaker.version == "v1" else 2)
    ids, place = expanded(PROMPT, model.tokenizer, model, count)
    row = torch.tensor([ids])
    embeds, pooled = model.read(row, row)
    assert torch.equal(personal.pooled[1], pooled)
    assert torch.equal(personal.pooled[0], plain.pooled[0])
    assert torch.equal(personal.embeds[0], plain.embeds[0]), "nobody in the negative prompt"
    person = slice(place, place + count)
    words = personal.embeds[1, 0].clone()
    assert not torch.allclose(words[person], embeds[0, person], atol=1e-3)
    words[person] = embeds[0, person]
    assert torch.equal(words, embeds[0]), "all other words stay"
    acts = [personal.strength(step, 50) for step in range(50)]
    assert acts == [0.0] * 11 + [1.0] * 39, "steps 0 to 10 are the prompt's alone"
    assert (lora.scale, lora.span) == (1.0, (0.0, 1.0))


def test_what_each_version_reads(model: SDXLModel, photos: Photos) -> None:
    pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(3))
    embedding = torch.randn(1, DIM, generator=torch.Generator().manual_seed(4))
    first, second = (made(version, model).encoder for version in VERSIONS)
    seen = first.vision_model(pixels)
    pooled = first.vision_model.post_layernorm(seen.last_hidden_state[:, 0])
    wanted = torch.cat([first.visual_projection(pooled), first.visual_projection_2(pooled)], dim=-1)
    assert torch.allclose(first.people(pixels)[:, 0], wanted, atol=1e-6)
    reader = second.qformer_perceiver
    assert reader is not None
    queries = reader.token_norm(reader.token_proj(embedding).view(1, 2, -1))
    patches = second.vision_model(pixels).last_hidden_state
    assert patches.shape[1] == 5, "the class token too, and without the last norm"
    wanted = queries + reader.perceiver_resampler(queries, patches)
    assert torch.allclose(second.people(pixels, embedding), wanted, atol=1e-6)


def test_whole_photos_as_clip_sees_them(photos: Photos) -> None:
    from transformers import CLIPImageProcessorPil

    for seed, size in ((1, (96, 128)), (2, (301, 140)), (3, (224, 224))):
        image = photos(seed).image.resize(size)
        wanted = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)(image, return_tensors="np").pixel_values[0]
        assert (centre(image, 224) == wanted.transpose(1, 2, 0)).all()


def test_strength_zero_is_the_prompt_alone(
    photomaker: PhotoMaker, model: SDXLModel, call: Call, photos: Photos
) -> None:
    conditions = photomaker.conditions([photos(1)], replace(ASKED, scale=0.0), model)
    assert torch.equal(call(conditions), call([], text=model.encode_text([without(PROMPT, model)], "bad")))
    half = photomaker.conditions([photos(1)], replace(ASKED, scale=0.5), model)
    assert half[-1].scale == 0.5
    assert not torch.equal(call(half), call(photomaker.conditions([photos(1)], ASKED, model)))
    with pytest.raises(WrongRequest, match="no mask"):
        photomaker.conditions([photos(1)], replace(ASKED, mask=torch.ones(1, 64, 64)), model)


@pytest.mark.parametrize("safe", [False, True])
def test_official_layout(
    photomaker: PhotoMaker, model: SDXLModel, call: Call, photos: Photos, tmp_path: Path, safe: bool
) -> None:
    file = photomaker.save(tmp_path, safe=safe)
    assert file.stem == f"photomaker-{photomaker.version}"
    if not safe:
        content = torch.load(file, weights_only=True)
        assert list(content) == ["id_encoder", "lora_weights"], "the official loader compares the list"
        assert next(iter(content["lora_weights"])).startswith("unet.down_blocks.1.attentions.0.tra")
        top = {key.split(".")[0] for key in content["id_encoder"]}
        wanted = {"vision_model", "visual_projection", "visual_projection_2", "fuse_module"}
        assert top == wanted | ({"qformer_perceiver"} if photomaker.version == "v2" else set())
    again = load_adapter(file, model)
    first, second = (call(one.conditions([photos(1)], ASKED, model)) for one in (photomaker, again))
    assert torch.equal(first, second)


def test_spellings_of_the_lora(photomaker: PhotoMaker, model: SDXLModel, tmp_path: Path) -> None:
    file = photomaker.save(tmp_path)
    tensors = checkpoints.read(file)
    peft = {}
    for key, value in tensors.items():
        new = key.replace(".processor.to_out_lora", ".to_out.0_lora").replace(".processor.", ".")
        peft[new.replace("_lora.down.", ".lora_A.").replace("_lora.up.", ".lora_B.")] = value
    assert peft.keys() != tensors.keys()
    checkpoints.write(tmp_path / "photomaker.bin", peft)
    again = load_adapter(tmp_path / "photomaker.bin", model)
    assert isinstance(again, PhotoMaker)
    assert again.layers.keys() == photomaker.layers.keys()
    for name, low in photomaker.layers.items():
        assert torch.equal(again.layers[name].down, low.down)
        assert torch.equal(again.layers[name].up, low.up)


def test_files_that_do_not_fit(photomaker: PhotoMaker, model: SDXLModel, tmp_path: Path, tiny_sd15: Path) -> None:
    file = photomaker.save(tmp_path)
    tensors = checkpoints.read(file)

    def broken(without: str, **more: Tensor) -> Path:
        left = {key: value for key, value in tensors.items() if not key.startswith(without)}
        return checkpoints.write(tmp_path / "broken.bin", {**left, **more})

    lost = ["lora_weights.", "id_encoder.fuse_module.layer_norm.weight", "id_encoder.vision_model.embeddings.p"]
    if photomaker.version == "v2":
        lost.append("id_encoder.qformer_perceiver.perceiver_resampler.layers.")
    for part in lost:
        with pytest.raises(CheckpointBroken, match=f"lacks {part.rstrip('.')}"):
            load_adapter(broken(part), model)
    with pytest.raises(CheckpointBroken, match=r"do not belong there: lora_weights\.x\.bias"):
        load_adapter(broken("nothing", **{"lora_weights.x.bias": torch.zeros(1)}), model)
    with pytest.raises(WrongBaseModel, match="a base model with text tokens 64 wide"):
        load_adapter(file, Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32))


def test_beside_another_adapter(
    photomaker: PhotoMaker, model: SDXLModel, photos: Photos, call: Call, weights: Path
) -> None:
    from facegen.adapters.ip_adapter_faceid import IPAdapterFaceID
    from facegen.models.projections import FaceProjection, ProjectionSizes

    projector = FaceProjection(ProjectionSizes(DIM, 8, 2, model.text_width))
    other = IPAdapterFaceID.fresh(model, DIM, projector=projector, rank=2).conditions([photos(2)], ASKED, model)
    mine = photomaker.conditions([photos(1)], ASKED, model)
    both = call([*mine, *other])
    assert torch.allclose(both, call([*other, *mine]), atol=1e-5)
    assert not torch.allclose(both, call(mine), atol=1e-4)
    assert torch.equal(call([*mine, *(replace(one, scale=0.0) for one in other)]), call(mine))


def test_heads_that_no_published_encoder_has_must_be_said(model: SDXLModel, tmp_path: Path) -> None:
    saved = made("v1", model, width=24, heads=3).save(tmp_path)
    with pytest.raises(WrongRequest, match=r"24 wide, .* does not say how many heads it has; give heads="):
        load_adapter(saved, model)
    with pytest.raises(WrongRequest, match="24 wide cannot have 5 heads; they must divide its width"):
        PhotoMaker.from_pretrained(saved, model, heads=5)
    read = PhotoMaker.from_pretrained(saved, model, heads=3)
    assert read.encoder.vision_model.config.num_attention_heads == 3


@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (1280, 16)])
def test_heads_of_the_published_encoders(width: int, heads: int) -> None:
    """By their shapes alone; ViT-H's heads are 80 wide."""
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": (257, width),
        "encoder.layers.0.mlp.fc1.weight": (4 * width, width),
    }
    assert vision_config(shapes).num_attention_heads == heads
