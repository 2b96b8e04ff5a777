"""PreciseControl: what becomes of the prompt at each step, edits of the code, LoRA as a list."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from facegen import schedulers
from facegen.adapter import AdapterRequest, load_adapter
from facegen.adapters.precisecontrol import PROMPT, PreciseControl, lora_from_list, phrase, widened
from facegen.conditions import LoraCondition, TextCondition
from facegen.denoise import Guidance, denoise
from facegen.errors import CheckpointBroken, WrongBaseModel, WrongRequest
from facegen.models.base import Model

DIM = 18
ASKED = AdapterRequest(height=64, width=64)


@pytest.fixture
def precise(fresh: Callable[[str], PreciseControl]) -> PreciseControl:
    return fresh("precisecontrol")


def code(seed: int = 1) -> Tensor:
    return torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed))


def text(adapter: PreciseControl, model: Model, request: AdapterRequest = ASKED) -> TextCondition:
    condition = adapter.conditions_from_embeddings(code(), model, request)[-1]
    assert isinstance(condition, TextCondition)
    return condition


def at(condition: TextCondition, step: int) -> Tensor:
    assert condition.at is not None
    return condition.at(torch.tensor([step]))


def test_a_word_becomes_two_and_the_rest_moves_on() -> None:
    ids = torch.tensor([[0, 7, 2, 7, 4, 5]])
    embeds = torch.arange(6.0)[None, :, None]
    pairs = {7: torch.tensor([[[70.0], [71.0]]])}
    assert widened(embeds, ids, pairs).flatten().tolist() == [0, 70, 71, 2, 70, 71]
    assert torch.equal(widened(embeds, torch.zeros_like(ids), pairs), embeds)


def test_two_people(precise: PreciseControl, model: Model) -> None:
    ids = torch.tensor([[0, 7, 2, 8, 4, 5, 6]])
    embeds = torch.arange(7.0)[None, :, None]
    pairs = {7: torch.tensor([[[70.0], [71.0]]]), 8: torch.tensor([[[80.0], [81.0]]])}
    assert widened(embeds, ids, pairs).flatten().tolist() == [0, 70, 71, 2, 80, 81, 4]
    with pytest.raises(WrongRequest, match="one or two people, not for 3"):
        precise.conditions_of_people([code(), code(), code()], model)


def test_the_words_are_near_face(precise: PreciseControl, model: Model) -> None:
    """By hand: a tenth of the mapper's vectors added to the embedding of "face", then the encoder as it is."""
    prompt = "a photo of sks person"
    got = at(text(precise, model, replace(ASKED, prompt=prompt)), 300)[1]
    table = model.text_encoder.get_input_embeddings()
    ids = model.tokenize([prompt])[0]
    word = int((ids == model.tokenizer("sks", add_special_tokens=False).input_ids[0]).nonzero())
    with torch.no_grad():
        vectors = precise.mapper(code().view(1, 18, -1), torch.tensor([300]))[0]
        face = table(torch.tensor(model.tokenizer("face", add_special_tokens=False).input_ids))
        rows = table(ids)
        rows = torch.cat([rows[:word], face + 0.1 * vectors, rows[word + 1 : -1]])
        hook = table.register_forward_hook(lambda *_: rows[None])
        wanted = model.text_encoder(ids[None]).last_hidden_state
        hook.remove()
    assert torch.allclose(got, wanted, atol=1e-6)


def test_the_prompt_is_another_at_every_step(precise: PreciseControl, model: Model) -> None:
    condition = text(precise, model)
    early, late = at(condition, 900), at(condition, 10)
    assert not torch.allclose(early[1], late[1], atol=1e-4)
    assert torch.equal(early[0], late[0]), "but not for the other half"


def test_a_run_sees_the_prompt_of_each_step(precise: PreciseControl, model: Model) -> None:
    """The loop against single calls with the prompt of each step."""
    condition = text(precise, model)
    scheduler = schedulers.build("ddim", model.scheduler_config, 3)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    got = denoise(model, start, scheduler, [condition], Guidance(3.0))
    scheduler, latents = schedulers.build("ddim", model.scheduler_config, 3), start
    for step in scheduler.timesteps:
        plain = TextCondition(embeds=at(condition, int(step)))
        with torch.no_grad(), model.prepare([plain], 1, True) as prepared:
            u, c = model.predict(torch.cat([latents] * 2), step, prepared.throughout()).chunk(2)
        latents = scheduler.step(u + 3.0 * (c - u), step, latents).prev_sample
    assert torch.allclose(got, latents, atol=1e-4)


def test_prompts(precise: PreciseControl, model: Model) -> None:
    assert phrase("") == PROMPT
    assert phrase("sks person on the moon") == "sks person on the moon"
    assert phrase("in the rain") == f"{PROMPT}, in the rain"
    two = precise.conditions_from_embeddings(code(), model, replace(ASKED, prompt=["one", "two"]))[0]
    assert two.embeds.shape[1] == 2  # type: ignore[attr-defined]
    with pytest.raises(WrongRequest, match="2 embeddings but 3 prompts"):
        precise.conditions_from_embeddings(torch.ones(2, DIM), model, replace(ASKED, prompt=["a"] * 3))
    with pytest.raises(WrongRequest, match="neither strength nor mask"):
        precise.conditions_from_embeddings(code(), model, replace(ASKED, scale=0.5))


def test_the_first_steps_may_be_without_the_person(precise: PreciseControl, model: Model) -> None:
    request = replace(ASKED, prompt="a photo of sks person", span=(0.2, 1.0))
    plain, own = precise.conditions_from_embeddings(code(), model, request)
    assert isinstance(plain, TextCondition)
    assert torch.equal(plain.embeds, model.encode_text(["a photo of person"], [""]).embeds)
    assert [own.strength(step, 50) for step in (9, 10)] == [0.0, 1.0]


def test_edits(precise: PreciseControl, model: Model, tmp_path: Path) -> None:
    rows = torch.randn(18, 1, generator=torch.Generator().manual_seed(5))
    path = precise.save(tmp_path)
    (tmp_path / "all_delta_w_dict.json").write_text(json.dumps({"smile": rows.tolist(), "age70": rows.tolist()}))
    again = load_adapter(path, model)
    assert isinstance(again, PreciseControl)
    smiling = text(again, model, replace(ASKED, edits={"smile": 1.5}))
    (moved,) = again.conditions_from_embeddings(code() + 1.5 * rows.flatten(), model, ASKED)
    assert torch.allclose(smiling.embeds, moved.embeds, atol=1e-6)  # type: ignore[attr-defined]
    with pytest.raises(WrongRequest, match=r"no edit direction called 'smil'.*did you mean 'smile'"):
        text(again, model, replace(ASKED, edits={"smil": 1.0}))


def listed(model: Model, *, gates_only: bool = False) -> tuple[list[Tensor], Any]:
    """LoRA as the official trainer lists it, and the UNet with it merged at 0.2."""
    generator = torch.Generator().manual_seed(6)
    merged: Any = copy.deepcopy(model.unet)
    blocks = [name for name, part in merged.named_modules() if type(part).__name__ == "BasicTransformerBlock"]
    tensors: list[Tensor] = []
    for start in ("down", "mid", "up"):
        for block in (name for name in blocks if name.startswith(start)):
            for part in ("ff.net.0",) if gates_only else ("attn1", "ff.net.0", "attn2"):
                for layer in merged.get_submodule(f"{block}.{part}").modules():
                    if isinstance(layer, nn.Linear):
                        up = torch.randn(layer.out_features, 2, generator=generator) * 0.1
                        down = torch.randn(2, layer.in_features, generator=generator) * 0.1
                        tensors += [up, down]
                        layer.weight.data += 0.2 * up @ down
    return tensors, merged


@pytest.mark.parametrize("gates_only", [False, True])
def test_lora_of_one_person(precise: PreciseControl, model: Model, tmp_path: Path, gates_only: bool) -> None:
    tensors, merged = listed(model, gates_only=gates_only)
    torch.save(tensors, tmp_path / "lora_params-0.pt")
    again = load_adapter(precise.save(tmp_path), model)
    conditions = again.conditions_from_embeddings(code(), model, ASKED)
    assert isinstance(conditions[1], LoraCondition)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), model.prepare(conditions, 1, True) as prepared:
        got = model.predict(sample, 300, prepared.throughout())
    twin = model.with_unet(merged)
    with torch.no_grad(), twin.prepare(conditions[:1], 1, True) as prepared:
        wanted = twin.predict(sample, 300, prepared.throughout())
    assert torch.allclose(got, wanted, atol=1e-5)


def test_lists_that_do_not_fit(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "lora_params-0.pt"
    torch.save(listed(model)[0][:-4], path)
    with pytest.raises(WrongBaseModel, match="holds weights for"):
        lora_from_list(path, model)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointBroken, match="no list of LoRA weights"):
        lora_from_list(path, model)


def test_a_tokenizer_without_the_word(tiny_sd15: Path) -> None:
    with pytest.raises(WrongBaseModel, match=r"replaces the word 'sks', which .* splits into"):
        PreciseControl.fresh(Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32), DIM)
