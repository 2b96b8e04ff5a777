"""Fetching a file from a real server: resumed, checked, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from facegen.download import ATTEMPTS, Wanted, download
from facegen.errors import CheckpointBroken, OutputUnwritable, WeightsMissing
from tests.server import Site, serving

CONTENT = np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving({"/a.bin": CONTENT, "/cdn/a.bin": CONTENT}) as running:
        yield running


def wanted(site: Site, **known: object) -> Wanted:
    return Wanted(f"{site.address}/a.bin", **{"size": len(CONTENT), "sha256": DIGEST, **known})  # type: ignore[arg-type]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_with_its_progress(site: Site, tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    path = download(wanted(site), tmp_path / "deep" / "a.bin", lambda done, total: shown.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert shown[0] == (0, len(CONTENT))
    assert shown[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert left(path.parent) == ["a.bin"]


@pytest.mark.parametrize("known", [True, False])
def test_a_broken_connection_goes_on_where_it_was(site: Site, tmp_path: Path, known: bool) -> None:
    site.breaks = [100_000, 50_000]
    facts = {} if known else {"size": None, "sha256": None}
    download(wanted(site, **facts), tmp_path / "a.bin", pause=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert site.asked == [("/a.bin", None), ("/a.bin", "bytes=100000-"), ("/a.bin", "bytes=150000-")]


def test_a_server_that_fails_now_and_then(site: Site, tmp_path: Path) -> None:
    site.failures = [503, 429]
    download(wanted(site), tmp_path / "a.bin", pause=0)
    assert len(site.asked) == 3
    site.failures = [500] * ATTEMPTS
    with pytest.raises(WeightsMissing, match="answers 500"):
        download(wanted(site), tmp_path / "b.bin", pause=0)


def test_a_cancelled_fetch_goes_on(site: Site, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(wanted(site), tmp_path / "a.bin", stop)
    part = tmp_path / "a.bin.part"
    arrived = part.stat().st_size
    assert 0 < arrived <= len(CONTENT)
    assert part.read_bytes() == CONTENT[:arrived]
    assert not (tmp_path / "a.bin").exists()
    download(wanted(site), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert left(tmp_path) == ["a.bin"]


def test_a_killed_program_leaves_a_part_that_is_used(site: Site, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom facegen.download import Wanted, download\n"
        "def stop(done, total):\n    if done > 0:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "download(Wanted(sys.argv[1]), Path(sys.argv[2]), stop)"
    )
    site.breaks = [120_000]
    run = subprocess.run([sys.executable, "-c", code, f"{site.address}/a.bin", str(tmp_path / "a.bin")], check=False)
    assert run.returncode == -signal.SIGKILL
    download(wanted(site), tmp_path / "a.bin")  # the dead program's lock is no hindrance
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_anew(site: Site, tmp_path: Path) -> None:
    site.breaks = [100_000, *[0] * ATTEMPTS]
    with pytest.raises(WeightsMissing, match="closed after"):
        download(wanted(site, size=None, sha256=None), tmp_path / "a.bin", pause=0)
    site.breaks = []
    site.files["/a.bin"], site.tag = CONTENT[::-1], '"second"'
    download(wanted(site, size=None, sha256=None), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges(site: Site, tmp_path: Path) -> None:
    site.ranges, site.breaks = False, [1000]
    download(wanted(site), tmp_path / "a.bin", pause=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_part_longer_than_the_file(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    download(wanted(site), tmp_path / "a.bin")
    (tmp_path / "b.bin.part").write_bytes(CONTENT + b"more")
    download(wanted(site, size=None), tmp_path / "b.bin", pause=0)
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("known", [{"sha256": "0" * 64}, {"size": len(CONTENT) + 1}, {"size": 7, "sha256": None}])
def test_another_file_than_published_is_thrown_away(site: Site, tmp_path: Path, known: dict[str, object]) -> None:
    with pytest.raises(CheckpointBroken, match=r"SHA-256|bytes long"):
        download(wanted(site, **known), tmp_path / "a.bin", pause=0)
    assert left(tmp_path) == []


@pytest.mark.parametrize(("status", "words"), [(404, "not there any more"), (401, "HF_TOKEN"), (400, "answers 400")])
def test_what_the_server_refuses(site: Site, tmp_path: Path, status: int, words: str) -> None:
    site.failures = [status]
    with pytest.raises(WeightsMissing, match=words):
        download(wanted(site), tmp_path / "a.bin")


def test_no_network(tmp_path: Path) -> None:
    with serving({}) as gone:
        address = gone.address
    with pytest.raises(WeightsMissing, match="cannot be had"):
        download(Wanted(f"{address}/a.bin"), tmp_path / "a.bin", pause=0)
    assert left(tmp_path) == []


def test_the_token_goes_to_the_hub_alone(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_ENDPOINT", site.address)
    site.redirect = site.address.replace("127.0.0.1", "localhost")
    site.breaks = [100_000]
    download(wanted(site), tmp_path / "a.bin", pause=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert site.introduced == ["Bearer secret", None, "Bearer secret", None]
    assert site.asked[-1] == ("/cdn/a.bin", "bytes=100000-"), "a redirection keeps the range"


def test_a_full_disk_is_told_of_before_it_begins(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("facegen.download.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OutputUnwritable, match="GB free"):
        download(wanted(site), tmp_path / "a.bin")


def test_a_disk_that_fills_up_keeps_what_has_arrived(site: Site, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an error, EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        with pytest.raises(OutputUnwritable, match="cannot be written"):
            download(wanted(site), tmp_path / "a.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert 0 < (tmp_path / "a.bin.part").stat().st_size <= 65_536
    download(wanted(site), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_two_programs_at_once(site: Site, tmp_path: Path) -> None:
    second: list[str] = []

    def meanwhile(done: int, total: int) -> None:
        if not second:
            with pytest.raises(WeightsMissing) as error:
                download(wanted(site), tmp_path / "a.bin")
            second.append(str(error.value))

    download(wanted(site), tmp_path / "a.bin", meanwhile)
    assert "another program" in second[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(site: Site, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputUnwritable, match="FACEGEN_HOME"):
        download(wanted(site), tmp_path / "a.bin")
