"""Contact sheets of the face world: many pictures in rows and columns, with labels, to look at.

Each ``…_sheet`` draws one kind; ``save_sheet`` draws one by its name and writes it as a PNG file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from facegen.errors import OutputUnwritable, WrongRequest
from facegen.world.parameters import (
    ATTRIBUTES,
    BACKGROUNDS,
    CLOTHES,
    COLORS,
    EXPRESSION,
    GLASSES,
    HAIR_COLORS,
    HAIR_STYLES,
    HATS,
    IDENTITY,
    LIGHT,
    POSE,
    Parameter,
    Scenes,
)
from facegen.world.raster import CAMERA_DISTANCE
from facegen.world.render import PARSING, Rendering, render
from facegen.world.sampling import people_for, scenes_for

_PAPER, _INK, _GAP = (250, 250, 248), (30, 30, 34), 2


def sheet(
    images: Tensor, columns: int, labels: Sequence[str] | None = None, row_labels: Sequence[str] | None = None
) -> Image.Image:
    """Pictures (N, 3, H, W) in [0, 1] side by side; ``labels`` stand under each, ``row_labels`` before each row."""
    if not len(images) or columns < 1:
        raise ValueError("A sheet needs at least one picture and one column.")
    height, width = images.shape[-2:]
    font = ImageFont.load_default(max(9, min(16, width // 9)))
    below = _line_height(font) if labels else 0
    left = _widest(row_labels, font) if row_labels else 0
    rows = -(-len(images) // columns)
    paper = Image.new("RGB", (left + columns * (width + _GAP) + _GAP, rows * (height + below + _GAP) + _GAP), _PAPER)
    pen = ImageDraw.Draw(paper)
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for number, picture in enumerate(pixels):
        row, column = divmod(number, columns)
        x, y = left + _GAP + column * (width + _GAP), _GAP + row * (height + below + _GAP)
        paper.paste(Image.fromarray(picture), (x, y))
        if labels and number < len(labels):
            pen.text((x + 1, y + height), _fitted(labels[number], font, width), _INK, font)
        if row_labels and column == 0 and row < len(row_labels):
            pen.text((3, y + height // 2 - below // 2), row_labels[row], _INK, font)
    return paper


def parsing_colors(parsing: Tensor) -> Tensor:
    """Classes (…, H, W) as colours (…, 3, H, W) in [0, 1], the background black."""
    hues = torch.arange(len(PARSING)) * 0.61803398875 % 1.0  # golden ratio: neighbours differ
    levels = torch.tensor([1.0, 0.72, 0.5])[torch.arange(len(PARSING)) % 3]
    palette = (
        torch.stack([(hues + shift) % 1.0 for shift in (0.0, 1 / 3, 2 / 3)], 1) * 6 - 3
    ).abs() - 1  # (classes, 3)
    palette = palette.clamp(0.08, 1) * levels[:, None]
    palette[0] = 0
    return palette.to(parsing.device)[parsing.long()].movedim(-1, -3)


def truths(drawing: Rendering) -> Tensor:
    """Everything known of each picture, side by side: (B, 5, 3, H, W) rgb, parsing, depth, normals, landmarks."""
    near, far = CAMERA_DISTANCE - 1.4, CAMERA_DISTANCE + 2.0  # half head heights: nose tip to shoulders
    depth = ((far - drawing.depth) / (far - near)).clamp(0, 1).expand(-1, 3, -1, -1)
    return torch.stack(
        [drawing.rgb, parsing_colors(drawing.parsing), depth, drawing.normals * 0.5 + 0.5, _marked(drawing)], 1
    )


# -- the sheets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SheetPlan:
    """people: rows of people; pictures: columns; size: pixels of one picture; first: the first person's number."""

    people: int = 6
    pictures: int = 8
    size: int = 128
    seed: int = 0
    first: int = 0

    def numbers(self) -> range:
        return range(self.first, self.first + self.people)

    def __post_init__(self) -> None:
        if self.people < 1 or self.pictures < 1 or not 16 <= self.size <= 1024:
            raise WrongRequest("A sheet needs at least one person, one picture, and a size from 16 to 1024 pixels.")


def people_sheet(plan: SheetPlan) -> Image.Image:
    """A row is one person, in different pictures."""
    people = [person for person in plan.numbers() for _ in range(plan.pictures)]
    scenes = scenes_for(plan.seed, people, list(range(plan.pictures)) * plan.people)
    return sheet(render(scenes, plan.size).rgb, plan.pictures, row_labels=[str(person) for person in plan.numbers()])


def expressions_sheet(plan: SheetPlan) -> Image.Image:
    """A row is one person, a column one facial action at full strength."""
    return _one_at_a_time(plan, EXPRESSION, lambda parameter: (parameter.high,))


def attributes_sheet(plan: SheetPlan) -> Image.Image:
    """A row is one person, a column one value of one attribute."""
    return _columns(plan, _attribute_values())


def identity_sheet(plan: SheetPlan) -> Image.Image:
    """A row is one trait of identity from low to high, on the first person."""
    return _sweep(plan, IDENTITY)


def scene_sheet(plan: SheetPlan) -> Image.Image:
    """A row is one parameter of pose or light from low to high, on the first person."""
    return _sweep(plan, (*POSE, *LIGHT))


def truth_sheet(plan: SheetPlan) -> Image.Image:
    """A row is one picture: rgb, parsing, depth, normals, landmarks."""
    numbers = list(plan.numbers())
    drawing = render(scenes_for(plan.seed, numbers, [0] * len(numbers)), plan.size)
    return sheet(truths(drawing).flatten(0, 1), 5, row_labels=[str(number) for number in numbers])


SHEETS: Mapping[str, Callable[[SheetPlan], Image.Image]] = {
    "people": people_sheet,
    "expressions": expressions_sheet,
    "attributes": attributes_sheet,
    "identity": identity_sheet,
    "scene": scene_sheet,
    "truth": truth_sheet,
}


def save_sheet(path: Path | str, kind: str = "people", plan: SheetPlan | None = None) -> Path:
    """Draw one of ``SHEETS`` and write it to ``path`` (PNG or JPEG, by its ending); returns the path."""
    if kind not in SHEETS:
        raise WrongRequest(f"There is no sheet '{kind}'; the sheets are: {', '.join(SHEETS)}.")
    picture = SHEETS[kind](plan or SheetPlan())
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as error:
        raise OutputUnwritable(f"{path} cannot be written ({error}); choose another place or ending.") from error
    return path


# -- parts of sheets --------------------------------------------------------------------------------------------------


def plain_scenes(identity: Tensor) -> Scenes:
    """Passport pictures of these people: at rest, facing the camera, short brown hair, even light."""
    batch = len(identity)
    blank = Scenes(identity, *(torch.zeros(batch, len(group)) for group in (EXPRESSION, POSE, ATTRIBUTES, LIGHT)))
    brown = HAIR_COLORS["brown"]
    return blank.with_values(
        zoom=1.0, light_x=-0.35, light_y=0.45, key=1.0, fill=0.45,
        hair_style=HAIR_STYLES.index("short"), hair_color=list(HAIR_COLORS).index("brown"),
        hair_r=brown[0], hair_g=brown[1], hair_b=brown[2], hair_length=0.5, hair_volume=0.5, hair_part=0.4, age=0.2,
        glasses_color=list(COLORS).index("black"), hat_color=list(COLORS).index("blue"),
        clothes_color=list(COLORS).index("teal"), background_color=list(COLORS).index("gray"),
    )  # fmt: skip


_Change = tuple[str, Mapping[str, float]]


def _columns(plan: SheetPlan, changes: Sequence[_Change]) -> Image.Image:
    plain = plain_scenes(people_for(plan.seed, list(plan.numbers())))
    scenes = Scenes.cat([plain[[row]].with_values(**change) for row in range(len(plain)) for _, change in changes])
    return sheet(render(scenes, plan.size).rgb, len(changes), [name for name, _ in changes] * len(plain))


def _one_at_a_time(
    plan: SheetPlan, parameters: Sequence[Parameter], values: Callable[[Parameter], Sequence[float]]
) -> Image.Image:
    changes: list[_Change] = [("at rest", {})]
    changes += [(p.name.replace("_", " "), {p.name: value}) for p in parameters for value in values(p)]
    return _columns(plan, changes)


def _sweep(plan: SheetPlan, parameters: Sequence[Parameter]) -> Image.Image:
    """A row per parameter, its value from low to high over the columns, in a three-quarter view."""
    plain = plain_scenes(people_for(plan.seed, [plan.first])).with_values(yaw=0.3)
    steps = torch.linspace(0, 1, plan.pictures)
    scenes = Scenes.cat([
        plain.with_values(**{p.name: p.low + (p.high - p.low) * float(step)}) for p in parameters for step in steps
    ])  # fmt: skip
    return sheet(render(scenes, plan.size).rgb, plan.pictures, row_labels=[p.name for p in parameters])


def _attribute_values() -> list[_Change]:
    """Every value of the choices, and every amount at full strength."""
    changes: list[_Change] = [(name, {"hair_style": place}) for place, name in enumerate(HAIR_STYLES)]
    for name, (red, green, blue) in HAIR_COLORS.items():
        place = list(HAIR_COLORS).index(name)
        changes.append((f"{name} hair", {"hair_color": place, "hair_r": red, "hair_g": green, "hair_b": blue}))
    changes += [(name, {name: 1.0}) for name in ("beard", "goatee", "moustache", "stubble", "age")]
    for kind, table in (("glasses", GLASSES), ("hat", HATS)):
        changes += [(name, {kind: place}) for place, name in enumerate(table) if place]
    changes += [(name, {name: 1.0}) for name in ("earrings", "lipstick", "eye_makeup")]
    changes += [(name, {"clothes": place}) for place, name in enumerate(CLOTHES)]
    return changes + [(name, {"background": place, "background_seed": 0.4}) for place, name in enumerate(BACKGROUNDS)]


def _marked(drawing: Rendering) -> Tensor:
    """The pictures with landmarks and face box drawn over them, (B, 3, H, W)."""
    marked = []
    rows = zip(drawing.rgb, drawing.landmarks68, drawing.landmarks5, drawing.box, strict=True)
    for rgb, points68, points5, box in rows:
        pixels = (rgb.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
        picture = Image.fromarray(pixels)
        pen = ImageDraw.Draw(picture)
        pen.rectangle([float(edge) for edge in box], outline=(255, 220, 0))
        radius = max(1.0, rgb.shape[-1] / 160)
        for points, color in ((points68, (0, 255, 120)), (points5, (255, 40, 60))):
            for x, y in points.tolist():
                pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
        marked.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*pixels.shape))
    return torch.stack(marked).permute(0, 3, 1, 2).to(drawing.rgb) / 255


_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def _line_height(font: _Font) -> int:
    return int(font.getbbox("Ag")[3]) + 4


def _widest(texts: Sequence[str], font: _Font) -> int:
    return max(int(font.getlength(text)) for text in texts) + 8


def _fitted(text: str, font: _Font, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text
