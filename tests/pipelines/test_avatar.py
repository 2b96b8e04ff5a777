"""An avatar says and shows what its photo shows, and the prompt has the last word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from facegen.errors import WrongRequest
from facegen.pipelines.avatar import AvatarPipeline
from facegen.pipelines.generate import GeneratePipeline
from facegen.world.words import parse_prompt

FAST: dict[str, Any] = {"num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def pipe(mini: Path) -> AvatarPipeline:
    return AvatarPipeline.from_pretrained("mini")


def asked(out: Any) -> set[str]:
    return set(out.reports[0].obedience.asked)


def test_what_the_photo_shows_is_asked_for(pipe: AvatarPipeline) -> None:
    out = pipe(faces=["example:3"], **FAST)
    again = pipe(faces=["example:3"], num_images_per_prompt=2, **FAST)
    assert out.images[0].tobytes() == again.images[0].tobytes() != again.images[1].tobytes()
    assert pipe.adapters == ("instantid",)
    assert any("hair" in one for one in asked(out))
    assert any("skin" in one for one in asked(out))
    face = pipe.person(("example:3",), "only", pipe.adapters)
    assert face is not None
    read = pipe._shown(face)
    assert {fact.kind for fact in read.facts} >= {"skin", "hair_style", "glasses", "beard", "expression", "looking"}


def test_the_prompt_has_the_last_word(pipe: AvatarPipeline) -> None:
    out = pipe(faces=["example:3"], prompt="a portrait of a person with blue hair, angry", **FAST)
    told = asked(out)
    assert {"blue hair", "angry"} <= told
    assert sum("hair" in one.split() for one in told if not one.startswith("any ")) == 1
    assert not told & {"smiling", "neutral expression", "laughing"}


def test_other_adapters_act_without_a_pose(pipe: AvatarPipeline) -> None:
    # arc2face writes the prompt itself, from these words.
    alone = AvatarPipeline.from_pipe(GeneratePipeline.from_pretrained("mini"))
    out = alone(faces=["example:3"], adapters=("arc2face",), **FAST)
    assert out.reports[0].likeness is not None


def test_a_photo_is_needed(pipe: AvatarPipeline) -> None:
    with pytest.raises(WrongRequest, match="needs a photo"):
        pipe(prompt="a portrait of a person")


def test_facts_of_the_photo_are_words_that_mini_knows(pipe: AvatarPipeline) -> None:
    out = pipe(faces=["example:12"], prompt="", **FAST)
    assert out.reports[0].obedience is not None
    kinds = {Fact.kind for Fact in parse_prompt(", ".join(asked(out)))}
    assert {"skin", "looking"} <= kinds
