"""Lists of prompts, and token embeddings that are rewritten before the encoder reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from facegen.errors import WrongBaseModel, WrongRequest


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


def each(text: str | Sequence[str], count: int, what: str) -> list[str]:
    """One text for each of `count` people, several texts for as many pictures of one; WrongRequest when they differ."""
    if isinstance(text, str):
        return [text] * count
    if count != 1 and len(text) != count:
        raise WrongRequest(f"There are {count} embeddings but {len(text)} {what}; give one, or {count}.")
    return list(text)


@contextmanager
def rewriting(encoder: Any, rewrite: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the `with` the looked-up token embeddings (B, L, D) go through `rewrite` on their way into the encoder.

    A hook, because the encoder takes ids alone and because everything behind the look-up (positions, causal mask, final
    LayerNorm) must stay the class's own.
    """

    def hook(module: nn.Module, inputs: Any, looked_up: Tensor) -> Tensor:
        return rewrite(looked_up)

    handle = encoder.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def single_token(tokenizer: Any, word: str, adapter: str) -> int:
    """The id of a word that an adapter replaces; WrongBaseModel when it is not one token."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise WrongBaseModel(
            f"{adapter} replaces the word {word!r}, which the loaded base model's tokenizer splits into {len(ids)};"
            " load the base model it was made for."
        )
    return int(ids[0])
