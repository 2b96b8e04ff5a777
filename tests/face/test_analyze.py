from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from facegen.errors import BadImage, CheckpointBroken, NoFaceFound, PackageMissing, SeveralFaces, WeightsMissing
from facegen.face.analyze import FaceAnalyzer
from facegen.face.embed import ArcFace


@pytest.fixture(scope="module")
def analyzer(tiny_pack: Path) -> FaceAnalyzer:
    return FaceAnalyzer.from_pretrained(tiny_pack)


def scene(*centres: tuple[int, int], size: tuple[int, int] = (640, 640)) -> Image.Image:
    """A picture whose red discs the tiny pack takes for faces."""
    image = Image.new("RGB", size, (90, 90, 90))
    pen = ImageDraw.Draw(image)
    for x, y in centres:
        pen.ellipse((x - 40, y - 40, x + 40, y + 40), fill=(250, 40, 20))
    return image


def test_a_face_has_all_its_parts(analyzer: FaceAnalyzer) -> None:
    face = analyzer.face(scene((320, 320)))
    assert face.box.shape == (4,)
    assert face.points.shape == (5, 2)
    assert face.embedding.shape == (16,)
    assert face.embedding.dtype == np.float32
    assert 0.5 < face.score <= 1
    assert face.image.size == (640, 640)
    assert np.isclose(np.linalg.norm(face.unit), 1, atol=1e-5)
    assert not np.isclose(np.linalg.norm(face.embedding), 1, atol=1e-3)  # raw, not normalised
    assert abs(float((face.box[0] + face.box[2]) / 2) - 320) < 40


def test_the_whole_path_is_insightfaces(analyzer: FaceAnalyzer, tiny_pack: Path) -> None:
    from insightface.app import FaceAnalysis

    theirs = FaceAnalysis(name=str(tiny_pack), providers=["CPUExecutionProvider"])
    theirs.prepare(ctx_id=0, det_size=(640, 640))
    image = scene((200, 400))
    expected = theirs.get(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))[0]
    face = analyzer.face(image)
    assert np.allclose(face.box, expected.bbox)
    assert np.allclose(face.points, expected.kps)
    assert np.allclose(face.embedding, expected.embedding, atol=1e-5)


def test_the_torch_twin_sees_the_same_face(analyzer: FaceAnalyzer, tiny_pack: Path) -> None:
    import torch

    from facegen.images import to_tensor

    face = analyzer.face(scene((330, 300)))
    twin = ArcFace.from_pretrained(tiny_pack)
    embedding = twin.embed(to_tensor(face.image)[None], torch.from_numpy(face.points)[None])[0].numpy()
    assert np.abs(embedding - face.embedding).max() < 0.02


def test_sizes_are_free_and_large_photos_scale(analyzer: FaceAnalyzer) -> None:
    for size in ((100, 100), (333, 500), (2000, 1500)):
        image = scene((320, 320)).resize(size)
        face = analyzer.face(image)
        middle = (face.box[:2] + face.box[2:]) / 2
        assert np.abs(middle / np.array(size) - 0.5).max() < 0.13


def test_drawn_faces_are_found_where_they_are(mini: Path) -> None:
    from facegen.face.detect import overlap
    from facegen.images import to_pil
    from facegen.world.render import render
    from facegen.world.sampling import HELD_OUT_FROM, scenes_for

    embedded = FaceAnalyzer.from_pretrained("mini")
    drawn = render(scenes_for(0, range(HELD_OUT_FROM, HELD_OUT_FROM + 12), [1] * 12), 128)
    found = [embedded.detect(to_pil(one)) for one in drawn.rgb]
    boxes = [box.numpy() for box in drawn.box]
    best = [max((float(overlap(box, one.box[None])[0]) for one in faces), default=0.0)
            for box, faces in zip(boxes, found, strict=True)]  # fmt: skip
    assert sum(one > 0.5 for one in best) >= 11
    assert np.mean(best) > 0.75
    assert sum(map(len, found)) <= 13


def test_nothing_found(analyzer: FaceAnalyzer) -> None:
    assert analyzer.faces(Image.new("RGB", (300, 200), "gray")) == []
    with pytest.raises(NoFaceFound, match=r"No face was found in the photo; give"):
        analyzer.face(Image.new("RGB", (300, 200), "gray"))
    with pytest.raises(NoFaceFound, match=r"me\.jpg"):
        analyzer.face(Image.new("RGB", (900, 200), "gray"), what="me.jpg")


def test_selection(analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    from facegen.face.types import Detection

    def detections(_: Image.Image) -> list[Detection]:
        points = np.array([[20, 20], [40, 20], [30, 30], [22, 40], [38, 40]], np.float32)
        boxes = [(0, 0, 60, 60), (300, 300, 340, 340), (400, 0, 500, 100)]
        return [Detection(np.array(b, np.float32), 0.9 - i / 10, points) for i, b in enumerate(boxes)]

    monkeypatch.setattr(analyzer, "detect", detections)
    image = scene((320, 320))
    assert [face.score for face in analyzer.faces(image)] == sorted(
        (f.score for f in analyzer.faces(image)), reverse=True
    )
    assert analyzer.face(image, select="largest").box[0] == 400
    assert analyzer.face(image, select="central").box[0] == 300
    with pytest.raises(SeveralFaces, match="3 faces were found in the photo"):
        analyzer.face(image, select="only")
    with pytest.raises(ValueError, match="select must be"):
        analyzer.face(image, select="best")  # type: ignore[arg-type]


def test_close_ups_get_a_border(analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    learnt = analyzer._learnt

    def only_padded(bgr: Any, size: int, least: float | None = None) -> Any:
        sizes.append((bgr.shape[1], size))
        return learnt(bgr, size) if bgr.shape[1] > 500 else []

    monkeypatch.setattr(analyzer, "_learnt", only_padded)
    face = analyzer.face(scene((160, 160), size=(320, 320)))
    assert sizes[0] == (320, 640)
    assert sizes[1] == (640, 640)
    assert np.abs((face.box[:2] + face.box[2:]) / 2 - 160).max() < 60  # in pixels of the photo, not of the padded one


def test_tiny_faces_get_a_larger_look(analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def never(_: Any, size: int, least: float | None = None) -> list[Any]:
        looks.append(size)
        return []

    monkeypatch.setattr(analyzer, "_learnt", never)
    analyzer.faces(Image.new("RGB", (1600, 900)))
    assert looks[0] == 640
    assert looks[-1] == 1280
    looks.clear()
    analyzer.faces(Image.new("RGB", (300, 300)))
    assert 1280 not in looks


def test_providers_are_explicit_and_reported(
    tiny_pack: Path, analyzer: FaceAnalyzer, caplog: pytest.LogCaptureFixture
) -> None:
    assert "CPUExecutionProvider" in analyzer.providers
    with caplog.at_level(logging.WARNING):
        other = FaceAnalyzer.from_pretrained(tiny_pack, providers=["CPUExecutionProvider"])
    assert other.providers == ("CPUExecutionProvider",)
    assert not caplog.records


def test_bad_packs(tmp_path: Path, tiny_pack: Path) -> None:
    with pytest.raises(WeightsMissing, match="no such path"):
        FaceAnalyzer.from_pretrained("no_such_pack")
    with pytest.raises(WeightsMissing, match=r"no \.onnx files"):
        FaceAnalyzer.from_pretrained(tmp_path)
    shutil.copy(tiny_pack / "rec.onnx", tmp_path / "rec.onnx")
    with pytest.raises(WeightsMissing, match="no face detector"):
        FaceAnalyzer.from_pretrained(tmp_path)
    (tmp_path / "det.onnx").write_bytes((tiny_pack / "det.onnx").read_bytes()[:300])
    with pytest.raises(CheckpointBroken, match="cannot be loaded"):
        FaceAnalyzer.from_pretrained(tmp_path)
    shutil.copy(tiny_pack / "det.onnx", tmp_path / "det.onnx")
    (tmp_path / "rec.onnx").unlink()
    with pytest.raises(WeightsMissing, match="no recogniser"):
        FaceAnalyzer.from_pretrained(tmp_path)


def test_the_nested_pack_folder(tmp_path: Path, tiny_pack: Path) -> None:
    shutil.copytree(tiny_pack, tmp_path / "antelopev2" / "antelopev2")
    assert FaceAnalyzer.from_pretrained(tmp_path / "antelopev2").face(scene((320, 320))).embedding.shape == (16,)


def test_bad_photos(analyzer: FaceAnalyzer, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(BadImage, match=r"empty\.jpg is empty"):
        analyzer.face(tmp_path / "empty.jpg")


def test_the_pack_may_say_its_threshold(tmp_path: Path, tiny_pack: Path, analyzer: FaceAnalyzer) -> None:
    assert analyzer.threshold is None
    shutil.copytree(tiny_pack, tmp_path / "pack")
    (tmp_path / "pack" / "pack.json").write_text('{"same_person": 0.31}')
    assert FaceAnalyzer.from_pretrained(tmp_path / "pack").threshold == 0.31
    (tmp_path / "pack" / "pack.json").unlink()
    (tmp_path / "mini.json").write_text('{"recogniser": {"threshold_1e3": 0.55}}')
    assert FaceAnalyzer.from_pretrained(tmp_path / "pack").threshold == 0.55


def test_without_opencv_the_error_says_what_to_install(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(PackageMissing, match="libgl1"):
        FaceAnalyzer.from_pretrained(tiny_pack)
