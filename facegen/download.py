"""One file from the network: resumed where it broke off, checked, and put in its place whole or not at all.

What has arrived lies in `<name>.part` beside the target, with the server's tag of that version in `<name>.part.tag`; a
second call asks for the rest alone. Plain HTTP ranges (RFC 9110, 13.1.5 and 14), so any server and any mirror will do.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from facegen.errors import CheckpointBroken, OutputUnwritable, WeightsMissing

CHUNK = 1 << 20
ATTEMPTS = 4  # in a row that bring nothing
TIMEOUT = 30.0  # seconds without a byte

Progress = Callable[[int, int], None]
"""Bytes there, bytes in all (0 where the server does not say)."""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Wanted:
    """What to get: the address, and what the file must be as far as that is known."""

    url: str
    size: int | None = None
    sha256: str | None = None


class _Again(Exception):
    """The connection broke, or the server could not serve just now; the next attempt may."""


def download(wanted: Wanted, target: Path, progress: Progress | None = None, *, pause: float = 1.0) -> Path:
    """Get the file and return `target`; a call that was cancelled or broke off goes on where it was.

    pause: seconds before the first further attempt, doubled before each next one. Raises WeightsMissing (no network, no
    such file, not allowed), CheckpointBroken (not the published file; nothing of it is kept), OutputUnwritable (disk
    full, no permission).
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part):
            _complete(wanted, part, progress, pause)
            _check(wanted, part)
            part.replace(target)
            _tag(part).unlink(missing_ok=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        how = "free some space and call again, it goes on where it stopped" if full else "choose another FACEGEN_HOME"
        raise OutputUnwritable(f"{target} cannot be written: {error.strerror or error}; {how}.") from error
    return target


def _complete(wanted: Wanted, part: Path, progress: Progress | None, pause: float) -> None:
    fruitless = 0
    while True:
        before = _length(part)
        try:
            _more(wanted, part, progress)
            return
        except _Again as error:
            fruitless = 0 if _length(part) > before else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise WeightsMissing(f"{wanted.url} cannot be had ({error}).") from error
            time.sleep(pause * 2 ** max(fruitless - 1, 0))


def _more(wanted: Wanted, part: Path, progress: Progress | None) -> None:
    """One request for what is still missing; _Again where it broke off."""
    have = _length(part)
    if wanted.size is not None and have == wanted.size:
        return
    if wanted.size is not None and have > wanted.size:
        _forget(part)
        have = 0
    with _answer(wanted.url, part, have) as answer:
        start, total = _span(answer, have)
        if start not in (0, have):
            _forget(part)
            raise _Again("the server sent another part than was asked for")
        if wanted.size is not None and total is not None and total != wanted.size:
            _forget(part)
            raise CheckpointBroken(
                f"{wanted.url} is {total} bytes long, the published file {wanted.size}; it was replaced, fetch another"
                " version or report it."
            )
        _room(part.parent, None if total is None else total - start)
        tag = answer.headers.get("ETag", "")
        if tag and not tag.startswith("W/"):  # a weak tag does not promise the same bytes
            _tag(part).write_text(tag, "utf-8")
        with part.open("r+b" if part.exists() else "wb") as file:
            file.truncate(start)
            file.seek(start)
            _copy(answer, file, start, total, progress)
            file.flush()
            os.fsync(file.fileno())


def _copy(answer: IO[bytes], file: IO[bytes], done: int, total: int | None, progress: Progress | None) -> None:
    while True:
        if progress is not None:
            progress(done, total or 0)
        try:
            # one read at a time, so that what has arrived of a slow file is kept
            piece = answer.read1(CHUNK) if hasattr(answer, "read1") else answer.read(CHUNK)
        except (http.client.HTTPException, OSError) as error:
            raise _Again(_reason(error)) from error
        if not piece:
            break
        file.write(piece)
        done += len(piece)
    if total is not None and done < total:
        raise _Again(f"the connection closed after {done} of {total} bytes")


@contextmanager
def _answer(url: str, part: Path, have: int) -> Iterator[Any]:
    headers = {"User-Agent": "facegen", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if _tag(part).is_file():
            headers["If-Range"] = _tag(part).read_text("utf-8")
    request = urllib.request.Request(url, headers=headers)
    if token := os.environ.get("HF_TOKEN"):
        _introduce(request, token)
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(url, part, error) from error
    except urllib.error.URLError as error:
        raise _Again(_reason(error.reason)) from error
    except (http.client.HTTPException, OSError) as error:
        raise _Again(_reason(error)) from error
    with answer:
        yield answer


def _introduce(request: urllib.request.Request, token: str) -> None:
    """The user's token goes to the hub itself and to nobody it redirects to."""
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if urllib.parse.urlsplit(request.full_url).netloc == urllib.parse.urlsplit(hub).netloc:
        request.add_unredirected_header("Authorization", f"Bearer {token}")


def _refused(url: str, part: Path, error: urllib.error.HTTPError) -> Exception:
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        _forget(part)  # longer than the file is now
        return _Again("the file has changed")
    if error.code in (401, 403):
        return WeightsMissing(
            f"{url} is only for people who accepted its terms ({error.code}); do so on its page, then set HF_TOKEN."
        )
    if error.code in (404, 410):
        return WeightsMissing(f"{url} is not there any more ({error.code}).")
    if error.code == 429 or error.code >= 500:
        return _Again(f"the server answers {error.code}")
    return WeightsMissing(f"{url} cannot be had: the server answers {error.code}.")


def _span(answer: Any, have: int) -> tuple[int, int | None]:
    """Where the answer begins in the file, and how long the whole file is."""
    if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if found is None:
            return -1, None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = answer.headers.get("Content-Length")  # the whole file: the server knows no ranges, or it has changed
    return 0, None if length is None else int(length)


def _check(wanted: Wanted, part: Path) -> None:
    problem = None
    if wanted.size is not None and _length(part) != wanted.size:
        problem = f"{_length(part)} bytes long instead of {wanted.size}"
    elif wanted.sha256 is not None and sha256(part) != wanted.sha256:
        problem = "of another SHA-256 than the published file"
    if problem is not None:
        _forget(part)
        raise CheckpointBroken(f"What {wanted.url} gives is {problem}; it was thrown away, fetch it again.")


def _room(folder: Path, needed: int | None) -> None:
    free = shutil.disk_usage(folder).free
    if needed is not None and needed > free:
        raise OutputUnwritable(
            f"{folder} has {free / 1e9:.1f} GB free, the file needs {needed / 1e9:.1f}; free some space or set"
            " FACEGEN_HOME to another disk."
        )


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Two programs never write the same part."""
    lock = part.with_name(part.name + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WeightsMissing(f"{part} is being fetched by another program; wait until it is done.") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _length(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def _reason(error: object) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
