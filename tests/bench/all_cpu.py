"""Every CPU table of docs/speed.md, one file each, in about a quarter of an hour of two quiet cores.

    python -m tests.bench.all_cpu --out outputs/bench

A table that is there already is left, so that the command may be given again after it was cut short. Each is measured
in a process of its own, and takes its name when it is finished.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.bench_generate import ROOT

logger = logging.getLogger("all_cpu")
MINI = "facegen/assets/mini/base"
FAST = ("facegen", "packed", "fast", "fastest")
JOBS: dict[str, list[str]] = {
    "mini": ["bench_generate", "--model", MINI, "--sides", *FAST, "--repeats", "7", "--memory", "instantid"],
    "mini4": ["bench_generate", "--model", MINI, "--sides", *FAST, "--cases", "instantid", "--pictures", "4",
              "--repeats", "3", "--memory"],
    "growth": ["bench_growth", "--model", MINI, "--repeats", "3"],
    "price": ["price", "--people", "60", "--batch", "10"],
    "sd15": ["bench_generate", "--model", "random-sd15", "--size", "256", "--steps", "1", "--latents", "--sides",
             "packed", "--repeats", "3", "--memory", "instantid"],
}  # fmt: skip
SMALL = {
    "mini": ["--cases", "text", "instantid", "--steps", "2", "--repeats", "1", "--memory"],
    "mini4": ["--steps", "2", "--repeats", "1"],
    "growth": ["--steps", "1", "--repeats", "1"],
    "price": ["--people", "2", "--batch", "2", "--steps", "2"],
    "sd15": ["--model", "random", "--size", "32", "--repeats", "1", "--memory"],
}
"""What makes a trial of each job: the last word counts."""


def run(name: str, folder: Path, more: list[str]) -> Path:
    """The table of a job; raises CalledProcessError."""
    done = folder / f"{name}.md"
    if done.exists():
        logger.info("%s is there already.", done)
        return done
    begun = time.monotonic()
    part = folder / f"{name}.md.part"
    part.unlink(missing_ok=True)
    module, *arguments = JOBS[name]
    command = [sys.executable, "-m", f"tests.bench.{module}", *arguments, *more, "--out", str(part.resolve())]
    subprocess.run(command, cwd=ROOT, check=True)
    part.rename(done)
    logger.info("%s after %.0f s", done, time.monotonic() - begun)
    return done


def main() -> None:
    """Parse, run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine with other work")
    parser.add_argument("--small", action="store_true", help="a trial of every job, in a minute or two")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.jobs:
        clock = [] if name == "price" else ["--clock", options.clock]  # always of this process there
        run(name, options.out, [*clock, *(SMALL[name] if options.small else [])])


if __name__ == "__main__":
    main()
