"""Runs behind the browser: told step by step, stopped at once, wrong requests raised where they are heard."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from facegen.demos.app import refused, sentence
from facegen.demos.studio import Finished, Painting, Studio
from facegen.errors import Cancelled, NoFaceFound, WrongRequest
from facegen.loading import Loading
from facegen.pipelines.generate import GenerateRequest


@pytest.fixture(scope="module")
def house(tiny_sd15: Path, tiny_pack: Path) -> Studio:
    return Studio(Loading(model=str(tiny_sd15), pack=str(tiny_pack)))


def test_tells_of_every_step_and_picture(house: Studio) -> None:
    request = GenerateRequest(num_inference_steps=3, num_images_per_prompt=2, seed=1)
    events = list(house.events("generate", request, threading.Event()))
    assert [event.done for event in events if isinstance(event, Painting)] == [1, 2, 3, 4, 5, 6]
    finished = [event for event in events if isinstance(event, Finished)]
    assert [event.report.provenance.seed for event in finished if event.report.provenance] == [1, 2]
    assert isinstance(events[-1], Finished)


def test_loads_once(house: Studio) -> None:
    assert house.pipeline("generate") is house.pipeline("generate")


def test_stops_between_two_steps(house: Studio) -> None:
    stop = threading.Event()
    run = house.events("generate", GenerateRequest(num_inference_steps=50), stop)
    assert isinstance(next(run), Painting)
    stop.set()
    with pytest.raises(Cancelled):
        list(run)


def test_leaving_early_stops_the_run(house: Studio) -> None:
    stop = threading.Event()
    run = house.events("generate", GenerateRequest(num_inference_steps=50), stop)
    next(run)
    run.close()
    assert stop.is_set()
    assert not [one for one in threading.enumerate() if one.name == "facegen-generate"]


def test_what_goes_wrong_is_raised_where_it_is_heard(house: Studio) -> None:
    with pytest.raises(WrongRequest):
        list(house.events("generate", GenerateRequest(adapters=("arc2face",)), threading.Event()))


def test_errors_are_shown_without_the_folder_of_the_upload() -> None:
    shown = refused(NoFaceFound("No face in /tmp/gradio/0123456789abcdef0123/me.jpg; give a clear photo."))
    assert shown.message == "No face in me.jpg; give a clear photo."
    assert shown.title == "No face found"
    assert sentence(ValueError("plain words")) == "plain words"
