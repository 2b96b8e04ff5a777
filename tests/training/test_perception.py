from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from facegen.errors import CheckpointBroken, WrongRequest
from facegen.evaluation.judges import load_judges, load_network
from facegen.face.embed import ArcFace
from facegen.face.networks import (
    AMOUNTS,
    CATEGORIES,
    KINDS,
    VALUES,
    AttributeJudge,
    DetectorNet,
    JudgeNet,
    KeypointNet,
    ParsingNet,
    RecogniserNet,
    network,
)
from facegen.face.warp import ARCFACE_POINTS, aligned_crops, similarities, transform, warp
from facegen.training.augment import GENTLE, ROUGH, USUAL, wear
from facegen.training.cache import Cache
from facegen.training.crowds import CrowdSettings
from facegen.training.detector import DetectorObjective, DetectorSettings, anchors, assign, giou
from facegen.training.export import export
from facegen.training.judges import AttributeObjective, JudgeSettings, mirrored, targets_of, visible
from facegen.training.loop import Budget, LoopSettings, run
from facegen.training.mini import Workshop, finished_teacher
from facegen.training.parsing import ParsingObjective, ParsingSettings, _dice, _nearest, mirrored_classes
from facegen.training.perception import Places, take_over, train
from facegen.training.points import PointsObjective, PointsSettings
from facegen.training.recogniser import RecogniserObjective, RecogniserSettings, verification
from facegen.world.facts import FACTS, Fact, seen_facts
from facegen.world.parameters import HAIR_STYLES

FAST = LoopSettings(learning_rate=3e-3, warmup=2, average=0.5)


@pytest.fixture(scope="module")
def cache(draw_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(draw_cache(tmp_path_factory.mktemp("toy")))


def small(kind: str) -> torch.nn.Module:
    sizes: dict[str, dict[str, object]] = {
        "recogniser": {"dim": 16, "widths": (16, 16, 16)},
        "judge": {"dim": 16, "width": 16, "depth": 1, "heads": 2},
        "attributes": {"widths": (16, 16, 16, 16), "hidden": 16},
        "parsing": {"widths": (16, 16, 16, 16)},
        "detector": {"widths": (16, 16, 16, 16, 16), "neck": 16},
        "points": {"widths": (16, 16, 16, 16)},
    }
    torch.manual_seed(0)
    return network({"net": kind, **sizes[kind]})


def test_the_nets_answer_in_the_promised_shapes() -> None:
    crops = torch.rand(2, 3, 112, 112)
    assert RecogniserNet().eval()(crops).shape == (2, 128)
    assert JudgeNet().eval()(crops).shape == (2, 128)
    pictures = torch.rand(2, 3, 128, 128)
    answers = AttributeJudge().eval()(pictures)
    assert set(answers) == {*CATEGORIES, *AMOUNTS, *VALUES, *(f"fact.{kind}" for kind in KINDS)}
    assert answers["hair_style"].shape == (2, 13)
    assert answers["yaw"].shape == (2,)
    for detail in (0, 8):
        assert ParsingNet(detail=detail).eval()(pictures).shape == (2, 21, 128, 128)
    assert KeypointNet().eval()(torch.rand(2, 1, 80, 80)).shape == (2, 5, 2)
    scores, boxes, points = DetectorNet().eval()(torch.rand(2, 3, 64, 96))
    assert [s.shape for s in scores] == [(2, 8 * 12 * 2, 1), (2, 4 * 6 * 2, 1), (2, 2 * 3 * 2, 1)]
    assert boxes[0].shape[2] == 4
    assert points[0].shape[2] == 10
    with pytest.raises(ValueError, match="recogniser"):
        network({"net": "unknown"})


def test_the_perception_nets_are_small_and_of_two_kinds() -> None:
    count = {net: sum(p.numel() for p in net.parameters()) for net in (RecogniserNet(), JudgeNet(), DetectorNet())}
    assert all(size < 1.5e6 for size in count.values())
    kinds = [{type(module).__name__ for module in net.modules()} for net in count]
    assert "ResidualBlock" in kinds[0]
    assert "ResidualBlock" not in kinds[1]


def test_alignment_finds_a_known_similarity() -> None:
    angle, scale = 0.3, 1.7
    matrix = scale * torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).float()
    known = torch.cat([matrix, torch.tensor([[5.0], [-3.0]])], 1)[None]
    points = 40 * torch.rand(1, 5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(similarities(points, transform(known, points)), known, atol=1e-3)


def test_a_crop_at_the_template_is_the_picture_itself() -> None:
    picture = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(aligned_crops(picture, ARCFACE_POINTS[None]), picture, atol=1e-3)
    moved = warp(picture, torch.tensor([[[1.0, 0, 2], [0, 1, 0]]]), 112)
    assert torch.allclose(moved[..., 2:], picture[..., :-2], atol=1e-3)
    assert moved[..., :2].max() < 1e-4


def test_alignment_agrees_with_insightface() -> None:
    face_align = pytest.importorskip("insightface.utils.face_align")
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 3, 20, 20, generator=generator)
    picture = torch.nn.functional.interpolate(picture, (160, 160), mode="bicubic").clamp(0, 1)
    points = (ARCFACE_POINTS + 3 * torch.randn(5, 2, generator=generator)) * 0.8 + 30
    array = (picture[0].permute(1, 2, 0) * 255).round().byte().numpy()
    theirs = torch.from_numpy(face_align.norm_crop(array, points.numpy())).permute(2, 0, 1).float() / 255
    ours = aligned_crops(picture, points[None])[0]
    assert (ours - theirs).abs().mean() < 0.01


def test_wear_keeps_shape_and_range_and_is_repeatable() -> None:
    pictures = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    for settings in (GENTLE, USUAL, ROUGH):
        first = wear(pictures, settings, torch.Generator().manual_seed(1))
        assert first.shape == pictures.shape
        assert 0 <= float(first.min()) <= float(first.max()) <= 1
        assert torch.equal(first, wear(pictures, settings, torch.Generator().manual_seed(1)))
    gray = pictures[:, :1]
    assert wear(gray, ROUGH, torch.Generator().manual_seed(2)).shape == gray.shape


def test_the_recogniser_learns_who_is_who(cache: Cache, tmp_path: Path) -> None:
    settings = RecogniserSettings(steps=40, batch=16, wear=GENTLE)
    objective = RecogniserObjective(small("recogniser"), cache, cache, settings)
    first = objective.loss(objective.batch(0, torch.Generator().manual_seed(0)), 0, torch.Generator())
    measured = run(objective, tmp_path, Budget(steps=40), FAST)
    assert measured["train_loss"] < 0.95 * first["loss"].item()
    assert measured["auc"] > 0.6
    assert {"tar_1e2", "tar_1e3", "same_cosine", "other_cosine", "threshold_1e3"} <= set(measured)


def test_verification_of_perfect_and_of_random_embeddings() -> None:
    labels = torch.arange(20).repeat_interleave(3)
    perfect = verification(torch.eye(20)[labels], labels)
    assert perfect["auc"] == 1.0
    assert perfect["tar_1e3"] == 1.0
    random = verification(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), labels)
    assert 0.3 < random["auc"] < 0.7


def test_a_mirrored_picture_has_mirrored_targets(cache: Cache) -> None:
    scenes = cache.scenes(torch.arange(4))
    targets = targets_of(scenes)
    flipped = targets_of(mirrored(scenes, torch.tensor([True, False, True, False])))
    assert torch.equal(flipped["yaw"][::2], -targets["yaw"][::2])
    assert torch.equal(flipped["yaw"][1::2], targets["yaw"][1::2])
    assert torch.equal(flipped["eye_close_left"][0], targets["eye_close_right"][0])
    assert torch.equal(flipped["hair_style"], targets["hair_style"])
    looking = {0: 2, 1: 1, 2: 0, -1: -1}
    assert flipped["fact.looking"][0] == looking[int(targets["fact.looking"][0])]
    names = ("background", "l_eye", "r_eye", "l_lip", "u_lip", "ear_r")
    assert mirrored_classes(names).tolist() == [0, 2, 1, 3, 4, 5]


def test_the_judge_is_asked_for_hair_that_can_be_seen(cache: Cache) -> None:
    style = {name: float(place) for place, name in enumerate(HAIR_STYLES)}
    worn = torch.tensor([style["bob"], style["buzz cut"], style["buzz cut"], style["bald"]])
    hats = torch.tensor([1.0, 1.0, 0.0, 0.0])  # a bob shows below a beanie, a buzz cut does not
    weights = visible(targets_of(cache.scenes(torch.arange(4)).with_values(hair_style=worn, hat=hats)))
    assert weights["hair_color"].tolist() == [1, 0, 1, 0]
    assert weights["hair_style"].tolist() == [1, 0, 1, 1]
    assert weights["hat_color"].tolist() == [1, 1, 0, 0]


def test_classes_stay_beside_the_middle_of_their_pixels() -> None:
    seen = torch.rand(1, 96, 96, generator=torch.Generator().manual_seed(0))  # what a place twice as fine shows
    classes = (seen[:, 1::2, 1::2] * 9).byte()  # the world takes the lower right of four
    size = classes.shape[-1]
    stay = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    assert torch.equal(_nearest(classes, stay, size), classes.long())
    ramp = torch.arange(size).expand(1, size, size)  # the class is the column
    moved = _nearest(ramp.byte(), torch.tensor([[[-1.0, 0, size - 0.9], [0, 1, 0]]]), size)
    # Column j of the mirror shows the place j + 0.25, which was size - 0.9 - j - 0.25, in column size - 1.4 - j.
    assert moved[0, 0, 5] == round(size - 1.4 - 5)


def test_a_small_class_counts_as_much_as_a_large_one() -> None:
    classes = torch.zeros(1, 40, 40, dtype=torch.long)
    classes[0, :2, :2] = 1
    sure = 0.999 * torch.nn.functional.one_hot(classes, 3).movedim(-1, 1) + 0.0005
    blind = sure.clone()
    blind[0, 0, :2, :2], blind[0, 1, :2, :2] = 0.999, 0.0005

    def loss(chances: Tensor) -> float:
        return float(_dice(chances, chances.gather(1, classes[:, None])[:, 0], classes))

    assert loss(sure) < 0.1
    assert loss(blind) > 0.35  # a four hundredth of the pixels is nearly half of the loss


def test_a_net_begins_with_what_an_earlier_one_knows(tmp_path: Path) -> None:
    before = ParsingNet(20, (8, 8, 8, 8))
    net = ParsingNet(21, (8, 8, 8, 8), detail=8)
    take_over(net, before.state_dict())
    pictures = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        known = net.eval()(pictures)[:, :20] - net.mend[1].bias[:20].view(1, -1, 1, 1)
        assert torch.allclose(known, before.eval()(pictures), atol=1e-5)
    with pytest.raises(WrongRequest, match="is of other sizes"):
        take_over(net, ParsingNet(20, (8, 8, 8, 16)).state_dict())


@pytest.mark.parametrize("kind", ["attributes", "parsing", "points"])
def test_losses_of_the_judges_fall(kind: str, cache: Cache, tmp_path: Path) -> None:
    net = small(kind)
    objective = {
        "attributes": lambda: AttributeObjective(net, cache, cache, JudgeSettings(batch=16)),  # type: ignore[arg-type]
        "parsing": lambda: ParsingObjective(net, cache, cache, ParsingSettings(batch=8)),  # type: ignore[arg-type]
        "points": lambda: PointsObjective(net, cache, cache, PointsSettings(batch=16)),  # type: ignore[arg-type]
    }[kind]()
    first = objective.loss(objective.batch(0, torch.Generator().manual_seed(0)), 0, torch.Generator())
    measured = run(objective, tmp_path, Budget(steps=25), FAST)
    assert measured["train_loss"] < first["loss"].item()
    assert all(np.isfinite(value) for value in measured.values())


def test_each_face_is_answered_for_by_anchors_of_its_size(cache: Cache) -> None:
    objective = DetectorObjective(small("detector"), cache, cache, DetectorSettings(batch=6))  # type: ignore[arg-type]
    batch = objective.batch(0, torch.Generator().manual_seed(3))
    assert batch["pictures"].shape == (6, 3, 320, 320)
    right = batch["scores"] == 1
    assert right.any()
    sides = (batch["boxes"][..., 2:] - batch["boxes"][..., :2]).amax(2)[right]
    assert sides.min() > 10
    loss = objective.loss(batch, 0, torch.Generator())["loss"]
    assert torch.isfinite(loss)
    centres = anchors(320)[0]
    inside = (centres >= 0).all() and (centres < 320).all()
    assert inside


def test_every_face_of_a_crowd_has_an_anchor(cache: Cache) -> None:
    from facegen.training.crowds import crowd

    grid = anchors(320)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        one = crowd(cache, CrowdSettings(), generator)
        score, boxes, _ = assign(one, grid)
        answered = {tuple(box.tolist()) for box in boxes[score == 1]}
        assert answered == {tuple(box.tolist()) for box in torch.from_numpy(one.boxes)}


def test_giou_of_equal_and_of_distant_boxes() -> None:
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert float(giou(box, box)) == pytest.approx(1.0)
    assert float(giou(box, box + 100)) < -0.9


def test_the_exported_pack_keeps_insightface_s_contract(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    detector, recogniser = small("detector"), small("recogniser")
    for net in (detector, recogniser):
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    export("detector", detector, tmp_path)
    export("recogniser", recogniser, tmp_path)
    export("points", small("points"), tmp_path)

    session = onnxruntime.InferenceSession(tmp_path / "pack" / "det.onnx", providers=["CPUExecutionProvider"])
    picture = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    outputs = session.run(None, {"input": picture.numpy()})
    cells = [12 * 20 * 2, 6 * 10 * 2, 3 * 5 * 2]
    assert [o.shape for o in outputs] == [(n, size) for size in (1, 4, 10) for n in cells]
    with torch.no_grad():
        scores, boxes, points = detector(picture)
    ours = [s[0].sigmoid() for s in scores] + [b[0] for b in boxes] + [p[0] for p in points]
    assert max(float((torch.from_numpy(a) - b).abs().max()) for a, b in zip(outputs, ours, strict=True)) < 1e-4

    session = onnxruntime.InferenceSession(tmp_path / "pack" / "rec.onnx", providers=["CPUExecutionProvider"])
    crops = torch.rand(3, 3, 112, 112)
    with torch.no_grad():
        expected: Tensor = recogniser(crops)
    assert np.abs(session.run(None, {"input": crops.numpy()})[0] - expected.numpy()).max() < 1e-4


def test_an_exported_pack_keeps_its_weights_once(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pack = tmp_path / "pack"
    for name, stem in (("detector", "det"), ("recogniser", "rec")):
        export(name, small(name), tmp_path)
        graph, weights = pack / f"{stem}.onnx", pack / f"{stem}.safetensors"
        onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        alone = tmp_path / graph.name
        shutil.copy(graph, alone)
        with pytest.raises(Exception, match="half"):
            onnxruntime.InferenceSession(alone, providers=["CPUExecutionProvider"])
        large = [one for one in load_file(weights).values() if one.numel() >= 512]
        assert large
        assert not any(one.numpy().tobytes() in graph.read_bytes() for one in large)
    with pytest.raises(CheckpointBroken, match=r"rec\.onnx are not beside it; fetch the files again"):
        ArcFace.from_pretrained(tmp_path / "rec.onnx")


def test_insightface_loads_an_exported_pack(tmp_path: Path) -> None:
    pytest.importorskip("insightface")
    from insightface.app import FaceAnalysis

    for name in ("detector", "recogniser", "points"):
        export(name, small(name), tmp_path)
    app = FaceAnalysis(name=str(tmp_path / "pack"), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(128, 128))
    assert set(app.models) == {"detection", "recognition"}
    assert isinstance(app.get(np.zeros((100, 140, 3), np.uint8)), list)


def test_a_stage_trains_exports_records_and_its_judges_load(cache: Cache, tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    for stage in ("judge", "attributes", "parsing", "detector"):
        places = Places(cache.folder, None, tmp_path / stage, assets)
        train(stage, places, Budget(steps=1))
    assert (assets / "mini.json").exists()
    judges = load_judges(assets)
    pictures = torch.rand(3, 3, 96, 96)
    embeddings = judges.embed(pictures, ARCFACE_POINTS.expand(3, 5, 2) * 96 / 112)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3), atol=1e-4)
    assert judges.embed(pictures).shape == (3, 128)
    answers = judges.attributes(pictures)
    assert torch.allclose(answers["hat"].sum(1), torch.ones(3), atol=1e-4)
    assert judges.facts(pictures)["expression"].shape == (3, 10)
    (seen, *_) = seen_facts([Fact("hat", "beanie"), Fact("eye_color", "blue")], answers)
    assert set(seen) == {Fact("hat", "beanie"), Fact("eye_color", "blue")}
    assert judges.parse(pictures).shape == (3, 96, 96)
    points, found = judges.points(pictures)
    assert points.shape == (3, 5, 2)
    assert found.shape == (3,)
    assert isinstance(load_network(assets / "pack" / "det"), DetectorNet)


def test_a_teacher_of_attributes_is_recorded_and_does_not_ship(cache: Cache, tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    train("teacher", Places(cache.folder, None, tmp_path / "teacher", assets), Budget(steps=1))
    assert [path.name for path in assets.iterdir()] == ["mini.json"]
    teacher = finished_teacher(Workshop(tmp_path, output=assets))
    facts = teacher.facts(torch.rand(2, 3, 128, 128))
    assert {kind: answers.shape[1] for kind, answers in facts.items()} == {k: len(v) for k, v in FACTS.items()}
    assert not any(weight.requires_grad for weight in teacher.parameters())
