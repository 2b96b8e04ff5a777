"""Whole runs under every plan of memory, on a second "device".

`cpu:0` is the CPU by another name: tensors there are never where a plan wants them, so every loan is really made and
taken back, with real numbers. That no tensor stays behind on the wrong device is checked with tensors that have only a
shape and a device, one of which is `cuda:0`, wherever the tests run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facegen.conditions import Condition, ControlCondition, LoraCondition, LowRankWeights
from facegen.denoise import Guidance, denoise
from facegen.errors import NotEnoughMemory, WrongRequest
from facegen.lending import by_layer, lent, units
from facegen.memory import Memory, MemoryPlan, Need, fitting, needed, weight
from facegen.models.base import Model
from facegen.models.working import working
from facegen.schedulers import build, start

SECOND = torch.device("cpu:0")


class Net(nn.Module):
    """A parameter of its own beside a layer, tied weights, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2))
        self.own = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.ones(2))
        self.inner[1].weight = self.inner[0].weight

    def forward(self, x: Tensor) -> Tensor:
        if self.own.device.type == "cpu" and x.device.type == "meta":
            raise AssertionError("weights and input on two devices")
        return self.inner(x) * self.own * self.get_buffer("table")


def test_weights_are_lent_and_come_back() -> None:
    net, meta = Net(), torch.device("meta")
    tensors = {name: id(one) for name, one in (*net.named_parameters(), *net.named_buffers())}
    numbers = {name: one.clone() for name, one in net.state_dict().items()}
    with lent(net, meta):
        assert {one.device for one in net.parameters()} == {meta}
        assert net.get_buffer("table").device == meta
        assert net.inner[0].weight is net.inner[1].weight
        assert net(torch.zeros(1, 2, device=meta)).device == meta
        with lent(net, meta):
            pass
        assert net.own.device == meta, "a loan inside a loan takes nothing back"
    with pytest.raises(ZeroDivisionError), lent(net, meta):
        _ = 1 / 0
    assert {name: id(one) for name, one in (*net.named_parameters(), *net.named_buffers())} == tensors
    assert all(torch.equal(one, numbers[name]) for name, one in net.state_dict().items())


def test_layers_are_lent_for_their_call() -> None:
    net = nn.Sequential(nn.Linear(2, 2), Net(), nn.ReLU())
    assert [type(one) for one in units(net)] == [nn.Linear, Net]
    seen: list[set[str]] = []
    net[1].inner[0].register_forward_hook(
        lambda module, args, output: seen.append({str(one.device) for one in net.parameters()})
    )
    handles = by_layer(net, torch.device("meta"))
    assert net(torch.zeros(1, 2)).device.type == "meta"
    assert seen == [{"cpu", "meta"}], "one unit at a time"
    assert {str(one.device) for one in net.parameters()} == {"cpu"}
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 3))
    assert {str(one.device) for one in net.parameters()} == {"cpu"}
    for handle in handles:
        handle.remove()
    assert net(torch.zeros(1, 2)).device.type == "cpu"


def load(folder: Path, **plan: Any) -> Model:
    """A model whose device is the second one, under a plan; without one on the CPU as ever."""
    model = Model.from_pretrained(folder, dtype=torch.float32, device="cpu")
    if plan:
        model.memory = Memory(MemoryPlan(SECOND, torch.float32, **plan))
        for network in (model.unet, model.vae, *model.text_encoders().values()):
            model.memory.place(network)
    return model


def control(model: Model) -> Condition:
    from diffusers.models.controlnets.controlnet import ControlNetModel

    torch.manual_seed(0)
    net = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.memory.place(net)
    return ControlCondition(controlnet=net, image=torch.rand(1, 3, 64, 64, generator=generator))


def lora(model: Model) -> LoraCondition:
    layer = next(one for one in model.attention_layers if not one.cross)
    generator = torch.Generator().manual_seed(6)
    low = LowRankWeights(*(torch.randn(*shape, generator=generator) for shape in ((2, layer.width), (layer.width, 2))))
    return LoraCondition(layers={layer.name.removesuffix("processor") + "to_q": low})


def picture(model: Model) -> tuple[Tensor, Tensor]:
    """(latents, pixels) of a run with a ControlNet and a LoRA."""
    text = model.encode_text(["a face"], "blurry")
    scheduler = build("ddim", model.scheduler_config, 2)
    begin = start(scheduler, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)))
    latents = denoise(model, begin, scheduler, [text, control(model), lora(model)], Guidance(4.0))
    again = model.encode_image(model.decode(latents))
    return latents, model.decode(again)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_plan_changes_no_bit(folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import facegen.lending

    plain = load(folders[family])
    expected = picture(plain)
    copies: list[Tensor] = []
    copy = facegen.lending._copy
    monkeypatch.setattr(facegen.lending, "_copy", lambda value, device: copies.append(value) or copy(value, device))
    for plan in ({"offload": "model"}, {"offload": "sequential"}, {"offload": "model", "slicing": True}):
        model = load(folders[family], **plan)
        ids = {name: id(one) for name, one in model.unet.named_parameters()}
        copies.clear()
        found = picture(model)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        networks = (model.unet, model.vae, *model.text_encoders().values())
        lent_ids = {id(one) for one in copies}
        for network in networks:
            assert {id(one) for one in network.parameters()} & lent_ids, "a network that was never lent"
        assert {name: id(one) for name, one in model.unet.named_parameters()} == ids
    copies.clear()
    picture(plain)
    assert not copies


def test_a_picture_in_tiles_is_nearly_the_same(folders: dict[str, Path]) -> None:
    """At the model's own size there is one tile, and tiling changes nothing; above it the seams are blended."""
    plain = load(folders["sd15"])
    tiled = Model.from_pretrained(folders["sd15"], dtype=torch.float32, device="cpu", tiling=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(plain.decode(latents), tiled.decode(latents))
    large = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    assert plain.decode(large).shape == tiled.decode(large).shape
    assert not torch.equal(plain.decode(large), tiled.decode(large))


NEEDS = {"text": Need(100, 20, 5), "unet": Need(1000, 50, 200), "vae": Need(80, 10, 400)}


def test_the_plan_follows_the_memory_that_is_free() -> None:
    assert needed(NEEDS, "none") == 1180 + 400
    assert needed(NEEDS, "model") == 1200
    assert needed(NEEDS, "sequential") == 410
    assert [fitting(NEEDS, free, "it") for free in (2000, 1500, 500)] == ["none", "model", "sequential"]
    with pytest.raises(NotEnoughMemory, match=r"at least 0.0 GiB.*half precision"):
        fitting(NEEDS, 400, "the model on cuda")
    for free, offload, tiling in ((10_000, "none", False), (3_000, "none", True), (1_500, "model", True)):
        memory = Memory(MemoryPlan(torch.device("cuda")), auto=True, free=lambda device, free=free: free)
        memory.choose(NEEDS)
        assert (memory.offload, memory.tiling) == (offload, tiling)
    unknown = Memory(MemoryPlan(torch.device("cpu")), auto=True)
    unknown.choose(NEEDS)
    assert unknown.offload == "none"
    asked = Memory(MemoryPlan(torch.device("cuda")), free=lambda device: 0)
    asked.choose(NEEDS)
    assert asked.offload == "none", "what was asked for is not overruled"


def test_what_is_loaded_later_makes_room() -> None:
    base, more = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    left = [100_000]
    memory = Memory(MemoryPlan(SECOND), auto=True, free=lambda device: left[0])
    memory.place(base)
    assert memory.offload == "none"
    left[0] = 40_000
    memory.keep(more)
    assert (memory.offload, memory.waiting) == ("none", SECOND)
    left[0] = 17_000
    third = nn.Linear(64, 64, bias=False)
    memory.keep(third)
    assert memory.offload == "sequential"
    assert weight(third) == 64 * 64 * 4
    assert memory.keeps(third)
    assert not memory.keeps(base)
    seen: list[int] = []
    base.register_forward_pre_hook(lambda module, args: seen.append(1))
    assert base(torch.ones(1, 64)).shape == (1, 64)
    assert seen


def test_a_device_that_runs_full_is_a_sentence() -> None:
    with pytest.raises(NotEnoughMemory, match="memory='model'"), MemoryPlan(torch.device("cpu")).using():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(NotEnoughMemory, match="tiling"), MemoryPlan(SECOND, offload="sequential").using():
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_needs_are_read_off_a_network(folders: dict[str, Path]) -> None:
    model = load(folders["sd15"])
    need = Need.of(model.unet, working(model.unet))
    assert need.weights == sum(one.numel() * 4 for one in model.unet.parameters())
    assert 0 < need.layer < need.weights
    assert need.work > 0
    assert working(model.vae) > working(model.text_encoder) == 0


def test_the_plan_is_a_field_and_a_flag(folders: dict[str, Path]) -> None:
    from facegen.loading import Loading
    from facegen.pipelines.generate import GeneratePipeline
    from facegen.request import add_flags, from_flags

    assert Loading().memory == "auto"
    parser = argparse.ArgumentParser()
    add_flags(parser, Loading)
    for flag in ("--memory", "--offload"):
        assert from_flags(Loading, parser.parse_args([flag, "sequential"])).memory == "sequential"
    with pytest.raises(WrongRequest, match="memory cannot be 'sometimes'"):
        Loading(memory="sometimes")
    pipe = GeneratePipeline.from_pretrained(folders["sd15"], device="cpu", offload="model")
    assert (pipe.model.memory.offload, pipe.model.memory.auto) == ("model", False)
    chosen = GeneratePipeline.from_pretrained(folders["sd15"], device="cpu")
    assert (chosen.model.memory.offload, chosen.model.memory.auto) == ("none", True)
