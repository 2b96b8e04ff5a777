"""Tries: the judges choose among pictures of other seeds; what is kept can be made again as a single one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facegen import metadata
from facegen.cli import main
from facegen.errors import Cancelled, WrongRequest
from facegen.pipeline import Progress, rebuild
from facegen.pipelines.generate import GeneratePipeline
from facegen.report import NO_FACE, Judges, Likeness, Matched, Obedience, Report

QUICK: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5}
ASKED = ("red hair", "glasses", "a hat")


class Reader:
    """Finds so many of the three things asked for in the first, second … picture that it sees."""

    def __init__(self, *hits: int) -> None:
        self.hits, self.seen = hits, 0

    def obedience(self, prompt: str, image: Any) -> Obedience:
        self.seen += 1
        return Obedience(asked=ASKED, hit=ASKED[: self.hits[self.seen - 1]])


def reader(pipe: GeneratePipeline, monkeypatch: pytest.MonkeyPatch, *hits: int) -> Reader:
    one = Reader(*hits)
    judges = Judges(detector=pipe.analyzer(pipe.reading_pack()), prompt=one)
    monkeypatch.setattr(pipe, "judges", lambda adapters: judges)
    return one


def test_the_best_is_kept_with_its_own_seed(pipe: GeneratePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    one = reader(pipe, monkeypatch, 1, 2, 0, 2)
    out = pipe(prompt="x", tries=3, **QUICK)
    assert one.seen == 3
    report = out.reports[0]
    assert report.obedience is not None
    assert report.obedience.hit == ASKED[:2]
    assert report.measures == {"tries": 3.0}
    assert report.provenance is not None
    assert report.provenance.seed == 1005  # the second try
    alone = pipe(prompt="x", **{**QUICK, "seed": 1005, "tries": 1})
    assert np.array_equal(np.asarray(out.images[0]), np.asarray(alone.images[0]))


def test_it_stops_at_a_faultless_one_and_seeds_never_meet(
    pipe: GeneratePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = reader(pipe, monkeypatch, 3, 0, 3, 2, 2)
    out = pipe(prompt="x", tries=3, num_images_per_prompt=2, batch_size=2, **QUICK)
    assert one.seen == 3
    assert [report.provenance.seed for report in out.reports if report.provenance] == [5, 1006]
    assert [report.measures["tries"] for report in out.reports] == [1.0, 2.0]


def test_what_was_kept_is_made_again_from_its_file(
    pipe: GeneratePipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reader(pipe, monkeypatch, 3, 0, 2)
    out = pipe(prompt="x", tries=2, num_images_per_prompt=2, **QUICK)
    record = metadata.read(out.save(tmp_path)[1])
    assert record.report["measures"] == {"tries": 2.0}
    loading, request = rebuild(record)
    assert (request.tries, request.seed + record.index) == (1, 1006)
    fresh = GeneratePipeline.load(loading)
    ((picture, _),) = fresh.stream(fresh.resolve(request), indices=[record.index])
    assert np.array_equal(np.asarray(picture), np.asarray(out.images[1]))


def test_progress_goes_on_over_all_tries_and_can_be_cancelled(
    pipe: GeneratePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader(pipe, monkeypatch, 0, 0, 3, 3)
    seen: list[Progress] = []
    pipe(prompt="x", tries=3, num_images_per_prompt=2, on_progress=seen.append, **QUICK)
    assert [(one.done, one.total) for one in seen] == [(done, 12) for done in range(1, 9)]
    with pytest.raises(Cancelled, match="Stopped"):
        pipe(prompt="x", tries=3, cancelled=lambda: True, **QUICK)


def test_given_noise_cannot_be_tried_again(pipe: GeneratePipeline) -> None:
    noise = torch.randn(1, *pipe.model.latent_shape(64, 64))
    with pytest.raises(WrongRequest, match="leave tries out"):
        pipe(prompt="x", tries=2, latents=noise, **QUICK)


def test_files_are_called_by_the_seed_that_made_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Reader(0, 1, 0)
    monkeypatch.setattr(GeneratePipeline, "judges", lambda self, adapters: Judges(prompt=one))
    flags = ["--model", str(tiny), "--prompt", "x", "--tries", "3", "--seed", "5", "--steps", "1", "--device", "cpu"]
    assert main(["generate", *flags, "-o", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["generate-1005.png"]


def like(cosine: float, threshold: float | None = 0.5) -> Likeness:
    return Likeness(cosine=cosine, judge="j", threshold=threshold)


def test_merit_orders_as_one_would() -> None:
    obeyed, missed = Obedience(asked=ASKED, hit=ASKED), Obedience(asked=ASKED, hit=ASKED[:2])
    ordered = [
        Report(likeness=like(0.7), obedience=obeyed),
        Report(likeness=like(0.6), obedience=obeyed),
        Report(likeness=like(0.45), obedience=obeyed),
        Report(likeness=like(0.7), obedience=missed),
        Report(likeness=like(0.1), obedience=obeyed),
        Report(not_judged={"likeness": NO_FACE}, obedience=obeyed),
        Report(not_judged={"likeness": NO_FACE}, obedience=missed),
    ]
    assert sorted(ordered, key=lambda one: one.merit, reverse=True) == ordered
    assert [one.faultless for one in ordered] == [True, True, *[False] * 5]


def test_merit_of_several_people_of_nobody_and_without_a_threshold() -> None:
    both = Report(people=(Matched(likeness=like(0.6)), Matched(likeness=like(0.6))))
    assert both.faultless
    assert not Report(people=(Matched(likeness=like(0.9)), Matched(likeness=None))).faultless
    assert Report().faultless  # nothing was asked for that could be missed
    assert Report(not_judged={"likeness": "no judge fits these weights"}).faultless
    # Who knows no threshold cannot say "enough", and the liker one still counts for more.
    assert not Report(likeness=like(0.9, None)).faultless
    assert Report(likeness=like(0.9, None)).merit > Report(likeness=like(0.8, None)).merit
