"""The tokenizer reads captions word by word and anything else by its letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from facegen.world.captions import caption
from facegen.world.sampling import sample_people, sample_scenes
from facegen.world.tokenizer import END, MAX_LENGTH, START, build_tokenizer, tokens_and_merges, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return build_tokenizer(folder)


def test_every_known_word_is_one_token(tokenizer: Any) -> None:
    assert [word for word in words() if len(tokenizer(word).input_ids) != 3] == []
    assert "id" in words()


def test_captions_come_back_and_stay_short(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for text in caption(sample_scenes(sample_people(100, generator), generator), generator):
        ids = tokenizer(text).input_ids
        assert len(ids) <= 50
        back = tokenizer.decode(ids, skip_special_tokens=True)
        assert back.replace(" ", "") == text.replace(" ", "")


def test_marks_are_the_two_highest_numbers_and_the_end_pads(tokenizer: Any) -> None:
    size = len(tokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (size - 2, size - 1)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (START, END)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    padded = tokenizer("red hair", padding="max_length", truncation=True).input_ids
    assert len(padded) == tokenizer.model_max_length == MAX_LENGTH
    assert len(tokenizer("red " * 200, truncation=True).input_ids) == MAX_LENGTH


def test_what_is_unknown_falls_to_letters_and_never_ends_the_text(tokenizer: Any) -> None:
    for text in ("xqzt", "Glück", "日本", "🙂", "a\tb\n c"):
        inner = tokenizer(text).input_ids[1:-1]
        assert inner
        assert tokenizer.eos_token_id not in inner
        assert tokenizer.decode(inner).replace(" ", "") == "".join(text.lower().split())


def test_the_plain_loader_reads_the_folder(folder: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer, CLIPTokenizer

    text = "photo of a id person with red hair, smiling"
    for loader in (CLIPTokenizer, AutoTokenizer):
        loaded = loader.from_pretrained(str(folder))
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.model_max_length == MAX_LENGTH


def test_merges_are_the_same_every_time() -> None:
    few = ("photo", "photos", "portrait", "port")
    assert tokens_and_merges(few) == tokens_and_merges(reversed(few))
