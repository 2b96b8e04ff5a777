"""Reading and writing weights: what is accepted, what is refused and with which words."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facegen import checkpoints
from facegen.adapter import describe
from facegen.errors import CheckpointBroken, OutputUnwritable, WeightsMissing, WrongAdapter


def nested() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image_proj": {"norm.weight": torch.randn(4, generator=generator)},
        "ip_adapter": {"1.to_k_ip.weight": torch.randn(3, 4, generator=generator)},
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def test_a_pickle_and_its_safetensors_twin_read_alike(tmp_path: Path) -> None:
    pickled = checkpoints.read(checkpoints.write(tmp_path / "a.bin", nested()))
    safe = checkpoints.read(checkpoints.write(tmp_path / "a.safetensors", nested()))
    assert list(pickled) == ["image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"]
    assert same(pickled, safe)
    assert list(checkpoints.section(pickled, "ip_adapter")) == ["1.to_k_ip.weight"]
    for name in ("a.bin", "a.safetensors"):
        assert checkpoints.shapes(tmp_path / name) == {key: tuple(value.shape) for key, value in safe.items()}


def test_the_pickle_keeps_the_official_nesting(tmp_path: Path) -> None:
    content = torch.load(checkpoints.write(tmp_path / "a.bin", nested()), weights_only=True)
    assert list(content) == ["image_proj", "ip_adapter"]


def test_pickles_of_old_torch_and_other_entries(tmp_path: Path) -> None:
    file = tmp_path / "old.pth"
    torch.save({**nested(), "step": 3, "note": "text"}, file, _use_new_zipfile_serialization=False)
    assert len(checkpoints.read(file)) == 2


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_pickles_are_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.bin").write_bytes(pickle.dumps({"weights": _Evil()}))
    torch.save({"weights": _Evil()}, "evil2.bin")
    for name in ("evil.bin", "evil2.bin"):
        with pytest.raises(CheckpointBroken):
            checkpoints.read(Path(name))
    assert not Path("executed").exists()


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_truncated(tmp_path: Path, suffix: str, part: float) -> None:
    file = checkpoints.write(tmp_path / f"a{suffix}", {"w": torch.ones(500)})
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointBroken, match=r"a\.(bin|safetensors) is (truncated or )?damaged"):
        checkpoints.read(file)
    with pytest.raises(CheckpointBroken):
        checkpoints.shapes(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n<html>", "web page"),
        (b"just a text", "damaged"),
    ],
)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, words: str, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckpointBroken, match=words):
        checkpoints.read(file)


def test_no_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.bin")
    torch.save([torch.ones(1)], tmp_path / "b.bin")
    with pytest.raises(CheckpointBroken, match="no tensors"):
        checkpoints.read(tmp_path / "a.bin")
    with pytest.raises(CheckpointBroken, match="holds a list"):
        checkpoints.read(tmp_path / "b.bin")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="is not there"):
        checkpoints.read(tmp_path / "a.bin")
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(WrongAdapter, match="no checkpoint"):
        checkpoints.read(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_not_a_number(tmp_path: Path, suffix: str, number: float) -> None:
    file = checkpoints.write(tmp_path / f"a{suffix}", {"fine": torch.ones(2), "wrong": torch.tensor([1.0, number])})
    with pytest.raises(CheckpointBroken, match="NaN or infinite numbers in wrong"):
        checkpoints.read(file)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = checkpoints.write(tmp_path / "a.bin", nested())
    before = file.read_bytes()
    with pytest.raises(AttributeError):
        checkpoints.write(file, {"w": object()})  # type: ignore[dict-item]
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"], "nothing half-written is left"


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputUnwritable, match="choose another folder"):
        checkpoints.write(tmp_path / "file" / "a.bin", nested())


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "LoRA"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "whole Stable Diffusion model in one file"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x", "conv_in.weight"], "ControlNet"),
        (["down_blocks.0.x", "up_blocks.0.x", "conv_in.weight"], "UNet"),
        (["text_model.embeddings.token_embedding.weight"], "CLIP text encoder"),
        (["layer1.0.bn1.weight", "fc.weight"], "face recogniser"),
        (["something"], None),
    ],
)
def test_other_families_are_named(keys: list[str], kind: str | None, tmp_path: Path) -> None:
    assert checkpoints.foreign(keys) == kind
    file = checkpoints.write(tmp_path / "a.safetensors", {key: torch.ones(1) for key in keys})
    assert describe(file).family == (kind or "unknown")
    assert describe(file).adapter is None


def test_describe(shared: Path) -> None:
    """The three known files; the FaceID file says its variant."""
    faceid = describe(shared / "golden/ipadapter/ip-adapter-faceid-plus_sd15.bin")
    assert (faceid.adapter, faceid.sizes["variant"], faceid.sizes["LoRA rank"]) == ("ip_adapter_faceid", "plus", 8)
    assert (faceid.sizes["tokens"], faceid.sizes["embedding"], faceid.sizes["token width"]) == (4, 512, 64)
    instantid = describe(shared / "golden/instantid/checkpoints")
    assert (instantid.adapter, instantid.sizes["tokens"], instantid.tensors) == ("instantid", 16, 63)
    assert "64 wide" in instantid.base


@pytest.mark.parametrize(("made", "called"), [("a.bin", "a.safetensors"), ("a.safetensors", "a.ckpt")])
def test_the_format_follows_from_the_content(tmp_path: Path, made: str, called: str) -> None:
    before = checkpoints.read(checkpoints.write(tmp_path / made, nested()))
    renamed = (tmp_path / made).rename(tmp_path / called)
    assert same(before, checkpoints.read(renamed))
    assert checkpoints.shapes(renamed) == {key: tuple(value.shape) for key, value in before.items()}
