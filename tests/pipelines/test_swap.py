"""Swap: the source's face in the target photo; around the face every byte stays; guidance goes where it should."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen import examples, metadata, patch
from facegen.cli import main
from facegen.denoise import Guidance
from facegen.errors import FacegenError, NoFaceFound, SeveralFaces, WeightsMissing, WrongRequest
from facegen.face import tones
from facegen.face.align import ARCFACE_POINTS
from facegen.face.embed import ArcFace
from facegen.face.parse import FaceParser
from facegen.images import to_tensor
from facegen.loading import Loaded
from facegen.models.base import Model
from facegen.models.swap import KIND, Swap
from facegen.pipeline import rebuild
from facegen.pipelines.swap import SwapPipeline
from facegen.steering import likeness_guidance, parsing_guidance, unit_gradient
from tests.pipelines.hands import SEEDS, behind_a_hand

QUICK: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 1, "prompt": "a face"}
Drawn = Callable[[int], Image.Image]


@pytest.fixture
def swap(loaded: Loaded, mini: Path) -> SwapPipeline:
    """A pipeline without adapters."""
    return SwapPipeline(Loaded(loaded.model, loaded.loading, loaded.sha256, analyzers=loaded.analyzers))


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return (np.asarray(before) != np.asarray(after)).any(-1)


def test_only_the_face_changes(swap: SwapPipeline, tiny: Path, drawn: Drawn) -> None:
    target = drawn(2)
    free = swap(source=drawn(1), target=target, **QUICK)
    other = swap(source=drawn(3), target=target, **QUICK)
    assert free.request.adapters == ()
    differ = changed(target, free.images[0])
    assert differ.any()
    assert free.reports[0].measures["pixels changed outside"] == 0
    # A report rounds to four digits.
    assert free.reports[0].measures["share painted"] >= differ.mean() - 5e-5
    assert "points moved, in eye distances" in free.reports[0].measures
    assert (free.request.method, free.request.change) == ("both", 0.7)
    assert changed(free.images[0], other.images[0]).any(), "guidance alone tells one source from another"
    swap.load_adapter(tiny / "adapters" / "instantid")
    worn = swap(source=drawn(1), target=target, method="adapters", **QUICK)
    both = swap(source=drawn(1), faces=[drawn(1)], target=target, **QUICK)
    assert worn.request.adapters == both.request.adapters == ("instantid",)
    assert worn.reports[0].measures["pixels changed outside"] == 0
    assert changed(worn.images[0], both.images[0]).any()


@pytest.fixture
def taught(swap: SwapPipeline, tiny: Path, tmp_path: Path) -> SwapPipeline:
    """A pipeline whose model has a net that swaps, untrained but not silent."""
    net = Swap.fresh(KIND, swap.model)
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in (*net.net.controlnet_down_blocks, net.net.controlnet_mid_block):
            layer.weight.normal_(std=0.3)
    net.save(tmp_path / "controls")
    shutil.copytree(tiny / "base", tmp_path / "base")
    loading = replace(swap.loaded.loading, model=str(tmp_path / "base"))
    return SwapPipeline(replace(swap.loaded, loading=loading))


def test_a_net_that_learnt_to_swap_is_the_first_choice(taught: SwapPipeline, tiny: Path, drawn: Drawn) -> None:
    taught.load_adapter(tiny / "adapters" / "instantid")
    other = taught(source=drawn(1), target=drawn(2), **QUICK)
    assert (other.request.method, other.request.change) == ("both", 0.7), "its adapter is not loaded"
    taught.load_adapter(tiny / "adapters" / "ip_adapter_faceid", "face")
    out = taught(source=drawn(1), target=drawn(2), **QUICK)
    assert (out.request.method, out.request.adapters, out.request.change) == ("trained", ("face",), 1.0)
    assert out.reports[0].measures["pixels changed outside"] == 0
    assert changed(drawn(2), out.images[0]).any()
    plain = taught(source=drawn(1), target=drawn(2), method="adapters", adapters=("face",), change=1.0, **QUICK)
    assert changed(plain.images[0], out.images[0]).any(), "the net sees the photo"
    someone = taught(source=drawn(3), target=drawn(2), **QUICK)
    assert changed(someone.images[0], out.images[0]).any(), "and who is to be in it"
    with pytest.raises(WrongRequest, match="learnt beside ip_adapter_faceid"):
        taught(source=drawn(1), target=drawn(2), method="trained", adapters=("instantid",), **QUICK)


def test_what_is_said_to_stand_in_front_stays(swap: SwapPipeline, drawn: Drawn) -> None:
    target = drawn(2)
    free = changed(target, swap(source=drawn(1), target=target, **QUICK).images[0])
    middle = int(np.median(free.nonzero()[1]))
    hand = Image.new("L", target.size)
    hand.paste(255, (0, 0, middle, target.height))
    out = swap(source=drawn(1), target=target, front=hand, **QUICK)
    now = changed(target, out.images[0])
    assert free[:, :middle].any()
    assert not now[:, :middle].any()
    assert now[:, middle:].any()
    assert out.reports[0].measures["pixels changed outside"] == 0


def test_tones_change_the_face_and_nothing_outside(
    swap: SwapPipeline, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody could tell skin in what an untrained model paints.
    monkeypatch.setattr(tones, "skin", lambda parser, *pictures: tuple(torch.ones_like(one[:1]) for one in pictures))
    target = drawn(2)
    made, near = (swap(source=drawn(1), target=target, tones=much, **QUICK).images[0] for much in (0.0, 1.0))
    plan = swap._plan(swap.resolve(swap.request_class(source=drawn(1), target=target, **QUICK)))
    outside = plan.mask[0].numpy() == 0
    for one in (made, near):
        assert not changed(target, one)[outside].any()
    assert changed(made, near).any()


def test_a_pale_face_takes_over_the_targets_skin(swap: SwapPipeline, mini: Path) -> None:
    seen = to_tensor(examples.photo("example:4").resize((128, 128)))
    hole = torch.zeros(1, 128, 128)
    hole[:, 40:90, 40:90] = 1
    pale = torch.where(hole > 0, seen * 0.7 + 0.3, seen)

    def away(much: float) -> float:
        near = swap._near_tones(swap.request_class(tones=much), pale, seen, hole)
        return float(((near - seen).abs() * hole).sum())

    assert away(0.0) == float(((pale - seen).abs() * hole).sum())
    assert away(0.5) < 0.7 * away(0.0)
    assert away(1.0) < 0.7 * away(0.5)


def test_no_change_is_the_target_bit_for_bit(swap: SwapPipeline, drawn: Drawn) -> None:
    out = swap(source=drawn(1), target=drawn(2), change=0.0, **QUICK)
    assert not changed(drawn(2), out.images[0]).any()
    still = swap(source=drawn(1), target=drawn(2), likeness=0.0, layout=0.0, **QUICK)
    moved = swap(source=drawn(3), target=drawn(2), likeness=0.0, layout=0.0, **QUICK)
    assert not changed(still.images[0], moved.images[0]).any(), "without guidance or adapters nobody is brought in"


def test_what_stands_before_the_face_stays(swap: SwapPipeline) -> None:
    from facegen import examples
    from facegen.face.types import Detection
    from facegen.images import to_pil
    from facegen.world.render import PARSING, render

    drawn = render(examples.scene("example:4").with_values(glasses=3), 256)
    face: Any = Detection(drawn.box[0].numpy(), 1.0, drawn.landmarks5[0].numpy())
    mask = swap._face_mask(to_pil(drawn.rgb), face) > 0
    frame, skin = (drawn.parsing == PARSING.index(name) for name in ("eye_g", "skin"))
    assert float((mask & frame).sum() / frame.sum()) < 0.35
    assert float((mask & skin).sum() / skin.sum()) > 0.6


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hand_before_the_face_stays(swap: SwapPipeline, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    handed = behind_a_hand(swap.parser, seed)
    monkeypatch.setattr(swap, "faces_in", lambda photo, pack=None: (handed.face,))
    out = swap(source=handed.photo, target=handed.photo, **QUICK)
    handed.check(out.images[0])


def test_hands_are_left_out_of_what_is_painted(swap: SwapPipeline) -> None:
    """As a share of the pixels of each of a dozen hands, and of the skin beside them."""
    handed = [behind_a_hand(swap.parser, seed) for seed in range(12)]
    painted = [swap._face_mask(one.photo, one.face)[0].numpy() > 0 for one in handed]
    hands = [mask[one.hand].mean() for mask, one in zip(painted, handed, strict=True) if one.hand.sum() > 200]
    assert np.mean(hands) < 0.01
    assert max(hands) < 0.06
    assert np.mean([mask[one.skin].mean() for mask, one in zip(painted, handed, strict=True)]) > 0.8


def test_the_call_is_read_back(tiny: Path, tiny_pack: Path, me: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    flags = ["--model", str(tiny / "base"), "--pack", str(tiny_pack), "--device", "cpu", "--steps", "2", "--seed", "3"]
    assert main(["swap", str(me), str(me), *flags, "--method", "guidance", "-o", str(out), "--quiet"]) == 0
    record = metadata.read(out)
    _, request = rebuild(record)
    assert (request.source, request.target, request.method) == (str(me), str(me), "guidance")


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"source": 1}, WrongRequest, "as target"),
        ({"target": 1}, WrongRequest, "as source"),
        ({"source": 1, "target": 0}, NoFaceFound, "the target photo"),
        ({"source": 0, "target": 1}, NoFaceFound, "No face was found"),
        ({"source": 1, "target": 1, "method": "trained"}, WeightsMissing, "has no net that learnt to swap"),
    ],
)
def test_wrong_input_is_one_sentence(
    swap: SwapPipeline, drawn: Drawn, fields: dict[str, Any], kind: type[FacegenError], says: str
) -> None:
    blank = Image.new("RGB", (160, 160), (90, 90, 90))
    given = {
        name: value if isinstance(value, str) else drawn(value) if value else blank for name, value in fields.items()
    }
    with pytest.raises(kind, match=says) as caught:
        swap(**{**QUICK, **given})
    assert str(caught.value).endswith(".")


def test_two_faces_in_the_target(swap: SwapPipeline, drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    face = swap.faces_in(drawn(2))
    monkeypatch.setattr(swap, "faces_in", lambda photo, pack=None: face * 2)
    with pytest.raises(SeveralFaces, match="2 faces were found in the target photo"):
        swap(source=drawn(1), target=drawn(2), **QUICK)


def test_a_unit_gradient_says_only_where_to_go() -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (unit_gradient(x) * torch.tensor([3.0, 5000.0]).view(2, 1, 1, 1)).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("base", ["tiny_sd15", "tiny_sdxl"])
def test_guided_it_ends_nearer(base: str, tiny_pack: Path, mini: Path, request: pytest.FixtureRequest) -> None:
    """From the same noise: more like the person, and more like the layout, than without guidance."""
    model = Model.from_pretrained(request.getfixturevalue(base), device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    picture, hole = torch.rand(3, 64, 64, generator=generator), torch.zeros(1, 64, 64)
    hole[:, 8:56, 8:56] = 1
    points = torch.from_numpy(ARCFACE_POINTS) * (64 / 112)
    recogniser, parser = ArcFace.from_pretrained(tiny_pack), FaceParser.from_pretrained(mini)
    wanted = recogniser.embed(torch.rand(1, 3, 64, 64, generator=generator), points[None])[0]
    text = model.encode_text(["a face"])
    likeness = likeness_guidance(model, recogniser, wanted, points, scale=0.5)
    layout = parsing_guidance(model, parser, picture, hole, scale=0.5)

    def painted(*extra: Any) -> torch.Tensor:
        run = patch.Run(steps=4, guidance=Guidance(1.0))
        return patch.repaint(model, picture, hole, [text, *extra], run, [torch.Generator().manual_seed(1)])

    def judged(made: torch.Tensor) -> tuple[float, float]:
        """Cosine to the person; cross-entropy to the layout."""
        with torch.no_grad():
            cosine = torch.cosine_similarity(recogniser.embed(made, points[None]), wanted[None])
            true, seen = parser.chances(picture[None]), parser.chances(made)
        return float(cosine), float(-(true * seen.clamp(min=1e-6).log()).sum(1)[hole > 0].mean())

    plain, to_person, to_layout = (judged(painted(*extra)) for extra in ((), (likeness,), (layout,)))
    assert to_person[0] > plain[0]
    assert to_layout[1] < plain[1]
