"""What `facegen weights` does: list, fetch, verify and where, as lines for people and data for programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from facegen import hub
from facegen.errors import CheckpointBroken, FacegenError, WeightsMissing, WrongRequest


@dataclass(frozen=True)
class Asked:
    """The words and flags of the command.

    names: sets, or files as "set/file"; everything: optional files too; needs: what the sets work only with as well.
    """

    names: tuple[str, ...] = ()
    everything: bool = False
    needs: bool = False
    commercial_only: bool = False
    watch: hub.Watch | None = None


@dataclass(frozen=True)
class Told:
    """The answer: lines, the same as plain data, and what went wrong after all lines were found."""

    lines: tuple[str, ...]
    data: Any
    problem: FacegenError | None = None


def listed(asked: Asked) -> Told:
    """Every set, or the named ones, with its place, terms and needs."""
    names = {hub.named(name)[0].name for name in asked.names}
    rows = [row for row in hub.listing() if not names or row.weights.name in names]
    if asked.commercial_only:
        rows = [row for row in rows if row.to_json()["commercial"]]
    return Told(tuple(map(str, rows)), [row.to_json() for row in rows])


def fetched(asked: Asked) -> Told:
    """Download the named sets or files; NotCommercial before anything is fetched."""
    if not asked.names:
        raise WrongRequest("Say what to fetch, for example facegen weights fetch instantid; facegen weights lists all.")
    names = list(asked.names)
    if asked.needs:
        for name in asked.names:
            names += [one for one in hub.missing_needs(hub.named(name)[0]) if one not in names]
    if asked.commercial_only:
        for name in names:
            hub.check_commercial(name)
    data, lines = [], []
    for name in names:
        path = hub.fetch(name, asked.watch, everything=asked.everything)
        lacking = [one for one in hub.missing_needs(hub.named(name)[0]) if one not in names]
        data.append({"name": name, "path": str(path), "needs": lacking})
        lines.append(f"{name}  {path}" + (f"  (also needs {', '.join(lacking)})" if lacking else ""))
    return Told(tuple(lines), data)


def verified(asked: Asked) -> Told:
    """Compare what is on this machine with what was published; its problem names the first file that differs."""
    data: list[dict[str, str]] = []
    lines: list[str] = []
    wrong: list[str] = []
    for name in asked.names or [row.weights.name for row in hub.listing() if row.path is not None]:
        weights, file = hub.named(name)
        folder = hub.where(weights.name) if file is None or weights.kind == "pack" else hub.home() / weights.name
        if weights.name == "mini":
            wrong += (bad := hub.check_checksums(folder))
            lines += bad or [f"{folder}: as published"]
            data += [{"path": str(folder), "state": "changed" if bad else "right"}]
            continue
        for one in hub.check(weights, folder, None if file is None else (file,)):
            lines.append(str(one))
            data.append({"path": str(one.path), "state": one.state})
            wrong += [str(one)] if one.state in ("changed", "missing") else []
    problem = (
        CheckpointBroken(f"{len(wrong)} of {len(data)} files are not as published: {wrong[0]}.") if wrong else None
    )
    return Told(tuple(lines), data, problem)


def placed(asked: Asked) -> Told:
    """The paths of the named sets or files; its problem says where one that is missing belongs."""
    if not asked.names:
        raise WrongRequest("Say what to look for, for example facegen weights where sdxl.")
    data: list[dict[str, str | None]] = []
    problem: FacegenError | None = None
    for name in asked.names:
        try:
            data.append({"name": name, "path": str(hub.where(name))})
        except WeightsMissing as error:
            data.append({"name": name, "path": None})
            problem = problem or error
    return Told(tuple(one["path"] for one in data if one["path"]), data, problem)


ACTIONS: Mapping[str, Callable[[Asked], Told]] = {
    "list": listed,
    "fetch": fetched,
    "verify": verified,
    "where": placed,
}
