"""The one training loop: every stage hands it an objective, and resumes where it was stopped, bit for bit.

A step depends on nothing but the seed, the step's number and the state in the checkpoint: the generators are seeded
anew at each step, and the learning rate follows from the number of steps done, never from the clock.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from facegen.allocator import keep_memory
from facegen.errors import Cancelled, CheckpointBroken, WrongRequest
from facegen.lending import moved
from facegen.memory import MemoryPlan
from facegen.training.cache import cores
from facegen.training.checkpoint import (
    flatten_optimiser,
    load_tensors,
    restore_optimiser,
    save_tensors,
    under_prefix,
    with_prefix,
)
from facegen.training.muon import MuonAdamW

if TYPE_CHECKING:
    from facegen.models.base import Model

logger = logging.getLogger(__name__)
STATE = "state.safetensors"
_FORK = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
_DEVICE = "ACCELERATE_TORCH_DEVICE"  # read by accelerate
_HANDED = 64 << 20  # bytes of shared memory that the batches of one process may take


class Objective(ABC):
    """What is learnt from what: the modules that train, a batch for each step, and its loss."""

    name: ClassVar[str]
    module: nn.Module  # all that is trained and saved, auxiliary heads included
    model: Model | None = None  # whose UNet, VAE or text encoder the loss asks, learning or not

    @abstractmethod
    def batch(self, step: int, generator: torch.Generator) -> Any:
        """The data of one step: tensors, or a dict, tuple or dataclass of them, drawn with ``generator`` alone.

        On the CPU, wherever the training is; beside a GPU in another process.
        """

    @abstractmethod
    def loss(self, batch: Any, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Scalars by name; ``loss`` is minimised, the others are only shown.

        The batch, the module, its helpers and ``generator`` are on the device of the training.
        """

    def helpers(self) -> Sequence[nn.Module]:
        """The nets besides the model's that the loss asks and that do not learn from it."""
        return ()

    def to(self, device: torch.device) -> None:
        """Bring all nets to the device; what is learnt from stays where it is."""
        if self.model is not None:
            self.model.move(device)
        for part in (self.module, *self.helpers()):
            part.to(device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups; each may carry ``scale``, a factor on the learning rate, and ``muon`` for matrices that Muon
        moves. Biases and gains do not decay."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def compiled(self) -> Sequence[nn.Module]:
        """The modules whose forward is worth compiling."""
        return (self.module,)

    def figures(self) -> dict[str, float]:
        """What is measured at the end, on held-out data, with the averaged weights."""
        return {}


@dataclass(frozen=True)
class Budget:
    """How long to train: ``steps`` of schedule, and at most ``seconds`` of this call.

    With ``seconds`` alone the number of steps is estimated once, kept in the checkpoint, and no longer changes.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise WrongRequest("A training budget needs steps or seconds.")


@dataclass(frozen=True)
class LoopSettings:
    """How to train, for any objective."""

    learning_rate: float = 1e-3
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final_rate: float = 0.01  # of the learning rate, where the cosine ends
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    average: float = 0.999  # decay of the weights' moving average; 0 is none
    accumulate: int = 1
    bfloat16: bool = False
    compile: bool = False
    seed: int = 0
    workers: int | None = None  # processes that draw batches ahead; None: none on a CPU, all cores but one beside a GPU
    save_every: float = 120.0  # seconds
    show_every: float = 15.0  # seconds

    def rate(self, step: int, steps: int) -> float:
        """The factor on the learning rate at ``step`` (0-based) of ``steps``."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "constant":
            return rise
        done = min(1.0, max(0.0, (step - self.warmup) / max(1, steps - self.warmup)))
        return rise * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))


class Average:
    """A moving average of a module's parameters and floating-point buffers, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = module
        self.values = [value.detach().clone().float() for value in self._live()]

    def _live(self) -> list[Tensor]:
        return [value for _, value in self._named()]

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in self.module.state_dict().items() if value.is_floating_point()]

    def update(self, step: int) -> None:
        """Move towards the module's weights; early steps count more, so that the start is soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, value in zip(self.values, self._live(), strict=True):
            average.lerp_(value.float(), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip((name for name, _ in self._named()), self.values, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for (name, _), value in zip(self._named(), self.values, strict=True):
            value.copy_(state[name])

    @contextmanager
    def worn(self) -> Iterator[None]:
        """Inside, the module has the averaged weights; afterwards its own again, to the bit."""
        live = self._live()
        own = [value.clone() for value in live]
        with torch.no_grad():
            for value, average in zip(live, self.values, strict=True):
                value.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for value, before in zip(live, own, strict=True):
                    value.copy_(before)


class _Step(nn.Module):
    """The loss as a module's forward, so that data-parallel wrappers see every use of the weights."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.trained = objective.module
        self._loss = objective.loss

    def forward(self, batch: Any, step: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        return self._loss(batch, step, generator)


def use_device(device: str | None) -> None:
    """Have everything that is trained from now on trained there; None: a GPU where there is one.

    Raises WrongRequest for a device that this machine does not have, or when this process trains on another already.
    """
    wanted, usual = (MemoryPlan.choose(one).device for one in (device, None))
    os.environ.pop(_DEVICE, None)
    if wanted.type != usual.type:  # the usual one is left to accelerate, which may run several processes
        os.environ[_DEVICE] = str(wanted)
    if device is not None and training_device().type != wanted.type:
        raise WrongRequest(f"This process trains on {training_device()} already; start another for {device}.")


def training_device() -> torch.device:
    """Where it is trained."""
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no").device


class _Batches(Dataset[Any]):
    """The batches of a training by their steps and seeds, for this process or for those that draw them ahead."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __getitem__(self, key: tuple[int, int]) -> Any:
        step, seed = key
        return self.objective.batch(step, torch.Generator().manual_seed(seed))


def _itself(batch: Any) -> Any:
    return batch


def _begin_drawing(number: int) -> None:
    torch.set_flush_denormal(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the training to see, which then ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag that is looked at between two steps."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    @contextmanager
    def watched(self) -> Iterator[_Interrupt]:
        kinds = (signal.SIGINT, signal.SIGTERM)
        try:
            before = [signal.signal(kind, self._ask) for kind in kinds]
        except ValueError:  # not the main thread: signals belong to whoever runs it
            yield self
            return
        try:
            yield self
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed of its own for each step and process (a 63-bit mix, Steele et al. 2014, SplitMix64)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    return (mixed ^ (mixed >> 31)) >> 1


class _Run:
    """One stage's training: the objective, its optimiser and average, and where they stand."""

    def __init__(self, objective: Objective, folder: Path, settings: LoopSettings) -> None:
        from accelerate import Accelerator

        self.objective, self.folder, self.settings = objective, folder, settings
        self.accelerator = Accelerator(mixed_precision="no")  # precision is ours: one setting for every device
        objective.to(self.accelerator.device)
        groups = objective.parameter_groups()
        self.scales = [float(group.pop("scale", 1.0)) for group in groups]
        optimiser = MuonAdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.step_module, self.optimiser = self.accelerator.prepare(_Step(objective), optimiser)
        if settings.compile:
            for module in objective.compiled():
                module.compile(dynamic=False)
        self.average = Average(objective.module, settings.average) if settings.average > 0 else None
        self.step = 0
        self.steps: int | None = None
        self.seconds = 0.0
        self.drawn: Iterator[Any] | None = None  # batches that others draw ahead

    def load(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            return
        state = load_tensors(path)
        try:
            self.objective.module.load_state_dict(under_prefix("module.", state.tensors))
            if self.average is not None:
                self.average.load_state_dict(under_prefix("average.", state.tensors))
        except (RuntimeError, KeyError) as error:
            raise CheckpointBroken(
                f"{path} belongs to another network ({error}); delete it or train in a new folder."
            ) from error
        restore_optimiser(self.optimiser, under_prefix("optimiser.", state.tensors))
        torch.set_rng_state(state.tensors["random"])
        self.step, self.steps = int(state.facts["step"]), int(state.facts["steps"])
        self.seconds = float(state.facts["seconds"])

    def save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = with_prefix("module.", self.objective.module.state_dict())
        tensors |= with_prefix("optimiser.", flatten_optimiser(self.optimiser))
        if self.average is not None:
            tensors |= with_prefix("average.", self.average.state_dict())
        tensors["random"] = torch.get_rng_state()
        facts = {"step": self.step, "steps": self.steps, "seconds": self.seconds, "settings": asdict(self.settings)}
        save_tensors(tensors, self.folder / STATE, {"stage": self.objective.name, **facts})

    def seeds(self, step: int) -> list[int]:
        """Of the batches of one step."""
        count, rank = self.settings.accumulate, self.accelerator.process_index
        return [step_seed(self.settings.seed, step * count + part, rank) for part in range(count)]

    def draw_ahead(self, steps: int) -> None:
        """Let other processes draw the batches up to ``steps`` from here on; they are the same ones."""
        workers = self.settings.workers
        if workers is None:
            workers = 0 if self.accelerator.device.type == "cpu" else _helping_hands()
        if workers > 0:
            keys = [(step, seed) for step in range(self.step, steps) for seed in self.seeds(step)]
            self.drawn = iter(
                DataLoader(
                    _Batches(self.objective), None, sampler=keys, num_workers=workers, collate_fn=_itself,
                    worker_init_fn=_begin_drawing, multiprocessing_context=_FORK,
                )
            )  # fmt: skip

    def backward(self, step: int) -> dict[str, Tensor]:
        """Gradients of one step (of ``accumulate`` batches); returns its detached scalars."""
        device, count = self.accelerator.device, self.settings.accumulate
        shown: dict[str, Tensor] = {}
        for seed in self.seeds(step):
            batch = _Batches(self.objective)[step, seed] if self.drawn is None else next(self.drawn)
            generator = torch.Generator(device).manual_seed(seed ^ 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.bfloat16):
                losses = self.step_module(moved(batch, device), step, generator)
            self.accelerator.backward(losses["loss"] / count)
            for name, value in losses.items():
                shown[name] = shown.get(name, torch.zeros(())) + value.detach().float().cpu() / count
        return shown

    def advance(self, steps: int) -> dict[str, Tensor]:
        settings = self.settings
        factor = settings.learning_rate * settings.rate(self.step, steps)
        for group, scale in zip(self.optimiser.param_groups, self.scales, strict=True):
            group["lr"] = factor * scale
        shown = self.backward(self.step)
        if settings.clip > 0:
            self.accelerator.clip_grad_norm_(self.objective.module.parameters(), settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.step)
        self.step += 1
        return shown

    def seconds_per_step(self, tries: int = 6) -> float:
        """Time of one step, measured without leaving a trace in weights, statistics or random state."""
        before = {name: value.clone() for name, value in self.objective.module.state_dict().items()}
        random = torch.get_rng_state()
        times: list[float] = []
        for step in range(tries):
            start = time.perf_counter()
            self.backward(step)
            times.append(time.perf_counter() - start)
        self.optimiser.zero_grad(set_to_none=True)
        self.objective.module.load_state_dict(before)
        torch.set_rng_state(random)
        return sorted(times)[tries // 2]


def run(
    objective: Objective,
    folder: Path,
    budget: Budget,
    settings: LoopSettings = LoopSettings(),
) -> dict[str, Any]:
    """Train until the budget is spent; go on from ``folder``'s checkpoint if there is one.

    Returns what was measured: steps, seconds, the losses' recent means, and the objective's own figures once all
    steps are done. The module ends with its averaged weights then. Ctrl-C saves and raises :class:`Cancelled`.
    """
    from tqdm import tqdm

    keep_memory()
    torch.manual_seed(settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    state = _Run(objective, folder, settings)
    state.load()
    objective.module.train()
    if budget.steps is not None:
        steps = budget.steps
    elif state.steps is not None:
        steps = state.steps
    else:
        assert budget.seconds is not None
        steps = max(1, int(0.95 * budget.seconds / state.seconds_per_step()))
    state.steps = steps
    state.draw_ahead(steps)

    recent: dict[str, float] = {}
    start = last_saved = last_shown = time.monotonic()
    earlier = state.seconds
    bar = tqdm(total=steps, initial=state.step, desc=objective.name, mininterval=settings.show_every, leave=False)
    with _Interrupt().watched() as interrupt, bar:
        while state.step < steps:
            shown = state.advance(steps)
            bar.update()
            for name, value in shown.items():
                recent[name] = value.item() if name not in recent else 0.98 * recent[name] + 0.02 * value.item()
            if not math.isfinite(recent["loss"]):
                raise FloatingPointError(f"{objective.name}: the loss is no longer finite at step {state.step}.")
            now = time.monotonic()
            state.seconds = earlier + now - start
            if now - last_shown > settings.show_every:
                bar.set_postfix({name: f"{value:.4g}" for name, value in recent.items()}, refresh=False)
                with (folder / "losses.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps({"step": state.step, "seconds": round(state.seconds, 1), **recent}) + "\n")
                last_shown = now
            out_of_time = budget.seconds is not None and now - start > budget.seconds and budget.steps is not None
            if interrupt.asked or out_of_time or now - last_saved > settings.save_every:
                state.save()
                last_saved = time.monotonic()
            if interrupt.asked:
                raise Cancelled(
                    f"Training '{objective.name}' was stopped at step {state.step} of {steps}; "
                    f"the same call goes on from {folder / STATE}."
                )
            if out_of_time:
                break
    state.save()
    state.drawn = None  # ends those who drew ahead
    objective.to(torch.device("cpu"))  # what is measured and written has one form, wherever it was learnt
    measured: dict[str, Any] = {"steps": state.step, "seconds": round(state.seconds, 1)}
    measured |= {f"train_{name}": round(value, 5) for name, value in recent.items()}
    if state.step >= steps:
        if state.average is not None:
            average = state.average.state_dict()
            with torch.no_grad():
                for name, value in objective.module.state_dict().items():
                    if value.is_floating_point():
                        value.copy_(average[name])
        objective.module.eval()
        with torch.no_grad():
            measured |= objective.figures()
    logger.info("%s: %s", objective.name, measured)
    return measured


def _helping_hands() -> int:
    """How many processes can draw batches beside this one, by cores and by the shared memory that takes the batches."""
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free // _HANDED if shared.is_dir() else cores()
    return max(0, min(cores() - 1, room))


def wear_average(module: nn.Module, folder: Path, only: str | tuple[str, ...] = "") -> None:
    """Give ``module`` the averaged weights of a checkpoint (its plain ones where there is no average).

    With ``only``, prefixes of names, the rest keeps its values.
    """
    tensors = load_tensors(folder / STATE).tensors
    found = under_prefix("module.", tensors) | under_prefix("average.", tensors)
    chosen = {name: value for name, value in found.items() if name.startswith(only)}
    module.load_state_dict(chosen if only else found, strict=not only)


def steps_for(objective: Objective, folder: Path, seconds: float, settings: LoopSettings) -> int:
    """How many steps fit into ``seconds`` on this machine."""
    return max(1, int(seconds / _Run(objective, folder, settings).seconds_per_step()))


def planned_steps(folder: Path) -> int | None:
    """The length of the schedule that a folder's checkpoint was begun with; None where there is no checkpoint."""
    path = folder / STATE
    return int(load_tensors(path).facts["steps"]) if path.exists() else None
