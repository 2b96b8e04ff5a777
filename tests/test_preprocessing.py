"""How faces are prepared is as the published code does it, and the code takes it from the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from facegen import preprocessing as module
from facegen.adapter import find_adapters, given
from facegen.manifest import manifest
from facegen.models.clip import clip_pixels
from facegen.preprocessing import Preprocessing, View, preprocessing

# pack, embedding, face of the systems, as their fact sheets have it
SYSTEMS = {
    "arc2face": ("antelopev2", "unit", "largest"),
    "instantid": ("antelopev2", "raw", "largest"),
    "ip_adapter_faceid": ("buffalo_l", "unit", "best"),
    "ip_adapter_faceid_unnorm": ("buffalo_l", "raw", "best"),
    "storymaker": ("buffalo_l", "unit", "largest"),
    "photomaker": ("buffalo_l", "raw", "best"),
    "pulid": ("antelopev2", "raw", "largest"),
    "wplus": ("buffalo_l", "code", "only"),
    "precisecontrol": ("buffalo_l", "code", "only"),
    "facechain_fact": ("buffalo_l", "none", "best"),
    "id_animator": ("buffalo_l", "none", "best"),
    "ip_adapter": ("buffalo_l", "none", "only"),
}
# template, side, seen, channels
VIEWS = {
    "ip_adapter_faceid": ("arcface", 224, 224, "bgr"),
    "ip_adapter": ("whole", 224, 224, "rgb"),
    "storymaker": ("arcface", 224, 224, "rgb"),
    "photomaker": ("whole", 224, 224, "rgb"),
    "pulid": ("facexlib", 512, 336, "rgb"),
    "wplus": ("ffhq", 512, 256, "rgb"),
    "precisecontrol": ("ffhq", 512, 256, "rgb"),
    "facechain_fact": ("arcface", 112, 112, "rgb"),
    "id_animator": ("arcface", 112, 224, "rgb"),
    "recogniser": ("arcface", 112, 112, "rgb"),
    "bisenet": ("facexlib", 512, 512, "rgb"),
    "parsenet": ("facexlib", 512, 512, "rgb"),
    "restorer": ("facexlib", 512, 512, "rgb"),
}
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MEANS = {"bisenet": IMAGENET} | dict.fromkeys(
    ("wplus", "precisecontrol", "facechain_fact", "recogniser", "parsenet", "restorer"), HALF
)


def test_every_number_is_the_published_one() -> None:
    assert set(module.names()) == SYSTEMS.keys() | VIEWS.keys()
    for name in module.names():
        one = preprocessing(name)
        assert one.source.startswith("github ")
        if name in SYSTEMS:
            assert (one.pack, one.embedding, one.face) == SYSTEMS[name]
            assert one.pack in manifest()
        assert (one.view is not None) == (name in VIEWS)
        if one.view is not None:
            assert (one.view.template, one.view.side, one.view.seen, one.view.channels) == VIEWS[name]
            assert (one.view.mean, one.view.std) == MEANS.get(name, CLIP)
    assert preprocessing("id_animator").det == 320


def test_adapters_take_it_from_the_data() -> None:
    for name, kind in find_adapters().items():
        if name == "expression":  # facegen's own
            continue
        assert kind.sees is preprocessing(name)  # type: ignore[attr-defined]
        assert kind.pack == SYSTEMS[name][0]


def test_embeddings_are_read_as_published() -> None:
    raw = torch.tensor([[3.0, 4.0]])
    assert torch.equal(given(raw, preprocessing("instantid")), raw)
    assert torch.allclose(given(raw, preprocessing("storymaker")), torch.tensor([[0.6, 0.8]]))


def test_pixels_are_normalised_as_published() -> None:
    picture = torch.randint(0, 256, (5, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scaled = picture.float() / 255
    wanted = (scaled - torch.tensor(CLIP[0])) / torch.tensor(CLIP[1])
    assert torch.equal(clip_pixels(picture.numpy())[0].permute(1, 2, 0), wanted)
    half = preprocessing("wplus").sight.normal(scaled.permute(2, 0, 1))
    assert torch.allclose(half, (scaled.permute(2, 0, 1) - 0.5) / 0.5)
    assert float(half.min()) >= -1


@pytest.mark.parametrize(
    "change",
    [{"template": "dlib"}, {"channels": "bgrx"}, {"std": (1.0, 0.0, 1.0)}, {"mean": (1.0,)}, {"side": 0}],
)
def test_what_cannot_be_is_refused(change: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "template": "ffhq", "side": 512, "seen": 256, "channels": "rgb", "mean": HALF[0], "std": HALF[1],
    }  # fmt: skip
    View(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"among|view has"):
        View(**(fields | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="among"):
        Preprocessing(source="x", embedding="half")  # type: ignore[arg-type]


def test_no_number_is_kept_twice(root: Path) -> None:
    """CLIP's mean and ImageNet's stand in the data alone."""
    for folder in ("facegen", "adapters", "pipelines"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text("utf-8")
            assert "0.48145466" not in text, path
            assert "0.456" not in text or path.name == "dfdnet.py", path  # DFDNet's are among its weights
