"""The demo in the browser: a tab per file of pipelines/, a control per field of its request, and a few about faces.

It listens on this machine alone, tells nobody, needs no network, and removes what was uploaded and made after an hour.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

# gradio reads these when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from facegen import __version__, examples
from facegen.demos import forms, reports, studio
from facegen.errors import Cancelled, FacegenError, WrongRequest
from facegen.loading import Loading
from facegen.pipeline import task, tasks
from facegen.request import Control, Request, make

log = logging.getLogger(__name__)

PEOPLE = 10
KEPT_SECONDS = 3600
Update = dict[Any, Any]


@dataclass(eq=False)
class Sessions:
    """Which run belongs to which browser window, so that one can be stopped without the others."""

    stops: dict[str, threading.Event] = field(default_factory=dict)

    def begin(self, window: gr.Request) -> threading.Event:
        self.stop(window)
        self.stops[_key(window)] = threading.Event()
        return self.stops[_key(window)]

    def current(self, window: gr.Request) -> threading.Event:
        return self.stops.setdefault(_key(window), threading.Event())

    def stop(self, window: gr.Request) -> None:
        if (event := self.stops.pop(_key(window), None)) is not None:
            event.set()


def _key(window: gr.Request) -> str:
    return str(window.session_hash)


def build(loading: Loading) -> gr.Blocks:
    """The page; nothing is loaded before the first picture is asked for."""
    house = studio.Studio(loading)
    sessions = Sessions()
    with gr.Blocks(
        title="facegen", analytics_enabled=False, delete_cache=(KEPT_SECONDS // 4, KEPT_SECONDS), fill_width=False
    ) as page:
        gr.Markdown(
            f"# facegen\nPictures of a person, made from their photos. Everything runs on this machine; model: "
            f"**{Path(loading.model).name}**. Every saved picture says in its metadata that it is AI-generated."
        )
        with gr.Tabs(selected="generate"):
            for name in tasks():
                with gr.Tab(name.replace("_", " ").capitalize(), id=name):
                    TaskTab(page, name, house, sessions).build()
            with gr.Tab("Look", id="look"):
                _look_tab(loading)
            with gr.Tab("Compare", id="compare"):
                _compare_tab(loading)
            with gr.Tab("Read", id="read"):
                _read_tab()
        page.unload(sessions.stop)
    return page


@lru_cache(maxsize=1)
def people() -> tuple[tuple[Any, str], ...]:
    """The example people with their names."""
    return tuple((examples.photo(f"{examples.PREFIX}{one}"), str(one)) for one in range(1, PEOPLE + 1))


def sentence(error: BaseException) -> str:
    """An error in the user's words: without the folder that the browser's upload went to."""
    return re.sub(r"\S*/gradio/[0-9a-f]{16,}/", "", str(error))


def refused(error: FacegenError) -> gr.Error:
    """What the browser shows for an error that is meant for the user."""
    title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).capitalize()
    return gr.Error(sentence(error), title=title, print_exception=False, duration=15)


def guarded(act: Callable[..., Any]) -> Callable[..., Any]:
    """`act` with its errors turned into what the browser shows."""

    def run(*values: Any) -> Any:
        try:
            return act(*values)
        except FacegenError as error:
            raise refused(error) from None

    return run


class TaskTab:
    """One pipeline's tab."""

    def __init__(self, page: gr.Blocks, name: str, house: studio.Studio, sessions: Sessions) -> None:
        self.page, self.name, self.house, self.sessions = page, name, house, sessions
        self.request: type[Request] = task(name).request_class
        self.widgets: list[forms.Widget] = []
        self.example: gr.State | None = None

    @property
    def _form(self) -> str:
        return f"{self.name}-field"

    def build(self) -> None:
        gr.Markdown(self.request.task)
        everyday, advanced = forms.split(self.request)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=360):
                self._add_all(everyday)
                if advanced:
                    with gr.Accordion("More", open=False):
                        self._add_all(advanced)
            with gr.Column(scale=6, min_width=400):
                with gr.Row():
                    verb = self.name.replace("_", " ").capitalize()
                    self.go = gr.Button(verb, variant="primary", elem_id=f"{self.name}-go")
                    self.halt = gr.Button("Stop", variant="secondary", interactive=False, elem_id=f"{self.name}-stop")
                self.status = gr.HTML(elem_id=f"{self.name}-status")
                self.gallery = gr.Gallery(
                    label="Pictures",
                    columns=3,
                    object_fit="contain",
                    height=560,
                    interactive=False,
                    buttons=["download", "download_all", "fullscreen"],
                    elem_id=f"{self.name}-pictures",
                )
                self.report = gr.HTML(elem_id=f"{self.name}-report")
                with gr.Accordion("The call, as it is written into each picture", open=False):
                    self.call = gr.Code(language="json", interactive=False, show_label=False)
        self._wire()

    def _add_all(self, controls: Sequence[Control]) -> None:
        """The controls in the order of the fields; small ones side by side."""
        for small, together in groupby(controls, forms.is_small):
            if small:
                # Two to a row: gr.Row would squeeze all of them into one.
                members = list(together)
                for start in range(0, len(members), 2):
                    with gr.Row():
                        for control in members[start : start + 2]:
                            self._add(control)
                continue
            for control in together:
                if control.name == "faces":
                    self._person(control)
                else:
                    self._add(control)

    def _add(self, control: Control) -> None:
        self.widgets.append(forms.widget(control, _names(control.name), self._form))

    def _person(self, control: Control) -> None:
        """Whose pictures: photos of one's own, or one of the example people."""
        with gr.Tabs():
            with gr.Tab("Example people"):
                shown = gr.Gallery(
                    show_label=False,
                    columns=5,
                    height=212,
                    allow_preview=False,
                    object_fit="cover",
                    interactive=False,
                    buttons=[],
                    elem_id=f"{self.name}-people",
                )
            with gr.Tab("Your photos"):
                photos = forms.widget(control, form=self._form)
        chosen = gr.Markdown(_whom(None, ()), elem_id=f"{self.name}-whom")
        self.example = gr.State(None)
        self.widgets.append(photos)
        box = photos.component
        assert isinstance(box, gr.Gallery)
        self.page.load(lambda: [(image, "") for image, _ in people()], None, shown, api_visibility="private")

        def choose(event: gr.SelectData) -> tuple[str, str, Any]:
            name = f"{examples.PREFIX}{event.index + 1}"
            return name, _whom(name, ()), None

        shown.select(choose, None, [self.example, chosen, box], api_visibility="private")

        def arrive(raw: Any, name: str | None) -> tuple[Any, str]:
            good = _usable(raw)
            return good, _whom(name, good)

        box.upload(arrive, [box, self.example], [box, chosen], api_visibility="private")
        box.change(lambda raw, name: _whom(name, raw or ()), [box, self.example], chosen, api_visibility="private")

    def _wire(self) -> None:
        inputs = [one.component for one in self.widgets]
        named = {one.name: one.component for one in self.widgets}
        for one in self.widgets:
            if one.control.widget == "mask":  # the photo that was uploaded is what is painted over
                photo = named[one.control.of]
                assert isinstance(photo, gr.Image)
                photo.change(lambda path: path, photo, one.component, api_visibility="private")
        outputs = [self.status, self.gallery, self.report, self.call, self.go, self.halt]

        def announce(window: gr.Request) -> Update:
            self.sessions.begin(window)
            return {self.status: reports.progress(0, "Waiting for the model …"), **self._busy(True)}

        started = self.go.click(
            announce, None, [self.status, self.go, self.halt], queue=False, api_visibility="private"
        )
        started.then(
            self._run,
            [*([self.example] if self.example is not None else []), *inputs],
            outputs,
            concurrency_limit=1,
            concurrency_id="model",
            show_progress="hidden",
            api_visibility="private",
        )

        def halt(window: gr.Request) -> Any:
            # The run itself says that it has stopped: a word from here might arrive after its last one.
            self.sessions.current(window).set()
            return gr.update(interactive=False)

        self.halt.click(halt, None, self.halt, queue=False, api_visibility="private")

    def _busy(self, busy: bool) -> Update:
        return {self.go: gr.update(interactive=not busy), self.halt: gr.update(interactive=busy)}

    def _values(self, raw: tuple[Any, ...]) -> Request:
        values = list(raw)
        example = values.pop(0) if self.example is not None else None
        named = {
            one.name: forms.value_of(self.request, one.name, value)
            for one, value in zip(self.widgets, values, strict=True)
        }
        if example and not named.get("faces") and not named.get("people"):
            named["faces"] = (example,)
        for one in self.widgets:
            if one.control.widget == "mask" and named[one.name] is not None and named.get(one.control.of):
                named[one.name] = forms.fitted(named[one.name], named[one.control.of])
        return make(self.request, named)

    def _run(self, window: gr.Request, *raw: Any) -> Iterator[Update]:
        stop = self.sessions.current(window)
        made: list[studio.Finished] = []
        files: list[tuple[str, str]] = []
        # gradio copies each picture when it is shown, so the folder may go when the run is over.
        with tempfile.TemporaryDirectory(prefix="facegen-demo-") as folder:
            try:
                yield {self.gallery: [], self.report: "", self.call: ""}
                for event in self.house.events(self.name, self._values(raw), stop):
                    match event:
                        case studio.Painting():
                            yield self._painting(event, files)
                        case studio.Finished():
                            made.append(event)
                            files.append(_saved(event, Path(folder), len(made)))
                            yield self._finished(made, files)
                yield {self.status: reports.progress(1, _count(len(made))), **self._busy(False)}
            except Cancelled:
                kept = f"; {_count(len(made))} kept" if made else ""
                yield {self.status: reports.progress(0, f"Stopped{kept}."), self.gallery: files, **self._busy(False)}
            except FacegenError as error:
                yield {self.status: "", **self._busy(False)}
                raise refused(error) from None
            except Exception as error:
                log.exception("A run failed")
                yield {self.status: "", **self._busy(False)}
                raise gr.Error(
                    "Something went wrong inside facegen; the terminal it was started from has the details.",
                    print_exception=False,
                ) from error
        for warning in dict.fromkeys(warning for one in made for warning in one.report.warnings):
            gr.Warning(sentence(Exception(warning)))

    def _painting(self, event: studio.Painting, files: list[tuple[str, str]]) -> Update:
        update: Update = {self.status: reports.progress(event.fraction, f"Step {event.done} of {event.total}")}
        if event.preview:
            update[self.gallery] = [*files, *((image, "…") for image in event.preview)]
        return update

    def _finished(self, made: list[studio.Finished], files: list[tuple[str, str]]) -> Update:
        record = made[-1].picture.record
        assert record is not None
        call = {"pipeline": record.pipeline, "loaded": record.loaded, "request": record.request}
        count = made[-1].count
        return {
            self.status: reports.progress(len(made) / count, f"{len(made)} of {_count(count)}"),
            self.gallery: list(files),
            self.report: reports.table([one.report for one in made]),
            self.call: json.dumps(call, indent=2, ensure_ascii=False),
        }


def _saved(event: studio.Finished, folder: Path, place: int) -> tuple[str, str]:
    """The picture as a PNG that carries its call, and its caption."""
    provenance = event.report.provenance
    stem = place if provenance is None or provenance.seed is None else provenance.seed
    path = folder / f"facegen-{stem}.png"
    event.picture.save(path)
    return str(path), reports.caption(event.report)


def _count(pictures: int) -> str:
    return f"{pictures} picture{'s' if pictures != 1 else ''}"


def _whom(example: str | None, photos: Any) -> str:
    if photos:
        return f"Person: the one in your {'photo' if len(photos) == 1 else f'{len(photos)} photos'}."
    return f"Person: **{example}**." if example else "Person: anybody, until you choose one or bring photos."


def _usable(raw: Any) -> Any:
    """The uploads that are pictures; each other one is named in a warning."""
    good = []
    for one in raw or ():
        try:
            forms.paths([one])
            good.append(one)
        except FacegenError as error:
            gr.Warning(sentence(error), title="Not used", duration=15)
    return good


def _names(field_name: str) -> tuple[str, ...]:
    """What to offer for a field of names: the adapters are a folder, so they can be listed."""
    if field_name != "adapters":
        return ()
    from facegen.adapter import find_adapters

    return tuple(sorted(find_adapters()))


def _look_tab(loading: Loading) -> None:
    from facegen import look

    gr.Markdown("Find the faces in a photo.")
    with gr.Row():
        photo = forms.photo_box("Photo", height=420, elem_id="look-photo")
        found = gr.Image(label="Faces", type="pil", format="png", interactive=False, height=420, buttons=[])
    told = gr.Markdown(elem_id="look-told")

    def act(path: str | None) -> tuple[Any, str]:
        if path is None:
            return None, ""
        (sight,) = look.look([path], loading.pack or "mini")
        return look.annotated(sight), f"```\n{sentence(Exception(sight))}\n```"

    photo.change(guarded(act), photo, [found, told], api_visibility="private", concurrency_id="model")


def _compare_tab(loading: Loading) -> None:
    from facegen import look

    gr.Markdown("Say whether two photos show the same person.")
    with gr.Row():
        first = forms.photo_box("One photo", height=360, elem_id="compare-first")
        second = forms.photo_box("The other photo", height=360, elem_id="compare-second")
    button = gr.Button("Compare", variant="primary", elem_id="compare-go")
    told = gr.Markdown(elem_id="compare-told")

    def act(one: str | None, other: str | None) -> str:
        if one is None or other is None:
            raise WrongRequest("Give two photos to compare.")
        return f"### {look.compare(one, other, loading.pack or 'mini')}"

    button.click(guarded(act), [first, second], told, api_visibility="private", concurrency_id="model")


def _read_tab() -> None:
    gr.Markdown("Show the call that made a picture: drop in a PNG saved by facegen.")
    with gr.Row():
        picture = forms.photo_box("Picture", height=360, elem_id="read-picture")
        told = gr.Code(language="json", interactive=False, label="Its call", elem_id="read-told")

    def act(path: str | None) -> str:
        from facegen import metadata

        return "" if path is None else json.dumps(asdict(metadata.read(path)), indent=2, ensure_ascii=False)

    picture.change(guarded(act), picture, told, api_visibility="private")


def theme() -> gr.Theme:
    """Fonts of the reader's own machine: none is fetched."""
    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )


def launch(
    model: str = "mini",
    host: str = "127.0.0.1",
    port: int | None = 7860,
    *,
    open_browser: bool = False,
    options: Mapping[str, Any] | None = None,
    block: bool = True,
) -> gr.Blocks:
    """Serve the demo until Ctrl-C (or in the background with block=False) and return the page.

    options: the other fields of :class:`facegen.loading.Loading`. A port of None takes the first free one from 7860.
    Raises :class:`facegen.errors.WrongRequest` when the port is taken.
    """
    page = build(make(Loading, {"model": model, **(options or {})}))
    page.queue(max_size=32)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            _frontend=False,  # else gradio gives up on a busy machine whose first answer takes three seconds
            theme=theme(),
            css=resources.files("facegen.demos").joinpath("style.css").read_text(encoding="utf-8"),
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            max_file_size="64mb",
        )
    except OSError as error:
        raise WrongRequest(f"Port {port} of {host} is taken; choose another one with --port.") from error
    log.info("facegen %s at %s", __version__, page.local_url)
    if block:
        page.block_thread()
    return page
