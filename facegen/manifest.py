"""The published weights as data: `assets/weights.toml` read into frozen dataclasses, and what their terms add up to."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

FILE = Path(__file__).parent / "assets" / "weights.toml"
KINDS = ("base", "adapter", "lora", "encoder", "pack", "restorer", "decoder")
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class File:
    """One file of a set of weights."""

    path: str  # in its repository or folder, forward slashes; of an archive: where it is
    size: int | None = None  # bytes; None: not known to us
    sha256: str | None = None  # None: not known to us, so it is used unverified
    optional: bool = False  # the set works without it; fetched only when named
    like: str | None = None  # a pattern of files that are as good (another precision, another format)

    def there(self, folder: Path) -> bool:
        """Whether it, or one as good, lies in the folder."""
        if (folder / self.path).is_file():
            return True
        return self.like is not None and any(path.is_file() for path in folder.glob(self.like))


@dataclass(frozen=True)
class Weights:
    """A set of weights that has a name; the fields are told of in assets/weights.toml."""

    name: str
    kind: str
    licence: str
    files: tuple[File, ...]
    commercial: bool = True
    repo: str | None = None
    revision: str | None = None  # None: not pinned, for it is not known to us
    folder: str = ""
    also: tuple[str, ...] = ()
    url: str | None = None
    archive: File | None = None
    page: str | None = None
    needs: tuple[str, ...] = ()
    choice: bool = False
    family: str | None = None
    variant: str | None = None
    note: str = ""

    @property
    def source(self) -> str:
        """Where people get it."""
        if self.archive is not None:
            return self.archive.path
        return self.page or self.url or (f"{HUB}/{self.repo}" if self.repo else "part of facegen")

    @property
    def verified(self) -> bool:
        """Whether every file with numbers in it has a known checksum."""
        if self.archive is not None:
            return self.archive.sha256 is not None
        return all(file.sha256 for file in self.required if not file.path.endswith((".json", ".txt")))

    @property
    def required(self) -> tuple[File, ...]:
        """The files without which it does not work, or of which one is enough."""
        return tuple(file for file in self.files if not file.optional)

    def complete(self, folder: Path) -> bool:
        """Whether the folder holds what must be there."""
        there = [file.there(folder) for file in self.required]
        return any(there) if self.choice else all(there)

    def address(self, file: File) -> str | None:
        """Where the file is downloaded from; None for one that people must get by hand.

        HF_ENDPOINT takes the place of the hub's address.
        """
        if self.repo is not None:
            path = PurePosixPath(self.folder) / file.path
            endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
            return f"{endpoint}/{self.repo}/resolve/{quote(self.revision or 'main', safe='')}/{quote(str(path))}"
        return f"{self.url}/{quote(file.path)}" if self.url is not None else None


def read(path: Path = FILE) -> dict[str, Weights]:
    """Every set by its name, in the order of the file. Raises ValueError for what is no manifest."""
    with path.open("rb") as file:
        content = tomllib.load(file)
    found = {name: _weights(name, table) for name, table in content.items()}
    for weights in found.values():
        if unknown := set(weights.needs) - found.keys():
            raise ValueError(f"{weights.name} needs {min(unknown)}, which the manifest does not know.")
    return found


@cache
def manifest() -> Mapping[str, Weights]:
    """The manifest that came with facegen, read once."""
    return read()


def objection(weights: Weights, known: Mapping[str, Weights]) -> str | None:
    """Why the set may not be used commercially: its own terms, or those of what it needs; None where it may."""
    if not weights.commercial:
        return f"{weights.name}: {weights.licence}"
    for name in weights.needs:
        if reason := objection(known[name], known):
            return f"{weights.name} ({weights.licence}) works only with {reason}"
    return None


def of_family(family: str, variant: str | None, known: Mapping[str, Weights]) -> Weights | None:
    """The set that stands for the files an adapter reads; None for a family of ours that is not published."""
    found = [one for one in known.values() if (one.family or one.name) == family and one.kind == "adapter"]
    exact = [one for one in found if variant is not None and one.variant == variant]
    return next(iter(exact or found), None)


def _weights(name: str, table: Mapping[str, Any]) -> Weights:
    allowed = {field.name for field in fields(Weights)} - {"name"}
    if unknown := table.keys() - allowed:
        raise ValueError(f"{name} has a field {min(unknown)!r}, which no set has.")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    values["files"] = tuple(_file(name, one) for one in table["files"])
    if "archive" in table:
        values["archive"] = _file(name, table["archive"])
    weights = Weights(name=name, **values)
    for problem in _problems(weights):
        raise ValueError(f"{name}: {problem}.")
    return weights


def _file(name: str, table: Mapping[str, Any]) -> File:
    try:
        return File(**table)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _problems(weights: Weights) -> Iterator[str]:
    if weights.kind not in KINDS:
        yield f"the kind {weights.kind!r} is not among {', '.join(KINDS)}"
    if not weights.licence or not weights.required:
        yield "a licence and at least one file that must be there"
    ways = [weights.repo, weights.url, weights.page, weights.archive]
    if sum(way is not None for way in ways) != (weights.name != "mini"):
        yield "one of repo, url, page and archive says where it comes from"
    for file in (*weights.files, *([weights.archive] if weights.archive else [])):
        if file.sha256 is not None and (len(file.sha256) != 64 or not set(file.sha256) <= set("0123456789abcdef")):
            yield f"{file.path} has a checksum that is none"
        if file.size is not None and file.size <= 0:
            yield f"{file.path} has no size"
        if ".." in PurePosixPath(file.path).parts or file.path.startswith("/"):
            yield f"{file.path} leads out of its folder"
