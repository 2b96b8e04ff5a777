"""InstantID: what goes where."""

from __future__ import annotations

import builtins
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from facegen import checkpoints
from facegen.adapter import AdapterRequest, load_adapter
from facegen.adapters.instantid import InstantID, draw, moved
from facegen.conditions import ControlCondition, TokenCondition
from facegen.errors import CheckpointBroken, PackageMissing, WeightsMissing, WrongBaseModel, WrongRequest
from facegen.models.base import Model
from facegen.models.resampler import PerceiverSizes

DIM = 18
ASKED = AdapterRequest(height=64, width=64)
Photos = Callable[[int], Any]


@pytest.fixture
def instantid(fresh: Callable[[str], InstantID]) -> InstantID:
    return fresh("instantid")


def embeddings(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(2)) * 5


def test_the_embedding_goes_in_raw(instantid: InstantID) -> None:
    with torch.no_grad():
        near, far = instantid.tokens(embeddings(1)), instantid.tokens(embeddings(1) * 7)
    assert torch.equal(near[0], far[0])
    assert not torch.allclose(near[1], far[1], atol=1e-3)


def test_identitynet_sees_the_tokens_not_the_prompt(instantid: InstantID, model: Model, photos: Photos) -> None:
    stream, control = instantid.conditions([photos(1)], ASKED, model)
    assert isinstance(stream, TokenCondition)
    assert isinstance(control, ControlCondition)
    assert control.embeds is stream.tokens
    assert control.image.shape == (1, 3, 64, 64)
    assert 0 <= float(control.image.min()) < float(control.image.max()) <= 1
    assert (stream.scale, control.scale) == (0.8, 0.8)


def test_the_two_knobs_act_alone(
    instantid: InstantID, model: Model, photos: Photos, call: Callable[..., Tensor]
) -> None:
    def run(scale: float, control_scale: float) -> Tensor:
        asked = replace(ASKED, scale=scale, control_scale=control_scale)
        return call(instantid.conditions([photos(1)], asked, model))

    none, tokens, control, both = run(0, 0), run(1, 0), run(0, 1), run(1, 1)
    assert torch.equal(none, call([]))
    pictures = [none, tokens, control, both]
    for place, first in enumerate(pictures):
        assert not any(torch.allclose(first, other, atol=1e-4) for other in pictures[place + 1 :])


def test_several_embeddings_are_inputs_of_one_person(instantid: InstantID) -> None:
    with torch.no_grad():
        one, three = instantid.tokens(embeddings(1, 1)), instantid.tokens(embeddings(1, 3))
    assert one.shape == three.shape == (2, 1, 3, instantid.projector.sizes.output)


def test_points_may_be_given(instantid: InstantID, model: Model, photos: Photos) -> None:
    points = np.array([[20, 20], [40, 20], [30, 30], [22, 44], [38, 44]], np.float32)
    request = replace(ASKED, points=points)
    (_, control) = instantid.conditions([photos(1)], request, model)
    drawn = torch.from_numpy(draw(points, (64, 64))).permute(2, 0, 1)[None] / 255
    assert torch.equal(control.image, drawn)  # type: ignore[attr-defined]


class Bare:
    """An embedding without a photo."""

    embedding = np.ones(DIM, np.float32)


def test_without_a_photo_it_needs_points(instantid: InstantID, model: Model) -> None:
    with pytest.raises(WrongRequest, match="keypoints as points"):
        instantid.conditions([Bare()], ASKED, model)
    points = np.array([[20, 20], [40, 20], [30, 30], [22, 44], [38, 44]], np.float32)
    assert len(instantid.conditions([Bare()], replace(ASKED, points=points), model)) == 2


def test_points_move_with_the_photo() -> None:
    points = np.array([[10, 20], [30, 20]], np.float32)
    assert np.allclose(moved(points, (100, 100), (50, 50)), points / 2)
    assert np.allclose(moved(points, (100, 100), (200, 100)), points * 2), "the upper part shows, where the face is"
    low = np.array([[10, 180], [30, 180]], np.float32)
    assert np.allclose(moved(low, (100, 200), (100, 100)), low - [0, 100]), "the lower part shows"
    middle = np.array([[10, 100], [30, 100]], np.float32)
    assert np.allclose(moved(middle, (100, 200), (100, 100)), middle - [0, 50])


def test_drawing_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PackageMissing, match="opencv-python-headless"):
        draw(np.zeros((5, 2), np.float32), (64, 64))


def test_identitynet_must_be_there_and_whole(instantid: InstantID, model: Model, tmp_path: Path) -> None:
    path = instantid.save(tmp_path)
    weights = path / "ControlNetModel/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointBroken, match="truncated or damaged"):
        load_adapter(path, model)
    (path / "ControlNetModel/config.json").write_text("{")
    with pytest.raises(CheckpointBroken, match=r"config\.json"):
        load_adapter(path, model)
    shutil.rmtree(path / "ControlNetModel")
    with pytest.raises(WeightsMissing, match=r"beside ip-adapter\.bin"):
        load_adapter(path, model)


def test_identitynet_of_another_model(instantid: InstantID, model: Model, tmp_path: Path) -> None:
    path = instantid.save(tmp_path)
    config = path / "ControlNetModel/config.json"
    config.write_text(config.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with pytest.raises(WrongBaseModel, match="layers_per_block 2, the loaded one has 1"):
        load_adapter(path, model)


def test_a_fresh_one_has_the_asked_sizes_and_changes_nothing_by_its_controlnet(
    model: Model, call: Callable[..., Tensor]
) -> None:
    sizes = PerceiverSizes(DIM, 24, model.text_width, depth=2, heads=1)
    first = InstantID.fresh(model, DIM, sizes=sizes, queries=5, seed=3)
    again = InstantID.fresh(model, DIM, sizes=sizes, queries=5, seed=3)
    assert all(
        torch.equal(one, two)
        for one, two in zip(first.modules().parameters(), again.modules().parameters(), strict=True)
    ), "the seed says it all"
    assert first.projector.tokens == 5
    asked = AdapterRequest(scale=0.0, control_scale=1.0, control=torch.rand(1, 3, 64, 64, generator=torch.Generator()))
    with torch.no_grad():
        assert torch.equal(call(first.conditions_from_embeddings(embeddings(1), model, asked)), call([]))
    for layer in model.attention_layers:
        if layer.cross:
            assert torch.equal(first.streams.layers[layer.index].to_k.weight, layer.module.to_k.weight)
    hints = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = first.controlnet.controlnet_cond_embedding(hints)
    assert float((seen[0] - seen[1]).std()) > 0.05, "from the first step it sees which points it is given"
    with pytest.raises(WrongRequest, match="must read 18"):
        InstantID.fresh(model, DIM, sizes=replace(sizes, context=DIM + 1))


def test_gaps_and_other_layers(instantid: InstantID, model: Model, tmp_path: Path) -> None:
    file = instantid.save(tmp_path) / "ip-adapter.bin"
    tensors = checkpoints.read(file)
    last = max(int(key.split(".")[1]) for key in tensors if key.endswith("to_k_ip.weight"))
    half = {key: value for key, value in tensors.items() if not key.startswith(f"ip_adapter.{last}.")}
    checkpoints.write(file, half)
    with pytest.raises(WrongBaseModel, match=f"in the loaded one it is {last}"):
        load_adapter(tmp_path, model)
    gap = {key: value for key, value in tensors.items() if not key.startswith("ip_adapter.1.to_k")}
    checkpoints.write(file, gap)
    with pytest.raises(CheckpointBroken, match=r"lacks 1\.to_k_ip"):
        load_adapter(tmp_path, model)


def test_a_region_is_brought_to_the_layers_by_the_nearest_pixel(
    instantid: InstantID, model: Model, photos: Photos
) -> None:
    """As its full pipeline does it: no layer sees anything but 0 and 1, and none looks beyond the box."""
    region = torch.zeros(1, 64, 64)
    region[:, 21:50, 13:38] = 1
    person = instantid.conditions([photos(1)], AdapterRequest(height=64, width=64, mask=region), model)
    tokens = next(one for one in person if isinstance(one, TokenCondition))
    with model.prepare([model.encode_text(["a face"]), *person], 1, True) as prepared:
        small = prepared.mask(region, 0, (8, 8), tokens.resize)
    assert torch.equal(small.reshape(8, 8), region[0, ::8, ::8])
    with pytest.raises(WrongRequest, match="bicubic or nearest, not 'area'"):
        replace(tokens, resize="area")  # type: ignore[arg-type]
