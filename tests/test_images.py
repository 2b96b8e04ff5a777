from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facegen.errors import BadImage, OutputUnwritable, WrongMask
from facegen.images import from_bgr, load_mask, load_rgb, save_png, to_bgr, to_pil, to_tensor


def picture(width: int = 64, height: int = 48) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = columns * 255 // width, rows * 255 // height
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def one_sentence(error: pytest.ExceptionInfo[BadImage], *parts: str) -> None:
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert "Traceback" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (encoded(picture(400, 400), "JPEG")[:2000], "damaged"),
        (encoded(picture(400, 400))[:700], "damaged"),
        (encoded(picture())[:20], "."),
        (encoded(Image.new("RGB", (1, 1))), "1×1"),
        (b"hello, I am a letter\n" * 50, "looks like text"),
        (b"%PDF-1.7 \xff\xfe", "PDF"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(64), "HEIC"),
        (bytes(range(256)) * 4, "not a picture"),
    ],
)
def test_bad_files_give_one_sentence_with_their_name(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "me.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImage) as error:
        load_rgb(path)
    one_sentence(error, str(path), part)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BadImage) as error:
        load_rgb(tmp_path / "nobody.png")
    one_sentence(error, "nobody.png", "does not exist")
    with pytest.raises(BadImage) as error:
        load_rgb(str(tmp_path))
    one_sentence(error, "is a folder")
    with pytest.raises(BadImage) as error:
        load_rgb("a\0b.png")
    one_sentence(error, "not a valid path")


def test_too_many_pixels_are_refused_without_decoding(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (20_000, 4_000)).save(path)
    with pytest.raises(BadImage, match="million pixels"):
        load_rgb(path)


def test_a_20_megapixel_photo_is_scaled_down(tmp_path: Path) -> None:
    path = tmp_path / "camera.jpg"
    picture(5472, 3648).save(path, quality=80)
    assert load_rgb(path).size == (4096, 2731)


def test_cmyk_gray_and_binary() -> None:
    cmyk = load_rgb(encoded(picture().convert("CMYK"), "JPEG", quality=95))
    assert cmyk.mode == "RGB"
    assert np.abs(np.asarray(cmyk, int) - np.asarray(picture(), int)).mean() < 12
    for mode in ("L", "1"):
        assert load_rgb(encoded(picture().convert(mode))).mode == "RGB"


def test_16_bit_keeps_its_brightness() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
    for kind in ("PNG", "TIFF"):
        loaded = np.asarray(load_rgb(encoded(Image.fromarray(ramp), kind)), int)
        assert np.abs(loaded[:, :, 0] - ramp / 257).max() <= 1
    assert np.abs(np.asarray(load_rgb(np.stack([ramp] * 3, -1)), int)[:, :, 1] - ramp / 257).max() <= 1


def test_a_dark_16_bit_picture_stays_dark() -> None:
    dark = np.full((16, 16), 200, dtype=np.uint16)
    assert np.asarray(load_rgb(encoded(Image.fromarray(dark)))).max() <= 1


def test_transparency_is_laid_over_white() -> None:
    layer = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    layer.paste((0, 0, 255, 255), (0, 0, 16, 32))
    for data in (encoded(layer), encoded(layer, "WEBP", lossless=True)):
        pixels = np.asarray(load_rgb(data))
        assert tuple(pixels[5, 5]) == (0, 0, 255)
        assert tuple(pixels[5, 25]) == (255, 255, 255)
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    assert tuple(np.asarray(load_rgb(encoded(palette)))[3, 3]) == (200, 100, 50)
    assert tuple(np.asarray(load_rgb(encoded(palette, transparency=1)))[3, 3]) == (255, 255, 255)


@pytest.mark.parametrize(("orientation", "size"), [(1, (64, 48)), (3, (64, 48)), (6, (48, 64)), (8, (48, 64))])
def test_exif_rotation(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_rgb(encoded(picture(), "JPEG", exif=exif))
    assert loaded.size == size
    if orientation == 6:  # stored lying on its left side: the left edge becomes the top
        expected = picture().rotate(-90, expand=True)
        assert np.abs(np.asarray(loaded, int) - np.asarray(expected, int)).mean() < 8


def test_damaged_exif_is_ignored() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert load_rgb(data).size == (64, 48)


def test_arrays_tensors_and_pil_agree() -> None:
    image = picture()
    array = np.asarray(image)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 48, 64)
    assert tensor.dtype == torch.float32
    for source in (image, array, array.astype(np.float32) / 255, tensor, tensor[None], tensor.to(torch.float64)):
        assert np.array_equal(np.asarray(load_rgb(source)), array)
    assert np.array_equal(np.asarray(to_pil(tensor)), array)
    bgr = to_bgr(image)
    assert np.array_equal(bgr[:, :, ::-1], array)
    assert np.array_equal(np.asarray(from_bgr(bgr)), array)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((3, 64, 64), np.uint8),
        np.full((16, 16, 3), 7.0),
        np.full((16, 16, 3), np.nan),
        np.zeros((16, 16, 3), np.int64),
        torch.zeros(2, 3, 16, 16),
        np.zeros((0, 16, 3), np.uint8),
        42,
        None,
    ],
)
def test_bad_arrays(source: object) -> None:
    with pytest.raises(BadImage) as error:
        load_rgb(source)  # type: ignore[arg-type]
    one_sentence(error, "photo")


def test_to_pil_refuses_nan() -> None:
    with pytest.raises(BadImage, match="NaN"):
        to_pil(torch.full((3, 8, 8), torch.nan))


def test_mask() -> None:
    mask = load_mask(picture().convert("L").point(lambda value: 255 if value > 90 else 0), (64, 48))
    assert mask.shape == (1, 48, 64)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(WrongMask, match="64×48"):
        load_mask(picture(), (48, 64))
    painted = Image.new("RGBA", (64, 48), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 8, 8))
    mask = load_mask(painted, (64, 48))
    assert mask[0, 2, 2] == 1
    assert mask[0, 20, 20] == 0


def test_save_png_carries_text_and_is_atomic(tmp_path: Path) -> None:
    path = save_png(picture(), tmp_path / "new" / "out.png", {"facegen": '{"prompt": "портрет, 红发"}'})
    with Image.open(path) as image:
        assert image.text["facegen"] == '{"prompt": "портрет, 红发"}'  # type: ignore[attr-defined]
    assert [entry.name for entry in path.parent.iterdir()] == ["out.png"]
    assert os.stat(path).st_mode & 0o400


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputUnwritable, match="No space left"):
        save_png(picture(), path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        save_png(picture(), tmp_path / "file" / "out.png")
