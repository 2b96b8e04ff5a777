"""A dataset is whole whatever happens while it is written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

from facegen.errors import BadImage, Cancelled, OutputUnwritable, WrongRequest
from facegen.world.captions import describe
from facegen.world.dataset import DatasetPlan, Format, read_dataset, read_records, write_dataset
from facegen.world.parameters import GROUPS
from facegen.world.sampling import HELD_OUT_FROM, scene_for


def _plan(form: Format = "folder", **values: int) -> DatasetPlan:
    return DatasetPlan(**{"people": 3, "pictures": 2, "size": 16, "shard_people": 1, **values}, format=form)


def _quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", get_args(Format))
def test_what_is_written_is_read_back(tmp_path: Path, form: Format) -> None:
    write_dataset(tmp_path / "faces", _plan(form), progress=_quiet)
    samples = list(read_dataset(tmp_path / "faces"))
    assert [(s.record["person"], s.record["picture"]) for s in samples] == [(p, k) for p in range(3) for k in range(2)]
    sample = samples[3]
    drawn = scene_for(0, 1, 1)
    for group in GROUPS:
        torch.testing.assert_close(getattr(sample.scenes(), group), getattr(drawn, group), atol=1e-5, rtol=0)
    assert sample.image.size == sample.parsing.size == (16, 16)
    assert sample.image.mode == "RGB"
    assert sample.caption
    assert [tuple(fact) for fact in sample.record["facts"]] == [(f.kind, f.value) for f in describe(drawn, 0)]
    assert len(sample.record["landmarks68"]) == 68
    assert len(sample.record["box"]) == 4
    assert sample.record["held_out"] is False
    assert [record["name"] for record in read_records(tmp_path / "faces")] == [s.record["name"] for s in samples]


def test_webdataset_members_stand_sample_by_sample(tmp_path: Path) -> None:
    write_dataset(tmp_path, _plan("webdataset"), progress=_quiet)
    with tarfile.open(tmp_path / "people-00001.tar") as tar:
        assert tar.getnames() == [
            f"000001-00{picture}.{ending}" for picture in range(2) for ending in ("png", "parsing.png", "json")
        ]


@pytest.mark.parametrize("form", get_args(Format))
def test_a_cancelled_run_keeps_whole_shards_and_goes_on(tmp_path: Path, form: Format) -> None:
    stop = threading.Event()

    def after_three(done: int, total: int) -> None:
        if done > 2:
            stop.set()

    with pytest.raises(Cancelled):
        write_dataset(tmp_path / "a", _plan(form), progress=after_three, cancel=stop)
    assert len(list(read_dataset(tmp_path / "a"))) == 2
    assert not list((tmp_path / "a").glob(".*"))
    seen: list[int] = []
    write_dataset(tmp_path / "a", _plan(form), progress=lambda done, total: seen.append(done))
    assert seen == [2, 4, 6]
    write_dataset(tmp_path / "b", _plan(form), progress=_quiet)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_what_a_killed_run_had_begun_is_swept_up(tmp_path: Path) -> None:
    """A shard's pictures without their line of JSON, and a temporary folder of a process that is gone."""
    write_dataset(tmp_path, _plan(), progress=_quiet)
    whole = _files(tmp_path)
    (tmp_path / "people-00001.jsonl").unlink()
    (tmp_path / "people-00001" / "000001-000.png").write_bytes(b"half")
    (tmp_path / ".people-00002.999999999").mkdir()
    assert len(list(read_dataset(tmp_path))) == 4
    write_dataset(tmp_path, _plan(), progress=_quiet)
    assert _files(tmp_path) == whole
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    folder, plan = tmp_path / "faces", _plan(people=6, size=64)
    code = (
        "import sys; from facegen.world.dataset import *\n"
        "write_dataset(sys.argv[1], DatasetPlan(people=6, pictures=2, size=64, shard_people=1))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(folder.glob("*.jsonl")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for sample in read_dataset(folder):
        assert sample.image.size == (64, 64)
    write_dataset(folder, plan, workers=2, progress=_quiet)
    assert len(list(read_dataset(folder))) == 12
    assert not list(folder.glob(".*"))
    write_dataset(tmp_path / "at once", plan, progress=_quiet)
    assert _files(folder) == _files(tmp_path / "at once")


def test_a_dataset_may_grow_but_not_change(tmp_path: Path) -> None:
    write_dataset(tmp_path, _plan(people=1), progress=_quiet)
    write_dataset(tmp_path, _plan(people=2), progress=_quiet)
    assert len(list(read_records(tmp_path))) == 4
    with pytest.raises(WrongRequest, match="seed"):
        write_dataset(tmp_path, _plan(people=2, seed=1), progress=_quiet)
    with pytest.raises(WrongRequest, match="number of people"):
        write_dataset(tmp_path, _plan(people=1), progress=_quiet)
    with pytest.raises(WrongRequest, match="holds a dataset"):
        write_dataset(tmp_path, _plan(people=2), resume=False, progress=_quiet)


def test_wrong_wishes_are_told_apart(tmp_path: Path) -> None:
    for values in ({"people": 0}, {"size": 4}, {"first": HELD_OUT_FROM - 1}):
        with pytest.raises(WrongRequest):
            _plan(**values)
    with pytest.raises(WrongRequest, match="folder"):
        DatasetPlan(1, 1, format="zip")  # type: ignore[arg-type]
    with pytest.raises(WrongRequest, match="missing"):
        list(read_dataset(tmp_path))
    (tmp_path / "a file").write_text("")
    with pytest.raises(OutputUnwritable):
        write_dataset(tmp_path / "a file" / "faces", _plan(), progress=_quiet)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(WrongRequest, match="broken"):
        list(read_dataset(tmp_path))


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, _plan(people=1), progress=_quiet)
    record = json.loads((tmp_path / "people-00000.jsonl").read_text().splitlines()[0])
    (tmp_path / record["image"]).write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"000000-000\.png"):
        list(read_dataset(tmp_path))
