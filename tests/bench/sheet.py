"""A table that is written while it is measured, and ends before the time is over."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Piece = TypeVar("Piece")


class Sheet:
    """out: Markdown file to append to, None for standard output; minutes: how long all of it may take, None: as long
    as it does.
    """

    def __init__(self, out: Path | None = None, minutes: float | None = None) -> None:
        self.out = out
        self._seconds = float("inf") if minutes is None else 60 * minutes
        self._begin = time.monotonic()

    @classmethod
    def of(cls, options: argparse.Namespace) -> Sheet:
        """As the command line has it."""
        return cls(options.out, options.minutes)

    @staticmethod
    def flags(parser: argparse.ArgumentParser) -> None:
        """--out and --minutes."""
        parser.add_argument("--out", type=Path, help="Markdown file to append to; default: standard output")
        parser.add_argument("--minutes", type=float, help="begin nothing that would not be finished by then")

    def add(self, text: str) -> None:
        """Lines that stay, whatever happens to the rest."""
        if self.out is None:
            sys.stdout.write(text)
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(text)

    def each(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """The pieces one by one, as long as another that takes what the longest took would end in time; what is left
        over is named in the sheet.
        """
        longest = 0.0
        for place, piece in enumerate(pieces):
            begun = time.monotonic()
            if begun + longest - self._begin > self._seconds:
                self.add(f"\nNo time was left for {', '.join(map(str, pieces[place:]))}.\n")
                return
            yield piece
            longest = max(longest, time.monotonic() - begun)
