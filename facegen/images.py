"""The only place where files, PIL pictures, NumPy arrays (RGB and BGR) and tensors turn into one another.

Inside the package a picture is a PIL image in mode RGB with 8 bits a channel, upright (EXIF applied), or a float tensor
(3, H, W) in [0, 1]. BGR exists only at the door of insightface and OpenCV.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from facegen.errors import BadImage, WrongMask
from facegen.files import atomic

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | Tensor"

MAX_PIXELS = 64_000_000  # beyond it decoding alone takes a gigabyte; nobody's camera portrait is that large
MAX_SIDE = 4096  # larger pictures are scaled down: a face never needs more, and 20-MP photos stay quick
MIN_SIDE = 8

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)
_HEIC_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"hevc")


def load_rgb(source: ImageSource, *, what: str = "photo") -> Image.Image:
    """Read anything that is a picture as RGB, 8 bit, upright.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) in RGB order, tensors (3, H, W) or (1, 3, H, W); floats are
    in [0, 1]. Transparency is laid over white, sides above `MAX_SIDE` are scaled down. `what` names the picture in
    errors.
    Raises `BadImage` with one sentence naming the file.
    """
    return _to_rgb(_open(source, what), background=255)


def load_mask(source: ImageSource, size: tuple[int, int], *, what: str = "mask") -> Tensor:
    """Read a mask as (1, H, W) float32 in [0, 1], white = 1; `size` is (width, height) of the picture it belongs to.

    Transparent pixels count as black. Raises `WrongMask` when the sizes differ, `BadImage` when it is not a picture.
    """
    import torch

    gray = _to_rgb(_open(source, what), background=0).convert("L")
    if gray.size != tuple(size):
        raise WrongMask(
            f"The {_name(source, what)} is {gray.width}×{gray.height} pixels but its picture is {size[0]}×{size[1]}; "
            "draw the mask on a copy of the picture so that both have the same size."
        )
    return torch.from_numpy(np.asarray(gray, dtype=np.float32) / 255.0)[None]


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1] from a PIL picture."""
    import torch

    array = np.array(image if image.mode == "RGB" else _to_rgb(image, background=255), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(255.0)


def to_pil(tensor: Tensor) -> Image.Image:
    """A PIL picture from (3, H, W), (1, H, W) or (1, C, H, W) floats, clipped to [0, 1] and rounded to 8 bit."""
    import torch

    pixels = tensor.detach().squeeze(0) if tensor.ndim == 4 else tensor.detach()
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise BadImage(f"A picture needs the shape (3, H, W) or (1, H, W); this tensor has {tuple(tensor.shape)}.")
    if not pixels.isfinite().all():
        raise BadImage("The picture holds NaN or infinite values; try dtype float32 (half precision may overflow).")
    if pixels.is_floating_point():
        pixels = pixels.float().clamp(0, 1).mul(255).round()
    array = pixels.to(device="cpu", dtype=torch.uint8).permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    return Image.fromarray(array)


def to_bgr(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 3) uint8 in OpenCV's channel order, contiguous."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.uint8)[:, :, ::-1])


def from_bgr(array: np.ndarray[Any, Any]) -> Image.Image:
    """A PIL picture from an OpenCV array (H, W, 3) uint8."""
    return Image.fromarray(np.ascontiguousarray(array[:, :, ::-1]))


def save_png(image: Image.Image, path: str | os.PathLike[str], text: Mapping[str, str] | None = None) -> Path:
    """Write a PNG with text chunks, whole or not at all (temporary file in the same folder, then a rename).

    Missing folders are made. Raises `OutputUnwritable`.
    """
    target = Path(path)
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)  # iTXt is UTF-8: prompts are written in any script
    with atomic(target) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return target


def _name(source: object, what: str) -> str:
    if isinstance(source, str | os.PathLike):
        return f"{what} {os.fspath(source)}"
    filename = getattr(source, "filename", "")
    return f"{what} {filename}" if isinstance(filename, str) and filename else what


def _open(source: ImageSource, what: str) -> Image.Image:
    """Decoded, upright, of reasonable size, in whatever mode it was stored."""
    name = _name(source, what)
    if isinstance(source, Image.Image):
        image = _decode(source, name)
    elif isinstance(source, np.ndarray):
        image = _from_array(source, name)
    elif isinstance(source, bytes | bytearray):
        image = _from_bytes(bytes(source), name)
    elif isinstance(source, str | os.PathLike):
        image = _from_bytes(_read(Path(source), name), name)
    elif _is_tensor(source):
        image = _from_tensor(source, name)
    else:
        raise BadImage(
            f"The {name} is a {type(source).__name__}; give a path, bytes, a PIL image, an array or a tensor."
        )
    _check_size(image, name)
    image = _upright(image, name)
    if max(image.size) > MAX_SIDE:
        factor = MAX_SIDE / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image if image.mode not in ("P", "1") else image.convert("RGBA")
        # reducing_gap decimates first: several times quicker on 20-MP photos at the same visible quality
        image = image.resize(size, Image.Resampling.LANCZOS if image.mode != "I;16" else None, reducing_gap=3.0)
    return image


def _read(path: Path, name: str) -> bytes:
    try:
        if path.is_dir():
            raise BadImage(f"The {name} is a folder; give the picture files inside it one by one.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadImage(f"The {name} does not exist; check the path (the current folder is {Path.cwd()}).") from error
    except OSError as error:
        raise BadImage(f"The {name} cannot be read: {error.strerror or error}; check its permissions.") from error
    except ValueError as error:  # a NUL byte in the path
        raise BadImage(f"The {name!r} is not a valid path; check it for stray characters.") from error


def _from_bytes(data: bytes, name: str) -> Image.Image:
    if not data:
        raise BadImage(f"The {name} is empty (0 bytes); copy or download it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of large pictures and odd EXIF; we judge the size ourselves
            image = Image.open(io.BytesIO(data))
            return _decode(image, name)
    except Image.DecompressionBombError as error:
        raise BadImage(_too_large(name)) from error
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
            raise BadImage(
                f"The {name} is a HEIC picture, which cannot be read here; save it as JPEG or PNG."
            ) from error
        raise BadImage(
            f"The {name} is not a picture that can be read{_looks_like(data)}; give a JPEG, PNG or WebP file."
        ) from error
    except BadImage:
        raise
    except _DECODE_ERRORS as error:
        raise BadImage(_broken(name)) from error


def _looks_like(data: bytes) -> str:
    head = data[:512]
    if head.startswith(b"%PDF"):
        return " (it is a PDF)"
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character cut at the end of the sample does not count
            return ""
    return " (it looks like text)"


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        image.load()
    except _DECODE_ERRORS as error:
        raise BadImage(_broken(name)) from error
    return image


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise BadImage(
            f"The {name} is only {width}×{height} pixels; a usable picture has at least {MIN_SIDE} pixels a side."
        )
    if width * height > MAX_PIXELS:
        raise BadImage(_too_large(name, f" ({width}×{height})"))


def _too_large(name: str, size: str = "") -> str:
    return f"The {name}{size} has more than {MAX_PIXELS // 1_000_000} million pixels; scale it down first."


def _broken(name: str) -> str:
    return f"The {name} is damaged or cut off in the middle; copy or download it again."


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (*_DECODE_ERRORS, KeyError, TypeError, ZeroDivisionError) as error:
        log.warning("The %s has damaged EXIF data, which is ignored (%s).", name, error)
        return image


def _from_array(array: np.ndarray[Any, Any], name: str) -> Image.Image:
    pixels = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise BadImage(f"The {name} has the shape {array.shape}; an array must be (H, W), (H, W, 3) or (H, W, 4).")
    if pixels.dtype == np.uint16:
        pixels = _from_16_bit(pixels)
    elif pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    elif np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all() or pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3:
            raise BadImage(f"The {name} is an array of floats outside [0, 1]; scale it first, or give it as uint8.")
        pixels = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise BadImage(f"The {name} is an array of {array.dtype}; give uint8, uint16 or floats in [0, 1].")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _is_tensor(source: object) -> bool:
    torch = sys.modules.get("torch")  # whoever hands us a tensor has imported torch already
    return torch is not None and isinstance(source, torch.Tensor)


def _from_tensor(tensor: Tensor, name: str) -> Image.Image:
    pixels = tensor.detach().cpu()
    if pixels.ndim == 4 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4):
        raise BadImage(f"The {name} has the shape {tuple(tensor.shape)}; a tensor must be (3, H, W) or (1, 3, H, W).")
    if pixels.is_floating_point():
        pixels = pixels.float()
    return _from_array(pixels.permute(1, 2, 0).numpy(), name)


def _from_16_bit(array: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    scaled: np.ndarray[Any, np.dtype[np.uint8]] = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return scaled


def _to_rgb(image: Image.Image, *, background: int) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_deep_gray(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (background, background, background, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return image.convert("RGB")


def _deep_gray(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """8 bit from gray values of 16 or 32 bit or floats, of which files do not say the range."""
    array = np.nan_to_num(values.astype(np.float64))
    top = array.max(initial=0.0)
    limit = next((limit for limit in (1.0, 255.0, 65535.0) if top <= limit), top)
    if np.issubdtype(values.dtype, np.integer):
        limit = 65535.0 if values.dtype == np.uint16 else max(limit, 65535.0 if top > 255 else 255.0)
    scaled: np.ndarray[Any, np.dtype[np.uint8]] = np.round(np.clip(array / limit, 0, 1) * 255).astype(np.uint8)
    return scaled
