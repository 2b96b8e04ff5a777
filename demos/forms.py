"""Widgets from the fields of a request, and values back from the widgets: no task is known here by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image, ImageChops

from facegen.images import load_rgb
from facegen.request import Control, Person, Request, controls, parse, specs


@dataclass(frozen=True, eq=False)
class Widget:
    """One field of a request as a component."""

    control: Control
    component: gr.components.Component

    @property
    def name(self) -> str:
        return self.control.name


def photo_box(label: str, **more: Any) -> gr.Image:
    """A box for one photo, by upload or from the clipboard; it gives the path of the file as it was uploaded."""
    box = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], buttons=[], **more)
    # gradio would open the file first, and complain in PIL's words; a subclass would write a .pyi file beside this one.
    box.preprocess = _path
    return box


def _path(payload: ImageData | None) -> str | None:
    return None if payload is None else payload.path


def photo_row(label: str, **more: Any) -> gr.Gallery:
    """A box for any number of photos."""
    return gr.Gallery(
        label=label,
        type="filepath",
        interactive=True,
        columns=4,
        height=180,
        object_fit="cover",
        buttons=[],
        sources=["upload", "clipboard"],
        **more,
    )


def brush_box(label: str, **more: Any) -> gr.ImageEditor:
    """A photo to paint over: what is painted is the mask."""
    return gr.ImageEditor(
        label=label,
        type="pil",
        image_mode="RGBA",
        sources=(),
        transforms=(),
        brush=gr.Brush(default_size=24, colors=["#ffffff"], color_mode="fixed"),
        layers=False,
        buttons=[],
        **more,
    )


def widget(control: Control, choices: Sequence[str] = (), form: str = "field") -> Widget:
    """The component of a control; choices: names to offer where it lists none; form: whose field it is."""
    common: dict[str, Any] = {"label": control.label, "elem_id": f"{form}-{control.name}"}
    told: dict[str, Any] = {**common, "info": control.about}
    empty = "chosen for you" if control.optional else None
    component: gr.components.Component
    match control.widget:
        case "photos":
            component = photo_row(**common)
        case "photo":
            component = photo_box(**common, height=240)
        case "mask":
            component = brush_box(**{**common, "label": f"{control.label}: paint over the {control.of}"}, height=320)
        case "people":
            component = photo_row(**{**common, "label": f"{control.label}: one photo each, from left to right"})
        case "slider":
            component = gr.Slider(control.low, control.high, control.value, step=control.step, **told)
        case "number" if control.optional:
            # A number box turns empty into 0, which is a seed like any other; a text box can say "nothing".
            component = gr.Textbox(_shown(control.value), placeholder=empty, max_lines=1, **told)
        case "number":
            component = gr.Number(
                control.value, precision=0 if isinstance(control.value, int) else None, step=control.step or 1, **told
            )
        case "checkbox":
            component = gr.Checkbox(control.value, **told)
        case "dropdown":
            offered = [("chosen for me", ""), *control.choices] if control.optional else list(control.choices)
            component = gr.Dropdown(offered, value=control.value or ("" if control.optional else offered[0]), **told)
        case "names":
            component = gr.Dropdown(
                list(choices or control.choices),
                value=list(control.value),
                multiselect=True,
                allow_custom_value=True,
                **told,
            )
        case _:
            component = gr.Textbox(
                _shown(control.value), lines=control.lines, placeholder=empty, max_lines=max(control.lines, 1), **told
            )
    return Widget(control, component)


def _shown(value: Any) -> str:
    return "" if value in (None, (), {}) else str(value)


def value_of(request: type[Request], name: str, raw: Any) -> Any:
    """A field's value from what its component gives; raises :class:`facegen.errors.WrongRequest`."""
    spec = specs(request)[name]
    if spec.kind == "photos":
        return paths(raw)
    if spec.kind == "people":
        return tuple(Person(photos=(one,)) for one in paths(raw))
    if spec.kind == "mask":
        return painted(raw)
    if spec.kind == "integer" and isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if spec.optional and raw in (None, ""):
        return None
    return parse(name, spec, raw)


def paths(raw: Any) -> tuple[str, ...]:
    """The files in a row of photos; raises :class:`facegen.errors.BadImage` for one that is no picture."""
    files = tuple(one[0] if isinstance(one, (tuple, list)) else str(one) for one in raw or ())
    for file in files:
        load_rgb(file)
    return files


def painted(raw: Any) -> Image.Image | None:
    """White where something was painted over a photo; None where nothing was."""
    layers = raw.get("layers") if isinstance(raw, dict) else None
    strokes = [layer.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0) for layer in layers or ()]
    if not strokes:
        return None
    mask = reduce(ImageChops.lighter, strokes)
    return mask if mask.getbbox() is not None else None


def fitted(mask: Image.Image, photo: Any) -> Image.Image:
    """A painted mask at the size of its photo: the browser may have shown it smaller."""
    size = load_rgb(photo).size
    return mask if mask.size == size else mask.resize(size, Image.Resampling.NEAREST)


def is_small(control: Control) -> bool:
    """Whether a control may share its row with others."""
    small = ("slider", "number", "dropdown", "checkbox", "names", "strengths")
    return control.widget in small or (control.widget == "text" and control.lines == 1)


def split(request: type[Request]) -> tuple[list[Control], list[Control]]:
    """The controls of a request: those that everybody sees, and those that are folded away."""
    made = controls(request)
    return [one for one in made if not one.advanced], [one for one in made if one.advanced]
