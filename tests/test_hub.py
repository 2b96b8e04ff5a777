from __future__ import annotations

import json
import logging
import socket
import zipfile
from pathlib import Path

import pytest

from facegen import hub
from facegen.errors import CheckpointBroken, WeightsMissing


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, an empty hub cache, and no network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setenv("FACEGEN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("FACEGEN_DOWNLOAD", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    hub._announce.cache_clear()
    return tmp_path


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_every_name_has_a_source_and_a_licence() -> None:
    names = {weights.name for weights in hub.list_weights()}
    assert {"mini", "sd15", "sdxl", "arc2face", "instantid", "ip_adapter_faceid", "antelopev2", "buffalo_l"} <= names
    for weights in hub.list_weights():
        assert weights.licence
        assert weights.files
        assert weights.name == "mini" or weights.source.startswith("https://")
        for file in weights.files:
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    assert "non-commercial" in hub.licence("buffalo_l")
    assert hub.licence("IP-Adapter-FaceID") == hub.licence("ip_adapter_faceid")
    assert hub.licence("/some/folder") == ""


@pytest.mark.parametrize("name", [name for name in hub.WEIGHTS if name != "mini"])
def test_missing_weights_say_what_to_put_where(name: str, alone: Path) -> None:
    with pytest.raises(WeightsMissing) as error:
        hub.resolve(name)
    text = str(error.value)
    assert str(alone / "home" / name) in text
    assert hub.WEIGHTS[name].source in text
    assert hub.WEIGHTS[name].files[0].path in text


def test_unknown_names(alone: Path) -> None:
    with pytest.raises(WeightsMissing, match="mean buffalo_l"):
        hub.resolve("bufalo_l")
    with pytest.raises(WeightsMissing, match="neither a path nor"):
        hub.resolve("somebody/something")
    with pytest.raises(WeightsMissing, match="no such path"):
        hub.resolve("/nowhere/at/all")
    touch(alone / "mine" / "model_index.json")
    assert hub.resolve(str(alone / "mine"), part="model_index.json").is_file()
    with pytest.raises(WeightsMissing, match="incomplete"):
        hub.resolve(str(alone / "mine"), part="unet")


def test_weights_in_the_home_folder_are_found(alone: Path) -> None:
    folder = alone / "home" / "instantid"
    touch(folder / "ip-adapter.bin", folder / "ControlNetModel" / "config.json")
    with pytest.raises(WeightsMissing):
        hub.resolve("instantid")  # half of it
    touch(folder / "ControlNetModel" / "diffusion_pytorch_model.safetensors")
    assert hub.resolve("instantid") == folder
    assert hub.resolve("InstantID", part="ip-adapter.bin") == folder / "ip-adapter.bin"
    touch(alone / "home" / "ip_adapter_faceid" / "ip-adapter-faceid-plusv2_sdxl.bin")
    assert hub.resolve("ip-adapter-faceid").name == "ip_adapter_faceid"


def test_the_hub_cache_is_used_offline(alone: Path) -> None:
    revision = hub.WEIGHTS["sd15"].revision
    store = alone / "hf" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    snapshot = store / "snapshots" / str(revision)
    for file in hub.WEIGHTS["sd15"].files:
        touch(snapshot / file.path.replace("*", ".safetensors"))
    assert hub.resolve("sd15") == snapshot
    touch(store / "refs" / "main")
    (store / "refs" / "main").write_text(str(revision))
    assert hub.resolve("stable-diffusion-v1-5/stable-diffusion-v1-5") == snapshot


def test_the_nested_folder_of_antelopev2(alone: Path) -> None:
    folder = alone / ".insightface" / "models" / "antelopev2"
    touch(folder / "antelopev2" / "glintr100.onnx", folder / "antelopev2" / "scrfd_10g_bnkps.onnx")
    assert hub.resolve("antelopev2") == folder / "antelopev2"
    touch(folder / "det.onnx")
    assert hub.resolve("antelopev2") == folder


def test_a_zip_unpacks_flat_and_stays_in_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "pack.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("antelopev2/glintr100.onnx", b"a")
        packed.writestr("../../evil.onnx", b"b")
        packed.writestr("antelopev2/run.py", b"c")
    hub.unpack(archive, tmp_path / "deep" / "pack")
    assert sorted(p.name for p in tmp_path.rglob("*.onnx")) == ["evil.onnx", "glintr100.onnx"]
    assert all(p.parent == tmp_path / "deep" / "pack" for p in tmp_path.rglob("*.onnx"))
    (tmp_path / "bad.zip").write_bytes(b"PK nothing")
    with pytest.raises(CheckpointBroken):
        hub.unpack(tmp_path / "bad.zip", tmp_path / "other")


def test_non_commercial_terms_are_said_once(alone: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(alone / "home" / "buffalo_l" / "det_10g.onnx")
    with caplog.at_level(logging.WARNING):
        hub.resolve("buffalo_l")
        hub.resolve("buffalo_l")
    assert sum("non-commercial" in record.getMessage() for record in caplog.records) == 1


def test_checksums(tmp_path: Path) -> None:
    weights = hub.WEIGHTS["buffalo_l"]
    touch(tmp_path / "det_10g.onnx")
    assert len(hub.verify(weights, tmp_path)) == 1
    folder = tmp_path / "mini"
    touch(folder / "a" / "b.bin", folder / "c.json")
    assert hub.check_checksums(folder) == []
    hub.write_checksums(folder)
    assert hub.check_checksums(folder) == []
    (folder / "c.json").write_bytes(b"y")
    (folder / "a" / "b.bin").unlink()
    problems = hub.check_checksums(folder)
    assert len(problems) == 2
    assert "missing" in problems[0]
    assert "changed" in problems[1]


def test_listing_is_plain(alone: Path) -> None:
    rows = hub.listing()
    assert json.loads(json.dumps([row.to_json() for row in rows]))[0]["name"] == "mini"
    text = "\n".join(str(row) for row in rows)
    assert "not on this machine" in text
    assert "unverified" in text
    assert {row.to_json()["checksums"] for row in rows} == {"known", "unverified"}
