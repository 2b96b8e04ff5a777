"""The labels of the photographs are sound, the score counts what it says, real portraits can be read and edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.images import load_rgb
from facegen.pipelines.avatar import AvatarPipeline
from facegen.pipelines.inpaint import InpaintPipeline
from facegen.pipelines.restore import RestorePipeline
from facegen.pipelines.swap import SwapPipeline
from facegen.world.facts import FACTS, Fact
from tests.bench.bench_photos import KINDS, Row, labels, measured, read_off, scores, sheet

VALUES = {
    **{kind: set(FACTS[kind]) for kind in ("skin", "hair_color", "beard", "looking", "hat")},
    "hair_length": {"bald", "short", "long"},
    "glasses": {"none", "glasses"},
    "smile": {"yes", "no"},
}


def test_labels_are_values_that_can_be_judged() -> None:
    assert len(labels()) > 15
    for name, kinds in labels().items():
        for kind, values in kinds.items():
            assert values, name
            assert set(values) < VALUES[kind], (name, kind)  # a label that accepts everything says nothing


def test_labels_name_photos_that_are_there(shared: Path) -> None:
    if not (shared / "photos").is_dir():
        pytest.skip("no ../shared/photos beside the checkout")
    assert not [name for name in labels() if not (shared / "photos" / name).is_file()]


def test_facts_are_read_in_the_words_of_the_labels() -> None:
    facts = [Fact("hair_style", "any long"), Fact("glasses", "round"), Fact("expression", "laughing")]
    assert read_off(facts) == {"hair_length": "long", "glasses": "glasses", "hat": "none", "smile": "yes"}
    assert read_off([Fact("hair_style", "bald"), Fact("expression", "sad")])["hair_length"] == "bald"


def test_scores_count_against_labels_and_chance() -> None:
    def row(name: str, skin: str, shown: str) -> Row:
        return Row(name, {"skin": [skin]}, {"skin": skin}, None, {"skin": shown})

    rows = [row("a", "light", "light"), row("b", "dark", "light"), row("c", "light", "dark")]
    rows.append(Row("d", {"skin": ["light"]}, None, None, None))  # no face found: wrong
    found = scores(rows)
    assert found["skin"] == {"read": 0.75, "carried over": 0.25, "chance": pytest.approx(6 / 9, abs=1e-4), "photos": 4}
    assert found["all"]["carried over"] == 0.25
    assert found["hat"]["photos"] == 0


@pytest.fixture(scope="module")
def portraits(shared: Path) -> tuple[Image.Image, Image.Image]:
    """Two people, half as large as they come."""
    if not (shared / "photos").is_dir():
        pytest.skip("no ../shared/photos beside the checkout")
    found = [load_rgb(shared / "photos" / name).reduce(2) for name in ("portrait_08.jpg", "portrait_02.jpg")]
    return found[0], found[1]


@pytest.fixture(scope="module")
def painter(mini: Path) -> InpaintPipeline:
    """mini, loaded once."""
    return InpaintPipeline.from_pretrained("mini")


def outside(before: Image.Image, after: Image.Image, mask: torch.Tensor) -> int:
    """How many pixels changed where the mask (1, H, W) is 0, if any changed where it is not."""
    differ = (np.asarray(before) != np.asarray(after)).any(-1)
    inside = mask[0].numpy() > 0
    assert differ[inside].any()
    return int(differ[~inside].sum())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["eyes", "hair", "glasses", "background", "mask"])
def test_a_part_of_a_photo_is_painted(
    portraits: tuple[Image.Image, Image.Image], painter: InpaintPipeline, where: str
) -> None:
    pipe, (photo, _) = painter, portraits
    drawn = Image.new("L", photo.size)
    drawn.paste(255, (150, 120, 220, 190))
    call: dict[str, Any] = {"mask": drawn} if where == "mask" else {"region": where}
    out = pipe(image=photo, select="largest", num_inference_steps=2, seed=1, **call)
    assert outside(photo, out.images[0], pipe._plan(out.request).mask) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["trained", "guidance"])
def test_a_face_is_put_into_a_photo(
    portraits: tuple[Image.Image, Image.Image], painter: InpaintPipeline, method: str
) -> None:
    pipe, (target, source) = SwapPipeline.from_pipe(painter), portraits
    call: dict[str, Any] = {"source": source, "target": target, "method": method, "select": "largest"}
    out = pipe(num_inference_steps=2, seed=1, **call)
    assert outside(target, out.images[0], pipe._plan(out.request).mask) == 0


@pytest.mark.slow
def test_a_damaged_photo_is_restored(portraits: tuple[Image.Image, Image.Image], painter: InpaintPipeline) -> None:
    pipe, (photo, _) = RestorePipeline.from_pipe(painter), portraits
    damaged = photo.reduce(4).resize(photo.size, Image.Resampling.BICUBIC)
    out = pipe(image=damaged, num_inference_steps=4, seed=1)
    masks = torch.stack([job.mask for job in pipe._plan(out.request)[1]])
    assert outside(damaged, out.images[0], masks.amax(0)) == 0


def test_two_portraits_become_avatars(shared: Path, mini: Path) -> None:
    folder = shared / "photos"
    if not folder.is_dir():
        pytest.skip("no ../shared/photos beside the checkout")
    pipe = AvatarPipeline.from_pretrained("mini")
    rows = measured(pipe, folder, ["portrait_02.jpg", "portrait_08.jpg"], num_inference_steps=2, seed=1)
    table = scores(rows)
    assert set(table) == {*KINDS, "all"}
    assert table["all"]["read"] > 0.7  # what is read off these two; the picture itself needs more steps
    assert [row.read["hair_length"] for row in rows if row.read] == ["short", "long"]
    assert [row.read["skin"] for row in rows if row.read] == ["dark", "light"]
    assert sheet(rows).size == (7 * 128, 128)
    assert torch.isfinite(torch.tensor([table["all"]["chance"]])).all()
