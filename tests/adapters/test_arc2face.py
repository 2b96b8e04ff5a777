"""Arc2Face: which token is replaced, by what, and what the prompt becomes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen import checkpoints
from facegen.adapter import AdapterRequest, load_adapter
from facegen.adapters.arc2face import PROMPT, Arc2Face, Expression, Parts
from facegen.conditions import LoraCondition, LowRankWeights, TextCondition
from facegen.errors import WeightsMissing, WrongBaseModel, WrongRequest
from facegen.models.base import Model
from facegen.models.projections import FaceProjection, LinearProjection, ProjectionSizes
from facegen.models.streams import Streams

DIM = 18


@pytest.fixture
def arc2face(model: Model) -> Arc2Face:
    adapter = Arc2Face.fresh(model, DIM)
    adapter.encoder.eval()
    return adapter


def embeddings(count: int = 1) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(2)) * 20


def text(adapter: Arc2Face, model: Model, people: Tensor, request: AdapterRequest | None = None) -> TextCondition:
    with torch.no_grad():
        (condition,) = adapter.conditions_from_embeddings(people, model, request)
    assert isinstance(condition, TextCondition)
    return condition


def test_the_embedding_takes_the_place_of_the_token(arc2face: Arc2Face, model: Model) -> None:
    """By hand: look up, replace, positions, causal mask, final LayerNorm."""
    person = embeddings()
    ids = model.tokenize([PROMPT])
    assert int((ids == arc2face.token).sum()) == 1
    encoder = copy.deepcopy(arc2face.encoder)
    with torch.no_grad():
        row = encoder.get_input_embeddings().weight[arc2face.token]
        row.zero_()
        row[:DIM] = person[0] / person[0].norm()
        wanted = encoder(ids).last_hidden_state
    assert torch.allclose(text(arc2face, model, person).embeds[1], wanted, atol=1e-6)


def test_states_before_the_token_do_not_depend_on_the_face(arc2face: Arc2Face, model: Model) -> None:
    first, second = text(arc2face, model, embeddings(2)).embeds[1]
    place = int((model.tokenize([PROMPT])[0] == arc2face.token).nonzero()[0])
    assert torch.equal(first[:place], second[:place])
    assert not torch.allclose(first[place:], second[place:], atol=1e-4)


def test_the_length_of_the_embedding_does_not_matter(arc2face: Arc2Face, model: Model) -> None:
    person = embeddings()
    near, far = text(arc2face, model, person).embeds, text(arc2face, model, person * 7).embeds
    assert torch.allclose(near, far, atol=1e-6)


def test_the_unconditional_half_is_read_by_the_same_encoder(arc2face: Arc2Face, model: Model) -> None:
    with torch.no_grad():
        arc2face.encoder.final_layer_norm.bias += 1.0
        wanted = arc2face.encoder(model.tokenize(["blurry"])).last_hidden_state
    request = AdapterRequest(negative_prompt="blurry")
    assert torch.allclose(text(arc2face, model, embeddings(), request).embeds[0], wanted, atol=1e-6)


def test_own_prompts_for_each(arc2face: Arc2Face, model: Model) -> None:
    people = embeddings(2)
    request = AdapterRequest(prompt=["with red hair", "smiling"])
    both = text(arc2face, model, people, request).embeds
    assert both.shape[:2] == (2, 2)
    alone = text(arc2face, model, people[1:], AdapterRequest(prompt="smiling")).embeds
    assert torch.allclose(both[1, 1:], alone[1], atol=1e-6)
    one_face = text(arc2face, model, people[:1], request).embeds
    assert one_face.shape[1] == 2, "one face, two prompts: two pictures"
    with pytest.raises(WrongRequest, match="2 embeddings but 3 prompts"):
        text(arc2face, model, people, AdapterRequest(prompt=["a", "b", "c"]))
    with pytest.raises(WrongRequest, match="one embedding per picture"):
        text(arc2face, model, people[None])


def test_nobody_reads_the_prompt_as_it_is(arc2face: Arc2Face, model: Model) -> None:
    """In training a dropped person leaves a plain caption, and a dropped caption the empty prompt."""
    people = torch.cat([torch.zeros(2, DIM), embeddings()])
    request = AdapterRequest(prompt=["a woman with glasses", "", ""], guidance=False)
    got = text(arc2face, model, people, request).embeds[1]
    with torch.no_grad():
        plain = arc2face.encoder(model.tokenize(["a woman with glasses", ""])).last_hidden_state
    assert torch.allclose(got[:2], plain, atol=1e-6)
    assert torch.allclose(got[2:], text(arc2face, model, people[2:]).embeds[1], atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("", PROMPT),
        ("photo of a id person with red hair, smiling", "photo of a id person with red hair, smiling"),
        ("photo of a person with red hair, smiling", "photo of a id person with red hair, smiling"),
        ("a woman with red hair", "photo of a id person with red hair"),
        ("portrait of a smiling woman with glasses", "photo of a id person with glasses, smiling"),
        ("a close up portrait of a young bearded man, outside.", "photo of a id person, outside, young, bearded"),
        ("portrait, red hair", "photo of a id person, red hair"),
        ("smiling, with a hat", "photo of a id person, smiling, with a hat"),
        ("with a hat", "photo of a id person with a hat"),
        ("wearing round glasses", "photo of a id person wearing round glasses"),
        ("a person", PROMPT),
        ("portrait", PROMPT),
        ("a smiling person", "photo of a id person, smiling"),
        ("An old man in the rain", "photo of a id person in the rain, old"),
        ("red hair on a person", "photo of a id person, red hair on a person"),
    ],
)
def test_prompts_become_what_the_encoder_was_trained_with(arc2face: Arc2Face, prompt: str, phrase: str) -> None:
    assert arc2face.phrase(prompt) == phrase


def test_the_official_encoder_understands_one_prompt(model: Model, tmp_path: Path) -> None:
    path = Arc2Face.fresh(model, DIM, free_prompts=False).save(tmp_path)
    adapter = load_adapter(path, model)
    assert isinstance(adapter, Arc2Face)
    text(adapter, model, embeddings(), AdapterRequest(prompt=PROMPT))
    text(adapter, model, embeddings())
    with pytest.raises(WrongRequest, match="only understands 'photo of a id person'"):
        text(adapter, model, embeddings(), AdapterRequest(prompt="in Paris"))


def test_facts_are_kept_in_the_file(model: Model, tmp_path: Path) -> None:
    adapter = load_adapter(Arc2Face.fresh(model, DIM).save(tmp_path / "own", safe=True), model)
    assert isinstance(adapter, Arc2Face)
    assert (adapter.embedding_dim, adapter.free_prompts, adapter.unet) == (DIM, True, None)
    keys = checkpoints.shapes(tmp_path / "own/encoder/model.safetensors")
    assert all(key.startswith("text_model.") for key in keys), "as the official file spells them"
    official = copy.deepcopy(adapter)
    del official.encoder.config.face_embedding_dim, official.encoder.config.face_free_prompts
    again = load_adapter(official.save(tmp_path / "official"), model)
    assert again.embedding_dim == 512
    assert not again.free_prompts  # type: ignore[attr-defined]


def test_an_own_unet_shares_the_rest(model: Model, tmp_path: Path) -> None:
    adapter = Arc2Face.fresh(model, DIM)
    adapter.unet = copy.deepcopy(model.unet)
    with torch.no_grad():
        adapter.unet.conv_out.bias.add_(1.0)
    again = load_adapter(adapter.save(tmp_path), model)
    host = again.host(model)
    assert host is not model
    assert host.unet is not model.unet
    assert host.vae is model.vae
    assert torch.equal(host.unet.conv_out.bias, adapter.unet.conv_out.bias)
    assert load_adapter(Arc2Face.fresh(model, DIM).save(tmp_path / "none"), model).host(model) is model
    with torch.no_grad(), host.prepare(again.conditions_from_embeddings(embeddings(), host), 1, True) as prepared:
        got = host.predict(torch.zeros(2, 4, 8, 8), 10, prepared.throughout())
    assert got.shape == (2, 4, 8, 8)


def test_a_tokenizer_without_the_word(tiny_sd15: Path) -> None:
    with pytest.raises(WrongBaseModel, match="splits into 2"):
        Arc2Face.fresh(Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32), DIM)


def test_an_embedding_longer_than_a_token(model: Model) -> None:
    with pytest.raises(WrongRequest, match="does not fit into a token"):
        Arc2Face.fresh(model, 512)


def test_one_encoder_for_text_and_faces(model: Model) -> None:
    """When both are tuned as one, nothing of the encoder is copied."""
    copied = copy.deepcopy(model.text_encoder)
    assert Arc2Face.fresh(model, DIM, encoder=copied).encoder is copied
    assert not list(copied.get_input_embeddings()._forward_hooks)


def test_an_encoder_without_weights(model: Model, tmp_path: Path) -> None:
    path = Arc2Face.fresh(model, DIM).save(tmp_path)
    (path / "encoder/pytorch_model.bin").unlink()
    with pytest.raises(WeightsMissing, match="encoder"):
        Arc2Face.from_pretrained(path, model)


# --- pose, expression, reference ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Arc2Face:
    """Saved and loaded in the official layout: encoder, own UNet and all three parts, far from where they start."""
    from diffusers import ControlNetModel

    generator = torch.Generator().manual_seed(3)
    adapter = Arc2Face.fresh(model, DIM, free_prompts=False)
    adapter.unet = copy.deepcopy(model.unet)
    pose = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    streams = Streams.fresh(model, generator=generator)
    expression = Expression(FaceProjection(ProjectionSizes(55, 8, 2, model.text_width)), streams)
    for net in (pose, expression):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    low = {
        layer.name.removesuffix("processor") + part: LowRankWeights(
            torch.randn(2, layer.width, generator=generator) * 0.2,
            torch.randn(layer.width, 2, generator=generator) * 0.2,
        )
        for layer in model.attention_layers
        if not layer.cross
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    adapter.parts = Parts(pose, expression, LoraCondition(layers=low))
    folder = adapter.save(tmp_path_factory.mktemp("arc2face"))
    assert (folder / "controlnet/config.json").is_file()
    assert {"image_proj.proj.0.weight", "ip_adapter.1.to_k_ip.weight"} < checkpoints.shapes(
        folder / "exp_adapter/exp_adapter.bin"
    ).keys()
    again = load_adapter(folder, model)
    assert isinstance(again, Arc2Face)
    return again


def asked(**more: Any) -> AdapterRequest:
    generator = torch.Generator().manual_seed(5)
    given: dict[str, Tensor] = {
        "expression": torch.randn(1, 55, generator=generator),
        "normals": torch.rand(1, 3, 64, 64, generator=generator),
        "reference": torch.rand(1, 3, 64, 64, generator=generator),
    }
    chosen: dict[str, Any] = {name: given[name] for name in given if more.pop(name, True)}
    return AdapterRequest(height=64, width=64, **chosen, **more)


def seen_by(adapter: Arc2Face, model: Model, request: AdapterRequest) -> Tensor:
    host = adapter.host(model)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        conditions = adapter.conditions_from_embeddings(embeddings(), model, request)
        with host.prepare(conditions, 1, True) as prepared:
            return host.predict(sample, 300, prepared.throughout())


def test_each_part_acts_and_at_strength_zero_is_not_there(whole: Arc2Face, model: Model) -> None:
    everything = seen_by(whole, model, asked())
    for field, part in (("expression", "expression"), ("normals", "pose")):
        without = seen_by(whole, model, asked(**{field: False}))
        assert not torch.allclose(everything, without, atol=1e-4), field
        assert torch.equal(seen_by(whole, model, asked(parts={part: 0.0})), without), field
    without = seen_by(whole, model, asked(reference=False))
    unlearnt = seen_by(whole, model, asked(parts={"reference": 0.0}))
    assert not torch.allclose(everything, unlearnt, atol=1e-4), "the LoRA"
    assert not torch.allclose(unlearnt[1], without[1], atol=1e-4), "the look at the reference"
    assert torch.allclose(unlearnt[0], without[0], atol=1e-5), "which the other half does not have"


def test_the_expression_is_read_as_diffusers_reads_it(whole: Arc2Face, model: Model) -> None:
    expression = whole.parts.expression
    assert expression is not None
    assert expression.width == 55
    numbers = torch.randn(2, 55, generator=torch.Generator().manual_seed(1))
    uncond, cond = expression.tokens(numbers, guidance=True)
    projector: Any = expression.image_proj
    assert cond.shape == (2, 2, model.text_width)
    hidden = torch.nn.functional.gelu(projector.proj[0](numbers))
    wanted = projector.norm(projector.proj[2](hidden).view(2, 2, -1))
    assert torch.allclose(cond, wanted, atol=1e-6)
    nothing = projector.proj[2](torch.nn.functional.gelu(projector.proj[0].bias))
    assert torch.allclose(uncond[0], projector.norm(nothing.view(2, -1)), atol=1e-6)
    with pytest.raises(WrongRequest, match="55 numbers here, not 50"):
        expression.tokens(torch.zeros(1, 50), guidance=True)


def test_the_expression_in_one_layer(model: Model, tmp_path: Path) -> None:
    """The other layout that the file may have."""
    streams = Streams.fresh(model, generator=torch.Generator().manual_seed(1))
    linear = LinearProjection(55, 4, model.text_width)
    checkpoints.write(
        tmp_path / "exp_adapter.bin", {"image_proj": linear.state_dict(), "ip_adapter": streams.tensors()}
    )
    expression = Expression.from_file(tmp_path / "exp_adapter.bin", model)
    assert (expression.width, expression.tokens(torch.ones(1, 55), guidance=True).shape[2]) == (55, 4)


def test_parts_that_are_not_there(model: Model, arc2face: Arc2Face) -> None:
    for field, place in (("expression", "exp_adapter"), ("normals", "controlnet"), ("reference", "ref_adapter")):
        wanted = {name: name == field for name in ("expression", "normals", "reference")}
        with pytest.raises(WrongRequest, match=f"cannot be used without Arc2Face's {place}"):
            arc2face.conditions_from_embeddings(embeddings(), model, asked(**wanted))
    with pytest.raises(WrongRequest, match="has the parts pose, expression, reference, not 'smile'"):
        arc2face.conditions_from_embeddings(embeddings(), model, AdapterRequest(parts={"smile": 1.0}))
