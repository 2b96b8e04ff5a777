"""FaceChain-FACT: where its tokens come in, its file, and several photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facegen import checkpoints
from facegen.adapter import AdapterRequest, load_adapter
from facegen.adapters.facechain_fact import FaceChainFACT
from facegen.attention.weights import GatedSelf
from facegen.conditions import TokenCondition
from facegen.errors import CheckpointBroken, WrongBaseModel
from facegen.models.base import Model
from facegen.models.transface import TransFace

DIM = 18
ASKED = AdapterRequest(height=64, width=64)
Call = Callable[..., Tensor]


@pytest.fixture
def fact(fresh: Callable[[str], FaceChainFACT]) -> FaceChainFACT:
    adapter = fresh("facechain_fact")
    with torch.no_grad():
        for weights in adapter.layers.values():
            weights.alpha_attn.fill_(0.7)
            weights.alpha_dense.fill_(-0.9)
    return adapter


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(4))


class Slow(nn.Module):
    """The published arithmetic in the place of a block's second norm and attention, written down plainly."""

    def __init__(self, weights: GatedSelf, norm: nn.Module, attention: Any, tokens: Tensor, scale: float) -> None:
        super().__init__()
        self.weights, self.norm, self.attention, self.tokens, self.scale = weights, norm, attention, tokens, scale

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        w, heads = self.weights, self.attention.heads
        face = w.linear(self.tokens)
        both = w.norm1(torch.cat([x, face], dim=1))
        query, key, value = (
            p(both).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (w.attn.to_q, w.attn.to_k, w.attn.to_v)
        )
        weighed = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ value
        found = w.attn.to_out(weighed.transpose(1, 2).flatten(2))[:, : x.shape[1]]
        moved = x + self.scale * torch.tanh(w.alpha_attn) * found
        inside, gate = w.ff.net[0].proj(w.norm2(moved)).chunk(2, dim=-1)  # type: ignore[operator]
        moved = moved + self.scale * torch.tanh(w.alpha_dense) * w.ff.net[2](inside * F.gelu(gate))
        out: Tensor = self.attention(self.norm(moved), **more) + moved - x
        return out


@pytest.mark.parametrize("own_norm", [False, True])
def test_the_tokens_act_ahead_of_the_text(fact: FaceChainFACT, model: Model, call: Call, own_norm: bool) -> None:
    """Against the published order: raw state in, gated attention, gated feed-forward, norm, text attention."""
    if own_norm:
        for weights in fact.layers.values():
            weights.ln = nn.LayerNorm(weights.sizes[1])
            nn.init.normal_(weights.ln.weight, generator=torch.Generator().manual_seed(1))
    (condition,) = fact.conditions_from_embeddings(features(1, 5), model)
    assert isinstance(condition, TokenCondition)
    with torch.no_grad():
        got = call([condition])
        blocks = []
        for layer in model.attention_layers:
            if layer.cross:
                block = cast(Any, model.unet.get_submodule(layer.name.removesuffix(".attn2.processor")))
                blocks.append((block, block.norm2, block.attn2))
                weights = fact.layers[layer.index]
                norm = weights.ln or block.norm2
                block.attn2 = Slow(weights, norm, block.attn2, condition.tokens[:, 0], fact.strength)
                block.norm2 = nn.Identity()
        try:
            wanted = call([])
        finally:
            for block, norm, attention in blocks:
                block.norm2, block.attn2 = norm, attention
    assert torch.allclose(got, wanted, atol=1e-5)
    assert not torch.allclose(got, call([]), atol=1e-3)


def test_the_hooks_are_gone_afterwards(fact: FaceChainFACT, model: Model, call: Call) -> None:
    call(fact.conditions_from_embeddings(features(1, 5), model))
    assert not any(module._forward_pre_hooks for module in model.unet.modules())


def test_two_people_in_two_regions_in_any_order(fact: FaceChainFACT, model: Model, call: Call) -> None:
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    people = [
        fact.conditions_from_embeddings(one[None], model, replace(ASKED, mask=mask))[0]
        for one, mask in zip(features(2, 5), (left, 1 - left), strict=True)
    ]
    both = call(people)
    assert torch.allclose(both, call(people[::-1]), atol=1e-5)
    for alone in people:
        assert not torch.allclose(both, call([alone]), atol=1e-4)


def test_photos_stand_side_by_side(fact: FaceChainFACT, model: Model) -> None:
    photos = features(1, 3, 5)
    together = fact.tokens(photos)
    assert together.shape[2] == 3 * fact.projector.tokens
    alone = torch.cat([fact.tokens(photos[:, place]) for place in range(3)], dim=2)
    assert torch.allclose(together, alone, atol=1e-6)


def test_the_other_half(fact: FaceChainFACT) -> None:
    """It sees zeros through the resampler, or the face itself."""
    uncond, cond = fact.tokens(features(2, 3, 5))
    nothing = fact.projector(torch.zeros(1, 5, DIM))
    assert torch.allclose(uncond, nothing.repeat(2, 3, 1), atol=1e-6)
    fact.cfg_face = False
    again = fact.tokens(features(2, 3, 5))
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[1], cond)


def test_names_in_the_file(fact: FaceChainFACT, model: Model, tmp_path: Path) -> None:
    keys = checkpoints.shapes(fact.save(tmp_path))
    place = "mid_block.attentions.0.transformer_blocks.0.attn2.processor"
    wanted = (
        "alpha_attn",
        "linear.bias",
        "attn.to_q.weight",
        "attn.to_out.0.bias",
        "ff.net.0.proj.weight",
        "norm2.bias",
    )
    assert {f"{place}.{name}" for name in wanted} < keys.keys()
    assert keys[f"{place}.alpha_dense"] == ()
    assert "local_fac_prj.layers.0.0.to_kv.weight" in keys
    assert not any(".attn1." in key for key in keys)


def test_a_layer_of_another_model(fact: FaceChainFACT, model: Model, tmp_path: Path) -> None:
    file = fact.save(tmp_path)
    tensors = checkpoints.read(file)
    key = next(key for key in tensors if key.endswith("alpha_attn"))
    tensors["down_blocks.7" + key.removeprefix("down_blocks.0")] = tensors[key]
    checkpoints.write(file, tensors)
    with pytest.raises(WrongBaseModel, match=r"has the key down_blocks\.7"):
        load_adapter(file, model)


@pytest.fixture(scope="module")
def transface() -> TransFace:
    net = TransFace(DIM - 2, patch=28, depth=2, inner=8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return net.eval()


def test_the_recogniser_beside_it(
    transface: TransFace, model: Model, tmp_path: Path, photos: Callable[[int], Any], fresh: Callable[[str], Any]
) -> None:
    """Its tokens are those behind the last norm; gate and head of its file are not needed."""
    from facegen.models.resampler import PerceiverSizes

    width = model.text_width
    sizes = PerceiverSizes(DIM - 2, 24, width, depth=1, heads=1)
    FaceChainFACT.fresh(model, DIM - 2, sizes=sizes, queries=3).save(tmp_path)
    head = {
        "senet.0.weight": torch.ones(2, 2),
        "feature.1.num_batches_tracked": torch.tensor(3),
        "mask_token": torch.ones(1),
    }
    checkpoints.write(tmp_path / "ms1mv2_model_TransFace_S.pt", {**transface.state_dict(), **head})
    adapter = load_adapter(tmp_path, model)
    assert isinstance(adapter, FaceChainFACT)
    found = adapter.gather([photos(1), photos(2)])
    assert found.shape == (1, 2, 16, DIM - 2)
    assert adapter.conditions([photos(1)], ASKED, model)[0].tokens.shape == (2, 1, 3, width)  # type: ignore[attr-defined]
    from facegen.face.align import norm_crop

    crop = np.asarray(norm_crop(photos(1).image, photos(1).points))
    with torch.no_grad():
        wanted = transface((torch.tensor(crop).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5)
    assert torch.allclose(found[0, :1], wanted, atol=1e-5)
    fresh("facechain_fact").save(tmp_path)
    with pytest.raises(CheckpointBroken, match="reads tokens 18 wide"):
        load_adapter(tmp_path, model)
