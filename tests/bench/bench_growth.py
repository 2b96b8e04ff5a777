"""How the cost of a picture grows: with people, tokens, references, pictures at a time and resolution.

    python -m tests.bench.bench_growth --model facegen/assets/mini/base --clock cpu --out growth.md
    python -m tests.bench.bench_growth --model random-sdxl --steps 5 --out growth.md

Each line is one change from the plain case (one person of four tokens, one picture, the model's own size), beside
diffusers' IP-Adapter pipeline on the same weights in the same process. `growth` is a side's time over its own plain
case. diffusers has no references (extra keys in self-attention): there stands facegen alone. Decoding is left out.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.bench.bench_generate import Setup, diffusers_side, facegen_side, machine, timed
from tests.bench.cases import SMALL, UNETS, Case, crowd
from tests.bench.sheet import Sheet

logger = logging.getLogger("bench_growth")


@dataclass(frozen=True)
class Growth:
    """One line: people, tokens of each, references looked at, pictures at a time, side in pixels (None: own)."""

    people: int = 1
    tokens: int = 4
    references: int = 0
    pictures: int = 1
    size: int | None = None

    def __str__(self) -> str:
        plain = Growth()
        said = [f"{name} {value}" for name, value in vars(self).items() if value != getattr(plain, name)]
        return ", ".join(said) or "plain"


def axes(side: int) -> list[Growth]:
    """All lines; side: the model's own size in pixels."""
    plain = Growth()
    return [
        plain,
        *(replace(plain, people=count) for count in (2, 4)),
        *(replace(plain, tokens=count) for count in (16, 64)),
        *(replace(plain, references=count) for count in (1, 2)),
        *(replace(plain, pictures=count) for count in (2, 4)),
        *(replace(plain, size=size) for size in (side * 3 // 2, side * 2)),
    ]


def sides(setup: Setup, line: Growth, own: str) -> dict[str, Callable[[], Tensor]]:
    """What makes the pictures of a line: facegen, and diffusers where it can."""

    def case() -> Case:
        return crowd(setup.model, (line.people, line.tokens, line.references), line.pictures, line.size, setup.where)

    found = {own: facegen_side(setup, case(), own)}
    if not line.references:
        found["diffusers"] = diffusers_side(setup, case(), "diffusers")
    return found


def measure(setup: Setup, line: Growth, own: str, repeats: int) -> dict[str, float]:
    """Median seconds per picture of each side, in turn."""
    makers = sides(replace(setup, pictures=line.pictures, size=line.size), line, own)
    for make in makers.values():
        make()
    seconds: dict[str, list[float]] = {side: [] for side in makers}
    for place in range(repeats):
        for side in list(makers)[:: 1 if place % 2 else -1]:
            seconds[side].append(timed(makers[side], setup.clock)[0] / line.pictures)
    return {side: statistics.median(values) for side, values in seconds.items()}


def heading(setup: Setup, own: str, where: dict[str, str]) -> str:
    """What stands above the rows."""
    return "\n".join(
        [
            f"## How cost grows: {setup.model}, {setup.steps} steps",
            "",
            f"{', '.join(where.values())}; {setup.clock} time.",
            "",
            f"| case | {own}, s per picture | growth | diffusers | growth | × diffusers |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            "",
        ]
    )


def row(line: Growth, seconds: dict[str, float], plain: dict[str, float], own: str) -> str:
    """One line of the table; plain: what the plain case took."""
    mine, theirs = seconds[own], seconds.get("diffusers")
    told = f"| {line} | {mine:.3f} | {mine / plain[own]:.2f}"
    if theirs is None:
        return f"{told} | – | – | – |\n"
    return f"{told} | {theirs:.3f} | {theirs / plain['diffusers']:.2f} | {theirs / mine:.2f} |\n"


def main() -> None:
    """Parse, measure, write Markdown."""
    import diffusers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=SMALL, help=f"a diffusers folder, or {', '.join(UNETS)}")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    Sheet.flags(parser)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    diffusers.logging.set_verbosity_error()
    own = "triton" if torch.cuda.is_available() else "packed"
    setup = Setup(options.model, "face", options.steps, 1, None, clock=options.clock, decode=False)
    side = crowd(options.model, (1, 4, 0), 1, None, setup.where).side
    sheet = Sheet.of(options)
    sheet.add(heading(setup, own, machine()))
    plain: dict[str, float] = {}
    for line in sheet.each(axes(side)):
        seconds = measure(setup, line, own, options.repeats)
        plain = plain or seconds
        sheet.add(row(line, seconds, plain, own))
        logger.info("%s: %s", line, {name: round(value, 3) for name, value in seconds.items()})
    sheet.add("\n")


if __name__ == "__main__":
    main()
