"""`facegen train slider`: a new slider from two prompts, or from a handful of picture pairs; written as a LoRA file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from facegen import __version__
from facegen.errors import WrongRequest
from facegen.training.loop import Budget, LoopSettings, run

if TYPE_CHECKING:
    from PIL import Image

    from facegen.models.base import Model
    from facegen.training.objectives.slider import SliderNet, SliderObjective, SliderSettings

# The model itself draws what it is compared on: no process beside it can.
SETTINGS = LoopSettings(warmup=10, weight_decay=0.0, average=0.98, workers=0)
_MORE, _LESS = "more", "less"


@dataclass(frozen=True)
class Recipe:
    """What the slider is to be: learnt from `more` and `less` (prompts), or from the folders more and less in `pairs`.

    prompt: what the pictures show otherwise. keep: with prompts, what must not move with the slider.
    """

    name: str
    more: str = ""
    less: str = ""
    pairs: Path | None = None
    prompt: str = "a portrait of a person"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise WrongRequest("Give the slider a name with --name; it becomes the name of its file.")
        if self.pairs is None and not (self.more and self.less):
            raise WrongRequest("A slider is learnt from two prompts (--more, --less) or from a folder of --pairs.")
        if self.pairs is not None and (self.more or self.less or self.keep):
            raise WrongRequest("Give two prompts or a folder of pairs, not both.")


def train_slider(
    recipe: Recipe, model: Model, output: Path, work: Path, *, steps: int, settings: SliderSettings | None = None
) -> Path:
    """Learn a slider beside a model (in float32) and write `output`/name.safetensors; a stopped call goes on.

    Raises WrongRequest, BadImage, Cancelled, OutputUnwritable.
    """
    objective = new_objective(recipe, model, settings)
    chosen = objective.settings
    walk = replace(SETTINGS, learning_rate=chosen.rate, seed=chosen.seed)
    measured = run(objective, work / recipe.name, Budget(steps), walk)
    return save(objective.net, output / f"{recipe.name}.safetensors", about(recipe, model, measured))


def new_objective(recipe: Recipe, model: Model, settings: SliderSettings | None = None) -> SliderObjective:
    """What the recipe asks for, untrained."""
    from facegen.training.objectives.slider import PairSliderObjective, SliderSettings, TextSliderObjective, Words

    settings = settings or SliderSettings()
    if recipe.pairs is None:
        return TextSliderObjective(model, Words(recipe.more, recipe.less, recipe.prompt, recipe.keep), settings)
    more, less = (_latents(model, pictures) for pictures in read_pairs(recipe.pairs))
    return PairSliderObjective(model, (more, less), recipe.prompt, settings)


def read_pairs(folder: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """The pictures of the folders more and less, those of the same name side by side. Raises WrongRequest, BadImage."""
    from facegen.images import load_rgb

    found = {side: _pictures(folder / side) for side in (_MORE, _LESS)}
    if not any(found.values()):
        raise WrongRequest(f"{folder} must hold two folders, '{_MORE}' and '{_LESS}', with pictures of the same names.")
    if alone := sorted(found[_MORE].keys() ^ found[_LESS].keys()):
        raise WrongRequest(f"The picture '{alone[0]}' is in one of {folder}/{_MORE} and {folder}/{_LESS} only.")
    names = sorted(found[_MORE])
    more, less = ([load_rgb(found[side][name]) for name in names] for side in (_MORE, _LESS))
    return more, less


def _pictures(folder: Path) -> dict[str, Path]:
    """By their names without the ending; hidden files are none."""
    if not folder.is_dir():
        return {}
    return {path.stem: path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}


def _latents(model: Model, pictures: list[Image.Image]) -> Tensor:
    """(N, C, h, w) float32, of the pictures cut to the model's own size."""
    from PIL import ImageOps

    from facegen.images import to_tensor

    height, width = model.default_size
    fitted = [to_tensor(ImageOps.fit(one, (width, height))) for one in pictures]
    with torch.no_grad():
        return torch.cat([model.encode_image(one[None]).float() for one in fitted])


def about(recipe: Recipe, model: Model, measured: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the header of the file."""
    learnt = {"more": recipe.more, "less": recipe.less, "keep": ", ".join(recipe.keep)}
    if recipe.pairs is not None:
        learnt = {"pairs": recipe.pairs.name}
    return {
        "format": "pt",
        "software": f"facegen {__version__}",
        "kind": "slider",
        "name": recipe.name,
        "prompt": recipe.prompt,
        "base_model": model.family,
        **{name: value for name, value in learnt.items() if value},
        **{name: str(value) for name, value in measured.items() if name != "seconds"},
    }


def save(net: SliderNet, path: Path, header: Mapping[str, str]) -> Path:
    """A LoRA file as peft and diffusers spell it, in float16."""
    from facegen import checkpoints

    tensors = {}
    for name, low in net.layers().items():
        tensors[f"unet.{name}.lora_A.weight"] = low.down.detach().half()
        tensors[f"unet.{name}.lora_B.weight"] = low.up.detach().half()
    return checkpoints.write(path, tensors, header)
