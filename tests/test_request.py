"""A request checks itself at the door and is the source of flags, controls, JSON and the README table."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import pytest

from facegen import request as rq
from facegen.errors import FacegenError, WrongRequest


@dataclass(frozen=True, kw_only=True)
class Paint(rq.Request):
    faces: tuple[rq.Photo, ...] = rq.photos("Photos of one person.", positional=True)
    mask: rq.Photo | None = rq.photo("What to paint over.")
    prompt: str = rq.text("a portrait", "What to paint.")
    steps: int = rq.integer(30, "How many steps.", low=1, high=100, slider=(4, 60, 1))
    height: int | None = rq.integer(None, "Height in pixels.", low=8, multiple=8, optional=True)
    guidance_scale: float = rq.number(5.0, "How closely to follow the prompt.", low=0, high=50, alias="cfg")
    select: str = rq.choice("only", "Which face.", ("only", "largest"))
    strength: rq.Strengths = rq.strengths(1.0, "How strongly.", low=0, high=2)
    loras: dict[str, rq.Curve] = rq.strengths({}, "LoRA files.", parts=True)
    adapters: tuple[str, ...] = rq.names((), "Adapters.")
    upscale: bool = rq.switch(False, "Make it bigger.")


def flags(*words: str, base: Paint | None = None) -> Paint:
    parser = argparse.ArgumentParser()
    rq.add_flags(parser, Paint)
    return rq.from_flags(Paint, parser.parse_args(words), base)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", 0, "steps must be from 1 to 100, not 0"),
        ("steps", 2.5, "steps must be a whole number"),
        ("steps", True, "whole number"),
        ("steps", "30", "whole number"),
        ("steps", None, "steps must be given"),
        ("height", 513, "multiple of 8"),
        ("guidance_scale", math.nan, "finite"),
        ("guidance_scale", "5", "must be a number"),
        ("prompt", 5, "prompt must be a text"),
        ("select", "largst", "perhaps you mean 'largest'"),
        ("select", 3, "only, largest"),
        ("strength", [], "empty curve"),
        ("strength", [0.5, math.inf], "finite"),
        ("strength", {"instantid": 3}, "strength of instantid must be from 0 to 2"),
        ("strength", {"": 1}, "keyed by name"),
        ("loras", 0.5, "loras must be names"),
        ("loras", {"a": {"mid": "1"}}, "loras of a in mid must be a number"),
        ("loras", {"a": {}}, "numbers by name"),
        ("loras", {"a": {"mid": math.sin}}, "cannot change over the steps"),
        ("strength", {"a": {"mid": 1}}, "strength of a must be a number"),
        ("adapters", 5, "list of names"),
        ("faces", [3], "faces must be a picture"),
        ("faces", "", "faces must be a picture"),
        ("upscale", 1, "True or False"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(field: str, value: Any, says: str) -> None:
    with pytest.raises(WrongRequest) as caught:
        Paint(**{field: value})
    told = str(caught.value)
    assert says in told
    assert told.endswith(".")
    assert "\n" not in told
    assert isinstance(caught.value, FacegenError)
    assert isinstance(caught.value, ValueError)


def test_a_misspelt_field_names_the_nearest() -> None:
    with pytest.raises(WrongRequest, match="no 'guidence_scale'; perhaps you mean 'guidance_scale'"):
        rq.make(Paint, {"guidence_scale": 3})


def test_one_picture_and_one_name_are_lists_of_one() -> None:
    request = Paint(faces="me.jpg", adapters="instantid", loras="style.safetensors", strength=[0, 1])
    assert request.faces == ("me.jpg",)
    assert request.adapters == ("instantid",)
    assert request.loras == {"style.safetensors": 1.0}
    assert request.strength == (0.0, 1.0)


def test_flags_are_the_fields() -> None:
    assert flags() == Paint()
    assert flags("a.jpg", "b.jpg", "--prompt", "x", "--cfg", "3", "--upscale", "--height", "64") == Paint(
        faces=("a.jpg", "b.jpg"), prompt="x", guidance_scale=3.0, upscale=True, height=64
    )
    assert flags("--faces", "a.jpg", "--strength", "0,0.5,1").strength == (0.0, 0.5, 1.0)
    assert flags("--strength", "instantid=0.8", "b=0,1").strength == {"instantid": 0.8, "b": (0.0, 1.0)}
    assert flags("--loras", "a.safetensors", "b=c.pt=0.5").loras == {"a.safetensors": 1.0, "b=c.pt": 0.5}
    by_block = flags("--loras", "a=down:0.5,mid:1,up:0.3,0.2", "b=lbw:1,0,0.5", "c=0,1").loras
    assert by_block == {
        "a": {"down": 0.5, "mid": 1.0, "up": (0.3, 0.2)},
        "b": {"lbw": (1.0, 0.0, 0.5)},
        "c": (0.0, 1.0),
    }
    assert flags("--loras", *(f"{name}={rq.parts_words(one)}" for name, one in by_block.items() if name != "c")).loras
    assert rq.parts_words(by_block["a"]) == "down:0.5,mid:1.0,up:0.3,0.2"
    assert flags("--steps", "9", base=Paint(prompt="kept", steps=3)) == Paint(prompt="kept", steps=9)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", "many"), "steps must be a whole number, not 'many'"),
        (("--strength", "a=1", "2"), "both by name and without"),
        (("--strength", "1", "2"), "one number, or one curve"),
        (("--strength", "nan"), "finite"),
    ],
)
def test_a_wrong_flag_is_refused(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(WrongRequest, match=says):
        flags(*words)


def test_json_brings_the_same_request_back() -> None:
    request = Paint(
        faces=("a.jpg",), mask="m.png", strength={"a": (0.0, 1.0)}, loras={"l": {"up": (0.3, 1.0)}}, height=64
    )
    assert rq.from_json(Paint, rq.to_json(request)) == request
    with pytest.raises(WrongRequest, match="function"):
        rq.to_json(Paint(strength=lambda t: t))
    with pytest.raises(WrongRequest, match="no 'stepz'"):
        rq.from_json(Paint, {"stepz": 3})


def test_a_control_and_a_table_row_for_every_field() -> None:
    made = {control.name: control for control in rq.controls(Paint)}
    assert set(made) == set(rq.specs(Paint))
    assert (made["steps"].widget, made["steps"].low, made["steps"].high) == ("slider", 4, 60)
    assert made["faces"].widget == "photos"
    assert made["select"].choices == ("only", "largest")
    assert rq.table(Paint).count("\n") == len(made) + 1
