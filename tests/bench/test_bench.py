"""The benchmarks run, and both sides make the same picture."""

from __future__ import annotations

import pytest
import torch

from facegen.economy import PRESETS, Economy
from facegen.errors import WrongRequest
from facegen.evaluation.protocol import Plan
from facegen.few_steps import FewSteps
from tests.bench.bench_generate import Setup, compare, heading, lines, machine
from tests.bench.bench_growth import Growth, axes, measure, row
from tests.bench.cases import SMALL, SMALL_XL
from tests.bench.price import OTHER_NOISE, Features, Way, unlike, way
from tests.bench.price import measure as measure_price


@pytest.mark.parametrize(("model", "case"), [(SMALL, "instantid"), (SMALL, "regions"), (SMALL_XL, "face")])
def test_every_exact_side_makes_diffusers_picture(model: str, case: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("in bfloat16 the last bits differ")
    rows = compare(Setup(model, case, 2, 1, None), ("diffusers", "facegen", "packed"), 1)
    difference = {row["side"]: row["difference"] for row in rows}
    assert difference["facegen"] < 1e-6
    assert difference["packed"] < 1e-4
    assert lines(rows).count(f"| {case} |") == 3
    assert model in heading(Setup(model, case, 2, 1, None), 1, machine())


def test_growth_is_measured_on_both_sides() -> None:
    setup = Setup(SMALL, "face", 1, 1, None)
    plain, crowded, seen = Growth(), Growth(people=2, tokens=8), Growth(references=1)
    found = [(line, measure(setup, line, "facegen", 1)) for line in (plain, crowded, seen)]
    assert [set(seconds) for _, seconds in found] == [{"facegen", "diffusers"}] * 2 + [{"facegen"}]
    assert all(row(line, seconds, found[0][1], "facegen").count(" |") == 6 for line, seconds in found)
    assert len(axes(64)) == 11


def test_features_tell_pictures_apart() -> None:
    from facegen.evaluation.judges import load_judges

    features = Features(load_judges().parsing_net)
    one = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert unlike(features, one, one) == 0.0
    near, far = (one + 0.02).clamp(0, 1), one.flip(0)
    assert 0 < unlike(features, one, near) < unlike(features, one, far)


def test_the_fast_ways_of_mini_stay_nearer_than_other_noise() -> None:
    ways = [way(name, "mini") for name in ("exact", "fast", "fastest")]
    plan = Plan("mini", ("instantid",), 4, 1, steps=10, batch=4)
    exact, fast, fastest, other = measure_price(plan, "instantid", [*ways, Way(OTHER_NOISE, seed=500_000)])
    assert exact.unlike == 0
    assert fast.unlike < other.unlike / 2
    assert fastest.unlike < other.unlike * 0.8
    assert min(fast.row.likeness, fastest.row.likeness) > exact.row.likeness - 0.1


def test_ways_by_name() -> None:
    fast, fastest = way("fast", "mini"), way("fastest", "mini")
    assert fast.economy is PRESETS["fast"]
    assert (fast.lora, fast.few) == (None, FewSteps("model", 5, 3.0))
    assert fastest.lora is not None
    assert (fastest.lora.name, fastest.few) == ("few.safetensors", FewSteps("ddim trailing", 4))
    assert way("guidance 0-0.5", "mini").economy == Economy(guidance=(0.0, 0.5))
    assert way("control-cond", "mini").economy == Economy(control_both=False)
    assert way("steps 8", "mini").steps == 8
    assert (way("int8", "mini").weights, way("tiny taesd", "mini").tiny) == ("int8", "taesd")
    with pytest.raises(WrongRequest, match="neither a preset nor a LoRA"):
        way("nonsense", "mini")
    with pytest.raises(WrongRequest, match="no way"):
        way("reuse often", "mini")
