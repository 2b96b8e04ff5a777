"""The manifest of published weights is sound, and a broken one is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from facegen import manifest
from facegen.adapter import find_adapters
from facegen.manifest import objection, of_family

KNOWN = manifest.manifest()
OURS = {"expression"}  # adapters of facegen's own, which nobody published


def test_every_adapter_and_its_pack_are_known() -> None:
    for name, kind in find_adapters().items():
        if name not in OURS:
            assert of_family(name, None, KNOWN) is not None, name
            assert kind.pack in KNOWN
    assert {weights.kind for weights in KNOWN.values()} == set(manifest.KINDS)


def test_what_is_not_known_is_said_not_invented() -> None:
    """Revisions are commits (or a tag of ModelScope's), checksums come with weights, never with what people make."""
    for weights in KNOWN.values():
        if weights.repo is not None and weights.revision is not None:
            assert len(bytes.fromhex(weights.revision)) == 20
        assert weights.name == "mini" or weights.source.startswith("https://")
    assert KNOWN["sd21"].revision is None
    assert not KNOWN["arc2face"].verified
    assert KNOWN["pulid"].verified


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    sdxl, clip = KNOWN["sdxl"], KNOWN["clip-vit-h"]
    assert sdxl.address(sdxl.files[1]) == (
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/"
        "462165984030d82259a11f4367a4eed129e94a7b/unet/config.json"
    )
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.local/hf/")
    assert str(clip.address(clip.files[0])).startswith("http://mirror.local/hf/h94/IP-Adapter/resolve/018e40")
    assert str(clip.address(clip.files[0])).endswith("/models/image_encoder/config.json")
    plus = KNOWN["restoreformer"]
    assert str(plus.address(plus.files[0])).endswith("/v1.0.0/RestoreFormer%2B%2B.ckpt")
    assert KNOWN["dfdnet"].address(KNOWN["dfdnet"].files[0]) is None


def test_terms_add_up_over_what_is_needed() -> None:
    assert objection(KNOWN["ip_adapter"], KNOWN) is None
    assert objection(KNOWN["sdxl"], KNOWN) is None
    assert objection(KNOWN["photomaker-v1"], KNOWN) is None
    assert "S-Lab" in str(objection(KNOWN["codeformer"], KNOWN))
    reason = str(objection(KNOWN["instantid"], KNOWN))
    assert "Apache-2.0" in reason, "its own terms would allow it"
    assert "antelopev2: non-commercial research only" in reason
    assert "buffalo_l" in str(objection(KNOWN["photomaker"], KNOWN))
    deep = {**KNOWN, "outer": replace(KNOWN["sdxl"], name="outer", needs=("instantid",))}
    assert "antelopev2" in str(objection(deep["outer"], deep))


def test_a_variant_has_terms_of_its_own() -> None:
    first, second = of_family("photomaker", "v1", KNOWN), of_family("photomaker", "v2", KNOWN)
    assert (first and first.name, second and second.name) == ("photomaker-v1", "photomaker")
    assert of_family("expression", None, KNOWN) is None


GOOD = '[a]\nkind = "base"\nlicence = "MIT"\nrepo = "x/y"\nfiles = [{ path = "a.bin" }]\n'


def test_a_plain_manifest_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    assert manifest.read(tmp_path / "a.toml")["a"].files[0].path == "a.bin"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('kind = "base"', 'kind = "basis"', "kind 'basis'"),
        ('licence = "MIT"', 'licence = ""', "licence"),
        ('repo = "x/y"', "", "where it comes from"),
        ('repo = "x/y"', 'repo = "x/y"\npage = "https://x"', "where it comes from"),
        ('repo = "x/y"', 'repo = "x/y"\nrevison = "1"', "field 'revison'"),
        ('repo = "x/y"', 'repo = "x/y"\nneeds = ["b"]', "needs b"),
        ('path = "a.bin"', 'path = "../a.bin"', "out of its folder"),
        ('path = "a.bin"', 'path = "a.bin", sha256 = "12"', "checksum"),
        ('path = "a.bin"', 'path = "a.bin", size = 0', "no size"),
        ('path = "a.bin"', 'path = "a.bin", sise = 1', "sise"),
        ('path = "a.bin"', 'path = "a.bin", optional = true', "at least one file"),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path: Path, before: str, after: str, words: str) -> None:
    (tmp_path / "a.toml").write_text(GOOD.replace(before, after))
    with pytest.raises(ValueError, match=words):
        manifest.read(tmp_path / "a.toml")
