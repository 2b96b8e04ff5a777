"""Widgets from the fields of a request, and values back from the widgets: no task is known here by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from facegen.images import load_rgb
from facegen.request import Control, Request, controls, parse, specs


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


def widget(control: Control, choices: Sequence[str] = ()) -> Widget:
    """The component of a control; `choices` are names to offer where the control lists none."""
    common: dict[str, Any] = {"label": control.label, "elem_id": f"field-{control.name}"}
    told: dict[str, Any] = {**common, "info": control.about}
    empty = "chosen for you" if control.optional else None
    component: gr.components.Component
    match control.widget:
        case "photos":
            component = photo_row(**common)
        case "photo":
            component = photo_box(**common, height=240)
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


def is_small(control: Control) -> bool:
    """Whether a control may share its row with others."""
    small = ("slider", "number", "dropdown", "checkbox", "names", "strengths")
    return control.widget in small or (control.widget == "text" and control.lines == 1)


def split(request: type[Request]) -> tuple[list[Control], list[Control]]:
    """The controls of a request: those that everybody sees, and those that are folded away."""
    made = controls(request)
    return [one for one in made if not one.advanced], [one for one in made if one.advanced]
