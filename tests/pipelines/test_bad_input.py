"""Whatever is wrong with what a user gives: one sentence, exit code 2, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from facegen.checkpoints import read, write
from facegen.cli import main

Damage = Callable[[Path], None]


def weight_file(folder: Path) -> Path:
    """The largest file of weights, which is the adapter's own."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil(path: Path) -> None:
    """NaN in the first tensor of a checkpoint."""
    tensors = read(path)
    first = next(key for key, value in tensors.items() if value.is_floating_point())
    tensors[first] = torch.full_like(tensors[first], float("nan"))
    write(path, tensors)


def replace_by_lora(path: Path) -> None:
    """A readable file of another family under the same name."""
    write(path, {"unet.x.lora_A.weight": torch.ones(2, 4), "unet.x.lora_B.weight": torch.ones(4, 2)})


def run(words: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command ends with; nothing may have been written."""
    assert main(["generate", *words, "--device", "cpu", "--steps", "1", "-o", str(out)]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("facegen: ")
    assert "\n" not in told
    assert told.endswith((".", "?"))
    assert not list(out.rglob("*"))
    return told


@pytest.mark.parametrize("damage", [truncate, empty, spoil, replace_by_lora])
@pytest.mark.parametrize("name", ["instantid", "ip_adapter_faceid"])
def test_a_damaged_adapter(
    tiny: Path, tiny_pack: Path, me: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Damage
) -> None:
    shutil.copytree(tiny / "adapters" / name, tmp_path / "adapter")
    file = weight_file(tmp_path / "adapter")
    damage(file)
    words = [str(me), "--model", str(tiny / "base"), "--pack", str(tiny_pack), "--adapters", str(tmp_path / "adapter")]
    told = run(words, tmp_path / "out", capsys)
    assert str(tmp_path / "adapter") in told


@pytest.mark.parametrize("name", ["instantid", "ip_adapter_faceid", "arc2face"])
def test_an_adapter_of_another_base(
    tiny: Path,
    tiny_sdxl: Path,
    tiny_pack: Path,
    me: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    words = [str(me), "--model", str(tiny_sdxl), "--pack", str(tiny_pack), "--adapters", str(tiny / "adapters" / name)]
    assert "base model" in run(words, tmp_path / "out", capsys)


@pytest.mark.parametrize("damage", [truncate, empty, spoil])
def test_a_damaged_base_model(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage) -> None:
    shutil.copytree(tiny / "base", tmp_path / "base")
    damage(weight_file(tmp_path / "base" / "unet"))
    assert str(tmp_path / "base") in run(["--model", str(tmp_path / "base")], tmp_path / "out", capsys)


def test_a_model_that_lacks_a_part(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny / "base", tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "vae")
    assert "vae" in run(["--model", str(tmp_path / "base")], tmp_path / "out", capsys)


def test_a_lora_that_is_none(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "style.safetensors", {"nothing": torch.ones(2)})
    words = ["--model", str(tiny / "base"), "--loras", str(tmp_path / "style.safetensors")]
    assert "no LoRA" in run(words, tmp_path / "out", capsys)


def test_two_people_where_one_is_meant(
    mini: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run([str(shared / "photos" / "group_1.jpg")], tmp_path / "out", capsys)
    assert "faces were found" in told
