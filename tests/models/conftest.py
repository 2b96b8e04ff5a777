"""What the tests of models share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

# The tests run with --import-mode=importlib, which puts no folder of tests on the path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def folders(tiny_sd15: Path, tiny_sdxl: Path) -> dict[str, Path]:
    """The tiny random models by family."""
    return {"sd15": tiny_sd15, "sdxl": tiny_sdxl}


@pytest.fixture(scope="session")
def inpainting(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with UNets of nine input channels."""
    import shutil

    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    made = {}
    for family, folder in folders.items():
        copy = tmp_path_factory.mktemp("inpainting") / family
        shutil.copytree(folder, copy)
        read: Any = UNet2DConditionModel.load_config
        config: dict[str, Any] = dict(read(folder / "unet"))
        config["in_channels"] = 9
        unet: Any = UNet2DConditionModel.from_config(config)
        unet.save_pretrained(copy / "unet")
        made[family] = copy
    return made
