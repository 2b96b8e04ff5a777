"""Inpaint: only what is marked changes, to the byte; nothing changes at no strength; wrong input is one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen import examples, metadata, patch
from facegen.cli import command_line, main
from facegen.denoise import Guidance
from facegen.errors import FacegenError, NoFaceFound, SeveralFaces, WrongMask, WrongRequest
from facegen.images import to_tensor
from facegen.loading import Loaded
from facegen.models.base import Model
from facegen.pipeline import rebuild
from facegen.pipelines.inpaint import InpaintPipeline
from tests.pipelines.hands import SEEDS, behind_a_hand

QUICK: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 1, "prompt": "a face"}
Drawn = Callable[[int], Image.Image]


@pytest.fixture
def inpaint(loaded: Loaded) -> InpaintPipeline:
    """A pipeline without adapters."""
    return InpaintPipeline(Loaded(loaded.model, loaded.loading, loaded.sha256, analyzers=loaded.analyzers))


@pytest.fixture
def hole(tmp_path: Path) -> Path:
    """A mask of the photo's size: a part of the face."""
    mask = Image.new("L", (160, 160))
    mask.paste(255, (70, 60, 110, 90))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return (np.asarray(before) != np.asarray(after)).any(-1)


def test_only_what_is_marked_changes(inpaint: InpaintPipeline, drawn: Drawn, hole: Path) -> None:
    photo, marked = drawn(1), np.asarray(Image.open(hole)) > 0
    out = inpaint(image=photo, mask=hole, **QUICK)
    differ = changed(photo, out.images[0])
    assert out.images[0].size == photo.size
    assert not differ[~marked].any()
    assert differ[marked].mean() > 0.5
    report = out.reports[0]
    assert report.measures["pixels changed outside"] == report.measures["largest difference outside"] == 0
    assert report.measures["share painted"] == pytest.approx(marked.mean(), abs=1e-3)
    assert "pixels changed outside 0" in str(report)


def test_no_change_is_the_photo_bit_for_bit(inpaint: InpaintPipeline, drawn: Drawn, hole: Path) -> None:
    out = inpaint(image=drawn(1), mask=hole, change=0.0, **QUICK)
    little = inpaint(image=drawn(1), mask=hole, change=0.5, **QUICK)
    assert not changed(drawn(1), out.images[0]).any()
    assert changed(drawn(1), little.images[0]).any()


def test_the_rim_of_a_mask_keeps_its_outline(inpaint: InpaintPipeline, drawn: Drawn, hole: Path) -> None:
    before = hole.read_bytes()
    out = inpaint(image=drawn(1), mask=hole, grow=-0.1, num_images_per_prompt=2, **QUICK)
    inner = np.zeros((160, 160), bool)
    inner[64:86, 74:106] = True  # a tenth of 40 pixels less on each side
    for image in out.images:
        assert not changed(drawn(1), image)[~inner].any()
        assert changed(drawn(1), image)[inner].any()
    assert hole.read_bytes() == before
    assert out.images[0].record is not None
    assert out.images[0].record.request["mask"]["sha256"] == metadata.file_checksum(hole), "the label of every variant"


def test_invert_and_the_next_pixels_beyond_the_edge(inpaint: InpaintPipeline, drawn: Drawn, hole: Path) -> None:
    marked = np.asarray(Image.open(hole)) > 0
    out = inpaint(image=drawn(1), mask=hole, invert=True, identity="nobody", **QUICK)
    assert not changed(drawn(1), out.images[0])[marked].any()
    wide = inpaint(image=drawn(1), left=24, top=8, **QUICK).images[0]
    assert wide.size == (184, 168)
    assert np.array_equal(np.asarray(wide)[8:, 24:], np.asarray(drawn(1)))


def test_a_part_by_name(inpaint: InpaintPipeline, drawn: Drawn, mini: Path) -> None:
    out = inpaint(image=drawn(1), region="eyes", **QUICK)
    differ = changed(drawn(1), out.images[0])
    assert 0 < differ.mean() < 0.05, "the tiny detector says where the eyes are"
    assert not differ[100:].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hand_before_the_face_is_not_painted_over(
    inpaint: InpaintPipeline, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    handed = behind_a_hand(inpaint.parser, seed)
    monkeypatch.setattr(inpaint, "faces_in", lambda photo, pack=None: (handed.face,))
    out = inpaint(image=handed.photo, region="face", identity="nobody", **QUICK)
    handed.check(out.images[0])


def test_the_photos_own_face_or_another_ones(inpaint: InpaintPipeline, tiny: Path, drawn: Drawn, hole: Path) -> None:
    before = [float(value.double().abs().sum()) for value in inpaint.model.unet.parameters()]
    plain = inpaint(image=drawn(1), mask=hole, **QUICK)
    assert plain.request.adapters == ()
    inpaint.load_adapter(tiny / "adapters" / "instantid")
    own = inpaint(image=drawn(1), mask=hole, **QUICK)
    other = inpaint(image=drawn(1), mask=hole, faces=[drawn(2), drawn(2)], **QUICK)
    nobody = inpaint(image=drawn(1), mask=hole, identity="nobody", **QUICK)
    none = inpaint(image=drawn(1), mask=hole, strength=0.0, control_strength=0.0, **QUICK)
    assert own.request.adapters == other.request.adapters == ("instantid",)
    assert changed(plain.images[0], own.images[0]).any()
    assert changed(other.images[0], own.images[0]).any()
    assert not changed(plain.images[0], nobody.images[0]).any()
    assert not changed(plain.images[0], none.images[0]).any()
    assert [float(value.double().abs().sum()) for value in inpaint.model.unet.parameters()] == before


def test_skin_that_was_made_has_the_tones_of_the_photo(inpaint: InpaintPipeline, mini: Path) -> None:
    seen = to_tensor(examples.photo("example:4").resize((128, 128)))
    hole = torch.zeros(1, 128, 128)
    hole[:, 40:90, 40:90] = 1
    pale = torch.where(hole > 0, seen * 0.7 + 0.3, seen)
    toned = inpaint._in_their_skin(pale, seen, hole)
    before, after = (((one - seen).abs() * hole).sum() / hole.sum() for one in (pale, toned))
    assert after < 0.4 * before
    small = torch.zeros(1, 128, 128)
    assert torch.equal(inpaint._in_their_skin(pale, seen, small), pale), "no hole, nothing to learn from"


def test_the_call_is_read_back(
    tiny: Path, tiny_pack: Path, me: Path, hole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    flags = ["--model", str(tiny / "base"), "--pack", str(tiny_pack), "--device", "cpu", "--steps", "2", "--seed", "3"]
    assert main(["inpaint", str(me), "--mask", str(hole), *flags, "-o", str(out), "--quiet"]) == 0
    record = metadata.read(out)
    assert [photo["path"] for photo in record.photos()] == [str(me), str(hole)]
    _, request = rebuild(record)
    assert (request.image, request.mask, request.seed) == (str(me), str(hole), 3)
    assert f"--mask {hole}" in command_line(record)
    assert main(["read", str(out), "--run", "-o", str(tmp_path / "again.png")]) == 0
    assert "the same picture to the last bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({}, WrongRequest, "Give the photo"),
        ({"image": "+"}, WrongRequest, "Say what is to be painted"),
        ({"image": "+", "mask": Image.new("L", (10, 10), 255)}, WrongMask, "10×10 pixels but its picture is 160×160"),
        ({"image": "+", "mask": Image.new("L", (160, 160))}, WrongMask, "The mask is empty"),
        ({"image": "+", "mask": "+", "grow": -0.5}, WrongMask, "nothing is left of the mask"),
        ({"image": "+", "region": "elbow"}, WrongRequest, "no part of a face called 'elbow'"),
        ({"image": Image.new("RGB", (160, 160), (90, 90, 90)), "region": "eyes"}, NoFaceFound, "No face was found"),
        ({"image": "+", "left": 8, "identity": "photo"}, NoFaceFound, "touches no face"),
        ({"image": "+", "mask": "+", "change": 0.1}, WrongRequest, "leaves no step"),
    ],
)
def test_wrong_input_is_one_sentence(
    inpaint: InpaintPipeline, drawn: Drawn, hole: Path, fields: dict[str, Any], kind: type[FacegenError], says: str
) -> None:
    given = dict(fields)
    given |= {"image": drawn(1)} if given.get("image") == "+" else {}
    given |= {"mask": hole} if given.get("mask") == "+" else {}
    with pytest.raises(kind, match=says) as caught:
        inpaint(**{**QUICK, **given})
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_two_faces_where_one_is_meant(inpaint: InpaintPipeline, drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    face = inpaint.faces_in(drawn(1))
    monkeypatch.setattr(inpaint, "faces_in", lambda photo, pack=None: face * 2)
    with pytest.raises(SeveralFaces, match="2 faces were found"):
        inpaint(image=drawn(1), region="eyes", **QUICK)


@pytest.mark.parametrize("base", ["tiny_sd15", "tiny_sdxl"])
def test_on_both_topologies(base: str, request: pytest.FixtureRequest) -> None:
    """Outside the hole are the photo's own latents; without a hole nothing is done at all."""
    model = Model.from_pretrained(request.getfixturevalue(base), device="cpu", dtype=torch.float32)
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    hole = torch.zeros(1, 64, 64)
    text = [model.encode_text(["a face"])]
    run = patch.Run(steps=2, guidance=Guidance(2.0))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert torch.equal(patch.repaint(model, picture, hole, text, run, generators), picture.expand(2, -1, -1, -1))
    hole[:, 10:20, 30:40] = 1
    marked = patch.latent_mask(model, hole)
    assert marked.shape == (1, 1, 8, 8)
    assert marked.sum() == 4  # pixels 10–19 and 30–39 lie in two rows and two columns of eight
    start = torch.zeros(1, 4, 8, 8)
    kept = patch.hole_conditions(model, picture, hole, start)[0]
    assert torch.equal(kept.latents, model.encode_image(picture[None]))  # type: ignore[attr-defined]
    made = patch.repaint(model, picture, hole, text, run, generators)
    assert made.shape == (2, 3, 64, 64)
    assert not torch.equal(made[0], made[1])


def test_an_inpainting_unet_is_told_of_the_hole(tiny_sd15: Path) -> None:
    from diffusers import UNet2DConditionModel

    model = Model.from_pretrained(tiny_sd15, device="cpu", dtype=torch.float32)
    wide = UNet2DConditionModel.from_config({**model.unet.config, "in_channels": 9})
    model = model.with_unet(wide)
    picture, hole = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 64, 64)
    hole[:, :32] = 1
    told = patch.hole_conditions(model, picture, hole, torch.zeros(1, 4, 8, 8))[1].channels  # type: ignore[attr-defined]
    assert told.shape == (2, 1, 5, 8, 8)
    assert torch.equal(told[0, 0, 0, :4], torch.ones(4, 8))
    text = [model.encode_text(["a face"])]
    made = patch.repaint(model, picture, hole, text, patch.Run(steps=1), [torch.Generator().manual_seed(1)])
    assert made.shape == (1, 3, 64, 64)


def test_small_faces_are_enlarged(inpaint: InpaintPipeline, drawn: Drawn) -> None:
    small = Image.new("RGB", (320, 240), (100, 105, 110))
    small.paste(drawn(1).resize((40, 40)), (250, 20))
    mask = Image.new("L", small.size)
    mask.paste(255, (262, 32, 278, 48))
    plan = inpaint._plan(inpaint.request(None, {"image": small, "mask": mask, "resolution": 256, **QUICK}))
    assert plan.crop.size == 256
    assert plan.crop.enlarged > 1
    out = inpaint(image=small, mask=mask, identity="nobody", **QUICK)
    differ = changed(small, out.images[0])
    assert differ.any()
    assert not differ[to_tensor(mask.convert("RGB"))[0].numpy() == 0].any()
