"""The fused cross-attention kernel alone, beside what it replaces.

    python -m tests.bench.bench_attention --out attention.md          # on a CUDA machine, some minutes
    python -m tests.bench.bench_attention --tune                      # tile sizes, warps and stages, best first
    TRITON_INTERPRET=1 python -m tests.bench.bench_attention --tiny   # proves the script on a CPU; times mean nothing

Peers: one scaled_dot_product_attention for the prompt and one for each stream, scaled, masked and added (what diffusers
does), and the same through xformers where it is installed. `copy` is the share of the measured copy bandwidth that
reading every query and writing every output once amounts to (1: the floor is reached; above it the data came from the
cache), `matrix` the share of the measured bf16 matrix rate of the products that are needed. Inputs rotate, so that
together they are larger than the L2 cache. Every output is compared with the explicit softmax in float64.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from facegen.attention.backends import BACKENDS, Backend, math, sdpa
from facegen.attention.processor import KeyValue, StreamGroup, mix
from facegen.attention.segments import Segments, side_by_side
from facegen.errors import PackageMissing
from tests.bench.sheet import Sheet

if TYPE_CHECKING:
    from facegen.attention.triton_kernel import Launch

logger = logging.getLogger("bench_attention")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """rows of a call, heads, queries, channels of a head; tokens of the prompt and of each stream."""

    name: str
    rows: int
    heads: int
    length: int
    d: int
    streams: tuple[int, ...] = (16,)
    text: int = 77
    masked: bool = False

    @property
    def flops(self) -> float:
        """Of the two matrix products."""
        return 4.0 * self.rows * self.heads * self.length * self.d * (self.text + sum(self.streams))

    def traffic(self, dtype: torch.dtype) -> float:
        """Bytes of every query read once and every output written once."""
        return 2.0 * self.rows * self.heads * self.length * self.d * dtype.itemsize


# Guidance on, one picture: two rows. SDXL attends at 1/16 and 1/32 of 1024 px, SD 1.5 at 1/8 … 1/64 of 512 px.
SHAPES = (
    Shape("SDXL 64² ", 2, 10, 4096, 64),
    Shape("SDXL 32² ", 2, 20, 1024, 64),
    Shape("SDXL 64², 4 pictures", 8, 10, 4096, 64),
    Shape("SDXL 64², 4 tokens", 2, 10, 4096, 64, (4,)),
    Shape("SDXL 64², 2 people, regions", 2, 10, 4096, 64, (16, 16), masked=True),
    Shape("SDXL 64², 4 people, regions", 2, 10, 4096, 64, (16,) * 4, masked=True),
    Shape("SDXL 128² (2048 px)", 2, 10, 16384, 64),
    Shape("SD 1.5 64²", 2, 8, 4096, 40),
    Shape("SD 1.5 32²", 2, 8, 1024, 80),
    Shape("SD 1.5 16²", 2, 8, 256, 160),
)
TINY = (Shape("tiny", 1, 2, 37, 40, (4, 4), 20, masked=True), Shape("tiny, wide", 1, 1, 20, 160, (5,), 20))


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set of tensors of a shape."""

    query: Tensor
    text: KeyValue
    groups: list[StreamGroup]
    segments: Segments


def inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Inputs:
    """Random, never zeros; heads split off a projection's output, as in the model."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)

    def heads(count: int) -> Tensor:
        return draw(shape.rows, count, shape.heads * shape.d).unflatten(2, (shape.heads, shape.d)).transpose(1, 2)

    text = heads(shape.text), heads(shape.text)
    groups = []
    for tokens in shape.streams:
        mask = draw(1, shape.length, 1).sigmoid() if shape.masked else None
        scale = torch.tensor([0.8], device=DEVICE)
        groups.append(StreamGroup(heads(tokens), heads(tokens), scale, (mask,)))
    return Inputs(heads(shape.length), text, groups, side_by_side(text, groups, dtype))


def median(run: Callable[[int], object], repeats: int) -> float:
    """Median seconds of one call; on a GPU a graph of all calls is replayed, so that launching is not measured."""
    if DEVICE == "cpu":
        run(0)
        found = []
        for place in range(repeats):
            begin = time.perf_counter()
            run(place)
            found.append(time.perf_counter() - begin)
        return statistics.median(found)
    calls = 20
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for place in range(3):
            run(place)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for place in range(calls):
            run(place)
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1000 / calls)
    return statistics.median(found)


def ceilings(repeats: int) -> tuple[float, float]:
    """(bytes per second of a copy, read and written; FLOP per second of a large matrix product), measured."""
    big = 2**30 if DEVICE == "cuda" else 2**24
    side = 8192 if DEVICE == "cuda" else 256
    source, target = torch.randn(big // 4, device=DEVICE), torch.empty(big // 4, device=DEVICE)
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=DEVICE).to(half) for _ in range(2))
    return (
        2 * big / median(lambda _: target.copy_(source), repeats),
        2 * side**3 / median(lambda _: a @ b, repeats),
    )


def peers(sets: list[Inputs]) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
    """The ways to compute the layer, by name."""
    from facegen.attention.triton_kernel import fused

    def plain(place: int) -> Tensor:
        one = sets[place % len(sets)]
        return mix(one.query, one.text, one.groups, sdpa)

    def efficient(place: int) -> Tensor:
        one = sets[place % len(sets)]
        return mix(one.query, one.text, one.groups, BACKENDS["xformers"])

    def kernel(place: int) -> Tensor:
        one = sets[place % len(sets)]
        return fused(one.query, one.segments)

    yield "sdpa", plain
    try:
        efficient(0)
        yield "xformers", efficient
    except (PackageMissing, NotImplementedError, ValueError) as error:
        logger.info("xformers is left out: %s", error)
    yield "triton", kernel


def far(shape: Shape, dtype: torch.dtype, run: Callable[[int], Tensor], one: Inputs) -> float:
    """‖out − exact‖ / ‖exact‖ against the explicit softmax in float64, on the first rows to save memory."""
    queries = slice(0, min(512, shape.length))
    wide = [
        StreamGroup(
            group.key.double(),
            group.value.double(),
            group.scales.double(),
            tuple(None if mask is None else mask[:, queries].double() for mask in group.masks),
        )
        for group in one.groups
    ]
    text = one.text[0].double(), one.text[1].double()
    exact = mix(one.query[:, :, queries].double(), text, wide, math)
    found = run(0)[:, queries].double()
    assert found.isfinite().all(), f"{shape.name}, {dtype}: something was left unwritten"
    return float((found - exact).norm() / exact.norm())


def table(shapes: tuple[Shape, ...], dtypes: list[torch.dtype], repeats: int, sheet: Sheet) -> None:
    """All shapes, precisions and peers in Markdown."""
    bandwidth, rate = ceilings(repeats)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU (interpreter: times mean nothing)"
    sheet.add(
        "## Cross-attention with token streams\n\n"
        f"{datetime.date.today().isoformat()}, {device}, torch {torch.__version__}; median of {repeats}.\n"
        f"Copy {bandwidth / 1e12:.2f} TB/s, matrix product {rate / 1e12:.0f} TFLOP/s.\n\n"
        "| shape | dtype | backend | µs | × sdpa | copy | matrix | error |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
    )
    for shape, dtype in sheet.each(list(itertools.product(shapes, dtypes))):
        # Enough sets to be twice the L2 cache of an H200.
        count = min(16, max(1, int(120e6 / shape.traffic(dtype)))) if DEVICE == "cuda" else 1
        sets = [inputs(shape, dtype, seed) for seed in range(count)]
        baseline = 0.0
        for name, run in peers(sets):
            with torch.no_grad():
                error = far(shape, dtype, run, sets[0])
                seconds = median(run, repeats)
            baseline = baseline or seconds
            sheet.add(
                f"| {shape.name} | {str(dtype).removeprefix('torch.')} | {name} | {seconds * 1e6:.1f} |"
                f" {baseline / seconds:.2f} | {shape.traffic(dtype) / seconds / bandwidth:.2f} |"
                f" {shape.flops / seconds / rate:.2f} | {error:.1e} |\n"
            )
    sheet.add("\n")


def both_ways(one: Inputs, backend: Backend) -> Callable[[int], object]:
    """Forward, and the gradients of everything that can have one."""
    leaves = [one.query, *one.text, *(x for group in one.groups for x in (group.key, group.value, group.scales))]
    for leaf in leaves:
        leaf.requires_grad_()

    def run(_: int) -> object:
        out = mix(one.query, one.text, one.groups, backend)
        found = torch.autograd.grad(out.float().square().mean(), leaves)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return found

    return run


def backward(shapes: tuple[Shape, ...], dtype: torch.dtype, repeats: int, sheet: Sheet) -> None:
    """Forward and backward together, as in training; launching included."""
    sheet.add("## Forward and backward\n\n| shape | backend | µs | × sdpa |\n| --- | --- | ---: | ---: |\n")
    for shape in sheet.each(shapes):
        one = inputs(shape, dtype, 0)
        baseline = 0.0
        for name in ("sdpa", "triton"):
            run = both_ways(one, BACKENDS[name])
            run(0)
            found = []
            for _ in range(repeats):
                begin = time.perf_counter()
                run(0)
                found.append(time.perf_counter() - begin)
            seconds = statistics.median(found)
            baseline = baseline or seconds
            sheet.add(f"| {shape.name} | {name} | {seconds * 1e6:.1f} | {baseline / seconds:.2f} |\n")
    sheet.add("\n")


def launched(sets: list[Inputs], launch: Launch) -> Callable[[int], Tensor]:
    """The kernel under a launch."""
    from facegen.attention.triton_kernel import fused

    return lambda place: fused(sets[place % len(sets)].query, sets[place % len(sets)].segments, launch)


def tune(shapes: tuple[Shape, ...], dtype: torch.dtype, repeats: int, sheet: Sheet) -> None:
    """Launches, the best five of the first shape of each head dimension."""
    from facegen.attention.triton_kernel import Launch

    choices: list[tuple[int, ...]] = [(64, 128), (32, 64, 128), (16, 32), (4, 8), (1, 2)]
    if DEVICE == "cpu":
        choices = [(16, 32), (16,), (16,), (4,), (1,)]
    sheet.add(
        "| shape | µs | rows | text | tokens | warps | stages |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    )
    firsts = {shape.d: shape for shape in reversed(shapes)}
    for shape in sheet.each(list(firsts.values())):
        sets = [inputs(shape, dtype, seed) for seed in range(4 if DEVICE == "cuda" else 1)]
        found = []
        for values in itertools.product(*choices):
            try:
                with torch.no_grad():
                    found.append((median(launched(sets, Launch(*values)), repeats), values))
            except Exception as error:  # one that asks too much of the chip is no candidate
                logger.info("%s %s: %s", shape.name, values, type(error).__name__)
        for seconds, values in sorted(found)[:5]:
            sheet.add(f"| {shape.name} | {seconds * 1e6:.1f} | " + " | ".join(map(str, values)) + " |\n")
    sheet.add("\n")


def main() -> None:
    """Parse, measure, write Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--repeats", type=int, default=20)
    Sheet.flags(parser)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shapes = TINY if options.tiny else SHAPES
    dtypes = [DTYPES[name] for name in options.dtypes]
    sheet = Sheet.of(options)
    if options.tune:
        tune(shapes, dtypes[0], options.repeats, sheet)
    elif options.backward:
        backward(shapes, dtypes[0], options.repeats, sheet)
    else:
        table(shapes, dtypes, options.repeats, sheet)


if __name__ == "__main__":
    main()
