"""What a run may leave out: off by default, bounded where it is asked for, and truly left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen.conditions import Condition, ControlCondition, TextCondition
from facegen.denoise import Guidance, denoise
from facegen.economy import EXACT, PRESETS, Economy, preset
from facegen.errors import WrongRequest
from facegen.models.base import Model
from facegen.models.shortcut import Shortcut
from facegen.schedulers import build, start

STEPS = 6


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["tiny_sd15", "tiny_sdxl"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model.from_pretrained(request.getfixturevalue(request.param), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def text(model: Model) -> TextCondition:
    return model.encode_text(["a face"], ["blurry"])


@pytest.fixture(scope="module")
def steered(model: Model) -> ControlCondition:
    """A ControlNet whose residuals are not zero."""
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for place, parameter in enumerate(net.controlnet_down_blocks.parameters()):
        parameter.data = draw(place, *parameter.shape) / 20
    return ControlCondition(controlnet=net.eval().requires_grad_(False), image=draw(1, 1, 3, 64, 64).sigmoid())


class Counted:
    """How often modules ran, and with how many rows."""

    def __init__(self, *modules: Any) -> None:
        self.rows: list[list[int]] = [[] for _ in modules]
        for place, module in enumerate(modules):
            module.register_forward_hook(self._note(place))

    def _note(self, place: int) -> Any:
        def note(module: Any, args: tuple[Any, ...], output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            self.rows[place].append(found.shape[0])

        return note


def run(model: Model, conditions: list[Condition], economy: Economy) -> Tensor:
    scheduler = build("ddim", model.scheduler_config, STEPS)
    model.economy = economy
    try:
        return denoise(model, start(scheduler, draw(1, 1, 4, 8, 8)), scheduler, conditions, Guidance(5.0))
    finally:
        model.economy = EXACT


def test_exact_leaves_nothing_out(model: Model) -> None:
    assert model.economy is EXACT is PRESETS["exact"] is preset("exact")
    assert all(EXACT.guides(i, 9) and EXACT.is_whole(i, 9) for i in range(9))
    assert list(PRESETS) == ["exact", "fast", "fastest"]


def test_unknown_presets_and_wrong_parts_are_refused() -> None:
    with pytest.raises(WrongRequest, match="fastest"):
        preset("ludicrous")
    with pytest.raises(WrongRequest, match=r"\[0, 1\]"):
        Economy(guidance=(0.6, 0.4))
    with pytest.raises(WrongRequest, match="reuse"):
        Economy(reuse=0)


def test_a_short_step_at_the_latents_of_the_whole_one_is_the_whole_one(
    model: Model, text: TextCondition, steered: ControlCondition
) -> None:
    """Nothing is lost but what changed since."""
    x, t = draw(2, 2, 4, 8, 8), torch.tensor(400)
    with torch.no_grad(), model.prepare([text, steered], 1, True) as prepared:
        now = prepared.throughout()
        shortcut = Shortcut(model)
        whole = shortcut.predict(x, t, now, whole=False)  # there is nothing to take over yet
        assert torch.equal(whole, model.predict(x, t, now))
        assert torch.allclose(shortcut.predict(x, t, now, whole=False), whole, atol=1e-5)
        elsewhere = shortcut.predict(draw(3, 2, 4, 8, 8), t, now, whole=False)
        assert not torch.allclose(elsewhere, whole, atol=1e-2)
    assert not model.unet._forward_pre_hooks
    assert not model.unet.up_blocks[-1]._forward_pre_hooks


def test_parts_are_left_out(model: Model, text: TextCondition, steered: ControlCondition) -> None:
    deep = model.unet.mid_block
    counted = Counted(deep, model.unet.conv_out, steered.controlnet.controlnet_mid_block)
    try:
        exact = run(model, [text, steered], EXACT)
        assert counted.rows == [[2] * STEPS] * 3
        economies = {
            Economy(guidance=(0.0, 0.5)): [[2, 2, 2, 1, 1, 1]] * 3,
            Economy(guidance=(0.5, 1.0)): [[1, 1, 1, 2, 2, 2]] * 3,
            Economy(control=0.5): [[2] * STEPS, [2] * STEPS, [2] * 3],
            Economy(control_both=False): [[2] * STEPS, [2] * STEPS, [1] * STEPS],
            Economy(reuse=2): [[2] * 3, [2] * STEPS, [2] * 3],
            Economy(reuse=2, whole=0.5): [[2] * 4, [2] * STEPS, [2] * 4],  # steps 0, 1, 2 and 4
            # Guidance ends inside a stretch of short steps: they go on with the conditional half.
            Economy(guidance=(0.0, 0.5), reuse=4): [[2, 1], [2, 2, 2, 1, 1, 1], [2, 1]],
            # It begins inside one: there is no unconditional half to take over, so the step is whole.
            Economy(guidance=(0.5, 1.0), reuse=6): [[1, 2], [1, 1, 1, 2, 2, 2], [1, 2]],
        }
        for economy, expected in economies.items():
            counted.rows = [[], [], []]
            found = run(model, [text, steered], economy)
            assert counted.rows == expected, economy
            assert found.isfinite().all()
            assert not torch.equal(found, exact)
    finally:
        for module in (deep, model.unet.conv_out, steered.controlnet.controlnet_mid_block):
            module._forward_hooks.clear()


def test_a_run_of_few_steps_leaves_nothing_out(model: Model, text: TextCondition) -> None:
    economy = Economy(guidance=(0.0, 0.5), reuse=2, least=STEPS + 1)
    assert torch.equal(run(model, [text], economy), run(model, [text], EXACT))
    assert economy.over(STEPS + 1) is economy


def test_no_guidance_stays_no_guidance(model: Model, text: TextCondition) -> None:
    scheduler = build("ddim", model.scheduler_config, 2)
    begin = start(scheduler, draw(1, 1, 4, 8, 8))
    plain = denoise(model, begin, scheduler, [text], Guidance(1.0))
    model.economy = Economy(guidance=(0.0, 0.5))
    try:
        again = build("ddim", model.scheduler_config, 2)
        assert torch.equal(denoise(model, begin, again, [text], Guidance(1.0)), plain)
    finally:
        model.economy = EXACT


def test_the_pipeline_takes_the_preset(tiny_sd15: Path) -> None:
    from facegen.pipelines.generate import GeneratePipeline

    pipe = GeneratePipeline.from_pretrained(tiny_sd15, speed="fast", packed=True)
    assert pipe.model.economy is PRESETS["fast"]
    assert type(pipe.model.unet.conv_in).__name__ == "PackedConv2d"


def test_control_of_one_half_leaves_the_other_as_it_would_be_without(
    model: Model, text: TextCondition, steered: ControlCondition
) -> None:
    x, t = torch.cat([draw(2, 1, 4, 8, 8)] * 2), torch.tensor(400)

    def predicted(*conditions: Condition) -> Tensor:
        with torch.no_grad(), model.prepare([text, *conditions], 1, True) as prepared:
            return model.predict(x, t, prepared.throughout())

    (half,) = Economy(control_both=False).shorten([steered])
    found = predicted(half)
    assert torch.allclose(found[:1], predicted()[:1], atol=1e-6)
    assert torch.allclose(found[1:], predicted(steered)[1:], atol=1e-6)


@pytest.mark.parametrize(
    ("economy", "most"),
    [
        (Economy(guidance=(0.0, 0.7)), 0.5),
        (Economy(control=0.7), 0.2),
        (Economy(control_both=False), 1.5),
        (Economy(reuse=2, whole=0.2), 0.5),
        (PRESETS["fast"], 0.8),
        (PRESETS["fastest"], 1.5),
    ],
)
def test_what_is_left_out_changes_the_outcome_within_bounds(
    model: Model, text: TextCondition, steered: ControlCondition, economy: Economy, most: float
) -> None:
    """Relative to the spread of the exact outcome; random weights change more from step to step than trained ones."""
    economy = replace(economy, least=0)
    exact = run(model, [text, steered], EXACT)
    changed = (run(model, [text, steered], economy) - exact).abs().mean() / exact.std()
    assert 0 < changed < most
