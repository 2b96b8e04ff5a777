"""The fused kernel against the explicit softmax in float64: values, gradients, ragged shapes, what it refuses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the fused kernel is an optional extra")

from facegen.attention import processor
from facegen.attention.backends import math, triton
from facegen.attention.processor import KeyValue, StreamGroup, mix
from facegen.attention.segments import side_by_side
from facegen.attention.triton_kernel import Launch, cuts, fused
from facegen.attention.weights import KV
from facegen.conditions import TokenCondition
from facegen.errors import WrongRequest
from facegen.models import prepared as prepared_module
from facegen.models.base import Model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SMALL = Launch(rows=32, text=16, tokens=16, warps=4, stages=1)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Whatever the kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random inputs whose numbers are exact in `dtype`, so that only the arithmetic differs from float64's."""

    def __init__(self, seed: int, d: int, dtype: torch.dtype, tokens: tuple[int, ...], masked: bool = True) -> None:
        choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        rows, heads, self.length = 1, 2, choose.randint(3, 43)
        # As in the processor: heads are split off a projection's output, so they are not contiguous.
        self.query = self.draw(rows, self.length, heads * d).view(rows, self.length, heads, d).transpose(1, 2)
        self.text = self.pair(rows, heads, choose.randint(1, 40), d)
        self.groups = []
        for count in tokens:
            people = choose.randint(1, 2)
            masks = [self.draw(1, self.length, 1).sigmoid() if masked and choose.random() < 0.7 else None] * people
            scales = self.draw(people).float()
            self.groups.append(StreamGroup(*self.pair(people * rows, heads, count, d), scales, tuple(masks)))

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    def pair(self, *shape: int) -> KeyValue:
        return self.draw(*shape), self.draw(*shape)

    def tensors(self) -> list[Tensor]:
        own = [self.query, *self.text]
        for group in self.groups:
            own += [group.key, group.value, group.scales]
        return own

    def outcome(self, backend: Any, wide: bool = False, launch: Launch | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output, and the gradients of its product with fixed random numbers."""
        found = [(x.double() if wide else x).detach().clone().requires_grad_() for x in self.tensors()]
        query = found[0].transpose(1, 2).contiguous().transpose(1, 2) if not wide else found[0]
        groups = [
            StreamGroup(found[3 + 3 * i], found[4 + 3 * i], found[5 + 3 * i], group.masks)
            for i, group in enumerate(self.groups)
        ]
        if launch is None:
            out = mix(query, (found[1], found[2]), groups, backend)
        else:
            out = fused(query, side_by_side((found[1], found[2]), groups, self.dtype), launch)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, self.dtype)
        gradients = torch.autograd.grad((out * weights.to(out.dtype)).sum(), found)
        return out, list(gradients)


def far(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖; NaN counts as infinitely far."""
    distance = float((found.double() - exact).detach().norm() / exact.detach().norm())
    return distance if distance == distance else float("inf")


@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        *((d, torch.float32) for d in (40, 64, 80, 160)),
        (64, torch.float16),
        (40, torch.bfloat16),
        (160, torch.bfloat16),
    ],
)
def test_values_and_gradients_are_those_of_the_explicit_softmax(d: int, dtype: torch.dtype) -> None:
    case = Case(d + len(str(dtype)), d, dtype, tokens=(4, 21))
    exact, exact_gradients = case.outcome(math, wide=True)
    found, gradients = case.outcome(triton, launch=SMALL)
    assert found.dtype == dtype
    assert far(found, exact) < BOUND[dtype]
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert far(ours, theirs) < 2 * BOUND[dtype]


@pytest.mark.parametrize("seed", range(4))
def test_any_shape_under_the_launch_that_is_used(seed: int) -> None:
    choose = random.Random(seed)
    d = choose.choice([8, 16, 24, 40, 64, 96])
    tokens = tuple(choose.randint(1, 16) for _ in range(choose.randint(1, 3)))
    case = Case(seed, d, torch.float32, tokens, masked=seed % 2 == 0)
    exact, _ = case.outcome(math, wide=True)
    with torch.no_grad():
        assert far(mix(case.query, case.text, case.groups, triton), exact) < BOUND[torch.float32]


def test_head_dimensions_are_cut_without_padding() -> None:
    assert [cuts(d) for d in (8, 16, 40, 64, 80, 128, 160)] == [
        (16, 0), (16, 0), (32, 16), (64, 0), (64, 16), (128, 0), (128, 32),
    ]  # fmt: skip


def test_large_logits_neither_overflow_nor_vanish() -> None:
    case = Case(5, 64, torch.float32, tokens=(4,))
    case.query = case.query * 100
    exact, _ = case.outcome(math, wide=True)
    with torch.no_grad():
        assert far(mix(case.query, case.text, case.groups, triton), exact) < 1e-4


def test_strength_zero_and_an_empty_mask_leave_the_prompt_alone() -> None:
    case = Case(6, 64, torch.float32, tokens=(4,), masked=False)
    group = case.groups[0]
    plain = mix(case.query, case.text, [], math)
    silent = group._replace(scales=torch.zeros_like(group.scales))
    nowhere = group._replace(masks=(torch.zeros(1, case.length, 1, device=DEVICE),) * len(group.masks))
    for one in (silent, nowhere):
        assert torch.allclose(mix(case.query, case.text, [one], triton), plain, atol=1e-5)


def test_a_query_of_its_own_and_a_learnt_mask_take_the_usual_way() -> None:
    case = Case(7, 16, torch.float32, tokens=(4,), masked=False)
    group = case.groups[0]
    one = StreamGroup(*(x[: len(case.query)] for x in (group.key, group.value)), group.scales[:1], (None,))
    width = case.query.shape[1] * case.query.shape[3]
    gated = one._replace(to_q=case.draw(width, width))
    expected = mix(case.query, case.text, [gated], math)
    assert torch.allclose(mix(case.query, case.text, [gated], triton), expected, atol=1e-5)
    mask = torch.rand(1, case.length, 1, generator=case.generator).to(DEVICE).requires_grad_()
    mix(case.query, case.text, [one._replace(masks=(mask,))], triton).sum().backward()
    assert mask.grad is not None
    assert mask.grad.abs().sum() > 0


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    case = Case(8, 16, torch.float32, tokens=(4,))
    with pytest.raises(WrongRequest, match="CUDA"):
        mix(case.query, case.text, case.groups, triton)


def test_a_model_gives_the_same_and_lays_tokens_side_by_side_once(
    tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.from_pretrained(tiny_sd15, dtype=torch.float32, device=DEVICE)
    text = model.encode_text(["a face"], ["blurry"])
    generator = torch.Generator().manual_seed(1)
    layers = {x.index: KV(model.text_width, x.width).to(DEVICE) for x in model.attention_layers if x.cross}
    tokens = torch.randn(2, 1, 4, model.text_width, generator=generator)
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    streams = [TokenCondition(tokens=tokens, layers=layers, mask=mask), TokenCondition(tokens=-tokens, layers=layers)]
    x = torch.randn(2, 4, 4, 4, generator=generator).to(DEVICE)
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(1)
        return side_by_side(*given)

    monkeypatch.setattr(prepared_module, "side_by_side", counted)
    monkeypatch.setattr(processor, "side_by_side", counted)

    def run(backend: Any) -> list[Tensor]:
        with torch.no_grad(), model.prepare([text, *streams], 1, True, backend=backend) as prepared:
            return [model.predict(x, torch.tensor(t), prepared.active(i, 2)) for i, t in enumerate((900, 100))]

    expected = run(math)
    assert not calls
    for found, wanted in zip(run(triton), expected, strict=True):
        assert torch.allclose(found, wanted, atol=2e-5)
    assert len(calls) == len(layers)
