"""Generate: repeatable by seed, in any batch; the model is left as it was; wrong input is one sentence."""

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
from facegen.cli import command_line
from facegen.errors import BadImage, Cancelled, FacegenError, NoFaceFound, WeightsMissing, WrongRequest
from facegen.pipeline import Progress, Watch, rebuild
from facegen.pipelines.generate import GeneratePipeline, GenerateRequest

QUICK: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}
Drawn = Callable[[int], Image.Image]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def checksum(pipe: GeneratePipeline) -> list[float]:
    parts = (pipe.model.unet, pipe.model.vae, pipe.model.text_encoder)
    return [float(parameter.double().abs().sum()) for part in parts for parameter in part.parameters()]


def test_words_alone_make_a_picture(pipe: GeneratePipeline) -> None:
    out = pipe(prompt="a portrait", seed=7, **QUICK)
    assert [image.size for image in out.images] == [(64, 64)]
    assert out.request.seed == 7
    assert out.request.adapters == ()
    again = pipe(prompt="a portrait", seed=7, **QUICK)
    other = pipe(prompt="a portrait", seed=8, **QUICK)
    assert np.array_equal(pixels(out.images[0]), pixels(again.images[0]))
    assert not np.array_equal(pixels(out.images[0]), pixels(other.images[0]))


def test_a_seed_drawn_by_lot_is_written_down(pipe: GeneratePipeline) -> None:
    out = pipe(prompt="x", **QUICK)
    assert out.request.seed is not None
    assert np.array_equal(pixels(out.images[0]), pixels(pipe(out.request).images[0]))


@pytest.mark.parametrize("scheduler", ["model", "euler_a", "dpm++ sde"])
def test_picture_i_is_seed_plus_i_in_any_batch(pipe: GeneratePipeline, scheduler: str) -> None:
    alone = pipe(seed=12, scheduler=scheduler, **QUICK).images[0]
    for batch_size, tolerance in ((1, 0), (3, 1)):
        several = pipe(seed=10, num_images_per_prompt=3, batch_size=batch_size, scheduler=scheduler, **QUICK).images
        assert len(several) == 3
        assert np.abs(pixels(several[2]) - pixels(alone)).max() <= tolerance


@pytest.mark.parametrize("names", [["arc2face"], ["instantid"], ["ip_adapter_faceid"], ["arc2face", "instantid"]])
def test_adapters_change_the_picture_and_leave_the_model(
    pipe: GeneratePipeline, tiny: Path, drawn: Drawn, names: list[str]
) -> None:
    before = checksum(pipe)
    for name in names:
        assert pipe.load_adapter(tiny / "adapters" / name) == name
    plain = pipe(prompt="a portrait of a person", seed=1, **QUICK).images[0]
    one = pipe(faces=drawn(1), prompt="a portrait of a person", seed=1, **QUICK)
    other = pipe(faces=[drawn(2)], prompt="a portrait of a person", seed=1, **QUICK)
    assert one.request.adapters == tuple(names)
    assert not np.array_equal(pixels(plain), pixels(one.images[0]))
    assert not np.array_equal(pixels(one.images[0]), pixels(other.images[0]))
    assert checksum(pipe) == before


def test_strength_zero_is_nobody_and_a_function_is_its_values(pipe: GeneratePipeline, tiny: Path, drawn: Drawn) -> None:
    pipe.load_adapter(tiny / "adapters" / "ip_adapter_faceid")
    call: dict[str, Any] = {"faces": drawn(1), "prompt": "a portrait", "seed": 1, **QUICK}
    plain = pipe(prompt="a portrait", seed=1, **QUICK).images[0]
    assert np.array_equal(pixels(plain), pixels(pipe(**call, strength=0.0).images[0]))
    assert np.array_equal(pixels(plain), pixels(pipe(**call, strength={"ip_adapter_faceid": [0, 0, 0]}).images[0]))
    curve = pipe(**call, strength=lambda progress: 1.0 - progress)
    assert curve.request.strength == (1.0, 0.5, 0.0)
    assert np.array_equal(pixels(curve.images[0]), pixels(pipe(**call, strength=[1, 0.5, 0]).images[0]))


def test_several_photos_are_fused_and_two_people_warned_of(
    pipe: GeneratePipeline, tiny: Path, drawn: Drawn, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.load_adapter(tiny / "adapters" / "instantid")
    same = pipe(faces=[drawn(1), drawn(1)], seed=1, **QUICK)
    assert np.abs(pixels(same.images[0]) - pixels(pipe(faces=drawn(1), seed=1, **QUICK).images[0])).max() <= 1
    assert not same.reports[0].warnings


def test_adapters_are_loaded_on_demand(pipe: GeneratePipeline, tiny: Path, drawn: Drawn) -> None:
    out = pipe(faces=drawn(1), adapters=str(tiny / "adapters" / "instantid"), seed=1, **QUICK)
    assert pipe.adapters == out.request.adapters == ("instantid",)
    pipe.unload_adapter("instantid")
    assert pipe.adapters == ()


def test_another_task_shares_the_weights(pipe: GeneratePipeline) -> None:
    other = GeneratePipeline.from_pipe(pipe)
    assert other.model is pipe.model
    assert other.loaded is pipe.loaded


def test_own_conditions_are_added(pipe: GeneratePipeline) -> None:
    mine = pipe.model.encode_text(["something else"])
    plain = pipe(prompt="a portrait", seed=1, **QUICK)
    steered = pipe(prompt="a portrait", seed=1, conditions=[mine], **QUICK)
    assert not np.array_equal(pixels(plain.images[0]), pixels(steered.images[0]))


def test_progress_preview_and_cancel(pipe: GeneratePipeline) -> None:
    seen: list[Progress] = []
    pipe(seed=1, num_images_per_prompt=2, on_progress=seen.append, **QUICK)
    assert [(one.done, one.total) for one in seen] == [(step, 6) for step in range(1, 7)]
    assert seen[-1].fraction == 1.0
    assert seen[0].preview is not None
    assert [image.size for image in seen[0].preview()] == [(64, 64)]

    before = checksum(pipe)
    steps: list[Progress] = []
    with pytest.raises(Cancelled, match="Stopped"):
        pipe(seed=1, on_progress=steps.append, cancelled=lambda: len(steps) >= 2, **QUICK)
    assert len(steps) == 2
    assert checksum(pipe) == before
    assert not any(pipe.model.unet._forward_hooks.values())


def test_the_saved_picture_holds_the_call_and_is_made_again_bit_for_bit(
    pipe: GeneratePipeline, tiny: Path, me: Path, tmp_path: Path
) -> None:
    pipe.load_adapter(tiny / "adapters" / "instantid")
    out = pipe(faces=[me], prompt="a person", num_images_per_prompt=3, batch_size=2, strength=lambda t: t, **QUICK)
    paths = out.save(tmp_path / "out")
    assert [path.name for path in paths] == ["picture-1.png", "picture-2.png", "picture-3.png"]
    record = metadata.read(paths[1])
    assert record.photos() == [metadata.photo_record(me)]
    assert record.report["provenance"]["seed"] == out.request.seed + 1  # type: ignore[operator]

    loading, request = rebuild(record)
    assert request.faces == (str(me),)
    fresh = GeneratePipeline.load(loading)
    fresh.load_recorded_adapters(record)
    ((picture, _),) = fresh.stream(fresh.resolve(request), indices=[record.index])
    assert np.array_equal(pixels(picture), pixels(out.images[1]))
    assert picture.record is not None
    assert picture.record.loaded == record.loaded


def test_the_report_is_honest_without_judges(pipe: GeneratePipeline, tiny: Path, drawn: Drawn) -> None:
    pipe.load_adapter(tiny / "adapters" / "instantid")
    report = pipe(faces=drawn(1), prompt="red hair", seed=3, **QUICK).reports[0]
    assert "likeness not judged" in str(report)
    assert "prompt not judged" in str(report)
    assert report.provenance is not None
    assert report.provenance.ai_generated
    assert len(report.provenance.model_sha256) == 64
    assert len(report.provenance.adapters["instantid"]) == 64


def test_lora_files(pipe: GeneratePipeline, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = next(name for name, module in pipe.model.unet.named_modules() if name.endswith("attn1.to_q"))
    weight = pipe.model.unet.get_submodule(name).weight
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"unet.{name}.lora_A.weight": torch.randn(2, weight.shape[1], generator=generator),
        f"unet.{name}.lora_B.weight": torch.randn(weight.shape[0], 2, generator=generator),
    }
    save_file(lora, tmp_path / "style.safetensors")
    before = checksum(pipe)
    plain = pipe(seed=1, **QUICK).images[0]
    styled = pipe(seed=1, loras=str(tmp_path / "style.safetensors"), **QUICK)
    off = pipe(seed=1, loras={str(tmp_path / "style.safetensors"): 0.0}, **QUICK)
    assert not np.array_equal(pixels(plain), pixels(styled.images[0]))
    assert np.array_equal(pixels(plain), pixels(off.images[0]))
    nowhere = {str(tmp_path / "style.safetensors"): {"down": 0.0, "mid": 0, "up": [0, 0], "rest": 0, "text": 0}}
    blocks = pipe(seed=1, loras=nowhere, **QUICK)
    assert np.array_equal(pixels(plain), pixels(blocks.images[0]))
    assert blocks.images[0].record.request["loras"] == nowhere  # type: ignore[union-attr]
    assert checksum(pipe) == before
    assert len(styled.images[0].record.loaded["loras"][str(tmp_path / "style.safetensors")]) == 64  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"guidence_scale": 3}, WrongRequest, "perhaps you mean 'guidance_scale'"),
        ({"num_inference_steps": 0}, WrongRequest, "num_inference_steps must be from 1"),
        ({"height": 60}, WrongRequest, "multiple of 8"),
        ({"scheduler": "eulr"}, WrongRequest, "perhaps you mean 'euler'"),
        ({"adapters": "instantid"}, WrongRequest, "needs a photo"),
        ({"faces": "nowhere.jpg", "adapters": "?"}, FacegenError, ""),
        ({"loras": "nowhere.safetensors"}, WeightsMissing, "nowhere.safetensors"),
        ({"faces": "example:0", "adapters": "+"}, WrongRequest, "example:1 to example:999"),
        ({"faces": "+empty", "adapters": "+"}, BadImage, "empty"),
        ({"faces": "+text", "adapters": "+"}, BadImage, "text"),
        ({"faces": "+truncated", "adapters": "+"}, BadImage, "damaged"),
        ({"faces": "+pixel", "adapters": "+"}, BadImage, "1×1"),
        ({"faces": "+gray", "adapters": "+"}, NoFaceFound, "face"),
        ({"strength": {"instntid": 1}, "faces": "+me", "adapters": "+"}, WrongRequest, "perhaps you mean 'instantid'"),
    ],
)
def test_wrong_input_is_one_sentence(
    pipe: GeneratePipeline, tiny: Path, tmp_path: Path, me: Path, fields: dict[str, Any], kind: type, says: str
) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello, I am no picture")
    (tmp_path / "truncated").write_bytes(me.read_bytes()[:3000])
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel", format="PNG")
    Image.new("RGB", (160, 160), (90, 90, 90)).save(tmp_path / "gray", format="PNG")
    me.rename(tmp_path / "me")
    given = dict(fields)
    if str(given.get("faces", "")).startswith("+"):
        given["faces"] = tmp_path / given["faces"][1:]
    if given.get("adapters") == "+":
        given["adapters"] = str(tiny / "adapters" / "instantid")
    with pytest.raises(kind, match=says) as caught:
        pipe(seed=1, **{**QUICK, **given})
    told = str(caught.value)
    assert "\n" not in told
    assert told.endswith(".")


def test_the_request_is_made_before_the_model_is_touched() -> None:
    with pytest.raises(WrongRequest):
        GenerateRequest(seed=-1)
    with pytest.raises(WrongRequest, match="There is no 'modell'"):
        GeneratePipeline.from_pretrained("mini", modell="x")


def test_a_watch_stops_between_pictures(pipe: GeneratePipeline) -> None:
    made: list[Image.Image] = []
    request = pipe.resolve(GenerateRequest(seed=1, num_images_per_prompt=3, **QUICK))

    def collect() -> None:
        for picture, _ in pipe.stream(request, watch=Watch(cancelled=lambda: bool(made))):
            made.append(picture)

    with pytest.raises(Cancelled):
        collect()
    assert len(made) == 1


def test_a_learnt_slider_is_a_file_with_a_strength(pipe: GeneratePipeline, tmp_path: Path) -> None:
    from facegen.training.objectives.slider import SliderNet
    from facegen.training.sliders import save

    net = SliderNet(pipe.model.unet, rank=2)
    with torch.no_grad():
        for seed, up in enumerate(net.up):
            up += 0.3 * torch.randn(up.shape, generator=torch.Generator().manual_seed(seed))
    mine = str(save(net, tmp_path / "mine.safetensors", {"format": "pt"}))
    before = checksum(pipe)
    plain, none, more, less = (
        pipe(prompt="a portrait", seed=3, sliders=sliders, **QUICK)
        for sliders in ({}, {mine: 0.0}, {mine: 0.7}, {mine: -0.7})
    )
    assert np.array_equal(pixels(plain.images[0]), pixels(none.images[0]))
    assert not np.array_equal(pixels(plain.images[0]), pixels(more.images[0]))
    assert not np.array_equal(pixels(less.images[0]), pixels(more.images[0]))
    assert checksum(pipe) == before
    record = more.images[0].record
    assert record is not None
    assert record.loaded["loras"] == {mine: metadata.file_checksum(Path(mine))}
    assert np.array_equal(pixels(more.images[0]), pixels(pipe(more.request).images[0]))
    with pytest.raises(WeightsMissing, match="lost"):
        pipe(prompt="x", sliders={str(tmp_path / "lost.safetensors"): 1.0}, **QUICK)


def test_landmarks_come_from_a_photo_and_turn_with_the_pose(
    pipe: GeneratePipeline, tiny: Path, drawn: Drawn, tmp_path: Path
) -> None:
    from facegen.face.landmarks import LandmarkFinder
    from facegen.face.networks import KeypointNet
    from facegen.models.geometry import Geometry, draw_landmarks, posed_points
    from facegen.world.render import render
    from facegen.world.sampling import scene_for

    with pytest.raises(WeightsMissing, match="facegen train mini --stages geometry"):
        pipe(geometry=drawn(1), geometry_kind="landmarks", seed=1, **QUICK)
    control = Geometry.fresh("landmarks", pipe.model)
    with torch.no_grad():
        for parameter in control.net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    pipe.loaded.controls["landmarks"] = Geometry.from_pretrained(control.save(tmp_path), pipe.model)
    torch.manual_seed(0)
    pipe.loaded.finder = LandmarkFinder(KeypointNet(widths=(8, 8, 8, 8), size=32, count=68).eval())
    call: dict[str, Any] = {"geometry": drawn(1), "geometry_kind": "landmarks", "seed": 1, **QUICK}
    photo, turned = pipe(**call).images[0], pipe(**call, pose={"yaw": 0.4}).images[0]
    off = pipe(**call, geometry_strength=0.0).images[0]
    assert not np.array_equal(pixels(photo), pixels(turned))
    assert np.array_equal(pixels(off), pixels(pipe(seed=1, **QUICK).images[0]))
    lines = draw_landmarks(render(scene_for(0, 1, 1), 64).landmarks68[0].numpy(), (64, 64))
    as_map = Image.fromarray((lines.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    assert not np.array_equal(pixels(pipe(**{**call, "geometry": as_map}).images[0]), pixels(off))
    with pytest.raises(WrongRequest, match="give the photo"):
        pipe(**{**call, "geometry": as_map}, pose={"yaw": 0.4})
    # The person's own head, where a photo of them is all there is.
    pipe.load_adapter(tiny / "adapters" / "ip_adapter_faceid")
    own: dict[str, Any] = {"faces": drawn(1), "geometry_kind": "landmarks", "seed": 1, **QUICK}
    ahead, aside = (pipe(**own, pose=pose).images[0] for pose in ({"yaw": 0.01}, {"yaw": 0.5}))
    assert not np.array_equal(pixels(ahead), pixels(aside))
    person = pipe.person([drawn(1)], "only", pipe.adapters)
    head = pipe._head(person)
    assert not np.allclose(posed_points({}, (64, 64), head), posed_points({}, (64, 64)), atol=0.1)
    with pytest.raises(WrongRequest, match="A pose needs"):
        pipe(prompt="x", pose={"yaw": 0.1}, **QUICK)


def test_one_net_may_follow_every_kind(pipe: GeneratePipeline, tiny: Path, tmp_path: Path, drawn: Drawn) -> None:
    from facegen.models.geometry import ALL, KINDS, Geometry

    (tmp_path / "base").symlink_to(tiny / "base")
    own = GeneratePipeline(replace(pipe.loaded, loading=replace(pipe.loaded.loading, model=str(tmp_path)), controls={}))
    shared = Geometry.fresh(ALL, own.model)
    with torch.no_grad():
        for parameter in shared.net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    shared.save(tmp_path / "controls")
    Geometry.fresh("depth", own.model).save(tmp_path / "controls")
    assert {kind: own.control(kind).kind for kind in KINDS} == dict.fromkeys(KINDS, ALL) | {"depth": "depth"}
    assert own.control("normals") is own.control("sketch")
    call: dict[str, Any] = {"geometry": drawn(1), "seed": 1, **QUICK}
    sketched, shaded = (own(**call, geometry_kind=kind).images[0] for kind in ("sketch", "normals"))
    assert not np.array_equal(pixels(sketched), pixels(shaded))


def test_light_comes_from_a_photo(pipe: GeneratePipeline, drawn: Drawn) -> None:
    from facegen.models.geometry import posed_points
    from facegen.steering import light_guidance

    # Darker towards one side: what the tiny detector's face is lit like.
    fall = np.linspace(0.3, 1.0, 160)[None, :, None]
    left = Image.fromarray((np.asarray(drawn(1)) * fall[:, ::-1]).astype(np.uint8))
    call: dict[str, Any] = {"seed": 1, **QUICK}
    plain = pipe(**call).images[0]
    assert np.array_equal(pixels(plain), pixels(pipe(**call, light_from=left, light_strength=0.0).images[0]))
    lit = pipe(**call, light_from=left, light_strength=1.0)
    assert not np.array_equal(pixels(lit.images[0]), pixels(plain))
    assert np.array_equal(pixels(lit.images[0]), pixels(pipe(lit.request).images[0]))
    with pytest.raises(WrongRequest, match="one person"):
        pipe(**call, light_from=left, people=[drawn(1), drawn(2)])

    guidance = light_guidance(pipe.model, 0.8, torch.from_numpy(posed_points({}, (64, 64))).float())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    before = guidance.loss(latents, torch.tensor(0))
    before.sum().backward()
    assert latents.grad is not None
    with torch.no_grad():
        assert float(guidance.loss(latents - 0.05 * latents.grad, torch.tensor(0))) < float(before)


def test_a_variant_is_said_in_the_request_and_comes_back(pipe: GeneratePipeline, tiny: Path, me: Path) -> None:
    """As adapters of a call; the record loads it so again, and the loaded one answers to its path and its name."""
    (file,) = (tiny / "adapters" / "ip_adapter_faceid").iterdir()
    with pytest.raises(WrongRequest, match="no variant 'plusv3'"):
        pipe(faces=me, adapters=f"{file}=plusv3", seed=1, **QUICK)
    (picture,) = pipe(faces=me, adapters=f"{file}=faceid", seed=1, **QUICK).images
    assert pipe._wear(str(file)) == pipe._wear(f"{file}=faceid") == "ip_adapter_faceid"
    assert picture.record is not None
    assert f"--adapters {file}=faceid" in command_line(picture.record)
    pipe.unload_adapter("ip_adapter_faceid")
    pipe.load_recorded_adapters(picture.record)
    assert pipe.adapters == ("ip_adapter_faceid",)
