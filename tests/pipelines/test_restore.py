"""Restore: only the face changes, never into somebody else; by diffusion or by a network's file; repeatable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from facegen import metadata
from facegen.checkpoints import write
from facegen.cli import main
from facegen.errors import FacegenError, NoFaceFound, WeightsMissing, WrongAdapter, WrongRequest
from facegen.pipeline import Progress, rebuild
from facegen.pipelines.generate import GeneratePipeline
from facegen.pipelines.restore import RestorePipeline, RestoreRequest
from facegen.restoration.gfpgan import GFPGAN, Sizes
from tests.restoration.weights import weights

QUICK: dict[str, Any] = {"num_inference_steps": 4, "seed": 1, "least_likeness": -1.0}
Drawn = Callable[[int], Image.Image]


@pytest.fixture
def restore(pipe: GeneratePipeline) -> RestorePipeline:
    return RestorePipeline.from_pipe(pipe)


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GFPGAN's file."""
    sizes = Sizes(unet=(16, 16, 16, 16), generator=(32, 32, 32, 32), style=16, mapped=2)
    return str(write(tmp_path_factory.mktemp("gan") / "gan.pth", {"params_ema": weights(GFPGAN(sizes))}))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """(H, W): which pixels differ."""
    return (pixels(before) != pixels(after)).any(-1)


def test_only_the_face_changes(restore: RestorePipeline, drawn: Drawn) -> None:
    photo = drawn(1)
    out = restore(image=photo, **QUICK)
    differ = changed(photo, out.images[0])
    assert differ[60:100, 60:100].any()
    assert not differ[:20].any()
    assert not differ[:, :20].any()
    measures = out.reports[0].measures
    assert measures["pixels changed outside"] == 0
    assert measures["faces restored"] == 1
    assert measures["share of the restored face taken"] == 1
    assert np.array_equal(pixels(out.images[0]), pixels(restore(image=photo, **QUICK).images[0]))
    assert not np.array_equal(pixels(out.images[0]), pixels(restore(image=photo, **{**QUICK, "seed": 2}).images[0]))


def test_full_fidelity_is_the_photo_to_the_bit(restore: RestorePipeline, drawn: Drawn) -> None:
    photo = drawn(1)
    assert not changed(photo, restore(image=photo, fidelity=1.0, **QUICK).images[0]).any()


def test_aligned_latents_are_where_it_begins(
    restore: RestorePipeline, tiny: Path, tiny_pack: Path, drawn: Drawn
) -> None:
    """The model's aligner acts before diffusion, by degrees, and is steered by better photos."""
    from facegen.models.alignment import Aligner

    photo = drawn(1)
    plain = restore(image=photo, **QUICK).images[0]
    aligner = Aligner.fresh(restore.model, 16, width=16, deep=16)
    restore.loaded.controls["restore"] = aligner
    untaught = restore(image=photo, fidelity=1.0, **QUICK).images[0]
    assert not changed(photo, untaught)[:20].any()
    with torch.no_grad():
        for weight in aligner.net.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    for fidelity, before in ((1.0, untaught), (0.8, plain)):
        asked: dict[str, Any] = {"image": photo, "fidelity": fidelity, **QUICK}
        aligned = restore(**asked).images[0]
        assert changed(before, aligned).any()
        assert changed(aligned, restore(alignment=0.5, **asked).images[0]).any()
        assert not changed(aligned, photo)[:20].any()
    seen: list[torch.Tensor | None] = []
    restore.loaded.controls["restore"] = lambda latents, picture, who: seen.append(who) or latents
    restore.load_adapter(tiny / "adapters" / "ip_adapter_faceid")
    restore.loaded.loading = replace(restore.loaded.loading, pack=None)  # as if the model had brought its own pack
    restore.reading_pack = lambda: str(tiny_pack)  # type: ignore[method-assign]
    for faces in ([], [drawn(2)]):
        restore(image=photo, faces=faces, **QUICK)
    assert seen[0] is None
    assert seen[1] is not None
    assert not changed(photo, restore(image=photo, alignment=0.0, fidelity=1.0, **QUICK).images[0]).any()


def test_what_is_coarse_stays(restore: RestorePipeline, drawn: Drawn) -> None:
    """Even with random weights the restored face keeps light and colour of the damaged one."""
    photo = drawn(1)
    made = restore(image=photo, fidelity=0.0, **QUICK).images[0]
    middle = slice(70, 90)
    before, after = (pixels(image)[middle, middle].mean((0, 1)) for image in (photo, made))
    assert np.abs(before - after).max() < 45


def test_the_photos_own_face_or_better_photos(restore: RestorePipeline, tiny: Path, drawn: Drawn) -> None:
    plain = restore(image=drawn(1), **QUICK)
    assert plain.request.adapters == ()
    restore.load_adapter(tiny / "adapters" / "ip_adapter_faceid")
    own = restore(image=drawn(1), **QUICK)
    other = restore(image=drawn(1), faces=[drawn(2), drawn(3)], **QUICK)
    assert own.request.adapters == other.request.adapters == ("ip_adapter_faceid",)
    for one, two in ((plain, own), (own, other)):
        assert changed(one.images[0], two.images[0]).any()


def test_never_another_person(restore: RestorePipeline, drawn: Drawn) -> None:
    photo = drawn(1)
    out = restore(image=photo, fidelity=0.0, **{**QUICK, "least_likeness": 1.0})
    share = out.reports[0].measures["share of the restored face taken"]
    assert share < 1
    assert out.reports[0].measures["likeness to the damaged face or references"] > 0.999
    assert f"only {share:.0%} of it was taken" in out.reports[0].warnings[0]


def test_a_network_instead_of_diffusion(restore: RestorePipeline, drawn: Drawn, gan: str, tmp_path: Path) -> None:
    photo = drawn(1)
    out = restore(image=photo, restorer=gan, num_images_per_prompt=2, **QUICK)
    assert changed(photo, out.images[0])[60:100, 60:100].any()
    assert changed(out.images[0], out.images[1]).any()  # the network's own noise follows the seed
    record = out.images[0].record
    assert record is not None
    assert record.loaded["networks"] == {"restorer": metadata.file_checksum(Path(gan))}
    gray = photo.convert("L").convert("RGB")
    again = RestorePipeline.from_pipe(restore)
    again.faces_in = lambda *_: restore.faces_in(photo)  # type: ignore[method-assign,assignment]
    made = pixels(again(image=gray, restorer=gan, **QUICK).images[0])
    assert (made.max(-1) == made.min(-1)).all()


def test_every_face_or_one(restore: RestorePipeline, drawn: Drawn, gan: str) -> None:
    photo = drawn(1)
    (face,) = restore.faces_in(photo)
    small = replace(face, box=face.box * 0.4, points=face.points * 0.4)
    restore.faces_in = lambda *_: (face, small)  # type: ignore[method-assign,assignment]
    seen: list[Progress] = []
    both = restore(image=photo, restorer=gan, on_progress=seen.append, **QUICK)
    assert both.reports[0].measures["faces restored"] == 2
    assert [(one.done, one.total) for one in seen] == [(1, 2), (2, 2)]
    one = restore(image=photo, restorer=gan, select="largest", **QUICK)
    assert one.reports[0].measures["faces restored"] == 1
    assert changed(both.images[0], one.images[0]).any()
    with pytest.raises(FacegenError, match="2 faces were found"):
        restore(image=photo, restorer=gan, select="only", **QUICK)


def test_larger(restore: RestorePipeline, drawn: Drawn, gan: str) -> None:
    photo = drawn(1)
    made = restore(image=photo, restorer=gan, upscale=2, **QUICK).images[0]
    assert made.size == (320, 320)
    enlarged = photo.resize((320, 320), Image.Resampling.LANCZOS)
    differ = changed(enlarged, made)
    assert not differ[:40].any()
    assert differ[120:200, 120:200].any()


def test_the_call_is_in_the_picture(restore: RestorePipeline, drawn: Drawn, me: Path, gan: str, tmp_path: Path) -> None:
    out = restore(image=me, restorer=gan, fidelity=0.7, num_images_per_prompt=2, **QUICK)
    paths = out.save(tmp_path / "out")
    record = metadata.read(paths[1])
    loading, request = rebuild(record)
    assert (request.image, request.restorer, request.fidelity) == (str(me), gan, 0.7)
    assert record.photos() == [metadata.photo_record(me)]
    fresh = RestorePipeline.load(loading)
    ((picture, _),) = fresh.stream(fresh.resolve(request), indices=[record.index])
    assert np.array_equal(pixels(picture), pixels(out.images[1]))


def test_the_command_line(
    tiny: Path, tiny_pack: Path, me: Path, gan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["restore", str(me), "--model", str(tiny / "base"), "--pack", str(tiny_pack), "--device", "cpu"]
    assert main([*words, "--restorer", gan, "--seed", "3", "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["read", str(tmp_path / "out" / "restore-3.png")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("facegen restore")
    assert f"--restorer {gan}" in told


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"image": None}, WrongRequest, "as image"),
        ({"image": "gray"}, NoFaceFound, "No face was found in the photo"),
        ({"restorer": "codeformer"}, WeightsMissing, r"codeformer\.pth"),
        ({"restorer": "gone.pth"}, WeightsMissing, r"gone\.pth is not there"),
        ({"restorer": "codefromer"}, WeightsMissing, "Did you mean codeformer"),
        ({"restorer": "foreign"}, WrongAdapter, "is a ParseNet face parsing network, not a restoration network"),
        ({"parsing": "gan"}, WrongAdapter, "is a GFPGAN, not a face parsing network"),
        ({"restorer": "gan", "adapters": ("instantid",)}, WrongRequest, "GFPGAN takes no adapter"),
        ({"restorer": "gan", "latents": torch.zeros(1, 4, 8, 8)}, WrongRequest, "GFPGAN does not start from noise"),
        ({"fidelity": 1.5}, WrongRequest, "fidelity must be from 0 to 1"),
        ({"upscale": 9}, WrongRequest, "upscale must be from 1 to 4"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    restore: RestorePipeline,
    drawn: Drawn,
    gan: str,
    tmp_path: Path,
    fields: dict[str, Any],
    error: type[FacegenError],
    said: str,
) -> None:
    foreign = write(tmp_path / "foreign.pth", {"out_mask_conv.conv2d.weight": torch.ones(1)})
    named: dict[str, Any] = {"foreign": str(foreign), "gan": gan, "gray": Image.new("RGB", (64, 64), (90, 90, 90))}
    asked = {name: named.get(value, value) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(error, match=said) as told:
        restore(**{"image": drawn(1), **QUICK, **asked})
    assert "\n" not in str(told.value)


def test_the_request_is_the_form() -> None:
    from facegen.request import controls

    shown = {control.name: control for control in controls(RestoreRequest)}
    assert next(iter(shown)) == "image"
    assert shown["image"].widget == "photo"
    assert shown["fidelity"].widget == "slider"


def test_fidelity_is_how_much_of_the_run_is_walked() -> None:
    assert RestoreRequest(fidelity=0.25).change == 0.75
    assert RestoreRequest(fidelity=1.0).change == 0
    assert int(RestoreRequest(fidelity=0.999, num_inference_steps=49).change * 49) == 1
    assert RestoreRequest(fidelity=0.5, num_inference_steps=1).change == 1
