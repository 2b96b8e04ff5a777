"""The command line: a verb per file of pipelines/, a flag per field of its request, and a few verbs about the house.

Only light modules are imported before a verb runs, so that ``--help`` is instant. What goes wrong for the user is one
sentence on stderr and exit code 2; Ctrl-C is 130; 1 is a mistake of ours, with its traceback under ``--debug``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

from facegen import __version__
from facegen.errors import FacegenError, WrongRequest
from facegen.request import (
    Request,
    add_flags,
    choice,
    flag,
    from_flags,
    integer,
    names,
    number,
    parts_words,
    person_words,
    photo,
    photos,
    photos_of,
    specs,
    suggestion,
    switch,
    text,
)

if TYPE_CHECKING:
    from facegen.loading import Loading
    from facegen.pipeline import Pipeline, Progress

log = logging.getLogger("facegen")
Verb = Callable[[argparse.Namespace], int]


# what the verbs about the house take

SHEETS = ("people", "expressions", "attributes", "identity", "scene", "truth")
MEASURES = (
    "likeness", "quality", "inpaint", "swap", "people", "repair", "sliders", "expression", "geometry", "restore",
)  # fmt: skip
DATASETS = ("folder", "webdataset")


@dataclass(frozen=True, kw_only=True)
class LookRequest(Request):
    task: ClassVar[str] = "Find the faces in photos: where they are, how sure that is, how large they are."

    photos: tuple[Any, ...] = photos("Photos to look at.", positional=True)
    pack: str = text("mini", "Face analysis: mini, buffalo_l, antelopev2 or a folder.")


@dataclass(frozen=True, kw_only=True)
class CompareRequest(Request):
    task: ClassVar[str] = "Say whether two photos show the same person."

    first: Any = photo("One photo.", positional=True, optional=False)
    second: Any = photo("The other photo.", positional=True, optional=False)
    pack: str = text("mini", "Face analysis: mini, buffalo_l, antelopev2 or a folder.")
    select: str = choice("only", "Which face of a photo that shows several.", ("only", "largest", "central"))
    threshold: float | None = number(
        None, "Cosine from which on two photos count as one person; the pack's own by default.",
        low=-1, high=1, optional=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WorldRequest(Request):
    task: ClassVar[str] = "Draw people of the face world: a sheet to look at, or a dataset to train on."

    kind: str = choice("people", "What to make", (*SHEETS, *DATASETS), positional=True)
    people: int = integer(6, "How many people.", low=1, high=10_000_000)
    pictures: int = integer(8, "How many pictures of each.", low=1, high=100_000)
    first_person: int = integer(0, "Number of the first person; from 100000 on they are kept from training.", low=0)
    size: int = integer(128, "Side of a picture in pixels.", low=16, high=1024)
    seed: int = integer(0, "Which world.", low=0, high=2**53)
    workers: int = integer(1, "How many processes draw a dataset.", low=1, high=1024)


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Request):
    task: ClassVar[str] = (
        "Train the embedded model from nothing, stage by stage, or a slider; the same command goes on where it was."
    )

    what: str = choice("mini", "What to train", ("mini", "slider"), positional=True)
    stages: tuple[str, ...] = names((), "Some stages only, such as pictures, recogniser, vae, diffusion, write.")
    output: str | None = text(
        cast(str, None), "Where the weights are written; outputs/mini or outputs/sliders by default.",
        optional=True, alias="o",
    )  # fmt: skip
    work: str | None = text(
        cast(str, None), "Where checkpoints and drawn pictures are kept; runs/mini or runs/sliders by default.",
        optional=True,
    )  # fmt: skip
    device: str | None = choice(None, "Where to compute.", ("cpu", "cuda", "mps"), optional=True)
    budget: float = number(1.0, "Share of the full recipe's steps and pictures.", low=1e-6, high=100)
    seed: int = integer(0, "Which world and which first weights.", low=0, high=2**31)
    start: str | None = text(
        cast(str, None),
        "Folder of a finished model to begin the diffusion with; its autoencoder is kept.",
        optional=True,
    )


@dataclass(frozen=True, kw_only=True)
class SliderRequest(Request):
    task: ClassVar[str] = "What a slider is learnt from: two descriptions, or a folder of picture pairs."

    name: str = text("", "Slider: its name, which becomes the file's.")
    more: str = text("", "Slider: more of it in words behind the prompt, such as 'old'.")
    less: str = text("", "Slider: less of it in words behind the prompt, such as 'young'.")
    pairs: str | None = text(
        cast(str, None), "Slider: a folder with the folders more and less, pictures of the same names in both.",
        optional=True,
    )  # fmt: skip
    prompt: str = text("a portrait of a person", "Slider: what the pictures show otherwise.")
    keep: tuple[str, ...] = names((), "Slider: what must not move with it, such as 'a man' 'a woman'.")
    model: str = text("mini", "Slider: the base model it is for.")
    steps: int = integer(300, "Slider: how many steps of training.", low=1, high=1_000_000)
    rank: int = integer(4, "Slider: the rank of its weights.", low=1, high=128)
    rate: float = number(
        0.005, "Slider: how fast it learns; more is quicker, too much moves the whole picture.", low=1e-6, high=0.1
    )


@dataclass(frozen=True, kw_only=True)
class EvalRequest(Request):
    task: ClassVar[str] = "Measure likeness and obedience on people never trained on, and print the table."

    measure: str = choice("likeness", "What to measure", MEASURES, alias="task")
    model: str = text("mini", "Base model.")
    adapters: tuple[str, ...] = names(
        ("arc2face", "instantid", "ip_adapter_faceid"),
        "Which adapters; none: the base model alone; instantid+pose: its key points turned to what is asked for.",
    )
    people: int = integer(200, "How many people.", low=2, high=100_000)
    prompts: int = integer(2, "How many prompts for each.", low=1, high=100)
    num_inference_steps: int = integer(20, "How many denoising steps.", low=1, high=1000, alias="steps")
    guidance_scale: float = number(3.0, "How closely to follow the prompts.", low=0, high=50, alias="guidance")
    seed: int = integer(0, "Where the noise starts.", low=0, high=2**31)
    output: str | None = text(cast(str, None), "Also write the table as JSON to this file.", optional=True, alias="o")


@dataclass(frozen=True, kw_only=True)
class DemoRequest(Request):
    task: ClassVar[str] = "Open the demo in a browser."

    model: str = text("mini", "Base model: mini, sd15, sdxl, a hub id, a folder or a single file.")
    host: str = text("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = integer(7860, "Port to listen on.", low=1, high=65535)
    open_browser: bool = switch(False, "Open a browser window.")


@dataclass(frozen=True, kw_only=True)
class HelloRequest(Request):
    task: ClassVar[str] = "Paint one person in different hair, light and moods: a labelled sheet and its portraits."

    faces: tuple[Any, ...] = photos("Photos of one person, or example:1 to example:999.", positional=True)
    adapter: str = text("ip_adapter_faceid", "How the person is brought in: arc2face, instantid or ip_adapter_faceid.")
    num_inference_steps: int = integer(12, "How many denoising steps.", low=1, high=1000, alias="steps")
    guidance_scale: float = number(2.5, "How closely to follow the prompts.", low=0, high=50, alias="guidance")
    seed: int = integer(1, "Where the noise starts.", low=0, high=2**53)
    count: int = integer(12, "How many portraits.", low=1, high=12)
    tries: int = integer(
        3, "How often a portrait is tried until the judges find the person and the prompt in it.", low=1, high=100
    )


@dataclass(frozen=True, kw_only=True)
class Command:
    """One verb: what it is for, whose fields are its flags, what else it takes, and what it does."""

    about: str
    run: Verb
    requests: tuple[type[Request], ...] = ()
    more: Callable[[argparse.ArgumentParser], None] | None = None
    example: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        with _interruptible():
            return _dispatch(words)
    except FacegenError as error:
        _complain(str(error), debug)
        return error.exit_code
    except KeyboardInterrupt:
        return _stopped(debug)
    except BrokenPipeError:
        # The reader (head, less) has gone; flushing at exit would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if _stopping.is_set():  # a library broke on the interruption: that is no mistake of anybody's
            return _stopped(debug)
        reason = str(error).strip().splitlines() or ["no reason given"]
        _complain(
            f"A mistake in facegen: {type(error).__name__}: {reason[0]} "
            "(run it again with --debug for the whole story, and report it).",
            debug,
        )
        return 1


_stopping = threading.Event()


def _stopped(debug: bool) -> int:
    _complain("Stopped; what was finished is whole, nothing half-written is left.", debug)
    return 130


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt as ever; should a library swallow it, the next step of the work stops."""

    def stop(number: int, frame: object) -> NoReturn:
        _stopping.set()
        raise KeyboardInterrupt

    _stopping.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _complain(sentence: str, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"facegen: {sentence}\n")


def say(line: str = "") -> None:
    """A line of the result, on stdout."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _dispatch(words: list[str]) -> int:
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help", "help"):
        say(overview())
        return 0
    if verb in ("-V", "--version"):
        say(f"facegen {__version__}")
        return 0
    known = commands()
    if verb not in known:
        raise WrongRequest(f"There is no command '{verb}'{suggestion(verb, known)}.")
    command = known[verb]
    parser = _parser(verb, command)
    arguments, unknown = parser.parse_known_args(words[1:])
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        hint = suggestion(unknown[0].split("=")[0], flags) if unknown[0].startswith("-") else ""
        hint = hint if "perhaps" in hint else f"; see facegen {verb} --help"
        raise WrongRequest(f"facegen {verb} does not know '{unknown[0]}'{hint}.")
    if not arguments.debug:
        _hush()
    logging.basicConfig(
        level=logging.DEBUG if arguments.debug else logging.ERROR if arguments.quiet else logging.WARNING,
        format="facegen: %(message)s",
        stream=sys.stderr,
    )
    return command.run(arguments)


def _hush() -> None:
    """The libraries' own bars and notes stay out of the way."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):  # read when they are imported
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise WrongRequest(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def _parser(verb: str, command: Command) -> _Parser:
    parser = _Parser(
        prog=f"facegen {verb}",
        usage=f"facegen {verb} {_usage(command)}[flags]",
        description=command.about,
        epilog=f"Example: {command.example}" if command.example else None,
        allow_abbrev=False,
    )
    for request in command.requests:
        add_flags(parser, request)
    if command.more is not None:
        command.more(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no warnings")
    parser.add_argument("--debug", action="store_true", help="log everything, and show the traceback of a mistake")
    return parser


def _usage(command: Command) -> str:
    """The positional words of a command."""
    known = [spec for request in command.requests for spec in specs(request).values() if spec.positional]
    words = ["PHOTO …" if spec.kind == "photos" else spec.kind.upper() for spec in known]
    return "".join(f"{word} " for word in words) + ("PICTURE " if command.run is _read else "")


def overview() -> str:
    """The top level's help."""
    known = commands()
    width = max(map(len, known))
    verbs = "\n".join(f"  {name:<{width}}  {command.about}" for name, command in known.items())
    return (
        f"facegen {__version__}: pictures of a person, made from their photos.\n\n"
        f"facegen <command> --help tells the flags of a command.\n\n{verbs}\n\n"
        "First try:  facegen hello"
    )


def commands() -> dict[str, Command]:
    """All verbs: the tasks of pipelines/ first, then those about the house."""
    from facegen.loading import Loading
    from facegen.pipeline import task, tasks

    painting = {}
    for name in tasks():
        request = task(name).request_class
        painting[name] = Command(
            about=request.task,
            run=_paint(name),
            requests=(request, Loading),
            more=_outputs,
            example=EXAMPLES.get(name, ""),
        )
    return {"hello": replace(HELLO, requests=(*HELLO.requests, Loading)), **painting, **HOUSE}


EXAMPLES = {"generate": 'facegen generate me.jpg --prompt "portrait, red hair, in the rain" --seed 7'}


def _outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", default="outputs", metavar="PATH", help="a folder, or a .png file (default outputs)"
    )
    _json_flag(parser)


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


# tasks


def _paint(name: str) -> Verb:
    def run(arguments: argparse.Namespace) -> int:
        from facegen.loading import Loading
        from facegen.pipeline import task

        kind = task(name)
        request = from_flags(kind.request_class, arguments)
        loading = from_flags(Loading, arguments)
        place = Place.of(arguments.output, name)
        _open_photos(request)
        pipe = _load(kind, loading, arguments)
        _make(pipe, request, place, arguments)
        return 0

    return run


def _make(pipe: Pipeline[Any], request: Any, place: Place, arguments: argparse.Namespace) -> list[Path]:
    """Make the pictures of a request, save each as soon as it is finished, and tell of it."""
    asked = pipe.resolve(request)
    several = getattr(asked, "num_images_per_prompt", 1) > 1
    written = []
    with bar(arguments) as progress:
        for picture, report in pipe.stream(asked, watch=_watch(progress)):
            assert picture.record is not None
            # Not the request's: a picture that was tried again has another.
            seed = None if report.provenance is None else report.provenance.seed
            path = place.path(picture.record.index, several, seed)
            picture.save(path)
            written.append(path)
            with progress.aside():
                if arguments.json:
                    say(json.dumps({"path": str(path), "report": report.to_json()}, ensure_ascii=False))
                else:
                    say(f"{path}  {report}")
    return written


@dataclass(frozen=True)
class Place:
    """Where pictures go: one named file, or new files in a folder. Known to be writable before any work is done."""

    folder: Path
    stem: str
    named: bool  # the user gave the file's name, so an older one is replaced

    @classmethod
    def of(cls, output: str, stem: str) -> Place:
        path = Path(output).expanduser()
        if path.suffix and not path.is_dir():
            if path.suffix.lower() != ".png":
                raise WrongRequest(f"The output {output} must be a folder or a .png file; only PNG holds the metadata.")
            place = cls(path.parent, path.stem, True)
        else:
            place = cls(path, stem, False)
        writable(place.folder)
        return place

    def path(self, index: int, several: bool, seed: int | None) -> Path:
        if self.named:
            return self.folder / (f"{self.stem}-{index + 1}.png" if several else f"{self.stem}.png")
        stem = self.stem if seed is None else f"{self.stem}-{seed}"
        path, place = self.folder / f"{stem}.png", 1
        while path.exists():
            place += 1
            path = self.folder / f"{stem}-{place}.png"
        return path


def writable(folder: Path) -> None:
    """Raises :class:`facegen.errors.OutputUnwritable` unless files can be made in the folder, there already or not.

    Nothing is left: what is saved makes its folder, and a command that fails before makes none.
    """
    import tempfile

    from facegen.errors import OutputUnwritable

    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputUnwritable(
            f"Cannot write to {folder}: {error.strerror or error}; choose another place with --output."
        ) from error
    finally:
        for parent in made:
            with suppress(OSError):  # not made, or somebody else's files are in it by now
                parent.rmdir()


class Bar:
    """A progress bar on stderr, shown only to people."""

    def __init__(self, quiet: bool, unit: str) -> None:
        from tqdm import tqdm

        # disable=None hides the bar where stderr is no terminal
        hidden, scaled = True if quiet else None, unit == "B"
        self._bar: Any = tqdm(
            total=0, disable=hidden, file=sys.stderr, leave=False, unit=unit, unit_scale=scaled, dynamic_ncols=True
        )

    def show(self, done: int, total: int, stage: str) -> None:
        self._bar.total = total
        self._bar.set_description_str(stage, refresh=False)
        self._bar.update(done - self._bar.n)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The bar makes room for a line of the result."""
        self._bar.clear()
        yield
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


@contextmanager
def bar(arguments: argparse.Namespace, unit: str = "step") -> Iterator[Bar]:
    made = Bar(arguments.quiet, unit)
    try:
        yield made
    finally:
        made.close()


def _load(kind: type[Pipeline[Any]], loading: Loading, arguments: argparse.Namespace) -> Pipeline[Any]:
    """Load a model, with a line on a terminal meanwhile."""
    shown = sys.stderr.isatty() and not arguments.quiet
    if shown:
        sys.stderr.write(f"loading {loading.model} …\r")
        sys.stderr.flush()
    if not arguments.debug:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    try:
        return kind.load(loading)
    finally:
        if shown:
            sys.stderr.write("\x1b[K")


def _open_photos(request: Request) -> None:
    """Photos that cannot be read are told of at once, not after the model is loaded."""
    from facegen.look import opened

    for one in photos_of(request):
        opened(one)


def _watch(progress: Bar) -> Any:
    from facegen.pipeline import Watch

    def tell(now: Progress) -> None:
        progress.show(now.done, now.total, now.stage)

    return Watch(on_progress=tell, cancelled=_stopping.is_set)


def _hello(arguments: argparse.Namespace) -> int:
    from facegen import hello
    from facegen.images import save_png
    from facegen.loading import Loading
    from facegen.metadata import marks
    from facegen.pipeline import task

    request = from_flags(HelloRequest, arguments)
    loading = from_flags(Loading, arguments)
    place = Place.of(arguments.output, "hello")
    began = time.monotonic()
    _open_photos(request)
    pipe = _load(task("generate"), loading, arguments)
    made: list[hello.Portrait] = []
    with bar(arguments) as progress:
        for portrait in hello.portraits(pipe, request, _watch(progress)):
            path = place.folder / f"{place.stem}-{len(made) + 1}.png"
            portrait.picture.save(path)
            made.append(portrait)
            with progress.aside():
                if arguments.json:
                    told = {"path": str(path), "prompt": portrait.prompt, "report": portrait.report.to_json()}
                    say(json.dumps(told, ensure_ascii=False))
                elif not arguments.quiet:
                    say(f"{path}  {portrait.label}: {portrait.report}")
    path = save_png(hello.sheet(request.faces, made), place.folder / f"{place.stem}-sheet.png", marks())
    if not arguments.json:
        say(f"{path}  {len(made)} portraits of one person in {time.monotonic() - began:.0f} s")
    return 0


def _look(arguments: argparse.Namespace) -> int:
    from facegen import look

    request = from_flags(LookRequest, arguments)
    if not request.photos:
        raise WrongRequest("Give at least one photo to look at.")
    sights = look.look(request.photos, request.pack)
    saving = Place.of(arguments.save, "look") if arguments.save else None
    for index, sight in enumerate(sights):
        if saving is not None:
            look.annotated(sight).save(saving.path(index, len(request.photos) > 1, None))
        say(json.dumps(sight.to_json(), ensure_ascii=False) if arguments.json else str(sight))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from facegen import look

    asked = from_flags(CompareRequest, arguments)
    verdict = look.compare(asked.first, asked.second, asked.pack, cast(look.Select, asked.select), asked.threshold)
    say(json.dumps(verdict.to_json(), ensure_ascii=False) if arguments.json else str(verdict))
    return 0


def _world(arguments: argparse.Namespace) -> int:
    request = from_flags(WorldRequest, arguments)
    if request.kind in DATASETS:
        return _dataset(request, arguments)
    from facegen.world.sheets import SheetPlan, save_sheet

    path = Path(arguments.output or f"outputs/world-{request.kind}.png").expanduser()
    path = path if path.suffix else path / f"world-{request.kind}.png"
    writable(path.parent)
    plan = SheetPlan(request.people, request.pictures, request.size, request.seed, request.first_person)
    say(str(save_sheet(path, request.kind, plan)))
    return 0


def _dataset(request: WorldRequest, arguments: argparse.Namespace) -> int:
    from facegen.world.dataset import DatasetPlan, write_dataset

    folder = Path(arguments.output or f"outputs/world-{request.kind}").expanduser()
    writable(folder.parent)
    plan = DatasetPlan(
        people=request.people,
        pictures=request.pictures,
        size=request.size,
        seed=request.seed,
        first=request.first_person,
        format=cast(Any, request.kind),
    )
    quiet = (lambda done, total: None) if arguments.quiet else None
    say(str(write_dataset(folder, plan, workers=request.workers, progress=quiet)))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from facegen.training.mini import train

    request, slider = from_flags(TrainRequest, arguments), from_flags(SliderRequest, arguments)
    kind = "sliders" if request.what == "slider" else request.what
    output = Path(request.output or f"outputs/{kind}").expanduser()
    work = Path(request.work or f"runs/{kind}").expanduser()
    writable(output)
    writable(work)
    if not arguments.quiet:
        logging.getLogger("facegen").setLevel(logging.INFO)
    if request.what == "slider":
        say(str(_train_slider(request, slider, output, work)))
        return 0
    if slider != SliderRequest():
        raise WrongRequest("--name, --more, --less, --pairs and the like belong to: facegen train slider.")
    start = None if request.start is None else Path(request.start)
    train(output, request.stages, request.device, request.budget, request.seed, work, start)
    say(str(output))
    return 0


def _train_slider(request: TrainRequest, asked: SliderRequest, output: Path, work: Path) -> Path:
    """The file of the learnt slider."""
    from facegen.training.sliders import Recipe, train_slider

    if request.stages or request.start:
        raise WrongRequest("--stages and --start belong to: facegen train mini.")
    pairs = None if asked.pairs is None else Path(asked.pairs).expanduser()
    recipe = Recipe(asked.name, asked.more, asked.less, pairs, asked.prompt, asked.keep)

    import torch

    from facegen.models.base import Model
    from facegen.training.loop import use_device
    from facegen.training.objectives.slider import SliderSettings

    use_device(request.device)
    model = Model.from_pretrained(asked.model, dtype=torch.float32, device=request.device)
    settings = SliderSettings(rank=asked.rank, seed=request.seed, rate=asked.rate)
    steps = max(1, round(asked.steps * request.budget))
    return train_slider(recipe, model, output, work, steps=steps, settings=settings)


def _eval(arguments: argparse.Namespace) -> int:
    request = from_flags(EvalRequest, arguments)
    output = None if request.output is None else Path(request.output).expanduser()
    if output is not None:
        writable(output.parent)
    if request.measure not in ("likeness", "quality"):
        return _eval_edit(request, output, arguments)
    from facegen.evaluation import protocol, quality

    with bar(arguments) as progress:
        result = (quality if request.measure == "quality" else protocol).run(
            model=request.model,
            adapters=request.adapters,
            people=request.people,
            prompts=request.prompts,
            steps=request.num_inference_steps,
            guidance=request.guidance_scale,
            seed=request.seed,
            output=output,
            on_progress=lambda done, total: progress.show(done, total, "pictures"),
        )
    say(json.dumps(result.to_json()) if arguments.json else str(result))
    return 0


def _eval_edit(request: EvalRequest, output: Path | None, arguments: argparse.Namespace) -> int:
    """The table of a task that changes one thing."""
    from facegen.evaluation import edits
    from facegen.files import write_json
    from facegen.loading import Loading
    from facegen.pipeline import task
    from facegen.request import make

    pipe = _load(task("generate"), Loading(model=request.model), arguments)

    def call(name: str, **fields: Any) -> Any:
        if name == "size":  # the canvas on which so many people stand side by side
            return pipe.size(make(task("generate").request_class, {"people": ("x",) * fields["count"]}))
        return task(name).from_pipe(pipe)(**fields)

    plan = edits.Plan(request.people, request.num_inference_steps, request.guidance_scale, request.seed)
    with bar(arguments) as progress:
        shown = edits.run(request.measure, call, plan, lambda done, total: progress.show(done, total, "pictures"))
    if output is not None:
        write_json(output, shown.to_json())
    say(json.dumps(shown.to_json()) if arguments.json else str(shown))
    return 0


def _read(arguments: argparse.Namespace) -> int:
    from facegen import metadata

    record = metadata.read(arguments.picture)
    if arguments.run:
        return _again(record, arguments)
    if arguments.json:
        say(json.dumps(record.to_json(), ensure_ascii=False))
        return 0
    say(command_line(record))
    for name, value in _story(record):
        say(f"  {name:<10} {value}")
    return 0


def _again(record: Any, arguments: argparse.Namespace) -> int:
    """Make the picture once more, and say whether it is the same to the last bit."""
    import numpy as np

    from facegen import examples, metadata
    from facegen.images import load_rgb
    from facegen.pipeline import rebuild, task

    if record.noise:
        raise WrongRequest(
            f"The picture began with {record.noise}, so it cannot be made again from its seed alone; give that noise as"
            " latents= to the pipeline in Python."
        )
    loading, request = rebuild(record)
    for recorded in record.photos():
        if complaint := metadata.changed(recorded, examples.photo):
            raise WrongRequest(f"{complaint} Without it the picture cannot be made again.")
    stem = Path(arguments.picture).stem
    place = Place.of(arguments.output, f"{stem}-again")
    pipe = _load(task(record.pipeline), loading, arguments)
    pipe.load_recorded_adapters(record)
    with bar(arguments) as progress, _as_many_threads(record):
        ((picture, report),) = pipe.stream(pipe.resolve(request), watch=_watch(progress), indices=[record.index])
    path = place.path(record.index, False, None)
    picture.save(path)
    before, now = (np.asarray(image, dtype=np.int16) for image in (load_rgb(arguments.picture), picture))
    difference = int(np.abs(before - now).max()) if before.shape == now.shape else 255
    changes = [] if picture.record is None else _changes(record, picture.record)
    if arguments.json:
        told = {"path": str(path), "max_difference": difference, "changes": changes, "report": report.to_json()}
        say(json.dumps(told, ensure_ascii=False))
        return 0
    same = (
        "the same picture to the last bit" if difference == 0 else f"differs by up to {difference} of 255 grey levels"
    )
    say(f"{path}  {same}; {report}")
    for change in changes:
        say(f"  {change}")
    return 0


_MOST_THREADS = 1024  # a record may be damaged


@contextmanager
def _as_many_threads(record: Any) -> Iterator[None]:
    """As many as the picture was made with, on whose number the last bit hangs; older pictures do not tell it."""
    import torch

    now, then = torch.get_num_threads(), record.loaded.get("threads")
    if isinstance(then, int) and 0 < then <= _MOST_THREADS:
        torch.set_num_threads(then)
    try:
        yield
    finally:
        torch.set_num_threads(now)


# What the last bit hangs on beyond weights and request; older pictures do not tell of it.
_MACHINE = {"torch": "version of PyTorch", "threads": "number of threads"}


def _changes(before: Any, now: Any) -> list[str]:
    """What is not as it was when a picture was made."""
    names = {"sha256": "base model", "device": "device", "dtype": "precision", "adapters": "adapter", "loras": "LoRA"}
    names |= {name: said for name, said in _MACHINE.items() if name in before.loaded}
    told = [f"another {said} than then" for name, said in names.items() if before.loaded[name] != now.loaded[name]]
    if before.version != now.version:
        told = [f"made by facegen {before.version}, this is {now.version}", *told]
    return told


def command_line(record: Any) -> str:
    """The command that makes a picture again, with the flags that differ from their defaults."""
    import shlex

    from facegen.pipeline import rebuild

    loading, request = rebuild(record)
    if sources := [one["source"] for one in record.loaded.get("adapters", {}).values()]:
        request = replace(request, adapters=tuple(sources))
    words = ["facegen", record.pipeline]
    for part in (request, loading):
        for name, spec in specs(type(part)).items():
            if getattr(part, name) != spec.default:
                words += _words(flag(name), spec.kind, getattr(part, name))
    return shlex.join(words)


def _words(name: str, kind: str, value: Any) -> list[str]:
    if kind == "switch":
        return [name if value else name.replace("--", "--no-", 1)]
    if kind in ("photos", "names"):
        return [name, *map(str, value)]
    if kind == "people":
        return [name, *map(person_words, value)]
    if kind == "strengths" and isinstance(value, Mapping):
        return [name, *(f"{key}={_curve(one)}" for key, one in value.items())]
    if kind == "strengths":
        return [name, _curve(value)]
    return [name, str(value)]


def _curve(value: Any) -> str:
    if isinstance(value, Mapping):
        return parts_words(value)
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _story(record: Any) -> list[tuple[str, str]]:
    """What else is known of a picture."""
    report = record.report
    told = [
        ("made by", f"facegen {record.version} (AI-generated)"),
        ("picture", f"number {record.index + 1} of its call"),
    ]
    told += [("noise", record.noise)] if record.noise else []
    told += [("photo", f"{one.get('path') or 'not a file'}  {_short(one)}") for one in record.photos()]
    told.append(("model", f"{record.loaded.get('model')}  {_short(record.loaded)}"))
    told += [("adapter", f"{name}  {_short(one)}") for name, one in record.loaded.get("adapters", {}).items()]
    if report.get("likeness"):
        told.append(("likeness", f"{report['likeness']['cosine']:.2f}"))
    return told


def _short(recorded: Mapping[str, Any]) -> str:
    return f"sha256 {str(recorded.get('sha256'))[:16]}…"


def _weights(arguments: argparse.Namespace) -> int:
    from facegen import weights_verb

    with bar(arguments, "B") as progress:
        asked = weights_verb.Asked(
            names=tuple(arguments.names),
            everything=arguments.all,
            needs=arguments.with_needs,
            commercial_only=arguments.commercial_only,
            watch=lambda name, done, total: progress.show(done, total, name),
        )
        told = weights_verb.ACTIONS[arguments.action](asked)
    if arguments.json:
        say(json.dumps(told.data))
    else:
        for line in told.lines:
            say(line)
    if told.problem is not None:
        raise told.problem
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from facegen import doctor

    return doctor.main(json_output=arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    request = from_flags(DemoRequest, arguments)
    from facegen.demos.app import launch

    launch(model=request.model, host=request.host, port=request.port, open_browser=request.open_browser)
    return 0


def _picture_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a PNG that facegen saved")
    parser.add_argument("--run", action="store_true", help="make the picture again and compare")
    _outputs(parser)


def _world_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="PATH", help="the sheet's file, or the dataset's folder")


def _weights_flags(parser: argparse.ArgumentParser) -> None:
    actions = ("list", "fetch", "verify", "where")
    parser.add_argument("action", nargs="?", choices=actions, default="list", help="what to do (default list)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="sets, or single files of them as set/file")
    parser.add_argument("--all", action="store_true", help="fetch: the optional files too, and every one of several")
    parser.add_argument("--with-needs", action="store_true", help="fetch: also what the weights work only with")
    parser.add_argument("--commercial-only", action="store_true", help="refuse what may not be used commercially")
    _json_flag(parser)


def _look_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", metavar="PATH", help="also save the photos with the faces drawn in: folder or .png")
    _json_flag(parser)


def _hello_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        default="outputs/hello",
        metavar="FOLDER",
        help="where the pictures go (default outputs/hello)",
    )
    _json_flag(parser)


HELLO = Command(
    about=HelloRequest.task, run=_hello, requests=(HelloRequest,), more=_hello_flags, example="facegen hello"
)
HOUSE: Mapping[str, Command] = {
    "look": Command(
        about=LookRequest.task, run=_look, requests=(LookRequest,), more=_look_flags,
        example="facegen look party.jpg --save seen.png",
    ),
    "compare": Command(
        about=CompareRequest.task, run=_compare, requests=(CompareRequest,), more=_json_flag,
        example="facegen compare one.jpg other.jpg",
    ),
    "world": Command(
        about=WorldRequest.task, run=_world, requests=(WorldRequest,), more=_world_flags,
        example="facegen world expressions --people 4 -o sheet.png",
    ),
    "read": Command(
        about="Tell how a saved picture was made, and make it again.", run=_read, more=_picture_flags,
        example="facegen read outputs/generate-7.png --run",
    ),
    "train": Command(
        about=TrainRequest.task, run=_train, requests=(TrainRequest, SliderRequest),
        example='facegen train slider --name old --more old --less young',
    ),
    "eval": Command(about=EvalRequest.task, run=_eval, requests=(EvalRequest,), more=_json_flag),
    "weights": Command(
        about="The published weights: list them, fetch or verify them, say where they are.",
        run=_weights, more=_weights_flags, example="facegen weights fetch instantid --with-needs",
    ),
    "doctor": Command(about="Say what is missing on this machine and how to mend it.", run=_doctor, more=_json_flag),
    "demo": Command(about=DemoRequest.task, run=_demo, requests=(DemoRequest,)),
}  # fmt: skip
