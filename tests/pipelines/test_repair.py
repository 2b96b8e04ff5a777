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
from facegen.face.parse import REGIONS
from facegen.pipelines.generate import GeneratePipeline
from facegen.report import Judges, Obedience
from facegen.world.facts import FACTS

QUICK: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 1}
PROMPT = "a person with red hair and glasses"
Drawn = Callable[[int], Image.Image]


class Reader:
    """Says of the first picture that the hair is wrong; of later ones, if it is content, that all is well."""

    def __init__(self, content: bool) -> None:
        self.content, self.seen = content, 0

    def obedience(self, prompt: str, image: Any) -> Obedience:
        self.seen += 1
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
