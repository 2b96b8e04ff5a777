"""The first thing to try: one person in different hair, light and moods, on one labelled sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    from facegen.metadata import Picture
    from facegen.pipeline import Pipeline, Watch
    from facegen.report import Report

# What stands under a portrait, and the prompt it is made from.
LOOKS: tuple[tuple[str, str], ...] = (
    ("as they are", "a portrait of a person, neutral expression"),
    ("red curls", "a portrait of a person with curly red hair, smiling"),
    ("laughing, blond", "a portrait of a person with short blond hair, laughing"),
    ("round glasses", "a portrait of a person with black hair and round glasses, neutral expression"),
    ("surprised", "a portrait of a person with brown hair, surprised"),
    ("sunglasses", "a portrait of a person with sunglasses, smiling"),
    ("beanie", "a portrait of a person wearing a red beanie, smiling"),
    ("blue hair", "a portrait of a person with long blue hair, light from the left"),
    ("in a suit", "a portrait of a person in a gray suit, gray hair"),
    ("a bob", "a portrait of a person with a bob, light from the right"),
    ("sad", "a portrait of a person with black hair, sad, blue background"),
    ("pink afro", "a portrait of a person with a pink afro, laughing, yellow background"),
)
DEFAULT_PERSON = "example:12"
_TILE, _GAP, _LABEL = 192, 12, 40  # pixels
_INK, _GRAY, _PAPER = (34, 34, 38), (120, 120, 128), (250, 249, 246)


@dataclass(frozen=True, eq=False, kw_only=True)
class Portrait:
    """One picture of the sheet."""

    label: str
    prompt: str
    picture: Picture
    report: Report


def portraits(pipe: Pipeline[Any], request: Any, watch: Watch) -> Iterator[Portrait]:
    """The portraits one by one; `request` is the command's HelloRequest, `pipe` a GeneratePipeline."""
    looks = LOOKS[: request.count]
    for place, (label, prompt) in enumerate(looks):
        asked = pipe.resolve(
            pipe.request(
                None,
                {
                    "faces": request.faces or (DEFAULT_PERSON,),
                    "prompt": prompt,
                    "adapters": (request.adapter,),
                    "seed": request.seed + place,
                    "tries": request.tries,
                    "num_inference_steps": request.num_inference_steps,
                    "guidance_scale": request.guidance_scale,
                },
            )
        )
        for picture, report in pipe.stream(asked, watch=watch.within(place, len(looks))):
            yield Portrait(label=label, prompt=prompt, picture=picture, report=report)


def sheet(photos: Sequence[Any], made: Sequence[Portrait]) -> Image.Image:
    """The person's photo and the portraits of them, each with its likeness underneath."""
    from PIL import Image, ImageDraw

    from facegen.look import opened

    columns = min(4, max(1, len(made)))
    rows = -(-len(made) // columns)
    left = _TILE + 2 * _GAP
    width = left + columns * (_TILE + _GAP) + _GAP
    legend = _TILE + 2 * _GAP + 28 + 18 * 5
    height = max(rows * (_TILE + _LABEL + _GAP) + 2 * _GAP, legend)
    page = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    title, small = _font(16), _font(13)

    photo = opened((photos or (DEFAULT_PERSON,))[0])
    _paste(page, photo, (_GAP, _GAP))
    pen.text((_GAP, _GAP + _TILE + 4), "the photo", _INK, title)
    for line, told in enumerate(_legend(made)):
        pen.text((_GAP, _GAP + _TILE + 28 + 18 * line), told, _GRAY, small)
    for place, portrait in enumerate(made):
        x = left + _GAP + place % columns * (_TILE + _GAP)
        y = _GAP + place // columns * (_TILE + _LABEL + _GAP)
        _paste(page, portrait.picture, (x, y))
        pen.text((x, y + _TILE + 4), portrait.label, _INK, title)
        pen.text((x, y + _TILE + 23), _likeness(portrait.report), _GRAY, small)
    return page


def _likeness(report: Report) -> str:
    if report.likeness is None:
        return "no face found" if report.faces == 0 else "not judged"
    mark = {True: "same person", False: "another person", None: "likeness"}[report.likeness.same]
    return f"{mark} {report.likeness.cosine:.2f}"


def _legend(made: Sequence[Portrait]) -> list[str]:
    """What the numbers mean."""
    judged = [portrait.report.likeness for portrait in made if portrait.report.likeness]
    if not judged:
        return ["likeness not judged"]
    mean = sum(one.cosine for one in judged) / len(judged)
    lines = [f"mean likeness {mean:.2f}"]
    tries = sum(int(portrait.report.measures.get("tries", 1)) for portrait in made)
    if tries > len(made):
        lines.append(f"the best of {tries} pictures")
    if judged[0].ceiling is not None and judged[0].floor is not None:
        lines += [f"two photos of one person {judged[0].ceiling:.2f}", f"two strangers {judged[0].floor:.2f}"]
    return [*lines, "AI-generated"]


def _paste(page: Image.Image, picture: Image.Image, corner: tuple[int, int]) -> None:
    from PIL import Image

    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    page.paste(square.resize((_TILE, _TILE), Image.Resampling.LANCZOS), corner)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
