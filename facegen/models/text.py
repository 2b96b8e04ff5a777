"""Lists of prompts."""

from __future__ import annotations

from collections.abc import Sequence

from facegen.errors import WrongRequest


def negatives(negative: Sequence[str] | str | None, count: int) -> list[str]:
    """What to avoid, once for each of `count` prompts; raises WrongRequest when the numbers differ."""
    if negative is None:
        return [""] * count
    if isinstance(negative, str):
        return [negative] * count
    if len(negative) == 1:
        return list(negative) * count
    if len(negative) != count:
        raise WrongRequest(f"There are {count} prompts but {len(negative)} negative prompts; give one, or {count}.")
    return list(negative)
