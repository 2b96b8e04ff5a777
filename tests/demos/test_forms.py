"""Widgets and values follow the request, whatever its fields are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from facegen import request as fields
from facegen.demos import forms
from facegen.errors import BadImage, WrongRequest
from facegen.pipeline import task, tasks
from facegen.request import Request, controls, make


@dataclass(frozen=True, kw_only=True)
class Everything(Request):
    """One field of each kind."""

    faces: Any = fields.photos("Photos.")
    image: Any = fields.photo("A photo.")
    mask: Any = fields.mask("What changes.", of="image")
    people: Any = fields.people("Several people.")
    prompt: str = fields.text("a portrait", "What it shows.", lines=2)
    seed: int | None = fields.integer(None, "Where it starts.", low=0, optional=True)
    steps: int = fields.integer(20, "How many.", low=1, high=100, slider=(1, 50, 1))
    count: int = fields.integer(2, "How many pictures.", low=1)
    weight: float = fields.number(0.5, "How much.", low=0, high=1)
    fast: bool = fields.switch(False, "Whether to hurry.")
    scheduler: str = fields.choice("ddim", "Which.", ("ddim", "euler"))
    device: str | None = fields.choice(None, "Where.", ("cpu", "cuda"), optional=True, advanced=True)
    adapters: tuple[str, ...] = fields.names((), "Who helps.")
    strength: Any = fields.strengths(1.0, "How strongly.")
    loras: Any = fields.strengths({}, "Files with a strength each.", advanced=True)


def _widgets(request: type[Request]) -> dict[str, forms.Widget]:
    with gr.Blocks(analytics_enabled=False):
        return {control.name: forms.widget(control) for control in controls(request)}


def test_what_is_painted_over_a_photo_is_its_mask() -> None:
    stroke = Image.new("RGBA", (20, 10))
    nothing = {"background": stroke, "layers": [stroke], "composite": stroke}
    assert forms.value_of(Everything, "mask", nothing) is None
    assert forms.value_of(Everything, "mask", None) is None
    stroke = stroke.copy()
    stroke.paste((255, 255, 255, 255), (5, 2, 8, 6))
    mask = forms.value_of(Everything, "mask", {"layers": [stroke, Image.new("RGBA", (20, 10))]})
    assert mask.getbbox() == (5, 2, 8, 6)
    photo = Image.new("RGB", (40, 20))
    assert forms.fitted(mask, photo).getbbox() == (10, 4, 16, 12)
    assert forms.fitted(mask, Image.new("RGB", (20, 10))) is mask


def test_several_people_are_one_photo_each(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (person,) = forms.value_of(Everything, "people", [(str(tmp_path / "a.png"), None)])
    assert person.photos == (str(tmp_path / "a.png"),)


def test_every_kind_of_field_has_a_widget() -> None:
    assert set(_widgets(Everything)) == set(fields.specs(Everything))


@pytest.mark.parametrize("request_class", [Everything, *(task(name).request_class for name in tasks())])
def test_an_untouched_form_is_the_default_request(request_class: type[Request]) -> None:
    """What each component shows at first, sent back as the browser does, makes the request of no words."""
    values = {}
    for name, widget in _widgets(request_class).items():
        component = widget.component
        shown = None if isinstance(component, gr.Gallery | gr.Image | gr.ImageEditor) else component.value
        values[name] = forms.value_of(request_class, name, shown)
    assert make(request_class, values) == request_class()


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("seed", "", None),
        ("seed", "7", 7),
        ("steps", 12.0, 12),
        ("strength", "0.8", 0.8),
        ("strength", "0,0.5,1", (0.0, 0.5, 1.0)),
        ("strength", "instantid=0.8", {"instantid": 0.8}),
        ("adapters", ["arc2face", "instantid"], ("arc2face", "instantid")),
        ("loras", "style.safetensors=0.4", {"style.safetensors": 0.4}),
        ("device", "", None),
        ("device", "cuda", "cuda"),
        ("faces", None, ()),
        ("mask", None, None),
    ],
)
def test_values_come_back(name: str, raw: Any, value: Any) -> None:
    assert forms.value_of(Everything, name, raw) == value


def test_wrong_words_are_refused_in_a_sentence() -> None:
    with pytest.raises(WrongRequest, match="seed must be a whole number"):
        forms.value_of(Everything, "seed", "seven")


def test_photos_are_checked_one_by_one(tmp_path: Path) -> None:
    good, bad = tmp_path / "me.png", tmp_path / "notes.png"
    Image.new("RGB", (32, 32)).save(good)
    bad.write_text("not a picture")
    assert forms.paths([(str(good), None)]) == (str(good),)
    with pytest.raises(BadImage, match=r"notes\.png"):
        forms.paths([(str(good), None), (str(bad), None)])


def test_advanced_fields_are_folded_away() -> None:
    everyday, advanced = forms.split(Everything)
    assert [one.name for one in advanced] == ["device", "loras"]
    assert len(everyday) + len(advanced) == len(controls(Everything))


def test_building_a_photo_box_writes_no_file() -> None:
    """gradio writes a .pyi beside every module that subclasses a component."""
    assert not list(Path(forms.__file__).parent.glob("*.pyi"))
