"""StoryMaker: several people in one row of tokens, what each is read from, and the LoRA's strength."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from facegen import checkpoints
from facegen.adapter import AdapterRequest, load_adapter
from facegen.adapters.storymaker import Character, StoryMaker, cut_out
from facegen.conditions import TokenCondition
from facegen.errors import CheckpointBroken, WrongAdapter, WrongMask, WrongRequest
from facegen.models.base import Model

DIM = 18
EACH = 2 + 3  # tokens of a small one's faces and bodies
ASKED = AdapterRequest(height=64, width=64)
Photos = Callable[[int], Any]
Call = Callable[..., Tensor]


@pytest.fixture
def storymaker(fresh: Callable[[str], StoryMaker]) -> StoryMaker:
    adapter = fresh("storymaker")
    adapter.modules().requires_grad_(False)
    return adapter


def condition(adapter: StoryMaker, characters: list[Character], model: Model) -> TokenCondition:
    (one,) = adapter.people(characters, model, ASKED)
    assert isinstance(one, TokenCondition)
    return one


def test_background_first_then_face_and_body_of_each(storymaker: StoryMaker, model: Model, photos: Photos) -> None:
    projector = storymaker.projector
    faces = [photos(1), photos(2)]
    request = storymaker.views([Character(face=face) for face in faces], ASKED)
    both = condition(storymaker, [Character(face=face) for face in faces], model).tokens
    assert both.shape == (2, 1, 3 * EACH, model.text_width)
    assert torch.equal(both[:, 0, :EACH], projector.bg_embed.expand(2, -1, -1)), "of the other half too"
    assert request.clip is not None
    assert request.body is not None
    for place, face in enumerate(faces):
        vector = torch.nn.functional.normalize(torch.tensor(face.embedding), dim=0)
        views = [storymaker.clip.features(one[place : place + 1]) for one in (request.clip, request.body)]
        for half, (embedding, (seen, body)) in enumerate(
            ((torch.zeros(DIM), [torch.zeros_like(one) for one in views]), (vector, views))
        ):
            queries = projector.norm(projector.proj(embedding).view(1, 2, -1))
            first = queries + projector.perceiver_resampler(queries, seen)
            whole = torch.cat([first, projector.resample(body)], dim=1) + projector.pos_embed[place]
            wanted = projector.norm_out(projector.proj_out(whole)) + whole
            got = both[half, 0, EACH * (1 + place) : EACH * (2 + place)]
            assert torch.allclose(got, wanted[0], atol=1e-5)


def test_the_embedding_goes_in_at_length_one(storymaker: StoryMaker, photos: Photos) -> None:
    request = storymaker.views([Character(face=photos(1))], ASKED)
    embedding = torch.randn(1, DIM, generator=torch.Generator().manual_seed(2))
    near, far = (storymaker.tokens(embedding * length, request) for length in (1.0, 7.0))
    assert torch.allclose(near, far, atol=1e-5)


def test_people_have_their_places(storymaker: StoryMaker, model: Model, photos: Photos) -> None:
    first, second = Character(face=photos(1)), Character(face=photos(2))
    one, other = (condition(storymaker, row, model).tokens for row in ([first, second], [second, first]))
    assert not torch.allclose(one[1, 0, EACH : 2 * EACH], other[1, 0, 2 * EACH :], atol=1e-4)
    with pytest.raises(WrongRequest, match="at most 3 people in a picture, not 4"):
        storymaker.people([first] * 4, model, ASKED)
    with pytest.raises(WrongRequest, match="at least one photo"):
        storymaker.people([], model, ASKED)


def test_clothes_replace_the_body(storymaker: StoryMaker, model: Model, photos: Photos) -> None:
    plain = condition(storymaker, [Character(face=photos(1))], model).tokens
    clothes = condition(storymaker, [Character(face=photos(1), clothes=photos(5).image)], model).tokens
    assert torch.equal(plain[0], clothes[0])
    assert torch.equal(plain[1, 0, EACH : EACH + 2], clothes[1, 0, EACH : EACH + 2]), "the face is the same"
    assert not torch.allclose(plain[1, 0, EACH + 2 :], clothes[1, 0, EACH + 2 :], atol=1e-4)


def test_the_photo_is_needed(storymaker: StoryMaker, model: Model) -> None:
    class Bare:
        embedding = np.ones(DIM, np.float32)

    with pytest.raises(WrongRequest, match="looks at the photo"):
        storymaker.conditions([Bare()], ASKED, model)
    with pytest.raises(WrongRequest, match="not its embedding alone"):
        storymaker.conditions_from_embeddings(torch.ones(1, DIM), model)
    pixels = torch.zeros(2, 3, 112, 112)
    with pytest.raises(WrongRequest, match="2 crops do not fit 3 pictures of 1 people"):
        storymaker.tokens(torch.ones(3, DIM), replace(ASKED, clip=pixels, body=pixels))


def test_cutting_out() -> None:
    photo = Image.new("RGB", (40, 60), (10, 20, 30))
    mask = torch.zeros(1, 60, 40)
    mask[:, 10:50, 5:25] = 1
    mask[:, 20:30, 10:20] = 0
    person = np.asarray(cut_out(photo, mask))
    assert person.shape == (40, 20, 3), "cut to the mask's box"
    assert tuple(person[0, 0]) == (10, 20, 30), "its corner is the person"
    assert tuple(person[15, 10]) == (255, 255, 255), "a hole is white"
    assert 10 < person[10, 8, 0] < 255, "the edge is soft"
    assert cut_out(photo, None) is photo
    with pytest.raises(WrongMask, match="60×40 pixels but the photo is 40×60"):
        cut_out(photo, torch.ones(1, 40, 60))
    with pytest.raises(WrongMask, match="is empty"):
        cut_out(photo, torch.zeros(1, 60, 40))


def test_lora_scale(storymaker: StoryMaker, model: Model, photos: Photos, call: Call) -> None:
    conditions = storymaker.conditions([photos(1)], ASKED, model)
    (stream,) = conditions
    assert isinstance(stream, TokenCondition)
    assert stream.scale == storymaker.lora_scale == 0.8
    assert stream.lora is not None
    assert set(stream.lora) == {layer.index for layer in model.attention_layers}, "self-attention too"
    whole = call(conditions)
    storymaker.lora_scale = 0.0
    without = call([replace(stream, lora=None)])
    assert torch.allclose(call(conditions), without, atol=1e-6)
    assert not torch.allclose(whole, without, atol=1e-4)


def test_official_layout(storymaker: StoryMaker, model: Model, tmp_path: Path) -> None:
    file = storymaker.save(tmp_path)
    assert file.name == "mask.bin"
    content = torch.load(file, weights_only=True)
    assert list(content) == ["image_proj_model", "ip_adapter"]
    assert {key.split(".")[0] for key in content["image_proj_model"]} == {
        *("proj", "norm", "perceiver_resampler", "resample", "pos_embed", "bg_embed", "proj_out", "norm_out")
    }
    last = max(layer.index for layer in model.attention_layers)
    assert {f"{last}.to_k_ip.weight", f"{last - 1}.to_out_lora.up.weight"} <= set(content["ip_adapter"])


@pytest.mark.parametrize("key", ["image_proj_model.pos_embed", "image_proj_model.resample.proj_in.weight"])
def test_missing_keys_are_named(storymaker: StoryMaker, model: Model, tmp_path: Path, key: str) -> None:
    file = storymaker.save(tmp_path)
    tensors = checkpoints.read(file)
    checkpoints.write(file, {name: value for name, value in tensors.items() if name != key})
    with pytest.raises(CheckpointBroken, match=f"lacks .*{key.removeprefix('image_proj_model.')}"):
        load_adapter(file, model)


def test_an_image_encoder_that_does_not_fit(storymaker: StoryMaker, model: Model, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    other = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=112, patch_size=56, projection_dim=8))
    other.save_pretrained(tmp_path / "image_encoder")
    with pytest.raises(WrongAdapter, match="reads CLIP tokens 24 wide, the image encoder beside it gives 8"):
        load_adapter(storymaker.save(tmp_path), model)


def test_beside_another_adapter(
    storymaker: StoryMaker, model: Model, photos: Photos, call: Call, fresh: Callable[[str], Any]
) -> None:
    mine = storymaker.conditions([photos(1)], ASKED, model)
    other = fresh("pulid").conditions([photos(2)], ASKED, model)
    both = call([*mine, *other])
    assert torch.allclose(both, call([*other, *mine]), atol=1e-5)
    assert not torch.allclose(both, call(mine), atol=1e-4)
    none = [replace(one, scale=0.0) for one in other]
    assert torch.equal(call([*mine, *none]), call(mine))
