"""InstantID begins with what IP-Adapter-FaceID has learnt to say of faces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from facegen.adapters.instantid import InstantID
from facegen.adapters.ip_adapter_faceid import IPAdapterFaceID
from facegen.errors import WrongRequest
from facegen.training.diffusion import DiffusionObjective, DiffusionSettings
from facegen.training.loop import Budget, LoopSettings, run
from facegen.training.tokens import TokensObjective

Teaching = Callable[[DiffusionSettings], DiffusionObjective]
SIZES = DiffusionSettings(
    channels=(32, 64), text_width=128, text_layers=1, queries=8, resampler_depth=1, rank=2,
    ways={"ip_adapter_faceid": 0.5, "instantid": 0.5},
)  # fmt: skip


def both(tiny_teaching: Teaching, queries: int = 8) -> tuple[InstantID, IPAdapterFaceID]:
    adapters = tiny_teaching(replace(SIZES, queries=queries)).adapters
    pupil, master = adapters["instantid"], adapters["ip_adapter_faceid"]
    assert isinstance(pupil, InstantID)
    assert isinstance(master, IPAdapterFaceID)
    return pupil, master


def people(count: int) -> Tensor:
    return 12 * F.normalize(torch.randn(count, 128, generator=torch.Generator().manual_seed(5)), dim=1)


def test_instantid_learns_to_say_what_faceid_says(tiny_teaching: Teaching, tmp_path: Path) -> None:
    pupil, master = both(tiny_teaching)
    objective = TokensObjective(pupil, master, people(300), people(340)[300:], batch=32)
    net = {name: value.clone() for name, value in pupil.controlnet.state_dict().items()}
    before = objective.figures()["held_out_astray"]
    measured = run(objective, tmp_path / "run", Budget(steps=120), LoopSettings(learning_rate=3e-3, warmup=5))
    assert measured["held_out_astray"] < 0.7 * before
    batch = objective.batch(0, torch.Generator().manual_seed(1))
    assert batch.shape == (32, 128)
    assert not batch[-2:].any()
    assert batch[:-2].any(1).all()
    assert all(torch.equal(value, net[name]) for name, value in pupil.controlnet.state_dict().items())


def test_the_same_tokens_said_twice_tell_the_layers_as_much(tiny_teaching: Teaching) -> None:
    """At its own strength InstantID gives attention what FaceID gives at its own, once their tokens agree."""
    pupil, master = both(tiny_teaching)
    TokensObjective(pupil, master, people(4))
    tokens, query = torch.randn(1, 4, 128), torch.randn(1, 9, 32)

    def read(adapter: InstantID | IPAdapterFaceID, said: Tensor) -> Tensor:
        streams = adapter.streams.state_dict()
        first = next(name.split(".to_k")[0] for name in streams if ".to_k" in name and "lora" not in name)
        key, value = (
            next(v for n, v in streams.items() if n.startswith(f"{first}.{part}")) for part in ("to_k", "to_v")
        )
        key, value = key[:32], value[:32]
        return adapter.strength * F.scaled_dot_product_attention(query, said @ key.T, said @ value.T)

    torch.testing.assert_close(read(pupil, tokens.repeat(1, 2, 1)), read(master, tokens))
    assert pupil.strength != master.strength


def test_queries_that_are_no_multiple_are_said(tiny_teaching: Teaching) -> None:
    pupil, master = both(tiny_teaching, queries=6)
    with pytest.raises(WrongRequest, match="6 queries cannot say 4 tokens"):
        TokensObjective(pupil, master, people(4))
