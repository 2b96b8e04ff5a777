"""The table of memory is computed from whole runs: on the device are what works, and nothing that waits."""

from __future__ import annotations

import pytest
import torch

from tests.bench.bench_memory import ADAPTERS, OFFLOADS, Configuration, computed
from tests.bench.cases import SMALL, SMALL_XL


@pytest.mark.parametrize("model", [SMALL, SMALL_XL])
def test_less_stays_on_the_device_with_each_plan(model: str) -> None:
    found = {one: computed(Configuration(model, "instantid", one, torch.float16)) for one in OFFLOADS}
    assert found["none"]["loaded"] > 0
    assert found["model"]["loaded"] == found["sequential"]["loaded"] == 0
    assert found["none"]["decoding"] > found["model"]["decoding"] >= found["sequential"]["decoding"]
    assert all(list(peaks.values()) == sorted(peaks.values()) for peaks in found.values()), "peaks so far only grow"
    alone = computed(Configuration(model, "none", "none", torch.float16))
    assert found["none"]["decoding"] > alone["decoding"]


def test_single_precision_takes_twice_as_much() -> None:
    half, single = (computed(Configuration(SMALL, "faceid", "model", one)) for one in (torch.float16, torch.float32))
    assert single["steps"] == pytest.approx(2 * half["steps"], rel=0.01)
    assert set(ADAPTERS) == {"none", "faceid", "instantid", "two identities"}
