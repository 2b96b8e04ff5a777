"""The attention processor: streams, masks, gates, references; every backend gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen.attention.backends import BACKENDS, Backend, backend_by_name, math, plain, sdpa
from facegen.attention.processor import FacegenAttention, StreamGroup, merge_heads, mix, split_heads
from facegen.attention.weights import KV, LowRank, add_low_rank, layer_widths
from facegen.conditions import ReferenceCondition, TextCondition, TokenCondition
from facegen.errors import WrongBaseModel, WrongRequest
from facegen.models.base import Model
from facegen.pipelines.generate import GeneratePipeline


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(seed: int, rows: int = 2, length: int = 6) -> Tensor:
    return draw(seed, rows, 2, length, 4)


@pytest.fixture(scope="module")
def model(tiny_sd15: Path) -> Model:
    return Model.from_pretrained(tiny_sd15, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def text(model: Model) -> TextCondition:
    return model.encode_text(["a face"], ["blurry"])


def stream(model: Model, seed: int, *, count: int = 4, gated: bool = False, **more: Any) -> TokenCondition:
    layers = {}
    for layer in model.attention_layers:
        if layer.cross:
            kv = KV(model.text_width, layer.width, own_query=gated)
            for place, parameter in enumerate(kv.parameters()):
                parameter.data = draw(seed + 100 * layer.index + place, *parameter.shape) / 4
            layers[layer.index] = kv.requires_grad_(False)
    tokens = draw(seed, 2, 1, count, model.text_width)
    return TokenCondition(tokens=tokens, layers=layers, mix="gated" if gated else "add", **more)


def predict(model: Model, conditions: list[Any], **more: Any) -> Tensor:
    with torch.no_grad(), model.prepare(conditions, 1, True, **more) as prepared:
        return model.predict(draw(7, 2, 4, 8, 8), torch.tensor(400), prepared.throughout())


def test_heads_split_and_merge() -> None:
    x = draw(1, 2, 5, 12)
    assert split_heads(x, 3).shape == (2, 3, 5, 4)
    assert torch.equal(merge_heads(split_heads(x, 3)), x)


@pytest.mark.parametrize("backend", [sdpa, plain])
@pytest.mark.parametrize("bias", [None, draw(5, 6, 9)])
def test_backends_agree(backend: Backend, bias: Tensor | None) -> None:
    q, k, v = heads(1), heads(2, length=9), heads(3, length=9)
    assert torch.allclose(backend(q, k, v, bias), math(q, k, v, bias), atol=1e-6)


def test_plain_attention_has_the_gradients_of_math() -> None:
    given = heads(4).double()
    found = []
    for backend in (plain, math):
        inputs = [x.double().requires_grad_() for x in (heads(1), heads(2, length=9), heads(3, length=9))]
        backend(*inputs, None).backward(given)
        found.append([x.grad for x in inputs])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)  # plain's softmax is in float32


def test_a_pipeline_takes_the_backend_asked_for(tiny_sd15: Path) -> None:
    pipe = GeneratePipeline.from_pretrained(tiny_sd15, device="cpu", dtype="float32", attention="math")
    assert pipe.model.backend is BACKENDS["math"]
    with pytest.raises(WrongRequest, match="sdpa"):
        GeneratePipeline.from_pretrained(tiny_sd15, attention="flash")


def test_unknown_backends_are_refused() -> None:
    assert backend_by_name("math") is math
    assert set(BACKENDS) == {"sdpa", "math", "plain", "xformers", "triton"}
    with pytest.raises(WrongRequest, match="sdpa"):
        backend_by_name("flash9000")


def test_streams_are_added_before_the_output_projection() -> None:
    q, text = heads(1), (heads(2, length=7), heads(3, length=7))
    key, value, mask = heads(4, length=3), heads(5, length=3), torch.rand(1, 6, 1, generator=torch.Generator())
    group = StreamGroup(key, value, torch.tensor([0.5]), (mask,))
    expected = merge_heads(sdpa(q, *text)) + 0.5 * merge_heads(sdpa(q, key, value)) * mask
    assert torch.allclose(mix(q, text, [group], sdpa), expected, atol=1e-6)


def test_a_batch_of_streams_is_the_streams_one_by_one() -> None:
    q, text = heads(1), (heads(2, length=7), heads(3, length=7))
    parts = [(heads(10 + i, length=3), heads(20 + i, length=3)) for i in range(3)]
    alone = [StreamGroup(k, v, torch.tensor([0.1 * i + 0.2]), (None,)) for i, (k, v) in enumerate(parts)]
    together = StreamGroup(
        torch.cat([k for k, _ in parts]),
        torch.cat([v for _, v in parts]),
        torch.tensor([0.2, 0.3, 0.4]),
        (None, None, None),
    )
    assert torch.equal(mix(q, text, alone, sdpa), mix(q, text, [together], sdpa))


def test_a_gated_stream_asks_with_the_text_attentions_output() -> None:
    """W+ adapter: h + scale·attn(to_q(h), k, v)."""
    q, text = heads(1), (heads(2, length=7), heads(3, length=7))
    key, value, to_q = heads(4, length=3), heads(5, length=3), draw(6, 8, 8)
    h = merge_heads(sdpa(q, *text))
    expected = h + 0.8 * merge_heads(sdpa(split_heads(h @ to_q.T, 2), key, value))
    got = mix(q, text, [StreamGroup(key, value, torch.tensor([0.8]), (None,), to_q)], sdpa)
    assert torch.allclose(got, expected, atol=1e-6)


def test_low_rank_pairs_are_summed() -> None:
    low = LowRank(6, 5, 2, gain=0.5)
    low.up.weight.data = draw(1, 5, 2)
    x, base = draw(2, 3, 6), draw(3, 3, 5)
    assert torch.allclose(add_low_rank(x, base, (low.pair(), low.pair())), base + 2 * low(x), atol=1e-6)
    assert add_low_rank(x, base, ()) is base


def test_layers_are_counted_mid_block_last(model: Model) -> None:
    indices = [layer.index for layer in model.attention_layers]
    assert indices == list(range(len(indices)))
    assert [layer.cross for layer in model.attention_layers] == [bool(i % 2) for i in indices]
    assert model.attention_layers[-1].name.startswith("mid_block")
    names = ["down_blocks.0.a", "down_blocks.1.a", "up_blocks.0.a", "up_blocks.1.a", "mid_block.a"]
    assert layer_widths(names, (320, 640)) == [320, 640, 640, 320, 640]


def test_the_processor_is_set_once_and_is_plain_without_a_context(model: Model, text: TextCondition) -> None:
    assert all(isinstance(p, FacegenAttention) for p in model.unet.attn_processors.values())
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    stock: Any = UNet2DConditionModel.from_config(model.unet.config)
    stock.load_state_dict(model.unet.state_dict())
    x, rows = draw(7, 2, 4, 8, 8), text.embeds.flatten(0, 1)
    with torch.no_grad():
        assert torch.equal(stock(x, 400, rows).sample, model.unet(x, 400, rows).sample)
        assert torch.equal(stock(x, 400, rows).sample, predict(model, [text]))


def test_scale_zero_and_empty_masks_change_nothing(model: Model, text: TextCondition) -> None:
    plain = predict(model, [text])
    assert torch.equal(predict(model, [text, stream(model, 1, scale=0.0)]), plain)
    assert torch.equal(predict(model, [text, stream(model, 1, mask=torch.zeros(1, 64, 64))]), plain)
    assert not torch.allclose(predict(model, [text, stream(model, 1)]), plain, atol=1e-3)


def test_a_full_mask_is_no_mask(model: Model, text: TextCondition) -> None:
    whole = predict(model, [text, stream(model, 1, mask=torch.ones(1, 64, 64))])
    assert torch.allclose(whole, predict(model, [text, stream(model, 1)]), atol=1e-5)


def test_streams_of_all_kinds_together(model: Model, text: TextCondition) -> None:
    """Batched, of another length, gated, masked: as the explicit softmax gives it, and in any grouping."""
    streams = [
        stream(model, 1, scale=0.5),
        stream(model, 2, scale=0.7, mask=torch.ones(1, 64, 64)),
        stream(model, 3, count=7),
        stream(model, 4, gated=True, scale=0.3),
    ]
    usual = predict(model, [text, *streams])
    assert torch.allclose(usual, predict(model, [text, *streams], backend=math), atol=2e-5)
    order = [streams[2], streams[0], streams[3], streams[1]]
    assert torch.allclose(usual, predict(model, [text, *order]), atol=2e-5)


def test_adapters_of_another_model_are_refused(model: Model, text: TextCondition) -> None:
    good = stream(model, 1)
    elsewhere = TokenCondition(tokens=good.tokens, layers={139: good.layers[1]})
    with pytest.raises(WrongBaseModel, match="139"):
        predict(model, [text, elsewhere])
    wide = TokenCondition(tokens=torch.zeros(2, 1, 4, 99), layers=good.layers)
    with pytest.raises(WrongBaseModel, match="channels"):
        predict(model, [text, wide])
    many = TokenCondition(tokens=good.tokens.expand(2, 3, -1, -1), layers=good.layers)
    with pytest.raises(WrongRequest, match="3 pictures"):
        predict(model, [text, many])


def test_a_reference_of_the_picture_itself_changes_nothing(model: Model, text: TextCondition) -> None:
    """Keys and values twice over give the same attention; at a lower weight, or masked, they still do."""
    x = draw(7, 1, 4, 8, 8)
    with torch.no_grad():
        states = model.reference_states(x, 400, text)
        first = min(states)
        assert states[first].shape[:2] == (2, 1)

        def with_reference(**more: Any) -> Tensor:
            reference = ReferenceCondition(states={first: states[first]}, **more)
            with model.prepare([text, reference], 1, True) as prepared:
                return model.predict(torch.cat([x, x]), torch.tensor(400), prepared.throughout())

        with model.prepare([text], 1, True) as prepared:
            plain = model.predict(torch.cat([x, x]), torch.tensor(400), prepared.throughout())
        assert torch.allclose(with_reference(), plain, atol=1e-5)
        assert torch.allclose(with_reference(scale=0.3), plain, atol=1e-5)
        half = torch.zeros(1, 64, 64)
        half[..., :32] = 1
        assert torch.allclose(with_reference(mask=half), plain, atol=1e-5)


def test_a_reference_of_another_picture_is_seen_inside_its_mask(model: Model, text: TextCondition) -> None:
    with torch.no_grad():
        states = model.reference_states(draw(8, 1, 4, 8, 8), 400, text)
    plain = predict(model, [text])
    seen = predict(model, [text, ReferenceCondition(states=states)])
    assert not torch.allclose(seen, plain, atol=1e-3)
    nowhere = ReferenceCondition(states=states, mask=torch.zeros(1, 64, 64))
    assert torch.equal(predict(model, [text, nowhere]), plain)
    weak = predict(model, [text, ReferenceCondition(states=states, scale=1e-4)])
    assert (weak - plain).abs().max() < 0.05 * (seen - plain).abs().max()


def test_gradients_reach_tokens_and_weights(model: Model) -> None:
    """Training walks the same path: tokens, key and value weights, prompt embeddings, UNet weights."""
    text = TextCondition(embeds=model.encode_text(["a face"]).embeds.detach().requires_grad_())
    condition = stream(model, 1)
    tokens = condition.tokens.clone().requires_grad_()
    for kv in condition.layers.values():
        kv.requires_grad_(True)
    weight = next(model.unet.parameters())
    weight.requires_grad_(True)
    try:
        trained = TokenCondition(tokens=tokens, layers=condition.layers)
        prepared = model.prepare([text, trained], 2, False)
        steps = torch.tensor([10, 700])
        model.predict(draw(7, 2, 4, 8, 8), steps, prepared.throughout()).pow(2).mean().backward()
        found = [tokens.grad, text.embeds.grad, weight.grad]
        found += [kv.to_k.weight.grad for kv in condition.layers.values()]
        found += [kv.to_v.weight.grad for kv in condition.layers.values()]
        assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in found)
        assert tokens.grad is not None
        assert tokens.grad[0].abs().sum() == 0  # without guidance only the conditional half is seen
    finally:
        weight.requires_grad_(False)
        weight.grad = None


def test_the_graph_has_no_breaks_and_strengths_do_not_recompile(model: Model, text: TextCondition) -> None:
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    eager = [predict(model, [text, stream(model, 1, scale=s)]) for s in (0.9, 0.4)]
    original = model.unet.forward
    try:
        model.unet.forward = torch.compile(original, backend=count, fullgraph=True, dynamic=False)
        compiled = [predict(model, [text, stream(model, 1, scale=s)]) for s in (0.9, 0.4)]
    finally:
        model.unet.forward = original
        torch.compiler.reset()
    assert len(graphs) == 1
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
