"""IP-Adapter-FaceID: its variants, what each does with one or several photos, and their files."""

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
from torch import Tensor

from facegen.adapter import AdapterRequest, load_adapter, told_variant
from facegen.adapters.ip_adapter_faceid import IPAdapterFaceID, Projector, Variant
from facegen.conditions import TokenCondition
from facegen.errors import CheckpointBroken, WrongAdapter, WrongRequest
from facegen.models.base import Model
from facegen.models.clip import ClipView
from facegen.models.projections import FacePlusProjection, FaceProjection, ProjectionSizes
from facegen.models.resampler import PerceiverSizes, Resampler

DIM, CLIP = 18, 24
ASKED = AdapterRequest(height=64, width=64)
VARIANTS: tuple[Variant, ...] = ("faceid", "plus", "plusv2", "portrait", "unnorm")
NAMES = {
    "faceid": "ip-adapter-faceid_sd15.bin",
    "plus": "ip-adapter-faceid-plus_sd15.bin",
    "plusv2": "ip-adapter-faceid-plusv2_sd15.bin",
    "portrait": "ip-adapter-faceid-portrait_sd15.bin",
    "unnorm": "ip-adapter-faceid-portrait_sd15_unnorm.bin",
}
Photos = Callable[[int], Any]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP image encoder for pictures of 112 px."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=CLIP,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=112,
        patch_size=56,
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip") / "image_encoder"
    encoder = CLIPVisionModelWithProjection(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.3, generator=generator)
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder: Path) -> ClipView:
    from transformers import CLIPVisionModelWithProjection

    return ClipView(CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval())


def made(variant: Variant, model: Model, clip: ClipView) -> IPAdapterFaceID:
    width = model.text_width
    sizes = ProjectionSizes(DIM, 8, 3 if variant == "portrait" else 2, width)
    projector: Projector = FaceProjection(sizes)
    if variant == "unnorm":
        projector = Resampler(PerceiverSizes(DIM, 24, width, depth=1, heads=1), 3)
    elif variant in ("plus", "plusv2"):
        projector = FacePlusProjection(sizes, PerceiverSizes(CLIP, width, width, depth=1, heads=1))
    plus = isinstance(projector, FacePlusProjection)
    adapter = IPAdapterFaceID.fresh(
        model, DIM, variant=variant, projector=projector, rank=2, clip=clip if plus else None
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.modules().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    adapter.modules().requires_grad_(False).eval()
    return adapter


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, model: Model, clip: ClipView) -> IPAdapterFaceID:
    return made(request.param, model, clip)


def condition(
    adapter: IPAdapterFaceID, model: Model, faces: list[Any], request: AdapterRequest = ASKED
) -> TokenCondition:
    (one,) = adapter.conditions(faces, request, model)
    assert isinstance(one, TokenCondition)
    return one


def person(count: int) -> list[Any]:
    """Photos of one person: embeddings that differ a little."""
    generator = np.random.default_rng(0)
    mean = generator.standard_normal(DIM) * 5

    class Photo:
        points = np.array([[30, 50], [60, 50], [45, 65], [33, 80], [57, 80]], np.float32)
        image = Image.fromarray(generator.integers(0, 255, (128, 96, 3), dtype=np.uint8))

        def __init__(self) -> None:
            self.embedding = (mean + generator.standard_normal(DIM)).astype(np.float32)
            self.unit = self.embedding / np.linalg.norm(self.embedding)

    return [Photo() for _ in range(count)]


def test_normalisation(variant: IPAdapterFaceID, model: Model) -> None:
    """Unit length for all but unnorm, which takes the embedding as it comes."""
    clip = None if variant.clip is None else torch.ones(1, 3, 112, 112)
    embedding = torch.randn(1, DIM, generator=torch.Generator().manual_seed(2))
    near, far = (variant.tokens(embedding * length, replace(ASKED, clip=clip)) for length in (1.0, 7.0))
    assert torch.equal(near[0], far[0])
    assert torch.allclose(near[1], far[1], atol=1e-5) is (variant.variant != "unnorm")


def test_several_photos(variant: IPAdapterFaceID, model: Model) -> None:
    """Portrait sets the tokens of k photos side by side; the others fuse the photos."""
    photos = person(3)
    one, three = condition(variant, model, photos[:1]).tokens, condition(variant, model, photos).tokens
    assert not torch.allclose(one[1], three[1, :, : one.shape[2]], atol=1e-6) or variant.variant == "portrait"
    if variant.variant != "portrait":
        assert three.shape == one.shape
        return
    assert three.shape[2] == 3 * one.shape[2]
    alone = [condition(variant, model, [photo]).tokens for photo in photos]
    assert torch.allclose(three, torch.cat(alone, dim=2), atol=1e-6)


def test_lora(variant: IPAdapterFaceID, model: Model, photos: Photos) -> None:
    first, second = condition(variant, model, [photos(1)]), condition(variant, model, [photos(2)])
    if variant.variant in ("portrait", "unnorm"):
        assert first.lora is None
        return
    assert first.lora is not None
    assert set(first.lora) == {layer.index for layer in model.attention_layers}, "self-attention too"
    assert first.lora is second.lora, "two faces wear one LoRA"


def test_two_faces_in_one_picture(
    variant: IPAdapterFaceID, model: Model, photos: Photos, call: Callable[..., Tensor]
) -> None:
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    people = [
        condition(variant, model, [photos(seed)], replace(ASKED, mask=mask))
        for seed, mask in ((1, left), (2, 1 - left))
    ]
    both = call(people)
    assert not torch.allclose(both, call(people[:1]), atol=1e-4)
    assert not torch.allclose(both, call(people[1:]), atol=1e-4)


def test_files_keep_the_variant(
    variant: IPAdapterFaceID, model: Model, clip_folder: Path, tmp_path: Path, call: Callable[..., Tensor]
) -> None:
    (tmp_path / "image_encoder").symlink_to(clip_folder)
    file = variant.save(tmp_path)
    assert file.name == NAMES[variant.variant]
    (tmp_path / f"{file.stem}_lora.safetensors").write_bytes(b"the companion that is not read")
    for source in (file, tmp_path):
        again = load_adapter(source, model)
        assert isinstance(again, IPAdapterFaceID)
        assert again.variant == variant.variant
        first, second = (condition(one, model, person(2)) for one in (variant, again))
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(call([first]), call([second]))


def test_two_files_in_one_folder(model: Model, clip: ClipView, tmp_path: Path) -> None:
    made("faceid", model, clip).save(tmp_path)
    made("portrait", model, clip).save(tmp_path)
    with pytest.raises(WrongRequest, match="name one of them"):
        load_adapter(tmp_path, model)


@pytest.fixture
def plus(model: Model, clip: ClipView) -> Callable[[Variant], IPAdapterFaceID]:
    return lambda variant: made(variant, model, clip)


def test_shortcut_and_structure(plus: Callable[[Variant], IPAdapterFaceID], model: Model) -> None:
    first, second = plus("plus"), plus("plusv2")
    second.projector = first.projector
    photo = person(1)
    read = condition(first, model, photo).tokens
    assert torch.equal(condition(first, model, photo, replace(ASKED, structure=0.3)).tokens, read), (
        "v1 has no such knob"
    )
    faces = condition(second, model, photo, replace(ASKED, structure=0.0)).tokens
    assert torch.allclose(condition(second, model, photo).tokens, faces + read, atol=1e-5)
    assert torch.allclose(
        condition(second, model, photo, replace(ASKED, structure=0.5)).tokens, faces + 0.5 * read, atol=1e-5
    )


def test_clip_sees_the_aligned_face_in_bgr(clip: ClipView, plus: Callable[[Variant], IPAdapterFaceID]) -> None:
    from facegen.face.align import norm_crop

    (photo,) = person(1)
    adapter = plus("plus")
    pixels = adapter.complete([photo], ASKED).clip
    assert pixels is not None
    crop = np.asarray(norm_crop(photo.image, photo.points, 112))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    wanted = ((crop[..., ::-1] / 255 - mean) / std).transpose(2, 0, 1)
    assert np.allclose(pixels[0].numpy(), wanted, atol=1e-5)
    rgb = ClipView(clip.encoder, bgr=False).pixels(crop)
    assert np.allclose(rgb[0].numpy(), ((crop / 255 - mean) / std).transpose(2, 0, 1), atol=1e-5)


def test_the_unconditional_half_sees_zero_pixels(plus: Callable[[Variant], IPAdapterFaceID]) -> None:
    adapter = plus("plusv2")
    zero = adapter.tokens(torch.zeros(1, DIM), replace(ASKED, clip=torch.zeros(1, 3, 112, 112)))
    some = adapter.tokens(torch.ones(2, DIM), replace(ASKED, clip=torch.ones(1, 3, 112, 112)))
    assert torch.allclose(zero[0], zero[1], atol=1e-6)
    assert torch.allclose(some[0, :1], zero[0], atol=1e-6)
    assert some.shape[:2] == (2, 2), "one photo, two embeddings"


def test_plus_needs_the_photo(plus: Callable[[Variant], IPAdapterFaceID], model: Model) -> None:
    class Bare:
        embedding = np.ones(DIM, np.float32)

    with pytest.raises(WrongRequest, match="looks at the photo"):
        plus("plus").conditions([Bare()], ASKED, model)
    with pytest.raises(WrongRequest, match="not its embedding alone"):
        plus("plus").conditions_from_embeddings(torch.ones(1, DIM), model)
    with pytest.raises(WrongRequest, match="give its encoder"):
        IPAdapterFaceID.fresh(model, DIM, variant="plus")


def test_image_encoders_that_do_not_fit(
    plus: Callable[[Variant], IPAdapterFaceID], model: Model, tmp_path: Path, clip_folder: Path
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    file = plus("plus").save(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    other = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=112, patch_size=56, projection_dim=8))
    other.save_pretrained(tmp_path / "image_encoder")
    with pytest.raises(WrongAdapter, match="reads CLIP tokens 24 wide, the image encoder beside it gives 8"):
        load_adapter(file, model)
    (tmp_path / "image_encoder/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointBroken, match="image_encoder"):
        load_adapter(file, model)


def test_fresh_lora_changes_nothing_yet(model: Model) -> None:
    adapter = IPAdapterFaceID.fresh(model, DIM, rank=4)
    assert adapter.streams.rank == 4
    for layer in (adapter.streams.lora or {}).values():
        assert layer.q is not None
        assert not bool(layer.q.up.weight.any())
        assert bool(layer.q.down.weight.any())
    with pytest.raises(WrongRequest, match="reads 18 numbers, not 17"):
        IPAdapterFaceID.fresh(model, 17, projector=FaceProjection(ProjectionSizes(DIM, 8, 2, model.text_width)))


def test_of_a_folder_with_files_for_several_bases_the_fitting_one_is_taken(
    model: Model, other_model: Model, clip: ClipView, tmp_path: Path
) -> None:
    file = made("portrait", model, clip).save(tmp_path)
    made("portrait", other_model, clip).save(tmp_path / "other").rename(
        tmp_path / "ip-adapter-faceid-portrait_sdxl.bin"
    )
    for base in (model, other_model):
        adapter = load_adapter(tmp_path, base)
        assert isinstance(adapter, IPAdapterFaceID)
        assert adapter.streams.token_width == base.text_width
    assert file.is_file()


def test_the_user_says_what_keys_and_name_do_not(
    variant: IPAdapterFaceID, model: Model, clip_folder: Path, tmp_path: Path
) -> None:
    """A file that was renamed: its variant may be said; one that its keys rule out is refused."""
    shutil.copytree(clip_folder, tmp_path / "image_encoder")
    file = variant.save(tmp_path / "made").rename(tmp_path / "renamed.bin")
    loaded = IPAdapterFaceID.from_pretrained(file, model, variant=variant.variant)
    assert loaded.variant == variant.variant
    other: Variant = "portrait" if variant.variant != "portrait" else "faceid"
    # unnorm has InstantID's keys: without its name or a word of the user's it is taken for that
    kind, words = (WrongAdapter, "InstantID") if variant.variant == "unnorm" else (WrongRequest, f"not {other};")
    with pytest.raises(kind, match=words):
        IPAdapterFaceID.from_pretrained(file, model, variant=other)
    if variant.variant != "unnorm":
        with pytest.raises(WrongRequest, match="by its keys, not unnorm"):
            IPAdapterFaceID.from_pretrained(file, model, variant="unnorm")


@pytest.mark.parametrize("said", ["plus", "plusv2"])
def test_the_variant_is_said_where_the_keys_leave_it_open(
    said: Variant, model: Model, clip: ClipView, clip_folder: Path, tmp_path: Path
) -> None:
    """As a keyword, in the source, for a file as for its folder; what the name says does not count then."""
    saved = made("plus" if said == "plusv2" else "plusv2", model, clip).save(tmp_path / "models")
    shutil.copytree(clip_folder, tmp_path / "models" / "image_encoder")
    for adapter in (
        load_adapter(saved, model, variant=said),
        load_adapter(f"{saved}={said}", model),
        load_adapter(f"{saved.parent}={said}", model),
    ):
        assert isinstance(adapter, IPAdapterFaceID)
        assert adapter.variant == said


def test_an_unnormalised_file_under_any_name(model: Model, clip: ClipView, tmp_path: Path) -> None:
    """By its keys it is InstantID's."""
    saved = made("unnorm", model, clip).save(tmp_path)
    adapter = load_adapter(saved.rename(tmp_path / "mine.bin"), model, variant="unnorm")
    assert isinstance(adapter, IPAdapterFaceID)
    assert adapter.variant == "unnorm"


def test_a_wrong_variant_is_one_sentence(model: Model, clip: ClipView, tmp_path: Path) -> None:
    saved = made("faceid", model, clip).save(tmp_path)
    with pytest.raises(WrongRequest, match="FaceID, which has no variant 'plusv3'; there are: faceid, plus,"):
        load_adapter(saved, model, variant="plusv3")
    with pytest.raises(WrongRequest, match=r"no variant '0\.8'.*is said by strength"):
        load_adapter(f"{saved}=0.8", model)
    with pytest.raises(WrongRequest, match="variant faceid, by its keys, not plusv2; leave the variant out"):
        load_adapter(saved, model, variant="plusv2")


def test_a_path_that_holds_an_equals_sign_is_whole(tmp_path: Path) -> None:
    there = tmp_path / "a=b"
    there.mkdir()
    for whole in (there, there / "face.bin", Path("lr=3/face.bin"), Path("instantid")):
        assert told_variant(whole) == (str(whole), None)
    assert told_variant(f"{there}=plus") == (str(there), "plus")
    assert told_variant("lr=3/face.bin=plusv2") == ("lr=3/face.bin", "plusv2")
