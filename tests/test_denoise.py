"""The one loop: what it leaves alone, what cancelling does, that a picture does not depend on its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facegen.attention.weights import KV
from facegen.conditions import (
    ChannelsCondition,
    Condition,
    ControlCondition,
    GuidanceCondition,
    KeepCondition,
    LoraCondition,
    LowRankWeights,
    TextCondition,
    TokenCondition,
)
from facegen.denoise import Guidance, Step, denoise, noise
from facegen.errors import Cancelled, WrongAdapter, WrongBaseModel, WrongRequest
from facegen.models.base import Model
from facegen.schedulers import build, start

STEPS = 4


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def checksum(module: nn.Module) -> str:
    """Every bit of the weights, and what hangs on the modules."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    for name, part in module.named_modules():
        hooks = len(part._forward_hooks) + len(part._forward_pre_hooks)
        digest.update(f"{name} {type(part).__name__} {hooks} {type(getattr(part, 'processor', None))}".encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> Model:
    return Model.from_pretrained(tiny_sd15, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def text(model: Model) -> TextCondition:
    return model.encode_text(["a face"], ["blurry"])


def run(model: Model, conditions: Sequence[Condition], name: str = "ddim", **more: Any) -> Tensor:
    scheduler = build(name, model.scheduler_config, STEPS)
    latents = more.pop("latents", draw(1, 1, 4, 8, 8))
    guidance = more.pop("guidance", Guidance(5.0))
    return denoise(model, start(scheduler, latents), scheduler, conditions, guidance, **more)


def face(model: Model, seed: int, **more: Any) -> TokenCondition:
    layers = {}
    for layer in model.attention_layers:
        if layer.cross:
            kv = KV(model.text_width, layer.width)
            kv.to_k.weight.data = draw(seed + layer.index, *kv.to_k.weight.shape) / 4
            kv.to_v.weight.data = draw(seed + layer.index + 50, *kv.to_v.weight.shape) / 4
            layers[layer.index] = kv.requires_grad_(False)
    return TokenCondition(tokens=draw(seed, 2, 1, 4, model.text_width), layers=layers, **more)


def lora(model: Model, seed: int, **more: Any) -> LoraCondition:
    names = ["conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"]
    attentions = [layer.name.removesuffix(".processor") for layer in model.attention_layers]
    names += [name + part for name in attentions for part in (".to_q", ".to_k")]
    layers = {}
    for place, name in enumerate(names):
        weight = model.unet.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        down = draw(seed + place, 2, *weight.shape[1:]) / 4
        up = draw(seed + place + 500, weight.shape[0], 2, *([1] * (weight.ndim - 2))) / 4
        layers[name] = LowRankWeights(down, up)
    return LoraCondition(layers=layers, **more)


def control(model: Model, **more: Any) -> ControlCondition:
    from diffusers.models.controlnets.controlnet import ControlNetModel

    net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return ControlCondition(controlnet=net.requires_grad_(False), image=torch.full((1, 3, 64, 64), 0.5), **more)


def test_calls_with_different_adapters_share_one_model(model: Model, text: TextCondition) -> None:
    before = checksum(model.unet)
    plain = run(model, [text])
    everything = [face(model, 1), face(model, 2), lora(model, 3), control(model)]
    results = [run(model, [text, condition]) for condition in everything]
    assert all((result - plain).abs().max() > 1e-3 for result in results)
    run(model, [text, *everything])
    assert checksum(model.unet) == before
    assert torch.equal(run(model, [text]), plain)
    assert torch.equal(run(model, [text, everything[0]]), results[0])


def test_scale_zero_and_an_empty_mask_are_the_base_output(model: Model, text: TextCondition) -> None:
    plain = run(model, [text])
    nowhere = torch.zeros(1, 64, 64)
    for condition in (
        face(model, 1, scale=0.0),
        face(model, 1, mask=nowhere),
        face(model, 1, scale=lambda progress: 0.0),
        lora(model, 3, scale=0.0),
        lora(model, 3, scale=[0.0, 0.0]),
        control(model, scale=0.0),
        control(model, mask=nowhere),
        GuidanceCondition(loss=lambda x, t: x.sum(), scale=0.0),
    ):
        assert torch.equal(run(model, [text, condition]), plain)


def test_a_controlnet_is_not_run_outside_its_span(model: Model, text: TextCondition) -> None:
    condition = control(model, span=(0.25, 0.75), scale=0.5)
    calls: list[int] = []
    hints: list[int] = []
    net = condition.controlnet
    net.get_submodule("conv_in").register_forward_hook(lambda *_: calls.append(1))
    net.get_submodule("controlnet_cond_embedding").register_forward_hook(lambda *_: hints.append(1))
    run(model, [text, condition])
    assert len(calls) == 2
    assert len(hints) == 1


def test_keys_of_constant_tokens_are_computed_once(model: Model, text: TextCondition) -> None:
    condition = face(model, 1, scale=[1.0, 0.8, 0.6, 0.4])
    calls: list[str] = []
    layer = next(layer for layer in model.attention_layers if layer.cross)
    to_k = layer.module.to_k
    assert to_k is not None
    hooks = [
        condition.layers[layer.index].to_k.register_forward_hook(lambda *_: calls.append("stream")),
        to_k.register_forward_hook(lambda *_: calls.append("text")),
    ]
    run(model, [text, condition])
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["stream", "text"]


@pytest.mark.parametrize("error", [Cancelled("stopped"), ValueError("broken")])
def test_stopping_half_way_leaves_the_model_as_it_was(model: Model, text: TextCondition, error: Exception) -> None:
    before = checksum(model.unet)
    plain = run(model, [text])
    seen: list[int] = []

    def stop(step: Step) -> None:
        seen.append(step.index)
        if step.index == 1:
            raise error

    with pytest.raises(type(error)):
        run(model, [text, face(model, 1), lora(model, 3), control(model)], on_step=stop)
    assert seen == [0, 1]
    assert checksum(model.unet) == before
    assert torch.equal(run(model, [text]), plain)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpm++", "lcm"])
def test_a_picture_does_not_depend_on_its_batch(model: Model, text: TextCondition, name: str) -> None:
    """Each draws from its own generator; what is left is how a CPU blocks its sums for other shapes."""
    together = run(
        model,
        [text, face(model, 1)],
        name,
        latents=noise((4, 8, 8), seeds(11, 12, 13)),
        generator=seeds(21, 22, 23),
    )
    alone = run(model, [text, face(model, 1)], name, latents=noise((4, 8, 8), seeds(12)), generator=seeds(22))
    assert (together[1:2] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_different_faces_in_one_batch(model: Model, text: TextCondition) -> None:
    first, second = face(model, 1), face(model, 2)
    both = TokenCondition(tokens=torch.cat([first.tokens, second.tokens], dim=1), layers=first.layers)
    latents = noise((4, 8, 8), seeds(1, 2))
    together = run(model, [text, both], latents=latents)
    alone = run(model, [text, TokenCondition(tokens=second.tokens, layers=first.layers)], latents=latents[1:])
    assert (together[1:] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_steps_tell_what_they_saw(model: Model, text: TextCondition) -> None:
    for name in ("ddim", "euler", "dpm++", "euler_a", "unipc", "lcm", "heun"):
        steps: list[Step] = []
        final = run(model, [text], name, on_step=steps.append, generator=seeds(1))
        assert [step.index for step in steps] == list(range(steps[0].total))
        assert torch.equal(steps[-1].latents, final)
        # The last step goes to the clean latents themselves (DDIM here ends one noise level short of it).
        close = 0.2 if name in ("ddim", "heun", "unipc", "dpm++") else 1e-3
        assert (steps[-1].predicted_x0 - final).abs().max() <= close * final.abs().max(), name


def test_without_guidance_only_the_conditional_half_runs(model: Model, text: TextCondition) -> None:
    shapes: list[int] = []
    hook = model.unet.conv_in.register_forward_hook(lambda m, args, out: shapes.append(args[0].shape[0]))
    other = TextCondition(embeds=torch.stack([draw(9, *text.embeds[0].shape), text.embeds[1]]))
    one = run(model, [text], guidance=Guidance(1.0))
    two = run(model, [other], guidance=Guidance(1.0))
    hook.remove()
    assert set(shapes) == {1}
    assert torch.equal(one, two)


def test_the_last_prompt_whose_span_holds_the_step_is_used(model: Model, text: TextCondition) -> None:
    other = model.encode_text(["somebody else"], ["blurry"])
    late = TextCondition(embeds=other.embeds, span=(0.5, 1.0))
    assert torch.equal(run(model, [text, other]), run(model, [other]))
    staged = run(model, [text, late])
    assert not torch.equal(staged, run(model, [text]))
    assert not torch.equal(staged, run(model, [other]))
    with pytest.raises(WrongRequest, match="prompt"):
        run(model, [late])


def test_a_photo_stays_outside_the_mask(model: Model, text: TextCondition) -> None:
    photo, start_noise = draw(5, 1, 4, 8, 8), draw(1, 1, 4, 8, 8)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:40, 24:] = 1
    for name in ("ddim", "euler", "dpm++"):
        result = run(model, [text, KeepCondition(latents=photo, mask=mask, noise=start_noise)], name)
        small = torch.nn.functional.interpolate(mask, size=(8, 8)).bool().expand_as(photo)
        assert torch.equal(result[~small], photo[~small])
        assert (result[small] - photo[small]).abs().max() > 0.1


def test_guidance_by_a_loss_lowers_it(model: Model, text: TextCondition) -> None:
    target = torch.zeros(1, 4, 8, 8)

    def loss(x: Tensor, timestep: Tensor) -> Tensor:
        return (x - target).pow(2).flatten(1).sum(1)

    for name in ("ddim", "euler", "dpm++"):
        free = run(model, [text], name)
        steered = run(model, [text, GuidanceCondition(loss=loss, scale=0.4)], name)
        assert steered.abs().mean() < 0.5 * free.abs().mean()


def test_lora_is_the_fused_weights(model: Model, text: TextCondition) -> None:
    """W x + up(down(x)) and (W + up·down) x agree."""
    import copy

    condition = lora(model, 3, scale=0.6)
    fused = copy.deepcopy(model.unet)
    for name, low in condition.layers.items():
        weight = fused.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight += 0.6 * (low.up.flatten(1) @ low.down.flatten(1)).reshape(weight.shape)
    original = model.unet
    x, t = draw(7, 2, 4, 8, 8), torch.tensor(300)
    with torch.no_grad(), model.prepare([text, condition], 1, True) as prepared:
        worn = model.predict(x, t, prepared.throughout())
        rows = text.embeds.flatten(0, 1)
        plain = fused(x, t, rows).sample
    assert model.unet is original
    assert torch.allclose(worn, plain, atol=1e-4 * plain.abs().max().item())


def test_a_lora_with_a_curve_dresses_the_prompts_keys_too(model: Model, text: TextCondition) -> None:
    """The prompt's keys are kept over the steps, but not past a change of a LoRA that bends them."""
    constant = run(model, [text, lora(model, 3, scale=0.5)])
    assert torch.equal(run(model, [text, lora(model, 3, scale=[0.5] * STEPS)]), constant)
    late = run(model, [text, lora(model, 3, scale=0.5, span=(0.5, 1.0))])
    assert not torch.equal(late, constant)
    assert not torch.equal(late, run(model, [text]))


def test_what_does_not_fit_is_refused(model: Model, text: TextCondition) -> None:
    with pytest.raises(WrongRequest, match="channels"):
        run(model, [text, ChannelsCondition(channels=torch.zeros(2, 1, 5, 8, 8))])
    with pytest.raises(WrongAdapter, match="ControlNet"):
        run(model, [text, ControlCondition(controlnet=nn.Linear(1, 1), image=torch.zeros(1, 3, 64, 64))])
    with pytest.raises(WrongBaseModel, match="nowhere"):
        run(model, [text, LoraCondition(layers={"nowhere": LowRankWeights(torch.zeros(1, 2), torch.zeros(2, 1))})])
    with pytest.raises(WrongRequest, match="generators"):
        run(model, [text], generator=seeds(1, 2))
    three = ControlCondition(controlnet=control(model).controlnet, image=torch.zeros(3, 3, 64, 64))
    with pytest.raises(WrongRequest, match="control picture"):
        run(model, [text, three], latents=draw(1, 2, 4, 8, 8))


def test_noise_is_drawn_for_each_picture() -> None:
    three = noise((4, 8, 8), seeds(1, 2, 3))
    assert three.shape == (3, 4, 8, 8)
    assert torch.equal(three[2:], noise((4, 8, 8), seeds(3)))
