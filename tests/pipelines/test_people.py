"""Several people in one picture, a character that is kept, sliders: kept apart, counted, and nothing at strength 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen import request as rq
from facegen.denoise import Guidance, denoise, noise
from facegen.economy import EXACT, Economy
from facegen.errors import FacegenError, WrongMask, WrongRequest
from facegen.models.base import Model
from facegen.models.references import look_at
from facegen.models.windows import Window, Windows, spread
from facegen.pipelines.generate import GeneratePipeline, GenerateRequest
from facegen.report import Judges, Likeness, assign
from facegen.request import Person
from facegen.schedulers import build, start

QUICK: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 1, "prompt": "a face"}
Drawn = Callable[[int], Image.Image]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


@pytest.fixture
def worn(pipe: GeneratePipeline, tiny: Path) -> GeneratePipeline:
    pipe.load_adapter(tiny / "adapters" / "instantid")
    return pipe


@pytest.mark.parametrize("isolation", ["masks", "windows", "none"])
def test_two_people_are_both_in_the_picture(worn: GeneratePipeline, drawn: Drawn, isolation: str) -> None:
    call: dict[str, Any] = {**QUICK, "isolation": isolation, "height": 64, "width": 128}
    both, swapped, one = (worn(people=[drawn(a), drawn(b)], **call) for a, b in ((1, 2), (2, 1), (1, 1)))
    assert both.images[0].size == (128, 64)
    assert both.request.adapters == ("instantid",)
    assert len({pixels(out.images[0]).tobytes() for out in (both, swapped, one)}) == 3
    again = worn(both.request)
    assert np.array_equal(pixels(again.images[0]), pixels(both.images[0]))


def test_nobody_strong_is_nobody_and_widths_follow(worn: GeneratePipeline, drawn: Drawn) -> None:
    plain = worn(height=64, width=128, **QUICK)
    nobody = worn(
        people=[Person(photos=(drawn(seed),), strength=0.0) for seed in (1, 2)],
        control_strength=0.0, isolation="masks", height=64, width=128, **QUICK,
    )  # fmt: skip
    assert np.array_equal(pixels(plain.images[0]), pixels(nobody.images[0]))
    assert worn(people=[drawn(1), drawn(2), drawn(3)], **QUICK).images[0].size == (160, 64)


def test_each_ones_attention_keeps_to_their_part(worn: GeneratePipeline, drawn: Drawn) -> None:
    request = worn.resolve(
        GenerateRequest(
            people=(Person(photos=(drawn(1),)), Person(photos=(drawn(2),), box=(0.5, 0, 1, 1))),
            isolation="masks",
            **QUICK,
        )
    )
    who = worn._cast(request, (64, 64))
    masks = [one.mask for one in who.conditions]  # type: ignore[attr-defined]
    assert len(masks) == 4, "tokens and keypoints of each"
    assert not (masks[0] * masks[2]).any()
    assert torch.equal(masks[0] + masks[2], torch.ones(1, 64, 64))
    assert who.homes == ((0, 0, 32, 64), (32, 0, 64, 64))


def test_people_are_counted_and_matched() -> None:
    assert assign([[0.1, 0.9], [0.8, 0.85]]) == [1, 0], "the best for all, not for the first"
    assert assign([[0.1], [0.8]]) == [None, 0]
    assert assign([[], []]) == [None, None]
    rows = np.random.default_rng(1).random((4, 5)).tolist()
    from itertools import permutations

    best = max(sum(rows[i][p] for i, p in enumerate(order)) for order in permutations(range(5), 4))
    assert sum(rows[i][p] for i, p in enumerate(assign(rows)) if p is not None) == pytest.approx(best)


def test_the_report_tells_who_was_found_and_where(worn: GeneratePipeline, drawn: Drawn) -> None:
    people = [worn.faces_in(drawn(seed)) for seed in (1, 2)]

    class Ruler:
        name, ceiling, floor, threshold = "ruler", None, None, 0.5

        def cosine(self, face: Any, references: Any) -> float:
            return float(np.array_equal(face.embedding, references[0].embedding))

    class Detector:
        def faces(self, photo: Any, *, what: str = "") -> list[Any]:
            return [people[1][0]]

    judges = Judges(detector=Detector(), likeness=Ruler())
    box = people[1][0].box
    found = judges.people(None, people, [None, (float(box[0]), float(box[1]), float(box[2]), float(box[3]))])
    assert found[0].likeness is None
    assert found[1].likeness is not None
    assert found[1].likeness.same
    assert found[1].at_home
    assert str(found[0]) == "nobody"
    assert judges.people(None, people, [None, (0, 0, 1, 1)])[1].at_home is False
    assert isinstance(found[1].likeness, Likeness)


def test_people_are_written_down_and_typed() -> None:
    people = [{"photos": "a.png", "box": [0, 0, 0.5, 1], "strength": 0.5}, ["b.png", "c.png"]]
    request = rq.make(GenerateRequest, {"people": people, **QUICK})
    plain = json.loads(json.dumps(rq.to_json(request)))
    assert rq.from_json(GenerateRequest, plain) == request
    assert rq.photos_of(request) == ["a.png", "b.png", "c.png"]
    spec = rq.specs(GenerateRequest)["people"]
    words = [rq.person_words(one) for one in request.people]
    assert words == ["a.png box=0,0,0.5,1 strength=0.5", "b.png c.png"]
    assert GenerateRequest(people=rq.parse("people", spec, words), **QUICK) == request


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"people": [Person(photos=())]}, WrongRequest, "person 1 of people needs at least one photo"),
        ({"people": [Person(photos=("+",), box=(0.5, 0, 0.2, 1))]}, WrongRequest, "left, top, right, bottom"),
        ({"people": [{"photo": "+"}]}, WrongRequest, "has no 'photo'; perhaps you mean 'photos'"),
        ({"people": ["+"], "faces": ["+"]}, WrongRequest, "give one of the two"),
        ({"people": ["+", "+"], "adapters": "arc2face"}, WrongRequest, "brings in one person only"),
        ({"people": [Person(photos=("+",), mask=Image.new("L", (9, 9)))]}, WrongMask, "mask of person 1 is empty"),
        ({"sliders": {"smle": 1}}, WrongRequest, "There is no slider 'smle'"),
        ({"sliders": {"smile": [0, 1]}}, WrongRequest, "not a curve"),
    ],
)
def test_wrong_input_is_one_sentence(
    worn: GeneratePipeline, tiny: Path, me: Path, fields: dict[str, Any], kind: type[FacegenError], says: str
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, Person):
            return Person(photos=filled(list(value.photos)), box=value.box, mask=value.mask)
        if isinstance(value, list):
            return [filled(one) for one in value]
        return str(me) if value == "+" else value

    given = {name: filled(value) for name, value in fields.items()}
    if given.get("adapters") == "arc2face":
        given["adapters"] = str(tiny / "adapters" / "arc2face")
    with pytest.raises(kind, match=says) as caught:
        worn(**{**QUICK, **given})
    assert str(caught.value).endswith(".")


def test_windows_cover_the_canvas_and_one_window_is_the_model(tiny_sd15: Path) -> None:
    boxes = spread(8, 20, (8, 8), [(4, 4), (16, 4)])
    assert boxes[:2] == [(0, 0, 8, 8), (12, 0, 20, 8)]
    assert boxes[2] == (8, 0, 16, 8)
    model = Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)
    text = [model.encode_text(["a face"])]
    generators = [torch.Generator().manual_seed(1)]
    scheduler = build("ddim", model.scheduler_config, 2)
    first = start(scheduler, noise(model.latent_shape(64, 64), generators))
    plain = denoise(model, first, scheduler, text, Guidance(2.0))
    one: Any = Windows(model, [Window((0, 0, 8, 8))])
    scheduler = build("ddim", model.scheduler_config, 2)
    assert torch.allclose(denoise(one, first, scheduler, text, Guidance(2.0)), plain, atol=1e-4)


def test_windows_walk_whole_steps_whatever_the_economy_of_the_model(tiny_sd15: Path) -> None:
    model = Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)
    text = [model.encode_text(["a face"])]
    windows: Any = Windows(model, [Window((0, 0, 8, 8))])

    def made(economy: Economy) -> torch.Tensor:
        model.economy = economy
        scheduler = build("ddim", model.scheduler_config, 4)
        generators = [torch.Generator().manual_seed(1)]
        first = start(scheduler, noise(model.latent_shape(64, 64), generators))
        return denoise(windows, first, scheduler, text, Guidance(2.0))

    assert torch.equal(made(Economy(reuse=2, least=1)), made(EXACT))


@pytest.mark.parametrize("base", ["tiny_sd15", "tiny_sdxl"])
def test_looking_at_a_picture(base: str, request: pytest.FixtureRequest) -> None:
    """It changes the run, not at strength 0 and not with an empty mask; each step looks at one level of noise."""
    model = Model.from_pretrained(request.getfixturevalue(base), device="cpu", dtype=torch.float32)
    text = model.encode_text(["a face"])
    generator = torch.Generator().manual_seed(1)
    seen = torch.randn(1, *model.latent_shape(64, 64), generator=generator)
    first = torch.randn(1, *model.latent_shape(64, 64), generator=generator)

    def run(**how: Any) -> torch.Tensor:
        scheduler = build("model", model.scheduler_config, 5)
        looks = look_at(model, seen, text, scheduler, first, **how) if how else []
        for index in range(5):
            assert sum(one.strength(index, 5) > 0 for one in looks) == (1 if how.get("scale") and looks else 0)
        scheduler = build("model", model.scheduler_config, 5)
        return denoise(model, start(scheduler, first), scheduler, [text, *looks], Guidance(2.0))

    plain = run()
    assert not torch.allclose(run(scale=1.0), plain, atol=1e-3)
    assert torch.equal(run(scale=0.0), plain)
    assert torch.equal(run(scale=1.0, mask=torch.zeros(1, 64, 64)), plain)


def test_a_character_is_looked_at(pipe: GeneratePipeline, drawn: Drawn) -> None:
    plain, none, kept = (
        pipe(**QUICK), pipe(character=drawn(2), character_strength=0.0, **QUICK), pipe(character=drawn(2), **QUICK)
    )  # fmt: skip
    assert np.array_equal(pixels(plain.images[0]), pixels(none.images[0]))
    assert not np.array_equal(pixels(plain.images[0]), pixels(kept.images[0]))


def test_a_slider_moves_and_0_does_not(pipe: GeneratePipeline) -> None:
    steps = {**QUICK, "num_inference_steps": 5}
    made = {value: pipe(sliders={"smile": value}, **steps).images[0] for value in (0.0, 1.0, 2.0)}
    own = pipe(sliders={"red hair|black hair": 1}, **steps).images[0]
    plain = pipe(**steps).images[0]
    assert np.array_equal(pixels(made[0.0]), pixels(plain))
    near, far = (np.abs(pixels(made[value]) - pixels(plain)).mean() for value in (1.0, 2.0))
    assert 0 < near < far
    assert not np.array_equal(pixels(own), pixels(plain))
