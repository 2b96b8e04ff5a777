"""A weight by name: where it lies on this machine, how it is fetched and checked, and whether its terms allow the use.

Nothing is downloaded unasked: `resolve` looks at what is there and says what is missing; `fetch`, or the environment
variable FACEGEN_DOWNLOAD=1, allows the network, and HF_HUB_OFFLINE=1 forbids it. FACEGEN_HOME is the folder of weights
(default ~/.cache/facegen). What is published at all is data: see facegen/manifest.py.
"""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from facegen.download import Wanted, download, sha256
from facegen.errors import CheckpointBroken, NotCommercial, OutputUnwritable, WeightsMissing
from facegen.manifest import File, Weights, manifest, objection, of_family

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
OWN = "mini.json"  # beside a model that facegen trained
CHECKSUMS = "SHA256SUMS"  # beside a folder of weights: sha256sum's format
WEIGHTS: Mapping[str, Weights] = manifest()

Watch = Callable[[str, int, int], None]
"""A file's name, bytes there, bytes in all (0: not known)."""


@dataclass(frozen=True)
class Listing:
    """A set of weights and where it lies."""

    weights: Weights
    path: Path | None

    def to_json(self) -> dict[str, Any]:
        weights = self.weights
        return {
            "name": weights.name,
            "kind": weights.kind,
            "path": None if self.path is None else str(self.path),
            "licence": weights.licence,
            "commercial": objection(weights, WEIGHTS) is None,
            "source": weights.source,
            "revision": weights.revision,
            "checksums": "known" if weights.verified else "unverified",
            "needs": list(weights.needs),
            "files": [
                {"path": one.path, "size": one.size, "sha256": one.sha256, "optional": one.optional}
                for one in weights.files
            ],
            "note": weights.note,
        }

    def __str__(self) -> str:
        weights = self.weights
        where = "not on this machine" if self.path is None else str(self.path)
        told = [weights.licence]
        if weights.name != "mini":
            told += [] if objection(weights, WEIGHTS) is None else ["no commercial use"]
            told += [] if weights.verified else ["unverified"]
            told += ["revision not known"] if weights.repo is not None and weights.revision is None else []
            told += [f"needs {', '.join(weights.needs)}"] if weights.needs else []
        told += [weights.note] if weights.note else []
        return f"{weights.name:18} {weights.kind:8} {where}\n{'':27} {'; '.join(told)}"


@dataclass(frozen=True)
class Checked:
    """One file of a set after a look at it.

    state: right, changed, missing (only of what must be there), unknown (no checksum is published).
    """

    path: Path
    state: str

    def __str__(self) -> str:
        told = {
            "right": "as published",
            "changed": "has another size or checksum than the published file; delete it and fetch it again",
            "missing": "is missing",
            "unknown": "no checksum is published; used unverified",
        }
        return f"{self.path}: {told[self.state]}"


def home() -> Path:
    """Where weights are kept: FACEGEN_HOME, else facegen below the user's cache folder."""
    given = os.environ.get("FACEGEN_HOME")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "facegen"


def list_weights() -> tuple[Weights, ...]:
    """Every set of weights that has a name."""
    return tuple(WEIGHTS.values())


def listing() -> list[Listing]:
    """The same, each with its place on this machine; touches no network."""
    return [Listing(weights, _locate(weights)) for weights in list_weights()]


def named(name: str) -> tuple[Weights, File | None]:
    """A set, or "set/path/of/one/file"; WeightsMissing for a name that is not known."""
    head, _, tail = name.partition("/")
    weights = WEIGHTS.get(_canonical(head))
    if weights is None:
        close = difflib.get_close_matches(_canonical(head), WEIGHTS, 1)
        hint = f" Did you mean {close[0]}?" if close else f" Known names: {', '.join(WEIGHTS)}."
        raise WeightsMissing(f"There are no weights called {name}, and no such path.{hint}")
    if not tail:
        return weights, None
    for file in weights.files:
        if tail in (file.path, PurePosixPath(file.path).name):
            return weights, file
    known = ", ".join(file.path for file in weights.files)
    raise WeightsMissing(f"{weights.name} has no file {tail}; it has {known}.")


# --- terms ----------------------------------------------------------------------------------------------------------


def licence(name: str) -> str:
    """What the terms of named weights are; empty for what is not in the table."""
    weights = WEIGHTS.get(_canonical(name))
    return weights.licence if weights else ""


def check_commercial(name: str) -> None:
    """NotCommercial, with the reason, for a name of weights that may not be used commercially.

    Of paths and hub ids facegen does not know the terms: it says so in the log, unless they are its own.
    """
    weights = WEIGHTS.get(_canonical(name.partition("/")[0]))
    if weights is not None:
        _refuse(objection(weights, WEIGHTS))
    elif not own(Path(name).expanduser()):
        log.warning("Whether %s may be used commercially is not known to facegen; read its terms.", name)


def check_commercial_family(family: str, variant: str | None = None) -> None:
    """The same for a file, by the adapter that reads it as its keys told; adapters that nobody published pass."""
    weights = of_family(family, variant, WEIGHTS)
    if weights is not None:
        _refuse(objection(weights, WEIGHTS))


def own(path: Path) -> bool:
    """Whether the weights are facegen's, embedded or trained with it, and so no published ones."""
    return any((folder / OWN).is_file() for folder in [path, *path.resolve().parents][:4])


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise NotCommercial(
            f"Only weights for commercial use were asked for, but {reason}; choose other weights, or leave out"
            " commercial_only."
        )


# --- finding --------------------------------------------------------------------------------------------------------


def resolve(name: str, *, part: str | None = None) -> Path:
    """The folder of named weights, of a hub id ("owner/name") or of a path; with `part` a file or folder inside.

    A name may go on with one of the set's files ("ip_adapter_faceid/ip-adapter-faceid_sd15.bin"), which is then given
    itself. Raises WeightsMissing, which says what to put where.
    """
    path = Path(name).expanduser()
    if _canonical(name.partition("/")[0]) in WEIGHTS and (not path.exists() or "/" not in name):
        folder = _resolved(*named(name))
    elif path.exists():
        folder = path
    elif name.count("/") == 1 and not name.startswith((".", "~", "/")):
        folder = _hub_id(name)
    else:
        named(name)
        raise AssertionError("a name that is not known is refused")
    if part is None:
        return folder
    if not (folder / part).exists():
        raise WeightsMissing(f"{folder / part} is not there; {name} is incomplete on this machine, fetch it again.")
    return folder / part


def _resolved(weights: Weights, file: File | None) -> Path:
    if file is None:
        place = _locate(weights)
    else:
        place = next((found for folder in _places(weights) if (found := folder / file.path).is_file()), None)
    if place is None and _may_download():
        place = fetch(weights.name if file is None else f"{weights.name}/{file.path}")
    if place is None:
        raise WeightsMissing(_how_to_get(weights, file))
    _announce(weights)
    return place


def pack_folder(folder: Path) -> Path:
    """Where a face pack's .onnx files are: in the folder itself, or one level deeper.

    antelopev2.zip holds a folder of its own name, so unpacking it leaves models/antelopev2/antelopev2/*.onnx, in which
    insightface finds nothing.
    """
    if any(folder.glob("*.onnx")) or (folder / "manifest.json").is_file():
        return folder
    below = sorted({path.parent for path in folder.glob("*/*.onnx")})
    return below[0] if len(below) == 1 else folder


def where(name: str) -> Path:
    """Where named weights, or one file of them, lie on this machine; WeightsMissing says where they belong."""
    weights, file = named(name)
    for folder in _places(weights):
        place = pack_folder(folder) if weights.kind == "pack" else folder
        if file is not None and (place / file.path).is_file():
            return place / file.path
        if file is None and folder.is_dir() and _complete(weights, place):
            return place
    raise WeightsMissing(_how_to_get(weights, file))


def _canonical(name: str) -> str:
    known = {key.replace("-", "_").lower(): key for key in WEIGHTS}
    return known.get(name.replace("-", "_").lower(), name)


def _locate(weights: Weights) -> Path | None:
    try:
        return where(weights.name)
    except WeightsMissing:
        return None


def _places(weights: Weights) -> Iterator[Path]:
    if weights.name == "mini":
        yield ASSETS / "mini"
        return
    yield home() / weights.name
    yield home() / "models" / weights.name
    yield Path("models") / weights.name
    if weights.kind == "pack":
        yield Path.home() / ".insightface" / "models" / weights.name
    if weights.repo is not None:
        for revision in dict.fromkeys((weights.revision, None)):
            if (cached := _cached(weights.repo, revision)) is not None:
                yield cached / weights.folder
    for repo in weights.also:
        if (cached := _cached(repo, None)) is not None:
            yield cached


def _complete(weights: Weights, folder: Path) -> bool:
    if weights.kind == "pack":
        return any(folder.glob("*.onnx"))  # the names of a pack's files are free (Arc2Face adds its own)
    if weights.name == "mini":
        return any(file.there(folder) for file in weights.files)
    return weights.complete(folder)


def _how_to_get(weights: Weights, file: File | None = None) -> str:
    if weights.name == "mini":
        return f"The embedded model is not in {ASSETS / 'mini'}; install facegen again."
    chosen = "FILE" if weights.choice else ""
    command = "/".join(filter(None, [weights.name, file.path if file else chosen]))
    by_command = "" if _by_hand(weights) else f"run facegen weights fetch {command}, or "
    return f"The weights {weights.name} are not on this machine: {by_command}{_put(weights, file)} ({weights.licence})."


def _put(weights: Weights, file: File | None = None) -> str:
    """Which files to put where by hand."""
    wanted = ", ".join(one.path for one in (weights.required if file is None else (file,)))
    one_of = "one of " if weights.choice and file is None else ""
    below = f" (there below {weights.folder}/)" if weights.folder else ""
    return f"put {one_of}{wanted} from {weights.source}{below} into {home() / weights.name}"


def _by_hand(weights: Weights) -> bool:
    return weights.archive is None and weights.address(weights.files[0]) is None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def _may_download() -> bool:
    return os.environ.get("FACEGEN_DOWNLOAD", "0").lower() in ("1", "true", "yes", "on") and not _offline()


def _hub_id(name: str) -> Path:
    if (cached := _cached(name, None)) is not None:
        return cached
    if not _may_download():
        raise WeightsMissing(
            f"{name} is neither a path nor in the Hugging Face cache; give a folder, or set FACEGEN_DOWNLOAD=1 to "
            "allow the download."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name))  # nosec
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise WeightsMissing(
            f"{name} cannot be had: {str(error).splitlines()[0] if str(error) else error!r}."
        ) from error


def _cached(repo: str, revision: str | None) -> Path | None:
    """A repository's snapshot in the Hugging Face cache; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))  # nosec
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


# --- fetching -------------------------------------------------------------------------------------------------------


def fetch(name: str, watch: Watch | None = None, *, everything: bool = False) -> Path:
    """Download named weights, or one file of them, into the folder of weights; what is already there stays.

    everything: also the optional files, and all of a set of which one is enough. A call that broke off goes on where it
    was. Raises WeightsMissing when they cannot be had (it says what to put where by hand), CheckpointBroken when a
    file is not the published one, OutputUnwritable.
    """
    weights, file = named(name)
    if weights.name == "mini":
        return where(name)
    if _by_hand(weights):
        raise WeightsMissing(f"{weights.name} can only be got by hand: {_put(weights, file)} ({weights.licence}).")
    if file is None and weights.choice and not everything:
        raise WeightsMissing(
            f"{weights.name} is several files of which one is enough; say which, for example facegen weights fetch"
            f" {weights.name}/{weights.required[0].path}, or --all. It has:"
            f" {', '.join(one.path for one in weights.files)}."
        )
    if _offline():
        raise WeightsMissing(f"HF_HUB_OFFLINE forbids the network; unset it, or by hand: {_put(weights, file)}.")
    folder = home() / weights.name
    if weights.archive is not None:
        return _fetch_archive(weights, weights.archive, watch)
    files = (file,) if file is not None else weights.files if everything else weights.required
    for one in files:
        _fetch_file(weights, one, folder, watch)
    if unverified := [one.path for one in files if one.sha256 is None and not one.path.endswith((".json", ".txt"))]:
        log.warning("%s: no checksum is published for %s; used unverified.", weights.name, ", ".join(unverified))
    return folder if file is None else folder / file.path


def missing_needs(weights: Weights) -> list[str]:
    """What the set works only with, through all steps, and which is not on this machine."""
    found: dict[str, None] = {}
    for name in weights.needs:
        for one in (name, *missing_needs(WEIGHTS[name])):
            if _locate(WEIGHTS[one]) is None:
                found[one] = None
    return list(found)


def _fetch_file(weights: Weights, file: File, folder: Path, watch: Watch | None) -> None:
    target = folder / file.path
    if file.there(folder) and (not target.is_file() or _state(file, target) != "changed"):
        return
    url = weights.address(file)
    assert url is not None, "what must be got by hand was refused before"
    _get(weights, file, Wanted(url, file.size, file.sha256), target, watch)


def _get(weights: Weights, file: File | None, wanted: Wanted, target: Path, watch: Watch | None) -> None:
    def show(done: int, total: int) -> None:
        if watch is not None:
            watch(target.name, done, total)

    try:
        download(wanted, target, show)
    except WeightsMissing as error:
        raise WeightsMissing(f"{error} Without the network: {_put(weights, file)}.") from error


def _fetch_archive(weights: Weights, archive: File, watch: Watch | None) -> Path:
    target, packed = home() / weights.name, home() / f"{weights.name}.zip"
    _get(weights, None, Wanted(archive.path, archive.size, archive.sha256), packed, watch)
    try:
        with tempfile.TemporaryDirectory(dir=home(), prefix=f".{weights.name}-") as scratch:
            unpacked = Path(scratch) / weights.name
            unpack(packed, unpacked)
            if target.is_dir():  # what people added to the pack stays (Arc2Face's recogniser)
                for path in unpacked.iterdir():
                    path.replace(target / path.name)
            else:
                unpacked.replace(target)
    except OSError as error:
        raise OutputUnwritable(f"{weights.name} cannot be written to {home()}: {error.strerror or error}.") from error
    packed.unlink(missing_ok=True)
    for checked in check(weights, target):
        if checked.state == "changed":
            raise CheckpointBroken(str(checked))
    return target


def unpack(archive: Path, folder: Path) -> None:
    """The .onnx files of a pack's zip, flat, whatever folders the zip has; other files and paths are left out.

    Raises CheckpointBroken for a damaged zip.
    """
    folder.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                name = PurePosixPath(member.filename).name
                if member.is_dir() or not name.endswith(".onnx"):
                    continue
                with packed.open(member) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointBroken(f"{archive} is damaged; fetch it again.") from error


# --- checking -------------------------------------------------------------------------------------------------------


def check(weights: Weights, folder: Path, files: Sequence[File] | None = None) -> list[Checked]:
    """A look at every file of the set that is in the folder or must be; all of a large file is read."""
    found = []
    for file in weights.files if files is None else files:
        path = folder / file.path
        if path.is_file():
            found.append(Checked(path, _state(file, path)))
        elif file.there(folder):
            found += [Checked(one, "unknown") for one in sorted(folder.glob(file.like or "")) if one.is_file()]
        elif not file.optional and not weights.choice:
            found.append(Checked(path, "missing"))
    return list({one.path: one for one in found}.values())


def _state(file: File, path: Path) -> str:
    if file.size is not None and path.stat().st_size != file.size:
        return "changed"
    if file.sha256 is None:
        return "unknown"
    return "right" if sha256(path) == file.sha256 else "changed"


def verify(weights: Weights, folder: Path) -> list[str]:
    """One sentence per file whose size or checksum is known and differs."""
    return [str(one) for one in check(weights, folder) if one.state == "changed"]


def write_checksums(folder: Path) -> Path:
    """Write SHA256SUMS for all files below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    return folder / CHECKSUMS


def check_checksums(folder: Path) -> list[str]:
    """One sentence per file that is missing or differs from SHA256SUMS; empty when all is well or there is none."""
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return []
    problems = []
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            problems.append(f"{folder / name} is missing.")
        elif sha256(folder / name) != digest:
            problems.append(f"{folder / name} is damaged or was changed.")
    return problems


@cache
def _announce(weights: Weights) -> None:
    """Said once per process."""
    if (reason := objection(weights, WEIGHTS)) is not None:
        log.warning("The weights %s may not be used commercially: %s.", weights.name, reason)
