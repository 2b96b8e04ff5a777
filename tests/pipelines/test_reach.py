"""What the published systems can do besides a face and a prompt, asked for by fields of the request."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen import examples
from facegen.adapter import find_adapters
from facegen.errors import WrongMask, WrongRequest
from facegen.images import to_tensor
from facegen.pipelines.generate import GeneratePipeline, GenerateRequest
from facegen.request import from_json, parse, person_words, specs, to_json

QUICK: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "seed": 1}
Drawn = Callable[[int], Image.Image]
DIM = 16


def pixels(pipe: GeneratePipeline, **fields: Any) -> np.ndarray:
    return np.asarray(pipe(**{**QUICK, **fields}).images[0], dtype=np.int16)


@pytest.fixture(scope="session")
def small() -> Any:
    """How the tests of the adapters make small ones."""
    path = Path(__file__).parents[1] / "adapters" / "conftest.py"
    spec = importlib.util.spec_from_file_location("adapters_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wearing(
    pipe: GeneratePipeline, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., GeneratePipeline]:
    """wearing("pulid"): the pipeline with a small adapter of that family."""

    def wear(name: str, dim: int = DIM) -> GeneratePipeline:
        home = tmp_path / "home"
        small.write_weights(home)
        monkeypatch.setenv("FACEGEN_HOME", str(home))
        pipe.load_adapter(small.make(name, pipe.model, home, dim).save(tmp_path / "weights"))
        return pipe

    return wear


def controlnet(pipe: GeneratePipeline) -> Any:
    """One that changes something."""
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    net = ControlNetModel.from_unet(pipe.model.unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return net.requires_grad_(False).eval()


# --- any model ------------------------------------------------------------------------------------------------------


def test_from_a_picture(pipe: GeneratePipeline, drawn: Drawn) -> None:
    picture = drawn(3).resize((64, 64))
    much, little = (pixels(pipe, image=picture, change=change) for change in (1.0, 0.34))
    assert not np.array_equal(much, pixels(pipe)), "even a change of 1 begins with the noised picture"
    latents = pipe.model.encode_image(to_tensor(picture)[None])
    kept = np.asarray(pipe.model.decode(latents)[0].permute(1, 2, 0)) * 255
    assert np.abs(little - kept).mean() < np.abs(much - kept).mean()
    with pytest.raises(WrongRequest, match=r"change of 0\.1 in 3 steps leaves no step"):
        pipe(image=picture, change=0.1, **QUICK)


def test_further_controlnets(pipe: GeneratePipeline, tmp_path: Path, drawn: Drawn) -> None:
    controlnet(pipe).save_pretrained(tmp_path / "depth")
    folder = str(tmp_path / "depth")
    plain = pixels(pipe)
    assert not np.array_equal(pixels(pipe, controlnets={folder: 0.7}, control_images=drawn(1)), plain)
    assert np.array_equal(pixels(pipe, controlnets={folder: 0.0}, control_images=drawn(1)), plain)
    with pytest.raises(WrongRequest, match="1 controlnets but 0 control_images"):
        GenerateRequest(controlnets=folder)


def test_weighted_prompts(pipe: GeneratePipeline) -> None:
    strong, weak, even, plain = (
        pixels(pipe, prompt=prompt, weighted=True)
        for prompt in ("a (red:1.4) hat", "a (red:0.4) hat", "a (red:1) hat", "a red hat")
    )
    assert not np.array_equal(strong, weak)
    assert np.array_equal(even, plain)


# --- the person -----------------------------------------------------------------------------------------------------


def test_where_and_when_the_person_acts(pipe: GeneratePipeline, tiny: Path, drawn: Drawn) -> None:
    pipe.load_adapter(tiny / "adapters" / "instantid")
    me: dict[str, Any] = {"faces": drawn(1), "prompt": "a portrait"}
    plain, whole = pixels(pipe, prompt="a portrait"), pixels(pipe, **me)
    white, black = Image.new("L", (64, 64), 255), Image.new("L", (64, 64))
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    assert np.abs(pixels(pipe, **me, where=white) - whole).max() <= 1
    assert not np.array_equal(pixels(pipe, **me, where=half), whole)
    with pytest.raises(WrongMask, match="Where is empty"):
        pipe(**me, where=black, **QUICK)
    with pytest.raises(WrongRequest, match="leave out where"):
        GenerateRequest(people=["a.png"], where="w.png")
    assert np.array_equal(pixels(pipe, **me, delay=1.0), plain)
    assert not np.array_equal(pixels(pipe, **me, delay=0.5), whole)


@pytest.mark.parametrize("what", [{"edits": {"smile": 1.0}}, {"manner": "style"}])
def test_what_no_adapter_knows_is_refused(
    pipe: GeneratePipeline, tiny: Path, drawn: Drawn, what: dict[str, Any]
) -> None:
    pipe.load_adapter(tiny / "adapters" / "instantid")
    with pytest.raises(WrongRequest, match=rf"None of the adapters that act \(instantid\) knows {next(iter(what))}"):
        pipe(faces=drawn(1), **what, **QUICK)


def test_edits_of_a_code(
    wearing: Callable[..., GeneratePipeline], tmp_path: Path, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/all_delta_w_dict.json").write_text(json.dumps({"smile": [[3.0] * 2] * 18}))
    pipe = wearing("wplus", 36)
    code = torch.linspace(-1, 1, 36)[None]  # as e4e, a gigabyte, would read it off the photo
    monkeypatch.setattr(pipe.loaded.adapters["wplus"].adapter, "gather", lambda faces: code)
    plain, smiling = (pixels(pipe, faces=drawn(1), delay=0.0, edits=edits) for edits in ({}, {"smile": 2.0}))
    assert not np.array_equal(plain, smiling)
    with pytest.raises(WrongRequest, match="no edit direction called 'smlie'"):
        pipe(faces=drawn(1), edits={"smlie": 1.0}, **QUICK)


def test_manners(wearing: Callable[..., GeneratePipeline], drawn: Drawn) -> None:
    pipe = wearing("pulid")
    made = {name: pixels(pipe, faces=drawn(1), manner=name) for name in (None, "fidelity", "style", "plain")}
    assert np.array_equal(made[None], made["fidelity"])
    assert not np.array_equal(made["style"], made["plain"])


def test_several_people_as_one(wearing: Callable[..., GeneratePipeline], drawn: Drawn) -> None:
    pipe = wearing("storymaker")
    body = Image.new("L", (160, 160))
    body.paste(255, (30, 20, 130, 160))
    one, other = {"photos": drawn(1), "body": body}, {"photos": drawn(2)}
    both = pixels(pipe, people=[one, other])
    assert both.shape[:2] == (64, 64), "one picture of the model's own size, without regions"
    assert not np.array_equal(both, pixels(pipe, people=[one, {**other, "clothes": drawn(5)}]))
    assert not np.array_equal(both, pixels(pipe, people=[{"photos": drawn(1)}, other]))
    assert not np.array_equal(both, pixels(pipe, people=[other, one]))
    with pytest.raises(WrongRequest, match="at most 3 people"):
        pipe(people=[drawn(1)] * 4, **QUICK)


def test_bodies_and_clothes_are_written_down() -> None:
    (person,) = parse("people", specs(GenerateRequest)["people"], ["me.jpg body=b.png clothes=c.png strength=0.5"])
    request = GenerateRequest(people=[person])
    assert (request.people[0].body, request.people[0].clothes) == ("b.png", "c.png")
    assert from_json(GenerateRequest, to_json(request)) == request
    assert person_words(request.people[0]) == "me.jpg body=b.png clothes=c.png strength=0.5"


def test_parts_of_arc2face(pipe: GeneratePipeline, tiny: Path, drawn: Drawn) -> None:
    """Its own expression, pose and reference take the place of the model's, where they are."""
    from facegen.adapters.arc2face import Expression
    from facegen.attention.weights import KV
    from facegen.conditions import LoraCondition
    from facegen.models.projections import LinearProjection
    from facegen.models.streams import Streams

    pipe.load_adapter(tiny / "adapters" / "arc2face")
    adapter: Any = pipe.loaded.adapters["arc2face"].adapter
    torch.manual_seed(4)
    layers = {one.index: KV(pipe.model.text_width, one.width) for one in pipe.model.attention_layers if one.cross}
    adapter.parts.expression = Expression(LinearProjection(55, 2, pipe.model.text_width), Streams(layers))
    assert adapter.knows == {"expression"}
    me: dict[str, Any] = {"faces": drawn(1), "prompt": ""}
    plain, smiling = pixels(pipe, **me), pixels(pipe, **me, expression={"expression_3": 2.0, "jaw_0": 0.3})
    assert not np.array_equal(plain, smiling)
    assert np.array_equal(pixels(pipe, **me, expression={"jaw_0": 0.3}, expression_strength=0.0), plain)
    with pytest.raises(WrongRequest, match=r"expression_0 … jaw_2, not by 'smile'"):
        pipe(**me, expression={"smile": 0.5}, **QUICK)

    adapter.parts.pose, adapter.parts.reference = controlnet(pipe), LoraCondition(layers={})
    assert adapter.knows == {"expression", "normals", "reference"}
    assert not np.array_equal(pixels(pipe, **me, geometry=drawn(2), geometry_kind="normals"), plain)
    looked, other = (pixels(pipe, **me, character=drawn(seed)) for seed in (2, 3))
    assert not np.array_equal(looked, plain)
    assert not np.array_equal(looked, other)


def test_who_brings_in_several_people() -> None:
    several = {name: kind.together for name, kind in find_adapters().items() if kind.together > 1}
    assert several == {"storymaker": 3, "precisecontrol": 2}


def test_how_far_a_picture_is_from_the_expression_asked_for(mini: Path) -> None:
    pipe = GeneratePipeline.from_pretrained("mini")
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "faces": "example:1"}
    out = pipe(expression={"smile": 0.9, "jaw_open": 0.1}, **call)
    shape = pipe.judges(out.request.adapters).shape
    assert shape is not None
    found = shape.expression(out.images[0])
    wanted = (abs(found["smile"] - 0.9) + abs(found["jaw_open"] - 0.1)) / 2
    assert out.reports[0].measures == {"expression error": pytest.approx(wanted, abs=1e-4)}
    photo = examples.photo("example:3")
    measured = pipe(expression_from=photo, **call).reports[0].measures
    assert 0 < measured["expression error"] < 1
