"""From a photo to its faces: detection, points and embedding through insightface, on any pack of its format."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from facegen.errors import CheckpointBroken, NoFaceFound, PackageMissing, SeveralFaces, WeightsMissing
from facegen.face.detect import FINE, Cascade, PointFinder, Trust, agree, mean_shape, merge
from facegen.face.points import PointNet
from facegen.face.types import Array, Detection, Face
from facegen.hub import pack_folder, resolve
from facegen.images import ImageSource, load_rgb, to_bgr

log = logging.getLogger(__name__)

Select = Literal["only", "largest", "central", "all"]
SELECTIONS: tuple[Select, ...] = ("only", "largest", "central")

_SIZE = 640  # what the packs' detectors and every adapter's own code were tuned to
_SMALL = 320  # what the embedded detector was taught on
_MEASURED = ("recogniser", "threshold_1e3")  # one stranger in a thousand passes
_LEAST = 128  # pixels; what the embedded detector's canvas measures at least
_DRAWN = 256  # pixels; photographs are larger, and the cascade takes a second
_FAINT = Trust().faint
_MODULES = ["detection", "recognition"]


class FaceAnalyzer:
    """A pack of insightface's format, loaded. `from_pretrained` is the way in."""

    def __init__(self, folder: Path, *, name: str, providers: Sequence[str] | None = None) -> None:
        self.name = name
        self.folder = folder
        wanted = list(providers) if providers is not None else default_providers()
        self.app = _load(folder, wanted)
        self.app.prepare(ctx_id=0, det_size=(_SIZE, _SIZE))
        self.providers = _used(self.app, wanted)
        # The embedded pack learnt from drawings; photographs get a classical detector beside it.
        has_points = (folder / "points.onnx").is_file()
        self.points: PointFinder = PointNet(folder / "points.onnx", wanted) if has_points else mean_shape
        self.cascade: Cascade | None = Cascade() if has_points or name == "mini" else None
        self.size = _SMALL if self.cascade is not None else _SIZE

    @classmethod
    def from_pretrained(cls, pack: str | Path = "mini", *, providers: Sequence[str] | None = None) -> FaceAnalyzer:
        """A pack by name ("mini", "buffalo_l", "antelopev2") or folder.

        `providers` are onnxruntime's, best first; without them CUDA where onnxruntime has it, then the CPU.
        Raises WeightsMissing, CheckpointBroken, PackageMissing.
        """
        path = Path(pack).expanduser()
        if path.is_dir():
            return cls(pack_folder(path), name=str(pack), providers=providers)
        if str(pack) == "mini":
            return cls(resolve("mini", part="pack"), name="mini", providers=providers)
        return cls(pack_folder(resolve(str(pack))), name=str(pack), providers=providers)

    @property
    def threshold(self) -> float | None:
        """The cosine from which on two photos count as one person; None where that was not measured.

        It stands in the pack's own pack.json, or beside it in the embedded model's mini.json.
        """
        for file, keys in (
            (self.folder / "pack.json", ("same_person",)),
            (self.folder.parent / "mini.json", _MEASURED),
        ):
            value: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, (int, float)):
                return float(value)
        return None

    def faces(self, photo: ImageSource, *, what: str = "photo") -> list[Face]:
        """All faces of a photo by descending score; an empty list where there is none. Raises BadImage."""
        image = load_rgb(photo, what=what)
        bgr = to_bgr(image)
        found = []
        for detection in self.detect(image):
            assert detection.points is not None
            embedding = self.embed(bgr, detection.points)
            found.append(Face(detection.box, detection.points, detection.score, embedding, image))
        return found

    def face(self, photo: ImageSource, *, select: Select = "largest", what: str = "photo") -> Face:
        """One face of a photo: the only, the largest or the most central one.

        Raises NoFaceFound, BadImage, and SeveralFaces where `select` is "only" and there are more.
        """
        if select not in SELECTIONS:
            raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, not {select!r}.")
        return choose(self.faces(photo, what=what), select, "the photo" if what == "photo" else what)

    def embed(self, bgr: Array, points: Array) -> Array:
        """Raw embedding (D,) float32 of the face with these points (5, 2) in a BGR picture."""
        from insightface.app.common import Face as Record

        record = Record(kps=np.asarray(points, np.float32))
        return np.asarray(self.app.models["recognition"].get(bgr, record), np.float32).flatten()

    def detect(self, image: Image.Image) -> list[Detection]:
        """Detections with points, by descending score; close-ups and tiny faces get a second look."""
        bgr = to_bgr(image)
        found = self._look(image, bgr, self.cascade)
        if not found:
            # Faces that fill the picture: the detectors know faces with some air around them.
            border = max(image.size) // 2
            padded = np.pad(bgr, ((border, border), (border, border), (0, 0)))
            close = [self._learnt(padded, size) for size in (self.size, self.size // 2)]
            found = merge([_shifted(detection, -border) for detections in close for detection in detections])
        if not found and max(image.size) > self.size:
            found = self._learnt(bgr, 2 * self.size)
        if not found and self.cascade is not None and max(image.size) > _SMALL:
            found = self._look(image, bgr, Cascade(FINE))
        if not found:
            return found
        # The net of points is twice as exact as the embedded detector's own points, and keeps its head when turned.
        points = self.points(image, np.stack([detection.box for detection in found]))
        exact = isinstance(self.points, PointNet)
        return [
            replace(d, points=p if exact or d.points is None else d.points) for d, p in zip(found, points, strict=True)
        ]

    def _look(self, image: Image.Image, bgr: Array, cascade: Cascade | None) -> list[Detection]:
        if cascade is None:
            return self._learnt(bgr, self.size)
        learnt = self._learnt(bgr, self._side(image), least=_FAINT)
        if max(image.size) <= _DRAWN and any(detection.score >= Trust().alone for detection in learnt):
            cascade = None  # most likely a picture of the embedded model's own, which its detector knows
        return agree(learnt, cascade(image) if cascade is not None else [])

    def _side(self, image: Image.Image) -> int:
        """The square that the embedded detector looks at: its own model's pictures are not enlarged.

        Of 200 held-out drawings of 128 pixels, seen at 320 it found 98.5 % at an overlap of .5 (mean .78) and .09
        false faces a picture, seen as they are 99.5 % (.84) and .03.
        """
        longest = max(image.size)
        return self.size if longest > _DRAWN else max(_LEAST, -(-longest // 32) * 32)

    def _learnt(self, bgr: Array, size: int, least: float | None = None) -> list[Detection]:
        """The pack's own detector on the picture scaled into a square of `size` pixels; scores of `least` or more.

        The size is given with each call: since insightface 2.1 setting `input_size` has no effect, and `prepare`
        without a size runs two scales.
        """
        boxes, points = self.app.det_model.detect(bgr, input_size=(size, size), det_thresh=least)
        if points is None:
            raise WeightsMissing(
                f"The detector in {self.folder} finds boxes only; the pack needs one with points (SCRFD …kps.onnx)."
            )
        return [
            Detection(np.asarray(box[:4], np.float32), float(box[4]), np.asarray(five, np.float32))
            for box, five in zip(boxes, points, strict=True)
            if box[2] - box[0] > 1 and box[3] - box[1] > 1
        ]


def choose(faces: Sequence[Face], select: Select, name: str = "the photo") -> Face:
    """One of a photo's faces: the only, the largest or the most central one. Raises NoFaceFound, SeveralFaces."""
    if not faces:
        raise NoFaceFound(f"No face was found in {name}; give a photo with one clear face, looking at the camera.")
    if select == "only" and len(faces) > 1:
        raise SeveralFaces(
            f"{len(faces)} faces were found in {name}; crop it to one person, or choose the largest or central."
        )
    if select == "central":
        middle = np.array(faces[0].image.size) / 2
        return min(faces, key=lambda face: float(np.linalg.norm((face.box[:2] + face.box[2:]) / 2 - middle)))
    return max(faces, key=lambda face: face.area)


def default_providers() -> list[str]:
    """CUDA where this onnxruntime has it, and the CPU."""
    _need_opencv()
    import onnxruntime

    there = onnxruntime.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there] or list(there)


def _load(folder: Path, providers: list[str]) -> Any:
    """insightface's FaceAnalysis with detection and recognition alone."""
    _need_opencv()
    from insightface.app import FaceAnalysis

    if not any(folder.glob("*.onnx")):
        raise WeightsMissing(
            f"{folder} holds no .onnx files; put a detector and a recogniser of insightface's format there."
        )
    try:
        app = FaceAnalysis(name=str(folder), allowed_modules=_MODULES, providers=providers)
    except AssertionError as error:
        raise WeightsMissing(f"{folder} holds no face detector; put the pack's SCRFD .onnx file there.") from error
    except Exception as error:  # onnxruntime has a class of its own for each way a file can be damaged
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise CheckpointBroken(f"The face pack in {folder} cannot be loaded ({reason}); fetch it again.") from error
    if "recognition" not in app.models:
        raise WeightsMissing(f"{folder} holds no recogniser; put the pack's ArcFace .onnx file there.")
    return app


def _used(app: Any, wanted: Sequence[str]) -> tuple[str, ...]:
    """The providers that really run; onnxruntime falls back to the CPU without an error."""
    used = tuple(dict.fromkeys(name for model in app.models.values() for name in model.session.get_providers()))
    if wanted and wanted[0] not in used:
        log.warning("Face analysis runs on %s: %s is not available here.", ", ".join(used), wanted[0])
    return used


def _need_opencv() -> None:
    try:
        import cv2  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError as error:
        raise PackageMissing(
            f"OpenCV cannot be loaded ({error}); install the system library (Debian, Ubuntu: apt install libgl1 "
            "libglib2.0-0) or replace opencv-python by opencv-python-headless."
        ) from error


def _shifted(detection: Detection, by: float) -> Detection:
    points = None if detection.points is None else (detection.points + by).astype(np.float32)
    return Detection((detection.box + by).astype(np.float32), detection.score, points)
