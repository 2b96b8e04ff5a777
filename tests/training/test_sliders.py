"""Sliders are learnt from words or pairs, go both ways, and lie in ordinary LoRA files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from facegen.cli import main
from facegen.errors import Cancelled, WrongRequest
from facegen.models.base import Model
from facegen.models.lora import load_lora
from facegen.training.loop import Budget, run
from facegen.training.objectives.slider import PairSliderObjective, SliderSettings
from facegen.training.sliders import SETTINGS, Recipe, new_objective, read_pairs, save, train_slider

SMALL = SliderSettings(rank=2, batch=2, steps=3, reach=4.0)
WORDS = Recipe("old", "a old person", "a young person", keep=("a man", "a woman"))


@pytest.fixture(params=["sd15", "sdxl"])
def model(request: pytest.FixtureRequest, tiny_sd15: Path, tiny_sdxl: Path) -> Model:
    folder = {"sd15": tiny_sd15, "sdxl": tiny_sdxl}[request.param]
    return Model.from_pretrained(folder, device="cpu", dtype=torch.float32)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two pairs: the same noise, darker and brighter."""
    generator = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        values = torch.randint(60, 120, (64, 80, 3), generator=generator, dtype=torch.uint8)
        for side, brighter in (("less", 0), ("more", 100)):
            (tmp_path / "pairs" / side).mkdir(parents=True, exist_ok=True)
            Image.fromarray((values + brighter).numpy()).save(tmp_path / "pairs" / side / f"{name}.png")
    return tmp_path / "pairs"


def test_words_are_learnt_in_both_directions_and_the_unet_stays(model: Model, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    path = train_slider(WORDS, model, tmp_path, tmp_path / "work", steps=30, settings=SMALL)
    assert path == tmp_path / "old.safetensors"
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert (header["kind"], header["more"], header["keep"]) == ("slider", WORDS.more, "a man, a woman")
    assert float(header["left"]) < 0.9  # 1 is a slider that does nothing
    assert set(load_lora(path, model).layers) == set(new_objective(WORDS, model, SMALL).net.names)

    from diffusers import UNet2DConditionModel

    own = UNet2DConditionModel.from_config(model.unet.config)
    own.load_state_dict(model.unet.state_dict())
    own.load_lora_adapter({k.removeprefix("unet."): v for k, v in load(path).items()}, prefix=None)  # as diffusers does


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pairs_are_told_apart(tiny_sd15: Path, tmp_path: Path, prediction: str) -> None:
    model = Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)
    model.scheduler_config["prediction_type"] = prediction
    more = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) + 2
    objective = PairSliderObjective(model, (more, more - 4), "a person", replace(SMALL, batch=8))
    batch = objective.batch(0, torch.Generator().manual_seed(0)) | {"between": torch.full((8, 1, 1, 1), 0.5)}
    nothing_yet = float(objective.loss(batch, 0, torch.Generator())["loss"])
    assert nothing_yet == pytest.approx(0.75, abs=1e-3)  # from half way, half of the way is left: 1/4 against 1/3
    found = run(objective, tmp_path / "work", Budget(40), replace(SETTINGS, learning_rate=1e-2))
    assert found["left"] < 0.97 < 1.03 < found["left_reversed"]  # 1 is a slider that does nothing


def test_a_new_slider_does_nothing_and_a_stopped_training_goes_on(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)
    fresh = new_objective(WORDS, model, SMALL)
    batch = fresh.batch(0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = [
            fresh.predict(batch["latents"], batch["timesteps"], model.encode_text(["a person"]), strength)
            for strength in (0.0, 1.0, -1.0)
        ]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])

    whole = train_slider(WORDS, model, tmp_path / "whole", tmp_path / "a", steps=6, settings=SMALL)
    step = torch.optim.AdamW.step
    taken = []

    def stop(self: torch.optim.AdamW, *args: object) -> object:
        taken.append(1)
        if len(taken) == 3:
            import signal

            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(Cancelled, match="step 3 of 6"):
        train_slider(WORDS, model, tmp_path / "halves", tmp_path / "b", steps=6, settings=SMALL)
    assert not (tmp_path / "halves").exists()
    monkeypatch.undo()
    halves = train_slider(WORDS, model, tmp_path / "halves", tmp_path / "b", steps=6, settings=SMALL)
    first, second = load(whole), load(halves)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_is_no_recipe_is_refused(
    tiny_sd15: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WrongRequest, match="--name"):
        Recipe("")
    with pytest.raises(WrongRequest, match="two prompts"):
        Recipe("x", more="a man")
    with pytest.raises(WrongRequest, match="not both"):
        Recipe("x", more="a", less="b", pairs=pairs)
    with pytest.raises(WrongRequest, match="two folders"):
        read_pairs(tmp_path)
    (pairs / "more" / "a.png").unlink()
    with pytest.raises(WrongRequest, match="'a' is in one of"):
        read_pairs(pairs)
    model, twin = Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32), torch.ones(1, 4, 8, 8)
    with pytest.raises(WrongRequest, match="are the same"):
        PairSliderObjective(model, (twin, twin), "a person", SMALL)
    places = ["-o", str(tmp_path / "o"), "--work", str(tmp_path / "w")]
    assert main(["train", "mini", "--more", "x", *places]) == 2
    assert "facegen train slider" in capsys.readouterr().err
    assert main(["train", "slider", "--name", "x", "--stages", "vae", *places]) == 2
    assert "facegen train mini" in capsys.readouterr().err


def test_the_command_writes_a_file(tiny_sd15: Path, pairs: Path, tmp_path: Path) -> None:
    words = ["train", "slider", "--name", "bright", "--pairs", str(pairs), "--steps", "2", "--rank", "1", "--quiet"]
    words += ["--model", str(tiny_sd15), "--device", "cpu", "-o", str(tmp_path / "o"), "--work", str(tmp_path / "w")]
    assert main(words) == 0
    tensors = load(tmp_path / "o" / "bright.safetensors")
    assert {len(value) for name, value in tensors.items() if "lora_A" in name} == {1}


def test_a_file_is_as_it_was_learnt(tiny_sd15: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)
    net = new_objective(WORDS, model, SMALL).net
    with torch.no_grad():
        for up in net.up:
            up += 0.5
    read = load_lora(save(net, tmp_path / "x.safetensors", {"format": "pt"}), model).layers
    for name, low in net.layers().items():
        assert torch.allclose(read[name].down, low.down.half())
        assert torch.equal(read[name].up.float(), low.up)
        assert read[name].gain == 1.0
