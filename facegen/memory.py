"""Where a model's parts live, in which precision, and how little memory they may take."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from facegen.eight_bits import Weights, check, shrink
from facegen.errors import NotEnoughMemory, WrongRequest
from facegen.lending import by_layer, lent, units

Offload = Literal["none", "model", "sequential"]
Placing = Literal["auto", "none", "model", "sequential"]
Net = TypeVar("Net", bound=nn.Module)

logger = logging.getLogger(__name__)

MARGIN = 1.1  # of what was computed: the allocator's rounding, the libraries' own working memory
_LESS = {
    "none": "choose memory='model' (or 'sequential'), half precision, or a smaller picture",
    "model": "choose memory='sequential', half precision, tiling=True, or a smaller picture",
    "sequential": "choose half precision, tiling=True, a smaller picture, or fewer pictures at once",
}
_layered: WeakSet[nn.Module] = WeakSet()  # what is lent layer by layer
_turns = threading.RLock()  # what one thread lends, another must not take back


@dataclass(frozen=True)
class MemoryPlan:
    """device and dtype of the work; what waits outside the device.

    offload: "none": all parts stay on the device; "model": a part is on the device only while it works; "sequential":
    the networks layer by layer (slow, least memory).
    tiling: decode and encode pictures in tiles (large pictures); slicing: one picture of a batch after the other.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    offload: Offload = "none"
    tiling: bool = False
    slicing: bool = False

    @classmethod
    def choose(
        cls,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        offload: Offload = "none",
        tiling: bool = False,
        slicing: bool = False,
    ) -> MemoryPlan:
        """Fill in what is not given: the GPU where there is one, half precision on CUDA, float32 elsewhere."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise WrongRequest(f"There is no device {device!r}; use 'cpu', 'cuda', 'cuda:0' or 'mps'.") from error
        if place.type == "cuda" and not torch.cuda.is_available():
            raise WrongRequest("No CUDA device is usable here; use device='cpu'.")
        if offload not in get_args(Offload):
            raise WrongRequest(f"offload must be 'none', 'model' or 'sequential', not {offload!r}.")
        if dtype is None:
            dtype = torch.float16 if place.type == "cuda" else torch.float32
        return cls(place, dtype, offload, tiling, slicing)

    @property
    def waiting(self) -> torch.device:
        """Where idle parts stay."""
        return self.device if self.offload == "none" else torch.device("cpu")

    def place(self, module: nn.Module) -> None:
        """Bring a freshly loaded network (UNet, VAE, text encoder, ControlNet) to where it waits."""
        module.to(self.waiting)
        if self.offload == "sequential" and self.device != self.waiting and module not in _layered:
            by_layer(module, self.device)
            _layered.add(module)

    @contextmanager
    def using(self, *modules: nn.Module) -> Iterator[None]:
        """The parts are on the device inside the `with`, and wait again afterwards; it may be nested.

        Raises NotEnoughMemory in place of the device's own error.
        """
        try:
            if self.device == self.waiting:
                yield
                return
            with _turns, ExitStack() as stack:
                for module in modules:
                    if module not in _layered:
                        stack.enter_context(lent(module, self.device))
                yield
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemory(
                f"The memory of {self.device} is used up, with memory='{self.offload}'; {_LESS[self.offload]}."
            ) from error
        finally:
            if self.device.type == "cuda" and self.offload != "none":
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class Need:
    """What one network needs, in bytes: its weights, its largest layer, and what it works in besides."""

    weights: int
    layer: int
    work: int

    @classmethod
    def of(cls, network: nn.Module, work: int = 0) -> Need:
        """work: bytes of activations at the picture's size."""
        return cls(weight(network), max((weight(one) for one in units(network)), default=0), work)


def weight(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; what several names share counts once."""
    tensors: dict[int, Tensor] = {id(one): one for one in (*module.parameters(), *module.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def needed(needs: Mapping[str, Need], offload: Offload) -> int:
    """Bytes on the device at the peak of a run whose networks work one after the other."""
    if offload == "none":
        return sum(one.weights for one in needs.values()) + max(one.work for one in needs.values())
    if offload == "model":
        return max(one.weights + one.work for one in needs.values())
    return max(one.layer + one.work for one in needs.values())


def fitting(needs: Mapping[str, Need], free: int, what: str) -> Offload:
    """The fastest way that fits into `free` bytes. Raises NotEnoughMemory when none does."""
    for offload in get_args(Offload):
        if needed(needs, offload) * MARGIN <= free:
            return offload
    least = needed(needs, "sequential") * MARGIN
    raise NotEnoughMemory(
        f"Not enough memory: {what} needs at least {_gigabytes(least)}, of which {_gigabytes(free)} are free; use half"
        " precision, a smaller base model, or another device."
    )


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device, None where that is not known."""
    if device.type == "cuda" and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return None


@dataclass(eq=False)
class Memory:
    """A plan at work: everything that was loaded under it, so that it can be changed while more is loaded.

    auto: leave the device to what works ("model"), then to its layers ("sequential"), as soon as something new would
    not fit beside what is there. free: tells the bytes that can still be had on a device, None for as many as wished.
    weights: how the networks that are placed keep theirs, see facegen.eight_bits.
    """

    plan: MemoryPlan
    auto: bool = False
    work: int = 0  # bytes of activations at the model's own picture size
    free: Callable[[torch.device], int | None] = free_memory
    weights: Weights = "whole"
    _networks: WeakSet[nn.Module] = field(default_factory=WeakSet)
    _adapters: WeakSet[nn.Module] = field(default_factory=WeakSet)

    def __post_init__(self) -> None:
        check(self.weights, self.device)

    @classmethod
    def under(cls, plan: MemoryPlan | Memory) -> Memory:
        """The plan at work; a memory that is at work already is itself."""
        return plan if isinstance(plan, Memory) else cls(plan)

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.plan.device

    @property
    def waiting(self) -> torch.device:
        """Where idle parts stay."""
        return self.plan.waiting

    @property
    def offload(self) -> Offload:
        """What waits outside the device."""
        return self.plan.offload

    @property
    def tiling(self) -> bool:
        """Whether pictures are decoded in tiles."""
        return self.plan.tiling

    @property
    def slicing(self) -> bool:
        """Whether the pictures of a batch are decoded one by one."""
        return self.plan.slicing

    def choose(self, networks: Mapping[str, Need]) -> None:
        """The plan for a base model that is about to be placed, in place of "auto". Raises NotEnoughMemory."""
        self.work = max(one.work for one in networks.values())
        free = self.free(self.device)
        if not self.auto or free is None:
            return
        offload = fitting(networks, free, f"the model on {self.device}")
        beside = free - (needed(networks, offload) - self.work) * MARGIN
        # Tiles change nothing at the model's own size; four times its pixels are the pictures they are for.
        self.plan = replace(self.plan, offload=offload, tiling=self.plan.tiling or 4 * self.work * MARGIN > beside)
        if offload != "none":
            logger.info("%s of memory are free on %s: memory='%s'.", _gigabytes(free), self.device, offload)

    def move(self, device: torch.device) -> None:
        """Work on another device from now on; what is there already is to be placed again."""
        self.plan = replace(self.plan, device=device)

    def place(self, network: nn.Module) -> None:
        """As the plan does it, after making room."""
        shrink(network, self.weights)
        self._make_room(network)
        self._networks.add(network)
        self.plan.place(network)

    def keep(self, module: Net, dtype: torch.dtype | None = None) -> Net:
        """Bring an adapter's own net, in this precision, to where it waits.

        `using` lends it whole, but transformers' encoders like networks: nobody calls anything inside of those.
        """
        if dtype is not None:
            module.to(dtype)
        self._make_room(module)
        self._adapters.update(module.modules())
        self._put(module)
        return module

    def _put(self, module: nn.Module) -> None:
        if hasattr(module, "main_input_name"):
            self.plan.place(module)
        else:
            module.to(self.waiting)

    def using(self, *modules: nn.Module) -> Any:
        """See MemoryPlan.using."""
        return self.plan.using(*modules)

    def keeps(self, module: nn.Module) -> bool:
        """Whether the module came by way of `keep`, and is no network of its own."""
        return module in self._adapters and module not in self._networks

    def _make_room(self, module: nn.Module) -> None:
        free = self.free(self.device) if self.auto else None
        if free is None or module in self._networks:
            return
        new = weight(module)
        if self.offload == "none" and (new + self.work) * MARGIN > free:
            self._step_down("model")
            free = self.free(self.device) or 0
        if self.offload == "model":
            beside = max((weight(one) for one in self._networks), default=0)
            if (new + beside + self.work) * MARGIN > free:
                self._step_down("sequential")

    def _step_down(self, offload: Offload) -> None:
        logger.info(
            "The memory of %s is too small for all that is loaded: memory='%s' from now on.", self.device, offload
        )
        self.plan = replace(self.plan, offload=offload)
        for network in list(self._networks):
            self.plan.place(network)
        done: set[nn.Module] = set()
        for module in sorted(self._adapters, key=lambda one: -len(list(one.modules()))):  # outermost first
            if module not in done:
                self._put(module)
                done.update(module.modules())
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
