from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facegen.face.align import similarity
from facegen.face.detect import Cascade, agree, covered, mean_shape, merge, overlap
from facegen.face.points import PointNet
from facegen.face.types import Array, Detection

# Photographs beside the checkout with one frontal face each, and about where it is.
FRONTAL = {
    "degraded_2": (98, 123, 419, 434),
    "expression_2": (170, 223, 527, 585),
    "person_a_1": (40, 130, 300, 390),
    "person_a_2": (90, 125, 330, 375),
    "portrait_03": (286, 67, 445, 225),
    "portrait_06": (238, 189, 532, 480),
    "pose_1": (170, 105, 310, 250),
}


def detection(x: float, y: float, side: float, score: float) -> Detection:
    return Detection(np.array([x, y, x + side, y + side], np.float32), score)


def test_overlap_and_cover() -> None:
    box = np.array([0.0, 0, 10, 10])
    others = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [2, 2, 4, 4]])
    assert np.allclose(overlap(box, others), [1, 1 / 3, 0, 0.04])
    assert np.allclose(covered(box, others), [1, 0.5, 0, 1])


def test_merge_keeps_the_best_of_each_place() -> None:
    kept = merge(
        [detection(0, 0, 10, 0.5), detection(1, 0, 10, 0.9), detection(50, 0, 10, 0.6), detection(3, 3, 4, 0.8)]
    )
    assert [round(d.score, 1) for d in kept] == [0.9, 0.6]
    assert merge([]) == []


def test_two_detectors_agree() -> None:
    points = np.zeros((5, 2), np.float32)
    sure = Detection(detection(0, 0, 100, 0).box, 0.8, points)
    faint = Detection(detection(300, 0, 100, 0).box, 0.35, points)
    found = agree([sure, faint], [detection(5, 5, 100, 0.3), detection(302, 0, 100, 0.4), detection(600, 0, 50, 0.4)])
    assert len(found) == 2  # a weak vote that nobody shares is none
    assert found[0].score > 0.8
    assert found[0].points is points
    assert np.array_equal(found[0].box, sure.box)
    assert found[1].points is None  # the cascade's box, whose points are still to be found
    assert found[1].box[0] == 302
    assert [d.score for d in agree([], [detection(0, 0, 50, 0.6)])] == [0.6]
    assert [d.score for d in agree([sure], [])] == [0.8]
    assert agree([faint], []) == []
    # Beside a face on which both agree, another that only one sees must be surer.
    lone = Detection(detection(600, 0, 60, 0).box, 0.6, points)
    assert len(agree([lone], [])) == 1
    assert len(agree([sure, lone], [detection(0, 0, 100, 0.5)])) == 1


def test_mean_shape_is_a_face() -> None:
    points = mean_shape(Image.new("RGB", (8, 8)), np.array([[10.0, 20, 110, 120]]))[0]
    assert points[0, 0] < points[2, 0] < points[1, 0]
    assert points[:2, 1].max() < points[2, 1] < points[3:, 1].min()


def test_nothing_in_nothing() -> None:
    cascade = Cascade()
    noise = np.random.default_rng(0).integers(0, 256, (200, 240, 3), dtype=np.uint8)
    for image in (Image.new("RGB", (300, 200), "gray"), Image.fromarray(noise), Image.new("RGB", (8, 400))):
        assert cascade(image) == []


@pytest.mark.parametrize("name", FRONTAL)
def test_frontal_faces_of_photographs(shared: Path, name: str) -> None:
    found = Cascade()(Image.open(shared / "photos" / f"{name}.jpg").convert("RGB"))
    assert overlap(np.array(FRONTAL[name], float), found[0].box[None])[0] > 0.4


def test_every_face_of_a_group(shared: Path) -> None:
    found = Cascade()(Image.open(shared / "photos" / "group_1.jpg").convert("RGB"))
    assert len(found) >= 4
    assert max(float(d.box[2] - d.box[0]) for d in found[:4]) < 60


# --- points ---------------------------------------------------------------------------------------------------------


def dots_net(path: Path, size: int = 80) -> Path:
    """A net that answers with the five places of its crop's brightest gray levels, one per fifth of its height."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ramp = np.arange(size, dtype=np.float32) / size
    constants = {
        "sharp": np.float32(40.0),
        "x": ramp.reshape(1, 1, 1, size),
        "y": ramp.reshape(1, 1, size, 1),
        "axes": np.array([2, 3], np.int64),
        "last": np.array([2], np.int64),
        "flat": np.array([0, -1], np.int64),
        "square": np.array([0, 1, size, size], np.int64),
        "rows": np.array([0, 1, 1], np.int64),
    }
    nodes = [
        helper.make_node("Mul", ["input", "sharp"], ["sharpened"]),
        helper.make_node("Reshape", ["sharpened", "flat"], ["line"]),
        helper.make_node("Softmax", ["line"], ["soft"], axis=1),
        helper.make_node("Reshape", ["soft", "square"], ["mass"]),
        helper.make_node("Mul", ["mass", "x"], ["mx"]),
        helper.make_node("Mul", ["mass", "y"], ["my"]),
        helper.make_node("ReduceSum", ["mx", "axes"], ["cx"], keepdims=0),
        helper.make_node("ReduceSum", ["my", "axes"], ["cy"], keepdims=0),
        helper.make_node("Concat", ["cx", "cy"], ["xy"], axis=1),
        helper.make_node("Unsqueeze", ["xy", "one"], ["row"]),
        helper.make_node("Concat", ["row"] * 5, ["points"], axis=1),
    ]
    constants["one"] = np.array([1], np.int64)
    graph = helper.make_graph(
        nodes,
        "dots",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, size, size])],
        [helper.make_tensor_value_info("points", TensorProto.FLOAT, ["n", 5, 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def spot(width: int, height: int, x: float, y: float, radius: float) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    light = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * radius**2))
    return Image.fromarray(np.repeat(light[:, :, None], 3, axis=2).astype(np.uint8))


@pytest.mark.parametrize(("x", "y"), [(150.0, 100.0), (181.0, 122.0), (120.0, 130.0)])
def test_points_come_back_in_pixels_of_the_photo(tmp_path: Path, x: float, y: float) -> None:
    net = PointNet(dots_net(tmp_path / "points.onnx"), ["CPUExecutionProvider"])
    boxes: Array = np.array([[90.0, 50, 210, 170], [100, 60, 200, 160]])
    points = net(spot(300, 220, x, y, 6.0), boxes)
    assert points.shape == (2, 5, 2)
    assert np.abs(points - np.array([x, y])).max() < 1.0


def test_turned_crops_turn_back(tmp_path: Path) -> None:
    net = PointNet(dots_net(tmp_path / "points.onnx"), ["CPUExecutionProvider"])
    gray = spot(300, 220, 170, 90, 6.0).convert("F")
    for turn in (-0.5, 0.0, 0.4):
        found = net._found(gray, np.array([[150.0, 110.0]]), np.array([140.0]), np.array([turn]))
        assert np.abs(found - np.array([170.0, 90.0])).max() < 1.5


def test_boxes_at_the_rim_are_fine(tmp_path: Path) -> None:
    net = PointNet(dots_net(tmp_path / "points.onnx"), ["CPUExecutionProvider"])
    points = net(spot(100, 80, 10, 10, 4.0), np.array([[-20.0, -20, 40, 40], [400, 400, 500, 500]]))
    assert np.isfinite(points).all()
    assert np.abs(points[0] - 10).max() < 1.5
    assert net(Image.new("RGB", (9, 9)), np.zeros((0, 4))).shape == (0, 5, 2)


def test_similarity_keeps_a_face_upright() -> None:
    points = mean_shape(Image.new("RGB", (8, 8)), np.array([[0.0, 0, 100, 100]]))[0]
    assert abs(similarity(points, points)[0, 1]) < 1e-9
