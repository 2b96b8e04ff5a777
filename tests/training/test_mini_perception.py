"""The embedded model's perception, on people it has never seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from facegen.evaluation.judges import Judges, load_judges
from facegen.training.recogniser import verification
from facegen.world.facts import FACTS, UNSEEN, labels
from facegen.world.parameters import Scenes
from facegen.world.render import Rendering, render
from facegen.world.sampling import HELD_OUT_FROM, scenes_for

ASSETS = Path(__file__).resolve().parents[2] / "facegen" / "assets" / "mini"
pytestmark = pytest.mark.skipif(
    not (ASSETS / "judges" / "parsing.safetensors").exists() or not (ASSETS / "pack" / "det.onnx").exists(),
    reason="facegen/assets/mini has no perception yet",
)
PEOPLE, PICTURES = 10, 4


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    people = [HELD_OUT_FROM + 500 + i // PICTURES for i in range(PEOPLE * PICTURES)]
    return scenes_for(0, people, list(range(PICTURES)) * PEOPLE)


@pytest.fixture(scope="module")
def drawn(scenes: Scenes) -> Rendering:
    return render(scenes, 128)


@pytest.fixture(scope="module")
def judges() -> Judges:
    return load_judges()


def test_insightface_finds_and_recognises_drawn_faces(drawn: Rendering) -> None:
    pytest.importorskip("insightface")
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(name=str(ASSETS / "pack"), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(128, 128))
    embeddings, owners, errors = [], [], []
    for i, picture in enumerate(drawn.rgb):
        image = (picture.flip(0).permute(1, 2, 0) * 255).round().byte().numpy()
        faces = app.get(np.ascontiguousarray(image))
        if faces:
            face = max(faces, key=lambda one: one.det_score)
            apart = float((drawn.landmarks5[i, 0] - drawn.landmarks5[i, 1]).norm()) + 4.0
            errors.append(np.linalg.norm(face.kps - drawn.landmarks5[i].numpy(), axis=1).mean() / apart)
            embeddings.append(torch.from_numpy(face.embedding))
            owners.append(i // PICTURES)
    assert len(owners) >= 0.9 * PEOPLE * PICTURES
    assert np.median(errors) < 0.15
    assert verification(torch.stack(embeddings), torch.tensor(owners))["auc"] > 0.85


def test_the_judge_tells_strangers_apart(drawn: Rendering, judges: Judges) -> None:
    owners = torch.arange(PEOPLE).repeat_interleave(PICTURES)
    assert verification(judges.embed(drawn.rgb, drawn.landmarks5), owners)["auc"] > 0.85
    assert verification(judges.embed(drawn.rgb), owners)["auc"] > 0.8
    nobody = judges.embed(torch.full((1, 3, 128, 128), 0.5))
    assert float(nobody.norm()) == 0.0


def test_facts_and_parsing_are_mostly_right(drawn: Rendering, judges: Judges, scenes: Scenes) -> None:
    truth = labels(scenes)
    judged = judges.facts(drawn.rgb)
    right = {}
    assert judged.keys() == FACTS.keys() - UNSEEN
    for kind, chances in judged.items():
        known = truth[kind] >= 0
        if known.any():
            right[kind] = float((chances.argmax(1) == truth[kind])[known].float().mean())
    assert np.mean(list(right.values())) > 0.75, right
    assert right["glasses"] > 0.7
    assert right["hair_color"] > 0.7
    assert float((judges.parse(drawn.rgb) == drawn.parsing.long()).float().mean()) > 0.85
