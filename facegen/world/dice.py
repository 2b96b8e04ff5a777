"""Uniform numbers read one after the other, by which a caption finds its words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Dice:
    """Uniform numbers read one after the other."""

    SIDES = 96

    def __init__(self, roll: Sequence[float]) -> None:
        self.roll = iter(roll)

    def chance(self, probability: float) -> bool:
        return next(self.roll) < probability

    def pick(self, options: Sequence[str]) -> str:
        return options[int(next(self.roll) * len(options))]

    def weighted(self, weights: Sequence[float]) -> int:
        point = next(self.roll) * sum(weights)
        for place, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return place
        return len(weights) - 1

    def shuffled(self, values: Iterable[str]) -> list[str]:
        return [value for _, value in sorted((next(self.roll), value) for value in values)]
