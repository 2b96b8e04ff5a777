"""The adapters embedded with mini."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen.adapter import AdapterRequest, load_adapter
from facegen.models.base import Model


@pytest.fixture(scope="module")
def base(mini: Path) -> Model:
    return Model.from_pretrained("mini", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", ["arc2face", "instantid", "ip_adapter_faceid"])
def test_it_loads_by_name_and_two_people_differ(base: Model, mini: Path, name: str) -> None:
    if not (mini / "adapters" / name).is_dir():
        pytest.skip(f"facegen/assets/mini has no {name} yet")
    adapter = load_adapter(name, base)
    height, width = base.default_size
    control = torch.zeros(1, 3, height, width) if name == "instantid" else None
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(2, adapter.embedding_dim, generator=generator)
    request = AdapterRequest(height=height, width=width, control=control)
    noise: Tensor = torch.randn(1, *base.latent_shape(height, width), generator=generator).expand(2, -1, -1, -1)
    text: list[Any] = [base.encode_text(["photo of a person"])]
    with torch.no_grad():
        conditions = adapter.conditions_from_embeddings(people, base, request)
        with base.prepare([*text, *conditions], 2, False) as prepared:
            first, second = base.predict(noise, 600, prepared.throughout())
    assert float((first - second).abs().max()) > 1e-4
