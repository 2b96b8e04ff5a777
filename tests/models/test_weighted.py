"""Prompts with weights: how they are read, cut and weighed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from facegen.models.base import Model
from facegen.models.weighted import emphasised, parse, spelled


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a plain text", [("a plain text", 1.0)]),
        ("", [("", 1.0)]),
        ("a (red) hat", [("a ", 1.0), ("red", 1.1), (" hat", 1.0)]),
        ("a (red:1.5) hat", [("a ", 1.0), ("red", 1.5), (" hat", 1.0)]),
        ("a [red] hat", [("a ", 1.0), ("red", 1 / 1.1), (" hat", 1.0)]),
        (r"a \(red\) hat", [("a (red) hat", 1.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:2) hat", [("a ", 1.1), ("red", 2 * 1.1), (" hat", 1.1)]),
        ("red:1.5) hat]", [("red:1.5) hat]", 1.0)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        ("time: now", [("time: now", 1.0)]),
    ],
)
def test_what_weighs_how_much(text: str, parts: list[tuple[str, float]]) -> None:
    got = parse(text)
    assert [part for part, _ in got] == [part for part, _ in parts]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in parts])


def test_weights_move_tokens_from_the_last_one() -> None:
    embeds = torch.tensor([[[4.0], [3.0], [1.0]]])
    moved = emphasised(embeds, torch.tensor([[1.0, 2.0, 1.0]]))
    assert moved.flatten().tolist() == [4.0, 5.0, 1.0]


@pytest.mark.parametrize("kind", ["tiny_sd15", "tiny_sdxl"])
def test_texts_of_any_length(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    model = Model.from_pretrained(folder, device="cpu", dtype=torch.float32)
    tokenizer, last = model.tokenizer, model.tokenizer.eos_token_id
    (ids, weights), (more, _) = spelled(["abc" * 30, "ab"], tokenizer, 77)
    assert ids.shape == weights.shape == (2, 77)
    assert more.shape == (2, 90 - 75 + 2)
    assert ids[1, 3:].eq(last).all()
    assert [len(one[0][0]) for one in spelled(["a" * 75], tokenizer, 77)] == [77, 2], "an empty piece behind a full one"

    with torch.no_grad():
        short = model.encode_text(["abc"], ["b"], weighted=True)
        long = model.encode_text(["abc" * 30], ["b"], weighted=True)
        strong = model.encode_text(["(abc:1.5)"], ["b"], weighted=True)
        wanted = model.read(*[torch.tensor([[tokenizer.bos_token_id, *tokenizer("abc").input_ids[1:-1], last]])] * 2)
    assert torch.allclose(short.embeds[1], wanted[0], atol=1e-6), "not padded"
    if wanted[1] is not None:
        assert short.pooled is not None
        assert torch.allclose(short.pooled[1], wanted[1], atol=1e-6)
    assert long.embeds.shape[2] == 77 + 17
    end = short.embeds[1, :, -1:]
    assert torch.allclose(strong.embeds[1, :, 1:-1], (end + 1.5 * (short.embeds[1] - end))[:, 1:-1], atol=1e-5)
    assert torch.equal(strong.embeds[0], short.embeds[0])
