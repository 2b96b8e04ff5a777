"""Sets of weights fetched from a real server, and what `facegen weights` says of them."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from facegen import hub
from facegen.cli import main
from facegen.errors import CheckpointBroken, WeightsMissing
from facegen.manifest import File, Weights
from tests.server import Site, serving

BIG, SMALL = b"weights " * 20_000, b'{"a": 1}'


def packed() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pack/det.onnx", b"detector")
        archive.writestr("pack/rec.onnx", b"recogniser")
    return buffer.getvalue()


ZIP = packed()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sets(address: str) -> dict[str, Weights]:
    big = File("unet/big.safetensors", len(BIG), digest(BIG), like="unet/big*")
    found = (
        Weights("net", "base", "MIT", (File("config.json"), big, File("more.bin", optional=True)), repo="a/b"),
        Weights("pinned", "encoder", "MIT", (File("config.json"),), repo="a/b", revision="c" * 40, folder="deep"),
        Weights("several", "adapter", "MIT", (File("one.bin"), File("two.bin")), url=f"{address}/files", choice=True),
        Weights(
            "pack", "pack", "research only", (File("det.onnx", 8, digest(b"detector")), File("rec.onnx")),
            archive=File(f"{address}/pack.zip", None, digest(ZIP)), commercial=False,
        ),
        Weights("person", "adapter", "MIT", (File("a.bin"),), url=f"{address}/files", needs=("net", "pack")),
        Weights("hand", "restorer", "MIT", (File("a.bin"),), page="https://example.org/page"),
    )  # fmt: skip
    return {weights.name: weights for weights in found}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    content = {
        "/a/b/resolve/main/config.json": SMALL,
        "/a/b/resolve/main/unet/big.safetensors": BIG,
        "/a/b/resolve/main/more.bin": b"more",
        f"/a/b/resolve/{'c' * 40}/deep/config.json": SMALL,
        "/files/one.bin": b"one",
        "/files/two.bin": b"two",
        "/files/a.bin": b"a",
        "/pack.zip": ZIP,
    }
    monkeypatch.setenv("FACEGEN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("FACEGEN_DOWNLOAD", raising=False)
    monkeypatch.chdir(tmp_path)
    hub._announce.cache_clear()
    with serving(content) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setattr(hub, "WEIGHTS", sets(running.address))
        yield running


def paths(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_set_is_fetched_once(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown: list[tuple[str, int, int]] = []
    site.breaks = [len(SMALL), 1000]  # the second file breaks off
    folder = hub.fetch("net", lambda *now: shown.append(now))
    assert folder == tmp_path / "home" / "net"
    assert paths(folder) == ["config.json", "unet/big.safetensors"]
    assert (folder / "unet/big.safetensors").read_bytes() == BIG
    assert ("big.safetensors", len(BIG), len(BIG)) in shown
    assert site.asked[-1][1] == "bytes=1000-"
    asked = len(site.asked)
    assert hub.fetch("net") == folder
    assert len(site.asked) == asked, "what is there is not asked for again"
    assert hub.resolve("net") == folder
    assert hub.fetch("net", everything=True) == folder
    with caplog.at_level(logging.WARNING):
        assert hub.fetch("net/more.bin").read_bytes() == b"more"
    assert "no checksum is published for more.bin" in caplog.text


def test_a_file_as_good_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    other = tmp_path / "home" / "net" / "unet" / "big.fp16.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"half")
    hub.fetch("net")
    assert paths(tmp_path / "home" / "net") == ["config.json", "unet/big.fp16.safetensors"]


def test_a_damaged_file_is_fetched_again(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "home" / "net" / "unet" / "big.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(BIG[::-1])
    assert hub.verify(hub.WEIGHTS["net"], tmp_path / "home" / "net")
    hub.fetch("net")
    assert file.read_bytes() == BIG


def test_a_revision_and_a_folder_are_part_of_the_address(site: Site) -> None:
    assert paths(hub.fetch("pinned")) == ["config.json"]
    assert site.asked == [(f"/a/b/resolve/{'c' * 40}/deep/config.json", None)]


def test_a_pack_is_unpacked_beside_what_people_added(site: Site, tmp_path: Path) -> None:
    own = tmp_path / "home" / "pack" / "arcface.onnx"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    site.breaks = [50]
    assert paths(hub.fetch("pack")) == ["arcface.onnx", "det.onnx", "rec.onnx"]
    assert paths(tmp_path / "home") == ["pack/arcface.onnx", "pack/det.onnx", "pack/rec.onnx"]


def test_one_of_several_must_be_named(site: Site) -> None:
    with pytest.raises(WeightsMissing, match=r"say which.*several/one\.bin"):
        hub.fetch("several")
    assert hub.fetch("several/two.bin").read_bytes() == b"two"
    assert hub.resolve("several/two.bin").read_bytes() == b"two"
    with pytest.raises(WeightsMissing, match=r"put one\.bin from"):
        hub.resolve("several/one.bin")
    with pytest.raises(WeightsMissing, match="has no file three"):
        hub.fetch("several/three")
    assert len(paths(hub.fetch("several", everything=True))) == 2


def test_nothing_is_fetched_unasked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsMissing, match="facegen weights fetch net"):
        hub.resolve("net")
    assert site.asked == []
    monkeypatch.setenv("FACEGEN_DOWNLOAD", "1")
    assert hub.resolve("net").is_dir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsMissing):
        hub.resolve("pinned")
    with pytest.raises(WeightsMissing, match=r"HF_HUB_OFFLINE forbids.*put config\.json from"):
        hub.fetch("pinned")


def test_without_a_network_it_says_what_to_put_where(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("facegen.download.time.sleep", lambda seconds: None)
    with serving({}) as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.address)
    with pytest.raises(WeightsMissing) as error:
        hub.fetch("net")
    assert "cannot be had" in str(error.value)
    assert "put config.json from https://huggingface.co/a/b into" in str(error.value)
    assert str(tmp_path / "home" / "net") in str(error.value)
    with pytest.raises(WeightsMissing, match=r"only be got by hand: put a.bin from https://example.org/page"):
        hub.fetch("hand")


def test_the_command(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str, code: int = 0) -> tuple[str, str]:
        assert main(["weights", *words]) == code
        read = capsys.readouterr()
        return read.out, read.err

    assert "net                base     not on this machine" in told("list")[0]
    assert "revision not known" in told()[0]
    assert [row["name"] for row in json.loads(told("list", "several", "--json")[0])] == ["several"]
    assert "pack" not in told("list", "--commercial-only")[0].split()
    assert "facegen weights fetch net" in told("where", "net", code=2)[1]
    assert "Say what to fetch" in told("fetch", code=2)[1]

    refused = told("fetch", "person", "--commercial-only", code=2)[1]
    assert "person (MIT) works only with pack: research only" in refused
    assert site.asked == []

    assert "also needs net, pack" in told("fetch", "person")[0]
    out = told("fetch", "person", "--with-needs")[0]
    assert "also needs" not in out
    assert [line.split()[0] for line in out.splitlines()] == ["person", "net", "pack"]
    assert told("where", "net", "several/one.bin", code=2)[0].strip() == str(tmp_path / "home" / "net")

    assert "as published" in told("verify", "net")[0]
    (tmp_path / "home" / "pack" / "det.onnx").write_bytes(b"someone")
    out, err = told("verify", code=2)
    assert "det.onnx: has another size or checksum" in out
    assert "1 of " in err
    states = {Path(row["path"]).name: row["state"] for row in json.loads(told("verify", "--json", code=2)[0])}
    assert states["det.onnx"] == "changed"
    assert states["big.safetensors"] == "right"
    assert states["a.bin"] == "unknown"


def test_a_pack_that_is_not_the_published_one(site: Site, tmp_path: Path) -> None:
    site.files["/pack.zip"] = ZIP[:-1] + b"x"
    with pytest.raises(CheckpointBroken, match="SHA-256"):
        hub.fetch("pack")
    assert paths(tmp_path / "home") == []
