"""Datasets of the face world on disk: pictures, parsing, every parameter by name, caption, landmarks and box.

Two forms, both written shard by shard, a shard renamed into place when it is whole: what a killed run leaves is a
dataset that lacks some shards, and the same call again writes the missing ones.

* ``folder``: ``people-00000/`` with ``000000-000.png`` and ``000000-000.parsing.png``, beside it ``people-00000.jsonl``
  with one line a picture. A shard is there when its ``.jsonl`` is.
* ``webdataset``: ``people-00000.tar`` with ``000000-000.png``, ``.parsing.png`` and ``.json`` for each picture
  (https://github.com/webdataset/webdataset).

A picture is named by person and picture number; it depends on these and the seed alone.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor

from facegen.errors import BadImage, Cancelled, OutputUnwritable, WrongRequest
from facegen.files import atomic
from facegen.world.captions import captions_for, describe
from facegen.world.parameters import GROUPS, Scenes
from facegen.world.render import Rendering, render
from facegen.world.sampling import HELD_OUT_FROM, scenes_for

logger = logging.getLogger(__name__)

Format = Literal["folder", "webdataset"]
PLAN = "dataset.json"
_BATCH = 8

Progress = Callable[[int, int], None]  # pictures done, pictures in all


@dataclass(frozen=True)
class DatasetPlan:
    """People ``first`` to ``first + people - 1`` with ``pictures`` each; from 100,000 on they are held out."""

    people: int
    pictures: int
    size: int = 256
    seed: int = 0
    first: int = 0
    shard_people: int = 50
    format: Format = "folder"

    def __post_init__(self) -> None:
        if self.people < 1 or self.pictures < 1 or self.shard_people < 1 or self.first < 0:
            raise WrongRequest("A dataset needs at least one person, one picture of each and one person per shard.")
        if not 16 <= self.size <= 2048:
            raise WrongRequest(f"Pictures of the face world are 16 to 2048 pixels wide, not {self.size}.")
        if self.format not in ("folder", "webdataset"):
            raise WrongRequest(f"The format is 'folder' or 'webdataset', not '{self.format}'.")
        if self.first < HELD_OUT_FROM < self.first + self.people:
            raise WrongRequest(
                f"People from number {HELD_OUT_FROM} on are held out; write them to a folder of their own."
            )

    @property
    def shards(self) -> int:
        return -(-self.people // self.shard_people)

    def names(self, shard: int) -> tuple[list[int], list[int]]:
        """People and picture numbers of a shard, a person's pictures side by side."""
        start = self.first + shard * self.shard_people
        numbers = range(start, min(start + self.shard_people, self.first + self.people))
        return [person for person in numbers for _ in range(self.pictures)], list(range(self.pictures)) * len(numbers)

    def place(self, folder: Path, shard: int) -> Path:
        """The file whose being there says that the shard is whole."""
        return folder / f"people-{shard:05d}.{'jsonl' if self.format == 'folder' else 'tar'}"


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture as read back: ``record`` is its line of JSON."""

    record: Mapping[str, Any]
    image: Image.Image
    parsing: Image.Image  # mode L, index into facegen.world.render.PARSING

    @property
    def caption(self) -> str:
        return str(self.record["caption"])

    def scenes(self) -> Scenes:
        """The parameters, a batch of one."""
        groups = (torch.tensor([[self.record[group][p.name] for p in GROUPS[group]]]) for group in GROUPS)
        return Scenes(*groups)


def write_dataset(
    folder: Path | str,
    plan: DatasetPlan,
    *,
    workers: int = 1,
    resume: bool = True,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Path:
    """Draw the dataset; shards that are there already are kept, with ``resume=False`` the folder must be new.

    ``workers`` processes draw one shard each. ``progress`` replaces the bar on stderr. Setting ``cancel`` (or Ctrl-C)
    raises :class:`Cancelled` after the batch in hand and leaves whole shards only. Raises :class:`WrongRequest` when
    the folder was begun with another plan, :class:`OutputUnwritable` when it cannot be written.
    """
    folder = Path(folder)
    try:
        _agree(folder, plan, resume)
        _sweep_up(folder)
        with _Counter(plan, progress) as count:
            missing = []
            for shard in range(plan.shards):
                if plan.place(folder, shard).exists():
                    count(len(plan.names(shard)[0]))
                else:
                    missing.append(shard)
            if workers <= 1 or len(missing) <= 1:
                _write_here(folder, plan, missing, count, cancel)
            else:
                _write_apart(folder, plan, missing, count, cancel, min(workers, len(missing)))
    except OSError as error:
        raise OutputUnwritable(
            f"{folder} cannot be written ({error}); free some space or choose another folder, then run it again."
        ) from error
    except KeyboardInterrupt:
        raise _stopped(folder) from None
    return folder


def read_dataset(folder: Path | str) -> Iterator[Sample]:
    """Every picture of the whole shards, in the order of people and pictures; reads both forms."""
    folder = Path(folder)
    _, form = _plan_of(folder)
    for place in sorted(folder.glob("people-*.jsonl" if form == "folder" else "people-*.tar")):
        yield from _read_folder(place) if form == "folder" else _read_tar(place)


def read_records(folder: Path | str) -> Iterator[dict[str, Any]]:
    """Only the lines of JSON, without opening a picture."""
    folder = Path(folder)
    _, form = _plan_of(folder)
    if form == "folder":
        for place in sorted(folder.glob("people-*.jsonl")):
            with place.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines)
    else:
        for place in sorted(folder.glob("people-*.tar")):
            with tarfile.open(place) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        yield json.load(cast(io.BufferedReader, tar.extractfile(member)))


# -- writing ------------------------------------------------------------------------------------------------------


def _agree(folder: Path, plan: DatasetPlan, resume: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    wanted = asdict(plan)
    if path.exists():
        if not resume:
            raise WrongRequest(f"{folder} holds a dataset already; allow resuming or choose another folder.")
        found, _ = _plan_of(folder)
        different = [name for name, value in wanted.items() if found.get(name) != value and name != "people"]
        grows = plan.people >= int(found.get("people", 0)) and int(found.get("people", 0)) % plan.shard_people == 0
        if different or (found.get("people") != plan.people and not grows):
            told = ", ".join(different) or "number of people"
            raise WrongRequest(f"{folder} was begun with another {told}; choose another folder or the same values.")
    elif any(folder.glob("people-*")):
        raise WrongRequest(f"{folder} holds people-* files but no {PLAN}; choose another folder.")
    _put(path, (json.dumps(wanted, indent=2) + "\n").encode())


def _plan_of(folder: Path) -> tuple[dict[str, Any], Format]:
    try:
        plan = json.loads((folder / PLAN).read_text("utf-8"))
        form = plan["format"]
    except FileNotFoundError:
        raise WrongRequest(f"{folder} holds no dataset: {PLAN} is missing.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise WrongRequest(f"{folder / PLAN} is broken ({error}); delete the folder and write it again.") from error
    return plan, form


class _Counter:
    """Counts pictures into a bar on stderr, or into the caller's own display."""

    def __init__(self, plan: DatasetPlan, progress: Progress | None) -> None:
        self.total = plan.people * plan.pictures
        self.progress = progress
        self.done = 0

    def __enter__(self) -> Callable[[int], None]:
        from tqdm import tqdm

        self.bar = tqdm(total=self.total, unit="picture", disable=self.progress is not None)
        return self.count

    def count(self, pictures: int) -> None:
        self.done += pictures
        self.bar.update(pictures)
        if self.progress:
            self.progress(self.done, self.total)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _write_here(
    folder: Path,
    plan: DatasetPlan,
    shards: Sequence[int],
    count: Callable[[int], None],
    cancel: threading.Event | None,
) -> None:
    def drawn(pictures: int) -> None:
        count(pictures)
        if cancel is not None and cancel.is_set():
            raise _stopped(folder)

    for shard in shards:
        _write_shard(folder, plan, shard, drawn)


def _write_apart(
    folder: Path,
    plan: DatasetPlan,
    shards: Sequence[int],
    count: Callable[[int], None],
    cancel: threading.Event | None,
    workers: int,
) -> None:
    """One process per worker: threads of one process get in each other's way in small tensors."""
    spawn = get_context("spawn")
    stop = spawn.Event()
    with ProcessPoolExecutor(workers, spawn, _begin_worker, (stop,)) as pool:
        running = {pool.submit(_write_apart_shard, folder, plan, shard): len(plan.names(shard)[0]) for shard in shards}
        waiting: set[Future[None]] = set(running)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    count(running[future])
                if cancel is not None and cancel.is_set():
                    raise _stopped(folder)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_stop: Event | None = None  # of this worker process


def _begin_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    torch.set_num_threads(1)


def _write_apart_shard(folder: Path, plan: DatasetPlan, shard: int) -> None:
    def drawn(_: int) -> None:
        if _stop is not None and _stop.is_set():
            raise _stopped(folder)

    _write_shard(folder, plan, shard, drawn)


def _stopped(folder: Path) -> Cancelled:
    return Cancelled(f"Stopped; the same call goes on where {folder} ends now.")


def _sweep_up(folder: Path) -> None:
    """Remove what runs that were killed had begun."""
    for path in folder.glob(".people-*"):
        if path.is_dir() and not _alive(int(path.suffix.removeprefix("."))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # an earlier call of this process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_shard(folder: Path, plan: DatasetPlan, shard: int, drawn: Callable[[int], None] | None = None) -> None:
    """Draw one shard into a temporary place and rename it when it is whole."""
    place = plan.place(folder, shard)
    unfinished = folder / f".{place.stem}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        lines = list(_draw_shard(unfinished, plan, shard, drawn))
        if plan.format == "folder":
            pictures = folder / place.stem
            shutil.rmtree(pictures, ignore_errors=True)  # of a run that was killed between this line and the last
            os.replace(unfinished, pictures)
            _put(place, "".join(json.dumps(line) + "\n" for line in lines).encode())
        else:
            tar = unfinished / place.name
            _pack(tar, unfinished, lines)
            os.replace(tar, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _draw_shard(
    unfinished: Path, plan: DatasetPlan, shard: int, drawn: Callable[[int], None] | None
) -> Iterator[dict[str, Any]]:
    people, pictures = plan.names(shard)
    for start in range(0, len(people), _BATCH):
        who, which = people[start : start + _BATCH], pictures[start : start + _BATCH]
        scenes = scenes_for(plan.seed, who, which)
        drawing = render(scenes, plan.size)
        captions = captions_for(plan.seed, who, which, scenes)
        for row, (person, picture) in enumerate(zip(who, which, strict=True)):
            name = f"{person:06d}-{picture:03d}"
            _pixels(drawing.rgb[row]).save(unfinished / f"{name}.png")
            Image.fromarray(drawing.parsing[row].numpy()).save(unfinished / f"{name}.parsing.png")
            record = {"name": name, "person": person, "picture": picture, "caption": captions[row]}
            record["held_out"] = person >= HELD_OUT_FROM
            if plan.format == "folder":
                shard_name = plan.place(unfinished, shard).stem
                record |= {"image": f"{shard_name}/{name}.png", "parsing": f"{shard_name}/{name}.parsing.png"}
            yield record | _known(scenes, drawing, row)
        if drawn is not None:
            drawn(len(who))


def _known(scenes: Scenes, drawing: Rendering, row: int) -> dict[str, Any]:
    """Everything that is known of a picture beside its pixels."""
    parameters = {
        group: {
            p.name: round(float(value), 5) for p, value in zip(GROUPS[group], getattr(scenes, group)[row], strict=True)
        }
        for group in GROUPS
    }
    return {
        "facts": [[fact.kind, fact.value] for fact in describe(scenes, row)],
        "box": _rounded(drawing.box[row]),
        "landmarks5": _rounded(drawing.landmarks5[row]),
        "landmarks68": _rounded(drawing.landmarks68[row]),
        **parameters,
    }


def _rounded(values: Tensor) -> list[Any]:
    return (values.double() * 100).round().div(100).tolist()


def _pixels(rgb: Tensor) -> Image.Image:
    return Image.fromarray((rgb.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _pack(tar: Path, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """A tar of one sample after the other; without times and owners, so that equal datasets are equal files."""
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as out:
        for line in lines:
            name = str(line["name"])
            parts = {ending: (folder / f"{name}.{ending}").read_bytes() for ending in ("png", "parsing.png")}
            parts["json"] = json.dumps(line).encode()
            for ending, content in parts.items():
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))


def _put(path: Path, content: bytes) -> None:
    """Write a file at once: it is whole or not there."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


# -- reading ------------------------------------------------------------------------------------------------------


def _read_folder(place: Path) -> Iterator[Sample]:
    with place.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            pictures = (place.parent / record[key] for key in ("image", "parsing"))
            image, parsing = (_open(path.read_bytes(), path) for path in pictures)
            yield Sample(record, image, parsing)


def _read_tar(place: Path) -> Iterator[Sample]:
    with tarfile.open(place) as tar:
        parts: dict[str, bytes] = {}
        for member in tar:
            name, _, ending = member.name.partition(".")
            parts[ending] = cast(io.BufferedReader, tar.extractfile(member)).read()
            if len(parts) == 3:
                image, parsing = (_open(parts[key], place / name) for key in ("png", "parsing.png"))
                yield Sample(json.loads(parts["json"]), image, parsing)
                parts = {}


def _open(content: bytes, path: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except OSError as error:
        raise BadImage(
            f"{path} is not a whole picture ({error}); delete its shard and write the dataset again."
        ) from error
    return image
