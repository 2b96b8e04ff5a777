"""The renderer's promises: ranges, determinism, visible and local effects of parameters, closed surfaces, landmarks."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.world.parameters import GROUPS, HAIR_STYLES, Parameter, Scenes
from facegen.world.render import PARSING, Rendering, render
from facegen.world.render import _render as draw_together

SIZE = 64
CHOICES = {"clothes": 3.0, "background": 3.0, "hat": 2.0, "glasses": 3.0, "earrings": 1.0, "hair_style": 7.0}
PERSON = {"skin_tone": 0.3, "skin_undertone": 0.5, "eye_color": 0.2}
PICTURE = {
    "hair_style": 2.0, "hair_r": 0.15, "hair_g": 0.07, "hair_b": 0.03, "hair_length": 0.5, "hair_volume": 0.5,
    "hair_part": 0.4, "clothes_color": 5.0, "background_color": 10.0, "glasses_color": 9.0, "zoom": 1.0,
    "light_x": -0.4, "light_y": 0.5, "key": 1.0, "fill": 0.4, "rim": 0.3,
}  # fmt: skip
# Parameters which show only together with another one.
CONTEXT: dict[str, dict[str, float]] = {
    "mole_x": {"mole": 1.0},
    "mole_y": {"mole": 1.0},
    "hair_color": {"beard": 1.0},
    "glasses_color": {"glasses": 2.0},
    "hat_color": {"hat": 1.0},
    "background_seed": {"background": 2.0},
    "hair_part": {"hair_style": 3.0},
    "rim": {"light_x": 0.8},
    "ear_size": {"hair_style": 0.0},
    "ear_stickout": {"hair_style": 0.0},
    "earrings": {"hair_style": 0.0},
}


def neutral(**values: float) -> Scenes:
    """One person of average shape, looking straight ahead."""
    zeros = (torch.zeros(1, len(parameters)) for parameters in GROUPS.values())
    return Scenes(*zeros).with_values(**{**PERSON, **PICTURE, **values})


def variations(name: str, *values: float, **context: float) -> Scenes:
    return Scenes.cat([neutral(**{**CONTEXT.get(name, {}), **context, name: value}) for value in values])


def crowd(count: int, seed: int) -> Scenes:
    """People and pictures from all over the ranges."""
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, Tensor] = {}
    for parameters in GROUPS.values():
        for p in parameters:
            drawn = torch.rand(count, generator=generator)
            if p.spread == "normal":
                columns[p.name] = (2 * drawn - 1) * 1.8
            elif p.name in CHOICES or (p.name.endswith("_color") and p.high > 1):
                columns[p.name] = torch.floor(drawn * (p.high + 1)).clamp(max=p.high)
            else:
                columns[p.name] = p.low + (p.high - p.low) * drawn
    calm = {"yaw": 0.5, "pitch": 0.5, "shift_x": 0.2, "shift_y": 0.2}
    columns.update({name: columns[name] * factor for name, factor in calm.items()})
    columns["zoom"] = 0.9 + 0.2 * torch.rand(count, generator=generator)
    return Scenes(*(torch.zeros(count, len(parameters)) for parameters in GROUPS.values())).with_values(**columns)


def every_parameter() -> list[Parameter]:
    return [parameter for parameters in GROUPS.values() for parameter in parameters]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def people() -> tuple[Scenes, Rendering]:
    scenes = crowd(12, seed=3)
    return scenes, render(scenes, SIZE)


def test_shapes_and_ranges(people: tuple[Scenes, Rendering]) -> None:
    count, drawn = len(people[0]), people[1]
    assert (drawn.rgb.shape, drawn.rgb.dtype) == ((count, 3, SIZE, SIZE), torch.float32)
    assert bool(((drawn.rgb >= 0) & (drawn.rgb <= 1)).all())
    assert (drawn.parsing.shape, drawn.parsing.dtype) == ((count, SIZE, SIZE), torch.uint8)
    assert int(drawn.parsing.max()) < len(PARSING)
    assert drawn.depth.shape == (count, 1, SIZE, SIZE)
    assert drawn.depth.min() > 0
    assert drawn.normals.shape == (count, 3, SIZE, SIZE)
    assert torch.allclose(drawn.normals.norm(dim=1), torch.ones(count, SIZE, SIZE), atol=1e-4)
    assert drawn.landmarks5.shape == (count, 5, 2)
    assert drawn.landmarks68.shape == (count, 68, 2)
    assert drawn.box.shape == (count, 4)
    assert bool((drawn.box[:, 2:] > drawn.box[:, :2]).all())
    assert all(bool(torch.isfinite(getattr(drawn, field.name).float()).all()) for field in fields(Rendering))


def test_same_scene_same_picture_whatever_the_batch(people: tuple[Scenes, Rendering]) -> None:
    scenes, drawn = people
    for rows in (slice(0, 1), slice(3, 5), torch.tensor([7, 2])):
        again = render(scenes[rows], SIZE)
        for field in fields(Rendering):
            assert torch.equal(getattr(again, field.name), getattr(drawn, field.name)[rows]), field.name


def test_pictures_drawn_together_are_the_pictures_drawn_alone(people: tuple[Scenes, Rendering]) -> None:
    scenes, drawn = people
    together = draw_together(scenes[:6], SIZE, 2)  # what happens on a GPU
    assert (together.rgb - drawn.rgb[:6]).abs().mean() < 1e-4
    assert (together.parsing != drawn.parsing[:6]).float().mean() < 1e-3
    assert torch.allclose(together.landmarks68, drawn.landmarks68[:6], atol=1e-3)


def test_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 16"):
        render(neutral(), 4)


@pytest.mark.parametrize("parameter", every_parameter(), ids=lambda p: p.name)
def test_every_parameter_shows(parameter: Parameter) -> None:
    low, high = (-2.0, 2.0) if parameter.spread == "normal" else (parameter.low, parameter.high)
    if parameter.name == "hair_color":
        low, high = 0.0, 6.0
    drawn = render(variations(parameter.name, low, high), SIZE)
    changed = (drawn.rgb[0] - drawn.rgb[1]).abs().amax(0)
    assert int((changed > 0.03).sum()) >= 2


@pytest.mark.parametrize("style", range(len(HAIR_STYLES)))
@pytest.mark.parametrize("name", ["hair_length", "hair_volume"])
def test_length_and_volume_show_in_every_style(style: int, name: str) -> None:
    if HAIR_STYLES[style] == "bald":
        pytest.skip("no hair, no length")
    drawn = render(variations(name, 0.0, 1.0, hair_style=float(style)), SIZE)
    assert (drawn.rgb[0] - drawn.rgb[1]).abs().mean() > 1e-4


@pytest.mark.parametrize(
    ("name", "top", "bottom"),
    [("smile", -0.30, 1.3), ("pucker", 0.30, 1.3), ("lip_press", 0.45, 1.2), ("eye_close_left", -0.35, 0.40),
     ("eyes_wide", -0.35, 0.40), ("gaze_x", -0.35, 0.35), ("brow_raise", -0.8, 0.40)],
)  # fmt: skip
def test_actions_stay_in_their_region(name: str, top: float, bottom: float) -> None:
    drawn = render(variations(name, 0.0, 1.0), 96)
    eyes, mouth = drawn.landmarks5[0, :2, 1].mean(), drawn.landmarks5[0, 3:, 1].mean()
    changed = (drawn.rgb[0] - drawn.rgb[1]).abs().amax(0) > 0.06
    rows = changed.nonzero()[:, 0].float()
    place = (rows - eyes) / (mouth - eyes)  # 0 at the eyes, 1 at the mouth
    inside = (place > top) & (place < bottom)
    assert inside.float().mean() > 0.85


def test_one_eye_closes_alone() -> None:
    drawn = render(variations("eye_close_left", 0.0, 1.0), 96)
    left, right = ((drawn.parsing == PARSING.index(name)).flatten(1).sum(1) for name in ("l_eye", "r_eye"))
    assert left[0] > 8
    assert left[1] <= 2
    assert abs(int(right[0]) - int(right[1])) <= 2


def _bald() -> Scenes:
    """Faces of all kinds without hair, hats and glasses, whose outline is the head's."""
    return crowd(10, seed=9).with_values(hair_style=0.0, hat=0.0, glasses=0.0, earrings=0.0)


@pytest.mark.parametrize("size", [64, 160])
def test_faces_have_no_pinholes(size: int) -> None:
    drawn = render(_bald(), size)
    hole = (drawn.parsing == 0).float()[:, None]
    covered = F.avg_pool2d(1 - hole, 3, 1, 1)
    assert not bool(((hole > 0) & (covered > 7.5 / 9)).any())  # no empty pixel has eight covered neighbours


def test_depth_and_parsing_agree(people: tuple[Scenes, Rendering]) -> None:
    drawn = people[1]
    empty = drawn.parsing == 0
    assert bool((drawn.depth[:, 0][empty] == 12).all())
    assert bool((drawn.depth[:, 0][~empty] < 12).all())


def test_landmarks_lie_on_their_parts() -> None:
    scenes = _bald().with_values(
        yaw=0.0, pitch=0.0, roll=0.0, beard=0.0, goatee=0.0, moustache=0.0, jaw_open=0.0, eye_close_left=0.0,
        eye_close_right=0.0, upper_lip_raise=0.0, nose_wrinkle=0.0, cheek_raise=0.2, smile=0.2, brow_lower=0.0,
    )  # fmt: skip
    drawn = render(scenes, 128)
    wanted = (("l_eye",), ("r_eye",), ("nose",), ("u_lip", "l_lip", "skin"), ("u_lip", "l_lip", "skin"))
    for person in range(len(scenes)):
        for (x, y), names in zip(drawn.landmarks5[person].tolist(), wanted, strict=True):
            found = PARSING[int(drawn.parsing[person, int(y), int(x)])]
            assert found in names, (person, x, y, found)


@pytest.mark.parametrize(("name", "point", "axis", "sign"), [
    ("smile", 48, 1, -1), ("frown", 48, 1, 1), ("jaw_open", 57, 1, 1), ("brow_raise", 19, 1, -1), ("pucker", 48, 0, 1),
    ("lip_stretch", 54, 0, 1), ("eyes_wide", 37, 1, -1), ("eye_close_left", 37, 1, 1),
])  # fmt: skip
def test_landmarks_move_steadily(name: str, point: int, axis: int, sign: int) -> None:
    drawn = render(variations(name, 0.0, 0.33, 0.67, 1.0), SIZE)
    steps = sign * drawn.landmarks68[:, point, axis].diff()
    assert bool((steps > 0.02).all()), steps


def test_pose_moves_as_named() -> None:
    moves = ({}, {"yaw": 0.4}, {"pitch": 0.3}, {"roll": 0.3}, {"shift_x": 0.2}, {"shift_y": 0.2}, {"zoom": 1.3})
    points = render(Scenes.cat([neutral(**move) for move in moves]), SIZE).landmarks5
    still, nose = points[0], points[:, 2] - points[:, :2].mean(1)
    assert nose[1, 0] > nose[0, 0] + 1  # turned to the right: the nose runs ahead of the eyes
    assert nose[2, 1] < nose[0, 1] - 1  # turned up
    assert points[3, 1, 1] > points[3, 0, 1] + 1  # clockwise: the eye at the right is lower
    assert torch.allclose(points[4] - still, torch.tensor([0.1 * SIZE, 0.0]).expand(5, 2), atol=1e-3)
    assert torch.allclose(points[5] - still, torch.tensor([0.0, -0.1 * SIZE]).expand(5, 2), atol=1e-3)
    assert (points[6, 1, 0] - points[6, 0, 0]) / (still[1, 0] - still[0, 0]) == pytest.approx(1.3, abs=0.02)


def test_gaze_moves_the_iris() -> None:
    scenes = variations("gaze_x", -0.8, 0.0, 0.8, eye_color=0.0)
    drawn = render(scenes, 192)
    eye = (drawn.parsing == PARSING.index("l_eye")).float()
    dark = eye * (drawn.rgb.mean(1) < 0.25).float()
    column = torch.arange(192.0)
    centre = (dark * column).sum((1, 2)) / dark.sum((1, 2))
    assert bool((centre.diff() > 0.5).all())


def test_box_is_a_portrait() -> None:
    drawn = render(neutral(), SIZE)
    height = float(drawn.box[0, 3] - drawn.box[0, 1]) / SIZE
    assert 0.42 < height < 0.60
