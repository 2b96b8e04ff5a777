"""What holds for every adapter of the folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import Adapter, AdapterRequest, describe, find_adapters, load_adapter
from facegen.conditions import Condition, ControlCondition, TextCondition, TokenCondition
from facegen.errors import CheckpointBroken, FacegenError, WrongAdapter, WrongBaseModel, WrongRequest
from facegen.models.base import Model

ASKED = AdapterRequest(height=64, width=64)
Call = Callable[..., Tensor]
Fresh = Callable[[str], Adapter]
Photos = Callable[[int], Any]
DIM = 18


def embeddings(count: int = 1) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(3)) * 5


SDXL = ("photomaker",)  # families that need its two text encoders


@pytest.fixture(params=sorted(find_adapters()))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def bases(tiny_folder: Path, tiny_sdxl: Path) -> tuple[Model, Model]:
    """Stable Diffusion 1.5 and XL."""
    first, second = (Model.from_pretrained(one, device="cpu", dtype=torch.float32) for one in (tiny_folder, tiny_sdxl))
    return first, second


@pytest.fixture
def model(family: str, bases: tuple[Model, Model]) -> Model:
    """The base of the family."""
    return bases[family in SDXL]


@pytest.fixture
def other_model(family: str, bases: tuple[Model, Model]) -> Model:
    """Another one."""
    return bases[family not in SDXL]


@pytest.fixture
def call(model: Model, calls: Callable[[Model], Call]) -> Call:
    return calls(model)


@pytest.fixture
def adapter(family: str, fresh: Fresh) -> Adapter:
    return fresh(family)


@pytest.fixture
def asked(adapter: Adapter, photos: Photos) -> AdapterRequest:
    """A request with the drawing InstantID wants."""
    return adapter.complete([photos(1)], ASKED)


def checksum(*modules: nn.Module) -> list[float]:
    return [float(value.double().abs().sum()) for module in modules for value in module.state_dict().values()]


def weight_file(adapter: Adapter, folder: Path) -> Path:
    """Save and find the file that holds the adapter's own weights."""
    path = adapter.save(folder)
    return path if path.is_file() else sorted(path.rglob("*.bin"))[0]


def test_the_folder_is_the_list() -> None:
    kinds = find_adapters()
    assert {"arc2face", "instantid", "ip_adapter_faceid"} <= set(kinds)
    for name, kind in kinds.items():
        assert (kind.name, kind.__module__) == (name, f"facegen.adapters.{name}")
        assert kind.title
        assert kind.pack
        assert kind.__doc__


def test_it_changes_the_picture(adapter: Adapter, model: Model, call: Call, photos: Photos) -> None:
    base = call([])
    conditions = adapter.conditions([photos(1)], ASKED, model)
    assert all(isinstance(condition, Condition) for condition in conditions)
    assert not torch.allclose(call(conditions), base, atol=1e-3)


def test_two_people_differ(adapter: Adapter, model: Model, call: Call, photos: Photos) -> None:
    first, second = (call(adapter.conditions([photos(seed)], ASKED, model)) for seed in (1, 2))
    assert not torch.allclose(first.chunk(2)[1], second.chunk(2)[1], atol=1e-4)


def test_strength_zero_is_the_base(adapter: Adapter, model: Model, call: Call, photos: Photos) -> None:
    if adapter.writes_prompt:
        pytest.skip("it writes the prompt and has no strength")
    conditions = adapter.conditions([photos(1)], replace(ASKED, scale=0.0), model)
    assert torch.equal(call(conditions), call([]))


def test_empty_mask_has_no_effect(adapter: Adapter, model: Model, call: Call, photos: Photos) -> None:
    if adapter.writes_prompt:
        pytest.skip("it writes the prompt and has no mask")
    conditions = adapter.conditions([photos(1)], replace(ASKED, mask=torch.zeros(1, 64, 64)), model)
    assert torch.equal(call(conditions), call([]))


def test_strength_may_be_a_curve(adapter: Adapter, model: Model, photos: Photos) -> None:
    if adapter.writes_prompt:
        pytest.skip("it writes the prompt and has no strength")
    conditions = adapter.conditions([photos(1)], replace(ASKED, scale=(0.0, 1.0)), model)
    assert [condition.strength(0, 2) for condition in conditions] == [0.0] * len(conditions)
    assert [condition.strength(1, 2) for condition in conditions] == [1.0] * len(conditions)


def test_prompt_writers_refuse_strength_and_mask(adapter: Adapter, model: Model, photos: Photos) -> None:
    if adapter.name != "arc2face":
        pytest.skip("it has a strength and a span")
    for wrong in ({"scale": 0.5}, {"mask": torch.ones(1, 64, 64)}, {"span": (0.0, 0.5)}):
        with pytest.raises(WrongRequest, match="use another adapter"):
            adapter.conditions([photos(1)], replace(ASKED, **wrong), model)


def test_the_model_is_left_as_it_was(adapter: Adapter, model: Model, call: Call, photos: Photos) -> None:
    parts = (model.unet, model.vae, model.text_encoder, adapter.modules())
    before, base = checksum(*parts), call([])
    call(adapter.conditions([photos(1)], ASKED, model))
    assert checksum(*parts) == before
    assert torch.equal(call([]), base)


def test_people_in_a_batch_are_made_as_alone(adapter: Adapter, model: Model, call: Call, asked: AdapterRequest) -> None:
    people, request = embeddings(3), asked
    with torch.no_grad():
        together = call(adapter.conditions_from_embeddings(people, model, request), 3).unflatten(0, (2, 3))
        for place in range(3):
            alone = call(adapter.conditions_from_embeddings(people[place : place + 1], model, request))
            assert torch.allclose(together[:, place], alone, atol=1e-5)


def test_one_person_serves_every_picture(adapter: Adapter, model: Model, call: Call, photos: Photos) -> None:
    conditions = adapter.conditions([photos(1)], ASKED, model)
    several = call(conditions, 4).unflatten(0, (2, 4))
    assert torch.allclose(several[:, 0], several[:, 3], atol=1e-6)
    assert torch.allclose(several[:, 0], call(conditions), atol=1e-5)


def test_nobody_is_the_unconditional_half(adapter: Adapter, model: Model, asked: AdapterRequest) -> None:
    """A zero embedding goes through the projector, on both halves (Arc2Face: nothing is replaced)."""
    asked = replace(asked, prompt="a face", negative_prompt="a face")
    with torch.no_grad():
        first = adapter.conditions_from_embeddings(torch.zeros(1, DIM), model, asked)[0]
    pair = first.embeds if isinstance(first, TextCondition) else first.tokens  # type: ignore[attr-defined]
    assert torch.allclose(pair[0], pair[1], atol=1e-6)
    assert bool(pair.any())


def test_training_walks_the_same_path(adapter: Adapter, model: Model, asked: AdapterRequest) -> None:
    """Without the unconditional half the conditional one is the same, and gradients reach people and weights."""
    adapter.modules().requires_grad_(True)
    people, request = embeddings(2).requires_grad_(), asked
    conditions = adapter.conditions_from_embeddings(people, model, replace(request, guidance=False))
    whole = adapter.conditions_from_embeddings(people, model, request)
    for mine, other in zip(conditions, whole, strict=True):
        if isinstance(mine, TokenCondition) and isinstance(other, TokenCondition):
            assert torch.allclose(mine.tokens[1], other.tokens[1], atol=1e-6)
    noisy = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(1))
    text = [] if adapter.writes_prompt else [model.encode_text(["a face"])]
    with model.prepare([*text, *conditions], 2, False) as prepared:
        model.predict(noisy, torch.tensor([10, 500]), prepared.throughout()).square().mean().backward()
    assert people.grad is not None
    assert bool(people.grad.abs().sum(dim=1).gt(0).all())
    used = [name for name, one in adapter.modules().named_parameters() if one.grad is not None and bool(one.grad.any())]
    total = len(list(adapter.modules().parameters()))
    assert len(used) > 0.6 * total, "most weights take part (some of the last layer's biases need not)"


@pytest.mark.parametrize("safe", [False, True])
def test_saved_and_loaded_it_is_the_same(
    adapter: Adapter, model: Model, call: Call, tmp_path: Path, safe: bool, photos: Photos
) -> None:
    path = adapter.save(tmp_path / adapter.name, safe=safe)
    again = load_adapter(path, model)
    assert type(again) is type(adapter)
    assert again.embedding_dim == adapter.embedding_dim
    first, second = (call(one.conditions([photos(1)], ASKED, model)) for one in (adapter, again))
    assert torch.equal(first, second)
    assert not any(parameter.requires_grad for parameter in again.modules().parameters())
    told = describe(path)
    assert told.adapter == adapter.name
    assert told.tensors > 5
    assert told.sizes


def test_half_precision_files(adapter: Adapter, model: Model, call: Call, tmp_path: Path, photos: Photos) -> None:
    path = adapter.save(tmp_path / adapter.name, dtype=torch.float16)
    again = load_adapter(path, model)
    assert {parameter.dtype for parameter in again.modules().parameters()} == {torch.float32}, "as the model is"
    conditions = again.conditions([photos(1)], ASKED, model)
    assert torch.allclose(call(conditions), call(adapter.conditions([photos(1)], ASKED, model)), atol=2e-2)


def test_wrong_base_model(adapter: Adapter, model: Model, other_model: Model, tmp_path: Path) -> None:
    path = adapter.save(tmp_path / adapter.name)
    with pytest.raises(WrongBaseModel, match=r"load ") as caught:
        load_adapter(path, other_model)
    one_sentence(caught.value)


def test_truncated(adapter: Adapter, model: Model, tmp_path: Path) -> None:
    file = weight_file(adapter, tmp_path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointBroken, match="truncated or damaged") as caught:
        type(adapter).from_pretrained(tmp_path, model)
    one_sentence(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_not_a_number(adapter: Adapter, model: Model, tmp_path: Path, number: float) -> None:
    file = weight_file(adapter, tmp_path)
    tensors = checkpoints.read(file)
    next(iter(tensors.values())).view(-1)[0] = number
    checkpoints.write(file, tensors)
    with pytest.raises(CheckpointBroken, match="NaN or infinite") as caught:
        type(adapter).from_pretrained(tmp_path, model)
    one_sentence(caught.value)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_damaged_keys(adapter: Adapter, model: Model, tmp_path: Path, change: str) -> None:
    file = weight_file(adapter, tmp_path)
    tensors = checkpoints.read(file)
    last = list(tensors)[-1]
    if change == "missing":
        tensors.pop(last)
    elif change == "unknown":
        tensors[last + "_more"] = torch.zeros(1)
    else:
        key = next(key for key in tensors if key.endswith("bias"))
        tensors[key] = torch.zeros(tensors[key].numel() + 1)
    checkpoints.write(file, tensors)
    with pytest.raises(CheckpointBroken, match=r"lacks|do not belong|do not fit") as caught:
        type(adapter).from_pretrained(tmp_path, model)
    one_sentence(caught.value)


def test_a_file_of_another_family(adapter: Adapter, model: Model, tmp_path: Path, fresh: Fresh) -> None:
    other = fresh("ip_adapter_faceid" if adapter.name != "ip_adapter_faceid" else "instantid")
    path = other.save(tmp_path)
    with pytest.raises(WrongAdapter, match=other.title) as caught:
        type(adapter).from_pretrained(path, model)
    one_sentence(caught.value)


def test_another_face_pack(adapter: Adapter, model: Model, asked: AdapterRequest) -> None:
    with pytest.raises(WrongRequest, match=f"{DIM} numbers, but the face pack gives 7"):
        adapter.conditions_from_embeddings(torch.zeros(1, 7), model, asked)


def test_no_face(adapter: Adapter, model: Model) -> None:
    with pytest.raises(WrongRequest, match="at least one photo"):
        adapter.conditions([], ASKED, model)


def test_it_is_found_by_name_beside_the_model(adapter: Adapter, model: Model, tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert model.source is not None
    base.symlink_to(model.source)
    adapter.save(tmp_path / "adapters" / adapter.name)
    there: Any = Model.from_pretrained(base, device="cpu", dtype=torch.float32)
    assert type(load_adapter(adapter.name, there)) is type(adapter)


def test_an_empty_folder(adapter: Adapter, model: Model, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FacegenError, match="nothing"):
        type(adapter).from_pretrained(tmp_path / "nothing", model)


def one_sentence(error: FacegenError) -> None:
    """What happened, and how to mend it: a colon, semicolon or the like in one line that ends in a full stop."""
    text = str(error)
    assert text.endswith(".")
    assert "\n" not in text
    assert ControlCondition.__name__ not in text
