"""The models behind the browser: loaded once, worked by one thread at a time, heard through a queue."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from facegen.errors import Cancelled
from facegen.loading import Loading
from facegen.metadata import Picture
from facegen.pipeline import Pipeline, Progress, Watch, task
from facegen.report import Report

log = logging.getLogger(__name__)

PREVIEW_EVERY = 0.6  # seconds between previews: decoding one must not cost more than the steps themselves


@dataclass(frozen=True)
class Painting:
    """A step is done; `preview` holds the pictures as they look so far, when it was time for one."""

    fraction: float
    done: int
    total: int
    preview: tuple[Image.Image, ...] = ()


@dataclass(frozen=True, eq=False)
class Finished:
    """One picture is finished."""

    picture: Picture
    report: Report
    count: int


Event = Painting | Finished


class Studio:
    """Pipelines that share what is loaded; nothing is loaded before it is needed."""

    def __init__(self, loading: Loading) -> None:
        self.loading = loading
        self._pipelines: dict[str, Pipeline[Any]] = {}
        self._loading = threading.Lock()

    def pipeline(self, name: str) -> Pipeline[Any]:
        """The pipeline of a task."""
        with self._loading:
            if name not in self._pipelines:
                kind = task(name)
                first = next(iter(self._pipelines.values()), None)
                self._pipelines[name] = kind.load(self.loading) if first is None else kind.from_pipe(first)
            return self._pipelines[name]

    def events(self, name: str, request: Any, stop: threading.Event) -> Iterator[Event]:
        """Run a request and tell of it as it goes; set `stop` to end it, which raises :class:`Cancelled` here.

        Whatever goes wrong in the run is raised here too. Leaving the iterator early stops the run.
        """
        told: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                for event in self._work(name, request, stop, told):
                    told.put(event)
                told.put(None)
            except BaseException as error:
                told.put(error)

        worker = threading.Thread(target=work, name=f"facegen-{name}", daemon=True)
        worker.start()
        try:
            while (event := told.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            stop.set()
            worker.join()

    def _work(
        self, name: str, request: Any, stop: threading.Event, told: queue.SimpleQueue[Event | BaseException | None]
    ) -> Iterator[Finished]:
        pipe = self.pipeline(name)
        last = time.monotonic()

        def tell(progress: Progress) -> None:
            nonlocal last
            preview: tuple[Image.Image, ...] = ()
            if progress.preview is not None and time.monotonic() - last > PREVIEW_EVERY:
                preview = tuple(progress.preview())
                last = time.monotonic()
            told.put(Painting(progress.fraction, progress.done, progress.total, preview))

        watch = Watch(on_progress=tell, cancelled=stop.is_set)
        if stop.is_set():
            raise Cancelled("Stopped before it began.")
        count = getattr(request, "num_images_per_prompt", 1)
        for picture, report in pipe.stream(pipe.resolve(request), watch=watch):
            yield Finished(picture, report, count)
