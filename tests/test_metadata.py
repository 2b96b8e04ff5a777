"""A saved picture says how it was made, and where it cannot, one sentence says so."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facegen import metadata
from facegen.errors import BadImage, NoMetadata, OutputUnwritable, WrongRequest


@pytest.fixture
def record() -> metadata.Record:
    return metadata.Record(
        pipeline="generate",
        loaded={"model": "mini"},
        request={"prompt": "ein Porträt, 肖像 🙂", "seed": 7, "strength": [0.0, 1.0]},
        index=2,
    )


def noise(side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_what_is_saved_is_read(tmp_path: Path, record: metadata.Record) -> None:
    picture = metadata.Picture.of(noise(), record)
    picture.save(tmp_path / "a.png")
    assert metadata.read(tmp_path / "a.png") == record
    assert os.listdir(tmp_path) == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(noise()))
        assert metadata.SOURCE_TYPE in image.info["XML:com.adobe.xmp"]
        assert image.info["Software"].startswith("facegen ")
        assert json.loads(image.info["facegen"])["ai_generated"] is True


def test_an_edited_picture_does_not_claim_the_call(tmp_path: Path, record: metadata.Record) -> None:
    picture = metadata.Picture.of(noise(), record)
    picture.resize((8, 8)).save(tmp_path / "a.png")
    with pytest.raises(NoMetadata, match="carries no facegen metadata"):
        metadata.read(tmp_path / "a.png")


def test_other_formats_are_saved_as_by_pil(tmp_path: Path, record: metadata.Record) -> None:
    metadata.Picture.of(noise(), record).save(tmp_path / "a.jpg", quality=90)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.size == (16, 16)


def test_damaged_metadata_and_files(tmp_path: Path) -> None:
    from facegen.images import save_png

    for text in (
        "{",
        "[]",
        '{"pipeline": "x"}',
        "null",
        '{"pipeline":1,"loaded":2,"request":3,"index":4,"report":5,"version":6}',
    ):
        save_png(noise(), tmp_path / "a.png", {"facegen": text})
        with pytest.raises(NoMetadata, match="damaged"):
            metadata.read(tmp_path / "a.png")
    (tmp_path / "t.png").write_text("hello")
    with pytest.raises(BadImage, match="text"):
        metadata.read(tmp_path / "t.png")
    with pytest.raises(BadImage, match="not exist"):
        metadata.read(tmp_path / "none.png")


def test_an_unwritable_place_is_one_sentence(tmp_path: Path, record: metadata.Record) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        metadata.Picture.of(noise(), record).save(tmp_path / "file" / "a.png")


def test_photos_are_recorded_by_path_and_checksum(tmp_path: Path) -> None:
    noise().save(tmp_path / "me.png")
    data = (tmp_path / "me.png").read_bytes()
    written = metadata.photo_record(tmp_path / "me.png")
    assert written == {"path": str(tmp_path / "me.png"), "sha256": hashlib.sha256(data).hexdigest()}
    assert metadata.changed(written) == ""
    assert metadata.photo_record(data)["sha256"] == written["sha256"]
    assert metadata.photo_record(noise()) == metadata.photo_record(np.asarray(noise()))
    noise(17).save(tmp_path / "me.png")
    assert "has changed" in metadata.changed(written)
    (tmp_path / "me.png").unlink()
    assert "not there" in metadata.changed(written)
    with pytest.raises(WrongRequest, match="not a file"):
        metadata.photo_read(metadata.photo_record(noise()))
    assert metadata.photo_record("example:3", lambda name: noise())["path"] == "example:3"
