"""Prompt repair: what the person overruled is painted by the base model, only there, and only if it helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen import repair
from facegen.conditions import TokenCondition
from facegen.errors import WrongRequest
from facegen.face.parse import REGIONS
from facegen.pipelines.generate import GeneratePipeline, GenerateRequest
from facegen.report import Judges, Obedience
from facegen.world.facts import FACTS

QUICK: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 1}
PROMPT = "a person with red hair and glasses"
Drawn = Callable[[int], Image.Image]


class Reader:
    """Says of the first picture that the hair is wrong; of later ones, if it is content, that all is well."""

    def __init__(self, content: bool) -> None:
        self.content, self.seen = content, 0
        self.heard: list[str] = []

    def obedience(self, prompt: str, image: Any) -> Obedience:
        self.seen += 1
        self.heard.append(prompt)
        asked = ("red hair", "glasses")
        return Obedience(asked=asked, hit=asked if self.content and self.seen > 1 else asked[1:])


class Box:
    """Says that every part is in the upper half."""

    def region(self, photo: Image.Image, faces: Any, name: str) -> torch.Tensor:
        mask = torch.zeros(1, photo.height, photo.width)
        mask[:, : photo.height // 2] = 1
        return mask


@pytest.fixture
def worn(pipe: GeneratePipeline, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], GeneratePipeline]:
    """worn(content): a pipeline with an adapter whose judge is the reader above."""
    pipe.load_adapter(tiny / "adapters" / "ip_adapter_faceid")

    def make(content: bool) -> GeneratePipeline:
        judges = Judges(detector=pipe.analyzer(pipe.reading_pack()), prompt=Reader(content))
        monkeypatch.setattr(pipe, "judges", lambda adapters: judges)
        monkeypatch.setattr(pipe.loaded, "parser", Box())
        return pipe

    return make


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_only_the_part_that_shows_it_is_painted_anew(worn: Callable[[bool], GeneratePipeline], drawn: Drawn) -> None:
    call: dict[str, Any] = {"faces": drawn(1), "prompt": PROMPT, **QUICK}
    before = worn(True)(**call).images[0]
    out = worn(True)(repair=True, **call)
    differ = (pixels(before) != pixels(out.images[0])).any(-1)
    assert differ[:32].mean() > 0.5
    assert not differ[32:].any()
    told = out.reports[0].measures
    assert (told["prompt before repair"], told["prompt after repair"], told["repaired"]) == (1, 2, 1)


def test_what_does_not_help_is_not_kept(worn: Callable[[bool], GeneratePipeline], drawn: Drawn) -> None:
    call: dict[str, Any] = {"faces": drawn(1), "prompt": PROMPT, **QUICK}
    out = worn(False)(repair=True, **call)
    assert np.array_equal(pixels(out.images[0]), pixels(worn(False)(**call).images[0]))
    assert out.reports[0].measures["repaired"] == 0


def test_without_a_person_or_a_part_nothing_is_done(
    worn: Callable[[bool], GeneratePipeline], drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = worn(True)
    words = pipe(prompt=PROMPT, repair=True, **QUICK)
    assert words.reports[0].measures == {}
    monkeypatch.setattr(Box, "region", lambda self, photo, faces, name: torch.zeros(1, photo.height, photo.width))
    call: dict[str, Any] = {"faces": drawn(1), "prompt": PROMPT, **QUICK}
    empty = worn(True)(repair=True, **call)
    assert empty.reports[0].measures == {}
    assert np.array_equal(pixels(empty.images[0]), pixels(worn(True)(**call).images[0]))


def test_sliders_go_on_in_what_is_painted_anew(pipe: GeneratePipeline) -> None:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(3, 64, 64, generator=generator)
    answer = torch.randn(1, *pipe.model.latent_shape(64, 64), generator=generator)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1

    def borrowed(**fields: Any) -> torch.Tensor:
        request = GenerateRequest(prompt=PROMPT, num_inference_steps=5, guidance_scale=3.0, seed=1, **fields)
        return pipe._borrowed(request, [pipe.words(request, ())], (pixels, answer, mask), 0)

    plain, moved = borrowed(), borrowed(sliders={"smile": 2.0})
    assert torch.equal(borrowed(sliders={"smile": 0.0}), plain)
    assert not torch.equal(moved[:, :32], plain[:, :32])
    assert torch.equal(moved[:, 32:], plain[:, 32:])


def test_what_a_slider_asks_for_is_not_lost(worn: Callable[[bool], GeneratePipeline], drawn: Drawn) -> None:
    """The words of a slider that goes the whole way are judged with the prompt, before and after."""
    pipe = worn(True)
    reader = pipe.judges(()).prompt
    assert isinstance(reader, Reader)
    call: dict[str, Any] = {"faces": drawn(1), "prompt": PROMPT, **QUICK}
    pipe(repair=True, sliders={"smile": 1.0, "age": 0.5}, **call)
    assert len(reader.heard) == 3  # before and after repair, and for the report
    assert set(reader.heard) == {f"{PROMPT}, smiling"}


def test_facts_and_their_parts() -> None:
    assert set(repair.PARTS) < set(FACTS)
    assert {part for parts in repair.PARTS.values() for part in parts} <= set(REGIONS)
    lacking = Obedience(asked=("red hair", "glasses"), hit=("glasses",))
    facts = repair.missed(PROMPT, lacking)
    assert [fact.kind for fact in facts] == ["hair_color"]
    assert repair.parts_of(facts) == ("hair", "brows")
    assert repair.missed("an old man", Obedience(asked=("old", "man"), hit=())) == [], "that is who it is"


def test_a_person_is_kept_out_of_the_part() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    streams = [TokenCondition(tokens=torch.zeros(2, 1, 1, 4), layers={}, mask=own) for own in (None, mask)]
    first, second = repair.without(streams, mask)
    assert torch.equal(first.mask, 1 - mask)  # type: ignore[attr-defined]
    assert not second.mask.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["layers", "predictions"])
@pytest.mark.parametrize("adapter", ["ip_adapter_faceid", "arc2face"])
def test_person_and_prompt_kept_apart(
    pipe: GeneratePipeline, tiny: Path, drawn: Drawn, monkeypatch: pytest.MonkeyPatch, way: str, adapter: str
) -> None:
    """Everywhere the person's it is the picture as ever; nowhere, it is the prompt's, whatever the adapter brings."""
    pipe.load_adapter(tiny / "adapters" / adapter)
    call: dict[str, Any] = {"faces": drawn(1), "prompt": "a", **QUICK}
    as_ever, nobody = pixels(pipe(**call).images[0]), pixels(pipe(prompt="a", **QUICK).images[0])
    seen = torch.zeros(1, 64, 64)
    monkeypatch.setattr("facegen.repair.visual", lambda *_: seen)
    none = pixels(pipe(apart=way, **call).images[0])
    seen.fill_(1)
    assert np.array_equal(pixels(pipe(apart=way, **call).images[0]), as_ever)
    written = adapter == "arc2face"  # it has no attention of its own that a mask could confine
    if way == "predictions" or not written:
        assert np.array_equal(none, nobody)
    seen[:, :32] = 0
    half = pixels(pipe(apart=way, num_images_per_prompt=2, batch_size=2, **call).images[0])
    if way == "predictions" or not written:
        assert not np.array_equal(half, as_ever)
        assert not np.array_equal(half, none)


def test_where_a_person_is_recognised_and_the_prompt_wishes_nothing(drawn: Drawn) -> None:
    class Parts:
        """Stripes: the face the upper half, glasses its first rows, the mouth its last ones."""

        def region(self, photo: Image.Image, faces: Any, name: str) -> torch.Tensor:
            mask = torch.zeros(1, photo.height, photo.width)
            mask[:, {"face": slice(0, 80), "glasses": slice(0, 20), "mouth": slice(60, 80)}.get(name, slice(0, 0))] = 1
            return mask

    photo: Any = drawn(1)
    face: Any = type("Seen", (), {"area": 1.0})()
    parser: Any = Parts()
    mask = repair.visual(parser, "a person, glasses, with lipstick", photo, [face])[0, :, 0]
    assert mask[:20].unique().tolist() == [0]
    assert mask[20:60].unique().tolist() == [1]
    assert mask[60:80].unique().tolist() == [repair.SHARED]
    assert mask[80:].unique().tolist() == [0]
    assert bool((repair.visual(parser, "a person, glasses", photo, []) == 1).all())


def test_several_people_are_kept_apart_otherwise(pipe: GeneratePipeline, drawn: Drawn) -> None:
    with pytest.raises(WrongRequest, match="leave out apart"):
        pipe(people=[[drawn(1)], [drawn(2)]], apart="layers", **QUICK)
