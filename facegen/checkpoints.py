"""Weights on disk: read into one flat dict of tensors, judged at the door, written whole or not at all.

A pickle of nested dicts (`{"image_proj": {...}, "ip_adapter": {...}}`) and its safetensors twin (`image_proj.…`,
`ip_adapter.…`) read as the same flat dict. Pickles are opened with `weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from facegen.errors import CheckpointBroken, FacegenError, WeightsMissing, WrongAdapter
from facegen.files import atomic

Tensors: TypeAlias = dict[str, Tensor]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Nested: TypeAlias = Mapping[str, "Tensor | Nested"]

Net = TypeVar("Net", bound=nn.Module)

SAFE = ".safetensors"
LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
SUFFIXES = (SAFE, ".bin", ".pt", ".pth", ".ckpt")

# Outermost first: basicsr's (the averaged weights before the others), Lightning's, DataParallel's.
_WRAPPERS = ("params_ema", "params", "state_dict", "vqvae", "module")

# What a file that no adapter claims most likely is: name, keys that must all be present (as a prefix or inside).
_FOREIGN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("StoryMaker adapter", ("image_proj_model.pos_embed",)),
    ("PhotoMaker adapter", ("id_encoder.", "lora_weights.")),
    ("PuLID adapter", ("id_adapter.",)),
    ("Arc2Face expression adapter or another IP-Adapter", ("image_proj.", "to_k_ip.weight")),
    ("whole Stable Diffusion model in one file", ("model.diffusion_model.",)),
    ("ControlNet", ("controlnet_cond_embedding.",)),
    ("RestoreFormer", ("decoder.mid.attn_1.norm2.weight", "quantize.embedding.weight")),
    ("CodeFormer", ("idx_pred_layer.1.weight", "quantize.embedding.weight")),
    ("GFPGAN", ("stylegan_decoder.constant_input.weight", "final_linear.weight")),
    ("DFDNet", ("MSDilate.convi.weight_orig",)),
    ("BiSeNet face parsing network", ("cp.conv_avg.conv.weight",)),
    ("ParseNet face parsing network", ("out_mask_conv.conv2d.weight",)),
    ("UNet", ("down_blocks.", "up_blocks.", "conv_in.weight")),
    ("VAE", ("decoder.conv_in.weight",)),
    ("CLIP image encoder", ("vision_model.",)),
    ("CLIP text encoder", ("token_embedding.weight",)),
    ("e4e encoder", ("encoder.input_layer.",)),
    ("EVA-CLIP picture tower", ("visual.blocks.", "visual.patch_embed.proj.weight")),
    ("TransFace recogniser", ("senet.0.weight", "pos_embed", "blocks.0.")),
    ("RetinaFace detector", ("BboxHead.0.conv1x1.weight",)),
    ("face recogniser", ("layer1.0.bn1.weight", "fc.weight")),
    ("LoRA", ("lora_",)),
)


def read(path: Path) -> Tensors:
    """All tensors of a checkpoint, flat, on the CPU, in the dtype of the file; what is not a tensor is left out.

    Raises WeightsMissing when there is no such file and CheckpointBroken when it is truncated, is no checkpoint,
    holds nothing, or holds NaN or infinite numbers.
    """
    tensors = _flat_safetensors(path) if is_safe(path) else mapped(path)
    if not tensors:
        raise CheckpointBroken(f"{path} holds no tensors; fetch the file again.")
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointBroken(f"{path} holds NaN or infinite numbers in {key}; fetch or train the file again.")
    return tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, without reading the numbers (the header of a safetensors file, a mapped pickle)."""
    if is_safe(path):
        with _open_safetensors(path) as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return {key: tuple(value.shape) for key, value in flat(_unpickle(path))}


def is_safe(path: Path) -> bool:
    """Whether the file is in the safetensors format, by its first bytes; where they say nothing, by its name."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        start = b""
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < LONGEST_HEADER:
        return True
    return path.suffix == SAFE and not start.startswith((b"PK", b"\x80"))


def mapped(path: Path) -> Tensors:
    """The tensors of a pickle, flat; their numbers stay in the file until they are used. Raises as `read`."""
    return dict(flat(_unpickle(path)))


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Depth first, keys joined by a dot."""
    for key, value in nested.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")


def section(tensors: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries below `name.`, without that prefix; empty when there are none."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, path: Path, prefix: str = "") -> None:
    """Strict load in the module's precision; CheckpointBroken as in `check`."""
    own = module.state_dict()
    check(own, tensors, path=path, prefix=prefix)
    module.load_state_dict({key: value.to(own[key].dtype) for key, value in tensors.items()})


def check(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, path: Path, prefix: str = "") -> None:
    """CheckpointBroken names the first tensors that are missing, unknown or of another shape than in `own`."""
    missing = [prefix + key for key in own if key not in tensors]
    if missing:
        raise CheckpointBroken(f"{path} lacks {_some(missing)}; fetch the file again.")
    unknown = [prefix + key for key in tensors if key not in own]
    if unknown:
        raise CheckpointBroken(f"{path} holds keys that do not belong there: {_some(unknown)}.")
    wrong = [
        f"{prefix}{key} {list(tensors[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if tensors[key].shape != own[key].shape
    ]
    if wrong:
        raise CheckpointBroken(f"{path} holds weights of sizes that do not fit one another: {_some(wrong)}.")


def fill(net: Net, tensors: Mapping[str, Tensor], path: Path) -> Net:
    """A net built on the meta device, with these weights as float32, frozen and in evaluation mode.

    Counters of batches may be missing. Raises CheckpointBroken as in `check`.
    """
    own = net.state_dict()
    given = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    for key in own:
        if key.endswith("num_batches_tracked"):
            given.setdefault(key, torch.tensor(0))
    check(own, given, path=path)
    net.load_state_dict(given, assign=True)
    return net.requires_grad_(False).eval()


def unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the network itself (tensors or shapes), without what training programs wrap them in."""
    found = dict(tensors)
    for name in _WRAPPERS:
        found = section(found, name) or found
    return found


def count(keys: Iterable[str], name: str) -> int:
    """How many numbered entries (`name.0.…`, `name.1.…`) there are."""
    start = f"{name}."
    return len({key.removeprefix(start).split(".")[0] for key in keys if key.startswith(start)})


def require(keys: Mapping[str, Any], *names: str, path: Path) -> None:
    """CheckpointBroken unless every name is there; for the keys from which the sizes of a network are read."""
    missing = [name for name in names if name not in keys]
    if missing:
        raise CheckpointBroken(f"{path} lacks {_some(missing)}; fetch the file again.")


def foreign(keys: Iterable[str]) -> str | None:
    """What kind of file these keys come from ("PuLID adapter", "LoRA", "UNet" …), None when unknown."""
    names = list(keys)
    for kind, marks in _FOREIGN:
        if all(any(mark in name for name in names) for mark in marks):
            return kind
    return None


def refuse(path: Path, keys: Iterable[str], wanted: str) -> FacegenError:
    """The error for a readable file that is not `wanted`: it says what the file is, where that is known."""
    kind = foreign(keys)
    what = f"is a {kind}" if kind else "holds weights of no known kind"
    return WrongAdapter(f"{path} {what}, not {wanted}; give the right file or another adapter.")


def base_name(cross_attention_dim: int) -> str:
    """How people call the base models with text tokens of this width."""
    known = {768: "SD 1.5", 1024: "SD 2.1", 2048: "SDXL"}
    return known.get(cross_attention_dim, f"a base model with text tokens {cross_attention_dim} wide")


def write(path: Path, tensors: Nested, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a checkpoint, nested in a pickle or flat in .safetensors, by way of a temporary file in the same folder.

    A reader never sees half a file, and a failed write leaves the old one. Raises OutputUnwritable.
    """
    with atomic(path) as temporary:
        if path.suffix == SAFE:
            whole = {key: value.cpu().contiguous() for key, value in flat(tensors)}
            write_safetensors(whole, temporary, metadata)
        else:
            torch.save(_detached(tensors), temporary)
    return path


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """safetensors' own writing; a full disk is an OSError here too."""
    try:
        save_file(dict(tensors), path, dict(metadata or {}))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def cast(nested: Nested, dtype: torch.dtype | None) -> dict[str, Any]:
    """Floating-point tensors in another precision; None leaves them as they are."""
    return {
        key: cast(value, dtype)
        if isinstance(value, Mapping)
        else value.to(dtype)
        if dtype is not None and value.is_floating_point()
        else value
        for key, value in nested.items()
    }


def _detached(nested: Nested) -> dict[str, Any]:
    return {
        key: _detached(value) if isinstance(value, Mapping) else value.detach().cpu().contiguous().clone()
        for key, value in nested.items()
    }


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, error) from error


def _flat_safetensors(path: Path) -> Tensors:
    _check_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, error) from error


class _Nothing:
    """Stands for an object of Lightning's in its checkpoints, of which only the tensors are wanted; runs no code."""

    def __setstate__(self, state: object) -> None:
        """Whatever the object held is dropped."""


# Checkpoints of whole training runs (RestoreFormer's, Stable Diffusion's .ckpt) name this class beside the weights.
_HARMLESS: list[Any] = [(_Nothing, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def content(path: Path) -> Any:
    """What a pickle holds where that is no named tensors but one tensor or a list of them; raises as `read`."""
    _check_file(path)
    try:
        # The old pickle format (before torch 1.6) cannot be mapped.
        with torch.serialization.safe_globals(_HARMLESS), path.open("rb") as file:
            if path.suffix == SAFE:  # misnamed: by its path torch would hand it to safetensors
                return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointBroken(
            f"{path} is damaged, or holds Python objects besides tensors, which are not opened for safety; "
            "fetch the file again or convert it to .safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise _broken(path, error) from error


def _unpickle(path: Path) -> Mapping[str, Any]:
    found = content(path)
    if not isinstance(found, Mapping):
        raise CheckpointBroken(f"{path} holds a {type(found).__name__}, not named tensors; it is no checkpoint.")
    return found


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise WeightsMissing(f"{path} is not there; put the file in that place or give another path.")
    if path.suffix not in SUFFIXES:
        raise WrongAdapter(f"{path} is no checkpoint; files ending in {', '.join(SUFFIXES)} are.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointBroken(f"{path} cannot be read: {error.strerror}.") from error
    if not start:
        raise CheckpointBroken(f"{path} is empty; fetch the file again.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointBroken(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` where it came from.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointBroken(f"{path} is a web page, not weights; download the file itself.")


def _broken(path: Path, error: Exception) -> CheckpointBroken:
    reason = str(error).strip().splitlines()
    detail = f" ({reason[0][:120]})" if reason else ""
    return CheckpointBroken(f"{path} is truncated or damaged{detail}; fetch the file again.")


def _some(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
