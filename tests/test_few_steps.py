"""A distilled LoRA is known by its name, and gets the scheduler, steps and guidance it was made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from facegen.errors import CheckpointBroken
from facegen.few_steps import FewSteps, told_by, wanted
from facegen.schedulers import NAMES, build, walk


@pytest.mark.parametrize(
    ("name", "wants"),
    [
        ("lcm", FewSteps("lcm", 4)),
        ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", FewSteps("lcm", 4)),
        ("LCM_LoRA_SDXL.safetensors", FewSteps("lcm", 4)),
        ("TCD-SD15-LoRA/pytorch_lora_weights.safetensors", FewSteps("tcd", 4)),
        ("sdxl_lightning_8step_lora.safetensors", FewSteps("euler trailing", 8)),
        ("sdxl_lightning_2step_lora.safetensors", FewSteps("euler trailing", 2)),
        ("Hyper-SD15-4steps-lora.safetensors", FewSteps("ddim trailing", 4)),
        ("Hyper-SDXL-1step-lora.safetensors", FewSteps("tcd", 1)),
        ("Hyper-SDXL-8steps-CFG-lora.safetensors", FewSteps("ddim trailing", 8, 5.0)),
        ("few", FewSteps("ddim trailing", 4)),
        ("loras/few.safetensors", FewSteps("ddim trailing", 4)),
        ("fewer_freckles.safetensors", None),
        ("hyperrealism.safetensors", None),
        ("lightnings_over_lake.safetensors", None),
        ("style.safetensors", None),
    ],
)
def test_names(name: str, wants: FewSteps | None) -> None:
    assert told_by(name) == wants
    assert wants is None or wants.scheduler in NAMES


def test_a_lora_that_is_off_wants_nothing() -> None:
    assert wanted({"style.safetensors": 1.0, "lcm": 0.0}) is None
    assert wanted({"style.safetensors": 1.0, "lcm": 0.8}) == FewSteps("lcm", 4)


@pytest.mark.parametrize("name", ["euler trailing", "ddim trailing"])
def test_trailing_begins_at_the_noisiest_step(name: str) -> None:
    assert float(walk(build(name, {"_class_name": "DDIMScheduler", "steps_offset": 1}, 4))[0]) == 999


def test_a_pipeline_takes_what_is_left_open_from_the_lora(tiny_sd15: Path, tmp_path: Path) -> None:
    from facegen.pipelines.generate import GeneratePipeline
    from facegen.training.checkpoint import save_tensors
    from facegen.training.distil import LowRankSet

    pipe = GeneratePipeline.from_pretrained(tiny_sd15, device="cpu", dtype="float32")
    lora = LowRankSet(pipe.model.unet, 2, torch.Generator().manual_seed(0))
    path = tmp_path / "lcm.safetensors"
    save_tensors(lora.tensors(), path)
    asked = pipe.resolve(pipe.request(None, {"loras": {str(path): 1.0}}))
    assert (asked.scheduler, asked.num_inference_steps, asked.guidance_scale) == ("lcm", 4, 1.0)
    own = pipe.resolve(pipe.request(None, {"loras": {str(path): 1.0}, "num_inference_steps": 6, "scheduler": "tcd"}))
    assert (own.scheduler, own.num_inference_steps, own.guidance_scale) == ("tcd", 6, 1.0)
    plain = pipe.resolve(pipe.request(None, {}))
    assert (plain.scheduler, plain.num_inference_steps) == ("model", 30)


def test_the_fastest_way_wears_the_model_s_own(tiny_sd15: Path, tmp_path: Path) -> None:
    from facegen.pipelines.generate import GeneratePipeline
    from facegen.training.checkpoint import save_tensors
    from facegen.training.distil import LowRankSet

    (tmp_path / "pack").mkdir()  # what makes it a model that brings its own parts
    (tmp_path / "base").symlink_to(tiny_sd15)
    pipe = GeneratePipeline.from_pretrained(tmp_path, device="cpu", dtype="float32", speed="fastest")
    assert pipe.resolve(pipe.request(None, {})).num_inference_steps == 30
    lora = LowRankSet(pipe.model.unet, 2, torch.Generator().manual_seed(0))
    (tmp_path / "loras").mkdir()
    save_tensors(lora.tensors(), tmp_path / "loras" / "few.safetensors")
    asked = pipe.resolve(pipe.request(None, {}))
    assert (dict(asked.loras), asked.num_inference_steps, asked.scheduler) == ({"few": 1.0}, 4, "ddim trailing")
    for speed in ("exact", "fast"):
        other = GeneratePipeline.from_pretrained(tmp_path, device="cpu", dtype="float32", speed=speed)
        assert other.resolve(other.request(None, {})).num_inference_steps == 30


@pytest.mark.parametrize("speed", ["fast", "fastest"])
def test_a_model_may_take_few_steps_by_itself(speed: str, tiny_sd15: Path, tmp_path: Path) -> None:
    from facegen.pipelines.generate import GeneratePipeline

    (tmp_path / "pack").mkdir()
    (tmp_path / "base").symlink_to(tiny_sd15)
    said = tmp_path / "few_steps.json"
    said.write_text('{"scheduler": "lcm", "steps": 3, "guidance": 1.0}')
    pipe = GeneratePipeline.from_pretrained(tmp_path, device="cpu", dtype="float32", speed=speed)
    asked = pipe.resolve(pipe.request(None, {}))
    assert (asked.scheduler, asked.num_inference_steps, asked.guidance_scale) == ("lcm", 3, 1.0)
    assert pipe.resolve(pipe.request(None, {"num_inference_steps": 9})).num_inference_steps == 9
    exact = GeneratePipeline.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert exact.resolve(exact.request(None, {})).num_inference_steps == 30
    said.write_text('{"stepps": 3}')
    with pytest.raises(CheckpointBroken, match="does not say scheduler"):
        pipe.resolve(pipe.request(None, {}))
