"""What is loaded before the first picture: the choices of it, and all that stays loaded and may be shared.

Nothing heavy is imported until a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from facegen.request import Request, choice, switch, text

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from facegen.adapter import Adapter
    from facegen.conditions import LoraCondition
    from facegen.face.analyze import FaceAnalyzer
    from facegen.face.fuse import Fused
    from facegen.face.landmarks import LandmarkFinder
    from facegen.face.parse import FaceParser
    from facegen.face.types import Face
    from facegen.models.base import Model
    from facegen.report import Judges


@dataclass(frozen=True, kw_only=True)
class Loading(Request):
    """What is loaded before the first picture, and where."""

    task: ClassVar[str] = "Load a model."

    model: str = text("mini", "Base model: mini, sd15, sdxl, a hub id, a folder in diffusers' format or a single file.")
    pack: str | None = text(
        cast(str, None),
        "Face analysis: mini, buffalo_l, antelopev2 or a folder; by default what the adapter was made for.",
        optional=True,
        advanced=True,
    )
    device: str | None = choice(
        None, "Where to compute; by default the GPU if there is one.", ("cpu", "cuda", "mps"),
        optional=True, advanced=True,
    )  # fmt: skip
    dtype: str | None = choice(
        None, "Precision; by default float16 on CUDA, float32 elsewhere.", ("float32", "float16", "bfloat16"),
        optional=True, advanced=True,
    )  # fmt: skip
    memory: str = choice(
        "auto",
        "What stays on the GPU: all of it (none), the network that works (model), its layer (sequential); auto chooses"
        " by what is free.",
        ("auto", "none", "model", "sequential"), alias="offload", advanced=True,
    )  # fmt: skip
    tiling: bool = switch(False, "Decode large pictures in tiles.", advanced=True)
    tiny_vae: str | None = text(
        cast(str, None),
        "A tiny decoder in the VAE's place, faster and a little different: taesd, taesdxl, a folder or a file.",
        optional=True, advanced=True,
    )  # fmt: skip
    weights: str = choice(
        "whole",
        "How UNet, ControlNets and text encoders keep theirs: whole, or in eight bits (int8, fp8): less memory, slower,"
        " and the pictures differ a little.",
        ("whole", "int8", "fp8"), advanced=True,
    )  # fmt: skip
    speed: str = choice(
        "exact", "What a run leaves out: nothing; guidance, control and depth where they matter least; or more of it.",
        ("exact", "fast", "fastest"), advanced=True,
    )  # fmt: skip
    packed: bool = switch(
        False,
        "On a CPU: lay the weights out for its matrix units; faster, equal up to float32 rounding; so fast is, anyway.",
        advanced=True,
    )
    compiled: bool = switch(
        False,
        "Compile UNet and ControlNets when they first run (minutes, for each size of picture): for GPUs.",
        advanced=True,
    )
    attention: str = choice(
        "sdpa",
        "Who computes attention: PyTorch (sdpa), xformers, the fused kernel of streams on CUDA (triton), or plain"
        " products (math).",
        ("sdpa", "xformers", "triton", "math"), advanced=True,
    )  # fmt: skip
    commercial_only: bool = switch(
        False, "Refuse weights that may not be used commercially, and those that work only with such.", advanced=True
    )

    @property
    def packs(self) -> bool:
        """Whether weights are packed: asked for, or nothing lost where the outcome is approximate anyway."""
        return self.packed or self.speed != "exact"

    def quicken(self, walked: Sequence[nn.Module], others: Sequence[nn.Module] = ()) -> None:
        """Let networks compute as asked for; walked: UNets and ControlNets, which alone are compiled."""
        from facegen.models.compiled import compile_networks
        from facegen.models.packed import pack

        if self.packs:
            pack(*walked, *others)
        if self.compiled:
            compile_networks(*walked)


@dataclass(frozen=True, eq=False, kw_only=True)
class Person:
    """Who is meant: the faces of their photos, and the photos fused into one, per face pack."""

    photos: tuple[Image.Image, ...]
    faces: Mapping[str, tuple[Face, ...]]
    fused: Mapping[str, Fused]
    warnings: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[Face, ...]:
        """The faces that the pictures should show: those of the photos that were taken for one person."""
        return self.kept(next(iter(self.faces)))

    def kept(self, pack: str) -> tuple[Face, ...]:
        """The faces, as this pack sees them, of the photos that were taken for one person."""
        return tuple(self.faces[pack][place] for place in self.fused[pack].kept)


@dataclass(frozen=True, eq=False, kw_only=True)
class Worn:
    """A loaded adapter: where it came from, its checksum, and the face pack whose embeddings it understands."""

    adapter: Adapter
    source: str
    sha256: str
    pack: str


@dataclass(eq=False)
class Loaded:
    """Everything heavy; pipelines made by :meth:`Pipeline.from_pipe` share one of these."""

    model: Model
    loading: Loading
    sha256: str
    licence: str = ""
    adapters: dict[str, Worn] = field(default_factory=dict)
    analyzers: dict[str, FaceAnalyzer] = field(default_factory=dict)
    loras: dict[tuple[str, float], LoraCondition] = field(default_factory=dict)
    judges: dict[str, Judges] = field(default_factory=dict)
    people: dict[tuple[str, ...], Person] = field(default_factory=dict)  # by the checksums of their photos
    seen: dict[tuple[str, str], tuple[Face, ...]] = field(default_factory=dict)  # by pack and photo's checksum
    parser: FaceParser | None = None
    finder: LandmarkFinder | None = None
    controls: dict[str, Any] = field(default_factory=dict)  # expression, geometry, aligner, by name

    @property
    def assets(self) -> Path | None:
        """The folder of a model that brings its own face analysis, adapters and judges: mini, or one like it."""
        from facegen.models.base import locate

        folder = locate(self.loading.model).parent
        return folder if (folder / "pack").is_dir() else None

    @property
    def pack(self) -> str | None:
        """The face pack that the user chose, or that the model brings."""
        if self.loading.pack is not None or self.assets is None:
            return self.loading.pack
        return "mini" if self.loading.model == "mini" else str(self.assets / "pack")


def lora_path(name: str, assets: Path | None) -> Path:
    """A LoRA's file or folder where it lies, the model's own of that name, or where the hub keeps what is called so."""
    from facegen.hub import resolve

    path = Path(name).expanduser()
    if path.exists() or path.suffix:
        return path
    own = None if assets is None else assets / "loras" / f"{name}.safetensors"
    return own if own is not None and own.is_file() else resolve(name)


def weights_checksum(path: Path) -> str:
    """SHA-256 of a weight file, or of all those of a folder in the order of their names; of a model its UNet's."""
    import hashlib

    from facegen import metadata

    if path.is_file():
        return metadata.file_checksum(path)
    folder = path / "unet" if (path / "unet").is_dir() else path
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin", ".pt", ".ckpt"))
    if len(files) == 1:
        return metadata.file_checksum(files[0])
    digest = hashlib.sha256()
    for file in files:
        digest.update(metadata.file_checksum(file).encode())
    return digest.hexdigest()
