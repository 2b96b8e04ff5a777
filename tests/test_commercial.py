"""With commercial_only, weights whose terms forbid commercial use are refused with the reason; the others load."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from facegen import checkpoints, hub
from facegen.adapter import find_adapters, load
from facegen.cli import main
from facegen.errors import NotCommercial, WeightsMissing
from facegen.models.base import Model
from facegen.pipelines.generate import GeneratePipeline
from facegen.restoration.dfdnet import MARKS
from facegen.restoration.restorer import Restorer


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACEGEN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def model(tiny_sd15: Path) -> Model:
    return Model.from_pretrained(tiny_sd15, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", ["instantid", "ip_adapter_faceid", "photomaker", "pulid", "storymaker", "wplus"])
def test_adapters_by_name(model: Model, name: str) -> None:
    with pytest.raises(NotCommercial, match="Only weights for commercial use were asked for, but"):
        load(name, model, commercial_only=True)
    with pytest.raises(WeightsMissing):
        load(name, model)


@pytest.mark.parametrize("name", ["ip_adapter", "photomaker-v1"])
def test_names_that_pass(model: Model, name: str) -> None:
    with pytest.raises(WeightsMissing):  # allowed, and not there
        load(name, model, commercial_only=True)


def test_a_file_is_judged_by_what_its_keys_say(model: Model, tmp_path: Path) -> None:
    adapter = find_adapters()["ip_adapter_faceid"].fresh(model, 16, rank=2)  # type: ignore[attr-defined]
    file = adapter.save(tmp_path / "made")
    plain = file.rename(file.with_name("weights.bin"))
    with pytest.raises(NotCommercial, match="ip_adapter_faceid: non-commercial research only"):
        load(plain, model, commercial_only=True)
    assert load(plain, model)[0].name == "ip_adapter_faceid"
    (tmp_path / "mini.json").write_text("{}")  # beside a model that facegen trained
    assert load(plain, model, commercial_only=True)[0].name == "ip_adapter_faceid"


def test_restorers(tmp_path: Path) -> None:
    with pytest.raises(NotCommercial, match="codeformer: S-Lab"):
        Restorer.from_pretrained("codeformer", commercial_only=True)
    file = checkpoints.write(tmp_path / "x.pth", {"params": dict.fromkeys(MARKS, torch.ones(1))})
    with pytest.raises(NotCommercial, match="dfdnet: CC BY-NC-SA"):
        Restorer.from_pretrained(file, commercial_only=True)


def test_the_embedded_model_passes(mini: Path) -> None:
    pipe = GeneratePipeline.from_pretrained("mini", device="cpu", commercial_only=True)
    for name in pipe.available_adapters():
        pipe.load_adapter(name)
    assert pipe.adapters
    pipe.analyzer("mini")
    with pytest.raises(NotCommercial, match="buffalo_l: non-commercial"):
        pipe.analyzer("buffalo_l")


def test_a_pack_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(NotCommercial, match="antelopev2"):
        GeneratePipeline.from_pretrained("mini", pack="antelopev2", commercial_only=True)


def test_unknown_terms_are_said(tiny_sd15: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        GeneratePipeline.from_pretrained(tiny_sd15, device="cpu", commercial_only=True)
    assert "is not known to facegen; read its terms" in caplog.text
    caplog.clear()
    hub.check_commercial(str(hub.ASSETS / "mini" / "pack"))
    assert not caplog.text


def test_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "example:1", "--pack", "buffalo_l", "--commercial-only"]) == 2
    assert "buffalo_l: non-commercial research only" in capsys.readouterr().err
